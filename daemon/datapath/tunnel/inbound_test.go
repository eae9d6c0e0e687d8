package tunnel

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inbound is the router's end of a bond's forwards: number n goes to hosts[n].
type inbound struct {
	*bond
	router  *Inbound
	hosts   []netip.AddrPort
	clients chan netip.AddrPort // as the router was told
	open    atomic.Int64        // connections to hosts
}

func newInbound(t *testing.T, hosts ...netip.AddrPort) *inbound {
	t.Helper()
	in := &inbound{bond: newBond(t), hosts: hosts, clients: make(chan netip.AddrPort, 100)}
	in.router = NewInbound(in.pool, func(ctx context.Context, forward uint16, client netip.AddrPort) (*net.TCPConn, func(), ResetReason, error) {
		in.clients <- client
		if int(forward) >= len(hosts) {
			return nil, nil, ResetForbidden, errors.New("no such forward")
		}
		c, err := new(net.Dialer).DialContext(ctx, "tcp", hosts[forward].String())
		if err != nil {
			return nil, nil, ResetRefused, err
		}
		in.open.Add(1)
		return c.(*net.TCPConn), func() { in.open.Add(-1) }, 0, nil
	}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { in.router.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	in.router.SetForwards(len(hosts))
	return in
}

// arrive is a connection of a client on the Internet to a forwarded port.
func (in *inbound) arrive(forward uint16) (*net.TCPConn, <-chan error) {
	in.t.Helper()
	client, accepted := tcpPair(in.t)
	result := make(chan error, 1)
	go func() {
		result <- in.server.OpenInbound(context.Background(), in.routerID.PublicKey(), forward, accepted)
	}()
	return client, result
}

func TestInboundFlowsReachTheLANHost(t *testing.T) {
	in := newInbound(t, destination(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c); _ = c.Close() }), destination(t, echo))
	for _, size := range []int{0, 1, 4096, 5_000_000, 1} {
		client, result := in.arrive(1)
		echoed(t, client, size)
		if err := await(t, result, "OpenInbound"); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if told := await(t, in.clients, "the client's address"); told != client.LocalAddr().(*net.TCPAddr).AddrPort() {
			t.Errorf("the router was told of %s, the client is %s", told, client.LocalAddr())
		}
	}
	if a := in.server.Activity()[in.routerID.PublicKey()]; a.Flows != 0 || a.InboundSessions < minParked || a.InboundSessions > maxParked {
		t.Errorf("activity %+v", a)
	}
	for range 500 { // the last host's end is seen a little later
		if in.open.Load() == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d connections to hosts were never done", in.open.Load())
}

func TestManyInboundFlowsAtOnce(t *testing.T) {
	in := newInbound(t, destination(t, echo))
	var all sync.WaitGroup
	for range 60 { // many more than are parked
		client, result := in.arrive(0)
		all.Go(func() {
			_, _ = client.Write([]byte("hello"))
			_ = client.CloseWrite()
			if got, err := io.ReadAll(client); string(got) != "hello" || err != nil {
				t.Errorf("echo %q, %v", got, err)
			}
			if err := <-result; err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

func TestResetsPassThroughInboundFlows(t *testing.T) {
	seen := make(chan error, 1)
	in := newInbound(t,
		destination(t, func(c *net.TCPConn) { _, err := io.Copy(io.Discard, c); seen <- err }),
		destination(t, func(c *net.TCPConn) {
			_, _ = io.ReadFull(c, make([]byte, 5))
			_ = c.SetLinger(0)
			_ = c.Close()
		}))
	client, result := in.arrive(0)
	_, _ = client.Write([]byte("hello"))
	time.Sleep(50 * time.Millisecond)
	_ = client.SetLinger(0)
	_ = client.Close()
	if err := await(t, seen, "the host"); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the host saw %v, want connection reset", err)
	}
	await(t, result, "OpenInbound")
	for _, forward := range []uint16{1, 7} { // 7: a forward that the router does not have
		client, result = in.arrive(forward)
		_, _ = client.Write([]byte("hello"))
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("forward %d: the client saw %v, want connection reset", forward, err)
		}
		var aborted *FlowAbortedError
		if err := await(t, result, "OpenInbound"); !errors.As(err, &aborted) || forward == 7 && aborted.Reason != ResetForbidden {
			t.Errorf("forward %d: %v", forward, err)
		}
	}
}

// A host that does not read must stop the client, not fill our memory.
func TestInboundBackPressure(t *testing.T) {
	hold := make(chan struct{})
	in := newInbound(t, destination(t, func(c *net.TCPConn) { <-hold; _ = c.Close() }))
	defer close(hold)
	client, _ := in.arrive(0)
	block, total := make([]byte, 65536), 0
	for {
		_ = client.SetWriteDeadline(time.Now().Add(2 * time.Second))
		n, err := client.Write(block)
		total += n
		if err != nil {
			break
		}
	}
	if total > 200<<20 {
		t.Errorf("the client could send %d bytes to a host that reads none", total)
	}
	_ = client.SetLinger(0)
	_ = client.Close()
}

func TestNoSessionForInbound(t *testing.T) {
	b, _ := newQuietBond(t)
	for _, known := range []bool{false, true} {
		if known {
			b.stream(1)
		}
		client, accepted := tcpPair(t)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		err := b.server.OpenInbound(ctx, b.routerID.PublicKey(), 0, accepted)
		cancel()
		if !errors.Is(err, ErrNoInbound) {
			t.Errorf("router known %v: %v", known, err)
		}
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("router known %v: the client saw %v, want connection reset", known, err)
		}
	}
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	if n := len(b.server.routers[b.routerID.PublicKey()].waiting); n != 0 {
		t.Errorf("%d still wait", n)
	}
}

func TestRevokeEndsInboundFlows(t *testing.T) {
	in := newInbound(t, destination(t, echo))
	client, result := in.arrive(0)
	_, _ = client.Write([]byte("x"))
	if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	in.admission.mu.Lock()
	delete(in.admission.routers, in.routerID.PublicKey())
	in.admission.mu.Unlock()
	in.server.Revoke(in.routerID.PublicKey())
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v, want connection reset", err)
	}
	await(t, result, "OpenInbound")
	for try := 0; in.router.Sessions() > 0; try++ {
		if try == 500 {
			t.Fatalf("%d inbound sessions of a revoked router", in.router.Sessions())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestContextEndsAnInboundFlow(t *testing.T) {
	in := newInbound(t, destination(t, echo))
	client, accepted := tcpPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- in.server.OpenInbound(ctx, in.routerID.PublicKey(), 0, accepted) }()
	_, _ = client.Write([]byte("x"))
	if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := await(t, result, "OpenInbound"); !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v, want connection reset", err)
	}
}

func TestNoForwardsNoSessions(t *testing.T) {
	in := newInbound(t, destination(t, echo))
	wait := func(what string, ok func(int) bool) {
		t.Helper()
		for try := 0; !ok(in.router.Sessions()); try++ {
			if try == 1000 {
				t.Fatalf("%s: %d sessions", what, in.router.Sessions())
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	wait("with a forward", func(n int) bool { return n >= minParked })
	client, result := in.arrive(0)
	_, _ = client.Write([]byte("x"))
	if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	in.router.SetForwards(0)
	wait("without one, the open flow's", func(n int) bool { return n == 1 })
	_ = client.CloseWrite()
	if err := await(t, result, "the flow that was open"); err != nil {
		t.Error(err)
	}
	wait("without one and without a flow", func(n int) bool { return n == 0 })
}

func TestHowManyParked(t *testing.T) {
	for _, c := range []struct{ forwards, opened, want int }{{0, 0, 0}, {0, 9, 0}, {1, 0, minParked}, {3, 9, 9}, {1, 500, maxParked}} {
		if got := parkedTarget(c.forwards, c.opened); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
}

// A concentrator that opens flows where it may not, or wrongly, loses the session.
func TestBrokenInboundOpen(t *testing.T) {
	for name, raw := range map[string][]byte{
		"too short":      appendFrame(nil, frameOpen, []byte("short")),
		"the other kind": appendOpen(nil, 1, netip.MustParseAddrPort("192.0.2.1:80")),
		"a packet":       appendFrame(nil, framePacket, []byte("x")),
	} {
		in := newInbound(t, destination(t, echo))
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		for in.server.Activity()[in.routerID.PublicKey()].InboundSessions == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		s, err := in.server.take(ctx, in.routerID.PublicKey())
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.send(raw); err != nil {
			t.Fatal(err)
		}
		await(t, s.Done(), name)
	}
}
