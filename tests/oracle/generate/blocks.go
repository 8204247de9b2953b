package generate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"

	"github.com/podwall/podwall/tests/oracle/layout"
)

// addresses are all that the layout has, IPv4 and IPv6.
var addresses = func() []netip.Addr {
	var list []netip.Addr
	for _, p := range layout.Places {
		list = append(list, p.IPs...)
	}
	return slices.Concat(list, layout.RemotePods, layout.Outside, layout.Node)
}()

var (
	lengths4 = []int{0, 0, 0, 8, 8, 16, 23, 24, 28, 31, 32}
	lengths6 = []int{0, 0, 0, 8, 16, 32, 63, 64, 112, 124, 127, 128}
)

// block draws an ipBlock around an address, with excepts around the same or other addresses inside of it: they nest, overlap
// and repeat.
func (m *maker) block() *networkingv1.IPBlock {
	if m.oneIn(16) {
		return m.unreadable()
	}
	cidr := m.prefix(pick(m, addresses), 0)
	b := &networkingv1.IPBlock{CIDR: m.text(cidr)}
	if cidr.IsSingleIP() {
		return b
	}
	inside := slices.DeleteFunc(slices.Clone(addresses), func(ip netip.Addr) bool { return !cidr.Contains(ip) })
	for range pick(m, []int{0, 1, 2, 3, 1, 2, 3, 2}) {
		b.Except = append(b.Except, m.text(m.prefix(pick(m, inside), cidr.Bits()+1)))
	}
	if len(b.Except) > 0 && m.oneIn(6) {
		b.Except = append(b.Except, b.Except[0])
	}
	return b
}

// prefix draws a CIDR around an address that is at least so long; a single address is always long enough.
func (m *maker) prefix(ip netip.Addr, least int) netip.Prefix {
	lengths := lengths4
	if ip.Is6() {
		lengths = lengths6
	}
	i, _ := slices.BinarySearch(lengths, least)
	return netip.PrefixFrom(ip, pick(m, lengths[i:]))
}

// unreadable draws what cannot be read, as a block or as an except. The API refuses both; files have not been through it.
func (m *maker) unreadable() *networkingv1.IPBlock {
	bad := pick(m, []string{"10.0.0.0/33", "10.244.0.0", "fd00::/129", ""})
	if m.oneIn(2) {
		return &networkingv1.IPBlock{CIDR: "0.0.0.0/0", Except: []string{bad}}
	}
	return &networkingv1.IPBlock{CIDR: bad}
}

// manyBlocks draws more ranges than podwall writes as rules: every second or third address from a place's on, as blocks of
// their own or as excepts of one. Few places, so that two such lists often begin alike.
func (m *maker) manyBlocks() []networkingv1.NetworkPolicyPeer {
	place, family := pick(m, []int{0, 0, 4}), 0
	if m.oneIn(3) {
		family = 1
	}
	ip, whole := layout.Places[place].IPs[family], &networkingv1.IPBlock{CIDR: []string{"10.0.0.0/8", "fd00::/8"}[family]}
	var single []networkingv1.NetworkPolicyPeer
	step := m.between(2, 3)
	for range m.between(17, 20) {
		text := netip.PrefixFrom(ip, ip.BitLen()).String()
		whole.Except = append(whole.Except, text)
		single = append(single, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: text}})
		for range step {
			ip = ip.Next()
		}
	}
	if m.oneIn(2) {
		return single
	}
	return []networkingv1.NetworkPolicyPeer{{IPBlock: whole}}
}

// text writes a CIDR as people do: mostly right, sometimes with host bits, leading zeros, as IPv4-mapped IPv6 or in capitals.
func (m *maker) text(p netip.Prefix) string {
	switch m.between(0, 9) {
	case 6:
		return p.String() // host bits
	case 7:
		if !p.Addr().Is4() {
			return strings.ToUpper(p.Masked().Addr().StringExpanded()) + fmt.Sprintf("/%03d", p.Bits())
		}
		b := p.Masked().Addr().As4()
		return fmt.Sprintf("%03d.%03d.%03d.%03d/%02d", b[0], b[1], b[2], b[3], p.Bits())
	case 8:
		if p.Addr().Is4() {
			return fmt.Sprintf("::ffff:%s/%d", p.Masked().Addr(), 96+p.Bits())
		}
	}
	return p.Masked().String()
}
