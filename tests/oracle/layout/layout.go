// Package layout is the node that random cases are laid on: its pods' places, and the addresses of everybody else. The
// differential tests in memory and in the kernel share it, so that a case found by one can be run by the other.
//
// A node has four routed places (ptp) and four on a bridge, all dual stack. A place keeps its addresses and its veth; pods
// come to it and go.
package layout

import (
	"fmt"
	"net/netip"
)

// Names on the node.
const (
	NodeName = "here"
	Bridge   = "br0"
	Uplink   = "up0" // to everybody who is not on the node
)

// Place is where a local pod can be.
type Place struct {
	Index  int
	Link   string       // host veth
	Bridge string       // empty when the link is routed
	IPs    []netip.Addr // IPv4, IPv6
}

// Places of the node: 0 to 3 are routed, 4 to 7 are ports of the bridge.
var Places = places()

// Addresses of others, IPv4 and IPv6 in turn.
var (
	// RemotePods can be given to pods of other nodes.
	RemotePods = addrs("10.244.2.10", "fd00:10:244:2::a", "10.244.2.11", "fd00:10:244:2::b", "10.244.2.12", "fd00:10:244:2::c",
		"10.244.3.10", "fd00:10:244:3::a")
	// Outside are hosts and other nodes.
	Outside = addrs("172.18.0.3", "fd00:172:18::3", "192.0.2.1", "2001:db8::1", "192.0.2.200", "2001:db8:0:8000::1", "10.0.0.9", "2001:db8:ffff::9")
	// Node are the node's own: of the uplink, and of the bridge.
	Node = addrs("172.18.0.2", "fd00:172:18::2", "10.244.1.1", "fd00:10:244:1::1")
)

// PlaceOf returns the place that has an address.
func PlaceOf(ip netip.Addr) (Place, bool) {
	for _, p := range Places {
		if p.IPs[0] == ip || p.IPs[1] == ip {
			return p, true
		}
	}
	return Place{}, false
}

func places() []Place {
	var list []Place
	for i := range 8 {
		p := Place{Index: i, Link: fmt.Sprintf("veth%d", i)}
		net := 0
		if i >= 4 {
			p.Bridge, net = Bridge, 1
		}
		p.IPs = addrs(fmt.Sprintf("10.244.%d.%d", net, 10+i), fmt.Sprintf("fd00:10:244:%d::%x", net, 10+i))
		list = append(list, p)
	}
	return list
}

func addrs(text ...string) []netip.Addr {
	var list []netip.Addr
	for _, s := range text {
		list = append(list, netip.MustParseAddr(s))
	}
	return list
}
