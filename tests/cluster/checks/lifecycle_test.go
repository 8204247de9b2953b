package checks

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// hostLocal is where the nodes' IPAM plugin keeps its leases, one file per address.
const hostLocal = "/var/lib/cni/networks/pods/"

// nextIP makes a node's IPAM plugin hand out an address next: it goes round from the last one.
func (c *cluster) nextIP(t *testing.T, node, ip string) {
	t.Helper()
	n := c.nodes[node]
	eventually(t, 30*time.Second, "the address "+ip+" to be free", func() error {
		if _, err := os.Stat(n.Path(hostLocal + ip)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("still leased (%w)", err)
		}
		return nil
	})
	// Addresses are rarely reused so soon: the node would look for the new pod at the old one's MAC for up to a minute.
	if _, err := n.Run(t.Context(), "ip", "neigh", "flush", "to", ip); err != nil {
		t.Fatal(err)
	}
	before := netip.MustParseAddr(ip).Prev().String()
	if err := os.WriteFile(n.Path(hostLocal+"last_reserved_ip.0"), []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
}

// jobIPReuse holds that an address belongs to who has it now, not to a completed pod that the API still lists with it.
func jobIPReuse(t *testing.T, c *cluster) {
	ns := c.namespace(t)
	servers := c.start(t, podSpec{namespace: ns, name: "server1", node: "node1"}, podSpec{namespace: ns, name: "server2", node: "node2"})
	for _, s := range servers {
		c.policy(t, ns, s.name, allowFrom(match("pod="+s.name), peerPods("role=client")))
	}
	job := podSpec{
		namespace: ns, name: "job", node: "node1", labels: map[string]string{"role": "client"},
		args: []string{"-exit-after=4s", "-send=" + servers[0].addr(sink), "-send=" + servers[1].addr(sink)},
		change: func(p *corev1.Pod) {
			p.Spec.RestartPolicy = corev1.RestartPolicyNever
		},
	}.object()
	_, err := c.client.BatchV1().Jobs(ns).Create(t.Context(), &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "job"},
		Spec:       batchv1.JobSpec{Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: job.Labels}, Spec: job.Spec}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var ip, completed string
	eventually(t, time.Minute, "the job to complete", func() error {
		list, err := c.client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "pod=job"})
		if err != nil || len(list.Items) == 0 {
			return fmt.Errorf("no pod yet: %w", err)
		}
		p := list.Items[0]
		ip, completed = p.Status.PodIP, p.Name
		if p.Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("phase %s", p.Status.Phase)
		}
		return nil
	})
	for _, s := range servers {
		if s.streams(t)[completed+"/"+s.addr(sink)].Count == 0 {
			t.Errorf("nothing of the job arrived at %s, which allows it", s.name)
		}
		ask[any](t, s, "POST", "/forget", nil)
	}
	c.nextIP(t, "node1", ip)
	heir := c.start(t, podSpec{
		namespace: ns, name: "heir", node: "node1", labels: map[string]string{"role": "stranger"},
		args: []string{"-send=" + servers[0].addr(sink), "-send=" + servers[1].addr(sink)},
	})[0]
	if heir.ip != ip {
		t.Fatalf("the new pod has IP %s, want the completed pod's %s", heir.ip, ip)
	}
	if o, err := c.client.CoreV1().Pods(ns).Get(t.Context(), completed, metav1.GetOptions{}); err != nil || o.Status.PodIP != ip {
		t.Fatalf("the API no longer lists the completed pod with its IP: %v", err)
	}
	var leaked uint64
	for _, s := range servers {
		heir.denied(t, s.addr(web))
		for _, st := range s.streams(t) {
			leaked += st.Count
		}
	}
	if leaked > 0 {
		t.Errorf("%d packets of the completed pod's heir arrived", leaked)
	}
	// And the heir is what it is: a policy that names it lets it in.
	c.policy(t, ns, "strangers", allowFrom(match(), peerPods("role=stranger")))
	for _, s := range servers {
		heir.allowed(t, s.addr(web))
	}
	c.figure(t, "IP %s of a Succeeded pod (allowed) reused by a pod with other labels: %d packets passed on either node; open once a policy names it", ip, leaked)
}

