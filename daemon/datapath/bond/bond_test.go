package bond

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The tests of this file run two Bonds over an in-memory network in synctest
// bubbles: time is virtual, so what they see does not depend on the machine; and
// a goroutine that is left behind fails the test.

// way is one direction of a link: a Carrier with a rate, a delay, a queue as
// quic-go's, and faults.
type way struct {
	delay   time.Duration
	rate    float64 // bytes per second
	max     atomic.Int64
	path    atomic.Int64  // longer messages are lost; 0 for none
	loss    atomic.Uint64 // per mille
	jitter  time.Duration // also reorders
	hole    atomic.Bool   // takes everything, delivers nothing
	stuck   atomic.Bool   // takes nothing
	refuses error         // of Send

	queue  chan []byte
	flight chan flight
	done   chan struct{}
	once   sync.Once
	random *rand.Rand
}

type flight struct {
	message []byte
	due     time.Time
}

func (w *way) Send(m []byte) error {
	if w.refuses != nil {
		return w.refuses
	}
	if len(m) > w.MaxMessage() {
		return &TooLargeError{Max: w.MaxMessage()}
	}
	if w.stuck.Load() {
		<-w.done
		return io.ErrClosedPipe
	}
	select {
	case w.queue <- slices.Clone(m):
		return nil
	case <-w.done:
		return io.ErrClosedPipe
	}
}

func (w *way) setLoss(share float64) { w.loss.Store(uint64(share * 1000)) }

func (w *way) MaxMessage() int { return int(w.max.Load()) }

func (w *way) Close() error {
	w.once.Do(func() { close(w.done) })
	return nil
}

// run carries messages to receive until the way is closed.
func (w *way) run(group *sync.WaitGroup, receive func([]byte)) {
	group.Go(func() {
		for {
			select {
			case <-w.done:
				return
			case m := <-w.queue:
				time.Sleep(time.Duration(float64(len(m)+60) / w.rate * float64(time.Second)))
				if path := w.path.Load(); path > 0 && len(m) > int(path) {
					continue
				}
				if w.hole.Load() || w.random.Uint64N(1000) < w.loss.Load() {
					continue
				}
				f := flight{m, time.Now().Add(w.delay)}
				if w.jitter > 0 {
					group.Go(func() {
						time.Sleep(w.delay + time.Duration(rand.Int64N(int64(w.jitter))))
						receive(f.message)
					})
					continue
				}
				select {
				case w.flight <- f:
				case <-w.done:
					return
				}
			}
		}
	})
	group.Go(func() {
		for {
			select {
			case <-w.done:
				return
			case f := <-w.flight:
				time.Sleep(time.Until(f.due))
				receive(f.message)
			}
		}
	})
}

func newWay(delay time.Duration, mbps float64) *way {
	w := &way{
		delay: delay, rate: mbps * 1e6 / 8,
		queue: make(chan []byte, carrierQueue), flight: make(chan flight, 10000), done: make(chan struct{}),
		random: rand.New(rand.NewPCG(1, uint64(delay))),
	}
	w.max.Store(MaxMessage)
	return w
}

// pair is two Bonds and what came out of them.
type pair struct {
	t      *testing.T
	near   *Bond
	far    *Bond
	group  sync.WaitGroup
	cancel context.CancelFunc

	mutex    sync.Mutex
	got      []uint32 // numbers of the packets at the far end
	at       []time.Duration
	back     int // packets at the near end
	alive    []bool
	start    time.Time
	received func([]byte) // at the far end, may be nil
}

func newPair(t *testing.T) *pair { return newPairWith(t, Timing{ProbeIdle: 5 * time.Second}) }

func newPairWith(t *testing.T, timing Timing) *pair {
	p := &pair{t: t, start: time.Now()}
	log := slog.New(slog.DiscardHandler)
	p.near = New(Config{Log: log, Timing: timing, Headroom: 10, Deliver: func(packets [][]byte) {
		p.mutex.Lock()
		defer p.mutex.Unlock()
		p.back += len(packets)
	}, Alive: func(alive bool) {
		p.mutex.Lock()
		defer p.mutex.Unlock()
		p.alive = append(p.alive, alive)
	}})
	p.far = New(Config{Log: log, Timing: timing, Follow: true, Deliver: func(packets [][]byte) {
		p.mutex.Lock()
		defer p.mutex.Unlock()
		for _, packet := range packets {
			if p.received != nil {
				p.received(packet)
			}
			p.got = append(p.got, binary.BigEndian.Uint32(packet[28:]))
			p.at = append(p.at, time.Since(p.start))
		}
	}})
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	p.group.Go(func() { p.near.Run(ctx) })
	p.group.Go(func() { p.far.Run(ctx) })
	return p
}

// link joins both ends by a way each.
func (p *pair) link(name string, out, back *way) (near, far *Link) {
	return p.join(LinkConfig{Name: name, Carriers: []Carrier{out}}, LinkConfig{Name: name, Carriers: []Carrier{back}})
}

func (p *pair) join(n, f LinkConfig) (near, far *Link) {
	near, far = p.near.AddLink(n), p.far.AddLink(f)
	for _, c := range n.Carriers {
		c.(*way).run(&p.group, func(m []byte) { p.far.Receive(far, m) })
	}
	for _, c := range f.Carriers {
		c.(*way).run(&p.group, func(m []byte) { p.near.Receive(near, m) })
	}
	return near, far
}

// take gives the numbers that arrived since it was last called.
func (p *pair) take() []uint32 {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	got := p.got
	p.got, p.at = nil, nil
	return got
}

func (p *pair) settle() { time.Sleep(time.Second) }

