// Package nft executes ruleset deltas against the kernel's nftables and reads tables back.
package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

const (
	// socketBuffer bounds one transaction and the kernel's answers to it. The kernel allocates what is used. 500,000 elements
	// are about 20 MB. Without it a large transaction fails with EMSGSIZE.
	socketBuffer = 64 << 20

	// keptBuffer is how much of the memory of a transaction is kept for the next: that of a load of everything is not.
	keptBuffer = 64 << 10

	// mostElements keeps the element list of a message below 64 KiB, the limit of a netlink attribute.
	mostElements = 60_000

	// maxDumps bounds how often a dump is repeated because somebody in the namespace committed meanwhile. It takes about a
	// millisecond; kube-proxy commits once a second at most.
	maxDumps = 50
)

// Config says which kernel to talk to.
type Config struct {
	// NetNS is a file descriptor of a network namespace, for tests; 0 is the caller's own.
	NetNS int
	// Own makes the tables that are added this Kernel's own, and adopts with Own those that are there, where the kernel has the
	// flags for it: nobody else can change them while the Kernel is open, and they stay in force when it is closed.
	Own bool
}

// Kernel is the nftables of one network namespace. Its methods may be called concurrently; they take turns.
type Kernel struct {
	mu  sync.Mutex
	nl  *netlink.Conn
	raw syscall.RawConn // nl's socket, for transactions

	batch  batch
	answer [128]byte

	netNS int
	own   bool
}

// New opens the one netlink socket that all transactions go through.
func New(cfg Config) (*Kernel, error) {
	nl, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: cfg.NetNS})
	if err != nil {
		return nil, fmt.Errorf("open netlink socket to nftables (needs CAP_NET_ADMIN and a kernel with nf_tables): %w", err)
	}
	k := &Kernel{nl: nl, netNS: cfg.NetNS}
	k.batch.next = rand.Uint32()
	if k.raw, err = nl.SyscallConn(); err == nil {
		err = errors.Join(nl.SetWriteBuffer(socketBuffer), nl.SetReadBuffer(socketBuffer))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("set up netlink socket to nftables (needs CAP_NET_ADMIN): %w", err), k.Close())
	}
	if cfg.Own {
		if k.own, err = k.knows(ownFlags); err != nil {
			return nil, errors.Join(err, k.Close())
		}
	}
	return k, nil
}

// Close closes the socket.
func (k *Kernel) Close() error {
	if err := k.nl.Close(); err != nil {
		return fmt.Errorf("close netlink socket to nftables: %w", err)
	}
	return nil
}

// Commit executes the delta: Prepare, then Apply, each as one atomic transaction, then every Cleanup operation as a
// transaction of its own in which a missing object is success. The first error of Prepare or Apply ends it; errors of
// Cleanup are joined. Errors are CommitErrors. A transaction that has begun is not interrupted when ctx ends.
func (k *Kernel) Commit(ctx context.Context, d ruleset.Delta) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return commit(ctx, d, k.transaction)
}

