package engines

import (
	"net"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Scope is what neither engine speaks of: it is decided before NetworkPolicy is asked.
func Scope() []Rule {
	return []Rule{
		{"own node", func(q *Question) bool { return q.Conn.FromNode || q.Conn.ToNode }},
		{"hairpin", func(q *Question) bool { return q.Conn.Src == q.Conn.Dst }},
		{"sandbox without a pod that reports its address", func(q *Question) bool { return q.Subject.Attached || q.Peer.Attached }},
		{"address that several pods report", func(q *Question) bool { return q.Subject.Disputed || q.Peer.Disputed }},
	}
}

// named reports whether a port is the connection's and has a name.
func (q *Question) named(p corev1.ContainerPort) bool {
	return p.Name != "" && p.ContainerPort == int32(q.Conn.Port) && p.Protocol == corev1.Protocol(q.Conn.Protocol)
}

// names returns the names that the receiver has for the connection's port.
func (q *Question) names() []string {
	var names []string
	r := q.Receiver().Pod
	if r == nil {
		return nil
	}
	for _, c := range slices.Concat(r.Spec.Containers, sidecars(r)) {
		for _, p := range c.Ports {
			if q.named(p) && !slices.Contains(names, p.Name) {
				names = append(names, p.Name)
			}
		}
	}
	return names
}

func sidecars(pod *corev1.Pod) []corev1.Container {
	return slices.DeleteFunc(slices.Clone(pod.Spec.InitContainers), func(c corev1.Container) bool {
		return c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways
	})
}

// unreadableCIDR: both engines read CIDRs with net.ParseCIDR, which is stricter than the API server of older clusters.
func (q *Question) unreadableCIDR() bool {
	unreadable := func(cidr string) bool {
		_, _, err := net.ParseCIDR(cidr)
		return err != nil
	}
	return slices.ContainsFunc(q.Policies(), func(p *networkingv1.NetworkPolicy) bool {
		return slices.ContainsFunc(Peers(p, q.Direction), func(peer networkingv1.NetworkPolicyPeer) bool {
			return peer.IPBlock != nil && (unreadable(peer.IPBlock.CIDR) || slices.ContainsFunc(peer.IPBlock.Except, unreadable))
		})
	})
}

// selectors reports whether a selector that could decide the question has a trait for the labels it is held against.
func (q *Question) selectors(trait func(*metav1.LabelSelector, map[string]string) bool) bool {
	return slices.ContainsFunc(q.Policies(), func(p *networkingv1.NetworkPolicy) bool {
		return trait(&p.Spec.PodSelector, q.Subject.Labels) || q.Peer.Pod != nil && slices.ContainsFunc(Peers(p, q.Direction), func(peer networkingv1.NetworkPolicyPeer) bool {
			return peer.PodSelector != nil && trait(peer.PodSelector, q.Peer.Labels) || peer.NamespaceSelector != nil && trait(peer.NamespaceSelector, q.Peer.Namespace)
		})
	})
}