// end stops both Bonds and checks that what they held is freed.
func (p *pair) end() {
	p.cancel()
	p.group.Wait()
	for _, b := range []*Bond{p.near, p.far} {
		if b.receiving.held != 0 || len(b.receiving.holding) != 0 || len(b.receiving.undelivered) != 0 {
			p.t.Errorf("after the end %d packets are held by %d lanes, %d undelivered", b.receiving.held, len(b.receiving.holding), len(b.receiving.undelivered))
		}
	}
}

// numbered makes a UDP packet with a number.
func numbered(number uint32, length int) []byte {
	packet := packet4(protocolUDP, "10.0.0.1", "192.0.2.1", 5000, 6000, 0, length)
	binary.BigEndian.PutUint32(packet[28:], number)
	return packet
}

// offer sends numbered packets at intervals.
func (p *pair) offer(first, count uint32, length int, every time.Duration) {
	start := time.Now()
	for i := range count {
		time.Sleep(time.Until(start.Add(time.Duration(i) * every)))
		p.near.Send(numbered(first+i, length))
	}
}

// expectAll wants the numbers from 0 up to count, in order if ordered.
func (p *pair) expectAll(count uint32, ordered bool) {
	p.t.Helper()
	p.mutex.Lock()
	defer p.mutex.Unlock()
	got := slices.Clone(p.got)
	if !ordered {
		slices.Sort(got)
	}
	if len(got) != int(count) {
		p.t.Errorf("%d packets arrived, want %d\nnear %+v\nfar %+v", len(got), count, p.near.Stats(), p.far.Stats())
		return
	}
	for i, number := range got {
		if number != uint32(i) {
			p.t.Errorf("packet %d arrived at place %d", number, i)
			return
		}
	}
}

func TestInteractiveSurvivesBlackHole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		a, aBack := newWay(5*time.Millisecond, 50), newWay(5*time.Millisecond, 50)
		b, bBack := newWay(20*time.Millisecond, 20), newWay(20*time.Millisecond, 20)
		p.link("a", a, aBack)
		p.link("b", b, bBack)
		p.settle()
		p.offer(0, 100, 228, 20*time.Millisecond)
		a.hole.Store(true)
		aBack.hole.Store(true)
		p.offer(100, 200, 228, 20*time.Millisecond)
		p.settle()
		p.expectAll(300, false)
		p.mutex.Lock()
		for i := 1; i < len(p.at); i++ {
			if gap := p.at[i] - p.at[i-1]; gap > 60*time.Millisecond {
				t.Errorf("no packet for %v", gap)
			}
		}
		p.mutex.Unlock()
		near, far := p.near.Stats(), p.far.Stats()
		if near.Links[0].Fit || !near.Links[1].Fit || far.Links[0].Fit {
			t.Errorf("fitness is wrong: near %+v\nfar %+v", near.Links, far.Links)
		}
		if far.Duplicates < 99 { // of the last a copy was on its way
			t.Errorf("%d second copies, want at least 99", far.Duplicates)
		}
		if near.Sent[Interactive].Packets != 300 || near.Sent[Bulk].Packets != 0 {
			t.Errorf("sent %+v, want 300 interactive packets", near.Sent)
		}

		a.hole.Store(false)
		aBack.hole.Store(false)
		p.settle()
		if s := p.near.Stats(); !s.Links[0].Fit {
			t.Error("the link is not fit again after its return")
		}
	})
}

// A path that takes shorter messages than the carrier knows loses the long ones
// in silence. Its carrier is closed, whose owner dials anew and learns.
func TestPathThatShrinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		a, b := newWay(5*time.Millisecond, 50), newWay(20*time.Millisecond, 20)
		aBack, bBack := newWay(5*time.Millisecond, 50), newWay(20*time.Millisecond, 20)
		p.link("a", a, aBack)
		p.link("b", b, bBack)
		p.settle()
		p.offer(0, 1000, 1400, 10*time.Millisecond)
		p.settle()
		p.expectAll(1000, true)
		closed := func(w *way) bool {
			select {
			case <-w.done:
				return true
			default:
				return false
			}
		}
		if closed(a) || closed(b) {
			t.Fatal("a carrier was closed though every message passed")
		}
		a.path.Store(1250)
		p.offer(1000, 1000, 1400, 10*time.Millisecond)
		if !closed(a) {
			t.Error("the carrier whose long messages are lost was not closed")
		}
		if closed(b) {
			t.Error("the other was")
		}
		// Where short ones are lost as well, it is the link that is silent.
		b.hole.Store(true)
		p.offer(2000, 1000, 1400, 10*time.Millisecond)
		if closed(b) {
			t.Error("a carrier was closed because the way is silent")
		}
	})
}

func TestBulkOverUnequalLinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		for i, l := range []struct {
			delay time.Duration
			mbps  float64
		}{{5 * time.Millisecond, 50}, {10 * time.Millisecond, 30}, {20 * time.Millisecond, 20}} {
			p.link(fmt.Sprint(i), newWay(l.delay, l.mbps), newWay(l.delay, l.mbps))
		}
		p.settle()
		// 85 Mbit/s of 100.
		const count = 20_000
		p.offer(0, count, 1400, 131764*time.Nanosecond)
		p.settle()
		p.expectAll(count, true)
		for _, l := range p.near.Stats().Links {
			if l.SentPackets < count/20 {
				t.Errorf("link %s carried %d packets of %d", l.Name, l.SentPackets, count)
			}
			if l.Loss > 0.001 || l.RTT <= 0 {
				t.Errorf("link %s shows loss %.3f and RTT %v", l.Name, l.Loss, l.RTT)
			}
		}
		if s := p.far.Stats(); s.Reordered != 0 || s.Duplicates != 0 {
			t.Errorf("%d packets late, %d copies, want none", s.Reordered, s.Duplicates)
		}
	})
}

