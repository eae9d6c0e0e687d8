package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// Peer is the concentrator a router has enrolled with.
type Peer struct {
	Identity     *Identity // the router's own
	Concentrator PublicKey // pinned
	Addresses    []string  // host:port, in the order to be tried
	// Multipath asks for MPTCP; false dials plain TCP.
	Multipath bool
	// Joins says that the kernel opens a subflow over every path, so that a
	// session without one is not as it should be.
	Joins bool
	// Managed, if set, is told of every session over MPTCP, and that the daemon
	// opens and closes its subflows if it ManagesPaths.
	Managed      *Managed
	ManagesPaths bool
	// Variant is any text: sessions dialled under another one are replaced. It
	// stands for settings that the kernel applies to new connections only.
	Variant  string
	Software string // told to the concentrator, for its log
}

// serves says whether a session with p can serve where q is wanted.
func (p *Peer) serves(q *Peer) bool {
	return p != nil && q != nil && p.Concentrator == q.Concentrator && p.Multipath == q.Multipath && p.Variant == q.Variant
}

// dial opens a session for flows from one source address to one of the
// concentrator's addresses, up to WELCOME. The caller starts its run.
func (p *Peer) dial(ctx context.Context, from source, address string) (*Session, error) {
	s, _, err := p.greet(ctx, from, address, hello{})
	return s, err
}

// greet is dial for a session of the role that the HELLO says.
func (p *Peer) greet(ctx context.Context, from source, address string, h hello) (*Session, welcome, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	s, err := p.connect(ctx, from, address)
	if err != nil {
		return nil, welcome{}, err
	}
	h.Software = p.Software
	w, err := s.introduce(frameHello, h)
	if err != nil {
		_ = s.wire.Close()
		return nil, welcome{}, err
	}
	p.Managed.add(s, p.ManagesPaths)
	return s, w, nil
}

// Reach says whether the concentrator is reached from the path's own address, as
// far as WELCOME: that something accepts the connection says little, as proxies of
// mobile networks and portals of hotels do.
func (p *Peer) Reach(ctx context.Context, path Path) error {
	s, err := p.reach(ctx, path)
	if err == nil {
		s.Close()
	}
	return err
}

// errInconclusive says that a connection fell back to plain TCP after a SYN was lost:
// the kernel leaves MPTCP out when it sends that again.
var errInconclusive = errors.New("a SYN was lost, so that it does not tell")

// Passes says whether MPTCP gets through to the concentrator from the path's own
// address.
func (p *Peer) Passes(ctx context.Context, path Path) (bool, error) {
	s, err := p.reach(ctx, path)
	if err != nil {
		return false, err
	}
	defer s.Close()
	if s.multipath {
		return true, nil
	}
	info, err := s.wire.info()
	if err == nil && info.Total_retrans > 0 {
		err = errInconclusive
	}
	return false, err
}

func (p *Peer) reach(ctx context.Context, path Path) (*Session, error) {
	list := attempts([]Path{path}, p.Addresses)
	if len(list) == 0 {
		return nil, p.unreachable()
	}
	alone := *p
	alone.Managed = nil // one subflow is all that is asked for
	s, _, err := race[*Session]{
		dial: func(ctx context.Context, a attempt) (*Session, error) { return alone.dial(ctx, a.source, a.address) },
		drop: (*Session).Close,
	}.run(ctx, list)
	return s, err
}

// race dials over one way after the other, each with a head start over the next.
type race[T any] struct {
	dial func(context.Context, attempt) (T, error)
	drop func(T) // closes what came too late
	// patient says whether to go on waiting for the last attempt instead of
	// starting the next beside it; nil never does.
	patient func(last attempt) bool
	// failed, if set, is told of attempts that failed.
	failed func(attempt, error)
}

// run returns what the attempt that succeeded first gave, and which that was.
// Those it overtook are closed. Its error joins those of all attempts.
func (r race[T]) run(ctx context.Context, list []attempt) (T, attempt, error) {
	type result struct {
		attempt
		got T
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result, len(list))
	hedge := time.NewTimer(0)
	defer hedge.Stop()
	started, ended := 0, 0
	var failures []error
	for ended < len(list) {
		select {
		case <-hedge.C:
			if started > ended && r.patient != nil && r.patient(list[started-1]) {
				hedge.Reset(hedgeAfter)
				break
			}
			if started < len(list) {
				a := list[started]
				started++
				go func() {
					got, err := r.dial(ctx, a)
					results <- result{a, got, err}
				}()
				hedge.Reset(hedgeAfter)
			}
		case won := <-results:
			ended++
			if won.err == nil {
				go func() {
					for range started - ended {
						if late := <-results; late.err == nil {
							r.drop(late.got)
						}
					}
				}()
				return won.got, won.attempt, nil
			}
			err := fmt.Errorf("%s from %s: %w", won.address, won.source, won.err)
			failures = append(failures, err)
			if r.failed != nil && ctx.Err() == nil { // else the daemon is stopping
				r.failed(won.attempt, err)
			}
			hedge.Reset(0)
		}
	}
	var none T
	return none, attempt{}, errors.Join(failures...)
}

