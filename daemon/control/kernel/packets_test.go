package kernel

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
)

// peer is the far end of a TUN in the calling thread's namespace: it notes every
// packet that goes in, and answers UDP with the same payload.
type peer struct {
	file *os.File
	mu   sync.Mutex
	seen []packet
	mute bool // answers nothing
}

// packet is what is looked at of one.
type packet struct {
	protocol         uint8
	source, target   netip.AddrPort
	dscp             uint8
	mss              uint16 // of a SYN, 0 for others
	payload          string // of UDP
	transportIsThere bool
}

func newTUN(t *testing.T, name string) *peer {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	must(t, err)
	request, err := unix.NewIfreq(name)
	must(t, err)
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	must(t, unix.IoctlIfreq(fd, unix.TUNSETIFF, request))
	p := &peer{file: os.NewFile(uintptr(fd), "/dev/net/tun")}
	t.Cleanup(func() { p.file.Close() })
	go func() {
		buffer := make([]byte, 2000)
		for {
			n, err := p.file.Read(buffer)
			if err != nil {
				return
			}
			p.receive(buffer[:n])
		}
	}()
	return p
}

func (p *peer) receive(raw []byte) {
	parsed := parsePacket(raw)
	if !parsed.transportIsThere {
		return // neighbour discovery and the like
	}
	p.mu.Lock()
	p.seen = append(p.seen, parsed)
	mute := p.mute
	p.mu.Unlock()
	if parsed.protocol == unix.IPPROTO_UDP && !mute {
		answer(raw)
		p.file.Write(raw)
	}
}

// answer turns a UDP packet round. Its checksums stay right: they are sums.
func answer(raw []byte) {
	swap := func(a, b, length int) {
		for i := range length {
			raw[a+i], raw[b+i] = raw[b+i], raw[a+i]
		}
	}
	if raw[0]>>4 == 4 {
		swap(12, 16, 4)
		swap(20, 22, 2)
	} else {
		swap(8, 24, 16)
		swap(40, 42, 2)
	}
}

func parsePacket(raw []byte) (p packet) {
	header := 20
	var source, target netip.Addr
	if raw[0]>>4 == 4 {
		p.protocol, p.dscp = raw[9], raw[1]>>2
		source, _ = netip.AddrFromSlice(raw[12:16])
		target, _ = netip.AddrFromSlice(raw[16:20])
	} else {
		header = 40
		p.protocol, p.dscp = raw[6], uint8(binary.BigEndian.Uint16(raw)>>6&0x3f)
		source, _ = netip.AddrFromSlice(raw[8:24])
		target, _ = netip.AddrFromSlice(raw[24:40])
	}
	if p.protocol != unix.IPPROTO_UDP && p.protocol != unix.IPPROTO_TCP {
		return p
	}
	transport := raw[header:]
	p.transportIsThere = true
	p.source = netip.AddrPortFrom(source, binary.BigEndian.Uint16(transport))
	p.target = netip.AddrPortFrom(target, binary.BigEndian.Uint16(transport[2:]))
	if p.protocol == unix.IPPROTO_UDP {
		p.payload = string(transport[8:])
		return p
	}
	for options := transport[20 : transport[12]>>4*4]; len(options) > 1; {
		switch {
		case options[0] == 2:
			p.mss = binary.BigEndian.Uint16(options[2:])
			return p
		case options[0] == 1:
			options = options[1:]
		default:
			options = options[options[1]:]
		}
	}
	return p
}

// udp makes a UDP packet.
func udp(source, target, payload string) []byte {
	from, to := netip.MustParseAddrPort(source), netip.MustParseAddrPort(target)
	transport := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(transport, from.Port())
	binary.BigEndian.PutUint16(transport[2:], to.Port())
	binary.BigEndian.PutUint16(transport[4:], uint16(8+len(payload)))
	transport = append(transport, payload...)
	var raw []byte
	pseudo := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, unix.IPPROTO_UDP}, transport[4:6])
	binary.BigEndian.PutUint16(transport[6:], checksum(slices.Concat(pseudo, transport)))
	if from.Addr().Is4() {
		raw = make([]byte, 20)
		raw[0], raw[8], raw[9] = 0x45, 64, unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(raw[2:], uint16(20+len(transport)))
		copy(raw[12:], from.Addr().AsSlice())
		copy(raw[16:], to.Addr().AsSlice())
		binary.BigEndian.PutUint16(raw[10:], checksum(raw))
	} else {
		raw = make([]byte, 40)
		raw[0], raw[6], raw[7] = 0x60, unix.IPPROTO_UDP, 64
		binary.BigEndian.PutUint16(raw[4:], uint16(len(transport)))
		copy(raw[8:], from.Addr().AsSlice())
		copy(raw[24:], to.Addr().AsSlice())
	}
	return append(raw, transport...)
}

