package cluster

import (
	"hash/maphash"
	"maps"
	"slices"
)

// interner makes equal parts of a kind's objects one: the labels and ports of a ReplicaSet's pods are alike, and labels are most of
// what is kept of a pod. It belongs to one goroutine. Entries live from share to the sweep after their last release.
type interner struct {
	seed   maphash.Seed
	sets   map[uint64]*sharedSet // by the hash of labels; where two sets have one hash, the second is not shared
	values map[string]*sharedString
}

type sharedSet struct {
	labels map[string]string
	ports  []NamedPort // of the first pod with these labels
	uses   int
}

type sharedString struct {
	text string
	uses int
}

func newInterner() *interner {
	return &interner{seed: maphash.MakeSeed(), sets: map[uint64]*sharedSet{}, values: map[string]*sharedString{}}
}

// share replaces parts of an object that nobody else has seen yet by equal ones of other objects.
func (in *interner) share(o Object) {
	switch o := o.(type) {
	case *Pod:
		o.Namespace, o.Node = in.text(o.Namespace), in.text(o.Node)
		set := in.set(o.Labels)
		if set == nil {
			return
		}
		o.Labels = set.labels
		if set.ports == nil {
			set.ports = o.Ports
		}
		if slices.Equal(o.Ports, set.ports) {
			o.Ports = set.ports
		}
	case *Policy:
		o.Namespace = in.text(o.Namespace)
	}
}

// keep counts an object that has been shared, so that a sweep leaves its parts.
func (in *interner) keep(o Object) { in.count(o, 1) }

// release takes back what keep counted.
func (in *interner) release(o Object) { in.count(o, -1) }

func (in *interner) count(o Object, n int) {
	switch o := o.(type) {
	case *Pod:
		in.countText(o.Namespace, n)
		in.countText(o.Node, n)
		h := in.hash(o.Labels)
		if set := in.sets[h]; set != nil && maps.Equal(set.labels, o.Labels) {
			if set.uses += n; set.uses <= 0 {
				in.drop(h)
			}
		}
	case *Policy:
		in.countText(o.Namespace, n)
	}
}

// sweep forgets what was shared for objects that were never kept, as those of a list that broke off.
func (in *interner) sweep() {
	for h, set := range in.sets {
		if set.uses == 0 {
			in.drop(h)
		}
	}
	maps.DeleteFunc(in.values, func(_ string, s *sharedString) bool { return s.uses == 0 })
}

func (in *interner) set(labels map[string]string) *sharedSet {
	if len(labels) == 0 {
		return nil
	}
	h := in.hash(labels)
	set := in.sets[h]
	if set == nil {
		own := make(map[string]string, len(labels))
		for k, v := range labels {
			own[in.keepText(k)] = in.keepText(v)
		}
		set = &sharedSet{labels: own}
		in.sets[h] = set
	}
	if !maps.Equal(set.labels, labels) {
		return nil
	}
	return set
}

func (in *interner) drop(h uint64) {
	for k, v := range in.sets[h].labels {
		in.countText(k, -1)
		in.countText(v, -1)
	}
	delete(in.sets, h)
}

// hash does not depend on the order of labels.
func (in *interner) hash(labels map[string]string) uint64 {
	var sum uint64
	for k, v := range labels {
		sum += maphash.Comparable(in.seed, [2]string{k, v})
	}
	return sum
}

func (in *interner) text(s string) string {
	if s == "" {
		return ""
	}
	v := in.values[s]
	if v == nil {
		v = &sharedString{text: s}
		in.values[s] = v
	}
	return v.text
}

func (in *interner) keepText(s string) string {
	s = in.text(s)
	in.countText(s, 1)
	return s
}

func (in *interner) countText(s string, n int) {
	if v := in.values[s]; v != nil {
		if v.uses += n; v.uses <= 0 {
			delete(in.values, s)
		}
	}
}
