package kernel

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/generate"
	"github.com/podwall/podwall/tests/oracle/subject"
)

var stepsFlag = flag.Int("kernel-steps", 200, "how many changes to make while packets are under way")

// stepsOfCluster is how often one cluster is changed before there is a new one.
const stepsOfCluster = 50

// During a change what both states deny never passes and what both allow is never lost; after it the kernel holds what a fresh
// start would load, and decides as the oracle does.
func TestUpdateSequences(t *testing.T) {
	n := newNode(t)
	r := newReport(seed())
	s := &stream{}
	logged := false
	defer func() {
		r.log(t, n, "after each change")
		fmt.Println("  stream:", s)
		t.Attr("during-changes", fmt.Sprint(s))
	}()
	for i := uint64(0); s.steps < *stepsFlag; i++ {
		check(t, r.seed+i, func(rt *rapid.T) {
			c := generate.Cluster(rt)
			s.engine = subject.Engine(c)
			s.engine.SetEndpoints(subject.Input(c, s.engine.Model()).Endpoints)
			n.load(rt, s.engine.Desired())
			s.engine.Commit()
			s.commit = func(ctx context.Context, in policy.Input) error { return n.follow(ctx, s.engine, in) }
			for range min(stepsOfCluster, *stepsFlag-s.steps) {
				next, said := generate.Change(rt, c)
				if wrong := n.step(rt, s, c, next); wrong != "" {
					if !logged {
						t.Logf("%s: %s", said, wrong) // it is a matter of time too, so that rapid may not be able to repeat it
						logged = true
					}
					rt.Fatalf("%s: %s", said, wrong)
				}
				c = next
				r.clusters++
				n.mustHold(rt, subject.Render(c).Ruleset)
				if mismatch := n.compare(rt, c, sample(generate.Conns(c), s.steps), r); mismatch != "" {
					rt.Fatalf("after %s: %s", said, mismatch)
				}
			}
		})
	}
}

// follow commits the difference that an engine makes of what has changed.
func (n *testNode) follow(ctx context.Context, e *policy.Engine, in policy.Input) error {
	begin := time.Now()
	e.SetEndpoints(in.Endpoints)
	if err := n.kernel.Commit(ctx, e.Delta()); err != nil {
		return err
	}
	e.Commit()
	n.took += time.Since(begin)
	n.commits++
	n.loaded = e.Ruleset()
	return nil
}

// rendered is a commit of rulesets that are rendered from scratch.
func rendered(commit func(context.Context, ruleset.Ruleset) error) func(context.Context, policy.Input) error {
	return func(ctx context.Context, in policy.Input) error { return commit(ctx, policy.Render(in).Ruleset) }
}

// sample takes every third connection, others at each step.
func sample(conns []oracle.Conn, step int) []oracle.Conn {
	var some []oracle.Conn
	for i, c := range conns {
		if i%3 == step%3 {
			some = append(some, c)
		}
	}
	return some
}

// mustHold reads the kernel's tables and compares them with a fresh render.
func (n *testNode) mustHold(t fataler, fresh ruleset.Ruleset) {
	t.Helper()
	got, err := n.kernel.Read(t.Context(), tables...)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []ruleset.Delta{ruleset.Diff(got, fresh), ruleset.Diff(fresh, got)} {
		if !d.Empty() {
			t.Fatalf("the kernel differs from a fresh render:\n%v\nkernel:\n%s\nfresh:\n%s", slices.Concat(d.Prepare, d.Apply, d.Cleanup), got, fresh)
		}
	}
}

// stream is what is sent during changes, and what became of it.
type stream struct {
	commit func(context.Context, policy.Input) error
	engine *policy.Engine // is told of each change, if there is one

	steps           int
	sent            atomic.Int64
	during          int64 // of them while a change was being committed
	passed, stopped int   // as they should
	leaked, lost    int
}

// String prints the counts.
func (s *stream) String() string {
	return fmt.Sprintf("%d steps, %d probes, %d of them during a commit; both states allow: %d arrived, %d lost; both deny: %d stopped, %d leaked",
		s.steps, s.sent.Load(), s.during, s.passed, s.lost, s.stopped, s.leaked)
}

