package testnet

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	cniconf "github.com/podwall/podwall/cni-conf"
	"github.com/podwall/podwall/pkg/conflist"
)

// The addresses of every testnet, for manifests and matrices to name. Nodes do not see each other, so all use the same.
var (
	NodeAddrs = map[Family]netip.Addr{IPv4: netip.MustParseAddr("192.0.2.10"), IPv6: netip.MustParseAddr("2001:db8:2::10")}
	PodRanges = map[Family]netip.Prefix{IPv4: netip.MustParsePrefix("10.244.1.0/24"), IPv6: netip.MustParsePrefix("fd00:10:244:1::/64")}

	outside = []struct {
		name  string
		addrs map[Family]netip.Addr
	}{
		{"external", map[Family]netip.Addr{IPv4: netip.MustParseAddr("203.0.113.10"), IPv6: netip.MustParseAddr("2001:db8:113::10")}},
		{"partner", map[Family]netip.Addr{IPv4: netip.MustParseAddr("198.51.100.20"), IPv6: netip.MustParseAddr("2001:db8:100::20")}},
		{"banned", map[Family]netip.Addr{IPv4: netip.MustParseAddr("198.51.100.66"), IPv6: netip.MustParseAddr("2001:db8:100::66")}},
	}
)

// NodeName is the name of the node itself in a matrix, and External that of the machine outside which no ipBlock singles out.
const (
	NodeName = "node"
	External = "external"
)

const (
	stateDir     = "/run/testnet" // a tmpfs of the sandbox
	ifName       = "eth0"
	readyTimeout = 20 * time.Second
	stopTimeout  = 10 * time.Second
)

// Config describes a node.
type Config struct {
	Name        string // unique within the sandbox
	CNI         string // main plugin: bridge or ptp
	Families    []Family
	Binaries    Binaries
	Podwall     bool     // append podwall to the conflist and run podwalld
	DaemonFlags []string // in addition to the ones that place the daemon in this node
}

// Node is a Kubernetes node without Kubernetes: a network namespace that forwards, a conflist, podwalld and pods.
type Node struct {
	Config
	Host    *Host            // the node as sender and receiver
	Outside map[string]*Host // machines beyond the node, by name
	Dir     string           // conflist, manifests, socket, state and log

	probes atomic.Uint32
	mu     sync.Mutex
	pods   map[string]*Pod
	daemon *exec.Cmd
	exited chan struct{} // closed when daemon has ended
}

// Pod is a network namespace with an interface that cnitool has added.
type Pod struct {
	*Host
	Namespace, PodName, UID string
	ContainerID             string
}

