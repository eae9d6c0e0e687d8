package bond

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// The path of a packet out: Send ─▶ choose ─▶ sender (queue.go). In: Receive ─▶
// lane (lane.go) ─▶ deliver ─▶ deliverAll ─▶ Config.Deliver. Everything timed
// happens in tick.

const (
	// maxHeldBytes bounds what all lanes of a Bond hold, in memory.
	maxHeldBytes = 8 << 20
	bufferBytes  = maxHeadroom + MaxPacket + 128
	// maxUndelivered is how many packets wait for Deliver, deliverBatch how many
	// it gets at once.
	maxUndelivered = 4096
	deliverBatch   = 128
	// maxLogged bounds the different lines about links of one minute.
	maxLogged = 64
	// stall is how long a link may stop while others go on: a virtual machine that
	// is not run, a radio that changes cells. A flow takes what comes after it for
	// lost otherwise, and slows down.
	stall = 40 * time.Millisecond
	// Interactive packets make a flow from presentRate a second on, and until
	// presentTime after.
	presentRate = 5
	presentTime = 5 * time.Second
	// MaxHeadroom is the largest Config.Headroom, bytes.
	MaxHeadroom = maxHeadroom
)

// Reasons why packets were dropped, as Stats has them.
const (
	dropMalformed  = iota // not an IP packet, or not a message
	dropRefused           // by Config.Accept
	dropOversized         // longer than MaxPacket, or than two messages of the link
	dropQueue             // waited too long or too many for the carrier
	dropNoLink            // no link is there
	dropLate              // came so late that it cannot be told from a copy
	dropReassembly        // half of it did not come
	dropDeliver           // Deliver is too slow
	dropReasons
)

var dropNames = [dropReasons]string{
	"malformed", "refused", "oversized", "queue", "no_link", "late", "reassembly", "deliver",
}

// Config says what a Bond is to do with packets.
type Config struct {
	// Deliver gets the packets from the other end, those of a lane in order. It is
	// called from one goroutine, with at most 128 packets, which are valid until
	// it returns. Each packet begins at Headroom; what is before it is free to
	// use.
	Deliver func(packets [][]byte)
	// Headroom is at most MaxHeadroom bytes; a TUN with virtio headers wants 10.
	Headroom int
	// Accept says whether to deliver a packet; nil accepts all. It is called from
	// the goroutine that calls Deliver.
	Accept func(Header) bool
	// Rules are the operator's classes.
	Rules []Rule
	// Follow adopts the other end's class of a flow for the way back.
	Follow bool
	// Alive is called when the Bond as a whole gains its first live link and when
	// it loses its last, from one goroutine; may be nil. A Bond begins dead.
	Alive func(bool)
	// Changed is called when a link has become fit or unfit; may be nil. It must
	// not wait.
	Changed func()
	Timing  Timing
	// Log is slog.Default if nil.
	Log *slog.Logger
}

// Bond is one end of a set of links to one other end.
type Bond struct {
	config Config
	timing Timing
	log    *slog.Logger
	start  time.Time
	kick   chan struct{}
	rules  atomic.Pointer[[]Rule]
	flows  *flowTable

	links   atomic.Pointer[[]*Link]
	alive   atomic.Bool
	used    atomic.Int64 // time.Duration: when a packet was last sent or received
	watched atomic.Int64 // time.Duration: when Watch was last called
	nextRun atomic.Int64 // time.Duration: when tick is due

	// Guards links, while they change, and closed.
	changing sync.Mutex
	closed   bool
	workers  sync.WaitGroup

	// Guards what Send needs to number and choose.
	sending   sync.Mutex
	sequences [2 * lanes]uint32
	views     []view
	chosen    []*sender
	second    time.Duration // since when interactive packets are counted
	inSecond  int
	moving    map[*sender]*list // what resend is about to give to senders

	receiving receiving

	logging sync.Mutex
	logged  map[string]time.Duration // by uplink and text, of the last minute

	drops                           [dropReasons]atomic.Uint64
	duplicates, reordered           atomic.Uint64
	sentPackets, sentBytes          [2]atomic.Uint64 // by class
	interactiveUntil                atomic.Int64     // time.Duration: see Interactive
	deliveredPackets, deliveredByte atomic.Uint64
	dropsLogged                     [dropReasons]uint64 // of tick
	dropsLoggedAt                   time.Duration       // of tick
}

