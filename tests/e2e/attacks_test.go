package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
)

// attempts is how often each frame of an attack is sent.
const attempts = 20

// attack is one thing that a pod tries, with frames that its target must not get. What passes all the same is in the list as well:
// it shows that the rest is not dropped for another reason.
type attack struct {
	name    string
	packets []volley
}

// volley is a packet that may take several frames.
type volley struct {
	from, to string
	passes   bool
	frames   func(marker string) [][]byte
}

func single(f func(marker string) []byte) func(string) [][]byte {
	return func(marker string) [][]byte { return [][]byte{f(marker)} }
}

// count sends every packet of the attack so many times and returns, of those that must not pass and of those that must, how many were
// sent and how many have reached their target.
func (s *battleground) count(t *testing.T, round string, a attack) (tally, tally) {
	t.Helper()
	var denied, allowed tally
	type sent struct {
		volley int
		marker string
		sum    *tally
	}
	var all []sent
	taps := map[string]*tap{}
	for i, p := range a.packets {
		if taps[p.to] == nil {
			taps[p.to] = s.openTap(t, p.to)
		}
		sum := &denied
		if p.passes {
			sum = &allowed
		}
		err := s.hosts[p.from].In(func() error {
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			for n := range attempts {
				marker := fmt.Sprintf("<%s/%d/%d>", round, i, n)
				for _, f := range p.frames(marker) {
					if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: s.links[p.from].Index}); err != nil {
						return err
					}
				}
				sum.sent++
				all = append(all, sent{i, marker, sum})
			}
			return nil
		})
		if err != nil {
			t.Fatalf("send %s of %s: %v", a.name, p.from, err)
		}
	}
	deadline := time.Now().Add(changeTimeout)
	late := 200 * time.Millisecond // what comes later than the last that may come
	for {
		denied.received, allowed.received = 0, 0
		for _, m := range all {
			if taps[a.packets[m.volley].to].has(t, m.marker) {
				m.sum.received++
			}
		}
		if round == control && denied.received < denied.sent || allowed.received < allowed.sent {
			if time.Now().Before(deadline) {
				time.Sleep(20 * time.Millisecond)
				continue
			}
			return denied, allowed
		}
		if late == 0 {
			return denied, allowed
		}
		time.Sleep(late)
		late = 0
	}
}

// openTap listens where a host's own stack gets its packets: at the node that is the bridge, behind the rules of its ports.
func (s *battleground) openTap(t *testing.T, name string) *tap {
	t.Helper()
	p := openTap(t, s.hosts[name])
	if name == testnet.NodeName {
		bridge := linkNamed(t, s.Host, s.bridgeName(t))
		all := uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8)
		if err := unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: bridge.Index}); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func (s *battleground) bridgeName(t *testing.T) string {
	t.Helper()
	return hostLink(t, s.Node, s.Pod("default/"+attacker)).Master
}

// tally is what was sent and how much of it has arrived.
type tally struct{ sent, received int }

// Rounds of an attack: what podwall does, and what happens without its tables.
const (
	defended = "defended"
	control  = "control"
)

// TestAttacks counts, for everything that a hostile pod can put on its wire, what its target gets with podwall and without.
func TestAttacks(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			s := newBattleground(t, cni)
			attacks := slices.Concat(known(s), tags(s), hiddenPorts(s), neighbourMessages(s), selfAddressed(s))
			if s.bridge {
				attacks = slices.Concat(attacks, lengths(s), arps(s), forgedMACs(s))
			}
			before := map[string]tally{}
			for _, a := range attacks {
				denied, allowed := s.count(t, defended, a)
				before[a.name] = denied
				if denied.received > 0 {
					t.Errorf("%s: %d of %d packets have arrived", a.name, denied.received, denied.sent)
				}
				if allowed.received < allowed.sent {
					t.Errorf("%s: %d of %d packets that may pass have arrived", a.name, allowed.received, allowed.sent)
				}
			}
			if err := s.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			deleteTables(t, s.Node)
			for _, a := range attacks {
				after, _ := s.count(t, control, a)
				s.report(t, a.name, before[a.name], after)
			}
		})
	}
}

