package netlab

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	megabit  = 1e6
	megabyte = 1_000_000
	ms       = time.Millisecond
	port     = "7000"
)

var threeUplinks = []Shape{
	{Rate: 50 * megabit, Delay: 2 * ms},
	{Rate: 30 * megabit, Delay: 4 * ms},
	{Rate: 20 * megabit, Delay: 8 * ms},
}

func TestEveryHostReachesEveryOther(t *testing.T) {
	for _, config := range []Config{
		{Uplinks: threeUplinks},
		{Uplinks: make([]Shape, MaxUplinks), Unshaped: true},
	} {
		t.Run(fmt.Sprintf("unshaped=%v", config.Unshaped), func(t *testing.T) {
			l := newLab(t, config)
			last := l.Uplinks[len(l.Uplinks)-1]
			hosts := []struct {
				host      *Host
				addresses []string
			}{
				{l.LAN, []string{LANAddress, LANAddress6}},
				{l.Router, []string{RouterAddress, RouterAddress6, last.Address(), last.Address6()}},
				{l.Core, []string{last.Gateway(), last.Gateway6()}},
				{l.Cloud, []string{CloudAddress, CloudAddress6}},
				{l.Server, []string{ServerAddress, ServerAddress6}},
			}
			for _, to := range hosts {
				serve(t, to.host, false, ":"+port, func(c net.Conn) {
					io.WriteString(c, to.host.Name)
				})
			}
			for _, from := range hosts {
				for _, to := range hosts {
					for _, address := range to.addresses {
						c := dial(t, from.host, net.JoinHostPort(address, port))
						name, err := io.ReadAll(c)
						if err != nil || string(name) != to.host.Name {
							t.Errorf("from %s to %s: reached %q: %v", from.host.Name, address, name, err)
						}
					}
				}
			}
		})
	}
}

func TestDialRefusesNames(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	_, err := l.LAN.Dial(t.Context(), "tcp", "localhost:80")
	if err == nil || !strings.Contains(err.Error(), "must be an IP address") {
		t.Errorf("dialed a name: %v", err)
	}
}

func TestRateAndRoundTrip(t *testing.T) {
	const rate, delay = 40 * megabit, 10 * ms
	l := newLab(t, Config{Uplinks: []Shape{{Rate: rate, Delay: delay}}})
	send := func(c net.Conn) {
		c.Write(make([]byte, 6*megabyte))
	}
	serve(t, l.Server, false, ":"+port, send)
	serve(t, l.LAN, false, ":"+port, send)
	serve(t, l.Server, false, ":7001", echo)

	// A machine that was busy elsewhere makes a download slow, never fast: the
	// lab's own precision is that of TestQueueIsExactOverTime, and `make bench`'s.
	const limit = rate * 1448 / 1514
	goodput := func(from *Host, to string) float64 {
		start := time.Now()
		c := dial(t, from, net.JoinHostPort(to, port))
		n, err := io.Copy(io.Discard, c)
		must(t, err)
		return float64(n) * 8 / time.Since(start).Seconds()
	}
	for _, direction := range []struct {
		name string
		from *Host
		to   string
	}{{"down", l.LAN, ServerAddress}, {"up", l.Server, LANAddress}} {
		t.Run(direction.name, func(t *testing.T) {
			best := 0.0
			for range 3 {
				best = max(best, goodput(direction.from, direction.to))
				if best > limit {
					t.Fatalf("%.2f Mbit/s over a line for %.2f", best/megabit, limit/megabit)
				}
				if best > limit/2 {
					return
				}
			}
			t.Errorf("%.2f Mbit/s at best, over a line for %.2f", best/megabit, limit/megabit)
		})
	}
	t.Run("round trip", func(t *testing.T) {
		c := dial(t, l.LAN, net.JoinHostPort(ServerAddress, "7001"))
		best := time.Hour
		for range 20 {
			rtt, err := ping(c, 5*time.Second)
			must(t, err)
			best = min(best, rtt)
		}
		if best < 2*delay || best > 3*delay {
			t.Errorf("round trip %v, want %v", best, 2*delay)
		}
	})
	t.Run("no hidden drops", func(t *testing.T) {
		must(t, l.Router.Do(func() error {
			link, err := netlink.LinkByName("wan1")
			if err == nil && link.Attrs().Statistics.TxDropped > 0 {
				t.Errorf("the TAP device dropped %d frames", link.Attrs().Statistics.TxDropped)
			}
			return err
		}))
		up, down := l.Uplinks[0].Counters()
		if up.BufferFull+down.BufferFull+up.LinkDown+down.LinkDown > 0 {
			t.Errorf("the emulator dropped frames: up %+v, down %+v", up, down)
		}
	})
}

