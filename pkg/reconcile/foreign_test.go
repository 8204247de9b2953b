package reconcile

import (
	"context"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/utils/clock"

	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/registry"
	"github.com/podwall/podwall/pkg/ruleset"
)

func drifts(t *testing.T, m *metrics.Metrics) int {
	t.Helper()
	families, err := m.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "podwall_drift_total" {
			return int(f.GetMetric()[0].GetCounter().GetValue())
		}
	}
	t.Fatal("no such counter")
	return 0
}

// counted counts how often a Kernel is read.
type counted struct {
	*nft.Kernel
	reads atomic.Int64
}

func (c *counted) Read(ctx context.Context, ids ...ruleset.TableID) (ruleset.Ruleset, error) {
	c.reads.Add(1)
	return c.Kernel.Read(ctx, ids...)
}

// enforcing is a world with one isolated pod.
func enforcing(t *testing.T) *world {
	t.Helper()
	w := start(t, true, nil)
	w.Apply(denyAll("deny"))
	w.Synced()
	if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	return w
}

// change commits what somebody else does and tells nobody.
func (w *world) change(t *testing.T, ops ...ruleset.Op) {
	t.Helper()
	before := w.kernel.Ruleset().String()
	if err := w.kernel.Commit(t.Context(), ruleset.Delta{Apply: ops}); err != nil {
		t.Fatal(err)
	}
	if w.kernel.Ruleset().String() == before {
		t.Fatalf("%v changes nothing", ops)
	}
}

func (w *world) flush() ruleset.Op { return ruleset.Op{Kind: ruleset.DelTable, Table: w.tables()[0]} }

func (w *world) want(t *testing.T, text string) {
	t.Helper()
	if diff := cmp.Diff(text, w.kernel.Ruleset().String()); diff != "" {
		t.Errorf("tables (-want +got):\n%s", diff)
	}
}

// TestForeignCommit holds that what somebody else did to the tables is mended when it is told, at once and without a sweep.
func TestForeignCommit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := enforcing(t)
		before := w.kernel.Ruleset().String()
		table := w.tables()[0]
		in4 := w.kernel.Ruleset().Table(table).Sets["in4"]
		for name, op := range map[string]ruleset.Op{
			"flush":   w.flush(),
			"element": {Kind: ruleset.DelElements, Table: table, Set: in4, Elements: in4.Elements},
			"chain":   {Kind: ruleset.FlushChain, Table: table, Chain: &ruleset.Chain{Name: "quarantine"}},
			"more":    {Kind: ruleset.AddChain, Table: w.tables()[1], Chain: &ruleset.Chain{Name: "somebody"}},
		} {
			time.Sleep(time.Second) // the bubble's clock: nothing was told for a while
			begin, drift := time.Now(), drifts(t, w.metrics)
			w.change(t, op)
			synctest.Wait()
			if w.kernel.Ruleset().String() == before {
				t.Fatalf("%s was mended without being told", name)
			}
			w.foreign <- "nft[1]"
			synctest.Wait()
			w.want(t, before)
			if !time.Now().Equal(begin) || drifts(t, w.metrics) != drift+1 {
				t.Errorf("%s was mended after %s, counted %d times", name, time.Since(begin), drifts(t, w.metrics)-drift)
			}
		}
	})
}

// TestForeignCommitBeforeSync holds that what a former daemon loaded is restored before all objects are known, also when that
// does not succeed at first.
func TestForeignCommitBeforeSync(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first := enforcing(t)
		before := first.kernel.Ruleset().String()
		second := start(t, true, first)
		second.change(t, second.flush())
		second.kernel.FailNext(unix.EBUSY)
		second.foreign <- "nft[1]"
		synctest.Wait()
		time.Sleep(retryMost)
		synctest.Wait()
		second.want(t, before)
		if second.NodeStatus().Ready {
			t.Error("it calls itself ready")
		}
	})
}

// TestForeignFlood holds that many commits of others cost few looks, of which the first is at once and the last is not forgotten.
func TestForeignFlood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := enforcing(t)
		time.Sleep(time.Second)
		before, reads := w.kernel.Ruleset().String(), w.kernel.Reads()
		other := ruleset.TableID{Family: ruleset.Inet, Name: "other"}
		const commits = 1000
		begin := time.Now()
		for i := range commits {
			op := ruleset.Op{Kind: ruleset.AddTable, Table: other}
			if i%2 == 1 {
				op.Kind = ruleset.DelTable
			}
			w.change(t, op)
			w.foreign <- "kube-proxy[2]"
			synctest.Wait()
			time.Sleep(100 * time.Microsecond)
		}
		took := time.Since(begin)
		looks, most := w.kernel.Reads()-reads, int(took/leastCalm)+1
		if looks < 2 || looks > most {
			t.Errorf("%d commits in %s were %d looks, want 2 to %d", commits, took, looks, most)
		}
		w.change(t, w.flush())
		w.foreign <- "nft[1]"
		time.Sleep(leastCalm)
		synctest.Wait()
		w.want(t, before)
		if n := drifts(t, w.metrics); n != 1 {
			t.Errorf("%d drifts", n)
		}
	})
}

