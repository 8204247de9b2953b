package memory

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/subject"
)

// construct is a part of NetworkPolicy's meaning, given as what the cluster or the connection would be for an enforcer that
// does not know it. How often that changes a verdict says how much the construct has been tried.
type construct struct {
	name   string
	claims int                    // how many verdicts it must have changed in a run that is long enough
	only   func(oracle.Conn) bool // nil: all connections

	// What an ignorant enforcer sees; all may be nil.
	cluster   func(*oracle.Cluster) // its slices are a copy
	namespace func(*corev1.Namespace)
	pod       func(*corev1.Pod)
	policy    func(*networkingv1.NetworkPolicy)
	ports     func([]networkingv1.NetworkPolicyPort) []networkingv1.NetworkPolicyPort
	peers     func([]networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer
	conn      func(oracle.Conn) oracle.Conn

	spoil func(ruleset.Ruleset) // instead of these, for a connection that cannot be sent
}

// rulesetIgnoring returns podwall's ruleset with the defect.
func (k *construct) rulesetIgnoring(c *oracle.Cluster) ruleset.Ruleset {
	if k.spoil != nil {
		rs := subject.Render(c).Ruleset
		k.spoil(rs)
		return rs
	}
	return subject.Render(k.ignoredIn(c)).Ruleset
}

// ignoredIn returns a cluster as it is seen by somebody who does not know the construct.
func (k *construct) ignoredIn(c *oracle.Cluster) *oracle.Cluster {
	seen := *c
	seen.Namespaces = copies(c.Namespaces, (*corev1.Namespace).DeepCopy, k.namespace)
	seen.Pods = copies(c.Pods, (*corev1.Pod).DeepCopy, k.pod)
	seen.Policies = copies(c.Policies, (*networkingv1.NetworkPolicy).DeepCopy, func(p *networkingv1.NetworkPolicy) {
		if k.policy != nil {
			k.policy(p)
		}
		for i := range p.Spec.Ingress {
			k.rule(&p.Spec.Ingress[i].From, &p.Spec.Ingress[i].Ports)
		}
		for i := range p.Spec.Egress {
			k.rule(&p.Spec.Egress[i].To, &p.Spec.Egress[i].Ports)
		}
	})
	seen.Sandboxes = slices.Clone(c.Sandboxes)
	if k.cluster != nil {
		k.cluster(&seen)
	}
	return &seen
}

func (k *construct) rule(peers *[]networkingv1.NetworkPolicyPeer, ports *[]networkingv1.NetworkPolicyPort) {
	if k.peers != nil {
		*peers = k.peers(*peers)
	}
	if k.ports != nil {
		*ports = k.ports(*ports)
	}
}

func copies[T any](list []*T, deepCopy func(*T) *T, change func(*T)) []*T {
	if change == nil {
		return slices.Clone(list)
	}
	changed := make([]*T, len(list))
	for i, o := range list {
		changed[i] = deepCopy(o)
		change(changed[i])
	}
	return changed
}

func (k *construct) seen(conn oracle.Conn) oracle.Conn {
	if k.conn == nil {
		return conn
	}
	return k.conn(conn)
}

func (k *construct) concerns(conn oracle.Conn) bool { return k.only == nil || k.only(conn) }

// everyPort and everyPeer change each entry of a rule's list on its own.
func everyPort(change func(*networkingv1.NetworkPolicyPort)) func([]networkingv1.NetworkPolicyPort) []networkingv1.NetworkPolicyPort {
	return func(ports []networkingv1.NetworkPolicyPort) []networkingv1.NetworkPolicyPort {
		for i := range ports {
			change(&ports[i])
		}
		return ports
	}
}

func everyPeer(change func(*networkingv1.NetworkPolicyPeer)) func([]networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
	return func(peers []networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
		for i := range peers {
			change(&peers[i])
		}
		return peers
	}
}

// everySelector changes the selectors of a peer, and so does everySubject for policies.
func everySelector(change func(*metav1.LabelSelector)) func([]networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
	return everyPeer(func(p *networkingv1.NetworkPolicyPeer) {
		for _, s := range []*metav1.LabelSelector{p.PodSelector, p.NamespaceSelector} {
			if s != nil {
				change(s)
			}
		}
	})
}

func everySubject(change func(*metav1.LabelSelector)) func(*networkingv1.NetworkPolicy) {
	return func(p *networkingv1.NetworkPolicy) { change(&p.Spec.PodSelector) }
}

// constructs are those that have to be seen at work; the claims are for a million verdicts.
var constructs = []construct{
	{name: "except", claims: 10_000, peers: everyPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.IPBlock != nil {
			p.IPBlock.Except = nil
		}
	})},
	{name: "except narrows its own block only", peers: exceptsOfAll},
	{name: "endPort", claims: 10_000, ports: everyPort(func(p *networkingv1.NetworkPolicyPort) { p.EndPort = nil })},
	{name: "named port", claims: 10_000, ports: everyPort(func(p *networkingv1.NetworkPolicyPort) {
		if p.Port != nil && p.Port.StrVal != "" {
			p.Port = nothing()
		}
	})},
	{name: "named port has each pod's number", cluster: uniteNames},
	{name: "named port twice in a pod", pod: func(p *corev1.Pod) { firstOfEachName(&p.Spec) }},
	{name: "ports of sidecars", pod: func(p *corev1.Pod) {
		p.Spec.InitContainers = slices.DeleteFunc(p.Spec.InitContainers, func(c corev1.Container) bool { return c.RestartPolicy != nil })
	}},
	{name: "ports of init containers do not count", pod: func(p *corev1.Pod) {
		p.Spec.Containers = append(p.Spec.Containers, p.Spec.InitContainers...)
	}},
	{name: "AND peer", claims: 10_000, peers: func(peers []networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
		for i := range peers {
			if peers[i].PodSelector != nil && peers[i].NamespaceSelector != nil {
				peers = append(peers, networkingv1.NetworkPolicyPeer{PodSelector: peers[i].PodSelector})
				peers[i].PodSelector = nil
			}
		}
		return peers
	}},
	{name: "namespaceSelector", peers: everyPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.NamespaceSelector != nil {
			p.NamespaceSelector = &metav1.LabelSelector{}
		}
	})},
	{name: "podSelector means the own namespace", peers: everyPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.PodSelector != nil && p.NamespaceSelector == nil {
			p.NamespaceSelector = &metav1.LabelSelector{}
		}
	})},
	{name: "no peers is everybody, not every pod", peers: func(peers []networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
		if len(peers) == 0 {
			return []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{}}}
		}
		return peers
	}},
	{name: "NotIn without the key", claims: 10_000, peers: everySelector(notInNeedsKey), policy: everySubject(notInNeedsKey)},
	{name: "empty label value", peers: everySelector(emptyIsAbsent), policy: everySubject(emptyIsAbsent)},
	{name: "label of the namespace's name", peers: everySelector(func(s *metav1.LabelSelector) {
		for i := range s.MatchExpressions {
			if e := &s.MatchExpressions[i]; e.Key == corev1.LabelMetadataName {
				e.Key = "nobody-has-this"
			}
		}
	})},
	{name: "policyTypes by default", policy: func(p *networkingv1.NetworkPolicy) {
		if len(p.Spec.PolicyTypes) == 0 {
			p.Spec.PolicyTypes = typesOfRules(&p.Spec)
		}
	}},
	{name: "policyTypes not listed", policy: func(p *networkingv1.NetworkPolicy) {
		if len(p.Spec.PolicyTypes) > 0 {
			p.Spec.PolicyTypes = append(p.Spec.PolicyTypes, typesOfRules(&p.Spec)...)
		}
	}},
	{name: "protocol by default", ports: everyPort(func(p *networkingv1.NetworkPolicyPort) {
		if p.Protocol == nil {
			p.Port, p.EndPort = nothing(), nil
		}
	})},
	{name: "container protocol by default", pod: func(p *corev1.Pod) {
		eachContainer(&p.Spec, func(c *corev1.Container) {
			c.Ports = slices.DeleteFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Protocol == "" })
		})
	}},
	{name: "protocol without a port", ports: everyPort(func(p *networkingv1.NetworkPolicyPort) {
		if p.Port == nil {
			p.Port = nothing()
		}
	})},
	{name: "SCTP is not TCP", only: protocolIs(oracle.SCTP), conn: func(conn oracle.Conn) oracle.Conn {
		conn.Protocol = oracle.TCP
		return conn
	}},
	{name: "ICMP", claims: 10_000, only: protocolIs(oracle.ICMP), ports: func([]networkingv1.NetworkPolicyPort) []networkingv1.NetworkPolicyPort { return nil }},
	{name: "dual stack", claims: 10_000, cluster: func(c *oracle.Cluster) {
		for i, s := range c.Sandboxes {
			c.Sandboxes[i].IPs = s.IPs[:1]
		}
	}, pod: func(p *corev1.Pod) { p.Status.PodIPs = p.Status.PodIPs[:min(1, len(p.Status.PodIPs))] }},
	{name: "family of /0", peers: func(peers []networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
		for _, p := range peers {
			if p.IPBlock != nil && strings.HasSuffix(p.IPBlock.CIDR, "/0") {
				peers = append(peers, block("0.0.0.0/0"), block("::/0"))
			}
		}
		return peers
	}},
	{name: "sloppy CIDR", peers: everyPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.IPBlock != nil && (sloppy(p.IPBlock.CIDR) || slices.ContainsFunc(p.IPBlock.Except, sloppy)) {
			p.IPBlock = &networkingv1.IPBlock{}
		}
	})},
	{name: "unreadable CIDR", peers: func(peers []networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
		if slices.ContainsFunc(peers, func(p networkingv1.NetworkPolicyPeer) bool {
			return p.IPBlock != nil && (unreadable(p.IPBlock.CIDR) || slices.ContainsFunc(p.IPBlock.Except, unreadable))
		}) {
			return nil
		}
		return peers
	}},
	{name: "own node as receiver", only: func(conn oracle.Conn) bool { return conn.ToNode }, cluster: func(c *oracle.Cluster) { c.AllowOwnNode = !c.AllowOwnNode }},
	{name: "own node", claims: 10_000, only: func(conn oracle.Conn) bool { return conn.FromNode }, conn: func(conn oracle.Conn) oracle.Conn {
		conn.FromNode = false
		return conn
	}},
	{name: "hairpin", claims: 10_000, only: func(conn oracle.Conn) bool { return conn.Src == conn.Dst }, cluster: addAliases, conn: func(conn oracle.Conn) oracle.Conn {
		conn.Src = alias(conn.Src)
		return conn
	}, spoil: dropOwnAccepts},
	{name: "hostNetwork pods", pod: func(p *corev1.Pod) { p.Spec.HostNetwork = false }},
	{name: "completed pods", pod: func(p *corev1.Pod) { p.Status.Phase = corev1.PodRunning }},
	{name: "newest pod of an address", pod: func(p *corev1.Pod) {
		p.CreationTimestamp = metav1.NewTime(time.Unix(-p.CreationTimestamp.Unix(), 0))
	}},
	{name: "addresses that only CNI knows", cluster: func(c *oracle.Cluster) {
		for i, s := range c.Sandboxes {
			if pod := podOf(c, s); pod != nil {
				c.Sandboxes[i].IPs = slices.DeleteFunc(slices.Clone(s.IPs), func(ip netip.Addr) bool {
					return !slices.Contains(pod.Status.PodIPs, corev1.PodIP{IP: ip.String()})
				})
			}
		}
	}},
	{name: "sandbox without a pod", cluster: func(c *oracle.Cluster) {
		c.Sandboxes = slices.DeleteFunc(c.Sandboxes, func(s oracle.Sandbox) bool { return podOf(c, s) == nil })
	}},
}

