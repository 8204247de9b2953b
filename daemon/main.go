// Command podwalld enforces NetworkPolicies for the pods of one node, and answers operators about it.
package main

import (
	"context"
	"io"
	"os"
	"runtime/debug"

	"github.com/podwall/podwall/pkg/cli"
)

// version is set by the linker.
var version = ""

func main() { program(os.Args[1:]).Main() }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	return program(args).Run(ctx, args, stdout, stderr)
}

// program is podwalld for one command line: the commands that have arguments beside flags read them there.
func program(args []string) cli.Program {
	with := func(f func(context.Context, *cli.Call, []string) error) func(context.Context, *cli.Call) error {
		return func(ctx context.Context, c *cli.Call) error { return f(ctx, c, args[1:]) }
	}
	return cli.Program{Name: "podwalld", Version: versionText(), Help: help, Commands: []cli.Command{
		{Name: "run", About: "enforce policies on this node until a signal ends it (the kernel keeps enforcing after that)", Run: runDaemon},
		{Name: "status", About: "show whether the node is enforced, and what is wrong with it", Run: showStatus},
		{Name: "pods", About: "list this node's pods with the policies that isolate them", Run: showPods},
		{Name: "policies", About: "list policies with the pods of this node that they select", Run: showPolicies},
		{Name: "explain", About: "say whether policies allow a connection, and which rule decides (exit code 3: denied)", Run: with(explainConnection)},
		{Name: "matrix", About: "show who may reach whom", Run: with(showMatrix)},
		{Name: "denials", About: "show what policies denied lately, with the names of both pods; -f follows", Run: showDenials},
		{Name: "ruleset", About: "print the ruleset as computed; --kernel as loaded; --diff what differs (exit code 3)", Run: showRuleset},
		{Name: "lint", About: "find mistakes in a directory of policies (exit code 3)", Run: with(lintDirectory)},
		{Name: "health", About: "exit 0 if the daemon is synced and enforcing (for exec probes)", Run: showHealth},
	}}
}

const help = `podwalld enforces Kubernetes NetworkPolicies on one node, with two nftables tables, under any CNI plugin that gives pods a veth.

Usage: podwalld COMMAND [flags]

Commands:
%s
'podwalld COMMAND --help' shows a command's flags. Every flag can also be given by the environment:
--log-level=debug is PODWALL_LOG_LEVEL=debug.

Without Kubernetes, keep the policies as files:
  podwalld run --manifests /etc/podwall/manifests

Exit codes: 0 ok, 1 failed, 2 usage, 3 the answer is no.
`

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
