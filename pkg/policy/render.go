package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go4.org/netipx"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// maxInlineRanges is how many address ranges of an ipBlock are written as rules. A rule costs about 22 ns for the first
// packet of a connection; an interval set costs more than that to load and cannot be loaded atomically with its rule.
const maxInlineRanges = 16

// maxProduct is up to how many rules the ports and peers of one rule are written out, each with each.
const maxProduct = 32

// minPortSet is the number of single ports from which on a set is cheaper than rules.
const minPortSet = 3

// renderer builds one ruleset. Its maps share what is equal: a policy's chain between pods, a selector's sets between
// policies.
type renderer struct {
	in       *Input
	table    *ruleset.Table
	device   *ruleset.Table // netdev companion: the chains of host veths
	peers    []peer
	policies map[string][]*compiled // by namespace, sorted by name
	chains   map[string]bool        // policy chains that have been rendered; false: has no rules
	verdicts map[string]Verdicts
	problems map[Problem]bool

	fill    func(*peerSet) // is called for each pair of peer sets that is new in table
	ingress jumper
	egress  func(list []*compiled) string // renders the chain of endpoints whose egress is under these policies, and returns its name
}

// jumper renders a policy's chain for the pod of an endpoint and returns the rule that jumps to it, or false when it has no rules.
type jumper func(c *compiled, pod *cluster.Pod) (ruleset.Rule, bool)

func newRenderer(in Input) *renderer {
	r := &renderer{
		in:       &in,
		table:    ruleset.NewTable(ruleset.TableID{Family: ruleset.Inet, Name: in.Options.Table}),
		device:   ruleset.NewTable(ruleset.TableID{Family: ruleset.Netdev, Name: in.Options.Table}),
		policies: map[string][]*compiled{},
		chains:   map[string]bool{},
		verdicts: map[string]Verdicts{},
		problems: map[Problem]bool{},
	}
	r.fill = r.fillSets
	r.ingress = func(c *compiled, pod *cluster.Pod) (ruleset.Rule, bool) { return jump(c, r.ingressChain(c, pod)) }
	r.egress = r.profileChain
	report := func(k cluster.Key, reason string) { r.problems[Problem{k, reason}] = true }
	r.peers = peers(&in, report)
	for p := range in.Model.Policies() {
		c := compile(p)
		for _, reason := range c.problems {
			report(p.Key(), reason)
		}
		r.policies[p.Namespace] = append(r.policies[p.Namespace], c)
	}
	for _, list := range r.policies {
		slices.SortFunc(list, func(a, b *compiled) int { return strings.Compare(a.name, b.name) })
	}
	return r
}

// jump is the rule of an endpoint's chain that calls a policy's.
func jump(c *compiled, chain string) (ruleset.Rule, bool) {
	if chain == "" {
		return ruleset.Rule{}, false
	}
	return ruleset.NewRule(ruleset.To(ruleset.Jump, chain)).WithComment(c.namespace + "/" + c.name), true
}

func (r *renderer) output() Output {
	out := Output{Ruleset: ruleset.Ruleset{r.table}, Endpoints: r.verdicts}
	if len(r.device.Chains) > 0 {
		out.Ruleset = append(out.Ruleset, r.device)
	}
	out.Problems = sortProblems(slices.Collect(maps.Keys(r.problems)))
	return out
}

