package ruleset

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// printOps leaves out the name of the table that most tests use.
func printOps(ops []Op) []string {
	var out []string
	for _, o := range ops {
		out = append(out, strings.Replace(o.String(), " inet podwall", "", 1))
	}
	return out
}

// inet returns a ruleset of one table with these sets and chains.
func inet(objects ...any) Ruleset {
	t := NewTable(inetTable)
	for _, o := range objects {
		switch o := o.(type) {
		case *Set:
			t.Sets[o.Name] = o
		case *Chain:
			t.Chains[o.Name] = o
		}
	}
	return Ruleset{t}
}

func withAddrs(s *Set, addrs ...string) *Set {
	for _, a := range addrs {
		s.Elements[AddrElem(addr(a))] = Verdict{}
	}
	return s
}

func interval(name string) *Set {
	s := set(name, IPv4Addr)
	s.Interval = true
	s.Elements[RangeElem(addr("10.0.0.0"), addr("10.0.0.9"))] = Verdict{}
	return s
}

func vmap(name, chain string, addrs ...string) *Set {
	s := set(name, IPv4Addr)
	s.Map = true
	for _, a := range addrs {
		s.Elements[AddrElem(addr(a))] = To(Goto, chain)
	}
	return s
}

func chain(name string, rules ...Rule) *Chain { return &Chain{Name: name, Rules: rules} }

func base(name string, priority int, device string, rules ...Rule) *Chain {
	hook := "forward"
	if device != "" {
		hook = "ingress"
	}
	return &Chain{Name: name, Hook: &Hook{Name: hook, Priority: priority, Device: device}, Rules: rules}
}

// dropping is a verdict map whose one element needs no chain.
func dropping() *Set {
	m := vmap("m", "", "10.0.0.1")
	for e := range m.Elements {
		m.Elements[e] = Verdict{Kind: Drop}
	}
	return m
}

