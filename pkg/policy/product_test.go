package policy

import (
	"fmt"
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// TestManyPortsAndPeers holds that a rule costs as many rules as it has ports and peers together, and means what it says.
func TestManyPortsAndPeers(t *testing.T) {
	t.Parallel()
	const n = 200
	in := linkInput("", false, false)
	p := &cluster.Policy{Namespace: "ns", Name: "large", Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Ingress"}}}
	rule := networkingv1.NetworkPolicyIngressRule{}
	for i := range n {
		from, to := intstr.FromInt32(int32(1000+10*i)), int32(1000+10*i+3) //nolint:gosec // small
		rule.Ports = append(rule.Ports, networkingv1.NetworkPolicyPort{Port: &from, EndPort: &to})
		rule.From = append(rule.From, networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint(i)}}})
		pod := &cluster.Pod{Namespace: "ns", Name: fmt.Sprint("peer", i), Labels: map[string]string{"app": fmt.Sprint(i)}, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 9, 0, byte(i)})}}
		in.Model.Apply(cluster.Change{Key: pod.Key(), Object: pod})
	}
	p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{rule}
	in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
	rs := Render(in).Ruleset
	rules := 0
	for _, c := range rs[0].Chains {
		rules += len(c.Rules)
	}
	if rules > 4*n {
		t.Errorf("%d ports and %d peers became %d rules", n, n, rules)
	}
	for _, tt := range []struct {
		from string
		port uint16
		want ruleset.VerdictKind
	}{
		{"10.9.0.0", 1000, ruleset.Accept},
		{"10.9.0.199", 2993, ruleset.Accept},
		{"10.9.0.7", 1504, ruleset.Drop},
		{"10.9.0.200", 1000, ruleset.Drop},
	} {
		r, err := rs.Trace("forward", ruleset.Packet{
			Src: netip.MustParseAddr(tt.from), Dst: own4, Proto: ruleset.ProtoTCP, Sport: 1, Dport: tt.port, CT: ruleset.New,
		})
		if err != nil || r.Verdict != tt.want {
			t.Errorf("%s to port %d: verdict %v, want %v (%v)", tt.from, tt.port, r.Verdict, tt.want, err)
		}
	}
}