// TestOwnedTables holds that tables that nobody else can change are not read when others commit, unless they are not there.
func TestOwnedTables(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := enforcing(t)
		w.kernel.OwnTables()
		tell := func() {
			t.Helper()
			w.foreign <- "kube-proxy[2]"
			synctest.Wait()
			time.Sleep(time.Second)
			synctest.Wait()
		}
		other := ruleset.Op{Kind: ruleset.AddTable, Table: ruleset.TableID{Family: ruleset.Inet, Name: "other"}}
		w.change(t, other)
		tell() // after which the loop knows whose they are
		before, reads := w.kernel.Ruleset().String(), w.kernel.Reads()
		other.Kind = ruleset.DelTable
		w.change(t, other)
		tell()
		other.Kind = ruleset.AddTable
		w.change(t, other)
		tell()
		time.Sleep(2 * sweepEvery)
		synctest.Wait()
		if n := w.kernel.Reads() - reads; n != 0 {
			t.Errorf("%d reads", n)
		}
		w.change(t, w.flush())
		tell()
		if n := w.kernel.Reads() - reads; n != 1 {
			t.Errorf("%d reads for a table that has gone, want 1", n)
		}
		got := strings.Split(w.kernel.Ruleset().String(), "\n")
		want := strings.Split(before, "\n")
		slices.Sort(got)
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("tables (-want +got):\n%s", diff)
		}
	})
}

// TestTablesOfAnother holds that a writer whose tables another process still owns waits for it, says so, and then goes on.
func TestTablesOfAnother(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		first := enforcing(t)
		before := first.kernel.Ruleset().String()
		first.kernel.FailOwn(unix.EPERM)
		w := start(t, true, first)
		w.Apply(denyAll("deny"), denyAll("another"))
		w.Synced()
		time.Sleep(3 * retryFirst)
		synctest.Wait()
		w.want(t, before)
		if s := w.NodeStatus(); s.Ready || !strings.Contains(s.Error, "take over the tables") {
			t.Errorf("status: %+v", s)
		}
		w.kernel.FailOwn(nil)
		time.Sleep(2 * retryMost)
		synctest.Wait()
		if s := w.NodeStatus(); !s.Ready || s.Error != "" || s.Policies != 2 {
			t.Errorf("status: %+v", s)
		}
	})
}

// TestForeignCommitWhileDown holds that tables are not restored once podwall was uninstalled.
func TestForeignCommitWhileDown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := enforcing(t)
		w.StandDown(true)
		synctest.Wait()
		w.want(t, "")
		w.change(t, ruleset.Op{Kind: ruleset.AddTable, Table: w.tables()[0]})
		before := w.kernel.Ruleset().String()
		w.foreign <- "nft[1]"
		time.Sleep(time.Second)
		synctest.Wait()
		w.want(t, before)
	})
}

// TestRetryOutlivesForeignCommit holds that a look that finds nothing does not take the place of a retry.
func TestRetryOutlivesForeignCommit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := enforcing(t)
		time.Sleep(time.Second)
		w.kernel.FailNext(unix.ENOMEM)
		detached := make(chan error, 1)
		go func() {
			detached <- w.Detach(within(t, time.Second), attachment("c1", "a", "10.0.0.1").Key)
		}()
		synctest.Wait()
		if w.NodeStatus().Error == "" {
			t.Fatal("the pass did not fail")
		}
		w.foreign <- "kube-proxy[2]"
		synctest.Wait()
		if err := <-detached; err != nil {
			t.Error(err)
		}
		if s := w.NodeStatus(); s.Error != "" || s.Detached != 1 {
			t.Errorf("status: %+v", s)
		}
	})
}

