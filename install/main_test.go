package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/cli"
	"github.com/podwall/podwall/pkg/conflist"
	"github.com/podwall/podwall/pkg/nft"
	"github.com/podwall/podwall/pkg/ruleset"
)

// asInstaller makes the test binary behave as podwall-install.
const asInstaller = "TEST_AS_PODWALL_INSTALL"

// plugins are two files that answer like a CNI plugin, and some that do not. They are written before any test forks: a child
// that inherits a descriptor for writing makes the file "busy" for everybody.
var plugins struct{ a, b, broken, foreign, notExecutable string }

func TestMain(m *testing.M) {
	if os.Getenv(asInstaller) != "" {
		os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "podwall-install-test")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	const script = "#!/bin/sh\n# %s\n[ \"$CNI_COMMAND\" = VERSION ] && echo '%s'\n"
	const answer = `{"cniVersion":"1.1.0","supportedVersions":["0.3.1","1.0.0","1.1.0"]}`
	for _, p := range []struct {
		path *string
		text string
		mode fs.FileMode
	}{
		{&plugins.a, fmt.Sprintf(script, "a", answer), 0o755},
		{&plugins.b, fmt.Sprintf(script, "b", answer), 0o755},
		{&plugins.broken, "#!/bin/sh\necho no such library >&2\nexit 127\n", 0o755},
		{&plugins.foreign, "#!/bin/sh\necho hello\n", 0o755},
		{&plugins.notExecutable, fmt.Sprintf(script, "x", answer), 0o644},
	} {
		*p.path = filepath.Join(dir, fmt.Sprintf("plugin%d", rand.Uint32()))
		if err := os.WriteFile(*p.path, []byte(p.text), p.mode); err != nil {
			panic(err)
		}
	}
	return m.Run()
}

const list = `{
  "cniVersion": "1.0.0",
  "name": "n",
  "plugins": [
    {
      "type": "ptp",
      "mtu": 1500.0
    }
  ]
}
`

// node is a node's directories.
type node struct {
	t                      *testing.T
	dir, bin, confs, state string
	socket                 string
}

func newNode(t *testing.T, files map[string]string) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace of its own")
	}
	dir := t.TempDir()
	n := &node{t: t, dir: dir, bin: filepath.Join(dir, "bin"), confs: filepath.Join(dir, "net.d"), state: filepath.Join(dir, "run")}
	n.socket = filepath.Join(n.state, "s")
	if err := os.Mkdir(n.confs, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		n.put(name, text)
	}
	return n
}

func (n *node) put(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.confs, name), []byte(text), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// command prepares podwall-install in a fresh network namespace: uninstall removes tables.
func (n *node) command(args ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		n.t.Fatal(err)
	}
	args = append([]string{args[0], "--cni-bin-dir", n.bin, "--cni-conf-dir", n.confs, "--state-dir", n.state, "--plugin", plugins.a}, args[1:]...)
	cmd := exec.CommandContext(n.t.Context(), self, args...)
	cmd.Env = append(os.Environ(), asInstaller+"=1", "GORACE=atexit_sleep_ms=0") // the race detector's default is a second
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	return cmd
}

type result struct {
	code           int
	stdout, stderr string
}

func (r result) String() string { return fmt.Sprintf("exit code %d\n%s%s", r.code, r.stdout, r.stderr) }

