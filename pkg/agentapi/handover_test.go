package agentapi

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// rawSocket is a netlink socket, or anything else with a descriptor.
func rawSocket(t *testing.T, protocol int) *os.File {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, protocol)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func port(t *testing.T, f *os.File) uint32 {
	t.Helper()
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var pid uint32
	if err := raw.Control(func(fd uintptr) {
		if sa, err := syscall.Getsockname(int(fd)); err == nil {
			pid = sa.(*syscall.SockaddrNetlink).Pid
		}
	}); err != nil || pid == 0 {
		t.Fatal(pid, err)
	}
	return pid
}

// handOver answers with f.
func handOver(ctx context.Context, t *testing.T, f *os.File) http.Handler {
	t.Helper()
	conn, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return HandOver(ctx, quiet(&fakeAgent{}, nil), conn)
}

// TestHandOver holds that the very socket is passed, that it outlives the giver's copy, that the taker hears of the giver's end,
// and that all other requests are answered as without it.
func TestHandOver(t *testing.T) {
	t.Parallel()
	given := rawSocket(t, syscall.NETLINK_NETFILTER)
	life, end := context.WithCancel(t.Context())
	defer end()
	client := NewClient(serve(t, handOver(life, t, given)))
	owner, err := client.Owner(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := port(t, given)
	if err := given.Close(); err != nil {
		t.Fatal(err)
	}
	if got := port(t, owner.socket); got != want {
		t.Errorf("port %d, want %d", got, want)
	}
	if err := client.Status(t.Context()); err != nil {
		t.Errorf("another request: %v", err)
	}
	gone := make(chan struct{})
	go func() { owner.Wait(t.Context()); close(gone) }()
	select {
	case <-gone:
		t.Fatal("the giver is there and said to be gone")
	case <-time.After(50 * time.Millisecond):
	}
	end()
	select {
	case <-gone:
	case <-time.After(5 * time.Second):
		t.Fatal("the giver has gone and nobody is told")
	}
	if err := owner.Close(); err != nil {
		t.Error(err)
	}
	// Its number is free: nobody has the socket open any more.
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Close(fd) }()
	if err := syscall.Bind(fd, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK, Pid: want}); err != nil {
		t.Errorf("bind to its number: %v", err)
	}
}

// TestWaitEnds holds that a taker stops waiting with its context, and that the giver notices.
func TestWaitEnds(t *testing.T) {
	t.Parallel()
	client := NewClient(serve(t, handOver(t.Context(), t, rawSocket(t, syscall.NETLINK_NETFILTER))))
	owner, err := client.Owner(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	owner.Wait(ctx)
	if err := owner.Close(); err != nil {
		t.Error(err)
	}
}

// TestNoHandOver holds what is asked of a daemon that hands over nothing, or something else.
func TestNoHandOver(t *testing.T) {
	t.Parallel()
	var coded *Error
	if _, err := NewClient(serve(t, quiet(&fakeAgent{}, nil))).Owner(t.Context()); !errors.As(err, &coded) || !strings.Contains(err.Error(), "404") {
		t.Errorf("a daemon that does not know the request: %v", err)
	}
	route := NewClient(serve(t, handOver(t.Context(), t, rawSocket(t, syscall.NETLINK_ROUTE))))
	if _, err := route.Owner(t.Context()); !errors.As(err, &coded) || !strings.Contains(err.Error(), "not a socket to netfilter") {
		t.Errorf("a socket of another protocol: %v", err)
	}
	if _, err := NewClient("/nonexistent/s.sock").Owner(t.Context()); err == nil || errors.As(err, &coded) {
		t.Errorf("no daemon: %v", err)
	}
}

// TestSilentGiver holds that a daemon that accepts and says nothing, or something strange, does not hold the taker up.
func TestSilentGiver(t *testing.T) {
	t.Parallel()
	for _, says := range []string{"", "220 ready\r\n", "HTTP/1.1 200 OK\r\n\r\n"} {
		path := filepath.Join(t.TempDir(), "s")
		ln, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		accepted := make(chan net.Conn, 1)
		go func() {
			conn, err := ln.Accept()
			if err == nil {
				_, _ = io.WriteString(conn, says)
				accepted <- conn
			}
			close(accepted)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if owner, err := NewClient(path).Owner(ctx); err == nil {
			t.Errorf("%q gave %v", says, owner)
		}
		cancel()
		_ = ln.Close()
		if conn, ok := <-accepted; ok {
			_ = conn.Close()
		}
	}
}

// TestHandOverWithoutHijack holds that a connection that cannot be taken is an answer and not a panic.
func TestHandOverWithoutHijack(t *testing.T) {
	t.Parallel()
	h := HandOver(t.Context(), http.NotFoundHandler(), nil)
	if status, code := raw(t, h, http.MethodGet, ownerPath, ""); status != http.StatusInternalServerError || code != CodeInternal {
		t.Errorf("answer %d, code %d", status, code)
	}
	if status, _ := raw(t, h, http.MethodPost, ownerPath, ""); status != http.StatusNotFound {
		t.Errorf("answer %d", status)
	}
}
