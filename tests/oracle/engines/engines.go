// Package engines cross-checks the oracle against two implementations of NetworkPolicy that others wrote: the engine of
// sigs.k8s.io/kube-network-policies and the matcher of github.com/mattfenwick/cyclonus.
//
// A connection is asked one direction at a time, as both engines answer it. What an engine does not speak of, or is known to
// get wrong, is left out by a named rule, and every such rule has a test that shows the engine's answer beside the oracle's.
package engines

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podwall/podwall/tests/oracle"
)

// Engine answers questions about the cluster that was loaded last.
type Engine interface {
	Name() string
	Load(*Stored)
	Allowed(*Question) bool
	Rules() []Rule // besides Scope
}

// Rule names the questions that are not asked.
type Rule struct {
	Name    string
	Applies func(*Question) bool
}

// Question is one direction of a connection: may the subject, a pod of this node, send it or receive it?
type Question struct {
	Stored    *Stored
	Direction networkingv1.PolicyType
	Conn      oracle.Conn
	Subject   Owner
	Peer      Owner
}

// Questions returns what there is to ask about a connection: a side that is not a pod of this node has no policies here.
func (s *Stored) Questions(conn oracle.Conn) []*Question {
	var list []*Question
	src, dst := s.Owner(conn.Src), s.Owner(conn.Dst)
	for _, q := range []*Question{
		{Stored: s, Direction: networkingv1.PolicyTypeEgress, Conn: conn, Subject: src, Peer: dst},
		{Stored: s, Direction: networkingv1.PolicyTypeIngress, Conn: conn, Subject: dst, Peer: src},
	} {
		if q.Subject.Local {
			list = append(list, q)
		}
	}
	return list
}

// Receiver is the side whose ports the names in a policy refer to.
func (q *Question) Receiver() Owner {
	if q.Direction == networkingv1.PolicyTypeIngress {
		return q.Subject
	}
	return q.Peer
}

// Policies returns those of the subject's namespace that have the question's direction, whether they select the subject or not.
func (q *Question) Policies() []*networkingv1.NetworkPolicy {
	var list []*networkingv1.NetworkPolicy
	for _, p := range q.Stored.Policies {
		if q.Subject.Pod != nil && p.Namespace == q.Subject.Pod.Namespace && slices.Contains(p.Spec.PolicyTypes, q.Direction) {
			list = append(list, p)
		}
	}
	return list
}

// Peers returns the peers of one direction of a policy.
func Peers(p *networkingv1.NetworkPolicy, direction networkingv1.PolicyType) []networkingv1.NetworkPolicyPeer {
	var list []networkingv1.NetworkPolicyPeer
	if direction == networkingv1.PolicyTypeIngress {
		for _, r := range p.Spec.Ingress {
			list = append(list, r.From...)
		}
		return list
	}
	for _, r := range p.Spec.Egress {
		list = append(list, r.To...)
	}
	return list
}

// OneWay returns the cluster with the other direction open for everybody, so that the oracle answers one direction. Rules are a
// union, so one policy per namespace is enough, and the policies in question stay as they were written.
func OneWay(c *oracle.Cluster, direction networkingv1.PolicyType) *oracle.Cluster {
	one := *c
	one.Policies = slices.Clone(c.Policies)
	namespaces := map[string]bool{}
	for _, p := range c.Pods {
		namespaces[p.Namespace] = true
	}
	for name := range namespaces {
		open := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "open"}}
		if direction == networkingv1.PolicyTypeEgress {
			open.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
			open.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{}}
		} else {
			open.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
			open.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{}}
		}
		one.Policies = append(one.Policies, open)
	}
	return &one
}

// Stored is the cluster as the API server hands it out.
type Stored struct {
	Node       string
	Namespaces []*corev1.Namespace
	Pods       []*corev1.Pod
	Policies   []*networkingv1.NetworkPolicy
	Sandboxes  []oracle.Sandbox

	owners map[netip.Addr]Owner
}

