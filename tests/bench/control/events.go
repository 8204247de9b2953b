package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"k8s.io/utils/clock"

	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/conntrack"
	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/reconcile"
	"github.com/podwall/podwall/pkg/registry"
	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/bench/result"
)

// patience bounds the wait for one commit.
const patience = 20 * time.Second

// watched is the kernel, with the time of each commit.
type watched struct {
	*nft.Kernel
	commits chan commit
}

type commit struct {
	begun, done time.Time
	err         error
}

// Commit tells of it, unless nobody has listened for a long time.
func (w *watched) Commit(ctx context.Context, d ruleset.Delta) error {
	c := commit{begun: time.Now()}
	c.err = w.Kernel.Commit(ctx, d)
	c.done = time.Now()
	select {
	case w.commits <- c:
	default:
	}
	return c.err
}

// daemon is what podwalld consists of, without its sources and its socket.
type daemon struct {
	sample
	*reconcile.Loop
	kernel   *watched
	registry *registry.Registry
	end      func() error
}

// start runs the loop with the cluster and the node's pods, and waits until they are enforced.
func start(ctx context.Context, s sample, links []int) (*daemon, error) {
	kernel, err := nft.New(nft.Config{Own: true})
	if err != nil {
		return nil, err
	}
	connections, err := conntrack.New(conntrack.Config{})
	if err != nil {
		return nil, errors.Join(err, kernel.Close())
	}
	dir, err := os.MkdirTemp("/run", "control-") // a tmpfs, as in production
	if err != nil {
		return nil, err
	}
	reg, _, err := registry.Open(dir)
	if err != nil {
		return nil, err
	}
	d := &daemon{sample: s, kernel: &watched{kernel, make(chan commit, 16)}, registry: reg}
	d.Loop = reconcile.New(reconcile.Config{
		NodeName: thisNode, Policy: options, Kernel: d.kernel, Links: registry.Links{}, Connections: connections,
		Log: slog.New(slog.DiscardHandler), Metrics: metrics.New(func() float64 { return 0 }), Clock: clock.RealClock{},
	})
	ctx, cancel := context.WithCancel(ctx)
	lead, ended := make(chan *registry.Registry, 1), make(chan error, 1)
	lead <- reg
	go func() { ended <- d.Run(ctx, lead) }()
	d.end = func() error {
		d.StandDown(true) // takes the tables away
		err := d.until(func() bool { left, err := kernel.Read(ctx, tables...); return err == nil && len(left) == 0 })
		cancel()
		err = errors.Join(err, <-ended, kernel.Close(), os.RemoveAll(dir))
		connections.Close()
		return err
	}
	d.Apply(s.objects()...)
	d.Synced()
	if err := d.WaitReady(ctx); err != nil {
		return nil, errors.Join(err, d.end())
	}
	var g errgroup.Group
	g.SetLimit(8)
	for i := range s.local {
		g.Go(func() error {
			return d.add(ctx, i, fmt.Sprint("container", i), attach.HostLink{Name: linkName(i), Index: links[i]})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, errors.Join(err, d.end())
	}
	return d, nil
}

func (d *daemon) until(done func() bool) error {
	for deadline := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("the loop is not done in time")
		}
	}
	return nil
}

// add is what an ADD asks of the loop.
func (d *daemon) add(ctx context.Context, i int, container string, link attach.HostLink) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	p := d.pod(i)
	return d.Attach(ctx, attach.Attachment{
		Network: "bench", Key: attach.Key{ContainerID: container, IfName: "eth0"}, Pod: attach.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		IPs: p.IPs, HostLink: link,
	})
}

// quiet waits until the loop has nothing to do: an event that meets it at work is another measurement.
func (d *daemon) quiet() error {
	calm := 0
	return d.until(func() bool {
		if calm++; d.Busy() != 0 {
			calm = 0
		}
		return calm > 1
	})
}

// after gives the loop an event and returns how long it took until the commit that follows was in force.
func (d *daemon) after(c cluster.Change) (time.Duration, error) {
	if err := d.quiet(); err != nil {
		return 0, err
	}
	for len(d.kernel.commits) > 0 {
		<-d.kernel.commits
	}
	begin := time.Now()
	d.Apply(c)
	select {
	case done := <-d.kernel.commits:
		return done.done.Sub(begin), done.err
	case <-time.After(patience):
		return 0, fmt.Errorf("nothing was committed after a change of %s", c.Key)
	}
}

