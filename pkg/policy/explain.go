package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// Explainer judges connections between any two parties of the cluster by the compiled policies that rulesets are rendered from, and
// tells which rule decides. Every pod is judged as its own node judges it. It is not safe for concurrent use.
type Explainer struct {
	in       Input
	closed   map[netip.Addr]bool
	owners   map[netip.Addr]*cluster.Pod
	ips      map[*cluster.Pod][]netip.Addr
	policies map[string][]*compiled // by namespace, those that were asked for
}

// NewExplainer looks at who has which address. Endpoints say it for this node; there need not be any.
func NewExplainer(in Input) *Explainer {
	x := &Explainer{
		in: in, closed: map[netip.Addr]bool{}, owners: map[netip.Addr]*cluster.Pod{}, ips: map[*cluster.Pod][]netip.Addr{},
		policies: map[string][]*compiled{},
	}
	for i := range in.Endpoints {
		if e := &in.Endpoints[i]; e.Pod == nil {
			for _, ip := range e.IPs {
				x.closed[ip] = true
			}
		}
	}
	for _, p := range peers(&in, func(cluster.Key, string) {}) {
		x.ips[p.pod] = p.ips
		for _, ip := range p.ips {
			x.owners[ip] = p.pod
		}
	}
	return x
}

// Party is one end of a connection.
type Party struct {
	Subject *cluster.Pod // whose policies hold at this end; nil: it is not a pod
	Peer    *cluster.Pod // what the selectors of others see; nil: nothing that a selector matches
	IP      netip.Addr   // invalid if it is not known: then no ipBlock matches
	Closed  bool         // attached to this node, and nobody knows what it may
}

// At returns who has an address.
func (x *Explainer) At(ip netip.Addr) Party {
	pod := x.owners[ip]
	return Party{Subject: pod, Peer: pod, IP: ip, Closed: x.closed[ip]}
}

// Parties returns a pod once for each of its addresses. A pod that has no address of its own is still somebody: without one if none is
// known (it is yet to get one), and as no peer if it is over or its addresses belong to others. On its host's network it is its host.
func (x *Explainer) Parties(pod *cluster.Pod) []Party {
	var list []Party
	for _, ip := range x.ips[pod] {
		list = append(list, Party{Subject: pod, Peer: pod, IP: ip})
	}
	switch {
	case list != nil:
	case pod.HostNetwork && len(pod.IPs) == 0:
		list = []Party{{}}
	case pod.HostNetwork:
		for _, ip := range pod.IPs {
			list = append(list, Party{IP: ip})
		}
	case pod.Terminal || len(pod.IPs) > 0:
		list = []Party{{Subject: pod}}
	default:
		list = []Party{{Subject: pod, Peer: pod}}
	}
	return list
}

// Flow is the first packet of a connection, after DNAT and before SNAT.
type Flow struct {
	From, To Party
	FromNode bool   // To runs on the node that is the sender
	ToNode   bool   // From runs on the node that is the receiver
	Proto    uint8  // ruleset.ProtoTCP and so on; others than the three that policies name stand for themselves
	Port     uint16 // destination port, if the protocol has any
}

// Side is what one end's policies say.
type Side struct {
	Allowed  bool     `json:"allowed"`
	Isolated bool     `json:"isolated"`
	Policies []string `json:"policies"`          // that isolate it, sorted namespace/name
	Matched  string   `json:"matched,omitempty"` // the first rule that allows: "namespace/name rule N", N as in spec.ingress[N]
	Reason   string   `json:"reason,omitempty"`  // what decided if it was no rule
	Missed   []string `json:"missed,omitempty"`  // if denied: the rules that there are, and what of them does not match
}

// Verdict is whether a connection is allowed: both sides have to agree.
type Verdict struct {
	Allowed bool `json:"allowed"`
	Egress  Side `json:"egress"`
	Ingress Side `json:"ingress"`
}

// Explain judges a connection.
func (x *Explainer) Explain(f Flow) Verdict {
	v := Verdict{Egress: x.egress(f), Ingress: x.ingress(f)}
	switch {
	case f.FromNode:
		v.Egress.pass("the node is not subject to policies")
		v.Ingress.pass("its own node always gets in")
	case f.From.Closed || f.To.Closed:
	case f.hairpin():
		v.Egress.pass("it is the pod itself")
		v.Ingress.pass("it is the pod itself")
	case f.ToNode && x.in.Options.AllowOwnNode:
		v.Egress.pass("--own-node-egress=allow exempts the own node")
	case f.ToNode && x.nodeDNS(f):
		v.Egress.pass("--node-dns exempts this address")
	}
	v.Allowed = v.Egress.Allowed && v.Ingress.Allowed
	return v
}

// pass allows whatever the policies say.
func (s *Side) pass(reason string) {
	s.Allowed, s.Matched, s.Reason, s.Missed = true, "", reason, nil
}

