package ruleset

import (
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var (
	inetTable   = TableID{Inet, "podwall"}
	netdevTable = TableID{Netdev, "podwall"}
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func set(name string, key ...KeyType) *Set {
	return &Set{Name: name, Key: key, Elements: map[Elem]Verdict{}}
}

// sample is a small node: one pod of both families, isolated both ways, on a bridge.
func sample() Ruleset {
	t := NewTable(inetTable)
	eg4, eg6, p4, p6, pt, nd, b4, b6 := set("eg4", IPv4Addr), set("eg6", IPv6Addr), set("p4", IPv4Addr), set("p6", IPv6Addr),
		set("pt", InetProto, InetService), set("nd", ICMPv6), set("b4", IPv4Addr), set("b6", IPv6Addr)
	np4, ed6, pr := set("np4", IPv4Addr, InetProto, InetService), set("ed6", IPv6Addr), set("pr", InetService)
	for _, s := range []*Set{eg4, eg6, p4, p6, pt, nd, b4, b6, np4, ed6, pr} {
		t.Sets[s.Name] = s
	}
	eg4.Map, eg6.Map = true, true
	eg4.Elements[AddrElem(addr("10.244.0.2"))] = To(Goto, "eg_1")
	eg4.Elements[AddrElem(addr("10.244.0.3"))] = Verdict{Kind: Drop}
	eg6.Elements[AddrElem(addr("fd00:10::2"))] = To(Goto, "eg_1")
	p4.Comment = "pods app=web"
	p4.Elements[AddrElem(addr("10.244.0.10"))] = Verdict{}
	p4.Elements[AddrElem(addr("10.244.0.9"))] = Verdict{}
	pt.Elements[PortElem(ProtoTCP, 443)] = Verdict{}
	pt.Elements[PortElem(253, 1)] = Verdict{}
	np4.Elements[AddrPortElem(addr("10.244.0.9"), ProtoSCTP, 5000)] = Verdict{}
	nd.Elements[Elem([]byte{135})] = Verdict{}
	ed6.Dynamic, ed6.Timeout, ed6.Size = true, 10*time.Minute, 100
	b4.Interval, b6.Interval, pr.Interval = true, true, true
	pr.Elements[PortRangeElem(0, 80)] = Verdict{}
	pr.Elements[PortRangeElem(443, 443)] = Verdict{}
	pr.Elements[PortRangeElem(60000, 65535)] = Verdict{}
	b4.Elements[RangeElem(addr("10.0.0.0"), addr("10.0.0.0"))] = Verdict{}
	b4.Elements[RangeElem(addr("10.1.0.0"), addr("10.255.255.255"))] = Verdict{}
	b4.Elements[RangeElem(addr("224.0.0.0"), addr("255.255.255.255"))] = Verdict{}
	b6.Elements[RangeElem(addr("::"), addr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"))] = Verdict{}
	t.Chains["egress"] = &Chain{Name: "egress", Hook: &Hook{Name: "forward", Priority: -1}, Rules: []Rule{
		NewRule(Established|Related, Verdict{Kind: Accept}),
		NewRule(In{Fields: []Field{ICMPv6Type}, Set: "nd"}, Equal(IP6HopLimit, 255), Verdict{Kind: Accept}),
		NewRule(Dispatch{Fields: []Field{IPSaddr}, Map: "eg4"}),
		NewRule(Dispatch{Fields: []Field{IP6Saddr}, Map: "eg6"}),
	}}
	t.Chains["eg_1"] = &Chain{Name: "eg_1", Rules: []Rule{
		NewRule(Invalid, Counter{}, Verdict{Kind: Drop}),
		NewRule(To(Jump, "pe_1")).WithComment("default/web"),
		NewRule(Limit{10, 20}, Log{Prefix: "e1", Group: 77, Snaplen: 96}),
		NewRule(Counter{}, Verdict{Kind: Drop}),
	}}
	t.Chains["pe_1"] = &Chain{Name: "pe_1", Rules: []Rule{
		NewRule(Equal(L4Proto, ProtoTCP), Equal16(Dport, 80), In{Fields: []Field{IPDaddr}, Set: "p4"}, Verdict{Kind: Accept}),
		NewRule(In{Fields: []Field{IPDaddr, L4Proto, Dport}, Set: "np4"}, Verdict{Kind: Accept}),
		NewRule(In{Fields: []Field{IPDaddr}, Set: "b4"}, Verdict{Kind: Accept}),
		NewRule(Equal(L4Proto, ProtoTCP), In{Fields: []Field{Dport}, Set: "pr"}, Verdict{Kind: Accept}),
	}}
	n := NewTable(netdevTable)
	n.Chains["ve_1"] = &Chain{Name: "ve_1", Hook: &Hook{Name: "ingress", Priority: -300, Device: "lo"}, Rules: []Rule{
		NewRule(Equal16(EtherType, EtherARP), Verdict{Kind: Accept}),
	}}
	return Ruleset{t, n}
}

func TestGoldenText(t *testing.T) {
	t.Parallel()
	path := filepath.Join("testdata", "sample.golden")
	got := sample().String()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("text (-want +got):\n%s", d)
	}
}

func TestTableLookup(t *testing.T) {
	t.Parallel()
	r := sample()
	if got := r.Table(netdevTable); got != r[1] {
		t.Errorf("Table(%v) = %v", netdevTable, got)
	}
	if got := r.Table(TableID{Inet, "other"}); got != nil {
		t.Errorf("a table that is not there: %v", got)
	}
}

// nftCheck has the kernel judge a ruleset in a network namespace of its own.
func nftCheck(t *testing.T, text string) {
	t.Helper()
	needRoot(t)
	cmd := exec.Command("unshare", "--net", "nft", "--check", "--file", "-")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("nft refuses the text: %v\n%s\n%s", err, out, text)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft to judge the text")
	}
}

func TestTextLoads(t *testing.T) {
	t.Parallel()
	t.Run("sample", func(t *testing.T) {
		t.Parallel()
		nftCheck(t, sample().String())
	})
	t.Run("every expression", func(t *testing.T) {
		t.Parallel()
		r := sample()
		every := &Chain{Name: "every"} // "all" is one of nft's keywords
		for _, e := range exprs {
			if len(e.rule.Exprs) > 0 { // nft wants at least one
				every.Rules = append(every.Rules, e.rule)
			}
		}
		r[0].Chains["every"] = every
		r[0].Chains["pi"] = &Chain{Name: "pi"}
		nftCheck(t, r.String())
	})
}
