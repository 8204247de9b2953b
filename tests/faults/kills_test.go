package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/agentapi"
)

// defect is what a harness must notice.
type defect string

const (
	sound         defect = ""
	tablesDeleted defect = "tables deleted before each start" // as an enforcer that begins by cleaning up
	wall          defect = "denied for a moment before each start"
)

// wallRules break what is established, refuse what is new and lose single datagrams.
const wallRules = `add table inet wall
add chain inet wall forward { type filter hook forward priority -10; policy accept; }
add rule inet wall forward ct state established meta l4proto tcp reject with tcp reset
add rule inet wall forward drop`

// killCounts are the figures of one run.
type killCounts struct {
	defect                         defect
	cni                            string
	cycles, kill9, terms, standbys int
	ready                          int // cycles in which a daemon got ready before its end
	denied, delivered              int
	singles, lost                  int // allowed new flows of one datagram each
	adds, failed, flips            int
	tr                             *traffic
	left                           leftover
	leftLines                      []string // of the ruleset
}

func (c *killCounts) String() string {
	return fmt.Sprintf("kills %s%s: %d cycles (%d kill -9, %d SIGTERM, %d of them with a standby; %d while serving): denied packets sent %d, delivered %d; "+
		"established connections %d, exchanges %d, broken %d, slowest %s; new connections %d, refused %d; single datagrams %d, lost %d; "+
		"%d ADDs, %d failed first and were retried; %d policy flips; leaked: chains %d, set elements %d, other lines %d, attachment files %d",
		c.cni, c.defect.suffix(), c.cycles, c.kill9, c.terms, c.standbys, c.ready, c.denied, c.delivered, c.tr.established.Load(), c.tr.exchanges.Load(), c.tr.broken.Load(),
		time.Duration(c.tr.slowestNanoseconds.Load()).Round(time.Millisecond), c.tr.opened.Load(), c.tr.refused.Load(), c.singles, c.lost, c.adds, c.failed, c.flips,
		c.left.chains, c.left.elements, c.left.other, c.left.files)
}

func (d defect) suffix() string {
	if d == sound {
		return ""
	}
	return " (control: " + string(d) + ")"
}

// TestKills holds that no end of podwalld, at whatever instant, opens what is denied, breaks what is allowed or leaves anything
// behind, while pods come and go and policies change.
func TestKills(t *testing.T) {
	t.Parallel()
	for _, cni := range []string{"bridge", "ptp"} {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			c := killing(t, cni, *kills, sound)
			report(t, c.String())
			c.mustHaveRun(t)
			if c.delivered > 0 {
				t.Errorf("%d of %d denied packets were delivered", c.delivered, c.denied)
			}
			if broken, refused := c.tr.broken.Load(), c.tr.refused.Load(); broken > 0 || refused > 0 || c.lost != 0 {
				t.Errorf("allowed: %d established connections broken, %d new ones refused, %d datagrams lost; first: %s", broken, refused, c.lost, c.tr.why())
			}
			if c.left != (leftover{}) {
				t.Errorf("left behind: %s: %q", c.left, c.leftLines)
			}
		})
	}
	t.Run("control", func(t *testing.T) {
		t.Parallel()
		t.Run("open", func(t *testing.T) {
			t.Parallel()
			c := killing(t, "bridge", min(*kills, 5), tablesDeleted)
			report(t, c.String())
			c.mustHaveRun(t)
			if c.delivered == 0 {
				t.Error("the tables were deleted and nothing denied was seen to arrive: the harness is blind")
			}
			// No defect of podwall's: what was established by the rules before they were deleted is allowed by them afterwards.
			if broken := c.tr.broken.Load(); broken > 0 {
				t.Errorf("%d of %d allowed established connections broken by the deletion of the tables; first: %s", broken, c.tr.established.Load(), c.tr.why())
			}
		})
		t.Run("broken", func(t *testing.T) {
			t.Parallel()
			c := killing(t, "ptp", min(*kills, 5), wall)
			report(t, c.String())
			c.mustHaveRun(t)
			if c.tr.broken.Load() == 0 || c.tr.refused.Load() == 0 || c.lost == 0 {
				t.Errorf("all traffic was denied for moments, and the harness has seen %d broken connections, %d refused ones and %d lost datagrams",
					c.tr.broken.Load(), c.tr.refused.Load(), c.lost)
			}
		})
	})
}

