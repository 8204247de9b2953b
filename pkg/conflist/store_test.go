package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	entry = `{"type":"podwall"}`
	list  = `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"}]}`
	with  = `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"ptp"},{"type":"podwall"}]}`
	other = `{"cniVersion":"1.0.0","name":"m","plugins":[{"type":"bridge"}]}`
	conf  = `{"cniVersion":"0.2.0","name":"n","type":"ptp"}`
)

// madeOf is what becomes of conf.
func madeOf(t *testing.T, conf string, edit func([]byte) []byte) string {
	t.Helper()
	made, err := FromConf([]byte(conf))
	if err != nil {
		t.Fatal(err)
	}
	return string(edit(made))
}

func unedited(list []byte) []byte { return list }

func inserted(list []byte) []byte {
	list, err := Insert(list, []byte(entry))
	if err != nil {
		panic(err)
	}
	return list
}

func newStore(t *testing.T, files map[string]string) *Store {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		put(t, dir, name, text)
	}
	return New(Config{Dir: dir, Entry: []byte(entry), StandDown: filepath.Join(t.TempDir(), StandDownFile)})
}

func put(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// contents returns a directory's files.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a temporary file, renamed into place meanwhile
		}
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = string(text)
	}
	return files
}

func TestStore(t *testing.T) {
	t.Parallel()
	made, madeWith := madeOf(t, conf, unedited), madeOf(t, conf, inserted)
	newer := strings.Replace(conf, "ptp", "bridge", 1)
	for name, tc := range map[string]struct {
		files    map[string]string
		inserted map[string]string // nil: as before
		use      string
		removed  map[string]string // nil: as before Insert
	}{
		"one list": {
			files: map[string]string{"10-n.conflist": list}, inserted: map[string]string{"10-n.conflist": with}, use: "10-n.conflist",
		},
		"installed": {
			files: map[string]string{"10-n.conflist": with}, use: "10-n.conflist", removed: map[string]string{"10-n.conflist": list},
		},
		"first in order": {
			files:    map[string]string{"10-n.conflist": list, "05-m.conflist": other, "README": "x", "00-x.cilium_bak": list},
			inserted: map[string]string{"10-n.conflist": list, "05-m.conflist": string(inserted([]byte(other))), "README": "x", "00-x.cilium_bak": list},
			use:      "05-m.conflist",
		},
		"first that loads": {
			files: map[string]string{
				"00.conflist": "{", "01.conflist": list + "x", "02.conflist": `{"name":"n","plugins":[]}`, "03.conflist": `{"name":"n"}`,
				"04.conf": list, "05.json": `{"type":"ptp"}`, "06.conf": `{"name":"lo","cniVersion":"0.2.0","type":"loopback"}`,
				"07.conflist": `{"plugins":[{"type":"ptp"}]}`, "10-n.conflist": list,
			},
			inserted: map[string]string{
				"00.conflist": "{", "01.conflist": list + "x", "02.conflist": `{"name":"n","plugins":[]}`, "03.conflist": `{"name":"n"}`,
				"04.conf": list, "05.json": `{"type":"ptp"}`, "06.conf": `{"name":"lo","cniVersion":"0.2.0","type":"loopback"}`,
				"07.conflist": `{"plugins":[{"type":"ptp"}]}`, "10-n.conflist": with,
			},
			use: "10-n.conflist",
		},
		"removed everywhere": {
			files:    map[string]string{"10-n.conflist": list, "20-m.conflist": string(inserted([]byte(other))), "30.conflist": "{"},
			inserted: map[string]string{"10-n.conflist": with, "20-m.conflist": string(inserted([]byte(other))), "30.conflist": "{"},
			use:      "10-n.conflist",
			removed:  map[string]string{"10-n.conflist": list, "20-m.conflist": other, "30.conflist": "{"},
		},
		"single plugin": {
			files:    map[string]string{"10-n.conf": conf, "99-m.conflist": other},
			inserted: map[string]string{"10-n.conflist": madeWith, "10-n.conf" + SavedSuffix: conf, "99-m.conflist": other},
			use:      "10-n.conflist",
		},
		"single plugin named json": {
			files:    map[string]string{"10-n.json": conf},
			inserted: map[string]string{"10-n.conflist": madeWith, "10-n.json" + SavedSuffix: conf},
			use:      "10-n.conflist",
		},
		"killed before the single plugin was renamed aside": {
			files:    map[string]string{"10-n.conf": conf, "10-n.conflist": madeWith},
			inserted: map[string]string{"10-n.conflist": madeWith, "10-n.conf" + SavedSuffix: conf},
			use:      "10-n.conflist",
			removed:  map[string]string{"10-n.conf": conf},
		},
		"the main plugin has written its single configuration again": {
			files:    map[string]string{"10-n.conf": newer, "10-n.conflist": madeWith, "10-n.conf" + SavedSuffix: conf},
			inserted: map[string]string{"10-n.conflist": madeOf(t, newer, inserted), "10-n.conf" + SavedSuffix: newer},
			use:      "10-n.conflist",
			removed:  map[string]string{"10-n.conf": newer},
		},
		"leftovers of a killed installer": {
			files:    map[string]string{".podwall-123.tmp": "half", "10-n.conflist": list, ".else.tmp": ""},
			inserted: map[string]string{"10-n.conflist": with, ".else.tmp": ""},
			use:      "10-n.conflist",
			removed:  map[string]string{"10-n.conflist": list, ".else.tmp": ""},
		},
		"a list that looks like ours": {
			files: map[string]string{"10-n.conflist": made}, inserted: map[string]string{"10-n.conflist": madeWith}, use: "10-n.conflist",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, tc.files)
			wantIn, wantOut := tc.inserted, tc.removed
			if wantIn == nil {
				wantIn = tc.files
			}
			if wantOut == nil {
				wantOut = tc.files
			}
			before, err := s.State()
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range []bool{before.State != Installed, false} {
				got, err := s.Insert()
				if err != nil {
					t.Fatal(err)
				}
				if got.Changed != want || got.Path != filepath.Join(s.cfg.Dir, tc.use) {
					t.Errorf("Insert %d: %+v, want changed %t", i, got, want)
				}
				if diff := cmp.Diff(wantIn, contents(t, s.cfg.Dir)); diff != "" {
					t.Fatalf("after Insert (-want +got):\n%s", diff)
				}
			}
			if got, err := s.State(); err != nil || got.State != Installed || got.Path != filepath.Join(s.cfg.Dir, tc.use) {
				t.Errorf("State: %+v, %v", got, err)
			}
			for i := range 2 {
				changed, err := s.Remove()
				if err != nil {
					t.Fatal(err)
				}
				if (len(changed) > 0) != (i == 0) {
					t.Errorf("Remove %d changed %q", i, changed)
				}
				if diff := cmp.Diff(wantOut, contents(t, s.cfg.Dir)); diff != "" {
					t.Fatalf("after Remove (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// Remove must not undo what others did to a conflist that Insert has made.
func TestRemoveKeepsOthersEdits(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ files, want map[string]string }{
		"edited since": {
			map[string]string{"10-n.conflist": with, "10-n.conf" + SavedSuffix: conf},
			map[string]string{"10-n.conflist": list, "10-n.conf" + SavedSuffix: conf},
		},
		"single configuration written anew": {
			map[string]string{"10-n.conflist": madeOf(t, conf, inserted), "10-n.conf" + SavedSuffix: conf, "10-n.conf": strings.Replace(conf, "ptp", "bridge", 1)},
			map[string]string{"10-n.conf": strings.Replace(conf, "ptp", "bridge", 1)},
		},
		"killed while it was put back": {
			map[string]string{"10-n.conflist": madeOf(t, conf, inserted), "10-n.conf": conf},
			map[string]string{"10-n.conf": conf},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, tc.files)
			if _, err := s.Remove(); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, contents(t, s.cfg.Dir)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestStoreRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		files map[string]string
		want  string
	}{
		"no file":                    {nil, "no CNI configuration that a runtime could load in"},
		"nothing that loads":         {map[string]string{"10-n.conflist": "{"}, "10-n.conflist: "},
		"only podwall":               {map[string]string{"10-n.conflist": `{"name":"n","plugins":[{"type":"podwall"}]}`}, "10-n.conflist: parse conflist: it lists no plugin"},
		"a conf beside another list": {map[string]string{"10-n.conf": conf, "10-n.conflist": other}, "remove the one of the two"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, tc.files)
			if got, err := s.Insert(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %+v, %v, want an error about %q", got, err, tc.want)
			}
			if diff := cmp.Diff(tc.files, contents(t, s.cfg.Dir), cmp.Transformer("nil", func(m map[string]string) int { return len(m) })); diff != "" {
				t.Errorf("something changed (-before +after):\n%s", diff)
			}
		})
	}
	t.Run("no directory", func(t *testing.T) {
		t.Parallel()
		s := New(Config{Dir: filepath.Join(t.TempDir(), "none"), Entry: []byte(entry)})
		if _, err := s.Insert(); !errors.Is(err, ErrNoConflist) {
			t.Errorf("Insert: %v", err)
		}
		if _, err := s.State(); !errors.Is(err, ErrNoConflist) {
			t.Errorf("State: %v", err)
		}
		if changed, err := s.Remove(); err != nil || len(changed) > 0 {
			t.Errorf("Remove: %q, %v", changed, err)
		}
	})
	t.Run("a broken file with podwall in it is not passed over by Remove", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, map[string]string{"10-n.conflist": list, "20-m.conflist": with + "}"})
		if _, err := s.Remove(); err == nil || !strings.Contains(err.Error(), "20-m.conflist") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a symbolic link", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, nil)
		elsewhere := t.TempDir()
		put(t, elsewhere, "x", list)
		if err := os.Symlink(filepath.Join(elsewhere, "x"), filepath.Join(s.cfg.Dir, "10-n.conflist")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Insert(); err == nil || !strings.Contains(err.Error(), "symbolic link") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a pipe", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, map[string]string{"10-n.conflist": list})
		if err := unix.Mkfifo(filepath.Join(s.cfg.Dir, "05-pipe.conflist"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Insert(); err != nil || filepath.Base(got.Path) != "10-n.conflist" || len(got.Skipped) != 1 {
			t.Errorf("got %+v, %v", got, err)
		}
	})
}

func TestInsertKeepsModeAndOwner(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{"10-n.conflist": list, "10-n.conf": conf} {
		for _, mode := range []fs.FileMode{0o600, 0o644, 0o666, 0o440} {
			t.Run(fmt.Sprintf("%s %o", name, mode), func(t *testing.T) {
				t.Parallel()
				s := newStore(t, map[string]string{name: text})
				path := filepath.Join(s.cfg.Dir, name)
				if os.Geteuid() == 0 {
					if err := os.Chown(path, 1234, 4321); err != nil {
						t.Fatal(err)
					}
				}
				if err := os.Chmod(path, mode); err != nil {
					t.Fatal(err)
				}
				before, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.Insert(); err != nil {
					t.Fatal(err)
				}
				check := func(path string) {
					t.Helper()
					after, err := os.Stat(path)
					if err != nil {
						t.Fatal(err)
					}
					b, a := before.Sys().(*syscall.Stat_t), after.Sys().(*syscall.Stat_t)
					if before.Mode() != after.Mode() || b.Uid != a.Uid || b.Gid != a.Gid {
						t.Errorf("was %s %d:%d, is %s %d:%d", before.Mode(), b.Uid, b.Gid, after.Mode(), a.Uid, a.Gid)
					}
				}
				check(filepath.Join(s.cfg.Dir, "10-n.conflist"))
				if _, err := s.Remove(); err != nil {
					t.Fatal(err)
				}
				check(path)
			})
		}
	}
}

// The label can be set without an SELinux policy by who has CAP_SYS_ADMIN.
func TestInsertKeepsSELinuxLabel(t *testing.T) {
	t.Parallel()
	s := newStore(t, map[string]string{"10-n.conflist": list})
	path := filepath.Join(s.cfg.Dir, "10-n.conflist")
	const label = "system_u:object_r:container_file_t:s0\x00"
	if err := unix.Setxattr(path, selinuxLabel, []byte(label), 0); err != nil {
		t.Skipf("cannot label files here: %v", err)
	}
	if _, err := s.Insert(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 100)
	if n, err := unix.Getxattr(path, selinuxLabel, got); err != nil || string(got[:n]) != label {
		t.Errorf("label %q, %v", got[:max(n, 0)], err)
	}
}

// containerd (internal/cri/server/cni_conf_syncer.go) loads its configuration again on write, rename and remove events, and not
// on create events. libcni must find the new list by then.
func TestInsertIsNoticedByContainerd(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{"10-n.conflist": list, "10-n.conf": conf} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, map[string]string{name: text})
			w, err := fsnotify.NewWatcher()
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			if err := w.Add(s.cfg.Dir); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Insert(); err != nil {
				t.Fatal(err)
			}
			put(t, s.cfg.Dir, "end", "")
			var trace []string
			renames := 0
			for e := range w.Events {
				if filepath.Base(e.Name) == "end" {
					break
				}
				trace = append(trace, e.String())
				if e.Has(fsnotify.Rename) {
					renames++
				}
				if filepath.Ext(e.Name) == ".conflist" && (e.Has(fsnotify.Write) || e.Has(fsnotify.Remove)) {
					t.Errorf("not written in one step: %s", e)
				}
			}
			final := filepath.Join(s.cfg.Dir, "10-n.conflist")
			if renames == 0 || !slices.ContainsFunc(trace, func(e string) bool { return strings.HasPrefix(e, "CREATE") && strings.Contains(e, `"`+final+`"`) }) {
				t.Errorf("containerd would miss this:\n%s", strings.Join(trace, "\n"))
			}
			if _, err := libcni.ConfListFromFile(final); err != nil {
				t.Error(err)
			}
		})
	}
}

// What the main plugin writes between reading and writing must not be lost.
func TestInsertDoesNotOverwriteNewerFile(t *testing.T) {
	t.Parallel()
	s := newStore(t, map[string]string{"10-n.conflist": list})
	f, _, err := s.inUse()
	if err != nil {
		t.Fatal(err)
	}
	put(t, s.cfg.Dir, "new", other)
	if err := os.Rename(filepath.Join(s.cfg.Dir, "new"), f.path); err != nil {
		t.Fatal(err)
	}
	if _, err := s.insertInto(f); !errors.Is(err, errConflict) {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff(map[string]string{"10-n.conflist": other}, contents(t, s.cfg.Dir)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
