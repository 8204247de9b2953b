package e2e

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
)

var serviceIPs = map[testnet.Family]netip.Addr{testnet.IPv4: netip.MustParseAddr("10.96.0.10"), testnet.IPv6: netip.MustParseAddr("fd00:10:96::10")}

// service does on the node what kube-proxy does for a ClusterIP: DNAT to the pod, and masquerade for a pod that reaches itself.
func service(t *testing.T, n *testnet.Node, pod *testnet.Pod, port, targetPort uint16) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "table inet services {\n chain pre { type nat hook prerouting priority dstnat; }\n chain post { type nat hook postrouting priority srcnat; }\n}\n")
	for _, f := range n.Families {
		ip := map[testnet.Family]string{testnet.IPv4: "ip", testnet.IPv6: "ip6"}[f]
		to := netip.AddrPortFrom(pod.Addrs[f], targetPort)
		fmt.Fprintf(&b, "add rule inet services pre %s daddr %s tcp dport %d dnat %s to %s\n", ip, serviceIPs[f], port, ip, to)
		fmt.Fprintf(&b, "add rule inet services post %s saddr %s %s daddr %s masquerade\n", ip, pod.Addrs[f], ip, pod.Addrs[f])
	}
	if _, err := n.Host.Run(t.Context(), "nft", b.String()); err != nil {
		t.Fatal(err)
	}
}

// A Service is judged after DNAT, by the pod and its target port; its own address and port mean nothing to a policy.
func TestServices(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{
				"pods.yaml": podManifest("default", "client", "app: client") + podManifest("default", "byip", "app: byip") + podManifest("default", "server", "app: server"),
				"policy.yaml": policyManifest("default", "server", "{podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {}}], ports: [{port: 8080}]}]}") +
					policyManifest("default", "client", "{podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: server}}}], ports: [{port: 8080}]}]}") +
					policyManifest("default", "byip", fmt.Sprintf("{podSelector: {matchLabels: {app: byip}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: %s/32}}, {ipBlock: {cidr: '%s/128'}}]}]}", serviceIPs[testnet.IPv4], serviceIPs[testnet.IPv6])),
			}})
			client, byIP := add(t, n, "default", "client"), add(t, n, "default", "byip")
			server := add(t, n, "default", "server", testnet.TCP(8080), testnet.TCP(9090))
			service(t, n, server, 80, 8080)
			service(t, n, server, 8081, 9090)
			for _, f := range n.Families {
				via := func(from *testnet.Pod, port, target uint16) testnet.Probe {
					return testnet.Probe{From: from.Host, To: server.Host, Family: f, Port: testnet.TCP(target), Via: netip.AddrPortFrom(serviceIPs[f], port)}
				}
				expect(t, via(client, 80, 8080), testnet.Allowed)
				expect(t, via(client, 8081, 9090), testnet.Denied) // the Service's port is no exception
				expect(t, via(byIP, 80, 8080), testnet.Denied)     // a ClusterIP in an ipBlock matches nothing
				expect(t, via(server, 80, 8080), testnet.Allowed)  // hairpin: a pod cannot be cut off from itself,
				expect(t, via(server, 8081, 9090), testnet.Allowed)
			}
		})
	}
}

func TestOwnNode(t *testing.T) {
	t.Parallel()
	ports := []testnet.Port{testnet.UDP(53), testnet.TCP(53), testnet.TCP(10250)}
	tests := []struct {
		name  string
		flags []string
		want  []testnet.Verdict // per port
	}{
		{"enforced", nil, []testnet.Verdict{testnet.Denied, testnet.Denied, testnet.Denied}},
		{
			"node-dns",
			[]string{"--node-dns", testnet.NodeAddrs[testnet.IPv4].String(), "--node-dns", testnet.NodeAddrs[testnet.IPv6].String()},
			[]testnet.Verdict{testnet.Allowed, testnet.Allowed, testnet.Denied},
		},
		{"exempt", []string{"--own-node-egress=allow"}, []testnet.Verdict{testnet.Allowed, testnet.Allowed, testnet.Allowed}},
	}
	for _, tt := range tests {
		for _, cni := range mainCNIs {
			t.Run(tt.name+"/"+cni, func(t *testing.T) {
				t.Parallel()
				n := start(t, setup{cni: cni, flags: tt.flags, manifests: map[string]string{
					"policy.yaml": policyManifest("default", "silent", "{podSelector: {}, policyTypes: [Ingress, Egress]}"),
				}})
				pod := add(t, n, "default", "pod", testnet.TCP(80), testnet.UDP(80))
				if err := n.Host.Serve(ports...); err != nil {
					t.Fatal(err)
				}
				for i, port := range ports {
					expectAll(t, n, pod.Host, n.Host, port, tt.want[i])
				}
				expectAll(t, n, n.Host, pod.Host, testnet.TCP(80), testnet.Allowed)
				expectAll(t, n, n.Host, pod.Host, testnet.UDP(80), testnet.Allowed)
				expectAll(t, n, pod.Host, n.Outside[testnet.External], testnet.TCP(53), testnet.Denied)
			})
		}
	}
}

