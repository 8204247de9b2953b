package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// ownFlags make a table refuse every other socket's changes, and outlive its own (Linux 6.9). Never owner alone (5.12): the
// kernel deletes such a table when the socket closes (nft_rcv_nl_event), which opens the node when the daemon ends.
const ownFlags = nftables.TableFlagOwner | nftables.TableFlagPersist

// tableOwner is NFTA_TABLE_OWNER (linux/netfilter/nf_tables.h); x/sys/unix does not have it.
const tableOwner = 7

// tableState is what the kernel says of a table beside its content.
type tableState struct {
	flags nftables.TableFlags
	port  uint32 // of the netlink socket that owns it, with flag owner
}

// knows asks the kernel whether it has these flags for tables, as nft --check asks: a batch without its end is looked at and given up
// (nfnetlink_rcv_batch), so that nobody ever sees the table, and no namespace has to be made for which CAP_NET_ADMIN would
// not do. An older kernel refuses flags that it does not know (nf_tables_newtable).
func (k *Kernel) knows(flags nftables.TableFlags) (bool, error) {
	create := request(unix.NFT_MSG_NEWTABLE, netlink.Create|netlink.Acknowledge, unix.NFPROTO_INET, []netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: fmt.Appendf(nil, "podwall-probe-%08x\x00", rand.Uint32())},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, uint32(flags))},
	})
	if _, err := k.nl.SendMessages([]netlink.Message{batchMessage(unix.NFNL_MSG_BATCH_BEGIN), create}); err != nil {
		return false, fmt.Errorf("ask for table flags: %w", err)
	}
	switch _, err := k.nl.Receive(); {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL): // before 5.12 any flag but dormant was EINVAL
		return false, nil
	default:
		return false, fmt.Errorf("ask for table flags (needs CAP_NET_ADMIN): %w", err)
	}
}

// Owns reports whether this Kernel makes its tables its own: it was asked to, and the kernel can.
func (k *Kernel) Owns() bool { return k.own }

// SyscallConn gives access to the socket that owns the tables, to pass it to another process: they stay owned for as long as
// anybody has it open.
func (k *Kernel) SyscallConn() (syscall.RawConn, error) { return k.nl.SyscallConn() }

// Owned returns those of the tables that nobody but this Kernel can change.
func (k *Kernel) Owned(ctx context.Context, ids ...ruleset.TableID) ([]ruleset.TableID, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var owned []ruleset.TableID
	for _, id := range ids {
		st, err := k.state(ctx, id)
		if err != nil {
			return nil, err
		}
		if st != nil && k.owned(st) {
			owned = append(owned, id)
		}
	}
	return owned, nil
}

func (k *Kernel) owned(st *tableState) bool {
	return st.flags&ownFlags == ownFlags && st.port == k.nl.PID()
}

// Own makes those of the tables that exist this Kernel's own, if it owns tables, and wakes those that somebody has made
// dormant, which it returns. What they enforce is not interrupted. A table that another socket owns is an error for
// IsPermission. A table without flags, which a podwall before this one has made, cannot be given them (nf_tables_updtable): it
// is replaced by its like in one transaction, or left for another time while it holds something that cannot be read back.
func (k *Kernel) Own(ctx context.Context, ids ...ruleset.TableID) ([]ruleset.TableID, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var woken []ruleset.TableID
	var errs []error
	for _, id := range ids {
		st, err := k.state(ctx, id)
		if err == nil && st != nil {
			if st.flags&nftables.TableFlagDormant != 0 {
				woken = append(woken, id)
			}
			err = k.take(id, st)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("own table %s %s: %w", id.Family, id.Name, err))
		}
	}
	return woken, errors.Join(errs...)
}

