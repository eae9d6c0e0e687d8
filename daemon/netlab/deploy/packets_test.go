package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/netlab"
	"sheaf/webui"
)

// The packets of everything that is not TCP, from the LAN to the Internet server
// and back:
//
//	ask, Ping, Probe, Bulk ─▶ router ─▶ TUN ═ carriers ═▶ TUN ─▶ VM ─▶ echo
//	Injector ─▶ LAN or TUN: what no kernel would send

// families are the two, with their addresses in the lab.
var families = []struct {
	name                string
	server, vm, gateway string // gateway: the router, on the LAN
	header              int    // of IP, bytes
}{
	{"IPv4", netlab.ServerAddress, netlab.CloudAddress, netlab.RouterAddress, 20},
	{"IPv6", netlab.ServerAddress6, netlab.CloudAddress6, netlab.RouterAddress6, 40},
}

const udpHeader, icmpHeader = 8, 8

// echoServer sends datagrams back, and remembers where they came from.
type echoServer struct {
	socket  net.PacketConn
	mu      sync.Mutex
	sources map[netip.Addr]int
}

func (w *world) serveUDP(h *netlab.Host, host string, port int) *echoServer {
	w.t.Helper()
	socket, err := h.ListenPacket("udp", net.JoinHostPort(host, fmt.Sprint(port)))
	w.need(err)
	w.t.Cleanup(func() { _ = socket.Close() })
	e := &echoServer{socket: socket, sources: map[netip.Addr]int{}}
	go netlab.ServeEcho(e)
	return e
}

// ReadFrom, WriteTo and the rest make it the net.PacketConn of ServeEcho.
func (e *echoServer) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := e.socket.ReadFrom(b)
	if err == nil {
		e.mu.Lock()
		e.sources[from.(*net.UDPAddr).AddrPort().Addr().Unmap()]++
		e.mu.Unlock()
	}
	return n, from, err
}
func (e *echoServer) WriteTo(b []byte, to net.Addr) (int, error) { return e.socket.WriteTo(b, to) }
func (e *echoServer) Close() error                               { return e.socket.Close() }
func (e *echoServer) LocalAddr() net.Addr                        { return e.socket.LocalAddr() }
func (e *echoServer) SetDeadline(t time.Time) error              { return e.socket.SetDeadline(t) }
func (e *echoServer) SetReadDeadline(t time.Time) error          { return e.socket.SetReadDeadline(t) }
func (e *echoServer) SetWriteDeadline(t time.Time) error         { return e.socket.SetWriteDeadline(t) }

// from is how many datagrams came from each address.
func (e *echoServer) from() map[netip.Addr]int {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := map[netip.Addr]int{}
	for a, n := range e.sources {
		all[a] = n
	}
	return all
}

func (e *echoServer) count() (n int) {
	for _, each := range e.from() {
		n += each
	}
	return n
}

// ask sends a datagram to an echo server until it comes back whole, at most so
// many times, one a second.
func ask(h *netlab.Host, host string, port, size, tries int) error {
	c, err := h.Dial(context.Background(), "udp", net.JoinHostPort(host, fmt.Sprint(port)))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	question, answer := make([]byte, size), make([]byte, 1<<16)
	for i := range question {
		question[i] = byte(rand.Uint32())
	}
	for range tries {
		// EMSGSIZE and other ICMP errors are about an earlier one.
		_, err = c.Write(question)
		for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); {
			_ = c.SetReadDeadline(deadline)
			n, readErr := c.Read(answer)
			if readErr == nil && string(answer[:n]) == string(question) {
				return nil
			}
			err = cmp.Or(readErr, err)
		}
	}
	return fmt.Errorf("no echo of %d bytes from %s after %d tries: %w", size, host, tries, err)
}

// untilAsked waits until the path works again.
func (w *world) untilAsked(host string, port int) {
	w.t.Helper()
	begin := time.Now()
	for {
		err := ask(w.Lab.LAN, host, port, 100, 1)
		if err == nil {
			return
		}
		if time.Since(begin) > patience {
			w.t.Fatalf("not within %v: %v", patience, err)
		}
	}
}

// untilCarriers waits until the uplinks have these carriers, in order.
func (w *world) untilCarriers(want ...string) {
	w.t.Helper()
	begin := time.Now()
	w.need(w.Until(fmt.Sprintf("the carriers are %v", want), func(s webui.Status) error {
		for i, carrier := range want {
			if u := w.uplink(s, i+1); u.Carrier != carrier {
				return fmt.Errorf("that of %s is %q (%s)", u.Name, u.Carrier, u.CarrierReason)
			}
		}
		return nil
	}))
	w.t.Logf("carriers %v after %v", want, time.Since(begin).Round(10*time.Millisecond))
}

// untilPackets waits until packets reach the concentrator, and returns the status.
func (w *world) untilPackets(d *Deployment) (status webui.Status) {
	w.t.Helper()
	w.need(d.Until("packets reach the concentrator", func(s webui.Status) error {
		if status = s; s.Packets.State != "up" || s.Packets.Address4 == "" {
			return fmt.Errorf("%+v", s.Packets)
		}
		return nil
	}))
	return status
}

func (w *world) concentratorSocket() string {
	return filepath.Join(w.concentratorState(), "concentratord.sock")
}