func sortProblems(list []Problem) []Problem {
	slices.SortFunc(list, func(a, b Problem) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(list)
}

// endpoint renders one endpoint: closed when its pod is not known, else isolated in the directions that policies select.
func (r *renderer) endpoint(e *Endpoint) {
	if e.Pod == nil {
		verdict := Quarantined
		if e.Brief {
			verdict = drop
		} else {
			r.closedLink(e)
		}
		r.dispatch(e, mapEgress4, mapEgress6, verdict)
		r.dispatch(e, mapIngress4, mapIngress6, verdict)
		return
	}
	var in, out []*compiled
	for _, c := range r.policies[e.Pod.Namespace] {
		if !c.subject.Matches(labels.Set(e.Pod.Labels)) {
			continue
		}
		if c.ingress != nil {
			in = append(in, c)
		}
		if c.egress != nil {
			out = append(out, c)
		}
	}
	if in != nil {
		r.ingressEnd(e, in)
		r.dispatch(e, mapIngress4, mapIngress6, ruleset.To(ruleset.Goto, prefixIngress+e.ID))
		r.isolate(e, setIngressIsolated)
	}
	if out != nil {
		r.egressEnd(e, out)
		r.dispatch(e, mapEgress4, mapEgress6, ruleset.To(ruleset.Jump, prefixEgress+e.ID))
		r.isolate(e, setEgressIsolated)
	}
	r.openLink(e, in != nil, out != nil)
	r.verdicts[e.ID] = Verdicts{Ingress: policyNames(in), Egress: policyNames(out)}
}

func policyNames(list []*compiled) []string {
	var names []string
	for _, c := range list {
		names = append(names, c.namespace+"/"+c.name)
	}
	return names
}

// dispatch gives the endpoint's addresses a verdict.
func (r *renderer) dispatch(e *Endpoint, map4, map6 string, verdict ruleset.Verdict) {
	for _, ip := range e.IPs {
		m := map6
		if ip.Is4() {
			m = map4
		}
		r.table.Sets[m].Elements[ruleset.AddrElem(ip)] = verdict
	}
}

// ingressEnd renders the chain of an endpoint that is isolated for ingress. It is reached by goto, so its end is the end: what no policy
// accepted is denied.
func (r *renderer) ingressEnd(e *Endpoint, policies []*compiled) {
	rules := []ruleset.Rule{ruleset.NewRule(ruleset.NotNew, ruleset.To(ruleset.Jump, chainNotNew)).WithComment(e.Name + " ingress")}
	for _, p := range policies {
		if rule, ok := r.ingress(p, e.Pod); ok {
			rules = append(rules, rule)
		}
	}
	// A pod reaches itself through its own Service: at forward it is seen before the masquerade, with its own address on both sides. The
	// interface is part of the match, as IPv6 packets from the uplink may claim to be anybody.
	if iif := cmp.Or(e.Bridge, e.Link, e.Device); iif != "" {
		for _, ip := range e.IPs {
			rules = append(rules, ruleset.NewRule(ruleset.Cmp{Field: ruleset.IIFName, Value: iif}, ruleset.Address(saddr(ip), ip), accept))
		}
	}
	// No pod hides what another is denied: each is told at a rate of its own.
	var tell []ruleset.Rule
	if r.in.Options.Log {
		tell = append(tell, ruleset.NewRule(ruleset.Limit{PerSecond: logPerSecond, Burst: logBurst}, r.log(DirectionIngress, e.ID)))
	}
	r.chain(prefixIngress+e.ID, nil, rules, r.deny(tell))
}

// egressEnd renders the chain of an endpoint that is isolated for egress. It is reached by jump: what is allowed returns to the base chain, where
// the receiver is judged. What is not ends in the chain that it goes on to.
func (r *renderer) egressEnd(e *Endpoint, policies []*compiled) {
	rules := []ruleset.Rule{dropRule(ruleset.Invalid).WithComment(e.Name + " egress")}
	for _, ip := range e.IPs {
		rules = append(rules, ruleset.NewRule(ruleset.Address(daddr(ip), ip), allowed)) // itself, through its own Service
	}
	r.chain(prefixEgress+e.ID, nil, rules, []ruleset.Rule{ruleset.NewRule(ruleset.To(ruleset.Goto, r.egress(policies)))})
}

func (r *renderer) log(direction, id string) ruleset.Log {
	return ruleset.Log{Prefix: logPrefix(direction, id), Group: LogGroup, Snaplen: LogSnaplen}
}

// deny ends a chain. The rules of tell tell the daemon what is denied.
func (r *renderer) deny(tell []ruleset.Rule) []ruleset.Rule {
	switch {
	case r.in.Options.Reject:
		return append(tell,
			ruleset.NewRule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP), ruleset.Counter{}, ruleset.Reject{TCPReset: true}),
			ruleset.NewRule(ruleset.Counter{}, ruleset.Reject{}))
	case r.in.Options.Cut:
		tell = slices.Insert(tell, 0, ruleset.NewRule(ruleset.To(ruleset.Jump, chainDenied)))
	}
	return append(tell, ruleset.NewRule(ruleset.Counter{}, drop))
}

// profileChain renders the egress chain of endpoints that are under these policies, which are of one namespace, and returns its name. Policies
// without rules allow nothing.
func (r *renderer) profileChain(list []*compiled) string {
	var policies []*compiled
	var rules []ruleset.Rule
	for _, c := range list {
		if own := r.egressRules(c); len(own) > 0 {
			policies, rules = append(policies, c), append(rules, own...)
		}
	}
	if policies == nil {
		return chainUnsent
	}
	name := profileName(policies)
	r.table.Chains[name] = profile(name, rules)
	return name
}

func profileName(policies []*compiled) string {
	identity := []string{DirectionEgress}
	for _, c := range policies {
		identity = append(identity, c.namespace, c.name)
	}
	return prefixProfile + ID(identity...)
}

