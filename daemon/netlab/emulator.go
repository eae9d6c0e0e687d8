package netlab

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The emulator moves frames between the two TAP devices of every shaped
// uplink of a lab, on one thread.
//
// The path of a frame:
//
//  1. receive reads it, as soon as the emulator looks: no queue in the device.
//  2. queue decides, and dates it.
//  3. It waits in its line, in a buffer of the pool.
//  4. deliver writes it when its time has come,
//  5. and the buffer goes back to the pool.
//
// In between the emulator sleeps. While frames arrive it looks every interval,
// which is cheaper than being woken by each; else it sleeps until a frame
// arrives or one is due.
type emulator struct {
	epoch time.Time
	wake  int        // eventfd: look again, something was changed
	ended chan error // nil until start

	mu      sync.Mutex // everything below; the thread holds it except when asleep
	closed  bool
	lines   []*line
	buffers [][]byte // free
}

// A line is one direction of a shaped uplink.
type line struct {
	queue
	from, to int // TAP devices

	waiting []frame // in order of delivery, a ring
	first   int
	count   int
	looked  time.Duration // when from was last known to be empty
	gone    bool          // somebody has removed the device
}

type frame struct {
	due    time.Duration
	buffer []byte // as long as the frame
}

const (
	interval   = 100 * time.Microsecond // between looks while frames arrive, and so the precision
	bufferSize = 2048                   // a frame of MTU 1500 with its header, and to spare
	maxFrames  = 1 << 15                // under way in one direction: 500 Mbit/s over 800 ms
	maxBatch   = 1 << 10                // taken from one device in one look
)

func newEmulator() (*emulator, error) {
	wake, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("netlab: emulator: eventfd: %w", err)
	}
	return &emulator{epoch: time.Now(), wake: wake}, nil
}

// connect makes the line from one TAP device to another. Only before start.
func (e *emulator) connect(from, to int, q queue) *line {
	l := &line{queue: q, from: from, to: to, waiting: make([]frame, 256)}
	e.lines = append(e.lines, l)
	return l
}

// change runs f while the emulator holds still, and makes it look again.
func (e *emulator) change(f func()) {
	e.mu.Lock()
	f()
	e.mu.Unlock()
	e.wakeUp()
}

func (e *emulator) wakeUp() {
	// The only failure is EAGAIN, of a counter that is full: then it wakes up anyway.
	_, _ = unix.Write(e.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// close ends the thread and waits for it. The devices are the caller's.
func (e *emulator) close() error {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	var err error
	if e.ended != nil {
		e.wakeUp()
		err = <-e.ended
	}
	return errors.Join(err, unix.Close(e.wake))
}

func (e *emulator) start() {
	ended := make(chan error, 1)
	e.ended = ended
	go func() {
		runtime.LockOSThread() // for its priority; the thread ends with this
		ended <- e.loop()
	}()
}

func (e *emulator) loop() error {
	// The wire does not wait for the machines on it, so this thread goes
	// before all ordinary ones. It also sleeps as exactly as the kernel can.
	priority := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 1, Flags: unix.SCHED_FLAG_RESET_ON_FORK}
	if err := unix.SchedSetAttr(0, &priority, 0); err != nil {
		return fmt.Errorf("netlab: emulator: set the real-time priority: %w (needs CAP_SYS_NICE)", err)
	}
	poll := []unix.PollFd{{Fd: int32(e.wake), Events: unix.POLLIN}}
	for _, l := range e.lines {
		poll = append(poll, unix.PollFd{Fd: int32(l.from), Events: unix.POLLIN})
	}
	for {
		e.mu.Lock()
		if e.closed {
			e.mu.Unlock()
			return nil
		}
		received := 0
		due := time.Duration(math.MaxInt64)
		for i, l := range e.lines {
			n, err := e.receive(l)
			if err != nil {
				e.mu.Unlock()
				return err
			}
			received += n
			if l.gone {
				poll[i+1].Fd = -1 // or it would report that without end
			}
		}
		now := time.Since(e.epoch)
		for _, l := range e.lines {
			next, err := e.deliver(l, now)
			if err != nil {
				e.mu.Unlock()
				return err
			}
			due = min(due, next)
		}
		e.mu.Unlock()

		watched := poll
		var sleep *unix.Timespec // forever
		if received > 0 {
			watched = nil
			due = min(due, now+interval)
		}
		if due != math.MaxInt64 {
			// Not less than half the interval: frames due together go together.
			pause := unix.NsecToTimespec(int64(max(due-time.Since(e.epoch), interval/2)))
			sleep = &pause
		}
		n, err := unix.Ppoll(watched, sleep, nil)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("netlab: emulator: ppoll: %w", err)
		}
		if watched == nil {
			continue
		}
		woken := time.Since(e.epoch)
		for _, l := range e.lines {
			l.looked = woken // a frame would have ended the sleep
		}
		if n > 0 && poll[0].Revents != 0 {
			var counter [8]byte
			_, _ = unix.Read(e.wake, counter[:]) // empties it; nothing there is fine too
		}
	}
}

