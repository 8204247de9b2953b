// Package reconcile is the loop that makes the kernel hold what the cluster, the manifests and the attachments ask for.
package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
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
	// Elements are those of one set, also of one with a timeout.
	Elements(ctx context.Context, id ruleset.TableID, set *ruleset.Set) ([]ruleset.Elem, error)
	// Generation counts the transactions of everybody.
	Generation(ctx context.Context) (uint32, error)
	// Own makes those of the tables that exist this process's own, if the kernel can, and returns those that somebody had
	// switched off; it fails while another process owns one of them.
	Own(ctx context.Context, ids ...ruleset.TableID) ([]ruleset.TableID, error)
	// Owned returns those of the tables that exist and that nobody else can change.
	Owned(ctx context.Context, ids ...ruleset.TableID) ([]ruleset.TableID, error)
}

// Links looks at the host side of attachments.
type Links interface {
	Lookup(h attach.HostLink) (registry.Link, error)
	ShowBridged(bridge string) error
	Index(name string) (int, error) // 0 if there is no such link
	// Addresses are the node's own.
	Addresses() (map[netip.Addr]bool, error)
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
	// Foreign tells when others have committed transactions, and who, if that is known; nil is never. It is buffered, and
	// what does not fit need not be told.
	Foreign     <-chan string
	Connections Connections
	Log         *slog.Logger
	Metrics     *metrics.Metrics
	Clock       clock.WithTicker
}

// Timing of the loop. A failed pass is retried with a growing pause; lost link events, and changes that somebody else made to
// the tables and nobody told of, last for one sweep at most.
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
	sweep     bool  // links may have gone
	gone      []int // links that have gone, by index
	told      bool  // attachments have come or gone
	down      bool  // podwall was uninstalled: the tables go
	published view
	changed   chan struct{} // closed and replaced whenever published is

	// registry is set once, before anything that uses it can be called: by Run when this process becomes the writer.
	registry *registry.Registry

	busySince atomic.Pointer[time.Time] // when the pass that is under way began; nil: none is

	revoker *revoker // nil: revoked connections go on

	// shared guards what others read of the model, inForce, endpoints and bridged, while Run's goroutine changes them; it reads them without.
	shared    sync.RWMutex
	model     *cluster.Model
	inForce   ruleset.Ruleset     // what was last committed as a whole
	endpoints []policy.Endpoint   // those that it was rendered from
	bridged   map[netip.Addr]bool // the addresses of endpoints that are behind a bridge

	// Owned by Run.
	engine *policy.Engine
	states map[attach.Key]*state
	sorted []*state // oldest first; nil: not known
	// loaded is what the kernel has: the engine's own ruleset, as long as nothing has come between them.
	loaded  ruleset.Ruleset
	here    map[cluster.Key]*cluster.Pod // pods whose objects name this node
	inputs  inputs
	orphans []orphan
	former  []netip.Addr // addresses of ended attachments whose connections are still to be forgotten
	// forgotten are addresses that were closed by the last commit and whose connections were forgotten after it.
	forgotten map[netip.Addr]bool
	problems  map[policy.Problem]bool
	refused   refusals
	// generation is the kernel's when loaded was true of it.
	generation uint32
	// unsure says that a commit failed which may have been executed all the same: nobody has looked at whom it tightened.
	unsure  bool
	started bool
	foreign foreign
}

// view is what Run last published. It is immutable. What grows with the cluster is not in it, but looked up when somebody asks.
type view struct {
	ready    bool
	stopped  bool // Run has returned: nothing will change any more
	err      error
	pods     []PodStatus
	attached int // how many of pods are attachments: those come first, by the numbers of their registrations
	problems []policy.Problem
}

// of returns the attachment with the number of a registration, or nil.
func (v view) of(seq uint64) *PodStatus {
	i, found := slices.BinarySearchFunc(v.pods[:v.attached], seq, func(s PodStatus, seq uint64) int { return cmp.Compare(s.seq, seq) })
	if !found {
		return nil
	}
	return &v.pods[i]
}

// inputs are the node's own part of what the ruleset is rendered from. It is collected anew when something of it may have changed.
type inputs struct {
	stale    bool
	settled  bool // nothing of it has changed but how clean attachments are
	last     policy.Input
	attached map[string]bool // namespace/name of the pods of attachments
	restless bool            // there is an attachment whose link is to be looked at in each pass
	version  uint64          // counts the times that it was collected

	// What the engine was given and what was published is of these versions.
	given, shown uint64
	engineShown  uint64
	bridgedOf    uint64
	refusedShown bool
}