// receiving is what Receive and tick share.
type receiving struct {
	sync.Mutex
	lanes   [2 * lanes]*lane
	holding map[*lane]struct{}
	held    int // packets, of all lanes
	// waited is the longest that a packet was waited for lately, spread how far
	// the links' delays are apart; hold follows from both.
	waited, waitedAt time.Duration
	spread, hold     time.Duration

	undelivered []*buffer
	arrived     sync.Cond
	closed      bool
}

// New makes a Bond without links. Run must be called.
func New(config Config) *Bond {
	b := &Bond{
		config: config,
		timing: config.Timing.withDefaults(),
		log:    config.Log,
		// Times count from before the start, so that 0 is long ago.
		start:  time.Now().Add(-time.Hour),
		kick:   make(chan struct{}, 1),
		flows:  newFlowTable(),
		logged: map[string]time.Duration{},
	}
	if b.log == nil {
		b.log = slog.Default()
	}
	b.config.Headroom = min(max(config.Headroom, 0), MaxHeadroom)
	b.links.Store(new([]*Link))
	b.SetRules(config.Rules)
	b.receiving.holding = map[*lane]struct{}{}
	b.receiving.hold = b.timing.MinHold
	b.receiving.arrived.L = &b.receiving
	return b
}

func (b *Bond) now() time.Duration { return time.Since(b.start) }

func (b *Bond) drop(reason int) { b.drops[reason].Add(1) }

// wake makes Run look at everything now.
func (b *Bond) wake() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// SetRules replaces the operator's classes.
func (b *Bond) SetRules(rules []Rule) {
	rules = slices.Clone(rules)
	b.rules.Store(&rules)
}

// Alive says whether any link was heard lately.
func (b *Bond) Alive() bool { return b.alive.Load() }

// AddLink adds a link, which carries packets once its other end has answered a
// probe. After the end of Run its carriers are closed at once.
func (b *Bond) AddLink(config LinkConfig) *Link {
	l := &Link{bond: b, name: config.Name, kind: config.Kind}
	l.senders.Store(new([]*sender))
	l.backup.Store(config.Backup)
	b.changing.Lock()
	if b.closed {
		l.removed.Store(true)
	} else {
		links := append(slices.Clone(*b.links.Load()), l)
		b.links.Store(&links)
	}
	b.changing.Unlock()
	for _, carrier := range config.Carriers {
		l.AddCarrier(carrier)
	}
	return l
}

// AddCarrier gives a stream link one more carrier, which shares its flows; after
// RemoveLink, or the end of Run, the carrier is closed at once.
func (l *Link) AddCarrier(carrier Carrier) {
	b := l.bond
	b.changing.Lock()
	defer b.changing.Unlock()
	if l.removed.Load() {
		_ = carrier.Close() // nothing can be done about a carrier that does not close
		return
	}
	s := newSender(b, l, carrier)
	senders := append(slices.Clone(*l.senders.Load()), s)
	l.senders.Store(&senders)
	b.workers.Go(s.run)
	b.wake()
}

// RemoveCarrier closes a carrier; what waited for it moves to others. It may be
// called more than once.
func (l *Link) RemoveCarrier(carrier Carrier) {
	b := l.bond
	b.changing.Lock()
	senders := slices.Clone(*l.senders.Load())
	i := slices.IndexFunc(senders, func(s *sender) bool { return s.carrier == carrier })
	if i < 0 {
		b.changing.Unlock()
		return
	}
	s := senders[i]
	senders = slices.Delete(senders, i, i+1)
	l.senders.Store(&senders)
	b.changing.Unlock()
	waiting := s.close()
	_ = carrier.Close()
	b.resend(waiting)
	b.wake()
}

