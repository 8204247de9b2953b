package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
)

// binary is the plugin as it is shipped.
var binary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("/tmp", "pw")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "podwall")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build plugin: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// A plugin is loaded for every call of every pod: what it links it pays for each time.
func TestLinksLittle(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 50 {
		t.Fatalf("only %d dependencies: go list did not list them", len(deps))
	}
	for _, dep := range deps {
		for _, banned := range []string{"k8s.io/", "sigs.k8s.io/", "nftables", "prometheus", "mdlayher", "google.golang.org/", "podwall/pkg/cluster", "podwall/pkg/nft", "podwall/pkg/policy"} {
			if strings.Contains(dep, banned) {
				t.Errorf("the plugin links %s", dep)
			}
		}
	}
	fi, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() > 8<<20 {
		t.Errorf("the plugin has %d bytes, want at most 8 MiB", fi.Size())
	}
}

// daemon is an agent that keeps what it is given.
type daemon struct {
	mu       sync.Mutex
	attached map[attach.Key]attach.Attachment
	err      error
}

func (d *daemon) Attach(_ context.Context, a attach.Attachment) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.attached[a.Key] = a
	}
	return d.err
}

func (d *daemon) Detach(_ context.Context, key attach.Key) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.attached, key)
	return d.err
}

func (d *daemon) Check(_ context.Context, key attach.Key) (attach.Attachment, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	a, ok := d.attached[key]
	if !ok {
		return a, agentapi.Errorf(agentapi.CodeRefused, "attachment %s is not registered", key)
	}
	return a, d.err
}

func (d *daemon) GC(_ context.Context, network string, valid []attach.Key) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	keep := map[attach.Key]bool{}
	for _, k := range valid {
		keep[k] = true
	}
	for k, a := range d.attached {
		if a.Network == network && !keep[k] {
			delete(d.attached, k)
		}
	}
	return d.err
}

func (d *daemon) Status(context.Context) error { return d.err }

func (d *daemon) get(key attach.Key) (attach.Attachment, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	a, ok := d.attached[key]
	return a, ok
}

// node is a host with one pod behind a veth, and a place for the socket.
type node struct {
	t      *testing.T
	host   netns.NsHandle
	pod    netns.NsHandle
	link   attach.HostLink
	dir    string
	socket string
}

// newNetns makes an empty namespace that lives as long as its descriptor.
func newNetns(t *testing.T) netns.NsHandle {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces and the socket need root")
	}
	type result struct {
		ns  netns.NsHandle
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		ns, err := netns.New()
		made <- result{ns, err}
	}()
	r := <-made
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { r.ns.Close() })
	return r.ns
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, host: newNetns(t), pod: newNetns(t)}
	h, err := netlink.NewHandleAt(n.host)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "veth1f2e3d4c"
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(n.pod)}); err != nil {
		t.Fatal(err)
	}
	l, err := h.LinkByName(attrs.Name)
	if err != nil {
		t.Fatal(err)
	}
	n.link = attach.HostLink{Name: attrs.Name, Index: l.Attrs().Index}
	if n.dir, err = os.MkdirTemp("/tmp", "pw"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(n.dir) })
	n.socket = filepath.Join(n.dir, "s")
	return n
}

// serve runs a daemon's socket until the test ends.
func (n *node) serve(d *daemon) *daemon {
	n.t.Helper()
	if d.attached == nil {
		d.attached = map[attach.Key]attach.Attachment{}
	}
	ln, err := agentapi.Listen(n.socket)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	log := slog.New(slog.DiscardHandler)
	go func() { done <- agentapi.Serve(ctx, ln, agentapi.NewHandler(d, nil, log), log) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
	})
	return d
}

// outcome is what a call of the plugin left.
type outcome struct {
	stdout, stderr string
	exit           int
	code           uint // of the CNI error
	msg            string
	took           time.Duration
}

func path(ns netns.NsHandle) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns)) }