// NewNode lays out the node and the machines around it. The daemon is started by StartDaemon.
func NewNode(ctx context.Context, config Config) (*Node, error) {
	n := &Node{Config: config, Dir: filepath.Join(stateDir, config.Name), Outside: map[string]*Host{}, pods: map[string]*Pod{}}
	if len(n.Dir) > 60 {
		return nil, fmt.Errorf("create node %s: the name is too long for a socket path", n.Name)
	}
	for _, dir := range []string{n.ManifestDir(), n.confDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("create node %s: %w", n.Name, err)
		}
	}
	if err := n.writeConflist(); err != nil {
		return nil, err
	}
	ns, err := newNS(n.Name)
	if err != nil {
		return nil, err
	}
	n.Host = &Host{Name: NodeName, Addrs: NodeAddrs, node: n, nsName: n.Name, ns: ns, received: map[string]bool{}}
	err = inNS(ns, func() error {
		return errors.Join(writeSysctl("net/ipv4/ip_forward", "1"), writeSysctl("net/ipv6/conf/all/forwarding", "1"))
	})
	if err != nil {
		return nil, err
	}
	if err := runIP(n.Name, "addr add "+NodeAddrs[IPv4].String()+"/32 dev lo", "addr add "+NodeAddrs[IPv6].String()+"/128 dev lo"); err != nil {
		return nil, err
	}
	if n.Host.observer, err = newNodeObserver(ctx, n.Name); err != nil {
		return nil, err
	}
	for _, machine := range outside {
		host, err := n.newHost(machine.name, n.Name+"-"+machine.name)
		if err != nil {
			return nil, err
		}
		host.Addrs = machine.addrs
		n.Outside[machine.name] = host
		if err := n.connect(host); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (n *Node) newHost(name, nsName string) (*Host, error) {
	ns, err := newNS(nsName)
	if err != nil {
		return nil, err
	}
	h := &Host{Name: name, node: n, nsName: nsName, ns: ns, received: map[string]bool{}}
	if h.observer, err = newPacketObserver(ns); err != nil {
		return nil, fmt.Errorf("observe %s: %w", name, err)
	}
	return h, nil
}

// connect cables a machine to the node, which is its gateway. An IPv6 neighbour answers only for addresses of the link itself,
// hence the link-local gateway.
func (n *Node) connect(h *Host) error {
	v4, v6 := h.Addrs[IPv4].String(), h.Addrs[IPv6].String()
	gateway := NodeAddrs[IPv4].String()
	return errors.Join(
		runIP(n.Name,
			"link add "+h.Name+" type veth peer name eth0 netns "+h.nsName,
			"addr add fe80::1/64 dev "+h.Name+" nodad",
			"link set "+h.Name+" up",
			"route add "+v4+" dev "+h.Name,
			"route add "+v6+" dev "+h.Name),
		runIP(h.nsName,
			"addr add "+v4+"/32 dev eth0",
			"addr add "+v6+"/128 dev eth0 nodad",
			"link set eth0 up",
			"route add "+gateway+" dev eth0",
			"route add default via "+gateway+" dev eth0",
			"route add default via fe80::1 dev eth0"))
}

// ManifestDir is the directory that the daemon reads.
func (n *Node) ManifestDir() string { return filepath.Join(n.Dir, "manifests") }

// Socket is the path of the daemon's socket.
func (n *Node) Socket() string { return filepath.Join(n.Dir, "run", "podwall.sock") }

// StateDir is where the daemon keeps its lock and attachments/.
func (n *Node) StateDir() string { return filepath.Join(n.Dir, "run") }

func (n *Node) confDir() string { return filepath.Join(n.Dir, "net.d") }

// writeConflist takes the sample conflist of the main plugin, fits it to this node and appends podwall.
func (n *Node) writeConflist() error {
	sample, err := cniconf.Sample(n.CNI)
	if err != nil {
		return fmt.Errorf("create node %s: %w", n.Name, err)
	}
	var list map[string]any
	if err := json.Unmarshal(sample, &list); err != nil {
		return fmt.Errorf("parse sample conflist %s: %w", n.CNI, err)
	}
	list["name"] = n.Name
	plugins, _ := list["plugins"].([]any)
	if len(plugins) == 0 {
		return fmt.Errorf("sample conflist %s has no plugins", n.CNI)
	}
	main, _ := plugins[0].(map[string]any)
	var ranges, routes []any
	for _, f := range n.Families {
		ranges = append(ranges, []any{map[string]any{"subnet": PodRanges[f].String()}})
		routes = append(routes, map[string]any{"dst": netip.PrefixFrom(map[Family]netip.Addr{IPv4: netip.IPv4Unspecified(), IPv6: netip.IPv6Unspecified()}[f], 0).String()})
	}
	main["ipam"] = map[string]any{"type": "host-local", "dataDir": filepath.Join(n.Dir, "ipam"), "ranges": ranges, "routes": routes}
	text, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return fmt.Errorf("write conflist: %w", err)
	}
	if n.Podwall {
		entry, err := json.Marshal(map[string]any{"type": "podwall", "socket": n.Socket()})
		if err != nil {
			return fmt.Errorf("write conflist: %w", err)
		}
		if text, err = conflist.Insert(text, entry); err != nil {
			return fmt.Errorf("append podwall to conflist %s: %w", n.CNI, err)
		}
	}
	return n.SetConflist(text)
}

// SetConflist replaces the node's conflist. Its network must be named like the node.
func (n *Node) SetConflist(text []byte) error {
	if err := os.WriteFile(filepath.Join(n.confDir(), "10-"+n.Name+".conflist"), text, 0o644); err != nil {
		return fmt.Errorf("write conflist of %s: %w", n.Name, err)
	}
	return nil
}

// Conflist returns the node's conflist.
func (n *Node) Conflist() ([]byte, error) {
	return os.ReadFile(filepath.Join(n.confDir(), "10-"+n.Name+".conflist"))
}

// WriteManifest puts a file into the daemon's directory in one step, as an editor or git does.
func (n *Node) WriteManifest(name, content string) error {
	temp := filepath.Join(n.Dir, "manifest.tmp")
	if err := os.WriteFile(temp, []byte(content), 0o644); err != nil {
		return fmt.Errorf("write manifest %s: %w", name, err)
	}
	if err := os.Rename(temp, filepath.Join(n.ManifestDir(), name)); err != nil {
		return fmt.Errorf("write manifest %s: %w", name, err)
	}
	return nil
}

