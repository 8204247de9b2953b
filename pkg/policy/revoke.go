package policy

import (
	"net/netip"
	"slices"
	"time"

	"github.com/podwall/podwall/pkg/ruleset"
)

// Established connections are accepted before any policy is looked at, so one that a change no longer allows has to be ended:
// its conntrack entry is deleted. That alone opens a way around policies. The next packet is a new connection to the kernel
// (nf_conntrack_tcp_loose), and if the server is the one to send it, a connection from the server to the client, which may well
// be allowed: then the client's packets are replies. So the tuple of a revoked connection is kept in a set for a while, which
// what the server sends meets before the policies, and what the client sends where they deny it. An open policy counts at
// once, whatever is in the set.
//
// When the set has forgotten it, a TCP packet that begins no connection (no bare SYN) does not become one if it may belong to
// a revoked one by its direction: to a pod whose egress is isolated, from a pod whose ingress is.

// CutTimeout is how long a revoked connection is kept: longer than UDP's conntrack timeouts (30 and 120 s), so that both ends have forgotten the connection too.
const CutTimeout = 5 * time.Minute

// The flags of a TCP packet that begins a connection, and those of any other.
var (
	onlySYN = ruleset.Flags{Mask: ruleset.FIN | ruleset.SYN | ruleset.RST | ruleset.ACK, Value: ruleset.SYN}
	noSYN   = ruleset.Flags{Mask: onlySYN.Mask, Value: onlySYN.Value, Not: true}
)

// cutSize bounds the connections of one family that are kept; at about 150 bytes each.
const cutSize = 1 << 17

// Connection is the first packet of a connection as the forward hook sees it: after DNAT, before SNAT.
type Connection struct {
	Proto    uint8
	Src, Dst netip.AddrPort
	ToNode   bool // the node itself is the receiver
	// BeforeNAT means that Dst is what the client asked for, before DNAT. Rules do not judge that: it is for Cut only, beside the
	// connection itself, when the client is behind a bridge and knows no reset but one from there.
	BeforeNAT bool
}

// Allows reports whether a ruleset accepts a new connection. A pod's connection to itself is always accepted.
func Allows(rs ruleset.Ruleset, c Connection) (bool, error) {
	if c.Src.Addr() == c.Dst.Addr() {
		return true, nil
	}
	hook := "forward"
	if c.ToNode {
		hook = "input"
	}
	result, err := rs.Trace(hook, ruleset.Packet{
		Src: c.Src.Addr(), Dst: c.Dst.Addr(), Proto: c.Proto, Sport: c.Src.Port(), Dport: c.Dst.Port(),
		ICMPv6Type: icmpv6Echo, HopLimit: 64, CT: ruleset.New, TCPFlags: ruleset.SYN,
	})
	return result.Verdict == ruleset.Accept, err
}

const icmpv6Echo = 128

// Cut returns the set that a revoked connection is kept in, and its element.
func Cut(c Connection) (*ruleset.Set, ruleset.Elem) {
	elem := func(a netip.AddrPort) ruleset.Elem {
		return ruleset.AddrElem(a.Addr()) + ruleset.Elem([]byte{byte(a.Port() >> 8), byte(a.Port())})
	}
	i := 1
	if c.Src.Addr().Is4() {
		i = 0
	}
	names := setCut
	if c.BeforeNAT {
		names = setCutBeforeNAT
	}
	return cutSet(names, i), elem(c.Src) + elem(c.Dst) + ruleset.Elem([]byte{c.Proto})
}

// CutSets are the sets that revoked connections are kept in.
func CutSets() []*ruleset.Set {
	return []*ruleset.Set{cutSet(setCut, 0), cutSet(setCut, 1), cutSet(setCutBeforeNAT, 0), cutSet(setCutBeforeNAT, 1)}
}

// Uncut is the inverse of Cut. ToNode is not kept.
func Uncut(set *ruleset.Set, e ruleset.Elem) (Connection, bool) {
	half := (len(e) - 1) / 2
	end := func(b []byte) (netip.AddrPort, bool) {
		n := len(b) - 2
		if n < 0 {
			return netip.AddrPort{}, false
		}
		ip, ok := netip.AddrFromSlice(b[:n])
		return netip.AddrPortFrom(ip, uint16(b[n])<<8|uint16(b[n+1])), ok
	}
	if len(e) != 2*half+1 {
		return Connection{}, false
	}
	src, ok1 := end([]byte(e[:half]))
	dst, ok2 := end([]byte(e[half : 2*half]))
	return Connection{Proto: e[2*half], Src: src, Dst: dst, BeforeNAT: slices.Contains(setCutBeforeNAT[:], set.Name)}, ok1 && ok2
}

