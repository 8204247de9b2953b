package reconcile

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/registry"
	"github.com/podwall/podwall/pkg/ruleset"
)

// state is what the loop knows of one attachment.
type state struct {
	entry registry.Entry
	link  *registry.Link // nil until it has been looked up
	// hidden says why packets between ports of its bridge do not pass the rules: it is not enforced towards its neighbours.
	hidden error
	pod    *cluster.Pod // as last seen: an object that is gone does not end the enforcement
	// clean says that the addresses have been closed and the connections of a former owner forgotten since ADD (or DEL).
	clean bool
	// brief says that nothing of it is in the kernel yet: it is a new attachment. If it can be opened at once, closing its addresses is enough until then.
	brief bool

	// What is asked for in each pass: the names of the endpoint's chains, of the pod and of the attachment.
	id, podName, name string
}

func newState(e registry.Entry) *state {
	return &state{entry: e, id: endpointID(e.Key), podName: e.Pod.String(), name: e.String()}
}

// endpointID names the chains of an attachment's endpoint.
func endpointID(k attach.Key) string { return policy.ID("attachment", k.ContainerID, k.IfName) }

// open reports whether the endpoint may have its policies' chains instead of quarantine.
func (l *Loop) open(s *state) bool {
	return (s.clean || l.returns(s)) && !s.entry.Detached && s.pod != nil && s.link != nil
}

// returns reports whether an attachment that is not open in the kernel goes on where it was: somebody has deleted the tables while
// there was no daemon. Its ADD was finished, its link is still the same, and without a daemon there is no ADD that gives its
// addresses away, so that its connections are its own. What was established meanwhile and is denied is ended by the revoker's
// first look; without a revoker, or if it could be misled about directions, the attachment starts over.
func (l *Loop) returns(s *state) bool {
	return l.revoker != nil && s.entry.Opened && !s.clean
}

// wasOpen reports whether a former daemon had finished the ADD of this attachment and it was open since. If not, it starts over,
// unless it returns: it is closed and former connections are forgotten. That it was open on an address which is its own only since a newer
// attachment has ended is not enough.
func (l *Loop) wasOpen(e registry.Entry, owners map[netip.Addr]attach.Key) bool {
	t := l.loaded.Table(l.tables()[0])
	if t == nil || e.Detached {
		return false
	}
	for _, ip := range e.IPs {
		for _, m := range t.Sets {
			if v := m.Elements[ruleset.AddrElem(ip)]; m.Map && policy.Closed(v) {
				return false
			}
		}
	}
	link, ok := policy.Links(l.loaded)[endpointID(e.Key)]
	return ok && !slices.ContainsFunc(e.IPs, func(ip netip.Addr) bool { return owners[ip] == e.Key && !slices.Contains(link.IPs, ip) })
}

// refresh brings the states in line with the registry, the links and the pods, and reports whether it has looked at all links. An error concerns one attachment, which stays
// closed; the others have been refreshed.
func (l *Loop) refresh() (bool, error) {
	l.mu.Lock()
	sweep, told, ended := l.sweep, l.told, l.gone
	l.sweep, l.told, l.gone = false, false, nil
	l.mu.Unlock()
	if !sweep && !told && len(ended) == 0 && !l.inputs.stale && !l.inputs.restless {
		return false, nil
	}
	l.inputs.stale, l.inputs.restless = true, false

	var errs []error
	seen := map[attach.Key]bool{}
	for _, e := range l.registry.Entries() {
		st := l.states[e.Key]
		changed := false
		if st == nil || st.entry.Seq != e.Seq || st.entry.Detached != e.Detached {
			next := newState(e)
			if st != nil && st.entry.Seq == e.Seq {
				next.link, next.hidden, next.pod = st.link, st.hidden, st.pod
			}
			next.brief = st == nil && !l.orphaned(next.id)
			st, changed = next, true
			l.states[e.Key], l.sorted = st, nil
		}
		// Of a link that goes the kernel tells; it may have gone just before DEL came here.
		if st.link == nil || st.hidden != nil || sweep || changed || slices.Contains(ended, e.HostLink.Index) {
			gone, err := l.look(st)
			if err != nil {
				errs = append(errs, err)
				l.mu.Lock()
				l.gone = append(l.gone, e.HostLink.Index) // the next pass is to look at it
				l.mu.Unlock()
			}
			if gone {
				l.startOver(st) // before: who is killed in between does not leave them marked
				if err := l.registry.Remove(e.Key, e.Seq); err != nil {
					errs = append(errs, err)
					l.inputs.restless = true
				}
				continue
			}
		}
		seen[e.Key] = true
		l.inputs.restless = l.inputs.restless || st.link == nil || st.hidden != nil
		if pod := l.podOf(&st.entry); pod != nil && pod != st.pod && (st.pod == nil || !pod.Equal(st.pod)) {
			st.pod = pod // one that is made up here is another one each time
		}
	}
	for k, st := range l.states {
		if !seen[k] {
			delete(l.states, k)
			l.sorted = nil
			l.former = append(l.former, st.entry.IPs...)
		}
	}
	if sweep || len(ended) > 0 {
		errs = append(errs, l.lookAtOrphans())
	}
	return sweep, errors.Join(errs...)
}

