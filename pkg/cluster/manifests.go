package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// A file is read when nothing has touched it, and the directory, for settleQuiet: editors and cp write in steps. A file
	// that never rests is read after settleMax.
	settleQuiet = 25 * time.Millisecond
	settleMax   = 250 * time.Millisecond
	// "command > file" empties the file before the command has run; its objects stay for this long.
	emptyHold = time.Second
	// An unchanged file is not read again, once it is certain that a second write would have changed its times.
	timesTrusted = 2 * time.Second
	// How often a directory that changes all the time is walked again before a file counts as deleted.
	maxWalks = 5
	// For how long a directory that never rests while it is walked keeps files that the walks did not find.
	maxUnrest = 30 * time.Second
)

// Manifests is the source that reads a directory of manifests and follows its changes.
type Manifests struct {
	// Poll is how often the directory is read without being told to: it bounds the delay if inotify loses an event, has no
	// watches left, or cannot see (changes behind symbolic links, network file systems).
	Poll time.Duration
	// Cache is the directory that keeps each file's last good content for the next start: a file that is bad then would
	// open the pods that it protected. Empty: nothing is kept.
	Cache string

	dir        string
	log        *slog.Logger
	newWatcher func() (*fsnotify.Watcher, error)

	// Owned by Run.
	watcher     *fsnotify.Watcher // nil: poll only
	watchFailed bool
	files       map[string]*manifest
	applied     map[Key]Object
	found       []Problem         // of the last load
	complete    bool              // the last load saw everything there is
	unrest      time.Time         // since when files are missed and the directory has not rested during a load
	stale       bool              // the cache may hold files that are gone
	unusable    map[string]string // the reason, by name in the cache
	cacheFault  string            // why the cache cannot be read or written

	mu       sync.Mutex
	problems []Problem
}

// NewManifests returns a source for the directory dir.
func NewManifests(dir string, log *slog.Logger) *Manifests {
	return &Manifests{
		Poll:       5 * time.Second,
		dir:        filepath.Clean(dir),
		log:        log,
		newWatcher: fsnotify.NewWatcher,
		files:      map[string]*manifest{},
		applied:    map[Key]Object{},
		stale:      true,
		unusable:   map[string]string{},
	}
}

// Check tells whether there is a directory to read.
func (m *Manifests) Check() error {
	info, err := os.Stat(m.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("--manifests %s: no such directory; create it, it may stay empty", m.dir)
	case err != nil:
		return fmt.Errorf("--manifests %s: %w", m.dir, reason(err))
	case !info.IsDir():
		return fmt.Errorf("--manifests %s: not a directory", m.dir)
	}
	return nil
}

// Problems returns what is wrong with the manifests now, by file and line.
func (m *Manifests) Problems() []Problem {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.problems)
}

// Run feeds sink until ctx ends. It fails only if there is no such directory at the start; later that is a problem like
// any other, and the last content stays.
func (m *Manifests) Run(ctx context.Context, sink Sink) error {
	err := m.Check()
	if err != nil {
		return err
	}
	m.restore()
	var events chan fsnotify.Event
	var failures chan error
	if m.watcher, err = m.newWatcher(); err != nil {
		m.watchFails(err)
	} else {
		defer m.watcher.Close()
		events, failures = m.watcher.Events, m.watcher.Errors
	}
	again := m.load(ctx, sink)
	sink.Synced()
	m.keep()

	poll := time.NewTicker(m.Poll)
	defer poll.Stop()
	for {
		var retry <-chan time.Time
		if again > 0 {
			retry = time.After(again)
		}
		select {
		case <-ctx.Done():
			return nil
		case e := <-events:
			if e.Op == fsnotify.Chmod {
				continue // fsnotify also says so for every change of a time stamp; polling sees modes
			}
			m.settle(ctx, events)
		case err := <-failures: // an overflow lost events: read everything
			m.log.Warn("watch manifests", "dir", m.dir, "err", err)
		case <-poll.C:
		case <-retry:
		}
		again = m.load(ctx, sink)
		m.keep()
	}
}

