package verdictlog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Messages and attributes that bind a group (linux/netfilter/nfnetlink_log.h).
const (
	typePacket = unix.NFNL_SUBSYS_ULOG << 8   // NFULNL_MSG_PACKET
	typeConfig = unix.NFNL_SUBSYS_ULOG<<8 | 1 // NFULNL_MSG_CONFIG

	configCommand   = 1 // NFULA_CFG_CMD
	configMode      = 2 // NFULA_CFG_MODE
	configTimeout   = 4 // NFULA_CFG_TIMEOUT
	configThreshold = 5 // NFULA_CFG_QTHRESH
	configFlags     = 6 // NFULA_CFG_FLAGS

	commandBind  = 1 // NFULNL_CFG_CMD_BIND
	copyPacket   = 2 // NFULNL_COPY_PACKET
	flagSequence = 1 // NFULNL_CFG_F_SEQ: packets are numbered, so that the lost ones can be counted
)

// The kernel keeps packets until it has batchPackets of them, or for batchTime. A Log collects for longer than that: the shorter time
// is for names, which are looked up when a packet is read.
const (
	batchPackets = 64
	batchTime    = 100 * time.Millisecond
	readBuffer   = 1 << 20
)

// checkEvery is how long a Reader without packets takes for granted that the group still is its own.
const checkEvery = 10 * time.Second

// errUnbound says that the group was taken from a Reader.
var errUnbound = errors.New("the kernel had unbound the group")

// Reader receives the packets of one NFLOG group, in the network namespace that it was opened in.
type Reader struct {
	conn    *netlink.Conn
	group   uint16
	snaplen uint32
	next    uint32 // the number of the next packet
	counted bool   // next is known
	checked bool   // an answer is due that says whose the group is
	last    time.Time
}

// Open binds a group. One reader has it at a time; netlink_net_capable wants CAP_NET_ADMIN.
func Open(group uint16, snaplen uint32) (*Reader, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open a socket for NFLOG group %d: %w", group, err)
	}
	r := &Reader{conn: conn, group: group, snaplen: snaplen, last: time.Now()}
	// Without CAP_NET_ADMIN over the initial namespace the size is up to net.core.rmem_max.
	if err := conn.SetReadBuffer(readBuffer); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("open a socket for NFLOG group %d: %w", group, err)
	}
	if err := r.bind(); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return r, nil
}

// bind waits for the kernel's answer. Packets of the first moments may come before it.
func (r *Reader) bind() error {
	err := r.request()
	if err == nil {
		err = r.conn.SetReadDeadline(time.Now().Add(checkEvery))
	}
	for answered := false; err == nil && !answered; {
		var msgs []netlink.Message
		msgs, err = r.conn.Receive()
		for _, m := range msgs {
			answered = answered || m.Header.Type == netlink.Error
		}
	}
	switch {
	case errors.Is(err, unix.EPERM):
		// nfulnl_recv_config: the group has an instance of another socket.
		return fmt.Errorf("bind NFLOG group %d: another program reads it, or CAP_NET_ADMIN is missing: see /proc/net/netfilter/nfnetlink_log: %w", r.group, err)
	case err != nil:
		return fmt.Errorf("bind NFLOG group %d: %w", r.group, err)
	}
	return nil
}

// request asks for the group with everything that it is configured with, which the kernel takes in one message.
func (r *Reader) request() error {
	ae := netlink.NewAttributeEncoder()
	be32 := func(v uint32) []byte { return []byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)} }
	ae.Bytes(configCommand, []byte{commandBind})
	ae.Bytes(configMode, append(be32(r.snaplen), copyPacket, 0))
	ae.Bytes(configTimeout, be32(uint32(batchTime/(10*time.Millisecond))))
	ae.Bytes(configThreshold, be32(batchPackets))
	ae.Bytes(configFlags, []byte{0, flagSequence})
	return r.send(ae)
}

func (r *Reader) send(ae *netlink.AttributeEncoder) error {
	attrs, err := ae.Encode()
	if err != nil {
		return err
	}
	_, err = r.conn.Send(netlink.Message{
		Header: netlink.Header{Type: typeConfig, Flags: netlink.Request | netlink.Acknowledge},
		Data:   append([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(r.group >> 8), byte(r.group)}, attrs...),
	})
	return err
}

// Close gives the group back.
func (r *Reader) Close() error { return r.conn.Close() }

// read returns the packets that have come, at the latest at the deadline with none, and how many were lost before them. After an error
// the Reader is of no more use.
func (r *Reader) read(ctx context.Context, deadline time.Time) ([]Packet, int, error) {
	if err := r.conn.SetReadDeadline(deadline); err != nil {
		return nil, 0, err
	}
	// A deadline that is passed already wakes a reader; it is set behind the one above, whichever comes first.
	stop := context.AfterFunc(ctx, func() { _ = r.conn.SetReadDeadline(time.Now().Add(-time.Second)) })
	msgs, err := r.conn.Receive()
	stop()
	switch {
	case ctx.Err() != nil:
		return nil, 0, ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, 0, r.check()
	case errors.Is(err, unix.ENOBUFS):
		return nil, 0, nil // the numbers of what comes next say how many
	case errors.Is(err, unix.EBUSY) && r.checked:
		r.checked = false
		return nil, 0, nil // the group is this socket's
	case errors.Is(err, unix.EPERM) && r.checked:
		return nil, 0, fmt.Errorf("%w %d, and another program reads it now", errUnbound, r.group)
	case err != nil:
		return nil, 0, fmt.Errorf("read NFLOG group %d: %w", r.group, err)
	}
	r.last = time.Now()
	var list []Packet
	lost := 0
	for _, m := range msgs {
		switch m.Header.Type {
		case netlink.Error: // an answer without an error: the group was nobody's and has been bound anew
			if r.checked {
				return list, lost, fmt.Errorf("%w %d", errUnbound, r.group)
			}
		case typePacket:
			p, ok := parseMessage(m.Data)
			if p.hasSequence {
				if r.counted {
					lost += int(p.sequence - r.next)
				}
				r.next, r.counted = p.sequence+1, true
			}
			if ok {
				list = append(list, p)
			}
		}
	}
	return list, lost, nil
}

// check asks for the group again when nothing has come for a while: silence may mean that it is not ours any more. The answer is
// EBUSY if it is.
func (r *Reader) check() error {
	if time.Since(r.last) < checkEvery {
		return nil
	}
	r.last, r.checked = time.Now(), true
	if err := r.request(); err != nil {
		return fmt.Errorf("read NFLOG group %d: %w", r.group, err)
	}
	return nil
}
