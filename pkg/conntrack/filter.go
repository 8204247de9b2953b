package conntrack

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// The kernel can filter a dump by a tuple's addresses (CTA_FILTER, Linux 5.8). Older ones ignore the attribute, and up to at
// least 6.18 what is left of IPv6 entries is the opposite: those without the address (ctnetlink_filter_match_tuple takes
// ipv6_addr_cmp, which is 0 for equal addresses, for a predicate). So a filter is trusted only after it has been seen to find
// what was asked for, and its finds are looked at in any case.
//
// A deletion by filter (Linux 6.12) cannot be looked at before it is done. It is used in IPv4 only, where the filter is right; in
// IPv6 it would delete everybody else's entries. And its message has only one other reading. What empties the table is a deletion
// without a tuple; this one has a tuple, of a single address. Kernels that do not delete by filter, whether they know CTA_FILTER or not,
// read that as the tuple of one entry and answer EINVAL, since the other address and CTA_TUPLE_PROTO are missing
// (ctnetlink_del_conntrack, ctnetlink_parse_tuple).

// filterState is what is known of the kernel's filter in one address family.
type filterState int

const (
	untried filterState = iota
	doubted             // it has once not found what was there just before, which may have ended meanwhile
	works               // it has found entries with an address
	useless             // refused, ignored or wrong
)

// filtered calls each for the entries of a selection, and returns what is now known of the kernel's filter. An entry is
// reported twice only if dump does so.
func filtered(sel selection, state filterState, dump func(selection, func(*entry)) error, each func(*entry)) (filterState, error) {
	found, others := false, false
	pick := func(e *entry) {
		if !sel.matches(e) {
			others = true
			return
		}
		found = true
		each(e)
	}
	if state == useless || sel == (selection{}) {
		return state, dump(selection{}, pick)
	}
	err := dump(sel, pick)
	switch {
	case refused(err):
		return useless, dump(selection{}, pick)
	case err != nil:
		return state, err
	case found && others: // ignored, so this was everything
		return useless, nil
	case found:
		return works, nil
	case others:
		return useless, dump(selection{}, pick)
	case state == works:
		return works, nil
	}
	// Nothing at all, which may also be the opposite of what was asked for. An address that is there will tell.
	var sample netip.Addr
	err = dump(selection{}, func(e *entry) {
		sample = e.orig.src
		pick(e)
	})
	if err != nil || !sample.IsValid() {
		return state, err
	}
	sel, found, others = selection{origSrc: sample}, false, false
	each = func(*entry) {}
	switch err := dump(sel, pick); {
	case err != nil:
		return state, err
	case others:
		return useless, nil
	case found:
		return works, nil
	case state == doubted:
		return useless, nil
	}
	return doubted, nil
}

func refused(err error) bool { return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) }

// selection are addresses that an entry must have; an invalid one is any.
type selection struct{ origSrc, origDst, replySrc, replyDst netip.Addr }

// family returns the address family of the entries that can match, AF_UNSPEC for both, and false if no entry can.
func (s selection) family() (uint8, bool) {
	f := uint8(unix.AF_UNSPEC)
	for _, ip := range []netip.Addr{s.origSrc, s.origDst, s.replySrc, s.replyDst} {
		switch {
		case !ip.IsValid():
		case f == unix.AF_UNSPEC:
			f = family(ip)
		case f != family(ip):
			return 0, false
		}
	}
	return f, true
}

func (s selection) matches(e *entry) bool {
	is := func(want, ip netip.Addr) bool { return !want.IsValid() || want == ip }
	return is(s.origSrc, e.orig.src) && is(s.origDst, e.orig.dst) && is(s.replySrc, e.reply.src) && is(s.replyDst, e.reply.dst)
}

// appendFlush appends the payload of the message that has the kernel delete a selection's IPv4 entries, in all zones. A kernel
// that did not read the selection would still spare the other family's by the version (ctnetlink_del_conntrack).
func (s selection) appendFlush(b []byte) []byte {
	return s.appendFilter(append(b, unix.AF_INET, nfnetlinkV1, 0, 0))
}

// appendFilter appends the attributes that have the kernel select. Flags are in its byte order.
func (s selection) appendFilter(b []byte) []byte {
	var flags [3]uint32 // by tuple attribute
	for _, side := range []struct {
		typ      uint16
		src, dst netip.Addr
	}{{ctaTupleOrig, s.origSrc, s.origDst}, {ctaTupleReply, s.replySrc, s.replyDst}} {
		if !side.src.IsValid() && !side.dst.IsValid() {
			continue
		}
		b = appendNested(b, side.typ, func(b []byte) []byte {
			return appendNested(b, ctaTupleIP, func(b []byte) []byte {
				if side.src.IsValid() {
					flags[side.typ] |= filterIPSrc
					b = appendAddr(b, ctaIPv4Src, side.src)
				}
				if side.dst.IsValid() {
					flags[side.typ] |= filterIPDst
					b = appendAddr(b, ctaIPv4Dst, side.dst)
				}
				return b
			})
		})
	}
	return appendNested(b, ctaFilter, func(b []byte) []byte {
		for i, typ := range []uint16{ctaTupleOrig: ctaFilterOrigFlags, ctaTupleReply: ctaFilterReplyFlags} {
			if flags[i] != 0 {
				b = appendBytes(b, typ, binary.NativeEndian.AppendUint32(nil, flags[i])...)
			}
		}
		return b
	})
}
