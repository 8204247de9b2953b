package policy

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"go4.org/netipx"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// peer is a pod that selectors can select, with the addresses that are really its own.
type peer struct {
	pod *cluster.Pod
	ips []netip.Addr
}

// claim is what a pod says of an address.
type claim struct {
	pod   *cluster.Pod
	local bool
}

// peers returns every pod that can be a peer. An address belongs to one pod: to the endpoint on this node that owns it, else
// to the newest pod that is alive. An address of a closed endpoint belongs to no peer: whoever sits behind it is not known.
func peers(in *Input, report func(cluster.Key, string)) []peer {
	owner := map[netip.Addr]claim{}
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		for _, ip := range e.IPs {
			owner[ip] = claim{pod: e.Pod, local: true}
		}
	}
	for pod := range in.Model.Pods() {
		if pod.HostNetwork || pod.Terminal {
			continue
		}
		for _, ip := range pod.IPs {
			other, taken := owner[ip]
			if taken && other.local {
				continue
			}
			if !taken {
				owner[ip] = claim{pod: pod}
				continue
			}
			winner, loser := pod, other.pod
			if cmp.Or(other.pod.Created.Compare(pod.Created), strings.Compare(nameOf(pod), nameOf(other.pod))) > 0 {
				winner, loser = loser, winner
			}
			owner[ip] = claim{pod: winner}
			report(loser.Key(), fmt.Sprintf("claims %s, which belongs to the newer pod %s: it is no peer under this address; remove the stale object or give it an address of its own", ip, nameOf(winner)))
		}
	}
	byPod := map[*cluster.Pod][]netip.Addr{}
	for ip, c := range owner {
		if c.pod != nil {
			byPod[c.pod] = append(byPod[c.pod], ip)
		}
	}
	list := make([]peer, 0, len(byPod))
	for pod, ips := range byPod {
		slices.SortFunc(ips, netip.Addr.Compare)
		list = append(list, peer{pod, ips})
	}
	return list
}

func nameOf(p *cluster.Pod) string { return p.Namespace + "/" + p.Name }

// identity is the same for peers that select the same pods by the same words, whatever policy they come from.
func (p podPeer) identity() []string {
	if p.namespaces == nil {
		return []string{"namespace", p.namespace, p.pods.String()}
	}
	return []string{"namespaces", p.namespaces.String(), p.pods.String()}
}

// describe is the comment of the peer's sets.
func (p podPeer) describe() string {
	pods := cmp.Or(p.pods.String(), "all pods")
	if p.namespaces == nil {
		return p.namespace + ": " + pods
	}
	return cmp.Or(p.namespaces.String(), "all namespaces") + ": " + pods
}

// everyPod is the peer of an egress rule that names a port and no peers.
var everyPod = podPeer{namespaces: labels.Everything(), pods: labels.Everything()}

// selected yields the peers that p selects.
func (r *renderer) selected(p podPeer) func(func(*peer) bool) {
	return func(yield func(*peer) bool) {
		inNamespace := map[string]bool{}
		for i := range r.peers {
			pod := r.peers[i].pod
			if p.namespaces == nil {
				if pod.Namespace != p.namespace {
					continue
				}
			} else {
				ok, known := inNamespace[pod.Namespace]
				if !known {
					ok = p.namespaces.Matches(labels.Set(r.in.Model.NamespaceLabels(pod.Namespace)))
					inNamespace[pod.Namespace] = ok
				}
				if !ok {
					continue
				}
			}
			if p.pods.Matches(labels.Set(pod.Labels)) && !yield(&r.peers[i]) {
				return
			}
		}
	}
}

// peerSets returns the names of the IPv4 and the IPv6 set of a selector's addresses.
func (r *renderer) peerSets(p podPeer) [2]string {
	return r.sets(setPeers, p.identity(), p.describe(), nil, func(add func(netip.Addr, ruleset.Elem)) {
		for peer := range r.selected(p) {
			for _, ip := range peer.ips {
				add(ip, ruleset.AddrElem(ip))
			}
		}
	})
}

