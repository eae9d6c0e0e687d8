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
//	listener ─▶ TLS, first message (admit) ─▶ session ─ OPEN ─▶ DialFunc ─▶ relay
type Server struct {
	identity  *Identity
	admission Admission
	dial      DialFunc
	log       *slog.Logger

	unknown chan struct{} // holds a token for every connection not introduced

	mu      sync.Mutex
	closed  bool
	routers map[PublicKey]*RouterActivity
	active  map[*Session]PublicKey
}

// RouterActivity is what a server has seen of one router since it started.
type RouterActivity struct {
	Name     string
	Address  string // that the last session came from
	LastSeen time.Time
	Sessions int
	Flows    int    // open now
	Received uint64 // payload bytes from the router, of ended sessions and live ones
	Sent     uint64
}

// NewServer returns a server that listens nowhere yet.
func NewServer(id *Identity, admission Admission, dial DialFunc, log *slog.Logger) *Server {
	return &Server{
		identity: id, admission: admission, dial: dial, log: log,
		unknown: make(chan struct{}, maxUnknown),
		routers: map[PublicKey]*RouterActivity{}, active: map[*Session]PublicKey{},
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
	s, key, err := v.introduce(conn)
	<-v.unknown
	if err != nil {
		_ = conn.Close()
		v.log.Warn("session refused", "remote", conn.RemoteAddr(), "key", fingerprintOrNone(key), "error", err)
		return
	}
	_ = conn.SetDeadline(time.Time{})
	name := v.enter(s, key)
	defer v.leave(s, key)
	s.open = func(number uint32, destination netip.AddrPort) error {
		return v.open(ctx, s, key, name, number, destination)
	}
	s.run()
	if !errors.Is(s.err, errSessionClosed) {
		v.log.Debug("session ended", "router", name, "remote", conn.RemoteAddr(), "error", s.err)
	}
}

func fingerprintOrNone(key PublicKey) string {
	if key == (PublicKey{}) {
		return "none"
	}
	return key.Fingerprint()
}

// introduce completes TLS and answers the first message.
func (v *Server) introduce(conn *net.TCPConn) (*Session, PublicKey, error) {
	s, err := newSession(conn)
	if err != nil {
		return nil, PublicKey{}, err
	}
	s.tls = tls.Server(s.wire, v.identity.serverConfig())
	if err := s.tls.Handshake(); err != nil {
		return nil, PublicKey{}, fmt.Errorf("TLS handshake: %w", err)
	}
	key, err := peerKey(s.tls.ConnectionState())
	if err != nil {
		return nil, PublicKey{}, err
	}
	kind, body, err := s.receiveControl()
	if err != nil {
		return nil, key, fmt.Errorf("first message: %w", err)
	}
	w, err := v.admit(kind, body, key)
	if err != nil {
		refused := new(RefusedError)
		if !errors.As(err, &refused) {
			refused = &RefusedError{CodeInternal, "the concentrator could not decide; see its log"}
		}
		if sendErr := s.sendControl(frameRefuse, refused); sendErr != nil {
			err = errors.Join(err, sendErr)
		}
		return nil, key, err
	}
	if err := s.sendControl(frameWelcome, w); err != nil {
		return nil, key, err
	}
	if kind == frameEnrol {
		v.log.Info("router enrolled", "router", w.Router, "key", key.Fingerprint(), "remote", conn.RemoteAddr())
	}
	return s, key, nil
}

// admit decides on a first message.
func (v *Server) admit(kind frameKind, body []byte, key PublicKey) (welcome, error) {
	if kind != frameHello && kind != frameEnrol {
		return welcome{}, &RefusedError{CodeProtocol, fmt.Sprintf("the first message must be HELLO or ENROL, not %v", kind)}
	}
	var h hello
	if err := json.Unmarshal(body, &h); err != nil {
		return welcome{}, &RefusedError{CodeProtocol, "the first message is not readable: " + err.Error()}
	}
	version, err := negotiate(h.Min, h.Max)
	if err != nil {
		return welcome{}, err
	}
	if kind == frameEnrol {
		name, err := v.admission.Enrol(h.Secret, key)
		return welcome{version, name}, err
	}
	name, ok := v.admission.Router(key)
	if !ok {
		return welcome{}, &RefusedError{CodeNotEnrolled, fmt.Sprintf(
			"the router's key %s is not enrolled here; make a token with `concentratord token` and use it with `sheafctl join`", key.Fingerprint())}
	}
	return welcome{version, name}, nil
}

// enter counts a session in. A router that was removed meanwhile does not pass.
func (v *Server) enter(s *Session, key PublicKey) (name string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	name, ok := v.admission.Router(key)
	r := v.routers[key]
	if r == nil {
		r = new(RouterActivity)
		v.routers[key] = r
	}
	r.Name = name
	r.Address = s.wire.RemoteAddr().String()
	r.LastSeen = time.Now()
	r.Sessions++
	v.active[s] = key
	if v.closed || !ok || r.Sessions > maxSessions {
		s.Close()
	}
	return name
}

func (v *Server) leave(s *Session, key PublicKey) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.active, s)
	r := v.routers[key]
	r.Sessions--
	r.LastSeen = time.Unix(0, s.heard.Load())
	r.Received += s.received.Load()
	r.Sent += s.sent.Load()
}

