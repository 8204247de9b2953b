package nft

import (
	"encoding/binary"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// TestAnswered holds that an answer is told from those of other transactions, and which operation it is about.
func TestAnswered(t *testing.T) {
	t.Parallel()
	const port = 4711
	b := batch{next: ^uint32(0) - 1} // the numbers begin anew on the way
	ops := []ruleset.Op{{Kind: ruleset.AddTable, Table: inet}, {Kind: ruleset.AddChain, Table: inet, Chain: chain("a")}, {Kind: ruleset.DelChain, Table: inet, Chain: chain("a")}}
	transaction := func() {
		b.start(port, 0)
		for i, op := range ops {
			if err := b.operation(i, op, false); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.finish(); err != nil {
			t.Fatal(err)
		}
	}
	transaction()
	former := b.begin
	transaction()
	if b.begin != former+uint32(len(ops))+2 {
		t.Errorf("the first number is %d, of the transaction before it was %d", b.begin, former)
	}
	answer := func(typ uint16, sequence uint32, errno unix.Errno) []byte {
		msg := make([]byte, 36)
		binary.NativeEndian.PutUint16(msg[4:], typ)
		binary.NativeEndian.PutUint32(msg[8:], sequence)
		binary.NativeEndian.PutUint32(msg[16:], uint32(-int32(errno)))
		return msg
	}
	for name, tt := range map[string]struct {
		answer []byte
		part   int
		errno  unix.Errno
		ok     bool
	}{
		"the whole, by its begin":       {answer(unix.NLMSG_ERROR, b.begin, unix.EPERM), -1, unix.EPERM, true},
		"the first operation":           {answer(unix.NLMSG_ERROR, b.begin+1, unix.ENOENT), 0, unix.ENOENT, true},
		"the last operation":            {answer(unix.NLMSG_ERROR, b.begin+3, 0), 2, 0, true},
		"the whole, by its end":         {answer(unix.NLMSG_ERROR, b.begin+4, unix.ENOMEM), -1, unix.ENOMEM, true},
		"the transaction after it":      {answer(unix.NLMSG_ERROR, b.begin+5, unix.EPERM), 0, 0, false},
		"the end of the one before it":  {answer(unix.NLMSG_ERROR, b.begin-1, unix.EPERM), 0, 0, false},
		"the begin of the one before":   {answer(unix.NLMSG_ERROR, former, unix.EPERM), 0, 0, false},
		"another kind of message":       {answer(unix.NLMSG_DONE, b.begin+1, unix.EPERM), 0, 0, false},
		"a message without its content": {answer(unix.NLMSG_ERROR, b.begin+1, unix.EPERM)[:19], 0, 0, false},
	} {
		part, errno, ok := b.answered(tt.answer)
		if part != tt.part || errno != tt.errno || ok != tt.ok {
			t.Errorf("%s: part %d, %v, %v; want %d, %v, %v", name, part, errno, ok, tt.part, tt.errno, tt.ok)
		}
	}
}

// TestAttributeTooLong holds that what does not fit the 16 bits of an attribute's length is an error, and nothing is sent.
func TestAttributeTooLong(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	before, err := n.Generation(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	op := ruleset.Op{Kind: ruleset.AddChain, Table: inet, Chain: chain(strings.Repeat("x", 1<<16))}
	d := ruleset.Delta{Apply: []ruleset.Op{{Kind: ruleset.AddTable, Table: inet}, op}}
	if err := n.Commit(t.Context(), d); err == nil || !strings.Contains(err.Error(), "64 KiB") {
		t.Errorf("Commit = %v", err)
	}
	if after, err := n.Generation(t.Context()); err != nil || after != before {
		t.Errorf("generation %d became %d, %v", before, after, err)
	}
}

// TestElementsPerMessage holds that lists of elements are cut into messages that the kernel can read, and all elements arrive.
func TestElementsPerMessage(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	target := strings.Repeat("c", 200) // every element is large
	m := verdictMap("in4", ruleset.IPv4Addr, map[ruleset.Elem]ruleset.Verdict{})
	for i := range 1000 {
		m.Elements[ruleset.AddrElem(benchAddr(i))] = ruleset.To(ruleset.Goto, target)
	}
	rs := ruleset.Ruleset{table(inet, m, chain(target))}
	n.mustCommit(t, nil, rs)
	same(t, n.mustRead(t), rs)
	if cap(n.batch.buf) > keptBuffer {
		t.Errorf("%d bytes of a large transaction are kept", cap(n.batch.buf))
	}
}
