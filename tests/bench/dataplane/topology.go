package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
)

// The two pods of a node, and what they are connected to it with.
var (
	clientAddrs = [2]netip.Addr{netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00:10:244:1::2")}
	serverAddrs = [2]netip.Addr{netip.MustParseAddr("10.244.1.3"), netip.MustParseAddr("fd00:10:244:1::3")}
	// forged is an address that the client has and CNI did not give to it.
	forged = [2]netip.Addr{netip.MustParseAddr("10.244.1.99"), netip.MustParseAddr("fd00:10:244:1::99")}
)

const (
	clientLink = "veth-client"
	serverLink = "veth-server"
	bridge     = "cni0"
)

// topology is a node with two pods, in three network namespaces.
type topology struct {
	name                 string
	bridged              bool
	node, client, server netns.NsHandle
}

// newTopology lays out a node whose pods are reached by routes (as with ptp) or are ports of one bridge. Neighbours are permanent
// entries: what is measured has no ARP and no neighbour discovery in it.
func newTopology(name string, bridged bool) (*topology, error) {
	t := &topology{name: name, bridged: bridged}
	for _, ns := range []struct {
		name   string
		handle *netns.NsHandle
	}{{"node", &t.node}, {"client", &t.client}, {"server", &t.server}} {
		h, err := newNamespace(name + "-" + ns.name)
		if err != nil {
			return nil, err
		}
		*ns.handle = h
	}
	const nodeMAC, clientMAC, serverMAC = "02:00:00:00:00:01", "02:00:00:00:00:02", "02:00:00:00:00:03"
	node := []string{
		"link add " + clientLink + " type veth peer name eth0 netns " + name + "-client",
		"link add " + serverLink + " type veth peer name eth0 netns " + name + "-server",
		"link set lo up",
	}
	if bridged {
		node = append(node, "link add "+bridge+" address "+nodeMAC+" type bridge", "link set "+bridge+" up",
			"addr add 10.244.1.1/24 dev "+bridge, "addr add fd00:10:244:1::1/64 dev "+bridge+" nodad")
	}
	for _, p := range []struct {
		link, mac string
		addrs     [2]netip.Addr
	}{{clientLink, clientMAC, clientAddrs}, {serverLink, serverMAC, serverAddrs}} {
		if bridged {
			node = append(node, "link set "+p.link+" master "+bridge+" up")
			continue
		}
		node = append(node, "link set "+p.link+" address "+nodeMAC+" up")
		for _, a := range p.addrs {
			node = append(node, fmt.Sprintf("route add %s dev %s", a, p.link), fmt.Sprintf("neigh replace %s lladdr %s dev %s nud permanent", a, p.mac, p.link))
		}
	}
	pod := func(own, other [2]netip.Addr, mac, otherMAC string) []string {
		lines := []string{"link set lo up", "link set eth0 address " + mac + " up"}
		for i, a := range own {
			bits := [2]int{24, 64}[i]
			lines = append(lines, fmt.Sprintf("addr add %s/%d dev eth0%s", a, bits, [2]string{"", " nodad"}[i]))
			if !bridged {
				otherMAC = nodeMAC
			}
			lines = append(lines, fmt.Sprintf("neigh replace %s lladdr %s dev eth0 nud permanent", other[i], otherMAC))
		}
		return lines
	}
	client := pod(clientAddrs, serverAddrs, clientMAC, serverMAC)
	for i, a := range forged {
		// Deprecated, so that the client chooses its own address for what it sends (RFC 6724 section 5, rule 3).
		client = append(client, fmt.Sprintf("addr add %s/%d dev eth0%s", a, [2]int{32, 128}[i], [2]string{"", " nodad preferred_lft 0"}[i]))
	}
	for _, step := range []struct {
		ns    netns.NsHandle
		lines []string
	}{{t.node, node}, {t.client, client}, {t.server, pod(serverAddrs, clientAddrs, serverMAC, clientMAC)}} {
		err := in(step.ns, func() error {
			if err := run(strings.Join(step.lines, "\n")+"\n", "ip", "-batch", "-"); err != nil {
				return err
			}
			// A forged source is to be podwall's to drop.
			return sysctls("net/ipv4/conf/all/rp_filter=0", "net/ipv4/conf/eth0/rp_filter=0", "net/ipv4/conf/"+clientLink+"/rp_filter=0")
		})
		if err != nil {
			return nil, fmt.Errorf("lay out %s node: %w", name, err)
		}
	}
	return t, in(t.node, func() error {
		err := sysctls("net/ipv4/ip_forward=1", "net/ipv6/conf/all/forwarding=1")
		if bridged {
			err = errors.Join(err, sysctls("net/bridge/bridge-nf-call-iptables=1", "net/bridge/bridge-nf-call-ip6tables=1"))
		}
		return err
	})
}

// newNamespace makes a named network namespace; ip knows it by its name.
func newNamespace(name string) (netns.NsHandle, error) {
	if err := run("", "ip", "netns", "add", name); err != nil {
		return 0, err
	}
	h, err := netns.GetFromName(name)
	if err != nil {
		return 0, fmt.Errorf("open network namespace %s: %w", name, err)
	}
	return h, nil
}

// in runs f in a network namespace. The caller's goroutine is locked to its thread for good.
func in(ns netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before, err := netns.Get()
	if err != nil {
		return fmt.Errorf("own network namespace: %w", err)
	}
	defer before.Close()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return errors.Join(f(), netns.Set(before))
}

// run starts a program in the thread's network namespace.
func run(stdin string, argv ...string) error {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// sysctls sets variables of the thread's network namespace; those of interfaces that are not there are left out.
func sysctls(assignments ...string) error {
	var errs []error
	for _, a := range assignments {
		name, value, _ := strings.Cut(a, "=")
		err := os.WriteFile("/proc/sys/"+name, []byte(value), 0)
		if err != nil && (!errors.Is(err, os.ErrNotExist) || !strings.Contains(name, "/conf/")) {
			errs = append(errs, fmt.Errorf("set sysctl %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
