package nft

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// Hook numbers of base chains. They differ per family: inet's ingress is behind the five IP hooks (linux/netfilter.h,
// NF_INET_INGRESS = NF_INET_NUMHOOKS), netdev has a numbering of its own (enum nf_dev_hooks; egress since Linux 5.16).
var hookNumbers = map[ruleset.Family]map[string]nftables.ChainHook{
	ruleset.Inet: {
		"prerouting": unix.NF_INET_PRE_ROUTING,
		"input":      unix.NF_INET_LOCAL_IN,
		"forward":    unix.NF_INET_FORWARD,
		"output":     unix.NF_INET_LOCAL_OUT,
		"ingress":    unix.NF_INET_NUMHOOKS,
	},
	ruleset.Netdev: {
		"ingress": unix.NF_NETDEV_INGRESS,
		"egress":  unix.NF_NETDEV_EGRESS,
	},
}

// Values of reject expressions (linux/netfilter/nf_tables.h: enum nft_reject_types, enum nft_reject_inet_code).
const (
	rejectTCPReset           = 1
	rejectICMPX              = 2
	icmpxAdminProhibitedCode = 3
)

// ctStateUntracked is NF_CT_STATE_UNTRACKED_BIT (linux/netfilter/nf_conntrack_common.h); the lower four bits are those of
// ruleset.CTState.
const ctStateUntracked = 1 << 6

// The byte orders of a set's key, as nft keeps them in its user data (src/datatype.c, enum byteorder).
const (
	byteOrderHost = 1
	byteOrderBig  = 2
)

// registers is how many 32-bit data registers the kernel has (NFT_REG32_00 to NFT_REG32_15).
const registers = 16

// location says where a field is: in the packet's metadata, or in one of its headers.
type location struct {
	meta    expr.MetaKey
	base    expr.PayloadBase // of a header field
	offset  uint32
	len     uint32
	ip      ipVersion // what the packet must be for the field to exist
	payload bool
}

type ipVersion uint8

const (
	ipv4 ipVersion = 4
	ipv6 ipVersion = 6
	arp  ipVersion = 1 // no IP, but told by the ether type like the others
)

// fields are the locations of all fields: header offsets of RFC 791, RFC 8200, RFC 4443; ports are at the same place in
// TCP, UDP and SCTP; the ether type follows two addresses of 6 bytes.
var fields = map[ruleset.Field]location{
	ruleset.IIFName:     {meta: expr.MetaKeyIIFNAME, len: unix.IFNAMSIZ},
	ruleset.OIFName:     {meta: expr.MetaKeyOIFNAME, len: unix.IFNAMSIZ},
	ruleset.PktType:     {meta: expr.MetaKeyPKTTYPE, len: 1},
	ruleset.L4Proto:     {meta: expr.MetaKeyL4PROTO, len: 1},
	ruleset.EtherType:   {payload: true, base: expr.PayloadBaseLLHeader, offset: 12, len: 2},
	ruleset.IPSaddr:     {payload: true, base: expr.PayloadBaseNetworkHeader, offset: 12, len: 4, ip: ipv4},
	ruleset.IPDaddr:     {payload: true, base: expr.PayloadBaseNetworkHeader, offset: 16, len: 4, ip: ipv4},
	ruleset.IP6HopLimit: {payload: true, base: expr.PayloadBaseNetworkHeader, offset: 7, len: 1, ip: ipv6},
	ruleset.IP6Saddr:    {payload: true, base: expr.PayloadBaseNetworkHeader, offset: 8, len: 16, ip: ipv6},
	ruleset.IP6Daddr:    {payload: true, base: expr.PayloadBaseNetworkHeader, offset: 24, len: 16, ip: ipv6},
	ruleset.ICMPv6Type:  {payload: true, base: expr.PayloadBaseTransportHeader, offset: 0, len: 1, ip: ipv6},
	ruleset.Sport:       {payload: true, base: expr.PayloadBaseTransportHeader, offset: 0, len: 2},
	ruleset.Dport:       {payload: true, base: expr.PayloadBaseTransportHeader, offset: 2, len: 2},
	ruleset.ARPSaddr:    {payload: true, base: expr.PayloadBaseNetworkHeader, offset: 14, len: 4, ip: arp},
	ruleset.NDTarget:    {payload: true, base: expr.PayloadBaseTransportHeader, offset: 8, len: 16, ip: ipv6},
	ruleset.TCPFlags:    {payload: true, base: expr.PayloadBaseTransportHeader, offset: 13, len: 1},
}

