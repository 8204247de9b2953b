package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/conflist"
)

// sweepTimeout is how long the daemon may take to find what it is not told of: it looks at links and tables every 10 s.
const sweepTimeout = 15 * time.Second

// cell is about TCP port 80 of pods of the namespace default.
func cell(from, to string, want bool) testnet.Cell {
	return testnet.Cell{From: "default/" + from, To: "default/" + to, Port: testnet.TCP(80), Want: want}
}

var clientAndGuest = podManifest("default", "client", "role: client") + podManifest("default", "guest", "role: guest")

// TestFlushedTables holds that what somebody else takes out of podwall's tables while there is no daemon comes back with its
// start, and that while there is one they cannot be touched, or on a kernel whose tables have no owner (before Linux 6.9) come
// back at once.
func TestFlushedTables(t *testing.T) {
	t.Parallel()
	linkLocalProbe := func(t *testing.T, from, to *testnet.Pod) testnet.Probe {
		t.Helper()
		return testnet.Probe{From: from.Host, To: to.Host, Family: testnet.IPv6, Port: testnet.TCP(80), Via: netip.AddrPortFrom(linkLocal(t, from, to), 80)}
	}
	probe := func(_ *testing.T, from, to *testnet.Pod) testnet.Probe {
		return testnet.Probe{From: from.Host, To: to.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}
	}
	for _, tt := range []struct {
		name, cni, command string
		probe              func(t *testing.T, from, to *testnet.Pod) testnet.Probe
	}{
		{"everything", "ptp", "flush ruleset", probe},
		{"table", "bridge", "delete table inet podwall", probe},
		{"chain", "bridge", "flush chain inet podwall forward", probe},
		// The set alone would keep the pod closed, and a routed one its link as well.
		{"verdict map", "bridge", "flush map inet podwall in4; flush set inet podwall ii4", probe},
		{"netdev table", "bridge", "delete table netdev podwall", linkLocalProbe},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: tt.cni, manifests: quiet})
			owned := ownsTables(t, n)
			flush := func() {
				t.Helper()
				if _, err := n.Host.Run(t.Context(), "nft", tt.command); err != nil {
					t.Fatal(err)
				}
			}
			tables := func() string {
				t.Helper()
				out, err := n.Host.Run(t.Context(), "nft", "--stateless", "--handle", "list", "ruleset")
				if err != nil {
					t.Fatal(err)
				}
				return out
			}
			a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.TCP(80))
			toB := tt.probe(t, a, b)
			expect(t, toB, testnet.Denied)

			if err := n.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			flush()
			expect(t, toB, testnet.Allowed) // nobody mends it: the command does open the pod
			if err := n.StartDaemon(t.Context()); err != nil {
				t.Fatal(err)
			}
			expect(t, toB, testnet.Denied)

			if !owned {
				flush()
				within(t, changeTimeout, toB, testnet.Denied)
				return
			}
			before := tables()
			_, err := n.Host.Run(t.Context(), "nft", tt.command)
			if refused := err != nil && strings.Contains(err.Error(), "Operation not permitted"); !refused && tt.command != "flush ruleset" {
				t.Errorf("nft: %v, want to be refused", err)
			}
			expect(t, toB, testnet.Denied)
			if after := tables(); after != before { // its handles would tell that something was made anew
				t.Errorf("the command has changed something:\n%s\nwas\n%s", after, before)
			}
			c := add(t, n, "default", "c", testnet.TCP(80))
			expect(t, tt.probe(t, a, c), testnet.Denied)
		})
	}
}

// dialogue is a connection between two pods whose ends are both at hand.
type dialogue struct {
	name           string
	client, server net.Conn
	said           int
}

