package verdictlog

import (
	"encoding/binary"
	"net/netip"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Attributes of a logged packet (linux/netfilter/nfnetlink_log.h, enum nfulnl_attr_type).
const (
	attrPacketHeader = 1
	attrIn           = 4
	attrOut          = 5
	attrPhysIn       = 6
	attrPhysOut      = 7
	attrPayload      = 9
	attrPrefix       = 10
	attrSequence     = 12
)

// nfgenmsg is the length of the header before the attributes (linux/netfilter/nfnetlink.h).
const nfgenmsg = 4

// Packet is what the kernel tells of one packet. What it does not tell, or what was cut off, is zero.
type Packet struct {
	Prefix  string // of the rule that logged it
	ToNode  bool   // it was denied at the input hook
	In, Out uint32 // indexes of its interfaces; on a bridge those of the ports

	Src, Dst netip.Addr
	Proto    uint8 // behind IPv6 extension headers
	Later    bool  // a fragment that is not the first one: it has no ports

	HasPorts     bool
	Sport, Dport uint16
	HasICMP      bool
	Type, Code   uint8

	sequence    uint32
	hasSequence bool
}

// parseMessage reads a message of NFLOG, without the netlink header; false is for one that is malformed or tells of no IP packet.
func parseMessage(data []byte) (Packet, bool) {
	var p Packet
	if len(data) < nfgenmsg {
		return p, false
	}
	ad, err := netlink.NewAttributeDecoder(data[nfgenmsg:])
	if err != nil {
		return p, false
	}
	ad.ByteOrder = binary.BigEndian
	var payload []byte
	var in, out, physIn, physOut uint32
	for ad.Next() {
		switch ad.Type() {
		case attrPacketHeader: // be16 EtherType, u8 hook, u8 padding
			if b := ad.Bytes(); len(b) >= 3 {
				p.ToNode = b[2] == unix.NF_INET_LOCAL_IN
			}
		case attrIn:
			in = ad.Uint32()
		case attrOut:
			out = ad.Uint32()
		case attrPhysIn:
			physIn = ad.Uint32()
		case attrPhysOut:
			physOut = ad.Uint32()
		case attrPayload:
			payload = ad.Bytes()
		case attrPrefix:
			p.Prefix = strings.TrimRight(string(ad.Bytes()), "\x00")
		case attrSequence:
			p.sequence, p.hasSequence = ad.Uint32(), true
		}
	}
	if ad.Err() != nil {
		return Packet{}, false
	}
	p.In, p.Out = first(physIn, in), first(physOut, out)
	return p, p.parseIP(payload)
}

func first(a, b uint32) uint32 {
	if a != 0 {
		return a
	}
	return b
}

// parseIP reads the addresses, and as much of what follows as there is. It returns false if there are none.
func (p *Packet) parseIP(b []byte) bool {
	if len(b) == 0 {
		return false
	}
	switch b[0] >> 4 {
	case 4:
		return p.parseIPv4(b)
	case 6:
		return p.parseIPv6(b)
	}
	return false
}

// parseIPv4 follows RFC 791.
func (p *Packet) parseIPv4(b []byte) bool {
	const least = 20
	if len(b) < least {
		return false
	}
	p.Src, _ = netip.AddrFromSlice(b[12:16])
	p.Dst, _ = netip.AddrFromSlice(b[16:20])
	p.Proto = b[9]
	p.Later = binary.BigEndian.Uint16(b[6:])&0x1fff != 0
	if header := int(b[0]&0xf) * 4; header >= least && header <= len(b) && !p.Later {
		p.parseTransport(b[header:])
	}
	return true
}

// maxExtensions is more than any stack sends; the kernel cuts packets to LogSnaplen, so that it is never reached by real ones.
const maxExtensions = 16

// parseIPv6 follows RFC 8200. Where the chain of headers is cut off, Proto is the last one's that is known.
func (p *Packet) parseIPv6(b []byte) bool {
	const header = 40
	if len(b) < header {
		return false
	}
	p.Src, _ = netip.AddrFromSlice(b[8:24])
	p.Dst, _ = netip.AddrFromSlice(b[24:40])
	p.Proto = b[6]
	b = b[header:]
	for range maxExtensions {
		var size int
		switch p.Proto {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(b) < 2 {
				return true
			}
			size = (int(b[1]) + 1) * 8
		case unix.IPPROTO_AH: // RFC 4302: in units of 4 bytes, less 2
			if len(b) < 2 {
				return true
			}
			size = (int(b[1]) + 2) * 4
		case unix.IPPROTO_FRAGMENT:
			size = 8
			if len(b) < size {
				return true
			}
			p.Later = binary.BigEndian.Uint16(b[2:])&^7 != 0
		default:
			p.parseTransport(b)
			return true
		}
		p.Proto = b[0]
		if len(b) < size || p.Later {
			return true
		}
		b = b[size:]
	}
	return true
}

func (p *Packet) parseTransport(b []byte) {
	switch p.Proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_UDPLITE, unix.IPPROTO_DCCP:
		if len(b) >= 4 {
			p.HasPorts, p.Sport, p.Dport = true, binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		if len(b) >= 2 {
			p.HasICMP, p.Type, p.Code = true, b[0], b[1]
		}
	}
}
