package e2e

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/podwall/podwall/internal/testnet"
)

const clientsOnly = "{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {role: client}}}]}]}"

func TestChangesWhileRunning(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			client, server := podManifest("default", "client", "role: client"), podManifest("default", "server", "app: server")
			n := start(t, setup{cni: cni, manifests: map[string]string{"client.yaml": client, "server.yaml": server}})
			from, to := add(t, n, "default", "client"), add(t, n, "default", "server", testnet.TCP(80), testnet.UDP(80))

			change := func(file, text string) {
				t.Helper()
				if err := n.WriteManifest(file, text); err != nil {
					t.Fatal(err)
				}
			}
			allowed := func(want testnet.Verdict) {
				t.Helper()
				for _, port := range []testnet.Port{testnet.TCP(80), testnet.UDP(80)} {
					for _, f := range n.Families {
						eventually(t, testnet.Probe{From: from.Host, To: to.Host, Family: f, Port: port}, want)
					}
				}
			}
			allowed(testnet.Allowed)
			change("policy.yaml", policyManifest("default", "p", "{podSelector: {}}"))
			allowed(testnet.Denied)
			change("policy.yaml", policyManifest("default", "p", clientsOnly))
			allowed(testnet.Allowed)
			change("client.yaml", strings.ReplaceAll(client, "role: client", "role: guest")) // a peer's label
			allowed(testnet.Denied)
			change("client.yaml", client)
			allowed(testnet.Allowed)
			change("policy.yaml", policyManifest("default", "p", strings.ReplaceAll(clientsOnly, "role: client", "role: nobody")))
			allowed(testnet.Denied)
			change("server.yaml", strings.ReplaceAll(server, "app: server", "app: other")) // the subject's label
			allowed(testnet.Allowed)
			change("server.yaml", server)
			allowed(testnet.Denied)
			change("policy.yaml", "# no policy any more\n")
			allowed(testnet.Allowed)
		})
	}
}

func TestNamespaceLabelChange(t *testing.T) {
	t.Parallel()
	namespace := func(label string) string {
		return "apiVersion: v1\nkind: Namespace\nmetadata: {name: guests, labels: {trust: " + label + "}}\n"
	}
	n := start(t, setup{cni: "ptp", manifests: map[string]string{
		"ns.yaml":     namespace("full"),
		"pods.yaml":   podManifest("guests", "client", "app: client") + podManifest("default", "server", "app: server"),
		"policy.yaml": policyManifest("default", "p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {trust: full}}}]}]}"),
	}})
	client, server := add(t, n, "guests", "client"), add(t, n, "default", "server", testnet.TCP(80))
	probe := testnet.Probe{From: client.Host, To: server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}
	expect(t, probe, testnet.Allowed)
	for _, step := range []struct {
		label string
		want  testnet.Verdict
	}{{"none", testnet.Denied}, {"full", testnet.Allowed}} {
		if err := n.WriteManifest("ns.yaml", namespace(step.label)); err != nil {
			t.Fatal(err)
		}
		eventually(t, probe, step.want)
	}
}

func TestBadManifests(t *testing.T) {
	t.Parallel()
	good := policyManifest("default", "good", clientsOnly)
	n := start(t, setup{cni: "bridge", manifests: map[string]string{
		"good.yaml":      good,
		"pods.yaml":      podManifest("default", "client", "role: client") + podManifest("default", "guest", "role: guest") + podManifest("default", "server", "app: server"),
		"syntax.yaml":    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: broken\n",
		"unknown.yaml":   "apiVersion: example.com/v1\nkind: Firewall\nmetadata: {name: x}\n",
		"selector.yaml":  policyManifest("default", "bad-selector", "{podSelector: {matchExpressions: [{key: app, operator: Gt, values: ['1']}]}, ingress: [{}]}"),
		"cidr.yaml":      policyManifest("default", "bad-cidr", "{podSelector: {matchLabels: {app: server}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/99}}]}]}"),
		"zz-double.yaml": podManifest("default", "server", "app: impostor"),
		"readme.txt":     "not a manifest",
	}})
	client, guest := add(t, n, "default", "client"), add(t, n, "default", "guest")
	server := add(t, n, "default", "server", testnet.TCP(80))
	judge := func() {
		t.Helper()
		expectAll(t, n, client.Host, server.Host, testnet.TCP(80), testnet.Allowed)
		expectAll(t, n, guest.Host, server.Host, testnet.TCP(80), testnet.Denied)
	}
	judge()
	log := n.Log()
	status, err := n.Podwalld(t.Context(), "status")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"syntax.yaml", "unknown.yaml", "bad-selector", "bad-cidr", "zz-double.yaml"} {
		if !strings.Contains(log, name) && !strings.Contains(status, name) {
			t.Errorf("neither log nor status names %s:\n%s\n%s", name, status, log)
		}
	}
	// A file that breaks while it is edited keeps its last good content.
	if err := n.WriteManifest("good.yaml", good[:len(good)-10]+"\n  : ["); err != nil {
		t.Fatal(err)
	}
	poll(t, "the broken edit is reported", func() bool { return strings.Contains(n.Log(), "good.yaml") })
	judge()
}

// While the daemon is dead the kernel enforces what it has; when it is back nothing has been opened or broken in between.
func TestRestart(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{
				"pods.yaml":   podManifest("default", "client", "role: client") + podManifest("default", "guest", "role: guest") + podManifest("default", "server", "app: server"),
				"policy.yaml": policyManifest("default", "p", clientsOnly),
			}})
			client, guest := add(t, n, "default", "client"), add(t, n, "default", "guest")
			server := add(t, n, "default", "server", testnet.TCP(80))
			conn, err := client.Dial(t.Context(), netip.AddrPortFrom(server.Addrs[testnet.IPv4], 80))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			judge := func(when string) {
				t.Helper()
				if err := testnet.Exchange(conn, when, 2*time.Second); err != nil {
					t.Errorf("established connection %s: %v", when, err)
				}
				expectAll(t, n, client.Host, server.Host, testnet.TCP(80), testnet.Allowed)
				expectAll(t, n, guest.Host, server.Host, testnet.TCP(80), testnet.Denied)
			}
			judge("before")
			for _, end := range []struct {
				name string
				f    func() error
			}{{"kill -9", n.KillDaemon}, {"stop", n.StopDaemon}} {
				if err := end.f(); err != nil {
					t.Fatal(err)
				}
				judge("after " + end.name)
				if err := n.StartDaemon(t.Context()); err != nil {
					t.Fatal(err)
				}
				judge("after a start that followed " + end.name)
			}
			// What has changed while the daemon was away takes effect with its start.
			if err := n.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			if err := n.WriteManifest("policy.yaml", policyManifest("default", "p", strings.ReplaceAll(clientsOnly, "role: client", "role: guest"))); err != nil {
				t.Fatal(err)
			}
			if err := n.StartDaemon(t.Context()); err != nil {
				t.Fatal(err)
			}
			expectAll(t, n, guest.Host, server.Host, testnet.TCP(80), testnet.Allowed)
			expectAll(t, n, client.Host, server.Host, testnet.TCP(80), testnet.Denied)
		})
	}
}
