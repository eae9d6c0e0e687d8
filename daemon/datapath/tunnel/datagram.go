package tunnel

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"
)

// The datagram carrier: one QUIC connection (RFC 9000) per uplink, whose
// DATAGRAM frames (RFC 9221) are the messages.
//
//	router        UDP socket on the uplink's address ─ handshake ─▶ stream 0: HELLO ─▶ datagrams
//	concentrator  UDP socket ─ handshake ─▶ stream 0: WELCOME or REFUSE ─▶ PacketsHandler

const (
	quicHandshake = 3 * time.Second
	// quicIdle is how long nothing may come before the connection has ended. Its
	// user asks for signs of life while it relies on it, and closes what is silent
	// much sooner; half of this while it is idle keeps the mappings of common NATs
	// (30 s, RFC 4787 section 4.3 has 2 minutes) and costs a metered uplink little.
	quicIdle = 45 * time.Second
	// refusalTime is how long the router has to read REFUSE before the connection
	// is closed.
	refusalTime = 2 * time.Second

	// Beyond freeHandshakes unfinished ones a router must first show that it
	// receives at its address (RFC 9000 section 8.1.2), which costs a round trip.
	freeHandshakes = 64

	// datagramBuffer of a UDP socket, in bytes: 100 ms at 300 Mbit/s. The kernel
	// doubles it for its own overhead.
	datagramBuffer = 4 << 20

	// maxMessageAge is how long what MaxMessage has found holds.
	maxMessageAge = 100 * time.Millisecond
)

// The error codes with which a QUIC connection is closed.
const (
	quicClosed  quic.ApplicationErrorCode = 0
	quicRefused quic.ApplicationErrorCode = 1 // REFUSE was sent, or HELLO did not come
)

func quicConfig() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout: quicHandshake,
		MaxIdleTimeout:       quicIdle,
		EnableDatagrams:      true,
		// The smallest that QUIC allows: paths of IPv6's smallest MTU, 1280, carry
		// it. Discovery finds what more there is.
		InitialPacketSize: 1200,
		// The one stream carries two small frames.
		InitialStreamReceiveWindow: 2 * maxControl, MaxStreamReceiveWindow: 2 * maxControl,
		InitialConnectionReceiveWindow: 2 * maxControl, MaxConnectionReceiveWindow: 2 * maxControl,
		MaxIncomingStreams: -1, MaxIncomingUniStreams: -1,
	}
}

// datagrams is a QUIC connection past WELCOME.
type datagrams struct {
	conn   *quic.Conn
	link   string      // at the concentrator: the router's name for the uplink
	closed atomic.Bool // by this end

	fits, fitsAt atomic.Int64 // the longest message, and when that was found, Unix ns

	heard          atomic.Int64 // when something last arrived, Unix ns
	sent, received atomic.Uint64
}

// DialDatagram opens a QUIC connection from the path's own address, so that it
// leaves by that uplink. bond is as for DialStream.
func (p *Peer) DialDatagram(ctx context.Context, path Path, bond uint64) (Messages, Inner, error) {
	type greeted struct {
		datagrams *datagrams
		inner     Inner
	}
	list := attempts([]Path{path}, p.Addresses)
	if len(list) == 0 {
		return nil, Inner{}, p.unreachable()
	}
	won, _, err := race[greeted]{
		dial: func(ctx context.Context, a attempt) (greeted, error) {
			d, inner, err := p.dialDatagrams(ctx, a, hello{
				Min: minVersion, Max: maxVersion, Software: p.Software, Role: rolePackets, Bond: bond, Link: path.Name})
			return greeted{d, inner}, err
		},
		drop: func(g greeted) { _ = g.datagrams.Close() },
	}.run(ctx, list)
	if err != nil {
		return nil, Inner{}, err
	}
	return won.datagrams, won.inner, nil
}

// dialDatagrams makes one attempt, up to WELCOME.
func (p *Peer) dialDatagrams(ctx context.Context, a attempt, h hello) (*datagrams, Inner, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	socket, remote, err := a.listen(ctx)
	if err != nil {
		return nil, Inner{}, err
	}
	transport := &quic.Transport{Conn: socket}
	hangUp := func() {
		_ = transport.Close()
		_ = socket.Close()
	}
	config := quicConfig()
	// At most half of quicIdle. It costs nothing while messages travel.
	config.KeepAlivePeriod = quicIdle / 2
	conn, err := transport.Dial(ctx, net.UDPAddrFromAddrPort(remote), p.Identity.clientConfig(p.Concentrator, alpnPackets), config)
	if err != nil {
		hangUp()
		return nil, Inner{}, fmt.Errorf("QUIC handshake with %s: %w", remote, err)
	}
	context.AfterFunc(conn.Context(), hangUp)
	inner, err := greetDatagrams(ctx, conn, h)
	if err != nil {
		_ = conn.CloseWithError(quicClosed, "")
		return nil, Inner{}, err
	}
	return newDatagrams(conn), inner, nil
}

