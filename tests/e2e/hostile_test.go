package e2e

import (
	"encoding/binary"
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

// The pods of a segment. Policies say who is isolated; every other pod is open.
const (
	attacker = "attacker"
	friend   = "friend" // the only one that may reach closed
	closed   = "closed" // isolated for ingress
	mute     = "mute"   // isolated for egress
	other    = "other"
)

var segmentManifests = map[string]string{
	"pods.yaml": podManifest("default", attacker, "app: attacker") + podManifest("default", friend, "app: friend") +
		podManifest("default", closed, "app: closed") + podManifest("default", mute, "app: mute") + podManifest("default", other, "app: other"),
	"policy.yaml": policyManifest("default", closed, "{podSelector: {matchLabels: {app: closed}}, ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]}") +
		policyManifest("default", mute, "{podSelector: {matchLabels: {app: mute}}, policyTypes: [Egress]}"),
}

// Addresses that pods have given themselves, as SLAAC does.
var selfAssigned = map[string]netip.Addr{closed: netip.MustParseAddr("fd00:10:244:1::abcd"), other: netip.MustParseAddr("fd00:10:244:1::abce")}

var (
	allNodes        = netip.MustParseAddr("ff02::1")
	allHosts        = netip.MustParseAddr("224.0.0.1")
	limited         = netip.MustParseAddr("255.255.255.255")
	directed        = netip.MustParseAddr("10.244.1.255") // the broadcast address of testnet.PodRanges
	broadcastMAC    = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	allNodesMAC     = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
	allHostsMAC     = net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}
	routerMessages  = []ipv6.ICMPType{ipv6.ICMPTypeRouterAdvertisement, ipv6.ICMPTypeRedirect}
	listenerReports = []ipv6.ICMPType{ipv6.ICMPTypeMulticastListenerQuery, ipv6.ICMPTypeVersion2MulticastListenerReport}
)

// packet is a frame that a host writes to its wire itself, whatever its own stack would have made of it.
type packet struct {
	name     string
	from, to string
	passes   bool
	frame    func(marker string) []byte
}

// segment is a node whose pods send such frames.
type segment struct {
	*testnet.Node
	hosts  map[string]*testnet.Host
	links  map[string]link             // the hosts' own
	router map[string]net.HardwareAddr // who forwards for a host
	bridge bool
}