func podOf(c *oracle.Cluster, s oracle.Sandbox) *corev1.Pod {
	i := slices.IndexFunc(c.Pods, func(p *corev1.Pod) bool { return p.Namespace == s.Namespace && p.Name == s.Name })
	if i < 0 {
		return nil
	}
	return c.Pods[i]
}

// nothing is a port that no connection has.
func nothing() *intstr.IntOrString {
	zero := intstr.FromInt32(0)
	return &zero
}

// exceptsOfAll takes every except out of every block of the rule.
func exceptsOfAll(peers []networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
	var all []string
	for _, p := range peers {
		if p.IPBlock != nil {
			all = append(all, p.IPBlock.Except...)
		}
	}
	return everyPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.IPBlock != nil && !unreadable(p.IPBlock.CIDR) {
			p.IPBlock.Except = slices.DeleteFunc(slices.Clone(all), unreadable)
		}
	})(peers)
}

// uniteNames gives every pod that has a named port all the numbers that anybody has for it.
func uniteNames(c *oracle.Cluster) {
	var all []corev1.ContainerPort
	for _, p := range c.Pods {
		eachContainer(&p.Spec, func(c *corev1.Container) { all = append(all, c.Ports...) })
	}
	c.Pods = copies(c.Pods, (*corev1.Pod).DeepCopy, func(p *corev1.Pod) {
		eachContainer(&p.Spec, func(c *corev1.Container) {
			for _, own := range c.Ports {
				for _, other := range all {
					if other.Name == own.Name {
						own.ContainerPort = other.ContainerPort
						c.Ports = append(c.Ports, own)
					}
				}
			}
		})
	})
}

