package ruleset

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

var (
	accept = Verdict{Kind: Accept}
	drop   = Verdict{Kind: Drop}

	tcp4 = Packet{
		IIFName: "veth0", PktType: PktHost, Src: addr("10.0.0.1"), Dst: addr("10.0.0.2"), Proto: ProtoTCP, Sport: 40000, Dport: 80,
		CT: New,
	}
	icmp6 = Packet{
		IIFName: "veth0", Src: addr("fd00::1"), Dst: addr("fd00::2"), Proto: ProtoICMPv6, ICMPv6Type: 135, HopLimit: 255, CT: Untracked,
	}
	arp = Packet{IIFName: "veth0", EtherType: EtherARP, PktType: PktBroadcast}
)

// TestTraceMatch has one drop rule behind each match: who meets it?
func TestTraceMatch(t *testing.T) {
	t.Parallel()
	p4 := withAddrs(set("p4", IPv4Addr), "10.0.0.1")
	b4 := set("b4", IPv4Addr)
	b4.Interval = true
	b4.Elements[RangeElem(addr("10.0.0.1"), addr("10.0.0.1"))] = Verdict{}
	b4.Elements[RangeElem(addr("10.0.0.3"), addr("10.0.0.9"))] = Verdict{}
	np4 := set("np4", IPv4Addr, InetProto, InetService)
	np4.Elements[AddrPortElem(addr("10.0.0.2"), ProtoTCP, 80)] = Verdict{}
	m := set("m", IPv4Addr)
	m.Map = true
	m.Elements[AddrElem(addr("10.0.0.1"))] = drop

	with := func(p Packet, change func(*Packet)) Packet {
		change(&p)
		return p
	}
	for _, tt := range []struct {
		name   string
		match  Expr
		packet Packet
		want   bool
	}{
		{"interface", Cmp{Field: IIFName, Value: "veth0"}, tcp4, true},
		{"other interface", Cmp{Field: IIFName, Value: "veth"}, tcp4, false},
		{"not interface", Not(Cmp{Field: IIFName, Value: "veth0"}), tcp4, false},
		{"packet type", Equal(PktType, PktBroadcast), arp, true},
		{"not packet type", Not(Equal(PktType, PktHost)), tcp4, false},
		{"ether type of an address", Equal16(EtherType, EtherIPv6), icmp6, true},
		{"ether type", Equal16(EtherType, EtherARP), arp, true},
		{"not ether type", Not(Equal16(EtherType, EtherIPv4)), arp, true},
		{"no ether type", Not(Equal16(EtherType, EtherIPv4)), Packet{}, false},
		{"protocol", Equal(L4Proto, ProtoTCP), tcp4, true},
		{"not protocol", Not(Equal(L4Proto, ProtoUDP)), tcp4, true},
		{"not protocol of ARP", Not(Equal(L4Proto, ProtoUDP)), arp, false},
		{"source", Address(IPSaddr, addr("10.0.0.1")), tcp4, true},
		{"destination", Address(IPDaddr, addr("10.0.0.1")), tcp4, false},
		{"IPv6 source", Address(IP6Saddr, addr("fd00::1")), icmp6, true},
		{"IPv6 destination", Address(IP6Daddr, addr("fd00::2")), icmp6, true},
		{"not IPv6 source of IPv4", Not(Address(IP6Saddr, addr("fd00::1"))), tcp4, false},
		{"not IPv4 source of IPv6", Not(Address(IPSaddr, addr("10.0.0.1"))), icmp6, false},
		{"not IPv4 source of ARP", Not(Address(IPSaddr, addr("10.0.0.9"))), with(arp, func(p *Packet) { p.Src, p.Dst = tcp4.Src, tcp4.Dst }), false},
		{"not IPv6 source of ARP", Not(Address(IP6Saddr, addr("fd00::9"))), with(arp, func(p *Packet) { p.Src, p.Dst = icmp6.Src, icmp6.Dst }), false},
		{"hop limit", Equal(IP6HopLimit, 255), icmp6, true},
		{"hop limit of IPv4", Not(Equal(IP6HopLimit, 255)), tcp4, false},
		{"ICMPv6 type", Equal(ICMPv6Type, 135), icmp6, true},
		{"ICMPv6 type of TCP", Equal(ICMPv6Type, 0), tcp4, false},
		{"ICMPv6 type in IPv4", Equal(ICMPv6Type, 135), with(tcp4, func(p *Packet) { p.Proto, p.ICMPv6Type = ProtoICMPv6, 135 }), false},
		{"port", Equal16(Dport, 80), tcp4, true},
		{"source port", Equal16(Sport, 80), tcp4, false},
		{"not port", Not(Equal16(Dport, 80)), tcp4, false},
		{"not port of ICMP", Not(Equal16(Dport, 80)), icmp6, false},
		{"unknown field", Not(Equal(Field(99), 1)), tcp4, false},
		{"prefix", Prefix{Field: IPSaddr, Prefix: netip.MustParsePrefix("10.9.9.9/8")}, tcp4, true},
		{"not prefix", Prefix{Field: IPSaddr, Not: true, Prefix: netip.MustParsePrefix("10.0.0.0/8")}, tcp4, false},
		{"everything", Prefix{Field: IP6Saddr, Prefix: netip.MustParsePrefix("::/0")}, icmp6, true},
		{"not prefix of the other family", Prefix{Field: IP6Saddr, Not: true, Prefix: netip.MustParsePrefix("fe80::/10")}, tcp4, false},
		{"range below", Between16(Dport, 81, 90), tcp4, false},
		{"range from", Between16(Dport, 80, 90), tcp4, true},
		{"range to", Between16(Dport, 79, 80), tcp4, true},
		{"range above", Between16(Dport, 1, 79), tcp4, false},
		{"range of ICMP", Between16(Dport, 0, 65535), icmp6, false},
		{"set", In{Fields: []Field{IPSaddr}, Set: "p4"}, tcp4, true},
		{"miss", In{Fields: []Field{IPDaddr}, Set: "p4"}, tcp4, false},
		{"not in set", In{Fields: []Field{IPDaddr}, Not: true, Set: "p4"}, tcp4, true},
		{"not in set without the field", In{Fields: []Field{IPSaddr}, Not: true, Set: "p4"}, icmp6, false},
		{"interval set", In{Fields: []Field{IPSaddr}, Set: "b4"}, tcp4, true},
		{"between intervals", In{Fields: []Field{IPDaddr}, Set: "b4"}, tcp4, false},
		{"not between intervals", In{Fields: []Field{IPDaddr}, Not: true, Set: "b4"}, tcp4, true},
		{"concatenation", In{Fields: []Field{IPDaddr, L4Proto, Dport}, Set: "np4"}, tcp4, true},
		{"concatenation, other port", In{Fields: []Field{IPDaddr, L4Proto, Sport}, Set: "np4"}, tcp4, false},
		{"verdict map", Dispatch{Fields: []Field{IPSaddr}, Map: "m"}, tcp4, true},
		{"verdict map miss", Dispatch{Fields: []Field{IPDaddr}, Map: "m"}, tcp4, false},
		{"verdict map without the field", Dispatch{Fields: []Field{IPSaddr}, Map: "m"}, icmp6, false},
		{"conntrack state", Established | New, tcp4, true},
		{"other conntrack state", Established | Related, tcp4, false},
		{"no conntrack state", Invalid | Established | Related | New | Untracked, arp, false},
		{"counter", Counter{}, tcp4, true},
		{"limit", Limit{PerSecond: 1, Burst: 1}, tcp4, true},
		{"log", Log{Prefix: "x"}, tcp4, true},
		{"reject", Reject{}, tcp4, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			rule := NewRule(tt.match, drop)
			if _, ok := tt.match.(Dispatch); ok {
				rule = NewRule(tt.match)
			}
			table := NewTable(netdevTable)
			for _, s := range []*Set{p4, b4, np4, m} {
				table.Sets[s.Name] = s
			}
			table.Chains["f"] = &Chain{Name: "f", Hook: &Hook{Name: "ingress", Device: tt.packet.IIFName}, Rules: []Rule{rule}}
			got, err := Ruleset{table}.Trace("ingress", tt.packet)
			if err != nil {
				t.Fatal(err)
			}
			if (got.Verdict == Drop) != tt.want || (len(got.Steps) == 1) != tt.want {
				t.Errorf("%s: matched %v, want %v (%v)", rule, got.Verdict == Drop, tt.want, got.Steps)
			}
		})
	}
}

