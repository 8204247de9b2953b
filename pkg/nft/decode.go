package nft

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"reflect"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/podwall/podwall/pkg/ruleset"
)

// decodeExprs decodes the expressions of a rule, with what encodeRule would not know alike, or returns false when one of them is none that
// podwall writes. The library's own decoder leaves such expressions out silently.
func decodeExprs(family byte, list []byte) ([]expr.Any, bool) {
	elems, err := netlink.NewAttributeDecoder(list)
	if err != nil {
		return nil, false
	}
	var out []expr.Any
	for elems.Next() {
		ad, err := netlink.NewAttributeDecoder(elems.Bytes())
		if err != nil {
			return nil, false
		}
		var name string
		var data []byte
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_EXPR_NAME:
				name = ad.String()
			case unix.NFTA_EXPR_DATA:
				data = ad.Bytes()
			}
		}
		e := newExpr(name)
		if ad.Err() != nil || e == nil || expr.Unmarshal(family, data, e) != nil {
			return nil, false
		}
		if counter, ok := e.(*expr.Counter); ok {
			*counter = expr.Counter{}
		}
		out = append(out, e)
	}
	return out, elems.Err() == nil
}

func newExpr(name string) expr.Any {
	switch name {
	case "meta":
		return &expr.Meta{}
	case "payload":
		return &expr.Payload{}
	case "cmp":
		return &expr.Cmp{}
	case "bitwise":
		return &expr.Bitwise{}
	case "lookup":
		return &expr.Lookup{}
	case "ct":
		return &expr.Ct{}
	case "counter":
		return &expr.Counter{}
	case "limit":
		return &expr.Limit{}
	case "dynset":
		return &expr.Dynset{}
	case "log":
		return &expr.Log{}
	case "reject":
		return &expr.Reject{}
	case "immediate":
		return &expr.Verdict{}
	}
	return nil
}

// decodeRule returns the rule that encodeRule translates to exactly these expressions, if there is one. That the
// translation is repeated and compared means that the decoder need not be strict.
func decodeRule(family ruleset.Family, exprs []expr.Any, userData []byte) (ruleset.Rule, bool) {
	dec := &decoder{}
	for _, e := range exprs {
		if !dec.decode(e) {
			return ruleset.Rule{}, false
		}
	}
	rule := ruleset.NewRule(dec.out...)
	if comment := comment(userData); comment != "" {
		rule = rule.WithComment(comment)
	}
	again, err := encodeRule(family, rule)
	if err != nil || !reflect.DeepEqual(exprs, again) || !bytes.Equal(userData, commentData(rule.Comment)) {
		return ruleset.Rule{}, false
	}
	return rule, true
}

// decoder collects what has been loaded into registers until an expression consumes it.
type decoder struct {
	out    []ruleset.Expr
	held   []ruleset.Field
	depend bool // what a field depends on is loaded
	ct     bool // the conntrack state is loaded
	mask   []byte
	from   string // the lower end of a range
}

func (dec *decoder) decode(e expr.Any) bool {
	switch e := e.(type) {
	case *expr.Meta:
		switch e.Key {
		case expr.MetaKeyNFPROTO, expr.MetaKeyPROTOCOL:
			dec.depend = true
			return true
		}
		return dec.hold(func(loc location) bool { return !loc.payload && loc.meta == e.Key })
	case *expr.Payload:
		return dec.hold(func(loc location) bool {
			return loc.payload && loc.base == e.Base && loc.offset == e.Offset && loc.len == e.Len
		})
	case *expr.Ct:
		dec.ct = true
	case *expr.Bitwise:
		dec.mask = e.Mask
	case *expr.Cmp:
		return dec.cmp(e)
	case *expr.Lookup:
		if e.IsDestRegSet {
			dec.put(ruleset.Dispatch{Fields: dec.held, Map: e.SetName})
		} else {
			dec.put(ruleset.In{Fields: dec.held, Not: e.Invert, Set: e.SetName})
		}
	case *expr.Counter:
		dec.put(ruleset.Counter{})
	case *expr.Limit:
		dec.put(ruleset.Limit{PerSecond: uint32(e.Rate), Burst: e.Burst})
	case *expr.Dynset:
		if len(dec.held) != 1 || len(e.Exprs) == 0 {
			return false
		}
		l, ok := e.Exprs[len(e.Exprs)-1].(*expr.Limit)
		if !ok {
			return false
		}
		dec.put(ruleset.LimitEach{Field: dec.held[0], Set: e.SetName, PerSecond: uint32(l.Rate), Burst: l.Burst})
	case *expr.Log:
		dec.put(ruleset.Log{Prefix: string(e.Data), Group: e.Group, Snaplen: e.Snaplen})
	case *expr.Reject:
		dec.put(ruleset.Reject{TCPReset: e.Type == rejectTCPReset})
	case *expr.Verdict:
		dec.put(ruleset.Verdict{Kind: verdictKind(e.Kind), Chain: e.Chain})
	default:
		return false
	}
	return true
}

