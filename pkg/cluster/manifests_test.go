package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
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
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return running{m, sink, log}
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
	if got := strings.Count(m.log.String(), "\n"); got != 1 {
		t.Errorf("%d log lines, want 1:\n%s", got, m.log)
	}

	// The bad file changes nothing for the others.
	writeFiles(t, dir, "b.yaml", podYAML("other", "1"))
	wantChanges(t, m.sink.next(t), "+Pod default/other")
	if got := strings.Count(m.log.String(), "\n"); got != 1 {
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
	for _, name := range []string{"none", "file"} {
		err := NewManifests(filepath.Join(dir, name), (&logBuffer{}).logger()).Run(t.Context(), newRecorder())
		if err == nil || !strings.Contains(err.Error(), "--manifests") || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
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
			m := runManifests(t, name, func(m *Manifests) { m.Poll = 20 * time.Millisecond })
			m.sink.waitSynced(t)
			must(t, os.RemoveAll(dir))
			m.log.wait(t, "its last content stays in force")
			if len(m.sink.batches) != 0 {
				t.Errorf("deleting the directory changed %v", describe(<-m.sink.batches))
			}
			if relative {
				return // a deleted working directory does not come back
			}
			writeFiles(t, dir, "sub/a.yaml", podYAML("x", "2"))
			changes := m.sink.next(t)
			wantChanges(t, changes, "+Pod default/x")
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