var verdicts = map[ruleset.VerdictKind]expr.VerdictKind{
	ruleset.Accept: expr.VerdictAccept,
	ruleset.Drop:   expr.VerdictDrop,
	ruleset.Return: expr.VerdictReturn,
	ruleset.Jump:   expr.VerdictJump,
	ruleset.Goto:   expr.VerdictGoto,
}

var keyTypes = map[ruleset.KeyType]nftables.SetDatatype{
	ruleset.IPv4Addr:    nftables.TypeIPAddr,
	ruleset.IPv6Addr:    nftables.TypeIP6Addr,
	ruleset.InetProto:   nftables.TypeInetProto,
	ruleset.InetService: nftables.TypeInetService,
	ruleset.ICMPv6:      nftables.TypeICMP6Type,
	ruleset.IfName:      nftables.TypeIFName,
}

func kernelFamily(f ruleset.Family) (nftables.TableFamily, error) {
	switch f {
	case ruleset.Inet:
		return nftables.TableFamilyINet, nil
	case ruleset.Netdev:
		return nftables.TableFamilyNetdev, nil
	}
	return 0, fmt.Errorf("family %q is unknown; use inet or netdev", f)
}

// operation writes the messages of the i-th operation of a transaction. own is whether tables become the sender's own.
func (b *batch) operation(i int, op ruleset.Op, own bool) error {
	family, err := kernelFamily(op.Table.Family)
	if err != nil {
		return err
	}
	begin := func(typ uint16, flags netlink.HeaderFlags) {
		b.message(part{i, -1}, typ, flags, byte(family))
	}
	switch op.Kind {
	case ruleset.AddTable:
		var flags nftables.TableFlags
		if own {
			flags = ownFlags
		}
		b.table(part{i, -1}, byte(family), op.Table.Name, flags)
		return nil
	case ruleset.DelTable:
		begin(unix.NFT_MSG_DELTABLE, 0)
		b.text(unix.NFTA_TABLE_NAME, op.Table.Name)
	case ruleset.AddSet:
		begin(unix.NFT_MSG_NEWSET, netlink.Create)
		if err := b.set(op.Table, op.Set); err != nil {
			return err
		}
	case ruleset.DelSet:
		begin(unix.NFT_MSG_DELSET, 0)
		b.text(unix.NFTA_SET_TABLE, op.Table.Name)
		b.text(unix.NFTA_SET_NAME, op.Set.Name)
	case ruleset.AddElements:
		return b.elements(op, func() { begin(unix.NFT_MSG_NEWSETELEM, netlink.Create) })
	case ruleset.DelElements:
		return b.elements(op, func() { begin(unix.NFT_MSG_DELSETELEM, 0) })
	case ruleset.AddChain:
		begin(unix.NFT_MSG_NEWCHAIN, netlink.Create)
		if err := b.chain(op.Table, op.Chain); err != nil {
			return err
		}
	case ruleset.FlushChain:
		begin(unix.NFT_MSG_DELRULE, 0)
		b.text(unix.NFTA_RULE_TABLE, op.Table.Name)
		b.text(unix.NFTA_RULE_CHAIN, op.Chain.Name)
	case ruleset.DelChain:
		begin(unix.NFT_MSG_DELCHAIN, 0)
		b.text(unix.NFTA_CHAIN_TABLE, op.Table.Name)
		b.text(unix.NFTA_CHAIN_NAME, op.Chain.Name)
	case ruleset.AddRules:
		return b.rules(i, op, byte(family))
	default:
		return fmt.Errorf("operation %d is unknown", op.Kind)
	}
	b.close()
	return nil
}

