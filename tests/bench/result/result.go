// Package result is what every benchmark writes: figures in tables, and the targets that some of them are held against. One
// file per benchmark; the report page is made from the files alone.
package result

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// File is the outcome of one benchmark.
type File struct {
	Benchmark string    `json:"benchmark"` // its name, which is also the file's
	Commit    string    `json:"commit"`
	Started   time.Time `json:"started"`
	Seconds   float64   `json:"seconds"`
	Machine   Machine   `json:"machine"`
	Tables    []Table   `json:"tables"`
	Targets   []Target  `json:"targets,omitempty"`
}

// Machine is where it ran.
type Machine struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Go     string `json:"go"`
	// Load is the load average of the last minute when it began: more than the benchmark's own makes figures worse.
	Load string `json:"load"`
}

// Table is a set of figures of one kind.
type Table struct {
	ID      string   `json:"id"`    // names its plot
	Title   string   `json:"title"` // one line
	Note    string   `json:"note,omitempty"`
	Columns []Column `json:"columns"`
	Rows    []Row    `json:"rows"`
	Plot    *Plot    `json:"plot,omitempty"`
}

// Column is one figure of every row.
type Column struct {
	Name string `json:"name"`
	Unit string `json:"unit,omitempty"` // ns, µs, ms, s, MiB, ratio, %, count
}

// Row has a label and one figure per column; NaN is not JSON, a missing figure is nil.
type Row struct {
	Label  string     `json:"label"`
	X      float64    `json:"x,omitempty"`      // the row's place on the plot's x axis
	Series string     `json:"series,omitempty"` // the line of the plot that it belongs to, if a column has several
	Values []*float64 `json:"values"`
}

// Plot says how the report draws a table: the named columns over X.
type Plot struct {
	X    string   `json:"x"` // what the x axis is
	LogX bool     `json:"logX,omitempty"`
	LogY bool     `json:"logY,omitempty"`
	Y    []string `json:"y"` // columns, of one unit
}

// Target is a figure beside what it should be at most.
type Target struct {
	What   string  `json:"what"`
	Figure float64 `json:"figure"`
	Limit  float64 `json:"limit"`
	Unit   string  `json:"unit"`
	Note   string  `json:"note,omitempty"` // where it is missed: what the floor is, and why
}

// Met reports whether the figure keeps to its limit.
func (t Target) Met() bool { return t.Figure <= t.Limit }

// New returns the file of a benchmark that begins now.
func New(benchmark string) *File {
	f := &File{Benchmark: benchmark, Started: time.Now(), Machine: Machine{CPUs: runtime.NumCPU(), Go: runtime.Version()}}
	if out, err := exec.Command("git", "describe", "--always", "--dirty").Output(); err == nil {
		f.Commit = strings.TrimSpace(string(out))
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		f.Machine.Kernel = strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		f.Machine.Load, _, _ = strings.Cut(string(b), " ")
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				f.Machine.CPU = strings.TrimSpace(v)
				break
			}
		}
	}
	return f
}

// Values are the figures of a row.
func Values(figures ...float64) []*float64 {
	values := make([]*float64, len(figures))
	for i := range figures {
		values[i] = &figures[i]
	}
	return values
}

// Write stores the file as dir/<benchmark>.json and prints its tables and targets to standard output.
func (f *File) Write(dir string) error {
	f.Seconds = time.Since(f.Started).Seconds()
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, f.Benchmark+".json"), append(b, '\n'), 0o644); err != nil {
		return err
	}
	return f.print()
}

func (f *File) print() error {
	w := bufio.NewWriter(os.Stdout)
	for _, t := range f.Tables {
		fmt.Fprintf(w, "\n%s\n", t.Title)
		fmt.Fprintf(w, "  %-44s", "")
		for _, c := range t.Columns {
			fmt.Fprintf(w, " %18s", strings.TrimSpace(c.Name+" "+c.Unit))
		}
		fmt.Fprintln(w)
		for _, r := range t.Rows {
			fmt.Fprintf(w, "  %-44s", r.Label)
			for _, v := range r.Values {
				if v == nil {
					fmt.Fprintf(w, " %18s", "-")
				} else {
					fmt.Fprintf(w, " %18.4g", *v)
				}
			}
			fmt.Fprintln(w)
		}
	}
	for _, t := range f.Targets {
		mark := "met"
		if !t.Met() {
			mark = "MISSED"
		}
		fmt.Fprintf(w, "\n%-6s %s: %.4g %s, target %.4g", mark, t.What, t.Figure, t.Unit, t.Limit)
		if t.Note != "" {
			fmt.Fprintf(w, " (%s)", t.Note)
		}
	}
	fmt.Fprintln(w)
	return w.Flush()
}