// Store does with objects what the API server does: it defaults them, forces the name label on namespaces, and loses the
// difference between nil and empty. Every pod gets a namespace object.
func Store(c *oracle.Cluster) *Stored {
	s := &Stored{Node: c.Node, Sandboxes: c.Sandboxes, owners: map[netip.Addr]Owner{}}
	labels := map[string]map[string]string{}
	for _, p := range c.Pods {
		labels[p.Namespace] = nil
		p = p.DeepCopy()
		for i := range p.Spec.Containers {
			defaultPorts(p.Spec.Containers[i].Ports)
		}
		for i := range p.Spec.InitContainers {
			defaultPorts(p.Spec.InitContainers[i].Ports)
		}
		s.Pods = append(s.Pods, p)
	}
	for _, n := range c.Namespaces {
		labels[n.Name] = n.Labels
	}
	for name := range labels {
		n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
		maps.Copy(n.Labels, labels[name])
		n.Labels[corev1.LabelMetadataName] = name
		s.Namespaces = append(s.Namespaces, n)
	}
	for _, p := range c.Policies {
		p = p.DeepCopy()
		defaultPolicy(&p.Spec)
		s.Policies = append(s.Policies, p)
	}
	return s
}

func defaultPorts(ports []corev1.ContainerPort) {
	for i := range ports {
		ports[i].Protocol = cmp.Or(ports[i].Protocol, corev1.ProtocolTCP)
	}
}

func defaultPolicy(spec *networkingv1.NetworkPolicySpec) {
	if len(spec.PolicyTypes) == 0 {
		spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
		if len(spec.Egress) > 0 {
			spec.PolicyTypes = append(spec.PolicyTypes, networkingv1.PolicyTypeEgress)
		}
	}
	if len(spec.Ingress) == 0 {
		spec.Ingress = nil
	}
	if len(spec.Egress) == 0 {
		spec.Egress = nil
	}
	tcp := corev1.ProtocolTCP
	protocols := func(ports []networkingv1.NetworkPolicyPort) {
		for i := range ports {
			ports[i].Protocol = cmp.Or(ports[i].Protocol, &tcp)
		}
	}
	for _, r := range spec.Ingress {
		protocols(r.Ports)
	}
	for _, r := range spec.Egress {
		protocols(r.Ports)
	}
}

// Owner is who has an address, as far as the API alone can tell.
type Owner struct {
	Pod       *corev1.Pod // nil: not a pod
	Labels    map[string]string
	Namespace map[string]string // its labels
	Local     bool              // the node enforces policies for the address
	Completed *corev1.Pod       // reports the address and no longer uses it
	Attached  bool              // CNI knows more than the API: no pod object, or one that does not report the address
	Disputed  bool              // several pods report the address
}

// Owner finds out who has an address.
func (s *Stored) Owner(ip netip.Addr) Owner {
	o, ok := s.owners[ip]
	if !ok {
		o = s.find(ip)
		s.owners[ip] = o
	}
	return o
}

func (s *Stored) find(ip netip.Addr) Owner {
	var claims, running []*corev1.Pod
	for _, p := range s.Pods {
		if p.Spec.HostNetwork || !slices.ContainsFunc(p.Status.PodIPs, func(i corev1.PodIP) bool { return i.IP == ip.String() }) {
			continue
		}
		claims = append(claims, p)
		if p.Status.Phase == corev1.PodRunning {
			running = append(running, p)
		}
	}
	if len(running) == 1 && !slices.ContainsFunc(claims, func(p *corev1.Pod) bool { return p != running[0] && !completed(p) }) {
		claims = running // the others have left it
	}
	i := slices.IndexFunc(s.Sandboxes, func(b oracle.Sandbox) bool { return slices.Contains(b.IPs, ip) })
	switch {
	case len(claims) > 1:
		return Owner{Disputed: true, Local: i >= 0 || slices.ContainsFunc(claims, func(p *corev1.Pod) bool { return p.Spec.NodeName == s.Node })}
	case i >= 0 && (len(claims) == 0 || claims[0].Namespace != s.Sandboxes[i].Namespace || claims[0].Name != s.Sandboxes[i].Name):
		return Owner{Attached: true, Local: true}
	case len(claims) == 0:
		return Owner{}
	case i < 0 && completed(claims[0]):
		return Owner{Completed: claims[0]}
	}
	o := Owner{Pod: claims[0], Labels: claims[0].Labels, Local: i >= 0 || claims[0].Spec.NodeName == s.Node}
	for _, n := range s.Namespaces {
		if n.Name == o.Pod.Namespace {
			o.Namespace = n.Labels
		}
	}
	return o
}

func completed(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}
