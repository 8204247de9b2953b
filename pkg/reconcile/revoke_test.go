package reconcile

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/conntrack"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

func flow(src, dst string) conntrack.Flow {
	return conntrack.Flow{Proto: ruleset.ProtoTCP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}
}

// allowFrom lets the pods of one app into all pods of the namespace.
func allowFrom(name, app string) cluster.Change {
	p := &cluster.Policy{Namespace: "ns", Name: name, Spec: networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{"Ingress"},
		Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
			PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}},
		}}}},
	}}
	return cluster.Change{Key: p.Key(), Object: p}
}

// cutElements are what the kernel's cut sets hold.
func (w *world) cutElements() int {
	t := w.kernel.Ruleset().Table(ruleset.TableID{Family: ruleset.Inet, Name: "podwall"})
	return len(t.Sets["cut4"].Elements) + len(t.Sets["cut6"].Elements)
}

func (w *world) left() []conntrack.Flow {
	w.flowsMu.Lock()
	defer w.flowsMu.Unlock()
	return append([]conntrack.Flow(nil), w.flows...)
}

// TestRevoke holds which connections a change ends.
func TestRevoke(t *testing.T) {
	t.Parallel()
	var (
		fromFriend   = flow("10.0.0.2:1000", "10.0.0.1:80")
		fromStranger = flow("10.0.0.3:1000", "10.0.0.1:80")
		fromNode     = flow("192.168.1.1:1000", "10.0.0.1:80")
		outgoing     = flow("10.0.0.1:1000", "192.0.2.1:443")
		toNode       = flow("10.0.0.1:1000", "192.168.1.1:443")
		elsewhere    = flow("10.0.0.3:1000", "192.0.2.1:443")
		all          = []conntrack.Flow{fromFriend, fromStranger, fromNode, outgoing, toNode, elsewhere}
	)
	egress := &cluster.Policy{Namespace: "ns", Name: "egress", Spec: networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "a"}}, PolicyTypes: []networkingv1.PolicyType{"Egress"},
	}}
	noFriend := pod("friend", "there", "10.0.0.2")
	noFriend.Object.(*cluster.Pod).Labels = map[string]string{"app": "nobody"}
	for _, tt := range []struct {
		name   string
		before []cluster.Change
		change cluster.Change
		later  bool // at the second look
		want   []conntrack.Flow
	}{
		{name: "a policy that closes", change: denyAll("deny"), want: []conntrack.Flow{fromNode, elsewhere}},
		{name: "a policy that lets one in", change: allowFrom("allow", "friend"), want: []conntrack.Flow{fromFriend, fromNode, outgoing, toNode, elsewhere}},
		{name: "an egress policy", change: cluster.Change{Key: egress.Key(), Object: egress}, want: []conntrack.Flow{fromFriend, fromStranger, fromNode, elsewhere}},
		{name: "a pod that is no friend any more", before: []cluster.Change{allowFrom("allow", "friend"), allowFrom("also", "stranger")}, change: noFriend, want: []conntrack.Flow{fromStranger, fromNode, outgoing, toNode, elsewhere}},
		{name: "a friend that has gone", before: []cluster.Change{allowFrom("allow", "friend"), allowFrom("also", "stranger")}, change: pod("friend", "there", "10.9.9.9"), later: true, want: []conntrack.Flow{fromStranger, fromNode, outgoing, toNode, elsewhere}},
		{name: "a policy that goes", before: []cluster.Change{allowFrom("allow", "friend"), allowFrom("also", "stranger")}, change: cluster.Change{Key: allowFrom("also", "stranger").Key}, want: []conntrack.Flow{fromFriend, fromNode, outgoing, toNode, elsewhere}},
		{name: "nothing that matters", before: []cluster.Change{allowFrom("allow", "friend"), allowFrom("also", "stranger")}, change: pod("other", "there", "10.9.9.9"), want: all},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := start(t, false, nil)
				w.Apply(pod("a", "here"), pod("friend", "there", "10.0.0.2"), pod("stranger", "there", "10.0.0.3"))
				w.Apply(tt.before...)
				w.Synced()
				if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				w.flowsMu.Lock()
				w.flows = append([]conntrack.Flow(nil), all...)
				w.flowsMu.Unlock()
				w.Apply(tt.change)
				synctest.Wait()
				if tt.later {
					if got := len(w.left()); got != len(all) {
						t.Errorf("%d connections are left at once, want %d", got, len(all))
					}
					time.Sleep(lookAgain)
					synctest.Wait()
				}
				if diff := cmp.Diff(tt.want, w.left(), cmp.Comparer(func(a, b conntrack.Flow) bool { return a == b })); diff != "" {
					t.Errorf("connections left (-want +got):\n%s", diff)
				}
				if got, want := w.cutElements(), len(all)-len(tt.want); got != want {
					t.Errorf("%d connections are kept in the kernel's sets, want %d", got, want)
				}
			})
		})
	}
}

