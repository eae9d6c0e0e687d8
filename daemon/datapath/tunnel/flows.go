package tunnel

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// What each flow has moved over each uplink. The kernel counts for a subflow as
// long as it lives, and several flows use it one after the other:
//
//	kernel's counters ─▶ look, whenever subflows are read ─▶ account: sums by source address ─▶ Flows
//	                     reset, once a flow has ended ─────────┘
//
// A look every few seconds is all that a long flow costs, and a reset, which is
// three system calls, all that a short one does: after its end, when nobody waits.

// Flow is a TCP connection of a LAN client in the tunnel, or of a client on the
// Internet to a forwarded port.
type Flow struct {
	// Client opened the connection. Of an inbound one it is the address that the
	// LAN host sees.
	Client, Destination netip.AddrPort
	Inbound             bool
	Since               time.Time
	// Sent is the payload that has left the LAN and that the concentrator's kernel
	// has acknowledged, Received the payload that has come, in bytes.
	Sent, Received uint64
	// Sources are the bytes of the subflows, by their local addresses, of those
	// that have been closed too. They add up to some more than the payload: to it
	// come the frames, TLS, and what the kernel sends again over another subflow.
	Sources []SourceBytes
}

// SourceBytes is what has gone and come from one address.
type SourceBytes struct {
	Source         netip.Addr
	Sent, Received uint64
}

// Flows lists the flows of a router, those first that have moved most, and how
// many there are in all; more than limit are not listed.
func Flows(limit int, pool *Pool, inbound *Inbound) (list []Flow, total int) {
	pool.mu.Lock()
	sessions := slices.Collect(maps.Keys(pool.sessions))
	pool.mu.Unlock()
	inbound.mu.Lock()
	sessions = slices.AppendSeq(sessions, maps.Keys(inbound.sessions))
	inbound.mu.Unlock()

	type live struct {
		session *Session
		flow    *flow
		moved   uint64
	}
	var all []live
	for _, s := range sessions {
		if f := s.flow.Load(); f != nil && f.local != nil && s.busy() {
			before := s.account.payload.Load()
			all = append(all, live{s, f, s.sent.Load() + s.received.Load() - before})
		}
	}
	slices.SortFunc(all, func(a, b live) int { return cmp.Compare(b.moved, a.moved) })
	total = len(all)
	for _, l := range all[:min(limit, total)] {
		described, err := l.session.describe(l.flow)
		if err != nil || l.session.flow.Load() != l.flow || !l.session.busy() {
			total-- // it has just ended
			continue
		}
		list = append(list, described)
	}
	return list, total
}

// describe tells what f, which is open on the session, has moved.
func (s *Session) describe(f *flow) (Flow, error) {
	d := Flow{
		Client: addrPort(f.local.conn.RemoteAddr()), Destination: addrPort(f.local.conn.LocalAddr()),
		Inbound: s.open != nil, Since: f.since,
	}
	if d.Inbound {
		d.Client, d.Destination = d.Destination, d.Client
	}
	a := &s.account
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, err := s.look(); err != nil {
		return Flow{}, err
	}
	d.Sent = more(s.sent.Load()-a.sentBefore, more(a.at.written, a.at.acknowledged))
	d.Received = s.received.Load() - a.receivedBefore
	d.Sources = slices.Clone(a.moved)
	return d, nil
}

// account is what a session has moved since it was reset.
type account struct {
	// payload is what the session had moved both ways by then, in bytes.
	payload atomic.Uint64

	mu                         sync.Mutex
	sentBefore, receivedBefore uint64 // payload, each way
	from, at                   position
	seen                       []counted
	moved                      []SourceBytes
	closed                     []netip.Addr // of the subflows that were closed last
}

// counted is a subflow as it was at the last look, in bytes.
type counted struct {
	local, remote          netip.AddrPort
	acknowledged, received uint64
	live                   bool // seen by the present look
}

// position is how far a connection has come, in bytes from anywhere.
type position struct{ written, acknowledged, received uint64 }

