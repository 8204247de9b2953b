package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// localPods is how many pods the node has in its verdict maps.
const localPods = 250

// size is how much a ruleset holds.
type size struct{ peers, policies int }

// variant is one ruleset on the node, or a part of one.
type variant struct {
	label  string
	family int // of the packets: 0 IPv4, 1 IPv6
	size   size
	// keep says which base chains stay; nil keeps all. A chain that is not reached costs nothing.
	keep func(name string) bool
	// empty leaves of the base chains what the kernel has to call.
	empty bool
	// linear is how many rules a packet passes one by one, in a table of that alone: the control.
	linear int
	// What has to be seen before the figures count: a policy is in force, forged sources are dropped.
	policy, source bool

	tables []ruleset.TableID
	awake  bool
}

// rules are the variant's ruleset, as the daemon would load it. Tables are named by the variant, so that a node has them all, of
// which one is awake.
func (v *variant) rules(t *topology, name string) (ruleset.Ruleset, error) {
	if v.linear > 0 {
		return linearRules(name, v.linear), nil
	}
	in := input(t, v.size)
	in.Options = policy.Options{Table: name, Cut: true, Log: true}
	out := policy.Render(in)
	if len(out.Problems) > 0 {
		return nil, fmt.Errorf("render %s: %s", v.label, out.Problems[0])
	}
	var kept ruleset.Ruleset
	for _, table := range out.Ruleset {
		if v.empty {
			for _, c := range table.Chains {
				if c.Hook != nil {
					c.Rules = nil
				}
			}
		}
		if v.keep != nil {
			maps.DeleteFunc(table.Chains, func(name string, c *ruleset.Chain) bool { return c.Hook != nil && !v.keep(name) })
		}
		if slices.ContainsFunc(slices.Collect(maps.Values(table.Chains)), func(c *ruleset.Chain) bool { return c.Hook != nil }) {
			kept = append(kept, table)
		}
	}
	return kept, nil
}

// input is a node in a cluster: local pods of which the client and the server have links, and as many other pods as there are peers.
// All policies select every local pod, in both directions. Only the last one by name allows the flow, those before it allow the
// same port from and to others, so that a packet has to pass them all.
func input(t *topology, s size) policy.Input {
	const namespace = "bench"
	in := policy.Input{Model: cluster.NewModel()}
	add := func(o cluster.Object) { in.Model.Apply(cluster.Change{Key: o.Key(), Object: o}) }
	pod := func(name string, labels map[string]string, ips ...netip.Addr) *cluster.Pod {
		p := &cluster.Pod{Namespace: namespace, Name: name, UID: name, Labels: labels, IPs: ips}
		add(p)
		return p
	}
	var gateways []netip.Addr
	if t.bridged {
		// What the kernel makes of the bridge's MAC address (RFC 4291 appendix A).
		gateways = []netip.Addr{netip.MustParseAddr("10.244.1.1"), netip.MustParseAddr("fd00:10:244:1::1"), netip.MustParseAddr("fe80::ff:fe00:1")}
	}
	local := func(p *cluster.Pod, link string) {
		e := policy.Endpoint{ID: policy.ID(p.Name), Name: namespace + "/" + p.Name, Pod: p, IPs: p.IPs, Link: link}
		if t.bridged && link != "" {
			e.Bridge, e.Gateways = bridge, gateways
		}
		in.Endpoints = append(in.Endpoints, e)
	}
	local(pod("client", map[string]string{"local": "", "app": "friend"}, clientAddrs[:]...), clientLink)
	local(pod("server", map[string]string{"local": "", "app": "friend"}, serverAddrs[:]...), serverLink)
	for i := range localPods - 2 {
		local(pod(fmt.Sprint("local-", i), map[string]string{"local": ""}, pair(10<<24|244<<16|2<<8, i)...), "")
	}
	for i := range s.peers {
		pod(fmt.Sprint("peer-", i), map[string]string{"app": "peer", "shard": fmt.Sprint(i % s.policies)}, pair(10<<24|128<<16, i)...)
	}
	ports := func(protocols ...corev1.Protocol) []networkingv1.NetworkPolicyPort {
		var list []networkingv1.NetworkPolicyPort
		for _, proto := range protocols {
			port := intstr.FromInt32(flowPort)
			list = append(list, networkingv1.NetworkPolicyPort{Protocol: &proto, Port: &port})
		}
		return list
	}
	for i := range s.policies {
		// Every policy has a set of its own, all but a few of the peers.
		values, protocols := []string{"peer"}, []corev1.Protocol{corev1.ProtocolTCP}
		if i == s.policies-1 {
			values, protocols = append(values, "friend"), append(protocols, corev1.ProtocolUDP)
		}
		peers := []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
			{Key: "app", Operator: metav1.LabelSelectorOpIn, Values: values},
			{Key: "shard", Operator: metav1.LabelSelectorOpNotIn, Values: []string{fmt.Sprint((i + 1) % max(2, s.policies))}},
		}}}}
		p := &cluster.Policy{Namespace: namespace, Name: fmt.Sprintf("policy-%02d", i), Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"local": ""}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{{From: peers, Ports: ports(protocols...)}},
			Egress:      []networkingv1.NetworkPolicyEgressRule{{To: peers, Ports: ports(protocols...)}},
		}}
		if i == s.policies-1 {
			udp, open := corev1.ProtocolUDP, intstr.FromInt32(openPort)
			anybody := []networkingv1.NetworkPolicyPort{{Protocol: &udp, Port: &open}}
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{Ports: anybody})
		}
		add(p)
	}
	return in
}

