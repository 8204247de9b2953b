package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/podwall/podwall/tests/bench/result"
)

// What a packet of an established connection, and a new connection, may cost: ratios to the baseline. Those of a packet are meant
// end to end.
const (
	packetLimit, packetWanted = 1.09, 1.06
	connectionLimit           = 1.06
	mostNoise                 = 0.06 // a run that is noisier than that shows nothing, and may miss
)

// variants are all rulesets of one node, by what they are for.
type variants struct {
	all     []*variant
	bySize  map[size]*variant
	parts   []*variant
	ipv6    *variant
	control *variant
}

func newVariants(sizes []size) *variants {
	v := &variants{bySize: map[size]*variant{}}
	add := func(x *variant) *variant {
		v.all = append(v.all, x)
		return x
	}
	base := func(names ...string) func(string) bool {
		return func(name string) bool {
			for _, n := range names {
				if name == n || strings.HasSuffix(n, "_") && strings.HasPrefix(name, n) {
					return true
				}
			}
			return false
		}
	}
	for _, s := range sizes {
		v.bySize[s] = add(&variant{label: fmt.Sprintf("%d peers, %d policies", s.peers, s.policies), size: s, policy: true, source: true})
	}
	v.parts = []*variant{
		add(&variant{label: "floor: all base chains, without rules", size: shape, empty: true}),
		add(&variant{label: "the base chain on forward only", size: shape, keep: base("forward"), policy: true}),
		add(&variant{label: "the veths' chains only", size: shape, keep: base("as_", "to_"), source: true}),
	}
	v.ipv6 = add(&variant{label: "everything, IPv6", size: shape, family: 1, policy: true, source: true})
	v.control = add(&variant{label: "control: 1,000 rules one by one", linear: 1000})
	return v
}

// connectionRatio is that column; its spread is the next one.
const connectionRatio = 7

// row is the figures of one variant as a row of a table.
func row(label string, s *series) result.Row {
	return result.Row{Label: label, Values: result.Values(
		middle(s.packet), middle(s.packetRatio), spread(s.packetRatio),
		middle(s.endToEnd), middle(s.endToEndRatio), spread(s.endToEndRatio),
		middle(s.connection), middle(s.connectionRatio), spread(s.connectionRatio))}
}

var columns = []result.Column{
	{Name: "packet", Unit: "ns"},
	{Name: "packet to baseline", Unit: "ratio"},
	{Name: "± packet", Unit: "ratio"},
	{Name: "end to end", Unit: "ns"},
	{Name: "end to end to baseline", Unit: "ratio"},
	{Name: "± end to end", Unit: "ratio"},
	{Name: "connection", Unit: "µs"},
	{Name: "connection to baseline", Unit: "ratio"},
	{Name: "± connection", Unit: "ratio"},
}

// plotted are the columns of every plot.
var plotted = []string{"packet to baseline", "end to end to baseline", "connection to baseline"}

// spread is how far the median of these rounds may be off, with 95 % confidence: from the median of absolute deviations, as if they were
// distributed normally.
func spread(values []float64) float64 {
	deviations := make([]float64, len(values))
	m := middle(values)
	for i, v := range values {
		deviations[i] = math.Abs(v - m)
	}
	const toSigma, medianError, confidence = 1.4826, 1.2533, 1.96
	return middle(deviations) * toSigma * medianError * confidence / math.Sqrt(float64(len(values)))
}

