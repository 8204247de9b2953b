package cluster

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/renameio/v2"
)

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
