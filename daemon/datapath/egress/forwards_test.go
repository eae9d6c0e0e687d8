package egress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// greet tells each client who it reached, and holds it until it is over.
func greet(ctx context.Context, router string, id uint16, client *net.TCPConn) {
	fmt.Fprintf(client, "%s %d\n", router, id)
	_, _ = io.Copy(io.Discard, client)
	if ctx.Err() == nil {
		_ = client.CloseWrite()
	}
}

func newForwards(t *testing.T, policy ForwardPolicy, open OpenFunc) *Forwards {
	t.Helper()
	f := NewForwards(policy, open, slog.New(slog.DiscardHandler))
	t.Cleanup(f.Close)
	return f
}

// connect dials a port and returns what it says, or why it does not.
func connect(t *testing.T, address string) (net.Conn, string) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err.Error()
	}
	t.Cleanup(func() { _ = c.Close() })
	must(t, c.SetDeadline(time.Now().Add(testWait)))
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		return c, err.Error()
	}
	return c, strings.TrimSpace(string(b[:n]))
}

// ended tells whether the other end has closed the connection.
func ended(t *testing.T, c net.Conn) bool {
	t.Helper()
	_, err := c.Read(make([]byte, 1))
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

func TestForwardPolicy(t *testing.T) {
	some := ForwardPolicy{Ports: []PortRange{{80, 80}, {8000, 8100}}, Reserved: []uint16{8001}}
	for _, c := range []struct {
		policy   ForwardPolicy
		protocol string
		port     uint16
		want     string
	}{
		{ForwardPolicy{}, "tcp", 1024, ""},
		{ForwardPolicy{}, "udp", 65535, ""},
		{ForwardPolicy{}, "tcp", 1023, "not among those that the concentrator forwards (1024-65535)"},
		{ForwardPolicy{}, "tcp", 0, "not among"},
		{ForwardPolicy{Ports: []PortRange{{0, 10}}}, "tcp", 0, "not among"},
		{ForwardPolicy{}, "sctp", 2000, `protocol "sctp" cannot be forwarded`},
		{some, "tcp", 80, ""},
		{some, "tcp", 81, "(80, 8000-8100)"},
		{some, "tcp", 8100, ""},
		{some, "udp", 8101, "not among"},
		{some, "udp", 8001, "the concentrator's own"},
	} {
		got := c.policy.refusal(c.protocol, c.port)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%+v, %s %d: %q, want %q", c.policy, c.protocol, c.port, got, c.want)
		}
	}
}

func TestForwards(t *testing.T) {
	f := newForwards(t, ForwardPolicy{Reserved: []uint16{4443}}, greet)
	other, err := net.Listen("tcp4", "127.0.0.1:3000")
	must(t, err)
	defer func() { _ = other.Close() }()
	otherUDP, err := net.ListenPacket("udp4", "127.0.0.1:3000")
	must(t, err)
	defer func() { _ = otherUDP.Close() }()

	check := func(router string, wanted []Forward, reasons ...string) {
		t.Helper()
		results := f.Set(router, wanted)
		if len(results) != len(wanted) {
			t.Fatalf("%d results for %d forwards", len(results), len(wanted))
		}
		for i, r := range results {
			state := ForwardActive
			if reasons[i] != "" {
				state = ForwardRefused
			}
			if r.ID != wanted[i].ID || r.State != state || !strings.Contains(r.Reason, reasons[i]) || reasons[i] == "" && r.Reason != "" {
				t.Errorf("%s: %+v: %+v, want %q", router, wanted[i], r, reasons[i])
			}
			if strings.Contains(r.Reason, "home") {
				t.Errorf("another router is named: %q", r.Reason)
			}
		}
	}
	check("home", []Forward{{1, "tcp", 2000}, {2, "udp", 2000}, {3, "tcp", 2001}, {4, "tcp", 2000}, {5, "tcp", 22}, {6, "tcp", 4443}, {7, "tcp", 3000}, {8, "udp", 3000}},
		"", "", "", "listed twice", "not among", "own", "used by another program", "used by another program")
	check("cabin", []Forward{{1, "tcp", 2000}, {2, "udp", 2000}, {3, "udp", 2002}}, "forwarded to another router", "forwarded to another router", "")
	if got := fmt.Sprint(f.UDP()); got != "[{home 2000} {cabin 2002}]" {
		t.Errorf("UDP forwards %s", got)
	}

	kept, greeting := connect(t, "127.0.0.1:2000")
	if greeting != "home 1" {
		t.Fatalf("by IPv4: %q", greeting)
	}
	if _, greeting := connect(t, "[::1]:2000"); greeting != "home 1" {
		t.Errorf("by IPv6: %q", greeting)
	}
	removed, greeting := connect(t, "127.0.0.1:2001")
	if greeting != "home 3" {
		t.Fatalf("the second port: %q", greeting)
	}

	// One stays, with another number, one goes, one comes: what stays is not disturbed.
	check("home", []Forward{{9, "tcp", 2000}, {2, "tcp", 2003}}, "", "")
	if !ended(t, removed) {
		t.Error("a removed forward kept its connection")
	}
	if c, err := net.Dial("tcp", "127.0.0.1:2001"); err == nil {
		_ = c.Close()
		t.Error("a removed forward still listens")
	}
	if _, err := kept.Write([]byte("x")); err != nil {
		t.Errorf("the forward that stayed lost its connection: %v", err)
	}
	must(t, kept.(*net.TCPConn).CloseWrite())
	if n, err := kept.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the connection that stayed ended with %v, not in good order", err)
	}
	if _, greeting := connect(t, "127.0.0.1:2000"); greeting != "home 9" {
		t.Errorf("the forward that stayed: %q, want its new number", greeting)
	}

	// What one router gives up another can have, also at once after connections.
	f.Remove("home")
	check("cabin", []Forward{{1, "tcp", 2000}, {2, "udp", 2000}}, "", "")
	if _, greeting := connect(t, "127.0.0.1:2000"); greeting != "cabin 1" {
		t.Errorf("taken over: %q", greeting)
	}
	many := make([]Forward, MaxForwards+1)
	reasons := make([]string, len(many))
	for i := range many {
		many[i] = Forward{uint16(i), "udp", uint16(10000 + i)}
	}
	reasons[MaxForwards] = "may have 256 ports"
	check("cabin", many, reasons...)
	f.Close()
	if got := f.UDP(); len(got) != 0 {
		t.Errorf("closed, but there are %v", got)
	}
}

