// Package cluster holds what podwall knows of the cluster: pods, namespaces and policies as trimmed values, the model
// they form, and the two sources that feed it (an API server, a directory of manifests).
package cluster

import (
	"net/netip"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
)

// Kind of an object in the model.
type Kind uint8

// The kinds that podwall reads.
const (
	KindNamespace Kind = iota + 1
	KindPod
	KindPolicy
)

// String returns the Kubernetes kind.
func (k Kind) String() string {
	switch k {
	case KindNamespace:
		return "Namespace"
	case KindPod:
		return "Pod"
	case KindPolicy:
		return "NetworkPolicy"
	}
	return "unknown"
}

// Key names an object. Namespace is empty for a Namespace.
type Key struct {
	Kind            Kind
	Namespace, Name string
}

// String returns "NetworkPolicy ns/name".
func (k Key) String() string {
	if k.Namespace == "" {
		return k.Kind.String() + " " + k.Name
	}
	return k.Kind.String() + " " + k.Namespace + "/" + k.Name
}

// Object is a *Namespace, *Pod or *Policy. Objects are immutable once they have been given to a Sink.
type Object interface{ Key() Key }

// Protocol is an IP protocol number (IANA) that NetworkPolicy can name.
type Protocol uint8

// The three protocols of NetworkPolicy.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// NamedPort is a container port with a name.
type NamedPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// Namespace is a namespace's name and labels. A namespace that no source describes still exists, see Model.NamespaceLabels.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Key implements Object.
func (n *Namespace) Key() Key { return Key{Kind: KindNamespace, Name: n.Name} }

// Pod is what enforcement needs of a pod.
type Pod struct {
	Namespace, Name string
	UID             string
	MirrorUID       string // annotation kubernetes.io/config.mirror: the UID that a runtime passes for a static pod
	Node            string // spec.nodeName
	Labels          map[string]string
	IPs             []netip.Addr // status.podIPs, unmapped
	Ports           []NamedPort  // of containers and native sidecars (initContainers with restartPolicy Always)
	HostNetwork     bool
	Terminal        bool      // phase Succeeded or Failed: its IPs may already belong to somebody else
	Deleting        bool      // deletionTimestamp is set; the pod stays subject and peer
	Created         time.Time // creationTimestamp
}

// Key implements Object.
func (p *Pod) Key() Key { return Key{Kind: KindPod, Namespace: p.Namespace, Name: p.Name} }

// Policy is a networking.k8s.io/v1 NetworkPolicy as its author wrote it; pkg/policy gives it its meaning.
type Policy struct {
	Namespace, Name string
	Spec            networkingv1.NetworkPolicySpec
	// Unreadable says why Spec could not be read (manifests only). Such a policy closes the pods that it selects.
	Unreadable string
}

// Key implements Object.
func (p *Policy) Key() Key { return Key{Kind: KindPolicy, Namespace: p.Namespace, Name: p.Name} }

// Change is one object's new state; a nil Object says that it is gone.
type Change struct {
	Key    Key
	Object Object
}

// Sink receives what a source sees. Both methods may be called from any goroutine.
type Sink interface {
	// Apply takes changes in order; it keeps the objects.
	Apply(changes ...Change)
	// Synced says that everything that existed at the start has been applied.
	Synced()
}
