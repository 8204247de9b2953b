package nft

import (
	"fmt"
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

	"github.com/podwall/podwall/pkg/ruleset"
)

var (
	inet   = ruleset.TableID{Family: ruleset.Inet, Name: "podwall"}
	netdev = ruleset.TableID{Family: ruleset.Netdev, Name: "podwall"}
)

// node is a network namespace with a veth pair v0, v1 and a Kernel in it.
type node struct {
	*Kernel
	ns netns.NsHandle
}

func newNode(t testing.TB) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace and loads nftables in it")
	}
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(orig); err != nil {
		t.Fatal(err) // the thread stays locked and ends with the test
	}
	runtime.UnlockOSThread()
	t.Cleanup(func() { _ = ns.Close() })
	if err := orig.Close(); err != nil {
		t.Fatal(err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0"}, PeerName: "v1"}); err != nil {
		t.Fatal(err)
	}
	k, err := New(Config{NetNS: int(ns)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	return &node{Kernel: k, ns: ns}
}

// nft runs the nft command in the namespace.
func (n *node) nft(t testing.TB, stdin string, args ...string) string {
	t.Helper()
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = orig.Close() }()
	if err := netns.Set(n.ns); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("nft", args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if e := netns.Set(orig); e != nil {
		t.Fatal(e)
	}
	runtime.UnlockOSThread()
	if err != nil {
		t.Fatalf("nft %v: %v\n%s\n%s", args, err, out, numbered(stdin))
	}
	return string(out)
}

func numbered(s string) string {
	var b strings.Builder
	for i, l := range strings.Split(s, "\n") {
		fmt.Fprintf(&b, "%3d %s\n", i+1, l)
	}
	return b.String()
}

func (n *node) mustCommit(t testing.TB, from, to ruleset.Ruleset) {
	t.Helper()
	if err := n.Commit(t.Context(), ruleset.Diff(from, to)); err != nil {
		t.Fatal(err)
	}
}

func (n *node) mustRead(t testing.TB) ruleset.Ruleset {
	t.Helper()
	rs, err := n.Read(t.Context(), inet, netdev)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// same compares two rulesets as text and as what Diff sees.
func same(t testing.TB, got, want ruleset.Ruleset) {
	t.Helper()
	if d := cmp.Diff(want.String(), got.String()); d != "" {
		t.Fatalf("ruleset (-want +got):\n%s", d)
	}
	for _, tab := range got {
		for _, c := range tab.Chains {
			if c.Unknown {
				t.Errorf("chain %s is unknown", c.Name)
			}
		}
	}
	if d := ruleset.Diff(got, want); !d.Empty() {
		t.Errorf("the texts are the same, the delta is %+v", d)
	}
}

// blocks sorts the sets and chains of a listing: nft lists them as they were created.
func blocks(listing string) []string {
	var out []string
	table := ""
	var block []string
	for l := range strings.Lines(listing) {
		switch {
		case strings.HasPrefix(l, "table "):
			table = l
		case strings.HasPrefix(l, "\t}"):
			out = append(out, table+strings.Join(block, ""))
			block = nil
		case strings.HasPrefix(l, "\t"):
			block = append(block, l)
		}
	}
	slices.Sort(out)
	return out
}

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func table(id ruleset.TableID, objects ...any) *ruleset.Table {
	t := ruleset.NewTable(id)
	for _, o := range objects {
		switch o := o.(type) {
		case *ruleset.Set:
			t.Sets[o.Name] = o
		case *ruleset.Chain:
			t.Chains[o.Name] = o
		}
	}
	return t
}

func set(name string, key ...ruleset.KeyType) *ruleset.Set {
	return &ruleset.Set{Name: name, Key: key, Elements: map[ruleset.Elem]ruleset.Verdict{}}
}

func with(s *ruleset.Set, elems ...ruleset.Elem) *ruleset.Set {
	for _, e := range elems {
		s.Elements[e] = ruleset.Verdict{}
	}
	return s
}

func verdictMap(name string, key ruleset.KeyType, elems map[ruleset.Elem]ruleset.Verdict) *ruleset.Set {
	return &ruleset.Set{Name: name, Key: []ruleset.KeyType{key}, Map: true, Elements: elems}
}

func chain(name string, rules ...ruleset.Rule) *ruleset.Chain {
	return &ruleset.Chain{Name: name, Rules: rules}
}

func base(name, hook, device string, priority int, rules ...ruleset.Rule) *ruleset.Chain {
	return &ruleset.Chain{Name: name, Hook: &ruleset.Hook{Name: hook, Device: device, Priority: priority}, Rules: rules}
}

var (
	rule   = ruleset.NewRule
	accept = ruleset.Verdict{Kind: ruleset.Accept}
	drop   = ruleset.Verdict{Kind: ruleset.Drop}
)

// exprs has a rule for every expression and field in all their forms.
var exprs = []ruleset.Rule{
	rule(ruleset.Established|ruleset.Related, accept),
	rule(ruleset.Invalid, ruleset.Counter{}, drop),
	rule(ruleset.Established, accept),
	rule(ruleset.NotNew, accept),
	rule(ruleset.AnyState&^ruleset.Untracked, accept),
	rule(ruleset.AnyState, accept),
	rule(ruleset.New|ruleset.Untracked, accept),
	rule(ruleset.Untracked, accept),
	rule(ruleset.In{Fields: []ruleset.Field{ruleset.ICMPv6Type}, Set: "nd"}, accept),
	rule(ruleset.Equal(ruleset.ICMPv6Type, 135), ruleset.Equal(ruleset.IP6HopLimit, 255), accept),
	rule(ruleset.Equal(ruleset.IP6HopLimit, 255), ruleset.In{Fields: []ruleset.Field{ruleset.ICMPv6Type}, Set: "nd"}, accept),
	rule(ruleset.In{
		Fields: []ruleset.Field{ruleset.IPSaddr, ruleset.Sport, ruleset.IPDaddr, ruleset.Dport, ruleset.L4Proto}, Set: "cut4",
	}, ruleset.To(ruleset.Goto, "pod")),
	rule(ruleset.In{
		Fields: []ruleset.Field{ruleset.IP6Saddr, ruleset.Sport, ruleset.IP6Daddr, ruleset.Dport, ruleset.L4Proto}, Set: "cut6",
	}, ruleset.To(ruleset.Jump, "pod")),
	rule(ruleset.In{Fields: []ruleset.Field{ruleset.L4Proto, ruleset.Dport}, Set: "pt"},
		ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "p4"}, accept),
	rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPDaddr, ruleset.L4Proto, ruleset.Dport}, Set: "np4"}, accept),
	rule(ruleset.In{Fields: []ruleset.Field{ruleset.IP6Daddr, ruleset.L4Proto, ruleset.Dport}, Not: true, Set: "np6"}, drop),
	rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Not: true, Set: "p4"}, drop),
	rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "b4"}, accept),
	rule(ruleset.In{Fields: []ruleset.Field{ruleset.IP6Saddr}, Set: "b6"}, accept),
	rule(ruleset.Address(ruleset.IPSaddr, addr("10.0.0.1")), accept),
	rule(ruleset.Not(ruleset.Address(ruleset.IPDaddr, addr("10.0.0.1"))), drop),
	rule(ruleset.Address(ruleset.IPSaddr, addr("10.0.0.1")), ruleset.Address(ruleset.IPDaddr, addr("10.0.0.2")), accept),
	rule(ruleset.Address(ruleset.IP6Saddr, addr("fd00::1")), accept),
	rule(ruleset.Not(ruleset.Address(ruleset.IP6Daddr, addr("fd00::1"))), drop),
	rule(ruleset.Prefix{Field: ruleset.IPSaddr, Prefix: prefix("10.0.0.0/8")}, accept),
	rule(ruleset.Prefix{Field: ruleset.IPDaddr, Prefix: prefix("10.16.0.0/12"), Not: true}, drop),
	rule(ruleset.Prefix{Field: ruleset.IPSaddr, Prefix: prefix("10.0.0.0/31")}, ruleset.Verdict{Kind: ruleset.Return}),
	rule(ruleset.Prefix{Field: ruleset.IPSaddr, Prefix: prefix("0.0.0.0/0")}, accept),
	rule(ruleset.Prefix{Field: ruleset.IPSaddr, Prefix: prefix("10.0.0.1/32")}, accept),
	rule(ruleset.Prefix{Field: ruleset.IP6Saddr, Prefix: prefix("fd00::1/128"), Not: true}, accept),
	rule(ruleset.Prefix{Field: ruleset.IP6Saddr, Prefix: prefix("fe80::/10"), Not: true}, drop),
	rule(ruleset.Prefix{Field: ruleset.IP6Daddr, Prefix: prefix("fd00::/64")}, accept),
	rule(ruleset.Prefix{Field: ruleset.IP6Daddr, Prefix: prefix("::/0")}, accept),
	rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP), ruleset.Equal16(ruleset.Dport, 8080), accept),
	rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoUDP), ruleset.Between16(ruleset.Dport, 8000, 8090), accept),
	rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoSCTP), ruleset.Equal16(ruleset.Sport, 1), accept),
	rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP), ruleset.Equal16(ruleset.Dport, 443),
		ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "p4"}, accept),
	rule(ruleset.Address(ruleset.IPSaddr, addr("0.0.0.0")), ruleset.Equal(ruleset.L4Proto, ruleset.ProtoUDP),
		ruleset.Equal16(ruleset.Sport, 68), ruleset.Equal16(ruleset.Dport, 67), accept),
	rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP), accept),
	rule(ruleset.Equal(ruleset.L4Proto, 47), accept),
	rule(ruleset.Not(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP)), drop),
	rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoICMP), accept),
	rule(ruleset.Range{Field: ruleset.IPSaddr, From: string(addr("10.0.0.5").AsSlice()), To: string(addr("10.0.0.9").AsSlice())}, accept),
	rule(ruleset.Cmp{Field: ruleset.IIFName, Value: "v0"}, ruleset.Address(ruleset.IP6Saddr, addr("fd00::1")), accept),
	rule(ruleset.Cmp{Field: ruleset.IIFName, Value: "veth012345678ab", Not: true}, drop),
	rule(ruleset.Equal(ruleset.PktType, ruleset.PktBroadcast), drop),
	rule(ruleset.Equal(ruleset.PktType, ruleset.PktMulticast), drop),
	rule(ruleset.Limit{PerSecond: 10, Burst: 20}, ruleset.Log{Prefix: "i0123456789", Group: 77, Snaplen: 96}),
	rule(ruleset.LimitEach{Field: ruleset.IPSaddr, Set: "ed4", PerSecond: 10, Burst: 20}, ruleset.Log{Prefix: "e", Group: 77, Snaplen: 96}),
	rule(ruleset.LimitEach{Field: ruleset.IP6Saddr, Set: "ed6", PerSecond: 10, Burst: 20}, accept),
	rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP), ruleset.In{Fields: []ruleset.Field{ruleset.Dport}, Set: "pr"}, accept),
	rule(ruleset.Log{Prefix: "no snaplen", Group: 1}),
	rule(ruleset.Counter{}, drop),
	rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP), ruleset.Reject{TCPReset: true}),
	rule(ruleset.Reject{}),
	rule(accept).WithComment("allow: default/web rule 0"),
	rule(drop).WithComment(strings.Repeat("c", 127)),
	rule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IPSaddr}, Map: "eg4"}),
	rule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IP6Saddr}, Map: "eg6"}),
}

