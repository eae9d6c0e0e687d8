package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Inbound flows: connections to a port of the concentrator that a router has
// asked to be forwarded.
//
//	Internet ─▶ concentrator: OpenInbound ─ parked session ─ OPEN ─▶ router: Inbound ─ InboundFunc ─▶ LAN host
//
// The sessions are dialled by the router, which is behind NAT, and parked at the
// concentrator until it needs them. From WELCOME on they are as others with the
// two ends exchanged.

const (
	// maxInbound bounds a router's inbound sessions, and so the connections open to
	// its forwarded ports.
	maxInbound = 1024
	// minParked sessions are kept ready while there are forwards, more after a
	// burst, at most maxParked.
	minParked = 2
	maxParked = 16
	// parkedTime is how long a connection waits for a parked session; maxArriving
	// bounds how many wait for the sessions of one router.
	parkedTime  = 5 * time.Second
	maxArriving = 256
)

// ErrNoInbound says that a router has no session for an inbound flow.
var ErrNoInbound = errors.New("the router has no session ready for inbound connections")

// park makes a session of role inbound ready for a flow.
func (v *Server) park(s *Session, key PublicKey) {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.routers[key]
	if isClosed(s.done) {
		return
	}
	if len(r.waiting) > 0 {
		r.waiting[0] <- s
		r.waiting = slices.Delete(r.waiting, 0, 1)
		return
	}
	r.parked = append(r.parked, s)
}

// unpark forgets a session that has ended.
func (v *Server) unpark(s *Session, key PublicKey) {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.routers[key]
	r.parked = slices.DeleteFunc(r.parked, func(p *Session) bool { return p == s })
}

// take waits for a parked session.
func (v *Server) take(ctx context.Context, key PublicKey) (*Session, error) {
	if _, ok := v.admission.Router(key); !ok {
		return nil, fmt.Errorf("%w: it is not enrolled", ErrNoInbound)
	}
	v.mu.Lock()
	r := v.guest(key)
	for len(r.parked) > 0 {
		last := len(r.parked) - 1
		s := r.parked[last]
		r.parked = slices.Delete(r.parked, last, last+1)
		if !isClosed(s.done) {
			v.mu.Unlock()
			return s, nil
		}
	}
	if len(r.waiting) >= maxArriving {
		v.mu.Unlock()
		return nil, fmt.Errorf("%w: %d connections wait for one already", ErrNoInbound, maxArriving)
	}
	ready := make(chan *Session, 1)
	r.waiting = append(r.waiting, ready)
	v.mu.Unlock()
	select {
	case s := <-ready:
		return s, nil
	case <-ctx.Done():
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if i := slices.Index(r.waiting, ready); i >= 0 {
		r.waiting = slices.Delete(r.waiting, i, i+1)
		return nil, fmt.Errorf("%w: %w", ErrNoInbound, ctx.Err())
	}
	return <-ready, nil // it arrived as we left
}

// OpenInbound carries a connection to a forwarded port through the tunnel and
// returns when both directions have ended; client is closed then, also when it
// fails. It waits up to 5 s for a session of the router; when ctx ends, the
// connection is cut off. forward is the number by which the router knows the
// forward.
func (v *Server) OpenInbound(ctx context.Context, key PublicKey, forward uint16, client *net.TCPConn) error {
	s, err := v.takeLive(ctx, key)
	if err != nil {
		_ = client.SetLinger(0)
		_ = client.Close()
		return err
	}
	stop := context.AfterFunc(ctx, s.Close)
	v.count(key, 1)
	from := addrPort(client.RemoteAddr())
	err = s.relay(client, func(b []byte, number uint32) []byte { return appendInboundOpen(b, number, forward, from) })
	v.count(key, -1)
	if !stop() {
		return ctx.Err()
	}
	if s.sent.Load()+s.received.Load() > retireAfter {
		s.Close()
	}
	v.park(s, key)
	return err
}

// takeLive takes a session of which the router has given a sign of life since it
// last had to: it pings those that are parked.
func (v *Server) takeLive(ctx context.Context, key PublicKey) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, parkedTime)
	defer cancel()
	for {
		s, err := v.take(ctx, key)
		if err != nil {
			return nil, err
		}
		if s.silence(time.Now()) < pingAfter+pingTime {
			return s, nil
		}
		ping, done := context.WithTimeout(ctx, checkTime)
		err = s.Ping(ping)
		done()
		if err == nil {
			return s, nil
		}
		s.fail(fmt.Errorf("no answer to a ping: %w", err))
	}
}

// InboundFunc connects to the LAN host of a forward for a client on the Internet.
// When it fails, the reason is what the concentrator is told. done is called when
// the connection is no longer used.
type InboundFunc func(ctx context.Context, forward uint16, client netip.AddrPort) (conn *net.TCPConn, done func(), reason ResetReason, err error)

// Inbound keeps sessions parked at the concentrator for inbound flows. Whom it
// dials, and over which uplinks, is what the pool has been told.
type Inbound struct {
	pool    *Pool
	connect InboundFunc
	log     *slog.Logger
	failed  *rarely
	kick    chan struct{}

	mu       sync.Mutex
	forwards int
	sessions map[*Session]*parked
	dialling int
	opened   int       // flows since the last decay: how many parked sessions a burst may need
	failures int       // dials in a row
	until    time.Time // not dialled before
}

// parked is what the router knows of an inbound session.
type parked struct {
	peer   *Peer
	path   string
	pinged bool // a ping is under way
}

// NewInbound returns an Inbound that dials nothing until it has a forward.
func NewInbound(pool *Pool, connect InboundFunc, log *slog.Logger) *Inbound {
	return &Inbound{pool: pool, connect: connect, log: log, failed: &rarely{log: log},
		kick: make(chan struct{}, 1), sessions: map[*Session]*parked{}}
}

