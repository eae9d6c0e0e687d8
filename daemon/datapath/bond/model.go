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

	// Of the newest probe that was answered.
	left, arrived time.Duration // by the sender's and the receiver's clock
	bytes         uint64        // sent before it
	queued        time.Duration // how long it stood in the queue
}

// answered notes that a probe which left after so many bytes has arrived.
func (m *model) answered(left, arrived time.Duration, bytes uint64) {
	delay := arrived - left
	if m.known && left <= m.left {
		return // answers that overtook each other
	}
	if m.known && (delay-m.least).Abs() > time.Minute {
		*m = model{} // a clock was set back by suspension
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
	m.learn(arrived, bytes, queued > queueKnown)
	m.known = true
	m.left, m.arrived, m.bytes, m.queued = left, arrived, bytes, queued
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

// delay predicts how long a packet takes that leaves now, after so many bytes.
func (m *model) delay(now time.Duration, bytes uint64) time.Duration {
	queued := m.queued
	if m.capacity > 0 {
		queued += time.Duration(float64(bytes-m.bytes)/m.capacity*float64(time.Second)) - (now - m.left)
	}
	return m.base() + max(queued, 0)
}
