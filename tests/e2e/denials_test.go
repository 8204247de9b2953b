package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/policy"
	"github.com/podwall/podwall/pkg/verdictlog"
)

// denial is a record of `podwalld denials -o json`, as scripts read it.
type denial struct {
	Time        time.Time `json:"time"`
	Packets     int       `json:"packets"`
	Direction   string    `json:"direction"`
	Policies    []string  `json:"policies"`
	Source      party     `json:"source"`
	Destination party     `json:"destination"`
	Protocol    string    `json:"protocol"`
	ICMP        *struct {
		Type int `json:"type"`
	} `json:"icmp"`
	In  string `json:"in"`
	Out string `json:"out"`
}

type party struct {
	Pod  string     `json:"pod"`
	Node bool       `json:"node"`
	IP   netip.Addr `json:"ip"`
	Port uint16     `json:"port"`
}

// String is what a test compares: who, whose policies, to whom, what.
func (d denial) String() string {
	name := func(p party) string {
		if p.Node {
			return "node"
		}
		if p.Pod != "" {
			return p.Pod
		}
		return p.IP.String()
	}
	what := d.Protocol
	if d.ICMP != nil {
		what += fmt.Sprintf(" %d", d.ICMP.Type)
	} else {
		what += fmt.Sprintf(" %d", d.Destination.Port)
	}
	family := 6
	if d.Source.IP.Is4() {
		family = 4
	}
	return fmt.Sprintf("%s %s IPv%d %s -> %s by %s", d.Direction, what, family, name(d.Source), name(d.Destination), strings.Join(d.Policies, ","))
}

