package reconcile

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/utils/clock"

	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// A foreign commit is looked at as soon as it is told. Then there is none for calmShare times as long as the look has taken, within
// these bounds: who commits all the time costs a tenth of the loop's time, and a change waits for a tenth of a second at most.
// kube-proxy commits once a second.
const (
	calmShare = 10
	leastCalm = 10 * time.Millisecond
	mostCalm  = 100 * time.Millisecond
)

// mostNames bounds how many of those who committed since the last look are remembered.
const mostNames = 4

// foreign is what is known of transactions that others commit.
type foreign struct {
	mine   bool             // nobody else could change what is loaded when last asked
	unseen bool             // a look has failed and is still to be had
	due    <-chan time.Time // of the next look; nil when nothing was told
	calm   time.Time        // not before
	names  []string         // who committed since the last look
}

func (f *foreign) heard(who string, c clock.Clock) {
	if who != "" && len(f.names) < mostNames && !slices.Contains(f.names, who) {
		f.names = append(f.names, who)
	}
	if f.due == nil {
		f.due = c.After(max(0, f.calm.Sub(c.Now())))
	}
}

// by names those who may have done what is found.
func (f *foreign) by() string {
	if len(f.names) == 0 {
		return "unknown"
	}
	return strings.Join(f.names, ", ")
}

// audit looks whether others have changed the tables, and restores what was loaded, without regard to whether all objects are
// known: what a former daemon loaded is in force as well.
func (l *Loop) audit(ctx context.Context) error {
	if l.isDown() || !l.started {
		l.foreign = foreign{mine: l.foreign.mine}
		return nil
	}
	begin := l.cfg.Clock.Now()
	want := l.loaded
	err := l.verify(ctx)
	now := l.cfg.Clock.Now()
	l.foreign.calm = now.Add(min(max(leastCalm, calmShare*now.Sub(begin)), mostCalm))
	if err == nil {
		restore := ruleset.Diff(l.loaded, want)
		if err = l.commit(ctx, restore); err == nil && (!restore.Empty() || l.unsure) && l.revoker != nil {
			l.revoker.restored(policy.Isolated(want))
			l.unsure = false
		}
	}
	if nft.IsRefusal(err) && l.isSynced() {
		l.foreign.unseen, l.foreign.due = false, nil // the pass that follows finds out what is refused
		return err
	}
	l.loaded = want
	if err != nil {
		l.generation = 0 // it is not what is loaded: the next look must not be spared
	}
	l.foreign.unseen = err != nil
	l.foreign.due, l.foreign.names = nil, nil
	return err
}

// verify looks whether the kernel still has what was loaded, if anybody else has committed since: it may have been flushed or
// edited (nft flush ruleset), and then no difference to what was loaded once would bring it back. Tables that nobody else can
// change are not read for that. It is done when others' commits are told, with each sweep, and before an ADD is answered.
func (l *Loop) verify(ctx context.Context) error {
	generation, err := l.cfg.Kernel.Generation(ctx)
	if err != nil || generation == l.generation && l.foreign.mine {
		return err
	}
	mine, err := l.own(ctx)
	if err != nil || generation == l.generation {
		return err
	}
	if mine {
		l.generation = generation
		return nil
	}
	if generation, err = l.cfg.Kernel.Generation(ctx); err != nil {
		return err
	}
	kernel, err := l.cfg.Kernel.Read(ctx, l.tables()...)
	if err != nil {
		return err
	}
	l.generation = generation
	if d := ruleset.Diff(kernel, l.loaded); !d.Empty() {
		ops := slices.Concat(d.Prepare, d.Apply, d.Cleanup)
		l.cfg.Metrics.Drift.Inc()
		l.cfg.Log.Error("somebody else has changed podwall's tables, they are being restored", "differences", len(ops), "first", ops[0].Name(), "committed", l.foreign.by())
		l.loaded = kernel
	}
	return nil
}

// own sees to it that nobody else can change the tables from now on, where the kernel can do that, and reports whether nobody
// could before; then what is loaded is there.
func (l *Loop) own(ctx context.Context) (bool, error) {
	owned, err := l.cfg.Kernel.Owned(ctx, l.tables()...)
	if err != nil {
		return false, err
	}
	if l.foreign.mine = len(owned) > 0 && l.loadedAre(owned); l.foreign.mine {
		return true, nil
	}
	woken, err := l.cfg.Kernel.Own(ctx, l.tables()...)
	for _, id := range woken {
		l.cfg.Metrics.Drift.Inc()
		l.cfg.Log.Error("somebody else has switched off a table of podwall, it is on again", "table", fmt.Sprintf("%s %s", id.Family, id.Name), "committed", l.foreign.by())
	}
	if len(woken) > 0 && l.started && l.revoker != nil {
		l.revoker.restored(policy.Isolated(l.loaded))
	}
	return false, err
}

// loadedAre reports whether the tables that are loaded are these.
func (l *Loop) loadedAre(ids []ruleset.TableID) bool {
	return len(ids) == len(l.loaded) && !slices.ContainsFunc(ids, func(id ruleset.TableID) bool { return l.loaded.Table(id) == nil })
}
