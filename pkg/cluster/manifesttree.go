package cluster

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

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
