package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/podwall/podwall/pkg/cli"
)

var update = flag.Bool("update", false, "rewrite the golden parts of testdata/ask/*.txtar")

// TestAskManifests runs testdata/ask/*.txtar. Files are manifests; a part named "CODE COMMAND..." is what that command prints, with
// the directory of the manifests in place of DIR, and its exit code.
func TestAskManifests(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/ask/*.txtar")
	if err != nil || len(files) < 3 {
		t.Fatalf("testdata/ask: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			for _, f := range archive.Files {
				if strings.Contains(f.Name, " ") {
					continue
				}
				if err := os.WriteFile(filepath.Join(dir, f.Name), f.Data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			commands, changed := 0, false
			for i, f := range archive.Files {
				_, command, ok := strings.Cut(f.Name, " ")
				if !ok {
					continue
				}
				commands++
				var out bytes.Buffer
				code := run(t.Context(), strings.Fields(strings.ReplaceAll(command, "DIR", dir)), &out, &out)
				name, text := fmt.Sprint(code, " ", command), strings.ReplaceAll(out.String(), dir, "DIR")
				if name == f.Name && text == string(f.Data) {
					continue
				}
				if *update {
					archive.Files[i].Name, archive.Files[i].Data, changed = name, []byte(text), true
					continue
				}
				t.Errorf("%s: exit code %d; -want +got (-update accepts):\n%s", f.Name, code, gocmp.Diff(string(f.Data), text))
			}
			if commands == 0 {
				t.Error("no command")
			}
			if changed {
				if err := os.WriteFile(file, txtar.Format(archive), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func TestAskUsage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	for _, tt := range []struct {
		args []string
		code int
		text string
	}{
		{[]string{"explain", "--help"}, cli.OK, "podwalld explain shop/web shop/db 5432"},
		{[]string{"matrix", "--help"}, cli.OK, "podwalld matrix 8080"},
		{[]string{"lint", "--help"}, cli.OK, "podwalld lint ./policies"},
		{[]string{"explain", "a/b", "c/d"}, cli.Usage, "found 2 arguments"},
		{[]string{"explain", "a", "c/d", "80"}, cli.Usage, `"a" is neither namespace/pod`},
		{[]string{"explain", "a/b", "fe80::1%eth0", "80"}, cli.Usage, `"fe80::1%eth0" is neither`},
		{[]string{"explain", "a/b", "c/d", "http"}, cli.Usage, `port "http"`},
		{[]string{"explain", "a/b", "c/d", "80/icmp"}, cli.Usage, `port "80/icmp"`},
		{[]string{"explain", "a/b", "c/d", "80", "-o", "dot"}, cli.Usage, "-o"},
		{[]string{"explain", "a/b", "c/d", "80", "--socket", missing}, cli.Failed, missing},
		{[]string{"explain", "a/b", "c/d", "80", "--manifests", missing}, cli.Failed, "no such directory"},
		{[]string{"explain", "a/b", "c/d", "80", "--manifests", dir}, cli.Failed, "pod a/b is not known"},
		{[]string{"matrix", "80", "81"}, cli.Usage, "found 2 arguments"},
		{[]string{"matrix", "-o", "xml"}, cli.Usage, "mermaid"},
		{[]string{"matrix", "--namespace", "a", "--manifests", dir}, cli.Failed, "no pod is known in namespace a"},
		{[]string{"matrix", "--manifests", dir}, cli.OK, "no pods"},
		{[]string{"matrix", "--nope"}, cli.Usage, "see podwalld matrix --help"},
		{[]string{"lint"}, cli.Usage, "want one DIR"},
		{[]string{"lint", missing}, cli.Failed, "no such directory"},
		{[]string{"lint", dir}, cli.OK, "no findings"},
		{[]string{"lint", "--manifests", dir}, cli.OK, "no findings"},
		{[]string{"lint", dir, "--manifests", missing}, cli.Usage, "want one DIR"},
	} {
		var out bytes.Buffer
		if code := run(t.Context(), tt.args, &out, &out); code != tt.code || !strings.Contains(out.String(), tt.text) {
			t.Errorf("%v: exit code %d, want %d and %q:\n%s", tt.args, code, tt.code, tt.text, &out)
		}
	}
}

// TestMatrixBound holds that a matrix that nobody can read is refused with a way out.
func TestMatrixBound(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var text strings.Builder
	for i := range 101 {
		fmt.Fprintf(&text, "---\n{apiVersion: v1, kind: Pod, metadata: {name: p%d, namespace: n%d}}\n", i, i%2)
	}
	if err := os.WriteFile(filepath.Join(dir, "pods.yaml"), []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if code := run(t.Context(), []string{"matrix", "--manifests", dir}, &out, &out); code != cli.Failed || !strings.Contains(out.String(), "10201 pairs, more than 10000: name one or a few namespaces with --namespace") {
		t.Errorf("exit code %d:\n%s", code, &out)
	}
	out.Reset()
	if code := run(t.Context(), []string{"matrix", "--manifests", dir, "--namespace", "n1"}, &out, &out); code != cli.OK || strings.Count(out.String(), "\n") != 51 {
		t.Errorf("exit code %d:\n%s", code, &out)
	}
}

func TestSplit(t *testing.T) {
	t.Parallel()
	define := func(fs *flag.FlagSet) {
		fs.String("o", "", "")
		fs.Bool("v", false, "")
	}
	for _, tt := range []struct{ args, flags, rest string }{
		{"a b c", "", "a b c"},
		{"-o json a b", "-o json", "a b"},
		{"a -o json b -v c", "-o json -v", "a b c"},
		{"a -o=json -- -v b", "-o=json", "a -v b"},
		{"a --nope b", "--nope b", "a"},
		{"", "", ""},
	} {
		flags, rest := split(strings.Fields(tt.args), define)
		if !slices.Equal(flags, strings.Fields(tt.flags)) || !slices.Equal(rest, strings.Fields(tt.rest)) {
			t.Errorf("split %q: %q, %q", tt.args, flags, rest)
		}
	}
}

// TestLintEnvironment holds that a DIR that is named goes before the environment's.
func TestLintEnvironment(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PODWALL_MANIFESTS", filepath.Join(dir, "missing"))
	for _, tt := range []struct {
		args []string
		code int
	}{{[]string{"lint", dir}, cli.OK}, {[]string{"lint", "--manifests", dir}, cli.OK}, {[]string{"lint"}, cli.Failed}} {
		var out bytes.Buffer
		if code := run(t.Context(), tt.args, &out, &out); code != tt.code {
			t.Errorf("%v: exit code %d, want %d:\n%s", tt.args, code, tt.code, &out)
		}
	}
}
