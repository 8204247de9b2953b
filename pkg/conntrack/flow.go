package conntrack

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Flow is one entry of the table.
type Flow struct {
	Proto uint8
	// Src and Dst are those of the connection's first packet as the forward hook sees it, after DNAT and before SNAT: where it
	// came from, and where replies come from. Ports are 0 in protocols that have none.
	Src, Dst netip.AddrPort
	// OrigDst is the first packet's destination before DNAT; it is not valid if that is Dst.
	OrigDst netip.AddrPort

	// Status and TCPState are the kernel's (IPS_*, TCP_CONNTRACK_*). They are no reason to spare a flow that is to be cut: in
	// every state of TCP, CLOSE and TIME_WAIT as well, packets that carry ACK go on passing as established
	// (tcp_conntracks in nf_conntrack_proto_tcp.c), so two ends that work together need only send a FIN or RST.
	Status   Status
	TCPState uint8

	// What names the entry to the kernel beside Src and the destination before DNAT: id, zone, and the words that the kernel
	// has for ports in all protocols (of ICMP the identifier, and type and code).
	id               uint32
	zone             zone
	srcWord, dstWord uint16
}

// Status are bits of enum ip_conntrack_status (linux/netfilter/nf_conntrack_common.h).
type Status uint32

// The bits that say where a flow comes from and how far it has come.
const (
	Expected  Status = 1 << 0 // by a helper, of another flow
	SeenReply Status = 1 << 1
	Assured   Status = 1 << 2
	Confirmed Status = 1 << 3
)

// zone is a conntrack zone; the zero value is the default one.
type zone struct {
	id uint16
	// inTuple says that the zone counts in the original direction only and so is an attribute of that tuple.
	inTuple bool
}

// Attributes (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaProtoinfo  = 4
	ctaID         = 12
	ctaZone       = 18
	ctaFilter     = 25

	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaTupleZone  = 3

	ctaIPv4Src = 1
	ctaIPv4Dst = 2
	ctaIPv6Src = 3
	ctaIPv6Dst = 4

	ctaProtoNum        = 1
	ctaProtoSrcPort    = 2
	ctaProtoDstPort    = 3
	ctaProtoICMPID     = 4
	ctaProtoICMPType   = 5
	ctaProtoICMPCode   = 6
	ctaProtoICMPv6ID   = 7
	ctaProtoICMPv6Type = 8
	ctaProtoICMPv6Code = 9

	ctaProtoinfoTCP              = 1
	ctaProtoinfoTCPState         = 1
	ctaProtoinfoTCPFlagsOriginal = 4
	ctaProtoinfoTCPFlagsReply    = 5

	// tcpBeLiberal is IP_CT_TCP_FLAG_BE_LIBERAL (linux/netfilter/nf_conntrack_tcp.h).
	tcpBeLiberal = 1 << 3

	ctaFilterOrigFlags  = 1
	ctaFilterReplyFlags = 2
	filterIPSrc         = 1 << 0 // CTA_FILTER_F_CTA_IP_SRC (net/netfilter/nf_internals.h)
	filterIPDst         = 1 << 1
)

// tuple is one direction of an entry.
type tuple struct {
	src, dst         netip.Addr
	proto            uint8
	srcWord, dstWord uint16
	zone             uint16
	hasZone          bool
}

// entry is what a message of the kernel says of one connection.
type entry struct {
	orig, reply tuple
	zone        uint16
	id          uint32
	status      Status
	tcpState    uint8
	// pickedUp says that the kernel takes every sequence number of a TCP connection, as it does when the first packet that it saw
	// was not a SYN (tcp_new in nf_conntrack_proto_tcp.c). Flow tables have that done as well; nobody else in the kernel does.
	pickedUp bool
}

// flow describes the entry as the forward hook sees its first packet.
func (e *entry) flow() Flow {
	f := Flow{
		Proto: e.orig.proto, Status: e.status, TCPState: e.tcpState,
		id: e.id, zone: zone{id: e.zone}, srcWord: e.orig.srcWord, dstWord: e.orig.dstWord,
	}
	if e.orig.hasZone {
		f.zone = zone{id: e.orig.zone, inTuple: true}
	}
	var sport, dport, origDport uint16
	if hasPorts(f.Proto) {
		sport, dport, origDport = e.orig.srcWord, e.reply.srcWord, e.orig.dstWord
	}
	f.Src, f.Dst = netip.AddrPortFrom(e.orig.src, sport), netip.AddrPortFrom(e.reply.src, dport)
	if before := netip.AddrPortFrom(e.orig.dst, origDport); before != f.Dst {
		f.OrigDst = before
	}
	return f
}

