package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// Engine keeps the ruleset that Render would make, and changes it event by event: an event costs what it changes on this node. It
// knows two states. Ruleset is the one that was committed; Delta leads from there to what is desired now, and Commit says that
// it has been done. An Engine is not safe for concurrent use, but what others only read changes in Apply (the model) and in Commit
// (the ruleset) alone.
type Engine struct {
	model   *cluster.Model
	options Options

	// Who has which address: an endpoint, else the newest pod of those that claim it.
	local     map[netip.Addr][]*liveEndpoint
	claimed   map[netip.Addr]*cluster.Pod
	contested map[netip.Addr][]*cluster.Pod // all claimants, where there are several
	// touched are the addresses whose owner may have changed since the sets were last brought up to date, with that former owner.
	touched map[netip.Addr]*cluster.Pod

	selectors map[string]*liveSelector // by the name of the IPv4 set
	index     *index

	endpoints   map[string]*liveEndpoint
	turn        uint64                            // counts SetEndpoints
	byNamespace map[string]map[*liveEndpoint]bool // those whose pod is known
	stale       map[*liveEndpoint]bool            // to be rendered
	// policies are those of the namespaces of endpoints, sorted by name; others are compiled for their problems only.
	policies map[string][]*compiled
	// changed are policies to be rendered: what they were when endpoints were last rendered, nil if they were not.
	changed map[cluster.Key]*compiled
	wrong   map[cluster.Key][]string // problems of policies

	profiles    map[string]*fragment // by the name of the chain
	chains      map[objectName]*liveChain
	sets        map[objectName]*liveSet
	base        []*liveSet // sets that are always there, whose elements endpoints hold
	dirtyChains map[*liveChain]bool
	dirtySets   map[*liveSet]bool
	deviceSize  int // chains that the netdev table shall have

	table, device *ruleset.Table // as committed
	ruleset       ruleset.Ruleset
	version       uint64
	problems      []Problem
	problemsOf    uint64 // the version that problems are of
}

// liveEndpoint is an endpoint as it was last set, and what it has in the ruleset.
type liveEndpoint struct {
	Endpoint
	turn     uint64 // of the SetEndpoints that had it last
	gone     bool
	own      *fragment
	uses     []*fragment // of policies, in both directions
	verdicts Verdicts
}

// NewEngine returns an engine for a cluster without objects and a node without endpoints.
func NewEngine(options Options) *Engine {
	e := &Engine{
		model: cluster.NewModel(), options: options,
		local: map[netip.Addr][]*liveEndpoint{}, claimed: map[netip.Addr]*cluster.Pod{}, contested: map[netip.Addr][]*cluster.Pod{}, touched: map[netip.Addr]*cluster.Pod{},
		selectors: map[string]*liveSelector{}, index: newIndex(),
		endpoints: map[string]*liveEndpoint{}, byNamespace: map[string]map[*liveEndpoint]bool{}, stale: map[*liveEndpoint]bool{},
		policies: map[string][]*compiled{}, changed: map[cluster.Key]*compiled{}, wrong: map[cluster.Key][]string{},
		profiles: map[string]*fragment{}, chains: map[objectName]*liveChain{}, sets: map[objectName]*liveSet{}, dirtyChains: map[*liveChain]bool{}, dirtySets: map[*liveSet]bool{},
		version: 1,
	}
	base := e.scratch()
	base.base()
	e.table, e.device = ruleset.NewTable(base.table.ID), ruleset.NewTable(base.device.ID)
	for n, c := range base.table.Chains {
		e.want(e.chain(objectName{name: n}), c)
	}
	for n, s := range base.table.Sets {
		l := &liveSet{name: objectName{name: n}, set: s, fresh: true, held: map[ruleset.Elem]int{}}
		e.sets[l.name], e.dirtySets[l] = l, true
		e.base = append(e.base, l)
	}
	return e
}

// scratch returns a renderer with empty tables of its own.
func (e *Engine) scratch() *renderer {
	r := &renderer{
		in:       &Input{Model: e.model, Options: e.options},
		table:    ruleset.NewTable(ruleset.TableID{Family: ruleset.Inet, Name: e.options.Table}),
		device:   ruleset.NewTable(ruleset.TableID{Family: ruleset.Netdev, Name: e.options.Table}),
		policies: e.policies, chains: map[string]bool{}, verdicts: map[string]Verdicts{},
	}
	return r
}