func TestTracePath(t *testing.T) {
	t.Parallel()
	jump := func(name string) Rule { return NewRule(To(Jump, name)) }
	end := func(v Verdict) Rule { return NewRule(v) }
	count := NewRule(Counter{})
	hooked := func(hook string, priority int, device string, rules ...Rule) *Chain {
		return &Chain{Name: fmt.Sprintf("%s%d%s", hook, priority, device), Hook: &Hook{Name: hook, Priority: priority, Device: device}, Rules: rules}
	}
	device := inet(hooked("ingress", 0, "veth0", end(drop)), hooked("egress", 0, "veth1", NewRule(Cmp{Field: IIFName}, drop)))
	for _, tt := range []struct {
		name    string
		ruleset Ruleset
		hook    string // default forward
		packet  Packet // default tcp4
		want    VerdictKind
		steps   []string
	}{
		{name: "no table", want: Accept},
		{name: "another hook", ruleset: inet(hooked("input", 0, "", end(drop))), want: Accept},
		{name: "policy accept", ruleset: inet(base("f", 0, "", count)), want: Accept, steps: []string{"f: counter"}},
		{name: "rule that says nothing", ruleset: inet(base("f", 0, "", NewRule())), want: Accept, steps: []string{"f: "}},
		{
			name:    "accept ends only its own base chain",
			ruleset: inet(base("z", -1, "", end(accept), end(drop)), base("a", 0, "", end(drop))),
			want:    Drop, steps: []string{"z: accept", "a: drop"},
		},
		{
			name:    "drop ends all",
			ruleset: inet(base("z", -1, "", end(drop)), base("a", 0, "", end(accept))),
			want:    Drop, steps: []string{"z: drop"},
		},
		{
			name:    "return ends a base chain",
			ruleset: inet(base("f", 0, "", end(Verdict{Kind: Return}), end(drop))),
			want:    Accept, steps: []string{"f: return"},
		},
		{
			name:    "jump comes back at the end and at a return",
			ruleset: inet(base("f", 0, "", jump("a"), jump("b"), end(drop)), chain("a", count), chain("b", end(Verdict{Kind: Return}), end(accept))),
			want:    Drop, steps: []string{"f: jump a", "a: counter", "f: jump b", "b: return", "f: drop"},
		},
		{
			name:    "accept below a jump ends the base chain",
			ruleset: inet(base("f", 0, "", jump("a"), end(drop)), chain("a", jump("b"), end(drop)), chain("b", end(accept))),
			want:    Accept, steps: []string{"f: jump a", "a: jump b", "b: accept"},
		},
		{
			name:    "goto does not come back",
			ruleset: inet(base("f", 0, "", NewRule(To(Goto, "a")), end(drop)), chain("a", count)),
			want:    Accept, steps: []string{"f: goto a", "a: counter"},
		},
		{
			name:    "goto below a jump comes back to the jump",
			ruleset: inet(base("f", 0, "", jump("a"), end(drop)), chain("a", NewRule(To(Goto, "b")), end(accept)), chain("b", end(Verdict{Kind: Return}))),
			want:    Drop, steps: []string{"f: jump a", "a: goto b", "b: return", "f: drop"},
		},
		{
			name: "verdict map, and a miss goes on",
			ruleset: inet(vmap("m", "a", "10.0.0.1"), base("f", 0, "", NewRule(Dispatch{Fields: []Field{IPDaddr}, Map: "m"}),
				NewRule(Dispatch{Fields: []Field{IPSaddr}, Map: "m"})), chain("a", end(drop))),
			want: Drop, steps: []string{"f: ip saddr vmap @m -> goto a", "a: drop"},
		},
		{
			name:    "reject drops",
			ruleset: inet(base("f", 0, "", NewRule(Counter{}, Reject{}), end(accept))),
			want:    Drop, steps: []string{"f: counter reject with icmpx type admin-prohibited"},
		},
		{name: "device", ruleset: device, hook: "ingress", want: Drop, steps: []string{"ingress0veth0: drop"}},
		{name: "other device", ruleset: device, hook: "ingress", packet: Packet{IIFName: "veth1", Src: addr("10.0.0.1")}, want: Accept},
		{
			name: "egress goes by the output device and has no input device", ruleset: device, hook: "egress",
			packet: Packet{IIFName: "veth0", OIFName: "veth1", Src: addr("10.0.0.1")},
			want:   Drop, steps: []string{`egress0veth1: iifname "" drop`},
		},
		{
			name:    "inet sees no ARP, netdev does",
			ruleset: Ruleset{device[0], {ID: netdevTable, Chains: map[string]*Chain{"ingress1veth0": hooked("ingress", 1, "veth0", count)}}},
			hook:    "ingress", packet: arp,
			want: Accept, steps: []string{"ingress1veth0: counter"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if tt.hook == "" {
				tt.hook = "forward"
			}
			if tt.packet == (Packet{}) {
				tt.packet = tcp4
			}
			got, err := tt.ruleset.Trace(tt.hook, tt.packet)
			if err != nil {
				t.Fatal(err)
			}
			var steps []string
			for _, s := range got.Steps {
				steps = append(steps, s.String())
			}
			if got.Verdict != tt.want {
				t.Errorf("verdict %q, want %q", Verdict{Kind: got.Verdict}, Verdict{Kind: tt.want})
			}
			if d := cmp.Diff(tt.steps, steps); d != "" {
				t.Errorf("steps (-want +got):\n%s", d)
			}
		})
	}
}