func cutSet(names [2]string, family int) *ruleset.Set {
	address := []ruleset.KeyType{ruleset.IPv4Addr, ruleset.IPv6Addr}[family]
	return &ruleset.Set{
		Name: names[family], Key: []ruleset.KeyType{address, ruleset.InetService, address, ruleset.InetService, ruleset.InetProto},
		Timeout: CutTimeout, Size: cutSize, Elements: map[ruleset.Elem]ruleset.Verdict{},
	}
}

// revocation renders what keeps revoked connections dead.
func (r *renderer) revocation() {
	for _, set := range CutSets() {
		r.table.Sets[set.Name] = set
	}
	r.chain(chainRevoked, nil, []ruleset.Rule{
		ruleset.NewRule(ruleset.In{Fields: reply4, Set: setCut[0]}, ruleset.To(ruleset.Goto, chainCut)),
		ruleset.NewRule(ruleset.In{Fields: reply6, Set: setCut[1]}, ruleset.To(ruleset.Goto, chainCut)),
		ruleset.NewRule(tcp, noSYN, ruleset.To(ruleset.Jump, chainMidstream)),
	})
	r.chain(chainCut, nil, []ruleset.Rule{ruleset.NewRule(tcp, ruleset.Counter{}, ruleset.Reject{TCPReset: true}), ruleset.NewRule(counted...)})
	r.chain(chainMidstream, nil, []ruleset.Rule{
		dropRule(ruleset.In{Fields: []ruleset.Field{ruleset.IPDaddr}, Set: setEgressIsolated[0]}),
		dropRule(ruleset.In{Fields: []ruleset.Field{ruleset.IP6Daddr}, Set: setEgressIsolated[1]}),
		dropRule(ruleset.In{Fields: []ruleset.Field{ruleset.IPSaddr}, Set: setIngressIsolated[0]}),
		dropRule(ruleset.In{Fields: []ruleset.Field{ruleset.IP6Saddr}, Set: setIngressIsolated[1]}),
	})
	r.chain(chainDenied, nil, []ruleset.Rule{
		ruleset.NewRule(ruleset.In{Fields: origin4, Set: setCut[0]}, ruleset.To(ruleset.Goto, chainCut)),
		ruleset.NewRule(ruleset.In{Fields: origin6, Set: setCut[1]}, ruleset.To(ruleset.Goto, chainCut)),
	})
	// What the node sends to its pods is not judged, but a connection of a pod to the node that was revoked is not to come
	// back by the node's next packet. The resets that these rules make pass here, and are related to what they answer (nf_ct_attach).
	r.chain(chainOutput, &ruleset.Hook{Name: "output", Priority: priorityFilter}, []ruleset.Rule{
		ruleset.NewRule(ruleset.Established|ruleset.Related, accept),
		ruleset.NewRule(tcp, ruleset.Flags{Mask: ruleset.SYN | ruleset.RST, Value: ruleset.RST}, accept), // also what answers an invalid packet; it begins nothing
		ruleset.NewRule(ruleset.To(ruleset.Jump, chainRevoked)),
	})
	if r.in.CutBeforeNAT {
		r.beforeNAT()
	}
}

// beforeNAT renders what resets the clients of revoked connections to Services that are behind a bridge. The reset of a bridged packet
// goes out as it is, past NAT (nf_send_reset in net/ipv4/netfilter/nf_reject_ipv4.c: dev_queue_xmit), so one that is to come from a
// Service's address has to be made before DNAT. What begins a connection is the policies' business, and so is all of one that has
// begun: a client that is allowed again may use its port again at once.
func (r *renderer) beforeNAT() {
	r.chain(chainBeforeNAT, &ruleset.Hook{Name: "prerouting", Priority: priorityBeforeNAT}, []ruleset.Rule{
		ruleset.NewRule(ruleset.NotNew, accept),
		ruleset.NewRule(tcp, onlySYN, accept),
		ruleset.NewRule(ruleset.In{Fields: origin4, Set: setCutBeforeNAT[0]}, ruleset.To(ruleset.Goto, chainCut)),
		ruleset.NewRule(ruleset.In{Fields: origin6, Set: setCutBeforeNAT[1]}, ruleset.To(ruleset.Goto, chainCut)),
	})
}

// CutsBeforeNAT reports whether a ruleset was rendered with CutBeforeNAT.
func CutsBeforeNAT(rs ruleset.Ruleset) bool {
	t := inetTable(rs)
	return t != nil && t.Chains[chainBeforeNAT] != nil
}