func (m *Manifests) watchFails(err error) {
	if !m.watchFailed {
		m.watchFailed = true
		m.log.Warn("watch manifests failed, changes are seen by polling (check fs.inotify.max_user_instances and max_user_watches)",
			"dir", m.dir, "poll", m.Poll, "err", err)
	}
}

// settle waits until the directory rests, so that an edit of several files is one change.
func (m *Manifests) settle(ctx context.Context, events <-chan fsnotify.Event) {
	deadline := time.After(settleMax)
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
		case <-deadline:
			return
		case <-time.After(settleQuiet):
			return
		}
	}
}

// load reads what has changed, gives the differences to sink and returns when to look again, if not 0.
func (m *Manifests) load(ctx context.Context, sink Sink) time.Duration {
	var again time.Duration
	retry := func(after time.Duration) {
		if after > 0 && (again == 0 || after < again) {
			again = after
		}
	}
	tree := m.walk()
	missing := m.misses(tree.files)
	for range maxWalks {
		if !missing {
			break
		}
		// A file that moves while the tree is walked is in neither place: what is gone must be gone twice, and nothing may have
		// happened meanwhile.
		again := m.walk()
		same := slices.Equal(again.files, tree.files)
		if tree = again; same {
			break
		}
	}
	if missing && m.disturbed() {
		if m.unrest.IsZero() {
			m.unrest = time.Now()
		}
		if time.Since(m.unrest) < maxUnrest {
			tree.lost[m.dir] = nil
		}
		retry(settleQuiet)
	} else {
		m.unrest = time.Time{}
	}
	problems := tree.problems

	deadline := time.Now().Add(settleMax)
	for _, name := range tree.files {
		f := m.files[name]
		if f == nil {
			f = &manifest{}
			m.files[name] = f
		}
		hold, err := f.refresh(ctx, name, deadline)
		if errors.Is(err, fs.ErrNotExist) {
			// Deleted since the walk, or moved, perhaps to where it was before: the next load decides what is gone.
			tree.lost[m.dir] = nil
			retry(settleQuiet)
		} else if err != nil {
			problems = append(problems, m.unread(name, err)...)
		}
		retry(hold)
	}
	for name := range m.files {
		if _, listed := slices.BinarySearch(tree.files, name); !listed && !tree.isLost(name) {
			delete(m.files, name)
			m.stale = true
		}
	}
	for name, err := range tree.lost {
		if err != nil {
			problems = append(problems, m.unread(name, err)...)
		}
	}
	m.complete = len(tree.lost) == 0

	desired := map[Key]Object{}
	origins := map[Key]Problem{}
	for _, name := range slices.Sorted(maps.Keys(m.files)) {
		f := m.files[name]
		problems = append(problems, f.problems...)
		for _, d := range f.definitions {
			key := d.object.Key()
			here := Problem{File: name, Line: d.line, Warning: true}
			if first, ok := origins[key]; ok {
				here.Reason = fmt.Sprintf("%s: already defined at %s:%d, which counts", key, first.File, first.Line)
				problems = append(problems, here)
				continue
			}
			origins[key], desired[key] = here, d.object
		}
	}
	m.found = problems
	m.publish()
	if changes := m.differences(desired); len(changes) > 0 {
		sink.Apply(changes...)
	}
	return again
}

// disturbed reports whether the directory has changed since the events were last taken. They stay taken: a load is due then.
func (m *Manifests) disturbed() bool {
	if m.watcher == nil {
		return false
	}
	changed := false
	for {
		select {
		case e := <-m.watcher.Events:
			changed = changed || e.Op != fsnotify.Chmod
		case <-time.After(time.Millisecond): // fsnotify hands over one at a time
			return changed
		}
	}
}

