// Command cluster runs podwall's tests on a real Kubernetes cluster of its own, made of namespaces of this machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/podwall/podwall/tests/cluster/lab"
)

const usage = `Usage: cluster COMMAND

  build                            build the cluster's programs and images (a first time takes minutes)
  up [-nodes 1|2] [-cni bridge|ptp]
                                   start a cluster; it runs until 'down'
  down                             end it, and fail if it left anything on the machine
  load ARCHIVE...                  import image archives on every node
  exec NODE COMMAND...             run a command inside a node, such as: exec node1 kubectl get pods -A
  kubectl ARGS...                  run kubectl with the machine's files: kubectl apply -k install/kubernetes
  suite [-procs N] [-focus REGEXP] [-out DIR]
                                   run the upstream NetworkPolicy suite against whatever enforces policies there
  test [-cni bridge,ptp] [-run REGEXP] [-image ARCHIVE] [-keep]
                                   all of it: build, up, podwall deployed, upstream suite, podwall's own tests, down

Everything is kept in $CLUSTER_DIR, by default podwall-cluster in the user's cache directory; logs are in log/ there.
`

func init() {
	// A node that is bound to this process is bound to the thread that made it, which has to be the one that ends last.
	runtime.LockOSThread()
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	var exit *exec.ExitError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(exit.ExitCode())
	default:
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		fmt.Print(usage)
		return nil
	}
	if args[0] == "sandbox" && len(args) == 3 {
		return lab.Sandbox(args[1], args[2])
	}
	if os.Geteuid() != 0 {
		return errors.New("a cluster is made of namespaces: run this as root")
	}
	l, err := lab.New(os.Stdout)
	if err != nil {
		return err
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	switch args[0] {
	case "build":
		return l.Build(ctx)
	case "up":
		var o lab.Options
		flags.IntVar(&o.Nodes, "nodes", 2, "number of nodes, 1 or 2")
		flags.StringVar(&o.CNI, "cni", "bridge", "main CNI plugin, bridge or ptp")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		if err := l.Build(ctx); err != nil {
			return err
		}
		return l.Up(ctx, o)
	case "down":
		return l.Down(ctx)
	case "load":
		return l.Load(ctx, args[1:]...)
	case "exec":
		if len(args) < 3 {
			return errors.New("exec: want NODE COMMAND and its arguments")
		}
		n, err := l.Node(args[1])
		if err != nil {
			return err
		}
		return attached(n.Command(ctx, args[2:]...))
	case "kubectl":
		n, err := l.Node("node1")
		if err != nil {
			return err
		}
		return attached(n.NetCommand(ctx, append([]string{"kubectl"}, args[1:]...)...))
	case "suite":
		var s lab.Suite
		s.Flags(flags)
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return l.RunSuite(ctx, s)
	case "test":
		return test(ctx, l, flags, args[1:])
	}
	return fmt.Errorf("unknown command %q; 'cluster help' lists them", args[0])
}

// attached runs a command on this process's terminal.
func attached(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}
