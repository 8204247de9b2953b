package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/conntrack"
)

// client and server are the ends of a talk. Either may be the first to speak after a change.
const (
	client = 0
	server = 1
)

// record is what an end says at a time: its number in decimal.
const record = 8

// sayEvery is the pause between two records.
const sayEvery = 2 * time.Millisecond

// end is one socket of a talk, and what it has heard.
type end struct {
	net.Conn
	sent  int64
	heard atomic.Int64 // the highest number that has arrived
	over  chan struct{}
	err   error // why hearing ended, once over is closed
}

func newEnd(t *testing.T, c net.Conn) *end {
	e := &end{Conn: c, over: make(chan struct{})}
	t.Cleanup(func() {
		_ = c.Close()
		<-e.over
	})
	go func() {
		defer close(e.over)
		buf := make([]byte, record)
		for {
			_, err := io.ReadFull(c, buf)
			if _, datagrams := c.(*net.UDPConn); datagrams && err != nil && !errors.Is(err, net.ErrClosed) {
				continue // an ICMP error of a former record
			}
			if err != nil {
				e.err = err
				return
			}
			if n, err := strconv.ParseInt(string(buf[:record-1]), 10, 64); err == nil && n > e.heard.Load() {
				e.heard.Store(n)
			}
		}
	}()
	return e
}

// say sends the next record.
func (e *end) say() error {
	e.sent++
	_, err := fmt.Fprintf(e.Conn, "%07d ", e.sent)
	return err
}

// talk is a TCP connection or a UDP flow.
type talk struct {
	name           string
	proto          string
	first          int // who speaks first after a change
	from, to       *testnet.Host
	source         uint16
	target, behind netip.AddrPort // what the client sends to, and where it arrives
	listener       net.Listener
	ends           [2]*end
}

// open lets both ends find each other.
func (k *talk) open(t *testing.T) error {
	t.Helper()
	family := map[bool]string{true: "4", false: "6"}[k.behind.Addr().Is4()]
	mine := netip.AddrPortFrom(k.from.Addrs[map[bool]testnet.Family{true: testnet.IPv4, false: testnet.IPv6}[k.behind.Addr().Is4()]], k.source)
	var here, there net.Conn
	if k.proto == "udp" {
		err := k.from.In(func() error {
			var err error
			here, err = net.DialUDP("udp"+family, net.UDPAddrFromAddrPort(mine), net.UDPAddrFromAddrPort(k.target))
			return err
		})
		if err != nil {
			return err
		}
		mine = here.LocalAddr().(*net.UDPAddr).AddrPort()
		err = k.to.In(func() error {
			var err error
			there, err = net.DialUDP("udp"+family, net.UDPAddrFromAddrPort(k.behind), net.UDPAddrFromAddrPort(mine))
			return err
		})
		if err != nil {
			return errors.Join(err, here.Close())
		}
	} else {
		err := k.from.In(func() error {
			dialer := net.Dialer{Timeout: changeTimeout, KeepAlive: -1, LocalAddr: net.TCPAddrFromAddrPort(mine)}
			var err error
			here, err = dialer.DialContext(t.Context(), "tcp"+family, k.target.String())
			return err
		})
		if err != nil {
			return err
		}
		if err := firstSYN(here.(*net.TCPConn)); err != nil {
			return errors.Join(err, here.Close())
		}
		mine = here.LocalAddr().(*net.TCPAddr).AddrPort()
		if err := k.listener.(*net.TCPListener).SetDeadline(time.Now().Add(changeTimeout)); err != nil {
			return err
		}
		if there, err = k.listener.Accept(); err != nil {
			return errors.Join(err, here.Close())
		}
	}
	k.source = mine.Port()
	k.ends = [2]*end{newEnd(t, here), newEnd(t, there)}
	return nil
}

