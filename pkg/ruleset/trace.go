package ruleset

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Packet is what rules can see of a packet at one hook. Fields that do not apply stay zero.
type Packet struct {
	IIFName string // the input device; at an ingress hook also the device whose chains are run
	OIFName string // the output device; at an egress hook also the device whose chains are run

	EtherType uint16 // zero: that of the addresses
	PktType   uint8

	Src, Dst     netip.Addr
	Proto        uint8 // behind IPv6 extension headers
	Sport, Dport uint16
	ICMPv6Type   uint8
	HopLimit     uint8
	TCPFlags     uint8
	ARPSaddr     netip.Addr
	NDTarget     netip.Addr

	CT CTState // one bit; zero matches no state
}

// Result is the fate of a packet at one hook.
type Result struct {
	Verdict VerdictKind // Accept or Drop
	Steps   []Step      // the rules that matched to their end, in the order of evaluation
}

// Step is one rule that a packet matched.
type Step struct {
	Table TableID
	Chain string
	Rule  Rule
	// Verdict is what the rule decided, for a Dispatch what it found in its map. It is zero for a rule that only counts or logs.
	Verdict Verdict
}

// String returns the chain and the rule in nft's syntax.
func (s Step) String() string {
	text := s.Chain + ": " + s.Rule.String()
	if n := len(s.Rule.Exprs); n > 0 {
		if _, ok := s.Rule.Exprs[n-1].(Dispatch); ok {
			text += " -> " + s.Verdict.String()
		}
	}
	return text
}

// maxDepth is the kernel's NFT_JUMP_STACK_SIZE: nft_chain_validate refuses a ruleset whose jumps and gotos nest deeper
// (EMLINK), a loop included.
const maxDepth = 16

// Trace runs a packet through the base chains of a hook as the kernel does: by priority, until one drops it. An accept ends
// only its own base chain. Limits always match. An error means that the kernel would not have loaded this ruleset.
func (r Ruleset) Trace(hook string, p Packet) (Result, error) {
	type base struct {
		table *Table
		chain *Chain
	}
	device := p.IIFName
	if hook == "egress" {
		device, p.IIFName = p.OIFName, "" // the hook has no input device
	}
	var bases []base
	for _, t := range r {
		if et := p.etherType(); t.ID.Family == Inet && et != EtherIPv4 && et != EtherIPv6 {
			continue // inet hooks see nothing but IP, at ingress neither
		}
		for _, c := range t.Chains {
			if c.Hook != nil && c.Hook.Name == hook && (c.Hook.Device == "" || c.Hook.Device == device) {
				bases = append(bases, base{t, c})
			}
		}
	}
	slices.SortFunc(bases, func(a, b base) int {
		return cmp.Or(cmp.Compare(a.chain.Hook.Priority, b.chain.Hook.Priority), strings.Compare(string(a.table.ID.Family), string(b.table.ID.Family)), strings.Compare(a.chain.Name, b.chain.Name))
	})

	tr := tracer{packet: p}
	for _, b := range bases {
		tr.table = b.table
		verdict, err := tr.run(b.chain.Name, 0)
		if err != nil {
			return Result{}, fmt.Errorf("trace table %s %s: %w", b.table.ID.Family, b.table.ID.Name, err)
		}
		if verdict == Drop {
			return Result{Drop, tr.steps}, nil
		}
	}
	return Result{Accept, tr.steps}, nil
}

type tracer struct {
	packet Packet
	table  *Table
	steps  []Step
}

// run evaluates a chain and those it calls. It returns Accept, Drop or, at the end of the chain, Return.
func (t *tracer) run(name string, depth int) (VerdictKind, error) {
	chain := t.table.Chains[name]
	switch {
	case chain == nil:
		return 0, fmt.Errorf("no chain %s", name)
	case chain.Unknown:
		return 0, fmt.Errorf("the rules of chain %s could not be read", name)
	case depth == maxDepth:
		return 0, fmt.Errorf("chain %s is called more than %d levels deep", name, maxDepth-1)
	}
	for _, rule := range chain.Rules {
		verdict, matched, err := t.rule(rule)
		if err != nil {
			return 0, fmt.Errorf("chain %s: rule %q: %w", name, rule, err)
		}
		if !matched {
			continue
		}
		t.steps = append(t.steps, Step{t.table.ID, name, rule, verdict})
		switch verdict.Kind {
		case Accept, Drop, Return:
			return verdict.Kind, nil
		case Goto:
			return t.run(verdict.Chain, depth+1)
		case Jump:
			if v, err := t.run(verdict.Chain, depth+1); err != nil || v != Return {
				return v, err
			}
		}
	}
	return Return, nil
}

