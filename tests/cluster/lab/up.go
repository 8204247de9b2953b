package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Options say what kind of cluster to start.
type Options struct {
	Nodes int    // 1 or 2
	CNI   string // bridge or ptp
	Bound bool   // end the nodes when this process ends; Up must be called from the main goroutine, locked to its thread
}

// Names returns the names of the nodes.
func (o Options) Names() []string { return []string{"node1", "node2"}[:o.Nodes] }

// startTimeout bounds each step that waits for a component.
const startTimeout = 3 * time.Minute

// Up starts a cluster and returns when its nodes are Ready. What is left of an earlier one is removed first.
func (l *Lab) Up(ctx context.Context, o Options) error {
	if o.Nodes < 1 || o.Nodes > 2 || !slices.Contains([]string{"bridge", "ptp"}, o.CNI) {
		return fmt.Errorf("up: want 1 or 2 nodes and CNI bridge or ptp, not %d and %q", o.Nodes, o.CNI)
	}
	start := time.Now()
	if err := l.Down(ctx); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(l.run()), os.RemoveAll(l.Logs()), os.MkdirAll(l.run(), 0o700), os.MkdirAll(l.Logs(), 0o755)); err != nil { //nolint:gosec // logs
		return err
	}
	if err := l.recordTraces(); err != nil {
		return err
	}
	if err := l.start(ctx, o, start); err != nil {
		return errors.Join(err, l.Down(ctx))
	}
	return nil
}

func (l *Lab) start(ctx context.Context, o Options, start time.Time) error {
	if err := l.pki(); err != nil {
		return err
	}
	if err := l.config("containerd.toml", filepath.Join(l.run(), "containerd.toml"), map[string]string{"Bin": l.Bin(), "PauseImage": PauseImage}); err != nil {
		return err
	}
	var nodes []*Node
	for _, name := range o.Names() {
		data := map[string]string{"Name": name, "PodCIDR": podCIDR(name), "Cgroup": cgroup(name), "Kubeconfig": l.Kubeconfig()}
		for template, as := range map[string]string{
			"kubelet.yaml": name + "-kubelet.yaml", "kube-proxy.yaml": name + "-kube-proxy.yaml", o.CNI + ".conflist": name + ".conflist",
		} {
			if err := l.config(template, filepath.Join(l.run(), as), data); err != nil {
				return err
			}
		}
		n, err := l.boot(name, o.Bound)
		if err != nil {
			return err
		}
		nodes = append(nodes, n)
	}
	if err := wire(ctx, nodes); err != nil {
		return err
	}
	l.progress(start, "%d node(s), pods on %s", o.Nodes, o.CNI)

	master := nodes[0]
	if err := l.startControlPlane(ctx, master); err != nil {
		return err
	}
	for _, n := range nodes {
		if err := n.Start(ctx, "containerd", filepath.Join(l.Bin(), "containerd"), "--config", filepath.Join(l.run(), "containerd.toml"), "--log-level", "info"); err != nil {
			return err
		}
	}
	l.progress(start, "API server is ready")
	for _, n := range nodes {
		if err := n.Load(ctx, filepath.Join(l.images(), "pause.tar"), filepath.Join(l.images(), "agnhost.tar"), filepath.Join(l.images(), "probe.tar")); err != nil {
			return err
		}
		if err := l.startNode(ctx, n); err != nil {
			return err
		}
	}
	l.progress(start, "images are loaded")
	client, err := l.Client()
	if err != nil {
		return err
	}
	if err := await(ctx, "nodes to become Ready", func() error { return nodesReady(ctx, client, o.Nodes) }); err != nil {
		return err
	}
	// Pods cannot be created before the namespace has its service account.
	if err := await(ctx, "the default service account", func() error {
		_, err := client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	}); err != nil {
		return err
	}
	l.progress(start, "nodes are Ready")
	return nil
}

