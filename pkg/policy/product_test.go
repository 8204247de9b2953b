package policy

import (
	"fmt"
	"net/netip"
	"strings"
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
	var ports []networkingv1.NetworkPolicyPort
	var peers []networkingv1.NetworkPolicyPeer
	for i := range n {
		from, to := intstr.FromInt32(int32(1000+10*i)), int32(1000+10*i+3) //nolint:gosec // small
		ports = append(ports, networkingv1.NetworkPolicyPort{Port: &from, EndPort: &to})
		peers = append(peers, networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint(i)}}})
		pod := &cluster.Pod{Namespace: "ns", Name: fmt.Sprint("peer", i), Labels: map[string]string{"app": fmt.Sprint(i)}, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 9, 0, byte(i)})}}
		in.Model.Apply(cluster.Change{Key: pod.Key(), Object: pod})
	}
	p := &cluster.Policy{Namespace: "ns", Name: "large", Spec: networkingv1.NetworkPolicySpec{
		Ingress: []networkingv1.NetworkPolicyIngressRule{{Ports: ports, From: peers}},
		Egress:  []networkingv1.NetworkPolicyEgressRule{{Ports: ports, To: peers}},
	}}
	in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
	rs := Render(in).Ruleset
	rules := 0
	for _, c := range rs[0].Chains {
		rules += len(c.Rules)
	}
	if rules > 6*n {
		t.Errorf("%d ports and %d peers, in both directions, became %d rules", n, n, rules)
	}
	for _, tt := range []struct {
		peer string
		port uint16
		want ruleset.VerdictKind
	}{
		{"10.9.0.0", 1000, ruleset.Accept},
		{"10.9.0.199", 2993, ruleset.Accept},
		{"10.9.0.7", 1504, ruleset.Drop},
		{"10.9.0.7", 999, ruleset.Drop},
		{"10.9.0.200", 1000, ruleset.Drop},
	} {
		peer := netip.MustParseAddr(tt.peer)
		for _, packet := range []ruleset.Packet{{Src: peer, Dst: own4}, {Src: own4, Dst: peer}} {
			packet.Proto, packet.Sport, packet.Dport, packet.CT = ruleset.ProtoTCP, 1, tt.port, ruleset.New
			r, err := rs.Trace("forward", packet)
			if err != nil || r.Verdict != tt.want {
				t.Errorf("%s to %s port %d: verdict %v, want %v (%v)", packet.Src, packet.Dst, tt.port, r.Verdict, tt.want, err)
			}
		}
	}
}

// product is a policy with so many port ranges, from a port on, and so many addresses of one /24.
func product(name string, ports int, first int32, addresses int, third int) *cluster.Policy {
	rule := networkingv1.NetworkPolicyIngressRule{}
	for i := range int32(ports) { //nolint:gosec // small
		from, to := intstr.FromInt32(first+10*i), first+10*i+3
		rule.Ports = append(rule.Ports, networkingv1.NetworkPolicyPort{Port: &from, EndPort: &to})
	}
	for i := range addresses {
		rule.From = append(rule.From, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("20.0.%d.%d/32", third, 2*i)}})
	}
	return &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{rule}}}
}

// TestProductOrSum holds from which size on the ports of a rule are looked up in a set of ranges.
func TestProductOrSum(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ ports, addresses, sets int }{{4, 8, 0}, {3, 11, 1}, {11, 3, 1}, {40, 1, 1}, {1, 16, 0}, {2, 16, 0}} {
		in := linkInput("", false, false)
		p := product("p", tt.ports, 100, tt.addresses, 0)
		in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
		sets := 0
		for name := range Render(in).Ruleset[0].Sets {
			if strings.HasPrefix(name, setPortRanges) {
				sets++
			}
		}
		if sets != tt.sets {
			t.Errorf("%d ports and %d peers make %d sets of port ranges, want %d", tt.ports, tt.addresses, sets, tt.sets)
		}
	}
}

// TestPortRangesApart holds that rules with other ports do not share a set of them.
func TestPortRangesApart(t *testing.T) {
	t.Parallel()
	in := linkInput("", false, false)
	for _, p := range []*cluster.Policy{product("a", 5, 1000, 8, 1), product("b", 5, 2000, 8, 2)} {
		in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
	}
	rs := Render(in).Ruleset
	for from, port := range map[string]uint16{"20.0.1.0": 1000, "20.0.2.14": 2043} {
		for _, dport := range []uint16{1000, 2043} {
			r, err := rs.Trace("forward", ruleset.Packet{
				Src: netip.MustParseAddr(from), Dst: own4, Proto: ruleset.ProtoTCP, Sport: 1, Dport: dport, CT: ruleset.New,
			})
			if want := dport == port; err != nil || (r.Verdict == ruleset.Accept) != want {
				t.Errorf("%s to port %d: accepted %v, want %v (%v)", from, dport, r.Verdict == ruleset.Accept, want, err)
			}
		}
	}
}
