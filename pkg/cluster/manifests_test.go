package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
)

const denyShop = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {}}
`

func podYAML(name, label string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {v: %q}}\n", name, label)
}

// writeFiles makes a directory's files, given as name and content in turn.
func writeFiles(t *testing.T, dir string, files ...string) {
	t.Helper()
	for i := 0; i < len(files); i += 2 {
		name := filepath.Join(dir, files[i])
		if err := os.MkdirAll(filepath.Dir(name), 0o750); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(files[i+1]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// must wraps an operation that only prepares.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type running struct {
	*Manifests
	sink *recorder
	log  *logBuffer
	stop func() // ends Run, and waits until it has
}

// runManifests starts a source that polls so rarely that what a test sees it has from inotify, unless configured.
func runManifests(t *testing.T, dir string, configure ...func(*Manifests)) running {
	t.Helper()
	log := &logBuffer{}
	m := NewManifests(dir, log.logger())
	m.Poll = time.Hour
	for _, f := range configure {
		f(m)
	}
	sink := newRecorder()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx, sink) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return running{m, sink, log, stop}
}

func wantProblems(t *testing.T, m running, dir string, want ...string) {
	t.Helper()
	var got []string
	for _, p := range m.Problems() {
		got = append(got, strings.ReplaceAll(p.String(), dir+"/", ""))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

func TestManifestsFirstLoad(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFiles(t, dir,
		"z.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n",
		"a/b/c.yml", podYAML("web", "1"),
		"a/pod.json", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"db"}}`,
		"deny.yaml", denyShop,
		".hidden.yaml", podYAML("hidden", "1"),
		".git/x.yaml", podYAML("hidden", "2"),
		"README.md", "not: [a manifest",
		"pod.yaml~", podYAML("backup", "1"),
		"empty.yaml", "",
	)
	must(t, os.Symlink(".", filepath.Join(dir, "loop")))
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe.yaml"), 0o600))
	m := runManifests(t, dir)
	batch := m.sink.next(t)
	wantChanges(t, batch, "+Namespace shop", "+Pod default/db", "+Pod default/web", "+NetworkPolicy shop/deny")
	if rest := m.sink.waitSynced(t); len(rest) != 0 {
		t.Errorf("more than one batch: %v", describe(rest))
	}
	wantProblems(t, m, dir, "pipe.yaml: not a regular file, ignored")
}

func TestManifestsFollowsChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	m := runManifests(t, dir)
	if got := m.sink.waitSynced(t); len(got) != 0 {
		t.Fatalf("an empty directory has %v", describe(got))
	}
	name := func(elem ...string) string { return filepath.Join(append([]string{dir}, elem...)...) }

	writeFiles(t, dir, "a.yaml", podYAML("x", "1")+"---\n"+podYAML("w", "1"))
	wantChanges(t, m.sink.next(t), "+Pod default/w", "+Pod default/x")

	// An edit in place touches what it changes only.
	writeFiles(t, dir, "a.yaml", podYAML("x", "1")+"---\n"+podYAML("w", "2"))
	wantChanges(t, m.sink.next(t), "+Pod default/w")

	// A replacement by rename with a deletion, an addition and a change is one batch.
	writeFiles(t, dir, ".a.tmp", podYAML("w", "3")+"---\n"+podYAML("z", "1"))
	must(t, os.Rename(name(".a.tmp"), name("a.yaml")))
	wantChanges(t, m.sink.next(t), "+Pod default/w", "-Pod default/x", "+Pod default/z")

	// Directories made later are followed, at any depth.
	must(t, os.MkdirAll(name("sub", "deep"), 0o750))
	writeFiles(t, dir, "sub/deep/b.yaml", podYAML("deep", "1"))
	wantChanges(t, m.sink.next(t), "+Pod default/deep")
	writeFiles(t, dir, "sub/deep/b.yaml", podYAML("deep", "2"))
	wantChanges(t, m.sink.next(t), "+Pod default/deep")

	// A directory that is moved away and back.
	must(t, os.Rename(name("sub"), name(".away")))
	wantChanges(t, m.sink.next(t), "-Pod default/deep")
	must(t, os.Rename(name(".away"), name("sub")))
	wantChanges(t, m.sink.next(t), "+Pod default/deep")

	// A file under a new name is the same objects.
	must(t, os.Rename(name("a.yaml"), name("b.yaml")))
	must(t, os.RemoveAll(name("sub")))
	wantChanges(t, m.sink.next(t), "-Pod default/deep")

	must(t, os.Remove(name("b.yaml")))
	wantChanges(t, m.sink.next(t), "-Pod default/w", "-Pod default/z")
	wantProblems(t, m, dir)
}