// TestRevokeAgain holds the second look, that what is allowed again leaves the sets, and that nothing of it outlives its owner.
func TestRevokeAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("friend", "there", "10.0.0.2"), pod("stranger", "there", "10.0.0.3"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		w.Apply(allowFrom("allow", "friend"))
		synctest.Wait()
		// It was under way when the change was committed: its entry is confirmed after the first look.
		w.flowsMu.Lock()
		w.flows = []conntrack.Flow{flow("10.0.0.3:1000", "10.0.0.1:80"), flow("10.0.0.3:1001", "10.0.0.1:80")}
		w.flowsMu.Unlock()
		time.Sleep(2 * lookAgain)
		synctest.Wait()
		if left := w.left(); len(left) != 0 || w.cutElements() != 2 {
			t.Fatalf("after the second look: %v left, %d kept", left, w.cutElements())
		}
		w.Apply(allowFrom("also", "stranger"))
		synctest.Wait()
		if n := w.cutElements(); n != 0 {
			t.Errorf("%d connections that are allowed again are still in the sets", n)
		}
		w.flowsMu.Lock()
		w.flows = []conntrack.Flow{flow("10.0.0.3:1002", "10.0.0.1:80")}
		w.flowsMu.Unlock()
		w.Apply(cluster.Change{Key: allowFrom("also", "stranger").Key})
		synctest.Wait()
		if n := w.cutElements(); n != 1 {
			t.Fatalf("%d connections are kept, want 1", n)
		}
		if err := w.Detach(within(t, time.Second), attachment("c1", "a", "10.0.0.1").Key); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := w.cutElements(); n != 0 {
			t.Errorf("%d connections of a pod that is gone are still in the sets", n)
		}
	})
}

// TestRevokeAtStart holds that what became forbidden while no daemon ran is ended by the next one.
func TestRevokeAtStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("friend", "there", "10.0.0.2"), pod("stranger", "there", "10.0.0.3"), allowFrom("allow", "friend"))
		w.flows = []conntrack.Flow{flow("10.0.0.2:1", "10.0.0.1:80"), flow("10.0.0.3:1", "10.0.0.1:80")}
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		w.flowsMu.Lock()
		w.flows = []conntrack.Flow{flow("10.0.0.2:1", "10.0.0.1:80"), flow("10.0.0.3:1", "10.0.0.1:80")}
		w.flowsMu.Unlock()
		next := start(t, false, w)
		next.flows = w.left()
		next.Apply(pod("a", "here"), pod("friend", "there", "10.0.0.2"), pod("stranger", "there", "10.0.0.3"), allowFrom("allow", "friend"))
		next.Synced()
		synctest.Wait()
		want := []conntrack.Flow{flow("10.0.0.2:1", "10.0.0.1:80")}
		if diff := cmp.Diff(want, next.left(), cmp.Comparer(func(a, b conntrack.Flow) bool { return a == b })); diff != "" {
			t.Errorf("connections left (-want +got):\n%s", diff)
		}
	})
}

