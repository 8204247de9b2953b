package agentapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/podwall/podwall/pkg/attach"
)

// How many requests run at once. A node has some 250 pods. CHECK and STATUS wait for nothing, so that nothing has to bound them.
const (
	maxAttaches = 256
	maxDetaches = 256 // and GC
	maxViews    = 16  // each may be megabytes
)

// Nearly all bodies are smaller than largeBody; those that are not take memory by turns.
const (
	largeBody = 64 << 10
	maxLarge  = 8
)

// NewHandler serves an agent, and each view under GET /v1/<name>. Only panics are logged: everything else is the caller's to report.
func NewHandler(agent Agent, views map[string]View, log *slog.Logger) http.Handler {
	h := &handler{agent: agent, log: log, large: make(chan struct{}, maxLarge)}
	mux := http.NewServeMux()
	const attachment = "/v1/attachments/{containerID}/{ifname}"
	detaches, viewers := make(gate, maxDetaches), make(gate, maxViews)
	mux.Handle("PUT "+attachment, h.endpoint(attachTimeout, make(gate, maxAttaches), h.attach))
	mux.Handle("GET "+attachment, h.endpoint(fixed(requestTimeout), nil, h.check))
	mux.Handle("DELETE "+attachment, h.endpoint(fixed(requestTimeout), detaches, h.detach))
	mux.Handle("POST /v1/gc", h.endpoint(fixed(gcTimeout), detaches, h.gc))
	mux.Handle("GET /v1/status", h.endpoint(fixed(requestTimeout), nil, h.status))
	for name, view := range views {
		mux.Handle("GET /v1/"+name, h.endpoint(fixed(viewTimeout), viewers, func(ctx context.Context, r *http.Request, _ []byte) (any, error) {
			return view(ctx, r.URL.Query())
		}))
	}
	return mux
}

type handler struct {
	agent Agent
	log   *slog.Logger
	large chan struct{} // a token per large body that is held
}

// verb answers one request whose body was read; a nil value is sent as 204.
type verb func(ctx context.Context, r *http.Request, body []byte) (any, error)

func (h *handler) attach(ctx context.Context, r *http.Request, body []byte) (any, error) {
	key, err := keyOf(r)
	if err != nil {
		return nil, err
	}
	var a attach.Attachment
	if err := json.Unmarshal(body, &a); err != nil {
		return nil, &Error{Code: CodeDecodingFailure, Msg: "malformed attachment", Details: err.Error()}
	}
	if a.Key != key {
		return nil, Errorf(CodeDecodingFailure, "attachment %q in the body is not %q of the path", a.Key, key)
	}
	if err := a.Validate(); err != nil {
		return nil, &Error{Code: CodeInvalidNetworkConfig, Msg: fmt.Sprintf("invalid attachment %s", key), Details: err.Error()}
	}
	return nil, h.agent.Attach(ctx, a)
}

func (h *handler) check(ctx context.Context, r *http.Request, _ []byte) (any, error) {
	key, err := keyOf(r)
	if err != nil {
		return nil, err
	}
	return h.agent.Check(ctx, key)
}

func (h *handler) detach(ctx context.Context, r *http.Request, _ []byte) (any, error) {
	key, err := keyOf(r)
	if err != nil {
		return nil, err
	}
	return nil, h.agent.Detach(ctx, key)
}

func (h *handler) gc(ctx context.Context, _ *http.Request, body []byte) (any, error) {
	var req gcRequest
	if err := json.Unmarshal(body, &req); err != nil {
		return nil, &Error{Code: CodeDecodingFailure, Msg: "malformed gc request", Details: err.Error()}
	}
	if req.Valid == nil {
		return nil, Errorf(CodeDecodingFailure, "gc request without a list of valid attachments")
	}
	if req.Network == "" {
		return nil, Errorf(CodeInvalidNetworkConfig, "gc request without a network")
	}
	return nil, h.agent.GC(ctx, req.Network, *req.Valid)
}

func (h *handler) status(ctx context.Context, _ *http.Request, _ []byte) (any, error) {
	err := h.agent.Status(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, &Error{Code: CodeNotAvailable, Msg: "podwalld did not answer in time", Details: err.Error()}
	}
	return nil, err
}

// keyOf reads and validates the key in the path. It comes from CNI_CONTAINERID and CNI_IFNAME, hence the code.
func keyOf(r *http.Request) (attach.Key, error) {
	key := attach.Key{ContainerID: r.PathValue("containerID"), IfName: r.PathValue("ifname")}
	if err := key.Validate(); err != nil {
		return key, &Error{Code: CodeInvalidEnvironment, Msg: "invalid CNI_CONTAINERID or CNI_IFNAME", Details: err.Error()}
	}
	return key, nil
}

