// Command demo shows podwall at work on this machine: it lays nodes out of network namespaces, adds the pods of every example with
// cnitool and compares who reaches whom with what the example says.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podwall/podwall/internal/testnet"
)

const usage = `Usage: demo [flags]

For every example: a node (a network namespace that forwards), podwalld on the example's manifests, a conflist with podwall appended to
bridge or ptp, one cnitool ADD per pod; then every sender tries every receiver, in IPv4 and IPv6. A cell of the table shows

    expected IPv4 IPv6      ✓ allowed   ✗ denied   ! neither   << not as expected   · not asked

"allowed" means that the receiver read what was sent and the sender got it back, "denied" that not one packet arrived. Everything happens in
namespaces of its own and is gone when the demo ends, also by Ctrl-C or kill -9. It needs root, and ip and nft in the PATH.

    make demo                                           all examples on bridge
    go run ./tests/demo --scenario zero-trust --cni ptp  one example on ptp
    go run ./tests/demo --open                          control: without policies, what would differ?

Exit code: 0 all cells as expected, 1 not so, 2 usage.

Flags:
`

type options struct {
	examples, bin, cni string
	scenarios          []string
	open, keepGoing    bool
	showRuleset        bool
	parallel           int
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	var o options
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.examples, "examples", "examples", "`DIR` of the examples")
	fs.StringVar(&o.bin, "bin", "bin", "`DIR` that holds podwall, podwalld and cni/{cnitool,bridge,ptp,macvlan,host-local}")
	fs.StringVar(&o.cni, "cni", "bridge", "main CNI plugin of the nodes: `bridge|ptp`")
	fs.Func("scenario", "run only the example of this `NAME` (repeatable)", func(s string) error {
		o.scenarios = append(o.scenarios, s)
		return nil
	})
	fs.BoolVar(&o.open, "open", false, "control: leave the policy files away; every example must then differ from its matrix, by cells that are open")
	fs.BoolVar(&o.keepGoing, "keep-going", false, "run all examples even if one differs")
	fs.BoolVar(&o.showRuleset, "show-ruleset", false, "print each node's nftables tables")
	fs.IntVar(&o.parallel, "parallel", 3, "`N` examples at a time")
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), usage)
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if fs.NArg() > 0 || (o.cni != "bridge" && o.cni != "ptp") || o.parallel < 1 {
		fmt.Fprintln(stderr, "demo: want only flags, --cni bridge or ptp, --parallel of at least 1; see --help")
		return 2
	}
	binaries, err := testnet.BinariesIn(o.bin)
	if err != nil {
		fmt.Fprintln(stderr, "demo:", err)
		return 1
	}
	scenarios, err := choose(o)
	if err != nil {
		fmt.Fprintln(stderr, "demo:", err)
		return 1
	}
	return testnet.Sandbox(func() int {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
		defer stop()
		d := demo{options: o, binaries: binaries, out: stdout}
		if err := d.run(ctx, scenarios); err != nil {
			if ctx.Err() != nil {
				err = errors.New("interrupted; nothing is left behind")
			}
			fmt.Fprintln(stderr, "demo:", err)
			return 1
		}
		return 0
	})
}

