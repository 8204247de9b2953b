package kernel

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

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
// What is before the look for the sender is made as long as that for this test: else its window is too short for any control.
//
// Control: the same transitions, with the receiver's chain entered by goto, without the rules behind it, and in one transaction. How many it takes until
// a packet passes depends on what else the machine does; as many have to pass nothing without the defect.
func TestOpening(t *testing.T) {
	const least, most, sender = 150, time.Minute, "sender without a link"
	options := policy.Options{Table: "podwall", Log: true}
	for _, side := range []string{"receiver", "receiver without a link", sender} {
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
			if side == sender {
				// With a link its own chain would be in front, and that is one packet's way later.
				in.Endpoints[0].Link, closed.Endpoints[0].Link = "", ""
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
			// opened does so many openings, and goes on until a packet has passed if it is the control.
			opened := func(wrong bool, openings int) (*stream, int) {
				states := []ruleset.Ruleset{policy.Render(in).Ruleset, policy.Render(closed).Ruleset}
				for _, rs := range states {
					if side == sender {
						lengthen(rs)
					}
					if wrong {
						careless(rs)
					}
				}
				s := &stream{}
				done := 0
				for begin := time.Now(); done < 2*openings+1 || wrong && s.leaked == 0 && time.Since(begin) < most; done++ {
					next := states[(done+1)%2] // closed at first
					s.commit = func(ctx context.Context, _ policy.Input) error {
						d := ruleset.Diff(n.loaded, next)
						if wrong {
							d = ruleset.Delta{Apply: slices.Concat(d.Prepare, d.Apply), Cleanup: d.Cleanup}
						}
						n.loaded = next
						return n.kernel.Commit(ctx, d)
					}
					if done == 0 {
						if err := s.commit(t.Context(), policy.Input{}); err != nil {
							t.Fatal(err)
						}
						continue
					}
					n.during(t, s, conns, allowed, []policy.Input{{}})
				}
				return s, done / 2
			}
			control, openings := opened(true, least)
			fmt.Printf("%s, control, without care for packets under way, %d openings and closings: %s\n", side, openings, control)
			if control.leaked == 0 {
				t.Error("the control lets nothing pass: the test would not see it")
			}
			s, _ := opened(false, openings)
			fmt.Printf("%s, %d openings and closings: %s\n", side, openings, s)
			if s.leaked > 0 {
				t.Errorf("%d packets passed", s.leaked)
			}
		})
	}
}

// lengthen puts rules that match nothing before the sender is looked up.
func lengthen(rs ruleset.Ruleset) {
	for _, table := range rs {
		c := table.Chains["forward"]
		if c == nil {
			continue
		}
		var rules []ruleset.Rule
		for i := range 1000 {
			nobody := netip.PrefixFrom(netip.AddrFrom4([4]byte{77, byte(i / 256), byte(i)}), 25)
			rules = append(rules, ruleset.NewRule(ruleset.Prefix{Field: ruleset.IPDaddr, Prefix: nobody}, ruleset.Verdict{Kind: ruleset.Drop}))
		}
		at := slices.IndexFunc(c.Rules, func(r ruleset.Rule) bool { return r.String() == "ip saddr vmap @eg4" })
		c.Rules = slices.Insert(c.Rules, at, rules...)
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
