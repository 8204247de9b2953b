package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// Attributes that x/sys/unix does not have (linux/netfilter/nf_tables.h: enum nft_hook_attributes, nft_devices_attributes).
const (
	hookDevices = 4 // NFTA_HOOK_DEVS
	deviceName  = 1 // NFTA_DEVICE_NAME
)

// setConcatenated is NFT_SET_CONCAT (linux/netfilter/nf_tables.h).
const setConcatenated = 0x80

// Read returns those of the tables that exist, in the order of ids. Rules, sets and hooks that podwall cannot have
// written are not errors: their chain is Unknown, has a hook that equals none, or the set has no key and no elements.
// Anonymous sets belong to their rules and are left out.
func (k *Kernel) Read(ctx context.Context, ids ...ruleset.TableID) (ruleset.Ruleset, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out ruleset.Ruleset
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("read table %s %s: %w", id.Family, id.Name, err)
		}
		t, err := k.readTable(id)
		switch {
		case IsNotExist(err): // also when it goes between two dumps
		case err != nil:
			return nil, fmt.Errorf("read table %s %s: %w", id.Family, id.Name, err)
		default:
			out = append(out, t)
		}
	}
	return out, nil
}

func (k *Kernel) readTable(id ruleset.TableID) (*ruleset.Table, error) {
	family, err := kernelFamily(id.Family)
	if err != nil {
		return nil, err
	}
	r := reader{k: k, family: byte(family), table: ruleset.NewTable(id)}
	name := netlink.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(id.Name + "\x00")}
	if _, err := k.nl.Execute(request(unix.NFT_MSG_GETTABLE, 0, r.family, []netlink.Attribute{name})); err != nil {
		return nil, fmt.Errorf("get table: %w", err)
	}
	if err := errors.Join(r.chains(), r.rules(name), r.sets(name)); err != nil {
		return nil, err
	}
	return r.table, nil
}

type reader struct {
	k      *Kernel
	family byte
	table  *ruleset.Table
}

// request builds a netlink request of the nftables subsystem.
func request(typ int, flags netlink.HeaderFlags, family byte, attrs []netlink.Attribute) netlink.Message {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		panic(err) // attributes are names of at most 256 bytes
	}
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ), Flags: netlink.Request | flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, data...),
	}
}

// dump calls each with the attributes of every message of a dump. The kernel goes on with a dump by position, so one during
// which anybody committed, to whatever table, may lack or repeat objects and is done again. (It says so by a flag that is
// on the final message only when nothing is left to send, and that message the netlink library keeps for itself.)
func (r reader) dump(typ int, each func(*netlink.AttributeDecoder) error, attrs ...netlink.Attribute) error {
	for range maxDumps {
		before, err := r.k.generation()
		if err != nil {
			return err
		}
		if err := r.k.barrier(); err != nil {
			return err
		}
		msgs, err := r.k.nl.Execute(request(typ, netlink.Dump, r.family, attrs))
		if err != nil {
			return err
		}
		after, err := r.k.generation()
		if err != nil {
			return err
		}
		if before != after {
			continue
		}
		for _, m := range msgs {
			if len(m.Data) < 4 || m.Data[0] != r.family {
				continue
			}
			ad, err := netlink.NewAttributeDecoder(m.Data[4:])
			if err != nil {
				return err
			}
			ad.ByteOrder = binary.BigEndian
			if err := each(ad); err != nil {
				return err
			}
			if err := ad.Err(); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("the ruleset changed during each of %d dumps; find out who rewrites nftables all the time: %w", maxDumps, unix.EAGAIN)
}

// Generation returns the number of transactions that the kernel has committed, whoever sent them.
func (k *Kernel) Generation(context.Context) (uint32, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.generation()
}

// generation returns the number of transactions that the kernel has committed.
func (k *Kernel) generation() (uint32, error) {
	msgs, err := k.nl.Execute(request(unix.NFT_MSG_GETGEN, 0, unix.NFPROTO_UNSPEC, nil))
	if err != nil {
		return 0, fmt.Errorf("get generation: %w", err)
	}
	for _, m := range msgs {
		ad, err := netlink.NewAttributeDecoder(m.Data[4:])
		if err != nil {
			return 0, fmt.Errorf("get generation: %w", err)
		}
		ad.ByteOrder = binary.BigEndian
		for ad.Next() {
			if ad.Type() == unix.NFTA_GEN_ID {
				return ad.Uint32(), nil
			}
		}
	}
	return 0, errors.New("get generation: the kernel's answer has none")
}

// barrier waits for a commit that has a new generation already and is still moving its objects: an empty batch takes the
// mutex of all commits and changes nothing.
func (k *Kernel) barrier() error {
	_, err := k.nl.SendMessages([]netlink.Message{batchMessage(unix.NFNL_MSG_BATCH_BEGIN), batchMessage(unix.NFNL_MSG_BATCH_END)})
	if err != nil {
		return fmt.Errorf("send empty batch: %w", err)
	}
	return nil
}

// batchMessage begins or ends a transaction.
func batchMessage(typ netlink.HeaderType) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: typ, Flags: netlink.Request},
		Data:   binary.BigEndian.AppendUint16([]byte{unix.NFPROTO_UNSPEC, unix.NFNETLINK_V0}, unix.NFNL_SUBSYS_NFTABLES),
	}
}

