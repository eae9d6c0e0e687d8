package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
)

func linkStatistics(t *testing.T, h *Host, device string) netlink.LinkStatistics {
	t.Helper()
	var s netlink.LinkStatistics
	must(t, h.Do(func() error {
		link, err := netlink.LinkByName(device)
		if err == nil {
			s = *link.Attrs().Statistics
		}
		return err
	}))
	return s
}

func echoServer(t *testing.T, l *Lab, address string) {
	t.Helper()
	socket, err := l.Server.ListenPacket("udp", address)
	must(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		ServeEcho(socket)
	}()
	t.Cleanup(func() {
		socket.Close()
		<-ended
	})
}

func probe(t *testing.T, l *Lab, address string, p Probe) ProbeResult {
	t.Helper()
	c, err := l.LAN.Dial(t.Context(), "udp", address)
	must(t, err)
	defer c.Close()
	r, err := p.Run(t.Context(), c)
	must(t, err)
	return r
}

func TestSummarize(t *testing.T) {
	const every = 20 * ms
	sent := []time.Duration{0, every, 2 * every, 3 * every, 4 * every}
	tests := []struct {
		name     string
		arrivals []arrival
		want     ProbeResult
		median   time.Duration
	}{
		{"all come back", []arrival{{0, 10 * ms}, {1, 31 * ms}, {2, 52 * ms}, {3, 73 * ms}, {4, 94 * ms}},
			ProbeResult{LongestGap: 21 * ms}, 12 * ms},
		{"one is lost", []arrival{{0, 10 * ms}, {1, 30 * ms}, {3, 70 * ms}, {4, 90 * ms}},
			ProbeResult{Lost: 1, Loss: 0.2, LongestGap: 40 * ms}, 10 * ms},
		{"the last are lost", []arrival{{0, 10 * ms}, {1, 30 * ms}},
			ProbeResult{Lost: 3, Loss: 0.6, LongestGap: 50 * ms}, 10 * ms},
		{"one overtakes two", []arrival{{0, 10 * ms}, {3, 61 * ms}, {1, 62 * ms}, {2, 63 * ms}, {4, 90 * ms}},
			ProbeResult{LongestGap: 51 * ms, Reordered: 2}, 10 * ms},
		{"twice", []arrival{{0, 10 * ms}, {0, 11 * ms}, {1, 30 * ms}, {1, 39 * ms}, {2, 50 * ms}, {3, 70 * ms}, {4, 90 * ms}, {9, 95 * ms}},
			ProbeResult{LongestGap: 20 * ms, Duplicates: 2}, 10 * ms},
		{"nothing", nil, ProbeResult{Lost: 5, Loss: 1, LongestGap: 80 * ms}, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := summarize(sent, test.arrivals)
			if diff := cmp.Diff(test.want, got, cmpopts.IgnoreFields(ProbeResult{}, "Packets"), cmpopts.IgnoreUnexported(ProbeResult{})); diff != "" {
				t.Error(diff)
			}
			if m := got.Percentile(0.5); m != test.median {
				t.Errorf("median %v, want %v", m, test.median)
			}
		})
	}
}

func TestPercentileIsTheNearestRank(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(i+1))
	}
	for share, want := range map[float64]time.Duration{0: 1, 0.5: 50, 0.99: 99, 0.991: 100, 1: 100} {
		if got := percentile(hundred, share); got != want {
			t.Errorf("percentile %v of 1 to 100 is %d, want %d", share, got, want)
		}
	}
}

