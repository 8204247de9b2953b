package e2e

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// ip4Fragment is a part of a datagram, which starts offset bytes into it.
func ip4Fragment(src, dst netip.Addr, proto byte, id uint16, offset int, more bool, part []byte) []byte {
	h := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0}
	h = slices.Concat(h, src.AsSlice(), dst.AsSlice())
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(part)))
	binary.BigEndian.PutUint16(h[4:], id)
	binary.BigEndian.PutUint16(h[6:], uint16(offset/8)|moreFragments(more)<<13)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, part...)
}

// ip6Fragment is the same behind a fragment header (RFC 8200 section 4.5).
func ip6Fragment(src, dst netip.Addr, proto byte, id uint32, offset int, more bool, part []byte) []byte {
	h := binary.BigEndian.AppendUint16([]byte{proto, 0}, uint16(offset)|moreFragments(more))
	return ip6Packet(src, dst, unix.IPPROTO_FRAGMENT, 64, append(binary.BigEndian.AppendUint32(h, id), part...))
}

func moreFragments(more bool) uint16 {
	if more {
		return 1
	}
	return 0
}

// behind puts extension headers of these types before a payload of the type last.
func behind(types []byte, last byte, payload []byte) []byte {
	var list []byte
	for i, kind := range types {
		next := last
		if i+1 < len(types) {
			next = types[i+1]
		}
		switch kind {
		case unix.IPPROTO_ROUTING: // with no segments left (RFC 8200 section 4.4)
			list = append(list, next, 0, 253, 0, 0, 0, 0, 0)
		case unix.IPPROTO_AH: // its length counts words of 4 bytes, less 2 (RFC 4302 section 2.2)
			list = append(list, next, 4, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1)
			list = append(list, make([]byte, 12)...)
		default: // padding (RFC 8200 section 4.2)
			list = append(list, next, 0, 1, 4, 0, 0, 0, 0)
		}
	}
	return append(list, payload...)
}

// icmp6Message is a message of neighbour discovery with its target (or whatever else is in that place) and options.
func icmp6Message(src, dst netip.Addr, kind ipv6.ICMPType, target netip.Addr, options ...[]byte) []byte {
	m := []byte{byte(kind), 0, 0, 0, 0, 0, 0, 0}
	if kind == ipv6.ICMPTypeNeighborAdvertisement {
		m[4] = 0x60 // solicited, override (RFC 4861 section 4.4)
	}
	if kind != ipv6.ICMPTypeRouterSolicitation {
		m = append(m, target.AsSlice()...)
	}
	for _, o := range options {
		m = append(m, o...)
	}
	binary.BigEndian.PutUint16(m[2:], checksum(pseudoHeader(src, dst, unix.IPPROTO_ICMPV6, len(m)), m))
	return m
}

// linkLayerOption is the target's address in an advertisement, the sender's in everything else.
func linkLayerOption(kind ipv6.ICMPType, mac net.HardwareAddr) []byte {
	if kind == ipv6.ICMPTypeNeighborAdvertisement {
		return append([]byte{2, 1}, mac...)
	}
	return append([]byte{1, 1}, mac...)
}
