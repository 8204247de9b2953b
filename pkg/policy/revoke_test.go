package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"os"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/tools/txtar"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// cutScenario is testdata/cut.txtar: web may connect to db:5432 only, db may connect to everybody.
func cutScenario(t *testing.T, without ...cluster.Key) ruleset.Ruleset {
	t.Helper()
	return Render(cutInput(t, without...)).Ruleset
}

func cutInput(t *testing.T, without ...cluster.Key) Input {
	t.Helper()
	data, err := os.ReadFile("testdata/cut.txtar")
	if err != nil {
		t.Fatal(err)
	}
	s := load(t, txtar.Parse(data))
	for _, k := range without {
		s.input.Model.Apply(cluster.Change{Key: k})
	}
	return s.input
}

// TestCutBeforeNAT holds what a client meets that goes on with a revoked connection to a Service, before DNAT.
func TestCutBeforeNAT(t *testing.T) {
	t.Parallel()
	in := cutInput(t)
	if rs := Render(in).Ruleset; CutsBeforeNAT(rs) {
		t.Errorf("there is a chain for every packet, and nothing is cut:\n%s", rs)
	}
	in.CutBeforeNAT = true
	rs := Render(in).Ruleset
	if !CutsBeforeNAT(rs) {
		t.Errorf("no chain looks at what is cut:\n%s", rs)
	}
	at := netip.MustParseAddrPort
	for _, c := range []Connection{
		{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("10.96.0.1:80"), BeforeNAT: true},
		{Proto: 6, Src: at("[fd00::1]:999"), Dst: at("[fd00:96::1]:80"), BeforeNAT: true},
	} {
		set, e := Cut(c)
		rs[0].Sets[set.Name].Elements[e] = ruleset.Verdict{}
	}
	const data, syn = ruleset.PSH | ruleset.ACK, ruleset.SYN
	for _, tt := range []struct {
		name     string
		proto    uint8
		src, dst string
		flags    uint8
		ct       ruleset.CTState
		reset    bool
	}{
		{name: "data", proto: 6, src: "10.0.0.1:999", dst: "10.96.0.1:80", flags: data, ct: ruleset.New, reset: true},
		{name: "IPv6 data", proto: 6, src: "[fd00::1]:999", dst: "[fd00:96::1]:80", flags: data, ct: ruleset.New, reset: true},
		{name: "a connection begins", proto: 6, src: "10.0.0.1:999", dst: "10.96.0.1:80", flags: syn, ct: ruleset.New},
		{name: "and has begun", proto: 6, src: "10.0.0.1:999", dst: "10.96.0.1:80", flags: data, ct: ruleset.Established},
		{name: "another port", proto: 6, src: "10.0.0.1:998", dst: "10.96.0.1:80", flags: data, ct: ruleset.New},
		{name: "another server", proto: 6, src: "10.0.0.1:999", dst: "10.0.0.2:80", flags: data, ct: ruleset.New},
		{name: "the answer", proto: 6, src: "10.96.0.1:80", dst: "10.0.0.1:999", flags: data, ct: ruleset.New},
		{name: "UDP", proto: 17, src: "10.0.0.1:999", dst: "10.96.0.1:80", ct: ruleset.New},
	} {
		src, dst := at(tt.src), at(tt.dst)
		got, err := rs.Trace("prerouting", ruleset.Packet{
			Src: src.Addr(), Dst: dst.Addr(), Proto: tt.proto, Sport: src.Port(), Dport: dst.Port(), TCPFlags: tt.flags, HopLimit: 64, CT: tt.ct,
		})
		if err != nil {
			t.Fatal(err)
		}
		reset := false
		if n := len(got.Steps); n > 0 {
			reset = slices.Contains(got.Steps[n-1].Rule.Exprs, ruleset.Expr(ruleset.Reject{TCPReset: true}))
		}
		if (got.Verdict == ruleset.Drop) != tt.reset || reset != tt.reset {
			t.Errorf("%s: %v, %v, want reset %v", tt.name, got.Verdict, got.Steps, tt.reset)
		}
	}
}