// forceDeleted holds that a pod stays enforced as long as its container runs, even when the API has forgotten it.
func forceDeleted(t *testing.T, c *cluster) {
	ns := c.namespace(t)
	list := c.start(t,
		podSpec{namespace: ns, name: "victim", node: "node1", labels: map[string]string{"role": "victim"}},
		podSpec{namespace: ns, name: "peer1", node: "node1"}, podSpec{namespace: ns, name: "peer2", node: "node2"})
	victim, peers := list[0], list[1:]
	for _, p := range peers {
		victim.send(t, p.name, p.addr(sink), 5*time.Millisecond)
		p.send(t, p.name, victim.addr(sink), 5*time.Millisecond)
	}
	time.Sleep(500 * time.Millisecond)
	c.policy(t, ns, "deny-all", denyAll(match("role=victim"), bothWays))
	for _, p := range peers {
		victim.denied(t, p.addr(web))
		if victim.streams(t)[p.name].Count == 0 || p.streams(t)[p.name].Count == 0 {
			t.Error("nothing passed before the policy: the test proves nothing")
		}
	}
	if err := c.nodes["node1"].Signal(t.Context(), "kubelet", "STOP"); err != nil {
		t.Fatal(err)
	}
	thawed := false
	thaw := func() {
		if !thawed {
			thawed = true
			if err := c.nodes["node1"].Signal(t.Context(), "kubelet", "CONT"); err != nil {
				t.Error(err)
			}
		}
	}
	defer thaw()
	victim.delete(t)
	eventually(t, 10*time.Second, "the API to forget the pod", func() error {
		_, err := c.client.CoreV1().Pods(ns).Get(t.Context(), victim.name, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("still there (%w)", err)
		}
		return nil
	})
	gone := time.Now()
	time.Sleep(5 * time.Second)
	ask[int64](t, victim, "GET", "/started", nil) // the container runs
	passed := 0
	for _, p := range peers {
		for _, s := range []stream{victim.streams(t)[p.name], p.streams(t)[p.name]} {
			if time.Unix(0, s.Last).After(gone) {
				passed++
			}
		}
		if o := victim.connect(t, p.addr(web)); o.OK {
			t.Errorf("the force-deleted pod reaches %s", p.name)
		}
	}
	if passed > 0 {
		t.Errorf("%d of 4 streams of the force-deleted pod arrive while its container runs", passed)
	}
	ip := victim.ip
	thaw()
	c.nextIP(t, "node1", ip)
	heir := c.start(t, podSpec{namespace: ns, name: "heir", node: "node1"})[0]
	if heir.ip != ip {
		t.Fatalf("the new pod has IP %s, want %s", heir.ip, ip)
	}
	neighbour := c.start(t, podSpec{namespace: ns, name: "neighbour", node: "node1"})[0] // peer1 still has the victim's MAC too
	for _, p := range []*pod{neighbour, peers[1]} {
		heir.allowed(t, p.addr(web))
		p.allowed(t, heir.addr(web))
	}
	c.figure(t, "container running 5 s after the API forgot the pod: %d of 4 streams passed (all did before the policy); its IP's next owner is open", passed)
}

