package kernel

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

const (
	// window is how many probes are sent before they are waited for. The kernel drops what exceeds netdev_max_backlog (1000).
	window = 256

	// burst is the window of a stream. After each the pipe runs empty for some ten microseconds.
	burst = 64

	// attempts bounds what is repeated when the kernel throws packets away, and patience the wait for each.
	attempts = 50
	patience = 200 * time.Millisecond

	sentinel = 1 << 31 // marks the tokens of sentinels
)

// Send sends a probe per connection, each as a flow of its own, and reports which of them arrived.
//
// It does not wait for silence. All probes are sent from one CPU and followed by a sentinel, which passes any ruleset and takes
// as many hops as the longest way of a probe. Packets wait for their next hop in a queue per CPU (netif_rx, whose backlog is
// worked off in order), so that nothing is behind the sentinel: when it is back, every probe has arrived or never will. Should
// that ever be wrong, the token of a late probe shows up in Strays.
func (b *Bed) Send(conns []oracle.Conn) ([]bool, error) {
	arrived := make([]bool, 0, len(conns))
	err := b.pinned(func() error {
		for part := range slices.Chunk(conns, window) {
			verdicts, err := b.try(part)
			if err != nil {
				return err
			}
			arrived = append(arrived, verdicts...)
		}
		return nil
	})
	return arrived, err
}

// pinned runs f on the CPU that everything is sent from.
func (b *Bed) pinned(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, one unix.CPUSet
	one.Set(b.cpu)
	if err := errors.Join(unix.SchedGetaffinity(0, &before), unix.SchedSetaffinity(0, &one)); err != nil {
		return fmt.Errorf("stay on CPU %d: %w", b.cpu, err)
	}
	err := f()
	if e := unix.SchedSetaffinity(0, &before); e != nil {
		err = errors.Join(err, fmt.Errorf("leave CPU %d: %w", b.cpu, e))
	}
	return err
}

// try sends a window until the kernel has not thrown away a packet meanwhile. The backlog of a CPU is shared by all network
// namespaces of the machine, so that somebody else can fill it.
func (b *Bed) try(conns []oracle.Conn) ([]bool, error) {
	for range attempts {
		arrived, void, err := b.exchange(conns)
		if err != nil || !void {
			return arrived, err
		}
		b.voids++
	}
	return nil, fmt.Errorf("CPU %d dropped packets in each of %d attempts; look who floods this machine, or raise net.core.netdev_max_backlog", b.cpu, attempts)
}

// Stream sends probes of the connections in turn, a few at a time, until done is closed, and as many once more. Each probe's
// fate is told; that of one which was thrown away by a full backlog is not.
func (b *Bed) Stream(conns []oracle.Conn, done <-chan struct{}, tell func(i int, arrived bool)) error {
	return b.pinned(func() error {
		next := 0
		for last := false; !last; {
			select {
			case <-done:
				last = true
			default:
			}
			part := make([]oracle.Conn, burst)
			for i := range part {
				part[i] = conns[(next+i)%len(conns)]
			}
			arrived, void, err := b.exchange(part)
			if err != nil {
				return err
			}
			if void {
				b.voids++
			}
			for i, a := range arrived {
				if a || !void {
					tell((next+i)%len(conns), a)
				}
			}
			next += burst
		}
		return nil
	})
}

// Strays returns what nothing explains: probes that arrived after they had been waited for, or at somebody else.
func (b *Bed) Strays() []string { return b.strays }

// Voids returns how many windows were not judged because the kernel's backlog was full.
func (b *Bed) Voids() int { return b.voids }

// exchange sends one window and returns its verdicts, which are void if packets were thrown away meanwhile.
func (b *Bed) exchange(conns []oracle.Conn) ([]bool, bool, error) {
	// Source ports come round after 64,512 probes. The table's size is limited node-wide.
	if b.token-b.fresh > ports/2 {
		if err := b.conntrack.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
			return nil, false, fmt.Errorf("flush conntrack: %w", err)
		}
		b.fresh = b.token
	}
	arrived := make([]bool, len(conns))
	first := b.token + 1
	for _, c := range conns {
		b.token++
		if err := b.send(c, b.token); err != nil {
			return nil, false, fmt.Errorf("send %+v: %w", c, err)
		}
	}
	saw := func(token uint32, at int) {
		i := token - first // wraps for an older one
		if i < uint32(len(conns)) && receiver(conns[i]) == at {
			arrived[i] = true
			return
		}
		stray := fmt.Sprintf("probe %d was seen at %d after probe %d", token, at, b.token)
		if i < uint32(len(conns)) {
			stray += fmt.Sprintf(": %+v", conns[i])
		}
		b.strays = append(b.strays, stray)
	}
	if err := b.awaitSentinel(saw); err != nil {
		return nil, false, err
	}
	for i := range outside {
		if err := b.readEnd(i, saw); err != nil {
			return nil, false, err
		}
	}
	if err := b.readInputs(saw); err != nil {
		return nil, false, err
	}
	before := b.dropped
	var err error
	b.dropped, err = backlogDrops(b.cpu)
	return arrived, b.dropped != before, err
}