// The tuple of a connection in the fields of its own packets, and of what comes back.
var (
	origin4 = []ruleset.Field{ruleset.IPSaddr, ruleset.Sport, ruleset.IPDaddr, ruleset.Dport, ruleset.L4Proto}
	origin6 = []ruleset.Field{ruleset.IP6Saddr, ruleset.Sport, ruleset.IP6Daddr, ruleset.Dport, ruleset.L4Proto}
	reply4  = []ruleset.Field{ruleset.IPDaddr, ruleset.Dport, ruleset.IPSaddr, ruleset.Sport, ruleset.L4Proto}
	reply6  = []ruleset.Field{ruleset.IP6Daddr, ruleset.Dport, ruleset.IP6Saddr, ruleset.Sport, ruleset.L4Proto}
)

func (r *renderer) isolatedSets(names [2]string) {
	for i, address := range []ruleset.KeyType{ruleset.IPv4Addr, ruleset.IPv6Addr} {
		r.table.Sets[names[i]] = &ruleset.Set{Name: names[i], Key: []ruleset.KeyType{address}, Elements: map[ruleset.Elem]ruleset.Verdict{}}
	}
}

// isolate notes an endpoint's addresses as isolated in a direction.
func (r *renderer) isolate(e *Endpoint, sets [2]string) {
	for _, ip := range e.IPs {
		i := 1
		if ip.Is4() {
			i = 0
		}
		r.table.Sets[sets[i]].Elements[ruleset.AddrElem(ip)] = ruleset.Verdict{}
	}
}

// Tightened are the addresses of endpoints whose policies may allow less after a change than before.
type Tightened struct{ Egress, Ingress []netip.Addr }

// Empty reports whether nothing was tightened.
func (t Tightened) Empty() bool { return len(t.Egress) == 0 && len(t.Ingress) == 0 }

// Isolated are all endpoints that policies isolate, for a first look at what a former daemon has left. Closed ones are not among
// them: no policy has revoked their connections.
func Isolated(rs ruleset.Ruleset) Tightened {
	t := inetTable(rs)
	if t == nil {
		return Tightened{}
	}
	return tightened(t, func(string, ruleset.Elem, ruleset.Verdict) bool { return true })
}

// TightenedBy returns whom a change concerns, from the ruleset after it: endpoints that were dispatched to another chain, and
// those whose chain lost a rule or an element of a set, be it in a policy's chain that it calls.
func TightenedBy(d ruleset.Delta, after ruleset.Ruleset) Tightened {
	t := inetTable(after)
	if t == nil {
		return Tightened{}
	}
	sets, chains, keys := map[string]bool{}, map[string]bool{}, map[string]map[ruleset.Elem]bool{}
	for _, op := range d.Apply {
		switch {
		case op.Table != t.ID:
		case op.Kind == ruleset.DelElements && !op.Set.Map:
			sets[op.Set.Name] = true
		case op.Kind == ruleset.AddElements && op.Set.Map:
			if keys[op.Set.Name] == nil {
				keys[op.Set.Name] = map[ruleset.Elem]bool{}
			}
			for e := range op.Elements {
				keys[op.Set.Name][e] = true
			}
		case op.Kind == ruleset.FlushChain:
			chains[op.Chain.Name] = true
		}
	}
	memo := map[string]bool{}
	var changed func(name string) bool
	changed = func(name string) bool {
		if v, ok := memo[name]; ok {
			return v
		}
		c := t.Chains[name]
		v := c != nil && (chains[name] || slices.ContainsFunc(c.Rules, func(r ruleset.Rule) bool {
			return slices.ContainsFunc(r.Exprs, func(e ruleset.Expr) bool {
				switch e := e.(type) {
				case ruleset.In:
					return sets[e.Set]
				case ruleset.Verdict:
					return e.Chain != "" && changed(e.Chain)
				}
				return false
			})
		}))
		memo[name] = v
		return v
	}
	return tightened(t, func(name string, e ruleset.Elem, v ruleset.Verdict) bool { return keys[name][e] || changed(v.Chain) })
}

// tightened lists the addresses in the verdict maps that which selects, without closed ones.
func tightened(t *ruleset.Table, which func(name string, e ruleset.Elem, v ruleset.Verdict) bool) Tightened {
	in := func(names ...string) []netip.Addr {
		var list []netip.Addr
		for _, name := range names {
			for e, v := range t.Sets[name].Elements {
				if ip, ok := netip.AddrFromSlice([]byte(e)); ok && !Closed(v) && which(name, e, v) {
					list = append(list, ip)
				}
			}
		}
		slices.SortFunc(list, netip.Addr.Compare)
		return list
	}
	return Tightened{Egress: in(mapEgress4, mapEgress6), Ingress: in(mapIngress4, mapIngress6)}
}

func inetTable(rs ruleset.Ruleset) *ruleset.Table {
	for _, t := range rs {
		if t.ID.Family == ruleset.Inet && t.Sets[mapEgress4] != nil {
			return t
		}
	}
	return nil
}