// syn makes a TCP SYN over IPv4 with a maximum segment size.
func syn(source, target string, mss uint16) []byte {
	from, to := netip.MustParseAddrPort(source), netip.MustParseAddrPort(target)
	raw := make([]byte, 44)
	raw[0], raw[3], raw[8], raw[9] = 0x45, byte(len(raw)), 64, unix.IPPROTO_TCP
	copy(raw[12:], from.Addr().AsSlice())
	copy(raw[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(raw[10:], checksum(raw[:20]))
	transport := raw[20:]
	binary.BigEndian.PutUint16(transport, from.Port())
	binary.BigEndian.PutUint16(transport[2:], to.Port())
	transport[12], transport[13], transport[14] = 6<<4, 0x02, 0xff
	transport[20], transport[21] = 2, 4
	binary.BigEndian.PutUint16(transport[22:], mss)
	pseudo := slices.Concat(raw[12:20], []byte{0, unix.IPPROTO_TCP, 0, 24})
	binary.BigEndian.PutUint16(transport[16:], checksum(slices.Concat(pseudo, transport)))
	return raw
}

// capture returns the next IPv4 TCP packet that an interface of a host receives.
func (h *host) capture(t *testing.T, name string) func() packet {
	t.Helper()
	var fd int
	h.do(t, func() (err error) {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		bigEndian := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(bigEndian)); err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		return errors.Join(
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian, Ifindex: link.Attrs().Index}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}),
		)
	})
	return func() packet {
		buffer := make([]byte, 2000)
		for {
			n, from, err := unix.Recvfrom(fd, buffer, 0)
			must(t, err)
			outgoing := from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING
			if p := parsePacket(buffer[:n]); p.protocol == unix.IPPROTO_TCP && !outgoing {
				return p
			}
		}
	}
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i, c := range b {
		sum += uint32(c) << (8 * (1 - i%2))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// send puts a UDP packet into the namespace as if the tunnel had brought it.
func (p *peer) send(t *testing.T, source, target, payload string) {
	t.Helper()
	_, err := p.file.Write(udp(source, target, payload))
	must(t, err)
}

// find waits for a packet.
func (p *peer) find(t *testing.T, what string, is func(packet) bool) (found packet) {
	t.Helper()
	eventually(t, what, func() (bool, string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		at := slices.IndexFunc(p.seen, is)
		if at >= 0 {
			found = p.seen[at]
		}
		return at >= 0, fmt.Sprintf("into the TUN went %+v", p.seen)
	})
	return found
}

// saw says whether a payload has gone into the TUN.
func (p *peer) saw(payload string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.seen, func(s packet) bool { return s.payload == payload })
}

// echo is a UDP server that answers with the same payload and notes where each
// came from.
type echoServer struct {
	mu   sync.Mutex
	from map[string]netip.AddrPort // by payload
}

func (h *host) serveUDP(t *testing.T, addresses ...string) *echoServer {
	t.Helper()
	var s *echoServer
	h.do(t, func() error { s = serveUDP(t, addresses...); return nil })
	return s
}

func serveUDP(t *testing.T, addresses ...string) *echoServer {
	t.Helper()
	s := &echoServer{from: map[string]netip.AddrPort{}}
	for _, address := range addresses {
		conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
		must(t, err)
		t.Cleanup(func() { conn.Close() })
		go func() {
			buffer := make([]byte, 2000)
			for {
				n, from, err := conn.ReadFromUDPAddrPort(buffer)
				if err != nil {
					return
				}
				s.mu.Lock()
				s.from[string(buffer[:n])] = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
				s.mu.Unlock()
				conn.WriteToUDPAddrPort(buffer[:n], from)
			}
		}()
	}
	return s
}

// source is where a payload came from, if it came.
func (s *echoServer) source(payload string) netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.from[payload]
}

// open opens a UDP socket in a host towards an address.
func (h *host) open(t *testing.T, to string) (conn *net.UDPConn) {
	t.Helper()
	h.do(t, func() error {
		c, err := net.Dial("udp", to)
		if err != nil {
			return err
		}
		conn = c.(*net.UDPConn)
		t.Cleanup(func() { conn.Close() })
		raw, err := conn.SyscallConn()
		if err != nil {
			return err
		}
		// Else the socket keeps to itself what ICMP tells it.
		return errors.Join(raw.Control(func(fd uintptr) {
			if to[0] == '[' {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1)
			}
		}), err)
	})
	return conn
}

