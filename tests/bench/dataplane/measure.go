package main

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"unsafe"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Ports of the server pod. The policies allow those of the flow, and deny the other one.
const (
	flowPort   = 8080
	deniedPort = 8081
	openPort   = 8082 // UDP, open to anybody: only a forged source is kept out
	clientPort = 40000
)

// payload is the size of a UDP datagram: the smallest that Ethernet does not have to pad.
const payload = 18

// wires are the sockets of both pods in one address family. All but endToEnd is done by one thread: the packet's whole path,
// through the node to the receiver's queue, is in the sender's system call, as its soft interrupts run when that call leaves
// them enabled again. So the thread's CPU time is the cost of the packet.
type wires struct {
	family          int
	home            netns.NsHandle // the client's
	client, server  int            // connected UDP sockets of the established flow
	probe           int            // UDP, unconnected: sends what is not allowed
	denied          int            // UDP, receives on deniedPort
	forge, unforged int            // UDP: sends from a forged source; receives it
	listener        int
	target          []byte // sockaddr of the listener
	deniedTarget    unix.Sockaddr
	unforgedTarget  unix.Sockaddr
	deferred        int
}

func openWires(t *topology, family int) (*wires, error) {
	w := &wires{family: family, home: t.client}
	inet := [2]int{unix.AF_INET, unix.AF_INET6}[family]
	client, server := clientAddrs[family], serverAddrs[family]
	udp := func(fd *int, local netip.AddrPort, remote *netip.AddrPort) error {
		var err error
		// It blocks where a call does not say otherwise, but never for good.
		if *fd, err = unix.Socket(inet, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		timeout := unix.NsecToTimeval(patience.Nanoseconds())
		if err := unix.SetsockoptTimeval(*fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
			return fmt.Errorf("limit how long a socket waits: %w", err)
		}
		if err := unix.Bind(*fd, sockaddr(local)); err != nil {
			return fmt.Errorf("bind to %s: %w", local, err)
		}
		if remote == nil {
			return nil
		}
		return unix.Connect(*fd, sockaddr(*remote))
	}
	flow, source := netip.AddrPortFrom(server, flowPort), netip.AddrPortFrom(client, clientPort)
	w.deniedTarget = sockaddr(netip.AddrPortFrom(server, deniedPort))
	w.unforgedTarget = sockaddr(netip.AddrPortFrom(server, openPort))
	w.target = rawSockaddr(flow)
	err := in(t.client, func() error {
		return errors.Join(udp(&w.client, source, &flow), udp(&w.probe, netip.AddrPortFrom(client, 0), nil), udp(&w.forge, netip.AddrPortFrom(forged[family], 0), nil))
	})
	if err != nil {
		return nil, fmt.Errorf("open the client's sockets: %w", err)
	}
	err = in(t.server, func() error {
		if err := errors.Join(
			udp(&w.server, flow, &source),
			udp(&w.denied, netip.AddrPortFrom(server, deniedPort), nil),
			udp(&w.unforged, netip.AddrPortFrom(server, openPort), nil),
		); err != nil {
			return err
		}
		var err error
		if w.listener, err = unix.Socket(inet, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.Bind(w.listener, sockaddr(flow)), unix.Listen(w.listener, 128))
	})
	if err != nil {
		return nil, fmt.Errorf("open the server's sockets: %w", err)
	}
	return w, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// rawSockaddr is struct sockaddr_in or sockaddr_in6.
func rawSockaddr(a netip.AddrPort) []byte {
	if a.Addr().Is4() {
		b := make([]byte, unix.SizeofSockaddrInet4)
		*(*uint16)(unsafe.Pointer(&b[0])) = unix.AF_INET
		b[2], b[3] = byte(a.Port()>>8), byte(a.Port())
		copy(b[4:], a.Addr().AsSlice())
		return b
	}
	b := make([]byte, unix.SizeofSockaddrInet6)
	*(*uint16)(unsafe.Pointer(&b[0])) = unix.AF_INET6
	b[2], b[3] = byte(a.Port()>>8), byte(a.Port())
	copy(b[8:], a.Addr().AsSlice())
	return b
}

// maxDeferred is how often a packet is looked for again that was not delivered inside the system call: ksoftirqd has it then.
const maxDeferred = 1000

// arrives reports whether fd has received something.
func (w *wires) arrives(fd int, buf []byte) bool {
	for range maxDeferred {
		if n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), unix.MSG_DONTWAIT, 0, 0); errno == 0 && n > 0 {
			return true
		}
		w.deferred++
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	return false
}

func send(fd int, buf []byte) bool {
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), unix.MSG_DONTWAIT, 0, 0)
	return errno == 0
}

