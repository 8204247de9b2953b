package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/utils/clock"

	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/conntrack"
	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/registry"
	"github.com/podwall/podwall/pkg/ruleset"
)

// world is a loop with a kernel, links and connections that a test can look at.
type world struct {
	*Loop
	kernel  *nft.Fake
	dir     string
	foreign chan string // what others have committed
	metrics *metrics.Metrics

	flowsMu sync.Mutex
	flows   []conntrack.Flow

	mu      sync.Mutex
	gone    map[string]bool
	looked  []string // links that Lookup was asked for
	hidden  bool     // bridged traffic cannot be seen
	forgets []string
	// forgotten records, at each call of Forget, whether the addresses were closed in the kernel, and linked how many links had chains.
	forgotten []bool
	linked    []int
	meanwhile func()   // called by Forget
	pickedUp  []string // what ForgetPickedUp was called for
}

func (w *world) Lookup(h attach.HostLink) (registry.Link, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.looked = append(w.looked, h.Name)
	if h.Name == "broken" || w.gone["netlink"] {
		return registry.Link{}, errors.New("netlink is out of order")
	}
	port := h.Name == "port"
	return registry.Link{Exists: !w.gone[h.Name], Bridge: map[bool]string{true: "br0"}[port], Hidden: port && w.hidden}, nil
}

func (w *world) Toward(netip.Addr) (string, error) { return "br0", nil }

func (w *world) Index(name string) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.gone[name] {
		return 0, nil
	}
	return 7, nil
}

func (w *world) ShowBridged(string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.hidden {
		return errors.New("modprobe br_netfilter")
	}
	return nil
}

// Forget implements Connections.
func (w *world) Forget(ips []netip.Addr) error {
	closed := true
	for _, ip := range ips {
		v, ok := w.element("in4", ip)
		closed = closed && ok && policy.Closed(v)
		w.forgets = append(w.forgets, ip.String())
	}
	w.forgotten = append(w.forgotten, closed)
	w.linked = append(w.linked, len(policy.Links(w.kernel.Ruleset())))
	if w.meanwhile != nil {
		w.meanwhile()
	}
	return nil
}

// ForgetPickedUp implements Connections.
func (w *world) ForgetPickedUp(ips []netip.Addr) error {
	for _, ip := range ips {
		if v, ok := w.element("in4", ip); !ok || policy.Closed(v) {
			w.pickedUp = append(w.pickedUp, ip.String()+" without its rules")
			continue
		}
		w.pickedUp = append(w.pickedUp, ip.String())
	}
	return nil
}

func (w *world) Flows(_ context.Context, filter conntrack.Filter, each func(conntrack.Flow)) error {
	w.flowsMu.Lock()
	flows := slices.Clone(w.flows)
	w.flowsMu.Unlock()
	for _, f := range flows {
		if (!filter.Src.IsValid() || f.Src.Addr() == filter.Src) && (!filter.Dst.IsValid() || f.Dst.Addr() == filter.Dst) {
			each(f)
		}
	}
	return nil
}

func (w *world) Delete(_ context.Context, flows []conntrack.Flow) (int, error) {
	w.flowsMu.Lock()
	defer w.flowsMu.Unlock()
	before := len(w.flows)
	w.flows = slices.DeleteFunc(w.flows, func(f conntrack.Flow) bool { return slices.Contains(flows, f) })
	return before - len(w.flows), nil
}

func (w *world) Addresses() (map[netip.Addr]bool, error) {
	return map[netip.Addr]bool{netip.MustParseAddr("192.168.1.1"): true}, nil
}

func (w *world) element(set string, ip netip.Addr) (ruleset.Verdict, bool) {
	t := w.kernel.Ruleset().Table(ruleset.TableID{Family: ruleset.Inet, Name: "podwall"})
	if t == nil {
		return ruleset.Verdict{}, false
	}
	v, ok := t.Sets[set].Elements[ruleset.AddrElem(ip)]
	return v, ok
}

// start runs a loop inside a synctest bubble; it ends with the test.
func start(t *testing.T, standalone bool, old *world) *world {
	t.Helper()
	return startAs(t, standalone, old, policy.Options{Table: "podwall", Cut: true})
}

