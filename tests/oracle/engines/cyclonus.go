package engines

import (
	"github.com/mattfenwick/cyclonus/pkg/matcher"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Cyclonus is github.com/mattfenwick/cyclonus's matcher. It knows no pods: a question brings the labels of both sides and the
// name of the port.
type Cyclonus struct{ policies *matcher.Policy }

var _ Engine = (*Cyclonus)(nil)

// Name of the engine.
func (*Cyclonus) Name() string { return "cyclonus" }

// Load replaces the policies.
func (c *Cyclonus) Load(s *Stored) { c.policies = matcher.BuildNetworkPolicies(false, s.Policies) }

// Allowed asks the matcher for one direction.
func (c *Cyclonus) Allowed(q *Question) bool {
	subject := &matcher.TrafficPeer{IP: q.Conn.Src.String(), Internal: internal(q.Subject)}
	peer := &matcher.TrafficPeer{IP: q.Conn.Dst.String(), Internal: internal(q.Peer)}
	t := &matcher.Traffic{Source: subject, Destination: peer, ResolvedPort: int(q.Conn.Port), Protocol: corev1.Protocol(q.Conn.Protocol)}
	ingress := q.Direction == networkingv1.PolicyTypeIngress
	if ingress {
		subject.Internal, peer.Internal = peer.Internal, subject.Internal
	}
	if names := q.names(); len(names) > 0 {
		t.ResolvedPortName = names[0]
	}
	return c.policies.IsIngressOrEgressAllowed(t, ingress).IsAllowed()
}

func internal(o Owner) *matcher.InternalPeer {
	if o.Pod == nil {
		return nil
	}
	return &matcher.InternalPeer{PodLabels: o.Labels, NamespaceLabels: o.Namespace, Namespace: o.Pod.Namespace}
}

// Rules of v0.5.6.
func (*Cyclonus) Rules() []Rule {
	return []Rule{
		{"NotIn needs the key", func(q *Question) bool {
			return q.selectors(func(s *metav1.LabelSelector, labels map[string]string) bool {
				for _, e := range s.MatchExpressions {
					if _, ok := labels[e.Key]; !ok && e.Operator == metav1.LabelSelectorOpNotIn {
						return true
					}
				}
				return false
			})
		}},
		{"empty label value matches without the key", func(q *Question) bool {
			return q.selectors(func(s *metav1.LabelSelector, labels map[string]string) bool {
				for k, v := range s.MatchLabels {
					if _, ok := labels[k]; !ok && v == "" {
						return true
					}
				}
				return false
			})
		}},
		{"one name per port", func(q *Question) bool { return len(q.names()) > 1 }},
		{"unreadable CIDR panics", (*Question).unreadableCIDR},
	}
}
