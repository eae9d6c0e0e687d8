package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Messages is one way for messages between the two ends: a stream, which is a
// session, or datagrams, which are a QUIC connection. What the messages say is
// not this package's concern.
//
//	Send ─▶ room in the kernel? ─ PACKET ─▶ TLS, MPTCP ─▶ Receive ─▶ Receiver.Message   (stream)
//	Send ─▶ room in quic-go? ─ DATAGRAM ─▶ QUIC ───────▶ Receive ─▶ Receiver.Message   (datagrams)
type Messages interface {
	// Send sends one message. It waits while the way has no room, so that what has
	// to wait waits with the caller. A message that does not fit now gives a
	// *TooLargeError; after any other error the way has ended. The message is the
	// caller's again when Send returns.
	Send(message []byte) error
	// MaxMessage is the longest message that Send takes now, in bytes. With
	// datagrams it grows as the path MTU is discovered.
	MaxMessage() int
	// SendControl sends the JSON of the router's wishes, or what became of them, of
	// at most 64 KiB, reliably and in order. Datagrams carry none: ErrNoControl.
	SendControl(body []byte) error
	// Receive calls the receiver from this goroutine until the way ends, and
	// returns why. It is to be called once, and soon: what arrives waits for it.
	Receive(Receiver) error
	// Close ends the way for both ends.
	Close() error
	// Done is closed when the way has ended; then Err says why.
	Done() <-chan struct{}
	Err() error
}

// Receiver takes what arrives. The bytes are valid until the function returns. A
// nil function ignores its kind.
type Receiver struct {
	Message func(message []byte)
	Control func(body []byte)
}

// Wishes are what a router asks of its concentrator: the body of CONFIG, in JSON.
type Wishes struct {
	// Forwards are the concentrator's ports to be opened for it.
	Forwards []Port `json:"forwards"`
	// Backup names the uplinks that carry only while no other is fit. Stream says
	// that the stream carrier is more than that: some uplink has no other.
	Backup []string `json:"backup"`
	Stream bool     `json:"stream"`
	// Scheduler is the packet scheduler that the router's sessions are to be sent by.
	Scheduler string `json:"scheduler,omitempty"`
	// CongestionControl is that of the router's sessions: auto, cubic or bbr.
	CongestionControl string `json:"congestion_control,omitempty"`
	// Ranks are those that the scheduler asks of the subflows over each uplink.
	Ranks map[string]Rank `json:"ranks,omitempty"`
	// Legs are wanted of the concentrator for uplinks that strip MPTCP.
	Legs []Leg `json:"legs,omitempty"`
}

// Leg is one that a router wants: WireGuard within UDP, to the port of QUIC.
type Leg struct {
	Uplink string `json:"uplink"`
	Key    []byte `json:"key"` // of the router, for this leg alone
}

// Port is a port of a concentrator.
type Port struct {
	Protocol string `json:"protocol"` // tcp, udp
	Port     uint16 `json:"port"`
}

// Answers are what became of Wishes: the body of STATE, in JSON.
type Answers struct {
	Forwards []PortAnswer `json:"forwards"`
	// Scheduler is the one that is really used, SchedulerReason why it is not the
	// one that was asked for.
	Scheduler       string `json:"scheduler,omitempty"`
	SchedulerReason string `json:"scheduler_reason,omitempty"`
	// So it is with the congestion control.
	CongestionControl       string      `json:"congestion_control,omitempty"`
	CongestionControlReason string      `json:"congestion_control_reason,omitempty"`
	Legs                    []LegAnswer `json:"legs,omitempty"`
}

