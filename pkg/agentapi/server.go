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
	"syscall"
	"time"
)

const (
	readHeaderTimeout = 2 * time.Second
	readTimeout       = 5 * time.Second
	answerTimeout     = 5 * time.Second // for the caller to take its answer
	drainTimeout      = 10 * time.Second
	maxHeaderBytes    = 16 << 10
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
// Callers that connect and say nothing, or say it slowly, are bounded in number and time and do not keep others waiting.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	srv := newServer(h, log)
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(newLimitListener(ln, maxSilent, silentGrace)) }()
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
		WriteTimeout:      MaxAttachTimeout + 2*answerTimeout,
		IdleTimeout:       readHeaderTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		ConnState: follow,
	}
	// The plugin lives for one request.
	srv.SetKeepAlivesEnabled(false)
	return srv
}

// requireRoot is defence in depth: the modes of directory and socket should have kept others out.
func requireRoot(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c := callerOf(r); c == nil || c.uid != 0 {
			writeError(w, Errorf(CodeRefused, "the caller of podwalld's socket must be root"))
			return
		}
		h.ServeHTTP(w, r)
	})
}