// SetCutBeforeNAT sets what Input.CutBeforeNAT says.
func (e *Engine) SetCutBeforeNAT(on bool) {
	c := e.chain(objectName{name: chainBeforeNAT})
	switch {
	case !e.options.Cut, on == (c.want != nil):
	case on:
		r := e.scratch()
		r.beforeNAT()
		e.want(c, r.table.Chains[chainBeforeNAT])
	default:
		e.want(c, nil)
	}
}

// Model returns the objects that have been applied.
func (e *Engine) Model() *cluster.Model { return e.model }

// Apply takes one change of an object, and reports whether it changes anything.
func (e *Engine) Apply(c cluster.Change) bool {
	switch c.Key.Kind {
	case cluster.KindPod:
		old := e.model.Pod(c.Key.Namespace, c.Key.Name)
		pod, _ := c.Object.(*cluster.Pod)
		if old == pod || old != nil && pod != nil && old.Equal(pod) {
			return false
		}
		e.unclaim(old)
		e.model.Apply(c)
		e.claim(pod)
	case cluster.KindNamespace:
		e.relabel(c)
	case cluster.KindPolicy:
		p, _ := c.Object.(*cluster.Policy)
		if p == nil && e.model.Policy(c.Key.Namespace, c.Key.Name) == nil {
			return false
		}
		e.model.Apply(c)
		e.replacePolicy(c.Key, p)
	}
	return true
}

// PodAt returns the pod whose object claims an address, or nil; of several the newest. It changes in Apply alone.
func (e *Engine) PodAt(ip netip.Addr) *cluster.Pod { return e.claimed[ip] }

// owner returns the pod that an address belongs to, or nil.
func (e *Engine) owner(ip netip.Addr) *cluster.Pod {
	if list := e.local[ip]; list != nil {
		return list[len(list)-1].Pod
	}
	return e.claimed[ip]
}

// touch is called before the owner of an address may change.
func (e *Engine) touch(ip netip.Addr) {
	if e.contested[ip] != nil {
		e.version++ // whether that is a problem depends on who else has the address
	}
	if len(e.selectors) == 0 {
		return // new ones look at all pods
	}
	if _, done := e.touched[ip]; !done {
		e.touched[ip] = e.owner(ip)
	}
}

func (e *Engine) claim(pod *cluster.Pod) {
	if pod == nil || !claims(pod) {
		return
	}
	for _, ip := range pod.IPs {
		e.touch(ip)
		other := e.claimed[ip]
		switch other {
		case pod: // named twice
		case nil:
			e.claimed[ip] = pod
		default:
			list := e.contested[ip]
			if list == nil {
				list = []*cluster.Pod{other}
			}
			if !slices.Contains(list, pod) {
				list = append(slices.Clip(list), pod)
			}
			e.contested[ip], e.claimed[ip] = list, newest(list)
			e.version++
		}
	}
}

func (e *Engine) unclaim(pod *cluster.Pod) {
	if pod == nil || !claims(pod) {
		return
	}
	for _, ip := range pod.IPs {
		e.touch(ip)
		if e.contested[ip] == nil {
			if e.claimed[ip] == pod {
				delete(e.claimed, ip)
			}
			continue
		}
		list := slices.DeleteFunc(slices.Clone(e.contested[ip]), func(p *cluster.Pod) bool { return p == pod })
		switch len(list) {
		case 1:
			e.claimed[ip] = list[0]
			delete(e.contested, ip)
		default:
			e.claimed[ip], e.contested[ip] = newest(list), list
		}
	}
}

// relabel applies a change of a namespace. Peer sets that ask for labels of namespaces win or lose the pods of this one.
func (e *Engine) relabel(c cluster.Change) {
	e.follow() // by the labels that those sets were filled by
	before := labels.Set(e.model.NamespaceLabels(c.Key.Name))
	e.model.Apply(c)
	after := labels.Set(e.model.NamespaceLabels(c.Key.Name))
	if maps.Equal(before, after) {
		return
	}
	for _, s := range e.selectors {
		if s.pods.namespaces == nil {
			continue
		}
		was, is := s.pods.namespaces.Matches(before), s.pods.namespaces.Matches(after)
		if was != is {
			e.each(c.Key.Name, s.pods.pods, func(pod *cluster.Pod, ips []netip.Addr) { e.change(s, pod, ips, is) })
		}
	}
}

