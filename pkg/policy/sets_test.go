package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// TestManyRanges holds that the ranges of an ipBlock mean the same as rules and, from the seventeenth on, as interval sets.
func TestManyRanges(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ four, six, sets int }{
		{16, 0, 0}, {17, 0, 1}, {0, 16, 0}, {0, 17, 1}, {8, 8, 0}, {8, 9, 2}, {17, 1, 2},
	} {
		t.Run(fmt.Sprintf("%d IPv4 and %d IPv6", tt.four, tt.six), func(t *testing.T) {
			t.Parallel()
			// Every range is one address that is excepted short of a /30, so none is a prefix but the last.
			var peers []networkingv1.NetworkPolicyPeer
			add := func(cidr, except string) {
				b := &networkingv1.IPBlock{CIDR: cidr}
				if except != "" {
					b.Except = []string{except}
				}
				peers = append(peers, networkingv1.NetworkPolicyPeer{IPBlock: b})
			}
			for i := range tt.four {
				add(fmt.Sprintf("20.0.%d.4/30", i), fmt.Sprintf("20.0.%d.4/32", i))
			}
			for i := range tt.six {
				add(fmt.Sprintf("2001:db8:%x::4/126", i), fmt.Sprintf("2001:db8:%x::4/128", i))
			}
			in := linkInput("", false, false)
			p := &cluster.Policy{Namespace: "ns", Name: "many", Spec: networkingv1.NetworkPolicySpec{
				Ingress: []networkingv1.NetworkPolicyIngressRule{{From: peers}},
			}}
			in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
			rs := Render(in).Ruleset
			if got := count(rs, setBlocks); got != tt.sets {
				t.Errorf("%d interval sets, want %d", got, tt.sets)
			}
			for i := range tt.four {
				for last, want := range map[int]bool{3: false, 4: false, 5: true, 6: true, 7: true, 8: false} {
					expect(t, rs, fmt.Sprintf("20.0.%d.%d", i, last), own4, want)
				}
			}
			for i := range tt.six {
				for last, want := range map[int]bool{3: false, 4: false, 5: true, 6: true, 7: true, 8: false} {
					expect(t, rs, fmt.Sprintf("2001:db8:%x::%d", i, last), own6, want)
				}
			}
		})
	}
}

// TestRangeSetsApart holds that blocks which begin alike do not share a set.
func TestRangeSetsApart(t *testing.T) {
	t.Parallel()
	in := linkInput("", false, false)
	in.Endpoints[0].Pod.Labels = map[string]string{"app": "x"}
	for i, name := range []string{"a", "b"} {
		var peers []networkingv1.NetworkPolicyPeer
		for n := range 17 {
			third := n
			if n == 16 {
				third += i
			}
			peers = append(peers, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("20.0.%d.1/32", 2*third)}})
		}
		p := &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: peers}},
		}}
		in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
	}
	rs := Render(in).Ruleset
	expect(t, rs, "20.0.32.1", own4, true)
	expect(t, rs, "20.0.34.1", own4, true)
	expect(t, rs, "20.0.36.1", own4, false)
}

// TestPortSet holds from how many single ports on a rule uses a set.
func TestPortSet(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]int{2: 0, 3: 1, 4: 1} {
		in := linkInput("", false, false)
		var ports []networkingv1.NetworkPolicyPort
		for i := range n {
			ports = append(ports, networkingv1.NetworkPolicyPort{Port: new(intstr.FromInt32(int32(10 * (i + 1))))})
		}
		p := &cluster.Policy{Namespace: "ns", Name: "ports", Spec: networkingv1.NetworkPolicySpec{
			Ingress: []networkingv1.NetworkPolicyIngressRule{{Ports: ports}},
		}}
		in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
		if got := count(Render(in).Ruleset, setPorts); got != want {
			t.Errorf("%d ports make %d sets, want %d", n, got, want)
		}
	}
}

// count returns how many sets have a name that begins like this.
func count(rs ruleset.Ruleset, prefix string) int {
	n := 0
	for name := range rs[0].Sets {
		if strings.HasPrefix(name, prefix) {
			n++
		}
	}
	return n
}

func expect(t *testing.T, rs ruleset.Ruleset, src string, dst netip.Addr, want bool) {
	t.Helper()
	r, err := rs.Trace("forward", ruleset.Packet{
		IIFName: "eth0", Src: netip.MustParseAddr(src), Dst: dst, Proto: ruleset.ProtoTCP, Sport: 40000, Dport: 80, HopLimit: 64, CT: ruleset.New,
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Verdict == ruleset.Accept; got != want {
		t.Errorf("from %s: passes %v, want %v", src, got, want)
	}
}
