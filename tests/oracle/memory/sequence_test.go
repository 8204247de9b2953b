package memory

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/generate"
	"github.com/podwall/podwall/tests/oracle/subject"
)

const (
	sequenceLength = 50 // changes of one cluster; a short sequence is easier to understand
	sampleSize     = 40 // connections that are tried in each state
)

// TestSequences follows clusters through changes as the daemon does, and looks at every state on the way.
func TestSequences(t *testing.T) {
	var total tally
	set("rapid.checks", *steps+10) // more than needed, as in TestVerdicts
	violations := 0
	began := time.Now()
	t.Cleanup(func() {
		t.Logf("changes: %d, transactions: %d, verdicts: %d, violations: %d, time: %v", total.changes, total.transactions, total.verdicts, min(1, violations), time.Since(began).Round(time.Millisecond))
		t.Attr("followed", fmt.Sprintf("%d changes, %d verdicts, %d violations, -rapid.seed=%s", total.changes, total.verdicts, min(1, violations), flag.Lookup("rapid.seed").Value))
	})
	rapid.Check(t, func(t *rapid.T) {
		if total.changes >= *steps && violations == 0 {
			return
		}
		n, err := start(generate.Cluster(t))
		if err != nil {
			t.Fatal(err)
		}
		history := ""
		for range rapid.IntRange(1, sequenceLength).Draw(t, "changes") {
			next, what := generate.Change(t, n.cluster)
			history += what + "\n"
			before := n.cluster
			if err := n.change(next, rapid.IntRange(0, 1000).Draw(t, "sample")); err != nil {
				violations++
				t.Fatalf("%v\n%sbefore:\n%safter:\n%s", err, history, generate.Text(before), generate.Text(next))
			}
		}
		if violations > 0 {
			return
		}
		total.changes += n.tally.changes
		total.transactions += n.tally.transactions
		total.verdicts += n.tally.verdicts
	})
	if total.changes < *steps {
		t.Errorf("only %d changes were followed", total.changes)
	}
}

// TestSequenceDefects is the control of TestSequences: wrong ways to change a ruleset must be found out.
func TestSequenceDefects(t *testing.T) {
	for _, defect := range []struct {
		name   string
		commit func(e *policy.Engine) []ruleset.Delta
	}{
		{"delete, then add", func(e *policy.Engine) []ruleset.Delta {
			from, to := e.Ruleset(), e.Desired()
			return append(inOrder(ruleset.Diff(from, nil)), inOrder(ruleset.Diff(nil, to))...)
		}},
		{"each operation on its own", func(e *policy.Engine) []ruleset.Delta {
			var list []ruleset.Delta
			for _, op := range operations(e.Delta()) {
				list = append(list, ruleset.Delta{Apply: []ruleset.Op{op}})
			}
			return list
		}},
		{"cleanup first", func(e *policy.Engine) []ruleset.Delta {
			list := inOrder(e.Delta())
			slices.Reverse(list)
			return list
		}},
		{"elements are never removed", func(e *policy.Engine) []ruleset.Delta {
			d := e.Delta()
			d.Apply = slices.DeleteFunc(d.Apply, func(op ruleset.Op) bool { return op.Kind == ruleset.DelElements })
			return inOrder(d)
		}},
		{"no cleanup", func(e *policy.Engine) []ruleset.Delta {
			d := e.Delta()
			d.Cleanup = nil
			return inOrder(d)
		}},
	} {
		t.Run(defect.name, func(t *testing.T) {
			t.Parallel()
			follow(t, func(n *node) { n.commit = defect.commit })
		})
	}
	for _, kind := range []cluster.Kind{cluster.KindNamespace, cluster.KindPod, cluster.KindPolicy} {
		t.Run("no news of a "+kind.String(), func(t *testing.T) {
			t.Parallel()
			follow(t, func(n *node) { n.deaf = kind })
		})
	}
}

// follow follows clusters on a node with a defect until that is seen.
func follow(t *testing.T, spoil func(*node)) {
	t.Helper()
	for i := range mostExamples {
		n, err := start(example(i))
		if err != nil {
			t.Fatal(err)
		}
		spoil(n)
		for j := range 10 {
			next := rapid.Custom(func(t *rapid.T) *oracle.Cluster {
				next, _ := generate.Change(t, n.cluster)
				return next
			}).Example(10*i + j)
			if err := n.change(next, 0); err != nil {
				t.Log(err)
				return
			}
		}
	}
	t.Errorf("%d sequences have not shown the defect", mostExamples)
}

// node is what the daemon and the kernel of a node have. The daemon knows of changes only, and makes its differences from them.
type node struct {
	cluster *oracle.Cluster
	engine  *policy.Engine
	kernel  *nft.Fake
	tally   tally

	commit func(*policy.Engine) []ruleset.Delta
	deaf   cluster.Kind // changes of this kind are not heard of; for controls
}

type tally struct{ changes, transactions, verdicts int }

func start(c *oracle.Cluster) (*node, error) {
	n := &node{cluster: c, engine: subject.Engine(c), kernel: nft.NewFake(), commit: func(e *policy.Engine) []ruleset.Delta { return inOrder(e.Delta()) }}
	n.engine.SetEndpoints(subject.Input(c, n.engine.Model()).Endpoints)
	if err := n.kernel.Commit(context.Background(), n.engine.Delta()); err != nil {
		return nil, fmt.Errorf("load the first ruleset: %w", err)
	}
	n.engine.Commit()
	return n, nil
}