// firstSYN fails if a connection needed more than one SYN.
func firstSYN(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var info *unix.TCPInfo
	var infoErr error
	err = raw.Control(func(fd uintptr) { info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err = errors.Join(err, infoErr); err != nil {
		return fmt.Errorf("read TCP_INFO: %w", err)
	}
	if info.Total_retrans > 0 {
		return fmt.Errorf("connected with SYN number %d", info.Total_retrans+1)
	}
	return nil
}

// converse has each end say something that the other hears; first begins. Datagrams are repeated.
func (k *talk) converse(first int) error {
	for _, i := range []int{first, 1 - first} {
		speaker, listener := k.ends[i], k.ends[1-i]
		before := listener.heard.Load()
		for deadline := time.Now().Add(changeTimeout); listener.heard.Load() <= before; {
			if k.proto == "udp" || speaker.sent <= before {
				if err := speaker.say(); err != nil && k.proto == "tcp" {
					return fmt.Errorf("%s: %s: %w", k.name, who(i), err)
				}
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s: %s was not heard within %s", k.name, who(i), changeTimeout)
			}
			time.Sleep(sayEvery)
		}
	}
	return nil
}

func who(i int) string { return [...]string{"the client", "the server"}[i] }

// untilReset has an end speak until its connection is reset, and nobody else.
func (k *talk) untilReset(i int) error {
	e := k.ends[i]
	for deadline := time.Now().Add(changeTimeout); ; {
		err := e.say()
		if err != nil {
			select {
			case <-e.over:
			case <-time.After(changeTimeout):
				return fmt.Errorf("%s: %s cannot write, %w, but its connection is not over", k.name, who(i), err)
			}
			// The kernel reports a reset once, to a read or to a write; after a read, a write finds a broken pipe.
			if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) && errors.Is(e.err, unix.ECONNRESET) {
				return nil
			}
			return fmt.Errorf("%s: %s was not reset but met %w (reading: %w)", k.name, who(i), err, e.err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %s goes on after %s and is not reset; the other has heard %d of %d", k.name, who(i), changeTimeout, k.ends[1-i].heard.Load(), e.sent)
		}
		time.Sleep(sayEvery)
	}
}

// untilUnheard has an end speak until the other has not heard it for a while, and nobody else.
func (k *talk) untilUnheard(i int) error {
	speaker, listener := k.ends[i], k.ends[1-i]
	last, since := listener.heard.Load(), time.Now()
	for deadline := time.Now().Add(changeTimeout); time.Since(since) < 300*time.Millisecond; {
		_ = speaker.say() // a packet that the node drops on its way out is an error of the sender
		if heard := listener.heard.Load(); heard > last {
			last, since = heard, time.Now()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %s is still heard after %s", k.name, who(i), changeTimeout)
		}
		time.Sleep(sayEvery)
	}
	return nil
}

// dies has the talk's first end speak until that has no effect any more, then the other, and fails if either is heard again.
func (k *talk) dies() error {
	first, second := k.first, 1-k.first
	if k.proto == "tcp" {
		for _, i := range []int{first, second} {
			if err := k.untilReset(i); err != nil {
				return err
			}
		}
		for i, e := range k.ends {
			if other := k.ends[1-i]; e.heard.Load() >= other.sent {
				return fmt.Errorf("%s: %s has heard all of %d records", k.name, who(i), other.sent)
			}
		}
		return nil
	}
	if err := k.untilUnheard(first); err != nil {
		return err
	}
	return k.silent(50)
}

// silent has both ends say so many records in turn, and fails if one is heard.
func (k *talk) silent(records int) error {
	before := [2]int64{k.ends[0].heard.Load(), k.ends[1].heard.Load()}
	for _, i := range []int{k.first, 1 - k.first, k.first} {
		for range records {
			_ = k.ends[i].say()
			time.Sleep(sayEvery)
		}
		for j, e := range k.ends {
			if heard := e.heard.Load(); heard > before[j] {
				return fmt.Errorf("%s: %s has heard record %d, and nothing should have come after %d", k.name, who(j), heard, before[j])
			}
		}
	}
	return nil
}

// again works over the same ports after a revocation, in UDP over the same sockets. A Service's server cannot be the first then:
// its address is not the one that the client's socket expects, and nothing knows any more that it is to be exchanged.
func (k *talk) again(t *testing.T, first int) error {
	if k.target != k.behind {
		first = client
	}
	var err error
	if k.proto == "tcp" {
		err = k.open(t)
	}
	if err == nil {
		err = k.converse(first)
	}
	if err != nil {
		return fmt.Errorf("allowed again: %w", err)
	}
	return nil
}

// each runs f for all talks at once.
func each(t *testing.T, talks []*talk, f func(k *talk) error) {
	t.Helper()
	var all sync.WaitGroup
	for _, k := range talks {
		all.Go(func() {
			if err := f(k); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// converse has all talks work in both directions.
func converse(t *testing.T, talks []*talk) {
	t.Helper()
	each(t, talks, func(k *talk) error { return k.converse(k.first) })
}

// openAll opens talks that work.
func openAll(t *testing.T, talks []*talk) {
	t.Helper()
	for _, k := range talks {
		if err := k.open(t); err != nil {
			t.Fatalf("%s: %v", k.name, err)
		}
		if err := k.converse(client); err != nil {
			t.Fatal(err)
		}
	}
}

// talkPort is where the server of the next talk listens. Names and rulesets may use them in any test of the process.
var talkPort atomic.Uint32

// talks returns one talk per family, protocol and first speaker.
func talks(t *testing.T, n *testnet.Node, from, to *testnet.Host, protos ...string) []*talk {
	t.Helper()
	var list []*talk
	for _, f := range n.Families {
		for _, proto := range protos {
			for _, first := range []int{client, server} {
				at := netip.AddrPortFrom(to.Addrs[f], uint16(9000+talkPort.Add(1)%20000))
				k := &talk{
					name: fmt.Sprintf("%s -> %s %s %s, %s first", from.Name, to.Name, f, proto, who(first)), proto: proto, first: first, from: from, to: to,
					target: at, behind: at,
				}
				if proto == "tcp" {
					err := to.In(func() error {
						var err error
						k.listener, err = net.Listen("tcp", at.String())
						return err
					})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = k.listener.Close() })
				}
				list = append(list, k)
			}
		}
	}
	return list
}

// behindService makes the clients of talks use a Service, with other ports than the pod's.
func behindService(t *testing.T, n *testnet.Node, list []*talk) []*talk {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "table inet services {\n chain pre { type nat hook prerouting priority dstnat; }\n}\n")
	for _, k := range list {
		ip, f := "ip", testnet.IPv4
		if k.behind.Addr().Is6() {
			ip, f = "ip6", testnet.IPv6
		}
		k.target = netip.AddrPortFrom(serviceIPs[f], k.behind.Port()+30000)
		k.name += ", by Service"
		fmt.Fprintf(&b, "add rule inet services pre %s daddr %s %s dport %d dnat %s to %s\n", ip, serviceIPs[f], k.proto, k.target.Port(), ip, k.behind)
	}
	if _, err := n.Host.Run(t.Context(), "nft", b.String()); err != nil {
		t.Fatal(err)
	}
	return list
}

// tracked opens the conntrack table of a node.
func tracked(t *testing.T, n *testnet.Node) *conntrack.Table {
	t.Helper()
	ns, err := netns.GetFromName(n.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	table, err := conntrack.New(conntrack.Config{NetNS: int(ns)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(table.Close)
	return table
}

// entries counts the connections of a host's addresses that are not ICMP.
func entries(t *testing.T, table *conntrack.Table, h *testnet.Host) int {
	t.Helper()
	mine := map[netip.Addr]bool{}
	for _, ip := range h.Addrs {
		mine[ip] = true
	}
	count := 0
	err := table.Flows(t.Context(), conntrack.Filter{}, func(f conntrack.Flow) {
		if (mine[f.Src.Addr()] || mine[f.Dst.Addr()]) && (f.Proto == unix.IPPROTO_TCP || f.Proto == unix.IPPROTO_UDP) {
			count++
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return count
}

func write(t *testing.T, n *testnet.Node, file, text string) {
	t.Helper()
	if err := n.WriteManifest(file, text); err != nil {
		t.Fatal(err)
	}
}

// pings sends echo requests with one identifier all the time and counts the replies.
type pings struct{ replies atomic.Int64 }

var pingIDs atomic.Uint32

func echoing(t *testing.T, from *testnet.Host, to netip.Addr) *pings {
	t.Helper()
	network, request, proto := "ip4:icmp", icmp.Type(ipv4.ICMPTypeEcho), 1
	if to.Is6() {
		network, request, proto = "ip6:ipv6-icmp", ipv6.ICMPTypeEchoRequest, 58
	}
	var conn *icmp.PacketConn
	err := from.In(func() error {
		var err error
		conn, err = icmp.ListenPacket(network, map[bool]string{true: "0.0.0.0", false: "::"}[to.Is4()])
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	p := &pings{}
	id := int(pingIDs.Add(1)) + 100
	stop := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		for seq := 0; ; seq++ {
			packet, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: seq & 0xffff, Data: []byte("podwall")}}).Marshal(nil)
			if err == nil {
				_, _ = conn.WriteTo(packet, &net.IPAddr{IP: to.AsSlice()})
			}
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	all.Go(func() {
		buf := make([]byte, 1500)
		for {
			size, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			m, err := icmp.ParseMessage(proto, buf[:size])
			if err != nil || from.String() != to.String() {
				continue
			}
			if echo, ok := m.Body.(*icmp.Echo); ok && echo.ID == id && m.Type != request {
				p.replies.Add(1)
			}
		}
	})
	t.Cleanup(func() {
		close(stop)
		_ = conn.Close()
		all.Wait()
	})
	return p
}

// goes fails unless replies come.
func (p *pings) goes(t *testing.T) {
	t.Helper()
	before := p.replies.Load()
	poll(t, "echo replies come", func() bool { return p.replies.Load() > before+3 })
}

// stops fails unless replies cease.
func (p *pings) stops(t *testing.T) {
	t.Helper()
	last, since := p.replies.Load(), time.Now()
	poll(t, "no more echo replies", func() bool {
		if now := p.replies.Load(); now > last {
			last, since = now, time.Now()
		}
		return time.Since(since) > 300*time.Millisecond
	})
}

// undisturbed uses talks all the time until the test is over and fails if one exchange does.
func undisturbed(t *testing.T, list []*talk) {
	t.Helper()
	stop := make(chan struct{})
	var all sync.WaitGroup
	var exchanges atomic.Int64
	for _, k := range list {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
				}
				if err := k.converse(k.first); err != nil {
					t.Errorf("a talk that is allowed all the time: %v", err)
					return
				}
				exchanges.Add(1)
			}
		})
	}
	t.Cleanup(func() {
		close(stop)
		all.Wait()
		t.Logf("%d talks that are allowed all the time: %d exchanges", len(list), exchanges.Load())
		if exchanges.Load() < int64(10*len(list)) {
			t.Errorf("only %d exchanges of %d talks", exchanges.Load(), len(list))
		}
	})
}

// revocable is a node whose server lets clients of trusted namespaces in, and a friend.
type revocable struct {
	*testnet.Node
	client, server, friend *testnet.Pod
}

const lettingIn = "{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{namespaceSelector: {matchLabels: {trust: full}}, podSelector: {matchLabels: {role: client}}}, {podSelector: {matchLabels: {role: friend}}}]}]}"

var revocableManifests = map[string]string{
	"ns.yaml":     "apiVersion: v1\nkind: Namespace\nmetadata: {name: guests, labels: {trust: full}}\n",
	"client.yaml": podManifest("guests", "client", "role: client"),
	"server.yaml": podManifest("default", "server", "app: server"),
	"friend.yaml": podManifest("default", "friend", "role: friend"),
	"policy.yaml": policyManifest("default", "p", lettingIn),
}

func newRevocable(t *testing.T, cni string, flags ...string) revocable {
	t.Helper()
	n := start(t, setup{cni: cni, manifests: revocableManifests, flags: flags})
	table := tracked(t, n)
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		if err := table.Flows(context.Background(), conntrack.Filter{}, func(f conntrack.Flow) { t.Logf("tracked: %+v", f) }); err != nil {
			t.Log(err)
		}
	})
	return revocable{n, add(t, n, "guests", "client"), add(t, n, "default", "server", testnet.UDP(80)), add(t, n, "default", "friend")}
}

// inForce waits until the client can, or cannot, begin something new.
func (r revocable) inForce(t *testing.T, want testnet.Verdict) {
	t.Helper()
	// One family will do: a transaction switches both.
	eventually(t, testnet.Probe{From: r.client.Host, To: r.server.Host, Family: testnet.IPv4, Port: testnet.UDP(80)}, want)
}

// The changes that take the client's permission away, as files: what the manifest is then.
var revocations = []struct{ name, file, text string }{
	{"policy", "policy.yaml", policyManifest("default", "p", "{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {role: friend}}}]}]}")},
	{"another policy's selector", "policy.yaml", policyManifest("default", "p", strings.ReplaceAll(lettingIn, "role: client", "role: nobody"))},
	{"peer's label", "client.yaml", podManifest("guests", "client", "role: other")},
	{"peer gone", "client.yaml", "# nothing\n"},
	{"namespace's label", "ns.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: guests, labels: {trust: none}}\n"},
}

// TestRevokedConnectionsEnd holds that connections which a change no longer allows end at both ends, whoever speaks first, that
// those which are allowed all the time do not notice, and that what is allowed again works at once.
func TestRevokedConnectionsEnd(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			r := newRevocable(t, cni)
			allowed := talks(t, r.Node, r.friend.Host, r.server.Host, "tcp", "udp")
			openAll(t, allowed)
			undisturbed(t, allowed)
			list := talks(t, r.Node, r.client.Host, r.server.Host, "tcp", "udp")
			list = append(list, behindService(t, r.Node, talks(t, r.Node, r.client.Host, r.server.Host, "tcp", "udp"))...)
			for _, change := range revocations {
				t.Run(change.name, func(t *testing.T) {
					t.Cleanup(func() { // the next change has other connections
						for _, k := range list {
							k.source = 0
							if k.proto == "udp" {
								// Not one that the kernel chooses: it may be one of before, and then what is tracked of the former talk, the other
								// way round if its server spoke first, is of this one.
								k.source = uint16(30000 + talkPort.Add(1)%2000) //nolint:gosec // 31999 at most
							}
						}
					})
					openAll(t, list)
					var echoes []*pings
					for _, f := range r.Families {
						for range 2 { // they differ in their identifiers only
							echoes = append(echoes, echoing(t, r.client.Host, r.server.Addrs[f]))
						}
					}
					for _, p := range echoes {
						p.goes(t)
					}
					write(t, r.Node, change.file, change.text)
					each(t, list, (*talk).dies)
					for _, p := range echoes {
						p.stops(t)
					}
					write(t, r.Node, change.file, revocableManifests[change.file])
					r.inForce(t, testnet.Allowed)
					// The same ports, in UDP the same sockets, long before the sets forget them.
					each(t, list, func(k *talk) error { return k.again(t, k.first) })
					for _, p := range echoes {
						p.goes(t)
					}
				})
			}
		})
	}
}