func startAs(t *testing.T, standalone bool, old *world, options policy.Options) *world {
	t.Helper()
	w := &world{kernel: nft.NewFake(), gone: map[string]bool{}, dir: t.TempDir(), foreign: make(chan string, 16)}
	w.metrics = metrics.New(func() float64 { return 0 })
	if old != nil {
		w.kernel, w.dir = old.kernel, old.dir
	}
	reg, bad, err := registry.Open(w.dir)
	if err != nil || len(bad) > 0 && old == nil {
		t.Fatal(err, bad)
	}
	w.Loop = New(Config{
		NodeName: "here", Standalone: standalone, Policy: options,
		Kernel: w.kernel, Links: w, Connections: w, Foreign: w.foreign,
		Log: slog.New(slog.DiscardHandler), Metrics: w.metrics, Clock: clock.RealClock{},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	lead := make(chan *registry.Registry, 1)
	lead <- reg
	go func() { done <- w.Run(ctx, lead) }()
	synctest.Wait()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return w
}

// metric returns the value of a counter or gauge without labels.
func (w *world) metric(t *testing.T, name string) float64 {
	t.Helper()
	families, err := w.metrics.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if m := f.GetMetric(); f.GetName() == name && len(m) == 1 {
			return m[0].GetGauge().GetValue() + m[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func attachment(id, pod string, ip string) attach.Attachment {
	return attach.Attachment{
		Network: "net", Key: attach.Key{ContainerID: id, IfName: "eth0"}, Pod: attach.PodRef{Namespace: "ns", Name: pod, UID: "uid-" + pod},
		IPs: []netip.Addr{netip.MustParseAddr(ip)}, HostLink: attach.HostLink{Name: "veth-" + id, Index: 7},
	}
}

func pod(name, node string, ips ...string) cluster.Change {
	p := &cluster.Pod{Namespace: "ns", Name: name, UID: "uid-" + name, Node: node, Labels: map[string]string{"app": name}}
	for _, ip := range ips {
		p.IPs = append(p.IPs, netip.MustParseAddr(ip))
	}
	return cluster.Change{Key: p.Key(), Object: p}
}

func denyAll(name string) cluster.Change {
	p := &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Ingress", "Egress"}}}
	return cluster.Change{Key: p.Key(), Object: p}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

var ip1 = netip.MustParseAddr("10.0.0.1")

// TestAttach holds the order of an ADD: closed, former connections forgotten, then opened as policies say, then the answer.
func TestAttach(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), denyAll("deny"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]bool{true}, w.forgotten); diff != "" {
			t.Errorf("connections were forgotten while the address was open: %s", diff)
		}
		if diff := cmp.Diff([]int{0}, w.linked); diff != "" {
			t.Errorf("closing took more than elements: %s", diff)
		}
		if n := len(policy.Links(w.kernel.Ruleset())); n != 1 {
			t.Errorf("%d links have chains", n)
		}
		id := policy.ID("attachment", "c1", "eth0")
		if v, _ := w.element("in4", ip1); v != ruleset.To(ruleset.Jump, "in_"+id) {
			t.Errorf("in4 has %v", v)
		}
		// The same again is answered at once and changes nothing.
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		if len(w.forgotten) != 1 {
			t.Errorf("a repeated ADD forgot connections again")
		}
		if _, err := w.Check(t.Context(), attach.Key{ContainerID: "c1", IfName: "eth0"}); err != nil {
			t.Errorf("Check: %v", err)
		}
		if diff := cmp.Diff(NodeStatus{Ready: true, Node: "here", Enforced: 1, Policies: 1, Problems: []string{}}, w.NodeStatus()); diff != "" {
			t.Errorf("status (-want +got):\n%s", diff)
		}
		want := []PolicyStatus{{Namespace: "ns", Name: "deny", Pods: []string{"ns/a"}}}
		if diff := cmp.Diff(want, w.Policies()); diff != "" {
			t.Errorf("policies (-want +got):\n%s", diff)
		}
	})
}

// TestAttachAmongOthers holds that an ADD is answered when its own pod is open, though others come all the time.
func TestAttachAmongOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Synced()
		const forgetting, others = 5 * time.Millisecond, 50
		var done sync.WaitGroup
		n := 0
		w.meanwhile = func() {
			if n++; n <= others {
				id, ip := fmt.Sprint("c", n), fmt.Sprint("10.0.1.", n)
				done.Go(func() {
					if err := w.Attach(within(t, time.Second), attachment(id, id, ip)); err != nil {
						t.Errorf("Attach %s: %v", id, err)
					}
				})
			}
			time.Sleep(forgetting)
		}
		begin := time.Now()
		if err := w.Attach(within(t, time.Second), attachment("first", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > 3*forgetting {
			t.Errorf("the first ADD was answered after %v, a Forget takes %v", took, forgetting)
		}
		done.Wait()
		if n <= others {
			t.Errorf("only %d others came", n)
		}
	})
}

// TestAttachOwnNodeAllowed holds that the link is closed from the start where no verdict map is between a pod and its node.
func TestAttachOwnNodeAllowed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := startAs(t, false, nil, policy.Options{Table: "podwall", AllowOwnNode: true})
		w.Apply(pod("a", "here"), denyAll("deny"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]int{1}, w.linked); diff != "" {
			t.Errorf("links that were closed: %s", diff)
		}
	})
}

// TestUnknownPod holds that a pod that is not known in time stays closed, says why, and opens when it becomes known.
func TestUnknownPod(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		object cluster.Change
	}{
		{"no object", pod("other", "here")},
		{"other node", pod("a", "there")},
		{"other UID", func() cluster.Change {
			c := pod("a", "here")
			c.Object.(*cluster.Pod).UID = "recreated"
			return c
		}()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := start(t, false, nil)
				w.Apply(tt.object)
				w.Synced()
				a := attachment("c1", "a", "10.0.0.1")
				if err := w.Attach(within(t, time.Second), a); !errors.Is(err, ErrNotReady) {
					t.Fatalf("Attach: %v, want ErrNotReady", err)
				}
				if v, _ := w.element("in4", ip1); v != policy.Quarantined {
					t.Errorf("the pod is not closed: %v", v)
				}
				if n := len(policy.Links(w.kernel.Ruleset())); n != 1 {
					t.Errorf("%d links are closed", n)
				}
				if _, err := w.Check(t.Context(), a.Key); !errors.Is(err, ErrNotReady) {
					t.Errorf("Check: %v, want ErrNotReady", err)
				}
				w.Apply(pod("a", "here"))
				synctest.Wait()
				if v, closed := w.element("in4", ip1); closed {
					t.Errorf("a known pod without policies is in the map: %v", v)
				}
				if _, err := w.Check(t.Context(), a.Key); err != nil {
					t.Errorf("Check: %v", err)
				}
			})
		})
	}
}