func TestDiff(t *testing.T) {
	t.Parallel()
	var (
		drop     = NewRule(Verdict{Kind: Drop})
		accept   = NewRule(Verdict{Kind: Accept})
		dispatch = NewRule(Dispatch{Fields: []Field{IPSaddr}, Map: "m"})
		inB      = NewRule(In{Fields: []Field{IPSaddr}, Set: "b"}, Verdict{Kind: Accept})
		inP      = NewRule(In{Fields: []Field{IPSaddr}, Set: "p"}, Verdict{Kind: Accept})
		shared   = chain("shared", accept)
	)
	for _, tt := range []struct {
		name     string
		from, to Ruleset
		prepare  []string
		apply    []string
		cleanup  []string
	}{
		{name: "nothing to nothing"},
		{name: "nothing changes", from: sample(), to: sample()},
		{
			name:  "element of a set touches nothing else",
			from:  inet(withAddrs(set("p", IPv4Addr), "10.0.0.1", "10.0.0.2"), base("f", 0, "", inP)),
			to:    inet(withAddrs(set("p", IPv4Addr), "10.0.0.2", "10.0.0.3"), base("f", 0, "", inP)),
			apply: []string{"delete element p { 10.0.0.1 }", "add element p { 10.0.0.3 }"},
		},
		{
			name: "verdict of an element is removed, then added",
			from: inet(vmap("m", "a", "10.0.0.1", "10.0.0.2"), chain("a"), chain("b")),
			to: func() Ruleset {
				m := vmap("m", "a", "10.0.0.1", "10.0.0.2")
				m.Elements[AddrElem(addr("10.0.0.1"))] = To(Goto, "b")
				return inet(m, chain("a"), chain("b"))
			}(),
			apply: []string{"delete element m { 10.0.0.1 : goto a }", "add element m { 10.0.0.1 : goto b }"},
		},
		{
			name: "new table: sets, empty chains, rules, elements",
			to:   inet(vmap("m", "a", "10.0.0.1"), withAddrs(set("p", IPv4Addr), "10.0.0.2"), base("f", 0, "", dispatch), chain("a", NewRule(To(Jump, "b"))), chain("b", inP)),
			apply: []string{
				"add table", "add set m", "add set p", "add chain a", "add chain b", "add chain f",
				"add rule a", "add rule b", "add rule f",
				"add element m { 10.0.0.1 : goto a }", "add element p { 10.0.0.2 }",
			},
		},
		{
			name:    "new table with an interval set is made with it, before",
			to:      inet(interval("b"), base("f", 0, "", inB)),
			prepare: []string{"add table", "add set b", "add element b { 10.0.0.0-10.0.0.9 }"},
			apply:   []string{"add chain f", "add rule f"},
		},
		{
			name:    "interval set in a table that exists",
			from:    inet(base("f", 0, "")),
			to:      inet(interval("b"), set("p", IPv4Addr), base("f", 0, "", inB)),
			prepare: []string{"add set b", "add element b { 10.0.0.0-10.0.0.9 }"},
			apply:   []string{"add set p", "flush chain f", "add rule f"},
		},
		{
			name:  "interval set that is no longer used",
			from:  inet(interval("b"), base("f", 0, "", inB)),
			to:    inet(base("f", 0, "", drop)),
			apply: []string{"flush chain f", "add rule f", "delete set b"},
		},
		{
			name:  "rules of one chain",
			from:  inet(chain("a", accept), chain("b", accept)),
			to:    inet(chain("a", accept, drop), chain("b", accept)),
			apply: []string{"flush chain a", "add rule a"},
		},
		{
			name:  "order of rules",
			from:  inet(chain("a", accept, drop)),
			to:    inet(chain("a", drop, accept)),
			apply: []string{"flush chain a", "add rule a"},
		},
		{
			name:  "comment of a rule",
			from:  inet(chain("a", accept)),
			to:    inet(chain("a", accept.WithComment("why"))),
			apply: []string{"flush chain a", "add rule a"},
		},
		{
			name:  "chain that becomes empty",
			from:  inet(chain("a", accept)),
			to:    inet(chain("a")),
			apply: []string{"flush chain a"},
		},
		{
			name:  "chain whose rules could not be read",
			from:  inet(&Chain{Name: "a", Unknown: true}, chain("b", accept)),
			to:    inet(chain("a"), chain("b", accept)),
			apply: []string{"flush chain a"},
		},
		{
			name:  "chain before the rules that name it",
			from:  inet(chain("a", drop)),
			to:    inet(chain("a", NewRule(To(Jump, "z"))), chain("z", drop)),
			apply: []string{"add chain z", "flush chain a", "add rule a", "add rule z"},
		},
		{
			name:    "chain, whole, before the transaction with the elements that name it",
			from:    inet(vmap("m", "a"), base("f", 0, "", dispatch), chain("a", drop)),
			to:      inet(vmap("m", "z", "10.0.0.1"), withAddrs(set("p", IPv4Addr), "10.0.0.2"), base("f", 0, "", dispatch), chain("a", NewRule(To(Jump, "z"))), chain("z", inP)),
			prepare: []string{"add set p", "add chain z", "add rule z", "add element p { 10.0.0.2 }"},
			apply:   []string{"flush chain a", "add rule a", "add element m { 10.0.0.1 : goto z }"},
		},
		{
			name:    "the same instead of another chain",
			from:    inet(vmap("m", "a", "10.0.0.1"), base("f", 0, "", dispatch), chain("a", drop)),
			to:      inet(vmap("m", "z", "10.0.0.1"), base("f", 0, "", dispatch), chain("a", drop), chain("z", drop)),
			prepare: []string{"add chain z", "add rule z"},
			apply:   []string{"delete element m { 10.0.0.1 : goto a }", "add element m { 10.0.0.1 : goto z }"},
		},
		{
			name:  "the same instead of a drop, in one",
			from:  inet(dropping(), base("f", 0, "", dispatch)),
			to:    inet(vmap("m", "z", "10.0.0.1"), base("f", 0, "", dispatch), chain("z", drop)),
			apply: []string{"add chain z", "add rule z", "delete element m { 10.0.0.1 : drop }", "add element m { 10.0.0.1 : goto z }"},
		},
		{
			name: "removal: rules and elements, all chains empty, chains, sets",
			from: inet(vmap("m", "a", "10.0.0.1"), set("p", IPv4Addr), base("f", 0, "", dispatch), chain("a", NewRule(To(Jump, "b"))), chain("b", inP)),
			to:   inet(base("f", 0, "")),
			apply: []string{
				"flush chain f", "delete element m { 10.0.0.1 : goto a }",
				"flush chain a", "flush chain b", "delete chain a", "delete chain b", "delete set m", "delete set p",
			},
		},
		{
			name:  "base chain at another priority is replaced at once",
			from:  inet(base("f", 0, "", accept)),
			to:    inet(base("f", 10, "", accept)),
			apply: []string{"flush chain f", "delete chain f", "add chain f", "add rule f"},
		},
		{
			name:  "base chain becomes a regular one",
			from:  inet(base("f", 0, "", accept)),
			to:    inet(chain("f", accept)),
			apply: []string{"flush chain f", "delete chain f", "add chain f", "add rule f"},
		},
		{
			name:  "regular chain becomes a base chain",
			from:  inet(chain("f", accept)),
			to:    inet(base("f", 0, "", accept)),
			apply: []string{"flush chain f", "delete chain f", "add chain f", "add rule f"},
		},
		{
			name:    "chain of a device that goes",
			from:    inet(base("ve_1", -300, "veth1", drop), base("ve_2", -300, "veth2", drop), base("f", 0, "")),
			to:      inet(base("f", 0, "")),
			cleanup: []string{"delete chain ve_1", "delete chain ve_2"},
		},
		{
			name:    "what the chain of a device refers to goes after it, the rest does not wait",
			from:    inet(vmap("m", "a"), set("p", IPv4Addr), set("q", IPv4Addr), base("ve", 0, "veth1", dispatch, inP, NewRule(To(Jump, "a"))), chain("a", NewRule(To(Jump, "b"))), chain("b")),
			to:      inet(),
			apply:   []string{"flush chain a", "flush chain b", "delete chain b", "delete set q"},
			cleanup: []string{"delete chain ve", "delete chain a", "delete set m", "delete set p"},
		},
		{
			name:    "everything goes after the chain of a device that could not be read",
			from:    inet(set("p", IPv4Addr), &Chain{Name: "ve", Hook: &Hook{Name: "ingress", Device: "veth1"}, Unknown: true}, chain("a")),
			to:      inet(),
			apply:   []string{"flush chain a"},
			cleanup: []string{"delete chain ve", "delete chain a", "delete set p"},
		},
		{
			name:  "objects shared by pointer are not looked at",
			from:  inet(shared, chain("a", accept)),
			to:    inet(shared, chain("a", drop)),
			apply: []string{"flush chain a", "add rule a"},
		},
		{
			name:  "table that goes",
			from:  Ruleset{NewTable(inetTable), NewTable(netdevTable)},
			to:    Ruleset{NewTable(inetTable)},
			apply: []string{"delete table netdev podwall"},
		},
		{
			name:  "same name in another family is another table",
			from:  Ruleset{NewTable(inetTable)},
			to:    Ruleset{NewTable(netdevTable)},
			apply: []string{"add table netdev podwall", "delete table"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := Diff(tt.from, tt.to)
			for part, ops := range map[string]struct {
				want []string
				got  []Op
			}{"prepare": {tt.prepare, d.Prepare}, "apply": {tt.apply, d.Apply}, "cleanup": {tt.cleanup, d.Cleanup}} {
				if diff := cmp.Diff(ops.want, printOps(ops.got)); diff != "" {
					t.Errorf("%s (-want +got):\n%s", part, diff)
				}
			}
			if want := len(tt.prepare)+len(tt.apply)+len(tt.cleanup) == 0; d.Empty() != want {
				t.Errorf("Empty() = %v, want %v", d.Empty(), want)
			}
			if want := min(1, len(tt.prepare)) + min(1, len(tt.apply)) + len(tt.cleanup); d.Transactions() != want {
				t.Errorf("Transactions() = %d, want %d", d.Transactions(), want)
			}
		})
	}
}

