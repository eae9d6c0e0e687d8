package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestUnreachableConcentrator(t *testing.T) {
	b := newBond(t)
	b.mustEcho(1000)
	b.pool.SetReachable(false)
	if _, err := b.pool.Get(t.Context()); !errors.Is(err, ErrDown) || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("Get: %v", err)
	}
	if st := b.pool.Status(); st.Up || !errors.Is(st.Reason, ErrDown) {
		t.Errorf("status %+v", st)
	}
	b.pool.SetReachable(true)
	b.mustEcho(1000)
	if st := b.pool.Status(); !st.Up || st.Reason != nil {
		t.Errorf("afterwards: status %+v", st)
	}
}

func TestUnreachableReleasesThoseWhoWait(t *testing.T) {
	p := newBond(t).pool
	p.SetPeer(&Peer{Identity: newIdentity(t), Addresses: []string{"127.0.0.1:9"}})
	p.mu.Lock()
	p.trouble = map[string]*trouble{"one": {until: time.Now().Add(time.Hour)}} // nothing is dialled, and nothing has failed
	p.mu.Unlock()
	got := make(chan error, 1)
	go func() {
		_, err := p.Get(context.Background())
		got <- err
	}()
	for waiting := 0; waiting == 0; {
		p.mu.Lock()
		waiting = len(p.waiting)
		p.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	p.SetReachable(false)
	if err := await(t, got, "Get"); !errors.Is(err, ErrDown) {
		t.Errorf("Get: %v", err)
	}
}

// freezer stands between router and concentrator: connections that it has frozen
// pass nothing on and are not closed.
type freezer struct {
	mu   sync.Mutex
	gate *sync.RWMutex // of the connections that come now
}

func (f *freezer) freeze() (thaw func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	gate := f.gate
	f.gate = new(sync.RWMutex)
	gate.Lock()
	return gate.Unlock
}

func (f *freezer) pass(to, from net.Conn, gate *sync.RWMutex) {
	p := make([]byte, 65536)
	for {
		n, err := from.Read(p)
		gate.RLock()
		_, writeErr := to.Write(p[:n])
		gate.RUnlock()
		if err != nil || writeErr != nil {
			_ = to.Close()
			_ = from.Close()
			return
		}
	}
}

func TestSessionsThatDiedInAnOutageAreNotUsed(t *testing.T) {
	b := newBond(t)
	f := &freezer{gate: new(sync.RWMutex)}
	proxy := destination(t, func(c *net.TCPConn) {
		f.mu.Lock()
		gate := f.gate
		f.mu.Unlock()
		server, err := net.Dial("tcp", b.address)
		if err != nil { // the test is over: without it, no session comes about at all
			_ = c.Close()
			return
		}
		go f.pass(server, c, gate)
		f.pass(c, server, gate)
	})
	peer := b.enrolledPeer()
	peer.Addresses, peer.Multipath, peer.Variant = []string{proxy.String()}, false, "through the freezer"
	b.pool.SetPeer(peer)
	for b.pool.Status().Idle < minIdle {
		time.Sleep(10 * time.Millisecond)
	}
	thaw := f.freeze()
	defer thaw()
	b.pool.mu.Lock()
	frozen := map[*Session]bool{}
	for s := range b.pool.sessions {
		frozen[s] = true
	}
	b.pool.mu.Unlock()
	b.pool.SetReachable(false)
	b.pool.SetReachable(true)
	b.mustEcho(1000) // over a fresh one, though all that were idle are dead
	for s := range frozen {
		await(t, s.Done(), "the end of a session that does not answer")
	}
	b.mustEcho(1000)
}

// congestion is what the kernel says of a session's socket.
func congestion(t *testing.T, s *Session) string {
	t.Helper()
	name := ""
	err := s.wire.raw.Control(func(fd uintptr) {
		name, _ = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimRight(name, "\x00")
}

// become waits until a session's congestion control is as wanted.
func become(t *testing.T, s *Session, want string) {
	t.Helper()
	for try := 0; congestion(t, s) != want; try++ {
		if try == 1000 {
			t.Fatalf("congestion control %s, want %s", congestion(t, s), want)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestCalm(t *testing.T) {
	b := newBond(t)
	// Both directions send without end.
	to := destination(t, func(c *net.TCPConn) {
		go func() { _, _ = io.Copy(io.Discard, c) }()
		block := make([]byte, 65536)
		for {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	})
	client, result := b.connect(to)
	go func() { _, _ = io.Copy(io.Discard, client) }()
	go func() {
		block := make([]byte, 65536)
		for {
			if _, err := client.Write(block); err != nil {
				return
			}
		}
	}()
	busy := func(list map[*Session]bool) *Session {
		for s := range list {
			if s.busy() {
				return s
			}
		}
		return nil
	}
	var near, far *Session
	for near == nil || far == nil {
		time.Sleep(10 * time.Millisecond)
		list := map[*Session]bool{}
		b.pool.mu.Lock()
		for s := range b.pool.sessions {
			list[s] = true
		}
		b.pool.mu.Unlock()
		near = busy(list)
		list = map[*Session]bool{}
		b.server.mu.Lock()
		for s := range b.server.active {
			list[s] = true
		}
		b.server.mu.Unlock()
		far = busy(list)
	}
	become(t, near, congestionControl)
	become(t, far, congestionControl)
	b.pool.SetCalm(true)
	become(t, near, calmControl)
	if got := congestion(t, far); got != congestionControl {
		t.Errorf("the router's choice changed the concentrator's to %s", got)
	}
	b.server.SetCalm(b.routerID.PublicKey(), true)
	become(t, far, calmControl)
	b.pool.SetCalm(false)
	b.server.SetCalm(b.routerID.PublicKey(), false)
	become(t, near, congestionControl)
	become(t, far, congestionControl)
	for _, name := range []string{calmControl, congestionControl} {
		b.pool.SetCongestionControl(name)
		runs, reason := b.server.SetCongestionControl(b.routerID.PublicKey(), name)
		if runs != name || reason != "" || b.pool.CongestionControl() != name {
			t.Errorf("asked for %s: the pool has %s, the server %s: %s", name, b.pool.CongestionControl(), runs, reason)
		}
		b.pool.SetCalm(name == congestionControl) // the choice is before what fits
		become(t, near, name)
		become(t, far, name)
	}
	b.pool.SetCongestionControl("auto")
	if runs, _ := b.server.SetCongestionControl(b.routerID.PublicKey(), ""); runs != "auto" {
		t.Errorf("a router that asks for nothing has %s", runs)
	}
	become(t, near, calmControl)
	_ = client.SetLinger(0)
	_ = client.Close()
	await(t, result, "relay")
}

// A kernel that does not know what we ask for is asked once, and says so once.
func TestNothingCalmer(t *testing.T) {
	b := newBond(t)
	s, err := b.pool.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.wire.setCongestionControl("no such"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("an unknown congestion control gives %v; keepCalm expects ENOENT", err)
	}
	s.calm.missing.Store(true)
	b.pool.SetCalm(true)
	s.keepCalm()
	if got := congestion(t, s); got != congestionControl {
		t.Errorf("congestion control %s", got)
	}
}

// MPTCP passes where the other end speaks it, and does not where it falls back.
func TestPasses(t *testing.T) {
	b := newBond(t)
	peer := b.enrolledPeer()
	if passes, err := peer.Passes(t.Context(), b.loopback()[0]); !passes || err != nil {
		t.Errorf("to a listener with MPTCP: %v, %v", passes, err)
	}
	config := net.ListenConfig{}
	config.SetMultipathTCP(false)
	l, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { b.server.Serve(ctx, l) })
	defer running.Wait()
	defer cancel()
	peer.Addresses = []string{l.Addr().String()}
	if passes, err := peer.Passes(t.Context(), b.loopback()[0]); passes || err != nil {
		t.Errorf("to one without: %v, %v", passes, err)
	}
	peer.Addresses = []string{"127.0.0.1:1"}
	if passes, err := peer.Passes(t.Context(), b.loopback()[0]); passes || err == nil {
		t.Errorf("to nobody: %v, %v", passes, err)
	}
}
