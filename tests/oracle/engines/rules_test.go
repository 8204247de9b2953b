package engines

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/podwall/podwall/tests/oracle"
)

// x/web is the subject of every case, y/peer is on another node.
var (
	webIP  = netip.MustParseAddr("10.244.0.10")
	peerIP = netip.MustParseAddr("10.244.2.10")
	nodeIP = netip.MustParseAddr("172.18.0.2")
)

// TestRules shows for each rule what the engine answers where the oracle is right. A case that fails because the engine has
// come to agree is good news: the rule goes.
func TestRules(t *testing.T) {
	fromPeer := oracle.Conn{Src: peerIP, Dst: webIP, Protocol: oracle.TCP, Port: 80}
	toPeer := oracle.Conn{Src: webIP, Dst: peerIP, Protocol: oracle.TCP, Port: 80}
	always := corev1.ContainerRestartPolicyAlways
	tested := map[string]bool{}
	for _, c := range []struct {
		name, engine, rule string
		policy             string // a NetworkPolicySpec of namespace x
		change             func(*oracle.Cluster)
		conn               oracle.Conn
		want               bool // the oracle's
		panics             bool // the engine has no answer
	}{
		{
			name: "NotIn matches a pod without the key", engine: "cyclonus", rule: "NotIn needs the key",
			policy: `{ingress: [{from: [{namespaceSelector: {}, podSelector: {matchExpressions: [{key: absent, operator: NotIn, values: [a]}]}}]}]}`,
			conn:   fromPeer, want: true,
		},
		{
			name: "NotIn selects a subject without the key", engine: "cyclonus", rule: "NotIn needs the key",
			policy: `{podSelector: {matchExpressions: [{key: absent, operator: NotIn, values: [a]}]}}`,
			conn:   fromPeer, want: false,
		},
		{
			name: "an empty value needs the key", engine: "cyclonus", rule: "empty label value matches without the key",
			policy: `{ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {absent: ""}}}]}]}`,
			conn:   fromPeer, want: false,
		},
		{
			name: "every name of a port counts", engine: "cyclonus", rule: "one name per port",
			policy: `{ingress: [{ports: [{port: second}]}]}`,
			change: func(c *oracle.Cluster) {
				c.Pods[0].Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "first", ContainerPort: 80}, {Name: "second", ContainerPort: 80}}}}
			},
			conn: fromPeer, want: true,
		},
		{
			name: "leading zeros are decimal", engine: "cyclonus", rule: "unreadable CIDR panics",
			policy: `{ingress: [{from: [{ipBlock: {cidr: 010.0.0.0/8}}]}]}`,
			conn:   fromPeer, want: true, panics: true,
		},
		{
			name: "a CIDR that nobody can read matches nothing", engine: "kube-network-policies", rule: "unreadable CIDR matches everything",
			policy: `{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}`,
			conn:   fromPeer, want: false,
		},
		{
			name: "a CIDR with leading zeros ends somewhere", engine: "kube-network-policies", rule: "unreadable CIDR matches everything",
			policy: `{ingress: [{from: [{ipBlock: {cidr: 0192.168.0.0/16}}]}]}`,
			conn:   fromPeer, want: false,
		},
		{
			name: "an except with leading zeros excepts", engine: "kube-network-policies", rule: "unreadable CIDR matches everything",
			policy: `{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [010.244.0.0/16]}}]}]}`,
			conn:   fromPeer, want: false,
		},
		{
			name: "a sidecar's port has a name", engine: "kube-network-policies", rule: "named port of a sidecar is not found",
			policy: `{ingress: [{ports: [{port: web}]}]}`,
			change: func(c *oracle.Cluster) {
				c.Pods[0].Spec.InitContainers = []corev1.Container{{RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 80}}}}
			},
			conn: fromPeer, want: true,
		},
		{
			name: "a completed pod has no address", engine: "kube-network-policies", rule: "completed pod keeps its address",
			policy: `{ingress: [{from: [{namespaceSelector: {}}]}]}`,
			change: func(c *oracle.Cluster) { c.Pods[1].Status.Phase = corev1.PodSucceeded },
			conn:   fromPeer, want: false,
		},
		{
			name: "the node reaches its pods", engine: "kube-network-policies", rule: "own node",
			policy: `{}`, conn: oracle.Conn{Src: nodeIP, Dst: webIP, FromNode: true, Protocol: oracle.TCP, Port: 80}, want: true,
		},
		{
			name: "the node reaches its pods", engine: "cyclonus", rule: "own node",
			policy: `{}`, conn: oracle.Conn{Src: nodeIP, Dst: webIP, FromNode: true, Protocol: oracle.TCP, Port: 80}, want: true,
		},
		{
			name: "a pod reaches its own node if that is switched on", engine: "kube-network-policies", rule: "own node",
			policy: `{policyTypes: [Egress]}`, change: func(c *oracle.Cluster) { c.AllowOwnNode = true },
			conn: oracle.Conn{Src: webIP, Dst: nodeIP, ToNode: true, Protocol: oracle.TCP, Port: 80}, want: true,
		},
		{
			name: "a pod reaches itself", engine: "kube-network-policies", rule: "hairpin",
			policy: `{}`, conn: oracle.Conn{Src: webIP, Dst: webIP, Protocol: oracle.TCP, Port: 80}, want: true,
		},
		{
			name: "a pod reaches itself", engine: "cyclonus", rule: "hairpin",
			policy: `{}`, conn: oracle.Conn{Src: webIP, Dst: webIP, Protocol: oracle.TCP, Port: 80}, want: true,
		},
		{
			name: "an address that the status does not have yet", engine: "kube-network-policies", rule: "sandbox without a pod that reports its address",
			policy: `{policyTypes: [Egress]}`, change: func(c *oracle.Cluster) { c.Pods[0].Status.PodIPs = nil },
			conn: toPeer, want: false,
		},
		{
			name: "a sandbox that no pod explains is closed", engine: "kube-network-policies", rule: "sandbox without a pod that reports its address",
			change: func(c *oracle.Cluster) { c.Pods = c.Pods[1:] },
			conn:   toPeer, want: false,
		},
		{
			name: "the newer of two pods with one address", engine: "kube-network-policies", rule: "address that several pods report",
			policy: `{ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {new: "yes"}}}]}]}`,
			change: func(c *oracle.Cluster) {
				newer := c.Pods[1].DeepCopy()
				newer.Name, newer.Labels, newer.CreationTimestamp = "newer", map[string]string{"new": "yes"}, metav1.Unix(2000, 0)
				newer.Status.Phase = corev1.PodPending
				c.Pods = append(c.Pods, newer)
			},
			conn: fromPeer, want: true,
		},
	} {
		tested[c.engine+"/"+c.rule], tested[c.rule] = true, true
		t.Run(c.engine+"/"+c.name, func(t *testing.T) {
			cluster := fixture(t, c.policy)
			if c.change != nil {
				c.change(cluster)
			}
			if got := cluster.Allowed(c.conn); got != c.want {
				t.Errorf("the oracle says %v, want %v", got, c.want)
			}
			e := engine(t, c.engine)
			q := subject(t, Store(cluster), c.conn)
			if got := excluding(e, q); got != c.rule {
				t.Errorf("excluded by %q, want %q", got, c.rule)
			}
			e.Load(q.Stored)
			switch got, answered := ask(e, q); {
			case answered == c.panics:
				t.Errorf("the engine answered: %v, want %v", answered, !c.panics)
			case answered && got == c.want:
				t.Errorf("%s is right now: drop the rule %q", c.engine, c.rule)
			}
		})
	}
	for _, r := range Scope() {
		if !tested[r.Name] {
			t.Errorf("no case shows why %q is left out", r.Name)
		}
	}
	for _, e := range engines(t) {
		for _, r := range e.Rules() {
			if !tested[e.Name()+"/"+r.Name] {
				t.Errorf("no case shows why %q is left out for %s", r.Name, e.Name())
			}
		}
	}
}

