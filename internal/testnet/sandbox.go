// Package testnet lays nodes out of network namespaces, adds pods to them with cnitool and judges at the receiver who reaches whom.
package testnet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// sandboxEnv marks the process that runs inside the sandbox.
const sandboxEnv = "PODWALL_TESTNET_SANDBOX"

// stopGrace is how long an interrupted sandbox may take to say goodbye before it is killed.
const stopGrace = 5 * time.Second

// Sandbox runs inside in a copy of this process that has network, mount, PID, UTS and IPC namespaces of its own, and returns its exit code.
// Everything the copy creates (processes, namespaces, links, rulesets, files under /run and /var/lib) exists in those namespaces only,
// so it is gone when the copy ends, however it ends: it is PID 1 of its namespace and dies with this process, also by SIGKILL.
// Call it before anything else in main or TestMain.
func Sandbox(inside func() int) int {
	if os.Getenv(sandboxEnv) != "" && os.Getpid() == 1 {
		if err := furnish(); err != nil {
			fmt.Fprintln(os.Stderr, "testnet:", err)
			return 1
		}
		return inside()
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "testnet: network namespaces need root; run this as root (sudo)")
		return 1
	}
	code, err := reexec()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testnet:", err)
		return 1
	}
	return code
}

func reexec() (int, error) {
	// The parent-death signal is tied to the thread that forks, not to the process (prctl(2)).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer signal.Stop(signals)

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), sandboxEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start sandbox: %w", err)
	}
	done := make(chan struct{})
	go func() {
		for {
			select {
			case s := <-signals:
				_ = cmd.Process.Signal(s)
				time.AfterFunc(stopGrace, func() { _ = cmd.Process.Kill() })
			case <-done:
				return
			}
		}
	}()
	err := cmd.Wait()
	close(done)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode(), nil
	case err != nil:
		return 0, fmt.Errorf("run sandbox: %w", err)
	}
	return 0, nil
}

// furnish gives the sandbox its own /proc and /sys, and empty directories where CNI, podwall and `ip netns` keep state.
func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	mounts := []struct {
		kind, target string
		optional     bool // a machine without the directory has nothing to hide there
	}{
		{kind: "proc", target: "/proc"},
		{kind: "sysfs", target: "/sys"},
		{kind: "tmpfs", target: "/run"},
		{kind: "tmpfs", target: "/var/lib"}, // and not /var/lib/cni: creating the mount point would show outside
		{kind: "tmpfs", target: "/etc/cni", optional: true},
		{kind: "tmpfs", target: "/opt/cni", optional: true},
	}
	for _, m := range mounts {
		err := unix.Mount(m.kind, m.target, m.kind, 0, "")
		if err != nil && (!m.optional || !errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.target, err)
		}
	}
	return runIP("", "link set lo up")
}
