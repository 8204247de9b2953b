package policy

import (
	"net/netip"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// TestChangedPolicyKeepsPods holds that a policy that changes its rules, and not whom it isolates, changes its own chain and no pod's.
func TestChangedPolicyKeepsPods(t *testing.T) {
	t.Parallel()
	e := NewEngine(Options{Table: "podwall", Cut: true})
	apply := func(o cluster.Object) { e.Apply(cluster.Change{Key: o.Key(), Object: o}) }
	policy := func(name, friend string) *cluster.Policy {
		return &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{
			From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": friend}}}},
		}}}}
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
	for _, op := range d.Apply {
		if op.Chain != nil && !strings.HasPrefix(op.Chain.Name, prefixPolicyI) {
			t.Errorf("it changes %s", op)
		}
	}
	if len(d.Apply) == 0 {
		t.Error("it changes nothing")
	}
	e.Commit()
	if diff := ruleset.Diff(e.Ruleset(), Render(in).Ruleset); !diff.Empty() {
		t.Errorf("it is not what Render makes: %v", operations(diff))
	}
}