// each calls f for the pods of a namespace that a selector matches and that own addresses.
func (e *Engine) each(namespace string, by labels.Selector, f func(*cluster.Pod, []netip.Addr)) {
	var ips []netip.Addr
	of := func(pod *cluster.Pod, list []netip.Addr) {
		if !by.Matches(labels.Set(pod.Labels)) {
			return
		}
		ips = ips[:0]
		for _, ip := range list {
			if e.owner(ip) == pod {
				ips = append(ips, ip)
			}
		}
		f(pod, ips)
	}
	for pod := range e.model.PodsIn(namespace) {
		of(pod, pod.IPs)
	}
	for ep := range e.byNamespace[namespace] {
		of(ep.Pod, ep.IPs) // also what its object does not name, or an object that is gone
	}
}

// change puts what a pod has in a selector's sets into them, or takes it out.
func (e *Engine) change(s *liveSelector, pod *cluster.Pod, ips []netip.Addr, in bool) {
	s.elements(pod, ips, func(i int, elem ruleset.Elem) {
		e.dirtySets[s.sets[i]] = true
		if in {
			s.sets[i].put(elem, ruleset.Verdict{})
		} else {
			s.sets[i].remove(elem)
		}
	})
}

// follow brings the peer sets up to date with the owners of addresses. An address is an element of what its owner is selected by, and
// of nothing else, so each address is looked at alone.
func (e *Engine) follow() {
	known := map[*cluster.Pod][]*liveSelector{}
	selecting := func(pod *cluster.Pod) []*liveSelector {
		if pod == nil {
			return nil
		}
		list, ok := known[pod]
		if !ok {
			list = e.index.selecting(nil, pod.Namespace, func() labels.Set { return e.model.NamespaceLabels(pod.Namespace) }, labels.Set(pod.Labels))
			known[pod] = list
		}
		return list
	}
	for ip, old := range e.touched {
		now := e.owner(ip)
		if now == old {
			continue
		}
		for _, s := range selecting(old) {
			e.change(s, old, []netip.Addr{ip}, false)
		}
		for _, s := range selecting(now) {
			e.change(s, now, []netip.Addr{ip}, true)
		}
	}
	if len(e.touched) > 0 {
		e.touched = map[netip.Addr]*cluster.Pod{} // not clear: a burst would cost its size forever
	}
}

// SetEndpoints replaces the endpoints of the node. Those that are as they were cost a comparison.
func (e *Engine) SetEndpoints(list []Endpoint) {
	e.turn++
	for i := range list {
		ep := e.endpoints[list[i].ID]
		switch {
		case ep == nil:
			ep = &liveEndpoint{Endpoint: list[i]}
			e.endpoints[ep.ID] = ep
			e.settle(ep)
		case !sameEndpoint(&ep.Endpoint, &list[i]):
			e.unsettle(ep)
			ep.Endpoint = list[i]
			e.settle(ep)
		}
		ep.turn = e.turn
	}
	for id, ep := range e.endpoints {
		if ep.turn != e.turn {
			e.unsettle(ep)
			ep.gone = true
			delete(e.endpoints, id)
		}
	}
	for namespace := range e.policies {
		if len(e.byNamespace[namespace]) == 0 {
			delete(e.policies, namespace)
		}
	}
}

func sameEndpoint(a, b *Endpoint) bool {
	return a.Name == b.Name && a.Pod == b.Pod && a.Link == b.Link && a.Bridge == b.Bridge && a.Device == b.Device && a.Brief == b.Brief && a.Ended == b.Ended && slices.Equal(a.IPs, b.IPs) && slices.Equal(a.Gateways, b.Gateways)
}

// settle makes an endpoint count: it has its addresses, and its namespace's policies are compiled.
func (e *Engine) settle(ep *liveEndpoint) {
	e.stale[ep] = true
	for _, ip := range ep.IPs {
		e.touch(ip)
		e.local[ip] = append(e.local[ip], ep)
	}
	if ep.Pod == nil {
		return
	}
	namespace := ep.Pod.Namespace
	if e.byNamespace[namespace] == nil {
		e.byNamespace[namespace] = map[*liveEndpoint]bool{}
	}
	e.byNamespace[namespace][ep] = true
	if e.policies[namespace] != nil {
		return
	}
	compiledOf := []*compiled{}
	for p := range e.model.PoliciesIn(namespace) {
		compiledOf = append(compiledOf, compile(p))
	}
	slices.SortFunc(compiledOf, func(a, b *compiled) int { return strings.Compare(a.name, b.name) })
	e.policies[namespace] = compiledOf
}

