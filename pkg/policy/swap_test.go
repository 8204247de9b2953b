package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// TestChangedPolicyKeepsPods holds that a policy that changes its rules, and not whom it isolates, changes its own chain, or that of the set of
// policies that its pods are under, and no pod's.
func TestChangedPolicyKeepsPods(t *testing.T) {
	t.Parallel()
	e := NewEngine(Options{Table: "podwall", Cut: true})
	apply := func(o cluster.Object) { e.Apply(cluster.Change{Key: o.Key(), Object: o}) }
	policy := func(name, friend string) *cluster.Policy {
		peers := []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": friend}}}}
		return &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: peers}}, Egress: []networkingv1.NetworkPolicyEgressRule{{To: peers}},
		}}
	}
	in := Input{Model: e.Model(), Options: e.options}
	for i, name := range []string{"a", "b"} {
		p := &cluster.Pod{Namespace: "ns", Name: name, Labels: map[string]string{"app": name}, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}}
		apply(p)
		in.Endpoints = append(in.Endpoints, Endpoint{ID: name, Name: "ns/" + name, Pod: p, IPs: p.IPs, Link: "veth-" + name})
	}
	apply(policy("first", "a"))
	apply(policy("second", "a"))
	e.SetEndpoints(in.Endpoints)
	e.Delta()
	e.Commit()

	apply(policy("first", "b"))
	d := e.Delta()
	var changed []string
	for _, op := range d.Apply {
		if op.Chain != nil && !strings.HasPrefix(op.Chain.Name, prefixPolicyI) && !strings.HasPrefix(op.Chain.Name, prefixProfile) {
			t.Errorf("it changes %s", op)
		}
		if op.Kind == ruleset.FlushChain {
			changed = append(changed, op.Chain.Name[:3])
		}
	}
	if slices.Sort(changed); !slices.Equal(changed, []string{prefixProfile, prefixPolicyI}) {
		t.Errorf("it changes chains %v, want one of each kind", changed)
	}
	e.Commit()
	if diff := ruleset.Diff(e.Ruleset(), Render(in).Ruleset); !diff.Empty() {
		t.Errorf("it is not what Render makes: %v", operations(diff))
	}
}

// TestProfiles holds that pods under the same egress policies share a chain, that policies without rules make no difference to it, and that a pod
// that is under no policy with rules needs none.
func TestProfiles(t *testing.T) {
	t.Parallel()
	e := NewEngine(Options{Table: "podwall", Cut: true})
	apply := func(o cluster.Object) { e.Apply(cluster.Change{Key: o.Key(), Object: o}) }
	egress := func(name, app string, rules ...networkingv1.NetworkPolicyEgressRule) *cluster.Policy {
		return &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}, PolicyTypes: []networkingv1.PolicyType{"Egress"}, Egress: rules,
		}}
	}
	in := Input{Model: e.Model(), Options: e.options}
	for i, app := range []string{"web", "web", "db", "mute"} {
		name := string(rune('a' + i))
		p := &cluster.Pod{Namespace: "ns", Name: name, Labels: map[string]string{"app": app}, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}}
		apply(p)
		in.Endpoints = append(in.Endpoints, Endpoint{ID: name, Name: "ns/" + name, Pod: p, IPs: p.IPs, Link: "veth-" + name})
	}
	anywhere := networkingv1.NetworkPolicyEgressRule{}
	for _, p := range []*cluster.Policy{egress("w1", "web", anywhere), egress("w2", "web", anywhere), egress("d1", "db", anywhere), egress("m", "mute")} {
		apply(p)
	}
	e.SetEndpoints(in.Endpoints)
	next := func(id string) string {
		rules := e.Ruleset()[0].Chains[prefixEgress+id].Rules
		return rules[len(rules)-1].String()
	}
	check := func(when string) {
		t.Helper()
		e.Delta()
		e.Commit()
		if next("a") != next("b") || next("a") == next("c") || next("d") != "goto unsent" {
			t.Errorf("%s: chains %q, %q, %q, %q", when, next("a"), next("b"), next("c"), next("d"))
		}
		profiles := 0
		for name := range e.Ruleset()[0].Chains {
			if strings.HasPrefix(name, prefixProfile) {
				profiles++
			}
		}
		if profiles != 2 || len(e.profiles) != 2 {
			t.Errorf("%s: %d chains of sets of policies, the engine knows %d, want 2", when, profiles, len(e.profiles))
		}
		if diff := ruleset.Diff(e.Ruleset(), Render(in).Ruleset); !diff.Empty() {
			t.Errorf("%s: it is not what Render makes: %v", when, operations(diff))
		}
	}
	check("at first")
	before := next("a")
	apply(egress("w3", "web"))
	if check("with a policy that has no rules"); next("a") != before {
		t.Errorf("a policy without rules makes %q of %q", next("a"), before)
	}
	apply(egress("w3", "web", anywhere))
	if check("when it has got one"); next("a") == before {
		t.Error("a policy that has got a rule changes nothing")
	}
	apply(egress("w3", "db", anywhere))
	if check("when it selects others"); next("a") != before {
		t.Errorf("without the policy it is %q, not %q", next("a"), before)
	}
}

