package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podwall/podwall/internal/testnet"
)

// cnitool runs a verb for an interface of any name, which testnet does for eth0.
func cnitool(t *testing.T, n *testnet.Node, verb string, p *testnet.Pod, ifname string) (string, error) {
	t.Helper()
	return n.Host.Run(t.Context(), "env", "NETCONFPATH="+filepath.Join(n.Dir, "net.d"), "CNI_IFNAME="+ifname,
		"CNI_PATH="+n.Binaries.CNIDir+":"+filepath.Dir(n.Binaries.Plugin),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+p.Namespace+";K8S_POD_NAME="+p.PodName,
		filepath.Join(n.Binaries.CNIDir, "cnitool"), verb, n.Name, p.Netns())
}

// editConflist changes the list of the node's network.
func editConflist(t *testing.T, n *testnet.Node, edit func(list map[string]any)) {
	t.Helper()
	text, err := n.Conflist()
	if err != nil {
		t.Fatal(err)
	}
	var list map[string]any
	if err := json.Unmarshal(text, &list); err != nil {
		t.Fatal(err)
	}
	edit(list)
	if text, err = json.Marshal(list); err != nil {
		t.Fatal(err)
	}
	if err := n.SetConflist(text); err != nil {
		t.Fatal(err)
	}
}

func ownPrevResult(p *testnet.Pod) map[string]any {
	return map[string]any{"prevResult": prevResult(p, p.Addrs[testnet.IPv4].String()+"/24", p.Addrs[testnet.IPv6].String()+"/64")}
}

// A runtime that has lost an answer adds again. The second ADD replaces the first, and what it says of the addresses holds.
func TestAddTwice(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	a, b := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "b")
	for range 3 {
		if code, msg := pluginCode(t, n, "ADD", a, ownPrevResult(a)); code != 0 {
			t.Fatalf("ADD again: code %d: %s", code, msg)
		}
		expectAll(t, n, b.Host, a.Host, testnet.TCP(80), testnet.Denied)
	}
	if got := attachments(t, n); len(got) != 2 {
		t.Errorf("registered %v, want two", got)
	}
	less := map[string]any{"prevResult": prevResult(a, a.Addrs[testnet.IPv4].String()+"/24")}
	if code, msg := pluginCode(t, n, "ADD", a, less); code != 0 {
		t.Fatalf("ADD with one address: code %d: %s", code, msg)
	}
	if code, msg := pluginCode(t, n, "CHECK", a, less); code != 0 {
		t.Errorf("CHECK of it: code %d: %s", code, msg)
	}
	if code, _ := pluginCode(t, n, "CHECK", a, ownPrevResult(a)); code != 100 {
		t.Errorf("CHECK with an address that the last ADD did not have: code %d, want 100", code)
	}
	// One DEL undoes them all.
	if err := n.DeletePod(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	poll(t, "a's registration goes", func() bool { return !registered(t, n, a) })
}

// DEL is asked for what was never added, without what ADD had, and of others' sandboxes: it succeeds and touches nothing else.
func TestDelOfNothing(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	a := add(t, n, "default", "a")
	stranger, err := n.NewPod("default", "b", "")
	if err != nil {
		t.Fatal(err)
	}
	gone, err := n.NewPod("default", "c", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.RemovePod(gone); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*testnet.Pod{stranger, gone} {
		for name, conf := range map[string]map[string]any{
			"without prevResult":         nil,
			"null":                       {"prevResult": nil},
			"empty":                      {"prevResult": map[string]any{}},
			"another's":                  ownPrevResult(a),
			"one that cannot be decoded": {"prevResult": "x"},
			"a list with null":           {"prevResult": map[string]any{"ips": []any{nil}}},
			"an old version":             {"cniVersion": "0.3.1", "prevResult": nil},
		} {
			if code, msg := pluginCode(t, n, "DEL", p, conf); code != 0 {
				t.Errorf("DEL of %s, prevResult %s: code %d: %s", p.Name, name, code, msg)
			}
		}
	}
	if _, err := n.CNITool(t.Context(), "del", stranger); err != nil {
		t.Errorf("cnitool del without add: %v", err)
	}
	if code, msg := pluginCode(t, n, "CHECK", a, ownPrevResult(a)); code != 0 {
		t.Errorf("CHECK of a pod that none of them was about: code %d: %s", code, msg)
	}
	if got := attachments(t, n); len(got) != 1 {
		t.Errorf("registered %v, want the one", got)
	}
}

// The network namespace went before the DEL, as after a crash of the runtime: ADD and CHECK say so, DEL cleans up.
func TestNetnsIsGone(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: quiet})
			a := add(t, n, "default", "a")
			conf := ownPrevResult(a)
			if err := n.RemovePod(a); err != nil {
				t.Fatal(err)
			}
			for _, verb := range []string{"ADD", "CHECK"} {
				if code, msg := pluginCode(t, n, verb, a, conf); code != 8 || !strings.Contains(msg, "CNI_NETNS") {
					t.Errorf("%s: code %d: %s; want 8 and CNI_NETNS", verb, code, msg)
				}
			}
			if _, err := n.CNITool(t.Context(), "del", a); err != nil {
				t.Error(err)
			}
			poll(t, "the registration goes", func() bool { return !registered(t, n, a) })
			reserved, err := filepath.Glob(filepath.Join(n.Dir, "ipam", n.Name, "[0-9a-f]*[.:]*"))
			if err != nil || len(reserved) > 0 {
				t.Errorf("addresses stay reserved: %v, %v", reserved, err)
			}
		})
	}
}

