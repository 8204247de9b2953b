package testnet

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/sync/errgroup"
)

const (
	probeParallel = 48 // a probe holds a thread while it connects
	probeTries    = 3
)

// Result is a cell and what was observed.
type Result struct {
	Cell
	Family Family
	Got    Verdict
}

// OK reports whether the observation is the expectation. Leaked and forged are equal to neither expectation.
func (r Result) OK() bool { return r.Want && r.Got == Allowed || !r.Want && r.Got == Denied }

// String says what was expected and what was seen.
func (r Result) String() string {
	want := Denied
	if r.Want {
		want = Allowed
	}
	return fmt.Sprintf("%s %s -> %s %s: expected %s, observed %s", r.Family, r.From, r.To, r.Port, want, r.Got)
}

// Observe probes every cell in one family. A cell that ought to be allowed is tried again, since a busy machine may be late;
// one that ought to be denied has one try: whatever gets through once has got through.
func (n *Node) Observe(ctx context.Context, m Matrix, family Family) ([]Result, error) {
	results := make([]Result, len(m))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(probeParallel)
	for i, cell := range m {
		g.Go(func() error {
			from, err := n.Find(cell.From)
			if err != nil {
				return err
			}
			to, err := n.Find(cell.To)
			if err != nil {
				return err
			}
			r := Result{Cell: cell, Family: family}
			for range probeTries {
				if r.Got, err = (Probe{From: from, To: to, Family: family, Port: cell.Port}).Try(gctx); err != nil {
					return err
				}
				if r.OK() || !r.Want {
					break
				}
			}
			results[i] = r
			return nil
		})
	}
	return results, g.Wait()
}

// ObserveAll probes every cell in every family of the node, one slice of results per family.
func (n *Node) ObserveAll(ctx context.Context, m Matrix) ([][]Result, error) {
	all := make([][]Result, len(n.Families))
	g, gctx := errgroup.WithContext(ctx)
	for i, family := range n.Families {
		g.Go(func() error {
			var err error
			all[i], err = n.Observe(gctx, m, family)
			return err
		})
	}
	return all, g.Wait()
}

// Mismatches returns the results that are not as expected.
func Mismatches(all [][]Result) []Result {
	var wrong []Result
	for _, results := range all {
		for _, r := range results {
			if !r.OK() {
				wrong = append(wrong, r)
			}
		}
	}
	return wrong
}

const (
	tableWidth = 120 // where a table continues below itself, so that it can be read in a terminal
	cellWidth  = 7   // of a mismatch in two families
)

// Print writes a table with the expected answer and one observed answer per family in every cell.
func Print(w io.Writer, all [][]Result) error {
	if len(all) == 0 {
		return nil
	}
	type column struct{ to, title string }
	var rows []string
	var columns []column
	cells, wrong := map[string]string{}, map[string]bool{}
	for i, results := range all {
		for _, r := range results {
			c := column{r.To, r.To + ":" + strings.TrimSuffix(r.Port.String(), "/tcp")}
			if !slices.Contains(rows, r.From) {
				rows = append(rows, r.From)
			}
			if !slices.Contains(columns, c) {
				columns = append(columns, c)
			}
			key := r.From + " " + c.title
			if i == 0 {
				cells[key] = mark(r.Want) + " "
			}
			cells[key] += r.Got.mark()
			wrong[key] = wrong[key] || !r.OK()
		}
	}
	// Receivers in the order of the senders, so that a pod and itself are on the diagonal.
	slices.SortStableFunc(columns, func(a, b column) int {
		return cmp.Compare(uint(slices.Index(rows, a.to)), uint(slices.Index(rows, b.to)))
	})
	const corner = "from \\ to"
	width := len(corner)
	for _, row := range rows {
		width = max(width, utf8.RuneCountInString(row))
	}
	var b strings.Builder
	for len(columns) > 0 {
		used, n := width, 0
		for n < len(columns) && (n == 0 || used+2+len(columns[n].title) <= tableWidth) {
			used += 2 + len(columns[n].title)
			n++
		}
		line := []string{pad(corner, width)}
		for _, c := range columns[:n] {
			line = append(line, pad(c.title, cellWidth))
		}
		writeLine(&b, line)
		for _, row := range rows {
			line := []string{pad(row, width)}
			for _, c := range columns[:n] {
				cell := cmp.Or(cells[row+" "+c.title], "·")
				if wrong[row+" "+c.title] {
					cell += " <<"
				}
				line = append(line, pad(cell, max(cellWidth, utf8.RuneCountInString(c.title))))
			}
			writeLine(&b, line)
		}
		if columns = columns[n:]; len(columns) > 0 {
			b.WriteByte('\n')
		}
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("print matrix: %w", err)
	}
	return nil
}

func mark(allowed bool) string {
	if allowed {
		return "✓"
	}
	return "✗"
}

func (v Verdict) mark() string {
	switch v {
	case Allowed, Denied:
		return mark(v == Allowed)
	default:
		return "!"
	}
}

func writeLine(b *strings.Builder, cells []string) {
	b.WriteString(strings.TrimRight(strings.Join(cells, "  "), " ") + "\n")
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}
