// Package registry keeps the attachments of this node: in memory, and one file each so that they outlive the daemon.
package registry

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/attach"
)

// Entry is a registered attachment.
type Entry struct {
	attach.Attachment
	// Seq orders ADDs: of two attachments with one address, the higher Seq owns it.
	Seq uint64 `json:"seq"`
	// Detached says that DEL has been here: the endpoint stays closed until its host veth is gone.
	Detached bool `json:"detached,omitempty"`
	// Opened says that the ADD was finished, and has not started over since: the addresses had been closed and their former
	// connections forgotten, and then the pod's policies were in force. Files of older versions do not say it.
	Opened bool `json:"opened,omitempty"`
}

// Registry is safe for concurrent use. Its files are on tmpfs in practice: they vanish on reboot, as the veths do.
type Registry struct {
	dir string

	mu      sync.RWMutex
	entries map[attach.Key]*Entry
	seq     uint64
}

// Open loads the registrations below dir (made 0700 if it is missing). Files that cannot be read are left alone and
// reported in the second value; they make Open fail no more than a missing one does.
func Open(dir string) (*Registry, []error, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("create state directory: %w", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, nil, fmt.Errorf("list state directory %s: %w", dir, err)
	}
	r := &Registry{dir: dir, entries: map[attach.Key]*Entry{}}
	var bad []error
	// What a daemon that was killed had not renamed yet. Nobody else writes here: who opens it is the writer of the node.
	unfinished, err := filepath.Glob(filepath.Join(dir, ".*.json?*"))
	if err != nil {
		return nil, nil, fmt.Errorf("list state directory %s: %w", dir, err)
	}
	for _, f := range unfinished {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			bad = append(bad, fmt.Errorf("unfinished registration: %w", err))
		}
	}
	for _, f := range files {
		e, err := load(f)
		if err != nil {
			bad = append(bad, fmt.Errorf("registration %s: %w", f, err))
			continue
		}
		r.entries[e.Key] = e
		r.seq = max(r.seq, e.Seq)
	}
	return r, bad, nil
}

func load(file string) (*Entry, error) {
	data, err := os.ReadFile(file) //nolint:gosec // a file of our own directory
	if err != nil {
		return nil, err
	}
	var e Entry
	if err := json.Unmarshal(data, &e); err != nil {
		return nil, err
	}
	if err := e.Validate(); err != nil {
		return nil, err
	}
	return &e, nil
}

// path is the file of a key. The length of the container ID keeps ("a-b", "c") and ("a", "b-c") apart.
func (r *Registry) path(k attach.Key) string {
	return filepath.Join(r.dir, fmt.Sprintf("%s-%s.%d.json", k.ContainerID, k.IfName, len(k.ContainerID)))
}

// save writes an entry by rename, so that a daemon that is killed leaves the former one. It syncs, which costs nothing on a tmpfs.
func (r *Registry) save(e *Entry) error {
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("save registration %s: %w", e.Key, err)
	}
	if err := renameio.WriteFile(r.path(e.Key), data, 0o600, renameio.WithTempDir(r.dir)); err != nil {
		return fmt.Errorf("save registration %s: %w", e.Key, withRemedy(err, r.dir))
	}
	return nil
}

// withRemedy says what to do about a directory that takes no more files.
func withRemedy(err error, dir string) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w; make room on the file system of %s", err, dir)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w; mount the file system of %s writable (podwalld's --state-dir)", err, dir)
	}
	return err
}

// Put registers an attachment as the newest. Repeating the same one keeps its place and reports false.
func (r *Registry) Put(a attach.Attachment) (Entry, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.entries[a.Key]; old != nil && !old.Detached && same(&old.Attachment, &a) {
		return *old, false, nil
	}
	e := &Entry{Attachment: a, Seq: r.seq + 1}
	if err := r.save(e); err != nil {
		return Entry{}, false, err
	}
	r.seq++
	r.entries[a.Key] = e
	return *e, true, nil
}

func same(a, b *attach.Attachment) bool {
	return a.Network == b.Network && a.Pod == b.Pod && a.HostLink == b.HostLink && slices.Equal(a.IPs, b.IPs) && maps.Equal(a.Labels, b.Labels)
}

// Detach marks an attachment as deleted. It reports false when there is none.
func (r *Registry) Detach(k attach.Key) (Entry, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.entries[k]
	if old == nil {
		return Entry{}, false, nil
	}
	e := *old
	e.Detached = true
	r.entries[k] = &e // closed even if the file cannot be written
	return e, true, r.save(&e)
}

// SetOpened marks an attachment as opened, or takes the mark away, unless DEL or a newer ADD has come: the mark outlives the tables.
func (r *Registry) SetOpened(k attach.Key, seq uint64, opened bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.entries[k]
	if old == nil || old.Seq != seq || old.Detached || old.Opened == opened {
		return nil
	}
	e := *old
	e.Opened = opened
	if err := r.save(&e); err != nil {
		return err
	}
	r.entries[k] = &e
	return nil
}

// Remove forgets an attachment and its file, unless a newer ADD has taken its place.
func (r *Registry) Remove(k attach.Key, seq uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.entries[k]; e != nil && e.Seq != seq {
		return nil
	}
	if err := os.Remove(r.path(k)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove registration %s: %w", k, withRemedy(err, r.dir))
	}
	delete(r.entries, k)
	return nil
}

// Get returns an attachment.
func (r *Registry) Get(k attach.Key) (Entry, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if e := r.entries[k]; e != nil {
		return *e, true
	}
	return Entry{}, false
}

// Entries returns all attachments, oldest first.
func (r *Registry) Entries() []Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	list := make([]Entry, 0, len(r.entries))
	for _, e := range r.entries {
		list = append(list, *e)
	}
	slices.SortFunc(list, func(a, b Entry) int { return cmp.Compare(a.Seq, b.Seq) })
	return list
}

// Owners says which attachment owns each address: the one of the newest ADD, detached or not. An old DEL never takes an
// address from its newer owner.
func Owners(oldestFirst []Entry) map[netip.Addr]attach.Key {
	owners := map[netip.Addr]attach.Key{}
	for i := range oldestFirst {
		for _, ip := range oldestFirst[i].IPs {
			owners[ip] = oldestFirst[i].Key
		}
	}
	return owners
}
