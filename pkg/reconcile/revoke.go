package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/conntrack"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// Connections are the tracked connections of the node.
type Connections interface {
	// Forget deletes the entries of connections of which one of the addresses is an end.
	Forget(ips []netip.Addr) error
	// ForgetPickedUp is Forget for TCP connections that the kernel met in the middle: the first of their packets that it saw may
	// have come from the server.
	ForgetPickedUp(ips []netip.Addr) error
	// Flows calls each for the entries that filter selects.
	Flows(ctx context.Context, filter conntrack.Filter, each func(conntrack.Flow)) error
	// Delete deletes exactly these entries; one that has ended is no error.
	Delete(ctx context.Context, flows []conntrack.Flow) (int, error)
}

const (
	// maxFiltered is up to how many addresses the kernel is asked for the entries of each: beyond it one dump of all is
	// cheaper, since a filtered dump walks the whole table as well.
	maxFiltered = 4

	// lookAgain is when a change's connections are looked at once more: a packet that was under way by the old rules may have
	// confirmed its entry after the first look.
	lookAgain = time.Second

	// A change's connections are looked for at once. Then there is no look for restShare times as long as that has taken, and
	// mostRest at most: each walks through the kernel's whole table, and a controller may relabel pods by the hundred.
	restShare = 9
	mostRest  = 100 * time.Millisecond

	// cutChunk bounds one transaction of cut elements.
	cutChunk = 4096
)

// revoker ends the connections that a commit no longer allows. It works beside the loop, so that no policy waits for it.
type revoker struct {
	cfg   *Config
	table ruleset.TableID
	// allows judges a connection by the rules that are in force when it is asked.
	allows func(policy.Connection) (bool, error)
	// bridged reports whether an address is an endpoint's that is behind a bridge.
	bridged func(netip.Addr) bool
	wake    chan struct{}

	// changed wakes the loop when beforeNAT has another answer.
	changed func()

	begun bool // there has been a commit; owned by the loop

	mu   sync.Mutex
	todo revocation
	// natEnd is when the last connection before NAT leaves the sets by itself.
	natEnd time.Time

	// kept are the connections in the kernel's cut sets with the time of their end. Owned by run.
	kept map[policy.Connection]time.Time
}

// revocation is what is to be looked at.
type revocation struct {
	egress, ingress map[netip.Addr]bool // addresses of endpoints whose policies may allow less
	again           bool                // this is the second look
	loosened        bool                // some policy may allow more
	gone            []netip.Addr        // addresses that have another owner now
	lost            bool                // the sets in the kernel may have been lost with their table
	late            policy.Tightened    // addresses that are for the second look only
}

func newRevoker(cfg *Config, table ruleset.TableID, allows func(policy.Connection) (bool, error), bridged func(netip.Addr) bool, changed func()) *revoker {
	return &revoker{cfg: cfg, table: table, allows: allows, bridged: bridged, changed: changed, wake: make(chan struct{}, 1), kept: map[policy.Connection]time.Time{}}
}

// inherit tells it what a former daemon has loaded. Until the sets have been read the chain that looks at them stays.
func (r *revoker) inherit(loaded ruleset.Ruleset) {
	if policy.CutsBeforeNAT(loaded) {
		r.setNATEnd(r.cfg.Clock.Now().Add(policy.CutTimeout))
	}
}

// beforeNAT reports whether connections before NAT are in the sets, so that the rules have to look there.
func (r *revoker) beforeNAT() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cfg.Clock.Now().Before(r.natEnd)
}

func (r *revoker) setNATEnd(end time.Time) {
	before := r.beforeNAT()
	r.mu.Lock()
	r.natEnd = end
	r.mu.Unlock()
	if r.beforeNAT() != before {
		r.changed()
	}
}