func dynamic(name string, key ruleset.KeyType) *ruleset.Set {
	s := set(name, key)
	s.Dynamic, s.Timeout, s.Size = true, 10*time.Minute, 100
	return s
}

// everything is a ruleset with each kind of object in each form that podwall uses.
func everything() ruleset.Ruleset {
	b4 := with(set("b4", ruleset.IPv4Addr),
		ruleset.RangeElem(addr("10.0.0.0"), addr("10.0.0.255")),
		ruleset.RangeElem(addr("10.0.1.0"), addr("10.0.1.255")), // adjacent
		ruleset.RangeElem(addr("10.0.5.1"), addr("10.0.5.1")),
		ruleset.RangeElem(addr("192.168.0.0"), addr("255.255.255.255")))
	b4.Interval = true
	b6 := with(set("b6", ruleset.IPv6Addr),
		ruleset.RangeElem(addr("::"), addr("::1")),
		ruleset.RangeElem(addr("fd00::"), addr("fd00::ffff:ffff")))
	b6.Interval = true
	pr := with(set("pr", ruleset.InetService), ruleset.PortRangeElem(0, 9), ruleset.PortRangeElem(80, 80), ruleset.PortRangeElem(81, 90), ruleset.PortRangeElem(60000, 65535))
	pr.Interval = true
	empty := set("b4_empty", ruleset.IPv4Addr)
	empty.Interval = true
	np4 := with(set("np4", ruleset.IPv4Addr, ruleset.InetProto, ruleset.InetService),
		ruleset.AddrPortElem(addr("10.0.0.1"), ruleset.ProtoTCP, 80), ruleset.AddrPortElem(addr("10.0.0.1"), ruleset.ProtoUDP, 53))
	np4.Comment = strings.Repeat("s", 127)
	long := strings.Repeat("x", 255)
	return ruleset.Ruleset{
		table(inet,
			with(set("nd", ruleset.ICMPv6), "\x82", "\x85", "\x87", "\x88"),
			with(set("p4", ruleset.IPv4Addr), ruleset.AddrElem(addr("10.0.0.1")), ruleset.AddrElem(addr("10.0.0.2"))),
			with(set("p6", ruleset.IPv6Addr), ruleset.AddrElem(addr("fd00::1"))),
			with(set("pt", ruleset.InetProto, ruleset.InetService), ruleset.PortElem(ruleset.ProtoTCP, 80), ruleset.PortElem(ruleset.ProtoSCTP, 99)),
			np4,
			with(set("np6", ruleset.IPv6Addr, ruleset.InetProto, ruleset.InetService), ruleset.AddrPortElem(addr("fd00::2"), ruleset.ProtoTCP, 443)),
			with(set("cut4", ruleset.IPv4Addr, ruleset.InetService, ruleset.IPv4Addr, ruleset.InetService, ruleset.InetProto),
				"\x0a\x00\x00\x01\x00\x50\x0a\x00\x00\x02\x9c\x40\x06"),
			set("cut6", ruleset.IPv6Addr, ruleset.InetService, ruleset.IPv6Addr, ruleset.InetService, ruleset.InetProto),
			b4, b6, pr, empty, dynamic("ed4", ruleset.IPv4Addr), dynamic("ed6", ruleset.IPv6Addr), set(long, ruleset.IPv4Addr),
			verdictMap("eg4", ruleset.IPv4Addr, map[ruleset.Elem]ruleset.Verdict{
				ruleset.AddrElem(addr("10.0.0.1")): ruleset.To(ruleset.Goto, "pod"),
				ruleset.AddrElem(addr("10.0.0.2")): ruleset.To(ruleset.Jump, long),
				ruleset.AddrElem(addr("10.0.0.3")): drop,
				ruleset.AddrElem(addr("10.0.0.4")): accept,
				ruleset.AddrElem(addr("10.0.0.5")): {Kind: ruleset.Return},
			}),
			verdictMap("eg6", ruleset.IPv6Addr, map[ruleset.Elem]ruleset.Verdict{
				ruleset.AddrElem(addr("fd00::1")): ruleset.To(ruleset.Goto, "pod"),
			}),
			base("egress", "forward", "", -1, exprs...),
			base("ingress", "forward", "", 0, rule(ruleset.To(ruleset.Jump, long))),
			base("node", "input", "", 0),
			base("prerouting", "prerouting", "", -150, rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP), ruleset.Reject{TCPReset: true})),
			base("as_v0", "ingress", "v0", -300,
				rule(ruleset.Not(ruleset.Address(ruleset.IPSaddr, addr("10.0.0.1"))), ruleset.Counter{}, drop)),
			chain("pod", rule(ruleset.Counter{}, drop)),
			chain(long, rule(accept)),
			chain("empty"),
		),
		table(netdev,
			base("as_v0", "ingress", "v0", -300,
				rule(ruleset.Equal16(ruleset.EtherType, ruleset.EtherARP), accept),
				rule(ruleset.Equal16(ruleset.EtherType, ruleset.EtherIPv4), ruleset.Address(ruleset.IPSaddr, addr("10.0.0.1")), accept),
				rule(ruleset.Not(ruleset.Equal16(ruleset.EtherType, ruleset.EtherIPv6)), ruleset.Counter{}, drop),
				rule(ruleset.Prefix{Field: ruleset.IP6Saddr, Prefix: prefix("fe80::/10")}, ruleset.Equal(ruleset.ICMPv6Type, 135), accept),
			),
			base("de_v0", "egress", "v0", 0,
				rule(ruleset.In{Fields: []ruleset.Field{ruleset.ICMPv6Type}, Set: "nd"}, accept),
				rule(ruleset.Not(ruleset.Address(ruleset.IPDaddr, addr("10.0.0.1"))), ruleset.Counter{}, drop),
				rule(ruleset.Not(ruleset.Address(ruleset.IP6Daddr, addr("fd00::1"))), ruleset.Counter{}, drop),
			),
			with(set("nd", ruleset.ICMPv6), "\x82", "\x85"),
		),
	}
}

// TestTranslation compares with nft: the text of a ruleset loaded with `nft -f` and the ruleset committed must list equal.
func TestTranslation(t *testing.T) {
	t.Parallel()
	rs := everything()
	a, b := newNode(t), newNode(t)
	a.nft(t, rs.String(), "-f", "-")
	b.mustCommit(t, nil, rs)
	want, got := blocks(a.nft(t, "", "list", "ruleset")), blocks(b.nft(t, "", "list", "ruleset"))
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("nft -f (-) and Commit (+) differ:\n%s", d)
	}
	if len(got) < 20 {
		t.Errorf("only %d objects listed", len(got))
	}
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	rs := everything()
	n.mustCommit(t, nil, rs)
	same(t, n.mustRead(t), rs)
	n.mustCommit(t, rs, nil)
	if got := n.mustRead(t); len(got) != 0 {
		t.Errorf("left behind: %s", got)
	}
}