// ask sends a payload once and says what came of it: "answered", "unreachable"
// or "no answer".
func ask(c net.Conn, payload string) string {
	c.SetDeadline(time.Now().Add(300 * time.Millisecond))
	if _, err := c.Write([]byte(payload)); err != nil {
		return outcome(err)
	}
	buffer := make([]byte, 2000)
	for {
		n, err := c.Read(buffer)
		if err != nil {
			return outcome(err)
		}
		if string(buffer[:n]) == payload {
			return "answered"
		}
	}
}

func outcome(err error) string {
	switch {
	case errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EACCES):
		return "unreachable"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "no answer"
	}
	return err.Error()
}

// askUntil repeats ask until it is answered: a switch of the way may cost a
// packet, and neighbours have to be found.
func askUntil(t *testing.T, c net.Conn, payload, want string) {
	t.Helper()
	eventually(t, payload, func() (bool, string) {
		got := ask(c, payload)
		return got == want, got + ", want " + want
	})
}

// packetLAN is a LAN whose router has an uplink to a cloud, where a server
// echoes on 203.0.113.7 and 2001:db8:99::7, port 4000.
type packetLAN struct {
	*lan
	settings settings.Settings
	server   *echoServer
}

func newPacketLAN(t *testing.T, whenDown settings.Fallback) *packetLAN {
	t.Helper()
	l := &packetLAN{lan: newLAN(t), settings: lanSettings("lan0", "lan1")}
	must(t, addDefault("wan1", "10.1.0.1", 0))
	must(t, addDefault("wan1", "2001:db8:1::1", 0))
	l.cloud.do(t, func() error { return upErr("lo", "203.0.113.7/32", "2001:db8:99::7/128") })
	// The kernel counts an unreachable destination twice against its limit, and
	// then tells a client only of some.
	must(t, writeSysctl("net/ipv4/icmp_ratelimit", "0"))
	must(t, writeSysctl("net/ipv6/icmp/ratelimit", "0"))
	l.server = l.cloud.serveUDP(t, "203.0.113.7:4000", "[2001:db8:99::7]:4000")
	l.settings.Uplinks = []settings.Uplink{{Name: "dsl", Interface: "wan1", Mode: settings.On}}
	l.settings.WhenTunnelDown = whenDown
	return l
}

func (l *packetLAN) apply(t *testing.T) {
	t.Helper()
	apply(t, l.kernel, compile(t, l.settings))
}

// TestTunnelDownAndUp: a client's UDP flow goes out of the uplink while the
// tunnel is down, through it when it is up, and back again, by the same socket;
// every time with the address that belongs there.
func TestTunnelDownAndUp(t *testing.T) {
	l := newPacketLAN(t, settings.Direct)
	l.apply(t)
	flows := map[string]struct{ outside, inside string }{
		"203.0.113.7:4000":      {"10.1.0.2", "10.83.0.2"},
		"[2001:db8:99::7]:4000": {"2001:db8:1::2", "fd83:0:0:1::1"},
	}
	sockets := map[string]*net.UDPConn{}
	for to, addresses := range flows {
		sockets[to] = l.client.open(t, to)
		askUntil(t, sockets[to], "direct "+to, "answered")
		if from := l.server.source("direct " + to); from.Addr().String() != addresses.outside {
			t.Errorf("%s: the server saw %s, want %s", to, from, addresses.outside)
		}
	}

	p := newTUN(t, desired.TunnelName)
	l.apply(t)
	for to, addresses := range flows {
		askUntil(t, sockets[to], "tunnel "+to, "answered")
		seen := p.find(t, to, func(s packet) bool { return s.payload == "tunnel "+to })
		if seen.source.Addr().String() != addresses.inside || seen.target.String() != to {
			t.Errorf("into the tunnel went %+v, want from %s", seen, addresses.inside)
		}
		if from := l.server.source("tunnel " + to); from.IsValid() {
			t.Errorf("a packet for the tunnel left by the uplink, from %s", from)
		}
	}

	// A daemon that is killed takes its TUN along. The barrier holds whatever
	// the operator chose, until there is a daemon again.
	must(t, p.file.Close())
	eventually(t, "TUN", func() (bool, string) {
		_, err := netlink.LinkByName(desired.TunnelName)
		return err != nil, "still there"
	})
	for to := range flows {
		askUntil(t, sockets[to], "killed "+to, "unreachable")
		if from := l.server.source("killed " + to); from.IsValid() {
			t.Errorf("without a daemon a packet left by the uplink, from %s", from)
		}
	}
	l.apply(t)
	for to, addresses := range flows {
		askUntil(t, sockets[to], "again "+to, "answered")
		if from := l.server.source("again " + to); from.Addr().String() != addresses.outside {
			t.Errorf("%s: the server saw %s, want %s", to, from, addresses.outside)
		}
	}

	// Nothing stays after a clean stop.
	must(t, l.kernel.CleanTo(ctx, desired.Barrier(l.settings, nil)))
	if have := read(t, l.kernel); len(have.Rules)+len(have.Routes)+len(have.Table.Name) > 0 {
		t.Errorf("left: %+v", have)
	}
}

