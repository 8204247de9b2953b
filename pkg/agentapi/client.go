package agentapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"

	"github.com/podwall/podwall/pkg/attach"
)

// Attach asks again for this long, to bridge the moment in which a daemon is replaced.
const (
	dialRetryFor = 3 * time.Second
	dialRetryMin = 50 * time.Millisecond
	dialRetryMax = 500 * time.Millisecond
)

var _ Agent = (*Client)(nil)

// Client asks the daemon over its socket. Every error of its methods is an *Error.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the socket at an absolute path. It does not dial.
func NewClient(socket string) *Client {
	return newClient(socket, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	})
}

func newClient(socket string, dial func(context.Context) (net.Conn, error)) *Client {
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := dial(ctx)
			if err != nil {
				return nil, &dialError{err}
			}
			return c, nil
		},
	}}}
}

// dialError marks an error from before the request was sent.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// Attach asks the daemon to enforce an attachment and waits until it is in the kernel.
func (c *Client) Attach(ctx context.Context, a attach.Attachment) error {
	start := time.Now()
	for backoff := dialRetryMin; ; backoff = min(2*backoff, dialRetryMax) {
		err := c.do(ctx, request{method: http.MethodPut, path: attachmentPath(a.Key), query: waitQuery(ctx), body: a, silent: CodeTryAgainLater})
		var down *unreachable
		if !errors.As(err, &down) || !down.retry || time.Since(start)+backoff > dialRetryFor {
			return plain(err)
		}
		select {
		case <-ctx.Done():
			return plain(err)
		case <-time.After(backoff):
		}
	}
}

// waitQuery tells the daemon how long the caller waits, less what the answer needs to arrive: the daemon's account of
// what it waited for is worth more than a time-out of ours.
func waitQuery(ctx context.Context) url.Values {
	deadline, ok := ctx.Deadline()
	if !ok {
		return nil
	}
	left := time.Until(deadline)
	left = max(left-min(left/10, 500*time.Millisecond), time.Millisecond)
	return url.Values{"timeout": {left.String()}}
}

// Detach asks the daemon to forget an attachment.
func (c *Client) Detach(ctx context.Context, key attach.Key) error {
	return plain(c.do(ctx, request{method: http.MethodDelete, path: attachmentPath(key), silent: CodeTryAgainLater}))
}

// Check returns the attachment as the daemon enforces it.
func (c *Client) Check(ctx context.Context, key attach.Key) (attach.Attachment, error) {
	var a attach.Attachment
	err := c.do(ctx, request{method: http.MethodGet, path: attachmentPath(key), out: &a, silent: CodeTryAgainLater})
	return a, plain(err)
}

// GC asks the daemon to forget what is not listed; a nil list means that nothing is valid.
func (c *Client) GC(ctx context.Context, network string, valid []attach.Key) error {
	if valid == nil {
		valid = []attach.Key{}
	}
	body := gcRequest{Network: network, Valid: &valid}
	return plain(c.do(ctx, request{method: http.MethodPost, path: "/v1/gc", body: body, silent: CodeTryAgainLater}))
}

// Status asks whether an ADD could be served now.
func (c *Client) Status(ctx context.Context) error {
	return plain(c.do(ctx, request{method: http.MethodGet, path: "/v1/status", silent: CodeNotAvailable}))
}

// View fetches an operator's view into out.
func (c *Client) View(ctx context.Context, name string, query url.Values, out any) error {
	return plain(c.do(ctx, request{method: http.MethodGet, path: "/v1/" + url.PathEscape(name), query: query, out: out, silent: CodeTryAgainLater}))
}

// request is one exchange. silent is the code that a daemon that does not answer stands for.
type request struct {
	method, path string
	query        url.Values
	body, out    any
	silent       uint
}

// unreachable is a daemon that did not answer; retry says that there was none, or that it ended the connection without a word: it went
// away, or it had too many callers. The next one may answer.
type unreachable struct {
	err   *Error
	retry bool
}

func (u *unreachable) Error() string { return u.err.Error() }
func (u *unreachable) Unwrap() error { return u.err }

// plain strips what only this package needs to know, so that callers can compare types.
func plain(err error) error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return err
}

func (c *Client) do(ctx context.Context, req request) error {
	var body io.Reader
	if req.body != nil {
		data, err := json.Marshal(req.body)
		if err != nil {
			return &Error{Code: CodeInternal, Msg: "cannot encode the request to podwalld", Details: err.Error()}
		}
		body = bytes.NewReader(data)
	}
	u := "http://podwall" + req.path
	if len(req.query) > 0 {
		u += "?" + req.query.Encode()
	}
	r, err := http.NewRequestWithContext(ctx, req.method, u, body)
	if err != nil {
		return &Error{Code: CodeInternal, Msg: "cannot form the request to podwalld", Details: err.Error()}
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return c.noAnswer(req, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return c.failure(req, resp)
	}
	if req.out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(req.out); err != nil {
		return c.noAnswer(req, fmt.Errorf("decode answer: %w", err))
	}
	return nil
}

// closedIdle is net/http's errServerClosedIdle, which it does not export: the connection ended between its being made and the request.
const closedIdle = "http: server closed idle connection"

// noAnswer names the socket and what to do: pods cannot start on this node until somebody reads this.
func (c *Client) noAnswer(req request, err error) error {
	if urlErr, ok := errors.AsType[*url.Error](err); ok {
		err = urlErr.Err // less the made-up URL
	}
	var dial *dialError
	// EAGAIN is a full backlog (connect(2), unix(7)).
	retry := errors.As(err, &dial) && (errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EAGAIN)) ||
		dial == nil && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || err.Error() == closedIdle)
	return &unreachable{retry: retry, err: &Error{
		Code: req.silent,
		Msg: fmt.Sprintf("no answer from podwalld on %s: is podwalld running on this node? to remove podwall from the node run podwall-install uninstall",
			c.socket),
		Details: err.Error(),
	}}
}

// failure reads the CNI error of an answer. An answer without one comes from a mux that does not know the request.
func (c *Client) failure(req request, resp *http.Response) error {
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return c.noAnswer(req, fmt.Errorf("read answer: %w", err))
	}
	var e Error
	if json.Unmarshal(data, &e) == nil && e.Code != 0 {
		if e.Error() == "" {
			e.Msg = fmt.Sprintf("podwalld on %s answered %s %s with status %d and does not say why", c.socket, req.method, req.path, resp.StatusCode)
		}
		return &e
	}
	switch resp.StatusCode {
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented:
		return Errorf(CodeVersionMismatch, "podwalld on %s does not know %s %s: install the plugin and the daemon of one release (podwall-install status shows both)",
			c.socket, req.method, req.path)
	}
	return Errorf(CodeInternal, "podwalld on %s answered %s %s with status %d", c.socket, req.method, req.path, resp.StatusCode)
}
