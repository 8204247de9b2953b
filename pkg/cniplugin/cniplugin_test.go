package cniplugin

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/podwall/podwall/pkg/agentapi"
	"github.com/podwall/podwall/pkg/attach"
	"github.com/podwall/podwall/pkg/hostlink"
)

// recorder is an agent that remembers what it was asked, and where.
type recorder struct {
	socket   string
	attached []attach.Attachment
	detached []attach.Key
	gc       []string // network and keys of each call
	have     attach.Attachment
	err      error
	deadline time.Duration
}

func (r *recorder) seen(ctx context.Context) error {
	if d, ok := ctx.Deadline(); ok {
		r.deadline = time.Until(d)
	}
	return r.err
}

func (r *recorder) Attach(ctx context.Context, a attach.Attachment) error {
	r.attached = append(r.attached, a)
	return r.seen(ctx)
}

func (r *recorder) Detach(ctx context.Context, key attach.Key) error {
	r.detached = append(r.detached, key)
	return r.seen(ctx)
}

func (r *recorder) Check(ctx context.Context, _ attach.Key) (attach.Attachment, error) {
	return r.have, r.seen(ctx)
}

func (r *recorder) GC(ctx context.Context, network string, valid []attach.Key) error {
	call := network
	for _, k := range valid {
		call += " " + k.String()
	}
	r.gc = append(r.gc, call)
	return r.seen(ctx)
}

func (r *recorder) Status(ctx context.Context) error { return r.seen(ctx) }

var theLink = attach.HostLink{Name: "veth1f2e3d4c", Index: 12}

// world is a plugin with everything around it faked.
type world struct {
	agent          recorder
	linkErr        error
	candidates     []string
	stdout, stderr bytes.Buffer
}

func (w *world) funcs() skel.CNIFuncs {
	p := &Plugin{
		Agent: func(socket string) agentapi.Agent { w.agent.socket = socket; return &w.agent },
		FindLink: func(_ context.Context, _, _ string, candidates []string) (attach.HostLink, error) {
			w.candidates = candidates
			return theLink, w.linkErr
		},
		Stdout: &w.stdout, Stderr: &w.stderr,
	}
	return p.Funcs()
}

