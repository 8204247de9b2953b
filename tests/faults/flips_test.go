package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/podwall/podwall/internal/testnet"
)

// flipDefect is a way to replace a policy that is not one step.
type flipDefect string

const (
	removedFirst flipDefect = "removed, then written"
	emptiedFirst flipDefect = "emptied, then written"
)

// betweenSteps is how long the defect shows.
const betweenSteps = 50 * time.Millisecond

// flipCounts are the figures of one run.
type flipCounts struct {
	cni              string
	defect           flipDefect
	flips            int
	singles, lost    int // datagrams of those who are in both lists
	denied, through  int // packets of the one who is in none
	opened, refused  int // connections of those who are in both
	took             time.Duration
	slowest, slowSum time.Duration // from the rename to the first packet of who was let in by it
	why              string
}

// wrong counts a datagram that arrived twice as one that was lost.
func (c *flipCounts) wrong() int { return max(c.lost, -c.lost) + c.through + c.refused }

func (c *flipCounts) String() string {
	control := ""
	if c.defect != "" {
		control = " (control: " + string(c.defect) + ")"
	}
	return fmt.Sprintf("flips %s%s: %d flips in %s, in effect after %s on average and %s at most: in both lists: datagrams %d, lost %d, connections %d, refused %d; "+
		"in none: packets %d, got through %d; wrong verdicts %d", c.cni, control, c.flips, c.took.Round(time.Millisecond), (c.slowSum / time.Duration(max(1, c.flips))).Round(time.Millisecond),
		c.slowest.Round(time.Millisecond), c.singles, c.lost, c.opened, c.refused, c.denied, c.through, c.wrong())
}

// TestFlips holds that replacing a policy is one step: who may before and after is never refused, who may not never gets through.
func TestFlips(t *testing.T) {
	t.Parallel()
	for _, cni := range []string{"bridge", "ptp"} {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			c := flipping(t, cni, *flips, "")
			report(t, c.String())
			if c.wrong() > 0 {
				t.Errorf("%d wrong verdicts; first: %s", c.wrong(), c.why)
			}
		})
	}
	for defect, seen := range map[flipDefect]func(*flipCounts) bool{
		removedFirst: func(c *flipCounts) bool { return c.through > 0 },
		emptiedFirst: func(c *flipCounts) bool { return c.lost > 0 && c.refused > 0 },
	} {
		t.Run("control "+string(defect), func(t *testing.T) {
			t.Parallel()
			c := flipping(t, "bridge", min(*flips, 10), defect)
			report(t, c.String())
			if !seen(c) {
				t.Errorf("the policy was %s, and the harness has not seen it", defect)
			}
		})
	}
}

// flipping replaces the policy of a server n times under traffic: a and b are always in its list, c and d take turns, x never is.
func flipping(t *testing.T, cni string, n int, defect flipDefect) *flipCounts {
	t.Helper()
	ctx := t.Context()
	pods := podManifest("server", "app: server")
	for _, name := range []string{"a", "b", "c", "d", "x"} {
		pods += podManifest(name, "who: "+name)
	}
	list := func(names string) string {
		return policyManifest("p", "{podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchExpressions: [{key: who, operator: In, values: ["+names+"]}]}}]}]}")
	}
	lists := []string{list("a, b, c"), list("a, b, d")}
	const file = "policy.yaml"
	node := newNode(t, cni, map[string]string{"pods.yaml": pods, file: lists[1]})
	d, err := launch(node)
	if err != nil {
		t.Fatal(err)
	}
	d.stopAfter(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(d.ready(ctx))
	server := add(t, node, "server", testnet.TCP(port))
	hosts := map[string]*testnet.Host{}
	for _, name := range []string{"a", "b", "c", "d", "x"} {
		hosts[name] = add(t, node, name).Host
	}
	p, err := openTap(server.Host)
	must(err)

	tr := newTraffic(ctx)
	t.Cleanup(func() { _ = tr.stop() })
	var singles, denied, needles atomic.Int64
	for _, name := range []string{"a", "b"} {
		tr.flood(ctx, hosts[name], server.Host, udp, 3*time.Millisecond, &singles)
		tr.connect(hosts[name], server.Host, 10*time.Millisecond)
	}
	for _, proto := range []uint8{udp, tcp} {
		tr.flood(ctx, hosts["x"], server.Host, proto, 3*time.Millisecond, &denied)
	}
	turns := []*testnet.Host{hosts["c"], hosts["d"]}
	for _, h := range turns {
		tr.flood(ctx, h, server.Host, udp, 5*time.Millisecond, &needles)
	}
	must(await(ctx, "the first list is in effect", func() (bool, error) { return p.count(udp, hosts["d"]) > 0, nil }))

	c := &flipCounts{cni: cni, defect: defect, flips: n}
	start := time.Now()
	for i := range n {
		in := turns[i%2]
		before := p.count(udp, in)
		switch defect {
		case removedFirst:
			must(os.Remove(filepath.Join(node.ManifestDir(), file)))
			must(pause(ctx, betweenSteps))
			before = p.count(udp, in) // the absence of a policy lets everybody in
		case emptiedFirst:
			must(node.WriteManifest(file, list("nobody")))
			must(pause(ctx, betweenSteps))
		}
		begin := time.Now()
		must(node.WriteManifest(file, lists[i%2]))
		must(await(ctx, fmt.Sprintf("flip %d lets %s in", i, in.Name), func() (bool, error) { return p.count(udp, in) > before, nil }))
		took := time.Since(begin)
		c.slowest, c.slowSum = max(c.slowest, took), c.slowSum+took
	}
	c.took = time.Since(start)
	must(tr.stop())
	c.singles, c.denied = int(singles.Load()), int(denied.Load())
	c.lost = p.missing(ctx, c.singles, hosts["a"], hosts["b"])
	must(p.close())
	must(inSync(ctx, node))
	c.through = p.count(udp, hosts["x"]) + p.count(tcp, hosts["x"])
	c.opened, c.refused, c.why = int(tr.opened.Load()), int(tr.refused.Load()), tr.why()
	if c.singles == 0 || c.denied == 0 || c.opened == 0 {
		t.Errorf("the run shows nothing: %s", c)
	}
	return c
}
