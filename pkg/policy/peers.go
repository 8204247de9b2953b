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

// claims reports whether a pod's own word counts for its addresses.
func claims(pod *cluster.Pod) bool { return !pod.HostNetwork && !pod.Terminal }

// newest returns which of the pods that claim an address has it.
func newest(claimants []*cluster.Pod) *cluster.Pod {
	return slices.MaxFunc(claimants, func(a, b *cluster.Pod) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(nameOf(b), nameOf(a)))
	})
}

// contested are the problems of the pods that claim an address and do not have it.
func contested(ip netip.Addr, claimants []*cluster.Pod) []Problem {
	var list []Problem
	winner := newest(claimants)
	for _, loser := range claimants {
		if loser != winner {
			list = append(list, Problem{loser.Key(), fmt.Sprintf("claims %s, which belongs to the newer pod %s: it is no peer under this address; remove the stale object or give it an address of its own", ip, nameOf(winner))})
		}
	}
	return list
}

// peers returns every pod that can be a peer. An address belongs to one pod: to the endpoint on this node that owns it, else
// to the newest pod that is alive. An address of a closed endpoint belongs to no peer: whoever sits behind it is not known.
func peers(in *Input, report func(cluster.Key, string)) []peer {
	owner := map[netip.Addr]*cluster.Pod{} // nil: nobody's
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		for _, ip := range e.IPs {
			owner[ip] = e.Pod
		}
	}
	claimants := map[netip.Addr][]*cluster.Pod{}
	for pod := range in.Model.Pods() {
		if !claims(pod) {
			continue
		}
		for _, ip := range pod.IPs {
			if _, local := owner[ip]; !local && !slices.Contains(claimants[ip], pod) {
				claimants[ip] = append(claimants[ip], pod)
			}
		}
	}
	for ip, pods := range claimants {
		owner[ip] = newest(pods)
		for _, p := range contested(ip, pods) {
			report(p.Object, p.Reason)
		}
	}
	byPod := map[*cluster.Pod][]netip.Addr{}
	for ip, pod := range owner {
		if pod != nil {
			byPod[pod] = append(byPod[pod], ip)
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

// peerSet is a pair of sets, IPv4 and IPv6: the addresses of the pods that a peer selects or, with a named port, address . protocol .
// port of those that have it (inside blocks, unless that is nil), each with its own numbers: never a union of numbers (CVE class
// of aci-containers #1707).
type peerSet struct {
	names  [2]string
	pods   podPeer
	port   *namedPort
	blocks *netipx.IPSet
}

// elements calls add for what a selected pod with these addresses has in the sets; i is 0 for IPv4.
func (s *peerSet) elements(pod *cluster.Pod, ips []netip.Addr, add func(i int, e ruleset.Elem)) {
	var numbers []uint16
	if s.port != nil {
		numbers = resolve(pod, *s.port)
	}
	for _, ip := range ips {
		i := 1
		if ip.Is4() {
			i = 0
		}
		if s.port == nil {
			add(i, ruleset.AddrElem(ip))
			continue
		}
		for _, number := range numbers {
			if s.blocks == nil || s.blocks.Contains(ip) {
				add(i, ruleset.AddrPortElem(ip, uint8(s.port.proto), number))
			}
		}
	}
}

// peerSets returns the names of the IPv4 and the IPv6 set of a selector's addresses.
func (r *renderer) peerSets(p podPeer) [2]string {
	return r.sets(setPeers, p.identity(), p.describe(), nil, &peerSet{pods: p})
}

// namedPortSets returns the names of the sets of a named port.
func (r *renderer) namedPortSets(p podPeer, blocks *netipx.IPSet, port namedPort) [2]string {
	identity := append(p.identity(), protoName(port.proto), port.name)
	comment := protoName(port.proto) + " " + port.name + " of " + p.describe()
	if blocks != nil {
		identity = append(identity, rangesText(blocks.Ranges()))
		comment += " in ipBlock"
	}
	key := []ruleset.KeyType{ruleset.InetProto, ruleset.InetService}
	return r.sets(setNamedPorts, identity, comment, key, &peerSet{pods: p, port: &port, blocks: blocks})
}

// fillSets puts every peer that is selected into a pair of sets.
func (r *renderer) fillSets(s *peerSet) {
	for peer := range r.selected(s.pods) {
		s.elements(peer.pod, peer.ips, func(i int, e ruleset.Elem) { r.table.Sets[s.names[i]].Elements[e] = ruleset.Verdict{} })
	}
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
func (r *renderer) sets(prefix string, identity []string, comment string, key []ruleset.KeyType, s *peerSet) [2]string {
	id := ID(append([]string{prefix}, identity...)...)
	s.names = [2]string{prefix + "4_" + id, prefix + "6_" + id}
	if r.table.Sets[s.names[0]] != nil {
		return s.names
	}
	comment = ruleset.Comment(comment)
	for i, family := range []ruleset.KeyType{ruleset.IPv4Addr, ruleset.IPv6Addr} {
		r.table.Sets[s.names[i]] = &ruleset.Set{
			Name: s.names[i], Key: append([]ruleset.KeyType{family}, key...), Comment: comment,
			Elements: map[ruleset.Elem]ruleset.Verdict{},
		}
	}
	r.fill(s)
	return s.names
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

// portRangeSet returns the interval set of ranges of one protocol's ports, sorted and apart. It is named by its content.
func (r *renderer) portRangeSet(ports []portRange) string {
	elements := make(map[ruleset.Elem]ruleset.Verdict, len(ports))
	for _, p := range ports {
		elements[ruleset.PortRangeElem(p.from, p.to)] = ruleset.Verdict{}
	}
	name := setPortRanges + ID(append([]string{setPortRanges}, elemStrings(elements)...)...)
	r.table.Sets[name] = &ruleset.Set{Name: name, Key: []ruleset.KeyType{ruleset.InetService}, Interval: true, Elements: elements}
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
