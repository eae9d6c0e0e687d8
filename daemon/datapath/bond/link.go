package bond

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// The path of a probe: Bond.tick ─▶ Link.probe ─▶ sender ─▶ the other end's
// Link.arrived ─▶ PROBE_REPLY ─▶ Link.answered ─▶ health ─▶ Bond.tick (fit or
// not) and choose.

// Carrier delivers messages over one way: unreliably and mostly in order. Its
// owner gives what it receives to Bond.Receive.
type Carrier interface {
	// Send delivers one message, which it does not keep. It may wait while the way
	// has no room. *TooLargeError says how much fits; if MaxMessage has become
	// less than the message, any error counts as that. Other errors are final.
	Send(message []byte) error
	// MaxMessage is the largest message that Send takes now, bytes.
	MaxMessage() int
	// Close makes a Send that waits return.
	Close() error
}

// TooLargeError says that a message is larger than the carrier takes now.
type TooLargeError struct{ Max int }

func (e *TooLargeError) Error() string {
	return "the message is too large for the carrier; make it smaller"
}

// LinkConfig describes a link.
type LinkConfig struct {
	Name   string // of the uplink; "" for the stream link
	Kind   LinkKind
	Backup bool // carries packets only while no other link is fit
	// Carriers are closed by the Bond when the link is removed. Of several each
	// lane has one of its own, so that one flow's loss does not hold up another;
	// the first is kept for interactive flows.
	Carriers []Carrier
}

// Link is one way to the other end.
type Link struct {
	bond    *Bond
	name    string
	kind    LinkKind
	senders atomic.Pointer[[]*sender]

	backup  atomic.Bool
	removed atomic.Bool

	// What the choice of links reads without the mutex.
	fit      atomic.Bool
	usable   atomic.Bool  // it was heard at some time, and has a carrier left
	lastData atomic.Int64 // time.Duration: when a packet was last queued

	sentPackets, sentBytes, receivedPackets, receivedBytes atomic.Uint64
	sentMessages                                           atomic.Uint32

	mutex    sync.Mutex
	health   health
	queueing struct {
		delay time.Duration
		at    time.Duration
	}

	halves [maxHalves]half // guarded by Bond.receiving
}

// health is what is known of a link by its probes. Times are since the Bond's
// start, 0 for never.
type health struct {
	heard    time.Duration // anything
	received uint32        // messages
	lastData time.Duration // a packet was received

	probed time.Duration // the last probe
	// probedBytes is what had been sent before it.
	probedBytes uint64
	silent      time.Duration // the first probe since anything was heard
	unanswered  time.Duration // the first probe since one was answered
	number      uint32
	probes      [64]sentProbe

	// Of the last probe of full size, and how many in a row were not answered.
	sizeNumber uint32
	sizeAt     time.Duration
	sizeLost   int

	rtt, deviation time.Duration // smoothed (RFC 6298)
	// lowest and lowestBefore are the least round-trip times of this and the last
	// half minute.
	lowest, lowestBefore, lowestSince time.Duration
	// recent are the last of all, and answers how many there were.
	recent                 [8]time.Duration
	answers                int
	model                  model
	arrival, arrivalJitter time.Duration
	arrivalKnown           bool

	loss         float64 // 0 to 1, smoothed
	lossSent     uint32
	lossReceived uint32
	lossKnown    bool

	fit bool
}

type sentProbe struct {
	number uint32
	at     time.Duration
	sent   uint32 // messages before it
	left   time.Duration
	mark   probeMark
	open   bool // not answered yet
}

// onHeard notes that a message came.
func (h *health) onHeard(now time.Duration) {
	h.heard = now
	h.received++
	h.silent = 0
}

// onProbe notes that a probe is sent, and gives its number.
func (h *health) onProbe(now time.Duration) uint32 {
	h.number++
	h.probes[h.number%uint32(len(h.probes))] = sentProbe{number: h.number, at: now, left: now, open: true}
	h.probed = now
	if h.silent == 0 {
		h.silent = now
	}
	if h.unanswered == 0 {
		h.unanswered = now
	}
	return h.number
}

// onReply notes an answer. Answers to what was not asked are ignored.
func (h *health) onReply(m message, now time.Duration) {
	p := &h.probes[m.number%uint32(len(h.probes))]
	if p.number != m.number || !p.open {
		return
	}
	p.open = false
	h.unanswered = 0
	h.fit = true

	rtt := max(now-p.at, time.Microsecond)
	if h.rtt == 0 {
		h.rtt, h.deviation = rtt, rtt/2
	} else {
		h.deviation += ((h.rtt - rtt).Abs() - h.deviation) / 4
		h.rtt += (rtt - h.rtt) / 8
	}
	const half = 30 * time.Second
	if h.lowest == 0 || now-h.lowestSince > half {
		h.lowestBefore, h.lowest, h.lowestSince = h.lowest, rtt, now
	}
	h.lowest = min(h.lowest, rtt)
	h.recent[h.answers%len(h.recent)] = rtt
	h.answers++

	h.model.answered(now, p.left, m.time, p.mark)

	sent, received := p.sent-h.lossSent, m.received-h.lossReceived
	switch {
	case !h.lossKnown:
		h.lossKnown = true
	case int32(sent) < 20:
		return
	case int32(received) >= 0:
		h.loss += (max(0, 1-float64(received)/float64(sent)) - h.loss) / 4
	}
	h.lossSent, h.lossReceived = p.sent, m.received
}

