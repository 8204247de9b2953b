// Package oracle says what a node must do with a connection, from the definition of NetworkPolicy alone. It is the reference
// that podwall's rulesets are compared with, written to be read beside the definition and not to be fast. It shares no code
// with pkg/policy.
package oracle

import (
	"maps"
	"net"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	netutils "k8s.io/utils/net"
)

// Cluster is what the verdicts of one node depend on: the API's objects and the sandboxes that CNI attached to the node.
type Cluster struct {
	Node         string // spec.nodeName of the pods whose policies are enforced here
	Namespaces   []*corev1.Namespace
	Pods         []*corev1.Pod
	Policies     []*networkingv1.NetworkPolicy
	Sandboxes    []Sandbox // an address belongs to the last one that has it
	AllowOwnNode bool      // --own-node-egress=allow
}

// Sandbox is a pod that CNI attached to this node. Without a pod object of that name nobody knows what it may: it is closed.
type Sandbox struct {
	Namespace, Name string
	IPs             []netip.Addr
}

// Conn is the first packet of a connection as the node sees it after DNAT and before SNAT.
type Conn struct {
	Src, Dst netip.Addr
	FromNode bool // the node itself is the sender, whatever address it uses
	ToNode   bool // the node itself is the receiver
	Protocol Protocol
	Port     uint16 // destination port; 0 for ICMP
}

// Protocol of a connection.
type Protocol string

// ICMP stands for an echo request of either family; the others are the API's.
const (
	TCP  = Protocol(corev1.ProtocolTCP)
	UDP  = Protocol(corev1.ProtocolUDP)
	SCTP = Protocol(corev1.ProtocolSCTP)
	ICMP = Protocol("ICMP")
)

// party is one end of a connection.
type party struct {
	ip      netip.Addr
	pod     *corev1.Pod // nil: not a pod
	managed bool        // this node enforces its policies
	closed  bool        // attached, and not known
}

// Allowed reports whether the node lets the connection pass.
func (c *Cluster) Allowed(conn Conn) bool {
	src, dst := c.at(conn.Src), c.at(conn.Dst)
	switch {
	case conn.FromNode: // "traffic to and from the node where a Pod is running is always allowed", told by origin
		return true
	case src.closed || dst.closed:
		return false
	case conn.Src == conn.Dst: // a pod cannot block itself, through its own Service neither
		return true
	case conn.ToNode:
		return c.AllowOwnNode || c.side(networkingv1.PolicyTypeEgress, src, dst, conn)
	}
	return c.side(networkingv1.PolicyTypeEgress, src, dst, conn) && c.side(networkingv1.PolicyTypeIngress, dst, src, conn)
}

// at finds out who has an address: the sandbox of this node, else the newest living pod that the API reports there, one of this
// node before all others.
func (c *Cluster) at(ip netip.Addr) party {
	for _, s := range slices.Backward(c.Sandboxes) {
		if slices.Contains(s.IPs, ip) {
			i := slices.IndexFunc(c.Pods, func(p *corev1.Pod) bool { return p.Namespace == s.Namespace && p.Name == s.Name })
			if i < 0 {
				return party{ip: ip, managed: true, closed: true}
			}
			return party{ip: ip, pod: c.Pods[i], managed: true}
		}
	}
	found := party{ip: ip}
	for _, p := range c.Pods {
		if p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed || !hasIP(p, ip) {
			continue
		}
		if found.pod == nil || c.before(p, found.pod) {
			found.pod = p
		}
	}
	found.managed = found.pod != nil && found.pod.Spec.NodeName == c.Node
	return found
}

// before reports whether pod a has an address rather than pod b.
func (c *Cluster) before(a, b *corev1.Pod) bool {
	if here := a.Spec.NodeName == c.Node; here != (b.Spec.NodeName == c.Node) {
		return here
	}
	return b.CreationTimestamp.Before(&a.CreationTimestamp)
}

func hasIP(p *corev1.Pod, ip netip.Addr) bool {
	return slices.ContainsFunc(p.Status.PodIPs, func(i corev1.PodIP) bool {
		a, err := netip.ParseAddr(i.IP)
		return err == nil && a.Unmap() == ip
	})
}