// More than the links carry: they stay full, and what arrives is not stale.
func TestOverload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		p.link("a", newWay(5*time.Millisecond, 50), newWay(5*time.Millisecond, 50))
		p.link("b", newWay(20*time.Millisecond, 20), newWay(20*time.Millisecond, 20))
		p.settle()
		const every = 100 * time.Microsecond // 117 Mbit/s for 70, 3 s long
		p.mutex.Lock()
		p.start = time.Now()
		p.mutex.Unlock()
		p.offer(0, 30_000, 1400, every)
		p.settle()
		p.mutex.Lock()
		defer p.mutex.Unlock()
		if share := float64(len(p.got)*1466*8) / (3 * 70e6); share < 0.92 {
			t.Errorf("%.2f of what the links carry arrived", share)
		}
		timing := p.near.timing
		for i, number := range p.got {
			// In the queue, in the carrier, on the way, and held for order.
			limit := timing.BulkAge + carrierQueue*600*time.Microsecond + 25*time.Millisecond + timing.MaxHold
			if age := p.at[i] - time.Duration(number)*every; age > limit {
				t.Errorf("packet %d is %v old", number, age)
				break
			}
		}
	})
}

// Loss and reordering within the links: what the links delivered comes out, once,
// and nearly all of it in order.
func TestBulkOverFaultyLinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		for i := range 3 {
			out, back := newWay(time.Duration(5+10*i)*time.Millisecond, 40), newWay(time.Duration(5+10*i)*time.Millisecond, 40)
			out.setLoss(0.02)
			if i == 1 {
				out.jitter = 2 * time.Millisecond
			}
			p.link(fmt.Sprint(i), out, back)
		}
		p.settle()
		const count = 10_000
		p.offer(0, count, 1400, 150*time.Microsecond)
		p.settle()
		seen := map[uint32]bool{}
		behind, highest := 0, uint32(0)
		got := p.take()
		for _, number := range got {
			if seen[number] {
				t.Fatalf("packet %d was delivered twice", number)
			}
			seen[number] = true
			if number < highest {
				behind++
			}
			highest = max(highest, number)
		}
		s := p.far.Stats()
		arrived := uint64(0)
		for _, l := range s.Links {
			arrived += l.ReceivedPackets
		}
		if len(got) != int(arrived) || arrived < count*96/100 || arrived == count {
			t.Errorf("%d packets arrived of %d, %d were delivered: %+v", arrived, count, len(got), s)
		}
		if uint64(behind) != s.Reordered {
			t.Errorf("%d packets were delivered late, %d counted", behind, s.Reordered)
		}
		// Only the link that keeps no order itself may be behind.
		if behind > count*25/100 {
			t.Errorf("%d packets of %d were delivered late", behind, count)
		}
		loss := p.near.Stats().Links[0].Loss
		if loss < 0.002 || loss > 0.08 {
			t.Errorf("loss of 2 %% is taken for %.3f", loss)
		}
	})
}

func TestBulkLeavesSilentLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		a, aBack := newWay(5*time.Millisecond, 50), newWay(5*time.Millisecond, 50)
		p.link("a", a, aBack)
		p.link("b", newWay(10*time.Millisecond, 50), newWay(10*time.Millisecond, 50))
		p.settle()
		p.offer(0, 1000, 1400, 200*time.Microsecond) // 56 Mbit/s
		a.hole.Store(true)
		aBack.hole.Store(true)
		p.offer(1000, 1500, 1400, 400*time.Microsecond) // 28 Mbit/s for 600 ms
		p.settle()
		p.take()
		p.offer(0, 1000, 1400, 400*time.Microsecond)
		p.settle()
		p.expectAll(1000, true)
	})
}

func TestSplitPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		a, b := newWay(5*time.Millisecond, 50), newWay(5*time.Millisecond, 50)
		a.max.Store(1200)
		p.link("a", a, b)
		p.settle()
		var want []byte
		p.received = func(packet []byte) {
			if string(packet) != string(want) {
				t.Errorf("a packet of %d bytes came as %d others", len(want), len(packet))
			}
		}
		number := uint32(0)
		for length := 1190; length <= 1500; length += 1 {
			packet := numbered(number, length)
			for i := 32; i < length; i++ {
				packet[i] = byte(rand.Uint32())
			}
			number++
			p.mutex.Lock()
			want = packet
			p.mutex.Unlock()
			p.near.Send(packet)
			time.Sleep(20 * time.Millisecond)
		}
		p.expectAll(number, true)
		p.mutex.Lock()
		p.received = nil
		p.mutex.Unlock()

		// Both halves come by the same link, in whatever order; here some are lost.
		a.setLoss(0.1)
		for i := range uint32(1000) {
			p.near.Send(numbered(number+i, 1400))
			time.Sleep(time.Millisecond)
		}
		p.settle()
		if s := p.far.Stats(); s.Drops["reassembly"] == 0 || s.Drops["malformed"] != 0 {
			t.Errorf("drops %v, want some for reassembly and none malformed", s.Drops)
		}
		for _, h := range (*p.far.links.Load())[0].halves {
			if h.buffer != nil {
				t.Error("half a packet was kept")
			}
		}

		a.setLoss(0)
		a.max.Store(700)
		before := p.near.Stats().Drops["oversized"]
		p.near.Send(numbered(0, 1400))
		time.Sleep(100 * time.Millisecond)
		if got := p.near.Stats().Drops["oversized"] - before; got != 1 {
			t.Errorf("%d packets dropped as too large for two messages, want 1", got)
		}
	})
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		a := newWay(5*time.Millisecond, 50)
		near, _ := p.link("a", a, newWay(5*time.Millisecond, 50))
		p.settle()
		a.stuck.Store(true)
		send := func() {
			for i := range uint32(3000) {
				p.near.Send(numbered(i, 1400))
			}
			for i := range uint32(1000) { // DNS
				packet := numbered(i, 100)
				packet[23] = 53
				packet[22] = 0
				p.near.Send(packet)
			}
		}
		send()
		s := p.near.Stats()
		if s.Links[0].Queued > maxBulkQueue+maxInteractiveQueue*100 || s.Links[0].Queued < maxBulkQueue/2 {
			t.Errorf("%d bytes are queued", s.Links[0].Queued)
		}
		for range 20 { // past the ages, and past the end of the Bond's patience
			time.Sleep(100 * time.Millisecond)
			p.near.Send(numbered(0, 1400))
			if queued := p.near.Stats().Links[0].Queued; queued > maxBulkQueue+maxInteractiveQueue*100 {
				t.Errorf("%d bytes are queued", queued)
			}
		}
		s = p.near.Stats()
		if s.Alive || s.Links[0].Fit {
			t.Error("a carrier that takes nothing counts as fit")
		}
		if s.Drops["queue"] < 3000 || s.Drops["no_link"] == 0 {
			t.Errorf("drops %v, want at least 3000 of the queue and some without a link", s.Drops)
		}
		p.near.RemoveLink(near)
		p.near.RemoveLink(near)
		synctest.Wait()
		if s = p.near.Stats(); len(s.Links) != 0 {
			t.Errorf("the link is still there: %+v", s.Links)
		}
	})
}

func TestRemovedLinkMovesItsPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		a := newWay(5*time.Millisecond, 50)
		near, _ := p.link("a", a, newWay(5*time.Millisecond, 50))
		p.settle()
		p.offer(0, 1, 1400, 0) // the link is in use, so the next probe comes in 100 ms
		time.Sleep(50 * time.Millisecond)
		p.take()
		a.stuck.Store(true)
		const count = 40
		p.offer(0, 1, 1400, 0) // the one that is being sent is lost
		synctest.Wait()
		p.offer(0, count, 1400, 0)
		p.link("b", newWay(10*time.Millisecond, 50), newWay(10*time.Millisecond, 50))
		time.Sleep(100 * time.Millisecond) // until b has answered
		p.near.RemoveLink(near)
		p.settle()
		p.expectAll(count, true)
	})
}

// What waits on a link that falls silent goes elsewhere while it is young.
func TestSilentLinkMovesItsPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPairWith(t, Timing{UnfitAfter: 50 * time.Millisecond})
		defer p.end()
		a := newWay(5*time.Millisecond, 50)
		p.link("a", a, newWay(5*time.Millisecond, 50))
		p.link("b", newWay(10*time.Millisecond, 50), newWay(10*time.Millisecond, 50))
		p.settle()
		p.offer(0, 1, 1400, 0)
		time.Sleep(50 * time.Millisecond)
		p.take()
		a.stuck.Store(true)
		p.offer(0, 1, 1400, 0) // the one that is being sent is lost
		synctest.Wait()
		p.offer(0, 4, 1400, 0) // by then b would be earlier
		if s := p.near.Stats(); s.Links[0].Queued != 4*1400 {
			t.Fatalf("%d bytes are queued on the stuck link, want %d", s.Links[0].Queued, 4*1400)
		}
		p.settle()
		p.expectAll(4, true)
	})
}

// gate is a carrier that takes a message for each token.
type gate struct {
	tokens chan struct{}
	limit  atomic.Int64
	mutex  sync.Mutex
	taken  [][]byte
}

func (g *gate) Send(m []byte) error {
	if _, open := <-g.tokens; !open {
		return io.ErrClosedPipe
	}
	if len(m) > g.MaxMessage() {
		return errors.New("message too long")
	}
	g.mutex.Lock()
	defer g.mutex.Unlock()
	g.taken = append(g.taken, slices.Clone(m))
	return nil
}

func (g *gate) MaxMessage() int { return int(g.limit.Load()) }
func (g *gate) Close() error    { close(g.tokens); return nil }

// pass lets count messages through, and gives the kind of probes and the sequence
// of packets.
func (g *gate) pass(count int) (got []int) {
	for range count {
		g.tokens <- struct{}{}
	}
	synctest.Wait()
	g.mutex.Lock()
	defer g.mutex.Unlock()
	for _, bytes := range g.taken {
		if m, _ := decode(bytes); m.kind == kindPacket {
			got = append(got, int(m.sequence))
		} else {
			got = append(got, -int(m.kind))
		}
	}
	g.taken = nil
	return got
}

func TestSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(Config{Log: slog.New(slog.DiscardHandler), Deliver: func([][]byte) {}})
		g := &gate{tokens: make(chan struct{})}
		g.limit.Store(MaxMessage)
		l := b.AddLink(LinkConfig{Name: "a", Carriers: []Carrier{g}}) // without Run nothing probes it
		s := (*l.senders.Load())[0]
		defer func() {
			b.RemoveLink(l)
			b.workers.Wait()
		}()
		of := func(class Class, sequences ...uint32) (packets list) {
			for _, sequence := range sequences {
				one := newBuffer(numbered(sequence, 1400))
				one.at, one.lane, one.sequence = b.now(), uint8(class)*lanes, sequence
				packets.pushLast(one)
			}
			return packets
		}
		expect := func(what string, got []int, want ...int) {
			t.Helper()
			if !slices.Equal(got, want) {
				t.Errorf("%s: %v went out, want %v", what, got, want)
			}
		}
		s.enqueue(of(Bulk, 1), b.now(), false) // occupies the carrier
		synctest.Wait()
		s.enqueue(of(Bulk, 10, 11), b.now(), false)
		s.enqueue(of(Interactive, 20, 21), b.now(), false)
		s.enqueue(of(Bulk, 8, 9), b.now(), true)
		s.enqueueControl(control{number: 1})
		expect("probes, interactive, bulk, what is moved first", g.pass(8), 1, -kindProbe, 20, 21, 8, 9, 10, 11)

		s.enqueue(of(Bulk, 1), b.now(), false)
		synctest.Wait()
		s.enqueue(of(Interactive, 30), b.now(), false)
		s.enqueue(of(Bulk, 40), b.now(), false)
		time.Sleep(60 * time.Millisecond)
		s.enqueue(of(Interactive, 31), b.now(), false)
		time.Sleep(60 * time.Millisecond)
		expect("interactive packet too old", g.pass(3), 1, 31, 40)
		s.enqueue(of(Bulk, 1), b.now(), false)
		synctest.Wait()
		s.enqueue(of(Bulk, 50), b.now(), false)
		time.Sleep(150 * time.Millisecond)
		s.enqueue(of(Bulk, 51), b.now(), false)
		time.Sleep(60 * time.Millisecond)
		expect("bulk packet too old", g.pass(2), 1, 51)
		if drops := b.Stats().Drops["queue"]; drops != 2 {
			t.Errorf("%d packets dropped, want 2", drops)
		}

		// The path MTU shrinks while a message is being sent.
		s.enqueue(of(Bulk, 60), b.now(), false)
		synctest.Wait()
		g.limit.Store(1200)
		expect("halves", g.pass(3), 60, 60)

		// What is moved from another link goes before what waits.
		l.usable.Store(true)
		b.alive.Store(true)
		s.enqueue(of(Bulk, 1), b.now(), false)
		synctest.Wait()
		g.limit.Store(MaxMessage)
		s.enqueue(of(Bulk, 70, 71), b.now(), false)
		b.resend(of(Bulk, 68, 69))
		expect("moved", g.pass(6), 1, 1, 68, 69, 70, 71)
	})
}

// Packets that come just after they were given up make the hold longer.
func TestHoldGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		_, one := p.link("a", newWay(5*time.Millisecond, 50), newWay(5*time.Millisecond, 50))
		_, two := p.link("b", newWay(5*time.Millisecond, 50), newWay(5*time.Millisecond, 50))
		p.settle()
		receive := func(l *Link, sequence uint32) {
			m := append(make([]byte, packetHeader), numbered(sequence, 200)...)
			putPacketHeader(m, 0, lanes, sequence)
			p.far.Receive(l, m)
		}
		late := 0
		for i := range uint32(20) {
			receive(one, 4*i)
			receive(two, 4*i+1)
			receive(one, 4*i+3)
			before := p.far.Stats().Reordered
			time.Sleep(30 * time.Millisecond)
			receive(two, 4*i+2)
			late += int(p.far.Stats().Reordered - before)
		}
		if hold := p.far.Stats().Hold; late == 0 || late > 10 || hold < 30*time.Millisecond || hold > 60*time.Millisecond {
			t.Errorf("%d of 20 packets that are 30 ms behind were late, hold is %v", late, hold)
		}
	})
}

func TestCarrierFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		p.link("b", newWay(10*time.Millisecond, 50), newWay(10*time.Millisecond, 50))
		p.settle()
		dead := newWay(time.Millisecond, 50)
		dead.refuses = errors.New("the connection is closed")
		p.link("a", dead, newWay(time.Millisecond, 50))
		p.settle()
		p.offer(0, 500, 1400, time.Millisecond)
		p.settle()
		p.expectAll(500, true)
		if s := p.near.Stats(); s.Links[1].Fit || !s.Alive {
			t.Errorf("a link whose carrier failed counts as fit, or all as dead: %+v", s)
		}
	})
}

func TestStreamLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		var out, back []Carrier
		for range 3 {
			out, back = append(out, newWay(10*time.Millisecond, 30)), append(back, newWay(10*time.Millisecond, 30))
		}
		p.join(LinkConfig{Kind: Stream, Carriers: out}, LinkConfig{Kind: Stream, Carriers: back})
		p.settle()
		p.offer(0, 500, 1400, time.Millisecond)
		p.settle()
		p.expectAll(500, true)
		s := p.near.Stats()
		if s.Links[0].Kind != Stream || !s.Links[0].Fit || s.Links[0].SentPackets != 500 {
			t.Errorf("stream link %+v", s.Links[0])
		}
		// Only the carriers that bulk does not use carry on when it fails there.
		near := (*p.near.links.Load())[0]
		lane := laneOf(p.near.flows.hash(mustParse(t, numbered(0, 1400))), Bulk)
		used := near.sender(lane)
		if used == (*near.senders.Load())[0] {
			t.Error("bulk uses the carrier that is kept for interactive flows")
		}
		if near.sender(3) != (*near.senders.Load())[0] {
			t.Error("interactive flows do not use the first carrier")
		}
		used.dead.Store(true)
		if other := near.sender(lane); other == nil || other == used {
			t.Error("a dead carrier has no substitute")
		}
	})
}