// look reads the subflows and brings the account, which is locked, up to date.
func (s *Session) look() ([]Subflow, error) {
	var at position
	switch {
	case s.wire.outOfTree != nil:
		info, err := s.wire.info()
		if err != nil {
			return nil, err
		}
		var whole Subflow
		whole.fill(info)
		at = position{whole.sent + whole.unsent, whole.acknowledged, whole.received}
	case s.multipath:
		// First: what comes between the two calls then is not taken for that of a
		// subflow that is gone.
		var err error
		if at, err = s.wire.position(); err != nil {
			return nil, err
		}
	}
	list, err := s.wire.subflows(s.multipath)
	if err != nil {
		return nil, err
	}
	if !s.multipath && len(list) == 1 {
		at = position{list[0].sent + list[0].unsent, list[0].acknowledged, list[0].received}
	}
	s.account.add(list, at)
	return list, nil
}

// add adds what has been moved since the last look. What a subflow had moved when
// it was closed nobody knows: it is what the connection has moved and the others
// have not, as far as it was not sent again over them.
func (a *account) add(list []Subflow, at position) {
	for i := range a.seen {
		a.seen[i].live = false
	}
	inFlight := uint64(0)
	for _, f := range list {
		inFlight += more(f.sent, f.acknowledged)
		i := slices.IndexFunc(a.seen, func(c counted) bool { return c.local == f.Local && c.remote == f.Remote })
		if i < 0 {
			i = len(a.seen)
			a.seen = append(a.seen, counted{local: f.Local, remote: f.Remote})
		}
		c := &a.seen[i]
		c.live = true
		sent, received := more(f.acknowledged, c.acknowledged), more(f.received, c.received)
		c.acknowledged += sent
		c.received += received
		a.credit(f.Local.Addr(), sent, received)
	}
	if slices.ContainsFunc(a.seen, counted.dead) {
		a.closed = a.closed[:0]
		for _, c := range a.seen {
			if !c.live {
				a.closed = append(a.closed, c.local.Addr())
			}
		}
		a.seen = slices.DeleteFunc(a.seen, counted.dead)
	}
	a.at = at
	// What waits for its subflow's acknowledgement may have that of the connection
	// already: it came over another.
	sent, received := inFlight, uint64(0)
	for _, m := range a.moved {
		sent += m.Sent
		received += m.Received
	}
	sent, received = more(more(at.acknowledged, a.from.acknowledged), sent), more(more(at.received, a.from.received), received)
	for i, source := range a.closed {
		left := uint64(len(a.closed) - i)
		a.credit(source, sent/left, received/left)
		sent -= sent / left
		received -= received / left
	}
}

func (c counted) dead() bool { return !c.live }

// more is by how much now is more than before.
func more(now, before uint64) uint64 { return now - min(now, before) }

func (a *account) credit(source netip.Addr, sent, received uint64) {
	if sent+received == 0 {
		return
	}
	i := slices.IndexFunc(a.moved, func(m SourceBytes) bool { return m.Source == source })
	if i < 0 {
		i = len(a.moved)
		a.moved = append(a.moved, SourceBytes{Source: source})
	}
	a.moved[i].Sent += sent
	a.moved[i].Received += received
}

// resetAccount makes ready for the next flow. What is still to be acknowledged of
// the last one is not the next one's.
func (s *Session) resetAccount() {
	a := &s.account
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sentBefore, a.receivedBefore = s.sent.Load(), s.received.Load()
	a.payload.Store(a.sentBefore + a.receivedBefore)
	list, err := s.look()
	if err != nil {
		return // the session has ended
	}
	a.moved, a.closed = a.moved[:0], a.closed[:0]
	a.from = position{acknowledged: a.at.written, received: a.at.received}
	for i := range a.seen {
		for _, f := range list {
			if c := &a.seen[i]; c.local == f.Local && c.remote == f.Remote {
				c.acknowledged = max(c.acknowledged, f.sent)
			}
		}
	}
}

// position asks how far an MPTCP connection has come.
func (s *socket) position() (position, error) {
	info, err := s.mptcpInfo()
	return position{info.WriteSeq, info.SndUna, info.Next}, err
}
