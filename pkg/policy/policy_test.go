package policy

import (
	"cmp"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/podwall/podwall/pkg/cluster"
	"github.com/podwall/podwall/pkg/ruleset"
)

var update = flag.Bool("update", false, "rewrite the golden parts of testdata/*.txtar")

// node is spec.nodeName of the pods that become endpoints; a pod with the annotation-free label podwall-test-link=bridge is a
// port of br0, all others are routed.
const node = "here"

// TestScenarios runs testdata/*.txtar: objects.yaml in; the ruleset (ruleset.nft), the problems and the fate of probes out.
//
// A line of probes is "FROM TO PROTO[/PORT] VERDICT": FROM and TO are namespace/pod, "node" or an IP, VERDICT is allow or deny.
// A probe between pods is judged in every family that both have.
func TestScenarios(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s := load(t, archive)
			out := Render(s.input)
			s.golden(t, file, archive, out)
			probes := 0
			for _, line := range lines(part(archive, "probes")) {
				probes += s.probe(t, out, line)
			}
			if probes == 0 {
				t.Error("no probe was judged")
			}
		})
	}
}

type scenario struct {
	input Input
	pods  map[string]*cluster.Pod
	links map[string]Endpoint // by address
}

func load(t *testing.T, archive *txtar.Archive) *scenario {
	t.Helper()
	objects, problems := cluster.ParseFile("objects.yaml", []byte(part(archive, "objects.yaml")))
	for _, p := range problems {
		t.Fatalf("objects.yaml: %s", p)
	}
	s := &scenario{
		input: Input{Model: cluster.NewModel(), Options: Options{Table: "podwall", Log: true}},
		pods:  map[string]*cluster.Pod{}, links: map[string]Endpoint{},
	}
	for option := range strings.FieldsSeq(part(archive, "options")) {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "reject":
			s.input.Options.Reject = true
		case "cut":
			s.input.Options.Cut = true
		case "allow-own-node":
			s.input.Options.AllowOwnNode = true
		case "node-dns":
			s.input.Options.NodeDNS = append(s.input.Options.NodeDNS, netip.MustParseAddr(value))
		default:
			t.Fatalf("unknown option %q", option)
		}
	}
	closed := strings.Fields(part(archive, "closed"))
	for _, o := range objects {
		s.input.Model.Apply(cluster.Change{Key: o.Key(), Object: o})
		pod, ok := o.(*cluster.Pod)
		if !ok {
			continue
		}
		name := nameOf(pod)
		s.pods[name] = pod
		if pod.Node != node || pod.HostNetwork {
			continue
		}
		e := Endpoint{ID: strings.ReplaceAll(name, "/", "-"), Name: name, Pod: pod, IPs: pod.IPs, Link: "veth-" + pod.Name}
		switch pod.Labels["podwall-test-link"] {
		case "bridge":
			e.Bridge = "br0"
		case "adopted":
			e.Link, e.Device = "", e.Link
		}
		if slices.Contains(closed, name) {
			e.Pod = nil
		}
		s.input.Endpoints = append(s.input.Endpoints, e)
		for _, ip := range e.IPs {
			s.links[ip.String()] = e
		}
	}
	return s
}

func part(archive *txtar.Archive, name string) string {
	for _, f := range archive.Files {
		if f.Name == name {
			return string(f.Data)
		}
	}
	return ""
}

func lines(text string) []string {
	var list []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line != "" {
			list = append(list, line)
		}
	}
	return list
}

