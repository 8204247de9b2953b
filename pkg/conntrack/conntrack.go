// Package conntrack reads the kernel's connection tracking table and deletes entries: those of connections that a change has
// revoked, and those of addresses that change their owner.
package conntrack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Config says which kernel to talk to.
type Config struct {
	// NetNS is a file descriptor of a network namespace, for tests; 0 is the caller's own. After New only a failure needs it again.
	NetNS int
}

// Table is the connection tracking table of one network namespace. Its methods may be called concurrently. Flows and Delete take
// turns, and so do Forget and ForgetPickedUp: whoever forgets need not wait for a long look.
type Table struct {
	looks   session
	filters map[uint8]filterState // by address family, under the lock of looks

	forgets session
	noFlush bool // the kernel has refused a flush by filter; under the lock of forgets
}

// session is a socket and the lock of those who take turns with it.
type session struct {
	netNS int
	mu    sync.Mutex
	// sock is nil after a failure: what was left of an answer is gone with the old one, and the next use opens another.
	sock *socket
}

// maxFlushed is how many addresses are forgotten by flushes: with a third, one dump is quicker if there are many entries.
const maxFlushed = 2

// maxDumps bounds how often a dump is repeated.
const maxDumps = 5

// New opens netlink sockets to the table.
func New(cfg Config) (*Table, error) {
	t := &Table{looks: session{netNS: cfg.NetNS}, filters: map[uint8]filterState{}, forgets: session{netNS: cfg.NetNS}}
	for _, s := range []*session{&t.looks, &t.forgets} {
		if _, err := s.socket(); err != nil {
			t.Close()
			return nil, fmt.Errorf("open netlink socket to conntrack: %w", explain(err))
		}
	}
	return t, nil
}

// Close closes the sockets.
func (t *Table) Close() {
	for _, s := range []*session{&t.looks, &t.forgets} {
		s.mu.Lock()
		s.reset()
		s.mu.Unlock()
	}
}

// Filter selects flows by what Flow says of them: an address that is valid must be the flow's. The zero value selects all.
type Filter struct{ Src, Dst netip.Addr }

// Flows calls each for every flow that the filter selects. One that begins or ends meanwhile may be missing, and one may be
// reported twice. Each must not use the table.
//
// A table of 100,000 entries takes 0.15 s, nearly all of it in the kernel; with an address in IPv4, where the kernel filters,
// a fifth of that.
func (t *Table) Flows(ctx context.Context, filter Filter, each func(Flow)) error {
	t.looks.mu.Lock()
	defer t.looks.mu.Unlock()
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
	t.looks.mu.Lock()
	defer t.looks.mu.Unlock()
	n, err := t.looks.delete(ctx, flows)
	if err != nil {
		return n, fmt.Errorf("delete conntrack entries: %w", err)
	}
	return n, nil
}

// Forget deletes the entries of connections of which one of the addresses is an end: where they come from before SNAT, or lead to after DNAT. Only
// in those entries is a packet that a pod of this address sends or receives.
//
// The entries of one IPv4 address or two, as most pods have, the kernel finds by itself (Linux 6.12). All else is one dump of the whole table,
// however many addresses there are, so callers should gather them. With 262,144 buckets and
//
//	                  no entry   1,000 entries   100,000 entries
//	one address        0.01 ms          0.6 ms             66 ms
//	two                0.01 ms          2.0 ms            140 ms
//	four, if flushed   0.01 ms          2.6 ms            256 ms
//	a dump              3.9 ms          5.0 ms            158 ms
//
// A flush is two walks for each address, but of those buckets only that have entries, and none if the namespace has none (get_next_corpse and
// nf_ct_iterate_cleanup_net in nf_conntrack_core.c); a dump locks every one (ctnetlink_dump_table), and does not show entries whose
// original tuple is another's (IPS_NAT_CLASH), which live for a second.
func (t *Table) Forget(ips []netip.Addr) error {
	t.forgets.mu.Lock()
	defer t.forgets.mu.Unlock()
	var err error
	t.noFlush, err = forget(addresses(ips), t.noFlush, t.forgets.forgetFlushed, func(set map[netip.Addr]bool) error {
		return t.forgets.forgetDumped(set, func(*entry) bool { return true })
	})
	return err
}

