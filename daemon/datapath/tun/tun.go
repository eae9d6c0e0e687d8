// Package tun is the TUN device of either end: IP packets that the kernel
// routes into it are received here, and packets written here arrive in the
// kernel as if from a wire.
//
//	kernel ─ queue ─▶ read (one goroutine each) ─▶ split (GSO) ─▶ receive(queue, packets)
//	Write(packets) ─▶ by flow to a queue ─▶ copy behind a virtio header ─▶ merge (GRO) ─▶ kernel
//
// The device has one wireguard/tun for each queue, which does the offloads. It
// lives as long as the process that opened it. Its addresses, MTU and state are
// not set here.
package tun

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	wireguard "golang.zx2c4.com/wireguard/tun"
)

const (
	// MaxQueues is how many queues a device may have; more than cores are of no use.
	MaxQueues = 16

	node = "/dev/net/tun"
	// batch is how many packets are taken from, or given to, wireguard/tun at
	// once; it is the IdealBatchSize of its package conn, beyond which its tables
	// do not reach.
	batch = 128
	// smallBatch is how many package device of WireGuard takes.
	smallBatch = 32
	// writeBatch is how many are written at once.
	writeBatch = 64
	// readRoom is for one packet that is read, or one segment of it: more than any
	// that our MTU lets through, because that may be changed from outside. Longer
	// ones are dropped and counted. writeRoom is also for those of a flow that are
	// merged with it, a dozen of 1400 bytes. The collector counts both as heap
	// whether or not they are touched, so more would cost its share of memory.
	readRoom  = 4 << 10
	writeRoom = 16 << 10
	// headroom holds the virtio_net_hdr (include/uapi/linux/virtio_net.h, 10
	// bytes) that goes before each packet.
	headroom = 16
	// readRetry is the pause after a read that failed for no known reason.
	readRetry = 10 * time.Millisecond
)

var (
	// ErrGone says that the device was deleted by somebody else: close it and
	// open another.
	ErrGone = errors.New("the TUN device was deleted from outside")
	// ErrClosed says that Close was called.
	ErrClosed = errors.New("the TUN device is closed")
)

// Device is one TUN interface. It is safe for concurrent use.
type Device struct {
	name   string
	index  int
	queues []*queue
	closed atomic.Bool

	received, written           atomic.Uint64
	receiveDropped, sendDropped atomic.Uint64
}

// queue is one file of the device.
type queue struct {
	device wireguard.Device

	mu      sync.Mutex // serialises writes
	buffers [][]byte   // what is written, copied; room for what is merged behind it
	writing [][]byte
}

// Counters are what has passed since Open, in packets.
type Counters struct {
	Received uint64 // from the kernel
	Written  uint64 // to the kernel
	// ReceiveDropped were taken from the kernel but could not be split.
	ReceiveDropped uint64
	// WriteDropped were refused by the kernel, because the interface was down or
	// they were no IP packets. Packets merged into one count once.
	WriteDropped uint64
}

// Open makes the interface, which is down and without addresses. It does not
// take over one that exists. The error says what is missing.
func Open(name string, queues int) (*Device, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if queues < 1 || queues > MaxQueues {
		return nil, fmt.Errorf("TUN device %s: %d queues, want 1 to %d", name, queues, MaxQueues)
	}
	d := &Device{name: name}
	for i := range queues {
		q, err := openQueue(name, i == 0)
		if err != nil {
			_ = d.Close()
			return nil, fmt.Errorf("making the TUN device %s: %w", name, explain(err))
		}
		d.queues = append(d.queues, q)
	}
	var err error
	if d.index, err = setUp(name, batch); err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

// setUp makes the kernel do what a batch has no room for: a segmented packet of
// more segments could not be split. That is rare (TCP with a tiny MSS).
func setUp(name string, batch int) (index int, err error) {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetGSOMaxSegs(link, batch)
	}
	if err != nil {
		return 0, fmt.Errorf("setting up the TUN device %s: %w", name, err)
	}
	return link.Attrs().Index, nil
}

// OpenWireGuard is Open for a device of one queue that package device of
// WireGuard's Go implementation is to serve. It gives also the interface's index.
func OpenWireGuard(name string) (wireguard.Device, int, error) {
	if err := checkName(name); err != nil {
		return nil, 0, err
	}
	q, err := openQueue(name, true)
	if err != nil {
		return nil, 0, fmt.Errorf("making the TUN device %s: %w", name, explain(err))
	}
	index, err := setUp(name, smallBatch)
	if err != nil {
		_ = q.device.Close()
		return nil, 0, err
	}
	return inBatches{q.device}, index, nil
}

// inBatches are small ones: package device takes 128 kB of memory for each packet
// of a batch.
type inBatches struct{ wireguard.Device }

func (inBatches) BatchSize() int { return smallBatch }

