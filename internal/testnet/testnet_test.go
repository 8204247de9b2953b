package testnet

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// holdEnv makes this binary a sandbox that stays.
const holdEnv = "PODWALL_TESTNET_HOLD"

func TestMain(m *testing.M) {
	if os.Getenv(holdEnv) != "" {
		os.Exit(Sandbox(hold))
	}
	os.Exit(RunTests(m.Run))
}

// hold leaves behind as much as it can: namespaces, and a child that ignores polite signals.
func hold() int {
	if _, err := newNS("held"); err != nil {
		fmt.Println(err)
		return 1
	}
	child := exec.Command("sh", "-c", "trap '' INT TERM HUP; echo ready; while :; do sleep 1; done")
	child.Stdout = os.Stdout
	fmt.Println(child.Run())
	return 0
}

func TestSandboxLeavesNothing(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = []string{holdEnv + "=1", "PATH=" + os.Getenv("PATH")}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(stdout)
			if line, err := lines.ReadString('\n'); line != "ready\n" {
				t.Fatalf("sandbox says %q: %v", line, err)
			}
			before, err := os.ReadDir("/run")
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range before {
				if e.Name() == "held" {
					t.Error("the sandbox's /run is not its own")
				}
			}
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			// Every process of the sandbox has the pipe open: its end is their end, and a namespace lives no longer than its processes.
			ended := make(chan error, 1)
			go func() {
				_, err := io.Copy(io.Discard, lines)
				ended <- err
			}()
			select {
			case err := <-ended:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(2 * stopGrace):
				t.Error("a process of the sandbox has outlived it")
			}
			_ = cmd.Wait()
			if _, err := os.Stat("/run/netns/held"); err == nil {
				t.Error("the sandbox's namespace shows outside")
			}
		})
	}
}

func TestParseMatrix(t *testing.T) {
	t.Parallel()
	got, err := ParseMatrix("# a comment\nto  a:80  b:53/udp\na  -  yes # and another\nb  no  -\n\nto c:1\na no\n")
	want := Matrix{{"a", "b", UDP(53), true}, {"b", "a", TCP(80), false}, {"a", "c", TCP(1), false}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	for text, says := range map[string]string{
		"":                       "no cells",
		"to a:80\nb yes no\n":    "2: row b has 2 answers for 1 columns",
		"b yes\n":                "row b has 1 answers for 0",
		"to a:80\nb maybe\n":     `2: b -> a 80/tcp is "maybe"`,
		"to a:80\nb -\n":         `"-" is for a sender and itself`,
		"to a:80\na yes\n":       `"-" is for a sender and itself`,
		"to a:80\nb yes\nb no\n": "3: b -> a 80/tcp is answered twice",
		"to a\nb yes\n":          `1: column "a"`,
		"to a:0\nb yes\n":        `column "a:0"`,
		"to a:70000\nb yes\n":    `column "a:70000"`,
		"to a:80/icmp\nb yes\n":  `column "a:80/icmp"`,
	} {
		if _, err := ParseMatrix(text); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want an error that says %q", text, err, says)
		}
	}
}

func TestIncompleteMatrix(t *testing.T) {
	t.Parallel()
	s := &Scenario{Pods: []PodSpec{{Namespace: "x", Name: "a", Ports: []Port{TCP(80)}}, {Namespace: "x", Name: "b"}}}
	for _, from := range []string{NodeName, External} {
		s.Matrix = append(s.Matrix, Cell{From: from, To: "x/a", Port: TCP(80)})
	}
	if err := s.checkComplete(); err == nil || err.Error() != "no answer for x/b -> x/a 80/tcp" {
		t.Errorf("got %v", err)
	}
	s.Matrix = append(s.Matrix, Cell{From: "x/b", To: "x/a", Port: TCP(80), Want: true})
	if err := s.checkComplete(); err != nil {
		t.Error(err)
	}
}

func TestPrint(t *testing.T) {
	t.Parallel()
	cell := func(from, to string, want bool) Cell { return Cell{From: from, To: to, Port: TCP(80), Want: want} }
	all := [][]Result{
		{{cell("x/a", "x/b", true), IPv4, Allowed}, {cell("x/b", "x/a", false), IPv4, Denied}, {cell("node", "x/a", true), IPv4, Allowed}},
		{{cell("x/a", "x/b", true), IPv6, Denied}, {cell("x/b", "x/a", false), IPv6, Leaked}, {cell("node", "x/a", true), IPv6, Allowed}},
	}
	var b strings.Builder
	if err := Print(&b, all); err != nil {
		t.Fatal(err)
	}
	const want = `from \ to  x/a:80   x/b:80
x/a        ·        ✓ ✓✗ <<
x/b        ✗ ✗! <<  ·
node       ✓ ✓✓     ·
`
	if got := b.String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	wrong := Mismatches(all)
	if len(wrong) != 2 || wrong[1].String() != "IPv6 x/b -> x/a 80/tcp: expected denied, observed leaked (packets reached the receiver, the client got no answer)" {
		t.Errorf("mismatches: %v", wrong)
	}
	if (Result{}).OK() {
		t.Error("a result that nobody observed passes")
	}
}

