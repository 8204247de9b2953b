package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// A transaction is all or nothing, so one object that the kernel does not take would keep every other change out of it. Such an object is
// found: by the operation that the kernel names, else by search. The endpoints that need it are closed and what is to be deleted and
// cannot be is left where it is; the rest is committed. It is tried again with a growing pause, and at once when its pod or a
// policy of its namespace has changed.
const (
	refusedFirst = 10 * time.Second
	refusedMost  = 5 * time.Minute
)

// refusal is one endpoint that is closed, or one object that is left in the kernel, because of what the kernel does not take.
type refusal struct {
	err    error
	what   string        // the object of the kernel, "chain pi_...", when that is known
	blamed []cluster.Key // the objects that it was rendered from
	link   bool          // not even the endpoint's closed form is taken: the chains of its host veth stay as they are in the kernel

	basis basis // what the endpoint was rendered from
	next  time.Time
	pause time.Duration
	trial bool // this pass tries without it
}

// basis tells whether an endpoint would be rendered as it was. Objects are replaced, never changed.
type basis struct {
	pod      *cluster.Pod
	policies map[*cluster.Policy]bool
}

func (b basis) same(o basis) bool { return b.pod == o.pod && maps.Equal(b.policies, o.policies) }

// object names a chain or a set in the kernel.
type object struct {
	table ruleset.TableID
	set   bool
	name  string
}

func (o object) String() string {
	return map[bool]string{true: "set ", false: "chain "}[o.set] + string(o.table.Family) + " " + o.table.Name + " " + o.name
}

// refusals are what the kernel does not take at present.
type refusals struct {
	endpoints map[string]*refusal // by policy.Endpoint.ID
	left      map[object]*refusal
}

// again decides which of them are tried in this pass, and forgets those whose endpoint has ended.
func (r *refusals) again(in policy.Input, now time.Time) {
	if r.endpoints == nil {
		r.endpoints, r.left = map[string]*refusal{}, map[object]*refusal{}
	}
	if len(r.endpoints) == 0 && len(r.left) == 0 {
		return
	}
	here := map[string]*policy.Endpoint{}
	for i := range in.Endpoints {
		here[in.Endpoints[i].ID] = &in.Endpoints[i]
	}
	for id, x := range r.endpoints {
		e := here[id]
		switch {
		case e == nil:
			delete(r.endpoints, id)
		case !x.next.After(now):
			x.trial = true
		case e.Pod != nil && !basisOf(in.Model, e).same(x.basis):
			x.trial, x.pause = true, 0
		}
	}
	for _, x := range r.left {
		x.trial = !x.next.After(now)
	}
}

// taken forgets those that were tried by a pass that the kernel took.
func (r *refusals) taken() {
	tried := func(x *refusal) bool { return x.trial }
	maps.DeleteFunc(r.endpoints, func(_ string, x *refusal) bool { return tried(x) })
	maps.DeleteFunc(r.left, func(_ object, x *refusal) bool { return tried(x) })
}

func (x *refusal) wait(now time.Time) {
	x.trial = false
	x.pause = min(max(2*x.pause, refusedFirst), refusedMost)
	x.next = now.Add(x.pause)
}

func basisOf(m *cluster.Model, e *policy.Endpoint) basis {
	b := basis{pod: e.Pod, policies: map[*cluster.Policy]bool{}}
	if e.Pod == nil {
		return b
	}
	for p := range m.PoliciesIn(e.Pod.Namespace) {
		b.policies[p] = true
	}
	return b
}

// leaves reports whether something is left in the kernel that is not wanted.
func (r *refusals) leaves() bool {
	for _, x := range r.left {
		if !x.trial {
			return true
		}
	}
	return false
}

// taken returns the input with the endpoints closed that are refused, and the IDs of those whose links stay as they are in the kernel.
func (l *Loop) taken(in policy.Input) (policy.Input, []string) {
	if len(l.refused.endpoints) == 0 {
		return in, nil
	}
	in.Endpoints = slices.Clone(in.Endpoints)
	var linkless []string
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		if x := l.refused.endpoints[e.ID]; x != nil && !x.trial {
			e.Pod = nil
			if x.link {
				e.Link, e.Bridge = "", ""
				linkless = append(linkless, e.ID)
			}
		}
	}
	return in, linkless
}

// problemsOf adds to what is wrong with objects what is wrong with this node's pods.
func (l *Loop) problemsOf(in policy.Input, list []policy.Problem) []policy.Problem {
	list = slices.Concat(list, l.conflicts(in), l.unenforceable(), l.refusedProblems(in))
	slices.SortFunc(list, func(a, b policy.Problem) int { return cmp.Compare(a.String(), b.String()) })
	return list
}

