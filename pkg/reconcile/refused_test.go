package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"

	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/registry"
	"github.com/podwall/podwall/pkg/ruleset"
)

// allowApp lets the pods of one app reach those of another.
func allowApp(name, app, client string) cluster.Change {
	selector := func(app string) metav1.LabelSelector {
		return metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
	}
	from := selector(client)
	p := &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{
		PodSelector: selector(app), PolicyTypes: []networkingv1.PolicyType{"Ingress"},
		Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &from}}}},
	}}
	return cluster.Change{Key: p.Key(), Object: p}
}

// podStates are the states of this node's pods by name.
func podStates(w *world) string {
	var list []string
	for _, p := range w.Pods() {
		list = append(list, p.Name+" "+p.State)
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

// adds is what Fake.Refuse takes: it refuses to add what has one of these texts in its name or its elements.
func adds(texts ...string) func(ruleset.Op) error {
	return func(op ruleset.Op) error {
		s := op.String()
		if strings.HasPrefix(s, "add ") && slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(s, text) }) {
			return unix.EINVAL
		}
		return nil
	}
}

// TestKernelRefusesEgress holds the same for what pods may send. The policies of a pod have one chain then, and the one that is at fault is told from
// the others if what is refused is one of the sets.
func TestKernelRefusesEgress(t *testing.T) {
	t.Parallel()
	allowTo := func(name, app, server string) cluster.Change {
		p := &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}, PolicyTypes: []networkingv1.PolicyType{"Egress"},
			Egress: []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": server}}}}}},
		}}
		return cluster.Change{Key: p.Key(), Object: p}
	}
	for _, tt := range []struct {
		refused  string
		reported []string
	}{
		{"set inet podwall p4_" + policy.ID("p", "namespace", "ns", "app=c"), []string{"NetworkPolicy ns/second: "}},
		{"rule inet podwall ep_" + policy.ID("egress", "ns", "third", "ns", "second", "ns", "first"), []string{"NetworkPolicy ns/first: ", "NetworkPolicy ns/second: ", "NetworkPolicy ns/third: "}},
	} {
		t.Run(tt.refused, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := start(t, false, nil)
				w.Apply(pod("a", "here"), pod("b", "here"), pod("c", "here"))
				w.Synced()
				for i, name := range []string{"a", "b", "c"} {
					if err := w.Attach(within(t, time.Second), attachment("c"+name, name, fmt.Sprintf("10.0.0.%d", i+1))); err != nil {
						t.Fatal(err)
					}
				}
				w.kernel.Refuse(adds(tt.refused), false)
				w.Apply(allowTo("first", "a", "b"), allowTo("second", "a", "c"), allowTo("third", "a", "d"), allowTo("other", "b", "a"))
				synctest.Wait()
				if got, want := podStates(w), "a quarantined, b enforced, c enforced"; got != want {
					t.Errorf("%s, want %s", got, want)
				}
				problems := w.NodeStatus().Problems
				if len(problems) != len(tt.reported) {
					t.Fatalf("problems %q, want %q", problems, tt.reported)
				}
				for i, want := range tt.reported {
					if !strings.HasPrefix(problems[i], want) {
						t.Errorf("problem %q, want one of %s", problems[i], want)
					}
				}
				w.kernel.Refuse(nil, false)
				time.Sleep(refusedMost + sweepEvery)
				synctest.Wait()
				if got, want := podStates(w), "a enforced, b enforced, c enforced"; got != want || len(w.NodeStatus().Problems) > 0 {
					t.Errorf("when the kernel has come round: %s, %q", got, w.NodeStatus().Problems)
				}
			})
		})
	}
}

