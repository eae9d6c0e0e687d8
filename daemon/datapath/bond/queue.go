package bond

import (
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// The path of a packet: sender.enqueue ─▶ interactive or bulk ─▶ sender.next
// (too old? CoDel?) ─▶ sender.transmit (one message or two) ─▶ Carrier.Send.

const (
	// maxHeadroom is the room before each packet, for the message header when it
	// is sent and for Config.Headroom when it is delivered.
	maxHeadroom = 64

	maxBulkQueue        = 1 << 20 // bytes of each link
	maxInteractiveQueue = 256     // packets of each carrier
	maxControlQueue     = 8

	// carrierQueue is how many messages quic-go queues inside.
	carrierQueue = 32
	// firstRate is what a link is taken to carry until more is known, bytes per
	// second.
	firstRate = 10e6 / 8
	// leastRate keeps a link that was slow for a moment from being left for good.
	leastRate = 64e3 / 8
	// A rate is measured over rateWindow.
	rateWindow = 50 * time.Millisecond
)

// buffer holds one packet, from data[maxHeadroom] to data[end].
type buffer struct {
	next, previous *buffer // in the list that it is in
	at             time.Duration
	end            int
	sequence       uint32
	lane           uint8
	explicit       bool
	held           bool // in a lane, waiting for those before it
	data           [maxHeadroom + MaxPacket]byte
}

func (b *buffer) packet() []byte { return b.data[maxHeadroom:b.end] }
func (b *buffer) length() int    { return b.end - maxHeadroom }

var buffers = sync.Pool{New: func() any { return new(buffer) }}

func newBuffer(packet []byte) *buffer {
	b := buffers.Get().(*buffer)
	b.next, b.previous, b.held = nil, nil, false
	b.end = maxHeadroom + copy(b.data[maxHeadroom:], packet)
	return b
}

func (b *buffer) free() { buffers.Put(b) }

// list of buffers, linked through them.
type list struct {
	first, last *buffer
	count       int
	bytes       int
}

func (l *list) pushLast(b *buffer) {
	b.next, b.previous = nil, l.last
	if l.last == nil {
		l.first = b
	} else {
		l.last.next = b
	}
	l.last = b
	l.count++
	l.bytes += b.length()
}

func (l *list) pushFirst(b *buffer) {
	b.next, b.previous = l.first, nil
	if l.first == nil {
		l.last = b
	} else {
		l.first.previous = b
	}
	l.first = b
	l.count++
	l.bytes += b.length()
}

func (l *list) remove(b *buffer) {
	if b.previous == nil {
		l.first = b.next
	} else {
		b.previous.next = b.next
	}
	if b.next == nil {
		l.last = b.previous
	} else {
		b.next.previous = b.previous
	}
	b.next, b.previous = nil, nil
	l.count--
	l.bytes -= b.length()
}

func (l *list) popFirst() *buffer {
	b := l.first
	if b != nil {
		l.remove(b)
	}
	return b
}

// codel decides which packets of a queue are dropped at its head (RFC 8289,
// section 5).
type codel struct {
	target, interval time.Duration

	firstAbove      time.Duration // when the delay will have been above target for an interval, 0 if it is not
	dropNext        time.Duration
	count, previous uint32 // drops since dropping began, and the time before
	dropping        bool
}

// drop says whether to drop the packet that was taken from the queue at now,
// after waiting for sojourn and leaving queued bytes behind it.
func (c *codel) drop(sojourn, now time.Duration, queued int) bool {
	if sojourn < c.target || queued <= MaxPacket {
		c.firstAbove = 0
		c.dropping = false
		return false
	}
	if c.firstAbove == 0 {
		c.firstAbove = now + c.interval
		c.dropping = false
		return false
	}
	if now < c.firstAbove {
		c.dropping = false
		return false
	}
	if !c.dropping {
		c.dropping = true
		drops := c.count - c.previous
		c.count = 1
		if drops > 1 && now-c.dropNext < 16*c.interval {
			c.count = drops
		}
		c.previous = c.count
		c.dropNext = c.law(now)
		return true
	}
	if now < c.dropNext {
		return false
	}
	c.count++
	c.dropNext = c.law(c.dropNext)
	return true
}

func (c *codel) law(t time.Duration) time.Duration {
	return t + time.Duration(float64(c.interval)/math.Sqrt(float64(c.count)))
}

// meter learns the rate of a carrier from what is handed to it. How fast a
// carrier with room takes messages says little: only what it takes while it has
// none is its rate; but it carries no less than it takes for long.
type meter struct {
	rate float64 // bytes per second

	backlogged   int // messages in a row
	backlogStart time.Duration
	backlogBytes int
	takenStart   time.Duration
	taken        int
}

// idle says that nothing is left to send.
func (m *meter) idle() { m.backlogged = 0 }

// sent says that the carrier took a message.
func (m *meter) sent(length int, now time.Duration) {
	m.backlogged++
	switch {
	case m.backlogged < carrierQueue:
	case m.backlogged == carrierQueue:
		m.backlogStart, m.backlogBytes = now, 0
	default:
		m.backlogBytes += length
		if passed := now - m.backlogStart; passed >= rateWindow {
			if passed < time.Second { // else the way was interrupted
				m.rate += (float64(m.backlogBytes)/passed.Seconds() - m.rate) / 4
			}
			m.backlogStart, m.backlogBytes = now, 0
		}
	}
	m.taken += length
	if passed := now - m.takenStart; passed >= 2*rateWindow {
		if passed < 4*rateWindow { // else it was idle in between
			m.rate = max(m.rate, float64(m.taken-carrierQueue*MaxPacket)/passed.Seconds())
		}
		m.takenStart, m.taken = now, 0
	}
	m.rate = max(m.rate, leastRate)
}

// control is a probe, or a reply to the other end's.
type control struct {
	reply    bool
	padded   bool // to the longest message
	number   uint32
	time     time.Duration // of the probe: when it was made or when it arrived
	received uint32        // of a reply
}

// sender owns the queues of one carrier.
type sender struct {
	bond    *Bond
	link    *Link
	carrier Carrier

	// What the choice of links reads without the mutex.
	interactiveBytes, bulkBytes atomic.Int64
	rate                        atomic.Int64 // bytes per second
	dead                        atomic.Bool

	mutex             sync.Mutex
	filled            sync.Cond
	closed            bool
	controls          []control
	interactive, bulk list
	codel             codel
	meter             meter
}

func newSender(b *Bond, l *Link, carrier Carrier) *sender {
	s := &sender{
		bond: b, link: l, carrier: carrier,
		controls: make([]control, 0, maxControlQueue),
		codel:    codel{target: b.timing.CoDelTarget, interval: b.timing.CoDelInterval},
		meter:    meter{rate: firstRate},
	}
	s.rate.Store(firstRate)
	s.filled.L = &s.mutex
	return s
}

// wait is how long a packet of the class that came now would wait, behind more
// packets that are about to come.
func (s *sender) wait(class Class, more *list) time.Duration {
	queued := s.interactiveBytes.Load()
	if more != nil {
		queued += int64(more.bytes)
	}
	if class == Bulk {
		queued += s.bulkBytes.Load()
	}
	return time.Duration(float64(queued) / float64(max(s.rate.Load(), 1)) * float64(time.Second))
}

// enqueue takes packets over. With first they go before those that wait.
func (s *sender) enqueue(packets list, now time.Duration, first bool) {
	s.mutex.Lock()
	if s.closed {
		s.mutex.Unlock()
		s.bond.drops[dropNoLink].Add(uint64(packets.count))
		packets.free()
		return
	}
	for packets.count > 0 {
		b := packets.last
		if !first {
			b = packets.first
		}
		packets.remove(b)
		queue := &s.interactive
		if classOf(b.lane) == Bulk {
			queue = &s.bulk
		}
		if first {
			queue.pushFirst(b)
		} else {
			queue.pushLast(b)
		}
	}
	limit := maxBulkQueue / max(1, len(*s.link.senders.Load()))
	for s.interactive.first != nil && (s.interactive.count > maxInteractiveQueue || now-s.interactive.first.at > s.bond.timing.InteractiveAge) {
		s.discard(s.interactive.popFirst())
	}
	for s.bulk.first != nil && (s.bulk.bytes > limit || now-s.bulk.first.at > s.bond.timing.BulkAge) {
		s.discard(s.bulk.popFirst())
	}
	s.publish()
	s.mutex.Unlock()
	s.filled.Signal()
}

func (s *sender) discard(b *buffer) {
	s.bond.drop(dropQueue)
	b.free()
}

func (s *sender) publish() {
	s.interactiveBytes.Store(int64(s.interactive.bytes))
	s.bulkBytes.Store(int64(s.bulk.bytes))
	s.rate.Store(int64(s.meter.rate))
}

// enqueueControl puts a probe or reply before all packets. When many wait the
// oldest goes: the carrier has stopped.
func (s *sender) enqueueControl(c control) {
	s.mutex.Lock()
	if !s.closed {
		if len(s.controls) == maxControlQueue {
			s.controls = append(s.controls[:0], s.controls[1:]...)
		}
		s.controls = append(s.controls, c)
	}
	s.mutex.Unlock()
	s.filled.Signal()
}

// next waits for what is to be sent next: a buffer, or a control if it is nil.
func (s *sender) next() (b *buffer, c control, ok bool) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	defer s.publish()
	timing := s.bond.timing
	for {
		if s.closed {
			return nil, control{}, false
		}
		if len(s.controls) > 0 {
			c = s.controls[0]
			s.controls = append(s.controls[:0], s.controls[1:]...)
			return nil, c, true
		}
		now := s.bond.now()
		for b = s.interactive.popFirst(); b != nil; b = s.interactive.popFirst() {
			if now-b.at <= timing.InteractiveAge {
				return b, control{}, true
			}
			s.discard(b)
		}
		for b = s.bulk.popFirst(); b != nil; b = s.bulk.popFirst() {
			sojourn := now - b.at
			if sojourn <= timing.BulkAge && !s.codel.drop(sojourn, now, s.bulk.bytes) {
				s.link.noteQueueDelay(sojourn, now)
				return b, control{}, true
			}
			s.discard(b)
		}
		s.meter.idle()
		s.publish()
		s.filled.Wait()
	}
}