// TestEmptyIngressIsNil is why Store makes empty rules nil: the API server cannot tell them apart, kube-network-policies does.
func TestEmptyIngressIsNil(t *testing.T) {
	cluster := fixture(t, `{policyTypes: [Ingress], ingress: []}`)
	conn := oracle.Conn{Src: peerIP, Dst: webIP, Protocol: oracle.TCP, Port: 80}
	if cluster.Allowed(conn) {
		t.Error("the oracle allows what an empty list of rules denies")
	}
	e := engine(t, "kube-network-policies")
	stored := Store(cluster)
	e.Load(stored)
	if got, _ := ask(e, subject(t, stored, conn)); got {
		t.Error("kube-network-policies allows with nil rules")
	}
	stored.Policies[0].Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{}
	e.Load(stored)
	if got, _ := ask(e, subject(t, stored, conn)); !got {
		t.Error("kube-network-policies is right about empty rules now: Store need not make them nil for its sake")
	}
}

func fixture(t *testing.T, spec string) *oracle.Cluster {
	t.Helper()
	pod := func(namespace, name, node string, ip netip.Addr) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}, CreationTimestamp: metav1.NewTime(time.Unix(1000, 0))},
			Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 80}}}}},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: ip.String()}}},
		}
	}
	c := &oracle.Cluster{
		Node:      "here",
		Pods:      []*corev1.Pod{pod("x", "web", "here", webIP), pod("y", "peer", "there", peerIP)},
		Sandboxes: []oracle.Sandbox{{Namespace: "x", Name: "web", IPs: []netip.Addr{webIP}}},
	}
	if spec != "" {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: "policy"}}
		if err := yaml.UnmarshalStrict([]byte(spec), &p.Spec); err != nil {
			t.Fatal(err)
		}
		c.Policies = append(c.Policies, p)
	}
	return c
}

func engine(t *testing.T, name string) Engine {
	t.Helper()
	all := engines(t)
	return all[slices.IndexFunc(all, func(e Engine) bool { return e.Name() == name })]
}

// subject returns the question about x/web.
func subject(t *testing.T, s *Stored, conn oracle.Conn) *Question {
	t.Helper()
	list := s.Questions(conn)
	if i := slices.IndexFunc(list, func(q *Question) bool { return q.Direction == networkingv1.PolicyTypeIngress == (conn.Dst == webIP) }); i >= 0 {
		return list[i]
	}
	t.Fatalf("%+v: %d questions, none about x/web", conn, len(list))
	return nil
}
