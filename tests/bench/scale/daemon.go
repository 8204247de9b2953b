package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	metricsAddress = "127.0.0.1:9481"
	startTimeout   = 5 * time.Minute
	stopTimeout    = 20 * time.Second
)

// daemon is podwalld as a process of its own.
type daemon struct {
	cmd     *exec.Cmd
	started time.Time
	ready   chan time.Time
	exited  chan struct{}

	mu  sync.Mutex
	log []string // its last lines
}

// start runs podwalld against an API server; state is its directory.
func start(podwalld, state, kubeconfig string) (*daemon, error) {
	d := &daemon{ready: make(chan time.Time, 1), exited: make(chan struct{})}
	d.cmd = exec.Command(podwalld, "run", "--kubeconfig", kubeconfig, "--node-name", nodeName, "--socket", filepath.Join(state, "podwall.sock"),
		"--state-dir", state, "--listen", metricsAddress)
	stderr, err := d.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	d.started = time.Now()
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start podwalld: %w", err)
	}
	go func() {
		defer close(d.exited)
		d.follow(stderr)
		_ = d.cmd.Wait()
	}()
	return d, nil
}

func (d *daemon) follow(log io.Reader) {
	const remembered = 20
	for lines := bufio.NewScanner(log); lines.Scan(); {
		line := lines.Text()
		if strings.Contains(line, " msg=ready ") {
			d.ready <- time.Now()
		}
		d.mu.Lock()
		d.log = append(d.log, line)
		d.log = d.log[max(0, len(d.log)-remembered):]
		d.mu.Unlock()
	}
}

func (d *daemon) failure(what string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fmt.Errorf("podwalld %s:\n%s", what, strings.Join(d.log, "\n"))
}

// waitReady returns when podwalld says that the kernel holds the ruleset and that it serves its socket.
func (d *daemon) waitReady(ctx context.Context) (time.Time, error) {
	select {
	case t := <-d.ready:
		return t, nil
	case <-d.exited:
		return time.Time{}, d.failure("ended")
	case <-time.After(startTimeout):
		return time.Time{}, d.failure("is not ready after " + startTimeout.String())
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	}
}

func (d *daemon) stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop podwalld: %w", err)
	}
	select {
	case <-d.exited:
		return nil
	case <-time.After(stopTimeout):
		_ = d.cmd.Process.Kill()
		<-d.exited
		return d.failure("did not stop within " + stopTimeout.String())
	}
}

// proc reads a file of the process's directory in /proc.
func (d *daemon) proc(name string) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", d.cmd.Process.Pid, name))
	return string(b), err
}

// footprint is what the process holds, in bytes.
type footprint struct {
	rss, anon, peak float64 // VmRSS, RssAnon (the rest is mostly pages of the program's file), VmHWM
	heapInUse, live float64 // of the Go heap: spans in use, and what the last collection found alive
}

func (d *daemon) footprint() (footprint, error) {
	status, err := d.proc("status")
	if err != nil {
		return footprint{}, err
	}
	var f footprint
	for line := range strings.Lines(status) {
		name, rest, _ := strings.Cut(line, ":")
		into := map[string]*float64{"VmRSS": &f.rss, "RssAnon": &f.anon, "VmHWM": &f.peak}[name]
		if into == nil {
			continue
		}
		if *into, err = strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64); err != nil {
			return footprint{}, fmt.Errorf("parse %s of podwalld: %w", name, err)
		}
		*into *= 1024
	}
	m, err := scrape()
	if err != nil {
		return footprint{}, err
	}
	f.heapInUse = m["go_memstats_heap_inuse_bytes"]
	// The next collection begins when the heap has grown by GOGC percent of what the last one found alive.
	f.live = m["go_memstats_next_gc_bytes"] / (1 + m["go_gc_gogc_percent"]/100)
	return f, nil
}

// cpu returns the processor time that the process has used, in user space and in the kernel.
func (d *daemon) cpu() (time.Duration, error) {
	stat, err := d.proc("stat")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(stat, ") ") // behind the name; the next field is the third (proc(5))
	fields := strings.Fields(rest)
	const utime, stime, perSecond = 14 - 3, 15 - 3, 100
	if len(fields) <= stime {
		return 0, fmt.Errorf("parse /proc/PID/stat: %q", stat)
	}
	u, err := strconv.Atoi(fields[utime])
	s, errS := strconv.Atoi(fields[stime])
	return time.Duration(u+s) * time.Second / perSecond, errors.Join(err, errS)
}

// scrape reads podwalld's metrics that have no labels.
func scrape() (map[string]float64, error) {
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + metricsAddress + "/metrics")
	if err != nil {
		return nil, fmt.Errorf("read podwalld's metrics: %w", err)
	}
	defer resp.Body.Close()
	m := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseFloat(value, 64); err == nil && !strings.HasPrefix(name, "#") {
			m[name] = v
		}
	}
	return m, lines.Err()
}