// renderTaken renders all of it but what is refused.
func (l *Loop) renderTaken(in policy.Input) (policy.Input, policy.Output) {
	in, linkless := l.taken(in)
	out := policy.Render(in)
	for _, t := range l.loaded {
		for name, c := range t.Chains {
			x := l.refused.left[object{table: t.ID, name: name}]
			if x != nil && !x.trial || slices.ContainsFunc(linkless, func(id string) bool { return c.Hook != nil && ownedBy(name, id) }) {
				leave(&out, t.ID).Chains[name] = c
			}
		}
		for name, s := range t.Sets {
			if x := l.refused.left[object{table: t.ID, set: true, name: name}]; x != nil && !x.trial {
				leave(&out, t.ID).Sets[name] = s
			}
		}
	}
	return in, out
}

// leave returns the table in which something is to be left, which the desired ruleset may not have any more.
func leave(out *policy.Output, id ruleset.TableID) *ruleset.Table {
	if t := out.Ruleset.Table(id); t != nil {
		return t
	}
	t := ruleset.NewTable(id)
	out.Ruleset = append(out.Ruleset, t)
	return t
}

// isolate follows a refused commit: it finds what the kernel does not take and commits the rest. It returns what is in the kernel
// then, or the error when the fault is in no endpoint's objects.
func (l *Loop) isolate(ctx context.Context, before ruleset.Ruleset, refused error) (wanted, error) {
	var in policy.Input
	var out policy.Output
	if !nft.IsRefusal(refused) || !unchanged(before, l.loaded) {
		return wanted{}, refused // the difference was to something that is not there: it is taken anew
	}
	full := l.input()
	full.CutBeforeNAT = l.revoker != nil && l.revoker.beforeNAT()
	try := func() error {
		in, out = l.renderTaken(full)
		if err := l.commit(ctx, ruleset.Diff(l.loaded, out.Ruleset)); err != nil {
			return err
		}
		l.loaded = out.Ruleset
		return nil
	}
	in, out = l.renderTaken(full)
	err := refused
	if l.replace(ctx, refused, out.Ruleset) {
		err = nil
	}
	for err != nil && nft.IsRefusal(err) {
		if l.blame(full, out.Ruleset, err) {
			err = try()
			continue
		}
		if err = l.search(full, err, try); err == nil {
			in, out = l.renderTaken(full)
		}
		break
	}
	if err != nil {
		return wanted{}, err
	}
	l.loaded = out.Ruleset
	now := l.cfg.Clock.Now()
	for id, x := range l.refused.endpoints {
		if !x.trial && x.next.IsZero() {
			x.wait(now)
			l.cfg.Log.Error("the kernel refuses what a pod needs: it is closed, and everything else is enforced", "endpoint", id, "refused", x.what, "error", x.err, "retry", x.pause)
		}
	}
	for o, x := range l.refused.left {
		if !x.trial && x.next.IsZero() {
			x.wait(now)
			l.cfg.Log.Error("the kernel does not delete what is not needed any more: it is left, and everything else is enforced", "refused", o.String(), "error", x.err, "retry", x.pause)
		}
	}
	return wanted{in: in, delta: ruleset.Diff(before, out.Ruleset), before: before, whole: out.Ruleset, next: out}, nil
}

// unchanged reports whether all is in a ruleset as it was before, and nothing else but what has been prepared for a transaction that was refused.
func unchanged(before, now ruleset.Ruleset) bool {
	d := ruleset.Diff(before, now)
	return !slices.ContainsFunc(slices.Concat(d.Prepare, d.Apply, d.Cleanup), func(op ruleset.Op) bool {
		t := before.Table(op.Table)
		switch {
		case t == nil:
			return true
		case op.Set != nil:
			return t.Sets[op.Set.Name] != nil
		case op.Chain != nil:
			return t.Chains[op.Chain.Name] != nil || op.Chain.Hook != nil
		}
		return true
	})
}

// replace serves a table that somebody has changed so that no difference leads back to ours: a set of another type has the name of
// one of ours, or something that cannot be read holds a chain. The table goes and comes back as desired in one transaction.
func (l *Loop) replace(ctx context.Context, refused error, want ruleset.Ruleset) bool {
	var at *nft.CommitError
	if !errors.As(refused, &at) {
		return false
	}
	id := at.Refused().Table
	have, desired := l.loaded.Table(id), want.Table(id)
	if have == nil || desired == nil || !errors.Is(refused, unix.EBUSY) && !nft.IsExist(refused) && !clash(have, desired) {
		return false
	}
	d := ruleset.Diff(slices.DeleteFunc(slices.Clone(l.loaded), func(t *ruleset.Table) bool { return t.ID == id }), want)
	// What a table holds that goes in the same transaction cannot be prepared in one before it.
	d = ruleset.Delta{Apply: slices.Concat([]ruleset.Op{{Kind: ruleset.DelTable, Table: id}}, d.Prepare, d.Apply), Cleanup: d.Cleanup}
	if err := l.commit(ctx, d); err != nil {
		return false
	}
	l.cfg.Metrics.Drift.Inc()
	l.cfg.Log.Error("somebody else has changed podwall's table in a way that could not be undone piece by piece: it has been replaced", "table", fmt.Sprintf("%s %s", id.Family, id.Name), "error", refused, "committed", l.foreign.by())
	return true
}

