// Package memory compares podwall's rulesets with the oracle without a kernel: ruleset.Trace takes the packets' way. It holds
// random clusters and random sequences of changes, as fast as they can be made.
package memory

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/generate"
	"github.com/podwall/podwall/tests/oracle/layout"
	"github.com/podwall/podwall/tests/oracle/subject"
)

var (
	verdicts = flag.Int("verdicts", 100_000, "how many verdicts to compare; from 1,000,000 on each construct must have changed as many as is claimed")
	steps    = flag.Int("steps", 1_000, "how many changes to follow")
)

const claimFrom = 1_000_000

// TestMain draws the seed, unless -rapid.seed gives it, so that every run can be repeated.
func TestMain(m *testing.M) {
	flag.Parse()
	seed := flag.Lookup("rapid.seed")
	if seed.Value.String() == "0" {
		set(seed.Name, rand.Uint64())
	}
	set("rapid.nofailfile", true) // the seed says as much
	fmt.Printf("seed: go test ./memory -rapid.seed=%s -verdicts=%d -steps=%d\n", seed.Value, *verdicts, *steps)
	os.Exit(m.Run())
}

func set(name string, value any) {
	if err := flag.Set(name, fmt.Sprint(value)); err != nil {
		panic(err)
	}
}

// TestVerdicts compares podwall's verdicts with the oracle's.
func TestVerdicts(t *testing.T) {
	r := report{flips: map[string]int{}, mix: map[string]share{}, rulesets: map[string]int{}}
	began := time.Now()
	set("rapid.checks", *verdicts/10+10) // more than needed: cases are skipped once there are enough verdicts
	mismatches := 0
	t.Cleanup(func() {
		t.Logf("%smismatches: %d, time: %v", &r, min(1, mismatches), time.Since(began).Round(time.Millisecond))
		t.Attr("compared", fmt.Sprintf("%d verdicts, %.1f %% allowed, %d mismatches, -rapid.seed=%s", r.total.all, r.total.percent(), min(1, mismatches), flag.Lookup("rapid.seed").Value))
	})
	rapid.Check(t, func(t *rapid.T) {
		if r.total.all >= *verdicts && mismatches == 0 {
			return
		}
		c := generate.Cluster(t)
		conns := generate.Conns(c)
		rs := subject.Render(c).Ruleset
		want := make([]bool, len(conns))
		for i, conn := range conns {
			want[i] = c.Allowed(conn)
			got, path, err := subject.Allowed(rs, conn)
			if err != nil || got != want[i] {
				mismatches++ // the first ends the test; the others are the same one, made smaller
				t.Fatalf("%+v\noracle: allowed=%v, podwall: allowed=%v %v\n%s%s", conn, want[i], got, err, path, generate.Text(c))
			}
		}
		if mismatches == 0 {
			r.add(c, conns, want)
			r.render(rs)
		}
	})
	if r.total.all < *verdicts {
		t.Errorf("only %d verdicts were compared", r.total.all)
	}
	if p := r.total.percent(); p < 25 || p > 75 {
		t.Errorf("%.1f%% of the verdicts are allowed: the cases are too much alike", p)
	}
	for _, what := range inRulesets {
		if r.rulesets[what] == 0 {
			t.Errorf("no ruleset has a %s", what)
		}
	}
	for _, k := range constructs {
		switch n := r.flips[k.name]; {
		case n == 0 && *verdicts >= claimFrom:
			t.Errorf("construct %q has changed no verdict: nothing is known about it", k.name)
		case *verdicts >= claimFrom && n < k.claims:
			t.Errorf("construct %q has changed only %d verdicts, claimed are %d", k.name, n, k.claims)
		}
	}
}

