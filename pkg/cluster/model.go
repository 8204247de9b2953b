package cluster

import (
	"iter"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// Model is the set of objects by name. It is not safe for concurrent use: the reconcile loop owns it.
type Model struct {
	namespaces map[string]*Namespace
	pods       map[string]map[string]*Pod
	policies   map[string]map[string]*Policy
}

// NewModel returns an empty model.
func NewModel() *Model {
	return &Model{
		namespaces: map[string]*Namespace{},
		pods:       map[string]map[string]*Pod{},
		policies:   map[string]map[string]*Policy{},
	}
}

// Clone returns a model of the same objects.
func (m *Model) Clone() *Model {
	return &Model{namespaces: maps.Clone(m.namespaces), pods: cloned(m.pods), policies: cloned(m.policies)}
}

func cloned[T any](m map[string]map[string]T) map[string]map[string]T {
	c := make(map[string]map[string]T, len(m))
	for k, inner := range m {
		c[k] = maps.Clone(inner)
	}
	return c
}

// Apply stores or removes one object.
func (m *Model) Apply(c Change) {
	switch o := c.Object.(type) {
	case nil:
		switch c.Key.Kind {
		case KindNamespace:
			delete(m.namespaces, c.Key.Name)
		case KindPod:
			remove(m.pods, c.Key)
		case KindPolicy:
			remove(m.policies, c.Key)
		}
	case *Namespace:
		m.namespaces[o.Name] = o
	case *Pod:
		put(m.pods, c.Key, o)
	case *Policy:
		put(m.policies, c.Key, o)
	}
}

func put[T any](m map[string]map[string]T, k Key, v T) {
	inner := m[k.Namespace]
	if inner == nil {
		inner = map[string]T{}
		m[k.Namespace] = inner
	}
	inner[k.Name] = v
}

func remove[T any](m map[string]map[string]T, k Key) {
	delete(m[k.Namespace], k.Name)
	if len(m[k.Namespace]) == 0 {
		delete(m, k.Namespace)
	}
}

// Pod returns a pod, or nil.
func (m *Model) Pod(namespace, name string) *Pod { return m.pods[namespace][name] }

// Pods yields every pod in no particular order.
func (m *Model) Pods() iter.Seq[*Pod] { return all(m.pods) }

// PodsIn yields the pods of one namespace in no particular order.
func (m *Model) PodsIn(namespace string) iter.Seq[*Pod] { return maps.Values(m.pods[namespace]) }

// Populated yields the namespaces that have pods in no particular order.
func (m *Model) Populated() iter.Seq[string] { return maps.Keys(m.pods) }

// Policy returns a policy, or nil.
func (m *Model) Policy(namespace, name string) *Policy { return m.policies[namespace][name] }

// Policies yields every policy in no particular order.
func (m *Model) Policies() iter.Seq[*Policy] { return all(m.policies) }

// PoliciesIn yields the policies of one namespace in no particular order.
func (m *Model) PoliciesIn(namespace string) iter.Seq[*Policy] {
	return maps.Values(m.policies[namespace])
}

func all[T any](m map[string]map[string]T) iter.Seq[T] {
	return func(yield func(T) bool) {
		for _, inner := range m {
			for _, v := range inner {
				if !yield(v) {
					return
				}
			}
		}
	}
}

// PolicyCount is how many policies there are.
func (m *Model) PolicyCount() int {
	n := 0
	for _, inner := range m.policies {
		n += len(inner)
	}
	return n
}

// Equal reports whether two pods are one and the same in all that enforcement needs.
func (p *Pod) Equal(o *Pod) bool {
	return p.Namespace == o.Namespace && p.Name == o.Name && p.UID == o.UID && p.MirrorUID == o.MirrorUID && p.Node == o.Node &&
		p.HostNetwork == o.HostNetwork && p.Terminal == o.Terminal && p.Deleting == o.Deleting && p.Created.Equal(o.Created) &&
		slices.Equal(p.IPs, o.IPs) && slices.Equal(p.Ports, o.Ports) && maps.Equal(p.Labels, o.Labels)
}

// NamespaceLabels returns the labels of a namespace. kubernetes.io/metadata.name is always there and always right, as the
// API server forces it (KEP-2161); a namespace that nobody described has only that one.
func (m *Model) NamespaceLabels(name string) map[string]string {
	ns := m.namespaces[name]
	if ns == nil {
		return map[string]string{corev1.LabelMetadataName: name}
	}
	if ns.Labels[corev1.LabelMetadataName] == name {
		return ns.Labels
	}
	labels := maps.Clone(ns.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[corev1.LabelMetadataName] = name
	return labels
}