// checkName refuses what the kernel does (dev_valid_name in net/core/dev.c),
// and the % by which it would choose a name of its own.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) >= unix.IFNAMSIZ || strings.ContainsAny(name, "%/: \t\n\v\f\r\x00") {
		return fmt.Errorf("%q is no name for a TUN device: want 1 to %d characters, without blanks, colons, slashes and %% signs", name, unix.IFNAMSIZ-1)
	}
	return nil
}

func openQueue(name string, first bool) (*queue, error) {
	fd, err := unix.Open(node, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: node, Err: err}
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE)
	if first {
		// Without this another program's device would be joined, as one more queue.
		flags |= unix.IFF_TUN_EXCL
	}
	request.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("TUNSETIFF", err)
	}
	// From here on an os.File owns fd, also after an error.
	device, _, err := wireguard.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		return nil, err
	}
	return &queue{device: device, buffers: makeBuffers(writeBatch, writeRoom), writing: make([][]byte, 0, writeBatch)}, nil
}

func makeBuffers(n, room int) [][]byte {
	size := headroom + room
	arena := make([]byte, n*size)
	buffers := make([][]byte, n)
	for i := range buffers {
		buffers[i] = arena[i*size : (i+1)*size : (i+1)*size]
	}
	return buffers
}

// explain adds what to do to the errors that have a usual cause.
func explain(err error) error {
	var hint string
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		hint = "the kernel has no TUN driver loaded: try `modprobe tun` (CONFIG_TUN); in a container, pass the device " + node + " in"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		hint = "this needs CAP_NET_ADMIN, and read and write permission on " + node
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EEXIST):
		hint = "an interface of that name exists already, of another program or left over: see `ip -d link`, and stop its owner or delete it"
	default:
		return err
	}
	return fmt.Errorf("%w: %s", err, hint)
}

// Name is the interface's name as it was opened.
func (d *Device) Name() string { return d.name }

// Index is the interface's index.
func (d *Device) Index() int { return d.index }

// Counters returns what has passed so far.
func (d *Device) Counters() Counters {
	return Counters{
		Received: d.received.Load(), Written: d.written.Load(),
		ReceiveDropped: d.receiveDropped.Load(), WriteDropped: d.sendDropped.Load(),
	}
}

// Run calls receive with the packets that the kernel routes into the device,
// each queue from a goroutine of its own, until ctx ends or Close is called,
// which return nil, or the device is deleted from outside, which returns
// ErrGone. It is called once.
//
// A flow's packets come by one queue and in order. They are whole IP packets
// with complete checksums, and none is for the link alone. They may be changed,
// and are overwritten when receive has returned.
func (d *Device) Run(ctx context.Context, receive func(queue int, packets [][]byte)) error {
	// A deadline in the past is what ends a blocked read without closing.
	wake := func() {
		for _, q := range d.queues {
			_ = q.device.File().SetReadDeadline(time.Unix(1, 0))
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, wake)()
	var readers sync.WaitGroup
	for i, q := range d.queues {
		readers.Go(func() {
			cancel(d.read(ctx, q, func(packets [][]byte) { receive(i, packets) }))
		})
	}
	readers.Wait()
	if errors.Is(context.Cause(ctx), ErrGone) {
		return ErrGone
	}
	return nil
}

func (d *Device) read(ctx context.Context, q *queue, receive func([][]byte)) error {
	buffers, sizes, packets := makeBuffers(batch, readRoom), make([]int, batch), make([][]byte, 0, batch)
	for {
		n, err := q.device.Read(buffers, sizes, headroom)
		packets = packets[:0]
		for i := range n {
			if p := buffers[i][headroom : headroom+sizes[i]]; len(p) > 0 && !isLinkLocal(p) {
				packets = append(packets, p)
			}
		}
		if len(packets) > 0 {
			d.received.Add(uint64(len(packets)))
			receive(packets)
		}
		ended := ctx.Err() != nil || d.closed.Load()
		switch {
		case err == nil:
		case ended:
			return nil
		case q.gone(err):
			return ErrGone
		case errors.As(err, new(syscall.Errno)): // of the read, not of the packet
			time.Sleep(readRetry)
		default:
			d.receiveDropped.Add(1)
		}
	}
}

// isLinkLocal tells packets that are for the link alone, which ends here: the
// kernel announces the interface's multicast groups there, for example (MLD, RFC
// 3810). Nobody forwards them (RFC 4291 section 2.5.6, RFC 3927 section 7, RFC
// 5771 section 4).
func isLinkLocal(p []byte) bool {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		return p[12] == 169 && p[13] == 254 || p[16] == 169 && p[17] == 254 || p[16] == 224 && p[17] == 0 && p[18] == 0
	case len(p) >= 40 && p[0]>>4 == 6:
		unicast := func(a []byte) bool { return a[0] == 0xfe && a[1]&0xc0 == 0x80 }
		const linkScope = 2
		return unicast(p[8:]) || unicast(p[24:]) || p[24] == 0xff && p[25]&0x0f <= linkScope
	}
	return false
}