// report writes the attack's line. A control that sees nothing would make the attack's zero worthless.
func (s *battleground) report(t *testing.T, name string, before, after tally) {
	t.Helper()
	kind := "routed"
	if s.bridge {
		kind = "bridged"
	}
	line := fmt.Sprintf("%s %s: sent %d received %d, control received %d", name, kind, before.sent, before.received, after.received)
	t.Attr("report", line)
	if after.received == 0 {
		t.Errorf("%s: the control sees nothing either", line)
	}
}

// known are the packets of TestHostilePackets that must not arrive.
func known(s *battleground) []attack {
	lists := map[string][]packet{
		"forged sources": forgedSources(s.segment), "unicast multicast listener messages": multicastListener(s.segment),
		"DHCP ports": dhcp(s.segment), "router advertisement and redirect": routers(s.segment),
	}
	if s.bridge {
		lists["addresses that CNI did not report"] = unregisteredAddresses(s.segment)
		lists["broadcast and multicast"] = broadcasts(s.segment)
		lists["VLAN tags and other ethertypes"] = etherTypes(s.segment)
	}
	var list []attack
	for name, packets := range lists {
		a := attack{name: name}
		for _, p := range packets {
			a.packets = append(a.packets, volley{p.from, p.to, p.passes, single(p.frame)})
		}
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b attack) int { return strings.Compare(a.name, b.name) })
	return list
}

// guard may be reached on UDP port 53 only, and porter may reach others there only.
const (
	guard  = "guard"
	porter = "porter"
)

// battleground is a segment with what the attacks are aimed at.
type battleground struct {
	*segment
	gateway4  netip.Addr
	gateways6 []netip.Addr // also the link-local one
}

func newBattleground(t *testing.T, cni string) *battleground {
	t.Helper()
	s := &battleground{segment: newSegment(t, cni)}
	addServers(t, s)
	if !s.bridge {
		return s
	}
	s.hosts[testnet.NodeName] = s.Host
	for _, a := range linkNamed(t, s.Host, s.bridgeName(t)).Addrs {
		if a.Local.Is4() {
			s.gateway4 = a.Local
		} else {
			s.gateways6 = append(s.gateways6, a.Local)
		}
	}
	if !s.gateway4.IsValid() || len(s.gateways6) != 2 {
		t.Fatalf("the bridge has the addresses %s and %s, want one of IPv4, one of IPv6 and a link-local one", s.gateway4, s.gateways6)
	}
	return s
}

// addServers adds the pods whose policies have ports.
func addServers(t *testing.T, s *battleground) {
	t.Helper()
	err := s.WriteManifest("ports.yaml", podManifest("default", guard, "app: guard")+podManifest("default", porter, "app: porter")+
		policyManifest("default", guard, "{podSelector: {matchLabels: {app: guard}}, ingress: [{ports: [{protocol: UDP, port: 53}]}]}")+
		policyManifest("default", porter, "{podSelector: {matchLabels: {app: porter}}, policyTypes: [Egress], egress: [{ports: [{protocol: UDP, port: 53}]}]}"))
	if err != nil {
		t.Fatal(err)
	}
	poll(t, "the policies are known", func() bool {
		out, err := s.Podwalld(t.Context(), "policies")
		return err == nil && strings.Contains(out, porter)
	})
	for _, name := range []string{guard, porter} {
		s.join(t, name, add(t, s.Node, "default", name))
	}
}

// join makes a pod one of the segment's hosts.
func (s *battleground) join(t *testing.T, name string, pod *testnet.Pod) {
	t.Helper()
	router := hostLink(t, s.Node, pod)
	if s.bridge {
		router = linkNamed(t, s.Host, router.Master)
	}
	s.hosts[name], s.router[name], s.links[name] = pod.Host, parseMAC(t, router), linkNamed(t, pod.Host, "eth0")
}

