package agentapi

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"time"
)

const (
	// maxFollowers is how many streams are sent at once: each costs a goroutine for as long as its reader likes.
	maxFollowers = 8
	// streamTimeout is how long the reader of a stream may pause.
	streamTimeout = time.Minute
	// maxLine limits a line of a stream on the client's side.
	maxLine = 1 << 20
)

// Stream answers an operator's GET with values until ctx ends or send fails.
type Stream func(ctx context.Context, query url.Values, send func(v any) error) error

// Streams answers GET /v1/<name>?follow=1 with a line of JSON per value, and leaves everything else to next. Streams end with ctx.
func Streams(ctx context.Context, next http.Handler, streams map[string]Stream) http.Handler {
	followers := make(gate, maxFollowers)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var stream Stream
		if r.Method == http.MethodGet && len(r.URL.Path) > len("/v1/") && r.URL.Query().Get("follow") == "1" {
			stream = streams[r.URL.Path[len("/v1/"):]]
		}
		if stream == nil {
			next.ServeHTTP(w, r)
			return
		}
		if c := callerOf(r); c != nil && !c.heard() {
			return // it has lost its place, and will not hear an answer
		}
		leave, err := followers.enter()
		if err != nil {
			writeError(w, err)
			return
		}
		defer leave()
		control := http.NewResponseController(w)
		// Without it the caller would seem to have gone at the server's deadline for requests (see readBody).
		if err := setReadDeadline(control, time.Time{}); err != nil {
			writeError(w, err)
			return
		}
		following, cancel := context.WithCancel(r.Context())
		defer cancel()
		stop := context.AfterFunc(ctx, cancel)
		defer stop()
		send := func(v any) error {
			line, err := json.Marshal(v)
			if err != nil {
				return err
			}
			if err := control.SetWriteDeadline(time.Now().Add(streamTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
				return err
			}
			if _, err := w.Write(append(line, '\n')); err != nil {
				return err
			}
			return control.Flush()
		}
		w.Header().Set("Content-Type", "application/jsonl")
		w.WriteHeader(http.StatusOK)
		if control.Flush() != nil {
			return
		}
		_ = stream(following, r.URL.Query(), send) //nolint:contextcheck // it ends with the daemon as well: a caller that has gone, or that was too slow
		_ = control.SetWriteDeadline(time.Now().Add(answerTimeout))
	})
}

// Follow asks for a stream and calls each with every line of it, until ctx ends or each fails. A stream that ends is an error: the daemon
// has gone.
func (c *Client) Follow(ctx context.Context, name string, query url.Values, each func(line []byte) error) error {
	q := url.Values{"follow": {"1"}}
	maps.Copy(q, query)
	req := request{method: http.MethodGet, path: "/v1/" + url.PathEscape(name), query: q, silent: CodeTryAgainLater}
	r, err := http.NewRequestWithContext(ctx, req.method, "http://podwall"+req.path+"?"+q.Encode(), nil)
	if err != nil {
		return &Error{Code: CodeInternal, Msg: "cannot form the request to podwalld", Details: err.Error()}
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return plain(c.noAnswer(req, err))
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode/100 != 2 {
		return plain(c.failure(req, resp))
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		if err := each(lines.Bytes()); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return nil //nolint:nilerr // the caller has had enough
	}
	err = lines.Err()
	if err == nil {
		err = io.EOF
	}
	return &Error{Code: CodeTryAgainLater, Msg: fmt.Sprintf("podwalld on %s has ended the stream, it stops or this reader was too slow: ask again", c.socket), Details: err.Error()}
}