// enrolled is what the concentrator says of a router.
func (w *world) enrolled(name string) webui.EnrolledRouter {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	list, err := webui.NewClient(w.concentratorSocket()).Routers(ctx)
	w.need(err)
	for _, r := range list {
		if r.Name == name {
			return r
		}
	}
	w.t.Fatalf("the concentrator knows no router %s: %+v", name, list)
	panic("unreachable")
}

// scrape gets the metrics of the daemon on a socket.
func (w *world) scrape(socket string) string {
	w.t.Helper()
	response, err := overSocket(socket).Get("http://sheaf/metrics")
	w.need(err)
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	w.need(err)
	if response.StatusCode != http.StatusOK {
		w.t.Fatalf("GET /metrics: %s: %s", response.Status, text)
	}
	return string(text)
}

// metric is the value of a series, written as the text format has it.
func (w *world) metric(text, series string) (value float64) {
	w.t.Helper()
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, series+" "); ok {
			_, err := fmt.Sscan(rest, &value)
			w.need(err)
			return value
		}
	}
	w.t.Errorf("no series %s in the metrics", series)
	return -1
}

// tunInjector sends packets into a host's TUN as its kernel would.
func (w *world) tunInjector(h *netlab.Host, name string) *netlab.Injector {
	w.t.Helper()
	i, err := h.Injector(name, make(net.HardwareAddr, 6)) // a TUN has no hardware addresses
	w.need(err)
	w.t.Cleanup(func() { _ = i.Close() })
	return i
}

// eventually waits for a condition that is bound to come.
func (w *world) eventually(what string, condition func() bool) {
	w.t.Helper()
	for begin := time.Now(); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > patience {
			w.t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// UDP and ICMP of both families pass in any size, nothing that is too large
// disappears without a word, and the Internet sees the concentrator.
func TestPacketsPassInEverySize(t *testing.T) {
	w := up(t)
	mtu := w.untilPackets(w.Deployment).Packets.MTU
	const port = 7600
	for _, f := range families {
		echo := w.serveUDP(w.Lab.Server, f.server, port)
		server := netip.MustParseAddr(f.server)

		// First, while no kernel knows of any path's MTU: what may not be
		// fragmented and does not fit is answered, by the router.
		_, err := w.Lab.LAN.Ping(t.Context(), server, netlab.Ping{Size: 1500 - f.header - icmpHeader, DontFragment: true, Timeout: 5 * time.Second})
		var tooBig *netlab.ICMPError
		if !errors.As(err, &tooBig) || !tooBig.TooBig() || tooBig.MTU != mtu || tooBig.From.String() != f.gateway {
			t.Errorf("%s: a packet of 1500 bytes that may not be fragmented: %v; want too big, MTU %d, from %s", f.name, err, mtu, f.gateway)
		}
		w.returnsInEverySize(f.server, f.header, mtu)

		for _, size := range []int{0, 56, mtu - f.header - icmpHeader} {
			if _, err := w.Lab.LAN.Ping(t.Context(), server, netlab.Ping{Size: size, DontFragment: true, Timeout: 5 * time.Second}); err != nil {
				t.Errorf("%s: %v", f.name, err)
			}
		}
		// IPv6 is fragmented by its source alone, which must be told first: each
		// way takes one attempt.
		for attempt := 1; ; attempt++ {
			if _, err = w.Lab.LAN.Ping(t.Context(), server, netlab.Ping{Size: 4000, Timeout: time.Second}); err == nil {
				break
			}
			if attempt == 5 || f.header == 20 {
				t.Errorf("%s: attempt %d: %v", f.name, attempt, err)
				break
			}
		}
		for size, tries := range map[int]int{1: 1, 200: 1, 1300: 1, 1472: 3, 4000: 3} {
			if err := ask(w.Lab.LAN, f.server, port, size, tries); err != nil {
				t.Errorf("%s: %v", f.name, err)
			}
		}
		if from := echo.from(); len(from) != 1 || from[netip.MustParseAddr(f.vm)] == 0 {
			t.Errorf("%s: the server saw datagrams from %v, want all from %s", f.name, from, f.vm)
		}
	}
}

// returnsInEverySize sends large datagrams from the server to a LAN client that
// has asked for them.
func (w *world) returnsInEverySize(server string, header, mtu int) {
	w.t.Helper()
	address := net.JoinHostPort(server, "7601")
	socket, err := w.Lab.Server.ListenPacket("udp", address)
	w.need(err)
	defer func() { _ = socket.Close() }()
	client, err := w.Lab.LAN.Dial(context.Background(), "udp", address)
	w.need(err)
	defer func() { _ = client.Close() }()
	_, err = client.Write([]byte("open"))
	w.need(err)
	buffer := make([]byte, 1<<16)
	_ = socket.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, peer, err := socket.ReadFrom(buffer)
	w.need(err)

	six, full := header == 40, 1500-header-udpHeader
	arrives := func(size int) bool {
		for range 5 {
			_, _ = socket.WriteTo(make([]byte, size), peer) // EMSGSIZE is about an earlier one
			_ = client.SetReadDeadline(time.Now().Add(time.Second))
			if n, err := client.Read(buffer); err == nil && n == size {
				return true
			}
			if !six {
				return false
			}
		}
		return false
	}
	w.need(discoverMTU(socket, six, unix.IP_PMTUDISC_DONT))
	if !arrives(full) {
		w.t.Errorf("from %s: a datagram of 1500 bytes that may be fragmented did not arrive", server)
	}
	w.need(discoverMTU(socket, six, unix.IP_PMTUDISC_DO))
	w.eventually("the server is told that 1500 bytes do not fit", func() bool {
		_, err := socket.WriteTo(make([]byte, full), peer)
		return errors.Is(err, unix.EMSGSIZE)
	})
	if !arrives(mtu - header - udpHeader) {
		w.t.Errorf("from %s: a packet of %d bytes did not arrive", server, mtu)
	}
}

// discoverMTU sets what a socket does about packets larger than the path.
func discoverMTU(socket net.PacketConn, six bool, how int) error {
	raw, err := socket.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if six {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), level, option, how) })
	return errors.Join(err, failed)
}