func (r reader) chains() error {
	err := r.dump(unix.NFT_MSG_GETCHAIN, func(ad *netlink.AttributeDecoder) error {
		var table, typ string
		policy := uint32(nftables.ChainPolicyAccept)
		c := &ruleset.Chain{}
		var hook []byte
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_CHAIN_TABLE:
				table = ad.String()
			case unix.NFTA_CHAIN_NAME:
				c.Name = ad.String()
			case unix.NFTA_CHAIN_TYPE:
				typ = ad.String()
			case unix.NFTA_CHAIN_POLICY:
				policy = ad.Uint32()
			case unix.NFTA_CHAIN_HOOK:
				hook = ad.Bytes()
			}
		}
		if table != r.table.ID.Name {
			return nil
		}
		if hook != nil {
			h, err := decodeHook(r.table.ID.Family, hook)
			if err != nil {
				return err
			}
			if typ != string(nftables.ChainTypeFilter) || policy != uint32(nftables.ChainPolicyAccept) {
				h.Name += " (foreign)" // differs from every hook, so that Diff replaces the chain
			}
			c.Hook = h
		}
		r.table.Chains[c.Name] = c
		return nil
	})
	if err != nil {
		return fmt.Errorf("dump chains: %w", err)
	}
	return nil
}

func decodeHook(family ruleset.Family, data []byte) (*ruleset.Hook, error) {
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return nil, err
	}
	ad.ByteOrder = binary.BigEndian
	h := &ruleset.Hook{Name: "unknown"}
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_HOOK_HOOKNUM:
			number := nftables.ChainHook(ad.Uint32())
			for name, n := range hookNumbers[family] {
				if n == number {
					h.Name = name
				}
			}
		case unix.NFTA_HOOK_PRIORITY:
			h.Priority = int(int32(ad.Uint32()))
		case unix.NFTA_HOOK_DEV:
			h.Device = ad.String()
		case hookDevices:
			var names []string
			ad.Nested(func(nad *netlink.AttributeDecoder) error {
				for nad.Next() {
					if nad.Type() == deviceName {
						names = append(names, nad.String())
					}
				}
				return nil
			})
			h.Device = strings.Join(names, ",")
		}
	}
	return h, ad.Err()
}

// rules reads the rules of all chains in one dump: one dump per chain is linear in the rules of all chains, each.
func (r reader) rules(table netlink.Attribute) error {
	err := r.dump(unix.NFT_MSG_GETRULE, func(ad *netlink.AttributeDecoder) error {
		var tableName, chain string
		var list, userData []byte
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_RULE_TABLE:
				tableName = ad.String()
			case unix.NFTA_RULE_CHAIN:
				chain = ad.String()
			case unix.NFTA_RULE_EXPRESSIONS:
				list = ad.Bytes()
			case unix.NFTA_RULE_USERDATA:
				userData = ad.Bytes()
			}
		}
		c := r.table.Chains[chain]
		if tableName != r.table.ID.Name || c == nil {
			return nil
		}
		if exprs, ok := decodeExprs(r.family, list); ok {
			if rule, ok := decodeRule(r.table.ID.Family, exprs, userData); ok {
				c.Rules = append(c.Rules, rule)
				return nil
			}
		}
		c.Unknown = true
		return nil
	}, table)
	if err != nil {
		return fmt.Errorf("dump rules: %w", err)
	}
	return nil
}

