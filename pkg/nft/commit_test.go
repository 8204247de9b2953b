package nft

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/ruleset"
)

// kernel is what Kernel and Fake both are.
type kernel interface {
	Commit(context.Context, ruleset.Delta) error
	Read(context.Context, ...ruleset.TableID) (ruleset.Ruleset, error)
}

var (
	_ kernel = (*Kernel)(nil)
	_ kernel = (*Fake)(nil)
)

// both runs a test against the kernel and against the fake.
func both(t *testing.T, f func(*testing.T, kernel)) {
	t.Parallel()
	t.Run("kernel", func(t *testing.T) { t.Parallel(); f(t, newNode(t)) })
	t.Run("fake", func(t *testing.T) { t.Parallel(); f(t, NewFake()) })
}

// steps commits rulesets one after the other and reads each back.
func steps(t *testing.T, k kernel, list ...ruleset.Ruleset) {
	t.Helper()
	var from ruleset.Ruleset
	for i, to := range list {
		if err := k.Commit(t.Context(), ruleset.Diff(from, to)); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		got, err := k.Read(t.Context(), inet, netdev)
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		same(t, got, to)
		from = to
	}
}

func addrs(n int) []ruleset.Elem {
	out := make([]ruleset.Elem, n)
	ip := addr("10.0.0.0")
	for i := range out {
		out[i] = ruleset.AddrElem(ip)
		ip = ip.Next()
	}
	return out
}

func TestManyElements(t *testing.T) {
	both(t, func(t *testing.T, k kernel) {
		const n = 20_000
		long := strings.Repeat("l", 255)
		elems := map[ruleset.Elem]ruleset.Verdict{}
		for _, e := range addrs(n) {
			elems[e] = ruleset.To(ruleset.Goto, long)
		}
		iv := set("b6", ruleset.IPv6Addr)
		iv.Interval = true
		ip := addr("fd00::")
		for range n {
			last := ip.Next().Next()
			iv.Elements[ruleset.RangeElem(ip, last)] = ruleset.Verdict{}
			ip = last.Next()
		}
		full := ruleset.Ruleset{table(inet, with(set("p4", ruleset.IPv4Addr), addrs(n)...),
			verdictMap("eg4", ruleset.IPv4Addr, elems), iv, chain(long))}
		half := ruleset.Ruleset{table(inet, with(set("p4", ruleset.IPv4Addr), addrs(n/2)...),
			verdictMap("eg4", ruleset.IPv4Addr, nil), iv, chain(long))}
		steps(t, k, full, half, full, nil)
	})
}

func TestVerdictChange(t *testing.T) {
	both(t, func(t *testing.T, k kernel) {
		e := addrs(3)
		state := func(v ruleset.Verdict, chains ...any) ruleset.Ruleset {
			m := verdictMap("in4", ruleset.IPv4Addr, map[ruleset.Elem]ruleset.Verdict{e[0]: v, e[1]: drop, e[2]: accept})
			return ruleset.Ruleset{table(inet, append(chains, m,
				base("ingress", "forward", "", 0, rule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IPDaddr}, Map: "in4"})))...)}
		}
		quarantine, pod := chain("quarantine", rule(drop)), chain("pod", rule(accept))
		steps(t, k,
			state(ruleset.To(ruleset.Goto, "quarantine"), quarantine),
			state(ruleset.To(ruleset.Goto, "pod"), quarantine, pod), // the chain is new in the same transaction
			state(ruleset.To(ruleset.Jump, "pod"), pod),             // and the old one goes in it
			state(drop),
			nil)
	})
}

func TestRemoval(t *testing.T) {
	both(t, func(t *testing.T, k kernel) {
		set4 := with(set("p4", ruleset.IPv4Addr), addrs(2)...)
		iv := with(set("b4", ruleset.IPv4Addr), ruleset.RangeElem(addr("10.0.0.0"), addr("10.0.0.9")))
		iv.Interval = true
		in4 := verdictMap("in4", ruleset.IPv4Addr, map[ruleset.Elem]ruleset.Verdict{addrs(1)[0]: ruleset.To(ruleset.Goto, "pod")})
		pod := chain("pod", rule(ruleset.To(ruleset.Jump, "policy")), rule(drop))
		policy := chain("policy",
			rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "p4"}, accept),
			rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "b4"}, accept))
		dispatch := rule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IPDaddr}, Map: "in4"})
		steps(t, k,
			ruleset.Ruleset{table(inet, set4, iv, in4, pod, policy, base("ingress", "forward", "", 0, dispatch))},
			// The pod's element, its chains and their sets go at once, in the order that the kernel needs.
			ruleset.Ruleset{table(inet, verdictMap("in4", ruleset.IPv4Addr, nil), base("ingress", "forward", "", 0, dispatch))},
			ruleset.Ruleset{table(inet)},
			nil)
	})
}