// TestRevokeAlike holds that entries are deleted one by one, also those that are one connection to the rules.
func TestRevokeAlike(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("stranger", "there", "10.0.0.3"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		direct, echo := flow("10.0.0.3:1000", "10.0.0.1:80"), conntrack.Flow{Proto: unix.IPPROTO_ICMP, Src: netip.MustParseAddrPort("10.0.0.3:0"), Dst: netip.MustParseAddrPort("10.0.0.1:0")}
		service, another := direct, echo
		service.OrigDst = netip.MustParseAddrPort("10.96.0.1:80")
		another.Status = conntrack.SeenReply // its identifier is not seen from here
		w.flowsMu.Lock()
		w.flows = []conntrack.Flow{direct, service, echo, another}
		w.flowsMu.Unlock()
		w.Apply(allowFrom("allow", "friend"))
		synctest.Wait()
		if left := w.left(); len(left) != 0 || w.cutElements() != 1 {
			t.Errorf("%v left, %d kept; want none, and one", left, w.cutElements())
		}
	})
}

// TestRevokeAgainUnderChanges holds that changes which keep coming do not put the second look off.
func TestRevokeAgainUnderChanges(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("b", "here"), pod("friend", "there", "10.0.0.2"), pod("stranger", "there", "10.0.0.3"))
		w.Synced()
		for name, ip := range map[string]string{"a": "10.0.0.1", "b": "10.0.0.4"} {
			if err := w.Attach(within(t, time.Second), attachment("c-"+name, name, ip)); err != nil {
				t.Fatal(err)
			}
		}
		onlyA := &cluster.Policy{Namespace: "ns", Name: "a", Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "a"}}, PolicyTypes: []networkingv1.PolicyType{"Ingress"},
		}}
		w.Apply(cluster.Change{Key: onlyA.Key(), Object: onlyA})
		synctest.Wait()
		w.flowsMu.Lock()
		w.flows = []conntrack.Flow{flow("10.0.0.3:1000", "10.0.0.1:80")}
		w.flowsMu.Unlock()
		// Changes of b alone, each of which has a second look of its own.
		for i := range 6 {
			onlyB := &cluster.Policy{Namespace: "ns", Name: "b", Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "b"}}, PolicyTypes: []networkingv1.PolicyType{"Egress", "Ingress"}[:1+i%2],
			}}
			w.Apply(cluster.Change{Key: onlyB.Key(), Object: onlyB})
			time.Sleep(lookAgain / 2)
		}
		synctest.Wait()
		if left := w.left(); len(left) != 0 {
			t.Errorf("after %s of changes: %v left", 3*lookAgain, left)
		}
	})
}

// TestRememberRevoked holds that a daemon knows what a former one has cut: what is allowed again works at once.
func TestRememberRevoked(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("friend", "there", "10.0.0.2"), pod("stranger", "there", "10.0.0.3"))
		w.Synced()
		if err := w.Attach(within(t, time.Second), attachment("c1", "a", "10.0.0.1")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		w.flowsMu.Lock()
		w.flows = []conntrack.Flow{flow("10.0.0.3:1", "10.0.0.1:80")}
		w.flowsMu.Unlock()
		w.Apply(allowFrom("allow", "friend"))
		synctest.Wait()
		if n := w.cutElements(); n != 1 {
			t.Fatalf("%d connections are kept, want 1", n)
		}
		next := start(t, false, w)
		next.Apply(pod("a", "here"), pod("friend", "there", "10.0.0.2"), pod("stranger", "there", "10.0.0.3"), allowFrom("allow", "friend"))
		next.Synced()
		synctest.Wait()
		if n := next.cutElements(); n != 1 {
			t.Fatalf("%d connections are kept by the next daemon, want 1", n)
		}
		next.Apply(allowFrom("also", "stranger"))
		synctest.Wait()
		if n := next.cutElements(); n != 0 {
			t.Errorf("%d connections that are allowed again are still in the sets", n)
		}
	})
}

