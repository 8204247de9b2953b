package policy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/podwall/podwall/pkg/ruleset"
)

// The chains of an endpoint's host veth. Dispatch by address holds only as long as addresses are true, and it sees nothing of
// what is not addressed to a registered address (link-local, broadcast, multicast): isolation covers the pod, not its IPs.
//
// They are in the netdev companion: what is not IP passes by the inet table. On a bridge port that is whatever the bridge hands on.
// On a routed veth it is an IP packet behind two tags of VLAN 0: the kernel takes the second one off behind the ingress hook
// (check_vlan_id in __netif_receive_skb_core), so that a forged source would be routed without having been looked at.

var (
	linkLocal   = netip.MustParsePrefix("fe80::/10")
	multicast4  = netip.MustParsePrefix("224.0.0.0/4")
	above4      = netip.MustParsePrefix("224.0.0.0/3") // multicast, reserved and broadcast
	multicast6  = netip.MustParsePrefix("ff00::/8")
	everything4 = netip.MustParsePrefix("0.0.0.0/0")
	everything6 = netip.MustParsePrefix("::/0")
)

var counted = []ruleset.Expr{ruleset.Counter{}, drop}

func dropRule(match ...ruleset.Expr) ruleset.Rule {
	return ruleset.NewRule(append(match, counted...)...)
}

// linkChain adds an empty base chain on a hook of the endpoint's host veth, or returns nil when it has none.
func (r *renderer) linkChain(e *Endpoint, prefix, hook string) *ruleset.Chain {
	if e.Link == "" {
		return nil
	}
	if len(r.device.Sets) == 0 {
		addICMPv6Sets(r.device)
	}
	c := &ruleset.Chain{Name: prefix + e.ID, Hook: &ruleset.Hook{Name: hook, Priority: priorityDevice, Device: e.Link}}
	r.device.Chains[c.Name] = c
	return c
}

// closedLink lets nothing through but what keeps IPv6 addresses alive.
func (r *renderer) closedLink(e *Endpoint) {
	r.isolateLink(e)
	if c := r.linkChain(e, prefixSource, "ingress"); c != nil {
		// The addresses are for Links: everything is dropped, but the next start may have nothing else to know them by.
		c.Rules = []ruleset.Rule{dropRule(notOwn(e, ruleset.IPSaddr)...), dropRule(stranger(e)...)}
		if e.Bridge != "" {
			c.Rules = append(c.Rules, neighbourRules(e)...)
			c.Rules = append(c.Rules, advertisements(e)...)
		}
		c.Rules = append(c.Rules, passICMPv6()...)
		c.Rules = append(c.Rules, dropRule().WithComment(e.Name+" quarantine"))
	}
	if e.Bridge == "" {
		return
	}
	if c := r.linkChain(e, prefixDeliver, "egress"); c != nil {
		c.Rules = append(passICMPv6(), dropRule().WithComment(e.Name+" quarantine"))
	}
}

// isolateLink keeps from a routed link what is not for one of the endpoint's addresses.
func (r *renderer) isolateLink(e *Endpoint) {
	if e.Link != "" && e.Bridge == "" {
		r.table.Sets[setIsolatedLinks].Elements[ruleset.LinkElem(e.Link)] = ruleset.Verdict{}
	}
}

// openLink renders the link of a known pod: it sends from its own addresses only, and on addresses that CNI did not report an
// isolated pod sends and receives nothing but neighbour discovery and DHCP.
func (r *renderer) openLink(e *Endpoint, ingress, egress bool) {
	if ingress {
		r.isolateLink(e)
	}
	if c := r.linkChain(e, prefixSource, "ingress"); c != nil {
		c.Rules = sourceRules(e, egress)
	}
	if ingress && e.Bridge != "" {
		if c := r.linkChain(e, prefixDeliver, "egress"); c != nil {
			c.Rules = deliverRules(e)
		}
	}
}