// New returns a loop that has not started.
func New(cfg Config) *Loop {
	l := &Loop{
		cfg:     cfg,
		wake:    make(chan struct{}, 1),
		changed: make(chan struct{}),
		engine:  policy.NewEngine(cfg.Policy),
		states:  map[attach.Key]*state{},
		here:    map[cluster.Key]*cluster.Pod{},
		inputs:  inputs{stale: true},
		told:    true,
	}
	l.model = l.engine.Model()
	if cfg.Policy.Cut {
		l.revoker = newRevoker(&l.cfg, l.tables()[0], l.allows, l.isBridged, l.kick)
	}
	return l
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

// LinkGone tells the loop that the link with an index has disappeared; with 0 that some may have.
func (l *Loop) LinkGone(index int) {
	l.mu.Lock()
	if index == 0 {
		l.sweep = true
	} else {
		l.gone = append(l.gone, index)
	}
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
	if l.revoker != nil {
		var done sync.WaitGroup
		defer done.Wait()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		done.Go(func() { l.revoker.run(ctx) })
	}
	ticker := l.cfg.Clock.NewTicker(sweepEvery)
	defer ticker.Stop()
	retry := retryFirst
	var again <-chan time.Time
	for {
		l.busySince.Store(nil)
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
			l.mu.Lock()
			l.sweep = true
			l.mu.Unlock()
		case <-l.wake:
		case <-again:
		case who := <-l.cfg.Foreign:
			l.foreign.heard(who, l.cfg.Clock)
			continue
		case <-l.foreign.due:
			if err := l.audit(ctx); err == nil {
				continue
			}
		}
		again = nil
		l.busySince.Store(new(l.cfg.Clock.Now()))
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

// Busy returns for how long the loop has been in one pass; 0 when it waits for something to do. A pass takes milliseconds, with
// many objects a second: in one that takes minutes the kernel does not answer.
func (l *Loop) Busy() time.Duration {
	since := l.busySince.Load()
	if since == nil {
		return 0
	}
	return l.cfg.Clock.Since(*since)
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

// start reads what a former daemon left, so that the first commit is a difference and nothing opens or breaks on the way. What
// is read is owned before: nobody changes it any more.
func (l *Loop) start(ctx context.Context) error {
	if _, err := l.own(ctx); err != nil {
		return fmt.Errorf("take over the tables of a former daemon: %w", err)
	}
	var err error
	if l.generation, err = l.cfg.Kernel.Generation(ctx); err != nil {
		return err
	}
	if l.loaded, err = l.cfg.Kernel.Read(ctx, l.tables()...); err != nil {
		return fmt.Errorf("read the tables of a former daemon: %w", err)
	}
	if l.revoker != nil {
		l.revoker.inherit(l.loaded)
	}
	l.orphans = nil
	l.inputs.stale = true
	entries := l.registry.Entries()
	owners := registry.Owners(entries)
	for _, e := range entries {
		l.states[e.Key], l.sorted = newState(e), nil
		l.states[e.Key].clean = l.wasOpen(e, owners)
	}
	if err := l.findOrphans(); err != nil {
		return err
	}
	l.started = true
	return nil
}

// pass brings the kernel to what is desired now. A new attachment takes two transactions: one that closes its addresses, then
// its predecessor's connections are forgotten, then one that opens it as its policies allow. The first has a few elements, the second all
// of its chains.
func (l *Loop) pass(ctx context.Context) error {
	if !l.started {
		if err := l.start(ctx); err != nil {
			return err
		}
	}
	if l.foreign.unseen {
		if err := l.audit(ctx); err != nil {
			return err
		}
	}
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
				l.mu.Lock()
				l.sweep = l.sweep || swept // the next pass is to verify it as well
				l.mu.Unlock()
				return err
			}
		}
		begin := l.cfg.Clock.Now()
		full := l.input()
		l.refused.again(full, begin)
		w := l.want(full)
		l.cfg.Metrics.RenderSeconds.Observe(l.cfg.Clock.Since(begin).Seconds())
		if err := l.commit(ctx, w.delta); err != nil {
			if w, err = l.isolate(ctx, w.before, err); err != nil {
				return err
			}
		}
		l.done(w)
		l.refused.taken()
		closing := l.closesOnly(w)
		again, err := l.settle(w.in)
		if !again || !closing {
			l.publish(w)
		}
		l.markOpened(w.in)
		if err = errors.Join(partial, err); err != nil || !again {
			return err
		}
	}
}

// closesOnly reports whether a pass has done nothing that anybody waits for, as the next one follows at once: it has closed new attachments for a
// moment. To open one takes chains, and so does to close one that was open.
func (l *Loop) closesOnly(w wanted) bool {
	now, _ := l.current()
	chains := slices.ContainsFunc(slices.Concat(w.delta.Prepare, w.delta.Apply), func(op ruleset.Op) bool { return op.Chain != nil })
	if !now.ready || now.err != nil || w.whole != nil || chains || len(w.delta.Cleanup)+len(l.former) > 0 {
		return false
	}
	return !slices.ContainsFunc(l.sortedStates(), func(st *state) bool { return !st.clean && !st.brief })
}

