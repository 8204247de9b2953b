package engines

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"github.com/podwall/podwall/tests/oracle"
	"github.com/podwall/podwall/tests/oracle/generate"
)

var wanted = flag.Int("engine-verdicts", 50_000, "verdicts that each engine must give where a policy has a say")

func engines(t *testing.T) []Engine {
	t.Helper()
	knp, err := NewKNP()
	if err != nil {
		t.Fatal(err)
	}
	return []Engine{knp, &Cyclonus{}}
}

// TestEngines compares the oracle with every engine, question by question.
func TestEngines(t *testing.T) {
	all := engines(t)
	tallies := make([]tally, len(all))
	start, seed := time.Now(), freshSeed(t)
	defer func() {
		for i, e := range all {
			t.Logf("%s: %v", e.Name(), &tallies[i])
			t.Attr(e.Name(), fmt.Sprintf("%d verdicts, %d mismatches, -rapid.seed=%d", tallies[i].verdicts, tallies[i].mismatches, seed))
		}
		t.Logf("seed %d, %v", seed, time.Since(start).Round(time.Millisecond))
	}()
	least := func() int { return min(tallies[0].verdicts, tallies[1].verdicts) }
	for round := uint64(0); least() < *wanted; round++ {
		before := least()
		check(t, seed+round*stride, func(t *rapid.T) {
			c := generate.Cluster(t)
			for i, e := range all {
				if wrong := compare(e, c, c, &tallies[i]); len(wrong) > 0 {
					t.Fatalf("%d answers of %s differ, the first: %v\n%s", len(wrong), e.Name(), wrong[0], generate.Text(c))
				}
			}
		})
		if least() == before {
			t.Fatal("100 clusters gave no question that every engine can answer")
		}
	}
}

// defects are what an oracle could have wrong.
var defects = []struct {
	name  string
	spoil func(*networkingv1.NetworkPolicySpec)
}{
	{"excepts are ignored", eachPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.IPBlock != nil {
			p.IPBlock.Except = nil
		}
	})},
	{"a peer's podSelector is ignored beside a namespaceSelector", eachPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.NamespaceSelector != nil {
			p.PodSelector = nil
		}
	})},
	{"a peer without namespaceSelector selects in all namespaces", eachPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.PodSelector != nil && p.NamespaceSelector == nil {
			p.NamespaceSelector = &metav1.LabelSelector{}
		}
	})},
	{"matchExpressions are ignored", eachPeer(func(p *networkingv1.NetworkPolicyPeer) {
		if p.PodSelector != nil {
			p.PodSelector.MatchExpressions = nil
		}
	})},
	{"endPort is ignored", eachPort(func(p *networkingv1.NetworkPolicyPort) { p.EndPort = nil })},
	{"a name is any port", eachPort(func(p *networkingv1.NetworkPolicyPort) {
		if p.Port != nil && p.Port.StrVal != "" {
			p.Port = nil
		}
	})},
	{"every protocol is TCP", eachPort(func(p *networkingv1.NetworkPolicyPort) { p.Protocol = nil })},
	{"policyTypes are always defaulted", func(s *networkingv1.NetworkPolicySpec) { s.PolicyTypes = nil }},
	{"podSelector selects everybody", func(s *networkingv1.NetworkPolicySpec) { s.PodSelector = metav1.LabelSelector{} }},
}

// TestDefects is the control: an oracle with one defect must disagree with every engine.
func TestDefects(t *testing.T) {
	const mostClusters = 1000
	seed := freshSeed(t)
	t.Logf("seed %d", seed)
	for _, d := range defects {
		for _, e := range engines(t) {
			t.Run(d.name+"/"+e.Name(), func(t *testing.T) {
				var clusters int
				sum := &tally{}
				for round := uint64(0); sum.mismatches == 0 && clusters < mostClusters; round++ {
					check(t, seed+round, func(t *rapid.T) {
						if sum.mismatches == 0 {
							c := generate.Cluster(t)
							compare(e, spoilt(c, d.spoil), c, sum)
							clusters++
						}
					})
				}
				t.Logf("%d answers differ, %d verdicts and %d clusters after the start", sum.mismatches, sum.verdicts, clusters)
				if sum.mismatches == 0 {
					t.Errorf("%s does not tell an oracle in which %s", e.Name(), d.name)
				}
			})
		}
	}
}

func spoilt(c *oracle.Cluster, spoil func(*networkingv1.NetworkPolicySpec)) *oracle.Cluster {
	bad := *c
	bad.Policies = nil
	for _, p := range c.Policies {
		p = p.DeepCopy()
		spoil(&p.Spec)
		bad.Policies = append(bad.Policies, p)
	}
	return &bad
}

func eachPeer(spoil func(*networkingv1.NetworkPolicyPeer)) func(*networkingv1.NetworkPolicySpec) {
	return func(s *networkingv1.NetworkPolicySpec) {
		for _, r := range s.Ingress {
			for i := range r.From {
				spoil(&r.From[i])
			}
		}
		for _, r := range s.Egress {
			for i := range r.To {
				spoil(&r.To[i])
			}
		}
	}
}