// TestReservedUDP: nobody else gets the port, and nothing piles up in it.
func TestReservedUDP(t *testing.T) {
	made := &forward{}
	must(t, reserve(made, 2100))
	for _, address := range []string{"127.0.0.1:2100", "[::1]:2100", ":2100"} {
		if c, err := net.ListenPacket("udp", address); err == nil {
			_ = c.Close()
			t.Errorf("another program could have %s", address)
		}
	}
	for _, address := range []string{"127.0.0.1:2100", "[::1]:2100"} {
		c, err := net.Dial("udp", address)
		must(t, err)
		for range 2 { // were nothing bound there, the second would be refused
			if _, err := c.Write(make([]byte, 1000)); err != nil {
				t.Errorf("%s: %v", address, err)
			}
		}
		_ = c.Close()
	}
	// In /proc/net/udp the port is hexadecimal, behind the address; then the
	// queues, tx:rx.
	sockets, err := os.ReadFile("/proc/thread-self/net/udp6")
	must(t, err)
	found := false
	for line := range strings.Lines(string(sockets)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", 2100)) {
			found = true
			if fields[4] != "00000000:00000000" {
				t.Errorf("packets wait in the socket: %s", fields[4])
			}
		}
	}
	if !found {
		t.Errorf("no socket on the port:\n%s", sockets)
	}
	made.close()
	c, err := net.ListenPacket("udp", ":2100")
	must(t, err)
	_ = c.Close()
}

func TestForwardLimit(t *testing.T) {
	f := newForwards(t, ForwardPolicy{}, greet)
	for range MaxInbound {
		f.live.enter("busy")
	}
	f.Set("busy", []Forward{{1, "tcp", 2200}})
	f.Set("idle", []Forward{{1, "tcp", 2201}})
	if _, greeting := connect(t, "127.0.0.1:2200"); !strings.Contains(greeting, "reset") {
		t.Errorf("at the limit: %q, want a reset", greeting)
	}
	if _, greeting := connect(t, "127.0.0.1:2201"); greeting != "idle 1" {
		t.Errorf("another router: %q", greeting)
	}
	f.live.leave("busy")
	if _, greeting := connect(t, "127.0.0.1:2200"); greeting != "busy 1" {
		t.Errorf("below the limit: %q", greeting)
	}
}

// failing is a listener that has no file descriptors at first.
type failing struct {
	acceptor
	mu   sync.Mutex
	left int
}

func (f *failing) AcceptTCP() (*net.TCPConn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left > 0 {
		f.left--
		return nil, unix.EMFILE
	}
	return f.acceptor.AcceptTCP()
}

func TestAcceptGoesOn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var logged strings.Builder
	log := newSparseLog(slog.New(slog.NewTextHandler(&logged, nil)))
	handled, over := make(chan *net.TCPConn), make(chan bool)
	go func() {
		accept(ctx, &failing{acceptor: l.(*net.TCPListener), left: 4}, log, func(c *net.TCPConn) { handled <- c })
		close(over)
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer func() { _ = c.Close() }()
	select {
	case c := <-handled:
		_ = c.Close()
	case <-time.After(testWait):
		t.Fatal("nothing was accepted after some failures")
	}
	cancel()
	_ = l.Close()
	<-over
	if got := strings.Count(logged.String(), "accepting a connection failed"); got != 1 {
		t.Errorf("logged %d times within a minute, want once:\n%s", got, logged.String())
	}
}
