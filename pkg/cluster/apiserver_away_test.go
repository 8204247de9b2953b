package cluster

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// TestImpatient holds that a server that says nothing is given up with the reason, and that one that has begun its answer is not, however
// long it takes; without the wrapper the first waits for as long as its caller.
func TestImpatient(t *testing.T) {
	t.Parallel()
	const timeout = 300 * time.Millisecond
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/silent" {
			<-r.Context().Done()
			return
		}
		w.(http.Flusher).Flush()
		select {
		case <-time.After(4 * timeout):
			_, _ = io.WriteString(w, "late")
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(server.Close)
	get := func(rt http.RoundTripper, path string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*timeout)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := rt.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	if _, err := get(impatient{http.DefaultTransport, timeout}, "/silent"); err == nil || !strings.Contains(err.Error(), "no answer from 127.0.0.1") {
		t.Errorf("silent: %v", err)
	}
	if body, err := get(impatient{http.DefaultTransport, timeout}, "/slow"); body != "late" || err != nil {
		t.Errorf("slow: %q, %v", body, err)
	}
	if _, err := get(http.DefaultTransport, "/silent"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the control: %v", err)
	}
}