// report adds the node's tables and targets to the file.
func (v *variants) report(file *result.File, name string, baseline *variant, figures map[*variant]*series) {
	b := figures[baseline]
	packet, endToEnd, connection, one := middle(b.packet), middle(b.endToEnd), middle(b.connection), 1.0
	plain := result.Row{Label: baseline.label, Values: []*float64{&packet, &one, nil, &endToEnd, &one, nil, &connection, &one, nil}}

	peers := result.Table{
		ID: name + "-peers", Title: fmt.Sprintf("%s pods: packet and connection by peers (%d policies on each pod)", name, shape.policies),
		Columns: columns, Rows: []result.Row{plain},
		Plot: &result.Plot{X: "peers", LogX: true, Y: plotted},
	}
	policies := result.Table{
		ID: name + "-policies", Title: fmt.Sprintf("%s pods: packet and connection by policies on each pod (%d peers)", name, shape.peers),
		Columns: columns, Rows: []result.Row{plain},
		Note: "The last policy by name is the one that allows: a new connection passes all of them, at the sender and at the receiver.",
		Plot: &result.Plot{X: "policies on each pod", LogX: true, Y: plotted},
	}
	for _, s := range slices.SortedFunc(maps.Keys(v.bySize), func(a, b size) int { return cmp.Or(a.peers-b.peers, a.policies-b.policies) }) {
		r := row(v.bySize[s].label, figures[v.bySize[s]])
		if s.policies == shape.policies {
			r.X = float64(s.peers)
			peers.Rows = append(peers.Rows, r)
		}
		if s.peers == shape.peers {
			r.X = float64(s.policies)
			policies.Rows = append(policies.Rows, r)
		}
	}
	parts := result.Table{
		ID: name + "-parts", Title: fmt.Sprintf("%s pods: what it is made of (%d peers, %d policies on each pod)", name, shape.peers, shape.policies),
		Columns: columns, Rows: []result.Row{plain},
		Note: "The CPU times of IPv6 are not to be compared with those of the first row, its ratios are: its baseline was IPv6 as well. The floor is what the kernel takes to call the base chains that the packet meets, whatever is in them. The control is a ruleset that is known to be slow: the benchmark has to see it.",
	}
	for _, p := range v.parts {
		parts.Rows = append(parts.Rows, row(p.label, figures[p]))
	}
	whole := figures[v.bySize[shape]]
	parts.Rows = append(parts.Rows, row("everything", whole), row(v.ipv6.label, figures[v.ipv6]), row(v.control.label, figures[v.control]))
	file.Tables = append(file.Tables, peers, policies, parts)

	few, many := peers.Rows[1], peers.Rows[len(peers.Rows)-1]
	growth := *many.Values[connectionRatio] / *few.Values[connectionRatio]
	noise := min(mostNoise, *many.Values[connectionRatio+1]+*few.Values[connectionRatio+1])
	floor := figures[v.parts[0]]
	target := func(what string, ratios []float64, limit float64, floor []float64, plain string) result.Target {
		t := result.Target{What: what, Figure: middle(ratios), Limit: limit, Unit: "ratio"}
		if !t.Met() {
			t.Note = fmt.Sprintf("the same base chains without any rule are at %.3f: that is what the kernel takes to call them, and the baseline is cheap here, %s", middle(floor), plain)
		}
		return t
	}
	for _, packet := range []struct {
		how           string
		ratios, floor []float64
		plain         float64
	}{
		{"forwarding alone", whole.packetRatio, floor.packetRatio, packet},
		{"from a program to a program that sleeps until it comes", whole.endToEndRatio, floor.endToEndRatio, endToEnd},
	} {
		plain := fmt.Sprintf("%.0f ns", packet.plain)
		file.Targets = append(file.Targets,
			target(fmt.Sprintf("packet of an established flow, %s, %s, everything, to baseline", name, packet.how), packet.ratios, packetLimit, packet.floor, plain),
			target("the same, wanted", packet.ratios, packetWanted, packet.floor, plain))
	}
	file.Targets = append(file.Targets,
		target(fmt.Sprintf("new connection, %s, %d policies on each pod, to baseline", name, shape.policies),
			whole.connectionRatio, connectionLimit, floor.connectionRatio, fmt.Sprintf("%.1f µs", connection)),
		result.Target{
			What: fmt.Sprintf("new connection, %s, %.0f peers to %.0f", name, many.X, few.X), Figure: growth, Limit: 1 + noise, Unit: "ratio",
			Note: "the limit is what the two figures may be off, by the spread of their rounds, and 1.06 at most",
		})
}
