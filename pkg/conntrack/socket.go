package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// timeout bounds each answer of the kernel.
	timeout = 10 * time.Second

	// datagram is what one read takes. The kernel makes the messages of a dump as large as the reader's buffer, up to 32 KiB.
	datagram = 64 << 10

	// batchSize is the number of entries that one system call deletes, about 100 kB.
	batchSize = 1000

	// socketBuffer holds a batch, and an answer for each of its messages, for which the kernel counts about 1 KiB.
	socketBuffer = 4 << 20

	sizeofNfgenmsg = 4
	nfnetlinkV1    = 1 // NFNETLINK_V1

	typeNew    = unix.NFNL_SUBSYS_CTNETLINK << 8 // IPCTNL_MSG_CT_NEW
	typeGet    = typeNew | 1
	typeDelete = typeNew | 2
)

var (
	errInterrupted = errors.New("the kernel interrupted the dump")
	errNoAnswer    = errors.New("the kernel did not answer")
	errNotIPv4     = errors.New("a selection for a flush is not of IPv4 addresses")
)

// socket is a netlink socket to conntrack. A library opens it, but sends and receives nothing: one allocation for each of
// 100,000 entries is what costs time. After an error it is of no more use.
type socket struct {
	conn *netlink.Conn
	raw  syscall.RawConn
	buf  []byte // of the datagram that is being read
	out  []byte
	seq  uint32
}

func dial(netNS int) (*socket, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netNS})
	if err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		err = errors.Join(
			conn.SetReadBuffer(socketBuffer), conn.SetWriteBuffer(socketBuffer),
			// An answer that names a failed message by its number need not repeat it.
			conn.SetOption(netlink.CapAcknowledge, true),
		)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &socket{conn: conn, raw: raw, buf: make([]byte, datagram)}, nil
}

func (s *socket) close() { _ = s.conn.Close() }

// begin appends a message's header to out; end sets its length.
func (s *socket) begin(typ, flags uint16) int {
	start := len(s.out)
	s.seq++
	s.out = binary.NativeEndian.AppendUint32(s.out, 0)
	s.out = binary.NativeEndian.AppendUint16(s.out, typ)
	s.out = binary.NativeEndian.AppendUint16(s.out, unix.NLM_F_REQUEST|flags)
	s.out = binary.NativeEndian.AppendUint32(s.out, s.seq)
	s.out = binary.NativeEndian.AppendUint32(s.out, 0)
	return start
}

func (s *socket) end(start int) {
	binary.NativeEndian.PutUint32(s.out[start:], uint32(len(s.out)-start))
}

// send sends what is in out.
func (s *socket) send() error {
	var err error
	werr := s.raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), s.out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
	s.out = s.out[:0]
	if werr != nil {
		err = werr
	}
	return os.NewSyscallError("sendto", err)
}

// receive reads a datagram. If there is none, it waits for it or returns EAGAIN.
func (s *socket) receive(wait bool) ([]byte, error) {
	if wait {
		if err := s.conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			return nil, err
		}
	}
	for {
		var (
			n, flags int
			from     unix.Sockaddr
			err      error
		)
		rerr := s.raw.Read(func(fd uintptr) bool {
			n, _, flags, from, err = unix.Recvmsg(int(fd), s.buf, nil, 0)
			return !wait || !errors.Is(err, unix.EAGAIN)
		})
		if rerr != nil {
			return nil, rerr
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("recvmsg", err)
		}
		if flags&unix.MSG_TRUNC != 0 {
			return nil, errMalformed
		}
		if sa, ok := from.(*unix.SockaddrNetlink); ok && sa.Pid == 0 { // else from another process, with CAP_NET_ADMIN
			return s.buf[:n], nil
		}
	}
}

// header is the part of a message's struct nlmsghdr that is of interest.
type header struct {
	typ, flags uint16
	seq        uint32
}

// split cuts the first message off a datagram.
func split(b []byte) (header, []byte, []byte, error) {
	if len(b) < unix.SizeofNlMsghdr {
		return header{}, nil, nil, errMalformed
	}
	n := binary.NativeEndian.Uint32(b)
	if n < unix.SizeofNlMsghdr || uint64(n) > uint64(len(b)) {
		return header{}, nil, nil, errMalformed
	}
	h := header{
		typ: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]), seq: binary.NativeEndian.Uint32(b[8:]),
	}
	return h, b[unix.SizeofNlMsghdr:n], b[min(align(int(n)), len(b)):], nil
}

