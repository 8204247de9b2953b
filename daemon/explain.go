package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/cli"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/explain"
	"github.com/podwall/podwall/pkg/reconcile"
	"github.com/podwall/podwall/pkg/registry"
)

const explainAbout = `say whether policies allow a connection, and which rule decides

Usage: podwalld explain [flags] FROM TO PORT[/PROTO]

FROM and TO are namespace/pod or an IP address. PROTO is tcp (the default), udp or sctp; for ping write icmp instead of the port. The port
is the receiving pod's own, not that of a Service in front of it. Rules are counted from 0, as in spec.ingress[0].

  podwalld explain shop/web shop/db 5432
  podwalld explain shop/web 8.8.8.8 53/udp
  podwalld explain --manifests ./policies shop/web shop/db icmp

The daemon of this node answers for every pod of the cluster. With --manifests it is the files of a directory, and no daemon is needed: a
pod's address is its status.podIPs; without one it is judged by selectors

Exit codes: 0 allowed, 3 denied, 1 failed, 2 usage`

const matrixAbout = `show who may reach whom

Usage: podwalld matrix [flags] [PORT[/PROTO]]

A cell is what policies allow on that port or, without PORT, all ports that they allow: "all" is everything with ping, "*/udp" all of one
protocol, "-" nothing. The pods are those of this node, those of the namespaces that --namespace names on any node, or those of --manifests.

  podwalld matrix 8080
  podwalld matrix --namespace shop,bank -o html >matrix.html
  podwalld matrix --manifests ./policies -o mermaid

Exit codes: 0 ok, 1 failed, 2 usage`

const lintAbout = `find mistakes in a directory of policies, before they are applied

Usage: podwalld lint [flags] DIR

It reports, as file:line, what cannot be read or used as written, policies and rules that match no pod or namespace of the directory, port
names that no pod has, blocks that do not mean what they say, and pods that may not ask for names. It needs no daemon and no cluster.

  podwalld lint ./policies

DIR may be given by --manifests instead. Without either it is PODWALL_MANIFESTS.

Exit codes: 0 no findings, 3 findings, 1 failed, 2 usage`

// inquiry is the command line of an operator's question that has arguments.
type inquiry struct {
	socket, manifests, output string
	namespaces                string
	arguments                 []string
}

// ask reads a command line. cli takes flags only, and takes them from the environment as well: what is not a flag is put aside before.
func (q *inquiry) ask(c *cli.Call, about string, args []string, formats []string, flags func(*flag.FlagSet)) error {
	define := func(fs *flag.FlagSet) {
		fs.StringVar(&q.output, "o", "table", "output as `"+strings.Join(formats, "|")+"`")
		fs.StringVar(&q.manifests, "manifests", "", "ask the files in `DIR`, no daemon")
		flags(fs)
	}
	args, q.arguments = split(args, define)
	call := cli.NewCall(c.Flags.Name(), about, args, c.Stdout, c.Stderr)
	define(call.Flags)
	if err := call.Parse(); err != nil {
		return err
	}
	if !slices.Contains(formats, q.output) {
		return usage("-o %q: must be one of %s", q.output, strings.Join(formats, ", "))
	}
	return nil
}

func (q *inquiry) socketFlag(fs *flag.FlagSet) {
	fs.StringVar(&q.socket, "socket", agentapi.DefaultSocket, "`PATH` of the daemon's socket")
}

func usage(format string, args ...any) error {
	return cli.UsageError{Err: fmt.Errorf(format, args...)}
}

// split separates flags from arguments, which may stand between them. After "--" there are only arguments.
func split(args []string, define func(*flag.FlagSet)) ([]string, []string) {
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	define(fs)
	var flags, rest []string
	for {
		if err := fs.Parse(args); err != nil {
			return append(flags, args...), rest // the call finds it again and reports it
		}
		parsed := args[:len(args)-fs.NArg()]
		if n := len(parsed); n > 0 && parsed[n-1] == "--" {
			return append(flags, parsed[:n-1]...), append(rest, fs.Args()...)
		}
		flags = append(flags, parsed...)
		if fs.NArg() == 0 {
			return flags, rest
		}
		rest, args = append(rest, fs.Arg(0)), fs.Args()[1:]
	}
}