// A pointer that both sides share is taken as unchanged: Diff must not read what is behind it, that is what makes a
// delta cost what changed and not what exists.
func TestDiffTrustsPointers(t *testing.T) {
	t.Parallel()
	unreadable := &Chain{Name: "a", Unknown: true} // looked at, it would be rewritten
	if d := Diff(inet(unreadable), inet(unreadable)); !d.Empty() {
		t.Errorf("shared chain: %v", printOps(d.Apply))
	}
	table := inet(unreadable)[0]
	if d := Diff(Ruleset{table}, Ruleset{table}); !d.Empty() {
		t.Errorf("shared table: %v", printOps(d.Apply))
	}

	// What is shared hides nothing of what comes behind it.
	d := Diff(Ruleset{table, NewTable(netdevTable)}, Ruleset{table, {ID: netdevTable, Chains: map[string]*Chain{"new": {Name: "new"}}}})
	if diff := cmp.Diff([]string{"add chain netdev podwall new"}, printOps(d.Apply)); diff != "" {
		t.Errorf("behind a shared table (-want +got):\n%s", diff)
	}
	shared := withAddrs(set("a", IPv4Addr), "10.0.0.1")
	d = Diff(inet(shared, set("b", IPv4Addr)), inet(shared, withAddrs(set("b", IPv4Addr), "10.0.0.2")))
	if diff := cmp.Diff([]string{"add element b { 10.0.0.2 }"}, printOps(d.Apply)); diff != "" {
		t.Errorf("behind a shared set (-want +got):\n%s", diff)
	}
}