// put appends an expression, which has consumed everything that was loaded.
func (dec *decoder) put(e ruleset.Expr) {
	*dec = decoder{out: append(dec.out, e)}
}

// hold notes that a field has been loaded.
func (dec *decoder) hold(match func(location) bool) bool {
	for f, loc := range fields {
		if !match(loc) {
			continue
		}
		if f == ruleset.ICMPv6Type && len(dec.out) > 0 && dec.out[len(dec.out)-1] == ruleset.Expr(icmpv6) {
			dec.out = dec.out[:len(dec.out)-1] // the dependency, not a match of the rule's own
		}
		dec.held = append(dec.held, f)
		return true
	}
	return false
}

var icmpv6 = ruleset.Equal(ruleset.L4Proto, ruleset.ProtoICMPv6)

func (dec *decoder) cmp(e *expr.Cmp) bool {
	switch {
	case dec.depend:
		dec.depend = false
		return true
	case dec.ct:
		return dec.ctState(e)
	case len(dec.held) != 1 || len(e.Data) != int(fields[dec.held[0]].len):
		return false
	}
	f, value, negated := dec.held[0], string(e.Data), e.Op == expr.CmpOpNeq
	switch {
	case dec.mask != nil && f == ruleset.TCPFlags:
		if len(dec.mask) != 1 {
			return false
		}
		dec.put(ruleset.Flags{Mask: dec.mask[0], Value: e.Data[0], Not: negated})
	case dec.mask != nil:
		ip, ok := netip.AddrFromSlice(e.Data)
		if !ok {
			return false
		}
		ones := 0
		for _, b := range dec.mask {
			ones += bits.OnesCount8(b)
		}
		dec.put(ruleset.Prefix{Field: f, Not: negated, Prefix: netip.PrefixFrom(ip, ones)})
	case e.Op == expr.CmpOpGte:
		dec.from = value
	case e.Op == expr.CmpOpLte && len(dec.from) == len(value):
		dec.put(ruleset.Range{Field: f, From: dec.from, To: value})
	case e.Op == expr.CmpOpEq, negated:
		if f == ruleset.IIFName {
			value = string(bytes.TrimRight(e.Data, "\x00"))
		}
		dec.put(ruleset.Cmp{Field: f, Not: negated, Value: value})
	default:
		return false
	}
	return true
}

func (dec *decoder) ctState(e *expr.Cmp) bool {
	bits := dec.mask
	if bits == nil {
		bits = e.Data
	}
	if len(bits) != 4 {
		return false
	}
	state := binaryutil.NativeEndian.Uint32(bits)
	s := ruleset.CTState(state & 0xf)
	if state&ctStateUntracked != 0 {
		s |= ruleset.Untracked
	}
	if dec.mask == nil && e.Op == expr.CmpOpNeq {
		s = ruleset.AnyState &^ s
	}
	dec.put(s)
	return true
}

// comment returns the comment in the user data of a rule or set, where records are type, length, value.
func comment(data []byte) string { return udata(data, userdata.TypeComment) }

func udata(data []byte, typ userdata.Type) string {
	for len(data) >= 2 && len(data) >= 2+int(data[1]) {
		if userdata.Type(data[0]) == typ {
			return string(bytes.TrimRight(data[2:2+int(data[1])], "\x00"))
		}
		data = data[2+int(data[1]):]
	}
	return ""
}

// decodeVerdict decodes the data of a verdict map's element. A verdict that podwall does not know is the zero value.
func decodeVerdict(data []byte) ruleset.Verdict {
	var v ruleset.Verdict
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return v
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		if ad.Type() != unix.NFTA_DATA_VERDICT {
			continue
		}
		ad.Nested(func(nad *netlink.AttributeDecoder) error {
			for nad.Next() {
				switch nad.Type() {
				case unix.NFTA_VERDICT_CODE:
					v.Kind = verdictKind(expr.VerdictKind(int32(nad.Uint32())))
				case unix.NFTA_VERDICT_CHAIN:
					v.Chain = nad.String()
				}
			}
			return nil
		})
	}
	return v
}

func verdictKind(k expr.VerdictKind) ruleset.VerdictKind {
	for kind, known := range verdicts {
		if known == k {
			return kind
		}
	}
	return 0
}