func mustParse(t *testing.T, packet []byte) Header {
	h, err := Parse(packet)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		ended := false
		defer func() {
			if !ended {
				p.end()
			}
		}()
		expect := func(what string, want ...bool) {
			t.Helper()
			p.mutex.Lock()
			defer p.mutex.Unlock()
			if !slices.Equal(p.alive, want) {
				t.Errorf("%s: Alive was told %v, want %v", what, p.alive, want)
			}
		}
		p.settle()
		p.near.Send(numbered(0, 100))
		if s := p.near.Stats(); s.Drops["no_link"] != 1 {
			t.Errorf("without links: drops %v", s.Drops)
		}
		expect("without links")
		a, aBack := newWay(10*time.Millisecond, 50), newWay(10*time.Millisecond, 50)
		b, bBack := newWay(10*time.Millisecond, 50), newWay(10*time.Millisecond, 50)
		all := []*way{a, aBack, b, bBack}
		p.link("a", a, aBack)
		near, far := p.link("b", b, bBack)
		near.SetBackup(true)
		far.SetBackup(true)
		time.Sleep(50 * time.Millisecond)
		expect("a round trip after the links came", true)

		time.Sleep(time.Minute) // idle
		probes := p.near.Stats().Links[0].ReceivedBytes
		time.Sleep(time.Minute)
		probes = p.near.Stats().Links[0].ReceivedBytes - probes
		if most := uint64(13 * (probeLength + replyLength)); probes > most || probes == 0 {
			t.Errorf("%d bytes of probes in an idle minute, want at most %d", probes, most)
		}
		for _, w := range all {
			w.hole.Store(true)
		}
		p.near.Send(numbered(0, 100))
		time.Sleep(1400 * time.Millisecond)
		expect("before the time is over", true)
		time.Sleep(400 * time.Millisecond)
		expect("after it", true, false)
		time.Sleep(time.Minute)
		for _, w := range all {
			w.hole.Store(false)
		}
		time.Sleep(300 * time.Millisecond)
		expect("after the return", true, false, true)
		if s := p.near.Stats(); !s.Links[0].Fit || !s.Links[1].Fit {
			t.Errorf("links are not fit after the return: %+v", s.Links)
		}
		p.end()
		ended = true
		expect("after the end", true, false, true, false)
		late := newWay(time.Millisecond, 1)
		p.near.AddLink(LinkConfig{Carriers: []Carrier{late}})
		select {
		case <-late.done:
		default:
			t.Error("a link added after the end was not closed")
		}
		p.near.Send(numbered(0, 100))
	})
}

func TestBackup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		a, aBack := newWay(20*time.Millisecond, 50), newWay(20*time.Millisecond, 50)
		p.link("a", a, aBack)
		near, far := p.link("b", newWay(5*time.Millisecond, 50), newWay(5*time.Millisecond, 50))
		near.SetBackup(true)
		far.SetBackup(true)
		p.settle()
		p.offer(0, 200, 228, 10*time.Millisecond)
		p.offer(200, 200, 1400, time.Millisecond)
		p.settle()
		p.expectAll(400, false)
		if s := p.near.Stats(); s.Links[1].SentPackets != 0 {
			t.Errorf("the backup carried %d packets while the other was fit", s.Links[1].SentPackets)
		}
		a.hole.Store(true)
		aBack.hole.Store(true)
		p.offer(400, 200, 228, 10*time.Millisecond)
		p.settle()
		s := p.near.Stats()
		if s.Links[1].SentPackets < 150 {
			t.Errorf("the backup carried %d packets of 200 after the other failed", s.Links[1].SentPackets)
		}
	})
}

// An uplink that still receives but sends nothing is heard, and unfit.
func TestOneWayFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		a := newWay(5*time.Millisecond, 50)
		p.link("a", a, newWay(5*time.Millisecond, 50))
		p.link("b", newWay(10*time.Millisecond, 50), newWay(10*time.Millisecond, 50))
		p.settle()
		a.hole.Store(true)
		before := p.near.Stats().Links[0].ReceivedPackets
		for i := range uint32(900) {
			p.near.Send(numbered(i, 1400))
			p.far.Send(numbered(i, 1400))
			time.Sleep(time.Millisecond)
		}
		if s := p.near.Stats(); s.Links[0].Fit || s.Links[0].ReceivedPackets-before < 100 {
			t.Errorf("a link that answers no probes: %+v", s.Links[0])
		}
		p.settle()
		p.take()
		p.offer(0, 100, 1400, time.Millisecond)
		p.settle()
		p.expectAll(100, true)
	})
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t)
		defer p.end()
		p.link("a", newWay(5*time.Millisecond, 50), newWay(5*time.Millisecond, 50))
		p.link("b", newWay(10*time.Millisecond, 50), newWay(10*time.Millisecond, 50))
		p.near.SetRules([]Rule{{Class: Interactive, FirstPort: 6000, DSCP: -1}})
		p.settle()
		p.offer(0, 1, 1400, 0)
		time.Sleep(50 * time.Millisecond)
		for range 100 {
			p.far.Send(packet4(protocolUDP, "192.0.2.1", "10.0.0.1", 6000, 5000, 0, 1400))
			p.far.Send(packet4(protocolUDP, "192.0.2.1", "10.0.0.1", 6001, 5000, 0, 1400))
			time.Sleep(5 * time.Millisecond)
		}
		p.settle()
		if s := p.far.Stats(); s.Sent[Interactive].Packets != 100 || s.Sent[Bulk].Packets != 100 {
			t.Errorf("the way back was %+v, want 100 interactive and 100 bulk", s.Sent)
		}
		p.mutex.Lock()
		defer p.mutex.Unlock()
		if p.back != 200 {
			t.Errorf("%d packets came back, want 200", p.back)
		}
	})
}