// mustHaveRun fails if there was nothing of what was to be counted.
func (c *killCounts) mustHaveRun(t *testing.T) {
	t.Helper()
	if c.denied == 0 || c.tr.exchanges.Load() == 0 || c.tr.opened.Load() == 0 || c.singles == 0 || c.adds == 0 || c.flips == 0 || c.ready == 0 {
		t.Errorf("the run shows nothing: %s", c)
	}
}

// killPolicies are the states that policies change between. In each, client and caged may reach servers and guest may not, and
// caged may reach nothing else.
func killPolicies(clients ...*testnet.Pod) []string {
	const caged = "{podSelector: {matchLabels: {app: caged}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: server}}}]}]}"
	from := func(peers string) string {
		return "{podSelector: {matchLabels: {app: server}}, ingress: [{from: [" + peers + "]}]}"
	}
	const byLabel = "{podSelector: {matchLabels: {role: client}}}"
	var blocks []string
	for i := range 24 { // more than podwall writes as rules: an interval set
		blocks = append(blocks, fmt.Sprintf("{ipBlock: {cidr: 172.16.%d.0/24}}", 2*i))
	}
	for _, c := range clients {
		for _, a := range c.Addrs {
			blocks = append(blocks, fmt.Sprintf("{ipBlock: {cidr: %s/%d}}", a, a.BitLen()))
		}
	}
	states := []string{
		policyManifest("p", from(byLabel)),
		policyManifest("p", from(byLabel+", {podSelector: {matchLabels: {role: friend}}}")),
		policyManifest("p", from(byLabel)) + policyManifest("closed", "{podSelector: {matchLabels: {app: server}}}"),
		policyManifest("p", from(strings.Join(blocks, ", "))),
		policyManifest("another", from("{podSelector: {matchExpressions: [{key: role, operator: In, values: [client, friend]}]}}")),
	}
	for i := range states {
		states[i] += policyManifest("caged", caged)
	}
	return states
}

// churners is how many pods come and go at a time with cnitool, and as many with the plugin alone.
const churners = 2

