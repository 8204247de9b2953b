package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/podwall/podwall/tests/cluster/lab"
)

// test runs everything on a fresh cluster for each main CNI plugin.
func test(ctx context.Context, l *lab.Lab, flags *flag.FlagSet, args []string) error {
	cnis := flags.String("cni", "bridge,ptp", "main CNI plugins to test under, one cluster each")
	pattern := flags.String("run", "", "`REGEXP` of the tests to run, as of go test, below TestCluster/")
	image := flags.String("image", filepath.Join(l.Repo, "bin/podwall-image.tar"), "podwall's image `ARCHIVE`")
	keep := flags.Bool("keep", false, "leave the last cluster running")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if _, err := os.Stat(*image); err != nil {
		return fmt.Errorf("find podwall's image: %w; build it with 'make image'", err)
	}
	begin := time.Now()
	if err := l.Build(ctx); err != nil {
		return err
	}
	binary, err := compileTests(ctx, l)
	if err != nil {
		return err
	}
	var failed []error
	list := strings.Split(*cnis, ",")
	for i, cni := range list {
		o := lab.Options{Nodes: 2, CNI: cni, Bound: !*keep}
		fmt.Printf("=== a cluster of two nodes, pods on %s\n", cni)
		if err := l.Up(ctx, o); err != nil {
			return err
		}
		err := runTests(ctx, l, binary, *pattern, cni, *image)
		if err != nil {
			err = fmt.Errorf("tests on %s: %w; logs: %s", cni, err, saveLogs(l, cni))
		}
		failed = append(failed, err)
		if *keep && i == len(list)-1 {
			break
		}
		// An interrupt ends the tests, not the tidying up.
		if err := l.Down(context.WithoutCancel(ctx)); err != nil {
			failed = append(failed, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	fmt.Printf("=== %.0f s in all\n", time.Since(begin).Seconds())
	return errors.Join(failed...)
}

func compileTests(ctx context.Context, l *lab.Lab) (string, error) {
	binary := filepath.Join(l.Bin(), "podwall.test")
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-buildvcs=false", "-o", binary, "./checks")
	cmd.Dir = filepath.Join(l.Repo, "tests/cluster")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("compile the tests: %w", err)
	}
	return binary, nil
}

func runTests(ctx context.Context, l *lab.Lab, binary, pattern, cni, image string) error {
	if pattern != "" {
		pattern = "TestCluster/(" + pattern + ")"
	}
	cmd := exec.CommandContext(ctx, binary, "-test.v", "-test.timeout=55m", "-test.run="+pattern, "-cni="+cni, "-image="+image)
	cmd.Dir = l.Repo
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // as the nodes: see main's init
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	return cmd.Run()
}

// saveLogs keeps the logs of a cluster that had a failure, since the next one starts with none.
func saveLogs(l *lab.Lab, cni string) string {
	dir := filepath.Join(l.Dir, "failed-"+cni)
	_ = os.RemoveAll(dir)
	if err := os.CopyFS(dir, os.DirFS(l.Logs())); err != nil {
		return l.Logs()
	}
	return dir
}
