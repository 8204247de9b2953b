// Package subject is what the oracle's answers are compared with: podwall's ruleset for a cluster, and the way of a
// connection's first packet through it.
package subject

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

// Model returns what podwall's source would know of the cluster.
func Model(c *oracle.Cluster) *cluster.Model {
	m := cluster.NewModel()
	objects(c, func(o cluster.Change) { m.Apply(o) })
	return m
}

// Engine returns what the daemon keeps, with the objects of a cluster and without endpoints.
func Engine(c *oracle.Cluster) *policy.Engine {
	e := policy.NewEngine(options(c))
	objects(c, func(o cluster.Change) { e.Apply(o) })
	return e
}

func objects(c *oracle.Cluster, apply func(cluster.Change)) {
	put := func(o cluster.Object) { apply(cluster.Change{Key: o.Key(), Object: o}) }
	for _, n := range c.Namespaces {
		put(cluster.NamespaceFrom(n))
	}
	for _, p := range c.Pods {
		put(cluster.PodFrom(p))
	}
	for _, p := range c.Policies {
		put(cluster.PolicyFrom(p))
	}
}

func options(c *oracle.Cluster) policy.Options {
	return policy.Options{Table: "podwall", AllowOwnNode: c.AllowOwnNode, Cut: true, Log: true}
}

// Change tells an engine the objects that are new, changed or gone from one cluster to the next, and no others. What deaf returns
// true for it is not told.
func Change(e *policy.Engine, from, to *oracle.Cluster, deaf func(cluster.Kind) bool) {
	change(e, deaf, from.Namespaces, to.Namespaces, cluster.NamespaceFrom)
	change(e, deaf, from.Pods, to.Pods, cluster.PodFrom)
	change(e, deaf, from.Policies, to.Policies, cluster.PolicyFrom)
}

func change[T any, O cluster.Object](e *policy.Engine, deaf func(cluster.Kind) bool, old, next []*T, read func(*T) O) {
	keys := map[cluster.Key]bool{}
	for _, o := range next {
		object := read(o)
		keys[object.Key()] = true
		if !slices.Contains(old, o) && !deaf(object.Key().Kind) {
			e.Apply(cluster.Change{Key: object.Key(), Object: object})
		}
	}
	for _, o := range old {
		if key := read(o).Key(); !keys[key] && !deaf(key.Kind) {
			e.Apply(cluster.Change{Key: key})
		}
	}
}

// Input adds the endpoints to a model: one per sandbox, at the place that its addresses belong to, and one per pod that was
// there before podwall (adopted by the addresses that the API reports).
func Input(c *oracle.Cluster, m *cluster.Model) policy.Input {
	in := policy.Input{Model: m, Options: options(c)}
	taken := map[netip.Addr]bool{}
	attached := map[string]bool{}
	for _, s := range slices.Backward(c.Sandboxes) {
		e := policy.Endpoint{ID: policy.ID("sandbox", s.Namespace, s.Name), Name: s.Namespace + "/" + s.Name, Pod: m.Pod(s.Namespace, s.Name)}
		for _, ip := range s.IPs {
			if place, ok := layout.PlaceOf(ip); ok && !taken[ip] {
				e.Link, e.Bridge = place.Link, place.Bridge
				e.IPs = append(e.IPs, ip)
				taken[ip] = true
			}
		}
		attached[e.Name] = true
		if len(e.IPs) > 0 {
			in.Endpoints = append(in.Endpoints, e)
		}
	}
	pods := slices.Clone(c.Pods)
	slices.SortFunc(pods, func(a, b *corev1.Pod) int { return b.CreationTimestamp.Compare(a.CreationTimestamp.Time) })
	for _, p := range pods {
		pod := m.Pod(p.Namespace, p.Name)
		name := p.Namespace + "/" + p.Name
		if pod == nil || pod.Node != c.Node || pod.HostNetwork || pod.Terminal || attached[name] {
			continue
		}
		e := policy.Endpoint{ID: policy.ID("adopted", name), Name: name, Pod: pod}
		for _, ip := range pod.IPs {
			if taken[ip] {
				continue
			}
			if place, ok := layout.PlaceOf(ip); ok {
				e.Device = cmp.Or(place.Bridge, place.Link)
			}
			e.IPs = append(e.IPs, ip)
			taken[ip] = true
		}
		if len(e.IPs) > 0 {
			in.Endpoints = append(in.Endpoints, e)
		}
	}
	return in
}

// Render returns podwall's ruleset for a cluster.
func Render(c *oracle.Cluster) policy.Output { return policy.Render(Input(c, Model(c))) }

var protocols = map[oracle.Protocol]uint8{oracle.TCP: ruleset.ProtoTCP, oracle.UDP: ruleset.ProtoUDP, oracle.SCTP: ruleset.ProtoSCTP}

// Packet returns the first packet of a connection, without devices.
func Packet(conn oracle.Conn) ruleset.Packet {
	p := ruleset.Packet{Src: conn.Src, Dst: conn.Dst, Proto: protocols[conn.Protocol], Sport: 40000, Dport: conn.Port, HopLimit: 64, CT: ruleset.New, TCPFlags: ruleset.SYN}
	if conn.Protocol == oracle.ICMP {
		p.Proto, p.Sport, p.Dport = ruleset.ProtoICMP, 0, 0
		if conn.Src.Is6() {
			p.Proto, p.ICMPv6Type = ruleset.ProtoICMPv6, 128
		}
	}
	return p
}

// Allowed runs a connection through the hooks that it crosses on the node: the ingress of the sender's host veth, forward (or
// input), and the egress of the receiver's when that is a bridge port. What the node itself sends crosses only the last. The
// text names the rules that it met.
func Allowed(rs ruleset.Ruleset, conn oracle.Conn) (bool, string, error) {
	from, fromPod := layout.PlaceOf(conn.Src)
	to, toPod := layout.PlaceOf(conn.Dst)
	p := Packet(conn)
	var path strings.Builder
	hook := func(name string, p ruleset.Packet) (bool, error) {
		result, err := rs.Trace(name, p)
		if err != nil {
			return false, err
		}
		for _, s := range result.Steps {
			fmt.Fprintf(&path, "%s %s\n", name, s)
		}
		return result.Verdict == ruleset.Accept, nil
	}
	p.IIFName = layout.Uplink
	if fromPod && !conn.FromNode {
		p.IIFName = from.Link
		if ok, err := hook("ingress", p); !ok {
			return false, path.String(), err
		}
		if from.Bridge != "" {
			p.IIFName = from.Bridge
		}
	}
	switch {
	case conn.FromNode:
	case conn.ToNode:
		ok, err := hook("input", p)
		return ok, path.String(), err
	default:
		if toPod {
			p.OIFName = cmp.Or(to.Bridge, to.Link)
		}
		if ok, err := hook("forward", p); !ok {
			return false, path.String(), err
		}
	}
	if toPod && to.Bridge != "" {
		p.OIFName, p.PktType = to.Link, ruleset.PktHost
		if from.Bridge == to.Bridge && conn.Src != conn.Dst && !conn.FromNode {
			p.PktType = ruleset.PktOther // bridged, not routed: it keeps the type it was received with
		}
		ok, err := hook("egress", p)
		return ok, path.String(), err
	}
	return true, path.String(), nil
}