func TestSetChangesLive(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 1)})
	serve(t, l.Server, false, ":"+port, echo)
	c := dial(t, l.LAN, net.JoinHostPort(ServerAddress, port))
	_, err := ping(c, 5*time.Second)
	must(t, err)
	must(t, l.Uplinks[0].SetUp(Shape{Delay: 30 * ms}))
	must(t, l.Uplinks[0].SetDown(Shape{Delay: 70 * ms}))
	if rtt, err := ping(c, 5*time.Second); err != nil || rtt < 100*ms {
		t.Errorf("round trip %v after Set to 30+70 ms: %v", rtt, err)
	}
	if err := l.Uplinks[0].Set(Shape{Loss: 2}); err == nil {
		t.Error("a loss of 200 % was accepted")
	}
}

func TestLoss(t *testing.T) {
	l := newLab(t, Config{Uplinks: []Shape{{Delay: ms}}, Seed: 1})
	must(t, l.Uplinks[0].SetUp(Shape{Delay: ms, Loss: 0.1}))
	sink, err := l.Server.ListenPacket("udp", ServerAddress+":"+port)
	must(t, err)
	defer sink.Close()
	c, err := l.Router.Dial(t.Context(), "udp", ServerAddress+":"+port)
	must(t, err)
	defer c.Close()
	const sent, burst = 3000, 100 // a burst fits the socket's receive buffer
	received := 0
	for range sent / burst {
		for range burst {
			_, err := c.Write([]byte("x"))
			must(t, err)
		}
		for buffer := make([]byte, 1); ; received++ {
			sink.SetReadDeadline(time.Now().Add(50 * ms))
			if _, _, err := sink.ReadFrom(buffer); err != nil {
				break
			}
		}
	}
	up, _ := l.Uplinks[0].Counters()
	if received < sent*87/100 || received > sent*93/100 {
		t.Errorf("received %d of %d datagrams at a loss of 10 %%", received, sent)
	}
	if int(up.Lost) < sent-received {
		t.Errorf("%d datagrams are missing, only %d counted as lost", sent-received, up.Lost)
	}
}

func TestBlackHole(t *testing.T) {
	l := newLab(t, Config{Uplinks: []Shape{{Delay: ms}}})
	serve(t, l.Server, false, ":"+port, echo)
	c := dial(t, l.LAN, net.JoinHostPort(ServerAddress, port))
	_, err := ping(c, 5*time.Second)
	must(t, err)

	must(t, l.Uplinks[0].BlackHole(true))
	if rtt, err := ping(c, 300*ms); err == nil {
		t.Errorf("a round trip of %v through the black hole", rtt)
	}
	must(t, l.Uplinks[0].BlackHole(false))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("TCP did not send again what the black hole had swallowed: %v", err)
	}
	if up, _ := l.Uplinks[0].Counters(); up.BlackHoled == 0 {
		t.Error("the black hole swallowed nothing")
	}
}