// tags hide a forged packet behind VLAN tags. A tag of VLAN 0 is a priority, which the kernel takes off, however many there are.
func tags(s *battleground) []attack {
	var list []attack
	for _, tag := range []struct {
		name   string
		header []uint16
	}{
		{"priority tag", []uint16{unix.ETH_P_8021Q, 0}},
		{"two priority tags", []uint16{unix.ETH_P_8021Q, 0, unix.ETH_P_8021Q, 0}},
		{"three priority tags", []uint16{unix.ETH_P_8021Q, 0, unix.ETH_P_8021Q, 0, unix.ETH_P_8021Q, 0}},
		{"802.1ad and 802.1Q priority tags", []uint16{unix.ETH_P_8021AD, 0, unix.ETH_P_8021Q, 0}},
	} {
		a := attack{name: "forged source in " + tag.name}
		for _, f := range s.Families {
			src, dst := netip.AddrPortFrom(s.hosts[friend].Addrs[f], 7501), netip.AddrPortFrom(s.hosts[closed].Addrs[f], 80)
			plain := s.udp(attacker, closed, src, dst)
			a.packets = append(a.packets, volley{attacker, closed, false, single(func(marker string) []byte {
				frame := plain(marker)
				var header []byte
				for _, v := range tag.header {
					header = append(header, byte(v>>8), byte(v))
				}
				return slices.Concat(frame[:12], header, frame[12:])
			})})
		}
		list = append(list, a)
	}
	return list
}

// hiddenPorts are datagrams to a port that policy denies, with the port where a look at a single frame does not find it, and the same
// to the port that it allows.
func hiddenPorts(s *battleground) []attack {
	fragments, extensions := attack{name: "ports hidden in fragments"}, attack{name: "ports behind extension headers"}
	id := uint32(0)
	for _, e := range []struct{ from, to string }{{attacker, guard}, {porter, other}} {
		mac := s.nextHop(e.from, e.to)
		for _, f := range s.Families {
			src, dst := s.hosts[e.from].Addrs[f], s.hosts[e.to].Addrs[f]
			datagram := func(port uint16, body string) []byte {
				return udpDatagram(netip.AddrPortFrom(src, 7601), netip.AddrPortFrom(dst, port), body)
			}
			part := func(proto byte, offset int, more bool, part []byte) []byte {
				if src.Is4() {
					return frame(mac, s.mac(e.from), unix.ETH_P_IP, ip4Fragment(src, dst, proto, uint16(id), offset, more, part))
				}
				return frame(mac, s.mac(e.from), unix.ETH_P_IPV6, ip6Fragment(src, dst, proto, id, offset, more, part))
			}
			add := func(a *attack, passes bool, frames func(marker string) [][]byte) {
				a.packets = append(a.packets, volley{e.from, e.to, passes, func(marker string) [][]byte {
					id++
					return frames(marker)
				}})
			}
			const denied, allowed = 9999, 53
			for _, port := range []uint16{denied, allowed} {
				inTwo := func(marker string) [][]byte {
					d := datagram(port, marker)
					return [][]byte{part(unix.IPPROTO_UDP, 0, true, d[:8]), part(unix.IPPROTO_UDP, 8, false, d[8:])}
				}
				add(&fragments, port == allowed, inTwo)
				add(&fragments, port == allowed, func(marker string) [][]byte {
					frames := inTwo(marker)
					slices.Reverse(frames)
					return frames
				})
			}
			add(&fragments, false, func(marker string) [][]byte { // nobody sees a port
				return [][]byte{part(unix.IPPROTO_UDP, 8, false, []byte(marker))}
			})
			add(&fragments, false, func(marker string) [][]byte { // two that overlap have each a port (RFC 5722)
				good, bad := datagram(allowed, marker), datagram(denied, marker)
				return [][]byte{part(unix.IPPROTO_UDP, 0, true, good[:8]), part(unix.IPPROTO_UDP, 0, true, bad[:16]), part(unix.IPPROTO_UDP, 16, false, append(bad[16:], marker...))}
			})
			add(&fragments, false, func(marker string) [][]byte { // its flags are in the next
				segment := slices.Concat(datagram(denied, "")[:4], []byte{0, 0, 0, 1, 0, 0, 0, 0, 0x50, byte(2), 0xff, 0xff, 0, 0, 0, 0}, []byte(marker))
				return [][]byte{part(unix.IPPROTO_TCP, 0, true, segment[:8]), part(unix.IPPROTO_TCP, 8, false, segment[8:])}
			})
			if src.Is4() {
				continue
			}
			add(&fragments, false, func(marker string) [][]byte { // of one fragment (RFC 6946)
				return [][]byte{part(unix.IPPROTO_UDP, 0, false, datagram(denied, marker))}
			})
			add(&fragments, false, func(marker string) [][]byte { // all of the first is a header of its own (RFC 7112)
				d := append([]byte{unix.IPPROTO_UDP, 0, 1, 4, 0, 0, 0, 0}, datagram(denied, marker)...)
				return [][]byte{part(unix.IPPROTO_DSTOPTS, 0, true, d[:8]), part(unix.IPPROTO_DSTOPTS, 8, false, d[8:])}
			})
			for _, headers := range [][]byte{
				{unix.IPPROTO_HOPOPTS},
				{unix.IPPROTO_DSTOPTS},
				{unix.IPPROTO_ROUTING},
				{unix.IPPROTO_AH},
				{unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS},
			} {
				for _, port := range []uint16{denied, allowed} {
					// A rule about UDP does not look behind AH (nft_set_pktinfo_ipv6).
					add(&extensions, port == allowed && headers[0] != unix.IPPROTO_AH, func(marker string) [][]byte {
						return [][]byte{frame(mac, s.mac(e.from), unix.ETH_P_IPV6, ip6Packet(src, dst, headers[0], 64, behind(headers, unix.IPPROTO_UDP, datagram(port, marker))))}
					})
				}
			}
		}
	}
	return []attack{fragments, extensions}
}

