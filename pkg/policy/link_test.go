package policy

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

var (
	own4    = netip.MustParseAddr("10.0.0.1")
	own6    = netip.MustParseAddr("fd00::1")
	fe80    = netip.MustParseAddr("fe80::1")
	gateway = netip.MustParseAddr("fe80::ffff")
	other4  = netip.MustParseAddr("10.0.0.2")
	other6  = netip.MustParseAddr("fd00::2")
)

// linkInput is one pod on a veth, isolated or not, closed or not.
func linkInput(bridge string, isolated, closed bool) Input {
	pod := &cluster.Pod{Namespace: "ns", Name: "pod"}
	in := Input{Model: cluster.NewModel(), Options: Options{Table: "podwall"}, Endpoints: []Endpoint{
		{ID: "x", Name: "ns/pod", Pod: pod, IPs: []netip.Addr{own4, own6}, Link: "veth0", Bridge: bridge, Gateways: []netip.Addr{gateway}},
	}}
	if closed {
		in.Endpoints[0].Pod = nil
	}
	if isolated {
		p := &cluster.Policy{Namespace: "ns", Name: "deny", Spec: networkingv1.NetworkPolicySpec{
			PolicyTypes: []networkingv1.PolicyType{"Ingress", "Egress"},
		}}
		in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
	}
	return in
}