// RemoveLink closes the carriers of a link; what waited on it moves to others. It
// may be called more than once.
func (b *Bond) RemoveLink(l *Link) {
	b.changing.Lock()
	links := slices.DeleteFunc(slices.Clone(*b.links.Load()), func(other *Link) bool { return other == l })
	b.links.Store(&links)
	b.changing.Unlock()
	for _, waiting := range l.close() {
		b.resend(waiting)
	}
	b.receiving.Lock()
	freeHalves(&l.halves, 1<<62, 0)
	b.receiving.Unlock()
	b.wake()
}

// close closes the carriers and gives what waited for them.
func (l *Link) close() []list {
	l.bond.changing.Lock() // no carrier comes any more
	removed := l.removed.Swap(true)
	l.bond.changing.Unlock()
	if removed {
		return nil
	}
	l.fit.Store(false)
	var waiting []list
	for _, s := range *l.senders.Load() {
		waiting = append(waiting, s.close())
		_ = s.carrier.Close() // nothing can be done about a carrier that does not close
	}
	return waiting
}

// Run probes the links and keeps the times until ctx ends. Then it closes all
// links and waits until their carriers have returned.
func (b *Bond) Run(ctx context.Context) {
	b.workers.Go(b.deliverAll)
	timer := time.NewTimer(0)
	defer timer.Stop()
	next := b.now()
	for ctx.Err() == nil {
		b.nextRun.Store(1 << 62) // a packet that is held from here on may be missed by tick
		now := b.now()
		if late := now - next; late > 10*time.Millisecond {
			b.excuse(late)
		}
		next = b.tick(now)
		b.nextRun.Store(int64(next))
		timer.Reset(max(next-b.now(), 0))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-b.kick:
		}
	}
	b.end()
}

// excuse has no link blamed for time in which this process did not run: what came
// then is still to be read.
func (b *Bond) excuse(late time.Duration) {
	for _, l := range *b.links.Load() {
		l.mutex.Lock()
		l.health.excuse(late)
		l.mutex.Unlock()
	}
}

func (b *Bond) end() {
	b.changing.Lock()
	b.closed = true
	links := *b.links.Load()
	b.changing.Unlock()
	for _, l := range links {
		b.RemoveLink(l)
	}
	b.receiving.Lock()
	b.receiving.closed = true
	for l := range b.receiving.holding {
		b.receiving.undelivered = l.flush(b.receiving.undelivered)
	}
	clear(b.receiving.holding)
	b.receiving.held = 0
	b.receiving.Unlock()
	b.receiving.arrived.Signal()
	b.workers.Wait()
	b.setAlive(false)
}

func (b *Bond) setAlive(alive bool) {
	if b.alive.Swap(alive) != alive && b.config.Alive != nil {
		b.config.Alive(alive)
	}
}

// Send carries one IP packet from the TUN, which it does not keep. It never
// waits: what finds no room is dropped and counted.
func (b *Bond) Send(packet []byte) {
	header, err := Parse(packet)
	if err != nil {
		b.drop(dropMalformed)
		return
	}
	packet = packet[:header.Length]
	if len(packet) > MaxPacket {
		b.drop(dropOversized)
		return
	}
	now := b.now()
	hash := b.flows.hash(header)
	class, explicit := b.flows.send(header, hash, now, *b.rules.Load(), b.config.Follow)
	b.use(now)

	b.sending.Lock()
	defer b.sending.Unlock()
	lane := laneOf(hash, class)
	first, second := b.choose(lane, now)
	if first == nil {
		b.drop(dropNoLink)
		return
	}
	sequence := b.sequences[lane]
	b.sequences[lane]++
	b.sentPackets[class].Add(1)
	b.sentBytes[class].Add(uint64(len(packet)))
	if class == Interactive {
		b.countInteractive(now)
	}
	for _, s := range [2]*sender{first, second} {
		if s == nil {
			continue
		}
		copied := newBuffer(packet)
		copied.at, copied.lane, copied.sequence, copied.explicit = now, lane, sequence, explicit
		var one list
		one.pushLast(copied)
		b.queue(s, one, now, false)
	}
}