// table writes the message that adds a table, or changes the flags of one that is there.
func (b *batch) table(p part, family byte, name string, flags nftables.TableFlags) {
	b.message(p, unix.NFT_MSG_NEWTABLE, netlink.Create, family)
	b.text(unix.NFTA_TABLE_NAME, name)
	b.u32(unix.NFTA_TABLE_FLAGS, uint32(flags))
	b.close()
}

func (b *batch) chain(table ruleset.TableID, c *ruleset.Chain) error {
	b.text(unix.NFTA_CHAIN_TABLE, table.Name)
	b.text(unix.NFTA_CHAIN_NAME, c.Name)
	if c.Hook == nil {
		return nil
	}
	number, ok := hookNumbers[table.Family][c.Hook.Name]
	if !ok {
		return fmt.Errorf("hook %q is unknown in family %s", c.Hook.Name, table.Family)
	}
	hook := b.nest(unix.NFTA_CHAIN_HOOK)
	b.u32(unix.NFTA_HOOK_HOOKNUM, uint32(number))
	b.u32(unix.NFTA_HOOK_PRIORITY, uint32(c.Hook.Priority)) //nolint:gosec // the kernel's int, which has 32 bits
	if c.Hook.Device != "" {
		b.text(unix.NFTA_HOOK_DEV, c.Hook.Device)
	}
	b.done(hook)
	b.u32(unix.NFTA_CHAIN_POLICY, uint32(nftables.ChainPolicyAccept))
	b.text(unix.NFTA_CHAIN_TYPE, string(nftables.ChainTypeFilter))
	return nil
}

// set writes a set without its elements, with what nft needs to list it: the key's byte order, the lengths of a concatenation's parts.
func (b *batch) set(table ruleset.TableID, s *ruleset.Set) error {
	types := make([]nftables.SetDatatype, len(s.Key))
	for i, k := range s.Key {
		t, ok := keyTypes[k]
		if !ok {
			return fmt.Errorf("key type %q is unknown", k)
		}
		types[i] = t
	}
	var key nftables.SetDatatype
	var flags, order uint32 = 0, byteOrderBig
	switch {
	case len(types) == 1:
		if key = types[0]; s.Key[0] == ruleset.IfName {
			order = byteOrderHost // nft lists a name by it
		}
	case s.Interval:
		return errors.New("an interval set has one key type") // concatenated ranges are another backend
	default:
		t, err := nftables.ConcatSetType(types...)
		if err != nil {
			return err
		}
		key = t
		flags |= setConcatenated
	}
	if s.Interval {
		flags |= unix.NFT_SET_INTERVAL
	}
	if s.Map {
		flags |= unix.NFT_SET_MAP
	}
	if s.Timeout > 0 {
		flags |= unix.NFT_SET_TIMEOUT
	}
	if s.Dynamic {
		flags |= unix.NFT_SET_EVAL
	}
	b.text(unix.NFTA_SET_TABLE, table.Name)
	b.text(unix.NFTA_SET_NAME, s.Name)
	b.u32(unix.NFTA_SET_FLAGS, flags)
	b.u32(unix.NFTA_SET_KEY_TYPE, key.GetNFTMagic())
	b.u32(unix.NFTA_SET_KEY_LEN, key.Bytes)
	b.u32(unix.NFTA_SET_ID, uint32(len(b.parts))) //nolint:gosec // any number that no other set of the transaction has
	if s.Map {
		b.u32(unix.NFTA_SET_DATA_TYPE, unix.NFT_DATA_VERDICT)
		b.u32(unix.NFTA_SET_DATA_LEN, 0)
	}
	if s.Timeout > 0 {
		b.u64(unix.NFTA_SET_TIMEOUT, uint64(s.Timeout.Milliseconds())) //nolint:gosec // positive
	}
	if s.Size > 0 || len(types) > 1 {
		desc := b.nest(unix.NFTA_SET_DESC)
		if s.Size > 0 {
			b.u32(unix.NFTA_SET_DESC_SIZE, s.Size)
		}
		if len(types) > 1 {
			concat := b.nest(setDescConcat)
			for _, t := range types {
				field := b.nest(unix.NFTA_LIST_ELEM)
				b.u32(setFieldLen, t.Bytes)
				b.done(field)
			}
			b.done(concat)
		}
		b.done(desc)
	}
	user := userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, order)
	if comment := ruleset.Comment(s.Comment); comment != "" {
		user = userdata.AppendString(user, userdata.NFTNL_UDATA_SET_COMMENT, comment)
	}
	b.value(unix.NFTA_SET_USERDATA, user)
	return nil
}