// namedPortSets returns the sets of address . protocol . port of the pods of p (inside blocks, unless that is nil) that have
// the named port, each with its own numbers: never a union of numbers (CVE class of aci-containers #1707).
func (r *renderer) namedPortSets(p podPeer, blocks *netipx.IPSet, port namedPort) [2]string {
	identity := append(p.identity(), protoName(port.proto), port.name)
	comment := protoName(port.proto) + " " + port.name + " of " + p.describe()
	if blocks != nil {
		identity = append(identity, rangesText(blocks.Ranges()))
		comment += " in ipBlock"
	}
	key := []ruleset.KeyType{ruleset.InetProto, ruleset.InetService}
	return r.sets(setNamedPorts, identity, comment, key, func(add func(netip.Addr, ruleset.Elem)) {
		for peer := range r.selected(p) {
			for _, number := range resolve(peer.pod, port) {
				for _, ip := range peer.ips {
					if blocks == nil || blocks.Contains(ip) {
						add(ip, ruleset.AddrPortElem(ip, uint8(port.proto), number))
					}
				}
			}
		}
	})
}

// resolve returns the sorted numbers that a named port has on a pod. Two containers may use one name: then both count.
func resolve(pod *cluster.Pod, port namedPort) []uint16 {
	var numbers []uint16
	for _, p := range pod.Ports {
		if p.Name == port.name && p.Protocol == port.proto {
			numbers = append(numbers, p.Port)
		}
	}
	slices.Sort(numbers)
	return slices.Compact(numbers)
}

// sets makes the pair of sets for both families unless an equal pair is there already.
func (r *renderer) sets(prefix string, identity []string, comment string, key []ruleset.KeyType, fill func(func(netip.Addr, ruleset.Elem))) [2]string {
	id := ID(append([]string{prefix}, identity...)...)
	names := [2]string{prefix + "4_" + id, prefix + "6_" + id}
	if r.table.Sets[names[0]] != nil {
		return names
	}
	comment = ruleset.Comment(comment)
	for i, family := range []ruleset.KeyType{ruleset.IPv4Addr, ruleset.IPv6Addr} {
		r.table.Sets[names[i]] = &ruleset.Set{
			Name: names[i], Key: append([]ruleset.KeyType{family}, key...), Comment: comment,
			Elements: map[ruleset.Elem]ruleset.Verdict{},
		}
	}
	fill(func(ip netip.Addr, e ruleset.Elem) {
		name := names[1]
		if ip.Is4() {
			name = names[0]
		}
		r.table.Sets[name].Elements[e] = ruleset.Verdict{}
	})
	return names
}

// blockSets returns the interval sets of a large ipBlock, named by their content; a family without ranges has no set.
func (r *renderer) blockSets(ranges [2][]netipx.IPRange) [2]string {
	var names [2]string
	for i, list := range ranges {
		if len(list) == 0 {
			continue
		}
		elements := make(map[ruleset.Elem]ruleset.Verdict, len(list))
		for _, rg := range list {
			elements[ruleset.RangeElem(rg.From(), rg.To())] = ruleset.Verdict{}
		}
		names[i] = []string{"b4_", "b6_"}[i] + ID(setBlocks, rangesText(list))
		r.table.Sets[names[i]] = &ruleset.Set{
			Name: names[i], Key: []ruleset.KeyType{[]ruleset.KeyType{ruleset.IPv4Addr, ruleset.IPv6Addr}[i]},
			Interval: true, Elements: elements,
		}
	}
	return names
}

// portSet returns the set of single ports.
func (r *renderer) portSet(ports []portRange) string {
	elements := make(map[ruleset.Elem]ruleset.Verdict, len(ports))
	for _, p := range ports {
		elements[ruleset.PortElem(uint8(p.proto), p.from)] = ruleset.Verdict{}
	}
	name := setPorts + ID(append([]string{setPorts}, elemStrings(elements)...)...)
	r.table.Sets[name] = &ruleset.Set{
		Name: name, Key: []ruleset.KeyType{ruleset.InetProto, ruleset.InetService}, Elements: elements,
	}
	return name
}

func elemStrings(m map[ruleset.Elem]ruleset.Verdict) []string {
	var list []string
	for _, e := range slices.Sorted(maps.Keys(m)) {
		list = append(list, string(e))
	}
	return list
}

func rangesText(ranges []netipx.IPRange) string {
	parts := make([]string, len(ranges))
	for i, r := range ranges {
		parts[i] = r.String()
	}
	return strings.Join(parts, ",")
}

func protoName(p cluster.Protocol) string {
	switch p {
	case cluster.UDP:
		return "udp"
	case cluster.SCTP:
		return "sctp"
	}
	return "tcp"
}
