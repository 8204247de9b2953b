package conflist

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

const (
	// StandDownFile is the file in the daemon's state directory that says that podwall was uninstalled from the node.
	StandDownFile = "uninstalled"

	// SavedSuffix is added to the name of a single plugin's configuration when a conflist takes its place. Runtimes do not
	// read files of that name.
	SavedSuffix = ".podwall-saved"

	// tempPattern ends in none of the extensions that runtimes read.
	tempPattern = ".podwall-*.tmp"

	selinuxLabel = "security.selinux"

	// maxConflicts bounds how often an edit starts again because somebody else wrote the file meanwhile.
	maxConflicts = 10
)

// extensions of the files that runtimes read, in lexical order of their names.
var extensions = []string{".conf", ".conflist", ".json"}

// ErrNoConflist says that the directory holds no configuration that a runtime could use.
var ErrNoConflist = errors.New("no CNI configuration that a runtime could load")

// errConflict says that a file is no longer what was read.
var errConflict = errors.New("another program keeps changing it")

// Config describes a node's CNI configuration.
type Config struct {
	Dir       string // the runtime's directory, for example /etc/cni/net.d
	Entry     []byte // what the conflist is to have; Remove and Wait do without
	StandDown string // path of a file; while it is there Keep changes nothing. Empty: Keep never stands down
}

// Store edits the file that the container runtime uses: the first one in the directory that it can load. Processes that use a
// Store on the same directory take turns (flock on the directory, which ends with its process).
type Store struct {
	cfg  Config
	pace pace
}

// Report tells what a Store found or did.
type Report struct {
	Path    string  // the file that the runtime uses
	State   State   // as found, by State; afterwards, by Insert
	Changed bool    // by Insert
	Skipped []error // files before it that no runtime can load
}

// New returns a Store.
func New(cfg Config) *Store { return &Store{cfg: cfg, pace: defaultPace} }

// State tells which file the runtime uses and whether it has the entry.
func (s *Store) State() (Report, error) {
	f, skipped, err := s.inUse()
	if err != nil {
		return Report{}, err
	}
	state, err := StateOf(f.list, s.cfg.Entry)
	if err != nil {
		return Report{}, fmt.Errorf("%s: %w", f.path, err)
	}
	return Report{Path: f.path, State: state, Skipped: skipped}, nil
}

// Insert puts the entry into the file that the runtime uses, unless it is there.
//
// The configuration of a single plugin cannot have a second one. A conflist is made of it beside it, and then it is renamed
// aside, with SavedSuffix: until then the runtime sees it first, so there is a loadable file at all times. Remove undoes this.
func (s *Store) Insert() (Report, error) {
	unlock, err := Lock(s.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return Report{}, fmt.Errorf("directory %s does not exist: %w", s.cfg.Dir, ErrNoConflist)
	}
	if err != nil {
		return Report{}, err
	}
	defer unlock()
	return s.insert()
}

// insert is Insert with the lock held.
func (s *Store) insert() (Report, error) {
	if err := removeTemps(s.cfg.Dir); err != nil {
		return Report{}, err
	}
	for range maxConflicts {
		f, skipped, err := s.inUse()
		if err != nil {
			return Report{}, err
		}
		report, err := s.insertInto(f)
		if errors.Is(err, errConflict) {
			continue
		}
		if err != nil {
			return Report{}, fmt.Errorf("insert podwall into %s: %w", f.path, err)
		}
		report.State, report.Skipped = Installed, skipped
		return report, nil
	}
	return Report{}, fmt.Errorf("insert podwall into the conflist in %s: %w", s.cfg.Dir, errConflict)
}

