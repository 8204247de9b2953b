package conflist_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/podwall/podwall/pkg/conflist"
)

var update = flag.Bool("update", false, "write the golden files")

const entry = `{"type":"podwall"}`

func TestInsertGolden(t *testing.T) {
	t.Parallel()
	ins, err := filepath.Glob("testdata/edit/*.in.*")
	if err != nil || len(ins) < 20 {
		t.Fatalf("%d golden files, %v", len(ins), err)
	}
	for _, path := range ins {
		name, ext, _ := strings.Cut(filepath.Base(path), ".in")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			list := in
			if ext == ".conf" {
				if list, err = conflist.FromConf(in); err != nil {
					t.Fatal(err)
				}
			}
			got, err := conflist.Insert(list, []byte(entry))
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata/edit", name+".out.conflist")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			checkInserted(t, list, got)
			loaded, err := libcni.NetworkConfFromBytes(got)
			if err != nil {
				t.Fatal(err)
			}
			if before, err := libcni.NetworkConfFromBytes(list); err != nil || before.Name != loaded.Name || before.CNIVersion != loaded.CNIVersion {
				t.Errorf("network %s %s, was %+v, %v", loaded.Name, loaded.CNIVersion, before, err)
			}
		})
	}
}

// fataler is what tests, properties and fuzz targets share.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// checkInserted checks what holds for every list.
func checkInserted(t fataler, list, got []byte) {
	t.Helper()
	if state, err := conflist.StateOf(got, []byte(entry)); err != nil || state != conflist.Installed {
		t.Fatalf("state after Insert: %s, %v", state, err)
	}
	again, err := conflist.Insert(got, []byte(entry))
	if err != nil || !bytes.Equal(again, got) {
		t.Fatalf("a second Insert: %v\n%s", err, again)
	}
	before, err := conflist.Remove(list)
	if err != nil {
		t.Fatalf("Remove: %v", err)
	}
	after, err := conflist.Remove(got)
	if err != nil || !bytes.Equal(before, after) {
		t.Fatalf("Remove after Insert: %v\ngot  %q\nwant %q", err, after, before)
	}
	state, err := conflist.StateOf(list, []byte(entry))
	if err != nil {
		t.Fatalf("StateOf: %v", err)
	}
	if (state == conflist.Missing) != bytes.Equal(before, list) {
		t.Fatalf("state %s, but Remove makes\n%s\nof\n%s", state, before, list)
	}
	if (state == conflist.Installed) != bytes.Equal(got, list) {
		t.Fatalf("state %s, but Insert makes\n%s\nof\n%s", state, got, list)
	}
}

func TestStateOf(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		list, entry string
		want        conflist.State
	}{
		"missing":            {`{"plugins":[{"type":"ptp"}]}`, entry, conflist.Missing},
		"installed":          {`{"plugins":[{"type":"ptp"},{"type":"podwall"}]}`, entry, conflist.Installed},
		"in the middle":      {`{"plugins":[{"type":"ptp"},{"type":"podwall"},{"type":"x"}]}`, entry, conflist.Installed},
		"other order":        {`{"plugins":[{"type":"ptp"},{"socket":"/s","type":"podwall"}]}`, `{"type":"podwall","socket":"/s"}`, conflist.Installed},
		"other socket":       {`{"plugins":[{"type":"ptp"},{"type":"podwall","socket":"/t"}]}`, `{"type":"podwall","socket":"/s"}`, conflist.Outdated},
		"a key too many":     {`{"plugins":[{"type":"ptp"},{"type":"podwall","x":1}]}`, entry, conflist.Outdated},
		"twice":              {`{"plugins":[{"type":"ptp"},{"type":"podwall"},{"type":"podwall"}]}`, entry, conflist.Outdated},
		"before the main":    {`{"plugins":[{"type":"podwall"},{"type":"ptp"}]}`, entry, conflist.Outdated},
		"only nested":        {`{"plugins":[{"type":"ptp","ipam":{"type":"podwall"}}]}`, entry, conflist.Missing},
		"numbers, not equal": {`{"plugins":[{"type":"ptp"},{"type":"podwall","n":1.0}]}`, `{"type":"podwall","n":1}`, conflist.Outdated},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got, err := conflist.StateOf([]byte(tc.list), []byte(tc.entry)); err != nil || got != tc.want {
				t.Errorf("got %s, %v, want %s", got, err, tc.want)
			}
		})
	}
}

func TestEditsRefuse(t *testing.T) {
	t.Parallel()
	const good = `{"plugins":[{"type":"ptp"}]}`
	for name, tc := range map[string]struct{ list, entry, want string }{
		"empty":                {``, entry, "unexpected EOF"},
		"truncated":            {`{"plugins":[{"type":"ptp"}`, entry, "unexpected EOF"},
		"truncated in a value": {`{"name":"x","plug`, entry, "unexpected EOF"},
		"an array":             {`[]`, entry, "found [ where { was expected"},
		"a single plugin":      {`{"type":"ptp"}`, entry, `no "plugins"`},
		"no plugin":            {`{"plugins":[]}`, entry, "lists no plugin"},
		"only podwall":         {`{"plugins":[{"type":"podwall"}]}`, entry, "lists no plugin"},
		"plugins no list":      {`{"plugins":{}}`, entry, "plugins: found {"},
		"plugins twice":        {`{"plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}`, entry, "twice"},
		"plugin no object":     {`{"plugins":[{"type":"ptp"},"ptp"]}`, entry, "plugin 1: "},
		"plugin null":          {`{"plugins":[null]}`, entry, `plugin 0: it has no "type"`},
		"plugin of no type":    {`{"plugins":[{"name":"x"}]}`, entry, `plugin 0: it has no "type"`},
		"trailing brace":       {good + `}`, entry, "follows its closing brace"},
		"second document":      {good + "\n" + good, entry, "follows its closing brace"},
		"a comment":            {"// x\n" + good, entry, "invalid character '/'"},
		"byte order mark":      {"\ufeff" + good, entry, "invalid character"},
		"entry without type":   {good, `{}`, `entry {}: it has no "type"`},
		"entry of other type":  {good, `{"type":"x"}`, "its type is not podwall"},
		"entry no JSON":        {good, `podwall`, "entry podwall: "},
		"entry with junk":      {good, entry + `x`, "invalid character 'x'"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := conflist.Insert([]byte(tc.list), []byte(tc.entry))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %s, %v, want an error about %q", got, err, tc.want)
			}
			if tc.list != good {
				if got, err := conflist.Remove([]byte(tc.list)); err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("Remove: got %s, %v, want an error about %q", got, err, tc.want)
				}
			}
		})
	}
}

func TestFromConfRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ conf, want string }{
		"empty":         {``, "unexpected end"},
		"a list":        {`{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"ptp"}]}`, `no "type"`},
		"no name":       {`{"type":"ptp"}`, `no "name"`},
		"odd version":   {`{"type":"ptp","name":"n","cniVersion":"one"}`, "cniVersion"},
		"trailing junk": {`{"type":"ptp","name":"n"}]`, "invalid character ']'"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got, err := conflist.FromConf([]byte(tc.conf)); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %s, %v, want an error about %q", got, err, tc.want)
			}
		})
	}
}

// space draws white space of JSON.
func space(t *rapid.T) string {
	return rapid.SampledFrom([]string{"", "", "", " ", "\n", "\r\n\t", "\n  "}).Draw(t, "space")
}

// value draws a JSON value in some notation.
func value(t *rapid.T, depth int) string {
	switch rapid.IntRange(0, 6+min(depth, 1)*2).Draw(t, "kind") {
	case 0:
		return rapid.SampledFrom([]string{"0", "-1.50", "1e3", "12345678901234567890123", "true", "null"}).Draw(t, "literal")
	case 7:
		return "{" + space(t) + `"plugins"` + space(t) + ":" + space(t) + value(t, depth-1) + "}"
	case 8:
		return "[" + space(t) + value(t, depth-1) + space(t) + "]"
	}
	text, _ := json.Marshal(rapid.String().Draw(t, "string"))
	return string(text)
}

// object draws an object with those members and others.
func object(t *rapid.T, members ...string) string {
	seen := map[string]bool{"plugins": true, "name": true, "cniversion": true, "type": true, "cniversions": true}
	for range rapid.IntRange(0, 3).Draw(t, "others") {
		key := rapid.StringMatching(`[a-zA-Z"\\é]{1,8}`).Draw(t, "key")
		if !seen[strings.ToLower(key)] {
			seen[strings.ToLower(key)] = true
			text, _ := json.Marshal(key)
			members = append(members, string(text)+space(t)+":"+space(t)+value(t, 2))
		}
	}
	for i, m := range rapid.Permutation(members).Draw(t, "order") {
		members[i] = space(t) + m + space(t)
	}
	return "{" + strings.Join(members, ",") + "}"
}

// Whatever the list looks like, Insert makes podwall one of its plugins, behind the main one, and changes nothing else.
func TestEditsChangeNothingElse(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		types := rapid.SliceOfN(rapid.SampledFrom([]string{"ptp", "podwall", `"},]`, "podwall"}), 0, 4).Draw(t, "types")
		types = append(types, "bridge")
		var plugins []string
		var want []any // what must be left
		for _, typ := range rapid.Permutation(types).Draw(t, "order of types") {
			text, _ := json.Marshal(typ)
			plugin := object(t, `"type"`+space(t)+":"+space(t)+string(text))
			plugins = append(plugins, space(t)+plugin+space(t))
			if typ != "podwall" {
				want = append(want, decode(t, plugin))
			}
		}
		list := space(t) + object(t, `"name":"n"`, `"cniVersion":"1.0.0"`, `"plugins":`+space(t)+"["+strings.Join(plugins, ",")+"]") + space(t)
		got, err := conflist.Insert([]byte(list), []byte(entry))
		if err != nil {
			t.Fatalf("%v in\n%s", err, list)
		}
		checkInserted(t, []byte(list), got)
		was, is := decode(t, list).(map[string]any), decode(t, string(got)).(map[string]any)
		rest := []any{}
		for i, p := range is["plugins"].([]any) {
			if p.(map[string]any)["type"] != "podwall" {
				rest = append(rest, p)
			} else if i == 0 {
				t.Fatalf("podwall is first in %s", got)
			}
		}
		if diff := cmp.Diff(want, rest); diff != "" {
			t.Fatalf("other plugins (-want +got):\n%s", diff)
		}
		delete(was, "plugins")
		delete(is, "plugins")
		if diff := cmp.Diff(was, is); diff != "" {
			t.Fatalf("other keys (-want +got):\n%s", diff)
		}
	})
}

func decode(t *rapid.T, text string) any {
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

func FuzzInsert(f *testing.F) {
	ins, err := filepath.Glob("testdata/edit/*.in.*")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range ins {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, list []byte) {
		if made, err := conflist.FromConf(list); err == nil {
			list = made
		}
		got, err := conflist.Insert(list, []byte(entry))
		if err != nil {
			return
		}
		if !json.Valid(got) {
			t.Fatalf("%q became %q", list, got)
		}
		checkInserted(t, list, got)
	})
}
