package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/attach"
)

// Links looks at the host side of attachments, in the network namespace of the process.
type Links struct {
	// For tests: where br_netfilter's sysctls are, and what switches an attribute of a bridge on.
	sysctls string
	set     func(bridge netlink.Link, attr int, value uint8) error
}

// Link is what enforcement needs to know of a host veth.
type Link struct {
	Exists bool
	Name   string // its name now: links can be renamed
	Bridge string // the bridge that it is a port of, or empty
	// Gateways are the node's own addresses on that bridge.
	Gateways []netip.Addr
	// Hidden says that netfilter does not see packets between two ports of that bridge: ShowBridged has to be called (again).
	Hidden bool
}

// Lookup finds the link by its index, which lasts as long as the link does and which the kernel does not use again: names
// change and are reused.
func (l Links) Lookup(h attach.HostLink) (Link, error) {
	link, err := netlink.LinkByIndex(h.Index)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return Link{}, nil
	}
	if err != nil {
		return Link{}, fmt.Errorf("look up host link %s: %w", h.Name, err)
	}
	if link.Attrs().MasterIndex == 0 {
		return Link{Exists: true, Name: link.Attrs().Name}, nil
	}
	master, err := netlink.LinkByIndex(link.Attrs().MasterIndex)
	if err != nil {
		return Link{}, fmt.Errorf("look up the master of host link %s: %w", h.Name, err)
	}
	switch master.Type() {
	case "bridge":
	case "vrf": // what it receives is routed, by a table of its own
		return Link{Exists: true, Name: link.Attrs().Name}, nil
	default:
		return Link{}, fmt.Errorf("host link %s is a port of %s, a link of type %s: its packets need not pass the forward hook, so no policy can be enforced; attach pods to a Linux bridge or to the node directly", h.Name, master.Attrs().Name, master.Type())
	}
	gateways, err := addresses(master)
	if err != nil {
		return Link{}, fmt.Errorf("list the addresses of bridge %s: %w", master.Attrs().Name, err)
	}
	shown, err := l.shown(master)
	if err != nil {
		return Link{}, err
	}
	return Link{Exists: true, Name: link.Attrs().Name, Bridge: master.Attrs().Name, Gateways: gateways, Hidden: slices.ContainsFunc(shown, func(s shownBy) bool { return !s.attr && !s.sysctl })}, nil
}

// Addresses returns the node's own addresses.
func (Links) Addresses() (map[netip.Addr]bool, error) {
	list, err := addresses(nil)
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	set := map[netip.Addr]bool{}
	for _, ip := range list {
		set[ip] = true
	}
	return set, nil
}

// addresses returns the addresses of a link, or of all.
func addresses(l netlink.Link) ([]netip.Addr, error) {
	list, err := netlinksafe.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	var ips []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			ips = append(ips, ip.Unmap())
		}
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	return ips, nil
}

// Index returns the index of a link, 0 if there is none of that name.
func (Links) Index(name string) (int, error) {
	l, err := netlinksafe.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look up host link %s: %w", name, err)
	}
	return l.Attrs().Index, nil
}

// Toward returns the name of the link that an address is directly behind, or an empty name if there is none: what a gateway is
// in between of is not a pod of this node.
func (Links) Toward(ip netip.Addr) (string, error) {
	routes, err := netlink.RouteGet(ip.AsSlice())
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("look up the route to %s: %w", ip, err)
	}
	if len(routes) != 1 || routes[0].Gw != nil {
		return "", nil
	}
	l, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", fmt.Errorf("look up the link to %s: %w", ip, err)
	}
	return l.Attrs().Name, nil
}

// callBridge are what makes br_netfilter show bridged packets to the inet hooks: a sysctl for all bridges of the namespace, and an
// attribute for one bridge (linux/if_link.h). Either is enough (br_nf_pre_routing).
var callBridge = []struct {
	name, sysctl, option string
	attr                 int
}{
	{"IPv4", "bridge-nf-call-iptables", "nf_call_iptables", nl.IFLA_BR_NF_CALL_IPTABLES},
	{"IPv6", "bridge-nf-call-ip6tables", "nf_call_ip6tables", nl.IFLA_BR_NF_CALL_IP6TABLES},
}

const bridgeSysctls = "/proc/sys/net/bridge"

// shownBy says what shows a bridge's packets of one IP version, in the order of callBridge.
type shownBy struct{ attr, sysctl, module bool }