// neighbourMessages are neighbour discovery that claims what is not the pod's, and what only a router may say, also where a rule may
// not find its type: with a wrong checksum or hop limit, behind a header, in a fragment.
func neighbourMessages(s *battleground) []attack {
	forms := attack{name: "router messages in odd forms"}
	src, dst, hopLimit := s.v6(attacker), s.v6(other), byte(64)
	if s.bridge {
		src, dst, hopLimit = s.links[attacker].linkLocal(), s.links[other].linkLocal(), 255
	}
	send := func(list *attack, from, to string, passes bool, packet func(marker string) []byte) {
		list.packets = append(list.packets, volley{from, to, passes, single(func(marker string) []byte {
			return frame(s.nextHop(from, to), s.mac(from), unix.ETH_P_IPV6, packet(marker))
		})})
	}
	for _, kind := range routerMessages {
		message := func(marker string) []byte {
			return icmp6Message(src, dst, kind, netip.IPv6Unspecified(), []byte(marker))
		}
		for _, hops := range []byte{hopLimit, 64, 2} {
			send(&forms, attacker, other, false, func(marker string) []byte { return ip6Packet(src, dst, unix.IPPROTO_ICMPV6, hops, message(marker)) })
		}
		send(&forms, attacker, other, false, func(marker string) []byte {
			m := message(marker)
			m[2]++ // the checksum
			return ip6Packet(src, dst, unix.IPPROTO_ICMPV6, hopLimit, m)
		})
		for _, headers := range [][]byte{{unix.IPPROTO_DSTOPTS}, {unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS}, {unix.IPPROTO_ROUTING}} {
			send(&forms, attacker, other, false, func(marker string) []byte {
				return ip6Packet(src, dst, headers[0], hopLimit, behind(headers, unix.IPPROTO_ICMPV6, message(marker)))
			})
		}
		send(&forms, attacker, other, false, func(marker string) []byte {
			return ip6Packet(src, dst, unix.IPPROTO_FRAGMENT, hopLimit, slices.Concat([]byte{unix.IPPROTO_ICMPV6, 0, 0, 0, 0, 0, 0, 9}, message(marker)))
		})
	}
	if !s.bridge {
		return []attack{forms}
	}

	claims := attack{name: "neighbour discovery that claims others' addresses"}
	for _, p := range []struct{ from, to string }{{attacker, other}, {mute, other}, {attacker, closed}} {
		own, local := s.v6(p.from), s.links[p.from].linkLocal()
		to := s.v6(p.to)
		message := func(passes bool, src netip.Addr, kind ipv6.ICMPType, target netip.Addr) {
			send(&claims, p.from, p.to, passes, func(marker string) []byte {
				return ip6Packet(src, to, unix.IPPROTO_ICMPV6, 255, icmp6Message(src, to, kind, target, linkLayerOption(kind, s.mac(p.from)), []byte(marker)))
			})
		}
		message(true, own, ipv6.ICMPTypeNeighborAdvertisement, own)
		message(true, local, ipv6.ICMPTypeNeighborAdvertisement, local)
		message(true, own, ipv6.ICMPTypeNeighborSolicitation, to)
		for _, claimed := range append(slices.Clone(s.gateways6), s.v6(friend)) {
			message(false, own, ipv6.ICMPTypeNeighborAdvertisement, claimed)
			message(false, local, ipv6.ICMPTypeNeighborAdvertisement, claimed)
			message(false, claimed, ipv6.ICMPTypeNeighborAdvertisement, claimed)
			message(false, claimed, ipv6.ICMPTypeNeighborSolicitation, to)
			message(false, claimed, ipv6.ICMPTypeRouterSolicitation, to)
		}
	}
	return []attack{forms, claims}
}