// startOver closes the older attachments that get an address back from one that has ended: its connections are not theirs.
func (l *Loop) startOver(ended *state) {
	for _, st := range l.states {
		if st.entry.Seq < ended.entry.Seq && slices.ContainsFunc(st.entry.IPs, func(ip netip.Addr) bool { return slices.Contains(ended.entry.IPs, ip) }) {
			st.clean, st.entry.Opened = false, false
			if err := l.registry.SetOpened(st.entry.Key, st.entry.Seq, false); err != nil {
				l.cfg.Log.Warn("an attachment that starts over cannot be marked: if the tables are lost before it is open again, it is opened at once", "attachment", st.entry.Key, "error", err)
			}
		}
	}
}

// look updates the link of an attachment and reports whether it is gone: the sandbox has ended, whether DEL came or not.
func (l *Loop) look(st *state) (bool, error) {
	link, err := l.cfg.Links.Lookup(st.entry.HostLink)
	if err != nil {
		return false, err
	}
	if !link.Exists {
		l.cfg.Log.Info("attachment ended with its host link", "attachment", st.entry.Key, "pod", st.entry.Pod, "link", st.entry.HostLink.Name, "deleted", st.entry.Detached)
		return true, nil
	}
	known := st.link != nil
	st.link, st.hidden = &link, nil
	if link.Bridge == "" {
		return false, nil
	}
	if known && link.Hidden { // once per event: the bridge's next port finds it shown
		l.cfg.Metrics.HiddenBridges.Inc()
		l.cfg.Log.Error("somebody has switched off what shows a bridge's traffic to netfilter, it is being switched on", "bridge", link.Bridge)
	}
	if st.hidden = l.cfg.Links.ShowBridged(link.Bridge); st.hidden != nil {
		return false, fmt.Errorf("attachment %s: %w", st.entry.Key, st.hidden)
	}
	return false, nil
}

// podOf returns the pod object of an attachment, or nil as long as it is not known.
func (l *Loop) podOf(e *registry.Entry) *cluster.Pod {
	pod := l.model.Pod(e.Pod.Namespace, e.Pod.Name)
	if l.cfg.Standalone {
		if pod == nil {
			pod = &cluster.Pod{Namespace: e.Pod.Namespace, Name: e.Pod.Name, Labels: e.Labels}
		}
		return pod
	}
	if pod == nil || pod.Node != l.cfg.NodeName || pod.HostNetwork {
		return nil
	}
	if e.Pod.UID == "" {
		if pod.Deleting {
			return nil
		}
		return pod
	}
	if e.Pod.UID == pod.UID || e.Pod.UID == pod.MirrorUID {
		return pod
	}
	return nil
}

// input returns what the ruleset is rendered from.
func (l *Loop) input() policy.Input {
	if l.inputs.stale || l.inputs.settled {
		l.inputs.stale, l.inputs.settled = false, false
		l.inputs.version++
		l.inputs.last = l.collect()
	}
	return l.inputs.last
}

