package nft

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// What the kernel's headers have and x/sys/unix has not (linux/netfilter/nfnetlink.h, nf_tables.h).
const (
	batchGeneration = 1 // NFNL_BATCH_GENID
	setDescConcat   = 2 // NFTA_SET_DESC_CONCAT
	setFieldLen     = 1 // NFTA_SET_FIELD_LEN
)

// batch is a transaction in the kernel's format: a begin message, the operations' messages, an end message. All are written one behind
// the other into the buffer that is sent, because most of what a transaction took was making small pieces of it.
type batch struct {
	buf   []byte
	port  uint32 // of the socket that sends it
	begin uint32 // sequence number of the first message; the others count on
	next  uint32 // that of the next transaction, so that a late answer is not taken for one of another transaction
	parts []part // what the messages between the first and the last are
	open  int    // where the message that is being written begins
	err   error
}

// part says what a message is about: an operation, or one of its rules.
type part struct {
	op   int
	rule int // -1: none
}

// start begins a transaction. With a generation the kernel refuses it if anybody has committed since; 0 is none.
func (b *batch) start(port, generation uint32) {
	b.buf, b.parts, b.err = b.buf[:0], b.parts[:0], nil
	b.port, b.begin = port, b.next
	b.header(unix.NFNL_MSG_BATCH_BEGIN, netlink.Request, unix.NFPROTO_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	if generation != 0 {
		b.u32(batchGeneration, generation)
	}
	b.close()
}

// grow makes room for what most operations need, so that megabytes are not copied while the buffer grows.
func (b *batch) grow(ops []ruleset.Op) {
	n := 0
	for _, op := range ops {
		n += 128 + 64*len(op.Elements)
		if op.Kind == ruleset.AddRules {
			n += 512 * len(op.Chain.Rules)
		}
	}
	b.buf = slices.Grow(b.buf, n)
}

// finish ends it, and asks for an answer to the last operation: the kernel answers those that it refuses anyway, and a transaction of
// which nothing was refused is in force when the answer comes (nfnetlink_rcv_batch).
func (b *batch) finish() error {
	b.ask()
	b.header(unix.NFNL_MSG_BATCH_END, netlink.Request, unix.NFPROTO_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	b.close()
	b.next = b.last() + 2
	return b.err
}

// attempt ends it as nft --check does: a batch without its end is looked at and given up (nfnetlink_rcv_batch), so that nobody ever sees
// what is in it.
func (b *batch) attempt() error {
	b.ask()
	b.next = b.last() + 2
	return b.err
}

// ask asks for an answer to the message that was written last.
func (b *batch) ask() {
	flags := b.buf[b.open+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|uint16(netlink.Acknowledge))
}

// last is the sequence number of the last operation.
func (b *batch) last() uint32 { return b.begin + uint32(len(b.parts)) } //nolint:gosec // bounded by the buffer

// message begins the message of an operation; close ends it.
func (b *batch) message(p part, typ uint16, flags netlink.HeaderFlags, family byte) {
	b.parts = append(b.parts, p)
	b.header(unix.NFNL_SUBSYS_NFTABLES<<8|typ, netlink.Request|flags, family, 0)
}

// header writes a netlink header, whose length close sets, and a netfilter header.
func (b *batch) header(typ uint16, flags netlink.HeaderFlags, family byte, resource uint16) {
	sequence := b.last()
	if typ == unix.NFNL_MSG_BATCH_END {
		sequence++
	}
	b.open = len(b.buf)
	b.buf = append(b.buf, 0, 0, 0, 0)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, uint16(flags))
	b.buf = binary.NativeEndian.AppendUint32(b.buf, sequence)
	b.buf = binary.NativeEndian.AppendUint32(b.buf, b.port)
	b.buf = append(b.buf, family, unix.NFNETLINK_V0)
	b.buf = binary.BigEndian.AppendUint16(b.buf, resource)
}

func (b *batch) close() {
	binary.NativeEndian.PutUint32(b.buf[b.open:], uint32(len(b.buf)-b.open)) //nolint:gosec // bounded by the attributes
}

// nest begins an attribute and returns its place, for done.
func (b *batch) nest(typ uint16) int {
	at := len(b.buf)
	b.buf = append(b.buf, 0, 0)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ|unix.NLA_F_NESTED)
	return at
}

// done ends an attribute: it sets its length, which has 16 bits, and pads it.
func (b *batch) done(at int) {
	n := len(b.buf) - at
	if n > math.MaxUint16 {
		b.err = errors.New("a netlink attribute is longer than 64 KiB")
	}
	binary.NativeEndian.PutUint16(b.buf[at:], uint16(n))
	b.buf = append(b.buf, "\x00\x00\x00"[:-n&3]...)
}