// logBuffer keeps what is logged.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// namespace makes a network namespace that ends with the test, and what runs a command in it with a standard input.
func namespace(t *testing.T) (int, func(stdin string, argv ...string)) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(own); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	return int(ns), func(stdin string, argv ...string) {
		t.Helper()
		failed := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
			if err := netns.Set(ns); err != nil {
				failed <- err
				return
			}
			cmd := exec.Command(argv[0], argv[1:]...)
			cmd.Stdin = strings.NewReader(stdin)
			out, err := cmd.CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%s: %w: %s", argv, err, out)
			}
			failed <- err
		}()
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
	}
}

// TestKernelRefuses holds that what the kernel refuses closes the pods that need it and nobody else, however little the kernel says, that all
// the rest of the transaction is applied, that it is reported, and that the pods open when the kernel has come round.
func TestKernelRefuses(t *testing.T) {
	t.Parallel()
	chain := func(container string) string { return "in_" + policy.ID("attachment", container, "eth0") }
	const all = "a enforced, b enforced, c enforced, d enforced"
	for _, tt := range []struct {
		name     string
		refused  []string
		want     string
		reported []string
	}{
		{name: "nothing", want: all},
		{
			name: "a pod's chain", refused: []string{"chain inet podwall " + chain("cb")},
			want: "a enforced, b quarantined, c enforced, d enforced", reported: []string{"Pod ns/b: "},
		},
		{
			name: "a pod's element", refused: []string{"10.0.0.3 : jump " + chain("cc")},
			want: "a enforced, b enforced, c quarantined, d enforced", reported: []string{"Pod ns/c: "},
		},
		{
			name: "two pods", refused: []string{"chain inet podwall " + chain("cb"), "rule inet podwall " + chain("cd")},
			want: "a enforced, b quarantined, c enforced, d quarantined", reported: []string{"Pod ns/b: ", "Pod ns/d: "},
		},
		{
			name: "a policy's chain", refused: []string{"chain inet podwall pi_" + policy.ID("ingress", "ns", "to-c")},
			want: "a enforced, b enforced, c quarantined, d enforced", reported: []string{"NetworkPolicy ns/to-c: "},
		},
		{
			name: "what several policies use", refused: []string{"set inet podwall p4_"},
			want:     "a enforced, b quarantined, c quarantined, d quarantined",
			reported: []string{"NetworkPolicy ns/to-b: ", "NetworkPolicy ns/to-c: ", "NetworkPolicy ns/to-d: "},
		},
	} {
		for _, silent := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, silent %v", tt.name, silent), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					w := start(t, false, nil)
					w.Apply(pod("a", "here"), pod("b", "here"), pod("c", "here"), pod("d", "here"))
					w.Synced()
					for i, name := range []string{"a", "b", "c", "d"} {
						if err := w.Attach(within(t, time.Second), attachment("c"+name, name, fmt.Sprintf("10.0.0.%d", i+1))); err != nil {
							t.Fatal(err)
						}
					}
					w.kernel.Refuse(adds(tt.refused...), silent)
					w.Apply(allowApp("to-b", "b", "a"), allowApp("to-c", "c", "a"), allowApp("to-d", "d", "a"))
					synctest.Wait()
					if got := podStates(w); got != tt.want {
						t.Fatalf("%s, want %s\n%+v\n%+v", got, tt.want, w.NodeStatus(), w.Pods())
					}
					problems := w.NodeStatus().Problems
					if len(problems) < len(tt.reported) || len(problems) > 0 != (len(tt.refused) > 0) {
						t.Errorf("problems %q, want %q", problems, tt.reported)
					}
					for i := range tt.reported {
						// What an error of the whole transaction is about is known by the pods alone.
						if !silent && (!strings.HasPrefix(problems[i], tt.reported[i]) || !strings.Contains(problems[i], "the kernel refuses")) {
							t.Errorf("problem %q, want one of %s", problems[i], tt.reported[i])
						}
					}
					for _, p := range w.Pods() {
						v, _ := w.element("in4", p.IPs[0])
						if (v == policy.Quarantined) != (p.State == StateQuarantined) || p.State == StateQuarantined && !strings.Contains(p.Reason, "the kernel refuses") {
							t.Errorf("%s is %s (%s) and in the kernel %v", p.Name, p.State, p.Reason, v)
						}
					}
					// Everything else goes on.
					w.Apply(pod("e", "here"), denyAll("deny"))
					synctest.Wait()
					if got := podStates(w); silent == false && got != tt.want {
						t.Errorf("after another change: %s, want %s", got, tt.want)
					}
					if err := w.Attach(within(t, time.Second), attachment("ce", "e", "10.0.0.5")); err != nil {
						t.Errorf("another pod: %v", err)
					}
					w.kernel.Refuse(nil, false)
					time.Sleep(refusedMost + sweepEvery)
					synctest.Wait()
					if got, want := podStates(w), all+", e enforced"; got != want || len(w.NodeStatus().Problems) > 0 {
						t.Errorf("when the kernel has come round: %s, %q", got, w.NodeStatus().Problems)
					}
				})
			})
		}
	}
}

