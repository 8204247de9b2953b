package kernel

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/generate"
	"github.com/podwall/podwall/tests/oracle/layout"
	"github.com/podwall/podwall/tests/oracle/subject"
)

// The tests of this file switch a defect on, and fail when the others would not have seen it.

// most is how many random cases a control may take to show its defect; one in a few does.
const most = 300

// Without podwall's table, what the oracle denies arrives.
func TestControlNoTable(t *testing.T) {
	n := newNode(t)
	r := newReport(seed())
	for i := range uint64(20) {
		check(t, r.seed+i, func(rt *rapid.T) {
			c := generate.Cluster(rt)
			r.clusters++
			_ = n.compare(rt, c, generate.Conns(c), r) // what it says is expected
		})
	}
	r.log(t, n, "control, no table")
	if denied := r.all.verdicts - r.all.allowed; r.all.mismatches == 0 || r.all.mismatches != denied {
		t.Errorf("%d mismatches, %d verdicts of the oracle are denials; want every denial to mismatch", r.all.mismatches, denied)
	}
}

// A second writer removes one rule of one policy's chain: verdicts change, and reading back shows it.
func TestControlRuleRemoved(t *testing.T) {
	n := newNode(t)
	other := newKernel(t, n.Bed)
	r := newReport(seed())
	removed, seen := 0, 0
	for i := uint64(0); removed < most && seen < 10; i++ {
		check(t, r.seed+i, func(rt *rapid.T) {
			c := generate.Cluster(rt)
			r.clusters++
			n.load(rt, subject.Render(c).Ruleset)
			conns := generate.Conns(c)
			for name, chain := range n.loaded.Table(tables[0]).Chains {
				if !strings.HasPrefix(name, "pi_") && !strings.HasPrefix(name, "ep_") {
					continue
				}
				removed++
				hole := without(n.loaded, tables[0], chain)
				if err := other.Commit(t.Context(), ruleset.Diff(n.loaded, hole)); err != nil {
					rt.Fatal(err)
				}
				if got, err := n.kernel.Read(t.Context(), tables...); err != nil || ruleset.Diff(got, n.loaded).Empty() {
					rt.Fatalf("the rule removed from chain %s is not missed when the table is read back (%v)", name, err)
				}
				if n.compare(rt, c, conns, r) != "" {
					seen++
				}
				if err := other.Commit(t.Context(), ruleset.Diff(hole, n.loaded)); err != nil {
					rt.Fatal(err)
				}
			}
		})
	}
	fmt.Printf("control, rule removed: %d of %d removals seen by packets, all by reading back\n", seen, removed)
	if seen < 10 {
		t.Errorf("%d of %d removed rules were seen; want 10", seen, removed)
	}
}

// without returns the ruleset without the first rule of a chain.
func without(rs ruleset.Ruleset, id ruleset.TableID, chain *ruleset.Chain) ruleset.Ruleset {
	table := *rs.Table(id)
	table.Chains = maps.Clone(table.Chains)
	table.Chains[chain.Name] = &ruleset.Chain{Name: chain.Name, Rules: chain.Rules[1:]}
	changed := slices.Clone(rs)
	changed[slices.Index(rs, rs.Table(id))] = &table
	return changed
}

// A table that is deleted and loaded anew is open in between.
func TestControlReload(t *testing.T) {
	n := newNode(t)
	s := &stream{commit: rendered(func(ctx context.Context, rs ruleset.Ruleset) error {
		err := n.diff(ctx, nil)
		return errors.Join(err, n.diff(ctx, rs))
	})}
	n.violate(t, s)
	fmt.Println("control, reload\n" + s.String())
	if s.leaked == 0 {
		t.Error("nothing leaked while there was no table")
	}
}

