package verdictlog

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// realMessages were sent by Linux 6.18 (see TestSeeds).
var realMessages = []string{
	"0200004d080001000800030009000a006961626300000000080005000000000108000b000000000008000e000000000008000c0000000000280009004500002415eb4000401126dc7f0000017f000001e8d400360010fe23646174616772616d",
}

var (
	from4, to4 = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	from6, to6 = netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
)

func ip4(proto uint8, fragment uint16, options int, rest ...byte) []byte {
	b := make([]byte, 20+options)
	b[0] = 0x40 | byte(5+options/4)
	binary.BigEndian.PutUint16(b[6:], fragment)
	b[9] = proto
	copy(b[12:], from4.AsSlice())
	copy(b[16:], to4.AsSlice())
	return append(b, rest...)
}

func ip6(next uint8, rest ...[]byte) []byte {
	b := make([]byte, 40)
	b[0], b[6] = 0x60, next
	copy(b[8:], from6.AsSlice())
	copy(b[24:], to6.AsSlice())
	return append(b, slices.Concat(rest...)...)
}

var ports = []byte{0x9c, 0x40, 0, 80, 0, 0, 0, 0} // 40000, 80

func TestParse(t *testing.T) {
	v4 := func(p Packet) Packet { p.Src, p.Dst = from4, to4; return p }
	v6 := func(p Packet) Packet { p.Src, p.Dst = from6, to6; return p }
	withPorts := func(p Packet) Packet { p.HasPorts, p.Sport, p.Dport = true, 40000, 80; return p }
	for _, tt := range []struct {
		name    string
		payload []byte
		want    Packet
		bad     bool
	}{
		{name: "nothing", bad: true},
		{name: "no IP", payload: make([]byte, 60), bad: true},
		{name: "short IPv4", payload: ip4(6, 0, 0)[:19], bad: true},
		{name: "short IPv6", payload: ip6(6)[:39], bad: true},
		{name: "tcp", payload: ip4(6, 0, 0, ports...), want: withPorts(v4(Packet{Proto: 6}))},
		{name: "udp behind options", payload: ip4(17, 0, 8, ports...), want: withPorts(v4(Packet{Proto: 17}))},
		{name: "sctp", payload: ip6(132, ports), want: withPorts(v6(Packet{Proto: 132}))},
		{name: "ports cut off", payload: ip4(6, 0, 0, ports[:3]...), want: v4(Packet{Proto: 6})},
		{name: "header longer than the packet", payload: ip4(6, 0, 40)[:40], want: v4(Packet{Proto: 6})},
		{name: "header length 0", payload: func() []byte { b := ip4(6, 0, 0, ports...); b[0] = 0x40; return b }(), want: v4(Packet{Proto: 6})},
		{name: "first fragment", payload: ip4(17, 0x2000, 0, ports...), want: withPorts(v4(Packet{Proto: 17}))},
		{name: "later fragment", payload: ip4(17, 0x2001, 0, ports...), want: v4(Packet{Proto: 17, Later: true})},
		{name: "icmp", payload: ip4(1, 0, 0, 8, 3), want: v4(Packet{Proto: 1, HasICMP: true, Type: 8, Code: 3})},
		{name: "icmpv6", payload: ip6(58, []byte{128, 0}), want: v6(Packet{Proto: 58, HasICMP: true, Type: 128})},
		{name: "gre", payload: ip4(47, 0, 0, ports...), want: v4(Packet{Proto: 47})},
		{name: "tcp6", payload: ip6(6, ports), want: withPorts(v6(Packet{Proto: 6}))},
		{
			name:    "extension headers",
			payload: ip6(0, []byte{60, 0, 0, 0, 0, 0, 0, 0}, []byte{43, 1, 15: 0}, []byte{51, 0, 0, 0, 0, 0, 0, 0}, []byte{6, 1, 11: 0}, ports),
			want:    withPorts(v6(Packet{Proto: 6})),
		},
		{name: "first fragment of IPv6", payload: ip6(44, []byte{17, 0, 0, 1, 0, 0, 0, 9}, ports), want: withPorts(v6(Packet{Proto: 17}))},
		{name: "later fragment of IPv6", payload: ip6(44, []byte{17, 0, 0, 8, 0, 0, 0, 9}, ports), want: v6(Packet{Proto: 17, Later: true})},
		{name: "fragment header cut off", payload: ip6(44, []byte{17, 0, 0, 8}), want: v6(Packet{Proto: 44})},
		{name: "extension header cut off", payload: ip6(60, []byte{6, 3, 0, 0}), want: v6(Packet{Proto: 6})},
		{name: "endless extension headers", payload: ip6(0, make([]byte, 800)), want: v6(Packet{Proto: 0})},
		{name: "no next header", payload: ip6(59), want: v6(Packet{Proto: 59})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got Packet
			if ok := got.parseIP(tt.payload); ok == tt.bad {
				t.Fatalf("parsed: %v", ok)
			}
			if diff := cmp.Diff(tt.want, got, packets); !tt.bad && diff != "" {
				t.Error(diff)
			}
		})
	}
}

var packets = cmp.Options{cmpopts.IgnoreUnexported(Packet{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })}

// message is what the kernel would send.
func message(t testing.TB, prefix string, payload []byte, interfaces map[uint16]uint32) []byte {
	t.Helper()
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Bytes(attrPacketHeader, []byte{8, 0, unix.NF_INET_LOCAL_IN, 0})
	ae.Bytes(attrPrefix, append([]byte(prefix), 0))
	for _, typ := range []uint16{attrIn, attrOut, attrPhysIn, attrPhysOut} {
		if index := interfaces[typ]; index != 0 {
			ae.Uint32(typ, index)
		}
	}
	ae.Uint32(attrSequence, 7)
	ae.Bytes(attrPayload, payload)
	data, err := ae.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return append([]byte{unix.AF_INET, 0, 0, 77}, data...)
}

func TestParseMessage(t *testing.T) {
	got, ok := parseMessage(message(t, "iabc", ip4(6, 0, 0, ports...), map[uint16]uint32{attrIn: 3, attrPhysIn: 9, attrOut: 3}))
	want := Packet{Prefix: "iabc", ToNode: true, In: 9, Out: 3, Src: from4, Dst: to4, Proto: 6, HasPorts: true, Sport: 40000, Dport: 80}
	if diff := cmp.Diff(want, got, packets); !ok || diff != "" {
		t.Error(ok, diff)
	}
	if !got.hasSequence || got.sequence != 7 {
		t.Errorf("sequence %d %v", got.sequence, got.hasSequence)
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range realMessages {
		data, err := hex.DecodeString(text)
		if err != nil {
			f.Fatal(err)
		}
		if _, ok := parseMessage(data); !ok {
			f.Errorf("a message of the kernel is not understood: %s", text)
		}
		f.Add(data)
	}
	f.Add(message(f, "eabc", ip6(0, []byte{60, 0, 0, 0, 0, 0, 0, 0}, []byte{44, 0, 0, 0, 0, 0, 0, 0}, []byte{17, 0, 0, 1, 0, 0, 0, 9}, ports), nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, ok := parseMessage(data)
		switch {
		case !ok:
		case !p.Src.IsValid() || p.Src.BitLen() != p.Dst.BitLen():
			t.Errorf("addresses %v and %v", p.Src, p.Dst)
		case p.HasPorts && (p.Later || p.HasICMP):
			t.Errorf("ports where there are none: %+v", p)
		}
	})
}
