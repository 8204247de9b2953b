package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/internal/testnet"
	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
)

const metricsAddress = "127.0.0.1:9481"

// daemonPID finds the node's daemon among the processes of the sandbox.
func daemonPID(t *testing.T, n *testnet.Node) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file) // a process may have ended
		argv := strings.Split(string(text), "\x00")
		if len(argv) > 2 && filepath.Base(argv[0]) == "podwalld" && slices.Contains(argv, n.Socket()) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatal("the daemon is not among the processes")
	return 0
}

// usage is what the daemon takes.
type usage struct {
	goroutines, files int
	peak              int // resident memory at most so far, in KiB
}

func daemonUsage(t *testing.T, n *testnet.Node, pid int) usage {
	t.Helper()
	var u usage
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	u.files = len(entries)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			_, _ = fmt.Sscan(value, &u.peak)
		}
	}
	var conn net.Conn
	if err := n.Host.In(func() (err error) { conn, err = net.Dial("tcp", metricsAddress); return err }); err != nil { //nolint:nonamedreturns // a line
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /metrics HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			_, _ = fmt.Sscan(value, &u.goroutines)
		}
	}
	if u.goroutines == 0 || u.peak == 0 {
		t.Fatalf("the daemon does not say what it takes: %+v", u)
	}
	return u
}

// request is one over the daemon's socket, whole.
func request(method, target, body string) string {
	return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: podwall\r\nContent-Length: %d\r\n\r\n%s", method, target, len(body), body)
}

// tell dials, sends and returns the status of the answer: 0 if there was none.
func tell(dial func() (net.Conn, error), parts ...string) (int, string, error) {
	c, err := dial()
	if err != nil {
		return 0, "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return 0, "", err
	}
	for _, part := range parts {
		if _, err := io.WriteString(c, part); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			return 0, "", err
		}
	}
	answer, err := io.ReadAll(c)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		return 0, "", err
	}
	var status int
	_, _ = fmt.Sscanf(string(answer), "HTTP/1.1 %d", &status)
	return status, string(answer), nil
}

// asUser calls f on a thread of its own with the credentials of another user.
func asUser(uid int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		done <- f()
	}()
	return <-done
}

// many calls f n times, so many at once, and returns how often it returned what.
func many(n, atOnce int, f func(i int) string) map[string]int {
	var mu sync.Mutex
	count := map[string]int{}
	var g sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i := range n {
		slots <- struct{}{}
		g.Go(func() {
			got := f(i)
			mu.Lock()
			count[got]++
			mu.Unlock()
			<-slots
		})
	}
	g.Wait()
	return count
}