// countInteractive is called with sending held.
func (b *Bond) countInteractive(now time.Duration) {
	if now-b.second >= time.Second {
		b.second, b.inSecond = now, 0
	}
	if b.inSecond++; b.inSecond >= presentRate {
		b.interactiveUntil.Store(int64(now + presentTime))
	}
}

// Interactive says whether a flow of interactive packets goes out: a call, a game,
// and not only a query now and then.
func (b *Bond) Interactive() bool { return int64(b.now()) < b.interactiveUntil.Load() }

// queue hands packets to a sender.
func (b *Bond) queue(s *sender, packets list, now time.Duration, first bool) {
	if last := time.Duration(s.link.lastData.Swap(int64(now))); now-last > time.Second {
		b.wake() // this link, and after idleness all of them, are probed more often from now on
	}
	s.enqueue(packets, now, first)
}

// Touch says that the Bond is about to be relied on, although no packet came yet:
// the links are probed as while it is in use.
func (b *Bond) Touch() {
	now := b.now()
	if now-time.Duration(b.used.Load()) > b.timing.IdleAfter {
		defer b.wake()
	}
	b.use(now)
}

// Watch is Touch, and has every link probed as often as a busy one for a second:
// somebody else's bytes depend on the same ways.
func (b *Bond) Watch() {
	b.Touch()
	now := b.now()
	if last := b.watched.Swap(int64(now)); now-time.Duration(last) > time.Second {
		b.wake()
	}
}

// changed tells of a link that has become fit or unfit.
func (b *Bond) changed() {
	if b.config.Changed != nil {
		b.config.Changed()
	}
}

// use notes that the Bond is in use.
func (b *Bond) use(now time.Duration) {
	if last := time.Duration(b.used.Load()); now-last > 10*time.Millisecond {
		b.used.Store(int64(now))
	}
}

// choose gives the senders for a packet of a lane, second nil if it is to go once,
// both nil if there is no link. The caller holds sending.
func (b *Bond) choose(lane uint8, now time.Duration) (first, second *sender) {
	if !b.alive.Load() {
		return nil, nil
	}
	class := classOf(lane)
	b.views, b.chosen = b.views[:0], b.chosen[:0]
	for _, l := range *b.links.Load() {
		s := l.sender(lane)
		if s == nil || !l.usable.Load() || l.removed.Load() {
			continue
		}
		b.views = append(b.views, view{
			name: l.name, kind: l.kind, fit: l.fit.Load(), backup: l.backup.Load(),
			delay: l.delay(now), wait: s.wait(class, b.moving[s]),
		})
		b.chosen = append(b.chosen, s)
	}
	at := func(i int) *sender {
		if i < 0 {
			return nil
		}
		return b.chosen[i]
	}
	if class == Bulk {
		return at(chooseBulk(b.views, b.timing.CoDelTarget/2, b.timing.MaxHold)), nil
	}
	one, two := chooseInteractive(b.views)
	return at(one), at(two)
}

// resend moves what waited on one link to others, before what waits there.
func (b *Bond) resend(waiting list) {
	now := b.now()
	b.sending.Lock()
	defer b.sending.Unlock()
	b.moving = map[*sender]*list{}
	for packet := waiting.popFirst(); packet != nil; packet = waiting.popFirst() {
		age := b.timing.BulkAge
		if classOf(packet.lane) == Interactive {
			age = b.timing.InteractiveAge
		}
		s, _ := b.choose(packet.lane, now)
		switch {
		case now-packet.at > age:
			b.drop(dropQueue)
			packet.free()
		case s == nil:
			b.drop(dropNoLink)
			packet.free()
		default:
			if b.moving[s] == nil {
				b.moving[s] = &list{}
			}
			b.moving[s].pushLast(packet)
		}
	}
	for s, packets := range b.moving {
		b.queue(s, *packets, now, true)
	}
	b.moving = nil
}