// kernel is a model of what the kernel accepts: an operation on an object that is not there, or the removal of one that
// is still referred to, fails the transaction.
type kernel struct{ tables Ruleset }

func newKernel(from Ruleset) *kernel {
	k := &kernel{}
	for _, t := range from {
		c := NewTable(t.ID)
		for name, s := range t.Sets {
			s := *s
			s.Elements = maps.Clone(s.Elements)
			c.Sets[name] = &s
		}
		for name, ch := range t.Chains {
			ch := *ch
			c.Chains[name] = &ch
		}
		k.tables = append(k.tables, c)
	}
	return k
}

func (k *kernel) apply(ops []Op) error {
	for i, o := range ops {
		if err := k.step(o); err != nil {
			return fmt.Errorf("operation %d %s: %w", i, o.String(), err)
		}
	}
	return nil
}

func (k *kernel) step(o Op) error {
	t := k.tables.Table(o.Table)
	if o.Kind == AddTable {
		if t != nil {
			return fmt.Errorf("the table exists")
		}
		k.tables = append(k.tables, NewTable(o.Table))
		return nil
	}
	if t == nil {
		return fmt.Errorf("no table")
	}
	var set *Set
	if o.Set != nil {
		set = t.Sets[o.Set.Name]
	}
	var chain *Chain
	if o.Chain != nil {
		chain = t.Chains[o.Chain.Name]
	}
	switch o.Kind {
	case AddSet:
		if set != nil {
			return fmt.Errorf("the set exists")
		}
		s := *o.Set
		s.Elements = map[Elem]Verdict{}
		t.Sets[s.Name] = &s
		return nil
	case AddChain:
		if chain != nil {
			return fmt.Errorf("the chain exists")
		}
		t.Chains[o.Chain.Name] = &Chain{Name: o.Chain.Name, Hook: o.Chain.Hook}
		return nil
	case DelTable:
		k.tables = slices.DeleteFunc(k.tables, func(x *Table) bool { return x == t })
		return nil
	}
	switch {
	case (o.Kind == AddElements || o.Kind == DelElements || o.Kind == DelSet) && set == nil:
		return fmt.Errorf("no set")
	case (o.Kind == FlushChain || o.Kind == AddRules || o.Kind == DelChain) && chain == nil:
		return fmt.Errorf("no chain")
	}
	switch o.Kind {
	case AddElements:
		for e, v := range o.Elements {
			if _, ok := set.Elements[e]; ok {
				return fmt.Errorf("the element exists")
			}
			if v.Chain != "" && t.Chains[v.Chain] == nil {
				return fmt.Errorf("an element refers to chain %s that does not exist", v.Chain)
			}
			set.Elements[e] = v
		}
	case DelElements:
		for e, v := range o.Elements {
			if was, ok := set.Elements[e]; !ok || was != v {
				return fmt.Errorf("no such element")
			}
			delete(set.Elements, e)
		}
	case FlushChain:
		chain.Rules, chain.Unknown = nil, false
	case AddRules:
		for _, name := range chainRefs(o.Chain.Rules) {
			if t.Chains[name] == nil {
				return fmt.Errorf("a rule refers to chain %s that does not exist", name)
			}
		}
		for _, name := range setRefs(o.Chain.Rules) {
			if t.Sets[name] == nil {
				return fmt.Errorf("a rule refers to set %s that does not exist", name)
			}
		}
		chain.Rules = slices.Concat(chain.Rules, o.Chain.Rules)
	case DelChain:
		for _, c := range t.Chains {
			if c != chain && slices.Contains(chainRefs(c.Rules), chain.Name) {
				return fmt.Errorf("chain %s refers to it", c.Name)
			}
		}
		for _, s := range t.Sets {
			for _, v := range s.Elements {
				if v.Chain == chain.Name {
					return fmt.Errorf("map %s refers to it", s.Name)
				}
			}
		}
		delete(t.Chains, chain.Name)
	case DelSet:
		for _, c := range t.Chains {
			if slices.Contains(setRefs(c.Rules), set.Name) {
				return fmt.Errorf("chain %s refers to it", c.Name)
			}
		}
		delete(t.Sets, set.Name)
	default:
		return fmt.Errorf("unknown kind %d", o.Kind)
	}
	return nil
}

