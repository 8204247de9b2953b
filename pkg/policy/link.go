package policy

import (
	"net/netip"
	"strings"

	"github.com/podwall/podwall/pkg/ruleset"
)

// The chains of an endpoint's host veth. Dispatch by address holds only as long as addresses are true, and it sees nothing of
// what is not addressed to a registered address (link-local, broadcast, multicast): isolation covers the pod, not its IPs.
//
// A routed veth has its chain in the inet table. On a bridge port, frames that are not IP pass by that table, so its chains
// are in the netdev companion.

var (
	linkLocal   = netip.MustParsePrefix("fe80::/10")
	multicast4  = netip.MustParsePrefix("224.0.0.0/4")
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
	t := r.table
	if e.Bridge != "" {
		t = r.device
		if len(t.Sets) == 0 {
			addICMPv6Sets(t)
		}
	}
	c := &ruleset.Chain{Name: prefix + e.ID, Hook: &ruleset.Hook{Name: hook, Priority: priorityDevice, Device: e.Link}}
	t.Chains[c.Name] = c
	return c
}

// closedLink lets nothing through but what keeps IPv6 addresses alive.
func (r *renderer) closedLink(e *Endpoint) {
	r.isolateLink(e)
	if c := r.linkChain(e, prefixSource, "ingress"); c != nil {
		// The addresses are for Links: everything is dropped, but the next start may have nothing else to know them by.
		c.Rules = append(passICMPv6(), dropRule(notOwn(e, ruleset.IPSaddr)...), dropRule(notOwn(e, ruleset.IP6Saddr)...),
			dropRule().WithComment(e.Name+" quarantine"))
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
	rules := []ruleset.Rule{
		dropRule(ruleset.Equal(ruleset.ICMPv6Type, routerAdvertisement)).WithComment(e.Name),
		dropRule(ruleset.Equal(ruleset.ICMPv6Type, redirect)),
		ruleset.NewRule(ruleset.Address(ruleset.IPSaddr, netip.IPv4Unspecified()), ruleset.Address(ruleset.IPDaddr, broadcast), udp, ruleset.Equal16(ruleset.Sport, 68), ruleset.Equal16(ruleset.Dport, 67), accept),
	}
	if e.Bridge != "" {
		rules = append(rules, dropRule(
			ruleset.Not(ruleset.Equal16(ruleset.EtherType, ruleset.EtherIPv4)),
			ruleset.Not(ruleset.Equal16(ruleset.EtherType, ruleset.EtherIPv6)),
			ruleset.Not(ruleset.Equal16(ruleset.EtherType, ruleset.EtherARP))))
	}
	rules = append(rules, dropRule(notOwn(e, ruleset.IPSaddr)...))
	rules = append(rules, passICMPv6()...)
	if isolated {
		return append(rules,
			dropRule(notOwn(e, ruleset.IP6Saddr)...),
			dropRule(ruleset.Prefix{Field: ruleset.IPDaddr, Prefix: multicast4}),
			dropRule(ruleset.Address(ruleset.IPDaddr, broadcast)),
			dropRule(ruleset.Prefix{Field: ruleset.IP6Daddr, Prefix: multicast6}))
	}
	others := append(notOwn(e, ruleset.IP6Saddr), ruleset.Prefix{Field: ruleset.IP6Saddr, Not: true, Prefix: linkLocal})
	return append(rules, dropRule(others...))
}

// deliverRules close a bridge port for what is not addressed to the pod's own addresses. Frames from the node itself, and
// what it routes, have packet type host there; what the bridge forwards keeps the type it was received with. A pod may hand
// the router what it must not send itself, but a router never forwards a link-local source: such a frame is the node's own.
func deliverRules(e *Endpoint) []ruleset.Rule {
	rules := []ruleset.Rule{ruleset.NewRule(ruleset.Equal(ruleset.PktType, ruleset.PktHost), ruleset.Prefix{Field: ruleset.IP6Saddr, Prefix: linkLocal}, accept).WithComment(e.Name)}
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

// Quarantined is the verdict of a closed endpoint's addresses in the verdict maps.
var Quarantined = ruleset.To(ruleset.Goto, chainQuarantine)

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
						ip, _ := netip.AddrFromSlice([]byte(m.Value))
						l.IPs = append(l.IPs, ip)
					}
				}
			}
			links[id] = l
		}
	}
	return links
}