// call runs the plugin in the host's namespace with an environment like a runtime's; env overrides it ("K=V").
// The plugin may print one JSON value, and only an error or ADD's result.
func (n *node) call(verb, stdin string, env ...string) outcome {
	n.t.Helper()
	cmd := exec.Command(binary)
	cmd.Env = append([]string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=c1", "CNI_NETNS=" + path(n.pod), "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1",
	}, env...)
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	begin := time.Now()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(n.host); err != nil {
			done <- err
			return
		}
		done <- cmd.Run()
	}()
	err := <-done
	o := outcome{stdout: stdout.String(), stderr: stderr.String(), took: time.Since(begin)}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		o.exit = exit.ExitCode()
		var e agentapi.Error
		if err := json.Unmarshal(stdout.Bytes(), &e); err != nil || e.Code == 0 {
			n.t.Fatalf("%s failed without a CNI error: %q, stderr %q", verb, o.stdout, o.stderr)
		}
		o.code, o.msg = e.Code, e.Error()
	case err != nil:
		n.t.Fatal(err)
	case verb == "ADD":
		if !json.Valid(stdout.Bytes()) {
			n.t.Errorf("ADD printed more than its result: %q", o.stdout)
		}
	case verb != "VERSION" && o.stdout != "":
		n.t.Errorf("%s printed %q", verb, o.stdout)
	}
	return o
}

// conf is the plugin's stdin under a spec version, with more keys given as `,"key":value`.
func (n *node) conf(version, more string) string {
	return fmt.Sprintf(`{"cniVersion":%q,"name":"net","type":"podwall","socket":%q%s}`, version, n.socket, more)
}

// prevResult is what a main plugin prints under a spec version. The route's mtu came with 1.1.0; before 1.0.0 every IP names its version.
func prevResult(version string) string {
	v4, v6, route := "", "", ""
	switch version {
	case "0.3.0", "0.3.1", "0.4.0":
		v4, v6 = `"version":"4",`, `"version":"6",`
	case "1.1.0":
		route = `,"mtu":1400,"table":7`
	}
	return fmt.Sprintf(`{"cniVersion":%q,
		"interfaces":[{"name":"veth1f2e3d4c","mac":"aa:00:00:00:00:02"},{"name":"eth0","mac":"254","sandbox":"/run/netns/x"},{"name":"dummy1f2e","mac":"0","sandbox":"7"}],
		"ips":[{%s"interface":1,"address":"10.244.0.7/24","gateway":"10.244.0.1"},{%s"interface":1,"address":"fd00:10:244::7/64","gateway":"fd00:10:244::1"}],
		"routes":[{"dst":"0.0.0.0/0"%s},{"dst":"::/0","gw":"fd00:10:244::1"}],
		"dns":{"nameservers":["10.96.0.10"],"domain":"cluster.local","search":["svc"],"options":["ndots:5"]}}`, version, v4, v6, route)
}

func withPrev(version string) string { return `,"prevResult":` + prevResult(version) }

func jsonValue(t *testing.T, s string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%v in %q", err, s)
	}
	return v
}

var key = attach.Key{ContainerID: "c1", IfName: "eth0"}

