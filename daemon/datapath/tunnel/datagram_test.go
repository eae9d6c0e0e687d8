package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// serveDatagrams makes the bond's server listen on UDP.
func (b *bond) serveDatagrams(socket net.PacketConn) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { b.server.ServeDatagrams(ctx, socket) })
	stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	b.t.Cleanup(stop)
	return stop
}

func udp(t *testing.T, address string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func (b *bond) datagramPeer(socket net.PacketConn) *Peer {
	p := b.enrolledPeer()
	p.Addresses = []string{socket.LocalAddr().String()}
	return p
}

func (b *bond) datagrams(p *Peer) (router Messages, concentrator attachment) {
	b.t.Helper()
	m, inner, err := p.DialDatagram(b.t.Context(), b.loopback()[0], 9)
	if err != nil {
		b.t.Fatal(err)
	}
	if inner != b.carriers.inner {
		b.t.Fatalf("inner addresses %+v", inner)
	}
	b.t.Cleanup(func() { _ = m.Close() })
	a := await(b.t, b.carriers.attached, "the connection at the concentrator")
	if a.key != b.routerID.PublicKey() || a.name != "home" || a.bond != 9 || a.link != "dsl" || !a.datagram {
		b.t.Fatalf("attached as %+v", a)
	}
	return m, a
}

func TestDatagramsCarryMessages(t *testing.T) {
	b, _ := newQuietBond(t)
	socket := udp(t, "127.0.0.1:0")
	b.serveDatagrams(socket)
	router, far := b.datagrams(b.datagramPeer(socket))
	atRouter, _, routerEnded := collect(router)
	atFar, _, farEnded := collect(far)
	if n := router.MaxMessage(); n < 1000 || n > 1200 {
		t.Errorf("before anything is known of the path at most %d bytes, want a little less than 1200", n)
	}
	for _, way := range []struct {
		from Messages
		to   chan []byte
	}{{router, atFar}, {far, atRouter}} {
		for range 200 {
			want := random(t, way.from.MaxMessage())
			if err := way.from.Send(want); err != nil {
				t.Fatal(err)
			}
			if got := await(t, way.to, "a message"); !bytes.Equal(got, want) {
				t.Fatalf("%d bytes came as %d others", len(want), len(got))
			}
		}
		max := way.from.MaxMessage()
		var tooLarge *TooLargeError
		if err := way.from.Send(make([]byte, 1601)); !errors.As(err, &tooLarge) || tooLarge.Max < max || tooLarge.Max > maxMessage {
			t.Errorf("1601 bytes: %v, %+v", err, tooLarge)
		}
		if err := way.from.SendControl(nil); !errors.Is(err, ErrNoControl) {
			t.Errorf("control: %v", err)
		}
	}
	// The path MTU of loopback is more than quic-go makes use of.
	for try := 0; router.MaxMessage() < 1390; try++ {
		if try == 500 {
			t.Fatalf("at most %d bytes still, after %d messages: the path MTU is not discovered", router.MaxMessage(), try)
		}
		_ = router.Send([]byte("x"))
		await(t, atFar, "a message")
		time.Sleep(10 * time.Millisecond)
	}
	if a := b.server.Activity()[b.routerID.PublicKey()]; a.Datagrams != 1 || a.Sessions != 0 || a.Received == 0 || a.Sent == 0 {
		t.Errorf("activity %+v", a)
	}
	_ = router.Close()
	await(t, far.Done(), "the end at the concentrator")
	await(t, farEnded, "Receive at the concentrator")
	if err := await(t, routerEnded, "Receive at the router"); err == nil || router.Err() == nil || router.Send([]byte("x")) == nil {
		t.Errorf("after the end: Receive %v, Err %v", err, router.Err())
	}
}

func TestConcentratorThatStopsEndsDatagrams(t *testing.T) {
	b, _ := newQuietBond(t)
	socket := udp(t, "127.0.0.1:0")
	stop := b.serveDatagrams(socket)
	router, _ := b.datagrams(b.datagramPeer(socket))
	stop()
	await(t, router.Done(), "the end at the router")
	if err := router.Err(); err == nil || !strings.Contains(err.Error(), "the concentrator stops") {
		t.Errorf("ended with %v", err)
	}
}

func TestDatagramStrangersAreRefusedReadably(t *testing.T) {
	b, log := newQuietBond(t)
	socket := udp(t, "127.0.0.1:0")
	b.serveDatagrams(socket)
	stranger := b.datagramPeer(socket)
	stranger.Identity = newIdentity(t)
	_, _, err := stranger.DialDatagram(t.Context(), b.loopback()[0], 1)
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Code != CodeNotEnrolled || !strings.Contains(refused.Message, stranger.Identity.PublicKey().Fingerprint()) {
		t.Fatalf("stranger: %v", err)
	}
	log.waitFor(t, stranger.Identity.PublicKey().Fingerprint())

	another := b.datagramPeer(socket)
	another.Concentrator = newIdentity(t).PublicKey()
	_, _, err = another.DialDatagram(t.Context(), b.loopback()[0], 1)
	var mismatch *KeyMismatchError
	if !errors.As(err, &mismatch) || mismatch.Got != b.serverID.PublicKey() {
		t.Errorf("another concentrator: %v", err)
	}

	for name, first := range map[string][]byte{
		"enrol":     appendFrame(nil, frameEnrol, []byte(`{"min":1,"max":1}`)),
		"a flow":    appendOpen(nil, 1, netip.MustParseAddrPort("192.0.2.1:80")),
		"no role":   appendFrame(nil, frameHello, []byte(`{"min":1,"max":1}`)),
		"version":   appendFrame(nil, frameHello, []byte(`{"min":8,"max":9,"role":"packets","bond":"1","link":"a"}`)),
		"garbage":   bytes.Repeat([]byte{0xee}, 300),
		"oversized": {byte(frameHello), 0xff, 0xff, 0xff},
	} {
		body, err := b.firstDatagram(socket, first)
		readable := name != "garbage" && name != "oversized" // those do not even look like a router
		if readable && (err != nil || !strings.Contains(body, `"code"`)) || !readable && err == nil {
			t.Errorf("%s: answer %q, %v", name, body, err)
		}
	}
	router, far := b.datagrams(b.datagramPeer(socket))
	messages, _, _ := collect(far)
	_ = router.Send([]byte("x"))
	await(t, messages, "a message after all this")
}

// firstDatagram sends a first message of the caller's choice and returns what
// REFUSE says.
func (b *bond) firstDatagram(socket net.PacketConn, raw []byte) (string, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), 10*time.Second)
	defer cancel()
	conn, err := quic.DialAddr(ctx, socket.LocalAddr().String(), b.routerID.clientConfig(b.serverID.PublicKey(), alpnPackets), quicConfig())
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.CloseWithError(0, "") }()
	s, err := conn.OpenStreamSync(ctx)
	if err != nil {
		return "", err
	}
	if _, err := s.Write(raw); err != nil {
		return "", err
	}
	kind, body, err := receiveControl(s, new(decoder))
	if err == nil && kind != frameRefuse {
		b.t.Errorf("answer %v", kind)
	}
	return string(body), err
}

