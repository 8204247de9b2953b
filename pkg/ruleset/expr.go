package ruleset

import (
	"bytes"
	"cmp"
	"fmt"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
)

// Field is something that a packet has and a rule can look at.
type Field uint8

// The fields that podwall looks at. A field that a packet does not have (IPSaddr of an IPv6 packet) matches nothing,
// not even a negated comparison.
const (
	IIFName     Field = iota + 1 // meta iifname
	OIFName                      // oifname; only in sets
	PktType                      // meta pkttype
	EtherType                    // bytes 12 and 13 of the link header: the EtherType, of a tag if there is one, whose inner one is meta protocol. In netdev only
	L4Proto                      // meta l4proto: behind IPv6 extension headers
	IPSaddr                      // ip saddr
	IPDaddr                      // ip daddr
	IP6Saddr                     // ip6 saddr
	IP6Daddr                     // ip6 daddr
	IP6HopLimit                  // ip6 hoplimit
	ICMPv6Type                   // icmpv6 type
	Sport                        // th sport; needs an L4Proto match before it
	Dport                        // th dport; needs an L4Proto match before it
	ARPSaddr                     // arp saddr ip: the address that an ARP message claims
	NDTarget                     // the target address of a neighbour solicitation or advertisement; needs an ICMPv6Type match before it
	TCPFlags                     // tcp flags; only in Flags, needs an L4Proto match of TCP before it
)

var fieldText = map[Field]string{
	IIFName: "iifname", OIFName: "oifname", PktType: "meta pkttype", EtherType: "@ll,96,16", L4Proto: "meta l4proto",
	IPSaddr: "ip saddr", IPDaddr: "ip daddr", IP6Saddr: "ip6 saddr", IP6Daddr: "ip6 daddr", IP6HopLimit: "ip6 hoplimit",
	ICMPv6Type: "icmpv6 type", Sport: "th sport", Dport: "th dport", TCPFlags: "tcp flags",
	ARPSaddr: "arp saddr ip", NDTarget: "@th,64,128",
}

// String returns the field in nft's syntax.
func (f Field) String() string { return fieldText[f] }

// Protocol numbers (IANA) and what nft calls them.
const (
	ProtoICMP   uint8 = 1
	ProtoTCP    uint8 = 6
	ProtoUDP    uint8 = 17
	ProtoICMPv6 uint8 = 58
	ProtoSCTP   uint8 = 132
)

var protoText = map[uint8]string{ProtoICMP: "icmp", ProtoTCP: "tcp", ProtoUDP: "udp", ProtoICMPv6: "ipv6-icmp", ProtoSCTP: "sctp"}

// Values of PktType (linux/if_packet.h).
const (
	PktHost      uint8 = 0
	PktBroadcast uint8 = 1
	PktMulticast uint8 = 2
	PktOther     uint8 = 3
)

// Values of EtherType (linux/if_ether.h).
const (
	EtherIPv4 uint16 = 0x0800
	EtherARP  uint16 = 0x0806
	EtherIPv6 uint16 = 0x86dd
)

// Expr is one part of a rule: a match, a statement or a verdict. The set of implementations is closed.
type Expr interface {
	fmt.Stringer
	expr()
}

// Cmp matches a field that equals (or, with Not, differs from) a value in network byte order. The value of IIFName is the
// interface's name.
type Cmp struct {
	Field Field
	Not   bool
	Value string
}

// Prefix matches an address field inside (or, with Not, outside) a CIDR.
type Prefix struct {
	Field  Field
	Not    bool
	Prefix netip.Prefix
}

// Range matches a field between two values in network byte order, both included.
type Range struct {
	Field    Field
	From, To string
}

// In matches when the fields, concatenated, are (or, with Not, are not) in a named set.
type In struct {
	Fields []Field
	Not    bool
	Set    string
}

// Dispatch looks the fields up in a verdict map and takes the verdict that it finds; a miss goes on with the next rule.
type Dispatch struct {
	Fields []Field
	Map    string
}

// Flags matches TCP packets whose flags, as far as Mask looks at them, are (or, with Not, are not) Value.
type Flags struct {
	Mask, Value uint8
	Not         bool
}

