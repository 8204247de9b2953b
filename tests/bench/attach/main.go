// Command attach measures how long ADD and DEL take on a node with few and with many pods, and what of it is spent where.
//
// Nodes of different size stand side by side, each with podwalld in a network namespace of its own, and take turns. podwall's own share is the
// plugin's process, started as a runtime starts it after the main plugin: for a veth that is there, with the main plugin's result on
// its standard input. The whole chain is what cnitool takes, on a node with podwall and on one without.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/tests/bench/result"
)

// plan is how much is measured.
type plan struct {
	sizes  []int // pods on the nodes
	rounds int   // ADDs and DELs on each node
	chains int   // by cnitool
}

var (
	full  = plan{sizes: []int{0, 100, 250}, rounds: 300, chains: 60}
	quick = plan{sizes: []int{0, 20}, rounds: 5, chains: 2}
)

func main() { os.Exit(testnet.Sandbox(inside)) }

func inside() int {
	out := flag.String("o", ".", "directory for attach.json")
	short := flag.Bool("quick", false, "few and small measurements, to see that it works")
	bin := flag.String("bin", "../../bin", "directory with podwall, podwalld and cni/, as `make build tools` leaves it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	p := full
	if *short {
		p = quick
	}
	if err := bench(ctx, p, *bin, *out); err != nil {
		fmt.Fprintln(os.Stderr, "attach:", err)
		return 1
	}
	return 0
}

func bench(ctx context.Context, p plan, bin, dir string) error {
	file := result.New("attach")
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	binaries, err := testnet.BinariesIn(bin)
	if err != nil {
		return err
	}
	var nodes []*node
	defer func() {
		for _, n := range nodes {
			_ = n.KillDaemon() // everything else goes with the sandbox
		}
	}()
	for _, size := range p.sizes {
		n, err := newNode(ctx, size, binaries)
		if n != nil {
			nodes = append(nodes, n)
		}
		if err != nil {
			return err
		}
	}
	for round := range p.rounds {
		for i := range nodes {
			if err := nodes[(round+i)%len(nodes)].measure(ctx, round); err != nil {
				return fmt.Errorf("round %d on the node of %d pods: %w", round, nodes[(round+i)%len(nodes)].size, err)
			}
		}
	}
	chains, err := measureChains(ctx, p, nodes, binaries)
	if err != nil {
		return err
	}
	report(file, p, nodes, chains)
	return file.Write(dir)
}

// times are the durations of one measurement.
type times []time.Duration

// ms returns a quantile.
func (t times) ms(q float64) float64 {
	sorted := slices.Sorted(slices.Values(t))
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]) / float64(time.Millisecond)
}