// answer is the daemon's, or with --manifests that of the files.
func answer[T any](ctx context.Context, q *inquiry, view string, query url.Values, ofFiles func(*explain.Asker) (*T, error)) (*T, error) {
	if q.manifests != "" {
		d, err := readDirectory(ctx, q.manifests)
		if err != nil {
			return nil, err
		}
		return ofFiles(explain.NewAsker(explain.World{Model: d.Model}))
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	v := new(T)
	return v, agentapi.NewClient(q.socket).View(ctx, view, query, v)
}

// readDirectory refuses a directory that is not understood in full: an answer from the rest would be another one's.
func readDirectory(ctx context.Context, dir string) (*cluster.Directory, error) {
	d, err := cluster.ReadDirectory(ctx, dir)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, p := range d.Problems {
		if !p.Warning {
			errs = append(errs, errors.New(p.String()))
		}
	}
	if errs != nil {
		return nil, fmt.Errorf("--manifests %s has files that cannot be read as they are; podwalld lint %s shows all that is wrong: %w", dir, dir, errors.Join(errs...))
	}
	return d, nil
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// explainConnection is `podwalld explain`; args is its command line.
func explainConnection(ctx context.Context, c *cli.Call, args []string) error {
	var q inquiry
	if err := q.ask(c, explainAbout, args, []string{"table", "json"}, q.socketFlag); err != nil {
		return err
	}
	if len(q.arguments) != 3 {
		return usage("want FROM TO PORT[/PROTO], for example shop/web shop/db 5432, found %d arguments; see podwalld explain --help", len(q.arguments))
	}
	from, to := q.arguments[0], q.arguments[1]
	port, err := explain.ParsePort(q.arguments[2])
	if err := errors.Join(explain.CheckParty(from), explain.CheckParty(to), err); err != nil {
		return cli.UsageError{Err: err}
	}
	query := url.Values{"from": {from}, "to": {to}, "port": {port.String()}}
	a, err := answer(ctx, &q, "explain", query, func(x *explain.Asker) (*explain.Answer, error) { return x.Explain(from, to, port) })
	if err != nil {
		return err
	}
	if q.output == "json" {
		err = writeJSON(c.Stdout, a)
	} else {
		_, err = io.WriteString(c.Stdout, a.Text())
	}
	if err == nil && !a.Allowed {
		return cli.ErrNo
	}
	return err
}

// showMatrix is `podwalld matrix`.
func showMatrix(ctx context.Context, c *cli.Call, args []string) error {
	var q inquiry
	formats := append([]string{"json"}, slices.Sorted(maps.Keys(explain.Formats))...)
	if err := q.ask(c, matrixAbout, args, formats, func(fs *flag.FlagSet) {
		q.socketFlag(fs)
		fs.StringVar(&q.namespaces, "namespace", "", "only pods of these `NAMESPACES`, separated by commas")
	}); err != nil {
		return err
	}
	query := url.Values{"namespace": {q.namespaces}}
	var port *explain.Port
	switch len(q.arguments) {
	case 0:
	case 1:
		p, err := explain.ParsePort(q.arguments[0])
		if err != nil {
			return cli.UsageError{Err: err}
		}
		port = &p
		query.Set("port", p.String())
	default:
		return usage("want one PORT[/PROTO] or none, found %d arguments; see podwalld matrix --help", len(q.arguments))
	}
	m, err := answer(ctx, &q, "matrix", query, func(x *explain.Asker) (*explain.Matrix, error) { return x.Matrix(commas(q.namespaces), port) })
	if err != nil {
		return err
	}
	if q.output == "json" {
		return writeJSON(c.Stdout, m)
	}
	return explain.Formats[q.output](m, c.Stdout)
}

func commas(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// lintDirectory is `podwalld lint`.
func lintDirectory(ctx context.Context, c *cli.Call, args []string) error {
	var q inquiry
	if err := q.ask(c, lintAbout, args, []string{"table", "json"}, func(*flag.FlagSet) {}); err != nil {
		return err
	}
	dir := q.manifests // or what the environment says, which DIR goes before
	switch {
	case len(q.arguments) == 1 && (dir == "" || dir == q.arguments[0] || dir == os.Getenv("PODWALL_MANIFESTS")):
		dir = q.arguments[0]
	case len(q.arguments) > 0 || dir == "":
		return usage("want one DIR of manifests; see podwalld lint --help")
	}
	d, err := cluster.ReadDirectory(ctx, dir)
	if err != nil {
		return err
	}
	report := explain.Lint(d)
	if q.output == "json" {
		err = writeJSON(c.Stdout, report)
	} else {
		err = printReport(c.Stdout, report)
	}
	if err == nil && len(report.Findings) > 0 {
		return cli.ErrNo
	}
	return err
}

func printReport(w io.Writer, r *explain.Report) error {
	var b strings.Builder
	for i := range r.Findings {
		fmt.Fprintln(&b, r.Findings[i].String())
	}
	if len(r.Findings) == 0 {
		fmt.Fprintln(&b, "no findings")
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// withQuestions adds the questions to the daemon's views.
func withQuestions(cfg *config, loop *reconcile.Loop, views map[string]agentapi.View) map[string]agentapi.View {
	views["explain"] = func(_ context.Context, v url.Values) (any, error) {
		port, err := explain.ParsePort(v.Get("port"))
		if err != nil {
			return nil, agentapi.Errorf(agentapi.CodeDecodingFailure, "%v", err)
		}
		return asked(cfg, loop, func(x *explain.Asker) (any, error) { return x.Explain(v.Get("from"), v.Get("to"), port) })
	}
	views["matrix"] = func(_ context.Context, v url.Values) (any, error) {
		var port *explain.Port
		if s := v.Get("port"); s != "" {
			p, err := explain.ParsePort(s)
			if err != nil {
				return nil, agentapi.Errorf(agentapi.CodeDecodingFailure, "%v", err)
			}
			port = &p
		}
		return asked(cfg, loop, func(x *explain.Asker) (any, error) { return x.Matrix(commas(v.Get("namespace")), port) })
	}
	return views
}

// asked answers one question by what the loop enforces now. What can go wrong is the question's fault: somebody who is not known.
func asked(cfg *config, loop *reconcile.Loop, f func(*explain.Asker) (any, error)) (any, error) {
	addresses, err := registry.Links{}.Addresses()
	if err != nil {
		return nil, fmt.Errorf("list the addresses of this node: %w", err)
	}
	in := loop.Snapshot()
	answer, err := f(explain.NewAsker(explain.World{Model: in.Model, Endpoints: in.Endpoints, Options: in.Options, Node: cfg.nodeName, Addresses: addresses}))
	if err != nil {
		return nil, agentapi.Errorf(agentapi.CodeDecodingFailure, "%v", err)
	}
	return answer, nil
}