func newNode(t *testing.T, name, cni string) *Node {
	t.Helper()
	binaries, err := TestBinaries()
	if err != nil {
		t.Fatal(err)
	}
	n, err := NewNode(t.Context(), Config{Name: name, CNI: cni, Families: []Family{IPv4, IPv6}, Binaries: binaries})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return n
}

// A judge that always says yes, or always no, would pass every other test of this repository: break the network on purpose.
func TestVerdicts(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		rules string // loaded into the node
		want  Verdict
	}{
		{"untouched", "", Allowed},
		{"dropped on the way there", "chain c { type filter hook forward priority 0; th dport 8080 drop; }", Denied},
		{"rejected on the way there", "chain c { type filter hook forward priority 0; th dport 8080 reject; }", Denied},
		{"dropped on the way back", "chain c { type filter hook forward priority 0; th sport 8080 drop; }", Leaked},
		{"answered by another pod", "chain c { type nat hook prerouting priority -100; th dport 8080 dnat ip to 10.244.1.77; }", Forged},
	}
	for i, tt := range tests {
		for _, port := range []Port{TCP(8080), UDP(8080)} {
			t.Run(tt.name+" "+port.Proto, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, fmt.Sprintf("verdict%d%s", i, port.Proto), "ptp")
				a, err := n.AddPod(t.Context(), "default", "a", "")
				if err != nil {
					t.Fatal(err)
				}
				b, err := n.AddPod(t.Context(), "default", "b", "", port)
				if err != nil {
					t.Fatal(err)
				}
				c, err := n.AddPod(t.Context(), "default", "c", "", port)
				if err != nil {
					t.Fatal(err)
				}
				if tt.rules != "" {
					rules := strings.ReplaceAll(tt.rules, "th ", "meta l4proto "+port.Proto+" th ")
					rules = strings.ReplaceAll(rules, "10.244.1.77", c.Addrs[IPv4].String())
					if _, err := n.Host.Run(t.Context(), "nft", "table inet broken { "+rules+"\n}"); err != nil {
						t.Fatal(err)
					}
				}
				got, err := Probe{From: a.Host, To: b.Host, Family: IPv4, Port: port}.Try(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if got != tt.want {
					t.Errorf("%s, want %s", got, tt.want)
				}
			})
		}
	}
}

// The node is judged behind the rules of its input hook, everyone else in front of their stack.
func TestVerdictsOfNode(t *testing.T) {
	t.Parallel()
	n := newNode(t, "nodeverdict", "bridge")
	pod, err := n.AddPod(t.Context(), "default", "a", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Host.Serve(TCP(10250), UDP(53), TCP(9100)); err != nil {
		t.Fatal(err)
	}
	const rules = "table inet broken { chain in { type filter hook input priority 0; tcp dport 10250 drop; }\n" +
		"chain out { type filter hook output priority 0; tcp sport 9100 drop; }\n}"
	if _, err := n.Host.Run(t.Context(), "nft", rules); err != nil {
		t.Fatal(err)
	}
	for port, want := range map[Port]Verdict{TCP(10250): Denied, UDP(53): Allowed, TCP(9100): Leaked} {
		for _, family := range n.Families {
			got, err := Probe{From: pod.Host, To: n.Host, Family: family, Port: port}.Try(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got != want {
				t.Errorf("%s %s: %s, want %s", family, port, got, want)
			}
		}
	}
}

// Without podwall every example is open: a harness that cannot connect would take any denial for the work of a policy.
func TestOpen(t *testing.T) {
	scenarios, err := LoadScenarios("../../examples")
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range scenarios {
		for _, cni := range []string{"bridge", "ptp"} {
			t.Run(s.Name+" "+cni, func(t *testing.T) {
				t.Parallel()
				n := newNode(t, fmt.Sprintf("open%d%s", i, cni), cni)
				if err := s.Deploy(t.Context(), n); err != nil {
					t.Fatal(err)
				}
				all, err := n.ObserveAll(t.Context(), s.Matrix.Open())
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range Mismatches(all) {
					t.Error(r)
				}
			})
		}
	}
}
