package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/agentapi"
)

// ifName is the pod's interface.
const ifName = "eth0"

// slot is a place for pods, one after the other, with the same name and addresses and another container each time. It makes the
// veth itself and executes podwall with the result of a main plugin: cnitool with bridge takes ten times as long, and it does
// not show the codes of errors.
type slot struct {
	node      *testnet.Node
	pod       *testnet.Pod
	bridge    string // which the host's side is a port of; empty: routed, as ptp does it
	addrs     map[testnet.Family]netip.Addr
	outer     *netlink.Handle // in the node's namespace
	inner     *netlink.Handle // in the pod's
	innerNS   netns.NsHandle
	mac       net.HardwareAddr // always the same: neighbours keep the one of the former pod with its addresses for seconds
	container int
	link      string // the host's side, empty while there is none
}

// slotRanges are beyond what host-local hands out on the same node.
var slotRanges = map[testnet.Family]netip.Prefix{testnet.IPv4: netip.MustParsePrefix("10.245.1.0/24"), testnet.IPv6: netip.MustParsePrefix("fd00:10:245:1::/64")}

// addTimeout is what a runtime may give an ADD: how fast a busy machine is does not decide here.
const addTimeout = patience

// slotIDs make names of links unique in a node.
var slotIDs atomic.Int32

func slotName(i int) string { return fmt.Sprintf("slot%d", i) }

// newSlot prepares slot number i of a node.
func newSlot(n *testnet.Node, i int, bridge string) (*slot, error) {
	pod, err := n.NewPod("default", slotName(i), "")
	if err != nil {
		return nil, err
	}
	s := &slot{node: n, pod: pod, bridge: bridge, mac: net.HardwareAddr{2, 0, 0, 0, 0, byte(i + 10)}, addrs: map[testnet.Family]netip.Addr{}}
	for f, prefix := range slotRanges {
		raw := prefix.Addr().AsSlice()
		raw[len(raw)-1] = byte(i + 10)
		s.addrs[f], _ = netip.AddrFromSlice(raw)
	}
	pod.Addrs = s.addrs
	outerNS, err := netns.GetFromName(n.Name)
	if err != nil {
		return nil, fmt.Errorf("open namespace of %s: %w", n.Name, err)
	}
	defer outerNS.Close()
	if s.outer, err = netlink.NewHandleAt(outerNS); err != nil {
		return nil, fmt.Errorf("open netlink in %s: %w", n.Name, err)
	}
	if s.innerNS, err = netns.GetFromPath(pod.Netns()); err != nil {
		return nil, fmt.Errorf("open namespace of %s: %w", pod.Name, err)
	}
	if s.inner, err = netlink.NewHandleAt(s.innerNS); err != nil {
		return nil, fmt.Errorf("open netlink in %s: %w", pod.Name, err)
	}
	return s, nil
}

// close removes the sandbox.
func (s *slot) close() error {
	err := s.disconnect()
	s.outer.Close()
	s.inner.Close()
	return errors.Join(err, s.innerNS.Close(), s.node.RemovePod(s.pod))
}

// host returns an address as a network of its own.
func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// connect does what a main plugin does at ADD, for a new container.
func (s *slot) connect() error {
	s.container++
	s.link = fmt.Sprintf("s%d", slotIDs.Add(1))
	fail := func(err error) error { return fmt.Errorf("connect %s: %w", s.pod.Name, err) }
	attrs := netlink.NewLinkAttrs()
	attrs.Name = s.link
	if err := s.outer.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: ifName, PeerNamespace: netlink.NsFd(int(s.innerNS)), PeerHardwareAddr: s.mac,
	}); err != nil {
		return fail(err)
	}
	outer, err := s.outer.LinkByName(s.link)
	if err != nil {
		return fail(err)
	}
	gatewayed := outer
	if s.bridge != "" {
		if gatewayed, err = s.outer.LinkByName(s.bridge); err != nil {
			return fail(err)
		}
		if err := s.outer.LinkSetMaster(outer, gatewayed); err != nil {
			return fail(err)
		}
	}
	inner, err := s.inner.LinkByName(ifName)
	if err != nil {
		return fail(err)
	}
	errs := []error{s.outer.LinkSetUp(outer)}
	for _, a := range s.addrs {
		errs = append(errs, s.inner.AddrAdd(inner, &netlink.Addr{IPNet: host(a), Flags: unix.IFA_F_NODAD}))
	}
	errs = append(errs, s.inner.LinkSetUp(inner))
	for _, a := range s.addrs {
		errs = append(errs, s.outer.RouteReplace(&netlink.Route{Dst: host(a), LinkIndex: gatewayed.Attrs().Index, Scope: netlink.SCOPE_LINK}))
	}
	gateway := testnet.NodeAddrs[testnet.IPv4]
	errs = append(errs,
		s.inner.RouteAdd(&netlink.Route{Dst: host(gateway), LinkIndex: inner.Attrs().Index, Scope: netlink.SCOPE_LINK}),
		s.inner.RouteAdd(&netlink.Route{Gw: gateway.AsSlice(), LinkIndex: inner.Attrs().Index}))
	if err := errors.Join(errs...); err != nil {
		return fail(err)
	}
	return nil
}

// disconnect does what a main plugin does at DEL.
func (s *slot) disconnect() error {
	if s.link == "" {
		return nil
	}
	link, err := s.outer.LinkByName(s.link)
	if err == nil {
		err = s.outer.LinkDel(link)
	}
	if s.bridge != "" {
		for _, a := range s.addrs {
			err = errors.Join(err, s.outer.RouteDel(&netlink.Route{Dst: host(a), Scope: netlink.SCOPE_LINK}))
		}
	}
	if err != nil {
		return fmt.Errorf("disconnect %s: %w", s.pod.Name, err)
	}
	s.link = ""
	return nil
}

// plugin executes podwall for the slot's container. A CNI error is an *agentapi.Error.
func (s *slot) plugin(ctx context.Context, verb string) error {
	var ips []any
	for _, a := range s.addrs {
		ips = append(ips, map[string]any{"interface": 1, "address": netip.PrefixFrom(a, a.BitLen()).String()})
	}
	stdin, err := json.Marshal(map[string]any{
		"cniVersion": "1.1.0", "name": s.node.Name, "type": "podwall", "socket": s.node.Socket(), "timeout": addTimeout.String(),
		"prevResult": map[string]any{
			"cniVersion": "1.1.0", "ips": ips,
			"interfaces": []any{map[string]any{"name": s.link}, map[string]any{"name": ifName, "sandbox": s.pod.Netns()}},
		},
	})
	if err != nil {
		return err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, s.node.Binaries.Plugin)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, fmt.Sprintf("CNI_CONTAINERID=%s-%d", s.pod.PodName, s.container), "CNI_NETNS="+s.pod.Netns(),
		"CNI_IFNAME="+ifName, "CNI_PATH="+s.node.Binaries.CNIDir, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME="+s.pod.PodName)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	if err := s.node.Host.In(cmd.Start); err != nil { // a process is born into the namespace of the thread that forks
		return fmt.Errorf("execute podwall: %w", err)
	}
	if err = cmd.Wait(); err == nil {
		return nil
	}
	var failure agentapi.Error
	if json.Unmarshal(stdout.Bytes(), &failure) != nil || failure.Code == 0 {
		return fmt.Errorf("podwall %s of %s: %w, and not a CNI error: %s%s", verb, s.pod.Name, err, &stdout, &stderr)
	}
	return &failure
}
