// Package leg takes IP packets past a middlebox that removes what TCP brings along:
// within UDP, by WireGuard in this process.
//
//	kernel ─ TUN ─▶ wireguard/device ─▶ bind.Send ─▶ Socket ─▶ other end
//	kernel ◀─ TUN ◀─ wireguard/device ◀─ bind.receive ◀─ Socket
//
// Both ends are alike. A router has an End for every leg, with one Peer, so that
// each has its own device to be routed into. A concentrator has one End with a Peer
// for every leg; which packet goes to whom follows from its destination, and one
// from an address that is not its Peer's is dropped.
//
// WireGuard's messages begin with a byte of 1 to 4, as no packet of QUIC does (RFC
// 9443 section 2), so that a socket may be shared with QUIC.
package leg

import (
	"bufio"
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

const (
	// keepAlive keeps the mappings of common NATs (30 s), and the keys fresh.
	keepAlive = 25 * time.Second
	// fresh is how long after a handshake its keys may be used (REJECT_AFTER_TIME of
	// the WireGuard paper, section 6.1).
	fresh = 180 * time.Second
)

// Key is a Curve25519 public key.
type Key [32]byte

// Private is the private key of one end. It is made afresh at every start.
type Private struct{ key *ecdh.PrivateKey }

// NewPrivate makes a key.
func NewPrivate() Private {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		panic(fmt.Sprintf("the kernel's random numbers never fail: %v", err))
	}
	return Private{key}
}

// Public is the key by which the other end knows this one.
func (p Private) Public() Key { return Key(p.key.PublicKey().Bytes()) }

// Socket is where messages come from and go to.
type Socket interface {
	ReadFrom(b []byte) (int, net.Addr, error)
	WriteTo(b []byte, to net.Addr) (int, error)
	// Close ends ReadFrom with an error.
	Close() error
}

// Peer is another end.
type Peer struct {
	Key Key
	// Addresses are those inside that lead to the peer, and that it may send from.
	Addresses []netip.Prefix
	// Remote is where it is; invalid: where it comes from. Who knows it begins.
	Remote netip.AddrPort
}

// End is one end of legs.
type End struct{ device *device.Device }

// Open serves a TUN device over sockets; both belong to the End from here on, also
// after an error.
func Open(private Private, t tun.Device, log *slog.Logger, sockets ...Socket) (*End, error) {
	name, _ := t.Name()
	// It complains of every packet that cannot be sent.
	complain := func(format string, a ...any) { log.Debug("WireGuard: "+fmt.Sprintf(format, a...), "interface", name) }
	e := &End{device.NewDevice(t, &bind{sockets: sockets}, &device.Logger{Verbosef: device.DiscardLogf, Errorf: complain})}
	err := e.device.IpcSet("private_key=" + hex.EncodeToString(private.key.Bytes()) + "\n")
	if err == nil {
		err = e.device.Up()
	}
	if err != nil {
		e.Close()
		for _, s := range sockets {
			_ = s.Close()
		}
		return nil, fmt.Errorf("WireGuard on %s: %w", name, err)
	}
	return e, nil
}

// SetPeer adds a peer, or changes what its key is for.
func (e *End) SetPeer(p Peer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "public_key=%x\nreplace_allowed_ips=true\n", p.Key)
	if p.Remote.IsValid() {
		fmt.Fprintf(&b, "endpoint=%s\npersistent_keepalive_interval=%d\n", p.Remote, int(keepAlive.Seconds()))
	}
	for _, a := range p.Addresses {
		fmt.Fprintf(&b, "allowed_ip=%s\n", a)
	}
	return e.device.IpcSet(b.String())
}

// RemovePeer forgets a peer.
func (e *End) RemovePeer(key Key) { e.device.RemovePeer(device.NoisePublicKey(key)) }

// Fresh says whether there are keys with any peer that may be used.
func (e *End) Fresh(now time.Time) bool {
	var state bytes.Buffer
	if e.device.IpcGetOperation(&state) != nil {
		return false
	}
	for lines := bufio.NewScanner(&state); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "last_handshake_time_sec="); ok {
			if seconds, err := strconv.ParseInt(value, 10, 64); err == nil && now.Sub(time.Unix(seconds, 0)) < fresh {
				return true
			}
		}
	}
	return false
}

// Done is closed once the End has ended, by Close or because its device was deleted.
func (e *End) Done() <-chan struct{} { return e.device.Wait() }

// Close deletes the TUN device.
func (e *End) Close() { e.device.Close() }

// bind is the sockets as package device wants them.
type bind struct {
	sockets []Socket
	open    atomic.Bool
}

// Open is called once; package device calls Close before it, too.
func (b *bind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.open.Store(true)
	var receive []conn.ReceiveFunc
	for _, s := range b.sockets {
		receive = append(receive, b.receive(s))
	}
	return receive, 0, nil
}

func (b *bind) Close() error {
	if !b.open.Swap(false) {
		return nil
	}
	var errs []error
	for _, s := range b.sockets {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

func (b *bind) receive(s Socket) conn.ReceiveFunc {
	return func(packets [][]byte, sizes []int, from []conn.Endpoint) (int, error) {
		n, address, err := s.ReadFrom(packets[0])
		if err != nil {
			if !b.open.Load() {
				err = net.ErrClosed
			}
			return 0, err
		}
		udp, ok := address.(*net.UDPAddr)
		if !ok {
			return 0, fmt.Errorf("a message from %v, which is no address of UDP", address)
		}
		sizes[0], from[0] = n, &endpoint{UDPAddr: udp, socket: s}
		return 1, nil
	}
}

func (b *bind) Send(packets [][]byte, to conn.Endpoint) error {
	e, ok := to.(*endpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	for _, p := range packets {
		if _, err := e.socket.WriteTo(p, e.UDPAddr); err != nil {
			return err
		}
	}
	return nil
}

// ParseEndpoint is of what SetPeer says: it goes by the only socket.
func (b *bind) ParseEndpoint(text string) (conn.Endpoint, error) {
	address, err := netip.ParseAddrPort(text)
	if err != nil {
		return nil, err
	}
	return &endpoint{UDPAddr: net.UDPAddrFromAddrPort(address), socket: b.sockets[0]}, nil
}

func (*bind) SetMark(uint32) error { return nil }
func (*bind) BatchSize() int       { return 1 }

// endpoint is where a peer is, and by which socket it is reached.
type endpoint struct {
	*net.UDPAddr
	socket Socket
}

func (*endpoint) ClearSrc()             {}
func (*endpoint) SrcToString() string   { return "" }
func (*endpoint) SrcIP() netip.Addr     { return netip.Addr{} }
func (e *endpoint) DstToString() string { return e.UDPAddr.String() }
func (e *endpoint) DstIP() netip.Addr   { return e.AddrPort().Addr() }

func (e *endpoint) DstToBytes() []byte {
	b, _ := e.AddrPort().MarshalBinary() // which fails for no AddrPort
	return b
}
