package tunnel

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// decodeAll runs the decoder over in, cut into pieces of the given size, and
// writes down what it found. Pieces of one DATA frame are joined.
func decodeAll(in []byte, piece int, packets bool) (string, error) {
	d := decoder{packets: packets}
	var out []string
	for len(in) > 0 {
		n := min(piece, len(in))
		chunk := in[:n]
		in = in[n:]
		for len(chunk) > 0 {
			f, rest, ok, err := d.next(chunk)
			if err != nil {
				return strings.Join(out, " "), err
			}
			if !ok {
				break
			}
			if last := len(out) - 1; f.kind == frameData && last >= 0 && strings.HasPrefix(out[last], "DATA") {
				out[last] += string(f.payload)
			} else {
				out = append(out, fmt.Sprintf("%v:%s", f.kind, f.payload))
			}
			chunk = rest
		}
	}
	return strings.Join(out, " "), nil
}

func TestDecoder(t *testing.T) {
	frames := func(list ...[]byte) []byte { return bytes.Join(list, nil) }
	frame := func(kind frameKind, payload string) []byte { return appendFrame(nil, kind, []byte(payload)) }
	header := func(kind frameKind, length int) []byte {
		b := make([]byte, frameHeader)
		putHeader(b, kind, length)
		return b
	}
	for _, c := range []struct {
		name string
		in   []byte
		want string
		err  string // on a session without packets, if not the same, after a slash what with them
	}{
		{"nothing", nil, "", ""},
		{"end", frame(frameEnd, ""), "END:", ""},
		{"hello", frame(frameHello, "{}"), "HELLO:{}", ""},
		{"a flow", frames(frame(frameData, "abc"), frame(frameData, "def"), frame(frameEnd, "")), "DATA:abcdef END:", ""},
		{"empty data", frames(frame(frameData, ""), frame(frameData, "x"), frame(framePing, "")), "DATA:x PING:", ""},
		{"truncated header", frame(frameEnd, "")[:3], "", ""},
		{"truncated payload", frame(frameHello, "abc")[:6], "", ""},
		{"unknown kind", header(99, 0), "", "unknown frame kind 99"},
		{"kind 0", make([]byte, 4), "", "unknown frame kind 0"},
		{"oversized control", header(frameHello, maxControl+1), "", "HELLO frame of 4097 bytes, at most 4096"},
		{"oversized data", header(frameData, maxData+1), "", "at most 1048576"},
		{"a packet", frames(frame(framePacket, "abc"), frame(framePacket, ""), frame(framePacket, "de")), "PACKET:abc PACKET: PACKET:de", "PACKET on a session that does not carry packets/"},
		{"wishes", frame(frameConfig, strings.Repeat("c", maxWishes)), "CONFIG:" + strings.Repeat("c", maxWishes), "CONFIG on a session that does not carry packets/"},
		{"what became of them", frames(frame(frameState, "{}"), frame(framePacket, "abc")), "STATE:{} PACKET:abc", "STATE on a session that does not carry packets/"},
		{"oversized packet", header(framePacket, maxMessage+1), "", "does not carry packets/PACKET frame of 1601 bytes, at most 1600"},
		{"oversized wishes", header(frameConfig, maxWishes+1), "", "does not carry packets/CONFIG frame of 65537 bytes, at most 65536"},
		{"largest control", frame(frameRefuse, strings.Repeat("m", maxControl)), "REFUSE:" + strings.Repeat("m", maxControl), ""},
	} {
		without, with, differ := strings.Cut(c.err, "/")
		if !differ {
			with = without
		}
		for _, packets := range []bool{false, true} {
			wantErr, want := without, c.want
			if packets {
				wantErr = with
			} else if differ {
				want = ""
			}
			for _, piece := range []int{1, 2, 3, 5, 1 << 20} {
				got, err := decodeAll(c.in, piece, packets)
				if (err == nil) != (wantErr == "") || err != nil && !strings.Contains(err.Error(), wantErr) {
					t.Errorf("%s in pieces of %d: error %v, want %q", c.name, piece, err, wantErr)
				}
				if got != want {
					t.Errorf("%s in pieces of %d: %.80q, want %.80q", c.name, piece, got, want)
				}
			}
		}
	}
}