// TestKernelRefusesAgain holds that a refused object does not cost a transaction at every pass, and that one that was mended is taken at once.
func TestKernelRefusesAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("b", "here"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("ca", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		refusals := 0
		bad := "chain inet podwall pi_" + policy.ID("ingress", "ns", "bad")
		w.kernel.Refuse(func(op ruleset.Op) error {
			err := adds(bad)(op)
			if err != nil {
				refusals++
			}
			return err
		}, false)
		w.Apply(allowApp("bad", "a", "b"))
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := podStates(w); got != "a quarantined" {
			t.Fatal(got)
		}
		if refusals < 5 || refusals > 40 {
			t.Errorf("refused %d times in an hour", refusals)
		}
		w.Apply(denyAll("bad")) // its author has mended it
		synctest.Wait()
		if got := podStates(w); got != "a enforced" {
			t.Errorf("%s, with a policy that the kernel takes", got)
		}
	})
}

// TestKernelRefusesLink holds that an ADD whose host veth cannot be closed fails, that no other does, and that it is enforced when the kernel
// has come round.
func TestKernelRefusesLink(t *testing.T) {
	t.Parallel()
	for _, link := range []string{"veth", "port"} {
		synctest.Test(t, func(t *testing.T) {
			w := start(t, false, nil)
			w.Apply(pod("a", "here"), pod("b", "here"), denyAll("deny"))
			w.Synced()
			w.kernel.Refuse(adds("as_"+policy.ID("attachment", "ca", "eth0")), false)
			a := attachment("ca", "a", "10.0.0.1")
			a.HostLink.Name = link
			err := w.Attach(within(t, time.Second), a)
			if !errors.Is(err, ErrNotReady) || !strings.Contains(err.Error(), "the kernel refuses chain") {
				t.Errorf("Attach: %v", err)
			}
			if v, _ := w.element("in4", ip1); v != policy.Quarantined {
				t.Errorf("the address goes to %v", v)
			}
			if err := w.Attach(within(t, time.Second), attachment("cb", "b", "10.0.0.2")); err != nil {
				t.Errorf("another pod: %v", err)
			}
			if err := w.Detach(within(t, time.Second), attach.Key{ContainerID: "cb", IfName: "eth0"}); err != nil {
				t.Error(err)
			}
			w.kernel.Refuse(nil, false)
			if err := w.Attach(within(t, time.Minute), a); err != nil {
				t.Errorf("when the kernel has come round: %v", err)
			}
		})
	}
}