// TestManifestsConfigMap swaps ..data as kubelet does.
func TestManifestsConfigMap(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	publish := func(version, content string) {
		t.Helper()
		writeFiles(t, dir, version+"/a.yaml", content)
		must(t, os.Symlink(version, filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	publish("..1", podYAML("x", "1"))
	must(t, os.Symlink("..data/a.yaml", filepath.Join(dir, "a.yaml")))
	m := runManifests(t, dir)
	wantChanges(t, m.sink.waitSynced(t), "+Pod default/x")

	publish("..2", podYAML("x", "2"))
	must(t, os.RemoveAll(filepath.Join(dir, "..1")))
	wantChanges(t, m.sink.next(t), "+Pod default/x")

	// A link to nothing is not a deletion.
	must(t, os.Remove(filepath.Join(dir, "..data")))
	m.log.wait(t, "no such file or directory")
	wantProblems(t, m, dir, "a.yaml: read: no such file or directory; its last content stays in force")
	publish("..3", podYAML("x", "3"))
	wantChanges(t, m.sink.next(t), "+Pod default/x")
	wantProblems(t, m, dir)
}

func TestManifestsKeepsLastGoodContent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFiles(t, dir, "a.yaml", denyShop+"---\n"+podYAML("x", "1"))
	m := runManifests(t, dir)
	wantChanges(t, m.sink.waitSynced(t), "+Pod default/x", "+NetworkPolicy shop/deny")

	// As a whole: neither the new pod nor the closed policy is taken.
	writeFiles(t, dir, "a.yaml", strings.Replace(denyShop, "podSelector", "podSelectr", 1)+"---\n"+podYAML("new", "1"))
	m.log.wait(t, "podSelectr")
	wantProblems(t, m, dir, "a.yaml:4: NetworkPolicy shop/deny: spec.podSelectr: unknown field; the file's last good content stays in force")
	if got := strings.Count(m.log.String(), "level=WARN"); got != 1 {
		t.Errorf("%d warnings, want 1:\n%s", got, m.log)
	}

	// The bad file changes nothing for the others.
	writeFiles(t, dir, "b.yaml", podYAML("other", "1"))
	wantChanges(t, m.sink.next(t), "+Pod default/other")
	if got := strings.Count(m.log.String(), "level=WARN"); got != 1 {
		t.Errorf("a known problem was logged again:\n%s", m.log)
	}

	writeFiles(t, dir, "a.yaml", podYAML("new", "1"))
	wantChanges(t, m.sink.next(t), "+Pod default/new", "-Pod default/x", "-NetworkPolicy shop/deny")
	wantProblems(t, m, dir)
}

func TestManifestsFirstLoadOfBadFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFiles(t, dir, "a.yaml", podYAML("x", "1")+"---\na: [\n---\n"+strings.Replace(denyShop, "{}", "all", 1))
	m := runManifests(t, dir)
	changes := m.sink.waitSynced(t)
	wantChanges(t, changes, "+Pod default/x", "+NetworkPolicy shop/deny")
	if p := changes[1].Object.(*Policy); p.Unreadable != "spec.podSelector: is not an object" {
		t.Errorf("unreadable: %q", p.Unreadable)
	}
	wantProblems(t, m, dir, "a.yaml:5: did not find expected node content", "a.yaml:10: NetworkPolicy shop/deny: spec.podSelector: is not an object")
}

func TestManifestsDuplicates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFiles(t, dir, "b.yaml", "# comment\n"+podYAML("x", "second"), "a/z.yaml", podYAML("x", "first"))
	m := runManifests(t, dir)
	changes := m.sink.waitSynced(t)
	wantChanges(t, changes, "+Pod default/x")
	if got := changes[0].Object.(*Pod).Labels["v"]; got != "first" {
		t.Errorf("the %s definition counts", got)
	}
	wantProblems(t, m, dir, "b.yaml:2: Pod default/x: already defined at a/z.yaml:1, which counts")
	must(t, os.Remove(filepath.Join(dir, "a/z.yaml")))
	if got := m.sink.next(t)[0].Object.(*Pod).Labels["v"]; got != "second" {
		t.Errorf("the %s definition counts", got)
	}
	wantProblems(t, m, dir)
}