// TestBridgedClientsOfServices holds that the client of a connection to a Service is known as what it asked for if it is behind a
// bridge, that the rules look there as long as that may be, across a restart too, and no longer.
func TestBridgedClientsOfServices(t *testing.T) {
	t.Parallel()
	const client, server = "10.0.0.2", "10.0.0.1"
	byService := flow(client+":1000", server+":80")
	byService.OrigDst = netip.MustParseAddrPort("10.96.0.1:80")
	udp := byService
	udp.Proto = ruleset.ProtoUDP
	revoke := func(t *testing.T, link string) *world {
		t.Helper()
		w := start(t, false, nil)
		w.Apply(pod("a", "here"), pod("stranger", "here"))
		w.Synced()
		behind := attachment("c2", "stranger", client)
		behind.HostLink.Name = link
		for _, a := range []attach.Attachment{attachment("c1", "a", server), behind} {
			if err := w.Attach(within(t, time.Second), a); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		w.flowsMu.Lock()
		w.flows = []conntrack.Flow{byService, flow(client+":1001", server+":80"), udp}
		w.flowsMu.Unlock()
		w.Apply(allowFrom("allow", "friend"))
		synctest.Wait()
		if left, cut := w.left(), w.cutElements(); len(left) != 0 || cut != 3 { // without those before NAT
			t.Fatalf("%v left, %d kept; want none, and 3", left, cut)
		}
		return w
	}
	expect := func(t *testing.T, w *world, when string, elements int, chain bool) {
		t.Helper()
		rs := w.kernel.Ruleset()
		n := len(rs.Table(ruleset.TableID{Family: ruleset.Inet, Name: "podwall"}).Sets["cutnat4"].Elements)
		if got := policy.CutsBeforeNAT(rs); n != elements || got != chain {
			t.Errorf("%s: %d connections before NAT, chain %v; want %d, %v", when, n, got, elements, chain)
		}
	}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"routed", func(t *testing.T) { expect(t, revoke(t, "veth"), "revoked", 0, false) }},
		{"until the timeout", func(t *testing.T) {
			w := revoke(t, "port")
			expect(t, w, "revoked", 1, true)
			time.Sleep(policy.CutTimeout - 2*sweepEvery)
			synctest.Wait()
			expect(t, w, "before the timeout", 1, true)
			time.Sleep(4 * sweepEvery)
			synctest.Wait()
			expect(t, w, "after it", 1, false) // this kernel has no clock
		}},
		{"until it is allowed again", func(t *testing.T) {
			w := revoke(t, "port")
			w.Apply(allowFrom("also", "stranger"))
			synctest.Wait()
			expect(t, w, "allowed again", 0, false)
		}},
		{"until the client is gone", func(t *testing.T) {
			w := revoke(t, "port")
			if err := w.Detach(within(t, time.Second), attachment("c2", "stranger", client).Key); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			expect(t, w, "gone", 0, false)
		}},
		{"across a restart", func(t *testing.T) {
			w := revoke(t, "port")
			before, err := w.kernel.Generation(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			next := start(t, false, w)
			next.Apply(pod("a", "here"), pod("stranger", "here"), allowFrom("allow", "friend"))
			next.Synced()
			synctest.Wait()
			expect(t, next, "restarted", 1, true)
			if after, err := next.kernel.Generation(t.Context()); err != nil || after != before {
				t.Errorf("a restart that changes nothing makes %d transactions (%v)", after-before, err)
			}
			next.Apply(allowFrom("also", "stranger"))
			synctest.Wait()
			expect(t, next, "allowed again", 0, false)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, tt.do)
		})
	}
}
