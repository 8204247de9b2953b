// Package generate makes random clusters on the node of package layout, random changes of them, and the connections that are
// worth trying in one. Its alphabets are small, so that selectors, addresses, ports and names hit and miss about equally.
package generate

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

const (
	mostPods     = 10
	mostPolicies = 6
)

// Pods and policies may be in a namespace that no object describes. Most are in the first two, or they would never meet.
var (
	namespaceNames = []string{"a", "b", "c", "d"}
	homes          = []string{"a", "a", "b", "a", "a", "c", "a", "b", "a", "d"}
)

// Cluster draws a cluster.
func Cluster(t *rapid.T) *oracle.Cluster {
	m := &maker{t: t, c: &oracle.Cluster{Node: layout.NodeName}}
	for _, name := range namespaceNames[:m.between(2, len(namespaceNames))] {
		if !m.oneIn(8) {
			m.c.Namespaces = append(m.c.Namespaces, m.namespace(name))
		}
	}
	for range pick(m, []int{3, 8, 7, mostPods, 6, 9, 5, 4}) {
		m.addPod(pick(m, podKinds))
	}
	for range pick(m, []int{0, 4, mostPolicies, 5, 3, mostPolicies, 5, 4, 2, 1}) {
		m.c.Policies = append(m.c.Policies, m.policy())
	}
	m.c.AllowOwnNode = m.oneIn(4)
	return m.c
}

// maker draws parts of a cluster from t.
type maker struct {
	t *rapid.T
	c *oracle.Cluster
}

// oneIn is true about once in n times. It shrinks to false.
func (m *maker) oneIn(n int) bool { return m.between(0, n-1) == n-1 }

func (m *maker) between(least, most int) int { return rapid.IntRange(least, most).Draw(m.t, "number") }

// pick draws one of a list. It shrinks to the first.
func pick[E any](m *maker, list []E) E { return rapid.SampledFrom(list).Draw(m.t, "choice") }

// freeName returns the first name that nobody has. Objects of other namespaces may have it.
func freeName(prefix string, taken func(string) bool) string {
	for i := 0; ; i++ {
		if name := fmt.Sprint(prefix, i); !taken(name) {
			return name
		}
	}
}

func (m *maker) namespace(name string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: m.labels()}}
}

// Labels of pods and of namespaces. A value may be empty, which is not the same as no label.
var (
	labelKeys   = []string{"app", "tier"}
	labelValues = []string{"x", "y", ""}
)

func (m *maker) labels() map[string]string {
	var labels map[string]string
	for _, k := range labelKeys {
		if m.oneIn(2) {
			continue
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[k] = pick(m, labelValues)
	}
	return labels
}
