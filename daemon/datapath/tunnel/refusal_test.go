package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// logBuffer keeps what the server logs.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// waitFor waits until the log has text.
func (l *logBuffer) waitFor(t *testing.T, text string) {
	t.Helper()
	for range 1000 {
		if strings.Contains(l.String(), text) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("the log never said %q; it says:\n%s", text, l)
}

// newQuietBond is a bond whose router dials nothing by itself.
func newQuietBond(t *testing.T) (*bond, *logBuffer) {
	t.Helper()
	b := newBond(t)
	b.pool.SetPeer(nil)
	return b, b.log
}

func (b *bond) peer(id *Identity) *Peer {
	return &Peer{Identity: id, Concentrator: b.serverID.PublicKey(), Multipath: true}
}

// first sends a first message of the caller's choice and returns the answer.
func (b *bond) first(id *Identity, raw []byte) (frameKind, []byte, error) {
	s, err := b.peer(id).connect(context.Background(), source{}, b.address)
	if err != nil {
		return 0, nil, err
	}
	defer s.Close()
	if _, err := s.tls.Write(raw); err != nil {
		return 0, nil, err
	}
	return s.receiveControl()
}

func TestUnknownVersionIsRefusedAndBothEndsKnow(t *testing.T) {
	b, log := newQuietBond(t)
	kind, body, err := b.first(b.routerID, appendFrame(nil, frameHello, []byte(`{"min":7,"max":9}`)))
	if err != nil || kind != frameRefuse {
		t.Fatalf("answer %v %s, %v; want REFUSE", kind, body, err)
	}
	want := "the router speaks tunnel protocol version 7 to 9, this concentrator 1 to 1"
	if !strings.Contains(string(body), want) || !strings.Contains(string(body), `"code":"version"`) {
		t.Errorf("REFUSE says %s, want %q", body, want)
	}
	log.waitFor(t, want)
}

func TestNegotiate(t *testing.T) {
	for _, c := range []struct{ min, max, want int }{{1, 1, 1}, {1, 5, 1}, {0, 1, 1}, {2, 3, 0}, {0, 0, 0}, {-1, -1, 0}, {5, 1, 0}} {
		got, err := negotiate(c.min, c.max)
		if got != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("negotiate(%d, %d) = %d, %v; want %d", c.min, c.max, got, err, c.want)
		}
	}
}

func TestStrangersAreRefused(t *testing.T) {
	b, log := newQuietBond(t)
	stranger := newIdentity(t)
	_, err := b.peer(stranger).dial(context.Background(), source{}, b.address)
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Code != CodeNotEnrolled {
		t.Fatalf("dial: %v, want a refusal as not enrolled", err)
	}
	log.waitFor(t, stranger.PublicKey().Fingerprint())

	for name, first := range map[string][]byte{
		"garbage":          bytes.Repeat([]byte{0xee}, 300),
		"a flow at once":   appendOpen(nil, 1, netip.MustParseAddrPort("192.0.2.1:80")),
		"no JSON":          appendFrame(nil, frameHello, []byte("hello")),
		"oversized":        {byte(frameHello), 0xff, 0xff, 0xff},
		"hello and a flow": appendOpen(appendFrame(nil, frameHello, []byte(`{"min":1,"max":1}`)), 1, netip.MustParseAddrPort("192.0.2.1:80")),
	} {
		kind, body, err := b.first(b.routerID, first)
		if err == nil && kind != frameRefuse {
			t.Errorf("%s: answer %v %s", name, kind, body)
		}
	}
	// Not TLS, and TLS without a key.
	c, err := net.Dial("tcp", b.address)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	_, _ = io.Copy(io.Discard, c)
	log.waitFor(t, "first record does not look like a TLS handshake")
	keyless, err := tls.Dial("tcp", b.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{alpn}})
	if err == nil {
		_, err = keyless.Read(make([]byte, 1))
	}
	if err == nil {
		t.Error("a client without a key was served")
	}
	log.waitFor(t, "client didn't provide a certificate")

	b.pool.SetPeer(b.enrolledPeer())
	b.mustEcho(1000)
}

func (b *bond) enrolledPeer() *Peer {
	p := b.peer(b.routerID)
	p.Addresses = []string{b.address}
	return p
}

func TestAnotherConcentratorIsNotTrusted(t *testing.T) {
	b, _ := newQuietBond(t)
	p := b.peer(b.routerID)
	p.Concentrator = newIdentity(t).PublicKey()
	_, err := p.dial(context.Background(), source{}, b.address)
	var mismatch *KeyMismatchError
	if !errors.As(err, &mismatch) || mismatch.Got != b.serverID.PublicKey() {
		t.Fatalf("dial: %v, want a key mismatch", err)
	}
}

