// Package hostlink finds the host side of a sandbox's interface.
package hostlink

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/attach"
)

// ErrNetns is an unusable CNI_NETNS: missing, not a network namespace, or the host's own.
var ErrNetns = errors.New("CNI_NETNS cannot be used")

// ErrNoHostLink is an interface without a host side, so that the host's netfilter never sees its packets.
var ErrNoHostLink = errors.New("the pod's interface has no host side, podwall cannot enforce policies on it")

// remedy ends the messages of ErrNoHostLink.
const remedy = "macvlan, ipvlan, host-device and sriov hand the pod an interface whose traffic the host's netfilter does not see; " +
	"use bridge, ptp or another main plugin that makes a veth pair, or remove podwall from this network"

// socketTimeout bounds each exchange with the kernel if ctx does not. It answers in microseconds unless somebody holds the RTNL lock.
const socketTimeout = 2 * time.Second

// Find returns the link in the caller's network namespace whose peer is ifname in the namespace at netnsPath.
//
// Nothing that a main plugin reports is trusted for this: names, MACs and sandboxes of results are wrong or missing in several of them,
// and "the first interface without a sandbox" may be a bridge. The one exception is a namespace that exists but cannot be read:
// then the candidates, names from the result, serve if exactly one of them is a veth with its peer elsewhere.
func Find(ctx context.Context, netnsPath, ifname string, candidates []string) (attach.HostLink, error) {
	timeout := socketTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(time.Until(deadline), time.Millisecond) // zero would mean for ever
	}
	host, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return attach.HostLink{}, fmt.Errorf("open netlink socket: %w", err)
	}
	defer host.Close()
	if err := host.SetSocketTimeout(timeout); err != nil {
		return attach.HostLink{}, fmt.Errorf("set netlink timeout: %w", err)
	}
	ns, pod, err := open(netnsPath, timeout)
	if errors.Is(err, fs.ErrNotExist) {
		return attach.HostLink{}, fmt.Errorf("%w: %w; the sandbox is gone, or the runtime's mount namespace is another", ErrNetns, err)
	}
	if err != nil {
		return fromCandidates(host, candidates, err)
	}
	defer ns.Close()
	defer pod.Close()
	if same, err := isOwn(ns); err != nil || same {
		return attach.HostLink{}, errors.Join(fmt.Errorf("%w: %s is the plugin's own network namespace", ErrNetns, netnsPath), err)
	}
	return peer(host, pod, ns, ifname)
}

// open enters a namespace for netlink, without moving a thread there for longer than it takes to open the socket.
func open(path string, timeout time.Duration) (netns.NsHandle, netlinksafe.Handle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), netlinksafe.Handle{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	h, err := netlinksafe.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err == nil {
		err = h.SetSocketTimeout(timeout)
	}
	if err != nil {
		h.Close()
		ns.Close()
		return netns.None(), netlinksafe.Handle{}, fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return ns, h, nil
}

// isOwn compares with the calling thread's namespace, the one in which host's socket was opened.
func isOwn(ns netns.NsHandle) (bool, error) {
	own, err := netns.GetFromPath("/proc/thread-self/ns/net")
	if err != nil {
		return false, err
	}
	defer own.Close()
	return own.Equal(ns), nil
}

// paired says whether links of a type come in pairs whose IFLA_LINK is the peer. For macvlan, ipvlan and vlan it is the master.
func paired(l netlink.Link) bool { return l.Type() == "veth" || l.Type() == "netkit" }

// peer follows the interface to the host and back.
func peer(host, pod netlinksafe.Handle, ns netns.NsHandle, ifname string) (attach.HostLink, error) {
	in, err := pod.LinkByName(ifname)
	var notFound netlink.LinkNotFoundError
	switch {
	case errors.As(err, &notFound):
		return attach.HostLink{}, fmt.Errorf("%w: the sandbox has no interface %s; podwall must come after the main plugin in the conflist", ErrNoHostLink, ifname)
	case err != nil:
		return attach.HostLink{}, fmt.Errorf("read interface %s of the sandbox: %w", ifname, err)
	case !paired(in):
		return attach.HostLink{}, fmt.Errorf("%w: %s is of type %s; %s", ErrNoHostLink, ifname, in.Type(), remedy)
	}
	// An index of the peer's namespace, which need not be the host's; netlinksafe wraps dumps and this is none.
	out, err := host.LinkByIndex(in.Attrs().ParentIndex)
	switch {
	case errors.As(err, &notFound):
		return attach.HostLink{}, fmt.Errorf("%w: the peer of %s %s is not in the host's network namespace; %s", ErrNoHostLink, in.Type(), ifname, remedy)
	case err != nil:
		return attach.HostLink{}, fmt.Errorf("read the host's link %d: %w", in.Attrs().ParentIndex, err)
	}
	// Asked after the link was read: that is what makes the kernel assign the id (rtnl_fill_link_netnsid).
	nsid, err := host.GetNetNsIdByFd(int(ns))
	if err != nil {
		return attach.HostLink{}, fmt.Errorf("read the id of the sandbox's network namespace: %w", err)
	}
	if !mutual(in, out, nsid) {
		return attach.HostLink{}, fmt.Errorf("%w: the peer of %s %s is in a third network namespace; %s", ErrNoHostLink, in.Type(), ifname, remedy)
	}
	return attach.HostLink{Name: out.Attrs().Name, Index: out.Attrs().Index}, nil
}

// mutual says whether two links are each other's peers. Indexes alone do not tell: they count per namespace, so that eth0 has the same one in
// every pod, and a pod whose peer is in a third namespace would be taken for the pod whose host link has that number here. nsid is the host's
// id of the sandbox's namespace, which the host link must name as its peer's.
func mutual(in, out netlink.Link, nsid int) bool {
	return paired(out) && in.Type() == out.Type() &&
		out.Attrs().ParentIndex == in.Attrs().Index &&
		nsid >= 0 && out.Attrs().NetNsID == nsid
}

// fromCandidates picks the one candidate that could be the host side, or reports why the sandbox could not be asked.
func fromCandidates(host netlinksafe.Handle, candidates []string, cause error) (attach.HostLink, error) {
	var found []attach.HostLink
	var names []string
	for _, name := range candidates {
		l, err := host.LinkByName(name)
		if err != nil || !paired(l) || l.Attrs().NetNsID < 0 {
			continue
		}
		found = append(found, attach.HostLink{Name: l.Attrs().Name, Index: l.Attrs().Index})
		names = append(names, name)
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return attach.HostLink{}, fmt.Errorf("%w: %w, and prevResult names no veth of this host", ErrNetns, cause)
	default:
		return attach.HostLink{}, fmt.Errorf("%w: %w, and prevResult names more than one veth of this host: %s", ErrNetns, cause, strings.Join(names, ", "))
	}
}
