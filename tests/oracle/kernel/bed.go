// Package kernel runs the oracle's cases in the real kernel: rulesets that are loaded into a node made of network namespaces,
// packets that are sent through it, and verdicts that are taken at the receiver.
package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/registry"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/layout"
)

// Indexes of the receivers: the places are 0 to 7.
const (
	outside = 8
	node    = 9
)

// Bed is the node of package layout: a network namespace for the node, one for each place, and one for everybody who is not
// on the node. The namespaces have no names; they go with the sockets in them.
type Bed struct {
	ns        [10]netns.NsHandle
	ends      [9]end  // packet sockets of the places and of outside
	inputs    []input // what passed the node's input hook
	raw4      int     // the node's own senders
	raw6      int
	conntrack *netlink.Handle

	cpu       int    // that everything is sent from
	dropped   uint64 // packets that its backlog had no room for, so far
	voids     int    // windows that had to be sent again because of it
	token     uint32 // of the probe sent last
	sentinels uint32 // sent so far
	fresh     uint32 // token of the last probe before conntrack was emptied
	frame     []byte
	buf       []byte
	strays    []string // probes that arrived late, or at somebody else
}

// end is an interface of its own namespace, its socket, and the MAC address of the router on the other side.
type end struct {
	fd     int
	mac    net.HardwareAddr
	router net.HardwareAddr
}

// input is a raw socket of one protocol.
type input struct {
	fd       int
	protocol byte
	headers  bool // IPv4 raw sockets read IP headers too, IPv6 ones do not
}

// mac returns an address per interface; the places' are 0 to 7.
func mac(side, index int) net.HardwareAddr {
	return net.HardwareAddr{2, 0, 0, 0, byte(side), byte(index)}
}

// sentinels are nobody's addresses: podwall has no opinion about packets from one to the other.
var sentinelFrom, sentinelTo = netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2")

// NewBed makes the namespaces. It takes about 0.1 s and needs root.
func NewBed() (*Bed, error) {
	b := &Bed{raw4: -1, raw6: -1, frame: make([]byte, 0, maxFrame), buf: make([]byte, maxFrame)}
	for i := range b.ns {
		b.ns[i] = netns.None()
	}
	for i := range b.ends {
		b.ends[i].fd = -1
	}
	if err := b.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("build test bed: %w", err), b.Close())
	}
	return b, nil
}

func (b *Bed) build() error {
	var affinity unix.CPUSet
	if err := unix.SchedGetaffinity(0, &affinity); err != nil {
		return fmt.Errorf("read CPU affinity: %w", err)
	}
	for !affinity.IsSet(b.cpu) {
		b.cpu++
	}
	var err error
	if b.dropped, err = backlogDrops(b.cpu); err != nil {
		return err
	}
	for i := range b.ns {
		if err := onThread(func() error {
			var err error
			b.ns[i], err = netns.New()
			if err != nil {
				return fmt.Errorf("create network namespace: %w", err)
			}
			if i == node {
				return nodeSysctls()
			}
			return silence()
		}); err != nil {
			return err
		}
	}
	if err := b.in(node, b.wire); err != nil {
		return err
	}
	for i := range b.ends {
		if err := b.in(i, func() error { return b.openEnd(i) }); err != nil {
			return err
		}
	}
	if err := b.in(node, b.openNode); err != nil {
		return err
	}
	if b.conntrack, err = netlink.NewHandleAt(b.ns[node], unix.NETLINK_NETFILTER); err != nil {
		return fmt.Errorf("open netlink socket to conntrack: %w", err)
	}
	return b.awaitLinks()
}

// awaitLinks sends probes until all links work: the kernel activates the queue of a device some time after it came up
// (linkwatch_event), and drops without a word what is sent before.
func (b *Bed) awaitLinks() error {
	var conns []oracle.Conn
	for _, p := range layout.Places {
		for i, ip := range p.IPs {
			conns = append(conns, oracle.Conn{Src: ip, Dst: layout.Outside[i], Protocol: oracle.UDP, Port: 9}, oracle.Conn{Src: layout.Outside[i], Dst: ip, Protocol: oracle.UDP, Port: 9})
		}
	}
	for deadline := time.Now().Add(attempts * patience); ; {
		arrived, err := b.Send(conns)
		if err != nil || !slices.Contains(arrived, false) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("links are up and do not work: lost %+v", conns[slices.Index(arrived, false)])
		}
	}
}