// A sandbox may have several interfaces of several networks' calls, with any name that the kernel takes. Each is an attachment.
func TestSeveralInterfaces(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "bridge", manifests: quiet})
	a, b := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "b")
	const second = "net-1.2@x#?+&" // all legal (dev_valid_name), some special in URLs and file names
	out, err := cnitool(t, n, "add", a, second)
	if err != nil {
		t.Fatal(err)
	}
	var result struct {
		IPs []struct {
			Address netip.Prefix `json:"address"`
		} `json:"ips"`
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil || len(result.IPs) != 2 {
		t.Fatalf("result %s: %v", out, err)
	}
	if got := attachments(t, n); len(got) != 3 {
		t.Errorf("registered %v, want three", got)
	}
	if _, err := cnitool(t, n, "check", a, second); err != nil {
		t.Error(err)
	}
	for _, ip := range result.IPs {
		family := testnet.IPv4
		if ip.Address.Addr().Is6() {
			family = testnet.IPv6
		}
		via := netip.AddrPortFrom(ip.Address.Addr(), 80)
		expect(t, testnet.Probe{From: b.Host, To: a.Host, Family: family, Port: testnet.TCP(80), Via: via}, testnet.Denied)
		expect(t, testnet.Probe{From: b.Host, To: a.Host, Family: family, Port: testnet.TCP(80)}, testnet.Denied)
	}
	if _, err := cnitool(t, n, "del", a, second); err != nil {
		t.Error(err)
	}
	poll(t, "the second interface's registration goes", func() bool { return len(attachments(t, n)) == 2 })
	if code, msg := pluginCode(t, n, "CHECK", a, ownPrevResult(a)); code != 0 {
		t.Errorf("CHECK of the first interface after DEL of the second: code %d: %s", code, msg)
	}
	for _, name := range []string{"averyverylongname", "a/b", "a b", "..", "a:b"} {
		if _, err := cnitool(t, n, "add", b, name); err == nil {
			t.Errorf("an interface named %q was added", name)
		}
	}
	if got := attachments(t, n); len(got) != 2 {
		t.Errorf("registered %v, want two", got)
	}
}

// Something else has replaced the pod's link: what podwall enforces is not what the pod speaks through.
func TestCheckAfterLinkWasReplaced(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	a := add(t, n, "default", "a")
	host := hostLink(t, n, a)
	if _, err := n.Host.Run(t.Context(), "ip", "link", "del", "dev", host.Name); err != nil {
		t.Fatal(err)
	}
	if code, msg := pluginCode(t, n, "CHECK", a, ownPrevResult(a)); code == 0 {
		t.Errorf("CHECK without a link succeeds: %s", msg)
	}
	// The same name, another link.
	if _, err := n.Host.Run(t.Context(), "ip", "link", "add", host.Name, "type", "veth", "peer", "name", "eth0", "netns", filepath.Base(a.Netns())); err != nil {
		t.Fatal(err)
	}
	code, msg := pluginCode(t, n, "CHECK", a, ownPrevResult(a))
	if code != 100 || !strings.Contains(msg, "pod") {
		t.Errorf("CHECK of a replaced link: code %d: %s; want 100, and what to do", code, msg)
	}
	// ADD takes the new one.
	if code, msg := pluginCode(t, n, "ADD", a, ownPrevResult(a)); code != 0 {
		t.Errorf("ADD: code %d: %s", code, msg)
	}
	if code, msg := pluginCode(t, n, "CHECK", a, ownPrevResult(a)); code != 0 {
		t.Errorf("CHECK after ADD: code %d: %s", code, msg)
	}
}