// bulk sends one way for a while, of which the first half only fills windows.
func (w *world) bulk(download bool, rate float64, duration time.Duration) netlab.BulkResult {
	w.t.Helper()
	const address = netlab.ServerAddress + ":7611"
	server, err := w.Lab.Server.ListenPacket("udp", address)
	w.need(err)
	defer func() { _ = server.Close() }()
	client, err := w.Lab.LAN.Dial(w.t.Context(), "udp", address)
	w.need(err)
	defer func() { _ = client.Close() }()
	b := netlab.Bulk{Rate: rate, Size: 1300, Duration: duration, Settle: duration / 2, Wait: 300 * time.Millisecond}
	run := b.Upload
	if download {
		run = b.Download
	}
	r, err := run(w.t.Context(), client, server)
	w.need(err)
	w.t.Logf("bulk, download %v, %.0f of %.0f Mbit/s arrived, %d of %d lost, %.2f %% reordered, %d twice", download, r.Rate/1e6, r.Offered/1e6,
		r.Sent-r.Arrived, r.Sent, r.ReorderedShare()*100, r.Duplicates)
	return r
}

// probing begins to probe with 50 datagrams a second; result waits for the end.
func (w *world) probing(port int, duration time.Duration) (result func() netlab.ProbeResult) {
	w.t.Helper()
	c, err := w.Lab.LAN.Dial(w.t.Context(), "udp", fmt.Sprintf("%s:%d", netlab.ServerAddress, port))
	w.need(err)
	done := make(chan struct{})
	var r netlab.ProbeResult
	go func() {
		defer close(done)
		r, err = netlab.Probe{Rate: 50, Size: 200, Duration: duration, Wait: 500 * time.Millisecond}.Run(context.Background(), c)
		_ = c.Close()
	}()
	return func() netlab.ProbeResult {
		w.t.Helper()
		<-done
		w.need(err)
		w.t.Logf("probe: %d of %d lost, longest gap %v, RTT median %v, p99 %v, %d twice", r.Lost, len(r.Packets), r.LongestGap.Round(time.Millisecond),
			r.Percentile(0.5).Round(100*time.Microsecond), r.Percentile(0.99).Round(100*time.Microsecond), r.Duplicates)
		return r
	}
}

// Each uplink carries packets by datagrams where it lets UDP through, else by
// streams; packets go on over both, and over what is left.
func TestCarriersFollowTheUplinks(t *testing.T) {
	w := up(t)
	const port = 7610
	w.serveUDP(w.Lab.Server, netlab.ServerAddress, port)
	w.untilCarriers("datagram", "datagram", "datagram")

	// Bulk, more than any uplink takes: over several, whose delays are 10 ms and
	// more apart, and in order.
	for _, download := range []bool{false, true} {
		var before [3]uint64
		for i, u := range w.Lab.Uplinks {
			upward, downward := u.Counters()
			before[i] = upward.Bytes + downward.Bytes
		}
		r := w.bulk(download, 55e6, 2500*time.Millisecond)
		used := 0
		for i, u := range w.Lab.Uplinks {
			if upward, downward := u.Counters(); upward.Bytes+downward.Bytes-before[i] > 1e6 {
				used++
			}
		}
		if used < 2 || r.Loss > 0.3 || r.ReorderedShare() > 0.05 || r.Duplicates > 0 {
			t.Errorf("bulk: download %v, over %d uplinks, %.1f %% lost, %.2f %% reordered, %d twice", download, used, r.Loss*100, r.ReorderedShare()*100, r.Duplicates)
		}
	}

	// Interactive: twice over, and so hardly disturbed by the end of the best.
	result := w.probing(port, 2500*time.Millisecond)
	time.Sleep(time.Second)
	w.need(w.Lab.Uplinks[0].BlackHole(true))
	r := result()
	w.need(w.Lab.Uplinks[0].BlackHole(false))
	if r.LongestGap > 500*time.Millisecond || r.Lost > 5 || r.Duplicates > 0 {
		t.Errorf("the best uplink black-holed: longest gap %v, %d lost, %d twice; want less than 500 ms, at most 5, none", r.LongestGap, r.Lost, r.Duplicates)
	}
	s, err := w.Status()
	w.need(err)
	if far := w.enrolled("lab").Duplicates; far < 20 || s.Packets.Duplicates < 20 {
		t.Errorf("second copies that arrived: %d at the concentrator, %d at the router; want those of most packets", far, s.Packets.Duplicates)
	}
	w.untilCarriers("datagram", "datagram", "datagram")

	// One uplink without UDP, during a probe.
	result = w.probing(port, 2500*time.Millisecond)
	w.need(w.Lab.Uplinks[1].BlockUDP(true))
	w.untilCarriers("datagram", "stream", "datagram")
	if r := result(); r.Lost > 5 {
		t.Errorf("UDP blocked on uplink2: %d of %d lost", r.Lost, len(r.Packets))
	}
	w.checkMetrics()

	for _, u := range w.Lab.Uplinks {
		w.need(u.BlockUDP(true))
	}
	w.untilCarriers("stream", "stream", "stream")
	w.untilAsked(netlab.ServerAddress, port)
	result = w.probing(port, time.Second)
	if r := result(); r.Loss > 0.05 {
		t.Errorf("UDP blocked everywhere: %d of %d lost", r.Lost, len(r.Packets))
	}
	for _, download := range []bool{false, true} {
		if r := w.bulk(download, 20e6, time.Second); r.Loss > 0.1 {
			t.Errorf("UDP blocked everywhere: bulk, download %v: %.1f %% lost", download, r.Loss*100)
		}
	}
	far := w.enrolled("lab")
	if len(far.Carriers) != 1 || far.Carriers[0] != (webui.RouterCarrier{Carrier: "stream"}) {
		t.Errorf("the concentrator's carriers are %v, want one, stream", far.Carriers)
	}
	for _, u := range w.Lab.Uplinks {
		w.need(u.BlockUDP(false))
	}
	w.untilCarriers("datagram", "datagram", "datagram")
	w.untilAsked(netlab.ServerAddress, port)
}