// side is one half of the definition: the subject's policies of one direction. A policy acts on pods of its own namespace;
// rules are a union; a pod that no policy selects is open.
func (c *Cluster) side(direction networkingv1.PolicyType, subject, other party, conn Conn) bool {
	if !subject.managed {
		return true
	}
	receiver := subject
	if direction == networkingv1.PolicyTypeEgress {
		receiver = other
	}
	isolated := false
	for _, p := range c.Policies {
		if p.Namespace != subject.pod.Namespace || !concerns(&p.Spec, direction) || !selects(&p.Spec.PodSelector, subject.pod.Labels) {
			continue
		}
		isolated = true
		if direction == networkingv1.PolicyTypeIngress {
			for _, r := range p.Spec.Ingress {
				if portsMatch(r.Ports, receiver, conn) && c.peersMatch(r.From, p.Namespace, other) {
					return true
				}
			}
			continue
		}
		for _, r := range p.Spec.Egress {
			if portsMatch(r.Ports, receiver, conn) && c.peersMatch(r.To, p.Namespace, other) {
				return true
			}
		}
	}
	return !isolated
}

// concerns applies the defaulting of policyTypes: none means Ingress, and Egress if there are egress rules.
func concerns(spec *networkingv1.NetworkPolicySpec, direction networkingv1.PolicyType) bool {
	if len(spec.PolicyTypes) == 0 {
		return direction == networkingv1.PolicyTypeIngress || len(spec.Egress) > 0
	}
	return slices.Contains(spec.PolicyTypes, direction)
}

// portsMatch: no ports is every protocol; a name is resolved on the pod that receives the connection.
func portsMatch(ports []networkingv1.NetworkPolicyPort, receiver party, conn Conn) bool {
	return len(ports) == 0 || slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
		protocol := corev1.ProtocolTCP
		if p.Protocol != nil {
			protocol = *p.Protocol
		}
		switch number := int32(conn.Port); {
		case Protocol(protocol) != conn.Protocol:
			return false
		case p.Port == nil:
			return true
		case p.Port.StrVal != "":
			return receiver.pod != nil && hasPort(receiver.pod, p.Port.StrVal, protocol, number)
		case p.EndPort != nil:
			return p.Port.IntVal <= number && number <= *p.EndPort
		default:
			return p.Port.IntVal == number
		}
	})
}

// hasPort looks at containers and at native sidecars, not at plain init containers.
func hasPort(pod *corev1.Pod, name string, protocol corev1.Protocol, number int32) bool {
	containers := slices.Clone(pod.Spec.Containers)
	for _, c := range pod.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			containers = append(containers, c)
		}
	}
	for _, c := range containers {
		for _, p := range c.Ports {
			if p.Name == name && p.ContainerPort == number && (p.Protocol == protocol || p.Protocol == "" && protocol == corev1.ProtocolTCP) {
				return true
			}
		}
	}
	return false
}

// peersMatch: no peers is everybody; selectors select pods only, a peer without namespaceSelector those of the policy's namespace.
func (c *Cluster) peersMatch(peers []networkingv1.NetworkPolicyPeer, namespace string, other party) bool {
	return len(peers) == 0 || slices.ContainsFunc(peers, func(p networkingv1.NetworkPolicyPeer) bool {
		switch {
		case p.IPBlock != nil:
			return inBlock(p.IPBlock, other.ip)
		case other.pod == nil:
			return false
		case p.NamespaceSelector == nil && other.pod.Namespace != namespace:
			return false
		case p.NamespaceSelector != nil && !selects(p.NamespaceSelector, c.namespaceLabels(other.pod.Namespace)):
			return false
		}
		return p.PodSelector == nil || selects(p.PodSelector, other.pod.Labels)
	})
}

func (c *Cluster) namespaceLabels(name string) map[string]string {
	labels := map[string]string{}
	for _, n := range c.Namespaces {
		if n.Name == name {
			maps.Copy(labels, n.Labels)
		}
	}
	labels[corev1.LabelMetadataName] = name // forced by the API server
	return labels
}

// inBlock: cidr minus its own excepts. A CIDR that cannot be read makes the peer match nothing.
func inBlock(b *networkingv1.IPBlock, ip netip.Addr) bool {
	in := func(cidr string) (bool, bool) {
		_, n, err := netutils.ParseCIDRSloppy(cidr)
		return err == nil && n.Contains(net.IP(ip.AsSlice())), err == nil
	}
	inside, ok := in(b.CIDR)
	for _, e := range b.Except {
		excepted, readable := in(e)
		inside, ok = inside && !excepted, ok && readable
	}
	return inside && ok
}

// selects: all of matchLabels and matchExpressions; NotIn and DoesNotExist match what lacks the key.
func selects(s *metav1.LabelSelector, labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		have, ok := labels[e.Key]
		in := ok && slices.Contains(e.Values, have)
		switch e.Operator {
		case metav1.LabelSelectorOpIn:
			ok = in
		case metav1.LabelSelectorOpNotIn:
			ok = !in
		case metav1.LabelSelectorOpDoesNotExist:
			ok = !ok
		case metav1.LabelSelectorOpExists:
		}
		if !ok {
			return false
		}
	}
	return true
}