func denials(t *testing.T, n *testnet.Node, args ...string) []denial {
	t.Helper()
	out, err := n.Podwalld(t.Context(), "denials", append([]string{"-o", "json"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	var list []denial
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return list
}

func denialTexts(list []denial) []string {
	var texts []string
	for _, d := range list {
		texts = append(texts, d.String())
	}
	slices.Sort(texts)
	return slices.Compact(texts)
}

// Every denied packet is told with both names, in every family and protocol, and no allowed one is.
func TestDenialsNameBothPods(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		cni   string
		flags []string
	}{{"bridge", nil}, {"ptp", nil}, {"ptp", []string{"--deny=reject"}}, {"bridge", []string{"--established=keep"}}} {
		t.Run(tt.cni+strings.Join(tt.flags, ""), func(t *testing.T) {
			t.Parallel()
			external := testnet.External
			n := start(t, setup{cni: tt.cni, flags: tt.flags, manifests: map[string]string{
				"pods.yaml": podManifest("shop", "web", "app: web") + podManifest("shop", "client", "app: client") + podManifest("guests", "guest", "app: guest") +
					podManifest("shop", "caged", "app: caged") +
					"---\napiVersion: v1\nkind: Pod\nmetadata: {namespace: far, name: away}\nspec: {nodeName: elsewhere, containers: [{name: c}]}\nstatus: {podIPs: [{ip: 198.51.100.20}, {ip: '2001:db8:100::20'}]}\n",
				"policy.yaml": policyManifest("shop", "web", "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}") +
					policyManifest("shop", "cage", "{podSelector: {matchLabels: {app: caged}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: client}}}]}]}") +
					policyManifest("shop", "cage-more", "{podSelector: {matchLabels: {app: caged}}, policyTypes: [Egress]}"),
			}})
			ports := []testnet.Port{testnet.TCP(80), testnet.UDP(53)}
			web, client := add(t, n, "shop", "web", ports...), add(t, n, "shop", "client", ports...)
			guest, caged := add(t, n, "guests", "guest"), add(t, n, "shop", "caged")
			partner := n.Outside["partner"]
			if err := n.Host.Serve(ports...); err != nil {
				t.Fatal(err)
			}
			if err := n.Outside[external].Serve(ports...); err != nil {
				t.Fatal(err)
			}

			var want []string
			attempt := func(from, to *testnet.Host, source, destination, direction, policies string) {
				t.Helper()
				verdict := testnet.Allowed
				if direction != "" {
					verdict = testnet.Denied
				}
				var probes sync.WaitGroup // in turn they would take a minute
				for _, f := range n.Families {
					for _, port := range ports {
						probes.Go(func() {
							if got, err := (testnet.Probe{From: from, To: to, Family: f, Port: port}).Try(t.Context()); err != nil || got != verdict {
								t.Errorf("%s %s -> %s %s: %s, want %s (%v)", f, source, destination, port, got, verdict, err)
							}
						})
					}
				}
				probes.Wait()
				for _, f := range n.Families {
					reached, _ := ping(t, from, to, f, int(f)<<8|len(want))
					if reached != (direction == "") {
						t.Errorf("ping %s -> %s in %s arrives: %v", source, destination, f, reached)
					}
					if direction == "" {
						continue
					}
					fromName, toName := source, destination
					if source == external {
						fromName = from.Addrs[f].String()
					}
					if destination == external {
						toName = to.Addrs[f].String()
					}
					echo := map[testnet.Family]string{testnet.IPv4: "icmp 8", testnet.IPv6: "icmpv6 128"}[f]
					for _, what := range []string{"tcp 80", "udp 53", echo} {
						want = append(want, fmt.Sprintf("%s %s %s %s -> %s by %s", direction, what, f, fromName, toName, policies))
					}
				}
			}
			cage := "shop/cage,shop/cage-more"
			attempt(client.Host, web.Host, "shop/client", "shop/web", "", "")
			attempt(guest.Host, client.Host, "guests/guest", "shop/client", "", "")
			attempt(guest.Host, web.Host, "guests/guest", "shop/web", "ingress", "shop/web")
			attempt(caged.Host, client.Host, "shop/caged", "shop/client", "", "")
			attempt(caged.Host, web.Host, "shop/caged", "shop/web", "egress", cage) // the sender's end is the first to deny
			attempt(caged.Host, n.Host, "shop/caged", "node", "egress", cage)
			attempt(caged.Host, n.Outside[external], "shop/caged", external, "egress", cage)
			attempt(n.Outside[external], web.Host, external, "shop/web", "ingress", "shop/web")
			attempt(partner, web.Host, "far/away", "shop/web", "ingress", "shop/web") // a pod of another node
			attempt(n.Host, web.Host, "node", "shop/web", "", "")
			slices.Sort(want)

			var got []string
			deadline := time.Now().Add(changeTimeout)
			for got = denialTexts(denials(t, n)); !slices.Equal(got, want) && time.Now().Before(deadline); got = denialTexts(denials(t, n)) {
				time.Sleep(50 * time.Millisecond)
			}
			for _, text := range got {
				if !slices.Contains(want, text) {
					t.Errorf("unexpected: %s", text)
				}
			}
			for _, text := range want {
				if !slices.Contains(got, text) {
					t.Errorf("not told: %s", text)
				}
			}
			about := denials(t, n, "--pod", "guests/guest")
			if len(about) == 0 || slices.ContainsFunc(about, func(d denial) bool { return d.Source.Pod != "guests/guest" }) {
				t.Errorf("--pod guests/guest: %v", about)
			}
			for _, d := range about {
				if want := hostLink(t, n, guest).Name; d.In != want || d.Packets < 1 || time.Since(d.Time) > time.Minute || time.Since(d.Time) < 0 {
					t.Errorf("in %s, want %s; %d packets at %s", d.In, want, d.Packets, d.Time)
				}
			}
			table, err := n.Podwalld(t.Context(), "denials", "--pod", "guests/guest")
			if err != nil || !strings.Contains(table, "guests/guest ("+guest.Addrs[testnet.IPv4].String()+")") || !strings.Contains(table, "80/tcp") {
				t.Errorf("table (%v):\n%s", err, table)
			}
			t.Logf("denials:\n%s", table)
			text, err := n.Host.Run(t.Context(), "nft", "list", "table", "inet", "podwall")
			if err != nil || !strings.Contains(text, "limit rate 10/second burst 20 packets log prefix \"i") || !strings.Contains(text, "group 77") {
				t.Errorf("nft shows no such rule (%v)", err)
			}
			diff, err := n.Podwalld(t.Context(), "ruleset", "--diff")
			if err != nil || strings.TrimSpace(diff) != "" {
				t.Errorf("what the kernel holds differs from what was loaded (%v):\n%s", err, diff)
			}
		})
	}
}

// A follower gets what is kept and then what is denied from now on, and ends with the daemon.
func TestDenialsFollow(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: map[string]string{
		"pods.yaml":   podManifest("default", "client", "app: client") + podManifest("default", "server", "app: server"),
		"policy.yaml": policyManifest("default", "p", "{podSelector: {matchLabels: {app: server}}}"),
	}})
	client, server := add(t, n, "default", "client"), add(t, n, "default", "server")
	deny := func(port uint16) {
		t.Helper()
		expect(t, testnet.Probe{From: client.Host, To: server.Host, Family: testnet.IPv4, Port: testnet.UDP(port)}, testnet.Denied)
	}
	text := func(port int) string {
		return fmt.Sprintf("ingress udp %d IPv4 default/client -> default/server by default/p", port)
	}
	deny(1000)
	poll(t, "the first one is kept", func() bool { return slices.Contains(denialTexts(denials(t, n)), text(1000)) })

	lines, streamed := make(chan string, 100), make(chan error, 1)
	go func() {
		streamed <- agentapi.NewClient(n.Socket()).Follow(t.Context(), "denials", nil, func(line []byte) error {
			lines <- string(line)
			return nil
		})
	}()
	next := func(port int) {
		t.Helper()
		deadline := time.After(changeTimeout)
		for {
			select {
			case line := <-lines:
				var d denial
				if err := json.Unmarshal([]byte(line), &d); err != nil {
					t.Fatalf("%v: %s", err, line)
				}
				if d.String() == text(port) {
					return
				}
			case <-deadline:
				t.Fatalf("the stream does not tell %s", text(port))
			}
		}
	}
	next(1000) // it is connected
	type result struct {
		out string
		err error
	}
	printed := make(chan result, 1)
	go func() {
		out, err := n.Podwalld(t.Context(), "denials", "-f")
		printed <- result{out, err}
	}()
	deny(1001)
	next(1001)
	deny(1002) // by now the command has connected too
	next(1002)
	poll(t, "all are kept", func() bool { return len(denialTexts(denials(t, n))) == 3 })
	if err := n.StopDaemon(); err != nil {
		t.Error(err) // a follower must not keep it from stopping
	}
	timeout := time.After(changeTimeout)
	select {
	case err := <-streamed:
		if err == nil {
			t.Error("the stream ended without an error")
		}
	case <-timeout:
		t.Error("the stream does not end with the daemon")
	}
	select {
	case r := <-printed:
		if r.err == nil {
			t.Error("podwalld denials -f succeeds though the daemon has gone")
		}
		for _, part := range []string{"DIRECTION", "default/client (" + client.Addrs[testnet.IPv4].String() + ")", "1000/udp", "1001/udp", "1002/udp", "default/p"} {
			if !strings.Contains(r.out, part) {
				t.Errorf("podwalld denials -f does not print %q:\n%s", part, r.out)
			}
		}
	case <-timeout:
		t.Error("podwalld denials -f does not end with the daemon")
	}
}

