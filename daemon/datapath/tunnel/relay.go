package tunnel

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// firstPayload is how long a new flow waits for the client's first bytes, so
	// that they travel with OPEN. Clients that speak first do so within a LAN
	// round trip; for the others OPEN then goes alone.
	firstPayload = 2 * time.Millisecond
	// gatherTime is how long the first bytes of an answer wait for those right
	// behind them: what is written apart travels over different uplinks.
	gatherTime = 300 * time.Microsecond
	// A flow begins with records of earlyRecord bytes, moved one full record's
	// worth at a time, until earlyBytes have passed: a short flow then never
	// makes its receiver hold a full record. 4 KiB records cost 0.5 %, so long
	// flows change over.
	earlyRecord = 4096
	earlyBytes  = 128 << 10
)

// flow is one LAN client's connection on its way through a session.
type flow struct {
	session *Session
	number  uint32
	local   *socket // towards the client, or at the concentrator towards the destination
	since   time.Time

	// Guarded by session.writing: what this end has said last.
	sentEnd, sentReset bool

	// Only the session's reading goroutine uses these.
	ended     bool // the peer's END or RESET has come
	discarded int

	deadline sync.Mutex // orders hurry before settle
	settled  bool

	halfClosed atomic.Bool // our FIN has gone to the local end
	aborted    atomic.Bool // local is closed: what still comes is discarded
	reason     atomic.Uint32
	finish     sync.Once
	finished   chan struct{} // closed when ended is set or the session is lost
	pumped     chan struct{} // closed when this end has sent its last frame
}

// newLocal takes over a flow's local connection. Until the flow is complete,
// whatever closes it, the end of this process included, is to be seen as RST.
func newLocal(c *net.TCPConn) (*socket, error) {
	if err := c.SetLinger(0); err != nil {
		return nil, err
	}
	return newSocket(c)
}

// close waits for the end of the flow, leaves the session fit for the next one
// and closes the local connection.
func (f *flow) close() {
	<-f.finished
	f.settle()
	if !f.aborted.Load() {
		_ = f.local.conn.SetLinger(-1) // complete: what is still to be sent is sent
	}
	_ = f.local.conn.Close()
}

func newFlow(s *Session, number uint32, local *socket) *flow {
	return &flow{session: s, number: number, local: local, since: time.Now(),
		finished: make(chan struct{}), pumped: make(chan struct{})}
}

// over says whether nothing more will be delivered to the local end.
func (f *flow) over() bool {
	return f.ended || f.aborted.Load()
}

// deliver writes a piece of DATA to the local end.
func (f *flow) deliver(p []byte) error {
	if !f.aborted.Load() {
		if _, err := f.local.conn.Write(p); err == nil {
			return nil
		}
		f.abort(ResetAborted)
	}
	f.discarded += len(p)
	if f.discarded > maxDiscard {
		return errors.New("too much data of an aborted flow")
	}
	return nil
}

func (f *flow) deliverEnd() {
	f.halfClosed.Store(true)
	if !f.aborted.Load() {
		_ = f.local.conn.CloseWrite()
	}
	f.setEnded()
}

func (f *flow) deliverReset(reason ResetReason) {
	f.reason.Store(uint32(reason))
	if !f.aborted.Swap(true) {
		f.local.abort()
		f.hurry()
	}
	f.setEnded()
}

func (f *flow) setEnded() {
	f.ended = true
	f.finish.Do(func() { close(f.finished) })
}

