package policy

import (
	"maps"

	"github.com/podwall/podwall/pkg/ruleset"
)

// The objects of an Engine's ruleset. Each knows what was committed and what is desired, so that the difference between the two is never
// searched for.

// objectName names a chain or a set of one of the two tables.
type objectName struct {
	device bool
	name   string
}

// liveChain is a chain that fragments use.
type liveChain struct {
	name  objectName
	want  *ruleset.Chain // nil when nobody uses it
	users map[*fragment]bool
}

// liveSet is a set that fragments use, or one of the base. It has changed by add and del since set was committed.
type liveSet struct {
	name     objectName
	set      *ruleset.Set
	fresh    bool // set was never committed, so it is changed itself
	gone     bool
	add, del map[ruleset.Elem]ruleset.Verdict
	users    map[*fragment]bool
	selector *liveSelector        // whose elements it holds
	held     map[ruleset.Elem]int // in a set of the base: how many endpoints hold an element
}

// put makes an element desired.
func (s *liveSet) put(e ruleset.Elem, v ruleset.Verdict) {
	if s.fresh {
		s.set.Elements[e] = v
		return
	}
	committed, ok := s.set.Elements[e]
	if ok && committed == v {
		delete(s.add, e)
		delete(s.del, e)
		return
	}
	if ok {
		s.note(&s.del, e, committed)
	}
	s.note(&s.add, e, v)
}

// remove is the inverse of put.
func (s *liveSet) remove(e ruleset.Elem) {
	if s.fresh {
		delete(s.set.Elements, e)
		return
	}
	delete(s.add, e)
	if committed, ok := s.set.Elements[e]; ok {
		s.note(&s.del, e, committed)
	}
}

func (s *liveSet) note(to *map[ruleset.Elem]ruleset.Verdict, e ruleset.Elem, v ruleset.Verdict) {
	if *to == nil {
		*to = map[ruleset.Elem]ruleset.Verdict{}
	}
	(*to)[e] = v
}

// clear makes no element desired.
func (s *liveSet) clear() {
	if s.fresh {
		clear(s.set.Elements)
		return
	}
	s.add, s.del = nil, maps.Clone(s.set.Elements)
}

// committed makes what is desired what was committed. Its elements change in place, and nobody else's do: a Delta keeps add and del.
func (s *liveSet) committed() {
	for e := range s.del {
		delete(s.set.Elements, e)
	}
	maps.Copy(s.set.Elements, s.add)
	s.fresh, s.add, s.del = false, nil, nil
}

// part returns a copy of the set with other elements.
func (s *liveSet) part(elements map[ruleset.Elem]ruleset.Verdict) *ruleset.Set {
	c := *s.set
	c.Elements = elements
	return &c
}

// desired returns the set as it is desired.
func (s *liveSet) desired() *ruleset.Set {
	if s.fresh {
		return s.set
	}
	elements := maps.Clone(s.set.Elements)
	for e := range s.del {
		delete(elements, e)
	}
	maps.Copy(elements, s.add)
	return s.part(elements)
}

// liveSelector is a pair of peer sets that is kept up to date.
type liveSelector struct {
	peerSet
	sets [2]*liveSet
}

// fragment is a piece of the ruleset that is rendered at once: the chains and elements of one endpoint, or, shared by the endpoints that use
// it, one of a policy (its ingress chain, or its egress rules, with all that they look up) or the egress chain of a set of policies.
type fragment struct {
	owner  *liveEndpoint // of an endpoint's
	of     *compiled     // of a policy's
	parts  []*compiled   // of a set of policies: those whose rules the chain has
	egress bool          // of all but an endpoint's: the direction
	name   string
	rules  []ruleset.Rule // of a policy's, egress
	jump   ruleset.Rule   // of a policy's, ingress
	empty  bool           // the policy has no ingress rules: there is no chain to jump to
	users  map[*liveEndpoint]bool

	chains   []placed[*ruleset.Chain]
	sets     []placed[*ruleset.Set]
	peers    map[string]*peerSet // by the name of either set
	elements []held              // in sets of the base
}

// placed is an object with the place where it belongs.
type placed[T any] struct {
	name   objectName
	object T
}

// held is an element of a set of the base.
type held struct {
	set     objectName
	elem    ruleset.Elem
	verdict ruleset.Verdict
}
