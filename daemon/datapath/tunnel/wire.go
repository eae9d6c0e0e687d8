package tunnel

import (
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// wire stands between crypto/tls and the MPTCP socket.
//
//	write: relay ─▶ tls.Conn ─ records ─▶ wire (gathers) ─ one write ─▶ socket
//	read:  socket ─ one read ─▶ wire ─ a record at a time ─▶ tls.Conn ─▶ relay
//
// Left to itself, crypto/tls makes a system call per record, and keeps a read
// buffer of twice the largest record as long as the connection lives. The wire
// gathers records going out, and hands records coming in over one at a time, so
// that crypto/tls never needs to keep more than one.
type wire struct {
	*socket

	in         *buffer // ciphertext that crypto/tls has not taken yet, or nil
	start, end int
	header     [5]byte // of the record being handed over
	haveHeader int
	body       int  // bytes of that record's body still to be handed over
	blocking   bool // whether Read may wait for the socket

	// crypto/tls may write an alert or a key update from the reading goroutine.
	gathering sync.Mutex
	out       *buffer // ciphertext gathered while corked
	filled    int
	corked    bool
}

func newWire(conn *net.TCPConn) (*wire, error) {
	s, err := newSocket(conn)
	if err != nil {
		return nil, err
	}
	return &wire{socket: s, blocking: true}, nil
}

// The settings of a session's socket.
const (
	// congestionControl is the default of stock kernels. What bbr has learnt from
	// small flows makes it send the next one slowly.
	congestionControl = "cubic"
	// receiveBuffer, in bytes, is from the first moment what autotuning reaches
	// after the first second: at 100 Mbit/s the whole of a download gains 1 %.
	// The kernel doubles it for its own overhead (socket(7)).
	receiveBuffer = 4 << 20
)

// tune sets the options of a socket for sessions, as far as we may, before it is
// connected or listens: what it begins with its subflows begin with.
func tune(fd int) {
	// A kernel without cubic keeps its default.
	_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, congestionControl)
	// Without CAP_NET_ADMIN autotuning stays: SO_RCVBUF instead would fix the
	// buffer at net.core.rmem_max, which is 208 kB on stock kernels.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
}

// fill waits until there is ciphertext to be decrypted.
func (w *wire) fill() error {
	if w.in != nil {
		return nil
	}
	b, n, err := w.read(0, bufferSize)
	if err != nil {
		return err
	}
	w.in, w.start, w.end = b, 0, n
	return nil
}

// Read hands crypto/tls the rest of the current record's header, or body.
func (w *wire) Read(p []byte) (int, error) {
	if w.in == nil {
		if !w.blocking {
			return 0, errWouldBlock
		}
		if err := w.fill(); err != nil {
			return 0, err
		}
	}
	var n int
	if w.body == 0 {
		n = copy(p, w.in.data[w.start:min(w.end, w.start+len(w.header)-w.haveHeader)])
		copy(w.header[w.haveHeader:], p[:n])
		w.haveHeader += n
		if w.haveHeader == len(w.header) {
			w.haveHeader = 0
			w.body = int(w.header[3])<<8 | int(w.header[4])
		}
	} else {
		n = copy(p, w.in.data[w.start:min(w.end, w.start+w.body)])
		w.body -= n
	}
	w.start += n
	if w.start == w.end {
		w.in.release()
		w.in = nil
	}
	return n, nil
}

// cork makes Write gather until flush.
func (w *wire) cork() {
	w.gathering.Lock()
	w.corked = true
	w.gathering.Unlock()
}

// Write takes one record from crypto/tls.
func (w *wire) Write(p []byte) (int, error) {
	w.gathering.Lock()
	defer w.gathering.Unlock()
	if !w.corked {
		return w.conn.Write(p)
	}
	for taken := 0; ; {
		if w.out == nil {
			w.out = borrow()
		}
		n := copy(w.out.data[w.filled:], p[taken:])
		w.filled += n
		taken += n
		if taken == len(p) {
			return taken, nil
		}
		if err := w.drain(); err != nil {
			return taken, err
		}
	}
}

// flush writes what was gathered.
func (w *wire) flush() error {
	w.gathering.Lock()
	defer w.gathering.Unlock()
	w.corked = false
	err := w.drain()
	if w.out != nil {
		w.out.release()
		w.out = nil
	}
	return err
}

func (w *wire) drain() error {
	if w.filled == 0 {
		return nil
	}
	n, err := w.conn.Write(w.out.data[:w.filled])
	if err == nil && n < w.filled {
		err = io.ErrShortWrite
	}
	w.filled = 0
	return err
}

// Close closes the socket.
func (w *wire) Close() error { return w.conn.Close() }

// LocalAddr is the address of the connection's first subflow.
func (w *wire) LocalAddr() net.Addr { return w.conn.LocalAddr() }

// RemoteAddr is the peer's address on the connection's first subflow.
func (w *wire) RemoteAddr() net.Addr { return w.conn.RemoteAddr() }

// SetDeadline bounds reads and writes in time.
func (w *wire) SetDeadline(t time.Time) error { return w.conn.SetDeadline(t) }

// SetReadDeadline bounds reads in time.
func (w *wire) SetReadDeadline(t time.Time) error { return w.conn.SetReadDeadline(t) }

// SetWriteDeadline bounds writes in time.
func (w *wire) SetWriteDeadline(t time.Time) error { return w.conn.SetWriteDeadline(t) }