// elements writes as many messages as the elements need. Intervals are in ascending order, which the kernel needs to recognise those
// that overlap; each is its first address and the one behind its last, unless that is the highest. The set is
// named and not numbered: with a number the kernel would take another set that has it, should somebody have deleted the one that is meant
// (nft_set_lookup_global).
func (b *batch) elements(op ruleset.Op, begin func()) error {
	list := -1
	end := func() {
		if list >= 0 {
			b.done(list)
			b.close()
		}
	}
	element := func(key []byte, write func()) {
		if list < 0 || len(b.buf)-list > mostElements {
			end()
			begin()
			b.text(unix.NFTA_SET_ELEM_LIST_TABLE, op.Table.Name)
			b.text(unix.NFTA_SET_ELEM_LIST_SET, op.Set.Name)
			list = b.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		}
		at := b.nest(unix.NFTA_LIST_ELEM)
		b.data(unix.NFTA_SET_ELEM_KEY, key)
		if write != nil {
			write()
		}
		b.done(at)
	}
	s := op.Set
	if s.Interval {
		for _, e := range slices.Sorted(maps.Keys(op.Elements)) {
			half := len(e) / 2
			if half != s.Key[0].Len() || len(e)%2 != 0 || e[:half] > e[half:] {
				return fmt.Errorf("element %x is not a range of %s", string(e), s.Key[0])
			}
			element([]byte(e[:half]), nil)
			if last := next([]byte(e[half:])); last != nil {
				element(last, func() { b.u32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END) })
			}
		}
		end()
		return nil
	}
	var padded []byte
	for e, v := range op.Elements {
		var err error
		if padded, err = pad(padded[:0], s.Key, e); err != nil {
			return err
		}
		if s.Map {
			element(padded, func() { b.verdict(unix.NFTA_SET_ELEM_DATA, kernelVerdict(v)) })
		} else {
			element(padded, nil)
		}
	}
	end()
	return nil
}

func (b *batch) rules(i int, op ruleset.Op, family byte) error {
	for n, r := range op.Chain.Rules {
		exprs, err := encodeRule(op.Table.Family, r)
		if err != nil {
			return fmt.Errorf("rule %q: %w", r, err)
		}
		b.message(part{i, n}, unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, family)
		b.text(unix.NFTA_RULE_TABLE, op.Table.Name)
		b.text(unix.NFTA_RULE_CHAIN, op.Chain.Name)
		list := b.nest(unix.NFTA_RULE_EXPRESSIONS)
		for _, e := range exprs {
			b.expression(family, e)
		}
		b.done(list)
		if r.Comment != "" {
			b.value(unix.NFTA_RULE_USERDATA, commentData(r.Comment))
		}
		b.close()
	}
	return nil
}

// next returns the number behind a big endian number, or nil if it is the highest.
func next(v []byte) []byte {
	for i := len(v) - 1; i >= 0; i-- {
		v[i]++
		if v[i] != 0 {
			return v
		}
	}
	return nil
}

