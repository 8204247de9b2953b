// Package checks holds the tests of podwall on a running cluster; 'cluster test' starts one and runs them.
package checks

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/podwall/podwall/tests/cluster/lab"
)

var (
	cni   = flag.String("cni", "", "main CNI plugin of the running cluster, for the report")
	image = flag.String("image", "", "podwall's image archive")
)

// cluster is the running cluster.
type cluster struct {
	lab     *lab.Lab
	nodes   map[string]*lab.Node
	client  kubernetes.Interface
	figures *[]string
	names   *int // of namespaces that were made
}

// TestCluster runs the checks in the order of their needs: those before podwall is there, those with it, its removal.
func TestCluster(t *testing.T) {
	if *cni == "" {
		t.Skip("needs a cluster: run 'make test-cluster'")
	}
	l, err := lab.New(os.Stdout)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{lab: l, nodes: map[string]*lab.Node{}, figures: new([]string), names: new(int)}
	for _, name := range []string{"node1", "node2"} {
		if c.nodes[name], err = l.Node(name); err != nil {
			t.Fatal(err)
		}
	}
	if c.client, err = l.Client(); err != nil {
		t.Fatal(err)
	}
	if err := l.Load(t.Context(), *image); err != nil {
		t.Fatal(err)
	}
	for _, check := range []struct {
		name      string
		installed bool // podwall has to be there before, or must not
		run       func(*testing.T, *cluster)
	}{
		{"start-up-race-without-podwall", false, raceWithout},
		{"adopt-running-pods", false, adopt},
		{"start-up-race", true, race},
		{"upstream", true, upstream},
		{"kubelet-probes", true, kubeletProbes},
		{"services", true, services},
		{"first-packets", true, firstPackets},
		{"job-ip-reuse", true, jobIPReuse},
		{"force-deleted-pod", true, forceDeleted},
		{"static-pod", true, staticPod},
		{"phase-failed", true, phaseFailed},
		{"rolling-update", true, rollingUpdate},
		{"daemon-stopped", true, daemonStopped},
		{"api-server-stopped", true, apiServerStopped},
		{"namespace-relabelled", true, namespaceRelabelled},
		{"policy-latency", true, policyLatency},
		{"conflist-overwritten", true, conflistOverwritten},
		{"uninstall", true, uninstall},
	} {
		t.Run(check.name, func(t *testing.T) {
			begin := time.Now()
			if c.installed() != check.installed {
				if check.installed {
					c.install(t)
				} else {
					c.uninstall(t)
				}
			}
			defer c.keepLogs(t, check.name)
			check.run(t, c)
			t.Logf("took %.1f s", time.Since(begin).Seconds())
		})
	}
	report := fmt.Sprintf("podwall on %s\n%s\n", *cni, strings.Join(*c.figures, "\n"))
	if err := os.WriteFile(l.Logs()+"/figures-"+*cni+".txt", []byte(report), 0o644); err != nil { //nolint:gosec // a report
		t.Error(err)
	}
	fmt.Println(report)
}

// keepLogs writes what podwall's pods have said beside the cluster's own logs when a check has failed.
func (c *cluster) keepLogs(t *testing.T, check string) {
	if !t.Failed() {
		return
	}
	out, err := c.tryKubectl(context.WithoutCancel(t.Context()), "-n", "kube-system", "logs", "-l", "app.kubernetes.io/name=podwall", "--all-containers", "--prefix", "--tail=-1")
	if err != nil {
		t.Logf("podwall's logs: %v", err)
	}
	if err := os.WriteFile(c.lab.Logs()+"/podwall-"+check+".log", []byte(out), 0o644); err != nil { //nolint:gosec // logs
		t.Log(err)
	}
}

// figure records a measured value for the table at the end.
func (c *cluster) figure(t *testing.T, format string, args ...any) {
	t.Helper()
	line := fmt.Sprintf("  %-32s %s", strings.TrimPrefix(t.Name(), "TestCluster/"), fmt.Sprintf(format, args...))
	t.Log(line)
	*c.figures = append(*c.figures, line)
}