// pair are the i-th IPv4 and IPv6 address of a range.
func pair(base uint32, i int) []netip.Addr {
	n := base + uint32(i)
	v4 := netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
	v6 := netip.MustParseAddr("fd00:10:244::").As16()
	copy(v6[12:], v4.AsSlice())
	return []netip.Addr{v4, netip.AddrFrom16(v6)}
}

// linearRules are what a list of peers is without sets: a rule for each. No established connection is let past them.
func linearRules(name string, n int) ruleset.Ruleset {
	table := ruleset.NewTable(ruleset.TableID{Family: ruleset.Inet, Name: name})
	c := &ruleset.Chain{Name: "forward", Hook: &ruleset.Hook{Name: "forward"}}
	for i := range n {
		c.Rules = append(c.Rules, ruleset.NewRule(ruleset.Address(ruleset.IPSaddr, pair(10<<24|128<<16, i)[0]), ruleset.Verdict{Kind: ruleset.Accept}))
	}
	c.Rules = append(c.Rules, ruleset.NewRule(ruleset.Established|ruleset.New, ruleset.Verdict{Kind: ruleset.Accept}))
	table.Chains[c.Name] = c
	return ruleset.Ruleset{table}
}

// load puts the variant's tables into the kernel and to sleep: a dormant table has no hooks, so its chains are not run.
func (v *variant) load(ctx context.Context, t *topology, name string) error {
	rs, err := v.rules(t, name)
	if err != nil {
		return err
	}
	kernel, err := nft.New(nft.Config{NetNS: int(t.node)})
	if err != nil {
		return err
	}
	defer kernel.Close()
	if err := kernel.Commit(ctx, ruleset.Diff(nil, rs)); err != nil {
		return fmt.Errorf("load %s: %w", v.label, err)
	}
	for _, table := range rs {
		v.tables = append(v.tables, table.ID)
	}
	v.awake = true
	return v.wake(t, false)
}

// wake registers the hooks of the variant's tables, or takes them away. The conntrack hooks stay, for the rules are still there.
func (v *variant) wake(t *topology, awake bool) error {
	if v.awake == awake || len(v.tables) == 0 {
		return nil
	}
	flags := ""
	if !awake {
		flags = "flags dormant;"
	}
	var b strings.Builder
	for _, id := range v.tables {
		fmt.Fprintf(&b, "table %s %s { %s }\n", id.Family, id.Name, flags)
	}
	v.awake = awake
	return in(t.node, func() error { return run(b.String(), "nft", "-f", "-") })
}
