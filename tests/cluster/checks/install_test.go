package checks

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// raceCount is how many pods try to be faster than their policies.
const raceCount = 100

// runRace starts pods that may not send anything, and that send from their first instruction on, and returns how many of
// them got something through, and how much that was.
func runRace(t *testing.T, c *cluster) (int, uint64) {
	t.Helper()
	ns := c.namespace(t)
	c.policy(t, ns, "silence", denyAll(match("role=runner"), onlyEgress))
	peers := c.start(t, podSpec{namespace: ns, name: "peer1", node: "node1"}, podSpec{namespace: ns, name: "peer2", node: "node2"})
	var args []string
	for _, p := range peers {
		args = append(args, "-send="+p.addr(sink), "-connect="+p.addr(web))
	}
	begin := time.Now()
	runners := make([]podSpec, raceCount)
	for i := range runners {
		runners[i] = podSpec{
			namespace: ns, name: fmt.Sprintf("runner-%d", i), node: peers[i%2].node, labels: map[string]string{"role": "runner"}, args: args,
		}
	}
	started := c.start(t, runners...)
	t.Logf("%d pods run after %.1f s", len(started), time.Since(begin).Seconds())
	time.Sleep(3 * time.Second) // the last of them tries on
	byIP := map[string]string{}
	for _, p := range started {
		byIP[p.ip] = p.name
	}
	leaky := map[string]bool{}
	var packets uint64
	for _, p := range peers {
		for name, s := range p.streams(t) {
			runner, _, _ := strings.Cut(name, "/")
			leaky[runner] = true
			packets += s.Count
		}
		for ip, n := range p.accepted(t) {
			if byIP[ip] != "" {
				leaky[byIP[ip]] = true
				packets += uint64(n) //nolint:gosec // a count
			}
		}
	}
	for _, p := range started {
		p.delete(t)
	}
	eventually(t, 2*time.Minute, "the pods to go", func() error {
		list, err := c.client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "role=runner"})
		if err == nil && len(list.Items) > 0 {
			time.Sleep(time.Second)
			return fmt.Errorf("%d left", len(list.Items))
		}
		return err
	})
	return len(leaky), packets
}

// raceWithout is the control of race: without podwall every pod gets through.
func raceWithout(t *testing.T, c *cluster) {
	pods, packets := runRace(t, c)
	c.figure(t, "control: %d of %d pods got through, %d datagrams and connections", pods, raceCount, packets)
	if pods != raceCount {
		t.Errorf("%d of %d pods got through without podwall: the test proves nothing", pods, raceCount)
	}
}

func race(t *testing.T, c *cluster) {
	pods, packets := runRace(t, c)
	c.figure(t, "%d of %d pods got through, %d datagrams and connections", pods, raceCount, packets)
	if packets != 0 {
		t.Errorf("%d pods got %d datagrams and connections past their policy at start", pods, packets)
	}
}