func (f *Flow) hairpin() bool {
	return f.From.Subject != nil && f.From.Subject == f.To.Subject
}

func (x *Explainer) nodeDNS(f Flow) bool {
	return f.Port == 53 && (f.Proto == ruleset.ProtoTCP || f.Proto == ruleset.ProtoUDP) && slices.Contains(x.in.Options.NodeDNS, f.To.IP)
}

func (x *Explainer) egress(f Flow) Side {
	if f.From.Closed {
		return closedSide
	}
	s := x.side(x.isolating(f.From.Subject, egressOf), egressOf, f.To, f.To.Peer, f)
	if s.Isolated && beyondPolicy(f.To.IP) {
		s.deny("an isolated pod sends nothing but neighbour discovery and DHCP to broadcast, multicast and link-local addresses")
	}
	return s
}

func (x *Explainer) ingress(f Flow) Side {
	if f.To.Closed {
		return closedSide
	}
	s := x.side(x.isolating(f.To.Subject, ingressOf), ingressOf, f.From, f.To.Subject, f)
	if s.Isolated && linkLocal.Contains(f.From.IP) {
		s.deny("an isolated pod gets nothing but neighbour discovery and DHCP from link-local addresses")
	}
	return s
}

var closedSide = Side{Isolated: true, Policies: []string{}, Reason: "it is closed until its pod is known"}

func (s *Side) deny(reason string) {
	s.Allowed, s.Matched, s.Reason, s.Missed = false, "", reason, nil
}

// beyondPolicy tells the addresses that isolation closes whatever a rule says (docs/semantics.md, "No rules, an empty rule").
func beyondPolicy(ip netip.Addr) bool {
	return linkLocal.Contains(ip) || ip.IsMulticast() || ip == broadcast
}

// way is one of the two directions of policies.
type way func(*compiled) *direction

func egressOf(c *compiled) *direction  { return c.egress }
func ingressOf(c *compiled) *direction { return c.ingress }

// isolating returns the policies that isolate a pod in one direction, by name.
func (x *Explainer) isolating(pod *cluster.Pod, of way) []*compiled {
	if pod == nil {
		return nil
	}
	all, known := x.policies[pod.Namespace]
	if !known {
		for p := range x.in.Model.PoliciesIn(pod.Namespace) {
			all = append(all, compile(p))
		}
		slices.SortFunc(all, func(a, b *compiled) int { return strings.Compare(a.name, b.name) })
		x.policies[pod.Namespace] = all
	}
	var list []*compiled
	for _, c := range all {
		if of(c) != nil && c.subject.Matches(labels.Set(pod.Labels)) {
			list = append(list, c)
		}
	}
	return list
}

// mostMissed bounds what is said about rules that do not match.
const mostMissed = 20

// side judges by the rules of policies. named is the pod on which port names are looked up: the receiver.
func (x *Explainer) side(policies []*compiled, of way, other Party, named *cluster.Pod, f Flow) Side {
	s := Side{Allowed: policies == nil, Isolated: policies != nil, Policies: append([]string{}, policyNames(policies)...)}
	left := 0
	for _, c := range policies {
		name := c.namespace + "/" + c.name
		rules := of(c).rules
		if len(rules) == 0 {
			s.Missed = append(s.Missed, name+" has no rules")
		}
		for i := range rules {
			rule := &rules[i]
			peer, port := x.matchesPeer(rule, other), matchesPort(rule, named, f)
			if peer && port {
				s.Allowed, s.Matched, s.Missed = true, ruleName(c, i), nil
				return s
			}
			why := ": neither peer nor port match"
			switch {
			case peer:
				why = ": the peer matches, the port does not"
			case port && !other.IP.IsValid() && len(rule.blocks.Ranges()) > 0:
				why = ": the port matches; of the peers no selector does, and its ipBlocks cannot be judged without an address"
			case port:
				why = ": the port matches, the peer does not"
			}
			if len(s.Missed) < mostMissed {
				s.Missed = append(s.Missed, ruleName(c, i)+why)
			} else {
				left++
			}
		}
	}
	if left > 0 {
		s.Missed = append(s.Missed, fmt.Sprintf("and %d more rules", left))
	}
	return s
}

func ruleName(c *compiled, i int) string {
	return fmt.Sprintf("%s/%s rule %d", c.namespace, c.name, i)
}

func (x *Explainer) matchesPeer(rule *rule, other Party) bool {
	if rule.anyPeer || other.IP.IsValid() && rule.blocks.Contains(other.IP) {
		return true
	}
	return other.Peer != nil && slices.ContainsFunc(rule.pods, func(p podPeer) bool { return p.selects(x.in.Model, other.Peer) })
}