// pad appends an element's key, and gives every part of a concatenated one a multiple of 32 bits, as registers have.
func pad(out []byte, key []ruleset.KeyType, e ruleset.Elem) ([]byte, error) {
	rest := e
	for _, k := range key {
		if len(rest) < k.Len() {
			return nil, fmt.Errorf("element %x is too short for %s", string(e), key)
		}
		out = append(out, rest[:k.Len()]...)
		rest = rest[k.Len():]
		if len(key) > 1 {
			out = append(out, "\x00\x00\x00"[:-len(out)&3]...)
		}
	}
	if rest != "" {
		return nil, fmt.Errorf("element %x is too long for %s", string(e), key)
	}
	return out, nil
}

func kernelVerdict(v ruleset.Verdict) *expr.Verdict {
	return &expr.Verdict{Kind: verdicts[v.Kind], Chain: v.Chain}
}

func commentData(comment string) []byte {
	if comment == "" {
		return nil
	}
	return userdata.AppendString(nil, userdata.TypeComment, comment)
}

// encoder translates one rule. Like nft it puts the matches that a field depends on in front of the rule's own: ip saddr
// is bytes 12 to 15 of the network header only if the packet is IPv4. Unlike nft it puts that one first of all (version).
type encoder struct {
	family ruleset.Family
	// What is known from a match before.
	ip     ipVersion
	icmpv6 bool
	out    []expr.Any
}

func encodeRule(family ruleset.Family, r ruleset.Rule) ([]expr.Any, error) {
	enc := &encoder{family: family}
	if enc.ip = version(r); enc.ip != 0 {
		if err := enc.matchIP(); err != nil {
			return nil, err
		}
	}
	for _, e := range r.Exprs {
		if err := enc.encode(e); err != nil {
			return nil, fmt.Errorf("%s: %w", e, err)
		}
	}
	return enc.out, nil
}

// version returns the IP version that a rule's first match of an address or the like asks for, 0 if there is none.
// It is matched before anything else: nearly every rule has a twin for the other version, and a packet of the other leaves it there.
func version(r ruleset.Rule) ipVersion {
	for _, e := range r.Exprs {
		for _, f := range fieldsOf(e) {
			if v := fields[f].ip; v != 0 {
				return v
			}
		}
	}
	return 0
}

func fieldsOf(e ruleset.Expr) []ruleset.Field {
	switch e := e.(type) {
	case ruleset.Cmp:
		return []ruleset.Field{e.Field}
	case ruleset.Prefix:
		return []ruleset.Field{e.Field}
	case ruleset.Range:
		return []ruleset.Field{e.Field}
	case ruleset.In:
		return e.Fields
	case ruleset.Dispatch:
		return e.Fields
	case ruleset.LimitEach:
		return []ruleset.Field{e.Field}
	}
	return nil
}

func (enc *encoder) add(e ...expr.Any) { enc.out = append(enc.out, e...) }

