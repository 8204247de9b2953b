package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

const (
	kubernetesVersion = "v1.36.3"
	containerdVersion = "v2.4.2"
)

// part is a Go module of the parts directory and what is built of it.
type part struct {
	name     string
	ldflags  string
	tags     string
	packages []string
	out      func(*Lab) string
	outputs  []string // names, in the order of packages
	renamed  [2]string
	test     string // package to compile into a test binary, name given by testOut
	testOut  string
}

func parts() []part {
	stamp := []string{"-s -w"}
	for _, p := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		stamp = append(stamp, fmt.Sprintf("-X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=1 -X %[1]s.gitMinor=%[3]s -X %[1]s.gitTreeState=clean -X %[1]s.buildDate=2026-01-01T00:00:00Z",
			p, kubernetesVersion, strings.Split(kubernetesVersion, ".")[1]))
	}
	const (
		kubernetes = "k8s.io/kubernetes/cmd/"
		containerd = "github.com/containerd/containerd/v2/cmd/"
		plugins    = "github.com/containernetworking/plugins/plugins/"
	)
	return []part{
		{
			name: "cni", ldflags: "-s -w", out: (*Lab).cniBin,
			packages: []string{plugins + "main/bridge", plugins + "main/ptp", plugins + "main/loopback", plugins + "ipam/host-local", plugins + "meta/portmap"},
			outputs:  []string{"bridge", "ptp", "loopback", "host-local", "portmap"},
		},
		{
			name: "containerd", ldflags: "-s -w -X github.com/containerd/containerd/v2/version.Version=" + containerdVersion,
			tags: "no_btrfs,no_zfs,no_aufs,no_devmapper", out: (*Lab).Bin,
			packages: []string{containerd + "containerd", containerd + "containerd-shim-runc-v2", containerd + "ctr"},
			outputs:  []string{"containerd", "containerd-shim-runc-v2", "ctr"},
		},
		{
			name: "kubernetes", ldflags: strings.Join(stamp, " "), out: (*Lab).Bin,
			packages: []string{
				kubernetes + "kube-apiserver", kubernetes + "kube-controller-manager", kubernetes + "kube-scheduler", kubernetes + "kubelet",
				kubernetes + "kube-proxy", kubernetes + "kubectl", "k8s.io/kubernetes/test/images/agnhost",
				"github.com/onsi/ginkgo/v2/ginkgo", "go.etcd.io/etcd/server/v3",
			},
			outputs: []string{
				"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl", "agnhost", "ginkgo", "etcd",
			},
			renamed: [2]string{"server", "etcd"},
			test:    "./netpol", testOut: "netpol.test",
		},
	}
}

// Build makes every program and image of the cluster that is not there yet: minutes when nothing is, else a second.
func (l *Lab) Build(ctx context.Context) error {
	start := time.Now()
	for _, p := range parts() {
		if err := l.buildPart(ctx, p, start); err != nil {
			return fmt.Errorf("build %s: %w", p.name, err)
		}
	}
	if err := l.fetchRunc(ctx); err != nil {
		return err
	}
	if err := l.buildImages(ctx); err != nil {
		return err
	}
	l.progress(start, "everything is built in %s", l.Dir)
	return nil
}

func (l *Lab) partDir(p part) string {
	return filepath.Join(l.Repo, "tests/cluster/parts", p.name)
}

func (l *Lab) buildPart(ctx context.Context, p part, start time.Time) error {
	dir, out := l.partDir(p), p.out(l)
	stamp := filepath.Join(l.Dir, p.name+".built")
	want, err := fingerprint(dir, runtime.Version(), fmt.Sprint(p.ldflags, p.tags, p.packages, p.test))
	if err != nil {
		return err
	}
	outputs := p.outputs
	if p.test != "" {
		outputs = append(slices.Clone(outputs), p.testOut)
	}
	if have, _ := os.ReadFile(stamp); string(have) == want && allExist(out, outputs) {
		return nil
	}
	args := []string{"build", "-v", "-buildvcs=false", "-mod=readonly", "-trimpath", "-ldflags", p.ldflags, "-tags", p.tags, "-o", out + "/"}
	if err := l.goTool(ctx, dir, p.name, start, append(args, p.packages...)...); err != nil {
		return err
	}
	if p.renamed[0] != "" {
		if err := os.Rename(filepath.Join(out, p.renamed[0]), filepath.Join(out, p.renamed[1])); err != nil {
			return err
		}
	}
	if p.test != "" {
		err := l.goTool(ctx, dir, p.name+" tests", start, "test", "-c", "-v", "-buildvcs=false", "-mod=readonly", "-trimpath", "-vet=off",
			"-ldflags", p.ldflags, "-o", filepath.Join(out, p.testOut), p.test)
		if err != nil {
			return err
		}
	}
	return os.WriteFile(stamp, []byte(want), 0o644) //nolint:gosec // build output
}