// Whatever comes to the UDP port, routers are served.
func TestGarbageOnTheDatagramPort(t *testing.T) {
	b, _ := newQuietBond(t)
	socket := udp(t, "127.0.0.1:0")
	b.serveDatagrams(socket)
	first, _ := b.datagrams(b.datagramPeer(socket))
	_ = first.Close()
	time.Sleep(100 * time.Millisecond)
	before := runtime.NumGoroutine()
	c, err := net.Dial("udp4", socket.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	for i := range 2000 {
		p := random(t, 1+i%1400)
		if i%2 == 0 {
			p[0] |= 0xc0 // the long header of a first packet (RFC 8999 section 5.1)
		}
		_, _ = c.Write(p)
	}
	router, far := b.datagrams(b.datagramPeer(socket))
	messages, _, _ := collect(far)
	_ = router.Send([]byte("x"))
	await(t, messages, "a message after the garbage")
	_ = router.Close()
	settled(t, before)

	for _, config := range []*tls.Config{
		{InsecureSkipVerify: true, NextProtos: []string{alpnPackets}},
		{InsecureSkipVerify: true, NextProtos: []string{"h3"}},
	} {
		conn, err := quic.DialAddr(t.Context(), socket.LocalAddr().String(), config, quicConfig())
		if err == nil {
			await(t, conn.Context().Done(), "the end of a connection without a key")
		}
	}
}

// mute is a UDP socket whose process can die without a word.
type mute struct {
	*net.UDPConn
	dead atomic.Bool
}

func (m *mute) WriteMsgUDP(b, oob []byte, to *net.UDPAddr) (n, oobn int, err error) {
	if m.dead.Load() {
		return len(b), len(oob), nil
	}
	return m.UDPConn.WriteMsgUDP(b, oob, to)
}

func TestRestartedConcentratorEndsOldDatagrams(t *testing.T) {
	b, _ := newQuietBond(t)
	socket := &mute{UDPConn: udp(t, "127.0.0.1:0")}
	address := socket.LocalAddr().String()
	stop := b.serveDatagrams(socket)
	router, _ := b.datagrams(b.datagramPeer(socket))
	_, _, ended := collect(router)
	socket.dead.Store(true)
	stop()
	b.serveDatagrams(udp(t, address))
	for !isClosed(router.Done()) {
		_ = router.Send(make([]byte, 500))
		time.Sleep(20 * time.Millisecond)
	}
	var reset *quic.StatelessResetError
	if err := await(t, ended, "Receive"); !errors.As(err, &reset) {
		t.Errorf("ended with %v, want a stateless reset", err)
	}
}

// A socket that is bound to no address must answer from the one that was asked.
func TestAnswersComeFromTheAddressAsked(t *testing.T) {
	b, _ := newQuietBond(t)
	wildcard, err := net.ListenUDP("udp", &net.UDPAddr{})
	if err != nil {
		t.Fatal(err)
	}
	b.serveDatagrams(wildcard)
	port := wildcard.LocalAddr().(*net.UDPAddr).Port
	for _, address := range []string{"127.0.0.2", "::1"} {
		// A connected socket takes answers from that address only. The packet is of a
		// version that nobody speaks, and is answered with a list of versions (RFC
		// 8999 section 6).
		c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.ParseIP(address), Port: port})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		first := make([]byte, 1200)
		copy(first, []byte{0xc0, 0x1a, 0x2a, 0x3a, 0x4a, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0})
		if _, err := c.Write(first); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(first); err != nil {
			t.Errorf("no answer from %s: %v", address, err)
		}
	}
}