// TestLink holds what a host veth lets through in both directions, whatever policies say.
func TestLink(t *testing.T) {
	t.Parallel()
	nd := func(src netip.Addr, kind, hops uint8) ruleset.Packet {
		return ruleset.Packet{Src: src, Dst: netip.MustParseAddr("ff02::1"), Proto: ruleset.ProtoICMPv6, ICMPv6Type: kind, HopLimit: hops, PktType: ruleset.PktMulticast}
	}
	udp := func(src, dst netip.Addr, sport, dport uint16, kind uint8) ruleset.Packet {
		return ruleset.Packet{Src: src, Dst: dst, Proto: ruleset.ProtoUDP, Sport: sport, Dport: dport, HopLimit: 64, PktType: kind}
	}
	advertisement := func(src, target netip.Addr) ruleset.Packet {
		p := nd(src, 136, 255)
		p.NDTarget = target
		return p
	}
	arp := func(sender netip.Addr) ruleset.Packet {
		return ruleset.Packet{EtherType: ruleset.EtherARP, ARPSaddr: sender}
	}
	all255 := netip.MustParseAddr("255.255.255.255")
	for _, tt := range []struct {
		name                   string
		hook                   string
		packet                 ruleset.Packet
		open, isolated, closed bool
		bridgeOnly             bool
	}{
		{name: "own IPv4 address", hook: "ingress", packet: udp(own4, other4, 1, 1, 0), open: true, isolated: true},
		{name: "own IPv6 address", hook: "ingress", packet: udp(own6, other6, 1, 1, 0), open: true, isolated: true},
		{name: "forged IPv4 source", hook: "ingress", packet: udp(other4, other4, 1, 1, 0)},
		{name: "forged IPv6 source", hook: "ingress", packet: udp(other6, other6, 1, 1, 0)},
		{name: "from a link-local address", hook: "ingress", packet: udp(fe80, fe80, 1, 1, 0), open: true},
		{name: "neighbour solicitation", hook: "ingress", packet: nd(fe80, 135, 255), open: true, isolated: true, closed: true},
		{name: "neighbour solicitation for duplicates", hook: "ingress", packet: nd(netip.IPv6Unspecified(), 135, 255), open: true, isolated: true, closed: true},
		{name: "neighbour solicitation from afar", hook: "ingress", packet: nd(other6, 135, 64)},
		{name: "multicast listener report", hook: "ingress", packet: nd(fe80, 143, 1), open: true, isolated: true, closed: true},
		{name: "router advertisement", hook: "ingress", packet: nd(fe80, 134, 255)},
		{name: "redirect", hook: "ingress", packet: nd(fe80, 137, 255)},
		{name: "DHCP discover", hook: "ingress", packet: udp(netip.IPv4Unspecified(), all255, 68, 67, ruleset.PktBroadcast), open: true, isolated: true},
		{name: "broadcast", hook: "ingress", packet: udp(own4, all255, 1, 1, ruleset.PktBroadcast), open: true, isolated: true}, // TestGroups
		{name: "IPv4 multicast", hook: "ingress", packet: udp(own4, netip.MustParseAddr("224.0.0.251"), 1, 5353, ruleset.PktMulticast), open: true, isolated: true},
		{name: "IPv6 multicast", hook: "ingress", packet: udp(own6, netip.MustParseAddr("ff02::fb"), 1, 5353, ruleset.PktMulticast), open: true, isolated: true},
		{name: "neighbour solicitation from another's address", hook: "ingress", packet: nd(other6, 135, 255)},
		{name: "neighbour advertisement of its own address", hook: "ingress", packet: advertisement(own6, own6), open: true, isolated: true, closed: true},
		{name: "neighbour advertisement of its link-local address", hook: "ingress", packet: advertisement(fe80, fe80), open: true, isolated: true, closed: true},
		{name: "neighbour advertisement of another's address", hook: "ingress", packet: advertisement(own6, other6), bridgeOnly: true},
		{name: "neighbour advertisement whose target is in another fragment", hook: "ingress", packet: nd(own6, 136, 255), bridgeOnly: true},
		{name: "neighbour advertisement from afar", hook: "ingress", packet: func() ruleset.Packet { p := advertisement(own6, own6); p.HopLimit = 64; return p }(), bridgeOnly: true},
		{name: "neighbour advertisement of the gateway's link-local address", hook: "ingress", packet: advertisement(fe80, gateway), bridgeOnly: true},
		{name: "from the gateway's link-local address", hook: "ingress", packet: nd(gateway, 135, 255), bridgeOnly: true},
		{name: "ARP for its own address", hook: "ingress", packet: arp(own4), open: true, isolated: true, bridgeOnly: true},
		{name: "ARP probe", hook: "ingress", packet: arp(netip.IPv4Unspecified()), open: true, isolated: true, bridgeOnly: true},
		{name: "ARP for another's address", hook: "ingress", packet: arp(other4), bridgeOnly: true},
		{name: "unknown ethertype", hook: "ingress", packet: ruleset.Packet{EtherType: 0x88b5}},
		{name: "VLAN tag", hook: "ingress", packet: ruleset.Packet{EtherType: 0x8100}},

		{name: "bridged to own address", hook: "egress", packet: udp(other4, own4, 1, 1, ruleset.PktOther), open: true, isolated: true, bridgeOnly: true},
		{name: "bridged to link-local", hook: "egress", packet: udp(fe80, netip.MustParseAddr("fe80::2"), 1, 1, ruleset.PktOther), open: true, bridgeOnly: true},
		{name: "bridged broadcast", hook: "egress", packet: udp(other4, all255, 1, 1, ruleset.PktBroadcast), open: true, bridgeOnly: true},
		{name: "bridged solicitation", hook: "egress", packet: nd(fe80, 135, 255), open: true, isolated: true, closed: true, bridgeOnly: true},
		{name: "DHCP offer", hook: "egress", packet: udp(other4, all255, 67, 68, ruleset.PktBroadcast), open: true, isolated: true, bridgeOnly: true},
		{name: "own node to link-local", hook: "egress", packet: udp(fe80, netip.MustParseAddr("fe80::2"), 1, 1, ruleset.PktHost), open: true, isolated: true, bridgeOnly: true},
	} {
		for _, bridge := range []string{"", "br0"} {
			if tt.bridgeOnly && bridge == "" {
				continue
			}
			for _, state := range []struct {
				name             string
				isolated, closed bool
				want             bool
			}{{"open", false, false, tt.open}, {"isolated", true, false, tt.isolated}, {"closed", false, true, tt.closed}} {
				name := map[string]string{"": "routed", "br0": "bridged"}[bridge] + "/" + state.name + "/" + tt.name
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					out := Render(linkInput(bridge, state.isolated, state.closed))
					p := tt.packet
					p.IIFName, p.OIFName, p.CT = "veth0", "veth0", ruleset.New
					r, err := out.Ruleset.Trace(tt.hook, p)
					if err != nil {
						t.Fatal(err)
					}
					if got := r.Verdict == ruleset.Accept; got != state.want {
						t.Errorf("passes: %v, want %v; steps: %v", got, state.want, r.Steps)
					}
				})
			}
		}
	}
}