// staticPod holds that a policy selects a static pod by its labels, though its CNI identity is not the API server's.
func staticPod(t *testing.T, c *cluster) {
	ns := c.namespace(t)
	peers := c.start(t, podSpec{namespace: ns, name: "peer1", node: "node1"}, podSpec{namespace: ns, name: "peer2", node: "node2"})
	manifest := c.nodes["node1"].Path("/etc/kubernetes/manifests/static.json")
	write := func(generation string) {
		o := podSpec{
			namespace: ns, name: "static", node: "node1", labels: map[string]string{"role": "static"},
			args: []string{"-send=" + peers[0].addr(sink), "-send=" + peers[1].addr(sink)},
			change: func(p *corev1.Pod) {
				p.APIVersion, p.Kind = "v1", "Pod"
				p.Spec.NodeSelector, p.Spec.AutomountServiceAccountToken = nil, nil
				p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "GENERATION", Value: generation}}
			},
		}.object()
		data, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(manifest, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("1")
	t.Cleanup(func() { _ = os.Remove(manifest) })
	static := &pod{c: c, namespace: ns, name: "static-node1", node: "node1", http: c.httpClient("node1")}
	static.waitRunning(t, time.Minute)
	for _, p := range peers {
		p.allowed(t, static.addr(web))
		static.allowed(t, p.addr(web))
	}
	c.policy(t, ns, "deny-all", denyAll(match("role=static"), bothWays))
	for _, p := range peers {
		p.denied(t, static.addr(web))
		static.denied(t, p.addr(web))
	}
	first := static.object(t)
	uid := c.attachedUID(t, "node1", static)
	if uid == string(first.UID) {
		t.Errorf("the runtime names the static pod by the API server's UID %s: the test proves nothing", uid)
	}
	// The same, now started under the policy.
	for _, p := range peers {
		ask[any](t, p, "POST", "/forget", nil)
	}
	if err := os.Remove(manifest); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the static pod to go", func() error {
		_, err := c.client.CoreV1().Pods(ns).Get(t.Context(), static.name, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("still there (%w)", err)
		}
		return nil
	})
	for _, p := range peers {
		ask[any](t, p, "POST", "/forget", nil)
	}
	begin := time.Now()
	write("2")
	static.waitRunning(t, time.Minute)
	took := time.Since(begin)
	var leaked uint64
	for _, p := range peers {
		p.denied(t, static.addr(web))
		static.denied(t, p.addr(web))
		for _, s := range p.streams(t) {
			leaked += s.Count
		}
	}
	if leaked > 0 {
		t.Errorf("%d packets of the static pod passed its policy", leaked)
	}
	c.figure(t, "CNI UID %s, API UID %s: denied both ways; started again under the policy in %.1f s, %d packets passed", uid, first.UID, took.Seconds(), leaked)
}

// attachedUID is the UID that the runtime gave the plugin for a pod.
func (c *cluster) attachedUID(t *testing.T, node string, p *pod) string {
	t.Helper()
	files, err := filepath.Glob(c.nodes[node].Path("/run/podwall/attachments/*.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue // ended meanwhile
		}
		var a struct {
			Pod struct {
				Namespace string `json:"namespace"`
				Name      string `json:"name"`
				UID       string `json:"uid"`
			} `json:"pod"`
		}
		if json.Unmarshal(data, &a) == nil && a.Pod.Namespace == p.namespace && a.Pod.Name == p.name {
			return a.Pod.UID
		}
	}
	t.Fatalf("no attachment of %s on %s in %d files", p.ref(), node, len(files))
	return ""
}