// TestStaticPod holds that a static pod is known by the UID that its runtime passes, which is in an annotation.
func TestStaticPod(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		c := pod("a", "here")
		c.Object.(*cluster.Pod).MirrorUID = "config-hash"
		w.Apply(c)
		w.Synced()
		a := attachment("c1", "a", "10.0.0.1")
		a.Pod.UID = "config-hash"
		if err := w.Attach(within(t, time.Second), a); err != nil {
			t.Error(err)
		}
		b := attachment("c2", "a", "10.0.0.2")
		b.Pod.UID = ""
		if err := w.Attach(within(t, time.Second), b); err != nil {
			t.Errorf("without a UID: %v", err)
		}
	})
}

// TestDetach holds that DEL closes the pod for as long as its veth is there, and that the end of the veth ends the registration.
func TestDetach(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Synced()
		a := attachment("c1", "a", "10.0.0.1")
		if err := w.Attach(within(t, time.Second), a); err != nil {
			t.Fatal(err)
		}
		for range 2 { // DEL may come twice
			if err := w.Detach(within(t, time.Second), a.Key); err != nil {
				t.Fatal(err)
			}
			if v, _ := w.element("eg4", ip1); v != policy.Quarantined {
				t.Fatalf("a deleted pod is not closed: %v", v)
			}
		}
		if diff := cmp.Diff([]bool{true, true}, w.forgotten); diff != "" {
			t.Errorf("forgotten while closed (-want +got):\n%s", diff)
		}
		if _, err := w.Check(t.Context(), a.Key); !errors.Is(err, ErrUnknown) {
			t.Errorf("Check: %v, want ErrUnknown", err)
		}
		w.mu.Lock()
		w.gone["veth-c1"] = true
		w.mu.Unlock()
		w.LinkGone(0)
		synctest.Wait()
		if _, ok := w.element("eg4", ip1); ok || len(w.registry.Entries()) != 0 {
			t.Errorf("registration outlives its link: %v", w.registry.Entries())
		}
	})
}

// TestLinkGone holds that the end of a link ends its attachment, that nothing else is looked at for that, and nothing for any other event.
func TestLinkGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Synced()
		for i, id := range []string{"c1", "c2", "c3"} {
			a := attachment(id, id, "10.0.0."+strconv.Itoa(i+1))
			a.HostLink.Index = i + 1
			if err := w.Attach(within(t, time.Second), a); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Detach(within(t, time.Second), attachment("c3", "", "10.0.0.3").Key); err != nil {
			t.Fatal(err)
		}
		looked := func() []string {
			time.Sleep(2 * retryFirst)
			synctest.Wait()
			w.mu.Lock()
			defer w.mu.Unlock()
			list := w.looked
			w.looked = nil
			return list
		}
		looked()
		w.Apply(denyAll("deny"), pod("remote", "there", "10.0.9.9"))
		if list := looked(); len(list) > 0 {
			t.Errorf("for other events %v was looked at", list)
		}
		w.mu.Lock()
		w.gone["veth-c2"], w.gone["netlink"] = true, true
		w.mu.Unlock()
		w.LinkGone(2)
		synctest.Wait()
		w.mu.Lock()
		w.gone["netlink"] = false // the first look has failed
		w.mu.Unlock()
		for _, name := range looked() {
			if name != "veth-c2" {
				t.Errorf("%s was looked at when veth-c2 had gone", name)
			}
		}
		if _, ok := w.registry.Get(attachment("c2", "", "10.0.0.2").Key); ok || len(w.registry.Entries()) != 2 {
			t.Errorf("the registry has %v", w.registry.Entries())
		}
	})
}

// TestLostDEL holds that an attachment whose link has gone without a DEL is found by the sweep.
func TestLostDEL(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		w.gone["veth-c1"] = true
		w.mu.Unlock()
		time.Sleep(sweepEvery + time.Second) // the bubble's clock
		synctest.Wait()
		if n := len(w.registry.Entries()); n != 0 {
			t.Errorf("%d registrations left", n)
		}
		if !slices.Contains(w.forgets, "10.0.0.1") {
			t.Error("its connections were not forgotten")
		}
	})
}

// TestReusedAddress holds that the newest ADD owns an address, and that a late DEL of its former owner takes nothing from it.
func TestReusedAddress(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Apply(denyAll("deny"))
		w.Synced()
		old, young := attachment("old", "a", "10.0.0.1"), attachment("young", "b", "10.0.0.1")
		for _, a := range []attach.Attachment{old, young} {
			if err := w.Attach(within(t, time.Second), a); err != nil {
				t.Fatal(err)
			}
		}
		if p := w.NodeStatus().Problems; len(p) != 1 || !strings.Contains(p[0], "Pod ns/a: its address 10.0.0.1 was given to ns/b") {
			t.Errorf("problems: %v", p)
		}
		forgets := len(w.forgets)
		if err := w.Detach(within(t, time.Second), old.Key); err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		w.gone["veth-old"] = true
		w.mu.Unlock()
		w.LinkGone(0)
		synctest.Wait()
		want := ruleset.To(ruleset.Jump, "in_"+policy.ID("attachment", "young", "eth0"))
		if v, _ := w.element("in4", ip1); v != want {
			t.Errorf("in4 has %v, want %v", v, want)
		}
		if len(w.forgets) != forgets {
			t.Errorf("the new owner's connections were cut by the old DEL: %v", w.forgets[forgets:])
		}
	})
}

