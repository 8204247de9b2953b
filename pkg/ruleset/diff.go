package ruleset

import (
	"maps"
	"slices"
	"strings"
)

// OpKind is what an Op does.
type OpKind uint8

// The operations, as the kernel knows them.
const (
	AddTable    OpKind = iota + 1
	AddSet             // Set without its elements
	AddChain           // Chain without its rules
	AddElements        // Elements into Set
	DelElements        // Elements out of Set
	FlushChain         // all rules of Chain
	AddRules           // Chain.Rules behind those that are there
	DelChain           // Chain, which is flushed and no longer referred to
	DelSet             // Set, which is no longer referred to
	DelTable           // Table with everything in it
)

// Op is one step of a transaction.
type Op struct {
	Kind     OpKind
	Table    TableID
	Set      *Set
	Chain    *Chain
	Elements map[Elem]Verdict
}

// Delta is what has to happen to turn one ruleset into another.
type Delta struct {
	// Prepare is a transaction of its own, committed before Apply: new interval sets, which must be complete before a
	// rule looks at them, and new chains that elements are to lead packets to at once (rechains), with what they look up.
	// Nothing refers to any of it yet, so it changes no verdict.
	Prepare []Op
	// Apply is the one atomic transaction.
	Apply []Op
	// Cleanup holds base chains of devices that are to go, and after them what only they still refer to. Each operation is
	// a transaction of its own in which ENOENT is success: before Linux 6.16 the kernel removes such a chain together with
	// its device.
	Cleanup []Op
}

// Empty reports whether there is nothing to do.
func (d Delta) Empty() bool { return len(d.Prepare) == 0 && len(d.Apply) == 0 && len(d.Cleanup) == 0 }

// Transactions is how many transactions the delta takes at most; fewer when something of Cleanup has gone already.
func (d Delta) Transactions() int {
	n := len(d.Cleanup)
	for _, ops := range [][]Op{d.Prepare, d.Apply} {
		if len(ops) > 0 {
			n++
		}
	}
	return n
}

// Diff returns the smallest delta between two rulesets: elements are added and removed one by one, a chain whose rules
// differ is rewritten whole. Objects that both share by pointer are not looked at. The operations are in the order that
// the kernel needs: an object is added before anything refers to it and removed after.
func Diff(from, to Ruleset) Delta {
	var d Delta
	for _, t := range to {
		old := from.Table(t.ID)
		if old == t {
			continue
		}
		if old != nil && otherSets(old, t) {
			// A set cannot be changed into another kind while rules look at it: the table is replaced, in one transaction.
			var anew Delta
			diffTable(nil, t, &anew)
			d.Apply = append(d.Apply, Op{Kind: DelTable, Table: t.ID})
			d.Apply = slices.Concat(d.Apply, anew.Prepare, anew.Apply)
			continue
		}
		diffTable(old, t, &d)
	}
	for _, t := range from {
		if to.Table(t.ID) == nil {
			d.Apply = append(d.Apply, Op{Kind: DelTable, Table: t.ID})
		}
	}
	return d
}

