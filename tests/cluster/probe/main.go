// Command probe is what runs in the pods of the cluster tests: it serves, connects and sends when it is told to, and remembers
// what arrived. Tests speak to it from the pod's own node, whose traffic no NetworkPolicy touches.
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Ports that every probe listens on.
const (
	portWeb     = 80   // HTTP
	portWeb2    = 81   // HTTP
	portSink    = 82   // UDP datagrams of streams, never answered
	portControl = 9000 // HTTP for the tests
)

func main() {
	started := time.Now()
	if len(os.Args) > 1 && os.Args[1] == "ok" { // an exec probe
		return
	}
	if err := run(started); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

// list is a repeatable flag.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func run(started time.Time) error {
	var sendTo, connectTo list
	flag.Var(&sendTo, "send", "`ADDR` to send the stream HOSTNAME/ADDR to from the first instruction on")
	flag.Var(&connectTo, "connect", "`ADDR` to connect to over and over from the first instruction on")
	exitAfter := flag.Duration("exit-after", 0, "end with code 0 after this time")
	flag.Parse()
	p := &probe{
		started: started, streams: map[string]*stream{}, accepted: map[string]int{},
		flows: map[string]*flow{},
	}
	p.host, _ = os.Hostname()
	for _, addr := range sendTo {
		if err := p.send(p.host+"/"+addr, addr, time.Millisecond, burst); err != nil {
			return err
		}
	}
	for _, addr := range connectTo {
		p.connectAlways(addr)
	}
	if *exitAfter > 0 {
		time.AfterFunc(*exitAfter, func() { os.Exit(0) })
	}
	return p.serve()
}

type probe struct {
	started time.Time
	host    string

	mu       sync.Mutex
	streams  map[string]*stream // that arrived here
	accepted map[string]int     // connections by remote IP
	flows    map[string]*flow
}

// serve listens on every port, and returns only when that fails.
func (p *probe) serve() error {
	failed := make(chan error, 4)
	for _, port := range []int{portWeb, portWeb2} {
		srv := &http.Server{
			Addr: fmt.Sprintf(":%d", port), ReadHeaderTimeout: 5 * time.Second,
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = fmt.Fprintf(w, "%s %s\n", p.host, r.RemoteAddr)
			}),
			ConnState: func(c net.Conn, s http.ConnState) {
				if s == http.StateNew {
					p.count(c.RemoteAddr())
				}
			},
		}
		go func() { failed <- srv.ListenAndServe() }()
	}
	go func() { failed <- p.sink() }()
	control := &http.Server{Addr: fmt.Sprintf(":%d", portControl), Handler: p.control(), ReadHeaderTimeout: 5 * time.Second}
	go func() { failed <- control.ListenAndServe() }()
	return <-failed
}

func (p *probe) count(from net.Addr) {
	host, _, err := net.SplitHostPort(from.String())
	if err != nil {
		return
	}
	p.mu.Lock()
	p.accepted[host]++
	p.mu.Unlock()
}

