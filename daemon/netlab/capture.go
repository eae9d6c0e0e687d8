package netlab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A Capture sees every frame that an interface sends or receives.
//
// The path of a frame:
//
//  1. The kernel puts a copy into the packet socket, whose buffer is large.
//  2. read parses its beginning, and asks the caller's predicate.
//  3. Matches are counted, and the first of them kept.
//  4. Stop lets no more in, reads what the socket still holds, and asks the kernel whether
//     anything did not fit: a capture that lost a frame proves nothing, so
//     that is an error.
type Capture struct {
	device string
	match  func(Frame) bool
	socket *os.File
	ended  chan struct{}
	result CaptureResult
	err    error // valid after ended
}

// A Frame is one that a Capture has seen.
type Frame struct {
	At        time.Time
	Outgoing  bool   // sent by the interface; false: received
	EtherType uint16 // 0x0800 IPv4, 0x86DD IPv6, 0x0806 ARP …
	Size      int    // bytes after the link-layer header
	Packet           // zero if the frame carries no IP
	// Data is what follows the link-layer header, at most 256 bytes. In a
	// predicate it is valid until that returns.
	Data []byte
}

// CaptureResult is what a Capture has seen between its start and Stop.
type CaptureResult struct {
	Frames  uint64 // all
	Matched uint64
	First   []Frame // at most 1000 of those that matched
}

const (
	snapLength    = 256
	captureKept   = 1000
	captureBuffer = 32 << 20 // bytes; the kernel doubles it for its own overhead
)

// Capture starts a capture on an interface of the Host, of any kind. match,
// which may be nil for everything, is called on a goroutine of the Capture's.
// The interface may go down and up meanwhile. Whoever starts a Capture must
// Stop it.
func (h *Host) Capture(device string, match func(Frame) bool) (*Capture, error) {
	c := &Capture{device: device, match: match, ended: make(chan struct{})}
	err := h.Do(func() error {
		link, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		// Without a protocol until it is bound: nothing from other interfaces.
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		c.socket = os.NewFile(uintptr(fd), "packet:"+device)
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer); err != nil {
			return os.NewSyscallError("setsockopt SO_RCVBUFFORCE", err)
		}
		return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: link.Index}))
	})
	if err != nil {
		if c.socket != nil {
			_ = c.socket.Close()
		}
		return nil, fmt.Errorf("netlab: capture on %s of host %s: %w", device, h.Name, err)
	}
	go c.read()
	return c, nil
}

// Stop ends the capture and returns what it has seen. The error tells if
// frames were lost because the machine was too slow.
func (c *Capture) Stop() (CaptureResult, error) {
	// A filter that takes nothing: else reading would not end under steady traffic.
	nothing := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	var failed error
	raw, err := c.socket.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			failed = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing})
		})
	}
	err = errors.Join(err, failed, c.socket.SetReadDeadline(time.Now()))
	<-c.ended
	if err := errors.Join(err, c.socket.Close()); err != nil {
		return c.result, errors.Join(c.err, fmt.Errorf("netlab: stop the capture on %s: %w", c.device, err))
	}
	return c.result, c.err
}

func (c *Capture) read() {
	defer close(c.ended)
	raw, err := c.socket.SyscallConn()
	if err != nil {
		c.err = fmt.Errorf("netlab: capture on %s: %w", c.device, err)
		return
	}
	var failed error
	take := func(fd uintptr) bool {
		failed = c.drain(int(fd))
		return failed != nil // else wait for more
	}
	err = raw.Read(take)
	if failed == nil && errors.Is(err, os.ErrDeadlineExceeded) { // Stop
		err = raw.Control(func(fd uintptr) {
			failed = c.drain(int(fd))
			statistics, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
			if err != nil {
				failed = errors.Join(failed, os.NewSyscallError("getsockopt PACKET_STATISTICS", err))
			} else if statistics.Drops > 0 {
				failed = errors.Join(failed, fmt.Errorf("the kernel dropped %d frames beside %d captured: the reader was too slow", statistics.Drops, c.result.Frames))
			}
		})
	}
	if err := errors.Join(failed, err); err != nil {
		c.err = fmt.Errorf("netlab: capture on %s: %w", c.device, err)
	}
}

// drain reads until the socket is empty.
func (c *Capture) drain(fd int) error {
	var buffer [snapLength]byte
	for {
		size, from, err := unix.Recvfrom(fd, buffer[:], unix.MSG_TRUNC|unix.MSG_DONTWAIT)
		switch err {
		case nil:
		case unix.EAGAIN:
			return nil
		case unix.EINTR, unix.ENETDOWN: // set down: the kernel goes on when it is up again
			continue
		default:
			return os.NewSyscallError("recvfrom", err)
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if !ok {
			continue
		}
		f := Frame{At: time.Now(), Outgoing: link.Pkttype == unix.PACKET_OUTGOING, EtherType: networkOrder(link.Protocol),
			Size: size, Data: buffer[:min(size, snapLength)]}
		if f.EtherType == unix.ETH_P_IP || f.EtherType == unix.ETH_P_IPV6 {
			f.Packet, _ = ParsePacket(f.Data)
		}
		c.result.Frames++
		if c.match != nil && !c.match(f) {
			continue
		}
		c.result.Matched++
		if len(c.result.First) < captureKept {
			f.Data = slices.Clone(f.Data)
			f.upper = nil
			c.result.First = append(c.result.First, f)
		}
	}
}

// networkOrder swaps the bytes of a protocol number on a little-endian
// machine, which all of ours are; and back.
func networkOrder(n uint16) uint16 { return n<<8 | n>>8 }
