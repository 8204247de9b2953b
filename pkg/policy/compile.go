package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	netutils "k8s.io/utils/net"

	"github.com/podwall/podwall/pkg/cluster"
)

// compiled is a policy with its defaults filled in and its selectors, blocks and ports parsed.
type compiled struct {
	namespace, name string
	subject         matcher
	ingress, egress *direction // nil: the policy does not concern this direction
	problems        []string

	chain     string               // the name of the ingress chain, once known; none with named ports
	fragments map[string]*fragment // of an Engine: of the ingress chains, by name, and of the egress rules
}

// ingressName returns the name of the policy's ingress chain for a pod.
func (c *compiled) ingressName(pod *cluster.Pod) string {
	if c.chain != "" {
		return c.chain
	}
	n, _ := ingressName(c, pod)
	if !slices.ContainsFunc(c.ingress.rules, func(r rule) bool { return r.named != nil }) {
		c.chain = n
	}
	return n
}

// breadth is 1 for a policy that selects all pods of its namespace, and 0 for others.
func (c *compiled) breadth() int {
	if s, ok := c.subject.(labels.Selector); ok && s.Empty() {
		return 1
	}
	return 0
}

// matcher is what a selector does.
type matcher interface{ Matches(labels.Labels) bool }

// direction is one policy's rules in one direction; no rules deny everything.
type direction struct{ rules []rule }

// rule allows what matches both its ports and its peers.
type rule struct {
	anyPeer bool
	pods    []podPeer
	blocks  *netipx.IPSet // union of the ipBlock peers, excepts cut out of their own block only

	anyPort bool
	ports   []portRange
	named   []namedPort
}

// podPeer selects pods: of the policy's own namespace, or of the namespaces that a selector matches.
type podPeer struct {
	namespace  string          // set when there is no namespaceSelector
	namespaces labels.Selector // nil when namespace is set
	pods       labels.Selector
}

// portRange is a protocol with an inclusive range of destination ports; every is all of them.
type portRange struct {
	proto    cluster.Protocol
	every    bool
	from, to uint16
}

// namedPort is resolved on the pod that receives the connection.
type namedPort struct {
	proto cluster.Protocol
	name  string
}

func compile(p *cluster.Policy) *compiled {
	c := &compiled{namespace: p.Namespace, name: p.Name}
	if p.Unreadable != "" {
		c.problem("cannot be read (%s): it allows nothing", p.Unreadable)
	}
	exact := c.subjectSelector(&p.Spec.PodSelector)
	in, out := c.types(&p.Spec)
	if in {
		c.ingress = &direction{}
		for i, r := range p.Spec.Ingress {
			c.ingress.rules = append(c.ingress.rules, c.rule(fmt.Sprintf("ingress rule %d", i), r.From, r.Ports))
		}
	}
	if out {
		c.egress = &direction{}
		for i, r := range p.Spec.Egress {
			c.egress.rules = append(c.egress.rules, c.rule(fmt.Sprintf("egress rule %d", i), r.To, r.Ports))
		}
	}
	if !exact {
		// It may select pods that its author did not mean: they are closed by it, and opened by none of its rules.
		for _, d := range []*direction{c.ingress, c.egress} {
			if d != nil {
				d.rules = nil
			}
		}
	}
	return c
}

func (c *compiled) problem(format string, args ...any) {
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

// types applies the API's defaulting (pkg/apis/networking/v1/defaults.go): empty and absent are the same. An unknown type
// isolates both ways, since what it means cannot be known.
func (c *compiled) types(spec *networkingv1.NetworkPolicySpec) (bool, bool) {
	if len(spec.PolicyTypes) == 0 {
		return true, len(spec.Egress) > 0
	}
	ingress, egress := false, false
	for _, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			ingress = true
		case networkingv1.PolicyTypeEgress:
			egress = true
		default:
			c.problem("unknown policyType %q: both directions are isolated", t)
			ingress, egress = true, true
		}
	}
	return ingress, egress
}

