package bond

import "time"

// The path of a packet: Bond.Receive ─▶ half.join (if it came in two) ─▶
// lane.pass or lane.order ─▶ Bond.deliver.

const (
	// Sequences that are remembered, to tell the second copy of a packet: the
	// window of RFC 6479, interactive lanes the smaller one.
	interactiveWindow = 1024
	bulkWindow        = 4096
	// maxHeld is how many packets of a lane wait for order.
	maxHeld = 2048
	minRing = 64
)

// window remembers which of the last sequences came.
type window struct {
	highest uint32
	words   []uint64 // a power of two of them
}

func newWindow(size int) window { return window{words: make([]uint64, size/64)} }

func (w *window) restart(sequence uint32) {
	clear(w.words)
	w.highest = sequence
}

type verdict uint8

const (
	fresh verdict = iota
	seenBefore
	tooOld
)

// mark notes that a sequence came.
func (w *window) mark(sequence uint32) verdict {
	count := uint32(len(w.words))
	if ahead := int32(sequence - w.highest); ahead > 0 {
		// Sequences wrap, so words are counted as distances from the highest.
		words := sequence/64 - w.highest/64
		if sequence < w.highest {
			words = sequence/64 + (1<<26 - w.highest/64)
		}
		for i := uint32(1); i <= min(words, count); i++ {
			w.words[(w.highest/64+i)%count] = 0
		}
		w.highest = sequence
	} else if w.highest-sequence >= (count-1)*64 {
		return tooOld
	}
	word, bit := &w.words[sequence/64%count], uint64(1)<<(sequence%64)
	if *word&bit != 0 {
		return seenBefore
	}
	*word |= bit
	return fresh
}

// lane is the receiving end of one lane.
type lane struct {
	window  window
	started bool
	last    time.Duration // when a packet came

	// Of bulk lanes.
	expected uint32    // the sequence that is next to be delivered
	ring     []*buffer // packets after it, by sequence
	held     list      // the same, by arrival
	sources  []source
	spread   time.Duration // how far the delays of the links are apart
	// Sequences from expiredFrom up to expiredTo were given up lately, the last at
	// expiredAt, because the hold was over. One of them that comes after all says
	// that holds are too short.
	expiredFrom, expiredTo uint32
	expiredAt              time.Duration
}

// source is a link that delivered to a lane lately.
type source struct {
	link    *Link
	last    time.Duration
	highest uint32
}

// outcome is what became of a packet and its lane.
type outcome struct {
	verdict verdict
	late    bool // delivered after later ones
	short   bool // because the hold was too short
	// waited is how long others waited for this one.
	waited time.Duration
}

func newLane(class Class) *lane {
	if class == Interactive {
		return &lane{window: newWindow(interactiveWindow)}
	}
	return &lane{window: newWindow(bulkWindow), ring: make([]*buffer, minRing)}
}

// pass handles a packet of an interactive lane: it is to be delivered at once if
// it is fresh.
func (l *lane) pass(sequence uint32, now, silence time.Duration) verdict {
	if !l.started || now-l.last > silence {
		l.window.restart(sequence)
		l.started = true
	}
	l.last = now
	return l.window.mark(sequence)
}

// order handles a packet of a bulk lane and appends to out what is to be
// delivered now. A packet that is not fresh stays the caller's.
func (l *lane) order(out []*buffer, b *buffer, from *Link, now time.Duration, t Timing) ([]*buffer, outcome) {
	if !l.started || now-l.last > t.LaneSilence {
		out = l.flush(out)
		l.window.restart(b.sequence)
		l.expected, l.started = b.sequence, true
		l.sources = l.sources[:0]
		l.expiredFrom, l.expiredTo = b.sequence, b.sequence
		l.ring = make([]*buffer, minRing)
	}
	l.last = now
	o := outcome{verdict: l.window.mark(b.sequence)}
	l.note(from, b.sequence, now, t)
	if o.verdict != fresh {
		return l.skipLost(out, now, t), o
	}
	switch ahead := int32(b.sequence - l.expected); {
	case ahead < 0:
		o.late = true
		o.short = b.sequence-l.expiredFrom < l.expiredTo-l.expiredFrom
		out = append(out, b)
	case ahead >= maxHeld:
		out = append(l.flush(out), b)
		l.expected = b.sequence + 1
	case ahead == 0:
		if l.held.first != nil {
			o.waited = now - l.held.first.at
		}
		out = append(out, b)
		l.expected++
		out = l.advance(out)
	default:
		l.hold(b, int(ahead), now)
	}
	return l.skipLost(out, now, t), o
}

// note remembers which link brought which sequence.
func (l *lane) note(from *Link, sequence uint32, now time.Duration, t Timing) {
	kept := l.sources[:0]
	found := false
	for _, s := range l.sources {
		if s.link == from {
			found = true
			s.last = now
			if int32(sequence-s.highest) > 0 {
				s.highest = sequence
			}
		}
		if now-s.last <= t.LaneRecent {
			kept = append(kept, s)
		}
	}
	clear(l.sources[len(kept):])
	if !found {
		kept = append(kept, source{link: from, last: now, highest: sequence})
	}
	l.sources = kept
}