// TestSelectedConnectionsEnd is TestRevokedConnectionsEnd for pods that were not isolated before: the subject of a policy gets
// a label, and an egress policy appears. Then the other end may also be the own node, or a machine outside.
func TestSelectedConnectionsEnd(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			r := newRevocable(t, cni)
			outside := r.Outside[testnet.External]
			list := talks(t, r.Node, r.client.Host, r.server.Host, "tcp", "udp")
			openAll(t, list)
			write(t, r.Node, "client.yaml", podManifest("guests", "client", "role: other, app: server")) // no peer any more, while it is not the subject's doing
			each(t, list, (*talk).dies)
			write(t, r.Node, "client.yaml", revocableManifests["client.yaml"])
			r.inForce(t, testnet.Allowed)

			list = talks(t, r.Node, r.client.Host, r.Host, "tcp", "udp")
			list = append(list, talks(t, r.Node, r.client.Host, outside, "tcp", "udp")...)
			list = append(list, talks(t, r.Node, r.client.Host, r.server.Host, "tcp", "udp")...)
			// Services that lead off the bridge: the kernel goes on to take what came over it for bridged.
			list = append(list, behindService(t, r.Node, talks(t, r.Node, r.client.Host, outside, "tcp"))...)
			list = append(list, behindService(t, r.Node, talks(t, r.Node, r.client.Host, r.Host, "tcp"))...)
			openAll(t, list)
			allowed := talks(t, r.Node, r.friend.Host, r.Host, "tcp", "udp")
			allowed = append(allowed, talks(t, r.Node, r.Host, r.client.Host, "tcp", "udp")...) // the node's own are always allowed
			allowed = append(allowed, talks(t, r.Node, outside, r.client.Host, "tcp", "udp")...)
			for _, k := range allowed {
				if k.from == r.Host {
					k.source = 10000 + k.behind.Port() // not bound to the address: the node chooses one
				}
			}
			openAll(t, allowed)
			undisturbed(t, allowed)
			write(t, r.Node, "egress.yaml", policyManifest("guests", "no-egress", "{podSelector: {matchLabels: {role: client}}, policyTypes: [Egress]}"))
			each(t, list, (*talk).dies)
			write(t, r.Node, "egress.yaml", "# nothing\n")
			r.inForce(t, testnet.Allowed)
			each(t, list, func(k *talk) error { return k.again(t, k.first) })
		})
	}
}

