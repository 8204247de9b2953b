package conflist

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
)

// follow calls each with every new content of a file until ctx ends, and returns what waits for its end. Writers that rename are
// seen once per write.
func follow(ctx context.Context, t *testing.T, path string, each func(text string)) func() {
	t.Helper()
	w, err := fsnotify.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer w.Close()
		for {
			select {
			case <-ctx.Done():
				return
			case e := <-w.Events:
				if e.Name == path && e.Has(fsnotify.Create) {
					text, _ := os.ReadFile(path)
					each(string(text))
				}
			}
		}
	})
	return wg.Wait
}

// rename replaces a file in one step, as a main plugin's installer does.
func rename(t *testing.T, path, text string) {
	temp := filepath.Join(filepath.Dir(path), "main-plugin.tmp")
	if err := os.WriteFile(temp, []byte(text), 0o644); err != nil {
		t.Error(err)
	}
	if err := os.Rename(temp, path); err != nil {
		t.Error(err)
	}
}

// records is a slog handler's output that may be read meanwhile.
type records struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (r *records) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.buf.Write(p)
}

func (r *records) count(text string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Count(r.buf.String(), text)
}

func (r *records) logger() *slog.Logger { return slog.New(slog.NewTextHandler(r, nil)) }

// quick is a pace without a slow poll, so that only events can make Keep look.
var quick = pace{settle: time.Millisecond, poll: time.Hour, noWatch: 5 * time.Millisecond, holdOff: time.Millisecond, maxHold: time.Millisecond}

func TestKeepInsertsOncePerRewrite(t *testing.T) {
	t.Parallel()
	const rewrites = 20
	s := newStore(t, map[string]string{"10-n.conflist": list})
	s.pace = quick
	path := filepath.Join(s.cfg.Dir, "10-n.conflist")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var mains, ours int
	followed := follow(ctx, t, path, func(text string) {
		switch text {
		case list:
			mains++
		case with:
			ours++
			if mains < rewrites {
				rename(t, path, list)
			} else if ours == rewrites+1 {
				// One more look of Keep, at a file that is as it should be: a loop would write again now.
				put(t, s.cfg.Dir, "unrelated", "")
				time.AfterFunc(300*time.Millisecond, cancel)
			}
		}
	})
	var logs records
	if err := s.Keep(ctx, logs.logger()); err != nil {
		t.Fatal(err)
	}
	followed()
	if ctx.Err() == context.DeadlineExceeded || mains != rewrites || ours != rewrites+1 {
		t.Errorf("%v: the main plugin wrote %d times, Keep %d times\n%s", ctx.Err(), mains, ours, logs.buf.String())
	}
	if n := logs.count("is in it again"); n != ours {
		t.Errorf("%d insertions logged:\n%s", n, logs.buf.String())
	}
}

func TestKeepDoesNotFight(t *testing.T) {
	t.Parallel()
	s := newStore(t, map[string]string{"10-n.conflist": list})
	s.pace = quick
	s.pace.holdOff, s.pace.maxHold = 100*time.Millisecond, time.Hour
	path := filepath.Join(s.cfg.Dir, "10-n.conflist")
	// With holds of 100, 200, 400, 800 ms there are 3 insertions at once and up to 3 more in a second.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	ours := 0
	followed := follow(ctx, t, path, func(text string) {
		if text == with {
			ours++
			rename(t, path, list)
		}
	})
	var logs records
	if err := s.Keep(ctx, logs.logger()); err != nil {
		t.Fatal(err)
	}
	followed()
	if ours <= freeInserts || ours > freeInserts+3 {
		t.Errorf("Keep wrote %d times in a second", ours)
	}
	if logs.count("cni-exclusive=false") == 0 {
		t.Errorf("no hint:\n%s", logs.buf.String())
	}
}

func TestThrottle(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	th := throttle{pace: defaultPace}
	var got []string
	insert := func() {
		hold := th.hold(now)
		got = append(got, hold.String())
		now = now.Add(hold)
		if th.hold(now) != 0 {
			t.Errorf("after %s it still has to wait %s", hold, th.hold(now))
		}
		th.inserted(now)
	}
	for range 12 {
		insert()
	}
	now = now.Add(3 * time.Minute) // the main plugin's next update, long after
	for range 4 {
		insert()
	}
	want := []string{"0s", "0s", "0s", "1s", "2s", "4s", "8s", "16s", "32s", "1m0s", "1m0s", "1m0s", "0s", "0s", "0s", "1s"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("holds (-want +got):\n%s", diff)
	}
}

