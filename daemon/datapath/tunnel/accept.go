package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

const (
	// maxUnknown bounds the connections that have not yet introduced themselves;
	// the newest are closed beyond it.
	maxUnknown = 512
	// maxSessions bounds one router's sessions.
	maxSessions = 16384

	sweepEvery = 10 * time.Second
)

// Admission decides who may use a concentrator.
type Admission interface {
	// Router returns the name of the router with an enrolled key.
	Router(PublicKey) (name string, ok bool)
	// Enrol redeems a token's secret for a key. Its error should be a
	// *RefusedError, whose message the router's operator reads.
	Enrol(secret []byte, key PublicKey) (name string, err error)
}

// DialFunc connects to a flow's destination for a router. When it fails, the
// reason is what the LAN client's router is told. done is called when the
// connection is no longer used.
type DialFunc func(ctx context.Context, router string, destination netip.AddrPort) (conn *net.TCPConn, done func(), reason ResetReason, err error)

// Server is the concentrator's end of the tunnel.
//
//	listener ─▶ TLS, first message (admit) ─┬▶ session ─ OPEN ─▶ DialFunc ─▶ relay
//	                                        ├▶ session parked (inbound.go) ─▶ OpenInbound ─ OPEN ─▶ relay
//	                                        └▶ session of packets (stream.go) ─▶ PacketsHandler
//	UDP socket ─▶ QUIC, first message (admit) ─▶ datagrams (datagram.go) ─▶ PacketsHandler
type Server struct {
	identity  *Identity
	admission Admission
	dial      DialFunc
	packets   PacketsHandler // nil: packets are refused
	log       *slog.Logger

	unknown chan struct{} // holds a token for every connection not introduced

	mu      sync.Mutex
	closed  bool
	routers map[PublicKey]*guest
	active  map[*Session]PublicKey
	carried map[*datagrams]PublicKey
	calm    map[PublicKey]*calm

	transports []*quic.Transport
}

// guest is one router at the server.
type guest struct {
	RouterActivity
	connections [uses]int
	parked      []*Session      // of role inbound, without a flow; the one used last is the last
	waiting     []chan *Session // connections to forwarded ports that wait for one
}

// use is what a connection of a router is for. Each is bounded by itself.
type use int

const (
	useFlows use = iota
	usePackets
	useInbound
	useDatagrams
	uses
)

// mostOf bounds one router's connections. A router keeps three sessions for
// packets and one QUIC connection for each uplink; what is left is for those of
// an earlier start that have not been noticed to be dead.
var mostOf = [uses]int{useFlows: maxSessions, usePackets: 8, useInbound: maxInbound, useDatagrams: 32}

func (u use) String() string {
	return [uses]string{"sessions for flows", "sessions for packets", "sessions for inbound flows", "QUIC connections"}[u]
}

// RouterActivity is what a server has seen of one router since it started.
type RouterActivity struct {
	Name     string
	Address  string // that the last session came from
	LastSeen time.Time
	Sessions int    // that the router opens flows on
	Flows    int    // open now, inbound ones included
	Received uint64 // payload bytes from the router, of ended connections and live ones
	Sent     uint64

	PacketSessions  int // the stream carrier
	Datagrams       int // the datagram carrier: QUIC connections
	InboundSessions int
}

// PacketsHandler receives the carriers of routers' packets.
type PacketsHandler interface {
	// Inner returns a router's addresses for its WELCOME. A *RefusedError is what
	// the router is told; another error is only logged.
	Inner(key PublicKey, name string) (Inner, error)
	// Attach serves one carrier until it ends, on a goroutine of its own; the
	// carrier is closed when it returns. Carriers with the same bond belong to one
	// start of the router. link is the uplink as the router names it: 1 to 32 of
	// a-z, 0-9 and -, or empty for a stream, which uses all.
	Attach(key PublicKey, name string, bond uint64, link string, datagram bool, m Messages)
}

// HandlePackets sets who receives packets. Call it before Serve.
func (v *Server) HandlePackets(h PacketsHandler) { v.packets = h }

// SetCalm is Pool.SetCalm for the sessions of one router.
func (v *Server) SetCalm(key PublicKey, on bool) { v.calmOf(key).on.Store(on) }

func (v *Server) calmOf(key PublicKey) *calm {
	v.mu.Lock()
	defer v.mu.Unlock()
	c := v.calm[key]
	if c == nil {
		c = newCalm(v.log)
		v.calm[key] = c
	}
	return c
}