// adopt installs podwall beside running pods and has a policy enforced on all of them, without a restart of any.
func adopt(t *testing.T, c *cluster) {
	const count = 20
	ns := c.namespace(t)
	clients := c.start(t, podSpec{namespace: ns, name: "client1", node: "node1"}, podSpec{namespace: ns, name: "client2", node: "node2"})
	specs := make([]podSpec, count)
	for i := range specs {
		specs[i] = podSpec{namespace: ns, name: fmt.Sprintf("old-%d", i), node: clients[i%2].node, labels: map[string]string{"role": "old"}}
	}
	old := c.start(t, specs...)
	ids := map[string]string{}
	for _, p := range old {
		ids[p.name] = p.object(t).Status.ContainerStatuses[0].ContainerID
		for _, client := range clients {
			p.send(t, p.name, client.addr(sink), 20*time.Millisecond)
			client.send(t, client.name, p.addr(sink), 20*time.Millisecond)
		}
	}
	// arriving returns how many of the streams have brought something since a moment.
	arriving := func(since time.Time) (int, time.Time) {
		n, last := 0, time.Time{}
		note := func(s stream) {
			at := time.Unix(0, s.Last)
			if at.After(since) {
				n++
			}
			if at.After(last) {
				last = at
			}
		}
		for _, p := range old {
			for _, s := range p.streams(t) {
				note(s)
			}
		}
		for _, client := range clients {
			for _, s := range client.streams(t) {
				note(s)
			}
		}
		return n, last
	}
	const all = 2 * 2 * count // every pod to and from both clients
	begin := time.Now()
	c.install(t)
	c.figure(t, "podwall deployed and ready on 2 nodes in %.1f s", time.Since(begin).Seconds())
	mark := time.Now()
	time.Sleep(time.Second)
	if n, _ := arriving(mark); n != all {
		t.Errorf("after the installation %d of %d streams arrive: it cut traffic that no policy forbids", n, all)
	}
	c.policy(t, ns, "deny-all", denyAll(match("role=old"), bothWays))
	answered := time.Now()
	time.Sleep(3 * time.Second)
	n, last := arriving(answered.Add(2 * time.Second))
	if n > 0 {
		t.Errorf("%d of %d streams still arrive 2 s after the deny-all\n%s", n, all, c.daemonLogs(t))
	}
	restarted := 0
	for _, p := range old {
		s := p.object(t).Status.ContainerStatuses[0]
		if s.RestartCount != 0 || s.ContainerID != ids[p.name] {
			restarted++
		}
	}
	if restarted > 0 {
		t.Errorf("%d of %d pods were restarted", restarted, count)
	}
	c.figure(t, "deny-all on %d adopted pods: %d of %d streams before, %d after; last packet %v after the API's answer; %d restarted",
		count, all, all, n, max(0, last.Sub(answered)).Round(time.Millisecond), restarted)
}

const conflist = "/etc/cni/net.d/10-pods.conflist"