// establish makes conntrack's entry of the flow an established one: it has seen both directions.
func (w *wires) establish() error {
	buf := make([]byte, payload)
	if !send(w.client, buf) || !w.arrives(w.server, buf) {
		return errors.New("the client's datagram does not arrive, although the policies allow it")
	}
	if !send(w.server, buf) || !w.arrives(w.client, buf) {
		return errors.New("the server's answer does not arrive")
	}
	return nil
}

// packets returns the CPU time of one packet of the established flow in nanoseconds: to send it, to forward it and to take it from
// the receiver's queue. Nobody waits for it.
func (w *wires) packets(chunks, n int) (float64, error) {
	buf := make([]byte, payload)
	return quartile(chunks, func() (float64, error) {
		start := threadTime()
		for range n {
			if !send(w.client, buf) || !w.arrives(w.server, buf) {
				return 0, errors.New("a packet of the established flow was lost")
			}
		}
		return float64(threadTime()-start) / float64(n), nil
	})
}

// connections returns the CPU time of one connection in microseconds, with both ends: socket, connect, accept, close by reset.
func (w *wires) connections(chunks, n int) (float64, error) {
	var us float64
	err := in(w.home, func() error {
		var err error
		us, err = quartile(chunks, func() (float64, error) {
			start := threadTime()
			for range n {
				if err := w.connection(); err != nil {
					return 0, err
				}
			}
			return float64(threadTime()-start) / float64(n) / 1000, nil
		})
		return err
	})
	return us, err
}

func (w *wires) connection() error {
	inet := uintptr([2]int{unix.AF_INET, unix.AF_INET6}[w.family])
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, inet, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if errno != 0 {
		return fmt.Errorf("open client socket: %w", errno)
	}
	linger := unix.Linger{Onoff: 1}
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&linger)), unsafe.Sizeof(linger), 0)
	// The handshake is complete when this returns: SYN+ACK waits in the backlog of the socket, which is locked until then.
	_, _, errno = unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&w.target[0])), uintptr(len(w.target)))
	if errno != 0 && errno != unix.EINPROGRESS {
		return errors.Join(fmt.Errorf("connect: %w", errno), unix.Close(int(fd)))
	}
	accepted := ^uintptr(0)
	for range maxDeferred {
		accepted, _, errno = unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(w.listener), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		if errno != unix.EAGAIN {
			break
		}
		w.deferred++
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	if errno != 0 {
		return errors.Join(fmt.Errorf("accept: %w", errno), unix.Close(int(fd)))
	}
	_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
	_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, accepted, 0, 0)
	return nil
}

// enforced reports whether a datagram to a port that no policy allows is kept from the server, and whether one from a forged source is.
func (w *wires) enforced() (bool, bool) {
	buf := make([]byte, payload)
	received := func(fd int) bool {
		for range 50 { // of what was dropped nothing comes; ksoftirqd is quick
			if _, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT); err == nil {
				return true
			}
			runtime.Gosched()
		}
		return false
	}
	_ = unix.Sendto(w.probe, buf, 0, w.deniedTarget)
	policy := !received(w.denied)
	_ = unix.Sendto(w.forge, buf, 0, w.unforgedTarget)
	return policy, !received(w.unforged)
}

func threadTime() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return ts.Nano()
}

// quartile returns the lower quartile of n measurements. They are short: what disturbs one (an interrupt, another program's share of the
// caches) makes it longer and never shorter.
func quartile(n int, f func() (float64, error)) (float64, error) {
	values := make([]float64, n)
	for i := range values {
		var err error
		if values[i], err = f(); err != nil {
			return 0, err
		}
	}
	return lowerQuartile(values), nil
}

func lowerQuartile(values []float64) float64 {
	return slices.Sorted(slices.Values(values))[len(values)/4]
}

// middle returns the median.
func middle(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}
