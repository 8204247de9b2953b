package nft

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// wire is a node whose v0 is sent datagrams through v1. podwall's chain is on v0's ingress hook, where nothing has been refused
// yet: the stack takes no source like 255.255.255.255 or ff00::/8, and these are where intervals end.
type wire struct {
	*node
	fd    int
	index int // of v1
	sport uint16
}

// witness is around podwall's chain on the same hook: it counts what comes, and remembers the source ports of what passed.
const witness = `table netdev witness {
	set seen { type inet_service; flags dynamic; size 65535; }
	chain before {
		type filter hook ingress device "v0" priority -400; policy accept;
		meta l4proto udp counter
	}
	chain after {
		type filter hook ingress device "v0" priority 0; policy accept;
		meta l4proto udp counter add @seen { udp sport }
	}
}`

func newWire(t *testing.T) *wire {
	t.Helper()
	w := &wire{node: newNode(t)}
	h, err := netlink.NewHandleAt(w.ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, name := range []string{"v0", "v1"} {
		link, err := h.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := h.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
		w.index = link.Attrs().Index
	}
	// The thread that enters the namespace ends with its goroutine; the socket stays in the namespace.
	opened := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := netns.Set(w.ns)
		if err == nil {
			w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		}
		opened <- err
	}()
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(w.fd) })
	w.nft(t, witness, "-f", "-")
	return w
}

// send puts a datagram on the wire.
func (w *wire) send(src, dst netip.Addr, sport, dport uint16) error {
	udp := binary.BigEndian.AppendUint16(nil, sport)
	udp = binary.BigEndian.AppendUint16(udp, dport)
	udp = append(udp, 0, 8, 0, 0)
	frame := make([]byte, 12, 64)
	frame[0], frame[6] = 2, 2 // locally administered addresses, of nobody
	if src.Is4() {
		frame = append(frame, 0x08, 0x00, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, unix.IPPROTO_UDP, 64)
	}
	frame = slices.Concat(frame, src.AsSlice(), dst.AsSlice(), udp)
	return unix.Sendto(w.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: w.index})
}

// probe is a datagram that passes podwall's chain or does not.
type probe struct {
	src, dst netip.Addr
	dport    uint16
	passes   bool
}

var somewhere = map[bool]netip.Addr{true: netip.MustParseAddr("192.0.2.1"), false: netip.MustParseAddr("2001:db8::1")}

// from is a probe of a source address.
func from(src netip.Addr, dport uint16, passes bool) probe {
	return probe{src: src, dst: somewhere[src.Is4()], dport: dport, passes: passes}
}

