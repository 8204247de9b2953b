package main

import (
	"encoding/json"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
)

// TestTable holds that every mutant still applies to the code as it is, so that one that went stale is noticed before somebody
// runs them all.
func TestTable(t *testing.T) {
	t.Parallel()
	root, err := repository(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, m := range mutants {
		if seen[m.name] {
			t.Errorf("two mutants are called %s", m.name)
		}
		seen[m.name] = true
		overlay, err := m.overlay(root, t.TempDir())
		if err != nil {
			t.Errorf("%s: %v", m.name, err)
			continue
		}
		data, err := os.ReadFile(overlay)
		if err != nil {
			t.Fatal(err)
		}
		var o struct{ Replace map[string]string }
		if err := json.Unmarshal(data, &o); err != nil || len(o.Replace) != 1 {
			t.Errorf("%s: the overlay replaces %v (%v)", m.name, o.Replace, err)
		}
		for path, changed := range o.Replace {
			if _, err := parser.ParseFile(token.NewFileSet(), changed, nil, 0); err != nil {
				t.Errorf("%s: %s: %v", m.name, path, err)
			}
		}
	}
}

// TestStale holds that a mutant whose text is not there, or is there twice, is an error and not a variant that changes nothing.
func TestStale(t *testing.T) {
	t.Parallel()
	root, err := repository(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for old, times := range map[string]string{"no such text": "0 times", "return": " times"} {
		m := mutant{name: "stale", file: compileGo, edits: []edit{{old, ""}}}
		if _, err := m.overlay(root, t.TempDir()); err == nil || !strings.Contains(err.Error(), times+", not once: bring the mutant up to date") {
			t.Errorf("%q: %v", old, err)
		}
	}
}
