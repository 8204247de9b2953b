package conntrack

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// message returns the payload of an entry's message.
func message(orig, reply tuple, more ...byte) []byte {
	b := []byte{family(orig.src), unix.NFNETLINK_V0, 0, 0}
	return append(appendTuple(appendTuple(b, ctaTupleOrig, &orig), ctaTupleReply, &reply), more...)
}

func TestParse(t *testing.T) {
	t.Parallel()
	m, m6 := pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80), pair(unix.IPPROTO_TCP, "fd00::1", 1001, "fd00::2", 80)
	var e entry
	status := appendBE32(nil, ctaStatus, uint32(Assured))
	state := func(typ uint16, data ...byte) []byte {
		return appendNested(nil, ctaProtoinfo, func(b []byte) []byte {
			return appendNested(b, ctaProtoinfoTCP, func(b []byte) []byte { return appendBytes(b, typ, data...) })
		})
	}
	for name, more := range map[string][]byte{
		"nothing more":           status,
		"an unknown attribute":   appendBytes(status, 1000, 1, 2, 3),
		"an attribute of type 0": append(appendBytes(nil, 0, 1, 2, 3), status...),
		"flags in the type":      appendBE32(nil, ctaStatus|unix.NLA_F_NET_BYTEORDER, uint32(Assured)),
		"without padding":        appendBytes(status, 1000, 1, 2, 3)[:len(status)+7],
		"a TCP state":            append(state(ctaProtoinfoTCPState, 3), status...),
		"more on TCP":            append(state(2, 1), status...),
		"flags of TCP":           append(state(ctaProtoinfoTCPFlagsReply, 0xff&^tcpBeLiberal, 0xff), status...),
		"picked up":              append(state(ctaProtoinfoTCPFlagsOriginal, tcpBeLiberal, 0), status...),
		"picked up, in reply":    append(state(ctaProtoinfoTCPFlagsReply, tcpBeLiberal, 0), status...),
	} {
		if err := parse(message(m.orig, m.reply, more...), &e); err != nil || e.orig != m.orig || e.reply != m.reply || e.status != Assured {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
		if want := map[string]uint8{"a TCP state": 3}[name]; e.tcpState != want {
			t.Errorf("%s: TCP state %d, want %d", name, e.tcpState, want)
		}
		if want := strings.HasPrefix(name, "picked up"); e.pickedUp != want {
			t.Errorf("%s: picked up %v, want %v", name, e.pickedUp, want)
		}
	}
	other := m
	other.reply.proto = unix.IPPROTO_UDP
	one := func(attrs ...byte) []byte { return append([]byte{unix.AF_INET, 0, 0, 0}, attrs...) }
	address := func(typ uint16, data ...byte) []byte {
		return appendNested(nil, ctaTupleOrig, func(b []byte) []byte {
			return appendNested(b, ctaTupleIP, func(b []byte) []byte { return appendBytes(b, typ, data...) })
		})
	}
	proto := func(typ uint16, data ...byte) []byte {
		return appendNested(nil, ctaTupleReply, func(b []byte) []byte {
			return appendNested(b, ctaTupleProto, func(b []byte) []byte { return appendBytes(b, typ, data...) })
		})
	}
	for name, b := range map[string][]byte{
		"nothing":                   {},
		"half of nfgenmsg":          {unix.AF_INET, 0},
		"no attribute":              one(),
		"no reply":                  appendTuple(one(), ctaTupleOrig, &m.orig),
		"no original":               appendTuple(one(), ctaTupleReply, &m.reply),
		"a reply in IPv6":           message(m.orig, m6.reply),
		"a reply of UDP":            message(m.orig, other.reply),
		"a reply without addresses": message(m.orig, m.reply, proto(ctaProtoNum, 6)...),
		"a source only":             message(m.orig, m.reply, address(ctaIPv4Src, 10, 0, 0, 1)...),
		"addresses of both": message(m.orig, m.reply, appendNested(nil, ctaTupleOrig, func(b []byte) []byte {
			return appendNested(b, ctaTupleIP, func(b []byte) []byte {
				return appendAddr(appendAddr(b, ctaIPv4Src, m.orig.src), ctaIPv4Dst, m6.orig.dst)
			})
		})...),
		"an address of 3 bytes":  message(m.orig, m.reply, address(ctaIPv4Src, 10, 0, 0)...),
		"an address of 15 bytes": message(m.orig, m.reply, address(ctaIPv6Dst, make([]byte, 15)...)...),
		"a port of 1 byte":       message(m.orig, m.reply, proto(ctaProtoSrcPort, 1)...),
		"a protocol of 2 bytes":  message(m.orig, m.reply, proto(ctaProtoNum, 0, 6)...),
		"an ICMP code of 0":      message(m.orig, m.reply, proto(ctaProtoICMPCode)...),
		"a zone of 4 bytes":      message(m.orig, m.reply, appendBE32(nil, ctaZone, 1)...),
		"an id of 2 bytes":       message(m.orig, m.reply, appendBE16(nil, ctaID, 1)...),
		"a status of 2 bytes":    message(m.orig, m.reply, appendBE16(nil, ctaStatus, 1)...),
		"a TCP state of 2 bytes": message(m.orig, m.reply, state(ctaProtoinfoTCPState, 0, 3)...),
		"TCP flags of 1 byte":    message(m.orig, m.reply, state(ctaProtoinfoTCPFlagsOriginal, 8)...),
		"half an attribute":      message(m.orig, m.reply, 1, 0),
		"an attribute of 3":      message(m.orig, m.reply, binary.NativeEndian.AppendUint32(nil, 3)...),
		"an attribute too long":  message(m.orig, m.reply, binary.NativeEndian.AppendUint32(nil, 5)...),
	} {
		if err := parse(b, &e); !errors.Is(err, errMalformed) {
			t.Errorf("%s: %v, read as %+v", name, err, e)
		}
	}
	whole := message(m.orig, m.reply)
	for i := range whole {
		if err := parse(whole[:i], &e); !errors.Is(err, errMalformed) {
			t.Errorf("%d of %d bytes: %v, read as %+v", i, len(whole), err, e)
		}
	}
}

