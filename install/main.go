// Command podwall-install puts the CNI plugin podwall on a node and into the conflist of its container runtime, and takes both out again.
package main

import (
	"context"
	"flag"
	"io"

	"github.com/podwall/podwall/pkg/cli"
)

// version is set by the linker.
var version = "(devel)"

func main() { program().Main() }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	return program().Run(ctx, args, stdout, stderr)
}

func program() cli.Program {
	return cli.Program{Name: "podwall-install", Version: version, Help: help, Commands: []cli.Command{
		{Name: "install", About: "copy the plugin, check that it runs, and put its entry into the conflist that the runtime uses", Run: command(installFlags, (*installer).install)},
		{Name: "uninstall", About: "tell podwalld to stand down, take the entry out of every conflist, and remove the nftables tables", Run: command(uninstallFlags, (*installer).uninstall)},
		{Name: "status", About: "show whether the plugin and the entry are there and as install would make them (if not: exit code 3)", Run: command(statusFlags, (*installer).status)},
	}}
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

func command(flags func(*flag.FlagSet, *config), act func(*installer, context.Context) error) func(context.Context, *cli.Call) error {
	return func(ctx context.Context, c *cli.Call) error {
		var cfg config
		flags(c.Flags, &cfg)
		if err := c.Parse(); err != nil {
			return err
		}
		if err := cfg.complete(); err != nil {
			return cli.UsageError{Err: err}
		}
		in, err := newInstaller(cfg, c.Stdout, c.Stderr)
		if err != nil {
			return err
		}
		return act(in, ctx)
	}
}