// phaseFailed holds that a pod which the control plane calls Failed stays enforced while its container runs.
func phaseFailed(t *testing.T, c *cluster) {
	ns := c.namespace(t)
	list := c.start(t,
		podSpec{namespace: ns, name: "lost", node: "node1", labels: map[string]string{"role": "lost"}},
		podSpec{namespace: ns, name: "peer1", node: "node1"}, podSpec{namespace: ns, name: "peer2", node: "node2"})
	lost, peers := list[0], list[1:]
	for _, p := range peers {
		lost.send(t, p.name, p.addr(sink), 5*time.Millisecond)
		p.send(t, p.name, lost.addr(sink), 5*time.Millisecond)
	}
	time.Sleep(500 * time.Millisecond)
	for _, p := range peers {
		if p.streams(t)[p.name].Count == 0 || lost.streams(t)[p.name].Count == 0 {
			t.Error("nothing passed before the policy: the test proves nothing")
		}
	}
	c.policy(t, ns, "deny-all", denyAll(match("role=lost"), bothWays))
	for _, p := range peers {
		lost.denied(t, p.addr(web))
	}
	// A node that does not answer: its kubelet could not object.
	if err := c.nodes["node1"].Signal(t.Context(), "kubelet", "STOP"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.nodes["node1"].Signal(t.Context(), "kubelet", "CONT"); err != nil {
			t.Error(err)
		}
	}()
	_, err := c.client.CoreV1().Pods(ns).Patch(t.Context(), lost.name, "application/merge-patch+json", []byte(`{"status":{"phase":"Failed"}}`), metav1.PatchOptions{}, "status")
	if err != nil {
		t.Fatal(err)
	}
	failed := time.Now()
	time.Sleep(5 * time.Second)
	if phase := lost.object(t).Status.Phase; phase != corev1.PodFailed {
		t.Fatalf("the pod's phase is %s, want Failed", phase)
	}
	ask[int64](t, lost, "GET", "/started", nil) // the container runs
	passed := 0
	for _, p := range peers {
		for _, s := range []stream{lost.streams(t)[p.name], p.streams(t)[p.name]} {
			if time.Unix(0, s.Last).After(failed) {
				passed++
			}
		}
	}
	if passed > 0 {
		t.Errorf("%d of 4 streams of the pod that is called Failed arrive while its container runs", passed)
	}
	c.figure(t, "container running 5 s in phase Failed: %d of 4 streams passed (all did before the policy)", passed)
}

// traffic is what has to go on, and what must never pass, while something happens to podwall.
type traffic struct {
	servers, clients, forbidden []*pod
	namespace                   string
}

// startTraffic has a client on each node talk to a server on each, and a stranger on each try to.
func (c *cluster) startTraffic(t *testing.T) *traffic {
	t.Helper()
	ns := c.namespace(t)
	var specs []podSpec
	for _, role := range []string{"server", "client", "stranger"} {
		for _, node := range []string{"node1", "node2"} {
			specs = append(specs, podSpec{namespace: ns, name: role + "-" + node, node: node, labels: map[string]string{"role": role}})
		}
	}
	list := c.start(t, specs...)
	tr := &traffic{servers: list[0:2], clients: list[2:4], forbidden: list[4:6], namespace: ns}
	c.policy(t, ns, "clients-only", allowFrom(match("role=server"), peerPods("role=client")))
	for _, s := range tr.servers {
		for _, p := range tr.clients {
			p.allowed(t, s.addr(web))
			p.keep(t, s.name, s.addr(web))
			p.send(t, p.name, s.addr(sink), 5*time.Millisecond)
		}
		for _, p := range tr.forbidden {
			p.denied(t, s.addr(web))
			p.send(t, p.name, s.addr(sink), 5*time.Millisecond)
			p.keep(t, s.name, s.addr(web))
		}
	}
	return tr
}

// check fails the test when traffic was cut or let through that should not have been, and says what there was.
func (tr *traffic) check(t *testing.T) string {
	t.Helper()
	var kept, fresh int
	var packets, leaked, lost uint64
	var longest time.Duration
	for _, p := range tr.clients {
		for server, f := range p.flows(t) {
			if f.Broken > 0 || f.Refused > 0 || f.Kept == 0 || f.New == 0 {
				t.Errorf("%s to %s: %+v, want nothing broken or refused", p.name, server, f)
			}
			kept, fresh = kept+f.Kept, fresh+f.New
		}
	}
	for _, s := range tr.servers {
		streams := s.streams(t)
		for _, p := range tr.clients {
			st := streams[p.name]
			packets, lost, longest = packets+st.Count, lost+st.lost(), max(longest, st.longestGap())
		}
		for _, p := range tr.forbidden {
			leaked += streams[p.name].Count
		}
	}
	tries := 0
	for _, p := range tr.forbidden {
		for server, f := range p.flows(t) {
			if f.Kept+f.New > 0 {
				t.Errorf("%s reached %s: %+v", p.name, server, f)
			}
			tries += f.Broken + f.Refused
		}
	}
	if leaked > 0 {
		t.Errorf("%d forbidden packets arrived", leaked)
	}
	if packets == 0 || lost > packets/100 {
		t.Errorf("%d allowed packets arrived, %d were lost, longest gap %v", packets, lost, longest)
	}
	return fmt.Sprintf("allowed: %d requests on kept and %d on new connections, 0 failed, %d packets, %d lost; forbidden: %d tries, %d packets passed",
		kept, fresh, packets, lost, tries, leaked)
}

