package cluster

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
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
)

// Manifests is the source that reads a directory of manifests and follows its changes.
type Manifests struct {
	// Poll is how often the directory is read without being told to: it bounds the delay if inotify loses an event, has no
	// watches left, or cannot see (changes behind symbolic links, network file systems).
	Poll time.Duration

	dir        string
	log        *slog.Logger
	newWatcher func() (*fsnotify.Watcher, error)

	// Owned by Run.
	watcher     *fsnotify.Watcher // nil: poll only
	watchFailed bool
	files       map[string]*manifest
	applied     map[Key]Object

	mu       sync.Mutex
	problems []Problem
}

// manifest is what is known of a file.
type manifest struct {
	sum         [sha256.Size]byte
	good        bool // definitions are of content without problems
	definitions []definition
	problems    []Problem
	stamp       stamp
	readAt      time.Time
	emptySince  time.Time
}

// stamp changes when a file does.
type stamp struct {
	inode, device uint64
	size          int64
	modified      time.Time
	changed       syscall.Timespec // ctime: nobody can set it back
}

func stampOf(info fs.FileInfo) stamp {
	s := stamp{size: info.Size(), modified: info.ModTime()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode, s.device, s.changed = sys.Ino, sys.Dev, sys.Ctim
	}
	return s
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
	}
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
	info, err := os.Stat(m.dir)
	if err != nil {
		return fmt.Errorf("read directory of --manifests: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("read directory of --manifests: %s is not a directory", m.dir)
	}
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
	tree := tree{seen: map[string]bool{}, watch: m.watch}
	tree.walk(m.dir)
	slices.Sort(tree.files)
	problems := tree.problems

	var again time.Duration
	retry := func(after time.Duration) {
		if after > 0 && (again == 0 || after < again) {
			again = after
		}
	}
	deadline := time.Now().Add(settleMax)
	for _, name := range tree.files {
		f := m.files[name]
		if f == nil {
			f = &manifest{}
			m.files[name] = f
		}
		hold, err := f.refresh(ctx, name, deadline)
		if errors.Is(err, fs.ErrNotExist) {
			tree.lost = append(tree.lost, name) // deleted since the walk; the next one decides what that was
			retry(settleQuiet)
		} else if err != nil {
			problems = append(problems, Problem{File: name, Reason: fmt.Sprintf("read: %v; its last content stays in force", reason(err))})
		}
		retry(hold)
	}
	for name := range m.files {
		if _, listed := slices.BinarySearch(tree.files, name); !listed && !tree.isLost(name) {
			delete(m.files, name)
		}
	}

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
	m.publish(problems)
	if changes := m.differences(desired); len(changes) > 0 {
		sink.Apply(changes...)
	}
	return again
}

// differences brings applied to desired, namespaces before pods before policies.
func (m *Manifests) differences(desired map[Key]Object) []Change {
	var changes []Change
	for key := range m.applied {
		if _, ok := desired[key]; !ok {
			changes = append(changes, Change{Key: key})
			delete(m.applied, key)
		}
	}
	for key, object := range desired {
		// Parsed again is not changed: the sink keeps the object that it knows.
		if old, ok := m.applied[key]; !ok || !reflect.DeepEqual(old, object) {
			changes = append(changes, Change{Key: key, Object: object})
			m.applied[key] = object
		}
	}
	slices.SortFunc(changes, func(a, b Change) int {
		return cmp.Or(cmp.Compare(a.Key.Kind, b.Key.Kind), cmp.Compare(a.Key.Namespace, b.Key.Namespace), cmp.Compare(a.Key.Name, b.Key.Name))
	})
	return changes
}

func (m *Manifests) publish(problems []Problem) {
	slices.SortStableFunc(problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
	})
	m.mu.Lock()
	before := m.problems
	m.problems = problems
	m.mu.Unlock()
	for _, p := range problems {
		if !slices.Contains(before, p) {
			m.log.Warn("manifest problem", "file", p.File, "line", p.Line, "reason", p.Reason)
		}
	}
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

