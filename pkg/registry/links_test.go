package registry

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/attach"
)

// inNetNS moves the test's goroutine into a network namespace of its own, for good: the thread ends with the goroutine.
func inNetNS(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// addVeth returns the host side of a new veth, veth0.
func addVeth(t *testing.T) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth0"}, PeerName: "veth0p"}))
	l, err := netlink.LinkByName("veth0")
	must(t, err)
	return l
}

func addBridge(t *testing.T, name string) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}))
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l
}

func TestLookup(t *testing.T) {
	t.Parallel()
	inNetNS(t)
	veth := addVeth(t)
	host := attach.HostLink{Name: "veth0", Index: veth.Attrs().Index}
	look := func(want Link) {
		t.Helper()
		got, err := Links{}.Lookup(host)
		must(t, err)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	look(Link{Exists: true, Name: "veth0"})
	must(t, netlink.LinkSetMaster(veth, addBridge(t, "br0")))
	look(Link{Exists: true, Name: "veth0", Bridge: "br0"})
	must(t, netlink.LinkSetName(veth, "renamed"))
	look(Link{Exists: true, Name: "renamed", Bridge: "br0"})
	if i, err := (Links{}).Index("renamed"); err != nil || i != host.Index {
		t.Errorf("Index: %d, %v", i, err)
	}
	must(t, netlink.LinkDel(veth))
	addVeth(t) // the name again, another link
	look(Link{})
	if i, err := (Links{}).Index("nobody"); err != nil || i != 0 {
		t.Errorf("Index of nobody: %d, %v", i, err)
	}
}

// TestToward holds which link a pod is directly behind: nobody is behind a gateway.
func TestToward(t *testing.T) {
	t.Parallel()
	inNetNS(t)
	veth := addVeth(t)
	must(t, netlink.LinkSetUp(veth))
	peer, err := netlink.LinkByName("veth0p")
	must(t, err)
	must(t, netlink.LinkSetUp(peer))
	addr, err := netlink.ParseAddr("10.0.0.1/24")
	must(t, err)
	must(t, netlink.AddrAdd(veth, addr))
	route := func(cidr, gateway string) {
		t.Helper()
		_, dst, err := net.ParseCIDR(cidr)
		must(t, err)
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Dst: dst, Gw: net.ParseIP(gateway)}))
	}
	route("10.1.0.5/32", "")
	route("10.2.0.0/16", "10.0.0.9")
	route("fd00::5/128", "")
	for ip, want := range map[string]string{"10.0.0.2": "veth0", "10.1.0.5": "veth0", "fd00::5": "veth0", "10.2.0.1": "", "192.0.2.1": "", "fd00::6": ""} {
		got, err := Links{}.Toward(netip.MustParseAddr(ip))
		if err != nil || got != want {
			t.Errorf("%s is behind %q (%v), want %q", ip, got, err, want)
		}
	}
}

// switchOff hides all bridged packets of the namespace, as an installer of something else does.
func switchOff(t *testing.T) {
	t.Helper()
	for _, c := range callBridge {
		must(t, os.WriteFile(filepath.Join(bridgeSysctls, c.sysctl), []byte("0"), 0o600))
	}
}

// TestShowBridged holds that a bridge shows its packets whatever happens to the sysctl afterwards, and other bridges do not.
func TestShowBridged(t *testing.T) {
	t.Parallel()
	inNetNS(t)
	bridge := addBridge(t, "br0")
	addBridge(t, "br1")
	veth := addVeth(t)
	must(t, netlink.LinkSetMaster(veth, bridge))
	hidden := func(want bool) {
		t.Helper()
		got, err := Links{}.Lookup(attach.HostLink{Name: "veth0", Index: veth.Attrs().Index})
		must(t, err)
		if got.Hidden != want {
			t.Errorf("hidden: %v, want %v", got.Hidden, want)
		}
	}
	hidden(false) // by the sysctl, which is on in a new namespace
	switchOff(t)
	hidden(true)
	options := func(bridge, want string) {
		t.Helper()
		for _, c := range callBridge {
			// sysfs shows the namespace that mounted it, so a netlink dump is asked: the attribute is in the bridge's own data.
			if got := bridgeOption(t, bridge, c.option); got != want {
				t.Errorf("%s of %s is %s, want %s", c.option, bridge, got, want)
			}
		}
	}
	options("br0", "0")
	must(t, Links{}.ShowBridged("br0"))
	hidden(false)
	options("br0", "1")
	options("br1", "0")

	for _, c := range callBridge { // one of them is enough to be open
		must(t, setBridgeAttr(bridge, c.attr, 0))
		hidden(true)
		must(t, Links{}.ShowBridged("br0"))
		hidden(false)
	}
	if err := (Links{}).ShowBridged("nobody"); err == nil || !strings.Contains(err.Error(), "bridge nobody") {
		t.Errorf("a bridge that does not exist: %v", err)
	}
}

