package tunnel

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// bond is a router's pool and a concentrator's server over loopback, real
// sockets and real MPTCP, with destinations on loopback too.
type bond struct {
	t          testing.TB
	pool       *Pool
	server     *Server
	admission  *registry
	routerID   *Identity
	serverID   *Identity
	address    string
	carriers   *carriers
	log        *logBuffer // the server's
	stopServer func()
}

// registry is an Admission in memory.
type registry struct {
	mu      sync.Mutex
	routers map[PublicKey]string
	tokens  map[string]string
}

func (r *registry) Router(key PublicKey) (string, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	name, ok := r.routers[key]
	return name, ok
}

func (r *registry) Enrol(secret []byte, key PublicKey) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	name, ok := r.tokens[string(secret)]
	if !ok {
		return "", &RefusedError{CodeTokenUnknown, "unknown token"}
	}
	delete(r.tokens, string(secret))
	r.routers[key] = name
	return name, nil
}

func newIdentity(t testing.TB) *Identity {
	t.Helper()
	id, err := NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func newBond(t testing.TB) *bond {
	t.Helper()
	b := &bond{t: t, routerID: newIdentity(t), serverID: newIdentity(t), carriers: newCarriers(), log: new(logBuffer)}
	b.admission = &registry{routers: map[PublicKey]string{b.routerID.PublicKey(): "home"}, tokens: map[string]string{}}
	b.startServer("127.0.0.1:0")
	b.pool = NewPool(slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { b.pool.Run(ctx) })
	b.pool.SetPeer(&Peer{Identity: b.routerID, Concentrator: b.serverID.PublicKey(), Addresses: []string{b.address}, Multipath: true})
	b.pool.SetPaths([]Path{{Name: "one", Sources: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}})
	t.Cleanup(func() {
		cancel()
		running.Wait()
		b.stopServer()
	})
	return b
}

func (b *bond) startServer(address string) {
	b.t.Helper()
	l, err := ListenConfig().Listen(context.Background(), "tcp", address)
	if err != nil {
		b.t.Fatal(err)
	}
	b.address = l.Addr().String()
	dial := func(ctx context.Context, _ string, destination netip.AddrPort) (*net.TCPConn, func(), ResetReason, error) {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", destination.String())
		if err != nil {
			return nil, nil, ResetRefused, err
		}
		return c.(*net.TCPConn), func() {}, 0, nil
	}
	b.server = NewServer(b.serverID, b.admission, dial, slog.New(slog.NewTextHandler(b.log, nil)))
	b.server.HandlePackets(b.carriers)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { b.server.Serve(ctx, l) })
	b.stopServer = func() { cancel(); running.Wait() }
}

// connect is a LAN client's connection to destination through the bond. The
// returned channel yields Relay's error.
func (b *bond) connect(destination netip.AddrPort) (*net.TCPConn, <-chan error) {
	b.t.Helper()
	client, routed := tcpPair(b.t)
	result := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		s, err := b.pool.Get(ctx)
		if err != nil {
			_ = routed.SetLinger(0)
			_ = routed.Close()
			result <- err
			return
		}
		err = s.Relay(routed, destination)
		b.pool.Put(s)
		result <- err
	}()
	return client, result
}