// kubectl runs kubectl in podwall's source tree.
func (c *cluster) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.tryKubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (c *cluster) tryKubectl(ctx context.Context, args ...string) (string, error) {
	cmd := c.nodes["node1"].NetCommand(ctx, append([]string{"kubectl"}, args...)...)
	cmd.Dir = c.lab.Repo
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

func (c *cluster) installed() bool {
	_, err := c.tryKubectl(context.Background(), "-n", "kube-system", "get", "daemonset", "podwall")
	return err == nil
}

// install deploys podwall as a user does.
func (c *cluster) install(t *testing.T) {
	t.Helper()
	begin := time.Now()
	c.kubectl(t, "apply", "-k", "install/kubernetes")
	c.rollout(t)
	t.Logf("podwall deployed in %.1f s", time.Since(begin).Seconds())
}

func (c *cluster) rollout(t *testing.T) {
	t.Helper()
	out, err := c.tryKubectl(t.Context(), "-n", "kube-system", "rollout", "status", "daemonset/podwall", "--timeout=180s")
	if err != nil {
		t.Fatalf("%v\n%s", err, c.daemonLogs(t))
	}
	_ = out
}

func (c *cluster) daemonLogs(t *testing.T) string {
	t.Helper()
	out, err := c.tryKubectl(t.Context(), "-n", "kube-system", "logs", "-l", "app.kubernetes.io/name=podwall", "--all-containers", "--tail=40", "--prefix")
	if err != nil {
		return err.Error()
	}
	return out
}

// daemonPods returns podwall's pods by node.
func (c *cluster) daemonPods(t *testing.T) map[string]string {
	t.Helper()
	pods := map[string]string{}
	out := c.kubectl(t, "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=podwall", "--field-selector=status.phase=Running",
		"-o", `jsonpath={range .items[*]}{.spec.nodeName} {.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 {
			pods[f[0]] = f[1]
		}
	}
	return pods
}

// podwalld runs an operator's command on a node and returns what it printed.
func (c *cluster) podwalld(t *testing.T, node string, args ...string) string {
	t.Helper()
	pod := c.daemonPods(t)[node]
	return c.kubectl(t, append([]string{"-n", "kube-system", "exec", pod, "-c", "podwalld", "--", "podwalld"}, args...)...)
}

// uninstall removes podwall as the documentation says.
func (c *cluster) uninstall(t *testing.T) {
	t.Helper()
	for node, pod := range c.daemonPods(t) {
		begin := time.Now()
		out := c.kubectl(t, "-n", "kube-system", "exec", pod, "-c", "podwalld", "--", "podwall-install", "uninstall")
		t.Logf("%s: podwall-install uninstall took %.1f s: %s", node, time.Since(begin).Seconds(), out)
	}
	c.kubectl(t, "delete", "-k", "install/kubernetes", "--wait=true")
	eventually(t, time.Minute, "podwall's pods to go", func() error {
		if pods := c.daemonPods(t); len(pods) > 0 {
			return fmt.Errorf("still there: %v", pods)
		}
		return nil
	})
}

// eventually calls f until it returns nil, and fails the test after the timeout.
func eventually(t *testing.T, timeout time.Duration, what string, f func() error) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Since(begin) > timeout || t.Context().Err() != nil {
			t.Fatalf("waited %v for %s: %v", timeout, what, err)
		}
	}
}

// quantile of unsorted durations.
func quantile(list []time.Duration, q float64) time.Duration {
	s := slices.Sorted(slices.Values(list))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}

func spread(list []time.Duration) string {
	round := func(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
	return fmt.Sprintf("p50 %v, p99 %v, max %v of %d", round(quantile(list, 0.5)), round(quantile(list, 0.99)), round(slices.Max(list)), len(list))
}

func upstream(t *testing.T, c *cluster) {
	if err := c.lab.RunSuite(t.Context(), lab.Suite{Procs: 4, Focus: lab.UpstreamFocus}); err != nil {
		t.Fatal(err)
	}
}
