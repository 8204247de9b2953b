package conntrack

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFiltered has kernels of all kinds filter, and holds what is found against what there is.
func TestFiltered(t *testing.T) {
	t.Parallel()
	sel := selection{origSrc: addr("fd00::1")}
	match := entry{orig: tuple{src: addr("fd00::1"), dst: addr("fd00::9")}, reply: tuple{src: addr("fd00::9"), dst: addr("fd00::1")}}
	other := entry{orig: tuple{src: addr("fd00::2"), dst: addr("fd00::9")}, reply: tuple{src: addr("fd00::9"), dst: addr("fd00::2")}}
	tables := map[string][]entry{
		"empty": nil, "matches only": {match, match}, "others only": {other}, "both": {other, match, other}, "other last": {match, other},
	}
	kernels := map[string]struct {
		pick func(selection, *entry) bool
		err  error
		bad  bool // its filter must not be trusted
	}{
		"honest":           {pick: func(s selection, e *entry) bool { return s.matches(e) }},
		"inverted":         {pick: func(s selection, e *entry) bool { return !s.matches(e) }, bad: true},
		"ignoring":         {pick: func(selection, *entry) bool { return true }},
		"finding nothing":  {pick: func(selection, *entry) bool { return false }, bad: true},
		"refusing":         {err: unix.EOPNOTSUPP, bad: true},
		"refusing as well": {err: unix.EINVAL, bad: true},
	}
	for kname, k := range kernels {
		for tname, table := range tables {
			for other, later := range tables { // the second time, with what the first has taught
				state := untried
				for i, content := range [][]entry{table, later} {
					dump := func(s selection, each func(*entry)) error {
						for i := range content {
							if s == (selection{}) || k.err == nil && k.pick(s, &content[i]) {
								each(&content[i])
							}
						}
						if s == (selection{}) {
							return nil
						}
						return k.err
					}
					var got []entry
					var err error
					if state, err = filtered(sel, state, dump, func(e *entry) { got = append(got, *e) }); err != nil {
						t.Errorf("%s kernel, %s, then %s: %v", kname, tname, other, err)
					}
					want := slices.DeleteFunc(slices.Clone(content), func(e entry) bool { return !sel.matches(&e) })
					if !slices.Equal(got, want) {
						t.Errorf("%s kernel, %s, then %s: found %d in step %d, want %d", kname, tname, other, len(got), i, len(want))
					}
					if state == works && k.bad {
						t.Errorf("%s kernel, %s, then %s: trusted after step %d", kname, tname, other, i)
					}
				}
			}
		}
	}
}

// TestFilteredOnce holds that a filter that works is one dump, and that it is known after the first table that is not empty.
func TestFilteredOnce(t *testing.T) {
	t.Parallel()
	there := entry{orig: tuple{src: addr("10.0.0.2"), dst: addr("10.0.0.9")}, reply: tuple{src: addr("10.0.0.9"), dst: addr("10.0.0.2")}}
	var dumps []selection
	dump := func(s selection, each func(*entry)) error {
		dumps = append(dumps, s)
		if s.matches(&there) {
			each(&there)
		}
		return nil
	}
	nobody, sel := func(e *entry) { t.Errorf("reported %v", e) }, selection{origSrc: addr("10.0.0.1")}
	state, err := filtered(sel, untried, dump, nobody)
	if want := []selection{sel, {}, {origSrc: addr("10.0.0.2")}}; state != works || err != nil || !slices.Equal(dumps, want) {
		t.Errorf("the first time: state %d, %v, dumps %v", state, err, dumps)
	}
	dumps = nil
	if state, err = filtered(sel, state, dump, nobody); state != works || err != nil || !slices.Equal(dumps, []selection{sel}) {
		t.Errorf("later: state %d, %v, dumps %v", state, err, dumps)
	}
	// One that ignores the filter and also has what was asked for needs no second dump, and later no filter.
	ignoring := func(s selection, each func(*entry)) error {
		each(&entry{orig: tuple{src: addr("10.0.0.1")}})
		each(&there)
		dumps = append(dumps, s)
		return nil
	}
	found := 0
	dumps = nil
	for range 2 {
		if state, err = filtered(sel, state, ignoring, func(*entry) { found++ }); state != useless || err != nil {
			t.Errorf("ignored: state %d, %v", state, err)
		}
	}
	if found != 2 || !slices.Equal(dumps, []selection{sel, {}}) {
		t.Errorf("ignored: found %d in %v", found, dumps)
	}
	// One that finds nothing is not asked for ever, though what was there once may have ended.
	finding := func(s selection, each func(*entry)) error {
		dumps = append(dumps, s)
		if s == (selection{}) {
			each(&there)
		}
		return nil
	}
	dumps, state = nil, untried
	for _, want := range []filterState{doubted, useless, useless} {
		if state, err = filtered(sel, state, finding, nobody); state != want || err != nil {
			t.Errorf("finds nothing: state %d, %v, want %d", state, err, want)
		}
	}
	if sample := (selection{origSrc: addr("10.0.0.2")}); !slices.Equal(dumps, []selection{sel, {}, sample, sel, {}, sample, {}}) {
		t.Errorf("finds nothing: dumps %v", dumps)
	}
	for _, tt := range []struct {
		dump func(selection, func(*entry)) error
		want filterState
	}{{dump, works}, {func(selection, func(*entry)) error { return nil }, doubted}} {
		if state, err = filtered(sel, doubted, tt.dump, nobody); state != tt.want || err != nil {
			t.Errorf("doubted: then state %d, %v, want %d", state, err, tt.want)
		}
	}
	broken := errors.New("broken")
	if _, err := filtered(sel, works, func(selection, func(*entry)) error { return broken }, nobody); !errors.Is(err, broken) {
		t.Errorf("an error of the dump: %v", err)
	}
}