// checkMetrics looks at what both daemons tell while uplink2 alone lets no UDP
// through and interactive packets have been sent.
func (w *world) checkMetrics() {
	w.t.Helper()
	router, far := w.scrape(w.Socket()), w.scrape(w.concentratorSocket())
	for text, series := range map[string][]string{
		router: {
			`sheaf_packets_up`, `sheaf_packet_duplicates_total`, `sheaf_packets_total{direction="rx"}`, `sheaf_packets_total{direction="tx"}`,
			`sheaf_uplink_info{carrier="datagram",mode="on",state="carrying",uplink="uplink1"}`,
			`sheaf_uplink_info{carrier="stream",mode="on",state="carrying",uplink="uplink2"}`,
			`sheaf_uplink_packets_total{direction="tx",uplink="uplink1"}`,
		},
		far: {
			`sheaf_router_packet_duplicates_total{router="lab"}`, `sheaf_router_packets_total{direction="rx",router="lab"}`,
			`sheaf_router_carrier_info{carrier="datagram",link="uplink1",router="lab"}`,
			`sheaf_router_carrier_info{carrier="stream",link="",router="lab"}`,
		},
	} {
		for _, s := range series {
			if w.metric(text, s) <= 0 {
				w.t.Errorf("%s is %v, want more", s, w.metric(text, s))
			}
		}
	}
	for _, reason := range []string{"malformed", "oversized", "queue", "no_link", "late", "reassembly", "spoofed"} {
		w.metric(router, fmt.Sprintf(`sheaf_packet_drops_total{reason=%q}`, reason))
		w.metric(far, fmt.Sprintf(`sheaf_router_packet_drops_total{reason=%q,router="lab"}`, reason))
	}
	w.metric(far, `sheaf_router_packet_drops_total{reason="forbidden",router="lab"}`)
}