func TestManifestsDirectoryMissing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFiles(t, dir, "file", "")
	must(t, os.Symlink("loop", filepath.Join(dir, "loop")))
	for name, want := range map[string]string{
		"none": "no such directory; create it, it may stay empty",
		"file": "not a directory",
		"loop": "too many levels of symbolic links",
		"":     "",
	} {
		m := NewManifests(filepath.Join(dir, name), (&logBuffer{}).logger())
		if want == "" {
			if err := m.Check(); err != nil {
				t.Error(err)
			}
			continue
		}
		want = "--manifests " + filepath.Join(dir, name) + ": " + want
		for _, err := range []error{m.Check(), m.Run(t.Context(), newRecorder())} {
			if err == nil || err.Error() != want {
				t.Errorf("got %v, want %s", err, want)
			}
		}
	}
}

var errNoWatches = errors.New("too many open files")

func pollOnly(m *Manifests) {
	m.Poll = 5 * time.Second
	m.newWatcher = func() (*fsnotify.Watcher, error) { return nil, errNoWatches }
}

func TestManifestsPollOnly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		writeFiles(t, dir, "a.yaml", podYAML("x", "1"))
		m := runManifests(t, dir, pollOnly)
		wantChanges(t, m.sink.waitSynced(t), "+Pod default/x")
		synctest.Wait()
		start := time.Now()
		writeFiles(t, dir, "a.yaml", podYAML("x", "2"))
		wantChanges(t, m.sink.next(t), "+Pod default/x")
		if waited := time.Since(start); waited != m.Poll {
			t.Errorf("waited %s, want %s", waited, m.Poll)
		}
		for range 3 {
			time.Sleep(m.Poll)
		}
		if got := strings.Count(m.log.String(), "too many open files"); got != 1 {
			t.Errorf("the failure was logged %d times:\n%s", got, m.log)
		}
	})
}

// TestManifestsEmptied is about "generate > a.yaml", which empties the file until generate has run.
func TestManifestsEmptied(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		writeFiles(t, dir, "a.yaml", podYAML("x", "1"))
		m := runManifests(t, dir, pollOnly)
		m.sink.waitSynced(t)
		synctest.Wait()
		writeFiles(t, dir, "a.yaml", "")
		start := time.Now()
		wantChanges(t, m.sink.next(t), "-Pod default/x")
		if waited := time.Since(start); waited != m.Poll+emptyHold {
			t.Errorf("waited %s, want %s", waited, m.Poll+emptyHold)
		}
		writeFiles(t, dir, "a.yaml", podYAML("x", "2"))
		m.sink.next(t)
		writeFiles(t, dir, "a.yaml", "")
		time.Sleep(m.Poll + emptyHold/2)
		writeFiles(t, dir, "a.yaml", podYAML("x", "3"))
		wantChanges(t, m.sink.next(t), "+Pod default/x")
	})
}

// TestManifestsDirectoryDeleted runs in the directory, whose name is then the odd one: ".".
func TestManifestsDirectoryDeleted(t *testing.T) {
	parent := t.TempDir()
	for _, relative := range []bool{false, true} {
		t.Run(fmt.Sprintf("relative=%v", relative), func(t *testing.T) {
			dir := filepath.Join(parent, fmt.Sprint(relative))
			writeFiles(t, dir, "sub/a.yaml", podYAML("x", "1"))
			name := dir
			if relative {
				t.Chdir(dir)
				name = "."
			}
			m := runManifests(t, name, func(m *Manifests) {
				if !relative {
					m.Poll = 20 * time.Millisecond
				}
			})
			m.sink.waitSynced(t)
			// By renaming, where polling could see the directory without its files.
			gone := dir
			if !relative {
				gone = dir + ".gone"
				must(t, os.Rename(dir, gone))
			}
			must(t, os.RemoveAll(gone))
			m.log.wait(t, "its last content stays in force")
			if len(m.sink.batches) != 0 {
				t.Errorf("deleting the directory changed %v", describe(<-m.sink.batches))
			}
			if relative {
				return // a deleted working directory does not come back
			}
			writeFiles(t, dir+".new", "sub/a.yaml", podYAML("x", "2"))
			must(t, os.Rename(dir+".new", dir))
			wantChanges(t, m.sink.next(t), "+Pod default/x")
		})
	}
}