// The conflist is the main CNI's: podwall speaks the version that it has, and the highest that the runtime knows of a list of them.
func TestVersionNegotiation(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	b := add(t, n, "default", "b")
	for i, tt := range []struct {
		version  string
		versions []any
		want     string
	}{
		{"0.3.0", nil, "0.3.0"},
		{"0.3.1", nil, "0.3.1"},
		{"0.4.0", nil, "0.4.0"},
		{"1.0.0", nil, "1.0.0"},
		{"1.1.0", nil, "1.1.0"},
		{"0.3.1", []any{"0.4.0", "1.1.0", "1.0.0"}, "1.1.0"},
	} {
		editConflist(t, n, func(list map[string]any) {
			list["cniVersion"] = tt.version
			delete(list, "cniVersions")
			if tt.versions != nil {
				list["cniVersions"] = tt.versions
			}
		})
		p, err := n.NewPod("default", fmt.Sprint("v", i), "")
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Serve(testnet.TCP(80)); err != nil {
			t.Fatal(err)
		}
		out, err := n.CNITool(t.Context(), "add", p)
		if err != nil {
			t.Errorf("%s %v: %v", tt.version, tt.versions, err)
			continue
		}
		var result struct {
			CNIVersion string `json:"cniVersion"`
			IPs        []struct {
				Address netip.Prefix `json:"address"`
			} `json:"ips"`
		}
		if err := json.Unmarshal(out, &result); err != nil || result.CNIVersion != tt.want || len(result.IPs) != 2 {
			t.Errorf("%s %v: result %s, %v; want one of version %s", tt.version, tt.versions, out, err, tt.want)
			continue
		}
		for _, ip := range result.IPs {
			family := testnet.IPv4
			if ip.Address.Addr().Is6() {
				family = testnet.IPv6
			}
			expect(t, testnet.Probe{From: b.Host, To: p.Host, Family: family, Port: testnet.TCP(80), Via: netip.AddrPortFrom(ip.Address.Addr(), 80)}, testnet.Denied)
		}
		if tt.want >= "0.4.0" {
			if _, err := n.CNITool(t.Context(), "check", p); err != nil {
				t.Errorf("%s: %v", tt.version, err)
			}
		}
		if err := n.DeletePod(t.Context(), p); err != nil {
			t.Errorf("%s: %v", tt.version, err)
		}
		poll(t, "its registration goes", func() bool { return !registered(t, n, p) })
	}
}

// Before STATUS and GC there was DEL without prevResult, and CRI-O sends null for a list of nothing.
func TestGCOfNothingLeft(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	a, b := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "b", testnet.TCP(80))
	if code, _ := pluginCode(t, n, "GC", a, map[string]any{"cni.dev/valid-attachments": "all"}); code != 7 {
		t.Errorf("GC with a list that is none: code %d, want 7", code)
	}
	for _, p := range []*testnet.Pod{a, b} {
		if code, msg := pluginCode(t, n, "CHECK", p, ownPrevResult(p)); code != 0 {
			t.Errorf("the refused GC touched %s: code %d: %s", p.Name, code, msg)
		}
	}
	if code, msg := pluginCode(t, n, "GC", a, map[string]any{"cni.dev/valid-attachments": nil}); code != 0 {
		t.Errorf("GC with null: code %d: %s", code, msg)
	}
	// Their links are still there, so that they are closed and not open.
	expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Denied)
	expectAll(t, n, b.Host, a.Host, testnet.TCP(80), testnet.Denied)
	for _, p := range []*testnet.Pod{a, b} {
		if code, _ := pluginCode(t, n, "CHECK", p, ownPrevResult(p)); code == 0 {
			t.Errorf("%s is kept, and nothing was valid", p.Name)
		}
	}
}