// TestKeptConnections is the control of the tests above: the same talks and changes with --established=keep. Nothing ends.
func TestKeptConnections(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			r := newRevocable(t, cni, "--established=keep")
			list := talks(t, r.Node, r.client.Host, r.server.Host, "tcp", "udp")
			list = append(list, talks(t, r.Node, r.client.Host, r.Host, "tcp", "udp")...)
			list = append(list, behindService(t, r.Node, talks(t, r.Node, r.client.Host, r.server.Host, "tcp", "udp"))...)
			openAll(t, list)
			echo := echoing(t, r.client.Host, r.server.Addrs[testnet.IPv4])
			echo.goes(t)
			for _, change := range revocations {
				write(t, r.Node, change.file, change.text)
				r.inForce(t, testnet.Denied)
				converse(t, list)
				echo.goes(t)
				write(t, r.Node, change.file, revocableManifests[change.file])
				r.inForce(t, testnet.Allowed)
			}
			write(t, r.Node, "egress.yaml", policyManifest("guests", "no-egress", "{podSelector: {matchLabels: {role: client}}, policyTypes: [Egress]}"))
			r.inForce(t, testnet.Denied)
			converse(t, list)
			echo.goes(t)
		})
	}
}

// silence is what TestForgottenConnections and its control have in common: talks that a change revokes while both ends are silent.
func silence(t *testing.T, cni string, flags ...string) (revocable, []*talk, *conntrack.Table) {
	t.Helper()
	r := newRevocable(t, cni, flags...)
	table := tracked(t, r.Node)
	list := talks(t, r.Node, r.client.Host, r.server.Host, "tcp")
	list = append(list, behindService(t, r.Node, talks(t, r.Node, r.client.Host, r.server.Host, "tcp"))...)
	list = append(list, talks(t, r.Node, r.client.Host, r.Host, "tcp")...)
	list = append(list, talks(t, r.Node, r.client.Host, r.Outside[testnet.External], "tcp")...)
	openAll(t, list)
	write(t, r.Node, revocations[0].file, revocations[0].text)
	write(t, r.Node, "egress.yaml", policyManifest("guests", "no-egress", "{podSelector: {matchLabels: {role: client}}, policyTypes: [Egress]}"))
	return r, list, table
}