// openDialogue connects over "tcp" or "udp", IPv4. The server's end has seen the first record.
func openDialogue(t *testing.T, proto, name string, from, to *testnet.Pod) *dialogue {
	t.Helper()
	k := &dialogue{name: fmt.Sprintf("%s, %s to %s, %s", proto, from.Name, to.Name, name)}
	at := netip.AddrPortFrom(to.Addrs[testnet.IPv4], 0).String()
	dial := func(address net.Addr) {
		t.Helper()
		if err := from.In(func() error {
			var err error
			k.client, err = net.DialTimeout(proto, address.String(), changeTimeout)
			return err
		}); err != nil {
			t.Fatalf("%s: %v", k.name, err)
		}
		t.Cleanup(func() { _ = k.client.Close() })
	}
	if proto == "tcp" {
		var l net.Listener
		if err := to.In(func() error {
			var err error
			l, err = net.Listen(proto, at)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dial(l.Addr())
		var err error
		if k.server, err = l.Accept(); err != nil {
			t.Fatalf("%s: %v", k.name, err)
		}
	} else {
		var bound *net.UDPConn
		if err := to.In(func() error {
			var err error
			bound, err = net.ListenUDP(proto, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		dial(bound.LocalAddr())
		k.server = answering{bound, k.client.LocalAddr()}
	}
	t.Cleanup(func() { _ = k.server.Close() })
	for _, from := range []string{"client", "server"} {
		if err := k.say(from, changeTimeout); err != nil {
			t.Fatalf("%s, while it may: %v", k.name, err)
		}
	}
	return k
}

// answering is a server's UDP socket that talks to one client.
type answering struct {
	*net.UDPConn
	to net.Addr
}

func (a answering) Write(b []byte) (int, error) { return a.WriteTo(b, a.to) }

// say sends a record from the client or the server and waits until it has arrived.
func (k *dialogue) say(who string, wait time.Duration) error {
	from, to := k.client, k.server
	if who == "server" {
		from, to = to, from
	}
	k.said++
	record := fmt.Sprintf("%s %d\n", who, k.said)
	if _, err := io.WriteString(from, record); err != nil {
		return err
	}
	if err := to.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	buf := make([]byte, 1000)
	for {
		n, err := to.Read(buf)
		if err != nil {
			return fmt.Errorf("what the %s says does not arrive: %w", who, err)
		}
		if strings.HasSuffix(string(buf[:n]), record) { // behind what was sent before and came late
			return nil
		}
	}
}

// TestTablesGone holds what becomes of connections when a daemon finds its tables deleted: those that were allowed before live on,
// whichever end speaks first, and those that are denied and began meanwhile end, also when conntrack has met them in the middle
// and takes the server for the client. Without a daemon, and without the tables, all of them pass.
func TestTablesGone(t *testing.T) {
	t.Parallel()
	manifests := map[string]string{
		"pods.yaml": clientAndGuest + podManifest("default", "server", "app: server") + podManifest("default", "talkative", "app: talkative"),
		// Neither end's packets could begin anything from the middle.
		"policy.yaml": policyManifest("default", "server", "{podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {role: client}}}]}]}") +
			policyManifest("default", "client", "{podSelector: {matchLabels: {role: client}}, policyTypes: [Ingress]}") +
			// It may begin connections to the guest, and the guest none to it.
			policyManifest("default", "talkative", "{podSelector: {matchLabels: {app: talkative}}, policyTypes: [Ingress]}"),
	}
	ends := []string{"client", "server"}
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: manifests})
			nft := func(text string) {
				t.Helper()
				if _, err := n.Host.Run(t.Context(), "nft", text); err != nil {
					t.Fatal(err)
				}
			}
			client, guest, server := add(t, n, "default", "client"), add(t, n, "default", "guest"), add(t, n, "default", "server", testnet.TCP(80))
			talkative := add(t, n, "default", "talkative")
			var allowed, denied []*dialogue
			for _, proto := range []string{"tcp", "udp"} {
				for _, first := range ends {
					allowed = append(allowed, openDialogue(t, proto, first+" speaks first", client, server))
				}
			}
			if err := n.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			nft("delete table inet podwall; delete table netdev podwall")
			// UDP that nobody has tracked is a flow of whoever speaks next, and talkative may speak to guest.
			for _, first := range ends {
				denied = append(denied, openDialogue(t, "tcp", "untracked, "+first+" speaks first", guest, talkative))
			}
			// Somebody needs tracking: what goes on now is met in the middle, what begins is seen from its beginning.
			middle := []*dialogue{denied[0], denied[1]}
			nft("add table inet other; add chain inet other c { type filter hook forward priority 0; }; add rule inet other c ct state invalid")
			for i, k := range middle {
				for _, who := range []string{ends[i], ends[1-i]} {
					if err := k.say(who, changeTimeout); err != nil {
						t.Fatalf("%s, without tables: %v", k.name, err)
					}
				}
			}
			for _, proto := range []string{"tcp", "udp"} {
				for _, first := range ends {
					denied = append(denied, openDialogue(t, proto, "tracked, "+first+" speaks first", guest, talkative))
				}
			}
			if err := n.StartDaemon(t.Context()); err != nil {
				t.Fatal(err)
			}
			for i, k := range allowed {
				for _, who := range []string{ends[i%2], ends[1-i%2]} {
					if err := k.say(who, changeTimeout); err != nil {
						t.Errorf("%s: %v", k.name, err)
					}
				}
			}
			time.Sleep(goneAfter)
			for i, k := range denied {
				for _, who := range []string{ends[i%2], ends[1-i%2]} {
					if err := k.say(who, 300*time.Millisecond); err == nil {
						t.Errorf("%s: what the %s says still arrives", k.name, who)
					}
				}
			}
			expectAll(t, n, guest.Host, server.Host, testnet.TCP(80), testnet.Denied)
			expectAll(t, n, client.Host, server.Host, testnet.TCP(80), testnet.Allowed)
			for i, k := range allowed { // also after the revoker's second look
				if err := k.say(ends[i%2], changeTimeout); err != nil {
					t.Errorf("%s, later: %v", k.name, err)
				}
			}
		})
	}
}

