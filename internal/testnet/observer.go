package testnet

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// flow identifies a probe at its receiver. Source ports are unique per node, so a port tells the probe even behind a NAT that keeps it.
type flow struct {
	proto uint8
	sport uint16
}

// observer tells which flows have reached a namespace, whatever became of them afterwards.
type observer interface {
	// saw reports every flow that has arrived so far.
	saw(ctx context.Context) (map[flow]bool, error)
	close() error
}

// packetObserver is an AF_PACKET socket: it sees what the last hop delivered, before the receiver's own stack decides on it.
// The kernel queues the packets until they are asked for, so that no packet can be judged too early.
type packetObserver struct {
	mu   sync.Mutex
	fd   int
	seen map[flow]bool
}

var _ observer = (*packetObserver)(nil)

// observerQueue holds tens of thousands of probe packets. An overflow is an error and never a denial.
const observerQueue = 16 << 20

func newPacketObserver(ns netns.NsHandle) (*packetObserver, error) {
	o := &packetObserver{fd: -1, seen: map[flow]bool{}}
	err := inNS(ns, func() error {
		all := int(binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL & 0xff}))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, all)
		if err != nil {
			return fmt.Errorf("open packet socket: %w", err)
		}
		o.fd = fd
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, observerQueue); err != nil {
			return fmt.Errorf("enlarge packet socket's queue: %w", err)
		}
		return nil
	})
	if err != nil && o.fd >= 0 {
		err = errors.Join(err, unix.Close(o.fd))
	}
	return o, err
}

func (o *packetObserver) saw(context.Context) (map[flow]bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	buf := make([]byte, 128)
	for {
		n, from, err := unix.Recvfrom(o.fd, buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			stats, err := unix.GetsockoptTpacketStats(o.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
			if err != nil {
				return nil, fmt.Errorf("read packet socket's statistics: %w", err)
			}
			if stats.Drops > 0 {
				return nil, fmt.Errorf("packet observer lost %d packets: its verdicts are void", stats.Drops)
			}
			seen := make(map[flow]bool, len(o.seen))
			for f := range o.seen {
				seen[f] = true
			}
			return seen, nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN): // ENETDOWN: a link went away, the others go on
			continue
		case err != nil:
			return nil, fmt.Errorf("receive from packet socket: %w", err)
		}
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if f, ok := parseFlow(buf[:n]); ok {
			o.seen[f] = true
		}
	}
}

func (o *packetObserver) close() error { return unix.Close(o.fd) }

// parseFlow reads protocol and source port (the identifier of an ICMP echo request) of an IP packet without its link-layer header.
func parseFlow(packet []byte) (flow, bool) {
	if len(packet) < 20 {
		return flow{}, false
	}
	var f flow
	var payload []byte
	switch packet[0] >> 4 {
	case 4:
		header := int(packet[0]&0xf) * 4
		if len(packet) < header {
			return flow{}, false
		}
		f.proto, payload = packet[9], packet[header:]
	case 6:
		if len(packet) < 40 {
			return flow{}, false
		}
		f.proto, payload = packet[6], packet[40:]
	default:
		return flow{}, false
	}
	offset := 0
	switch f.proto {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP:
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		if len(payload) == 0 || (payload[0] != 8 && payload[0] != 128) { // echo request of either family
			return flow{}, false
		}
		offset = 4
	default:
		return flow{}, false
	}
	if len(payload) < offset+2 {
		return flow{}, false
	}
	f.sport = binary.BigEndian.Uint16(payload[offset:])
	return f, true
}

// nodeObserver is an nftables chain behind every other one on the node's input hook: a packet socket would see a pod's packet to
// its own node before the rules that drop it.
type nodeObserver struct{ ns string }

var _ observer = nodeObserver{}

const nodeObserverTable = `table inet testnet_observer {
	set seen { type inet_proto . inet_service; size 65535; flags dynamic; }
	chain input {
		type filter hook input priority 1000; policy accept;
		meta l4proto { tcp, udp } add @seen { meta l4proto . th sport }
	}
}
`

func newNodeObserver(ctx context.Context, ns string) (nodeObserver, error) {
	cmd := command(ctx, ns, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(nodeObserverTable)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nodeObserver{}, fmt.Errorf("load observer's table in %s: %w: %s", ns, err, out)
	}
	return nodeObserver{ns: ns}, nil
}

func (o nodeObserver) saw(ctx context.Context) (map[flow]bool, error) {
	out, err := command(ctx, o.ns, "nft", "-j", "list", "set", "inet", "testnet_observer", "seen").Output()
	if err != nil {
		return nil, fmt.Errorf("list observer's set in %s: %w", o.ns, err)
	}
	var dump struct {
		Nftables []struct {
			Set struct {
				Elem []struct {
					Concat []any `json:"concat"`
				} `json:"elem"`
			} `json:"set"`
		} `json:"nftables"`
	}
	if err := json.Unmarshal(out, &dump); err != nil {
		return nil, fmt.Errorf("parse observer's set in %s: %w", o.ns, err)
	}
	protos := map[any]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}
	seen := map[flow]bool{}
	for _, item := range dump.Nftables {
		for _, e := range item.Set.Elem {
			if len(e.Concat) != 2 {
				return nil, fmt.Errorf("observer's set in %s has an unexpected element %v", o.ns, e.Concat)
			}
			sport, ok := e.Concat[1].(float64)
			proto := protos[e.Concat[0]]
			if !ok || proto == 0 {
				return nil, fmt.Errorf("observer's set in %s has an unexpected element %v", o.ns, e.Concat)
			}
			seen[flow{proto, uint16(sport)}] = true
		}
	}
	return seen, nil
}

func (o nodeObserver) close() error { return nil } // goes with the namespace