// TestDeviceChain removes the chain of a device together with what only that chain refers to.
func TestDeviceChain(t *testing.T) {
	both(t, func(t *testing.T, k kernel) {
		in := rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "p4"}, ruleset.To(ruleset.Jump, "extra"))
		steps(t, k,
			ruleset.Ruleset{table(inet, with(set("p4", ruleset.IPv4Addr), addrs(1)...), chain("extra", rule(drop)), base("as_v0", "ingress", "v0", -300, in))},
			ruleset.Ruleset{table(inet)},
			nil)
	})
}

func TestDeviceGone(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	h, err := netlink.NewHandleAt(n.ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	from := ruleset.Ruleset{table(inet, base("as_v0", "ingress", "v0", -300, rule(drop)), chain("pod"))}
	to := ruleset.Ruleset{table(inet)}
	n.mustCommit(t, nil, from)
	link, err := h.LinkByName("v0")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkDel(link); err != nil {
		t.Fatal(err)
	}
	n.mustCommit(t, from, to)
	same(t, n.mustRead(t), to)
	// Before Linux 6.16 the chain is gone with its device: here somebody else has deleted it.
	n.mustCommit(t, to, from)
	n.nft(t, "", "delete", "chain", "inet", "podwall", "as_v0")
	n.mustCommit(t, from, to)
	same(t, n.mustRead(t), to)
}

// TestInterval shows that a new interval set is loaded by a transaction of its own, before its rule.
func TestInterval(t *testing.T) {
	both(t, func(t *testing.T, k kernel) {
		iv := with(set("b4_1", ruleset.IPv4Addr), ruleset.RangeElem(addr("0.0.0.0"), addr("255.255.255.255")))
		iv.Interval = true
		rs := ruleset.Ruleset{table(inet, iv, base("ingress", "forward", "", 0,
			rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "b4_1"}, drop)))}
		d := ruleset.Diff(nil, rs)
		apply := d.Apply
		d.Apply = nil
		if err := k.Commit(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		got, err := k.Read(t.Context(), inet)
		if err != nil {
			t.Fatal(err)
		}
		same(t, got, ruleset.Ruleset{table(inet, iv)})
		// A commit that stopped here can be repeated as a whole.
		if err := k.Commit(t.Context(), ruleset.Delta{Prepare: d.Prepare, Apply: apply}); err != nil {
			t.Fatal(err)
		}
		steps := ruleset.Diff(rs, nil)
		if err := k.Commit(t.Context(), steps); err != nil {
			t.Fatal(err)
		}
	})
}

func op(kind ruleset.OpKind, o any) ruleset.Op {
	switch o := o.(type) {
	case *ruleset.Set:
		return ruleset.Op{Kind: kind, Table: inet, Set: o, Elements: o.Elements}
	case *ruleset.Chain:
		return ruleset.Op{Kind: kind, Table: inet, Chain: o}
	}
	return ruleset.Op{Kind: kind, Table: inet}
}