// TestForgottenConnections holds that a revoked connection whose ends stay silent until the sets have forgotten it stays dead,
// whoever speaks first. The sets are emptied by hand: without a daemon, whose tables nobody else can change.
func TestForgottenConnections(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			r, list, table := silence(t, cni)
			poll(t, "the connections are gone while their ends are silent", func() bool { return entries(t, table, r.client.Host) == 0 })
			if err := r.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			services := 0 // of either family, whose clients are behind a bridge
			for _, k := range list {
				if k.target != k.behind && cni == "bridge" {
					services++
				}
			}
			for set, want := range map[string]int{"cut4": len(list) / 2, "cut6": len(list) / 2, "cutnat4": services / 2, "cutnat6": services / 2} {
				out, err := r.Host.Run(t.Context(), "nft", "-j", "list", "set", "inet", "podwall", set)
				if err != nil {
					t.Fatal(err)
				}
				if got := strings.Count(out, `"expires"`); got != want {
					t.Errorf("%s holds %d connections, want %d: %s", set, got, want, out)
				}
				if _, err := r.Host.Run(t.Context(), "nft", "flush", "set", "inet", "podwall", set); err != nil {
					t.Fatal(err)
				}
			}
			each(t, list, func(k *talk) error { return k.silent(250) }) // half a second each: TCP repeats itself meanwhile
		})
	}
}