func TestLinkDownAndUpRestoresTheRouter(t *testing.T) {
	for _, unshaped := range []bool{false, true} {
		for name, set := range map[string]func(*Uplink, bool) error{"link": (*Uplink).Link, "carrier": (*Uplink).Carrier} {
			t.Run(fmt.Sprintf("%s unshaped=%v", name, unshaped), func(t *testing.T) {
				l := newLab(t, Config{Uplinks: make([]Shape, 2), Unshaped: unshaped})
				must(t, l.PlainVia(2))
				u := l.Uplinks[1]
				serve(t, l.Server, false, ":"+port, echo)
				before := network(t, l.Router)
				core := network(t, l.Core)

				must(t, set(u, false))
				if name == "link" {
					if n := network(t, l.Router); strings.Contains(n, "via "+u.Gateway()) || strings.Contains(n, "via "+u.Gateway6()) {
						t.Errorf("the link is down and has routes:\n%s", n)
					}
				}
				must(t, l.Router.Do(func() error {
					link, err := netlink.LinkByName(u.Interface())
					if err == nil && link.Attrs().RawFlags&unix.IFF_RUNNING != 0 {
						t.Errorf("%s is down and running", u.Interface())
					}
					return err
				}))
				ctx, cancel := context.WithTimeout(t.Context(), 200*ms)
				c, err := l.LAN.Dial(ctx, "tcp", net.JoinHostPort(ServerAddress, port))
				cancel()
				if err == nil {
					c.Close()
					t.Error("reached the server while its uplink was down")
				}

				must(t, set(u, true))
				for _, address := range []string{ServerAddress, ServerAddress6} {
					c := dial(t, l.LAN, net.JoinHostPort(address, port))
					_, err = ping(c, 5*time.Second)
					must(t, err)
				}
				eventually(t, 3*time.Second, func() string {
					return Difference(before, network(t, l.Router)) + Difference(core, network(t, l.Core))
				})
			})
		}
	}
}

func TestSetAddress(t *testing.T) {
	for _, unshaped := range []bool{false, true} {
		t.Run(fmt.Sprintf("unshaped=%v", unshaped), func(t *testing.T) {
			l := newLab(t, Config{Uplinks: make([]Shape, 2), Unshaped: unshaped})
			must(t, l.PlainVia(2))
			u := l.Uplinks[1]
			serve(t, l.Server, false, ":"+port, echo)
			before, core := network(t, l.Router), network(t, l.Core)
			changes := func(host int, address, address6 string) {
				t.Helper()
				old, old6 := u.Address(), u.Address6()
				must(t, u.SetAddress(host))
				if u.Address() != address || u.Address6() != address6 {
					t.Errorf("host %d: the addresses are %s and %s", host, u.Address(), u.Address6())
				}
				n := network(t, l.Router)
				for _, gone := range []string{old, old6} {
					if strings.Contains(n, "address "+gone+"/") {
						t.Errorf("host %d: the router still has %s:\n%s", host, gone, n)
					}
				}
				for _, now := range []string{address, address6} {
					if !strings.Contains(n, "address "+now+"/") {
						t.Errorf("host %d: the router has no %s:\n%s", host, now, n)
					}
				}
			}
			reaches := func() {
				t.Helper()
				for _, server := range []string{ServerAddress, ServerAddress6} {
					_, err := ping(dial(t, l.LAN, net.JoinHostPort(server, port)), 5*time.Second)
					must(t, err)
				}
			}
			changes(77, "10.2.0.77", "2001:db8:2::4d")
			reaches()

			// While the link is down the new addresses wait.
			must(t, u.Link(false))
			must(t, u.SetAddress(200))
			if n := network(t, l.Router); strings.Contains(n, "address 10.2.0.") {
				t.Errorf("the link is down and has got an address:\n%s", n)
			}
			must(t, u.Link(true))
			reaches()

			changes(2, "10.2.0.2", "2001:db8:2::2")
			reaches()
			eventually(t, 3*time.Second, func() string {
				return Difference(before, network(t, l.Router)) + Difference(core, network(t, l.Core))
			})
			for _, host := range []int{1, 255} {
				if err := u.SetAddress(host); err == nil {
					t.Errorf("host %d was taken", host)
				}
			}
		})
	}
}