func sourceRules(e *Endpoint, isolated bool) []ruleset.Rule {
	rules := append(ordinary(e),
		dropRule(ruleset.Equal(ruleset.ICMPv6Type, routerAdvertisement)),
		dropRule(ruleset.Equal(ruleset.ICMPv6Type, redirect)),
		dropRule(
			ruleset.Not(ruleset.Equal16(ruleset.EtherType, ruleset.EtherIPv4)),
			ruleset.Not(ruleset.Equal16(ruleset.EtherType, ruleset.EtherIPv6)),
			ruleset.Not(ruleset.Equal16(ruleset.EtherType, ruleset.EtherARP))),
		ruleset.NewRule(ruleset.Address(ruleset.IPSaddr, netip.IPv4Unspecified()), ruleset.Address(ruleset.IPDaddr, broadcast), udp, ruleset.Equal16(ruleset.Sport, 68), ruleset.Equal16(ruleset.Dport, 67), accept),
	)
	rules[0] = rules[0].WithComment(e.Name)
	if e.Bridge != "" {
		rules = append(rules, neighbourRules(e)...)
	}
	rules = append(rules, dropRule(notOwn(e, ruleset.IPSaddr)...), dropRule(stranger(e)...))
	if e.Bridge != "" {
		rules = append(rules, advertisements(e)...)
	}
	rules = append(rules, passICMPv6()...)
	if isolated {
		return append(rules, dropRule(notOwn(e, ruleset.IP6Saddr)...))
	}
	return append(rules, dropRule(ruleset.Address(ruleset.IP6Saddr, netip.IPv6Unspecified())))
}

// ordinary accepts at once what nearly every packet is, and what no rule behind drops: sent from one of the endpoint's own addresses,
// and nothing that neighbours could be misled with. It takes a packet a fifth of the time that all rules take.
//
// A frame with a VLAN tag has the protocol of the packet inside, as the kernel has taken the tag off. A bridge would hand it on past the
// inet table, so there the EtherType is compared as well. On a routed veth a packet with a true source address may have one: if it is a
// priority tag it is routed as without, and else nobody takes it.
func ordinary(e *Endpoint) []ruleset.Rule {
	var rules []ruleset.Rule
	for _, ip := range e.IPs {
		if slices.Contains(e.Gateways, ip) {
			continue // the rules about neighbours have to see it
		}
		var match []ruleset.Expr
		if e.Bridge != "" {
			match = append(match, etherType(ip))
		}
		match = append(match, ruleset.Address(saddr(ip), ip))
		if ip.Is6() {
			match = append(match, ruleset.Not(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoICMPv6)))
		}
		rules = append(rules, ruleset.NewRule(append(match, accept)...))
	}
	return rules
}

func etherType(ip netip.Addr) ruleset.Expr {
	if ip.Is4() {
		return ruleset.Equal16(ruleset.EtherType, ruleset.EtherIPv4)
	}
	return ruleset.Equal16(ruleset.EtherType, ruleset.EtherIPv6)
}

// stranger matches IPv6 sources that are neither the endpoint's own nor link-local nor unspecified (duplicate address
// detection). Neighbour discovery is under it as well: a solicitation from a forged address redirects that address (RFC 4861
// section 7.2.3).
func stranger(e *Endpoint) []ruleset.Expr {
	return append(notOwn(e, ruleset.IP6Saddr),
		ruleset.Not(ruleset.Address(ruleset.IP6Saddr, netip.IPv6Unspecified())),
		ruleset.Prefix{Field: ruleset.IP6Saddr, Not: true, Prefix: linkLocal})
}

// neighbourRules keep a pod on a bridge from taking over the addresses of its neighbours: in ARP it speaks for its own address
// (or none: a probe, RFC 5227), in neighbour discovery it does not speak for the node's link-local ones. A solicitation teaches
// its receiver the address that it was sent from, which the other rules hold to be the pod's.
func neighbourRules(e *Endpoint) []ruleset.Rule {
	claim := []ruleset.Expr{ruleset.Not(ruleset.Address(ruleset.ARPSaddr, netip.IPv4Unspecified()))}
	for _, ip := range e.IPs {
		if ip.Is4() {
			claim = append(claim, ruleset.Not(ruleset.Address(ruleset.ARPSaddr, ip)))
		}
	}
	rules := []ruleset.Rule{dropRule(claim...)}
	for _, ip := range e.Gateways {
		if linkLocal.Contains(ip) {
			rules = append(rules,
				dropRule(ruleset.Equal(ruleset.ICMPv6Type, neighbourAdvertisement), ruleset.Address(ruleset.NDTarget, ip)),
				dropRule(ruleset.Address(ruleset.IP6Saddr, ip)))
		}
	}
	return rules
}