func (r reader) sets(table netlink.Attribute) error {
	err := r.dump(unix.NFT_MSG_GETSET, func(ad *netlink.AttributeDecoder) error {
		s := &ruleset.Set{}
		var tableName string
		var flags, keyType, dataType uint32
		var timeout uint64 // milliseconds
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_SET_TABLE:
				tableName = ad.String()
			case unix.NFTA_SET_NAME:
				s.Name = ad.String()
			case unix.NFTA_SET_FLAGS:
				flags = ad.Uint32()
			case unix.NFTA_SET_KEY_TYPE:
				keyType = ad.Uint32()
			case unix.NFTA_SET_DATA_TYPE:
				dataType = ad.Uint32()
			case unix.NFTA_SET_TIMEOUT:
				timeout = ad.Uint64()
			case unix.NFTA_SET_DESC:
				s.Size = setSize(ad)
			case unix.NFTA_SET_USERDATA:
				s.Comment = udata(ad.Bytes(), userdata.NFTNL_UDATA_SET_COMMENT)
			}
		}
		if tableName != r.table.ID.Name || flags&unix.NFT_SET_ANONYMOUS != 0 {
			return nil
		}
		s.Map, s.Interval = flags&unix.NFT_SET_MAP != 0, flags&unix.NFT_SET_INTERVAL != 0
		s.Timeout = time.Duration(timeout) * time.Millisecond //nolint:gosec // what Kernel wrote, or nothing that matters
		s.Dynamic = flags&unix.NFT_SET_EVAL != 0
		foreign := flags&^(unix.NFT_SET_MAP|unix.NFT_SET_INTERVAL|unix.NFT_SET_TIMEOUT|unix.NFT_SET_EVAL|setConcatenated) != 0 || s.Map && dataType != unix.NFT_DATA_VERDICT
		if !foreign {
			s.Key = decodeKey(keyType)
		}
		if s.Interval && len(s.Key) > 1 {
			s.Key = nil // concatenated ranges
		}
		r.table.Sets[s.Name] = s
		return nil
	}, table)
	if err != nil {
		return fmt.Errorf("dump sets: %w", err)
	}
	for _, s := range r.table.Sets {
		if s.Key == nil || s.Timeout > 0 {
			continue
		}
		if err := r.elements(s, table); err != nil {
			return fmt.Errorf("dump elements of set %s: %w", s.Name, err)
		}
	}
	return nil
}

// setSize returns the bound of a set; 0 is none.
func setSize(ad *netlink.AttributeDecoder) uint32 {
	var size uint32
	ad.Nested(func(nad *netlink.AttributeDecoder) error {
		for nad.Next() {
			if nad.Type() == unix.NFTA_SET_DESC_SIZE {
				size = nad.Uint32()
			}
		}
		return nil
	})
	return size
}

// Elements returns the elements of one set, also of one with a timeout, whose elements Read leaves alone. A set that is not there
// has none.
func (k *Kernel) Elements(ctx context.Context, id ruleset.TableID, set *ruleset.Set) ([]ruleset.Elem, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("read elements of set %s: %w", set.Name, err)
	}
	family, err := kernelFamily(id.Family)
	if err != nil {
		return nil, err
	}
	s := &ruleset.Set{Name: set.Name, Key: set.Key, Map: set.Map}
	r := reader{k: k, family: byte(family), table: ruleset.NewTable(id)}
	err = r.elements(s, netlink.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(id.Name + "\x00")})
	switch {
	case IsNotExist(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read elements of set %s: %w", set.Name, err)
	}
	return slices.Collect(maps.Keys(s.Elements)), nil
}

// decodeKey returns the parts of a key type, which nft numbers with 6 bits each, or nil if podwall does not have one.
func decodeKey(number uint32) []ruleset.KeyType {
	var key []ruleset.KeyType
	for ; number != 0; number >>= nftables.SetConcatTypeBits {
		found := false
		for name, t := range keyTypes {
			if t.GetNFTMagic() == number&nftables.SetConcatTypeMask {
				key, found = append(key, name), true
			}
		}
		if !found {
			return nil
		}
	}
	slices.Reverse(key)
	return key
}