// TestGC holds that GC touches its own network only.
func TestGC(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Synced()
		a, b, c := attachment("a", "a", "10.0.0.1"), attachment("b", "b", "10.0.0.2"), attachment("c", "c", "10.0.0.3")
		c.Network = "other"
		for _, x := range []attach.Attachment{a, b, c} {
			if err := w.Attach(within(t, time.Second), x); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.GC(within(t, time.Second), "net", []attach.Key{a.Key}); err != nil {
			t.Fatal(err)
		}
		for _, x := range []attach.Attachment{a, b, c} {
			e, _ := w.registry.Get(x.Key)
			if want := x.ContainerID == "b"; e.Detached != want {
				t.Errorf("%s detached: %v, want %v", x.ContainerID, e.Detached, want)
			}
		}
	})
}

// TestUnsynced holds that nothing is written, and nobody answered, before all objects are known.
func TestUnsynced(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"))
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); !errors.Is(err, ErrNotReady) {
			t.Errorf("Attach: %v, want ErrNotReady", err)
		}
		if err := w.Status(t.Context()); !errors.Is(err, ErrNotReady) {
			t.Errorf("Status: %v, want ErrNotReady", err)
		}
		if err := w.WaitReady(within(t, time.Second)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("WaitReady: %v", err)
		}
		if rs := w.kernel.Ruleset(); len(rs) != 0 {
			t.Errorf("the kernel was written to:\n%s", rs)
		}
		w.Synced()
		if err := w.WaitReady(within(t, time.Second)); err != nil {
			t.Errorf("WaitReady: %v", err)
		}
		if err := w.Status(t.Context()); err != nil {
			t.Errorf("Status: %v", err)
		}
	})
}

// TestRestart holds that a new daemon adopts tables and registrations: nothing closes, no connection is forgotten; an ADD that
// the old daemon had not finished starts over.
func TestRestart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first := start(t, false, nil)
		first.Apply(pod("a", "here"), denyAll("deny"))
		first.Synced()
		if err := first.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		if err := first.Attach(within(t, time.Second), attachment("c2", "b", "10.0.0.2")); !errors.Is(err, ErrNotReady) {
			t.Fatalf("Attach: %v, want ErrNotReady", err)
		}
		before := first.kernel.Ruleset().String()

		second := start(t, false, first)
		synctest.Wait()
		if diff := cmp.Diff(before, second.kernel.Ruleset().String()); diff != "" {
			t.Errorf("the kernel changed before the objects were known:\n%s", diff)
		}
		second.Apply(pod("a", "here"), denyAll("deny"), pod("b", "here"))
		second.Synced()
		synctest.Wait()
		if diff := cmp.Diff([]string{"10.0.0.2"}, second.forgets); diff != "" {
			t.Errorf("forgotten (-want +got):\n%s", diff)
		}
		for _, p := range second.Pods() {
			if p.State != StateEnforced {
				t.Errorf("%s/%s is %s: %s", p.Namespace, p.Name, p.State, p.Reason)
			}
		}
	})
}