// TestGroups holds that what an isolated pod sends to a group ends in the inet table, though a policy lets it send to everybody: the veth's
// chain lets it pass.
func TestGroups(t *testing.T) {
	t.Parallel()
	for _, bridge := range []string{"", "br0"} {
		for _, isolated := range []bool{false, true} {
			for _, ownNode := range []bool{false, true} {
				in := linkInput(bridge, false, false)
				in.Options.Cut, in.Options.AllowOwnNode = ownNode, ownNode
				if isolated {
					p := &cluster.Policy{Namespace: "ns", Name: "all", Spec: networkingv1.NetworkPolicySpec{
						PolicyTypes: []networkingv1.PolicyType{"Egress"}, Egress: []networkingv1.NetworkPolicyEgressRule{{}},
					}}
					in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
				}
				rs := Render(in).Ruleset
				for _, to := range []string{"224.0.0.251", "239.1.1.1", "255.255.255.255", "ff02::fb", "ff0e::1", "192.0.2.1", "240.0.0.1", "223.255.255.255", "255.255.255.254", "2001:db8::1"} {
					dst := netip.MustParseAddr(to)
					src := own4
					if dst.Is6() {
						src = own6
					}
					ports := [][2]uint16{{5353, 5353}, {67, 68}, {68, 67}, {546, 547}}
					for _, c := range [][2]uint8{{ruleset.ProtoTCP}, {ruleset.ProtoUDP}, {ruleset.ProtoUDP, 1}, {ruleset.ProtoUDP, 2}, {ruleset.ProtoUDP, 3}, {ruleset.ProtoICMP}, {2}} {
						proto, sport, dport := c[0], ports[c[1]][0], ports[c[1]][1]
						for _, hook := range []string{"forward", "input"} {
							group := dst.IsMulticast() || dst == broadcast
							want := ruleset.Accept
							if isolated && group {
								want = ruleset.Drop
							}
							r, err := rs.Trace(hook, ruleset.Packet{
								IIFName: "veth0", OIFName: "eth0", Src: src, Dst: dst, Proto: proto, Sport: sport, Dport: dport, HopLimit: 1, CT: ruleset.New, TCPFlags: ruleset.SYN,
							})
							if err != nil {
								t.Fatal(err)
							}
							if r.Verdict != want {
								t.Errorf("bridge %q, isolated %t, own node %t: protocol %d, ports %d and %d to %s at %s: verdict %v, want %v; steps: %v", bridge, isolated, ownNode, proto, sport, dport, to, hook, r.Verdict, want, r.Steps)
							}
						}
					}
				}
			}
		}
	}
}

// TestUnregistered holds that nobody reaches an isolated pod on a routed veth at an address that CNI did not report.
func TestUnregistered(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name             string
		isolated, closed bool
		bridge, oif      string
		want             ruleset.VerdictKind
	}{
		{"open", false, false, "", "veth0", ruleset.Accept},
		{"isolated", true, false, "", "veth0", ruleset.Drop},
		{"closed", false, true, "", "veth0", ruleset.Drop},
		{"isolated, behind another link", true, false, "", "veth1", ruleset.Accept},
		{"isolated on a bridge, whose port sees to it", true, false, "br0", "br0", ruleset.Accept},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			rs := Render(linkInput(tt.bridge, tt.isolated, tt.closed)).Ruleset
			for _, to := range []string{"10.0.0.77", "fd00::77"} {
				dst := netip.MustParseAddr(to)
				src := other4
				if dst.Is6() {
					src = other6
				}
				r, err := rs.Trace("forward", ruleset.Packet{
					IIFName: "eth0", OIFName: tt.oif, Src: src, Dst: dst, Proto: ruleset.ProtoTCP, Sport: 1, Dport: 80, HopLimit: 64, CT: ruleset.New, TCPFlags: ruleset.SYN,
				})
				if err != nil {
					t.Fatal(err)
				}
				if r.Verdict != tt.want {
					t.Errorf("%s: verdict %v, want %v; steps: %v", to, r.Verdict, tt.want, r.Steps)
				}
			}
		})
	}
}

