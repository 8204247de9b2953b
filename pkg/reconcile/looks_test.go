package reconcile

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/utils/clock"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/conntrack"
	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// turns is a table of connections of which one caller at a time may list or delete some, as with one netlink socket. Who asks for
// what a pod receives comes second, and holds its turn until somebody wants to delete what was found first.
type turns struct {
	*world
	turn                   sync.Mutex
	listed, held, deleting chan struct{}
	first, wanted          sync.Once
}

func (l *turns) Flows(ctx context.Context, filter conntrack.Filter, each func(conntrack.Flow)) error {
	if filter.Dst.IsValid() {
		<-l.listed
	} else {
		defer l.first.Do(func() { close(l.listed) })
	}
	l.turn.Lock()
	defer l.turn.Unlock()
	if filter.Dst.IsValid() {
		close(l.held)
		<-l.deleting
	}
	return l.world.Flows(ctx, filter, each)
}

func (l *turns) Delete(ctx context.Context, flows []conntrack.Flow) (int, error) {
	<-l.held
	l.wanted.Do(func() { close(l.deleting) })
	l.turn.Lock()
	defer l.turn.Unlock()
	return l.world.Delete(ctx, flows)
}

// TestLooksDoNotWaitForEachOther holds that who judges connections does not wait for who ends some, which waits for its turn: of a pod
// that is isolated both ways, both directions are looked at side by side.
func TestLooksDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	w := &world{kernel: nft.NewFake(), metrics: metrics.New(func() float64 { return 0 })}
	w.flows = []conntrack.Flow{flow("10.0.0.1:1000", "192.0.2.1:443"), flow("10.0.0.2:1000", "10.0.0.1:80")}
	table := &turns{world: w, listed: make(chan struct{}), held: make(chan struct{}), deleting: make(chan struct{})}
	cfg := Config{Connections: table, Links: w, Kernel: w.kernel, Clock: clock.RealClock{}, Metrics: w.metrics, Log: slog.New(slog.DiscardHandler)}
	r := newRevoker(&cfg, ruleset.TableID{Family: ruleset.Inet, Name: "podwall"},
		func(policy.Connection) (bool, error) { return false, nil }, func(netip.Addr) bool { return false }, func() {})
	done := make(chan int, 1)
	go func() {
		n, _ := r.revoke(t.Context(), revocation{egress: map[netip.Addr]bool{ip1: true}, ingress: map[netip.Addr]bool{ip1: true}})
		done <- n
	}()
	select {
	case n := <-done:
		if n != 2 {
			t.Errorf("%d connections ended, want 2", n)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the looks wait for each other")
	}
}

// deaf is a kernel whose answer to one commit is lost: it was executed.
type deaf struct {
	*nft.Fake
	once atomic.Bool
}

func (k *deaf) Commit(ctx context.Context, d ruleset.Delta) error {
	if err := k.Fake.Commit(ctx, d); err != nil || !k.once.Swap(false) {
		return err
	}
	return unix.ENOBUFS
}

// TestRevokeAfterLostAnswer holds that connections end that a commit has revoked which is only known to have failed.
func TestRevokeAfterLostAnswer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &world{kernel: nft.NewFake(), gone: map[string]bool{}, metrics: metrics.New(func() float64 { return 0 })}
		kernel := &deaf{Fake: w.kernel}
		runWorld(t, w, Config{Policy: policy.Options{Table: "podwall", Cut: true}, Kernel: kernel, Links: w, Connections: w, Log: slog.New(slog.DiscardHandler)})
		w.Apply(pod("a", "here"))
		w.Synced()
		synctest.Wait()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		revoked := flow("10.0.0.2:1000", "10.0.0.1:80")
		w.flowsMu.Lock()
		w.flows = []conntrack.Flow{revoked}
		w.flowsMu.Unlock()
		kernel.once.Store(true)
		w.Apply(denyAll("deny"))
		time.Sleep(2 * retryFirst)
		synctest.Wait()
		if kernel.once.Load() {
			t.Fatal("nothing was committed")
		}
		if slices.Contains(w.left(), revoked) {
			t.Error("a connection that is denied goes on")
		}
	})
}

// TestCutSetsLost holds that connections which were cut before the tables were lost are cut again, when they have come back meanwhile.
func TestCutSetsLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("friend", "there", "10.0.0.2"), denyAll("deny"), allowFrom("allow", "friend"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * lookAgain)
		revoked := flow("10.0.0.2:1000", "10.0.0.1:80")
		for _, lost := range []bool{false, true} {
			w.flowsMu.Lock()
			w.flows = []conntrack.Flow{revoked}
			w.flowsMu.Unlock()
			if lost {
				w.change(t, w.flush())
				w.foreign <- "nft[1]"
			} else {
				w.Apply(cluster.Change{Key: allowFrom("allow", "friend").Key})
			}
			time.Sleep(2 * lookAgain)
			synctest.Wait()
			if len(w.left()) > 0 || w.cutElements() != 1 {
				t.Errorf("tables lost %v: %d connections go on, the sets have %d elements, want 0 and 1", lost, len(w.left()), w.cutElements())
			}
		}
	})
}