// committed tells it about a commit and asks whom that tightens, at once and later; the first time, and when it is not sure what was
// committed before, it looks at everything that is isolated.
// A pod that was closed, and whose addresses' connections were forgotten for that, had nothing that the rules could revoke.
func (r *revoker) committed(d ruleset.Delta, unsure bool, forgotten map[netip.Addr]bool, tightened func(all bool) (policy.Tightened, policy.Tightened)) {
	if d.Empty() && r.begun && !unsure {
		return
	}
	t, late := tightened(!r.begun || unsure)
	var egress, ingress []netip.Addr
	t.Egress, egress = split(t.Egress, forgotten)
	t.Ingress, ingress = split(t.Ingress, forgotten)
	r.begun = true
	r.mu.Lock()
	defer r.mu.Unlock()
	r.todo.loosened = true
	r.todo.lost = r.todo.lost || unsure || slices.ContainsFunc(d.Apply, func(o ruleset.Op) bool { return o.Kind == ruleset.AddTable && o.Table == r.table })
	r.todo.late.Egress = slices.Concat(r.todo.late.Egress, late.Egress, egress)
	r.todo.late.Ingress = slices.Concat(r.todo.late.Ingress, late.Ingress, ingress)
	r.todo.add(t)
	r.kick()
}

// restored tells it that rules are in force again that somebody had taken away: what was established meanwhile is looked at.
func (r *revoker) restored(t policy.Tightened) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.todo.lost = true
	r.todo.add(t)
	r.kick()
}

// split returns the addresses that are not in a set, and those that are.
func split(list []netip.Addr, set map[netip.Addr]bool) ([]netip.Addr, []netip.Addr) {
	var out, in []netip.Addr
	for _, ip := range list {
		if set[ip] {
			in = append(in, ip)
		} else {
			out = append(out, ip)
		}
	}
	return out, in
}

// owned tells it about addresses that got another owner: what was cut of the former one's is not the new one's.
func (r *revoker) owned(ips []netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.todo.gone = append(r.todo.gone, ips...)
	r.kick()
}

func (r *revoker) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run works until ctx ends. What is under way then is finished by the next daemon's first look at all connections.
func (r *revoker) run(ctx context.Context) {
	begun := false
	// What the timer is for, and what has come since it was set: it is not put off by changes that keep coming.
	var second, later revocation
	var timer <-chan time.Time
	wake := r.wake // nil while it rests
	var rested <-chan time.Time
	for {
		var work revocation
		select {
		case <-ctx.Done():
			return
		case <-rested:
			wake, rested = r.wake, nil
			continue
		case <-wake:
			r.mu.Lock()
			work, r.todo = r.todo, revocation{}
			r.mu.Unlock()
		case <-timer:
			work, second, later, timer = second, later, revocation{}, nil
			work.again = true
			if !second.empty() {
				timer = r.cfg.Clock.After(lookAgain)
			}
		}
		if work.loosened && !begun || work.lost {
			begun = true
			clear(r.kept)
			r.remember(ctx)
		}
		begin := r.cfg.Clock.Now()
		// The former owner's connections were forgotten before this was told of it: what is found now is the new one's.
		goneErr := r.release(ctx, func(c policy.Connection) bool {
			return slices.Contains(work.gone, c.Src.Addr()) || slices.Contains(work.gone, c.Dst.Addr())
		})
		n, err := r.revoke(ctx, work)
		if ctx.Err() != nil {
			return
		}
		var againErr error
		if judge := newJudge(r.allows); work.loosened {
			againErr = errors.Join(r.release(ctx, judge.allows), judge.err)
		}
		if err = errors.Join(goneErr, err, againErr); err != nil {
			r.cfg.Log.Error("connections that are no longer allowed could not all be ended", "error", err, "retry", lookAgain)
		}
		if n > 0 {
			took := r.cfg.Clock.Since(begin)
			r.cfg.Metrics.Revoked.Add(float64(n))
			r.cfg.Metrics.RevokeSeconds.Observe(took.Seconds())
			r.cfg.Log.Info("connections ended that policies no longer allow", "connections", n, "took", took)
		}
		if took := r.cfg.Clock.Since(begin); !work.empty() && took > 0 {
			wake, rested = nil, r.cfg.Clock.After(min(restShare*took, mostRest))
		}
		var again revocation
		if !work.again || err != nil {
			again.merge(work)
		}
		again.add(work.late)
		switch {
		case again.empty():
		case timer == nil:
			second.merge(again)
			timer = r.cfg.Clock.After(lookAgain)
		default:
			later.merge(again)
		}
	}
}