// killing runs the traffic, the churn and the flips while podwalld is ended n times.
func killing(t *testing.T, cni string, n int, d defect) *killCounts {
	t.Helper()
	ctx := t.Context()
	pods := podManifest("client", "role: client") + podManifest("guest", "role: guest") + podManifest("server", "app: server") + podManifest("caged", "app: caged, role: client")
	for i := range churners {
		pods += podManifest(churnName(i), "app: server") + podManifest(slotName(i), "app: server")
	}
	node := newNode(t, cni, map[string]string{"pods.yaml": pods, "policy.yaml": policyManifest("p", "{podSelector: {}, policyTypes: [Ingress, Egress]}")})
	current, err := launch(node)
	if err != nil {
		t.Fatal(err)
	}
	k := &killer{node: node, current: current, killCounts: &killCounts{defect: d, cni: cni, tr: newTraffic(ctx)}}
	t.Cleanup(func() { k.endAll() })
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v\n%s", err, k.killCounts)
		}
	}
	must(current.ready(ctx))
	client, guest, caged, server := add(t, node, "client"), add(t, node, "guest"), add(t, node, "caged"), add(t, node, "server", testnet.TCP(port))
	external := node.Outside[testnet.External]
	states := killPolicies(client, caged)
	must(node.WriteManifest("policy.yaml", states[0]))
	must(await(ctx, "client may reach server", func() (bool, error) {
		results, err := node.Observe(ctx, testnet.Matrix{{From: client.Name, To: server.Name, Port: testnet.TCP(port), Want: true}}, testnet.IPv4)
		return err == nil && results[0].OK(), err
	}))
	before, err := look(ctx, node)
	must(err)

	atServer, err := openTap(server.Host)
	must(err)
	atExternal, err := openTap(external)
	must(err)
	var denied, singles atomic.Int64
	tr := k.tr
	must(tr.establish(client.Host, server.Host, 2))
	must(tr.establish(caged.Host, server.Host, 1))
	for _, proto := range []uint8{udp, tcp} {
		tr.flood(ctx, guest.Host, server.Host, proto, 3*time.Millisecond, &denied)
		tr.flood(ctx, caged.Host, external, proto, 3*time.Millisecond, &denied)
	}
	tr.flood(ctx, client.Host, server.Host, udp, 4*time.Millisecond, &singles)
	tr.connect(client.Host, server.Host, 20*time.Millisecond)

	// Pods and policies change until the last end of a daemon, and what has begun is finished after that.
	stop := make(chan struct{})
	finish := sync.OnceFunc(func() { close(stop) })
	var changes errgroup.Group
	t.Cleanup(func() { // when something fails on the way
		finish()
		_ = errors.Join(changes.Wait(), tr.stop())
	})
	var delivered, adds, failed, flipped atomic.Int64
	ch := &churner{node: node, tr: tr, client: client.Host, guest: guest.Host, denied: &denied, delivered: &delivered, adds: &adds, failed: &failed, stop: stop}
	var slots []*slot
	for i := range churners {
		bridge := ""
		if cni == "bridge" {
			bridge = "cni0" // of the sample conflist
		}
		s, err := newSlot(node, i, bridge)
		must(err)
		slots = append(slots, s)
		changes.Go(func() error { return ch.byRuntime(ctx, churnName(i)) })
		changes.Go(func() error { return ch.byPlugin(ctx, s) })
	}
	changes.Go(func() error {
		for last := -1; ; {
			select {
			case <-stop:
				return node.WriteManifest("policy.yaml", states[0])
			case <-time.After(time.Duration(rand.IntN(150)) * time.Millisecond):
			}
			next := rand.IntN(len(states))
			if next == last {
				continue
			}
			last = next
			if err := node.WriteManifest("policy.yaml", states[next]); err != nil {
				return err
			}
			flipped.Add(1)
		}
	})
	var killErr error
	for range n {
		if killErr = k.cycle(ctx); killErr != nil {
			break
		}
	}
	if killErr == nil {
		killErr = k.current.ready(ctx)
	}
	finish()
	must(errors.Join(changes.Wait(), killErr))
	must(tr.stop())
	k.denied, k.singles, k.adds, k.failed, k.flips = int(denied.Load()), int(singles.Load()), int(adds.Load()), int(failed.Load()), int(flipped.Load())
	k.lost = atServer.missing(ctx, k.singles, client.Host)
	must(errors.Join(atServer.close(), atExternal.close()))
	k.delivered = int(delivered.Load())
	for _, proto := range []uint8{udp, tcp} {
		k.delivered += atServer.count(proto, guest.Host) + atExternal.count(proto, caged.Host)
	}

	// Not connections (state.flows): the senders go on until a pod's DEL has returned, and what they send to an address that is
	// nobody's is nobody's to drop. On a bridge it passes up to the neighbour lookup and has an entry for as long as the kernel
	// likes. TestAttachments, whose pods are sent nothing after their DEL, counts them.
	// Judged by a daemon that adopts what all the others have left, and by one that finds nothing.
	k.left, err = k.leftSince(ctx, before)
	must(err)
	must(k.restart(ctx))
	must(inSync(ctx, node))
	adopted, err := look(ctx, node)
	must(err)
	must(k.current.end(syscall.SIGKILL))
	must(deleteTables(ctx, node))
	if k.current, err = launch(node); err != nil {
		t.Fatal(err)
	}
	must(k.current.ready(ctx))
	fresh, err := look(ctx, node)
	must(err)
	if l := adopted.since(fresh); l != (leftover{}) {
		t.Errorf("a daemon that finds nothing renders something else: %s; %q, %q", l, subtract(adopted.rules, fresh.rules), subtract(fresh.rules, adopted.rules))
	}

	// The same count, of a pod that is still there.
	must(slots[0].connect())
	must(slots[0].plugin(ctx, "ADD"))
	after, err := look(ctx, node)
	must(err)
	if l := after.since(before); l.chains == 0 || l.elements == 0 || l.files == 0 {
		t.Errorf("a pod that was not deleted is not seen to be left: %s", l)
	}
	must(slots[0].plugin(ctx, "DEL"))
	for _, s := range slots {
		must(s.close())
	}
	return k.killCounts
}

