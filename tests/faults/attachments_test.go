package faults

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/policy"
)

// atOnce is how many pods are added at a time.
const atOnce = 50

// A process may have more of these at the end than at the beginning without having lost any: the Go runtime keeps threads that it once
// needed, one for each request at most that was in a system call at once, and memory that it may need again. What is lost shows in the
// goroutines, of which there may not be one more.
const (
	threadSlack = atOnce
	rssSlack    = 24 << 20
)

// usage is what a process holds of its kernel.
type usage struct{ goroutines, threads, files, sockets, rss int }

func (u usage) String() string {
	return fmt.Sprintf("goroutines %d, threads %d, files %d of which sockets %d, RSS %.1f MiB", u.goroutines, u.threads, u.files, u.sockets, float64(u.rss)/(1<<20))
}

func usageOf(ctx context.Context, n *testnet.Node, pid int) (usage, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	var u usage
	var err error
	if u.goroutines, err = goroutines(ctx, n, dir); err != nil {
		return u, err
	}
	threads, err := os.ReadDir(filepath.Join(dir, "task"))
	if err != nil {
		return u, err
	}
	u.threads = len(threads)
	files, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return u, err
	}
	for _, f := range files {
		target, err := os.Readlink(filepath.Join(dir, "fd", f.Name()))
		if err != nil {
			continue // closed since
		}
		u.files++
		if strings.HasPrefix(target, "socket:") {
			u.sockets++
		}
	}
	statm, err := os.ReadFile(filepath.Join(dir, "statm"))
	if err != nil {
		return u, err
	}
	if _, err := fmt.Sscanf(string(statm), "%d %d", new(int), &u.rss); err != nil {
		return u, fmt.Errorf("parse statm of podwalld: %w", err)
	}
	u.rss *= os.Getpagesize()
	return u, nil
}

// goroutines asks a daemon how many it has, by the abstract socket that answers the probes of its container.
func goroutines(ctx context.Context, n *testnet.Node, dir string) (int, error) {
	pid, err := os.Readlink(filepath.Join(dir, "ns", "pid"))
	if err != nil {
		return 0, err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var conn net.Conn
		err := n.Host.In(func() error {
			var err error
			conn, err = (&net.Dialer{}).DialContext(ctx, "unix", "@podwalld-"+policy.ID("health", n.Socket(), pid))
			return err
		})
		return conn, err
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://podwalld/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			return strconv.Atoi(text)
		}
	}
	return 0, errors.New("podwalld's metrics have no go_goroutines")
}

// TestAttachments holds that pods that come and go, many at a time, leave nothing: not in the tables, the registry and the
// connections, and not in the daemon.
func TestAttachments(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"bridge", "ptp"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			attaching(t, kind, *attachments)
		})
	}
}