func TestManifestsWritesInSteps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFiles(t, dir, "a.yaml", podYAML("x", "1")+"---\n"+podYAML("w", "1"))
	m := runManifests(t, dir)
	m.sink.waitSynced(t)
	// A writer in three steps: emptied, half, whole. Nobody may see the pods gone.
	f, err := os.Create(filepath.Join(dir, "a.yaml"))
	must(t, err)
	defer f.Close()
	_, err = f.WriteString(podYAML("x", "2"))
	must(t, err)
	_, err = f.WriteString("---\n" + podYAML("w", "2"))
	must(t, err)
	wantChanges(t, m.sink.next(t), "+Pod default/w", "+Pod default/x")
}

func TestManifestsOtherEndings(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{
		"np.txt", "sub/np", "np.YAML", ".hidden", "np.yaml~", "np.yaml.swp", "np.yaml.bak", "np.yaml.orig", "np.tmp", "notes.md", "ReadMe.txt", "LICENSE",
	} {
		writeFiles(t, dir, name, denyShop)
	}
	must(t, syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	m := runManifests(t, dir)
	if got := m.sink.waitSynced(t); len(got) != 0 {
		t.Errorf("files with other endings were read: %v", describe(got))
	}
	const ignored = ": its name does not end in .yaml, .yml or .json, ignored"
	wantProblems(t, m, dir, "np.YAML"+ignored, "np.txt"+ignored, "sub/np"+ignored)
	if p := m.Problems()[0]; !p.Warning {
		t.Errorf("not a warning: %v", p)
	}
	writeFiles(t, dir, "pod.yaml", podYAML("x", "1"))
	m.sink.next(t)
	if got := strings.Count(m.log.String(), "np.txt"); got != 1 {
		t.Errorf("np.txt was logged %d times:\n%s", got, m.log)
	}
}

func TestManifestsLog(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFiles(t, dir, "a.yaml", podYAML("x", "1")+"---\n"+podYAML("w", "1"))
	m := runManifests(t, dir)
	m.sink.waitSynced(t)
	writeFiles(t, dir, "a.yaml", "a: [")
	m.log.wait(t, "line=1")
	writeFiles(t, dir, "a.yaml", podYAML("x", "2")+"---\n"+podYAML("web", "1")+"---\n"+podYAML("z", "1"))
	m.sink.next(t)
	must(t, os.Symlink("none", filepath.Join(dir, "link")))
	m.log.wait(t, "link")
	writeFiles(t, dir, "b.yaml", "a: [")
	m.log.wait(t, "b.yaml")
	must(t, os.Remove(filepath.Join(dir, "b.yaml")))
	writeFiles(t, dir, "c.yaml", podYAML("c", "1"))
	m.sink.next(t)
	m.stop()
	var got []string
	for line := range strings.Lines(m.log.String()) {
		_, line, _ = strings.Cut(strings.ReplaceAll(strings.TrimSpace(line), dir, "DIR"), "level=")
		got = append(got, line)
	}
	// A file that is gone is not good again, and a link's problem has no line.
	want := []string{
		`INFO msg="manifests applied" dir=DIR added=2 changed=0 removed=0`,
		`WARN msg="manifest problem" file=DIR/a.yaml line=1 reason="did not find expected node content; the file's last good content stays in force"`,
		`INFO msg="manifest is good again" file=DIR/a.yaml`,
		`INFO msg="manifests applied" dir=DIR added=2 changed=1 removed=1`,
		`WARN msg="manifest problem" file=DIR/link reason="read: no such file or directory; nothing is known of its content"`,
		`WARN msg="manifest problem" file=DIR/b.yaml line=1 reason="did not find expected node content"`,
		`INFO msg="manifests applied" dir=DIR added=1 changed=0 removed=0`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func cachedIn(cache string) func(*Manifests) { return func(m *Manifests) { m.Cache = cache } }

// cacheFiles returns the names in a cache.
func cacheFiles(t *testing.T, cache string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(cache, "*"))
	must(t, err)
	return names
}

var someTime = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)

// wantProblemsUndated is wantProblems without the times.
func wantProblemsUndated(t *testing.T, m running, dir string, want ...string) {
	t.Helper()
	var got []string
	for _, p := range m.Problems() {
		got = append(got, someTime.ReplaceAllString(strings.ReplaceAll(p.String(), dir+"/", ""), "TIME"))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
}

// TestManifestsRestart breaks files while no daemon runs.
func TestManifestsRestart(t *testing.T) {
	t.Parallel()
	const syntax = "a: ["
	mem := func(t *testing.T, name string) { // a regular file whose reading fails, for root too
		must(t, os.Remove(name))
		must(t, os.Symlink("/proc/self/mem", name))
	}
	for name, test := range map[string]struct {
		damage   func(t *testing.T, dir string)
		want     []string
		problems []string
	}{
		"nothing": {
			damage: func(*testing.T, string) {},
			want:   []string{"+Pod default/web", "+Pod default/x", "+NetworkPolicy shop/deny"},
		},
		"syntax error": {
			damage:   func(t *testing.T, dir string) { writeFiles(t, dir, "deny.yaml", syntax) },
			want:     []string{"+Pod default/web", "+Pod default/x", "+NetworkPolicy shop/deny"},
			problems: []string{"deny.yaml:1: did not find expected node content; the content of TIME is used"},
		},
		"field error": {
			damage: func(t *testing.T, dir string) {
				writeFiles(t, dir, "deny.yaml", podYAML("new", "1")+"---\n"+strings.Replace(denyShop, "{}", "all", 1))
			},
			want:     []string{"+Pod default/web", "+Pod default/x", "+NetworkPolicy shop/deny"},
			problems: []string{"deny.yaml:8: NetworkPolicy shop/deny: spec.podSelector: is not an object; the content of TIME is used"},
		},
		"file unreadable": {
			damage:   func(t *testing.T, dir string) { mem(t, filepath.Join(dir, "deny.yaml")) },
			want:     []string{"+Pod default/web", "+Pod default/x", "+NetworkPolicy shop/deny"},
			problems: []string{"deny.yaml: read: input/output error; the content of TIME is used"},
		},
		"link to nothing": {
			damage: func(t *testing.T, dir string) {
				must(t, os.Remove(filepath.Join(dir, "deny.yaml")))
				must(t, os.Symlink("none", filepath.Join(dir, "deny.yaml")))
			},
			want:     []string{"+Pod default/web", "+Pod default/x", "+NetworkPolicy shop/deny"},
			problems: []string{"deny.yaml: read: no such file or directory; the content of TIME is used"},
		},
		"directory unreadable": {
			damage: func(t *testing.T, dir string) {
				must(t, os.RemoveAll(filepath.Join(dir, "pods")))
				must(t, os.Symlink("pods", filepath.Join(dir, "pods")))
			},
			want: []string{"+Pod default/web", "+Pod default/x", "+NetworkPolicy shop/deny"},
			problems: []string{
				"pods: read: too many levels of symbolic links; its last content stays in force",
				"pods/x.yaml: read: too many levels of symbolic links; the content of TIME is used",
				"pods/y.yaml: read: too many levels of symbolic links; the content of TIME is used",
			},
		},
		"changed": {
			damage: func(t *testing.T, dir string) { writeFiles(t, dir, "pods/x.yaml", podYAML("new", "1")) },
			want:   []string{"+Pod default/new", "+Pod default/web", "+NetworkPolicy shop/deny"},
		},
		"deleted": {
			damage: func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, "deny.yaml"))) },
			want:   []string{"+Pod default/web", "+Pod default/x"},
		},
		"new and bad": {
			damage:   func(t *testing.T, dir string) { writeFiles(t, dir, "new.yaml", podYAML("new", "1")+"---\n"+syntax) },
			want:     []string{"+Pod default/new", "+Pod default/web", "+Pod default/x", "+NetworkPolicy shop/deny"},
			problems: []string{"new.yaml:5: did not find expected node content"},
		},
		"new and unreadable": {
			damage: func(t *testing.T, dir string) {
				writeFiles(t, dir, "new.yaml", "")
				mem(t, filepath.Join(dir, "new.yaml"))
			},
			want:     []string{"+Pod default/web", "+Pod default/x", "+NetworkPolicy shop/deny"},
			problems: []string{"new.yaml: read: input/output error; nothing is known of its content"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, cache := t.TempDir(), filepath.Join(t.TempDir(), "state", "manifests")
			writeFiles(t, dir, "deny.yaml", denyShop, "pods/x.yaml", podYAML("x", "1"), "pods/y.yaml", podYAML("web", "1"))
			first := runManifests(t, dir, cachedIn(cache))
			first.sink.waitSynced(t)
			first.stop()
			test.damage(t, dir)
			for range 2 { // what was restored once can be restored again
				second := runManifests(t, dir, cachedIn(cache))
				wantChanges(t, second.sink.waitSynced(t), test.want...)
				wantProblemsUndated(t, second, dir, test.problems...)
				second.stop()
			}
		})
	}
}