func (e *Engine) unsettle(ep *liveEndpoint) {
	e.stale[ep] = true
	for _, ip := range ep.IPs {
		e.touch(ip)
		e.local[ip] = slices.DeleteFunc(slices.Clone(e.local[ip]), func(o *liveEndpoint) bool { return o == ep })
		if len(e.local[ip]) == 0 {
			delete(e.local, ip)
		}
	}
	if ep.Pod != nil {
		delete(e.byNamespace[ep.Pod.Namespace], ep)
		if len(e.byNamespace[ep.Pod.Namespace]) == 0 {
			delete(e.byNamespace, ep.Pod.Namespace)
		}
	}
}

// replacePolicy takes a policy's new state, nil when it is gone.
func (e *Engine) replacePolicy(k cluster.Key, p *cluster.Policy) {
	var c *compiled
	var problems []string
	if p != nil {
		c = compile(p)
		problems = c.problems
	}
	if !slices.Equal(problems, e.wrong[k]) {
		e.version++
	}
	if delete(e.wrong, k); problems != nil {
		e.wrong[k] = problems
	}
	list, needed := e.policies[k.Namespace]
	if !needed {
		return
	}
	i, found := slices.BinarySearchFunc(list, k.Name, func(c *compiled, name string) int { return strings.Compare(c.name, name) })
	var old *compiled
	if found {
		old = list[i]
	}
	switch {
	case c == nil && found:
		e.policies[k.Namespace] = slices.Delete(list, i, i+1)
	case c != nil && found:
		list[i] = c
	case c != nil:
		e.policies[k.Namespace] = slices.Insert(list, i, c)
	}
	if _, noted := e.changed[k]; !noted {
		e.changed[k] = old
	}
}

// render brings everything up to date that depends on endpoints and policies.
func (e *Engine) render() {
	e.follow()
	for k, old := range e.changed {
		e.spread(k, old)
	}
	e.changed = map[cluster.Key]*compiled{}
	if len(e.stale) == 0 {
		return
	}
	e.version++
	for ep := range e.stale {
		e.renderEndpoint(ep)
	}
	e.stale = map[*liveEndpoint]bool{}
	// What swap has made for one of them, which did not come to use it.
	maps.DeleteFunc(e.profiles, func(_ string, f *fragment) bool { return len(f.users) == 0 })
}

// spread brings a changed policy to the endpoints that it selects or selected. Most changes leave an endpoint's own chains as they
// are: it calls the same chains of policies, one of which has other rules now.
func (e *Engine) spread(k cluster.Key, old *compiled) {
	list := e.policies[k.Namespace]
	var now *compiled
	if i, ok := slices.BinarySearchFunc(list, k.Name, func(c *compiled, name string) int { return strings.Compare(c.name, name) }); ok {
		now = list[i]
	}
	chains := map[*fragment][]*fragment{} // by the first of those before
	for ep := range e.byNamespace[k.Namespace] {
		if e.stale[ep] {
			continue
		}
		pod := labels.Set(ep.Pod.Labels)
		was, is := old != nil && old.subject.Matches(pod), now != nil && now.subject.Matches(pod)
		if (was || is) && (was != is || !e.swap(ep, old, now, chains)) {
			e.stale[ep] = true
		}
	}
}

// swap replaces the fragments of a policy in an endpoint that calls the same chains before and after, and reports whether it does. It keeps in
// chains what egress chains have become.
func (e *Engine) swap(ep *liveEndpoint, old, now *compiled, chains map[*fragment][]*fragment) bool {
	if (old.ingress == nil) != (now.ingress == nil) || (old.egress == nil) != (now.egress == nil) {
		return false
	}
	var next, parts []*fragment
	var first *fragment // of the egress chains, which come last
	for _, f := range ep.uses {
		switch {
		case f.parts != nil:
			first = cmp.Or(first, f)
			continue
		case f.of == old && f.egress:
			f = e.egressFragment(now)
		case f.of == old:
			was := f
			if f = e.ingressFragment(now, ep.Pod); f.name != was.name || f.empty != was.empty {
				return false
			}
		}
		if next = append(next, f); f.egress {
			parts = append(parts, f)
		}
	}
	if first == nil || chains[first] == nil {
		chains[first] = e.profilesOf(parts)
	}
	next = append(next, chains[first]...)
	if !slices.EqualFunc(next, ep.uses, func(a, b *fragment) bool { return a.name == b.name }) {
		return false
	}
	for i, f := range next {
		if f != ep.uses[i] {
			e.enter(ep, f)
			e.leave(ep, ep.uses[i])
			ep.uses[i] = f
		}
	}
	return true
}