func (l *Lab) startControlPlane(ctx context.Context, n *Node) error {
	bin := l.Bin()
	if err := n.Start(ctx, "etcd", filepath.Join(bin, "etcd"), "--data-dir", "/var/lib/etcd/data", "--listen-client-urls", "http://127.0.0.1:2379",
		"--advertise-client-urls", "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync", "--log-level", "warn"); err != nil {
		return err
	}
	if err := l.StartAPIServer(ctx); err != nil {
		return err
	}
	if err := n.Start(ctx, "kube-controller-manager", filepath.Join(bin, "kube-controller-manager"), "--kubeconfig="+l.Kubeconfig(),
		"--service-account-private-key-file="+filepath.Join(l.run(), "sa.key"), "--root-ca-file="+filepath.Join(l.run(), "ca.crt"),
		"--use-service-account-credentials=true", "--leader-elect=false", "--allocate-node-cidrs=true", "--cluster-cidr=10.244.0.0/16",
		"--service-cluster-ip-range=10.96.0.0/16", "--node-cidr-mask-size=24", "--cert-dir=/run/kube-controller-manager", "--bind-address=127.0.0.1"); err != nil {
		return err
	}
	return n.Start(ctx, "kube-scheduler", filepath.Join(bin, "kube-scheduler"), "--kubeconfig="+l.Kubeconfig(), "--leader-elect=false",
		"--cert-dir=/run/kube-scheduler", "--bind-address=127.0.0.1")
}

// StartAPIServer starts the API server and returns when it is ready.
func (l *Lab) StartAPIServer(ctx context.Context) error {
	n, err := l.Node("node1")
	if err != nil {
		return err
	}
	pki := func(name string) string { return filepath.Join(l.run(), name) }
	if err := n.Start(ctx, "kube-apiserver", filepath.Join(l.Bin(), "kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0",
		"--advertise-address="+n.IP(), "--secure-port=6443", "--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"),
		"--token-auth-file="+pki("tokens.csv"), "--client-ca-file="+pki("ca.crt"), "--authorization-mode=Node,RBAC",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+pki("sa.key"),
		"--service-account-signing-key-file="+pki("sa.key"), "--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged=true",
		"--profiling=false", "--cert-dir=/run/kube-apiserver"); err != nil {
		return err
	}
	config, err := l.RESTConfig()
	if err != nil {
		return err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	return await(ctx, "the API server", func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, config.Host+"/readyz", http.NoBody)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return errors.Join(err, n.Signal(ctx, "kube-apiserver", "0"))
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz answers %s", resp.Status)
		}
		return nil
	})
}

// StopAPIServer stops the API server.
func (l *Lab) StopAPIServer(ctx context.Context) error {
	n, err := l.Node("node1")
	if err != nil {
		return err
	}
	return n.Stop(ctx, "kube-apiserver")
}

func (l *Lab) startNode(ctx context.Context, n *Node) error {
	if err := n.Start(ctx, "kube-proxy", filepath.Join(l.Bin(), "kube-proxy"), "--config="+filepath.Join(l.run(), n.Name+"-kube-proxy.yaml"), "--v=2"); err != nil {
		return err
	}
	return n.Start(ctx, "kubelet", filepath.Join(l.Bin(), "kubelet"), "--config="+filepath.Join(l.run(), n.Name+"-kubelet.yaml"), "--kubeconfig="+l.Kubeconfig(),
		"--hostname-override="+n.Name, "--node-ip="+n.IP(), "--root-dir=/var/lib/kubelet", "--cert-dir=/var/lib/kubelet/pki", "--v=2")
}