func TestOpenAndResetPayloads(t *testing.T) {
	for _, text := range []string{"192.0.2.1:443", "[2001:db8::1]:65535", "0.0.0.0:0"} {
		want := netip.MustParseAddrPort(text)
		number, got, err := parseOpen(appendOpen(nil, 7, want)[frameHeader:])
		if err != nil || number != 7 || got != want {
			t.Errorf("%s came back as %d, %s, %v", text, number, got, err)
		}
	}
	for _, n := range []int{0, 4, 9, 11, 21, 23} {
		if _, _, err := parseOpen(make([]byte, n)); err == nil {
			t.Errorf("OPEN of %d bytes was taken", n)
		}
	}
	for _, text := range []string{"192.0.2.1:443", "[2001:db8::1]:65535"} {
		want := netip.MustParseAddrPort(text)
		number, forward, got, err := parseInboundOpen(appendInboundOpen(nil, 7, 65535, want)[frameHeader:])
		if err != nil || number != 7 || forward != 65535 || got != want {
			t.Errorf("inbound %s came back as %d, %d, %s, %v", text, number, forward, got, err)
		}
	}
	for _, n := range []int{0, 8, 10, 11, 13, 22, 23, 25} {
		if _, _, _, err := parseInboundOpen(make([]byte, n)); err == nil {
			t.Errorf("inbound OPEN of %d bytes was taken", n)
		}
	}
	if number, reason, err := parseReset(resetFrame(9, ResetTimeout)[frameHeader:]); number != 9 || reason != ResetTimeout || err != nil {
		t.Errorf("RESET came back as %d, %v, %v", number, reason, err)
	}
	if _, _, err := parseReset(nil); err == nil {
		t.Error("an empty RESET was taken")
	}
}

func FuzzDecoder(f *testing.F) {
	f.Add([]byte{}, 1, false)
	f.Add(appendFrame(nil, frameHello, []byte(`{"min":1,"max":1}`)), 3, false)
	f.Add(appendOpen(nil, 1, netip.MustParseAddrPort("192.0.2.1:80")), 5, false)
	f.Add(appendFrame(appendFrame(nil, frameData, []byte("payload")), frameEnd, nil), 2, false)
	f.Add(resetFrame(1, ResetRefused), 4, false)
	f.Add([]byte{17, 255, 255, 255, 0}, 1, false)
	f.Add(appendInboundOpen(nil, 1, 2, netip.MustParseAddrPort("[2001:db8::1]:80")), 5, false)
	f.Add(appendFrame(appendFrame(nil, framePacket, []byte("packet")), framePacket, nil), 3, true)
	f.Add(appendFrame(appendFrame(nil, frameConfig, []byte("{}")), frameState, []byte("{}")), 2, true)
	f.Add([]byte{22, 0, 6, 65, 0}, 1, true)
	f.Fuzz(func(t *testing.T, in []byte, piece int, packets bool) {
		if piece < 1 || piece > 1<<16 {
			return // not the size of a piece
		}
		whole, err := decodeAll(in, len(in)+1, packets)
		cut, cutErr := decodeAll(in, piece, packets)
		if whole != cut || (err == nil) != (cutErr == nil) {
			t.Fatalf("whole: %q, %v; in pieces of %d: %q, %v", whole, err, piece, cut, cutErr)
		}
		d := decoder{packets: packets}
		for rest := in; len(rest) > 0; {
			fragment, next, ok, err := d.next(rest)
			if err != nil || !ok {
				break
			}
			most := maxControl
			switch fragment.kind {
			case frameData:
				most = maxData
			case framePacket:
				most = maxMessage
			case frameConfig, frameState:
				most = maxWishes
			}
			if len(fragment.payload) > most || !packets && fragment.kind >= framePacket {
				t.Fatalf("%v of %d bytes", fragment.kind, len(fragment.payload))
			}
			_, _, _ = parseOpen(fragment.payload)
			_, _, _, _ = parseInboundOpen(fragment.payload)
			_, _, _ = parseReset(fragment.payload)
			rest = next
		}
	})
}