// enter makes an endpoint one of those that use a fragment of a policy, and leave takes it out.
func (e *Engine) enter(ep *liveEndpoint, f *fragment) {
	if len(f.users) == 0 {
		e.hold(f)
	}
	f.users[ep] = true
}

func (e *Engine) leave(ep *liveEndpoint, f *fragment) {
	if delete(f.users, ep); len(f.users) > 0 {
		return
	}
	e.release(f)
	switch {
	case f.parts == nil:
		delete(f.of.fragments, f.name)
	case e.profiles[f.name] == f:
		delete(e.profiles, f.name)
	}
}

// renderEndpoint renders an endpoint anew.
func (e *Engine) renderEndpoint(ep *liveEndpoint) {
	before := ep.own
	ep.own, ep.verdicts = nil, Verdicts{}
	var uses []*fragment
	if !ep.gone {
		r := e.scratch()
		for _, s := range e.base {
			r.table.Sets[s.name.name] = s.part(map[ruleset.Elem]ruleset.Verdict{})
		}
		r.ingress = func(c *compiled, pod *cluster.Pod) (ruleset.Rule, bool) {
			f := e.ingressFragment(c, pod)
			uses = append(uses, f)
			return f.jump, !f.empty
		}
		r.egress = func(list []*compiled) string {
			parts := make([]*fragment, len(list))
			for i, c := range list {
				parts[i] = e.egressFragment(c)
			}
			chains := e.profilesOf(parts)
			uses = slices.Concat(uses, parts, chains)
			if chains == nil {
				return chainUnsent
			}
			return chains[0].name
		}
		r.endpoint(&ep.Endpoint)
		ep.own = &fragment{owner: ep}
		e.collect(r, ep.own)
		ep.verdicts = r.verdicts[ep.ID]
		e.hold(ep.own)
	}
	// What is used on comes before what is used no more, so that nothing that both need is given up in between.
	for _, f := range uses {
		e.enter(ep, f)
	}
	for _, f := range ep.uses {
		if !slices.Contains(uses, f) {
			e.leave(ep, f)
		}
	}
	ep.uses = uses
	if before != nil {
		e.release(before)
	}
}

// ingressFragment returns what a policy's chain needs for a pod, rendered once for all pods that resolve its named ports alike.
func (e *Engine) ingressFragment(c *compiled, pod *cluster.Pod) *fragment {
	return e.policyFragment(c, c.ingressName(pod), func(r *renderer, f *fragment) {
		rule, ok := jump(c, r.ingressChain(c, pod))
		f.jump, f.empty = rule, !ok
	})
}

// egressFragment returns a policy's egress rules and what they look up.
func (e *Engine) egressFragment(c *compiled) *fragment {
	return e.policyFragment(c, DirectionEgress, func(r *renderer, f *fragment) { f.rules, f.egress = r.egressRules(c), true })
}

// policyFragment returns a policy's fragment of that name, which render makes unless it is there.
func (e *Engine) policyFragment(c *compiled, name string, render func(*renderer, *fragment)) *fragment {
	if f := c.fragments[name]; f != nil {
		return f
	}
	r := e.scratch()
	peers := map[string]*peerSet{}
	r.fill = func(s *peerSet) { peers[s.names[0]], peers[s.names[1]] = s, s }
	f := &fragment{of: c, name: name, peers: peers, users: map[*liveEndpoint]bool{}}
	render(r, f)
	e.collect(r, f)
	if c.fragments == nil {
		c.fragments = map[string]*fragment{}
	}
	c.fragments[name] = f
	return f
}