// goneAfter is when the connections that a start revokes have been looked at, on a machine that is busy.
const goneAfter = 2 * time.Second

// ownsTables reports whether this kernel gives tables an owner, as the daemon has found.
func ownsTables(t *testing.T, n *testnet.Node) bool {
	t.Helper()
	log := n.Log()
	if !strings.Contains(log, " own=") {
		t.Fatalf("the daemon does not say whether it owns its tables:\n%s", log)
	}
	return strings.Contains(log, " own=true")
}

// TestHandOver holds that nobody can change the tables between the death of a daemon and the moment in which the one that
// stands by takes over, however long that takes; and that without a standby they can.
func TestHandOver(t *testing.T) {
	t.Parallel()
	for _, standby := range []bool{true, false} {
		t.Run(fmt.Sprintf("standby %v", standby), func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: "ptp", manifests: quiet})
			if !ownsTables(t, n) {
				t.Skip("this kernel's tables have no owner (Linux 6.9)")
			}
			a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.TCP(80))
			toB := testnet.Probe{From: a.Host, To: b.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}
			expect(t, toB, testnet.Denied)
			remove := func() error {
				_, err := n.Host.Run(t.Context(), "nft", "delete table inet podwall")
				return err
			}
			refused := func() {
				t.Helper()
				if err := remove(); err == nil || !strings.Contains(err.Error(), "Operation not permitted") {
					t.Fatalf("deleting the table: %v, want to be refused", err)
				}
				expect(t, toB, testnet.Denied)
			}
			refused()
			if !standby {
				if err := n.KillDaemon(); err != nil {
					t.Fatal(err)
				}
				if err := remove(); err != nil {
					t.Fatal(err)
				}
				expect(t, toB, testnet.Allowed)
				return
			}
			pidFile, logFile := filepath.Join(n.Dir, "standby.pid"), filepath.Join(n.Dir, "standby.log")
			said := func(what string) {
				t.Helper()
				poll(t, "the standby logs "+what, func() bool {
					log, err := os.ReadFile(logFile)
					return err == nil && strings.Contains(string(log), what)
				})
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_, _ = n.Host.Run(ctx, "sh", "-c", `echo $$ >"$1"; exec 2>"$2"; shift 2; exec "$@"`, "sh", pidFile, logFile,
					n.Binaries.Podwalld, "run", "--manifests", n.ManifestDir(), "--node-name", n.Name, "--socket", n.Socket(), "--state-dir", n.StateDir(), "--listen", "")
			}()
			defer func() { cancel(); <-ended }()
			said("holding the owner of the writer's tables")
			text, err := os.ReadFile(pidFile)
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			if err != nil {
				t.Fatal(err)
			}
			refused()
			// The standby does not get to run: the moment without a writer takes as long as the test likes.
			if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			if err := n.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			refused()
			if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			said("tables taken over")
			said("ready")
			refused()
			add(t, n, "default", "c")
			if log, err := os.ReadFile(logFile); err == nil {
				for line := range strings.Lines(string(log)) {
					if strings.Contains(line, "tables taken over") || strings.Contains(line, "level=ERROR") {
						t.Log(strings.TrimSpace(line))
					}
				}
			}
		})
	}
}