// TestRefused has an operation of each kind that the kernel does not accept, between others that it would. The fake must
// give the same answer, and neither may change anything.
func TestRefused(t *testing.T) {
	jump := rule(ruleset.To(ruleset.Jump, "none"))
	lookup := rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "none"}, accept)
	to := func(v ruleset.Verdict) *ruleset.Set {
		return verdictMap("in4", ruleset.IPv4Addr, map[ruleset.Elem]ruleset.Verdict{addrs(1)[0]: v})
	}
	overlap := with(set("b4", ruleset.IPv4Addr), ruleset.RangeElem(addr("10.0.0.9"), addr("10.0.0.10")))
	overlap.Interval = true
	other := set("p4", ruleset.IPv6Addr)
	for name, tt := range map[string]struct {
		op   ruleset.Op
		want error
		text string
	}{
		"delete a missing table":               {ruleset.Op{Kind: ruleset.DelTable, Table: netdev}, unix.ENOENT, "delete table netdev podwall"},
		"add to a missing table":               {ruleset.Op{Kind: ruleset.AddChain, Table: netdev, Chain: chain("x")}, unix.ENOENT, "add chain netdev podwall x"},
		"add elements to a missing set":        {op(ruleset.AddElements, with(set("none", ruleset.IPv4Addr), addrs(1)...)), unix.ENOENT, "add element inet podwall none"},
		"delete a missing element":             {op(ruleset.DelElements, with(set("p4", ruleset.IPv4Addr), addrs(9)...)), unix.ENOENT, "delete element inet podwall p4"},
		"delete a missing set":                 {op(ruleset.DelSet, set("none", ruleset.IPv4Addr)), unix.ENOENT, "delete set inet podwall none"},
		"delete a set in use":                  {op(ruleset.DelSet, set("p4", ruleset.IPv4Addr)), unix.EBUSY, "delete set inet podwall p4"},
		"add a set of another type":            {op(ruleset.AddSet, other), unix.EEXIST, "add set inet podwall p4"},
		"change a verdict":                     {op(ruleset.AddElements, to(accept)), unix.EEXIST, "add element inet podwall in4"},
		"a verdict to a missing chain":         {op(ruleset.AddElements, to(ruleset.To(ruleset.Goto, "none"))), unix.ENOENT, "add element inet podwall in4"},
		"overlapping intervals":                {op(ruleset.AddElements, overlap), unix.EEXIST, "add element inet podwall b4"},
		"flush a missing chain":                {op(ruleset.FlushChain, chain("none")), unix.ENOENT, "flush chain inet podwall none"},
		"delete a missing chain":               {op(ruleset.DelChain, chain("none")), unix.ENOENT, "delete chain inet podwall none"},
		"delete a chain of a map":              {op(ruleset.DelChain, chain("pod")), unix.EBUSY, "delete chain inet podwall pod"},
		"delete a chain of a rule":             {op(ruleset.DelChain, chain("policy")), unix.EBUSY, "delete chain inet podwall policy"},
		"change a hook":                        {op(ruleset.AddChain, base("ingress", "forward", "", 7)), unix.EOPNOTSUPP, "add chain inet podwall ingress"},
		"give a regular chain a hook":          {op(ruleset.AddChain, base("pod", "forward", "", 7)), unix.EOPNOTSUPP, "add chain inet podwall pod"},
		"add rules to a missing chain":         {op(ruleset.AddRules, chain("none", rule(accept))), unix.ENOENT, `add rule inet podwall none "accept"`},
		"jump to a missing chain":              {op(ruleset.AddRules, chain("pod", rule(accept), jump)), unix.ENOENT, `add rule inet podwall pod "jump none"`},
		"jump to a base chain":                 {op(ruleset.AddRules, chain("pod", rule(ruleset.To(ruleset.Jump, "ingress")))), unix.EOPNOTSUPP, `add rule inet podwall pod "jump ingress"`},
		"look up a missing set":                {op(ruleset.AddRules, chain("pod", lookup)), unix.ENOENT, `add rule inet podwall pod "ip saddr @none accept"`},
		"dispatch by a set":                    {op(ruleset.AddRules, chain("pod", rule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IPSaddr}, Map: "p4"}))), unix.EINVAL, `add rule inet podwall pod "ip saddr vmap @p4"`},
		"a hook that the family does not have": {op(ruleset.AddChain, base("x", "egress", "v0", 0)), nil, "add chain inet podwall x"},
		"a value of the wrong length":          {op(ruleset.AddRules, chain("pod", rule(ruleset.Cmp{Field: ruleset.Dport, Value: "\x00\x00\x00"}))), nil, "add rule inet podwall pod"},
		"an ether type in inet":                {op(ruleset.AddRules, chain("pod", rule(ruleset.Equal16(ruleset.EtherType, ruleset.EtherARP)))), nil, "add rule inet podwall pod"},
		"fields of two IP versions":            {op(ruleset.AddRules, chain("pod", rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr, ruleset.IP6Daddr}, Set: "p4"}))), nil, "add rule inet podwall pod"},
		"an interface name that is too long":   {op(ruleset.AddRules, chain("pod", rule(ruleset.Cmp{Field: ruleset.IIFName, Value: strings.Repeat("x", 16)}))), nil, "add rule inet podwall pod"},
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, k kernel) {
				iv := with(set("b4", ruleset.IPv4Addr), ruleset.RangeElem(addr("10.0.0.0"), addr("10.0.0.9")))
				iv.Interval = true
				before := ruleset.Ruleset{table(inet, with(set("p4", ruleset.IPv4Addr), addrs(2)...), iv,
					to(ruleset.To(ruleset.Goto, "pod")), chain("policy"),
					chain("pod", rule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "p4"}, accept), rule(ruleset.To(ruleset.Jump, "policy"))),
					base("ingress", "forward", "", 0))}
				if err := k.Commit(t.Context(), ruleset.Diff(nil, before)); err != nil {
					t.Fatal(err)
				}
				err := k.Commit(t.Context(), ruleset.Delta{Apply: []ruleset.Op{
					op(ruleset.AddChain, chain("good")),
					op(ruleset.AddRules, chain("good", rule(accept), rule(drop))),
					op(ruleset.AddElements, with(set("p4", ruleset.IPv4Addr), addrs(4)...)), // two of them are there, which is no error
					tt.op,
					op(ruleset.AddChain, chain("late")),
				}})
				var ce *CommitError
				if !errors.As(err, &ce) || ce.Stage != Apply || tt.want != nil && !errors.Is(err, tt.want) {
					t.Fatalf("Commit = %v, want %v", err, tt.want)
				}
				if ce.Op != tt.text {
					t.Errorf("the error names %q, want %q", ce.Op, tt.text)
				}
				got, err := k.Read(t.Context(), inet, netdev)
				if err != nil {
					t.Fatal(err)
				}
				same(t, got, before)
			})
		})
	}
}