func chainRefs(rules []Rule) []string {
	var out []string
	for _, r := range rules {
		for _, e := range r.Exprs {
			if v, ok := e.(Verdict); ok && v.Chain != "" {
				out = append(out, v.Chain)
			}
		}
	}
	return out
}

func setRefs(rules []Rule) []string {
	var out []string
	for _, r := range rules {
		for _, e := range r.Exprs {
			switch e := e.(type) {
			case In:
				out = append(out, e.Set)
			case Dispatch:
				out = append(out, e.Map)
			}
		}
	}
	return out
}

// genRuleset draws rulesets from a small space of names, so that two of them share and replace objects. What a name is
// (type of a set, regular or base chain, device) follows from the name, as in podwall's own rulesets.
func genRuleset(rt *rapid.T, label string) Ruleset {
	var out Ruleset
	for _, id := range []TableID{inetTable, netdevTable} {
		if rapid.IntRange(0, 9).Draw(rt, label+" table") > 0 {
			out = append(out, genTable(rt, label, id))
		}
	}
	return out
}

func genTable(rt *rapid.T, label string, id TableID) *Table {
	t := NewTable(id)
	pick := func(names ...string) []string {
		return rapid.SliceOfNDistinct(rapid.SampledFrom(names), 0, len(names), rapid.ID[string]).Draw(rt, label)
	}
	regular := pick("c0", "c1", "c2", "c3")
	slices.Sort(regular)
	plain, maps, bases := pick("p0", "p1", "p2"), pick("m0", "m1"), pick("b0", "b1", "d0", "d1")
	addrs := []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}
	verdict := func(callable []string) Verdict {
		kinds := []VerdictKind{Accept, Drop, Return}
		if len(callable) > 0 {
			kinds = append(kinds, Jump, Goto)
		}
		v := Verdict{Kind: rapid.SampledFrom(kinds).Draw(rt, "verdict")}
		if v.Kind == Jump || v.Kind == Goto {
			v.Chain = rapid.SampledFrom(callable).Draw(rt, "target")
		}
		return v
	}
	for _, n := range plain {
		t.Sets[n] = withAddrs(set(n, IPv4Addr), pick(addrs...)...)
	}
	for _, n := range maps {
		m := vmap(n, "")
		for _, a := range pick(addrs...) {
			m.Elements[AddrElem(addr(a))] = verdict(regular)
		}
		t.Sets[n] = m
	}
	for _, n := range pick("i0", "i1") {
		t.Sets[n] = interval(n)
		plain = append(plain, n)
	}
	rules := func(callable []string) []Rule {
		var out []Rule
		for range rapid.IntRange(0, 3).Draw(rt, "rules") {
			var exprs []Expr
			if len(plain) > 0 && rapid.Bool().Draw(rt, "lookup") {
				exprs = append(exprs, In{Fields: []Field{IPSaddr}, Set: rapid.SampledFrom(plain).Draw(rt, "set")})
			}
			if len(maps) > 0 && rapid.Bool().Draw(rt, "dispatch") {
				exprs = append(exprs, Dispatch{Fields: []Field{IPSaddr}, Map: rapid.SampledFrom(maps).Draw(rt, "map")})
			} else {
				exprs = append(exprs, verdict(callable))
			}
			out = append(out, NewRule(exprs...))
		}
		return out
	}
	for i, n := range regular {
		t.Chains[n] = chain(n, rules(regular[i+1:])...)
		t.Chains[n].Unknown = label == "from" && rapid.IntRange(0, 9).Draw(rt, "unknown") == 0
	}
	for _, n := range bases {
		device := ""
		if n[0] == 'd' {
			device = "veth-" + n
		}
		t.Chains[n] = base(n, rapid.IntRange(0, 1).Draw(rt, "priority"), device, rules(regular)...)
	}
	return t
}