// TestBridgedClientsOfServices holds that a client on a bridge that speaks on a revoked connection to a Service is reset, and by
// which means: the control is the same with those sets emptied, and then the client meets silence. Nothing asks for the chain
// that looks at the sets where nobody is bridged.
func TestBridgedClientsOfServices(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, cni       string
		looked, emptied bool
	}{
		{name: "bridge", cni: "bridge", looked: true},
		{name: "bridge, sets emptied", cni: "bridge", looked: true, emptied: true},
		{name: "ptp", cni: "ptp"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newRevocable(t, tt.cni)
			table := tracked(t, r.Node)
			list := behindService(t, r.Node, talks(t, r.Node, r.client.Host, r.server.Host, "tcp"))
			list = slices.DeleteFunc(list, func(k *talk) bool { return k.first != client })
			chain := func() bool {
				out, err := r.Host.Run(t.Context(), "nft", "list", "table", "inet", "podwall")
				if err != nil {
					t.Fatal(err)
				}
				return strings.Contains(out, "hook prerouting")
			}
			openAll(t, list)
			if chain() {
				t.Error("the chain is there before there is anything for it")
			}
			write(t, r.Node, revocations[0].file, revocations[0].text)
			poll(t, "the connections are gone while their ends are silent", func() bool { return entries(t, table, r.client.Host) == 0 })
			if tt.looked {
				poll(t, "the chain is there", chain)
			} else if chain() {
				t.Error("the chain is there without bridged clients")
			}
			if !tt.emptied {
				each(t, list, (*talk).dies)
				write(t, r.Node, revocations[0].file, revocableManifests[revocations[0].file])
				r.inForce(t, testnet.Allowed)
				each(t, list, func(k *talk) error { return k.again(t, client) })
				return
			}
			if err := r.KillDaemon(); err != nil { // nobody else could change the table
				t.Fatal(err)
			}
			if _, err := r.Host.Run(t.Context(), "nft", "flush set inet podwall cutnat4; flush set inet podwall cutnat6"); err != nil {
				t.Fatal(err)
			}
			each(t, list, func(k *talk) error {
				if err := k.silent(250); err != nil {
					return err
				}
				select {
				case <-k.ends[client].over:
					return fmt.Errorf("%s: the client's connection ended, %w, with nothing to end it", k.name, k.ends[client].err)
				default:
					return k.untilReset(server)
				}
			})
		})
	}
}