// errno reads the payload of an answer: a negative error number, or 0.
func errno(payload []byte) (unix.Errno, bool) {
	if len(payload) < 4 {
		return 0, false
	}
	return unix.Errno(max(0, -int64(int32(binary.NativeEndian.Uint32(payload))))), true
}

// dump sends a request for entries and calls each for every one.
func (s *socket) dump(ctx context.Context, family uint8, sel selection, each func(*entry)) error {
	m := s.begin(typeGet, unix.NLM_F_DUMP)
	s.out = append(s.out, family, unix.NFNETLINK_V0, 0, 0)
	if sel != (selection{}) {
		s.out = sel.appendFilter(s.out)
	}
	s.end(m)
	if err := s.send(); err != nil {
		return err
	}
	interrupted := false
	var e entry
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := s.receive(true)
		if err != nil {
			return err
		}
		for len(b) > 0 {
			var h header
			var payload []byte
			if h, payload, b, err = split(b); err != nil {
				return err
			}
			if h.seq != s.seq {
				continue
			}
			interrupted = interrupted || h.flags&unix.NLM_F_DUMP_INTR != 0
			switch h.typ {
			case typeNew:
				if err := parse(payload, &e); err != nil {
					return err
				}
				each(&e)
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				no, ok := errno(payload)
				switch {
				case !ok:
					return errMalformed
				case no != 0:
					return no
				case interrupted:
					return errInterrupted
				}
				return nil
			}
		}
	}
}

// delete sends one message for each of the flows and returns how many entries it deleted. The kernel has executed them and
// queued its answers when sendto returns. It answers the messages that fail, and the last one, of which that is asked.
func (s *socket) delete(flows []Flow) (int, error) {
	first := s.seq + 1
	for i := range flows {
		var flags uint16
		if i == len(flows)-1 {
			flags = unix.NLM_F_ACK
		}
		m := s.begin(typeDelete, flags)
		s.out = appendDelete(s.out, &flows[i])
		s.end(m)
	}
	if err := s.send(); err != nil {
		return 0, err
	}
	deleted := len(flows)
	var refused error
	for answered := false; !answered; {
		b, err := s.receive(false)
		switch {
		case errors.Is(err, unix.EAGAIN) && refused != nil:
			return 0, refused // the first message's answer was for all of them: EPERM (nfnetlink_rcv)
		case errors.Is(err, unix.EAGAIN):
			return 0, errNoAnswer
		case err != nil:
			return 0, err
		}
		for len(b) > 0 {
			var h header
			var payload []byte
			if h, payload, b, err = split(b); err != nil {
				return 0, err
			}
			if h.typ != unix.NLMSG_ERROR || h.seq-first >= uint32(len(flows)) {
				continue
			}
			no, ok := errno(payload)
			if !ok {
				return 0, errMalformed
			}
			if no != 0 {
				deleted--
				if no != unix.ENOENT && refused == nil {
					refused = no
				}
			}
			answered = answered || h.seq == s.seq
		}
	}
	return deleted, refused
}

// flush has the kernel delete the entries of a selection, which has an IPv4 address: without any it would delete all. The kernel has
// done so and queued its answer when sendto returns.
func (s *socket) flush(sel selection) error {
	if family, ok := sel.family(); !ok || family != unix.AF_INET {
		return errNotIPv4
	}
	m := s.begin(typeDelete, unix.NLM_F_ACK)
	s.out = sel.appendFlush(s.out)
	s.end(m)
	if err := s.send(); err != nil {
		return err
	}
	return s.answer()
}

// answer reads the kernel's answer to the last message, which has been queued.
func (s *socket) answer() error {
	for {
		b, err := s.receive(false)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return errNoAnswer
		case err != nil:
			return err
		}
		for len(b) > 0 {
			var h header
			var payload []byte
			if h, payload, b, err = split(b); err != nil {
				return err
			}
			if h.typ != unix.NLMSG_ERROR || h.seq != s.seq {
				continue
			}
			no, ok := errno(payload)
			switch {
			case !ok:
				return errMalformed
			case no != 0:
				return no
			}
			return nil
		}
	}
}
