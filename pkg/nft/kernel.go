// Package nft executes ruleset deltas against the kernel's nftables and reads tables back.
package nft

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

const (
	// socketBuffer bounds one transaction and the kernel's answers to it (each added rule is echoed). The kernel allocates
	// what is used. 500,000 elements are about 8 MB. Without it a large transaction fails with EMSGSIZE, or with ENOBUFS
	// although it was applied (google/nftables#103).
	socketBuffer = 64 << 20

	// elementsPerMessage keeps the element list of a message below 64 KiB, the limit of a netlink attribute: 150 elements
	// that go to chains with 255-byte names are 46 kB.
	elementsPerMessage = 150

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
	mu   sync.Mutex
	conn *nftables.Conn
	nl   *netlink.Conn // conn's socket

	netNS int
	own   bool
}

// New opens the one netlink socket that all transactions go through.
func New(cfg Config) (*Kernel, error) {
	k := &Kernel{netNS: cfg.NetNS}
	conn, err := nftables.New(
		nftables.AsLasting(),
		nftables.WithNetNSFd(cfg.NetNS),
		nftables.WithSockOptions(func(c *netlink.Conn) error {
			k.nl = c
			return errors.Join(c.SetWriteBuffer(socketBuffer), c.SetReadBuffer(socketBuffer))
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket to nftables (needs CAP_NET_ADMIN and a kernel with nf_tables): %w", err)
	}
	k.conn = conn
	if cfg.Own {
		if k.own, err = k.knows(ownFlags); err != nil {
			return nil, errors.Join(err, k.Close())
		}
	}
	return k, nil
}

// Close closes the socket.
func (k *Kernel) Close() error {
	if err := k.conn.CloseLasting(); err != nil {
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

// message is one netlink message of a transaction.
type message struct {
	text func() string
	send func() error
}

// transaction sends the operations as one batch and returns which of them was refused, if the kernel says so.
func (k *Kernel) transaction(ops []ruleset.Op) (string, error) { return k.transact(ops, 0) }

// transact is transaction, refused with ERESTART if anybody has committed since a generation; 0 is none.
func (k *Kernel) transact(ops []ruleset.Op, generation uint32) (string, error) {
	// Everything is encoded before the first message is queued: the queue of conn can only be emptied by sending it.
	var msgs []message
	for _, op := range ops {
		m, err := k.encode(op)
		if err != nil {
			return op.Name(), err
		}
		msgs = append(msgs, m...)
	}
	var errs []error
	for _, m := range msgs {
		errs = append(errs, m.send())
	}
	if err := errors.Join(errs...); err != nil {
		// conn has kept the error, so this sends nothing and empties the queue.
		_ = k.conn.Flush()
		return "", fmt.Errorf("encode transaction: %w", err)
	}
	err := k.conn.FlushWithGenID(generation)
	if err == nil {
		return "", nil
	}
	if i := k.refused(err, len(msgs)); i >= 0 {
		return msgs[i].text(), err
	}
	return "", err
}

// refused returns the index of the message that an error is about, or -1. The sequence numbers of a socket are
// consecutive and a batch has a begin and an end message around the others, so the next number tells those before it.
func (k *Kernel) refused(err error, sent int) int {
	var op *netlink.OpError
	if !errors.As(err, &op) || op.Sequence == 0 {
		return -1
	}
	reply, err := k.nl.Execute(request(unix.NFT_MSG_GETGEN, 0, unix.NFPROTO_UNSPEC, nil))
	if err != nil || len(reply) == 0 {
		return -1
	}
	end := reply[0].Header.Sequence - 1
	i := sent - int(int32(end-op.Sequence))
	if i < 0 || i >= sent {
		return -1
	}
	return i
}

// encode translates an operation to netlink messages.
func (k *Kernel) encode(op ruleset.Op) ([]message, error) {
	table, err := kernelTable(op.Table)
	if err != nil {
		return nil, err
	}
	text := op.Name
	one := func(send func()) []message {
		return []message{{text: text, send: func() error { send(); return nil }}}
	}
	switch op.Kind {
	case ruleset.AddTable:
		if k.own {
			table.Flags = ownFlags
		}
		return one(func() { k.conn.AddTable(table) }), nil
	case ruleset.DelTable:
		return one(func() { k.conn.DelTable(table) }), nil
	case ruleset.AddSet:
		set, err := kernelSet(table, op.Set)
		if err != nil {
			return nil, err
		}
		return []message{{text: text, send: func() error { return k.conn.AddSet(set, nil) }}}, nil
	case ruleset.DelSet:
		return one(func() { k.conn.DelSet(&nftables.Set{Table: table, Name: op.Set.Name}) }), nil
	case ruleset.AddElements, ruleset.DelElements:
		return k.encodeElements(op, table, text)
	case ruleset.AddChain:
		chain, err := kernelChain(table, op.Chain)
		if err != nil {
			return nil, err
		}
		return one(func() { k.conn.AddChain(chain) }), nil
	case ruleset.FlushChain:
		return one(func() { k.conn.FlushChain(&nftables.Chain{Table: table, Name: op.Chain.Name}) }), nil
	case ruleset.DelChain:
		return one(func() { k.conn.DelChain(&nftables.Chain{Table: table, Name: op.Chain.Name}) }), nil
	case ruleset.AddRules:
		return k.encodeRules(op, table)
	}
	return nil, fmt.Errorf("operation %d is unknown", op.Kind)
}

func (k *Kernel) encodeElements(op ruleset.Op, table *nftables.Table, text func() string) ([]message, error) {
	elems, err := kernelElements(op.Set, op.Elements)
	if err != nil {
		return nil, err
	}
	set := &nftables.Set{Table: table, Name: op.Set.Name, ID: noSetID}
	send := k.conn.SetAddElements
	if op.Kind == ruleset.DelElements {
		send = k.conn.SetDeleteElements
	}
	var msgs []message
	for len(elems) > 0 {
		n := min(len(elems), elementsPerMessage)
		chunk := elems[:n]
		elems = elems[n:]
		msgs = append(msgs, message{text: text, send: func() error { return send(set, chunk) }})
	}
	return msgs, nil
}

func (k *Kernel) encodeRules(op ruleset.Op, table *nftables.Table) ([]message, error) {
	var msgs []message
	for _, r := range op.Chain.Rules {
		exprs, err := encodeRule(op.Table.Family, op.Chain.Hook, r)
		if err != nil {
			return nil, fmt.Errorf("rule %q: %w", r, err)
		}
		rule := &nftables.Rule{
			Table: table, Chain: &nftables.Chain{Name: op.Chain.Name}, Exprs: exprs, UserData: commentData(r.Comment),
		}
		msgs = append(msgs, message{
			text: func() string { return ruleText(op, r) },
			send: func() error { k.conn.AddRule(rule); return nil },
		})
	}
	return msgs, nil
}

// ruleText names one rule of an AddRules operation.
func ruleText(op ruleset.Op, r ruleset.Rule) string { return fmt.Sprintf("%s %q", op.Name(), r) }