// NewServer returns a server that listens nowhere yet.
func NewServer(id *Identity, admission Admission, dial DialFunc, log *slog.Logger) *Server {
	return &Server{
		identity: id, admission: admission, dial: dial, log: log,
		unknown: make(chan struct{}, maxUnknown),
		routers: map[PublicKey]*guest{}, active: map[*Session]PublicKey{},
		carried: map[*datagrams]PublicKey{}, calm: map[PublicKey]*calm{},
	}
}

// Serve accepts sessions until ctx ends, and then closes them all.
func (v *Server) Serve(ctx context.Context, listeners ...net.Listener) {
	var workers sync.WaitGroup
	for _, l := range listeners {
		workers.Go(func() { v.accept(ctx, l) })
	}
	workers.Go(func() { v.sweep(ctx) })
	<-ctx.Done()
	for _, l := range listeners {
		_ = l.Close()
	}
	workers.Wait()
	v.mu.Lock()
	v.closed = true // handshakes under way come to nothing
	v.mu.Unlock()
	v.closeWhere(func(PublicKey) bool { return true })
}

func (v *Server) accept(ctx context.Context, l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			// Out of descriptors or memory: the sessions that are there go on.
			v.log.Error("accepting a session failed; trying again in a second", "listener", l.Addr(), "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
			continue
		}
		select {
		case v.unknown <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		go v.welcome(ctx, conn.(*net.TCPConn))
	}
}

// welcome takes one connection from its first byte to the end of its session.
func (v *Server) welcome(ctx context.Context, conn *net.TCPConn) {
	_ = conn.SetDeadline(time.Now().Add(handshakeTime))
	s, g, err := v.introduce(conn)
	<-v.unknown
	if err != nil {
		_ = conn.Close()
		v.log.Warn("session refused", "remote", conn.RemoteAddr(), "key", fingerprintOrNone(g.key), "error", err)
		return
	}
	_ = conn.SetDeadline(time.Time{})
	defer v.leave(s, g)
	if !v.enter(s, g) {
		s.Close()
	}
	switch g.Role {
	case rolePackets:
		v.attach(g, newStream(s, frameState, frameConfig))
	case roleInbound:
		v.park(s, g.key)
		s.run()
		v.unpark(s, g.key)
	default:
		s.open = func(payload []byte) error { return v.open(ctx, s, g.key, g.Router, payload) }
		s.run()
	}
	if !errors.Is(s.err, errSessionClosed) {
		v.log.Debug("session ended", "router", g.Router, "role", g.Role, "remote", conn.RemoteAddr(), "error", s.err)
	}
}

// attach hands a carrier to the handler and closes it when that returns.
func (v *Server) attach(g greeting, m Messages) {
	if !isClosed(m.Done()) {
		v.packets.Attach(g.key, g.Router, g.Bond, g.Link, g.use == useDatagrams, m)
	}
	_ = m.Close()
}

func fingerprintOrNone(key PublicKey) string {
	if key == (PublicKey{}) {
		return "none"
	}
	return key.Fingerprint()
}

// greeting is what a first message and the answer to it have settled.
type greeting struct {
	hello
	welcome
	key PublicKey
	use use
}

// introduce completes TLS and answers the first message.
func (v *Server) introduce(conn *net.TCPConn) (*Session, greeting, error) {
	var g greeting
	s, err := newSession(conn)
	if err != nil {
		return nil, g, err
	}
	s.tls = tls.Server(s.wire, v.identity.serverConfig(alpn))
	if err := s.tls.Handshake(); err != nil {
		return nil, g, fmt.Errorf("TLS handshake: %w", err)
	}
	if g.key, err = peerKey(s.tls.ConnectionState(), alpn); err != nil {
		return nil, g, err
	}
	kind, body, err := s.receiveControl()
	if err != nil {
		return nil, g, fmt.Errorf("first message: %w", err)
	}
	g, err = v.admit(kind, body, g.key, false)
	if err != nil {
		return nil, g, errors.Join(err, s.sendControl(frameRefuse, refusal(err)))
	}
	if err := s.settle(); err != nil {
		v.release(g)
		return nil, g, err
	}
	s.decoder.packets = g.Role == rolePackets
	s.calm = v.calmOf(g.key)
	if err := s.sendControl(frameWelcome, g.welcome); err != nil {
		v.release(g)
		return nil, g, err
	}
	if kind == frameEnrol {
		v.log.Info("router enrolled", "router", g.Router, "key", g.key.Fingerprint(), "remote", conn.RemoteAddr())
	}
	return s, g, nil
}

// refusal is what the router is told of why it was not admitted.
func refusal(err error) *RefusedError {
	var refused *RefusedError
	if errors.As(err, &refused) {
		return refused
	}
	return &RefusedError{CodeInternal, "the concentrator could not decide; see its log"}
}

