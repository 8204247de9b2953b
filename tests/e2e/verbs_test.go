package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/conflist"
)

// quiet isolates every pod of the namespace default.
var quiet = map[string]string{
	"pods.yaml":   podManifest("default", "a", "app: a") + podManifest("default", "b", "app: b") + podManifest("default", "c", "app: c"),
	"policy.yaml": policyManifest("default", "quiet", "{podSelector: {}, policyTypes: [Ingress]}"),
}

func registered(t *testing.T, n *testnet.Node, p *testnet.Pod) bool {
	t.Helper()
	return slices.ContainsFunc(attachments(t, n), func(file string) bool { return strings.Contains(file, p.ContainerID) })
}

func links(t *testing.T, h *testnet.Host) string {
	t.Helper()
	out, err := h.Run(t.Context(), "ip", "-o", "link")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestVerbs(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: quiet})
			a, b := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "b")
			if len(a.Addrs) != 2 {
				t.Errorf("ADD's result has the addresses %v, want one per family", a.Addrs)
			}
			for _, p := range []*testnet.Pod{a, b} {
				if !registered(t, n, p) {
					t.Errorf("%s is not registered after ADD: %v", p.Name, attachments(t, n))
				}
				if _, err := n.CNITool(t.Context(), "check", p); err != nil {
					t.Error(err)
				}
			}
			if _, err := n.CNITool(t.Context(), "status", a); err != nil {
				t.Error(err)
			}
			expectAll(t, n, b.Host, a.Host, testnet.TCP(80), testnet.Denied)
			expectAll(t, n, n.Host, a.Host, testnet.TCP(80), testnet.Allowed)

			for range 2 { // DEL is idempotent
				if _, err := n.CNITool(t.Context(), "del", b); err != nil {
					t.Error(err)
				}
			}
			poll(t, "b's registration goes after DEL", func() bool { return !registered(t, n, b) })
			if got := links(t, b.Host); strings.Contains(got, "eth0") {
				t.Errorf("b keeps its interface after DEL: %s", got)
			}
			if !registered(t, n, a) {
				t.Error("DEL of b unregistered a")
			}
			// The same sandbox again, as after a failed start.
			if err := n.Add(t.Context(), b); err != nil {
				t.Fatal(err)
			}
			expectAll(t, n, a.Host, b.Host, testnet.TCP(81), testnet.Denied)
		})
	}
}

func TestCheckOfUnregisteredPod(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	a := add(t, n, "default", "a")
	conf := map[string]any{"prevResult": prevResult(a, a.Addrs[testnet.IPv4].String()+"/24", a.Addrs[testnet.IPv6].String()+"/64")}
	if code, msg := pluginCode(t, n, "CHECK", a, conf); code != 0 {
		t.Errorf("CHECK of an enforced pod: code %d: %s", code, msg)
	}
	if code, msg := pluginCode(t, n, "DEL", a, conf); code != 0 {
		t.Errorf("DEL: code %d: %s", code, msg)
	}
	if _, err := n.CNITool(t.Context(), "check", a); err == nil {
		t.Error("CHECK passes for a pod that is not enforced any more")
	}
}

// A pod that has had its DEL is on its way out: closed, in the peer sets of nobody.
func TestDetachedPodIsClosed(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{"pods.yaml": quiet["pods.yaml"]}})
			a, b := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "b", testnet.TCP(80))
			expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Allowed)
			if code, msg := pluginCode(t, n, "DEL", a, nil); code != 0 {
				t.Fatalf("DEL: code %d: %s", code, msg)
			}
			expectAll(t, n, a.Host, b.Host, testnet.TCP(80), testnet.Denied)
			expectAll(t, n, b.Host, a.Host, testnet.TCP(80), testnet.Denied)
		})
	}
}

