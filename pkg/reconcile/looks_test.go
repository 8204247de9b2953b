package reconcile

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
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

// order records who is asked for and when connections end.
type order struct {
	*world
	steps []string
}

func (o *order) Flows(ctx context.Context, filter conntrack.Filter, each func(conntrack.Flow)) error {
	ip := filter.Src
	if !ip.IsValid() {
		ip = filter.Dst
	}
	o.steps = append(o.steps, ip.String())
	return o.world.Flows(ctx, filter, each)
}

func (o *order) Delete(ctx context.Context, flows []conntrack.Flow) (int, error) {
	o.steps = append(o.steps, "end")
	return o.world.Delete(ctx, flows)
}

// TestEachLookEndsWhatItFinds holds that what one dump has found does not wait for the next, and that IPv4, where the kernel filters,
// comes before IPv6.
func TestEachLookEndsWhatItFinds(t *testing.T) {
	t.Parallel()
	w := &world{kernel: nft.NewFake(), metrics: metrics.New(func() float64 { return 0 })}
	for _, ends := range [][2]string{{"[fd00::1]:0", "[fd00::9]:0"}, {"10.0.0.1:0", "192.0.2.1:0"}, {"10.0.0.2:0", "10.0.0.1:0"}} {
		f := flow(ends[0], ends[1])
		f.Proto = unix.IPPROTO_GRE // no ports, so nothing is for the sets
		w.flows = append(w.flows, f)
	}
	table := &order{world: w}
	cfg := Config{Connections: table, Links: w, Kernel: w.kernel, Clock: clock.RealClock{}, Metrics: w.metrics, Log: slog.New(slog.DiscardHandler)}
	r := newRevoker(&cfg, ruleset.TableID{Family: ruleset.Inet, Name: "podwall"},
		func(policy.Connection) (bool, error) { return false, nil }, func(netip.Addr) bool { return false }, func() {})
	six := netip.MustParseAddr("fd00::1")
	n, err := r.revoke(t.Context(), revocation{egress: map[netip.Addr]bool{six: true, ip1: true}, ingress: map[netip.Addr]bool{ip1: true}})
	if n != 3 || err != nil {
		t.Errorf("%d connections ended, %v, want 3", n, err)
	}
	if want := []string{"10.0.0.1", "end", "10.0.0.1", "end", "fd00::1", "end"}; !slices.Equal(table.steps, want) {
		t.Errorf("steps %v, want %v", table.steps, want)
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
