package netlab

import (
	"bytes"
	"context"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	must(t, err)
	return b
}

func TestParsePacket(t *testing.T) {
	const addresses6 = "20010db8 00000000 00000000 00000001 20010db8 00000000 00000000 00000002"
	tests := []struct {
		name, bytes, want string // want is empty if that is no IP packet
	}{
		{"UDP", "45b80020 00004000 40110000 0a010002 c6336414 1389 0035 000c 0000",
			"10.1.0.2:5001 > 198.51.100.20:53 protocol 17, 32 bytes"},
		{"TCP after options", "46000034 00000000 40060000 0a010002 c6336414 01010101 01bb1389 00000000 00000000 5012",
			"10.1.0.2:443 > 198.51.100.20:5001 protocol 6, 52 bytes, flags 0x12"},
		{"ICMP", "4500001c 00000000 40010000 0a010002 c6336414 0304", "10.1.0.2:0 > 198.51.100.20:0 protocol 1, 28 bytes, type 3 code 4"},
		{"first fragment", "45000020 00012000 40110000 0a010002 c6336414 13890035", "10.1.0.2:5001 > 198.51.100.20:53 protocol 17, 32 bytes, fragment"},
		{"last fragment has no ports", "45000020 00010001 40110000 0a010002 c6336414 13890035", "10.1.0.2:0 > 198.51.100.20:0 protocol 17, 32 bytes, fragment"},
		{"ports cut off", "45000020 00000000 40110000 0a010002 c6336414 1389", "10.1.0.2:0 > 198.51.100.20:0 protocol 17, 32 bytes"},
		{"header cut off", "45000020 00000000 40110000 0a010002 c63364", ""},
		{"header too short", "44000020 00000000 40110000 0a010002 c6336414", ""},
		{"version 5", "55000020 00000000 40110000 0a010002 c6336414", ""},
		{"nothing", "", ""},
		{"IPv6 UDP", "6b800000 0008 1140" + addresses6 + "13890035", "[2001:db8::1]:5001 > [2001:db8::2]:53 protocol 17, 48 bytes"},
		{"IPv6 UDP after hop-by-hop and routing", "60000000 0020 0040" + addresses6 + "2b00000000000000 1101000000000000 0000000000000000 13890035",
			"[2001:db8::1]:5001 > [2001:db8::2]:53 protocol 17, 72 bytes"},
		{"IPv6 first fragment", "60000000 0010 2c40" + addresses6 + "1100000100000007 13890035", "[2001:db8::1]:5001 > [2001:db8::2]:53 protocol 17, 56 bytes, fragment"},
		{"IPv6 later fragment", "60000000 0010 2c40" + addresses6 + "1100000800000007 13890035", "[2001:db8::1]:0 > [2001:db8::2]:0 protocol 17, 56 bytes, fragment"},
		{"IPv6 extension longer than the bytes", "60000000 0010 0040" + addresses6 + "11ff000000000000", "[2001:db8::1]:0 > [2001:db8::2]:0 protocol 0, 56 bytes"},
		{"IPv6 header cut off", "60000000 0010 1140 20010db8", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p, ok := ParsePacket(unhex(t, test.bytes))
			got := ""
			if ok {
				got = p.String()
			}
			if got != test.want {
				t.Errorf("got  %q\nwant %q", got, test.want)
			}
		})
	}
	p, _ := ParsePacket(unhex(t, tests[0].bytes))
	p6, _ := ParsePacket(unhex(t, tests[10].bytes))
	if p.DSCP != 46 || !p.DontFragment || p6.DSCP != 46 {
		t.Errorf("DSCP %d and %d, don't fragment %v; want 46 twice, and true", p.DSCP, p6.DSCP, p.DontFragment)
	}
}

func FuzzParsePacket(f *testing.F) {
	f.Add(UDPPacket(netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:2"), make([]byte, 32)))
	f.Add(Fragments(UDPPacket(netip.MustParseAddrPort("[fd00::1]:1"), netip.MustParseAddrPort("[fd00::2]:2"), make([]byte, 32)), 16, 1)[1])
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, ok := ParsePacket(b); ok && !p.Source.Addr().IsValid() {
			t.Errorf("a packet without a source: %v", p)
		}
	})
}

