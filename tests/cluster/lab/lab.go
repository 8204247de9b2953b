// Package lab builds a Kubernetes cluster of one or two nodes from source and runs it in namespaces of this machine.
package lab

import (
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"
)

//go:embed config
var configs embed.FS

// Images that the cluster itself and the upstream suite use. Nothing is ever pulled.
const (
	PauseImage   = "registry.k8s.io/pause:3.10.2"
	agnhostImage = "registry.k8s.io/e2e-test-images/agnhost"
	ProbeImage   = "podwall.test/probe:1"
)

// Lab is a directory with everything that is built and, while a cluster runs, its state and logs.
type Lab struct {
	Dir  string // $CLUSTER_DIR, else podwall-cluster in the user's cache directory
	Repo string // podwall's source
	Out  io.Writer
}

// New returns the lab of this user for the source tree around the working directory.
func New(out io.Writer) (*Lab, error) {
	dir := os.Getenv("CLUSTER_DIR")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find a cache directory: %w; set CLUSTER_DIR", err)
		}
		dir = filepath.Join(cache, "podwall-cluster")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	repo, err := findRepo()
	if err != nil {
		return nil, err
	}
	l := &Lab{Dir: dir, Repo: repo, Out: out}
	for _, d := range []string{l.Bin(), l.cniBin(), l.images(), l.run(), l.Logs()} {
		if err := os.MkdirAll(d, 0o755); err != nil { //nolint:gosec // build output
			return nil, err
		}
	}
	return l, nil
}

func findRepo() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; d != "/"; d = filepath.Dir(d) {
		mod, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && strings.HasPrefix(string(mod), "module github.com/podwall/podwall\n") {
			return d, nil
		}
	}
	return "", errors.New("find podwall's source: run this inside the repository")
}

// Bin is the directory of the cluster's programs.
func (l *Lab) Bin() string { return filepath.Join(l.Dir, "bin") }

// Logs is the directory of the components' logs, kept until the next cluster starts.
func (l *Lab) Logs() string { return filepath.Join(l.Dir, "log") }

// Kubeconfig is an administrator's, valid inside the nodes' network namespaces.
func (l *Lab) Kubeconfig() string { return filepath.Join(l.run(), "admin.kubeconfig") }

func (l *Lab) cniBin() string { return filepath.Join(l.Dir, "cni") }
func (l *Lab) images() string { return filepath.Join(l.Dir, "images") }
func (l *Lab) run() string    { return filepath.Join(l.Dir, "run") }

// config writes a template of config/ into the state directory.
func (l *Lab) config(name, as string, data any) error {
	t, err := template.New(name).Option("missingkey=error").ParseFS(configs, "config/"+name)
	if err != nil {
		return err
	}
	f, err := os.Create(as)
	if err != nil {
		return err
	}
	if err := t.Execute(f, data); err != nil {
		_ = f.Close()
		return fmt.Errorf("write %s: %w", as, err)
	}
	return f.Close()
}

// progress prints a line of what has been done and how long it took since start.
func (l *Lab) progress(start time.Time, format string, args ...any) {
	_, _ = fmt.Fprintf(l.Out, "%7.1fs  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
}