func TestGC(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "bridge", manifests: quiet})
	a, b := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "b", testnet.TCP(80))
	c := add(t, n, "default", "c")
	keep := []map[string]string{{"containerID": a.ContainerID, "ifname": "eth0"}}

	gc := func(conf map[string]any) {
		t.Helper()
		if code, msg := pluginCode(t, n, "GC", a, conf); code != 0 {
			t.Fatalf("GC: code %d: %s", code, msg)
		}
	}
	gc(map[string]any{"name": "another-network", "cni.dev/valid-attachments": keep})
	gc(nil) // no list: cnitool, and not "nothing is valid"
	for _, p := range []*testnet.Pod{a, b, c} {
		if code, msg := pluginCode(t, n, "CHECK", p, map[string]any{"prevResult": prevResult(p, p.Addrs[testnet.IPv4].String()+"/24", p.Addrs[testnet.IPv6].String()+"/64")}); code != 0 {
			t.Errorf("GC of another network, or without a list, touched %s: code %d: %s", p.Name, code, msg)
		}
	}
	gc(map[string]any{"cni.dev/valid-attachments": keep})
	if _, err := n.CNITool(t.Context(), "check", a); err != nil {
		t.Errorf("GC touched the attachment that it was told to keep: %v", err)
	}
	if _, err := n.CNITool(t.Context(), "check", b); err == nil {
		t.Error("GC kept an attachment that is not valid")
	}
	// cnitool's gc is DEL of everything it has cached, and GC without a list.
	if _, err := n.CNITool(t.Context(), "gc", a); err != nil {
		t.Error(err)
	}
	poll(t, "no registration is left after cnitool gc", func() bool { return len(attachments(t, n)) == 0 })
}

func TestWithoutDaemon(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: quiet})
			old := add(t, n, "default", "b")
			if err := n.StopDaemon(); err != nil {
				t.Fatal(err)
			}
			a, err := n.NewPod("default", "a", "")
			if err != nil {
				t.Fatal(err)
			}
			if err := n.Add(t.Context(), a); err == nil {
				t.Error("ADD succeeds without the daemon: a pod would start unenforced")
			}
			conf := map[string]any{"timeout": "500ms", "prevResult": prevResult(a, "10.244.1.2/24")}
			if code, msg := pluginCode(t, n, "ADD", a, conf); code != 11 {
				t.Errorf("ADD: code %d (%s), want 11, try again later", code, msg)
			}
			if code, msg := pluginCode(t, n, "STATUS", a, nil); code != 50 {
				t.Errorf("STATUS: code %d (%s), want 50, not available", code, msg)
			}
			if _, err := n.CNITool(t.Context(), "status", a); err == nil {
				t.Error("cnitool status succeeds without the daemon")
			}
			if registered(t, n, a) {
				t.Error("the failed ADD is registered")
			}
			// DEL leaves nothing of both, in spite of the daemon's absence.
			for _, p := range []*testnet.Pod{a, old} {
				if _, err := n.CNITool(t.Context(), "del", p); err != nil {
					t.Error(err)
				}
				if got := links(t, p.Host); strings.Contains(got, "eth0") {
					t.Errorf("%s keeps its interface after DEL: %s", p.Name, got)
				}
			}
			reserved, err := filepath.Glob(filepath.Join(n.Dir, "ipam", n.Name, "[0-9a-f]*[.:]*"))
			if err != nil {
				t.Fatal(err)
			}
			if len(reserved) > 0 {
				t.Errorf("addresses stay reserved after DEL: %v", reserved)
			}
			// The daemon comes back, forgets the pod that went away meanwhile, and serves.
			if err := n.StartDaemon(t.Context()); err != nil {
				t.Fatal(err)
			}
			poll(t, "registration of a vanished pod goes", func() bool { return len(attachments(t, n)) == 0 })
			if err := n.Add(t.Context(), a); err != nil {
				t.Error(err)
			}
		})
	}
}