// Enrol presents a token's secret, over one path after the other until one
// reaches the concentrator, so that it knows the router's key from then on.
// Without a path the kernel chooses. Enrolling again with the same key and token
// succeeds.
func Enrol(ctx context.Context, id *Identity, t Token, paths []Path, software string) error {
	p := &Peer{Identity: id, Concentrator: t.Concentrator, Addresses: t.Addresses}
	list := attempts(paths, t.Addresses)
	if len(paths) == 0 {
		for _, address := range t.Addresses {
			list = append(list, attempt{address: address})
		}
	}
	failures := []error{errors.New("no uplink reaches it")}
	deadline, bounded := ctx.Deadline()
	for i, a := range list {
		try, cancel := context.WithTimeout(ctx, handshakeTime)
		if bounded { // what is left of the time is shared among the attempts to come
			cancel()
			try, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(len(list)-i))
		}
		s, err := p.connect(try, a.source, a.address)
		if err == nil {
			_, err = s.introduce(frameEnrol, hello{Software: software, Secret: t.Secret[:]})
			_ = s.wire.Close()
		}
		cancel()
		if err == nil {
			return nil
		}
		failures = append(failures, fmt.Errorf("%s: %w", a.address, err))
		// A refusal holds for every address of the same concentrator.
		var refused *RefusedError
		if errors.As(err, &refused) {
			break
		}
	}
	return errors.Join(failures...)
}

// connect opens the connection and completes the TLS handshake.
func (p *Peer) connect(ctx context.Context, from source, address string) (*Session, error) {
	dialer := net.Dialer{
		Timeout:         handshakeTime,
		KeepAliveConfig: keepAlive,
		Control:         control(p.Multipath),
	}
	dialer.SetMultipathTCP(p.Multipath)
	var conn net.Conn
	err := from.bind(func(local netip.AddrPort) (err error) {
		network := "tcp"
		if from.IsValid() {
			dialer.LocalAddr = net.TCPAddrFromAddrPort(local)
			network = "tcp6"
			if from.Is4() {
				network = "tcp4"
			}
		}
		conn, err = dialer.DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, err
	}
	s, err := newSession(conn.(*net.TCPConn))
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(handshakeTime)
	}
	_ = s.wire.SetDeadline(deadline)
	s.tls = tls.Client(s.wire, p.Identity.flowConfig(p.Concentrator))
	if err := s.tls.HandshakeContext(ctx); err != nil {
		_ = s.wire.Close()
		return nil, fmt.Errorf("TLS handshake with %s: %w", conn.RemoteAddr(), err)
	}
	return s, nil
}

// introduce sends the first message and reads the answer to it.
func (s *Session) introduce(kind frameKind, h hello) (welcome, error) {
	h.Min, h.Max = minVersion, maxVersion
	if err := s.sendControl(kind, h); err != nil {
		return welcome{}, err
	}
	kind, body, err := s.receiveControl()
	if err != nil {
		return welcome{}, fmt.Errorf("waiting for the concentrator's WELCOME: %w", err)
	}
	w, err := readAnswer(kind, body)
	if err != nil {
		return welcome{}, err
	}
	return w, errors.Join(s.settle(), s.wire.SetDeadline(time.Time{}))
}

// readAnswer reads WELCOME; REFUSE is a *RefusedError.
func readAnswer(kind frameKind, body []byte) (welcome, error) {
	switch kind {
	case frameWelcome:
		var w welcome
		if err := json.Unmarshal(body, &w); err != nil {
			return welcome{}, fmt.Errorf("%w: WELCOME: %w", errProtocol, err)
		}
		if w.Version < minVersion || w.Version > maxVersion {
			return welcome{}, fmt.Errorf("the concentrator chose tunnel protocol version %d, this router speaks %d to %d",
				w.Version, minVersion, maxVersion)
		}
		return w, nil
	case frameRefuse:
		refused := new(RefusedError)
		if err := json.Unmarshal(body, refused); err != nil {
			return welcome{}, fmt.Errorf("%w: REFUSE: %w", errProtocol, err)
		}
		return welcome{}, refused
	}
	return welcome{}, fmt.Errorf("%w: %v in answer to the first message", errProtocol, kind)
}