// TestTableGone has somebody else delete the table.
func TestTableGone(t *testing.T) {
	both(t, func(t *testing.T, k kernel) {
		rs := ruleset.Ruleset{table(inet, chain("pod", rule(drop)), with(set("p4", ruleset.IPv4Addr), addrs(1)...))}
		next := ruleset.Ruleset{table(inet, chain("pod", rule(accept)), with(set("p4", ruleset.IPv4Addr), addrs(2)...))}
		if err := k.Commit(t.Context(), ruleset.Diff(nil, rs)); err != nil {
			t.Fatal(err)
		}
		if n, ok := k.(*node); ok {
			n.nft(t, "", "flush", "ruleset")
		} else if err := k.Commit(t.Context(), ruleset.Diff(rs, nil)); err != nil {
			t.Fatal(err)
		}
		err := k.Commit(t.Context(), ruleset.Diff(rs, next))
		if !IsNotExist(err) || IsExist(err) || IsPermission(err) || IsUncertain(err) {
			t.Fatalf("Commit = %v, want ENOENT", err)
		}
		got, err := k.Read(t.Context(), inet)
		if err != nil || len(got) != 0 {
			t.Fatalf("Read = %v, %v, want no table", got, err)
		}
		if err := k.Commit(t.Context(), ruleset.Diff(got, next)); err != nil {
			t.Fatal(err)
		}
	})
}

func TestOwnedByAnother(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	owner, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(int(n.ns)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = owner.CloseLasting() }()
	owner.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "podwall", Flags: nftables.TableFlagOwner})
	if err := owner.Flush(); err != nil {
		t.Fatal(err)
	}
	rs := ruleset.Ruleset{table(inet, chain("pod"))}
	if err := n.Commit(t.Context(), ruleset.Diff(ruleset.Ruleset{table(inet)}, rs)); !IsPermission(err) {
		t.Errorf("Commit = %v, want EPERM", err)
	}
}

func TestCommitEnded(t *testing.T) {
	both(t, func(t *testing.T, k kernel) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		rs := ruleset.Ruleset{table(inet)}
		if err := k.Commit(ctx, ruleset.Diff(nil, rs)); !errors.Is(err, context.Canceled) {
			t.Errorf("Commit = %v", err)
		}
		if _, err := k.Read(ctx, inet); !errors.Is(err, context.Canceled) {
			t.Errorf("Read = %v", err)
		}
		got, err := k.Read(t.Context(), inet)
		if err != nil || len(got) != 0 {
			t.Errorf("Read = %v, %v, want nothing", got, err)
		}
	})
}

func TestFailNext(t *testing.T) {
	t.Parallel()
	f := NewFake()
	rs := ruleset.Ruleset{table(inet)}
	f.FailNext(unix.ENOBUFS)
	if err := f.Commit(t.Context(), ruleset.Diff(nil, rs)); !IsUncertain(err) {
		t.Errorf("Commit = %v, want ENOBUFS", err)
	}
	if got := f.Ruleset(); len(got) != 0 {
		t.Errorf("tables %v", got)
	}
	if err := f.Commit(t.Context(), ruleset.Diff(nil, rs)); err != nil {
		t.Error(err)
	}
	same(t, f.Ruleset(), rs)
}

