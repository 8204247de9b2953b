package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/podwall/podwall/internal/testnet"
)

// answer is what scripts may read of `podwalld explain -o json`.
type answer struct {
	Allowed         bool
	Egress, Ingress struct {
		Allowed, Isolated bool
		Policies          []string
		Matched           string
	}
}

// explain asks the node's daemon and holds the exit code to the answer.
func explain(t *testing.T, n *testnet.Node, from, to, port string) answer {
	t.Helper()
	out, err := n.Podwalld(t.Context(), "explain", "-o", "json", from, to, port)
	code := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	}
	if err != nil && code != 3 {
		t.Fatal(err)
	}
	var a answer
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		t.Fatalf("explain %s %s %s: %v: %s", from, to, port, err, out)
	}
	if a.Allowed != (code == 0) || a.Allowed != (a.Egress.Allowed && a.Ingress.Allowed) {
		t.Errorf("explain %s %s %s: exit code %d: %s", from, to, port, code, out)
	}
	return a
}

// What explain says is what happens to packets: between pods, with and without a manifest, with the node and with others.
func TestExplain(t *testing.T) {
	t.Parallel()
	for _, cni := range mainCNIs {
		t.Run(cni, func(t *testing.T) {
			t.Parallel()
			n := start(t, setup{cni: cni, manifests: map[string]string{
				"pods.yaml": podManifest("shop", "web", "app: web") + podManifest("shop", "db", "app: db", "sql:5432"),
				"policy.yaml": policyManifest("shop", "closed", "{podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress]}") +
					policyManifest("shop", "db", "{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: sql}]}]}") +
					policyManifest("shop", "web", fmt.Sprintf("{podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{to: [{podSelector: {}}]}, {to: [{ipBlock: {cidr: %s/32}}]}]}", testnet.NodeAddrs[testnet.IPv4])),
			}})
			ports := []testnet.Port{testnet.TCP(5432), testnet.TCP(80)}
			add(t, n, "shop", "web", ports...)
			db := add(t, n, "shop", "db", ports...)
			stray := add(t, n, "shop", "stray", ports...) // without a manifest
			external := n.Outside[testnet.External]
			if err := errors.Join(n.Host.Serve(ports...), external.Serve(ports...)); err != nil {
				t.Fatal(err)
			}
			var cells testnet.Matrix
			names := []string{"shop/web", "shop/db", "shop/stray", testnet.NodeName, testnet.External}
			for i, from := range names {
				for j, to := range names {
					if i == j || i > 2 && j > 2 {
						continue
					}
					for _, port := range ports {
						cells = append(cells, testnet.Cell{From: from, To: to, Port: port})
					}
				}
			}
			results, err := n.ObserveAll(t.Context(), cells)
			if err != nil {
				t.Fatal(err)
			}
			seen := map[testnet.Verdict]int{}
			for i, cell := range cells {
				all := true
				for f := range results {
					r := results[f][i]
					from, err := n.Find(r.From)
					if err != nil {
						t.Fatal(err)
					}
					to, err := n.Find(r.To)
					if err != nil {
						t.Fatal(err)
					}
					seen[r.Got]++
					all = all && r.Got == testnet.Allowed
					a := explain(t, n, from.Addrs[r.Family].String(), to.Addrs[r.Family].String(), r.Port.String())
					if a.Allowed != (r.Got == testnet.Allowed) || r.Got != testnet.Allowed && r.Got != testnet.Denied {
						t.Errorf("%s %s -> %s %s: packets are %s, explained %+v", r.Family, r.From, r.To, r.Port, r.Got, a)
					}
				}
				if n.Pod(cell.From) != nil && n.Pod(cell.To) != nil {
					if a := explain(t, n, cell.From, cell.To, cell.Port.String()); a.Allowed != all {
						t.Errorf("%s -> %s %s: packets in all families: %t, explained %+v", cell.From, cell.To, cell.Port, all, a)
					}
				}
			}
			if seen[testnet.Allowed] < 8 || seen[testnet.Denied] < 8 {
				t.Errorf("packets were %v: nothing was compared", seen)
			}

			a := explain(t, n, "shop/web", "shop/db", "5432")
			if a.Egress.Matched != "shop/web rule 0" || a.Ingress.Matched != "shop/db rule 0" || strings.Join(a.Ingress.Policies, " ") != "shop/closed shop/db" || !a.Ingress.Isolated {
				t.Errorf("web to db: %+v", a)
			}
			// A change is in the next answer.
			if err := n.WriteManifest("policy.yaml", policyManifest("shop", "all", "{podSelector: {}, ingress: [{}]}")); err != nil {
				t.Fatal(err)
			}
			eventually(t, testnet.Probe{From: stray.Host, To: db.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}, testnet.Allowed)
			if a := explain(t, n, "shop/stray", "shop/db", "80"); a.Ingress.Matched != "shop/all rule 0" {
				t.Errorf("after the change: %+v", a)
			}
			out, err := n.Podwalld(t.Context(), "matrix", "80")
			if err != nil || strings.Count(out, "yes") != 6 || !strings.Contains(out, "shop/stray") {
				t.Errorf("matrix: %v\n%s", err, out)
			}
		})
	}
}
