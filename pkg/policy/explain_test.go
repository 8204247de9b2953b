package policy

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

// TestExplainScenarios asks the Explainer about every probe of testdata/*.txtar: it must say what the ruleset does.
func TestExplainScenarios(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	asked := 0
	for _, file := range files {
		archive, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		s := load(t, archive)
		x := NewExplainer(s.input)
		for _, line := range lines(part(archive, "probes")) {
			f := strings.Fields(line)
			proto, port, _ := strings.Cut(f[2], "/")
			number, _ := strconv.Atoi(port)
			for _, from := range s.addresses(t, f[0]) {
				for _, to := range s.addresses(t, f[1]) {
					if from.Is4() != to.Is4() {
						continue
					}
					flow := Flow{
						From: x.At(from), To: x.At(to), FromNode: f[0] == "node", ToNode: f[1] == "node", Port: uint16(number), //nolint:gosec // test data
						Proto: map[string]uint8{"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "other": 47}[proto],
					}
					asked++
					if v := x.Explain(flow); v.Allowed != (f[3] == "allow") {
						t.Errorf("%s: %s (%s -> %s): %+v", filepath.Base(file), line, from, to, v)
					}
				}
			}
		}
	}
	if asked < 100 {
		t.Errorf("only %d probes", asked)
	}
}

// TestExplainAgrees compares the Explainer with the ruleset on random clusters: the verdict, each side of it, the isolating policies,
// the rule that is named (alone it must do), and the set of ports.
func TestExplainAgrees(t *testing.T) {
	t.Parallel()
	seen := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		in := randomInput(t)
		out, x := Render(in), NewExplainer(in)
		var addresses []netip.Addr
		for ip := range x.owners {
			addresses = append(addresses, ip)
		}
		for ip := range x.closed {
			addresses = append(addresses, ip)
		}
		addresses = append(addresses, netip.MustParseAddr("10.0.0.99"), netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("fd00:1::1"))
		slices.SortFunc(addresses, netip.Addr.Compare)
		for _, from := range addresses {
			for _, to := range addresses {
				if from == to || from.Is4() != to.Is4() {
					continue
				}
				for _, p := range []struct {
					proto uint8
					port  uint16
				}{{6, 80}, {6, 53}, {17, 53}, {6, 8080}, {6, 8085}, {132, 80}, {1, 0}} {
					f := Flow{From: x.At(from), To: x.At(to), Proto: p.proto, Port: p.port, ToNode: to.String() == "192.168.1.1"}
					if p.proto == 1 && !from.Is4() {
						f.Proto = ruleset.ProtoICMPv6
					}
					if f.ToNode && f.From.Closed {
						continue // it is its veth's chain that keeps it from the node's exemptions
					}
					v := x.Explain(f)
					want, err := Allows(out.Ruleset, Connection{Proto: f.Proto, Src: netip.AddrPortFrom(from, 40000), Dst: netip.AddrPortFrom(to, p.port), ToNode: f.ToNode})
					if err != nil {
						t.Fatal(err)
					}
					if v.Allowed != want {
						t.Fatalf("%s -> %s %+v: ruleset allows=%v, explained %+v", from, to, p, want, v)
					}
					if got := x.Ports(f).Has(f.Proto, f.Port); got != want {
						t.Fatalf("%s -> %s %+v: allowed=%v, ports %s", from, to, p, want, x.Ports(f))
					}
					agreesOnSides(t, out, in, f, v)
					seen[fmt.Sprint("allowed ", want)]++
					if v.Egress.Matched != "" || v.Ingress.Matched != "" {
						seen["by a rule"]++
					}
					if v.Egress.Reason != "" || v.Ingress.Reason != "" {
						seen["by something else"]++
					}
				}
			}
		}
	})
	for _, what := range []string{"allowed true", "allowed false", "by a rule", "by something else"} {
		if seen[what] < 1000 {
			t.Errorf("%s: seen only %d times", what, seen[what])
		}
	}
}

// agreesOnSides checks the parts of a verdict.
func agreesOnSides(t *rapid.T, out Output, in Input, f Flow, v Verdict) {
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		if e.Pod == nil {
			continue
		}
		if e.Pod == f.From.Subject {
			if diff := gocmp.Diff(append([]string{}, out.Endpoints[e.ID].Egress...), v.Egress.Policies); diff != "" {
				t.Fatalf("egress policies of %s: %s", e.Name, diff)
			}
		}
		if e.Pod == f.To.Subject {
			if diff := gocmp.Diff(append([]string{}, out.Endpoints[e.ID].Ingress...), v.Ingress.Policies); diff != "" {
				t.Fatalf("ingress policies of %s: %s", e.Name, diff)
			}
		}
	}
	for _, side := range []struct {
		Side
		only func(*networkingv1.NetworkPolicySpec, int)
		of   func(Verdict) Side
	}{
		{v.Egress, func(s *networkingv1.NetworkPolicySpec, i int) { s.Egress = s.Egress[i : i+1] }, func(v Verdict) Side { return v.Egress }},
		{v.Ingress, func(s *networkingv1.NetworkPolicySpec, i int) { s.Ingress = s.Ingress[i : i+1] }, func(v Verdict) Side { return v.Ingress }},
	} {
		if side.Matched == "" {
			continue
		}
		name, number, _ := strings.Cut(side.Matched, " rule ")
		namespace, name, _ := strings.Cut(name, "/")
		i, err := strconv.Atoi(number)
		if err != nil || !side.Allowed || !side.Isolated || len(side.Missed) > 0 {
			t.Fatalf("matched side: %+v", side.Side)
		}
		alone := cluster.NewModel()
		for p := range in.Model.Pods() {
			alone.Apply(cluster.Change{Key: p.Key(), Object: p})
		}
		for p := range in.Model.Policies() {
			if p.Namespace != namespace || p.Name != name {
				continue
			}
			only := *p
			only.Spec = *p.Spec.DeepCopy()
			side.only(&only.Spec, i)
			alone.Apply(cluster.Change{Key: p.Key(), Object: &only})
		}
		if got := NewExplainer(Input{Model: alone, Endpoints: in.Endpoints, Options: in.Options}).Explain(f); !side.of(got).Allowed {
			t.Fatalf("%s alone does not allow what it is said to: %+v", side.Matched, got)
		}
	}
}

