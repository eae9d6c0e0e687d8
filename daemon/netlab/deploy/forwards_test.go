package deploy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sheaf/daemon/netlab"
	"sheaf/webui"
)

// Connections from the Internet to the LAN:
//
//	Internet server ─▶ concentrator: port ─▶ tunnel ─▶ router ─▶ LAN host: "you come from …"

// serveLAN answers in the LAN, at both families' addresses, with the client's
// address and port as the LAN host sees them: TCP on port 80, UDP on port 9000.
// What a client sends on UDP comes back behind it.
func (w *world) serveLAN() {
	w.t.Helper()
	for _, host := range []string{netlab.LANAddress, netlab.LANAddress6} {
		w.serveAt(w.Lab.LAN, net.JoinHostPort(host, "80"), func(c *net.TCPConn) { _, _ = io.WriteString(c, c.RemoteAddr().String()) })
		w.answerAt(w.Lab.LAN, net.JoinHostPort(host, "9000"), func(from net.Addr, question []byte) []byte {
			return fmt.Appendf(nil, "%s %s", from, question)
		})
	}
}

// come connects from the Internet server to a port of the concentrator.
func (w *world) come(network, host string, port int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := w.Lab.Server.Dial(ctx, network, net.JoinHostPort(host, fmt.Sprint(port)))
	if err == nil {
		w.t.Cleanup(func() { _ = c.Close() })
		err = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return c, err
}

// seenInLAN asks a forwarded port who the LAN host takes the client for; own is
// who the client is.
func (w *world) seenInLAN(network, host string, port int) (seen, own string, err error) {
	c, err := w.come(network, host, port)
	if err != nil {
		return "", "", err
	}
	own = c.LocalAddr().String()
	if network == "tcp" {
		text, err := io.ReadAll(c)
		return string(text), own, err
	}
	seen, err = echoed(c, 10)
	return seen, own, err
}

// echoed sends datagrams, half a second apart, until one comes back, and says
// whom the LAN host took it to be from.
func echoed(c net.Conn, tries int) (seen string, err error) {
	buffer := make([]byte, 2048)
	for range tries {
		_ = c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err = c.Write([]byte("hello")); err == nil {
			var n int
			if n, err = c.Read(buffer); err == nil {
				seen, _, _ = strings.Cut(string(buffer[:n]), " ")
				return seen, nil
			}
		}
		if errors.Is(err, unix.ECONNREFUSED) {
			time.Sleep(50 * time.Millisecond)
		}
	}
	return "", err
}

// untilForwards waits until the status says of each forward what is wanted: its
// name, state and words of the reason.
func (d *Deployment) untilForwards(want map[string][2]string) error {
	return d.Until("the forwards are as wanted", func(s webui.Status) error {
		if len(s.Forwards) != len(want) {
			return fmt.Errorf("the status has %d forwards, want %d", len(s.Forwards), len(want))
		}
		for _, f := range s.Forwards {
			if w, ok := want[f.Name]; !ok || f.State != w[0] || !strings.Contains(f.Reason, w[1]) || w[1] == "" && f.Reason != "" {
				return fmt.Errorf("%s is %s (%s), want %s", f.Name, f.State, f.Reason, w)
			}
		}
		return nil
	})
}

// The LAN's servers are reached from the Internet, by TCP and UDP, IPv4 and IPv6,
// and see the client or the router, as they are to.
func TestForwards(t *testing.T) {
	w := newWorld(t)
	w.need(w.StartConcentrator())
	token, err := w.Token("lab")
	w.need(err)
	const forwards = `forwards:
  - {name: web, protocol: tcp, port: 8080, to: "192.168.77.2:80", source: client}
  - {name: web-router, protocol: tcp, port: 8081, to: "192.168.77.2:80", source: router}
  - {name: web6, protocol: tcp, port: 8082, to: "[fd77::2]:80", source: client}
  - {name: bulk, protocol: tcp, port: 8083, to: "192.168.77.2:81", source: client}
  - {name: nobody, protocol: tcp, port: 8084, to: "192.168.77.2:82", source: client}
  - {name: game, protocol: udp, port: 8090, to: "192.168.77.2:9000", source: client}
  - {name: game-router, protocol: udp, port: 8091, to: "192.168.77.2:9000", source: router}
  - {name: game6, protocol: udp, port: 8092, to: "[fd77::2]:9000", source: client}
`
	active := map[string][2]string{}
	for _, name := range []string{"web", "web-router", "web6", "bulk", "nobody", "game", "game-router", "game6"} {
		active[name] = [2]string{"active", ""}
	}
	w.need(w.StartRouter(w.Settings(token) + forwards))
	w.need(w.WaitUp())
	w.need(w.untilForwards(active))
	w.serveLAN()

	const client = "the client" // address and port
	for _, c := range []struct {
		network, host string
		port          int
		sees          string
	}{
		{"tcp", netlab.CloudAddress, 8080, client},
		{"tcp", netlab.CloudAddress6, 8080, netlab.RouterAddress}, // the LAN host speaks another family
		{"tcp", netlab.CloudAddress, 8081, netlab.RouterAddress},
		{"tcp", netlab.CloudAddress6, 8082, client},
		{"tcp", netlab.CloudAddress, 8082, netlab.RouterAddress6},
		{"udp", netlab.CloudAddress, 8090, client},
		{"udp", netlab.CloudAddress, 8091, netlab.RouterAddress},
		{"udp", netlab.CloudAddress6, 8092, client},
	} {
		seen, own, err := w.seenInLAN(c.network, c.host, c.port)
		if c.sees == client && seen != own {
			t.Errorf("%s %s port %d: the LAN host sees %q, %v; want the client, %s", c.network, c.host, c.port, seen, err, own)
		} else if at, _ := netip.ParseAddrPort(seen); c.sees != client && at.Addr().String() != c.sees {
			t.Errorf("%s %s port %d: the LAN host sees %q, %v; want %s", c.network, c.host, c.port, seen, err, c.sees)
		}
	}

	t.Run("ends", w.testForwardedEnds)
	t.Run("bulk", w.testForwardedBulk)

	// What is taken away is closed, for UDP clients that go on sending too, and
	// what stays is not touched.
	stays, err := w.come("tcp", netlab.CloudAddress, 8083)
	w.need(err)
	game, err := w.come("udp", netlab.CloudAddress, 8090)
	w.need(err)
	_, err = echoed(game, 10)
	w.need(err)
	var fewer strings.Builder
	for line := range strings.Lines(forwards) {
		if !strings.Contains(line, "name: web,") && !strings.Contains(line, "name: game,") {
			fewer.WriteString(line)
		}
	}
	delete(active, "web")
	delete(active, "game")
	w.apply(w.Settings("") + fewer.String())
	w.need(w.untilForwards(active))
	w.eventually("the TCP port is closed", func() bool {
		_, err := w.come("tcp", netlab.CloudAddress, 8080)
		return errors.Is(err, unix.ECONNREFUSED)
	})
	w.eventually("the UDP port is closed to a client that goes on sending", func() bool {
		_, err := echoed(game, 3)
		return err != nil
	})
	if seen, _, err := w.seenInLAN("udp", netlab.CloudAddress, 8091); err != nil {
		t.Errorf("another forward was closed with it: %q, %v", seen, err)
	}
	early, err := w.come("udp", netlab.CloudAddress, 8090)
	w.need(err)
	if seen, err := echoed(early, 1); err == nil {
		t.Errorf("the closed UDP port answered %q", seen)
	}
	w.apply(w.Settings("") + forwards)
	w.eventually("the UDP port is open to a client that sent to it before", func() bool {
		_, err := echoed(early, 1)
		return err == nil
	})
	if _, err := stays.Write([]byte("still open\n")); err != nil {
		t.Errorf("a connection to another forward was cut: %v", err)
	}
	_ = stays.Close()
}

// testForwardedEnds: half-close, RST both ways, and a LAN host that refuses.
func (w *world) testForwardedEnds(t *testing.T) {
	handled := make(chan func(*net.TCPConn), 1)
	w.serveAt(w.Lab.LAN, netlab.LANAddress+":81", func(c *net.TCPConn) { (<-handled)(c) })
	dial := func(handle func(*net.TCPConn)) *net.TCPConn {
		t.Helper()
		handled <- handle
		c, err := w.come("tcp", netlab.CloudAddress, 8083)
		if err != nil {
			t.Fatal(err)
		}
		return c.(*net.TCPConn)
	}
	c := dial(func(c *net.TCPConn) {
		text, _ := io.ReadAll(c)
		_, _ = fmt.Fprintf(c, "%d bytes", len(text))
	})
	_, _ = c.Write(make([]byte, 100_000))
	_ = c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "100000 bytes" || err != nil {
		t.Errorf("half-close: got %q, %v", got, err)
	}

	seen := make(chan error, 1)
	c = dial(func(c *net.TCPConn) {
		_, _ = c.Write([]byte("y"))
		_, err := io.Copy(io.Discard, c)
		seen <- err
	})
	_, _ = c.Read(make([]byte, 1))
	_ = c.SetLinger(0)
	_ = c.Close()
	select {
	case err := <-seen:
		if !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("client RST: the LAN host saw %v, want connection reset", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the client's RST never reached the LAN host")
	}

	c = dial(func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)); _ = c.SetLinger(0) })
	_, _ = c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("LAN host's RST: the client saw %v, want connection reset", err)
	}

	nobody, err := w.come("tcp", netlab.CloudAddress, 8084)
	if err == nil {
		_, err = nobody.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a LAN host that refuses: the client saw %v, want connection reset", err)
	}
	handled <- func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) } // for the next to come
}

