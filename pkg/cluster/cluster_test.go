package cluster

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a Sink that a test can wait for.
type recorder struct {
	batches chan []Change
	synced  chan struct{}
}

func newRecorder() *recorder {
	return &recorder{batches: make(chan []Change, 100), synced: make(chan struct{})}
}

func (r *recorder) Apply(changes ...Change) { r.batches <- changes }

func (r *recorder) Synced() { close(r.synced) }

// waitSynced returns everything applied up to Synced.
func (r *recorder) waitSynced(t *testing.T) []Change {
	t.Helper()
	select {
	case <-r.synced:
	case <-time.After(20 * time.Second):
		t.Fatal("never synced")
	}
	var all []Change
	for len(r.batches) > 0 {
		all = append(all, <-r.batches...)
	}
	return all
}

func (r *recorder) next(t *testing.T) []Change {
	t.Helper()
	select {
	case changes := <-r.batches:
		return changes
	case <-time.After(20 * time.Second):
		t.Fatal("no change")
		return nil
	}
}

// describe names changes: "+Pod a/b" and "-Pod a/b".
func describe(changes []Change) []string {
	var lines []string
	for _, c := range changes {
		sign := "+"
		if c.Object == nil {
			sign = "-"
		}
		lines = append(lines, sign+c.Key.String())
	}
	return lines
}

func wantChanges(t *testing.T, got []Change, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, describe(got)); diff != "" {
		t.Fatalf("changes (-want +got):\n%s", diff)
	}
}

// logBuffer is a log that a test reads, or waits for, while it is written.
type logBuffer struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	written chan struct{} // closed and renewed at every write
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.written != nil {
		close(b.written)
		b.written = nil
	}
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) wait(t *testing.T, want string) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		b.mu.Lock()
		found := strings.Contains(b.buf.String(), want)
		if b.written == nil {
			b.written = make(chan struct{})
		}
		written := b.written
		b.mu.Unlock()
		if found {
			return
		}
		select {
		case <-written:
		case <-timeout:
			t.Fatalf("the log never said %q:\n%s", want, b)
		}
	}
}

func (b *logBuffer) logger() *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

func TestModel(t *testing.T) {
	t.Parallel()
	m := NewModel()
	web := &Pod{Namespace: "shop", Name: "web"}
	deny := &Policy{Namespace: "shop", Name: "deny"}
	shop := &Namespace{Name: "shop", Labels: map[string]string{"team": "a", "kubernetes.io/metadata.name": "forged"}}
	for _, o := range []Object{web, deny, shop, &Pod{Namespace: "bank", Name: "web"}} {
		m.Apply(Change{Key: o.Key(), Object: o})
	}
	if m.Pod("shop", "web") != web || len(slices.Collect(m.Pods())) != 2 || len(slices.Collect(m.PodsIn("shop"))) != 1 {
		t.Error("pods are not where they belong")
	}
	if got := slices.Collect(m.PoliciesIn("shop")); len(got) != 1 || got[0] != deny {
		t.Errorf("policies of shop: %v", got)
	}
	wantLabels := map[string]string{"team": "a", "kubernetes.io/metadata.name": "shop"}
	if got := m.NamespaceLabels("shop"); !maps.Equal(got, wantLabels) {
		t.Errorf("labels of shop: %v", got)
	}
	if shop.Labels["kubernetes.io/metadata.name"] != "forged" {
		t.Error("an immutable object was changed")
	}
	for _, o := range []Object{web, deny, shop} {
		m.Apply(Change{Key: o.Key()})
		m.Apply(Change{Key: o.Key()}) // twice is harmless
	}
	if m.Pod("shop", "web") != nil || len(slices.Collect(m.Policies())) != 0 || len(slices.Collect(m.Pods())) != 1 {
		t.Error("deleted objects are still there")
	}
	if got := m.NamespaceLabels("shop"); !maps.Equal(got, map[string]string{"kubernetes.io/metadata.name": "shop"}) {
		t.Errorf("labels of a namespace that nobody describes: %v", got)
	}
}

func TestKeyString(t *testing.T) {
	t.Parallel()
	got := fmt.Sprint(Key{Kind: KindNamespace, Name: "a"}, "; ", Key{Kind: KindPolicy, Namespace: "a", Name: "b"}, "; ", Key{})
	if want := "Namespace a; NetworkPolicy a/b; unknown "; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if strings.Contains(KindPod.String(), "unknown") {
		t.Error("Pod has no name")
	}
}