// TestObviousRevocation is the control of TestForgottenConnections, and of the sets as such: the same without them, conntrack
// entries being deleted by somebody. Then all connections come back whose server is the first to speak.
func TestObviousRevocation(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			r, list, table := silence(t, cni, "--established=keep")
			r.inForce(t, testnet.Denied)
			var ips []netip.Addr
			for _, ip := range r.client.Addrs {
				ips = append(ips, ip)
			}
			if err := table.Forget(ips); err != nil {
				t.Fatal(err)
			}
			// Behind a Service the server's packets do not find their client without the entry.
			list = slices.DeleteFunc(list, func(k *talk) bool { return k.target != k.behind })
			var back atomic.Int32
			each(t, list, func(k *talk) error {
				for range 100 {
					if k.first == client {
						_ = k.ends[client].say()
						time.Sleep(sayEvery)
					}
				}
				if k.first == client && k.ends[server].heard.Load() > 1 {
					return fmt.Errorf("%s: the client was heard, which its policy denies", k.name)
				}
				if err := k.converse(server); err != nil {
					return err
				}
				back.Add(1)
				return nil
			})
			t.Logf("%d of %d revoked connections came back when their server spoke", back.Load(), len(list))
		})
	}
}

// withMain returns the node's conflist with another main plugin, or with that one only.
func withMain(t *testing.T, n *testnet.Node, kind string, alone bool) []byte {
	t.Helper()
	text, err := n.Conflist()
	if err != nil {
		t.Fatal(err)
	}
	var list map[string]any
	if err := json.Unmarshal(text, &list); err != nil {
		t.Fatal(err)
	}
	plugins := list["plugins"].([]any)
	plugins[0].(map[string]any)["type"] = kind
	if alone {
		list["plugins"] = plugins[:1]
	}
	if text, err = json.Marshal(list); err != nil {
		t.Fatal(err)
	}
	return text
}

// TestDeletedPodIsSilent holds that from podwall's DEL to the end of the veth no packet passes, however long that takes: the
// main plugin's DEL fails. The control is that failure without podwall's DEL.
func TestDeletedPodIsSilent(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{"pods.yaml": quiet["pods.yaml"]}})
			table := tracked(t, n)
			a, b := add(t, n, "default", "a"), add(t, n, "default", "b")
			good, err := n.Conflist()
			if err != nil {
				t.Fatal(err)
			}
			list := append(talks(t, n, a.Host, b.Host, "tcp", "udp"), talks(t, n, b.Host, a.Host, "tcp", "udp")...)
			openAll(t, list)
			echo := echoing(t, b.Host, a.Addrs[testnet.IPv4])
			del := func(conflist []byte) {
				t.Helper()
				if err := n.SetConflist(conflist); err != nil {
					t.Fatal(err)
				}
				if _, err := n.CNITool(t.Context(), "del", a); err == nil {
					t.Fatal("DEL succeeds without the main plugin")
				}
			}
			del(withMain(t, n, "nothing", true))
			converse(t, list)
			echo.goes(t)
			if err := n.SetConflist(good); err != nil {
				t.Fatal(err)
			}
			del(withMain(t, n, "nothing", false))
			if n := entries(t, table, a.Host); n > 0 {
				t.Errorf("%d connections are left after DEL", n)
			}
			each(t, list, func(k *talk) error { return k.silent(250) })
			echo.stops(t)
			if n := entries(t, table, a.Host); n > 0 {
				t.Errorf("%d connections have begun after DEL", n)
			}
			if err := n.Host.Serve(testnet.TCP(80), testnet.UDP(80)); err != nil {
				t.Fatal(err)
			}
			expectAll(t, n, b.Host, n.Host, testnet.UDP(80), testnet.Allowed)
			expectAll(t, n, a.Host, n.Host, testnet.UDP(80), testnet.Denied)
			expectAll(t, n, a.Host, n.Host, testnet.TCP(80), testnet.Denied)
			if err := n.SetConflist(good); err != nil {
				t.Fatal(err)
			}
			if _, err := n.CNITool(t.Context(), "del", a); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestSuccessorInheritsNothing holds that a new pod with the address of a former one gets nothing of its connections: not after
