package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// needsFlush skips a test on a kernel that does not delete by filter.
func needsFlush(t *testing.T, table *Table) {
	t.Helper()
	err := table.forgets.forgetFlushed(addr("192.0.2.1"))
	if refused(err) {
		t.Skipf("the kernel deletes nothing by filter before Linux 6.12: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// contents returns the entries of a table.
func contents(t *testing.T, table *Table) []string {
	t.Helper()
	s, err := table.looks.socket()
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	if err := s.dump(t.Context(), unix.AF_UNSPEC, selection{}, func(e *entry) {
		list = append(list, (&made{orig: e.orig, reply: e.reply, zone: e.zone}).String())
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(list)
	return list
}

func (m *made) String() string { return fmt.Sprintf("%v %v zone %d", m.orig, m.reply, m.zone) }

// has reports whether one of the addresses is an end of the connection.
func (m *made) has(ips []netip.Addr) bool {
	return slices.ContainsFunc([]netip.Addr{m.orig.src, m.reply.src}, func(ip netip.Addr) bool { return slices.Contains(ips, ip) })
}

// neighbors returns an address and those that differ from it in one bit.
func neighbors(ip netip.Addr) []netip.Addr {
	out := []netip.Addr{ip}
	for bit := range ip.BitLen() {
		b := ip.AsSlice()
		b[bit/8] ^= 1 << (bit % 8)
		other, _ := netip.AddrFromSlice(b)
		out = append(out, other)
	}
	return out
}

// random returns n entries of addresses of a pool, no two with the same words.
func random(r *rand.Rand, pool []netip.Addr, n int) []made {
	host := func() netip.Addr { return pool[r.IntN(len(pool))] }
	list := make([]made, n)
	for i := range list {
		word := uint16(1024 + i)
		var m made
		switch proto := []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_ICMP}[r.IntN(4)]; proto {
		case unix.IPPROTO_ICMP:
			m = echo(host().String(), host().String(), word)
		default:
			m = pair(proto, host().String(), word, host().String(), 80)
		}
		m.state = uint8(r.IntN(9)) // 7 is TIME_WAIT
		if r.IntN(2) == 0 {        // DNAT
			m.reply.src = host()
		}
		if r.IntN(2) == 0 { // SNAT
			m.reply.dst = host()
		}
		switch r.IntN(4) {
		case 0:
			m.zone = 5
		case 1:
			m.orig.zone, m.orig.hasZone = 6, true
		case 2:
			m.reply.zone, m.reply.hasZone = 7, true
		}
		list[i] = m
	}
	return list
}

// TestForgetFlushed holds that flushes leave what a dump leaves, and both what they should.
func TestForgetFlushed(t *testing.T) {
	t.Parallel()
	flushed, dumped := newTable(t), newTable(t)
	needsFlush(t, flushed)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // a seed that repeats a failure
	pool, pool6 := neighbors(addr("10.1.2.3")), neighbors(addr("fd00::10:3"))
	all := append(random(r, pool, 1500), random(r, pool6, 500)...)
	create(t, flushed, all...)
	create(t, dumped, all...)
	for step := range 30 {
		var ips []netip.Addr
		switch r.IntN(8) {
		case 0: // too many to flush
			ips = []netip.Addr{pool[r.IntN(len(pool))], pool[r.IntN(len(pool))], pool[r.IntN(len(pool))], pool[r.IntN(len(pool))]}
		case 1:
			ips = []netip.Addr{pool[r.IntN(len(pool))], pool6[r.IntN(len(pool6))]}
		case 2:
			ips = []netip.Addr{pool6[r.IntN(len(pool6))]}
		case 3:
			ips = []netip.Addr{pool[r.IntN(len(pool))], pool[r.IntN(len(pool))]}
		default:
			ips = []netip.Addr{pool[r.IntN(len(pool))]}
		}
		if err := flushed.Forget(ips); err != nil || flushed.noFlush {
			t.Fatalf("%v: %v, refused %t", ips, err, flushed.noFlush)
		}
		if err := dumped.forgets.forgetDumped(addresses(ips), func(*entry) bool { return true }); err != nil {
			t.Fatal(err)
		}
		all = slices.DeleteFunc(all, func(m made) bool { return m.has(ips) })
		var want []string
		for i := range all {
			want = append(want, all[i].String())
		}
		slices.Sort(want)
		if d := cmp.Diff(want, contents(t, flushed)); d != "" {
			t.Fatalf("step %d, %v flushed (-want +got):\n%s", step, ips, d)
		}
		if d := cmp.Diff(want, contents(t, dumped)); d != "" {
			t.Fatalf("step %d, %v dumped (-want +got):\n%s", step, ips, d)
		}
	}
}

// TestForgetOneBit has an address in each place of an entry, and those that differ from it in one bit.
func TestForgetOneBit(t *testing.T) {
	t.Parallel()
	for ip, hosts := range map[netip.Addr][]string{
		addr("10.1.2.3"):   {"192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"},
		addr("fd00::10:3"): {"2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8::4"},
	} {
		for _, noFlush := range []bool{false, true} {
			table := newTable(t)
			table.noFlush = noFlush
			var all []made
			for i, other := range neighbors(ip) {
				for place := range 4 {
					m := pair(unix.IPPROTO_UDP, hosts[0], uint16(1024+i), hosts[1], uint16(1024+place))
					m.reply.src, m.reply.dst = addr(hosts[2]), addr(hosts[3])
					places := []*netip.Addr{&m.orig.src, &m.orig.dst, &m.reply.src, &m.reply.dst}
					*places[place] = other
					all = append(all, m)
				}
			}
			create(t, table, all...)
			if err := table.Forget([]netip.Addr{ip}); err != nil {
				t.Fatal(err)
			}
			var want []string
			for i, m := range all {
				if i != 0 && i != 2 { // where it comes from, and where it leads to
					want = append(want, m.String())
				}
			}
			slices.Sort(want)
			if d := cmp.Diff(want, contents(t, table)); d != "" {
				t.Errorf("%v, no flush %t (-want +got):\n%s", ip, noFlush, d)
			}
		}
	}
}

// TestFlushIgnored sends what is left of a flush for a kernel that does not know CTA_FILTER: it must be refused. So must be, before they are
// sent, flushes that would delete too much.
func TestFlushIgnored(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	create(t, table, pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80), pair(unix.IPPROTO_TCP, "fd00::1", 1001, "fd00::2", 80))
	before := contents(t, table)
	s, err := table.forgets.socket()
	if err != nil {
		t.Fatal(err)
	}
	ip := addr("10.0.0.1")
	for place, sel := range []selection{{origSrc: ip}, {origDst: ip}, {replySrc: ip}, {replyDst: ip}} {
		msg := sel.appendFlush(nil)
		if !slices.Equal(msg[:sizeofNfgenmsg], []byte{unix.AF_INET, 1, 0, 0}) {
			t.Errorf("%+v: nfgenmsg %x", sel, msg[:sizeofNfgenmsg])
		}
		tuple := uint16(ctaTupleOrig + place/2)
		list := attributes{rest: msg[sizeofNfgenmsg:]}
		if typ, data := list.next(); typ != tuple || len(data) != 12 {
			t.Errorf("%+v: attribute %d of %d bytes first, want a tuple", sel, typ, len(data))
		}
		without := msg[:len(msg)-len(list.rest)]
		typ, data := list.next()
		flags := attributes{rest: data}
		side, bits := flags.next()
		if typ != ctaFilter || side != tuple || !slices.Equal(bits, binary.NativeEndian.AppendUint32(nil, 1<<(place%2))) || len(flags.rest)+len(list.rest) != 0 {
			t.Errorf("%+v: filter %d: %d has bits %x, and more: %x, %x", sel, typ, side, bits, flags.rest, list.rest)
		}
		if err := ask(t, s, without); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%+v: without CTA_FILTER: %v, want EINVAL", sel, err)
		}
	}
	for _, sel := range []selection{{}, {origSrc: addr("fd00::1")}, {origSrc: ip, replySrc: addr("fd00::1")}} {
		if err := s.flush(sel); !errors.Is(err, errNotIPv4) {
			t.Errorf("%+v: %v", sel, err)
		}
	}
	if d := cmp.Diff(before, contents(t, table)); d != "" {
		t.Errorf("(-before +after):\n%s", d)
	}
}

// ask sends a message of deletion and returns the kernel's error.
func ask(t *testing.T, s *socket, payload []byte) error {
	t.Helper()
	m := s.begin(typeDelete, unix.NLM_F_ACK)
	s.out = append(s.out, payload...)
	s.end(m)
	if err := s.send(); err != nil {
		t.Fatal(err)
	}
	return s.answer()
}

// TestForgetChosen has kernels of all kinds flush, and holds when a dump follows.
func TestForgetChosen(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	a, b, c, a6 := addr("10.0.0.1"), addr("10.0.0.2"), addr("10.0.0.3"), addr("fd00::1")
	for _, tt := range []struct {
		name        string
		ips         []netip.Addr
		noFlush     bool
		flush, dump error
		flushed     bool
		dumped      bool
		wantNoFlush bool
	}{
		{name: "nothing"},
		{name: "one", ips: []netip.Addr{a}, flushed: true},
		{name: "two", ips: []netip.Addr{a, b}, flushed: true},
		{name: "three", ips: []netip.Addr{a, b, c}, dumped: true},
		{name: "one in IPv6", ips: []netip.Addr{a6}, dumped: true},
		{name: "one of each family", ips: []netip.Addr{a, a6}, dumped: true},
		{name: "known to refuse", ips: []netip.Addr{a}, noFlush: true, dumped: true, wantNoFlush: true},
		{name: "known to refuse, others", ips: []netip.Addr{a, b}, noFlush: true, dumped: true, wantNoFlush: true},
		{name: "refused", ips: []netip.Addr{a}, flush: unix.EINVAL, flushed: true, dumped: true, wantNoFlush: true},
		{name: "not supported", ips: []netip.Addr{a}, flush: unix.EOPNOTSUPP, flushed: true, dumped: true, wantNoFlush: true},
		{name: "no memory", ips: []netip.Addr{a}, flush: unix.ENOMEM, flushed: true, dumped: true},
		{name: "no ctnetlink", ips: []netip.Addr{a}, flush: unix.EINVAL, dump: unix.EINVAL, flushed: true, dumped: true},
		{name: "a dump that fails", ips: []netip.Addr{a, b, c}, dump: broken, dumped: true},
	} {
		var flushed, dumped bool
		noFlush, err := forget(addresses(tt.ips), tt.noFlush, func(ip netip.Addr) error {
			flushed = flushed || ip == a
			return tt.flush
		}, func(set map[netip.Addr]bool) error {
			dumped = maps.Equal(set, addresses(tt.ips))
			return tt.dump
		})
		if noFlush != tt.wantNoFlush || flushed != tt.flushed || dumped != tt.dumped || !errors.Is(err, tt.dump) {
			t.Errorf("%s: flushed %t, dumped %t, now no flush %t, %v", tt.name, flushed, dumped, noFlush, err)
		}
	}
}

// TestForgetMeanwhile holds that Forget does not wait for a look, that it is two messages then, and that it finds a new socket after a
// failure and after Close.
func TestForgetMeanwhile(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	if table.forgets.sock == nil {
		t.Error("New has opened one socket: the namespace's descriptor may be closed by now, or be another's")
	}
	needsFlush(t, table)
	m := pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80)
	create(t, table, m)
	done := make(chan error, 1)
	if err := table.Flows(t.Context(), Filter{}, func(Flow) {
		seq := table.forgets.sock.seq
		go func() { done <- table.Forget([]netip.Addr{addr("10.0.0.1")}) }()
		select {
		case err := <-done:
			if n := table.forgets.sock.seq - seq; err != nil || n != 2 {
				t.Errorf("Forget: %v, %d messages", err, n)
			}
		case <-time.After(10 * time.Second):
			t.Error("Forget waits for Flows")
		}
	}); err != nil {
		t.Fatal(err)
	}
	if list := contents(t, table); len(list) != 0 {
		t.Errorf("left: %v", list)
	}
	for _, spoil := range []func(){func() { table.forgets.sock.close() }, table.Close} {
		create(t, table, m)
		spoil()
		if err := table.Forget([]netip.Addr{addr("10.0.0.1")}); err != nil || table.noFlush {
			t.Errorf("with a new socket: %v, refused %t", err, table.noFlush)
		}
		if list := contents(t, table); len(list) != 0 {
			t.Errorf("left: %v", list)
		}
	}
	if table.Close(); table.looks.sock != nil || table.forgets.sock != nil {
		t.Error("a socket is open after Close")
	}
}