// selfAddressed are packets that claim to be from the pod that they are for, which the pod's own chains let in.
func selfAddressed(s *battleground) []attack {
	uplink, neighbour := attack{name: "self-addressed from the uplink"}, attack{name: "self-addressed from a neighbour"}
	for _, f := range s.Families {
		ip := func(name string) netip.AddrPort { return netip.AddrPortFrom(s.hosts[name].Addrs[f], 7701) }
		for _, p := range []struct {
			as     string
			passes bool
			to     string
		}{{closed, false, closed}, {testnet.External, true, other}} {
			uplink.packets = append(uplink.packets, volley{testnet.External, p.to, p.passes, single(s.udpVia(s.router[testnet.External], testnet.External, ip(p.as), ip(p.to)))})
		}
		neighbour.packets = append(neighbour.packets, volley{attacker, closed, false, single(s.udp(attacker, closed, ip(closed), ip(closed)))})
	}
	return []attack{uplink, neighbour}
}

// lengths are frames of IEEE 802.3, with a length in the place of the type, and types that a bridge hands on without looking.
func lengths(s *battleground) []attack {
	llc, types := attack{name: "LLC and SNAP frames"}, attack{name: "IP and oddities in other ethertypes"}
	src, dst := netip.AddrPortFrom(s.v4(attacker), 7801), netip.AddrPortFrom(s.v4(other), 80)
	inner := func(marker string) []byte { return ip4Packet(src.Addr(), dst.Addr(), udpDatagram(src, dst, marker)) }
	inner6 := func(marker string) []byte {
		a, b := netip.AddrPortFrom(s.v6(attacker), 7801), netip.AddrPortFrom(s.v6(other), 80)
		return ip6Packet(a.Addr(), b.Addr(), unix.IPPROTO_UDP, 64, udpDatagram(a, b, marker))
	}
	spanningTree := net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 0}
	add := func(a *attack, mac net.HardwareAddr, etherType func(payload []byte) int, payload func(string) []byte) {
		a.packets = append(a.packets, volley{attacker, other, false, single(func(marker string) []byte {
			p := payload(marker)
			return frame(mac, s.mac(attacker), etherType(p), p)
		})})
	}
	length := func(p []byte) int { return len(p) }
	add(&llc, s.mac(other), length, func(m string) []byte { return append([]byte{0xaa, 0xaa, 3, 0, 0, 0, 8, 0}, inner(m)...) })
	add(&llc, s.mac(other), length, func(m string) []byte { return append([]byte{0xaa, 0xaa, 3, 0, 0, 0, 0x86, 0xdd}, inner6(m)...) })
	add(&llc, s.mac(other), length, func(m string) []byte { return append([]byte{6, 6, 3}, inner(m)...) }) // IP in LLC (RFC 948)
	add(&llc, broadcastMAC, length, func(m string) []byte { return append([]byte{0xff, 0xff}, m+strings.Repeat(" ", 46)...) })
	add(&llc, spanningTree, length, func(m string) []byte { return append([]byte{0x42, 0x42, 3, 0, 0, 0, 0}, m+strings.Repeat(" ", 46)...) })
	add(&llc, s.mac(other), func([]byte) int { return 1500 }, func(m string) []byte { return append([]byte{0xaa, 0xaa, 3, 0, 0, 0, 8, 0}, inner(m)...) })
	for _, etherType := range []int{0x8870 /* jumbo frames */, 0x0800 - 1, 0x0600, 0x05ff, 0x8035 /* RARP */, 0x9000 /* loopback */, 0x22f0, 0x88b6, 0xffff} {
		add(&types, s.mac(other), func([]byte) int { return etherType }, inner)
		add(&types, s.mac(other), func([]byte) int { return etherType }, inner6)
	}
	return []attack{llc, types}
}

