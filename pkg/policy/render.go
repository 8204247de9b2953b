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

// mostInline is up to how many egress rules of a policy are copied to each set of policies that it is in, and mostGotos how many larger ones have
// a chain each: the kernel goes 16 chains deep (NFT_JUMP_STACK_SIZE), of which podwall has six, and one more where there are more.
const (
	mostInline = 32
	mostGotos  = 8
)

// renderer builds one ruleset. Its maps share what is equal: a policy's chain between pods, a selector's sets between
// policies.
type renderer struct {
	in       *Input
	table    *ruleset.Table
	device   *ruleset.Table // netdev companion: the chains of host veths
	peers    []peer
	policies map[string][]*compiled // by namespace, sorted by name
	chains   map[string]bool        // policy chains that have been rendered; false: has no rules
	sent     map[*compiled]*sending // egress rules that have been rendered
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
		sent:     map[*compiled]*sending{},
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
		r.dispatch(e, mapIngress4, mapIngress6, ruleset.To(ruleset.Jump, prefixIngress+e.ID))
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

// ingressEnd renders the chain of an endpoint that is isolated for ingress. It does not return: what no policy accepted is denied.
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

// sending are the egress rules of one policy.
type sending struct {
	of    *compiled
	rules []ruleset.Rule
}

// profile is a chain with the egress rules of some policies. It goes on to the chain next.
type profile struct {
	name, next string
	policies   []sending
}

// profiles lays out the egress rules of the policies that an endpoint is under, which are of one namespace and sorted by name: in chains of which
// each goes on to the next. They are written out, as a policy's own chain could return to its caller only, and an accept would not leave the
// packet to the receiver's policies. So a set of policies has the rules of all that are in it, but for a few large ones: each of those
// has a chain that all share who go on from it to the same ones. The ones that select all pods come last, and else the largest.
func profiles(list []sending) []profile {
	var inline, large []sending
	for _, p := range list {
		switch {
		case len(p.rules) > mostInline:
			large = append(large, p)
		case len(p.rules) > 0: // else it allows nothing
			inline = append(inline, p)
		}
	}
	slices.SortStableFunc(large, func(a, b sending) int {
		return cmp.Or(cmp.Compare(a.of.breadth(), b.of.breadth()), cmp.Compare(len(a.rules), len(b.rules)))
	})
	var chains []profile
	if inline != nil {
		chains = append(chains, profile{policies: inline})
	}
	if n := len(large) - mostGotos; n > 0 {
		chains, large = append(chains, profile{policies: large[:n]}), large[n:]
	}
	for _, p := range large {
		chains = append(chains, profile{policies: []sending{p}})
	}
	next := chainUnsent
	var identity []string
	for i := len(chains) - 1; i >= 0; i-- {
		for _, p := range slices.Backward(chains[i].policies) {
			identity = append(identity, p.of.namespace, p.of.name)
		}
		chains[i].name, chains[i].next = prefixProfile+ID(append([]string{DirectionEgress}, identity...)...), next
		next = chains[i].name
	}
	return chains
}

func (p profile) chain() *ruleset.Chain {
	c := &ruleset.Chain{Name: p.name}
	for _, s := range p.policies {
		c.Rules = append(c.Rules, s.rules...)
	}
	c.Rules = append(c.Rules, ruleset.NewRule(ruleset.To(ruleset.Goto, p.next)))
	return c
}

// profileChain renders the egress chains of endpoints that are under these policies, and returns the name of the first.
func (r *renderer) profileChain(list []*compiled) string {
	policies := make([]sending, len(list))
	for i, c := range list {
		if r.sent[c] == nil {
			r.sent[c] = &sending{c, r.egressRules(c)}
		}
		policies[i] = *r.sent[c]
	}
	chains := profiles(policies)
	for _, p := range chains {
		r.table.Chains[p.name] = p.chain()
	}
	return first(chains)
}

func first(chains []profile) string {
	if len(chains) == 0 {
		return chainUnsent
	}
	return chains[0].name
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
	if !rule.anyPort && len(ports) == 0 {
		return nil // named ports only: the sets of the peers' addresses would be for nobody
	}
	var rules []ruleset.Rule
	peers := r.peerMatches(rule, fields)
	alternatives := r.portMatches(rule, ports, len(peers))
	for _, port := range alternatives {
		for _, peer := range peers {
			rules = append(rules, ruleset.NewRule(slices.Concat(port, peer, []ruleset.Expr{verdict})...))
		}
	}
	return rules
}

// portMatches returns the alternatives that match a rule's ports; an empty list of expressions matches everything, ICMP too. Where there would be
// many for so many peers, there is one for each protocol: the rules are a sum then and not a product, which the author of a policy could
// make as large as he likes.
func (r *renderer) portMatches(rule *rule, ports []portRange, peers int) [][]ruleset.Expr {
	if rule.anyPort {
		return [][]ruleset.Expr{nil}
	}
	var whole, ranges, singles []portRange
	for _, p := range ports {
		switch {
		case p.every:
			whole = append(whole, p)
		case p.from == p.to:
			singles = append(singles, p)
		default:
			ranges = append(ranges, p)
		}
	}
	var matches [][]ruleset.Expr
	match := func(proto cluster.Protocol, more ...ruleset.Expr) {
		matches = append(matches, append([]ruleset.Expr{ruleset.Equal(ruleset.L4Proto, uint8(proto))}, more...))
	}
	for _, p := range whole {
		match(p.proto)
	}
	inSet := len(singles) >= minPortSet
	n := len(whole) + len(ranges) + len(singles)
	if inSet {
		n += 1 - len(singles)
	}
	if n > 1 && n*peers > maxProduct {
		byProto := map[cluster.Protocol][]portRange{}
		for _, p := range slices.Concat(ranges, singles) {
			byProto[p.proto] = append(byProto[p.proto], p)
		}
		for _, proto := range slices.Sorted(maps.Keys(byProto)) {
			match(proto, ruleset.In{Fields: []ruleset.Field{ruleset.Dport}, Set: r.portRangeSet(byProto[proto])})
		}
		return matches
	}
	for _, p := range ranges {
		match(p.proto, ruleset.Between16(ruleset.Dport, p.from, p.to))
	}
	if inSet {
		key := []ruleset.Field{ruleset.L4Proto, ruleset.Dport}
		return append(matches, []ruleset.Expr{ruleset.In{Fields: key, Set: r.portSet(singles)}})
	}
	for _, p := range singles {
		match(p.proto, ruleset.Equal16(ruleset.Dport, p.from))
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
