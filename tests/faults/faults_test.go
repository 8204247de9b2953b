// Package faults runs podwall for long under kills, changes of policy and churn of pods, and counts what goes wrong. What it
// counts at the end is expected to be zero, so every count is also made of a run with a defect, where it must not be.
package faults

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/conntrack"
)

// Small numbers by default, for every day. `make faults` has large ones.
var (
	kills       = flag.Int("kills", 5, "how often podwalld is ended and started again, per main plugin")
	flips       = flag.Int("flips", 50, "how often a policy is replaced, per main plugin")
	attachments = flag.Int("attachments", 200, "how many pods are added and deleted, per kind of network")
)

func TestMain(m *testing.M) { os.Exit(testnet.RunTests(m.Run)) }

const (
	// patience is how long anything may take that has no reason to take long: only what is broken takes all of it.
	patience = 30 * time.Second
	// lookEvery is how often something is looked at while it is waited for.
	lookEvery = 5 * time.Millisecond
)

var nodes atomic.Int32

// newNode lays out a node with podwall in its conflist. The daemon is started by launch.
func newNode(t *testing.T, cni string, manifests map[string]string) *testnet.Node {
	t.Helper()
	binaries, err := testnet.TestBinaries()
	if err != nil {
		t.Fatal(err)
	}
	n, err := testnet.NewNode(t.Context(), testnet.Config{
		Name: fmt.Sprintf("f%d", nodes.Add(1)), CNI: cni, Families: families, Binaries: binaries, Podwall: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			t.Logf("podwalld's log ends:\n%s", n.Log())
		}
		if err := n.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	for name, text := range manifests {
		if err := n.WriteManifest(name, text); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func add(t *testing.T, n *testnet.Node, name string, ports ...testnet.Port) *testnet.Pod {
	t.Helper()
	p, err := n.AddPod(t.Context(), "default", name, "", ports...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// podManifest describes a pod of the namespace default by its labels.
func podManifest(name, labels string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: default, name: %s, labels: {%s}}\nspec: {containers: [{name: c}]}\n", name, labels)
}

// policyManifest is a NetworkPolicy of the namespace default with a spec in YAML flow form.
func policyManifest(name, spec string) string {
	return fmt.Sprintf("---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: default, name: %s}\nspec: %s\n", name, spec)
}

// report puts a line of figures where a person and a program find it.
func report(t *testing.T, line string) {
	t.Helper()
	t.Attr("report", line)
	t.Log(line)
}

// pause waits, or returns early when the context ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// await looks until something is so. It returns an error when that takes more than patience.
func await(ctx context.Context, what string, so func() (bool, error)) error {
	deadline := time.Now().Add(patience)
	for {
		if ok, err := so(); err != nil || ok {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not after %s", what, patience)
		}
		if err := pause(ctx, lookEvery); err != nil {
			return err
		}
	}
}

// daemon is a podwalld that can be ended at any instant, also before it serves.
type daemon struct {
	node   *testnet.Node
	cmd    *exec.Cmd
	exited chan struct{}
}

// launch starts a podwalld and waits for nothing. Another one of the same node may run.
func launch(n *testnet.Node) (*daemon, error) {
	log, err := os.OpenFile(filepath.Join(n.Dir, "podwalld.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start podwalld: %w", err)
	}
	defer log.Close()
	// ip(8) becomes the daemon: signals and /proc are the daemon's own.
	cmd := exec.Command("ip", "netns", "exec", n.Name, n.Binaries.Podwalld, "run", "--manifests", n.ManifestDir(), "--node-name", n.Name,
		"--socket", n.Socket(), "--state-dir", n.StateDir(), "--listen", "")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start podwalld: %w", err)
	}
	d := &daemon{node: n, cmd: cmd, exited: make(chan struct{})}
	go func() {
		defer close(d.exited)
		_ = cmd.Wait()
	}()
	return d, nil
}

// ready waits until some daemon of the node serves.
func (d *daemon) ready(ctx context.Context) error {
	client := agentapi.NewClient(d.node.Socket())
	return await(ctx, "podwalld is ready", func() (bool, error) {
		select {
		case <-d.exited:
			return false, fmt.Errorf("podwalld ended by itself: %s", d.cmd.ProcessState)
		default:
			return client.Status(ctx) == nil, nil
		}
	})
}

// end sends the signal and waits until the process is gone.
func (d *daemon) end(sig syscall.Signal) error {
	select {
	case <-d.exited:
		return fmt.Errorf("podwalld ended by itself: %s", d.cmd.ProcessState)
	default:
	}
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal podwalld: %w", err)
	}
	select {
	case <-d.exited:
		return nil
	case <-time.After(patience):
		_ = d.cmd.Process.Kill()
		<-d.exited
		return fmt.Errorf("podwalld ignored signal %d for %s", sig, patience)
	}
}

// stopAfter ends the daemon with the test, whatever became of it.
func (d *daemon) stopAfter(t *testing.T) {
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill()
		<-d.exited
	})
}