func TestLifeOfAnAttachment(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			d := n.serve(&daemon{})
			stdin := n.conf(version, withPrev(version))

			add := n.call("ADD", stdin)
			if add.exit != 0 {
				t.Fatalf("ADD: %s", add.stdout)
			}
			if diff := cmp.Diff(jsonValue(t, prevResult(version)), jsonValue(t, add.stdout)); diff != "" {
				t.Errorf("result (-prevResult +printed):\n%s", diff)
			}
			want := attach.Attachment{
				Network: "net", Key: key, Pod: attach.PodRef{Namespace: "shop", Name: "web-0", UID: "u-1"},
				IPs:      []netip.Addr{netip.MustParseAddr("10.244.0.7"), netip.MustParseAddr("fd00:10:244::7")},
				HostLink: n.link, Netns: path(n.pod),
			}
			got, _ := d.get(key)
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("attachment (-want +got):\n%s", diff)
			}

			check := n.call("CHECK", stdin)
			for range 10 { // it asks once, for a second, which a busy machine may take for itself
				if check.code != 11 {
					break
				}
				check = n.call("CHECK", stdin)
			}
			if noCheck := version[:3] == "0.3"; noCheck && check.code != 1 || !noCheck && check.exit != 0 {
				t.Errorf("CHECK: %s", check.stdout)
			}
			// The runtime's list has it, another network's list has not.
			if version == "1.1.0" {
				for more, left := range map[string]bool{
					"": true,
					`,"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]`: true,
				} {
					if o := n.call("GC", n.conf(version, more), "CNI_CONTAINERID=", "CNI_NETNS=", "CNI_IFNAME="); o.exit != 0 {
						t.Errorf("GC: %s", o.stdout)
					}
					if _, ok := d.get(key); ok != left {
						t.Errorf("after GC with %s: attached %v, want %v", more, ok, left)
					}
				}
				other := strings.Replace(n.conf(version, `,"cni.dev/valid-attachments":null`), `"name":"net"`, `"name":"other"`, 1)
				if o := n.call("GC", other); o.exit != 0 {
					t.Errorf("GC of another network: %s", o.stdout)
				}
				if _, ok := d.get(key); !ok {
					t.Error("GC of another network took the attachment")
				}
				if o := n.call("STATUS", n.conf(version, "")); o.exit != 0 {
					t.Errorf("STATUS: %s", o.stdout)
				}
			}
			for range 2 {
				if o := n.call("DEL", stdin); o.exit != 0 {
					t.Errorf("DEL: %s", o.stdout)
				}
			}
			if _, ok := d.get(key); ok {
				t.Error("DEL left the attachment")
			}
			if version >= "0.4.0" {
				if o := n.call("CHECK", stdin); o.code != 100 {
					t.Errorf("CHECK after DEL: exit %d, %s, want code 100", o.exit, o.stdout)
				}
			}
		})
	}
}

func TestGCDropsWhatIsNotListed(t *testing.T) {
	t.Parallel()
	for _, list := range []string{"null", "[]", `[{"containerID":"c2","ifname":"eth0"}]`} {
		n := newNode(t)
		d := n.serve(&daemon{})
		if o := n.call("ADD", n.conf("1.1.0", withPrev("1.1.0"))); o.exit != 0 {
			t.Fatal(o.stdout)
		}
		if o := n.call("GC", n.conf("1.1.0", `,"cni.dev/valid-attachments":`+list)); o.exit != 0 {
			t.Errorf("GC: %s", o.stdout)
		}
		if _, ok := d.get(key); ok {
			t.Errorf("GC with %s left the attachment", list)
		}
	}
}

// silence says how a daemon can be away.
func silence(n *node, kind string) {
	n.t.Helper()
	if kind == "no socket" {
		return
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.socket, Net: "unix"})
	if err != nil {
		n.t.Fatal(err)
	}
	if kind == "refused" {
		ln.SetUnlinkOnClose(false)
		ln.Close()
		return
	}
	n.t.Cleanup(func() { ln.Close() }) // hung: the kernel accepts, nobody answers
}

func TestDaemonAway(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"no socket", "refused", "hung"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			silence(n, kind)
			for verb, tc := range map[string]struct {
				more  string
				code  uint
				limit time.Duration
			}{
				"ADD":    {`,"timeout":"400ms"` + withPrev("1.1.0"), 11, 2 * time.Second},
				"CHECK":  {withPrev("1.1.0"), 11, 2 * time.Second},
				"STATUS": {"", 50, time.Second},
				"GC":     {`,"cni.dev/valid-attachments":[]`, 11, 2 * time.Second},
				"DEL":    {withPrev("1.1.0"), 0, 3 * time.Second},
			} {
				if verb == "GC" && kind == "hung" {
					continue // it would take its 10 s
				}
				t.Run(verb, func(t *testing.T) {
					t.Parallel()
					o := n.call(verb, n.conf("1.1.0", tc.more))
					if o.code != tc.code {
						t.Errorf("code %d, want %d: %s", o.code, tc.code, o.stdout)
					}
					if o.took > tc.limit {
						t.Errorf("took %v, want at most %v", o.took, tc.limit)
					}
					if said := o.msg + o.stderr; !strings.Contains(said, n.socket) || !strings.Contains(said, "podwall-install uninstall") {
						t.Errorf("neither socket nor remedy in %q", said)
					}
				})
			}
		})
	}
}

