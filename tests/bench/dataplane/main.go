// Command dataplane measures what podwall's ruleset costs a packet and a connection, against the same node without it.
//
// A node and two pods are network namespaces; the rulesets are those that the daemon would load, rendered and committed by its own
// packages. Every figure is a ratio to a node that tracks connections and has no rules (kube-proxy makes every node track them):
// one measurement with the rules is compared with one without that is a moment before or after it, in turns, and the median
// of these ratios counts. So what else the machine does is in both. A packet is measured in two ways: forwarding alone, and end to
// end with a receiver that sleeps until it comes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/tests/bench/result"
)

// plan is how much is measured.
type plan struct {
	rounds      int
	chunks      int // of one measurement; their lower quartile counts
	packets     int // in a chunk
	connections int // in a chunk
	sizes       []size
}

var (
	// shape is what the other figures vary: three policies on the pod, a thousand peers.
	shape = size{peers: 1000, policies: 3}
	full  = plan{rounds: 21, chunks: 8, packets: 1000, connections: 100, sizes: []size{{10, 3}, shape, {10_000, 3}, {50_000, 3}, {1000, 1}, {1000, 10}, {1000, 50}}}
	quick = plan{rounds: 5, chunks: 5, packets: 500, connections: 50, sizes: []size{{10, 3}, shape, {1000, 10}}}
)

func main() { os.Exit(testnet.Sandbox(inside)) }

func inside() int {
	out := flag.String("o", ".", "directory for dataplane.json")
	short := flag.Bool("quick", false, "few and small measurements, to see that it works")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	p := full
	if *short {
		p = quick
	}
	if err := bench(ctx, p, *out); err != nil {
		fmt.Fprintln(os.Stderr, "dataplane:", err)
		return 1
	}
	return 0
}

func bench(ctx context.Context, p plan, dir string) error {
	file := result.New("dataplane")
	if err := pin(); err != nil {
		return err
	}
	for _, bridged := range []bool{false, true} {
		if err := measure(ctx, p, bridged, file); err != nil {
			return err
		}
	}
	return file.Write(dir)
}

// pin keeps this goroutine on one thread and that on one CPU. The collector would share the CPU's caches; there is little to collect.
func pin() error {
	runtime.LockOSThread()
	var allowed, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return fmt.Errorf("own CPUs: %w", err)
	}
	for cpu := range 1024 {
		if allowed.IsSet(cpu) {
			one.Set(cpu) // the last one: the first serves more interrupts
			if one.Count() > 1 {
				one.Zero()
				one.Set(cpu)
			}
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("pin the thread to one CPU: %w", err)
	}
	debug.SetMemoryLimit(2 << 30)
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0))) // endToEnd's two threads block in system calls that the scheduler does not see
	return nil
}

// series are the figures of one variant, one of each per round.
type series struct {
	packet, packetRatio         []float64
	endToEnd, endToEndRatio     []float64
	connection, connectionRatio []float64
}

// measure lays out one node and takes all its figures.
func measure(ctx context.Context, p plan, bridged bool, file *result.File) error {
	name := "routed"
	if bridged {
		name = "bridged"
	}
	t, err := newTopology(name, bridged)
	if err != nil {
		return err
	}
	var wires [2]*wires
	for family := range wires {
		if wires[family], err = openWires(t, family); err != nil {
			return err
		}
	}
	if err := in(t.node, func() error { return sysctls("net/netfilter/nf_conntrack_tcp_timeout_close=1") }); err != nil {
		return err
	}
	v := newVariants(p.sizes)
	for i, variant := range v.all {
		if err := variant.load(ctx, t, fmt.Sprint("podwall", i)); err != nil {
			return err
		}
	}
	baseline := &variant{label: "no rules, connections are tracked"}
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	figures := map[*variant]*series{baseline: {}}
	for _, variant := range v.all {
		figures[variant] = &series{}
	}
	for round := range p.rounds {
		for i, variant := range v.all {
			if err := ctx.Err(); err != nil {
				return err
			}
			var packet, endToEnd, connection [2]float64
			for turn := range 2 {
				which := (turn + round + i) % 2 // the baseline is first every other time
				if err := variant.wake(t, which == 1); err != nil {
					return err
				}
				w := wires[variant.family]
				if err := w.check(which == 1 && variant.policy, which == 1 && variant.source); err != nil {
					return fmt.Errorf("%s, %s: %w", name, variant.label, err)
				}
				if packet[which], err = w.packets(p.chunks, p.packets); err != nil {
					return fmt.Errorf("%s, %s: %w", name, variant.label, err)
				}
				if endToEnd[which], err = w.endToEnd(p.chunks, p.packets); err != nil {
					return fmt.Errorf("%s, %s: %w", name, variant.label, err)
				}
				if connection[which], err = w.connections(p.chunks, p.connections); err != nil {
					return fmt.Errorf("%s, %s: %w", name, variant.label, err)
				}
			}
			if err := variant.wake(t, false); err != nil {
				return err
			}
			s := figures[variant]
			s.packet, s.packetRatio = append(s.packet, packet[1]), append(s.packetRatio, packet[1]/packet[0])
			s.endToEnd, s.endToEndRatio = append(s.endToEnd, endToEnd[1]), append(s.endToEndRatio, endToEnd[1]/endToEnd[0])
			s.connection, s.connectionRatio = append(s.connection, connection[1]), append(s.connectionRatio, connection[1]/connection[0])
			if variant.family == 0 {
				b := figures[baseline]
				b.packet, b.endToEnd, b.connection = append(b.packet, packet[0]), append(b.endToEnd, endToEnd[0]), append(b.connection, connection[0])
			}
		}
	}
	v.report(file, name, baseline, figures)
	return nil
}

// check makes the flow established, sees to it that what is measured is what it is said to be, and warms up.
func (w *wires) check(policy, source bool) error {
	if err := w.establish(); err != nil {
		return err
	}
	if gotPolicy, gotSource := w.enforced(); gotPolicy != policy || gotSource != source {
		return fmt.Errorf("a denied datagram is dropped: %t, want %t; one from a forged source: %t, want %t", gotPolicy, policy, gotSource, source)
	}
	_, err := w.packets(1, 500)
	if err != nil {
		return err
	}
	_, err = w.connections(1, 20)
	return errors.Join(err)
}