func TestPlainVia(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 3)})
	before := network(t, l.Router) + network(t, l.Core)
	const size = 300_000
	serve(t, l.Server, false, ":"+port, func(c net.Conn) {
		io.CopyN(io.Discard, c, size)
		c.Write(make([]byte, size))
	})
	bytes := func() (up, down [3]uint64) {
		for i, u := range l.Uplinks {
			a, b := u.Counters()
			up[i], down[i] = a.Bytes, b.Bytes
		}
		return up, down
	}
	for _, number := range []int{1, 3, 2, 1} {
		must(t, l.PlainVia(number))
		for _, address := range []string{ServerAddress, ServerAddress6} {
			up0, down0 := bytes()
			c := dial(t, l.LAN, net.JoinHostPort(address, port))
			_, err := c.Write(make([]byte, size))
			must(t, err)
			_, err = io.CopyN(io.Discard, c, size)
			must(t, err)
			up1, down1 := bytes()
			for i := range l.Uplinks {
				up, down := up1[i]-up0[i], down1[i]-down0[i]
				if carried := up > size && down > size; carried != (i+1 == number) {
					t.Errorf("plain traffic to %s via wan%d: wan%d carried %d up, %d down", address, number, i+1, up, down)
				}
			}
		}
	}
	if d := Difference(before, network(t, l.Router)+network(t, l.Core)); d != "" {
		t.Errorf("back at wan1, the network differs:\n%s", d)
	}
	if err := l.PlainVia(4); err == nil {
		t.Error("there is no wan4, and plain traffic goes there")
	}
}

// The daemon's setting in small: one MPTCP connection over all uplinks, each
// by its own routing table.
func TestMultipathUsesAllUplinks(t *testing.T) {
	l := newLab(t, Config{Uplinks: threeUplinks})
	before := network(t, l.Router)
	must(t, l.Router.Do(func() error {
		for _, u := range l.Uplinks {
			link, err := netlink.LinkByName(u.Interface())
			if err != nil {
				return err
			}
			table := 100 + u.Number
			rule := netlink.NewRule()
			rule.Src = &net.IPNet{IP: net.ParseIP(u.Address()), Mask: net.CIDRMask(32, 32)}
			rule.Table, rule.Priority = table, 1000
			if err := netlink.RuleAdd(rule); err != nil {
				return err
			}
			route := netlink.Route{LinkIndex: link.Attrs().Index, Table: table, Gw: net.ParseIP(u.Gateway())}
			if err := netlink.RouteAdd(&route); err != nil {
				return err
			}
		}
		return nil
	}))
	const subflow, setLimits, addAddress = 2, 5, 1
	multipathCommand(t, l.Cloud, setLimits, limits)
	multipathCommand(t, l.Router, setLimits, limits)
	for _, u := range l.Uplinks[1:] {
		multipathCommand(t, l.Router, addAddress, func(e *mdnetlink.AttributeEncoder) {
			e.Nested(mptcpAddress, func(e *mdnetlink.AttributeEncoder) error {
				e.Uint16(1, unix.AF_INET)
				e.Bytes(mptcpAddress4, net.ParseIP(u.Address()).To4())
				e.Uint32(mptcpAddressFlags, subflow)
				return nil
			})
		})
	}
	added := Difference(before, network(t, l.Router))
	for _, want := range []string{
		"+ mptcp endpoint 10.2.0.2 id 1 port 0 flags 0x2 ifindex 0",
		"+ mptcp limit subflows 8",
		"+ rule ipv4 1000 from 10.1.0.2/32 table 101",
		"+ route ipv4 table 103 0.0.0.0/0 via 10.3.0.1 dev wan3",
	} {
		if !strings.Contains(added, want) {
			t.Errorf("Network does not show %q, but:\n%s", want, added)
		}
	}

	const size = 8 * megabyte
	serve(t, l.Cloud, true, ":"+port, func(c net.Conn) {
		io.ReadFull(c, make([]byte, 1))
		c.Write(make([]byte, size))
	})
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(l.Uplinks[0].Address())}}
	d.SetMultipathTCP(true)
	c, err := l.Router.DialWith(t.Context(), d, "tcp", net.JoinHostPort(CloudAddress, port))
	must(t, err)
	defer c.Close()
	if multipath, err := c.(*net.TCPConn).MultipathTCP(); err != nil || !multipath {
		t.Fatalf("the connection fell back to TCP: %v", err)
	}
	_, err = c.Write([]byte{1})
	must(t, err)
	_, err = io.CopyN(io.Discard, c, size)
	must(t, err)
	for _, u := range l.Uplinks {
		if _, down := u.Counters(); down.Bytes < size/20 {
			t.Errorf("%s carried %d of %d bytes", u.Interface(), down.Bytes, size)
		}
	}
}