func TestAddBridgesARestart(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	silence(n, "refused")
	added := make(chan outcome)
	go func() { added <- n.call("ADD", n.conf("1.1.0", withPrev("1.1.0"))) }()
	d := n.serve(&daemon{}) // while the plugin starts, or after it was refused
	if o := <-added; o.exit != 0 {
		t.Errorf("ADD: %s", o.stdout)
	}
	if _, ok := d.get(key); !ok {
		t.Error("nothing was attached")
	}
}

func TestDaemonErrors(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.serve(&daemon{err: &agentapi.Error{Code: 11, Msg: "pod shop/web-0 is not known yet", Details: "waited 9s"}})
	if o := n.call("ADD", n.conf("1.1.0", withPrev("1.1.0"))); o.code != 11 || o.msg != "pod shop/web-0 is not known yet; waited 9s" {
		t.Errorf("ADD: %s", o.stdout)
	}
	if o := n.call("DEL", n.conf("1.1.0", "")); o.exit != 0 || !strings.Contains(o.stderr, "not known yet") {
		t.Errorf("DEL: exit %d, stderr %q, want success and a warning", o.exit, o.stderr)
	}
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	d := n.serve(&daemon{})
	file := filepath.Join(n.dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	prev := withPrev("1.1.0")
	noHostName := `,"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.244.0.7/24"}]}`
	for name, tc := range map[string]struct {
		stdin string
		env   string
		code  uint
		want  string
	}{
		"not JSON":                {`{"cniVersion"`, "X=", 6, "network config"},
		"an array":                {`[]`, "X=", 6, "network config"},
		"no network":              {`{"cniVersion":"1.1.0"}`, "X=", 7, "network name"},
		"unknown spec version":    {n.conf("9.0.0", prev), "X=", 1, "9.0.0"},
		"relative socket":         {`{"cniVersion":"1.1.0","name":"net","socket":"s"` + prev + `}`, "X=", 7, `socket "s"`},
		"bad timeout":             {n.conf("1.1.0", `,"timeout":"soon"`+prev), "X=", 7, `timeout "soon"`},
		"bad logFile":             {n.conf("1.1.0", `,"logFile":7`+prev), "X=", 7, "logFile 7"},
		"no prevResult":           {n.conf("1.1.0", ""), "X=", 7, "chained"},
		"missing netns":           {n.conf("1.1.0", prev), "CNI_NETNS=/run/netns/podwall-none", 8, "/run/netns/podwall-none"},
		"netns that is no netns":  {n.conf("1.1.0", noHostName), "CNI_NETNS=" + file, 8, file},
		"the plugin's own netns":  {n.conf("1.1.0", prev), "CNI_NETNS=" + path(n.host), 8, "own"},
		"no netns":                {n.conf("1.1.0", prev), "CNI_NETNS=", 4, "CNI_NETNS"},
		"malformed CNI_ARGS":      {n.conf("1.1.0", prev), "CNI_ARGS=K8S_POD_NAME", 4, "CNI_ARGS"},
		"container ID with slash": {n.conf("1.1.0", prev), "CNI_CONTAINERID=a/b", 4, "containerID"},
		"container ID too long":   {n.conf("1.1.0", prev), "CNI_CONTAINERID=" + strings.Repeat("a", 201), 4, "containerID"},
		"interface is not there":  {n.conf("1.1.0", `,"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.244.0.7/24"}]}`), "CNI_IFNAME=net1", 101, "net1"},
		"interface without peer":  {n.conf("1.1.0", `,"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.244.0.7/24"}]}`), "CNI_IFNAME=lo", 101, "use bridge, ptp"},
		"address that no pod has": {n.conf("1.1.0", `,"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"127.0.0.1/8"}]}`), "X=", 7, "127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := n.call("ADD", tc.stdin, tc.env)
			if o.code != tc.code || !strings.Contains(o.msg, tc.want) {
				t.Errorf("%s\nwant code %d about %q", o.stdout, tc.code, tc.want)
			}
		})
	}
	t.Cleanup(func() {
		if len(d.attached) != 0 {
			t.Errorf("attached all the same: %v", d.attached)
		}
	})
}

