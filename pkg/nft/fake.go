package nft

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// Fake is a Kernel in memory for tests of other packages. It refuses what the kernel refuses, with the kernel's error
// numbers.
type Fake struct {
	mu     sync.Mutex
	tables ruleset.Ruleset // tables and what they hold are replaced, never changed: callers may keep what they got
	fail   error
	refuse func(ruleset.Op) error
	silent bool
	gen    uint32
	own    bool
	ownErr error
	reads  int
}

// NewFake returns a kernel without tables.
func NewFake() *Fake { return &Fake{} }

// OwnTables makes it a Kernel that owns its tables. Its own Commit is the only way to change them all the same: a test that calls
// it stands for whoever gets around the ownership.
func (f *Fake) OwnTables() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.own = true
}

// FailOwn makes Own fail with err until it is called with nil.
func (f *Fake) FailOwn(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ownErr = err
}

// Ruleset returns all tables, sorted by family and name.
func (f *Fake) Ruleset() ruleset.Ruleset {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.SortedFunc(slices.Values(f.tables), func(a, b *ruleset.Table) int {
		return cmp.Or(cmp.Compare(a.ID.Family, b.ID.Family), cmp.Compare(a.ID.Name, b.ID.Name))
	})
}

// FailNext makes the next Commit fail with a CommitError around err and change nothing.
func (f *Fake) FailNext(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

// Refuse makes every transaction fail that holds an operation for which refuse returns an error; nil lifts that. The CommitError
// names the operation unless silent is set, as errors that the kernel finds in the whole transaction name none (ELOOP, ENOMEM).
func (f *Fake) Refuse(refuse func(ruleset.Op) error, silent bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.refuse, f.silent = refuse, silent
}

// Reads counts the calls of Read.
func (f *Fake) Reads() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reads
}

// Read is Kernel.Read.
func (f *Fake) Read(ctx context.Context, ids ...ruleset.TableID) (ruleset.Ruleset, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("read tables: %w", err)
	}
	f.mu.Lock()
	f.reads++
	f.mu.Unlock()
	var out ruleset.Ruleset
	for _, id := range ids {
		if t := f.Ruleset().Table(id); t != nil {
			out = append(out, t)
		}
	}
	return out, nil
}

// Elements is Kernel.Elements.
func (f *Fake) Elements(ctx context.Context, id ruleset.TableID, set *ruleset.Set) ([]ruleset.Elem, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("read elements of set %s: %w", set.Name, err)
	}
	if t := f.Ruleset().Table(id); t != nil && t.Sets[set.Name] != nil {
		return slices.Collect(maps.Keys(t.Sets[set.Name].Elements)), nil
	}
	return nil, nil
}

// Generation is Kernel.Generation.
func (f *Fake) Generation(context.Context) (uint32, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.gen, nil
}

// Own is Kernel.Own. No table of a Fake is ever dormant.
func (f *Fake) Own(context.Context, ...ruleset.TableID) ([]ruleset.TableID, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return nil, f.ownErr
}

// Owned is Kernel.Owned.
func (f *Fake) Owned(_ context.Context, ids ...ruleset.TableID) ([]ruleset.TableID, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.own {
		return nil, nil
	}
	return slices.DeleteFunc(slices.Clone(ids), func(id ruleset.TableID) bool { return f.tables.Table(id) == nil }), nil
}

// Commit is Kernel.Commit.
func (f *Fake) Commit(ctx context.Context, d ruleset.Delta) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail; err != nil {
		f.fail = nil
		return &CommitError{Stage: Apply, Err: err}
	}
	return commit(ctx, d, f.transaction)
}

func (f *Fake) transaction(ops []ruleset.Op) (string, error) {
	tx := &fakeTx{tables: slices.Clone(f.tables), tableCopies: map[*ruleset.Table]bool{}, setCopies: map[*ruleset.Set]bool{}, chainCopies: map[*ruleset.Chain]bool{}}
	for _, op := range ops {
		if f.refuse != nil {
			if err := f.refuse(op); err != nil && f.silent {
				return "", err
			} else if err != nil {
				return op.Name(), err
			}
		}
		tx.at = op.Name()
		if op.Kind == ruleset.AddRules && len(op.Chain.Rules) > 0 {
			tx.at = ruleText(op, op.Chain.Rules[0])
		}
		if err := tx.do(op); err != nil {
			return tx.at, err
		}
	}
	f.tables = tx.tables
	f.gen++
	return "", nil
}

