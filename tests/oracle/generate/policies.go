package generate

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func (m *maker) policy() *networkingv1.NetworkPolicy {
	namespace := pick(m, homes)
	name := freeName("n", func(name string) bool {
		return slices.ContainsFunc(m.c.Policies, func(p *networkingv1.NetworkPolicy) bool { return p.Namespace == namespace && p.Name == name })
	})
	return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: m.policySpec()}
}

const (
	ingress = networkingv1.PolicyTypeIngress
	egress  = networkingv1.PolicyTypeEgress
)

var policyTypes = [][]networkingv1.PolicyType{nil, {ingress}, {egress}, {ingress, egress}, {}, {ingress, ingress}, {egress}, {egress, ingress}}

var ruleCounts = []int{0, 1, 1, 1, 2}

func (m *maker) policySpec() networkingv1.NetworkPolicySpec {
	spec := networkingv1.NetworkPolicySpec{PolicyTypes: pick(m, policyTypes)}
	about := pick(m, themes)
	if m.oneIn(3) {
		spec.PodSelector = *m.selector()
	}
	for range pick(m, ruleCounts) {
		spec.Ingress = append(spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: m.peers(about), Ports: m.ports(about)})
	}
	for range pick(m, ruleCounts) {
		spec.Egress = append(spec.Egress, networkingv1.NetworkPolicyEgressRule{To: m.peers(about), Ports: m.ports(about)})
	}
	// Absent and empty are the same, and only files can tell them apart.
	if m.oneIn(4) {
		if spec.Ingress == nil {
			spec.Ingress = []networkingv1.NetworkPolicyIngressRule{}
		}
		if spec.Egress == nil {
			spec.Egress = []networkingv1.NetworkPolicyEgressRule{}
		}
	}
	return spec
}

// theme is what a policy is about. Ports AND peers hide each other's mistakes, so most policies vary one of them and leave the
// other open.
type theme uint8

const (
	everything theme = iota
	aboutSelectors
	aboutBlocks
	aboutManyBlocks
	aboutNumbers
	aboutNames
)

var themes = slices.Concat([]theme{everything}, slices.Repeat([]theme{aboutNumbers, aboutSelectors, aboutBlocks, aboutNames}, 3), []theme{aboutBlocks, aboutManyBlocks, aboutNumbers, aboutNames, aboutNumbers})

func (m *maker) peers(about theme) []networkingv1.NetworkPolicyPeer {
	shape := m.between(0, 15)
	switch {
	case shape == 0:
		return nil
	case shape == 1:
		return []networkingv1.NetworkPolicyPeer{}
	case about >= aboutNumbers && shape < 14:
		return nil
	case about == aboutManyBlocks, shape == 2 && about != aboutSelectors:
		return m.manyBlocks()
	}
	var peers []networkingv1.NetworkPolicyPeer
	for range pick(m, []int{1, 1, 2, 3}) {
		p := m.peer(about)
		peers = append(peers, p)
		if p.IPBlock != nil && len(p.IPBlock.Except) > 0 && m.oneIn(4) {
			peers = append(peers, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: p.IPBlock.Except[0]}})
		}
	}
	return peers
}

func (m *maker) peer(about theme) networkingv1.NetworkPolicyPeer {
	shape := m.between(0, 7)
	switch {
	case about == aboutBlocks, about != aboutSelectors && shape >= 6:
		return networkingv1.NetworkPolicyPeer{IPBlock: m.block()}
	case shape == 0:
		return networkingv1.NetworkPolicyPeer{PodSelector: m.selector()}
	case shape == 1:
		return networkingv1.NetworkPolicyPeer{NamespaceSelector: m.namespaceSelector()}
	}
	return networkingv1.NetworkPolicyPeer{PodSelector: m.selector(), NamespaceSelector: m.namespaceSelector()}
}

// namespaceSelector may name the namespace, by the label that the API server forces.
func (m *maker) namespaceSelector() *metav1.LabelSelector {
	if m.oneIn(2) {
		return m.selector()
	}
	return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{
		Key: corev1.LabelMetadataName, Operator: pick(m, []metav1.LabelSelectorOperator{metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn}),
		Values: []string{pick(m, namespaceNames)},
	}}}
}

var operators = []metav1.LabelSelectorOperator{
	metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist, metav1.LabelSelectorOpNotIn,
}

// selector draws one or two requirements; none is everything.
func (m *maker) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	shape := m.between(0, 7)
	if shape == 1 || shape == 2 || shape == 7 {
		s.MatchLabels = map[string]string{pick(m, labelKeys): pick(m, labelValues)}
	}
	if shape > 2 {
		r := metav1.LabelSelectorRequirement{Key: pick(m, labelKeys), Operator: pick(m, operators)}
		if r.Operator == metav1.LabelSelectorOpIn || r.Operator == metav1.LabelSelectorOpNotIn {
			r.Values = pick(m, [][]string{{"x"}, {"y"}, {""}, {"x", "y"}})
		}
		s.MatchExpressions = []metav1.LabelSelectorRequirement{r}
	}
	return s
}

var (
	protocols = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}
	// Bounds of ranges nest, overlap, touch, leave one port between them and span everything.
	rangeStarts = []int32{80, 1, 53, 81, 79, 8080, 8081}
	rangeEnds   = []int32{8080, 443, 80, 65535, 79, 8079, 81}
	singles     = []int32{80, 53, 8080, 443, 81, 1, 65535}
)

func (m *maker) ports(about theme) []networkingv1.NetworkPolicyPort {
	shape := m.between(0, 7)
	switch {
	case aboutSelectors <= about && about <= aboutManyBlocks && shape < 7:
		return nil
	case about != aboutNames && shape == 0:
		return []networkingv1.NetworkPolicyPort{}
	case about != aboutNames && shape == 1:
		return m.manyPorts()
	}
	var ports []networkingv1.NetworkPolicyPort
	for range pick(m, []int{1, 1, 2, 3}) {
		ports = append(ports, m.port(about))
	}
	return ports
}

// manyPorts draws a list that is rendered as a set.
func (m *maker) manyPorts() []networkingv1.NetworkPolicyPort {
	var ports []networkingv1.NetworkPolicyPort
	for _, n := range singles[:m.between(3, len(singles))] {
		ports = append(ports, networkingv1.NetworkPolicyPort{Protocol: m.protocol(), Port: number(n)})
	}
	return ports
}

func (m *maker) port(about theme) networkingv1.NetworkPolicyPort {
	p := networkingv1.NetworkPolicyPort{Protocol: m.protocol()}
	shape := m.between(0, 7)
	switch {
	case about == aboutNames, about == everything && shape > 5:
		name := intstr.FromString(pick(m, portNames))
		p.Port = &name
	case shape == 0: // every port of the protocol
	case shape == 1:
		p.Port = number(pick(m, singles))
	default:
		start := pick(m, rangeStarts)
		end := max(start, pick(m, rangeEnds))
		p.Port, p.EndPort = number(start), &end
	}
	return p
}

func number(n int32) *intstr.IntOrString {
	v := intstr.FromInt32(n)
	return &v
}

func (m *maker) protocol() *corev1.Protocol {
	if m.oneIn(3) {
		return nil
	}
	p := pick(m, protocols)
	return &p
}