func (k *Kernel) take(id ruleset.TableID, st *tableState) error {
	want := st.flags &^ nftables.TableFlagDormant
	if k.own && st.flags&nftables.TableFlagPersist != 0 {
		want |= nftables.TableFlagOwner
	}
	switch {
	case st.flags&nftables.TableFlagOwner != 0 && st.port != k.nl.PID():
		return fmt.Errorf("the process with netlink port %d, which is its PID or negative, owns it: %w", int32(st.port), unix.EPERM)
	case want != st.flags:
		// Alone in its transaction: base chains cannot be added in the one that changes flags (nf_tables_addchain).
		if err := k.setFlags(id, want); err != nil {
			return err
		}
	}
	if k.own && want&ownFlags != ownFlags {
		return k.replace(id)
	}
	return nil
}

func (k *Kernel) setFlags(id ruleset.TableID, flags nftables.TableFlags) error {
	family, err := kernelFamily(id.Family)
	if err != nil {
		return err
	}
	b := &k.batch
	b.start(k.nl.PID(), 0)
	b.table(part{0, -1}, byte(family), id.Name, flags)
	if err := b.finish(); err != nil {
		return err
	}
	_, err = k.send(b)
	return err
}

// replace deletes a table and makes it anew, with flags, in one transaction: packets see the rules of the one until they see
// those of the other. Only what is there is made, by what was read: a table that holds more is left as it is.
func (k *Kernel) replace(id ruleset.TableID) error {
	generation, err := k.generation()
	if err != nil {
		return err
	}
	t, err := k.readTable(id)
	if err != nil {
		return err
	}
	if whole, err := k.whole(t); err != nil || !whole {
		return err
	}
	d := ruleset.Diff(nil, ruleset.Ruleset{t})
	// Interval sets would be prepared in a transaction of their own, which a table that is still there does not allow for. They
	// are allow-lists: what they deny for the moment of the commit is sent again.
	ops := slices.Concat([]ruleset.Op{{Kind: ruleset.DelTable, Table: id}}, d.Prepare, d.Apply)
	if op, err := k.transact(ops, generation); err != nil {
		return fmt.Errorf("replace: %s: %w", op, err)
	}
	return nil
}

// whole reports whether a table that was read back is all that is in the kernel, but for counters.
func (k *Kernel) whole(t *ruleset.Table) (bool, error) {
	family, err := kernelFamily(t.ID.Family)
	if err != nil {
		return false, err
	}
	r := reader{k: k, family: byte(family), table: t}
	for _, c := range t.Chains {
		if c.Unknown {
			return false, nil
		}
		if c.Hook == nil {
			continue
		}
		if _, ok := hookNumbers[t.ID.Family][c.Hook.Name]; !ok || strings.Contains(c.Hook.Device, ",") {
			return false, nil
		}
	}
	for _, s := range t.Sets {
		if s.Key == nil {
			return false, nil
		}
		if s.Timeout == 0 || s.Dynamic {
			continue // what rules put into a set they put there again
		}
		// Elements with a timeout are not read back; they expire.
		elems, err := r.dumpElements(s, netlink.Attribute{Data: []byte(t.ID.Name + "\x00")})
		if err != nil || len(elems) > 0 {
			return false, err
		}
	}
	return true, nil
}

// state returns what the kernel says of a table, or nil if there is none.
func (k *Kernel) state(ctx context.Context, id ruleset.TableID) (*tableState, error) {
	family, err := kernelFamily(id.Family)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("get table %s %s: %w", id.Family, id.Name, err)
	}
	name := netlink.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(id.Name + "\x00")}
	msgs, err := k.nl.Execute(request(unix.NFT_MSG_GETTABLE, 0, byte(family), []netlink.Attribute{name}))
	if IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("get table %s %s: %w", id.Family, id.Name, err)
	}
	st := &tableState{}
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		ad, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return nil, fmt.Errorf("get table %s %s: %w", id.Family, id.Name, err)
		}
		ad.ByteOrder = binary.BigEndian
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_TABLE_FLAGS:
				st.flags = nftables.TableFlags(ad.Uint32())
			case tableOwner:
				st.port = ad.Uint32()
			}
		}
		if err := ad.Err(); err != nil {
			return nil, fmt.Errorf("get table %s %s: %w", id.Family, id.Name, err)
		}
	}
	return st, nil
}