// fakeTx is a transaction on copies: of the tables, sets and chains that it changes.
type fakeTx struct {
	at          string // what is being done
	tables      ruleset.Ruleset
	tableCopies map[*ruleset.Table]bool
	setCopies   map[*ruleset.Set]bool
	chainCopies map[*ruleset.Chain]bool
}

func (tx *fakeTx) do(op ruleset.Op) error {
	i := slices.IndexFunc(tx.tables, func(t *ruleset.Table) bool { return t.ID == op.Table })
	switch {
	case op.Kind == ruleset.AddTable:
		if i < 0 {
			tx.tables = append(tx.tables, ruleset.NewTable(op.Table))
		}
		return nil
	case i < 0:
		return unix.ENOENT
	case op.Kind == ruleset.DelTable:
		tx.tables = slices.Delete(tx.tables, i, i+1)
		return nil
	}
	t := tx.tables[i]
	if !tx.tableCopies[t] {
		t = &ruleset.Table{ID: t.ID, Sets: maps.Clone(t.Sets), Chains: maps.Clone(t.Chains)}
		tx.tables[i], tx.tableCopies[t] = t, true
	}
	switch op.Kind {
	case ruleset.AddSet:
		return addSet(t, op.Set)
	case ruleset.DelSet:
		return delSet(t, op.Set.Name)
	case ruleset.AddElements, ruleset.DelElements:
		return tx.elements(t, op)
	case ruleset.AddChain:
		return addChain(t, op.Chain)
	case ruleset.DelChain:
		return delChain(t, op.Chain.Name)
	case ruleset.FlushChain, ruleset.AddRules:
		return tx.rules(t, op)
	}
	return unix.EOPNOTSUPP
}

func addSet(t *ruleset.Table, s *ruleset.Set) error {
	old := t.Sets[s.Name]
	if old == nil {
		t.Sets[s.Name] = &ruleset.Set{
			Name: s.Name, Key: s.Key, Map: s.Map, Interval: s.Interval, Comment: ruleset.Comment(s.Comment),
			Timeout: s.Timeout, Size: s.Size, Dynamic: s.Dynamic, Elements: map[ruleset.Elem]ruleset.Verdict{},
		}
		return nil
	}
	if old.Map != s.Map || old.Interval != s.Interval || !slices.Equal(old.Key, s.Key) {
		return unix.EEXIST
	}
	return nil
}

func delSet(t *ruleset.Table, name string) error {
	if t.Sets[name] == nil {
		return unix.ENOENT
	}
	for _, c := range t.Chains {
		if slices.ContainsFunc(c.Rules, func(r ruleset.Rule) bool { return slices.ContainsFunc(r.Exprs, looksUp(name)) }) {
			return unix.EBUSY
		}
	}
	delete(t.Sets, name)
	return nil
}

func looksUp(set string) func(ruleset.Expr) bool {
	return func(e ruleset.Expr) bool {
		switch e := e.(type) {
		case ruleset.In:
			return e.Set == set
		case ruleset.Dispatch:
			return e.Map == set
		case ruleset.LimitEach:
			return e.Set == set
		}
		return false
	}
}

func (tx *fakeTx) elements(t *ruleset.Table, op ruleset.Op) error {
	s := t.Sets[op.Set.Name]
	if s == nil {
		return unix.ENOENT
	}
	if !tx.setCopies[s] {
		c := *s
		c.Elements = maps.Clone(s.Elements)
		s = &c
		t.Sets[s.Name], tx.setCopies[s] = s, true
	}
	for _, e := range slices.Sorted(maps.Keys(op.Elements)) {
		v := op.Elements[e]
		old, ok := s.Elements[e]
		switch {
		case op.Kind == ruleset.DelElements && !ok:
			return unix.ENOENT
		case op.Kind == ruleset.DelElements:
			delete(s.Elements, e)
		case s.Map != (v.Kind != 0):
			return unix.EINVAL
		case target(t, v) != nil:
			return target(t, v)
		case ok && old != v, !ok && s.Interval && overlaps(s, e):
			return unix.EEXIST
		default:
			s.Elements[e] = v
		}
	}
	return nil
}