// remember reads what a former daemon has put into the sets: what is allowed again has to leave them.
func (r *revoker) remember(ctx context.Context) {
	local, err := r.cfg.Links.Addresses()
	for _, set := range policy.CutSets() {
		elems, e := r.cfg.Kernel.Elements(ctx, r.table, set)
		err = errors.Join(err, e)
		for _, elem := range elems {
			if c, ok := policy.Uncut(set, elem); ok {
				c.ToNode = local[c.Dst.Addr()]
				r.kept[c] = r.cfg.Clock.Now().Add(policy.CutTimeout)
			}
		}
	}
	if err == nil {
		r.setNATEnd(r.lastBeforeNAT())
	}
	if err != nil && ctx.Err() == nil {
		r.cfg.Log.Warn("revoked connections of a former daemon are not known: they stay dead until their timeout if they are allowed again", "error", err)
	}
}

// empty reports whether no connections are to be looked at.
func (w *revocation) empty() bool { return len(w.egress)+len(w.ingress) == 0 }

func (w *revocation) add(t policy.Tightened) {
	if w.egress == nil {
		w.egress, w.ingress = map[netip.Addr]bool{}, map[netip.Addr]bool{}
	}
	for _, ip := range t.Egress {
		w.egress[ip] = true
	}
	for _, ip := range t.Ingress {
		w.ingress[ip] = true
	}
}

// merge adds the addresses of another one.
func (w *revocation) merge(from revocation) {
	if w.egress == nil {
		w.egress, w.ingress = map[netip.Addr]bool{}, map[netip.Addr]bool{}
	}
	maps.Copy(w.egress, from.egress)
	maps.Copy(w.ingress, from.ingress)
}

// revoke ends the connections of the addresses that the rules do not allow, and returns how many there were.
func (r *revoker) revoke(ctx context.Context, work revocation) (int, error) {
	if work.empty() {
		return 0, nil
	}
	local, err := r.cfg.Links.Addresses()
	if err != nil {
		return 0, fmt.Errorf("list the node's addresses: %w", err)
	}
	judge := newJudge(r.allows)
	total := 0
	var errs []error
	// What one dump has found does not wait for the next: each takes the kernel tens of milliseconds when many connections are tracked.
	// What could not be judged goes on, and is no reason to spare the others.
	for _, filter := range filters(work) {
		// Several entries may be one connection to the rules: echo requests with different identifiers have no ports, and with NAT one
		// source port may lead to one server in two ways.
		revoked := map[conntrack.Flow]policy.Connection{}
		err := r.cfg.Connections.Flows(ctx, filter, func(f conntrack.Flow) {
			if !work.egress[f.Src.Addr()] && !work.ingress[f.Dst.Addr()] {
				return
			}
			if local[f.Src.Addr()] || f.Status&conntrack.Expected != 0 {
				return // the node's own connections are always allowed, and what a helper expected belongs to another one
			}
			c := policy.Connection{Proto: f.Proto, Src: f.Src, Dst: f.Dst, ToNode: local[f.Dst.Addr()]}
			if !judge.allows(c) {
				revoked[f] = c
			}
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("list connections: %w", err))
		}
		n, err := r.end(ctx, revoked)
		total += n
		errs = append(errs, err)
	}
	return total, errors.Join(append(errs, judge.err)...)
}

