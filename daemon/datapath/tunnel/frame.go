package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// frameKind is the first byte of every frame.
type frameKind byte

const (
	frameHello   frameKind = 1 // router: versions; JSON
	frameEnrol   frameKind = 2 // router: versions and a token's secret; JSON
	frameWelcome frameKind = 3 // concentrator: the version chosen; JSON
	frameRefuse  frameKind = 4 // concentrator: code and sentence; JSON

	frameOpen  frameKind = 16 // the end that opens flows: flow number and destination, or client
	frameData  frameKind = 17 // both: bytes of the open flow
	frameEnd   frameKind = 18 // both: no more bytes in this direction
	frameReset frameKind = 19 // both: the flow is aborted; flow number, reason
	framePing  frameKind = 20 // both: answered by PONG
	framePong  frameKind = 21

	framePacket frameKind = 22 // both, sessions of role packets only: one message
	frameConfig frameKind = 23 // router, as PACKET: its wishes; JSON
	frameState  frameKind = 24 // concentrator, as PACKET: what became of them; JSON
)

func (k frameKind) String() string {
	switch k {
	case frameHello:
		return "HELLO"
	case frameEnrol:
		return "ENROL"
	case frameWelcome:
		return "WELCOME"
	case frameRefuse:
		return "REFUSE"
	case frameOpen:
		return "OPEN"
	case frameData:
		return "DATA"
	case frameEnd:
		return "END"
	case frameReset:
		return "RESET"
	case framePing:
		return "PING"
	case framePong:
		return "PONG"
	case framePacket:
		return "PACKET"
	case frameConfig:
		return "CONFIG"
	case frameState:
		return "STATE"
	}
	return fmt.Sprintf("kind %d", byte(k))
}

const (
	frameHeader = 4
	// maxData bounds a DATA frame. Its payload is passed on as it arrives, so
	// the bound costs no memory; it only catches a peer that has lost the frame
	// boundary early.
	maxData = 1 << 20
	// maxControl bounds every other frame, which is gathered in memory.
	maxControl = 4096
	// maxMessage bounds a PACKET frame: an IP packet of 1500 bytes and what its
	// sender puts around it.
	maxMessage = 1600
	// maxWishes bounds CONFIG and STATE.
	maxWishes = 64 << 10
	// maxOpen is the longest OPEN frame: header, flow number, forward, port and an
	// IPv6 address.
	maxOpen = frameHeader + 4 + 2 + 2 + 16
)

var errProtocol = errors.New("the peer broke the tunnel protocol")

// putHeader writes a frame header into b[:frameHeader].
func putHeader(b []byte, kind frameKind, length int) {
	binary.BigEndian.PutUint32(b, uint32(kind)<<24|uint32(length))
}

// appendFrame appends one control frame to b.
func appendFrame(b []byte, kind frameKind, payload []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(kind)<<24|uint32(len(payload)))
	return append(b, payload...)
}

// appendOpen appends an OPEN frame: the number of the flow within its session,
// the destination's port, and its address in 4 or 16 bytes.
func appendOpen(b []byte, number uint32, destination netip.AddrPort) []byte {
	address := destination.Addr().Unmap().AsSlice()
	b = binary.BigEndian.AppendUint32(b, uint32(frameOpen)<<24|uint32(6+len(address)))
	b = binary.BigEndian.AppendUint32(b, number)
	b = binary.BigEndian.AppendUint16(b, destination.Port())
	return append(b, address...)
}

func parseOpen(p []byte) (number uint32, destination netip.AddrPort, err error) {
	if len(p) != 10 && len(p) != 22 {
		return 0, netip.AddrPort{}, fmt.Errorf("%w: OPEN of %d bytes, want 10 or 22", errProtocol, len(p))
	}
	address, _ := netip.AddrFromSlice(p[6:])
	destination = netip.AddrPortFrom(address.Unmap(), binary.BigEndian.Uint16(p[4:]))
	return binary.BigEndian.Uint32(p), destination, nil
}

// appendInboundOpen appends the OPEN frame of a session of role inbound: the
// number of the flow within its session, that of the forward, the port of the
// client, and its address in 4 or 16 bytes.
func appendInboundOpen(b []byte, number uint32, forward uint16, client netip.AddrPort) []byte {
	address := client.Addr().Unmap().AsSlice()
	b = binary.BigEndian.AppendUint32(b, uint32(frameOpen)<<24|uint32(8+len(address)))
	b = binary.BigEndian.AppendUint32(b, number)
	b = binary.BigEndian.AppendUint16(b, forward)
	b = binary.BigEndian.AppendUint16(b, client.Port())
	return append(b, address...)
}