func newSegment(t *testing.T, cni string) *segment {
	t.Helper()
	s := &segment{
		Node:  start(t, setup{cni: cni, manifests: segmentManifests}),
		hosts: map[string]*testnet.Host{}, links: map[string]link{}, router: map[string]net.HardwareAddr{}, bridge: cni == "bridge",
	}
	// What is dropped is dropped by podwall: the node's own filter of forged sources is off.
	if _, err := s.Host.Run(t.Context(), "sysctl", "-w", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{attacker, friend, closed, mute, other} {
		pod := add(t, s.Node, "default", name)
		if address, ok := selfAssigned[name]; ok {
			if _, err := pod.Run(t.Context(), "ip", "addr", "add", address.String()+"/64", "dev", "eth0", "nodad"); err != nil {
				t.Fatal(err)
			}
		}
		router := hostLink(t, s.Node, pod)
		if s.bridge {
			router = linkNamed(t, s.Host, router.Master)
		}
		s.hosts[name], s.router[name] = pod.Host, parseMAC(t, router)
		if address, ok := selfAssigned[name]; ok && s.bridge {
			// podwall does not let the pod answer for an address that is not its own: the router has to know.
			if _, err := s.Host.Run(t.Context(), "ip", "neigh", "replace", address.String(), "lladdr", linkNamed(t, pod.Host, "eth0").MAC, "dev", router.Name, "nud", "permanent"); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.hosts[testnet.External] = s.Outside[testnet.External]
	s.router[testnet.External] = parseMAC(t, linkNamed(t, s.Host, testnet.External))
	for name, h := range s.hosts {
		s.links[name] = linkNamed(t, h, "eth0")
	}
	return s
}

func parseMAC(t *testing.T, l link) net.HardwareAddr {
	t.Helper()
	mac, err := net.ParseMAC(l.MAC)
	if err != nil {
		t.Fatal(err)
	}
	return mac
}

func (s *segment) v4(name string) netip.Addr { return s.hosts[name].Addrs[testnet.IPv4] }
func (s *segment) v6(name string) netip.Addr { return s.hosts[name].Addrs[testnet.IPv6] }

func (s *segment) mac(name string) net.HardwareAddr {
	mac, _ := net.ParseMAC(s.links[name].MAC)
	return mac
}

// nextHop is where a pod's frames for another pod go: there on a bridge, to the router otherwise.
func (s *segment) nextHop(from, to string) net.HardwareAddr {
	if s.bridge {
		return s.mac(to)
	}
	return s.router[from]
}

// udp is a datagram in a frame from one host to another.
func (s *segment) udp(from, to string, src, dst netip.AddrPort) func(string) []byte {
	return s.udpVia(s.nextHop(from, to), from, src, dst)
}

func (s *segment) udpVia(mac net.HardwareAddr, from string, src, dst netip.AddrPort) func(string) []byte {
	return func(marker string) []byte {
		datagram := udpDatagram(src, dst, marker)
		if src.Addr().Is4() {
			return frame(mac, s.mac(from), unix.ETH_P_IP, ip4Packet(src.Addr(), dst.Addr(), datagram))
		}
		return frame(mac, s.mac(from), unix.ETH_P_IPV6, ip6Packet(src.Addr(), dst.Addr(), unix.IPPROTO_UDP, 64, datagram))
	}
}

func (s *segment) icmp6(mac net.HardwareAddr, from string, src, dst netip.Addr, kind ipv6.ICMPType, hopLimit byte) func(string) []byte {
	return func(marker string) []byte {
		message := append([]byte{byte(kind), 0, 0, 0, 0, 0, 0, 0}, marker...)
		binary.BigEndian.PutUint16(message[2:], checksum(pseudoHeader(src, dst, unix.IPPROTO_ICMPV6, len(message)), message))
		return frame(mac, s.mac(from), unix.ETH_P_IPV6, ip6Packet(src, dst, unix.IPPROTO_ICMPV6, hopLimit, message))
	}
}

// TestHostilePackets holds that nothing that a pod can put on its wire gets around a policy, and that podwall is what stops it:
// without podwall's tables every one of these packets arrives.
func TestHostilePackets(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			s := newSegment(t, cni)
			packets := slices.Concat(forgedSources(s), multicastListener(s), dhcp(s), routers(s))
			if s.bridge {
				packets = slices.Concat(packets, unregisteredAddresses(s), broadcasts(s), etherTypes(s))
			}
			judgePackets(t, s, "enforced", packets)

			if err := s.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			deleteTables(t, s.Node)
			for i := range packets {
				packets[i].passes = true
			}
			judgePackets(t, s, "without podwall", packets)
		})
	}
}