func TestTally(t *testing.T) {
	// 8000 bit/s in datagrams of 100 bytes: 10 per second. Numbers below 10 settle.
	b := Bulk{Rate: 8000, Size: 100, Duration: 3 * time.Second, Settle: time.Second}
	type datagram struct {
		sequence uint32
		at       time.Duration
	}
	const second = time.Second
	tests := []struct {
		name      string
		datagrams []datagram
		sent      int
		want      BulkResult
	}{
		{"in order", []datagram{{9, second}, {10, second}, {11, 2 * second}}, 2,
			BulkResult{Sent: 2, Arrived: 2, Offered: 800, Rate: 1200}},
		{"settling, and after the end", []datagram{{0, 0}, {1, second / 2}, {20, 3 * second}, {29, 3*second + 1}}, 2,
			BulkResult{Sent: 2, Arrived: 2, Offered: 800}},
		{"lost", []datagram{{10, second}, {12, second}}, 4,
			BulkResult{Sent: 4, Arrived: 2, Offered: 1600, Rate: 800, Loss: 0.5}},
		{"late ones count as reordered, each", []datagram{{12, second}, {10, second}, {11, second}, {13, second}}, 4,
			BulkResult{Sent: 4, Arrived: 4, Offered: 1600, Rate: 1600, Reordered: 2}},
		{"duplicates count once, and are not reordered", []datagram{{10, second}, {11, second}, {10, second}, {0, second}, {0, second}}, 2,
			BulkResult{Sent: 2, Arrived: 2, Offered: 800, Rate: 1200, Duplicates: 1}},
		{"numbers never sent", []datagram{{30_000, second}, {^uint32(0), second}}, 1,
			BulkResult{Sent: 1, Offered: 400, Loss: 1}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			tally := newTally(b, 30)
			for _, d := range test.datagrams {
				tally.arrived(d.sequence, d.at)
			}
			if diff := cmp.Diff(test.want, tally.result(test.sent)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestProbe(t *testing.T) {
	const delay = 5 * ms
	l := newLab(t, Config{Uplinks: []Shape{{Delay: delay}}})
	for _, address := range []string{ServerAddress + ":" + port, "[" + ServerAddress6 + "]:" + port} {
		t.Run(address, func(t *testing.T) {
			echoServer(t, l, address)
			p := Probe{Rate: 200, Size: 200, Duration: time.Second}
			before, _ := l.Uplinks[0].Counters()
			r := probe(t, l, address, p)
			after, _ := l.Uplinks[0].Counters()
			if r.Lost > 0 || r.Duplicates > 0 || r.Reordered > 0 || len(r.Packets) != 200 {
				t.Errorf("%d datagrams, %d lost, %d duplicates, %d reordered; want 200, and nothing else", len(r.Packets), r.Lost, r.Duplicates, r.Reordered)
			}
			if r.Percentile(0) < 2*delay {
				t.Errorf("round trip of %v over %v twice", r.Percentile(0), delay)
			}
			for i, p := range r.Packets {
				if p.Sent < time.Duration(i)*5*ms {
					t.Fatalf("datagram %d was sent at %v, too early", i, p.Sent)
				}
			}
			if carried := after.Bytes - before.Bytes; carried < 200*(200+8+20+14) {
				t.Errorf("wan1 carried %d bytes", carried)
			}

			hole := make(chan error, 1)
			time.AfterFunc(300*ms, func() {
				err := l.Uplinks[0].BlackHole(true)
				time.Sleep(300 * ms)
				hole <- errors.Join(err, l.Uplinks[0].BlackHole(false))
			})
			r = probe(t, l, address, p)
			must(t, <-hole)
			if r.LongestGap < 300*ms || r.Lost == 0 || r.Lost == 200 {
				t.Errorf("black-holed for 300 ms: longest gap %v, %d of 200 lost", r.LongestGap, r.Lost)
			}
		})
	}
}

func TestProbeRefuses(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	c, err := l.LAN.Dial(t.Context(), "udp", ServerAddress+":"+port)
	must(t, err)
	defer c.Close()
	for want, p := range map[string]Probe{
		"give 16 to 65507":  {Rate: 10, Size: 15, Duration: time.Second},
		"give 1 to 2000000": {Rate: 1e9, Size: 100, Duration: time.Minute},
		"0 datagrams":       {Size: 100, Duration: time.Second},
	} {
		if _, err := p.Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", p, err, want)
		}
	}
	// Nobody serves: the ICMP errors that come back are losses, not failures.
	r, err := Probe{Rate: 100, Size: 100, Duration: 100 * ms, Wait: 50 * ms}.Run(t.Context(), c)
	if err != nil || r.Lost != 10 {
		t.Errorf("without a server %d of 10 lost: %v", r.Lost, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*ms)
	defer cancel()
	if _, err := (Probe{Rate: 10, Size: 100, Duration: time.Hour}).Run(ctx, c); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a probe that was told to end: %v", err)
	}
}

func TestBulk(t *testing.T) {
	// 8 Mbit/s of payload fit a line of 10, and not one of 4.
	l := newLab(t, Config{Uplinks: []Shape{{Rate: 10 * megabit, Delay: 5 * ms}}})
	for _, family := range []struct{ name, address string }{{"IPv4", ServerAddress}, {"IPv6", "[" + ServerAddress6 + "]"}} {
		server, err := l.Server.ListenPacket("udp", family.address+":"+port)
		must(t, err)
		defer server.Close()
		client, err := l.LAN.Dial(t.Context(), "udp", family.address+":"+port)
		must(t, err)
		defer client.Close()
		b := Bulk{Rate: 8 * megabit, Size: 1000, Duration: 600 * ms, Settle: 200 * ms, Wait: 2 * time.Second} // longer than the queue
		for name, run := range map[string]func(Bulk) (BulkResult, error){
			"upload":   func(b Bulk) (BulkResult, error) { return b.Upload(t.Context(), client, server) },
			"download": func(b Bulk) (BulkResult, error) { return b.Download(t.Context(), client, server) },
		} {
			t.Run(family.name+" "+name, func(t *testing.T) {
				must(t, l.Uplinks[0].Set(Shape{Rate: 10 * megabit, Delay: 5 * ms, Queue: time.Second}))
				up0, down0 := l.Uplinks[0].Counters()
				r, err := run(b)
				must(t, err)
				if r.Sent == 0 || r.Arrived != r.Sent || r.Loss != 0 || r.Reordered+r.Duplicates > 0 || r.Rate == 0 {
					t.Errorf("over a line with room: %+v", r)
				}
				up1, down1 := l.Uplinks[0].Counters()
				if up := up1.Bytes-up0.Bytes > down1.Bytes-down0.Bytes; up != (name == "upload") {
					t.Errorf("%s: up %d bytes, down %d", name, up1.Bytes-up0.Bytes, down1.Bytes-down0.Bytes)
				}
				must(t, l.Uplinks[0].Set(Shape{Rate: 4 * megabit, Queue: ms}))
				b := b
				b.Wait = 300 * ms
				if r, err = run(b); err != nil || r.Loss == 0 || r.Arrived >= r.Sent {
					t.Errorf("over a line without: %+v: %v", r, err)
				}
				must(t, l.Uplinks[0].Set(Shape{Loss: 1}))
				ctx, cancel := context.WithTimeout(t.Context(), 300*ms)
				defer cancel()
				if _, err := b.Upload(ctx, client, server); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("over a dead line: %v", err)
				}
			})
		}
		if _, err := (Bulk{Rate: megabit, Size: 1000, Duration: time.Second, Settle: time.Second}).Upload(t.Context(), client, server); err == nil {
			t.Error("settled for all its time")
		}
	}
}

func TestBlockUDP(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	addresses := []string{ServerAddress + ":" + port, "[" + ServerAddress6 + "]:" + port}
	for _, address := range addresses {
		echoServer(t, l, address)
		serve(t, l.Server, false, address, echo)
	}
	for _, blocked := range []bool{false, true, false} {
		must(t, l.Uplinks[0].BlockUDP(blocked))
		for _, address := range addresses {
			r := probe(t, l, address, Probe{Rate: 1000, Size: 2000, Duration: 20 * ms, Wait: 200 * ms}) // in fragments
			if want := map[bool]float64{true: 1}[blocked]; r.Loss != want {
				t.Errorf("%s: UDP blocked %v: loss %v, want %v", address, blocked, r.Loss, want)
			}
			_, err := ping(dial(t, l.LAN, address), 5*time.Second)
			must(t, err)
		}
	}
	if up, down := l.Uplinks[0].Counters(); up.UDPBlocked != 80 || down.UDPBlocked != 0 {
		t.Errorf("blocked %d up, %d down; want 80 (20 in two fragments each, twice), and none", up.UDPBlocked, down.UDPBlocked)
	}
}

// A connection that asks for MPTCP gets it, unless the uplink strips it, and works
// all the same.
func TestStripMPTCP(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	config := net.ListenConfig{}
	config.SetMultipathTCP(true)
	var listener net.Listener
	must(t, l.Server.Do(func() (err error) {
		listener, err = config.Listen(t.Context(), "tcp", ":"+port)
		return err
	}))
	defer func() { _ = listener.Close() }()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go echo(c)
		}
	}()
	dialer := net.Dialer{Timeout: 5 * time.Second}
	dialer.SetMultipathTCP(true)
	for round, stripped := range []bool{true, false, true} {
		must(t, l.Uplinks[0].StripMPTCP(stripped))
		for _, address := range []string{ServerAddress, ServerAddress6} {
			var c net.Conn
			must(t, l.LAN.Do(func() (err error) {
				c, err = dialer.DialContext(t.Context(), "tcp", net.JoinHostPort(address, port))
				return err
			}))
			_, err := ping(c, 5*time.Second)
			must(t, err)
			multipath, err := c.(*net.TCPConn).MultipathTCP()
			must(t, err)
			if multipath == stripped {
				t.Errorf("%s: stripped %v: MPTCP %v", address, stripped, multipath)
			}
			_ = c.Close()
		}
		// Later, connections over MPTCP may yet be closing.
		if up, down := l.Uplinks[0].Counters(); round == 0 && (up.Stripped == 0 || down.Stripped > 0) {
			t.Errorf("stripped %d up, %d down; want some, and none: the server was not asked for MPTCP", up.Stripped, down.Stripped)
		}
	}
}

