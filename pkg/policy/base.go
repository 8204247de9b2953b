package policy

import (
	"net/netip"

	"github.com/podwall/podwall/pkg/ruleset"
)

var (
	accept = ruleset.Verdict{Kind: ruleset.Accept}
	drop   = ruleset.Verdict{Kind: ruleset.Drop}
	// allowed ends what egress policies of the sender say.
	allowed = ruleset.Verdict{Kind: ruleset.Return}
)

// ICMPv6 types (RFC 4861, 2710, 3810). Router advertisements and redirects are not among those that pass: a pod that sends
// them takes over its neighbours.
var (
	neighbourDiscovery = []uint8{133, 135, 136}      // router and neighbour solicitation, neighbour advertisement
	multicastListener  = []uint8{130, 131, 132, 143} // query, report, done, report v2
)

const (
	routerAdvertisement    = 134
	neighbourAdvertisement = 136
	redirect               = 137
)

// base renders what does not depend on any pod.
//
// One base chain on forward judges both ends of a packet, for each base chain costs every packet its call: what egress policy of the sender
// allows returns to it, and only what ingress policy of the receiver allows is accepted. So there are no marks, and no chains per pair of
// pods. What the node itself sends to its pods is exempt by its origin, not by an address that somebody could forge: output is hooked for
// revoked connections only.
func (r *renderer) base() {
	for _, m := range []struct {
		name string
		key  ruleset.KeyType
	}{{mapEgress4, ruleset.IPv4Addr}, {mapEgress6, ruleset.IPv6Addr}, {mapIngress4, ruleset.IPv4Addr}, {mapIngress6, ruleset.IPv6Addr}} {
		r.table.Sets[m.name] = &ruleset.Set{Name: m.name, Key: []ruleset.KeyType{m.key}, Map: true, Elements: map[ruleset.Elem]ruleset.Verdict{}}
	}
	addICMPv6Sets(r.table)
	// What is RELATED the chains of isolated pods let pass: others are in no map.
	established := ruleset.NewRule(ruleset.Established, accept)
	// Nothing of it is TCP, which most new connections are.
	common := ruleset.NewRule(ruleset.Not(tcp), ruleset.To(ruleset.Jump, chainCommon))
	bySource := []ruleset.Rule{
		ruleset.NewRule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IPSaddr}, Map: mapEgress4}),
		ruleset.NewRule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IP6Saddr}, Map: mapEgress6}),
	}
	byDestination := []ruleset.Rule{
		ruleset.NewRule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IPDaddr}, Map: mapIngress4}),
		ruleset.NewRule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IP6Daddr}, Map: mapIngress6}),
	}
	// first is what packets of pods meet first. No ipBlock and no exemption is meant for groups, which are nobody's address.
	first := []ruleset.Rule{
		established,
		common,
		ruleset.NewRule(ruleset.Prefix{Field: ruleset.IPDaddr, Prefix: above4}, ruleset.To(ruleset.Jump, chainGroups)),
		ruleset.NewRule(ruleset.Prefix{Field: ruleset.IP6Daddr, Prefix: multicast6}, ruleset.To(ruleset.Jump, chainGroups)),
	}
	r.isolatedSets(setEgressIsolated)
	r.isolatedSets(setIngressIsolated)
	if r.in.Options.Cut {
		r.revocation()
		first = append(first, ruleset.NewRule(ruleset.To(ruleset.Jump, chainRevoked)))
	}
	// What is left is not for a registered address: if it leads to an isolated pod all the same, it is for one that CNI did not
	// report. (On a bridge the link is not known here, and the port's own chain sees to it.)
	r.table.Sets[setIsolatedLinks] = &ruleset.Set{Name: setIsolatedLinks, Key: []ruleset.KeyType{ruleset.IfName}, Elements: map[ruleset.Elem]ruleset.Verdict{}}
	unregistered := dropRule(ruleset.In{Fields: []ruleset.Field{ruleset.OIFName}, Set: setIsolatedLinks})
	// No chain of an isolated pod returns. But a packet sees the elements of now with the rules of when it came (ruleset.Diff), and so, while a pod is
	// being opened, its new chain without any.
	torn := []ruleset.Rule{
		dropRule(ruleset.In{Fields: []ruleset.Field{ruleset.IPDaddr}, Set: setIngressIsolated[0]}),
		dropRule(ruleset.In{Fields: []ruleset.Field{ruleset.IP6Daddr}, Set: setIngressIsolated[1]}),
	}
	r.chain(chainForward, &ruleset.Hook{Name: "forward", Priority: priorityFilter}, first, bySource, byDestination, torn, []ruleset.Rule{unregistered})
	node := [][]ruleset.Rule{first, r.nodeRules()}
	if !r.in.Options.AllowOwnNode {
		node = append(node, bySource)
	}
	r.chain(chainNode, &ruleset.Hook{Name: "input", Priority: priorityFilter}, node...)
	r.chain(chainCommon, nil, passICMPv6(), []ruleset.Rule{
		// A DHCP client without an address yet. The answer is to nobody who is in a map, and no isolated pod may give it.
		ruleset.NewRule(ruleset.Address(ruleset.IPSaddr, netip.IPv4Unspecified()), ruleset.Address(ruleset.IPDaddr, broadcast), udp, ruleset.Equal16(ruleset.Sport, 68), ruleset.Equal16(ruleset.Dport, 67), accept),
	})
	r.chain(chainNotNew, nil, []ruleset.Rule{ruleset.NewRule(ruleset.Related, accept), dropRule(ruleset.Invalid)})
	from4 := ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: setEgressIsolated[0]}
	from6 := ruleset.In{Fields: []ruleset.Field{ruleset.IP6Saddr}, Set: setEgressIsolated[1]}
	r.chain(chainGroups, nil, []ruleset.Rule{
		dropRule(from4, ruleset.Prefix{Field: ruleset.IPDaddr, Prefix: multicast4}),
		dropRule(from4, ruleset.Address(ruleset.IPDaddr, broadcast)),
		dropRule(from6),
	})
	r.unsent()
	r.chain(chainQuarantine, nil, []ruleset.Rule{ruleset.NewRule(ruleset.Counter{}, drop)})
}

