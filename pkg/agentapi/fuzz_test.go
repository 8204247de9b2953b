package agentapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/podwall/podwall/pkg/attach"
)

// FuzzRequest holds that no request makes a handler panic or fail as if the daemon were at fault, and that one that is refused has
// changed nothing.
func FuzzRequest(f *testing.F) {
	good, err := json.Marshal(sample("c"))
	if err != nil {
		f.Fatal(err)
	}
	for _, method := range []string{"GET", "PUT", "DELETE", "POST", "HEAD", "PATCH", "OPTIONS", "CONNECT", "BREW"} {
		for _, target := range []string{
			"/v1/attachments/c/eth0", "/v1/attachments/c/eth0?timeout=1s", "/v1/attachments/c/eth0?timeout=-1s&timeout=1h", "/v1/gc", "/v1/status",
			"/v1/pods?of=%00", "/v1/attachments/..%2F..%2Fx/eth0", "/v1//attachments/c/eth0", "/v1/attachments/c/%", "/v1/attachments/c/..", "/v1/owner", "*", "http://x/v1/status",
		} {
			f.Add(method, target, good)
		}
	}
	for _, body := range []string{
		"", "null", "[]", "{}", `{"network":"net","valid":[]}`, `{"network":"net","valid":[null,{"containerID":"c"}]}`, `{"network":"net","valid":null}`,
		`{"ips":["::ffff:1.2.3.4"]}`, `{"ips":[""]}`, `{"hostLink":{"name":"a","index":1e99}}`, strings.Replace(string(good), `"ips"`, `"IPs"`, 1),
		strings.Repeat("[", 20000), string(good) + string(good), "\xff\xfe" + string(good),
	} {
		f.Add("PUT", "/v1/attachments/c/eth0", []byte(body))
		f.Add("POST", "/v1/gc", []byte(body))
	}
	f.Fuzz(func(t *testing.T, method, target string, body []byte) {
		head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: podwall\r\nContent-Length: %d\r\n\r\n", method, target, len(body))
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head + string(body))))
		if err != nil {
			return // net/http answers that
		}
		if r.ContentLength != int64(len(body)) {
			return // the target has smuggled another head
		}
		was := map[attach.Key]attach.Attachment{{ContainerID: "old", IfName: "eth0"}: sample("old")}
		agent := &fakeAgent{attached: maps.Clone(was)}
		var log bytes.Buffer
		h := NewHandler(agent, map[string]View{"pods": func(_ context.Context, q url.Values) (any, error) { return q, nil }}, slog.New(slog.NewTextHandler(&log, nil)))
		w := &recorder{header: http.Header{}, status: http.StatusOK}
		h.ServeHTTP(w, r)
		if log.Len() > 0 || w.status >= 500 {
			t.Fatalf("%q %q %q: status %d, %s%s", method, target, body, w.status, &w.body, &log)
		}
		changed := !maps.EqualFunc(was, agent.attached, func(a, b attach.Attachment) bool { return a.Key == b.Key })
		if w.status/100 != 2 && changed {
			t.Errorf("%q %q %q: refused with status %d, and yet %v is registered", method, target, body, w.status, agent.keys())
		}
		for key, a := range agent.attached {
			if err := a.Validate(); err != nil || a.Key != key {
				t.Errorf("%q %q %q registered %s: %v", method, target, body, key, err)
			}
		}
		if w.header.Get("Content-Type") == "application/json" && !json.Valid(w.body.Bytes()) {
			t.Errorf("%q %q: answer %q is no JSON", method, target, &w.body)
		}
	})
}

// FuzzAnswer holds that the plugin takes no answer, whoever sends it, for anything but a success or a CNI error.
func FuzzAnswer(f *testing.F) {
	for _, answer := range []string{
		"", "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
		"HTTP/1.1 403 Forbidden\r\nContent-Length: 24\r\n\r\n{\"code\":100,\"msg\":\"no\"}\n", "HTTP/1.1 503 x\r\nContent-Length: 12\r\n\r\n{\"code\":-1}\n",
		"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 x\r\n\r\n", "HTTP/1.1 301 x\r\nLocation: /v1/status\r\n\r\n", "HTTP/1.1 302 x\r\nLocation: http://other/\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b", "SSH-2.0-x\r\n",
		"HTTP/1.1 200 OK\r\n\r\n{\"ips\":[\"1\"]}", "HTTP/1.1 101 x\r\nUpgrade: y\r\n\r\n",
	} {
		f.Add([]byte(answer))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		c := newClient("/s", func(context.Context) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				_ = far.SetDeadline(time.Now().Add(5 * time.Second))
				if _, err := http.ReadRequest(bufio.NewReader(far)); err == nil {
					_, _ = far.Write(answer)
				}
			}()
			return near, nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		for verb, call := range map[string]func() error{
			"status": func() error { return c.Status(ctx) },
			"check":  func() error { _, err := c.Check(ctx, sample("c").Key); return err },
		} {
			err := call()
			if got := code(t, err); err != nil && (got == 0 || err.Error() == "") {
				t.Errorf("%s: %#v has no code or no message", verb, err)
			}
			// A success is what a server has said in so many words.
			if err == nil && !bytes.Contains(answer, []byte(" 2")) {
				t.Errorf("%s succeeds with the answer %q", verb, answer)
			}
		}
	})
}