// What a router may reach through the concentrator, and what not: only with its
// own addresses, not the VM, not private networks, not other routers.
func TestConcentratorGuardsItsSide(t *testing.T) {
	w := newWorld(t)
	dns, err := w.Lab.Server.ServeDNS(netlab.ServerAddress+":53", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1"))
	w.need(err)
	t.Cleanup(func() { _ = dns.Close() })
	w.need(w.StartConcentrator("--resolver", netlab.ServerAddress))
	token, err := w.Token("lab")
	w.need(err)
	w.need(w.StartRouter(w.Settings(token)))
	first := w.untilPackets(w.Deployment).Packets
	inner4, inner6 := netip.MustParseAddr(first.Address4), netip.MustParseAddr(first.Address6)
	const port = 7620
	open := w.serveUDP(w.Lab.Server, netlab.ServerAddress, port)
	open6 := w.serveUDP(w.Lab.Server, netlab.ServerAddress6, port)
	w.untilAsked(netlab.ServerAddress, port)
	time.Sleep(time.Second) // in which a kernel greets its new interface

	// Spoofed sources, injected behind the router's own masquerade.
	inject := w.tunInjector(w.Lab.Router, "sheaf0")
	send := func(i *netlab.Injector, source, destination netip.Addr) {
		t.Helper()
		w.need(i.Send(netlab.UDPPacket(netip.AddrPortFrom(source, 4000), netip.AddrPortFrom(destination, port), []byte("injected"))))
	}
	server4, server6 := netip.MustParseAddr(netlab.ServerAddress), netip.MustParseAddr(netlab.ServerAddress6)
	before4, before6, spoofed := open.count(), open6.count(), w.enrolled("lab").Drops["spoofed"]
	if spoofed > 0 {
		t.Errorf("before anybody spoofs, %d packets count as spoofed", spoofed)
	}
	foreign := []netip.Addr{inner4.Next(), netip.MustParseAddr("10.83.0.1"), netip.MustParseAddr(netlab.LANAddress), netip.MustParseAddr("192.0.2.7")}
	for _, source := range foreign {
		send(inject, source, server4)
	}
	for _, source := range []netip.Addr{inner6.Next(), netip.MustParseAddr(netlab.LANAddress6)} {
		send(inject, source, server6)
	}
	send(inject, inner4, server4) // its own arrive, and after the others
	send(inject, inner6, server6)
	w.eventually("packets with the router's own addresses arrive", func() bool { return open.count() > before4 && open6.count() > before6 })
	w.eventually("spoofed packets are counted", func() bool { return w.enrolled("lab").Drops["spoofed"] == spoofed+6 })
	if open.count() != before4+1 || open6.count() != before6+1 {
		t.Errorf("of one good packet of each family and spoofed ones %d and %d arrived, want 1 and 1", open.count()-before4, open6.count()-before6)
	}

	// Destinations that are refused: those who listen there are reached otherwise.
	gateway := netip.MustParseAddr("10.83.0.1")
	private, own := w.serveUDP(w.Lab.Core, w.Lab.Uplinks[0].Gateway(), port), w.serveUDP(w.Lab.Cloud, netlab.CloudAddress, port)
	if err := errors.Join(ask(w.Lab.Router, w.Lab.Uplinks[0].Gateway(), port, 100, 3), ask(w.Lab.Server, netlab.CloudAddress, port, 100, 3)); err != nil {
		t.Fatal(err)
	}
	private4, own4, forbidden := private.count(), own.count(), w.enrolled("lab").Drops["forbidden"]
	inside := w.serveUDP(w.Lab.Cloud, gateway.String(), port)
	for _, host := range []string{w.Lab.Uplinks[0].Gateway(), netlab.CloudAddress, gateway.String()} {
		if err := ask(w.Lab.LAN, host, port, 100, 1); err == nil {
			t.Errorf("%s answered a LAN client", host)
		}
	}
	if private.count() != private4 || own.count() != own4 || inside.count() != 0 {
		t.Errorf("%d, %d and %d packets reached a private network, the VM and a port of its inner address", private.count()-private4, own.count()-own4, inside.count())
	}
	w.eventually("forbidden destinations are counted", func() bool { return w.enrolled("lab").Drops["forbidden"] >= forbidden+2 })
	// Of the VM itself there are names, and echo to find faults by.
	if got, err := w.Lab.LAN.LookupDNS(t.Context(), "udp", gateway.String()+":53", "example.net.", false); err != nil || len(got) != 1 {
		t.Errorf("DNS at %s: %v, %v", gateway, got, err)
	}
	if _, err := w.Lab.LAN.Ping(t.Context(), gateway, netlab.Ping{Size: 56, Timeout: 5 * time.Second}); err != nil {
		t.Error(err)
	}
	if err := w.tcpThroughTUN(gateway); err == nil {
		t.Errorf("%s accepted a TCP connection to port %d through the TUN", gateway, port)
	}

	// Another router, which runs on the Internet server.
	other := w.startOther("other")
	second := w.untilPackets(other).Packets
	if second.Address4 == first.Address4 || second.Address6 == first.Address6 {
		t.Fatalf("two routers have the addresses %+v and %+v", first, second)
	}
	arrivals := func(connected bool) {
		t.Helper()
		var seen4, seen6, answers atomic.Int64
		capture, err := w.Lab.Server.Capture("sheaf0", func(f netlab.Frame) bool {
			switch {
			case f.Source.Addr() == inner4:
				seen4.Add(1)
			case f.Source.Addr() == inner6:
				seen6.Add(1)
			case f.Source.Port() == port:
				answers.Add(1) // to what it asked the server itself
			}
			return true
		})
		w.need(err)
		inject, control := w.tunInjector(w.Lab.Router, "sheaf0"), w.tunInjector(w.Lab.Server, "sheaf0")
		w.eventually("answers and packets from the other router arrive", func() bool {
			send(inject, inner4, netip.MustParseAddr(second.Address4))
			send(inject, inner6, netip.MustParseAddr(second.Address6))
			send(control, netip.MustParseAddr(second.Address4), server4)
			return answers.Load() > 10 && (!connected || seen4.Load() > 0 && seen6.Load() > 0)
		})
		_, err = capture.Stop()
		w.need(err)
		if !connected && seen4.Load()+seen6.Load() > 0 {
			t.Errorf("%d IPv4 and %d IPv6 packets from one router reached the other", seen4.Load(), seen6.Load())
		}
	}
	arrivals(false)

	// Addresses are the same whichever end restarts.
	w.need(w.Concentrator.Kill())
	w.need(w.StartConcentrator("--connect-routers"))
	w.need(w.Router.Stop(15 * time.Second))
	w.need(w.StartRouter(""))
	if now := w.untilPackets(w.Deployment).Packets; now.Address4 != first.Address4 || now.Address6 != first.Address6 {
		t.Errorf("after both daemons' restart the inner addresses are %s and %s, were %s and %s", now.Address4, now.Address6, first.Address4, first.Address6)
	}
	if now := w.untilPackets(other).Packets; now.Address4 != second.Address4 || now.Address6 != second.Address6 {
		t.Errorf("after the concentrator's restart the other's inner addresses are %s and %s, were %s and %s", now.Address4, now.Address6, second.Address4, second.Address6)
	}
	arrivals(true)
}

// tcpThroughTUN connects from the router itself to a listener on the VM.
func (w *world) tcpThroughTUN(to netip.Addr) error {
	w.t.Helper()
	address := netip.AddrPortFrom(to, 7621).String()
	l, err := w.Lab.Cloud.Listen("tcp", address)
	w.need(err)
	defer func() { _ = l.Close() }()
	d := net.Dialer{Timeout: time.Second, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "sheaf0") })
	}}
	d.SetMultipathTCP(false)
	c, err := w.Lab.Router.DialWith(context.Background(), d, "tcp", address)
	if err == nil {
		_ = c.Close()
	}
	return err
}

