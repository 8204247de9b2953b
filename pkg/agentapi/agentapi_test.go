package agentapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/podwall/podwall/pkg/attach"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeAgent keeps attachments in a map; err or do, where set, decide instead.
type fakeAgent struct {
	mu       sync.Mutex
	attached map[attach.Key]attach.Attachment
	deadline time.Duration
	err      error
	do       func(ctx context.Context) error
}

func (f *fakeAgent) act(ctx context.Context) error {
	if d, ok := ctx.Deadline(); ok {
		f.mu.Lock()
		f.deadline = time.Until(d)
		f.mu.Unlock()
	}
	if f.do != nil {
		return f.do(ctx)
	}
	return f.err
}

func (f *fakeAgent) Attach(ctx context.Context, a attach.Attachment) error {
	if err := f.act(ctx); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.attached == nil {
		f.attached = map[attach.Key]attach.Attachment{}
	}
	f.attached[a.Key] = a
	return nil
}

func (f *fakeAgent) Detach(ctx context.Context, key attach.Key) error {
	f.mu.Lock()
	delete(f.attached, key)
	f.mu.Unlock()
	return f.act(ctx)
}

func (f *fakeAgent) Check(ctx context.Context, key attach.Key) (attach.Attachment, error) {
	if err := f.act(ctx); err != nil {
		return attach.Attachment{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	a, ok := f.attached[key]
	if !ok {
		return a, Errorf(CodeRefused, "attachment %s is not registered", key)
	}
	return a, nil
}

func (f *fakeAgent) GC(ctx context.Context, network string, valid []attach.Key) error {
	f.mu.Lock()
	keep := map[attach.Key]attach.Attachment{}
	for k, a := range f.attached {
		if a.Network != network {
			keep[k] = a
		}
	}
	for _, k := range valid {
		if a, ok := f.attached[k]; ok {
			keep[k] = a
		}
	}
	f.attached = keep
	f.mu.Unlock()
	return f.act(ctx)
}

func (f *fakeAgent) Status(ctx context.Context) error { return f.act(ctx) }

func (f *fakeAgent) keys() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	keys := make([]string, 0, len(f.attached))
	for k := range f.attached {
		keys = append(keys, k.String())
	}
	return keys
}

func sample(container string) attach.Attachment {
	return attach.Attachment{
		Network: "net", Key: attach.Key{ContainerID: container, IfName: "eth0"},
		Pod:      attach.PodRef{Namespace: "default", Name: "web", UID: "u"},
		IPs:      []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
		HostLink: attach.HostLink{Name: "veth0", Index: 7}, Labels: map[string]string{"app": "web"},
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the socket serves root only")
	}
}

// socketPath is short whatever TMPDIR says: sun_path holds 107 bytes.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "pw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// serve runs a server on a fresh socket until the test ends and returns the socket's path.
func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	needRoot(t)
	path := socketPath(t)
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	start(t, ln, h)
	return path
}

// start serves ln until the test ends or the returned function is called.
func start(t *testing.T, ln net.Listener, h http.Handler) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, h, slog.New(slog.DiscardHandler)) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func quiet(agent Agent, views map[string]View) http.Handler {
	return NewHandler(agent, views, slog.New(slog.DiscardHandler))
}

func code(t *testing.T, err error) uint {
	t.Helper()
	if err == nil {
		return 0
	}
	e, ok := err.(*Error) //nolint:errorlint // the client promises the type itself
	if !ok {
		t.Fatalf("error is a %T (%v), want *Error", err, err)
	}
	return e.Code
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	agent := &fakeAgent{}
	socket := serve(t, quiet(agent, map[string]View{
		"pods": func(_ context.Context, q url.Values) (any, error) {
			return map[string]string{"namespace": q.Get("namespace")}, nil
		},
		"broken": func(context.Context, url.Values) (any, error) { return func() {}, nil },
	}))
	c := NewClient(socket)
	ctx := t.Context()

	want := sample("c1")
	want.IfName = "net%1?#" // legal for the kernel, special in URLs
	if err := c.Attach(ctx, want); err != nil {
		t.Fatal(err)
	}
	if err := c.Attach(ctx, want); err != nil {
		t.Errorf("second attach: %v", err)
	}
	got, err := c.Check(ctx, want.Key)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("attachment (-want +got):\n%s", diff)
	}
	for _, id := range []string{"c2", "c3"} {
		if err := c.Attach(ctx, sample(id)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Detach(ctx, want.Key); err != nil {
		t.Fatal(err)
	}
	if err := c.GC(ctx, "net", []attach.Key{sample("c3").Key}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"c3/eth0"}, agent.keys()); diff != "" {
		t.Errorf("after gc (-want +got):\n%s", diff)
	}
	if err := c.GC(ctx, "net", nil); err != nil || len(agent.keys()) != 0 {
		t.Errorf("gc with nothing valid: error %v, left %v", err, agent.keys())
	}
	if err := c.Status(ctx); err != nil {
		t.Error(err)
	}
	var view map[string]string
	if err := c.View(ctx, "pods", url.Values{"namespace": {"a b"}}, &view); err != nil || view["namespace"] != "a b" {
		t.Errorf("view %v, error %v", view, err)
	}
	if got := code(t, c.View(ctx, "broken", nil, &view)); got != CodeInternal {
		t.Errorf("view that is no JSON: code %d, want 999", got)
	}
	if got := code(t, c.View(ctx, "later", nil, &view)); got != CodeVersionMismatch {
		t.Errorf("view of another release: code %d, want 102", got)
	}
}

