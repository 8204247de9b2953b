package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/cli"
	"github.com/podwall/podwall/pkg/metrics"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/reconcile"
	"github.com/podwall/podwall/pkg/verdictlog"
)

// denials reads what the rules deny and knows whose it is.
type denials struct {
	loop    *reconcile.Loop
	metrics *metrics.Metrics
	log     *slog.Logger
	records *verdictlog.Log

	// Owned by watch.
	pods   []reconcile.PodStatus // that local was made of
	local  map[netip.Addr]*reconcile.PodStatus
	ioctls int // a socket to ask for the names of interfaces
}

func newDenials(loop *reconcile.Loop, m *metrics.Metrics, log *slog.Logger) *denials {
	d := &denials{loop: loop, metrics: m, log: log}
	d.records = verdictlog.New(verdictlog.Config{
		Resolve: d.resolve, Peers: d.peers, Denied: d.denied, Lost: func(n int) { m.DeniedLost.Add(float64(n)) },
	})
	return d
}

// watch reads denied packets from the moment on that this daemon writes on the node. That it cannot read them is told once; nothing of what
// is enforced depends on it.
func (d *denials) watch(ctx context.Context) error {
	if err := d.loop.WaitReady(ctx); err != nil {
		return nil //nolint:nilerr // the daemon was stopped before it was ready
	}
	var err error
	if d.ioctls, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open a socket to ask for the names of interfaces: %w", err)
	}
	defer func() { _ = unix.Close(d.ioctls) }()
	said := ""
	for {
		err := d.read(ctx, &said)
		if ctx.Err() != nil {
			return nil
		}
		if said != err.Error() {
			said = err.Error()
			d.log.Warn("denied packets cannot be read and are not shown by podwalld denials; policies are enforced all the same. Trying again until it works", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// read returns when the group cannot be bound, or is lost.
func (d *denials) read(ctx context.Context, said *string) error {
	reader, err := verdictlog.Open(policy.LogGroup, policy.LogSnaplen)
	if err != nil {
		return err
	}
	defer func() { _ = reader.Close() }()
	if *said != "" {
		d.log.Info("denied packets are read again", "group", policy.LogGroup)
		*said = ""
	}
	err = d.records.Read(ctx, reader)
	if ctx.Err() == nil {
		d.metrics.LogUnbound.Inc()
	}
	return err
}

// resolve names what is of this node.
func (d *denials) resolve(p verdictlog.Packet) (verdictlog.Names, bool) {
	direction, ok := policy.Denied(p.Prefix)
	if !ok {
		return verdictlog.Names{}, false
	}
	if pods := d.loop.Pods(); len(pods) != len(d.pods) || len(pods) > 0 && &pods[0] != &d.pods[0] {
		d.pods, d.local = pods, map[netip.Addr]*reconcile.PodStatus{}
		for i := range pods {
			for _, ip := range pods[i].IPs {
				d.local[ip] = &pods[i]
			}
		}
	}
	n := verdictlog.Names{Direction: direction, Policies: []string{}, In: d.interfaceName(p.In), Out: d.interfaceName(p.Out)}
	source, destination := d.local[p.Src], d.local[p.Dst]
	if source != nil {
		n.Source = source.Namespace + "/" + source.Name
	}
	if destination != nil {
		n.Destination = destination.Namespace + "/" + destination.Name
	}
	switch {
	case direction == policy.DirectionEgress && source != nil:
		n.Policies = append(n.Policies, source.Egress...)
	case direction == policy.DirectionIngress && destination != nil:
		n.Policies = append(n.Policies, destination.Ingress...)
	}
	return n, true
}

// peers names pods of other nodes.
func (d *denials) peers(names map[netip.Addr]string) {
	for ip := range names {
		if p := d.loop.PodAt(ip); p != nil {
			names[ip] = p.Namespace + "/" + p.Name
		}
	}
}

// interfaceName returns an empty name for an interface that has gone. net.InterfaceByIndex would list all of them.
func (d *denials) interfaceName(index uint32) string {
	req, err := unix.NewIfreq("")
	if index == 0 || err != nil {
		return ""
	}
	req.SetUint32(index)
	if err := unix.IoctlIfreq(d.ioctls, unix.SIOCGIFNAME, req); err != nil {
		return ""
	}
	return req.Name()
}

func (d *denials) denied(r verdictlog.Denial) {
	d.metrics.DeniedLogged.Add(float64(r.Packets))
	d.log.Debug("denied", "direction", r.Direction, "from", partyText(r.Source), "to", partyText(r.Destination), "port", portText(&r), "packets", r.Packets, "policies", r.Policies)
}

// view answers GET /v1/denials.
func (d *denials) view(_ context.Context, q url.Values) (any, error) {
	list := d.records.Last()
	pod := q.Get("pod")
	if pod == "" {
		return list, nil
	}
	about := []verdictlog.Denial{}
	for i := range list {
		if list[i].About(pod) {
			about = append(about, list[i])
		}
	}
	return about, nil
}

// follow answers GET /v1/denials?follow=1.
func (d *denials) follow(ctx context.Context, q url.Values, send func(any) error) error {
	pod := q.Get("pod")
	return d.records.Follow(ctx, func(e verdictlog.Event) error {
		if e.Denial != nil && pod != "" && !e.About(pod) {
			return nil
		}
		return send(e)
	})
}

const denialsHelp = `
Examples:
  podwalld denials                        what was denied lately on this node (the last 1,000 records)
  podwalld denials -f                     the same, and what is denied from now on, until Ctrl-C
  podwalld denials -f --pod shop/web      only what comes from this pod or goes to it
  podwalld denials -o json | jq '.[].destination'

A line is a flow: its packets within a second. DIRECTION says whose policies denied it: ingress those of the receiver, egress those of
the sender. POLICIES isolate that pod in that direction, and none of them allows this: one of them, or another one beside them, needs a
rule for it. podwalld explain FROM TO PORT tells what each of them says.

At most 10 packets a second, after 20 at once, are told per pod and direction; the counters in nft list table inet podwall have all
(what pods send: by address, in its sets ed4 and ed6, until ten minutes after the last).
Not here: pods that are closed (podwalld pods says why), connections that were ended by a change (the daemon's log), forged addresses
and link-local traffic (counters of the table netdev podwall).
`

func showDenials(ctx context.Context, c *cli.Call) error {
	follow := c.Flags.Bool("f", false, "follow: show what is kept, then what is denied from now on")
	pod := c.Flags.String("pod", "", "only packets from or to this pod, as `NAMESPACE/NAME`")
	socket := c.Flags.String("socket", agentapi.DefaultSocket, "`PATH` of the daemon's socket")
	output := c.Flags.String("o", "table", "output as `table|json`; with -f a JSON object per line")
	err := c.Parse()
	if errors.Is(err, flag.ErrHelp) {
		_, _ = io.WriteString(c.Stdout, denialsHelp)
	}
	if err != nil {
		return err
	}
	if *output != "table" && *output != "json" {
		return cli.UsageError{Err: fmt.Errorf("-o %q: must be table or json", *output)}
	}
	query := url.Values{}
	if *pod != "" {
		if namespace, name, ok := strings.Cut(*pod, "/"); !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
			return cli.UsageError{Err: fmt.Errorf("--pod %q: want NAMESPACE/NAME, as podwalld pods shows it", *pod)}
		}
		query.Set("pod", *pod)
	}
	client := agentapi.NewClient(*socket)
	if *follow {
		return followDenials(ctx, c.Stdout, client, query, *output == "json")
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var list []verdictlog.Denial
	if err := client.View(ctx, "denials", query, &list); err != nil {
		return err
	}
	if *output == "json" {
		enc := json.NewEncoder(c.Stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(list)
	}
	t := newTable(c.Stdout)
	t.row(denialColumns...)
	for i := range list {
		t.row(denialRow(&list[i])...)
	}
	return t.Flush()
}

// followDenials prints events as they come. Columns are as wide as most names need: what comes is not known yet.
func followDenials(ctx context.Context, w io.Writer, client *agentapi.Client, query url.Values, asJSON bool) error {
	const line = "%-19v  %-9v  %-40v  %-40v  %-10v  %7v  %v\n"
	if !asJSON {
		if _, err := fmt.Fprintf(w, line, denialColumns...); err != nil {
			return err
		}
	}
	return client.Follow(ctx, "denials", query, func(text []byte) error {
		if asJSON {
			_, err := fmt.Fprintf(w, "%s\n", text)
			return err
		}
		var e verdictlog.Event
		if err := json.Unmarshal(text, &e); err != nil {
			return fmt.Errorf("read what podwalld sends: %w", err)
		}
		if e.Denial == nil {
			_, err := fmt.Fprintf(w, "... %d records were missed: this reader, or its terminal, was too slow\n", e.Missed)
			return err
		}
		_, err := fmt.Fprintf(w, line, denialRow(e.Denial)...)
		return err
	})
}

var denialColumns = []any{"TIME", "DIRECTION", "FROM", "TO", "PORT", "PACKETS", "POLICIES"}

func denialRow(d *verdictlog.Denial) []any {
	return []any{
		d.Time.Local().Format(time.DateTime), d.Direction, partyText(d.Source), partyText(d.Destination), portText(d), d.Packets,
		strings.Join(d.Policies, ","),
	}
}

func partyText(p verdictlog.Party) string {
	switch {
	case p.Node:
		return "this node (" + p.IP.String() + ")"
	case p.Pod != "":
		return p.Pod + " (" + p.IP.String() + ")"
	}
	return p.IP.String()
}

// portText is the destination port as explain takes it, or what there is instead.
func portText(d *verdictlog.Denial) string {
	switch {
	case d.ICMP != nil:
		return fmt.Sprintf("%s type %d", d.Protocol, d.ICMP.Type)
	case d.Fragment:
		return d.Protocol + " fragment"
	case d.Destination.Port == 0:
		return d.Protocol
	}
	return strconv.Itoa(int(d.Destination.Port)) + "/" + d.Protocol
}