func TestDatagramsAreBoundedAndRevoked(t *testing.T) {
	b, _ := newQuietBond(t)
	socket := udp(t, "127.0.0.1:0")
	b.serveDatagrams(socket)
	p := b.datagramPeer(socket)
	var ends []Messages
	for range mostOf[useDatagrams] {
		m, _ := b.datagrams(p)
		ends = append(ends, m)
	}
	_, _, err := p.DialDatagram(t.Context(), b.loopback()[0], 9)
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Code != CodeBusy {
		t.Fatalf("one more: %v", err)
	}
	b.admission.mu.Lock()
	delete(b.admission.routers, b.routerID.PublicKey())
	b.admission.mu.Unlock()
	b.server.Revoke(b.routerID.PublicKey())
	for _, m := range ends {
		await(t, m.Done(), "the end of a revoked router's connection")
	}
}

func TestDatagramsLeaveNothingBehind(t *testing.T) {
	b, _ := newQuietBond(t)
	socket := udp(t, "127.0.0.1:0")
	b.serveDatagrams(socket)
	p := b.datagramPeer(socket)
	m, _ := b.datagrams(p)
	_ = m.Close()
	time.Sleep(200 * time.Millisecond)
	before, open := runtime.NumGoroutine(), descriptors(t)
	for range 5 {
		m, a := b.datagrams(p)
		_, _, ended := collect(m)
		_ = a.Close()
		await(t, ended, "Receive")
	}
	stranger := b.datagramPeer(socket)
	stranger.Identity = newIdentity(t)
	_, _, _ = stranger.DialDatagram(t.Context(), b.loopback()[0], 1)
	settled(t, before)
	if now := descriptors(t); now > open {
		t.Errorf("%d descriptors open, %d before", now, open)
	}
}

