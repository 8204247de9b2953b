package main

import (
	"bytes"
	"context"
	"io/fs"
	"log/slog"
	"math"
	"path"
	"runtime/debug"
	"strconv"

	"github.com/podwall/podwall/pkg/reconcile"
)

// ofCgroup is the share of the container's memory that Go may use before it collects garbage harder. The rest is the kernel's for
// us: set elements, socket buffers and pages of the program are charged to the same cgroup.
const ofCgroup = 0.8

// limitMemory takes the container's memory limit for Go's, which does not look for it. GOMEMLIMIT goes before.
func limitMemory(root fs.FS, getenv func(string) string, log *slog.Logger) {
	if getenv("GOMEMLIMIT") != "" {
		return
	}
	limit, ok := cgroupLimit(root)
	if !ok {
		return
	}
	own := int64(float64(limit) * ofCgroup)
	debug.SetMemoryLimit(own)
	log.Info("memory limit of the cgroup found", "cgroup", limit, "GOMEMLIMIT", own)
}

// cgroupLimit reads the lowest memory limit of this process's cgroup (v2) and those above it that are visible.
func cgroupLimit(root fs.FS) (uint64, bool) {
	own, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return 0, false
	}
	group := "/"
	for line := range bytes.Lines(own) {
		if p, ok := bytes.CutPrefix(line, []byte("0::")); ok { // v2 (cgroups(7))
			group = path.Clean("/" + string(bytes.TrimSpace(p)))
		}
	}
	lowest := uint64(math.MaxUint64)
	for {
		if text, err := fs.ReadFile(root, path.Join("sys/fs/cgroup", group, "memory.max")); err == nil {
			if limit, err := strconv.ParseUint(string(bytes.TrimSpace(text)), 10, 63); err == nil { // else "max"
				lowest = min(lowest, limit)
			}
		}
		if group == "/" {
			return lowest, lowest != math.MaxUint64
		}
		group = path.Dir(group)
	}
}

// tidyUp gives back what only the start has needed: the first lists and the first transaction leave several times as much garbage
// as anything later, and Go would keep its pages for minutes.
func tidyUp(ctx context.Context, loop *reconcile.Loop) {
	if loop.WaitReady(ctx) == nil {
		debug.FreeOSMemory()
	}
}
