package netlab

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// IP packets as bytes: read for the capture, the emulator's firewall and ICMP
// errors, and made for the Injector. Nothing here does I/O.

// A Packet is what the lab reads of an IP packet. Fields that the bytes at
// hand do not reach are zero.
type Packet struct {
	// Source and Destination have ports if the packet is TCP or UDP and not a
	// later fragment.
	Source, Destination netip.AddrPort
	Protocol            uint8 // of the upper layer, after IPv6 extension headers (IANA protocol numbers)
	DSCP                uint8
	Length              int // bytes, as the header says
	DontFragment        bool
	Fragment            bool  // the first or a later part of a packet
	TCPFlags            uint8 // FIN 1, SYN 2, RST 4, PSH 8, ACK 16 (RFC 9293)
	ICMPType, ICMPCode  uint8

	upper []byte // what follows the IP headers; of a later fragment, not the upper layer's header
}

// ParsePacket reads the beginning of an IP packet, which may be cut short. It
// reports false if that is not even an IP header.
func ParsePacket(b []byte) (Packet, bool) {
	if len(b) < 1 {
		return Packet{}, false
	}
	var p Packet
	var later bool
	var source, destination netip.Addr
	switch b[0] >> 4 {
	case 4: // RFC 791
		header := int(b[0]&15) * 4
		if header < 20 || len(b) < header {
			return Packet{}, false
		}
		p.DSCP, p.Length, p.Protocol = b[1]>>2, int(binary.BigEndian.Uint16(b[2:])), b[9]
		fragment := binary.BigEndian.Uint16(b[6:])
		const dontFragment, more, offset = 0x4000, 0x2000, 0x1fff
		p.DontFragment = fragment&dontFragment != 0
		p.Fragment = fragment&(more|offset) != 0
		later = fragment&offset != 0
		source, destination = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		p.upper = b[header:]
	case 6: // RFC 8200
		if len(b) < 40 {
			return Packet{}, false
		}
		p.DSCP, p.Length, p.Protocol = uint8(binary.BigEndian.Uint16(b)>>6)&63, 40+int(binary.BigEndian.Uint16(b[4:])), b[6]
		p.DontFragment = true
		source, destination = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		p.upper = b[40:]
		later = p.skipExtensions()
	default:
		return Packet{}, false
	}
	var sourcePort, destinationPort uint16
	if !later {
		switch u := p.upper; p.Protocol {
		case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
			if len(u) >= 4 {
				sourcePort, destinationPort = binary.BigEndian.Uint16(u), binary.BigEndian.Uint16(u[2:])
			}
			if p.Protocol == unix.IPPROTO_TCP && len(u) >= 14 {
				p.TCPFlags = u[13]
			}
		case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
			if len(u) >= 2 {
				p.ICMPType, p.ICMPCode = u[0], u[1]
			}
		}
	}
	p.Source, p.Destination = netip.AddrPortFrom(source, sourcePort), netip.AddrPortFrom(destination, destinationPort)
	return p, true
}

// skipExtensions goes on to the upper layer of an IPv6 packet, and reports
// whether it is a later fragment, which has none.
func (p *Packet) skipExtensions() (later bool) {
	for {
		length := 8
		switch p.Protocol {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(p.upper) < 2 {
				return later
			}
			length = 8 + 8*int(p.upper[1])
		case unix.IPPROTO_FRAGMENT:
			if len(p.upper) < 8 {
				return later
			}
			p.Fragment, p.DontFragment = true, false
			later = binary.BigEndian.Uint16(p.upper[2:])&^7 != 0
		default:
			return later
		}
		if len(p.upper) < length {
			return later
		}
		p.Protocol, p.upper = p.upper[0], p.upper[length:]
		if later {
			return true
		}
	}
}

// stripMPTCP puts no-operation options (RFC 9293 §3.2) where those of MPTCP (kind
// 30, RFC 8684 §3) are in a whole packet, and reports whether there were any.
func stripMPTCP(packet []byte) bool {
	const end, noOperation, mptcp, fixed = 0, 1, 30, 20
	p, ok := ParsePacket(packet)
	if !ok || p.Protocol != unix.IPPROTO_TCP || len(p.upper) < fixed || p.Source.Port() == 0 {
		return false
	}
	options := p.upper[fixed:max(fixed, min(int(p.upper[12]>>4)*4, len(p.upper)))]
	found := false
	for i := 0; i < len(options) && options[i] != end; {
		if options[i] == noOperation {
			i++
			continue
		}
		if i+1 >= len(options) || options[i+1] < 2 || i+int(options[i+1]) > len(options) {
			break
		}
		next := i + int(options[i+1])
		if options[i] == mptcp {
			found = true
			for ; i < next; i++ {
				options[i] = noOperation
			}
		}
		i = next
	}
	if found {
		segment := p.upper[:min(len(p.upper), p.Length-(len(packet)-len(p.upper)))]
		segment[16], segment[17] = 0, 0
		sum := checksum(segment, pseudoHeader(p.Source.Addr(), p.Destination.Addr(), unix.IPPROTO_TCP, len(segment)))
		binary.BigEndian.PutUint16(segment[16:], sum)
	}
	return found
}