func diffTable(from, to *Table, d *Delta) {
	ops := func(kind OpKind, list *[]Op) func(Op) {
		return func(o Op) {
			o.Kind, o.Table = kind, to.ID
			*list = append(*list, o)
		}
	}
	if from == nil {
		from = NewTable(to.ID)
		newTable := ops(AddTable, &d.Apply)
		if hasIntervals(to) {
			newTable = ops(AddTable, &d.Prepare)
		}
		newTable(Op{})
	}
	begin := len(d.Apply)
	elements := diffSets(from, to, d)

	// New chains first and empty, so that rules and verdicts may name them in any order.
	for name, c := range sorted(to.Chains) {
		if old := from.Chains[name]; old == nil || !sameHook(old, c) {
			if old != nil {
				// The hook of a base chain cannot be changed, only replaced: in one transaction, so nothing slips through.
				ops(FlushChain, &d.Apply)(Op{Chain: old})
				ops(DelChain, &d.Apply)(Op{Chain: old})
			}
			ops(AddChain, &d.Apply)(Op{Chain: c})
		}
	}
	for name, c := range sorted(to.Chains) {
		old := from.Chains[name]
		fresh := old == nil || !sameHook(old, c)
		if !fresh && (old == c || sameRules(old, c)) {
			continue
		}
		if !fresh {
			ops(FlushChain, &d.Apply)(Op{Chain: c})
		}
		if len(c.Rules) > 0 {
			ops(AddRules, &d.Apply)(Op{Chain: c})
		}
	}
	if rechains(from, to) {
		own := d.Apply[begin:]
		d.Apply = d.Apply[:begin:begin]
		for _, op := range slices.Concat(own, elements) {
			switch {
			case op.Set != nil && from.Sets[op.Set.Name] == nil, op.Chain != nil && op.Chain.Hook == nil && from.Chains[op.Chain.Name] == nil:
				d.Prepare = append(d.Prepare, op)
			default:
				d.Apply = append(d.Apply, op)
			}
		}
	} else {
		d.Apply = append(d.Apply, elements...)
	}
	removeObjects(from, to, d)
}

// rechains reports whether an element of a verdict map is to lead to a new chain. A packet takes the generation of rules once for each base chain,
// and that of elements at each lookup (nft_do_chain and nft_lookup_eval in net/netfilter): one that is under way when both are committed finds
// the new element and the new chain without its rules. Measured on 6.18: of 300 such commits 256 let a packet pass that was to be dropped before
// and after, from a sender whose own chain has 1,000 rules; none if the chain is there before.
//
// What an element drops without a chain is excepted: that is the state of a moment, in which nobody sends.
func rechains(from, to *Table) bool {
	for name, s := range to.Sets {
		old := from.Sets[name]
		if !s.Map || old == nil || old == s {
			continue
		}
		for e, v := range s.Elements {
			if to.Chains[v.Chain] != nil && from.Chains[v.Chain] == nil && old.Elements[e].Kind != Drop {
				return true
			}
		}
	}
	return false
}

// otherSets reports whether both tables have a set of one name that is not of one kind.
func otherSets(a, b *Table) bool {
	for name, s := range b.Sets {
		if old := a.Sets[name]; old != nil && old != s &&
			(old.Map != s.Map || old.Interval != s.Interval || old.Timeout != s.Timeout || old.Dynamic != s.Dynamic || old.Size != s.Size || !slices.Equal(old.Key, s.Key)) {
			return true
		}
	}
	return false
}

func hasIntervals(t *Table) bool {
	for _, s := range t.Sets {
		if s.Interval {
			return true
		}
	}
	return false
}

// diffSets appends the new sets to d and returns the changes of elements: removals first, since a changed verdict is a
// removed and an added element.
func diffSets(from, to *Table, d *Delta) []Op {
	var add, remove []Op
	for name, s := range sorted(to.Sets) {
		old := from.Sets[name]
		if old == s {
			continue
		}
		op := Op{Table: to.ID, Set: s}
		if old == nil {
			list := &d.Apply
			if s.Interval {
				list = &d.Prepare
			}
			op.Kind = AddSet
			*list = append(*list, op)
			if len(s.Elements) > 0 && s.Timeout == 0 {
				op.Kind, op.Elements = AddElements, s.Elements
				if s.Interval {
					*list = append(*list, op)
				} else {
					add = append(add, op)
				}
			}
			continue
		}
		if s.Timeout > 0 {
			continue
		}
		if gone := without(old.Elements, s.Elements); len(gone) > 0 {
			remove = append(remove, Op{Kind: DelElements, Table: to.ID, Set: s, Elements: gone})
		}
		if added := without(s.Elements, old.Elements); len(added) > 0 {
			add = append(add, Op{Kind: AddElements, Table: to.ID, Set: s, Elements: added})
		}
	}
	// The elements of a verdict map refer to chains: they go before their chains do, also when the whole map goes.
	for name, s := range sorted(from.Sets) {
		if to.Sets[name] == nil && s.Map && len(s.Elements) > 0 {
			remove = append(remove, Op{Kind: DelElements, Table: to.ID, Set: s, Elements: s.Elements})
		}
	}
	return append(remove, add...)
}

