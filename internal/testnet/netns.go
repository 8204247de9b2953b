package testnet

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
)

// runIP runs ip(8) commands, one per argument, inside a named namespace ("" is the sandbox's own).
func runIP(ns string, commands ...string) error {
	args := []string{"-batch", "-"}
	if ns != "" {
		args = append([]string{"-n", ns}, args...)
	}
	cmd := exec.Command("ip", args...)
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip in %q: %s: %w: %s", ns, strings.Join(commands, "; "), err, bytes.TrimSpace(out))
	}
	return nil
}

// command prepares a program to run inside a named namespace, with the /sys of that namespace as on a real node:
// `ip netns exec` mounts it and then becomes the program, so that signals reach the program itself.
func command(ctx context.Context, ns string, argv ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", ns}, argv...)...)
}

// newNS creates a named namespace with lo up and IPv6 addresses usable at once.
func newNS(name string) (netns.NsHandle, error) {
	type result struct {
		handle netns.NsHandle
		err    error
	}
	// NewNamed moves its thread into the new namespace. A goroutine that ends locked takes the thread with it.
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		h, err := netns.NewNamed(name)
		if err == nil {
			// Waiting for duplicate address detection would cost a second per pod and tell nothing about policies.
			for _, dev := range []string{"all", "default"} {
				err = cmpErr(err, writeSysctl("net/ipv6/conf/"+dev+"/accept_dad", "0"))
			}
		}
		done <- result{h, err}
	}()
	r := <-done
	if r.err != nil {
		return r.handle, fmt.Errorf("create network namespace %s: %w", name, r.err)
	}
	return r.handle, runIP(name, "link set lo up")
}

func cmpErr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

func writeSysctl(name, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644); err != nil {
		return fmt.Errorf("set sysctl %s: %w", name, err)
	}
	return nil
}

// inNS runs f on a thread inside the namespace. Sockets that f opens stay in it; goroutines that f starts do not run there.
func inNS(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, so it cannot carry the namespace elsewhere
		if err := netns.Set(ns); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}
