package bond

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
)

// packet4 makes an IPv4 packet of length bytes in all.
func packet4(protocol uint8, source, destination string, sourcePort, destinationPort uint16, dscp uint8, length int) []byte {
	p := make([]byte, length)
	p[0], p[1], p[8], p[9] = 0x45, dscp<<2, 64, protocol
	binary.BigEndian.PutUint16(p[2:], uint16(length))
	from, to := netip.MustParseAddr(source).As4(), netip.MustParseAddr(destination).As4()
	copy(p[12:], from[:])
	copy(p[16:], to[:])
	if length >= 24 {
		binary.BigEndian.PutUint16(p[20:], sourcePort)
		binary.BigEndian.PutUint16(p[22:], destinationPort)
	}
	return p
}

// packet6 makes an IPv6 packet from the bytes behind its header.
func packet6(next uint8, source, destination string, payload ...byte) []byte {
	p := make([]byte, 40, 40+len(payload))
	p[0], p[6] = 0x60, next
	binary.BigEndian.PutUint16(p[4:], uint16(len(payload)))
	from, to := netip.MustParseAddr(source).As16(), netip.MustParseAddr(destination).As16()
	copy(p[8:], from[:])
	copy(p[24:], to[:])
	return append(p, payload...)
}

func change(p []byte, f func([]byte)) []byte {
	f(p)
	return p
}