// A port name stands for one number per pod, never for all numbers that any pod gives it.
func TestNamedPorts(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "bridge", manifests: map[string]string{
		"pods.yaml": podManifest("default", "one", "app: server", "http:8080") + podManifest("default", "two", "app: server", "http:9090") +
			podManifest("default", "client", "app: client") + podManifest("other", "caller", "app: caller") + podManifest("other", "three", "app: three", "http:8888"),
		"policy.yaml": policyManifest("default", "in", "{podSelector: {matchLabels: {app: server}}, ingress: [{ports: [{port: http}]}]}") +
			policyManifest("other", "out", "{podSelector: {matchLabels: {app: caller}}, policyTypes: [Egress], egress: [{ports: [{port: http}]}]}"),
	}})
	all := []testnet.Port{testnet.TCP(8080), testnet.TCP(9090), testnet.TCP(8888)}
	client, caller := add(t, n, "default", "client", all...), add(t, n, "other", "caller")
	one, two, three := add(t, n, "default", "one", all...), add(t, n, "default", "two", all...), add(t, n, "other", "three", all...)
	for _, tt := range []struct {
		to   *testnet.Pod
		http uint16
	}{{one, 8080}, {two, 9090}} {
		for _, port := range all {
			want := testnet.Denied
			if port.Number == tt.http {
				want = testnet.Allowed
			}
			expectAll(t, n, client.Host, tt.to.Host, port, want)
			expectAll(t, n, caller.Host, tt.to.Host, port, want)
		}
	}
	expectAll(t, n, caller.Host, three.Host, testnet.TCP(8888), testnet.Allowed)
	expectAll(t, n, caller.Host, three.Host, testnet.TCP(8080), testnet.Denied)
	expectAll(t, n, caller.Host, client.Host, testnet.TCP(8080), testnet.Denied) // has no port of that name
}

func TestEndPort(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: map[string]string{
		"policy.yaml": policyManifest("default", "range", "{podSelector: {}, ingress: [{ports: [{port: 8000, endPort: 8010}]}]}"),
	}})
	ports := map[testnet.Port]testnet.Verdict{
		testnet.TCP(7999): testnet.Denied, testnet.TCP(8000): testnet.Allowed, testnet.TCP(8005): testnet.Allowed,
		testnet.TCP(8010): testnet.Allowed, testnet.TCP(8011): testnet.Denied, testnet.UDP(8005): testnet.Denied,
	}
	client, server := add(t, n, "default", "client"), add(t, n, "default", "server")
	for port, want := range ports {
		if err := server.Serve(port); err != nil {
			t.Fatal(err)
		}
		expectAll(t, n, client.Host, server.Host, port, want)
	}
}

// Neighbour discovery is not subject to policies: two isolated pods find each other again after they have forgotten all neighbours.
func TestNeighbourDiscovery(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{
				"policy.yaml": policyManifest("default", "quiet", "{podSelector: {}, policyTypes: [Ingress, Egress]}") +
					policyManifest("default", "http", "{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{ports: [{port: 80}]}], egress: [{ports: [{port: 80}]}]}"),
			}})
			a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.TCP(80), testnet.TCP(81))
			for range 2 {
				expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Allowed)
				expectAll(t, n, a.Host, b.Host, testnet.TCP(81), testnet.Denied)
				for _, h := range []*testnet.Host{a.Host, b.Host, n.Host} {
					for _, family := range []string{"-4", "-6"} {
						if _, err := h.Run(t.Context(), "ip", family, "neigh", "flush", "all"); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
		})
	}
}

// ping sends an echo request and reports whether it was answered, and whether it has reached the receiver.
func ping(t *testing.T, from, to *testnet.Host, f testnet.Family, id int) (bool, bool) {
	t.Helper()
	network, proto, request := "ip4:icmp", uint8(unix.IPPROTO_ICMP), icmp.Type(ipv4.ICMPTypeEcho)
	if f == testnet.IPv6 {
		network, proto, request = "ip6:ipv6-icmp", unix.IPPROTO_ICMPV6, ipv6.ICMPTypeEchoRequest
	}
	message := icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: 1, Data: []byte("podwall")}}
	packet, err := message.Marshal(nil) // the kernel fills in the checksum of ICMPv6
	if err != nil {
		t.Fatal(err)
	}
	var conn *icmp.PacketConn
	err = from.In(func() error {
		var err error
		conn, err = icmp.ListenPacket(network, "")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	target := &net.IPAddr{IP: to.Addrs[f].AsSlice()}
	if _, err := conn.WriteTo(packet, target); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 256)
	answered := false
	for !answered {
		size, _, err := conn.ReadFrom(buf)
		if err != nil {
			break
		}
		reply, err := icmp.ParseMessage(int(proto), buf[:size])
		if err != nil || (reply.Type != ipv4.ICMPTypeEchoReply && reply.Type != ipv6.ICMPTypeEchoReply) {
			continue
		}
		echo, ok := reply.Body.(*icmp.Echo)
		answered = ok && echo.ID == id
	}
	arrived, err := to.Observed(t.Context(), proto, uint16(id))
	if err != nil {
		t.Fatal(err)
	}
	return answered, arrived
}

