package agentapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	readHeaderTimeout = 2 * time.Second
	readTimeout       = 5 * time.Second
	drainTimeout      = 10 * time.Second
	maxHeaderBytes    = 16 << 10
	maxConns          = 256
)

// maxSunPath is the size of sockaddr_un.sun_path less the terminating zero (unix(7)).
const maxSunPath = 107

// Listen binds the socket with mode 0600 in a directory that only root can write, creating it (0700) if need be. It binds under a temporary
// name and renames, and closing the listener does not remove the path: during a rolling update the next daemon's socket replaces this one
// without a moment in which there is none, and this daemon's end does not take the next one's away.
func Listen(path string) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("listen on socket %q: the path must be absolute", path)
	}
	dir := filepath.Dir(path)
	tmp := filepath.Join(dir, fmt.Sprintf(".%08x", rand.Uint32()))
	if n := max(len(path), len(tmp)); n > maxSunPath {
		return nil, fmt.Errorf("listen on socket %s: its path needs %d bytes and a unix socket's path holds %d; choose a shorter one", path, n, maxSunPath)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create the socket's directory: %w", err)
	}
	if err := checkDir(dir); err != nil {
		return nil, fmt.Errorf("listen on socket %s: %w", path, err)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() != os.ModeSocket {
		return nil, fmt.Errorf("listen on socket %s: something that is not a socket is there (%s); remove it", path, fi.Mode())
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on socket %s: %w", path, err)
	}
	ln.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on socket %s: %w", path, errors.Join(err, ln.Close(), os.Remove(tmp)))
	}
	return ln, nil
}

// checkDir refuses a directory in which somebody else could replace the socket.
func checkDir(dir string) error {
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || st.Uid != 0 {
		return fmt.Errorf("directory %s is not owned by root: chown it or choose another", dir)
	}
	if fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("directory %s has mode %04o, others than root can write it: chmod it to 0700 or choose another", dir, fi.Mode().Perm())
	}
	return nil
}

// Serve answers root's requests on a listener made by Listen until ctx ends, then lets the running ones finish for up to 10 s.
// At most 256 connections are served at once; more of them wait in the kernel's backlog for as long as their callers care.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	srv := newServer(h, log)
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(newLimitListener(ln, maxConns)) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve socket: %w", err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	err := srv.Shutdown(drain)
	if err != nil {
		err = fmt.Errorf("drain socket: requests that still ran were cut: %w", errors.Join(err, srv.Close()))
	}
	_ = <-failed
	return err
}

func newServer(h http.Handler, log *slog.Logger) *http.Server {
	srv := &http.Server{
		Handler:           requireRoot(h),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      MaxAttachTimeout + 10*time.Second,
		IdleTimeout:       readHeaderTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, peerUID(c))
		},
	}
	// The plugin lives for one request.
	srv.SetKeepAlivesEnabled(false)
	return srv
}

// peerKey is the context key of the peer's uid.
type peerKey struct{}

// unknownUID stands for a peer whose credentials cannot be read.
const unknownUID = ^uint32(0)

// peerUID asks the kernel who connected (SO_PEERCRED, unix(7)).
func peerUID(c net.Conn) uint32 {
	if l, ok := c.(*limitConn); ok {
		c = l.Conn
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return unknownUID
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return unknownUID
	}
	uid := unknownUID
	if err := raw.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	}); err != nil {
		return unknownUID
	}
	return uid
}

// requireRoot is defence in depth: the modes of directory and socket should have kept others out.
func requireRoot(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if uid, ok := r.Context().Value(peerKey{}).(uint32); !ok || uid != 0 {
			writeError(w, Errorf(CodeRefused, "the caller of podwalld's socket must be root"))
			return
		}
		h.ServeHTTP(w, r)
	})
}

// limitListener hands out at most cap(slots) connections at a time.
type limitListener struct {
	net.Listener
	slots     chan struct{}
	done      chan struct{}
	closeOnce func() error
}

func newLimitListener(ln net.Listener, n int) *limitListener {
	l := &limitListener{Listener: ln, slots: make(chan struct{}, n), done: make(chan struct{})}
	l.closeOnce = sync.OnceValue(func() error {
		close(l.done)
		return ln.Close()
	})
	return l
}

// Accept waits for a free slot and then for a connection.
func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

// Close also wakes an Accept that waits for a slot.
func (l *limitListener) Close() error { return l.closeOnce() }

// limitConn gives its slot back when it closes.
type limitConn struct {
	net.Conn
	release func()
}

func (c *limitConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
