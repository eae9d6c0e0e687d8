package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The versions of the tunnel protocol that this code speaks.
const (
	minVersion = 1
	maxVersion = 1
)

const (
	// handshakeTime bounds everything from the TCP connection to WELCOME.
	handshakeTime = 10 * time.Second
	// idleTime is how long the concentrator keeps a session on which nothing
	// comes, with a flow or without; pingAfter is how long the router lets one be
	// silent, and the concentrator one with a flow.
	idleTime  = 100 * time.Second
	pingAfter = 30 * time.Second
	pingTime  = 4 * time.Second
	// abortTime bounds how long a session may take to agree on the end of an
	// aborted flow before it is given up.
	abortTime = 5 * time.Second
	// maxDiscard is how much of an aborted flow is read and thrown away to save
	// the session it came on.
	maxDiscard = 256 << 10
	// retireAfter closes a session before its keys protect more than RFC 8446
	// section 5.5 allows for AES-GCM (2^24.5 records, about 388 GB).
	retireAfter = 200 << 30
)

// keepAlive is for the sockets of sessions. Pings go over one subflow: this keeps
// the others' NAT mappings, which common carriers forget after 5 minutes, and
// ends the subflows of a peer that has gone. Go's default of 15 s would cost a
// metered uplink hundreds of megabytes a month.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 240 * time.Second, Interval: 30 * time.Second, Count: 4}

var (
	errSessionClosed = errors.New("session closed")
	errSilent        = fmt.Errorf("nothing has come for %v", idleTime)
)

// Session is one authenticated MPTCP connection between router and
// concentrator. It carries one flow at a time, one after the other.
type Session struct {
	wire      *wire
	tls       *tls.Conn
	decoder   decoder
	multipath bool   // MPTCP was negotiated; false: plain TCP
	token     uint32 // by which the kernel knows it, over MPTCP

	// open is set at the end that flows are opened towards: it reads the payload of
	// an OPEN frame and dials where the flow is to go.
	open func(payload []byte) error
	// calm, if set, says which congestion control flows are sent with.
	calm          *calm
	subflowsAsked asking // for signs of life; only Server.Tend uses it
	asked         int    // pings since the concentrator last heard of the session; only its sweep uses it
	// Only the goroutine that sends a flow uses these.
	calmed    bool // which one it is
	paced     bool // its subflows send no bursts
	scheduler string
	ranks     *ranking // that its subflows have had since ranked
	ranked    time.Time
	window    window

	writing sync.Mutex // held while records are written, and guards a flow's sent marks

	flow     atomic.Pointer[flow]
	number   uint32 // of the last flow opened
	pong     chan struct{}
	heard    atomic.Int64 // when something last arrived, Unix ns
	spoke    atomic.Int64 // when a flow last sent something, Unix ns
	sent     atomic.Uint64
	received atomic.Uint64
	account  account

	closing sync.Once
	ending  atomic.Bool // it is about to be closed, or has been
	err     error       // why the session ended; read after done is closed
	done    chan struct{}
}

func newSession(conn *net.TCPConn) (*Session, error) {
	w, err := newWire(conn)
	if err != nil {
		return nil, err
	}
	multipath, err := conn.MultipathTCP()
	if err != nil {
		return nil, err
	}
	if err := w.findOutOfTree(); err != nil {
		return nil, err
	}
	s := &Session{wire: w, multipath: multipath || w.outOfTree != nil, pong: make(chan struct{}, 1), done: make(chan struct{})}
	s.heard.Store(time.Now().UnixNano())
	return s, nil
}

// settle finds out, after the first bytes both ways, whether the session is over
// MPTCP for good. Until then a connection can still fall back to plain TCP: where
// the end of the handshake and the first bytes were lost, the next packet that gets
// through is taken for that of a peer without MPTCP (Linux 6.18).
func (s *Session) settle() error {
	if !s.multipath || s.wire.outOfTree != nil {
		return nil
	}
	info, err := s.wire.mptcpInfo()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOPROTOOPT) { // by the family of addresses
		s.multipath, err = false, nil
	}
	s.token = info.Token
	return err
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.done }

// Close ends the session, and with RST the flow on it, if any.
func (s *Session) Close() { s.fail(errSessionClosed) }

// abandon ends a session whose peer is not reached any more. Closed, the kernel
// would go on telling the peer for minutes (MPTCP's close_timeout, and TCP's
// retransmissions to addresses that are no more).
func (s *Session) abandon(err error) {
	s.ending.Store(true)
	s.wire.disconnect()
	s.fail(err)
}