// TestBlock: with when_tunnel_down block nothing of the LAN leaves by the uplink,
// while the daemon waits for the tunnel, after it was killed, and after it was
// stopped; only cleanup ends that.
func TestBlock(t *testing.T) {
	l := newPacketLAN(t, settings.Block)
	l.apply(t)
	// All else would let it pass, there and back.
	must(t, writeSysctl("net/ipv4/conf/all/forwarding", "1"))
	l.cloud.do(t, func() error {
		return errors.Join(addRoute("192.168.0.0/16", "10.1.0.2"), addRoute("fd00::/8", "2001:db8:1::2"))
	})
	sockets := map[string]*net.UDPConn{}
	for _, to := range []string{"203.0.113.7:4000", "[2001:db8:99::7]:4000"} {
		sockets[to] = l.client.open(t, to)
	}
	blocked := func(when string) {
		t.Helper()
		for to, socket := range sockets {
			askUntil(t, socket, when+" "+to, "unreachable")
			if from := l.server.source(when + " " + to); from.IsValid() {
				t.Errorf("%s: a packet left by the uplink, from %s", when, from)
			}
		}
	}
	blocked("before the tunnel is up")

	p := newTUN(t, desired.TunnelName)
	l.apply(t)
	for to, socket := range sockets {
		askUntil(t, socket, "tunnel "+to, "answered")
	}
	must(t, p.file.Close())
	blocked("after the daemon was killed")

	barrier := desired.Barrier(l.settings, []netip.Prefix{netip.MustParsePrefix("192.168.1.0/24"), netip.MustParsePrefix("192.168.2.0/24")})
	must(t, l.kernel.CleanTo(ctx, barrier))
	if left := desired.Diff(read(t, l.kernel), barrier); len(left) > 0 {
		t.Errorf("after a clean stop there is left%s", text(left))
	}
	blocked("after a clean stop")
	// The LAN itself is not blocked.
	printer := l.printer.serveUDP(t, "192.168.2.2:6000")
	askUntil(t, l.client.open(t, "192.168.2.2:6000"), "to the printer", "answered")
	if !printer.source("to the printer").IsValid() {
		t.Error("somebody else answered for the printer")
	}

	must(t, l.kernel.Clean(ctx))
	for to, socket := range sockets {
		askUntil(t, socket, "after cleanup "+to, "answered")
	}
}

func addRoute(destination, gateway string) error {
	return netlink.RouteReplace(&netlink.Route{Dst: cidr(destination), Gw: net.ParseIP(gateway)})
}

// TestLANThroughTunnel: names are asked for behind the tunnel, classes are
// written into packets, and TCP fits.
func TestLANThroughTunnel(t *testing.T) {
	l := newPacketLAN(t, settings.Block)
	p := newTUN(t, desired.TunnelName)
	forty := 40
	l.settings.Classes = []settings.ClassRule{
		{Class: settings.ClassInteractive, Address: netip.MustParsePrefix("192.168.1.2/32"), Ports: settings.PortRange{First: 5000, Last: 5010}},
		{Class: settings.ClassBulk, Address: netip.MustParsePrefix("192.168.1.0/24"), Protocol: settings.ProtocolUDP},
		{Class: settings.ClassInteractive, Address: netip.MustParsePrefix("fd00:1::/64"), Ports: settings.PortRange{First: 5000, Last: 5000}},
		{Class: settings.ClassBulk, Address: netip.MustParsePrefix("fd00:1::2/128")},
		{Class: settings.ClassBulk, DSCP: &forty, Address: netip.MustParsePrefix("192.168.2.2/32")},
	}
	l.apply(t)

	for router, names := range map[string]string{
		"192.168.1.1:53": "10.83.0.1:53", "10.1.0.2:53": "10.83.0.1:53", "[fd00:1::1]:53": "[fd83::1]:53",
	} {
		askUntil(t, l.client.open(t, router), "query "+router, "answered")
		seen := p.find(t, router, func(s packet) bool { return s.payload == "query "+router })
		if seen.target.String() != names {
			t.Errorf("a query to %s went to %s, want %s", router, seen.target, names)
		}
	}

	for _, test := range []struct {
		from *host
		to   string
		want uint8
	}{
		{l.client, "203.0.113.7:5000", 46},
		{l.client, "203.0.113.7:5010", 46},
		{l.client, "203.0.113.7:5011", 1},
		{l.client, "[2001:db8:99::7]:5000", 46},
		{l.client, "[2001:db8:99::7]:5001", 1},
		{l.printer, "203.0.113.7:5000", 0},
		{l.printer, "[2001:db8:99::7]:5000", 0},
	} {
		askUntil(t, test.from.open(t, test.to), "class "+test.to, "answered")
		seen := p.find(t, test.to, func(s packet) bool { return s.payload == "class "+test.to })
		if seen.dscp != test.want {
			t.Errorf("%s: code point %d, want %d", test.to, seen.dscp, test.want)
		}
		p.mu.Lock()
		p.seen = nil
		p.mu.Unlock()
	}

	// TCP to the router's port 53 is the only one that is not diverted.
	l.client.timeout = 200 * time.Millisecond
	for router, mss := range map[string]uint16{"192.168.1.1:53": 1340, "[fd00:1::1]:53": 1320} {
		l.client.dial(router)
		seen := p.find(t, router, func(s packet) bool {
			return s.protocol == unix.IPPROTO_TCP && s.target.Addr().Is6() == strings.HasPrefix(router, "[")
		})
		if seen.mss != mss || seen.target.Port() != 53 {
			t.Errorf("a SYN to %s became %+v, want a maximum segment size of %d", router, seen, mss)
		}
	}
}

