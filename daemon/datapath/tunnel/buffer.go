package tunnel

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// recordPayload is the most plaintext in one TLS record (RFC 8446 section 5.1).
	recordPayload = 16384
	// recordOverhead is what a TLS 1.3 AEAD record adds: header 5, content type 1,
	// tag 16 (RFC 8446 section 5.2).
	recordOverhead = 22
	// batch is how many full records are moved by one system call on each side.
	batch = 4

	bufferSize = batch * (recordPayload + recordOverhead)
	// headroom is kept free before a payload for the OPEN and DATA headers.
	headroom = maxOpen + frameHeader
)

// buffer is borrowed while bytes move and given back before anything waits, so
// an idle flow holds none.
type buffer struct {
	data [bufferSize]byte
}

var buffers = sync.Pool{New: func() any { return new(buffer) }}

func borrow() *buffer { return buffers.Get().(*buffer) }

func (b *buffer) release() { buffers.Put(b) }

// errWouldBlock is temporary in the sense of net.Error, so that crypto/tls lets
// its caller try again.
var errWouldBlock error = wouldBlock{}

type wouldBlock struct{}

func (wouldBlock) Error() string   { return "no more ciphertext buffered" }
func (wouldBlock) Timeout() bool   { return true }
func (wouldBlock) Temporary() bool { return true }

// socket reads and writes one TCP or MPTCP socket with the runtime's poller,
// but borrows a buffer only once there is something to read.
type socket struct {
	conn *net.TCPConn
	raw  syscall.RawConn
	// outOfTree is set when the connection is one of MPTCP v0.9x.
	outOfTree outOfTree

	// The callbacks are made once: a closure per call would be garbage per call.
	readReady  func(fd uintptr) bool
	writeReady func(fd uintptr) bool

	// Arguments and results of readReady; only the reading goroutine uses them.
	from, limit int
	got         *buffer
	n           int
	err         error
	failed      error // met by readShort, for the next read to return
}

func newSocket(conn *net.TCPConn) (*socket, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &socket{conn: conn, raw: raw}
	s.readReady = func(fd uintptr) bool {
		b := borrow()
		for {
			s.n, s.err = unix.Read(int(fd), b.data[s.from:s.from+s.limit])
			if !errors.Is(s.err, unix.EINTR) {
				break
			}
		}
		if s.n > 0 {
			s.got = b
			return true
		}
		b.release()
		if errors.Is(s.err, unix.EAGAIN) {
			return false
		}
		if s.err == nil {
			s.err = io.EOF
		} else {
			s.err = os.NewSyscallError("read", s.err)
		}
		return true
	}
	s.writeReady = func(fd uintptr) bool {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(p[:], 0)
		// Errors and hang-ups count as ready: the write that follows reports them.
		return err != nil || n > 0
	}
	return s, nil
}

// read waits until the socket has data and reads up to limit bytes of it into
// a borrowed buffer, beginning at index from.
func (s *socket) read(from, limit int) (b *buffer, n int, err error) {
	if s.failed != nil {
		return nil, 0, s.failed
	}
	s.from, s.limit = from, limit
	if err := s.raw.Read(s.readReady); err != nil {
		return nil, 0, err
	}
	b, s.got = s.got, nil
	if b == nil {
		return nil, 0, s.err
	}
	return b, s.n, nil
}

// readShort is read for a source whose end should travel with its last bytes:
// having read less than limit, it looks once more, after a while, and also says
// whether the end has been seen.
func (s *socket) readShort(from, limit int, after time.Duration) (b *buffer, n int, end bool, err error) {
	b, n, err = s.read(from, limit)
	if err != nil || n == limit {
		return b, n, false, err
	}
	if after > 0 {
		time.Sleep(after)
	}
	controlErr := s.raw.Control(func(fd uintptr) {
		more, err := unix.Read(int(fd), b.data[from+n:from+limit])
		switch {
		case err == nil:
			end = more == 0
			n += more
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
			// The kernel tells of a failure once, and of an end from then on: a RST
			// must not be forgotten here.
			s.failed = os.NewSyscallError("read", err)
		}
	})
	return b, n, end && controlErr == nil, nil
}

// closed says whether the connection is over in both directions.
func (s *socket) closed() bool {
	state := uint8(tcpClose)
	_ = s.raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = info.State
		}
	})
	return state == tcpClose
}

// waitWritable waits until the kernel has room for more of our bytes, so that
// the ones to be written next need not be held meanwhile.
func (s *socket) waitWritable() error { return s.raw.Write(s.writeReady) }

// abort closes the connection so that the peer sees RST, not FIN: what was cut
// off must not look finished.
func (s *socket) abort() {
	_ = s.conn.SetLinger(0)
	_ = s.conn.Close()
}

// disconnect ends the connection here and now: connect(2) to AF_UNSPEC. Every
// subflow tells the peer by RST, once, if it can.
func (s *socket) disconnect() {
	_ = s.raw.Control(func(fd uintptr) {
		unspecified := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		_, _, _ = unix.Syscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified))
	})
}