// attacks are what clients of the socket do to the daemon. Each returns how often it saw what, and what it must have seen.
var attacks = []struct {
	name string
	want string // prefix of the commonest outcome
	run  func(t *testing.T, n *testnet.Node, dial func() (net.Conn, error)) map[string]int
}{
	{"another user", "100", func(t *testing.T, n *testnet.Node, dial func() (net.Conn, error)) map[string]int {
		// The modes keep them out, and if somebody has opened those, the credentials do.
		connect := func() error {
			return asUser(65534, func() error {
				c, err := dial()
				if err == nil {
					c.Close()
				}
				return err
			})
		}
		if err := connect(); !errors.Is(err, syscall.EACCES) {
			t.Errorf("another user's connect: %v, want %v", err, syscall.EACCES)
		}
		if err := errors.Join(os.Chmod(n.Dir, 0o755), os.Chmod(n.StateDir(), 0o755), os.Chmod(n.Socket(), 0o666)); err != nil {
			t.Fatal(err)
		}
		if err := connect(); err != nil {
			t.Errorf("the same with the modes opened: %v", err)
		}
		seen := many(300, 50, func(int) string {
			var status int
			var answer string
			err := asUser(65534, func() error {
				var err error
				status, answer, err = tell(dial, request("DELETE", "/v1/attachments/x/eth0", ""))
				return err
			})
			if status == 403 && strings.Contains(answer, `"code":100`) && strings.Contains(answer, "must be root") {
				return "100"
			}
			if status == 0 && err == nil {
				return "cut" // by those who came later
			}
			return fmt.Sprint(status, " ", err)
		})
		if seen["100"] == 0 {
			t.Error("nobody was told why")
		}
		return seen
	}},
	{"1000 silent", "closed", func(_ *testing.T, _ *testnet.Node, dial func() (net.Conn, error)) map[string]int {
		return many(1000, 1000, func(int) string {
			if status, _, err := tell(dial); err != nil || status != 0 {
				return fmt.Sprint(status, err)
			}
			return "closed"
		})
	}},
	{"head byte by byte", "closed", func(_ *testing.T, _ *testnet.Node, dial func() (net.Conn, error)) map[string]int {
		return many(400, 400, func(int) string { return drip(dial, "", request("GET", "/v1/status", "")) })
	}},
	{"body byte by byte", "closed", func(_ *testing.T, _ *testnet.Node, dial func() (net.Conn, error)) map[string]int {
		whole := request("PUT", "/v1/attachments/x/eth0", strings.Repeat(" ", 4096))
		head := strings.Index(whole, "\r\n\r\n") + 4
		return many(400, 400, func(int) string { return drip(dial, whole[:head], whole[head:]) })
	}},
	{"huge", "413", func(_ *testing.T, _ *testnet.Node, dial func() (net.Conn, error)) map[string]int {
		mega := strings.Repeat("x", 2<<20)
		return many(200, 50, func(i int) string {
			parts := []string{request("PUT", "/v1/attachments/x/eth0", mega)}
			switch i % 8 {
			case 0:
				parts = []string{"GET /v1/status HTTP/1.1\r\nHost: podwall\r\nX: " + mega + "\r\n\r\n"}
			case 1:
				parts = []string{request("GET", "/v1/"+mega, "")}
			}
			status, _, err := tell(dial, parts...)
			if status == 0 && err == nil {
				return "cut" // before all of it was sent
			}
			return fmt.Sprint(status, errText(err))
		})
	}},
	{"malformed", "400", func(_ *testing.T, _ *testnet.Node, dial func() (net.Conn, error)) map[string]int {
		texts := []string{
			"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "GET\r\n\r\n", "\x00\x00\x00\x00\r\n\r\n", "GET /v1/status HTTP/1.1\r\n\r\n", "PUT /v1/gc HTTP/9.9\r\n\r\n",
			request("PUT", "/v1/attachments/x/eth0", "{"), request("PUT", "/v1/attachments/x/eth0", "null"), request("POST", "/v1/gc", `{"network":1}`),
			"PUT /v1/attachments/x/eth0 HTTP/1.1\r\nHost: podwall\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", "GET /v1/status HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
			request("PUT", "/v1/attachments/..%2Fx/eth0", "{}"), request("PUT", "/v1/attachments/x/eth0?timeout=soon", "{}"),
		}
		return many(600, 50, func(i int) string {
			status, _, err := tell(dial, texts[i%len(texts)], strings.Repeat("\r\nGARBAGE \xff\x00", 50))
			if status/100 == 4 || status == 505 {
				return "400 and the like"
			}
			return fmt.Sprint(status, errText(err), " ", texts[i%len(texts)])
		})
	}},
	{"half closed", "closed", func(_ *testing.T, _ *testnet.Node, dial func() (net.Conn, error)) map[string]int {
		whole := request("PUT", "/v1/attachments/x/eth0", "{}")
		return many(500, 100, func(i int) string {
			c, err := dial()
			if err != nil {
				return err.Error()
			}
			defer c.Close()
			_, err = io.WriteString(c, whole[:i%len(whole)])
			err = errors.Join(err, c.(*net.UnixConn).CloseWrite(), c.SetReadDeadline(time.Now().Add(20*time.Second)))
			if _, readErr := io.Copy(io.Discard, c); err == nil && !errors.Is(readErr, syscall.ECONNRESET) {
				err = readErr
			}
			return "closed" + errText(err)
		})
	}},
	{"5000 requests", "204", func(_ *testing.T, _ *testnet.Node, dial func() (net.Conn, error)) map[string]int {
		return many(5000, 200, func(int) string {
			status, _, err := tell(dial, request("GET", "/v1/status", ""))
			return fmt.Sprint(status, errText(err))
		})
	}},
	{"1000 ADDs at once", "101", func(t *testing.T, n *testnet.Node, _ func() (net.Conn, error)) map[string]int {
		client := agentapi.NewClient(n.Socket()) // the plugin's, which asks again if it was not heard
		return many(1000, 1000, func(i int) string {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			err := client.Attach(ctx, attach.Attachment{
				Network: "n", Key: attach.Key{ContainerID: fmt.Sprint("x", i), IfName: "eth0"}, Pod: attach.PodRef{Namespace: "default", Name: "x"},
				IPs: []netip.Addr{netip.MustParseAddr("192.0.2.77")}, HostLink: attach.HostLink{Name: "none", Index: 9999},
			})
			if refused, ok := errors.AsType[*agentapi.Error](err); ok && (refused.Code == agentapi.CodeNoHostLink || strings.Contains(refused.Msg, "try again later")) {
				return fmt.Sprint(refused.Code)
			}
			return fmt.Sprint(err)
		})
	}},
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return " " + err.Error()
}