// ForgetPickedUp is Forget for the entries of TCP connections that the kernel picked up in the middle (nf_conntrack_tcp_loose):
// whose first packet it saw may have come from either end, so that they say nothing about which of them is the client. It always
// takes a walk.
func (t *Table) ForgetPickedUp(ips []netip.Addr) error {
	t.forgets.mu.Lock()
	defer t.forgets.mu.Unlock()
	return t.forgets.forgetDumped(addresses(ips), func(e *entry) bool { return e.pickedUp })
}

func addresses(ips []netip.Addr) map[netip.Addr]bool {
	set := map[netip.Addr]bool{}
	for _, ip := range ips {
		if ip = plain(ip); ip.IsValid() {
			set[ip] = true
		}
	}
	return set
}

// forget has the entries of addresses deleted by a flush or a dump, and returns whether the kernel is now known to refuse flushes.
func forget(set map[netip.Addr]bool, noFlush bool, flush func(netip.Addr) error, dump func(map[netip.Addr]bool) error) (bool, error) {
	flushed := !noFlush && len(set) <= maxFlushed
	for ip := range set {
		flushed = flushed && ip.Is4()
	}
	if !flushed {
		return noFlush, dump(set)
	}
	var ferr error
	for ip := range set {
		ferr = cmp.Or(ferr, flush(ip))
	}
	if ferr == nil {
		return false, nil
	}
	// The dump does what the flush has not, or says what is wrong: a kernel without ctnetlink refuses both.
	err := dump(set)
	return err == nil && refused(ferr), err
}

// forgetFlushed has the kernel delete the entries of an IPv4 address.
func (s *session) forgetFlushed(ip netip.Addr) error {
	sock, err := s.socket()
	if err != nil {
		return err
	}
	for _, sel := range []selection{{origSrc: ip}, {replySrc: ip}} {
		if err := sock.flush(sel); err != nil {
			s.reset()
			return err
		}
	}
	return nil
}

// forgetDumped deletes the entries of addresses that a dump finds, if which says so.
func (s *session) forgetDumped(set map[netip.Addr]bool, which func(*entry) bool) error {
	if len(set) == 0 {
		return nil
	}
	var v4, v6 bool
	for ip := range set {
		v4, v6 = v4 || ip.Is4(), v6 || !ip.Is4()
	}
	af := uint8(unix.AF_UNSPEC)
	switch {
	case !v6:
		af = unix.AF_INET
	case !v4:
		af = unix.AF_INET6
	}
	ctx := context.Background() // each answer of the kernel has its timeout
	var flows []Flow
	err := s.dump(ctx, af, selection{}, func(e *entry) {
		if which(e) && (set[e.orig.src] || set[e.reply.src]) {
			flows = append(flows, e.flow())
		}
	})
	if err == nil {
		_, err = s.delete(ctx, flows)
	}
	if err != nil {
		return fmt.Errorf("delete conntrack entries of %d addresses: %w", len(set), explain(err))
	}
	return nil
}

// list calls each for the entries of a selection.
func (t *Table) list(ctx context.Context, sel selection, each func(*entry)) error {
	family, ok := sel.family()
	if !ok {
		return nil
	}
	state, err := filtered(sel, t.filters[family], func(sel selection, each func(*entry)) error {
		return t.looks.dump(ctx, family, sel, each)
	}, each)
	t.filters[family] = state
	return err
}

// dump is a dump of a family's entries, repeated if the kernel could not complete it.
func (s *session) dump(ctx context.Context, family uint8, sel selection, each func(*entry)) error {
	for attempt := 1; ; attempt++ {
		sock, err := s.socket()
		if err != nil {
			return err
		}
		if err = sock.dump(ctx, family, sel, each); err == nil {
			return nil
		}
		s.reset()
		if again := errors.Is(err, errInterrupted) || errors.Is(err, unix.ENOBUFS); !again || attempt == maxDumps {
			return err
		}
	}
}

func (s *session) delete(ctx context.Context, flows []Flow) (int, error) {
	total := 0
	var first error
	for size := batchSize; len(flows) > 0; {
		if err := ctx.Err(); err != nil {
			return total, errors.Join(first, err)
		}
		sock, err := s.socket()
		if err != nil {
			return total, errors.Join(first, err)
		}
		batch := flows[:min(size, len(flows))]
		n, err := sock.delete(batch)
		total += n
		if err != nil {
			s.reset()
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

func (s *session) socket() (*socket, error) {
	if s.sock == nil {
		sock, err := dial(s.netNS)
		if err != nil {
			return nil, err
		}
		s.sock = sock
	}
	return s.sock, nil
}

func (s *session) reset() {
	if s.sock != nil {
		s.sock.close()
		s.sock = nil
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