func output(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

func (n *node) run(args ...string) result {
	n.t.Helper()
	return output(n.t, n.command(args...))
}

// must runs a command that has to end with a code.
func (n *node) must(code int, args ...string) result {
	n.t.Helper()
	r := n.run(args...)
	if r.code != code {
		n.t.Fatalf("%q: want exit code %d, got %s", args, code, r)
	}
	return r
}

func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		files[e.Name()] = readFile(t, filepath.Join(dir, e.Name()))
	}
	return files
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestLifeCycle(t *testing.T) {
	t.Parallel()
	n := newNode(t, map[string]string{"10-n.conflist": list, "20-m.conflist": strings.Replace(list, `"n"`, `"m"`, 1)})
	before := contents(t, n.confs)
	status := func(code int, wantPlugin, wantList conflist.State, standDown bool) {
		t.Helper()
		r := n.must(code, "status", "-o", "json")
		var got report
		if err := json.Unmarshal([]byte(r.stdout), &got); err != nil {
			t.Fatalf("%v in %s", err, r)
		}
		if got.OK != (code == cli.OK) || got.Plugin.State != wantPlugin || got.Conflist.State != wantList || got.StandDown != standDown {
			t.Errorf("want %s, %s, %t, got %s", wantPlugin, wantList, standDown, r)
		}
		if text := n.must(code, "status").stdout; !strings.Contains(text, string(wantPlugin)) || !strings.Contains(text, string(wantList)) {
			t.Errorf("status: %s", text)
		}
	}
	status(cli.No, conflist.Missing, conflist.Missing, false)
	n.must(cli.OK, "install")
	status(cli.OK, conflist.Installed, conflist.Installed, false)
	want := strings.Replace(list, "    }\n  ]", "    },\n    {\n      \"type\": \"podwall\"\n    }\n  ]", 1)
	if diff := cmp.Diff(map[string]string{"10-n.conflist": want, "20-m.conflist": before["20-m.conflist"]}, contents(t, n.confs)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// A second time changes nothing: not even the files' inodes.
	inodes := func() []uint64 {
		var inodes []uint64
		for _, path := range []string{filepath.Join(n.bin, "podwall"), filepath.Join(n.confs, "10-n.conflist")} {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			inodes = append(inodes, info.Sys().(*syscall.Stat_t).Ino)
		}
		return inodes
	}
	first := inodes()
	if r := n.must(cli.OK, "install"); strings.Count(r.stdout, "is there") != 2 {
		t.Errorf("second install: %s", r)
	}
	if diff := cmp.Diff(first, inodes()); diff != "" {
		t.Errorf("a second install wrote again (-first +second):\n%s", diff)
	}

	// Upgrade: another plugin, another socket.
	if r := n.must(cli.No, "status", "--plugin", plugins.b, "--socket", n.socket); strings.Count(r.stdout, "outdated") != 2 {
		t.Errorf("before the upgrade: %s", r)
	}
	n.must(cli.OK, "install", "--plugin", plugins.b, "--socket", n.socket, "--timeout", "20s", "--log-file", "/var/log/podwall.log")
	wantEntry := fmt.Sprintf(`{"type":"podwall","socket":%q,"timeout":"20s","logFile":"/var/log/podwall.log"}`, n.socket)
	if state, err := conflist.StateOf([]byte(readFile(t, filepath.Join(n.confs, "10-n.conflist"))), []byte(wantEntry)); err != nil || state != conflist.Installed {
		t.Errorf("entry %s, %v in %s", state, err, readFile(t, filepath.Join(n.confs, "10-n.conflist")))
	}
	if readFile(t, filepath.Join(n.bin, "podwall")) != readFile(t, plugins.b) {
		t.Error("the plugin was not replaced")
	}
	status(cli.No, conflist.Outdated, conflist.Outdated, false) // by the flags of the first installation
	n.must(cli.OK, "install")

	for i := range 2 {
		r := n.must(cli.OK, "uninstall", "--wait", "0")
		if strings.Contains(r.stdout, "podwall removed") != (i == 0) {
			t.Errorf("uninstall %d: %s", i, r)
		}
		if diff := cmp.Diff(before, contents(t, n.confs)); diff != "" {
			t.Errorf("after uninstall (-want +got):\n%s", diff)
		}
		status(cli.No, conflist.Installed, conflist.Missing, true)
	}
	n.must(cli.OK, "uninstall", "--purge")
	n.must(cli.OK, "uninstall", "--purge")
	if got := contents(t, n.bin); len(got) > 0 {
		t.Errorf("after purge there are %q", got)
	}
	n.must(cli.OK, "install")
	status(cli.OK, conflist.Installed, conflist.Installed, false)
}

func TestStatusNotComparable(t *testing.T) {
	t.Parallel()
	n := newNode(t, map[string]string{"10-n.conflist": list})
	n.must(cli.OK, "install")
	if r := n.must(cli.OK, "status", "--plugin", filepath.Join(n.dir, "none")); !strings.Contains(r.stdout, "unverified") {
		t.Error(r)
	}
	if err := os.Chmod(filepath.Join(n.bin, "podwall"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := n.must(cli.No, "status"); !strings.Contains(r.stdout, "not executable") {
		t.Error(r)
	}
	n.must(cli.OK, "install")
	n.must(cli.OK, "status")
}

func TestStatusWaits(t *testing.T) {
	t.Parallel()
	n := newNode(t, map[string]string{"10-n.conflist": list})
	cmd := n.command("status", "--wait", "30s")
	done := make(chan result)
	go func() { done <- output(t, cmd) }()
	n.must(cli.OK, "install")
	if r := <-done; r.code != cli.OK {
		t.Error(r)
	}
}

func TestInstallFails(t *testing.T) {
	t.Parallel()
	good := map[string]string{"10-n.conflist": list}
	for name, tc := range map[string]struct {
		files map[string]string
		args  []string
		code  int
		want  string
	}{
		"no conflist":                       {nil, nil, cli.Failed, "--wait"},
		"time is up":                        {nil, []string{"--wait", "50ms"}, cli.Failed, "waited 50ms for a main CNI plugin: no CNI configuration"},
		"no conflist loads":                 {map[string]string{"10-n.conflist": list + "}"}, nil, cli.Failed, "10-n.conflist"},
		"no plugin":                         {good, []string{"--plugin", "/nonexistent/podwall"}, cli.Failed, "--plugin"},
		"broken plugin":                     {good, []string{"--plugin", plugins.broken}, cli.Failed, "no such library"},
		"another program":                   {good, []string{"--plugin", plugins.foreign}, cli.Failed, "is it podwall?"},
		"not executable":                    {good, []string{"--plugin", plugins.notExecutable}, cli.Failed, "permission denied"},
		"relative socket":                   {good, []string{"--socket", "s"}, cli.Usage, `--socket "s": must be an absolute path`},
		"relative directory":                {good, []string{"--cni-conf-dir", "net.d"}, cli.Usage, "--cni-conf-dir"},
		"negative time":                     {good, []string{"--timeout", "-1s"}, cli.Usage, "negative"},
		"no duration":                       {good, []string{"--wait", "soon"}, cli.Usage, "soon"},
		"unknown flag":                      {good, []string{"--bin-dir", "/x"}, cli.Usage, "see podwall-install install --help"},
		"an argument":                       {good, []string{"now"}, cli.Usage, `unexpected argument "now"`},
		"a file where a directory is to be": {good, []string{"--cni-bin-dir", plugins.a}, cli.Failed, "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, tc.files)
			if r := n.must(tc.code, append([]string{"install"}, tc.args...)...); !strings.Contains(r.stderr, tc.want) {
				t.Errorf("want %q in %s", tc.want, r)
			}
			if diff := cmp.Diff(len(tc.files), len(contents(t, n.confs))); diff != "" {
				t.Error(diff)
			}
			for name, want := range tc.files {
				if got := readFile(t, filepath.Join(n.confs, name)); got != want {
					t.Errorf("%s was changed: %s", name, got)
				}
			}
		})
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		args       []string
		code       int
		out, wrong string // on stdout, on stderr
	}{
		"nothing":        {nil, cli.Usage, "", "Usage: podwall-install COMMAND"},
		"help":           {[]string{"help"}, cli.OK, "Exit codes:", ""},
		"--help":         {[]string{"--help"}, cli.OK, "Exit codes:", ""},
		"install --help": {[]string{"install", "--help"}, cli.OK, "-cni-conf-dir", ""},
		"version":        {[]string{"version"}, cli.OK, "podwall-install", ""},
		"unknown":        {[]string{"remove"}, cli.Usage, "", `unknown command "remove"`},
		"unknown output": {[]string{"status", "-o", "yaml"}, cli.Usage, "", "-o"},
		"bad table":      {[]string{"uninstall", "--table", "a b"}, cli.Usage, "", "--table"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), tc.args, &stdout, &stderr); code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			if !strings.Contains(stdout.String(), tc.out) || tc.out == "" && stdout.Len() > 0 {
				t.Errorf("stdout: %s", &stdout)
			}
			if !strings.Contains(stderr.String(), tc.wrong) || tc.wrong == "" && stderr.Len() > 0 {
				t.Errorf("stderr: %s", &stderr)
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	n := newNode(t, map[string]string{"10-n.conflist": list})
	cmd := n.command("install", "--timeout", "5s")
	cmd.Env = append(cmd.Env, "PODWALL_SOCKET="+n.socket, "PODWALL_TIMEOUT=7s")
	if r := output(t, cmd); r.code != cli.OK {
		t.Fatal(r)
	}
	if got := readFile(t, filepath.Join(n.confs, "10-n.conflist")); !strings.Contains(got, n.socket) || !strings.Contains(got, `"5s"`) {
		t.Errorf("the environment sets what flags do not: %s", got)
	}
	cmd = n.command("install")
	cmd.Env = append(cmd.Env, "PODWALL_WAIT=soon")
	if r := output(t, cmd); r.code != cli.Usage || !strings.Contains(r.stderr, `PODWALL_WAIT="soon"`) {
		t.Error(r)
	}
}

func TestInstallWaits(t *testing.T) {
	t.Parallel()
	n := newNode(t, nil)
	if err := os.Remove(n.confs); err != nil { // it may come later too
		t.Fatal(err)
	}
	cmd := n.command("install", "--wait", "30s")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make([]byte, 200)
	size, err := stderr.Read(said)
	if err != nil || !strings.Contains(string(said[:size]), "waiting for a main CNI plugin, up to 30s more: no CNI configuration") {
		t.Errorf("%v: %s", err, said[:size])
	}
	if err := os.Mkdir(n.confs, 0o755); err != nil {
		t.Fatal(err)
	}
	n.put("10-n.conflist", list)
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	n.must(cli.OK, "status")
}

// A running program cannot be written to, only replaced.
func TestInstallReplacesRunningPlugin(t *testing.T) {
	t.Parallel()
	n := newNode(t, map[string]string{"10-n.conflist": list})
	if err := os.Mkdir(n.bin, 0o755); err != nil {
		t.Fatal(err)
	}
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(n.bin, "podwall")
	if out, err := exec.CommandContext(t.Context(), "cp", sleep, old).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	running := exec.CommandContext(t.Context(), old, "600")
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = running.Process.Kill()
		_ = running.Wait()
	}()
	if err := os.WriteFile(old, nil, 0o755); !errors.Is(err, unix.ETXTBSY) {
		t.Fatalf("this kernel lets running programs be overwritten (%v): the test shows nothing", err)
	}
	n.must(cli.OK, "install")
}

// mounted runs the installer after a mount in a mount namespace of its own.
func (n *node) mounted(mount string, args ...string) result {
	cmd := n.command(args...)
	cmd.Args = append([]string{"sh", "-ec", mount + "\nexec \"$0\" \"$@\"", cmd.Path}, cmd.Args[1:]...)
	sh, err := exec.LookPath("sh")
	if err != nil {
		n.t.Fatal(err)
	}
	cmd.Path = sh
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	return output(n.t, cmd)
}

func TestFileSystemsThatDoNotTakePart(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		mount, command string
		want           []string
	}{
		"read-only configurations": {
			"mount --bind %[2]s %[2]s; mount -o remount,ro,bind %[2]s", "install",
			[]string{"%[2]s is on a read-only file system", "--cni-conf-dir"},
		},
		"uninstall from read-only configurations": {
			"mount --bind %[2]s %[2]s; mount -o remount,ro,bind %[2]s", "uninstall",
			[]string{"%[2]s is on a read-only file system", "--cni-conf-dir"},
		},
		"read-only plugins": {
			"mount -t tmpfs -o ro none %[1]s", "install", []string{"%[1]s is on a read-only file system", "--cni-bin-dir"},
		},
		"plugins that must not run": {
			"mount -t tmpfs -o noexec none %[1]s", "install", []string{"self-test plugin %[1]s/podwall", "permission denied"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text := list
			if tc.command == "uninstall" {
				with, err := conflist.Insert([]byte(list), []byte(`{"type":"podwall"}`))
				if err != nil {
					t.Fatal(err)
				}
				text = string(with)
			}
			n := newNode(t, map[string]string{"10-n.conflist": text})
			if err := os.Mkdir(n.bin, 0o755); err != nil {
				t.Fatal(err)
			}
			r := n.mounted(fmt.Sprintf(tc.mount, n.bin, n.confs), tc.command)
			if r.code != cli.Failed {
				t.Error(r)
			}
			for _, want := range tc.want {
				if want = strings.NewReplacer("%[1]s", n.bin, "%[2]s", n.confs).Replace(want); !strings.Contains(r.stderr, want) {
					t.Errorf("want %q in %s", want, r)
				}
			}
			if got := readFile(t, filepath.Join(n.confs, "10-n.conflist")); got != text {
				t.Errorf("the conflist was changed: %s", got)
			}
		})
	}
}

// Whenever the installer is killed, the runtime finds a conflist that loads and a plugin that is whole, and the next run
// finishes the work.
func TestKilledAtAnyInstant(t *testing.T) {
	t.Parallel()
	const kills = 200
	conf := `{"cniVersion":"0.2.0","name":"n","type":"ptp","mtu":1500.0}` + "\n"
	made, err := conflist.FromConf([]byte(conf))
	if err != nil {
		t.Fatal(err)
	}
	nodes := []*node{newNode(t, map[string]string{"10-n.conflist": list}), newNode(t, map[string]string{"10-n.conf": conf})}
	originals := []string{list, string(made)}
	binaries := []string{readFile(t, plugins.a), readFile(t, plugins.b)}
	command := func(i int) *exec.Cmd {
		n := nodes[i%2]
		if i/2%3 == 2 {
			return n.command("uninstall", "--wait", "0")
		}
		// Every install differs from the one before, so that it has to write.
		return n.command("install", "--plugin", []string{plugins.a, plugins.b}[i/2%2], "--socket", fmt.Sprintf("%s%d", n.socket, i))
	}
	for i := range 6 {
		if r := output(t, command(i)); r.code != cli.OK {
			t.Fatal(r)
		}
	}
	// How long a run takes depends on what else the machine does; so that most runs are killed, and at any point of them, the
	// instant is drawn from a span that follows it.
	span := 50 * time.Millisecond
	killed, leftovers := 0, 0
	for i := range kills {
		n := nodes[i%2]
		cmd := command(i)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		instant := rand.N(span)
		timer := time.AfterFunc(instant, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
		if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
			killed++
			span += span / 30
		} else if status.ExitStatus() != cli.OK {
			t.Fatalf("run %d (%q) ended with %d by itself", i, cmd.Args, status.ExitStatus())
		} else {
			span -= span / 20
		}
		used, err := libcni.ConfFiles(n.confs, []string{".conf", ".conflist", ".json"})
		if err != nil || len(used) == 0 {
			t.Fatalf("run %d (%q), killed after %s, left no configuration: %v, %v", i, cmd.Args, instant, contents(t, n.confs), err)
		}
		text := []byte(readFile(t, used[0]))
		if filepath.Ext(used[0]) == ".conflist" {
			_, err = libcni.ConfListFromFile(used[0])
		} else if _, err = libcni.NetworkPluginConfFromBytes(text); err == nil {
			text, err = conflist.FromConf(text)
		}
		if err != nil {
			t.Fatalf("run %d (%q), killed after %s: %v in %v", i, cmd.Args, instant, err, contents(t, n.confs))
		}
		if without, err := conflist.Remove(text); err != nil || string(without) != originals[i%2] {
			t.Fatalf("run %d: %v: the main plugin's part is now %s", i, err, without)
		}
		if got := contents(t, n.bin)["podwall"]; got != binaries[0] && got != binaries[1] {
			t.Fatalf("run %d left half a plugin: %q", i, got)
		}
		for _, dir := range []string{n.confs, n.bin} {
			for name := range contents(t, dir) {
				if strings.HasPrefix(name, ".podwall") {
					leftovers++
				}
			}
		}
	}
	t.Logf("%d of %d runs were killed in their first %s, %d temporary files seen", killed, kills, span, leftovers)
	if killed < kills/4 {
		t.Errorf("only %d of %d runs were killed: the test shows little", killed, kills)
	}
	for i, n := range nodes {
		n.must(cli.OK, "install")
		n.must(cli.OK, "status")
		n.must(cli.OK, "uninstall", "--wait", "0", "--purge")
		want := map[string]string{"10-n.conflist": list}
		if i == 1 {
			want = map[string]string{"10-n.conf": conf}
		}
		if diff := cmp.Diff(want, contents(t, n.confs)); diff != "" {
			t.Errorf("after uninstall (-want +got):\n%s", diff)
		}
		if got := contents(t, n.bin); len(got) > 0 {
			t.Errorf("left in the plugin directory: %q", got)
		}
	}
}

// inNamespace runs f on a thread in a fresh network namespace, which programs that f starts share.
func inNamespace(t *testing.T, f func(*nft.Kernel)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := netns.New()
		if err != nil {
			t.Error(err)
			return
		}
		defer ns.Close()
		kernel, err := nft.New(nft.Config{NetNS: int(ns)})
		if err != nil {
			t.Error(err)
			return
		}
		defer kernel.Close()
		f(kernel)
	}()
	<-done
}