// TestKernelRefusesDelete holds that what cannot be deleted keeps nothing else from being done, and goes when it can.
func TestKernelRefusesDelete(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("b", "here"), allowApp("old", "a", "b"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("ca", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		chain := "pi_" + policy.ID("ingress", "ns", "old")
		w.kernel.Refuse(func(op ruleset.Op) error {
			if op.Name() == "delete chain inet podwall "+chain || op.Kind == ruleset.DelTable {
				return unix.EBUSY
			}
			return nil
		}, false)
		w.Apply(cluster.Change{Key: allowApp("old", "a", "b").Key}, denyAll("new"))
		synctest.Wait()
		has := func() bool { return strings.Contains(w.kernel.Ruleset().String(), "chain "+chain) }
		if got := w.Policies(); len(got) != 1 || len(got[0].Pods) != 1 || !has() {
			t.Errorf("policies %+v, the chain is there: %v", got, has())
		}
		if s := w.NodeStatus(); s.Error != "" || s.Enforced != 1 {
			t.Errorf("status %+v", s)
		}
		w.kernel.Refuse(nil, false)
		time.Sleep(refusedMost + sweepEvery)
		synctest.Wait()
		if has() {
			t.Error("the chain is still there")
		}
	})
}

// TestKernelRefusesBase holds that a fault in what all pods share closes nobody, is told, and is got over.
func TestKernelRefusesBase(t *testing.T) {
	t.Parallel()
	for _, silent := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := start(t, false, nil)
			w.Apply(pod("a", "here"), denyAll("deny"))
			w.kernel.Refuse(adds("chain inet podwall forward"), silent)
			w.Synced()
			time.Sleep(time.Minute)
			synctest.Wait()
			if s := w.NodeStatus(); s.Ready || s.Error == "" {
				t.Errorf("status %+v", s)
			}
			w.kernel.Refuse(nil, false)
			if err := w.Attach(within(t, time.Minute), attachment("ca", "a", "10.0.0.1")); err != nil {
				t.Error(err)
			}
		})
	}
}

// realLinks are those of a namespace whose links nobody looks at.
type realLinks struct{ *world }

func (realLinks) Lookup(h attach.HostLink) (registry.Link, error) {
	return registry.Link{Exists: true, Name: h.Name, Bridge: map[bool]string{true: "br0"}[strings.HasPrefix(h.Name, "port")]}, nil
}

// TestRealKernelRefuses does it with the kernel itself, whose tables somebody else has changed so that it refuses what podwall wants.
func TestRealKernelRefuses(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	peers := "p4_" + policy.ID("p", "namespace", "ns", "app=b")
	for _, tt := range []struct {
		name, sabotage string
		link           string
		want           string
		replaced       bool
		unneeded       bool // what is sabotaged is to be deleted
	}{
		{name: "control", want: "a enforced, b enforced", link: "lo"},
		{
			name: "a set of another type has the name", link: "lo", want: "a enforced, b enforced", // the difference sees to it
			sabotage: "flush chain inet podwall pi_" + policy.ID("ingress", "ns", "to-a") + "; delete set inet podwall " + peers + "; add set inet podwall " + peers + " { type inet_service; }",
		},
		{
			name: "a foreign map goes to a chain of ours", link: "lo", want: "a enforced, b enforced", replaced: true, unneeded: true,
			sabotage: "add map inet podwall theirs { type iface_index . inet_service : verdict; flags interval; }; add element inet podwall theirs { 1 . 1-2 : jump in_" + policy.ID("attachment", "ca", "eth0") + " }",
		},
		{name: "more chains than a device can have", link: "full", want: "a enforced, b quarantined"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ns, run := namespace(t)
			var log logBuffer
			w, l, _ := realLoop(t, ns, &log)
			l.Apply(pod("a", "here"), pod("b", "here"))
			l.Synced()
			if err := l.WaitReady(within(t, 20*time.Second)); err != nil {
				t.Fatal(err)
			}
			a, b := attachment("ca", "a", "10.0.0.1"), attachment("cb", "b", "10.0.0.2")
			a.HostLink.Name, b.HostLink.Name = "lo", tt.link
			if err := l.Attach(within(t, 20*time.Second), a); err != nil {
				t.Fatal(err)
			}
			l.Apply(allowApp("to-a", "a", "b"))
			deadline := time.Now().Add(10 * time.Second)
			for len(l.Policies()) == 0 && time.Now().Before(deadline) {
				time.Sleep(10 * time.Millisecond)
			}
			run("", "ip", "link", "add", "full", "type", "veth", "peer", "name", "peer")
			if tt.link == "full" {
				// MAX_HOOK_COUNT of net/netfilter/core.c.
				var script strings.Builder
				script.WriteString("table netdev crowd {\n")
				for i := range 1024 {
					fmt.Fprintf(&script, "chain c%d { type filter hook ingress device full priority %d; }\n", i, i)
				}
				script.WriteString("}\n")
				run(script.String(), "nft", "-f", "-")
			}
			if tt.sabotage != "" {
				run("", "nft", tt.sabotage)
			}
			if tt.unneeded {
				l.Apply(cluster.Change{Key: allowApp("to-a", "a", "b").Key})
			}
			addErr := l.Attach(within(t, 3*time.Second), b)
			if wantErr := strings.Contains(tt.want, "quarantined"); (addErr != nil) != wantErr {
				t.Errorf("Attach: %v", addErr)
			}
			if got := podStates(w); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
			kernelHas, err := l.KernelRuleset(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if d := ruleset.Diff(kernelHas, l.Ruleset()); !d.Empty() {
				t.Errorf("the kernel has not what is desired: %v", d)
			}
			if got := strings.Contains(log.String(), "it has been replaced"); got != tt.replaced {
				t.Errorf("replaced: %v, want %v\n%s", got, tt.replaced, log.String())
			}
			t.Attr("report", fmt.Sprintf("%s: %s; ADD of b: %v; problems %q", tt.name, podStates(w), addErr, l.NodeStatus().Problems))
			if tt.link == "full" {
				run("", "nft", "delete", "table", "netdev", "crowd")
				l.Apply(pod("b", "here")) // its object changes: it is tried at once
				if err := l.Attach(within(t, 60*time.Second), b); err != nil {
					t.Errorf("when there is room: %v", err)
				}
			}
		})
	}
}