func churnName(i int) string { return fmt.Sprintf("churn%d", i) }

// killer ends podwalld and starts it again.
type killer struct {
	*killCounts
	node    *testnet.Node
	current *daemon
	standby *daemon
}

func (k *killer) endAll() {
	for _, d := range []*daemon{k.current, k.standby} {
		if d != nil {
			_ = d.cmd.Process.Kill()
			<-d.exited
		}
	}
}

// cycle ends the daemon at an instant of its start, in half of the cycles, or of its life, and starts another one: before that
// end, as an update with a surge does, or some time after it.
func (k *killer) cycle(ctx context.Context) error {
	k.cycles++
	if rand.IntN(2) == 0 || k.cycles == 1 {
		if err := k.current.ready(ctx); err != nil {
			return err
		}
		k.ready++
	}
	if err := pause(ctx, rand.N(300*time.Millisecond)); err != nil {
		return err
	}
	sig := syscall.SIGKILL
	if rand.IntN(2) == 0 {
		sig = syscall.SIGTERM
		k.terms++
	} else {
		k.kill9++
	}
	var err error
	if k.defect == sound && k.cycles%4 == 3 {
		k.standbys++
		if k.standby, err = launch(k.node); err != nil {
			return err
		}
		if err := pause(ctx, rand.N(300*time.Millisecond)); err != nil {
			return err
		}
		if err := k.current.end(sig); err != nil {
			return err
		}
		k.current, k.standby = k.standby, nil
		return nil
	}
	if err := k.current.end(sig); err != nil {
		return err
	}
	switch k.defect {
	case tablesDeleted:
		err = deleteTables(ctx, k.node)
	case wall:
		if _, err = k.node.Host.Run(ctx, "nft", wallRules); err == nil {
			if err = pause(ctx, 100*time.Millisecond); err == nil {
				_, err = k.node.Host.Run(ctx, "nft", "delete table inet wall")
			}
		}
	}
	if err != nil {
		return err
	}
	if err := pause(ctx, rand.N(200*time.Millisecond)); err != nil {
		return err
	}
	k.current, err = launch(k.node)
	return err
}

func (k *killer) restart(ctx context.Context) error {
	if err := k.current.end(syscall.SIGKILL); err != nil {
		return err
	}
	var err error
	if k.current, err = launch(k.node); err != nil {
		return err
	}
	return k.current.ready(ctx)
}

// leftSince waits until nothing is left, and returns what is when patience ends.
func (k *killer) leftSince(ctx context.Context, before state) (leftover, error) {
	var left leftover
	var now state
	err := await(ctx, "nothing is left", func() (bool, error) {
		var err error
		if now, err = look(ctx, k.node); err != nil {
			return false, err
		}
		left = now.since(before)
		return left == (leftover{}), nil
	})
	if left != (leftover{}) {
		k.leftLines = subtract(now.rules, before.rules)
		return left, nil
	}
	return left, err
}

// deleteTables deletes podwall's tables, if they are there.
func deleteTables(ctx context.Context, n *testnet.Node) error {
	list, err := n.Host.Run(ctx, "nft", "list", "tables")
	if err != nil {
		return err
	}
	var commands []string
	for line := range strings.Lines(list) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[2] == "podwall" {
			commands = append(commands, "delete "+strings.Join(fields, " "))
		}
	}
	if len(commands) == 0 {
		return nil
	}
	_, err = n.Host.Run(ctx, "nft", strings.Join(commands, "; "))
	return err
}

