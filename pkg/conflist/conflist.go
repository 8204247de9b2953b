// Package conflist puts podwall's entry into the CNI configuration that a node's container runtime uses, keeps it there, and takes it out.
package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"

	"github.com/containernetworking/cni/pkg/version"
)

// Type is the type of podwall's entry, which is also the file name of its plugin.
const Type = "podwall"

// State is what a conflist says about podwall.
type State string

// The states of a conflist. Outdated is an entry with other keys than it should have, more than one entry, or an entry before
// the main plugin, where every ADD would fail for want of a previous result.
const (
	Missing   State = "missing"
	Outdated  State = "outdated"
	Installed State = "installed"
)

// Insert puts the entry behind the last plugin of a conflist, or in the place of the entry that is there: two installers that
// both insist on being last would otherwise move each other forever. Every other byte stays as it is, since the file belongs to
// the main plugin. A list that is as it should be is returned unchanged.
func Insert(list, entry []byte) ([]byte, error) {
	doc, err := parse(list)
	if err != nil {
		return nil, err
	}
	state, err := doc.state(entry)
	if err != nil {
		return nil, err
	}
	if state == Installed {
		return list, nil
	}
	ours := doc.ours()
	if len(ours) == 0 || ours[0] == 0 {
		if list, err = Remove(list); err != nil {
			return nil, err
		}
		if doc, err = parse(list); err != nil {
			return nil, err
		}
		last := doc.plugins[len(doc.plugins)-1]
		space := spaceBefore(list, last.start)
		return slices.Concat(list[:last.end], []byte(","), space, layout(entry, space, list[last.start:last.end]), list[last.end:]), nil
	}
	list = doc.without(list, ours[1:])
	at := doc.plugins[ours[0]]
	return slices.Concat(list[:at.start], layout(entry, spaceBefore(list, at.start), list[at.start:at.end]), list[at.end:]), nil
}

// Remove takes podwall's entries out of a conflist and changes nothing else: Remove(Insert(x)) is x.
func Remove(list []byte) ([]byte, error) {
	doc, err := parse(list)
	if err != nil {
		return nil, err
	}
	return doc.without(list, doc.ours()), nil
}

// StateOf tells whether a conflist has the entry.
func StateOf(list, entry []byte) (State, error) {
	doc, err := parse(list)
	if err != nil {
		return "", err
	}
	return doc.state(entry)
}

// FromConf makes a conflist of a configuration of a single plugin, as the runtime does in memory: with its name and version,
// since another name would orphan the attachments in the runtime's cache. Chaining exists from version 0.3.0 on.
func FromConf(conf []byte) ([]byte, error) {
	conf = bytes.TrimSpace(conf)
	var c struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
	}
	if err := json.Unmarshal(conf, &c); err != nil {
		return nil, fmt.Errorf("parse plugin configuration: %w", err)
	}
	if _, err := pluginType(conf); err != nil {
		return nil, fmt.Errorf("parse plugin configuration: %w", err)
	}
	if c.Name == "" {
		return nil, errors.New(`parse plugin configuration: it has no "name"`)
	}
	if c.CNIVersion == "" {
		c.CNIVersion = "0.1.0" // what libcni takes it for
	}
	chains, err := version.GreaterThanOrEqualTo(c.CNIVersion, "0.3.0")
	if err != nil {
		return nil, fmt.Errorf("parse plugin configuration: cniVersion: %w", err)
	}
	if !chains {
		c.CNIVersion = "0.3.1"
	}
	head, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("make a conflist: %w", err)
	}
	// A JSON string holds no line feed, so the plugin's lines can be indented as text, which keeps the rest of it.
	plugin := bytes.ReplaceAll(conf, []byte("\n"), []byte("\n    "))
	return slices.Concat(bytes.TrimSuffix(head, []byte("\n}")), []byte(",\n  \"plugins\": [\n    "), plugin, []byte("\n  ]\n}\n")), nil
}

// plugin is an element of a conflist's plugins, as a part of the text.
type plugin struct {
	start, end int
	typ        string
	fields     any
}

// document is a parsed conflist. At least one of its plugins is not podwall.
type document struct{ plugins []plugin }

// parse finds the plugins at the top level.
func parse(list []byte) (document, error) {
	var doc document
	if err := doc.read(list); err != nil {
		return document{}, fmt.Errorf("parse conflist: %w", err)
	}
	if len(doc.ours()) == len(doc.plugins) {
		return document{}, errors.New("parse conflist: it lists no plugin that podwall could be chained to")
	}
	return doc, nil
}

