package main

import (
	"cmp"
	"fmt"
	"html"
	"math"
	"slices"
	"strings"

	"github.com/podwall/podwall/tests/bench/result"
)

// Size of a plot, and of what is around its area.
const (
	width, height            = 720.0, 380.0
	left, right, top, bottom = 70.0, 20.0, 44.0, 76.0
)

// style makes a plot readable on a light and on a dark page: the picture has no background.
const style = `<style>
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-size: 14px; font-weight: 600 }
.grid { stroke: #8c959f; stroke-opacity: .3 }
.axis { stroke: #8c959f; fill: none }
.line { fill: none; stroke-width: 2 }
.c0 { stroke: #0969da } .c1 { stroke: #cf222e } .c2 { stroke: #1a7f37 } .c3 { stroke: #8250df } .c4 { stroke: #bc4c00 } .c5 { stroke: #6e7781 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.c0 { stroke: #58a6ff } .c1 { stroke: #ff7b72 } .c2 { stroke: #3fb950 } .c3 { stroke: #bc8cff } .c4 { stroke: #ffa657 } .c5 { stroke: #8b949e }
}
</style>
`

const colours = 6

// scale maps values to a stretch of the picture.
type scale struct {
	log      bool
	min, max float64
	from, to float64
	ticks    []float64
}

func (s scale) at(v float64) float64 {
	a, b, x := s.min, s.max, v
	if s.log {
		a, b, x = math.Log10(a), math.Log10(b), math.Log10(v)
	}
	if a == b {
		return (s.from + s.to) / 2
	}
	return s.from + (x-a)/(b-a)*(s.to-s.from)
}

// linear is a scale with about five round ticks that holds all values.
func linear(values []float64, from, to float64) scale {
	lowest, highest := slices.Min(values), slices.Max(values)
	if lowest > 0 && lowest < highest/3 {
		lowest = 0
	}
	span := highest - lowest
	if span == 0 {
		span = max(math.Abs(highest), 1)
	}
	step := math.Pow(10, math.Floor(math.Log10(span/4)))
	for _, f := range []float64{1, 2, 5, 10} {
		if span/(step*f) <= 5 {
			step *= f
			break
		}
	}
	s := scale{min: math.Floor(lowest/step) * step, max: math.Ceil(highest/step) * step, from: from, to: to}
	if s.min == s.max {
		s.max += step
	}
	for i := 0; ; i++ {
		v := s.min + float64(i)*step
		if v > s.max+step/2 {
			return s
		}
		s.ticks = append(s.ticks, v)
	}
}

// logarithmic is a scale of whole decades.
func logarithmic(values []float64, from, to float64) scale {
	s := scale{log: true, from: from, to: to}
	first, last := math.Floor(math.Log10(slices.Min(values))), math.Ceil(math.Log10(slices.Max(values)))
	if first == last {
		last++
	}
	s.min, s.max = math.Pow(10, first), math.Pow(10, last)
	for e := first; e <= last; e++ {
		s.ticks = append(s.ticks, math.Pow(10, e))
	}
	return s
}

type point struct{ x, y float64 }

// curve is a line of a plot.
type curve struct {
	name   string
	points []point
}

// draw makes the plot of a table: lines over X, one for each of its columns and series.
func draw(t result.Table) (string, error) {
	var lines []*curve
	var xs, ys []float64
	yUnit := ""
	for _, name := range t.Plot.Y {
		i := slices.IndexFunc(t.Columns, func(c result.Column) bool { return c.Name == name })
		if i < 0 {
			return "", fmt.Errorf("plot of table %s: no column %q; name one of the table's", t.ID, name)
		}
		yUnit = t.Columns[i].Unit
		bySeries := map[string]*curve{}
		for _, r := range t.Rows {
			// A row without a place on the axis, as the baseline, is in the table only.
			if i >= len(r.Values) || r.Values[i] == nil || r.X == 0 && (t.Plot.LogX || r.Label == "") || t.Plot.LogY && *r.Values[i] <= 0 {
				continue
			}
			line := bySeries[r.Series]
			if line == nil {
				line = &curve{name: name}
				if r.Series != "" {
					line.name += ", " + r.Series
				}
				bySeries[r.Series] = line
				lines = append(lines, line)
			}
			line.points = append(line.points, point{r.X, *r.Values[i]})
			xs, ys = append(xs, r.X), append(ys, *r.Values[i])
		}
	}
	for _, line := range lines {
		slices.SortStableFunc(line.points, func(a, b point) int { return cmp.Compare(a.x, b.x) })
	}
	if len(xs) == 0 {
		return "", fmt.Errorf("plot of table %s: no row has a figure at a place on the x axis", t.ID)
	}
	if yUnit == "ratio" {
		ys = append(ys, 1) // what they are ratios to
	}
	x, y := linear(xs, left, width-right), linear(ys, height-bottom, top)
	if t.Plot.LogX {
		x = logarithmic(xs, left, width-right)
	}
	if t.Plot.LogY {
		y = logarithmic(ys, height-bottom, top)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" role=\"img\">\n<title>%s</title>\n%s", width, height, html.EscapeString(t.Title), style)
	text := func(class string, px, py float64, anchor, s string) {
		fmt.Fprintf(&b, "<text class=\"%s\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", class, px, py, anchor, html.EscapeString(s))
	}
	text("title", width/2, 20, "middle", t.Title)
	for _, v := range y.ticks {
		fmt.Fprintf(&b, "<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>\n", left, y.at(v), width-right)
		text("", left-8, y.at(v)+4, "end", tick(v))
	}
	for _, v := range x.ticks {
		fmt.Fprintf(&b, "<path class=\"grid\" d=\"M%.1f %.1fV%.1f\"/>\n", x.at(v), top, height-bottom)
		text("", x.at(v), height-bottom+18, "middle", tick(v))
	}
	fmt.Fprintf(&b, "<path class=\"axis\" d=\"M%.1f %.1fV%.1fH%.1f\"/>\n", left, top, height-bottom, width-right)
	text("", (left+width-right)/2, height-bottom+38, "middle", t.Plot.X)
	text("", 8, top-8, "start", yUnit)
	for i, line := range lines {
		colour := fmt.Sprint("c", i%colours)
		var path strings.Builder
		for j, p := range line.points {
			fmt.Fprintf(&path, "%s%.1f %.1f", [2]string{"L", "M"}[btoi(j == 0)], x.at(p.x), y.at(p.y))
			fmt.Fprintf(&b, "<circle class=\"line %s\" cx=\"%.1f\" cy=\"%.1f\" r=\"3\"/>\n", colour, x.at(p.x), y.at(p.y))
		}
		fmt.Fprintf(&b, "<path class=\"line %s\" d=\"%s\"/>\n", colour, path.String())
		at := left + float64(i)*(width-left-right)/float64(len(lines))
		fmt.Fprintf(&b, "<path class=\"line %s\" d=\"M%.1f %.1fh18\"/>\n", colour, at, height-16)
		text("", at+24, height-12, "start", line.name)
	}
	b.WriteString("</svg>\n")
	return b.String(), nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// tick is a number for an axis: thousands are short.
func tick(v float64) string {
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%gM", v/1e6)
	case v >= 1e4:
		return fmt.Sprintf("%gk", v/1e3)
	}
	return fmt.Sprintf("%g", math.Round(v*1e6)/1e6)
}
