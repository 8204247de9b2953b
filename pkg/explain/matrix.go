package explain

import (
	"errors"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
)

// MostPairs bounds a matrix: more is neither to be read nor to be computed while somebody waits.
const MostPairs = 10_000

// Matrix says who may reach whom.
type Matrix struct {
	Port  string   `json:"port,omitempty"` // empty: every port
	Pods  []string `json:"pods"`
	Pairs []Pair   `json:"pairs"` // sorted by from, then to
}

// Pair is one cell. Of a pair with several addresses all have to be allowed.
type Pair struct {
	From    string `json:"from"`
	To      string `json:"to"`
	Allowed bool   `json:"allowed"`         // without a port: on some port
	Ports   string `json:"ports,omitempty"` // without a port: those that are allowed, "all", or by family if they differ
}

// Matrix judges every pair of pods: of the namespaces that are named, else of this node, else of all that there are. A nil port asks for all
// that is allowed.
func (a *Asker) Matrix(namespaces []string, port *Port) (*Matrix, error) {
	var parties []*party
	for _, name := range a.names(namespaces) {
		p, err := a.party(name)
		if err != nil {
			return nil, err
		}
		parties = append(parties, p)
	}
	if n := len(parties) * len(parties); n > MostPairs {
		return nil, fmt.Errorf("%d pods are %d pairs, more than %d: name one or a few namespaces with --namespace", len(parties), n, MostPairs)
	}
	if parties == nil && len(namespaces) > 0 {
		return nil, fmt.Errorf("no pod is known in namespace %s; podwalld pods lists those of this node", strings.Join(namespaces, ", "))
	}
	m := &Matrix{Pods: []string{}, Pairs: []Pair{}}
	if port != nil {
		m.Port = port.String()
	}
	for _, from := range parties {
		m.Pods = append(m.Pods, from.name)
		for _, to := range parties {
			if from != to {
				m.Pairs = append(m.Pairs, a.pair(from, to, port))
			}
		}
	}
	return m, nil
}

// names are the pods of a matrix. Those on their host's network, and those that are over, are not subject to policies.
func (a *Asker) names(namespaces []string) []string {
	var names []string
	for name, list := range a.endpoints {
		namespace, _, _ := strings.Cut(name, "/")
		named := strings.Contains(name, "/") && list[0].IPs != nil
		if named && (len(namespaces) == 0 || slices.Contains(namespaces, namespace)) {
			names = append(names, name)
		}
	}
	if len(namespaces) > 0 || a.world.Node == "" {
		for pod := range a.world.Model.Pods() {
			if a.endpoints[nameOf(pod)] == nil && isSubject(pod) && (len(namespaces) == 0 || slices.Contains(namespaces, pod.Namespace)) {
				names = append(names, nameOf(pod))
			}
		}
	}
	slices.Sort(names)
	return names
}

func isSubject(pod *cluster.Pod) bool { return !pod.HostNetwork && !pod.Terminal }

func (a *Asker) pair(from, to *party, port *Port) Pair {
	p := Pair{From: from.name, To: to.name}
	list := flows(from, to)
	if port != nil {
		p.Allowed = list != nil && !slices.ContainsFunc(list, func(f policy.Flow) bool {
			f.Proto, f.Port = port.Proto, port.Number
			return !a.x.Explain(f).Allowed
		})
		return p
	}
	var texts, families []string
	for _, f := range list {
		ports := a.x.Ports(f)
		p.Allowed = p.Allowed || !ports.Empty()
		text := ports.String()
		family := "IPv6"
		if f.From.IP.Is4() || f.To.IP.Is4() {
			family = "IPv4"
		}
		texts = append(texts, text)
		families = append(families, text+" ("+family+")")
	}
	switch distinct := slices.Compact(slices.Clone(texts)); {
	case len(distinct) > 1:
		p.Ports = strings.Join(families, " ")
	case len(distinct) == 1 && p.Allowed:
		p.Ports = distinct[0]
	}
	return p
}

// cell is what a table shows of a pair.
func (m *Matrix) cell(p *Pair) string {
	switch {
	case !p.Allowed:
		return "-"
	case m.Port == "":
		return p.Ports
	}
	return "yes"
}

