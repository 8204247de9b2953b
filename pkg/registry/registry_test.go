package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/podwall/podwall/pkg/attach"
)

func attachment(id, ifname, ip string) attach.Attachment {
	return attach.Attachment{
		Network: "net", Key: attach.Key{ContainerID: id, IfName: ifname}, Pod: attach.PodRef{Namespace: "ns", Name: "pod", UID: "u"},
		IPs: []netip.Addr{netip.MustParseAddr(ip)}, HostLink: attach.HostLink{Name: "veth0", Index: 3}, Labels: map[string]string{"a": "b"},
	}
}

func open(t *testing.T, dir string, unreadable int) *Registry {
	t.Helper()
	r, bad, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(bad) != unreadable {
		t.Fatalf("%d unreadable files, want %d: %v", len(bad), unreadable, bad)
	}
	return r
}

func put(t *testing.T, r *Registry, a attach.Attachment, fresh bool) Entry {
	t.Helper()
	e, isNew, err := r.Put(a)
	if err != nil || isNew != fresh {
		t.Fatalf("Put(%s): new %v, %v, want %v", a.Key, isNew, err, fresh)
	}
	return e
}

func TestRegistryOutlivesItsProcess(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "attachments")
	r := open(t, dir, 0)
	a := put(t, r, attachment("a-b", "c", "10.0.0.1"), true)
	b := put(t, r, attachment("a", "b-c", "fd00::1"), true) // the same letters, another key
	put(t, r, attachment("a", "b-c", "fd00::1"), false)
	if a.Seq >= b.Seq {
		t.Errorf("ADDs are not in order: %d, %d", a.Seq, b.Seq)
	}
	if _, ok, err := r.Detach(a.Key); !ok || err != nil {
		t.Fatalf("Detach: %v, %v", ok, err)
	}
	if _, ok, err := r.Detach(attach.Key{ContainerID: "nobody", IfName: "eth0"}); ok || err != nil {
		t.Errorf("Detach of nobody: %v, %v", ok, err)
	}

	again := open(t, dir, 0)
	if diff := cmp.Diff(r.Entries(), again.Entries(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("entries after a restart (-before +after):\n%s", diff)
	}
	if e, ok := again.Get(a.Key); !ok || !e.Detached {
		t.Errorf("DEL was lost: %+v", e)
	}
	if e := put(t, again, attachment("new", "eth0", "10.0.0.1"), true); e.Seq <= b.Seq {
		t.Errorf("a new ADD is not the newest: %d", e.Seq)
	}
	for _, e := range again.Entries() {
		if err := again.Remove(e.Key, e.Seq); err != nil {
			t.Error(err)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("files left: %v, %v", left, err)
	}
}

func TestReADDAfterDELIsNew(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), 0)
	e := put(t, r, attachment("a", "eth0", "10.0.0.1"), true)
	if _, _, err := r.Detach(e.Key); err != nil {
		t.Fatal(err)
	}
	if e := put(t, r, attachment("a", "eth0", "10.0.0.1"), true); e.Detached {
		t.Error("it is still detached")
	}
}

// TestSetOpened holds that the mark is of one ADD, and outlives the process.
func TestSetOpened(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir, 0)
	mark := func(r *Registry, e Entry) {
		t.Helper()
		if err := r.SetOpened(e.Key, e.Seq, true); err != nil {
			t.Error(err)
		}
	}
	want := func(r *Registry, opened, detached bool) {
		t.Helper()
		for name, r := range map[string]*Registry{"memory": r, "file": open(t, dir, 0)} {
			if e, ok := r.Get(attachment("a", "eth0", "10.0.0.1").Key); !ok || e.Opened != opened || e.Detached != detached {
				t.Errorf("%s: %+v, %v, want opened %v, detached %v", name, e, ok, opened, detached)
			}
		}
	}
	e := put(t, r, attachment("a", "eth0", "10.0.0.1"), true)
	want(r, false, false)
	mark(r, e)
	want(r, true, false)
	if err := r.SetOpened(e.Key, e.Seq, false); err != nil {
		t.Error(err)
	}
	want(r, false, false)
	mark(r, e)
	put(t, r, attachment("a", "eth0", "10.0.0.1"), false) // repeated: the same ADD
	r = open(t, dir, 0)
	want(r, true, false)
	if _, _, err := r.Detach(e.Key); err != nil {
		t.Fatal(err)
	}
	young := put(t, r, attachment("a", "eth0", "10.0.0.1"), true)
	want(r, false, false)
	mark(r, e) // of the former ADD
	want(r, false, false)
	if _, _, err := r.Detach(e.Key); err != nil {
		t.Fatal(err)
	}
	mark(r, young) // DEL was faster
	want(r, false, true)
	if err := r.Remove(young.Key, young.Seq); err != nil {
		t.Fatal(err)
	}
	mark(r, young)
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("files left: %v, %v", left, err)
	}
}

// BenchmarkRegister is what an ADD writes, without and with the mark that it was finished. It belongs on a tmpfs (TMPDIR=/dev/shm).
func BenchmarkRegister(b *testing.B) {
	for _, marked := range []bool{false, true} {
		b.Run(fmt.Sprintf("marked=%v", marked), func(b *testing.B) {
			r, _, err := Open(b.TempDir())
			if err != nil {
				b.Fatal(err)
			}
			a := attachment("a", "eth0", "10.0.0.1")
			for i := 0; b.Loop(); i++ {
				a.HostLink.Index = 3 + i // another ADD
				e, fresh, err := r.Put(a)
				if err != nil || !fresh {
					b.Fatal(fresh, err)
				}
				if !marked {
					continue
				}
				if err := r.SetOpened(e.Key, e.Seq, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestUnreadableFilesHarmNobody(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir, 0)
	put(t, r, attachment("good", "eth0", "10.0.0.1"), true)
	for name, text := range map[string]string{"half.json": `{"network":"n"`, "empty.json": "", "invalid.json": `{"network":"n"}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(open(t, dir, 3).Entries()); n != 1 {
		t.Errorf("%d entries, want 1", n)
	}
}

func TestOwners(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), 0)
	put(t, r, attachment("old", "eth0", "10.0.0.1"), true)
	young := put(t, r, attachment("young", "eth0", "10.0.0.1"), true)
	want := map[netip.Addr]attach.Key{netip.MustParseAddr("10.0.0.1"): young.Key}
	if diff := cmp.Diff(want, Owners(r.Entries()), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Error(diff)
	}
}

func TestLock(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "daemon.lock")
	first, err := Lock(t.Context(), path, func() { t.Error("waited for nobody") })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := Lock(ctx, path, cancel); !errors.Is(err, context.Canceled) {
		t.Errorf("second lock: %v, want that it waits until it is cancelled", err)
	}
	second, err := Lock(t.Context(), path, func() { _ = first.Close() })
	if err != nil {
		t.Fatalf("the lock did not fall with its holder: %v", err)
	}
	_ = second.Close()
}

// TestUnfinished holds that what a daemon did not come to rename is removed by the next, and nothing else.
func TestUnfinished(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	unfinished, other := filepath.Join(dir, ".c-eth0.1.json123456"), filepath.Join(dir, ".keep")
	for _, f := range []string{unfinished, other} {
		if err := os.WriteFile(f, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, bad, err := Open(dir); err != nil || len(bad) > 0 {
		t.Fatal(bad, err)
	}
	if _, err := os.Stat(unfinished); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v, want that it is gone", unfinished, err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Error(err)
	}
}
