package cniconf

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestAppend(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ conflist, entry, want string }{
		"one line": {
			`{"name":"n","plugins":[{"type":"ptp"}]}`, `{"type":"podwall"}`,
			`{"name":"n","plugins":[{"type":"ptp"},{"type":"podwall"}]}`,
		},
		"indentation, key order, unknown keys and numbers stay": {
			"{\n\t\"zeta\": 1.0e3,\n\t\"plugins\": [\n\t\t{ \"type\" : \"ptp\", \"x\": [1 , 2] },\n\t\t{\"type\":\"portmap\"}\n\t],\n\t\"alpha\": {\"plugins\": []}\n}\n",
			" {\"type\":\"podwall\"}\n",
			"{\n\t\"zeta\": 1.0e3,\n\t\"plugins\": [\n\t\t{ \"type\" : \"ptp\", \"x\": [1 , 2] },\n\t\t{\"type\":\"portmap\"},\n\t\t{\"type\":\"podwall\"}\n\t],\n\t\"alpha\": {\"plugins\": []}\n}\n",
		},
		"replaced where it is": {
			`{"plugins":[{"type":"ptp"}, {"type":"podwall","socket":"/old"} ,{"type":"other"}]}`, `{"type":"podwall","timeout":"5s"}`,
			`{"plugins":[{"type":"ptp"}, {"type":"podwall","timeout":"5s"} ,{"type":"other"}]}`,
		},
		"a nested type is not a plugin": {
			`{"plugins":[{"type":"ptp","ipam":{"type":"podwall"}}]}`, `{"type":"podwall"}`,
			`{"plugins":[{"type":"ptp","ipam":{"type":"podwall"}},{"type":"podwall"}]}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Append([]byte(tc.conflist), []byte(tc.entry))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			again, err := Append(got, []byte(tc.entry))
			if err != nil || string(again) != string(got) {
				t.Errorf("a second time: %v\n%s", err, again)
			}
		})
	}
}

func TestAppendRefuses(t *testing.T) {
	t.Parallel()
	const good = `{"plugins":[{"type":"ptp"}]}`
	for name, tc := range map[string]struct{ conflist, entry, want string }{
		"empty":              {``, `{"type":"podwall"}`, "unexpected EOF"},
		"truncated":          {`{"plugins":[{"type":"ptp"}`, `{"type":"podwall"}`, "EOF"},
		"an array":           {`[]`, `{"type":"podwall"}`, "expected"},
		"a single plugin":    {`{"type":"ptp"}`, `{"type":"podwall"}`, "no conflist"},
		"no plugin":          {`{"plugins":[]}`, `{"type":"podwall"}`, "no plugin"},
		"plugins no list":    {`{"plugins":{}}`, `{"type":"podwall"}`, "expected"},
		"plugins twice":      {`{"plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}`, `{"type":"podwall"}`, "twice"},
		"plugin no object":   {`{"plugins":["ptp"]}`, `{"type":"podwall"}`, "ptp"},
		"plugin of no type":  {`{"plugins":[{"name":"x"}]}`, `{"type":"podwall"}`, "no type"},
		"trailing junk":      {good + `}`, `{"type":"podwall"}`, "follows"},
		"entry without type": {good, `{}`, "read entry"},
		"entry no JSON":      {good, `podwall`, "read entry"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Append([]byte(tc.conflist), []byte(tc.entry))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %s, %v, want an error about %q", got, err, tc.want)
			}
		})
	}
}

// Whatever the conflist, Append adds one element to its plugins and changes nothing else.
func TestAppendAddsOneElement(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		conf := map[string]any{}
		for _, k := range rapid.SliceOfDistinct(rapid.String(), rapid.ID).Draw(t, "keys") {
			conf[k] = rapid.String().Draw(t, "value")
		}
		var plugins []any
		for _, typ := range rapid.SliceOfN(rapid.StringMatching(`[a-z"\\\]]{1,6}`), 1, 4).Draw(t, "types") {
			plugins = append(plugins, map[string]any{"type": typ, "x": rapid.String().Draw(t, "x")})
		}
		conf["plugins"] = plugins
		indent := rapid.SampledFrom([]string{"", " ", "\t"}).Draw(t, "indent")
		data, err := json.MarshalIndent(conf, "", indent)
		if err != nil {
			t.Fatal(err)
		}
		out, err := Append(data, Entry())
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.Unmarshal(out, &got); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		conf["plugins"] = append(plugins, map[string]any{"type": "podwall"})
		want, got2 := mustJSON(t, conf), mustJSON(t, got)
		if want != got2 {
			t.Fatalf("want %s\ngot  %s", want, got2)
		}
	})
}

func mustJSON(t *rapid.T, v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestSamples(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"ptp", "bridge"} {
		data, err := Sample(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), `"type": "podwall"`) {
			t.Errorf("%s has podwall already", name)
		}
		with, err := Append(data, Entry())
		if err != nil {
			t.Fatal(err)
		}
		list, err := libcni.NetworkConfFromBytes(with)
		if err != nil {
			t.Fatal(err)
		}
		var types []string
		for _, p := range list.Plugins {
			types = append(types, p.Network.Type)
		}
		if diff := cmp.Diff([]string{name, "podwall"}, types); diff != "" {
			t.Errorf("plugins (-want +got):\n%s", diff)
		}
		if list.CNIVersion != "1.1.0" || list.DisableCheck || list.DisableGC {
			t.Errorf("%s: version %s, disableCheck %v, disableGC %v: GC and STATUS would not be called", name, list.CNIVersion, list.DisableCheck, list.DisableGC)
		}
		for _, part := range []string{`"ipMasq": false`, "10.244.0.0/24", "fd00:10:244::/64", "0.0.0.0/0", "::/0"} {
			if !strings.Contains(string(data), part) {
				t.Errorf("%s lacks %s", name, part)
			}
		}
	}
	if _, err := Sample("macvlan"); err == nil || !strings.Contains(err.Error(), "ptp") {
		t.Errorf("unknown sample: %v, want an error that names those there are", err)
	}
}