// commit runs the stages of a delta; Kernel and Fake share it.
func commit(ctx context.Context, d ruleset.Delta, transaction func([]ruleset.Op) (string, error)) error {
	run := func(stage Stage, ops []ruleset.Op) error {
		if len(ops) == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return &CommitError{Stage: stage, Err: err}
		}
		if op, err := transaction(ops); err != nil {
			return &CommitError{Stage: stage, Op: op, Err: err}
		}
		return nil
	}
	if err := run(Prepare, d.Prepare); err != nil {
		return err
	}
	if err := run(Apply, d.Apply); err != nil {
		return err
	}
	var errs []error
	for _, op := range d.Cleanup {
		if err := run(Cleanup, []ruleset.Op{op}); err != nil && !IsNotExist(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// transaction sends the operations as one batch and returns which of them was refused, if the kernel says so.
func (k *Kernel) transaction(ops []ruleset.Op) (string, error) { return k.transact(ops, 0) }

// CanLog reports whether the kernel can send packets to an NFLOG group (CONFIG_NFT_LOG, CONFIG_NETFILTER_NETLINK_LOG), and some of each source alone: it is asked by
// a transaction that is given up. A transaction with a rule that it cannot do is refused as a whole.
func (k *Kernel) CanLog(group uint16) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	id := ruleset.TableID{Family: ruleset.Inet, Name: fmt.Sprintf("podwall-probe-%08x", rand.Uint32())}
	log := ruleset.Log{Prefix: "probe", Group: group}
	each := &ruleset.Set{Name: "each", Key: []ruleset.KeyType{ruleset.IPv4Addr}, Dynamic: true, Timeout: time.Minute, Size: 1}
	chain := &ruleset.Chain{Name: "log", Rules: []ruleset.Rule{
		ruleset.NewRule(ruleset.Limit{PerSecond: 1, Burst: 1}, log),
		ruleset.NewRule(ruleset.LimitEach{Field: ruleset.IPSaddr, Set: each.Name, PerSecond: 1, Burst: 1}, log),
	}}
	b := &k.batch
	b.start(k.nl.PID(), 0)
	for i, op := range []ruleset.Op{{Kind: ruleset.AddTable, Table: id}, {Kind: ruleset.AddSet, Table: id, Set: each}, {Kind: ruleset.AddChain, Table: id, Chain: chain}, {Kind: ruleset.AddRules, Table: id, Chain: chain}} {
		if err := b.operation(i, op, false); err != nil {
			return false, fmt.Errorf("ask whether the kernel can log: %w", err)
		}
	}
	if err := b.attempt(); err != nil {
		return false, fmt.Errorf("ask whether the kernel can log: %w", err)
	}
	refused, err := k.send(b)
	switch {
	case err == nil:
		return true, nil
	case refused >= 0 && b.parts[refused].rule >= 0:
		return false, nil
	}
	return false, fmt.Errorf("ask whether the kernel can log (needs CAP_NET_ADMIN): %w", err)
}

// transact is transaction, refused with ERESTART if anybody has committed since a generation; 0 is none.
func (k *Kernel) transact(ops []ruleset.Op, generation uint32) (string, error) {
	b := &k.batch
	b.start(k.nl.PID(), generation)
	defer func() {
		if cap(b.buf) > keptBuffer {
			b.buf, b.parts = nil, nil
		}
	}()
	b.grow(ops)
	for i, op := range ops {
		if err := b.operation(i, op, k.own); err != nil {
			return op.Name(), err
		}
	}
	if len(b.parts) == 0 {
		return "", nil
	}
	if err := b.finish(); err != nil {
		return "", fmt.Errorf("encode transaction: %w", err)
	}
	refused, err := k.send(b)
	if err == nil || refused < 0 {
		return "", err
	}
	p := b.parts[refused]
	if op := ops[p.op]; p.rule >= 0 {
		return ruleText(op, op.Chain.Rules[p.rule]), err
	}
	return ops[p.op].Name(), err
}

// send sends a transaction and returns the first error that the kernel answers, and which of its parts that is about, or -1. Netlink
// to the kernel is a call: when sendmsg returns, the answers are all there.
func (k *Kernel) send(b *batch) (int, error) {
	var sent error
	if err := k.raw.Write(func(fd uintptr) bool {
		sent = unix.Sendto(int(fd), b.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		return true
	}); err != nil || sent != nil {
		return -1, fmt.Errorf("send transaction of %d bytes: %w", len(b.buf), errors.Join(err, sent))
	}
	refused, done := -1, false
	var first error
	for {
		// What is cut off is the message that an error is about, which is here.
		var n int
		var received error
		if err := k.raw.Read(func(fd uintptr) bool {
			n, _, received = unix.Recvfrom(int(fd), k.answer[:], unix.MSG_DONTWAIT)
			return true
		}); err != nil {
			return refused, errors.Join(first, err)
		}
		switch {
		case errors.Is(received, unix.EAGAIN):
			if first == nil && !done {
				first = fmt.Errorf("the kernel's answer to the transaction is missing: %w", unix.ENOBUFS)
			}
			return refused, first
		case errors.Is(received, unix.EINTR):
			continue
		case received != nil: // ENOBUFS: answers were lost
			if first == nil {
				first = received
			}
			if !errors.Is(received, unix.ENOBUFS) {
				return refused, first
			}
			continue
		}
		at, errno, ok := b.answered(k.answer[:n])
		switch {
		case !ok || first != nil:
		case errno == 0:
			done = done || at == len(b.parts)-1
		default:
			refused, first = at, errno
		}
	}
}

// answered reads an answer: which part it is about, -1 for the whole, and the error, 0 for none.
func (b *batch) answered(answer []byte) (int, unix.Errno, bool) {
	const header, code = 16, 4 // struct nlmsghdr, and what follows it in struct nlmsgerr
	if len(answer) < header+code || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return 0, 0, false
	}
	at := int(binary.NativeEndian.Uint32(answer[8:])-b.begin) - 1
	if at < -1 || at > len(b.parts) {
		return 0, 0, false // another transaction's
	}
	if at == len(b.parts) {
		at = -1
	}
	return at, unix.Errno(-int32(binary.NativeEndian.Uint32(answer[header:]))), true //nolint:gosec // a negative number
}

// ruleText names one rule of an AddRules operation.
func ruleText(op ruleset.Op, r ruleset.Rule) string { return fmt.Sprintf("%s %q", op.Name(), r) }