// TestForeign has somebody else put things into the table that podwall does not write. Reading them is no error, and the
// next delta restores the table.
func TestForeign(t *testing.T) {
	t.Parallel()
	for name, cmd := range map[string]string{
		"a rule with an expression that is unknown": "insert rule inet podwall pod meta skuid 0 accept",
		"a rule with an anonymous set":              "insert rule inet podwall pod ip saddr { 1.2.3.4, 1.2.3.5 } accept",
		"a rule with fib, which the decoder skips":  "insert rule inet podwall pod fib daddr type local accept",
		"a rule with a field that is unknown":       "insert rule inet podwall pod ip ttl 64 accept",
		"a match of nothing but the family":         "insert rule inet podwall pod meta nfproto ipv4 accept",
		"a mask that is no prefix":                  "insert rule inet podwall pod ip saddr & 255.0.255.0 == 10.0.1.0 accept",
		"a limit per minute":                        "insert rule inet podwall pod limit rate 10/minute accept",
		"a limit over":                              "insert rule inet podwall pod limit rate over 10/second accept",
		"a limit for each, that is over":            "add set inet podwall f { type ipv4_addr; size 9; flags dynamic,timeout; timeout 1m; }; insert rule inet podwall pod update @f { ip saddr counter limit rate over 10/second burst 20 packets } accept",
		"a limit for each, for a time of its own":   "add set inet podwall f { type ipv4_addr; size 9; flags dynamic,timeout; timeout 1m; }; insert rule inet podwall pod update @f { ip saddr timeout 5m counter limit rate 10/second burst 20 packets } accept",
		"a set that packets fill":                   "add set inet podwall f { type ipv4_addr; size 9; flags dynamic,timeout; timeout 1m; }; insert rule inet podwall pod add @f { ip saddr } accept",
		"a log with a level":                        `insert rule inet podwall pod log prefix "x" level debug`,
		"a reject that is not ours":                 "insert rule inet podwall pod reject with icmp type host-unreachable",
		"a mark":                                    "insert rule inet podwall pod meta mark set 1",
		"a rule of ours":                            "insert rule inet podwall pod accept",
		"an element":                                "add element inet podwall p4 { 9.9.9.9 }",
		"a missing element":                         "delete element inet podwall p4 { 10.0.0.0 }",
		"a verdict that is unknown":                 "add element inet podwall in4 { 9.9.9.9 : continue }",
		"another verdict":                           "delete element inet podwall in4 { 10.0.0.0 : drop }; add element inet podwall in4 { 10.0.0.0 : accept }",
		"a set of another kind":                     "add set inet podwall f { type ether_addr; flags timeout; timeout 10s; elements = { 00:11:22:33:44:55 } }",
		"a set with concatenated ranges":            "add set inet podwall f { type ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 80-90 } }",
		"a map to addresses":                        "add map inet podwall f { type ipv4_addr : ipv4_addr; elements = { 1.2.3.4 : 1.2.3.5 } }",
		"a chain":                                   "add chain inet podwall f { type nat hook postrouting priority 100; }; add rule inet podwall f masquerade",
		"a chain's policy":                          "add chain inet podwall ingress { policy drop; }",
		"a chain with two devices":                  "add chain inet podwall as_v0 { type filter hook ingress devices = { v0, v1 } priority -300; }",
		"a missing rule":                            "flush chain inet podwall pod",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			rs := ruleset.Ruleset{table(inet, with(set("p4", ruleset.IPv4Addr), addrs(1)...),
				verdictMap("in4", ruleset.IPv4Addr, map[ruleset.Elem]ruleset.Verdict{addrs(1)[0]: drop}),
				chain("pod", rule(drop)), base("ingress", "forward", "", 0, rule(accept)), base("as_v0", "ingress", "v0", -300))}
			n.mustCommit(t, nil, rs)
			n.nft(t, "", cmd)
			got := n.mustRead(t)
			d := ruleset.Diff(got, rs)
			if d.Empty() {
				t.Fatalf("not seen:\n%s", got)
			}
			if err := n.Commit(t.Context(), d); err != nil {
				t.Fatal(err)
			}
			same(t, n.mustRead(t), rs)
		})
	}
}

// TestForeignUserData has a rule whose user data are not a comment of ours.
func TestForeignUserData(t *testing.T) {
	t.Parallel()
	verdict := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	for name, data := range map[string][]byte{
		"cut off":      {0, 200, 'x'},
		"another type": userdata.AppendUint32(nil, userdata.TypeEbtablesPolicy, 1),
		"two records":  userdata.AppendUint32(commentData("x"), userdata.TypeEbtablesPolicy, 1),
		"unquotable":   userdata.AppendString(nil, userdata.TypeComment, `a"b`),
	} {
		if r, ok := decodeRule(ruleset.Inet, verdict, data); ok {
			t.Errorf("%s: decoded as %q", name, r)
		}
	}
	if r, ok := decodeRule(ruleset.Inet, verdict, commentData("x")); !ok || r.String() != `accept comment "x"` {
		t.Errorf("decoded as %q, %v", r, ok)
	}
}

// genRuleset draws rulesets whose names say what the objects are, as podwall's do: two of them differ in what is there, in
// elements and in rules.
func genRuleset(t *rapid.T) ruleset.Ruleset {
	var out ruleset.Ruleset
	if rapid.IntRange(0, 9).Draw(t, "inet") > 0 {
		out = append(out, genTable(t, inet))
	}
	if rapid.Bool().Draw(t, "netdev") {
		out = append(out, genTable(t, netdev))
	}
	return out
}

