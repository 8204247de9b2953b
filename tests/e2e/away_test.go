package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/agentapi"
)

// apiServer answers lists and watches of the three resources that podwalld reads, over real HTTP, or fails as API servers do.
type apiServer struct {
	http    *http.Server
	address string

	mu       sync.Mutex
	mode     string // "" is well; else what is wrong with it
	version  int
	objects  map[string]map[string]runtime.Object // by path and namespace/name
	changed  chan struct{}                        // closed and replaced by every change
	requests map[string]int                       // by mode
}

// tryAgainLater is the code of an ADD that was not enforced in time.
const tryAgainLater = int(agentapi.CodeTryAgainLater)

const (
	podsPath       = "/api/v1/pods"
	namespacesPath = "/api/v1/namespaces"
	policiesPath   = "/apis/networking.k8s.io/v1/networkpolicies"
)

// serveAPI starts it on the node's loopback.
func serveAPI(t *testing.T, n *testnet.Node) *apiServer {
	t.Helper()
	a := &apiServer{
		version: 1, changed: make(chan struct{}), requests: map[string]int{},
		objects: map[string]map[string]runtime.Object{podsPath: {}, namespacesPath: {}, policiesPath: {}},
	}
	a.address = "127.0.0.1:6443"
	a.up(t, n)
	t.Cleanup(func() { _ = a.http.Close() })
	return a
}

func (a *apiServer) up(t *testing.T, n *testnet.Node) {
	t.Helper()
	var ln net.Listener
	err := n.Host.In(func() error {
		var err error
		ln, err = net.Listen("tcp", a.address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	a.http = &http.Server{Handler: a, ReadHeaderTimeout: time.Minute}
	go func() { _ = a.http.Serve(ln) }()
}

func (a *apiServer) down() { _ = a.http.Close() }

func (a *apiServer) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	a.version++
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *apiServer) put(objects ...runtime.Object) {
	a.set(func() {
		for _, o := range objects {
			switch o := o.(type) {
			case *corev1.Pod:
				o.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
				o.ResourceVersion = strconv.Itoa(a.version + 1)
				a.objects[podsPath][o.Namespace+"/"+o.Name] = o
			case *networkingv1.NetworkPolicy:
				o.TypeMeta = metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}
				o.ResourceVersion = strconv.Itoa(a.version + 1)
				a.objects[policiesPath][o.Namespace+"/"+o.Name] = o
			}
		}
	})
}

func (a *apiServer) fail(mode string) { a.set(func() { a.mode = mode }) }

// asked is how many requests came while it was in this mode.
func (a *apiServer) asked(mode string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests[mode]
}

func statusObject(code int, reason, message string) string {
	return fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":%q,"reason":%q,"code":%d}`, message, reason, code)
}

// ServeHTTP implements http.Handler.
func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	mode := a.mode
	a.requests[mode]++
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch mode {
	case "forbidden":
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, statusObject(403, "Forbidden", `networkpolicies is forbidden: User "podwalld" cannot list resource`))
		return
	case "broken":
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, statusObject(500, "InternalError", "etcdserver: request timed out"))
		return
	case "garbage":
		_, _ = io.WriteString(w, "<html>\x00captive portal</html>{{{\n")
		return
	case "silent":
		a.mu.Lock()
		changed := a.changed
		a.mu.Unlock()
		select {
		case <-changed:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler) // as its load balancer does when it finds out
	}
	if r.URL.Query().Get("watch") == "" {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, statusObject(400, "BadRequest", "this server streams its lists"))
		return
	}
	a.watch(w, r, mode)
}

