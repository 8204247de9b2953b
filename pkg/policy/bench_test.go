package policy

import (
	"fmt"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// local is the namespace of the 250 pods of the node, all of which 50 policies select.
const local = "local"

// benchInput is a node in a cluster of many pods, where each namespace has ten policies with a peer each; those of local have
// a peer of the other namespaces each.
func benchInput(pods, namespaces int) Input {
	in := Input{Model: cluster.NewModel(), Options: Options{Table: "podwall", Cut: true, Log: true}}
	put := func(o cluster.Object) { in.Model.Apply(cluster.Change{Key: o.Key(), Object: o}) }
	app := func(i int) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprint("app", i%10)}}
	}
	port := intstr.FromInt32(8080)
	rules := func(peer networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyIngressRule {
		return []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{peer}, Ports: []networkingv1.NetworkPolicyPort{{Port: &port}}}}
	}
	for n := range namespaces {
		name := fmt.Sprint("ns", n)
		put(&cluster.Namespace{Name: name, Labels: map[string]string{"kubernetes.io/metadata.name": name, "team": fmt.Sprint("team", n%10)}})
		for p := range 10 {
			put(&cluster.Policy{Namespace: name, Name: fmt.Sprint("policy", p), Spec: networkingv1.NetworkPolicySpec{
				PodSelector: *app(p), Ingress: rules(networkingv1.NetworkPolicyPeer{PodSelector: app(p + 1)}),
			}})
		}
	}
	for p := range 50 {
		put(&cluster.Policy{Namespace: local, Name: fmt.Sprint("policy", p), Spec: networkingv1.NetworkPolicySpec{
			Ingress: rules(networkingv1.NetworkPolicyPeer{PodSelector: app(p), NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": fmt.Sprint("team", p/10)}}}),
		}})
	}
	for i := range pods {
		pod := &cluster.Pod{
			Namespace: fmt.Sprint("ns", i%namespaces), Name: fmt.Sprint("pod", i), Labels: map[string]string{"app": fmt.Sprint("app", i/namespaces%10)},
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})},
		}
		if i < 250 {
			pod.Namespace = local
			in.Endpoints = append(in.Endpoints, Endpoint{ID: pod.Name, Name: nameOf(pod), Pod: pod, IPs: pod.IPs, Link: fmt.Sprint("veth", i)})
		}
		put(pod)
	}
	return in
}

// benchSizes are clusters with 250 pods on this node.
var benchSizes = []struct{ pods, namespaces int }{{1_000, 10}, {10_000, 100}, {100_000, 1_000}}

func benchEngine(in Input) *Engine {
	e := NewEngine(in.Options)
	for n := range 10_000 { // those that there are
		if l := in.Model.NamespaceLabels(fmt.Sprint("ns", n)); len(l) > 1 {
			ns := &cluster.Namespace{Name: fmt.Sprint("ns", n), Labels: l}
			e.Apply(cluster.Change{Key: ns.Key(), Object: ns})
		}
	}
	for p := range in.Model.Policies() {
		e.Apply(cluster.Change{Key: p.Key(), Object: p})
	}
	for p := range in.Model.Pods() {
		e.Apply(cluster.Change{Key: p.Key(), Object: p})
	}
	e.SetEndpoints(in.Endpoints)
	e.Delta()
	e.Commit()
	return e
}

func benchName(pods, namespaces int) string {
	return fmt.Sprintf("pods=%d/policies=%d", pods, 10*namespaces)
}

// busy reports the CPU time of an operation, which says more than the clock on a machine that others use too.
func busy(b *testing.B, f func()) {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	b.ReportAllocs()
	before := used()
	for b.Loop() {
		f()
	}
	b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op")
}

// BenchmarkRender is what an event would cost if everything were rendered and compared: the measure of BenchmarkEngine. It is also the
// reference for "load", the first rendering of an Engine.
func BenchmarkRender(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(benchName(size.pods, size.namespaces), func(b *testing.B) {
			in := benchInput(size.pods, size.namespaces)
			before := Render(in).Ruleset
			busy(b, func() { ruleset.Diff(before, Render(in).Ruleset) })
		})
	}
}

// BenchmarkEngine is what one event costs, from the change of the object to the committed difference.
func BenchmarkEngine(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(benchName(size.pods, size.namespaces), func(b *testing.B) { benchEvents(b, benchInput(size.pods, size.namespaces)) })
	}
}

func benchEvents(b *testing.B, in Input) {
	b.Run("load", func(b *testing.B) { busy(b, func() { benchEngine(in) }) })
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	e := benchEngine(in)
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.Logf("the engine keeps %d KiB beside the objects", (after.HeapAlloc-before.HeapAlloc)>>10)
	// each runs an event that has an effect, alternately there and back.
	each := func(name string, event func(odd bool)) {
		b.Run(name, func(b *testing.B) {
			odd := false
			busy(b, func() {
				odd = !odd
				event(odd)
				if e.Delta().Empty() {
					b.Fatal("the event has changed nothing")
				}
				e.Commit()
			})
			if odd { // as it was, for the next
				event(false)
				e.Delta()
				e.Commit()
			}
		})
	}
	peer := &cluster.Pod{Namespace: "ns0", Name: "new", Labels: map[string]string{"app": "app1"}, IPs: []netip.Addr{netip.AddrFrom4([4]byte{11, 1, 1, 1})}}
	other := *peer
	other.Labels = map[string]string{"app": "app2"} // both are peers of a policy of local
	each("peer added or removed", func(odd bool) {
		c := cluster.Change{Key: peer.Key()}
		if odd {
			c.Object = peer
		}
		e.Apply(c)
	})
	each("peer relabelled", func(odd bool) {
		e.Apply(cluster.Change{Key: peer.Key(), Object: map[bool]*cluster.Pod{true: &other, false: peer}[odd]})
	})
	changed := *in.Model.Policy(local, "policy3")
	port := intstr.FromInt32(9090)
	changed.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: changed.Spec.Ingress[0].From, Ports: []networkingv1.NetworkPolicyPort{{Port: &port}}}}
	each("policy changed", func(odd bool) {
		e.Apply(cluster.Change{Key: changed.Key(), Object: map[bool]*cluster.Policy{true: &changed, false: in.Model.Policy(local, "policy3")}[odd]})
	})
	each("policy of the whole namespace added or removed", func(odd bool) {
		p := &cluster.Policy{Namespace: local, Name: "all", Spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{"Egress"}}}
		c := cluster.Change{Key: p.Key()}
		if odd {
			c.Object = p
		}
		e.Apply(c)
	})
	each("endpoint closed or opened", func(odd bool) {
		list := append([]Endpoint(nil), in.Endpoints...)
		if odd {
			list[0].Pod = nil
		}
		e.SetEndpoints(list)
	})
	each("namespace relabelled", func(odd bool) {
		n := &cluster.Namespace{Name: "ns0", Labels: map[string]string{"team": map[bool]string{true: "team1", false: "team0"}[odd]}}
		e.Apply(cluster.Change{Key: n.Key(), Object: n})
	})
}