func (s *Store) insertInto(f file) (Report, error) {
	list, err := Insert(f.list, s.cfg.Entry)
	if err != nil {
		return Report{}, err
	}
	if err := loadable(list); err != nil {
		return Report{}, err
	}
	if f.isList() {
		if bytes.Equal(list, f.text) {
			return Report{Path: f.path}, nil
		}
		return Report{Path: f.path, Changed: true}, f.replace(f.path, list)
	}
	target := f.stem() + ".conflist"
	if old, err := os.ReadFile(target); err == nil {
		if !madeFrom(old, f.stem()) {
			return Report{}, fmt.Errorf("its conflist would take the place of %s: remove the one of the two that is not wanted", target)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return Report{}, err
	}
	if err := f.replace(target, list); err != nil {
		return Report{}, err
	}
	if !f.unchanged() {
		return Report{}, errors.Join(errConflict, os.Remove(target))
	}
	if err := os.Rename(f.path, f.path+SavedSuffix); err != nil {
		return Report{}, err
	}
	return Report{Path: target, Changed: true}, syncDir(s.cfg.Dir)
}

// Remove takes podwall out of every file of the directory and returns the files that it changed.
func (s *Store) Remove() ([]string, error) {
	unlock, err := Lock(s.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeTemps(s.cfg.Dir); err != nil {
		return nil, err
	}
	paths, err := libcni.ConfFiles(s.cfg.Dir, []string{".conflist"})
	if err != nil {
		return nil, fmt.Errorf("list CNI configurations: %w", err)
	}
	var changed []string
	var errs []error
	for _, path := range paths {
		did, err := removeFrom(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("remove podwall from %s: %w", path, err))
		}
		if did {
			changed = append(changed, path)
		}
	}
	return changed, errors.Join(errs...)
}

func removeFrom(path string) (bool, error) {
	for range maxConflicts {
		f, err := read(path)
		if err != nil {
			if bytes.Contains(f.text, []byte(`"`+Type+`"`)) {
				return false, err
			}
			return false, nil // not ours and of no use to anybody
		}
		if saved := f.saved(); saved != "" {
			return true, f.restore(saved)
		}
		list, err := Remove(f.list)
		if err != nil {
			return false, err
		}
		if bytes.Equal(list, f.text) {
			return false, nil
		}
		if madeFrom(f.text, f.stem()) { // and its source is back: Remove was interrupted, or the main plugin wrote it again
			return true, f.restore("")
		}
		if err := f.replace(path, list); !errors.Is(err, errConflict) {
			return err == nil, err
		}
	}
	return false, errConflict
}

// file is a configuration as it was read.
type file struct {
	path string
	info fs.FileInfo
	text []byte
	list []byte // text as a conflist
}

// inUse returns the file that the runtime uses.
func (s *Store) inUse() (file, []error, error) {
	paths, err := libcni.ConfFiles(s.cfg.Dir, extensions)
	if err != nil {
		return file{}, nil, fmt.Errorf("list CNI configurations: %w", err)
	}
	slices.Sort(paths)
	var skipped []error
	for _, path := range paths {
		f, err := read(path)
		if err == nil {
			return f, skipped, nil
		}
		skipped = append(skipped, fmt.Errorf("%s: %w", path, err))
	}
	err = fmt.Errorf("%w in %s", ErrNoConflist, s.cfg.Dir)
	for _, skip := range skipped {
		err = fmt.Errorf("%w; %w", err, skip)
	}
	return file{}, nil, err
}

// read reads a file that a runtime could load. With an error it has the text, if it could be read.
func read(path string) (file, error) {
	f := file{path: path}
	var err error
	// Lstat before reading: what is written later must take the place of what was read, and never that of a newer file.
	if f.info, err = os.Lstat(path); err != nil {
		return f, err
	}
	if target, err := os.Stat(path); err != nil {
		return f, err
	} else if !target.Mode().IsRegular() { // opening a pipe would block
		return f, errors.New("it is not a regular file")
	}
	if f.text, err = os.ReadFile(path); err != nil {
		return f, err
	}
	f.list = f.text
	if !f.isList() {
		if f.list, err = FromConf(f.text); err != nil {
			return f, err
		}
	}
	return f, loadable(f.list)
}

// loadable reports why a runtime could not load a conflist, or would make no pod network of it.
func loadable(list []byte) error {
	loaded, err := libcni.NetworkConfFromBytes(list)
	if err != nil {
		return err
	}
	if len(loaded.Plugins) == 0 {
		return errors.New(`it has no "plugins"`)
	}
	// Installed by runtimes' packages as 99-loopback.conf, and for a moment the only file there is.
	if !slices.ContainsFunc(loaded.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Type != "loopback" }) {
		return errors.New("it makes nothing but loopback interfaces")
	}
	return nil
}

func (f file) isList() bool { return filepath.Ext(f.path) == ".conflist" }

func (f file) stem() string { return strings.TrimSuffix(f.path, filepath.Ext(f.path)) }

// unchanged reports whether the path still leads to what was read.
func (f file) unchanged() bool {
	now, err := os.Lstat(f.path)
	return err == nil && os.SameFile(f.info, now) && now.ModTime().Equal(f.info.ModTime()) && now.Size() == f.info.Size()
}

