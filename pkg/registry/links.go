package registry

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/attach"
)

// Links looks at the host side of attachments, in the network namespace of the process.
type Links struct{}

// Link is what enforcement needs to know of a host veth.
type Link struct {
	Exists bool
	Name   string // its name now: links can be renamed
	Bridge string // the bridge that it is a port of, or empty
}

// Lookup finds the link by its index, which lasts as long as the link does and which the kernel does not use again: names
// change and are reused.
func (Links) Lookup(h attach.HostLink) (Link, error) {
	l, err := netlink.LinkByIndex(h.Index)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return Link{}, nil
	}
	if err != nil {
		return Link{}, fmt.Errorf("look up host link %s: %w", h.Name, err)
	}
	if l.Attrs().MasterIndex == 0 {
		return Link{Exists: true, Name: l.Attrs().Name}, nil
	}
	master, err := netlink.LinkByIndex(l.Attrs().MasterIndex)
	if err != nil {
		return Link{}, fmt.Errorf("look up the master of host link %s: %w", h.Name, err)
	}
	if master.Type() != "bridge" {
		return Link{Exists: true, Name: l.Attrs().Name}, nil
	}
	return Link{Exists: true, Name: l.Attrs().Name, Bridge: master.Attrs().Name}, nil
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

// callBridge are the sysctls that make br_netfilter show bridged packets to the inet hooks, for all bridges of the namespace,
// with the bridge attribute that does the same for one bridge (linux/if_link.h).
var callBridge = []struct {
	sysctl string
	attr   int
}{
	{"/proc/sys/net/bridge/bridge-nf-call-iptables", nl.IFLA_BR_NF_CALL_IPTABLES},
	{"/proc/sys/net/bridge/bridge-nf-call-ip6tables", nl.IFLA_BR_NF_CALL_IP6TABLES},
}

// ShowBridged makes sure that packets between two ports of a bridge pass the forward hook, by the bridge's own attribute, which leaves other bridges (of virtual machines) alone. Without br_netfilter nothing of this
// bridge can be enforced and the error says so.
func (Links) ShowBridged(bridge string) error {
	for _, c := range callBridge {
		data, err := os.ReadFile(c.sysctl)
		if err != nil {
			return fmt.Errorf("traffic inside bridge %s cannot be seen: %w; load the module: modprobe br_netfilter", bridge, err)
		}
		// Also where the sysctl is on: it may be switched off later, for all bridges at once.
		if err := setBridgeAttr(bridge, c.attr, 1); err != nil && strings.TrimSpace(string(data)) != "1" {
			return fmt.Errorf("bridge %s: cannot switch on nf_call (%w); set it by hand: sysctl -w %s=1", bridge, err,
				strings.ReplaceAll(strings.TrimPrefix(c.sysctl, "/proc/sys/"), "/", "."))
		}
	}
	return nil
}

func setBridgeAttr(bridge string, attr int, value uint8) error {
	l, err := netlinksafe.LinkByName(bridge)
	if err != nil {
		return err
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(l.Attrs().Index) //nolint:gosec // an ifindex is an int32 in the kernel
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(attr, nl.Uint8Attr(value))
	req.AddData(info)
	_, err = req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// Watch calls gone whenever a link has disappeared, until ctx ends. A lost event is made up for by the caller's slow sweep.
func (Links) Watch(ctx context.Context, gone func()) error {
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
				gone()
			}
		}
	}
}