// listen opens a UDP socket at the attempt's source, and finds out where the
// concentrator is.
func (a attempt) listen(ctx context.Context) (socket *net.UDPConn, remote netip.AddrPort, err error) {
	if remote, err = resolve(ctx, a.address, a.source.Is4()); err != nil {
		return nil, remote, err
	}
	err = a.source.bind(func(local netip.AddrPort) (err error) {
		socket, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(local))
		return err
	})
	if err == nil {
		enlargeBuffers(socket)
	}
	return socket, remote, err
}

// ListenUDP opens a UDP socket on the path's own address, for packets to the
// concentrator that are not ours: see Server.Beside. try, from 0 on, chooses among
// the ways there are.
func (p *Peer) ListenUDP(ctx context.Context, path Path, try int) (*net.UDPConn, netip.AddrPort, error) {
	list := attempts([]Path{path}, p.Addresses)
	if len(list) == 0 {
		return nil, netip.AddrPort{}, p.unreachable()
	}
	return list[try%len(list)].listen(ctx)
}

// greetDatagrams sends HELLO on a stream, which then stays open, and reads the
// answer.
func greetDatagrams(ctx context.Context, conn *quic.Conn, h hello) (Inner, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.CloseWithError(quicClosed, "") })
	defer stop()
	first, err := controlFrame(frameHello, h)
	if err != nil {
		return Inner{}, err
	}
	stream, err := conn.OpenStreamSync(ctx)
	if err != nil {
		return Inner{}, err
	}
	if _, err := stream.Write(first); err != nil {
		return Inner{}, err
	}
	kind, body, err := receiveControl(stream, new(decoder))
	if err != nil {
		return Inner{}, fmt.Errorf("waiting for the concentrator's WELCOME: %w", err)
	}
	w, err := readAnswer(kind, body)
	if err != nil {
		return Inner{}, err
	}
	return w.inner()
}

// resolve looks up one of the concentrator's addresses in the family of the
// uplink's address.
func resolve(ctx context.Context, address string, is4 bool) (netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("port of %q: want a number from 1 to 65535", address)
	}
	network := "ip6"
	if is4 {
		network = "ip4"
	}
	list, err := net.DefaultResolver.LookupNetIP(ctx, network, host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(list[0].Unmap(), uint16(port)), nil
}

// enlargeBuffers sets the buffers of a UDP socket, as far as we may: what
// arrives while the process does not run is lost otherwise.
func enlargeBuffers(socket net.PacketConn) {
	c, ok := socket.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return // closed: its user finds out
	}
	_ = raw.Control(func(fd uintptr) {
		for forced, plain := range map[int]int{unix.SO_RCVBUFFORCE: unix.SO_RCVBUF, unix.SO_SNDBUFFORCE: unix.SO_SNDBUF} {
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, forced, datagramBuffer) != nil {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, plain, datagramBuffer)
			}
		}
	})
}

func newDatagrams(conn *quic.Conn) *datagrams {
	d := &datagrams{conn: conn}
	d.hear()
	return d
}

func (d *datagrams) hear() { d.heard.Store(time.Now().UnixNano()) }

func (d *datagrams) Send(message []byte) error {
	if isClosed(d.Done()) {
		return d.Err() // quic-go would take as many as its queue holds
	}
	err := d.conn.SendDatagram(message)
	if err == nil {
		d.sent.Add(uint64(len(message)))
		return nil
	}
	var tooLarge *quic.DatagramTooLargeError
	if errors.As(err, &tooLarge) {
		return &TooLargeError{d.fit(tooLarge)}
	}
	if cause := d.Err(); cause != nil {
		return cause
	}
	return err
}

// fit notes how much fits.
func (d *datagrams) fit(e *quic.DatagramTooLargeError) int {
	n := min(e.MaxDatagramPayloadSize, maxMessage)
	d.fits.Store(n)
	d.fitsAt.Store(time.Now().UnixNano())
	return int(n)
}

// tooLong fits no connection: the limit that both ends set on a DATAGRAM frame,
// quic-go's own, is 16383.
var tooLong [1 << 16]byte

