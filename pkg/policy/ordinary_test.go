package policy

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// TestOrdinaryPacketsOnly holds the rules that a veth's chains begin with to what they are for: they are quicker, and decide nothing
// that the rules behind them would not. The same for what TCP passes by in the base chains.
func TestOrdinaryPacketsOnly(t *testing.T) {
	own4, own6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	gateway := netip.MustParseAddr("fe80::1")
	addrs4 := []netip.Addr{own4, netip.MustParseAddr("10.0.0.2"), netip.IPv4Unspecified(), broadcast, netip.MustParseAddr("224.0.0.1"), netip.MustParseAddr("240.0.0.1"), netip.MustParseAddr("223.255.255.255")}
	addrs6 := []netip.Addr{own6, netip.MustParseAddr("fd00::2"), netip.IPv6Unspecified(), gateway, netip.MustParseAddr("fe80::2"), netip.MustParseAddr("ff02::1"), netip.MustParseAddr("feff::1")}
	endpoints := []Endpoint{
		{ID: "e", Name: "ns/e", IPs: []netip.Addr{own4, own6}, Link: "veth"},
		{ID: "e", Name: "ns/e", IPs: []netip.Addr{own4, own6}, Link: "veth", Bridge: "br", Gateways: []netip.Addr{gateway, addrs4[1]}},
		{ID: "e", Name: "ns/e", IPs: []netip.Addr{own4, gateway}, Link: "veth", Bridge: "br", Gateways: []netip.Addr{gateway, own4}},
		{ID: "e", Name: "ns/e", IPs: []netip.Addr{own6}, Link: "veth", Bridge: "br"},
		{ID: "e", Name: "ns/e", IPs: []netip.Addr{own4, addrs4[1], own6}, Link: "veth"},
	}
	packets := rapid.Custom(func(t *rapid.T) ruleset.Packet {
		addrs := rapid.SampledFrom([][]netip.Addr{addrs4, addrs6}).Draw(t, "family")
		address := rapid.SampledFrom(addrs)
		return ruleset.Packet{
			IIFName: "veth", OIFName: "veth", Src: address.Draw(t, "source"), Dst: address.Draw(t, "destination"),
			EtherType:  rapid.SampledFrom([]uint16{0, 0, 0, 0, ruleset.EtherARP, 0x8100, 0x88cc}).Draw(t, "ethertype"),
			PktType:    rapid.SampledFrom([]uint8{ruleset.PktHost, ruleset.PktOther}).Draw(t, "pkttype"),
			Proto:      rapid.SampledFrom([]uint8{ruleset.ProtoTCP, ruleset.ProtoUDP, ruleset.ProtoICMP, ruleset.ProtoICMPv6, ruleset.ProtoICMPv6, 0}).Draw(t, "protocol"),
			Sport:      rapid.SampledFrom([]uint16{67, 68, 546, 8080}).Draw(t, "sport"),
			Dport:      rapid.SampledFrom([]uint16{67, 68, 547, 8080}).Draw(t, "dport"),
			ICMPv6Type: rapid.SampledFrom([]uint8{128, 133, 134, 135, 136, 137, 143}).Draw(t, "type"),
			HopLimit:   rapid.SampledFrom([]uint8{1, 64, 255}).Draw(t, "hoplimit"),
			ARPSaddr:   rapid.SampledFrom(addrs4).Draw(t, "ARP source"),
			NDTarget:   rapid.SampledFrom(addrs6).Draw(t, "target"),
			CT:         ruleset.New,
		}
	})
	verdict := func(t *rapid.T, hook string, rules []ruleset.Rule, p ruleset.Packet) ruleset.VerdictKind {
		table := ruleset.NewTable(ruleset.TableID{Family: ruleset.Netdev, Name: "podwall"})
		addICMPv6Sets(table)
		table.Chains["x"] = &ruleset.Chain{Name: "x", Hook: &ruleset.Hook{Name: hook, Device: "veth"}, Rules: rules}
		result, err := ruleset.Ruleset{table}.Trace(hook, p)
		if err != nil {
			t.Fatal(err)
		}
		return result.Verdict
	}
	others := func(r ruleset.Rule) bool { return r.Exprs[len(r.Exprs)-1] != ruleset.Expr(accept) }
	base := Render(Input{Model: cluster.NewModel(), Options: Options{Table: "podwall"}}).Ruleset[0]
	closed := append(slices.Clone(base.Chains[chainCommon].Rules), ruleset.NewRule(drop))
	rapid.Check(t, func(t *rapid.T) {
		e := rapid.SampledFrom(endpoints).Draw(t, "endpoint")
		p := packets.Draw(t, "packet")
		isolated := rapid.Bool().Draw(t, "isolated")
		for _, c := range []struct {
			hook  string
			rules []ruleset.Rule
		}{{"ingress", sourceRules(&e, isolated)}, {"egress", deliverRules(&e)}} {
			// The first rules accept; the others are known to be complete, and begin with the first one of another kind.
			n := slices.IndexFunc(c.rules, others)
			if c.hook == "egress" {
				n = len(e.IPs)
			}
			if got, want := verdict(t, c.hook, c.rules, p), verdict(t, c.hook, c.rules[n:], p); got != want {
				t.Errorf("at %s: verdict %v with the first %d rules, %v without", c.hook, got, n, want)
			}
		}
		p.Proto, p.EtherType = ruleset.ProtoTCP, 0
		if got := verdict(t, "ingress", closed, p); got != ruleset.Drop {
			t.Errorf("chain %s accepts TCP", chainCommon)
		}
	})
}