// rule returns the verdict of a rule, if it has one, and whether the packet matched all of it.
func (t *tracer) rule(rule Rule) (Verdict, bool, error) {
	for _, e := range rule.Exprs {
		matched := true
		switch e := e.(type) {
		case Cmp:
			v, ok := t.packet.field(e.Field)
			matched = ok && (v == e.Value) != e.Not
		case Prefix:
			v, ok := t.packet.field(e.Field)
			ip, _ := netip.AddrFromSlice([]byte(v))
			matched = ok && e.Prefix.Contains(ip) != e.Not
		case Range:
			v, ok := t.packet.field(e.Field)
			matched = ok && e.From <= v && v <= e.To
		case In:
			key, ok := t.packet.key(e.Fields)
			_, found, err := t.find(e.Set, key)
			if err != nil {
				return Verdict{}, false, err
			}
			matched = ok && found != e.Not
		case Dispatch:
			key, ok := t.packet.key(e.Fields)
			verdict, found, err := t.find(e.Map, key)
			return verdict, ok && found, err
		case Flags:
			matched = t.packet.Proto == ProtoTCP && (t.packet.TCPFlags&e.Mask == e.Value) != e.Not
		case CTState:
			matched = e&t.packet.CT != 0
		case Reject:
			return Verdict{Kind: Drop}, true, nil
		case Verdict:
			return e, true, nil
		case Counter, Limit, LimitEach, Log: // neither filters nor decides
		}
		if !matched {
			return Verdict{}, false, nil
		}
	}
	return Verdict{}, true, nil
}

// find looks a key up in a set or map.
func (t *tracer) find(name string, key Elem) (Verdict, bool, error) {
	set := t.table.Sets[name]
	if set == nil {
		return Verdict{}, false, fmt.Errorf("no set %s", name)
	}
	if !set.Interval {
		v, ok := set.Elements[key]
		return v, ok, nil
	}
	for e, v := range set.Elements {
		if half := len(e) / 2; e[:half] <= key && key <= e[half:] {
			return v, true, nil
		}
	}
	return Verdict{}, false, nil
}

func (p Packet) etherType() uint16 {
	switch {
	case p.EtherType != 0:
		return p.EtherType
	case p.Src.Is4():
		return EtherIPv4
	case p.Src.Is6():
		return EtherIPv6
	}
	return 0
}

// key concatenates fields; it returns false when the packet lacks one of them.
func (p Packet) key(fields []Field) (Elem, bool) {
	var key Elem
	for _, f := range fields {
		v, ok := p.field(f)
		if !ok {
			return "", false
		}
		key += Elem(v)
	}
	return key, true
}

// field returns the value of a field in network byte order, and whether the packet has it. Where a protocol has no ports the
// kernel reads whatever is in their place, so that a negated port match holds there: rules match the protocol before it.
func (p Packet) field(f Field) (string, bool) {
	et := p.etherType()
	v4 := et == EtherIPv4 && p.Src.Is4() && p.Dst.Is4()
	v6 := et == EtherIPv6 && p.Src.Is6() && p.Dst.Is6()
	ports := (v4 || v6) && (p.Proto == ProtoTCP || p.Proto == ProtoUDP || p.Proto == ProtoSCTP)
	switch f {
	case IIFName:
		return p.IIFName, true
	case OIFName:
		return ifName(p.OIFName), true
	case PktType:
		return string([]byte{p.PktType}), true
	case EtherType:
		return be16(et), et != 0
	case L4Proto:
		return string([]byte{p.Proto}), v4 || v6
	case IPSaddr:
		return string(p.Src.AsSlice()), v4
	case IPDaddr:
		return string(p.Dst.AsSlice()), v4
	case IP6Saddr:
		return string(p.Src.AsSlice()), v6
	case IP6Daddr:
		return string(p.Dst.AsSlice()), v6
	case IP6HopLimit:
		return string([]byte{p.HopLimit}), v6
	case ICMPv6Type:
		return string([]byte{p.ICMPv6Type}), v6 && p.Proto == ProtoICMPv6
	case ARPSaddr:
		return string(p.ARPSaddr.AsSlice()), et == EtherARP
	case NDTarget:
		return string(p.NDTarget.AsSlice()), v6 && (p.ICMPv6Type == 135 || p.ICMPv6Type == 136)
	case Sport:
		return be16(p.Sport), ports
	case Dport:
		return be16(p.Dport), ports
	}
	return "", false
}
