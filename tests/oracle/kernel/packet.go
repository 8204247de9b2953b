package kernel

import (
	"encoding/binary"
	"hash/crc32"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/tests/oracle"
)

// A probe is the first packet of a connection, and carries a token that no other probe of the run has: the sequence number of
// a SYN, the payload of a datagram, the initiate tag of an INIT, identifier and sequence number of an echo request.

const (
	ethernetHeader = 14
	maxFrame       = 128

	flagSYN     = 2
	chunkINIT   = 1
	echoRequest = 8
	echo6       = 128

	// Source ports are above those that podwall treats specially (DHCP) and are used in turn, so that a flow is new to conntrack.
	firstPort = 1024
	ports     = 1<<16 - firstPort
)

var magic = []byte("podwall probe") // tells payloads of probes from anybody else's

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func protocolNumber(c oracle.Conn) byte {
	switch c.Protocol {
	case oracle.TCP:
		return unix.IPPROTO_TCP
	case oracle.UDP:
		return unix.IPPROTO_UDP
	case oracle.SCTP:
		return unix.IPPROTO_SCTP
	}
	if c.Src.Is4() {
		return unix.IPPROTO_ICMP
	}
	return unix.IPPROTO_ICMPV6
}

// appendPacket appends the IP packet of a probe.
func appendPacket(b []byte, c oracle.Conn, token uint32) []byte {
	start := len(b)
	if c.Src.Is4() {
		b = append(b, 0x45, 0, 0, 0, byte(token>>8), byte(token), 0x40, 0, 64, protocolNumber(c), 0, 0)
	} else {
		b = append(b, 0x60, 0, 0, 0, 0, 0, protocolNumber(c), 64)
	}
	b = append(b, c.Src.AsSlice()...)
	b = append(b, c.Dst.AsSlice()...)
	header := len(b) - start
	b = appendTransport(b, c, token)
	packet := b[start:]
	segment := packet[header:]
	pseudo := uint32(len(segment)) + uint32(protocolNumber(c)) + sum(packet[header-2*c.Src.BitLen()/8:header])
	if c.Src.Is4() {
		binary.BigEndian.PutUint16(packet[2:], uint16(len(packet)))
		binary.BigEndian.PutUint16(packet[10:], fold(sum(packet[:header])))
	} else {
		binary.BigEndian.PutUint16(packet[4:], uint16(len(segment)))
	}
	switch packet := segment; protocolNumber(c) {
	case unix.IPPROTO_TCP:
		binary.BigEndian.PutUint16(packet[16:], fold(pseudo+sum(packet)))
	case unix.IPPROTO_UDP:
		checksum := fold(pseudo + sum(packet))
		if checksum == 0 {
			checksum = 0xffff // zero is "none" (RFC 768), and forbidden in IPv6
		}
		binary.BigEndian.PutUint16(packet[6:], checksum)
	case unix.IPPROTO_SCTP:
		binary.LittleEndian.PutUint32(packet[8:], crc32.Checksum(packet, castagnoli)) // RFC 9260, appendix A
	case unix.IPPROTO_ICMP:
		binary.BigEndian.PutUint16(packet[2:], fold(sum(packet)))
	case unix.IPPROTO_ICMPV6:
		binary.BigEndian.PutUint16(packet[2:], fold(pseudo+sum(packet)))
	}
	return b
}

// appendTransport appends everything behind the IP header, with checksums of zero.
func appendTransport(b []byte, c oracle.Conn, token uint32) []byte {
	be := binary.BigEndian
	sport := uint16(firstPort + token%ports)
	if sport == c.Port {
		sport = firstPort - 1 // a hairpin between equal ports would be its own reply
	}
	if c.Protocol != oracle.ICMP {
		b = be.AppendUint16(be.AppendUint16(b, sport), c.Port)
	}
	switch c.Protocol {
	case oracle.TCP:
		b = be.AppendUint32(b, token)
		return append(b, 0, 0, 0, 0, 5<<4, flagSYN, 0xff, 0xff, 0, 0, 0, 0)
	case oracle.UDP:
		b = be.AppendUint16(b, uint16(8+len(magic)+4))
		b = append(append(b, 0, 0), magic...)
		return be.AppendUint32(b, token)
	case oracle.SCTP:
		b = append(b, 0, 0, 0, 0, 0, 0, 0, 0, chunkINIT, 0, 0, 20)
		b = be.AppendUint32(b, token)
		b = append(b, 0, 1, 0, 0, 0, 1, 0, 1) // receiver window, streams out and in
		return be.AppendUint32(b, token)      // initial TSN
	}
	kind := byte(echoRequest)
	if c.Src.Is6() {
		kind = echo6
	}
	b = append(b, kind, 0, 0, 0, byte(token>>8), byte(token), byte(token>>24), byte(token>>16)) // the low half is conntrack's key
	return append(b, magic...)
}

// tokenOf returns the token of a packet, given from its IP header on, if it is a probe.
func tokenOf(packet []byte) (uint32, bool) {
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4 && len(packet) >= int(packet[0]&15)*4:
		return transportToken(packet[9], packet[int(packet[0]&15)*4:])
	case len(packet) >= 40 && packet[0]>>4 == 6:
		return transportToken(packet[6], packet[40:])
	}
	return 0, false
}

// transportToken does so from the transport header on. Answers (RST, ICMP errors, echo replies) are no probes.
func transportToken(protocol byte, b []byte) (uint32, bool) {
	be := binary.BigEndian
	switch {
	case protocol == unix.IPPROTO_TCP && len(b) >= 20 && b[13] == flagSYN:
		return be.Uint32(b[4:]), true
	case protocol == unix.IPPROTO_UDP && len(b) >= 12+len(magic) && string(b[8:8+len(magic)]) == string(magic):
		return be.Uint32(b[8+len(magic):]), true
	case protocol == unix.IPPROTO_SCTP && len(b) >= 32 && b[12] == chunkINIT:
		return be.Uint32(b[16:]), true
	case protocol == unix.IPPROTO_ICMP && len(b) >= 8+len(magic) && b[0] == echoRequest,
		protocol == unix.IPPROTO_ICMPV6 && len(b) >= 8+len(magic) && b[0] == echo6:
		return uint32(be.Uint16(b[6:]))<<16 | uint32(be.Uint16(b[4:])), string(b[8:8+len(magic)]) == string(magic)
	}
	return 0, false
}

// sum adds 16-bit words as the Internet checksum does (RFC 1071).
func sum(b []byte) uint32 {
	var s uint32
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}