// TestStandDown holds that a daemon whose tables nobody else can delete does so itself when podwall is uninstalled, and that it
// has them again when that is undone.
func TestStandDown(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "bridge", manifests: quiet})
	owned := ownsTables(t, n)
	a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.TCP(80))
	toB := testnet.Probe{From: a.Host, To: b.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}
	expect(t, toB, testnet.Denied)
	marker := filepath.Join(n.StateDir(), conflist.StandDownFile)
	if err := os.WriteFile(marker, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	poll(t, "the tables are gone", func() bool {
		out, err := n.Host.Run(t.Context(), "nft", "list", "tables")
		if err != nil {
			t.Fatal(err)
		}
		return !strings.Contains(out, "podwall")
	})
	expect(t, toB, testnet.Allowed)
	if err := os.Remove(marker); err != nil {
		t.Fatal(err)
	}
	eventually(t, toB, testnet.Denied)
	if _, err := n.Host.Run(t.Context(), "nft", "delete table inet podwall"); owned && err == nil {
		t.Error("the table is not owned after that")
	}
}

// TestBridgeNetfilterOff holds that pods of one bridge stay enforced when the node stops showing bridged packets to netfilter.
func TestBridgeNetfilterOff(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "bridge", manifests: quiet})
	sysctl := func() {
		t.Helper()
		if _, err := n.Host.Run(t.Context(), "sysctl", "-w", "net.bridge.bridge-nf-call-iptables=0", "net.bridge.bridge-nf-call-ip6tables=0"); err != nil {
			t.Fatal(err)
		}
	}
	attribute := func() {
		t.Helper()
		bridge := findLink(t, n.Host, func(l link) bool { return strings.HasPrefix(l.Name, "cni") }).Name
		if _, err := n.Host.Run(t.Context(), "ip", "link", "set", "dev", bridge, "type", "bridge", "nf_call_iptables", "0", "nf_call_ip6tables", "0"); err != nil {
			t.Fatal(err)
		}
	}
	a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.TCP(80))
	expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Denied)
	sysctl() // as an installer of something else does for all bridges
	expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Denied)

	if err := n.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	attribute()
	expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Allowed) // nobody mends it: netfilter does not see the packets
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Denied)

	attribute()
	for _, f := range n.Families {
		within(t, sweepTimeout, testnet.Probe{From: a.Host, To: b.Host, Family: f, Port: testnet.TCP(80)}, testnet.Denied)
	}
}

// TestRenamedLink holds that a host veth with another name is still the pod's.
func TestRenamedLink(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{
				"pods.yaml":   clientAndGuest + podManifest("default", "server", "app: server"),
				"policy.yaml": policyManifest("default", "p", clientsOnly),
			}})
			add(t, n, "default", "client")
			guest, server := add(t, n, "default", "guest"), add(t, n, "default", "server", testnet.TCP(80))
			want := testnet.Matrix{cell("client", "server", true), cell("guest", "server", false)}
			judge(t, n, want)
			if _, err := n.Host.Run(t.Context(), "ip", "link", "set", "dev", hostLink(t, n, server).Name, "name", "renamed0"); err != nil {
				t.Fatal(err)
			}
			judge(t, n, want)
			pollWithin(t, sweepTimeout, "the daemon uses the link's new name", func() bool {
				out, err := n.Podwalld(t.Context(), "pods")
				if err != nil {
					t.Fatal(err)
				}
				return strings.Contains(out, "renamed0")
			})
			judge(t, n, want)
			if !registered(t, n, server) {
				t.Error("the pod has lost its registration with its link's name")
			}
			if cni == "bridge" {
				expect(t, testnet.Probe{From: guest.Host, To: server.Host, Family: testnet.IPv6, Port: testnet.TCP(80), Via: netip.AddrPortFrom(linkLocal(t, guest, server), 80)}, testnet.Denied)
			}
		})
	}
}

