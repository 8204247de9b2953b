package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
)

// Definition is where an object of a directory of manifests is defined.
type Definition struct {
	Object Object
	File   string
	Line   int

	parser parser // of its document
	at     path
}

// LineOf returns the line of a part of the object, or of what encloses it if there is no such part. Steps are keys and indexes:
// "spec", "ingress", 0.
func (d *Definition) LineOf(steps ...any) int {
	return d.parser.line(append(slices.Clip(d.at), steps...))
}

// Directory is what a directory of manifests says.
type Directory struct {
	Model       *Model
	Definitions []Definition // of what is in the model, by file and line
	Problems    []Problem    // sorted by file and line
	Foreign     int          // objects of other API groups, which are not podwall's business and no problems
}

// ReadDirectory reads a directory once, as a Manifests that starts on it does.
func ReadDirectory(ctx context.Context, dir string) (*Directory, error) {
	m := NewManifests(dir, slog.New(slog.DiscardHandler))
	if err := m.Check(); err != nil {
		return nil, err
	}
	d := &Directory{Model: NewModel()}
	m.load(ctx, d)
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", dir, err)
	}
	for _, p := range m.Problems() {
		if p.Warning && isForeign(p.Reason) {
			d.Foreign++
			continue
		}
		d.Problems = append(d.Problems, p)
	}
	seen := map[Key]bool{}
	for _, file := range m.walk().files {
		data, err := os.ReadFile(file) //nolint:gosec // of the directory that the caller named
		if err != nil {
			continue // a problem already, or gone since
		}
		d.locate(file, data, seen)
	}
	return d, nil
}

// isForeign tells the problem of a kind that podwall has nothing to do with from that of a misspelt one of NetworkPolicy's group.
func isForeign(reason string) bool {
	kind, rest, found := strings.Cut(reason, " of ")
	kind, ok := strings.CutPrefix(kind, "kind ")
	policies := strings.HasPrefix(rest, "networking.k8s.io/") && kind != "Ingress" && kind != "IngressClass"
	return ok && found && !policies
}

// Apply implements Sink.
func (d *Directory) Apply(changes ...Change) {
	for _, c := range changes {
		d.Model.Apply(c)
	}
}

// Synced implements Sink.
func (d *Directory) Synced() {}

var _ Sink = (*Directory)(nil)

// locate finds the definitions of a file, without those that another one of the same object has come before.
func (d *Directory) locate(file string, data []byte, seen map[Key]bool) {
	p := parser{file: file, lines: map[Key]int{}}
	for line, text := range documents(data) {
		known := len(p.definitions)
		p.document(line, text)
		for _, found := range p.definitions[known:] {
			key := found.object.Key()
			if seen[key] {
				continue
			}
			seen[key] = true
			d.Definitions = append(d.Definitions, Definition{Object: found.object, File: file, Line: found.line, parser: p, at: p.pathOf(found.line)})
		}
	}
}

// pathOf finds the item of a List, or of Lists in it, that begins on a line; the path of the document itself is empty.
func (p *parser) pathOf(line int) path {
	var at path
	for len(at) <= maxListDepth {
		next := -1
		for i := 0; ; i++ {
			item := at.with("items").with(i)
			if !p.has(item) || p.line(item) > line {
				break
			}
			next = i
		}
		if next < 0 {
			break
		}
		at = at.with("items").with(next)
	}
	return at
}

func (p *parser) has(at path) bool {
	node := p.root
	for _, step := range at {
		if node == nil {
			return false
		}
		_, node = child(node, step)
	}
	return node != nil
}
