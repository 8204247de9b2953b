package verdictlog

import (
	"context"
	"encoding/hex"
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
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	testGroup   = 77
	testSnaplen = 96
)

// inNS runs the rest of the test on a thread of a network namespace whose output hook has these rules. The thread ends with the test.
func inNS(t *testing.T, rules ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace and loads nftables in it")
	}
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	for _, argv := range [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"nft", "table inet t { chain c { type filter hook output priority 0; " + strings.Join(rules, "; ") + "; }; }"},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", argv, err, out)
		}
	}
}

func open(t *testing.T) *Reader {
	t.Helper()
	r, err := Open(testGroup, testSnaplen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// send sends one datagram; that nobody listens does not matter.
func send(t *testing.T, to string) {
	t.Helper()
	conn, err := net.Dial("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte("datagram")); err != nil {
		t.Fatal(err)
	}
}

// collectFor reads until there are so many packets, or until there is silence for long enough.
func collectFor(t *testing.T, r *Reader, want int) ([]Packet, int) {
	t.Helper()
	var list []Packet
	lost := 0
	for quiet := time.Now(); len(list) < want && time.Since(quiet) < 2*time.Second; {
		packets, missing, err := r.read(t.Context(), time.Now().Add(batchTime))
		if err != nil {
			t.Fatal(err)
		}
		if len(packets) > 0 {
			quiet = time.Now()
		}
		list = append(list, packets...)
		lost += missing
	}
	return list, lost
}

func TestReader(t *testing.T) {
	inNS(t, `udp dport { 53, 5353 } log prefix "iabc" group 77 snaplen 96 drop`, `tcp dport 80 log prefix "edef" group 77 snaplen 96 reject`,
		`icmp type echo-request log prefix "eicmp" group 77 drop`, `icmpv6 type echo-request log prefix "eicmp6" group 77 drop`)
	r := open(t)
	loopback, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	lo4, lo6 := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	var want []Packet
	for _, to := range []netip.Addr{lo4, lo6} {
		// The control is what passes: it is sent and never logged.
		send(t, netip.AddrPortFrom(to, 54).String())
		sport := tryTCP(t, netip.AddrPortFrom(to, 80))
		want = append(want, Packet{Prefix: "edef", Src: to, Dst: to, Proto: unix.IPPROTO_TCP, HasPorts: true, Sport: sport, Dport: 80})
		sport = trySend(t, netip.AddrPortFrom(to, 53))
		want = append(want, Packet{Prefix: "iabc", Src: to, Dst: to, Proto: unix.IPPROTO_UDP, HasPorts: true, Sport: sport, Dport: 53})
	}
	ping(t, lo4, "ip4:icmp", 8)
	want = append(want, Packet{Prefix: "eicmp", Src: lo4, Dst: lo4, Proto: unix.IPPROTO_ICMP, HasICMP: true, Type: 8})
	ping(t, lo6, "ip6:ipv6-icmp", 128)
	want = append(want, Packet{Prefix: "eicmp6", Src: lo6, Dst: lo6, Proto: unix.IPPROTO_ICMPV6, HasICMP: true, Type: 128})
	for i := range want {
		want[i].Out = uint32(loopback.Index)
	}
	got, lost := collectFor(t, r, len(want))
	repeated := func(a, b Packet) bool { // by a sender who is not content with a rejection (IPv6)
		a.sequence, b.sequence = 0, 0
		return a == b && a.Proto == unix.IPPROTO_TCP
	}
	if got = slices.CompactFunc(got, repeated); len(got) < len(want) {
		rest, more := collectFor(t, r, len(want)-len(got))
		got, lost = slices.CompactFunc(append(got, rest...), repeated), lost+more
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Packet{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" || lost != 0 {
		t.Errorf("lost %d, packets (-want +got):\n%s", lost, diff)
	}
	more, _, err := r.read(t.Context(), time.Now().Add(3*batchTime))
	if err != nil || len(more) > 0 {
		t.Errorf("packets that no rule logs: %v (%v)", more, err)
	}
}

// trySend is send where the rule answers the sender by EPERM.
func trySend(t *testing.T, to netip.AddrPort) uint16 {
	t.Helper()
	conn, err := net.Dial("udp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte("datagram")); !errors.Is(err, unix.EPERM) {
		t.Fatalf("a datagram that the output hook drops: %v", err)
	}
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// tryTCP makes one attempt from a port of its own and returns that.
func tryTCP(t *testing.T, to netip.AddrPort) uint16 {
	t.Helper()
	const sport = 40001
	d := net.Dialer{LocalAddr: &net.TCPAddr{Port: sport}, Timeout: time.Second}
	if conn, err := d.Dial("tcp", to.String()); err == nil {
		_ = conn.Close()
		t.Fatal("a connection that the output hook rejects succeeded")
	}
	return sport
}

func ping(t *testing.T, to netip.Addr, network string, typ byte) {
	t.Helper()
	conn, err := net.Dial(network, to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte{typ, 0, 0, 0, 0, 1, 0, 1}); !errors.Is(err, unix.EPERM) {
		t.Fatalf("a ping that the output hook drops: %v", err)
	}
}

func TestOneReaderPerGroup(t *testing.T) {
	inNS(t, `udp dport 53 log group 77`)
	r := open(t)
	if _, err := Open(testGroup, testSnaplen); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "another program reads it") {
		t.Errorf("a second reader: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	open(t)
}

// Every packet that is logged is either read or counted as lost.
func TestLostAreCounted(t *testing.T) {
	inNS(t, `udp dport 54 log prefix "i" group 77 snaplen 96`)
	r := open(t)
	if err := r.conn.SetReadBuffer(4096); err != nil {
		t.Fatal(err)
	}
	const sent = 5000
	conn, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	to := netip.MustParseAddrPort("127.0.0.1:54")
	first, _ := logged(t, r, conn, to, 1)
	// Nobody reads meanwhile.
	for range sent {
		_, _ = conn.WriteToUDPAddrPort([]byte("x"), to) // an answer that nobody listens comes back as an error
	}
	got, lost := collectFor(t, r, sent)
	last, missing := logged(t, r, conn, to, 1)
	lost += missing
	if first+last != 2 || len(got)+lost != sent || lost == 0 {
		t.Errorf("of %d packets %d were read and %d were counted as lost; before and after %d of 2", sent, len(got), lost, first+last)
	}
}

// logged sends packets until one is read, and returns how many were.
func logged(t *testing.T, r *Reader, conn *net.UDPConn, to netip.AddrPort, n int) (int, int) {
	t.Helper()
	_, err := conn.WriteToUDPAddrPort([]byte("x"), to)
	if errors.Is(err, unix.ECONNREFUSED) {
		_, err = conn.WriteToUDPAddrPort([]byte("x"), to)
	}
	if err != nil {
		t.Fatal(err)
	}
	list, lost := collectFor(t, r, n)
	return len(list), lost
}

func TestUnbound(t *testing.T) {
	for _, unbind := range []bool{false, true} {
		t.Run(fmt.Sprint(unbind), func(t *testing.T) {
			inNS(t, `udp dport 54 log prefix "i" group 77 snaplen 96`)
			r := open(t)
			if unbind {
				ae := netlink.NewAttributeEncoder()
				ae.Bytes(configCommand, []byte{2}) // NFULNL_CFG_CMD_UNBIND
				if err := r.send(ae); err != nil {
					t.Fatal(err)
				}
				if _, err := r.conn.Receive(); err != nil {
					t.Fatal(err)
				}
			}
			r.last = time.Now().Add(-2 * checkEvery)
			var err error
			for range 2 { // the question, the answer
				if err == nil {
					_, _, err = r.read(t.Context(), time.Now().Add(batchTime))
				}
			}
			if errors.Is(err, errUnbound) != unbind || !unbind && err != nil {
				t.Fatalf("read: %v", err)
			}
			if unbind {
				return
			}
			send(t, "127.0.0.1:54")
			if list, _ := collectFor(t, r, 1); len(list) != 1 {
				t.Errorf("%d packets behind the check", len(list))
			}
		})
	}
}

func TestReadEndsWithContext(t *testing.T) {
	inNS(t, `udp dport 54 log prefix "i" group 77`)
	r := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	l := New(Config{})
	ended := make(chan error)
	go func() { ended <- l.Read(ctx, r) }()
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("Read goes on")
	}
}

// TestSeeds holds the seeds of the fuzz target to what the kernel sends: messages as long as these, with the same packets in them.
func TestSeeds(t *testing.T) {
	inNS(t, `udp dport 54 log prefix "iabc" group 77 snaplen 96`)
	r := open(t)
	send(t, "127.0.0.1:54")
	if err := r.conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	msgs, err := r.conn.Receive()
	if err != nil {
		t.Fatal(err)
	}
	if len(msgs) == 0 || msgs[0].Header.Type != typePacket {
		t.Fatalf("messages %v", msgs)
	}
	seed, err := hex.DecodeString(realMessages[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("a message of the kernel: %x", msgs[0].Data)
	if len(msgs[0].Data) != len(seed) {
		t.Errorf("the kernel's message has %d bytes, the seed %d: %x", len(msgs[0].Data), len(seed), msgs[0].Data)
	}
}