var keys = map[string][]ruleset.KeyType{
	"p4":   {ruleset.IPv4Addr},
	"p6":   {ruleset.IPv6Addr},
	"pt":   {ruleset.InetProto, ruleset.InetService},
	"np6":  {ruleset.IPv6Addr, ruleset.InetProto, ruleset.InetService},
	"nd":   {ruleset.ICMPv6},
	"eg4":  {ruleset.IPv4Addr},
	"in6":  {ruleset.IPv6Addr},
	"cut4": {ruleset.IPv4Addr, ruleset.InetService, ruleset.IPv4Addr, ruleset.InetService, ruleset.InetProto},
}

var setFields = map[string][]ruleset.Field{
	"p4":   {ruleset.IPSaddr},
	"p6":   {ruleset.IP6Daddr},
	"pt":   {ruleset.L4Proto, ruleset.Dport},
	"np6":  {ruleset.IP6Saddr, ruleset.L4Proto, ruleset.Dport},
	"nd":   {ruleset.ICMPv6Type},
	"eg4":  {ruleset.IPSaddr},
	"in6":  {ruleset.IP6Daddr},
	"cut4": {ruleset.IPSaddr, ruleset.Sport, ruleset.IPDaddr, ruleset.Dport, ruleset.L4Proto},
}

func genTable(t *rapid.T, id ruleset.TableID) *ruleset.Table {
	tab := ruleset.NewTable(id)
	const regular = 4
	for i := range regular {
		if rapid.Bool().Draw(t, "chain") {
			c := chain(fmt.Sprintf("c%d", i))
			tab.Chains[c.Name] = c
		}
	}
	hooks := map[string]ruleset.Hook{
		"as_v0": {Name: "ingress", Device: "v0", Priority: -300},
		"as_v1": {Name: "ingress", Device: "v1", Priority: -300},
	}
	if id.Family == ruleset.Inet {
		hooks["egress"] = ruleset.Hook{Name: "forward", Priority: rapid.SampledFrom([]int{-1, -5}).Draw(t, "priority")}
		hooks["node"] = ruleset.Hook{Name: "input", Priority: 0}
	} else {
		hooks["de_v0"] = ruleset.Hook{Name: "egress", Device: "v0"}
	}
	targets := slices.Sorted(maps.Keys(tab.Chains))
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		if !rapid.Bool().Draw(t, name) {
			continue
		}
		s := set(name, keys[name]...)
		s.Map = name == "eg4" || name == "in6"
		size := 0
		for _, k := range s.Key {
			size += k.Len()
		}
		for range rapid.IntRange(0, 6).Draw(t, "elements") {
			e := ruleset.Elem(strings.Repeat("\x01", size-1)) + ruleset.Elem(rapid.SampledFrom([]string{"\x00", "\x01", "\x02", "\xfe", "\xff"}).Draw(t, "element"))
			v := ruleset.Verdict{}
			if s.Map {
				v = genVerdict(t, targets)
			}
			s.Elements[e] = v
		}
		tab.Sets[name] = s
	}
	for range rapid.IntRange(0, 2).Draw(t, "intervals") {
		s := genInterval(t)
		tab.Sets[s.Name] = s
	}
	for i, name := range targets {
		tab.Chains[name].Rules = genRules(t, tab, nil, targets[i+1:])
	}
	for _, name := range slices.Sorted(maps.Keys(hooks)) {
		if rapid.Bool().Draw(t, name) {
			h := hooks[name]
			tab.Chains[name] = &ruleset.Chain{Name: name, Hook: &h, Rules: genRules(t, tab, &h, targets)}
		}
	}
	return tab
}

// genInterval draws ascending addresses near both ends of the range and pairs them; its name is its content.
func genInterval(t *rapid.T) *ruleset.Set {
	s := set("", ruleset.IPv4Addr)
	s.Interval = true
	last := rapid.SliceOfNDistinct(rapid.IntRange(-8, 7), 2, 10, rapid.ID[int]).Draw(t, "ends")
	slices.Sort(last)
	name := "b4"
	at := func(i int) netip.Addr {
		v := uint32(int32(i))
		return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
	}
	// Negative numbers are the highest addresses.
	slices.SortFunc(last, func(a, b int) int { return at(a).Compare(at(b)) })
	for i := 0; i+1 < len(last); i += 2 {
		s.Elements[ruleset.RangeElem(at(last[i]), at(last[i+1]))] = ruleset.Verdict{}
		name += fmt.Sprintf("_%x_%x", uint32(last[i]), uint32(last[i+1]))
	}
	s.Name = name
	return s
}

