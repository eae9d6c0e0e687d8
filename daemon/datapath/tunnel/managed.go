package tunnel

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Managed are the live sessions over MPTCP, of every role: those dialled with a
// Peer that has it. Of some the daemon opens and closes the subflows itself.
type Managed struct {
	changed func()

	mu       sync.Mutex
	sessions map[*Session]bool // whether it does
}

// NewManaged returns a Managed that calls changed for every session that is added
// to it.
func NewManaged(changed func()) *Managed {
	return &Managed{changed: changed, sessions: map[*Session]bool{}}
}

func (m *Managed) add(s *Session, manages bool) {
	if m == nil || !s.multipath {
		return
	}
	m.mu.Lock()
	m.sessions[s] = manages
	m.mu.Unlock()
	if manages {
		m.changed()
	}
}

// Drop leaves a session's subflows to others.
func (m *Managed) Drop(s *Session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sessions[s] = false
}

// Sessions are those that have not ended and whose subflows are the daemon's.
func (m *Managed) Sessions() []*Session {
	m.mu.Lock()
	defer m.mu.Unlock()
	var live []*Session
	for s, manages := range m.sessions {
		switch {
		case isClosed(s.done):
			delete(m.sessions, s)
		case manages:
			live = append(live, s)
		}
	}
	return live
}

// Tokens are those by which the kernel knows the sessions that have not begun to
// end.
func (m *Managed) Tokens() map[uint32]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return tokens(maps.Keys(m.sessions))
}

func tokens(sessions iter.Seq[*Session]) map[uint32]bool {
	all := map[uint32]bool{}
	for s := range sessions {
		if s.multipath && !s.ending.Load() {
			all[s.token] = true
		}
	}
	return all
}

// Ends are the two ends of a subflow.
type Ends struct{ Local, Remote netip.AddrPort }

// Ends lists the ends of the session's subflows, also of those that are being
// opened or have been closed, and the token by which the kernel knows the session
// in this network namespace. A session over plain TCP has none.
func (s *Session) Ends() (token uint32, list []Ends, err error) {
	if !s.multipath {
		return 0, nil, errors.New("the session is over plain TCP")
	}
	var inner error
	err = s.wire.raw.Control(func(fd uintptr) {
		info, err := readMPTCPInfo(fd)
		if err != nil {
			inner = fmt.Errorf("read the token of a session: %w", err)
			return
		}
		token = info.Token
		addresses := borrow()
		defer addresses.release()
		stride, n, err := subflowOption(int(fd), mptcpSubflowAddrs, addresses, sizeSubflowAddress)
		if err != nil {
			inner = fmt.Errorf("read the subflows of a session: %w", err)
			return
		}
		for i := range n {
			a := addresses.data[sizeSubflowData+i*stride:]
			list = append(list, Ends{sockaddr(a[:sizeSockaddr]), sockaddr(a[sizeSockaddr:sizeSubflowAddress])})
		}
	})
	return token, list, errors.Join(err, inner)
}

// Remote is the concentrator's end of the session.
func (s *Session) Remote() netip.AddrPort { return addrPort(s.wire.RemoteAddr()) }

// source is where a connection is dialled from: an address, and the ports that
// lead over the uplink that is meant. The zero source leaves it to the kernel.
type source struct {
	netip.Addr
	ports Ports
}

// portTries is how many ports of a range are tried before it counts as full.
const portTries = 8

// bind calls open with an end that is free, port 0 for any.
func (s source) bind(open func(netip.AddrPort) error) (err error) {
	if s.ports == (Ports{}) {
		return open(netip.AddrPortFrom(s.Addr, 0))
	}
	for range portTries {
		port := s.ports.First + uint16(rand.N(int(s.ports.Last-s.ports.First)+1))
		if err = open(netip.AddrPortFrom(s.Addr, port)); !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
	}
	return err
}