// startOther starts a second router, on the Internet server: its uplink is the
// server's interface, and a LAN it has none.
func (w *world) startOther(name string) *Deployment {
	w.t.Helper()
	before := w.network(w.Lab.Server)
	token, err := w.Token(name)
	w.need(err)
	d := New(w.Lab, binaries, w.t.TempDir(), w.log)
	file, err := d.File("settings.yaml", "version: 1\nlan: {interfaces: [none0]}\nuplinks:\n"+
		"  - {name: only, interface: eth0, mode: on, address: {method: existing}}\nconcentrator: {token: "+token+"}\n")
	w.need(err)
	d.Router, err = d.start(w.Lab.Server, "sheafd", []string{"run", "--state-dir", filepath.Join(d.Dir, "router"), "--socket", d.Socket(), "--settings", file})
	w.need(err)
	w.t.Cleanup(func() {
		w.must(d.Stop())
		withoutLimits := func(text string) string { // as in world.network
			var lines []string
			for line := range strings.Lines(text) {
				if !strings.HasPrefix(line, "mptcp limit") {
					lines = append(lines, line)
				}
			}
			return strings.Join(lines, "")
		}
		if after := w.network(w.Lab.Server); withoutLimits(after) != withoutLimits(before) {
			w.t.Errorf("the server is not as it was before; before:\n%s\nafter:\n%s", before, after)
		}
	})
	return d
}

// memory is what both daemons hold, in MB.
func (w *world) memory() [2]int64 {
	w.t.Helper()
	var mb [2]int64
	for i, p := range []*netlab.Process{w.Router, w.Concentrator} {
		u, err := p.Usage()
		w.need(err)
		mb[i] = u.Resident >> 20
	}
	return mb
}

// boundedMemory checks that the daemons have not grown by more than their queues.
func (w *world) boundedMemory(what string, before [2]int64) {
	w.t.Helper()
	const most = 64 // MB; what is thrown at them is more
	now := w.memory()
	w.t.Logf("memory after %s: router %d MB, concentrator %d MB", what, now[0], now[1])
	for i, name := range []string{"sheafd", "concentratord"} {
		if now[i]-before[i] > most {
			w.t.Errorf("%s: %s grew from %d to %d MB", what, name, before[i], now[i])
		}
	}
}

// malformedPackets are such as no kernel makes.
func malformedPackets(source, destination netip.AddrPort) [][]byte {
	good := netlab.UDPPacket(source, destination, make([]byte, 100))
	with := func(change func([]byte)) []byte {
		b := append([]byte(nil), good...)
		change(b)
		return b
	}
	return [][]byte{
		with(func(b []byte) { b[0] = 0x44 }),             // a header of 16 bytes
		with(func(b []byte) { b[0] = 0x4f }),             // of 60, into the payload
		with(func(b []byte) { b[2], b[3] = 0xff, 0xff }), // longer than it is
		with(func(b []byte) { b[2], b[3] = 0, 5 }),       // shorter than its header
		with(func(b []byte) { b[0] = 0x95 }),             // version 9
		with(func(b []byte) { b[6], b[7] = 0x1f, 0xff }), // a fragment past the end
		with(func(b []byte) { b[0] = 0x65 }),             // version 6 with IPv4's header
		good[:19], good[:1], good[:24],                   // cut short
		{0x60, 0, 0, 0, 0, 0, 44, 64}, make([]byte, 40)[0:40], // cut short, zeros
	}
}

// intruder sends what should not come.
type intruder struct {
	*world
	before          [2]int64         // memory
	lan, tun        *netlab.Injector // from the LAN client, into the router's TUN
	client, inner   netip.AddrPort   // sources that fit them
	inner6          netip.AddrPort
	server, server6 netip.AddrPort // where an echo server listens
}

// passes waits until packets go on, and checks that memory is bounded.
func (i *intruder) passes(after string) {
	i.t.Helper()
	i.untilAsked(i.server.Addr().String(), int(i.server.Port()))
	i.untilAsked(i.server6.Addr().String(), int(i.server6.Port()))
	i.boundedMemory(after, i.before)
}

func (i *intruder) drops(reason string) uint64 {
	i.t.Helper()
	s, err := i.Status()
	i.need(err)
	return s.Packets.Drops[reason]
}

