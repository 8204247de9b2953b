package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/hostlink"
)

const (
	apps     = 10
	policies = 50 // of which apps select no more than a tenth of the pods each
	metrics  = "127.0.0.1:9481"
	ifName   = "eth0"
	pace     = 5 * time.Millisecond // between looks at something that takes milliseconds
	patience = 20 * time.Second
)

// node is a node with pods, and what was measured on it.
type node struct {
	*testnet.Node
	size    int
	sandbox netns.NsHandle // of the pod that comes and goes
	client  *agentapi.Client
	metrics *http.Client

	add, del, version, status                 times // whole processes
	start, find, socket, render, commit, wait times // of ADD
	delStart, delCommit                       times
	pluginCPU                                 times // of ADD
	daemonCPU                                 time.Duration
}

// newNode lays out a node with that many pods. They have no namespaces: the daemon looks at the host's side only.
func newNode(ctx context.Context, size int, binaries testnet.Binaries) (*node, error) {
	t, err := testnet.NewNode(ctx, testnet.Config{
		Name: fmt.Sprint("size", size), CNI: "ptp", Families: []testnet.Family{testnet.IPv4}, Binaries: binaries, Podwall: true,
		DaemonFlags: []string{"--listen", metrics, "--log-level", "info"},
	})
	if err != nil {
		return nil, err
	}
	n := &node{Node: t, size: size, client: agentapi.NewClient(t.Socket())}
	n.metrics = &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
		return t.Host.Dial(ctx, netip.MustParseAddrPort(address))
	}}}
	if err := t.WriteManifest("all.yaml", manifests(size)); err != nil {
		return n, err
	}
	if err := t.StartDaemon(ctx); err != nil {
		return n, err
	}
	if n.sandbox, err = newSandbox(t.Name + "-pod"); err != nil {
		return n, err
	}
	var found []attach.Attachment
	if err := t.Host.In(func() error {
		for i := range size {
			name := fmt.Sprint("veth", i)
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: fmt.Sprint("pod", i)}); err != nil {
				return fmt.Errorf("add link %s: %w", name, err)
			}
			l, err := netlink.LinkByName(name)
			if err != nil {
				return fmt.Errorf("find link %s: %w", name, err)
			}
			found = append(found, attach.Attachment{
				Network: t.Name, Key: attach.Key{ContainerID: fmt.Sprint("container", i), IfName: ifName},
				Pod: attach.PodRef{Namespace: "bench", Name: fmt.Sprint("pod", i)}, IPs: []netip.Addr{address(i)},
				HostLink: attach.HostLink{Name: name, Index: l.Attrs().Index},
			})
		}
		return nil
	}); err != nil {
		return n, err
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, a := range found {
		g.Go(func() error { return n.client.Attach(ctx, a) })
	}
	return n, g.Wait()
}

func address(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 244, byte(100 + i/250), byte(1 + i%250)})
}

// manifests describe the node's pods, the one that comes and goes, and policies: five select each pod.
func manifests(pods int) string {
	var b strings.Builder
	pod := func(name string, app int) {
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: bench, labels: {app: app%d}}\n", name, app)
	}
	pod("comes", 0)
	for i := range pods {
		pod(fmt.Sprint("pod", i), i%apps)
	}
	for i := range policies {
		fmt.Fprintf(&b, `---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: policy%d, namespace: bench}
spec:
  podSelector: {matchLabels: {app: app%d}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {app: app%d}}}], ports: [{port: %d}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: app%d}}}], ports: [{port: 443}]}]
`, i, i%apps, (i+1+i/apps)%apps, 8000+i, (i+2)%apps)
	}
	return b.String()
}

// newSandbox makes a network namespace below /run/netns, as runtimes do.
func newSandbox(name string) (netns.NsHandle, error) {
	type made struct {
		ns  netns.NsHandle
		err error
	}
	done := make(chan made)
	go func() { // its thread is in the new namespace, and ends with it
		runtime.LockOSThread()
		ns, err := netns.NewNamed(name)
		done <- made{ns, err}
	}()
	m := <-done
	return m.ns, m.err
}

// pod is one life of the pod that comes and goes.
type pod struct {
	key   attach.Key
	netns string
	stdin []byte
}

// veth makes the pod's veth, as a main plugin does, and its result.
func (n *node) veth(round int) (*pod, error) {
	host := fmt.Sprint("host", round)
	p := &pod{key: attach.Key{ContainerID: fmt.Sprint("comes", round), IfName: ifName}, netns: "/run/netns/" + n.Name + "-pod"}
	ip := address(n.size)
	if err := n.Host.In(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: host}, PeerName: ifName, PeerNamespace: netlink.NsFd(n.sandbox)})
	}); err != nil {
		return nil, fmt.Errorf("add link %s: %w", host, err)
	}
	var err error
	p.stdin, err = json.Marshal(map[string]any{
		"cniVersion": "1.1.0", "name": n.Name, "type": "podwall", "socket": n.Socket(), "logFile": n.log(),
		"prevResult": map[string]any{
			"cniVersion": "1.1.0",
			"interfaces": []any{map[string]any{"name": host}, map[string]any{"name": ifName, "sandbox": p.netns}},
			"ips":        []any{map[string]any{"address": ip.String() + "/32", "interface": 1}},
		},
	})
	return p, err
}