func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	config := net.ListenConfig{}
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); _ = d.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// destination is a server on the Internet: handle serves each connection.
func destination(t testing.TB, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	config := net.ListenConfig{}
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go handle(c.(*net.TCPConn))
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func echo(c *net.TCPConn) {
	defer func() { _ = c.Close() }()
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// echoed wants so many bytes back whole, though the client's direction ends first.
func echoed(t testing.TB, client *net.TCPConn, size int) {
	t.Helper()
	want := random(t, size)
	go func() {
		_, _ = client.Write(want)
		_ = client.CloseWrite()
	}()
	got, err := io.ReadAll(client)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes: got %d back, error %v", size, len(got), err)
	}
}

func random(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func await[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(15 * time.Second):
		t.Fatalf("%s: nothing after 15 s", what)
		panic("unreachable")
	}
}

func TestFlowsEchoBothWaysAndReuseTheirSession(t *testing.T) {
	b := newBond(t)
	to := destination(t, echo)
	for _, size := range []int{0, 1, 4096, 16380, 16381, 200_000, 5_000_000} {
		client, result := b.connect(to)
		echoed(t, client, size)
		if err := await(t, result, "relay"); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		time.Sleep(rest + 50*time.Millisecond)
	}
	most := uint32(0)
	b.pool.mu.Lock()
	for s := range b.pool.sessions {
		most = max(most, s.number)
	}
	b.pool.mu.Unlock()
	if most != 7 {
		t.Errorf("the busiest session carried %d flows, want all 7: sessions are not used again", most)
	}
}

func TestServerSpeaksFirst(t *testing.T) {
	b := newBond(t)
	to := destination(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "220 ready\r\n")
		_ = c.Close()
	})
	client, result := b.connect(to)
	got, err := io.ReadAll(client)
	if string(got) != "220 ready\r\n" || err != nil {
		t.Fatalf("got %q, %v", got, err)
	}
	_ = client.Close()
	await(t, result, "relay")
}

func TestRefusedDestinationIsResetAndTheSessionStays(t *testing.T) {
	b := newBond(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().(*net.TCPAddr).AddrPort()
	_ = l.Close()
	for range 3 {
		client, result := b.connect(nobody)
		_, _ = client.Write([]byte("hello"))
		_, err := client.Read(make([]byte, 1))
		if !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("client saw %v, want connection reset", err)
		}
		var aborted *FlowAbortedError
		if err := await(t, result, "relay"); !errors.As(err, &aborted) || aborted.Reason != ResetRefused {
			t.Fatalf("relay: %v, want refused", err)
		}
	}
	b.mustEcho(100_000)
	if n := b.pool.Status().Sessions; n > minIdle+1 {
		t.Errorf("%d sessions live, want at most %d: refused flows cost sessions", n, minIdle+1)
	}
}

// mustEcho proves that the bond still works.
func (b *bond) mustEcho(size int) {
	b.t.Helper()
	client, result := b.connect(destination(b.t, echo))
	want := random(b.t, size)
	go func() { _, _ = client.Write(want); _ = client.CloseWrite() }()
	got, err := io.ReadAll(client)
	if relayErr := await(b.t, result, "relay"); err != nil || relayErr != nil || !bytes.Equal(got, want) {
		b.t.Fatalf("echo of %d bytes: got %d, %v, relay %v", size, len(got), err, relayErr)
	}
}

func TestClientResetReachesTheServer(t *testing.T) {
	b := newBond(t)
	seen := make(chan error, 1)
	to := destination(t, func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, c)
		seen <- err
	})
	client, result := b.connect(to)
	_, _ = client.Write([]byte("going"))
	time.Sleep(50 * time.Millisecond)
	_ = client.SetLinger(0)
	_ = client.Close()
	if err := await(t, seen, "server"); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("server saw %v, want connection reset", err)
	}
	await(t, result, "relay")
	b.mustEcho(1000)
}

// The kernel reports a RST once: whoever reads first must pass it on, also when
// it comes right behind the data.
func TestResetRightBehindData(t *testing.T) {
	for range 50 {
		client, routed := tcpPair(t)
		s, err := newSocket(routed)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = client.Write([]byte("data"))
		_ = client.SetLinger(0)
		_ = client.Close()
		for {
			b, n, end, err := s.readShort(headroom, recordPayload, 0)
			if b != nil {
				b.release()
			}
			if end || errors.Is(err, io.EOF) {
				t.Fatalf("after %d bytes the RST looked like an end", n)
			}
			if err != nil {
				break
			}
		}
	}
}