// TestRelated holds that what is related to a connection passes the policies of its sender, and what closes its receiver all the same.
func TestRelated(t *testing.T) {
	t.Parallel()
	in := linkInput("", true, false)
	in.Endpoints = append(in.Endpoints,
		Endpoint{ID: "closed", Name: "ns/closed", IPs: []netip.Addr{other4}, Link: "veth1"},
		Endpoint{ID: "brief", Name: "ns/brief", IPs: []netip.Addr{other6}, Link: "veth2", Brief: true})
	rs := Render(in).Ruleset
	for _, tt := range []struct {
		to   string
		link string
		want ruleset.VerdictKind
	}{
		{to: "192.0.2.1", link: "eth0", want: ruleset.Accept},
		{to: "2001:db8::1", link: "eth0", want: ruleset.Accept},
		{to: other4.String(), link: "veth1", want: ruleset.Drop},
		{to: other6.String(), link: "veth2", want: ruleset.Drop},
		{to: "10.0.0.99", link: "veth1", want: ruleset.Drop}, // which nobody has registered
	} {
		p := ruleset.Packet{Src: own4, Dst: netip.MustParseAddr(tt.to), Proto: ruleset.ProtoICMP, IIFName: "veth0", OIFName: tt.link, HopLimit: 64, CT: ruleset.Related}
		if p.Dst.Is6() {
			p.Src, p.Proto, p.ICMPv6Type = own6, ruleset.ProtoICMPv6, 1
		}
		if r, err := rs.Trace("forward", p); err != nil || r.Verdict != tt.want {
			t.Errorf("to %s: %v, want %v (%v)", tt.to, r, tt.want, err)
		}
	}
}