// run sends until the carrier is dead or close is called.
func (s *sender) run() {
	scratch := make([]byte, 0, replyLength)
	for {
		b, c, ok := s.next()
		if !ok {
			return
		}
		var err error
		if b != nil {
			err = s.transmit(b)
			b.free()
		} else {
			err = s.transmitControl(c, scratch)
		}
		if err != nil {
			s.fail(err)
			return
		}
	}
}

// transmit sends a packet, in two halves if it does not fit. Its error is final.
func (s *sender) transmit(b *buffer) error {
	flags := byte(0)
	if b.explicit {
		flags = flagExplicit
	}
	limit := s.carrier.MaxMessage()
	if packetHeader+b.length() <= limit {
		m := b.data[maxHeadroom-packetHeader : b.end]
		putPacketHeader(m, flags, b.lane, b.sequence)
		err := s.send(m, true)
		if err == nil {
			return nil
		}
		if limit = s.tooLarge(err, len(m)); limit == 0 {
			return err
		}
	}
	half := maxHeadroom + (b.length()+1)/2
	if packetHeader+half-maxHeadroom > limit {
		s.bond.drop(dropOversized)
		return nil
	}
	m := b.data[maxHeadroom-packetHeader : half]
	putPacketHeader(m, flags|flagFirst, b.lane, b.sequence)
	err := s.send(m, true)
	if err == nil {
		// The end of the first half was sent: its place is free for a header.
		m = b.data[half-packetHeader : b.end]
		putPacketHeader(m, flags|flagSecond, b.lane, b.sequence)
		err = s.send(m, false)
	}
	if err != nil && s.tooLarge(err, len(m)) > 0 {
		s.bond.drop(dropOversized)
		return nil
	}
	return err
}