// watch streams what there is, and then the changes, until the mode changes.
func (a *apiServer) watch(w http.ResponseWriter, r *http.Request, mode string) {
	if r.URL.Query().Get("sendInitialEvents") != "true" {
		// Its resourceVersion is older than what is remembered: the reflector has to list again.
		_, _ = fmt.Fprintf(w, `{"type":"ERROR","object":%s}`+"\n", statusObject(410, "Expired", "too old resource version"))
		return
	}
	sent := map[string]runtime.Object{}
	for first := true; ; first = false {
		a.mu.Lock()
		objects, version, changed, now := maps.Clone(a.objects[r.URL.Path]), a.version, a.changed, a.mode
		a.mu.Unlock()
		if now == "expired" {
			_, _ = fmt.Fprintf(w, `{"type":"ERROR","object":%s}`+"\n", statusObject(410, "Expired", "too old resource version"))
		}
		if now != mode {
			return
		}
		event := func(kind string, o runtime.Object) {
			data, _ := json.Marshal(o)
			_, _ = fmt.Fprintf(w, `{"type":%q,"object":%s}`+"\n", kind, data)
		}
		for name, o := range objects {
			switch {
			case sent[name] == nil:
				event("ADDED", o)
			case sent[name] != o:
				event("MODIFIED", o)
			}
		}
		for name, o := range sent {
			if objects[name] == nil {
				event("DELETED", o)
			}
		}
		sent = objects
		if first {
			kinds := map[string]string{podsPath: `"kind":"Pod","apiVersion":"v1"`, namespacesPath: `"kind":"Namespace","apiVersion":"v1"`, policiesPath: `"kind":"NetworkPolicy","apiVersion":"networking.k8s.io/v1"`}
			_, _ = fmt.Fprintf(w, `{"type":"BOOKMARK","object":{%s,"metadata":{"resourceVersion":"%d","annotations":{"k8s.io/initial-events-end":"true"}}}}`+"\n", kinds[r.URL.Path], version)
		}
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// kubeconfig are the flags that make podwalld read from it.
func (a *apiServer) kubeconfig(t *testing.T) []string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	config := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],` +
		`"clusters":[{"name":"c","cluster":{"server":"http://` + a.address + `"}}],"users":[{"name":"u","user":{}}]}`
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--manifests", "", "--kubeconfig", file}
}

func apiPod(node, name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: "", Labels: map[string]string{"app": name}},
		Spec:       corev1.PodSpec{NodeName: node},
	}
}

// apiPolicy lets the named apps reach the server.
func apiPolicy(clients ...string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "p"}}
	p.Spec.PodSelector.MatchLabels = map[string]string{"app": "server"}
	rule := networkingv1.NetworkPolicyIngressRule{}
	for _, c := range clients {
		rule.From = append(rule.From, networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": c}}})
	}
	p.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{rule}
	p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	return p
}

// longLived is an established connection that must go on.
type longLived struct {
	conn net.Conn
	r    *bufio.Reader
	n    int
}

func establish(t *testing.T, from, to *testnet.Pod) *longLived {
	t.Helper()
	var ln net.Listener
	if err := to.In(func() error {
		var err error
		ln, err = net.Listen("tcp", ":7007")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	l := &longLived{}
	if err := from.In(func() error {
		var err error
		l.conn, err = net.DialTimeout("tcp", netip.AddrPortFrom(to.Addrs[testnet.IPv4], 7007).String(), 5*time.Second)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.conn.Close() })
	l.r = bufio.NewReader(l.conn)
	l.lives(t)
	return l
}

// lives holds that a line comes back.
func (l *longLived) lives(t *testing.T) {
	t.Helper()
	if err := l.echo(); err != nil {
		t.Errorf("the established connection is broken: %v", err)
	}
}

func (l *longLived) echo() error {
	l.n++
	_ = l.conn.SetDeadline(time.Now().Add(10 * time.Second))
	line := fmt.Sprintf("line %d\n", l.n)
	_, err := io.WriteString(l.conn, line)
	if err == nil {
		var got string
		if got, err = l.r.ReadString('\n'); err == nil && got != line {
			err = fmt.Errorf("got %q, want %q", got, line)
		}
	}
	return err
}

// beginDaemon starts podwalld and does not wait for it.
func beginDaemon(t *testing.T, n *testnet.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := n.StartDaemon(ctx); err == nil || !n.DaemonRunning() {
		t.Fatalf("podwalld should run and not be ready: %v", err)
	}
}

// addCode is the code of an ADD by podwall alone and how long it took.
func addCode(t *testing.T, n *testnet.Node, p *testnet.Pod, timeout string) (int, string, time.Duration) {
	t.Helper()
	begin := time.Now()
	code, msg := pluginCode(t, n, "ADD", p, map[string]any{"timeout": timeout, "prevResult": prevResult(p, p.Addrs[testnet.IPv4].String()+"/24")})
	return code, msg, time.Since(begin)
}

// wired is a pod that has a veth to the node, late0 there, and that podwall has not been told of.
func wired(t *testing.T, n *testnet.Node, name string) *testnet.Pod {
	t.Helper()
	p, err := n.NewPod("default", name, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Host.Run(t.Context(), "ip", "link", "add", "late0", "type", "veth", "peer", "name", "eth0", "netns", filepath.Base(p.Netns())); err != nil {
		t.Fatal(err)
	}
	p.Addrs = map[testnet.Family]netip.Addr{testnet.IPv4: netip.MustParseAddr("10.244.1.99")}
	return p
}

// awayNode is a node with a client that may reach the server, over a connection that lives as well, and a guest that may not.
type awayNode struct {
	*testnet.Node
	api                   *apiServer
	client, guest, server *testnet.Pod
	live                  *longLived
}

func (a *awayNode) holds(t *testing.T, guest bool) {
	t.Helper()
	judge(t, a.Node, testnet.Matrix{cell("client", "server", true), cell("guest", "server", guest)})
	a.live.lives(t)
}

func startAway(t *testing.T) *awayNode {
	t.Helper()
	a := &awayNode{Node: lay(t, setup{cni: "ptp", families: []testnet.Family{testnet.IPv4}})}
	a.api = serveAPI(t, a.Node)
	for _, name := range []string{"client", "guest", "server", "late"} {
		a.api.put(apiPod(a.Name, name))
	}
	a.api.put(apiPolicy("client"))
	a.DaemonFlags = a.api.kubeconfig(t)
	if err := a.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.client, a.guest = add(t, a.Node, "default", "client"), add(t, a.Node, "default", "guest")
	a.server = add(t, a.Node, "default", "server", testnet.TCP(80))
	a.live = establish(t, a.client, a.server)
	a.holds(t, false)
	return a
}

// TestAPIServerAwayAtStart holds that a daemon that starts while the API server is away, or answers with anything but objects, leaves what is
// loaded as it is, fails ADDs in time, says what is wrong, and is well as soon as the API server is.
func TestAPIServerAwayAtStart(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		mode, says string
	}{
		{"down", "connection refused"},
		{"forbidden", "grant podwalld get, list and watch"},
		{"broken", "etcdserver: request timed out"},
		{"garbage", ""},
		{"silent", ""},
	} {
		t.Run(tt.mode, func(t *testing.T) {
			t.Parallel()
			a := startAway(t)
			if err := a.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			if tt.mode == "down" {
				a.api.down()
			} else {
				a.api.fail(tt.mode)
			}
			beginDaemon(t, a.Node)
			if tt.mode != "down" {
				poll(t, "podwalld asks the API server", func() bool { return a.api.asked(tt.mode) > 0 })
			}
			poll(t, "podwalld says what is wrong", func() bool { return strings.Contains(a.Log(), tt.says) })
			a.holds(t, false)
			late := wired(t, a.Node, "late")
			code, msg, took := addCode(t, a.Node, late, "2s")
			if code != tryAgainLater || took > 10*time.Second {
				t.Errorf("ADD: code %d after %s, want %d in time: %s", code, took, tryAgainLater, msg)
			}
			a.holds(t, false)
			// What changes meanwhile is true when the server is back.
			a.api.put(apiPolicy("client", "guest"))
			if tt.mode == "down" {
				a.api.up(t, a.Node)
			} else {
				a.api.fail("")
			}
			begin := time.Now()
			within(t, 30*time.Second, testnet.Probe{From: a.guest.Host, To: a.server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}, testnet.Allowed)
			back := time.Since(begin)
			a.holds(t, true)
			if code, msg, _ := addCode(t, a.Node, late, "10s"); code != 0 {
				t.Errorf("ADD afterwards: code %d: %s", code, msg)
			}
			t.Attr("report", fmt.Sprintf("API server %s at start: denied stayed denied, established lived, ADD failed with code %d after %s (%s); %s after its return the new policy holds and ADD succeeds",
				tt.mode, code, took.Round(time.Millisecond), msg, back.Round(time.Millisecond)))
			// The control: without the tables the guest would have been let in, and this would have seen it.
			a.api.put(apiPolicy("client"))
			eventually(t, testnet.Probe{From: a.guest.Host, To: a.server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}, testnet.Denied)
			if err := a.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			if _, err := a.Host.Run(t.Context(), "nft", "delete table inet podwall"); err != nil {
				t.Fatal(err)
			}
			a.holds(t, true)
		})
	}
}

// TestAPIServerFailsLater holds the same of a daemon that runs, and that what it missed while its watches had expired is caught up with.
func TestAPIServerFailsLater(t *testing.T) {
	t.Parallel()
	a := startAway(t)
	toServer := testnet.Probe{From: a.guest.Host, To: a.server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}
	guest := false
	for _, mode := range []string{"expired", "forbidden", "broken", "garbage", "down"} {
		if mode == "down" {
			a.api.down()
		} else {
			a.api.fail(mode)
			poll(t, "podwalld asks again: "+mode, func() bool { return a.api.asked(mode) > 0 })
		}
		a.holds(t, guest)
		// While all is expired this is what a relist finds.
		guest = !guest
		if guest {
			a.api.put(apiPolicy("client", "guest"))
		} else {
			a.api.put(apiPolicy("client"))
		}
		if mode == "down" {
			a.api.up(t, a.Node)
		} else {
			a.api.fail("")
		}
		begin := time.Now()
		within(t, 30*time.Second, toServer, map[bool]testnet.Verdict{true: testnet.Allowed, false: testnet.Denied}[guest])
		t.Log(mode, "caught up after", time.Since(begin).Round(time.Millisecond))
		a.holds(t, guest)
	}
	// An object that went while nobody watched.
	a.api.fail("broken")
	poll(t, "podwalld asks again", func() bool { return a.api.asked("broken") > 1 })
	a.api.set(func() { delete(a.api.objects[policiesPath], "default/p") })
	a.api.fail("")
	within(t, 30*time.Second, toServer, testnet.Allowed)
	a.live.lives(t)
	t.Attr("report", "410 Gone, 403, 500, garbage and a stopped API server under a running daemon: enforced as before, no established connection broken, each missed change caught up with by a relist")
}

// smallState puts a small file system where the daemon keeps its registrations.
func smallState(t *testing.T, n *testnet.Node) {
	t.Helper()
	if err := os.MkdirAll(n.StateDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("state", n.StateDir(), "tmpfs", 0, "size=65536,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(n.StateDir(), unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// TestDiskFull holds that a full file system of --state-dir fails ADDs with its name, opens and breaks nothing, lets DELs through, and is over
// when there is room.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	n := lay(t, setup{cni: "ptp", families: []testnet.Family{testnet.IPv4}})
	smallState(t, n)
	manifests := podManifest("default", "client", "role: client") + podManifest("default", "guest", "role: guest") + podManifest("default", "server", "app: server")
	for name, text := range map[string]string{"pods.yaml": manifests, "policy.yaml": policyManifest("default", "p", clientsOnly)} {
		if err := n.WriteManifest(name, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	a := &awayNode{Node: n, client: add(t, n, "default", "client"), guest: add(t, n, "default", "guest")}
	a.server = add(t, n, "default", "server", testnet.TCP(80))
	gone := add(t, n, "default", "gone")
	a.live = establish(t, a.client, a.server)
	a.holds(t, false)

	filler := filepath.Join(n.StateDir(), "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the file system is not full: %v", err)
	}
	before := len(attachments(t, n))
	late, err := n.NewPod("default", "late", "")
	if err != nil {
		t.Fatal(err)
	}
	addErr := n.Add(t.Context(), late)
	if addErr == nil || !strings.Contains(addErr.Error(), "no space left") || !strings.Contains(addErr.Error(), "make room on the file system of") {
		t.Fatalf("ADD on a full disk: %v", addErr)
	}
	if entries, err := os.ReadDir(filepath.Join(n.StateDir(), "attachments")); err != nil || len(entries) != before {
		t.Errorf("%d files are in attachments/ (%v), want %d", len(entries), err, before)
	}
	a.holds(t, false)
	if _, err := n.CNITool(t.Context(), "del", gone); err != nil {
		t.Errorf("DEL on a full disk: %v", err)
	}
	// A change of policy needs no disk. The copy of the last good manifests does, and must not keep it from being enforced.
	if err := n.WriteManifest("policy.yaml", policyManifest("default", "p", "{podSelector: {matchLabels: {app: server}}}")); err != nil {
		t.Fatal(err)
	}
	eventually(t, testnet.Probe{From: a.client.Host, To: a.server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}, testnet.Denied)
	// The control of all that holds the established connection: this policy revokes it, and that is seen.
	poll(t, "the established connection is broken", func() bool { return a.live.echo() != nil })
	if err := n.WriteManifest("policy.yaml", policyManifest("default", "p", clientsOnly)); err != nil {
		t.Fatal(err)
	}
	eventually(t, testnet.Probe{From: a.client.Host, To: a.server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}, testnet.Allowed)
	// A daemon that starts now enforces all the same.
	if err := n.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Errorf("start on a full disk: %v", err)
	} else {
		judge(t, n, testnet.Matrix{cell("client", "server", true), cell("guest", "server", false)})
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if _, err := n.CNITool(t.Context(), "del", late); err != nil { // as a runtime does after an ADD that has failed
		t.Error(err)
	}
	if err := n.Add(t.Context(), late); err != nil {
		t.Errorf("ADD when there is room: %v", err)
	}
	judge(t, n, testnet.Matrix{cell("client", "server", true), cell("guest", "server", false)})
	said, _, _ := strings.Cut(addErr.Error(), "\n") // then cnitool's usage
	t.Attr("report", fmt.Sprintf("disk full: ADD fails (%s), DEL succeeds, policies change, a restart enforces, nothing is left behind; with room ADD succeeds", said))
}

// TestReadOnlyState holds that a daemon that cannot write its state directory says so and ends, while the kernel goes on enforcing.
func TestReadOnlyState(t *testing.T) {
	t.Parallel()
	n := lay(t, setup{cni: "ptp", families: []testnet.Family{testnet.IPv4}})
	smallState(t, n)
	if err := n.WriteManifest("quiet.yaml", policyManifest("default", "p", "{podSelector: {}}")); err != nil {
		t.Fatal(err)
	}
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.TCP(80))
	toB := testnet.Probe{From: a.Host, To: b.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}
	expect(t, toB, testnet.Denied)
	if err := n.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", n.StateDir(), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	startErr := n.StartDaemon(t.Context())
	if startErr == nil || !strings.Contains(startErr.Error(), "read-only file system") || !strings.Contains(startErr.Error(), "--state-dir") {
		t.Errorf("start on a read-only state directory: %v", startErr)
	}
	expect(t, toB, testnet.Denied)
	if code, msg, _ := addCode(t, n, a, "1s"); code != tryAgainLater {
		t.Errorf("ADD without a daemon: code %d %s", code, msg)
	}
	if err := unix.Mount("", n.StateDir(), "", unix.MS_REMOUNT, "size=65536"); err != nil {
		t.Fatal(err)
	}
	if err := n.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect(t, toB, testnet.Denied)
	add(t, n, "default", "c")
	t.Attr("report", "read-only --state-dir: podwalld ends with the name of the directory and the remedy, the kernel enforces on, ADD fails with 11; writable again, the next start serves")
}

// TestSocketOccupied holds that podwalld does not remove what is not a socket, says so, and takes the place of a socket.
func TestSocketOccupied(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", families: []testnet.Family{testnet.IPv4}, manifests: map[string]string{"p.yaml": policyManifest("default", "p", "{podSelector: {}}")}})
	a, b := add(t, n, "default", "a"), add(t, n, "default", "b", testnet.TCP(80))
	toB := testnet.Probe{From: a.Host, To: b.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}
	for _, tt := range []struct {
		name   string
		occupy func() error
		refuse bool
	}{
		{"file", func() error { return os.WriteFile(n.Socket(), []byte("mine"), 0o600) }, true},
		{"directory", func() error { return os.Mkdir(n.Socket(), 0o700) }, true},
		{"dangling link", func() error { return os.Symlink("/nowhere", n.Socket()) }, true},
		{"foreign socket", func() error {
			ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.Socket(), Net: "unix"})
			if err == nil {
				ln.SetUnlinkOnClose(false)
				t.Cleanup(func() { _ = ln.Close() })
				go func() {
					for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
						_ = c.Close()
					}
				}()
			}
			return err
		}, false},
	} {
		if err := n.KillDaemon(); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Remove(n.Socket()), tt.occupy()); err != nil {
			t.Fatal(err)
		}
		err := n.StartDaemon(t.Context())
		if refused := err != nil && strings.Contains(err.Error(), "remove it"); refused != tt.refuse || err != nil && !refused {
			t.Errorf("%s: %v, want refused %v", tt.name, err, tt.refuse)
		}
		expect(t, toB, testnet.Denied)
		if tt.refuse {
			if _, err := os.Lstat(n.Socket()); err != nil {
				t.Errorf("%s: it was removed: %v", tt.name, err)
			}
			if err := os.Remove(n.Socket()); err != nil {
				t.Fatal(err)
			}
			if err := n.StartDaemon(t.Context()); err != nil {
				t.Errorf("%s removed: %v", tt.name, err)
			}
		}
		if _, err := n.Podwalld(t.Context(), "status"); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	t.Attr("report", "socket path held by a file, directory or link: podwalld ends and asks to remove it, the kernel enforces on; by somebody's socket: it is replaced in one step")
}

// TestFilesExhausted holds that a daemon without a free file descriptor enforces on and serves again when there are some.
func TestFilesExhausted(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", families: []testnet.Family{testnet.IPv4}, manifests: map[string]string{
		"pods.yaml": podManifest("default", "client", "role: client") + podManifest("default", "guest", "role: guest") + podManifest("default", "server", "app: server"), "policy.yaml": policyManifest("default", "p", clientsOnly),
	}})
	a := &awayNode{Node: n, client: add(t, n, "default", "client"), guest: add(t, n, "default", "guest")}
	a.server = add(t, n, "default", "server", testnet.TCP(80))
	a.live = establish(t, a.client, a.server)
	pid := daemonPID(t, n)
	files := func() int {
		list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	limit := unix.Rlimit{Cur: uint64(files()) + 4, Max: 4096} //nolint:gosec // a handful
	var old unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, &old); err != nil {
		t.Fatal(err)
	}
	if old.Max < limit.Max {
		limit.Max = old.Max
	}
	var held []net.Conn
	defer func() {
		for _, c := range held {
			_ = c.Close()
		}
	}()
	for range 24 {
		c, err := net.Dial("unix", n.Socket())
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	poll(t, "podwalld is out of files", func() bool { return strings.Contains(n.Log(), "too many open files") })
	a.holds(t, false)
	begin := time.Now()
	// Those who only hold a connection lose it after two seconds: others are served without anybody's help.
	pollWithin(t, 30*time.Second, "another caller is served", func() bool {
		_, err := n.Podwalld(t.Context(), "status")
		return err == nil
	})
	served := time.Since(begin)
	a.holds(t, false)
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit.Max, Max: limit.Max}, nil); err != nil {
		t.Fatal(err)
	}
	add(t, n, "default", "late")
	if err := n.WriteManifest("policy.yaml", policyManifest("default", "p", "{podSelector: {matchLabels: {app: server}}, ingress: [{}]}")); err != nil {
		t.Fatal(err)
	}
	eventually(t, testnet.Probe{From: a.guest.Host, To: a.server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}, testnet.Allowed)
	t.Attr("report", fmt.Sprintf("RLIMIT_NOFILE used up by 24 silent connections: enforced on, established lived, another caller served after %s, ADDs and policies as before afterwards", served.Round(time.Millisecond)))
}

// TestMonotonicTime holds that no program of podwall measures or waits by the wall clock, which jumps: what takes the monotonic reading off a
// time.Time (package time, "Monotonic Clocks"), or makes one from the wall clock's numbers, is nowhere but where time is only shown.
func TestMonotonicTime(t *testing.T) {
	t.Parallel()
	wall := []string{"Unix", "UnixMilli", "UnixMicro", "UnixNano", "AddDate", "UTC", "Local", "CLOCK_REALTIME", "Settimeofday"}
	find := func(name string, src any) []string {
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, name, src, 0)
		if err != nil {
			t.Fatal(err)
		}
		var found []string
		ast.Inspect(file, func(node ast.Node) bool {
			if s, ok := node.(*ast.SelectorExpr); ok && s.Sel.Name == "Format" {
				return false // it is shown
			}
			if s, ok := node.(*ast.SelectorExpr); ok && slices.Contains(wall, s.Sel.Name) {
				if pkg, isName := s.X.(*ast.Ident); !isName || pkg.Name != "os" && pkg.Name != "net" {
					found = append(found, set.Position(s.Pos()).String())
				}
			}
			return true
		})
		return found
	}
	if got := find("control.go", "package p\nimport \"time\"\nvar x = time.Now().Unix()\n"); len(got) != 1 {
		t.Fatalf("the control was not found: %v", got)
	}
	files := 0
	for _, dir := range []string{"daemon", "pkg", "plugin"} {
		err := filepath.WalkDir(filepath.Join("..", "..", dir), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			files++
			for _, at := range find(path, nil) {
				t.Errorf("%s: the wall clock", at)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Attr("report", fmt.Sprintf("clock jumps: none of %d source files takes a time's monotonic reading away or compares with the wall clock", files))
}

// TestKernelRefusesOnePod holds that a pod whose chains the kernel refuses is closed and reported, that everybody else is served and
// enforced meanwhile, and that it is enforced when the kernel takes them.
func TestKernelRefusesOnePod(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", families: []testnet.Family{testnet.IPv4}, manifests: map[string]string{
		"pods.yaml": podManifest("default", "client", "role: client") + podManifest("default", "guest", "role: guest") + podManifest("default", "server", "app: server"), "policy.yaml": policyManifest("default", "p", clientsOnly),
	}})
	a := &awayNode{Node: n, client: add(t, n, "default", "client"), guest: add(t, n, "default", "guest")}
	a.server = add(t, n, "default", "server", testnet.TCP(80))
	a.live = establish(t, a.client, a.server)
	late := wired(t, n, "late")
	// As many as a hook takes (MAX_HOOK_COUNT in net/netfilter/core.c): the next one is E2BIG.
	var crowd strings.Builder
	crowd.WriteString("table netdev crowd {\n")
	for i := range 1024 {
		fmt.Fprintf(&crowd, "chain c%d { type filter hook ingress device late0 priority %d; }\n", i, i)
	}
	crowd.WriteString("}\n")
	file := filepath.Join(n.Dir, "crowd.nft")
	if err := os.WriteFile(file, []byte(crowd.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Host.Run(t.Context(), "nft", "-f", file); err != nil {
		t.Fatal(err)
	}
	code, msg, took := addCode(t, n, late, "2s")
	if code != tryAgainLater {
		t.Errorf("ADD: code %d: %s", code, msg)
	}
	a.holds(t, false)
	begin := time.Now()
	add(t, n, "default", "other")
	other := time.Since(begin)
	if err := n.WriteManifest("policy.yaml", policyManifest("default", "p", "{podSelector: {matchLabels: {app: server}}, ingress: [{}]}")); err != nil {
		t.Fatal(err)
	}
	eventually(t, testnet.Probe{From: a.guest.Host, To: a.server.Host, Family: testnet.IPv4, Port: testnet.TCP(80)}, testnet.Allowed)
	a.live.lives(t)
	status, err := n.Podwalld(t.Context(), "status")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(status, "Pod default/late: the kernel refuses chain") {
		t.Errorf("status does not name the pod:\n%s", status)
	}
	if _, err := n.Host.Run(t.Context(), "nft", "delete", "table", "netdev", "crowd"); err != nil {
		t.Fatal(err)
	}
	begin = time.Now()
	if code, msg, _ := addCode(t, n, late, "60s"); code != 0 {
		t.Errorf("ADD when the kernel takes it: code %d: %s", code, msg)
	}
	t.Attr("report", fmt.Sprintf("a pod's chain refused (E2BIG): its ADD fails with code %d after %s (%s); others: enforced, established lived, ADD in %s, a policy changed; taken %s after the cause had gone",
		code, took.Round(time.Millisecond), msg, other.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond)))
}