func TestKeepStandsDown(t *testing.T) {
	t.Parallel()
	s := newStore(t, map[string]string{"10-n.conflist": list})
	s.pace = quick
	s.pace.poll = 5 * time.Millisecond
	put(t, filepath.Dir(s.cfg.StandDown), StandDownFile, "")
	path := filepath.Join(s.cfg.Dir, "10-n.conflist")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var logs records
	done := make(chan error)
	go func() { done <- s.Keep(ctx, logs.logger()) }()
	eventually(t, func() bool { return logs.count("was uninstalled") == 1 })
	rename(t, path, other) // an event
	put(t, s.cfg.Dir, "unrelated", "")
	if diff := cmp.Diff(other, contents(t, s.cfg.Dir)["10-n.conflist"]); diff != "" {
		t.Errorf("Keep changed the list (-want +got):\n%s", diff)
	}
	if err := os.Remove(s.cfg.StandDown); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return contents(t, s.cfg.Dir)["10-n.conflist"] == string(inserted([]byte(other))) })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := logs.count("was uninstalled"); n != 1 {
		t.Errorf("said %d times that it stands down", n)
	}
}

// eventually polls: what it waits for gives no event to a test.
func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("it did not happen in 20 s")
		}
	}
}

// The main plugin comes later than podwall, its directory too, and is then replaced by another.
func TestKeepFollowsTheMainPlugin(t *testing.T) {
	t.Parallel()
	s := newStore(t, nil)
	s.pace = quick
	s.cfg.Dir = filepath.Join(s.cfg.Dir, "net.d")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var logs records
	done := make(chan error)
	go func() { done <- s.Keep(ctx, logs.logger()) }()
	eventually(t, func() bool { return logs.count("cannot keep podwall") > 0 })
	for i, step := range []struct {
		do   func() error
		want map[string]string
	}{
		{
			func() error {
				return errors.Join(os.Mkdir(s.cfg.Dir, 0o755), os.WriteFile(filepath.Join(s.cfg.Dir, "10-n.conflist"), []byte(list), 0o644))
			},
			map[string]string{"10-n.conflist": with},
		},
		{
			func() error { return os.WriteFile(filepath.Join(s.cfg.Dir, "10-n.conflist"), []byte(other), 0o644) }, // in place
			map[string]string{"10-n.conflist": string(inserted([]byte(other)))},
		},
		{
			func() error { return os.WriteFile(filepath.Join(s.cfg.Dir, "05-m.conflist"), []byte(other), 0o644) },
			map[string]string{"10-n.conflist": string(inserted([]byte(other))), "05-m.conflist": string(inserted([]byte(other)))},
		},
		{
			func() error { return os.RemoveAll(s.cfg.Dir) },
			nil,
		},
		{
			func() error {
				return errors.Join(os.Mkdir(s.cfg.Dir, 0o755), os.WriteFile(filepath.Join(s.cfg.Dir, "10-n.conflist"), []byte(list), 0o644))
			},
			map[string]string{"10-n.conflist": with},
		},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if step.want != nil {
			eventually(t, func() bool { return cmp.Equal(step.want, contents(t, s.cfg.Dir)) })
		}
		t.Logf("step %d done", i)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestKeepLeavesOtherKeysAlone(t *testing.T) {
	t.Parallel()
	// Installed with a socket of its own: two daemons with different flags must not fight.
	text := strings.Replace(with, `"podwall"`, `"podwall","socket":"/s"`, 1)
	s := newStore(t, map[string]string{"10-n.conflist": text})
	s.pace = quick
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var logs records
	done := make(chan error)
	go func() { done <- s.Keep(ctx, logs.logger()) }()
	eventually(t, func() bool { return logs.count("podwall is in the CNI configuration") == 1 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := contents(t, s.cfg.Dir)["10-n.conflist"]; got != text {
		t.Errorf("now %s", got)
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	t.Run("until it is there", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, map[string]string{"10-n.conflist": "{"})
		s.pace = quick
		calls := 0
		err := s.Wait(t.Context(), time.Hour, func(reason error) {
			calls++
			if !strings.Contains(reason.Error(), "10-n.conflist: ") {
				t.Errorf("reason: %v", reason)
			}
			rename(t, filepath.Join(s.cfg.Dir, "10-n.conflist"), list)
		})
		if err != nil || calls != 1 {
			t.Errorf("%d calls, %v", calls, err)
		}
	})
	t.Run("until the time is up", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, nil)
		s.cfg.Dir += "/none"
		s.pace = quick
		ctx, cancel := context.WithCancelCause(t.Context())
		calls := 0
		err := s.Wait(ctx, time.Millisecond, func(error) {
			if calls++; calls == 3 {
				cancel(errors.New("time is up"))
			}
		})
		if calls < 3 || !errors.Is(err, ErrNoConflist) || !strings.Contains(err.Error(), "time is up") {
			t.Errorf("%d calls, %v", calls, err)
		}
	})
}
