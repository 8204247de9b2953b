package conflist

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/fsnotify/fsnotify"
)

// freeInserts is how often Keep inserts at once. A main plugin's installer that starts again writes its file once or twice.
const freeInserts = 3

// Keep inserts the entry again whenever the file that the runtime uses has none, until ctx ends: the main plugin's installer
// writes its file anew when it starts. An entry that is there stays as it is, whatever its keys. Other programs that insist on
// a conflist without the entry are answered ever more slowly.
func (s *Store) Keep(ctx context.Context, log *slog.Logger) error {
	k := keeper{store: s, log: log, throttle: throttle{pace: s.pace}}
	for ctx.Err() == nil {
		// Watching before looking, and anew for each look: nothing is missed between the two, and a directory that was
		// removed and made again is watched again.
		w := s.watch()
		if w.err != nil {
			k.say(ctx, slog.LevelWarn, "cannot watch the CNI configuration, looking at it regularly instead", "dir", s.cfg.Dir, "err", w.err)
		}
		if hold := k.look(ctx); hold > 0 {
			pause(ctx, hold)
		} else {
			w.wait(ctx)
		}
		w.close()
	}
	return nil
}

// Wait returns when the directory holds a configuration that a runtime could load. Meanwhile it calls progress with the reason
// why not, first at once and then every interval.
func (s *Store) Wait(ctx context.Context, interval time.Duration, progress func(error)) error {
	var last time.Time
	for {
		w := s.watch()
		_, _, err := s.inUse()
		if err == nil || !errors.Is(err, ErrNoConflist) {
			w.close()
			return err
		}
		if now := time.Now(); now.Sub(last) >= interval {
			last = now
			progress(err)
		}
		w.poll = min(w.poll, interval)
		w.wait(ctx)
		w.close()
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// keeper is the state of Keep.
type keeper struct {
	store    *Store
	log      *slog.Logger
	said     string
	throttle throttle
}

// look inserts the entry if it is missing. If that has to wait, it returns how long.
func (k *keeper) look(ctx context.Context) time.Duration {
	unlock, err := Lock(k.store.cfg.Dir)
	if err != nil {
		k.say(ctx, slog.LevelWarn, "cannot keep podwall in the CNI configuration", "err", err)
		return 0
	}
	defer unlock()
	// With the lock held: uninstall writes the marker before it takes the lock to remove the entry.
	if path := k.store.cfg.StandDown; path != "" {
		_, err := os.Stat(path)
		if err == nil {
			k.say(ctx, slog.LevelWarn, "podwall was uninstalled from this node, leaving the CNI configuration alone; podwall-install install undoes it", "marker", path)
			return 0
		}
		if !errors.Is(err, os.ErrNotExist) {
			k.say(ctx, slog.LevelWarn, "cannot keep podwall in the CNI configuration", "err", err)
			return 0
		}
	}
	report, err := k.store.State()
	if err != nil {
		k.say(ctx, slog.LevelWarn, "cannot keep podwall in the CNI configuration", "err", err)
		return 0
	}
	if report.State != Missing {
		k.say(ctx, slog.LevelInfo, "podwall is in the CNI configuration", "file", report.Path)
		return 0
	}
	now := time.Now()
	if hold := k.throttle.hold(now); hold > 0 {
		k.say(ctx, slog.LevelWarn, "another program keeps taking podwall out of the CNI configuration: make it leave other plugins' entries (Cilium: cni-exclusive=false)",
			"file", report.Path, "insertions", k.throttle.inserts)
		return hold
	}
	if report, err = k.store.insert(); err != nil {
		k.say(ctx, slog.LevelWarn, "cannot keep podwall in the CNI configuration", "err", err)
		return 0
	}
	k.throttle.inserted(now)
	k.log.InfoContext(ctx, "podwall was missing from the CNI configuration and is in it again", "file", report.Path)
	k.said = ""
	return 0
}

// say logs, but not what it said last.
func (k *keeper) say(ctx context.Context, level slog.Level, message string, args ...any) {
	if text := fmt.Sprint(message, args); text != k.said {
		k.said = text
		k.log.Log(ctx, level, message, args...) //nolint:sloglint // a constant of every caller
	}
}

// throttle decides how soon the entry may be inserted again.
type throttle struct {
	pace    pace
	inserts int // without a quiet time between them
	last    time.Time
}

func (t *throttle) hold(now time.Time) time.Duration {
	if t.inserts < freeInserts {
		return 0
	}
	hold := t.pace.holdOff << min(t.inserts-freeInserts, 16)
	return max(0, t.last.Add(min(hold, t.pace.maxHold)).Sub(now))
}

func (t *throttle) inserted(now time.Time) {
	if now.Sub(t.last) > 2*t.pace.maxHold {
		t.inserts = 0
	}
	t.inserts++
	t.last = now
}

// watch waits for one change of a directory.
type watch struct {
	watcher *fsnotify.Watcher
	err     error // why there is no watcher
	poll    time.Duration
	settle  time.Duration
}

func (s *Store) watch() watch {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return watch{err: err, poll: s.pace.noWatch}
	}
	if err := watcher.Add(s.cfg.Dir); err != nil {
		_ = watcher.Close()
		return watch{err: err, poll: s.pace.noWatch}
	}
	return watch{watcher: watcher, poll: s.pace.poll, settle: s.pace.settle}
}

// wait returns after a change, after the poll interval, or when ctx ends.
func (w watch) wait(ctx context.Context) {
	var events chan fsnotify.Event
	var errs chan error
	if w.watcher != nil {
		events, errs = w.watcher.Events, w.watcher.Errors
	}
	poll := time.NewTimer(w.poll)
	defer poll.Stop()
	select {
	case <-ctx.Done():
	case <-poll.C:
	case <-events:
		pause(ctx, w.settle)
	case <-errs: //nolint:errcheck // an overflow: something has changed
		pause(ctx, w.settle)
	}
}

func (w watch) close() {
	if w.watcher != nil {
		_ = w.watcher.Close()
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