// nested returns a base chain and n chains that call each other in a row.
func nested(n int, kind VerdictKind) Ruleset {
	objects := []any{base("f", 0, "", NewRule(To(kind, "c1")))}
	for i := 1; i < n; i++ {
		objects = append(objects, chain(fmt.Sprintf("c%d", i), NewRule(To(kind, fmt.Sprintf("c%d", i+1)))))
	}
	return inet(append(objects, chain(fmt.Sprintf("c%d", n), NewRule(drop)))...)
}

func TestTraceDepth(t *testing.T) {
	t.Parallel()
	for _, kind := range []VerdictKind{Jump, Goto} {
		for n, ok := range map[int]bool{15: true, 16: false} {
			t.Run(fmt.Sprintf("%s%d", Verdict{Kind: kind}, n), func(t *testing.T) {
				t.Parallel()
				r := nested(n, kind)
				if got, err := r.Trace("forward", tcp4); ok != (err == nil && got.Verdict == Drop) {
					t.Errorf("got %v, %v", got.Verdict, err)
				}
				needRoot(t)
				cmd := exec.Command("unshare", "--net", "nft", "--file", "-") // a check alone does not validate jumps
				cmd.Stdin = strings.NewReader(r.String())
				if out, err := cmd.CombinedOutput(); ok != (err == nil) {
					t.Errorf("the kernel does not agree: %v %s", err, out)
				}
			})
		}
	}
}

func TestTraceErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		ruleset Ruleset
		want    string
	}{
		{"no chain", inet(base("f", 0, "", NewRule(To(Jump, "x")))), "trace table inet podwall: no chain x"},
		{"no set", inet(base("f", 0, "", NewRule(In{Fields: []Field{IPSaddr}, Set: "x"}, drop))), `trace table inet podwall: chain f: rule "ip saddr @x drop": no set x`},
		{"no map", inet(base("f", 0, "", NewRule(Dispatch{Fields: []Field{IPSaddr}, Map: "x"}))), `trace table inet podwall: chain f: rule "ip saddr vmap @x": no set x`},
		{"chain not read", inet(base("f", 0, "", NewRule(To(Jump, "x"))), &Chain{Name: "x", Unknown: true}), "trace table inet podwall: the rules of chain x could not be read"},
		{"loop", inet(base("f", 0, "", NewRule(To(Jump, "x"))), chain("x", NewRule(To(Goto, "x")))), "trace table inet podwall: chain x is called more than 15 levels deep"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := tt.ruleset.Trace("forward", tcp4)
			if err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

// TestTraceAgainstKernel draws rulesets and packets, loads the text and sends the packets over lo. The hook is output,
// because there the sender learns the verdict at once: a dropped packet is EPERM.
func TestTraceAgainstKernel(t *testing.T) {
	t.Parallel()
	needRoot(t)
	// The thread is never unlocked: it and its namespace end with this goroutine.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("unshare network namespace: %v", err)
	}
	script := "ip link set lo up\n"
	for _, a := range kernelAddrs {
		if a.Is6() {
			script += fmt.Sprintf("ip -6 addr add %s/128 dev lo nodad\n", a)
		}
	}
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("set lo up: %v: %s", err, out)
	}
	id := uint16(0)
	rapid.Check(t, func(rt *rapid.T) {
		ruleset := genKernelRuleset(rt)
		load := exec.Command("nft", "--file", "-")
		load.Stdin = strings.NewReader("flush ruleset\n" + ruleset.String())
		if out, err := load.CombinedOutput(); err != nil {
			rt.Fatalf("load: %v: %s\n%s", err, out, ruleset)
		}
		for range 10 {
			p := genKernelPacket(rt)
			want, err := ruleset.Trace("output", p)
			if err != nil {
				rt.Fatalf("trace: %v\n%s", err, ruleset)
			}
			id++ // another ICMP conversation each time, or conntrack calls it established
			got, err := send(p, id)
			if err != nil {
				rt.Fatalf("send %+v: %v", p, err)
			}
			if got != want.Verdict {
				rt.Fatalf("%+v:\nkernel %s, trace %s by %v\n%s", p, Verdict{Kind: got}, Verdict{Kind: want.Verdict}, want.Steps, ruleset)
			}
		}
	})
}