// judgePackets sends every packet once and looks at its receiver for its marker.
func judgePackets(t *testing.T, s *segment, when string, packets []packet) {
	t.Helper()
	taps := map[string]*tap{}
	marker := func(p packet) string { return fmt.Sprintf("<%s: %s, %s to %s>", when, p.name, p.from, p.to) }
	for _, p := range packets {
		if taps[p.to] == nil {
			taps[p.to] = openTap(t, s.hosts[p.to])
		}
	}
	for _, p := range packets {
		err := s.hosts[p.from].In(func() error {
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			return unix.Sendto(fd, p.frame(marker(p)), 0, &unix.SockaddrLinklayer{Ifindex: s.links[p.from].Index})
		})
		if err != nil {
			t.Fatalf("send %s: %v", marker(p), err)
		}
	}
	deadline := time.Now().Add(changeTimeout)
	for _, p := range packets {
		for p.passes && !taps[p.to].has(t, marker(p)) {
			if time.Now().After(deadline) {
				t.Errorf("%s has not arrived", marker(p))
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	time.Sleep(200 * time.Millisecond) // for what comes later than the last that may come
	for _, p := range packets {
		if !p.passes && taps[p.to].has(t, marker(p)) {
			t.Errorf("%s has arrived", marker(p))
		}
	}
}

// deleteTables leaves the node's packets alone, which only works while there is no daemon. A table that nobody needed does not
// exist.
func deleteTables(t *testing.T, n *testnet.Node) {
	t.Helper()
	tables, err := n.Host.Run(t.Context(), "nft", "list", "tables")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(tables, "table inet podwall") {
		t.Fatalf("podwall has left no table: %s", tables)
	}
	for table := range strings.Lines(tables) {
		if !strings.HasSuffix(strings.TrimSpace(table), " podwall") {
			continue
		}
		if _, err := n.Host.Run(t.Context(), "nft", "delete "+strings.TrimSpace(table)); err != nil {
			t.Fatal(err)
		}
	}
}

// forgedSources take the name of a pod that is allowed, or of nobody.
func forgedSources(s *segment) []packet {
	var list []packet
	for _, f := range s.Families {
		ip := func(name string) netip.Addr { return s.hosts[name].Addrs[f] }
		for i, p := range []struct {
			from, to, source string
			passes           bool
		}{
			{friend, closed, friend, true},
			{attacker, closed, attacker, false},
			{attacker, closed, friend, false},
			{attacker, other, attacker, true},
			{attacker, other, friend, false},
			{attacker, other, testnet.External, false},
			{mute, other, mute, false},
			{mute, other, friend, false},
		} {
			src, dst := netip.AddrPortFrom(ip(p.source), uint16(7001+i)), netip.AddrPortFrom(ip(p.to), 80)
			list = append(list, packet{fmt.Sprintf("%s as %s", f, p.source), p.from, p.to, p.passes, s.udp(p.from, p.to, src, dst)})
		}
	}
	return list
}

// multicastListener is what isolation leaves open of ICMPv6, since IPv6 does not work without: on multicast, and nowhere else.
func multicastListener(s *segment) []packet {
	hopLimit := byte(2) // the router takes one
	if s.bridge {
		hopLimit = 1
	}
	var list []packet
	for _, kind := range listenerReports {
		for _, p := range []struct {
			from, to string
			passes   bool
		}{{attacker, closed, false}, {mute, other, false}, {attacker, other, true}} {
			list = append(list, packet{
				fmt.Sprintf("unicast %s", kind), p.from, p.to, p.passes,
				s.icmp6(s.nextHop(p.from, p.to), p.from, s.v6(p.from), s.v6(p.to), kind, hopLimit),
			})
		}
	}
	if s.bridge {
		report, solicitation := ipv6.ICMPTypeVersion2MulticastListenerReport, ipv6.ICMPTypeNeighborSolicitation
		list = append(list,
			packet{"multicast listener report", mute, closed, true, s.icmp6(allNodesMAC, mute, s.links[mute].linkLocal(), allNodes, report, 1)},
			packet{"neighbour solicitation", mute, closed, true, s.icmp6(s.mac(closed), mute, s.v6(mute), s.v6(closed), solicitation, 255)})
	}
	return list
}

// dhcp passes as a broadcast, and as nothing that only has its ports.
func dhcp(s *segment) []packet {
	at := netip.AddrPortFrom
	list := []packet{
		{"unicast DHCP request", mute, other, false, s.udp(mute, other, at(s.v4(mute), 68), at(s.v4(other), 67))},
		{"unicast DHCP answer", attacker, closed, false, s.udp(attacker, closed, at(s.v4(attacker), 67), at(s.v4(closed), 68))},
		{"unicast DHCP answer", attacker, other, true, s.udp(attacker, other, at(s.v4(attacker), 67), at(s.v4(other), 68))},
	}
	if s.bridge {
		nobody := netip.IPv4Unspecified()
		list = append(list,
			packet{"unicast DHCP request without an address", mute, other, false, s.udp(mute, other, at(nobody, 68), at(s.v4(other), 67))},
			packet{"unicast DHCP request without an address", attacker, closed, false, s.udp(attacker, closed, at(nobody, 68), at(s.v4(closed), 67))},
			packet{"DHCP request", mute, other, true, s.udpVia(broadcastMAC, mute, at(nobody, 68), at(limited, 67))},
			packet{"DHCP answer", attacker, closed, true, s.udpVia(broadcastMAC, attacker, at(s.v4(attacker), 67), at(limited, 68))})
	}
	return list
}

// routers are what a pod is not, isolated or open: whoever believes it sends it all its packets.
func routers(s *segment) []packet {
	src, dst, hopLimit := s.v6(attacker), s.v6(other), byte(64)
	if s.bridge {
		src, dst, hopLimit = s.links[attacker].linkLocal(), s.links[other].linkLocal(), 255
	}
	message := func(kind ipv6.ICMPType, passes bool) packet {
		return packet{fmt.Sprint(kind), attacker, other, passes, s.icmp6(s.nextHop(attacker, other), attacker, src, dst, kind, hopLimit)}
	}
	list := []packet{message(ipv6.ICMPTypeNeighborSolicitation, true)}
	for _, kind := range routerMessages {
		list = append(list, message(kind, false))
	}
	return list
}

// unregisteredAddresses are a pod's addresses that CNI did not report. A frame may go to the pod or, with a source that the router
// forwards, to the router, which hands it on as its own.
func unregisteredAddresses(s *segment) []packet {
	at := netip.AddrPortFrom
	var list []packet
	for to, passes := range map[string]bool{closed: false, other: true} {
		local, self := at(s.links[to].linkLocal(), 80), at(selfAssigned[to], 80)
		list = append(list,
			packet{"link-local to link-local", attacker, to, passes, s.udp(attacker, to, at(s.links[attacker].linkLocal(), 7101), local)},
			packet{"global to link-local", attacker, to, passes, s.udp(attacker, to, at(s.v6(attacker), 7102), local)},
			packet{"global to link-local by the router", attacker, to, passes, s.udpVia(s.router[attacker], attacker, at(s.v6(attacker), 7103), local)},
			packet{"to a self-assigned address", attacker, to, passes, s.udp(attacker, to, at(s.v6(attacker), 7104), self)},
			packet{"to a self-assigned address by the router", attacker, to, passes, s.udpVia(s.router[attacker], attacker, at(s.v6(attacker), 7105), self)},
			packet{"to a self-assigned address", testnet.External, to, passes, s.udpVia(s.router[testnet.External], testnet.External, at(s.v6(testnet.External), 7106), self)})
	}
	return append(list,
		packet{"link-local to link-local", mute, other, false, s.udp(mute, other, at(s.links[mute].linkLocal(), 7107), at(s.links[other].linkLocal(), 80))},
		packet{"global to link-local", mute, other, false, s.udp(mute, other, at(s.v6(mute), 7108), at(s.links[other].linkLocal(), 80))},
		packet{"global to link-local by the router", mute, other, false, s.udpVia(s.router[mute], mute, at(s.v6(mute), 7109), at(s.links[other].linkLocal(), 80))})
}

// broadcasts reach open pods only, and from open pods only.
func broadcasts(s *segment) []packet {
	var list []packet
	for _, b := range []struct {
		name string
		mac  net.HardwareAddr
		to   netip.Addr
	}{
		{"limited broadcast", broadcastMAC, limited},
		{"directed broadcast", broadcastMAC, directed},
		{"IPv4 multicast", allHostsMAC, allHosts},
		{"IPv6 multicast", allNodesMAC, allNodes},
		{"unicast in a broadcast frame", broadcastMAC, s.v4(closed)},
	} {
		for i, p := range []struct {
			from, to string
			passes   bool
		}{{attacker, closed, false}, {attacker, other, true}, {mute, closed, false}, {mute, other, false}} {
			if b.to == s.v4(closed) && p.to != closed {
				continue
			}
			src := s.v4(p.from)
			if b.to.Is6() {
				src = s.v6(p.from)
			}
			list = append(list, packet{b.name, p.from, p.to, p.passes, s.udpVia(b.mac, p.from, netip.AddrPortFrom(src, uint16(7201+i)), netip.AddrPortFrom(b.to, 80))})
		}
	}
	return list
}

// etherTypes carry what no rule about addresses can judge: a bridge port takes IPv4, IPv6 and ARP.
func etherTypes(s *segment) []packet {
	src, dst := netip.AddrPortFrom(s.v4(attacker), 7301), netip.AddrPortFrom(s.v4(other), 80)
	inner := func(marker string) []byte { return ip4Packet(src.Addr(), dst.Addr(), udpDatagram(src, dst, marker)) }
	around := func(etherType int, header ...byte) func(string) []byte {
		return func(marker string) []byte {
			return frame(s.mac(other), s.mac(attacker), etherType, header, inner(marker))
		}
	}
	list := []packet{
		{"plain IPv4", attacker, other, true, around(unix.ETH_P_IP)},
		{"ARP", attacker, closed, true, func(marker string) []byte {
			return frame(s.mac(closed), s.mac(attacker), unix.ETH_P_ARP, arpRequest(s.mac(attacker), s.v4(attacker), s.v4(closed)), []byte(marker))
		}},
		{"LLC", attacker, other, false, func(marker string) []byte {
			payload := "\xaa\xaa\x03" + marker + strings.Repeat(" ", 46)
			return frame(s.mac(other), s.mac(attacker), len(payload), []byte(payload)) // IEEE 802.3: the length instead of a type
		}},
	}
	for name, f := range map[string]func(string) []byte{
		"VLAN":               around(unix.ETH_P_8021Q, 0, 1, 0x08, 0x00),
		"priority tag":       around(unix.ETH_P_8021Q, 0x20, 0, 0x08, 0x00),
		"VLAN in a VLAN":     around(unix.ETH_P_8021AD, 0, 1, 0x81, 0x00, 0, 1, 0x08, 0x00),
		"PPPoE":              around(unix.ETH_P_PPP_SES, 0x11, 0, 0, 1, 0, 100, 0, 0x21),
		"MPLS":               around(unix.ETH_P_MPLS_UC, 0, 1, 0x01, 64),
		"local experimental": around(0x88b5),
	} {
		list = append(list, packet{name, attacker, other, false, f})
	}
	return list
}

func frame(dst, src net.HardwareAddr, etherType int, payload ...[]byte) []byte {
	return append(binary.BigEndian.AppendUint16(slices.Concat(dst, src), uint16(etherType)), slices.Concat(payload...)...)
}

func arpRequest(mac net.HardwareAddr, sender, target netip.Addr) []byte {
	return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, 1}, mac, sender.AsSlice(), make([]byte, 6), target.AsSlice())
}

func ip4Packet(src, dst netip.Addr, datagram []byte) []byte {
	h := []byte{0x45, 0, 0, 0, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	h = slices.Concat(h, src.AsSlice(), dst.AsSlice())
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(datagram)))
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, datagram...)
}