// receive takes the frames out of the sending device.
func (e *emulator) receive(l *line) (int, error) {
	for n := range maxBatch {
		buffer := e.buffer()
		size, errno := rawRead(l.from, buffer)
		if errno != 0 {
			e.release(buffer)
			switch errno {
			case unix.EAGAIN: // empty
				l.looked = time.Since(e.epoch)
				return n, nil
			case unix.EBADFD:
				l.gone = true
				return n, nil
			}
			return n, fmt.Errorf("netlab: emulator: read a frame: %w", errno)
		}
		if !l.passes(buffer[:size]) {
			e.release(buffer)
			continue
		}
		due, v := l.offer(l.looked, time.Since(e.epoch), size)
		if v != admit {
			e.release(buffer)
			continue
		}
		if l.count == maxFrames {
			l.counters.BufferFull++
			e.release(buffer)
			continue
		}
		l.push(frame{due, buffer[:size]})
	}
	return maxBatch, nil
}

// deliver writes the frames that are due, and returns when the next one is.
func (e *emulator) deliver(l *line, now time.Duration) (time.Duration, error) {
	for l.count > 0 {
		f := l.waiting[l.first]
		if f.due > now {
			return f.due, nil
		}
		l.pop()
		errno := rawWrite(l.to, f.buffer)
		switch errno {
		case 0:
			l.counters.Frames++
			l.counters.Bytes += uint64(len(f.buffer))
			l.counters.WorstLate = max(l.counters.WorstLate, now-f.due)
		case unix.EIO, unix.EBADFD: // the device is down, or gone
			l.counters.LinkDown++
		default:
			return 0, fmt.Errorf("netlab: emulator: write a frame of %d bytes: %w", len(f.buffer), errno)
		}
		e.release(f.buffer)
	}
	return math.MaxInt64, nil
}

// drain throws away all that is under way.
func (e *emulator) drain(l *line) (dropped uint64) {
	for ; l.count > 0; dropped++ {
		e.release(l.waiting[l.first].buffer)
		l.pop()
	}
	l.reset()
	return dropped
}

func (l *line) push(f frame) {
	if l.count == len(l.waiting) {
		larger := make([]frame, 2*l.count)
		n := copy(larger, l.waiting[l.first:])
		copy(larger[n:], l.waiting[:l.first])
		l.waiting, l.first = larger, 0
	}
	l.waiting[(l.first+l.count)%len(l.waiting)] = f
	l.count++
}

func (l *line) pop() {
	l.waiting[l.first].buffer = nil
	l.first = (l.first + 1) % len(l.waiting)
	l.count--
}

func (e *emulator) buffer() []byte {
	if len(e.buffers) == 0 {
		slab := make([]byte, 64*bufferSize)
		for i := 0; i < len(slab); i += bufferSize {
			e.buffers = append(e.buffers, slab[i:i+bufferSize:i+bufferSize])
		}
	}
	b := e.buffers[len(e.buffers)-1]
	e.buffers = e.buffers[:len(e.buffers)-1]
	return b
}

func (e *emulator) release(b []byte) {
	e.buffers = append(e.buffers, b[:bufferSize])
}