func choose(o options) ([]*testnet.Scenario, error) {
	all, err := testnet.LoadScenarios(o.examples)
	if err != nil || len(o.scenarios) == 0 {
		return all, err
	}
	var chosen []*testnet.Scenario
	for _, name := range o.scenarios {
		i := slices.IndexFunc(all, func(s *testnet.Scenario) bool { return s.Name == name })
		if i < 0 {
			var names []string
			for _, s := range all {
				names = append(names, s.Name)
			}
			return nil, fmt.Errorf("no scenario %q; there are %s", name, strings.Join(names, ", "))
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

type demo struct {
	options
	binaries testnet.Binaries

	mu                 sync.Mutex // guards what follows, and keeps reports apart
	out                io.Writer
	done, cells, wrong int
	failed             []string
}

// errDiffers ends the demo after the reports have said what differs.
var errDiffers = errors.New("the network is not as expected")

func (d *demo) run(ctx context.Context, scenarios []*testnet.Scenario) error {
	start := time.Now()
	fmt.Fprintf(d.out, "podwall demo: %d scenarios, IPv4 and IPv6, on %s nodes; a cell is: expected, observed in IPv4 and in IPv6\n", len(scenarios), d.cni)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(d.parallel)
	for i, s := range scenarios {
		g.Go(func() error {
			if gctx.Err() != nil {
				return nil // the reason has been reported
			}
			err := d.scenarioRun(gctx, i, len(scenarios), s)
			if errors.Is(err, errDiffers) && d.keepGoing {
				return nil
			}
			return err
		})
	}
	err := g.Wait()
	if err == nil {
		err = ctx.Err() // interrupted between two scenarios
	}
	if d.done > 0 {
		fmt.Fprintf(d.out, "\n%d of %d scenarios, %d cells compared, %d mismatches, %.1f s\n", d.done, len(scenarios), d.cells, d.wrong, time.Since(start).Seconds())
	}
	if err == nil && len(d.failed) > 0 {
		slices.Sort(d.failed)
		err = fmt.Errorf("%w: %s", errDiffers, strings.Join(d.failed, ", "))
	}
	return err
}

func (d *demo) scenarioRun(ctx context.Context, i, total int, s *testnet.Scenario) error {
	start := time.Now()
	n, err := testnet.NewNode(ctx, testnet.Config{
		Name: fmt.Sprintf("node%d", i), CNI: d.cni, Families: []testnet.Family{testnet.IPv4, testnet.IPv6}, Binaries: d.binaries, Podwall: true,
	})
	if err != nil {
		return fmt.Errorf("scenario %s: %w", s.Name, err)
	}
	results, ruleset, err := d.observe(ctx, n, s)
	if ctx.Err() != nil {
		return ctx.Err() // the sandbox ends, and the node with it
	}
	if err = errors.Join(err, n.Close(ctx)); err != nil {
		return fmt.Errorf("scenario %s: %w", s.Name, err)
	}
	return d.report(s, results, ruleset, total, time.Since(start))
}

func (d *demo) observe(ctx context.Context, n *testnet.Node, s *testnet.Scenario) ([][]testnet.Result, string, error) {
	if err := s.WriteManifests(n, !d.open); err != nil {
		return nil, "", err
	}
	if err := n.StartDaemon(ctx); err != nil {
		return nil, "", err
	}
	if err := s.Deploy(ctx, n); err != nil {
		return nil, "", fmt.Errorf("%w\npodwalld's log ends:\n%s", err, n.Log())
	}
	results, err := n.ObserveAll(ctx, s.Matrix)
	if err != nil || !d.showRuleset {
		return results, "", err
	}
	ruleset, err := rulesetOf(ctx, n)
	return results, ruleset, err
}

// rulesetOf prints podwall's tables and not the ones that other software, here the harness, has in the node.
func rulesetOf(ctx context.Context, n *testnet.Node) (string, error) {
	tables, err := n.Host.Run(ctx, "nft", "list", "tables")
	if err != nil {
		return "", err
	}
	var ruleset strings.Builder
	for line := range strings.Lines(tables) {
		fields := strings.Fields(line) // table FAMILY NAME
		if len(fields) != 3 || fields[2] != "podwall" {
			continue
		}
		text, err := n.Host.Run(ctx, "nft", "list", "table", fields[1], fields[2])
		if err != nil {
			return "", err
		}
		ruleset.WriteString(text)
	}
	return ruleset.String(), nil
}

// report prints a scenario's table and verdict. In the control, a scenario passes if the lack of policies shows, and as openness only.
func (d *demo) report(s *testnet.Scenario, results [][]testnet.Result, ruleset string, total int, took time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done++
	fmt.Fprintf(d.out, "\n[%d/%d] %s: %s\n\n", d.done, total, s.Name, s.Title)
	if err := testnet.Print(d.out, results); err != nil {
		return err
	}
	if ruleset != "" {
		fmt.Fprintf(d.out, "\n%s", ruleset)
	}
	cells := 0
	for _, family := range results {
		cells += len(family)
	}
	mismatches := testnet.Mismatches(results)
	d.cells += cells
	d.wrong += len(mismatches)

	verdict, failed := "as expected", len(mismatches) > 0
	if failed {
		verdict = fmt.Sprintf("%d MISMATCHES", len(mismatches))
	}
	if d.open {
		verdict, failed = fmt.Sprintf("%d differ from the matrix, as they must without policies", len(mismatches)), false
		if len(mismatches) == 0 {
			verdict, failed = "NOTHING DIFFERS: this scenario would pass without podwall", true
		}
		mismatches = slices.DeleteFunc(mismatches, func(r testnet.Result) bool { return r.Got == testnet.Allowed })
		if len(mismatches) > 0 {
			verdict, failed = fmt.Sprintf("%d ARE NOT OPEN although there are no policies", len(mismatches)), true
		}
	}
	fmt.Fprintf(d.out, "\n%d cells: %s (%.1f s)\n", cells, verdict, took.Seconds())
	for _, r := range mismatches {
		fmt.Fprintln(d.out, "  ", r)
	}
	if failed {
		d.failed = append(d.failed, s.Name)
		return fmt.Errorf("%w: %s", errDiffers, s.Name)
	}
	return nil
}