// randomInput draws a cluster all of whose pods run here, but for those that nothing is enforced on.
func randomInput(t *rapid.T) Input {
	in := Input{Model: cluster.NewModel(), Options: Options{
		Table: "podwall", AllowOwnNode: rapid.Bool().Draw(t, "own node"), Cut: rapid.Bool().Draw(t, "cut"), Reject: rapid.Bool().Draw(t, "reject"),
	}}
	if rapid.Bool().Draw(t, "dns") {
		in.Options.NodeDNS = []netip.Addr{netip.MustParseAddr("192.168.1.1")}
	}
	tcp, udp, sctp := corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP
	protocols := rapid.SampledFrom([]*corev1.Protocol{nil, &tcp, &udp, &sctp})
	label := rapid.SampledFrom([]string{"x", "y", "z"})
	for i := range rapid.IntRange(2, 5).Draw(t, "pods") {
		pod := &cluster.Pod{
			Namespace: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "namespace"), Name: fmt.Sprint("pod", i), Labels: map[string]string{"app": label.Draw(t, "app")},
			IPs:     []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00::%d", i))},
			Created: time.Unix(int64(i), 0), HostNetwork: rapid.IntRange(0, 9).Draw(t, "host") == 0,
		}
		if rapid.Bool().Draw(t, "named") {
			pod.Ports = []cluster.NamedPort{{Name: "web", Protocol: cluster.TCP, Port: rapid.SampledFrom([]uint16{80, 8080}).Draw(t, "port")}}
		}
		in.Model.Apply(cluster.Change{Key: pod.Key(), Object: pod})
		if pod.HostNetwork {
			continue
		}
		if rapid.IntRange(0, 9).Draw(t, "over") == 0 {
			pod.Terminal = true
			continue
		}
		e := Endpoint{ID: pod.Name, Name: nameOf(pod), Pod: pod, IPs: pod.IPs, Link: "veth" + pod.Name}
		if rapid.IntRange(0, 9).Draw(t, "closed") == 0 {
			e.Pod = nil
		}
		in.Endpoints = append(in.Endpoints, e)
	}
	selector := func(what string) *metav1.LabelSelector {
		s := &metav1.LabelSelector{}
		switch rapid.IntRange(0, 2).Draw(t, what) {
		case 0:
			s.MatchLabels = map[string]string{"app": label.Draw(t, what)}
		case 1:
			s.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpNotIn, Values: []string{label.Draw(t, what)}}}
		}
		return s
	}
	for i := range rapid.IntRange(1, 4).Draw(t, "policies") {
		p := &cluster.Policy{Namespace: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "of"), Name: fmt.Sprint("p", i)}
		p.Spec.PodSelector = *selector("subject")
		p.Spec.PolicyTypes = rapid.SampledFrom([][]networkingv1.PolicyType{nil, {"Ingress"}, {"Egress"}, {"Ingress", "Egress"}}).Draw(t, "types")
		rule := func() ([]networkingv1.NetworkPolicyPeer, []networkingv1.NetworkPolicyPort) {
			var peers []networkingv1.NetworkPolicyPeer
			var ports []networkingv1.NetworkPolicyPort
			for range rapid.IntRange(0, 2).Draw(t, "peers") {
				switch rapid.IntRange(0, 3).Draw(t, "peer") {
				case 0:
					peers = append(peers, networkingv1.NetworkPolicyPeer{PodSelector: selector("peer")})
				case 1:
					peers = append(peers, networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": "a"}}})
				case 2:
					peers = append(peers, networkingv1.NetworkPolicyPeer{NamespaceSelector: &metav1.LabelSelector{}, PodSelector: selector("peer")})
				case 3:
					peers = append(peers, networkingv1.NetworkPolicyPeer{IPBlock: rapid.SampledFrom([]*networkingv1.IPBlock{
						{CIDR: "10.0.0.0/24", Except: []string{"10.0.0.2/31"}}, {CIDR: "0.0.0.0/0"}, {CIDR: "fd00::/120"}, {CIDR: "nonsense"},
					}).Draw(t, "block")})
				}
			}
			for range rapid.IntRange(0, 2).Draw(t, "ports") {
				port := networkingv1.NetworkPolicyPort{Protocol: protocols.Draw(t, "protocol")}
				switch rapid.IntRange(0, 3).Draw(t, "kind") {
				case 0:
					n := intstr.FromInt32(rapid.SampledFrom([]int32{53, 80, 8080}).Draw(t, "number"))
					port.Port = &n
				case 1:
					n, end := intstr.FromInt32(8080), int32(8090)
					port.Port, port.EndPort = &n, &end
				case 2:
					n := intstr.FromString("web")
					port.Port = &n
				}
				ports = append(ports, port)
			}
			return peers, ports
		}
		for range rapid.IntRange(0, 2).Draw(t, "ingress") {
			from, ports := rule()
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: from, Ports: ports})
		}
		for range rapid.IntRange(0, 2).Draw(t, "egress") {
			to, ports := rule()
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: to, Ports: ports})
		}
		in.Model.Apply(cluster.Change{Key: p.Key(), Object: p})
	}
	return in
}