func ip6Packet(src, dst netip.Addr, next, hopLimit byte, payload []byte) []byte {
	h := binary.BigEndian.AppendUint16([]byte{0x60, 0, 0, 0}, uint16(len(payload)))
	return slices.Concat(h, []byte{next, hopLimit}, src.AsSlice(), dst.AsSlice(), payload)
}

func udpDatagram(src, dst netip.AddrPort, body string) []byte {
	p := binary.BigEndian.AppendUint16(nil, src.Port())
	p = binary.BigEndian.AppendUint16(p, dst.Port())
	p = binary.BigEndian.AppendUint16(p, uint16(8+len(body)))
	p = append(append(p, 0, 0), body...)
	binary.BigEndian.PutUint16(p[6:], checksum(pseudoHeader(src.Addr(), dst.Addr(), unix.IPPROTO_UDP, len(p)), p))
	return p
}

// pseudoHeader is of RFC 768 and RFC 8200 section 8.1.
func pseudoHeader(src, dst netip.Addr, proto byte, size int) []byte {
	return append(binary.BigEndian.AppendUint32(slices.Concat(src.AsSlice(), dst.AsSlice()), uint32(size)), 0, 0, 0, proto)
}

// checksum is of RFC 1071. Every part but the last has an even length.
func checksum(parts ...[]byte) uint16 {
	data := slices.Concat(parts...)
	if len(data)%2 == 1 {
		data = append(data, 0)
	}
	var sum uint32
	for i := 0; i < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