// ShowBridged makes sure that packets between two ports of a bridge pass the forward hook, by the bridge's own attributes: they leave
// other bridges (of virtual machines) alone, and hold when somebody switches the sysctl off for all. Without br_netfilter
// nothing of this bridge can be enforced and the error says so.
func (l Links) ShowBridged(bridge string) error {
	link, err := netlinksafe.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("look up bridge %s: %w; is it still there?", bridge, err)
	}
	before, err := l.shown(link)
	if err != nil {
		return err
	}
	set := l.set
	if set == nil {
		set = setBridgeAttr
	}
	refused := make([]error, len(callBridge))
	for i, c := range callBridge {
		if !before[i].module { // the attributes can be set all the same, and mean nothing
			return fmt.Errorf("bridge %s: traffic between its ports cannot be seen, because %s is missing; load the module: modprobe br_netfilter", bridge, filepath.Join(l.sysctlDir(), c.sysctl))
		}
		if !before[i].attr {
			refused[i] = set(link, c.attr, 1)
		}
	}
	after, err := l.shown(link)
	if err != nil {
		return err
	}
	for i, c := range callBridge {
		if after[i].attr || after[i].sysctl {
			continue
		}
		if refused[i] == nil {
			refused[i] = errors.New("it is off again")
		}
		return fmt.Errorf("bridge %s: %s traffic between its ports cannot be seen, because %s cannot be switched on: %w; see who switches it off and what podwalld may do (NET_ADMIN), or set it by hand: sysctl -w net.bridge.%s=1", bridge, c.name, c.option, refused[i], c.sysctl)
	}
	return nil
}

func (l Links) sysctlDir() string { return cmp.Or(l.sysctls, bridgeSysctls) }

// shown reads back what shows the bridge's packets now.
func (l Links) shown(bridge netlink.Link) ([]shownBy, error) {
	attrs, err := bridgeAttrs(bridge)
	if err != nil {
		return nil, err
	}
	list := make([]shownBy, len(callBridge))
	for i, c := range callBridge {
		value := attrs[c.attr]
		list[i].attr = len(value) == 1 && value[0] == 1
		text, err := os.ReadFile(filepath.Join(l.sysctlDir(), c.sysctl))
		if errors.Is(err, fs.ErrNotExist) {
			list[i] = shownBy{}
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look whether bridge %s shows its traffic: %w; see that podwalld may read /proc/sys", bridge.Attrs().Name, err)
		}
		list[i].module, list[i].sysctl = true, strings.TrimSpace(string(text)) == "1"
	}
	return list, nil
}

// bridgeAttrs reads the attributes of a bridge that the netlink package does not know.
func bridgeAttrs(bridge netlink.Link) (map[int][]byte, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(bridge.Attrs().Index) //nolint:gosec // an ifindex is an int32 in the kernel
	req.AddData(msg)
	answer, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, fmt.Errorf("read the attributes of bridge %s: %w", bridge.Attrs().Name, err)
	}
	if len(answer) != 1 || len(answer[0]) < unix.SizeofIfInfomsg {
		return nil, fmt.Errorf("read the attributes of bridge %s: the kernel's answer is not one link", bridge.Attrs().Name)
	}
	data := answer[0][unix.SizeofIfInfomsg:]
	for _, nested := range []int{unix.IFLA_LINKINFO, nl.IFLA_INFO_DATA} {
		attrs, err := parseAttrs(data)
		if err != nil {
			return nil, fmt.Errorf("read the attributes of bridge %s: %w", bridge.Attrs().Name, err)
		}
		data = attrs[nested]
	}
	return parseAttrs(data)
}

func parseAttrs(data []byte) (map[int][]byte, error) {
	list, err := nl.ParseRouteAttr(data)
	if err != nil {
		return nil, err
	}
	attrs := map[int][]byte{}
	for _, a := range list {
		attrs[int(a.Attr.Type&nl.NLA_TYPE_MASK)] = a.Value
	}
	return attrs, nil
}

func setBridgeAttr(bridge netlink.Link, attr int, value uint8) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(bridge.Attrs().Index) //nolint:gosec // an ifindex is an int32 in the kernel
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(attr, nl.Uint8Attr(value))
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// Watch calls gone with the index of each link that has disappeared, until ctx ends. A lost event is made up for by the caller's slow sweep.
func (Links) Watch(ctx context.Context, gone func(index int)) error {
	updates := make(chan netlink.LinkUpdate, 64)
	done := make(chan struct{})
	defer close(done)
	failed := make(chan error, 1)
	err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{
		ErrorCallback: func(err error) {
			select {
			case failed <- err:
			default:
			}
		},
	})
	if err != nil {
		return fmt.Errorf("subscribe to link events: %w", err)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return fmt.Errorf("receive link events: %w", err)
		case u, ok := <-updates:
			if !ok {
				return errors.New("receive link events: subscription ended")
			}
			if u.Header.Type == unix.RTM_DELLINK {
				gone(int(u.Index))
			}
		}
	}
}
