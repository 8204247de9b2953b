package kernel

import (
	"hash/crc32"
	"net/netip"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

var protocols = []oracle.Protocol{oracle.TCP, oracle.UDP, oracle.SCTP, oracle.ICMP}

func newBed(t *testing.T) *Bed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and loads nftables in them")
	}
	b, err := NewBed()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, _, err := b.exchange(nil); err != nil { // late ones
			t.Error(err)
		}
		for _, s := range b.Strays() {
			t.Error(s)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// everyWay returns a connection of every kind: from each place, outside and the node to each place, outside and the node, and
// from each place to itself.
func everyWay() []oracle.Conn {
	var conns []oracle.Conn
	for family := range 2 {
		var ends []netip.Addr
		for _, p := range layout.Places {
			ends = append(ends, p.IPs[family])
		}
		far := []netip.Addr{layout.RemotePods[family], layout.Outside[family]}
		for _, protocol := range protocols {
			port := uint16(8080)
			if protocol == oracle.ICMP {
				port = 0
			}
			add := func(c oracle.Conn) {
				c.Protocol, c.Port = protocol, port
				conns = append(conns, c)
			}
			for _, a := range ends {
				for _, b := range ends {
					add(oracle.Conn{Src: a, Dst: b})
				}
				for _, b := range far {
					add(oracle.Conn{Src: a, Dst: b})
					add(oracle.Conn{Src: b, Dst: a})
				}
				for _, n := range []netip.Addr{layout.Node[family], layout.Node[2+family]} {
					add(oracle.Conn{Src: a, Dst: n, ToNode: true})
					add(oracle.Conn{Src: n, Dst: a, FromNode: true})
				}
			}
		}
	}
	return conns
}

// Without a ruleset everything arrives, at the one whom it is for: what the verdicts of the other tests rest on.
func TestEverybodyReachesEverybody(t *testing.T) {
	b := newBed(t)
	conns := everyWay()
	for range 3 { // source ports do not repeat, answers of the first round do not disturb the next
		arrived, err := b.Send(conns)
		if err != nil {
			t.Fatal(err)
		}
		for i, c := range conns {
			if !arrived[i] {
				t.Errorf("lost: %+v", c)
			}
		}
	}
}

// Two beds at a time are independent: neither sees the other's probes, which have the same tokens.
func TestBedsAreApart(t *testing.T) {
	a, b := newBed(t), newBed(t)
	conns := everyWay()[:50]
	if _, err := a.Send(conns); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.exchange(nil); err != nil || len(b.Strays()) > 0 {
		t.Fatal(b.Strays(), err)
	}
}

func TestPackets(t *testing.T) {
	for _, c := range everyWay() {
		const token = 0x8badf00d
		p := appendPacket(nil, c, token)
		if got, ok := tokenOf(p); !ok || got != token {
			t.Errorf("%+v: token is %x, %v", c, got, ok)
		}
		header := 40
		if c.Src.Is4() {
			header = 20
			if fold(sum(p[:header])) != 0 {
				t.Errorf("%+v: bad IPv4 checksum", c)
			}
		}
		segment := p[header:]
		pseudo := sum(c.Src.AsSlice()) + sum(c.Dst.AsSlice()) + uint32(protocolNumber(c)) + uint32(len(segment))
		switch protocolNumber(c) {
		case unix.IPPROTO_SCTP:
			checksum := [4]byte(segment[8:12])
			copy(segment[8:12], []byte{0, 0, 0, 0})
			crc := crc32.Checksum(segment, castagnoli)
			if checksum != [4]byte{byte(crc), byte(crc >> 8), byte(crc >> 16), byte(crc >> 24)} {
				t.Errorf("%+v: bad CRC32c", c)
			}
		case unix.IPPROTO_ICMP:
			if fold(sum(segment)) != 0 {
				t.Errorf("%+v: bad ICMP checksum", c)
			}
		default:
			if fold(pseudo+sum(segment)) != 0 {
				t.Errorf("%+v: bad checksum", c)
			}
		}
	}
}

// conntrack marks a packet with a bad checksum invalid: the kernel's own opinion of the packets.
func TestTheKernelFindsPacketsValid(t *testing.T) {
	n := newNode(t)
	table := ruleset.NewTable(tables[0])
	for _, hook := range []string{"forward", "input"} {
		table.Chains[hook] = &ruleset.Chain{Name: hook, Hook: &ruleset.Hook{Name: hook}, Rules: []ruleset.Rule{
			ruleset.NewRule(ruleset.New, ruleset.Verdict{Kind: ruleset.Accept}), ruleset.NewRule(ruleset.Verdict{Kind: ruleset.Drop}),
		}}
	}
	n.load(t, ruleset.Ruleset{table})
	var conns []oracle.Conn
	for _, c := range everyWay() {
		if !c.FromNode {
			conns = append(conns, c)
		}
	}
	if got := n.send(t, conns); slices.Contains(got, false) {
		t.Errorf("not new: %+v", conns[slices.Index(got, false)])
	}
}
