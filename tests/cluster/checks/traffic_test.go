package checks

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// kubeletProbes holds that probes of all kinds go on under a deny-all, which is enforced.
func kubeletProbes(t *testing.T, c *cluster) {
	ns := c.namespace(t)
	c.policy(t, ns, "deny-all", denyAll(match("role=probed"), bothWays))
	handlers := map[string]corev1.ProbeHandler{
		"tcp":  {TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(80)}},
		"http": {HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(80), Path: "/"}},
		"exec": {Exec: &corev1.ExecAction{Command: []string{"/probe", "ok"}}},
	}
	var specs []podSpec
	for kind, handler := range handlers {
		for _, node := range []string{"node1", "node2"} {
			probe := &corev1.Probe{ProbeHandler: handler, PeriodSeconds: 1, TimeoutSeconds: 2, FailureThreshold: 3}
			specs = append(specs, podSpec{
				namespace: ns, name: kind + "-" + node, node: node, labels: map[string]string{"role": "probed"},
				change: func(p *corev1.Pod) {
					p.Spec.Containers[0].LivenessProbe, p.Spec.Containers[0].ReadinessProbe, p.Spec.Containers[0].StartupProbe = probe, probe, probe
				},
			})
		}
	}
	probed := c.start(t, specs...)
	healthy := func(p *pod) error {
		s := p.object(t).Status.ContainerStatuses[0]
		if !s.Ready || s.RestartCount > 0 {
			return fmt.Errorf("%s: ready %v, %d restarts", p.name, s.Ready, s.RestartCount)
		}
		return nil
	}
	for _, p := range probed {
		eventually(t, 30*time.Second, p.name+" to be ready", func() error { return healthy(p) })
	}
	outsider := c.start(t, podSpec{namespace: ns, name: "outsider", node: "node1"})[0]
	for _, p := range probed {
		outsider.denied(t, p.addr(web))
	}
	const watch = 15 * time.Second
	for begin := time.Now(); time.Since(begin) < watch; time.Sleep(500 * time.Millisecond) {
		for _, p := range probed {
			if err := healthy(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.figure(t, "startup, readiness and liveness by tcp, http and exec on both nodes: %d pods under deny-all ready for %v, 0 restarts; other pods denied", len(probed), watch)
}

// services holds that policies see through service addresses: the pod behind them counts, and the pod in front of them.
func services(t *testing.T, c *cluster) {
	ns := c.namespace(t)
	var specs []podSpec
	for _, role := range []string{"server", "client", "other"} {
		for _, node := range []string{"node1", "node2"} {
			specs = append(specs, podSpec{namespace: ns, name: role + "-" + node, node: node, labels: map[string]string{"role": role}})
		}
	}
	list := c.start(t, specs...)
	servers, clients, others := list[0:2], list[2:4], list[4:6]
	addresses := map[*pod][]string{}
	for _, s := range servers {
		ip, port := c.service(t, s, corev1.ServiceExternalTrafficPolicyLocal)
		addresses[s] = []string{ip + ":8080", fmt.Sprintf("%s:%d", c.nodes[s.node].IP(), port)}
	}
	each := func(from []*pod, check func(p *pod, addr string)) int {
		n := 0
		for _, p := range from {
			for _, s := range servers {
				for _, addr := range addresses[s] {
					check(p, addr)
					n++
				}
			}
		}
		return n
	}
	// Before the policy all are answered, which also shows that the services are there.
	each(clients, func(p *pod, addr string) { p.allowed(t, addr) })
	each(others, func(p *pod, addr string) { p.allowed(t, addr) })
	c.policy(t, ns, "clients-only", allowFrom(match("role=server"), peerPods("role=client")))
	n := each(clients, func(p *pod, addr string) { p.allowed(t, addr) })
	denied := each(others, func(p *pod, addr string) { p.denied(t, addr) })
	c.figure(t, "ClusterIP and NodePort (local), same and other node: %d of %d paths of clients open, %d of %d of others closed; all open before", n, n, denied, denied)

	// And the other way round: the client's egress names the server's pod, not the address it dials. The other node's own
	// address is translated only there, so that leaves the pod as a connection to a node, which the policy does not name.
	toPod := func(check func(p *pod, addr string)) int {
		n := 0
		for _, p := range clients {
			for _, s := range servers {
				for i, addr := range addresses[s] {
					if i == 0 || s.node == p.node {
						check(p, addr)
						n++
					}
				}
			}
		}
		return n
	}
	c.policy(t, ns, "to-servers", allowTo(match("role=client"), peerPods("role=server")))
	n = toPod(func(p *pod, addr string) { p.allowed(t, addr) })
	clients[0].denied(t, addresses[servers[1]][1])
	c.deletePolicy(t, ns, "to-servers")
	c.policy(t, ns, "to-nobody", allowTo(match("role=client"), peerPods("role=nobody")))
	denied = toPod(func(p *pod, addr string) { p.denied(t, addr) })
	c.figure(t, "egress by the pod behind a service: %d paths open when it names the servers, %d closed when it does not", n, denied)
}

// firstPackets measures how early a pod may talk, and that it never may what it must not.
func firstPackets(t *testing.T, c *cluster) {
	const count = 20
	ns := c.namespace(t)
	var specs []podSpec
	for _, role := range []string{"good", "bad"} {
		for _, node := range []string{"node1", "node2"} {
			specs = append(specs, podSpec{namespace: ns, name: role + "-" + node, node: node, labels: map[string]string{"role": role}})
		}
	}
	peers := c.start(t, specs...)
	c.policy(t, ns, "runner", allowTo(match("role=runner"), peerPods("role=good")))
	c.policy(t, ns, "good", allowFrom(match("role=good"), peerPods("role=runner")))
	var args []string
	for _, p := range peers {
		args = append(args, "-send="+p.addr(sink))
	}
	var create, same, other []time.Duration
	var forbidden uint64
	for i := range count {
		node := peers[i%2].node
		runner := c.start(t, podSpec{namespace: ns, name: fmt.Sprintf("runner-%d", i), node: node, labels: map[string]string{"role": "runner"}, args: args})[0]
		started := time.Unix(0, ask[int64](t, runner, "GET", "/started", nil))
		create = append(create, started.Sub(runner.created))
		for _, p := range peers {
			name := runner.name + "/" + p.addr(sink)
			if p.labels["role"] == "bad" {
				time.Sleep(200 * time.Millisecond)
				forbidden += p.streams(t)[name].Count
				continue
			}
			eventually(t, 20*time.Second, "the first packet of "+runner.name+" at "+p.name, func() error {
				if p.streams(t)[name].Count == 0 {
					return fmt.Errorf("nothing yet")
				}
				return nil
			})
			first := time.Unix(0, p.streams(t)[name].First).Sub(started)
			if p.node == node {
				same = append(same, first)
			} else {
				other = append(other, first)
			}
		}
		runner.delete(t)
	}
	c.figure(t, "pod created to its first instruction: %s", spread(create))
	c.figure(t, "first instruction to first allowed packet, peer on the same node: %s", spread(same))
	c.figure(t, "first instruction to first allowed packet, peer on the other node: %s", spread(other))
	c.figure(t, "packets to forbidden peers: %d", forbidden)
	if forbidden > 0 {
		t.Errorf("%d packets reached a forbidden peer", forbidden)
	}
}

// namespaceRelabelled holds that a namespace's labels count as they change.
func namespaceRelabelled(t *testing.T, c *cluster) {
	home, away := c.namespace(t), c.namespace(t)
	servers := c.start(t, podSpec{namespace: home, name: "s1", node: "node1"}, podSpec{namespace: home, name: "s2", node: "node2"})
	client := c.start(t, podSpec{namespace: away, name: "client", node: "node1"})[0]
	client.allowed(t, servers[0].addr(web))
	c.policy(t, home, "friends", allowFrom(match(), peerNamespaces("team=friends")))
	relabel := func(value string) time.Time {
		patch := fmt.Appendf(nil, `{"metadata":{"labels":{"team":%s}}}`, value)
		if _, err := c.client.CoreV1().Namespaces().Patch(t.Context(), away, "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		return time.Now()
	}
	for i, s := range servers {
		client.denied(t, s.addr(web))
		client.send(t, fmt.Sprint("relabel", i), s.addr(sink), time.Millisecond)
	}
	time.Sleep(200 * time.Millisecond)
	for i, s := range servers {
		if n := s.streams(t)[fmt.Sprint("relabel", i)].Count; n > 0 {
			t.Fatalf("%d packets arrived at %s before the namespace had the label", n, s.name)
		}
	}
	answered := relabel(`"friends"`)
	var opened, closed time.Duration
	for i, s := range servers {
		client.allowed(t, s.addr(web))
		eventually(t, 5*time.Second, "the stream to arrive", func() error {
			if s.streams(t)[fmt.Sprint("relabel", i)].Count == 0 {
				return fmt.Errorf("nothing yet")
			}
			return nil
		})
		opened = max(opened, time.Unix(0, s.streams(t)[fmt.Sprint("relabel", i)].First).Sub(answered))
	}
	answered = relabel("null")
	for i, s := range servers {
		client.denied(t, s.addr(web))
		closed = max(closed, time.Unix(0, s.streams(t)[fmt.Sprint("relabel", i)].Last).Sub(answered))
	}
	c.figure(t, "label added: open on both nodes %v after the API's answer; removed: closed after %v", opened.Round(100*time.Microsecond), closed.Round(100*time.Microsecond))
}

// policyLatency measures the time from the API server's answer to enforcement on both nodes.
func policyLatency(t *testing.T, c *cluster) {
	const count = 50
	ns := c.namespace(t)
	list := c.start(t,
		podSpec{namespace: ns, name: "t1", node: "node1", labels: map[string]string{"role": "target"}},
		podSpec{namespace: ns, name: "t2", node: "node2", labels: map[string]string{"role": "target"}},
		podSpec{namespace: ns, name: "s1", node: "node1", labels: map[string]string{"role": "sender"}},
		podSpec{namespace: ns, name: "s2", node: "node2", labels: map[string]string{"role": "sender"}})
	targets, senders := list[:2], list[2:]
	for i, target := range targets { // from the other node, so that the target's node alone decides
		senders[1-i].send(t, "latency", target.addr(sink), time.Millisecond)
	}
	// closed and opened return when the last target was, seen by what arrived there.
	closed := func(answered time.Time) time.Duration {
		var latest time.Duration
		for _, target := range targets {
			eventually(t, 10*time.Second, "the stream to stop at "+target.name, func() error {
				last := time.Unix(0, target.streams(t)["latency"].Last)
				if quiet := time.Since(last); quiet < 100*time.Millisecond {
					return fmt.Errorf("a packet %v ago", quiet)
				}
				latest = max(latest, last.Sub(answered))
				return nil
			})
		}
		return latest
	}
	opened := func(answered time.Time) time.Duration {
		var latest time.Duration
		for _, target := range targets {
			eventually(t, 10*time.Second, "the stream to go on at "+target.name, func() error {
				s := target.streams(t)["latency"]
				if time.Since(time.Unix(0, s.Last)) > 50*time.Millisecond || len(s.Gaps) == 0 {
					return fmt.Errorf("nothing yet")
				}
				latest = max(latest, time.Unix(0, s.Gaps[len(s.Gaps)-1].To).Sub(answered))
				return nil
			})
		}
		return latest
	}
	api := c.client.NetworkingV1().NetworkPolicies(ns)
	deny, allow := denyAll(match("role=target"), onlyIngress), allowFrom(match("role=target"), peerPods("role=sender"))
	var created, updated, narrowed, deleted []time.Duration
	update := func(o *networkingv1.NetworkPolicy, spec networkingv1.NetworkPolicySpec) *networkingv1.NetworkPolicy {
		o.Spec = spec
		o, err := api.Update(t.Context(), o, metav1.UpdateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	for range count {
		o := c.policy(t, ns, "latency", deny)
		created = append(created, closed(time.Now()))
		o = update(o, allow)
		updated = append(updated, opened(time.Now()))
		update(o, deny)
		narrowed = append(narrowed, closed(time.Now()))
		c.deletePolicy(t, ns, "latency")
		deleted = append(deleted, opened(time.Now()))
	}
	c.figure(t, "created, closed on both nodes after: %s", spread(created))
	c.figure(t, "updated, open on both nodes after:   %s", spread(updated))
	c.figure(t, "updated, closed on both nodes after: %s", spread(narrowed))
	c.figure(t, "deleted, open on both nodes after:   %s", spread(deleted))
	for _, list := range [][]time.Duration{created, updated, narrowed, deleted} {
		if p99 := quantile(list, 0.99); p99 > 2*time.Second {
			t.Errorf("p99 is %v, want less than 2 s", p99)
		}
	}
}