func fixture(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func cmdArgs(stdin string) *skel.CmdArgs {
	return &skel.CmdArgs{
		ContainerID: "c1", Netns: "/run/netns/x", IfName: "eth0", StdinData: []byte(stdin),
		Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u-1",
	}
}

func conf(extra string) string {
	return `{"cniVersion":"1.1.0","name":"net","type":"podwall"` + extra + `}`
}

func codeOf(t *testing.T, err error) uint {
	t.Helper()
	if err == nil {
		return 0
	}
	var e *types.Error
	if !errors.As(err, &e) {
		t.Fatalf("error %v is a %T, want a CNI error", err, err)
	}
	return e.Code
}

func TestAddTellsTheDaemonEverything(t *testing.T) {
	t.Parallel()
	var w world
	err := w.funcs().Add(cmdArgs(conf(`,"socket":"/s","timeout":"3s","capabilities":{"x":true},"unknown":[1],
		"args":{"cni":{"labels":[{"key":"app","value":"web"},{"key":"empty","value":""}],"other":1}},
		"prevResult":` + fixture(t, "ptp"))))
	if err != nil {
		t.Fatal(err)
	}
	want := []attach.Attachment{{
		Network: "net", Key: attach.Key{ContainerID: "c1", IfName: "eth0"},
		Pod:      attach.PodRef{Namespace: "shop", Name: "web-0", UID: "u-1"},
		IPs:      []netip.Addr{netip.MustParseAddr("10.244.0.7"), netip.MustParseAddr("fd00:10:244::7")},
		HostLink: theLink, Labels: map[string]string{"app": "web", "empty": ""}, Netns: "/run/netns/x",
	}}
	if diff := cmp.Diff(want, w.agent.attached, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("attachment (-want +got):\n%s", diff)
	}
	if w.agent.socket != "/s" {
		t.Errorf("dialed %q, want /s", w.agent.socket)
	}
	if w.agent.deadline <= 2*time.Second || w.agent.deadline > 3*time.Second {
		t.Errorf("deadline in %v, want the conflist's 3s", w.agent.deadline)
	}
}

func TestAddDefaults(t *testing.T) {
	t.Parallel()
	var w world
	args := cmdArgs(conf(`,"socket":null,"prevResult":` + fixture(t, "ptp")))
	args.Args = ""
	if err := w.funcs().Add(args); err != nil {
		t.Fatal(err)
	}
	if w.agent.socket != "/run/podwall/podwall.sock" || w.agent.deadline <= 9*time.Second || w.agent.deadline > 10*time.Second {
		t.Errorf("socket %s, deadline %v, want /run/podwall/podwall.sock and 10s", w.agent.socket, w.agent.deadline)
	}
	// The daemon decides what a sandbox without a pod is.
	if got := w.agent.attached[0].Pod; got != (attach.PodRef{}) {
		t.Errorf("pod %+v, want none", got)
	}
	if got := w.agent.attached[0].Labels; got != nil {
		t.Errorf("labels %v, want none", got)
	}
}

func TestPodIPsOfMainPlugins(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ ips, candidates []string }{
		"bridge":  {[]string{"10.244.0.7", "fd00:10:244::7"}, []string{"cni0", "veth1f2e3d4c"}},
		"ptp":     {[]string{"10.244.0.7", "fd00:10:244::7"}, []string{"veth1f2e3d4c"}},
		"calico":  {[]string{"192.168.7.9"}, []string{"cali1f2e3d4c5b6"}},
		"aws":     {[]string{"192.168.33.4"}, []string{"eni1f2e3d4c5b6"}},
		"azure":   {[]string{"10.240.0.11"}, nil},
		"kindnet": {[]string{"10.244.0.5", "fd00:10:244::5"}, nil},
		"multi":   {[]string{"10.1.0.2", "10.4.0.2"}, []string{"dummy0"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w world
			if err := w.funcs().Add(cmdArgs(conf(`,"prevResult":` + fixture(t, name)))); err != nil {
				t.Fatal(err)
			}
			var ips []string
			for _, ip := range w.agent.attached[0].IPs {
				ips = append(ips, ip.String())
			}
			if diff := cmp.Diff(tc.ips, ips); diff != "" {
				t.Errorf("IPs (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tc.candidates, w.candidates); diff != "" {
				t.Errorf("host names (-want +got):\n%s", diff)
			}
			if err := w.agent.attached[0].Validate(); err != nil {
				t.Errorf("the daemon would refuse it: %v", err)
			}
		})
	}
}

func TestAddRefusesBadInput(t *testing.T) {
	t.Parallel()
	prev := `,"prevResult":` + fixture(t, "ptp")
	for name, tc := range map[string]struct {
		conf, args string
		code       uint
		want       []string // parts of the message
	}{
		"relative socket":              {`,"socket":"run/x.sock"` + prev, "", 7, []string{"socket", "run/x.sock", "absolute"}},
		"empty socket":                 {`,"socket":""` + prev, "", 7, []string{"socket", `""`}},
		"socket of a wrong type":       {`,"socket":5` + prev, "", 7, []string{"socket", "5"}},
		"long socket":                  {`,"socket":"/` + strings.Repeat("s", 107) + `"` + prev, "", 7, []string{"socket", "107"}},
		"timeout without unit":         {`,"timeout":"10"` + prev, "", 7, []string{"timeout", `"10"`, "10s"}},
		"timeout as number":            {`,"timeout":10` + prev, "", 7, []string{"timeout", "10"}},
		"timeout zero":                 {`,"timeout":"0s"` + prev, "", 7, []string{"timeout", "0s"}},
		"timeout negative":             {`,"timeout":"-1s"` + prev, "", 7, []string{"timeout", "-1s"}},
		"timeout too long":             {`,"timeout":"5m"` + prev, "", 7, []string{"timeout", "5m", "1m0s"}},
		"relative log file":            {`,"logFile":"log"` + prev, "", 7, []string{"logFile", `"log"`, "absolute"}},
		"no prevResult":                {``, "", 7, []string{"chained", "prevResult"}},
		"null prevResult":              {`,"prevResult":null`, "", 7, []string{"chained"}},
		"prevResult no object":         {`,"prevResult":"x"`, "", 6, []string{"prevResult"}},
		"prevResult bad IP":            {`,"prevResult":{"ips":[{"address":"10.0.0.1"}]}`, "", 6, []string{"prevResult"}},
		"prevResult null IP":           {`,"prevResult":{"ips":[null]}`, "", 6, []string{"prevResult", "ips has null"}},
		"prevResult null interface":    {`,"prevResult":{"interfaces":[null],"ips":[{"address":"10.0.0.1/24"}]}`, "", 6, []string{"interfaces has null"}},
		"prevResult no IP":             {`,"prevResult":{"interfaces":[{"name":"eth0"}]}`, "", 7, []string{"no IP for eth0"}},
		"IPs of others only":           {`,"prevResult":{"interfaces":[{"name":"eth1"}],"ips":[{"interface":0,"address":"10.0.0.1/24"}]}`, "", 7, []string{"no IP for eth0"}},
		"index too high":               {`,"prevResult":{"interfaces":[{"name":"eth0"}],"ips":[{"interface":1,"address":"10.0.0.1/24"}]}`, "", 7, []string{"10.0.0.1", "interface 1"}},
		"index negative":               {`,"prevResult":{"interfaces":[{"name":"eth0"}],"ips":[{"interface":-1,"address":"10.0.0.1/24"}]}`, "", 7, []string{"10.0.0.1", "interface -1"}},
		"malformed CNI_ARGS":           {prev, "K8S_POD_NAME", 4, []string{"CNI_ARGS", "K8S_POD_NAME"}},
		"CNI_ARGS with a = in a value": {prev, "A=b=c", 4, []string{"CNI_ARGS", "A=b=c"}},
		"unknown CNI_ARGS unwanted":    {prev, "IgnoreUnknown=false;A=b", 4, []string{"CNI_ARGS", "A=b"}},
		"namespace without name":       {prev, "K8S_POD_NAMESPACE=a", 4, []string{"K8S_POD_NAME"}},
		"name without namespace":       {prev, "K8S_POD_NAME=a", 4, []string{"K8S_POD_NAMESPACE"}},
		"labels as a map":              {`,"args":{"cni":{"labels":{"app":"web"}}}` + prev, "", 7, []string{"args.cni.labels", "app"}},
		"label without key":            {`,"args":{"cni":{"labels":[{"value":"web"}]}}` + prev, "", 7, []string{"args.cni.labels", "key"}},
		"label without value":          {`,"args":{"cni":{"labels":[{"key":"app"}]}}` + prev, "", 7, []string{"args.cni.labels", "value"}},
		"label twice":                  {`,"args":{"cni":{"labels":[{"key":"app","value":"a"},{"key":"app","value":"b"}]}}` + prev, "", 7, []string{"app", "twice"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w world
			args := cmdArgs(conf(tc.conf))
			args.Args = tc.args
			err := w.funcs().Add(args)
			if got := codeOf(t, err); got != tc.code {
				t.Fatalf("code %d (%v), want %d", got, err, tc.code)
			}
			for _, part := range tc.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %s", err, part)
				}
			}
			if len(w.agent.attached) != 0 || w.stdout.Len() != 0 {
				t.Errorf("attached %v, printed %q, want neither", w.agent.attached, w.stdout.String())
			}
		})
	}
}