// golden compares the parts that Render writes; with -update it writes them.
func (s *scenario) golden(t *testing.T, file string, archive *txtar.Archive, out Output) {
	t.Helper()
	var problems strings.Builder
	for _, p := range out.Problems {
		fmt.Fprintln(&problems, p)
	}
	got := map[string]string{"ruleset.nft": out.Ruleset.String(), "problems": problems.String()}
	changed := false
	for name, text := range got {
		i := slices.IndexFunc(archive.Files, func(f txtar.File) bool { return f.Name == name })
		if i < 0 {
			if name == "problems" && text != "" {
				t.Errorf("unexpected problems:\n%s", text)
			}
			continue
		}
		if diff := gocmp.Diff(string(archive.Files[i].Data), text); diff != "" {
			if *update {
				archive.Files[i].Data, changed = []byte(text), true
				continue
			}
			t.Errorf("%s (-want +got; -update accepts):\n%s", name, diff)
		}
	}
	if changed {
		if err := os.WriteFile(file, txtar.Format(archive), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// probe judges one line and returns how many packets it stands for.
func (s *scenario) probe(t *testing.T, out Output, line string) int {
	t.Helper()
	f := strings.Fields(line)
	if len(f) != 4 || (f[3] != "allow" && f[3] != "deny") {
		t.Fatalf("bad probe %q", line)
	}
	proto, port, _ := strings.Cut(f[2], "/")
	number, _ := strconv.Atoi(port)
	judged := 0
	for _, from := range s.addresses(t, f[0]) {
		for _, to := range s.addresses(t, f[1]) {
			if from.Is4() != to.Is4() {
				continue
			}
			p := ruleset.Packet{
				Src: from, Dst: to, Sport: 40000, Dport: uint16(number), HopLimit: 64, CT: ruleset.New, TCPFlags: ruleset.SYN,
				Proto: map[string]uint8{"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "other": 47}[proto],
			}
			if proto == "icmp" && !from.Is4() {
				p.Proto, p.ICMPv6Type = 58, 128
			}
			verdict := s.send(t, out.Ruleset, p, f[0], f[1])
			if want := map[string]ruleset.VerdictKind{"allow": ruleset.Accept, "deny": ruleset.Drop}[f[3]]; verdict != want {
				t.Errorf("%s (%s -> %s): got %s", line, from, to, map[ruleset.VerdictKind]string{ruleset.Accept: "allow", ruleset.Drop: "deny"}[verdict])
			}
			judged++
		}
	}
	if judged == 0 {
		t.Errorf("%s: no common address family", line)
	}
	return judged
}

func (s *scenario) addresses(t *testing.T, name string) []netip.Addr {
	t.Helper()
	if name == "node" {
		return []netip.Addr{netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("fd00:1::1")}
	}
	if p := s.pods[name]; p != nil {
		return p.IPs
	}
	return []netip.Addr{netip.MustParseAddr(name)}
}

// send takes a packet along its way over the node: the sender's veth, forward or input, the receiver's veth.
func (s *scenario) send(t *testing.T, rs ruleset.Ruleset, p ruleset.Packet, from, to string) ruleset.VerdictKind {
	t.Helper()
	hook := func(name string, p ruleset.Packet) bool {
		r, err := rs.Trace(name, p)
		if err != nil {
			t.Fatalf("trace: %v", err)
		}
		return r.Verdict == ruleset.Accept
	}
	if from == "node" {
		return ruleset.Accept // output is not hooked
	}
	p.PktType = ruleset.PktHost
	sender, receiver := s.links[p.Src.String()], s.links[p.Dst.String()]
	p.IIFName = cmp.Or(sender.Link, "eth0")
	if sender.Link != "" && !hook("ingress", p) {
		return ruleset.Drop
	}
	p.IIFName = cmp.Or(sender.Bridge, sender.Link, "eth0")
	if to == "node" {
		if !hook("input", p) {
			return ruleset.Drop
		}
		return ruleset.Accept
	}
	if !hook("forward", p) {
		return ruleset.Drop
	}
	if sender.Bridge != "" && sender.Bridge == receiver.Bridge {
		p.PktType = ruleset.PktOther
	}
	p.OIFName = receiver.Link
	if receiver.Link != "" && !hook("egress", p) {
		return ruleset.Drop
	}
	return ruleset.Accept
}