// timeout says how long a request may take.
type timeout func(r *http.Request) (time.Duration, error)

func fixed(d time.Duration) timeout {
	return func(*http.Request) (time.Duration, error) { return d, nil }
}

// attachTimeout reads ?timeout=: how long the caller of PUT waits.
func attachTimeout(r *http.Request) (time.Duration, error) {
	s := r.URL.Query().Get("timeout")
	if s == "" {
		return DefaultAttachTimeout, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, Errorf(CodeDecodingFailure, "timeout %.80q: want a positive Go duration such as 10s", s)
	}
	return min(d, MaxAttachTimeout), nil
}

// endpoint reads the body, passes the gate, if there is one, sets the deadline, calls the verb and writes its answer.
func (h *handler) endpoint(limit timeout, g gate, f verb) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// One broken request must neither end the daemon nor leave the plugin without an answer. Nothing was written yet:
		// answers are encoded first and written last.
		defer func() {
			if p := recover(); p != nil {
				h.log.Error("request panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
				writeError(w, Errorf(CodeInternal, "podwalld panicked on %s %s: %v; its log has the stack", r.Method, r.URL.Path, p))
			}
		}()
		d, err := limit(r)
		if err != nil {
			writeError(w, err)
			return
		}
		body, release, err := h.readBody(w, r)
		defer release()
		if err != nil {
			if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
				writeJSON(w, http.StatusRequestEntityTooLarge, Errorf(CodeDecodingFailure, "request body is larger than %d bytes", tooLarge.Limit))
				return
			}
			writeError(w, err)
			return
		}
		if c := callerOf(r); c != nil && !c.heard() {
			return // it has lost its place, and will not hear an answer
		}
		if g != nil {
			leave, err := g.enter()
			if err != nil {
				writeError(w, err)
				return
			}
			defer leave()
		}
		ctx, cancel := context.WithTimeout(r.Context(), d)
		defer cancel()
		out, err := f(ctx, r, body)
		// A caller that does not take its answer must not keep the gate for as long as an ADD may last.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTimeout))
		switch {
		case err != nil:
			writeError(w, err)
		case out == nil:
			w.WriteHeader(http.StatusNoContent)
		default:
			writeJSON(w, http.StatusOK, out)
		}
	})
}

// readBody reads the whole body and then lifts the server's read deadline: while a verb runs, net/http reads ahead to notice a caller
// that goes away, and takes a read that times out for such a caller (net/http connReader.backgroundRead). What it returns is called
// when the body is not needed any more.
func (h *handler) readBody(w http.ResponseWriter, r *http.Request) ([]byte, func(), error) {
	release := func() {}
	bad := func(err error) error {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return err
		}
		return &Error{Code: CodeDecodingFailure, Msg: "cannot read request body", Details: err.Error()}
	}
	control := http.NewResponseController(w)
	stream := http.MaxBytesReader(w, r.Body, maxBody)
	body, err := io.ReadAll(io.LimitReader(stream, largeBody))
	if err != nil {
		return nil, release, bad(err)
	}
	if len(body) == largeBody {
		turn := time.NewTimer(readTimeout)
		defer turn.Stop()
		select {
		case h.large <- struct{}{}:
			release = func() { <-h.large }
		case <-turn.C:
			return nil, release, Errorf(CodeTryAgainLater, "podwalld already holds %d requests of more than %d bytes: try again later", maxLarge, largeBody)
		case <-r.Context().Done():
			return nil, release, r.Context().Err()
		}
		if err := setReadDeadline(control, time.Now().Add(readTimeout)); err != nil {
			return nil, release, err
		}
		rest, err := io.ReadAll(stream)
		if err != nil {
			return nil, release, bad(err)
		}
		body = append(body, rest...)
	}
	return body, release, setReadDeadline(control, time.Time{})
}

// setReadDeadline passes over recorders in tests, which have no connection.
func setReadDeadline(c *http.ResponseController, t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	return nil
}

func writeError(w http.ResponseWriter, err error) {
	var e *Error
	switch {
	case errors.As(err, &e):
	case errors.Is(err, context.DeadlineExceeded):
		e = &Error{Code: CodeTryAgainLater, Msg: "podwalld did not finish in time", Details: err.Error()}
	default:
		e = &Error{Code: CodeInternal, Msg: "podwalld failed", Details: err.Error()}
	}
	writeJSON(w, httpStatus(e.Code), e)
}

// writeJSON encodes before it writes, so that a value that cannot be encoded is an error and not half an answer.
func writeJSON(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		status = http.StatusInternalServerError
		data, _ = json.Marshal(&Error{Code: CodeInternal, Msg: "podwalld cannot encode its answer", Details: err.Error()})
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(data, '\n')) // a caller that has gone is not worth a word
}