func TestUnknownArgsAreIgnored(t *testing.T) {
	t.Parallel()
	var w world
	args := cmdArgs(conf(`,"prevResult":` + fixture(t, "ptp")))
	args.Args = "FOO=bar;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b"
	if err := w.funcs().Add(args); err != nil {
		t.Fatal(err)
	}
	if got := w.agent.attached[0].Pod; got != (attach.PodRef{Namespace: "a", Name: "b"}) {
		t.Errorf("pod %+v", got)
	}
}

func TestErrorsKeepTheirCode(t *testing.T) {
	t.Parallel()
	stdin := conf(`,"prevResult":` + fixture(t, "ptp"))
	for name, tc := range map[string]struct {
		agent, link error
		code        uint
	}{
		"daemon not ready": {&agentapi.Error{Code: 11, Msg: "m", Details: "d"}, nil, 11},
		"daemon refuses":   {&agentapi.Error{Code: 100, Msg: "m"}, nil, 100},
		"bad netns":        {nil, hostlink.ErrNetns, 8},
		"no host link":     {nil, hostlink.ErrNoHostLink, 101},
		"anything else":    {nil, errors.New("boom"), 999},
	} {
		for verb, call := range map[string]func(skel.CNIFuncs) error{
			"ADD":   func(f skel.CNIFuncs) error { return f.Add(cmdArgs(stdin)) },
			"CHECK": func(f skel.CNIFuncs) error { return f.Check(cmdArgs(stdin)) },
			"DEL":   func(f skel.CNIFuncs) error { return f.Del(cmdArgs(stdin)) },
		} {
			t.Run(name+" "+verb, func(t *testing.T) {
				t.Parallel()
				w := world{linkErr: tc.link}
				w.agent.err = tc.agent
				want := tc.code
				if verb == "DEL" {
					want = 0
				}
				if got := codeOf(t, call(w.funcs())); got != want {
					t.Errorf("code %d, want %d", got, want)
				}
				if w.stdout.Len() != 0 {
					t.Errorf("printed %q", w.stdout.String())
				}
			})
		}
	}
}

