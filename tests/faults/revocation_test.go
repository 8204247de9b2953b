package faults

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/nft"
)

var (
	revocations    = flag.Int("revocations", 10, "how often a connection is revoked, and timed")
	unrelatedFlows = flag.Int("unrelated-flows", 10_000, "how many other connections the node tracks meanwhile")
	revokedFlows   = flag.Int("revoked-flows", 2_000, "how many connections one change revokes at once")
)

const (
	sendEvery = time.Millisecond
	// silence is when a UDP flow counts as dead: by far more than a sender that was not scheduled keeps still.
	silence = 300 * time.Millisecond
	// calm is between two revocations: they are timed one by one, and each is followed by a second look at the connections.
	calm = 1500 * time.Millisecond
)

// onlyClients lets those of one label to the server.
var onlyClients = policyManifest("p", "{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {role: client}}}]}]}")

// TestRevocationTime reports how long a connection that sends all the time lives on after the change that revokes it. There are
// two beginnings: the manifest's rename, and the commit of the rules, of which the kernel tells every listener. The end is when
// the last record was sent that arrived: between two namespaces a packet is delivered by the system call that sends it.
func TestRevocationTime(t *testing.T) {
	w := newRevoking(t, *unrelatedFlows)
	var fromRename, fromCommit []time.Duration
	for i := range *revocations {
		proto, family := []string{"tcp", "udp"}[i%2], families[i/2%2]
		s := w.stream(t, proto, family)
		s.begin(t)
		renamed := w.revoke(t)
		last := s.end(t)
		commit, ok := w.committedAfter(renamed)
		if !ok {
			t.Fatal("the kernel told of no commit after the change")
		}
		fromRename, fromCommit = append(fromRename, last.Sub(renamed)), append(fromCommit, last.Sub(commit))
		if err := pause(t.Context(), time.Until(renamed.Add(calm))); err != nil {
			t.Fatal(err)
		}
		w.allow(t)
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatal(err)
	}
	report(t, fmt.Sprintf("revocation of a connection that sends every %s: from commit to its last payload least %s p50 %s p99 %s max %s, from the manifest's rename p50 %s p99 %s, of %d, with %d other connections tracked, load %s",
		sendEvery, slices.Min(fromCommit).Round(100*time.Microsecond), quantile(fromCommit, 50), quantile(fromCommit, 99), quantile(fromCommit, 100), quantile(fromRename, 50), quantile(fromRename, 99), *revocations, w.tracked(t), strings.Fields(string(load))[0]))
}

// TestRevocationTimeSeesKept is the control: what keeps connections is not taken for what ends them.
func TestRevocationTimeSeesKept(t *testing.T) {
	t.Parallel()
	w := newRevoking(t, 0, "--established=keep")
	for _, proto := range []string{"tcp", "udp"} {
		s := w.stream(t, proto, testnet.IPv4)
		s.begin(t)
		w.revoke(t)
		if err := pause(t.Context(), 2*silence); err != nil {
			t.Fatal(err)
		}
		before := s.heard.Load()
		if err := await(t.Context(), "the stream goes on", func() (bool, error) { return s.heard.Load() > before+100, nil }); err != nil {
			t.Errorf("%s: %v", proto, err)
		}
		s.stop()
		w.allow(t)
	}
}

