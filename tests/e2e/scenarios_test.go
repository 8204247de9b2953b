package e2e

import (
	"strings"
	"testing"

	"github.com/podwall/podwall/internal/testnet"
)

func scenarios(t *testing.T) []*testnet.Scenario {
	t.Helper()
	all, err := testnet.LoadScenarios("../../examples")
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// deploy runs a scenario on a node and returns what was observed.
func deploy(t *testing.T, s *testnet.Scenario, n *testnet.Node, policies bool) [][]testnet.Result {
	t.Helper()
	if err := s.WriteManifests(n, policies); err != nil {
		t.Fatal(err)
	}
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Deploy(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	results, err := n.ObserveAll(t.Context(), s.Matrix)
	if err != nil {
		t.Fatal(err)
	}
	return results
}

func TestScenarios(t *testing.T) {
	t.Parallel()
	for _, s := range scenarios(t) {
		for _, cni := range mainCNIs {
			for _, families := range [][]testnet.Family{dual, {testnet.IPv4}, {testnet.IPv6}} {
				t.Run(s.Name+"/"+cni+"/"+names(families), func(t *testing.T) {
					t.Parallel()
					results := deploy(t, s, lay(t, setup{cni: cni, families: families}), true)
					for _, r := range testnet.Mismatches(results) {
						t.Error(r)
					}
				})
			}
		}
	}
}

// Without policies, and with podwall, everything is open, and every scenario differs from its matrix: one that does not would pass
// without podwall.
func TestScenariosWithoutPolicies(t *testing.T) {
	t.Parallel()
	for _, s := range scenarios(t) {
		for _, cni := range mainCNIs {
			t.Run(s.Name+"/"+cni, func(t *testing.T) {
				t.Parallel()
				results := deploy(t, s, lay(t, setup{cni: cni}), false)
				for i, family := range results {
					differ := 0
					for _, r := range family {
						if r.Got != testnet.Allowed {
							t.Errorf("not open: %s", r)
						}
						if !r.OK() {
							differ++
						}
					}
					if differ == 0 {
						t.Errorf("%s: no cell differs from the matrix", dual[i])
					}
				}
			})
		}
	}
}

func names(families []testnet.Family) string {
	var list []string
	for _, f := range families {
		list = append(list, f.String())
	}
	return strings.Join(list, "+")
}
