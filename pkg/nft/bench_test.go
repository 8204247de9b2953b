package nft

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/podwall/podwall/pkg/ruleset"
)

// Of the node that the benchmarks load.
const (
	benchPods     = 250
	benchPolicies = 50
	benchPeers    = 10_000
)

func benchAddr(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
}

func benchPolicy(p int, port uint16) *ruleset.Chain {
	peers := ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: fmt.Sprint("p4_", p)}
	accept := ruleset.Verdict{Kind: ruleset.Accept}
	return &ruleset.Chain{Name: fmt.Sprint("pi_", p), Rules: []ruleset.Rule{
		ruleset.NewRule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP), ruleset.Equal16(ruleset.Dport, port), peers, accept),
		ruleset.NewRule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoUDP), ruleset.Equal16(ruleset.Dport, 53), peers, accept),
	}}
}

// benchPod adds a pod's chains and its elements to a table.
func benchPod(t *ruleset.Table, n int) {
	for _, dir := range []string{"eg", "in"} {
		c := &ruleset.Chain{Name: fmt.Sprint(dir, "_", n), Rules: []ruleset.Rule{
			ruleset.NewRule(ruleset.Invalid, ruleset.Counter{}, ruleset.Verdict{Kind: ruleset.Drop}).WithComment(fmt.Sprint("namespace/pod-", n)),
			ruleset.NewRule(ruleset.Address(ruleset.IPSaddr, benchAddr(n)), ruleset.Verdict{Kind: ruleset.Accept}),
		}}
		for i := range 3 {
			c.Rules = append(c.Rules, ruleset.NewRule(ruleset.To(ruleset.Jump, fmt.Sprint("pi_", (n+i)%benchPolicies))).WithComment(fmt.Sprint("namespace/policy-", i)))
		}
		c.Rules = append(c.Rules, ruleset.NewRule(ruleset.Counter{}, ruleset.Verdict{Kind: ruleset.Drop}))
		t.Chains[c.Name] = c
		t.Sets[dir+"4"].Elements[ruleset.AddrElem(benchAddr(n))] = ruleset.Verdict{Kind: ruleset.Goto, Chain: c.Name}
	}
}

// benchTable is what a node with many pods has, in the form that podwall renders.
func benchTable() *ruleset.Table {
	t := ruleset.NewTable(inet)
	for _, dir := range []string{"eg", "in"} {
		t.Sets[dir+"4"] = &ruleset.Set{Name: dir + "4", Key: []ruleset.KeyType{ruleset.IPv4Addr}, Map: true, Elements: map[ruleset.Elem]ruleset.Verdict{}}
	}
	for p := range benchPolicies {
		s := &ruleset.Set{Name: fmt.Sprint("p4_", p), Key: []ruleset.KeyType{ruleset.IPv4Addr}, Comment: "namespace: app=peer", Elements: map[ruleset.Elem]ruleset.Verdict{}}
		for i := range benchPeers / benchPolicies {
			s.Elements[ruleset.AddrElem(benchAddr(1<<16+p*benchPeers/benchPolicies+i))] = ruleset.Verdict{}
		}
		t.Sets[s.Name] = s
		c := benchPolicy(p, 8080)
		t.Chains[c.Name] = c
	}
	for n := range benchPods {
		benchPod(t, n)
	}
	for dir, field := range map[string]ruleset.Field{"eg": ruleset.IPSaddr, "in": ruleset.IPDaddr} {
		c := base(dir, "forward", "", map[string]int{"eg": -1, "in": 0}[dir], ruleset.NewRule(ruleset.Dispatch{Fields: []ruleset.Field{field}, Map: dir + "4"}))
		t.Chains[c.Name] = c
	}
	return t
}

// BenchmarkCommit is what transactions cost on a loaded table; each is done and undone, which counts as two.
func BenchmarkCommit(b *testing.B) {
	loaded := benchTable()
	with := func(change func(*ruleset.Table)) ruleset.Ruleset {
		t := benchTable()
		change(t)
		return ruleset.Ruleset{t}
	}
	for name, to := range map[string]ruleset.Ruleset{
		"element": with(func(t *ruleset.Table) {
			t.Sets["p4_0"].Elements[ruleset.AddrElem(benchAddr(1<<20))] = ruleset.Verdict{}
		}),
		"pod":    with(func(t *ruleset.Table) { benchPod(t, benchPods) }),
		"policy": with(func(t *ruleset.Table) { t.Chains["pi_0"] = benchPolicy(0, 8081) }),
		"all":    nil,
	} {
		b.Run(name, func(b *testing.B) {
			n := newNode(b)
			n.mustCommit(b, nil, ruleset.Ruleset{loaded})
			there, back := ruleset.Diff(ruleset.Ruleset{loaded}, to), ruleset.Diff(to, ruleset.Ruleset{loaded})
			b.ReportAllocs()
			for b.Loop() {
				if err := n.Commit(b.Context(), there); err != nil {
					b.Fatal(err)
				}
				if err := n.Commit(b.Context(), back); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
