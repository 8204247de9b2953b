// Command scale measures podwalld's memory, start and processor time in clusters of up to 100,000 pods: the real daemon in a network
// namespace, registered attachments, and an API server over HTTP in another process.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/tests/bench/result"
)

const usage = `Usage: scale -o DIR [flags]

Starts podwalld against an API server that serves made-up clusters, with the node's pods registered over its socket, and measures memory,
start time and processor time. Everything happens in namespaces of its own. It needs root, and ip and nft in the PATH.

`

func main() { os.Exit(testnet.Sandbox(func() int { return run(os.Args[1:], os.Stderr) })) }

type options struct {
	out, bin string
	quick    bool

	pods, policies int
}

func run(args []string, stderr io.Writer) int {
	var o options
	fs := flag.NewFlagSet("scale", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.out, "o", "", "write scale.json into `DIR`")
	fs.StringVar(&o.bin, "bin", "../../bin", "`DIR` that holds podwalld")
	fs.BoolVar(&o.quick, "quick", false, "a small cluster and little time: does it still work? No figure means anything")
	fs.IntVar(&o.pods, "pods", 0, "only the clusters of this many pods")
	fs.IntVar(&o.policies, "policies", 0, "only the clusters of this many policies")
	fs.Usage = func() {
		fmt.Fprint(stderr, usage)
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if o.out == "" || fs.NArg() > 0 {
		fs.Usage()
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := measure(ctx, o); err != nil {
		fmt.Fprintln(stderr, "scale:", err)
		return 1
	}
	return 0
}

// plan is what is measured.
type plan struct {
	pods, policies []int
	local          int
	starts         int           // times that each cluster is started, the median counts
	settle         time.Duration // from ready to the measurement of memory
	cpuPods        int           // the cluster under which events are played, with cpuPolicies
	cpuPolicies    int
	play           time.Duration // of each kind and rate of events
	target         bool          // whether the figures can be held against targets
}

func (o options) plan() plan {
	if o.quick {
		return plan{
			pods: []int{200, 500}, policies: []int{20}, local: 20, starts: 1, settle: time.Second, cpuPods: 500, cpuPolicies: 20, play: time.Second,
		}
	}
	p := plan{
		pods: []int{1000, 10_000, 100_000}, policies: []int{100, 1000, 10_000}, local: 250, starts: 3, settle: 8 * time.Second,
		cpuPods: 10_000, cpuPolicies: 1000, play: 20 * time.Second, target: true,
	}
	if o.pods > 0 {
		p.pods, p.target = []int{o.pods}, false
	}
	if o.policies > 0 {
		p.policies, p.target = []int{o.policies}, false
	}
	return p
}

// node is where podwalld runs: this process's own network namespace, with the host sides of the pods' links.
type node struct {
	podwalld, state, kubeconfig string
	api                         *apiServer
}

func measure(ctx context.Context, o options) error {
	n := &node{state: "/run/podwall", kubeconfig: "/run/kubeconfig"} // on a tmpfs of the sandbox
	var err error
	if n.podwalld, err = filepath.Abs(filepath.Join(o.bin, "podwalld")); err != nil {
		return err
	}
	if _, err := os.Stat(n.podwalld); err != nil {
		return fmt.Errorf("%w: run `make build`", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	n.api = newAPIServer(listener)
	if err := n.writeKubeconfig(); err != nil {
		return err
	}
	p := o.plan()
	if err := makeLinks(ctx, p.local); err != nil {
		return err
	}
	file := result.New("scale")
	b := &bench{node: n, plan: p}
	for _, pods := range p.pods {
		if err := b.cluster(ctx, pods); err != nil {
			return err
		}
	}
	b.report(file)
	return file.Write(o.out)
}

func (n *node) writeKubeconfig() error {
	text := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],` +
		`"clusters":[{"name":"c","cluster":{"server":"` + n.api.url + `"}}],"users":[{"name":"u","user":{}}]}`
	return os.WriteFile(n.kubeconfig, []byte(text), 0o600)
}

func linkName(i int) string { return fmt.Sprintf("veth%08x", i) }

// makeLinks makes a veth per local pod, its other end in a namespace that stands for all of them.
func makeLinks(ctx context.Context, local int) error {
	var batch bytes.Buffer
	for i := range local {
		fmt.Fprintf(&batch, "link add %s type veth peer name eth%d netns pods\nlink set %s up\n", linkName(i), i, linkName(i))
	}
	for _, argv := range [][]string{{"ip", "netns", "add", "pods"}, {"ip", "-batch", "-"}} {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		if argv[1] == "-batch" {
			cmd.Stdin = &batch
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", argv, err, out)
		}
	}
	return nil
}

// register makes attachments of the fleet's local pods, as the CNI plugin does.
func (n *node) register(ctx context.Context, f fleet) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var g errgroup.Group
	g.SetLimit(8)
	link := 0
	for i := range f.pods {
		if !f.isLocal(i) {
			continue
		}
		p, name := f.pod(i), linkName(link)
		link++
		g.Go(func() error {
			iface, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			ip := netip.MustParseAddr(p.Status.PodIP)
			if out, err := exec.CommandContext(ctx, "ip", "route", "replace", ip.String(), "dev", name).CombinedOutput(); err != nil {
				return fmt.Errorf("route to %s: %w: %s", ip, err, out)
			}
			return agentapi.NewClient(filepath.Join(n.state, "podwall.sock")).Attach(ctx, attach.Attachment{
				Network: "cluster", Key: attach.Key{ContainerID: string(p.UID), IfName: "eth0"},
				Pod: attach.PodRef{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID)}, IPs: []netip.Addr{ip},
				HostLink: attach.HostLink{Name: name, Index: iface.Index},
			})
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if link != f.local {
		return fmt.Errorf("registered %d pods, want %d", link, f.local)
	}
	return nil
}

// dropTables takes podwall's tables out of the kernel, which nobody owns while no podwalld runs.
func dropTables(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "nft", "flush", "ruleset").CombinedOutput()
	if err != nil {
		return fmt.Errorf("flush ruleset: %w: %s", err, out)
	}
	return nil
}

// launch is one start of podwalld.
type launch struct {
	total  float64 // seconds from exec to ready
	listed float64 // seconds from the end of the last list to ready
}

func (n *node) launch(ctx context.Context) (*daemon, launch, error) {
	n.api.forget()
	d, err := start(n.podwalld, n.state, n.kubeconfig)
	if err != nil {
		return nil, launch{}, err
	}
	ready, err := d.waitReady(ctx)
	if err != nil {
		return nil, launch{}, errors.Join(err, d.stop())
	}
	last := n.api.lastListed()
	if last.IsZero() {
		return nil, launch{}, errors.Join(d.failure("is ready without having listed everything"), d.stop())
	}
	return d, launch{ready.Sub(d.started).Seconds(), ready.Sub(last).Seconds()}, nil
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}
