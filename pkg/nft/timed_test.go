package nft

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

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