var (
	inet   = ruleset.TableID{Family: ruleset.Inet, Name: "podwall"}
	netdev = ruleset.TableID{Family: ruleset.Netdev, Name: "podwall"}
	others = ruleset.TableID{Family: ruleset.Inet, Name: "others"}
)

func addTables(t *testing.T, kernel *nft.Kernel, ids ...ruleset.TableID) {
	t.Helper()
	var ops []ruleset.Op
	for _, id := range ids {
		ops = append(ops, ruleset.Op{Kind: ruleset.AddTable, Table: id})
	}
	if err := kernel.Commit(t.Context(), ruleset.Delta{Apply: ops}); err != nil {
		t.Error(err)
	}
}

func tables(t *testing.T, kernel *nft.Kernel) []ruleset.TableID {
	t.Helper()
	rs, err := kernel.Read(t.Context(), inet, netdev, others)
	if err != nil {
		t.Error(err)
	}
	var ids []ruleset.TableID
	for _, table := range rs {
		ids = append(ids, table.ID)
	}
	return ids
}

// here makes a command run in the namespace of its caller's thread.
func here(cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = nil
	return cmd
}

func TestUninstallRemovesTables(t *testing.T) {
	t.Parallel()
	n := newNode(t, map[string]string{"10-n.conflist": list})
	inNamespace(t, func(kernel *nft.Kernel) {
		addTables(t, kernel, inet, netdev, others)
		if r := output(t, here(n.command("uninstall", "--table", "other"))); r.code != cli.OK || len(tables(t, kernel)) != 3 {
			t.Errorf("another table's uninstall: %s leaves %v", r, tables(t, kernel))
		}
		if r := output(t, here(n.command("uninstall"))); r.code != cli.OK || strings.Count(r.stdout, "deleted") != 2 {
			t.Error(r)
		}
		if diff := cmp.Diff([]ruleset.TableID{others}, tables(t, kernel)); diff != "" {
			t.Errorf("tables (-want +got):\n%s", diff)
		}
	})
}

