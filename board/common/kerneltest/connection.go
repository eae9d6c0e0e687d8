// Byte's path: from ─▶ MPTCP socket ─▶ subflows over wan1 and wan2 ─▶ to

package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of SOL_MPTCP (include/uapi/linux/mptcp.h). The last two are of our patches.
const (
	solMPTCP       = 284
	optFullInfo    = 4
	optScheduler   = 128
	optSubflowRank = 129
)

// A connection is one MPTCP connection over both links.
type connection struct {
	near, far *net.TCPConn
}

// open opens a connection and returns when its second subflow is there,
// which needs a byte acknowledged.
func (l *lab) open() (*connection, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c := &connection{}
	var listener net.Listener
	err := in(l.far, func() (err error) {
		var config net.ListenConfig
		config.SetMultipathTCP(true)
		listener, err = config.Listen(ctx, "tcp4", farAddress+":1")
		return err
	})
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	err = in(l.near, func() error {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(nearAddress(1))}}
		dialer.SetMultipathTCP(true)
		conn, err := dialer.DialContext(ctx, "tcp4", listener.Addr().String())
		if err != nil {
			return err
		}
		c.near = conn.(*net.TCPConn)
		return nil
	})
	if err != nil {
		return nil, err
	}
	conn, err := listener.Accept()
	if err != nil {
		c.close()
		return nil, err
	}
	c.far = conn.(*net.TCPConn)
	if err := c.join(ctx); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *connection) join(ctx context.Context) error {
	for _, pair := range [][2]*net.TCPConn{{c.near, c.far}, {c.far, c.near}} {
		if _, err := pair[0].Write([]byte{1}); err != nil {
			return err
		}
		if _, err := io.ReadFull(pair[1], make([]byte, 1)); err != nil {
			return err
		}
	}
	for _, end := range []*net.TCPConn{c.near, c.far} {
		for {
			subflows, err := subflowsOf(end)
			if err != nil {
				return err
			}
			if len(subflows) == 2 && subflows[0].state == tcpEstablished && subflows[1].state == tcpEstablished {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("a connection has %d subflows and not two: %w", len(subflows), ctx.Err())
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	time.Sleep(200 * time.Millisecond) // until the last acknowledgements are through, and both paths validated
	return nil
}

func (c *connection) close() {
	for _, end := range []*net.TCPConn{c.near, c.far} {
		if end != nil {
			_ = end.SetLinger(0)
			_ = end.Close()
		}
	}
}

// A subflow is what the kernel tells of one.
type subflow struct {
	id    uint32
	state uint8
	acked uint64 // bytes of payload sent and acknowledged
}

const tcpEstablished = 1 // include/net/tcp_states.h

// fullInfo is struct mptcp_full_info.
type fullInfo struct {
	tcpInfoKernel, tcpInfoUser uint32
	subflowKernel, subflowUser uint32
	subflows, room             uint32
	subflowInfo, tcpInfo       unsafe.Pointer
	connection                 [256]byte // struct mptcp_info, or the beginning of a longer one
}

// subflowsOf lists the subflows of one end of a connection, in the order of
// their ids: the initial one, over the first link, has the lowest. Of struct
// mptcp_subflow_info only the id is read, of struct tcp_info what comes before
// tcpi_segs_out: the kernel writes as much as the sizes say.
func subflowsOf(end *net.TCPConn) ([]subflow, error) {
	const room = 8
	const stride = unsafe.Offsetof(unix.TCPInfo{}.Segs_out)
	ids, tcp := make([]uint32, room), make([]byte, room*stride)
	info := &fullInfo{tcpInfoUser: uint32(stride), subflowUser: 4, room: room, subflowInfo: unsafe.Pointer(&ids[0]), tcpInfo: unsafe.Pointer(&tcp[0])}
	var pinner runtime.Pinner
	defer pinner.Unpin()
	pinner.Pin(info.subflowInfo)
	pinner.Pin(info.tcpInfo)
	size := uint32(unsafe.Sizeof(*info))
	err := control(end, func(fd int) error {
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), solMPTCP, optFullInfo, uintptr(unsafe.Pointer(info)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			return fmt.Errorf("read MPTCP_FULL_INFO: %w", errno)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var list []subflow
	for i := range min(info.subflows, room) {
		one := tcp[uintptr(i)*stride:]
		list = append(list, subflow{
			id:    ids[i],
			state: one[unsafe.Offsetof(unix.TCPInfo{}.State)],
			acked: binary.NativeEndian.Uint64(one[unsafe.Offsetof(unix.TCPInfo{}.Bytes_acked):]),
		})
	}
	slices.SortFunc(list, func(a, b subflow) int { return cmp.Compare(a.id, b.id) })
	return list, nil
}

// A subflowRank is struct mptcp_subflow_rank.
type subflowRank struct {
	id                 uint32
	weight, preference uint16
}

// rank gives the subflow over a link, 0 or 1, a weight and a preference.
func rank(end *net.TCPConn, link int, weight, preference uint16) error {
	subflows, err := subflowsOf(end)
	if err != nil {
		return err
	}
	return setRank(end, subflowRank{subflows[link].id, weight, preference})
}

func setRank(end *net.TCPConn, r subflowRank) error {
	value := binary.NativeEndian.AppendUint32(nil, r.id)
	value = binary.NativeEndian.AppendUint16(value, r.weight)
	return setOption(end, optSubflowRank, binary.NativeEndian.AppendUint16(value, r.preference))
}

func ranksOf(end *net.TCPConn) ([]subflowRank, error) {
	value, err := option(end, optSubflowRank)
	if err != nil {
		return nil, err
	}
	var ranks []subflowRank
	for ; len(value) >= 8; value = value[8:] {
		ranks = append(ranks, subflowRank{binary.NativeEndian.Uint32(value), binary.NativeEndian.Uint16(value[4:]), binary.NativeEndian.Uint16(value[6:])})
	}
	slices.SortFunc(ranks, func(a, b subflowRank) int { return cmp.Compare(a.id, b.id) })
	return ranks, nil
}

func setScheduler(end *net.TCPConn, name string) error {
	return setOption(end, optScheduler, []byte(name))
}

func schedulerOf(end *net.TCPConn) (string, error) {
	value, err := option(end, optScheduler)
	return strings.TrimRight(string(value), "\x00"), err
}

func setOption(end *net.TCPConn, name int, value []byte) error {
	return control(end, func(fd int) error { return unix.SetsockoptString(fd, solMPTCP, name, string(value)) })
}

func option(end *net.TCPConn, name int) (value []byte, err error) {
	err = control(end, func(fd int) error {
		buffer := make([]byte, 128)
		size := uint32(len(buffer))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), solMPTCP, uintptr(name), uintptr(unsafe.Pointer(&buffer[0])), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			return fmt.Errorf("read option %d of SOL_MPTCP: %w", name, errno)
		}
		value = buffer[:size]
		return nil
	})
	return value, err
}

func control(end *net.TCPConn, f func(fd int) error) error {
	raw, err := end.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	return errors.Join(raw.Control(func(fd uintptr) { result = f(int(fd)) }), result)
}

// A transfer is what came of one.
type transfer struct {
	bytes    int
	duration time.Duration
	gap      time.Duration // the longest between two reads, after the first
	carried  [2]uint64     // payload that the first and the second subflow sent and had acknowledged, copies included
}

// share is the part of all carried bytes that the first subflow carried.
func (t transfer) share() float64 {
	return float64(t.carried[0]) / float64(t.carried[0]+t.carried[1])
}

func (t transfer) String() string {
	return fmt.Sprintf("%d kB in %d ms (%.1f Mbit/s), longest gap %d ms; first link %d kB, second %d kB (%.1f %% : %.1f %%)",
		t.bytes/1000, t.duration.Milliseconds(), float64(t.bytes)*8/t.duration.Seconds()/1e6, t.gap.Milliseconds(),
		t.carried[0]/1000, t.carried[1]/1000, 100*t.share(), 100-100*t.share())
}

// send moves size bytes and checks each. With a rate, in bit/s, they are
// offered in chunks of a few milliseconds, else as fast as the socket takes them.
func send(from, to *net.TCPConn, size int, rate float64) (transfer, error) {
	before, err := subflowsOf(from)
	if err != nil {
		return transfer{}, err
	}
	deadline := time.Now().Add(60 * time.Second)
	if err := errors.Join(from.SetDeadline(deadline), to.SetDeadline(deadline)); err != nil {
		return transfer{}, err
	}
	sent := make(chan error, 1)
	start := time.Now()
	go func() { sent <- offer(from, size, rate) }()
	t := transfer{bytes: size}
	if err := t.receive(to, size); err != nil {
		return t, fmt.Errorf("%w; the sender: %w", err, <-sent)
	}
	t.duration = time.Since(start)
	if err := <-sent; err != nil {
		return t, err
	}
	time.Sleep(500 * time.Millisecond) // until what is still queued on the links is acknowledged
	after, err := subflowsOf(from)
	if err != nil {
		return t, err
	}
	if len(after) != 2 {
		return t, fmt.Errorf("of two subflows %d are left", len(after))
	}
	for i := range t.carried {
		t.carried[i] = after[i].acked - before[i].acked
	}
	return t, nil
}

// pattern is the byte at an offset of every transfer; its period is no power of
// two, so that data at a wrong place shows.
func pattern(offset int) byte { return byte(offset % 251) }

func offer(conn *net.TCPConn, size int, rate float64) error {
	chunk := make([]byte, 251*250)
	for i := range chunk {
		chunk[i] = pattern(i)
	}
	if rate == 0 {
		for left := size; left > 0; left -= len(chunk) {
			if _, err := conn.Write(chunk[:min(left, len(chunk))]); err != nil {
				return err
			}
		}
		return nil
	}
	start := time.Now()
	for done := 0; done < size; {
		due := min(size, int(time.Since(start).Seconds()*rate/8))
		if n := min(due-done, len(chunk)/2); n > 0 {
			if _, err := conn.Write(chunk[done%251 : done%251+n]); err != nil {
				return err
			}
			done += n
		}
		time.Sleep(2 * time.Millisecond)
	}
	return nil
}

func (t *transfer) receive(conn *net.TCPConn, size int) error {
	buffer := make([]byte, 64<<10)
	var last time.Time
	for done := 0; done < size; {
		n, err := conn.Read(buffer)
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", done, size, err)
		}
		now := time.Now()
		if !last.IsZero() {
			t.gap = max(t.gap, now.Sub(last))
		}
		last = now
		for i, b := range buffer[:n] {
			if b != pattern(done+i) {
				return fmt.Errorf("byte %d is %#x and not %#x", done+i, b, pattern(done+i))
			}
		}
		done += n
	}
	return nil
}