// TestRevokeMany has one change revoke many connections, and looks how long others wait meanwhile: an ADD, and the effect of
// another change.
func TestRevokeMany(t *testing.T) {
	for _, established := range []string{"cut", "keep"} {
		t.Run(established, func(t *testing.T) {
			w := newRevoking(t, 0, "--established="+established)
			calmAdd, calmEffect := w.others(t, 0)
			w.track(t, w.client.Addrs[testnet.IPv4], w.server.Addrs[testnet.IPv4], *revokedFlows)
			before := w.tracked(t)
			if before < *revokedFlows {
				t.Fatalf("%d connections, want %d", before, *revokedFlows)
			}
			begin := w.revoke(t)
			// The connections of the measurement come on top and go as others' do.
			few := *revokedFlows / 20
			gone := make(chan time.Duration, 1)
			var watching errgroup.Group
			if established == "cut" {
				watching.Go(func() error {
					defer close(gone)
					return await(t.Context(), "the connections are gone", func() (bool, error) {
						now, err := w.count()
						if err == nil && now < few {
							gone <- time.Since(begin)
						}
						return now < few, err
					})
				})
			}
			busyAdd, busyEffect := w.others(t, 1)
			line := fmt.Sprintf("--established=%s, %d connections revoked at once: ", established, *revokedFlows)
			if established == "cut" {
				if err := watching.Wait(); err != nil {
					t.Fatal(err)
				}
				said := ""
				if err := await(t.Context(), "the daemon tells of them", func() (bool, error) {
					var most int
					most, said = mostEnded(w.Node)
					return most >= *revokedFlows, nil
				}); err != nil {
					t.Fatal(err)
				}
				line += fmt.Sprintf("entries gone %s after the rename (the daemon: %s)", (<-gone).Round(time.Millisecond), said)
			} else {
				if err := pause(t.Context(), calm); err != nil {
					t.Fatal(err)
				}
				if now := w.tracked(t); now < *revokedFlows {
					t.Errorf("%d connections are left, want %d", now, *revokedFlows)
				}
				line += "all entries stay"
			}
			report(t, fmt.Sprintf("%s; meanwhile ADD took %s (before: %s), another policy's effect %s (before: %s)", line, busyAdd, calmAdd, busyEffect, calmEffect))
		})
	}
}

// mostEnded is what the daemon says of the most connections that it has ended at once.
func mostEnded(n *testnet.Node) (int, string) {
	most, found := 0, "none"
	for line := range strings.Lines(n.Log()) {
		_, what, _ := strings.Cut(strings.TrimSpace(line), "policies no longer allow\" ")
		count := 0
		if _, err := fmt.Sscanf(what, "connections=%d", &count); err == nil && count > most {
			most, found = count, what
		}
	}
	return most, found
}

func quantile(list []time.Duration, percent int) time.Duration {
	sorted := slices.Sorted(slices.Values(list))
	return sorted[(len(sorted)*percent+99)/100-1].Round(100 * time.Microsecond)
}

// revoking is a node with a client, which may or may not reach a server, and somebody else of the same kind.
type revoking struct {
	*testnet.Node
	client, server, other *testnet.Pod
	handle                *netlink.Handle

	mu      sync.Mutex
	commits []time.Time // of whatever transaction in the node
}

