package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/cli"
	"github.com/podwall/podwall/pkg/reconcile"
)

func TestExitCodes(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "missing.sock")
	for _, tt := range []struct {
		name string
		args []string
		code int
		text string // in the output
	}{
		{"nothing", nil, cli.Usage, "Commands:"},
		{"help", []string{"help"}, cli.OK, "Exit codes:"},
		{"help of a command", []string{"run", "--help"}, cli.OK, "-own-node-egress"},
		{"unknown command", []string{"walk"}, cli.Usage, `unknown command "walk"`},
		{"unknown flag", []string{"pods", "--nope"}, cli.Usage, "see podwalld pods --help"},
		{"stray argument", []string{"pods", "web"}, cli.Usage, `unexpected argument "web"`},
		{"bad output", []string{"pods", "-o", "xml"}, cli.Usage, "must be table or json"},
		{"version", []string{"version"}, cli.OK, "podwalld"},
		{"version as a flag", []string{"--version"}, cli.OK, "podwalld"},
		{"no daemon", []string{"pods", "--socket", missing}, cli.Failed, missing},
		{"no daemon, health", []string{"health", "--socket", missing}, cli.Failed, missing},
		{"health in another form", []string{"health", "-o", "xml"}, cli.Usage, "must be one of table, json"},
		{"two sources", []string{"run", "--manifests", "/x", "--kubeconfig", "/y"}, cli.Usage, "exclude each other"},
		{"relative socket", []string{"run", "--socket", "x.sock"}, cli.Usage, "absolute path"},
		{"relative state", []string{"run", "--state-dir", "x"}, cli.Usage, "absolute path"},
		{"bad table", []string{"run", "--table", "a b"}, cli.Usage, "--table"},
		{"bad choice", []string{"run", "--deny", "maybe"}, cli.Usage, "drop or reject"},
		{"bad listen", []string{"run", "--listen", "9481"}, cli.Usage, "HOST:PORT"},
		{"bad address", []string{"run", "--node-dns", "1.2.3"}, cli.Usage, "not an IP address"},
		{"bad level", []string{"run", "--log-level", "loud"}, cli.Usage, "log-level"},
		{"several at once", []string{"run", "--deny", "x", "--log-format", "y"}, cli.Usage, "--log-format"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			if code := run(t.Context(), tt.args, &out, &out); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if !strings.Contains(out.String(), tt.text) {
				t.Errorf("output lacks %q:\n%s", tt.text, &out)
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("PODWALL_DENY", "maybe")
	t.Setenv("PODWALL_NODE_DNS", "169.254.20.10,fd00::a")
	var out bytes.Buffer
	if code := run(t.Context(), []string{"run"}, &out, &out); code != cli.Usage || !strings.Contains(out.String(), "--deny") {
		t.Errorf("PODWALL_DENY was not read: %d\n%s", code, &out)
	}
	var cfg config
	c := testCall(&out, "--deny", "reject")
	cfg.flags(c.Flags)
	if err := errors.Join(c.Parse(), cfg.complete()); err != nil {
		t.Fatal(err)
	}
	opts := cfg.options()
	if !opts.Reject || len(opts.NodeDNS) != 2 || opts.NodeDNS[1] != netip.MustParseAddr("fd00::a") {
		t.Errorf("the command line must win and lists be split: %+v", opts)
	}
	t.Setenv("PODWALL_NODE_DNS", "nonsense")
	c = testCall(&out)
	cfg.flags(c.Flags)
	if err := c.Parse(); err == nil || !strings.Contains(err.Error(), "PODWALL_NODE_DNS") {
		t.Errorf("parse: %v, want an error that names the variable", err)
	}
}

func testCall(out *bytes.Buffer, args ...string) *cli.Call {
	return cli.NewCall("podwalld run", "", args, out, out)
}

func TestNodeName(t *testing.T) {
	t.Setenv("NODE_NAME", "node-7")
	cfg := config{socket: "/s", stateDir: "/d", table: "podwall", ownNodeEgress: "enforce", established: "cut", deny: "drop", logFormat: "text"}
	if err := cfg.complete(); err != nil || cfg.nodeName != "node-7" {
		t.Errorf("node name %q, %v", cfg.nodeName, err)
	}
	t.Setenv("NODE_NAME", "")
	cfg.nodeName = ""
	host, _ := os.Hostname()
	if err := cfg.complete(); err != nil || cfg.nodeName != strings.ToLower(host) {
		t.Errorf("node name %q, %v, want the hostname", cfg.nodeName, err)
	}
}

func TestCodes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err  error
		code uint
	}{
		{reconcile.ErrIdentity, agentapi.CodeInvalidEnvironment},
		{reconcile.ErrNoHostLink, agentapi.CodeNoHostLink},
		{reconcile.ErrNotReady, agentapi.CodeTryAgainLater},
		{reconcile.ErrUnknown, agentapi.CodeRefused},
		{reconcile.ErrRefused, agentapi.CodeRefused},
		{os.ErrPermission, agentapi.CodeInternal},
	} {
		var e *agentapi.Error
		if err := coded(fmt.Errorf("pod x: %w", tt.err), agentapi.CodeTryAgainLater); !errors.As(err, &e) || e.Code != tt.code {
			t.Errorf("%v became %v, want code %d", tt.err, err, tt.code)
		}
	}
	if err := coded(nil, agentapi.CodeInternal); err != nil {
		t.Errorf("no error became %v", err)
	}
}