var (
	kernelAddrs = []netip.Addr{addr("127.0.0.1"), addr("127.0.0.2"), addr("127.0.0.3"), addr("fd00::1"), addr("fd00::2"), addr("fd00::3")}
	// A port is never both: an answer to an earlier packet would be established.
	kernelSports = []uint16{2000, 2001, 2002}
	kernelDports = []uint16{1000, 1001, 1002}
)

func genKernelPacket(rt *rapid.T) Packet {
	family := rapid.SampledFrom([][]netip.Addr{kernelAddrs[:3], kernelAddrs[3:]}).Draw(rt, "family")
	p := Packet{
		Src: rapid.SampledFrom(family).Draw(rt, "src"), Dst: rapid.SampledFrom(family).Draw(rt, "dst"),
		HopLimit: rapid.SampledFrom([]uint8{1, 64, 255}).Draw(rt, "hop limit"), CT: New,
	}
	if p.Src.Is6() && rapid.Bool().Draw(rt, "icmp") {
		p.Proto, p.ICMPv6Type = ProtoICMPv6, rapid.SampledFrom([]uint8{128, 135}).Draw(rt, "type")
		if p.ICMPv6Type == 135 {
			p.CT = Untracked // conntrack leaves neighbour discovery alone
		}
		return p
	}
	p.Proto = ProtoUDP
	p.Sport, p.Dport = rapid.SampledFrom(kernelSports).Draw(rt, "sport"), rapid.SampledFrom(kernelDports).Draw(rt, "dport")
	return p
}

