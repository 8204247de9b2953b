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

func newNS(t *testing.T) netns.NsHandle {
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

const vip = "10.9.9.9"

// testbed is a client and a server namespace with a router between them that tracks connections and has one VIP.
type testbed struct {
	client, router, server netns.NsHandle
	table                  *Table
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
	port(t, b.client, "eth0", []string{"10.1.0.2/24", "10.1.0.3/24", "fd01::2/64", "fd01::3/64"}, "10.1.0.1", "fd01::1")
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
			table inet track { chain forward { type filter hook forward priority 0; ct state established accept; }; }
			table ip nat { chain pre { type nat hook prerouting priority -100; ip daddr ` + vip + ` dnat to 10.2.0.3; }; }`)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
	if b.table, err = New(Config{NetNS: int(b.router)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.table.Close)
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
		flows, err := b.table.handle.ConntrackTableList(netlink.ConntrackTable, family)
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
	)
	all := []string{pod, other, service, pod6, otherPod}
	for _, tt := range []struct {
		name   string
		forget []string
		gone   []string
	}{
		{"nothing", nil, nil},
		{"a stranger", []string{"10.1.0.99", "fd01::99"}, nil},
		{"the original source", []string{"10.1.0.2"}, []string{pod}},
		{"the reply source behind a service", []string{"10.2.0.3"}, []string{service}},
		{"the original destination", []string{vip}, []string{service}},
		{"both families", []string{"10.1.0.2", "fd01::2"}, []string{pod, pod6}},
		{"a server", []string{"10.2.0.2"}, []string{pod, other}},
		{"an IPv4 address in IPv6 form", []string{"::ffff:10.1.0.2"}, []string{pod}},
		{"everything", []string{"10.1.0.2", "10.1.0.3", "fd02::2"}, all},
	} {
		for _, f := range [][2]string{{"10.1.0.2", "10.2.0.2"}, {"10.1.0.3", "10.2.0.2"}, {"10.1.0.3", vip}, {"fd01::2", "fd02::2"}, {"fd01::3", "fd02::2"}} {
			b.talk(t, f[0], f[1])
		}
		if d := cmp.Diff(sorted(all), b.entries(t)); d != "" {
			t.Fatalf("%s: before (-want +got):\n%s", tt.name, d)
		}
		var ips []netip.Addr
		for _, ip := range tt.forget {
			ips = append(ips, netip.MustParseAddr(ip))
		}
		n, err := b.table.Forget(ips)
		if err != nil || n != len(tt.gone) {
			t.Errorf("%s: Forget = %d, %v, want %d", tt.name, n, err, len(tt.gone))
		}
		want := slices.DeleteFunc(sorted(all), func(s string) bool { return slices.Contains(tt.gone, s) })
		if d := cmp.Diff(want, b.entries(t), cmp.Transformer("sort", sorted)); d != "" {
			t.Errorf("%s: after (-want +got):\n%s", tt.name, d)
		}
		if err := b.table.handle.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
			t.Fatal(err)
		}
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
	got, err := b.table.Forget([]netip.Addr{netip.MustParseAddr("10.1.0.2")})
	if err != nil || got < n {
		t.Errorf("Forget = %d, %v, want at least %d", got, err, n)
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