func TestSetMTUOfAnUnshapedUplink(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1), Unshaped: true})
	must(t, l.Uplinks[0].SetMTU(1300))
	_, err := l.LAN.Ping(t.Context(), netip.MustParseAddr(ServerAddress), Ping{Size: 1300, DontFragment: true})
	var tooBig *ICMPError
	if !errors.As(err, &tooBig) || !tooBig.TooBig() || tooBig.MTU != 1300 {
		t.Errorf("pinged with 1328 bytes over an MTU of 1300: %v", err)
	}
	if err := l.Uplinks[0].BlockUDP(true); err == nil {
		t.Error("UDP is blocked where there is no emulator")
	}
}

func TestQueuePasses(t *testing.T) {
	frame := func(packet []byte) []byte { return append(make([]byte, 14), packet...) }
	v4, v4b := netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:2")
	v6, v6b := netip.MustParseAddrPort("[fd00::1]:1"), netip.MustParseAddrPort("[fd00::2]:2")
	udp4, udp6 := UDPPacket(v4, v4b, make([]byte, 100)), UDPPacket(v6, v6b, make([]byte, 80)) // 128 bytes each
	tests := []struct {
		name  string
		block bool
		mtu   int
		frame []byte
		want  bool
	}{
		{"all", false, 0, frame(udp4), true},
		{"as large as the MTU", false, 128, frame(udp6), true},
		{"larger", false, 127, frame(udp6), false},
		{"UDP", true, 0, frame(udp4), false},
		{"IPv6 UDP", true, 0, frame(udp6), false},
		{"later fragment of UDP", true, 0, frame(Fragments(udp4, 64, 1)[1]), false},
		{"later fragment of IPv6 UDP", true, 0, frame(Fragments(udp6, 64, 1)[1]), false},
		{"TCP", true, 128, frame(IPPacket(v4.Addr(), v4b.Addr(), 6, make([]byte, 20))), true},
		{"ARP", true, 128, frame([]byte{0, 1, 8, 0}), true},
		{"no more than a header", true, 128, frame(nil), true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			q := queue{blockUDP: test.block, mtu: test.mtu}
			if got := q.passes(test.frame); got != test.want {
				t.Errorf("passes: %v", got)
			}
			if counted := q.counters.UDPBlocked + q.counters.TooLarge; (counted == 1) == test.want {
				t.Errorf("counted %d", counted)
			}
		})
	}
}

