package kernel

import (
	"context"
	"fmt"
	"slices"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

// TestOpening holds that a pod that was closed, and is opened isolated, gets and sends nothing on the way: a packet that is under way while both
// its chain and the element that leads there are committed finds the new element, and the chain as it was when the packet came (empty). The longer
// the sender's own chain, the more of them there are.
//
// Control: the same transitions, with the receiver's chain entered by goto, without the rules behind it, and in one transaction.
func TestOpening(t *testing.T) {
	const openings = 150
	options := policy.Options{Table: "podwall", Log: true}
	for _, side := range []string{"receiver", "receiver without a link", "sender"} {
		t.Run(side, func(t *testing.T) {
			n := newNode(t)
			in := policy.Input{Model: cluster.NewModel(), Options: options}
			add := func(o cluster.Object) { in.Model.Apply(cluster.Change{Key: o.Key(), Object: o}) }
			for i, app := range []string{"sender", "receiver"} {
				at := layout.Places[i]
				p := &cluster.Pod{Namespace: "ns", Name: app, Labels: map[string]string{"app": app}, IPs: at.IPs}
				add(p)
				in.Endpoints = append(in.Endpoints, policy.Endpoint{ID: app, Name: "ns/" + app, Pod: p, IPs: at.IPs, Link: at.Link})
			}
			put := func(app string, spec networkingv1.NetworkPolicySpec) {
				spec.PodSelector = metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
				add(&cluster.Policy{Namespace: "ns", Name: app, Spec: spec})
			}
			closed := in
			closed.Endpoints = slices.Clone(in.Endpoints)
			if side == "sender" {
				put("sender", networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Egress"}})
				closed.Endpoints[0].Pod = nil
			} else {
				if side != "receiver" {
					in.Endpoints[1].Link, closed.Endpoints[1].Link = "", ""
				}
				closed.Endpoints[1].Pod = nil
				put("receiver", networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Ingress"}})
				long := networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Egress"}}
				for i := range 1000 {
					cidr := fmt.Sprintf("77.%d.%d.0/25", i/256, i%256)
					long.Egress = append(long.Egress, networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: cidr}}}})
				}
				long.Egress = append(long.Egress, networkingv1.NetworkPolicyEgressRule{})
				put("sender", long)
			}
			c := oracle.Conn{Src: layout.Places[0].IPs[0], Dst: layout.Places[1].IPs[0], Protocol: oracle.UDP, Port: 80}
			conns := slices.Repeat([]oracle.Conn{c}, 64)
			allowed := make([]bool, len(conns))
			opened := func(wrong bool) *stream {
				states := []ruleset.Ruleset{policy.Render(in).Ruleset, policy.Render(closed).Ruleset}
				if wrong {
					careless(states[0])
					careless(states[1])
				}
				s := &stream{}
				for i := range 2*openings + 1 {
					next := states[(i+1)%2] // closed at first
					s.commit = func(ctx context.Context, _ policy.Input) error {
						d := ruleset.Diff(n.loaded, next)
						if wrong {
							d = ruleset.Delta{Apply: slices.Concat(d.Prepare, d.Apply), Cleanup: d.Cleanup}
						}
						n.loaded = next
						return n.kernel.Commit(ctx, d)
					}
					if i == 0 {
						if err := s.commit(t.Context(), policy.Input{}); err != nil {
							t.Fatal(err)
						}
						continue
					}
					n.during(t, s, conns, allowed, []policy.Input{{}})
				}
				return s
			}
			if s := opened(false); s.leaked > 0 {
				t.Errorf("%d openings and closings: %s", openings, s)
			} else {
				fmt.Printf("%s, %d openings and closings: %s\n", side, openings, s)
			}
			control := opened(true)
			fmt.Printf("%s, control, without care for packets under way: %s\n", side, control)
			if control.leaked == 0 && side != "sender" { // whose window is the few rules before it is looked up
				t.Error("the control lets nothing pass: the test would not see it")
			}
		})
	}
}

// careless takes away what keeps a receiver closed whose chain has no rules yet.
func careless(rs ruleset.Ruleset) {
	for _, table := range rs {
		for _, name := range []string{"in4", "in6"} {
			if m := table.Sets[name]; m != nil {
				for e, v := range m.Elements {
					m.Elements[e] = ruleset.To(ruleset.Goto, v.Chain)
				}
			}
		}
		if c := table.Chains["forward"]; c != nil {
			c.Rules = c.Rules[:slices.IndexFunc(c.Rules, func(r ruleset.Rule) bool { return r.String() == "ip6 daddr vmap @in6" })+1]
		}
	}
}