// end ends connections and returns how many there were: first the set, then the entries, so that nothing comes back in between.
func (r *revoker) end(ctx context.Context, revoked map[conntrack.Flow]policy.Connection) (int, error) {
	if len(revoked) == 0 {
		return 0, nil
	}
	tuples, asked := map[policy.Connection]bool{}, map[policy.Connection]bool{}
	for f, c := range revoked {
		if hasPorts(c.Proto) {
			tuples[c] = true
		}
		if c.Proto == ruleset.ProtoTCP && f.OrigDst.IsValid() && r.bridged(f.Src.Addr()) {
			asked[policy.Connection{Proto: f.Proto, Src: f.Src, Dst: f.OrigDst, BeforeNAT: true}] = true
		}
	}
	cutErr := r.cut(ctx, slices.Collect(maps.Keys(tuples)))
	// These are about the clients' resets only, so they come apart, and the entries do not wait until the loop has added the
	// chain: meanwhile the policies deny what the clients send.
	if len(asked) > 0 {
		cutErr = errors.Join(cutErr, r.cut(ctx, slices.Collect(maps.Keys(asked))))
		r.setNATEnd(r.lastBeforeNAT())
	}
	// Without an element a connection may come back from its other end, with its entry it would simply go on.
	n, err := r.cfg.Connections.Delete(ctx, slices.Collect(maps.Keys(revoked)))
	if err != nil {
		err = fmt.Errorf("delete conntrack entries: %w", err)
	}
	return n, errors.Join(cutErr, err)
}

// filters says which entries to ask the kernel for, IPv4 before IPv6. Two dumps at once would be slower than one after the other, as they
// lock the same buckets.
func filters(work revocation) []conntrack.Filter {
	if len(work.egress)+len(work.ingress) > maxFiltered {
		return []conntrack.Filter{{}}
	}
	var list []conntrack.Filter
	for _, ip := range slices.SortedFunc(maps.Keys(work.egress), netip.Addr.Compare) {
		list = append(list, conntrack.Filter{Src: ip})
	}
	for _, ip := range slices.SortedFunc(maps.Keys(work.ingress), netip.Addr.Compare) {
		list = append(list, conntrack.Filter{Dst: ip})
	}
	slices.SortStableFunc(list, func(a, b conntrack.Filter) int {
		return cmp.Compare(max(a.Src.BitLen(), a.Dst.BitLen()), max(b.Src.BitLen(), b.Dst.BitLen()))
	})
	return list
}

func hasPorts(proto uint8) bool {
	return proto == ruleset.ProtoTCP || proto == ruleset.ProtoUDP || proto == ruleset.ProtoSCTP
}

// cut puts connections into the kernel's sets, those before NAT apart from others. A full set loses its oldest elements first.
func (r *revoker) cut(ctx context.Context, connections []policy.Connection) error {
	now := r.cfg.Clock.Now()
	for chunk := range slices.Chunk(connections, cutChunk) {
		chunk = slices.DeleteFunc(slices.Clone(chunk), func(c policy.Connection) bool {
			end, ok := r.kept[c]
			return ok && end.After(now)
		})
		err := r.commit(ctx, ruleset.AddElements, chunk)
		if errors.Is(err, unix.ENFILE) {
			if err := r.evict(ctx, len(chunk), chunk[0].BeforeNAT); err != nil {
				return err
			}
			err = r.commit(ctx, ruleset.AddElements, chunk)
		}
		if err != nil {
			return fmt.Errorf("cut %d connections: %w", len(chunk), err)
		}
		for _, c := range chunk {
			r.kept[c] = now.Add(policy.CutTimeout)
		}
	}
	return nil
}

// lastBeforeNAT is when the last connection before NAT leaves the sets by itself; zero if there is none.
func (r *revoker) lastBeforeNAT() time.Time {
	var last time.Time
	for c, end := range r.kept {
		if c.BeforeNAT && end.After(last) {
			last = end
		}
	}
	return last
}