// clash reports whether a set has another type than the one that is desired under its name.
func clash(have, want *ruleset.Table) bool {
	for name, w := range want.Sets {
		if h := have.Sets[name]; h != nil && (h.Map != w.Map || h.Interval != w.Interval || !slices.Equal(h.Key, w.Key)) {
			return true
		}
	}
	return false
}

// blame adds the refusal of what the kernel has named, and reports whether that is something new.
func (l *Loop) blame(in policy.Input, rendered ruleset.Ruleset, err error) bool {
	var commit *nft.CommitError
	if !errors.As(err, &commit) {
		return false
	}
	at := commit.Refused()
	o := object{table: at.Table, set: at.Kind == "set" || at.Kind == "element", name: at.Name}
	if at.Name == "" {
		return false
	}
	if at.Verb != "add" && !o.in(rendered) {
		if x := l.refused.left[o]; x != nil && !x.trial {
			return false
		}
		l.refused.left[o] = again(l.refused.left[o], commit.Err)
		return true
	}
	policies := map[cluster.Key]bool{}
	found := false
	for id := range behind(o, rendered, in, policies) {
		x := l.refused.endpoints[id]
		switch {
		case x == nil || x.trial:
			l.refuse(in, id, commit.Err)
			x = l.refused.endpoints[id]
			x.blamed = slices.SortedFunc(maps.Keys(policies), func(a, b cluster.Key) int { return cmp.Compare(a.String(), b.String()) })
		case !x.link:
			x.link, x.next = true, time.Time{}
		default:
			continue
		}
		x.what, found = o.String(), true
	}
	return found
}

// in reports whether a ruleset has the object.
func (o object) in(rs ruleset.Ruleset) bool {
	t := rs.Table(o.table)
	return t != nil && (o.set && t.Sets[o.name] != nil || !o.set && t.Chains[o.name] != nil)
}

// again is a refusal that is to be waited for, longer than the last time.
func again(old *refusal, err error) *refusal {
	x := &refusal{err: err}
	if old != nil {
		x.pause = old.pause
	}
	return x
}

// refuse closes an endpoint.
func (l *Loop) refuse(in policy.Input, id string, err error) {
	i := slices.IndexFunc(in.Endpoints, func(e policy.Endpoint) bool { return e.ID == id })
	x := again(l.refused.endpoints[id], err)
	x.basis = basisOf(in.Model, &in.Endpoints[i])
	l.refused.endpoints[id] = x
}

// behind returns the endpoints whose chains lead to an object, and adds the policies on the way. What all endpoints share has a name
// without an underscore and is nobody's.
func behind(o object, rs ruleset.Ruleset, in policy.Input, policies map[cluster.Key]bool) map[string]bool {
	found := map[string]bool{}
	t := rs.Table(o.table)
	if t == nil || !strings.Contains(o.name, "_") {
		return found
	}
	seen := map[object]bool{}
	for list := []object{o}; len(list) > 0; {
		o := list[0]
		list = list[1:]
		if seen[o] {
			continue
		}
		seen[o] = true
		if i := slices.IndexFunc(in.Endpoints, func(e policy.Endpoint) bool { return !o.set && ownedBy(o.name, e.ID) }); i >= 0 {
			found[in.Endpoints[i].ID] = true
			continue
		}
		if c := t.Chains[o.name]; !o.set && len(seen) == 1 && c != nil {
			for _, r := range c.Rules {
				namedBy(r.Comment, in.Model, policies) // which of them is at fault is not known
			}
		}
		for _, c := range t.Chains {
			comment := ""
			for _, r := range c.Rules {
				// In a chain of several policies, the first rule of each names it.
				if comment = cmp.Or(r.Comment, comment); !slices.ContainsFunc(r.Exprs, o.usedBy) {
					continue
				}
				list = append(list, object{table: o.table, name: c.Name})
				if o.set {
					namedBy(comment, in.Model, policies)
				} else {
					namedBy(r.Comment, in.Model, policies)
				}
			}
		}
	}
	return found
}

