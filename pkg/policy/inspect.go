package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// Remark is something about a part of a policy that its author may not have meant. What cannot be used at all is a Problem.
type Remark struct {
	Direction  string // "ingress" or "egress"; empty if it is about the whole policy
	Rule       int
	Peer, Port int // of the rule, -1 if it is not about one
	Reason     string
}

// Inspector looks at the policies of a model by the pods that are in it.
type Inspector struct {
	model      *cluster.Model
	namespaces []string
	pods       []*cluster.Pod // that policies can be about
	others     map[string][]*compiled
}

// NewInspector needs the names of all namespaces, with or without pods.
func NewInspector(m *cluster.Model, namespaces []string) *Inspector {
	in := &Inspector{model: m, others: map[string][]*compiled{}}
	known := map[string]bool{}
	for _, name := range namespaces {
		known[name] = true
	}
	for pod := range m.Pods() {
		if known[pod.Namespace] = true; !pod.HostNetwork && !pod.Terminal {
			in.pods = append(in.pods, pod)
		}
	}
	for p := range m.Policies() {
		known[p.Namespace] = true
		in.others[p.Namespace] = append(in.others[p.Namespace], compile(p))
	}
	for name := range known {
		in.namespaces = append(in.namespaces, name)
	}
	for _, list := range in.others {
		slices.SortFunc(list, func(a, b *compiled) int { return strings.Compare(a.name, b.name) })
	}
	slices.SortFunc(in.pods, func(a, b *cluster.Pod) int { return strings.Compare(nameOf(a), nameOf(b)) })
	return in
}

// HasPods reports whether there are pods to select. Without any it is not remarked that a selector selects none.
func (in *Inspector) HasPods() bool { return len(in.pods) > 0 }

// Inspect returns what is remarkable about a policy.
func (in *Inspector) Inspect(p *cluster.Policy) []Remark {
	if p.Unreadable != "" {
		return nil // a Problem, and its rules are gone
	}
	c := compile(p)
	var list []Remark
	whole := func(format string, args ...any) {
		list = append(list, Remark{Rule: -1, Peer: -1, Port: -1, Reason: fmt.Sprintf(format, args...)})
	}
	subjects := in.selects(c)
	if in.HasPods() && len(subjects) == 0 {
		whole("podSelector selects no pod of namespace %s: it isolates nobody", p.Namespace)
	}
	switch {
	case len(p.Spec.PolicyTypes) == 0 && len(p.Spec.Egress) > 0 && len(p.Spec.Ingress) == 0:
		whole("has egress rules only and no policyTypes: it denies all ingress as well; write policyTypes: [Egress] to limit egress, or [Ingress, Egress] if that is meant")
	case len(p.Spec.Ingress) > 0 && c.ingress == nil:
		whole("its ingress rules do nothing: policyTypes lacks Ingress")
	case len(p.Spec.Egress) > 0 && c.egress == nil:
		whole("its egress rules do nothing: policyTypes lacks Egress")
	}
	if c.ingress != nil {
		for i, r := range p.Spec.Ingress {
			list = append(list, in.rule(c, "ingress", i, r.From, r.Ports, func(n namedPort) bool { return has(subjects, n) })...)
		}
	}
	if c.egress != nil {
		for i, r := range p.Spec.Egress {
			list = append(list, in.rule(c, "egress", i, r.To, r.Ports, func(n namedPort) bool { return has(in.pods, n) })...)
		}
	}
	return list
}

func (in *Inspector) selects(c *compiled) []*cluster.Pod {
	var list []*cluster.Pod
	for _, pod := range in.pods {
		if pod.Namespace == c.namespace && c.subject.Matches(labels.Set(pod.Labels)) {
			list = append(list, pod)
		}
	}
	return list
}

func has(pods []*cluster.Pod, n namedPort) bool {
	return slices.ContainsFunc(pods, func(pod *cluster.Pod) bool { return len(resolve(pod, n)) > 0 })
}

// rule looks at one rule; receivers tells whether any pod that it may lead to has a named port.
func (in *Inspector) rule(c *compiled, direction string, i int, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, receivers func(namedPort) bool) []Remark {
	var list []Remark
	for j := range peers {
		for _, reason := range in.peer(c, &peers[j]) {
			list = append(list, Remark{direction, i, j, -1, reason})
		}
	}
	for j := range ports {
		alone := &compiled{}
		var r rule
		alone.port("", &ports[j], &r)
		if in.HasPods() && len(r.named) == 1 && !receivers(r.named[0]) {
			n := r.named[0]
			whose := "no pod that it selects"
			if direction == "egress" {
				whose = "no pod"
			}
			list = append(list, Remark{direction, i, -1, j, fmt.Sprintf("%s has a %s port named %q: it matches nothing; names are those of containers' ports, not of a Service's", whose, strings.ToUpper(protoName(n.proto)), n.name)})
		}
	}
	return list
}