// wanted is what a pass is to bring about.
type wanted struct {
	in     policy.Input // with what is refused closed
	delta  ruleset.Delta
	before ruleset.Ruleset // what delta begins with
	// whole is what the kernel has then, when that was not left to the engine, and next what is known of it.
	whole ruleset.Ruleset
	next  policy.Output
}

// want finds out what is to be done. The engine knows it, unless the kernel has something else than it believes. Only when the kernel
// does not let go of something everything is rendered from scratch: that is no part of any ruleset that is wanted.
func (l *Loop) want(full policy.Input) wanted {
	full.CutBeforeNAT = l.revoker != nil && l.revoker.beforeNAT()
	l.engine.SetCutBeforeNAT(full.CutBeforeNAT)
	in, linkless := l.taken(full)
	if len(linkless) > 0 || l.refused.leaves() {
		w := wanted{before: l.loaded}
		w.in, w.next = l.renderTaken(full)
		w.whole = w.next.Ruleset
		w.delta = ruleset.Diff(l.loaded, w.whole)
		return w
	}
	if l.inputs.given != l.inputs.version || len(l.refused.endpoints) > 0 {
		l.engine.SetEndpoints(in.Endpoints)
		if l.inputs.given = l.inputs.version; len(l.refused.endpoints) > 0 {
			l.inputs.given = 0 // they may be opened without any other change
		}
	}
	w := wanted{in: in, before: l.loaded}
	if l.follows() {
		w.delta = l.engine.Delta()
	} else {
		w.delta = ruleset.Diff(l.loaded, l.engine.Desired())
	}
	return w
}

// follows reports whether what is loaded is what the engine takes for it.
func (l *Loop) follows() bool {
	committed := l.engine.Ruleset()
	return len(committed) > 0 && len(l.loaded) > 0 && committed[0] == l.loaded[0]
}

// done follows a commit.
func (l *Loop) done(w wanted) {
	followed := l.follows() && w.whole == nil
	l.shared.Lock()
	l.endpoints = w.in.Endpoints
	if l.inputs.bridgedOf != l.inputs.version {
		l.inputs.bridgedOf, l.bridged = l.inputs.version, map[netip.Addr]bool{}
		for _, e := range w.in.Endpoints {
			if e.Bridge == "" {
				continue
			}
			for _, ip := range e.IPs {
				l.bridged[ip] = true
			}
		}
	}
	if l.inForce = w.whole; w.whole == nil {
		l.engine.Commit()
		l.inForce = l.engine.Ruleset()
	}
	l.shared.Unlock()
	l.loaded = l.inForce
	if l.revoker == nil {
		return
	}
	forgotten, unsure := l.forgotten, l.unsure
	l.forgotten, l.unsure = nil, false
	l.revoker.committed(w.delta, unsure, forgotten, func(all bool) (policy.Tightened, policy.Tightened) {
		switch {
		case followed && !all:
			return l.engine.TightenedBy(w.delta)
		case w.whole != nil && !all:
			return policy.TightenedBy(w.delta, l.loaded), policy.Tightened{}
		}
		// What was established under the rules of others is not known.
		return policy.Isolated(l.loaded), policy.Tightened{}
	})
}

// allows reports whether the rules that are in force accept a connection.
func (l *Loop) allows(c policy.Connection) (bool, error) {
	l.shared.RLock()
	defer l.shared.RUnlock()
	return policy.Allows(l.inForce, c)
}

// isBridged reports whether an address is an endpoint's that is behind a bridge.
func (l *Loop) isBridged(ip netip.Addr) bool {
	l.shared.RLock()
	defer l.shared.RUnlock()
	return l.bridged[ip]
}

func (l *Loop) isSynced() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.synced
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
	l.shared.Lock()
	l.inForce = nil
	l.shared.Unlock()
	l.show(view{})
	return nil
}

// take applies the queued changes and reports whether the model is complete.
func (l *Loop) take() bool {
	l.mu.Lock()
	queue, synced := l.queue, l.synced
	l.queue = nil
	l.mu.Unlock()
	if len(queue) == 0 {
		return synced
	}
	l.shared.Lock()
	defer l.shared.Unlock()
	for _, c := range queue {
		l.cfg.Metrics.Objects.WithLabelValues(c.Key.Kind.String()).Inc()
		if l.engine.Apply(c) && c.Key.Kind == cluster.KindPod {
			l.noteLocal(c.Key)
		}
	}
	return synced
}

// noteLocal sees to it that a change of a pod that concerns this node's own pods is heard of.
func (l *Loop) noteLocal(k cluster.Key) {
	pod := l.model.Pod(k.Namespace, k.Name)
	_, was := l.here[k]
	is := pod != nil && pod.Node == l.cfg.NodeName && pod.Node != ""
	if is {
		l.here[k] = pod
	} else {
		delete(l.here, k)
	}
	if was || is || l.inputs.attached[k.Namespace+"/"+k.Name] {
		l.inputs.stale = true
	}
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
	l.loaded, l.generation, l.unsure = loaded, 0, true
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