// Receive takes a message that came over a link and does not keep it. It may be
// called from any number of goroutines, but from one at a time for each carrier.
func (b *Bond) Receive(l *Link, data []byte) {
	if l.removed.Load() {
		return
	}
	m, err := decode(data)
	if err != nil {
		b.drop(dropMalformed)
		return
	}
	now := b.now()
	l.arrived(m, len(data), now)
	if m.kind != kindPacket {
		return
	}
	l.receivedPackets.Add(1)
	b.use(now)

	r := &b.receiving
	r.Lock()
	defer r.Unlock()
	if r.closed {
		return
	}
	var packet *buffer
	if m.first || m.second {
		if l.removed.Load() {
			return // its halves are freed already
		}
		var dropped int
		packet, dropped = join(&l.halves, m, now, b.timing.ReassemblyAge)
		b.drops[dropReassembly].Add(uint64(dropped))
		if packet == nil {
			return
		}
	} else {
		packet = newBuffer(m.packet)
		packet.lane, packet.sequence, packet.explicit = m.lane, m.sequence, m.explicit
	}
	b.order(l, packet, now)
}

// order puts a packet in its lane and delivers what that lets go. The caller holds
// receiving.
func (b *Bond) order(from *Link, packet *buffer, now time.Duration) {
	r := &b.receiving
	ln := r.lanes[packet.lane]
	if ln == nil {
		ln = newLane(classOf(packet.lane))
		r.lanes[packet.lane] = ln
	}
	before, count := ln.held.count, len(r.undelivered)
	var o outcome
	if classOf(packet.lane) == Interactive {
		if o.verdict = ln.pass(packet.sequence, now, b.timing.LaneSilence); o.verdict == fresh {
			r.undelivered = append(r.undelivered, packet)
		}
	} else {
		ln.spread = r.spread
		r.undelivered, o = ln.order(r.undelivered, packet, from, now, b.timing)
	}
	switch {
	case o.verdict == seenBefore:
		b.duplicates.Add(1)
		packet.free()
	case o.verdict == tooOld:
		b.drop(dropLate)
		packet.free()
	case o.late:
		b.reordered.Add(1)
	}
	if o.short {
		b.noteWaited(r.hold+r.hold/4+time.Millisecond, now)
	} else if o.waited > 0 {
		b.noteWaited(o.waited, now)
	}
	r.held += ln.held.count - before
	if r.held*bufferBytes > maxHeldBytes {
		r.held -= ln.held.count
		r.undelivered = ln.flush(r.undelivered)
	}
	if ln.held.count > 0 {
		r.holding[ln] = struct{}{}
		if ln.held.first.at+r.hold < time.Duration(b.nextRun.Load()) {
			b.wake()
		}
	} else if before > 0 {
		delete(r.holding, ln)
	}
	b.deliver(count)
}

// noteWaited learns how long packets must be waited for: the longest time of the
// last seconds. The caller holds receiving.
func (b *Bond) noteWaited(waited, now time.Duration) {
	r := &b.receiving
	switch {
	case waited > r.waited:
		r.waited, r.waitedAt = waited, now
	case now-r.waitedAt > 5*time.Second:
		r.waited, r.waitedAt = max(waited, r.waited*3/4), now
	default:
		return
	}
	b.setHold()
}

func (b *Bond) setHold() {
	r := &b.receiving
	hold := r.waited + r.waited/4
	if r.spread > 0 {
		// What is lost is mostly known sooner, by what follows on the same link.
		// This is for links of which one stops for a moment.
		hold = max(hold, r.spread+stall)
	}
	r.hold = min(max(hold, b.timing.MinHold), b.timing.MaxHold)
}

// deliver tells deliverAll that there is more than count. The caller holds
// receiving.
func (b *Bond) deliver(count int) {
	r := &b.receiving
	for len(r.undelivered) > maxUndelivered {
		last := len(r.undelivered) - 1
		r.undelivered[last].free()
		r.undelivered = r.undelivered[:last]
		b.drop(dropDeliver)
	}
	if len(r.undelivered) > count {
		r.arrived.Signal()
	}
}