func (s *Session) fail(err error) {
	s.closing.Do(func() {
		s.err = err
		s.ending.Store(true)
		_ = s.wire.Close()
		close(s.done)
		if f := s.flow.Load(); f != nil {
			f.sessionLost()
		}
	})
}

// hello is the payload of HELLO and ENROL.
type hello struct {
	Min      int    `json:"min"` // versions of this protocol that the router speaks
	Max      int    `json:"max"`
	Software string `json:"software,omitempty"`
	Secret   []byte `json:"secret,omitempty"` // ENROL only

	Role role   `json:"role,omitempty"`
	Bond uint64 `json:"bond,string,omitempty"` // role packets: which carriers belong together
	Link string `json:"link,omitempty"`        // role packets: the name of the uplink, empty for all
}

// role is what a session is for, as the router says in HELLO.
type role string

const (
	roleFlows   role = ""        // the router opens flows
	rolePackets role = "packets" // packets instead of flows
	roleInbound role = "inbound" // the concentrator opens flows
)

// welcome is the payload of WELCOME.
type welcome struct {
	Version int    `json:"version"`
	Router  string `json:"router"` // the name the concentrator has for the router

	// Role packets: the addresses of the router inside the tunnel, and of the
	// concentrator.
	Inner4   netip.Addr `json:"inner4,omitzero"`
	Inner6   netip.Addr `json:"inner6,omitzero"`
	Gateway4 netip.Addr `json:"gateway4,omitzero"`
	Gateway6 netip.Addr `json:"gateway6,omitzero"`
}

// RefusedError is the concentrator's REFUSE.
type RefusedError struct {
	Code    string `json:"code"` // stable: version, not_enrolled, token_unknown, token_used, token_expired, busy, protocol
	Message string `json:"message"`
}

func (e *RefusedError) Error() string { return "the concentrator refused: " + e.Message }

// The codes of a RefusedError.
const (
	CodeVersion      = "version"
	CodeNotEnrolled  = "not_enrolled"
	CodeTokenUnknown = "token_unknown"
	CodeTokenUsed    = "token_used"
	CodeTokenExpired = "token_expired"
	CodeBusy         = "busy" // the router has as many connections of this kind as it may
	CodeProtocol     = "protocol"
	CodeInternal     = "internal"
)

// negotiate picks the highest version that both ends speak.
func negotiate(peerMin, peerMax int) (int, error) {
	version := min(peerMax, maxVersion)
	if version < peerMin || version < minVersion {
		return 0, &RefusedError{CodeVersion, fmt.Sprintf(
			"the router speaks tunnel protocol version %d to %d, this concentrator %d to %d; bring the older of the two up to date",
			peerMin, peerMax, minVersion, maxVersion)}
	}
	return version, nil
}

// sendControl writes one frame with a JSON payload.
func (s *Session) sendControl(kind frameKind, payload any) error {
	frame, err := controlFrame(kind, payload)
	if err != nil {
		return err
	}
	_, err = s.tls.Write(frame)
	return err
}

func controlFrame(kind frameKind, payload any) ([]byte, error) {
	body, err := json.Marshal(payload)
	if err != nil {
		return nil, err
	}
	return appendFrame(nil, kind, body), nil
}

// receiveControl reads exactly one frame, and is used before the first flow
// only. A peer that sends more than that one frame breaks the protocol.
func (s *Session) receiveControl() (frameKind, []byte, error) {
	return receiveControl(s.tls, &s.decoder)
}

func receiveControl(from io.Reader, d *decoder) (frameKind, []byte, error) {
	in := make([]byte, maxControl+frameHeader)
	for {
		n, err := from.Read(in)
		if n > 0 {
			f, rest, ok, err := d.next(in[:n])
			switch {
			case err != nil:
				return 0, nil, err
			case ok && len(rest) > 0:
				return 0, nil, fmt.Errorf("%w: %d bytes follow the first message", errProtocol, len(rest))
			case ok:
				return f.kind, bytes.Clone(f.payload), nil
			}
		}
		if err != nil {
			return 0, nil, err
		}
	}
}

// run reads the session until it ends. It is the one goroutine that reads: the
// direction from the session to the local end of each flow is done here.
func (s *Session) run() {
	err := s.readFrames()
	s.fail(err)
}

