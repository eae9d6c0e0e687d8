package tunnel

import (
	"time"

	"golang.org/x/sys/unix"
)

// The path of two decisions: what the subflows deliver, lose and how long they take ─▶
// capacity ─┬▶ window.size ─▶ how many bytes a session may have under way ─▶ SO_SNDBUF
//
//	└▶ losses.look ─▶ whether an uplink loses packets ─▶ calm: the congestion control
//
// When a subflow dies, the kernel sends everything again from the oldest byte that
// is not acknowledged, behind what the other subflows have in their queues. Both
// are as long as the window, and with the tens of megabytes that the kernel grows
// it to, nothing arrives for as long as half a second. So the sender keeps it to
// what fills the uplinks.
const (
	// windowTimes is the window in products of rate and least round-trip time. One
	// is on the way; the others are for the queues, and for writers that wake up
	// late. Of two uplinks of 40 Mbit/s and 30 ms, 2 took 86 % of what they carry, 2.2
	// took 98 %, 2.5 and 3 all of it; when one was switched off nothing arrived for 75,
	// 90, 110 and 113 ms.
	windowTimes = 2.2
	// windowSpread is as much again of the difference between the uplinks' times:
	// what came by the fast one waits at the receiver for what the slow one brings.
	windowSpread = 3
	// windowLossy is as much again while an uplink loses packets: what is lost comes a
	// round trip later, and what the others bring waits for it at the receiver. Half as
	// much again because the kernel wakes a writer when a third of the window is free.
	windowLossy = 1.5
	// leastRTT stands for round-trip times that are shorter: at those the window
	// decides nothing, and the processors want to be used.
	leastRTT = 20 * time.Millisecond
	// leastWindow, in bytes, lets a transfer begin fast.
	leastWindow = 512 << 10
	// mostWindow, in bytes, is enough for 1 Gbit/s at 150 ms.
	mostWindow = 64 << 20
	// windowAfter is how long a flow lasts before what it reaches says anything about
	// rates: until then the subflows' windows are opening, and one for the session
	// would be in their way.
	windowAfter = 1500 * time.Millisecond
	// freshTime is how long a subflow that has come while the session sends counts as
	// freshTimes as much as the fastest delivers. What it delivers itself by then is
	// what the window allows it, and with a window for the others it stays at that.
	freshTime  = 1500 * time.Millisecond
	freshTimes = 2
	// windowEvery is how often a session that sends looks.
	windowEvery = 50 * time.Millisecond
	// A rate that was reached counts for less each time: senders pause.
	rateDecay = 0.95
	// windowChange is how much the window must differ to be set again.
	windowChange = 0.1
)

// window is what a session may have under way.
type window struct {
	looked time.Time
	joined time.Time // when the number of subflows last grew
	rate   float64   // bytes per second, of all subflows
	bytes  int       // as it was set; 0: the kernel's own
	losses losses
}

// capacity is what one look at the subflows finds.
type capacity struct {
	rate     float64       // bytes per second, of all
	fastest  float64       // of one
	rtt      time.Duration // the least of the slowest
	shortest time.Duration // and that of the fastest
	lanes    []lane
	lossy    bool // an uplink loses packets, or did so lately
}

// lane is what one subflow has sent, in segments, and whether its uplink's queue is
// short.
type lane struct {
	sent, again uint32
	short       bool
}

func (c *capacity) add(info *unix.TCPInfo) {
	rate := float64(info.Delivery_rate)
	c.rate += rate
	c.fastest = max(c.fastest, rate)
	rtt := time.Duration(info.Min_rtt) * time.Microsecond
	if c.rtt = max(c.rtt, rtt); c.shortest == 0 || rtt < c.shortest {
		c.shortest = rtt
	}
	const slack = 5000 // microseconds
	c.lanes = append(c.lanes, lane{info.Data_segs_out, info.Total_retrans, info.Rtt <= info.Min_rtt+info.Min_rtt/3+slack})
}

const (
	// An uplink loses packets when lossyShare of at least lossySegments, and at least
	// lossyLeast, were sent again while its queue was short: what a full queue drops
	// is congestion.
	lossyShare    = 0.003
	lossySegments = 200
	lossyLeast    = 3
	// lossesForgotten is after how many segments the counts are halved.
	lossesForgotten = 1600
)

// losses count, for each subflow, what was sent again though no queue was long.
type losses struct {
	before []lane
	counts []lossCount
}

type lossCount struct{ sent, again float64 }

// look takes a look's finding, and says whether an uplink loses packets.
func (l *losses) look(lanes []lane) (lossy bool) {
	before := l.before
	l.before = lanes
	if len(lanes) != len(before) { // one has come or gone, and they do not say which
		l.counts = make([]lossCount, len(lanes))
		return false
	}
	for i, now := range lanes {
		before, c := before[i], &l.counts[i]
		if now.short && before.short && now.sent >= before.sent && now.again >= before.again {
			c.sent += float64(now.sent - before.sent)
			c.again += float64(now.again - before.again)
		}
		lossy = lossy || c.sent >= lossySegments && c.again >= max(lossyLeast, lossyShare*c.sent)
		if c.sent > lossesForgotten {
			c.sent, c.again = c.sent/2, c.again/2
		}
	}
	return lossy
}

// size takes a look's finding. It says what the window is to be, and whether that
// is to be told to the kernel.
func (w *window) size(now time.Time, c capacity) (bytes int, set bool) {
	w.rate = max(c.rate, w.rate*rateDecay)
	if now.Sub(w.joined) < freshTime {
		w.rate = max(w.rate, c.fastest*float64(len(c.lanes)-1+freshTimes))
	}
	times := windowTimes
	if c.lossy {
		times += windowLossy
	}
	wanted := w.rate * (times*max(c.rtt, leastRTT).Seconds() + windowSpread*(c.rtt-c.shortest).Seconds())
	bytes = int(min(max(wanted, leastWindow), mostWindow))
	change := float64(bytes-w.bytes) / float64(max(w.bytes, 1))
	if -windowChange < change && change < windowChange {
		return w.bytes, false
	}
	w.bytes = bytes
	return bytes, true
}

// keepWindow makes the session's window what it should be, for a flow of this
// age. Only the goroutine that sends a flow's bytes calls it.
func (s *Session) keepWindow(now time.Time, age time.Duration) {
	if now.Sub(s.window.looked) < windowEvery {
		return
	}
	s.window.looked = now
	c, err := s.wire.capacity(s.multipath)
	if err != nil || c.rtt == 0 {
		return
	}
	if before := len(s.window.losses.before); before > 0 && len(c.lanes) > before {
		s.paced = false // the new one is not, and would be slow to open its window
		s.window.joined = now
	}
	if s.window.losses.look(c.lanes) {
		s.calm.noteLoss(now)
	}
	if age < windowAfter {
		return
	}
	c.lossy = s.calm.loses(now)
	if bytes, set := s.window.size(now, c); set {
		s.wire.setSendBuffer(bytes)
	}
}

// capacity reads what the subflows of a connection deliver.
func (s *socket) capacity(multipath bool) (capacity, error) {
	var c capacity
	err := s.eachSubflow(multipath, c.add)
	return c, err
}

// setSendBuffer bounds what is sent and not acknowledged, or not sent yet. The
// kernel doubles the number for its own overhead (socket(7)), which MPTCP hardly
// has: its bytes lie in pages shared by all subflows.
func (s *socket) setSendBuffer(bytes int) {
	_ = s.raw.Control(func(fd uintptr) {
		// Without CAP_NET_ADMIN the kernel's own sizing stays.
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, bytes/2)
	})
}
