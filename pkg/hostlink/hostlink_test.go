package hostlink

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/podwall/podwall/pkg/attach"
)

// space is a network namespace that lives as long as its file descriptor.
type space struct {
	t    *testing.T
	ns   netns.NsHandle
	link *netlink.Handle
}

func (s space) path() string { return fmt.Sprintf("/proc/self/fd/%d", int(s.ns)) }

// newSpace makes an empty namespace. The thread that entered it ends with its goroutine.
func newSpace(t *testing.T) space {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	type result struct {
		ns  netns.NsHandle
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread()
		ns, err := netns.New()
		made <- result{ns, err}
	}()
	r := <-made
	if r.err != nil {
		t.Fatal(r.err)
	}
	h, err := netlink.NewHandleAt(r.ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close(); r.ns.Close() })
	return space{t, r.ns, h}
}

// find calls Find on a thread inside the namespace.
func (s space) find(netnsPath, ifname string, candidates ...string) (attach.HostLink, error) {
	s.t.Helper()
	var link attach.HostLink
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err = netns.Set(s.ns); err == nil {
			link, err = Find(s.t.Context(), netnsPath, ifname, candidates)
		}
	}()
	<-done
	return link, err
}

// index returns a link's index.
func (s space) index(name string) int {
	s.t.Helper()
	l, err := s.link.LinkByName(name)
	if err != nil {
		s.t.Fatalf("link %s: %v", name, err)
	}
	return l.Attrs().Index
}

// veth makes a pair whose first end, with the given index (0: any), is here and whose other end is in another namespace.
func (s space) veth(name string, index int, other space, peer string) {
	s.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = name, index
	if err := s.link.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(other.ns)}); err != nil {
		s.t.Fatalf("add veth %s: %v", name, err)
	}
}

func TestFindVeth(t *testing.T) {
	t.Parallel()
	host, pod, pod2 := newSpace(t), newSpace(t), newSpace(t)
	host.veth("vethother", 0, pod, "eth1")
	host.veth("vethpod2", 0, pod2, "eth0")
	host.veth("vethpod", 0, pod, "eth0")
	for ifname, name := range map[string]string{"eth0": "vethpod", "eth1": "vethother"} {
		// Candidates must not matter while the sandbox can be read.
		got, err := host.find(pod.path(), ifname, "vethpod2")
		if want := (attach.HostLink{Name: name, Index: host.index(name)}); err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", ifname, got, err, want)
		}
	}
	if got, err := host.find(pod2.path(), "eth0"); err != nil || got.Name != "vethpod2" {
		t.Errorf("second pod: %+v, %v, want vethpod2", got, err)
	}
}

func TestFindRefusesAPeerInAThirdNamespace(t *testing.T) {
	t.Parallel()
	host, pod, third, victim := newSpace(t), newSpace(t), newSpace(t), newSpace(t)
	// The host has a link with the index that the pod's peer has in the third namespace. It belongs to another pod, whose eth0
	// has the same index as this pod's: the indexes are mutual by accident.
	pod.veth("eth0", 5, third, "far")
	far, err := third.link.LinkByName("far")
	if err != nil {
		t.Fatal(err)
	}
	victim.veth("eth0", 5, victim, "tmp")
	tmp, err := victim.link.LinkByName("tmp")
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.link.LinkSetName(tmp, "vethvictim"); err != nil {
		t.Fatal(err)
	}
	if err := victim.link.LinkSetNsFd(tmp, int(host.ns)); err != nil {
		t.Fatal(err)
	}
	if got := host.index("vethvictim"); got != far.Attrs().Index {
		t.Fatalf("the accident was not arranged: host link %d, far end %d", got, far.Attrs().Index)
	}
	if got, err := host.find(pod.path(), "eth0"); !errors.Is(err, ErrNoHostLink) || !strings.Contains(err.Error(), "third") {
		t.Errorf("got %+v, %v, want ErrNoHostLink about a third namespace", got, err)
	}
	if got, err := host.find(victim.path(), "eth0"); err != nil || got.Name != "vethvictim" {
		t.Errorf("the owner of the link: %+v, %v", got, err)
	}

	// Nothing in the host has the far end's index.
	lone := newSpace(t)
	lone.veth("eth0", 0, third, "far2")
	if got, err := newSpace(t).find(lone.path(), "eth0"); !errors.Is(err, ErrNoHostLink) {
		t.Errorf("no such index: %+v, %v, want ErrNoHostLink", got, err)
	}
	// Both ends in the pod.
	both := newSpace(t)
	both.veth("eth0", 0, both, "eth9")
	if got, err := host.find(both.path(), "eth0"); !errors.Is(err, ErrNoHostLink) {
		t.Errorf("both ends in the sandbox: %+v, %v, want ErrNoHostLink", got, err)
	}
}