// send sends a packet and returns its verdict.
func send(p Packet, id uint16) (VerdictKind, error) {
	sockaddr := func(ip netip.Addr, port uint16) unix.Sockaddr {
		if ip.Is4() {
			return &unix.SockaddrInet4{Addr: ip.As4(), Port: int(port)}
		}
		return &unix.SockaddrInet6{Addr: ip.As16(), Port: int(port)}
	}
	domain, kind, payload := unix.AF_INET, unix.SOCK_DGRAM, []byte("podwall")
	if p.Src.Is6() {
		domain = unix.AF_INET6
	}
	if p.Proto == ProtoICMPv6 {
		kind, payload = unix.SOCK_RAW, make([]byte, 24)
		payload[0], payload[4], payload[5] = p.ICMPv6Type, byte(id>>8), byte(id)
	}
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, int(p.Proto))
	if err != nil {
		return 0, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	if domain == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, int(p.HopLimit)); err != nil {
			return 0, fmt.Errorf("set hop limit: %w", err)
		}
	}
	if err := unix.Bind(fd, sockaddr(p.Src, p.Sport)); err != nil {
		return 0, fmt.Errorf("bind: %w", err)
	}
	switch err := unix.Sendto(fd, payload, 0, sockaddr(p.Dst, p.Dport)); {
	case errors.Is(err, unix.EPERM):
		return Drop, nil
	case err != nil:
		return 0, fmt.Errorf("send: %w", err)
	}
	return Accept, nil
}