// TestUDPForward: what comes for a forwarded port reaches the host in the LAN,
// with the address that the operator chose, and the answer goes back.
func TestUDPForward(t *testing.T) {
	l := newPacketLAN(t, settings.Block)
	p := newTUN(t, desired.TunnelName)
	p.mute = true
	l.settings.Forwards = []settings.Forward{
		{Name: "sip", Protocol: "udp", Port: 5060, To: netip.MustParseAddrPort("192.168.1.2:6000"), Source: settings.SourceClient},
		{Name: "game", Protocol: "udp", Port: 5061, To: netip.MustParseAddrPort("192.168.1.2:6000"), Source: settings.SourceRouter},
		{Name: "six", Protocol: "udp", Port: 5062, To: netip.MustParseAddrPort("[fd00:1::2]:6000"), Source: settings.SourceClient},
	}
	l.apply(t)
	server := l.client.serveUDP(t, "192.168.1.2:6000", "[fd00:1::2]:6000")
	for _, test := range []struct{ from, to, want string }{
		{"198.51.100.9:777", "10.83.0.2:5060", "198.51.100.9"},
		{"198.51.100.9:777", "10.83.0.2:5061", "192.168.1.1"},
		{"[2001:db8:5::9]:777", "[fd83:0:0:1::1]:5062", "2001:db8:5::9"},
	} {
		payload := "inbound " + test.to
		eventually(t, payload, func() (bool, string) {
			p.send(t, test.from, test.to, payload)
			time.Sleep(20 * time.Millisecond)
			return p.saw(payload), "not answered"
		})
		if from := server.source(payload); from.Addr().String() != test.want {
			t.Errorf("%s: the LAN host saw %s, want %s", test.to, from, test.want)
		}
		seen := p.find(t, payload, func(s packet) bool { return s.payload == payload })
		if seen.source.String() != test.to || seen.target.String() != test.from {
			t.Errorf("the answer was %+v, want from %s to %s", seen, test.to, test.from)
		}
	}
}

// TestNoWayIn: the tunnel reaches neither the uplinks' networks nor a host of
// the LAN nor the router unasked, and an uplink reaches neither the LAN nor the
// tunnel.
func TestNoWayIn(t *testing.T) {
	l := newPacketLAN(t, settings.Direct)
	p := newTUN(t, desired.TunnelName)
	p.mute = true
	l.apply(t)
	client := l.client.serveUDP(t, "192.168.1.2:6000", "[fd00:1::2]:6000")
	router := serveUDP(t, "10.83.0.2:7000", "[fd83:0:0:1::1]:7000")
	l.cloud.do(t, func() error {
		return errors.Join(addRoute("192.168.0.0/16", "10.1.0.2"), addRoute("fd00::/8", "2001:db8:1::2"))
	})

	// That these would arrive but for the table: another one that lets through
	// the same packets is not there, so take ours away for a moment.
	table := read(t, l.kernel).Table
	must(t, l.kernel.deleteTable(table.Name))
	eventually(t, "without the table", func() (bool, string) {
		p.send(t, "198.51.100.9:1", "203.0.113.7:4000", "open cloud")
		p.send(t, "198.51.100.9:1", "192.168.1.2:6000", "open client")
		p.send(t, "198.51.100.9:1", "10.83.0.2:7000", "open router")
		ask(l.cloud.open(t, "192.168.1.2:6000"), "open from cloud")
		return l.server.source("open cloud").IsValid() && client.source("open client").IsValid() &&
			router.source("open router").IsValid() && client.source("open from cloud").IsValid(), "not everything passes"
	})
	l.apply(t)
	for range 3 {
		p.send(t, "198.51.100.9:2", "203.0.113.7:4000", "cloud")
		p.send(t, "198.51.100.9:2", "192.168.1.2:6000", "client")
		p.send(t, "198.51.100.9:2", "10.83.0.2:7000", "router")
		p.send(t, "[2001:db8:5::9]:2", "[fd00:1::2]:6000", "client6")
		p.send(t, "[2001:db8:5::9]:2", "[fd83:0:0:1::1]:7000", "router6")
	}
	for _, to := range []string{"192.168.1.2:6000", "[fd00:1::2]:6000"} {
		ask(l.cloud.open(t, to), "from cloud")
	}
	for _, payload := range []string{"cloud", "client", "router", "client6", "router6", "from cloud"} {
		for name, server := range map[string]*echoServer{"cloud": l.server, "client": client, "router": router} {
			if from := server.source(payload); from.IsValid() {
				t.Errorf("%q reached the %s, from %s", payload, name, from)
			}
		}
	}
}

