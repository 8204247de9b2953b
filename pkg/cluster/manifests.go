package cluster

import (
	"bytes"
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
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/renameio/v2"
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
	stale       bool              // the cache may hold files that are gone
	unusable    map[string]string // the reason, by name in the cache
	cacheFault  string            // why the cache cannot be read or written

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

	restored time.Time         // not zero: definitions are not the file's but the cache's, of that time
	cached   [sha256.Size]byte // what the cache holds
	unsaved  *lastGood         // what it should hold
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
	tree := m.walk()
	for range maxWalks {
		if !m.misses(tree.files) {
			break
		}
		// A file that moves while the tree is walked is in neither place: what is gone must be gone twice.
		again := m.walk()
		same := slices.Equal(again.files, tree.files)
		if tree = again; same {
			break
		}
	}
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
	if f.sum != sum && f.parse(name, data) {
		f.unsaved = &lastGood{taken: now, content: data}
	}
	if f.cached == sum {
		f.restored, f.unsaved = time.Time{}, nil
	}
	f.sum, f.stamp, f.readAt = sum, stampOf(info), now
	return 0, nil
}

// parse takes the new content if it is understood in full, or if there is nothing better to keep. It reports the former.
func (f *manifest) parse(name string, data []byte) bool {
	definitions, problems := parseFile(name, data)
	good := len(badFiles(problems)) == 0
	f.problems = problems
	if !good && f.good {
		instead := "the file's last good content stays in force"
		if !f.restored.IsZero() {
			instead = f.fromCache()
		}
		for i, p := range problems {
			if !p.Warning {
				problems[i].Reason += "; " + instead
			}
		}
		return false
	}
	f.definitions, f.good, f.restored = definitions, good, time.Time{}
	return good
}

// fromCache says what a restored file goes by.
func (f *manifest) fromCache() string {
	return "the content of " + f.restored.Format(time.RFC3339) + " is used"
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
	lost     map[string]error // files, or directories of files, of which nothing can be said now
	problems []Problem
}

// walk follows symbolic links: a ConfigMap's files are links through ..data, which is replaced at every change.
func (t *tree) walk(dir string) {
	t.watch(dir) // before reading, so that nothing falls between
	resolved, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.lost[dir] = err
		return
	}
	if t.seen[resolved] {
		return
	}
	t.seen[resolved] = true
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.lost[dir] = err
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
			t.lost[name] = err
		case info.IsDir():
			t.walk(name)
		case isManifest(name) && info.Mode().IsRegular():
			t.files = append(t.files, name)
		case isManifest(name):
			t.problems = append(t.problems, Problem{File: name, Reason: "not a regular file, ignored", Warning: true})
		case info.Mode().IsRegular() && !isBystander(entry.Name()):
			t.problems = append(t.problems, Problem{File: name, Reason: "its name does not end in .yaml, .yml or .json, ignored", Warning: true})
		}
	}
}

func (t *tree) isLost(file string) bool {
	for name := range t.lost {
		if isBelow(name, file) {
			return true
		}
	}
	return false
}

// isBelow tells whether file is name, or in the directory name.
func isBelow(name, file string) bool {
	below, err := filepath.Rel(name, file)
	return err == nil && filepath.IsLocal(below)
}

func isManifest(name string) bool {
	return slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}

// isBystander tells the files that nobody takes for manifests: documentation, and what editors leave behind.
func isBystander(base string) bool {
	upper := strings.ToUpper(base)
	return strings.HasSuffix(base, "~") || slices.Contains([]string{".MD", ".SWP", ".BAK", ".ORIG", ".TMP"}, filepath.Ext(upper)) ||
		strings.HasPrefix(upper, "README") || strings.HasPrefix(upper, "LICENSE")
}

// reason is a file error without the path, which its reader is told anyway.
func reason(err error) error {
	if pathError := (*fs.PathError)(nil); errors.As(err, &pathError) {
		return pathError.Err
	}
	if linkError := (*os.LinkError)(nil); errors.As(err, &linkError) { // a rename, with the name of a temporary file
		return linkError.Err
	}
	return err
}

// lastGood is a file of the cache: "checksum time path\n" and the content of the manifest at that path below the root.
type lastGood struct {
	path    string
	taken   time.Time
	content []byte
}

func (l lastGood) encode() []byte {
	rest := fmt.Appendf(nil, "%s %q\n%s", l.taken.UTC().Format(time.RFC3339), l.path, l.content)
	return fmt.Appendf(nil, "%x %s", sha256.Sum256(rest), rest)
}