// StartDaemon starts podwalld in the node and waits until it serves.
func (n *Node) StartDaemon(ctx context.Context) error {
	if n.daemon != nil {
		return fmt.Errorf("start podwalld: it already runs in node %s", n.Name)
	}
	log, err := os.OpenFile(filepath.Join(n.Dir, "podwalld.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("start podwalld: %w", err)
	}
	defer log.Close()
	argv := append([]string{
		n.Binaries.Podwalld, "run", "--manifests", n.ManifestDir(), "--node-name", n.Name, "--socket", n.Socket(),
		"--state-dir", n.StateDir(), "--listen", "", "--log-level", "debug",
	}, n.DaemonFlags...)
	cmd := command(context.WithoutCancel(ctx), n.Name, argv...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start podwalld: %w", err)
	}
	n.daemon, n.exited = cmd, make(chan struct{})
	go func(exited chan struct{}) {
		_ = cmd.Wait()
		close(exited)
	}(n.exited)
	return n.waitReady(ctx)
}

func (n *Node) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", n.Socket())
	}}}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://podwall/v1/status", nil)
		if err != nil {
			return fmt.Errorf("ask podwalld's status: %w", err)
		}
		if resp, err := client.Do(req); err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode/100 == 2 {
				return nil
			}
		}
		select {
		case <-n.exited:
			err := fmt.Errorf("podwalld of node %s ended: %s\n%s", n.Name, n.daemon.ProcessState, n.Log())
			n.daemon = nil
			return err
		default:
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return fmt.Errorf("podwalld of node %s is not ready: %w\n%s", n.Name, err, n.Log())
		}
	}
}

// Log returns the end of what the daemon has logged.
func (n *Node) Log() string {
	log, err := os.ReadFile(filepath.Join(n.Dir, "podwalld.log"))
	if err != nil {
		return err.Error()
	}
	const end = 8 << 10
	return string(log[max(0, len(log)-end):])
}

// Podwalld runs an operator command against the node's daemon and returns what it prints.
func (n *Node) Podwalld(ctx context.Context, subcommand string, args ...string) (string, error) {
	return n.Host.Run(ctx, append([]string{n.Binaries.Podwalld, subcommand, "--socket", n.Socket()}, args...)...)
}

// StopDaemon asks the daemon to end and waits until it has.
func (n *Node) StopDaemon() error { return n.endDaemon(syscall.SIGTERM) }

// KillDaemon ends the daemon as the OOM killer does.
func (n *Node) KillDaemon() error { return n.endDaemon(syscall.SIGKILL) }

func (n *Node) endDaemon(sig syscall.Signal) error {
	if n.daemon == nil {
		return nil
	}
	defer func() { n.daemon = nil }()
	if err := n.daemon.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop podwalld: %w", err)
	}
	select {
	case <-n.exited:
		return nil
	case <-time.After(stopTimeout):
		_ = n.daemon.Process.Kill()
		<-n.exited
		return fmt.Errorf("podwalld of node %s ignored %s for %s and was killed\n%s", n.Name, sig, stopTimeout, n.Log())
	}
}

// DaemonRunning reports whether the daemon has not ended.
func (n *Node) DaemonRunning() bool {
	if n.daemon == nil {
		return false
	}
	select {
	case <-n.exited:
		return false
	default:
		return true
	}
}

// NewPod prepares a pod's sandbox without any interface but lo.
func (n *Node) NewPod(namespace, name, uid string) (*Pod, error) {
	key := namespace + "/" + name
	nsName := n.Name + "-" + namespace + "-" + name
	host, err := n.newHost(key, nsName)
	if err != nil {
		return nil, err
	}
	// cnitool derives the container's ID from the path of the namespace.
	p := &Pod{Host: host, Namespace: namespace, PodName: name, UID: uid, ContainerID: fmt.Sprintf("cnitool-%x", sha512Prefix("/run/netns/"+nsName))}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods[key] = p
	return p, nil
}

func sha512Prefix(s string) []byte {
	sum := sha512.Sum512([]byte(s))
	return sum[:10]
}

// cniArgs is what containerd and CRI-O pass.
func (p *Pod) cniArgs() string {
	args := "IgnoreUnknown=1;K8S_POD_NAMESPACE=" + p.Namespace + ";K8S_POD_NAME=" + p.PodName + ";K8S_POD_INFRA_CONTAINER_ID=" + p.ContainerID
	if p.UID != "" {
		args += ";K8S_POD_UID=" + p.UID
	}
	return args
}