// admit decides on a first message. A connection that it admits is counted in
// until release.
func (v *Server) admit(kind frameKind, body []byte, key PublicKey, datagram bool) (greeting, error) {
	g := greeting{key: key}
	if kind != frameHello && (kind != frameEnrol || datagram) {
		return g, &RefusedError{CodeProtocol, fmt.Sprintf("the first message must be HELLO or, over TCP, ENROL, not %v", kind)}
	}
	if err := json.Unmarshal(body, &g.hello); err != nil {
		return g, &RefusedError{CodeProtocol, "the first message is not readable: " + err.Error()}
	}
	var err error
	if g.Version, err = negotiate(g.Min, g.Max); err != nil {
		return g, err
	}
	if g.use, err = useOf(g.hello, kind, datagram); err != nil {
		return g, err
	}
	if kind == frameEnrol {
		if g.Router, err = v.admission.Enrol(g.Secret, key); err != nil {
			return g, err
		}
		return g, v.reserve(g)
	}
	var ok bool
	if g.Router, ok = v.admission.Router(key); !ok {
		return g, &RefusedError{CodeNotEnrolled, fmt.Sprintf(
			"the router's key %s is not enrolled here; make a token with `concentratord token` and use it with `sheafctl join`", key.Fingerprint())}
	}
	if g.Role == rolePackets {
		if v.packets == nil {
			return g, &RefusedError{CodeProtocol, "this concentrator carries no packets"}
		}
		inner, err := v.packets.Inner(key, g.Router)
		if err != nil {
			return g, fmt.Errorf("inner addresses: %w", err)
		}
		g.Inner4, g.Inner6, g.Gateway4, g.Gateway6 = inner.Address4, inner.Address6, inner.Gateway4, inner.Gateway6
	}
	return g, v.reserve(g)
}

// useOf reads from a first message what the connection is to be for.
func useOf(h hello, kind frameKind, datagram bool) (use, error) {
	refuse := func(format string, a ...any) (use, error) {
		return 0, &RefusedError{CodeProtocol, fmt.Sprintf(format, a...)}
	}
	if h.Role != rolePackets {
		switch {
		case datagram:
			return refuse("role %.40q over QUIC, which carries packets only", h.Role)
		case h.Bond != 0 || h.Link != "":
			return refuse("role %.40q has neither a bond nor a link", h.Role)
		case h.Role == roleFlows:
			return useFlows, nil
		case h.Role == roleInbound && kind == frameHello:
			return useInbound, nil
		}
		return refuse("role %.40q is not known, or not to be asked for in %v; bring the older of the two ends up to date", h.Role, kind)
	}
	switch {
	case kind != frameHello:
		return refuse("role packets is to be asked for in HELLO, not %v", kind)
	case h.Bond == 0:
		return refuse("role packets without a bond")
	case !validLink(h.Link, datagram):
		return refuse("link %.40q: want 1 to %d of a-z, 0-9 and -", h.Link, maxLink)
	case datagram:
		return useDatagrams, nil
	}
	return usePackets, nil
}

// maxLink bounds the name of an uplink, in bytes.
const maxLink = 32

// validLink says whether a link is named as it should be; a stream, which uses
// all uplinks, need not be.
func validLink(link string, datagram bool) bool {
	for _, c := range []byte(link) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return len(link) <= maxLink && (link != "" || !datagram)
}

// reserve counts a connection in, before the router is told that it may stay.
func (v *Server) reserve(g greeting) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.guest(g.key)
	if r.connections[g.use] >= mostOf[g.use] {
		return &RefusedError{CodeBusy, fmt.Sprintf("the router has %d %v already, which is the most it may", r.connections[g.use], g.use)}
	}
	r.connections[g.use]++
	return nil
}

// guest finds or makes the entry of a router that is enrolled.
func (v *Server) guest(key PublicKey) *guest {
	r := v.routers[key]
	if r == nil {
		r = new(guest)
		v.routers[key] = r
	}
	return r
}

func (v *Server) release(g greeting) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.routers[g.key].connections[g.use]--
}

// enter lists a session as live. A router that was removed meanwhile does not
// pass.
func (v *Server) enter(s *Session, g greeting) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.active[s] = g.key
	return v.seen(g, s.wire.RemoteAddr())
}

// seen notes where a router has come from, and says whether it may stay.
func (v *Server) seen(g greeting, from net.Addr) bool {
	name, ok := v.admission.Router(g.key)
	r := v.routers[g.key]
	r.Name, r.Address, r.LastSeen = name, from.String(), time.Now()
	return ok && !v.closed
}