// hold keeps a packet until those before it came.
func (l *lane) hold(b *buffer, ahead int, now time.Duration) {
	if ahead >= len(l.ring) {
		size := len(l.ring)
		for size <= ahead {
			size *= 2
		}
		ring := make([]*buffer, size)
		for held := l.held.first; held != nil; held = held.next {
			ring[held.sequence%uint32(size)] = held
		}
		l.ring = ring
	}
	b.at, b.held = now, true
	l.ring[b.sequence%uint32(len(l.ring))] = b
	l.held.pushLast(b)
}

// advance delivers what is held and next in sequence.
func (l *lane) advance(out []*buffer) []*buffer {
	for l.held.count > 0 {
		slot := &l.ring[l.expected%uint32(len(l.ring))]
		if *slot == nil {
			break
		}
		out = append(out, *slot)
		(*slot).held = false
		l.held.remove(*slot)
		*slot = nil
		l.expected++
	}
	return out
}

// skipLost gives up sequences that are known lost: links keep order, every link
// that delivered to the lane lately has delivered a later one, and one that is
// used only now would have by this time.
func (l *lane) skipLost(out []*buffer, now time.Duration, t Timing) []*buffer {
	if l.held.count == 0 || now-l.held.first.at < l.spread {
		return out
	}
	lowest := l.expected + maxHeld
	for _, s := range l.sources {
		if now-s.last <= t.LaneRecent && int32(s.highest-lowest) < 0 {
			lowest = s.highest
		}
	}
	for l.held.count > 0 && int32(lowest-l.expected) > 0 && now-l.held.first.at >= l.spread {
		l.expected++
		out = l.advance(out)
	}
	return out
}

// expire gives up waiting for what did not come within hold.
func (l *lane) expire(out []*buffer, now, hold time.Duration) []*buffer {
	for l.held.first != nil && now-l.held.first.at >= hold {
		if now-l.expiredAt > time.Second {
			l.expiredFrom = l.expected
		}
		out = l.deliverTo(out, l.held.first.sequence)
		l.expiredTo, l.expiredAt = l.expected, now
	}
	return out
}

// deliverTo delivers what is held up to a sequence that is held, and what follows
// it without a gap.
func (l *lane) deliverTo(out []*buffer, sequence uint32) []*buffer {
	for int32(sequence-l.expected) > 0 {
		if l.ring[l.expected%uint32(len(l.ring))] == nil {
			l.expected++
			continue
		}
		out = l.advance(out)
	}
	return l.advance(out)
}

// flush delivers all that is held.
func (l *lane) flush(out []*buffer) []*buffer {
	for l.held.last != nil {
		out = l.deliverTo(out, l.held.last.sequence)
	}
	return out
}

// maxHalves is how many packets of a link may wait for their other half. Both
// halves are sent one after the other, so only loss and reordering on the way
// leave any.
const maxHalves = 32

// half is the half of a packet that came first.
type half struct {
	buffer *buffer
	second bool
}

// join adds a half to the other one, if that is there, and gives the packet.
// Dropped counts packets that were given up.
func join(halves *[maxHalves]half, m message, now, age time.Duration) (whole *buffer, dropped int) {
	free, oldest := -1, 0
	for i := range halves {
		h := &halves[i]
		b := h.buffer
		if b != nil && now-b.at > age {
			b.free()
			h.buffer = nil
			b = nil
			dropped++
		}
		switch {
		case b == nil:
			free = i
		case b.lane == m.lane && b.sequence == m.sequence:
			if h.second == m.second {
				return nil, dropped + 1
			}
			h.buffer = nil
			if b.length()+len(m.packet) > MaxPacket {
				b.free()
				return nil, dropped + 1
			}
			if h.second {
				copy(b.data[maxHeadroom+len(m.packet):], b.packet())
				copy(b.data[maxHeadroom:], m.packet)
			} else {
				copy(b.data[b.end:], m.packet)
			}
			b.end += len(m.packet)
			return b, dropped
		case halves[oldest].buffer == nil || b.at < halves[oldest].buffer.at:
			oldest = i
		}
	}
	if free < 0 {
		halves[oldest].buffer.free()
		free = oldest
		dropped++
	}
	b := newBuffer(m.packet)
	b.at, b.lane, b.sequence, b.explicit = now, m.lane, m.sequence, m.explicit
	halves[free] = half{buffer: b, second: m.second}
	return nil, dropped
}

func freeHalves(halves *[maxHalves]half, now, age time.Duration) (dropped int) {
	for i := range halves {
		if b := halves[i].buffer; b != nil && now-b.at > age {
			b.free()
			halves[i].buffer = nil
			dropped++
		}
	}
	return dropped
}