// The judge of the packets made here is the kernel that receives them: it takes
// none of a wrong checksum, and puts fragments together.
func TestInjectedPacketsArrive(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	injector, err := l.InjectFromLAN()
	must(t, err)
	defer injector.Close()
	for _, test := range []struct{ name, source, destination string }{
		{"IPv4", "192.0.2.77:1234", ServerAddress + ":" + port}, // spoofed sources
		{"IPv6", "[2001:db8:bad::1]:1234", "[" + ServerAddress6 + "]:" + port},
	} {
		t.Run(test.name, func(t *testing.T) {
			sink, err := l.Server.ListenPacket("udp", test.destination)
			must(t, err)
			defer sink.Close()
			payload := bytes.Repeat([]byte("odd"), 1001)
			packet := UDPPacket(netip.MustParseAddrPort(test.source), netip.MustParseAddrPort(test.destination), payload)
			must(t, injector.Send([]byte{packet[0], 1, 2})) // malformed: nobody minds
			small := UDPPacket(netip.MustParseAddrPort(test.source), netip.MustParseAddrPort(test.destination), []byte("small"))
			for _, p := range append([][]byte{small}, Fragments(packet, 1000, 7)...) {
				must(t, injector.Send(p))
			}
			buffer := make([]byte, 1<<16)
			must(t, sink.SetReadDeadline(time.Now().Add(5*time.Second)))
			for _, want := range [][]byte{[]byte("small"), payload} {
				n, from, err := sink.ReadFrom(buffer)
				must(t, err)
				if !bytes.Equal(buffer[:n], want) || from.String() != test.source {
					t.Errorf("%d bytes from %v, want %d from %s", n, from, len(want), test.source)
				}
			}
		})
	}
}

func TestFragmentFloodSendsFirstFragmentsOnly(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	injector, err := l.InjectFromLAN()
	must(t, err)
	defer injector.Close()
	const count = 500
	capture, err := l.Router.Capture("lan0", func(f Frame) bool { return f.Fragment && f.Destination.Port() == 9 })
	must(t, err)
	must(t, injector.FragmentFlood(netip.MustParseAddrPort(LANAddress+":9"), netip.MustParseAddrPort(ServerAddress+":9"), count))
	eventually(t, 5*time.Second, func() string {
		if link := linkStatistics(t, l.Router, "lan0"); link.RxPackets < count {
			return "the flood has not arrived"
		}
		return ""
	})
	seen, err := capture.Stop()
	must(t, err)
	if seen.Matched != count {
		t.Errorf("%d first fragments of %d", seen.Matched, count)
	}
	if injector.FragmentFlood(netip.AddrPort{}, netip.AddrPort{}, 1<<30) == nil {
		t.Error("a flood of 2^30 was accepted")
	}
}

func TestCaptureSeesEveryFrame(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 2)})
	echoServer(t, l, ServerAddress+":"+port)
	const datagrams = 300
	outgoing, err := l.Router.Capture("wan1", func(f Frame) bool {
		return f.Outgoing && f.Protocol == unix.IPPROTO_UDP && f.Source.Addr() == netip.MustParseAddr(LANAddress) &&
			f.Destination == netip.MustParseAddrPort(ServerAddress+":"+port)
	})
	must(t, err)
	incoming, err := l.Router.Capture("wan1", func(f Frame) bool { return !f.Outgoing && f.Source.Port() == 7000 })
	must(t, err)
	elsewhere, err := l.Router.Capture("wan2", func(f Frame) bool { return f.Protocol == unix.IPPROTO_UDP }) // the kernel reports multicast groups there
	must(t, err)
	r := probe(t, l, ServerAddress+":"+port, Probe{Rate: 1000, Size: 1000, Duration: datagrams * ms})
	if r.Lost > 0 {
		t.Fatalf("the probe lost %d datagrams", r.Lost)
	}
	for name, c := range map[string]*Capture{"outgoing": outgoing, "incoming": incoming} {
		result, err := c.Stop()
		must(t, err)
		if result.Matched != datagrams || len(result.First) != datagrams || result.Frames < 2*datagrams {
			t.Errorf("%s: %d frames matched and %d kept of %d, want %d", name, result.Matched, len(result.First), result.Frames, datagrams)
		}
		for _, f := range result.First {
			if f.Size != 1028 || f.Length != 1028 || len(f.Data) != snapLength || f.EtherType != unix.ETH_P_IP {
				t.Fatalf("%s: frame of %d bytes, %d kept, EtherType %#x: %v", name, f.Size, len(f.Data), f.EtherType, f.Packet)
			}
		}
	}
	if result, err := elsewhere.Stop(); err != nil || result.Matched > 0 {
		t.Errorf("wan2 carries nothing, and %d frames were seen there: %v: %v", result.Matched, result.First, err)
	}
	if _, err := l.Router.Capture("wan9", nil); err == nil {
		t.Error("a capture on an interface that does not exist")
	}
}