func (doc *document) read(list []byte) error {
	dec := json.NewDecoder(bytes.NewReader(list))
	if err := expect(dec, json.Delim('{')); err != nil {
		return err
	}
	found := false
	var skipped json.RawMessage
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return err
		}
		if key != "plugins" {
			if err := dec.Decode(&skipped); err != nil {
				return unexpectedEOF(err)
			}
			continue
		}
		if found {
			return errors.New(`it has "plugins" twice`)
		}
		found = true
		if err := expect(dec, json.Delim('[')); err != nil {
			return fmt.Errorf("plugins: %w", err)
		}
		for dec.More() {
			var raw json.RawMessage
			if err := dec.Decode(&raw); err != nil {
				return fmt.Errorf("plugin %d: %w", len(doc.plugins), unexpectedEOF(err))
			}
			typ, err := pluginType(raw)
			if err != nil {
				return fmt.Errorf("plugin %d: %w", len(doc.plugins), err)
			}
			fields, err := fieldsOf(raw)
			if err != nil {
				return fmt.Errorf("plugin %d: %w", len(doc.plugins), err)
			}
			end := int(dec.InputOffset())
			doc.plugins = append(doc.plugins, plugin{end - len(raw), end, typ, fields})
		}
		if err := expect(dec, json.Delim(']')); err != nil {
			return err
		}
	}
	if err := expect(dec, json.Delim('}')); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows its closing brace")
	}
	if !found {
		return errors.New(`it has no "plugins"`)
	}
	return nil
}

// expect reads one token.
func expect(dec *json.Decoder, want json.Delim) error {
	got, err := dec.Token()
	if err != nil {
		return unexpectedEOF(err)
	}
	if got != want {
		return fmt.Errorf("found %v where %v was expected", got, want)
	}
	return nil
}

func unexpectedEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// pluginType reads the type as libcni does: the case of the key does not matter.
func pluginType(text []byte) (string, error) {
	var p struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return "", err
	}
	if p.Type == "" {
		return "", errors.New(`it has no "type"`)
	}
	return p.Type, nil
}

// fieldsOf decodes for comparison; numbers stay text.
func fieldsOf(text []byte) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	var fields any
	err := dec.Decode(&fields)
	return fields, err
}

// ours returns the indexes of podwall's entries.
func (doc document) ours() []int {
	var ours []int
	for i, p := range doc.plugins {
		if p.typ == Type {
			ours = append(ours, i)
		}
	}
	return ours
}

func (doc document) state(entry []byte) (State, error) {
	typ, err := pluginType(entry)
	if err != nil {
		return "", fmt.Errorf("parse podwall's entry %s: %w", entry, err)
	}
	if typ != Type {
		return "", fmt.Errorf("parse podwall's entry %s: its type is not %s", entry, Type)
	}
	want, err := fieldsOf(entry)
	if err != nil {
		return "", fmt.Errorf("parse podwall's entry %s: %w", entry, err)
	}
	ours := doc.ours()
	switch {
	case len(ours) == 0:
		return Missing, nil
	case len(ours) > 1, ours[0] == 0, !reflect.DeepEqual(doc.plugins[ours[0]].fields, want):
		return Outdated, nil
	}
	return Installed, nil
}

// without cuts plugins, not all, out of the list. Each takes with it the comma and the space that came with it: those before it,
// or those behind it at the head of the list.
func (doc document) without(list []byte, drop []int) []byte {
	list = slices.Clone(list)
	for n, i := range slices.Backward(drop) {
		if n == i { // all plugins before it go too
			list = slices.Delete(list, doc.plugins[i].start, doc.plugins[i+1].start)
		} else {
			list = slices.Delete(list, doc.plugins[i-1].end, doc.plugins[i].end)
		}
	}
	return list
}

func spaceBefore(list []byte, at int) []byte {
	return list[len(bytes.TrimRight(list[:at], " \t\r\n")):at]
}

// layout formats the entry like another plugin that has that space before it.
func layout(entry, space, like []byte) []byte {
	var out bytes.Buffer
	lines := bytes.LastIndexByte(space, '\n')
	inner := like[1:]
	inner = inner[:len(inner)-len(bytes.TrimLeft(inner, " \t\r\n"))]
	first := bytes.LastIndexByte(inner, '\n')
	if lines < 0 || first < 0 {
		_ = json.Compact(&out, entry) // state has parsed it
		return out.Bytes()
	}
	prefix := space[lines+1:]
	indent, _ := bytes.CutPrefix(inner[first+1:], prefix)
	_ = json.Indent(&out, bytes.TrimSpace(entry), string(prefix), string(indent))
	if bytes.Contains(space, []byte("\r\n")) {
		return bytes.ReplaceAll(out.Bytes(), []byte("\n"), []byte("\r\n"))
	}
	return out.Bytes()
}