func TestDiffApplied(t *testing.T) {
	t.Parallel()
	rapid.Check(t, checkDiff)
}

func FuzzDiff(f *testing.F) { f.Fuzz(rapid.MakeFuzz(checkDiff)) }

// checkDiff applies a delta to a model of the kernel, which refuses what the kernel would, and expects the new ruleset.
func checkDiff(rt *rapid.T) {
	from, to := genRuleset(rt, "from"), genRuleset(rt, "to")
	k, d := newKernel(from), Diff(from, to)
	for _, o := range d.Prepare {
		old := from.Table(o.Table)
		if old != nil && (o.Set != nil && old.Sets[o.Set.Name] != nil || o.Chain != nil && (old.Chains[o.Chain.Name] != nil || o.Chain.Hook != nil)) ||
			old == nil && (o.Chain != nil || o.Set != nil && !o.Set.Interval) {
			rt.Errorf("prepare: %q changes what packets meet", o.String())
		}
	}
	for _, o := range d.Cleanup {
		if o.Kind != DelChain && o.Kind != DelSet {
			rt.Errorf("cleanup: %q does not belong there", o.String())
		}
	}
	for _, part := range []struct {
		name string
		ops  []Op
	}{{"prepare", d.Prepare}, {"apply", d.Apply}, {"cleanup", d.Cleanup}} {
		if err := k.apply(part.ops); err != nil {
			rt.Fatalf("%s: %v\nfrom:\n%s\nto:\n%s", part.name, err, from, to)
		}
	}
	byID := func(a, b *Table) int { return strings.Compare(string(a.ID.Family), string(b.ID.Family)) }
	slices.SortFunc(k.tables, byID)
	want := slices.SortedFunc(slices.Values(to), byID)
	if diff := cmp.Diff(Ruleset(want).String(), k.tables.String()); diff != "" {
		rt.Fatalf("applied (-want +got):\n%s", diff)
	}
	if again := Diff(k.tables, to); !again.Empty() {
		rt.Fatalf("a second diff is not empty: %v", printOps(slices.Concat(again.Prepare, again.Apply, again.Cleanup)))
	}
}
