package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Node is a running node.
type Node struct {
	Name string
	lab  *Lab
	pid  int
}

// Node returns a node of the running cluster.
func (l *Lab) Node(name string) (*Node, error) {
	data, err := os.ReadFile(l.pidFile(name))
	if err != nil {
		return nil, fmt.Errorf("%s does not run: start a cluster with 'up': %w", name, err)
	}
	pid, start, _ := strings.Cut(strings.TrimSpace(string(data)), " ")
	n, err := strconv.Atoi(pid)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", l.pidFile(name), err)
	}
	if now, err := startTime(n); err != nil || now != start {
		return nil, fmt.Errorf("%s has died; run 'down' to tidy up", name)
	}
	return &Node{Name: name, lab: l, pid: n}, nil
}

func (l *Lab) pidFile(name string) string { return filepath.Join(l.run(), name+".pid") }

// startTime tells a process from a later one with its number (field 22 of proc_pid_stat(5)).
func startTime(pid int) (string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return "", errors.New("ended")
	}
	return fields[19], nil
}

// nodeIP is the address of a node on the link between the nodes.
func nodeIP(name string) string { return "10.99.0." + strings.TrimPrefix(name, "node") }

// IP is the node's address.
func (n *Node) IP() string { return nodeIP(n.Name) }

func podCIDR(name string) string {
	i, _ := strconv.Atoi(strings.TrimPrefix(name, "node"))
	return fmt.Sprintf("10.244.%d.0/24", i-1)
}

// Path is where this machine finds a file of the node.
func (n *Node) Path(path string) string { return fmt.Sprintf("/proc/%d/root%s", n.pid, path) }

// Command returns a command that runs inside the node: its network, mounts, processes.
func (n *Node) Command(ctx context.Context, args ...string) *exec.Cmd {
	return n.nsenter(ctx, []string{"--net", "--mount", "--pid", "--uts", "--ipc", "--wd=/"}, args)
}

// NetCommand returns a command that runs in the node's network, with the machine's files.
func (n *Node) NetCommand(ctx context.Context, args ...string) *exec.Cmd {
	return n.nsenter(ctx, []string{"--net"}, args)
}

func (n *Node) nsenter(ctx context.Context, namespaces, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append(append([]string{"--target", strconv.Itoa(n.pid)}, namespaces...), append([]string{"--"}, args...)...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+n.lab.Kubeconfig(),
		"PATH="+n.lab.Bin()+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME="+n.lab.run()) // where kubectl keeps its cache
	return cmd
}

// Run runs a command inside the node and returns what it printed.
func (n *Node) Run(ctx context.Context, args ...string) (string, error) {
	out, err := n.Command(ctx, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s: %s: %w\n%s", n.Name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// In calls f on a thread that is in the node's network namespace: sockets that f opens stay there.
func (n *Node) In(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", n.pid))
		if err != nil {
			done <- err
			return
		}
		defer func() { _ = ns.Close() }()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the network of %s: %w", n.Name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// Dial connects from the node. The address must be an IP: Go's fallback dialing would leave the thread.
func (n *Node) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var conn net.Conn
	err := n.In(func() error {
		var err error
		conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Start starts a component in the background. Its output goes to a log of its name, and it ends with the node.
func (n *Node) Start(ctx context.Context, name string, args ...string) error {
	log, err := os.OpenFile(filepath.Join(n.lab.Logs(), n.Name+"-"+name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644) //nolint:gosec // a log
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	// The component becomes a child of the node's process 1. A waiting nsenter would stop itself when the component is stopped.
	const script = `setsid "$@" & echo $! >/run/lab/"$0".pid`
	cmd := n.Command(ctx, append([]string{"sh", "-c", script, name}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("start %s on %s: %w", name, n.Name, err)
	}
	return nil
}

// Signal sends a signal to a component; the empty signal "0" asks whether it runs.
func (n *Node) Signal(ctx context.Context, name, signal string) error {
	_, err := n.Run(ctx, "sh", "-c", `kill -"$1" "$(cat /run/lab/"$0".pid)"`, name, signal)
	return err
}

// Stop ends a component and waits until it has.
func (n *Node) Stop(ctx context.Context, name string) error {
	if err := n.Signal(ctx, name, "TERM"); err != nil {
		return err
	}
	for begin := time.Now(); n.Signal(ctx, name, "0") == nil; time.Sleep(100 * time.Millisecond) {
		if time.Since(begin) > 15*time.Second {
			if err := n.Signal(ctx, name, "KILL"); err != nil {
				return nil //nolint:nilerr // it has ended meanwhile
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}
