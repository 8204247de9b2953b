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

// benchInput is a node with 250 pods in a cluster of many, where each namespace has ten policies with a peer each.
func benchInput(pods, namespaces int) Input {
	in := Input{Model: cluster.NewModel(), Options: Options{Table: "podwall"}}
	port := intstr.FromInt32(8080)
	for n := range namespaces {
		for p := range 10 {
			policy := &cluster.Policy{Namespace: fmt.Sprint("ns", n), Name: fmt.Sprint("policy", p), Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app", p)}},
				Ingress: []networkingv1.NetworkPolicyIngressRule{{
					From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app", (p+1)%10)}}}},
					Ports: []networkingv1.NetworkPolicyPort{{Port: &port}},
				}},
			}}
			in.Model.Apply(cluster.Change{Key: policy.Key(), Object: policy})
		}
	}
	for i := range pods {
		pod := &cluster.Pod{
			Namespace: fmt.Sprint("ns", i%namespaces), Name: fmt.Sprint("pod", i), Labels: map[string]string{"app": fmt.Sprint("app", i/namespaces%10)},
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})},
		}
		in.Model.Apply(cluster.Change{Key: pod.Key(), Object: pod})
		if i < 250 {
			in.Endpoints = append(in.Endpoints, Endpoint{ID: pod.Name, Name: nameOf(pod), Pod: pod, IPs: pod.IPs, Link: fmt.Sprint("veth", i)})
		}
	}
	return in
}

func BenchmarkRender(b *testing.B) {
	for _, size := range []struct{ pods, namespaces int }{{1_000, 10}, {10_000, 100}} {
		in := benchInput(size.pods, size.namespaces)
		b.Run(fmt.Sprintf("pods=%d/policies=%d", size.pods, 10*size.namespaces), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Render(in)
			}
		})
	}
}

func BenchmarkDiff(b *testing.B) {
	in := benchInput(10_000, 100)
	from, to := Render(in).Ruleset, Render(in).Ruleset
	b.ReportAllocs()
	for b.Loop() {
		if d := ruleset.Diff(from, to); !d.Empty() {
			b.Fatal("two renderings of one input differ")
		}
	}
}