// realLoop runs a loop on the kernel of a network namespace, whose tables have no owner.
func realLoop(t *testing.T, ns int, log io.Writer) (*world, *Loop, *nft.Kernel) {
	t.Helper()
	kernel, err := nft.New(nft.Config{NetNS: ns})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kernel.Close() })
	w := &world{kernel: nft.NewFake(), gone: map[string]bool{}, metrics: metrics.New(func() float64 { return 0 })}
	runWorld(t, w, Config{Kernel: kernel, Links: realLinks{w}, Connections: w, Log: slog.New(slog.NewTextHandler(log, nil))})
	return w, w.Loop, kernel
}

// runWorld runs a world's loop with parts that are not the world's own, until the test ends.
func runWorld(t *testing.T, w *world, cfg Config) {
	t.Helper()
	reg, _, err := registry.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cfg.NodeName, cfg.Metrics, cfg.Clock = "here", w.metrics, clock.RealClock{}
	if cfg.Policy.Table == "" {
		cfg.Policy.Table = "podwall"
	}
	w.Loop = New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	lead := make(chan *registry.Registry, 1)
	lead <- reg
	go func() { done <- w.Run(ctx, lead) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// failedCommits counts what the metrics tell.
func failedCommits(t *testing.T, w *world) float64 {
	t.Helper()
	families, err := w.metrics.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	total := 0.0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "podwall_commits_total" && m.GetLabel()[0].GetValue() == "error" {
				total += m.GetCounter().GetValue()
			}
		}
	}
	return total
}

