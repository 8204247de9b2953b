// Package ruleset describes nftables tables in podwall's own words: chains, rules and sets as plain values that can be
// compared, printed in nft's syntax and traced. It is a leaf: pkg/policy writes rulesets, pkg/nft loads them.
package ruleset

import (
	"maps"
	"net/netip"
	"time"
)

// TableID names a table: nftables knows the same name once per family.
type TableID struct {
	Family Family
	Name   string
}

// Family is an nftables address family.
type Family string

// The families that podwall uses.
const (
	Inet   Family = "inet"
	Netdev Family = "netdev"
)

// Ruleset is a list of tables, one per TableID.
type Ruleset []*Table

// Table returns the table with that id, or nil.
func (r Ruleset) Table(id TableID) *Table {
	for _, t := range r {
		if t.ID == id {
			return t
		}
	}
	return nil
}

// Clone returns a copy for a reader beside whoever changes elements in place. Chains are never changed.
func (r Ruleset) Clone() Ruleset {
	var out Ruleset
	for _, t := range r {
		c := &Table{ID: t.ID, Sets: make(map[string]*Set, len(t.Sets)), Chains: maps.Clone(t.Chains)}
		for name, s := range t.Sets {
			set := *s
			set.Elements = maps.Clone(s.Elements)
			c.Sets[name] = &set
		}
		out = append(out, c)
	}
	return out
}

// Table is one nftables table. Sets (with verdict maps) and chains are separate name spaces in the kernel.
type Table struct {
	ID     TableID
	Sets   map[string]*Set
	Chains map[string]*Chain
}

// NewTable returns an empty table.
func NewTable(id TableID) *Table {
	return &Table{ID: id, Sets: map[string]*Set{}, Chains: map[string]*Chain{}}
}

// KeyType is the type of one part of a set's key.
type KeyType string

// The key types that podwall uses, by nft's name.
const (
	IPv4Addr    KeyType = "ipv4_addr"
	IPv6Addr    KeyType = "ipv6_addr"
	InetProto   KeyType = "inet_proto"
	InetService KeyType = "inet_service"
	ICMPv6      KeyType = "icmpv6_type"
	IfName      KeyType = "ifname"
)

// Len is the length of a value of this type in bytes, without the padding to 32 bits that concatenations have in the kernel.
func (t KeyType) Len() int {
	switch t {
	case IPv4Addr:
		return 4
	case IPv6Addr, IfName:
		return 16
	case InetService:
		return 2
	}
	return 1
}

// Elem is a set element's key: its parts in network byte order, one after the other, unpadded. In an interval set it is
// the first address followed by the last one (inclusive).
type Elem string

// AddrElem returns the key for one address.
func AddrElem(ip netip.Addr) Elem {
	if ip.Is4() {
		b := ip.As4()
		return Elem(b[:])
	}
	b := ip.As16()
	return Elem(b[:])
}

// LinkElem returns the key for the name of a link, which has at most 15 bytes.
func LinkElem(name string) Elem { return Elem(ifName(name)) }

// ifName pads a name as the kernel does (IFNAMSIZ).
func ifName(name string) string {
	var b [16]byte
	copy(b[:15], name)
	return string(b[:])
}

// RangeElem returns the element of an interval set that covers from to to, both included.
func RangeElem(from, to netip.Addr) Elem { return Elem(from.AsSlice()) + Elem(to.AsSlice()) }

// PortRangeElem is RangeElem for ports.
func PortRangeElem(from, to uint16) Elem { return Elem(be16(from) + be16(to)) }

// PortElem returns the inet_proto . inet_service key.
func PortElem(proto uint8, port uint16) Elem {
	return Elem([]byte{proto, byte(port >> 8), byte(port)})
}

// AddrPortElem returns the address . inet_proto . inet_service key.
func AddrPortElem(ip netip.Addr, proto uint8, port uint16) Elem {
	return AddrElem(ip) + PortElem(proto, port)
}

// Set is a named set, or a verdict map when Map is true.
//
// Hash sets and maps change atomically with the rules of their transaction. Interval sets do not (measured on 6.18: a new
// one denies wrongly for a moment after the commit), so a Set with Interval is immutable: its name must be a function of
// its elements, and Diff loads it in a transaction of its own before the rules that use it.
type Set struct {
	Name     string
	Key      []KeyType
	Map      bool
	Interval bool
	Comment  string // at most 127 bytes reach the kernel
	// Timeout makes the elements end by themselves. Those of such a set are not the ruleset's: they come and go beside it,
	// so Diff and read-back leave them alone. Size is how many it can hold; the kernel answers ENFILE to one more.
	Timeout time.Duration
	Size    uint32
	// Dynamic says that rules put elements into the set. It has a Timeout.
	Dynamic  bool
	Elements map[Elem]Verdict // the verdict is the zero value in plain sets
}

// Chain is a base chain when Hook is set and a regular chain otherwise.
type Chain struct {
	Name  string
	Hook  *Hook
	Rules []Rule
	// Unknown says that Rules could not be read (read-back): Diff rewrites such a chain.
	Unknown bool
}

// Equal reports whether two chains have one hook and the same rules.
func (c *Chain) Equal(o *Chain) bool { return sameHook(c, o) && sameRules(c, o) }

// Hook attaches a base chain. The policy of every base chain is accept: what podwall does not know is not its business.
type Hook struct {
	Name     string // prerouting, forward, input, output, ingress, egress
	Priority int
	Device   string // ingress and egress hooks: the one device of the chain
}

// Rule is a list of expressions that are evaluated in order until one does not match.
type Rule struct {
	Exprs   []Expr
	Comment string
	text    string
}

// NewRule returns the rule with these expressions.
func NewRule(exprs ...Expr) Rule { return Rule{Exprs: exprs, text: ruleText(exprs, "")} }

// WithComment returns the rule with a comment, cut to the 127 bytes that the kernel keeps.
func (r Rule) WithComment(comment string) Rule {
	r.Comment = Comment(comment)
	r.text = ruleText(r.Exprs, r.Comment)
	return r
}

// String returns the rule in nft's syntax. Two rules are equal when their strings are.
func (r Rule) String() string { return r.text }

// maxComment is the longest comment that nft can list (NFTNL_UDATA_COMMENT_MAXLEN is 128 with the final NUL).
const maxComment = 127

// Comment cuts a comment to what the kernel and nft can hold, without splitting a rune, and replaces what nft's syntax
// cannot quote.
func Comment(s string) string {
	b := make([]byte, 0, min(len(s), maxComment))
	for _, r := range s {
		if r == '"' || r == '\\' || r < ' ' || r == 0x7f {
			r = '_'
		}
		enc := string(r)
		if len(b)+len(enc) > maxComment {
			break
		}
		b = append(b, enc...)
	}
	return string(b)
}
