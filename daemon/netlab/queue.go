package netlab

import (
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

// A queue decides what becomes of each frame of one direction of an uplink,
// on paper only: it is told the time, and holds no frame.
//
// The path of a decision:
//
//  1. A black hole swallows the frame; passes refuses what is too large for the
//     uplink, and UDP where that is blocked, and takes MPTCP out where that is
//     stripped.
//  2. The line is busy until the frame before has been sent. If that lasts
//     longer than the queue is deep, the frame is dropped.
//  3. It leaves when the line has sent all of it: start + size/rate.
//  4. It may be lost on the way, having cost the line its time.
//  5. It arrives one propagation delay later, never before its predecessor.
//
// Times count from any fixed moment on a monotonic clock.
type queue struct {
	shape     Shape
	blackHole bool
	blockUDP  bool
	strip     bool // options of MPTCP
	mtu       int  // of the uplink, 0 if no smaller than the interface's
	random    *rand.Rand
	counters  Counters

	departed  time.Duration // when the line has sent the last admitted frame
	delivered time.Duration // when the last admitted frame arrives
}

// A Shape describes one direction of an uplink.
type Shape struct {
	// Rate in bits per second, of whole Ethernet frames: 14 bytes of header
	// and the IP packet. 0 is unlimited. TCP with timestamps carries 1448
	// bytes in a frame of 1514, so at most 95.64 % of the rate.
	Rate float64
	// Delay is the propagation delay, one way.
	Delay time.Duration
	// Queue is how long a frame may wait for the line before it is dropped;
	// 0 means DefaultQueue.
	Queue time.Duration
	// Loss is the probability, 0 to 1, that a frame is lost on the line.
	Loss float64
}

// DefaultQueue is the depth of a queue whose Shape names none.
const DefaultQueue = 100 * time.Millisecond

// Counters tell what became of the frames of one direction since New.
type Counters struct {
	Frames, Bytes uint64 // delivered; bytes of whole Ethernet frames

	Lost       uint64        // by Shape.Loss
	QueueFull  uint64        // waited for the line longer than Shape.Queue
	BlackHoled uint64        // by Uplink.BlackHole
	UDPBlocked uint64        // by Uplink.BlockUDP
	Stripped   uint64        // delivered without the options of MPTCP that they had, by Uplink.StripMPTCP
	TooLarge   uint64        // for Uplink.SetMTU
	LinkDown   uint64        // the receiving interface was down
	BufferFull uint64        // more than maxFrames under way: the Shape is beyond the emulator
	WorstLate  time.Duration // longest delay of a delivery beyond its time, a measure of this machine's load
}

type verdict int

const (
	admit verdict = iota
	lost
	queueFull
	blackHoled
)

func newQueue(shape Shape, seed, stream uint64) queue {
	return queue{shape: shape, random: rand.New(rand.NewPCG(seed, stream))}
}

// passes decides on what a frame is, before offer decides on its time.
func (q *queue) passes(frame []byte) bool {
	const header = 14 // of Ethernet
	if q.mtu > 0 && len(frame) > header+q.mtu {
		q.counters.TooLarge++
		return false
	}
	if q.blockUDP && len(frame) > header {
		// Anything but IP is not a packet, or not one of UDP.
		if p, ok := ParsePacket(frame[header:]); ok && p.Protocol == unix.IPPROTO_UDP {
			q.counters.UDPBlocked++
			return false
		}
	}
	if q.strip && len(frame) > header && stripMPTCP(frame[header:]) {
		q.counters.Stripped++
	}
	return true
}

// offer decides on a frame of size bytes that is in hand now. It came after
// the moment arrivedAfter, which is earlier than now when the caller has been
// looking late: the line was free to send it meanwhile, so the caller's delay
// costs no capacity. If the verdict is admit, the frame is to be delivered at
// the time returned.
func (q *queue) offer(arrivedAfter, now time.Duration, size int) (time.Duration, verdict) {
	if q.blackHole {
		q.counters.BlackHoled++
		return 0, blackHoled
	}
	depth := q.shape.Queue
	if depth == 0 {
		depth = DefaultQueue
	}
	start := max(arrivedAfter, q.departed)
	if start-now > depth {
		q.counters.QueueFull++
		return 0, queueFull
	}
	q.departed = start
	if q.shape.Rate > 0 {
		q.departed += time.Duration(float64(size) * 8e9 / q.shape.Rate)
	}
	if q.shape.Loss > 0 && q.random.Float64() < q.shape.Loss {
		q.counters.Lost++
		return 0, lost
	}
	q.delivered = max(q.delivered, max(now, q.departed)+q.shape.Delay)
	return q.delivered, admit
}

// reset forgets the frames under way.
func (q *queue) reset() {
	q.departed, q.delivered = 0, 0
}