// TestKernelFilter holds what the kernel itself selects in IPv4 against what there is.
func TestKernelFilter(t *testing.T) {
	t.Parallel()
	table := newTable(t)
	nat := pair(unix.IPPROTO_TCP, "10.0.0.1", 1001, "10.0.0.2", 80)
	nat.reply.src, nat.reply.dst = addr("10.0.0.3"), addr("10.0.0.4")
	back := pair(unix.IPPROTO_UDP, "10.0.0.4", 1001, "10.0.0.3", 80)
	back.reply.src, back.reply.dst = addr("10.0.0.2"), addr("10.0.0.1")
	create(t, table, nat, back, pair(unix.IPPROTO_TCP, "fd00::1", 1001, "fd00::2", 80), echo("10.0.0.1", "10.0.0.4", 1))
	s, err := table.looks.socket()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		sel  selection
		want []uint8 // protocols
	}{
		{selection{}, []uint8{unix.IPPROTO_ICMP, unix.IPPROTO_TCP, unix.IPPROTO_UDP}},
		{selection{origSrc: addr("10.0.0.1")}, []uint8{unix.IPPROTO_ICMP, unix.IPPROTO_TCP}},
		{selection{origDst: addr("10.0.0.2")}, []uint8{unix.IPPROTO_TCP}},
		{selection{replySrc: addr("10.0.0.3")}, []uint8{unix.IPPROTO_TCP}},
		{selection{replyDst: addr("10.0.0.1")}, []uint8{unix.IPPROTO_ICMP, unix.IPPROTO_UDP}},
		{selection{origSrc: addr("10.0.0.1"), replySrc: addr("10.0.0.4")}, []uint8{unix.IPPROTO_ICMP}},
		{selection{origSrc: addr("10.0.0.1"), origDst: addr("10.0.0.2"), replySrc: addr("10.0.0.3"), replyDst: addr("10.0.0.4")}, []uint8{unix.IPPROTO_TCP}},
		{selection{origSrc: addr("10.0.0.1"), origDst: addr("10.0.0.3")}, nil},
		{selection{origSrc: addr("10.0.0.9")}, nil},
	} {
		var got []uint8
		if err := s.dump(t.Context(), unix.AF_INET, tt.sel, func(e *entry) { got = append(got, e.orig.proto) }); err != nil {
			t.Fatalf("%v: %v", tt.sel, err)
		}
		if slices.Sort(got); !slices.Equal(got, tt.want) {
			t.Errorf("%v: protocols %v, want %v", tt.sel, got, tt.want)
		}
	}
}

func TestSelectionFamily(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		sel    selection
		family uint8
		ok     bool
	}{
		{selection{}, unix.AF_UNSPEC, true},
		{selection{origSrc: addr("10.0.0.1")}, unix.AF_INET, true},
		{selection{replyDst: addr("fd00::1")}, unix.AF_INET6, true},
		{selection{origSrc: addr("10.0.0.1"), replySrc: addr("10.0.0.2")}, unix.AF_INET, true},
		{selection{origDst: addr("10.0.0.1"), replySrc: addr("fd00::1")}, 0, false},
	} {
		if family, ok := tt.sel.family(); family != tt.family || ok != tt.ok {
			t.Errorf("%v: family %d, %t", tt.sel, family, ok)
		}
	}
}