func eachContainer(spec *corev1.PodSpec, do func(*corev1.Container)) {
	for i := range spec.Containers {
		do(&spec.Containers[i])
	}
	for i := range spec.InitContainers {
		do(&spec.InitContainers[i])
	}
}

func firstOfEachName(spec *corev1.PodSpec) {
	seen := map[string]bool{}
	eachContainer(spec, func(c *corev1.Container) {
		c.Ports = slices.DeleteFunc(c.Ports, func(p corev1.ContainerPort) bool {
			again := seen[p.Name]
			seen[p.Name] = true
			return again
		})
	})
}

func notInNeedsKey(s *metav1.LabelSelector) {
	for _, e := range s.MatchExpressions {
		if e.Operator == metav1.LabelSelectorOpNotIn {
			s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: e.Key, Operator: metav1.LabelSelectorOpExists})
		}
	}
}

// emptyIsAbsent reads `key: ""` as "the key is absent".
func emptyIsAbsent(s *metav1.LabelSelector) {
	for k, v := range s.MatchLabels {
		if v == "" {
			delete(s.MatchLabels, k)
			s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: k, Operator: metav1.LabelSelectorOpDoesNotExist})
		}
	}
}

func typesOfRules(spec *networkingv1.NetworkPolicySpec) []networkingv1.PolicyType {
	types := []networkingv1.PolicyType{} // not to be defaulted again
	if len(spec.Ingress) > 0 {
		types = append(types, networkingv1.PolicyTypeIngress)
	}
	if len(spec.Egress) > 0 {
		types = append(types, networkingv1.PolicyTypeEgress)
	}
	if len(types) == 0 {
		types = append(types, "none")
	}
	return types
}