func (s *Session) readFrames() error {
	s.wire.blocking = false
	empty := false // whether crypto/tls and the wire hold nothing more
	for {
		if f := s.flow.Load(); f != nil && !f.over() {
			// Wait for room at the receiver before taking bytes off the session,
			// so that the kernel's windows carry the back-pressure and no buffer
			// is held. Errors show at the write.
			_ = f.local.waitWritable()
		}
		if empty {
			if err := s.wire.fill(); err != nil {
				return err
			}
		}
		b := borrow()
		n, err := s.readAvailable(b.data[:])
		if err := s.dispatch(b, n); err != nil {
			return err
		}
		switch {
		case errors.Is(err, errWouldBlock):
			empty = true
		case err != nil:
			return err
		default:
			empty = false
		}
	}
}

// readAvailable decrypts what has arrived, without waiting for more.
func (s *Session) readAvailable(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = s.tls.Read(p[n:])
		n += m
	}
	if n > 0 {
		s.heard.Store(time.Now().UnixNano())
	}
	return n, err
}

// dispatch handles the frames in b.data[:n] and gives b back.
func (s *Session) dispatch(b *buffer, n int) error {
	in := b.data[:n]
	defer func() {
		if b != nil {
			b.release()
		}
	}()
	for len(in) > 0 {
		f, rest, ok, err := s.decoder.next(in)
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		if f.kind == frameOpen && b != nil {
			// Dialling may take seconds: do not hold the buffer for them.
			f.payload, rest = bytes.Clone(f.payload), bytes.Clone(rest)
			b.release()
			b = nil
		}
		if err := s.handle(f); err != nil {
			return err
		}
		in = rest
	}
	return nil
}

func (s *Session) handle(f fragment) error {
	current := s.flow.Load()
	switch f.kind {
	case frameData:
		if current == nil || current.ended {
			return fmt.Errorf("%w: DATA without an open flow", errProtocol)
		}
		s.received.Add(uint64(len(f.payload)))
		return current.deliver(f.payload)
	case frameEnd:
		if current == nil || current.ended {
			return fmt.Errorf("%w: END without an open flow", errProtocol)
		}
		current.deliverEnd()
		return nil
	case frameReset:
		number, reason, err := parseReset(f.payload)
		if err != nil {
			return err
		}
		// A RESET may cross the end of its flow: then it names one that is over.
		if current != nil && current.number == number {
			current.deliverReset(reason)
		}
		return nil
	case frameOpen:
		if s.open == nil {
			return fmt.Errorf("%w: OPEN from the end that flows are opened towards", errProtocol)
		}
		if current != nil {
			if !current.ended {
				return fmt.Errorf("%w: OPEN while a flow is open", errProtocol)
			}
			<-current.pumped // its last frame was sent, or we would not see OPEN
		}
		return s.open(f.payload)
	case framePing:
		return s.send(appendFrame(nil, framePong, nil))
	case framePong:
		select {
		case s.pong <- struct{}{}:
		default:
		}
		return nil
	}
	return fmt.Errorf("%w: unexpected %v", errProtocol, f.kind)
}

// send writes small frames at once.
func (s *Session) send(frames []byte) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	return s.sendLocked(frames)
}

func (s *Session) sendLocked(frames []byte) error {
	if _, err := s.tls.Write(frames); err != nil {
		s.fail(err)
		return err
	}
	return nil
}

// sendBuffer encrypts b.data[from:to], whole frames, in records of the given
// size, gives b back and then writes them all at once.
func (s *Session) sendBuffer(b *buffer, from, to, record int) error {
	s.wire.cork()
	var err error
	for at := from; at < to && err == nil; at += record {
		_, err = s.tls.Write(b.data[at:min(to, at+record)])
	}
	b.release()
	if flushErr := s.wire.flush(); err == nil {
		err = flushErr
	}
	if err != nil {
		s.fail(err)
	}
	return err
}

// busy says whether a flow is open on the session.
func (s *Session) busy() bool {
	f := s.flow.Load()
	return f != nil && !(isClosed(f.pumped) && isClosed(f.finished))
}

// silence is how long nothing has come from the peer.
func (s *Session) silence(now time.Time) time.Duration {
	return time.Duration(now.UnixNano() - s.heard.Load())
}

// pause is how long the session has carried nothing, either way.
func (s *Session) pause(now time.Time) time.Duration {
	return time.Duration(now.UnixNano() - max(s.heard.Load(), s.spoke.Load()))
}

// Ping asks the peer for a sign of life.
func (s *Session) Ping(ctx context.Context) error {
	select {
	case <-s.pong: // of an earlier ping that came late
	default:
	}
	if err := s.send(appendFrame(nil, framePing, nil)); err != nil {
		return err
	}
	select {
	case <-s.pong:
		return nil
	case <-s.done:
		return s.err
	case <-ctx.Done():
		return ctx.Err()
	}
}