func (p *probe) control() http.Handler {
	mux := http.NewServeMux()
	reply := func(w http.ResponseWriter, v any) {
		p.mu.Lock()
		defer p.mu.Unlock()
		_ = json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("GET /started", func(w http.ResponseWriter, _ *http.Request) { reply(w, p.started.UnixNano()) })
	mux.HandleFunc("GET /accepted", func(w http.ResponseWriter, _ *http.Request) { reply(w, p.accepted) })
	mux.HandleFunc("GET /streams", func(w http.ResponseWriter, _ *http.Request) { reply(w, p.streams) })
	mux.HandleFunc("GET /flows", func(w http.ResponseWriter, _ *http.Request) { reply(w, p.flows) })
	mux.HandleFunc("POST /forget", func(http.ResponseWriter, *http.Request) {
		p.mu.Lock()
		clear(p.streams)
		clear(p.accepted)
		p.mu.Unlock()
	})
	mux.HandleFunc("GET /connect", func(w http.ResponseWriter, r *http.Request) {
		timeout, err := time.ParseDuration(r.FormValue("timeout"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		reply(w, connect(r.Context(), r.FormValue("to"), timeout))
	})
	mux.HandleFunc("POST /send", func(w http.ResponseWriter, r *http.Request) {
		every, err := time.ParseDuration(r.FormValue("every"))
		if err == nil {
			err = p.send(r.FormValue("stream"), r.FormValue("to"), every, 0)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})
	mux.HandleFunc("POST /flow", func(w http.ResponseWriter, r *http.Request) {
		every, err := time.ParseDuration(r.FormValue("every"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		p.keep(r.FormValue("name"), r.FormValue("to"), every) //nolint:contextcheck // it outlives the request
	})
	return mux
}

// outcome of one connection.
type outcome struct {
	OK    bool   `json:"ok"`
	Reply string `json:"reply,omitempty"` // "HOSTNAME ADDR": who answered, and how it sees this pod
	Error string `json:"error,omitempty"`
}

// connect opens a connection of its own and makes one request.
func connect(ctx context.Context, addr string, timeout time.Duration) outcome {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	t := &http.Transport{DisableKeepAlives: true}
	defer t.CloseIdleConnections()
	return request(ctx, &http.Client{Transport: t}, addr)
}

func request(ctx context.Context, client *http.Client, addr string) outcome {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/", http.NoBody)
	if err != nil {
		return outcome{Error: err.Error()}
	}
	resp, err := client.Do(req)
	if err != nil {
		return outcome{Error: err.Error()}
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return outcome{Error: err.Error()}
	}
	return outcome{OK: true, Reply: strings.TrimSpace(string(body))}
}

// A program that sends from its first instruction on does so often for this time, and then now and then: hundreds run at once.
const (
	burst  = 2 * time.Second
	seldom = 250 * time.Millisecond
)

// connectAlways tries to connect again and again, each time for a moment only.
func (p *probe) connectAlways(addr string) {
	go func() {
		for {
			conn, err := net.DialTimeout("tcp", addr, 300*time.Millisecond)
			if err == nil {
				_ = conn.Close()
			}
			pause := 20 * time.Millisecond
			if time.Since(p.started) > burst {
				pause = seldom
			}
			time.Sleep(pause)
		}
	}()
}

// A datagram is the number, the time of sending and the name of its stream.
const header = 16

// send starts a stream of a datagram every so often, if slowAfter is not 0 only for that time. They all have the same addresses and are never answered, so that connection tracking sees
// each as the first of a new connection, and policies apply to each.
func (p *probe) send(name, addr string, every, slowAfter time.Duration) error {
	conn, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	packet := append(make([]byte, header), name...)
	transmit := func(seq uint64) {
		binary.BigEndian.PutUint64(packet, seq)
		binary.BigEndian.PutUint64(packet[8:], uint64(time.Now().UnixNano()))
		_, _ = conn.Write(packet) // refused and unreachable are answers too
	}
	transmit(0)
	go func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		var slow <-chan time.Time
		if slowAfter > 0 {
			slow = time.After(slowAfter)
		}
		for seq := uint64(1); ; {
			select {
			case <-slow:
				tick.Reset(seldom)
			case <-tick.C:
				transmit(seq)
				seq++
			}
		}
	}()
	return nil
}

// stream is what has arrived of one; times are those of sending, in nanoseconds since 1970.
type stream struct {
	Count    uint64 `json:"count"`
	First    int64  `json:"first"`
	Last     int64  `json:"last"`
	FirstSeq uint64 `json:"firstSeq"`
	LastSeq  uint64 `json:"lastSeq"`
	Gaps     []gap  `json:"gaps"` // of more than gapMin, the latest
	Remote   string `json:"remote"`
}

// gap is a time during which nothing arrived.
type gap struct {
	From int64  `json:"from"` // the last packet before it
	To   int64  `json:"to"`   // the first after it
	Lost uint64 `json:"lost"`
}

const (
	gapMin  = 15 * time.Millisecond
	gapsMax = 200
)

// sink receives datagrams.
func (p *probe) sink() error {
	conn, err := net.ListenPacket("udp", fmt.Sprintf(":%d", portSink))
	if err != nil {
		return err
	}
	_ = conn.(*net.UDPConn).SetReadBuffer(4 << 20)
	buf := make([]byte, 2048)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		if n < header {
			continue
		}
		seq, sent := binary.BigEndian.Uint64(buf), int64(binary.BigEndian.Uint64(buf[8:])) //nolint:gosec // a time
		p.mu.Lock()
		p.arrived(string(buf[header:n]), from, seq, sent)
		p.mu.Unlock()
	}
}

func (p *probe) arrived(name string, from net.Addr, seq uint64, sent int64) {
	s := p.streams[name]
	if s == nil {
		s = &stream{First: sent, FirstSeq: seq, LastSeq: seq, Last: sent}
		p.streams[name] = s
	}
	// A sender that was not scheduled for a while sends nothing: only lost packets make a gap.
	if time.Duration(sent-s.Last) > gapMin && seq > s.LastSeq+1 {
		s.Gaps = append(s.Gaps, gap{From: s.Last, To: sent, Lost: seq - s.LastSeq - 1})
		if len(s.Gaps) > gapsMax {
			s.Gaps = s.Gaps[1:]
		}
	}
	s.Count++
	s.Last, s.LastSeq, s.Remote = sent, seq, from.String()
}

// flow is steady TCP traffic: requests on one connection that stays open, and requests on new connections.
type flow struct {
	Kept      int    `json:"kept"` // requests that were answered on the connection that stays open
	Broken    int    `json:"broken"`
	New       int    `json:"new"` // new connections that were answered
	Refused   int    `json:"refused"`
	LastError string `json:"lastError,omitempty"`
	Since     int64  `json:"since"`
}

// keptConn remembers what ended it: net/http does not tell, it dials again.
type keptConn struct {
	net.Conn
	end atomic.Value // string
}

func (c *keptConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.end.CompareAndSwap(nil, fmt.Sprintf("%s: %v", time.Now().Format(time.StampMilli), err))
	}
	return n, err
}

func (p *probe) keep(name, addr string, every time.Duration) {
	f := &flow{Since: time.Now().UnixNano()}
	p.mu.Lock()
	p.flows[name] = f
	p.mu.Unlock()
	note := func(good, bad *int, o outcome) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if o.OK {
			*good++
		} else {
			*bad++
			f.LastError = o.Error
		}
	}
	go func() {
		var kept *keptConn
		client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if kept != nil {
					return nil, fmt.Errorf("the connection that should stay open has ended: %v", kept.end.Load())
				}
				c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				kept = &keptConn{Conn: c}
				return kept, nil
			},
		}}
		for range time.Tick(every) {
			note(&f.Kept, &f.Broken, request(context.Background(), client, addr))
		}
	}()
	go func() {
		for range time.Tick(every) {
			note(&f.New, &f.Refused, connect(context.Background(), addr, 3*time.Second))
		}
	}()
}