func genVerdict(t *rapid.T, targets []string) ruleset.Verdict {
	kinds := []ruleset.VerdictKind{ruleset.Accept, ruleset.Drop, ruleset.Return}
	if len(targets) > 0 {
		kinds = append(kinds, ruleset.Jump, ruleset.Goto)
	}
	v := ruleset.Verdict{Kind: rapid.SampledFrom(kinds).Draw(t, "verdict")}
	if v.Kind == ruleset.Jump || v.Kind == ruleset.Goto {
		v.Chain = rapid.SampledFrom(targets).Draw(t, "target")
	}
	return v
}

// genRules draws rules that refer to sets of the table and jump to targets. Maps are used by base chains only, since their
// verdicts go to any regular chain.
func genRules(t *rapid.T, tab *ruleset.Table, hook *ruleset.Hook, targets []string) []ruleset.Rule {
	var plain, maps []string
	for name, s := range sortedSets(tab) {
		if s.Map {
			maps = append(maps, name)
		} else {
			plain = append(plain, name)
		}
	}
	var rules []ruleset.Rule
	for range rapid.IntRange(0, 4).Draw(t, "rules") {
		r := rapid.SampledFrom(exprs).Draw(t, "rule")
		refers := slices.ContainsFunc(r.Exprs, func(e ruleset.Expr) bool {
			switch e := e.(type) {
			case ruleset.In, ruleset.Dispatch, ruleset.LimitEach, ruleset.CTState, ruleset.Reject: // conntrack and reject need an IP hook
				return true
			case ruleset.Verdict:
				return e.Chain != ""
			}
			return false
		})
		if refers {
			r = rule(genVerdict(t, targets))
		}
		switch {
		case len(plain) > 0 && rapid.Bool().Draw(t, "lookup"):
			name := rapid.SampledFrom(plain).Draw(t, "set")
			f := setFields[name]
			if tab.Sets[name].Interval {
				f = []ruleset.Field{ruleset.IPDaddr}
			}
			r = rule(ruleset.In{Fields: f, Not: rapid.Bool().Draw(t, "not"), Set: name}, genVerdict(t, targets))
		case hook != nil && len(maps) > 0 && rapid.Bool().Draw(t, "dispatch"):
			name := rapid.SampledFrom(maps).Draw(t, "map")
			r = rule(ruleset.Dispatch{Fields: setFields[name], Map: name})
		}
		if rapid.Bool().Draw(t, "comment") {
			r = r.WithComment(rapid.StringN(0, 40, -1).Draw(t, "text"))
		}
		rules = append(rules, r)
	}
	return rules
}

func sortedSets(tab *ruleset.Table) func(func(string, *ruleset.Set) bool) {
	return func(yield func(string, *ruleset.Set) bool) {
		for _, name := range slices.Sorted(maps.Keys(tab.Sets)) {
			if !yield(name, tab.Sets[name]) {
				return
			}
		}
	}
}

// TestIncremental commits the difference of two random rulesets on top of the first, to the kernel and to the fake.
func TestIncremental(t *testing.T) {
	t.Parallel()
	n, f := newNode(t), NewFake()
	rapid.Check(t, func(rt *rapid.T) {
		for _, k := range []kernel{n, f} {
			left, err := k.Read(t.Context(), inet, netdev)
			if err != nil {
				rt.Fatal(err)
			}
			if err := k.Commit(t.Context(), ruleset.Diff(left, nil)); err != nil {
				rt.Fatal(err)
			}
		}
		var from ruleset.Ruleset
		for range 3 {
			to := genRuleset(rt)
			for _, k := range []kernel{n, f} {
				if err := k.Commit(t.Context(), ruleset.Diff(from, to)); err != nil {
					rt.Fatalf("%T: %v\nfrom:\n%s\nto:\n%s", k, err, from, to)
				}
				got, err := k.Read(t.Context(), inet, netdev)
				if err != nil {
					rt.Fatal(err)
				}
				if d := cmp.Diff(to.String(), got.String()); d != "" {
					rt.Fatalf("%T (-want +got):\n%s", k, d)
				}
				if d := ruleset.Diff(got, to); !d.Empty() {
					rt.Fatalf("%T: the next delta is not empty: %+v", k, d)
				}
			}
			from = to
		}
	})
}