// rollingUpdate holds that an update of the DaemonSet completes, cuts nothing, opens nothing and lets pods start.
func rollingUpdate(t *testing.T, c *cluster) {
	tr := c.startTraffic(t)
	var pods []*pod
	begin := time.Now()
	c.kubectl(t, "-n", "kube-system", "rollout", "restart", "daemonset/podwall")
	done := make(chan error, 1)
	go func() {
		_, err := c.tryKubectl(t.Context(), "-n", "kube-system", "rollout", "status", "daemonset/podwall", "--timeout=180s")
		done <- err
	}()
	var took time.Duration
	for i := 0; took == 0; i++ {
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("%v\n%s", err, c.daemonLogs(t))
			}
			took = time.Since(begin)
		case <-time.After(time.Second):
			pods = append(pods, c.create(t, podSpec{
				namespace: tr.namespace, name: fmt.Sprintf("during-%d", i), node: tr.servers[i%2].node,
				args: []string{"-send=" + tr.servers[0].addr(sink), "-send=" + tr.servers[1].addr(sink)},
			}))
		}
	}
	var slowest time.Duration
	var leaked uint64
	for _, p := range pods {
		p.waitRunning(t, 2*time.Minute)
		slowest = max(slowest, time.Unix(0, ask[int64](t, p, "GET", "/started", nil)).Sub(p.created))
		for _, s := range tr.servers {
			leaked += s.streams(t)[p.name+"/"+s.addr(sink)].Count
		}
	}
	if leaked > 0 {
		t.Errorf("%d packets of pods that started during the update passed", leaked)
	}
	time.Sleep(2 * time.Second)
	c.figure(t, "complete after %.1f s; %s; %d pods started meanwhile, the slowest in %.1f s, %d forbidden packets of theirs passed",
		took.Seconds(), tr.check(t), len(pods), slowest.Seconds(), leaked)
}