// LegAnswer is what became of one Leg.
type LegAnswer struct {
	Leg
	// Far is the concentrator's key, empty if it refuses; Reason says why.
	Far    []byte `json:"far,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Address4 and Address6 are the router's within the leg.
	Address4 netip.Addr `json:"address4,omitzero"`
	Address6 netip.Addr `json:"address6,omitzero"`
}

// PortAnswer is what became of one Port.
type PortAnswer struct {
	Port
	State  string `json:"state"`            // active, refused
	Reason string `json:"reason,omitempty"` // of a refusal
}

// Inner are the addresses of a router and of its concentrator inside the tunnel;
// those of a family that the tunnel does not carry are invalid.
type Inner struct{ Address4, Address6, Gateway4, Gateway6 netip.Addr }

// TooLargeError says that a message does not fit. It is about this message only.
type TooLargeError struct{ Max int }

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("the message is longer than the %d bytes that fit now; split it", e.Max)
}

// ErrNoControl is returned by SendControl of datagrams.
var ErrNoControl = errors.New("datagrams carry no control messages; use a stream")

// inner checks the addresses that a concentrator has given.
func (w welcome) inner() (Inner, error) {
	for _, a := range []netip.Addr{w.Inner4, w.Gateway4} {
		if a.IsValid() && !a.Is4() {
			return Inner{}, fmt.Errorf("%w: WELCOME with %s for IPv4", errProtocol, a)
		}
	}
	for _, a := range []netip.Addr{w.Inner6, w.Gateway6} {
		if a.IsValid() && (!a.Is6() || a.Is4In6() || a.Zone() != "") {
			return Inner{}, fmt.Errorf("%w: WELCOME with %s for IPv6", errProtocol, a)
		}
	}
	return Inner{w.Inner4, w.Inner6, w.Gateway4, w.Gateway6}, nil
}

// DialStream opens a session for messages, over whichever path answers first;
// each gets a head start of 400 ms over the next. The kernel then uses all
// uplinks. bond is a number other than 0 that all carriers of one start of this
// router have in common.
func (p *Peer) DialStream(ctx context.Context, paths []Path, bond uint64) (Messages, Inner, error) {
	type greeted struct {
		session *Session
		inner   Inner
	}
	list := attempts(paths, p.Addresses)
	if len(list) == 0 {
		return nil, Inner{}, p.unreachable()
	}
	won, _, err := race[greeted]{
		dial: func(ctx context.Context, a attempt) (greeted, error) {
			s, w, err := p.greet(ctx, a.source, a.address, hello{Role: rolePackets, Bond: bond})
			if err != nil {
				return greeted{}, err
			}
			inner, err := w.inner()
			if err != nil {
				s.Close()
			}
			return greeted{s, inner}, err
		},
		drop: func(g greeted) { g.session.Close() },
	}.run(ctx, list)
	if err != nil {
		return nil, Inner{}, err
	}
	won.session.decoder.packets = true
	m := newStream(won.session, frameConfig, frameState)
	go m.watch()
	return m, won.inner, nil
}

func (p *Peer) unreachable() error {
	return fmt.Errorf("no uplink has an address of the family of %v", p.Addresses)
}

const (
	// lookAgain is how soon a sender looks for room in the kernel again.
	lookAgain = 500 * time.Microsecond
	// unwatched is how much is written at most between two looks.
	unwatched = 16 << 10

	// A stream on which nothing comes for streamSilence is asked for a sign of
	// life, and given up after as long again. Whoever sends messages asks more
	// often; this is so that no dead session lingers.
	streamSilence = 10 * time.Second
)

// stream is a session of role packets.
type stream struct {
	session      *Session
	sends, takes frameKind // of control messages: CONFIG and STATE, or the reverse

	sending sync.Mutex // held while waiting for room
	credit  int        // bytes that may be written without looking
	look    *time.Timer

	answering atomic.Bool // a PONG is on its way
}

func newStream(s *Session, sends, takes frameKind) *stream {
	look := time.NewTimer(time.Hour)
	look.Stop()
	return &stream{session: s, sends: sends, takes: takes, look: look}
}

func (m *stream) MaxMessage() int       { return maxMessage }
func (m *stream) Done() <-chan struct{} { return m.session.done }

func (m *stream) Close() error {
	m.session.Close()
	return nil
}

func (m *stream) Err() error {
	if !isClosed(m.session.done) {
		return nil
	}
	return m.session.err
}

func (m *stream) Send(message []byte) error {
	if len(message) > maxMessage {
		return &TooLargeError{maxMessage}
	}
	if err := m.waitRoom(len(message) + frameHeader); err != nil {
		m.session.fail(err)
		return m.session.err
	}
	b := borrow()
	putHeader(b.data[:], framePacket, len(message))
	n := frameHeader + copy(b.data[frameHeader:], message)
	err := m.session.send(b.data[:n])
	b.release()
	if err != nil {
		return m.session.err
	}
	m.session.sent.Add(uint64(len(message)))
	return nil
}

// waitRoom waits until n bytes more would be on their way soon.
func (m *stream) waitRoom(n int) error {
	m.sending.Lock()
	defer m.sending.Unlock()
	if err := m.session.wire.waitWritable(); err != nil {
		return err
	}
	for m.credit -= n; m.credit < 0; {
		waiting, err := m.session.wire.backlog(m.session.multipath)
		if err != nil {
			return err
		}
		if room := waiting.room(); room > 0 {
			m.credit = min(room, unwatched)
			return nil
		}
		m.look.Reset(lookAgain)
		select {
		case <-m.look.C:
		case <-m.session.done:
			return m.session.err
		}
	}
	return nil
}

func (m *stream) SendControl(body []byte) error {
	if len(body) > maxWishes {
		return &TooLargeError{maxWishes}
	}
	if m.session.send(appendFrame(nil, m.sends, body)) != nil {
		return m.session.err
	}
	return nil
}

func (m *stream) Receive(r Receiver) error {
	m.session.fail(m.readPackets(r))
	return m.session.err
}

func (m *stream) readPackets(r Receiver) error {
	s := m.session
	s.wire.blocking = false
	for {
		if err := s.wire.fill(); err != nil {
			return err
		}
		for empty := false; !empty; {
			b := borrow()
			n, err := s.readAvailable(b.data[:])
			handleErr := m.handle(b.data[:n], r)
			b.release()
			switch empty = errors.Is(err, errWouldBlock); {
			case handleErr != nil:
				return handleErr
			case err != nil && !empty:
				return err
			}
		}
	}
}

// handle takes the frames in what was read.
func (m *stream) handle(in []byte, r Receiver) error {
	s := m.session
	for len(in) > 0 {
		f, rest, ok, err := s.decoder.next(in)
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		in = rest
		switch {
		case f.kind == framePacket:
			s.received.Add(uint64(len(f.payload)))
			if r.Message != nil {
				r.Message(f.payload)
			}
		case f.kind == m.takes:
			if r.Control != nil {
				r.Control(f.payload)
			}
		case f.kind == framePing:
			// The reading must not wait for room to write: the peer's may wait for
			// ours. A PING that finds a PONG still on its way has its answer.
			if !m.answering.Swap(true) {
				go func() {
					_ = s.send(appendFrame(nil, framePong, nil))
					m.answering.Store(false)
				}()
			}
		case f.kind == framePong: // it was heard, which is all
		default:
			return fmt.Errorf("%w: %v on a session that carries packets", errProtocol, f.kind)
		}
	}
	return nil
}

// watch gives the stream up when the concentrator is silent for too long.
func (m *stream) watch() {
	tick := time.NewTicker(streamSilence / 4)
	defer tick.Stop()
	asking := make(chan struct{}, 1)
	for {
		select {
		case <-m.session.done:
			return
		case now := <-tick.C:
			silence := m.session.silence(now)
			if silence > 2*streamSilence {
				m.session.fail(fmt.Errorf("nothing came for %v", silence.Round(time.Second)))
				return
			}
			if silence < streamSilence {
				break
			}
			select {
			case asking <- struct{}{}:
				go func() { // writing may wait as long as the session lives
					_ = m.session.send(appendFrame(nil, framePing, nil))
					<-asking
				}()
			default:
			}
		}
	}
}