// without returns the elements of a that b has not, or has with another verdict.
func without(a, b map[Elem]Verdict) map[Elem]Verdict {
	var left map[Elem]Verdict
	for e, v := range a {
		if w, ok := b[e]; ok && v == w {
			continue
		}
		if left == nil {
			left = map[Elem]Verdict{}
		}
		left[e] = v
	}
	return left
}

// removeObjects flushes all chains that are to go before it deletes the first, since they may refer to each other, and
// deletes sets last. What a chain in Cleanup refers to cannot go before that chain.
func removeObjects(from, to *Table, d *Delta) {
	var flush, del, late []Op
	held := references{chains: map[string]bool{}, sets: map[string]bool{}}
	for name, c := range sorted(from.Chains) {
		if to.Chains[name] == nil && c.Hook != nil && c.Hook.Device != "" {
			d.Cleanup = append(d.Cleanup, Op{Kind: DelChain, Table: to.ID, Chain: c})
			held.add(c)
		}
	}
	for name, c := range sorted(from.Chains) {
		if to.Chains[name] != nil || c.Hook != nil && c.Hook.Device != "" {
			continue
		}
		flush = append(flush, Op{Kind: FlushChain, Table: to.ID, Chain: c})
		list := &del
		if held.all || held.chains[name] {
			list = &late
		}
		*list = append(*list, Op{Kind: DelChain, Table: to.ID, Chain: c})
	}
	for name, s := range sorted(from.Sets) {
		if to.Sets[name] != nil {
			continue
		}
		list := &del
		if held.all || held.sets[name] {
			list = &late
		}
		*list = append(*list, Op{Kind: DelSet, Table: to.ID, Set: s})
	}
	d.Apply = slices.Concat(d.Apply, flush, del)
	d.Cleanup = append(d.Cleanup, late...)
}

// references are the names that rules refer to; all is set when some rules could not be read.
type references struct {
	all          bool
	chains, sets map[string]bool
}

func (r *references) add(c *Chain) {
	r.all = r.all || c.Unknown
	for _, rule := range c.Rules {
		for _, e := range rule.Exprs {
			switch e := e.(type) {
			case Verdict:
				r.chains[e.Chain] = true
			case In:
				r.sets[e.Set] = true
			case Dispatch:
				r.sets[e.Map] = true
			case LimitEach:
				r.sets[e.Set] = true
			}
		}
	}
}

func sameHook(a, b *Chain) bool {
	if a.Hook == nil || b.Hook == nil {
		return a.Hook == b.Hook
	}
	return *a.Hook == *b.Hook
}

func sameRules(a, b *Chain) bool {
	return !a.Unknown && !b.Unknown && slices.EqualFunc(a.Rules, b.Rules, func(x, y Rule) bool { return x.text == y.text })
}

func sorted[V any](m map[string]V) func(func(string, V) bool) {
	return func(yield func(string, V) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

var opText = map[OpKind]string{
	AddTable: "add table", DelTable: "delete table",
	AddSet: "add set", DelSet: "delete set", AddElements: "add element", DelElements: "delete element",
	AddChain: "add chain", FlushChain: "flush chain", AddRules: "add rule", DelChain: "delete chain",
}

// Name says what the operation does to which object.
func (o Op) Name() string {
	text := opText[o.Kind] + " " + string(o.Table.Family) + " " + o.Table.Name
	switch {
	case o.Set != nil:
		text += " " + o.Set.Name
	case o.Chain != nil:
		text += " " + o.Chain.Name
	}
	return text
}

// String is Name with the elements, for `podwalld ruleset --diff`.
func (o Op) String() string {
	if len(o.Elements) == 0 {
		return o.Name()
	}
	elements := make([]string, 0, len(o.Elements))
	for _, e := range slices.Sorted(maps.Keys(o.Elements)) {
		s := o.Set.elemText(e)
		if o.Set.Map {
			s += " : " + o.Elements[e].String()
		}
		elements = append(elements, s)
	}
	return o.Name() + " { " + strings.Join(elements, ", ") + " }"
}