// drip sends start at once and the rest byte by byte until the other side has had enough.
func drip(dial func() (net.Conn, error), start, rest string) string {
	c, err := dial()
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, c)
		close(ended)
	}()
	if _, err := io.WriteString(c, start); err != nil {
		return "closed"
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); rest = rest[min(1, len(rest)-1):] {
		if _, err := io.WriteString(c, rest[:1]); err != nil {
			return "closed"
		}
		select {
		case <-ended:
			return "closed"
		case <-time.After(100 * time.Millisecond):
		}
	}
	c.Close()
	<-ended
	return "served for 20s"
}

// TestHostileClients holds that what clients of the socket do beside a runtime is refused or bounded, that the runtime's calls are
// served meanwhile, and that nothing is left of it.
func TestHostileClients(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet, flags: []string{"--listen", metricsAddress}})
	a, b := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "b")
	pid := daemonPID(t, n)
	dial := func() (net.Conn, error) { return net.Dial("unix", n.Socket()) }
	before, was := daemonUsage(t, n, pid), attachments(t, n)

	for _, attack := range attacks {
		t.Run(attack.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var most usage
			slowest := map[string]time.Duration{}
			calls, tooLate := 0, 0
			var beside sync.WaitGroup
			beside.Go(func() {
				conf := map[string]any{"prevResult": prevResult(a, a.Addrs[testnet.IPv4].String()+"/24", a.Addrs[testnet.IPv6].String()+"/64")}
				for first := true; first || ctx.Err() == nil; first = false {
					for _, verb := range []string{"ADD", "CHECK", "STATUS"} {
						begin := time.Now()
						code, msg, err := pluginCall(context.WithoutCancel(ctx), n, verb, a, conf)
						// CHECK and STATUS ask once and wait for a second at most, which a busy machine takes for itself now and then.
						if late := verb != "ADD" && (code == 11 || code == 50); late {
							tooLate++
						} else if err != nil || code != 0 {
							t.Errorf("%s beside the attack: code %d, %s, %v", verb, code, msg, err)
						}
						slowest[verb] = max(slowest[verb], time.Since(begin))
						calls++
					}
				}
			})
			beside.Go(func() {
				for ctx.Err() == nil {
					if u, err := countFiles(pid); err == nil {
						most.files = max(most.files, u)
					}
					select {
					case <-ctx.Done():
					case <-time.After(10 * time.Millisecond):
					}
				}
			})
			// And a pod's whole life.
			c, err := n.AddPod(t.Context(), "default", "c", "")
			begin := time.Now()
			seen := attack.run(t, n, dial)
			took := time.Since(begin)
			if err == nil {
				err = n.DeletePod(t.Context(), c)
			}
			if err != nil {
				t.Errorf("a pod beside the attack: %v", err)
			}
			cancel()
			beside.Wait()

			if tooLate > calls/4 {
				t.Errorf("%d of %d calls beside the attack had no answer in time", tooLate, calls)
			}
			total, good := 0, 0
			for outcome, times := range seen {
				total += times
				if strings.HasPrefix(outcome, attack.want) || outcome == "431" || outcome == "cut" || outcome == "11" {
					good += times
				}
			}
			if good < total || total == 0 {
				t.Errorf("seen %v, want %s", seen, attack.want)
			}
			// Silent callers, those who are being told so, and requests that run; see pkg/agentapi.
			if most.files > before.files+1000 {
				t.Errorf("%d files open, %d before", most.files, before.files)
			}
			var now usage
			pollWithin(t, 20*time.Second, fmt.Sprintf("nothing is left of it: %+v, was %+v", &now, before), func() bool {
				now = daemonUsage(t, n, pid)
				return now.goroutines <= before.goroutines+2 && now.files <= before.files+1
			})
			if now.peak > before.peak+(128<<10) {
				t.Errorf("%d KiB of memory, %d before", now.peak, before.peak)
			}
			poll(t, "what was registered before is, and nothing else", func() bool { return slices.Equal(attachments(t, n), was) })
			t.Attr("report", fmt.Sprintf("%s: %d callers in %v: %v; beside them %d calls, %d too late, slowest ADD %v CHECK %v STATUS %v; files %d, at most %d, now %d; goroutines %d, now %d; peak memory %d MiB, was %d",
				attack.name, total, took.Round(time.Millisecond), seen, calls, tooLate, slowest["ADD"].Round(time.Millisecond), slowest["CHECK"].Round(time.Millisecond),
				slowest["STATUS"].Round(time.Millisecond), before.files, most.files, now.files, before.goroutines, now.goroutines, now.peak>>10, before.peak>>10))
		})
	}
	// The counts would show what is left: while callers hold on, they do.
	held := make([]net.Conn, 100)
	for i := range held {
		c, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		held[i] = c
	}
	poll(t, "held connections show in the daemon's files and goroutines", func() bool {
		now := daemonUsage(t, n, pid)
		return now.files >= before.files+len(held) && now.goroutines >= before.goroutines+len(held)
	})
	expectAll(t, n, b.Host, a.Host, testnet.TCP(80), testnet.Denied)
	expectAll(t, n, n.Host, a.Host, testnet.TCP(80), testnet.Allowed)
}