// TestDamagedRegistration holds that a pod whose registration cannot be read at a start is closed, not open, and that adding it
// again is the remedy.
func TestDamagedRegistration(t *testing.T) {
	t.Parallel()
	damages := map[string]func(file string) error{
		"whole":     func(string) error { return nil },
		"truncated": func(file string) error { return os.Truncate(file, 40) },
		"emptied":   func(file string) error { return os.Truncate(file, 0) },
		"garbled":   func(file string) error { return os.WriteFile(file, []byte("\x00\x00\x00\x00"), 0o600) },
		"removed":   os.Remove,
	}
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			manifests := clientAndGuest
			for name := range damages {
				manifests += podManifest("default", name, "app: server")
			}
			n := start(t, setup{cni: cni, manifests: map[string]string{"pods.yaml": manifests, "policy.yaml": policyManifest("default", "p", clientsOnly)}})
			add(t, n, "default", "client")
			add(t, n, "default", "guest", testnet.TCP(80))
			servers := map[string]*testnet.Pod{}
			for name := range damages {
				servers[name] = add(t, n, "default", name, testnet.TCP(80))
			}
			want := func(open func(name string) bool) testnet.Matrix {
				var m testnet.Matrix
				for name := range damages {
					m = append(m, cell("client", name, open(name)), cell("guest", name, false), cell(name, "guest", open(name)))
				}
				return m
			}
			everyone := func(string) bool { return true }
			judge(t, n, want(everyone))
			if err := n.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			for name, damage := range damages {
				for _, file := range attachments(t, n) {
					if strings.Contains(file, servers[name].ContainerID) {
						if err := damage(file); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			for range 2 { // the second start finds what the first one has made of it
				if err := n.StartDaemon(t.Context()); err != nil {
					t.Fatal(err)
				}
				judge(t, n, want(func(name string) bool { return name == "whole" }))
				if err := n.KillDaemon(); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.StartDaemon(t.Context()); err != nil {
				t.Fatal(err)
			}
			for name, pod := range servers {
				if name == "whole" {
					continue
				}
				if _, err := n.CNITool(t.Context(), "del", pod); err != nil {
					t.Error(err)
				}
				if err := n.Add(t.Context(), pod); err != nil {
					t.Error(err)
				}
			}
			judge(t, n, want(everyone))
		})
	}
}

// TestBrokenManifestAtStart holds that the last good content of a file outlives the daemon.
func TestBrokenManifestAtStart(t *testing.T) {
	t.Parallel()
	good := policyManifest("default", "p", clientsOnly)
	n := start(t, setup{cni: "ptp", manifests: map[string]string{
		"pods.yaml":   clientAndGuest + podManifest("default", "server", "app: server"),
		"policy.yaml": good,
	}})
	add(t, n, "default", "client")
	add(t, n, "default", "guest")
	add(t, n, "default", "server", testnet.TCP(80))
	enforced := testnet.Matrix{cell("client", "server", true), cell("guest", "server", false)}
	restart := func(change func() error) {
		t.Helper()
		if err := n.KillDaemon(); err != nil {
			t.Fatal(err)
		}
		if err := change(); err != nil {
			t.Fatal(err)
		}
		if err := n.StartDaemon(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	judge(t, n, enforced)
	for _, broken := range []string{good[:len(good)-20], strings.ReplaceAll(good, "podSelector: {matchLabels", "podSelector: {matchLabel"), "\x00"} {
		restart(func() error { return n.WriteManifest("policy.yaml", broken) })
		judge(t, n, enforced)
		status, err := n.Podwalld(t.Context(), "status")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(status, "policy.yaml") {
			t.Errorf("the status does not name the broken file:\n%s", status)
		}
	}
	restart(func() error { return n.WriteManifest("policy.yaml", good) })
	judge(t, n, enforced)
	// What was taken away on purpose is gone.
	restart(func() error { return os.Remove(filepath.Join(n.ManifestDir(), "policy.yaml")) })
	judge(t, n, testnet.Matrix{cell("client", "server", true), cell("guest", "server", true)})
}

// TestMovedManifest holds that a policy whose file moves while the directory is being read is in force all the time.
func TestMovedManifest(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	here, there := filepath.Join(n.ManifestDir(), "a", "policy.yaml"), filepath.Join(n.ManifestDir(), "b", "policy.yaml")
	for _, file := range []string{here, there} {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3000 { // so that reading takes its time
		if err := os.WriteFile(filepath.Join(n.ManifestDir(), "b", fmt.Sprintf("%d.yaml", i)), []byte("# nothing\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(filepath.Join(n.ManifestDir(), "policy.yaml"), here); err != nil {
		t.Fatal(err)
	}
	a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.UDP(80))
	eventually(t, testnet.Probe{From: a.Host, To: b.Host, Family: testnet.IPv4, Port: testnet.UDP(80)}, testnet.Denied)
	received := openTap(t, b.Host)
	const marker = "while the policy moves"
	stream(t, a.Host, netip.AddrPortFrom(b.Addrs[testnet.IPv4], 80), marker)
	moves := 0
	for deadline := time.Now().Add(6 * time.Second); time.Now().Before(deadline); moves++ {
		if err := os.Rename(here, there); err != nil {
			t.Fatal(err)
		}
		here, there = there, here
		time.Sleep(time.Duration(20+moves*7%60) * time.Millisecond) // at another moment of the walk each time
	}
	if received.has(t, marker) {
		t.Errorf("datagrams arrived while the policy's file moved %d times", moves)
	}
	if err := os.Remove(here); err != nil {
		t.Fatal(err)
	}
	poll(t, "datagrams arrive without the policy", func() bool { return received.has(t, marker) })
}

// TestSilentConnections holds that those who connect to the socket and say nothing, or never finish, keep nobody from an ADD.
func TestSilentConnections(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, says string
		count      int
	}{
		{"silent", "", 1000},
		{"unfinished", "PUT /v1/attachments/x/eth0 HTTP/1.1\r\nHost: podwall\r\nContent-Length: 1000000\r\n\r\n{", 300},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: "ptp", manifests: quiet})
			for range tt.count {
				conn, err := net.DialTimeout("unix", n.Socket(), changeTimeout)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = conn.Close() })
				if _, err := conn.Write([]byte(tt.says)); err != nil {
					t.Fatal(err)
				}
			}
			begin := time.Now()
			a := add(t, n, "default", "a", testnet.TCP(80))
			t.Logf("ADD took %s", time.Since(begin))
			b := add(t, n, "default", "b")
			expectAll(t, n, b.Host, a.Host, testnet.TCP(80), testnet.Denied)
			expectAll(t, n, n.Host, a.Host, testnet.TCP(80), testnet.Allowed)
		})
	}
}