// fakeAgent answers as a daemon with nothing on it would.
type fakeAgent struct{ err error }

func (f fakeAgent) Attach(context.Context, attach.Attachment) error { return f.err }
func (f fakeAgent) Detach(context.Context, attach.Key) error        { return f.err }
func (f fakeAgent) Check(context.Context, attach.Key) (attach.Attachment, error) {
	return attach.Attachment{}, f.err
}
func (f fakeAgent) GC(context.Context, string, []attach.Key) error { return f.err }
func (f fakeAgent) Status(context.Context) error                   { return f.err }

// TestOperator asks a real socket with canned views: what is printed, and the exit code of drift.
func TestOperator(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("the socket answers root only")
	}
	dir, err := os.MkdirTemp("/tmp", "podwalld") // socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "run", "s.sock")
	views := map[string]agentapi.View{
		"node": func(context.Context, url.Values) (any, error) {
			return reconcile.NodeStatus{Ready: true, Node: "n1", Enforced: 2, Problems: []string{"NetworkPolicy a/b: bad"}, Error: "commit: refused"}, nil
		},
		"pods": func(context.Context, url.Values) (any, error) {
			return []reconcile.PodStatus{
				{Namespace: "a", Name: "web", State: reconcile.StateEnforced, Ingress: []string{"a/deny"}, Link: "veth1", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
				{Namespace: "a", Name: "new", State: reconcile.StateQuarantined, Reason: "not known"},
			}, nil
		},
		"policies": func(context.Context, url.Values) (any, error) {
			return []reconcile.PolicyStatus{{Namespace: "a", Name: "deny", Pods: []string{"a/web"}}}, nil
		},
		"ruleset": func(_ context.Context, q url.Values) (any, error) {
			if q.Get("of") == "diff" {
				return rulesetView{Diff: []string{"add chain inet podwall egress"}}, nil
			}
			return rulesetView{Ruleset: "table inet podwall {\n}\n"}, nil
		},
	}
	log := slog.New(slog.DiscardHandler)
	ln, err := agentapi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- agentapi.Serve(ctx, ln, agentapi.NewHandler(fakeAgent{}, views, log), log) }()
	t.Cleanup(func() { cancel(); _ = <-done })

	for _, tt := range []struct {
		args  []string
		code  int
		texts []string
	}{
		{[]string{"status"}, cli.OK, []string{"n1", "NetworkPolicy a/b: bad", "commit: refused"}},
		{[]string{"pods"}, cli.OK, []string{"a/web", "10.0.0.1", "a/deny", "open", "quarantined (not known)", "closed"}},
		{[]string{"policies"}, cli.OK, []string{"a/deny", "a/web"}},
		{[]string{"ruleset"}, cli.OK, []string{"table inet podwall"}},
		{[]string{"ruleset", "--kernel"}, cli.OK, []string{"table inet podwall"}},
		{[]string{"ruleset", "--diff"}, cli.No, []string{"add chain"}},
		{[]string{"ruleset", "--diff", "-o", "json"}, cli.No, []string{"add chain"}},
		{[]string{"health"}, cli.OK, []string{"ok"}},
		{[]string{"health", "-o", "json"}, cli.OK, []string{`"healthy":true`}},
	} {
		var out bytes.Buffer
		if code := run(t.Context(), append(tt.args, "--socket", socket), &out, &out); code != tt.code {
			t.Errorf("%v: exit code %d, want %d", tt.args, code, tt.code)
		}
		for _, text := range tt.texts {
			if !strings.Contains(out.String(), text) {
				t.Errorf("%v: output lacks %q:\n%s", tt.args, text, &out)
			}
		}
	}
	var out bytes.Buffer
	run(t.Context(), []string{"pods", "-o", "json", "--socket", socket}, &out, &out)
	var pods []reconcile.PodStatus
	if err := json.Unmarshal(out.Bytes(), &pods); err != nil || len(pods) != 2 || pods[1].Ingress != nil {
		t.Errorf("JSON: %v\n%s", err, &out)
	}
}