// A sender whose way is full waits, and no longer than the way exists.
func TestFullDatagramsBlockUntilTheyEnd(t *testing.T) {
	b, _ := newQuietBond(t)
	socket := &mute{UDPConn: udp(t, "127.0.0.1:0")}
	b.serveDatagrams(socket)
	m, _ := b.datagrams(b.datagramPeer(socket))
	socket.dead.Store(true) // nothing is acknowledged from now on
	ended := make(chan error, 1)
	var sent atomic.Int64
	go func() {
		for {
			if err := m.Send(make([]byte, 1000)); err != nil {
				ended <- err
				return
			}
			sent.Add(1)
		}
	}()
	for before := int64(0); before == 0 || before != sent.Load(); {
		before = sent.Load()
		time.Sleep(500 * time.Millisecond)
	}
	if n := sent.Load(); n > 2000 {
		t.Errorf("%d messages were taken that nobody acknowledges", n)
	}
	_ = m.Close()
	await(t, ended, "Send on a closed connection")
}

// What is not QUIC passes beside it, both ways, on the same socket.
func TestBesideQUIC(t *testing.T) {
	b, _ := newQuietBond(t)
	socket := udp(t, "127.0.0.1:0")
	b.serveDatagrams(socket)
	b.datagrams(b.datagramPeer(socket)) // it serves by now
	beside := b.server.Beside()
	if len(beside) != 1 {
		t.Fatalf("%d sockets, want 1", len(beside))
	}
	type packet struct {
		text string
		from net.Addr
		err  error
	}
	received := make(chan packet, 1)
	go func() {
		for {
			buffer := make([]byte, 1500)
			n, from, err := beside[0].ReadFrom(buffer)
			received <- packet{string(buffer[:n]), from, err}
			if err != nil {
				return
			}
		}
	}()
	router, remote, err := b.datagramPeer(socket).ListenUDP(t.Context(), b.loopback()[0], 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = router.Close() }()
	want := string([]byte{4, 0, 0, 0}) + strings.Repeat("x", 1436) // as long as a full packet of WireGuard
	var got packet
	for try := 0; got.text == ""; try++ { // what comes before ReadFrom is lost
		if try == 100 {
			t.Fatal("nothing arrives")
		}
		if _, err := router.WriteToUDPAddrPort([]byte(want), remote); err != nil {
			t.Fatal(err)
		}
		select {
		case got = <-received:
		case <-time.After(100 * time.Millisecond):
		}
	}
	if got.text != want || got.err != nil || got.from.String() != router.LocalAddr().String() {
		t.Fatalf("%d bytes from %v, %v", len(got.text), got.from, got.err)
	}
	if _, err := beside[0].WriteTo([]byte(want), got.from); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 1500)
	_ = router.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, from, err := router.ReadFromUDPAddrPort(buffer); string(buffer[:n]) != want || from != remote || err != nil {
		t.Errorf("back come %d bytes from %v, %v", n, from, err)
	}
	_ = beside[0].Close()
	for {
		if got := await(t, received, "the end"); got.err != nil {
			if !errors.Is(got.err, net.ErrClosed) {
				t.Error(got.err)
			}
			return
		}
	}
}