func protocolIs(p oracle.Protocol) func(oracle.Conn) bool {
	return func(conn oracle.Conn) bool { return conn.Protocol == p }
}

func block(cidr string) networkingv1.NetworkPolicyPeer {
	return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: cidr}}
}

// sloppy CIDRs are legal in stored objects and refused, or read as something else, by net/netip.
func sloppy(cidr string) bool {
	p, err := netip.ParsePrefix(cidr)
	return err != nil || p.Masked() != p || p.Addr().Is4In6()
}

// unreadable are those that package generate spoils on purpose.
func unreadable(cidr string) bool {
	return !strings.Contains(cidr, "/") || strings.HasSuffix(cidr, "/33") && !strings.Contains(cidr, ":") || strings.HasSuffix(cidr, "/129")
}

// alias is the same address to every ipBlock, and another one to a comparison.
func alias(ip netip.Addr) netip.Addr {
	if ip.Is6() {
		return ip.WithZone("alias")
	}
	return netip.AddrFrom16(ip.As16())
}

// addAliases gives everybody on the node an alias for each address.
func addAliases(c *oracle.Cluster) {
	var aliases []oracle.Sandbox
	add := func(namespace, name string, ip netip.Addr) {
		aliases = append(aliases, oracle.Sandbox{Namespace: namespace, Name: name, IPs: []netip.Addr{alias(ip)}})
	}
	for _, p := range c.Pods {
		for _, ip := range p.Status.PodIPs {
			add(p.Namespace, p.Name, netip.MustParseAddr(ip.IP))
		}
	}
	for _, s := range c.Sandboxes {
		for _, ip := range s.IPs {
			add(s.Namespace, s.Name, ip)
		}
	}
	c.Sandboxes = append(c.Sandboxes, aliases...)
}

// dropOwnAccepts takes the rules out of pods' chains that let a pod's own addresses pass: nothing else ends a packet's way in them.
func dropOwnAccepts(rs ruleset.Ruleset) {
	for _, t := range rs {
		for name, c := range t.Chains {
			if strings.HasPrefix(name, "eg_") || strings.HasPrefix(name, "in_") {
				c.Rules = slices.DeleteFunc(c.Rules, func(r ruleset.Rule) bool {
					return strings.HasSuffix(r.String(), " accept") || strings.HasSuffix(r.String(), " return")
				})
			}
		}
	}
}