// profilesOf returns the egress chains of endpoints that are under the policies of these fragments, rendered once for all of them.
func (e *Engine) profilesOf(parts []*fragment) []*fragment {
	policies := make([]sending, len(parts))
	for i, p := range parts {
		policies[i] = sending{p.of, p.rules}
	}
	var list []*fragment
	for _, p := range profiles(policies) {
		same := func(c *compiled, s sending) bool { return c == s.of }
		f := e.profiles[p.name]
		if f == nil || !slices.EqualFunc(f.parts, p.policies, same) {
			f = &fragment{name: p.name, egress: true, users: map[*liveEndpoint]bool{}}
			for _, s := range p.policies {
				f.parts = append(f.parts, s.of)
			}
			f.chains = []placed[*ruleset.Chain]{{objectName{name: p.name}, p.chain()}}
			e.profiles[p.name] = f
		}
		list = append(list, f)
	}
	return list
}

// collect puts what has been rendered to scratch tables into a fragment.
func (e *Engine) collect(r *renderer, f *fragment) {
	for i, t := range []*ruleset.Table{r.table, r.device} {
		device := i == 1
		for n, c := range t.Chains {
			f.chains = append(f.chains, placed[*ruleset.Chain]{objectName{device, n}, c})
		}
		for n, s := range t.Sets {
			n := objectName{device, n}
			if base := e.sets[n]; base == nil || base.held == nil {
				f.sets = append(f.sets, placed[*ruleset.Set]{n, s})
				continue
			}
			for elem, v := range s.Elements {
				f.elements = append(f.elements, held{n, elem, v})
			}
		}
	}
}

func (e *Engine) chain(n objectName) *liveChain {
	c := e.chains[n]
	if c == nil {
		c = &liveChain{name: n, users: map[*fragment]bool{}}
		e.chains[n] = c
	}
	return c
}

// want makes a chain desired as it is, or undesired with nil.
func (e *Engine) want(c *liveChain, as *ruleset.Chain) {
	if c.want != nil && as != nil && c.want.Equal(as) {
		return
	}
	if c.name.device {
		if c.want == nil {
			e.deviceSize++
		}
		if as == nil {
			e.deviceSize--
		}
	}
	c.want = as
	e.dirtyChains[c] = true
}

// hold makes the objects of a fragment desired.
func (e *Engine) hold(f *fragment) {
	for _, p := range f.chains {
		c := e.chain(p.name)
		c.users[f] = true
		e.want(c, p.object)
	}
	for _, p := range f.sets {
		e.holdSet(f, p)
	}
	for _, h := range f.elements {
		s := e.sets[h.set]
		s.held[h.elem]++
		s.put(h.elem, h.verdict)
		e.dirtySets[s] = true
	}
}

func (e *Engine) holdSet(f *fragment, p placed[*ruleset.Set]) {
	s := e.sets[p.name]
	if s == nil {
		s = &liveSet{name: p.name, set: p.object, fresh: true, users: map[*fragment]bool{}}
		e.sets[p.name] = s
		e.dirtySets[s] = true
	}
	s.users[f] = true
	if len(s.users) > 1 {
		return
	}
	if s.gone {
		s.gone = false
		e.dirtySets[s] = true
	}
	if peers := f.peers[p.object.Name]; peers != nil {
		e.watch(s, peers)
	}
}

// watch begins to keep a peer set up to date, when both of the pair are there.
func (e *Engine) watch(s *liveSet, peers *peerSet) {
	l := e.selectors[peers.names[0]]
	if l == nil {
		l = &liveSelector{peerSet: *peers}
		e.selectors[peers.names[0]] = l
	}
	s.clear()
	s.selector = l
	i := slices.Index(peers.names[:], s.name.name)
	if l.sets[i] = s; l.sets[1-i] == nil {
		return
	}
	e.index.add(l)
	fill := func(namespace string) {
		e.each(namespace, l.pods.pods, func(pod *cluster.Pod, ips []netip.Addr) { e.change(l, pod, ips, true) })
	}
	if l.pods.namespaces == nil {
		fill(l.pods.namespace)
		return
	}
	for namespace := range e.peopled() {
		if l.pods.namespaces.Matches(labels.Set(e.model.NamespaceLabels(namespace))) {
			fill(namespace)
		}
	}
}

// peopled yields the namespaces that have pods; one whose object is gone may only be known by its endpoint.
func (e *Engine) peopled() func(func(string) bool) {
	return func(yield func(string) bool) {
		for namespace := range e.model.Populated() {
			if !yield(namespace) {
				return
			}
		}
		for namespace := range e.byNamespace {
			if !yield(namespace) {
				return
			}
		}
	}
}

