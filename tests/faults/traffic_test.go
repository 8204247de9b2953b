package faults

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
)

var families = []testnet.Family{testnet.IPv4, testnet.IPv6}

// port is where everything goes to. Nothing listens on its UDP side: what arrives is counted by a tap.
const port = 80

// Two kinds of packets, by the numbers of their protocols.
const (
	udp = unix.IPPROTO_UDP
	tcp = unix.IPPROTO_TCP
)

// arrival says of what kind a packet was and whose.
type arrival struct {
	proto uint8
	from  netip.Addr
}

// tap counts what is delivered to a host by sender, whatever the host's own stack makes of it.
type tap struct {
	host    *testnet.Host
	fd      int
	closing atomic.Bool
	done    chan error

	mu   sync.Mutex
	seen map[arrival]int
}

// tapQueue holds what arrives while the harness does not get to run. An overflow is an error: it could hide what must not arrive.
const tapQueue = 16 << 20

func openTap(h *testnet.Host) (*tap, error) {
	p := &tap{host: h, done: make(chan error, 1), seen: map[arrival]int{}}
	err := h.In(func() error {
		all := int(binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL & 0xff}))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
		if err != nil {
			return err
		}
		p.fd = fd
		timeout := unix.NsecToTimeval((50 * time.Millisecond).Nanoseconds()) // how soon close is heard
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, tapQueue),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))
	})
	if err != nil {
		return nil, fmt.Errorf("open a tap in %s: %w", h.Name, err)
	}
	go func() { p.done <- p.read() }()
	return p, nil
}

func (p *tap) read() error {
	buf := make([]byte, 128)
	for {
		closing := p.closing.Load() // what has arrived before close is still read
		size, from, err := unix.Recvfrom(p.fd, buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if closing {
				return nil
			}
			continue
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN): // ENETDOWN: a link went away, the others go on
			continue
		case err != nil:
			return fmt.Errorf("read the tap in %s: %w", p.host.Name, err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		// A bridge gives a port also what it has no better port for, and only a pod's port has a to_ chain against that: without
		// the tables, as in the control, and until a new pod's ADD, what is for others would be taken for the pod's own.
		if a, to, ok := parseArrival(buf[:size]); ok && slices.Contains(slices.Collect(maps.Values(p.host.Addrs)), to) {
			p.mu.Lock()
			p.seen[a]++
			p.mu.Unlock()
		}
	}
}

// parseArrival reads an IP packet without options or extension headers, as the harness sends them, and whom it is for.
func parseArrival(packet []byte) (arrival, netip.Addr, bool) {
	var a arrival
	var to netip.Addr
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4:
		a, to = arrival{packet[9], netip.AddrFrom4([4]byte(packet[12:16]))}, netip.AddrFrom4([4]byte(packet[16:20]))
	case len(packet) >= 40 && packet[0]>>4 == 6:
		a, to = arrival{packet[6], netip.AddrFrom16([16]byte(packet[8:24]))}, netip.AddrFrom16([16]byte(packet[24:40]))
	}
	return a, to, a.proto == udp || a.proto == tcp
}

// count returns how many packets of a kind a sender has got through, over all its addresses.
func (p *tap) count(proto uint8, from *testnet.Host) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	total := 0
	for _, ip := range from.Addrs {
		total += p.seen[arrival{proto, ip}]
	}
	return total
}

// settleFor is how long packets may be on their way between namespaces after they were sent, on a machine that is busy.
const settleFor = 3 * time.Second

// missing returns how many of the datagrams that some hosts have sent are not there.
func (p *tap) missing(ctx context.Context, sent int, from ...*testnet.Host) int {
	for deadline := time.Now().Add(settleFor); ; {
		left := sent
		for _, h := range from {
			left -= p.count(udp, h)
		}
		if left <= 0 || time.Now().After(deadline) || pause(ctx, lookEvery) != nil {
			return left
		}
	}
}