// TestFakeLikeKernel damages random deltas: operations are left out, repeated or swapped. Kernel and fake must refuse the
// same with the same error and be left with the same tables.
func TestFakeLikeKernel(t *testing.T) {
	t.Parallel()
	n, f := newNode(t), NewFake()
	refused := 0
	rapid.Check(t, func(rt *rapid.T) {
		from, to := genRuleset(rt), genRuleset(rt)
		for _, k := range []kernel{n, f} {
			left, err := k.Read(t.Context(), inet, netdev)
			if err != nil {
				rt.Fatal(err)
			}
			for _, d := range []ruleset.Delta{ruleset.Diff(left, nil), ruleset.Diff(nil, from)} {
				if err := k.Commit(t.Context(), d); err != nil {
					rt.Fatal(err)
				}
			}
		}
		d := ruleset.Diff(from, to)
		for range rapid.IntRange(1, 2).Draw(rt, "damages") {
			if len(d.Apply) == 0 {
				break
			}
			i, j := rapid.IntRange(0, len(d.Apply)-1).Draw(rt, "i"), rapid.IntRange(0, len(d.Apply)-1).Draw(rt, "j")
			switch rapid.SampledFrom([]string{"drop", "repeat", "swap"}).Draw(rt, "damage") {
			case "drop":
				d.Apply = slices.Delete(slices.Clone(d.Apply), i, i+1)
			case "repeat":
				d.Apply = slices.Insert(slices.Clone(d.Apply), j, d.Apply[i])
			case "swap":
				d.Apply = slices.Clone(d.Apply)
				d.Apply[i], d.Apply[j] = d.Apply[j], d.Apply[i]
			}
		}
		want, got := n.Commit(t.Context(), d), f.Commit(t.Context(), d)
		if a, b := reason(want), reason(got); a != b {
			rt.Fatalf("kernel: %v\nfake: %v\nfrom:\n%s\nto:\n%s\nops: %s", want, got, from, to, opTexts(d))
		}
		if want != nil {
			refused++
		}
		if d := cmp.Diff(n.mustRead(t).String(), sortTables(f.Ruleset()).String()); d != "" {
			rt.Fatalf("kernel (-) and fake (+):\n%s", d)
		}
	})
	t.Logf("%d deltas refused", refused)
}

// reason is the stage and error number of a CommitError, which is all that Kernel and Fake must agree on.
func reason(err error) string {
	var out []string
	list := []error{err}
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		list = j.Unwrap()
	}
	for _, err := range list {
		var ce *CommitError
		var errno unix.Errno
		if errors.As(err, &ce) && errors.As(err, &errno) {
			out = append(out, fmt.Sprint(ce.Stage, " ", ce.Op, " ", errno))
		}
	}
	return strings.Join(out, "\n")
}

func opTexts(d ruleset.Delta) string {
	var b strings.Builder
	for _, list := range [][]ruleset.Op{d.Prepare, d.Apply, d.Cleanup} {
		for _, o := range list {
			fmt.Fprintf(&b, "\n\t%s", o.Name())
		}
		b.WriteString("\n\t--")
	}
	return b.String()
}

func sortTables(rs ruleset.Ruleset) ruleset.Ruleset {
	slices.SortFunc(rs, func(a, b *ruleset.Table) int { return strings.Compare(string(a.ID.Family), string(b.ID.Family)) })
	return rs
}

// TestReadDuringCommits reads while another socket changes another table without a pause, as kube-proxy might: dumps are
// interrupted, what is read is complete.
func TestReadDuringCommits(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	other, err := New(Config{NetNS: int(n.ns)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	// The foreign table is in front of ours: a dump that goes on by position misses or repeats ours when it changes.
	services := ruleset.TableID{Family: ruleset.Inet, Name: "kube-proxy"}
	few, many := ruleset.Ruleset{table(services)}, ruleset.Ruleset{table(services)}
	rs := ruleset.Ruleset{table(inet)}
	for i := range 400 {
		c := chain(fmt.Sprintf("chain-%d", i), rule(accept), rule(ruleset.Counter{}, drop))
		many[0].Chains[c.Name] = c
		rs[0].Chains[c.Name] = c
	}
	n.mustCommit(t, nil, few)
	n.mustCommit(t, nil, rs)
	stop, done := make(chan struct{}), make(chan error)
	go func() {
		for {
			for _, d := range []ruleset.Delta{ruleset.Diff(few, many), ruleset.Diff(many, few)} {
				if err := other.Commit(context.Background(), d); err != nil {
					done <- err
					return
				}
			}
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
		}
	}()
	complete := 0
	for range 50 {
		got, err := n.Read(t.Context(), inet)
		if errors.Is(err, unix.EAGAIN) {
			continue // never complete for so many dumps; better an error than a part
		}
		if err != nil {
			t.Fatal(err)
		}
		complete++
		if d := cmp.Diff(rs.String(), got.String()); d != "" {
			t.Fatalf("read (-want +got):\n%s", d)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if complete == 0 {
		t.Error("no read of 50 was complete")
	}
	same(t, n.mustRead(t), rs)
}