// A flood of denied packets is not a flood of records: they are few, none is allowed, and another pod's denial is still told.
func TestDenialsFlood(t *testing.T) {
	t.Parallel()
	const packets, flows = 100_000, 1000
	n := start(t, setup{cni: "ptp", manifests: map[string]string{
		"pods.yaml":   podManifest("default", "noisy", "app: noisy") + podManifest("default", "quiet", "app: quiet") + podManifest("default", "server", "app: server") + podManifest("default", "other", "app: server"),
		"policy.yaml": policyManifest("default", "p", "{podSelector: {matchLabels: {app: server}}}"),
	}})
	noisy, quiet := add(t, n, "default", "noisy"), add(t, n, "default", "quiet")
	server, other := add(t, n, "default", "server"), add(t, n, "default", "other")
	before := consumed(t, n)
	begin := time.Now()
	flood(t, noisy.Host, server.Addrs[testnet.IPv4], packets, flows)
	took := time.Since(begin)
	expect(t, testnet.Probe{From: quiet.Host, To: other.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}, testnet.Denied)
	quietTold := func() bool {
		return slices.Contains(denialTexts(denials(t, n)), "ingress tcp 80 IPv4 default/quiet -> default/other by default/p")
	}
	poll(t, "the quiet pod's denial is told", quietTold)
	told := 0
	records := denials(t, n, "--pod", "default/noisy")
	for _, d := range records {
		told += d.Packets
	}
	after := consumed(t, n)
	t.Logf("%d packets in %s: %d records of %d packets; the daemon used %s of CPU, its memory went from %d to %d KiB",
		packets, took.Round(time.Millisecond), len(records), told, after.cpu-before.cpu, before.rss, after.rss)
	// 20 at once and 10 a second, for as long as it took; the kernel's clock ticks between packets.
	most := 20 + 10*(int(time.Since(begin)/time.Second)+2)
	if told == 0 || told > most || len(records) > told {
		t.Errorf("%d records of %d packets, want 1 to %d packets", len(records), told, most)
	}
	counted, err := n.Host.Run(t.Context(), "nft", "list", "table", "inet", "podwall")
	if err != nil || !slices.ContainsFunc(strings.Fields(counted), func(s string) bool {
		number, err := strconv.Atoi(s)
		return err == nil && number >= packets
	}) {
		t.Errorf("no rule has counted %d packets (%v): the flood did not reach the pod's chain", packets, err)
	}
	if cpu := after.cpu - before.cpu; cpu > 2*time.Second {
		t.Errorf("the daemon used %s of CPU for %d denied packets", cpu, packets)
	}
	if grown := after.rss - before.rss; grown > 20<<10 {
		t.Errorf("the daemon has grown by %d KiB", grown)
	}
}