func (enc *encoder) encode(e ruleset.Expr) error {
	switch e := e.(type) {
	case ruleset.Cmp:
		return enc.cmp(e)
	case ruleset.Prefix:
		return enc.prefix(e)
	case ruleset.Range:
		if err := enc.loadOne(e.Field, len(e.From), len(e.To)); err != nil {
			return err
		}
		enc.add(
			&expr.Cmp{Op: expr.CmpOpGte, Register: register(0), Data: []byte(e.From)},
			&expr.Cmp{Op: expr.CmpOpLte, Register: register(0), Data: []byte(e.To)},
		)
	case ruleset.In:
		if err := enc.load(e.Fields); err != nil {
			return err
		}
		enc.add(&expr.Lookup{SourceRegister: register(0), SetName: e.Set, Invert: e.Not})
	case ruleset.Dispatch:
		if err := enc.load(e.Fields); err != nil {
			return err
		}
		enc.add(&expr.Lookup{SourceRegister: register(0), SetName: e.Map, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true})
	case ruleset.Flags:
		if err := enc.loadOne(ruleset.TCPFlags); err != nil {
			return err
		}
		enc.masked([]byte{e.Mask}, []byte{e.Value}, e.Not)
	case ruleset.CTState:
		enc.ctState(e)
	case ruleset.Counter:
		enc.add(&expr.Counter{})
	case ruleset.Limit:
		enc.add(limit(e))
	case ruleset.LimitEach:
		if err := enc.loadOne(e.Field); err != nil {
			return err
		}
		each := []expr.Any{&expr.Counter{}, limit(ruleset.Limit{PerSecond: e.PerSecond, Burst: e.Burst})}
		enc.add(&expr.Dynset{SrcRegKey: register(0), SetName: e.Set, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: each})
	case ruleset.Log:
		enc.log(e)
	case ruleset.Reject:
		if e.TCPReset {
			enc.add(&expr.Reject{Type: rejectTCPReset})
		} else {
			enc.add(&expr.Reject{Type: rejectICMPX, Code: icmpxAdminProhibitedCode})
		}
	case ruleset.Verdict:
		enc.add(kernelVerdict(e))
	default:
		return fmt.Errorf("expression %T is unknown", e)
	}
	return nil
}

func limit(l ruleset.Limit) *expr.Limit {
	return &expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(l.PerSecond), Unit: expr.LimitTimeSecond, Burst: l.Burst}
}

func (enc *encoder) cmp(e ruleset.Cmp) error {
	value := []byte(e.Value)
	if e.Field == ruleset.IIFName {
		if len(value) == 0 || len(value) >= unix.IFNAMSIZ {
			return errors.New("an interface name has 1 to 15 bytes")
		}
		value = append(value, make([]byte, unix.IFNAMSIZ-len(value))...)
	}
	if err := enc.loadOne(e.Field, len(value)); err != nil {
		return err
	}
	op := expr.CmpOpEq
	if e.Not {
		op = expr.CmpOpNeq
	}
	enc.add(&expr.Cmp{Op: op, Register: register(0), Data: value})
	return nil
}

// prefix always masks, also where the mask is whole bytes or everything, so that a rule that is read back is the same.
func (enc *encoder) prefix(e ruleset.Prefix) error {
	value := e.Prefix.Masked().Addr().AsSlice()
	if err := enc.loadOne(e.Field, len(value)); err != nil {
		return err
	}
	mask := make([]byte, len(value))
	for i := range e.Prefix.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	enc.masked(mask, value, e.Not)
	return nil
}

// masked compares what is loaded, as far as mask looks at it.
func (enc *encoder) masked(mask, value []byte, negated bool) {
	op := expr.CmpOpEq
	if negated {
		op = expr.CmpOpNeq
	}
	enc.add(
		&expr.Bitwise{SourceRegister: register(0), DestRegister: register(0), Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))},
		&expr.Cmp{Op: op, Register: register(0), Data: value},
	)
}

func (enc *encoder) ctState(s ruleset.CTState) {
	if state, not, ok := s.Single(); ok {
		op := expr.CmpOpEq
		if not {
			op = expr.CmpOpNeq
		}
		enc.add(&expr.Ct{Key: expr.CtKeySTATE, Register: register(0)}, &expr.Cmp{Op: op, Register: register(0), Data: ctBits(state)})
		return
	}
	enc.add(
		&expr.Ct{Key: expr.CtKeySTATE, Register: register(0)},
		&expr.Bitwise{
			SourceRegister: register(0), DestRegister: register(0), Len: 4,
			Mask: ctBits(s), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register(0), Data: make([]byte, 4)},
	)
}

func ctBits(s ruleset.CTState) []byte {
	bits := uint32(s &^ ruleset.Untracked)
	if s&ruleset.Untracked != 0 {
		bits |= ctStateUntracked
	}
	return binaryutil.NativeEndian.PutUint32(bits)
}

