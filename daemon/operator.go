package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/cli"
	"github.com/podwall/podwall/pkg/reconcile"
)

// askTimeout bounds an operator's question.
const askTimeout = 10 * time.Second

// ask parses the flags that all operator commands share, fetches a view and prints it as JSON or by table.
func ask[T any](ctx context.Context, c *cli.Call, view string, query func() url.Values, table func(io.Writer, T) error) (T, error) {
	var v T
	socket := c.Flags.String("socket", agentapi.DefaultSocket, "`PATH` of the daemon's socket")
	output := c.Flags.String("o", "table", "output as `table|json`")
	if err := c.Parse(); err != nil {
		return v, err
	}
	if *output != "table" && *output != "json" {
		return v, cli.UsageError{Err: fmt.Errorf("-o %q: must be table or json", *output)}
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if err := agentapi.NewClient(*socket).View(ctx, view, query(), &v); err != nil {
		return v, err
	}
	if *output == "table" {
		return v, table(c.Stdout, v)
	}
	enc := json.NewEncoder(c.Stdout)
	enc.SetIndent("", "  ")
	return v, enc.Encode(v)
}

func noQuery() url.Values { return nil }

func showStatus(ctx context.Context, c *cli.Call) error {
	_, err := ask(ctx, c, "node", noQuery, func(w io.Writer, s reconcile.NodeStatus) error {
		t := newTable(w)
		t.row("node", s.Node)
		t.row("ready", s.Ready)
		t.row("policies", s.Policies)
		t.row("pods enforced", s.Enforced)
		t.row("pods adopted", s.Adopted)
		t.row("pods quarantined", s.Quarantined)
		t.row("pods unenforceable", s.Unenforceable)
		t.row("pods detached", s.Detached)
		t.row("problems", len(s.Problems))
		for _, p := range s.Problems {
			t.row("", p)
		}
		if s.Error != "" {
			t.row("error", s.Error)
		}
		return t.Flush()
	})
	return err
}

func showPods(ctx context.Context, c *cli.Call) error {
	_, err := ask(ctx, c, "pods", noQuery, func(w io.Writer, pods []reconcile.PodStatus) error {
		t := newTable(w)
		t.row("POD", "IPS", "STATE", "INGRESS", "EGRESS", "LINK")
		for _, p := range pods {
			state := p.State
			if p.Reason != "" {
				state += " (" + p.Reason + ")"
			}
			t.row(p.Namespace+"/"+p.Name, join(p.IPs), state, direction(p, p.Ingress), direction(p, p.Egress), p.Link)
		}
		return t.Flush()
	})
	return err
}

// direction shows the policies that isolate a pod: "open" is the absence of any. Those of a pod that is unenforceable are loaded and
// hold for what does not stay on its bridge.
func direction(p reconcile.PodStatus, policies []string) string {
	switch {
	case p.State != reconcile.StateEnforced && p.State != reconcile.StateHidden:
		return "closed"
	case policies == nil:
		return "open"
	}
	return strings.Join(policies, ",")
}

func showPolicies(ctx context.Context, c *cli.Call) error {
	_, err := ask(ctx, c, "policies", noQuery, func(w io.Writer, policies []reconcile.PolicyStatus) error {
		t := newTable(w)
		t.row("POLICY", "PODS ON THIS NODE", "PROBLEMS")
		for _, p := range policies {
			t.row(p.Namespace+"/"+p.Name, strings.Join(p.Pods, ","), strings.Join(p.Problems, "; "))
		}
		return t.Flush()
	})
	return err
}

func showRuleset(ctx context.Context, c *cli.Call) error {
	kernel := c.Flags.Bool("kernel", false, "print what the kernel has loaded")
	diff := c.Flags.Bool("diff", false, "print what would make the kernel's ruleset right; exit code 3 if there is anything")
	query := func() url.Values {
		switch {
		case *diff:
			return url.Values{"of": {"diff"}}
		case *kernel:
			return url.Values{"of": {"kernel"}}
		}
		return nil
	}
	answer, err := ask(ctx, c, "ruleset", query, func(w io.Writer, v rulesetView) error {
		for _, line := range v.Diff {
			if _, err := fmt.Fprintln(w, line); err != nil {
				return err
			}
		}
		_, err := io.WriteString(w, v.Ruleset)
		return err
	})
	if err == nil && len(answer.Diff) > 0 {
		return cli.ErrNo
	}
	return err
}

// showHealth asks the daemon of its own container if there is one, else whoever writes on this node. Nobody else can answer for
// whether this container's daemon lives.
func showHealth(ctx context.Context, c *cli.Call) error {
	socket := c.Flags.String("socket", agentapi.DefaultSocket, "`PATH` of the daemon's socket")
	output := c.Flags.String("o", "table", "output as `table|json`")
	live := c.Flags.Bool("live", false, "ask whether the daemon of this container makes progress, whatever it has to wait for")
	if err := c.Parse(); err != nil {
		return err
	}
	if *output != "table" && *output != "json" {
		return usage("-o %q: must be one of table, json", *output)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	path := "/readyz"
	if *live {
		path = "/livez"
	}
	err := askOwnHealth(ctx, ownHealth(*socket), path)
	if errors.Is(err, syscall.ECONNREFUSED) && !*live {
		err = agentapi.NewClient(*socket).Status(ctx)
	}
	switch {
	case *output == "json":
		answer := map[string]any{"healthy": err == nil}
		if err != nil {
			answer["reason"] = err.Error()
		}
		return errors.Join(err, json.NewEncoder(c.Stdout).Encode(answer))
	case err != nil:
		return err
	}
	_, err = fmt.Fprintln(c.Stdout, "ok")
	return err
}

func askOwnHealth(ctx context.Context, address, path string) error {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", address)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://podwalld"+path, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the daemon of this container: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	reason, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if path == "/livez" {
		return fmt.Errorf("hung: %s", strings.TrimSpace(string(reason)))
	}
	return fmt.Errorf("not ready: %s", strings.TrimSpace(string(reason)))
}

// tableWriter aligns columns.
type tableWriter struct{ *tabwriter.Writer }

func newTable(w io.Writer) tableWriter {
	return tableWriter{tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)}
}

func (t tableWriter) row(cells ...any) {
	text := make([]string, len(cells))
	for i, c := range cells {
		text[i] = fmt.Sprint(c)
	}
	_, _ = fmt.Fprintln(t, strings.Join(text, "\t"))
}

func join(ips []netip.Addr) string {
	text := make([]string, len(ips))
	for i, ip := range ips {
		text[i] = ip.String()
	}
	return strings.Join(text, ",")
}