// daemonStopped holds that a node without its daemon stays enforced, that new pods wait there, and that they start enforced.
func daemonStopped(t *testing.T, c *cluster) {
	tr := c.startTraffic(t)
	patch := func(affinity string) {
		c.kubectl(t, "-n", "kube-system", "patch", "daemonset", "podwall", "--type=merge", "-p", `{"spec":{"template":{"spec":{"affinity":`+affinity+`}}}}`)
	}
	patch(`{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"kubernetes.io/hostname","operator":"NotIn","values":["node1"]}]}]}}}`)
	restored := false
	defer func() {
		if !restored {
			patch("null")
		}
	}()
	eventually(t, time.Minute, "node1's daemon to stop", func() error {
		if out, err := c.nodes["node1"].Run(t.Context(), "pgrep", "-x", "podwalld"); err == nil {
			return fmt.Errorf("it runs as process %s", strings.TrimSpace(out))
		}
		return nil
	})
	waiting := c.create(t, podSpec{
		namespace: tr.namespace, name: "waiting", node: "node1",
		args: []string{"-send=" + tr.servers[0].addr(sink), "-send=" + tr.servers[1].addr(sink)},
	})
	var why string
	eventually(t, 90*time.Second, "an event of the waiting pod", func() error {
		events, err := c.client.CoreV1().Events(tr.namespace).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=waiting,reason=FailedCreatePodSandBox"})
		if err != nil || len(events.Items) == 0 {
			return fmt.Errorf("none yet: %w", err)
		}
		why = events.Items[0].Message
		return nil
	})
	if !strings.Contains(why, "podwall") {
		t.Errorf("the event does not name podwall: %s", why)
	}
	time.Sleep(10 * time.Second)
	if phase := waiting.object(t).Status.Phase; phase != corev1.PodPending {
		t.Errorf("without a daemon on its node the pod is %s, want Pending", phase)
	}
	without := tr.check(t)
	begin := time.Now()
	patch("null")
	restored = true
	c.rollout(t)
	ready := time.Since(begin)
	waiting.waitRunning(t, 3*time.Minute)
	started := time.Since(begin)
	time.Sleep(time.Second)
	var leaked uint64
	for _, s := range tr.servers {
		waiting.denied(t, s.addr(web))
		leaked += s.streams(t)[waiting.name+"/"+s.addr(sink)].Count
	}
	if leaked > 0 {
		t.Errorf("%d packets of the pod that waited passed", leaked)
	}
	t.Logf("event: %s", why)
	c.figure(t, "no daemon on node1: %s; a new pod waits there", without)
	c.figure(t, "daemons ready %.1f s after they were allowed back, the pod ran after %.1f s, %d forbidden packets of its passed; %s", ready.Seconds(), started.Seconds(), leaked, tr.check(t))
}

// apiServerStopped holds that policies stay enforced while the API server is away, and follow it again when it is back.
func apiServerStopped(t *testing.T, c *cluster) {
	const away = 60 * time.Second
	tr := c.startTraffic(t)
	if err := c.lab.StopAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	time.Sleep(away)
	if err := c.lab.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	gone := time.Since(begin)
	back := time.Now()
	report := tr.check(t)
	eventually(t, 30*time.Second, "the policy to be accepted", func() error {
		_, err := c.tryKubectl(t.Context(), "-n", tr.namespace, "create", "-f", c.policyFile(t, tr.namespace))
		return err
	})
	created := time.Now()
	// A server that is stopped takes itself out of its service, and kube-proxy, too, has to come back to it: podwalld reaches it
	// by the service's address.
	for _, n := range c.nodes {
		eventually(t, 2*time.Minute, "the API server's service on "+n.Name, func() error {
			conn, err := n.Dial(t.Context(), "tcp", "10.96.0.1:443")
			if err == nil {
				_ = conn.Close()
			}
			return err
		})
	}
	service := time.Since(back)
	for _, s := range tr.servers {
		eventually(t, 2*time.Minute, "strangers to be let in", func() error {
			if o := tr.forbidden[0].connect(t, s.addr(web)); !o.OK {
				return errors.New(o.Error)
			}
			return nil
		})
	}
	enforced := time.Since(back)
	c.figure(t, "away for %.0f s: %s", gone.Seconds(), report)
	c.figure(t, "back: a policy is accepted after %.1f s, the server's service address answers on both nodes after %.1f s (kube-proxy), the policy is enforced on both after %.1f s",
		created.Sub(back).Seconds(), service.Seconds(), enforced.Seconds())
	if late := enforced - max(service, created.Sub(back)); late > 30*time.Second {
		t.Errorf("podwall needed %v after it could reach the API server again", late)
	}
	eventually(t, time.Minute, "podwall to be ready", func() error {
		_, err := c.tryKubectl(t.Context(), "-n", "kube-system", "rollout", "status", "daemonset/podwall", "--timeout=10s")
		return err
	})
}

func (c *cluster) policyFile(t *testing.T, namespace string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "policy.yaml")
	text := fmt.Sprintf(`{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"strangers","namespace":%q},
		"spec":{"podSelector":{},"policyTypes":["Ingress"],"ingress":[{}]}}`, namespace)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