// testForwardedBulk: 20 MB each way, bonded.
func (w *world) testForwardedBulk(t *testing.T) {
	const size = 20e6
	l, err := w.Lab.LAN.Listen("tcp", netlab.LANAddress+":80")
	if err == nil {
		_ = l.Close()
		t.Fatal("nothing serves in the LAN")
	}
	w.serveAt(w.Lab.LAN, netlab.LANAddress+":82", func(c *net.TCPConn) {
		got, n, _ := sum(c)
		want, _, _ := sum(noise(5, size))
		if n == size && bytes.Equal(got.Sum(nil), want.Sum(nil)) {
			_, _ = io.Copy(c, noise(6, size))
		}
	})
	count := func() (list []uint64) {
		for _, u := range w.Lab.Uplinks {
			up, down := u.Counters()
			list = append(list, up.Bytes, down.Bytes)
		}
		return list
	}
	before := count()
	begin := time.Now()
	c, err := w.come("tcp", netlab.CloudAddress, 8084)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(begin.Add(time.Minute))
	if _, err := io.Copy(c, noise(5, size)); err != nil {
		t.Fatal(err)
	}
	_ = c.(*net.TCPConn).CloseWrite()
	got, n, err := sum(c)
	want, _, _ := sum(noise(6, size))
	if err != nil || n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Fatalf("received %d bytes of %d, or with another checksum: %v", n, int64(size), err)
	}
	var shares []float64 // of each uplink: up, down
	for i, bytes := range count() {
		shares = append(shares, float64(bytes-before[i])/size)
	}
	t.Logf("20 MB each way in %v; shares of the uplinks, up and down: %.2f", time.Since(begin).Round(time.Millisecond), shares)
	for direction := range 2 {
		used := 0
		for i := direction; i < len(shares); i += 2 {
			if shares[i] > 0.1 {
				used++
			}
		}
		if used < 2 {
			t.Errorf("direction %d was carried by %d uplinks, want several: %.2f", direction, used, shares)
		}
	}
}

