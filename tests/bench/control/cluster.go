package main

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

const (
	thisNode    = "node"
	apps        = 10 // a namespace's pods are of these many apps, each with a policy
	teams       = 5  // that a namespace may belong to
	defaultPort = 8080
)

// options are the daemon's defaults.
var options = policy.Options{Table: "podwall", Cut: true, Log: true}

// sample is a cluster: namespaces of ten policies, over which its pods are spread evenly. The first pods are this node's.
type sample struct{ size }

func (s sample) namespaces() int { return s.policies / apps }

func (s sample) namespace(i int) string { return fmt.Sprint("ns", i%s.namespaces()) }

// app goes round after each round of namespaces, so that every policy has as many pods as any other.
func (s sample) app(i int) string { return fmt.Sprint("app", i/s.namespaces()%apps) }

func address(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

func linkName(i int) string { return fmt.Sprint("veth", i) }

// pod is the i-th pod.
func (s sample) pod(i int) *cluster.Pod {
	p := &cluster.Pod{
		Namespace: s.namespace(i), Name: fmt.Sprint("pod", i), UID: fmt.Sprint("uid", i), Node: "other",
		Labels: map[string]string{"app": s.app(i)}, IPs: []netip.Addr{address(i)},
	}
	if i < s.local {
		p.Node = thisNode
	}
	return p
}

// policy is the i-th policy. It lets a pod be reached from another app of its namespace and from the team's pods of one app, and
// lets it reach the team.
func (s sample) policy(i int, port int32) *cluster.Policy {
	selects := func(app int) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app", app%apps)}}
	}
	team := &metav1.LabelSelector{MatchLabels: map[string]string{"team": s.team(i % s.namespaces())}}
	ports := func(ports ...int32) []networkingv1.NetworkPolicyPort {
		var list []networkingv1.NetworkPolicyPort
		for _, p := range ports {
			list = append(list, networkingv1.NetworkPolicyPort{Port: new(intstr.FromInt32(p))})
		}
		return list
	}
	app := i / s.namespaces()
	return &cluster.Policy{Namespace: s.namespace(i), Name: fmt.Sprint("policy", app), Spec: networkingv1.NetworkPolicySpec{
		PodSelector: *selects(app),
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
		Ingress: []networkingv1.NetworkPolicyIngressRule{
			{From: []networkingv1.NetworkPolicyPeer{{PodSelector: selects(app + 1)}}, Ports: ports(port)},
			{From: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: team, PodSelector: selects(app + 2)}}, Ports: ports(9090)},
			{From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "192.168.0.0/16", Except: []string{"192.168.7.0/24"}}}}},
		},
		Egress: []networkingv1.NetworkPolicyEgressRule{
			{To: []networkingv1.NetworkPolicyPeer{{NamespaceSelector: team}}, Ports: ports(443, 8080)},
		},
	}}
}

func (s sample) team(namespace int) string { return fmt.Sprint("team", namespace%teams) }

// objects are all of the cluster, as a source tells of them.
func (s sample) objects() []cluster.Change {
	var changes []cluster.Change
	for n := range s.namespaces() {
		ns := &cluster.Namespace{Name: s.namespace(n), Labels: map[string]string{"team": s.team(n)}}
		changes = append(changes, cluster.Change{Key: ns.Key(), Object: ns})
	}
	for i := range s.policies {
		changes = append(changes, changed(s.policy(i, defaultPort)))
	}
	for i := range s.pods {
		changes = append(changes, changed(s.pod(i)))
	}
	return changes
}

func changed(o cluster.Object) cluster.Change { return cluster.Change{Key: o.Key(), Object: o} }

// render is what the node is to load after some changes, with the first pods as its own.
func (s sample) render(local int, changes ...cluster.Change) ruleset.Ruleset {
	return policy.Render(s.input(local, changes...)).Ruleset
}

func (s sample) input(local int, changes ...cluster.Change) policy.Input {
	in := policy.Input{Model: cluster.NewModel(), Options: options}
	for _, c := range append(s.objects(), changes...) {
		in.Model.Apply(c)
	}
	for i := range local {
		p := s.pod(i)
		in.Endpoints = append(in.Endpoints, policy.Endpoint{ID: p.UID, Name: p.Namespace + "/" + p.Name, Pod: p, IPs: p.IPs, Link: linkName(i)})
	}
	return in
}

// makeLinks makes the host links of pods, and returns their indexes. Their other ends are here too: nothing is sent.
func makeLinks(n int) ([]int, error) {
	var indexes []int
	for i := range n {
		_, index, err := addLink(linkName(i))
		if err != nil {
			return nil, err
		}
		indexes = append(indexes, index)
	}
	return indexes, nil
}

func addLink(name string) (netlink.Link, int, error) {
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}); err != nil {
		return nil, 0, fmt.Errorf("add link %s: %w", name, err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return nil, 0, fmt.Errorf("find link %s: %w", name, err)
	}
	return l, l.Attrs().Index, nil
}