func TestAgentErrorsKeepTheirCode(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		err          error
		want, status uint // of Attach and of Status
		http         int
	}{
		"own code":   {&Error{Code: 101, Msg: "m", Details: "d"}, 101, 101, 400},
		"wrapped":    {fmt.Errorf("pod x: %w", &Error{Code: 11, Msg: "m"}), 11, 11, 503},
		"not ready":  {&Error{Code: 50, Msg: "m"}, 50, 50, 503},
		"refused":    {&Error{Code: 100, Msg: "m"}, 100, 100, 403},
		"plain":      {errors.New("disk on fire"), 999, 999, 500},
		"timed out":  {fmt.Errorf("commit: %w", context.DeadlineExceeded), 11, 50, 503},
		"other code": {&Error{Code: 102, Msg: "m"}, 102, 102, 501},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := quiet(&fakeAgent{err: tc.err}, nil)
			c := NewClient(serve(t, h))
			if got := code(t, c.Attach(t.Context(), sample("c"))); got != tc.want {
				t.Errorf("attach: code %d, want %d", got, tc.want)
			}
			if got := code(t, c.Status(t.Context())); got != tc.status {
				t.Errorf("status: code %d, want %d", got, tc.status)
			}
			if status, _ := raw(t, h, http.MethodPut, "/v1/attachments/c/eth0", mustJSON(t, sample("c"))); status != tc.http {
				t.Errorf("HTTP status %d, want %d", status, tc.http)
			}
		})
	}
}

