package agentapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// silentCaller connects and says nothing.
func silentCaller(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// closedWithin reports whether the other side ends the connection within d.
func closedWithin(t *testing.T, c net.Conn, d time.Duration) bool {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
	_, err := io.Copy(io.Discard, c)
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// limited serves with room for so many silent callers, who would be heard out for a minute.
func limited(t *testing.T, h http.Handler, most int, grace time.Duration) string {
	t.Helper()
	needRoot(t)
	path := socketPath(t)
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	srv := newServer(h, slog.New(slog.DiscardHandler))
	srv.ReadHeaderTimeout, srv.ReadTimeout = time.Minute, time.Minute
	served := make(chan error, 1)
	go func() { served <- srv.Serve(newLimitListener(ln, most, grace)) }()
	t.Cleanup(func() {
		_ = srv.Close()
		_ = <-served
	})
	return path
}

func TestTheLongestSilentCallerGivesUpItsPlace(t *testing.T) {
	t.Parallel()
	path := limited(t, quiet(&fakeAgent{}, nil), 2, 0)
	oldest := silentCaller(t, path)
	half := silentCaller(t, path)
	if _, err := io.WriteString(half, "PUT /v1/attachments/c/eth0 HTTP/1.1\r\nHost: podwall\r\nContent-Length: 9\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	if err := NewClient(path).Status(t.Context()); err != nil {
		t.Errorf("status beside silent callers: %v", err)
	}
	if !closedWithin(t, oldest, 10*time.Second) {
		t.Error("the caller that was silent for longest keeps its place")
	}
	if closedWithin(t, half, 50*time.Millisecond) {
		t.Error("a caller lost its place although there was a longer silent one")
	}
	silentCaller(t, path)
	silentCaller(t, path)
	if !closedWithin(t, half, 10*time.Second) {
		t.Error("the caller of half a request keeps its place")
	}
}

func TestSilentCallersHaveAGrace(t *testing.T) {
	t.Parallel()
	const grace = 300 * time.Millisecond
	path := limited(t, quiet(&fakeAgent{}, nil), 1, grace)
	begin := time.Now()
	first := silentCaller(t, path)
	done := make(chan error, 1)
	go func() { done <- NewClient(path).Status(context.Background()) }()
	if _, err := io.WriteString(first, "GET /v1/status HTTP/1.1\r\nHost: podwall\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(first); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 204") {
		// A machine that stands still for so long has used the grace up.
		if time.Since(begin) < grace {
			t.Errorf("a caller within its grace got %q, %v", answer, err)
		}
	}
	if err := <-done; err != nil {
		t.Errorf("the caller behind it: %v", err)
	}
	silentCaller(t, path)
	begin = time.Now()
	if err := NewClient(path).Status(t.Context()); err != nil {
		t.Errorf("status behind a silent caller: %v", err)
	}
	if waited := time.Since(begin); waited < grace/2 {
		t.Errorf("a silent caller lost its place after %v, want %v", waited, grace)
	}
}

// A caller who was heard waits for its end however many silent ones come.
func TestHeardCallersKeepTheirPlace(t *testing.T) {
	t.Parallel()
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
	path := limited(t, quiet(agent, nil), 2, 0)
	done := make(chan error, 1)
	go func() { done <- NewClient(path).Attach(context.Background(), sample("c")) }()
	<-entered
	callers := make([]net.Conn, 20)
	for i := range callers {
		callers[i] = silentCaller(t, path)
	}
	for i, c := range callers[:len(callers)-2] {
		if !closedWithin(t, c, 10*time.Second) {
			t.Errorf("silent caller %d keeps its place", i)
		}
	}
	close(release)
	if err := <-done; err != nil {
		t.Errorf("attach: %v", err)
	}
}

func TestStrangersHaveARoomOfTheirOwn(t *testing.T) {
	t.Parallel()
	path := limited(t, quiet(&fakeAgent{}, nil), 1, time.Hour)
	if err := errors.Join(os.Chmod(filepath.Dir(path), 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	strangers := make([]net.Conn, 5)
	for i := range strangers {
		c, err := dialAs(65534, path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		strangers[i] = c
	}
	for i, c := range strangers[:4] {
		if !closedWithin(t, c, 10*time.Second) {
			t.Errorf("stranger %d of 5 keeps its place", i)
		}
	}
	// Root's only place would not come free for an hour.
	if err := NewClient(path).Status(t.Context()); err != nil {
		t.Errorf("status beside strangers: %v", err)
	}
}

// A connection that ended without an answer is asked again: the daemon went away, or had too many callers.
func TestAttachIsSentAgain(t *testing.T) {
	t.Parallel()
	path := socketPath(t)
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 3 {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if i == 2 {
				_, _ = c.Read(make([]byte, 4096))
				_, _ = io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
			}
			c.Close()
		}
	}()
	if err := NewClient(path).Attach(t.Context(), sample("c")); err != nil {
		t.Errorf("attach: %v", err)
	}
	ln.Close()
	<-done
}

func TestRequestsBeyondTheLimitAreRefused(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		method, path, body string
		most               int
	}{
		"attach": {"PUT", "/v1/attachments/c/eth0", mustJSON(t, sample("c")), maxAttaches},
		"detach": {"DELETE", "/v1/attachments/c/eth0", "", maxDetaches},
		"gc":     {"POST", "/v1/gc", `{"network":"net","valid":[]}`, maxDetaches},
		"view":   {"GET", "/v1/pods", "", maxViews},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			entered, release := make(chan struct{}), make(chan struct{})
			agent := &fakeAgent{}
			agent.do = func(context.Context) error {
				entered <- struct{}{}
				<-release
				return nil
			}
			h := quiet(agent, map[string]View{"pods": func(ctx context.Context, _ url.Values) (any, error) { return nil, agent.act(ctx) }})
			done := make(chan int, tc.most)
			for range tc.most {
				go func() {
					status, _ := raw(t, h, tc.method, tc.path, tc.body)
					done <- status
				}()
			}
			for range tc.most {
				<-entered
			}
			if status, code := raw(t, h, tc.method, tc.path, tc.body); status != http.StatusServiceUnavailable || code != CodeTryAgainLater {
				t.Errorf("one more: status %d, code %d, want 503 and 11", status, code)
			}
			close(release)
			for range tc.most {
				if status := <-done; status/100 != 2 {
					t.Errorf("status %d, want success", status)
				}
			}
		})
	}
}

// Bodies of up to a mebibyte are accepted, a few at a time.
func TestLargeBodiesTakeTurns(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	agent := &fakeAgent{do: func(context.Context) error {
		entered <- struct{}{}
		<-release
		return nil
	}}
	path := serve(t, quiet(agent, nil))
	large := sample("large")
	large.Labels = map[string]string{"x": strings.Repeat("x", 2*largeBody)}
	done := make(chan error)
	begin := time.Now()
	for range maxLarge + 1 {
		go func() { done <- NewClient(path).Attach(context.Background(), large) }()
	}
	for range maxLarge {
		<-entered
	}
	// There is no room for another large one, but for a small one.
	go func() { done <- NewClient(path).Attach(context.Background(), sample("small")) }()
	<-entered
	select {
	case <-entered:
		t.Errorf("more than %d large bodies are held", maxLarge)
	case <-time.After(50 * time.Millisecond):
	}
	release <- struct{}{} // whoever it is leaves
	close(release)
	go func() { // the one that waited
		for range entered {
		}
	}()
	for range maxLarge + 2 {
		err := <-done
		// A machine that stands still for so long has used up the patience of the one that waits.
		if err != nil && (time.Since(begin) < readTimeout || code(t, err) != CodeTryAgainLater) {
			t.Error(err)
		}
	}
	close(entered)
}

func TestTimeoutsOfTheServer(t *testing.T) {
	t.Parallel()
	srv := newServer(quiet(&fakeAgent{}, nil), slog.New(slog.DiscardHandler))
	if srv.ReadHeaderTimeout != readHeaderTimeout || srv.ReadTimeout != readTimeout || srv.WriteTimeout == 0 || srv.IdleTimeout == 0 || srv.MaxHeaderBytes != maxHeaderBytes {
		t.Error("a limit of the server is not set")
	}
	if srv.ConnState == nil {
		t.Error("a connection that is handed over stays silent and loses its place")
	}
}

// A caller that does not read its answer does not keep what it holds for long.
func TestAnswersMustBeTaken(t *testing.T) {
	t.Parallel()
	answer := strings.Repeat("x", 8<<20) // more than a socket takes
	path := serve(t, quiet(&fakeAgent{}, map[string]View{"pods": func(context.Context, url.Values) (any, error) { return answer, nil }}))
	begin := time.Now()
	for range maxViews {
		c := silentCaller(t, path)
		if _, err := fmt.Fprint(c, "GET /v1/pods HTTP/1.1\r\nHost: podwall\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		start := make([]byte, len("HTTP/1.1 200"))
		if _, err := io.ReadFull(c, start); err != nil || string(start) != "HTTP/1.1 200" {
			t.Fatalf("%q, %v", start, err)
		}
	}
	refused := func() bool {
		var got string
		err := NewClient(path).View(t.Context(), "pods", nil, &got)
		if err == nil && got != answer {
			t.Error("the answer is not whole")
		}
		return err != nil
	}
	poll := func(what string, condition func() bool) {
		t.Helper()
		for deadline := time.Now().Add(6 * answerTimeout); !condition(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not within %v: %s", 6*answerTimeout, what)
			}
		}
	}
	// They hold all views there are, unless the machine stood still for so long that they have lost them already.
	if !refused() && time.Since(begin) < answerTimeout {
		t.Error("a view is served beside callers that do not read theirs: this test tests nothing")
	}
	poll("they lose their views", func() bool { return !refused() })
}
