package bond

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// Protocol numbers (IANA, Assigned Internet Protocol Numbers).
const (
	protocolICMP    = 1
	protocolTCP     = 6
	protocolUDP     = 17
	protocolDCCP    = 33
	protocolICMPv6  = 58
	protocolSCTP    = 132
	protocolUDPLite = 136

	headerHopByHop    = 0
	headerRouting     = 43
	headerFragment    = 44
	headerAuth        = 51
	headerDestination = 60
	headerMobility    = 135
	headerHIP         = 139
	headerShim6       = 140

	// maxExtensions bounds the IPv6 extension headers that are read. Hosts send
	// one or two; RFC 9288 lets routers drop longer chains.
	maxExtensions = 8
)

// Header is what is read of an IP packet.
type Header struct {
	Source, Destination netip.Addr
	// Protocol is that of the payload, behind any IPv6 extension headers.
	Protocol uint8
	// The ports of TCP, UDP, UDP-Lite, DCCP and SCTP; 0 if the packet has none or
	// is a fragment but not the first.
	SourcePort, DestinationPort uint16
	// ICMPType is the type of an ICMP or ICMPv6 message, 0 for all else.
	ICMPType uint8
	DSCP     uint8
	// Length is that of the packet as its header has it, bytes. What follows it
	// in the buffer is padding.
	Length int
	// Fragment says that the packet is part of a larger one, LaterFragment that
	// it is not the first part.
	Fragment, LaterFragment bool
}

// Parse reads the header of an IP packet. Its error says what is malformed.
func Parse(packet []byte) (Header, error) {
	if len(packet) == 0 {
		return Header{}, fmt.Errorf("malformed IP packet: it is empty")
	}
	switch version := packet[0] >> 4; version {
	case 4:
		return parse4(packet)
	case 6:
		return parse6(packet)
	default:
		return Header{}, fmt.Errorf("malformed IP packet: version %d in its first byte, want 4 or 6", version)
	}
}

// parse4 reads RFC 791, section 3.1.
func parse4(packet []byte) (Header, error) {
	if len(packet) < 20 {
		return Header{}, fmt.Errorf("malformed IPv4 packet: %d bytes, its header alone takes 20", len(packet))
	}
	header := int(packet[0]&0xf) * 4
	length := int(binary.BigEndian.Uint16(packet[2:]))
	switch {
	case header < 20:
		return Header{}, fmt.Errorf("malformed IPv4 packet: header length %d, want at least 20", header)
	case length < header:
		return Header{}, fmt.Errorf("malformed IPv4 packet: total length %d is less than the header's %d", length, header)
	case length > len(packet):
		return Header{}, fmt.Errorf("malformed IPv4 packet: total length %d, but only %d bytes are there", length, len(packet))
	}
	h := Header{
		Source:      netip.AddrFrom4([4]byte(packet[12:16])),
		Destination: netip.AddrFrom4([4]byte(packet[16:20])),
		Protocol:    packet[9],
		DSCP:        packet[1] >> 2,
		Length:      length,
	}
	field := binary.BigEndian.Uint16(packet[6:])
	offset := int(field&0x1fff) * 8
	h.Fragment = field&0x3fff != 0
	h.LaterFragment = offset != 0
	if offset+length-header > 65535 {
		return Header{}, fmt.Errorf("malformed IPv4 packet: a fragment that ends at byte %d, past 65535", offset+length-header)
	}
	h.readTransport(packet[header:length])
	return h, nil
}

// parse6 reads RFC 8200, sections 3 and 4.
func parse6(packet []byte) (Header, error) {
	if len(packet) < 40 {
		return Header{}, fmt.Errorf("malformed IPv6 packet: %d bytes, its header alone takes 40", len(packet))
	}
	length := 40 + int(binary.BigEndian.Uint16(packet[4:]))
	if length > len(packet) {
		return Header{}, fmt.Errorf("malformed IPv6 packet: payload length %d, but only %d bytes are there", length-40, len(packet)-40)
	}
	h := Header{
		Source:      netip.AddrFrom16([16]byte(packet[8:24])),
		Destination: netip.AddrFrom16([16]byte(packet[24:40])),
		Protocol:    packet[6],
		DSCP:        uint8(binary.BigEndian.Uint16(packet) >> 6 & 0x3f),
		Length:      length,
	}
	rest := packet[40:length]
	for range maxExtensions {
		var size int
		switch h.Protocol {
		case headerHopByHop, headerRouting, headerDestination, headerMobility, headerHIP, headerShim6:
			if len(rest) >= 2 {
				size = 8 + int(rest[1])*8
			}
		case headerAuth: // RFC 4302, section 2.2: in units of 4 bytes
			if len(rest) >= 2 {
				size = 8 + int(rest[1])*4
			}
		case headerFragment:
			size = 8
		default:
			h.readTransport(rest)
			return h, nil
		}
		if size == 0 || size > len(rest) {
			return Header{}, fmt.Errorf("malformed IPv6 packet: extension header %d is cut off, %d bytes are left", h.Protocol, len(rest))
		}
		if h.Protocol == headerFragment {
			field := binary.BigEndian.Uint16(rest[2:])
			offset := int(field &^ 7)
			// Offset 0 and no more to come is an atomic fragment, a whole packet
			// (RFC 6946).
			h.Fragment = h.Fragment || field&0xfff9 != 0
			h.LaterFragment = h.LaterFragment || offset != 0
			if offset+len(rest)-size > 65535 {
				return Header{}, fmt.Errorf("malformed IPv6 packet: a fragment that ends at byte %d, past 65535", offset+len(rest)-size)
			}
		}
		h.Protocol = rest[0]
		rest = rest[size:]
		if h.LaterFragment {
			return h, nil // what follows is from the middle of a packet
		}
	}
	return Header{}, fmt.Errorf("malformed IPv6 packet: more than %d extension headers", maxExtensions)
}

// readTransport reads what follows the IP headers. A payload too short for ports
// is the receiving host's to refuse.
func (h *Header) readTransport(payload []byte) {
	if h.LaterFragment {
		return
	}
	switch h.Protocol {
	case protocolTCP, protocolUDP, protocolUDPLite, protocolDCCP, protocolSCTP:
		if len(payload) >= 4 {
			h.SourcePort = binary.BigEndian.Uint16(payload)
			h.DestinationPort = binary.BigEndian.Uint16(payload[2:])
		}
	case protocolICMP, protocolICMPv6:
		if len(payload) >= 1 {
			h.ICMPType = payload[0]
		}
	}
}
