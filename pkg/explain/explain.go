// Package explain answers operators: whether policies allow a connection and why, who may reach whom, and what is wrong with a directory of
// policies. What a policy means is pkg/policy's to say.
package explain

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// World is what questions are about.
type World struct {
	Model     *cluster.Model
	Endpoints []policy.Endpoint // of this node; none if the question is asked without a daemon
	Options   policy.Options
	Node      string              // the name of this node, if it is one
	Addresses map[netip.Addr]bool // this node's own
}

// Port is a destination: a protocol and, if it has ports, one of them.
type Port struct {
	Proto  uint8
	Number uint16
}

var protocols = map[string]uint8{"tcp": ruleset.ProtoTCP, "udp": ruleset.ProtoUDP, "sctp": ruleset.ProtoSCTP}

// ParsePort reads PORT[/PROTO], or icmp.
func ParsePort(s string) (Port, error) {
	if s == "icmp" {
		return Port{Proto: ruleset.ProtoICMP}, nil
	}
	number, name, found := strings.Cut(s, "/")
	if !found {
		name = "tcp"
	}
	proto, ok := protocols[strings.ToLower(name)]
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 || !ok {
		return Port{}, fmt.Errorf("port %q: want a number from 1 to 65535 with /tcp, /udp or /sctp behind it (tcp if absent), or icmp", s)
	}
	return Port{Proto: proto, Number: uint16(n)}, nil
}

// String is the form that ParsePort reads.
func (p Port) String() string {
	for name, proto := range protocols {
		if proto == p.Proto {
			return fmt.Sprintf("%d/%s", p.Number, name)
		}
	}
	return "icmp"
}

// Answer is the answer to one question. The sides are those of the first pair of addresses that is denied, else of the first.
type Answer struct {
	From string `json:"from"`
	To   string `json:"to"`
	Port string `json:"port"`
	policy.Verdict
	Addresses []AddressPair `json:"addresses"` // all that the two have in common, by family
	Notes     []string      `json:"notes,omitempty"`
}

// AddressPair is one way to reach somebody.
type AddressPair struct {
	From    string `json:"from"` // empty if it is not known
	To      string `json:"to"`
	Allowed bool   `json:"allowed"`
}

// Asker answers questions about one world.
type Asker struct {
	world     World
	x         *policy.Explainer
	endpoints map[string][]*policy.Endpoint // by namespace/name
}

// NewAsker looks at who has which address.
func NewAsker(w World) *Asker {
	a := &Asker{
		world: w, endpoints: map[string][]*policy.Endpoint{},
		x: policy.NewExplainer(policy.Input{Model: w.Model, Endpoints: w.Endpoints, Options: w.Options}),
	}
	for i := range w.Endpoints {
		e := &w.Endpoints[i]
		a.endpoints[e.Name] = append(a.endpoints[e.Name], e)
	}
	return a
}

// party is somebody who was asked about.
type party struct {
	name string
	ends []policy.Party
	// on is the node that a pod runs on, and host says that the party is that node itself. Both may be unknown.
	on    string
	host  bool
	notes []string
}

// UnknownError is a pod that there is none of.
type UnknownError struct{ Name string }

// Error implements error.
func (e *UnknownError) Error() string {
	return fmt.Sprintf("pod %s is not known; podwalld pods lists those of this node, an IP address can be asked about as well", e.Name)
}

// CheckParty reports whether somebody can be called that.
func CheckParty(s string) error {
	if ip, err := netip.ParseAddr(s); err == nil && ip.Zone() == "" {
		return nil
	}
	if namespace, name, found := strings.Cut(s, "/"); !found || namespace == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("%q is neither namespace/pod, such as shop/web, nor an IP address", s)
	}
	return nil
}

// party finds namespace/pod or an IP.
func (a *Asker) party(s string) (*party, error) {
	if err := CheckParty(s); err != nil {
		return nil, err
	}
	if ip, err := netip.ParseAddr(s); err == nil {
		return a.address(ip.Unmap()), nil
	}
	namespace, name, _ := strings.Cut(s, "/")
	pod := a.world.Model.Pod(namespace, name)
	if list := a.endpoints[s]; list != nil {
		p := &party{name: s, on: a.world.Node}
		for _, e := range list {
			for _, ip := range e.IPs {
				p.ends = append(p.ends, a.x.At(ip))
			}
		}
		if p.ends != nil {
			return p, nil
		}
	}
	if pod == nil {
		return nil, &UnknownError{s}
	}
	return a.pod(pod), nil
}

func (a *Asker) pod(pod *cluster.Pod) *party {
	p := &party{name: pod.Namespace + "/" + pod.Name, ends: a.x.Parties(pod), on: pod.Node}
	note := func(format string, args ...any) {
		p.notes = append(p.notes, p.name+" "+fmt.Sprintf(format, args...))
	}
	switch {
	case pod.HostNetwork:
		p.host = true
		note("is on its host's network: to policies it is its node, no selector selects it")
		if len(pod.IPs) == 0 {
			note("has no status.podIPs: what ipBlocks say of its node cannot be judged")
		}
	case pod.Terminal:
		note("is over (Succeeded or Failed): no selector of others selects it any more; what its own policies say holds until its sandbox is gone")
	case len(pod.IPs) == 0:
		note("has no status.podIPs: it is judged by selectors, and what ipBlocks say of it is not known")
	case !p.ends[0].IP.IsValid():
		note("has no address of its own: newer pods, or pods of this node, have %s; no selector of others selects it", join(pod.IPs))
	}
	return p
}

