package agentapi

import (
	"container/list"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// A caller that has not sent its whole request is silent. Silent callers of the socket cost a descriptor and two goroutines each and
// nobody knows what they want, so that they are few: one more takes the place of the one that is silent for longest. The plugin sends
// its request with the first write after connect(2); silentGrace is what a busy node may need for that. A caller that was heard is
// bounded by what it asks for (see gate).
const (
	maxSilent    = 512
	silentGrace  = 200 * time.Millisecond
	maxStrangers = 16 // silent callers that are not root, who are to be told so and have no grace
)

// limitListener bounds the silent connections that it has handed out.
type limitListener struct {
	net.Listener
	grace           time.Duration
	root, strangers room
	freed           chan struct{} // a token when a silent connection has gone or was heard
	done            chan struct{}
	closeOnce       func() error
}

// room holds silent connections, the oldest first.
type room struct {
	mu     sync.Mutex
	silent list.List // of *limitConn
	most   int
}

func newLimitListener(ln net.Listener, most int, grace time.Duration) *limitListener {
	l := &limitListener{
		Listener: ln, grace: grace, root: room{most: most}, strangers: room{most: min(most, maxStrangers)},
		freed: make(chan struct{}, 1), done: make(chan struct{}),
	}
	l.closeOnce = sync.OnceValue(func() error {
		close(l.done)
		return ln.Close()
	})
	return l
}

// Accept waits for a connection and then for a place, which the longest silent one gives up at the end of its grace.
func (l *limitListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &limitConn{Conn: nc, uid: peerUID(nc), since: time.Now(), from: l, room: &l.root}
	grace := l.grace
	if c.uid != 0 {
		c.room, grace = &l.strangers, 0
	}
	for {
		oldest, wait := c.room.enter(c, grace)
		switch {
		case oldest != nil:
			_ = oldest.Conn.Close()
			return c, nil
		case wait <= 0:
			return c, nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-l.freed:
			timer.Stop()
		case <-l.done:
			timer.Stop()
			_ = nc.Close()
			return nil, net.ErrClosed
		}
	}
}

// Close also wakes an Accept that waits for a place.
func (l *limitListener) Close() error { return l.closeOnce() }

// enter gives c a place, if need be that of the connection that it returns. If there is none yet it says how long to wait.
func (r *room) enter(c *limitConn, grace time.Duration) (*limitConn, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var oldest *limitConn
	if r.silent.Len() >= r.most {
		oldest = r.silent.Front().Value.(*limitConn)
		if wait := grace - time.Since(oldest.since); wait > 0 {
			return nil, wait
		}
		r.silent.Remove(oldest.place)
		oldest.place = nil
	}
	c.place = r.silent.PushBack(c)
	return oldest, 0
}

// limitConn is silent until it is heard or closed.
type limitConn struct {
	net.Conn
	uid   uint32
	since time.Time
	from  *limitListener
	room  *room
	place *list.Element // in room; nil once it is not silent any more
}

// heard ends the silence and reports whether the connection still was there: it is false for one that had to give up its place.
func (c *limitConn) heard() bool {
	c.room.mu.Lock()
	defer c.room.mu.Unlock()
	if c.place == nil {
		return false
	}
	c.room.silent.Remove(c.place)
	c.place = nil
	select {
	case c.from.freed <- struct{}{}:
	default:
	}
	return true
}

// Close closes the connection and gives up its place.
func (c *limitConn) Close() error {
	c.heard()
	return c.Conn.Close()
}

// follow takes a connection that a handler keeps (see HandOver) for heard. It is a ConnState of http.Server.
func follow(c net.Conn, state http.ConnState) {
	if l, ok := c.(*limitConn); ok && state == http.StateHijacked {
		l.heard()
	}
}

// connKey is the context key of a request's connection.
type connKey struct{}

// callerOf returns the connection of a request, or nil for one that did not come by Serve.
func callerOf(r *http.Request) *limitConn {
	c, _ := r.Context().Value(connKey{}).(*limitConn)
	return c
}

// unknownUID stands for a peer whose credentials cannot be read.
const unknownUID = ^uint32(0)

// peerUID asks the kernel who connected (SO_PEERCRED, unix(7)).
func peerUID(c net.Conn) uint32 {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return unknownUID
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return unknownUID
	}
	uid := unknownUID
	if err := raw.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	}); err != nil {
		return unknownUID
	}
	return uid
}

// gate bounds requests of one kind that run at once. One too many is refused and not kept waiting: whoever waits costs as much.
type gate chan struct{}

// enter returns what leaves the gate again.
func (g gate) enter() (func(), error) {
	select {
	case g <- struct{}{}:
		return func() { <-g }, nil
	default:
		return nil, Errorf(CodeTryAgainLater, "podwalld already serves %d requests of this kind: try again later", cap(g))
	}
}