// TestRestartWithoutTables holds who goes on where it was when a daemon finds the tables gone: those whose ADD was finished, and
// that are open in the first commit. The connections that were made meanwhile and are denied are ended.
func TestRestartWithoutTables(t *testing.T) {
	t.Parallel()
	cut, keep := policy.Options{Table: "podwall", Cut: true}, policy.Options{Table: "podwall"}
	friend, stranger := flow("10.0.0.2:1", "10.0.0.1:80"), flow("10.0.0.3:1", "10.0.0.1:80")
	objects := []cluster.Change{pod("a", "here"), pod("friend", "there", "10.0.0.2"), pod("stranger", "there", "10.0.0.3"), allowFrom("allow", "friend")}
	for _, tt := range []struct {
		name              string
		options           policy.Options
		meanwhile         func(t *testing.T, w *world)
		known             []cluster.Change // to the next daemon
		forgets, pickedUp []string
		flows             []conntrack.Flow
	}{
		{"finished", cut, nil, objects, nil, []string{"10.0.0.1"}, []conntrack.Flow{friend}},
		{"and a daemon of --established=keep", keep, nil, objects, []string{"10.0.0.1"}, nil, []conntrack.Flow{friend, stranger}},
		{"object gone", cut, nil, objects[1:], []string{"10.0.0.1"}, nil, []conntrack.Flow{friend, stranger}},
		{"deleted meanwhile", cut, func(t *testing.T, w *world) {
			reg, _, err := registry.Open(w.dir)
			if err == nil {
				_, _, err = reg.Detach(attachment("c1", "a", "10.0.0.1").Key)
			}
			if err != nil {
				t.Fatal(err)
			}
		}, objects, []string{"10.0.0.1"}, nil, []conntrack.Flow{friend, stranger}},
		{"a file of an older version", cut, func(t *testing.T, w *world) {
			files, err := filepath.Glob(filepath.Join(w.dir, "*"))
			if err != nil || len(files) != 1 {
				t.Fatal(files, err)
			}
			text, err := os.ReadFile(files[0])
			if err != nil {
				t.Fatal(err)
			}
			older := strings.Replace(string(text), `,"opened":true`, "", 1)
			if older == string(text) {
				t.Fatalf("%s is not marked", text)
			}
			if err := os.WriteFile(files[0], []byte(older), 0o600); err != nil {
				t.Fatal(err)
			}
		}, objects, []string{"10.0.0.1"}, nil, []conntrack.Flow{friend}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				first := startAs(t, false, nil, cut)
				first.Apply(objects...)
				first.Synced()
				if err := first.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
					t.Fatal(err)
				}
				synctest.Wait() // the mark does not hold up the ADD
				first.change(t, first.flush(), ruleset.Op{Kind: ruleset.DelTable, Table: first.tables()[1]})
				if tt.meanwhile != nil {
					tt.meanwhile(t, first)
				}
				next := startAs(t, false, first, tt.options)
				next.flowsMu.Lock()
				next.flows = []conntrack.Flow{friend, stranger} // the fake's Forget deletes none
				next.flowsMu.Unlock()
				next.Apply(tt.known...)
				next.Synced()
				synctest.Wait()
				time.Sleep(lookAgain) // who starts over is looked at once more
				synctest.Wait()
				if diff := cmp.Diff(tt.forgets, next.forgets); diff != "" {
					t.Errorf("forgotten (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(tt.pickedUp, next.pickedUp); diff != "" {
					t.Errorf("picked up and forgotten (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(tt.flows, next.left(), cmp.Comparer(func(a, b conntrack.Flow) bool { return a == b })); diff != "" {
					t.Errorf("connections left (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// TestRestartMarksOpened holds that a daemon that finds an attachment open, as one of an older version has left it, marks it.
func TestRestartMarksOpened(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first := enforcing(t)
		key := attachment("c1", "a", "10.0.0.1").Key
		opened := func(want bool) {
			t.Helper()
			reg, _, err := registry.Open(first.dir)
			if err != nil {
				t.Fatal(err)
			}
			if e, ok := reg.Get(key); !ok || e.Opened != want {
				t.Errorf("the file says %+v, want opened %v", e, want)
			}
		}
		synctest.Wait()
		opened(true)
		files, err := filepath.Glob(filepath.Join(first.dir, "*"))
		if err != nil || len(files) != 1 {
			t.Fatal(files, err)
		}
		text, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(files[0], []byte(strings.Replace(string(text), `,"opened":true`, "", 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		opened(false)
		next := start(t, true, first)
		next.Apply(denyAll("deny"))
		next.Synced()
		synctest.Wait()
		opened(true)
		if len(next.forgets)+len(next.pickedUp) != 0 {
			t.Errorf("forgotten: %v, %v", next.forgets, next.pickedUp)
		}
	})
}

// TestAddressComesBack holds that who gets an address back from a later ADD that has ended does not get its connections.
func TestAddressComesBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Apply(denyAll("deny"))
		w.Synced()
		for _, a := range []attach.Attachment{attachment("old", "a", "10.0.0.1"), attachment("young", "b", "10.0.0.1")} {
			if err := w.Attach(within(t, time.Second), a); err != nil {
				t.Fatal(err)
			}
		}
		forgets := len(w.forgets)
		w.mu.Lock()
		w.gone["veth-young"] = true
		w.mu.Unlock()
		w.kernel.FailNext(unix.EPERM)
		w.LinkGone(0)
		time.Sleep(retryFirst / 2)
		synctest.Wait()
		if e, ok := w.registry.Get(attachment("old", "a", "10.0.0.1").Key); !ok || e.Opened {
			t.Errorf("while it starts over the registry says %+v, %v", e, ok)
		}
		time.Sleep(2 * retryFirst)
		synctest.Wait()
		if diff := cmp.Diff([]string{"10.0.0.1"}, w.forgets[forgets:]); diff != "" || !w.forgotten[len(w.forgotten)-1] {
			t.Errorf("forgotten (-want +got), closed %v:\n%s", w.forgotten, diff)
		}
		want := ruleset.To(ruleset.Jump, "in_"+policy.ID("attachment", "old", "eth0"))
		if v, _ := w.element("in4", ip1); v != want {
			t.Errorf("in4 has %v, want %v", v, want)
		}
	})
}

// TestAddressComesBackAtStart holds the same for a daemon that ended before it had closed the address.
func TestAddressComesBackAtStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first := start(t, true, nil)
		first.Apply(denyAll("deny"))
		first.Synced()
		for _, a := range []attach.Attachment{attachment("old", "a", "10.0.0.1"), attachment("young", "b", "10.0.0.1"), attachment("other", "c", "10.0.0.3")} {
			if err := first.Attach(within(t, time.Second), a); err != nil {
				t.Fatal(err)
			}
		}
		first.mu.Lock()
		first.gone["veth-young"] = true
		first.mu.Unlock()
		first.kernel.FailNext(unix.EPERM)
		first.LinkGone(0)
		synctest.Wait()

		second := start(t, true, first)
		second.Apply(denyAll("deny"))
		second.Synced()
		synctest.Wait()
		if diff := cmp.Diff([]string{"10.0.0.1"}, second.forgets); diff != "" || !second.forgotten[0] {
			t.Errorf("forgotten (-want +got), closed %v:\n%s", second.forgotten, diff)
		}
	})
}

// TestCommitFails holds that a refused transaction is repeated from what the kernel really has, and that those who wait hear why.
func TestCommitFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), denyAll("deny"))
		w.Synced()
		synctest.Wait()
		w.kernel.FailNext(unix.EPERM)
		if err := w.Attach(within(t, time.Millisecond), attachment("c1", "a", "10.0.0.1")); !errors.Is(err, ErrNotReady) {
			t.Errorf("Attach: %v, want ErrNotReady", err)
		}
		if s := w.NodeStatus(); s.Error == "" {
			t.Error("the status does not show the error")
		}
		time.Sleep(retryFirst + time.Second)
		synctest.Wait()
		if s := w.NodeStatus(); s.Error != "" || s.Enforced != 1 {
			t.Errorf("not healed: %+v", s)
		}

		// Somebody else deletes the table.
		err := w.kernel.Commit(t.Context(), ruleset.Delta{Apply: []ruleset.Op{{Kind: ruleset.DelTable, Table: w.tables()[0]}}})
		if err != nil {
			t.Fatal(err)
		}
		w.Apply(denyAll("another"), pod("a", "here", "10.0.0.9"))
		if err := w.Attach(within(t, 10*time.Second), attachment("c2", "a", "10.0.0.2")); err != nil {
			t.Errorf("Attach: %v", err)
		}
		if _, ok := w.element("in4", ip1); !ok {
			t.Error("the table was not restored")
		}
	})
}