func (d *datagrams) MaxMessage() int {
	if time.Now().UnixNano()-d.fitsAt.Load() < int64(maxMessageAge) {
		return int(d.fits.Load())
	}
	// quic-go tells its limit only to those who exceed it.
	var tooLarge *quic.DatagramTooLargeError
	if errors.As(d.conn.SendDatagram(tooLong[:]), &tooLarge) {
		return d.fit(tooLarge)
	}
	return int(d.fits.Load())
}

func (d *datagrams) SendControl([]byte) error { return ErrNoControl }

func (d *datagrams) Receive(r Receiver) error {
	for {
		message, err := d.conn.ReceiveDatagram(context.Background())
		if err != nil {
			_ = d.conn.CloseWithError(quicClosed, "") // it has ended: this waits until all of it knows
			return d.Err()
		}
		d.hear()
		d.received.Add(uint64(len(message)))
		if r.Message != nil {
			r.Message(message)
		}
	}
}

func (d *datagrams) Close() error {
	d.closed.Store(true)
	return d.conn.CloseWithError(quicClosed, "")
}

func (d *datagrams) Done() <-chan struct{} { return d.conn.Context().Done() }

func (d *datagrams) Err() error {
	switch err := context.Cause(d.conn.Context()); {
	case err == nil:
		return nil
	case d.closed.Load():
		return errSessionClosed
	default:
		return fmt.Errorf("QUIC connection ended: %w", err)
	}
}

// Beside takes from the UDP sockets of ServeDatagrams, and sends there, what is not
// QUIC: packets whose first two bits are 0 (RFC 9443 section 2).
type Beside struct {
	transport *quic.Transport
	ctx       context.Context
	cancel    context.CancelFunc
}

// ReadFrom waits for a packet until Close. Some are lost if nobody does.
func (b *Beside) ReadFrom(packet []byte) (int, net.Addr, error) {
	n, from, err := b.transport.ReadNonQUICPacket(b.ctx, packet)
	if b.ctx.Err() != nil {
		err = net.ErrClosed
	}
	return n, from, err
}

// WriteTo sends a packet.
func (b *Beside) WriteTo(packet []byte, to net.Addr) (int, error) {
	return b.transport.WriteTo(packet, to)
}

// Close ends ReadFrom, and leaves the socket to QUIC.
func (b *Beside) Close() error {
	b.cancel()
	return nil
}

// Beside returns a Beside for every socket that ServeDatagrams serves by now.
func (v *Server) Beside() []*Beside {
	v.mu.Lock()
	defer v.mu.Unlock()
	var list []*Beside
	for _, transport := range v.transports {
		ctx, cancel := context.WithCancel(context.Background())
		list = append(list, &Beside{transport, ctx, cancel})
	}
	return list
}

// ServeDatagrams accepts routers' QUIC connections on UDP sockets until ctx ends,
// then closes them and the sockets. Answers leave from the address that was
// asked, on sockets bound to none as well.
func (v *Server) ServeDatagrams(ctx context.Context, sockets ...net.PacketConn) {
	var workers sync.WaitGroup
	for _, socket := range sockets {
		workers.Go(func() {
			if err := v.serveDatagrams(ctx, socket); err != nil && ctx.Err() == nil {
				v.log.Error("datagrams are no longer accepted; routers use streams", "socket", socket.LocalAddr(), "error", err)
			}
		})
	}
	workers.Wait()
}

// handshakeKey finds in a connection's context the function that says its
// handshake is over.
type handshakeKey struct{}

func (v *Server) serveDatagrams(ctx context.Context, socket net.PacketConn) error {
	defer func() { _ = socket.Close() }()
	enlargeBuffers(socket)
	reset, err := v.identity.derive("sheaf QUIC stateless reset")
	if err != nil {
		return err
	}
	token, err := v.identity.derive("sheaf QUIC address validation")
	if err != nil {
		return err
	}
	var unfinished atomic.Int64
	transport := &quic.Transport{
		Conn: socket,
		// Derived from what outlives a restart, so that connections of before it end
		// at once (RFC 9000 section 10.3), and tokens hold.
		StatelessResetKey:   (*quic.StatelessResetKey)(&reset),
		TokenGeneratorKey:   (*quic.TokenGeneratorKey)(&token),
		VerifySourceAddress: func(net.Addr) bool { return unfinished.Load() >= freeHandshakes },
		ConnContext: func(ctx context.Context, _ *quic.ClientInfo) (context.Context, error) {
			if unfinished.Add(1) > maxUnknown {
				unfinished.Add(-1)
				return nil, errors.New("too many handshakes under way")
			}
			over := sync.OnceFunc(func() { unfinished.Add(-1) })
			context.AfterFunc(ctx, over)
			return context.WithValue(ctx, handshakeKey{}, over), nil
		},
	}
	defer func() { _ = transport.Close() }()
	config := quicConfig()
	config.MaxIncomingStreams = 1
	listener, err := transport.Listen(v.identity.serverConfig(alpnPackets), config)
	if err != nil {
		return err
	}
	defer func() { _ = listener.Close() }()
	v.mu.Lock()
	v.transports = append(v.transports, transport)
	v.mu.Unlock()
	var workers sync.WaitGroup
	defer workers.Wait() // until CONNECTION_CLOSE has gone out everywhere
	refusals := &rarely{log: v.log}
	for {
		conn, err := listener.Accept(ctx)
		if err != nil {
			return err
		}
		if over, ok := conn.Context().Value(handshakeKey{}).(func()); ok {
			over()
		}
		workers.Go(func() {
			stop := context.AfterFunc(ctx, func() { _ = conn.CloseWithError(quicClosed, "the concentrator stops") })
			defer stop()
			v.welcomeDatagrams(ctx, conn, refusals)
		})
	}
}