// TestConcentrator sends packets of two routers through the concentrator's table.
func TestConcentrator(t *testing.T) {
	enter(t)
	cloud := newHost(t)
	connect(t, "eth0", []string{"10.1.0.2/24", "2001:db8:1::2/64"}, cloud, "eth0", []string{"10.1.0.1/24", "2001:db8:1::1/64"})
	server := cloud.serveUDP(t, "10.1.0.1:4000", "[2001:db8:1::1]:4000")
	own := serveUDP(t, "[::]:53") // of IPv4 as well
	other := serveUDP(t, "[::]:7000")
	p := newTUN(t, desired.ConcentratorTunnelName)
	p.mute = true
	link, err := netlink.LinkByName(desired.ConcentratorTunnelName)
	must(t, err)
	k, err := NewConcentrator()
	must(t, err)
	defer k.Close()
	c := desired.Concentrator{
		Device:   desired.Interface{Index: link.Attrs().Index, Name: desired.ConcentratorTunnelName},
		Network4: netip.MustParsePrefix("10.83.0.0/16"), Gateway4: netip.MustParseAddr("10.83.0.1"),
		Network6: netip.MustParsePrefix("fd83::/48"), Gateway6: netip.MustParseAddr("fd83::1"),
		UDPForwards: []desired.UDPForward{
			{Port: 5060, To: netip.MustParseAddrPort("10.83.0.2:5060")},
			{Port: 5060, To: netip.MustParseAddrPort("[fd83:0:0:1::1]:5060")},
		},
	}
	apply(t, k, desired.CompileConcentrator(c))
	if have := read(t, k); have.Sysctls[desired.Forwarding4].Value != "1" || have.Sysctls[desired.Forwarding6].Value != "1" ||
		have.Sysctls["ipv6/conf/eth0/accept_ra"].Value != "2" || have.MPTCP.Limits.Subflows == 0 {
		t.Errorf("the kernel holds %+v", have)
	}

	// Out: masqueraded, and the answer comes back to the router.
	for from, to := range map[string]string{"10.83.0.2:1": "10.1.0.1:4000", "[fd83:0:0:1::1]:1": "[2001:db8:1::1]:4000"} {
		payload := "out " + from
		eventually(t, payload, func() (bool, string) {
			p.send(t, from, to, payload)
			time.Sleep(20 * time.Millisecond)
			return p.saw(payload), "not answered"
		})
		seen := p.find(t, payload, func(s packet) bool { return s.payload == payload })
		if seen.target.String() != from || seen.source.String() != to {
			t.Errorf("the answer was %+v", seen)
		}
		if at := server.source(payload).Addr().String(); at != "10.1.0.2" && at != "2001:db8:1::2" {
			t.Errorf("the cloud saw %s", at)
		}
	}

	// In: a forwarded port.
	for vm, router := range map[string]string{"10.1.0.2:5060": "10.83.0.2:5060", "[2001:db8:1::2]:5060": "[fd83:0:0:1::1]:5060"} {
		payload := "forward " + vm
		socket := cloud.open(t, vm)
		ask(socket, payload)
		seen := p.find(t, payload, func(s packet) bool { return s.payload == payload })
		if seen.target.String() != router || seen.source.String() != socket.LocalAddr().String() {
			t.Errorf("the forwarded packet was %+v", seen)
		}
	}

	// What the VM itself answers: names on its inner address.
	for from, to := range map[string]string{"10.83.0.2:2": "10.83.0.1:53", "[fd83:0:0:1::1]:2": "[fd83::1]:53"} {
		payload := "query " + to
		p.send(t, from, to, payload)
		p.find(t, payload, func(s packet) bool { return s.payload == payload && s.target.String() == from })
		if !own.source(payload).IsValid() {
			t.Errorf("%s did not arrive", payload)
		}
	}

	// TCP fits through the TUN, though neither end knows of it.
	cloud.do(t, func() error {
		serve(t, func() (net.Listener, error) { return net.Listen("tcp", "10.1.0.1:80") }, "cloud ")
		return nil
	})
	next := cloud.capture(t, "eth0")
	_, err = p.file.Write(syn("10.83.0.2:9", "10.1.0.1:80", 1460))
	must(t, err)
	if seen := next(); seen.mss != 1340 || seen.source.Addr().String() != "10.1.0.2" {
		t.Errorf("the cloud received %+v, want a maximum segment size of 1340", seen)
	}
	answered := p.find(t, "SYN-ACK", func(s packet) bool { return s.protocol == unix.IPPROTO_TCP && s.target.String() == "10.83.0.2:9" })
	if answered.mss != 1340 {
		t.Errorf("the router received %+v, want a maximum segment size of 1340", answered)
	}

	// And what goes nowhere. Each has a twin that the same path lets through
	// above or below.
	cloud.do(t, func() error {
		return errors.Join(addRoute("10.83.0.0/16", "10.1.0.2"), addRoute("fd83::/48", "2001:db8:1::2"), upErr("lo", "10.83.9.9/32"))
	})
	p.send(t, "10.83.0.2:3", "10.83.0.3:4000", "another router")
	p.send(t, "[fd83:0:0:1::1]:3", "[fd83:0:0:2::1]:4000", "another router")
	p.send(t, "10.99.0.2:3", "10.1.0.1:4000", "not an inner address")
	p.send(t, "[fd99::1]:3", "[2001:db8:1::1]:4000", "not an inner address")
	p.send(t, "10.83.0.2:3", "10.83.0.1:7000", "another port of the concentrator")
	p.send(t, "10.83.0.2:3", "10.1.0.2:7000", "another port of the VM")
	p.send(t, "10.83.0.2:3", "10.1.0.2:53", "names at another address")
	for _, to := range []string{"10.83.0.2:4000", "[fd83:0:0:1::1]:4000"} {
		ask(cloud.open(t, to), "unasked")
	}
	cloud.do(t, func() error {
		c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 83, 9, 9)}, &net.UDPAddr{IP: net.IPv4(10, 1, 0, 2), Port: 7000})
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("an inner address from outside"))
		return err
	})
	for _, payload := range []string{
		"another router", "not an inner address", "another port of the concentrator", "another port of the VM",
		"names at another address", "unasked", "an inner address from outside",
	} {
		if server.source(payload).IsValid() || own.source(payload).IsValid() || other.source(payload).IsValid() || p.saw(payload) {
			t.Errorf("%s passed", payload)
		}
	}

	// Unless the operator lets routers reach one another.
	c.ConnectRouters = true
	apply(t, k, desired.CompileConcentrator(c))
	p.send(t, "10.83.0.2:3", "10.83.0.3:4000", "now another router")
	p.send(t, "[fd83:0:0:1::1]:3", "[fd83:0:0:2::1]:4000", "now another router, IPv6")
	for _, payload := range []string{"now another router", "now another router, IPv6"} {
		p.find(t, payload, func(s packet) bool { return s.payload == payload })
	}

	must(t, k.Clean(ctx))
	if have := read(t, k); have.Table.Name != "" {
		t.Errorf("left: %+v", have)
	}
}