// TestIdentity holds who a pod without K8S_POD_* is.
func TestIdentity(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		nameless := attachment("c1", "", "10.0.0.1")
		nameless.Pod = attach.PodRef{}

		alone := start(t, true, nil)
		alone.Synced()
		if err := alone.Attach(within(t, time.Second), nameless); err != nil {
			t.Fatal(err)
		}
		if got := alone.Pods()[0]; got.Namespace != "default" || got.Name != "c1" {
			t.Errorf("it is %s/%s, want default/c1", got.Namespace, got.Name)
		}
		api := start(t, false, nil)
		api.Synced()
		if err := api.Attach(within(t, time.Second), nameless); !errors.Is(err, ErrIdentity) {
			t.Errorf("with an API server: %v, want ErrIdentity", err)
		}
	})
}

// TestRefused holds that an attachment that cannot be enforced is refused and not registered.
func TestRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Synced()
		w.gone["veth-c1"] = true
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); !errors.Is(err, ErrNoHostLink) {
			t.Errorf("link that does not exist: %v", err)
		}
		w.hidden = true
		port := attachment("c2", "a", "10.0.0.1")
		port.HostLink.Name = "port"
		if err := w.Attach(within(t, time.Second), port); !errors.Is(err, ErrRefused) {
			t.Errorf("bridge whose traffic cannot be seen: %v", err)
		}
		broken := attachment("c3", "a", "10.0.0.1")
		broken.HostLink.Name = "broken"
		if err := w.Attach(within(t, time.Second), broken); err == nil {
			t.Error("a link that cannot be looked up was accepted")
		}
		if n := len(w.registry.Entries()); n != 0 {
			t.Errorf("%d registrations", n)
		}
	})
}

// TestHiddenBridge holds that a pod is not called enforced while its bridge hides its traffic, and is again afterwards.
func TestHiddenBridge(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Apply(denyAll("deny"))
		w.Synced()
		port := attachment("c1", "a", "10.0.0.1")
		port.HostLink.Name = "port"
		for _, a := range []attach.Attachment{port, attachment("c2", "b", "10.0.0.2")} {
			if err := w.Attach(within(t, time.Second), a); err != nil {
				t.Fatal(err)
			}
		}
		before := w.kernel.Ruleset().String()
		for _, tt := range []struct {
			hidden bool
			state  string
			list   []string
		}{
			{true, StateHidden, []string{"Pod ns/a: it is not enforced: modprobe br_netfilter"}},
			{false, StateEnforced, []string{}},
		} {
			w.mu.Lock()
			w.hidden = tt.hidden
			w.mu.Unlock()
			time.Sleep(sweepEvery + retryMost) // the bubble's clock
			synctest.Wait()
			states := map[string]string{}
			for _, p := range w.Pods() {
				states[p.Name] = p.State
			}
			if diff := cmp.Diff(map[string]string{"a": tt.state, "b": StateEnforced}, states); diff != "" {
				t.Errorf("hidden %v: states (-want +got):\n%s", tt.hidden, diff)
			}
			s := w.NodeStatus()
			if diff := cmp.Diff(tt.list, s.Problems); diff != "" {
				t.Errorf("hidden %v: problems (-want +got):\n%s", tt.hidden, diff)
			}
			if got, want := w.metric(t, "podwall_problems"), float64(len(tt.list)); got != want {
				t.Errorf("hidden %v: podwall_problems is %v, want %v", tt.hidden, got, want)
			}
			if _, err := w.Check(t.Context(), port.Key); (err != nil) != tt.hidden {
				t.Errorf("hidden %v: CHECK: %v", tt.hidden, err)
			}
		}
		if w.metric(t, "podwall_hidden_bridges_total") == 0 {
			t.Error("podwall_hidden_bridges_total is 0")
		}
		if diff := cmp.Diff(before, w.kernel.Ruleset().String()); diff != "" {
			t.Errorf("the rules have changed:\n%s", diff)
		}
	})
}

