// Command mutants proves that the tests see what they are for. It builds them with one wrong variant of podwall after the
// other and expects them to fail. The tree is not touched: a variant reaches the compiler as an overlay.
//
//	go run ./mutants [-run REGEXP] [-seed N]
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	flags.SetOutput(stderr)
	only := flags.String("run", "", "regular expression of the mutants to try")
	seed := flags.Uint64("seed", 1, "seed of the random tests")
	workers := flags.Int("workers", 2, "how many mutants at a time")
	if flags.Parse(args) != nil {
		return 2
	}
	wanted, err := regexp.Compile(*only)
	if err != nil {
		fmt.Fprintf(stderr, "mutants: -run: %v\n", err)
		return 2
	}
	list := slices.DeleteFunc(slices.Clone(mutants), func(m mutant) bool { return !wanted.MatchString(m.name) })
	if len(list) == 0 {
		fmt.Fprintf(stderr, "mutants: -run: no mutant is called %s\n", wanted)
		return 2
	}
	survivors, err := try(ctx, list, *seed, *workers, stdout)
	if err != nil {
		fmt.Fprintf(stderr, "mutants: %v\n", err)
		return 1
	}
	if len(survivors) > 0 {
		fmt.Fprintf(stderr, "mutants: no test sees %s\n", strings.Join(survivors, ", "))
		return 1
	}
	return 0
}

// try prints a line per mutant and returns the names of those that no test caught.
func try(ctx context.Context, list []mutant, seed uint64, workers int, stdout io.Writer) ([]string, error) {
	root, err := repository(ctx)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "mutants-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for test binaries: %w", err)
	}
	defer os.RemoveAll(dir)
	b := bench{root: root, dir: dir, seed: seed}

	start := time.Now()
	for _, j := range []judge{differential, sequences, policyTests, rulesetTests} {
		switch failed, err := b.fails(ctx, j, mutant{name: "control"}); {
		case err != nil:
			return nil, fmt.Errorf("control: %w", err)
		case failed:
			return nil, fmt.Errorf("control: %s fails without a mutant: mend that first", j.name)
		}
	}
	fmt.Fprintf(stdout, "control: without a mutant all tests pass (seed %d, %s)\n\n%6s  %-17s  %-11s  mutant\n", seed, time.Since(start).Round(time.Second), "time", "random tests", "unit tests")

	var mu sync.Mutex
	var survivors []string
	var errs []error
	byRandom, byUnit := 0, 0
	var wg sync.WaitGroup
	places := make(chan struct{}, workers)
	for _, m := range list {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			began := time.Now()
			random, unit, err := b.try(ctx, m)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, fmt.Errorf("mutant %s: %w", m.name, err))
				return
			}
			fmt.Fprintf(stdout, "%5.1fs  %-17s  %-11s  %s: %s\n", time.Since(began).Seconds(), cmp.Or(random, "-"), cmp.Or(unit, "-"), m.name, m.breaks)
			if random != "" {
				byRandom++
			}
			if unit != "" {
				byUnit++
			}
			if random == "" && unit == "" {
				survivors = append(survivors, m.name)
			}
		})
	}
	wg.Wait()
	fmt.Fprintf(stdout, "\n%d of %d caught: %d by the random tests, %d by the unit tests (%s)\n",
		len(list)-len(survivors)-len(errs), len(list), byRandom, byUnit, time.Since(start).Round(time.Second))
	return survivors, errors.Join(errs...)
}