// TestShowBridgedRefused holds that a bridge is not taken for shown because nothing has failed: it is read back.
func TestShowBridgedRefused(t *testing.T) {
	t.Parallel()
	inNetNS(t)
	addBridge(t, "br0")
	switchOff(t)
	ignore := func(netlink.Link, int, uint8) error { return nil }
	only4 := func(bridge netlink.Link, attr int, value uint8) error {
		if attr == callBridge[0].attr {
			return setBridgeAttr(bridge, attr, value)
		}
		return unix.EOPNOTSUPP
	}
	for _, tt := range []struct {
		name  string
		links Links
		want  []string
	}{
		{"module missing", Links{sysctls: t.TempDir()}, []string{"modprobe br_netfilter"}},
		{"not permitted", Links{set: func(netlink.Link, int, uint8) error { return unix.EPERM }}, []string{"IPv4", unix.EPERM.Error(), "sysctl -w net.bridge.bridge-nf-call-iptables=1"}},
		{"no effect", Links{set: ignore}, []string{"IPv4", "off again", "sysctl -w net.bridge.bridge-nf-call-iptables=1"}},
		{"IPv6 not supported", Links{set: only4}, []string{"IPv6", unix.EOPNOTSUPP.Error(), "sysctl -w net.bridge.bridge-nf-call-ip6tables=1"}},
	} {
		err := tt.links.ShowBridged("br0")
		if err == nil {
			t.Errorf("%s: no error", tt.name)
			continue
		}
		for _, want := range append(tt.want, "bridge br0") {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not contain %q", tt.name, err, want)
			}
		}
	}
	for _, c := range callBridge { // then the attribute is not needed
		must(t, os.WriteFile(filepath.Join(bridgeSysctls, c.sysctl), []byte("1"), 0o600))
	}
	must(t, Links{set: func(netlink.Link, int, uint8) error { return unix.EPERM }}.ShowBridged("br0"))
}

// TestWatch holds that the end of a link is told.
func TestWatch(t *testing.T) {
	t.Parallel()
	inNetNS(t)
	veth := addVeth(t)
	ctx, cancel := context.WithCancel(t.Context())
	gone, done := make(chan int, 256), make(chan error, 1)
	ready := make(chan struct{})
	ns, err := netns.Get()
	must(t, err)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		close(ready)
		done <- Links{}.Watch(ctx, func(index int) { gone <- index })
	}()
	<-ready
	timeout := time.After(10 * time.Second)
	for told := false; !told; {
		// The subscription may not be there yet for the first ones.
		must(t, netlink.LinkDel(veth))
		select {
		case index := <-gone: // of one of its ends, and of the other
			for told = index == veth.Attrs().Index; !told; {
				select {
				case index = <-gone:
					told = index == veth.Attrs().Index
				case <-timeout:
					t.Fatalf("told of the end of link %d, want %d", index, veth.Attrs().Index)
				}
			}
		case <-timeout:
			t.Fatal("nobody told that a link has ended")
		case <-time.After(100 * time.Millisecond):
			veth = addVeth(t)
		}
	}
	cancel()
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(10 * time.Second):
		t.Fatal("Watch does not end with its context")
	}
}

// bridgeOption reads an option of a bridge as iproute2 shows it.
func bridgeOption(t *testing.T, bridge, name string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "ip", "-d", "link", "show", bridge).Output() // inherits the thread's namespace
	must(t, err)
	fields := strings.Fields(string(out))
	if i := slices.Index(fields, name); i >= 0 && i+1 < len(fields) {
		return fields[i+1]
	}
	t.Fatalf("ip does not show %s: %s", name, out)
	return ""
}