// advertisements let those pass that are about the pod's own addresses or about link-local ones, and no other: also not one whose
// target is in a second fragment. Its receiver would ignore fragments (RFC 6980), but br_netfilter hands on the whole message.
func advertisements(e *Endpoint) []ruleset.Rule {
	advertisement := ruleset.Equal(ruleset.ICMPv6Type, neighbourAdvertisement)
	hopLimit := ruleset.Equal(ruleset.IP6HopLimit, 255)
	var rules []ruleset.Rule
	for _, ip := range e.IPs {
		if ip.Is6() {
			rules = append(rules, ruleset.NewRule(advertisement, hopLimit, ruleset.Address(ruleset.NDTarget, ip), accept))
		}
	}
	return append(rules,
		ruleset.NewRule(advertisement, hopLimit, ruleset.Prefix{Field: ruleset.NDTarget, Prefix: linkLocal}, accept),
		dropRule(advertisement))
}

// deliverRules close a bridge port for what is not addressed to the pod's own addresses. Frames from the node itself, and
// what it routes, have packet type host there; what the bridge forwards keeps the type it was received with. A pod may hand
// the router what it must not send itself, but a router never forwards a link-local source: such a frame is the node's own.
//
// What is addressed to the pod comes first, as nearly every packet is.
func deliverRules(e *Endpoint) []ruleset.Rule {
	var rules []ruleset.Rule
	for _, ip := range e.IPs {
		rules = append(rules, ruleset.NewRule(ruleset.Address(daddr(ip), ip), accept))
	}
	rules = append(rules, ruleset.NewRule(ruleset.Equal(ruleset.PktType, ruleset.PktHost), ruleset.Prefix{Field: ruleset.IP6Saddr, Prefix: linkLocal}, accept))
	rules[0] = rules[0].WithComment(e.Name)
	rules = append(rules, passICMPv6()...)
	return append(rules,
		ruleset.NewRule(ruleset.Address(ruleset.IPDaddr, broadcast), udp, ruleset.Equal16(ruleset.Sport, 67), ruleset.Equal16(ruleset.Dport, 68), accept),
		dropRule(notOwn(e, ruleset.IPDaddr)...),
		dropRule(notOwn(e, ruleset.IP6Daddr)...))
}

// notOwn matches packets of the field's family whose address is none of the endpoint's.
func notOwn(e *Endpoint, f ruleset.Field) []ruleset.Expr {
	v4 := f == ruleset.IPSaddr || f == ruleset.IPDaddr
	var match []ruleset.Expr
	for _, ip := range e.IPs {
		if ip.Is4() == v4 {
			match = append(match, ruleset.Not(ruleset.Address(f, ip)))
		}
	}
	if match != nil {
		return match
	}
	if v4 {
		return []ruleset.Expr{ruleset.Prefix{Field: f, Prefix: everything4}}
	}
	return []ruleset.Expr{ruleset.Prefix{Field: f, Prefix: everything6}}
}

// Quarantined is the verdict of a closed endpoint's addresses in the verdict maps, but for a brief one's.
var Quarantined = ruleset.To(ruleset.Goto, chainQuarantine)

// Closed reports whether a verdict in the verdict maps is that of a closed endpoint.
func Closed(v ruleset.Verdict) bool { return v == Quarantined || v == drop }

// LinkOf is what a ruleset tells about an endpoint by the chain of its host veth.
type LinkOf struct {
	Device string
	IPs    []netip.Addr // its own addresses
}

// Links returns the endpoints whose host veth has a chain in a ruleset, by Endpoint.ID.
func Links(rs ruleset.Ruleset) map[string]LinkOf {
	links := map[string]LinkOf{}
	for _, t := range rs {
		for name, c := range t.Chains {
			id, ok := strings.CutPrefix(name, prefixSource)
			if !ok || c.Hook == nil {
				continue
			}
			l := LinkOf{Device: c.Hook.Device}
			for _, rule := range c.Rules {
				for _, e := range rule.Exprs {
					if m, ok := e.(ruleset.Cmp); ok && m.Not && (m.Field == ruleset.IPSaddr || m.Field == ruleset.IP6Saddr) {
						if ip, _ := netip.AddrFromSlice([]byte(m.Value)); !ip.IsUnspecified() && !slices.Contains(l.IPs, ip) {
							l.IPs = append(l.IPs, ip)
						}
					}
				}
			}
			links[id] = l
		}
	}
	return links
}
