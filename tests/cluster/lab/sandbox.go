package lab

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// shadowed are machine-wide sysctls that the kubelet sets, with the values it wants to see: it meets files instead.
var shadowed = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// Sandbox is the life of a node's process 1, in fresh namespaces: it makes the node's filesystem private, says on stdout that
// it has, and reaps processes until it is killed, which ends all of the node.
func Sandbox(dir, name string) error {
	if os.Getpid() != 1 {
		return errors.New("sandbox: not process 1 of a pid namespace")
	}
	if err := (&sandbox{dir: dir, name: name}).build(); err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	children := make(chan os.Signal, 16)
	signal.Notify(children, unix.SIGCHLD)
	fmt.Println("ready")
	for range children {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if pid <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}

type sandbox struct{ dir, name string }

// layered are host directories that the node may write to without leaving a trace; the upper layers are in memory.
var layered = []string{"/etc", "/opt", "/var"}

// inMemory must not lie on an overlay: containerd's own overlays, the kubelet's bind mounts and etcd's mmap want a plain filesystem.
var inMemory = []string{
	"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/etcd", "/var/lib/cni", "/var/log/pods", "/var/log/containers",
}

func (s *sandbox) build() error {
	if err := unix.Sethostname([]byte(s.name)); err != nil {
		return err
	}
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// The lab's directory may lie below one that is about to be covered.
	lab, err := os.OpenFile(s.dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = lab.Close() }()
	if err := mount("tmpfs", "/run", "tmpfs", "mode=755"); err != nil {
		return err
	}
	if err := mount("tmpfs", "/tmp", "tmpfs", "mode=1777"); err != nil {
		return err
	}
	for _, dir := range layered {
		upper, work := "/run/lab"+dir, "/run/lab"+dir+".work"
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil { //nolint:gosec // a root filesystem
			return err
		}
		if err := mount("overlay", dir, "overlay", "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
			return err
		}
	}
	for _, dir := range inMemory {
		if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // a root filesystem
			return err
		}
		if err := mount("tmpfs", dir, "tmpfs", "mode=755"); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil { //nolint:gosec // a root filesystem
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", lab.Fd()), s.dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s: %w", s.dir, err)
	}
	if err := mount("proc", "/proc", "proc", ""); err != nil {
		return err
	}
	if err := mount("sysfs", "/sys", "sysfs", ""); err != nil {
		return err
	}
	if err := s.cgroups(hierarchies); err != nil {
		return err
	}
	if err := s.etc(); err != nil {
		return err
	}
	if err := s.sysctls(); err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

func (s *sandbox) etc() error {
	for path, content := range map[string]string{
		"/etc/resolv.conf": "nameserver 10.96.0.10\n",
		"/etc/hosts":       "127.0.0.1 localhost\n" + nodeIP("node1") + " node1\n" + nodeIP("node2") + " node2\n",
	} {
		if err := os.RemoveAll(path); err != nil { // it may be a link out of /etc
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil { //nolint:gosec // public files
			return err
		}
	}
	// The machine's own CNI configuration and manifests are not the node's.
	for _, dir := range []string{"/etc/cni/net.d", "/opt/cni/bin", "/etc/kubernetes/manifests"} {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil { //nolint:gosec // a root filesystem
			return err
		}
	}
	if err := os.CopyFS("/opt/cni/bin", os.DirFS(filepath.Join(s.dir, "cni"))); err != nil {
		return err
	}
	conflist, err := os.ReadFile(filepath.Join(s.dir, "run", s.name+".conflist"))
	if err != nil {
		return err
	}
	return os.WriteFile("/etc/cni/net.d/10-pods.conflist", conflist, 0o644) //nolint:gosec // as CNI plugins write it
}

func (s *sandbox) cgroups(hierarchies []string) error {
	if len(hierarchies) == 0 {
		return errors.Join(mount("cgroup2", "/sys/fs/cgroup", "cgroup2", ""), os.MkdirAll("/sys/fs/cgroup/"+cgroup(s.name), 0o755)) //nolint:gosec // cgroupfs
	}
	if err := mount("tmpfs", "/sys/fs/cgroup", "tmpfs", "mode=755"); err != nil {
		return err
	}
	for _, h := range hierarchies {
		root := "/sys/fs/cgroup/" + strings.TrimPrefix(h, "name=")
		if err := os.Mkdir(root, 0o755); err != nil { //nolint:gosec // cgroupfs
			return err
		}
		options := h
		if strings.HasPrefix(h, "name=") {
			options = "none," + h
		}
		if err := mount("cgroup", root, "cgroup", options); err != nil {
			return err
		}
		// Where controllers are mounted together, programs look for each by its name.
		if names := strings.Split(h, ","); len(names) > 1 {
			for _, name := range names {
				if err := os.Symlink(h, "/sys/fs/cgroup/"+name); err != nil {
					return err
				}
			}
		}
		own := filepath.Join(root, cgroup(s.name))
		if err := os.MkdirAll(own, 0o755); err != nil { //nolint:gosec // cgroupfs
			return err
		}
		if slices.Contains(strings.Split(h, ","), "cpuset") { // empty in a new directory, and nothing can run there until it is set
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				all, err := os.ReadFile(filepath.Join(root, file))
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(own, file), all, 0o644); err != nil { //nolint:gosec // cgroupfs
					return err
				}
			}
		}
	}
	return nil
}

// cgroupHierarchies returns the controllers of each version 1 hierarchy; none means that the machine uses version 2.
func cgroupHierarchies() ([]string, error) {
	f, err := os.Open("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	var list []string
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.SplitN(s.Text(), ":", 3)
		if len(fields) == 3 && fields[1] != "" {
			list = append(list, fields[1])
		}
	}
	if len(list) == 1 && strings.HasPrefix(list[0], "name=") { // systemd's own beside version 2
		return nil, nil
	}
	return list, nil
}

func (s *sandbox) sysctls() error {
	if err := os.MkdirAll("/run/lab/sysctl", 0o755); err != nil { //nolint:gosec // a root filesystem
		return err
	}
	for name, value := range shadowed {
		file := "/run/lab/sysctl/" + strings.ReplaceAll(name, "/", ".")
		if _, err := os.Stat("/proc/sys/" + name); err != nil {
			continue
		}
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil { //nolint:gosec // a sysctl's mode
			return err
		}
		if err := unix.Mount(file, "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("shadow sysctl %s: %w", name, err)
		}
	}
	for name, value := range map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"} {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil { //nolint:gosec // a sysctl
			return err
		}
	}
	return nil
}

func mount(source, target, fstype, options string) error {
	if err := unix.Mount(source, target, fstype, 0, options); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fstype, target, err)
	}
	return nil
}

// cgroup is the name of a node's directory in every hierarchy.
func cgroup(node string) string { return "podwall-lab-" + node }

// newSandbox returns the command that becomes a node's process 1. When bound is set the node dies with the calling thread.
func newSandbox(dir, name string, bound bool) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "sandbox", dir, name)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Setsid:     true,
	}
	if bound {
		cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	}
	return cmd
}
