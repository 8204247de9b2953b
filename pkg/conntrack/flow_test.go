package conntrack

import (
	"bytes"
	stdcmp "cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// seen returns the tuples that the router's forward hook has noted.
func (b *testbed) seen(t *testing.T) []string {
	t.Helper()
	var out []byte
	in(t, b.router, func() error {
		var err error
		out, err = exec.Command("nft", "-nn", "-j", "list", "sets").Output()
		return err
	})
	var listing struct {
		Nftables []struct {
			Set *struct {
				Elem []struct{ Concat []any }
			}
		}
	}
	d := json.NewDecoder(bytes.NewReader(out))
	d.UseNumber()
	if err := d.Decode(&listing); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	var list []string
	for _, o := range listing.Nftables {
		if o.Set == nil {
			continue
		}
		for _, e := range o.Set.Elem {
			words := make([]string, len(e.Concat))
			for i, v := range e.Concat {
				words[i] = fmt.Sprint(v)
			}
			if len(words) == 3 { // no ports
				words = []string{words[0], words[1], "0", words[2], "0"}
			}
			list = append(list, fmt.Sprintf("%s %s>%s", words[0], net.JoinHostPort(words[1], words[2]), net.JoinHostPort(words[3], words[4])))
		}
	}
	slices.Sort(list)
	return list
}

func text(f Flow) string {
	s := fmt.Sprintf("%d %s>%s", f.Proto, f.Src, f.Dst)
	if f.OrigDst.IsValid() {
		s += " was " + f.OrigDst.String()
	}
	return s
}

func flows(t testing.TB, table *Table, filter Filter) []Flow {
	t.Helper()
	var list []Flow
	if err := table.Flows(t.Context(), filter, func(f Flow) { list = append(list, f) }); err != nil {
		t.Fatal(err)
	}
	return list
}

// texts returns the flows of the testbed's client; the router has some of its own.
func texts(list []Flow) []string {
	var out []string
	for _, f := range list {
		if ip := f.Src.Addr(); netip.MustParsePrefix("10.1.0.0/24").Contains(ip) || netip.MustParsePrefix("fd01::/64").Contains(ip) {
			out = append(out, text(f))
		}
	}
	slices.Sort(out)
	return out
}

// connect opens a connection through the router that stays open.
func (b *testbed) connect(t *testing.T, from, to string) {
	t.Helper()
	for _, host := range []string{"10.2.0.2:5000", "[fd02::2]:5000"} {
		in(t, b.server, func() error {
			l, err := net.Listen("tcp", host)
			if errors.Is(err, unix.EADDRINUSE) {
				return nil
			}
			t.Cleanup(func() { _ = l.Close() })
			return err
		})
	}
	in(t, b.client, func() error {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 5 * time.Second}
		c, err := d.DialContext(t.Context(), "tcp", to)
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
		return err
	})
}

// ping sends one echo request and waits for the reply.
func (b *testbed) ping(t *testing.T, from, to string) {
	t.Helper()
	network, m := "ip4:icmp", icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: 77, Seq: 1}}
	if strings.Contains(from, ":") {
		network, m.Type = "ip6:ipv6-icmp", ipv6.ICMPTypeEchoRequest
	}
	in(t, b.client, func() error {
		c, err := net.DialIP(network, &net.IPAddr{IP: net.ParseIP(from)}, &net.IPAddr{IP: net.ParseIP(to)})
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		packet, err := m.Marshal(nil) // of ICMPv6 the kernel writes the checksum
		if err != nil {
			return err
		}
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		if _, err := c.Write(packet); err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 100))
		return err
	})
}