// A client that goes away by RST while it is being written to: its upload must
// not look complete, whichever goroutine the kernel tells first.
func TestResetOfABusyClientIsNoEnd(t *testing.T) {
	b := newBond(t)
	seen := make(chan error, 1)
	to := destination(t, func(c *net.TCPConn) {
		go func() {
			block := make([]byte, 65536)
			for {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}()
		_, err := io.Copy(io.Discard, c)
		if s, socketErr := newSocket(c); socketErr != nil || s.closed() {
			err = unix.ECONNRESET // its writer may have been told, and not its reader
		}
		seen <- err
	})
	for range 30 {
		client, result := b.connect(to)
		_, _ = client.Write([]byte("part of an upload"))
		if _, err := io.ReadFull(client, make([]byte, 200_000)); err != nil {
			t.Fatal(err)
		}
		_ = client.SetLinger(0)
		_ = client.Close()
		if err := await(t, seen, "server"); err == nil {
			t.Fatal("the server saw a clean end of an upload that was cut off")
		}
		await(t, result, "relay")
	}
}

func TestServerResetReachesTheClient(t *testing.T) {
	b := newBond(t)
	to := destination(t, func(c *net.TCPConn) {
		_, _ = io.ReadFull(c, make([]byte, 5))
		_ = c.SetLinger(0)
		_ = c.Close()
	})
	client, result := b.connect(to)
	_, _ = client.Write([]byte("hello"))
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("client saw %v, want connection reset", err)
	}
	await(t, result, "relay")
	b.mustEcho(1000)
}

// A session that dies must not look like the end of a file.
func TestLostSessionIsARSTNotAnEnd(t *testing.T) {
	b := newBond(t)
	to := destination(t, func(c *net.TCPConn) {
		_, _ = c.Write(make([]byte, 1000))
		_, _ = io.Copy(io.Discard, c)
	})
	client, result := b.connect(to)
	if _, err := io.ReadFull(client, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	b.stopServer()
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("client saw %v, want connection reset", err)
	}
	if err := await(t, result, "relay"); err == nil {
		t.Fatal("relay ended without an error")
	}
	b.startServer(b.address)
	// Flows may still meet sessions whose end has not been noticed, or find the
	// tunnel down; both end with RST. Before long they pass again.
	for try := 0; ; try++ {
		client, result := b.connect(destination(t, echo))
		_, _ = client.Write([]byte("again"))
		_ = client.CloseWrite()
		got, _ := io.ReadAll(client)
		if string(got) == "again" {
			await(t, result, "relay")
			return
		}
		if try == 100 {
			t.Fatalf("no flow passes after the server is back: %v", await(t, result, "relay"))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Aborting a download half-way is what browsers do all day.
func TestAbortedDownloads(t *testing.T) {
	b := newBond(t)
	to := destination(t, func(c *net.TCPConn) {
		defer func() { _ = c.Close() }()
		block := make([]byte, 65536)
		for {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
	})
	for range 20 {
		client, result := b.connect(to)
		if _, err := io.ReadFull(client, make([]byte, 300_000)); err != nil {
			t.Fatal(err)
		}
		_ = client.Close()
		await(t, result, "relay")
	}
	b.mustEcho(1000)
}

// A client that does not read must stop the server, not fill our memory.
func TestBackPressure(t *testing.T) {
	b := newBond(t)
	sent := make(chan int, 1)
	to := destination(t, func(c *net.TCPConn) {
		defer func() { _ = c.Close() }()
		block := make([]byte, 65536)
		total := 0
		for {
			_ = c.SetWriteDeadline(time.Now().Add(2 * time.Second))
			n, err := c.Write(block)
			total += n
			if err != nil {
				sent <- total
				return
			}
		}
	})
	client, _ := b.connect(to)
	total := await(t, sent, "server")
	// Four sockets hold something: their buffers' maxima are the bound.
	if total > 200<<20 {
		t.Errorf("the server could send %d bytes to a client that reads none", total)
	}
	_ = client.SetLinger(0)
	_ = client.Close()
	b.mustEcho(1000)
}