// sessionLost cuts the local end off with RST, unless both directions were
// complete: what was cut off must not look finished.
func (f *flow) sessionLost() {
	if !(isClosed(f.finished) && isClosed(f.pumped)) && !f.aborted.Swap(true) {
		f.local.abort()
	}
	f.finish.Do(func() { close(f.finished) })
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// abort gives the flow up because its local connection failed.
func (f *flow) abort(reason ResetReason) {
	if !f.aborted.Swap(true) {
		f.local.abort()
	}
	f.hurry()
	f.reset(reason)
}

// hurry bounds the time to agree on the end of an aborted flow.
func (f *flow) hurry() {
	f.deadline.Lock()
	defer f.deadline.Unlock()
	if !f.settled {
		_ = f.session.wire.SetDeadline(time.Now().Add(abortTime))
	}
}

// settle makes the session fit for the next flow.
func (f *flow) settle() {
	f.deadline.Lock()
	defer f.deadline.Unlock()
	f.settled = true
	_ = f.session.wire.SetDeadline(time.Time{})
}

func (f *flow) reset(reason ResetReason) {
	s := f.session
	s.writing.Lock()
	defer s.writing.Unlock()
	if f.sentReset {
		return
	}
	f.sentReset = true
	_ = s.sendLocked(resetFrame(f.number, reason))
}

func (f *flow) end() {
	s := f.session
	s.writing.Lock()
	defer s.writing.Unlock()
	if f.sentEnd || f.sentReset {
		return
	}
	f.sentEnd = true
	_ = s.sendLocked(appendFrame(nil, frameEnd, nil))
}

// answer begins a flow that the peer has opened: conn is its local end here, and
// done is called when the flow is over.
func (s *Session) answer(number uint32, conn *net.TCPConn, done func()) error {
	local, err := newLocal(conn)
	if err != nil {
		_ = conn.Close()
		done()
		return err
	}
	f := newFlow(s, number, local)
	s.flow.Store(f)
	if isClosed(s.done) {
		f.sessionLost()
	}
	go func() {
		f.pump(nil)
		f.close()
		done()
	}()
	return nil
}

// refuse answers OPEN with RESET. The flow never has a local end: what the peer
// had sent ahead is discarded until its own RESET or END.
func (s *Session) refuse(number uint32, reason ResetReason) error {
	f := newFlow(s, number, nil)
	f.aborted.Store(true)
	f.sentReset, f.settled = true, true
	close(f.pumped)
	s.flow.Store(f)
	return s.send(resetFrame(number, reason))
}

// pump moves the local end's bytes into the session until they end. opening is
// the OPEN frame to go first, empty at the end that the flow was opened towards.
func (f *flow) pump(opening []byte) {
	defer close(f.pumped)
	s := f.session
	moved, gated := 0, true
	for {
		if err := s.wire.waitWritable(); err != nil {
			s.fail(err)
			return
		}
		s.keepCalm()
		s.keepScheduler()
		s.keepRanks()
		if moved >= earlyBytes {
			s.keepPaced()
			now := time.Now()
			s.keepWindow(now, now.Sub(f.since))
		}
		record, limit := recordPayload, batch*recordPayload-frameHeader
		if moved < earlyBytes {
			record, limit = earlyRecord, recordPayload-frameHeader
			if gated {
				room := f.earlyRoom(limit)
				if gated = room >= 0; gated {
					limit = room
				}
			}
		}
		if len(opening) > 0 {
			_ = f.local.conn.SetReadDeadline(time.Now().Add(firstPayload))
		}
		gather := time.Duration(0)
		if moved == 0 && len(opening) == 0 {
			gather = gatherTime
		}
		b, n, end, err := f.local.readShort(headroom, limit, gather)
		if len(opening) > 0 {
			_ = f.local.conn.SetReadDeadline(time.Time{})
			if b == nil {
				// The client says nothing yet, or has left already: either way
				// the destination is to know of it.
				if s.send(opening) != nil {
					return
				}
				opening = nil
				if errors.Is(err, os.ErrDeadlineExceeded) {
					continue
				}
			}
		}
		switch {
		case b != nil:
			end = end && !f.lost()
			moved += n
			if !f.sendData(b, n, opening, record, end) || end {
				return
			}
			opening = nil
		case errors.Is(err, io.EOF) && !f.lost():
			f.end()
			return
		default:
			// The client's RST, or our own closing after the peer's RESET.
			f.abort(ResetAborted)
			return
		}
	}
}

// lost says whether what reads like the end of the local connection was a RST:
// the kernel reports it once, and delivering may have been told first. Then the
// socket is closed though we have not half-closed it.
func (f *flow) lost() bool { return !f.halfClosed.Load() && f.local.closed() }

// sendData sends the n bytes at b.data[headroom:], after opening if there is one
// and followed by END if that is all.
func (f *flow) sendData(b *buffer, n int, opening []byte, record int, end bool) bool {
	from := headroom - frameHeader
	putHeader(b.data[from:], frameData, n)
	from -= len(opening)
	copy(b.data[from:], opening)
	s := f.session
	s.writing.Lock()
	defer s.writing.Unlock()
	if f.sentReset {
		b.release()
		return false
	}
	s.sent.Add(uint64(n))
	s.spoke.Store(time.Now().UnixNano())
	to := headroom + n
	if end {
		f.sentEnd = true
		putHeader(b.data[to:], frameEnd, 0)
		to += frameHeader
	}
	return s.sendBuffer(b, from, to, record) == nil
}

// FlowAbortedError says why a flow ended before its time.
type FlowAbortedError struct{ Reason ResetReason }

func (e *FlowAbortedError) Error() string { return "flow aborted: " + e.Reason.String() }

// Relay carries a LAN client's connection to destination and returns when both
// directions have ended; client is closed then. The session can be used again
// unless it is Done. The error, if any, is of this flow.
func (s *Session) Relay(client *net.TCPConn, destination netip.AddrPort) error {
	return s.relay(client, func(b []byte, number uint32) []byte { return appendOpen(b, number, destination) })
}

// relay is Relay for either direction: opening appends the OPEN frame.
func (s *Session) relay(client *net.TCPConn, opening func(b []byte, number uint32) []byte) error {
	local, err := newLocal(client)
	if err != nil {
		_ = client.Close()
		return err
	}
	s.number++
	f := newFlow(s, s.number, local)
	s.flow.Store(f)
	if isClosed(s.done) { // it may have ended before it could see the flow
		f.sessionLost()
		return s.err
	}
	f.pump(opening(make([]byte, 0, maxOpen), f.number))
	f.close()
	switch {
	case !f.aborted.Load():
		return nil // complete, even if the session has ended right behind it
	case isClosed(s.done):
		return s.err
	}
	return &FlowAbortedError{ResetReason(f.reason.Load())}
}
