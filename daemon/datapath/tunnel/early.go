package tunnel

import (
	"time"

	"golang.org/x/sys/unix"
)

// The path of a decision: a flow's first bytes ─▶ subflows, in the kernel's order
// ─▶ which one its scheduler will take ─▶ how much that can send at once ─▶ pump.
//
// The kernel's scheduler gives a write to the subflow that will have sent what it
// holds soonest, an idle one first, and up to 64 kB whether or not its congestion
// window has room. On a slow uplink the last bytes of a small page then wait a
// round trip for the window to open: 133 ms for 100 kB where 58 would do.

const (
	// earlyLook is how soon to look again when what the scheduler would take has no
	// room, and earlyWait how long that may go on.
	earlyLook = time.Millisecond
	earlyWait = 50 * time.Millisecond
	// leastEarly, in bytes, is written at least: less would be all headers.
	leastEarly = 2 << 10
	// restartWindow is the congestion window after a pause, in segments: TCP_INIT_CWND
	// of include/net/tcp.h (RFC 6928).
	restartWindow = 10
	// dssOption is the longest DSS option (RFC 8684 section 3.3), padded, in bytes.
	dssOption = 28
	// alike are two subflows of which either may be next.
	alike = 1.3
)

// early looks at the subflows of a connection in the kernel's order.
type early struct {
	subflows []subflowRoom
}

// subflowRoom is what one subflow can send.
type subflowRoom struct {
	rtt    time.Duration
	linger float64 // seconds that what it holds will take
	room   int     // bytes that it can send at once
	window int     // bytes of its whole congestion window
}

// add follows mptcp_subflow_get_send in net/mptcp/protocol.c. What the kernel
// counts there is what was sent and not acknowledged, and what was not sent.
func (e *early) add(info *unix.TCPInfo) {
	// What the kernel says leaves out MPTCP's own option.
	segment := max(info.Snd_mss, 2*dssOption) - dssOption
	window := info.Snd_cwnd
	if idle := info.Last_data_sent * 1000; info.Unacked == 0 {
		// It restarts (tcp_cwnd_restart in net/ipv4/tcp_output.c, RFC 5681 section 4.1).
		for ; idle > info.Rto && window > restartWindow; idle -= info.Rto {
			window = max(window/2, restartWindow)
		}
	}
	s := subflowRoom{
		rtt:    time.Duration(info.Rtt) * time.Microsecond,
		linger: float64(info.Unacked*info.Snd_mss+info.Notsent_bytes) / float64(max(info.Pacing_rate, 1)),
		window: int(window * segment),
	}
	if inFlight := info.Unacked - min(info.Unacked, info.Sacked+info.Lost) + info.Retrans; inFlight < window {
		s.room = max(0, int((window-inFlight)*segment)-int(info.Notsent_bytes))
	}
	e.subflows = append(e.subflows, s)
}

// room is how many bytes to write now: what the subflow that comes next can send,
// or each that may be next, as the kernel's figures are not quite these. The
// fastest may hold as much again as its window, which opens soon.
func (e *early) room() int {
	next, fastest := e.subflows[0], e.subflows[0].rtt
	for _, s := range e.subflows[1:] {
		if s.linger < next.linger {
			next = s
		}
		fastest = min(fastest, s.rtt)
	}
	room := -1
	for _, s := range e.subflows {
		if s.linger > next.linger*alike {
			continue
		}
		can := s.room
		if s.rtt <= fastest {
			can += s.window
		}
		if s.linger == 0 {
			return can // the first of those that are idle
		}
		if room < 0 || can < room {
			room = can
		}
	}
	return room
}

// earlyRoom waits until some of a flow's first bytes may be written, and says how
// many, up to most. It is negative once more bytes wait to be read than all
// subflows can send at once: then every one of them is to be kept busy, and what
// is slow has the time.
func (f *flow) earlyRoom(most int) int {
	s := f.session
	if !s.multipath || s.wire.outOfTree != nil { // that one's scheduler is another
		return -1
	}
	for begin := time.Now(); ; time.Sleep(earlyLook) {
		var e early
		if err := s.wire.eachSubflow(true, e.add); err != nil || len(e.subflows) == 0 {
			return -1
		}
		room := e.room()
		if room >= leastEarly || time.Since(begin) > earlyWait {
			room = max(room, leastEarly)
			return min(room-frameHeader-(room/earlyRecord+1)*recordOverhead, most)
		}
		if f.local.waiting() > e.windows() {
			return -1
		}
	}
}

// windows is the sum of what the subflows can have under way.
func (e *early) windows() int {
	sum := 0
	for _, s := range e.subflows {
		sum += s.window
	}
	return sum
}

// waiting is how many bytes wait to be read.
func (s *socket) waiting() (bytes int) {
	_ = s.raw.Control(func(fd uintptr) { bytes, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	return bytes
}