// TestRestoreTime runs a loop on the kernel as it is where tables cannot be owned, flushes its tables, and measures how long
// they are away. Others' commits, and how often its own cause a look, are counted in the same loop.
func TestRestoreTime(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace and loads nftables in it")
	}
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer orig.Close()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := netns.Set(orig); err != nil {
		t.Fatal(err)
	}
	runtime.UnlockOSThread()
	open := func() *nft.Kernel {
		k, err := nft.New(nft.Config{NetNS: int(ns)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = k.Close() })
		return k
	}
	kernel, other := &counted{Kernel: open()}, open()
	// As kube-proxy does, or each flush would switch connection tracking off in the namespace, and each restore on.
	track := &ruleset.Chain{Name: "c", Hook: &ruleset.Hook{Name: "forward"}, Rules: []ruleset.Rule{
		{Exprs: []ruleset.Expr{ruleset.Established, ruleset.Counter{}}},
	}}
	keeper := ruleset.NewTable(ruleset.TableID{Family: ruleset.Inet, Name: "keeper"})
	keeper.Chains[track.Name] = track
	if err := other.Commit(t.Context(), ruleset.Diff(nil, ruleset.Ruleset{keeper})); err != nil {
		t.Fatal(err)
	}
	w := &world{gone: map[string]bool{}, dir: t.TempDir(), kernel: nft.NewFake(), foreign: make(chan string, 16)}
	w.metrics = metrics.New(func() float64 { return 0 })
	w.Loop = New(Config{
		NodeName: "here", Standalone: true, Policy: policy.Options{Table: "podwall"},
		Kernel: kernel, Links: w, Foreign: w.foreign, Connections: w,
		Log: slog.New(slog.DiscardHandler), Metrics: w.metrics, Clock: clock.RealClock{},
	})
	reg, _, err := registry.Open(w.dir)
	if err != nil {
		t.Fatal(err)
	}
	lead := make(chan *registry.Registry, 1)
	lead <- reg
	ctx, cancel := context.WithCancel(t.Context())
	var running errgroup.Group
	watching := make(chan struct{}, 1)
	running.Go(func() error { return w.Run(ctx, lead) })
	running.Go(func() error {
		return kernel.Watch(ctx, func(who string) {
			if who == "" {
				select {
				case watching <- struct{}{}:
				default:
				}
			}
			select {
			case w.foreign <- who:
			default:
			}
		})
	})
	t.Cleanup(func() {
		cancel()
		if err := running.Wait(); err != nil {
			t.Error(err)
		}
	})
	<-watching
	w.Apply(denyAll("deny"))
	w.Synced()
	if err := w.WaitReady(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	const pods = 50
	for i := range pods {
		id := string(rune('a'+i/26)) + string(rune('a'+i%26))
		if err := w.Attach(within(t, 10*time.Second), attachment(id, id, "10.0.0."+strconv.Itoa(i+1))); err != nil {
			t.Fatal(err)
		}
	}
	want := w.Ruleset()
	tables := w.tables()
	intact := func() bool {
		got, err := other.Read(t.Context(), tables...)
		if err != nil {
			t.Fatal(err)
		}
		d := ruleset.Diff(got, want)
		return d.Empty()
	}
	if !intact() {
		t.Fatal("the tables are not as rendered before anything was done to them")
	}

	// Its own commits are not told: nothing is pending, and what is read now is read for a sweep at most.
	time.Sleep(50 * time.Millisecond)
	quiet := kernel.reads.Load()
	for i := range 20 {
		w.Apply(denyAll("own" + strconv.Itoa(i)))
		if err := w.Detach(within(t, 10*time.Second), attachment("zz", "zz", "10.0.0.1").Key); err != nil {
			t.Fatal(err)
		}
	}
	for w.NodeStatus().Policies != 21 {
		time.Sleep(time.Millisecond)
	}
	if n := kernel.reads.Load() - quiet; n > 1 {
		t.Errorf("own commits caused %d reads", n)
	}
	want = w.Ruleset()

	const flushes = 50
	restores := make(chan string, 1000)
	running.Go(func() error { return other.Watch(ctx, func(who string) { restores <- who }) })
	<-restores
	var away []time.Duration
	for range flushes {
		time.Sleep(mostCalm + 10*time.Millisecond) // a lone event each
		begin := time.Now()
		flush := ruleset.Delta{Apply: []ruleset.Op{{Kind: ruleset.DelTable, Table: tables[0]}}}
		if err := other.Commit(t.Context(), flush); err != nil {
			t.Fatal(err)
		}
		select {
		case <-restores: // the loop's only transaction: there are no interval sets
		case <-time.After(10 * time.Second):
			t.Fatal("not restored")
		}
		away = append(away, time.Since(begin))
		if !intact() {
			t.Fatal("not all was restored")
		}
	}
	slices.Sort(away)
	t.Logf("%d flushes of a table with %d pods: restored after p50 %s, max %s", flushes, pods, away[flushes/2], away[flushes-1])
	if n := drifts(t, w.metrics); n != flushes {
		t.Errorf("%d drifts counted, want %d", n, flushes)
	}
	if away[flushes-1] > sweepEvery/4 {
		t.Errorf("the longest took %s: the sweep may have done it", away[flushes-1])
	}

	const commits = 1000
	reads, begin := kernel.reads.Load(), time.Now()
	for i := range commits {
		op := ruleset.Op{Kind: ruleset.AddTable, Table: ruleset.TableID{Family: ruleset.Inet, Name: "other"}}
		if i%2 == 1 {
			op.Kind = ruleset.DelTable
		}
		if err := other.Commit(t.Context(), ruleset.Delta{Apply: []ruleset.Op{op}}); err != nil {
			t.Fatal(err)
		}
	}
	flood := time.Since(begin)
	time.Sleep(mostCalm)
	looks, most := kernel.reads.Load()-reads, int64((flood+mostCalm)/leastCalm)+2
	t.Logf("%d foreign commits in %s: %d reads", commits, flood, looks)
	if looks < 1 || looks > most {
		t.Errorf("%d reads, want 1 to %d", looks, most)
	}
	if !intact() {
		t.Error("the tables are not as they were")
	}
}