// leftover counts what is there now and was not before.
type leftover struct{ chains, elements, other, files, flows int }

func (l leftover) String() string {
	return fmt.Sprintf("chains %d, set elements %d, other lines %d, attachment files %d, connections %d", l.chains, l.elements, l.other, l.files, l.flows)
}

// since compares two states. What is missing counts as something else: it is as wrong.
func (s state) since(before state) leftover {
	extra, missing := subtract(s.rules, before.rules), subtract(before.rules, s.rules)
	l := leftover{files: max(0, len(s.files)-len(before.files)), flows: max(0, s.flows-before.flows), other: len(missing)}
	for _, line := range extra {
		switch {
		case strings.HasPrefix(line, "\tchain "):
			l.chains++
		case strings.HasPrefix(line, "\t\t\t"): // pkg/ruleset prints an element per line
			l.elements++
		default:
			l.other++
		}
	}
	return l
}

// subtract returns the lines of a that b does not have, or has less often.
func subtract(a, b []string) []string {
	count := map[string]int{}
	for _, line := range b {
		count[line]++
	}
	var rest []string
	for _, line := range a {
		if count[line]--; count[line] < 0 {
			rest = append(rest, line)
		}
	}
	return rest
}

// state is what an attachment leaves traces in.
type state struct {
	rules []string // the kernel's tables, by line
	files []string // attachments/
	flows int      // connections of slots, where they are counted
}

// look reads the state of a node whose daemon is ready.
func look(ctx context.Context, n *testnet.Node) (state, error) {
	text, err := n.Podwalld(ctx, "ruleset", "--kernel")
	if err != nil {
		return state{}, err
	}
	files, err := filepath.Glob(filepath.Join(n.StateDir(), "attachments", "*"))
	if err != nil {
		return state{}, err
	}
	return state{rules: strings.Split(text, "\n"), files: files}, nil
}

// countFlows returns how many connections there are of addresses that slots have: those that the harness keeps are not.
func countFlows(ctx context.Context, n *testnet.Node) (int, error) {
	ns, err := netns.GetFromName(n.Name)
	if err != nil {
		return 0, fmt.Errorf("open namespace of %s: %w", n.Name, err)
	}
	defer ns.Close()
	table, err := conntrack.New(conntrack.Config{NetNS: int(ns)})
	if err != nil {
		return 0, err
	}
	defer table.Close()
	// A flow may be listed twice.
	seen := map[string]bool{}
	err = table.Flows(ctx, conntrack.Filter{}, func(f conntrack.Flow) {
		for _, a := range []netip.Addr{f.Src.Addr(), f.Dst.Addr()} {
			if slotRanges[testnet.IPv4].Contains(a) || slotRanges[testnet.IPv6].Contains(a) {
				seen[fmt.Sprint(f.Proto, f.Src, f.Dst)] = true
			}
		}
	})
	return len(seen), err
}

// inSync fails if the kernel has something else than the daemon has computed.
func inSync(ctx context.Context, n *testnet.Node) error {
	if out, err := n.Podwalld(ctx, "ruleset", "--diff"); err != nil {
		return fmt.Errorf("the kernel's ruleset is not the daemon's: %w\n%s", err, out)
	}
	return nil
}
