package reconcile

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strings"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// States of a pod on this node.
const (
	StateEnforced    = "enforced"
	StateHidden      = "unenforceable" // its rules are loaded, but its bridge's traffic does not pass them
	StateQuarantined = "quarantined"   // closed both ways: not known yet
	StateDetached    = "detached"      // closed both ways: deleted, its host link is still there
)

// PodStatus is one pod of this node as enforced now.
type PodStatus struct {
	Namespace  string       `json:"namespace"`
	Name       string       `json:"name"`
	IPs        []netip.Addr `json:"ips"`
	State      string       `json:"state"`
	Reason     string       `json:"reason,omitempty"` // why it is closed
	Ingress    []string     `json:"ingress"`          // policies that isolate it, namespace/name; null when this direction is open
	Egress     []string     `json:"egress"`
	Attachment string       `json:"attachment,omitempty"` // containerID/ifname; empty for an adopted pod
	Link       string       `json:"link,omitempty"`
	Bridge     string       `json:"bridge,omitempty"`

	seq uint64
}

// PolicyStatus is one policy as seen from this node.
type PolicyStatus struct {
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	Pods      []string `json:"pods"` // of this node, namespace/name
	Problems  []string `json:"problems,omitempty"`
}

// NodeStatus is the node in short.
type NodeStatus struct {
	Ready         bool     `json:"ready"`
	Node          string   `json:"node"`
	Enforced      int      `json:"enforced"`
	Quarantined   int      `json:"quarantined"`
	Unenforceable int      `json:"unenforceable"`
	Detached      int      `json:"detached"`
	Adopted       int      `json:"adopted"`
	Policies      int      `json:"policies"`
	Problems      []string `json:"problems"`
	Error         string   `json:"error,omitempty"` // of the last pass, when it failed
}

// publish makes the outcome of a pass visible, if it is another one than that of the last.
func (l *Loop) publish(w wanted) {
	now, _ := l.current()
	refused := w.whole != nil || len(l.refused.endpoints)+len(l.refused.left) > 0
	i := &l.inputs
	if now.ready && now.err == nil && !refused && !i.refusedShown && !i.stale && !i.settled && i.shown == i.version && i.engineShown == l.engine.Version() {
		return
	}
	i.shown, i.engineShown, i.refusedShown = i.version, l.engine.Version(), refused
	in, problems, verdicts := w.in, w.next.Problems, func(id string) policy.Verdicts { return w.next.Endpoints[id] }
	if w.whole == nil {
		problems, verdicts = l.engine.Problems(), l.engine.Verdicts
	}
	states := l.sortedStates()
	v := view{ready: true, attached: len(states), problems: l.problemsOf(in, problems)}
	counts := map[string]int{StateEnforced: 0, StateHidden: 0, StateQuarantined: 0, StateDetached: 0}
	adopted := 0
	v.pods = make([]PodStatus, len(in.Endpoints))
	for i, e := range in.Endpoints {
		s := &v.pods[i]
		s.IPs, s.Link, s.Bridge = e.IPs, e.Link, e.Bridge
		s.State = StateEnforced
		by := verdicts(e.ID)
		s.Ingress, s.Egress = by.Ingress, by.Egress
		switch {
		case i < len(states): // endpoints of attachments come first, in the same order
			st := states[i]
			s.Namespace, s.Name = st.entry.Pod.Namespace, st.entry.Pod.Name
			s.Attachment, s.seq = st.name, st.entry.Seq
			if e.Pod == nil {
				s.State, s.Reason = StateQuarantined, l.reason(st)
				if st.entry.Detached && st.clean {
					s.State = StateDetached
				}
			}
			if s.State == StateEnforced && st.hidden != nil {
				s.State, s.Reason = StateHidden, st.hidden.Error()
			}
		case e.Pod == nil:
			s.Name, s.State, s.Reason = lostRegistration, StateDetached, "its registration is damaged or was removed; delete the pod"
		default:
			s.Namespace, s.Name = e.Pod.Namespace, e.Pod.Name
		}
		if reason := l.refused.closedFor(e.ID); reason != "" && e.Name != lostRegistration && (s.Attachment == "" || s.State != StateDetached) {
			s.State, s.Reason = StateQuarantined, reason
			s.Namespace, s.Name, _ = strings.Cut(e.Name, "/")
		}
		if s.State == StateEnforced && s.Attachment == "" {
			adopted++
		} else {
			counts[s.State]++
		}
	}
	for state, n := range counts {
		l.cfg.Metrics.Attachments.WithLabelValues(state).Set(float64(n))
	}
	l.cfg.Metrics.AdoptedPods.Set(float64(adopted))
	l.cfg.Metrics.Problems.Set(float64(len(v.problems)))
	l.cfg.Metrics.Synced.Set(1)
	l.logProblems(v.problems)

	l.show(v)
}