func TestManifestsRestoredThenMended(t *testing.T) {
	t.Parallel()
	dir, cache := t.TempDir(), filepath.Join(t.TempDir(), "manifests")
	writeFiles(t, dir, "a.yaml", podYAML("x", "1"))
	first := runManifests(t, dir, cachedIn(cache))
	first.sink.waitSynced(t)
	writeFiles(t, dir, "a.yaml", podYAML("x", "2"))
	first.sink.next(t)
	first.stop()

	info, err := os.Stat(cache)
	must(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("the cache has mode %o", info.Mode().Perm())
	}
	files := cacheFiles(t, cache)
	if len(files) != 1 {
		t.Fatalf("cache: %v", files)
	}
	if info, err = os.Stat(files[0]); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v: %v", info.Mode(), err)
	}

	writeFiles(t, dir, "a.yaml", "a: [")
	second := runManifests(t, dir, cachedIn(cache))
	if got := second.sink.waitSynced(t)[0].Object.(*Pod).Labels["v"]; got != "2" {
		t.Errorf("version %s was restored, want the last", got)
	}
	// Another error is still about the restored content.
	writeFiles(t, dir, "a.yaml", "\na: [")
	second.log.wait(t, "line=2")
	wantProblemsUndated(t, second, dir, "a.yaml:2: did not find expected node content; the content of TIME is used")
	// The restored content itself, back in its file, changes no object.
	writeFiles(t, dir, "a.yaml", podYAML("x", "2"))
	second.log.wait(t, "manifest is good again")
	writeFiles(t, dir, "a.yaml", "a: [")
	second.log.wait(t, "line=1 reason=\"did not find expected node content; the file's last good content stays in force\"")
	writeFiles(t, dir, "a.yaml", podYAML("x", "3"))
	wantChanges(t, second.sink.next(t), "+Pod default/x")
	wantProblems(t, second, dir)
	second.stop()

	writeFiles(t, dir, "a.yaml", "a: [")
	third := runManifests(t, dir, cachedIn(cache))
	if got := third.sink.waitSynced(t)[0].Object.(*Pod).Labels["v"]; got != "3" {
		t.Errorf("version %s was restored, want the last", got)
	}
	const own = "a.yaml:1: did not find expected node content; the file's last good content stays in force"
	for _, version := range []string{"4", "3"} { // and back to what the cache held before
		writeFiles(t, dir, "a.yaml", podYAML("x", version))
		third.sink.next(t)
	}
	writeFiles(t, dir, "a.yaml", "a: [")
	third.log.wait(t, "the file's last good content")
	wantProblems(t, third, dir, own)
	third.stop()

	fourth := runManifests(t, dir, cachedIn(cache))
	if got := fourth.sink.waitSynced(t)[0].Object.(*Pod).Labels["v"]; got != "3" {
		t.Errorf("version %s was restored, want the last", got)
	}
	fourth.stop()

	// What is restored and then read unchanged is the file's own content.
	writeFiles(t, dir, "a.yaml", podYAML("x", "3"))
	fifth := runManifests(t, dir, cachedIn(cache))
	fifth.sink.waitSynced(t)
	writeFiles(t, dir, "a.yaml", "a: [")
	fifth.log.wait(t, "did not find")
	wantProblems(t, fifth, dir, own)
}