func genKernelRuleset(rt *rapid.T) Ruleset {
	t := NewTable(inetTable)
	bit := func(label string) bool { return rapid.Bool().Draw(rt, label) }
	pickAddr := func(four bool) netip.Addr {
		if four {
			return rapid.SampledFrom(kernelAddrs[:3]).Draw(rt, "address")
		}
		return rapid.SampledFrom(kernelAddrs[3:]).Draw(rt, "address")
	}
	dport := func() uint16 { return rapid.SampledFrom(kernelDports).Draw(rt, "dport") }
	chains := []string{"c0", "c1", "c2", "c3"}
	verdict := func(callable []string) Verdict {
		kinds := []VerdictKind{Accept, Drop, Return}
		if len(callable) > 0 {
			kinds = append(kinds, Jump, Jump, Goto, Goto)
		}
		v := Verdict{Kind: rapid.SampledFrom(kinds).Draw(rt, "verdict")}
		if v.Kind == Jump || v.Kind == Goto {
			v.Chain = rapid.SampledFrom(callable).Draw(rt, "chain")
		}
		return v
	}
	for _, four := range []bool{true, false} {
		key, suffix := IPv4Addr, "4"
		if !four {
			key, suffix = IPv6Addr, "6"
		}
		plain, dispatch, named, intervals := set("p"+suffix, key), set("m"+suffix, key), set("np"+suffix, key, InetProto, InetService), set("b"+suffix, key)
		dispatch.Map, intervals.Interval = true, true
		for range rapid.IntRange(0, 2).Draw(rt, "elements") {
			plain.Elements[AddrElem(pickAddr(four))] = Verdict{}
			dispatch.Elements[AddrElem(pickAddr(four))] = verdict(chains[2:])
			named.Elements[AddrPortElem(pickAddr(four), ProtoUDP, dport())] = Verdict{}
		}
		if bit("interval") {
			from := pickAddr(four)
			to := from
			if bit("wide") {
				to = to.Next()
			}
			intervals.Elements[RangeElem(from, to)] = Verdict{}
		}
		for _, s := range []*Set{plain, dispatch, named, intervals} {
			t.Sets[s.Name] = s
		}
	}
	l4 := func(four, udp, not bool) []Expr {
		if !udp {
			if four {
				return []Expr{Cmp{Field: L4Proto, Not: not, Value: string([]byte{ProtoICMPv6})}}
			}
			return []Expr{Cmp{Field: ICMPv6Type, Not: not, Value: string([]byte{135})}}
		}
		switch rapid.IntRange(0, 2).Draw(rt, "l4") {
		case 0:
			return []Expr{Equal(L4Proto, ProtoUDP), Cmp{Field: Dport, Not: not, Value: be16(dport())}}
		case 1:
			from := rapid.SampledFrom(kernelSports).Draw(rt, "sport")
			return []Expr{Equal(L4Proto, ProtoUDP), Between16(Sport, from, from+1)}
		}
		name, field := "np6", IP6Daddr
		if four {
			name, field = "np4", IPDaddr
		}
		lookup := In{Fields: []Field{field, L4Proto, Dport}, Not: not, Set: name}
		if not {
			return []Expr{Equal(L4Proto, ProtoUDP), lookup}
		}
		return []Expr{lookup}
	}
	// nft refuses a rule that asks for two families or two protocols, so those are drawn per rule.
	match := func(four, udp bool) []Expr {
		not := bit("not")
		saddr, daddr, suffix := IP6Saddr, IP6Daddr, "6"
		if four {
			saddr, daddr, suffix = IPSaddr, IPDaddr, "4"
		}
		field := rapid.SampledFrom([]Field{saddr, daddr}).Draw(rt, "field")
		switch rapid.IntRange(0, 13).Draw(rt, "match") {
		case 0:
			return []Expr{Cmp{Field: field, Not: not, Value: string(pickAddr(four).AsSlice())}}
		case 1:
			bits := pickAddr(four).BitLen() - rapid.IntRange(0, 2).Draw(rt, "bits")
			return []Expr{Prefix{Field: field, Not: not, Prefix: netip.PrefixFrom(pickAddr(four), bits)}}
		case 2:
			return []Expr{In{Fields: []Field{field}, Not: not, Set: "p" + suffix}}
		case 3:
			return []Expr{In{Fields: []Field{field}, Not: not, Set: "b" + suffix}}
		case 4, 5, 6, 7:
			return l4(four, udp, not)
		case 8:
			return []Expr{Cmp{Field: L4Proto, Not: true, Value: string([]byte{ProtoTCP})}}
		case 9:
			if !four {
				return []Expr{Cmp{Field: IP6HopLimit, Not: not, Value: string([]byte{255})}}
			}
		case 10:
			return []Expr{CTState(rapid.IntRange(1, 31).Draw(rt, "state"))}
		case 11:
			return []Expr{Cmp{Field: IIFName, Not: not, Value: "lo"}}
		case 12:
			return []Expr{Limit{PerSecond: 100000, Burst: 1000}, Counter{}, Log{Prefix: "p", Group: 77, Snaplen: 96}}
		}
		return nil
	}
	rules := func(callable []string) []Rule {
		var out []Rule
		for range rapid.IntRange(0, 4).Draw(rt, "rules") {
			four, udp := bit("four"), bit("udp")
			exprs := match(four, udp)
			if bit("two") {
				exprs = append(exprs, match(four, udp)...)
			}
			switch rapid.IntRange(0, 9).Draw(rt, "end") {
			case 0:
				exprs = append(exprs, Counter{})
			case 1:
				exprs = append(exprs, Reject{})
			case 2, 3:
				// The maps lead to c2 and c3, so those chains must not look them up.
				switch {
				case !slices.Contains(callable, "c2"):
					exprs = append(exprs, drop)
				case four:
					exprs = append(exprs, Dispatch{Fields: []Field{IPSaddr}, Map: "m4"})
				default:
					exprs = append(exprs, Dispatch{Fields: []Field{IP6Daddr}, Map: "m6"})
				}
			default:
				exprs = append(exprs, verdict(callable))
			}
			out = append(out, NewRule(exprs...))
		}
		return out
	}
	for i, n := range chains {
		t.Chains[n] = chain(n, rules(chains[i+1:])...)
	}
	for i, n := range []string{"first", "second"} {
		t.Chains[n] = &Chain{Name: n, Hook: &Hook{Name: "output", Priority: i}, Rules: rules(chains)}
	}
	return Ruleset{t}
}