func attaching(t *testing.T, kind string, total int) {
	t.Helper()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	pods := ""
	for i := range atOnce {
		pods += podManifest(slotName(i), fmt.Sprintf("app: app%d, role: role%d", i%5, i%3))
	}
	policies := ""
	for i := range 5 {
		policies += policyManifest(fmt.Sprintf("p%d", i), fmt.Sprintf(
			"{podSelector: {matchLabels: {app: app%d}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {matchLabels: {role: role%d}}}]}], egress: [{}]}", i, i%3))
	}
	node := newNode(t, kind, map[string]string{"pods.yaml": pods, "policy.yaml": policies})
	bridge := ""
	if kind == "bridge" {
		bridge = "cni0"
		_, err := node.Host.Run(ctx, "ip", "link", "add", bridge, "type", "bridge")
		must(err)
		_, err = node.Host.Run(ctx, "ip", "link", "set", bridge, "up")
		must(err)
	}
	d, err := launch(node)
	must(err)
	d.stopAfter(t)
	must(d.ready(ctx))
	slots := make([]*slot, atOnce)
	for i := range slots {
		slots[i], err = newSlot(node, i, bridge)
		must(err)
	}
	t.Cleanup(func() {
		var g errgroup.Group
		g.SetLimit(8)
		for _, s := range slots {
			g.Go(s.close)
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
	before, err := lookWithFlows(ctx, node)
	must(err)
	settled := func() leftover {
		t.Helper()
		var now state
		err := await(ctx, "nothing is left", func() (bool, error) {
			var err error
			now, err = lookWithFlows(ctx, node)
			return err == nil && now.since(before) == leftover{}, err
		})
		if err != nil {
			t.Errorf("%v: %q", err, subtract(now.rules, before.rules))
		}
		return now.since(before)
	}

	// One round before the count: the daemon then has what it needs for so many at a time.
	w := &wave{slots: slots, to: netip.AddrPortFrom(node.Outside[testnet.External].Addrs[testnet.IPv4], port)}
	must(w.run(ctx, atOnce))
	settled()
	begin, err := usageOf(ctx, node, d.cmd.Process.Pid)
	must(err)
	w.adds.Store(0)
	w.dels.Store(0)

	start := time.Now()
	must(w.run(ctx, total))
	took := time.Since(start)
	left := settled()
	must(inSync(ctx, node))
	var end usage
	err = await(ctx, "podwalld holds no more files and goroutines than before", func() (bool, error) {
		var err error
		end, err = usageOf(ctx, node, d.cmd.Process.Pid)
		return err == nil && end.files <= begin.files && end.sockets <= begin.sockets && end.goroutines <= begin.goroutines, err
	})
	if err != nil {
		t.Errorf("%v: %s, was %s", err, end, begin)
	}
	if end.threads > begin.threads+threadSlack || end.rss > begin.rss+rssSlack {
		t.Errorf("podwalld has grown: %s, was %s", end, begin)
	}

	// The same counts of one pod without a DEL, and of connections to the daemon that are kept.
	last := slots[0]
	must(errors.Join(last.connect(), last.plugin(ctx, "ADD"), w.talk(last)))
	undeleted, err := lookWithFlows(ctx, node)
	must(err)
	one := undeleted.since(before)
	if one.chains == 0 || one.elements == 0 || one.files != 1 || one.flows == 0 {
		t.Errorf("a pod that was not deleted is not seen to be left: %s", one)
	}
	must(errors.Join(last.plugin(ctx, "DEL"), last.disconnect()))
	const kept = 5
	for range kept {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", node.Socket())
		must(err)
		defer conn.Close()
	}
	var open usage
	must(await(ctx, "connections that are kept are seen in /proc", func() (bool, error) {
		var err error
		open, err = usageOf(ctx, node, d.cmd.Process.Pid)
		return err == nil && open.sockets >= end.sockets+kept && open.goroutines >= end.goroutines+kept, err
	}))
	settled()

	report(t, fmt.Sprintf("attachments %s (plugin executed with prevResult, real veths): %d ADDs, %d DELs, %d pods gone without DEL, %d at a time, in %s (%.0f/s): "+
		"left: %s; podwalld before: %s; after: %s; control, one DEL left out: %s; control, %d connections kept: sockets +%d, goroutines +%d",
		kind, w.adds.Load(), w.dels.Load(), w.adds.Load()-w.dels.Load(), atOnce, took.Round(time.Millisecond), float64(total)/took.Seconds(), left, begin, end, one, kept, open.sockets-end.sockets, open.goroutines-end.goroutines))
	if int(w.adds.Load()) != total || w.dels.Load() == 0 {
		t.Errorf("the run shows nothing: %d ADDs, %d DELs", w.adds.Load(), w.dels.Load())
	}
}

// lookWithFlows is look where nobody sends anything to a pod that is gone.
func lookWithFlows(ctx context.Context, n *testnet.Node) (state, error) {
	s, err := look(ctx, n)
	if err != nil {
		return s, err
	}
	s.flows, err = countFlows(ctx, n)
	return s, err
}

// wave adds and deletes pods in all slots at once.
type wave struct {
	slots      []*slot
	to         netip.AddrPort // every pod sends something there, which makes a connection that must not outlive it
	adds, dels atomic.Int64
}

// talk sends something from a slot.
func (w *wave) talk(s *slot) error {
	return s.pod.In(func() error { return firstPacket(udp, w.to) })
}

// withoutDel is which of the pods just vanish, as when a runtime crashes: the daemon has to find out by itself.
const withoutDel = 10

func (w *wave) run(ctx context.Context, total int) error {
	g, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for _, s := range w.slots {
		g.Go(func() error {
			for i := next.Add(1); i <= int64(total) && ctx.Err() == nil; i = next.Add(1) {
				if err := errors.Join(s.connect(), s.plugin(ctx, "ADD"), w.talk(s)); err != nil {
					return err
				}
				w.adds.Add(1)
				if i%withoutDel != 0 {
					if err := s.plugin(ctx, "DEL"); err != nil {
						return err
					}
					w.dels.Add(1)
				}
				if err := s.disconnect(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}