func parseInboundOpen(p []byte) (number uint32, forward uint16, client netip.AddrPort, err error) {
	if len(p) != 12 && len(p) != 24 {
		return 0, 0, netip.AddrPort{}, fmt.Errorf("%w: inbound OPEN of %d bytes, want 12 or 24", errProtocol, len(p))
	}
	address, _ := netip.AddrFromSlice(p[8:])
	client = netip.AddrPortFrom(address.Unmap(), binary.BigEndian.Uint16(p[6:]))
	return binary.BigEndian.Uint32(p), binary.BigEndian.Uint16(p[4:]), client, nil
}

// ResetReason says in a RESET frame why a flow was aborted.
type ResetReason uint16

// The reasons, sent as two bytes.
const (
	ResetAborted     ResetReason = 0 // the end that sent this lost its local connection
	ResetRefused     ResetReason = 1 // the destination refused the connection
	ResetUnreachable ResetReason = 2 // no route, host unreachable
	ResetTimeout     ResetReason = 3 // the destination did not answer
	ResetForbidden   ResetReason = 4 // the concentrator does not go to that destination
	ResetLimit       ResetReason = 5 // the router has too many flows
)

func (r ResetReason) String() string {
	switch r {
	case ResetAborted:
		return "aborted"
	case ResetRefused:
		return "connection refused"
	case ResetUnreachable:
		return "unreachable"
	case ResetTimeout:
		return "timed out"
	case ResetForbidden:
		return "destination not allowed by the concentrator"
	case ResetLimit:
		return "too many flows"
	}
	return fmt.Sprintf("reason %d", uint16(r))
}

func resetFrame(number uint32, reason ResetReason) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(frameReset)<<24|6)
	b = binary.BigEndian.AppendUint32(b, number)
	return binary.BigEndian.AppendUint16(b, uint16(reason))
}

func parseReset(p []byte) (number uint32, reason ResetReason, err error) {
	if len(p) != 6 {
		return 0, 0, fmt.Errorf("%w: RESET of %d bytes, want 6", errProtocol, len(p))
	}
	return binary.BigEndian.Uint32(p), ResetReason(binary.BigEndian.Uint16(p[4:])), nil
}

// fragment is what the decoder found: a whole control frame, or some bytes of a
// DATA frame.
type fragment struct {
	kind    frameKind
	payload []byte
}

// decoder finds frames in a stream that arrives in pieces of any size. It holds
// at most maxControl bytes, with packets maxWishes.
type decoder struct {
	packets   bool // the session's role is packets: their frames may come
	header    [frameHeader]byte
	have      int // bytes of header gathered
	kind      frameKind
	remaining int    // payload bytes of the current frame still to come
	control   []byte // payload gathered of a control frame
}

// next takes one fragment off in. ok is false when in held no whole one; then
// all of in was taken. A payload is valid until the next call and, for DATA,
// as long as in is.
func (d *decoder) next(in []byte) (f fragment, rest []byte, ok bool, err error) {
	for {
		if d.have < frameHeader {
			n := copy(d.header[d.have:], in)
			d.have += n
			in = in[n:]
			if d.have < frameHeader {
				return fragment{}, nil, false, nil
			}
			if err := d.begin(); err != nil {
				return fragment{}, nil, false, err
			}
		}
		if d.kind == frameData {
			n := min(d.remaining, len(in))
			d.remaining -= n
			payload := in[:n:n]
			in = in[n:]
			if d.remaining == 0 {
				d.have = 0
			}
			if n == 0 && len(in) > 0 {
				continue // an empty DATA frame
			}
			return fragment{frameData, payload}, in, n > 0, nil
		}
		n := min(d.remaining, len(in))
		d.remaining -= n
		payload := in[:n:n]
		in = in[n:]
		if d.remaining > 0 || len(d.control) > 0 {
			d.control = append(d.control, payload...)
			payload = d.control
		}
		if d.remaining > 0 {
			return fragment{}, nil, false, nil
		}
		d.have = 0
		if d.packets && cap(d.control) <= maxControl {
			d.control = d.control[:0] // a packet in two pieces comes with every other read
		} else {
			d.control = nil
		}
		return fragment{d.kind, payload}, in, true, nil
	}
}

// begin reads the header that has just become complete.
func (d *decoder) begin() error {
	word := binary.BigEndian.Uint32(d.header[:])
	d.kind = frameKind(word >> 24)
	d.remaining = int(word & 0xffffff)
	limit := maxControl
	switch d.kind {
	case frameData:
		limit = maxData
	case framePacket, frameConfig, frameState:
		limit = maxWishes
		if d.kind == framePacket {
			limit = maxMessage
		}
		if !d.packets {
			return fmt.Errorf("%w: %v on a session that does not carry packets", errProtocol, d.kind)
		}
	case frameHello, frameEnrol, frameWelcome, frameRefuse, frameOpen, frameEnd, frameReset, framePing, framePong:
	default:
		return fmt.Errorf("%w: unknown frame kind %d", errProtocol, byte(d.kind))
	}
	if d.remaining > limit {
		return fmt.Errorf("%w: %v frame of %d bytes, at most %d", errProtocol, d.kind, d.remaining, limit)
	}
	return nil
}