// inOrder returns a delta's transactions one by one.
func inOrder(d ruleset.Delta) []ruleset.Delta {
	var list []ruleset.Delta
	if len(d.Prepare) > 0 {
		list = append(list, ruleset.Delta{Prepare: d.Prepare})
	}
	if len(d.Apply) > 0 {
		list = append(list, ruleset.Delta{Apply: d.Apply})
	}
	for _, op := range d.Cleanup {
		list = append(list, ruleset.Delta{Cleanup: []ruleset.Op{op}})
	}
	return list
}

func operations(d ruleset.Delta) []ruleset.Op { return slices.Concat(d.Prepare, d.Apply, d.Cleanup) }

// change brings the node to the next cluster. A new sandbox is closed first, and opened by a second change of the ruleset.
func (n *node) change(next *oracle.Cluster, sample int) error {
	n.tally.changes++
	w := watch{node: n, conns: pickConns(generate.Conns(n.cluster, next), sample)}
	for _, conn := range w.conns {
		w.before = append(w.before, n.cluster.Allowed(conn))
		w.after = append(w.after, next.Allowed(conn))
	}
	subject.Change(n.engine, n.cluster, next, func(k cluster.Kind) bool { return k == n.deaf })
	in := subject.Input(next, n.engine.Model())
	if added := sandboxesAdded(n.cluster, next); len(added) > 0 {
		for _, s := range added {
			w.fresh = append(w.fresh, s.IPs...)
		}
		closed := in
		closed.Endpoints = slices.Clone(in.Endpoints)
		for i, e := range closed.Endpoints {
			if slices.ContainsFunc(e.IPs, w.isFresh) {
				closed.Endpoints[i].Pod = nil
			}
		}
		if err := w.load(closed); err != nil {
			return fmt.Errorf("close the new sandbox: %w", err)
		}
		w.closed = true
		if err := w.nothingPasses(); err != nil {
			return err
		}
	}
	if err := w.load(in); err != nil {
		return err
	}
	n.cluster = next
	return n.settled(&w)
}

func sandboxesAdded(old, next *oracle.Cluster) []oracle.Sandbox {
	return slices.DeleteFunc(slices.Clone(next.Sandboxes), func(s oracle.Sandbox) bool {
		return slices.ContainsFunc(old.Sandboxes, func(o oracle.Sandbox) bool { return o.Namespace == s.Namespace && o.Name == s.Name })
	})
}

func pickConns(conns []oracle.Conn, sample int) []oracle.Conn {
	if len(conns) == 0 {
		return nil
	}
	var picked []oracle.Conn
	for i := range sampleSize {
		picked = append(picked, conns[(sample+i)%len(conns)])
	}
	return picked
}

// settled checks that the kernel has what it would have if it had been loaded afresh, and that its verdicts are the oracle's.
func (n *node) settled(w *watch) error {
	have, want := n.kernel.Ruleset(), subject.Render(n.cluster).Ruleset
	for _, d := range []ruleset.Delta{ruleset.Diff(have, want), ruleset.Diff(want, have)} {
		if !d.Empty() {
			return fmt.Errorf("the kernel differs from a fresh rendering: %s", operations(d)[0])
		}
	}
	for i, conn := range w.conns {
		got, err := w.try(conn)
		if err != nil {
			return err
		}
		if got != w.after[i] {
			return fmt.Errorf("%+v: allowed=%v, oracle: %v", conn, got, w.after[i])
		}
	}
	return nil
}

// watch tries connections in the states of one change.
type watch struct {
	node          *node
	conns         []oracle.Conn
	before, after []bool       // the oracle's verdicts in the clusters before and after the change
	fresh         []netip.Addr // addresses of sandboxes that were not there before
	closed        bool         // the fresh ones have been closed
}

func (w *watch) isFresh(ip netip.Addr) bool { return slices.Contains(w.fresh, ip) }

// load commits the ruleset for an input transaction by transaction and looks after each.
func (w *watch) load(in policy.Input) error {
	n := w.node
	n.engine.SetEndpoints(in.Endpoints)
	for _, d := range n.commit(n.engine) {
		n.tally.transactions++
		if err := n.kernel.Commit(context.Background(), d); err != nil {
			return err
		}
		if err := w.look(); err != nil {
			return fmt.Errorf("after %s: %w", operations(d)[0].Name(), err)
		}
	}
	n.engine.Commit()
	return nil
}

// look checks that what was denied before and will be denied after the change does not pass now, and that what was allowed and
// will be passes. A fresh sandbox may be closed: until then its addresses are those of whoever had them, then they have none of
// their former owner's rights.
func (w *watch) look() error {
	for i, conn := range w.conns {
		got, err := w.try(conn)
		if err != nil {
			return err
		}
		fresh := w.isFresh(conn.Src) || w.isFresh(conn.Dst)
		may := w.after[i] || w.before[i] && (!fresh || !w.closed)
		must := w.after[i] && w.before[i] && !fresh
		if got && !may || !got && must {
			return fmt.Errorf("%+v: allowed=%v, oracle: %v before and %v after", conn, got, w.before[i], w.after[i])
		}
	}
	return nil
}

// nothingPasses checks that the fresh sandbox is closed. What the node sends to it is left out, as in generate.Conns.
func (w *watch) nothingPasses() error {
	for _, conn := range w.conns {
		if conn.FromNode || !w.isFresh(conn.Src) && !w.isFresh(conn.Dst) {
			continue
		}
		got, err := w.try(conn)
		if err != nil {
			return err
		}
		if got {
			return fmt.Errorf("%+v: allowed although the new sandbox is closed", conn)
		}
	}
	return nil
}

func (w *watch) try(conn oracle.Conn) (bool, error) {
	w.node.tally.verdicts++
	got, _, err := subject.Allowed(w.node.kernel.Ruleset(), conn)
	return got, err
}