// churner lets pods come and go. Each is a server, which guest must never reach.
type churner struct {
	node                            *testnet.Node
	tr                              *traffic
	client, guest                   *testnet.Host
	denied, delivered, adds, failed *atomic.Int64
	stop                            <-chan struct{}
}

func (c *churner) stopped() bool {
	select {
	case <-c.stop:
		return true
	default:
		return false
	}
}

// byRuntime adds pods with cnitool, in a fresh sandbox each.
func (c *churner) byRuntime(ctx context.Context, name string) error {
	for !c.stopped() {
		p, err := c.node.NewPod("default", name, "")
		if err != nil {
			return err
		}
		del := func() error {
			_, err := c.node.CNITool(ctx, "del", p)
			return err
		}
		add := func() error {
			err := c.node.Add(ctx, p)
			if err != nil && !strings.Contains(err.Error(), `plugin type="podwall" failed (add)`) {
				return fmt.Errorf("cnitool fails by something else than podwall: %w", err)
			}
			if err != nil {
				return &agentapi.Error{Code: agentapi.CodeTryAgainLater, Msg: err.Error()} // cnitool does not tell the code
			}
			return nil
		}
		if err := c.live(ctx, p.Host, add, del); err != nil {
			return err
		}
		if err := c.node.RemovePod(p); err != nil {
			return err
		}
	}
	return nil
}

// byPlugin adds pods with the plugin alone, and judges its codes.
func (c *churner) byPlugin(ctx context.Context, s *slot) error {
	for !c.stopped() {
		add := func() error { return errors.Join(s.connect(), s.plugin(ctx, "ADD")) }
		del := func() error { return errors.Join(s.plugin(ctx, "DEL"), s.disconnect()) }
		if err := c.live(ctx, s.pod.Host, add, del); err != nil {
			return err
		}
	}
	return nil
}

// live is the life of a pod: it is added until that succeeds, with a DEL after each failure as a runtime does; from then to its
// end guest tries to reach it, and client does.
func (c *churner) live(ctx context.Context, pod *testnet.Host, add, del func() error) error {
	var since time.Time // the last end of a daemon
	for {
		err := add()
		if err == nil {
			break
		}
		failure, ok := errors.AsType[*agentapi.Error](err)
		if !ok || failure.Code != agentapi.CodeTryAgainLater {
			return fmt.Errorf("ADD of %s: %w, want success or code %d", pod.Name, err, agentapi.CodeTryAgainLater)
		}
		c.failed.Add(1)
		if err := del(); err != nil {
			return fmt.Errorf("DEL of %s after an ADD that failed: %w", pod.Name, err)
		}
		// No daemon may have lived for long enough, on a machine that is busy. The last one does.
		switch {
		case !c.stopped():
		case since.IsZero():
			since = time.Now()
		case time.Since(since) > 2*patience:
			return fmt.Errorf("ADD of %s: %w, for %s and nobody ends the daemon", pod.Name, failure, 2*patience)
		}
	}
	c.adds.Add(1)
	p, err := openTap(pod)
	if err != nil {
		return err
	}
	attack, halt := context.WithCancel(ctx)
	defer halt()
	for _, proto := range []uint8{udp, tcp} {
		c.tr.flood(attack, c.guest, pod, proto, 5*time.Millisecond, c.denied)
	}
	var sent atomic.Int64
	c.tr.flood(attack, c.client, pod, udp, 5*time.Millisecond, &sent)
	err = await(ctx, c.client.Name+" reaches "+pod.Name, func() (bool, error) { return p.count(udp, c.client) > 0, nil })
	err = errors.Join(err, pause(ctx, rand.N(100*time.Millisecond)), del())
	halt()
	err = errors.Join(err, p.close())
	for _, proto := range []uint8{udp, tcp} {
		c.delivered.Add(int64(p.count(proto, c.guest)))
	}
	return err
}