// repository returns the directory of podwall's own module.
func repository(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/podwall/podwall").Output()
	if err != nil {
		return "", fmt.Errorf("find podwall's module: %w; run it in tests/oracle", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// judge is a test that shall fail.
type judge struct {
	name   string
	module string // directory of the module
	pkg    string // directory of the package in it
	args   []string
}

var (
	differential = judge{name: "differential test", module: "tests/oracle", pkg: "memory", args: []string{"-test.run=^TestVerdicts$", "-verdicts=300000"}}
	sequences    = judge{name: "sequences", module: "tests/oracle", pkg: "memory", args: []string{"-test.run=^TestSequences$", "-steps=2000"}}
	policyTests  = judge{name: "pkg/policy", module: ".", pkg: "pkg/policy"}
	rulesetTests = judge{name: "pkg/ruleset", module: ".", pkg: "pkg/ruleset"}
)

// bench builds tests with a mutant and runs them.
type bench struct {
	root, dir string
	seed      uint64
}

// try returns the first of the random tests of this module, and the first of podwall's unit tests, that catches a mutant.
func (b *bench) try(ctx context.Context, m mutant) (string, string, error) {
	random, unit := []judge{differential, sequences}, []judge{policyTests}
	if m.file == diffGo {
		random = []judge{sequences} // which alone goes from one ruleset to another
	}
	if filepath.Dir(m.file) == "pkg/ruleset" {
		unit = []judge{rulesetTests, policyTests}
	}
	byRandom, err := b.first(ctx, random, m)
	if err != nil {
		return "", "", err
	}
	byUnit, err := b.first(ctx, unit, m)
	return byRandom, byUnit, err
}

func (b *bench) first(ctx context.Context, judges []judge, m mutant) (string, error) {
	for _, j := range judges {
		failed, err := b.fails(ctx, j, m)
		if err != nil {
			return "", err
		}
		if failed {
			return j.name, nil
		}
	}
	return "", nil
}

// overlay writes the changed file and the description of it for `go build -overlay`.
func (m mutant) overlay(root, dir string) (string, error) {
	replace := map[string]string{}
	if m.file != "" {
		path := filepath.Join(root, m.file)
		text, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		for _, e := range m.edits {
			if n := bytes.Count(text, []byte(e.old)); n != 1 {
				return "", fmt.Errorf("%s has %q %d times, not once: bring the mutant up to date", m.file, e.old, n)
			}
			text = bytes.Replace(text, []byte(e.old), []byte(e.new), 1)
		}
		changed := filepath.Join(dir, filepath.Base(m.file))
		if err := os.WriteFile(changed, text, 0o600); err != nil {
			return "", err
		}
		replace[path] = changed
	}
	data, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "overlay.json")
	return path, os.WriteFile(path, data, 0o600)
}

// fails reports whether a judge's test fails. A mutant that does not compile or crashes proves nothing: that is an error.
func (b *bench) fails(ctx context.Context, j judge, m mutant) (bool, error) {
	dir, err := os.MkdirTemp(b.dir, m.name+"-")
	if err != nil {
		return false, fmt.Errorf("make a directory for the test of %s: %w", j.pkg, err)
	}
	defer os.RemoveAll(dir)
	overlay, err := m.overlay(b.root, dir)
	if err != nil {
		return false, err
	}
	module := filepath.Join(b.root, j.module)
	binary := filepath.Join(dir, "test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-ldflags=-s -w", "-overlay", overlay, "-o", binary, "./"+j.pkg)
	build.Dir = module
	if out, err := build.CombinedOutput(); err != nil {
		return false, fmt.Errorf("build %s: %w\n%s", j.pkg, err, out)
	}
	args := []string{"-test.timeout=5m", "-rapid.nofailfile", "-rapid.shrinktime=1ms", fmt.Sprintf("-rapid.seed=%d", b.seed)} // it need not be small
	test := exec.CommandContext(ctx, binary, append(args, j.args...)...)
	test.Dir = filepath.Join(module, j.pkg)
	out, err := test.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false, nil
	case !errors.As(err, &exit):
		return false, fmt.Errorf("run the tests of %s: %w", j.pkg, err)
	case !bytes.Contains(out, []byte("--- FAIL")) || bytes.Contains(out, []byte("panic: ")) || bytes.Contains(out, []byte("[rapid] panic")):
		return false, fmt.Errorf("the tests of %s did not end as tests do: %w\n%s", j.pkg, err, out[max(0, len(out)-2000):])
	}
	return true, nil
}
