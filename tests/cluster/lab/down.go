package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// traces are what a cluster could leave on the machine.
type traces struct {
	Mounts  []string          `json:"mounts"`
	Sysctls map[string]string `json:"sysctls"`
}

func look() (traces, error) {
	t := traces{Sysctls: map[string]string{}}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return t, err
	}
	t.Mounts = strings.Split(strings.TrimSpace(string(mounts)), "\n")
	for name := range shadowed {
		if value, err := os.ReadFile("/proc/sys/" + name); err == nil {
			t.Sysctls[name] = strings.TrimSpace(string(value))
		}
	}
	return t, nil
}

func (l *Lab) tracesFile() string { return filepath.Join(l.run(), "machine.json") }

func (l *Lab) recordTraces() error {
	t, err := look()
	if err != nil {
		return err
	}
	data, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return os.WriteFile(l.tracesFile(), data, 0o600)
}

// Down ends the cluster and fails if anything of it is left on the machine: processes, cgroups, mounts, sysctls.
// Nothing to end is a success.
func (l *Lab) Down(ctx context.Context) error {
	before, err := os.ReadFile(l.tracesFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var want traces
	if err := json.Unmarshal(before, &want); err != nil {
		return fmt.Errorf("read %s: %w", l.tracesFile(), err)
	}
	namespaces := map[string]string{}
	for _, name := range []string{"node1", "node2"} {
		n, err := l.Node(name)
		if err != nil {
			continue // never started, or dead and everything in it with it
		}
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", n.pid)); err == nil {
			namespaces[ns] = name
		}
		// The kernel ends every process of a pid namespace with its process 1.
		if err := unix.Kill(n.pid, unix.SIGKILL); err != nil {
			return fmt.Errorf("end %s: %w", name, err)
		}
	}
	for begin := time.Now(); ; {
		now, err := look()
		if err != nil {
			return err
		}
		left := slices.Concat(processesIn(namespaces), removeCgroups(), want.changed(now))
		if len(left) == 0 {
			return os.Remove(l.tracesFile())
		}
		if ctx.Err() != nil || time.Since(begin) > 20*time.Second {
			return fmt.Errorf("the cluster has left traces on this machine:\n  %s", strings.Join(left, "\n  "))
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// changed tells what is not as it was.
func (t traces) changed(now traces) []string {
	var list []string
	// Others may mount things meanwhile: only what mentions the nodes' directories is the cluster's.
	for _, m := range now.Mounts {
		ours := strings.Contains(m, "/run/lab") || strings.Contains(m, "/kubelet/") || strings.Contains(m, "/containerd/")
		if ours && !slices.Contains(t.Mounts, m) {
			list = append(list, "mount "+m)
		}
	}
	for name, value := range t.Sysctls {
		if now.Sysctls[name] != value {
			list = append(list, fmt.Sprintf("sysctl %s was %s and is %s", name, value, now.Sysctls[name]))
		}
	}
	return list
}

func processesIn(namespaces map[string]string) []string {
	if len(namespaces) == 0 {
		return nil
	}
	links, err := filepath.Glob("/proc/[0-9]*/ns/pid")
	if err != nil {
		return []string{err.Error()}
	}
	var list []string
	for _, link := range links {
		if ns, err := os.Readlink(link); err == nil && namespaces[ns] != "" {
			list = append(list, "process "+strings.Split(link, "/")[2]+" of "+namespaces[ns])
		}
	}
	return list
}

// removeCgroups removes the nodes' directories from every hierarchy and returns what would not go.
func removeCgroups() []string {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return []string{err.Error()}
	}
	defer func() { _ = f.Close() }()
	var left []string
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 3 || !strings.HasPrefix(fields[2], "cgroup") {
			continue
		}
		for _, name := range []string{"node1", "node2"} {
			root := filepath.Join(fields[1], cgroup(name))
			var dirs []string
			_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			for _, dir := range slices.Backward(dirs) { // children first
				if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
					left = append(left, fmt.Sprintf("cgroup %s: %v", dir, err))
				}
			}
		}
	}
	return left
}
