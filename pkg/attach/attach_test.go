package attach

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func valid() Attachment {
	return Attachment{
		Network:  "k8s-pod-network",
		Key:      Key{ContainerID: "0a1b2c", IfName: "eth0"},
		Pod:      PodRef{Namespace: "default", Name: "web", UID: "u1"},
		IPs:      []netip.Addr{netip.MustParseAddr("10.244.0.7"), netip.MustParseAddr("fd00:10:244::7")},
		HostLink: HostLink{Name: "veth1", Index: 12},
		Labels:   map[string]string{"app": "web"},
		Netns:    "/run/netns/x",
	}
}

func TestAttachmentValidate(t *testing.T) {
	t.Parallel()
	ip := func(s string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(s)} }
	for name, tc := range map[string]struct {
		change func(*Attachment)
		want   string // part of the error; empty: valid
	}{
		"complete":            {func(*Attachment) {}, ""},
		"pod without uid":     {func(a *Attachment) { a.Pod.UID = "" }, ""},
		"no pod at all":       {func(a *Attachment) { a.Pod = PodRef{} }, ""},
		"pod without name":    {func(a *Attachment) { a.Pod.Name = "" }, "pod"},
		"pod of a uid only":   {func(a *Attachment) { a.Pod = PodRef{UID: "u1"} }, "pod"},
		"no network":          {func(a *Attachment) { a.Network = "" }, "network"},
		"network as a path":   {func(a *Attachment) { a.Network = "../x" }, "network"},
		"container as a path": {func(a *Attachment) { a.ContainerID = "../x" }, "containerID"},
		"long container":      {func(a *Attachment) { a.ContainerID = strings.Repeat("a", 201) }, "containerID"},
		"no container":        {func(a *Attachment) { a.ContainerID = "" }, "containerID"},
		"interface as a path": {func(a *Attachment) { a.IfName = "a/b" }, "ifname"},
		"dots as interface":   {func(a *Attachment) { a.IfName = ".." }, "ifname"},
		"long interface":      {func(a *Attachment) { a.IfName = strings.Repeat("e", 16) }, "ifname"},
		"no IP":               {func(a *Attachment) { a.IPs = nil }, "ips"},
		"zero IP":             {func(a *Attachment) { a.IPs = []netip.Addr{{}} }, "ips"},
		"mapped IP":           {func(a *Attachment) { a.IPs = ip("::ffff:10.0.0.1") }, "ips"},
		"zoned IP":            {func(a *Attachment) { a.IPs = ip("fe80::1%eth0") }, "ips"},
		"unspecified IP":      {func(a *Attachment) { a.IPs = ip("::") }, "ips"},
		"loopback IP":         {func(a *Attachment) { a.IPs = ip("127.0.0.1") }, "ips"},
		"multicast IP":        {func(a *Attachment) { a.IPs = ip("ff02::1") }, "ips"},
		"no link name":        {func(a *Attachment) { a.HostLink.Name = "" }, "hostLink name"},
		"no link index":       {func(a *Attachment) { a.HostLink.Index = 0 }, "hostLink index"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := valid()
			tc.change(&a)
			err := a.Validate()
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("valid attachment refused: %v", err)
			case tc.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tc.want)):
				t.Errorf("error %v, want one about %q", err, tc.want)
			}
		})
	}
}

func TestValidateReportsEverything(t *testing.T) {
	t.Parallel()
	err := new(Attachment).Validate()
	for _, want := range []string{"containerID", "ifname", "network", "ips", "hostLink name", "hostLink index"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not mention %s", err, want)
		}
	}
}

func TestJSONRoundTrip(t *testing.T) {
	t.Parallel()
	want := valid()
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	// The names are the socket's contract.
	for _, key := range []string{`"network"`, `"containerID"`, `"ifname"`, `"pod"`, `"namespace"`, `"name"`, `"uid"`, `"ips"`, `"hostLink"`, `"index"`, `"labels"`, `"netns"`} {
		if !strings.Contains(string(data), key) {
			t.Errorf("%s has no key %s", data, key)
		}
	}
	var got Attachment
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("after JSON (-want +got):\n%s", diff)
	}
}

func TestCompareSortsByContainerThenInterface(t *testing.T) {
	t.Parallel()
	keys := []Key{{"b", "eth0"}, {"a", "net1"}, {"a", "eth0"}}
	slices.SortFunc(keys, Compare)
	if diff := cmp.Diff([]Key{{"a", "eth0"}, {"a", "net1"}, {"b", "eth0"}}, keys); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
}