// saved returns the file that was renamed aside when this conflist was made of it, if that is all there is to this conflist.
func (f file) saved() string {
	for _, ext := range extensions {
		if path := f.stem() + ext + SavedSuffix; sameNetwork(f.text, path) {
			return path
		}
	}
	return ""
}

// madeFrom reports whether a conflist is what Insert makes of a single plugin's configuration of that name, now or before.
func madeFrom(list []byte, stem string) bool {
	for _, ext := range extensions {
		if sameNetwork(list, stem+ext) || sameNetwork(list, stem+ext+SavedSuffix) {
			return true
		}
	}
	return false
}

func sameNetwork(list []byte, confPath string) bool {
	conf, err := os.ReadFile(confPath)
	if err != nil {
		return false
	}
	made, err := FromConf(conf)
	if err != nil {
		return false
	}
	list, err = Remove(list)
	return err == nil && bytes.Equal(list, made)
}

// restore puts what was saved back and removes the conflist that was made of it. A file that the main plugin has written anew
// under the old name wins over the saved one.
func (f file) restore(saved string) error {
	if saved != "" {
		path := strings.TrimSuffix(saved, SavedSuffix)
		_, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = os.Rename(saved, path)
		case err == nil:
			err = os.Remove(saved)
		}
		if err != nil {
			return err
		}
	}
	if err := os.Remove(f.path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(f.path))
}

// replace writes a file with mode, owner and SELinux label of what was read, in one step. The temporary file is in the same
// directory: containerd reloads on the RENAME event of its name and ignores the CREATE event, which is all that a rename from
// elsewhere gives.
func (f file) replace(path string, text []byte) error {
	if !f.info.Mode().IsRegular() {
		return errors.New("it is a symbolic link: point --cni-conf-dir at the directory of its target, or replace it by a file")
	}
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, tempPattern)
	if errors.Is(err, unix.EROFS) {
		return fmt.Errorf("directory %s is on a read-only file system: mount it writable, or name another with --cni-conf-dir", dir)
	}
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // without effect after the rename
	err = f.copyAttributes(temp)
	if err == nil {
		_, err = temp.Write(text)
	}
	if err == nil {
		err = temp.Sync()
	}
	if err := errors.Join(err, temp.Close()); err != nil {
		return fmt.Errorf("write temporary file: %w", err)
	}
	if !f.unchanged() {
		return errConflict
	}
	if err := os.Rename(temp.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

func (f file) copyAttributes(temp *os.File) error {
	if stat, ok := f.info.Sys().(*syscall.Stat_t); ok {
		if err := temp.Chown(int(stat.Uid), int(stat.Gid)); err != nil {
			return err
		}
	}
	if err := temp.Chmod(f.info.Mode().Perm()); err != nil {
		return err
	}
	label := make([]byte, 4096)
	n, err := unix.Lgetxattr(f.path, selinuxLabel, label)
	if err != nil { // no SELinux: ENODATA or ENOTSUP
		return nil
	}
	inherited := make([]byte, len(label))
	if m, err := unix.Fgetxattr(int(temp.Fd()), selinuxLabel, inherited); err == nil && bytes.Equal(inherited[:m], label[:n]) {
		return nil
	}
	if err := unix.Fsetxattr(int(temp.Fd()), selinuxLabel, label[:n], 0); err != nil {
		return fmt.Errorf("set SELinux label: %w", err)
	}
	return nil
}

// removeTemps removes what processes that were killed have left. The caller holds the lock.
func removeTemps(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("list CNI configurations: %w", err)
	}
	for _, e := range entries {
		if ours, _ := filepath.Match(tempPattern, e.Name()); !ours {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove leftover file: %w", err)
		}
	}
	return nil
}

// Lock makes the processes that edit a directory take turns, until unlock is called or the process ends.
func Lock(dir string) (func(), error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("lock directory %s: %w", dir, err)
	}
	return func() { _ = d.Close() }, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// pace holds the durations of Keep and Wait.
type pace struct {
	settle  time.Duration // after an event: a writer that is not atomic may not have finished
	poll    time.Duration // between looks without an event: overlayfs gives none, and a directory can be replaced by another
	noWatch time.Duration // between looks when the kernel refuses to watch (fs.inotify limits)
	holdOff time.Duration // after some insertions at once, doubled by each further one
	maxHold time.Duration
}

var defaultPace = pace{
	settle: 50 * time.Millisecond, poll: 10 * time.Second, noWatch: time.Second, holdOff: time.Second, maxHold: time.Minute,
}
