package policy

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/ruleset"
)

// TestEngine changes random clusters and compares, after each step, what the engine has with what Render makes from scratch, and its
// differences with those that Diff finds.
func TestEngine(t *testing.T) {
	t.Parallel()
	steps, skipped, changed, tightened := 0, 0, 0, 0
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			steps++
			for range rapid.IntRange(1, 3).Draw(t, "changes") {
				w.step()
			}
			w.engine.SetEndpoints(w.endpoints())
			if choose(w, true, false, false, false) {
				w.beforeNAT = !w.beforeNAT
			}
			w.engine.SetCutBeforeNAT(w.beforeNAT)
			want := Render(w.input())
			delta := w.engine.Delta()
			if d := gocmp.Diff(operations(ruleset.Diff(w.kernel.Ruleset(), want.Ruleset)), operations(delta)); d != "" {
				t.Fatalf("the difference (-Diff of a rendering, +Delta):\n%s", d)
			}
			w.same("what is desired", w.engine.Desired(), want.Ruleset)
			if rapid.IntRange(0, 5).Draw(t, "refused") == 0 {
				skipped++
				continue // the transaction failed: the next one is to make up for it
			}
			if err := w.kernel.Commit(context.Background(), delta); err != nil {
				t.Fatal(err)
			}
			w.engine.Commit()
			if !delta.Empty() {
				changed++
			}
			w.same("what is committed", w.engine.Ruleset(), want.Ruleset)
			w.same("what the differences add up to", w.kernel.Ruleset(), want.Ruleset)
			if d := w.engine.Delta(); !d.Empty() {
				t.Fatalf("there is something left after the commit: %v", operations(d))
			}
			now, late := w.engine.TightenedBy(delta)
			got, all := union(now, late), TightenedBy(delta, want.Ruleset)
			w.vanished(late, delta)
			if d := gocmp.Diff(all, got, gocmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
				t.Fatalf("whom it tightens (-by all rules, +by the engine):\n%s\n%v", d, operations(delta))
			}
			if !all.Empty() {
				tightened++
			}
			if d := gocmp.Diff(want.Problems, w.engine.Problems()); d != "" {
				t.Fatalf("problems (-Render +Engine):\n%s", d)
			}
			endpoints := map[string]Verdicts{}
			for id, ep := range w.engine.endpoints {
				if ep.Pod != nil {
					endpoints[id] = w.engine.Verdicts(id)
				}
			}
			if d := gocmp.Diff(want.Endpoints, endpoints); d != "" {
				t.Fatalf("endpoints (-Render +Engine):\n%s", d)
			}
		}
	})
	if changed < steps/10 || tightened < steps/50 {
		t.Errorf("of %d steps only %d changed something and %d tightened it", steps, changed, tightened)
	}
	t.Logf("%d steps, %d of them not committed, %d changed something, %d tightened it", steps, skipped, changed, tightened)
}

func union(a, b Tightened) Tightened {
	of := func(a, b []netip.Addr) []netip.Addr {
		list := slices.Concat(a, b)
		slices.SortFunc(list, netip.Addr.Compare)
		return slices.Compact(list)
	}
	return Tightened{Egress: of(a.Egress, b.Egress), Ingress: of(a.Ingress, b.Ingress)}
}

// vanished holds that nobody is looked at late but for addresses that no pod has, or an endpoint that has ended.
func (w *world) vanished(late Tightened, d ruleset.Delta) {
	if late.Empty() {
		return
	}
	for _, op := range d.Apply {
		if op.Kind != ruleset.DelElements || op.Set.Map {
			continue
		}
		gone := true
		for elem := range op.Elements {
			if slices.ContainsFunc(w.endpoints(), func(e Endpoint) bool {
				return e.Ended && slices.ContainsFunc(e.IPs, func(ip netip.Addr) bool { return strings.HasPrefix(string(elem), string(ruleset.AddrElem(ip))) })
			}) {
				continue
			}
			for pod := range w.engine.Model().Pods() {
				gone = gone && !slices.ContainsFunc(pod.IPs, func(ip netip.Addr) bool {
					return claims(pod) && strings.HasPrefix(string(elem), string(ruleset.AddrElem(ip)))
				})
			}
		}
		if gone {
			return // it may be for this one
		}
	}
	w.Fatalf("looked at late, but all that lost an element is still there: %v", operations(d))
}

func operations(d ruleset.Delta) []string {
	var list []string
	for stage, ops := range map[string][]ruleset.Op{"prepare": d.Prepare, "apply": d.Apply, "cleanup": d.Cleanup} {
		for _, op := range ops {
			text := stage + " " + op.String()
			if op.Kind == ruleset.AddRules {
				text += fmt.Sprint(op.Chain.Rules)
			}
			list = append(list, text)
		}
	}
	slices.Sort(list)
	return list
}