// a DEL, and not after one that no daemon saw.
func TestSuccessorInheritsNothing(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		for _, alive := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, daemon %v at DEL", cni, alive), func(t *testing.T) {
				t.Parallel()
				n := start(t, setup{cni: cni, manifests: map[string]string{
					"pods.yaml":   podManifest("default", "peer", "role: client") + podManifest("default", "old", "app: old") + podManifest("default", "new", "app: new"),
					"policy.yaml": policyManifest("default", "new", "{podSelector: {matchLabels: {app: new}}, policyTypes: [Ingress, Egress]}"),
				}})
				table := tracked(t, n)
				peer, old := add(t, n, "default", "peer"), add(t, n, "default", "old")
				list := append(talks(t, n, peer.Host, old.Host, "tcp", "udp"), talks(t, n, old.Host, peer.Host, "tcp", "udp")...)
				openAll(t, list)
				if !alive {
					if err := n.KillDaemon(); err != nil {
						t.Fatal(err)
					}
				}
				before := entries(t, table, old.Host)
				if before < len(list) {
					t.Fatalf("%d connections, want %d", before, len(list))
				}
				if _, err := n.CNITool(t.Context(), "del", old); err != nil {
					t.Fatal(err)
				}
				left := entries(t, table, old.Host)
				if alive && left > 0 {
					t.Errorf("%d of %d connections are left after DEL", left, before)
				}
				if !alive && left != before {
					t.Errorf("%d of %d connections are left without a daemon: then nothing is shown", left, before)
				}
				// host-local goes on from the last address that it gave, unless it has forgotten.
				forgetLast := func() {
					t.Helper()
					last, err := filepath.Glob(filepath.Join(n.Dir, "ipam", n.Name, "last_reserved_ip*"))
					if err != nil || len(last) == 0 {
						t.Fatalf("host-local's notes: %v, %v", last, err)
					}
					for _, file := range last {
						if err := os.Remove(file); err != nil {
							t.Fatal(err)
						}
					}
				}
				next, err := n.NewPod("default", "new", "")
				if err != nil {
					t.Fatal(err)
				}
				marker := fmt.Sprintf("%07d ", 0) // no talk says it
				for _, k := range list {          // what the peer's sockets still send to the address
					peerEnd := k.ends[client]
					if k.from != peer.Host {
						peerEnd = k.ends[server]
					}
					stop := make(chan struct{})
					var sending sync.WaitGroup
					sending.Go(func() {
						for {
							select {
							case <-stop:
								return
							case <-time.After(5 * time.Millisecond):
								_, _ = io.WriteString(peerEnd.Conn, marker)
							}
						}
					})
					t.Cleanup(func() { close(stop); sending.Wait() })
				}
				if !alive {
					if _, err := n.CNITool(t.Context(), "add", next); err == nil {
						t.Fatal("ADD succeeds without a daemon")
					}
					if _, err := n.CNITool(t.Context(), "del", next); err != nil { // as a runtime does after a failure
						t.Fatal(err)
					}
					if err := n.StartDaemon(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				forgetLast()
				if err := n.Add(t.Context(), next); err != nil {
					t.Fatal(err)
				}
				if next.Addrs[testnet.IPv4] != old.Addrs[testnet.IPv4] || next.Addrs[testnet.IPv6] != old.Addrs[testnet.IPv6] {
					t.Fatalf("the new pod has %v, want the old one's %v", next.Addrs, old.Addrs)
				}
				// Before ADD has returned nothing runs in the pod, and what its main plugin has set up may be reached.
				received := openTap(t, next.Host)
				for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
					if received.has(t, marker) {
						t.Fatal("a record of the former pod's connections arrived")
					}
				}
				// The control: the same senders, once they are allowed.
				write(t, n, "policy.yaml", "# nothing\n")
				poll(t, "what the peer sends arrives when it is allowed", func() bool { return received.has(t, marker) })
			})
		}
	}
}

// TestRevocationAcrossRestart holds that what became forbidden while no daemon ran ends when the next one starts, and that what
// is allowed by the one after that works at once.
func TestRevocationAcrossRestart(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			r := newRevocable(t, cni)
			list := talks(t, r.Node, r.client.Host, r.server.Host, "tcp", "udp")
			openAll(t, list)
			restart := func(change func()) {
				t.Helper()
				if err := r.KillDaemon(); err != nil {
					t.Fatal(err)
				}
				change()
				if err := r.StartDaemon(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			restart(func() {
				write(t, r.Node, revocations[0].file, revocations[0].text)
				converse(t, list) // nobody knows yet
			})
			each(t, list, (*talk).dies)
			restart(func() { write(t, r.Node, revocations[0].file, revocableManifests[revocations[0].file]) })
			r.inForce(t, testnet.Allowed)
			each(t, list, func(k *talk) error { return k.again(t, client) })
		})
	}
}
