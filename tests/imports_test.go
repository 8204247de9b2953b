// Package tests checks the repository as a whole: who imports whom. The packages below it run podwall end to end.
package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/podwall/podwall/"

// mayImport lists, for every package of the product, the packages of this module that it may import. Data flows one way; an
// edge that is not here is a design decision, to be made in a review and not by an editor's auto-import.
var mayImport = map[string][]string{
	"plugin":  {"pkg/agentapi", "pkg/cniplugin", "pkg/hostlink"},
	"install": {"cni-conf", "pkg/cli", "pkg/conflist", "pkg/nft", "pkg/ruleset"},
	"daemon": {
		"cni-conf", "pkg/agentapi", "pkg/attach", "pkg/cli", "pkg/cluster", "pkg/conflist", "pkg/conntrack", "pkg/metrics", "pkg/nft",
		"pkg/explain", "pkg/policy", "pkg/reconcile", "pkg/registry", "pkg/ruleset", "pkg/verdictlog",
	},
	"install/image":      {},
	"install/kubernetes": {},
	"cni-conf":           {},
	"pkg/attach":         {},
	"pkg/cli":            {},
	"pkg/ruleset":        {},
	"pkg/agentapi":       {"pkg/attach"},
	"pkg/hostlink":       {"pkg/attach"},
	"pkg/registry":       {"pkg/attach"},
	"pkg/cniplugin":      {"pkg/agentapi", "pkg/attach", "pkg/hostlink"},
	"pkg/cluster":        {},
	"pkg/policy":         {"pkg/cluster", "pkg/ruleset"},
	"pkg/nft":            {"pkg/ruleset"},
	"pkg/conntrack":      {},
	"pkg/conflist":       {},
	"pkg/verdictlog":     {},
	"pkg/metrics":        {},
	"pkg/explain":        {"pkg/cluster", "pkg/policy", "pkg/ruleset"},
	"pkg/reconcile":      {"pkg/attach", "pkg/cluster", "pkg/conntrack", "pkg/metrics", "pkg/nft", "pkg/policy", "pkg/registry", "pkg/ruleset"},
}

// onlyFrom lists modules that one package wraps.
var onlyFrom = map[string][]string{
	"github.com/google/nftables":          {"pkg/nft"},
	"github.com/prometheus/client_golang": {"pkg/metrics", "daemon"},
	"k8s.io/client-go":                    {"pkg/cluster", "daemon"},
}

// mustNotLink lists what a program or package must not contain, however indirectly. An empty string is everything outside
// the standard library.
var mustNotLink = map[string][]string{
	"plugin": {
		"k8s.io/client-go", "k8s.io/api", "k8s.io/apimachinery", "github.com/google/nftables", "github.com/prometheus",
		"google.golang.org/grpc", "google.golang.org/protobuf",
	},
	"install":     {"k8s.io/client-go", "github.com/prometheus"},
	"pkg/attach":  {""},
	"pkg/ruleset": {""},
	"pkg/policy":  {"github.com/google/nftables", "github.com/vishvananda/netlink", "github.com/prometheus"},
}

// nowhere lists what the module does without.
var nowhere = []string{
	"github.com/stretchr/testify", "github.com/golang/mock", "go.uber.org/mock", "go.uber.org/zap", "google.golang.org/grpc",
	"sigs.k8s.io/controller-runtime", "k8s.io/component-base",
}

// listed is what `go list -json` says of a package.
type listed struct {
	ImportPath   string
	Standard     bool
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

func (p listed) name() string { return strings.TrimPrefix(p.ImportPath, module) }

func goList(t *testing.T, args ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Standard,Imports,TestImports,XTestImports,Deps"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, &stderr)
	}
	var packages []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		switch err := d.Decode(&p); {
		case errors.Is(err, io.EOF):
			return packages
		case err != nil:
			t.Fatalf("read go list: %v", err)
		}
		packages = append(packages, p)
	}
}

// within reports whether a package belongs to a module or directory of packages.
func within(pkg, root string) bool { return pkg == root || strings.HasPrefix(pkg, root+"/") }

func TestImports(t *testing.T) {
	t.Parallel()
	packages := goList(t, module+"...")
	if len(packages) < 5 {
		t.Fatalf("go list found %d packages", len(packages))
	}
	for _, p := range packages {
		name := p.name()
		forTests := within(name, "internal") || within(name, "tests") || within(name, "hack")
		allowed, known := mayImport[name]
		if !known && !forTests {
			t.Errorf("%s is not in mayImport: decide what it may import", name)
		}
		for _, i := range p.Imports {
			own, isOwn := strings.CutPrefix(i, module)
			if isOwn && known && !slices.Contains(allowed, own) {
				t.Errorf("%s imports %s", name, own)
			}
			if isOwn && !forTests && (within(own, "internal") || within(own, "tests")) {
				t.Errorf("%s imports %s, which is for tests", name, own)
			}
			for wrapped, by := range onlyFrom {
				if within(i, wrapped) && !forTests && !slices.Contains(by, name) {
					t.Errorf("%s imports %s: only %s may", name, i, strings.Join(by, " and "))
				}
			}
		}
		for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			for _, n := range nowhere {
				if within(i, n) {
					t.Errorf("%s imports %s: nothing here does", name, i)
				}
			}
		}
	}
}

func TestLinked(t *testing.T) {
	t.Parallel()
	standard := map[string]bool{}
	for _, p := range goList(t, "std") {
		standard[p.ImportPath] = true
	}
	byName := map[string]listed{}
	for _, p := range goList(t, module+"...") {
		byName[p.name()] = p
	}
	for name, forbidden := range mustNotLink {
		if _, ok := mayImport[name]; !ok {
			t.Errorf("%s is in mustNotLink and not in mayImport", name)
		}
		for _, dep := range byName[name].Deps {
			for _, f := range forbidden {
				if f == "" && !standard[dep] || f != "" && within(dep, f) {
					t.Errorf("%s links %s", name, dep)
				}
			}
		}
	}
}