// flood sends datagrams to so many ports in turn.
func flood(t *testing.T, from *testnet.Host, to netip.Addr, packets, flows int) {
	t.Helper()
	err := from.In(func() error {
		conn, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		for i := range packets {
			if _, err := conn.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(to, uint16(1000+i%flows))); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

type consumption struct {
	cpu time.Duration
	rss int // KiB
}

// consumed reads what the node's daemon has used so far.
func consumed(t *testing.T, n *testnet.Node) consumption {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", daemonPID(t, n)))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest) // proc(5): state is field 3, utime 14, stime 15, rss 24
	number := func(i int) int {
		v, err := strconv.Atoi(fields[i-3])
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	const tick = time.Second / 100 // USER_HZ
	return consumption{cpu: time.Duration(number(14)+number(15)) * tick, rss: number(24) * os.Getpagesize() >> 10}
}

// If another program reads the group, the daemon says so once and enforces; when that one ends, it takes the group. It needs no capability
// but NET_ADMIN for it.
func TestDenialsGroupTaken(t *testing.T) {
	t.Parallel()
	n := lay(t, setup{cni: "bridge", flags: []string{"--listen", metricsAddress}})
	for name, text := range map[string]string{
		"pods.yaml":   podManifest("default", "client", "app: client") + podManifest("default", "server", "app: server"),
		"policy.yaml": policyManifest("default", "p", "{podSelector: {matchLabels: {app: server}}}"),
	} {
		if err := n.WriteManifest(name, text); err != nil {
			t.Fatal(err)
		}
	}
	var other *verdictlog.Reader
	err := n.Host.In(func() error {
		var err error
		other, err = verdictlog.Open(policy.LogGroup, policy.LogSnaplen)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	client, server := add(t, n, "default", "client"), add(t, n, "default", "server")
	probe := testnet.Probe{From: client.Host, To: server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}
	expect(t, probe, testnet.Denied)
	time.Sleep(3 * time.Second) // it tries again each second
	log := n.Log()
	if got := strings.Count(log, "denied packets cannot be read"); got != 1 || !strings.Contains(log, "another program reads it") {
		t.Errorf("said %d times that the group is taken, want once", got)
	}
	if !strings.Contains(log, "privileges dropped") {
		t.Error("the daemon has not dropped its privileges: this test shows nothing about them")
	}
	if list := denials(t, n); len(list) != 0 {
		t.Errorf("denials while another program reads: %v", list)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	poll(t, "the daemon reads again", func() bool { return strings.Contains(n.Log(), "denied packets are read again") })
	expect(t, probe, testnet.Denied)
	poll(t, "the denial is told", func() bool {
		return slices.Contains(denialTexts(denials(t, n)), "ingress tcp 80 IPv4 default/client -> default/server by default/p")
	})
	metrics := func() string {
		var conn net.Conn
		err := n.Host.In(func() error {
			var err error
			conn, err = net.Dial("tcp", metricsAddress)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if _, err := io.WriteString(conn, "GET /metrics HTTP/1.0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}()
	if strings.Contains(metrics, "\npodwall_denied_logged_total 0\n") || !strings.Contains(metrics, "\npodwall_denied_logged_total ") ||
		!strings.Contains(metrics, "\npodwall_denied_lost_total 0\n") {
		t.Error("the metrics do not count what was denied")
	}
}