// world is a small cluster in which everything meets everything.
type world struct {
	*rapid.T
	engine    *Engine
	kernel    *nft.Fake
	places    []*place
	beforeNAT bool
}

// place is where an endpoint can be.
type place struct {
	id, link, bridge string
	there            bool
	brief, ended     bool         // when closed
	pod              *cluster.Pod // nil: closed
	ips              []netip.Addr
}

func newWorld(t *rapid.T) *world {
	w := &world{T: t, kernel: nft.NewFake(), engine: NewEngine(Options{Table: "podwall", Log: true, Cut: rapid.Bool().Draw(t, "cut"), Reject: rapid.Bool().Draw(t, "reject")})}
	for i := range 4 {
		p := &place{id: fmt.Sprint("e", i), link: fmt.Sprint("veth", i)}
		switch i {
		case 1:
			p.bridge = "br0"
		case 2:
			p.link = "" // adopted
		}
		w.places = append(w.places, p)
	}
	for range rapid.SampledFrom([]int{0, 20, 40}).Draw(t, "start") {
		w.step()
	}
	return w
}

func (w *world) input() Input {
	return Input{Model: w.engine.Model(), Endpoints: w.endpoints(), Options: w.engine.options, CutBeforeNAT: w.beforeNAT}
}

func (w *world) endpoints() []Endpoint {
	var list []Endpoint
	taken := map[netip.Addr]bool{}
	for _, p := range w.places {
		if !p.there {
			continue
		}
		e := Endpoint{ID: p.id, Name: "ns/" + p.id, Pod: p.pod, Link: p.link, Bridge: p.bridge, Brief: p.pod == nil && p.brief, Ended: p.pod == nil && p.ended}
		for _, ip := range p.ips {
			if !taken[ip] {
				e.IPs = append(e.IPs, ip)
				taken[ip] = true
			}
		}
		list = append(list, e)
	}
	return list
}

func (w *world) same(what string, got, want ruleset.Ruleset) {
	w.Helper()
	sort := func(rs ruleset.Ruleset) string {
		rs = slices.SortedFunc(slices.Values(rs), func(a, b *ruleset.Table) int { return strings.Compare(string(a.ID.Family), string(b.ID.Family)) })
		return rs.String()
	}
	if d := gocmp.Diff(sort(want), sort(got)); d != "" {
		w.Fatalf("%s (-Render +Engine):\n%s", what, d)
	}
}

func choose[T any](w *world, list ...T) T { return rapid.SampledFrom(list).Draw(w.T, "choice") }

func (w *world) namespace() string { return choose(w, "a", "b", "c") }

func (w *world) labels() map[string]string {
	m := map[string]string{}
	for _, k := range []string{"app", "tier"} {
		if v := choose(w, "", "x", "y", "z"); v != "" {
			m[k] = v
		}
	}
	return m
}

func (w *world) addresses() []netip.Addr {
	var list []netip.Addr
	for range choose(w, 0, 1, 1, 2, 3) {
		i := rapid.IntRange(1, 9).Draw(w.T, "address")
		list = append(list, choose(w, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), netip.AddrFrom16([16]byte{0xfd, 15: byte(i)})))
	}
	return list
}

func (w *world) pod() *cluster.Pod {
	p := &cluster.Pod{
		Namespace: w.namespace(), Name: choose(w, "p", "q", "r", "s"), Labels: w.labels(), IPs: w.addresses(),
		HostNetwork: choose(w, false, false, false, false, true), Terminal: choose(w, false, false, false, true),
		Created: time.Unix(int64(choose(w, 0, 1, 2)), 0),
	}
	for range choose(w, 0, 0, 1, 2) {
		p.Ports = append(p.Ports, cluster.NamedPort{Name: choose(w, "web", "dns"), Protocol: choose(w, cluster.TCP, cluster.UDP), Port: choose[uint16](w, 80, 81)})
	}
	return p
}

func (w *world) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	for range choose(w, 0, 1, 1, 2) {
		op := choose(w, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)
		r := metav1.LabelSelectorRequirement{Key: choose(w, "app", "tier"), Operator: op}
		if op == metav1.LabelSelectorOpIn || op == metav1.LabelSelectorOpNotIn {
			r.Values = rapid.SliceOfN(rapid.SampledFrom([]string{"x", "y", "z"}), 1, 2).Draw(w.T, "values")
		}
		s.MatchExpressions = append(s.MatchExpressions, r)
	}
	return s
}