// show replaces what was published and wakes those who wait for it.
func (l *Loop) show(v view) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.published = v
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *Loop) reason(st *state) string {
	switch {
	case st.entry.Detached:
		return "it was deleted"
	case st.pod == nil:
		return "its object is not known on node " + l.cfg.NodeName + " (namespace, name and UID must agree)"
	case st.link == nil:
		return "its host link " + st.entry.HostLink.Name + " could not be looked up"
	}
	return "the connections of its address's former owner are being forgotten"
}

// logProblems logs each problem once, and again if it went away and came back.
func (l *Loop) logProblems(list []policy.Problem) {
	now := make(map[policy.Problem]bool, len(list))
	for _, p := range list {
		now[p] = true
		if !l.problems[p] {
			l.cfg.Log.Warn("object cannot be used as written", "kind", p.Object.Kind.String(), "namespace", p.Object.Namespace, "name", p.Object.Name, "reason", p.Reason)
		}
	}
	l.problems = now
}

// Pods returns the pods of this node.
func (l *Loop) Pods() []PodStatus {
	now, _ := l.current()
	return now.pods
}

// Policies returns all policies.
func (l *Loop) Policies() []PolicyStatus {
	now, _ := l.current()
	if !now.ready {
		return nil
	}
	selected := map[string][]string{}
	for _, p := range now.pods {
		names := slices.Concat(p.Ingress, p.Egress)
		slices.Sort(names)
		for _, name := range slices.Compact(names) {
			selected[name] = append(selected[name], p.Namespace+"/"+p.Name)
		}
	}
	problems := map[cluster.Key][]string{}
	for _, p := range now.problems {
		problems[p.Object] = append(problems[p.Object], p.Reason)
	}
	var list []PolicyStatus
	l.shared.RLock()
	for p := range l.model.Policies() {
		list = append(list, PolicyStatus{Namespace: p.Namespace, Name: p.Name, Pods: selected[p.Namespace+"/"+p.Name], Problems: problems[p.Key()]})
	}
	l.shared.RUnlock()
	slices.SortFunc(list, func(a, b PolicyStatus) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return list
}

// Ruleset returns a copy of what was loaded last.
func (l *Loop) Ruleset() ruleset.Ruleset {
	if now, _ := l.current(); !now.ready {
		return nil
	}
	l.shared.RLock()
	defer l.shared.RUnlock()
	return l.inForce.Clone()
}

// KernelRuleset reads what is loaded now.
func (l *Loop) KernelRuleset(ctx context.Context) (ruleset.Ruleset, error) {
	return l.cfg.Kernel.Read(ctx, l.tables()...)
}

// NodeStatus returns the node in short.
func (l *Loop) NodeStatus() NodeStatus {
	now, _ := l.current()
	s := NodeStatus{Ready: now.ready, Node: l.cfg.NodeName, Problems: []string{}}
	if now.ready {
		l.shared.RLock()
		s.Policies = l.model.PolicyCount()
		l.shared.RUnlock()
	}
	for _, p := range now.pods {
		switch {
		case p.State == StateEnforced && p.Attachment == "":
			s.Adopted++
		case p.State == StateEnforced:
			s.Enforced++
		case p.State == StateHidden:
			s.Unenforceable++
		case p.State == StateDetached:
			s.Detached++
		default:
			s.Quarantined++
		}
	}
	for _, p := range now.problems {
		s.Problems = append(s.Problems, p.String())
	}
	if now.err != nil {
		s.Error = now.err.Error()
	}
	return s
}

// Snapshot returns what was rendered last. It is a copy, of names and not of objects, and costs that much: for operators' questions.
func (l *Loop) Snapshot() policy.Input {
	l.shared.RLock()
	defer l.shared.RUnlock()
	return policy.Input{Model: l.model.Clone(), Endpoints: slices.Clone(l.endpoints), Options: l.cfg.Policy}
}

// PodAt returns the pod whose object claims an address, or nil.
func (l *Loop) PodAt(ip netip.Addr) *cluster.Pod {
	l.shared.RLock()
	defer l.shared.RUnlock()
	return l.engine.PodAt(ip)
}