// hasPorts reports whether what the kernel has in the place of ports are ports: of ICMP and GRE they are not.
func hasPorts(proto uint8) bool {
	switch proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, unix.IPPROTO_UDPLITE:
		return true
	}
	return false
}

var errMalformed = errors.New("malformed message from the kernel")

// parse reads a message's payload, which begins with struct nfgenmsg, into e.
func parse(payload []byte, e *entry) error {
	*e = entry{}
	if len(payload) < sizeofNfgenmsg {
		return errMalformed
	}
	list := attributes{rest: payload[sizeofNfgenmsg:]}
	for typ, data := list.next(); typ != 0; typ, data = list.next() {
		ok := true
		switch typ {
		case ctaTupleOrig:
			ok = parseTuple(data, &e.orig)
		case ctaTupleReply:
			ok = parseTuple(data, &e.reply)
		case ctaZone:
			e.zone, ok = be16(data)
		case ctaID:
			e.id, ok = be32(data)
		case ctaStatus:
			var bits uint32
			bits, ok = be32(data)
			e.status = Status(bits)
		case ctaProtoinfo:
			ok = parseProtoinfo(data, e)
		}
		if !ok {
			return errMalformed
		}
	}
	if list.malformed || !e.orig.src.IsValid() || !e.reply.src.IsValid() ||
		e.orig.src.Is4() != e.reply.src.Is4() || e.orig.proto != e.reply.proto {
		return errMalformed
	}
	return nil
}

func parseTuple(b []byte, t *tuple) bool {
	*t = tuple{}
	list := attributes{rest: b}
	for typ, data := list.next(); typ != 0; typ, data = list.next() {
		ok := true
		switch typ {
		case ctaTupleIP:
			ok = parseAddresses(data, t)
		case ctaTupleProto:
			ok = parseProto(data, t)
		case ctaTupleZone:
			t.zone, ok = be16(data)
			t.hasZone = true
		}
		if !ok {
			return false
		}
	}
	return !list.malformed && t.src.IsValid() && t.dst.IsValid() && t.src.Is4() == t.dst.Is4()
}

func parseAddresses(b []byte, t *tuple) bool {
	list := attributes{rest: b}
	for typ, data := list.next(); typ != 0; typ, data = list.next() {
		switch typ {
		case ctaIPv4Src, ctaIPv4Dst:
			if len(data) != 4 {
				return false
			}
			ip := netip.AddrFrom4([4]byte(data))
			if typ == ctaIPv4Src {
				t.src = ip
			} else {
				t.dst = ip
			}
		case ctaIPv6Src, ctaIPv6Dst:
			if len(data) != 16 {
				return false
			}
			ip := netip.AddrFrom16([16]byte(data))
			if typ == ctaIPv6Src {
				t.src = ip
			} else {
				t.dst = ip
			}
		}
	}
	return !list.malformed
}

func parseProto(b []byte, t *tuple) bool {
	list := attributes{rest: b}
	for typ, data := list.next(); typ != 0; typ, data = list.next() {
		ok := true
		switch typ {
		case ctaProtoSrcPort, ctaProtoICMPID, ctaProtoICMPv6ID:
			t.srcWord, ok = be16(data)
		case ctaProtoDstPort:
			t.dstWord, ok = be16(data)
		case ctaProtoNum, ctaProtoICMPType, ctaProtoICMPv6Type, ctaProtoICMPCode, ctaProtoICMPv6Code:
			if len(data) != 1 {
				return false
			}
			switch typ {
			case ctaProtoNum:
				t.proto = data[0]
			case ctaProtoICMPType, ctaProtoICMPv6Type:
				t.dstWord = uint16(data[0])<<8 | t.dstWord&0xff
			default:
				t.dstWord = t.dstWord&0xff00 | uint16(data[0])
			}
		}
		if !ok {
			return false
		}
	}
	return !list.malformed
}

func parseProtoinfo(b []byte, e *entry) bool {
	list := attributes{rest: b}
	for typ, data := list.next(); typ != 0; typ, data = list.next() {
		if typ != ctaProtoinfoTCP {
			continue
		}
		tcp := attributes{rest: data}
		for typ, data := tcp.next(); typ != 0; typ, data = tcp.next() {
			switch typ {
			case ctaProtoinfoTCPState:
				if len(data) != 1 {
					return false
				}
				e.tcpState = data[0]
			case ctaProtoinfoTCPFlagsOriginal, ctaProtoinfoTCPFlagsReply:
				if len(data) != 2 { // struct nf_ct_tcp_flags: flags and mask
					return false
				}
				e.pickedUp = e.pickedUp || data[0]&tcpBeLiberal != 0
			}
		}
		if tcp.malformed {
			return false
		}
	}
	return !list.malformed
}