// value writes an attribute.
func (b *batch) value(typ uint16, data []byte) {
	at := b.plain(typ)
	b.buf = append(b.buf, data...)
	b.done(at)
}

// plain begins an attribute that has no attributes in it.
func (b *batch) plain(typ uint16) int {
	at := len(b.buf)
	b.buf = append(b.buf, 0, 0)
	b.buf = binary.NativeEndian.AppendUint16(b.buf, typ)
	return at
}

// text writes an attribute of characters, with the zero that the kernel expects.
func (b *batch) text(typ uint16, s string) {
	at := b.plain(typ)
	b.buf = append(b.buf, s...)
	b.buf = append(b.buf, 0)
	b.done(at)
}

func (b *batch) u32(typ uint16, v uint32) {
	at := b.plain(typ)
	b.buf = binary.BigEndian.AppendUint32(b.buf, v)
	b.done(at)
}

func (b *batch) u64(typ uint16, v uint64) {
	at := b.plain(typ)
	b.buf = binary.BigEndian.AppendUint64(b.buf, v)
	b.done(at)
}

// data writes a value as the kernel's nft_data.
func (b *batch) data(typ uint16, value []byte) {
	at := b.nest(typ)
	b.value(unix.NFTA_DATA_VALUE, value)
	b.done(at)
}

// verdict writes a verdict as the kernel's nft_data.
func (b *batch) verdict(typ uint16, v *expr.Verdict) {
	at := b.nest(typ)
	code := b.nest(unix.NFTA_DATA_VERDICT)
	b.u32(unix.NFTA_VERDICT_CODE, uint32(v.Kind)) //nolint:gosec // the negative ones are their complement
	if v.Chain != "" {
		b.text(unix.NFTA_VERDICT_CHAIN, v.Chain)
	}
	b.done(code)
	b.done(at)
}

// expression writes one expression of a rule.
func (b *batch) expression(family byte, e expr.Any) {
	at := b.nest(unix.NFTA_LIST_ELEM)
	defer func() { b.done(at) }()
	named := func(name string) int {
		b.text(unix.NFTA_EXPR_NAME, name)
		return b.nest(unix.NFTA_EXPR_DATA)
	}
	var data int
	switch e := e.(type) {
	case *expr.Meta:
		data = named("meta")
		b.u32(unix.NFTA_META_KEY, uint32(e.Key))
		b.u32(unix.NFTA_META_DREG, e.Register)
	case *expr.Payload:
		data = named("payload")
		b.u32(unix.NFTA_PAYLOAD_DREG, e.DestRegister)
		b.u32(unix.NFTA_PAYLOAD_BASE, uint32(e.Base))
		b.u32(unix.NFTA_PAYLOAD_OFFSET, e.Offset)
		b.u32(unix.NFTA_PAYLOAD_LEN, e.Len)
	case *expr.Cmp:
		data = named("cmp")
		b.u32(unix.NFTA_CMP_SREG, e.Register)
		b.u32(unix.NFTA_CMP_OP, uint32(e.Op))
		b.data(unix.NFTA_CMP_DATA, e.Data)
	case *expr.Bitwise:
		data = named("bitwise")
		b.u32(unix.NFTA_BITWISE_SREG, e.SourceRegister)
		b.u32(unix.NFTA_BITWISE_DREG, e.DestRegister)
		b.u32(unix.NFTA_BITWISE_LEN, e.Len)
		b.data(unix.NFTA_BITWISE_MASK, e.Mask)
		b.data(unix.NFTA_BITWISE_XOR, e.Xor)
	case *expr.Lookup:
		data = named("lookup")
		b.text(unix.NFTA_LOOKUP_SET, e.SetName)
		b.u32(unix.NFTA_LOOKUP_SREG, e.SourceRegister)
		if e.IsDestRegSet {
			b.u32(unix.NFTA_LOOKUP_DREG, e.DestRegister)
		}
		if e.Invert {
			b.u32(unix.NFTA_LOOKUP_FLAGS, unix.NFT_LOOKUP_F_INV)
		}
	case *expr.Verdict:
		data = named("immediate")
		b.u32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
		b.verdict(unix.NFTA_IMMEDIATE_DATA, e)
	case *expr.Counter:
		data = named("counter")
	default: // the rare ones
		encoded, err := expr.Marshal(family, e)
		if err != nil {
			b.err = err
		}
		b.buf = append(b.buf, encoded...)
		return
	}
	b.done(data)
}
