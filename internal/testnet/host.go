package testnet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Family is an IP version.
type Family int

// The two families, in the order in which they are shown.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns IPv4 or IPv6.
func (f Family) String() string { return "IPv" + strconv.Itoa(int(f)) }

func familyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Port is a port number with its protocol, "tcp" or "udp".
type Port struct {
	Proto  string
	Number uint16
}

// TCP returns a TCP port.
func TCP(n uint16) Port { return Port{"tcp", n} }

// UDP returns a UDP port.
func UDP(n uint16) Port { return Port{"udp", n} }

// String returns 8080/tcp.
func (p Port) String() string { return strconv.Itoa(int(p.Number)) + "/" + p.Proto }

func (p Port) proto() uint8 {
	if p.Proto == "udp" {
		return unix.IPPROTO_UDP
	}
	return unix.IPPROTO_TCP
}

// Host is whoever can send and receive probes: a pod, the node itself, or a machine outside the cluster.
type Host struct {
	Name  string
	Addrs map[Family]netip.Addr

	node     *Node
	nsName   string
	ns       netns.NsHandle
	observer observer

	mu        sync.Mutex
	listeners []io.Closer
	received  map[string]bool // tokens that a server of this host has read
}

// Netns returns the path of the host's network namespace.
func (h *Host) Netns() string { return "/run/netns/" + h.nsName }