// opened measures an ADD of a pod that is known, without the plugin and the socket: register, close, forget, open. Its veth is new, and
// goes after the DEL.
func (d *daemon) opened(ctx context.Context, round int) (time.Duration, error) {
	if err := d.quiet(); err != nil {
		return 0, err
	}
	container := fmt.Sprint("again", round)
	link, index, err := addLink("again")
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	if err := d.add(ctx, d.local-1, container, attach.HostLink{Name: "again", Index: index}); err != nil {
		return 0, err
	}
	took := time.Since(begin)
	if err := errors.Join(d.Detach(ctx, attach.Key{ContainerID: container, IfName: "eth0"}), netlink.LinkDel(link)); err != nil {
		return 0, err
	}
	d.LinkGone(index)
	return took, d.until(func() bool { return len(d.registry.Entries()) == d.local })
}

// measureEvents measures from an event to its commit.
func measureEvents(ctx context.Context, p plan, links []int, file *result.File) error {
	table := result.Table{
		ID:    "events",
		Title: "From an event to the kernel",
		Note: fmt.Sprintf("A lone event goes into the daemon's loop; the time ends when the commit that follows has been answered. %d local pods, %d events of each kind. "+
			"'Local pod opened' is a whole ADD of a known pod without the plugin and the socket: two commits and a walk through the connections. "+
			"'From scratch' is rendering and comparing everything, once, beside it: what an event would cost without indexes.", p.sizes[0].local, p.events),
	}
	kinds := []string{"peer added", "peer relabelled", "peer removed", "policy changed", "local pod opened"}
	for _, k := range kinds {
		table.Columns = append(table.Columns, result.Column{Name: k + " p50", Unit: "ms"}, result.Column{Name: k + " p99", Unit: "ms"})
	}
	table.Columns = append(table.Columns, result.Column{Name: "from scratch", Unit: "ms"})
	for _, size := range p.sizes {
		took, scratch, err := events(ctx, sample{size}, links, p.events)
		if err != nil {
			return fmt.Errorf("events at %s: %w", size, err)
		}
		row := result.Row{Label: size.String(), X: float64(size.pods)}
		for _, k := range kinds {
			row.Values = append(row.Values, result.Values(took[k].ms(.5), took[k].ms(.99))...)
		}
		row.Values = append(row.Values, result.Values(scratch)...)
		table.Rows = append(table.Rows, row)
		if size != p.sizes[len(p.sizes)-1] {
			continue
		}
		peer := max(took["peer added"].ms(.99), took["peer relabelled"].ms(.99), took["peer removed"].ms(.99))
		file.Targets = append(file.Targets,
			result.Target{What: "one peer, event to commit, p99 at " + size.String(), Figure: peer, Limit: 2, Unit: "ms"},
			result.Target{What: fmt.Sprintf("policy change, event to commit, p99 at %d local pods, %s", size.local, size), Figure: took["policy changed"].ms(.99), Limit: 10, Unit: "ms"})
	}
	file.Tables = append(file.Tables, table)
	return nil
}

// events does every kind of event in turns.
func events(ctx context.Context, s sample, links []int, rounds int) (map[string]times, float64, error) {
	d, err := start(ctx, s, links)
	if err != nil {
		return nil, 0, err
	}
	took := map[string]times{}
	var scratch times
	err = func() error {
		peer := s.pod(s.pods)
		other := s.pod(s.pods)
		other.Labels = map[string]string{"app": "app1"}
		if peer.Labels["app"] == "app1" {
			other.Labels["app"] = "app2"
		}
		for round := range rounds {
			if err := ctx.Err(); err != nil {
				return err
			}
			for _, e := range []struct {
				kind   string
				change cluster.Change
			}{
				{"peer added", changed(peer)},
				{"peer relabelled", changed(other)},
				{"peer removed", cluster.Change{Key: peer.Key()}},
				{"policy changed", changed(s.policy(0, defaultPort+1+int32(round%2)))},
			} {
				t, err := d.after(e.change)
				if err != nil {
					return fmt.Errorf("%s: %w", e.kind, err)
				}
				took[e.kind] = append(took[e.kind], t)
			}
			t, err := d.opened(ctx, round)
			if err != nil {
				return fmt.Errorf("local pod opened: %w", err)
			}
			took["local pod opened"] = append(took["local pod opened"], t)
		}
		before, after := s.render(s.local), s.input(s.local, changed(peer))
		for range 5 {
			begin := time.Now()
			ruleset.Diff(before, policy.Render(after).Ruleset)
			scratch = append(scratch, time.Since(begin))
		}
		return nil
	}()
	return took, scratch.ms(.5), errors.Join(err, d.end())
}
