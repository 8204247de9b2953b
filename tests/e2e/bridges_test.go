package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podwall/podwall/internal/testnet"
)

// bridgeShows reports whether a bridge itself shows its IPv4 and its IPv6 packets to netfilter.
func bridgeShows(t *testing.T, n *testnet.Node, bridge string) bool {
	t.Helper()
	out, err := n.Host.Run(t.Context(), "ip", "-d", "link", "show", "dev", bridge)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(out, "nf_call_iptables 1 nf_call_ip6tables 1")
}

// TestBridgeSwitchedOff holds that a bridge of pods shows its packets to netfilter though the node has that off, that other bridges
// do not, and that somebody who switches it off is undone and named.
func TestBridgeSwitchedOff(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "bridge", manifests: quiet})
	for _, command := range [][]string{
		{"sysctl", "-w", "net.bridge.bridge-nf-call-iptables=0", "net.bridge.bridge-nf-call-ip6tables=0"},
		{"ip", "link", "add", "br-vms", "type", "bridge"},
	} {
		if _, err := n.Host.Run(t.Context(), command...); err != nil {
			t.Fatal(err)
		}
	}
	a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.TCP(80))
	bridge := hostLink(t, n, a).Master
	if !bridgeShows(t, n, bridge) || bridgeShows(t, n, "br-vms") {
		t.Errorf("%s shows its packets: %v, want true; br-vms does: %v, want false", bridge, bridgeShows(t, n, bridge), bridgeShows(t, n, "br-vms"))
	}
	expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Denied)

	if _, err := n.Host.Run(t.Context(), "ip", "link", "set", "dev", bridge, "type", "bridge", "nf_call_iptables", "0", "nf_call_ip6tables", "0"); err != nil {
		t.Fatal(err)
	}
	pollWithin(t, sweepTimeout, "the bridge shows its packets again", func() bool { return bridgeShows(t, n, bridge) })
	poll(t, "it is in the log", func() bool {
		return strings.Contains(n.Log(), "somebody has switched off what shows a bridge's traffic")
	})
	expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Denied)
}

// TestBridgeModuleMissing holds that without br_netfilter no pod of a bridge is called enforced: an ADD is refused and says what to
// load, and pods that are there already are reported.
func TestBridgeModuleMissing(t *testing.T) {
	t.Parallel()
	n := lay(t, setup{cni: "bridge"})
	for name, text := range quiet {
		if err := n.WriteManifest(name, text); err != nil {
			t.Fatal(err)
		}
	}
	// The module is part of this kernel, perhaps. What is seen of it is its sysctls; `ip netns exec` gives the daemon mounts of its own.
	podwalld, script := n.Binaries.Podwalld, filepath.Join(n.Dir, "without-module")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nmount -t tmpfs none /proc/sys/net/bridge && exec "+podwalld+" \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(program string) {
		t.Helper()
		if err := n.StopDaemon(); err != nil {
			t.Fatal(err)
		}
		n.Binaries.Podwalld = program
		if err := n.StartDaemon(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	states := func() string {
		t.Helper()
		var all strings.Builder
		for _, view := range []string{"status", "pods"} {
			out, err := n.Host.Run(t.Context(), podwalld, view, "--socket", n.Socket())
			if err != nil {
				t.Fatal(err)
			}
			all.WriteString(out)
		}
		return all.String()
	}
	run(script)
	if _, err := n.AddPod(t.Context(), "default", "a", ""); err == nil || !strings.Contains(err.Error(), "modprobe br_netfilter") {
		t.Fatalf("ADD: %v, want to be refused and told to modprobe br_netfilter", err)
	}
	run(podwalld)
	if _, err := n.CNITool(t.Context(), "del", n.Pod("default/a")); err != nil { // as a runtime does after an ADD that has failed
		t.Fatal(err)
	}
	if err := n.Add(t.Context(), n.Pod("default/a")); err != nil {
		t.Fatal(err)
	}
	if out := states(); strings.Contains(out, "br_netfilter") || !strings.Contains(out, "enforced") {
		t.Errorf("with the module:\n%s", out)
	}
	run(script)
	poll(t, "the pod is unenforceable, and why", func() bool {
		out := states()
		return strings.Contains(out, "unenforceable (") && strings.Contains(out, "Pod default/a: it is not enforced") && strings.Contains(out, "modprobe br_netfilter")
	})
	t.Logf("without the module:\n%s", states())
	run(podwalld)
	poll(t, "the pod is enforced again", func() bool { return !strings.Contains(states(), "br_netfilter") })
}