func (p podPeer) selects(m *cluster.Model, pod *cluster.Pod) bool {
	if p.namespaces == nil && pod.Namespace != p.namespace {
		return false
	}
	return (p.namespaces == nil || p.namespaces.Matches(labels.Set(m.NamespaceLabels(pod.Namespace)))) && p.pods.Matches(labels.Set(pod.Labels))
}

func matchesPort(rule *rule, named *cluster.Pod, f Flow) bool {
	if rule.anyPort {
		return true
	}
	return slices.ContainsFunc(portsOf(rule, named), func(p portRange) bool {
		return uint8(p.proto) == f.Proto && (p.every || p.from <= f.Port && f.Port <= p.to)
	})
}

// portsOf are the ports of a rule with the names as they are on a pod, which may be nil.
func portsOf(rule *rule, named *cluster.Pod) []portRange {
	ports := slices.Clone(rule.ports)
	for _, n := range rule.named {
		if named == nil {
			break
		}
		for _, number := range resolve(named, n) {
			ports = append(ports, portRange{proto: n.proto, from: number, to: number})
		}
	}
	return ports
}

// Ports is a set of protocols and ports. Everything has ICMP, and all other protocols, in it.
type Ports struct {
	Everything bool
	ranges     []portRange // sorted, disjoint
}

// Ports returns what policies allow between two parties, whatever f says of protocol and port.
func (x *Explainer) Ports(f Flow) Ports {
	switch {
	case f.FromNode:
		return Ports{Everything: true}
	case f.From.Closed || f.To.Closed:
		return Ports{}
	case f.hairpin():
		return Ports{Everything: true}
	}
	out := Ports{Everything: true}
	if !f.ToNode || !x.in.Options.AllowOwnNode {
		if out = x.open(x.isolating(f.From.Subject, egressOf), egressOf, f.To, f.To.Peer); beyondPolicy(f.To.IP) && x.isolating(f.From.Subject, egressOf) != nil {
			out = Ports{}
		}
		if f.ToNode && slices.Contains(x.in.Options.NodeDNS, f.To.IP) {
			out.add(portRange{proto: cluster.TCP, from: 53, to: 53}, portRange{proto: cluster.UDP, from: 53, to: 53})
		}
	}
	in := x.open(x.isolating(f.To.Subject, ingressOf), ingressOf, f.From, f.To.Subject)
	if linkLocal.Contains(f.From.IP) && x.isolating(f.To.Subject, ingressOf) != nil {
		in = Ports{}
	}
	return out.and(in)
}

// open is the union of what the rules allow to (or from) another.
func (x *Explainer) open(policies []*compiled, of way, other Party, named *cluster.Pod) Ports {
	if policies == nil {
		return Ports{Everything: true}
	}
	var p Ports
	for _, c := range policies {
		for i := range of(c).rules {
			if rule := &of(c).rules[i]; x.matchesPeer(rule, other) {
				p.Everything = p.Everything || rule.anyPort
				p.add(portsOf(rule, named)...)
			}
		}
	}
	return p
}

func (p *Ports) add(ranges ...portRange) { p.ranges = mergePorts(append(p.ranges, ranges...)) }

// Empty reports whether nothing is in it.
func (p Ports) Empty() bool { return !p.Everything && len(p.ranges) == 0 }

func (p Ports) and(q Ports) Ports {
	switch {
	case p.Everything && q.Everything:
		return p
	case p.Everything:
		return Ports{ranges: q.ranges}
	case q.Everything:
		return Ports{ranges: p.ranges}
	}
	var both Ports
	for _, a := range p.ranges {
		for _, b := range q.ranges {
			switch {
			case a.proto != b.proto:
			case a.every:
				both.add(b)
			case b.every:
				both.add(a)
			case max(a.from, b.from) <= min(a.to, b.to):
				both.add(portRange{proto: a.proto, from: max(a.from, b.from), to: min(a.to, b.to)})
			}
		}
	}
	return both
}

// Has reports whether a protocol's port is in the set.
func (p Ports) Has(proto uint8, port uint16) bool {
	return p.Everything || slices.ContainsFunc(p.ranges, func(r portRange) bool {
		return uint8(r.proto) == proto && (r.every || r.from <= port && port <= r.to)
	})
}

// String lists the ports as they are written on a command line: "80,8000-8010,53/udp,*/sctp"; "all" and "-" are everything and nothing.
func (p Ports) String() string {
	if p.Everything {
		return "all"
	}
	if len(p.ranges) == 0 {
		return "-"
	}
	list := make([]string, len(p.ranges))
	for i, r := range p.ranges {
		switch {
		case r.every:
			list[i] = "*"
		case r.from == r.to:
			list[i] = fmt.Sprint(r.from)
		default:
			list[i] = fmt.Sprintf("%d-%d", r.from, r.to)
		}
		if r.proto != cluster.TCP || r.every {
			list[i] += "/" + protoName(r.proto)
		}
	}
	return strings.Join(list, ",")
}
