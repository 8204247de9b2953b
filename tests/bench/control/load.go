package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/ruleset"
	"github.com/podwall/podwall/tests/bench/result"
)

var tables = []ruleset.TableID{{Family: ruleset.Inet, Name: options.Table}, {Family: ruleset.Netdev, Name: options.Table}}

// measureLoad loads a node's ruleset into an empty namespace, by podwall and by nft in turns.
func measureLoad(ctx context.Context, p plan, file *result.File) error {
	kernel, err := nft.New(nft.Config{})
	if err != nil {
		return err
	}
	defer kernel.Close()
	want := sample{p.load}.render(p.load.local)
	text := want.String()
	byPodwall := func() error { return kernel.Commit(ctx, ruleset.Diff(nil, want)) }
	byNFT := func() error {
		cmd := exec.CommandContext(ctx, "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft -f: %w: %.300s", err, out)
		}
		return nil
	}
	var podwall, other, ratios []float64
	var listed [2]string
	for round := range p.loads {
		var took [2]time.Duration
		for i := range took {
			which := (round + i) % 2 // who is first takes turns
			load := []func() error{byPodwall, byNFT}[which]
			begin := time.Now()
			err := load()
			took[which] = time.Since(begin)
			if err == nil && round == 0 {
				listed[which], err = list(ctx)
			}
			if err := errors.Join(err, kernel.Commit(ctx, ruleset.Diff(want, nil))); err != nil {
				return fmt.Errorf("load everything: %w", err)
			}
		}
		if listed[0] != listed[1] || listed[0] == "" {
			return errors.New("load everything: nft lists not the same after podwall's load as after its own")
		}
		podwall = append(podwall, took[0].Seconds()*1e3)
		other = append(other, took[1].Seconds()*1e3)
		ratios = append(ratios, took[0].Seconds()/took[1].Seconds())
	}
	ratio := median(podwall) / median(other)
	file.Tables = append(file.Tables, result.Table{
		ID:    "load",
		Title: fmt.Sprintf("Load everything: %d local pods x %d policies x %d peers", p.load.local, p.load.policies, p.load.pods),
		Note: fmt.Sprintf("Medians of %d rounds in turns, from the rendered ruleset to the kernel's answer; the ruleset is %d kB of nft's text. "+
			"`nft list` shows the same tables after both. `nft -f` begins with the text and ends with the end of its process.", p.loads, len(text)/1000),
		Columns: []result.Column{{Name: "podwall", Unit: "ms"}, {Name: "nft -f", Unit: "ms"}, {Name: "ratio", Unit: "ratio"}, {Name: "median of ratios", Unit: "ratio"}},
		Rows:    []result.Row{{Label: p.load.String(), Values: result.Values(median(podwall), median(other), ratio, median(ratios))}},
	})
	file.Targets = append(file.Targets, result.Target{
		What: "full node load beside nft -f of the same ruleset", Figure: ratio, Limit: 0.5, Unit: "ratio",
	})
	return nil
}

// list returns what nft lists of the tables, as sorted sets and chains: they are listed as they were made, and podwall adds empty
// chains first.
func list(ctx context.Context) (string, error) {
	var blocks []string
	for _, t := range tables {
		out, err := exec.CommandContext(ctx, "nft", "list", "table", string(t.Family), t.Name).Output()
		if err != nil {
			return "", fmt.Errorf("nft list table %s %s: %w", t.Family, t.Name, err)
		}
		block := ""
		for l := range strings.Lines(string(out)) {
			block += l
			if strings.HasPrefix(l, "\t}") {
				blocks = append(blocks, string(t.Family)+block)
				block = ""
			}
		}
	}
	slices.Sort(blocks)
	return strings.Join(blocks, ""), nil
}