// FuzzMessages reads datagrams as those of the kernel. Of an entry that can be read, the message that deletes it names the same
// tuple, zone and id. The seeds in testdata are what Linux 6.18 sent of the flows in TestFlows and TestDelete.
func FuzzMessages(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			h, payload, rest, err := split(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatalf("%d bytes are left of %d", len(rest), len(b))
			}
			b = rest
			_, _ = errno(payload)
			var e entry
			if h.typ != typeNew || parse(payload, &e) != nil {
				continue
			}
			flow := e.flow()
			if !flow.Src.IsValid() || !flow.Dst.IsValid() || flow.Src.Addr() != e.orig.src || flow.Dst.Addr() != e.reply.src {
				t.Fatalf("%+v as a flow: %+v", e, flow)
			}
			msg := appendDelete(nil, &flow)
			var named entry
			list := attributes{rest: msg[sizeofNfgenmsg:]}
			for typ, data := list.next(); typ != 0; typ, data = list.next() {
				switch typ {
				case ctaTupleOrig:
					if !parseTuple(data, &named.orig) {
						t.Fatalf("%+v is deleted by a tuple that cannot be read: %x", e, data)
					}
				case ctaZone:
					named.zone, _ = be16(data)
				case ctaID:
					named.id, _ = be32(data)
				default:
					t.Fatalf("attribute %d", typ)
				}
			}
			if e.orig.hasZone {
				e.zone = 0 // the kernel sends one of them
			}
			if list.malformed || msg[0] != family(e.orig.src) || named.orig != e.orig || named.zone != e.zone || named.id != e.id {
				t.Fatalf("%+v is deleted as %+v", e, named)
			}
		}
	})
}