func TestFindWithoutHostSide(t *testing.T) {
	t.Parallel()
	host, pod, other := newSpace(t), newSpace(t), newSpace(t)
	host.veth("uplink", 0, other, "far")
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.Namespace = "eth0", host.index("uplink"), netlink.NsFd(pod.ns)
	if err := host.link.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
		t.Fatal(err)
	}
	_, err := host.find(pod.path(), "eth0", "uplink")
	if !errors.Is(err, ErrNoHostLink) {
		t.Fatalf("macvlan: %v, want ErrNoHostLink", err)
	}
	for _, part := range []string{"eth0", "macvlan", "use bridge, ptp", "remove podwall from this network"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
	if _, err := host.find(pod.path(), "net1"); !errors.Is(err, ErrNoHostLink) || !strings.Contains(err.Error(), "net1") {
		t.Errorf("no such interface: %v, want ErrNoHostLink naming it", err)
	}
	if _, err := host.find(pod.path(), "lo"); !errors.Is(err, ErrNoHostLink) {
		t.Errorf("lo: %v, want ErrNoHostLink", err)
	}
}

func TestFindBadNetns(t *testing.T) {
	t.Parallel()
	host, pod := newSpace(t), newSpace(t)
	host.veth("vethpod", 0, pod, "eth0")
	host.veth("vethpod2", 0, pod, "eth1")
	host.veth("local", 0, host, "local2")
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		path       string
		candidates []string
		want       string // the link; empty: ErrNetns
	}{
		"missing":                            {"/run/netns/podwall-none", []string{"vethpod"}, ""},
		"empty":                              {"", []string{"vethpod"}, ""},
		"the host's own":                     {host.path(), []string{"vethpod"}, ""},
		"unreadable":                         {file, nil, ""},
		"unreadable, one candidate":          {file, []string{"cni0", "vethpod", "lo", "dummy1"}, "vethpod"},
		"unreadable, several candidates":     {file, []string{"vethpod", "vethpod2"}, ""},
		"unreadable, candidate of this node": {file, []string{"local"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := host.find(tc.path, "eth0", tc.candidates...)
			if tc.want == "" && !errors.Is(err, ErrNetns) {
				t.Errorf("got %+v, %v, want ErrNetns", got, err)
			}
			if tc.want != "" && (err != nil || got.Name != tc.want || got.Index != host.index(tc.want)) {
				t.Errorf("got %+v, %v, want %s", got, err, tc.want)
			}
		})
	}
}

// netkit is missing from many kernels, so its rule is tested on values.
func TestMutual(t *testing.T) {
	t.Parallel()
	veth := func(index, parent, nsid int) netlink.Link {
		return &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Index: index, ParentIndex: parent, NetNsID: nsid}}
	}
	netkit := func(index, parent, nsid int) netlink.Link {
		return &netlink.Netkit{LinkAttrs: netlink.LinkAttrs{Index: index, ParentIndex: parent, NetNsID: nsid}}
	}
	macvlan := func(index, parent, nsid int) netlink.Link {
		return &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Index: index, ParentIndex: parent, NetNsID: nsid}}
	}
	for name, tc := range map[string]struct {
		in, out netlink.Link
		nsid    int
		want    bool
	}{
		"veth":             {veth(2, 9, 0), veth(9, 2, 3), 3, true},
		"netkit":           {netkit(2, 9, 0), netkit(9, 2, 3), 3, true},
		"types differ":     {veth(2, 9, 0), netkit(9, 2, 3), 3, false},
		"macvlan":          {macvlan(2, 9, 0), macvlan(9, 2, 3), 3, false},
		"other peer":       {veth(2, 9, 0), veth(9, 4, 3), 3, false},
		"other namespace":  {veth(2, 9, 0), veth(9, 2, 4), 3, false},
		"peer on the host": {veth(2, 9, 0), veth(9, 2, -1), 3, false},
		"no id":            {veth(2, 9, 0), veth(9, 2, -1), -1, false},
	} {
		if got := mutual(tc.in, tc.out, tc.nsid); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}
