package nft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// owner opens a Kernel that owns tables. It is closed with the test, or before.
func (n *node) owner(t testing.TB) *Kernel {
	t.Helper()
	k, err := New(Config{NetNS: int(n.ns), Own: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	if !k.Owns() {
		t.Skip("this kernel has no flags owner and persist for tables (Linux 6.9)")
	}
	return k
}

// in runs f on a thread of the namespace.
func (n *node) in(t testing.TB, f func() error) {
	t.Helper()
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = orig.Close() }()
	if err := netns.Set(n.ns); err != nil {
		t.Fatal(err)
	}
	failed := f()
	if err := netns.Set(orig); err != nil {
		t.Fatal(err)
	}
	runtime.UnlockOSThread()
	if failed != nil {
		t.Fatal(failed)
	}
}

// tryNFT runs the nft command in the namespace and returns its error with what it says.
func (n *node) tryNFT(t testing.TB, args ...string) error {
	t.Helper()
	var failed error
	n.in(t, func() error {
		if out, err := exec.Command("nft", args...).CombinedOutput(); err != nil {
			failed = fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	return failed
}

func mustRead(t testing.TB, k *Kernel) ruleset.Ruleset {
	t.Helper()
	rs, err := k.Read(t.Context(), inet, netdev)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func mustOwn(t testing.TB, k *Kernel) {
	t.Helper()
	if woken, err := k.Own(t.Context(), inet, netdev); err != nil || len(woken) > 0 {
		t.Fatal(woken, err)
	}
}

func wantOwned(t testing.TB, k *Kernel, want ...ruleset.TableID) {
	t.Helper()
	got, err := k.Owned(t.Context(), inet, netdev)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("owned: %v, want %v", got, want)
	}
}

func mustGeneration(t testing.TB, k *Kernel) uint32 {
	t.Helper()
	g, err := k.Generation(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// TestProbe holds that asking for the flags commits nothing, and that they are not asked for by everybody.
func TestProbe(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	before := mustGeneration(t, n.Kernel)
	k := n.owner(t)
	if n.Owns() || mustGeneration(t, k) != before {
		t.Errorf("owns %v without being asked to, generation %d became %d", n.Owns(), before, mustGeneration(t, k))
	}
	// A flag that no kernel has stands for the flags on an older one; none at all is known to every kernel.
	for flags, want := range map[nftables.TableFlags]bool{0: true, ownFlags: true, ownFlags | 1<<30: false} {
		if got, err := k.knows(flags); got != want || err != nil {
			t.Errorf("flags %#x: %v, %v, want %v", uint32(flags), got, err, want)
		}
	}
	if after := mustGeneration(t, k); after != before {
		t.Errorf("generation %d became %d", before, after)
	}
	if out := n.nft(t, "", "list", "tables"); out != "" {
		t.Errorf("tables: %s", out)
	}
	rs := ruleset.Ruleset{table(inet)}
	if err := k.Commit(t.Context(), ruleset.Diff(nil, rs)); err != nil {
		t.Errorf("a commit after that: %v", err)
	}
}

// foreign is what other programs do to tables, each with a text of the answer while the table is owned; "" is success.
var foreign = map[string]string{
	"flush ruleset":                                                   "",
	"delete table inet podwall":                                       "Operation not permitted",
	"delete table netdev podwall":                                     "Operation not permitted",
	"flush chain inet podwall ingress":                                "Operation not permitted",
	"flush map inet podwall eg4":                                      "Operation not permitted",
	"add rule inet podwall ingress accept":                            "Operation not permitted",
	"add element inet podwall p4 { 10.9.9.9 }":                        "Operation not permitted",
	"add chain inet podwall x { type filter hook input priority 0; }": "Operation not permitted",
}

// TestOwned holds that nobody else can change an owned table, that it outlives its owner as it is, and that the next owner
// takes it over without touching it. The same commands do change the tables that nobody owns.
func TestOwned(t *testing.T) {
	t.Parallel()
	want := everything()
	for command, answer := range foreign {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			first := n.owner(t)
			if err := first.Commit(t.Context(), ruleset.Diff(nil, want)); err != nil {
				t.Fatal(err)
			}
			wantOwned(t, first, inet, netdev)
			wantOwned(t, n.Kernel)
			err := n.tryNFT(t, command)
			if answer == "" && err != nil || answer != "" && (err == nil || !strings.Contains(err.Error(), answer)) {
				t.Errorf("nft: %v, want %q", err, answer)
			}
			same(t, mustRead(t, first), want)

			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			same(t, n.mustRead(t), want)
			second := n.owner(t)
			before := mustGeneration(t, second)
			mustOwn(t, second)
			wantOwned(t, second, inet, netdev)
			if after := mustGeneration(t, second); after != before+2 {
				t.Errorf("taking over two tables took %d transactions", after-before)
			}
			same(t, mustRead(t, second), want)
			mustOwn(t, second)
			if after := mustGeneration(t, second); after != before+2 {
				t.Error("taking over what is owned is not nothing")
			}
			if err := n.tryNFT(t, command); answer != "" && err == nil {
				t.Error("the table of the second owner can be changed")
			}
			same(t, mustRead(t, second), want)

			if err := second.Close(); err != nil {
				t.Fatal(err)
			}
			listing := n.nft(t, "", "list", "ruleset")
			if err := n.tryNFT(t, command); err != nil {
				t.Fatalf("nobody owns the tables: %v", err)
			}
			if n.nft(t, "", "list", "ruleset") == listing {
				t.Error("the command changes nothing, owned or not")
			}
		})
	}
}

// TestSecondOwner holds what a second owner is told, also one of the same process, and that it gets the table later.
func TestSecondOwner(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	first, second := n.owner(t), n.owner(t)
	rs := ruleset.Ruleset{table(inet, chain("pod"))}
	if err := first.Commit(t.Context(), ruleset.Diff(nil, rs)); err != nil {
		t.Fatal(err)
	}
	_, err := second.Own(t.Context(), inet, netdev)
	if text := fmt.Sprintf("netlink port %d,", int32(first.nl.PID())); !IsPermission(err) || !strings.Contains(err.Error(), text) {
		t.Errorf("Own: %v, want EPERM and %q", err, text)
	}
	var refused *CommitError
	if err := second.Commit(t.Context(), ruleset.Diff(rs, nil)); !errors.As(err, &refused) || !IsPermission(err) || !strings.Contains(err.Error(), "another process owns the table") {
		t.Errorf("Commit: %v", err)
	}
	same(t, mustRead(t, second), rs)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	mustOwn(t, second)
	wantOwned(t, second, inet)
	if err := second.Commit(t.Context(), ruleset.Diff(rs, nil)); err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, second); len(got) > 0 {
		t.Errorf("left: %s", got)
	}
}

// TestPassedSocket holds that a table stays owned while somebody has its owner's socket, and is nobody's right after that.
func TestPassedSocket(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	first, second := n.owner(t), n.owner(t)
	rs := everything()
	if err := first.Commit(t.Context(), ruleset.Diff(nil, rs)); err != nil {
		t.Fatal(err)
	}
	raw, err := first.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	held := -1
	if err := raw.Control(func(fd uintptr) { held, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || held < 0 {
		t.Fatal(held, err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Own(t.Context(), inet, netdev); !IsPermission(err) {
		t.Errorf("Own while the socket is held: %v, want EPERM", err)
	}
	begin := time.Now()
	if err := unix.Close(held); err != nil {
		t.Fatal(err)
	}
	mustOwn(t, second)
	t.Logf("from the close to the ownership of both tables: %s", time.Since(begin))
	wantOwned(t, second, inet, netdev)
	same(t, mustRead(t, second), rs)
}

// TestOwnPlain holds that tables without flags become owned ones with the same content, unless that cannot be read back.
func TestOwnPlain(t *testing.T) {
	t.Parallel()
	want := everything()
	timed := set("cut", ruleset.IPv4Addr)
	timed.Timeout, timed.Size = time.Minute, 10
	want.Table(inet).Sets["cut"] = timed
	for _, tt := range []struct {
		name, command, undo string // somebody else's, by nft
	}{
		{"as made", "", ""},
		{"a foreign rule", "add rule inet podwall pod meta mark 1 accept", "flush chain inet podwall pod; add rule inet podwall pod counter drop"},
		{"a foreign base chain", "add chain inet podwall x { type filter hook output priority 0; policy drop; }", "delete chain inet podwall x"},
		{"a foreign set", "add set inet podwall x { type mark; }", "delete set inet podwall x"},
		{"timed elements", "add element inet podwall cut { 10.0.0.1 }", "flush set inet podwall cut"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			k := n.owner(t)
			n.mustCommit(t, nil, want)
			if tt.command != "" {
				n.nft(t, "", tt.command)
				listing := n.nft(t, "", "-s", "list", "table", "inet", "podwall")
				mustOwn(t, k)
				wantOwned(t, k, netdev)
				if diff := cmp.Diff(listing, n.nft(t, "", "-s", "list", "table", "inet", "podwall")); diff != "" {
					t.Errorf("a table that cannot be made again was changed:\n%s", diff)
				}
				n.nft(t, "", tt.undo)
			}
			same(t, mustRead(t, k), want)
			before := mustGeneration(t, k)
			mustOwn(t, k)
			wantOwned(t, k, inet, netdev)
			same(t, mustRead(t, k), want)
			if after := mustGeneration(t, k); after != before+2 && tt.command == "" {
				t.Errorf("replacing two tables took %d transactions", after-before)
			}
		})
	}
}

// TestUnowned holds that a Kernel that is not to own tables leaves their flags alone.
func TestUnowned(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.mustCommit(t, nil, everything())
	before := mustGeneration(t, n.Kernel)
	mustOwn(t, n.Kernel)
	wantOwned(t, n.Kernel)
	if after := mustGeneration(t, n.Kernel); after != before {
		t.Error("Own has changed something")
	}
	n.nft(t, "", "flush ruleset")
	if got := n.mustRead(t); len(got) > 0 {
		t.Errorf("nobody owned the tables, and they are there: %s", got)
	}
}

// TestDormant holds that a table that somebody has switched off is switched on, owned or not.
func TestDormant(t *testing.T) {
	t.Parallel()
	for _, own := range []bool{false, true} {
		t.Run(fmt.Sprintf("own %v", own), func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			rs := ruleset.Ruleset{table(inet, base("ingress", "forward", "", 0, rule(drop)))}
			k := n.Kernel
			if own {
				first := n.owner(t)
				if err := first.Commit(t.Context(), ruleset.Diff(nil, rs)); err != nil {
					t.Fatal(err)
				}
				if err := first.Close(); err != nil {
					t.Fatal(err)
				}
				k = n.owner(t)
				// nft 1.0.6 cannot say persist, and an update must not change it.
				if err := n.setFlags(inet, ownFlags&^2|1); err != nil {
					t.Fatal(err)
				}
			} else {
				n.mustCommit(t, nil, rs)
				n.nft(t, "", "add table inet podwall { flags dormant; }")
			}
			if out := n.nft(t, "", "list", "ruleset"); !strings.Contains(out, "dormant") {
				t.Fatalf("not dormant:\n%s", out)
			}
			woken, err := k.Own(t.Context(), inet, netdev)
			if err != nil || !slices.Equal(woken, []ruleset.TableID{inet}) {
				t.Fatal(woken, err)
			}
			if out := n.nft(t, "", "list", "ruleset"); strings.Contains(out, "dormant") {
				t.Errorf("still dormant:\n%s", out)
			}
			if owned, err := k.Owned(t.Context(), inet); err != nil || (len(owned) == 1) != own {
				t.Errorf("owned: %v %v", owned, err)
			}
			if err := n.tryNFT(t, "add table inet podwall { flags dormant; }"); own == (err == nil) {
				t.Errorf("switching it off again: %v", err)
			}
			same(t, mustRead(t, k), rs)
		})
	}
}

// TestReplaceUnderTraffic replaces a table without flags again and again: of the flow that it denies nothing arrives, and of
// the one that it allows, which needs conntrack to know it, nothing is lost.
func TestReplaceUnderTraffic(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	k := n.owner(t)
	h, err := netlink.NewHandleAt(n.ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	// The server answers nobody who has not been let in before: what is allowed is allowed by its state alone.
	sources := with(set("peers", ruleset.IPv4Addr), ruleset.AddrElem(addr("127.0.0.1")))
	rules := []ruleset.Rule{
		rule(ruleset.Established, accept),
		rule(ruleset.Equal(ruleset.L4Proto, ruleset.ProtoUDP), ruleset.Equal16(ruleset.Dport, 8000), ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "peers"}, accept),
		rule(ruleset.Counter{}, drop),
	}
	rs := ruleset.Ruleset{table(inet, sources, base("node", "input", "", 0, rules...))}
	n.mustCommit(t, nil, rs)

	listen := func(port int) *net.UDPConn {
		var c *net.UDPConn
		n.in(t, func() error {
			var err error
			c, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
			return err
		})
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	allowed, denied, client := listen(8000), listen(9000), listen(0)
	to := func(c *net.UDPConn) *net.UDPAddr { return c.LocalAddr().(*net.UDPAddr) }
	var gotDenied atomic.Int64
	go func() {
		for {
			if _, _, err := denied.ReadFromUDP(make([]byte, 8)); err != nil {
				return
			}
			gotDenied.Add(1)
		}
	}()
	go func() {
		buf := make([]byte, 8)
		for {
			size, from, err := allowed.ReadFromUDP(buf)
			if err != nil {
				return
			}
			_, _ = allowed.WriteToUDP(buf[:size], from)
		}
	}()
	sent, lost := 0, 0
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		buf := make([]byte, 8)
		for {
			select {
			case <-done:
				return
			default:
			}
			sent++
			_, _ = client.WriteToUDP([]byte("denied"), to(denied))
			_, _ = client.WriteToUDP([]byte("ok"), to(allowed))
			_ = client.SetReadDeadline(time.Now().Add(2 * time.Second))
			if _, _, err := client.ReadFromUDP(buf); err != nil {
				lost++
			}
		}
	}()
	const rounds = 200
	var took []time.Duration
	for range rounds {
		begin := time.Now()
		mustOwn(t, k)
		took = append(took, time.Since(begin))
		wantOwned(t, k, inet)
		// Back to a table without flags, by the owner and in one transaction as well.
		k.own = false
		d := ruleset.Diff(nil, rs)
		_, err := k.transaction(slices.Concat([]ruleset.Op{{Kind: ruleset.DelTable, Table: inet}}, d.Apply))
		k.own = true
		if err != nil {
			t.Fatal(err)
		}
		wantOwned(t, k)
	}
	close(done)
	<-stopped
	time.Sleep(50 * time.Millisecond) // for what is on its way
	slices.Sort(took)
	t.Logf("%d replacements by Own, median %s, longest %s: %d datagrams each way, %d allowed ones lost, %d denied ones arrived",
		rounds, took[rounds/2], took[rounds-1], sent, lost, gotDenied.Load())
	if gotDenied.Load() > 0 || lost > 0 || sent < 10*rounds {
		t.Errorf("of %d datagrams %d denied ones arrived and %d allowed ones were lost", sent, gotDenied.Load(), lost)
	}
	// The control: the same in two transactions.
	for deadline := time.Now().Add(10 * time.Second); gotDenied.Load() == 0 && time.Now().Before(deadline); {
		for _, d := range []ruleset.Delta{ruleset.Diff(rs, nil), ruleset.Diff(nil, rs)} {
			_, _ = client.WriteToUDP([]byte("denied"), to(denied))
			if err := k.Commit(t.Context(), d); err != nil {
				t.Fatal(err)
			}
		}
	}
	if gotDenied.Load() == 0 {
		t.Error("nothing denied arrives when the table is replaced in two transactions")
	}
}

// watch collects what a Kernel's Watch tells, after its first word.
func watch(t *testing.T, k *Kernel) <-chan string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	heard, done := make(chan string, 10_000), make(chan error, 1)
	go func() { done <- k.Watch(ctx, func(who string) { heard <- who }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if who := nextWord(t, heard); who != "" {
		t.Fatalf("the first word is %q", who)
	}
	return heard
}

func nextWord(t *testing.T, heard <-chan string) string {
	t.Helper()
	select {
	case who := <-heard:
		return who
	case <-time.After(5 * time.Second):
		t.Fatal("nothing is told")
		return ""
	}
}

// TestWatch holds that others' transactions are told, one word for each however large, with the name of who did, and that a
// Kernel's own are not.
func TestWatch(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	heard := watch(t, n.Kernel)
	rs := everything()
	n.mustCommit(t, nil, rs)
	n.mustCommit(t, rs, nil)
	other, err := New(Config{NetNS: int(n.ns)})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	big := ruleset.Ruleset{table(ruleset.TableID{Family: ruleset.Inet, Name: "other"}, with(set("big", ruleset.IPv4Addr), addrs(50_000)...))}
	if err := other.Commit(t.Context(), ruleset.Diff(nil, big)); err != nil {
		t.Fatal(err)
	}
	n.nft(t, "", "add table inet x")
	// Its commits were before the others': if they were told, they would be first.
	if who := nextWord(t, heard); !strings.HasPrefix(who, "nft.test[") {
		t.Errorf("heard of %q, want this test", who)
	}
	if who := nextWord(t, heard); !strings.HasPrefix(who, "nft[") {
		t.Errorf("heard of %q, want nft", who)
	}
	if len(heard) > 0 {
		t.Errorf("heard of %q as well", <-heard)
	}
}

// TestWatchOverflow holds that lost messages are told as one of somebody.
func TestWatchOverflow(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	other, err := New(Config{NetNS: int(n.ns)})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	ctx, cancel := context.WithCancel(t.Context())
	busy, free := make(chan struct{}), make(chan struct{})
	var heard []string
	done := make(chan error, 1)
	go func() {
		done <- n.Watch(ctx, func(who string) {
			if len(heard) == 0 {
				close(busy)
				<-free
			}
			heard = append(heard, who)
			if who == "" && len(heard) > 1 {
				cancel()
			}
		})
	}()
	<-busy
	add := ruleset.Delta{Apply: []ruleset.Op{{Kind: ruleset.AddTable, Table: inet}, {Kind: ruleset.DelTable, Table: inet}}}
	const commits = 3000
	for range commits {
		if err := other.Commit(t.Context(), add); err != nil {
			t.Fatal(err)
		}
	}
	close(free)
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
		t.Logf("heard %d words of %d commits", len(heard), commits)
	case <-time.After(10 * time.Second):
		t.Error("the overflow is not told")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestWatchOfNothing holds that an error of the subscription is returned.
func TestWatchOfNothing(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	k := &Kernel{nl: n.nl, netNS: -1}
	if err := k.Watch(t.Context(), func(string) { t.Error("told of something") }); err == nil {
		t.Error("no error")
	}
}
