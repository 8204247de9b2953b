// Package reconcile is the loop that makes the kernel hold what the cluster, the manifests and the attachments ask for.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"k8s.io/utils/clock"

	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/registry"
	"github.com/podwall/podwall/pkg/ruleset"
)

// Kernel holds the tables. Commit must apply all of a delta's main transaction or nothing of it.
type Kernel interface {
	Read(ctx context.Context, ids ...ruleset.TableID) (ruleset.Ruleset, error)
	Commit(ctx context.Context, d ruleset.Delta) error
	// Generation counts the transactions of everybody.
	Generation(ctx context.Context) (uint32, error)
}

// Links looks at the host side of attachments.
type Links interface {
	Lookup(h attach.HostLink) (registry.Link, error)
	ShowBridged(bridge string) error
	Index(name string) (int, error) // 0 if there is no such link
	// Toward returns the name of the link that an address is directly behind, empty if there is none.
	Toward(ip netip.Addr) (string, error)
}

// Config says how pods are identified and what the loop works with.
type Config struct {
	NodeName string
	// Standalone means that there is no API server: a pod is what its manifest says or, without one, what its ADD said.
	Standalone bool
	Policy     policy.Options

	Kernel Kernel
	Links  Links
	// Forget deletes the conntrack entries of addresses, so that a new pod inherits no connection from its predecessor.
	Forget  func([]netip.Addr) (int, error)
	Log     *slog.Logger
	Metrics *metrics.Metrics
	Clock   clock.WithTicker
}

// Timing of the loop. A failed pass is retried with a growing pause; lost link events, and changes that somebody else made to
// the tables, last for one sweep at most.
const (
	sweepEvery = 10 * time.Second
	retryFirst = 50 * time.Millisecond
	retryMost  = 5 * time.Second
)

// Loop is one writer of the kernel. Run's goroutine owns the model, the states and what is loaded; everything else talks to
// it through the queue and reads what it published.
type Loop struct {
	cfg  Config
	wake chan struct{}

	mu        sync.Mutex
	queue     []cluster.Change
	synced    bool
	sweep     bool // links may have gone
	down      bool // podwall was uninstalled: the tables go
	published view
	changed   chan struct{} // closed and replaced whenever published is

	// registry is set once, before anything that uses it can be called: by Run when this process becomes the writer.
	registry *registry.Registry

	// Owned by Run.
	model    *cluster.Model
	states   map[attach.Key]*state
	loaded   ruleset.Ruleset
	orphans  []orphan
	former   []netip.Addr // addresses of ended attachments whose connections are still to be forgotten
	problems map[policy.Problem]bool
	// generation is the kernel's when loaded was true of it.
	generation uint32
}

// view is what Run last published. It is immutable.
type view struct {
	ready    bool
	stopped  bool // Run has returned: nothing will change any more
	err      error
	pods     []PodStatus
	byKey    map[attach.Key]*PodStatus
	policies []PolicyStatus
	problems []policy.Problem
	ruleset  ruleset.Ruleset
}

// New returns a loop that has not started.
func New(cfg Config) *Loop {
	return &Loop{
		cfg:     cfg,
		wake:    make(chan struct{}, 1),
		changed: make(chan struct{}),
		model:   cluster.NewModel(),
		states:  map[attach.Key]*state{},
	}
}

var _ cluster.Sink = (*Loop)(nil)

// Apply implements cluster.Sink.
func (l *Loop) Apply(changes ...cluster.Change) {
	l.mu.Lock()
	l.queue = append(l.queue, changes...)
	l.mu.Unlock()
	l.kick()
}

// Synced implements cluster.Sink. Before it nothing is written to the kernel: what a former daemon loaded stays as it is.
func (l *Loop) Synced() {
	l.mu.Lock()
	l.synced = true
	l.mu.Unlock()
	l.kick()
}

// LinkGone tells the loop that a link has disappeared.
func (l *Loop) LinkGone() {
	l.mu.Lock()
	l.sweep = true
	l.mu.Unlock()
	l.kick()
}

// StandDown makes the loop take its tables out of the kernel and refuse attachments, or, with false, take up its work again.
// Registrations are kept.
func (l *Loop) StandDown(down bool) {
	l.mu.Lock()
	l.down = down
	l.mu.Unlock()
	l.kick()
}

func (l *Loop) kick() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Run waits until lead gives it the registry, which makes this process the writer of the node; until then it is a standby
// that keeps its model current and writes nothing. Then it adopts what is in the kernel and keeps it right until ctx ends.
// The tables stay in the kernel when it returns.
func (l *Loop) Run(ctx context.Context, lead <-chan *registry.Registry) error {
	defer l.show(view{stopped: true})
	for l.registry == nil {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
			l.take()
		case l.registry = <-lead:
			l.kick()
		}
	}
	ticker := l.cfg.Clock.NewTicker(sweepEvery)
	defer ticker.Stop()
	if err := l.start(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	retry := retryFirst
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
			l.mu.Lock()
			l.sweep = true
			l.mu.Unlock()
		case <-l.wake:
		case <-again:
		}
		again = nil
		err := l.pass(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			l.cfg.Log.Error("reconcile did not complete", "error", err, "retry", retry)
			l.fail(err)
			again = l.cfg.Clock.After(retry)
			retry = min(2*retry, retryMost)
		default:
			retry = retryFirst
		}
	}
}