// onArrival notes when the other end's probe came.
func (h *health) onArrival(sent, now time.Duration) {
	sample := now - sent
	if h.arrivalKnown {
		h.arrivalJitter += ((sample - h.arrival).Abs() - h.arrivalJitter) / 8
	}
	h.arrival = smooth(h.arrival, sample, h.arrivalKnown)
	h.arrivalKnown = true
}

// smooth starts anew when a clock was set back by suspension.
func smooth(value, sample time.Duration, known bool) time.Duration {
	if !known || (sample-value).Abs() > time.Second {
		return sample
	}
	return value + (sample-value)/4
}

// excuse takes time from every silence.
func (h *health) excuse(late time.Duration) {
	if h.silent != 0 {
		h.silent += late
	}
	if h.unanswered != 0 {
		h.unanswered += late
	}
}

// silence is how long nothing was heard though there was something to answer.
func (h *health) silence(now time.Duration) time.Duration {
	if h.silent == 0 {
		return 0
	}
	return now - h.silent
}

// limit is the silence that makes a link unfit.
func (h *health) limit(t Timing) time.Duration {
	if h.rtt == 0 {
		return max(time.Second, t.UnfitAfter)
	}
	return max(4*h.rtt, t.UnfitAfter)
}

// judge says whether the link is fit. It becomes fit by an answer alone.
func (h *health) judge(now time.Duration, t Timing) bool {
	limit := h.limit(t)
	if h.silence(now) >= limit || h.unanswered != 0 && now-h.unanswered >= 3*limit {
		h.fit = false
	}
	return h.fit
}

// alive says that the link counts for the Bond: it was heard, and not silent for
// long since.
func (h *health) alive(now time.Duration, t Timing) bool {
	return h.heard != 0 && h.silence(now) < t.DeadAfter
}

func (h *health) lowestRTT() time.Duration {
	if h.lowestBefore == 0 {
		return h.lowest
	}
	return min(h.lowest, h.lowestBefore)
}

// standingRTT is the least of the last few, as a queue that stands delays every
// packet (RFC 8289), and a processor that is busy some.
func (h *health) standingRTT() time.Duration {
	return slices.Min(h.recent[:max(1, min(h.answers, len(h.recent)))])
}

// SetBackup says whether the link carries packets only while no other is fit.
func (l *Link) SetBackup(backup bool) {
	if l.backup.Swap(backup) != backup {
		l.bond.wake()
	}
}

func (l *Link) isRemoved() bool { return l.removed.Load() }

// delay predicts how long a packet takes that the carrier gets now.
func (l *Link) delay(now time.Duration) time.Duration {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.health.model.delay(now)
}

// Fit says whether the link carries packets.
func (l *Link) Fit() bool { return l.fit.Load() && l.usable.Load() }

// Life is what shows whether a link lives.
type Life struct {
	Fit   bool
	Heard time.Time // when anything last came over it
	// RTT is smoothed, MinRTT the least of the last half to whole minute.
	RTT, MinRTT time.Duration
	// Asked is when the first probe left since anything was heard, or if things are
	// heard but no answers since one was; zero if none is without an answer.
	Asked time.Time
}

// Life tells how the link lives.
func (l *Link) Life() Life {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	life := Life{Fit: l.Fit(), Heard: l.bond.start.Add(l.health.heard), RTT: l.health.rtt, MinRTT: l.health.lowestRTT()}
	if asked := cmp.Or(l.health.silent, l.health.unanswered); asked != 0 {
		life.Asked = l.bond.start.Add(asked)
	}
	return life
}

// sender gives the carrier of a lane, nil if none is left.
func (l *Link) sender(lane uint8) *sender {
	senders := *l.senders.Load()
	first := 0
	if classOf(lane) == Bulk && len(senders) > 1 {
		first = 1 + int(lane)%(len(senders)-1)
	}
	for i := range senders {
		if s := senders[(first+i)%len(senders)]; !s.dead.Load() {
			return s
		}
	}
	return nil
}

// probe asks the other end for an answer, from time to time in full size.
func (l *Link) probe(now time.Duration, used bool) {
	l.mutex.Lock()
	number := l.health.onProbe(now)
	l.health.probedBytes = l.sentBytes.Load()
	padded := used && l.kind == Datagram && now-l.health.sizeAt >= l.bond.timing.ProbeSize
	tooLong := padded && l.health.onSizeProbe(number, now)
	l.mutex.Unlock()
	s := l.sender(0)
	if s == nil {
		return
	}
	if tooLong {
		l.bond.logLink(l, "the path takes shorter messages than before; dialling it anew", "longest", s.carrier.MaxMessage())
		_ = s.carrier.Close() // its owner removes the link
		return
	}
	s.enqueueControl(control{number: number, time: now, padded: padded})
}

