package engines

import (
	"context"
	"fmt"
	"net"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/kube-network-policies/pkg/api"
	"sigs.k8s.io/kube-network-policies/pkg/network"
	"sigs.k8s.io/kube-network-policies/pkg/networkpolicy"
	"sigs.k8s.io/kube-network-policies/pkg/podinfo"

	"github.com/podwall/podwall/tests/oracle"
)

// KNP is sigs.k8s.io/kube-network-policies: its evaluator, and its lookup of pods by address.
type KNP struct {
	namespaces, pods, policies cache.Indexer
	evaluator                  *networkpolicy.StandardNetworkPolicy
	provider                   api.PodInfoProvider
}

var _ Engine = (*KNP)(nil)

// NewKNP returns an engine whose informers never run: Load fills their stores.
func NewKNP() (*KNP, error) {
	factory := informers.NewSharedInformerFactory(fake.NewClientset(), 0)
	namespaces, pods, policies := factory.Core().V1().Namespaces(), factory.Core().V1().Pods(), factory.Networking().V1().NetworkPolicies()
	resolver, err := podinfo.NewInformerResolver(pods.Informer())
	if err != nil {
		return nil, fmt.Errorf("index pods by address for kube-network-policies: %w", err)
	}
	return &KNP{
		namespaces: namespaces.Informer().GetIndexer(),
		pods:       pods.Informer().GetIndexer(),
		policies:   policies.Informer().GetIndexer(),
		evaluator:  networkpolicy.NewStandardNetworkPolicy("", namespaces, pods, policies),
		provider:   podinfo.NewInformerProvider(pods, namespaces, nil, []podinfo.IPResolver{resolver}),
	}, nil
}

// Name of the engine.
func (*KNP) Name() string { return "kube-network-policies" }

// Load replaces the cluster.
func (k *KNP) Load(s *Stored) {
	replace(k.namespaces, s.Namespaces)
	replace(k.pods, s.Pods)
	replace(k.policies, s.Policies)
}

func replace[T any](store cache.Store, objects []T) {
	var list []any
	for _, o := range objects {
		list = append(list, o)
	}
	if err := store.Replace(list, ""); err != nil {
		panic(err) // an object without metadata
	}
}

// Allowed asks the evaluator of one direction. ICMP has no protocol and no ports in its packets.
func (k *KNP) Allowed(q *Question) bool {
	p := &network.Packet{
		Family: corev1.IPv4Protocol, SrcIP: net.IP(q.Conn.Src.AsSlice()), DstIP: net.IP(q.Conn.Dst.AsSlice()),
		Proto: corev1.Protocol(q.Conn.Protocol), SrcPort: 40000, DstPort: int(q.Conn.Port),
	}
	if q.Conn.Src.Is6() {
		p.Family = corev1.IPv6Protocol
	}
	if q.Conn.Protocol == oracle.ICMP {
		p.Proto, p.SrcPort, p.DstPort = "", 0, 0
	}
	src, _ := k.provider.GetPodInfoByIP(p.SrcIP.String())
	dst, _ := k.provider.GetPodInfoByIP(p.DstIP.String())
	evaluate := k.evaluator.EvaluateEgress
	if q.Direction == networkingv1.PolicyTypeIngress {
		evaluate = k.evaluator.EvaluateIngress
	}
	verdict, err := evaluate(context.Background(), p, src, dst)
	return err == nil && verdict != api.VerdictDeny
}

// Rules of v1.1.1.
func (*KNP) Rules() []Rule {
	return []Rule{
		{"completed pod keeps its address", func(q *Question) bool { return q.Peer.Completed != nil }},
		{"named port of a sidecar is not found", func(q *Question) bool {
			r := q.Receiver().Pod
			return r != nil && slices.ContainsFunc(sidecars(r), func(c corev1.Container) bool { return slices.ContainsFunc(c.Ports, q.named) })
		}},
		{"unreadable CIDR matches everything", (*Question).unreadableCIDR},
	}
}
