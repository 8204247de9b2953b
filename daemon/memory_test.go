package main

import (
	"bytes"
	"log/slog"
	"math"
	"runtime/debug"
	"testing"
	"testing/fstest"
)

func TestCgroupLimit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		files map[string]string
		want  uint64
	}{
		{"no cgroups", nil, 0},
		{"in a container", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "536870912\n"}, 512 << 20},
		{"no limit", map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 0},
		{"root without a file", map[string]string{"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "1000\n"}, 1000},
		{"a parent is lower", map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "2000\n", "sys/fs/cgroup/a/memory.max": "1000\n"}, 1000},
		{"hybrid", map[string]string{"proc/self/cgroup": "5:memory:/x\n0::/a\n", "sys/fs/cgroup/a/memory.max": "3000\n"}, 3000},
		{"outside of the namespace's root", map[string]string{"proc/self/cgroup": "0::/../../other\n", "sys/fs/cgroup/other/memory.max": "7\n"}, 7},
		{"nonsense", map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "-1\n"}, 0},
	} {
		root := fstest.MapFS{}
		for name, text := range test.files {
			root[name] = &fstest.MapFile{Data: []byte(text)}
		}
		got, ok := cgroupLimit(root)
		if ok != (test.want != 0) || ok && got != test.want {
			t.Errorf("%s: %d, %v; want %d", test.name, got, ok, test.want)
		}
	}
}

// Not parallel: the limit is the process's.
func TestLimitMemory(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	t.Cleanup(func() { debug.SetMemoryLimit(before) })
	root := fstest.MapFS{"proc/self/cgroup": {Data: []byte("0::/")}, "sys/fs/cgroup/memory.max": {Data: []byte("10000000000")}}
	var log bytes.Buffer
	set := func(env string) int64 {
		debug.SetMemoryLimit(math.MaxInt64)
		limitMemory(root, func(string) string { return env }, slog.New(slog.NewTextHandler(&log, nil)))
		return debug.SetMemoryLimit(-1)
	}
	if got := set(""); got != 8_000_000_000 {
		t.Errorf("limit %d, want four fifths of the cgroup's", got)
	}
	if got := set("1GiB"); got != math.MaxInt64 {
		t.Errorf("GOMEMLIMIT was overruled: %d", got)
	}
}