// derive makes a key for another purpose from the identity (HKDF, RFC 5869).
func (id *Identity) derive(purpose string) (key [32]byte, err error) {
	b, err := hkdf.Key(sha256.New, id.Seed(), nil, purpose, len(key))
	copy(key[:], b)
	return key, err
}

// welcomeDatagrams takes one connection from its first message to its end.
func (v *Server) welcomeDatagrams(ctx context.Context, conn *quic.Conn, refusals *rarely) {
	select {
	case v.unknown <- struct{}{}:
	default:
		_ = conn.CloseWithError(quicRefused, "too many connections have not introduced themselves")
		return
	}
	g, err := v.introduceDatagrams(ctx, conn)
	<-v.unknown
	if err != nil {
		refusals.warn("QUIC connection refused", "remote", conn.RemoteAddr(), "key", fingerprintOrNone(g.key), "error", err)
		_ = conn.CloseWithError(quicRefused, "refused")
		return
	}
	d := newDatagrams(conn)
	d.link = g.Link
	v.mu.Lock()
	v.carried[d] = g.key
	v.rankLocked(g.key)
	stays := v.seen(g, conn.RemoteAddr())
	v.mu.Unlock()
	if !stays {
		_ = d.Close()
	}
	v.attach(g, d)
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.carried, d)
	v.rankLocked(g.key)
	r := v.routers[g.key]
	r.connections[g.use]--
	r.LastSeen = later(r.LastSeen, d.heard.Load())
	r.Received += d.received.Load()
	r.Sent += d.sent.Load()
}

// introduceDatagrams answers the first message.
func (v *Server) introduceDatagrams(ctx context.Context, conn *quic.Conn) (greeting, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	var g greeting
	var err error
	if g.key, err = peerKey(conn.ConnectionState().TLS, alpnPackets); err != nil {
		return g, err
	}
	stream, err := conn.AcceptStream(ctx)
	if err != nil {
		return g, fmt.Errorf("first message: %w", err)
	}
	deadline, _ := ctx.Deadline()
	if err := stream.SetDeadline(deadline); err != nil {
		return g, err
	}
	kind, body, err := receiveControl(stream, new(decoder))
	if err != nil {
		return g, fmt.Errorf("first message: %w", err)
	}
	g, err = v.admit(kind, body, g.key, true)
	answer, payload := frameWelcome, any(g.welcome)
	if err != nil {
		answer, payload = frameRefuse, refusal(err)
	}
	frame, sendErr := controlFrame(answer, payload)
	if sendErr == nil {
		_, sendErr = stream.Write(frame)
	}
	switch {
	case err == nil && sendErr != nil:
		v.release(g)
		return g, sendErr
	case err != nil && sendErr == nil:
		select { // the router closes once it has read why
		case <-conn.Context().Done():
		case <-time.After(refusalTime):
		}
	}
	return g, err
}

// rarely logs what strangers can cause as often as they like, at most once per
// minute.
type rarely struct {
	log *slog.Logger

	mu     sync.Mutex
	next   time.Time
	missed int
}

// again lets the next complaint be logged at once.
func (r *rarely) again() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next, r.missed = time.Time{}, 0
}

func (r *rarely) warn(message string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if now.Before(r.next) {
		r.missed++
		return
	}
	if r.missed > 0 {
		args = append(args, "not_logged_before", r.missed)
	}
	r.next, r.missed = now.Add(time.Minute), 0
	r.log.Warn(message, args...)
}