// rows yields the pods with their cells, empty for a pod and itself.
func (m *Matrix) rows() [][]string {
	next := 0
	var rows [][]string
	for i, name := range m.Pods {
		row := []string{name}
		for j := range m.Pods {
			if i == j {
				row = append(row, "")
				continue
			}
			row = append(row, m.cell(&m.Pairs[next]))
			next++
		}
		rows = append(rows, row)
	}
	return rows
}

func (m *Matrix) title() string {
	if m.Port == "" {
		return "ports that policies allow"
	}
	return "allowed on " + m.Port
}

// Formats are the ways to write a matrix, beside JSON.
var Formats = map[string]func(*Matrix, io.Writer) error{"table": (*Matrix).table, "html": (*Matrix).html, "dot": (*Matrix).dot, "mermaid": (*Matrix).mermaid}

func (m *Matrix) table(w io.Writer) error {
	if len(m.Pods) == 0 {
		_, err := fmt.Fprintln(w, "no pods")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	_, err := fmt.Fprintf(t, "%s\n", strings.Join(append([]string{"FROM \\ TO"}, m.Pods...), "\t"))
	for _, row := range m.rows() {
		_, e := fmt.Fprintln(t, strings.TrimRight(strings.Join(row, "\t"), "\t"))
		err = errors.Join(err, e)
	}
	return errors.Join(err, t.Flush())
}

var page = template.Must(template.New("matrix").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>podwall: {{.Title}}</title>
<style>
body { font-family: sans-serif }
table { border-collapse: collapse }
th, td { border: 1px solid #999; padding: 2px 6px; text-align: center }
th { text-align: left; white-space: nowrap }
thead th { writing-mode: vertical-rl }
.yes { background: #bfb }
.no { background: #fbb }
</style>
</head>
<body>
<h1>{{.Title}}</h1>
<table>
<thead><tr><th></th>{{range .Pods}}<th>{{.}}</th>{{end}}</tr></thead>
<tbody>
{{range .Rows}}<tr>{{range $i, $cell := .}}{{if eq $i 0}}<th>{{$cell}}</th>{{else if eq $cell ""}}<td></td>{{else if eq $cell "-"}}<td class="no">-</td>{{else}}<td class="yes">{{$cell}}</td>{{end}}{{end}}</tr>
{{end}}</tbody>
</table>
</body>
</html>
`))

func (m *Matrix) html(w io.Writer) error {
	return page.Execute(w, map[string]any{"Title": m.title(), "Pods": m.Pods, "Rows": m.rows()})
}

// graph writes the allowed pairs as edges of a graph.
func (m *Matrix) graph(w io.Writer, head, tail string, node func(i int, name string) string, edge func(from, to int, label string) string) error {
	index := map[string]int{}
	var b strings.Builder
	b.WriteString(head)
	for i, name := range m.Pods {
		index[name] = i
		b.WriteString(node(i, name))
	}
	for i := range m.Pairs {
		if p := &m.Pairs[i]; p.Allowed {
			b.WriteString(edge(index[p.From], index[p.To], p.Ports))
		}
	}
	b.WriteString(tail)
	_, err := io.WriteString(w, b.String())
	return err
}

var (
	dotQuote     = strings.NewReplacer(`\`, `\\`, `"`, `\"`)
	mermaidQuote = strings.NewReplacer(`"`, "#quot;", "<", "#lt;", ">", "#gt;")
)

func (m *Matrix) dot(w io.Writer) error {
	return m.graph(w, fmt.Sprintf("digraph podwall {\n  label=\"%s\";\n", m.title()), "}\n",
		func(i int, name string) string {
			return fmt.Sprintf("  n%d [label=\"%s\"];\n", i, dotQuote.Replace(name))
		},
		func(from, to int, label string) string {
			if label == "" {
				return fmt.Sprintf("  n%d -> n%d;\n", from, to)
			}
			return fmt.Sprintf("  n%d -> n%d [label=\"%s\"];\n", from, to, dotQuote.Replace(label))
		})
}

func (m *Matrix) mermaid(w io.Writer) error {
	return m.graph(w, "flowchart LR\n", "",
		func(i int, name string) string { return fmt.Sprintf("  n%d[\"%s\"]\n", i, mermaidQuote.Replace(name)) },
		func(from, to int, label string) string {
			if label == "" {
				return fmt.Sprintf("  n%d --> n%d\n", from, to)
			}
			return fmt.Sprintf("  n%d -->|\"%s\"| n%d\n", from, mermaidQuote.Replace(label), to)
		})
}