// step commits the change from one cluster to the next while probes are sent. It returns what went wrong, in words, or nothing.
func (n *testNode) step(t fataler, s *stream, from, to *oracle.Cluster) string {
	t.Helper()
	model := subject.Model(to)
	if s.engine != nil {
		subject.Change(s.engine, from, to, func(cluster.Kind) bool { return false })
		model = s.engine.Model()
	}
	states, closing := transition(from, to, model)
	conns := steady(from, to, closing)
	if len(conns) == 0 {
		conns = []oracle.Conn{{Src: sentinelFrom, Dst: sentinelTo, Protocol: oracle.TCP, Port: 9}} // nobody's business
	}
	order := rand.New(rand.NewPCG(uint64(s.steps), 0)) // a commit is over before all have had their turn
	order.Shuffle(len(conns), func(i, j int) { conns[i], conns[j] = conns[j], conns[i] })
	allowed := make([]bool, len(conns))
	for i, c := range conns {
		allowed[i] = to.Allowed(c)
	}
	wrong := n.during(t, s, conns, allowed, states)
	if len(wrong) == 0 {
		return ""
	}
	return fmt.Sprintf("%d probes had the wrong fate during the change, the first: %s\nfrom:\n%s\nto:\n%s", len(wrong), wrong[0], generate.Text(from), generate.Text(to))
}

// during commits the states one after the other while probes are sent, from before the first transaction until after the last
// one, and returns those that had another fate than they should.
func (n *testNode) during(t fataler, s *stream, conns []oracle.Conn, allowed []bool, states []policy.Input) []string {
	t.Helper()
	s.steps++
	var wrong []string
	started, done, ended := make(chan struct{}), make(chan struct{}), make(chan error)
	first := s.sent.Load() + 1
	go func() {
		ended <- n.Stream(conns, done, func(i int, arrived bool) {
			switch {
			case arrived && allowed[i]:
				s.passed++
			case !arrived && !allowed[i]:
				s.stopped++
			case arrived:
				s.leaked++
				wrong = append(wrong, fmt.Sprintf("leaked: %+v", conns[i]))
			default:
				s.lost++
				wrong = append(wrong, fmt.Sprintf("lost: %+v", conns[i]))
			}
			if s.sent.Add(1) == first {
				close(started)
			}
		})
	}()
	var err error
	select {
	case <-started:
		before := s.sent.Load()
		for _, in := range states {
			err = errors.Join(err, s.commit(t.Context(), in))
		}
		s.during += s.sent.Load() - before
		close(done)
		err = errors.Join(err, <-ended)
	case err = <-ended:
	}
	if err != nil {
		t.Fatalf("%v\nloaded:\n%s", err, n.loaded)
	}
	if strays := n.Strays(); len(strays) > 0 {
		t.Fatal(strings.Join(strays, "\n"))
	}
	return wrong
}

// transition returns what the daemon loads one after the other: an endpoint that is new is closed before it is opened (its former
// connections are forgotten in between). The addresses are those of such endpoints.
func transition(from, to *oracle.Cluster, model *cluster.Model) ([]policy.Input, map[netip.Addr]bool) {
	known := map[string]bool{}
	for _, e := range subject.Input(from, subject.Model(from)).Endpoints {
		known[e.ID] = true
	}
	open := subject.Input(to, model)
	closed := open
	closed.Endpoints = slices.Clone(open.Endpoints)
	closing := map[netip.Addr]bool{}
	for i, e := range closed.Endpoints {
		if e.Link == "" || known[e.ID] {
			continue // adopted pods have no ADD
		}
		closed.Endpoints[i].Pod = nil
		for _, ip := range e.IPs {
			closing[ip] = true
		}
	}
	if len(closing) == 0 {
		return []policy.Input{open}, nil
	}
	return []policy.Input{closed, open}, closing
}

// steady returns the connections that have the same fate before and after. An endpoint that is being closed may lose what it
// was allowed.
func steady(from, to *oracle.Cluster, closing map[netip.Addr]bool) []oracle.Conn {
	ends := func(c oracle.Conn) oracle.Conn { c.Protocol, c.Port = "", 0; return c }
	pairs := func(conns []oracle.Conn) map[oracle.Conn]bool {
		set := map[oracle.Conn]bool{}
		for _, c := range conns {
			set[ends(c)] = true
		}
		return set
	}
	before, after := generate.Conns(from), generate.Conns(to)
	inBefore, inAfter := pairs(before), pairs(after)
	var conns []oracle.Conn
	for _, c := range append(before, after...) {
		if !inBefore[ends(c)] || !inAfter[ends(c)] {
			continue // one of its ends is not there in both states
		}
		a := from.Allowed(c)
		if a != to.Allowed(c) || a && (closing[c.Src] || closing[c.Dst]) {
			continue
		}
		conns = append(conns, c)
	}
	return conns
}