func TestCaptureGoesOnAfterLinkDown(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	echoServer(t, l, ServerAddress+":"+port)
	capture, err := l.Router.Capture("wan1", func(f Frame) bool { return f.Outgoing && f.Protocol == unix.IPPROTO_UDP })
	must(t, err)
	must(t, l.Uplinks[0].Link(false))
	must(t, l.Uplinks[0].Link(true))
	eventually(t, 5*time.Second, func() string {
		if r := probe(t, l, ServerAddress+":"+port, Probe{Rate: 100, Size: 100, Duration: 100 * ms, Wait: 200 * ms}); r.Lost > 0 {
			return "the uplink does not carry yet"
		}
		return ""
	})
	result, err := capture.Stop()
	must(t, err)
	if result.Matched < 10 {
		t.Errorf("saw %d frames after the link was down, want 10", result.Matched)
	}
}

func TestCaptureThatLosesFramesSaysSo(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	injector, err := l.InjectFromLAN()
	must(t, err)
	defer injector.Close()
	release := make(chan struct{})
	capture, err := l.LAN.Capture("eth0", func(Frame) bool { <-release; return false })
	must(t, err)
	packet := UDPPacket(netip.MustParseAddrPort(LANAddress+":9"), netip.MustParseAddrPort("192.0.2.9:9"), make([]byte, 1400))
	for range 2 * 2 * captureBuffer / len(packet) { // the kernel has doubled it
		must(t, injector.Send(packet))
	}
	close(release)
	if _, err := capture.Stop(); err == nil || !strings.Contains(err.Error(), "dropped") {
		t.Errorf("stopped a capture whose buffer had overflown: %v", err)
	}
}

func TestPing(t *testing.T) {
	const delay = 5 * ms
	l := newLab(t, Config{Uplinks: []Shape{{Delay: delay}}})
	server, server6 := netip.MustParseAddr(ServerAddress), netip.MustParseAddr(ServerAddress6)
	short := func(to netip.Addr, p Ping) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		rtt, err := l.LAN.Ping(ctx, to, p)
		if err == nil {
			if rtt < 2*delay {
				t.Errorf("round trip of %v over %v twice", rtt, delay)
			}
			return "reply"
		}
		return err.Error()[strings.Index(err.Error(), "bytes: ")+len("bytes: "):]
	}
	must(t, l.Uplinks[0].SetMTU(1280))
	tests := []struct {
		name string
		to   netip.Addr
		ping Ping
		want string
	}{
		{"IPv4", server, Ping{}, "reply"},
		{"IPv6", server6, Ping{Size: 1}, "reply"},
		{"as large as the MTU", server, Ping{Size: 1252, DontFragment: true}, "reply"},
		{"IPv6, as large as the MTU", server6, Ping{Size: 1232, DontFragment: true}, "reply"},
		{"too big", server, Ping{Size: 1253, DontFragment: true}, "ICMP type 3 code 4 from 192.168.77.1, MTU 1280"},
		{"IPv6, too big", server6, Ping{Size: 1233, DontFragment: true}, "ICMP type 2 code 0 from fd77::1, MTU 1280"},
		{"too big, in fragments", server, Ping{Size: 4000}, "reply"},
		{"too big for the own interface", server, Ping{Size: 2000, DontFragment: true}, "write ip4 0.0.0.0->198.51.100.20: sendto: message too long"},
		{"no route", netip.MustParseAddr("192.0.2.1"), Ping{}, "ICMP type 3 code 0 from 10.1.0.1"},
		{"IPv6, no route", netip.MustParseAddr("2001:db8:ffff::1"), Ping{}, "ICMP type 1 code 0 from 2001:db8:1::1"},
		{"nobody answers", netip.MustParseAddr("198.51.100.99"), Ping{Timeout: 50 * ms}, "no reply within 50ms"},
		{"impossible size", server, Ping{Size: 1 << 20}, "the size must be 0 to 65507"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if got := short(test.to, test.ping); got != test.want {
				t.Errorf("got  %q\nwant %q", got, test.want)
			}
		})
	}
	eventually(t, 5*time.Second, func() string { // by IPv6 both ends must learn the MTU before they cut to it
		if got := short(server6, Ping{Size: 4000, Timeout: 200 * ms}); got != "reply" {
			return got
		}
		return ""
	})
	if err := l.Uplinks[0].SetMTU(576); err == nil || !strings.Contains(err.Error(), "1280 to 1500") {
		t.Errorf("MTU 576: %v", err)
	}
	must(t, l.Uplinks[0].SetMTU(1500))
	if got := short(server, Ping{Size: 1472, DontFragment: true}); got != "reply" {
		t.Errorf("back at MTU 1500: %s", got)
	}
}