func TestFlows(t *testing.T) {
	t.Parallel()
	b := newTestbed(t)
	b.serve(t)
	b.talk(t, "10.1.0.2", "10.2.0.2")
	b.talk(t, "10.1.0.3", vip)
	b.talk(t, masked, "10.2.0.2")
	b.talk(t, "fd01::2", "fd02::2")
	b.talk(t, "fd01::3", vip6)
	b.connect(t, "10.1.0.2", "10.2.0.2:5000")
	b.connect(t, "10.1.0.3", vip+":80")
	b.connect(t, masked, "10.2.0.2:5000")
	b.connect(t, "fd01::2", "[fd02::2]:5000")
	b.ping(t, "10.1.0.2", "10.2.0.2")
	b.ping(t, "10.1.0.3", vip)
	b.ping(t, masked, "10.2.0.2")
	b.ping(t, "fd01::2", "fd02::2")
	b.ping(t, "fd01::3", vip6)

	list := flows(t, b.table, Filter{})
	var now []string
	for _, s := range texts(list) {
		now = append(now, strings.Split(s, " was ")[0])
	}
	if d := cmp.Diff(b.seen(t), now); d != "" {
		t.Errorf("the forward hook (-) and conntrack (+) differ:\n%s", d)
	}
	if len(now) != 14 {
		t.Errorf("%d flows: %q", len(now), now)
	}

	was := map[string]string{}
	for _, f := range list {
		if f.OrigDst.IsValid() {
			was[fmt.Sprintf("%d %s>%s", f.Proto, f.Src.Addr(), f.Dst)] = f.OrigDst.String()
		}
		if f.Proto == unix.IPPROTO_TCP && (f.TCPState != 3 || f.Status&(SeenReply|Assured|Confirmed) != SeenReply|Assured|Confirmed) {
			t.Errorf("%s: TCP state %d, status %#x of an open connection", text(f), f.TCPState, f.Status)
		}
		if f.Proto == unix.IPPROTO_ICMP && (f.TCPState != 0 || f.Status&(SeenReply|Assured|Confirmed) != SeenReply|Confirmed) {
			t.Errorf("%s: TCP state %d, status %#x of a ping", text(f), f.TCPState, f.Status)
		}
	}
	if d := cmp.Diff(map[string]string{
		"17 10.1.0.3>10.2.0.3:5000": vip + ":5000",
		"6 10.1.0.3>10.2.0.2:5000":  vip + ":80",
		"1 10.1.0.3>10.2.0.3:0":     vip + ":0",
		"17 fd01::3>[fd02::2]:5000": "[" + vip6 + "]:5000",
		"58 fd01::3>[fd02::2]:0":    "[" + vip6 + "]:0",
	}, was); d != "" {
		t.Errorf("destinations before DNAT (-want +got):\n%s", d)
	}

	for _, filter := range []Filter{
		{Src: addr("10.1.0.2")},
		{Src: addr("10.1.0.3")},
		{Src: addr("10.2.0.2")}, // only ever a server
		{Src: addr("fd01::2")},
		{Src: addr("fd02::2")},
		{Dst: addr("10.2.0.2")},
		{Dst: addr("10.2.0.3")}, // through the VIP only
		{Dst: addr(vip)},        // never what the forward hook sees
		{Dst: addr("10.1.0.2")}, // only ever a client
		{Dst: addr("fd02::2")},
		{Dst: addr("fd01::2")},
		{Src: addr(routerIP)},
		{Src: addr("10.1.0.2"), Dst: addr("10.2.0.2")},
		{Src: addr("10.1.0.3"), Dst: addr("10.2.0.3")},
		{Src: addr("10.1.0.2"), Dst: addr("10.2.0.3")},
		{Src: addr("fd01::3"), Dst: addr("fd02::2")},
		{Src: addr("10.1.0.2"), Dst: addr("fd02::2")},
		{Src: addr("::ffff:10.1.0.2")},
		{Src: addr("fe80::1%eth0")},
	} {
		var want []string
		for _, s := range texts(list) {
			var proto int
			var src, dst string
			if _, err := fmt.Sscanf(strings.Replace(s, ">", " ", 1), "%d %s %s", &proto, &src, &dst); err != nil {
				t.Fatal(err)
			}
			if (!filter.Src.IsValid() || filter.Src.Unmap() == netip.MustParseAddrPort(src).Addr()) &&
				(!filter.Dst.IsValid() || filter.Dst == netip.MustParseAddrPort(dst).Addr()) {
				want = append(want, s)
			}
		}
		fresh, err := New(Config{NetNS: int(b.router)})
		if err != nil {
			t.Fatal(err)
		}
		defer fresh.Close()
		unfiltered, err := New(Config{NetNS: int(b.router)})
		if err != nil {
			t.Fatal(err)
		}
		defer unfiltered.Close()
		unfiltered.filters[unix.AF_INET], unfiltered.filters[unix.AF_INET6] = useless, useless
		for name, table := range map[string]*Table{"first": fresh, "later": b.table, "whole dump": unfiltered} {
			if d := cmp.Diff(want, texts(flows(t, table, filter))); d != "" {
				t.Errorf("%s, %v (-want +got):\n%s", name, filter, d)
			}
		}
	}
	if got := b.table.filters[unix.AF_INET]; got != works {
		t.Errorf("the kernel's filter in IPv4 is in state %d: there is nothing wrong with it since Linux 5.8", got)
	}
	if got := b.table.filters[unix.AF_INET6]; got == untried {
		t.Error("the kernel's filter in IPv6 was used and nothing is known of it")
	}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// made is an entry that a test has the kernel create.
type made struct {
	orig, reply tuple
	zone        uint16
	state       uint8 // of TCP; 0 is ESTABLISHED
}

// pair returns an entry without NAT.
func pair(proto uint8, src string, sport uint16, dst string, dport uint16) made {
	orig := tuple{src: addr(src), dst: addr(dst), proto: proto, srcWord: sport, dstWord: dport}
	return made{orig: orig, reply: tuple{src: orig.dst, dst: orig.src, proto: proto, srcWord: dport, dstWord: sport}}
}

// echo returns the entry of a ping.
func echo(src, dst string, id uint16) made {
	request, reply, proto := uint16(8), uint16(0), uint8(unix.IPPROTO_ICMP)
	if !addr(src).Is4() {
		request, reply, proto = 128, 129, unix.IPPROTO_ICMPV6
	}
	m := pair(proto, src, id, dst, request<<8)
	m.reply.srcWord, m.reply.dstWord = id, reply<<8
	return m
}

// create has the kernel make entries.
func create(t testing.TB, table *Table, list ...made) {
	t.Helper()
	const ctaTimeout = 7
	s, err := table.looks.socket()
	if err != nil {
		t.Fatal(err)
	}
	for batch := range slices.Chunk(list, 500) {
		for i, e := range batch {
			flags := uint16(unix.NLM_F_CREATE | unix.NLM_F_EXCL)
			if i == len(batch)-1 {
				flags |= unix.NLM_F_ACK
			}
			m := s.begin(typeNew, flags)
			s.out = append(s.out, family(e.orig.src), unix.NFNETLINK_V0, 0, 0)
			s.out = appendTuple(s.out, ctaTupleOrig, &e.orig)
			s.out = appendTuple(s.out, ctaTupleReply, &e.reply)
			if e.zone != 0 {
				s.out = appendBE16(s.out, ctaZone, e.zone)
			}
			s.out = appendBE32(s.out, ctaTimeout, 3600)
			s.out = appendBE32(s.out, ctaStatus, uint32(SeenReply|Assured|Confirmed))
			if e.orig.proto == unix.IPPROTO_TCP {
				s.out = appendNested(s.out, ctaProtoinfo, func(b []byte) []byte {
					return appendNested(b, ctaProtoinfoTCP, func(b []byte) []byte { return appendBytes(b, ctaProtoinfoTCPState, stdcmp.Or(e.state, 3)) })
				})
			}
			s.end(m)
		}
		if err := s.send(); err != nil {
			t.Fatal(err)
		}
		b, err := s.receive(false)
		if err != nil {
			t.Fatal(err)
		}
		h, payload, _, err := split(b)
		if err != nil || h.typ != unix.NLMSG_ERROR {
			t.Fatalf("answer %+v, %v", h, err)
		}
		if no, ok := errno(payload); no != 0 || !ok {
			t.Fatalf("create entry %d of %d: %v", h.seq-(s.seq-uint32(len(batch))+1), len(batch), no)
		}
	}
}

// newTable returns the empty table of a new namespace.
func newTable(t testing.TB) *Table {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace and entries in its conntrack table")
	}
	ns := newNS(t)
	table, err := New(Config{NetNS: int(ns)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(table.Close)
	return table
}

func TestDelete(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	dnat := pair(unix.IPPROTO_TCP, "10.0.0.1", 1003, "10.9.9.9", 80)
	dnat.reply.src, dnat.reply.srcWord = addr("10.0.0.2"), 8080
	zoned := pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80)
	zoned.zone = 5
	oneWay := pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80)
	oneWay.orig.zone, oneWay.orig.hasZone = 6, true
	oneWay.reply.dstWord = 2001 // its replies are in the same zone as those of the first
	backZone := pair(unix.IPPROTO_TCP, "10.0.0.1", 1004, "10.0.0.2", 80)
	backZone.reply.zone, backZone.reply.hasZone = 7, true
	all := map[string]made{
		"tcp":               pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80),
		"tcp in a zone":     zoned,
		"in a one-way zone": oneWay,
		"replies in a zone": backZone,
		"udp":               pair(unix.IPPROTO_UDP, "10.0.0.1", 1001, "10.0.0.2", 80),
		"sctp":              pair(unix.IPPROTO_SCTP, "10.0.0.1", 1001, "10.0.0.2", 80),
		"dnat":              dnat,
		"ping":              echo("10.0.0.1", "10.0.0.2", 1001),
		"other ping":        echo("10.0.0.1", "10.0.0.2", 1002),
		"tcp6":              pair(unix.IPPROTO_TCP, "fd00::1", 1001, "fd00::2", 80),
		"ping6":             echo("fd00::1", "fd00::2", 1001),
		"no ports":          pair(99, "10.0.0.1", 0, "10.0.0.2", 0),
		"no ports in IPv6":  pair(99, "fd00::1", 0, "fd00::2", 0),
	}
	found := map[string]Flow{}
	for name, m := range all {
		before := flows(t, table, Filter{})
		create(t, table, m)
		after := flows(t, table, Filter{})
		after = slices.DeleteFunc(after, func(f Flow) bool { return slices.Contains(before, f) })
		if len(after) != 1 {
			t.Fatalf("%s: %d entries more: %v", name, len(after), after)
		}
		found[name] = after[0]
	}
	if f := found["dnat"]; text(f) != "6 10.0.0.1:1003>10.0.0.2:8080 was 10.9.9.9:80" {
		t.Errorf("dnat: %s", text(f))
	}
	left := len(all)
	for name, f := range found {
		other := f
		other.id++
		if n, err := table.Delete(t.Context(), []Flow{other}); n != 0 || err != nil {
			t.Errorf("%s, another entry of the tuple: Delete = %d, %v", name, n, err)
		}
		for _, want := range []int{1, 0} {
			left -= want
			n, err := table.Delete(t.Context(), []Flow{f})
			if n != want || err != nil {
				t.Errorf("%s: Delete = %d, %v, want %d", name, n, err, want)
			}
			list := flows(t, table, Filter{})
			if slices.Contains(list, f) || len(list) != left {
				t.Errorf("%s: %d entries are left, want %d: %v", name, len(list), left, list)
			}
		}
	}
	// In one batch, with some that are gone.
	for _, m := range all {
		create(t, table, m)
	}
	list := flows(t, table, Filter{})
	if n, err := table.Delete(t.Context(), list[:3]); n != 3 || err != nil {
		t.Errorf("Delete = %d, %v, want 3", n, err)
	}
	if n, err := table.Delete(t.Context(), list); n != len(all)-3 || err != nil {
		t.Errorf("Delete = %d, %v, want %d", n, err, len(all)-3)
	}
	if list := flows(t, table, Filter{}); len(list) != 0 {
		t.Errorf("left: %v", list)
	}
	if n, err := table.Delete(t.Context(), nil); n != 0 || err != nil {
		t.Errorf("Delete of nothing = %d, %v", n, err)
	}
}

