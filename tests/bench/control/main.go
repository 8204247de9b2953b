// Command control measures what changes cost: loading a node's whole ruleset beside `nft -f`, one transaction of each kind, and
// the time from an event to the commit that follows it, through the daemon's own loop.
//
// The kernel is the machine's, in a network namespace; the rulesets are what the daemon renders for a made-up cluster.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/tests/bench/result"
)

// size is a cluster's, and how many of its pods are on the node: kubelet's default is at most 110.
type size struct{ pods, policies, local int }

func (s size) String() string { return fmt.Sprintf("%d pods, %d policies", s.pods, s.policies) }

// plan is how much is measured.
type plan struct {
	loads   int // rounds of loading everything, of one after the other
	commits int // of each kind
	events  int // of each kind and size
	load    size
	sizes   []size
}

var (
	full = plan{loads: 15, commits: 1000, events: 500, load: size{10_000, 50, 250}, sizes: []size{
		{1000, 100, 250}, {1000, 1000, 250}, {10_000, 100, 250}, {10_000, 1000, 250},
	}}
	quick = plan{loads: 3, commits: 20, events: 5, load: size{1000, 50, 50}, sizes: []size{{1000, 100, 25}}}
)

func main() { os.Exit(testnet.Sandbox(inside)) }

func inside() int {
	out := flag.String("o", ".", "directory for control.json")
	short := flag.Bool("quick", false, "few and small measurements, to see that it works")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	p := full
	if *short {
		p = quick
	}
	if err := bench(ctx, p, *out); err != nil {
		fmt.Fprintln(os.Stderr, "control:", err)
		return 1
	}
	return 0
}

func bench(ctx context.Context, p plan, dir string) error {
	file := result.New("control")
	links, err := makeLinks(p.load.local)
	if err != nil {
		return err
	}
	if err := measureLoad(ctx, p, file); err != nil {
		return err
	}
	if err := measureCommits(ctx, p, file); err != nil {
		return err
	}
	if err := measureEvents(ctx, p, links, file); err != nil {
		return err
	}
	return file.Write(dir)
}

// times are the durations of one measurement.
type times []time.Duration

// at returns a quantile.
func (t times) at(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(t))
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func (t times) ms(q float64) float64 { return float64(t.at(q)) / float64(time.Millisecond) }

// median of an odd or even number of figures.
func median(figures []float64) float64 {
	sorted := slices.SortedFunc(slices.Values(figures), cmp.Compare[float64])
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}
