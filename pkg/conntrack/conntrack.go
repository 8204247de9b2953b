// Package conntrack deletes the kernel's connection tracking entries of addresses that change their owner.
package conntrack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// timeout bounds each answer of the kernel. A whole dump of 150,000 entries takes half a second.
const timeout = 10 * time.Second

// Config says which kernel to talk to.
type Config struct {
	// NetNS is a file descriptor of a network namespace, for tests; 0 is the caller's own.
	NetNS int
}

// Table is the connection tracking table of one network namespace.
type Table struct {
	handle netlinksafe.Handle
}

// New opens a netlink socket to the table.
func New(cfg Config) (*Table, error) {
	ns := netns.None()
	if cfg.NetNS != 0 {
		ns = netns.NsHandle(cfg.NetNS)
	}
	h, err := netlinksafe.NewHandleAt(ns, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket to conntrack: %w", explain(err))
	}
	if err := h.SetSocketTimeout(timeout); err != nil {
		h.Close()
		return nil, fmt.Errorf("set timeout of netlink socket to conntrack: %w", err)
	}
	return &Table{handle: h}, nil
}

// Close closes the socket.
func (t *Table) Close() { t.handle.Close() }

// Forget deletes all entries in which one of the addresses is a source or destination, in either direction: with NAT the
// reply's addresses are not those of the original packets. It returns how many there were, also with an error. It takes
// one dump of the table per address family, whatever the number of addresses, so callers should gather them.
func (t *Table) Forget(ips []netip.Addr) (int, error) {
	byFamily := map[netlink.InetFamily]addresses{}
	for _, ip := range ips {
		ip = ip.Unmap().WithZone("")
		family := netlink.InetFamily(unix.AF_INET6)
		if ip.Is4() {
			family = unix.AF_INET
		}
		if byFamily[family] == nil {
			byFamily[family] = addresses{}
		}
		byFamily[family][ip] = true
	}
	total := 0
	var errs []error
	for family, set := range byFamily {
		n, err := t.handle.ConntrackDeleteFilters(netlink.ConntrackTable, family, set)
		total += int(n)
		if err != nil {
			errs = append(errs, fmt.Errorf("delete conntrack entries of %d addresses: %w", len(set), explain(err)))
		}
	}
	return total, errors.Join(errs...)
}

// explain adds the remedy to the errors of a kernel that cannot list connections: nfnetlink answers EINVAL when no module
// has registered for the subsystem, and a kernel without netfilter has no such netlink family.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("%w; the kernel has no ctnetlink: load the module nf_conntrack_netlink (CONFIG_NF_CT_NETLINK)", err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w; CAP_NET_ADMIN is missing", err)
	}
	return err
}

// addresses is a netlink.CustomConntrackFilter.
type addresses map[netip.Addr]bool

// MatchConntrackFlow reports whether one of the flow's four addresses is in the set.
func (a addresses) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return a.has(flow.Forward.SrcIP) || a.has(flow.Forward.DstIP) || a.has(flow.Reverse.SrcIP) || a.has(flow.Reverse.DstIP)
}

func (a addresses) has(ip net.IP) bool {
	addr, ok := netip.AddrFromSlice(ip)
	return ok && a[addr.Unmap()]
}
