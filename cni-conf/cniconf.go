// Package cniconf holds the conflist entry of podwall, sample conflists to put it in, and the edit that does so.
package cniconf

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
)

//go:embed podwall.conf *.conflist
var files embed.FS

// Entry returns the entry that is appended to a conflist's plugins.
func Entry() []byte {
	data, err := files.ReadFile("podwall.conf")
	if err != nil {
		panic(err) // embedded
	}
	return bytes.TrimSpace(data)
}

// Sample returns a conflist without podwall, "ptp" or "bridge": dual stack and without masquerading, which would hide who talks to whom.
func Sample(name string) ([]byte, error) {
	data, err := files.ReadFile(name + ".conflist")
	if err != nil {
		return nil, fmt.Errorf("read sample conflist %q, there are bridge and ptp: %w", name, err)
	}
	return data, nil
}

// Append puts an entry at the end of a conflist's plugins, or in the place of the plugin of the same type. Every other byte stays as it is:
// the file belongs to the main plugin's installer, and keys that podwall does not know are none of its business.
func Append(conflist, entry []byte) ([]byte, error) {
	entry = bytes.TrimSpace(entry)
	typ, err := pluginType(entry)
	if err != nil {
		return nil, fmt.Errorf("read entry: %w", err)
	}
	plugins, err := pluginSpans(conflist)
	if err != nil {
		return nil, fmt.Errorf("read conflist: %w", err)
	}
	if len(plugins) == 0 {
		return nil, errors.New("read conflist: it lists no plugin to chain to")
	}
	for _, p := range plugins {
		t, err := pluginType(conflist[p.start:p.end])
		if err != nil {
			return nil, fmt.Errorf("read conflist: %w", err)
		}
		if t == typ {
			return slices.Concat(conflist[:p.start], entry, conflist[p.end:]), nil
		}
	}
	last := plugins[len(plugins)-1]
	indent := conflist[len(bytes.TrimRight(conflist[:last.start], " \t\r\n")):last.start]
	return slices.Concat(conflist[:last.end], []byte(","), indent, entry, conflist[last.end:]), nil
}

// pluginType returns the type of a conflist's entry.
func pluginType(entry []byte) (string, error) {
	var e struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(entry, &e); err != nil {
		return "", fmt.Errorf("plugin %.80s: %w", entry, err)
	}
	if e.Type == "" {
		return "", fmt.Errorf("plugin %.80s has no type", entry)
	}
	return e.Type, nil
}

// span is a part of a text.
type span struct{ start, end int }

// pluginSpans finds the elements of the top level's "plugins".
func pluginSpans(conflist []byte) ([]span, error) {
	dec := json.NewDecoder(bytes.NewReader(conflist))
	if err := expect(dec, json.Delim('{')); err != nil {
		return nil, err
	}
	var plugins []span
	found := false
	var skipped json.RawMessage
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, err
		}
		if key != "plugins" {
			if err := dec.Decode(&skipped); err != nil {
				return nil, err
			}
			continue
		}
		if found {
			return nil, errors.New(`it has "plugins" twice`)
		}
		found = true
		if err := expect(dec, json.Delim('[')); err != nil {
			return nil, err
		}
		for dec.More() {
			var plugin json.RawMessage
			if err := dec.Decode(&plugin); err != nil {
				return nil, err
			}
			end := int(dec.InputOffset())
			plugins = append(plugins, span{end - len(plugin), end})
		}
		if err := expect(dec, json.Delim(']')); err != nil {
			return nil, err
		}
	}
	if err := expect(dec, json.Delim('}')); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows its closing brace")
	}
	if !found {
		return nil, errors.New(`it has no "plugins": it is no conflist`)
	}
	return plugins, nil
}

// expect reads one token.
func expect(dec *json.Decoder, want json.Delim) error {
	got, err := dec.Token()
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("found %v where %v was expected", got, want)
	}
	return nil
}