// goTool runs the go command and prints every few seconds how many packages it has compiled so far.
func (l *Lab) goTool(ctx context.Context, dir, what string, start time.Time, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(stderr); s.Scan(); {
			lines <- s.Text()
		}
	}()
	tick := time.NewTicker(15 * time.Second)
	defer tick.Stop()
	compiled, downloaded := 0, 0
	var other []string
	for open := true; open; {
		select {
		case line, ok := <-lines:
			switch {
			case !ok:
				open = false
			case strings.HasPrefix(line, "go: downloading "):
				downloaded++
			case strings.Contains(line, " "):
				other = append(other, line)
			default:
				compiled++
			}
		case <-tick.C:
			l.progress(start, "%s: %d modules downloaded, %d packages compiled", what, downloaded, compiled)
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", args[0], err, strings.Join(other, "\n"))
	}
	l.progress(start, "%s: built (%d modules downloaded, %d packages compiled)", what, downloaded, compiled)
	return nil
}

// fetchRunc takes runc from Debian: it needs cgo and libseccomp, which a fresh machine cannot build.
func (l *Lab) fetchRunc(ctx context.Context) error {
	runc := filepath.Join(l.Bin(), "runc")
	if allExist(l.Bin(), []string{"runc"}) {
		return nil
	}
	dir, err := os.MkdirTemp(l.Dir, "runc-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	const script = `cd "$1"
apt-get -q -o APT::Sandbox::User=root download runc || { apt-get -q update && apt-get -q -o APT::Sandbox::User=root download runc; }
dpkg -x runc_*.deb . && mv usr/sbin/runc "$2"`
	return command(ctx, "bash", "-ec", script, "fetch-runc", dir, runc)
}

func (l *Lab) buildImages(ctx context.Context) error {
	builder := filepath.Join(l.Bin(), "image")
	goBuild := func(dir, out, pkg string) error {
		cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
		return output(cmd)
	}
	if err := goBuild(l.Repo, builder, "./install/image"); err != nil {
		return err
	}
	probe := filepath.Join(l.Bin(), "probe")
	if err := goBuild(filepath.Join(l.Repo, "tests/cluster"), probe, "./probe"); err != nil {
		return err
	}
	if err := command(ctx, builder, "-o", filepath.Join(l.images(), "probe.tar"), "-name", ProbeImage, "-entrypoint", "/probe", "/probe="+probe); err != nil {
		return err
	}
	if allExist(l.images(), []string{"pause.tar", "agnhost.tar"}) {
		return nil
	}
	cmd := exec.CommandContext(ctx, "go", "list", "-mod=readonly", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	cmd.Dir, cmd.Env = filepath.Join(l.Repo, "tests/cluster/parts/kubernetes"), append(os.Environ(), "GOFLAGS=", "GOWORK=off")
	src, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("find the source of Kubernetes: %w", err)
	}
	source := strings.TrimSpace(string(src))
	version, err := os.ReadFile(filepath.Join(source, "test/images/agnhost/VERSION"))
	if err != nil {
		return err
	}
	pause := filepath.Join(l.Bin(), "pause")
	if err := command(ctx, "gcc", "-Os", "-static", "-s", "-DVERSION=3.10.2", "-o", pause, filepath.Join(source, "build/pause/linux/pause.c")); err != nil {
		return err
	}
	if err := command(ctx, builder, "-o", filepath.Join(l.images(), "pause.tar"), "-name", PauseImage, "-user", "65535:65535",
		"-entrypoint", "/pause", "/pause="+pause); err != nil {
		return err
	}
	return command(ctx, builder, "-o", filepath.Join(l.images(), "agnhost.tar"), "-name", agnhostImage+":"+strings.TrimSpace(string(version)),
		"-entrypoint", "/agnhost", "-cmd", "pause", "/agnhost="+filepath.Join(l.Bin(), "agnhost"))
}

// fingerprint names the content of a directory and what else decides about a build.
func fingerprint(dir string, more ...string) (string, error) {
	h := sha256.New()
	_, _ = fmt.Fprintln(h, more)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		_, _ = fmt.Fprintf(h, "%s %d\n%s", path, len(data), data)
		return err
	})
	return fmt.Sprintf("%x", h.Sum(nil)), err
}

func allExist(dir string, names []string) bool {
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return false
		}
	}
	return true
}

// command runs a program; its output is part of the error when it fails.
func command(ctx context.Context, name string, args ...string) error {
	return output(exec.CommandContext(ctx, name, args...))
}

func output(cmd *exec.Cmd) error {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, io.Writer(&out)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}
