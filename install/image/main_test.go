package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestArchive follows an archive as a runtime does: from the index to the manifest to the layer, checking every digest.
func TestArchive(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("#!"), 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	build := func(name string) []byte {
		t.Helper()
		out := filepath.Join(dir, name)
		err := run([]string{"-o", out, "-name", "registry:5000/podwall:1.2", "-arch", "arm64", "-user", "1:2", "-entrypoint", "/bin/program", "-cmd", "run", "/bin/program=" + program})
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	archive := build("a.tar")
	if !bytes.Equal(archive, build("b.tar")) {
		t.Error("the same input makes different archives")
	}
	files := untar(t, archive)
	blob := func(d map[string]any) []byte {
		t.Helper()
		name := d["digest"].(string)
		data := files["blobs/"+strings.Replace(name, ":", "/", 1)].data
		if digest(data) != name || float64(len(data)) != d["size"].(float64) {
			t.Fatalf("blob %s: has digest %s and %d bytes, want %v", name, digest(data), len(data), d["size"])
		}
		return data
	}
	top := decode(t, files["index.json"].data)["manifests"].([]any)[0].(map[string]any)
	annotations := top["annotations"].(map[string]any)
	if got := annotations["io.containerd.image.name"]; got != "registry:5000/podwall:1.2" {
		t.Errorf("containerd names the image %v", got)
	}
	if got := annotations["org.opencontainers.image.ref.name"]; got != "1.2" {
		t.Errorf("the tag is %v", got)
	}
	manifest := decode(t, blob(top))
	config := decode(t, blob(manifest["config"].(map[string]any)))
	packed, err := gzip.NewReader(bytes.NewReader(blob(manifest["layers"].([]any)[0].(map[string]any))))
	if err != nil {
		t.Fatal(err)
	}
	layer, err := io.ReadAll(packed)
	if err != nil {
		t.Fatal(err)
	}
	if got := config["rootfs"].(map[string]any)["diff_ids"].([]any)[0]; got != digest(layer) {
		t.Errorf("the layer's digest is %v, want %s", got, digest(layer))
	}
	if got := fmt.Sprint(config["architecture"], config["config"]); got != "arm64map[Cmd:[run] Entrypoint:[/bin/program] User:1:2]" {
		t.Errorf("configuration %s", got)
	}
	root := untar(t, layer)
	if f := root["bin/program"]; string(f.data) != "#!" || f.mode != 0o755 {
		t.Errorf("the program is %q, mode %o", f.data, f.mode)
	}
	for _, dir := range []string{"bin/", "proc/", "sys/", "tmp/"} {
		if _, ok := root[dir]; !ok {
			t.Errorf("directory %s is missing", dir)
		}
	}
}

func TestCutTag(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, repository, tag string
		ok                    bool
	}{
		{"ghcr.io/podwall/podwall:dev", "ghcr.io/podwall/podwall", "dev", true},
		{"registry:5000/podwall:1", "registry:5000/podwall", "1", true},
		{"registry:5000/podwall", "", "", false},
		{"podwall", "", "", false},
		{"podwall:", "", "", false},
		{":1", "", "", false},
	} {
		if r, tag, ok := cutTag(test.name); r != test.repository || tag != test.tag || ok != test.ok {
			t.Errorf("%q: got %q, %q, %v", test.name, r, tag, ok)
		}
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{},
		{"-o", "x.tar", "-name", "a:1"},
		{"-o", "x.tar", "-name", "a", "/a=b"},
		{"-o", "x.tar", "-name", "a:1", "relative=b"},
		{"-o", "x.tar", "-name", "a:1", "-label", "novalue", "/a=b"},
		{"-o", "x.tar", "-name", "a:1", "/a=/does/not/exist"},
	} {
		if err := run(args); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
}

func untar(t *testing.T, data []byte) map[string]file {
	t.Helper()
	files := map[string]file{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = file{h.Name, content, h.Mode}
	}
}

func decode(t *testing.T, data []byte) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}