// TestReceiveBuffer holds that lost answers of the kernel (ENOBUFS) are got over: what was asked for is in the kernel in the end, and
// nobody is closed for it.
func TestReceiveBuffer(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	for _, tiny := range []bool{false, true} {
		t.Run(fmt.Sprintf("tiny %v", tiny), func(t *testing.T) {
			t.Parallel()
			ns, _ := namespace(t)
			var log logBuffer
			w, l, kernel := realLoop(t, ns, &log)
			l.Apply(pod("a", "here"))
			l.Synced()
			if err := l.WaitReady(within(t, 20*time.Second)); err != nil {
				t.Fatal(err)
			}
			a := attachment("ca", "a", "10.0.0.1")
			a.HostLink.Name = "lo"
			if err := l.Attach(within(t, 20*time.Second), a); err != nil {
				t.Fatal(err)
			}
			if tiny {
				conn, err := kernel.SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				var setErr error
				if err := conn.Control(func(fd uintptr) { setErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1) }); err != nil || setErr != nil {
					t.Fatal(err, setErr)
				}
			}
			const policies = 200
			for i := range policies {
				l.Apply(allowApp(fmt.Sprintf("p%d", i), "a", "b"))
			}
			deadline := time.Now().Add(30 * time.Second)
			for pods := l.Pods(); len(pods[0].Ingress) < policies && time.Now().Before(deadline); pods = l.Pods() {
				time.Sleep(10 * time.Millisecond)
			}
			if got := podStates(w); got != "a enforced" || len(l.Pods()[0].Ingress) < policies {
				t.Errorf("%s by %d policies\n%s", got, len(l.Pods()[0].Ingress), log.String())
			}
			has, err := l.KernelRuleset(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if d := ruleset.Diff(has, l.Ruleset()); !d.Empty() {
				t.Errorf("the kernel has not what is desired: %d differences", len(d.Apply))
			}
			failed := failedCommits(t, w)
			if failed > 0 && !tiny { // with a tiny one they may: how many answers a transaction has is the writer's choice
				t.Errorf("%v commits failed", failed)
			}
			t.Attr("report", fmt.Sprintf("receive buffer tiny %v: %v commits failed, all %d policies are in the kernel, nobody was closed", tiny, failed, policies))
		})
	}
}

// busyTable is a connection tracking table that cannot be used for a time.
type busyTable struct {
	*world
	err atomic.Pointer[error]
}

func (b *busyTable) Forget(ips []netip.Addr) error {
	if err := b.err.Load(); err != nil {
		return *err
	}
	return b.world.Forget(ips)
}

// TestConntrackFull holds that a pod stays closed for as long as the connections of its address's former owner cannot be forgotten, that
// others are not kept waiting by that, and that it is over when the table can be used.
func TestConntrackFull(t *testing.T) {
	t.Parallel()
	for _, errno := range []unix.Errno{unix.ENOMEM, unix.ENOSPC, unix.ENOBUFS} {
		synctest.Test(t, func(t *testing.T) {
			w := &world{kernel: nft.NewFake(), gone: map[string]bool{}, metrics: metrics.New(func() float64 { return 0 })}
			busy := &busyTable{world: w}
			runWorld(t, w, Config{Kernel: w.kernel, Links: w, Connections: busy, Log: slog.New(slog.DiscardHandler)})
			w.Apply(pod("a", "here"), pod("b", "here"), denyAll("deny"))
			w.Synced()
			synctest.Wait()
			if err := w.Attach(within(t, time.Second), attachment("cb", "b", "10.0.0.2")); err != nil {
				t.Fatal(err)
			}
			var err error = errno
			busy.err.Store(&err)
			err = w.Attach(within(t, 5*time.Second), attachment("ca", "a", "10.0.0.1"))
			if !errors.Is(err, ErrNotReady) || !strings.Contains(err.Error(), errno.Error()) {
				t.Errorf("Attach: %v", err)
			}
			if v, _ := w.element("in4", ip1); v != policy.Quarantined {
				t.Errorf("the address goes to %v", v)
			}
			w.Apply(cluster.Change{Key: denyAll("deny").Key})
			synctest.Wait()
			if _, isolated := w.element("in4", netip.MustParseAddr("10.0.0.2")); isolated {
				t.Error("another pod's policy did not change")
			}
			busy.err.Store(nil)
			if err := w.Attach(within(t, 10*time.Second), attachment("ca", "a", "10.0.0.1")); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}