// raw calls the handler without a socket and returns status and error code.
func raw(t *testing.T, h http.Handler, method, target, body string) (int, uint) {
	t.Helper()
	w := &recorder{header: http.Header{}}
	r, err := http.NewRequestWithContext(t.Context(), method, "http://podwall"+target, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	h.ServeHTTP(w, r)
	var e Error
	if json.Unmarshal(w.body.Bytes(), &e) == nil && w.header.Get("Content-Type") != "application/json" {
		t.Errorf("JSON sent as %q", w.header.Get("Content-Type"))
	}
	return w.status, e.Code
}

type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(status int)      { r.status = status }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestBadRequests(t *testing.T) {
	t.Parallel()
	noIP := sample("c")
	noIP.IPs = nil
	noPod := sample("c")
	noPod.Pod = attach.PodRef{}
	good := mustJSON(t, sample("c"))
	for name, tc := range map[string]struct {
		method, target, body string
		status               int
		code                 uint
	}{
		"unknown fields are ignored":  {"PUT", "/v1/attachments/c/eth0", `{"later":{"x":1},` + good[1:], 204, 0},
		"no pod is the daemon's call": {"PUT", "/v1/attachments/c/eth0", mustJSON(t, noPod), 204, 0},
		"malformed body":              {"PUT", "/v1/attachments/c/eth0", `{"network":`, 400, 6},
		"empty body":                  {"PUT", "/v1/attachments/c/eth0", ``, 400, 6},
		"wrong type":                  {"PUT", "/v1/attachments/c/eth0", `{"ips":"10.0.0.1"}`, 400, 6},
		"trailing junk":               {"PUT", "/v1/attachments/c/eth0", good + "x", 400, 6},
		"other key in the body":       {"PUT", "/v1/attachments/c/eth1", good, 400, 6},
		"bad container":               {"PUT", "/v1/attachments/-c/eth0", good, 400, 4},
		"bad interface":               {"GET", "/v1/attachments/c/averyverylongname", "", 400, 4},
		"escaped slash":               {"DELETE", "/v1/attachments/..%2Fc/eth0", "", 400, 4},
		"no IP":                       {"PUT", "/v1/attachments/c/eth0", mustJSON(t, noIP), 400, 7},
		"body too large":              {"PUT", "/v1/attachments/c/eth0", strings.Repeat(" ", maxBody+1), 413, 6},
		"gc body too large":           {"POST", "/v1/gc", strings.Repeat(" ", maxBody+1), 413, 6},
		"bad timeout":                 {"PUT", "/v1/attachments/c/eth0?timeout=soon", good, 400, 6},
		"negative timeout":            {"PUT", "/v1/attachments/c/eth0?timeout=-1s", good, 400, 6},
		"gc without list":             {"POST", "/v1/gc", `{"network":"net"}`, 400, 6},
		"gc with null":                {"POST", "/v1/gc", `{"network":"net","valid":null}`, 400, 6},
		"gc without network":          {"POST", "/v1/gc", `{"valid":[]}`, 400, 7},
		"gc malformed":                {"POST", "/v1/gc", `[]`, 400, 6},
		"unknown path":                {"GET", "/v2/attachments/c/eth0", "", 404, 0},
		"unknown method":              {"PATCH", "/v1/attachments/c/eth0", "", 405, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status, code := raw(t, quiet(&fakeAgent{}, nil), tc.method, tc.target, tc.body)
			if status != tc.status || code != tc.code {
				t.Errorf("status %d code %d, want %d and %d", status, code, tc.status, tc.code)
			}
		})
	}
}

func TestEveryRequestHasADeadline(t *testing.T) {
	t.Parallel()
	for target, want := range map[string]time.Duration{
		"PUT /v1/attachments/c/eth0":               10 * time.Second,
		"PUT /v1/attachments/c/eth0?timeout=300ms": 300 * time.Millisecond,
		"PUT /v1/attachments/c/eth0?timeout=1h":    60 * time.Second,
		"GET /v1/attachments/c/eth0":               2 * time.Second,
		"DELETE /v1/attachments/c/eth0":            2 * time.Second,
		"POST /v1/gc":                              10 * time.Second,
		"GET /v1/status":                           2 * time.Second,
		"GET /v1/pods":                             10 * time.Second,
	} {
		t.Run(target, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				agent := &fakeAgent{}
				h := quiet(agent, map[string]View{"pods": func(ctx context.Context, _ url.Values) (any, error) { return nil, agent.act(ctx) }})
				method, path, _ := strings.Cut(target, " ")
				body := mustJSON(t, sample("c"))
				if path == "/v1/gc" {
					body = `{"network":"net","valid":[]}`
				}
				raw(t, h, method, path, body)
				if agent.deadline != want {
					t.Errorf("deadline in %v, want %v", agent.deadline, want)
				}
			})
		})
	}
}

func TestPanicBecomesInternalErrorAndIsLogged(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	agent := &fakeAgent{do: func(context.Context) error { panic("boom") }}
	h := NewHandler(agent, nil, slog.New(slog.NewTextHandler(&log, nil)))
	status, code := raw(t, h, "PUT", "/v1/attachments/c/eth0", mustJSON(t, sample("c")))
	if status != 500 || code != CodeInternal {
		t.Errorf("status %d code %d, want 500 and 999", status, code)
	}
	if !strings.Contains(log.String(), "boom") || !strings.Contains(log.String(), "agentapi_test.go") {
		t.Errorf("the log lacks panic or stack: %s", log.String())
	}
}