// TestLargeProfiles holds that the rules of large policies are not copied to each set of policies that they are in, however many there are, that the
// kernel can follow the chains, and that they mean what they say.
func TestLargeProfiles(t *testing.T) {
	t.Parallel()
	const pods, large = 20, mostGotos + 4
	e := NewEngine(Options{Table: "podwall", Cut: true, Log: true})
	apply := func(o cluster.Object) { e.Apply(cluster.Change{Key: o.Key(), Object: o}) }
	to := func(name, app string, third, rules int) *cluster.Policy {
		p := &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Egress"}}}
		if app != "" {
			p.Spec.PodSelector.MatchLabels = map[string]string{"app": app}
		}
		for i := range rules {
			cidr := netip.PrefixFrom(netip.AddrFrom4([4]byte{20, byte(third), byte(i / 256), byte(i)}), 32).String()
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: cidr}}}})
		}
		return p
	}
	in := Input{Model: e.Model(), Options: e.options}
	for i := range pods {
		name := "pod" + string(rune('a'+i))
		p := &cluster.Pod{Namespace: "ns", Name: name, Labels: map[string]string{"app": name}, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}}
		apply(p)
		in.Endpoints = append(in.Endpoints, Endpoint{ID: name, Name: "ns/" + name, Pod: p, IPs: p.IPs, Link: "veth-" + name})
		apply(to("own-"+name, name, 100+i, 1))
	}
	e.SetEndpoints(in.Endpoints)
	step := func(what string, most int) {
		t.Helper()
		e.Delta()
		e.Commit()
		rs := e.Ruleset()
		if diff := ruleset.Diff(rs, Render(in).Ruleset); !diff.Empty() {
			t.Fatalf("%s: it is not what Render makes: %v", what, operations(diff))
		}
		rules := 0
		for name, c := range rs[0].Chains {
			if strings.HasPrefix(name, prefixProfile) {
				rules += len(c.Rules)
			}
		}
		if rules > most {
			t.Errorf("%s: %d egress rules, want %d at most", what, rules, most)
		}
		for i := range pods {
			for dst, want := range map[string]ruleset.VerdictKind{
				fmt.Sprintf("20.%d.0.0", 100+i): ruleset.Accept, fmt.Sprintf("20.%d.0.0", 101+i): ruleset.Drop, "20.1.0.99": ruleset.Accept, "20.1.0.199": ruleset.Drop,
			} {
				p := ruleset.Packet{Src: in.Endpoints[i].IPs[0], Dst: netip.MustParseAddr(dst), Proto: ruleset.ProtoTCP, Sport: 1, Dport: 80, TCPFlags: ruleset.SYN, CT: ruleset.New}
				if r, err := rs.Trace("forward", p); err != nil || r.Verdict != want {
					t.Errorf("%s: %s to %s: %v, want %v (%v)", what, p.Src, dst, r.Verdict, want, err)
				}
			}
		}
	}
	// 2 rules for each pod: its own, and the one that goes on.
	apply(to("all", "", 1, 100))
	step("one for all pods", 2*pods+101)
	apply(to("all", "", 1, mostInline))
	apply(to("some", "", 1, 100))
	step("which has become small, and another", pods*(2+mostInline)+101)
	apply(to("all", "", 1, 101))
	before := 0
	for i := range large {
		apply(to(fmt.Sprint("large-", i), "poda", 2, 60+i))
		before += 61 + i
	}
	step("and many for one pod", 2*pods+102+101+before)
}