func eachPort(spoil func(*networkingv1.NetworkPolicyPort)) func(*networkingv1.NetworkPolicySpec) {
	return func(s *networkingv1.NetworkPolicySpec) {
		for _, r := range s.Ingress {
			for i := range r.Ports {
				spoil(&r.Ports[i])
			}
		}
		for _, r := range s.Egress {
			for i := range r.Ports {
				spoil(&r.Ports[i])
			}
		}
	}
}

// compare asks the engine about c and the oracle about judged, which is c except in the control: about each direction that
// the node decides, and about the whole connection if none of them is left out.
func compare(e Engine, judged, c *oracle.Cluster, sum *tally) []mismatch {
	stored := Store(c)
	e.Load(stored)
	oneWay := map[networkingv1.PolicyType]*oracle.Cluster{}
	for _, d := range []networkingv1.PolicyType{networkingv1.PolicyTypeEgress, networkingv1.PolicyTypeIngress} {
		oneWay[d] = OneWay(judged, d)
	}
	var list []mismatch
	for _, conn := range generate.Conns(c) {
		both, complete := true, true
		for _, q := range stored.Questions(conn) {
			want := oneWay[q.Direction].Allowed(conn)
			got, answered := ask(e, q)
			if rule := excluding(e, q); rule != "" {
				sum.exclude(rule, answered && got == want)
				complete = false
				continue
			}
			if !answered {
				got = !want
			}
			sum.add(q, want, got)
			both = both && got
			if got != want {
				list = append(list, mismatch{string(q.Direction), conn, want, got})
			}
		}
		if want := judged.Allowed(conn); complete && both != want {
			sum.mismatches++
			list = append(list, mismatch{"both directions", conn, want, both})
		}
	}
	return list
}

// ask returns the engine's answer. The second result is false when it panics instead.
func ask(e Engine, q *Question) (bool, bool) {
	var allowed, answered bool
	func() {
		defer func() { _ = recover() }()
		allowed = e.Allowed(q)
		answered = true
	}()
	return allowed, answered
}

// excluding returns the name of the first rule that leaves the question out.
func excluding(e Engine, q *Question) string {
	for _, r := range slices.Concat(Scope(), e.Rules()) {
		if r.Applies(q) {
			return r.Name
		}
	}
	return ""
}

type mismatch struct {
	what      string
	conn      oracle.Conn
	want, got bool
}

func (m mismatch) String() string {
	return fmt.Sprintf("%s of %+v: the oracle says %v, the engine %v", m.what, m.conn, m.want, m.got)
}

// tally counts answers. Where the subject's namespace has no policy of the direction everybody says yes: that is no verdict.
type tally struct {
	verdicts, allowed, trivial, mismatches int
	excluded                               map[string]exclusion
}

// exclusion counts what a rule left out, and how much of it the engine had answered like the oracle.
type exclusion struct{ questions, agreed int }

func (s *tally) add(q *Question, want, got bool) {
	if got != want {
		s.mismatches++
	}
	if len(q.Policies()) == 0 {
		s.trivial++
		return
	}
	s.verdicts++
	if want {
		s.allowed++
	}
}

func (s *tally) exclude(rule string, agreed bool) {
	if s.excluded == nil {
		s.excluded = map[string]exclusion{}
	}
	x := s.excluded[rule]
	x.questions++
	if agreed {
		x.agreed++
	}
	s.excluded[rule] = x
}

func (s *tally) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d verdicts, %d mismatches, %.1f %% allowed; %d more without a policy in the namespace; left out:",
		s.verdicts, s.mismatches, 100*float64(s.allowed)/float64(max(s.verdicts, 1)), s.trivial)
	for _, r := range slices.Sorted(maps.Keys(s.excluded)) {
		fmt.Fprintf(&b, "\n  %8d %s (%d answered otherwise)", s.excluded[r].questions, r, s.excluded[r].questions-s.excluded[r].agreed)
	}
	return b.String()
}

// freshSeed returns the seed of the command line, or else one that no run had before.
func freshSeed(t *testing.T) uint64 {
	t.Helper()
	seed, err := strconv.ParseUint(flag.Lookup("rapid.seed").Value.String(), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if seed == 0 {
		seed = rand.Uint64N(1<<53) + 1
	}
	return seed
}

// stride keeps rounds apart: rapid's checks use the seeds s, s+1, s+3, s+6 and so on, which those of s+1 would repeat.
const stride = 1 << 32

// check runs rapid once, with a seed of ours instead of one that only failures show.
func check(t *testing.T, seed uint64, property func(*rapid.T)) {
	t.Helper()
	given := flag.Lookup("rapid.seed").Value.String()
	defer func() { _ = flag.Set("rapid.seed", given) }()
	if err := flag.Set("rapid.seed", strconv.FormatUint(seed, 10)); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, property)
}