// TestDefects is the control of TestVerdicts: podwall's ruleset for what somebody sees who ignores a construct must be found out.
func TestDefects(t *testing.T) {
	for _, k := range constructs {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			for i := range mostExamples {
				c := example(i)
				rs := k.rulesetIgnoring(c)
				for _, conn := range generate.Conns(c) {
					if !k.concerns(conn) {
						continue
					}
					sent := conn
					if k.spoil == nil {
						sent = k.seen(conn)
					}
					got, _, err := subject.Allowed(rs, sent)
					if err != nil {
						t.Fatal(err)
					}
					if got != c.Allowed(conn) {
						return
					}
				}
			}
			t.Errorf("%d clusters have not shown the defect", mostExamples)
		})
	}
}

// mostExamples bounds the search for one that shows a defect.
const mostExamples = 2_000

func example(i int) *oracle.Cluster { return rapid.Custom(generate.Cluster).Example(i) }

// report counts what has been compared.
type report struct {
	total    share
	mix      map[string]share
	flips    map[string]int // by construct
	rulesets map[string]int // by what is in them
}

type share struct{ all, allowed int }

func (s share) percent() float64 { return 100 * float64(s.allowed) / float64(max(1, s.all)) }

func (s share) plus(allowed bool) share {
	s.all++
	if allowed {
		s.allowed++
	}
	return s
}

func (r *report) add(c *oracle.Cluster, conns []oracle.Conn, want []bool) {
	for i, conn := range conns {
		r.total = r.total.plus(want[i])
		for _, kind := range kinds(conn) {
			r.mix[kind] = r.mix[kind].plus(want[i])
		}
	}
	for i := range constructs {
		k := &constructs[i]
		ignorant := k.ignoredIn(c)
		for j, conn := range conns {
			if k.concerns(conn) && ignorant.Allowed(k.seen(conn)) != want[j] {
				r.flips[k.name]++
			}
		}
	}
}

// inRulesets are the ways to render that have to be seen. A prefix is that of a set's name.
var inRulesets = []string{"all", "interval set", "np4_", "np6_", "p4_", "p6_", "pt_", "netdev"}

func (r *report) render(rs ruleset.Ruleset) {
	seen := map[string]bool{"all": true}
	for _, t := range rs {
		seen[string(t.ID.Family)] = true
		for name, s := range t.Sets {
			prefix, _, _ := strings.Cut(name, "_")
			seen[prefix+"_"] = true
			if s.Interval {
				seen["interval set"] = true
			}
		}
	}
	for what := range seen {
		r.rulesets[what]++
	}
}

func kinds(conn oracle.Conn) []string {
	family := "IPv4"
	if conn.Src.Is6() {
		family = "IPv6"
	}
	from, local := layout.PlaceOf(conn.Src)
	to, toLocal := layout.PlaceOf(conn.Dst)
	way := "pod to pod, routed"
	switch {
	case conn.FromNode:
		way = "node to pod"
	case conn.ToNode:
		way = "pod to node"
	case conn.Src == conn.Dst:
		way = "pod to itself"
	case !local:
		way = "others to pod"
	case !toLocal:
		way = "pod to others"
	case from.Bridge != "" && to.Bridge != "":
		way = "pod to pod, bridged"
	}
	return []string{string(conn.Protocol), family, way}
}

func (r *report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-40s %9d verdicts %5.1f%% allowed\n", "compared", r.total.all, r.total.percent())
	for _, kind := range slices.Sorted(maps.Keys(r.mix)) {
		fmt.Fprintf(&b, "  %-38s %9d verdicts %5.1f%% allowed\n", kind, r.mix[kind].all, r.mix[kind].percent())
	}
	b.WriteString("verdicts that change when a construct alone is ignored\n")
	for _, k := range constructs {
		fmt.Fprintf(&b, "  %-38s %9d\n", k.name, r.flips[k.name])
	}
	b.WriteString("rulesets, and those with\n")
	for _, what := range inRulesets {
		fmt.Fprintf(&b, "  %-38s %9d\n", what, r.rulesets[what])
	}
	return b.String()
}