// TestBothOnOneMachine: a router and a concentrator leave each other's alone.
func TestBothOnOneMachine(t *testing.T) {
	s := router(t)
	newTUN(t, desired.TunnelName)
	newTUN(t, desired.ConcentratorTunnelName)
	link, err := netlink.LinkByName(desired.ConcentratorTunnelName)
	must(t, err)
	router := open(t)
	concentrator, err := NewConcentrator()
	must(t, err)
	defer concentrator.Close()
	wanted := desired.CompileConcentrator(desired.Concentrator{
		Device:   desired.Interface{Index: link.Attrs().Index, Name: desired.ConcentratorTunnelName},
		Network4: netip.MustParsePrefix("10.83.0.0/16"), Gateway4: netip.MustParseAddr("10.83.0.1"),
	})
	apply(t, router, compile(t, s))
	apply(t, concentrator, wanted)
	if left := desired.Diff(read(t, router), compile(t, s)); len(left) > 0 {
		t.Errorf("the concentrator changed what the router reads:%s", text(left))
	}
	must(t, concentrator.Clean(ctx))
	if left := desired.Diff(read(t, router), compile(t, s)); len(left) > 0 {
		t.Errorf("the concentrator's cleanup changed what the router reads:%s", text(left))
	}
	apply(t, concentrator, wanted)
	must(t, router.Clean(ctx))
	if left := desired.Diff(read(t, concentrator), wanted); len(left) > 0 {
		t.Errorf("the router's cleanup changed what the concentrator reads:%s", text(left))
	}
}