// TestManifestsCacheSharedAndSwept has two directories with a file of the same name.
func TestManifestsCacheSharedAndSwept(t *testing.T) {
	t.Parallel()
	one, two, cache := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "manifests")
	writeFiles(t, one, "a.yaml", podYAML("one", "1"), "sub/b.yaml", podYAML("sub", "1"))
	writeFiles(t, two, "a.yaml", podYAML("two", "1"))
	m1, m2 := runManifests(t, one, cachedIn(cache)), runManifests(t, two, cachedIn(cache))
	m1.sink.waitSynced(t)
	m2.sink.waitSynced(t)
	m1.stop()
	m2.stop()
	if got := len(cacheFiles(t, cache)); got != 3 {
		t.Fatalf("%d files in the cache, want 3", got)
	}

	// While anything is unreadable nothing is forgotten; a file that is deleted all the same counts as deleted.
	must(t, os.Rename(filepath.Join(one, "sub"), filepath.Join(one, ".sub")))
	must(t, os.Symlink("none", filepath.Join(one, "sub")))
	must(t, os.Remove(filepath.Join(one, "a.yaml")))
	m1 = runManifests(t, one, cachedIn(cache))
	wantChanges(t, m1.sink.waitSynced(t), "+Pod default/sub")
	m1.stop()
	if got := len(cacheFiles(t, cache)); got != 3 {
		t.Errorf("%d files in the cache after an incomplete scan, want 3", got)
	}
	must(t, os.Remove(filepath.Join(one, "sub")))
	m1 = runManifests(t, one, cachedIn(cache))
	if got := m1.sink.waitSynced(t); len(got) != 0 {
		t.Errorf("deleted files came back: %v", describe(got))
	}
	m1.stop()
	if got := len(cacheFiles(t, cache)); got != 1 {
		t.Errorf("%d files in the cache after a complete scan, want 1", got)
	}

	// A new file of an old name has nothing to do with it.
	writeFiles(t, one, "a.yaml", "a: [")
	writeFiles(t, two, "a.yaml", "a: [")
	m1, m2 = runManifests(t, one, cachedIn(cache)), runManifests(t, two, cachedIn(cache))
	if got := m1.sink.waitSynced(t); len(got) != 0 {
		t.Errorf("restored from another file: %v", describe(got))
	}
	wantChanges(t, m2.sink.waitSynced(t), "+Pod default/two")

	// Deleted while the daemon runs.
	must(t, os.Remove(filepath.Join(two, "a.yaml")))
	wantChanges(t, m2.sink.next(t), "-Pod default/two")
	m2.stop()
	if got := cacheFiles(t, cache); len(got) != 0 {
		t.Errorf("left in the cache: %v", got)
	}
}

