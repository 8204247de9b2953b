package policy

import (
	"slices"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
)

// index finds the peer sets that may select a pod without asking all of them. Each is filed once, under what is most telling of what it
// asks for; who is found has still to be asked whether it matches.
type index struct {
	own    map[string]*byLabels // peers of a policy's own namespace, by that namespace, by the labels of pods
	pods   *byLabels            // peers of namespaces, by the labels of pods
	spaces *byLabels            // peers of namespaces that ask nothing telling of pods, by the labels of namespaces
}

func newIndex() *index {
	return &index{own: map[string]*byLabels{}, pods: &byLabels{}, spaces: &byLabels{}}
}

// file returns where a peer set belongs.
func (x *index) file(p podPeer) (*byLabels, labels.Selector) {
	if p.namespaces == nil {
		if x.own[p.namespace] == nil {
			x.own[p.namespace] = &byLabels{}
		}
		return x.own[p.namespace], p.pods
	}
	if _, values := telling(p.pods); values == nil {
		if key, _ := telling(p.namespaces); key != "" {
			return x.spaces, p.namespaces
		}
	}
	return x.pods, p.pods
}

func (x *index) add(s *liveSelector) {
	b, by := x.file(s.pods)
	b.add(by, s)
}

func (x *index) remove(s *liveSelector) {
	b, by := x.file(s.pods)
	b.remove(by, s)
	if s.pods.namespaces == nil && b.empty() {
		delete(x.own, s.pods.namespace)
	}
}

// selecting appends the peer sets that select a pod.
func (x *index) selecting(list []*liveSelector, namespace string, of func() labels.Set, pod labels.Set) []*liveSelector {
	if b := x.own[namespace]; b != nil {
		b.each(pod, func(s *liveSelector) {
			if s.pods.pods.Matches(pod) {
				list = append(list, s)
			}
		})
	}
	if x.pods.empty() && x.spaces.empty() {
		return list
	}
	space := of()
	either := func(s *liveSelector) {
		if s.pods.pods.Matches(pod) && s.pods.namespaces.Matches(space) {
			list = append(list, s)
		}
	}
	x.pods.each(pod, either)
	x.spaces.each(space, either)
	return list
}

// byLabels files peer sets under a label with its value, under a label, or, when they ask for neither, under nothing.
type byLabels struct {
	values map[label][]*liveSelector
	keys   map[string][]*liveSelector
	rest   []*liveSelector
}

type label struct{ key, value string }

func (b *byLabels) empty() bool { return len(b.values) == 0 && len(b.keys) == 0 && len(b.rest) == 0 }

func (b *byLabels) add(by labels.Selector, s *liveSelector) {
	if b.values == nil {
		b.values, b.keys = map[label][]*liveSelector{}, map[string][]*liveSelector{}
	}
	key, values := telling(by)
	switch {
	case values != nil:
		for _, v := range values {
			b.values[label{key, v}] = append(b.values[label{key, v}], s)
		}
	case key != "":
		b.keys[key] = append(b.keys[key], s)
	default:
		b.rest = append(b.rest, s)
	}
}

func (b *byLabels) remove(by labels.Selector, s *liveSelector) {
	key, values := telling(by)
	switch {
	case values != nil:
		for _, v := range values {
			unfile(b.values, label{key, v}, s)
		}
	case key != "":
		unfile(b.keys, key, s)
	default:
		b.rest = slices.DeleteFunc(b.rest, func(o *liveSelector) bool { return o == s })
	}
}

func unfile[K comparable](m map[K][]*liveSelector, k K, s *liveSelector) {
	m[k] = slices.DeleteFunc(m[k], func(o *liveSelector) bool { return o == s })
	if len(m[k]) == 0 {
		delete(m, k)
	}
}

// each calls f for those that may match, for none of them twice: a label has one value, and they are filed once per value.
func (b *byLabels) each(have labels.Set, f func(*liveSelector)) {
	for _, s := range b.rest {
		f(s)
	}
	if len(b.values) == 0 && len(b.keys) == 0 {
		return
	}
	for k, v := range have {
		for _, s := range b.values[label{k, v}] {
			f(s)
		}
		for _, s := range b.keys[k] {
			f(s)
		}
	}
}

// telling returns a label that whatever is selected must have, with the values that it may have if those are listed; the shortest
// list of them. There may be none.
func telling(by labels.Selector) (string, []string) {
	requirements, _ := by.Requirements()
	key := ""
	var values []string
	for _, r := range requirements {
		switch r.Operator() {
		case selection.Equals, selection.DoubleEquals, selection.In:
			list := r.ValuesUnsorted()
			slices.Sort(list)
			list = slices.Compact(list)
			if values == nil || len(list) < len(values) {
				key, values = r.Key(), list
			}
		case selection.Exists, selection.GreaterThan, selection.LessThan:
			if key == "" {
				key = r.Key()
			}
		}
	}
	return key, values
}