// boot starts a node's process 1 and waits until its filesystem is made.
func (l *Lab) boot(name string, bound bool) (*Node, error) {
	log, err := os.Create(filepath.Join(l.Logs(), name+"-init.log"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	cmd := newSandbox(l.Dir, name, bound)
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("create the namespaces of %s: %w", name, err)
	}
	started, err := startTime(cmd.Process.Pid)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	if err := l.write(name+".pid", fmt.Appendf(nil, "%d %s\n", cmd.Process.Pid, started)); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "ready\n" {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		why, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("start %s: %s", name, why)
	}
	go func() { _ = cmd.Wait() }()
	return &Node{Name: name, lab: l, pid: cmd.Process.Pid}, nil
}

// wire connects the nodes and routes the pods of each to the other.
func wire(ctx context.Context, nodes []*Node) error {
	peer := "type veth peer name eth0-peer"
	if len(nodes) == 2 {
		peer = fmt.Sprintf("type veth peer name eth0 netns %d", nodes[1].pid)
	}
	if err := output(nodes[0].NetCommand(ctx, strings.Fields("ip link add eth0 "+peer)...)); err != nil {
		return err
	}
	if len(nodes) == 1 { // without a peer that is up there is no carrier, and without carrier no route
		if err := output(nodes[0].NetCommand(ctx, strings.Fields("ip link set eth0-peer up")...)); err != nil {
			return err
		}
	}
	for i, n := range nodes {
		commands := []string{
			"ip link set lo up", "ip addr add " + n.IP() + "/24 dev eth0", "ip link set eth0 up",
			// Service addresses are looked up before they are translated.
			"ip route add default via " + nodeIP("node254"),
		}
		if len(nodes) == 2 {
			other := nodes[1-i]
			commands = append(commands, "ip route add "+podCIDR(other.Name)+" via "+other.IP())
		}
		for _, c := range commands {
			if err := output(n.NetCommand(ctx, strings.Fields(c)...)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Load imports image archives into the node's containerd.
func (n *Node) Load(ctx context.Context, archives ...string) error {
	if err := await(ctx, "containerd on "+n.Name, func() error {
		_, err := n.Run(ctx, "ctr", "version")
		return err
	}); err != nil {
		return err
	}
	for _, a := range archives {
		f, err := os.Open(a) // the node does not see every file of the machine
		if err != nil {
			return err
		}
		cmd := n.Command(ctx, "ctr", "--namespace", "k8s.io", "images", "import", "-")
		cmd.Stdin = f
		out, err := cmd.CombinedOutput()
		_ = f.Close()
		if err != nil {
			return fmt.Errorf("import %s on %s: %w\n%s", a, n.Name, err, out)
		}
	}
	return nil
}

// RESTConfig is an administrator's access to the API server from this process, which is not in a node's network.
func (l *Lab) RESTConfig() (*rest.Config, error) {
	n, err := l.Node("node1")
	if err != nil {
		return nil, err
	}
	return &rest.Config{
		Host: "https://" + n.IP() + ":6443", BearerToken: "admin", QPS: 200, Burst: 400,
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(l.run(), "ca.crt")},
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return n.Dial(ctx, network, addr)
		},
	}, nil
}

// Client returns a client with RESTConfig's access.
func (l *Lab) Client() (kubernetes.Interface, error) {
	config, err := l.RESTConfig()
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

func nodesReady(ctx context.Context, client kubernetes.Interface, want int) error {
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	ready := 0
	for _, n := range list.Items {
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
				ready++
			}
		}
	}
	if ready != want {
		return fmt.Errorf("%d of %d nodes are Ready", ready, want)
	}
	return nil
}

// await calls f until it returns nil.
func await(ctx context.Context, what string, f func() error) error {
	for begin := time.Now(); ; {
		err := f()
		if err == nil {
			return nil
		}
		if time.Since(begin) > startTimeout {
			return fmt.Errorf("wait for %s: gave up after %v: %w; see the logs", what, startTimeout, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Load imports image archives on every node.
func (l *Lab) Load(ctx context.Context, archives ...string) error {
	for _, name := range l.NodeNames() {
		n, err := l.Node(name)
		if err != nil {
			return err
		}
		if err := n.Load(ctx, archives...); err != nil {
			return err
		}
	}
	return nil
}

// NodeNames returns the nodes of the running cluster.
func (l *Lab) NodeNames() []string {
	var names []string
	for _, name := range []string{"node1", "node2"} {
		if _, err := l.Node(name); err == nil {
			names = append(names, name)
		}
	}
	return names
}
