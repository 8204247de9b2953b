package conntrack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func newNS(t testing.TB) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = orig.Close() }()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(orig); err != nil {
		t.Fatal(err) // the thread stays locked and ends with the test
	}
	runtime.UnlockOSThread()
	t.Cleanup(func() { _ = ns.Close() })
	return ns
}

// in runs f on a thread of the namespace.
func in(t *testing.T, ns netns.NsHandle, f func() error) {
	t.Helper()
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = orig.Close() }()
	if err := netns.Set(ns); err != nil {
		t.Fatal(err)
	}
	ferr := f()
	if err := netns.Set(orig); err != nil {
		t.Fatal(err)
	}
	runtime.UnlockOSThread()
	if ferr != nil {
		t.Fatal(ferr)
	}
}

// port gives the namespace an interface with addresses and, if there is a gateway, routes through it.
func port(t *testing.T, ns netns.NsHandle, name string, addrs []string, gateways ...string) {
	t.Helper()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		ip, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		ip.Flags = unix.IFA_F_NODAD
		if err := h.AddrAdd(link, ip); err != nil {
			t.Fatalf("add %s: %v", a, err)
		}
	}
	for _, g := range gateways {
		gw := net.ParseIP(g)
		dst := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
		if gw.To4() == nil {
			dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		if err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: gw}); err != nil {
			t.Fatalf("route by %s: %v", g, err)
		}
	}
}

const (
	vip  = "10.9.9.9"
	vip6 = "fd09::9"
	// masked is a client whose address the router replaces by its own, routerIP.
	masked   = "10.1.0.4"
	routerIP = "10.2.0.1"
)

// testbed is a client and a server namespace with a router between them that tracks connections and has a VIP of each family.
// The router's ruleset notes the tuples of the connections that its forward hook sees.
type testbed struct {
	client, router, server netns.NsHandle
	table                  *Table
	ct                     *netlink.Handle // the router's table, for what is not under test
}

func newTestbed(t *testing.T) *testbed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and routes packets through them")
	}
	b := &testbed{client: newNS(t), router: newNS(t), server: newNS(t)}
	for _, ns := range []netns.NsHandle{b.client, b.router, b.server} {
		in(t, ns, func() error {
			// A router asks for no neighbour before its link-local address is known to be unique, which takes seconds.
			return os.WriteFile("/proc/sys/net/ipv6/conf/default/dad_transmits", []byte("0"), 0o644)
		})
	}
	h, err := netlink.NewHandleAt(b.router, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for name, peer := range map[string]netns.NsHandle{"c": b.client, "s": b.server} {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(peer)}
		if err := h.LinkAdd(veth); err != nil {
			t.Fatal(err)
		}
	}
	port(t, b.client, "eth0", []string{"10.1.0.2/24", "10.1.0.3/24", masked + "/24", "fd01::2/64", "fd01::3/64"}, "10.1.0.1", "fd01::1")
	port(t, b.server, "eth0", []string{"10.2.0.2/24", "10.2.0.3/24", "fd02::2/64"}, "10.2.0.1", "fd02::1")
	port(t, b.router, "c", []string{"10.1.0.1/24", "fd01::1/64"})
	port(t, b.router, "s", []string{"10.2.0.1/24", "fd02::1/64"})
	in(t, b.router, func() error {
		for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+f, []byte("1"), 0o644); err != nil {
				return err
			}
		}
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(`
			table inet track {
				set seen { type inet_proto . ipv4_addr . inet_service . ipv4_addr . inet_service; size 1000; flags dynamic; }
				set seen6 { type inet_proto . ipv6_addr . inet_service . ipv6_addr . inet_service; size 1000; flags dynamic; }
				set pings { type inet_proto . ipv4_addr . ipv4_addr; size 1000; flags dynamic; }
				set pings6 { type inet_proto . ipv6_addr . ipv6_addr; size 1000; flags dynamic; }
				chain forward {
					type filter hook forward priority 0
					ct state established accept
					meta l4proto { tcp, udp } add @seen { meta l4proto . ip saddr . th sport . ip daddr . th dport }
					meta l4proto { tcp, udp } add @seen6 { meta l4proto . ip6 saddr . th sport . ip6 daddr . th dport }
					meta l4proto icmp add @pings { meta l4proto . ip saddr . ip daddr }
					meta l4proto ipv6-icmp add @pings6 { meta l4proto . ip6 saddr . ip6 daddr }
				}
			}
			table ip nat {
				chain pre {
					type nat hook prerouting priority -100
					ip daddr ` + vip + ` tcp dport 80 dnat to 10.2.0.2:5000
					ip daddr ` + vip + ` dnat to 10.2.0.3
				}
				chain post {
					type nat hook postrouting priority 100
					ip saddr ` + masked + ` snat to ` + routerIP + `
				}
			}
			table ip6 nat { chain pre { type nat hook prerouting priority -100; ip6 daddr ` + vip6 + ` dnat to fd02::2; }; }`)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
	if b.table, err = New(Config{NetNS: int(b.router)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.table.Close)
	if b.ct, err = netlink.NewHandleAt(b.router, unix.NETLINK_NETFILTER); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.ct.Close)
	return b
}