func (c *compiled) rule(where string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) rule {
	r := rule{anyPeer: len(peers) == 0, anyPort: len(ports) == 0}
	var blocks netipx.IPSetBuilder
	for i := range peers {
		c.peer(fmt.Sprintf("%s, peer %d", where, i), &peers[i], &r, &blocks)
	}
	r.blocks, _ = blocks.IPSet() // fails only for invalid prefixes, which addBlock refuses
	for i := range ports {
		c.port(fmt.Sprintf("%s, port %d", where, i), &ports[i], &r)
	}
	r.ports = mergePorts(r.ports)
	return r
}

func (c *compiled) peer(where string, p *networkingv1.NetworkPolicyPeer, r *rule, blocks *netipx.IPSetBuilder) {
	selectors := p.PodSelector != nil || p.NamespaceSelector != nil
	switch {
	case p.IPBlock != nil && selectors:
		c.problem("%s: has both an ipBlock and a selector: it matches nothing", where)
	case p.IPBlock != nil:
		if err := addBlock(p.IPBlock, blocks); err != nil {
			c.problem("%s: %v: it matches nothing", where, err)
		}
	case selectors:
		peer := podPeer{pods: labels.Everything()}
		var err error
		if p.PodSelector != nil {
			if peer.pods, err = metav1.LabelSelectorAsSelector(p.PodSelector); err != nil {
				c.problem("%s: podSelector: %v: it matches nothing", where, err)
				return
			}
		}
		if p.NamespaceSelector == nil {
			peer.namespace = c.namespace
		} else if peer.namespaces, err = metav1.LabelSelectorAsSelector(p.NamespaceSelector); err != nil {
			c.problem("%s: namespaceSelector: %v: it matches nothing", where, err)
			return
		}
		r.pods = append(r.pods, peer)
	default:
		c.problem("%s: is empty: it matches nothing", where)
	}
}

// addBlock adds cidr minus its excepts. The excepts are cut out of a set of their own first: they narrow this peer only,
// another one may allow the same address.
func addBlock(b *networkingv1.IPBlock, to *netipx.IPSetBuilder) error {
	cidr, err := parseCIDR(b.CIDR)
	if err != nil {
		return fmt.Errorf("ipBlock cidr: %w", err)
	}
	var own netipx.IPSetBuilder
	own.AddPrefix(cidr)
	for _, e := range b.Except {
		except, err := parseCIDR(e)
		if err != nil {
			return fmt.Errorf("ipBlock except: %w", err)
		}
		own.RemovePrefix(except)
	}
	set, err := own.IPSet()
	if err != nil {
		return fmt.Errorf("ipBlock %s: %w", b.CIDR, err)
	}
	to.AddSet(set)
	return nil
}

// parseCIDR reads a CIDR as the API server does: host bits and leading zeros are legal in stored objects, and an IPv4-mapped
// prefix is an IPv4 one.
func parseCIDR(s string) (netip.Prefix, error) {
	_, ipnet, err := netutils.ParseCIDRSloppy(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is not a CIDR such as 10.0.0.0/8 or fd00::/8", s)
	}
	ip, _ := netip.AddrFromSlice(ipnet.IP)
	ones, bits := ipnet.Mask.Size()
	if ip.Is4In6() && bits == 128 && ones >= 96 {
		ip, ones = ip.Unmap(), ones-96
	}
	return netip.PrefixFrom(ip, ones).Masked(), nil
}

