package ruleset

import (
	"net/netip"
	"strings"
	"testing"
	"unicode/utf8"
)

// exprs is every expression in every form that is printed differently. nft must accept each of them: see TestTextLoads.
var exprs = []struct {
	name string
	rule Rule
	want string
}{
	{"interface", NewRule(Cmp{Field: IIFName, Value: "veth0"}), `iifname "veth0"`},
	{"not interface", NewRule(Not(Cmp{Field: IIFName, Value: "veth0"})), `iifname != "veth0"`},
	{"packet type host", NewRule(Equal(PktType, PktHost)), `meta pkttype host`},
	{"packet type broadcast", NewRule(Equal(PktType, PktBroadcast)), `meta pkttype broadcast`},
	{"packet type multicast", NewRule(Equal(PktType, PktMulticast)), `meta pkttype multicast`},
	{"packet type other", NewRule(Not(Equal(PktType, PktOther))), `meta pkttype != other`},
	{"ether type", NewRule(Equal16(EtherType, EtherARP)), `@ll,96,16 0x806`},
	{"protocol", NewRule(Equal(L4Proto, ProtoICMP)), `meta l4proto icmp`},
	{"protocol icmpv6", NewRule(Equal(L4Proto, ProtoICMPv6)), `meta l4proto ipv6-icmp`},
	{"protocol without a name", NewRule(Equal(L4Proto, 253)), `meta l4proto 253`},
	{"not protocol", NewRule(Not(Equal(L4Proto, ProtoUDP))), `meta l4proto != udp`},
	{"IPv4 source", NewRule(Address(IPSaddr, netip.MustParseAddr("10.0.0.1"))), `ip saddr 10.0.0.1`},
	{"IPv4 destination", NewRule(Not(Address(IPDaddr, netip.MustParseAddr("10.0.0.1")))), `ip daddr != 10.0.0.1`},
	{"IPv6 source", NewRule(Address(IP6Saddr, netip.MustParseAddr("fd00::1"))), `ip6 saddr fd00::1`},
	{"IPv6 destination", NewRule(Not(Address(IP6Daddr, netip.MustParseAddr("fd00::1")))), `ip6 daddr != fd00::1`},
	{"hop limit", NewRule(Equal(IP6HopLimit, 255)), `ip6 hoplimit 255`},
	{"ICMPv6 type", NewRule(Equal(ICMPv6Type, 135)), `icmpv6 type 135`},
	{"port behind tcp", NewRule(Equal(L4Proto, ProtoTCP), Equal16(Dport, 80)), `tcp dport 80`},
	{"port behind sctp", NewRule(Equal(L4Proto, ProtoSCTP), Equal16(Sport, 65535)), `sctp sport 65535`},
	{"not port", NewRule(Equal(L4Proto, ProtoUDP), Not(Equal16(Dport, 53))), `udp dport != 53`},
	{"ports", NewRule(Equal(L4Proto, ProtoTCP), Between16(Dport, 8000, 8090)), `tcp dport 8000-8090`},
	{"port away from its protocol", NewRule(Equal(L4Proto, ProtoUDP), Counter{}, Equal16(Dport, 53)), `meta l4proto udp counter th dport 53`},
	{"port behind another protocol", NewRule(Not(Equal(L4Proto, ProtoTCP)), Equal16(Dport, 53)), `meta l4proto != tcp th dport 53`},
	{"port behind an address that begins with tcp's number", NewRule(Address(IPSaddr, netip.MustParseAddr("6.0.0.1")), Equal16(Dport, 53)), `ip saddr 6.0.0.1 th dport 53`},
	{"two ports", NewRule(Equal(L4Proto, ProtoUDP), Equal16(Sport, 68), Equal16(Dport, 67)), `udp sport 68 th dport 67`},
	{"match before protocol", NewRule(Equal(IP6HopLimit, 1), Equal(L4Proto, ProtoTCP), Equal16(Dport, 80), To(Jump, "pi")), `ip6 hoplimit 1 tcp dport 80 jump pi`},
	{"prefix", NewRule(Prefix{Field: IPSaddr, Prefix: netip.MustParsePrefix("10.1.2.3/8")}), `ip saddr 10.0.0.0/8`},
	{"not prefix", NewRule(Prefix{Field: IP6Saddr, Not: true, Prefix: netip.MustParsePrefix("fe80::/10")}), `ip6 saddr != fe80::/10`},
	{"everything", NewRule(Prefix{Field: IPDaddr, Prefix: netip.MustParsePrefix("0.0.0.0/0")}), `ip daddr 0.0.0.0/0`},
	{"set", NewRule(In{Fields: []Field{IPSaddr}, Set: "p4"}), `ip saddr @p4`},
	{"not set", NewRule(In{Fields: []Field{IP6Saddr}, Not: true, Set: "b6"}), `ip6 saddr != @b6`},
	{"concatenation", NewRule(In{Fields: []Field{IPDaddr, L4Proto, Dport}, Set: "np4"}), `ip daddr . meta l4proto . th dport @np4`},
	{"verdict map", NewRule(Dispatch{Fields: []Field{IPSaddr}, Map: "eg4"}), `ip saddr vmap @eg4`},
	{"conntrack state", NewRule(Established | Related), `ct state established,related`},
	{"conntrack states", NewRule(Invalid | New | Untracked), `ct state invalid,new,untracked`},
	{"counter", NewRule(Counter{}), `counter`},
	{"limit for each", NewRule(LimitEach{Field: IP6Saddr, Set: "ed6", PerSecond: 10, Burst: 20}, Log{Prefix: "e", Group: 77, Snaplen: 96}), `update @ed6 { ip6 saddr counter limit rate 10/second burst 20 packets } log prefix "e" group 77 snaplen 96`},
	{"limit and log", NewRule(Limit{PerSecond: 10, Burst: 20}, Log{Prefix: "i01", Group: 77, Snaplen: 96}), `limit rate 10/second burst 20 packets log prefix "i01" group 77 snaplen 96`},
	{"reset", NewRule(Equal(L4Proto, ProtoTCP), Reject{TCPReset: true}), `meta l4proto tcp reject with tcp reset`},
	{"reject", NewRule(Reject{}), `reject with icmpx type admin-prohibited`},
	{"accept", NewRule(Verdict{Kind: Accept}), `accept`},
	{"drop", NewRule(Counter{}, Verdict{Kind: Drop}), `counter drop`},
	{"return", NewRule(Verdict{Kind: Return}), `return`},
	{"jump", NewRule(To(Jump, "pi")), `jump pi`},
	{"goto", NewRule(To(Goto, "pi")), `goto pi`},
	{"comment", NewRule(Verdict{Kind: Drop}).WithComment(`say "no"`), `drop comment "say _no_"`},
	{"comment alone", NewRule().WithComment("nothing"), `comment "nothing"`},
}