func (v *Server) leave(s *Session, g greeting) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.active, s)
	r := v.routers[g.key]
	r.connections[g.use]--
	r.LastSeen = later(r.LastSeen, s.heard.Load())
	r.Received += s.received.Load()
	r.Sent += s.sent.Load()
}

func later(t time.Time, unixNano int64) time.Time {
	if u := time.Unix(0, unixNano); u.After(t) {
		return u
	}
	return t
}

// Activity reports each router that was seen since the start.
func (v *Server) Activity() map[PublicKey]RouterActivity {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := make(map[PublicKey]RouterActivity, len(v.routers))
	for key, r := range v.routers {
		if r.LastSeen.IsZero() {
			continue // it is awaited only
		}
		a := r.RouterActivity
		a.Sessions, a.PacketSessions = r.connections[useFlows], r.connections[usePackets]
		a.InboundSessions, a.Datagrams = r.connections[useInbound], r.connections[useDatagrams]
		all[key] = a
	}
	add := func(key PublicKey, received, sent uint64, heard int64) {
		r := all[key]
		r.Received += received
		r.Sent += sent
		r.LastSeen = later(r.LastSeen, heard)
		all[key] = r
	}
	for s, key := range v.active {
		add(key, s.received.Load(), s.sent.Load(), s.heard.Load())
	}
	for d, key := range v.carried {
		add(key, d.received.Load(), d.sent.Load(), d.heard.Load())
	}
	return all
}

// Revoke ends a router's connections at once, flows included. Call it after
// Admission no longer knows the key.
func (v *Server) Revoke(key PublicKey) {
	v.closeWhere(func(k PublicKey) bool { return k == key })
}

func (v *Server) closeWhere(match func(PublicKey) bool) {
	v.mu.Lock()
	var sessions []*Session
	var carriers []*datagrams
	for s, key := range v.active {
		if match(key) {
			sessions = append(sessions, s)
		}
	}
	for d, key := range v.carried {
		if match(key) {
			carriers = append(carriers, d)
		}
	}
	v.mu.Unlock()
	for _, s := range sessions {
		s.Close()
	}
	for _, d := range carriers {
		_ = d.Close()
	}
}

// sweep ends sessions on which nothing comes for idleTime. Of those without a flow
// the router asks for a sign of life long before; of those with one it may have
// given up its end, and what told of that was lost with the last uplink.
func (v *Server) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		v.mu.Lock()
		var silent []*Session
		for s := range v.active {
			if s.silence(now) > pingAfter {
				silent = append(silent, s)
			}
		}
		v.mu.Unlock()
		for _, s := range silent {
			s.lookAfter(now)
		}
	}
}

// lookAfter asks for a sign of life on a silent session, or ends it. Only sweep
// calls it.
func (s *Session) lookAfter(now time.Time) {
	silence := s.silence(now)
	busy := s.busy()
	if busy {
		// The peer's kernel acknowledges also while what it has waits for a client.
		subflows, err := s.Subflows()
		if err != nil {
			return // it has just ended
		}
		for _, f := range subflows {
			silence = min(silence, f.Silence)
		}
	}
	ask, lost := vigil(silence, busy, s.asked)
	switch {
	case lost:
		s.abandon(errSilent)
	case ask:
		s.asked++
		go s.ask()
	default:
		s.asked = 0
	}
}

// vigil says what to do about a session on which nothing has come for so long and
// whose peer has been asked so often since. One with a flow ends only if it was
// asked: a machine that has slept finds all sessions silent.
func vigil(silence time.Duration, busy bool, asked int) (ask, lost bool) {
	lost = silence > idleTime && (!busy || asked > 1)
	return busy && silence > pingAfter && !lost, lost
}

// ask makes the peer acknowledge something. While another is writing there is
// something already.
func (s *Session) ask() {
	if s.writing.TryLock() {
		defer s.writing.Unlock()
		_ = s.sendLocked(appendFrame(nil, framePing, nil))
	}
}

// open dials a flow's destination and relays.
func (v *Server) open(ctx context.Context, s *Session, key PublicKey, name string, payload []byte) error {
	number, destination, err := parseOpen(payload)
	if err != nil {
		return err
	}
	conn, done, reason, err := v.dial(ctx, name, destination)
	if err != nil {
		v.log.Debug("flow refused", "router", name, "destination", destination, "reason", reason, "error", err)
		return s.refuse(number, reason)
	}
	v.count(key, 1)
	return s.answer(number, conn, func() { done(); v.count(key, -1) })
}

func (v *Server) count(key PublicKey, flows int) {
	v.mu.Lock()
	v.routers[key].Flows += flows
	v.mu.Unlock()
}