func limits(e *mdnetlink.AttributeEncoder) {
	e.Uint32(mptcpReceiveAddAddresses, 8)
	e.Uint32(mptcpSubflows, 8)
}

func multipathCommand(t *testing.T, h *Host, command uint8, attributes func(*mdnetlink.AttributeEncoder)) {
	t.Helper()
	must(t, h.Do(func() error {
		c, err := genetlink.Dial(nil)
		if err != nil {
			return err
		}
		defer c.Close()
		family, err := c.GetFamily(mptcpFamily)
		if err != nil {
			return err
		}
		e := mdnetlink.NewAttributeEncoder()
		attributes(e)
		data, err := e.Encode()
		if err != nil {
			return err
		}
		_, err = c.Execute(genetlink.Message{Header: genetlink.Header{Command: command, Version: mptcpVersion}, Data: data},
			family.ID, mdnetlink.Request|mdnetlink.Acknowledge)
		return err
	}))
}

func TestConfigIsRefused(t *testing.T) {
	for want, config := range map[string]Config{
		"0 uplinks":         {},
		"9 uplinks":         {Uplinks: make([]Shape, 9)},
		"Uplinks[1]: shape": {Uplinks: []Shape{{}, {Delay: -1}}},
		"Unshaped is set":   {Uplinks: []Shape{{Rate: 1}}, Unshaped: true},
	} {
		l, err := New(config)
		if err == nil {
			l.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v, want %q", config, err, want)
		}
	}
}

func TestNewWithoutRoot(t *testing.T) {
	// Of this thread only, which ends with the goroutine if that cannot be undone.
	setEffectiveUser := func(uid int) {
		const keep = ^uintptr(0)
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
			t.Fatalf("become user %d: %v", uid, errno)
		}
	}
	runtime.LockOSThread()
	setEffectiveUser(65534)
	l, err := New(Config{Uplinks: make([]Shape, 1)})
	setEffectiveUser(0)
	runtime.UnlockOSThread()
	if err == nil {
		l.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "needs root") {
		t.Errorf("New as user 65534: %v", err)
	}
}

func network(t *testing.T, h *Host) string {
	t.Helper()
	n, err := h.Network()
	must(t, err)
	return n
}

func TestARemovedDeviceStopsOnlyItsUplink(t *testing.T) {
	l := newLab(t, Config{Uplinks: make([]Shape, 2)})
	must(t, l.PlainVia(2))
	serve(t, l.Server, false, ":"+port, echo)
	must(t, l.Router.Do(func() error {
		link, err := netlink.LinkByName("wan1")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	}))
	cpu := func() time.Duration {
		var u unix.Rusage
		must(t, unix.Getrusage(unix.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := cpu()
	time.Sleep(300 * ms)
	if used := cpu() - before; used > 150*ms {
		t.Errorf("%v of CPU in 300 ms of nothing to do", used)
	}
	_, err := ping(dial(t, l.LAN, net.JoinHostPort(ServerAddress, port)), 5*time.Second)
	must(t, err)
}
