package agentapi

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
)

// ownerPath is where a daemon that stands by asks the one that writes for its netlink socket. A daemon that does not know the
// request answers 404 as for any other.
const ownerPath = "/v1/owner"

// HandOver answers GET /v1/owner with a descriptor of the socket that owns the tables, and leaves everything else to next. An
// owned table belongs to the socket, not to the process: while anybody has it open nobody else can change the table, however
// the process that made it ends. The connection stays open until ctx ends, or with the process: its end tells the other side.
func HandOver(ctx context.Context, next http.Handler, owner syscall.RawConn) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != ownerPath {
			next.ServeHTTP(w, r)
			return
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			writeError(w, err)
			return
		}
		defer func() { _ = conn.Close() }()
		stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
		defer stop()
		if err := sendSocket(conn, owner); err != nil {
			return // the other side has gone, or hears of it by the end of the connection
		}
		_, _ = io.Copy(io.Discard, conn)
	})
}

func sendSocket(c net.Conn, owner syscall.RawConn) error {
	if l, ok := c.(*limitConn); ok {
		c = l.Conn
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return errors.New("descriptors can only be passed over a unix socket")
	}
	var failed error
	err := owner.Control(func(fd uintptr) {
		const answer = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
		_, _, failed = uc.WriteMsgUnix([]byte(answer), syscall.UnixRights(int(fd)), nil)
	})
	return errors.Join(err, failed)
}

// Owner is the netlink socket of the daemon that writes, held open.
type Owner struct {
	socket *os.File
	conn   net.Conn // ends with that daemon
}

// Owner asks the daemon for the socket that owns its tables.
func (c *Client) Owner(ctx context.Context) (*Owner, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, fmt.Errorf("ask for the owner of the tables: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	socket, err := receiveSocket(conn.(*net.UnixConn))
	if !stop() && err == nil {
		err = errors.Join(context.Cause(ctx), socket.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ask for the owner of the tables: %w", err), conn.Close())
	}
	return &Owner{socket: socket, conn: conn}, nil
}

func receiveSocket(conn *net.UnixConn) (*os.File, error) {
	if _, err := io.WriteString(conn, "GET "+ownerPath+" HTTP/1.1\r\nHost: podwalld\r\n\r\n"); err != nil {
		return nil, err
	}
	// Descriptors come with the first byte of what they were sent with (unix(7)).
	buf, rights := make([]byte, 4096), make([]byte, syscall.CmsgSpace(4))
	n, nr, _, _, err := conn.ReadMsgUnix(buf, rights)
	if err != nil {
		return nil, err
	}
	fds, err := descriptors(rights[:nr])
	if err != nil {
		return nil, err
	}
	answer, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(buf[:n])), nil)
	switch {
	case err != nil:
	case answer.StatusCode != http.StatusOK:
		err = &Error{Code: CodeVersionMismatch, Msg: "podwalld answers " + answer.Status}
	case len(fds) != 1:
		err = &Error{Code: CodeVersionMismatch, Msg: fmt.Sprintf("podwalld sent %d descriptors", len(fds))}
	case !isNetfilter(fds[0]):
		err = &Error{Code: CodeVersionMismatch, Msg: "podwalld sent something that is not a socket to netfilter"}
	default:
		return os.NewFile(uintptr(fds[0]), "owner of the tables"), nil
	}
	for _, fd := range fds {
		err = errors.Join(err, syscall.Close(fd))
	}
	return nil, err
}

func descriptors(rights []byte) ([]int, error) {
	msgs, err := syscall.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range msgs {
		list, err := syscall.ParseUnixRights(&msgs[i])
		if err != nil {
			return nil, err
		}
		fds = append(fds, list...)
	}
	return fds, nil
}

func isNetfilter(fd int) bool {
	domain, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_DOMAIN)
	if err != nil || domain != syscall.AF_NETLINK {
		return false
	}
	protocol, err := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_PROTOCOL)
	return err == nil && protocol == syscall.NETLINK_NETFILTER
}

// Wait returns when the daemon that sent the socket has ended, or with ctx.
func (o *Owner) Wait(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = o.conn.Close() })
	defer stop()
	_, _ = io.Copy(io.Discard, o.conn)
}

// Close lets go of the socket: once nobody has it open the tables are the next one's to own.
func (o *Owner) Close() error {
	_ = o.conn.Close() // Wait may have done it
	return o.socket.Close()
}