func (p Packet) String() string {
	text := fmt.Sprintf("%v > %v protocol %d, %d bytes", p.Source, p.Destination, p.Protocol, p.Length)
	switch p.Protocol {
	case unix.IPPROTO_TCP:
		text += fmt.Sprintf(", flags %#x", p.TCPFlags)
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		text += fmt.Sprintf(", type %d code %d", p.ICMPType, p.ICMPCode)
	}
	if p.Fragment {
		text += ", fragment"
	}
	return text
}

// UDPPacket makes an IPv4 or IPv6 packet with a UDP datagram in it, correct in
// length and checksums, from any source to any destination of one family.
func UDPPacket(source, destination netip.AddrPort, payload []byte) []byte {
	datagram := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(datagram[0:], source.Port())
	binary.BigEndian.PutUint16(datagram[2:], destination.Port())
	binary.BigEndian.PutUint16(datagram[4:], uint16(8+len(payload)))
	datagram = append(datagram, payload...)
	sum := checksum(datagram, pseudoHeader(source.Addr(), destination.Addr(), unix.IPPROTO_UDP, len(datagram)))
	if sum == 0 {
		sum = 0xffff // 0 would mean none (RFC 768)
	}
	binary.BigEndian.PutUint16(datagram[6:], sum)
	return IPPacket(source.Addr(), destination.Addr(), unix.IPPROTO_UDP, datagram)
}

// IPPacket puts an IPv4 or IPv6 header before a payload of the protocol. The
// IPv4 identification is 0, and fragmenting allowed.
func IPPacket(source, destination netip.Addr, protocol uint8, payload []byte) []byte {
	const hops = 64
	if source.Is4() {
		b := make([]byte, 20, 20+len(payload))
		b[0], b[8], b[9] = 0x45, hops, protocol
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
		copy(b[12:], source.AsSlice())
		copy(b[16:], destination.AsSlice())
		binary.BigEndian.PutUint16(b[10:], checksum(b, 0))
		return append(b, payload...)
	}
	b := make([]byte, 40, 40+len(payload))
	b[0], b[6], b[7] = 0x60, protocol, hops
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	copy(b[8:], source.AsSlice())
	copy(b[24:], destination.AsSlice())
	return append(b, payload...)
}

// Fragments cuts a packet of UDPPacket or IPPacket into parts that carry at
// most size bytes of payload each, rounded down to a multiple of 8, all with
// the identification (RFC 791, RFC 8200 §4.5).
func Fragments(packet []byte, size int, identification uint32) [][]byte {
	size = max(size&^7, 8)
	header := 40
	if packet[0]>>4 == 4 {
		header = 20
	}
	var parts [][]byte
	payload := packet[header:]
	for offset := 0; offset < len(payload); offset += size {
		part := payload[offset:min(offset+size, len(payload))]
		more := offset+len(part) < len(payload)
		b := append([]byte(nil), packet[:header]...)
		if header == 20 {
			binary.BigEndian.PutUint16(b[2:], uint16(20+len(part)))
			binary.BigEndian.PutUint16(b[4:], uint16(identification))
			fragment := uint16(offset / 8)
			if more {
				fragment |= 0x2000
			}
			binary.BigEndian.PutUint16(b[6:], fragment)
			b[10], b[11] = 0, 0
			binary.BigEndian.PutUint16(b[10:], checksum(b, 0))
		} else {
			extension := make([]byte, 8)
			extension[0] = b[6]
			fragment := uint16(offset)
			if more {
				fragment |= 1
			}
			binary.BigEndian.PutUint16(extension[2:], fragment)
			binary.BigEndian.PutUint32(extension[4:], identification)
			b[6] = unix.IPPROTO_FRAGMENT
			binary.BigEndian.PutUint16(b[4:], uint16(8+len(part)))
			b = append(b, extension...)
		}
		parts = append(parts, append(b, part...))
	}
	return parts
}

// pseudoHeader is the partial sum of the pseudo-header (RFC 768, RFC 8200 §8.1).
func pseudoHeader(source, destination netip.Addr, protocol uint8, length int) uint32 {
	sum := uint32(protocol) + uint32(length)
	for _, address := range [][]byte{source.AsSlice(), destination.AsSlice()} {
		for i := 0; i < len(address); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(address[i:]))
		}
	}
	return sum
}

// checksum is the Internet checksum (RFC 1071) of b, begun with a partial sum.
func checksum(b []byte, sum uint32) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