// overwrite puts the main CNI's own version of the conflist back, as such plugins do: a new file and a rename.
func (c *cluster) overwrite(t *testing.T, node string) {
	t.Helper()
	n := c.nodes[node]
	if err := os.WriteFile(n.Path(conflist+".tmp"), c.originalConflist(t, node), 0o644); err != nil { //nolint:gosec // as CNI plugins write it
		t.Fatal(err)
	}
	if err := os.Rename(n.Path(conflist+".tmp"), n.Path(conflist)); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) originalConflist(t *testing.T, node string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(c.lab.Dir, "run", node+".conflist"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// hasEntry tells whether the node's conflist is valid and names podwall.
func (c *cluster) hasEntry(t *testing.T, node string) error {
	t.Helper()
	data, err := os.ReadFile(c.nodes[node].Path(conflist))
	if err != nil {
		return err
	}
	var list struct {
		Plugins []struct {
			Type string `json:"type"`
		} `json:"plugins"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return err
	}
	for _, p := range list.Plugins {
		if p.Type == "podwall" {
			return nil
		}
	}
	return fmt.Errorf("%s has no entry of type podwall", conflist)
}

// freeze stops podwall's daemon on a node without ending it, and returns what lets it go on.
func (c *cluster) freeze(t *testing.T, node string) func() {
	t.Helper()
	pid, err := c.nodes[node].Run(t.Context(), "pgrep", "-x", "podwalld")
	if err != nil {
		t.Fatal(err)
	}
	signal := func(s string) {
		if _, err := c.nodes[node].Run(t.Context(), "kill", s, strings.TrimSpace(pid)); err != nil {
			t.Error(err)
		}
	}
	signal("-STOP")
	return func() { signal("-CONT") }
}

// conflistOverwritten has the main CNI take podwall out of the conflist: it comes back, and a pod that started in between is
// enforced all the same.
func conflistOverwritten(t *testing.T, c *cluster) {
	var times []time.Duration
	// podwalld answers three times at once; after that it takes the other program for a rival and slows down.
	for _, node := range []string{"node1", "node1", "node2", "node2", "node2"} {
		c.overwrite(t, node)
		begin := time.Now()
		eventually(t, 30*time.Second, "the entry to come back", func() error { return c.hasEntry(t, node) })
		times = append(times, time.Since(begin))
		time.Sleep(500 * time.Millisecond)
	}
	c.figure(t, "entry back after: %s (looked every 20 ms)", spread(times))

	ns := c.namespace(t)
	peer := c.start(t, podSpec{namespace: ns, name: "peer", node: "node2"})[0]
	c.policy(t, ns, "silence", denyAll(match("role=gap"), bothWays))
	thaw := c.freeze(t, "node1")
	c.overwrite(t, "node1")
	time.Sleep(2 * time.Second) // the runtime reads it
	gap := c.create(t, podSpec{namespace: ns, name: "gap", node: "node1", labels: map[string]string{"role": "gap"}})
	gap.waitRunning(t, time.Minute)
	gap.send(t, "gap", peer.addr(sink), time.Millisecond)
	time.Sleep(500 * time.Millisecond)
	leaked := peer.streams(t)["gap"].Count
	if leaked == 0 {
		t.Error("nothing arrives from a pod that podwall does not know: the test proves nothing")
	}
	begin := time.Now()
	thaw()
	eventually(t, 30*time.Second, "the entry to come back", func() error { return c.hasEntry(t, "node1") })
	back := time.Since(begin)
	gap.denied(t, peer.addr(web))
	last := time.Unix(0, peer.streams(t)["gap"].Last)
	if time.Since(last) < time.Second {
		t.Error("the stream of the pod that started in the gap still arrives")
	}
	if st := c.podStatus(t, gap); st.Attachment != "" || st.State != "enforced" {
		t.Errorf("podwalld calls the pod %+v, want enforced and without an attachment", st)
	}
	c.figure(t, "a pod started in the gap: adopted, its last packet %v after the daemon went on; entry back after %v",
		max(0, last.Sub(begin)).Round(time.Millisecond), back.Round(time.Millisecond))
}

// podStatus is one line of `podwalld pods`.
type podStatus struct {
	Namespace  string   `json:"namespace"`
	Name       string   `json:"name"`
	State      string   `json:"state"`
	Ingress    []string `json:"ingress"`
	Egress     []string `json:"egress"`
	Attachment string   `json:"attachment"`
}

func (c *cluster) podStatus(t *testing.T, p *pod) podStatus {
	t.Helper()
	var list []podStatus
	out := c.podwalld(t, p.node, "pods", "-o", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("podwalld pods: %v\n%s", err, out)
	}
	for _, s := range list {
		if s.Namespace == p.namespace && s.Name == p.name {
			return s
		}
	}
	t.Fatalf("podwalld on %s does not know %s", p.node, p.ref())
	return podStatus{}
}

// uninstall leaves nodes as they were: no entry, no tables, and pods start.
func uninstall(t *testing.T, c *cluster) {
	ns := c.namespace(t)
	specs := []podSpec{
		{namespace: ns, name: "a", node: "node1", labels: map[string]string{"role": "closed"}},
		{namespace: ns, name: "b", node: "node2", labels: map[string]string{"role": "closed"}},
	}
	old := c.start(t, specs...)
	c.policy(t, ns, "deny-all", denyAll(match("role=closed"), bothWays))
	old[0].denied(t, old[1].addr(web))
	begin := time.Now()
	c.uninstall(t)
	took := time.Since(begin)
	same := 0
	for name, n := range c.nodes {
		data, err := os.ReadFile(n.Path(conflist))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(data, c.originalConflist(t, name)) {
			same++
		} else {
			t.Errorf("%s: the conflist is not as before:\n%s", name, data)
		}
		tables, err := n.Run(t.Context(), "nft", "list", "tables")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(tables, "podwall") {
			t.Errorf("%s: podwall's tables are still there:\n%s", name, tables)
		}
	}
	old[0].allowed(t, old[1].addr(web)) // nobody enforces the policy any more
	fresh := c.start(t, podSpec{namespace: ns, name: "c", node: "node1"}, podSpec{namespace: ns, name: "d", node: "node2"})
	fresh[0].allowed(t, fresh[1].addr(web))
	c.figure(t, "uninstalled in %.1f s: %d of 2 conflists byte for byte as before, tables gone, new pods start", took.Seconds(), same)
}