// misses reports whether a file that is known is not among sorted names.
func (m *Manifests) misses(names []string) bool {
	for name := range m.files {
		if _, found := slices.BinarySearch(names, name); !found {
			return true
		}
	}
	return false
}

func (m *Manifests) walk() tree {
	t := tree{seen: map[string]bool{}, lost: map[string]error{}, watch: m.watch}
	t.walk(m.dir)
	slices.Sort(t.files)
	return t
}

// unread reports that something cannot be read, and what podwall goes by instead.
func (m *Manifests) unread(name string, err error) []Problem {
	var problems []Problem
	report := func(name, instead string) {
		problems = append(problems, Problem{File: name, Reason: fmt.Sprintf("read: %v; %s", reason(err), instead)})
	}
	const kept = "its last content stays in force"
	instead := "nothing is known of its content"
	for file, f := range m.files {
		switch {
		case !isBelow(name, file), f.readAt.IsZero() && f.restored.IsZero():
		case f.restored.IsZero():
			instead = kept
		case file == name:
			instead = f.fromCache()
		default:
			instead = kept
			report(file, f.fromCache())
		}
	}
	report(name, instead)
	return problems
}

// differences brings applied to desired, namespaces before pods before policies.
func (m *Manifests) differences(desired map[Key]Object) []Change {
	var changes []Change
	var added, changed, removed int
	for key := range m.applied {
		if _, ok := desired[key]; !ok {
			changes = append(changes, Change{Key: key})
			delete(m.applied, key)
			removed++
		}
	}
	for key, object := range desired {
		// Parsed again is not changed: the sink keeps the object that it knows.
		old, ok := m.applied[key]
		switch {
		case !ok:
			added++
		case !reflect.DeepEqual(old, object):
			changed++
		default:
			continue
		}
		changes = append(changes, Change{Key: key, Object: object})
		m.applied[key] = object
	}
	if len(changes) > 0 {
		m.log.Info("manifests applied", "dir", m.dir, "added", added, "changed", changed, "removed", removed)
	}
	slices.SortFunc(changes, func(a, b Change) int {
		return cmp.Or(cmp.Compare(a.Key.Kind, b.Key.Kind), cmp.Compare(a.Key.Namespace, b.Key.Namespace), cmp.Compare(a.Key.Name, b.Key.Name))
	})
	return changes
}

// publish makes what was found, and what is wrong with the cache, known, and logs what is new.
func (m *Manifests) publish() {
	problems := slices.Clone(m.found)
	for name, why := range m.unusable {
		problems = append(problems, Problem{File: filepath.Join(m.Cache, name), Reason: why, Warning: true})
	}
	if m.cacheFault != "" {
		problems = append(problems, Problem{File: m.Cache, Reason: m.cacheFault, Warning: true})
	}
	slices.SortStableFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
	})
	m.mu.Lock()
	before := m.problems
	m.problems = problems
	m.mu.Unlock()
	for _, p := range problems {
		if slices.Contains(before, p) {
			continue
		}
		keys := []any{"file", p.File}
		if p.Line != 0 {
			keys = append(keys, "line", p.Line)
		}
		m.log.Warn("manifest problem", append(keys, "reason", p.Reason)...)
	}
	bad := badFiles(problems)
	for _, name := range slices.Sorted(maps.Keys(badFiles(before))) {
		if m.files[name] != nil && !bad[name] {
			m.log.Info("manifest is good again", "file", name)
		}
	}
}

func badFiles(problems []Problem) map[string]bool {
	bad := map[string]bool{}
	for _, p := range problems {
		if !p.Warning {
			bad[p.File] = true
		}
	}
	return bad
}

// watch is called for every directory at every load: the watch of a directory that was deleted and made anew is gone,
// and for an existing one this changes nothing.
func (m *Manifests) watch(dir string) {
	if m.watcher == nil {
		return
	}
	if err := m.watcher.Add(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.watchFails(err)
	}
}
