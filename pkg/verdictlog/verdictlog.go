// Package verdictlog turns the packets that denying rules send to NFLOG into denial records with both pods' names.
package verdictlog

import (
	"context"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Denial is one or more packets of a flow that were denied, within Window. Rules log at a limited rate, so that more may have been denied
// than are counted here.
type Denial struct {
	Time        time.Time `json:"time"` // of the first packet
	Packets     int       `json:"packets"`
	Direction   string    `json:"direction"` // ingress: the policies of the destination; egress: those of the source
	Policies    []string  `json:"policies"`  // that isolate the pod in that direction, namespace/name: none of them allows this
	Source      Party     `json:"source"`
	Destination Party     `json:"destination"`
	Protocol    string    `json:"protocol"`
	ICMP        *ICMP     `json:"icmp,omitempty"`
	Fragment    bool      `json:"fragment,omitempty"` // not the first one of its packet: ports are not known
	In          string    `json:"in,omitempty"`       // interfaces
	Out         string    `json:"out,omitempty"`
}

// Party is one end of a denied flow. An address that is no pod's, or of a pod that is not known any more, has no Pod.
type Party struct {
	Pod  string     `json:"pod,omitempty"`  // namespace/name
	Node bool       `json:"node,omitempty"` // it is this node itself
	IP   netip.Addr `json:"ip"`
	Port uint16     `json:"port,omitempty"` // of a source, that of the first packet
}

// ICMP are the numbers of an ICMP or ICMPv6 message.
type ICMP struct {
	Type uint8 `json:"type"`
	Code uint8 `json:"code"`
}

// Event is what a follower gets: a denial, or how many it has missed because it was too slow.
type Event struct {
	*Denial
	Missed int `json:"missed,omitempty"`
}

// Names are what an address, a log prefix and an interface stand for at the time of a packet.
type Names struct {
	Direction           string
	Policies            []string
	Source, Destination string // pods, namespace/name
	In, Out             string
}

// Config is what a Log works with. All functions are called from Read's goroutine.
type Config struct {
	// Resolve returns false for a packet that is nobody's here: another program uses the same group.
	Resolve func(Packet) (Names, bool)
	// Peers fills in the pods of addresses that Resolve had no name for. It is called once per Window at most: it may look at
	// every pod of the cluster.
	Peers func(map[netip.Addr]string)
	// Denied is told every record.
	Denied func(Denial)
	// Lost is told how many packets the kernel could not hand over.
	Lost func(int)
}

// Window is for how long packets of a flow become one record, and with that how late a record may be.
const Window = time.Second

// kept is how many records can be asked for, and most how many flows are collected at a time; beyond it windows are shorter. About
// 500 bytes each.
const (
	kept = 1000
	most = 1000
)

// Log keeps the last denials and tells them to followers.
type Log struct {
	cfg     Config
	pending map[flow]*Denial // by Read's goroutine
	order   []*Denial

	mu    sync.Mutex
	ring  []Denial // the record number n is at n % kept
	total uint64   // records so far
	more  chan struct{}
}

// flow is what packets of one record have in common. The source port is not part of it: a client that tries again has another one.
type flow struct {
	prefix     string
	toNode     bool
	src, dst   netip.Addr
	proto      uint8
	port       uint16
	icmp       [2]uint8
	later      bool
	hasICMP    bool
	hasPorts   bool
	inIf, toIf uint32
}

// New returns an empty log.
func New(cfg Config) *Log {
	return &Log{cfg: cfg, pending: map[flow]*Denial{}, more: make(chan struct{})}
}

// Read collects what a Reader receives until ctx ends, which is no error, or the Reader fails. One Read runs at a time.
func (l *Log) Read(ctx context.Context, r *Reader) error {
	due := time.Now().Add(Window)
	for {
		packets, lost, err := r.read(ctx, due)
		now := time.Now()
		if lost > 0 {
			l.cfg.Lost(lost)
		}
		for _, p := range packets {
			if len(l.order) == 0 {
				due = now.Add(Window)
			}
			l.collect(p, now)
		}
		if err != nil || !now.Before(due) || len(l.order) >= most {
			l.flush()
			due = now.Add(Window)
		}
		if len(l.order) == 0 {
			due = now.Add(checkEvery)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// collect adds a packet to the record of its flow. Names are looked up now: they may be another's later.
func (l *Log) collect(p Packet, now time.Time) {
	key := flow{
		prefix: p.Prefix, toNode: p.ToNode, src: p.Src, dst: p.Dst, proto: p.Proto, port: p.Dport, icmp: [2]uint8{p.Type, p.Code},
		later: p.Later, hasICMP: p.HasICMP, hasPorts: p.HasPorts, inIf: p.In, toIf: p.Out,
	}
	if d := l.pending[key]; d != nil {
		d.Packets++
		return
	}
	names, ok := l.cfg.Resolve(p)
	if !ok {
		return
	}
	d := &Denial{
		Time: now, Packets: 1, Direction: names.Direction, Policies: names.Policies,
		Source:      Party{Pod: names.Source, IP: p.Src, Port: p.Sport},
		Destination: Party{Pod: names.Destination, Node: p.ToNode, IP: p.Dst, Port: p.Dport},
		Protocol:    protocolName(p.Proto), Fragment: p.Later, In: names.In, Out: names.Out,
	}
	if p.HasICMP {
		d.ICMP = &ICMP{Type: p.Type, Code: p.Code}
	}
	l.pending[key] = d
	l.order = append(l.order, d)
}

// flush makes records of what was collected.
func (l *Log) flush() {
	if len(l.order) == 0 {
		return
	}
	peers := map[netip.Addr]string{}
	for _, d := range l.order {
		for _, end := range []*Party{&d.Source, &d.Destination} {
			if end.Pod == "" && !end.Node {
				peers[end.IP] = ""
			}
		}
	}
	if len(peers) > 0 {
		l.cfg.Peers(peers)
	}
	list := make([]Denial, len(l.order))
	for i, d := range l.order {
		for _, end := range []*Party{&d.Source, &d.Destination} {
			if end.Pod == "" && !end.Node {
				end.Pod = peers[end.IP]
			}
		}
		list[i] = *d
		l.cfg.Denied(*d)
	}
	clear(l.pending)
	l.order = l.order[:0]

	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range list {
		if len(l.ring) < kept {
			l.ring = append(l.ring, d)
		} else {
			l.ring[l.total%kept] = d
		}
		l.total++
	}
	close(l.more)
	l.more = make(chan struct{})
}

// Last returns the denials that are kept, the oldest first. It is never nil.
func (l *Log) Last() []Denial {
	list, _, _ := l.since(0, kept)
	return list
}

// since returns records from number n on, or from the first one that is still kept, up to a limit; the number of the one that comes next;
// and what is closed when there are more than now.
func (l *Log) since(n uint64, limit int) ([]Denial, uint64, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n = max(n, l.total-uint64(len(l.ring)))
	list := make([]Denial, 0, min(l.total-n, uint64(limit))) //nolint:gosec // a constant
	for ; n < l.total && len(list) < limit; n++ {
		list = append(list, l.ring[n%kept])
	}
	return list, n, l.more
}

// followBatch is how many records a follower takes before it looks again what is still kept.
const followBatch = 100

// Follow sends the denials that are kept, and then every new one, until send fails or ctx ends. Nothing is stored for a follower: one that
// is so slow that records have gone before it came to them is told how many.
func (l *Log) Follow(ctx context.Context, send func(Event) error) error {
	_, next, _ := l.since(0, 0)
	for ctx.Err() == nil {
		list, end, more := l.since(next, followBatch)
		if missed := int(end-next) - len(list); missed > 0 { //nolint:gosec // records, not bytes
			if err := send(Event{Missed: missed}); err != nil {
				return err
			}
		}
		next = end
		for i := range list {
			if err := send(Event{Denial: &list[i]}); err != nil {
				return err
			}
		}
		if len(list) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
		case <-more:
		}
	}
	return nil
}

// About reports whether a pod, as namespace/name, is one of the ends.
func (d *Denial) About(pod string) bool {
	return slices.Contains([]string{d.Source.Pod, d.Destination.Pod}, pod)
}

var protocols = map[uint8]string{
	unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_DCCP: "dccp", unix.IPPROTO_GRE: "gre",
	unix.IPPROTO_ESP: "esp", unix.IPPROTO_AH: "ah", unix.IPPROTO_ICMPV6: "icmpv6", unix.IPPROTO_SCTP: "sctp", unix.IPPROTO_UDPLITE: "udplite",
}

// protocolName returns IANA's keyword, or the number.
func protocolName(p uint8) string {
	if name, ok := protocols[p]; ok {
		return name
	}
	return strconv.Itoa(int(p))
}