func TestExprText(t *testing.T) {
	t.Parallel()
	for _, tt := range exprs {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := tt.rule.String(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// A rule's text is its identity for Diff, so expressions that differ must not print the same.
func TestRulesThatDifferPrintDifferently(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	for _, tt := range exprs {
		if other, ok := seen[tt.rule.String()]; ok {
			t.Errorf("%q and %q are both %q", tt.name, other, tt.rule)
		}
		seen[tt.rule.String()] = tt.name
	}
	if v := (Verdict{}); v.String() != "" {
		t.Errorf("no verdict prints %q", v)
	}
}

func TestComment(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", ""},
		{"plain", "team-a/allow rule 1", "team-a/allow rule 1"},
		{"what nft cannot quote", "a\"b\\c\nd\te\x7ff", "a_b_c_d_e_f"},
		{"longest", strings.Repeat("x", 127), strings.Repeat("x", 127)},
		{"cut", strings.Repeat("x", 128), strings.Repeat("x", 127)},
		{"rune that fits", strings.Repeat("x", 125) + "é", strings.Repeat("x", 125) + "é"},
		{"rune not split", strings.Repeat("x", 126) + "é", strings.Repeat("x", 126)},
		{"nothing behind the cut", strings.Repeat("x", 126) + "éy", strings.Repeat("x", 126)},
		{"invalid UTF-8", "a\xffb", "a\ufffdb"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := Comment(tt.in); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if got := NewRule(Counter{}).WithComment(tt.in).Comment; got != tt.want {
				t.Errorf("rule: got %q, want %q", got, tt.want)
			}
		})
	}
}

func FuzzComment(f *testing.F) {
	f.Add("team-a/allow rule 1")
	f.Add(strings.Repeat("é", 70))
	f.Add("a\"b\\c\xff")
	f.Fuzz(func(t *testing.T, in string) {
		got := Comment(in)
		if len(got) > maxComment || !utf8.ValidString(got) || strings.ContainsAny(got, "\"\\\n") {
			t.Errorf("Comment(%q) = %q", in, got)
		}
		if again := Comment(got); again != got {
			t.Errorf("Comment(%q) = %q, and of that %q", in, got, again)
		}
	})
}