// SetForwards says how many forwards there are. Without any, no session is kept
// parked; flows that are open go on.
func (i *Inbound) SetForwards(n int) {
	i.mu.Lock()
	i.forwards = n
	i.mu.Unlock()
	i.wake()
}

// Sessions is the number of live inbound sessions.
func (i *Inbound) Sessions() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.sessions)
}

// Busy says whether a flow is open on one of them.
func (i *Inbound) Busy() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	for s := range i.sessions {
		if s.busy() {
			return true
		}
	}
	return false
}

func (i *Inbound) wake() {
	select {
	case i.kick <- struct{}{}:
	default:
	}
}

// Run keeps sessions parked until ctx ends, then closes all of them.
func (i *Inbound) Run(ctx context.Context) {
	var workers sync.WaitGroup
	defer workers.Wait()
	tick := time.NewTicker(maintainEvery)
	defer tick.Stop()
	for {
		i.maintain(ctx, &workers, time.Now())
		select {
		case <-ctx.Done():
			i.mu.Lock()
			all := slices.Collect(maps.Keys(i.sessions))
			i.mu.Unlock()
			for _, s := range all {
				s.Close()
			}
			return
		case <-tick.C:
			i.mu.Lock()
			i.opened -= (i.opened + 3) / 4
			i.mu.Unlock()
		case <-i.kick:
		}
	}
}

// maintain dials what is missing, and closes and pings what is parked.
func (i *Inbound) maintain(ctx context.Context, workers *sync.WaitGroup, now time.Time) {
	peer, ranked, restored := i.pool.way(now)
	best := ""
	if len(ranked) > 0 {
		best = ranked[0].Name
	}
	i.mu.Lock()
	target := parkedTarget(i.forwards, i.opened)
	var good, other, closing, silent []*Session
	for s, known := range i.sessions {
		switch {
		case s.busy():
			continue
		case !known.peer.serves(peer):
			closing = append(closing, s)
			continue
		case known.path == best:
			good = append(good, s)
		default:
			other = append(other, s)
		}
		if !known.pinged && (s.silence(now) > pingAfter || s.heard.Load() < restored) {
			known.pinged = true
			silent = append(silent, s)
		}
	}
	if len(good) >= target {
		closing = append(closing, other...)
		closing = append(closing, good[min(len(good), 2*target):]...)
	}
	dials := max(0, min(target-len(good)-i.dialling, maxInbound-len(i.sessions)-i.dialling))
	if peer == nil || len(ranked) == 0 || now.Before(i.until) || ctx.Err() != nil {
		dials = 0
	}
	i.dialling += dials
	i.mu.Unlock()

	for range dials {
		workers.Go(func() { i.dial(ctx, workers, peer, ranked) })
	}
	for _, s := range closing {
		s.Close()
	}
	for _, s := range silent {
		workers.Go(func() { i.ping(ctx, s) })
	}
}

// parkedTarget is how many sessions to keep parked.
func parkedTarget(forwards, opened int) int {
	if forwards == 0 {
		return 0
	}
	return min(max(opened, minParked), maxParked)
}

// dial parks one session at the concentrator and serves it until it ends.
func (i *Inbound) dial(ctx context.Context, workers *sync.WaitGroup, peer *Peer, ranked []Path) {
	s, won, err := race[*Session]{
		dial: func(ctx context.Context, a attempt) (*Session, error) {
			s, _, err := peer.greet(ctx, a.source, a.address, hello{Role: roleInbound})
			return s, err
		},
		drop: (*Session).Close,
	}.run(ctx, attempts(ranked, peer.Addresses))
	i.mu.Lock()
	defer i.mu.Unlock()
	i.dialling--
	if s == nil {
		if ctx.Err() == nil {
			i.failed.warn("dialling a session for inbound connections failed; trying on", "error", err)
		}
		if now := time.Now(); now.After(i.until) {
			i.until = now.Add(min(minRetry<<min(i.failures, 10), maxRetry))
			i.failures++
		}
		return
	}
	i.failures = 0
	if ctx.Err() != nil {
		s.Close()
		return
	}
	s.calm = i.pool.calm
	s.open = func(payload []byte) error { return i.open(ctx, s, payload) }
	s.resetAccount()
	i.sessions[s] = &parked{peer: peer, path: won.path.Name}
	workers.Go(func() {
		s.run()
		i.mu.Lock()
		delete(i.sessions, s)
		i.mu.Unlock()
		i.wake()
	})
}

// open connects an inbound flow to the LAN host and relays.
func (i *Inbound) open(ctx context.Context, s *Session, payload []byte) error {
	number, forward, client, err := parseInboundOpen(payload)
	if err != nil {
		return err
	}
	i.mu.Lock()
	i.opened++
	i.mu.Unlock()
	i.wake()
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	conn, done, reason, err := i.connect(ctx, forward, client)
	if err != nil {
		i.log.Debug("inbound connection refused", "forward", forward, "client", client, "reason", reason, "error", err)
		return s.refuse(number, reason)
	}
	return s.answer(number, conn, func() { s.resetAccount(); done(); i.wake() })
}

// ping closes a parked session that gives no sign of life.
func (i *Inbound) ping(ctx context.Context, s *Session) {
	ctx, cancel := context.WithTimeout(ctx, pingTime)
	defer cancel()
	err := s.Ping(ctx)
	i.mu.Lock()
	if known := i.sessions[s]; known != nil {
		known.pinged = false
	}
	i.mu.Unlock()
	if err != nil {
		s.fail(fmt.Errorf("no answer to a ping: %w", err))
	}
}