// CNITool runs a verb of cnitool (add, check, del, gc, status) for the pod.
func (n *Node) CNITool(ctx context.Context, verb string, p *Pod) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := command(ctx, n.Name, filepath.Join(n.Binaries.CNIDir, "cnitool"), verb, n.Name, p.Netns())
	cmd.Env = append(os.Environ(), "NETCONFPATH="+n.confDir(), "CNI_PATH="+n.cniPath(), "CNI_IFNAME="+ifName, "CNI_ARGS="+p.cniArgs())
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("cnitool %s %s: %w: %s%s", verb, p.Name, err, bytes.TrimSpace(stderr.Bytes()), bytes.TrimSpace(stdout.Bytes()))
	}
	return stdout.Bytes(), nil
}

func (n *Node) cniPath() string { return n.Binaries.CNIDir + ":" + filepath.Dir(n.Binaries.Plugin) }

// Plugin executes the podwall plugin itself, as a runtime does, and returns its output: cnitool does not show error codes.
func (n *Node) Plugin(ctx context.Context, verb string, p *Pod, stdin []byte) ([]byte, error) {
	cmd := command(ctx, n.Name, n.Binaries.Plugin)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID="+p.ContainerID, "CNI_NETNS="+p.Netns(), "CNI_IFNAME="+ifName,
		"CNI_PATH="+n.cniPath(), "CNI_ARGS="+p.cniArgs())
	cmd.Stdin = bytes.NewReader(stdin)
	return cmd.Output()
}

// Add gives the pod its interface and learns its addresses.
func (n *Node) Add(ctx context.Context, p *Pod) error {
	out, err := n.CNITool(ctx, "add", p)
	if err != nil {
		return err
	}
	var result struct {
		IPs []struct {
			Address netip.Prefix `json:"address"`
		} `json:"ips"`
	}
	if err := json.Unmarshal(out, &result); err != nil {
		return fmt.Errorf("parse result of cnitool add %s: %w", p.Name, err)
	}
	p.Addrs = map[Family]netip.Addr{}
	for _, ip := range result.IPs {
		p.Addrs[familyOf(ip.Address.Addr())] = ip.Address.Addr()
	}
	return nil
}

// AddPod prepares a pod, adds it and serves its ports.
func (n *Node) AddPod(ctx context.Context, namespace, name, uid string, ports ...Port) (*Pod, error) {
	p, err := n.NewPod(namespace, name, uid)
	if err != nil {
		return nil, err
	}
	if err := p.Serve(ports...); err != nil {
		return nil, err
	}
	return p, n.Add(ctx, p)
}

// DeletePod takes the interface away with cnitool and removes the sandbox.
func (n *Node) DeletePod(ctx context.Context, p *Pod) error {
	_, err := n.CNITool(ctx, "del", p)
	return errors.Join(err, n.RemovePod(p))
}

// RemovePod removes the sandbox without a DEL, as a crashed runtime does.
func (n *Node) RemovePod(p *Pod) error {
	n.mu.Lock()
	delete(n.pods, p.Name)
	n.mu.Unlock()
	return errors.Join(p.close(), runIP("", "netns del "+p.nsName))
}

// Find returns the pod, the node or the machine outside of that name.
func (n *Node) Find(name string) (*Host, error) {
	if name == NodeName {
		return n.Host, nil
	}
	if h, ok := n.Outside[name]; ok {
		return h, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, ok := n.pods[name]; ok {
		return p.Host, nil
	}
	return nil, fmt.Errorf("node %s has no %q", n.Name, name)
}

// Pod returns a pod by namespace/name, or nil.
func (n *Node) Pod(name string) *Pod {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pods[name]
}

// Close deletes the pods, stops the daemon and removes the namespaces.
func (n *Node) Close(ctx context.Context) error {
	n.mu.Lock()
	pods := make([]*Pod, 0, len(n.pods))
	for _, p := range n.pods {
		pods = append(pods, p)
	}
	n.mu.Unlock()
	slices.SortFunc(pods, func(a, b *Pod) int { return strings.Compare(a.Name, b.Name) })

	var g errgroup.Group
	g.SetLimit(addParallel)
	for _, p := range pods {
		g.Go(func() error { return n.DeletePod(ctx, p) })
	}
	errs := []error{g.Wait(), n.StopDaemon()}
	for _, h := range n.Outside {
		errs = append(errs, h.close(), runIP("", "netns del "+h.nsName))
	}
	errs = append(errs, n.Host.close(), runIP("", "netns del "+n.Name))
	if err := os.RemoveAll(n.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