// TestAdopt holds that pods which never passed through the plugin are enforced by the addresses that the API reports, and that
// an object which outlives its pod does not take the address of an attachment.
func TestAdopt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(denyAll("deny"), pod("early", "here", "10.0.0.5"), pod("stale", "here", "10.0.0.1"), pod("remote", "there", "10.0.9.9"), pod("a", "here"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		if _, ok := w.element("in4", netip.MustParseAddr("10.0.0.5")); !ok {
			t.Error("a pod that was there before podwall is open")
		}
		if _, ok := w.element("in4", netip.MustParseAddr("10.0.9.9")); ok {
			t.Error("a pod of another node is enforced")
		}
		want := ruleset.To(ruleset.Jump, "in_"+policy.ID("attachment", "c1", "eth0"))
		if v, _ := w.element("in4", ip1); v != want {
			t.Errorf("in4 has %v, want %v", v, want)
		}
		if s := w.NodeStatus(); s.Adopted != 1 || s.Enforced != 1 {
			t.Errorf("status: %+v", s)
		}
	})
}

// TestGoneObject holds that a pod whose object is force-deleted keeps its isolation until DEL.
func TestGoneObject(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), denyAll("deny"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		w.Apply(cluster.Change{Key: pod("a", "here").Key})
		synctest.Wait()
		if s := w.NodeStatus(); s.Enforced != 1 {
			t.Errorf("status: %+v", s)
		}
		if _, ok := w.element("eg4", ip1); !ok {
			t.Error("the pod is open")
		}
	})
}

// TestStandby holds that a loop that is not the writer keeps up with the cluster and writes nothing, and takes over at once.
func TestStandby(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{kernel: nft.NewFake(), gone: map[string]bool{}}
		w.Loop = New(Config{
			NodeName: "here", Policy: policy.Options{Table: "podwall"}, Kernel: w.kernel, Links: w, Connections: w,
			Log: slog.New(slog.DiscardHandler), Metrics: metrics.New(func() float64 { return 0 }), Clock: clock.RealClock{},
		})
		lead := make(chan *registry.Registry)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx, lead) }()
		w.Apply(pod("a", "here", "10.0.0.1"), denyAll("deny"))
		w.Synced()
		synctest.Wait()
		if rs := w.kernel.Ruleset(); len(rs) != 0 || w.Status(t.Context()) == nil {
			t.Errorf("a standby wrote to the kernel or calls itself ready:\n%s", rs)
		}
		if !w.Complete() || len(w.queue) != 0 {
			t.Errorf("a standby does not keep up: complete %v, %d changes queued", w.Complete(), len(w.queue))
		}
		reg, _, err := registry.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		lead <- reg
		synctest.Wait()
		if _, ok := w.element("in4", ip1); !ok {
			t.Error("the new writer did not take over")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestStandDown holds that an uninstalled node has no tables and takes no pods, and that all comes back as it was.
func TestStandDown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Apply(denyAll("deny"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		before := w.kernel.Ruleset().String()
		w.StandDown(true)
		synctest.Wait()
		if rs := w.kernel.Ruleset(); len(rs) != 0 || w.Status(t.Context()) == nil {
			t.Errorf("tables are left, or the node calls itself ready:\n%s", rs)
		}
		if err := w.Attach(within(t, time.Second), attachment("c2", "b", "10.0.0.2")); !errors.Is(err, ErrRefused) {
			t.Errorf("Attach: %v, want ErrRefused", err)
		}
		if err := w.Detach(within(t, time.Second), attachment("c9", "x", "10.0.0.9").Key); err != nil {
			t.Errorf("Detach: %v", err)
		}
		w.StandDown(false)
		synctest.Wait()
		if diff := cmp.Diff(before, w.kernel.Ruleset().String()); diff != "" {
			t.Errorf("tables after taking up the work again (-before +after):\n%s", diff)
		}
	})
}

// TestDrift holds that what somebody else did to the tables is mended by the next sweep, without any event.
func TestDrift(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, true, nil)
		w.Apply(denyAll("deny"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		before := w.kernel.Ruleset().String()
		table := w.tables()[0]
		in4 := w.kernel.Ruleset().Table(table).Sets["in4"]
		for name, foreign := range map[string]ruleset.Op{
			"flush":   {Kind: ruleset.DelTable, Table: table},
			"element": {Kind: ruleset.DelElements, Table: table, Set: in4, Elements: in4.Elements},
			"chain":   {Kind: ruleset.FlushChain, Table: table, Chain: &ruleset.Chain{Name: "quarantine"}},
		} {
			if err := w.kernel.Commit(t.Context(), ruleset.Delta{Apply: []ruleset.Op{foreign}}); err != nil {
				t.Fatal(name, err)
			}
			if w.kernel.Ruleset().String() == before {
				t.Fatalf("%s changed nothing", name)
			}
			time.Sleep(sweepEvery + time.Second) // the bubble's clock
			synctest.Wait()
			if diff := cmp.Diff(before, w.kernel.Ruleset().String()); diff != "" {
				t.Errorf("%s was not mended (-before +after):\n%s", name, diff)
			}
		}
	})
}

