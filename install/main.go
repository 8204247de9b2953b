// Command podwall-install puts the CNI plugin podwall on a node and into the conflist of its container runtime, and takes both out again.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// Exit codes, part of the contract with scripts.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	exitNo     = 3 // status: missing or outdated
)

// version is set by the linker.
var version = "(devel)"

// errNo makes the exit code 3 after the answer has been printed.
var errNo = errors.New("the answer is no")

// usageError is an error of the command line.
type usageError struct{ error }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

const help = `podwall-install puts the CNI plugin podwall on this node and into the conflist of the node's container runtime, and takes both out again.

Usage: podwall-install COMMAND [flags]

Commands:
%s
'podwall-install COMMAND --help' shows a command's flags. Every flag can also be given by the environment:
--cni-conf-dir=/x is PODWALL_CNI_CONF_DIR=/x.

install runs as often as you like: it writes only what differs. It needs the conflist of a main CNI plugin (bridge, ptp, flannel, ...),
because podwall is chained after it; --wait 5m waits for one. Pods that run already are not restarted: podwalld adopts them.

uninstall opens the node: no policy is enforced on it afterwards. Stopping podwalld, or deleting its DaemonSet, is not uninstalling:
the rules stay, and new pods wait for podwalld to come back.

Exit codes: 0 ok, 1 failed, 2 usage, 3 status: missing or outdated.
`

// command is one subcommand.
type command struct {
	name, about string
	flags       func(*flag.FlagSet, *config)
	run         func(*installer, context.Context) error
}

func commands() []command {
	return []command{
		{"install", "copy the plugin, check that it runs, and put its entry into the conflist that the runtime uses", installFlags, (*installer).install},
		{"uninstall", "tell podwalld to stand down, take the entry out of every conflist, and remove the nftables tables", uninstallFlags, (*installer).uninstall},
		{"status", "show whether the plugin and the entry are there and as install would make them (if not: exit code 3)", statusFlags, (*installer).status},
	}
}

// run is main without the process: it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		printHelp(stderr)
		return exitUsage
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		printHelp(stdout)
		return exitOK
	case "version", "--version":
		_, _ = fmt.Fprintln(stdout, "podwall-install", version)
		return exitOK
	}
	for _, cmd := range commands() {
		if cmd.name == args[0] {
			return exitCode(runCommand(ctx, cmd, args[1:], stdout, stderr), stderr)
		}
	}
	_, _ = fmt.Fprintf(stderr, "podwall-install: unknown command %q; 'podwall-install help' lists them\n", args[0])
	return exitUsage
}

func runCommand(ctx context.Context, cmd command, args []string, stdout, stderr io.Writer) error {
	var cfg config
	flags := flag.NewFlagSet("podwall-install "+cmd.name, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // exitCode prints errors
	cmd.flags(flags, &cfg)
	err := flags.Parse(args)
	if errors.Is(err, flag.ErrHelp) {
		flags.SetOutput(stdout)
		_, _ = fmt.Fprintf(stdout, "podwall-install %s: %s.\n\nFlags:\n", cmd.name, cmd.about)
		flags.PrintDefaults()
		return nil
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if err == nil {
		err = fromEnvironment(flags)
	}
	if err == nil {
		err = cfg.complete()
	}
	if err != nil {
		return usageError{fmt.Errorf("%w; see podwall-install %s --help", err, cmd.name)}
	}
	in, err := newInstaller(cfg, stdout, stderr)
	if err != nil {
		return err
	}
	return cmd.run(in, ctx)
}

// fromEnvironment sets the flags that were not given.
func fromEnvironment(flags *flag.FlagSet) error {
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var errs []error
	flags.VisitAll(func(f *flag.Flag) {
		name := "PODWALL_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value, ok := os.LookupEnv(name)
		if !ok || given[f.Name] {
			return
		}
		if err := f.Value.Set(value); err != nil {
			errs = append(errs, fmt.Errorf("%s=%q: %w", name, value, err))
		}
	})
	return errors.Join(errs...)
}

func exitCode(err error, stderr io.Writer) int {
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errNo):
		return exitNo
	case errors.As(err, &usage):
		_, _ = fmt.Fprintln(stderr, "podwall-install:", err)
		return exitUsage
	}
	_, _ = fmt.Fprintln(stderr, "podwall-install:", err)
	return exitFailed
}

func printHelp(w io.Writer) {
	var list strings.Builder
	for _, c := range commands() {
		fmt.Fprintf(&list, "  %-10s %s\n", c.name, c.about)
	}
	_, _ = fmt.Fprintf(w, help, list.String())
}
