package generate

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"pgregory.net/rapid"

	"github.com/podwall/podwall/tests/oracle"
)

// Change draws one change and returns the changed copy and what changed. Objects are replaced, never changed in place, and
// keep their pointers where they did not change.
func Change(t *rapid.T, c *oracle.Cluster) (*oracle.Cluster, string) {
	next := *c
	next.Namespaces, next.Pods = slices.Clone(c.Namespaces), slices.Clone(c.Pods)
	next.Policies, next.Sandboxes = slices.Clone(c.Policies), slices.Clone(c.Sandboxes)
	m := &maker{t: t, c: &next}
	var possible []func() string
	for _, e := range m.edits() {
		if e.possible {
			possible = append(possible, e.do)
		}
	}
	return &next, pick(m, possible)()
}

// edit is one kind of change. A kind that is listed twice happens twice as often.
type edit struct {
	possible bool
	do       func() string
}

func (m *maker) edits() []edit {
	c := m.c
	pods, policies, room := len(c.Pods) > 0, len(c.Policies) > 0, len(c.Pods) < mostPods
	return []edit{
		{len(c.Policies) < mostPolicies, m.createPolicy},
		{policies, m.updatePolicy},
		{policies, m.updatePolicy},
		{policies, m.deletePolicy},
		{pods, m.relabelPod},
		{pods, m.relabelPod},
		{true, m.relabelNamespace},
		{room, m.createPod},
		{pods, m.deletePod},
		{pods, m.completePod},
		{room && len(vacant(c)) > 0, m.addSandbox},
		{room && len(vacant(c)) > 0, m.addSandbox},
		{len(c.Sandboxes) > 0, m.delSandbox},
		{len(late(c)) > 0, m.reportLate},
	}
}

func (m *maker) createPolicy() string {
	p := m.policy()
	m.c.Policies = append(m.c.Policies, p)
	return "create policy " + p.Namespace + "/" + p.Name
}

func (m *maker) updatePolicy() string {
	i := m.between(0, len(m.c.Policies)-1)
	p := m.c.Policies[i].DeepCopy()
	p.Spec = m.policySpec()
	m.c.Policies[i] = p
	return "update policy " + p.Namespace + "/" + p.Name
}

func (m *maker) deletePolicy() string {
	p := pick(m, m.c.Policies)
	m.c.Policies = slices.DeleteFunc(m.c.Policies, func(o *networkingv1.NetworkPolicy) bool { return o == p })
	return "delete policy " + p.Namespace + "/" + p.Name
}

func (m *maker) relabelPod() string {
	p := m.editPod(pick(m, m.c.Pods))
	p.Labels = m.labels()
	return "relabel " + name(p)
}

// editPod puts a copy in a pod's place.
func (m *maker) editPod(old *corev1.Pod) *corev1.Pod {
	p := old.DeepCopy()
	m.c.Pods[slices.Index(m.c.Pods, old)] = p
	return p
}

func name(p *corev1.Pod) string { return "pod " + p.Namespace + "/" + p.Name }

// relabelNamespace also describes a namespace that nobody had described.
func (m *maker) relabelNamespace() string {
	n := m.namespace(pick(m, namespaceNames))
	m.c.Namespaces = append(slices.DeleteFunc(m.c.Namespaces, func(o *corev1.Namespace) bool { return o.Name == n.Name }), n)
	return "relabel namespace " + n.Name
}

// createPod creates an object without a sandbox, or the one that a sandbox was waiting for.
func (m *maker) createPod() string {
	for _, s := range m.c.Sandboxes {
		if podOf(m.c, s.Namespace, s.Name) == nil && m.oneIn(2) {
			pod := m.pod()
			pod.Namespace, pod.Name, pod.Spec.NodeName = s.Namespace, s.Name, m.c.Node
			m.report(pod, s.IPs)
			m.c.Pods = append(m.c.Pods, pod)
			return fmt.Sprintf("create %s, of the sandbox at %v", name(pod), s.IPs)
		}
	}
	before := slices.Clone(m.c.Pods)
	m.addPod(pick(m, []podKind{remote, remote, adopted, hostNetwork, released}))
	i := slices.IndexFunc(m.c.Pods, func(p *corev1.Pod) bool { return !slices.Contains(before, p) })
	return fmt.Sprintf("create %s at %v", name(m.c.Pods[i]), reported(m.c.Pods[i]))
}

// deletePod leaves its sandbox.
func (m *maker) deletePod() string {
	p := pick(m, m.c.Pods)
	m.c.Pods = slices.DeleteFunc(m.c.Pods, func(o *corev1.Pod) bool { return o == p })
	return "delete " + name(p)
}

// completePod leaves its sandbox as well.
func (m *maker) completePod() string {
	p := m.editPod(pick(m, m.c.Pods))
	p.Status.Phase = corev1.PodSucceeded
	return "complete " + name(p)
}

// addSandbox is an ADD for a pod that is created with it, at a place where no sandbox is. Objects of former pods may still
// claim its addresses.
func (m *maker) addSandbox() string {
	place := pick(m, vacant(m.c))
	pod := m.pod()
	pod.Spec.NodeName = m.c.Node
	s := oracle.Sandbox{Namespace: pod.Namespace, Name: pod.Name, IPs: m.families(place.IPs)}
	m.report(pod, s.IPs)
	m.c.Sandboxes = append(m.c.Sandboxes, s)
	m.c.Pods = append(m.c.Pods, pod)
	return fmt.Sprintf("ADD %s at %v", name(pod), s.IPs)
}

// delSandbox is a DEL; the object goes with it, stays completed, or stays for a while as if nothing had happened.
func (m *maker) delSandbox() string {
	s := pick(m, m.c.Sandboxes)
	m.c.Sandboxes = slices.DeleteFunc(m.c.Sandboxes, func(o oracle.Sandbox) bool { return o.Namespace == s.Namespace && o.Name == s.Name })
	text := fmt.Sprintf("DEL pod %s/%s at %v", s.Namespace, s.Name, s.IPs)
	p := podOf(m.c, s.Namespace, s.Name)
	if p == nil {
		return text
	}
	switch m.between(0, 2) {
	case 0:
		m.c.Pods = slices.DeleteFunc(m.c.Pods, func(o *corev1.Pod) bool { return o == p })
		return text + " with its object"
	case 1:
		m.editPod(p).Status.Phase = corev1.PodSucceeded
		return text + ", completed"
	}
	return text
}

// reportLate puts the addresses of a sandbox in the status of its pod.
func (m *maker) reportLate() string {
	s := pick(m, late(m.c))
	p := m.editPod(podOf(m.c, s.Namespace, s.Name))
	m.reportAll(p, s.IPs)
	return "report the addresses of " + name(p)
}

// late returns the sandboxes whose pods do not report all of their addresses.
func late(c *oracle.Cluster) []oracle.Sandbox {
	var list []oracle.Sandbox
	for _, s := range c.Sandboxes {
		if p := podOf(c, s.Namespace, s.Name); p != nil && len(p.Status.PodIPs) < len(s.IPs) {
			list = append(list, s)
		}
	}
	return list
}