func (enc *encoder) log(l ruleset.Log) {
	e := &expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN, Group: l.Group, Snaplen: l.Snaplen}
	if l.Prefix != "" {
		e.Key |= 1 << unix.NFTA_LOG_PREFIX
		e.Data = []byte(l.Prefix)
	}
	enc.add(e)
}

// loadOne loads one field, with which values of these lengths are going to be compared.
func (enc *encoder) loadOne(f ruleset.Field, lens ...int) error {
	for _, n := range lens {
		if n != int(fields[f].len) {
			return fmt.Errorf("%s has %d bytes, its value %d", f, fields[f].len, n)
		}
	}
	return enc.load([]ruleset.Field{f})
}

// load loads fields into consecutive registers.
func (enc *encoder) load(list []ruleset.Field) error {
	if len(list) == 0 {
		return errors.New("no field")
	}
	for _, f := range list {
		if err := enc.depend(f); err != nil {
			return err
		}
	}
	reg := 0
	for _, f := range list {
		loc := fields[f]
		if reg+loc.words() > registers {
			return fmt.Errorf("the fields do not fit into %d registers", registers)
		}
		if loc.payload {
			enc.add(&expr.Payload{DestRegister: register(reg), Base: loc.base, Offset: loc.offset, Len: loc.len})
		} else {
			enc.add(&expr.Meta{Key: loc.meta, Register: register(reg)})
		}
		reg += loc.words()
	}
	return nil
}

func (loc location) words() int { return int(loc.len+3) / 4 }

// register returns the number of the i-th 32-bit register as the kernel dumps it (nft_dump_register): those that begin
// one of the four 128-bit registers have the number of that one.
func register(i int) uint32 {
	if i%4 == 0 {
		return uint32(unix.NFT_REG_1 + i/4)
	}
	return uint32(unix.NFT_REG32_00 + i)
}

// depend adds the matches without which a field is something else.
func (enc *encoder) depend(f ruleset.Field) error {
	loc, ok := fields[f]
	if !ok {
		return fmt.Errorf("field %d is unknown", f)
	}
	if f == ruleset.EtherType && enc.family != ruleset.Netdev {
		return errors.New("an EtherType needs a netdev table")
	}
	if loc.ip != 0 && loc.ip != enc.ip {
		if enc.ip != 0 {
			return errors.New("the rule can never match: its fields are of different IP versions")
		}
		enc.ip = loc.ip
		if err := enc.matchIP(); err != nil {
			return err
		}
	}
	if f == ruleset.NDTarget && !enc.icmpv6 {
		return errors.New("an ND target needs a match of the ICMPv6 type before it")
	}
	if f == ruleset.ICMPv6Type && !enc.icmpv6 {
		// Also behind a match of the same protocol by the rule itself: the decoder takes this one for the dependency.
		enc.icmpv6 = true
		enc.match(expr.MetaKeyL4PROTO, []byte{ruleset.ProtoICMPv6})
	}
	return nil
}

// matchIP matches the IP version: by nfproto in inet, by the ether type in netdev, where every packet has nfproto netdev.
func (enc *encoder) matchIP() error {
	switch {
	case enc.ip == arp && enc.family != ruleset.Netdev:
		return errors.New("ARP needs a netdev table")
	case enc.ip == arp:
		enc.match(expr.MetaKeyPROTOCOL, binaryutil.BigEndian.PutUint16(ruleset.EtherARP))
	case enc.family == ruleset.Netdev && enc.ip == ipv4:
		enc.match(expr.MetaKeyPROTOCOL, binaryutil.BigEndian.PutUint16(ruleset.EtherIPv4))
	case enc.family == ruleset.Netdev:
		enc.match(expr.MetaKeyPROTOCOL, binaryutil.BigEndian.PutUint16(ruleset.EtherIPv6))
	case enc.ip == ipv4:
		enc.match(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV4})
	default:
		enc.match(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV6})
	}
	return nil
}

func (enc *encoder) match(key expr.MetaKey, value []byte) {
	enc.add(
		&expr.Meta{Key: key, Register: register(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register(0), Data: value},
	)
}