func overlaps(s *ruleset.Set, e ruleset.Elem) bool {
	half := len(e) / 2
	for other := range s.Elements {
		if e[:half] <= other[half:] && other[:half] <= e[half:] {
			return true
		}
	}
	return false
}

// target checks the chain that a verdict goes to: it must be there and be no base chain.
func target(t *ruleset.Table, v ruleset.Verdict) error {
	if v.Kind != ruleset.Jump && v.Kind != ruleset.Goto {
		return nil
	}
	switch c := t.Chains[v.Chain]; {
	case c == nil:
		return unix.ENOENT
	case c.Hook != nil:
		return unix.EOPNOTSUPP
	}
	return nil
}

func addChain(t *ruleset.Table, c *ruleset.Chain) error {
	old := t.Chains[c.Name]
	switch {
	case old == nil:
		if c.Hook != nil {
			if _, ok := hookNumbers[t.ID.Family][c.Hook.Name]; !ok {
				return unix.EOPNOTSUPP
			}
		}
		t.Chains[c.Name] = &ruleset.Chain{Name: c.Name, Hook: c.Hook}
	case c.Hook != nil && (old.Hook == nil || *old.Hook != *c.Hook):
		return unix.EOPNOTSUPP
	}
	return nil
}

func delChain(t *ruleset.Table, name string) error {
	if t.Chains[name] == nil {
		return unix.ENOENT
	}
	for _, c := range t.Chains {
		if c.Name == name {
			continue // a chain goes with its own rules
		}
		for _, r := range c.Rules {
			if slices.ContainsFunc(r.Exprs, goesTo(name)) {
				return unix.EBUSY
			}
		}
	}
	for _, s := range t.Sets {
		for _, v := range s.Elements {
			if v.Chain == name {
				return unix.EBUSY
			}
		}
	}
	delete(t.Chains, name)
	return nil
}

func goesTo(chain string) func(ruleset.Expr) bool {
	return func(e ruleset.Expr) bool {
		v, ok := e.(ruleset.Verdict)
		return ok && v.Chain == chain
	}
}

func (tx *fakeTx) rules(t *ruleset.Table, op ruleset.Op) error {
	c := t.Chains[op.Chain.Name]
	if c == nil {
		return unix.ENOENT
	}
	if !tx.chainCopies[c] {
		c = &ruleset.Chain{Name: c.Name, Hook: c.Hook, Rules: slices.Clone(c.Rules)}
		t.Chains[c.Name], tx.chainCopies[c] = c, true
	}
	if op.Kind == ruleset.FlushChain {
		c.Rules = nil
		return nil
	}
	for _, r := range op.Chain.Rules {
		// The kernel would not get to see a rule that cannot be encoded either.
		if _, err := encodeRule(t.ID.Family, r); err != nil {
			tx.at = op.Name()
			return fmt.Errorf("rule %q: %w", r, err)
		}
		tx.at = ruleText(op, r)
		for _, e := range r.Exprs {
			if err := refers(t, e); err != nil {
				return err
			}
		}
		c.Rules = append(c.Rules, r)
	}
	return nil
}

// refers checks what an expression refers to.
func refers(t *ruleset.Table, e ruleset.Expr) error {
	var name string
	var verdictMap bool
	switch e := e.(type) {
	case ruleset.Verdict:
		return target(t, e)
	case ruleset.In:
		name = e.Set
	case ruleset.Dispatch:
		name, verdictMap = e.Map, true
	case ruleset.LimitEach:
		name = e.Set
	default:
		return nil
	}
	switch s := t.Sets[name]; {
	case s == nil:
		return unix.ENOENT
	case verdictMap && !s.Map:
		return unix.EINVAL
	}
	return nil
}