// measureCommits does and undoes single changes on a loaded node.
func measureCommits(ctx context.Context, p plan, file *result.File) error {
	kernel, err := nft.New(nft.Config{Own: true})
	if err != nil {
		return err
	}
	defer kernel.Close()
	s := sample{p.load}
	loaded := s.render(s.local)
	if err := kernel.Commit(ctx, ruleset.Diff(nil, loaded)); err != nil {
		return fmt.Errorf("load everything: %w", err)
	}
	peer := s.pod(s.pods)
	element := ruleset.Delta{Apply: oneElement(loaded, peer.IPs[0].AsSlice())}
	table := result.Table{
		ID:    "commits",
		Title: "One transaction on a loaded node",
		Note: fmt.Sprintf("The ruleset of %d local pods, %s. Each change is committed and taken back %d times; encoding is in the time, "+
			"finding the difference is not.", p.load.local, p.load, p.commits),
		Columns: []result.Column{{Name: "messages", Unit: "count"}, {Name: "there p50", Unit: "ms"}, {Name: "there p99", Unit: "ms"}, {Name: "back p50", Unit: "ms"}, {Name: "back p99", Unit: "ms"}},
	}
	for _, c := range []struct {
		name        string
		there, back ruleset.Delta
	}{
		{"one element of one peer set", element, undo(element)},
		between("one peer in all its sets", loaded, s.render(s.local, changed(peer))),
		between("one local pod", s.render(s.local-1), loaded),
		between("one policy's port", loaded, s.render(s.local, changed(s.policy(0, defaultPort+1)))),
	} {
		var there, back times
		if c.name == "one local pod" { // it is there: taken away first
			if err := kernel.Commit(ctx, c.back); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
		for range p.commits {
			begin := time.Now()
			err := kernel.Commit(ctx, c.there)
			middle := time.Now()
			err = errors.Join(err, kernel.Commit(ctx, c.back))
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			there, back = append(there, middle.Sub(begin)), append(back, time.Since(middle))
		}
		if c.name == "one local pod" {
			if err := kernel.Commit(ctx, c.there); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
		table.Rows = append(table.Rows, result.Row{Label: c.name, Values: result.Values(messages(c.there), there.ms(.5), there.ms(.99), back.ms(.5), back.ms(.99))})
		if len(table.Rows) == 1 {
			file.Targets = append(file.Targets, result.Target{What: "one peer element, commit only, median", Figure: there.ms(.5), Limit: 0.05, Unit: "ms"})
		}
	}
	file.Tables = append(file.Tables, table)
	return kernel.Commit(ctx, ruleset.Diff(loaded, nil))
}

// change is what is done and undone.
type change = struct {
	name        string
	there, back ruleset.Delta
}

func between(name string, from, to ruleset.Ruleset) change {
	return change{name, ruleset.Diff(from, to), ruleset.Diff(to, from)}
}

// oneElement adds an address to the largest plain set.
func oneElement(rs ruleset.Ruleset, ip []byte) []ruleset.Op {
	t := rs.Table(tables[0])
	var most *ruleset.Set
	for _, s := range t.Sets {
		if !s.Map && !s.Interval && s.Timeout == 0 && len(s.Key) == 1 && s.Key[0] == ruleset.IPv4Addr && (most == nil || len(s.Elements) > len(most.Elements)) {
			most = s
		}
	}
	return []ruleset.Op{{Kind: ruleset.AddElements, Table: t.ID, Set: most, Elements: map[ruleset.Elem]ruleset.Verdict{ruleset.Elem(ip): {}}}}
}

func undo(d ruleset.Delta) ruleset.Delta {
	op := d.Apply[0]
	op.Kind = ruleset.DelElements
	return ruleset.Delta{Apply: []ruleset.Op{op}}
}

// messages is how many the kernel gets, but for those that begin and end transactions.
func messages(d ruleset.Delta) float64 {
	n := 0
	for _, ops := range [][]ruleset.Op{d.Prepare, d.Apply, d.Cleanup} {
		for _, op := range ops {
			n++
			if op.Kind == ruleset.AddRules {
				n += len(op.Chain.Rules) - 1
			}
		}
	}
	return float64(n)
}