func (l *Loop) collect() policy.Input {
	in := policy.Input{Model: l.model, Options: l.cfg.Policy}
	states := l.sortedStates() // settle, conflicts and publish rely on endpoints being in this order
	entries := make([]registry.Entry, len(states))
	for i, st := range states {
		entries[i] = st.entry
	}
	owners := registry.Owners(entries)
	attached := make(map[string]bool, len(states))
	in.Endpoints = make([]policy.Endpoint, 0, len(states)+len(l.here))
	for _, st := range states {
		e := policy.Endpoint{ID: st.id, Name: st.podName, Link: st.entry.HostLink.Name}
		for _, ip := range st.entry.IPs {
			if owners[ip] == st.entry.Key {
				e.IPs = append(e.IPs, ip)
			}
		}
		if st.link != nil {
			e.Bridge, e.Gateways = st.link.Bridge, st.link.Gateways
			e.Link = cmp.Or(st.link.Name, e.Link)
		}
		if l.open(st) {
			e.Pod = st.pod
		} else {
			// A verdict map closes the way to the own node only if the own node's chain asks it.
			// And nobody sends yet, unless it is another interface of a pod that runs.
			e.Brief = st.brief && !st.entry.Detached && st.pod != nil && st.link != nil && !l.cfg.Policy.AllowOwnNode && !attached[st.podName]
			e.Ended = st.entry.Detached
		}
		attached[st.podName] = true
		in.Endpoints = append(in.Endpoints, e)
	}
	l.inputs.attached = attached
	return l.closeOrphans(l.adopt(in, owners, attached), owners)
}

// conflicts reports attachments that lost an address to a later ADD: nothing but their own pod is closed by it.
func (l *Loop) conflicts(in policy.Input) []policy.Problem {
	var problems []policy.Problem
	for i, st := range l.sortedStates() {
		for _, ip := range st.entry.IPs {
			if st.entry.Detached || slices.Contains(in.Endpoints[i].IPs, ip) {
				continue
			}
			owner := ""
			if j := slices.IndexFunc(in.Endpoints, func(e policy.Endpoint) bool { return slices.Contains(e.IPs, ip) }); j >= 0 {
				owner = in.Endpoints[j].Name
			}
			problems = append(problems, policy.Problem{
				Object: cluster.Key{Kind: cluster.KindPod, Namespace: st.entry.Pod.Namespace, Name: st.entry.Pod.Name},
				Reason: fmt.Sprintf("its address %s was given to %s by a later ADD: it can no longer use it; delete the pod, and look why the main plugin's IPAM gave it away", ip, owner),
			})
		}
	}
	return problems
}

// unenforceable reports attachments whose bridge hides its traffic.
func (l *Loop) unenforceable() []policy.Problem {
	var problems []policy.Problem
	for _, st := range l.sortedStates() {
		if st.hidden != nil && !st.entry.Detached {
			problems = append(problems, policy.Problem{
				Object: cluster.Key{Kind: cluster.KindPod, Namespace: st.entry.Pod.Namespace, Name: st.entry.Pod.Name},
				Reason: "it is not enforced: " + st.hidden.Error(),
			})
		}
	}
	return problems
}

// adopt adds the pods of this node that never passed through the plugin, by the addresses that the API reports.
func (l *Loop) adopt(in policy.Input, owners map[netip.Addr]attach.Key, attached map[string]bool) policy.Input {
	var adopted []policy.Endpoint
	for _, pod := range l.here {
		name := pod.Namespace + "/" + pod.Name
		if pod.HostNetwork || pod.Terminal || attached[name] {
			continue
		}
		e := policy.Endpoint{ID: policy.ID("adopted", pod.Namespace, pod.Name, pod.UID), Name: name, Pod: pod}
		for _, ip := range pod.IPs {
			if _, taken := owners[ip]; !taken {
				e.IPs = append(e.IPs, ip)
			}
		}
		if len(e.IPs) > 0 {
			adopted = append(adopted, e)
		}
	}
	// Two objects may claim one address for a moment: the newest owns it, as among peers.
	slices.SortFunc(adopted, func(a, b policy.Endpoint) int {
		return cmp.Or(b.Pod.Created.Compare(a.Pod.Created), cmp.Compare(a.Name, b.Name))
	})
	taken := map[netip.Addr]bool{}
	for _, e := range adopted {
		e.IPs = slices.DeleteFunc(e.IPs, func(ip netip.Addr) bool { return taken[ip] })
		for _, ip := range e.IPs {
			taken[ip] = true
		}
		if len(e.IPs) > 0 {
			e.Device = l.toward(e.IPs[0])
			in.Endpoints = append(in.Endpoints, e)
		}
	}
	return in
}