func (w *world) peer() networkingv1.NetworkPolicyPeer {
	switch choose(w, "pods", "pods", "namespaces", "both", "block", "blocks") {
	case "pods":
		return networkingv1.NetworkPolicyPeer{PodSelector: w.selector()}
	case "namespaces":
		return networkingv1.NetworkPolicyPeer{NamespaceSelector: w.selector()}
	case "both":
		return networkingv1.NetworkPolicyPeer{PodSelector: w.selector(), NamespaceSelector: choose(w, w.selector(), &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": w.namespace()}})}
	case "block":
		return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: choose(w, "10.0.0.0/29", "fd00::/125", "nonsense")}}
	}
	b := &networkingv1.IPBlock{CIDR: choose(w, "10.0.0.0/16", "fd00::/48")}
	for i := range 20 {
		b.Except = append(b.Except, map[string]string{"10.0.0.0/16": fmt.Sprintf("10.0.%d.0/24", 2*i), "fd00::/48": fmt.Sprintf("fd00:0:0:%d::/64", 2*i)}[b.CIDR])
	}
	return networkingv1.NetworkPolicyPeer{IPBlock: b}
}

func (w *world) policy() *cluster.Policy {
	p := &cluster.Policy{Namespace: w.namespace(), Name: choose(w, "one", "two", "three"), Spec: networkingv1.NetworkPolicySpec{PodSelector: *w.selector()}}
	p.Spec.PolicyTypes = choose(w, []networkingv1.PolicyType{"Ingress"}, []networkingv1.PolicyType{"Egress"}, []networkingv1.PolicyType{"Ingress", "Egress"}, nil)
	for range choose(w, 0, 1, 1, 2) {
		var peers []networkingv1.NetworkPolicyPeer
		for range choose(w, 0, 1, 1, 2) {
			peers = append(peers, w.peer())
		}
		var ports []networkingv1.NetworkPolicyPort
		for range choose(w, 0, 1, 1, 2, 12) {
			port := choose(w, intstr.FromInt32(int32(rapid.IntRange(80, 99).Draw(w.T, "port"))), intstr.FromString("web"), intstr.FromString("dns"))
			np := networkingv1.NetworkPolicyPort{Port: &port}
			if end := port.IntVal + 5; port.Type == 0 && choose(w, false, true) {
				np.EndPort = &end
			}
			ports = append(ports, np)
		}
		if choose(w, false, true) {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers, Ports: ports})
		} else {
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers, Ports: ports})
		}
	}
	return p
}

// step changes one thing. Endpoints keep the pod that they have when its object changes or goes, until they are told.
func (w *world) step() {
	put := func(o cluster.Object) {
		if choose(w, true, true, true, false) {
			w.engine.Apply(cluster.Change{Key: o.Key(), Object: o})
		} else {
			w.engine.Apply(cluster.Change{Key: o.Key()})
		}
	}
	at := choose(w, w.places...)
	switch choose(w, "pod", "pod", "relabel", "namespace", "namespace", "namespace", "policy", "policy", "policy", "open", "open", "close", "remove", "move", "told") {
	case "pod":
		put(w.pod())
	case "relabel":
		pods := slices.SortedFunc(w.engine.Model().Pods(), func(a, b *cluster.Pod) int { return strings.Compare(nameOf(a), nameOf(b)) })
		if len(pods) > 0 {
			p := *choose(w, pods...)
			p.Labels = w.labels()
			w.engine.Apply(cluster.Change{Key: p.Key(), Object: &p})
		}
	case "namespace":
		n := &cluster.Namespace{Name: w.namespace(), Labels: w.labels()}
		put(n)
	case "policy":
		put(w.policy())
	case "open":
		pods := slices.SortedFunc(w.engine.Model().Pods(), func(a, b *cluster.Pod) int { return strings.Compare(nameOf(a), nameOf(b)) })
		if len(pods) > 0 {
			at.pod = choose(w, pods...)
			at.there, at.ips = true, choose(w, at.pod.IPs, w.addresses())
		}
	case "close":
		at.pod, at.brief, at.ended = nil, rapid.Bool().Draw(w.T, "brief"), rapid.IntRange(0, 3).Draw(w.T, "ended") == 0
	case "remove":
		at.there = false
	case "move":
		at.ips = w.addresses()
		if at.link != "" {
			at.bridge = choose(w, "", "br0")
		}
	case "told":
		if at.pod != nil {
			if p := w.engine.Model().Pod(at.pod.Namespace, at.pod.Name); p != nil {
				at.pod = p
			}
		}
	}
}
