// Command report makes docs/performance.md, with plots, from what the benchmarks have written. It measures nothing.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/podwall/podwall/tests/bench/result"
)

// benchmarks are the files, in the order of the page, and what they are about.
var benchmarks = []struct{ name, title, about string }{
	{"dataplane", "Packets and connections", `CPU time, as soft interrupts run in the sender's system call and so in its time. *Packet* and *end to end* are one UDP datagram of 18 bytes
of an established flow, pod to pod through the node, measured in two ways; *connection* is TCP socket, connect, accept and close by reset, both ends.

- *Packet* is forwarding alone: one thread sends and at once takes the datagram from the receiver's queue. It contains the two system calls, both
  pods' stacks and the node's, and nobody who waits: the part that rules can make dearer with as little as possible beside it.
- *End to end* is from a program to a program that sleeps until it comes: two threads send one datagram to and fro, and the time of both is divided by the
  datagrams. It contains the same and the receiver's going to sleep, its wake-up and the context switch, as programs have it, but no change of
  the address space. Both threads are on one CPU: the interrupt that starts an idle one is not in it, which on a virtual machine takes many times as
  long and would hide the rules. The targets of a packet were set for such a measure, of sender and receiver.

A measurement is the lower quartile of short chunks, for what disturbs one makes it longer and never shorter. Each is taken beside one of the same node with
connection tracking and no rules, in turns; a ratio is the median of the rounds' ratios, ± is what that median may be off (95 %), and a time
is the median of the rounds' times. The rulesets are those that the daemon would load. Before each measurement a datagram that no policy allows and one from
a forged source have to be dropped, or the benchmark fails.`},
	{"control", "Changes", "From an event to the kernel's commit, with the real kernel, and the load of a whole node beside `nft -f` of the same ruleset."},
	{"attach", "ADD and DEL", "What podwall adds to the start and the end of a pod: the plugin's process, the socket, the wait, the transaction."},
	{"scale", "Memory, start and load", "A daemon that watches an API server over HTTP with clusters of various sizes."},
}

func main() {
	in := flag.String("in", ".", "directory with the benchmarks' JSON")
	out := flag.String("out", "performance.md", "the page")
	plots := flag.String("plots", ".", "directory for the plots")
	flag.Parse()
	if err := run(*in, *out, *plots); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run(in, out, plots string) error {
	files := map[string]*result.File{}
	for _, b := range benchmarks {
		f, err := read(filepath.Join(in, b.name+".json"))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return err
		}
		files[b.name] = f
	}
	if len(files) == 0 {
		return fmt.Errorf("no results in %s: run make bench", in)
	}
	if err := os.MkdirAll(plots, 0o755); err != nil {
		return err
	}
	link, err := filepath.Rel(filepath.Dir(out), plots)
	if err != nil {
		return fmt.Errorf("path of the plots from the page: %w", err)
	}
	var page strings.Builder
	head(&page, files)
	for _, b := range benchmarks {
		f := files[b.name]
		if f == nil {
			continue
		}
		fmt.Fprintf(&page, "\n## %s\n\n%s\n\n%s\n", b.title, b.about, origin(f))
		for _, t := range f.Tables {
			fmt.Fprintf(&page, "\n### %s\n\n", t.Title)
			table(&page, t)
			if t.Note != "" {
				fmt.Fprintf(&page, "\n%s\n", t.Note)
			}
			if t.Plot == nil {
				continue
			}
			svg, err := draw(t)
			if err != nil {
				return err
			}
			name := b.name + "-" + t.ID + ".svg"
			if err := os.WriteFile(filepath.Join(plots, name), []byte(svg), 0o644); err != nil {
				return err
			}
			fmt.Fprintf(&page, "\n![%s](%s)\n", t.Title, filepath.ToSlash(filepath.Join(link, name)))
		}
	}
	notes, err := os.ReadFile(filepath.Join(in, "notes.md"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(notes) > 0 {
		page.WriteString("\n" + string(notes))
	}
	return os.WriteFile(out, []byte(page.String()), 0o644)
}

func read(name string) (*result.File, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var f result.File
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return &f, nil
}

func head(page *strings.Builder, files map[string]*result.File) {
	page.WriteString(`# Performance

This page is made from [the benchmarks' results](performance) by ` + "`make bench`" + `, as root, on one machine (about half an hour):

` + "```sh\nmake bench                           # all benchmarks, then this page\nmake bench QUICK=-quick OUT=/tmp/x   # small ones, into another directory: does it work?\n```" + `

Ratios come from runs in turns with their baseline, so what else the machine does is in both. Times do not have that: read them with the load
beside them. No test in ` + "`make test`" + ` is timed.

## Targets

| what | figure | target | |
|---|---:|---:|---|
`)
	for _, b := range benchmarks {
		f := files[b.name]
		if f == nil {
			continue
		}
		for _, t := range f.Targets {
			met := "met"
			if !t.Met() {
				met = "**missed**"
			}
			if t.Note != "" {
				met += ": " + t.Note
			}
			fmt.Fprintf(page, "| %s | %s | ≤ %s | %s |\n", cell(t.What), number(t.Figure)+unit(t.Unit), number(t.Limit)+unit(t.Unit), cell(met))
		}
	}
}

func origin(f *result.File) string {
	return fmt.Sprintf("%s, commit `%s`; Linux %s on %d CPUs (%s), %s, load average %s when it began; %.0f s.",
		f.Started.UTC().Format("2006-01-02"), f.Commit, f.Machine.Kernel, f.Machine.CPUs, f.Machine.CPU, f.Machine.Go, f.Machine.Load, f.Seconds)
}

func table(page *strings.Builder, t result.Table) {
	page.WriteString("| |")
	for _, c := range t.Columns {
		name := c.Name
		if c.Unit != "" {
			name += ", " + c.Unit
		}
		page.WriteString(" " + cell(name) + " |")
	}
	page.WriteString("\n|---|" + strings.Repeat("---:|", len(t.Columns)) + "\n")
	for _, r := range t.Rows {
		page.WriteString("| " + cell(r.Label) + " |")
		for _, v := range r.Values {
			if v == nil {
				page.WriteString(" |")
			} else {
				page.WriteString(" " + number(*v) + " |")
			}
		}
		page.WriteString("\n")
	}
}

func cell(s string) string { return strings.ReplaceAll(strings.ReplaceAll(s, "\n", " "), "|", `\|`) }

func unit(u string) string {
	if u == "ratio" || u == "count" || u == "" {
		return ""
	}
	return " " + u
}

// number has three or four significant digits and no exponent.
func number(v float64) string {
	switch a := max(v, -v); {
	case a == 0:
		return "0"
	case a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a >= 0.1:
		return strconv.FormatFloat(v, 'f', 3, 64)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}
