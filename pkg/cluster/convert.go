package cluster

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// PodFrom keeps what enforcement needs of a pod. Labels are shared with the argument, nothing else of it is kept alive.
func PodFrom(p *corev1.Pod) *Pod {
	return &Pod{
		Namespace:   p.Namespace,
		Name:        p.Name,
		UID:         string(p.UID),
		MirrorUID:   p.Annotations[corev1.MirrorPodAnnotationKey],
		Node:        p.Spec.NodeName,
		Labels:      p.Labels,
		IPs:         podIPs(&p.Status),
		Ports:       namedPorts(&p.Spec),
		HostNetwork: p.Spec.HostNetwork,
		Terminal:    p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		Deleting:    p.DeletionTimestamp != nil,
		Created:     p.CreationTimestamp.Time,
	}
}

// NamespaceFrom keeps a namespace's name and labels.
func NamespaceFrom(n *corev1.Namespace) *Namespace {
	return &Namespace{Name: n.Name, Labels: n.Labels}
}

// PolicyFrom keeps a policy's name and spec.
func PolicyFrom(p *networkingv1.NetworkPolicy) *Policy {
	return &Policy{Namespace: p.Namespace, Name: p.Name, Spec: p.Spec}
}

// podIPs falls back to podIP because writers older than dual stack (and hand-written manifests) set only that.
func podIPs(s *corev1.PodStatus) []netip.Addr {
	var ips []netip.Addr
	add := func(text string) {
		if ip, ok := parseIP(text); ok && !slices.Contains(ips, ip) {
			ips = append(ips, ip)
		}
	}
	for _, ip := range s.PodIPs {
		add(ip.IP)
	}
	if len(ips) == 0 {
		add(s.PodIP)
	}
	return ips
}

func parseIP(text string) (netip.Addr, bool) {
	ip, err := netip.ParseAddr(text)
	return ip.Unmap(), err == nil && ip.Zone() == ""
}

// namedPorts lists the named ports of containers and native sidecars; plain init containers are gone before the pod
// serves (kubernetes/kubernetes#127976 made EndpointSlices do the same). The same name in two containers is legal and
// both entries count.
func namedPorts(spec *corev1.PodSpec) []NamedPort {
	var ports []NamedPort
	add := func(c *corev1.Container) {
		for _, p := range c.Ports {
			proto, ok := protocolFrom(p.Protocol)
			if p.Name == "" || !ok || p.ContainerPort < 1 || p.ContainerPort > 65535 {
				continue
			}
			ports = append(ports, NamedPort{Name: p.Name, Protocol: proto, Port: uint16(p.ContainerPort)})
		}
	}
	for i := range spec.InitContainers {
		c := &spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c)
		}
	}
	for i := range spec.Containers {
		add(&spec.Containers[i])
	}
	return ports
}

// protocolFrom defaults to TCP as the API server does: manifests and fixtures have not been through it.
func protocolFrom(p corev1.Protocol) (Protocol, bool) {
	switch p {
	case "", corev1.ProtocolTCP:
		return TCP, true
	case corev1.ProtocolUDP:
		return UDP, true
	case corev1.ProtocolSCTP:
		return SCTP, true
	}
	return 0, false
}
