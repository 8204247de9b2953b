package cniconf_test

import (
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"

	cniconf "github.com/podwall/podwall/cni-conf"
	"github.com/podwall/podwall/pkg/conflist"
)

func TestSamples(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"ptp", "bridge"} {
		data, err := cniconf.Sample(name)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), `"type": "podwall"`) {
			t.Errorf("%s has podwall already", name)
		}
		with, err := conflist.Insert(data, cniconf.Entry())
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
	if _, err := cniconf.Sample("macvlan"); err == nil || !strings.Contains(err.Error(), "ptp") {
		t.Errorf("unknown sample: %v, want an error that names those there are", err)
	}
}
