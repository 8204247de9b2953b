package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// capabilities are those that the daemon keeps, of those that it was started with.
//
// NET_ADMIN is for netlink: nftables, connection tracking, attributes of bridges, and the events of all three. Writing below
// /run/podwall, locking there, listening, /proc/sys/net and the credentials of callers need none of root. What root may do to files of
// other users is gone; DAC_READ_SEARCH remains where files name the policies or the API server, since those may be anybody's.
func (c *config) capabilities() []uint {
	keep := []uint{unix.CAP_NET_ADMIN}
	if c.manifests != "" || c.kubeconfig != "" {
		keep = append(keep, unix.CAP_DAC_READ_SEARCH)
	}
	return keep
}

// capSets are a thread's capabilities as capset(2) takes them, for version 3 of its header.
type capSets [2]unix.CapUserData

func capBit(c uint) (int, uint32) { return int(c / 32), 1 << (c % 32) } //nolint:gosec // there are 64 at most

// dropPrivileges takes everything but these capabilities from all threads, for good: from the effective, permitted and inheritable sets,
// the ambient set and, where the process may change it, the bounding set; no program that it would execute could get them back.
func dropPrivileges(keep []uint, log *slog.Logger) error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var now, next capSets
	if err := unix.Capget(&head, &now[0]); err != nil {
		return fmt.Errorf("read this process's capabilities: %w", err)
	}
	for _, c := range keep {
		i, bit := capBit(c)
		next[i].Permitted |= now[i].Permitted & bit
		next[i].Effective |= now[i].Permitted & bit
	}
	if i, bit := capBit(unix.CAP_NET_ADMIN); now[i].Permitted&bit == 0 {
		return errors.New("podwalld lacks CAP_NET_ADMIN: run it as root, or with NET_ADMIN among the container's added capabilities")
	}
	// The kernel looks at each thread's own, and Go's threads come and go.
	prctl := func(what string, option, a2, a3 uintptr) error {
		if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, option, a2, a3, 0, 0, 0); errno != 0 {
			return fmt.Errorf("%s: %w", what, errno)
		}
		return nil
	}
	err := prctl("promise not to gain privileges", unix.PR_SET_NO_NEW_PRIVS, 1, 0)
	if errors.Is(err, unix.ENOTSUP) {
		// Threads that C has made are not known to Go (syscall.AllThreadsSyscall). Releases are built without cgo.
		log.Warn("this podwalld was built with cgo and keeps the capabilities that it was started with")
		return nil
	}
	if err != nil {
		return err
	}
	// The bounding set goes first: lowering it takes CAP_SETPCAP (capabilities(7)). A container that was not given it has a runtime
	// that has set the bounding set itself.
	if i, bit := capBit(unix.CAP_SETPCAP); now[i].Effective&bit != 0 {
		last, err := lastCap()
		if err != nil {
			return err
		}
		for c := range last + 1 {
			if i, bit := capBit(c); next[i].Permitted&bit != 0 {
				continue
			}
			if err := prctl(fmt.Sprintf("lower the bounding set by capability %d", c), unix.PR_CAPBSET_DROP, uintptr(c), 0); err != nil {
				return err
			}
		}
	}
	if err := prctl("clear the ambient capabilities", unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil {
		return err
	}
	// Not by a closure: these must be pointers until the call (unsafe.Pointer, rule 4).
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&next[0])), 0); errno != 0 {
		return fmt.Errorf("drop capabilities: %w", errno)
	}
	log.Info("privileges dropped", "capabilities", next.String())
	return nil
}

// lastCap is the highest capability that the kernel knows.
func lastCap() (uint, error) {
	text, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return 0, fmt.Errorf("find out which capabilities there are: %w", err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 6)
	if err != nil {
		return 0, fmt.Errorf("find out which capabilities there are: %w", err)
	}
	return uint(n), nil
}

// String returns the permitted set as /proc/PID/status shows it.
func (s capSets) String() string { return fmt.Sprintf("%08x%08x", s[1].Permitted, s[0].Permitted) }