func newRevoking(t *testing.T, unrelated int, flags ...string) *revoking {
	t.Helper()
	n := newNode(t, "ptp", map[string]string{
		"client.yaml": podManifest("client", "role: client"), "other.yaml": podManifest("other", "role: client"),
		"server.yaml": podManifest("server", "app: server"), "policy.yaml": onlyClients,
	})
	n.DaemonFlags = flags
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := &revoking{Node: n, client: add(t, n, "client"), server: add(t, n, "server"), other: add(t, n, "other")}
	ns, err := netns.GetFromName(n.Name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	if w.handle, err = netlink.NewHandleAt(ns, unix.NETLINK_NETFILTER); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.handle.Close)
	kernel, err := nft.New(nft.Config{NetNS: int(ns)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var watching errgroup.Group
	watching.Go(func() error {
		return kernel.Watch(ctx, func(who string) {
			if who == "" {
				return
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.commits = append(w.commits, time.Now())
		})
	})
	t.Cleanup(func() {
		cancel()
		if err := watching.Wait(); err != nil {
			t.Error(err)
		}
		kernel.Close()
	})
	// From a documentation range to another: they are nobody's on this node.
	w.track(t, netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.19.0.1"), unrelated)
	return w
}

// track has the kernel track established connections that nobody has opened.
func (w *revoking) track(t *testing.T, from, to netip.Addr, count int) {
	t.Helper()
	if text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max"); err != nil {
		t.Fatal(err)
	} else if most, err := strconv.Atoi(strings.TrimSpace(string(text))); err != nil || most != 0 && most < count+count/10 {
		t.Fatalf("nf_conntrack_max is %s (%v), too few for %d connections: set it, or take fewer", text, err, count)
	}
	const ports, established = 60_000, 3 // TCP_CONNTRACK_ESTABLISHED
	for i := range count {
		sport, dport := uint16(1024+i%ports), uint16(10_000+i/ports)
		forward := netlink.IPTuple{SrcIP: from.AsSlice(), DstIP: to.AsSlice(), SrcPort: sport, DstPort: dport, Protocol: unix.IPPROTO_TCP}
		reverse := netlink.IPTuple{SrcIP: to.AsSlice(), DstIP: from.AsSlice(), SrcPort: dport, DstPort: sport, Protocol: unix.IPPROTO_TCP}
		err := w.handle.ConntrackCreate(netlink.ConntrackTable, unix.AF_INET, &netlink.ConntrackFlow{
			FamilyType: unix.AF_INET, Forward: forward, Reverse: reverse, TimeOut: 3600, ProtoInfo: &netlink.ProtoInfoTCP{State: established},
		})
		if err != nil {
			t.Fatalf("create connection %d of %d: %v", i, count, err)
		}
	}
}

// tracked is how many connections the node has.
func (w *revoking) tracked(t *testing.T) int {
	t.Helper()
	count, err := w.count()
	if err != nil {
		t.Fatal(err)
	}
	return count
}

func (w *revoking) count() (int, error) {
	count := 0
	err := w.Host.In(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count") // of the reader's namespace
		if err != nil {
			return err
		}
		count, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err
	})
	return count, err
}

// label gives a pod that label as its only one and returns when its manifest was renamed.
func (w *revoking) label(t *testing.T, name, label string) time.Time {
	t.Helper()
	begin := time.Now()
	if err := w.WriteManifest(name+".yaml", podManifest(name, label)); err != nil {
		t.Fatal(err)
	}
	return begin
}

func (w *revoking) revoke(t *testing.T) time.Time {
	t.Helper()
	return w.label(t, "client", "role: guest")
}

// allow returns when the client can reach the server again.
func (w *revoking) allow(t *testing.T) {
	t.Helper()
	w.label(t, "client", "role: client")
	for _, f := range families {
		err := await(t.Context(), "the client is allowed again", func() (bool, error) {
			s := w.stream(t, "udp", f)
			s.begin(nil)
			defer s.stop()
			return s.heardWithin(50*time.Millisecond, 1), nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// committedAfter is the first commit after a time.
func (w *revoking) committedAfter(begin time.Time) (time.Time, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.IndexFunc(w.commits, func(at time.Time) bool { return at.After(begin) })
	if i < 0 {
		return time.Time{}, false
	}
	return w.commits[i], true
}

// others measures what somebody else waits: an ADD, and a change of the other client's label until the last new flow of it passed.
func (w *revoking) others(t *testing.T, round int) (time.Duration, time.Duration) {
	t.Helper()
	added := make(chan time.Duration, 1)
	var adding errgroup.Group
	adding.Go(func() error {
		begin := time.Now()
		_, err := w.AddPod(t.Context(), "default", fmt.Sprintf("added%d", round), "")
		added <- time.Since(begin)
		return err
	})
	inbox := newInbox(w.server.Host, "udp", netip.AddrPortFrom(w.server.Addrs[testnet.IPv4], 7000))
	defer inbox.close()
	const before = 10 // of flows it must have let in, when it is changed
	var begin time.Time
	var times []time.Time
	for last, since := int64(0), time.Now(); begin.IsZero() || time.Since(since) < silence; time.Sleep(sendEvery) {
		if begin.IsZero() && last > before {
			begin = w.label(t, "other", "role: guest")
		}
		times = append(times, time.Now())
		if err := oneRecord(w.other.Host, inbox.address, len(times)); err != nil {
			t.Fatal(err)
		}
		if heard := inbox.heard.Load(); heard > last {
			last, since = heard, time.Now()
		}
		if time.Since(times[0]) > patience {
			t.Fatal("another policy has no effect")
		}
	}
	if err := adding.Wait(); err != nil {
		t.Fatal(err)
	}
	w.label(t, "other", "role: client")
	effect := max(0, times[inbox.heard.Load()-1].Sub(begin))
	return (<-added).Round(time.Millisecond), effect.Round(time.Millisecond)
}

const recordSize = 8

// oneRecord sends one datagram from a fresh socket.
func oneRecord(from *testnet.Host, to netip.AddrPort, number int) error {
	var conn net.Conn
	err := from.In(func() error {
		var err error
		conn, err = net.Dial("udp", to.String())
		return err
	})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(conn, "%07d ", number)
	return errors.Join(err, conn.Close())
}

// inbox is a server that remembers the highest record that it has got.
type inbox struct {
	address netip.AddrPort
	heard   atomic.Int64
	close   func()
}

func newInbox(h *testnet.Host, proto string, at netip.AddrPort) *inbox {
	b := &inbox{}
	hear := func(r io.Reader) {
		buf := make([]byte, recordSize)
		for {
			if _, err := io.ReadFull(r, buf); err != nil {
				return
			}
			if n, err := strconv.ParseInt(string(buf[:recordSize-1]), 10, 64); err == nil && n > b.heard.Load() {
				b.heard.Store(n)
			}
		}
	}
	err := h.In(func() error {
		if proto == "udp" {
			conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
			if err != nil {
				return err
			}
			b.address, b.close = conn.LocalAddr().(*net.UDPAddr).AddrPort(), func() { _ = conn.Close() }
			go func() {
				// One answer: conntrack takes a flow that nobody answers for new with every packet.
				buf := make([]byte, recordSize)
				if _, from, err := conn.ReadFrom(buf); err == nil {
					_, _ = conn.WriteTo(buf, from)
				}
				b.heard.Add(1)
				hear(conn)
			}()
			return nil
		}
		listener, err := net.Listen("tcp", at.String())
		if err != nil {
			return err
		}
		var accepted atomic.Pointer[net.Conn]
		b.address = listener.Addr().(*net.TCPAddr).AddrPort()
		b.close = func() {
			_ = listener.Close()
			if c := accepted.Load(); c != nil {
				_ = (*c).Close()
			}
		}
		go func() {
			if conn, err := listener.Accept(); err == nil {
				accepted.Store(&conn)
				hear(conn)
			}
		}()
		return nil
	})
	if err != nil {
		panic(err)
	}
	return b
}

// stream is a connection over which the client sends a record every sendEvery.
type stream struct {
	*inbox
	w     *revoking
	proto string
	conn  net.Conn
	done  chan struct{}
	over  chan struct{}

	mu   sync.Mutex
	sent []time.Time
	err  error
}

func (w *revoking) stream(t *testing.T, proto string, f testnet.Family) *stream {
	t.Helper()
	return &stream{
		inbox: newInbox(w.server.Host, proto, netip.AddrPortFrom(w.server.Addrs[f], 0)),
		w:     w, proto: proto, done: make(chan struct{}), over: make(chan struct{}),
	}
}

// begin opens the connection and, with a test, waits until it is in use.
func (s *stream) begin(t *testing.T) {
	err := s.w.client.In(func() error {
		dialer := net.Dialer{Timeout: patience, KeepAlive: -1}
		var err error
		s.conn, err = dialer.Dial(s.proto, s.address.String())
		return err
	})
	if err != nil {
		panic(err)
	}
	go func() {
		defer close(s.over)
		tick := time.NewTicker(sendEvery)
		defer tick.Stop()
		for {
			s.mu.Lock()
			s.sent = append(s.sent, time.Now())
			number := len(s.sent)
			s.mu.Unlock()
			if _, err := fmt.Fprintf(s.conn, "%07d ", number); err != nil && s.proto == "tcp" {
				s.err = err
				return
			}
			select {
			case <-s.done:
				return
			case <-tick.C:
			}
		}
	}()
	if t != nil && !s.heardWithin(patience, 50) {
		t.Fatalf("%s: 50 records have not been heard", s.proto)
	}
}

func (s *stream) heardWithin(timeout time.Duration, records int64) bool {
	for deadline := time.Now().Add(timeout); s.heard.Load() < records; {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(sendEvery)
	}
	return true
}

func (s *stream) stop() {
	close(s.done)
	<-s.over
	_ = s.conn.Close()
	s.close()
}

// end waits until the connection is dead and returns when the last record was sent that arrived.
func (s *stream) end(t *testing.T) time.Time {
	t.Helper()
	last, since := s.heard.Load(), time.Now()
	for begin := time.Now(); time.Since(since) < silence; time.Sleep(sendEvery) {
		if heard := s.heard.Load(); heard > last {
			last, since = heard, time.Now()
		}
		if time.Since(begin) > patience {
			t.Fatalf("%s: records are still heard", s.proto)
		}
	}
	s.mu.Lock()
	at, sent := s.sent[last-1], len(s.sent)
	s.mu.Unlock()
	if s.proto == "tcp" {
		<-s.over
		if !errors.Is(s.err, unix.ECONNRESET) && !errors.Is(s.err, unix.EPIPE) {
			t.Fatalf("the connection ended by %v, not by a reset", s.err)
		}
	}
	if int64(sent) <= last {
		t.Fatalf("%s: nothing was sent after the last record that arrived", s.proto)
	}
	s.stop()
	return at
}
