package conntrack

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The benchmarks have a table of manyEntries, of which a hundredth is of one client. BenchmarkBaseline is the same by
// vishvananda/netlink.

func families(b *testing.B, f func(b *testing.B, v6 bool)) {
	b.Run("IPv4", func(b *testing.B) { f(b, false) })
	b.Run("IPv6", func(b *testing.B) { f(b, true) })
}

func BenchmarkFlows(b *testing.B) {
	families(b, func(b *testing.B, v6 bool) {
		table := newTable(b)
		room(b)
		ip := thousands(b, table, v6, manyEntries)
		count := func(b *testing.B, filter Filter, want int) {
			b.ReportAllocs()
			for b.Loop() {
				n := 0
				if err := table.Flows(b.Context(), filter, func(Flow) { n++ }); err != nil || n != want {
					b.Fatal(n, err)
				}
			}
		}
		b.Run("all", func(b *testing.B) { count(b, Filter{}, manyEntries) })
		b.Run("source", func(b *testing.B) { count(b, Filter{Src: ip}, manyEntries/100) })
		b.Run("destination", func(b *testing.B) { count(b, Filter{Dst: ip}, 0) })
	})
}

// BenchmarkDelete deletes all entries.
func BenchmarkDelete(b *testing.B) {
	families(b, func(b *testing.B, v6 bool) {
		table := newTable(b)
		room(b)
		b.ReportAllocs()
		for b.Loop() {
			b.StopTimer()
			thousands(b, table, v6, manyEntries)
			list := flows(b, table, Filter{})
			b.StartTimer()
			if n, err := table.Delete(b.Context(), list); n != manyEntries || err != nil {
				b.Fatal(n, err)
			}
		}
	})
}

// BenchmarkForget deletes the entries of one client, and of many.
func BenchmarkForget(b *testing.B) {
	families(b, func(b *testing.B, v6 bool) {
		for name, addresses := range map[string]int{"one": 1, "two": 2, "fifty": 50} {
			b.Run(name, func(b *testing.B) {
				table := newTable(b)
				room(b)
				b.ReportAllocs()
				for b.Loop() {
					b.StopTimer()
					if _, err := table.Delete(b.Context(), flows(b, table, Filter{})); err != nil {
						b.Fatal(err)
					}
					ip := thousands(b, table, v6, manyEntries)
					var ips []netip.Addr
					for range addresses {
						ips = append(ips, ip)
						ip = ip.Next()
					}
					b.StartTimer()
					if err := table.Forget(ips); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	})
}

// BenchmarkForgetNothing looks for addresses that have no entries, as most pods' new ones have none: by two walks of the kernel's for each,
// and by a dump. Forget chooses between them by these figures.
func BenchmarkForgetNothing(b *testing.B) {
	for _, size := range []int{0, 1000, manyEntries} {
		for _, addresses := range []int{1, 2, 4, 16, 64} {
			for _, way := range []string{"flush", "dump"} {
				b.Run(fmt.Sprintf("entries=%d/addresses=%d/%s", size, addresses, way), func(b *testing.B) {
					table := newTable(b)
					room(b)
					if size > 0 {
						thousands(b, table, false, size)
					}
					set := map[netip.Addr]bool{}
					for i := range addresses {
						set[netip.AddrFrom4([4]byte{10, 3, 0, byte(i)})] = true
					}
					for b.Loop() {
						if way == "dump" {
							if err := table.forgets.forgetDumped(set, func(*entry) bool { return true }); err != nil {
								b.Fatal(err)
							}
							continue
						}
						for ip := range set {
							if err := table.forgets.forgetFlushed(ip); err != nil {
								b.Fatal(err)
							}
						}
					}
				})
			}
		}
	}
}

type client netip.Addr

func (c client) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	ip, ok := netip.AddrFromSlice(flow.Forward.SrcIP)
	return ok && (netip.Addr(c).Unmap() == ip.Unmap() || !netip.Addr(c).IsValid())
}

func BenchmarkBaseline(b *testing.B) {
	families(b, func(b *testing.B, v6 bool) {
		family := netlink.InetFamily(unix.AF_INET)
		if v6 {
			family = unix.AF_INET6
		}
		table := newTable(b)
		room(b)
		handle, err := netlink.NewHandleAt(netns.NsHandle(table.looks.netNS), unix.NETLINK_NETFILTER)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(handle.Close)
		ip := thousands(b, table, v6, manyEntries)
		b.Run("list", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				list, err := handle.ConntrackTableList(netlink.ConntrackTable, family)
				if err != nil || len(list) != manyEntries {
					b.Fatal(len(list), err)
				}
			}
		})
		for name, c := range map[string]struct {
			filter client
			want   uint
		}{"delete/one": {client(ip), manyEntries / 100}, "delete/all": {client{}, manyEntries}} {
			b.Run(name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					b.StopTimer()
					if _, err := table.Delete(b.Context(), flows(b, table, Filter{})); err != nil {
						b.Fatal(err)
					}
					thousands(b, table, v6, manyEntries)
					b.StartTimer()
					n, err := handle.ConntrackDeleteFilters(netlink.ConntrackTable, family, c.filter)
					if err != nil || n != c.want {
						b.Fatal(n, err)
					}
				}
			})
		}
	})
}