func (a *Asker) address(ip netip.Addr) *party {
	end := a.x.At(ip)
	p := &party{name: ip.String(), ends: []policy.Party{end}}
	if pod := end.Subject; pod != nil {
		p.on = pod.Node
		if a.endpoints[nameOf(pod)] != nil {
			p.on = a.world.Node
		}
		p.notes = append(p.notes, fmt.Sprintf("%s is the address of the pod %s", ip, nameOf(pod)))
		return p
	}
	if a.world.Addresses[ip] {
		p.on, p.host = a.world.Node, true
		p.notes = append(p.notes, fmt.Sprintf("%s is an address of this node", ip))
		return p
	}
	var hosted []string
	for pod := range a.world.Model.Pods() {
		if pod.HostNetwork && slices.Contains(pod.IPs, ip) {
			hosted = append(hosted, nameOf(pod))
			p.on, p.host = cmp.Or(p.on, pod.Node), true
		}
	}
	switch {
	case end.Closed:
		p.on = a.world.Node
	case hosted != nil:
		slices.Sort(hosted)
		p.notes = append(p.notes, fmt.Sprintf("%s is the address of a node: %s is on its network", ip, hosted[0]))
	default:
		p.notes = append(p.notes, fmt.Sprintf("%s is no pod's address: only ipBlocks, and rules without peers, can be about it", ip))
	}
	return p
}

func nameOf(p *cluster.Pod) string { return p.Namespace + "/" + p.Name }

func join(ips []netip.Addr) string {
	text := make([]string, len(ips))
	for i, ip := range ips {
		text[i] = ip.String()
	}
	return strings.Join(text, ", ")
}

// flows are the ways from one party to another, one for each pair of addresses of one family.
func flows(from, to *party) []policy.Flow {
	var list []policy.Flow
	same := from.on != "" && from.on == to.on
	for _, f := range from.ends {
		for _, t := range to.ends {
			if f.IP.IsValid() && t.IP.IsValid() && f.IP.Is4() != t.IP.Is4() {
				continue
			}
			list = append(list, policy.Flow{From: f, To: t, FromNode: from.host && same, ToNode: to.host && same})
		}
	}
	return list
}

// Explain says whether a connection is allowed, and why.
func (a *Asker) Explain(from, to string, port Port) (*Answer, error) {
	f, err := a.party(from)
	if err != nil {
		return nil, fmt.Errorf("FROM: %w", err)
	}
	t, err := a.party(to)
	if err != nil {
		return nil, fmt.Errorf("TO: %w", err)
	}
	list := flows(f, t)
	if list == nil {
		return nil, fmt.Errorf("%s and %s have no address family in common: nothing can be sent from one to the other", from, to)
	}
	answer := &Answer{From: from, To: to, Port: port.String()}
	for i, flow := range list {
		flow.Proto, flow.Port = port.Proto, port.Number
		v := a.x.Explain(flow)
		if i == 0 || answer.Allowed && !v.Allowed {
			answer.Verdict = v
		}
		answer.Addresses = append(answer.Addresses, AddressPair{From: ipText(flow.From.IP), To: ipText(flow.To.IP), Allowed: v.Allowed})
	}
	answer.Notes = slices.Concat(f.notes, t.notes)
	if f.host && f.on == "" || t.host && t.on == "" {
		answer.Notes = append(answer.Notes, "the node is not known to be another one (spec.nodeName): a pod's own node always gets in")
	}
	for _, end := range []struct {
		*party
		side *policy.Side
		way  string
	}{{f, &answer.Egress, "egress"}, {t, &answer.Ingress, "ingress"}} {
		if end.ends[0].Subject == nil && !end.host && end.side.Reason == "" {
			end.side.Reason = "it is not a pod"
		}
	}
	return answer, nil
}

func ipText(ip netip.Addr) string {
	if !ip.IsValid() {
		return ""
	}
	return ip.String()
}

// Text is the answer as one paragraph.
func (a *Answer) Text() string {
	verdict := "allowed"
	if !a.Allowed {
		verdict = "denied"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s to %s on %s is %s.", a.From, a.To, a.Port, verdict)
	if len(a.Addresses) > 1 && slices.ContainsFunc(a.Addresses, func(p AddressPair) bool { return p.Allowed != a.Addresses[0].Allowed }) {
		b.WriteString(" It depends on the address:")
		for i, p := range a.Addresses {
			sep := ""
			if i > 0 {
				sep = ","
			}
			word := "denied"
			if p.Allowed {
				word = "allowed"
			}
			fmt.Fprintf(&b, "%s %s to %s is %s", sep, cmp.Or(p.From, a.From), cmp.Or(p.To, a.To), word)
		}
		b.WriteString("; this is why it is denied.")
	}
	fmt.Fprintf(&b, "\nEgress of %s: %s.\nIngress of %s: %s.\n", a.From, sideText(&a.Egress), a.To, sideText(&a.Ingress))
	for _, n := range a.Notes {
		fmt.Fprintf(&b, "Note: %s.\n", n)
	}
	return b.String()
}

func sideText(s *policy.Side) string {
	by := "isolated by " + strings.Join(s.Policies, ", ")
	word := "denied"
	if s.Allowed {
		word = "allowed"
	}
	switch {
	case s.Reason != "" && len(s.Policies) > 0:
		return by + "; " + word + ", since " + s.Reason
	case s.Reason != "":
		return word + ", since " + s.Reason
	case !s.Isolated:
		return "allowed, since no policy isolates it"
	case s.Matched != "":
		return by + "; allowed by " + s.Matched
	}
	return by + "; denied, since no rule matches (" + strings.Join(s.Missed, "; ") + ")"
}