// serve answers datagrams on all addresses of the server.
func (b *testbed) serve(t *testing.T) {
	t.Helper()
	for _, ip := range []string{"10.2.0.2", "10.2.0.3", "fd02::2"} {
		var conn net.PacketConn
		in(t, b.server, func() error {
			var err error
			conn, err = net.ListenPacket("udp", net.JoinHostPort(ip, "5000"))
			return err
		})
		t.Cleanup(func() { _ = conn.Close() })
		go func() {
			buf := make([]byte, 100)
			for {
				n, from, err := conn.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = conn.WriteTo(buf[:n], from)
			}
		}()
	}
}

// talk sends a datagram and waits for its answer.
func (b *testbed) talk(t *testing.T, from, to string) {
	t.Helper()
	var conn *net.UDPConn
	in(t, b.client, func() error {
		var err error
		conn, err = net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(from)}, &net.UDPAddr{IP: net.ParseIP(to), Port: 5000})
		return err
	})
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatalf("%s to %s: %v", from, to, err)
	}
}

// entries returns the router's UDP entries.
func (b *testbed) entries(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := b.ct.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.Forward.Protocol == unix.IPPROTO_UDP {
				out = append(out, fmt.Sprintf("%s>%s %s>%s", f.Forward.SrcIP, f.Forward.DstIP, f.Reverse.SrcIP, f.Reverse.DstIP))
			}
		}
	}
	slices.Sort(out)
	return out
}

func TestForget(t *testing.T) {
	t.Parallel()
	b := newTestbed(t)
	b.serve(t)
	const (
		pod      = "10.1.0.2>10.2.0.2 10.2.0.2>10.1.0.2"
		other    = "10.1.0.3>10.2.0.2 10.2.0.2>10.1.0.3"
		service  = "10.1.0.3>10.9.9.9 10.2.0.3>10.1.0.3"
		pod6     = "fd01::2>fd02::2 fd02::2>fd01::2"
		otherPod = "fd01::3>fd02::2 fd02::2>fd01::3"
		behind   = "10.1.0.4>10.2.0.2 10.2.0.2>10.2.0.1"
	)
	all := []string{pod, other, service, pod6, otherPod, behind}
	tests := []struct {
		name   string
		forget []string
		gone   []string
	}{
		{"nothing", nil, nil},
		{"a stranger", []string{"10.1.0.99", "fd01::99"}, nil},
		{"the original source", []string{"10.1.0.2"}, []string{pod}},
		{"the reply source behind a service", []string{"10.2.0.3"}, []string{service}},
		{"the original destination, which is nobody's end", []string{vip}, nil},
		{"both families", []string{"10.1.0.2", "fd01::2"}, []string{pod, pod6}},
		{"the reply destination, which is nobody's end", []string{routerIP}, nil},
		{"the original source behind SNAT", []string{masked}, []string{behind}},
		{"a server", []string{"10.2.0.2"}, []string{pod, other, behind}},
		{"a server in IPv6", []string{"fd02::2"}, []string{pod6, otherPod}},
		{"two", []string{"10.1.0.2", masked}, []string{pod, behind}},
		{"several", []string{"10.1.0.2", "10.2.0.3", masked, "10.1.0.99"}, []string{pod, service, behind}},
		{"no address", []string{""}, nil},
		{"an IPv4 address in IPv6 form", []string{"::ffff:10.1.0.2"}, []string{pod}},
		{"everything", []string{"10.1.0.2", "10.1.0.3", masked, "fd02::2"}, all},
	}
	for i, tt := range append(tests, tests...) {
		b.table.noFlush = i >= len(tests) // as a kernel before Linux 6.12
		for _, f := range [][2]string{{"10.1.0.2", "10.2.0.2"}, {"10.1.0.3", "10.2.0.2"}, {"10.1.0.3", vip}, {masked, "10.2.0.2"}, {"fd01::2", "fd02::2"}, {"fd01::3", "fd02::2"}} {
			b.talk(t, f[0], f[1])
		}
		if d := cmp.Diff(sorted(all), b.entries(t)); d != "" {
			t.Fatalf("%s: before (-want +got):\n%s", tt.name, d)
		}
		var ips []netip.Addr
		for _, ip := range tt.forget {
			addr, _ := netip.ParseAddr(ip) // the zero Addr for ""
			ips = append(ips, addr)
		}
		if err := b.table.Forget(ips); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		want := slices.DeleteFunc(sorted(all), func(s string) bool { return slices.Contains(tt.gone, s) })
		if d := cmp.Diff(want, b.entries(t), cmp.Transformer("sort", sorted)); d != "" {
			t.Errorf("%s: after (-want +got):\n%s", tt.name, d)
		}
		if err := b.ct.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
			t.Fatal(err)
		}
	}
}

