package e2e

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
)

// ground is a segment with pods and policies of a test's own, on which packets are fired by the thousand. Nothing but podwall drops
// them: the node filters no sources, knows every pod's link-layer address, and has External for a gateway to everywhere.
type ground struct {
	*segment
	senders map[string]int  // packet sockets, by host
	taps    map[string]*tap // by host
	arrived map[string]map[string]bool
	ports   uint16 // the last source port, less 10000
}

// newGround lays a node out with pods of the namespace default.
func newGround(t *testing.T, conf setup, pods ...string) *ground {
	t.Helper()
	g := &ground{
		segment: &segment{
			Node: start(t, conf), hosts: map[string]*testnet.Host{}, links: map[string]link{}, router: map[string]net.HardwareAddr{}, bridge: conf.cni == "bridge",
		},
		senders: map[string]int{}, taps: map[string]*tap{}, arrived: map[string]map[string]bool{},
	}
	g.run(t, g.Host, "sysctl", "-w", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0")
	for _, name := range pods {
		g.join(t, name, add(t, g.Node, "default", name))
	}
	gateway := g.Outside[testnet.External]
	g.hosts[testnet.External], g.links[testnet.External] = gateway, linkNamed(t, gateway, "eth0")
	g.router[testnet.External] = parseMAC(t, linkNamed(t, g.Host, testnet.External))
	for _, address := range gateway.Addrs {
		g.run(t, g.Host, "ip", "neigh", "replace", address.String(), "lladdr", g.links[testnet.External].MAC, "dev", testnet.External, "nud", "permanent")
		g.run(t, g.Host, "ip", "route", "add", "default", "via", address.String(), "dev", testnet.External, "onlink")
	}
	return g
}

func (g *ground) run(t *testing.T, h *testnet.Host, argv ...string) string {
	t.Helper()
	out, err := h.Run(t.Context(), argv...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// join makes a pod somebody who sends and receives under a name.
func (g *ground) join(t *testing.T, name string, pod *testnet.Pod) {
	t.Helper()
	router := hostLink(t, g.Node, pod)
	if g.bridge {
		router = linkNamed(t, g.Host, router.Master)
	}
	g.hosts[name], g.links[name], g.router[name] = pod.Host, linkNamed(t, pod.Host, "eth0"), parseMAC(t, router)
	for _, address := range pod.Addrs {
		g.run(t, g.Host, "ip", "neigh", "replace", address.String(), "lladdr", g.links[name].MAC, "dev", router.Name, "nud", "permanent")
	}
}

// shot is what one host writes to its wire, to reach another one or not. Its frames carry the token that tells it from all others.
type shot struct {
	name     string
	from, to string
	passes   bool
	frames   func(token string) [][]byte
}

// shot is one packet from an address to an address, whoever they belong to.
func (g *ground) shot(from, to string, proto byte, src, dst netip.AddrPort, passes bool) shot {
	return shot{
		name: fmt.Sprintf("%s %s -> %s", transports[proto].name, src, dst), from: from, to: to, passes: passes,
		frames: func(token string) [][]byte {
			return g.wrap(from, to, ipPacket(src.Addr(), dst.Addr(), proto, transports[proto].packet(src, dst, token)))
		},
	}
}

// shots are one packet in each family from one host to another, from a port that was not used before.
func (g *ground) shots(from, to string, proto byte, port uint16, passes bool) []shot {
	var list []shot
	for _, f := range g.Families {
		src, dst := netip.AddrPortFrom(g.hosts[from].Addrs[f], g.port()), netip.AddrPortFrom(g.hosts[to].Addrs[f], port)
		list = append(list, g.shot(from, to, proto, src, dst, passes))
	}
	return list
}

// port is another source port each time: an answer to an earlier packet would make this one established.
func (g *ground) port() uint16 {
	g.ports = (g.ports + 1) % 50000
	return 10000 + g.ports
}

// wrap gives packets the addresses of the link that they go out on.
func (g *ground) wrap(from, to string, packets ...[]byte) [][]byte {
	mac := g.router[from]
	if g.bridge && from != testnet.External && to != testnet.External {
		mac = g.mac(to)
	}
	list := make([][]byte, 0, len(packets))
	for _, p := range packets {
		etherType := unix.ETH_P_IP
		if p[0]>>4 == 6 {
			etherType = unix.ETH_P_IPV6
		}
		list = append(list, frame(mac, g.mac(from), etherType, p))
	}
	return list
}

const (
	tokenStart = "<shot "
	tokenSize  = 16 // even, as checksum wants it
)

var tokens atomic.Uint64

func newToken() string { return fmt.Sprintf("%s%09x>", tokenStart, tokens.Add(1)) }

// send writes frames to a host's wire.
func (g *ground) send(t *testing.T, from string, frames [][]byte) {
	t.Helper()
	fd, open := g.senders[from]
	if !open {
		err := g.hosts[from].In(func() error {
			var err error
			fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		g.senders[from] = fd
	}
	for _, f := range frames {
		if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: g.links[from].Index}); err != nil {
			t.Fatalf("send from %s: %v", from, err)
		}
	}
}

// watch begins to look at what a host is delivered.
func (g *ground) watch(t *testing.T, host string) {
	t.Helper()
	if g.taps[host] == nil {
		g.taps[host], g.arrived[host] = openTap(t, g.hosts[host]), map[string]bool{}
	}
}

// collect notes the tokens that have arrived.
func (g *ground) collect(t *testing.T) {
	t.Helper()
	for host, p := range g.taps {
		p.has(t, tokenStart)
		rest := string(p.seen)
		p.seen = nil
		for {
			i := strings.Index(rest, tokenStart)
			if i < 0 || len(rest) < i+tokenSize {
				break
			}
			g.arrived[host][rest[i:i+tokenSize]] = true
			rest = rest[i+tokenSize:]
		}
	}
}

// fire sends every shot once and judges all of them at their receivers.
func (g *ground) fire(t *testing.T, when string, list ...[]shot) {
	t.Helper()
	shots := slices.Concat(list...)
	byToken := make([]string, len(shots))
	allowed := 0
	for i, s := range shots {
		g.watch(t, s.to)
		byToken[i] = newToken()
		if s.passes {
			allowed++
		}
		g.send(t, s.from, s.frames(byToken[i]))
		if i%200 == 199 {
			time.Sleep(time.Millisecond) // a receiver's queue holds a thousand (net.core.netdev_max_backlog)
		}
	}
	wrong := func(passes bool) []shot {
		g.collect(t)
		var list []shot
		for i, s := range shots {
			if s.passes == passes && g.arrived[s.to][byToken[i]] != passes {
				list = append(list, s)
			}
		}
		return list
	}
	for deadline := time.Now().Add(2 * time.Second); len(wrong(true)) > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond) // for what comes later than the last that may come
	failures := append(wrong(true), wrong(false)...)
	for i, s := range failures {
		if i == 20 {
			t.Errorf("%s: and %d more of %d", when, len(failures)-i, len(shots))
			break
		}
		t.Errorf("%s: %s, %s to %s: arrived %t, want %t", when, s.name, s.from, s.to, !s.passes, s.passes)
	}
	t.Logf("%s: %d packets, %d allowed, %d denied, %d wrong", when, len(shots), allowed, len(shots)-allowed, len(failures))
}

// fireWithout is the control: without podwall's tables every one of these shots arrives. It is the last of a test.
func (g *ground) fireWithout(t *testing.T, list ...[]shot) {
	t.Helper()
	if err := g.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	deleteTables(t, g.Node)
	shots := slices.Concat(list...)
	for i := range shots {
		shots[i].passes = true
	}
	g.fire(t, "without podwall", shots)
}

// transports write a header and the token behind it.
var transports = map[byte]struct {
	name   string
	packet func(src, dst netip.AddrPort, token string) []byte
}{
	unix.IPPROTO_UDP:  {"udp", udpDatagram},
	unix.IPPROTO_TCP:  {"tcp", tcpSYN},
	unix.IPPROTO_SCTP: {"sctp", sctpAssociation},
}

// tcpSYN opens a connection. A SYN may carry data (RFC 9293 section 3.10.7.2).
func tcpSYN(src, dst netip.AddrPort, body string) []byte {
	p := binary.BigEndian.AppendUint16(nil, src.Port())
	p = binary.BigEndian.AppendUint16(p, dst.Port())
	p = append(p, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 2, 0xff, 0xff, 0, 0, 0, 0)
	p = append(p, body...)
	binary.BigEndian.PutUint16(p[16:], checksum(pseudoHeader(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, len(p)), p))
	return p
}

// sctpAssociation is an INIT with a parameter that nobody knows (RFC 9260 section 3.2.1: skip it).
func sctpAssociation(src, dst netip.AddrPort, body string) []byte {
	p := sctpInit(src.Port(), dst.Port())
	parameter := binary.BigEndian.AppendUint16([]byte{0x80, 0xff}, uint16(4+len(body)))
	p = append(append(p, parameter...), body...)
	binary.BigEndian.PutUint16(p[14:], uint16(len(p)-12))
	sumSCTP(p)
	return p
}

func sumSCTP(p []byte) {
	clear(p[8:12])
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
}

// ipPacket is a packet of the addresses' family.
func ipPacket(src, dst netip.Addr, proto byte, payload []byte) []byte {
	if src.Is6() {
		return ip6Packet(src, dst, proto, 64, payload)
	}
	return fragment(src, dst, proto, 0, 0, false, payload)
}

// fragment is one piece of a packet, at an offset that is a multiple of eight (RFC 791; RFC 8200 section 4.5).
func fragment(src, dst netip.Addr, proto byte, id uint16, offset int, more bool, payload []byte) []byte {
	if src.Is6() {
		field := uint16(offset)
		if more {
			field |= 1
		}
		header := binary.BigEndian.AppendUint16([]byte{proto, 0}, field)
		return ip6Packet(src, dst, unix.IPPROTO_FRAGMENT, 64, slices.Concat(header, []byte{0, 0, byte(id >> 8), byte(id)}, payload))
	}
	field := uint16(offset / 8)
	if more {
		field |= 0x2000
	}
	p := ip4Packet(src, dst, payload)
	p[9] = proto
	binary.BigEndian.PutUint16(p[4:], id)
	binary.BigEndian.PutUint16(p[6:], field)
	clear(p[10:12])
	binary.BigEndian.PutUint16(p[10:], checksum(p[:20]))
	return p
}