// arps are messages that teach their receivers a wrong neighbour, as replies, requests and announcements.
func arps(s *battleground) []attack {
	claims, odd := attack{name: "ARP that claims others' addresses"}, attack{name: "ARP with odd lengths"}
	for _, p := range []struct{ from, to string }{{attacker, other}, {mute, other}, {attacker, closed}, {attacker, testnet.NodeName}} {
		mac, target := s.router[p.from], s.gateway4
		if p.to != testnet.NodeName {
			mac, target = s.mac(p.to), s.v4(p.to)
		}
		add := func(a *attack, passes bool, dst net.HardwareAddr, body func() []byte) {
			a.packets = append(a.packets, volley{p.from, p.to, passes, single(func(marker string) []byte {
				return frame(dst, s.mac(p.from), unix.ETH_P_ARP, body(), []byte(marker))
			})})
		}
		message := func(operation byte, sender, target netip.Addr) func() []byte {
			return func() []byte {
				m := arpRequest(s.mac(p.from), sender, target)
				m[7] = operation
				return m
			}
		}
		const request, reply = 1, 2
		add(&claims, true, mac, message(reply, s.v4(p.from), target))
		add(&claims, true, broadcastMAC, message(request, s.v4(p.from), target))
		for _, claimed := range []netip.Addr{s.v4(friend), s.gateway4, s.v4(testnet.External)} {
			add(&claims, false, mac, message(reply, claimed, target))
			add(&claims, false, broadcastMAC, message(reply, claimed, claimed))
			add(&claims, false, mac, message(request, claimed, target))
			add(&claims, false, broadcastMAC, message(request, claimed, claimed))
			for _, change := range []struct{ at, value byte }{{1, 6}, {2, 0x86}, {4, 8}, {4, 0}, {5, 16}, {5, 0}} {
				add(&odd, false, mac, func() []byte {
					m := message(reply, claimed, target)()
					m[change.at] = change.value
					return m
				})
			}
		}
	}
	return []attack{claims, odd}
}

// forgedMACs are from the hardware addresses of a pod that may send there, and of the router.
func forgedMACs(s *battleground) []attack {
	a := attack{name: "forged MAC addresses"}
	for _, mac := range []net.HardwareAddr{s.mac(friend), s.router[attacker]} {
		for _, f := range s.Families {
			for _, source := range []string{attacker, friend} {
				datagram := s.udp(attacker, closed, netip.AddrPortFrom(s.hosts[source].Addrs[f], 7901), netip.AddrPortFrom(s.hosts[closed].Addrs[f], 80))
				a.packets = append(a.packets, volley{attacker, closed, false, single(func(marker string) []byte {
					frame := datagram(marker)
					copy(frame[6:], mac)
					return frame
				})})
			}
		}
	}
	return []attack{a}
}