// TestDeleteSuccessor deletes an entry that was replaced by another of the same tuple.
func TestDeleteSuccessor(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	m := pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80)
	one := func() Flow {
		create(t, table, m)
		list := flows(t, table, Filter{Src: m.orig.src})
		if len(list) != 1 {
			t.Fatal(list)
		}
		return list[0]
	}
	first := one()
	second := first
	for i := range 100 {
		if n, err := table.Delete(t.Context(), []Flow{second}); n != 1 || err != nil {
			t.Fatalf("Delete = %d, %v", n, err)
		}
		// Something else takes the place in memory, or the successor may get the same id.
		create(t, table, pair(unix.IPPROTO_UDP, "10.0.0.3", uint16(i+1), "10.0.0.2", 80))
		if second = one(); second.id != first.id {
			break
		}
	}
	if second.id == first.id {
		t.Fatal("a hundred successors have the id of the first entry")
	}
	if n, err := table.Delete(t.Context(), []Flow{first}); n != 0 || err != nil {
		t.Errorf("Delete of the predecessor = %d, %v, want 0", n, err)
	}
	if list := flows(t, table, Filter{Src: m.orig.src}); !slices.Equal(list, []Flow{second}) {
		t.Errorf("Delete of the predecessor left %v", list)
	}
	if n, err := table.Delete(t.Context(), []Flow{second}); n != 1 || err != nil {
		t.Errorf("Delete of the successor = %d, %v, want 1", n, err)
	}
}