// profile is the egress chain of endpoints, with the rules of all their policies. They are written out in it, since a policy's own chain could
// return to it only, and an accept would not leave the packet to the receiver's policies.
func profile(name string, rules []ruleset.Rule) *ruleset.Chain {
	return &ruleset.Chain{Name: name, Rules: append(rules, ruleset.NewRule(ruleset.To(ruleset.Goto, chainUnsent)))}
}

// ingressName returns the name of the chain of a policy's ingress rules. Named ports are resolved on the receiving pod, so pods
// with other numbers get a chain of their own.
func ingressName(c *compiled, pod *cluster.Pod) (string, map[namedPort][]uint16) {
	identity := []string{"ingress", c.namespace, c.name}
	resolved := map[namedPort][]uint16{}
	for _, rule := range c.ingress.rules {
		for _, port := range rule.named {
			if _, done := resolved[port]; done {
				continue
			}
			resolved[port] = resolve(pod, port)
			identity = append(identity, protoName(port.proto), port.name)
			for _, n := range resolved[port] {
				identity = append(identity, strconv.Itoa(int(n)))
			}
		}
	}
	return prefixPolicyI + ID(identity...), resolved
}

// ingressChain renders a policy's ingress rules and returns the chain's name, or "" when it has no rules.
func (r *renderer) ingressChain(c *compiled, pod *cluster.Pod) string {
	name, resolved := ingressName(c, pod)
	full, done := r.chains[name]
	if !done {
		rules := distinct(c.ingress, func(rule *rule) []ruleset.Rule {
			numbers := slices.Clone(rule.ports)
			for _, port := range rule.named {
				for _, n := range resolved[port] {
					numbers = append(numbers, portRange{proto: port.proto, from: n, to: n})
				}
			}
			return r.product(rule, mergePorts(numbers), sources, accept)
		})
		full = len(rules) > 0
		r.chains[name] = full
		if full {
			r.chain(name, nil, rules)
		}
	}
	if !full {
		return ""
	}
	return name
}

// egressRules renders a policy's egress rules. The first of them names the policy.
func (r *renderer) egressRules(c *compiled) []ruleset.Rule {
	rules := distinct(c.egress, func(rule *rule) []ruleset.Rule {
		rules := r.product(rule, rule.ports, destinations, allowed)
		for _, port := range rule.named {
			for _, sets := range r.namedPeers(rule, port) {
				for i, fields := range [][]ruleset.Field{
					{ruleset.IPDaddr, ruleset.L4Proto, ruleset.Dport},
					{ruleset.IP6Daddr, ruleset.L4Proto, ruleset.Dport},
				} {
					rules = append(rules, ruleset.NewRule(ruleset.In{Fields: fields, Set: sets[i]}, allowed))
				}
			}
		}
		return rules
	})
	if len(rules) > 0 {
		rules[0] = rules[0].WithComment(c.namespace + "/" + c.name)
	}
	return rules
}

// namedPeers returns the set pairs of an egress rule's named port: it can only be reached on pods.
func (r *renderer) namedPeers(rule *rule, port namedPort) [][2]string {
	if rule.anyPeer {
		return [][2]string{r.namedPortSets(everyPod, nil, port)}
	}
	var pairs [][2]string
	for _, p := range rule.pods {
		pairs = append(pairs, r.namedPortSets(p, nil, port))
	}
	if len(rule.blocks.Ranges()) > 0 {
		pairs = append(pairs, r.namedPortSets(everyPod, rule.blocks, port))
	}
	return pairs
}

// distinct renders a policy's rules in a direction. Repetitions say nothing and are left out.
func distinct(d *direction, rulesOf func(*rule) []ruleset.Rule) []ruleset.Rule {
	var rules []ruleset.Rule
	seen := map[string]bool{}
	for i := range d.rules {
		for _, rule := range rulesOf(&d.rules[i]) {
			if !seen[rule.String()] {
				seen[rule.String()] = true
				rules = append(rules, rule)
			}
		}
	}
	return rules
}

// fieldPair is the address field of either family that a direction's peers are compared with.
type fieldPair [2]ruleset.Field

var (
	sources      = fieldPair{ruleset.IPSaddr, ruleset.IP6Saddr}
	destinations = fieldPair{ruleset.IPDaddr, ruleset.IP6Daddr}
)

// product renders a rule of a policy: its ports, each with each of its peers.
func (r *renderer) product(rule *rule, ports []portRange, fields fieldPair, verdict ruleset.Verdict) []ruleset.Rule {
	alternatives := r.portMatches(rule, ports)
	if len(alternatives) == 0 {
		return nil // named ports only: the sets of the peers' addresses would be for nobody
	}
	var rules []ruleset.Rule
	peers := r.peerMatches(rule, fields)
	if len(alternatives) > 1 && len(alternatives)*len(peers) > maxProduct {
		alternatives = r.portRangeMatches(ports, alternatives)
	}
	for _, port := range alternatives {
		for _, peer := range peers {
			rules = append(rules, ruleset.NewRule(slices.Concat(port, peer, []ruleset.Expr{verdict})...))
		}
	}
	return rules
}

