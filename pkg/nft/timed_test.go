package nft

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// TestDynamicSet holds that what a rule puts into a set is not the ruleset's, that each value has a limit of its own, and that it does not keep a
// table from being made anew by who is to own it.
func TestDynamicSet(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	const burst = 5
	rs := ruleset.Ruleset{table(inet, dynamic("ed4", ruleset.IPv4Addr), base("output", "output", "", 0,
		rule(ruleset.LimitEach{Field: ruleset.IPSaddr, Set: "ed4", PerSecond: 1, Burst: burst}, ruleset.Counter{}, accept),
		rule(ruleset.Counter{}, drop)))}
	n.mustCommit(t, nil, rs)
	passed := map[string]int{}
	n.in(t, func() error {
		if err := netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo"}}); err != nil {
			return err
		}
		receiver, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 9)}) // else there are answers
		if err != nil {
			return err
		}
		defer receiver.Close() //nolint:errcheck // nothing to lose
		for from, packets := range map[string]int{"127.0.0.1": 500, "127.0.0.2": 3} {
			sender, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(from)})
			if err != nil {
				return err
			}
			for range packets {
				switch _, err := sender.WriteTo([]byte{1}, receiver.LocalAddr()); {
				case err == nil:
					passed[from]++
				case !errors.Is(err, unix.EPERM): // which is what a drop on the way out answers
					return err
				}
			}
			_ = sender.Close()
		}
		return nil
	})
	if p := passed["127.0.0.1"]; p < burst || p > 2*burst || passed["127.0.0.2"] != 3 {
		t.Errorf("%v packets passed, at most %d of each source may at once", passed, burst)
	}
	listing := n.nft(t, "", "list", "set", "inet", "podwall", "ed4")
	for _, want := range []string{"127.0.0.1 counter packets 500 ", "127.0.0.2 counter packets 3 "} {
		if !strings.Contains(listing, want) {
			t.Errorf("nft does not list %q: %s", want, listing)
		}
	}
	same(t, n.mustRead(t), rs)
	if d := ruleset.Diff(n.mustRead(t), rs); !d.Empty() {
		t.Errorf("a difference: %v", d)
	}
	if whole, err := n.whole(n.mustRead(t)[0]); err != nil || !whole {
		t.Errorf("whole: %t, %v", whole, err)
	}
}

// TestTimedSet holds that the elements of a set with a timeout come and go beside the ruleset: neither read-back nor a difference
// looks at them, they can be read by themselves, and no more fit than the set's size.
func TestTimedSet(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	id := inet
	timed := &ruleset.Set{
		Name: "cut4", Key: []ruleset.KeyType{ruleset.IPv4Addr, ruleset.InetService, ruleset.IPv4Addr, ruleset.InetService, ruleset.InetProto},
		Timeout: time.Minute, Size: 2, Elements: map[ruleset.Elem]ruleset.Verdict{},
	}
	links := with(set("il", ruleset.IfName), ruleset.LinkElem("veth0"), ruleset.LinkElem("a-name-of-15-by"))
	rs := ruleset.Ruleset{table(id, timed, links, base("ingress", "forward", "", 0,
		ruleset.NewRule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr, ruleset.Sport, ruleset.IPDaddr, ruleset.Dport, ruleset.L4Proto}, Set: "cut4"}, ruleset.Verdict{Kind: ruleset.Drop}),
		ruleset.NewRule(ruleset.In{Fields: []ruleset.Field{ruleset.OIFName}, Set: "il"}, ruleset.Verdict{Kind: ruleset.Drop}),
	))}
	n.mustCommit(t, nil, rs)
	elem := func(last byte) ruleset.Elem {
		return ruleset.Elem([]byte{10, 0, 0, 1, 0, 80, 10, 0, 0, last, 3, 231, 6})
	}
	add := func(elems ...ruleset.Elem) error {
		op := ruleset.Op{Kind: ruleset.AddElements, Table: id, Set: timed, Elements: map[ruleset.Elem]ruleset.Verdict{}}
		for _, e := range elems {
			op.Elements[e] = ruleset.Verdict{}
		}
		return n.Commit(t.Context(), ruleset.Delta{Apply: []ruleset.Op{op}})
	}
	if err := add(elem(2), elem(3)); err != nil {
		t.Fatal(err)
	}
	if err := add(elem(4)); !errors.Is(err, unix.ENFILE) {
		t.Errorf("a third element: %v, want ENFILE", err)
	}
	got, err := n.Elements(t.Context(), id, timed)
	slices.Sort(got)
	if err != nil || !slices.Equal(got, []ruleset.Elem{elem(2), elem(3)}) {
		t.Errorf("elements %x, %v", got, err)
	}
	same(t, n.mustRead(t), rs)
	if d := ruleset.Diff(n.mustRead(t), rs); !d.Empty() {
		t.Errorf("a difference: %v", d)
	}
	if listing := n.nft(t, "", "list", "set", "inet", "podwall", "il"); !strings.Contains(listing, `"a-name-of-15-by"`) || !strings.Contains(listing, `"veth0"`) {
		t.Errorf("nft lists %s", listing)
	}
	if got, err := n.Elements(t.Context(), id, set("nobody", ruleset.IPv4Addr)); err != nil || len(got) != 0 {
		t.Errorf("elements of a set that is not there: %x, %v", got, err)
	}
}