// evict removes the n oldest connections of each family from the sets: which of them is full is not known.
func (r *revoker) evict(ctx context.Context, n int, beforeNAT bool) error {
	var families [2][]policy.Connection
	for c := range r.kept {
		if c.BeforeNAT != beforeNAT {
			continue
		}
		i := 0
		if c.Src.Addr().Is6() {
			i = 1
		}
		families[i] = append(families[i], c)
	}
	var oldest []policy.Connection
	for _, list := range families {
		slices.SortFunc(list, func(a, b policy.Connection) int { return r.kept[a].Compare(r.kept[b]) })
		oldest = append(oldest, list[:min(n, len(list))]...)
	}
	return r.uncut(ctx, oldest)
}

// release takes the connections out of the sets that which selects. What their clients asked for goes with them. It is known by
// the client's end alone, which a former daemon has left as well; the worst is a client that is not reset.
func (r *revoker) release(ctx context.Context, which func(policy.Connection) bool) error {
	now := r.cfg.Clock.Now()
	type client struct {
		proto uint8
		netip.AddrPort
	}
	var list, asked []policy.Connection
	released := map[client]bool{}
	for c, end := range r.kept {
		switch {
		case !end.After(now):
			delete(r.kept, c)
		case c.BeforeNAT:
			asked = append(asked, c)
		case which(c):
			list = append(list, c)
			released[client{c.Proto, c.Src}] = true
		}
	}
	if len(asked) == 0 {
		return r.uncut(ctx, list)
	}
	asked = slices.DeleteFunc(asked, func(c policy.Connection) bool { return !released[client{c.Proto, c.Src}] })
	err := r.uncut(ctx, append(asked, list...))
	r.setNATEnd(r.lastBeforeNAT())
	return err
}

// uncut removes connections from the sets, where some may have ended by themselves: then one by one.
func (r *revoker) uncut(ctx context.Context, list []policy.Connection) error {
	var errs []error
	for chunk := range slices.Chunk(list, cutChunk) {
		err := r.commit(ctx, ruleset.DelElements, chunk)
		if errors.Is(err, unix.ENOENT) {
			err = nil
			for _, c := range chunk {
				if e := r.commit(ctx, ruleset.DelElements, []policy.Connection{c}); e != nil && !errors.Is(e, unix.ENOENT) {
					err = e
				}
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("allow %d connections again: %w", len(chunk), err))
			continue
		}
		for _, c := range chunk {
			delete(r.kept, c)
		}
	}
	return errors.Join(errs...)
}

func (r *revoker) commit(ctx context.Context, kind ruleset.OpKind, connections []policy.Connection) error {
	if len(connections) == 0 {
		return nil
	}
	bySet := map[string]*ruleset.Op{}
	for _, c := range connections {
		set, elem := policy.Cut(c)
		op := bySet[set.Name]
		if op == nil {
			op = &ruleset.Op{Kind: kind, Table: r.table, Set: set, Elements: map[ruleset.Elem]ruleset.Verdict{}}
			bySet[set.Name] = op
		}
		op.Elements[elem] = ruleset.Verdict{}
	}
	var d ruleset.Delta
	for _, op := range bySet {
		d.Apply = append(d.Apply, *op)
	}
	return r.cfg.Kernel.Commit(ctx, d)
}

// judge remembers verdicts: rules look at no source port of a connection that has begun, so that thousands of connections to
// one port are one question.
type judge struct {
	ask   func(policy.Connection) (bool, error)
	known map[policy.Connection]bool
	err   error
}

func newJudge(ask func(policy.Connection) (bool, error)) *judge {
	return &judge{ask: ask, known: map[policy.Connection]bool{}}
}

func (j *judge) allows(c policy.Connection) bool {
	c.Src = netip.AddrPortFrom(c.Src.Addr(), 0)
	allowed, ok := j.known[c]
	if !ok {
		var err error
		if allowed, err = j.ask(c); err != nil {
			j.err = errors.Join(j.err, err)
			allowed = true // not known: not to be ended
		}
		j.known[c] = allowed
	}
	return allowed
}