// element is an element as the kernel has it: intervals are two of them.
type element struct {
	key  string
	data []byte
	end  bool
}

// elements fills in a set's elements. A hash table that is being resized, which goes on for a while after many elements were
// added, shows some elements of a long dump twice and as many not at all: such a dump is done again.
func (r reader) elements(s *ruleset.Set, table netlink.Attribute) error {
	for range maxDumps {
		elems, err := r.dumpElements(s, table)
		if err != nil {
			return err
		}
		s.Elements = make(map[ruleset.Elem]ruleset.Verdict, len(elems))
		if s.Interval {
			return intervals(s, elems)
		}
		for _, e := range elems {
			key, ok := unpad(s.Key, e.key)
			if !ok {
				return fmt.Errorf("element %x does not fit %s", e.key, s.Key)
			}
			var v ruleset.Verdict
			if s.Map {
				v = decodeVerdict(e.data)
			}
			s.Elements[key] = v
		}
		if len(s.Elements) == len(elems) {
			return nil
		}
	}
	return fmt.Errorf("elements were repeated in each of %d dumps: %w", maxDumps, unix.EAGAIN)
}

func (r reader) dumpElements(s *ruleset.Set, table netlink.Attribute) ([]element, error) {
	var elems []element
	set := netlink.Attribute{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(s.Name + "\x00")}
	table.Type = unix.NFTA_SET_ELEM_LIST_TABLE
	err := r.dump(unix.NFT_MSG_GETSETELEM, func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			if ad.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				continue
			}
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					list.Nested(func(ad *netlink.AttributeDecoder) error {
						elems = append(elems, decodeElement(ad))
						return nil
					})
				}
				return nil
			})
		}
		return nil
	}, set, table)
	return elems, err
}

func decodeElement(ad *netlink.AttributeDecoder) element {
	var e element
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_SET_ELEM_KEY:
			ad.Nested(func(nad *netlink.AttributeDecoder) error {
				for nad.Next() {
					if nad.Type() == unix.NFTA_DATA_VALUE {
						e.key = string(nad.Bytes())
					}
				}
				return nil
			})
		case unix.NFTA_SET_ELEM_DATA:
			e.data = ad.Bytes()
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = ad.Uint32()&unix.NFT_SET_ELEM_INTERVAL_END != 0
		}
	}
	return e
}

// intervals pairs the beginnings and ends of intervals. An end is the address behind the last; the last interval has none
// when it goes to the highest address. An end without a beginning (nft writes one at 0) says nothing.
func intervals(s *ruleset.Set, elems []element) error {
	slices.SortFunc(elems, func(a, b element) int {
		if c := strings.Compare(a.key, b.key); c != 0 {
			return c
		}
		if a.end == b.end {
			return 0
		}
		if a.end {
			return -1
		}
		return 1
	})
	from := ""
	for _, e := range elems {
		if len(e.key) != s.Key[0].Len() {
			return fmt.Errorf("element %x does not fit %s", e.key, s.Key)
		}
		switch {
		case !e.end:
			from = e.key
		case from != "":
			s.Elements[ruleset.Elem(from+previous(e.key))] = ruleset.Verdict{}
			from = ""
		}
	}
	if from != "" {
		s.Elements[ruleset.Elem(from+strings.Repeat("\xff", len(from)))] = ruleset.Verdict{}
	}
	return nil
}

// previous returns the number before a big endian number that is not 0.
func previous(v string) string {
	b := []byte(v)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]--
		if b[i] != 0xff {
			break
		}
	}
	return string(b)
}

// unpad is the inverse of pad.
func unpad(key []ruleset.KeyType, padded string) (ruleset.Elem, bool) {
	if len(key) == 1 {
		return ruleset.Elem(padded), len(padded) == key[0].Len()
	}
	var e ruleset.Elem
	for _, k := range key {
		words := (k.Len() + 3) &^ 3
		if len(padded) < words {
			return "", false
		}
		e += ruleset.Elem(padded[:k.Len()])
		padded = padded[words:]
	}
	return e, padded == ""
}