// TestManyADDsAtOnce holds that each of many pods is enforced when its ADD returns, and that their DELs leave nothing.
func TestManyADDsAtOnce(t *testing.T) {
	t.Parallel()
	const pods = 50
	n := start(t, setup{cni: "bridge", manifests: map[string]string{
		"client.yaml": podManifest("default", "client", "role: client"),
		"policy.yaml": policyManifest("default", "p", "{podSelector: {matchExpressions: [{key: role, operator: DoesNotExist}]}, ingress: [{from: [{podSelector: {matchLabels: {role: client}}}]}]}"),
	}})
	ruleset := func() string {
		t.Helper()
		out, err := n.Host.Run(t.Context(), "nft", "--stateless", "list", "ruleset")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	before := ruleset()
	client := add(t, n, "default", "client")
	added := make([]*testnet.Pod, pods)
	each := func(f func(i int) error) {
		t.Helper()
		var all sync.WaitGroup
		errs := make([]error, pods)
		for i := range pods {
			all.Go(func() { errs[i] = f(i) })
		}
		all.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	each(func(i int) error {
		var err error
		added[i], err = n.AddPod(t.Context(), "default", fmt.Sprintf("p%d", i), "", testnet.TCP(80))
		return err
	})
	var m testnet.Matrix
	for i, pod := range added {
		m = append(m, cell("client", pod.PodName, true), cell(pod.PodName, added[(i+1)%pods].PodName, false))
	}
	judge(t, n, m)
	each(func(i int) error { return n.DeletePod(t.Context(), added[i]) })
	if err := n.DeletePod(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	pollWithin(t, sweepTimeout, "the ruleset is what it was", func() bool { return ruleset() == before })
	left, err := os.ReadDir(filepath.Join(n.StateDir(), "attachments"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("registrations are left: %v", left)
	}
}

// TestChangesUnderTraffic holds that a change is never seen half done: what is allowed before and after it loses no packet, and
// what is denied before and after it gets none through.
func TestChangesUnderTraffic(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			allow := func(roles string) string {
				return policyManifest("default", "p", "{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchExpressions: [{key: role, operator: In, values: ["+roles+"]}]}}], ports: [{protocol: UDP, port: 80}]}]}")
			}
			client := func(labels string) string { return podManifest("default", "client", labels) }
			n := start(t, setup{cni: cni, manifests: map[string]string{
				"client.yaml": client("role: client"),
				"pods.yaml":   podManifest("default", "guest", "role: guest") + podManifest("default", "server", "app: server"),
				"policy.yaml": allow("client"),
			}})
			from, guest := add(t, n, "default", "client"), add(t, n, "default", "guest")
			server := add(t, n, "default", "server", testnet.UDP(80))
			address := netip.AddrPortFrom(server.Addrs[testnet.IPv4], 80)
			received := openTap(t, server.Host)
			const marker = "from the guest"
			stream(t, guest.Host, address, marker)

			done := make(chan struct{})
			var flows, lost int
			var sender sync.WaitGroup
			sender.Go(func() {
				for {
					select {
					case <-done:
						return
					case <-time.After(time.Millisecond):
					}
					flows++
					if err := newFlow(from.Host, address); err != nil {
						lost++
						t.Log(err)
					}
				}
			})
			changes := 0
			for deadline := time.Now().Add(6 * time.Second); time.Now().Before(deadline); changes++ {
				var err error
				switch changes % 5 {
				case 0:
					err = n.WriteManifest("policy.yaml", allow(fmt.Sprintf("client, other%d", changes)))
				case 1:
					err = n.WriteManifest("extra.yaml", policyManifest("default", fmt.Sprintf("extra%d", changes), "{podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress, Egress], egress: [{}], ingress: [{from: [{podSelector: {matchLabels: {role: other}}}]}]}"))
				case 2:
					err = n.WriteManifest("client.yaml", client(fmt.Sprintf("role: client, version: v%d", changes)))
				case 3:
					err = n.WriteManifest("extra.yaml", "# nothing\n")
				case 4:
					err = n.WriteManifest("policy.yaml", allow("client"))
				}
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(60 * time.Millisecond)
				if received.has(t, marker) {
					t.Fatalf("a datagram of the guest arrived around change %d", changes)
				}
			}
			close(done)
			sender.Wait()
			t.Logf("%d changes, %d flows, %d lost", changes, flows, lost)
			if flows < 100 || lost > 0 {
				t.Errorf("%d of %d allowed flows were lost, want none of at least 100", lost, flows)
			}
			if err := n.WriteManifest("policy.yaml", allow("client, guest")); err != nil {
				t.Fatal(err)
			}
			poll(t, "the guest's datagrams arrive when they are allowed", func() bool { return received.has(t, marker) })
		})
	}
}

// newFlow sends one datagram from a fresh socket and waits for its echo.
func newFlow(from *testnet.Host, to netip.AddrPort) error {
	var conn net.Conn
	err := from.In(func() error {
		var err error
		conn, err = net.Dial("udp", to.String())
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	return testnet.Exchange(conn, "one", 2*time.Second)
}