// TestDeleteRefused holds that a flow that the kernel does not take is reported and the others are deleted.
func TestDeleteRefused(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	create(t, table, pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80), pair(unix.IPPROTO_TCP, "10.0.0.1", 1002, "10.0.0.2", 80))
	list := flows(t, table, Filter{})
	bad := list[0]
	bad.Proto, bad.dstWord = unix.IPPROTO_ICMP, 200<<8 // no such type: icmp_nlattr_to_tuple
	for _, order := range [][]Flow{{bad, list[0]}, {list[1], bad}} {
		n, err := table.Delete(t.Context(), order)
		if n != 1 || !errors.Is(err, unix.EINVAL) {
			t.Errorf("Delete = %d, %v, want 1, EINVAL", n, err)
		}
	}
	if list := flows(t, table, Filter{}); len(list) != 0 {
		t.Errorf("left: %v", list)
	}
}

// thousands creates n entries to 10.1.0.1 or fd01::1, of which every hundredth is from the same client.
func thousands(t testing.TB, table *Table, v6 bool, n int) netip.Addr {
	t.Helper()
	list := make([]made, n)
	server, client := netip.AddrFrom4([4]byte{10, 1, 0, 1}), func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)}) }
	if v6 {
		server, client = addr("fd01::1"), func(i int) netip.Addr {
			return netip.AddrFrom16([16]byte{0: 0xfd, 1: 2, 14: byte(i >> 8), 15: byte(i)})
		}
	}
	for i := range list {
		ip, port := client(i%100), uint16(1024+i/100)
		list[i] = made{
			orig:  tuple{src: ip, dst: server, proto: unix.IPPROTO_TCP, srcWord: port, dstWord: 80},
			reply: tuple{src: server, dst: ip, proto: unix.IPPROTO_TCP, srcWord: 80, dstWord: port},
		}
	}
	create(t, table, list...)
	return client(7)
}