// TestAdopted holds that an isolated pod whose host veth is not known reaches itself through its own Service, and that nobody
// else does so by its address.
func TestAdopted(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, device, iif string
		want              ruleset.VerdictKind
	}{
		{"itself", "veth0", "veth0", ruleset.Accept},
		{"somebody outside with its address", "veth0", "eth0", ruleset.Drop},
		{"without a route to it", "", "veth0", ruleset.Drop},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			in := linkInput("", true, false)
			in.Endpoints[0].Link, in.Endpoints[0].Device = "", tt.device
			for _, ip := range []netip.Addr{own4, own6} {
				r, err := Render(in).Ruleset.Trace("forward", ruleset.Packet{
					IIFName: tt.iif, Src: ip, Dst: ip, Proto: ruleset.ProtoUDP, Sport: 1, Dport: 80, HopLimit: 64, CT: ruleset.New,
				})
				if err != nil {
					t.Fatal(err)
				}
				if r.Verdict != tt.want {
					t.Errorf("%s: verdict %v, want %v; steps: %v", ip, r.Verdict, tt.want, r.Steps)
				}
			}
		})
	}
}

// TestEvicted holds that an endpoint whose addresses were taken by a newer one cannot send at all.
func TestEvicted(t *testing.T) {
	t.Parallel()
	in := linkInput("", false, false)
	in.Endpoints[0].IPs = nil
	out := Render(in)
	for _, src := range []netip.Addr{own4, own6} {
		r, err := out.Ruleset.Trace("ingress", ruleset.Packet{IIFName: "veth0", Src: src, Dst: src, Proto: 6, HopLimit: 64})
		if err != nil || r.Verdict != ruleset.Drop {
			t.Errorf("from %s: %v, %v, want a drop", src, r.Verdict, err)
		}
	}
}

// TestLinks holds that a ruleset tells which veths it guards, and with which addresses.
func TestLinks(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name             string
		isolated, closed bool
		ips              []netip.Addr
	}{{"open", false, false, []netip.Addr{own4, own6}}, {"isolated", true, false, []netip.Addr{own4, own6}}, {"closed", false, true, []netip.Addr{own4, own6}}} {
		for _, bridge := range []string{"", "br0"} {
			want := map[string]LinkOf{"x": {Device: "veth0", IPs: tt.ips}}
			got := Links(Render(linkInput(bridge, tt.isolated, tt.closed)).Ruleset)
			if diff := gocmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("%s on bridge %q (-want +got):\n%s", tt.name, bridge, diff)
			}
		}
	}
}

// TestUnreadable holds that a policy whose file could not be read closes the pods that it selects.
func TestUnreadable(t *testing.T) {
	t.Parallel()
	in := linkInput("", false, false)
	p := &cluster.Policy{Namespace: "ns", Name: "broken", Unreadable: "line 3: not YAML"}
	in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
	out := Render(in)
	want := []Problem{{p.Key(), "cannot be read (line 3: not YAML): it allows nothing"}}
	if diff := gocmp.Diff(want, out.Problems); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	if diff := gocmp.Diff(Verdicts{Ingress: []string{"ns/broken"}}, out.Endpoints["x"]); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}

// TestOrder holds that the output does not depend on the order of the input.
func TestOrder(t *testing.T) {
	t.Parallel()
	build := func(seed uint64) string {
		rng := rand.New(rand.NewPCG(seed, 0))
		in := linkInput("", true, false)
		for _, i := range rng.Perm(20) {
			ip := netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})
			pod := &cluster.Pod{Namespace: "ns", Name: "p" + string(rune('a'+i)), Labels: map[string]string{"app": "x"}, IPs: []netip.Addr{ip}}
			in.Model.Apply(cluster.Change{Key: pod.Key(), Object: pod})
			in.Endpoints = append(in.Endpoints, Endpoint{ID: pod.Name, Name: nameOf(pod), Pod: pod, IPs: pod.IPs})
		}
		rng.Shuffle(len(in.Endpoints), func(i, j int) { in.Endpoints[i], in.Endpoints[j] = in.Endpoints[j], in.Endpoints[i] })
		return Render(in).Ruleset.String()
	}
	first := build(1)
	for seed := range uint64(5) {
		if diff := gocmp.Diff(first, build(seed)); diff != "" {
			t.Fatalf("seed %d:\n%s", seed, diff)
		}
	}
}

// TestID holds that identities of several parts cannot collide by moving a boundary.
func TestID(t *testing.T) {
	t.Parallel()
	if ID("a", "bc") == ID("ab", "c") || ID("a") == ID("a", "") {
		t.Error("parts are not told apart")
	}
	if got := ID("ns", "name"); len(got) != 16 {
		t.Errorf("ID is %q, want 16 characters", got)
	}
}
