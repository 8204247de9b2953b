package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
)

// write puts frames on a host's wire.
func (s *battleground) write(t *testing.T, from string, frames ...[]byte) {
	t.Helper()
	err := s.hosts[from].In(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		for _, f := range frames {
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: s.links[from].Index}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// neighbour is an entry that a victim has and that the attacker would like to be its own.
type neighbour struct {
	victim, device string
	address        netip.Addr
	mac, victimMAC net.HardwareAddr
	own            netip.Addr // the victim's, of that family
}

func (s *battleground) neighbours(t *testing.T) []neighbour {
	t.Helper()
	var list []neighbour
	for _, victim := range []string{other, closed} {
		for _, ip := range append(slices.Clone(s.gateways6), s.gateway4, s.v4(friend), s.v6(friend)) {
			mac := s.router[victim]
			if ip == s.v4(friend) || ip == s.v6(friend) {
				mac = s.mac(friend)
			}
			list = append(list, neighbour{victim: victim, device: "eth0", address: ip, mac: mac, victimMAC: s.mac(victim), own: s.hosts[victim].Addrs[family(ip)]})
		}
	}
	for _, ip := range []netip.Addr{s.v4(friend), s.v6(friend)} {
		own := s.gateway4
		if ip.Is6() {
			own = s.gateways6[slices.IndexFunc(s.gateways6, func(a netip.Addr) bool { return !a.IsLinkLocalUnicast() })]
		}
		list = append(list, neighbour{victim: testnet.NodeName, device: s.bridgeName(t), address: ip, mac: s.mac(friend), victimMAC: s.router[attacker], own: own})
	}
	return list
}

func family(ip netip.Addr) testnet.Family {
	if ip.Is4() {
		return testnet.IPv4
	}
	return testnet.IPv6
}

// taken reports whether a victim has come to believe that the address is the attacker's.
func (s *battleground) taken(t *testing.T, n neighbour) bool {
	t.Helper()
	out, err := s.hosts[n.victim].Run(t.Context(), "ip", "-j", "neigh", "show", n.address.String(), "dev", n.device)
	if err != nil {
		t.Fatal(err)
	}
	var entries []struct {
		MAC string `json:"lladdr"`
	}
	if err := json.Unmarshal([]byte(out), &entries); err != nil || len(entries) != 1 {
		t.Fatalf("%s has %s as its neighbour %s (%v), want one entry", n.victim, out, n.address, err)
	}
	return entries[0].MAC == s.mac(attacker).String()
}

// TestNeighbourTakeover judges claims by what victims believe afterwards: the pods' and the node's own neighbour tables.
func TestNeighbourTakeover(t *testing.T) {
	t.Parallel()
	s := newBattleground(t, "bridge")
	neighbours := s.neighbours(t)
	for _, n := range neighbours {
		// A kernel believes no second claim within a second; that must not be what stops the attacker.
		if _, err := s.hosts[n.victim].Run(t.Context(), "sysctl", "-w", "net.ipv4.neigh."+n.device+".locktime=0"); err != nil {
			t.Fatal(err)
		}
	}
	message := func(n neighbour, src netip.Addr, kind ipv6.ICMPType, target netip.Addr) []byte {
		return ip6Packet(src, n.own, unix.IPPROTO_ICMPV6, 255, icmp6Message(src, n.own, kind, target, linkLayerOption(kind, s.mac(attacker))))
	}
	toVictim := func(n neighbour, packet []byte) [][]byte {
		return [][]byte{frame(n.victimMAC, s.mac(attacker), unix.ETH_P_IPV6, packet)}
	}
	arp := func(operation byte, dst func(n neighbour) net.HardwareAddr) func(n neighbour) [][]byte {
		return func(n neighbour) [][]byte {
			m := arpRequest(s.mac(attacker), n.address, n.own)
			m[7] = operation
			return [][]byte{frame(dst(n), s.mac(attacker), unix.ETH_P_ARP, m)}
		}
	}
	unicast := func(n neighbour) net.HardwareAddr { return n.victimMAC }
	all := func(neighbour) net.HardwareAddr { return broadcastMAC }
	inFragments := func(before []byte) func(n neighbour) [][]byte {
		return func(n neighbour) [][]byte {
			m := slices.Concat(before, message(n, s.v6(attacker), ipv6.ICMPTypeNeighborAdvertisement, n.address)[40:])
			kind := byte(unix.IPPROTO_ICMPV6)
			if before != nil {
				kind = unix.IPPROTO_DSTOPTS
			}
			var frames [][]byte
			for _, p := range [][]byte{ip6Fragment(s.v6(attacker), n.own, kind, 77, 0, true, m[:8]), ip6Fragment(s.v6(attacker), n.own, kind, 77, 8, false, m[8:])} {
				p[7] = 255
				frames = append(frames, toVictim(n, p)...)
			}
			return frames
		}
	}
	kinds := []struct {
		name   string
		family testnet.Family
		frames func(n neighbour) [][]byte
	}{
		{"ARP reply", testnet.IPv4, arp(2, unicast)},
		{"ARP reply to all", testnet.IPv4, arp(2, all)},
		{"ARP request", testnet.IPv4, arp(1, all)},
		{"neighbour advertisement", testnet.IPv6, func(n neighbour) [][]byte {
			return toVictim(n, message(n, s.v6(attacker), ipv6.ICMPTypeNeighborAdvertisement, n.address))
		}},
		{"neighbour advertisement from that address", testnet.IPv6, func(n neighbour) [][]byte {
			return toVictim(n, message(n, n.address, ipv6.ICMPTypeNeighborAdvertisement, n.address))
		}},
		{"neighbour solicitation", testnet.IPv6, func(n neighbour) [][]byte {
			return toVictim(n, message(n, n.address, ipv6.ICMPTypeNeighborSolicitation, n.own))
		}},
		// Its target is not in the first fragment. A receiver ignores fragments (RFC 6980), unless br_netfilter has reassembled them; the
		// control takes that away as well.
		{"neighbour advertisement in fragments", testnet.IPv6, inFragments(nil)},
	}
	// round claims each address so many times and returns how many claims were sent and how many entries are the attacker's then.
	round := func(frames func(n neighbour) [][]byte, f testnet.Family) (tally, int) {
		var sum tally
		var claimed []neighbour
		for _, n := range neighbours {
			if family(n.address) != f {
				continue
			}
			claimed = append(claimed, n)
			if _, err := s.hosts[n.victim].Run(t.Context(), "ip", "neigh", "replace", n.address.String(), "lladdr", n.mac.String(), "dev", n.device, "nud", "reachable"); err != nil {
				t.Fatal(err)
			}
			for range attempts {
				s.write(t, attacker, frames(n)...)
				sum.sent++
			}
		}
		for deadline := time.Now().Add(200 * time.Millisecond); ; { // veths and bridge hand on at once
			late := time.Now().After(deadline)
			sum.received = 0
			for _, n := range claimed {
				if s.taken(t, n) {
					sum.received++
				}
			}
			if late || sum.received == len(claimed) {
				return sum, len(claimed)
			}
		}
	}
	before := map[string]tally{}
	for _, k := range kinds {
		sum, _ := round(k.frames, k.family)
		before[k.name] = sum
		if sum.received > 0 {
			t.Errorf("%s: %d neighbour tables have been changed", k.name, sum.received)
		}
	}
	if err := s.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	deleteTables(t, s.Node)
	for _, n := range neighbours {
		if _, err := s.hosts[n.victim].Run(t.Context(), "sysctl", "-w", "net.ipv6.conf."+n.device+".suppress_frag_ndisc=0"); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range kinds {
		sum, entries := round(k.frames, k.family)
		s.report(t, fmt.Sprintf("entries of neighbour tables (%d) taken by %s", entries, k.name), before[k.name], sum)
		if sum.received != entries {
			t.Errorf("%s: the control changes %d of %d entries", k.name, sum.received, entries)
		}
	}
}

// TestForgedMAC holds what the threat model says of a pod that sends from its neighbour's hardware address: it diverts what is meant
// for that neighbour, and reads it only if it is itself open for ingress; it never answers in its name.
func TestForgedMAC(t *testing.T) {
	t.Parallel()
	s := newBattleground(t, "bridge")
	for _, tt := range []struct {
		thief string
		reads bool
	}{{attacker, true}, {guard, false}} {
		stolen, delivered := openTap(t, s.hosts[tt.thief]), openTap(t, s.hosts[closed])
		at := netip.AddrPortFrom
		steal := s.udpVia(s.router[tt.thief], tt.thief, at(s.v4(tt.thief), 7911), at(s.gateway4, 9))("theft")
		copy(steal[6:], s.mac(closed))
		marker := func(n int) string { return fmt.Sprintf("<to closed, by %s, %d>", tt.thief, n) }
		for n := range attempts {
			s.write(t, tt.thief, steal)
			s.write(t, friend, s.udp(friend, closed, at(s.v4(friend), 7912), at(s.v4(closed), 80))(marker(n)))
			s.write(t, tt.thief, s.udp(tt.thief, friend, at(s.v4(closed), 80), at(s.v4(friend), 7912))("<answer>"))
		}
		time.Sleep(200 * time.Millisecond) // for what comes late
		read, arrived := 0, 0
		for n := range attempts {
			if stolen.has(t, marker(n)) {
				read++
			}
			if delivered.has(t, marker(n)) {
				arrived++
			}
		}
		t.Attr("report", fmt.Sprintf("diverted by a forged MAC address, thief %s, bridged: sent %d, thief received %d, owner received %d", tt.thief, attempts, read, arrived))
		if (read > 0) != tt.reads {
			t.Errorf("%s has read %d of %d", tt.thief, read, attempts)
		}
		if arrived == attempts {
			t.Errorf("%s has diverted nothing: this test shows nothing", tt.thief)
		}
		if openTap(t, s.hosts[friend]).has(t, "<answer>") {
			t.Errorf("%s has answered in the name of %s", tt.thief, closed)
		}
	}
}

// letterbox is what a host's ordinary servers have read.
type letterbox struct {
	mu   sync.Mutex
	seen bytes.Buffer
}

func (b *letterbox) count(list []string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, marker := range list {
		if bytes.Contains(b.seen.Bytes(), []byte(marker)) {
			n++
		}
	}
	return n
}

func (b *letterbox) add(data []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen.Write(data)
}

const letterboxPort = 7999

// openLetterbox serves UDP and TCP of both families on every address of the host, broadcast and all-hosts multicast included.
func openLetterbox(t *testing.T, h *testnet.Host) *letterbox {
	t.Helper()
	b := &letterbox{}
	err := h.In(func() error {
		for _, network := range []string{"udp4", "udp6"} {
			conn, err := net.ListenPacket(network, fmt.Sprintf(":%d", letterboxPort))
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = conn.Close() })
			go func() {
				buf := make([]byte, 2048)
				for {
					n, _, err := conn.ReadFrom(buf)
					if err != nil {
						return
					}
					b.add(buf[:n])
				}
			}()
		}
		listener, err := net.Listen("tcp", fmt.Sprintf(":%d", letterboxPort))
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					_ = conn.SetDeadline(time.Now().Add(changeTimeout))
					buf := make([]byte, 2048)
					n, _ := conn.Read(buf)
					b.add(buf[:n])
				}()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestUnprivilegedSockets tries what needs no privilege at all: ordinary sockets to addresses that no policy names.
func TestUnprivilegedSockets(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			s := newBattleground(t, cni)
			s.hosts[testnet.NodeName] = s.Host
			letterboxes := map[string]*letterbox{}
			for _, name := range []string{closed, other, testnet.NodeName} {
				letterboxes[name] = openLetterbox(t, s.hosts[name])
			}
			local := func(from, to string) string {
				if to != testnet.NodeName {
					return s.links[to].linkLocal().String() + "%eth0"
				}
				l := hostLink(t, s.Node, s.Pod("default/"+from))
				if s.bridge {
					l = linkNamed(t, s.Host, l.Master)
				}
				return l.linkLocal().String() + "%eth0"
			}
			type try struct{ name, from, to, network, address string }
			var tries []try
			pairs := [][2]string{{mute, testnet.NodeName}}
			if s.bridge {
				pairs = append(pairs, [2]string{attacker, closed}, [2]string{mute, other})
			}
			for _, p := range pairs {
				add := func(name, network, address string) {
					name = fmt.Sprintf("%s, %s to %s", name, map[string]string{mute: "isolated pod", attacker: "open pod"}[p[0]], map[string]string{closed: "isolated pod", other: "open pod", testnet.NodeName: "own node"}[p[1]])
					tries = append(tries, try{name, p[0], p[1], network, address})
				}
				add("link-local TCP", "tcp6", local(p[0], p[1]))
				add("link-local UDP", "udp6", local(p[0], p[1]))
				add("limited broadcast", "udp4", limited.String())
				add("IPv4 multicast", "udp4", allHosts.String())
				add("IPv6 multicast", "udp6", allNodes.String()+"%eth0")
				if s.bridge {
					add("directed broadcast", "udp4", directed.String())
				}
			}
			round := func(when string, y try) tally {
				markers := make([]string, attempts)
				var senders sync.WaitGroup
				for i := range markers {
					markers[i] = fmt.Sprintf("<%s %s %d>", when, y.name, i)
					senders.Go(func() {
						_ = s.hosts[y.from].In(func() error { // what cannot be sent does not arrive
							conn, err := net.DialTimeout(y.network, net.JoinHostPort(y.address, fmt.Sprint(letterboxPort)), time.Second)
							if err != nil {
								return err
							}
							defer conn.Close()
							_, err = conn.Write([]byte(markers[i]))
							return err
						})
					})
				}
				senders.Wait()
				deadline := time.Now().Add(200 * time.Millisecond)
				if when == control {
					deadline = time.Now().Add(changeTimeout)
				}
				received := 0
				for received < attempts && time.Now().Before(deadline) {
					time.Sleep(20 * time.Millisecond)
					received = letterboxes[y.to].count(markers)
				}
				return tally{attempts, received}
			}
			before := map[string]tally{}
			for _, y := range tries {
				before[y.name] = round(defended, y)
				if n := before[y.name].received; n > 0 {
					t.Errorf("%s: %d of %d have arrived", y.name, n, attempts)
				}
			}
			if err := s.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			deleteTables(t, s.Node)
			for _, y := range tries {
				s.report(t, strings.TrimSpace(y.name), before[y.name], round(control, y))
			}
		})
	}
}