// Run runs a command inside the host's namespace and returns its standard output.
func (h *Host) Run(ctx context.Context, argv ...string) (string, error) {
	var stderr strings.Builder
	cmd := command(ctx, h.nsName, argv...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("run %q in %s: %w: %s", strings.Join(argv, " "), h.Name, err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// In runs f on a thread inside the host's namespace, for sockets that the probes do not cover.
func (h *Host) In(f func() error) error { return inNS(h.ns, f) }

// Serve answers probes on the ports, in both families, until the host is closed.
func (h *Host) Serve(ports ...Port) error {
	// A host with several addresses must answer a datagram from the one that it came to; a pod has one per family.
	addresses := []string{"::"}
	if len(h.Addrs) > 0 {
		addresses = nil
		for _, a := range h.Addrs {
			addresses = append(addresses, a.String())
		}
	}
	return inNS(h.ns, func() error {
		for _, p := range ports {
			for _, a := range addresses {
				if err := h.serve(p, net.JoinHostPort(a, strconv.Itoa(int(p.Number)))); err != nil {
					return fmt.Errorf("serve %s on %s: %w", p, h.Name, err)
				}
			}
		}
		return nil
	})
}

func (h *Host) serve(p Port, address string) error {
	var server io.Closer
	if p.Proto == "udp" {
		conn, err := net.ListenPacket("udp", address)
		if err != nil {
			return err
		}
		go h.serveUDP(conn)
		server = conn
	} else {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		go h.serveTCP(listener)
		server = listener
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.listeners = append(h.listeners, server)
	return nil
}

// serveTCP echoes lines for as long as the client stays.
func (h *Host) serveTCP(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return // closed
		}
		go func() {
			defer conn.Close()
			lines := bufio.NewReader(conn)
			for {
				line, err := lines.ReadString('\n')
				if err != nil {
					return
				}
				h.record(line)
				if _, err := io.WriteString(conn, line); err != nil {
					return
				}
			}
		}()
	}
}

func (h *Host) serveUDP(conn net.PacketConn) {
	buf := make([]byte, 256)
	for {
		n, from, err := conn.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		h.record(string(buf[:n]))
		_, _ = conn.WriteTo(buf[:n], from)
	}
}

func (h *Host) record(token string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.received[token] = true
}

// Observed reports whether a packet of an IP protocol with this source port (identifier of an ICMP echo) has reached the host.
func (h *Host) Observed(ctx context.Context, proto uint8, sport uint16) (bool, error) {
	seen, err := h.observer.saw(ctx)
	return seen[flow{proto, sport}], err
}

func (h *Host) hasReceived(token string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.received[token]
}

func (h *Host) close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for _, l := range h.listeners {
		errs = append(errs, l.Close())
	}
	h.listeners = nil
	if h.observer != nil {
		errs = append(errs, h.observer.close())
	}
	errs = append(errs, h.ns.Close())
	return errors.Join(errs...)
}

// Dial opens a TCP connection from the host, to be kept open across changes.
func (h *Host) Dial(ctx context.Context, address netip.AddrPort) (net.Conn, error) {
	return h.dial(ctx, "tcp", address, 0)
}

func (h *Host) dial(ctx context.Context, proto string, address netip.AddrPort, sport uint16) (net.Conn, error) {
	dialer := net.Dialer{KeepAlive: -1}
	if proto == "udp" {
		dialer.LocalAddr = &net.UDPAddr{Port: int(sport)}
	} else {
		dialer.LocalAddr = &net.TCPAddr{Port: int(sport)}
	}
	network := proto + strconv.Itoa(int(familyOf(address.Addr())))
	var conn net.Conn
	err := inNS(h.ns, func() error {
		var err error
		conn, err = dialer.DialContext(ctx, network, address.String())
		return err
	})
	return conn, err
}

// Exchange sends a line over an open connection and waits for its echo.
func Exchange(conn net.Conn, line string, timeout time.Duration) error {
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	buf := make([]byte, len(line)+1)
	if _, err := io.ReadFull(conn, buf); err != nil {
		return fmt.Errorf("wait for echo: %w", err)
	}
	if string(buf) != line+"\n" {
		return fmt.Errorf("echo is %q, sent %q", buf, line)
	}
	return nil
}

// Verdict is what became of a probe, judged at both ends.
type Verdict int

// A probe is allowed or denied. Everything else is a failure of its own kind and equal to neither.
const (
	Unjudged Verdict = iota
	Denied           // the client failed and nothing of it reached the receiver
	Allowed          // the receiver read the token and the client got it back
	Leaked           // packets reached the receiver, yet the client got no answer
	Forged           // the client got an answer that the receiver did not give
)

// String says the verdict in words.
func (v Verdict) String() string {
	switch v {
	case Denied:
		return "denied"
	case Allowed:
		return "allowed"
	case Leaked:
		return "leaked (packets reached the receiver, the client got no answer)"
	case Forged:
		return "forged (answered by someone who is not the receiver)"
	default:
		return "unjudged"
	}
}

// Probe is one attempt to reach a receiver.
type Probe struct {
	From, To *Host
	Family   Family
	Port     Port
	// Via is where the client sends to if that is not the receiver's own address and port: a Service.
	Via netip.AddrPort
}

// The time that a client waits for an answer. Silence costs it all, so that it is the length of every matrix with a denial.
const (
	probeTimeout = 1200 * time.Millisecond
	udpResend    = 400 * time.Millisecond
)

// Probe source ports are used once per node, so that a packet tells its probe, and stay below the ephemeral range (32768), so that no other socket takes one.
const (
	firstProbePort = 20000
	probePorts     = 12000
)

var tokens atomic.Uint64

// Try sends the probe once and judges it. An error means that it could not be judged.
func (p Probe) Try(ctx context.Context) (Verdict, error) {
	target := p.Via
	if !target.IsValid() {
		address, ok := p.To.Addrs[p.Family]
		if !ok {
			return Unjudged, fmt.Errorf("probe %s: it has no %s address", p.To.Name, p.Family)
		}
		target = netip.AddrPortFrom(address, p.Port.Number)
	}
	probe := p.From.node.probes.Add(1)
	if probe > probePorts {
		return Unjudged, fmt.Errorf("probe %s: node %s has used all of its %d probe ports; use a fresh node", p.To.Name, p.From.node.Name, probePorts)
	}
	f := flow{p.Port.proto(), firstProbePort + uint16(probe)}
	token := fmt.Sprintf("token-%d", tokens.Add(1))

	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	answered, err := p.exchange(ctx, target, f.sport, token)
	if err != nil {
		return Unjudged, fmt.Errorf("probe %s -> %s %s: %w", p.From.Name, p.To.Name, p.Port, err)
	}
	received := p.To.hasReceived(token + "\n")
	if answered {
		if received {
			return Allowed, nil
		}
		return Forged, nil
	}
	seen, err := p.To.observer.saw(context.WithoutCancel(ctx))
	if err != nil {
		return Unjudged, fmt.Errorf("probe %s -> %s %s: %w", p.From.Name, p.To.Name, p.Port, err)
	}
	if received || seen[f] {
		return Leaked, nil
	}
	return Denied, nil
}

// exchange reports whether the client got its token back. Its error is one of the harness, not of the network.
func (p Probe) exchange(ctx context.Context, target netip.AddrPort, sport uint16, token string) (bool, error) {
	conn, err := p.From.dial(ctx, p.Port.Proto, target, sport)
	if err != nil {
		if errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EMFILE) {
			return false, err
		}
		return false, nil
	}
	defer conn.Close()
	if p.Port.Proto == "tcp" {
		deadline, _ := ctx.Deadline()
		return Exchange(conn, token, time.Until(deadline)) == nil, nil
	}
	for ctx.Err() == nil {
		if Exchange(conn, token, udpResend) == nil {
			return true, nil
		}
		if err := pause(ctx, udpResend/8); err != nil { // a refused send returns at once
			break
		}
	}
	return false, nil
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
