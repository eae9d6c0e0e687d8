package netlab

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
)

// QUIC as LAN clients and Internet servers speak it, to see what the way
// between them does to it: the client opens a stream and sends eight bytes,
// big endian, and the server sends as many as they say.
const quicALPN = "netlab-transfer"

// A QUICServer serves downloads.
type QUICServer struct {
	transport *quic.Transport
	listener  *quic.Listener
	wg        sync.WaitGroup
}

// ServeQUIC serves on a socket such as of Host.ListenPacket until Close, which
// closes the socket as well.
func ServeQUIC(socket net.PacketConn) (*QUICServer, error) {
	certificate, err := selfSigned()
	if err != nil {
		return nil, fmt.Errorf("netlab: QUIC server: %w", err)
	}
	s := &QUICServer{transport: &quic.Transport{Conn: socket}}
	s.listener, err = s.transport.Listen(&tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{quicALPN}}, nil)
	if err != nil {
		return nil, fmt.Errorf("netlab: QUIC server: %w", errors.Join(err, s.transport.Close(), socket.Close()))
	}
	s.wg.Go(func() {
		for {
			c, err := s.listener.Accept(context.Background())
			if err != nil {
				return // closed
			}
			s.wg.Go(func() { s.serve(c) })
		}
	})
	return s, nil
}

// Close ends the server and what it serves.
func (s *QUICServer) Close() error {
	err := errors.Join(s.listener.Close(), s.transport.Close(), s.transport.Conn.Close())
	s.wg.Wait()
	return err
}

func (s *QUICServer) serve(c *quic.Conn) {
	for {
		stream, err := c.AcceptStream(context.Background())
		if err != nil {
			return // the connection has ended
		}
		s.wg.Go(func() { serveStream(stream) })
	}
}

func serveStream(stream *quic.Stream) {
	defer func() { _ = stream.Close() }()
	var request [8]byte
	if _, err := io.ReadFull(stream, request[:]); err != nil {
		return
	}
	block := make([]byte, 64<<10)
	for left := binary.BigEndian.Uint64(request[:]); left > 0; {
		n, err := stream.Write(block[:min(uint64(len(block)), left)])
		if err != nil {
			return // the client has enough
		}
		left -= uint64(n)
	}
}

// A QUICDownload ends after that many bytes or that time, whichever is first;
// 0 is no limit, but one of them must be given.
type QUICDownload struct {
	Bytes    int64
	Duration time.Duration // from the first byte of the request
}

// QUICResult is the outcome of a QUICDownload.
type QUICResult struct {
	Bytes     int64
	Elapsed   time.Duration // from the request to the last byte
	Handshake time.Duration // before
}

// Rate in bit/s.
func (r QUICResult) Rate() float64 { return float64(r.Bytes) * 8 / max(r.Elapsed.Seconds(), 1e-9) }

// Run downloads from a QUICServer by a socket such as of Host.ListenPacket,
// which is not closed.
func (d QUICDownload) Run(ctx context.Context, socket net.PacketConn, server netip.AddrPort) (QUICResult, error) {
	r, err := d.run(ctx, socket, server)
	if err != nil {
		return QUICResult{}, fmt.Errorf("netlab: QUIC download from %s: %w", server, err)
	}
	return r, nil
}

func (d QUICDownload) run(ctx context.Context, socket net.PacketConn, server netip.AddrPort) (r QUICResult, err error) {
	if d.Bytes < 0 || d.Duration < 0 || d.Bytes == 0 && d.Duration == 0 {
		return r, fmt.Errorf("%+v: give a number of bytes or a duration", d)
	}
	transport := &quic.Transport{Conn: socket}
	defer func() { err = errors.Join(err, transport.Close()) }()
	// The certificate is made anew by each server: there is nothing to check it by.
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{quicALPN}}
	begin := time.Now()
	c, err := transport.Dial(ctx, net.UDPAddrFromAddrPort(server), config, &quic.Config{
		// As browsers have them (Chromium): with the library's own, 512 KiB at
		// first, the receiver would be the limit.
		InitialStreamReceiveWindow: 6 << 20, InitialConnectionReceiveWindow: 15 << 20,
	})
	if err != nil {
		return r, err
	}
	defer func() { _ = c.CloseWithError(0, "") }()
	stop := context.AfterFunc(ctx, func() { _ = c.CloseWithError(0, "") })
	defer stop()
	stream, err := c.OpenStreamSync(ctx)
	if err != nil {
		return r, err
	}
	r.Handshake = time.Since(begin)
	begin = time.Now()
	size := d.Bytes
	if size == 0 {
		size = math.MaxInt64
	}
	if d.Duration > 0 {
		if err := stream.SetReadDeadline(begin.Add(d.Duration)); err != nil {
			return r, err
		}
	}
	if _, err := stream.Write(binary.BigEndian.AppendUint64(nil, uint64(size))); err != nil {
		return r, err
	}
	buffer := make([]byte, 64<<10)
	for r.Bytes < size {
		n, err := stream.Read(buffer)
		r.Bytes += int64(n)
		r.Elapsed = time.Since(begin)
		var timeout net.Error
		if err == nil || errors.Is(err, io.EOF) && r.Bytes == size {
			continue
		}
		if d.Duration > 0 && errors.As(err, &timeout) && timeout.Timeout() && r.Elapsed >= d.Duration {
			return r, nil
		}
		return r, fmt.Errorf("after %d bytes: %w", r.Bytes, errors.Join(ctx.Err(), err))
	}
	return r, nil
}

func selfSigned() (tls.Certificate, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, err
}