// Activity reports each router that was seen since the start.
func (v *Server) Activity() map[PublicKey]RouterActivity {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := make(map[PublicKey]RouterActivity, len(v.routers))
	for key, r := range v.routers {
		all[key] = *r
	}
	for s, key := range v.active {
		r := all[key]
		r.Received += s.received.Load()
		r.Sent += s.sent.Load()
		if heard := time.Unix(0, s.heard.Load()); heard.After(r.LastSeen) {
			r.LastSeen = heard
		}
		all[key] = r
	}
	return all
}

// Revoke ends a router's sessions at once, flows included. Call it after
// Admission no longer knows the key.
func (v *Server) Revoke(key PublicKey) {
	v.closeWhere(func(k PublicKey) bool { return k == key })
}

func (v *Server) closeWhere(match func(PublicKey) bool) {
	v.mu.Lock()
	var closing []*Session
	for s, key := range v.active {
		if match(key) {
			closing = append(closing, s)
		}
	}
	v.mu.Unlock()
	for _, s := range closing {
		s.Close()
	}
}

// sweep closes sessions without a flow on which nothing came for idleTime: the
// router pings long before.
func (v *Server) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		before := time.Now().Add(-idleTime).UnixNano()
		v.mu.Lock()
		var silent []*Session
		for s := range v.active {
			f := s.flow.Load()
			if s.heard.Load() < before && (f == nil || isClosed(f.pumped) && isClosed(f.finished)) {
				silent = append(silent, s)
			}
		}
		v.mu.Unlock()
		for _, s := range silent {
			s.Close()
		}
	}
}

// open dials a flow's destination and relays.
func (v *Server) open(ctx context.Context, s *Session, key PublicKey, name string, number uint32, destination netip.AddrPort) error {
	conn, done, reason, err := v.dial(ctx, name, destination)
	if err != nil {
		v.log.Debug("flow refused", "router", name, "destination", destination, "reason", reason, "error", err)
		s.flow.Store(refusedFlow(s, number))
		return s.send(resetFrame(number, reason))
	}
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
	v.count(key, 1)
	go func() {
		f.pump(nil)
		f.close()
		done()
		v.count(key, -1)
	}()
	return nil
}

func (v *Server) count(key PublicKey, flows int) {
	v.mu.Lock()
	v.routers[key].Flows += flows
	v.mu.Unlock()
}

// refusedFlow is one that never had a local end: what the router had sent ahead
// is discarded until its own RESET or END.
func refusedFlow(s *Session, number uint32) *flow {
	f := newFlow(s, number, nil)
	f.aborted.Store(true)
	f.sentReset, f.settled = true, true
	close(f.pumped)
	return f
}