// release is the inverse of hold.
func (e *Engine) release(f *fragment) {
	for _, p := range f.chains {
		c := e.chain(p.name)
		if delete(c.users, f); len(c.users) == 0 {
			e.want(c, nil)
		}
	}
	for _, p := range f.sets {
		s := e.sets[p.name]
		if delete(s.users, f); len(s.users) > 0 {
			continue
		}
		s.gone = true
		e.dirtySets[s] = true
		if l := s.selector; l != nil {
			s.selector = nil
			if e.selectors[l.names[0]] == l {
				delete(e.selectors, l.names[0])
				e.index.remove(l)
			}
		}
	}
	for _, h := range f.elements {
		s := e.sets[h.set]
		if s.held[h.elem]--; s.held[h.elem] == 0 {
			delete(s.held, h.elem)
			s.remove(h.elem)
			e.dirtySets[s] = true
		}
	}
}

// Delta returns what leads from Ruleset to what is desired now: what Diff finds between the two, from the objects that have changed.
func (e *Engine) Delta() ruleset.Delta {
	e.render()
	from, to := ruleset.NewTable(e.table.ID), ruleset.NewTable(e.table.ID)
	fromDevice, toDevice := ruleset.NewTable(e.device.ID), ruleset.NewTable(e.device.ID)
	for c := range e.dirtyChains {
		a, b := from, to
		if c.name.device {
			a, b = fromDevice, toDevice
		}
		if old := e.committed(c.name).Chains[c.name.name]; old != nil {
			a.Chains[c.name.name] = old
		}
		if c.want != nil {
			b.Chains[c.name.name] = c.want
		}
	}
	for s := range e.dirtySets {
		a, b := from, to
		if s.name.device {
			a, b = fromDevice, toDevice
		}
		switch {
		case s.fresh && !s.gone:
			b.Sets[s.name.name] = s.set
		case s.fresh:
		case s.gone:
			a.Sets[s.name.name] = s.set
		default:
			a.Sets[s.name.name], b.Sets[s.name.name] = s.part(s.del), s.part(s.add)
		}
	}
	var old, next ruleset.Ruleset
	if e.ruleset != nil {
		old = append(old, from)
	}
	next = append(next, to)
	if e.ruleset.Table(e.device.ID) != nil {
		old = append(old, fromDevice)
	}
	if e.deviceSize > 0 {
		next = append(next, toDevice)
	}
	return ruleset.Diff(old, next)
}

func (e *Engine) committed(n objectName) *ruleset.Table {
	if n.device {
		return e.device
	}
	return e.table
}

// Commit says that the last Delta has been done, and that nothing was applied since.
func (e *Engine) Commit() {
	for c := range e.dirtyChains {
		t := e.committed(c.name)
		if c.want != nil {
			t.Chains[c.name.name] = c.want
			continue
		}
		delete(t.Chains, c.name.name)
		delete(e.chains, c.name)
	}
	for s := range e.dirtySets {
		t := e.committed(s.name)
		if s.gone {
			delete(t.Sets, s.name.name)
			delete(e.sets, s.name)
			continue
		}
		s.committed()
		t.Sets[s.name.name] = s.set
	}
	e.dirtyChains, e.dirtySets = map[*liveChain]bool{}, map[*liveSet]bool{}
	e.ruleset = ruleset.Ruleset{e.table}
	if e.deviceSize > 0 {
		e.ruleset = append(e.ruleset, e.device)
	}
}

// Ruleset returns what was committed, empty before the first Commit. It is not a copy: Commit changes it.
func (e *Engine) Ruleset() ruleset.Ruleset { return e.ruleset }

// Desired returns what Ruleset would be after Delta and Commit. It holds until the next change.
func (e *Engine) Desired() ruleset.Ruleset {
	e.render()
	table, device := shallow(e.table), shallow(e.device)
	at := func(n objectName) *ruleset.Table {
		if n.device {
			return device
		}
		return table
	}
	for c := range e.dirtyChains {
		if t := at(c.name); c.want != nil {
			t.Chains[c.name.name] = c.want
		} else {
			delete(t.Chains, c.name.name)
		}
	}
	for s := range e.dirtySets {
		if t := at(s.name); s.gone {
			delete(t.Sets, s.name.name)
		} else {
			t.Sets[s.name.name] = s.desired()
		}
	}
	if e.deviceSize > 0 {
		return ruleset.Ruleset{table, device}
	}
	return ruleset.Ruleset{table}
}