// A Deliver that does not return stops nothing but deliveries.
func TestSlowDeliver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var delivered atomic.Int64
		b := New(Config{Log: slog.New(slog.DiscardHandler), Deliver: func(packets [][]byte) {
			<-release
			delivered.Add(int64(len(packets)))
		}, Accept: func(h Header) bool { return h.DestinationPort != 7 }})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			b.Run(ctx)
			close(done)
		}()
		w := newWay(time.Millisecond, 50)
		l := b.AddLink(LinkConfig{Carriers: []Carrier{w}})
		m := append(make([]byte, packetHeader), numbered(0, 200)...)
		receive := func() {
			for i := range uint32(3 * maxUndelivered) {
				putPacketHeader(m, 0, 0, i)
				b.Receive(l, m)
			}
		}
		receive()
		s := b.Stats()
		// The goroutine that delivers may have taken up to as many as may wait.
		if s.Drops["deliver"] < maxUndelivered || s.Drops["deliver"] > 2*maxUndelivered {
			t.Errorf("drops %v, want %d to %d of deliver", s.Drops, maxUndelivered, 2*maxUndelivered)
		}
		close(release)
		synctest.Wait()
		copy(m[packetHeader:], packet4(protocolUDP, "10.0.0.9", "192.0.2.1", 5, 7, 0, 200))
		putPacketHeader(m, 0, 1, 0)
		b.Receive(l, m)
		putPacketHeader(m, 0, 1, 1)
		m[packetHeader] = 0x55
		b.Receive(l, m)
		b.Receive(l, []byte{0xff})
		synctest.Wait()
		s = b.Stats()
		if s.Drops["refused"] != 1 || s.Drops["malformed"] != 2 {
			t.Errorf("drops %v, want 1 refused and 2 malformed", s.Drops)
		}
		if total := uint64(delivered.Load()) + s.Drops["deliver"]; total != 3*maxUndelivered || s.Delivered.Packets != uint64(delivered.Load()) {
			t.Errorf("%d delivered or dropped of %d, stats %+v", total, 3*maxUndelivered, s)
		}
		cancel()
		<-done
	})
}

// A peer that sends with gaps everywhere cannot make the Bond hold more than its
// bound.
func TestHeldIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(Config{Log: slog.New(slog.DiscardHandler), Deliver: func([][]byte) {}})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			b.Run(ctx)
			close(done)
		}()
		one := b.AddLink(LinkConfig{Carriers: []Carrier{newWay(time.Millisecond, 50)}})
		two := b.AddLink(LinkConfig{Carriers: []Carrier{newWay(time.Millisecond, 50)}})
		m := append(make([]byte, packetHeader), numbered(0, 1400)...)
		for lane := lanes; lane < 2*lanes; lane++ {
			putPacketHeader(m, 0, uint8(lane), 0)
			b.Receive(two, m)
			for i := range uint32(500) {
				putPacketHeader(m, 0, uint8(lane), 2+2*i)
				b.Receive(one, m)
				b.receiving.Lock()
				held := b.receiving.held
				b.receiving.Unlock()
				if held*bufferBytes > maxHeldBytes || held < 0 {
					t.Fatalf("%d packets are held", held)
				}
			}
		}
		time.Sleep(time.Second)
		b.receiving.Lock()
		if b.receiving.held != 0 || len(b.receiving.holding) != 0 {
			t.Errorf("%d packets of %d lanes are held for ever", b.receiving.held, len(b.receiving.holding))
		}
		b.receiving.Unlock()
		cancel()
		<-done
	})
}

// An answer that was not asked for changes nothing.
func TestUnaskedReply(t *testing.T) {
	var h health
	h.onReply(message{kind: kindReply, number: 5, time: time.Hour, received: 1}, time.Hour)
	h.onReply(message{kind: kindReply, number: 0}, time.Hour)
	if h.fit || h.rtt != 0 {
		t.Errorf("a link became fit by an answer to nothing: %+v", h)
	}
	number := h.onProbe(time.Hour)
	h.onReply(message{kind: kindReply, number: number}, time.Hour+20*time.Millisecond)
	h.onReply(message{kind: kindReply, number: number}, time.Hour+20*time.Second)
	if !h.fit || h.rtt != 20*time.Millisecond {
		t.Errorf("a second answer to one probe counted: RTT %v", h.rtt)
	}
}

