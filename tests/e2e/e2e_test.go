// Package e2e runs podwall as a user does: real programs, real CNI plugins through cnitool, a real kernel, in namespaces of its own.
package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
)

func TestMain(m *testing.M) { os.Exit(testnet.RunTests(m.Run)) }

var (
	dual     = []testnet.Family{testnet.IPv4, testnet.IPv6}
	mainCNIs = []string{"bridge", "ptp"}
)

var nodes atomic.Int32

// setup describes the node of a test.
type setup struct {
	cni       string
	families  []testnet.Family  // dual if empty
	manifests map[string]string // by file name
	flags     []string          // of podwalld
}

// start lays out a node and starts podwalld on the manifests. The node goes with the test; a failed test shows daemon and ruleset.
func start(t *testing.T, s setup) *testnet.Node {
	t.Helper()
	n := lay(t, s)
	for name, text := range s.manifests {
		if err := n.WriteManifest(name, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// lay is start without the daemon.
func lay(t *testing.T, s setup) *testnet.Node {
	t.Helper()
	binaries, err := testnet.TestBinaries()
	if err != nil {
		t.Fatal(err)
	}
	if s.families == nil {
		s.families = dual
	}
	n, err := testnet.NewNode(t.Context(), testnet.Config{
		Name: fmt.Sprintf("n%d", nodes.Add(1)), CNI: s.cni, Families: s.families, Binaries: binaries, Podwall: true, DaemonFlags: s.flags,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			ruleset, err := n.Host.Run(ctx, "nft", "list", "table", "inet", "podwall")
			t.Logf("ruleset (%v):\n%s\npodwalld's log ends:\n%s", err, ruleset, n.Log())
		}
		if err := n.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return n
}

func add(t *testing.T, n *testnet.Node, namespace, name string, ports ...testnet.Port) *testnet.Pod {
	t.Helper()
	p, err := n.AddPod(t.Context(), namespace, name, "", ports...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// expect tries the probe once and wants this verdict.
func expect(t *testing.T, p testnet.Probe, want testnet.Verdict) {
	t.Helper()
	got, err := p.Try(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("%s %s -> %s %s: %s, want %s", p.Family, p.From.Name, p.To.Name, p.Port, got, want)
	}
}

// expectAll does so in every family of the node.
func expectAll(t *testing.T, n *testnet.Node, from, to *testnet.Host, port testnet.Port, want testnet.Verdict) {
	t.Helper()
	for _, f := range n.Families {
		expect(t, testnet.Probe{From: from, To: to, Family: f, Port: port}, want)
	}
}

// judge probes all cells of a matrix at once, in every family of the node.
func judge(t *testing.T, n *testnet.Node, m testnet.Matrix) {
	t.Helper()
	results, err := n.ObserveAll(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range testnet.Mismatches(results) {
		t.Error(r)
	}
}

// changeTimeout is how long a change of a manifest may take to reach the kernel.
const changeTimeout = 5 * time.Second

// eventually tries the probe until it has this verdict.
func eventually(t *testing.T, p testnet.Probe, want testnet.Verdict) {
	t.Helper()
	within(t, changeTimeout, p, want)
}

func within(t *testing.T, timeout time.Duration, p testnet.Probe, want testnet.Verdict) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for {
		got, err := p.Try(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s %s -> %s %s: still %s after %s, want %s", p.Family, p.From.Name, p.To.Name, p.Port, got, timeout, want)
		}
		time.Sleep(20 * time.Millisecond) // a node has so many probe ports
	}
}

// poll waits until the condition holds.
func poll(t *testing.T, what string, condition func() bool) {
	t.Helper()
	pollWithin(t, changeTimeout, what, condition)
}

func pollWithin(t *testing.T, timeout time.Duration, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", timeout, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// attachments returns the files that register pods.
func attachments(t *testing.T, n *testnet.Node) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.StateDir(), "attachments", "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// pluginCode executes the plugin and returns the code of its CNI error, 0 if it succeeded.
func pluginCode(t *testing.T, n *testnet.Node, verb string, p *testnet.Pod, conf map[string]any) (int, string) {
	t.Helper()
	config := map[string]any{"cniVersion": "1.1.0", "name": n.Name, "type": "podwall", "socket": n.Socket()}
	maps.Copy(config, conf)
	stdin, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.Plugin(t.Context(), verb, p, stdin)
	if err == nil {
		return 0, string(out)
	}
	var exit *exec.ExitError
	var failure struct {
		Code int    `json:"code"`
		Msg  string `json:"msg"`
	}
	if !errors.As(err, &exit) || json.Unmarshal(out, &failure) != nil || failure.Code == 0 {
		t.Fatalf("plugin %s: %v, and not a CNI error: %s", verb, err, out)
	}
	return failure.Code, failure.Msg
}

// prevResult is what the main plugin hands on.
func prevResult(p *testnet.Pod, addresses ...string) map[string]any {
	ips := make([]any, 0, len(addresses))
	for _, a := range addresses {
		ips = append(ips, map[string]any{"interface": 0, "address": a})
	}
	return map[string]any{"cniVersion": "1.1.0", "interfaces": []any{map[string]any{"name": "eth0", "sandbox": p.Netns()}}, "ips": ips}
}

// podManifest describes a pod by its labels and, as "name:number", its ports.
func podManifest(namespace, name, labels string, ports ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: %s, name: %s, labels: {%s}}\nspec:\n  containers:\n  - name: c\n", namespace, name, labels)
	for i, p := range ports {
		if i == 0 {
			b.WriteString("    ports:\n")
		}
		name, number, _ := strings.Cut(p, ":")
		fmt.Fprintf(&b, "    - {name: %s, containerPort: %s}\n", name, number)
	}
	return b.String()
}

// policyManifest is a NetworkPolicy with a spec in YAML flow form.
func policyManifest(namespace, name, spec string) string {
	return fmt.Sprintf("---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: %s, name: %s}\nspec: %s\n", namespace, name, spec)
}

// link is a network interface as ip(8) shows it.
type link struct {
	Index  int    `json:"ifindex"`
	Name   string `json:"ifname"`
	MAC    string `json:"address"`
	Peer   int    `json:"link_index"` // of a veth, in the peer's namespace
	Master string `json:"master"`
	Addrs  []struct {
		Local netip.Addr `json:"local"`
	} `json:"addr_info"`
}

func (l link) linkLocal() netip.Addr {
	for _, a := range l.Addrs {
		if a.Local.IsLinkLocalUnicast() {
			return a.Local
		}
	}
	return netip.Addr{}
}

// findLink returns the host's first link that is as wanted.
func findLink(t *testing.T, h *testnet.Host, wanted func(link) bool) link {
	t.Helper()
	out, err := h.Run(t.Context(), "ip", "-j", "addr")
	if err != nil {
		t.Fatal(err)
	}
	var list []link
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, wanted)
	if i < 0 {
		t.Fatalf("%s has no such link: %s", h.Name, out)
	}
	return list[i]
}

func linkNamed(t *testing.T, h *testnet.Host, name string) link {
	t.Helper()
	return findLink(t, h, func(l link) bool { return l.Name == name })
}

// hostLink returns the node's end of the pod's link.
func hostLink(t *testing.T, n *testnet.Node, p *testnet.Pod) link {
	t.Helper()
	peer := linkNamed(t, p.Host, "eth0").Peer
	return findLink(t, n.Host, func(l link) bool { return l.Index == peer })
}

// tap keeps everything that is delivered to a host, whatever its own stack makes of it.
type tap struct {
	fd   int
	seen []byte
}

// tapQueue holds what arrives between two looks. An overflow fails the test: it could hide what must not arrive.
const tapQueue = 16 << 20

func openTap(t *testing.T, h *testnet.Host) *tap {
	t.Helper()
	p := &tap{}
	err := h.In(func() error {
		all := int(binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL & 0xff}))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, all)
		if err != nil {
			return err
		}
		p.fd = fd
		t.Cleanup(func() { _ = unix.Close(fd) })
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, tapQueue)
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// has reports whether the marker has arrived so far.
func (p *tap) has(t *testing.T, marker string) bool {
	t.Helper()
	buf := make([]byte, 4096)
	for {
		size, from, err := unix.Recvfrom(p.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENETDOWN) { // ENETDOWN: a link went away, the others go on
			t.Fatal(err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && ll.Pkttype != unix.PACKET_OUTGOING {
			p.seen = append(p.seen, buf[:size]...)
		}
	}
	stats, err := unix.GetsockoptTpacketStats(p.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil || stats.Drops > 0 {
		t.Fatalf("the tap lost packets (%v, %v): what it has not seen may have arrived", stats, err)
	}
	return bytes.Contains(p.seen, []byte(marker))
}

// stream sends the same datagram from one socket every millisecond until the test ends.
func stream(t *testing.T, from *testnet.Host, to netip.AddrPort, body string) {
	t.Helper()
	var conn net.Conn
	err := from.In(func() error {
		var err error
		conn, err = net.Dial("udp", to.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var sender sync.WaitGroup
	sender.Go(func() {
		defer conn.Close()
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Millisecond):
				_, _ = conn.Write([]byte(body)) // an ICMP error of an earlier datagram shows here
			}
		}
	})
	t.Cleanup(func() {
		close(done)
		sender.Wait()
	})
}