const manyEntries = 100_000

// room skips a test if the kernel's table is too small for manyEntries. The limit is one number for all namespaces, each of
// which may have so many entries.
func room(t testing.TB) {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("nf_conntrack is not loaded, so it is not known how many entries it takes")
	}
	if err != nil {
		t.Fatal(err)
	}
	var limit int
	if _, err := fmt.Sscan(string(b), &limit); err != nil {
		t.Fatal(err)
	}
	if limit != 0 && limit < manyEntries+manyEntries/10 {
		t.Skipf("nf_conntrack_max is %d, too few for %d entries", limit, manyEntries)
	}
}

func TestThousands(t *testing.T) {
	t.Parallel()
	for v6, n := range map[bool]int{false: manyEntries, true: manyEntries / 5} {
		table := newTable(t)
		room(t)
		ip := thousands(t, table, v6, n)
		all := map[Flow]bool{}
		for _, f := range flows(t, table, Filter{}) {
			all[f] = true
		}
		if len(all) != n {
			t.Fatalf("%d flows, want %d", len(all), n)
		}
		some := flows(t, table, Filter{Src: ip})
		if len(some) != n/100 {
			t.Errorf("%d flows of %s, want %d", len(some), ip, n/100)
		}
		for _, f := range some {
			if f.Src.Addr() != ip || !all[f] {
				t.Errorf("flow of %s: %s", ip, text(f))
			}
		}
		if err := table.Forget([]netip.Addr{ip}); err != nil {
			t.Error(err)
		}
		rest := flows(t, table, Filter{})
		if len(rest) != n-n/100 || slices.ContainsFunc(rest, func(f Flow) bool { return f.Src.Addr() == ip }) {
			t.Errorf("%d flows after Forget, want %d and none of %s", len(rest), n-n/100, ip)
		}
		keep := rest[len(rest)/2]
		gone := slices.DeleteFunc(rest, func(f Flow) bool { return f == keep })
		if got, err := table.Delete(t.Context(), gone); got != len(gone) || err != nil {
			t.Errorf("Delete = %d, %v, want %d", got, err, len(gone))
		}
		if list := flows(t, table, Filter{}); !slices.Equal(list, []Flow{keep}) {
			t.Errorf("left: %v, want %v", list, keep)
		}
	}
}