// ICMP echo passes with a rule without ports, and with no other.
func TestPing(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{
				"pods.yaml": podManifest("default", "client", "app: client") + podManifest("default", "open", "app: open") +
					podManifest("default", "peers", "app: peers") + podManifest("default", "ports", "app: ports"),
				"policy.yaml": policyManifest("default", "peers", "{podSelector: {matchLabels: {app: peers}}, ingress: [{from: [{podSelector: {}}]}]}") +
					policyManifest("default", "ports", "{podSelector: {matchLabels: {app: ports}}, ingress: [{from: [{podSelector: {}}], ports: [{}]}]}"),
			}})
			client := add(t, n, "default", "client")
			id := 100
			for _, tt := range []struct {
				name string
				want bool
			}{{"open", true}, {"peers", true}, {"ports", false}} {
				pod := add(t, n, "default", tt.name)
				for _, f := range n.Families {
					id++
					answered, arrived := ping(t, client.Host, pod.Host, f, id)
					if answered != tt.want || arrived != tt.want {
						t.Errorf("%s echo to %s: answered %t, arrived %t, want %t", f, tt.name, answered, arrived, tt.want)
					}
					id++
					if answered, _ := ping(t, n.Host, pod.Host, f, id); !answered {
						t.Errorf("%s echo from the node to %s is not answered", f, tt.name)
					}
				}
			}
		})
	}
}

// sctpInit is an association request. This test writes it itself, since a kernel may have no SCTP sockets.
func sctpInit(sport, dport uint16) []byte {
	p := binary.BigEndian.AppendUint16(nil, sport)
	p = binary.BigEndian.AppendUint16(p, dport)
	p = append(p, 0, 0, 0, 0, 0, 0, 0, 0)                       // verification tag, checksum
	p = append(p, 1, 0, 0, 20)                                  // INIT, length
	p = append(p, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1)           // initiate tag, window, streams out and in
	p = append(p, 0, 0, 0, 1)                                   // initial TSN
	sum := crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)) // RFC 9260 section 6.8: of the packet with a checksum of zero
	binary.LittleEndian.PutUint32(p[8:], sum)
	return p
}

func TestSCTP(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "bridge", manifests: map[string]string{
		"policy.yaml": policyManifest("default", "sctp", "{podSelector: {}, ingress: [{ports: [{protocol: SCTP, port: 7777}]}]}"),
	}})
	client, server := add(t, n, "default", "client"), add(t, n, "default", "server", testnet.TCP(7777))
	expectAll(t, n, client.Host, server.Host, testnet.TCP(7777), testnet.Denied)
	for f, network := range map[testnet.Family]string{testnet.IPv4: "ip4:132", testnet.IPv6: "ip6:132"} {
		for sport, dport := range map[uint16]uint16{4001: 7777, 4002: 7778} {
			err := client.In(func() error {
				conn, err := net.Dial(network, server.Addrs[f].String())
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = conn.Write(sctpInit(sport+uint16(f)<<8, dport))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			arrived := func() bool {
				ok, err := server.Observed(t.Context(), unix.IPPROTO_SCTP, sport+uint16(f)<<8)
				if err != nil {
					t.Fatal(err)
				}
				return ok
			}
			if dport == 7777 {
				poll(t, f.String()+" SCTP INIT to the allowed port arrives", arrived)
				continue
			}
			time.Sleep(200 * time.Millisecond)
			if arrived() {
				t.Errorf("%s SCTP INIT to port %d has arrived", f, dport)
			}
		}
	}
}

// Isolation covers the pod and not its registered addresses: link-local ones are no way around it.
func TestLinkLocal(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "bridge", manifests: map[string]string{
		"pods.yaml":   podManifest("default", "client", "app: client") + podManifest("default", "open", "app: open") + podManifest("default", "closed", "app: closed"),
		"policy.yaml": policyManifest("default", "closed", "{podSelector: {matchLabels: {app: closed}}}"),
	}})
	client := add(t, n, "default", "client")
	for name, want := range map[string]testnet.Verdict{"open": testnet.Allowed, "closed": testnet.Denied} {
		pod := add(t, n, "default", name, testnet.TCP(80), testnet.UDP(80))
		for _, port := range []testnet.Port{testnet.TCP(80), testnet.UDP(80)} {
			via := linkLocal(t, client, pod)
			expect(t, testnet.Probe{From: client.Host, To: pod.Host, Family: testnet.IPv6, Port: port, Via: netip.AddrPortFrom(via, port.Number)}, want)
		}
	}
}

// linkLocal returns the pod's link-local address with the sender's interface index as its zone: Go caches interface names across
// namespaces.
func linkLocal(t *testing.T, from, to *testnet.Pod) netip.Addr {
	t.Helper()
	address := linkNamed(t, to.Host, "eth0").linkLocal()
	if !address.IsValid() {
		t.Fatalf("%s has no link-local address", to.Name)
	}
	return address.WithZone(fmt.Sprint(linkNamed(t, from.Host, "eth0").Index))
}