func TestEnrolOnce(t *testing.T) {
	b, _ := newQuietBond(t)
	token := Token{Name: "cabin", Addresses: []string{b.address}, Concentrator: b.serverID.PublicKey(), Secret: [16]byte{1, 2, 3}}
	b.admission.mu.Lock()
	b.admission.tokens[string(token.Secret[:])] = token.Name
	b.admission.mu.Unlock()
	id := newIdentity(t)
	if err := Enrol(context.Background(), id, token, nil, "test"); err != nil {
		t.Fatal(err)
	}
	if name, ok := b.admission.Router(id.PublicKey()); name != "cabin" || !ok {
		t.Fatalf("enrolled as %q, %v", name, ok)
	}
	err := Enrol(context.Background(), newIdentity(t), token, nil, "test")
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Code != CodeTokenUnknown {
		t.Fatalf("a second router: %v", err)
	}
}

// Bytes that break the protocol on an enrolled session end that session alone.
func TestBrokenFramesEndTheirSessionOnly(t *testing.T) {
	b := newBond(t)
	slow := destination(t, func(c *net.TCPConn) { _, _ = io.Copy(c, c); _ = c.Close() })
	client, _ := b.connect(slow)
	_, _ = client.Write([]byte("one"))
	if _, err := io.ReadFull(client, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	open := appendOpen(nil, 1, slow)
	for name, raw := range map[string][]byte{
		"data while idle":  appendFrame(nil, frameData, []byte("x")),
		"end while idle":   appendFrame(nil, frameEnd, nil),
		"second hello":     appendFrame(nil, frameHello, []byte("{}")),
		"unknown kind":     {77, 0, 0, 0},
		"oversized":        {byte(frameData), 0xff, 0xff, 0xff},
		"malformed open":   appendFrame(nil, frameOpen, []byte("short")),
		"malformed reset":  appendFrame(nil, frameReset, nil),
		"open in a flow":   append(append([]byte(nil), open...), open...),
		"data after end":   appendFrame(appendFrame(append([]byte(nil), open...), frameEnd, nil), frameData, []byte("x")),
		"packet":           appendFrame(nil, framePacket, []byte("x")),
		"config":           appendFrame(nil, frameConfig, []byte("{}")),
		"welcome, to them": appendFrame(nil, frameWelcome, []byte("{}")),
	} {
		s, err := b.enrolledPeer().dial(context.Background(), source{}, b.address)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.send(raw); err != nil {
			t.Fatal(err)
		}
		_ = s.wire.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err = io.Copy(io.Discard, s.tls)
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("%s: the concentrator kept the session", name)
		}
		s.Close()
	}
	_, _ = client.Write([]byte("two"))
	got := make([]byte, 3)
	if _, err := io.ReadFull(client, got); err != nil || string(got) != "two" {
		t.Fatalf("the other flow: %q, %v", got, err)
	}
}

// Connections that say nothing are bounded in number, and do not keep routers out
// for longer than the handshake may take.
func TestSilentConnectionsAreBounded(t *testing.T) {
	b, _ := newQuietBond(t)
	before := runtime.NumGoroutine()
	var silent []net.Conn
	for range maxUnknown + 200 {
		c, err := net.Dial("tcp", b.address)
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	defer func() {
		for _, c := range silent {
			_ = c.Close()
		}
	}()
	// The newest are closed at once.
	last := silent[len(silent)-1]
	_ = last.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := last.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "timeout") {
		t.Errorf("connection %d was kept: %v", len(silent), err)
	}
	if n := runtime.NumGoroutine() - before; n > maxUnknown+50 {
		t.Errorf("%d goroutines for silent connections", n)
	}
	// The others, as soon as the handshake has taken too long.
	_ = silent[0].SetReadDeadline(time.Now().Add(3 * handshakeTime))
	if _, err := silent[0].Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("a silent connection was kept for %v: %v", 3*handshakeTime, err)
	}
	_, _ = silent[maxUnknown-1].Read(make([]byte, 1)) // all of them
	b.pool.SetPeer(b.enrolledPeer())
	b.mustEcho(1000)
}

func TestRevokeEndsLiveFlows(t *testing.T) {
	b := newBond(t)
	to := destination(t, echo)
	client, result := b.connect(to)
	_, _ = client.Write([]byte("x"))
	if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	b.admission.mu.Lock()
	delete(b.admission.routers, b.routerID.PublicKey())
	b.admission.mu.Unlock()
	b.server.Revoke(b.routerID.PublicKey())
	if _, err := client.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("client saw %v, want connection reset", err)
	}
	await(t, result, "relay")
}
