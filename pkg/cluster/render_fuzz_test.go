package cluster_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/ruleset"
)

// FuzzRender takes what anybody may write into a manifest all the way to a ruleset: nothing of it panics, the result does not depend on
// chance, and a pod that is not known stays closed whatever the policies are.
func FuzzRender(f *testing.F) {
	for _, pattern := range []string{"testdata/parse/*.txtar", "../policy/testdata/*.txtar"} {
		archives, err := filepath.Glob(pattern)
		if err != nil || len(archives) == 0 {
			f.Fatalf("no seeds in %s: %v", pattern, err)
		}
		for _, name := range archives {
			archive, err := txtar.ParseFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(archive.Files[0].Data)
		}
	}
	examples, err := filepath.Glob("../../examples/*/*/*.yaml")
	if err != nil || len(examples) == 0 {
		f.Fatalf("no examples: %v", err)
	}
	for _, name := range examples {
		text, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		objects, _ := cluster.ParseFile("f.yaml", data)
		model := cluster.NewModel()
		for _, o := range objects {
			model.Apply(cluster.Change{Key: o.Key(), Object: o})
		}
		unknown := netip.MustParseAddr("10.99.0.1")
		in := policy.Input{
			Model: model, Options: policy.Options{Table: "podwall", Cut: true},
			Endpoints: []policy.Endpoint{{ID: "unknown", Name: "a/unknown", IPs: []netip.Addr{unknown}, Link: "veth0"}},
		}
		for _, o := range objects {
			if pod, ok := o.(*cluster.Pod); ok {
				ip := unknown
				for range len(in.Endpoints) {
					ip = ip.Next()
				}
				in.Endpoints = append(in.Endpoints, policy.Endpoint{ID: pod.Key().String(), Name: pod.Namespace + "/" + pod.Name, Pod: pod, IPs: []netip.Addr{ip}, Link: "veth1", Bridge: "cni0"})
			}
		}
		out := policy.Render(in)
		if _, open := out.Endpoints["unknown"]; open {
			t.Error("a pod that is not known has verdicts: it is not closed")
		}
		if len(in.Endpoints) != len(out.Endpoints)+1 {
			t.Errorf("%d endpoints became %d with verdicts", len(in.Endpoints), len(out.Endpoints))
		}
		text := out.Ruleset.String()
		if again := policy.Render(in).Ruleset.String(); again != text {
			t.Errorf("rendered twice, two rulesets:\n%s\n%s", text, again)
		}
		if d := ruleset.Diff(out.Ruleset, out.Ruleset); !d.Empty() {
			t.Error("a ruleset differs from itself")
		}
		if d := ruleset.Diff(nil, out.Ruleset); d.Empty() {
			t.Error("nothing would be loaded")
		}
	})
}
