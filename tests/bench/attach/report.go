package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/tests/bench/result"
)

// chains are what cnitool takes with ptp and host-local.
type chains struct {
	label    string
	add, del times
}

// measureChains runs whole conflists by cnitool: on the nodes in turns, and on one without podwall.
func measureChains(ctx context.Context, p plan, nodes []*node, binaries testnet.Binaries) ([]*chains, error) {
	bare, err := testnet.NewNode(ctx, testnet.Config{Name: "bare", CNI: "ptp", Families: []testnet.Family{testnet.IPv4}, Binaries: binaries})
	if err != nil {
		return nil, err
	}
	list := []*chains{{label: "without podwall"}}
	at := []*testnet.Node{bare}
	for _, n := range nodes {
		list = append(list, &chains{label: fmt.Sprintf("with podwall, %d pods", n.size)})
		at = append(at, n.Node)
	}
	for round := range p.chains {
		for i, n := range at {
			pod, err := n.NewPod("bench", fmt.Sprint("chain", round), "")
			if err != nil {
				return nil, err
			}
			begin := time.Now()
			_, err = n.CNITool(ctx, "add", pod)
			list[i].add = append(list[i].add, time.Since(begin))
			if err == nil {
				begin = time.Now()
				_, err = n.CNITool(ctx, "del", pod)
				list[i].del = append(list[i].del, time.Since(begin))
			}
			if err := errors.Join(err, n.RemovePod(pod)); err != nil {
				return nil, err
			}
		}
	}
	return list, nil
}

func report(file *result.File, p plan, nodes []*node, chains []*chains) {
	ms := func(names ...string) []result.Column {
		var list []result.Column
		for _, n := range names {
			list = append(list, result.Column{Name: n, Unit: "ms"})
		}
		return list
	}
	share := result.Table{
		ID: "share", Title: "podwall's share of ADD and DEL, with the plugin's process",
		Note: fmt.Sprintf("%d of each on every node, in turns. The pod is known and five policies select it; its veth is new each time. VERSION is the process "+
			"and nothing else, STATUS asks the daemon one question.", p.rounds),
		Columns: ms("ADD p50", "ADD p99", "DEL p50", "DEL p99", "STATUS p50", "STATUS p99", "VERSION p50", "VERSION p99"),
		Plot:    &result.Plot{X: "pods on the node", Y: []string{"ADD p50", "ADD p99", "DEL p50", "VERSION p50"}},
	}
	split := result.Table{
		ID: "split", Title: "Where an ADD spends its time",
		Note: "Medians. Process: start and end, by the plugin's own log. Link: finding the host side of the veth. Socket: a question and its answer. Rendering and " +
			"transactions: by the daemon's metrics, the pod's closed form and its open one together. The rest is the registration's file, the walk through the tracked " +
			"connections, and waiting for a processor. What a busy machine does not change much are CPU times: of the plugin's ADD, and the daemon's mean of a pod's " +
			"whole life, with the looks at its connections (the daemon's clock has 10 ms, so it takes many).",
		Columns: ms("process", "link", "socket", "rendering", "transactions", "rest", "ADD", "DEL's process", "DEL's transactions", "plugin's CPU", "daemon's CPU"),
	}
	for _, n := range nodes {
		row := result.Row{Label: fmt.Sprintf("%d pods", n.size), X: float64(n.size)}
		row.Values = result.Values(n.add.ms(.5), n.add.ms(.99), n.del.ms(.5), n.del.ms(.99), n.status.ms(.5), n.status.ms(.99), n.version.ms(.5), n.version.ms(.99))
		share.Rows = append(share.Rows, row)
		row.Values = result.Values(n.start.ms(.5), n.find.ms(.5), n.socket.ms(.5), n.render.ms(.5), n.commit.ms(.5), n.wait.ms(.5), n.add.ms(.5), n.delStart.ms(.5), n.delCommit.ms(.5),
			n.pluginCPU.ms(.5), n.daemonCPU.Seconds()*1e3/float64(len(n.add)))
		split.Rows = append(split.Rows, row)
	}
	whole := result.Table{
		ID: "chain", Title: "Whole chains by cnitool: ptp, host-local, podwall",
		Note:    fmt.Sprintf("%d of each, in turns. cnitool and every plugin are processes of their own.", p.chains),
		Columns: ms("ADD p50", "ADD p99", "DEL p50", "DEL p99"),
	}
	for _, c := range chains {
		whole.Rows = append(whole.Rows, result.Row{Label: c.label, Values: result.Values(c.add.ms(.5), c.add.ms(.99), c.del.ms(.5), c.del.ms(.99))})
	}
	file.Tables = append(file.Tables, share, split, whole)
	last := nodes[len(nodes)-1]
	file.Targets = append(file.Targets,
		result.Target{What: fmt.Sprintf("ADD, podwall's whole share, %d pods on the node, p50", last.size), Figure: last.add.ms(.5), Limit: 8, Unit: "ms"},
		result.Target{What: fmt.Sprintf("ADD, podwall's whole share, %d pods on the node, p99", last.size), Figure: last.add.ms(.99), Limit: 25, Unit: "ms"},
	)
}