func TestQUICDownload(t *testing.T) {
	l := newLab(t, Config{Uplinks: []Shape{{Rate: 40 * megabit, Delay: 2 * ms}}})
	for _, address := range []string{ServerAddress + ":" + port, "[" + ServerAddress6 + "]:" + port} {
		socket, err := l.Server.ListenPacket("udp", address)
		must(t, err)
		server, err := ServeQUIC(socket)
		must(t, err)
		client, err := l.LAN.ListenPacket("udp", ":0")
		must(t, err)
		defer client.Close()
		for _, d := range []QUICDownload{{Bytes: 3 * megabyte}, {Duration: 300 * ms}} {
			_, before := l.Uplinks[0].Counters()
			r, err := d.Run(t.Context(), client, netip.MustParseAddrPort(address))
			_, after := l.Uplinks[0].Counters()
			if err != nil || d.Bytes > 0 && r.Bytes != d.Bytes || r.Elapsed < d.Duration || r.Handshake < 4*ms || r.Bytes == 0 || r.Rate() > 40*megabit {
				t.Errorf("%+v: %+v, %.1f Mbit/s: %v", d, r, r.Rate()/megabit, err)
			}
			if carried := int64(after.Bytes - before.Bytes); carried < r.Bytes {
				t.Errorf("%+v: %d bytes, of which wan1 carried %d", d, r.Bytes, carried)
			}
		}
		if _, err := (QUICDownload{}).Run(t.Context(), client, netip.MustParseAddrPort(address)); err == nil {
			t.Error("a download without an end")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 200*ms)
		if _, err := (QUICDownload{Bytes: 1 << 40}).Run(ctx, client, netip.MustParseAddrPort(address)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a download that was told to end: %v", err)
		}
		cancel()
		must(t, server.Close())
	}
}

