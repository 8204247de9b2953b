// Package policy turns the cluster's state and this node's endpoints into a ruleset. It is pure: NetworkPolicy semantics
// live here and nowhere else, and nothing here does I/O.
//
// The meaning of a policy follows k8s.io/api networking/v1 and the "Network Policies" page of kubernetes.io; where upstream
// is silent, docs/semantics.md holds the answer.
package policy

import (
	"net/netip"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// Endpoint is one interface of a pod on this node: what policies are enforced on.
type Endpoint struct {
	ID   string // unique on the node and stable; names the endpoint's chains
	Name string // namespace/name of the pod, for comments
	// Pod gives namespace, labels and ports. A nil Pod is not known (yet, or no longer): the endpoint is closed both ways.
	Pod *cluster.Pod
	// Brief says of an endpoint without a Pod that it is about to be opened for the first time: its addresses are closed, and its link has no
	// chains yet. That takes elements of sets only, for which the kernel does not validate the whole table (nft_table_validate).
	Brief bool
	// Ended says of an endpoint without a Pod that it is closed for good, and that the connections of its addresses are forgotten for that.
	Ended bool
	// IPs are the addresses that this endpoint owns, of both families. An address belongs to one endpoint at most.
	IPs []netip.Addr
	// Link is the host veth. It is empty for a pod that was adopted from the API by its IPs.
	Link string
	// Bridge is the bridge that Link is a port of, or empty when the link is routed.
	Bridge string
	// Gateways are the node's own addresses on Bridge, link-local ones included: the pod must not pretend to have them.
	Gateways []netip.Addr
	// Device is the interface that the node's routes to the pod lead through, for a pod whose Link is not known. Without either
	// a packet from the pod to itself cannot be told from one that pretends to be.
	Device string
}

// Options are the choices of docs/semantics.md.
type Options struct {
	Table string // name of the inet table and of its netdev companion
	// AllowOwnNode exempts pod -> own node from egress policies.
	AllowOwnNode bool
	// NodeDNS are addresses of the node whose port 53 (UDP, TCP) every pod may reach: NodeLocal DNS.
	NodeDNS []netip.Addr
	// Reject answers denied packets instead of dropping them silently.
	Reject bool
	// Log tells of denied packets by NFLOG (group LogGroup).
	Log bool
	// Cut ends connections that a change no longer allows; see Cut and TightenedBy.
	Cut bool
}

// Input is everything that a ruleset depends on.
type Input struct {
	Model     *cluster.Model
	Endpoints []Endpoint
	Options   Options
	// CutBeforeNAT adds the chain that resets clients of revoked connections before DNAT: while there are some; see Connection.
	CutBeforeNAT bool
}

// Problem is something about an object that could not be used as written. What cannot be used matches nothing as a peer and
// closes the pods that it selects.
type Problem struct {
	Object cluster.Key
	Reason string
}

// String returns "NetworkPolicy ns/name: reason".
func (p Problem) String() string { return p.Object.String() + ": " + p.Reason }

// Verdicts says which policies isolate an endpoint, per direction, as sorted namespace/name. A nil slice is an open direction.
type Verdicts struct {
	Ingress, Egress []string
}

// Output is a rendered ruleset and what was found on the way.
type Output struct {
	Ruleset   ruleset.Ruleset
	Endpoints map[string]Verdicts // by Endpoint.ID; a closed endpoint (Pod nil) is not in it
	Problems  []Problem           // sorted, without repetitions
}

// Render computes the ruleset. The same input gives the same output, whatever the order of its parts.
func Render(in Input) Output {
	r := newRenderer(in)
	r.base()
	for i := range in.Endpoints {
		r.endpoint(&in.Endpoints[i])
	}
	return r.output()
}