// TestForgetPickedUp holds that a connection of which the kernel has seen the SYN is told from one that it met in the middle, and
// that it stays told when nobody tracks for a moment.
func TestForgetPickedUp(t *testing.T) {
	t.Parallel()
	b := newTestbed(t)
	ip := netip.MustParseAddr("10.1.0.2")
	var server, client net.Conn
	in(t, b.server, func() error {
		l, err := net.Listen("tcp", "10.2.0.2:5001")
		if err != nil {
			return err
		}
		defer l.Close()
		in(t, b.client, func() error {
			d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 0)), Timeout: 5 * time.Second}
			client, err = d.DialContext(t.Context(), "tcp", l.Addr().String())
			return err
		})
		server, err = l.Accept()
		return err
	})
	t.Cleanup(func() { _ = errors.Join(client.Close(), server.Close()) })
	say := func(from, to net.Conn) {
		t.Helper()
		if _, err := from.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := to.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := to.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	// gone returns how many TCP entries of the router f deletes.
	gone := func(f func([]netip.Addr) error, ips ...netip.Addr) int {
		t.Helper()
		count := func() int {
			return len(slices.DeleteFunc(flows(t, b.table, Filter{}), func(f Flow) bool { return f.Proto != unix.IPPROTO_TCP }))
		}
		before := count()
		if err := f(ips); err != nil {
			t.Error(err)
		}
		return before - count()
	}
	forget := func(when string, want int) {
		t.Helper()
		if n := gone(b.table.ForgetPickedUp, ip); n != want {
			t.Errorf("%s: ForgetPickedUp deleted %d, want %d", when, n, want)
		}
	}
	nft := func(text string) {
		t.Helper()
		in(t, b.router, func() error {
			out, err := exec.CommandContext(t.Context(), "nft", text).CombinedOutput()
			if err != nil {
				return fmt.Errorf("nft: %w: %s", err, out)
			}
			return nil
		})
	}
	rules := func() string {
		t.Helper()
		var text []byte
		in(t, b.router, func() error {
			var err error
			text, err = exec.CommandContext(t.Context(), "nft", "list", "ruleset").Output()
			return err
		})
		return string(text)
	}()
	say(client, server)
	say(server, client)
	forget("whose SYN was seen", 0)
	nft("flush ruleset") // the last that needs tracking: its hooks go
	say(client, server)
	say(server, client)
	nft(rules)
	say(server, client)
	say(client, server)
	forget("whose SYN was seen, after a moment without tracking", 0)
	if n := gone(b.table.Forget, ip); n != 1 {
		t.Fatalf("Forget deleted %d, want 1", n)
	}
	say(server, client)
	say(client, server)
	forget("which the server went on with", 1)
	say(client, server)
	forget("which the client went on with", 1)
	if n := gone(b.table.ForgetPickedUp, netip.MustParseAddr("10.1.0.99")); n != 0 {
		t.Errorf("of a stranger: ForgetPickedUp deleted %d", n)
	}
}

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }

// TestForgetMany deletes many entries at once.
func TestForgetMany(t *testing.T) {
	t.Parallel()
	b := newTestbed(t)
	b.serve(t)
	b.talk(t, "10.1.0.3", "10.2.0.2")
	const n = 2000
	in(t, b.client, func() error {
		conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP("10.1.0.2")})
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		for i := range n {
			if _, err := conn.WriteToUDP([]byte("x"), &net.UDPAddr{IP: net.ParseIP("10.2.0.2"), Port: 10_000 + i}); err != nil {
				return err
			}
		}
		return nil
	})
	if got := len(b.entries(t)); got < n {
		t.Fatalf("%d entries", got)
	}
	if err := b.table.Forget([]netip.Addr{netip.MustParseAddr("10.1.0.2")}); err != nil {
		t.Error(err)
	}
	if d := cmp.Diff([]string{"10.1.0.3>10.2.0.2 10.2.0.2>10.1.0.3"}, b.entries(t)); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]string{
		unix.EINVAL:          "nf_conntrack_netlink",
		unix.EPROTONOSUPPORT: "nf_conntrack_netlink",
		unix.EPERM:           "CAP_NET_ADMIN",
	} {
		if got := explain(err); !errors.Is(got, err) || !strings.Contains(got.Error(), want) {
			t.Errorf("explain(%v) = %v, want a hint at %s", err, got, want)
		}
	}
	if got := explain(unix.EIO); !errors.Is(got, unix.EIO) {
		t.Errorf("explain(EIO) = %v", got)
	}
}