// deliverAll delivers until the Bond ends.
func (b *Bond) deliverAll() {
	r := &b.receiving
	var spare []*buffer
	packets := make([][]byte, 0, deliverBatch)
	for {
		r.Lock()
		for len(r.undelivered) == 0 && !r.closed {
			r.arrived.Wait()
		}
		all := r.undelivered
		r.undelivered = spare[:0]
		r.Unlock()
		if len(all) == 0 {
			return
		}
		now := b.now()
		for batch := range slices.Chunk(all, deliverBatch) {
			packets = packets[:0]
			for _, packet := range batch {
				if p := b.check(packet, now); p != nil {
					packets = append(packets, p)
				}
			}
			if len(packets) > 0 {
				b.config.Deliver(packets)
			}
			for _, packet := range batch {
				packet.free()
			}
		}
		clear(all)
		spare = all
	}
}

// check gives a packet as Deliver is to have it, nil if it is dropped.
func (b *Bond) check(packet *buffer, now time.Duration) []byte {
	header, err := Parse(packet.packet())
	if err != nil || header.Length != packet.length() {
		b.drop(dropMalformed)
		return nil
	}
	if b.config.Accept != nil && !b.config.Accept(header) {
		b.drop(dropRefused)
		return nil
	}
	b.flows.receive(header, b.flows.hash(header), now, classOf(packet.lane), packet.explicit)
	b.deliveredPackets.Add(1)
	b.deliveredByte.Add(uint64(packet.length()))
	return packet.data[maxHeadroom-b.config.Headroom : packet.end]
}

// tick does what is due at now, and says when to do so again.
func (b *Bond) tick(now time.Duration) (next time.Duration) {
	next = b.tickLinks(now)
	r := &b.receiving
	r.Lock()
	count := len(r.undelivered)
	for l := range r.holding {
		before := l.held.count
		r.undelivered = l.expire(r.undelivered, now, r.hold)
		r.held += l.held.count - before
		if l.held.count == 0 {
			delete(r.holding, l)
		} else {
			next = min(next, l.held.first.at+r.hold)
		}
	}
	b.deliver(count)
	r.Unlock()
	b.logDrops(now)
	return next
}

// tickLinks judges and probes the links.
func (b *Bond) tickLinks(now time.Duration) (next time.Duration) {
	links := *b.links.Load()
	inUse := now-time.Duration(b.used.Load()) < b.timing.IdleAfter
	watched := now-time.Duration(b.watched.Load()) < time.Second
	next = now + b.timing.ProbeIdle
	if inUse {
		next = min(next, time.Duration(b.used.Load())+b.timing.IdleAfter)
	}
	alive, alarmed, primaryFit := false, false, false
	least, most, jitter := time.Duration(1<<62), time.Duration(-1<<62), time.Duration(0)
	for _, l := range links {
		l.mutex.Lock()
		h := &l.health
		was := h.fit
		fit := h.judge(now, b.timing)
		silence := h.silence(now)
		heard := h.heard != 0
		alive = alive || l.sender(0) != nil && h.alive(now, b.timing)
		if h.arrivalKnown && (now-h.lastData < time.Second || fit && !l.backup.Load()) {
			least, most = min(least, h.arrival), max(most, h.arrival)
			jitter = max(jitter, h.arrivalJitter)
		}
		l.fit.Store(fit)
		l.usable.Store(heard && l.sender(0) != nil)
		l.mutex.Unlock()
		if was && !fit {
			b.logLink(l, "link of the bond is silent, its packets go elsewhere", "silence", silence)
			for _, waiting := range l.drain() {
				b.resend(waiting)
			}
			b.changed()
		}
		alarmed = alarmed || !fit && heard && silence < 10*time.Second
		primaryFit = primaryFit || fit && !l.backup.Load()
	}
	b.setAlive(alive)
	b.receiving.Lock()
	if b.receiving.spread = 0; most > least {
		b.receiving.spread = most - least + 4*jitter
	}
	b.setHold()
	dropped := 0
	for _, l := range links {
		dropped += freeHalves(&l.halves, now, b.timing.ReassemblyAge)
	}
	b.receiving.Unlock()
	b.drops[dropReassembly].Add(uint64(dropped))

	for _, l := range links {
		l.mutex.Lock()
		h := &l.health
		linkUsed := now-time.Duration(l.lastData.Load()) < time.Second
		every := b.timing.pace(usage{
			busy:       l.sentBytes.Load()-h.probedBytes > probeBytes || watched && l.kind == Datagram && !l.backup.Load(),
			linkUsed:   linkUsed,
			inUse:      inUse,
			backup:     l.backup.Load() && primaryFit,
			silence:    h.silence(now),
			unfit:      !h.fit,
			alarmed:    alarmed,
			unanswered: !alive,
		})
		due := h.probed + every
		waiting := h.silent != 0 && (h.fit || h.silence(now) < b.timing.DeadAfter)
		l.mutex.Unlock()
		if due <= now {
			l.probe(now, linkUsed)
			due = now + every
			waiting = true
		}
		if waiting {
			due = min(due, now+b.timing.UnfitAfter/8) // it may become unfit any moment
		}
		next = min(next, due)
	}
	return next
}