// Ports that a router cannot have are refused with the reason, and the others
// come back with every restart.
func TestForwardsRefusedAndRestored(t *testing.T) {
	w := newWorld(t)
	busy, err := w.Lab.Cloud.Listen("tcp", "203.0.113.10:8100")
	w.need(err)
	busyUDP, err := w.Lab.Cloud.ListenPacket("udp", "203.0.113.10:8101")
	w.need(err)
	w.need(w.StartConcentrator())
	token, err := w.Token("lab")
	w.need(err)
	const forwards = `forwards:
  - {name: low, protocol: tcp, port: 80, to: "192.168.77.2:80"}
  - {name: own, protocol: tcp, port: 4443, to: "192.168.77.2:80"}
  - {name: own-udp, protocol: udp, port: 4443, to: "192.168.77.2:9000"}
  - {name: busy, protocol: tcp, port: 8100, to: "192.168.77.2:80"}
  - {name: busy-udp, protocol: udp, port: 8101, to: "192.168.77.2:9000"}
  - {name: web, protocol: tcp, port: 8080, to: "192.168.77.2:80"}
  - {name: game, protocol: udp, port: 8090, to: "192.168.77.2:9000"}
`
	want := map[string][2]string{
		"low": {"refused", "port 80 is not among"}, "own": {"refused", "concentrator's own"}, "own-udp": {"refused", "concentrator's own"},
		"busy": {"refused", "another program"}, "busy-udp": {"refused", "another program"}, "web": {"active", ""}, "game": {"active", ""},
	}
	w.need(w.StartRouter(w.Settings(token) + forwards))
	w.need(w.WaitUp())
	w.need(w.untilForwards(want))
	out, err := w.Sheafctl("status")
	w.need(err)
	for _, words := range []string{"web", "active", "refused", "another program", "concentrator's own"} {
		if !strings.Contains(out, words) {
			t.Errorf("sheafctl status does not say %q:\n%s", words, out)
		}
	}
	w.must(errors.Join(busy.Close(), busyUDP.Close()))

	// Another router comes too late for a port.
	other := w.startOther("other")
	others := map[string][2]string{"mine": {"refused", "another router"}, "mine-udp": {"refused", "another router"}}
	file, err := other.File("forwards.yaml", "version: 1\nlan: {interfaces: [none0]}\nuplinks:\n"+
		"  - {name: only, interface: eth0, mode: on, address: {method: existing}}\n"+`forwards:
  - {name: mine, protocol: tcp, port: 8080, to: "192.168.77.2:80"}
  - {name: mine-udp, protocol: udp, port: 8090, to: "192.168.77.2:9000"}
`)
	w.need(err)
	w.need(other.Until("the other router answers", func(webui.Status) error { return nil }))
	_, err = other.Sheafctl("apply", "-f", file)
	w.need(err)
	w.need(other.untilForwards(others))

	w.serveLAN()
	game, err := w.come("udp", netlab.CloudAddress, 8090) // goes on sending through everything
	w.need(err)
	works := func(when string) {
		t.Helper()
		w.need(w.untilForwards(want))
		if seen, own, err := w.seenInLAN("tcp", netlab.CloudAddress, 8080); seen != own || err != nil {
			t.Errorf("%s: TCP: the LAN host sees %q, %v", when, seen, err)
		}
		if seen, err := echoed(game, 10); seen != game.LocalAddr().String() {
			t.Errorf("%s: UDP: the LAN host sees %q, %v", when, seen, err)
		}
	}
	works("at first")

	// Whoever comes first after the concentrator's restart would have it.
	w.need(other.Stop())
	want["busy"], want["busy-udp"] = [2]string{"active", ""}, [2]string{"active", ""} // free by now
	w.need(w.Concentrator.Stop(15 * time.Second))
	lost := map[string][2]string{}
	for name := range want {
		lost[name] = [2]string{"pending", "tunnel is down"}
	}
	w.need(w.untilForwards(lost))
	_, _ = echoed(game, 3) // into the closed port
	w.need(w.StartConcentrator())
	w.need(w.WaitUp())
	w.need(w.untilForwards(want))
	works("after the concentrator's restart")

	c, err := w.come("tcp", netlab.CloudAddress, 8080)
	w.need(err)
	_, _ = io.ReadAll(c)
	w.serveAt(w.Lab.LAN, "192.168.77.2:83", func(c *net.TCPConn) { _, _ = c.Write([]byte("y")); _, _ = io.Copy(io.Discard, c) })
	w.apply(w.Settings("") + forwards + "  - {name: idle, protocol: tcp, port: 8085, to: \"192.168.77.2:83\"}\n")
	want["idle"] = [2]string{"active", ""}
	w.need(w.untilForwards(want))
	idle, err := w.come("tcp", netlab.CloudAddress, 8085)
	w.need(err)
	_, err = io.ReadFull(idle, make([]byte, 1))
	w.need(err)
	w.need(w.Router.Kill())
	if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the router was killed: the client of an open connection saw %v, want connection reset", err)
	}
	if late, err := w.come("tcp", netlab.CloudAddress, 8085); err == nil {
		if _, err := late.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the router was killed: a new client saw %v, want connection reset", err)
		}
	}
	_, _ = echoed(game, 2)
	w.need(w.StartRouter(""))
	w.need(w.WaitUp())
	works("after the router's crash")
	if names := forwarded(w, "lab"); !slices.Contains(names, "tcp 8080") || slices.Contains(forwarded(w, "other"), "tcp 8080") {
		t.Errorf("the concentrator lists for the router %v", names)
	}
}

// forwarded are the ports that the concentrator has open for a router.
func forwarded(w *world, name string) (ports []string) {
	w.t.Helper()
	for _, f := range w.enrolled(name).Forwards {
		ports = append(ports, fmt.Sprintf("%s %d", f.Protocol, f.Port))
	}
	return ports
}