func countFiles(pid int) (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(entries), err
}

// TestSilentCallersDoNotDelay holds that an ADD which comes behind a thousand connections of root that never say a word is served
// at once: it does not wait for theirs to time out, batch by batch.
func TestSilentCallersDoNotDelay(t *testing.T) {
	t.Parallel()
	n := start(t, setup{cni: "ptp", manifests: quiet})
	a := add(t, n, "default", "a")
	conf := map[string]any{"prevResult": prevResult(a, a.Addrs[testnet.IPv4].String()+"/24", a.Addrs[testnet.IPv6].String()+"/64")}
	alone := time.Now()
	if code, msg := pluginCode(t, n, "ADD", a, conf); code != 0 {
		t.Fatalf("ADD: code %d: %s", code, msg)
	}
	quick := time.Since(alone)
	for range 1000 {
		c, err := net.Dial("unix", n.Socket())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	begin := time.Now()
	if code, msg := pluginCode(t, n, "ADD", a, conf); code != 0 {
		t.Errorf("ADD behind silent callers: code %d: %s", code, msg)
	}
	took := time.Since(begin)
	// With room for 256, and a time-out of 2 s as the only way out of it, this is 6 s. A busy machine is slow alone as well.
	if took > 4*time.Second+10*quick {
		t.Errorf("ADD behind 1000 silent callers took %v", took)
	}
	t.Attr("report", fmt.Sprintf("ADD alone %v, behind 1000 silent connections of root %v", quick.Round(time.Millisecond), took.Round(time.Millisecond)))
}

// underSeccomp makes this program execute its arguments under a seccomp filter that refuses what no runtime's default profile lets a
// container do with NET_ADMIN alone: Docker's and containerd's are lists of what is allowed, and none of these is on them.
const underSeccomp = "PODWALL_TEST_SECCOMP"

func init() {
	if os.Getenv(underSeccomp) == "" {
		return
	}
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "seccomp:", err)
		os.Exit(1)
	}
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}} // the number of the call, struct seccomp_data
	for _, nr := range []uint32{
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT,
		unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR, unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_KEXEC_LOAD,
		unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_SETHOSTNAME,
		unix.SYS_SETDOMAINNAME, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_ADD_KEY,
		unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL, unix.SYS_USERFAULTFD, unix.SYS_MOVE_PAGES, unix.SYS_MBIND, unix.SYS_SET_MEMPOLICY, unix.SYS_KCMP,
		unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_SYSLOG, unix.SYS_VHANGUP, unix.SYS_FANOTIFY_INIT, unix.SYS_IO_URING_SETUP,
		unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	} {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		fail(err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
		fail(errno)
	}
	if err := unix.Unshare(unix.CLONE_NEWUTS); !errors.Is(err, unix.EPERM) {
		fail(fmt.Errorf("the filter does nothing: %w", err))
	}
	if err := os.Unsetenv(underSeccomp); err != nil {
		fail(err)
	}
	fail(unix.Exec(os.Args[1], os.Args[1:], os.Environ()))
}