// namedBy adds the policy that a rule's comment names, if it does.
func namedBy(comment string, model *cluster.Model, policies map[cluster.Key]bool) {
	if comment == "" {
		return
	}
	for p := range model.Policies() {
		if comment == ruleset.Comment(p.Namespace+"/"+p.Name) {
			policies[p.Key()] = true
		}
	}
}

func (o object) usedBy(e ruleset.Expr) bool {
	switch e := e.(type) {
	case ruleset.Verdict:
		return !o.set && e.Chain == o.name
	case ruleset.In:
		return o.set && e.Set == o.name
	case ruleset.Dispatch:
		return o.set && e.Map == o.name
	case ruleset.LimitEach:
		return o.set && e.Set == o.name
	}
	return false
}

// ownedBy reports whether a chain is an endpoint's own.
func ownedBy(chain, id string) bool {
	_, owner, ok := strings.Cut(chain, "_")
	return ok && owner == id
}

// search finds the endpoints that the kernel refuses when it says of the whole transaction only that it does: those that the transaction
// is about are closed, and opened again by halves for as long as that is refused. A refusal that was for once closes nobody.
func (l *Loop) search(full policy.Input, refused error, try func() error) error {
	if err := try(); err == nil || !nft.IsRefusal(err) {
		return err
	}
	in, out := l.renderTaken(full)
	suspects := l.concerned(in, out.Ruleset)
	if len(suspects) == 0 {
		return refused
	}
	set := func(ids []string, closed bool) {
		for _, id := range ids {
			if x := l.refused.endpoints[id]; !closed && x != nil {
				x.trial = true
			} else if closed {
				l.refuse(full, id, refused)
			}
		}
	}
	set(suspects, true)
	if err := try(); err != nil {
		set(suspects, false)
		return errors.Join(refused, err)
	}
	var open func(ids []string)
	open = func(ids []string) {
		set(ids, false)
		if try() == nil {
			return
		}
		set(ids, true)
		if n := len(ids); n > 1 {
			open(ids[:n/2])
			open(ids[n/2:])
		}
	}
	open(suspects)
	return nil
}

// concerned returns the open endpoints that the difference between what is loaded and what is desired is about.
func (l *Loop) concerned(in policy.Input, desired ruleset.Ruleset) []string {
	d := ruleset.Diff(l.loaded, desired)
	ids := map[string]bool{}
	for _, op := range slices.Concat(d.Prepare, d.Apply, d.Cleanup) {
		o := object{table: op.Table}
		switch {
		case op.Set != nil:
			o.set, o.name = true, op.Set.Name
		case op.Chain != nil:
			o.name = op.Chain.Name
		}
		for _, rs := range []ruleset.Ruleset{l.loaded, desired} {
			maps.Copy(ids, behind(o, rs, in, map[cluster.Key]bool{}))
		}
		for i := range in.Endpoints {
			if op.Set == nil || !op.Set.Map {
				break
			}
			for _, ip := range in.Endpoints[i].IPs {
				if _, ok := op.Elements[ruleset.AddrElem(ip)]; ok {
					ids[in.Endpoints[i].ID] = true
				}
			}
		}
	}
	var list []string
	for i := range in.Endpoints {
		if e := &in.Endpoints[i]; e.Pod != nil && ids[e.ID] {
			list = append(list, e.ID)
		}
	}
	return list
}

// refusedProblems tells which objects cannot be enforced, and which pods are closed for that.
func (l *Loop) refusedProblems(in policy.Input) []policy.Problem {
	type fault struct {
		object cluster.Key
		reason string
	}
	pods := map[fault][]string{}
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		x := l.refused.endpoints[e.ID]
		if x == nil || x.trial {
			continue
		}
		blamed := x.blamed
		if len(blamed) == 0 {
			namespace, name, _ := strings.Cut(e.Name, "/")
			blamed = []cluster.Key{{Kind: cluster.KindPod, Namespace: namespace, Name: name}}
		}
		for _, k := range blamed {
			f := fault{k, x.reason()}
			pods[f] = append(pods[f], e.Name)
		}
	}
	var list []policy.Problem
	for f, names := range pods {
		slices.Sort(names)
		list = append(list, policy.Problem{Object: f.object, Reason: fmt.Sprintf("%s; closed for that: %s", f.reason, strings.Join(slices.Compact(names), ", "))})
	}
	return list
}

func (x *refusal) reason() string {
	return fmt.Sprintf("the kernel refuses %s: %v; it is tried again after every change of the pod or of its namespace's policies, and every few minutes", cmp.Or(x.what, "its rules"), x.err)
}

// closedFor returns why an endpoint is closed that could be open, or nothing.
func (r *refusals) closedFor(id string) string {
	if x := r.endpoints[id]; x != nil && !x.trial {
		return x.reason()
	}
	return ""
}
