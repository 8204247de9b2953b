package kernel

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/generate"
)

var tables = []ruleset.TableID{{Family: ruleset.Inet, Name: "podwall"}, {Family: ruleset.Netdev, Name: "podwall"}}

// testNode is a bed whose node has a ruleset.
type testNode struct {
	*Bed
	kernel  *nft.Kernel
	loaded  ruleset.Ruleset
	commits int
	took    time.Duration // by commits
}

func newNode(t *testing.T) *testNode {
	t.Helper()
	n := &testNode{Bed: newBed(t)}
	n.kernel = newKernel(t, n.Bed)
	return n
}

func newKernel(t *testing.T, b *Bed) *nft.Kernel {
	t.Helper()
	k, err := nft.New(nft.Config{NetNS: b.NetNS()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

// fataler is a testing.T or a rapid.T.
type fataler interface {
	Helper()
	Context() context.Context
	Fatal(...any)
	Fatalf(string, ...any)
}

// load brings the kernel from what is loaded to a ruleset, as the daemon does.
func (n *testNode) load(t fataler, rs ruleset.Ruleset) {
	t.Helper()
	if err := n.diff(t.Context(), rs); err != nil {
		t.Fatalf("%v\nloaded:\n%s\nto be loaded:\n%s", err, n.loaded, rs)
	}
}

// diff commits the difference to what is loaded.
func (n *testNode) diff(ctx context.Context, rs ruleset.Ruleset) error {
	begin := time.Now()
	if err := n.kernel.Commit(ctx, ruleset.Diff(n.loaded, rs)); err != nil {
		return err
	}
	n.took += time.Since(begin)
	n.commits++
	n.loaded = rs
	return nil
}

func (n *testNode) send(t fataler, conns []oracle.Conn) []bool {
	t.Helper()
	arrived, err := n.Send(conns)
	if err != nil {
		t.Fatal(err)
	}
	if strays := n.Strays(); len(strays) > 0 {
		t.Fatal(strings.Join(strays, "\n"))
	}
	return arrived
}

// compare sends connections and compares their fates with what the oracle says. It returns one mismatch in words, or nothing.
func (n *testNode) compare(t fataler, c *oracle.Cluster, conns []oracle.Conn, r *report) string {
	t.Helper()
	first := ""
	for i, arrived := range n.send(t, conns) {
		want := c.Allowed(conns[i])
		r.add(conns[i], arrived, want)
		if arrived != want && first == "" {
			first = n.explain(t, c, conns[i], arrived)
		}
	}
	return first
}

// explain sends a probe once more, alone: a verdict repeats, a lost packet does not.
func (n *testNode) explain(t fataler, c *oracle.Cluster, conn oracle.Conn, arrived bool) string {
	t.Helper()
	again := n.send(t, []oracle.Conn{conn})[0]
	return fmt.Sprintf("%+v: arrived %v, sent again alone %v, oracle %v\n%s\n%s", conn, arrived, again, c.Allowed(conn), generate.Text(c), n.loaded)
}

// report counts verdicts.
type report struct {
	seed     uint64
	begin    time.Time
	kinds    map[string]*count
	all      count
	clusters int
}

type count struct{ verdicts, allowed, mismatches int }

func newReport(seed uint64) *report {
	return &report{seed: seed, begin: time.Now(), kinds: map[string]*count{}}
}

func (r *report) add(conn oracle.Conn, arrived, want bool) {
	family := "IPv4"
	if conn.Src.Is6() {
		family = "IPv6"
	}
	way := "routed"
	switch {
	case conn.FromNode:
		way = "from node"
	case conn.ToNode:
		way = "to node"
	case conn.Src == conn.Dst:
		way = "hairpin"
	case bridged(conn):
		way = "bridged"
	}
	for _, kind := range []string{string(conn.Protocol), family, way} {
		if r.kinds[kind] == nil {
			r.kinds[kind] = &count{}
		}
		r.kinds[kind].add(arrived, want)
	}
	r.all.add(arrived, want)
}

func (c *count) add(arrived, want bool) {
	c.verdicts++
	if want {
		c.allowed++
	}
	if arrived != want {
		c.mismatches++
	}
}

func (c *count) String() string {
	return fmt.Sprintf("%8d verdicts, %5.1f %% allowed, %d mismatches", c.verdicts, 100*float64(c.allowed)/float64(max(1, c.verdicts)), c.mismatches)
}

// log prints the report, also of a test that passes.
func (r *report) log(t *testing.T, n *testNode, title string) {
	t.Helper()
	var b strings.Builder
	took := time.Since(r.begin)
	fmt.Fprintf(&b, "%s: %d clusters, %d commits in %s, %d windows void, %s, %.0f verdicts a second, -kernel-seed=%d\n",
		title, r.clusters, n.commits, n.took.Round(time.Millisecond), n.Voids(), took.Round(time.Millisecond), float64(r.all.verdicts)/took.Seconds(), r.seed)
	for _, kind := range slices.Sorted(maps.Keys(r.kinds)) {
		fmt.Fprintf(&b, "  %-9s %s\n", kind, r.kinds[kind])
	}
	fmt.Fprintf(&b, "  %-9s %s", "all", &r.all)
	fmt.Println(b.String())
	t.Attr(strings.ReplaceAll(title, " ", "-"), fmt.Sprintf("%s, %.0f a second, -kernel-seed=%d -kernel-verdicts=%d -kernel-steps=%d",
		strings.TrimSpace(r.all.String()), float64(r.all.verdicts)/took.Seconds(), r.seed, *verdictsFlag, *stepsFlag))
}

var seedFlag = flag.Uint64("kernel-seed", 0, "seed of the random clusters; 0 is a fresh one")

// seed returns the run's seed, never 0.
func seed() uint64 {
	if *seedFlag != 0 {
		return *seedFlag
	}
	return rand.Uint64()>>1 | 1
}