// judge sends the probes and compares what the witness saw.
func (w *wire) judge(t *testing.T, probes []probe) {
	t.Helper()
	first := w.sport + 1
	for i, p := range probes {
		if i%500 == 499 {
			time.Sleep(time.Millisecond) // the receiver's queue holds a thousand (net.core.netdev_max_backlog)
		}
		w.sport++
		if err := w.send(p.src, p.dst, w.sport, p.dport); err != nil {
			t.Fatal(err)
		}
	}
	var list struct {
		Nftables []struct {
			Set struct {
				Elem []uint16 `json:"elem"`
			} `json:"set"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal([]byte(w.nft(t, "", "-j", "list", "set", "netdev", "witness", "seen")), &list); err != nil {
		t.Fatal(err)
	}
	seen := map[uint16]bool{}
	for _, o := range list.Nftables {
		for _, sport := range o.Set.Elem {
			seen[sport] = true
		}
	}
	wrong := 0
	for i, p := range probes {
		if got := seen[first+uint16(i)]; got != p.passes {
			if wrong++; wrong <= 10 {
				t.Errorf("%s -> %s port %d: passes %t, want %t", p.src, p.dst, p.dport, got, p.passes)
			}
		}
	}
	if wrong > 10 {
		t.Errorf("%d of %d probes are wrong", wrong, len(probes))
	}
}

// edges are probes at both ends of a range, of which the set has the inside only.
func edges(r ruleset.Elem, dport uint16) []probe {
	first, _ := netip.AddrFromSlice([]byte(r[:len(r)/2]))
	last, _ := netip.AddrFromSlice([]byte(r[len(r)/2:]))
	list := []probe{from(first, dport, true), from(last, dport, true)}
	if before := first.Prev(); before.IsValid() {
		list = append(list, from(before, dport, false))
	}
	if behind := last.Next(); behind.IsValid() {
		list = append(list, from(behind, dport, false))
	}
	return list
}

func interval(name string, key ruleset.KeyType, ranges ...ruleset.Elem) *ruleset.Set {
	s := with(set(name, key), ranges...)
	s.Interval = true
	return s
}

func span(first, last string) ruleset.Elem { return ruleset.RangeElem(addr(first), addr(last)) }

// lookups accepts UDP to a port of 1, 2, 3 and so on whose source is in the first, second, third set.
func lookups(sets ...*ruleset.Set) ruleset.Ruleset {
	c := base("as_v0", "ingress", "v0", -300)
	t := table(netdev)
	for i, s := range sets {
		field := ruleset.IPSaddr
		if s.Key[0] == ruleset.IPv6Addr {
			field = ruleset.IP6Saddr
		}
		c.Rules = append(c.Rules, rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoUDP), ruleset.Equal16(ruleset.Dport, uint16(i+1)),
			ruleset.In{Fields: []ruleset.Field{field}, Set: s.Name}, accept))
		t.Sets[s.Name] = s
	}
	c.Rules = append(c.Rules, rule(drop))
	t.Chains[c.Name] = c
	return ruleset.Ruleset{t}
}

// TestTrapsIntervalEdges holds that a range holds its first and its last address and neither neighbour, at the ends of the address
// space too, where the kernel has no element for the end of a range.
func TestTrapsIntervalEdges(t *testing.T) {
	t.Parallel()
	sets := []*ruleset.Set{
		interval("b4_ends", ruleset.IPv4Addr, span("0.0.0.0", "0.0.0.0"), span("10.0.0.0", "10.255.255.255"), span("255.255.255.255", "255.255.255.255")),
		interval("b4_top", ruleset.IPv4Addr, span("240.0.0.0", "255.255.255.255")),
		interval("b4_half", ruleset.IPv4Addr, span("0.0.0.0", "127.255.255.255")),
		interval("b4_all", ruleset.IPv4Addr, span("0.0.0.0", "255.255.255.255")),
		interval("b4_single", ruleset.IPv4Addr, span("10.0.0.2", "10.0.0.2"), span("10.0.0.4", "10.0.0.4")),
		interval("b6_ends", ruleset.IPv6Addr, span("::", "::"), span("fd00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
			span("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")),
		interval("b6_top", ruleset.IPv6Addr, span("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")),
		interval("b6_all", ruleset.IPv6Addr, span("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")),
	}
	w := newWire(t)
	rs := lookups(sets...)
	w.mustCommit(t, nil, rs)
	same(t, w.mustRead(t), rs)
	var probes []probe
	for i, s := range sets {
		for r := range s.Elements {
			probes = append(probes, edges(r, uint16(i+1))...)
		}
	}
	w.judge(t, probes)

	// Adjacent ranges are two elements with one key, the end of the one and the start of the other.
	adjacent := interval("b4_adjacent", ruleset.IPv4Addr, span("10.0.0.0", "10.0.0.9"), span("10.0.0.10", "10.0.0.10"), span("10.0.0.11", "10.0.0.99"))
	next := lookups(adjacent)
	w.mustCommit(t, rs, next)
	same(t, w.mustRead(t), next)
	probes = nil
	for r := range adjacent.Elements {
		for _, p := range edges(r, 1) {
			if p.passes {
				probes = append(probes, p)
			}
		}
	}
	w.judge(t, append(probes, from(addr("9.255.255.255"), 1, false), from(addr("10.0.0.100"), 1, false)))
}

// TestTrapsLargeSets holds that sets with more elements than one netlink attribute can hold (65,535 bytes: 4,095 IPv4 addresses, 1,170
// verdicts; google/nftables#303) are in the kernel to the last one.
func TestTrapsLargeSets(t *testing.T) {
	t.Parallel()
	for _, count := range []int{1171, 4096, 20_001} {
		t.Run(strconv.Itoa(count), func(t *testing.T) {
			t.Parallel()
			p4, p6 := set("p4", ruleset.IPv4Addr), set("p6", ruleset.IPv6Addr)
			b4, b6 := interval("b4", ruleset.IPv4Addr), interval("b6", ruleset.IPv6Addr)
			eg4 := verdictMap("eg4", ruleset.IPv4Addr, map[ruleset.Elem]ruleset.Verdict{})
			eg6 := verdictMap("eg6", ruleset.IPv6Addr, map[ruleset.Elem]ruleset.Verdict{})
			np4 := set("np4", ruleset.IPv4Addr, ruleset.InetProto, ruleset.InetService)
			np6 := set("np6", ruleset.IPv6Addr, ruleset.InetProto, ruleset.InetService)
			var probes []probe
			ip4, ip6 := addr("20.0.0.0"), addr("fd00::")
			for i := range count {
				// Every element is followed by a neighbour that only the ranges have, and by one that nobody has.
				second4, second6 := ip4.Next(), ip6.Next()
				none4, none6 := second4.Next(), second6.Next()
				number, even := uint16(1000+i), i%2 == 0
				with(p4, ruleset.AddrElem(ip4))
				with(p6, ruleset.AddrElem(ip6))
				with(b4, ruleset.RangeElem(ip4, second4))
				with(b6, ruleset.RangeElem(ip6, second6))
				with(np4, ruleset.AddrPortElem(ip4, ruleset.ProtoUDP, number))
				with(np6, ruleset.AddrPortElem(ip6, ruleset.ProtoUDP, number))
				verdict := drop
				if even {
					verdict = ruleset.To(ruleset.Goto, "pod")
				}
				eg4.Elements[ruleset.AddrElem(ip4)], eg6.Elements[ruleset.AddrElem(ip6)] = verdict, verdict
				if i%97 == 0 || i == 904 || i == 1170 || i == 4095 || i == count-1 { // 904 of 5000 survived google/nftables v0.3.0
					probes = append(probes,
						from(ip4, 1, true), from(second4, 1, false), from(ip6, 2, true), from(second6, 2, false),
						from(second4, 3, true), from(none4, 3, false), from(second6, 4, true), from(none6, 4, false),
						from(ip4, 5, even), from(second4, 5, false), from(ip6, 6, even), from(second6, 6, false),
						probe{somewhere[true], ip4, number, true}, probe{somewhere[true], ip4, number + 1, false},
						probe{somewhere[false], ip6, number, true}, probe{somewhere[false], ip6, number + 1, false})
				}
				ip4, ip6 = none4.Next(), none6.Next()
			}
			rs := lookups(p4, p6, b4, b6)
			c := rs[0].Chains["as_v0"]
			named := func(dst ruleset.Field, set string) ruleset.Rule {
				return rule(ruleset.In{Fields: []ruleset.Field{dst, ruleset.L4Proto, ruleset.Dport}, Set: set}, accept)
			}
			dispatch := func(dport uint16, src ruleset.Field, name string) ruleset.Rule {
				return rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoUDP), ruleset.Equal16(ruleset.Dport, dport), ruleset.Dispatch{Fields: []ruleset.Field{src}, Map: name})
			}
			c.Rules = slices.Insert(c.Rules, len(c.Rules)-1, dispatch(5, ruleset.IPSaddr, "eg4"), dispatch(6, ruleset.IP6Saddr, "eg6"),
				named(ruleset.IPDaddr, "np4"), named(ruleset.IP6Daddr, "np6"))
			rs[0].Chains["pod"] = chain("pod", rule(accept))
			for _, s := range []*ruleset.Set{eg4, eg6, np4, np6} {
				rs[0].Sets[s.Name] = s
			}
			w := newWire(t)
			w.mustCommit(t, nil, rs)
			same(t, w.mustRead(t), rs)
			w.judge(t, probes)
		})
	}
}

var counter = regexp.MustCompile(`counter packets (\d+)`)

// TestTrapsIntervalSetsUnderTraffic holds that a rule that goes over from one interval set to another never misses a packet that both
// hold. The kernel does not do that by itself (nftables publishes the new set after the new rule): Diff loads the set first, in a
// transaction of its own, and the control, which commits the same operations in one, shows that the packets would notice.
func TestTrapsIntervalSetsUnderTraffic(t *testing.T) {
	const changes, size = 200, 1000
	full, less := interval("b4_full", ruleset.IPv4Addr), interval("b4_less", ruleset.IPv4Addr)
	for i := range size {
		first := netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0})
		r := ruleset.RangeElem(first, first.Next().Next())
		with(full, r)
		if i != size/2 {
			with(less, r)
		}
	}
	both := netip.AddrFrom4([4]byte{20, 0, 7, 1}) // in both sets
	states := []ruleset.Ruleset{lookups(full), lookups(less)}
	run := func(t *testing.T, order func(ruleset.Delta) ruleset.Delta) int {
		w := newWire(t)
		w.mustCommit(t, nil, states[0])
		var sent atomic.Int64
		var failed error
		done := make(chan struct{})
		var sender sync.WaitGroup
		sender.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if failed = w.send(both, somewhere[true], 7, 1); failed != nil {
					return
				}
				sent.Add(1)
			}
		})
		for i := range changes {
			seen := sent.Load()
			if err := w.Commit(t.Context(), order(ruleset.Diff(states[i%2], states[(i+1)%2]))); err != nil {
				t.Error(err)
				break
			}
			for deadline := time.Now().Add(time.Second); sent.Load() < seen+100 && time.Now().Before(deadline); {
				time.Sleep(100 * time.Microsecond)
			}
		}
		close(done)
		sender.Wait()
		if failed != nil {
			t.Fatal(failed)
		}
		var counted []int // before podwall's chain, and behind it
		for _, m := range counter.FindAllStringSubmatch(w.nft(t, "", "list", "table", "netdev", "witness"), -1) {
			n, err := strconv.Atoi(m[1])
			if err != nil {
				t.Fatal(err)
			}
			counted = append(counted, n)
		}
		if len(counted) != 2 || counted[0] < 100*changes {
			t.Fatalf("%d packets sent, counted %d: this test tests nothing", sent.Load(), counted)
		}
		t.Logf("%d changes, %d packets, %d lost", changes, counted[0], counted[0]-counted[1])
		return counted[0] - counted[1]
	}
	t.Run("two transactions", func(t *testing.T) {
		if lost := run(t, func(d ruleset.Delta) ruleset.Delta { return d }); lost > 0 {
			t.Errorf("%d packets of an address that both sets hold were lost", lost)
		}
	})
	t.Run("control: one transaction", func(t *testing.T) {
		lost := run(t, func(d ruleset.Delta) ruleset.Delta { return ruleset.Delta{Apply: slices.Concat(d.Prepare, d.Apply)} })
		if lost == 0 {
			t.Skip("this kernel lost no packet either: it switches interval sets atomically, or was lucky")
		}
	})
}

// TestTrapsComments holds that a comment of any length and script is loaded, cut at a rune, and listed by nft as it was loaded.
func TestTrapsComments(t *testing.T) {
	t.Parallel()
	var sets []any
	c := chain("pod")
	var want []string
	for i, text := range []string{
		strings.Repeat("c", 127), strings.Repeat("c", 128), strings.Repeat("c", 5000),
		strings.Repeat("c", 126) + "é", strings.Repeat("c", 125) + "é", strings.Repeat("é", 70),
		strings.Repeat("界", 43), strings.Repeat("🧱", 40), "c" + strings.Repeat("🧱", 40), "quoted \"\\\n",
	} {
		s := set(fmt.Sprintf("p4_%d", i), ruleset.IPv4Addr)
		s.Comment = ruleset.Comment(text)
		sets = append(sets, s)
		r := rule(ruleset.Counter{}).WithComment(text)
		c.Rules = append(c.Rules, r)
		want = append(want, r.Comment)
		if len(r.Comment) > 127 || len(text) > 127 && len(r.Comment) < 124 {
			t.Errorf("%q was cut to %d bytes", text, len(r.Comment))
		}
	}
	n := newNode(t)
	rs := ruleset.Ruleset{table(inet, append(sets, c)...)}
	n.mustCommit(t, nil, rs)
	same(t, n.mustRead(t), rs)
	listing := n.nft(t, "", "list", "ruleset")
	for _, text := range want {
		if quoted := `comment "` + text + `"`; strings.Count(listing, quoted) < 2 {
			t.Errorf("nft does not list both of %s", quoted)
		}
	}
	// What nft lists, it loads.
	newNode(t).nft(t, listing, "-f", "-")
}

// TestTrapsLongNames holds that a name that the kernel would cut or refuse is an error, and that nothing of its transaction stays.
func TestTrapsLongNames(t *testing.T) {
	long := strings.Repeat("n", 256) // NFT_NAME_MAXLEN is 256 with the final NUL
	for name, rs := range map[string]ruleset.Ruleset{
		"set":   {table(inet, set("good", ruleset.IPv4Addr), set(long, ruleset.IPv4Addr))},
		"chain": {table(inet, chain("good"), chain(long))},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			err := n.Commit(t.Context(), ruleset.Diff(nil, rs))
			if err == nil || !strings.Contains(err.Error(), long) {
				t.Errorf("Commit = %v, want an error that names the %s", err, name)
			}
			if got := n.mustRead(t); len(got) != 0 {
				t.Errorf("left behind: %s", got)
			}
		})
	}
}