func shallow(t *ruleset.Table) *ruleset.Table {
	return &ruleset.Table{ID: t.ID, Sets: maps.Clone(t.Sets), Chains: maps.Clone(t.Chains)}
}

// Version changes whenever Verdicts or Problems may have.
func (e *Engine) Version() uint64 { return e.version }

// Verdicts returns which policies isolate an endpoint, as Output.Endpoints.
func (e *Engine) Verdicts(id string) Verdicts {
	if ep := e.endpoints[id]; ep != nil && ep.Pod != nil {
		return ep.verdicts
	}
	return Verdicts{}
}

// Problems returns what could not be used as written, as Output.Problems.
func (e *Engine) Problems() []Problem {
	if e.problemsOf == e.version {
		return e.problems
	}
	var list []Problem
	for k, reasons := range e.wrong {
		for _, reason := range reasons {
			list = append(list, Problem{k, reason})
		}
	}
	for ip, pods := range e.contested {
		if e.local[ip] == nil {
			list = append(list, contested(ip, pods)...)
		}
	}
	e.problems, e.problemsOf = sortProblems(list), e.version
	return e.problems
}

// TightenedBy is the function of that name for a Delta that has been committed. The second result is whom it concerns only because the
// addresses of pods that are gone have left its peers: their connections have lost an end.
func (e *Engine) TightenedBy(d ruleset.Delta) (Tightened, Tightened) {
	var now, late Tightened
	note := func(t *Tightened, ep *liveEndpoint, out bool) {
		switch {
		case ep.Pod == nil:
		case out && ep.verdicts.Egress != nil:
			t.Egress = append(t.Egress, ep.IPs...)
		case !out && ep.verdicts.Ingress != nil:
			t.Ingress = append(t.Ingress, ep.IPs...)
		}
	}
	concerns := func(t *Tightened, users map[*fragment]bool, object string) {
		for f := range users {
			if f.owner != nil {
				note(t, f.owner, strings.HasPrefix(object, prefixEgress))
			}
			for ep := range f.users {
				note(t, ep, f.egress)
			}
		}
	}
	for _, op := range d.Apply {
		switch {
		case op.Table != e.table.ID:
		case op.Kind == ruleset.DelElements && !op.Set.Map:
			s := e.sets[objectName{name: op.Set.Name}]
			switch {
			case s == nil:
			case e.vanished(s, op.Elements):
				concerns(&late, s.users, "")
			default:
				concerns(&now, s.users, "")
			}
		case op.Kind == ruleset.FlushChain:
			if c := e.chains[objectName{name: op.Chain.Name}]; c != nil {
				concerns(&now, c.users, op.Chain.Name)
			}
		case op.Kind == ruleset.AddElements && op.Set.Map:
			for elem, v := range op.Elements {
				ip, ok := netip.AddrFromSlice([]byte(elem))
				switch {
				case !ok || Closed(v):
				case op.Set.Name == mapEgress4 || op.Set.Name == mapEgress6:
					now.Egress = append(now.Egress, ip)
				default:
					now.Ingress = append(now.Ingress, ip)
				}
			}
		}
	}
	order := func(t Tightened) Tightened {
		slices.SortFunc(t.Egress, netip.Addr.Compare)
		slices.SortFunc(t.Ingress, netip.Addr.Compare)
		return Tightened{Egress: slices.Compact(t.Egress), Ingress: slices.Compact(t.Ingress)}
	}
	return order(now), order(late)
}

// vanished reports whether the addresses of elements of a peer set are nobody's any more, or only those of endpoints that have ended.
func (e *Engine) vanished(s *liveSet, elements map[ruleset.Elem]ruleset.Verdict) bool {
	if s.selector == nil {
		return false
	}
	size := 4
	if s.set.Key[0] == ruleset.IPv6Addr {
		size = 16
	}
	for elem := range elements {
		ip, ok := netip.AddrFromSlice([]byte(elem[:min(size, len(elem))]))
		local := e.local[ip]
		here := slices.ContainsFunc(local, func(ep *liveEndpoint) bool { return !ep.Ended })
		if !ok || here || local == nil && e.claimed[ip] != nil {
			return false
		}
	}
	return true
}