// Whatever comes, from the LAN, into the TUN, to the concentrator's port or not
// at all, packets go on, memory is bounded, and the logs are not flooded.
func TestBadPacketsAndPeers(t *testing.T) {
	w := up(t)
	const port = 7630
	status := w.untilPackets(w.Deployment).Packets
	at := func(host string, port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr(host), port)
	}
	i := &intruder{
		world: w, client: at(netlab.LANAddress, 4001), inner: at(status.Address4, 4001), inner6: at(status.Address6, 4001),
		server: at(netlab.ServerAddress, port), server6: at(netlab.ServerAddress6, port), tun: w.tunInjector(w.Lab.Router, "sheaf0"),
	}
	w.serveUDP(w.Lab.Server, netlab.ServerAddress, port)
	w.serveUDP(w.Lab.Server, netlab.ServerAddress6, port)
	var err error
	i.lan, err = w.Lab.InjectFromLAN()
	w.need(err)
	t.Cleanup(func() { _ = i.lan.Close() })
	w.bulk(false, 40e6, time.Second) // the pools fill
	w.bulk(true, 40e6, time.Second)
	i.before = w.memory()
	t.Logf("memory before: router %d MB, concentrator %d MB", i.before[0], i.before[1])

	i.malformed()
	i.oversized(status.MTU)
	i.fragments()
	i.garbage()
	i.standsStill(w.Router, true)
	i.standsStill(w.Concentrator, false)
	i.deleteTUNs()
	w.calmLog()
}

func (i *intruder) malformed() {
	i.t.Helper()
	const times = 500
	malformed, spoofed := i.drops("malformed"), i.enrolled("lab").Drops["spoofed"]
	foreign := netlab.UDPPacket(i.client, i.server, nil)
	for range times {
		for _, p := range malformedPackets(i.client, i.server) {
			i.need(i.lan.Send(p))
		}
		for _, p := range malformedPackets(i.inner, i.server) {
			i.need(i.tun.Send(p))
		}
		i.need(i.tun.Send(foreign))
	}
	i.eventually("malformed packets are counted", func() bool { return i.drops("malformed") > malformed+times })
	i.eventually("spoofed packets are counted", func() bool { return i.enrolled("lab").Drops["spoofed"] > spoofed+times/2 })
	i.passes("malformed and spoofed packets")
}

func (i *intruder) oversized(mtu int) {
	i.t.Helper()
	before := i.drops("oversized")
	huge := netlab.UDPPacket(i.inner, i.server, make([]byte, 3000))
	i.eventually("packets longer than any are counted", func() bool {
		i.need(i.setMTU(i.Lab.Router, "sheaf0", 9000)) // until the daemon sees it
		_ = i.tun.Send(huge)
		return i.drops("oversized") > before
	})
	i.eventually("the TUN's MTU is as it was", func() bool { return i.mtu(i.Lab.Router, "sheaf0") == mtu })
	i.passes("packets of 3000 bytes")
}

func (i *intruder) fragments() {
	i.t.Helper()
	const count = 20_000
	i.need(i.lan.FragmentFlood(i.client, i.server, count))
	i.need(i.tun.FragmentFlood(i.inner, i.server, count))
	i.need(i.tun.FragmentFlood(i.inner6, i.server6, count))
	i.passes("a flood of fragments")
}

// garbage goes to the concentrator's UDP port, from somebody unknown.
func (i *intruder) garbage() {
	i.t.Helper()
	c, err := i.Lab.Server.Dial(i.t.Context(), "udp", i.Address())
	i.need(err)
	defer func() { _ = c.Close() }()
	datagram := make([]byte, 1200)
	for n := range 20_000 {
		_, _ = io.ReadFull(noise(uint64(n), 64), datagram)
		if n%2 == 0 {
			copy(datagram, []byte{0xc3, 0, 0, 0, 1, 8}) // the beginning of a QUIC Initial (RFC 9000 §17.2.2)
		}
		_, _ = c.Write(datagram[:1+n%len(datagram)])
	}
	i.passes("garbage at the concentrator's port")
	i.untilCarriers("datagram", "datagram", "datagram")
}

// standsStill makes one end a peer that reads and acknowledges nothing, while
// the other is given more than all uplinks can take.
func (i *intruder) standsStill(end *netlab.Process, download bool) {
	i.t.Helper()
	name := filepath.Base(end.Cmd.Path)
	timer := time.AfterFunc(400*time.Millisecond, func() { _ = end.Cmd.Process.Signal(syscall.SIGSTOP) })
	defer timer.Stop()
	defer func() { _ = end.Cmd.Process.Signal(syscall.SIGCONT) }() // if the rest is not reached
	r := i.bulk(download, 200e6, 2500*time.Millisecond)
	i.boundedMemory(name+" standing still", i.before)
	i.need(end.Cmd.Process.Signal(syscall.SIGCONT))
	if r.Loss < 0.5 {
		i.t.Errorf("%.0f %% lost: %s did not stand still", r.Loss*100, name)
	}
	i.passes(name + " going on")
}