func TestManifestsCacheCorrupt(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		corrupt func(data []byte) []byte
		reason  string
	}{
		"empty":    {func([]byte) []byte { return nil }, "the checksum differs"},
		"cut":      {func(data []byte) []byte { return data[:len(data)-1] }, "the checksum differs"},
		"bit flip": {func(data []byte) []byte { data[len(data)/2] ^= 1; return data }, "the checksum differs"},
		"another file's": {func([]byte) []byte {
			return lastGood{path: "b.yaml", taken: time.Now(), content: []byte(denyShop)}.encode()
		}, "it is that of b.yaml"},
		"not understood any more": {func([]byte) []byte {
			return lastGood{path: "a.yaml", taken: time.Now(), content: []byte("kind: ConfigMap\napiVersion: v1\n---\na: [")}.encode()
		}, "a.yaml:4: did not find expected node content"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, cache := t.TempDir(), filepath.Join(t.TempDir(), "manifests")
			writeFiles(t, dir, "a.yaml", podYAML("x", "1"))
			first := runManifests(t, dir, cachedIn(cache))
			first.sink.waitSynced(t)
			first.stop()
			file := cacheFiles(t, cache)[0]
			data, err := os.ReadFile(file)
			must(t, err)
			must(t, os.WriteFile(file, test.corrupt(data), 0o600))

			// Bad files: the present content counts, as without a cache.
			writeFiles(t, dir, "a.yaml", strings.Replace(denyShop, "{}", "all", 1))
			second := runManifests(t, dir, cachedIn(cache))
			changes := second.sink.waitSynced(t)
			wantChanges(t, changes, "+NetworkPolicy shop/deny")
			if changes[0].Object.(*Policy).Unreadable == "" {
				t.Error("the unreadable policy is not closed")
			}
			corrupt := file + ": last good content of a manifest cannot be used: " + test.reason + "; ignored"
			want := []string{"a.yaml:4: NetworkPolicy shop/deny: spec.podSelector: is not an object", corrupt}
			if file < dir {
				want = []string{corrupt, want[0]}
			}
			wantProblems(t, second, dir, want...)

			// The next good content takes the corrupt one's place.
			writeFiles(t, dir, "a.yaml", podYAML("x", "2"))
			second.sink.next(t)
			writeFiles(t, dir, "b.yaml", podYAML("b", "1"))
			second.sink.next(t)
			wantProblems(t, second, dir)
			second.stop()
			must(t, os.Remove(filepath.Join(dir, "b.yaml")))
			writeFiles(t, dir, "a.yaml", "a: [")
			third := runManifests(t, dir, cachedIn(cache))
			wantChanges(t, third.sink.waitSynced(t), "+Pod default/x")
			wantProblemsUndated(t, third, dir, "a.yaml:1: did not find expected node content; the content of TIME is used")
			third.stop()

			// It goes with its file, too.
			must(t, os.WriteFile(file, test.corrupt(data), 0o600))
			must(t, os.Remove(filepath.Join(dir, "a.yaml")))
			fourth := runManifests(t, dir, cachedIn(cache))
			if got := fourth.sink.waitSynced(t); len(got) != 0 {
				t.Errorf("restored: %v", describe(got))
			}
			writeFiles(t, dir, "b.yaml", podYAML("b", "1"))
			fourth.sink.next(t)
			wantProblems(t, fourth, dir)
		})
	}
}

