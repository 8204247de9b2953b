package verdictlog

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// fill makes n records, whose ports are first, first+1 and so on.
func fill(l *Log, first, n int) {
	for i := range n {
		p := Packet{Prefix: "i", Src: from4, Dst: to4, Proto: 6, HasPorts: true, Dport: uint16(first + i)}
		l.collect(p, time.Unix(1, 0))
	}
	l.flush()
}

func quiet() Config {
	return Config{
		Resolve: func(Packet) (Names, bool) { return Names{Direction: "ingress", Policies: []string{}}, true },
		Peers:   func(map[netip.Addr]string) {}, Denied: func(Denial) {}, Lost: func(int) {},
	}
}

func TestCollect(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	var told int
	l := New(Config{
		Resolve: func(p Packet) (Names, bool) {
			return Names{Direction: "ingress", Policies: []string{"ns/p"}, Destination: "ns/server", In: "veth1"}, p.Prefix != "foreign"
		},
		Peers: func(m map[netip.Addr]string) {
			if diff := cmp.Diff(map[netip.Addr]string{from4: ""}, m); diff != "" {
				t.Error(diff)
			}
			m[from4] = "ns/client"
		},
		Denied: func(d Denial) { told += d.Packets },
	})
	tcp := func(sport, dport uint16) Packet {
		return Packet{Prefix: "iabc", Src: from4, Dst: to4, Proto: 6, HasPorts: true, Sport: sport, Dport: dport}
	}
	foreign := tcp(1, 80)
	foreign.Prefix = "foreign"
	for _, p := range []Packet{tcp(1, 80), tcp(2, 80), tcp(1, 81), foreign, {Prefix: "iabc", Src: from4, Dst: to4, Proto: 1, HasICMP: true, Type: 8}, tcp(3, 80)} {
		l.collect(p, now)
		now = now.Add(time.Millisecond)
	}
	if got := l.Last(); len(got) != 0 {
		t.Errorf("before the window has ended: %v", got)
	}
	l.flush()
	record := func(after time.Duration, packets int, sport, dport uint16, proto string, icmp *ICMP) Denial {
		return Denial{
			Time: time.Unix(1_700_000_000, 0).Add(after).UTC(), Packets: packets, Direction: "ingress", Policies: []string{"ns/p"},
			Source: Party{Pod: "ns/client", IP: from4, Port: sport}, Destination: Party{Pod: "ns/server", IP: to4, Port: dport},
			Protocol: proto, ICMP: icmp, In: "veth1",
		}
	}
	want := []Denial{record(0, 3, 1, 80, "tcp", nil), record(2*time.Millisecond, 1, 1, 81, "tcp", nil), record(4*time.Millisecond, 1, 0, 0, "icmp", &ICMP{Type: 8})}
	if diff := cmp.Diff(want, l.Last(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if told != 5 {
		t.Errorf("%d packets were told of, want 5", told)
	}
	l.collect(tcp(9, 80), now) // a new window, a new record
	l.flush()
	if got := l.Last(); len(got) != 4 || got[3].Packets != 1 {
		t.Errorf("a second window: %v", got)
	}
	if d := l.Last()[0]; !d.About("ns/client") || !d.About("ns/server") || d.About("ns/other") {
		t.Error("About")
	}
}

func TestKept(t *testing.T) {
	l := New(quiet())
	fill(l, 0, 700)
	fill(l, 700, 700)
	got := l.Last()
	if len(got) != kept || got[0].Destination.Port != 400 || got[kept-1].Destination.Port != 1399 {
		t.Errorf("%d records from port %d to %d", len(got), got[0].Destination.Port, got[len(got)-1].Destination.Port)
	}
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := New(quiet())
		fill(l, 0, 3)
		ctx, cancel := context.WithCancel(t.Context())
		var ports []uint16
		var missed int
		gate := make(chan struct{}, 1<<20)
		ended := make(chan error)
		go func() {
			ended <- l.Follow(ctx, func(e Event) error {
				<-gate
				missed += e.Missed
				if e.Denial != nil {
					ports = append(ports, e.Destination.Port)
				}
				return nil
			})
		}()
		step := func(n int) {
			for range n {
				gate <- struct{}{}
			}
			synctest.Wait()
		}
		step(10)
		fill(l, 3, 1)
		synctest.Wait()
		if diff := cmp.Diff([]uint16{0, 1, 2, 3}, ports); diff != "" || missed != 0 {
			t.Errorf("missed %d: %s", missed, diff)
		}
		// Slow: of 2,504 records those that have gone are counted, the others come.
		for i := range 5 {
			fill(l, 4+500*i, 500)
		}
		step(5000)
		if len(ports)+missed != 2504 || missed < 1 || ports[len(ports)-1] != 2503 {
			t.Errorf("%d records and %d missed", len(ports), missed)
		}
		cancel()
		synctest.Wait()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// However fast records come and go, a follower gets or is told of every one, in order.
func TestFollowerMissesNothingUntold(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		l := New(quiet())
		total, next := 1, 0
		fill(l, 0, 1)
		fillSome := func() {
			n := rapid.SampledFrom([]int{0, 1, 99, 100, 101, 999, 1000, 1001, 2500}).Draw(rt, "new")
			fill(l, total, n)
			total += n
		}
		stop := errors.New("enough")
		err := l.Follow(t.Context(), func(e Event) error {
			switch {
			case e.Denial == nil:
				next += e.Missed
			case int(e.Destination.Port) != next:
				rt.Fatalf("record %d, want %d", e.Destination.Port, next)
			default:
				next++
			}
			if total < 5_000 && rapid.IntRange(0, 200).Draw(rt, "pause") == 0 {
				fillSome()
			}
			if next == total {
				if total >= 3_000 || rapid.Bool().Draw(rt, "end") {
					return stop
				}
				for total == next {
					fillSome()
				}
			}
			return nil
		})
		if !errors.Is(err, stop) {
			rt.Fatal(err)
		}
	})
}

func TestEventJSON(t *testing.T) {
	l := New(quiet())
	fill(l, 80, 1)
	for _, e := range []Event{{Missed: 3}, {Denial: &l.Last()[0]}} {
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var back Event
		if err := json.Unmarshal(text, &back); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(e, back, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s: %s", text, diff)
		}
	}
}
