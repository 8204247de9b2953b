package cluster

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
	"k8s.io/apimachinery/pkg/util/validation"
)

var update = flag.Bool("update", false, "rewrite the golden sections of testdata")

// dump writes objects and problems one to a line.
func dump(objects []Object, problems []Problem) string {
	var b strings.Builder
	for _, o := range objects {
		fmt.Fprintf(&b, "%s:", o.Key())
		switch o := o.(type) {
		case *Namespace:
			fmt.Fprintf(&b, " labels=%v", o.Labels)
		case *Pod:
			fmt.Fprintf(&b, " labels=%v ips=%v ports=%v", o.Labels, o.IPs, o.Ports)
			if o.Terminal {
				b.WriteString(" terminal")
			}
			if o.HostNetwork {
				b.WriteString(" hostNetwork")
			}
		case *Policy:
			spec, _ := json.Marshal(o.Spec)
			fmt.Fprintf(&b, " %s", spec)
			if o.Unreadable != "" {
				fmt.Fprintf(&b, "\n  unreadable: %s", o.Unreadable)
			}
		}
		b.WriteByte('\n')
	}
	for _, p := range problems {
		severity := "error"
		if p.Warning {
			severity = "warning"
		}
		fmt.Fprintf(&b, "%s %s\n", severity, p)
	}
	return b.String()
}

// TestParseFile reads the first file of each archive and compares with its file "want".
func TestParseFile(t *testing.T) {
	t.Parallel()
	archives, err := filepath.Glob("testdata/parse/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("no archives: %v", err)
	}
	for _, name := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			t.Parallel()
			archive, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			got := dump(ParseFile(archive.Files[0].Name, archive.Files[0].Data))
			if *update {
				archive.Files = append(archive.Files[:1], txtar.File{Name: "want", Data: []byte(got)})
				if err := os.WriteFile(name, txtar.Format(archive), 0o600); err != nil {
					t.Fatal(err)
				}
				return
			}
			if len(archive.Files) != 2 {
				t.Fatalf("%d files, want 2", len(archive.Files))
			}
			if diff := cmp.Diff(string(archive.Files[1].Data), got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestProblemString(t *testing.T) {
	t.Parallel()
	if got := (Problem{File: "a.yaml", Line: 3, Reason: "bad"}).String(); got != "a.yaml:3: bad" {
		t.Error(got)
	}
	if got := (Problem{File: "a.yaml", Reason: "gone"}).String(); got != "a.yaml: gone" {
		t.Error(got)
	}
}

func FuzzParseFile(f *testing.F) {
	archives, err := filepath.Glob("testdata/parse/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range archives {
		archive, err := txtar.ParseFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(archive.Files[0].Data)
	}
	for _, seed := range []string{
		"", "---", "--- ", "\ufeff---\n", "a: &a [*a]", "a: &a {k: *a}", "{\"kind\":\"List\",\"apiVersion\":\"v1\",\"items\":[null,1,{}]}",
		"kind: NetworkPolicy\nmetadata: {name: a}\nspec: &s {podSelector: *s}", "kind: NetworkPolicy\nmetadata: {name: a, <<: [1]}\n", "? {a: b}\n: c", "\"\\ud83d\"",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		objects, problems := ParseFile("f.yaml", data)
		lines := strings.Count(string(data), "\n") + 1
		for _, p := range problems {
			if p.File != "f.yaml" || p.Line < 1 || p.Line > lines+1 || p.Reason == "" {
				t.Errorf("problem %+v in %d lines", p, lines)
			}
		}
		seen := map[Key]bool{}
		for _, o := range objects {
			key := o.Key()
			if seen[key] || len(validation.IsDNS1123Subdomain(key.Name)) > 0 {
				t.Errorf("object %s is repeated or misnamed", key)
			}
			seen[key] = true
			if p, ok := o.(*Policy); ok && p.Unreadable != "" && (len(p.Spec.Ingress) > 0 || len(p.Spec.Egress) > 0 || len(p.Spec.PolicyTypes) == 0) {
				t.Errorf("an unreadable policy allows: %+v", p)
			}
		}
		if again, _ := ParseFile("f.yaml", data); !reflect.DeepEqual(objects, again) {
			t.Error("parsed twice, two results")
		}
	})
}
