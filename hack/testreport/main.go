// Command testreport turns `go test -json` into what a person or a CI wants to read: go test's line per package, the output of what
// failed, what tests report by testing.T.Attr (seeds, figures), and one closing line with counts, coverage and time.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	r := report{out: stdout, minimum: map[string]float64{}, coverage: map[string]float64{}, output: map[id]string{}, running: map[id]bool{}}
	fs := flag.NewFlagSet("testreport", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Func("cover", "`PACKAGE=PERCENT`: fail if the package's statements are covered less (repeatable)", func(s string) error {
		pkg, percent, _ := strings.Cut(s, "=")
		least, err := strconv.ParseFloat(percent, 64)
		r.minimum[pkg] = least
		return err
	})
	if err := fs.Parse(args); err != nil {
		return 2
	}
	start := time.Now()
	in := bufio.NewScanner(stdin)
	in.Buffer(nil, 16<<20)
	for in.Scan() {
		var e event
		if err := json.Unmarshal(in.Bytes(), &e); err != nil {
			fmt.Fprintln(stdout, in.Text()) // what go itself says
			continue
		}
		r.add(e)
	}
	if err := in.Err(); err != nil {
		fmt.Fprintln(stderr, "testreport: read standard input:", err)
		return 1
	}
	if !r.close(time.Since(start)) {
		return 1
	}
	return 0
}

// event is a line of `go test -json` (go doc test2json).
type event struct {
	Action, Package, ImportPath, Test, Output, Key, Value string
}

// id names a test, or with an empty test a package.
type id struct{ pkg, test string }

type report struct {
	out                 io.Writer
	minimum, coverage   map[string]float64
	output              map[id]string
	running             map[id]bool
	passed, subtests    int
	failed, failedBuild int
	skipped             []string
	packages            int
}

var coverage = regexp.MustCompile(`coverage: ([0-9.]+)% of statements`)

func (r *report) add(e event) {
	key := id{e.Package, e.Test}
	switch e.Action {
	case "run", "cont":
		r.running[key] = true
	case "pause": // waits for its turn to run in parallel
		delete(r.running, key)
	case "attr":
		fmt.Fprintf(r.out, "    %s %s: %s\n", e.Test, e.Key, e.Value)
	case "output":
		r.output[key] += e.Output
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "build-fail":
		r.failedBuild++
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(e)
		}
		delete(r.output, key)
		delete(r.running, key)
	}
}

func (r *report) endTest(e event) {
	switch {
	case e.Action == "fail":
		r.failed++
		fmt.Fprint(r.out, r.output[id{e.Package, e.Test}])
	case e.Action == "skip":
		r.skipped = append(r.skipped, e.Test)
	case strings.Contains(e.Test, "/"):
		r.subtests++
	default:
		r.passed++
	}
}

func (r *report) endPackage(e event) {
	text := r.output[id{e.Package, ""}]
	if e.Action == "skip" { // no test files
		return
	}
	r.packages++
	if m := coverage.FindStringSubmatch(text); m != nil {
		r.coverage[e.Package], _ = strconv.ParseFloat(m[1], 64)
	}
	if e.Action == "pass" {
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "ok ") {
				fmt.Fprint(r.out, line)
			}
		}
		return
	}
	// What still runs when its package ends has panicked or timed out.
	for key := range r.running {
		if key.pkg == e.Package {
			fmt.Fprint(r.out, r.output[key])
			r.failed++
		}
	}
	fmt.Fprint(r.out, text)
	if r.failed == 0 && r.failedBuild == 0 {
		r.failed++ // TestMain, or an exit in the middle
	}
}

// close prints the closing line and reports whether all is well.
func (r *report) close(took time.Duration) bool {
	ok := r.failed == 0 && r.failedBuild == 0 && r.packages > 0
	cover := ""
	for _, pkg := range slices.Sorted(maps.Keys(r.minimum)) {
		percent, known := r.coverage[pkg]
		switch {
		case !known:
			ok = false
			fmt.Fprintf(r.out, "no coverage of %s was reported\n", pkg)
		case percent < r.minimum[pkg]:
			ok = false
			fmt.Fprintf(r.out, "coverage of %s is %.1f%%, it must be at least %.0f%%\n", pkg, percent, r.minimum[pkg])
		}
		cover += fmt.Sprintf(", %s %.1f%%", pkg[strings.LastIndex(pkg, "/")+1:], percent)
	}
	if cover != "" {
		cover = "; coverage" + cover[1:]
	}
	if len(r.skipped) > 0 {
		fmt.Fprintln(r.out, "skipped:", strings.Join(r.skipped, ", "))
	}
	word := "PASS"
	if !ok {
		word = "FAIL"
	}
	fmt.Fprintf(r.out, "%s: %d packages, %d tests and %d subtests passed, %d failed, %d skipped, %d builds failed in %s%s\n",
		word, r.packages, r.passed, r.subtests, r.failed, len(r.skipped), r.failedBuild, took.Round(time.Second), cover)
	return ok
}