func decodeLastGood(data []byte) (lastGood, error) {
	sum, rest, _ := bytes.Cut(data, []byte(" "))
	if string(sum) != fmt.Sprintf("%x", sha256.Sum256(rest)) {
		return lastGood{}, errors.New("the checksum differs")
	}
	header, content, _ := bytes.Cut(rest, []byte("\n"))
	taken, quoted, _ := strings.Cut(string(header), " ")
	at, err := time.Parse(time.RFC3339, taken)
	if err != nil {
		return lastGood{}, err
	}
	path, err := strconv.Unquote(quoted) // not JSON: a name need not be UTF-8
	if err != nil {
		return lastGood{}, fmt.Errorf("path %s: %w", quoted, err)
	}
	return lastGood{path, at, content}, nil
}

// cachePrefix begins the names of this directory's files in the cache, which may serve several.
func (m *Manifests) cachePrefix() string {
	root, err := filepath.Abs(m.dir)
	if err != nil {
		root = m.dir // the working directory is gone
	}
	sum := sha256.Sum256([]byte(root))
	return fmt.Sprintf("%x-", sum[:8])
}

func cacheName(prefix, path string) string {
	return fmt.Sprintf("%s%x", prefix, sha256.Sum256([]byte(path)))
}

// path is a file's below the directory.
func (m *Manifests) path(file string) string {
	path, err := filepath.Rel(m.dir, file)
	if err != nil {
		return file
	}
	return path
}

// restore begins with what the daemon knew when it ended: the first load then treats a bad, unreadable or emptied file as
// any later load does.
func (m *Manifests) restore() {
	if m.Cache == "" {
		return
	}
	entries, err := os.ReadDir(m.Cache)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.cacheFault = fmt.Sprintf("read: %v; the last good content of manifests is not known", reason(err))
	}
	prefix := m.cachePrefix()
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), prefix) {
			continue
		}
		name, f, err := m.restoreFile(prefix, entry.Name())
		if err != nil {
			m.unusable[entry.Name()] = fmt.Sprintf("last good content of a manifest cannot be used: %v; ignored", err)
			continue
		}
		m.files[name] = f
	}
}

func (m *Manifests) restoreFile(prefix, entry string) (string, *manifest, error) {
	data, err := os.ReadFile(filepath.Join(m.Cache, entry)) //nolint:gosec // a file of our own directory
	if err != nil {
		return "", nil, reason(err)
	}
	last, err := decodeLastGood(data)
	if err != nil {
		return "", nil, err
	}
	if cacheName(prefix, last.path) != entry {
		return "", nil, fmt.Errorf("it is that of %s", last.path)
	}
	name := filepath.Join(m.dir, last.path)
	f := &manifest{sum: sha256.Sum256(last.content)}
	if !f.parse(name, last.content) { // another version of podwall may have understood it
		first := slices.IndexFunc(f.problems, func(p Problem) bool { return !p.Warning })
		return "", nil, errors.New(f.problems[first].String())
	}
	f.restored, f.cached = last.taken, f.sum
	return name, f, nil
}

// keep brings the cache up to date. What fails is tried again after the next load.
func (m *Manifests) keep() {
	fault := ""
	if err := m.updateCache(); err != nil {
		fault = fmt.Sprintf("write: %v; the last good content of manifests is not kept for the next start", reason(err))
	}
	if fault != m.cacheFault {
		m.cacheFault = fault
		m.publish()
	}
}

// updateCache stops at the first error: the next file would meet the same full or read-only disk.
func (m *Manifests) updateCache() error {
	prefix := m.cachePrefix()
	if m.Cache != "" && m.stale && m.complete {
		if err := m.sweepCache(prefix); err != nil {
			return err
		}
		m.stale = false
	}
	for name, f := range m.files {
		if f.unsaved == nil {
			continue
		}
		if m.Cache != "" {
			if err := m.save(prefix, name, f.unsaved); err != nil {
				return err
			}
			f.cached = sha256.Sum256(f.unsaved.content)
		}
		f.unsaved = nil
	}
	return nil
}

func (m *Manifests) save(prefix, name string, last *lastGood) error {
	last.path = m.path(name)
	entry := cacheName(prefix, last.path)
	if err := os.MkdirAll(m.Cache, 0o700); err != nil {
		return err
	}
	if err := renameio.WriteFile(filepath.Join(m.Cache, entry), last.encode(), 0o600, renameio.WithTempDir(m.Cache)); err != nil {
		return err
	}
	delete(m.unusable, entry)
	return nil
}

// sweepCache removes what belongs to files that are gone: a new file of that name has nothing to do with them.
func (m *Manifests) sweepCache(prefix string) error {
	entries, err := os.ReadDir(m.Cache)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	wanted := map[string]bool{}
	for name := range m.files {
		wanted[cacheName(prefix, m.path(name))] = true
	}
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), prefix) || wanted[entry.Name()] {
			continue
		}
		if err := os.Remove(filepath.Join(m.Cache, entry.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		delete(m.unusable, entry.Name())
	}
	return nil
}
