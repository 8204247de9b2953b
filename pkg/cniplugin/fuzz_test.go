package cniplugin

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
)

// FuzzCall holds that whatever a runtime passes, a call ends without a panic, with a CNI error or with what its verb promises: DEL
// never fails, and an ADD that succeeds has told the daemon of addresses and printed the result that it was given.
func FuzzCall(f *testing.F) {
	for _, name := range []string{"aws", "azure", "bridge", "calico", "kindnet", "multi", "ptp"} {
		prev := string(seed(f, filepath.Join("testdata", name+".json")))
		f.Add(byte('A'), []byte(conf(`,"prevResult":`+prev)), cmdArgs("").Args, "eth0")
		f.Add(byte('C'), []byte(conf(`,"prevResult":`+prev)), "", "eth0")
	}
	for _, stdin := range []string{
		"", "null", "[]", `{"cniVersion":"0.3.1","name":"n","prevResult":{"ip4":{"ip":"1.2.3.4/5"}}}`,
		conf(`,"prevResult":{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.1/24"}}`), conf(`,"prevResult":{"ips":[{"address":"10.0.0.1/24","interface":-1}]}`),
		conf(`,"prevResult":{"interfaces":[null],"ips":[{"address":"::ffff:10.0.0.1/120","interface":0}]}`), conf(`,"prevResult":{"ips":[null]}`), conf(`,"prevResult":{"IPs":[null]}`),
		conf(`,"args":{"cni":{"labels":[{"key":"a","value":null}]}}`), conf(`,"cni.dev/valid-attachments":null`),
		conf(`,"cni.dev/valid-attachments":[null,{"containerID":"a","ifname":"b"}]`), conf(`,"socket":"relative","timeout":"-1s"`),
	} {
		for _, verb := range []byte("ACDGS") {
			f.Add(verb, []byte(stdin), "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b", "eth0")
		}
	}
	for _, args := range []string{";", "=", "K8S_POD_NAME", "K8S_POD_NAME=a", "IgnoreUnknown=2", "IgnoreUnknown=1;;", "K8S_POD_UID==", "A=b\x00;K8S_POD_NAME=\xff"} {
		f.Add(byte('A'), []byte(conf(`,"prevResult":{"ips":[{"address":"10.0.0.1/24"}]}`)), args, "")
	}
	f.Fuzz(func(t *testing.T, verb byte, stdin []byte, cniArgs, ifname string) {
		if c, _ := parseConfig(stdin); c.logFile != "" {
			t.Skip("would write to a file of the fuzzer's choice")
		}
		var w world
		call, is := w.funcs().Add, "ADD"
		switch verb {
		case 'C':
			call, is = w.funcs().Check, "CHECK"
		case 'D':
			call, is = w.funcs().Del, "DEL"
		case 'G':
			call, is = w.funcs().GC, "GC"
		case 'S':
			call, is = w.funcs().Status, "STATUS"
		}
		err := call(&skel.CmdArgs{ContainerID: "c1", Netns: "/run/netns/x", IfName: ifname, Args: cniArgs, StdinData: stdin})
		if err != nil {
			e, ok := errors.AsType[*types.Error](err)
			if !ok || e.Code == 0 || e.Code == types.ErrInternal || e.Msg == "" {
				t.Errorf("%s: %#v, want a CNI error that names the input at fault", is, err)
			}
		}
		if strings.Contains(w.stderr.String(), "panicked") {
			t.Errorf("%s panicked: %s", is, w.stderr.String())
		}
		if is == "DEL" && (err != nil || len(w.agent.detached) != 1) {
			t.Errorf("DEL: %v, detached %v, want success and one", err, w.agent.detached)
		}
		if added := is == "ADD" && err == nil; added != (len(w.agent.attached) == 1) || added != (w.stdout.Len() > 0) {
			t.Errorf("%s: %v, attached %v, printed %q", is, err, w.agent.attached, w.stdout.String())
		} else if added {
			checkAdded(t, &w)
		}
		if _, listed := parsed(stdin)[validKey]; len(w.agent.gc) > 0 && (is != "GC" || !listed) {
			t.Errorf("%s without a list asked the daemon to forget: %q", is, w.agent.gc)
		}
	})
}

func seed(f *testing.F, name string) []byte {
	f.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		f.Fatal(err)
	}
	return data
}

func parsed(stdin []byte) map[string]json.RawMessage {
	var raw map[string]json.RawMessage
	_ = json.Unmarshal(stdin, &raw) // not an object: no keys
	return raw
}

func checkAdded(t *testing.T, w *world) {
	t.Helper()
	a := w.agent.attached[0]
	if len(a.IPs) == 0 {
		t.Error("attached without an address")
	}
	if a.Pod.Named() == (a.Pod.Namespace == "" || a.Pod.Name == "") {
		t.Errorf("pod %+v is half named", a.Pod)
	}
	if !json.Valid(w.stdout.Bytes()) {
		t.Errorf("printed %q, which is no JSON", w.stdout.String())
	}
}
