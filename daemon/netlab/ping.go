package netlab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A Ping is one ICMP or ICMPv6 echo request and what came of it.
type Ping struct {
	Size         int           // bytes of payload after the ICMP header; the packet is 28 bytes longer, of IPv6 48
	DontFragment bool          // neither here nor on the way; what the kernel remembers of the path's MTU is left aside
	Timeout      time.Duration // 0 means 1 s
}

// ErrNoReply is Ping's error when neither a reply nor an ICMP error came in time.
var ErrNoReply = errors.New("no reply")

// An ICMPError is the answer of a machine on the way that could not forward.
type ICMPError struct {
	From       netip.Addr
	Type, Code uint8 // 3.4: fragmentation needed (RFC 792); IPv6 2.0: packet too big (RFC 4443)
	MTU        int   // bytes, of these two kinds
}

func (e *ICMPError) Error() string {
	text := fmt.Sprintf("ICMP type %d code %d from %s", e.Type, e.Code, e.From)
	if e.MTU > 0 {
		text += fmt.Sprintf(", MTU %d", e.MTU)
	}
	return text
}

// TooBig tells whether the packet did not fit the next link.
func (e *ICMPError) TooBig() bool {
	if e.From.Is4() {
		return e.Type == icmpUnreachable && e.Code == icmpFragmentationNeeded
	}
	return e.Type == icmp6PacketTooBig
}

// RFC 792 and 4443.
const (
	icmpEchoReply, icmpUnreachable, icmpEcho, icmpTimeExceeded = 0, 3, 8, 11
	icmpFragmentationNeeded                                    = 4
	icmp6PacketTooBig, icmp6LastError                          = 2, 127 // errors are below 128
	icmp6Echo, icmp6EchoReply                                  = 128, 129
)

// Ping sends one echo request from the Host and returns the round-trip time.
// Errors are *ICMPError, ErrNoReply, and those of sending: EMSGSIZE if the
// packet is larger than the Host's own interface and may not be fragmented.
func (h *Host) Ping(ctx context.Context, to netip.Addr, p Ping) (time.Duration, error) {
	rtt, err := h.ping(ctx, to, p)
	if err != nil {
		return 0, fmt.Errorf("netlab: ping %s from %s with %d bytes: %w", to, h.Name, p.Size, err)
	}
	return rtt, nil
}

func (h *Host) ping(ctx context.Context, to netip.Addr, p Ping) (time.Duration, error) {
	if p.Size < 0 || p.Size > 65_507 {
		return 0, errors.New("the size must be 0 to 65507")
	}
	if p.Timeout == 0 {
		p.Timeout = time.Second
	}
	network, local := "ip4:icmp", "0.0.0.0"
	if to.Is6() {
		network, local = "ip6:ipv6-icmp", "::"
	}
	var socket net.PacketConn
	err := h.Do(func() (err error) {
		socket, err = new(net.ListenConfig).ListenPacket(ctx, network, local)
		return err
	})
	if err != nil {
		return 0, err
	}
	defer func() { _ = socket.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = socket.SetReadDeadline(time.Now()) })
	defer stop()
	if err := setFragmenting(socket.(*net.IPConn), to.Is6(), p.DontFragment); err != nil {
		return 0, err
	}

	request := make([]byte, 8+p.Size)
	request[0] = icmpEcho
	if to.Is6() {
		request[0] = icmp6Echo
	}
	binary.BigEndian.PutUint32(request[4:], rand.Uint32()) // identifier and sequence number
	for i := range request[8:] {
		request[8+i] = byte(i)
	}
	if to.Is4() { // for IPv6 the kernel does it, as it knows the source
		binary.BigEndian.PutUint16(request[2:], checksum(request, 0))
	}
	begin := time.Now()
	if err := socket.SetReadDeadline(begin.Add(p.Timeout)); err != nil {
		return 0, err
	}
	if _, err := socket.WriteTo(request, &net.IPAddr{IP: to.AsSlice(), Zone: to.Zone()}); err != nil {
		return 0, err
	}
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := socket.ReadFrom(buffer)
		at := time.Now()
		switch {
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case errors.Is(err, os.ErrDeadlineExceeded):
			return 0, fmt.Errorf("%w within %v", ErrNoReply, p.Timeout)
		case err != nil:
			return 0, err
		}
		address, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP)
		address = address.Unmap()
		mine, err := readICMP(address, buffer[:n], request)
		if err != nil {
			return 0, err
		}
		if mine {
			return at.Sub(begin), nil
		}
	}
}

func setFragmenting(socket *net.IPConn, six, dont bool) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	level, option, value := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT
	if six {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER // same values
	}
	if dont {
		value = unix.IP_PMTUDISC_PROBE
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), level, option, value)
		if failed == nil && six && dont {
			failed = unix.SetsockoptInt(int(fd), level, unix.IPV6_DONTFRAG, 1)
		}
	})
	return errors.Join(err, os.NewSyscallError("setsockopt", failed))
}

// readICMP decides whether a message answers the request: by a reply, or by an
// error, returned as such. All else, of other pings, is not ours.
func readICMP(from netip.Addr, message, request []byte) (reply bool, err error) {
	if len(message) < 8 {
		return false, nil
	}
	kind := message[0]
	isReply, isError := kind == icmpEchoReply, kind == icmpUnreachable || kind == icmpTimeExceeded
	if from.Is6() {
		isReply, isError = kind == icmp6EchoReply, kind <= icmp6LastError
	}
	switch {
	case isReply:
		return bytes.Equal(message[4:], request[4:]), nil
	case isError:
		inner, ok := ParsePacket(message[8:])
		if !ok || len(inner.upper) < 8 || inner.upper[0] != request[0] || !bytes.Equal(inner.upper[4:8], request[4:8]) {
			return false, nil
		}
		e := &ICMPError{From: from, Type: kind, Code: message[1]}
		if e.TooBig() {
			e.MTU = int(binary.BigEndian.Uint32(message[4:]))
			if from.Is4() {
				e.MTU &= 0xffff // RFC 1191: the upper half is unused
			}
		}
		return false, e
	}
	return false, nil
}
