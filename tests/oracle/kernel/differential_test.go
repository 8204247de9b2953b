package kernel

import (
	"flag"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"github.com/podwall/podwall/tests/oracle/generate"
	"github.com/podwall/podwall/tests/oracle/subject"
)

var verdictsFlag = flag.Int("kernel-verdicts", 200_000, "how many verdicts of the kernel to compare with the oracle's")

// changes is how often a random cluster is changed. Each state is loaded as the difference to the one before.
const changes = 10

// Every connection of random clusters fares in the kernel as the oracle says, whatever was loaded before.
func TestKernelAgreesWithOracle(t *testing.T) {
	n := newNode(t)
	r := newReport(seed())
	defer func() { r.log(t, n, "differential") }()
	for i := uint64(0); r.all.verdicts < *verdictsFlag; i++ {
		check(t, r.seed+i, func(rt *rapid.T) {
			c := generate.Cluster(rt)
			said := "first state"
			for step := 0; ; step++ {
				r.clusters++
				n.load(rt, subject.Render(c).Ruleset)
				if mismatch := n.compare(rt, c, generate.Conns(c), r); mismatch != "" {
					rt.Fatalf("after %s: %s", said, mismatch)
				}
				if step == changes {
					return
				}
				c, said = generate.Change(rt, c)
			}
		})
	}
}

// check runs a property once with a seed of its own, and shrinks what fails.
func check(t *testing.T, seed uint64, property func(*rapid.T)) {
	t.Helper()
	for name, value := range map[string]string{"rapid.checks": "1", "rapid.seed": strconv.FormatUint(seed, 10), "rapid.nofailfile": "true"} {
		if err := flag.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	rapid.Check(t, property)
}