// TestCut holds what a connection whose conntrack entry has been deleted meets, whichever end speaks first.
func TestCut(t *testing.T) {
	t.Parallel()
	at := netip.MustParseAddrPort
	const data, syn = ruleset.PSH | ruleset.ACK, ruleset.SYN
	for _, tt := range []struct {
		name     string
		cut      []Connection
		hook     string
		proto    uint8
		src, dst string
		flags    uint8
		ct       ruleset.CTState // zero: new
		last     string          // chain that decides
		reject   bool            // by a reset
		accept   bool
	}{
		{
			name: "client of a revoked connection", hook: "forward", proto: 6, src: "10.0.0.1:999", dst: "10.0.0.2:80", flags: data, last: "cut", reject: true,
			cut: []Connection{{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("10.0.0.2:80")}},
		},
		{
			name: "server of a revoked connection", hook: "forward", proto: 6, src: "10.0.0.2:80", dst: "10.0.0.1:999", flags: data, last: "cut", reject: true,
			cut: []Connection{{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("10.0.0.2:80")}},
		},
		{
			name: "server of a revoked connection, as if it began one", hook: "forward", proto: 6, src: "10.0.0.2:80", dst: "10.0.0.1:999", flags: syn, last: "cut", reject: true,
			cut: []Connection{{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("10.0.0.2:80")}},
		},
		{
			name: "the reset of a revoked connection", hook: "output", proto: 6, src: "10.0.0.2:80", dst: "10.0.0.1:999", flags: ruleset.RST, ct: ruleset.Related, accept: true,
			cut: []Connection{{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("10.0.0.2:80")}},
		},
		{name: "the reset of a rejected connection", hook: "output", proto: 6, src: "10.0.0.2:80", dst: "10.0.0.1:999", flags: ruleset.RST | ruleset.ACK, ct: ruleset.Related, accept: true},
		{name: "the reset of an invalid packet", hook: "output", proto: 6, src: "10.0.0.2:80", dst: "10.0.0.1:999", flags: ruleset.RST, ct: ruleset.Invalid, accept: true},
		{name: "an ICMP error about an allowed connection", hook: "forward", proto: 1, src: "10.0.0.1:0", dst: "10.0.0.2:0", ct: ruleset.Related, accept: true},
		{name: "invalid", hook: "forward", proto: 6, src: "10.0.0.1:999", dst: "10.0.0.2:5432", flags: data, ct: ruleset.Invalid, last: "eg_shop-web"},
		{name: "invalid, from outside", hook: "forward", proto: 6, src: "192.0.2.1:999", dst: "10.0.0.2:5432", flags: data, ct: ruleset.Invalid, last: "notnew"},
		{name: "untracked", hook: "forward", proto: 6, src: "10.0.0.1:999", dst: "10.0.0.2:5432", flags: data, ct: ruleset.Untracked, accept: true},
		{
			name: "server of a revoked IPv6 connection", hook: "forward", proto: 6, src: "[fd00::2]:80", dst: "[fd00::1]:999", flags: data, last: "cut", reject: true,
			cut: []Connection{{Proto: 6, Src: at("[fd00::1]:999"), Dst: at("[fd00::2]:80")}},
		},
		{
			name: "server of a revoked UDP flow", hook: "forward", proto: 17, src: "10.0.0.2:80", dst: "10.0.0.1:999", last: "cut",
			cut: []Connection{{Proto: 17, Src: at("10.0.0.1:999"), Dst: at("10.0.0.2:80")}},
		},
		{
			name: "client, allowed again", hook: "forward", proto: 6, src: "10.0.0.1:999", dst: "10.0.0.2:5432", flags: data, accept: true,
			cut: []Connection{{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("10.0.0.2:5432")}},
		},
		{
			name: "a connection of its own between the same ends", hook: "forward", proto: 6, src: "10.0.0.2:81", dst: "10.0.0.1:999", flags: syn, accept: true,
			cut: []Connection{{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("10.0.0.2:80")}},
		},
		{
			name: "the node's end of a revoked connection", hook: "output", proto: 6, src: "192.168.1.1:80", dst: "10.0.0.1:999", flags: data, last: "cut", reject: true,
			cut: []Connection{{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("192.168.1.1:80"), ToNode: true}},
		},
		{
			name: "the pod's end of a revoked connection to the node", hook: "input", proto: 6, src: "10.0.0.1:999", dst: "192.168.1.1:80", flags: data, last: "cut", reject: true,
			cut: []Connection{{Proto: 6, Src: at("10.0.0.1:999"), Dst: at("192.168.1.1:80"), ToNode: true}},
		},

		{name: "forgotten, server speaks", hook: "forward", proto: 6, src: "10.0.0.2:80", dst: "10.0.0.1:999", flags: data, last: "midstream"},
		{name: "forgotten, somebody outside speaks to a pod that is isolated in egress", hook: "forward", proto: 6, src: "192.0.2.1:80", dst: "10.0.0.1:999", flags: data, last: "midstream"},
		{name: "forgotten, the node speaks", hook: "output", proto: 6, src: "192.168.1.1:80", dst: "10.0.0.1:999", flags: data, last: "midstream"},
		{name: "forgotten, client speaks", hook: "forward", proto: 6, src: "10.0.0.1:999", dst: "10.0.0.2:80", flags: data, last: "in_shop-db"},
		{name: "mid-stream of an allowed connection", hook: "forward", proto: 6, src: "10.0.0.1:999", dst: "10.0.0.2:5432", flags: data, accept: true},
		{name: "the node's own connection", hook: "output", proto: 6, src: "192.168.1.1:999", dst: "10.0.0.1:80", flags: syn, accept: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			rs := cutScenario(t)
			for _, c := range tt.cut {
				set, e := Cut(c)
				rs[0].Sets[set.Name].Elements[e] = ruleset.Verdict{}
			}
			src, dst := at(tt.src), at(tt.dst)
			got, err := rs.Trace(tt.hook, ruleset.Packet{
				Src: src.Addr(), Dst: dst.Addr(), Proto: tt.proto, Sport: src.Port(), Dport: dst.Port(), TCPFlags: tt.flags, HopLimit: 64, CT: cmp.Or(tt.ct, ruleset.New),
			})
			if err != nil {
				t.Fatal(err)
			}
			if tt.accept {
				if got.Verdict != ruleset.Accept {
					t.Errorf("dropped: %v", got.Steps)
				}
				return
			}
			if got.Verdict != ruleset.Drop || len(got.Steps) == 0 {
				t.Fatalf("passed: %v", got.Steps)
			}
			step := got.Steps[len(got.Steps)-1]
			_, reject := step.Rule.Exprs[len(step.Rule.Exprs)-1].(ruleset.Reject)
			if step.Chain != tt.last || reject != tt.reject {
				t.Errorf("ended by %s, want chain %s, reset %v", step, tt.last, tt.reject)
			}
		})
	}
}

