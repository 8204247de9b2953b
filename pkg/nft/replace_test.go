package nft

import (
	"testing"

	"github.com/podwall/podwall/pkg/ruleset"
)

// TestSetOfAnotherKind holds that a set whose kind has changed is replaced with its table, whatever looks at it: in the kernel a
// set cannot be changed, and one of another kind matches something else by the same bytes.
func TestSetOfAnotherKind(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	v4 := ruleset.Ruleset{table(inet, with(set("peers", ruleset.IPv4Addr), ruleset.AddrElem(addr("10.0.0.1"))),
		base("ingress", "forward", "", 0, ruleset.NewRule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: "peers"}, ruleset.Verdict{Kind: ruleset.Drop})))}
	links := ruleset.Ruleset{table(inet, with(set("peers", ruleset.IfName), ruleset.LinkElem("veth0"), ruleset.LinkElem("a-name-of-15-by")),
		base("ingress", "forward", "", 0, ruleset.NewRule(ruleset.In{Fields: []ruleset.Field{ruleset.OIFName}, Set: "peers"}, ruleset.Verdict{Kind: ruleset.Drop})))}
	verdicts := ruleset.Ruleset{table(inet, verdictMap("peers", ruleset.IPv4Addr, map[ruleset.Elem]ruleset.Verdict{ruleset.AddrElem(addr("10.0.0.1")): {Kind: ruleset.Drop}}),
		base("ingress", "forward", "", 0, ruleset.NewRule(ruleset.Dispatch{Fields: []ruleset.Field{ruleset.IPSaddr}, Map: "peers"})))}
	n.mustCommit(t, nil, v4)
	for from, to := v4, links; ; from, to = links, verdicts {
		if ruleset.Diff(from, to).Empty() {
			t.Fatal("no difference")
		}
		n.mustCommit(t, from, to)
		same(t, n.mustRead(t), to)
		if to.Table(inet) == verdicts.Table(inet) {
			break
		}
	}
}