// close reads what is left and fails if the tap has lost anything.
func (p *tap) close() error {
	p.closing.Store(true)
	err := <-p.done
	stats, statsErr := unix.GetsockoptTpacketStats(p.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	switch {
	case statsErr != nil:
		err = errors.Join(err, fmt.Errorf("read the tap's statistics: %w", statsErr))
	case stats.Drops > 0:
		err = errors.Join(err, fmt.Errorf("the tap in %s lost %d packets: its counts are void", p.host.Name, stats.Drops))
	}
	return errors.Join(err, unix.Close(p.fd))
}

// firstPacket sends the first packet of a new flow, a datagram or a SYN, from the namespace of the calling thread.
func firstPacket(proto uint8, to netip.AddrPort) error {
	family, kind := unix.AF_INET, unix.SOCK_DGRAM
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	if proto == tcp {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	var address unix.Sockaddr
	if to.Addr().Is6() {
		address = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	} else {
		address = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	if err := unix.Connect(fd, address); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connect to %s: %w", to, err)
	}
	if proto == udp {
		if _, err := unix.Write(fd, []byte("x")); err != nil {
			return fmt.Errorf("send to %s: %w", to, err)
		}
	}
	return nil
}

// traffic is a group of senders that run until it is stopped. Their errors are the harness's; what the network does is counted.
type traffic struct {
	g    *errgroup.Group
	ctx  context.Context
	halt context.CancelFunc

	opened, refused    atomic.Int64 // new TCP connections, and those that needed more than their first SYN or got nothing
	established        atomic.Int64
	exchanges, broken  atomic.Int64 // over established connections
	firstFailure       atomic.Pointer[string]
	slowestNanoseconds atomic.Int64
}

func newTraffic(ctx context.Context) *traffic {
	ctx, halt := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	return &traffic{g: g, ctx: ctx, halt: halt}
}

// stop ends all senders.
func (tr *traffic) stop() error {
	tr.halt()
	if err := tr.g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func (tr *traffic) fail(counter *atomic.Int64, format string, args ...any) {
	counter.Add(1)
	text := fmt.Sprintf(format, args...)
	tr.firstFailure.CompareAndSwap(nil, &text)
}

// why is the first thing that the network did wrong to a connection.
func (tr *traffic) why() string {
	if text := tr.firstFailure.Load(); text != nil {
		return *text
	}
	return "nothing"
}

// flood sends first packets of new flows to every address of a host, one per interval, until the traffic or ctx ends. The
// packets are counted in sent.
func (tr *traffic) flood(ctx context.Context, from, to *testnet.Host, proto uint8, interval time.Duration, sent *atomic.Int64) {
	tr.g.Go(func() error {
		return from.In(func() error {
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for i := 0; ; i++ {
				select {
				case <-tr.ctx.Done():
					return nil
				case <-ctx.Done():
					return nil
				case <-tick.C:
				}
				if err := firstPacket(proto, netip.AddrPortFrom(to.Addrs[families[i%len(families)]], port)); err != nil {
					return fmt.Errorf("%s to %s: %w", from.Name, to.Name, err)
				}
				sent.Add(1)
			}
		})
	})
}

// connectTimeout is how long a connection may take: several repetitions of a SYN.
const connectTimeout = 20 * time.Second

// connect opens new connections one after the other. One that needs a second SYN (after 1 s, RFC 6298) was refused once.
func (tr *traffic) connect(from, to *testnet.Host, interval time.Duration) {
	for _, f := range families {
		tr.g.Go(func() error {
			for tr.ctx.Err() == nil {
				if err := tr.connectOnce(from, netip.AddrPortFrom(to.Addrs[f], port)); err != nil {
					return err
				}
				if err := pause(tr.ctx, interval); err != nil {
					return nil //nolint:nilerr // stopped
				}
			}
			return nil
		})
	}
}

func (tr *traffic) connectOnce(from *testnet.Host, to netip.AddrPort) error {
	// A connection that has begun is judged to its end, also when the traffic is being stopped.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(tr.ctx), connectTimeout)
	defer cancel()
	conn, err := from.Dial(ctx, to)
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EMFILE) {
		return err
	}
	tr.opened.Add(1)
	if err != nil {
		tr.fail(&tr.refused, "%s to %s: %v", from.Name, to, err)
		return nil
	}
	defer conn.Close()
	repeated, err := repetitions(conn)
	if err != nil {
		return err
	}
	if repeated > 0 {
		tr.fail(&tr.refused, "%s to %s: connected with SYN number %d", from.Name, to, repeated+1)
		return nil
	}
	if err := testnet.Exchange(conn, "hello", connectTimeout); err != nil {
		tr.fail(&tr.refused, "%s to %s: %v", from.Name, to, err)
	}
	return nil
}

// repetitions returns how many segments of a connection have been sent again.
func repetitions(conn net.Conn) (uint32, error) {
	tc, ok := conn.(*net.TCPConn)
	if !ok {
		return 0, fmt.Errorf("connection is a %T", conn)
	}
	raw, err := tc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	var infoErr error
	err = raw.Control(func(fd uintptr) { info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err = errors.Join(err, infoErr); err != nil {
		return 0, fmt.Errorf("read TCP_INFO: %w", err)
	}
	return info.Total_retrans, nil
}

// establish opens connections and uses them until the traffic ends. A connection is broken when an exchange over it fails.
func (tr *traffic) establish(from, to *testnet.Host, perFamily int) error {
	for _, f := range families {
		for range perFamily {
			ctx, cancel := context.WithTimeout(tr.ctx, connectTimeout)
			conn, err := from.Dial(ctx, netip.AddrPortFrom(to.Addrs[f], port))
			cancel()
			if err != nil {
				return fmt.Errorf("open a connection to be kept: %w", err)
			}
			tr.established.Add(1)
			tr.g.Go(func() error {
				defer conn.Close()
				for {
					begin := time.Now()
					if err := testnet.Exchange(conn, "still there", connectTimeout); err != nil {
						tr.fail(&tr.broken, "connection of %s: %v", from.Name, err)
						return nil
					}
					took := time.Since(begin).Nanoseconds()
					for slowest := tr.slowestNanoseconds.Load(); took > slowest && !tr.slowestNanoseconds.CompareAndSwap(slowest, took); {
						slowest = tr.slowestNanoseconds.Load()
					}
					tr.exchanges.Add(1)
					if pause(tr.ctx, 10*time.Millisecond) != nil {
						return nil
					}
				}
			})
		}
	}
	return nil
}