// Close closes all sockets and namespaces.
func (b *Bed) Close() error {
	var errs []error
	fds := []int{b.raw4, b.raw6}
	for _, e := range b.ends {
		fds = append(fds, e.fd)
	}
	for _, i := range b.inputs {
		fds = append(fds, i.fd)
	}
	for _, fd := range fds {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	if b.conntrack != nil {
		b.conntrack.Close()
	}
	for _, ns := range b.ns {
		if ns.IsOpen() {
			errs = append(errs, ns.Close())
		}
	}
	return errors.Join(errs...)
}

// NetNS returns a file descriptor of the node's namespace.
func (b *Bed) NetNS() int { return int(b.ns[node]) }

// onThread runs f on a thread that ends with it, so that no namespace is carried elsewhere.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

func (b *Bed) in(ns int, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(b.ns[ns]); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

func sysctls(settings ...string) error {
	for i := 0; i < len(settings); i += 2 {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", settings[i]), []byte(settings[i+1]), 0o644); err != nil {
			return fmt.Errorf("set sysctl net/%s: %w", settings[i], err)
		}
	}
	return nil
}

func nodeSysctls() error {
	return sysctls("ipv4/ip_forward", "1", "ipv6/conf/all/forwarding", "1",
		"ipv4/conf/all/rp_filter", "0", "ipv4/conf/default/rp_filter", "0",
		"ipv4/conf/all/send_redirects", "0", "ipv4/conf/default/send_redirects", "0", // hairpins leave by where they came
		"ipv6/conf/default/accept_dad", "0")
}

// silence keeps a namespace from answering: it has no addresses, forwards nothing and does not speak IPv6.
func silence() error {
	return sysctls("ipv6/conf/all/disable_ipv6", "1", "ipv6/conf/default/disable_ipv6", "1")
}

// wire lays the links. Everything that would have to be resolved is static, so that nothing but probes is under way.
func (b *Bed) wire() error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: layout.Bridge, HardwareAddr: mac(2, 0)}, MulticastSnooping: new(bool)}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	if err := (registry.Links{}).ShowBridged(layout.Bridge); err != nil {
		return err
	}
	for _, p := range layout.Places {
		if err := b.wirePlace(p, bridge); err != nil {
			return fmt.Errorf("wire %s: %w", p.Link, err)
		}
	}
	uplink, err := b.veth(layout.Uplink, outside)
	if err != nil {
		return fmt.Errorf("wire %s: %w", layout.Uplink, err)
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("bring bridge up: %w", err)
	}
	for i, ip := range layout.Node {
		link := uplink
		if i >= 2 {
			link = netlink.Link(bridge)
		}
		bits := 24
		if ip.Is6() {
			bits = 64
		}
		address := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(bits, ip.BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(link, address); err != nil {
			return fmt.Errorf("add address %s: %w", ip, err)
		}
	}
	for _, bits := range []int{32, 128} {
		everything := &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Dst: everything, Scope: netlink.SCOPE_LINK}); err != nil {
			return fmt.Errorf("add default route: %w", err)
		}
	}
	for _, ip := range slices.Concat(layout.RemotePods, layout.Outside, []netip.Addr{sentinelTo}) {
		if err := neighbour(uplink, ip, outside); err != nil {
			return err
		}
	}
	return nil
}