func TestParse(t *testing.T) {
	a4, b4 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	a6, b6 := netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")
	udp4 := func(length int) []byte { return packet4(protocolUDP, "10.0.0.1", "10.0.0.2", 1000, 53, 46, length) }
	field4 := func(v uint16) []byte {
		return change(udp4(100), func(p []byte) { binary.BigEndian.PutUint16(p[6:], v) })
	}
	p6 := func(next uint8, payload ...byte) []byte { return packet6(next, "fd00::1", "fd00::2", payload...) }
	udp := []byte{3, 232, 0, 53, 0, 8, 0, 0}
	with := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	eight := func(next, length byte) []byte { return []byte{next, length, 0, 0, 0, 0, 0, 0} }
	fragment := func(next byte, field uint16) []byte {
		return []byte{next, 0, byte(field >> 8), byte(field), 0, 0, 0, 1}
	}
	base4 := Header{Source: a4, Destination: b4, Protocol: protocolUDP, SourcePort: 1000, DestinationPort: 53, DSCP: 46, Length: 100}
	base6 := Header{Source: a6, Destination: b6, Protocol: protocolUDP, SourcePort: 1000, DestinationPort: 53}
	from := func(h Header, f func(*Header)) Header { f(&h); return h }

	for _, c := range []struct {
		name   string
		packet []byte
		want   Header
		err    string
	}{
		{"udp4", udp4(100), base4, ""},
		{"padding behind", append(udp4(100), 0, 0), base4, ""},
		{"options", change(udp4(100), func(p []byte) { p[0] = 0x46; copy(p[24:], p[20:24]); clear(p[20:24]) }), base4, ""},
		{"first fragment", field4(0x2000), from(base4, func(h *Header) { h.Fragment = true }), ""},
		{"do not fragment", field4(0x4000), base4, ""},
		{"later fragment", field4(0x0010), from(base4, func(h *Header) {
			h.Fragment, h.LaterFragment, h.SourcePort, h.DestinationPort = true, true, 0, 0
		}), ""},
		{"icmp", packet4(protocolICMP, "10.0.0.1", "10.0.0.2", 0x0800, 0, 0, 84), Header{Source: a4, Destination: b4, Protocol: 1, ICMPType: 8, Length: 84}, ""},
		{"no room for ports", udp4(22), from(base4, func(h *Header) { h.SourcePort, h.DestinationPort, h.Length = 0, 0, 22 }), ""},
		{"esp", packet4(50, "10.0.0.1", "10.0.0.2", 7, 7, 0, 100), Header{Source: a4, Destination: b4, Protocol: 50, Length: 100}, ""},
		{"empty", nil, Header{}, "empty"},
		{"version", []byte{0x50}, Header{}, "version 5"},
		{"short4", udp4(20)[:19], Header{}, "19 bytes"},
		{"header length 4", change(udp4(100), func(p []byte) { p[0] = 0x44 }), Header{}, "header length 16"},
		{"options past the end", change(udp4(24), func(p []byte) { p[0] = 0x4f }), Header{}, "less than the header"},
		{"total length", udp4(100)[:99], Header{}, "only 99 bytes"},
		{"ping of death", field4(0x1fff), Header{}, "past 65535"},

		{"udp6", p6(17, udp...), from(base6, func(h *Header) { h.Length = 48 }), ""},
		{"dscp6", change(p6(17, udp...), func(p []byte) { p[0], p[1] = 0x6b, 0x80 }), from(base6, func(h *Header) { h.Length, h.DSCP = 48, 46 }), ""},
		{"nothing follows", p6(59), Header{Source: a6, Destination: b6, Protocol: 59, Length: 40}, ""},
		{"extensions", p6(0, with(eight(43, 0), eight(60, 1), eight(0, 0), eight(51, 0)[:8], eight(17, 1), eight(0, 0)[:4], udp)...),
			from(base6, func(h *Header) { h.Length = 40 + 8 + 16 + 8 + 12 + 8 }), ""},
		{"first fragment 6", p6(44, with(fragment(17, 1), udp)...), from(base6, func(h *Header) { h.Length, h.Fragment = 56, true }), ""},
		{"atomic fragment", p6(44, with(fragment(17, 0), udp)...), from(base6, func(h *Header) { h.Length = 56 }), ""},
		{"later fragment 6", p6(44, with(fragment(17, 64), udp)...), from(base6, func(h *Header) {
			h.Length, h.Fragment, h.LaterFragment, h.SourcePort, h.DestinationPort = 56, true, true, 0, 0
		}), ""},
		{"icmp6", p6(58, 128, 0, 0, 0), Header{Source: a6, Destination: b6, Protocol: 58, ICMPType: 128, Length: 44}, ""},
		{"short6", p6(59)[:39], Header{}, "39 bytes"},
		{"payload length", p6(17, udp...)[:47], Header{}, "only 7 bytes"},
		{"extension cut off", p6(0, 17), Header{}, "cut off"},
		{"extension too long", p6(0, eight(17, 1)...), Header{}, "cut off"},
		{"fragment cut off", p6(44, fragment(17, 1)[:7]...), Header{}, "cut off"},
		{"fragment past the end", p6(44, with(fragment(17, 0xfff8), udp)...), Header{}, "past 65535"},
		{"many extensions", p6(0, with(eight(0, 0), eight(0, 0), eight(0, 0), eight(0, 0), eight(0, 0), eight(0, 0), eight(0, 0), eight(0, 0), eight(17, 0), udp)...), Header{}, "more than 8"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Parse(c.packet)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want %q in it", err, c.err)
				}
				return
			}
			if err != nil || got != c.want {
				t.Errorf("got %+v, %v\nwant %+v", got, err, c.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add(packet4(protocolUDP, "10.0.0.1", "10.0.0.2", 1000, 53, 46, 100))
	f.Add(packet4(protocolICMP, "10.0.0.1", "10.0.0.2", 0x0800, 0, 0, 84))
	f.Add(packet6(0, "fd00::1", "fd00::2", 44, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 1, 0, 0, 0, 1, 3, 232, 0, 53))
	f.Add(packet6(51, "fd00::1", "fd00::2", 17, 255, 0, 0))
	f.Add([]byte{0x4f})
	f.Fuzz(func(t *testing.T, packet []byte) {
		h, err := Parse(packet)
		if err != nil {
			return
		}
		if h.Length > len(packet) || h.Length < 20 {
			t.Errorf("length %d of %d bytes", h.Length, len(packet))
		}
		if !h.Source.IsValid() || !h.Destination.IsValid() || h.LaterFragment && (!h.Fragment || h.SourcePort != 0) {
			t.Errorf("inconsistent header %+v", h)
		}
		// Padding changes nothing.
		if padded, err := Parse(append(packet[:h.Length:h.Length], 1, 2, 3)); err != nil || padded != h {
			t.Errorf("with padding %+v, %v\nwithout %+v", padded, err, h)
		}
	})
}