// Bits of Flags (RFC 9293).
const (
	FIN uint8 = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// CTState matches packets whose conntrack state is one of the bits. A packet has one state, so one bit, and all but one, are a comparison;
// others take the kernel a mask as well.
type CTState uint8

// Bits of CTState.
const (
	Invalid CTState = 1 << iota
	Established
	Related
	New
	Untracked

	// All states but one, and all.
	NotNew   = Invalid | Established | Related | Untracked
	AnyState = NotNew | New
)

// Single returns the state of which s is the only one or, with not, the only one that is missing.
func (s CTState) Single() (CTState, bool, bool) {
	not := bits.OnesCount8(uint8(s)) > 1
	if not {
		s = AnyState &^ s
	}
	return s, not, bits.OnesCount8(uint8(s)) == 1
}

// Counter counts the packets and bytes that reach it.
type Counter struct{}

// Limit matches at most PerSecond packets a second after a burst.
type Limit struct{ PerSecond, Burst uint32 }

// LimitEach matches at most PerSecond packets a second after a burst, for each value of a field apart. Set is Dynamic: an element of it
// keeps the state of a value, and counts its packets.
type LimitEach struct {
	Field            Field
	Set              string
	PerSecond, Burst uint32
}

// Log sends the first Snaplen bytes of the packet to an NFLOG group.
type Log struct {
	Prefix  string
	Group   uint16
	Snaplen uint32
}

// Reject answers the packet: with a TCP reset, or else with ICMP admin-prohibited of the packet's family. It ends the rule.
type Reject struct{ TCPReset bool }

// VerdictKind is what happens to a packet.
type VerdictKind uint8

// The verdicts. Accept ends only its own base chain.
const (
	Accept VerdictKind = iota + 1
	Drop
	Return
	Jump
	Goto
)

// Verdict ends a rule. Chain is set for Jump and Goto only.
type Verdict struct {
	Kind  VerdictKind
	Chain string
}

func (Cmp) expr()       {}
func (Prefix) expr()    {}
func (Range) expr()     {}
func (In) expr()        {}
func (Dispatch) expr()  {}
func (Flags) expr()     {}
func (CTState) expr()   {}
func (Counter) expr()   {}
func (Limit) expr()     {}
func (LimitEach) expr() {}
func (Log) expr()       {}
func (Reject) expr()    {}
func (Verdict) expr()   {}

// Equal matches field == one byte.
func Equal(f Field, v uint8) Cmp { return Cmp{Field: f, Value: string([]byte{v})} }

// Equal16 matches field == a 16 bit number (ports, ether types).
func Equal16(f Field, v uint16) Cmp { return Cmp{Field: f, Value: be16(v)} }

// Between16 matches from <= field <= to for 16 bit numbers.
func Between16(f Field, from, to uint16) Range {
	return Range{Field: f, From: be16(from), To: be16(to)}
}

// Address matches an address field; the family of the address must be that of the field.
func Address(f Field, ip netip.Addr) Cmp { return Cmp{Field: f, Value: string(ip.AsSlice())} }

// Not negates a comparison.
func Not(c Cmp) Cmp {
	c.Not = !c.Not
	return c
}

// To returns a verdict that goes to a chain.
func To(kind VerdictKind, chain string) Verdict { return Verdict{Kind: kind, Chain: chain} }

func be16(v uint16) string { return string([]byte{byte(v >> 8), byte(v)}) }

func not(b bool) string {
	if b {
		return "!= "
	}
	return ""
}

// String returns the comparison in nft's syntax.
func (c Cmp) String() string {
	return c.Field.String() + " " + not(c.Not) + valueText(c.Field, c.Value)
}

// String returns the match in nft's syntax.
func (p Prefix) String() string {
	if p.Field == NDTarget { // nft has no name for it, and no prefixes without one
		mask := netip.PrefixFrom(netip.AddrFrom16([16]byte(bytes.Repeat([]byte{0xff}, 16))), p.Prefix.Bits()).Masked().Addr()
		return fmt.Sprintf("%s & 0x%x %s0x%x", p.Field, mask.AsSlice(), not(p.Not), p.Prefix.Masked().Addr().AsSlice())
	}
	return p.Field.String() + " " + not(p.Not) + p.Prefix.Masked().String()
}

// String returns the match in nft's syntax.
func (r Range) String() string {
	return r.Field.String() + " " + valueText(r.Field, r.From) + "-" + valueText(r.Field, r.To)
}

// String returns the lookup in nft's syntax.
func (i In) String() string { return fieldsText(i.Fields) + " " + not(i.Not) + "@" + i.Set }

// String returns the verdict map lookup in nft's syntax.
func (d Dispatch) String() string { return fieldsText(d.Fields) + " vmap @" + d.Map }

// String returns the match in nft's syntax.
func (f Flags) String() string {
	return "tcp flags " + not(f.Not) + flagNames(f.Value) + " / " + flagNames(f.Mask)
}

func flagNames(bits uint8) string {
	var names []string
	for i, n := range []string{"fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr"} {
		if bits&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return cmp.Or(strings.Join(names, ","), "0x0")
}

// String returns the match in nft's syntax.
func (s CTState) String() string {
	var names []string
	op := ""
	if state, negated, ok := s.Single(); ok {
		if s, op = state, "== "; negated {
			op = not(true)
		}
	}
	for i, n := range []string{"invalid", "established", "related", "new", "untracked"} {
		if s&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return "ct state " + op + strings.Join(names, ",")
}

// String returns the statement in nft's syntax.
func (Counter) String() string { return "counter" }

// String returns the statement in nft's syntax.
func (l Limit) String() string {
	return fmt.Sprintf("limit rate %d/second burst %d packets", l.PerSecond, l.Burst)
}

// String returns the statement in nft's syntax.
func (l LimitEach) String() string {
	return fmt.Sprintf("update @%s { %s counter %s }", l.Set, l.Field, Limit{l.PerSecond, l.Burst})
}

// String returns the statement in nft's syntax.
func (l Log) String() string {
	return fmt.Sprintf("log prefix %q group %d snaplen %d", l.Prefix, l.Group, l.Snaplen)
}

// String returns the statement in nft's syntax.
func (r Reject) String() string {
	if r.TCPReset {
		return "reject with tcp reset"
	}
	return "reject with icmpx type admin-prohibited"
}

// String returns the verdict in nft's syntax.
func (v Verdict) String() string {
	switch v.Kind {
	case Accept:
		return "accept"
	case Drop:
		return "drop"
	case Return:
		return "return"
	case Jump:
		return "jump " + v.Chain
	case Goto:
		return "goto " + v.Chain
	}
	return ""
}

func fieldsText(fields []Field) string {
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.String()
	}
	return strings.Join(names, " . ")
}

func valueText(f Field, v string) string {
	switch f {
	case IIFName:
		return strconv.Quote(v)
	case PktType:
		return []string{"host", "broadcast", "multicast", "other"}[v[0]&3]
	case EtherType:
		return fmt.Sprintf("0x%x", uint16(v[0])<<8|uint16(v[1]))
	case L4Proto:
		return protoName(v[0])
	case NDTarget:
		return fmt.Sprintf("0x%x", v)
	case IPSaddr, IPDaddr, IP6Saddr, IP6Daddr, ARPSaddr:
		ip, _ := netip.AddrFromSlice([]byte(v))
		return ip.String()
	case Sport, Dport:
		return strconv.Itoa(int(v[0])<<8 | int(v[1]))
	}
	return strconv.Itoa(int(v[0]))
}

func protoName(p uint8) string {
	if n, ok := protoText[p]; ok {
		return n
	}
	return strconv.Itoa(int(p))
}

// ruleText joins expressions in nft's syntax. "meta l4proto tcp th dport 80" is written "tcp dport 80", as nft lists it.
func ruleText(exprs []Expr, comment string) string {
	var b strings.Builder
	for i, e := range exprs {
		if i > 0 {
			b.WriteByte(' ')
		}
		text := e.String()
		if proto, ok := portProto(exprs, i); ok {
			text = strings.Replace(text, "th ", proto+" ", 1)
		} else if _, ok := portProto(exprs, i+1); ok {
			// The protocol is part of the port match that follows.
			s := b.String()
			b.Reset()
			b.WriteString(strings.TrimSuffix(s, " "))
			continue
		}
		b.WriteString(text)
	}
	if comment != "" {
		fmt.Fprintf(&b, " comment %q", comment)
	}
	return strings.TrimSpace(b.String())
}

// portProto returns the name of the protocol when expression i is a port match directly behind "meta l4proto tcp|udp|sctp".
func portProto(exprs []Expr, i int) (string, bool) {
	if i < 1 || i >= len(exprs) {
		return "", false
	}
	var f Field
	switch e := exprs[i].(type) {
	case Cmp:
		f = e.Field
	case Range:
		f = e.Field
	}
	if f != Sport && f != Dport {
		return "", false
	}
	p, ok := exprs[i-1].(Cmp)
	if !ok || p.Field != L4Proto || p.Not {
		return "", false
	}
	name, ok := protoText[p.Value[0]]
	return name, ok
}