func (b *Bed) wirePlace(p layout.Place, bridge netlink.Link) error {
	host, err := b.veth(p.Link, p.Index)
	if err != nil {
		return err
	}
	over := host
	if p.Bridge != "" {
		over = bridge
		if err := netlink.LinkSetMaster(host, bridge); err != nil {
			return fmt.Errorf("attach to bridge: %w", err)
		}
		// Without the entry, the first frames to a place are flooded to all others.
		entry := &netlink.Neigh{
			LinkIndex: host.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER,
			State: netlink.NUD_NOARP, HardwareAddr: mac(1, p.Index), // static; a permanent one would be the bridge's own
		}
		if err := netlink.NeighSet(entry); err != nil {
			return fmt.Errorf("add forwarding entry: %w", err)
		}
	}
	for _, ip := range p.IPs {
		if p.Bridge == "" {
			route := &netlink.Route{
				LinkIndex: host.Attrs().Index, Scope: netlink.SCOPE_LINK,
				Dst: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())},
			}
			if err := netlink.RouteAdd(route); err != nil {
				return fmt.Errorf("add route to %s: %w", ip, err)
			}
		}
		if err := neighbour(over, ip, p.Index); err != nil {
			return err
		}
	}
	return nil
}

// veth makes a link to eth0 of another namespace.
func (b *Bed) veth(name string, peer int) (netlink.Link, error) {
	v := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: mac(0, peer)},
		PeerName:  "eth0", PeerHardwareAddr: mac(1, peer), PeerNamespace: netlink.NsFd(b.ns[peer]),
	}
	if err := netlink.LinkAdd(v); err != nil {
		return nil, fmt.Errorf("add veth: %w", err)
	}
	if err := netlink.LinkSetUp(v); err != nil {
		return nil, fmt.Errorf("bring up: %w", err)
	}
	return v, nil
}

func neighbour(link netlink.Link, ip netip.Addr, owner int) error {
	n := &netlink.Neigh{LinkIndex: link.Attrs().Index, IP: ip.AsSlice(), HardwareAddr: mac(1, owner), State: netlink.NUD_PERMANENT}
	if err := netlink.NeighSet(n); err != nil {
		return fmt.Errorf("add neighbour %s: %w", ip, err)
	}
	return nil
}

// openEnd opens the packet socket that a namespace sends from and is watched by.
func (b *Bed) openEnd(i int) error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring eth0 up: %w", err)
	}
	e := &b.ends[i]
	e.mac, e.router = mac(1, i), mac(0, i)
	if i < outside && layout.Places[i].Bridge != "" {
		e.router = mac(2, 0)
	}
	if e.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	const every = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8 // in network byte order
	if err := errors.Join(
		enlarge(e.fd),
		unix.SetsockoptInt(e.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.Bind(e.fd, &unix.SockaddrLinklayer{Protocol: every & 0xffff, Ifindex: link.Attrs().Index}),
	); err != nil {
		return fmt.Errorf("prepare packet socket: %w", err)
	}
	return nil
}

// openNode opens the node's raw sockets.
func (b *Bed) openNode() error {
	open := func(family, protocol int) (int, error) {
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return -1, fmt.Errorf("open raw socket: %w", err)
		}
		return fd, nil
	}
	var err error
	// IPPROTO_RAW sockets send packets that have a header, and receive nothing.
	if b.raw4, err = open(unix.AF_INET, unix.IPPROTO_RAW); err != nil {
		return err
	}
	if b.raw6, err = open(unix.AF_INET6, unix.IPPROTO_RAW); err != nil {
		return err
	}
	for _, src := range layout.Node[:2] { // one of each family
		for _, protocol := range []oracle.Protocol{oracle.TCP, oracle.UDP, oracle.SCTP, oracle.ICMP} {
			family := unix.AF_INET
			if src.Is6() {
				family = unix.AF_INET6
			}
			in := input{protocol: protocolNumber(oracle.Conn{Src: src, Protocol: protocol}), headers: src.Is4()}
			if in.fd, err = open(family, int(in.protocol)); err != nil {
				return err
			}
			b.inputs = append(b.inputs, in)
			if err := enlarge(in.fd); err != nil {
				return err
			}
		}
	}
	return nil
}

// receiveQueue holds many more packets than are ever under way (window).
const receiveQueue = 4 << 20

func enlarge(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveQueue); err != nil {
		return fmt.Errorf("enlarge socket's queue: %w", err)
	}
	return nil
}