func TestDecode(t *testing.T) {
	packet := append([]byte{0x13, 200, 1, 2, 3, 4}, 0x45)
	for _, c := range []struct {
		name  string
		bytes []byte
		want  message
		ok    bool
	}{
		{"packet", packet, message{kind: kindPacket, explicit: true, first: true, lane: 200, sequence: 0x01020304}, true},
		{"second half", change(slices.Clone(packet), func(p []byte) { p[0] = 0x14 }), message{kind: kindPacket, second: true, lane: 200, sequence: 0x01020304}, true},
		{"both halves", change(slices.Clone(packet), func(p []byte) { p[0] = 0x16 }), message{}, false},
		{"empty packet", packet[:6], message{}, false},
		{"long packet", append(slices.Clone(packet), make([]byte, MaxPacket)...), message{}, false},
		{"longer than all", make([]byte, MaxMessage+1), message{}, false},
		{"empty", nil, message{}, false},
		{"kind", []byte{0x18, 0, 0, 0, 0, 0, 1}, message{}, false},
		{"probe", appendProbe(nil, 7, 3*time.Second), message{kind: kindProbe, number: 7, time: 3 * time.Second}, true},
		{"padded probe", append(appendProbe(nil, 7, 3*time.Second), make([]byte, 1380)...), message{kind: kindProbe, number: 7, time: 3 * time.Second}, true},
		{"short probe", appendProbe(nil, 7, 3*time.Second)[:12], message{}, false},
		{"reply", appendReply(nil, 7, 3*time.Second, 99), message{kind: kindReply, number: 7, time: 3 * time.Second, received: 99}, true},
		{"long reply", append(appendReply(nil, 7, 3*time.Second, 99), 0), message{}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := decode(c.bytes)
			if (err == nil) != c.ok {
				t.Fatalf("error %v", err)
			}
			got.packet = nil
			if got.kind != c.want.kind || got.lane != c.want.lane || got.sequence != c.want.sequence || got.explicit != c.want.explicit ||
				got.first != c.want.first || got.second != c.want.second || got.number != c.want.number || got.time != c.want.time || got.received != c.want.received {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

// FuzzReceive gives a Bond messages cut from the input.
func FuzzReceive(f *testing.F) {
	inner := numbered(1, 60)
	whole := append([]byte{0x10, 200, 0, 0, 0, 1}, inner...)
	join := func(messages ...[]byte) (all []byte) {
		for _, m := range messages {
			all = append(binary.BigEndian.AppendUint16(all, uint16(len(m))), m...)
		}
		return all
	}
	f.Add(join(whole, whole, appendProbe(nil, 1, time.Second), appendReply(nil, 1, time.Second, 3)))
	f.Add(join(append([]byte{0x12, 200, 0, 0, 0, 1}, inner[:30]...), append([]byte{0x14, 200, 0, 0, 0, 1}, inner[30:]...)))
	f.Add(join(append([]byte{0x10, 3, 255, 255, 255, 255}, inner...), append([]byte{0x10, 3, 0, 0, 0, 0}, inner...)))
	f.Add(join(append([]byte{0x10, 130, 0, 0, 0, 9}, inner...), append([]byte{0x10, 130, 255, 0, 0, 0}, inner...), nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		var delivered int
		b := New(Config{Log: slog.New(slog.DiscardHandler), Headroom: 10, Deliver: func(packets [][]byte) {
			for _, p := range packets {
				delivered++
				if _, err := Parse(p[10:]); err != nil {
					t.Errorf("a malformed packet was delivered: %v", err)
				}
			}
		}})
		links := []*Link{
			b.AddLink(LinkConfig{Carriers: []Carrier{newWay(0, 1)}}),
			b.AddLink(LinkConfig{Carriers: []Carrier{newWay(0, 1)}}),
		}
		count := 0
		for ; len(data) >= 2; count++ {
			length := min(int(binary.BigEndian.Uint16(data)), len(data)-2)
			b.Receive(links[count%2], data[2:2+length])
			data = data[2+length:]
		}
		b.tick(b.now())
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		b.Run(ctx)
		if delivered > count {
			t.Errorf("%d packets of %d messages", delivered, count)
		}
	})
}

// sink takes everything.
type sink struct{}

func (s sink) Send([]byte) error { return nil }
func (s sink) MaxMessage() int   { return MaxMessage }
func (s sink) Close() error      { return nil }

func benchmarkSend(b *testing.B, links, length int) {
	bond := New(Config{Log: slog.New(slog.DiscardHandler), Deliver: func([][]byte) {}})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		bond.Run(ctx)
		close(done)
	}()
	for i := range links {
		l := bond.AddLink(LinkConfig{Name: fmt.Sprint(i), Carriers: []Carrier{sink{}}})
		for !l.usable.Load() {
			l.mutex.Lock()
			number := l.health.number
			l.mutex.Unlock()
			bond.Receive(l, appendReply(nil, number, 0, 0))
			time.Sleep(time.Millisecond)
		}
	}
	packet := numbered(0, length)
	b.ReportAllocs()
	b.SetBytes(int64(length))
	for b.Loop() {
		bond.Send(packet)
	}
	b.StopTimer()
	cancel()
	<-done
}

func BenchmarkSendBulk(b *testing.B)        { benchmarkSend(b, 3, 1400) }
func BenchmarkSendInteractive(b *testing.B) { benchmarkSend(b, 3, 100) }

func BenchmarkReceive(b *testing.B) {
	for _, lane := range []uint8{0, lanes} {
		b.Run(classOf(lane).String(), func(b *testing.B) {
			bond := New(Config{Log: slog.New(slog.DiscardHandler), Deliver: func([][]byte) {}})
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan struct{})
			go func() {
				bond.Run(ctx)
				close(done)
			}()
			l := bond.AddLink(LinkConfig{Carriers: []Carrier{sink{}}})
			m := append(make([]byte, packetHeader), numbered(0, 1400)...)
			sequence := uint32(0)
			b.ReportAllocs()
			b.SetBytes(1400)
			for b.Loop() {
				putPacketHeader(m, 0, lane, sequence)
				sequence++
				bond.Receive(l, m)
			}
			b.StopTimer()
			cancel()
			<-done
		})
	}
}

// A queue that stands delays every probe; a late one among others is none.
func TestStandingRTT(t *testing.T) {
	var h health
	if d := h.standingRTT(); d != 0 {
		t.Errorf("before any probe was answered: %v", d)
	}
	now := time.Hour
	for i, c := range []struct{ rtt, want int }{
		{30, 30}, {90, 30}, {20, 20}, {90, 20}, {60, 20}, {70, 20}, {60, 20}, {60, 20}, {60, 20}, {60, 20}, {60, 60}, {21, 21},
	} {
		number := h.onProbe(now)
		now += time.Duration(c.rtt) * time.Millisecond
		h.onReply(message{kind: kindReply, number: number}, now)
		if d := h.standingRTT(); d != time.Duration(c.want)*time.Millisecond {
			t.Errorf("after probe %d: %v, want %v ms", i+1, d, c.want)
		}
	}
}
