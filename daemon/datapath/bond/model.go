package bond

import "time"

const (
	// queueKnown is from what delay on a queue on the way is taken for one, and
	// not for jitter.
	queueKnown = 3 * time.Millisecond
	// A capacity is measured over at least leastTime and leastBytes, and at most
	// mostTime: what takes longer does not fill the link by itself.
	leastTime  = 5 * time.Millisecond
	mostTime   = 200 * time.Millisecond
	leastBytes = 8 << 10
	// probeBytes is after how much data a probe is due early.
	probeBytes = 32 << 10
)

// model predicts how long a packet takes that a carrier gets now. Answers to
// probes tell how full the queue on the way was some time ago; what was sent
// since then, and the rate at which the queue empties, tell the rest. Without
// that the fastest link would be overfilled for some round trips before another
// is used, and the delay of a flow would swing between the two.
//
// Delays are as the two ends' clocks differ.
type model struct {
	known bool
	// least and leastBefore are the least delays of this half minute and the last:
	// those of an empty queue.
	least, leastBefore, leastSince time.Duration
	capacity                       float64 // bytes per second, 0 if not known

	// Of the probe from which on the capacity is measured.
	markArrived time.Duration
	markBytes   uint64
	markQueue   bool

	// The queue as it is taken to be at a moment, for how long in all it was taken
	// to be empty before, and by how much in all it was put right.
	at, backlog, idle, corrected time.Duration

	// Of the newest probe that was answered.
	left     time.Duration
	bytes    uint64        // sent before it
	queued   time.Duration // how long it stood in the queue
	standing time.Duration // the same, or that of the one before if it is less
	ours     bool          // the queue is of what this end sent, mostly
}

// probeMark is what a model took the queue for when a probe left.
type probeMark struct {
	bytes                    uint64 // sent before it
	backlog, idle, corrected time.Duration
}

// mark is called when a probe leaves after so many bytes.
func (m *model) mark(now time.Duration, bytes uint64) probeMark {
	m.advance(now)
	return probeMark{bytes: bytes, backlog: m.backlog, idle: m.idle, corrected: m.corrected}
}

// sent notes that a carrier got so many bytes.
func (m *model) sent(now time.Duration, bytes int) {
	m.advance(now)
	m.backlog += m.takes(uint64(bytes))
}

// takes is how long the link takes for so many bytes.
func (m *model) takes(bytes uint64) time.Duration {
	if m.capacity == 0 {
		return 0
	}
	return time.Duration(float64(bytes) / m.capacity * float64(time.Second))
}

// advance lets the queue empty until now.
func (m *model) advance(now time.Duration) {
	m.backlog -= now - m.at
	m.at = now
	if m.backlog < 0 {
		m.idle -= m.backlog
		m.backlog = 0
	}
}

// answered notes that a probe which left at a mark has arrived.
func (m *model) answered(now, left, arrived time.Duration, at probeMark) {
	delay := arrived - left
	if m.known && left <= m.left {
		return // answers that overtook each other
	}
	if m.known && (delay-m.least).Abs() > time.Minute {
		*m = model{at: now} // a clock was set back by suspension
	}
	const half = 30 * time.Second
	switch {
	case !m.known:
		m.least, m.leastBefore, m.leastSince = delay, delay, left
	case left-m.leastSince > half:
		m.least, m.leastBefore, m.leastSince = delay, m.least, left
	}
	m.least = min(m.least, delay)
	queued := delay - m.base()
	m.ours = queued <= queueKnown || m.takes(at.bytes-m.bytes) > (left-m.left)/2
	m.learn(arrived, at.bytes, queued > queueKnown)
	m.correct(now, queued, at)
	m.standing = queued
	if m.known {
		m.standing = min(queued, m.queued)
	}
	m.known = true
	m.left, m.bytes, m.queued = left, at.bytes, queued
}

// correct puts the queue right by what a probe found. What is known of the time
// since then stays, as far as the queue was not empty in between: from there on it
// does not depend on what was before.
func (m *model) correct(now, queued time.Duration, at probeMark) {
	m.advance(now)
	if !m.known {
		m.backlog = queued
		return
	}
	// What answers to earlier probes have put right since holds for this one too.
	missed, idle := queued-at.backlog-(m.corrected-at.corrected), m.idle-at.idle
	before := m.backlog
	switch {
	case missed > idle:
		m.backlog += missed - idle
	case missed < 0 && idle == 0:
		m.backlog = max(0, m.backlog+missed)
	}
	m.corrected += m.backlog - before
}

// learn measures the capacity while there is a queue: how fast it empties. While
// there is none, it is at least what goes through.
func (m *model) learn(arrived time.Duration, bytes uint64, queue bool) {
	passed, sent := arrived-m.markArrived, bytes-m.markBytes
	mark := true
	switch {
	case queue != m.markQueue || !m.known || passed > mostTime:
		// Nothing can be said of what was before.
	case passed < leastTime || sent < leastBytes:
		mark = false
	default:
		rate := float64(sent) / passed.Seconds()
		switch {
		case queue && m.capacity == 0:
			m.capacity = rate
		case queue:
			m.capacity += (rate - m.capacity) / 4
		case m.capacity > 0:
			m.capacity = max(m.capacity, rate)
		}
	}
	if mark {
		m.markArrived, m.markBytes, m.markQueue = arrived, bytes, queue
	}
}

func (m *model) base() time.Duration { return min(m.least, m.leastBefore) }

// delay predicts how long a packet takes that leaves now. A queue of others is
// taken to stay as it is, once two probes have met it: one alone may have been
// late for any reason.
func (m *model) delay(now time.Duration) time.Duration {
	queued := max(m.backlog-(now-m.at), 0)
	if !m.ours {
		queued = max(queued, m.standing)
	}
	return m.base() + queued
}