// TestTightenedBy holds which endpoints' connections have to be looked at after a change.
func TestTightenedBy(t *testing.T) {
	t.Parallel()
	var (
		db  = cluster.Key{Kind: cluster.KindPolicy, Namespace: "shop", Name: "db"}
		web = cluster.Key{Kind: cluster.KindPolicy, Namespace: "shop", Name: "web"}
		ips = func(s ...string) []netip.Addr {
			var list []netip.Addr
			for _, a := range s {
				list = append(list, netip.MustParseAddr(a))
			}
			return list
		}
	)
	for _, tt := range []struct {
		name     string
		from, to []cluster.Key // what is left out
		want     Tightened
	}{
		{name: "nothing", from: []cluster.Key{db}, to: []cluster.Key{db}},
		{name: "a policy appears", from: []cluster.Key{db}, want: Tightened{Ingress: ips("10.0.0.2", "fd00::2")}},
		{name: "an egress policy appears", from: []cluster.Key{web}, want: Tightened{Egress: ips("10.0.0.1", "fd00::1")}},
		{name: "the last policy goes", to: []cluster.Key{db}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			from, to := cutScenario(t, tt.from...), cutScenario(t, tt.to...)
			got := TightenedBy(ruleset.Diff(from, to), to)
			if diff := gocmp.Diff(tt.want, got, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("a peer goes", func(t *testing.T) {
		t.Parallel()
		from := cutScenario(t)
		to := cutScenario(t)
		// The selector's set of db's addresses: only web's egress uses it.
		for _, s := range to[0].Sets {
			if s.Comment == "shop: app=db" {
				maps.DeleteFunc(s.Elements, func(ruleset.Elem, ruleset.Verdict) bool { return true })
			}
		}
		got := TightenedBy(ruleset.Diff(from, to), to)
		want := Tightened{Egress: ips("10.0.0.1", "fd00::1")}
		if diff := gocmp.Diff(want, got, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Error(diff)
		}
		if got := TightenedBy(ruleset.Diff(to, from), from); !got.Empty() {
			t.Errorf("a peer that comes tightens %v", got)
		}
	})
}

// TestUncut holds that what is in the kernel's sets can be read back.
func TestUncut(t *testing.T) {
	t.Parallel()
	for _, want := range []Connection{
		{Proto: 6, Src: netip.MustParseAddrPort("10.0.0.1:999"), Dst: netip.MustParseAddrPort("10.0.0.2:80")},
		{Proto: 17, Src: netip.MustParseAddrPort("[fd00::1]:53"), Dst: netip.MustParseAddrPort("[fd00::2]:65535")},
		{Proto: 6, Src: netip.MustParseAddrPort("10.0.0.1:999"), Dst: netip.MustParseAddrPort("10.96.0.1:80"), BeforeNAT: true},
	} {
		if got, ok := Uncut(Cut(want)); !ok || got != want {
			t.Errorf("%v became %v, %v", want, got, ok)
		}
	}
	for _, e := range []ruleset.Elem{"", "x", "some bytes"} {
		if c, ok := Uncut(CutSets()[0], e); ok {
			t.Errorf("%q became %v", e, c)
		}
	}
}