func (n *node) log() string { return filepath.Join(n.Dir, "plugin.log") }

// exec runs the plugin as a runtime does and returns how long its process took, from the fork until it was waited for, and its CPU time.
func (n *node) exec(verb string, p *pod) (time.Duration, time.Duration, error) {
	var took, cpu time.Duration
	err := n.Host.In(func() error {
		cmd := exec.Command(n.Binaries.Plugin)
		cmd.Env = []string{
			"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + p.key.ContainerID, "CNI_NETNS=" + p.netns, "CNI_IFNAME=" + p.key.IfName,
			"CNI_PATH=" + filepath.Dir(n.Binaries.Plugin), "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=comes",
		}
		var stdout, stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(p.stdin), &stdout, &stderr
		begin := time.Now()
		err := cmd.Run()
		took = time.Since(begin)
		cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		if err != nil {
			return fmt.Errorf("podwall %s: %w: %s%s", verb, err, stdout.Bytes(), stderr.Bytes())
		}
		return nil
	})
	return took, cpu, err
}

// measure makes the pod come and go once.
func (n *node) measure(ctx context.Context, round int) error {
	p, err := n.veth(round)
	if err != nil {
		return err
	}
	for verb, list := range map[string]*times{"VERSION": &n.version, "STATUS": &n.status} {
		took, _, err := n.exec(verb, p)
		if err != nil && verb == "VERSION" { // on a machine that is too busy STATUS has its 0.5 s and says so
			return err
		}
		*list = append(*list, took)
	}
	begin := time.Now()
	err = n.Host.In(func() error {
		_, err := hostlink.Find(ctx, p.netns, ifName, nil)
		return err
	})
	if err != nil {
		return err
	}
	n.find = append(n.find, time.Since(begin))
	begin = time.Now()
	if err := n.client.Status(ctx); err != nil {
		return err
	}
	n.socket = append(n.socket, time.Since(begin))

	before, err := n.spent()
	if err != nil {
		return err
	}
	took, cpu, err := n.exec("ADD", p)
	if err != nil {
		return err
	}
	inside, err := n.logged()
	if err != nil {
		return err
	}
	after, err := n.spent()
	if err != nil {
		return err
	}
	render, commit := after.render-before.render, after.commit-before.commit
	n.add, n.start, n.pluginCPU = append(n.add, took), append(n.start, took-inside), append(n.pluginCPU, cpu)
	n.render, n.commit = append(n.render, render), append(n.commit, commit)
	n.wait = append(n.wait, max(0, inside-n.find[len(n.find)-1]-n.socket[len(n.socket)-1]-render-commit))

	if took, _, err = n.exec("DEL", p); err != nil {
		return err
	}
	if inside, err = n.logged(); err != nil {
		return err
	}
	last, err := n.spent()
	if err != nil {
		return err
	}
	n.del, n.delStart, n.delCommit = append(n.del, took), append(n.delStart, took-inside), append(n.delCommit, last.commit-after.commit)
	if err := n.ended(ctx, p, round); err != nil {
		return err
	}
	end, err := n.spent()
	n.daemonCPU += end.cpu - before.cpu
	return err
}

// ended takes the pod's veth away and waits until the daemon has noticed.
func (n *node) ended(ctx context.Context, p *pod, round int) error {
	if err := n.Host.In(func() error {
		l, err := netlink.LinkByName(fmt.Sprint("host", round))
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	}); err != nil {
		return fmt.Errorf("delete the pod's link: %w", err)
	}
	file := filepath.Join(n.StateDir(), "attachments", fmt.Sprintf("%s-%s.%d.json", p.key.ContainerID, ifName, len(p.key.ContainerID)))
	for deadline := time.Now().Add(patience); ; {
		if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
			time.Sleep(pace) // the pass that removes what it has left
			return ctx.Err()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("podwalld did not notice that the link of %s is gone:\n%s", p.key, n.Log())
		}
		time.Sleep(pace)
	}
}

// logged returns what the plugin's last line says it took, which is without the start and the end of its process, and empties the log.
func (n *node) logged() (time.Duration, error) {
	data, err := os.ReadFile(n.log())
	if err != nil {
		return 0, err
	}
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	var line struct{ Took string }
	if err := json.Unmarshal(lines[len(lines)-1], &line); err != nil {
		return 0, fmt.Errorf("read the plugin's log: %w", err)
	}
	took, err := time.ParseDuration(line.Took)
	return took, errors.Join(err, os.Truncate(n.log(), 0))
}

// spending is what the daemon has spent since it began, on rendering, on commits, and of CPU time in all.
type spending struct{ render, commit, cpu time.Duration }

func (n *node) spent() (spending, error) {
	resp, err := n.metrics.Get("http://" + metrics + "/metrics")
	if err != nil {
		return spending{}, fmt.Errorf("read the daemon's metrics: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return spending{}, fmt.Errorf("read the daemon's metrics: %w", err)
	}
	var s spending
	sums := map[string]*time.Duration{
		"podwall_render_seconds_sum": &s.render, "podwall_commit_seconds_sum": &s.commit, "process_cpu_seconds_total": &s.cpu,
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if sum := sums[name]; sum != nil {
			seconds, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return spending{}, fmt.Errorf("read the daemon's metrics: %q: %w", line, err)
			}
			*sum = time.Duration(seconds * float64(time.Second))
		}
	}
	return s, nil
}