// port adds one entry of ports[]. What cannot be used adds nothing; the rule does not become one without ports by that.
func (c *compiled) port(where string, p *networkingv1.NetworkPolicyPort, r *rule) {
	proto := cluster.TCP
	if p.Protocol != nil {
		switch *p.Protocol {
		case "TCP":
		case "UDP":
			proto = cluster.UDP
		case "SCTP":
			proto = cluster.SCTP
		default:
			c.problem("%s: protocol %q is not TCP, UDP or SCTP: it matches nothing", where, *p.Protocol)
			return
		}
	}
	switch {
	case p.Port == nil && p.EndPort != nil:
		c.problem("%s: endPort without port: it matches nothing", where)
	case p.Port == nil:
		r.ports = append(r.ports, portRange{proto: proto, every: true})
	case p.Port.Type != 0 && p.EndPort != nil:
		c.problem("%s: endPort %d with the named port %q: it matches nothing", where, *p.EndPort, p.Port.StrVal)
	case p.Port.Type != 0 && !strings.ContainsFunc(p.Port.StrVal, func(r rune) bool { return 'a' <= r && r <= 'z' }):
		c.problem("%s: %q is no port name (those have a letter, a-z): it matches nothing; a number is written without quotes", where, p.Port.StrVal)
	case p.Port.Type != 0:
		if n := (namedPort{proto, p.Port.StrVal}); !slices.Contains(r.named, n) {
			r.named = append(r.named, n)
		}
	default:
		end := p.Port.IntVal
		if p.EndPort != nil {
			end = *p.EndPort
		}
		if p.Port.IntVal < 1 || end < p.Port.IntVal || end > 65535 {
			c.problem("%s: ports %d to %d are not a range within 1-65535: it matches nothing", where, p.Port.IntVal, end)
			return
		}
		r.ports = append(r.ports, portRange{proto: proto, from: uint16(p.Port.IntVal), to: uint16(end)}) //nolint:gosec // checked above
	}
}

// mergePorts sorts ranges and joins those of one protocol that overlap or touch.
func mergePorts(ports []portRange) []portRange {
	slices.SortFunc(ports, comparePorts)
	merged := ports[:0]
	for _, p := range ports {
		if n := len(merged); n > 0 && merged[n-1].proto == p.proto {
			last := &merged[n-1]
			if last.every {
				continue
			}
			if int(p.from) <= int(last.to)+1 {
				last.to = max(last.to, p.to)
				continue
			}
		}
		merged = append(merged, p)
	}
	return merged
}

func comparePorts(a, b portRange) int {
	switch {
	case a.proto != b.proto:
		return int(a.proto) - int(b.proto)
	case a.every != b.every:
		if a.every {
			return -1
		}
		return 1
	case a.from != b.from:
		return int(a.from) - int(b.from)
	}
	return int(a.to) - int(b.to)
}

// subjectSelector parses spec.podSelector. One that does not parse (objects stored before label values were validated, files) is
// compared as it is written. It reports false when a part has no meaning at all and was left out, so that the selector matches
// too much.
func (c *compiled) subjectSelector(s *metav1.LabelSelector) bool {
	sel, err := metav1.LabelSelectorAsSelector(s)
	if err == nil {
		c.subject = sel
		return true
	}
	c.subject = literal{s}
	if slices.ContainsFunc(s.MatchExpressions, meaningless) {
		c.problem("podSelector: %v: what is left of it selects pods that this policy closes and does not open", err)
		return false
	}
	c.problem("podSelector: %v: it is compared as it is written", err)
	return true
}

// literal matches labels by a selector that the API server would refuse, character by character: behind an API server no pod can
// have such labels, but files are not validated by one. What has no meaning matches.
type literal struct{ *metav1.LabelSelector }

func (l literal) Matches(have labels.Labels) bool {
	for k, v := range l.MatchLabels {
		if !have.Has(k) || have.Get(k) != v {
			return false
		}
	}
	for _, e := range l.MatchExpressions {
		in := have.Has(e.Key) && slices.Contains(e.Values, have.Get(e.Key))
		switch {
		case meaningless(e):
		case e.Operator == metav1.LabelSelectorOpIn && !in,
			e.Operator == metav1.LabelSelectorOpNotIn && in,
			e.Operator == metav1.LabelSelectorOpExists && !have.Has(e.Key),
			e.Operator == metav1.LabelSelectorOpDoesNotExist && have.Has(e.Key):
			return false
		}
	}
	return true
}

// meaningless reports whether it cannot be said what an expression selects.
func meaningless(e metav1.LabelSelectorRequirement) bool {
	switch e.Operator {
	case metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn:
		return len(e.Values) == 0
	case metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist:
		return len(e.Values) > 0
	}
	return true
}