var (
	broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	udp       = ruleset.Equal(ruleset.L4Proto, ruleset.ProtoUDP)
	tcp       = ruleset.Equal(ruleset.L4Proto, ruleset.ProtoTCP)
)

func (r *renderer) chain(name string, hook *ruleset.Hook, parts ...[]ruleset.Rule) {
	c := &ruleset.Chain{Name: name, Hook: hook}
	for _, p := range parts {
		c.Rules = append(c.Rules, p...)
	}
	r.table.Chains[name] = c
}

// nodeRules are the exemptions of pod -> own node: renewing a DHCP lease, and DNS caches that listen on the node.
func (r *renderer) nodeRules() []ruleset.Rule {
	rules := []ruleset.Rule{
		ruleset.NewRule(udp, ruleset.Equal16(ruleset.Sport, 68), ruleset.Equal16(ruleset.Dport, 67), accept),
		ruleset.NewRule(udp, ruleset.Equal16(ruleset.Sport, 546), ruleset.Equal16(ruleset.Dport, 547), accept),
	}
	for _, ip := range r.in.Options.NodeDNS {
		for _, proto := range []uint8{ruleset.ProtoUDP, ruleset.ProtoTCP} {
			rules = append(rules, ruleset.NewRule(ruleset.Equal(ruleset.L4Proto, proto), ruleset.Equal16(ruleset.Dport, 53), ruleset.Address(daddr(ip), ip), accept))
		}
	}
	return rules
}

// unsent ends the egress chains, which all endpoints of a set of policies share: who has sent it is told by its source. What is RELATED goes on to
// the receiver, which may be closed.
func (r *renderer) unsent() {
	var tell []ruleset.Rule
	if r.in.Options.Log {
		for i, source := range sources {
			name := setDenied[i]
			r.table.Sets[name] = &ruleset.Set{
				Name: name, Key: []ruleset.KeyType{[]ruleset.KeyType{ruleset.IPv4Addr, ruleset.IPv6Addr}[i]},
				Timeout: deniedTimeout, Size: deniedSize, Dynamic: true, Elements: map[ruleset.Elem]ruleset.Verdict{},
			}
			tell = append(tell, ruleset.NewRule(ruleset.LimitEach{Field: source, Set: name, PerSecond: logPerSecond, Burst: logBurst}, r.log(DirectionEgress, "")))
		}
	}
	r.chain(chainUnsent, nil, []ruleset.Rule{ruleset.NewRule(ruleset.Related, allowed)}, r.deny(tell))
}

func addICMPv6Sets(t *ruleset.Table) {
	for name, types := range map[string][]uint8{setND: neighbourDiscovery, setMLD: multicastListener} {
		s := &ruleset.Set{Name: name, Key: []ruleset.KeyType{ruleset.ICMPv6}, Elements: map[ruleset.Elem]ruleset.Verdict{}}
		for _, v := range types {
			s.Elements[ruleset.Elem([]byte{v})] = ruleset.Verdict{}
		}
		t.Sets[name] = s
	}
}

// passICMPv6 accepts neighbour discovery and multicast listener messages that were sent on this link: a hop limit of 255 (or
// 1) cannot have crossed a router (RFC 4861 section 7.1, RFC 2710 section 3).
func passICMPv6() []ruleset.Rule {
	return []ruleset.Rule{
		ruleset.NewRule(ruleset.In{Fields: []ruleset.Field{ruleset.ICMPv6Type}, Set: setND}, ruleset.Equal(ruleset.IP6HopLimit, 255), accept),
		ruleset.NewRule(ruleset.In{Fields: []ruleset.Field{ruleset.ICMPv6Type}, Set: setMLD}, ruleset.Equal(ruleset.IP6HopLimit, 1),
			ruleset.Prefix{Field: ruleset.IP6Daddr, Prefix: multicast6}, accept), // what is routed was sent with 2, and is unicast
	}
}
