// Command podwall is the CNI plugin: a chained plugin that has Kubernetes NetworkPolicy enforced for the pods it is called for.
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/cniplugin"
	"github.com/podwall/podwall/pkg/hostlink"
)

const about = `podwall is a CNI plugin that enforces Kubernetes NetworkPolicy. It is not run by hand: a container runtime calls it for every pod,
because the node's conflist (/etc/cni/net.d/*.conflist) names it last among its plugins, after the one that makes the pod's veth:

    { "cniVersion": "1.1.0", "name": "mynet", "plugins": [ { "type": "ptp", ... }, { "type": "podwall" } ] }

It tells the daemon podwalld, over /run/podwall/podwall.sock, which pod got which addresses, and answers once the pod's policies are in the kernel.
Optional keys of its entry: "socket" (absolute path), "timeout" (how long ADD waits, default "10s"), "logFile" (one JSON line per call).

    podwall-install status       is podwall in this node's conflist, and is the plugin current?
    podwalld status              is the daemon enforcing?
    podwall-install uninstall    remove podwall from this node`

func main() {
	if os.Getenv("CNI_COMMAND") == "DEL" {
		// After DEL skel fails if CNI_NETNS is the plugin's own namespace, which says nothing about a sandbox that is going away.
		// DEL must not fail: its error would leak the main plugin's interface and address.
		_ = os.Setenv("CNI_NETNS_OVERRIDE", "1")
	}
	plugin := &cniplugin.Plugin{
		Agent:    func(socket string) agentapi.Agent { return agentapi.NewClient(socket) },
		FindLink: hostlink.Find,
		Stdout:   os.Stdout,
		Stderr:   os.Stderr,
	}
	skel.PluginMainFuncs(plugin.Funcs(), version.All, about)
}