func (i *intruder) deleteTUNs() {
	i.t.Helper()
	i.need(i.deleteLink(i.Lab.Router, "sheaf0"))
	i.need(i.Until("the router's TUN is back", func(s webui.Status) error {
		if s.Packets.TUNRestarts != 1 {
			return fmt.Errorf("%d restarts", s.Packets.TUNRestarts)
		}
		return nil
	}))
	i.passes("the router's TUN was deleted")
	for range 3 {
		index := i.index(i.Lab.Cloud, "sheaf-c0")
		i.need(i.deleteLink(i.Lab.Cloud, "sheaf-c0"))
		i.eventually("the concentrator's TUN is back", func() bool {
			now := i.index(i.Lab.Cloud, "sheaf-c0")
			return now != 0 && now != index
		})
	}
	i.passes("the concentrator's TUN was deleted")
	if _, err := i.Lab.LAN.Ping(i.t.Context(), netip.MustParseAddr("10.83.0.1"), netlab.Ping{Size: 56, Timeout: 5 * time.Second}); err != nil {
		i.t.Error(err)
	}
}

// calmLog checks that what happened thousands of times was said by each daemon at
// most once a minute.
func (w *world) calmLog() {
	w.t.Helper()
	drops := map[string]int{}
	lines, gone := 0, 0
	for line := range strings.Lines(w.log.String()) {
		switch {
		case strings.Contains(line, "kernel changed"): // as often as the test changes it
			continue
		case strings.Contains(line, "packets dropped") && strings.Contains(line, "router=lab"):
			drops["concentratord"]++
		case strings.Contains(line, "packets dropped"):
			drops["sheafd"]++
		case strings.Contains(line, "packet path is gone") && strings.Contains(line, "sheaf-c0"):
			gone++
		}
		lines++
	}
	w.t.Logf("%d lines of log, of drops: %v", lines, drops)
	for _, who := range []string{"sheafd", "concentratord"} {
		if n := drops[who]; n < 1 || n > 2 { // the test may last longer than a minute
			w.t.Errorf("%s said %d times that packets were dropped, want once", who, n)
		}
	}
	if gone != 1 {
		w.t.Errorf("concentratord said %d times that its TUN was gone, want once", gone)
	}
	if lines > 80 {
		w.t.Errorf("%d lines of log:\n%s", lines, w.log)
	}
}

func (w *world) link(h *netlab.Host, name string, do func(netlink.Link) error) error {
	return h.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return do(link)
	})
}

func (w *world) deleteLink(h *netlab.Host, name string) error {
	return w.link(h, name, netlink.LinkDel)
}

func (w *world) setMTU(h *netlab.Host, name string, mtu int) error {
	return w.link(h, name, func(l netlink.Link) error { return netlink.LinkSetMTU(l, mtu) })
}

// mtu and index are 0 while there is no such interface.
func (w *world) mtu(h *netlab.Host, name string) (mtu int) {
	_ = w.link(h, name, func(l netlink.Link) error { mtu = l.Attrs().MTU; return nil })
	return mtu
}

func (w *world) index(h *netlab.Host, name string) (index int) {
	_ = w.link(h, name, func(l netlink.Link) error { index = l.Attrs().Index; return nil })
	return index
}

// Packets that fit the TUN pass uplinks on which they do not fit one message.
func TestPacketsPassUplinksOfMTU1280(t *testing.T) {
	w := newWorld(t)
	const port = 7640
	for _, f := range families {
		w.serveUDP(w.Lab.Server, f.server, port)
	}
	for _, u := range w.Lab.Uplinks {
		w.need(u.SetMTU(1280))
	}
	w.need(w.StartBoth())
	w.untilPackets(w.Deployment)
	pass := func(what string) {
		t.Helper()
		w.untilCarriers("datagram", "datagram", "datagram")
		for _, f := range families {
			if err := ask(w.Lab.LAN, f.server, port, 1380-f.header-udpHeader, 5); err != nil {
				t.Errorf("%s: %s: %v", what, f.name, err)
			}
		}
		for _, download := range []bool{false, true} {
			if r := w.bulk(download, 20e6, time.Second); r.Loss > 0.05 {
				t.Errorf("%s: download %v: %.1f %% lost", what, download, r.Loss*100)
			}
		}
	}
	pass("from the start")
	for _, u := range w.Lab.Uplinks {
		w.need(u.SetMTU(1500))
	}
}

// The path of an uplink comes to take less while it carries packets: nobody says
// so, its long messages are lost until the carrier is dialled anew.
func TestPacketsPassWhenAnUplinksMTUFalls(t *testing.T) {
	w := up(t)
	w.untilPackets(w.Deployment)
	const port, size = 7641, 1380 - 28
	w.serveUDP(w.Lab.Server, netlab.ServerAddress, port)
	// So many in a row are answered only when none takes a way that loses them.
	pass := func(what string, patience time.Duration) {
		t.Helper()
		const want = 50
		begin := time.Now()
		for answered := 0; answered < want; {
			if time.Since(begin) > patience {
				t.Fatalf("%s: not %d packets of full size in a row were answered within %v", what, want, patience)
			}
			if err := ask(w.Lab.LAN, netlab.ServerAddress, port, size, 1); err != nil {
				answered = 0
			} else {
				answered++
			}
		}
		t.Logf("%s: passed after %v", what, time.Since(begin).Round(10*time.Millisecond))
	}
	// By then path MTU discovery has found what the uplinks take.
	for begin := time.Now(); time.Since(begin) < 3*time.Second; {
		pass("before", 20*time.Second)
	}
	w.need(w.Lab.Uplinks[0].SetMTU(1280))
	pass("after the fall", 30*time.Second)
	w.need(w.Lab.Uplinks[0].SetMTU(1500))
}