// TestExpressionsVersion: whoever changes the expressions that a statement
// becomes raises desired's expressionsVersion, so that a table of the version
// before is replaced; then the new digest goes here.
func TestExpressionsVersion(t *testing.T) {
	p4, p6 := netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::1/128")
	to4, to6 := netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("[::1]:1")
	var b strings.Builder
	for _, s := range []desired.Statement{
		desired.MatchInput{Interfaces: []string{"a"}}, desired.MatchInput{Interfaces: []string{"a", "b"}, Not: true},
		desired.MatchOutput{Interfaces: []string{"a"}, Not: true}, desired.MatchRoute{Interfaces: []string{"a", "b"}},
		desired.MatchFamily{}, desired.MatchFamily{IPv6: true}, desired.MatchProtocol{Number: 6}, desired.MatchProtocol{Number: 6, Not: true},
		desired.MatchSource{Prefix: p4}, desired.MatchSource{Prefix: p6, Not: true}, desired.MatchDestination{Prefix: p4}, desired.MatchDestination{Prefix: p6},
		desired.MatchPort{First: 1, Last: 1}, desired.MatchPort{Source: true, First: 1, Last: 2},
		desired.MatchAddressType{Type: "local"}, desired.MatchMark{Mark: 1, Mask: 3}, desired.MatchConnection{States: desired.Invalid | desired.NewlyOpened},
		desired.MatchTranslated{}, desired.MatchTranslated{Not: true}, desired.MatchICMP{Type: 8}, desired.MatchICMP{IPv6: true, Type: 128},
		desired.MatchDSCP{Codepoint: 46}, desired.MatchDSCP{IPv6: true, Codepoint: 46}, desired.MatchSYN{},
		desired.SetMark{Mark: 1, Mask: 3}, desired.SetDSCP{Codepoint: 46}, desired.SetDSCP{IPv6: true, Codepoint: 46},
		desired.SetMSS{}, desired.SetMSS{Bytes: 1360}, desired.TransparentProxy{To: to4}, desired.TransparentProxy{To: to6},
		desired.TranslateDestination{To: to4}, desired.TranslateDestination{To: to6}, desired.Masquerade{},
		desired.Accept, desired.Drop, desired.Return,
	} {
		c, err := compileRule([]desired.Statement{s})
		must(t, err)
		fmt.Fprintf(&b, "%s:\n", s)
		for _, e := range c.expressions {
			fmt.Fprintf(&b, "  %T%+v\n", e, e)
		}
		for _, set := range c.sets {
			fmt.Fprintf(&b, "  %v\n", set.names)
		}
	}
	const want = "f8219a1b1e19"
	if got := fmt.Sprintf("%x", sha256.Sum256([]byte(b.String())))[:12]; got != want {
		t.Errorf("the expressions have digest %s, not %s:\n%s", got, want, b.String())
	}
	for _, unknown := range []desired.Statement{desired.Verdict("queue"), desired.MatchAddressType{Type: "nosuch"}, nil} {
		if _, err := compileRule([]desired.Statement{unknown}); err == nil {
			t.Errorf("%v was compiled", unknown)
		}
	}
}

// TestInterfaceSets: nobody changes the interfaces that a rule names, be it with
// a library that does not stop them.
func TestInterfaceSets(t *testing.T) {
	l := newLAN(t)
	conn, err := l.kernel.nft()
	must(t, err)
	table := &nftables.Table{Name: desired.TableName, Family: nftables.TableFamilyINet}
	sets, err := conn.GetSets(table)
	must(t, err)
	if len(sets) == 0 {
		t.Fatal("there are no sets")
	}
	for _, set := range sets {
		conn.FlushSet(set)
		if conn.Flush() == nil {
			t.Errorf("set %s was flushed", set.Name)
		}
		set.Anonymous = false
		must(t, conn.SetAddElements(set, []nftables.SetElement{{Key: interfaceName("wan1")}}))
		if conn.Flush() == nil {
			t.Errorf("set %s got another element", set.Name)
		}
	}
	if left := desired.Diff(read(t, l.kernel), compile(t, lanSettings("lan0", "lan1"))); len(left) > 0 {
		t.Errorf("after the attempts:%s", text(left))
	}
}