// Packets of a macvlan interface do not pass the node's netfilter: podwall refuses instead of pretending.
func TestMainPluginWithoutHostLink(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	conflist, err := n.Conflist()
	if err != nil {
		t.Fatal(err)
	}
	var list map[string]any
	if err := json.Unmarshal(conflist, &list); err != nil {
		t.Fatal(err)
	}
	main, _ := list["plugins"].([]any)[0].(map[string]any)
	main["type"], main["master"] = "macvlan", testnet.External
	if conflist, err = json.Marshal(list); err != nil {
		t.Fatal(err)
	}
	if err := n.SetConflist(conflist); err != nil {
		t.Fatal(err)
	}
	a, err := n.NewPod("default", "a", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Add(t.Context(), a); err == nil || !strings.Contains(err.Error(), "eth0") {
		t.Errorf("ADD behind macvlan: %v, want an error that names the interface", err)
	}
	code, msg := pluginCode(t, n, "ADD", a, map[string]any{"prevResult": prevResult(a, "10.244.1.2/24")})
	if code != 101 {
		t.Errorf("code %d (%s), want 101, no host link", code, msg)
	}
	if got := attachments(t, n); len(got) > 0 {
		t.Errorf("the refused ADD is registered: %v", got)
	}
}

func TestBadConfig(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	a, err := n.NewPod("default", "a", "")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		conf map[string]any
		code int
		says string
	}{
		{"no prevResult", nil, 7, "prevResult"},
		{"relative socket", map[string]any{"socket": "podwall.sock", "prevResult": prevResult(a, "10.244.1.2/24")}, 7, "podwall.sock"},
		{"bad timeout", map[string]any{"timeout": "soon", "prevResult": prevResult(a, "10.244.1.2/24")}, 7, "soon"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code, msg := pluginCode(t, n, "ADD", a, tt.conf)
			if code != tt.code || !strings.Contains(msg, tt.says) {
				t.Errorf("code %d: %s; want code %d and a message that names %q", code, msg, tt.code, tt.says)
			}
			if code, msg := pluginCode(t, n, "DEL", a, tt.conf); code != 0 {
				t.Errorf("DEL with the same configuration: code %d: %s", code, msg)
			}
		})
	}
}

// The IPAM state was lost and a second sandbox gets the address of the first, whose DEL comes late: the newest ADD owns the address.
func TestTwoPodsWithOneIP(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{
				"pods.yaml":   quiet["pods.yaml"],
				"policy.yaml": policyManifest("default", "b-is-quiet", "{podSelector: {matchLabels: {app: b}}}"),
			}})
			old, client := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "c")
			expectAll(t, n, client.Host, old.Host, testnet.TCP(80), testnet.Allowed)
			addresses, container := fmt.Sprint(old.Addrs), *old
			before := strings.Count(links(t, n.Host), "veth")
			if err := n.RemovePod(old); err != nil { // no DEL
				t.Fatal(err)
			}
			// The kernel takes namespaces down in its own time, and with ptp the old link keeps the route to the address until then.
			poll(t, "the old pod's link goes", func() bool { return strings.Count(links(t, n.Host), "veth") < before })
			if err := os.RemoveAll(filepath.Join(n.Dir, "ipam")); err != nil {
				t.Fatal(err)
			}
			b := add(t, n, "default", "b", testnet.TCP(80))
			if got := fmt.Sprint(b.Addrs); got != addresses {
				t.Fatalf("the new pod has %s, want the old one's %s: this test tests nothing", got, addresses)
			}
			expectAll(t, n, client.Host, b.Host, testnet.TCP(80), testnet.Denied)
			if code, msg := pluginCode(t, n, "DEL", &container, nil); code != 0 {
				t.Errorf("late DEL: code %d: %s", code, msg)
			}
			expectAll(t, n, client.Host, b.Host, testnet.TCP(80), testnet.Denied)
			expectAll(t, n, n.Host, b.Host, testnet.TCP(80), testnet.Allowed)
		})
	}
}

// Without Kubernetes and without a Pod manifest, a pod's labels come with its ADD.
func TestLabelsFromCNI(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: map[string]string{
		"policy.yaml": policyManifest("default", "quiet", "{podSelector: {matchLabels: {app: labelled}}}"),
	}})
	client := add(t, n, "default", "client", testnet.TCP(80))
	list, err := n.Conflist()
	if err != nil {
		t.Fatal(err)
	}
	entry := fmt.Sprintf(`{"type": "podwall", "socket": %q, "args": {"cni": {"labels": [{"key": "app", "value": "labelled"}]}}}`, n.Socket())
	if list, err = conflist.Insert(list, []byte(entry)); err != nil {
		t.Fatal(err)
	}
	if err := n.SetConflist(list); err != nil {
		t.Fatal(err)
	}
	server := add(t, n, "default", "server", testnet.TCP(80))
	expectAll(t, n, client.Host, server.Host, testnet.TCP(80), testnet.Denied)
	expectAll(t, n, server.Host, client.Host, testnet.TCP(80), testnet.Allowed)
}