func TestCheckComparesWhatIsEnforced(t *testing.T) {
	t.Parallel()
	ips := []netip.Addr{netip.MustParseAddr("fd00:10:244::7"), netip.MustParseAddr("10.244.0.7")}
	for name, tc := range map[string]struct {
		have attach.Attachment
		prev string
		code uint
		want string
	}{
		"as enforced":       {attach.Attachment{HostLink: theLink, IPs: ips}, fixture(t, "ptp"), 0, ""},
		"without a result":  {attach.Attachment{HostLink: theLink, IPs: ips}, "null", 0, ""},
		"an IP is missing":  {attach.Attachment{HostLink: theLink, IPs: ips[:1]}, fixture(t, "ptp"), 100, "10.244.0.7"},
		"other link":        {attach.Attachment{HostLink: attach.HostLink{Name: "veth9", Index: 12}, IPs: ips}, fixture(t, "ptp"), 100, "veth9"},
		"name was reused":   {attach.Attachment{HostLink: attach.HostLink{Name: theLink.Name, Index: 11}, IPs: ips}, fixture(t, "ptp"), 100, "index 11"},
		"broken prevResult": {attach.Attachment{HostLink: theLink, IPs: ips}, "[]", 6, "prevResult"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w world
			w.agent.have = tc.have
			err := w.funcs().Check(cmdArgs(conf(`,"prevResult":` + tc.prev)))
			if got := codeOf(t, err); got != tc.code || (err != nil && !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("code %d (%v), want %d about %q", got, err, tc.code, tc.want)
			}
			if w.stdout.Len() != 0 {
				t.Errorf("printed %q", w.stdout.String())
			}
		})
	}
}