// toward returns the link to an adopted pod. The pod may not reach itself through its own Service as long as it is not known.
func (l *Loop) toward(ip netip.Addr) string {
	device, err := l.cfg.Links.Toward(ip)
	if err != nil {
		l.cfg.Log.Warn("the link of a pod that never passed through the plugin is not known: it cannot reach itself through a Service", "ip", ip, "error", err)
	}
	return device
}

// sortedStates returns the states, oldest first.
func (l *Loop) sortedStates() []*state {
	if l.sorted == nil {
		l.sorted = slices.SortedFunc(maps.Values(l.states), func(a, b *state) int { return cmp.Compare(a.entry.Seq, b.entry.Seq) })
	}
	return l.sorted
}

// settle follows a commit: endpoints that have just been closed get rid of former connections, and so do addresses that are
// nobody's any more. It reports whether another pass is due, because an endpoint can be opened now.
func (l *Loop) settle(in policy.Input) (bool, error) {
	if len(l.former) == 0 && !l.unclean() {
		return false, nil
	}
	again := false
	var closed, back []*state
	brief := map[*state]bool{}
	var ips, returned []netip.Addr
	for i, st := range l.sortedStates() {
		// Only addresses that it owns: a late DEL must not cut the connections of the pod that has the address now.
		l.former = slices.DeleteFunc(l.former, func(ip netip.Addr) bool { return slices.Contains(in.Endpoints[i].IPs, ip) })
		switch {
		case st.clean:
		case in.Endpoints[i].Pod != nil: // it returns
			back = append(back, st)
			returned = append(returned, in.Endpoints[i].IPs...)
		default:
			closed = append(closed, st)
			brief[st] = in.Endpoints[i].Brief
			ips = append(ips, in.Endpoints[i].IPs...)
		}
	}
	// At once: where it takes a walk through the whole table, it is one, however many addresses there are.
	err := l.forget(append(ips, l.former...))
	if err == nil {
		l.former = nil
		err = l.forgetPickedUp(returned)
	}
	if err != nil {
		for _, st := range closed { // It may take a while: they are closed with their links.
			l.inputs.settled = l.inputs.settled || st.brief
			st.brief = false
		}
		return false, err
	}
	l.forgotten = make(map[netip.Addr]bool, len(ips))
	for _, ip := range ips {
		l.forgotten[ip] = true
	}
	for _, st := range back {
		st.clean = true
	}
	for _, st := range closed {
		st.clean = true
		again = again || brief[st] || l.open(st) // a brief one gets its chains in any case
		st.brief = false
	}
	l.inputs.settled = l.inputs.settled || len(closed) > 0
	return again, nil
}

func (l *Loop) unclean() bool {
	for _, st := range l.states {
		if !st.clean {
			return true
		}
	}
	return false
}

// markOpened notes the opening of attachments in the registry. What fails is made up for by the next daemon that finds them open.
func (l *Loop) markOpened(in policy.Input) {
	marked := func(st *state) bool { return st.entry.Opened || st.entry.Detached || !st.clean }
	all := true
	for _, st := range l.states {
		all = all && marked(st)
	}
	if all {
		return
	}
	for i, st := range l.sortedStates() {
		if marked(st) || in.Endpoints[i].Pod == nil {
			continue
		}
		st.entry.Opened = true
		if err := l.registry.SetOpened(st.entry.Key, st.entry.Seq, true); err != nil {
			l.cfg.Log.Warn("it will not be known that the ADD was finished: its connections are forgotten should the tables be gone at the next start", "attachment", st.entry.Key, "error", err)
		}
	}
}

// forgetPickedUp follows the commit that has brought back the rules of addresses that return.
func (l *Loop) forgetPickedUp(ips []netip.Addr) error {
	if len(ips) == 0 {
		return nil
	}
	if err := l.cfg.Connections.ForgetPickedUp(ips); err != nil {
		return fmt.Errorf("forget the connections of %v that were picked up in the middle: %w", ips, err)
	}
	return nil
}

// forget deletes the connections of addresses that are closed or nobody's.
func (l *Loop) forget(ips []netip.Addr) error {
	if len(ips) == 0 {
		return nil
	}
	if err := l.cfg.Connections.Forget(ips); err != nil {
		return fmt.Errorf("forget the connections of %v: %w", ips, err)
	}
	if l.revoker != nil {
		l.revoker.owned(ips)
	}
	return nil
}
