package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/ruleset"
)

var handedOver = ruleset.TableID{Family: ruleset.Inet, Name: "podwall"}

// node is a network namespace for Kernels.
func node(t *testing.T) func(own bool) *nft.Kernel {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace and loads nftables in it")
	}
	runtime.LockOSThread()
	orig, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer orig.Close()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(orig); err != nil {
		t.Fatal(err)
	}
	runtime.UnlockOSThread()
	t.Cleanup(func() { _ = ns.Close() })
	return func(own bool) *nft.Kernel {
		t.Helper()
		k, err := nft.New(nft.Config{NetNS: int(ns), Own: own})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = k.Close() })
		if own && !k.Owns() {
			t.Skip("this kernel has no flags owner and persist for tables (Linux 6.9)")
		}
		return k
	}
}

// writer is a daemon's end of a hand-over, with a table in the kernel. What it returns kills it.
func writer(t *testing.T, k *nft.Kernel, socket string) func() {
	t.Helper()
	add := ruleset.Delta{Apply: []ruleset.Op{{Kind: ruleset.AddTable, Table: handedOver}}}
	if err := k.Commit(t.Context(), add); err != nil {
		t.Fatal(err)
	}
	owner, err := k.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := agentapi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	life, end := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- agentapi.Serve(life, ln, agentapi.HandOver(life, agentapi.NewHandler(fakeAgent{}, nil, log), owner), log)
	}()
	return func() {
		t.Helper()
		if err := k.Close(); err != nil {
			t.Error(err)
		}
		end()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func owned(t *testing.T, k *nft.Kernel) bool {
	t.Helper()
	ids, err := k.Owned(t.Context(), handedOver)
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(ids, handedOver)
}

// remove is what somebody else does. It must not be called where it could succeed by chance.
func remove(t *testing.T, k *nft.Kernel) error {
	t.Helper()
	return k.Commit(t.Context(), ruleset.Delta{Apply: []ruleset.Op{{Kind: ruleset.DelTable, Table: handedOver}}})
}

// logs tells when the standby has what it asks for.
type logs struct {
	slog.Handler
	lines chan string
}

func (l logs) Handle(_ context.Context, r slog.Record) error {
	l.lines <- r.Message
	return nil
}

func (l logs) wait(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-l.lines:
		if got != want {
			t.Fatalf("logged %q, want %q", got, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("not logged: %q", want)
	}
}

func newLogs() logs {
	return logs{Handler: slog.NewTextHandler(os.Stderr, nil), lines: make(chan string, 16)}
}

// TestStandby holds that the tables are owned from the writer's start to the standby's end, also while there is no writer, and
// how they would not be without a standby.
func TestStandby(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		standby bool
	}{{"with a standby", true}, {"without", false}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			open := node(t)
			first, second, somebody := open(true), open(true), open(false)
			socket := filepath.Join(shortDir(t), "run", "s.sock")
			kill := writer(t, first, socket)
			said := newLogs()
			release := func() {}
			if tt.standby {
				release = holdOwner(t.Context(), agentapi.NewClient(socket), slog.New(said))
				said.wait(t, "holding the owner of the writer's tables")
			}
			if err := remove(t, somebody); !nft.IsPermission(err) {
				t.Fatalf("somebody else's delete while there is a writer: %v", err)
			}
			kill()
			err := remove(t, somebody)
			if !tt.standby {
				if err != nil {
					t.Errorf("nobody owns the table, but %v", err)
				}
				return
			}
			if !nft.IsPermission(err) {
				t.Fatalf("somebody else's delete while there is no writer: %v", err)
			}
			release()
			takeOver(t.Context(), second, []ruleset.TableID{handedOver}, slog.New(said))
			said.wait(t, "tables taken over")
			if !owned(t, second) {
				t.Error("the table is not the standby's")
			}
		})
	}
}

// TestStandbyThatLoses holds that a standby lets go when another one has become the writer, which waits for that.
func TestStandbyThatLoses(t *testing.T) {
	t.Parallel()
	open := node(t)
	first, winner := open(true), open(true)
	socket := filepath.Join(shortDir(t), "run", "s.sock")
	kill := writer(t, first, socket)
	said := newLogs()
	release := holdOwner(t.Context(), agentapi.NewClient(socket), slog.New(said))
	defer release()
	said.wait(t, "holding the owner of the writer's tables")
	kill()
	if _, err := winner.Own(t.Context(), handedOver); !nft.IsPermission(err) {
		t.Fatalf("Own while another standby holds it: %v", err)
	}
	takeOver(t.Context(), winner, []ruleset.TableID{handedOver}, slog.New(said))
	said.wait(t, "tables taken over")
	if !owned(t, winner) {
		t.Error("the table is not the winner's")
	}
}

// TestTakeOverInVain holds that a writer whose tables are somebody else's for good goes on to say so.
func TestTakeOverInVain(t *testing.T) {
	t.Parallel()
	open := node(t)
	first, second := open(true), open(true)
	defer writer(t, first, filepath.Join(shortDir(t), "run", "s.sock"))()
	said := newLogs()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	takeOver(ctx, second, []ruleset.TableID{handedOver}, slog.New(said))
	said.wait(t, "the tables could not be taken over yet")
}

// TestStandbyOfAnOldWriter holds that a writer that does not know the request is asked once.
func TestStandbyOfAnOldWriter(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("the socket answers root only")
	}
	socket := filepath.Join(shortDir(t), "run", "s.sock")
	ln, err := agentapi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	discard := slog.New(slog.DiscardHandler)
	go func() { done <- agentapi.Serve(ctx, ln, agentapi.NewHandler(fakeAgent{}, nil, discard), discard) }()
	defer func() { cancel(); _ = <-done }()
	said := newLogs()
	release := holdOwner(t.Context(), agentapi.NewClient(socket), slog.New(said))
	said.wait(t, "the writer does not hand over the owner of its tables: nobody owns them in the moment of the change")
	release()
}

// shortDir is a directory whose path leaves room for a socket's.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "podwalld")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
