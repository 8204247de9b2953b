// Command podwalld enforces NetworkPolicies for the pods of one node, and answers operators about it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
)

// Exit codes, part of the contract with scripts.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	exitNo     = 3 // the answer is no: drift
)

// version is set by the linker.
var version = ""

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

// command is one subcommand.
type command struct {
	name, args, about string
	run               func(ctx context.Context, c *call) error
}

// call is one invocation of a command.
type call struct {
	flags          *flag.FlagSet
	args           []string
	stdout, stderr io.Writer
}

func commands() []command {
	return []command{
		{"run", "", "enforce policies on this node until a signal ends it (the kernel keeps enforcing after that)", runDaemon},
		{"status", "", "show whether the node is enforced, and what is wrong with it", showStatus},
		{"pods", "", "list this node's pods with the policies that isolate them", showPods},
		{"policies", "", "list policies with the pods of this node that they select", showPolicies},
		{"ruleset", "", "print the ruleset as computed; --kernel as loaded; --diff what differs (exit code 3)", showRuleset},
		{"health", "", "exit 0 if the daemon is synced and enforcing (for exec probes)", showHealth},
		{"version", "", "print the version", showVersion},
	}
}

const help = `podwalld enforces Kubernetes NetworkPolicies on one node, with one nftables table, under any CNI plugin that gives pods a veth.

Usage: podwalld COMMAND [flags]

Commands:
%s
'podwalld COMMAND --help' shows a command's flags. Every flag can also be given by the environment:
--log-level=debug is PODWALL_LOG_LEVEL=debug.

Without Kubernetes, keep the policies as files:
  podwalld run --manifests /etc/podwall/manifests

Exit codes: 0 ok, 1 failed, 2 usage, 3 the answer is no.
`

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
	case "-version", "--version":
		args = []string{"version"}
	}
	for _, cmd := range commands() {
		if cmd.name != args[0] {
			continue
		}
		flags := flag.NewFlagSet("podwalld "+cmd.name, flag.ContinueOnError)
		flags.SetOutput(stderr)
		flags.Usage = func() {
			_, _ = fmt.Fprintf(flags.Output(), "podwalld %s: %s.\n\nFlags:\n", cmd.name, cmd.about)
			flags.PrintDefaults()
		}
		err := cmd.run(ctx, &call{flags: flags, args: args[1:], stdout: stdout, stderr: stderr})
		return exitCode(err, stderr)
	}
	_, _ = fmt.Fprintf(stderr, "podwalld: unknown command %q; 'podwalld help' lists them\n", args[0])
	return exitUsage
}

func exitCode(err error, stderr io.Writer) int {
	var usage usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return exitOK
	case errors.Is(err, errNo):
		return exitNo
	case errors.As(err, &usage):
		_, _ = fmt.Fprintln(stderr, "podwalld:", err)
		return exitUsage
	}
	_, _ = fmt.Fprintln(stderr, "podwalld:", err)
	return exitFailed
}

func printHelp(w io.Writer) {
	var list strings.Builder
	for _, c := range commands() {
		fmt.Fprintf(&list, "  %-10s %s\n", c.name, c.about)
	}
	_, _ = fmt.Fprintf(w, help, list.String())
}

// parse reads the flags; those that were not given are taken from the environment.
func (c *call) parse() error {
	if err := c.flags.Parse(c.args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError{fmt.Errorf("%w; see --help", err)}
	}
	if rest := c.flags.Args(); len(rest) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q; see --help", rest[0])}
	}
	given := map[string]bool{}
	c.flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var errs []error
	c.flags.VisitAll(func(f *flag.Flag) {
		name := "PODWALL_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value, ok := os.LookupEnv(name)
		if !ok || given[f.Name] {
			return
		}
		if err := f.Value.Set(value); err != nil {
			errs = append(errs, fmt.Errorf("%s=%q: %w", name, value, err))
		}
	})
	if err := errors.Join(errs...); err != nil {
		return usageError{err}
	}
	return nil
}

func showVersion(_ context.Context, c *call) error {
	if err := c.parse(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(c.stdout, "podwalld", versionText())
	return err
}

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