func TestUnreachableDaemon(t *testing.T) {
	t.Parallel()
	dead := socketPath(t)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	hung := socketPath(t)
	hungLn, err := net.Listen("unix", hung) // accepts in the kernel, never answers
	if err != nil {
		t.Fatal(err)
	}
	defer hungLn.Close()

	for name, socket := range map[string]string{"no socket": filepath.Join(filepath.Dir(dead), "none"), "refused": dead, "hung": hung} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := NewClient(socket)
			for verb, call := range map[string]func(context.Context) error{
				"attach": func(ctx context.Context) error { return c.Attach(ctx, sample("c")) },
				"check":  func(ctx context.Context) error { _, err := c.Check(ctx, sample("c").Key); return err },
				"gc":     func(ctx context.Context) error { return c.GC(ctx, "net", nil) },
				"detach": func(ctx context.Context) error { return c.Detach(ctx, sample("c").Key) },
				"status": c.Status,
			} {
				ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
				begin := time.Now()
				err := call(ctx)
				cancel()
				want := CodeTryAgainLater
				if verb == "status" {
					want = CodeNotAvailable
				}
				if got := code(t, err); got != want {
					t.Errorf("%s: code %d, want %d", verb, got, want)
				}
				for _, part := range []string{socket, "podwalld", "podwall-install uninstall"} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("%s: %q does not mention %s", verb, err, part)
					}
				}
				if d := time.Since(begin); d > time.Second {
					t.Errorf("%s took %v with a deadline of 200 ms", verb, d)
				}
			}
		})
	}
}

func TestOnlyAttachDialsAgain(t *testing.T) {
	t.Parallel()
	needRoot(t)
	socket := serve(t, quiet(&fakeAgent{}, nil))
	dials := 0
	late := newClient(socket, func(context.Context) (net.Conn, error) {
		if dials++; dials < 3 {
			return nil, &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
		}
		return net.Dial("unix", socket)
	})
	if err := late.Attach(t.Context(), sample("c")); err != nil || dials != 3 {
		t.Errorf("attach to a daemon that comes late: %v after %d dials, want success after 3", err, dials)
	}

	for name, tc := range map[string]struct {
		errno syscall.Errno
		call  func(context.Context, *Client) error
		want  time.Duration // until it gives up
	}{
		"attach, no socket":     {syscall.ENOENT, func(ctx context.Context, c *Client) error { return c.Attach(ctx, sample("c")) }, 2750 * time.Millisecond},
		"attach, backlog full":  {syscall.EAGAIN, func(ctx context.Context, c *Client) error { return c.Attach(ctx, sample("c")) }, 2750 * time.Millisecond},
		"attach, not permitted": {syscall.EACCES, func(ctx context.Context, c *Client) error { return c.Attach(ctx, sample("c")) }, 0},
		"check, no socket":      {syscall.ENOENT, func(ctx context.Context, c *Client) error { _, err := c.Check(ctx, sample("c").Key); return err }, 0},
		"status, no socket":     {syscall.ENOENT, func(ctx context.Context, c *Client) error { return c.Status(ctx) }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c := newClient("/s", func(context.Context) (net.Conn, error) {
					return nil, &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", tc.errno)}
				})
				begin := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if err := tc.call(ctx, c); err == nil {
					t.Error("no error without a daemon")
				}
				if got := time.Since(begin); got != tc.want {
					t.Errorf("gave up after %v, want %v", got, tc.want)
				}
			})
		})
	}
}

func TestDaemonAnswersBeforeTheClientGivesUp(t *testing.T) {
	t.Parallel()
	agent := &fakeAgent{do: func(ctx context.Context) error {
		<-ctx.Done()
		return &Error{Code: CodeTryAgainLater, Msg: "pod default/web is not known yet"}
	}}
	c := NewClient(serve(t, quiet(agent, nil)))
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	err := c.Attach(ctx, sample("c"))
	if code(t, err) != CodeTryAgainLater || !strings.Contains(err.Error(), "not known yet") {
		t.Errorf("error %v, want the daemon's own", err)
	}
}

func TestForeignServerIsAVersionMismatch(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]uint{404: 102, 405: 102, 501: 102, 500: 999, 302: 999} {
		socket := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
		if got := code(t, NewClient(socket).Attach(t.Context(), sample("c"))); got != want {
			t.Errorf("status %d: code %d, want %d", status, got, want)
		}
	}
	garbage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	if _, err := NewClient(garbage).Check(t.Context(), sample("c").Key); code(t, err) != CodeTryAgainLater {
		t.Errorf("answer that is no JSON: %v", err)
	}
}