// logLink logs a change of a link, the same of an uplink at most once per minute.
func (b *Bond) logLink(l *Link, text string, more ...any) {
	now := b.now()
	key := l.name + " " + text
	b.logging.Lock()
	defer b.logging.Unlock()
	maps.DeleteFunc(b.logged, func(_ string, at time.Duration) bool { return now-at >= time.Minute })
	if _, lately := b.logged[key]; lately || len(b.logged) >= maxLogged {
		return
	}
	b.logged[key] = now
	b.log.Info(text, append([]any{"uplink", l.name, "carrier", l.kind}, more...)...)
}

// logDrops says once per minute what should not come at all.
func (b *Bond) logDrops(now time.Duration) {
	if now-b.dropsLoggedAt < time.Minute {
		return
	}
	var counts []any
	for _, reason := range []int{dropMalformed, dropRefused, dropOversized, dropReassembly, dropDeliver} {
		if total := b.drops[reason].Load(); total != b.dropsLogged[reason] {
			counts = append(counts, dropNames[reason], total-b.dropsLogged[reason])
			b.dropsLogged[reason] = total
		}
	}
	if len(counts) > 0 {
		b.dropsLoggedAt = now
		b.log.Warn("packets dropped by the bond, by reason", counts...)
	}
}

// ClassStats counts the packets that were given to links, each once.
type ClassStats struct{ Packets, Bytes uint64 }

// Stats is what a Bond did since it was made.
type Stats struct {
	Alive bool
	Links []LinkStats
	// Sent has the packets of each class that were given to links.
	Sent map[Class]ClassStats
	// Delivered counts what was given to Deliver.
	Delivered ClassStats
	// Duplicates counts second copies; Reordered packets that were delivered
	// after later ones of their lane.
	Duplicates, Reordered uint64
	// Drops has the same keys at all times: malformed, refused, oversized, queue,
	// no_link, late, reassembly, deliver. A packet of which a copy got through may
	// be counted.
	Drops map[string]uint64
	// Hold is how long bulk packets wait at most for those before them.
	Hold time.Duration
}

// Stats reads the counters.
func (b *Bond) Stats() Stats {
	now := b.now()
	s := Stats{
		Alive:      b.Alive(),
		Sent:       map[Class]ClassStats{},
		Delivered:  ClassStats{b.deliveredPackets.Load(), b.deliveredByte.Load()},
		Duplicates: b.duplicates.Load(),
		Reordered:  b.reordered.Load(),
		Drops:      map[string]uint64{},
	}
	for class := range b.sentPackets {
		s.Sent[Class(class)] = ClassStats{b.sentPackets[class].Load(), b.sentBytes[class].Load()}
	}
	for reason, name := range dropNames {
		s.Drops[name] = b.drops[reason].Load()
	}
	for _, l := range *b.links.Load() {
		s.Links = append(s.Links, l.stats(now))
	}
	b.receiving.Lock()
	s.Hold = b.receiving.hold
	b.receiving.Unlock()
	return s
}