// refresh reads a file if it has changed and returns for how long it wants to be left as it was, if not 0.
func (f *manifest) refresh(ctx context.Context, name string, deadline time.Time) (time.Duration, error) {
	info, err := os.Stat(name)
	if err != nil {
		return 0, err
	}
	if f.stamp == stampOf(info) && f.readAt.Sub(info.ModTime()) > timesTrusted {
		return 0, nil
	}
	now := time.Now()
	data, info, err := readSettled(ctx, name, deadline)
	if err != nil {
		return 0, err
	}
	if len(data) == 0 && len(f.definitions) > 0 {
		if f.emptySince.IsZero() {
			f.emptySince = now
		}
		if left := emptyHold - now.Sub(f.emptySince); left > 0 {
			return left, nil
		}
	}
	f.emptySince = time.Time{}
	sum := sha256.Sum256(data)
	if f.readAt.IsZero() || f.sum != sum {
		f.parse(name, data)
	}
	f.sum, f.stamp, f.readAt = sum, stampOf(info), now
	return 0, nil
}

// parse takes the new content if it is understood in full, or if there is nothing better to keep.
func (f *manifest) parse(name string, data []byte) {
	definitions, problems := parseFile(name, data)
	good := !slices.ContainsFunc(problems, func(p Problem) bool { return !p.Warning })
	f.problems = problems
	if !good && f.good {
		for i, p := range problems {
			if !p.Warning {
				problems[i].Reason += "; the file's last good content stays in force"
			}
		}
		return
	}
	f.definitions, f.good = definitions, good
}

// readSettled reads a file that nobody is writing, or what there is at the deadline.
func readSettled(ctx context.Context, name string, deadline time.Time) ([]byte, fs.FileInfo, error) {
	for {
		before, err := os.Stat(name)
		if err != nil {
			return nil, nil, err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, nil, err
		}
		after, err := os.Stat(name)
		if err != nil {
			return nil, nil, err
		}
		age := time.Since(after.ModTime())
		resting := stampOf(before) == stampOf(after) && (age < 0 || age >= settleQuiet)
		left := time.Until(deadline)
		if resting || left <= 0 || ctx.Err() != nil {
			return data, after, nil
		}
		select {
		case <-ctx.Done():
		case <-time.After(min(settleQuiet, left)):
		}
	}
}

// tree is one walk through the directory.
type tree struct {
	watch    func(dir string)
	seen     map[string]bool // real paths of directories: symbolic links may form loops
	files    []string
	lost     []string // files, or directories of files, of which nothing can be said now
	problems []Problem
}

// walk follows symbolic links: a ConfigMap's files are links through ..data, which is replaced at every change.
func (t *tree) walk(dir string) {
	t.watch(dir) // before reading, so that nothing falls between
	resolved, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.lose(dir, err)
		return
	}
	if t.seen[resolved] {
		return
	}
	t.seen[resolved] = true
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.lose(dir, err)
		return
	}
	for _, entry := range entries {
		name := filepath.Join(dir, entry.Name())
		if strings.HasPrefix(entry.Name(), ".") {
			continue
		}
		info, err := os.Stat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist) && entry.Type()&fs.ModeSymlink == 0: // deleted just now
		case err != nil:
			t.lose(name, err)
		case info.IsDir():
			t.walk(name)
		case !isManifest(name):
		case !info.Mode().IsRegular():
			t.problems = append(t.problems, Problem{File: name, Reason: "not a regular file, ignored", Warning: true})
		default:
			t.files = append(t.files, name)
		}
	}
}

func (t *tree) lose(name string, err error) {
	t.lost = append(t.lost, name)
	t.problems = append(t.problems, Problem{File: name, Reason: fmt.Sprintf("read: %v; its last content stays in force", reason(err))})
}

func (t *tree) isLost(file string) bool {
	return slices.ContainsFunc(t.lost, func(name string) bool {
		below, err := filepath.Rel(name, file)
		return err == nil && filepath.IsLocal(below)
	})
}

func isManifest(name string) bool {
	return slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}

// reason is a file error without the path, which its reader is told anyway.
func reason(err error) error {
	if pathError := (*fs.PathError)(nil); errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}
