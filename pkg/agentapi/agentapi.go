// Package agentapi is the contract of the daemon's unix socket: paths, bodies, errors, the plugin's client and the daemon's handler.
//
// The protocol is HTTP/1.1 with JSON bodies, versioned by path and additive only: during an upgrade old plugins meet new daemons and
// the reverse, so both sides ignore fields that they do not know.
package agentapi

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/podwall/podwall/pkg/attach"
)

// DefaultSocket is where the daemon listens and the plugin dials unless they are told otherwise.
const DefaultSocket = "/run/podwall/podwall.sock"

// How long requests may take. MaxAttachTimeout caps what the caller of PUT asks for.
const (
	DefaultAttachTimeout = 10 * time.Second
	MaxAttachTimeout     = 60 * time.Second
	gcTimeout            = 10 * time.Second
	viewTimeout          = 10 * time.Second
	requestTimeout       = 2 * time.Second
)

// maxBody limits request bodies, and error bodies on the client's side.
const maxBody = 1 << 20

// Codes of the CNI SPEC ("Error"); 100 and up are podwall's own.
const (
	CodeInvalidEnvironment   uint = 4
	CodeDecodingFailure      uint = 6
	CodeInvalidNetworkConfig uint = 7
	CodeInvalidNetns         uint = 8
	CodeTryAgainLater        uint = 11
	CodeNotAvailable         uint = 50
	CodeRefused              uint = 100 // the daemon or the kernel said no
	CodeNoHostLink           uint = 101 // the interface has no host side that netfilter could see
	CodeVersionMismatch      uint = 102 // the other side does not know this request
	CodeInternal             uint = 999
)

// Error is a CNI error: the body of every answer that is not a success.
type Error struct {
	Code    uint   `json:"code"`
	Msg     string `json:"msg"`
	Details string `json:"details,omitempty"`
}

// Error returns the message and, after a semicolon, the details.
func (e *Error) Error() string {
	if e.Details == "" {
		return e.Msg
	}
	return e.Msg + "; " + e.Details
}

// Errorf returns an Error without details.
func Errorf(code uint, format string, args ...any) *Error {
	return &Error{Code: code, Msg: fmt.Sprintf(format, args...)}
}

// Agent is what can be asked over the socket; the daemon implements it and so does Client.
// An error that is (or wraps) an *Error keeps its code; a deadline that passed becomes code 11 (50 from Status), anything else 999.
type Agent interface {
	// Attach returns nil once the attachment is enforced in the kernel. It is idempotent.
	Attach(ctx context.Context, a attach.Attachment) error
	// Detach forgets an attachment; an unknown one is no error.
	Detach(ctx context.Context, key attach.Key) error
	// Check returns the attachment as it is enforced.
	Check(ctx context.Context, key attach.Key) (attach.Attachment, error)
	// GC forgets the attachments of the network that are not listed.
	GC(ctx context.Context, network string, valid []attach.Key) error
	// Status returns nil if an ADD could be served now.
	Status(ctx context.Context) error
}

// View answers an operator's GET with a value that is sent as JSON.
type View func(ctx context.Context, query url.Values) (any, error)

// gcRequest is the body of POST /v1/gc. Valid is a pointer because a forgotten list must not read as "nothing is valid".
type gcRequest struct {
	Network string        `json:"network"`
	Valid   *[]attach.Key `json:"valid"`
}

// attachmentPath returns the path of one attachment. Interface names may hold any byte but a slash, a colon and white space.
func attachmentPath(key attach.Key) string {
	return "/v1/attachments/" + url.PathEscape(key.ContainerID) + "/" + url.PathEscape(key.IfName)
}

// httpStatus gives the status that goes with a code, for readers of HTTP logs: clients look at the code.
func httpStatus(code uint) int {
	switch code {
	case CodeInvalidEnvironment, CodeDecodingFailure, CodeInvalidNetworkConfig, CodeInvalidNetns, CodeNoHostLink:
		return http.StatusBadRequest
	case CodeRefused:
		return http.StatusForbidden
	case CodeTryAgainLater, CodeNotAvailable:
		return http.StatusServiceUnavailable
	case CodeVersionMismatch:
		return http.StatusNotImplemented
	default:
		return http.StatusInternalServerError
	}
}
