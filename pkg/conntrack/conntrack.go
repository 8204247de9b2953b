// Package conntrack reads the kernel's connection tracking table and deletes entries: those of connections that a change has
// revoked, and those of addresses that change their owner.
package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Config says which kernel to talk to.
type Config struct {
	// NetNS is a file descriptor of a network namespace, for tests; 0 is the caller's own.
	NetNS int
}

// Table is the connection tracking table of one network namespace. Its methods may be called concurrently; they take turns.
type Table struct {
	cfg Config

	mu sync.Mutex
	// sock is nil after a failure: what was left of an answer is gone with the old one, and the next use opens another.
	sock    *socket
	filters map[uint8]filterState // by address family
}

// maxDumps bounds how often a dump is repeated.
const maxDumps = 5

// New opens a netlink socket to the table.
func New(cfg Config) (*Table, error) {
	t := &Table{cfg: cfg, filters: map[uint8]filterState{}}
	if _, err := t.socket(); err != nil {
		return nil, fmt.Errorf("open netlink socket to conntrack: %w", explain(err))
	}
	return t, nil
}

// Close closes the socket.
func (t *Table) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reset()
}

// Filter selects flows by what Flow says of them: an address that is valid must be the flow's. The zero value selects all.
type Filter struct{ Src, Dst netip.Addr }

// Flows calls each for every flow that the filter selects. One that begins or ends meanwhile may be missing, and one may be
// reported twice. Each must not use the table.
//
// A table of 100,000 entries takes 0.15 s, nearly all of it in the kernel; with an address in IPv4, where the kernel filters,
// a fifth of that.
func (t *Table) Flows(ctx context.Context, filter Filter, each func(Flow)) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.list(ctx, selection{origSrc: plain(filter.Src), replySrc: plain(filter.Dst)}, func(e *entry) { each(e.flow()) })
	if err != nil {
		return fmt.Errorf("list conntrack entries: %w", explain(err))
	}
	return nil
}

// Delete deletes the entries of flows that Flows has reported, and returns how many of them were still there. A flow that is
// gone is no error. The entry is named by its id as well, so that another one of the same tuple is left alone. That is not
// always so: an id is a hash of the tuple and of the entry's place in memory (nf_ct_get_id), which goes to the next entry that
// is made. One that follows at once mostly has the same id.
//
// A flow that cannot be deleted does not keep the others from it; the error is the first. 100,000 flows take 0.1 to 0.3 s.
func (t *Table) Delete(ctx context.Context, flows []Flow) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n, err := t.delete(ctx, flows)
	if err != nil {
		return n, fmt.Errorf("delete conntrack entries: %w", err)
	}
	return n, nil
}

// Forget deletes all entries in which one of the addresses is a source or destination, in either direction: with NAT the
// reply's addresses are not those of the original packets. It returns how many there were, also with an error. It walks
// through the whole table, however many addresses there are, so callers should gather them: with its lock per bucket the walk
// takes milliseconds even when the table is empty. The kernel's filters would take four walks for each address.
func (t *Table) Forget(ips []netip.Addr) (int, error) {
	return t.forget(ips, func(*entry) bool { return true })
}

// ForgetPickedUp is Forget for the entries of TCP connections that the kernel picked up in the middle (nf_conntrack_tcp_loose):
// whose first packet it saw may have come from either end, so that they say nothing about which of them is the client.
func (t *Table) ForgetPickedUp(ips []netip.Addr) (int, error) {
	return t.forget(ips, func(e *entry) bool { return e.pickedUp })
}

func (t *Table) forget(ips []netip.Addr, which func(*entry) bool) (int, error) {
	set := map[netip.Addr]bool{}
	for _, ip := range ips {
		if ip = plain(ip); ip.IsValid() {
			set[ip] = true
		}
	}
	if len(set) == 0 {
		return 0, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	ctx := context.Background() // each answer of the kernel has its timeout
	var flows []Flow
	err := t.dump(ctx, unix.AF_UNSPEC, selection{}, func(e *entry) {
		if which(e) && (set[e.orig.src] || set[e.orig.dst] || set[e.reply.src] || set[e.reply.dst]) {
			flows = append(flows, e.flow())
		}
	})
	n := 0
	if err == nil {
		n, err = t.delete(ctx, flows)
	}
	if err != nil {
		return n, fmt.Errorf("delete conntrack entries of %d addresses: %w", len(set), explain(err))
	}
	return n, nil
}

// list calls each for the entries of a selection.
func (t *Table) list(ctx context.Context, sel selection, each func(*entry)) error {
	family, ok := sel.family()
	if !ok {
		return nil
	}
	state, err := filtered(sel, t.filters[family], func(sel selection, each func(*entry)) error {
		return t.dump(ctx, family, sel, each)
	}, each)
	t.filters[family] = state
	return err
}

// dump is a dump of a family's entries, repeated if the kernel could not complete it.
func (t *Table) dump(ctx context.Context, family uint8, sel selection, each func(*entry)) error {
	for attempt := 1; ; attempt++ {
		s, err := t.socket()
		if err != nil {
			return err
		}
		if err = s.dump(ctx, family, sel, each); err == nil {
			return nil
		}
		t.reset()
		if again := errors.Is(err, errInterrupted) || errors.Is(err, unix.ENOBUFS); !again || attempt == maxDumps {
			return err
		}
	}
}

func (t *Table) delete(ctx context.Context, flows []Flow) (int, error) {
	total := 0
	var first error
	for size := batchSize; len(flows) > 0; {
		if err := ctx.Err(); err != nil {
			return total, errors.Join(first, err)
		}
		s, err := t.socket()
		if err != nil {
			return total, errors.Join(first, err)
		}
		batch := flows[:min(size, len(flows))]
		n, err := s.delete(batch)
		total += n
		if err != nil {
			t.reset()
			// The kernel has executed the batch but could not say what failed. Those that went are found missing this time,
			// and not counted.
			if errors.Is(err, unix.ENOBUFS) && size > 1 {
				size = max(1, size/4)
				continue
			}
			if first == nil {
				first = err
			}
		}
		flows = flows[len(batch):]
	}
	return total, first
}

func (t *Table) socket() (*socket, error) {
	if t.sock == nil {
		s, err := dial(t.cfg.NetNS)
		if err != nil {
			return nil, err
		}
		t.sock = s
	}
	return t.sock, nil
}

func (t *Table) reset() {
	if t.sock != nil {
		t.sock.close()
		t.sock = nil
	}
}

// explain adds the remedy to the errors of a kernel that cannot list connections: nfnetlink answers EINVAL when no module
// has registered for the subsystem, and a kernel without netfilter has no such netlink family.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("%w; the kernel has no ctnetlink: load the module nf_conntrack_netlink (CONFIG_NF_CT_NETLINK)", err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w; CAP_NET_ADMIN is missing", err)
	}
	return err
}