// TestOverrun has a socket that holds hardly one of the kernel's answers.
func TestOverrun(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	thousands(t, table, false, 3000)
	list := flows(t, table, Filter{})
	var gone []Flow
	for i, f := range list {
		if i%2 == 0 {
			f.id++
			gone = append(gone, f)
		}
	}
	small := func() {
		s, err := table.looks.socket()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.conn.SetReadBuffer(1); err != nil {
			t.Fatal(err)
		}
	}
	small()
	if s, err := table.looks.socket(); err != nil {
		t.Fatal(err)
	} else if _, err := s.delete(gone); !errors.Is(err, unix.ENOBUFS) {
		t.Fatalf("%d answers without an overrun: %v", len(gone), err)
	}
	table.looks.reset()
	small()
	if n, err := table.Delete(t.Context(), gone); n != 0 || err != nil {
		t.Errorf("Delete of others = %d, %v, want 0", n, err)
	}
	small()
	if n := len(flows(t, table, Filter{})); n != len(list) {
		t.Errorf("%d flows, want %d", n, len(list))
	}
	if n, err := table.Delete(t.Context(), list); n != len(list) || err != nil {
		t.Errorf("Delete = %d, %v, want %d", n, err, len(list))
	}
}

// TestCanceled ends a dump in its middle and uses the table again.
func TestCanceled(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	const n = 3000
	thousands(t, table, false, n)
	ctx, cancel := context.WithCancel(t.Context())
	seen := 0
	err := table.Flows(ctx, Filter{}, func(Flow) { seen++; cancel() })
	if !errors.Is(err, context.Canceled) || seen == 0 || seen == n {
		t.Errorf("Flows = %v after %d of %d flows", err, seen, n)
	}
	list := flows(t, table, Filter{})
	if len(list) != n {
		t.Errorf("%d flows, want %d", len(list), n)
	}
	if got, err := table.Delete(ctx, list); got != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("Delete = %d, %v", got, err)
	}
	if list := flows(t, table, Filter{}); len(list) != n {
		t.Errorf("%d flows, want %d", len(list), n)
	}
}

func TestConcurrent(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	thousands(t, table, false, 2000)
	thousands(t, table, true, 2000)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			var list []Flow
			if err := table.Flows(t.Context(), Filter{}, func(f Flow) { list = append(list, f) }); err != nil {
				t.Error(err)
			}
			if _, err := table.Delete(t.Context(), list[:len(list)/2]); err != nil {
				t.Error(err)
			}
			if err := table.Forget([]netip.Addr{addr(fmt.Sprintf("10.2.0.%d", i)), addr("fd02::99")}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if list := flows(t, table, Filter{Src: addr("10.2.0.2")}); len(list) != 0 {
		t.Errorf("%d flows of a forgotten address", len(list))
	}
}

// TestPrivilege holds that without CAP_NET_ADMIN the kernel's one answer for a whole batch is understood.
func TestPrivilege(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	create(t, table, pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80))
	list := flows(t, table, Filter{})
	list = append(list, list[0], list[0])

	runtime.LockOSThread() // it ends with the test unless it has its capabilities back
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var had [2]unix.CapUserData
	if err := unix.Capget(&head, &had[0]); err != nil {
		t.Fatal(err)
	}
	less := had
	less[unix.CAP_NET_ADMIN/32].Effective &^= 1 << (unix.CAP_NET_ADMIN % 32)
	if err := unix.Capset(&head, &less[0]); err != nil {
		t.Fatal(err)
	}
	n, deleteErr := table.looks.delete(t.Context(), list)
	s, err := table.looks.socket()
	if err == nil {
		err = s.dump(t.Context(), unix.AF_UNSPEC, selection{}, func(*entry) {})
	}
	if err := unix.Capset(&head, &had[0]); err != nil {
		t.Fatal(err)
	}
	runtime.UnlockOSThread()

	if n != 0 || !errors.Is(deleteErr, unix.EPERM) {
		t.Errorf("delete = %d, %v, want EPERM", n, deleteErr)
	}
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("dump = %v, want EPERM", err)
	}
	table.looks.reset()
	if got := flows(t, table, Filter{}); len(got) != 1 {
		t.Errorf("flows: %v", got)
	}
}