// portRangeMatches returns alternatives that match the same ports, at most one for each protocol, for rules that have many peers as well: their
// rules are a sum then and not a product, which the author of a policy could make as large as he likes.
func (r *renderer) portRangeMatches(ports []portRange, alternatives [][]ruleset.Expr) [][]ruleset.Expr {
	byProto := map[cluster.Protocol][]portRange{}
	for _, p := range ports {
		byProto[p.proto] = append(byProto[p.proto], p)
	}
	if len(alternatives) <= len(byProto) {
		return alternatives
	}
	var matches [][]ruleset.Expr
	for _, proto := range slices.Sorted(maps.Keys(byProto)) {
		match := []ruleset.Expr{ruleset.Equal(ruleset.L4Proto, uint8(proto))}
		if !byProto[proto][0].every {
			match = append(match, ruleset.In{Fields: []ruleset.Field{ruleset.Dport}, Set: r.portRangeSet(byProto[proto])})
		}
		matches = append(matches, match)
	}
	return matches
}

// portMatches returns the alternatives that match a rule's ports; an empty list of expressions matches everything, ICMP too.
func (r *renderer) portMatches(rule *rule, ports []portRange) [][]ruleset.Expr {
	if rule.anyPort {
		return [][]ruleset.Expr{nil}
	}
	var matches [][]ruleset.Expr
	var singles []portRange
	for _, p := range ports {
		proto := ruleset.Equal(ruleset.L4Proto, uint8(p.proto))
		switch {
		case p.every:
			matches = append(matches, []ruleset.Expr{proto})
		case p.from == p.to:
			singles = append(singles, p)
		default:
			matches = append(matches, []ruleset.Expr{proto, ruleset.Between16(ruleset.Dport, p.from, p.to)})
		}
	}
	if len(singles) >= minPortSet {
		key := []ruleset.Field{ruleset.L4Proto, ruleset.Dport}
		return append(matches, []ruleset.Expr{ruleset.In{Fields: key, Set: r.portSet(singles)}})
	}
	for _, p := range singles {
		matches = append(matches, []ruleset.Expr{
			ruleset.Equal(ruleset.L4Proto, uint8(p.proto)), ruleset.Equal16(ruleset.Dport, p.from),
		})
	}
	return matches
}

// peerMatches returns the alternatives that match a rule's peers; no alternative matches nobody.
func (r *renderer) peerMatches(rule *rule, fields fieldPair) [][]ruleset.Expr {
	if rule.anyPeer {
		return [][]ruleset.Expr{nil}
	}
	var matches [][]ruleset.Expr
	for _, p := range rule.pods {
		for i, set := range r.peerSets(p) {
			matches = append(matches, []ruleset.Expr{ruleset.In{Fields: fields[i : i+1], Set: set}})
		}
	}
	ranges := byFamily(rule.blocks.Ranges())
	if len(ranges[0])+len(ranges[1]) > maxInlineRanges {
		for i, set := range r.blockSets(ranges) {
			if set != "" {
				matches = append(matches, []ruleset.Expr{ruleset.In{Fields: fields[i : i+1], Set: set}})
			}
		}
		return matches
	}
	for i, list := range ranges {
		for _, rg := range list {
			matches = append(matches, []ruleset.Expr{rangeMatch(fields[i], rg)})
		}
	}
	return matches
}

func byFamily(ranges []netipx.IPRange) [2][]netipx.IPRange {
	var families [2][]netipx.IPRange
	for _, rg := range ranges {
		i := 1
		if rg.From().Is4() {
			i = 0
		}
		families[i] = append(families[i], rg)
	}
	return families
}

func rangeMatch(f ruleset.Field, rg netipx.IPRange) ruleset.Expr {
	prefix, ok := rg.Prefix()
	switch {
	case ok && prefix.IsSingleIP():
		return ruleset.Address(f, rg.From())
	case ok:
		return ruleset.Prefix{Field: f, Prefix: prefix}
	}
	return ruleset.Range{Field: f, From: string(rg.From().AsSlice()), To: string(rg.To().AsSlice())}
}

func saddr(ip netip.Addr) ruleset.Field {
	if ip.Is4() {
		return ruleset.IPSaddr
	}
	return ruleset.IP6Saddr
}

func daddr(ip netip.Addr) ruleset.Field {
	if ip.Is4() {
		return ruleset.IPDaddr
	}
	return ruleset.IP6Daddr
}