func TestListen(t *testing.T) {
	t.Parallel()
	needRoot(t)
	base := filepath.Dir(socketPath(t))
	mode := func(path string) os.FileMode {
		t.Helper()
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Mode().Perm()
	}

	path := filepath.Join(base, "run", "podwall.sock")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if d, s := mode(filepath.Dir(path)), mode(path); d != 0o700 || s != 0o600 {
		t.Errorf("modes: directory %o, socket %o, want 700 and 600", d, s)
	}
	// A second daemon takes the path over; the end of the first does not take it away.
	second, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	stop := start(t, first, quiet(&fakeAgent{err: errors.New("the old one")}, nil))
	start(t, second, quiet(&fakeAgent{}, nil))
	stop()
	if err := NewClient(path).Status(t.Context()); err != nil {
		t.Errorf("the new daemon after the old one's end: %v", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left in the directory: %v, %v, want the socket alone", entries, err)
	}

	open := filepath.Join(base, "open")
	foreign := filepath.Join(base, "foreign")
	for _, dir := range []string{open, foreign} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(open, 0o777), os.Chown(foreign, 65534, 65534), os.WriteFile(filepath.Join(base, "file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ path, want string }{
		"relative":              {"podwall.sock", "absolute"},
		"too long":              {"/tmp/" + strings.Repeat("d", 103), "107"},
		"writable by others":    {filepath.Join(open, "s"), "chmod"},
		"owned by another":      {filepath.Join(foreign, "s"), "chown"},
		"a file is there":       {filepath.Join(base, "file"), "remove it"},
		"parent is a file":      {filepath.Join(base, "file", "s"), "directory"},
		"parent cannot be made": {"/proc/nope/s", "directory"},
	} {
		if ln, err := Listen(tc.path); err == nil {
			ln.Close()
			t.Errorf("%s: no error", name)
		} else if !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %q does not say %q", name, err, tc.want)
		}
	}
}

func TestOnlyRootIsServed(t *testing.T) {
	t.Parallel()
	path := serve(t, quiet(&fakeAgent{}, nil))
	// The modes keep others out; open them to see the credentials checked.
	if err := errors.Join(os.Chmod(filepath.Dir(path), 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	c := newClient(path, func(context.Context) (net.Conn, error) { return dialAs(65534, path) })
	err := c.Attach(t.Context(), sample("c"))
	if code(t, err) != CodeRefused || !strings.Contains(err.Error(), "must be root") {
		t.Errorf("another user got %v, want code 100", err)
	}
	if err := NewClient(path).Attach(t.Context(), sample("c")); err != nil {
		t.Errorf("root got %v", err)
	}
}

// dialAs connects with the credentials of another user, on a thread of its own that ends with the goroutine.
func dialAs(uid int, path string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			done <- result{err: errno}
			return
		}
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err == nil {
			err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: path})
		}
		if err != nil {
			done <- result{err: err}
			return
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		conn, err := net.FileConn(f)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

func TestServeDrains(t *testing.T) {
	t.Parallel()
	needRoot(t)
	path := socketPath(t)
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	entered, release := make(chan struct{}), make(chan struct{})
	agent := &fakeAgent{do: func(ctx context.Context) error {
		close(entered)
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	ctx, cancel := context.WithCancel(t.Context())
	served, attached := make(chan error, 1), make(chan error, 1)
	go func() { served <- Serve(ctx, ln, quiet(agent, nil), slog.New(slog.DiscardHandler)) }()
	go func() { attached <- NewClient(path).Attach(context.Background(), sample("c")) }()
	<-entered
	cancel()
	// Refused connections show that the listener is closed while the request still runs.
	for {
		c, err := net.Dial("unix", path)
		if err != nil {
			break
		}
		c.Close()
		runtime.Gosched()
	}
	close(release)
	if err := <-attached; err != nil {
		t.Errorf("the running request: %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
}

// A request outlives the server's read timeout: net/http must not take the silence of a caller that waits for its end.
func TestWaitingIsLongerThanTheReadTimeout(t *testing.T) {
	t.Parallel()
	needRoot(t)
	path := socketPath(t)
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	agent := &fakeAgent{do: func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return errors.New("cut off")
		case <-time.After(300 * time.Millisecond):
			return nil
		}
	}}
	srv := newServer(quiet(agent, nil), slog.New(slog.DiscardHandler))
	srv.ReadTimeout = 50 * time.Millisecond
	done := make(chan error, 1)
	go func() { done <- srv.Serve(newLimitListener(ln, 1, 0)) }()
	c := NewClient(path)
	if err := c.Attach(t.Context(), sample("c")); err != nil {
		t.Errorf("attach: %v", err)
	}
	if err := c.Status(t.Context()); err != nil {
		t.Errorf("status: %v", err)
	}
	srv.Close()
	_ = <-done
}