func TestDelAlwaysSucceeds(t *testing.T) {
	t.Parallel()
	n := newNode(t) // without a daemon
	other := newNode(t)
	other.serve(&daemon{})
	for name, tc := range map[string]struct {
		stdin string
		env   []string
	}{
		"no prevResult":       {n.conf("1.1.0", ""), nil},
		"old spec":            {n.conf("0.3.1", ""), nil},
		"no netns":            {n.conf("1.1.0", ""), []string{"CNI_NETNS="}},
		"missing netns":       {n.conf("1.1.0", ""), []string{"CNI_NETNS=/run/netns/podwall-none"}},
		"own netns":           {n.conf("1.1.0", ""), []string{"CNI_NETNS=" + path(n.host)}},
		"garbage CNI_ARGS":    {n.conf("1.1.0", ""), []string{"CNI_ARGS=;;=;x"}},
		"garbage options":     {`{"cniVersion":"1.1.0","name":"net","socket":"x","timeout":[],"logFile":{},"args":0,"prevResult":0}`, nil},
		"refused as too long": {other.conf("1.1.0", ""), []string{"CNI_CONTAINERID=" + strings.Repeat("a", 201)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for range 2 {
				if o := n.call("DEL", tc.stdin, tc.env...); o.exit != 0 || o.stderr == "" {
					t.Errorf("exit %d, stderr %q, want success and a warning: %s", o.exit, o.stderr, o.stdout)
				}
			}
		})
	}
}

func TestLogFile(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.serve(&daemon{})
	log := filepath.Join(n.dir, "log")
	n.call("ADD", n.conf("1.1.0", `,"logFile":"`+log+`"`+withPrev("1.1.0")))
	n.call("ADD", n.conf("1.1.0", `,"logFile":"`+log+`"`))
	n.call("DEL", strings.Replace(n.conf("1.1.0", `,"logFile":"`+log+`"`), n.socket, n.socket+"none", 1))
	data, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(data)) {
		var rec struct{ Level, Msg, Command, ContainerID, Error string }
		if err := json.Unmarshal([]byte(line), &rec); err != nil {
			t.Fatalf("%v in line %q", err, line)
		}
		got = append(got, fmt.Sprint(rec.Command, " ", rec.ContainerID, " ", rec.Level, " ", rec.Msg, " ", rec.Error != ""))
	}
	want := []string{"ADD c1 INFO done false", "ADD c1 INFO failed true", "DEL c1 WARN podwalld was not told, it will notice that the pod's link is gone true"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
	// A log that cannot be written is no reason to keep a pod waiting.
	if o := n.call("ADD", n.conf("1.1.0", `,"logFile":"`+n.dir+`"`+withPrev("1.1.0"))); o.exit != 0 || !strings.Contains(o.stderr, "logFile") {
		t.Errorf("unwritable log: exit %d, stderr %q", o.exit, o.stderr)
	}
}

func TestVersionAndHelp(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	if o := n.call("VERSION", ""); !strings.Contains(o.stdout, `"0.3.0"`) || !strings.Contains(o.stdout, `"1.1.0"`) {
		t.Errorf("VERSION printed %q", o.stdout)
	}
	cmd := exec.Command(binary)
	cmd.Env = []string{}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "conflist") || !strings.Contains(string(out), "podwall-install uninstall") {
		t.Errorf("without CNI_COMMAND: %v, %s", err, out)
	}
}