// TestManifestsCacheUnwritable has a file where the cache should be, until it is removed.
func TestManifestsCacheUnwritable(t *testing.T) {
	t.Parallel()
	dir, state := t.TempDir(), t.TempDir()
	cache := filepath.Join(state, "manifests")
	writeFiles(t, state, "manifests", "in the way")
	writeFiles(t, dir, "a.yaml", podYAML("x", "1"), "b.yaml", podYAML("web", "1"))
	m := runManifests(t, dir, cachedIn(cache))
	wantChanges(t, m.sink.waitSynced(t), "+Pod default/web", "+Pod default/x")
	const fault = "write: not a directory; the last good content of manifests is not kept for the next start"
	m.log.wait(t, fault)
	for _, version := range []string{"2", "3"} {
		writeFiles(t, dir, "a.yaml", podYAML("x", version))
		wantChanges(t, m.sink.next(t), "+Pod default/x")
	}
	if got := strings.Count(m.log.String(), fault); got != 1 {
		t.Errorf("the fault was logged %d times:\n%s", got, m.log)
	}
	if p := m.Problems(); len(p) != 1 || !p[0].Warning || p[0].File != cache || p[0].Reason != fault {
		t.Errorf("problems: %v", p)
	}

	// All that could not be written is, once there is room; b.yaml was not even touched.
	must(t, os.Remove(cache))
	writeFiles(t, dir, "c.yaml", podYAML("z", "1"))
	m.sink.next(t)
	m.stop()
	wantProblems(t, m, dir)
	writeFiles(t, dir, "a.yaml", "a: [", "b.yaml", "a: [", "c.yaml", "a: [")
	again := runManifests(t, dir, cachedIn(cache))
	changes := again.sink.waitSynced(t)
	wantChanges(t, changes, "+Pod default/web", "+Pod default/x", "+Pod default/z")
	if got := changes[1].Object.(*Pod).Labels["v"]; got != "3" {
		t.Errorf("version %s was restored, want the last", got)
	}
}

// TestManifestsRestartWhileEmptied is about "generate > a.yaml" when the daemon starts in between.
func TestManifestsRestartWhileEmptied(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, cache := t.TempDir(), filepath.Join(t.TempDir(), "manifests")
		writeFiles(t, dir, "a.yaml", podYAML("x", "1"))
		first := runManifests(t, dir, pollOnly, cachedIn(cache))
		first.sink.waitSynced(t)
		first.stop()
		writeFiles(t, dir, "a.yaml", "")
		second := runManifests(t, dir, pollOnly, cachedIn(cache))
		wantChanges(t, second.sink.waitSynced(t), "+Pod default/x")
		start := time.Now()
		wantChanges(t, second.sink.next(t), "-Pod default/x")
		if waited := time.Since(start); waited != emptyHold {
			t.Errorf("waited %s, want %s", waited, emptyHold)
		}
		second.stop()
		third := runManifests(t, dir, pollOnly, cachedIn(cache))
		if got := third.sink.waitSynced(t); len(got) != 0 {
			t.Errorf("what was emptied on purpose came back: %v", describe(got))
		}
	})
}

func TestLastGoodRoundTrip(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, want := range []lastGood{
		{"a.yaml", at, []byte("a: 1\n")},
		{"a b/\n\"\xff.yaml", at, []byte{}},
		{"ü.yaml", at, []byte("\n\n\x00")},
	} {
		got, err := decodeLastGood(want.encode())
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(lastGood{})); err != nil || diff != "" {
			t.Errorf("%v (-want +got):\n%s", err, diff)
		}
	}
}
