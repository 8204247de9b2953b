package policy

import (
	"fmt"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podwall/podwall/pkg/cluster"
)

// TestInspect holds what is remarked on policies that do what they say, but perhaps not what they were written for.
func TestInspect(t *testing.T) {
	t.Parallel()
	web := intstr.FromString("web")
	selector := func(app string) metav1.LabelSelector {
		return metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
	}
	pods := func(app string) networkingv1.NetworkPolicyPeer {
		s := selector(app)
		return networkingv1.NetworkPolicyPeer{PodSelector: &s}
	}
	cidr := func(cidr string, except ...string) networkingv1.NetworkPolicyPeer {
		return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: cidr, Except: except}}
	}
	in := func(peers ...networkingv1.NetworkPolicyPeer) networkingv1.NetworkPolicySpec {
		return networkingv1.NetworkPolicySpec{PodSelector: selector("a"), Ingress: []networkingv1.NetworkPolicyIngressRule{{From: peers}}}
	}
	named := in(pods("b"))
	named.Ingress[0].Ports = []networkingv1.NetworkPolicyPort{{Port: &web}}
	out := networkingv1.NetworkPolicySpec{PodSelector: selector("a"), Egress: []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{pods("b")}}}}
	for name, tt := range map[string]struct {
		spec networkingv1.NetworkPolicySpec
		want []string
	}{
		"as it should be":     {in(pods("b"), cidr("10.0.0.0/8", "10.1.0.0/16")), nil},
		"nobody selected":     {networkingv1.NetworkPolicySpec{PodSelector: selector("nobody")}, []string{"-1/-1/-1 podSelector selects no pod of namespace ns: it isolates nobody"}},
		"no such peer":        {in(pods("nobody")), []string{"0/0/-1 matches no pod (ns: app=nobody)"}},
		"no such port":        {named, []string{`0/-1/0 no pod that it selects has a TCP port named "web": it matches nothing; names are those of containers' ports, not of a Service's`}},
		"egress only":         {out, []string{"-1/-1/-1 has egress rules only and no policyTypes: it denies all ingress as well; write policyTypes: [Egress] to limit egress, or [Ingress, Egress] if that is meant"}},
		"host bits":           {in(cidr("10.1.2.3/8")), []string{"0/0/-1 cidr 10.1.2.3/8 means 10.0.0.0/8: write that (host bits, leading zeros and IPv4-mapped addresses are refused from Kubernetes 1.36 on)"}},
		"except elsewhere":    {in(cidr("10.0.0.0/8", "11.0.0.0/16")), []string{"0/0/-1 except 11.0.0.0/16 is outside of cidr 10.0.0.0/8: it does nothing"}},
		"except everything":   {in(cidr("10.0.0.0/8", "10.0.0.0/8")), []string{"0/0/-1 except 10.0.0.0/8 is all of cidr 10.0.0.0/8: the block matches nothing"}},
		"rules without a way": {networkingv1.NetworkPolicySpec{PodSelector: selector("a"), PolicyTypes: []networkingv1.PolicyType{"Egress"}, Ingress: in(pods("b")).Ingress}, []string{"-1/-1/-1 its ingress rules do nothing: policyTypes lacks Ingress"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := cluster.NewModel()
			for _, app := range []string{"a", "b"} {
				p := &cluster.Pod{Namespace: "ns", Name: app, Labels: map[string]string{"app": app}}
				m.Apply(cluster.Change{Key: p.Key(), Object: p})
			}
			p := &cluster.Policy{Namespace: "ns", Name: "p", Spec: tt.spec}
			m.Apply(cluster.Change{Key: p.Key(), Object: p})
			var got []string
			for _, r := range NewInspector(m, nil).Inspect(p) {
				got = append(got, fmt.Sprintf("%d/%d/%d %s", r.Rule, r.Peer, r.Port, r.Reason))
			}
			if d := gocmp.Diff(tt.want, got); d != "" {
				t.Errorf("remarks (-want +got):\n%s", d)
			}
		})
	}
}

// TestWithoutDNS holds whom egress policies leave without name resolution.
func TestWithoutDNS(t *testing.T) {
	t.Parallel()
	dns := intstr.FromInt32(53)
	protocol := networkingv1.NetworkPolicyPort{Port: &dns, Protocol: new(corev1.ProtocolUDP)}
	policy := func(name string, rules ...networkingv1.NetworkPolicyEgressRule) *cluster.Policy {
		return &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Egress"}, Egress: rules}}
	}
	closed, open := policy("closed"), policy("open", networkingv1.NetworkPolicyEgressRule{Ports: []networkingv1.NetworkPolicyPort{protocol}})
	for name, tt := range map[string]struct {
		policies []*cluster.Policy
		pod      bool
		want     map[cluster.Key][]string
	}{
		"denied":          {[]*cluster.Policy{closed}, true, map[cluster.Key][]string{closed.Key(): {"ns/a"}}},
		"allowed":         {[]*cluster.Policy{closed, open}, true, map[cluster.Key][]string{}},
		"denied, no pods": {[]*cluster.Policy{closed}, false, map[cluster.Key][]string{closed.Key(): nil}},
		"allowed, none":   {[]*cluster.Policy{closed, open}, false, map[cluster.Key][]string{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := cluster.NewModel()
			if tt.pod {
				p := &cluster.Pod{Namespace: "ns", Name: "a"}
				m.Apply(cluster.Change{Key: p.Key(), Object: p})
			}
			for _, p := range tt.policies {
				m.Apply(cluster.Change{Key: p.Key(), Object: p})
			}
			if d := gocmp.Diff(tt.want, NewInspector(m, nil).WithoutDNS()); d != "" {
				t.Errorf("without DNS (-want +got):\n%s", d)
			}
		})
	}
}