func be16(b []byte) (uint16, bool) {
	if len(b) != 2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(b), true
}

func be32(b []byte) (uint32, bool) {
	if len(b) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}

// attributes is a list of netlink attributes.
type attributes struct {
	rest      []byte
	malformed bool
}

// next returns the next attribute's type and data, and type 0 at the end.
func (a *attributes) next() (uint16, []byte) {
	for len(a.rest) != 0 {
		if len(a.rest) < unix.NLA_HDRLEN {
			break
		}
		n := int(binary.NativeEndian.Uint16(a.rest))
		if n < unix.NLA_HDRLEN || n > len(a.rest) {
			break
		}
		typ := binary.NativeEndian.Uint16(a.rest[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		data := a.rest[unix.NLA_HDRLEN:n]
		a.rest = a.rest[min(align(n), len(a.rest)):]
		if typ != 0 { // CTA_UNSPEC and the like say nothing
			return typ, data
		}
	}
	a.malformed = a.malformed || len(a.rest) != 0
	return 0, nil
}

func align(n int) int { return (n + unix.NLA_ALIGNTO - 1) &^ (unix.NLA_ALIGNTO - 1) }

// appendDelete appends the payload of the message that deletes a flow's entry. It always has the tuple: without one the
// message would empty the table (ctnetlink_del_conntrack).
func appendDelete(b []byte, f *Flow) []byte {
	dst := f.Dst.Addr()
	if f.OrigDst.IsValid() {
		dst = f.OrigDst.Addr()
	}
	b = append(b, family(f.Src.Addr()), unix.NFNETLINK_V0, 0, 0)
	t := tuple{src: f.Src.Addr(), dst: dst, proto: f.Proto, srcWord: f.srcWord, dstWord: f.dstWord, zone: f.zone.id, hasZone: f.zone.inTuple}
	b = appendTuple(b, ctaTupleOrig, &t)
	if f.zone.id != 0 && !f.zone.inTuple {
		b = appendBE16(b, ctaZone, f.zone.id)
	}
	return appendBE32(b, ctaID, f.id)
}

func appendTuple(b []byte, typ uint16, t *tuple) []byte {
	return appendNested(b, typ, func(b []byte) []byte {
		b = appendNested(b, ctaTupleIP, func(b []byte) []byte {
			return appendAddr(appendAddr(b, ctaIPv4Src, t.src), ctaIPv4Dst, t.dst)
		})
		b = appendNested(b, ctaTupleProto, func(b []byte) []byte {
			b = appendBytes(b, ctaProtoNum, t.proto)
			switch t.proto {
			case unix.IPPROTO_ICMP:
				b = appendBE16(b, ctaProtoICMPID, t.srcWord)
				b = appendBytes(b, ctaProtoICMPType, byte(t.dstWord>>8))
				return appendBytes(b, ctaProtoICMPCode, byte(t.dstWord))
			case unix.IPPROTO_ICMPV6:
				b = appendBE16(b, ctaProtoICMPv6ID, t.srcWord)
				b = appendBytes(b, ctaProtoICMPv6Type, byte(t.dstWord>>8))
				return appendBytes(b, ctaProtoICMPv6Code, byte(t.dstWord))
			}
			// Protocols without ports do not read these.
			return appendBE16(appendBE16(b, ctaProtoSrcPort, t.srcWord), ctaProtoDstPort, t.dstWord)
		})
		if t.hasZone {
			b = appendBE16(b, ctaTupleZone, t.zone)
		}
		return b
	})
}

// appendAddr appends an address under its IPv4 attribute or, in IPv6, the one that is two further.
func appendAddr(b []byte, typ4 uint16, ip netip.Addr) []byte {
	if ip.Is4() {
		a := ip.As4()
		return appendBytes(b, typ4, a[:]...)
	}
	a := ip.As16()
	return appendBytes(b, typ4+2, a[:]...)
}

func appendBE16(b []byte, typ, v uint16) []byte { return appendBytes(b, typ, byte(v>>8), byte(v)) }

func appendBE32(b []byte, typ uint16, v uint32) []byte {
	return appendBytes(b, typ, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
}

func appendBytes(b []byte, typ uint16, data ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.NLA_HDRLEN+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	return append(b, make([]byte, align(len(data))-len(data))...)
}

func appendNested(b []byte, typ uint16, inner func([]byte) []byte) []byte {
	start := len(b)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint16(b, typ|unix.NLA_F_NESTED)
	b = inner(b)
	binary.NativeEndian.PutUint16(b[start:], uint16(len(b)-start))
	return b
}

func family(ip netip.Addr) uint8 {
	if ip.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func plain(ip netip.Addr) netip.Addr { return ip.Unmap().WithZone("") }