func TestDNS(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 2)})
	for i, where := range []struct {
		host    *Host
		address string
	}{
		{l.Server, ServerAddress + ":53"},
		{l.Server, "[" + ServerAddress6 + "]:53"},
		{l.Core, l.Uplinks[0].Gateway() + ":53"},
		{l.Core, "[" + l.Uplinks[1].Gateway6() + "]:53"},
	} {
		t.Run(where.address, func(t *testing.T) {
			answers := []netip.Addr{netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", i)), netip.MustParseAddr(fmt.Sprintf("2001:db8:d::%d", i))}
			server, err := where.host.ServeDNS(where.address, answers[0], answers[1])
			must(t, err)
			for _, network := range []string{"udp", "tcp"} {
				for family, want := range answers {
					got, err := l.LAN.LookupDNS(t.Context(), network, where.address, "name.example.", family == 1)
					if err != nil || len(got) != 1 || got[0] != want {
						t.Errorf("%s: got %v, want %v: %v", network, got, want, err)
					}
				}
			}
			if n := server.Queries.Load(); n < 4 { // by UDP the client may have asked again
				t.Errorf("the server counted %d queries of 4", n)
			}
			// Garbage neither stops it nor gets an answer.
			c, err := l.LAN.Dial(t.Context(), "udp", where.address)
			must(t, err)
			defer c.Close()
			c.Write([]byte("not a query"))
			if _, err := l.LAN.LookupDNS(t.Context(), "udp", where.address, "again.example.", false); err != nil {
				t.Error(err)
			}
			must(t, server.Close())
			if got, err := l.LAN.LookupDNS(t.Context(), "udp", where.address, "name.example.", false); err == nil {
				t.Errorf("a closed server said %v", got)
			}
		})
	}
	if _, err := l.LAN.LookupDNS(t.Context(), "udp", ServerAddress+":53", "no final dot", false); err == nil {
		t.Error("asked for a name that is not one")
	}
}

func TestTrafficLeavesNothingOpen(t *testing.T) {
	before := openFiles(t)
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	use := func() {
		capture, err := l.Router.Capture("wan1", nil)
		must(t, err)
		injector, err := l.InjectFromLAN()
		must(t, err)
		dns, err := l.Server.ServeDNS(ServerAddress+":53", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1"))
		must(t, err)
		c := dial(t, l.LAN, ServerAddress+":53") // a connection that asks nothing
		socket, err := l.Server.ListenPacket("udp", ServerAddress+":"+port)
		must(t, err)
		quic, err := ServeQUIC(socket)
		must(t, err)
		_, err = l.LAN.Ping(t.Context(), netip.MustParseAddr(ServerAddress), Ping{})
		must(t, err)
		c.Close()
		for _, closed := range []interface{ Close() error }{injector, dns, quic} {
			must(t, closed.Close())
		}
		_, err = capture.Stop()
		must(t, err)
	}
	use()
	must(t, l.Close())
	eventually(t, 5*time.Second, func() string {
		if n := openFiles(t); n > before {
			return fmt.Sprintf("%d files are open, before it were %d", n, before)
		}
		return ""
	})
}