// sizeTries is how many probes of full size may go unanswered in a row.
const sizeTries = 4

// onSizeProbe notes that a probe is sent in full size. It says whether so many
// before it were not answered, on a link that is fit, that none will be.
func (h *health) onSizeProbe(number uint32, now time.Duration) bool {
	last := h.probes[h.sizeNumber%uint32(len(h.probes))]
	switch {
	case !h.fit || h.sizeNumber == 0:
		h.sizeLost = 0
	case last.number != h.sizeNumber:
		// Too many others followed it to know.
	case last.open:
		h.sizeLost++
	default:
		h.sizeLost = 0
	}
	h.sizeNumber, h.sizeAt = number, now
	return h.sizeLost >= sizeTries
}

// noteProbe is called when a probe leaves.
func (l *Link) noteProbe(number uint32) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if p := &l.health.probes[number%uint32(len(l.health.probes))]; p.number == number {
		p.sent, p.left = l.sentMessages.Load(), l.bond.now()
		p.mark = l.health.model.mark(p.left, l.sentBytes.Load())
	}
}

// arrived handles a message before its content: the link is heard, probes are
// answered.
func (l *Link) arrived(m message, length int, now time.Duration) {
	l.mutex.Lock()
	received := l.health.received
	l.health.onHeard(now)
	becameFit := false
	switch m.kind {
	case kindPacket:
		l.health.lastData = now
	case kindProbe:
		l.health.onArrival(m.time, now)
	case kindReply:
		was := l.health.fit
		l.health.onReply(m, now)
		becameFit = l.health.fit && !was
		l.fit.Store(l.health.fit)
	}
	l.mutex.Unlock()

	l.receivedBytes.Add(uint64(length))
	if m.kind == kindProbe {
		if s := l.sender(0); s != nil {
			s.enqueueControl(control{reply: true, number: m.number, time: now, received: received})
		}
	}
	if becameFit {
		l.bond.logLink(l, "link of the bond is fit")
		l.bond.changed()
	}
	if becameFit || !l.usable.Load() || !l.bond.alive.Load() {
		l.bond.wake()
	}
}

// noteSent counts a message that the carrier took.
func (l *Link) noteSent(length int, packet bool, now time.Duration) {
	l.mutex.Lock()
	l.health.model.sent(now, length)
	l.mutex.Unlock()
	l.sentMessages.Add(1)
	if before := l.sentBytes.Add(uint64(length)) - uint64(length); before/probeBytes != l.sentBytes.Load()/probeBytes {
		l.bond.wake() // a probe may be due
	}
	if packet {
		l.sentPackets.Add(1)
	}
}

func (l *Link) noteQueueDelay(delay, now time.Duration) {
	l.mutex.Lock()
	l.queueing.delay += (delay - l.queueing.delay) / 8
	l.queueing.at = now
	l.mutex.Unlock()
}

// drain gives what waits on the link.
func (l *Link) drain() []list {
	var waiting []list
	for _, s := range *l.senders.Load() {
		waiting = append(waiting, s.drain())
	}
	return waiting
}

// LinkStats is what a link did and how it does.
type LinkStats struct {
	Name   string
	Kind   LinkKind
	Backup bool
	Fit    bool
	// RTT is the smoothed round-trip time, StandingRTT the least of the last few
	// probes, MinRTT that of the last half to whole minute; 0 if not known yet.
	RTT, StandingRTT, MinRTT time.Duration
	// Of packets and their halves once each; bytes are of messages, probes too.
	SentPackets, SentBytes, ReceivedPackets, ReceivedBytes uint64
	// Queued is what waits for the carrier, bytes; QueueDelay how long bulk
	// packets waited lately; Rate what the link was found to carry, bytes per
	// second.
	Queued     int
	QueueDelay time.Duration
	Rate       float64
	// Loss is the smoothed share of sent messages that did not arrive, 0 to 1.
	Loss float64
	// MaxMessage is the largest message that the link's carriers take, bytes.
	MaxMessage int
}

func (l *Link) stats(now time.Duration) LinkStats {
	s := LinkStats{
		Name: l.name, Kind: l.kind, Backup: l.backup.Load(), Fit: l.Fit(),
		SentPackets: l.sentPackets.Load(), SentBytes: l.sentBytes.Load(),
		ReceivedPackets: l.receivedPackets.Load(), ReceivedBytes: l.receivedBytes.Load(),
	}
	for _, sender := range *l.senders.Load() {
		s.Queued += int(sender.interactiveBytes.Load() + sender.bulkBytes.Load())
		s.Rate += float64(sender.rate.Load())
		if limit := sender.carrier.MaxMessage(); s.MaxMessage == 0 || limit < s.MaxMessage {
			s.MaxMessage = limit
		}
	}
	l.mutex.Lock()
	defer l.mutex.Unlock()
	s.RTT, s.StandingRTT, s.MinRTT = l.health.rtt, l.health.standingRTT(), l.health.lowestRTT()
	if l.kind == Datagram {
		s.Loss = l.health.loss
	}
	if now-l.queueing.at < time.Second {
		s.QueueDelay = l.queueing.delay
	}
	return s
}
