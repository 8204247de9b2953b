package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/podwall/podwall/tests/bench/result"
)

// figures are what was measured in one cluster.
type figures struct {
	pods, policies int
	memory         footprint
	whole, adopted launch // podwalld started with its tables gone, and with them kept
}

// load is processor time under events, in percent of one core.
type load struct {
	label string
	rate  int
	cpu   float64
	// behind is how many events had not been sent when time was up.
	behind int
}

type bench struct {
	*node
	plan

	figures []figures
	loads   []load
	size    float64 // of an encoded pod
}

// cluster measures all numbers of policies in a cluster of so many pods.
func (b *bench) cluster(ctx context.Context, pods int) error {
	f := fleet{seed: 1, pods: pods, local: b.local}
	b.api.drop()
	for i := range f.namespaces() {
		if err := b.api.put(f.namespace(i)); err != nil {
			return err
		}
	}
	for i := range pods {
		if err := b.api.put(f.pod(i)); err != nil {
			return err
		}
	}
	b.size = b.api.encodedSize("/api/v1/pods")
	// The node's pods are registered once and stay.
	if err := errors.Join(os.RemoveAll(b.state), dropTables(ctx)); err != nil {
		return err
	}
	d, _, err := b.launch(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(b.register(ctx, f), d.stop()); err != nil {
		return err
	}
	for _, policies := range b.policies {
		b.api.drop("Pod", "Namespace")
		for i := range policies {
			if err := b.api.put(f.policy(i)); err != nil {
				return err
			}
		}
		if err := b.measure(ctx, f, policies); err != nil {
			return fmt.Errorf("%d pods, %d policies: %w", pods, policies, err)
		}
	}
	return nil
}

func (b *bench) measure(ctx context.Context, f fleet, policies int) error {
	out := figures{pods: f.pods, policies: policies}
	var whole, adopted []launch
	for i := range b.starts {
		if err := dropTables(ctx); err != nil {
			return err
		}
		d, l, err := b.launch(ctx)
		if err != nil {
			return err
		}
		whole = append(whole, l)
		if i == 0 {
			err = b.remain(ctx, d, &out, f, policies)
		}
		if err = errors.Join(err, d.stop()); err != nil {
			return err
		}
		if d, l, err = b.launch(ctx); err != nil {
			return err
		}
		adopted = append(adopted, l)
		if err := d.stop(); err != nil {
			return err
		}
	}
	out.whole, out.adopted = middle(whole), middle(adopted)
	b.figures = append(b.figures, out)
	fmt.Printf("%d pods, %d policies: RSS %.1f MiB (peak %.1f), live heap %.1f MiB, start %.2f s, listed to loaded %.3f s\n",
		f.pods, policies, out.memory.rss/mib, out.memory.peak/mib, out.memory.live/mib, out.whole.total, out.whole.listed)
	return nil
}

func middle(launches []launch) launch {
	var total, listed []float64
	for _, l := range launches {
		total, listed = append(total, l.total), append(listed, l.listed)
	}
	return launch{median(total), median(listed)}
}

// remain measures what podwalld holds once it has nothing to do, and what it uses when it has.
func (b *bench) remain(ctx context.Context, d *daemon, out *figures, f fleet, policies int) error {
	if err := pause(ctx, b.settle); err != nil {
		return err
	}
	var err error
	if out.memory, err = d.footprint(); err != nil {
		return err
	}
	if f.pods != b.cpuPods || policies != b.cpuPolicies {
		return nil
	}
	p := &player{api: b.api, fleet: f, random: rand.New(rand.NewPCG(f.seed, 99)), next: f.pods}
	for i := range f.pods {
		p.alive = append(p.alive, i)
	}
	mixed := []event{p.heartbeat, p.heartbeat, p.relabel, p.create, p.remove}
	for _, s := range []struct {
		label  string
		rate   int
		events []event
	}{
		{"nothing happens", 0, nil},
		{"all kinds", 100, mixed},
		{"heartbeats, which change nothing that counts", 100, []event{p.heartbeat}},
		{"all kinds", 1000, mixed},
		{"heartbeats, which change nothing that counts", 1000, []event{p.heartbeat}},
		{"labels", 1000, []event{p.relabel}},
		{"pods created", 1000, []event{p.create}},
		{"pods deleted", 1000, []event{p.remove}},
	} {
		begin, err := d.cpu()
		if err != nil {
			return err
		}
		since := time.Now()
		behind, err := p.play(ctx, s.rate, b.play, s.events)
		if err != nil {
			return err
		}
		end, err := d.cpu()
		if err != nil {
			return err
		}
		b.loads = append(b.loads, load{s.label, s.rate, 100 * float64(end-begin) / float64(time.Since(since)), behind})
	}
	return p.restore()
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// event changes something of a cluster.
type event func() error

// player plays events with pods of other nodes.
type player struct {
	api    *apiServer
	fleet  fleet
	random *rand.Rand
	alive  []int
	next   int // the number of the next pod that is created
	gone   []int
	beats  int
}

// play plays events at a rate, for some time, and returns how many of them it could not send in time.
func (p *player) play(ctx context.Context, rate int, d time.Duration, events []event) (int, error) {
	if rate == 0 {
		return 0, pause(ctx, d)
	}
	const step = 10 * time.Millisecond
	ticker := time.NewTicker(step)
	defer ticker.Stop()
	want := int(d.Seconds() * float64(rate))
	sent := 0
	for begin := time.Now(); time.Since(begin) < d; {
		for due := min(int(time.Since(begin).Seconds()*float64(rate)), want); sent < due; sent++ {
			if err := events[sent%len(events)](); err != nil {
				return 0, err
			}
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-ticker.C:
		}
	}
	return want - sent, nil
}

// remote picks the place in alive of a pod of another node.
func (p *player) remote() int {
	for {
		at := p.random.IntN(len(p.alive))
		if i := p.alive[at]; i >= p.fleet.pods || !p.fleet.isLocal(i) {
			return at
		}
	}
}

// heartbeat is what most updates of pods are: a condition, an annotation.
func (p *player) heartbeat() error {
	pod := p.fleet.pod(p.alive[p.remote()])
	p.beats++
	pod.Annotations["last-seen"] = fmt.Sprint(p.beats)
	pod.Status.Conditions[2].LastProbeTime.Time = created.Add(time.Duration(p.beats) * time.Second)
	return p.api.put(pod)
}

// relabel makes a pod one of another app, so that it leaves and enters peer sets. The heartbeats take it back.
func (p *player) relabel() error {
	pod := p.fleet.pod(p.alive[p.remote()])
	pod.Labels["app"] = appName(p.random.IntN(10))
	return p.api.put(pod)
}

func (p *player) create() error {
	i := p.next
	p.next++
	p.alive = append(p.alive, i)
	return p.api.put(p.fleet.pod(i))
}

func (p *player) remove() error {
	at := p.remote()
	i := p.alive[at]
	last := len(p.alive) - 1
	p.alive[at], p.alive = p.alive[last], p.alive[:last]
	if i < p.fleet.pods {
		p.gone = append(p.gone, i)
	}
	return p.api.remove(p.fleet.pod(i))
}

// restore makes the cluster what it was, less the order of its pods.
func (p *player) restore() error {
	for _, i := range p.alive {
		if i >= p.fleet.pods {
			if err := p.api.remove(p.fleet.pod(i)); err != nil {
				return err
			}
		}
	}
	for i := range p.fleet.pods {
		if err := p.api.put(p.fleet.pod(i)); err != nil {
			return err
		}
	}
	return nil
}

const mib = 1 << 20

func (b *bench) find(pods, policies int) (figures, bool) {
	for _, f := range b.figures {
		if f.pods == pods && f.policies == policies {
			return f, true
		}
	}
	return figures{}, false
}

func (b *bench) report(file *result.File) {
	what := fmt.Sprintf("%d pods of the node under test registered; pods of %.0f bytes in protobuf", b.local, b.size)
	memory := result.Table{
		ID: "scale-memory", Title: "Memory of podwalld at rest", Note: what,
		Columns: []result.Column{
			{Name: "RSS", Unit: "MiB"},
			{Name: "RSS of it anonymous", Unit: "MiB"},
			{Name: "peak RSS", Unit: "MiB"},
			{Name: "heap in use", Unit: "MiB"},
			{Name: "live heap", Unit: "MiB"},
		},
		Plot: &result.Plot{X: "pods", LogX: true, LogY: true, Y: []string{"RSS"}},
	}
	starts := result.Table{
		ID: "scale-start", Title: "Start of podwalld, median",
		Note: what + "; from exec to ready, and from the last byte of the last list on the API server's side to ready: tables gone, or kept from the last run",
		Columns: []result.Column{
			{Name: "start, gone", Unit: "s"}, {Name: "listed to loaded, gone", Unit: "s"}, {Name: "start, kept", Unit: "s"}, {Name: "listed to loaded, kept", Unit: "s"},
		},
		Plot: &result.Plot{X: "pods", LogX: true, LogY: true, Y: []string{"start, gone"}},
	}
	for _, f := range b.figures {
		label := fmt.Sprintf("%d pods, %d policies", f.pods, f.policies)
		series := fmt.Sprintf("%d policies", f.policies)
		m := f.memory
		memory.Rows = append(memory.Rows, result.Row{
			Label: label, X: float64(f.pods), Series: series, Values: result.Values(m.rss/mib, m.anon/mib, m.peak/mib, m.heapInUse/mib, m.live/mib),
		})
		starts.Rows = append(starts.Rows, result.Row{
			Label: label, X: float64(f.pods), Series: series, Values: result.Values(f.whole.total, f.whole.listed, f.adopted.total, f.adopted.listed),
		})
	}
	cpu := result.Table{
		ID: "scale-cpu", Title: fmt.Sprintf("Processor time of podwalld under events of other nodes' pods, %d pods and %d policies", b.cpuPods, b.cpuPolicies),
		Note:    "user and system time of the process, in percent of one core; all kinds: two fifths heartbeats, and a fifth each relabelled, created and deleted",
		Columns: []result.Column{{Name: "events", Unit: "1/s"}, {Name: "CPU", Unit: "%"}, {Name: "per event", Unit: "µs"}, {Name: "sent late", Unit: "count"}},
	}
	var idle float64
	for _, l := range b.loads {
		row := result.Row{Label: fmt.Sprintf("%s, %d/s", l.label, l.rate), X: float64(l.rate), Values: result.Values(float64(l.rate), l.cpu, 0, float64(l.behind))}
		if l.rate == 0 {
			idle = l.cpu
			row.Values[2] = nil
		} else {
			*row.Values[2] = (l.cpu - idle) / 100 / float64(l.rate) * 1e6
		}
		cpu.Rows = append(cpu.Rows, row)
	}
	file.Tables = append(file.Tables, memory, starts, cpu)
	if b.target {
		b.targets(file)
	}
}

func (b *bench) targets(file *result.File) {
	add := func(what string, figure, limit float64, unit string) {
		file.Targets = append(file.Targets, result.Target{What: what, Figure: figure, Limit: limit, Unit: unit})
	}
	middle, _ := b.find(10_000, 1000)
	if large, ok := b.find(100_000, 10_000); ok {
		add("RSS at 10k pods and 1k policies", middle.memory.rss/mib, 64, "MiB")
		add("RSS at 100k pods and 10k policies", large.memory.rss/mib, 256, "MiB")
	}
	if many, ok := b.find(100_000, 1000); ok {
		add("heap growth per remote pod, from 10k to 100k pods at 1k policies", (many.memory.live-middle.memory.live)/90_000, 1024, "bytes")
	}
	add("objects listed to table loaded, 10k pods and 1k policies", middle.whole.listed, 1, "s")
	for _, l := range b.loads {
		if l.label == "all kinds" && l.rate == 100 {
			add("CPU at 100 pod events a second, 10k pods and 1k policies", l.cpu, 3, "%")
		}
	}
}