// gone tells whether an error of the queue came of the device's deletion. The
// kernel answers EBADFD to everything on a file that has lost its device
// (drivers/net/tun.c), which wireguard/tun turns into os.ErrClosed; a read that
// was under way may end otherwise.
func (q *queue) gone(err error) bool {
	if errors.Is(err, os.ErrClosed) {
		return true
	}
	raw, err := q.device.File().SyscallConn()
	if err != nil {
		return true
	}
	if e := raw.Control(func(fd uintptr) {
		var request *unix.Ifreq
		if request, err = unix.NewIfreq(""); err == nil {
			err = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, request)
		}
	}); e != nil {
		return true
	}
	return errors.Is(err, unix.EBADFD)
}

// Write gives IP packets to the kernel. Those of one flow stay in order; where
// several of one flow follow one another they are merged, which saves most of
// the kernel's work on them. What the kernel does not take, because the
// interface is down or it is no IP packet, is dropped and counted. The error is
// ErrGone or ErrClosed.
//
// Packets are copied. That takes 75 ns of 1300 bytes, beside 1.0 µs (merged) to
// 2.8 µs in the kernel (BenchmarkCopy, BenchmarkWrite), and spares the caller
// headroom before each packet and room behind it.
func (d *Device) Write(packets [][]byte) error {
	for len(packets) > 0 {
		n := min(len(packets), writeBatch)
		if err := d.writeSome(packets[:n]); err != nil {
			return err
		}
		packets = packets[n:]
	}
	return nil
}

// writeSome writes up to writeBatch packets. Always the same queue for a flow:
// the kernel sends a flow's answers to the queue that wrote it last
// (tun_flow_update), and they would overtake one another if that changed.
func (d *Device) writeSome(packets [][]byte) error {
	var to [writeBatch]uint8
	var used [MaxQueues]bool
	for i, p := range packets {
		if len(d.queues) > 1 {
			to[i] = uint8(flowHash(p) % uint32(len(d.queues)))
		}
		used[to[i]] = true
	}
	for i, q := range d.queues {
		if !used[i] {
			continue
		}
		if err := d.writeQueue(q, uint8(i), packets, to[:]); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) writeQueue(q *queue, index uint8, packets [][]byte, to []uint8) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.writing = q.writing[:0]
	dropped := 0
	for i, p := range packets {
		if to[i] != index {
			continue
		}
		if len(p) == 0 || len(p) > writeRoom {
			dropped++
			continue
		}
		b := q.buffers[len(q.writing)]
		q.writing = append(q.writing, b[:headroom+copy(b[headroom:], p)])
	}
	want := len(q.writing)
	var err error
	if want > 0 {
		_, err = q.device.Write(q.writing, headroom)
	}
	if err != nil {
		if d.closed.Load() {
			return ErrClosed
		}
		if q.gone(err) {
			return ErrGone
		}
		failed := min(countErrors(err), want)
		dropped, want = dropped+failed, want-failed
	}
	d.sendDropped.Add(uint64(dropped))
	d.written.Add(uint64(want))
	return nil
}

// countErrors counts what errors.Join has joined.
func countErrors(err error) int {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return 1
	}
	n := 0
	for _, e := range joined.Unwrap() {
		n += countErrors(e)
	}
	return n
}

// flowHash is the same for all packets of a flow: addresses, protocol and the
// ports of TCP and UDP. Fragments have no ports, nor IPv6 packets with
// extension headers.
func flowHash(p []byte) uint32 {
	var addresses, ports []byte
	var protocol byte
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		addresses, protocol = p[12:20], p[9]
		header := int(p[0]&0x0f) * 4
		fragment := p[6]&0x3f != 0 || p[7] != 0 // MF, or an offset
		if hasPorts(protocol) && !fragment && header >= 20 && len(p) >= header+4 {
			ports = p[header : header+4]
		}
	case len(p) >= 40 && p[0]>>4 == 6:
		addresses, protocol = p[8:40], p[6]
		if hasPorts(protocol) && len(p) >= 44 {
			ports = p[40:44]
		}
	}
	// FNV-1a, of which the high bits are the better ones.
	h := uint32(2166136261)
	for _, b := range addresses {
		h = (h ^ uint32(b)) * 16777619
	}
	for _, b := range ports {
		h = (h ^ uint32(b)) * 16777619
	}
	h = (h ^ uint32(protocol)) * 16777619
	return h ^ h>>16
}

func hasPorts(protocol byte) bool {
	return protocol == unix.IPPROTO_TCP || protocol == unix.IPPROTO_UDP
}

// Close deletes the interface, ends Run and lets later writes fail.
func (d *Device) Close() error {
	if d.closed.Swap(true) {
		return nil
	}
	var errs []error
	for _, q := range d.queues {
		errs = append(errs, q.device.Close())
	}
	return errors.Join(errs...)
}