// A rule that drops more than it should is there for the time of an update only.
func TestControlClosedMeanwhile(t *testing.T) {
	n := newNode(t)
	table := ruleset.NewTable(ruleset.TableID{Family: ruleset.Inet, Name: "closed"})
	table.Chains["closed"] = &ruleset.Chain{Name: "closed", Hook: &ruleset.Hook{Name: "forward"}, Rules: []ruleset.Rule{
		ruleset.NewRule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoSCTP), ruleset.Verdict{Kind: ruleset.Drop}),
	}}
	s := &stream{commit: rendered(func(ctx context.Context, rs ruleset.Ruleset) error {
		err := n.diff(ctx, append(slices.Clone(n.loaded), table))
		return errors.Join(err, n.diff(ctx, rs))
	})}
	n.violate(t, s)
	fmt.Println("control, SCTP dropped meanwhile\n" + s.String())
	if s.lost == 0 || s.leaked > 0 {
		t.Errorf("%d lost, %d leaked; want some and none", s.lost, s.leaked)
	}
}

// An interval set denies what is in it for a moment after it was loaded, so that ruleset.Diff loads it in a transaction before
// that of its rules (Linux 6.18; rbtree sets publish their elements after the rules). With one transaction for both, packets
// are lost.
func TestControlIntervalsWithTheirRules(t *testing.T) {
	for _, together := range []bool{false, true} {
		n := newNode(t)
		s := &stream{commit: rendered(n.diff)}
		if together {
			s.commit = rendered(func(ctx context.Context, rs ruleset.Ruleset) error {
				d := ruleset.Diff(n.loaded, rs)
				d.Apply, d.Prepare = slices.Concat(d.Prepare, d.Apply), nil
				n.loaded = rs
				return n.kernel.Commit(ctx, d)
			})
		}
		c := manyBlocks(0)
		conns := generate.Conns(c)
		allowed := slices.Repeat([]bool{true}, len(conns))
		if i := slices.IndexFunc(conns, func(conn oracle.Conn) bool { return !c.Allowed(conn) }); i >= 0 {
			t.Fatalf("the oracle denies %+v", conns[i])
		}
		n.load(t, subject.Render(c).Ruleset)
		if !slices.ContainsFunc(slices.Collect(maps.Values(n.loaded.Table(tables[0]).Sets)), func(s *ruleset.Set) bool { return s.Interval }) {
			t.Fatal("there is no interval set in the ruleset")
		}
		for i := 0; i < most && s.lost == 0; i++ {
			next := manyBlocks(i + 1)
			_ = n.during(t, s, conns, allowed, []policy.Input{subject.Input(next, subject.Model(next))}) // counted
		}
		fmt.Printf("control, intervals in one transaction with their rules: %v\n%s\n", together, s)
		if lost := s.lost > 0; lost != together || s.leaked > 0 {
			t.Errorf("one transaction %v: %d lost, %d leaked", together, s.lost, s.leaked)
		}
	}
}

// manyBlocks is a pod that lets everybody in but some addresses that never send, others for each i.
func manyBlocks(i int) *oracle.Cluster {
	place := layout.Places[0]
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "pod"}, Spec: corev1.PodSpec{NodeName: layout.NodeName}}
	v4, v6 := &networkingv1.IPBlock{CIDR: "0.0.0.0/0"}, &networkingv1.IPBlock{CIDR: "::/0"}
	for k := range 50 {
		v4.Except = append(v4.Except, fmt.Sprintf("203.0.%d.%d/32", i%250, 2*k))
		v6.Except = append(v6.Except, fmt.Sprintf("2001:db8:1:%x::%x/128", i, 2*k))
	}
	return &oracle.Cluster{
		Node: layout.NodeName, Pods: []*corev1.Pod{pod},
		Sandboxes: []oracle.Sandbox{{Namespace: "a", Name: "pod", IPs: place.IPs}},
		Policies: []*networkingv1.NetworkPolicy{{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "blocks"}, Spec: networkingv1.NetworkPolicySpec{
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{IPBlock: v4}, {IPBlock: v6}}}},
		}}},
	}
}

// violate makes changes until the stream has seen enough go wrong.
func (n *testNode) violate(t *testing.T, s *stream) {
	t.Helper()
	start := seed()
	for i := uint64(0); s.steps < most && s.leaked+s.lost < 100; i++ {
		check(t, start+i, func(rt *rapid.T) {
			c := generate.Cluster(rt)
			n.load(rt, subject.Render(c).Ruleset)
			for range 5 {
				next, _ := generate.Change(rt, c)
				_ = n.step(rt, s, c, next) // what it says is expected
				c = next
			}
		})
	}
}