// capabilities of the daemon, as /proc/PID/status shows sets of them.
const (
	dacReadSearch = 1 << 2
	netAdmin      = 1 << 12
)

// threads returns the credentials of all of a process's threads: the values of status by name, which must be the same for all.
func threads(t *testing.T, pid int) map[string]string {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) < 2 {
		t.Fatalf("threads of %d: %v, %v", pid, files, err)
	}
	var all map[string]string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		one := map[string]string{}
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(line, ":")
			switch name {
			case "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp":
				one[name] = strings.TrimSpace(value)
			}
		}
		if all == nil {
			all = one
		}
		for name, value := range one {
			if all[name] != value {
				t.Errorf("%s: %s %s, and %s of another thread", file, name, value, all[name])
			}
		}
	}
	return all
}

func capSet(bits uint64) string { return fmt.Sprintf("%016x", bits) }

// TestLeastPrivilege holds what a running daemon may do, and that it can do its work with that: started by root, and as the DaemonSet
// starts it, with NET_ADMIN alone, under seccomp, on a root file system that cannot be written.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		wrapper string
		keeps   uint64
		seccomp string // 2 is a filter
	}{
		{"as root", "", netAdmin | dacReadSearch, "0"},
		{"as the DaemonSet", `exec unshare --mount --propagation private sh -c '
			mount -o remount,bind,ro / && ! touch /podwall-was-here 2>/dev/null &&
			exec setpriv --bounding-set=-all,+net_admin --inh-caps=-all --no-new-privs env ` + underSeccomp + `=1 "$@"' sh ` + self, netAdmin, "2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			n := lay(t, setup{cni: "bridge"})
			if tt.wrapper != "" {
				// The base name stays, for the process is found by it.
				dir := filepath.Join(n.Dir, "wrapped")
				script := filepath.Join(dir, "podwalld")
				if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(script, []byte("#!/bin/sh\n"+tt.wrapper+" "+n.Binaries.Podwalld+` "$@"`+"\n"), 0o755)); err != nil {
					t.Fatal(err)
				}
				n.Binaries.Podwalld = script
			}
			for name, text := range quiet {
				if err := n.WriteManifest(name, text); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.StartDaemon(t.Context()); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(n.Log(), "built with cgo") {
				t.Skip("this daemon was built with cgo, for the race detector")
			}
			check := func() {
				t.Helper()
				want := map[string]string{
					"CapInh": capSet(0), "CapAmb": capSet(0), "CapPrm": capSet(tt.keeps), "CapEff": capSet(tt.keeps), "CapBnd": capSet(tt.keeps),
					"NoNewPrivs": "1", "Seccomp": tt.seccomp,
				}
				got := threads(t, daemonPID(t, n))
				for name, value := range want {
					if got[name] != value {
						t.Errorf("%s %s, want %s", name, got[name], value)
					}
				}
				t.Attr("report", fmt.Sprintf("%s: %v", tt.name, got))
			}
			check()
			// The same look at this test shows that it would see more.
			if got := threads(t, os.Getpid()); got["CapEff"] == capSet(tt.keeps) || got["NoNewPrivs"] != "0" {
				t.Errorf("this process has %v: the test cannot tell the difference", got)
			}
			a, b := add(t, n, "default", "a", testnet.TCP(80)), add(t, n, "default", "b")
			expectAll(t, n, b.Host, a.Host, testnet.TCP(80), testnet.Denied)
			// A change, by a file of another user that only they may read, if anybody's may be read.
			file := filepath.Join(n.Dir, "open.yaml")
			open := policyManifest("default", "open", "{podSelector: {}, ingress: [{}]}")
			err := os.WriteFile(file, []byte(open), 0o600)
			if tt.keeps&dacReadSearch != 0 {
				err = errors.Join(err, os.Chown(file, 65534, 65534))
			}
			if err = errors.Join(err, os.Rename(file, filepath.Join(n.ManifestDir(), "open.yaml"))); err != nil {
				t.Fatal(err)
			}
			for _, f := range n.Families {
				eventually(t, testnet.Probe{From: b.Host, To: a.Host, Family: f, Port: testnet.TCP(80)}, testnet.Allowed)
			}
			for _, view := range []string{"status", "pods", "policies"} {
				if _, err := n.Podwalld(t.Context(), view); err != nil {
					t.Error(err)
				}
			}
			if _, err := n.Podwalld(t.Context(), "health", "--live"); err != nil {
				t.Errorf("the DaemonSet's liveness probe: %v", err)
			}
			if out, err := n.Podwalld(t.Context(), "ruleset", "--diff"); err != nil {
				t.Errorf("ruleset --diff: %v: %s", err, out)
			}
			if err := n.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			if err := n.StartDaemon(t.Context()); err != nil {
				t.Fatal(err)
			}
			check()
			if err := n.DeletePod(t.Context(), b); err != nil {
				t.Error(err)
			}
			poll(t, "b's registration goes after DEL", func() bool { return !registered(t, n, b) })
			if log := n.Log(); strings.Contains(log, "permission denied") || strings.Contains(log, "operation not permitted") {
				t.Errorf("something was refused:\n%s", log)
			}
		})
	}
}

// pluginCall is pluginCode for goroutines, which must not end the test.
func pluginCall(ctx context.Context, n *testnet.Node, verb string, p *testnet.Pod, conf map[string]any) (int, string, error) {
	config := map[string]any{"cniVersion": "1.1.0", "name": n.Name, "type": "podwall", "socket": n.Socket()}
	maps.Copy(config, conf)
	stdin, err := json.Marshal(config)
	if err != nil {
		return 0, "", err
	}
	out, err := n.Plugin(ctx, verb, p, stdin)
	if err == nil {
		return 0, "", nil
	}
	var failure struct {
		Code int    `json:"code"`
		Msg  string `json:"msg"`
	}
	if jsonErr := json.Unmarshal(out, &failure); jsonErr != nil || failure.Code == 0 {
		return 0, "", fmt.Errorf("%w, and not a CNI error: %s", err, out)
	}
	return failure.Code, failure.Msg, nil
}