// TestLostRegistration holds that a pod whose file is damaged stays closed after a restart, until its veth ends or it is added
// again; one that the API knows by its address stays enforced.
func TestLostRegistration(t *testing.T) {
	t.Parallel()
	for _, standalone := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			first := start(t, standalone, nil)
			first.Apply(denyAll("deny"), pod("a", "here"), pod("b", "here"))
			first.Synced()
			for id, name := range map[string]string{"c1": "a", "c2": "b"} {
				a := attachment(id, name, "10.0.0."+id[1:])
				if err := first.Attach(within(t, time.Second), a); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait() // the mark of its opening does not hold up the ADD
			file := filepath.Join(first.dir, "c1-eth0.2.json")
			if err := os.Truncate(file, 40); err != nil {
				t.Fatal(err)
			}

			second := start(t, standalone, first)
			want, known := policy.Quarantined, pod("a", "here")
			if !standalone {
				known = pod("a", "here", "10.0.0.1")
				want = ruleset.To(ruleset.Jump, "in_"+policy.ID("attachment", "c1", "eth0"))
			}
			second.Apply(denyAll("deny"), known, pod("b", "here"))
			second.Synced()
			synctest.Wait()
			if v, _ := second.element("in4", ip1); v != want {
				t.Errorf("standalone %v: in4 has %v, want %v", standalone, v, want)
			}
			if _, ok := policy.Links(second.kernel.Ruleset())[policy.ID("attachment", "c1", "eth0")]; !ok {
				t.Error("the veth is not guarded any more")
			}
			s := second.NodeStatus()
			if s.Enforced != 1 || s.Detached+s.Adopted != 1 {
				t.Errorf("status: %+v", s)
			}
			second.mu.Lock()
			second.gone["veth-c1"] = true
			second.mu.Unlock()
			second.LinkGone(0)
			synctest.Wait()
			if _, ok := policy.Links(second.kernel.Ruleset())[policy.ID("attachment", "c1", "eth0")]; ok {
				t.Error("its chain outlives its veth")
			}
		})
	}
}

// TestStopping holds that an ADD that waits does not keep a stopping daemon, nor its successor, waiting.
func TestStopping(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{kernel: nft.NewFake(), gone: map[string]bool{}, dir: t.TempDir()}
		w.Loop = New(Config{
			NodeName: "here", Policy: policy.Options{Table: "podwall"}, Kernel: w.kernel, Links: w, Connections: w,
			Log: slog.New(slog.DiscardHandler), Metrics: metrics.New(func() float64 { return 0 }), Clock: clock.RealClock{},
		})
		reg, _, err := registry.Open(w.dir)
		if err != nil {
			t.Fatal(err)
		}
		lead := make(chan *registry.Registry, 1)
		lead <- reg
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = w.Run(ctx, lead) }()
		w.Synced()
		synctest.Wait()
		time.AfterFunc(time.Second, cancel)
		begin := time.Now()
		if err := w.Attach(within(t, time.Minute), attachment("c1", "a", "10.0.0.1")); !errors.Is(err, ErrNotReady) {
			t.Errorf("Attach: %v, want ErrNotReady", err)
		}
		if waited := time.Since(begin); waited != time.Second {
			t.Errorf("it waited for %v", waited)
		}
	})
}

// hooked calls before each transaction with chains what the test wants.
type hooked struct {
	*nft.Fake
	chains func() error
}

func (k *hooked) Commit(ctx context.Context, d ruleset.Delta) error {
	if k.chains != nil && slices.ContainsFunc(slices.Concat(d.Prepare, d.Apply), func(op ruleset.Op) bool { return op.Chain != nil }) {
		if err := k.chains(); err != nil {
			return err
		}
	}
	return k.Fake.Commit(ctx, d)
}

// startHooked starts a loop that knows one pod of its node, and a policy that denies everything.
func startHooked(t *testing.T, name string) (*world, *hooked) {
	t.Helper()
	w := &world{kernel: nft.NewFake(), gone: map[string]bool{}, metrics: metrics.New(func() float64 { return 0 })}
	k := &hooked{Fake: w.kernel}
	runWorld(t, w, Config{Policy: policy.Options{Table: "podwall", Cut: true}, Kernel: k, Links: w, Connections: w, Log: slog.New(slog.DiscardHandler)})
	w.Apply(pod(name, "here"), denyAll("deny"))
	w.Synced()
	synctest.Wait()
	return w, k
}

// TestDetachWhileOpening holds that DEL does not succeed before the pod is closed: also not if it comes while the pod is being opened for the
// first time, and nothing has been shown of it yet.
func TestDetachWhileOpening(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, k := startHooked(t, "a")
		key := attach.Key{ContainerID: "c1", IfName: "eth0"}
		var early error
		k.chains = func() error {
			k.chains = nil
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			early = w.Detach(ctx, key)
			return nil
		}
		_ = w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1"))
		if !errors.Is(early, ErrNotReady) {
			t.Errorf("while it is being opened: %v", early)
		}
		if err := w.Detach(within(t, time.Second), key); err != nil {
			t.Error(err)
		}
		if v, _ := w.element("in4", ip1); v != policy.Quarantined {
			t.Errorf("the element is %v", v)
		}
	})
}

// TestDetachBesideFailing holds that a DEL is answered although the ADD that came with it cannot be served.
func TestDetachBesideFailing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, k := startHooked(t, "b")
		if err := w.Attach(within(t, time.Second), attachment("c1", "unknown", "10.0.0.1")); !errors.Is(err, ErrNotReady) {
			t.Fatalf("a pod that is not known: %v", err)
		}
		k.chains = func() error { return unix.ENOBUFS }
		if _, _, err := w.registry.Put(attachment("c2", "b", "10.0.0.2")); err != nil { // seen in one pass with the DEL
			t.Fatal(err)
		}
		if err := w.Detach(within(t, 5*time.Second), attach.Key{ContainerID: "c1", IfName: "eth0"}); err != nil {
			t.Error(err)
		}
	})
}