// A daemon that does not stand down puts the table back.
func TestUninstallReportsTableThatComesBack(t *testing.T) {
	t.Parallel()
	n := newNode(t, map[string]string{"10-n.conflist": list})
	if err := os.Mkdir(n.state, 0o700); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("unix", n.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	inNamespace(t, func(kernel *nft.Kernel) {
		cmd := here(n.command("uninstall", "--wait", "2s", "--socket", n.socket))
		done := make(chan result)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil { // on this thread: that gives it the namespace
			t.Error(err)
			return
		}
		go func() {
			_ = cmd.Wait()
			done <- result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
		}()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				addTables(t, kernel, inet)
			case r := <-done:
				if r.code != cli.Failed || !strings.Contains(r.stderr, "table inet podwall comes back: stop podwalld") {
					t.Error(r)
				}
				return
			}
		}
	})
}

func TestUninstallWaitsForOwner(t *testing.T) {
	t.Parallel()
	n := newNode(t, map[string]string{"10-n.conflist": list})
	inNamespace(t, func(kernel *nft.Kernel) {
		// An owned table belongs to the netlink socket of its maker and goes with it.
		owner := exec.CommandContext(t.Context(), "nft", "-i")
		stdin, err := owner.StdinPipe()
		if err != nil {
			t.Error(err)
			return
		}
		if err := owner.Start(); err != nil {
			t.Error(err)
			return
		}
		if _, err := stdin.Write([]byte("add table inet podwall { flags owner; }\n")); err != nil {
			t.Error(err)
		}
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for len(tables(t, kernel)) == 0 {
			select {
			case <-tick.C:
			case <-t.Context().Done():
				return
			}
		}
		if r := output(t, here(n.command("uninstall", "--wait", "300ms"))); r.code != cli.Failed || !strings.Contains(r.stderr, "delete table inet podwall") {
			t.Error(r)
		}
		cmd := here(n.command("uninstall", "--wait", "30s"))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Error(err)
		}
		if err := errors.Join(stdin.Close(), owner.Wait()); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, &stderr)
		}
		if got := tables(t, kernel); len(got) > 0 {
			t.Errorf("left: %v", got)
		}
	})
}
