package explain

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/policy"
)

// Levels of findings.
const (
	LevelError   = "error"   // it cannot be used as it is written
	LevelWarning = "warning" // it does nothing, or not what it seems to do
	LevelHint    = "hint"    // it may not be what was meant
)

// Finding is something that the author of a manifest should look at.
type Finding struct {
	File   string `json:"file"`
	Line   int    `json:"line,omitempty"`
	Level  string `json:"level"`
	Object string `json:"object,omitempty"` // "NetworkPolicy shop/web"
	Reason string `json:"reason"`
}

// String returns "file:line: level: object: reason".
func (f *Finding) String() string {
	place := f.File
	if f.Line > 0 {
		place += ":" + strconv.Itoa(f.Line)
	}
	text := place + ": " + f.Level + ": "
	if f.Object != "" {
		text += f.Object + ": "
	}
	return text + f.Reason
}

// Report is what Lint has found.
type Report struct {
	Findings []Finding `json:"findings"`
	Notes    []string  `json:"notes,omitempty"` // what was not looked at
}

// Lint looks at a directory of manifests.
func Lint(d *cluster.Directory) *Report {
	l := linter{definitions: map[cluster.Key]*cluster.Definition{}}
	var namespaces []string
	for i := range d.Definitions {
		def := &d.Definitions[i]
		l.definitions[def.Object.Key()] = def
		if key := def.Object.Key(); key.Kind == cluster.KindNamespace {
			namespaces = append(namespaces, key.Name)
		}
	}
	for _, p := range d.Problems {
		level := LevelError
		if p.Warning {
			level = LevelWarning
		}
		l.list = append(l.list, Finding{File: p.File, Line: p.Line, Level: level, Reason: p.Reason})
	}
	for _, p := range policy.Render(policy.Input{Model: d.Model, Options: policy.Options{Table: "podwall"}}).Problems {
		if !l.unreadable(p.Object) {
			l.add(p.Object, LevelError, p.Reason, placeOf(p.Reason)...)
		}
	}
	in := policy.NewInspector(d.Model, namespaces)
	for p := range d.Model.Policies() {
		for _, r := range in.Inspect(p) {
			l.add(p.Key(), LevelWarning, remarkText(&r), remarkPlace(&r)...)
		}
	}
	for key, pods := range in.WithoutDNS() {
		whose := "egress of the pods that it selects"
		if len(pods) > 0 {
			whose = "egress of " + shortList(pods)
		}
		l.add(key, LevelHint, whose+" is isolated and no rule lets them ask for names (UDP and TCP port 53): add a rule to the cluster's DNS; for a DNS cache on the node "+
			"(NodeLocal DNS) that is an ipBlock of its address, or podwalld run --node-dns", "spec")
	}
	report := &Report{Findings: l.sorted()}
	if !in.HasPods() {
		report.Notes = append(report.Notes, "there are no pods here: whether selectors and port names match any was not looked at")
	}
	if d.Foreign > 0 {
		report.Notes = append(report.Notes, fmt.Sprintf("objects of other kinds were not looked at: %d", d.Foreign))
	}
	return report
}

type linter struct {
	definitions map[cluster.Key]*cluster.Definition
	list        []Finding
}

// unreadable reports whether the parser has said why an object cannot be read.
func (l *linter) unreadable(k cluster.Key) bool {
	def := l.definitions[k]
	if def == nil {
		return false
	}
	p, ok := def.Object.(*cluster.Policy)
	return ok && p.Unreadable != ""
}

func (l *linter) add(k cluster.Key, level, reason string, at ...any) {
	f := Finding{Level: level, Object: k.String(), Reason: reason}
	if def := l.definitions[k]; def != nil {
		f.File, f.Line = def.File, def.LineOf(at...)
	}
	l.list = append(l.list, f)
}

func (l *linter) sorted() []Finding {
	slices.SortFunc(l.list, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Level, b.Level), cmp.Compare(a.Object, b.Object), cmp.Compare(a.Reason, b.Reason))
	})
	return append([]Finding{}, slices.Compact(l.list)...)
}

// place of a policy's problem: pkg/policy begins its reasons with it.
var place = regexp.MustCompile(`^(ingress|egress) rule (\d+)(?:, (peer|port) (\d+))?: `)

func placeOf(reason string) []any {
	m := place.FindStringSubmatch(reason)
	switch {
	case strings.HasPrefix(reason, "podSelector: "):
		return []any{"spec", "podSelector"}
	case strings.HasPrefix(reason, "unknown policyType"):
		return []any{"spec", "policyTypes"}
	case m == nil:
		return nil
	}
	number := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil {
			return -1
		}
		return n
	}
	r := policy.Remark{Direction: m[1], Rule: number(m[2]), Peer: -1, Port: -1}
	switch m[3] {
	case "peer":
		r.Peer = number(m[4])
	case "port":
		r.Port = number(m[4])
	}
	return remarkPlace(&r)
}

func remarkPlace(r *policy.Remark) []any {
	if r.Direction == "" {
		return []any{"spec"}
	}
	at := []any{"spec", r.Direction, r.Rule}
	switch {
	case r.Port >= 0:
		return append(at, "ports", r.Port)
	case r.Peer >= 0 && r.Direction == "ingress":
		return append(at, "from", r.Peer)
	case r.Peer >= 0:
		return append(at, "to", r.Peer)
	}
	return at
}

func remarkText(r *policy.Remark) string {
	switch {
	case r.Direction == "":
		return r.Reason
	case r.Peer >= 0:
		return fmt.Sprintf("%s rule %d, peer %d: %s", r.Direction, r.Rule, r.Peer, r.Reason)
	case r.Port >= 0:
		return fmt.Sprintf("%s rule %d, port %d: %s", r.Direction, r.Rule, r.Port, r.Reason)
	}
	return fmt.Sprintf("%s rule %d: %s", r.Direction, r.Rule, r.Reason)
}

// shortList names at most three.
func shortList(names []string) string {
	if len(names) <= 3 {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more pods", strings.Join(names[:3], ", "), len(names)-3)
}