func TestGC(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		conf string
		want []string
		code uint
	}{
		"absent":    {``, nil, 0},
		"null":      {`,"cni.dev/valid-attachments":null`, []string{"net"}, 0},
		"empty":     {`,"cni.dev/valid-attachments":[]`, []string{"net"}, 0},
		"list":      {`,"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"},{"containerID":"b","ifname":"eth0"}]`, []string{"net a/eth0 b/eth0"}, 0},
		"malformed": {`,"cni.dev/valid-attachments":{"a":1}`, nil, 7},
		"only the old key, which libcni writes too": {`,"cni.dev/attachments":[]`, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w world
			err := w.funcs().GC(&skel.CmdArgs{StdinData: []byte(conf(tc.conf))})
			if got := codeOf(t, err); got != tc.code {
				t.Errorf("code %d (%v), want %d", got, err, tc.code)
			}
			if diff := cmp.Diff(tc.want, w.agent.gc); diff != "" {
				t.Errorf("asked for (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDelNeedsOnlyTheKey(t *testing.T) {
	t.Parallel()
	for name, stdin := range map[string]string{
		"nothing else":      conf(""),
		"broken prevResult": conf(`,"prevResult":[]`),
		"broken options":    conf(`,"socket":"relative","timeout":7,"logFile":"x","args":3`),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w world
			args := cmdArgs(stdin)
			args.Netns, args.Args = "", "garbage;;="
			for range 2 {
				if err := w.funcs().Del(args); err != nil {
					t.Fatal(err)
				}
			}
			key := attach.Key{ContainerID: "c1", IfName: "eth0"}
			if diff := cmp.Diff([]attach.Key{key, key}, w.agent.detached); diff != "" {
				t.Errorf("detached (-want +got):\n%s", diff)
			}
			if w.agent.socket != agentapi.DefaultSocket {
				t.Errorf("dialed %q, want the default", w.agent.socket)
			}
			if bad := strings.Contains(stdin, "relative"); bad != strings.Contains(w.stderr.String(), "absolute path") {
				t.Errorf("stderr: %s", w.stderr.String())
			}
		})
	}
}

func TestDeadlines(t *testing.T) {
	t.Parallel()
	stdin := conf(`,"cni.dev/valid-attachments":[],"prevResult":` + fixture(t, "ptp"))
	for verb, tc := range map[string]struct {
		call func(skel.CNIFuncs) error
		want time.Duration
	}{
		"ADD":    {func(f skel.CNIFuncs) error { return f.Add(cmdArgs(stdin)) }, 10 * time.Second},
		"DEL":    {func(f skel.CNIFuncs) error { return f.Del(cmdArgs(stdin)) }, 2 * time.Second},
		"CHECK":  {func(f skel.CNIFuncs) error { return f.Check(cmdArgs(stdin)) }, time.Second},
		"STATUS": {func(f skel.CNIFuncs) error { return f.Status(cmdArgs(stdin)) }, 500 * time.Millisecond},
		"GC":     {func(f skel.CNIFuncs) error { return f.GC(cmdArgs(stdin)) }, 10 * time.Second},
	} {
		t.Run(verb, func(t *testing.T) {
			t.Parallel()
			var w world
			_ = tc.call(w.funcs()) // CHECK finds nothing enforced here
			if got := w.agent.deadline; got <= 0 || got > tc.want || got < tc.want*8/10 {
				t.Errorf("deadline in %v, want about %v", got, tc.want)
			}
		})
	}
}

func TestPanicIsACNIError(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	f := (&Plugin{Agent: func(string) agentapi.Agent { panic("boom") }, Stdout: &bytes.Buffer{}, Stderr: &stderr}).Funcs()
	err := f.Status(cmdArgs(conf("")))
	if codeOf(t, err) != 999 || !strings.Contains(err.Error(), "boom") || !strings.Contains(err.Error(), "cniplugin_test.go") {
		t.Errorf("error %v, want 999 with panic and stack", err)
	}
	if err := f.Del(cmdArgs(conf(""))); err != nil || !strings.Contains(stderr.String(), "boom") {
		t.Errorf("DEL: error %v, stderr %q, want success and the panic on stderr", err, stderr.String())
	}
}