// backlogDrops reads how many packets a CPU had no room for since the machine was started (net/core/net-procfs.c).
func backlogDrops(cpu int) (uint64, error) {
	stat, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		return 0, fmt.Errorf("read the kernel's count of dropped packets: %w", err)
	}
	for line := range strings.Lines(string(stat)) {
		fields := strings.Fields(line)
		if len(fields) < 13 {
			return 0, fmt.Errorf("read the kernel's count of dropped packets: /proc/net/softnet_stat has %d fields; needs Linux 5.10", len(fields))
		}
		if index, err := strconv.ParseUint(fields[12], 16, 32); err == nil && int(index) == cpu {
			return strconv.ParseUint(fields[1], 16, 64)
		}
	}
	return 0, fmt.Errorf("read the kernel's count of dropped packets: no CPU %d in /proc/net/softnet_stat", cpu)
}

// receiver returns the index of who must see a probe.
func receiver(c oracle.Conn) int {
	place, ok := layout.PlaceOf(c.Dst)
	switch {
	case c.ToNode:
		return node
	case ok:
		return place.Index
	}
	return outside
}

// send sends one probe from its sender: frames to the neighbour on the same bridge, or to the router.
func (b *Bed) send(c oracle.Conn, token uint32) error {
	if c.FromNode {
		b.frame = appendPacket(b.frame[:0], c, token)
		if c.Dst.Is4() {
			return unix.Sendto(b.raw4, b.frame, 0, &unix.SockaddrInet4{Addr: c.Dst.As4()})
		}
		return unix.Sendto(b.raw6, b.frame, 0, &unix.SockaddrInet6{Addr: c.Dst.As16()})
	}
	from, fromPlace := layout.PlaceOf(c.Src)
	sender := &b.ends[outside]
	if fromPlace {
		sender = &b.ends[from.Index]
	}
	hop := sender.router
	if bridged(c) {
		hop = b.ends[receiver(c)].mac
	}
	b.frame = append(append(b.frame[:0], hop...), sender.mac...)
	if c.Src.Is4() {
		b.frame = append(b.frame, unix.ETH_P_IP>>8, unix.ETH_P_IP&0xff)
	} else {
		b.frame = append(b.frame, unix.ETH_P_IPV6>>8, unix.ETH_P_IPV6&0xff)
	}
	b.frame = appendPacket(b.frame, c, token)
	_, err := unix.Write(sender.fd, b.frame)
	return err
}

// bridged reports whether a connection goes from port to port of the bridge, and not through the router.
func bridged(c oracle.Conn) bool {
	from, fromPlace := layout.PlaceOf(c.Src)
	to, toPlace := layout.PlaceOf(c.Dst)
	return fromPlace && toPlace && !c.FromNode && !c.ToNode && from.Bridge != "" && from.Bridge == to.Bridge && from.Index != to.Index
}

// awaitSentinel sends sentinels until one is back, and reads what else has arrived at outside.
func (b *Bed) awaitSentinel(saw func(uint32, int)) error {
	first := b.sentinels
	for range attempts {
		if err := b.send(oracle.Conn{Src: sentinelFrom, Dst: sentinelTo, Protocol: oracle.UDP, Port: 9}, b.sentinels|sentinel); err != nil {
			return fmt.Errorf("send sentinel: %w", err)
		}
		b.sentinels++
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
			found := false
			if err := b.readEnd(outside, func(token uint32, at int) {
				if token&sentinel == 0 {
					saw(token, at)
				} else if token&^sentinel >= first {
					found = true
				}
			}); err != nil || found {
				return err
			}
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(b.ends[outside].fd), Events: unix.POLLIN}}, 10); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("wait for packets: %w", err)
			}
		}
	}
	return fmt.Errorf("the node lets a packet from %s to %s not pass, which no policy concerns; look at the base chains", sentinelFrom, sentinelTo)
}

func (b *Bed) readEnd(i int, saw func(uint32, int)) error {
	return b.drain(b.ends[i].fd, func(frame []byte) {
		if len(frame) < ethernetHeader {
			return
		}
		if token, ok := tokenOf(frame[ethernetHeader:]); ok {
			saw(token, i)
		}
	})
}

func (b *Bed) readInputs(saw func(uint32, int)) error {
	for _, in := range b.inputs {
		if err := b.drain(in.fd, func(packet []byte) {
			read := tokenOf
			if !in.headers {
				read = func(packet []byte) (uint32, bool) { return transportToken(in.protocol, packet) }
			}
			if token, ok := read(packet); ok {
				saw(token, node)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

// drain reads everything that is in a socket's queue.
func (b *Bed) drain(fd int, each func([]byte)) error {
	for {
		n, err := unix.Read(fd, b.buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("receive packets: %w", err)
		default:
			each(b.buf[:n])
		}
	}
}