// tooLarge gives what the carrier takes now if err says that a message of length
// bytes was too large for it, else 0. A carrier that has learnt of a smaller path
// MTU may also say so by its MaxMessage alone.
func (s *sender) tooLarge(err error, length int) int {
	var e *TooLargeError
	if errors.As(err, &e) {
		return max(min(e.Max, length-1), 1)
	}
	if limit := s.carrier.MaxMessage(); limit < length {
		return max(limit, 1)
	}
	return 0
}

func (s *sender) transmitControl(c control, scratch []byte) error {
	m := appendProbe(scratch, c.number, c.time)
	if c.padded {
		m = append(m, make([]byte, max(0, min(s.carrier.MaxMessage(), MaxMessage)-len(m)))...)
	}
	if c.reply {
		m = appendReply(scratch, c.number, c.time, c.received)
	} else {
		s.link.noteProbe(c.number)
	}
	err := s.send(m, false)
	if err != nil && s.tooLarge(err, len(m)) > 0 {
		return nil // a link that cannot carry a probe is never fit
	}
	return err
}

func (s *sender) send(m []byte, packet bool) error {
	if err := s.carrier.Send(m); err != nil {
		return err
	}
	now := s.bond.now()
	s.mutex.Lock()
	s.meter.sent(len(m), now)
	s.mutex.Unlock()
	s.link.noteSent(len(m), packet, now)
	return nil
}

// fail ends a carrier that cannot send any more.
func (s *sender) fail(err error) {
	s.dead.Store(true)
	waiting := s.close()
	if s.link.isRemoved() {
		waiting.free()
		return
	}
	s.bond.logLink(s.link, "carrier of the bond ended", "error", err)
	s.bond.resend(waiting)
	s.bond.wake()
}

// close ends run, once the carrier returns from its Send, and gives what waited.
func (s *sender) close() list {
	s.mutex.Lock()
	s.closed = true
	waiting := s.take()
	s.mutex.Unlock()
	s.filled.Signal()
	return waiting
}

// drain gives what waits.
func (s *sender) drain() list {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.take()
}

func (s *sender) take() list {
	waiting := s.interactive
	for b := s.bulk.popFirst(); b != nil; b = s.bulk.popFirst() {
		waiting.pushLast(b)
	}
	s.interactive, s.bulk = list{}, list{}
	s.publish()
	return waiting
}

func (l *list) free() {
	for b := l.popFirst(); b != nil; b = l.popFirst() {
		b.free()
	}
}