func (in *Inspector) peer(c *compiled, p *networkingv1.NetworkPolicyPeer) []string {
	if p.IPBlock != nil {
		return block(p.IPBlock)
	}
	alone := &compiled{namespace: c.namespace}
	parsed := alone.rule("", []networkingv1.NetworkPolicyPeer{*p}, nil)
	if len(parsed.pods) == 0 {
		return nil // a Problem
	}
	peer := parsed.pods[0]
	if peer.namespaces != nil && !slices.ContainsFunc(in.namespaces, func(name string) bool {
		return peer.namespaces.Matches(labels.Set(in.model.NamespaceLabels(name)))
	}) {
		return []string{fmt.Sprintf("namespaceSelector %s matches no namespace; to mean one by its name select the label kubernetes.io/metadata.name", peer.namespaces)}
	}
	if in.HasPods() && !slices.ContainsFunc(in.pods, func(pod *cluster.Pod) bool { return peer.selects(in.model, pod) }) {
		return []string{fmt.Sprintf("matches no pod (%s)", peer.describe())}
	}
	return nil
}

// block remarks on an ipBlock that can be used, but not quite as it is written.
func block(b *networkingv1.IPBlock) []string {
	cidr, err := parseCIDR(b.CIDR)
	if err != nil {
		return nil // a Problem
	}
	var list []string
	untidy := func(what, text string, p netip.Prefix) {
		if written, err := netip.ParsePrefix(text); err != nil || written != p {
			list = append(list, fmt.Sprintf("%s %s means %s: write that (host bits, leading zeros and IPv4-mapped addresses are refused from Kubernetes 1.36 on)", what, text, p))
		}
	}
	untidy("cidr", b.CIDR, cidr)
	for _, text := range b.Except {
		except, err := parseCIDR(text)
		if err != nil {
			continue
		}
		untidy("except", text, except)
		switch {
		case !except.Overlaps(cidr):
			list = append(list, fmt.Sprintf("except %s is outside of cidr %s: it does nothing", text, b.CIDR))
		case except.Bits() <= cidr.Bits():
			list = append(list, fmt.Sprintf("except %s is all of cidr %s: the block matches nothing", text, b.CIDR))
		}
	}
	return list
}

// WithoutDNS returns, by the first policy that isolates them for egress, the pods (namespace/name) that no rule lets ask a DNS server.
// A namespace whose policies select no pod at all is judged as if one pod were selected by all of them; it has an empty list then.
func (in *Inspector) WithoutDNS() map[cluster.Key][]string {
	found := map[cluster.Key][]string{}
	key := func(c *compiled) cluster.Key {
		return cluster.Key{Kind: cluster.KindPolicy, Namespace: c.namespace, Name: c.name}
	}
	if !in.HasPods() {
		for _, list := range in.others {
			list = slices.DeleteFunc(slices.Clone(list), func(c *compiled) bool { return c.egress == nil })
			if len(list) > 0 && !slices.ContainsFunc(list, in.allowsDNS) {
				found[key(list[0])] = nil
			}
		}
		return found
	}
	for _, pod := range in.pods {
		var isolating []*compiled
		for _, c := range in.others[pod.Namespace] {
			if c.egress != nil && c.subject.Matches(labels.Set(pod.Labels)) {
				isolating = append(isolating, c)
			}
		}
		if isolating != nil && !slices.ContainsFunc(isolating, in.allowsDNS) {
			found[key(isolating[0])] = append(found[key(isolating[0])], nameOf(pod))
		}
	}
	return found
}

// allowsDNS reports whether a policy lets its pods ask somebody on UDP port 53.
func (in *Inspector) allowsDNS(c *compiled) bool {
	return slices.ContainsFunc(c.egress.rules, func(r rule) bool {
		peers := r.anyPeer || len(r.pods) > 0 || len(r.blocks.Ranges()) > 0
		return peers && (matchesPort(&r, nil, Flow{Proto: ruleset.ProtoUDP, Port: 53}) || slices.ContainsFunc(in.pods, func(pod *cluster.Pod) bool {
			return matchesPort(&r, pod, Flow{Proto: ruleset.ProtoUDP, Port: 53})
		}))
	})
}