// verify looks whether the kernel still has what was loaded, if anybody else has committed since: it may have been flushed or
// edited (nft flush ruleset), and then no difference to what was loaded once would bring it back. Others commit often, so this
// is done with each sweep and before an ADD is answered, not in every pass.
func (l *Loop) verify(ctx context.Context) error {
	generation, err := l.cfg.Kernel.Generation(ctx)
	if err != nil || generation == l.generation {
		return err
	}
	kernel, err := l.cfg.Kernel.Read(ctx, l.tables()...)
	if err != nil {
		return err
	}
	if d := ruleset.Diff(kernel, l.loaded); !d.Empty() {
		ops := slices.Concat(d.Prepare, d.Apply, d.Cleanup)
		l.cfg.Metrics.Drift.Inc()
		l.cfg.Log.Error("somebody else has changed podwall's tables, they are being restored", "differences", len(ops), "first", ops[0].Name())
	}
	l.loaded, l.generation = kernel, generation
	return nil
}

// opening reports whether an attachment is to be opened for the first time.
func (l *Loop) opening() bool {
	for _, st := range l.states {
		if !st.clean && !st.entry.Detached {
			return true
		}
	}
	return false
}

// tables are the tables that podwall owns.
func (l *Loop) tables() []ruleset.TableID {
	name := l.cfg.Policy.Table
	return []ruleset.TableID{{Family: ruleset.Inet, Name: name}, {Family: ruleset.Netdev, Name: name}}
}

// start reads what a former daemon left, so that the first commit is a difference and nothing opens or breaks on the way.
func (l *Loop) start(ctx context.Context) error {
	var err error
	if l.loaded, err = l.cfg.Kernel.Read(ctx, l.tables()...); err != nil {
		return fmt.Errorf("read the tables of a former daemon: %w", err)
	}
	for _, e := range l.registry.Entries() {
		l.states[e.Key] = &state{entry: e, clean: l.wasOpen(e)}
	}
	return l.findOrphans()
}

// pass brings the kernel to what is desired now. A new attachment takes two transactions: one that closes its addresses, then
// its predecessor's connections are forgotten, then one that opens it as its policies allow.
func (l *Loop) pass(ctx context.Context) error {
	for {
		if !l.take() {
			return nil
		}
		if l.isDown() {
			return l.removeTables(ctx)
		}
		swept, partial := l.refresh()
		if swept || l.opening() {
			if err := l.verify(ctx); err != nil {
				return err
			}
		}
		begin := l.cfg.Clock.Now()
		in := l.input()
		out := policy.Render(in)
		out.Problems = append(out.Problems, l.conflicts(in)...)
		delta := ruleset.Diff(l.loaded, out.Ruleset)
		l.cfg.Metrics.RenderSeconds.Observe(l.cfg.Clock.Since(begin).Seconds())
		if err := l.commit(ctx, delta); err != nil {
			return err
		}
		l.loaded = out.Ruleset
		again, err := l.settle(in)
		l.publish(in, out)
		if err = errors.Join(partial, err); err != nil || !again {
			return err
		}
	}
}

func (l *Loop) isDown() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.down
}

func (l *Loop) removeTables(ctx context.Context) error {
	// podwall-install deletes them as well: what counts is that they are gone, which a failed commit has looked up.
	if err := l.commit(ctx, ruleset.Diff(l.loaded, nil)); err != nil && len(l.loaded) > 0 {
		return err
	}
	l.loaded = nil
	l.show(view{})
	return nil
}

// take applies the queued changes and reports whether the model is complete.
func (l *Loop) take() bool {
	l.mu.Lock()
	queue, synced := l.queue, l.synced
	l.queue = nil
	l.mu.Unlock()
	for _, c := range queue {
		l.model.Apply(c)
		l.cfg.Metrics.Objects.WithLabelValues(c.Key.Kind.String()).Inc()
	}
	return synced
}

func (l *Loop) commit(ctx context.Context, d ruleset.Delta) error {
	if d.Empty() {
		return nil
	}
	begin := l.cfg.Clock.Now()
	err := l.cfg.Kernel.Commit(ctx, d)
	l.cfg.Metrics.CommitSeconds.Observe(l.cfg.Clock.Since(begin).Seconds())
	if err == nil {
		l.cfg.Metrics.Commits.WithLabelValues("ok").Inc()
		l.generation += uint32(d.Transactions()) //nolint:gosec // a handful; another number afterwards means that somebody else committed too
		return nil
	}
	l.cfg.Metrics.Commits.WithLabelValues("error").Inc()
	// What is loaded may not be what was believed (somebody else's flush): the retry starts from what is there.
	loaded, readErr := l.cfg.Kernel.Read(ctx, l.tables()...)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	l.loaded, l.generation = loaded, 0
	return fmt.Errorf("commit: %w", err)
}

// fail lets those who wait know why they do.
func (l *Loop) fail(err error) {
	l.mu.Lock()
	l.published.err = err
	l.mu.Unlock()
}

func (l *Loop) current() (view, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.published, l.changed
}
