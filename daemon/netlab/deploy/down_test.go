package deploy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/netlab"
	"sheaf/webui"
)

// What the LAN gets while the tunnel is down, and what its resolver is:
//
//	LAN ─ watch ─▶ router ─┬▶ tunnel ─▶ VM ─┬▶ reflector: "you come from …"
//	                       └▶ best uplink ──┘
//	LAN ─ chatter ─▶ router ─▶ captures on every uplink: nothing but the tunnel

// reflect answers on a port of the Internet server, by UDP and by TCP, IPv4 and
// IPv6, with the address that the server sees the client come from.
func (w *world) reflect(port string) {
	w.t.Helper()
	for _, address := range []string{netlab.ServerAddress, netlab.ServerAddress6} {
		address = net.JoinHostPort(address, port)
		w.serve(address, func(c *net.TCPConn) {
			_, _ = io.WriteString(c, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().String())
		})
		w.answerAt(w.Lab.Server, address, func(from net.Addr, question []byte) []byte {
			return append(slices.Clone(question), " "+from.(*net.UDPAddr).AddrPort().Addr().Unmap().String()...)
		})
	}
}

// reflection is one answer of a reflector: when it was asked for, when it came,
// and whom the server saw.
type reflection struct {
	asked, came time.Time
	seen        string
}

// A watch asks a reflector from the LAN all the time: 50 times a second over one
// UDP flow, and by five new TCP connections a second, of both families.
type watch struct {
	w *world

	mu          sync.Mutex
	reflections map[string][]reflection // by kind: udp4, udp6, tcp4, tcp6
}

func (w *world) watch(port string) *watch {
	w.t.Helper()
	x := &watch{w: w, reflections: map[string][]reflection{}}
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	for family, server := range map[string]string{"4": netlab.ServerAddress, "6": netlab.ServerAddress6} {
		address := net.JoinHostPort(server, port)
		c, err := w.Lab.LAN.Dial(ctx, "udp", address)
		w.need(err)
		work.Go(func() {
			each(ctx, 20*time.Millisecond, func() {
				_, _ = c.Write(strconv.AppendInt(nil, time.Now().UnixNano(), 10)) // an ICMP error about an earlier one
			})
			_ = c.Close()
		})
		work.Go(func() {
			buffer := make([]byte, 2048)
			for ctx.Err() == nil {
				n, err := c.Read(buffer)
				if err != nil {
					continue // likewise
				}
				asked, seen, _ := strings.Cut(string(buffer[:n]), " ")
				if nanoseconds, err := strconv.ParseInt(asked, 10, 64); err == nil {
					x.add("udp"+family, reflection{time.Unix(0, nanoseconds), time.Now(), seen})
				}
			}
		})
		work.Go(func() {
			each(ctx, 200*time.Millisecond, func() {
				work.Go(func() {
					asked := time.Now()
					if seen, err := w.ask(ctx, address); err == nil {
						x.add("tcp"+family, reflection{asked, time.Now(), seen})
					}
				})
			})
		})
	}
	w.t.Cleanup(func() { cancel(); work.Wait() })
	return x
}

// each calls f at once and then every so often, until ctx ends.
func each(ctx context.Context, every time.Duration, f func()) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		f()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// ask connects to a reflector from the LAN by TCP.
func (w *world) ask(ctx context.Context, address string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := w.Lab.LAN.Dial(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	seen, err := io.ReadAll(c)
	return string(seen), err
}

func (x *watch) add(kind string, r reflection) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.reflections[kind] = append(x.reflections[kind], r)
}

// The addresses that a server sees, by what the client speaks.
var (
	fromVM = map[string]string{
		"udp4": netlab.CloudAddress, "tcp4": netlab.CloudAddress, "udp6": netlab.CloudAddress6, "tcp6": netlab.CloudAddress6,
	}
	fromUplink1 = map[string]string{"udp4": "10.1.0.2", "tcp4": "10.1.0.2", "udp6": "2001:db8:1::2", "tcp6": "2001:db8:1::2"}
)

// turn waits until what is asked after a moment is seen to come from the wanted
// addresses, and says how long after the moment that was.
func (x *watch) turn(moment time.Time, want map[string]string) map[string]time.Duration {
	x.w.t.Helper()
	took := map[string]time.Duration{}
	for kind, address := range want {
		first := func() (time.Duration, bool) {
			x.mu.Lock()
			defer x.mu.Unlock()
			for _, r := range x.reflections[kind] {
				if r.asked.After(moment) && r.seen == address {
					return r.came.Sub(moment), true
				}
			}
			return 0, false
		}
		for {
			after, ok := first()
			if ok {
				took[kind] = after
				break
			}
			if time.Since(moment) > patience {
				x.mu.Lock()
				all := x.reflections[kind]
				x.mu.Unlock()
				x.w.t.Fatalf("%s: nothing was seen to come from %s within %v; the last of %d answers: %+v", kind, address, patience, len(all), all[max(0, len(all)-3):])
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	return took
}

// others lists whom else the server saw in what was asked between two moments.
func (x *watch) others(from, to time.Time, want map[string]string) (strangers []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for kind, list := range x.reflections {
		for _, r := range list {
			if r.asked.After(from) && r.asked.Before(to) && r.seen != want[kind] {
				strangers = append(strangers, kind+" "+r.seen)
			}
		}
	}
	slices.Sort(strangers)
	return slices.Compact(strangers)
}

// isolateConcentrator makes the Internet swallow, without a sign, what goes to
// the concentrator or comes from it, and nothing else; or ends that.
func (w *world) isolateConcentrator(on bool) error {
	return w.Lab.Core.Do(func() error {
		for _, address := range []string{netlab.CloudAddress + "/32", netlab.CloudAddress6 + "/128"} {
			_, network, err := net.ParseCIDR(address)
			if err != nil {
				return err
			}
			to, from := netlink.NewRule(), netlink.NewRule()
			to.Dst, from.Src = network, network
			for i, rule := range []*netlink.Rule{to, from} {
				rule.Type, rule.Priority = unix.RTN_BLACKHOLE, 100+i
				rule.Family = netlink.FAMILY_V4
				if network.IP.To4() == nil {
					rule.Family = netlink.FAMILY_V6
				}
				change := netlink.RuleDel
				if on {
					change = netlink.RuleAdd
				}
				if err := change(rule); err != nil {
					return fmt.Errorf("rule %v: %w", rule, err)
				}
			}
		}
		return nil
	})
}

// turnTime is the time in which the LAN is to leave by an uplink, and to be back
// in the tunnel: three seconds, and two for a busy machine.
const turnTime = 5 * time.Second

// With when_tunnel_down direct the LAN leaves by the best uplink, which neither
// the settings name first nor the main table prefers, soon after the tunnel's
// loss, and goes back into the tunnel soon after its return.
func TestDirectWhileTheTunnelIsDown(t *testing.T) {
	w := newWorld(t)
	w.need(w.Lab.PlainVia(3))
	w.before[w.Lab.Router.Name] = w.network(w.Lab.Router)
	w.need(w.StartConcentrator())
	token, err := w.Token("lab")
	w.need(err)
	lines := strings.Split(w.Settings(token), "\n")
	first := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "uplink1") })
	slices.Reverse(lines[first : first+len(w.Lab.Uplinks)])
	w.need(w.StartRouter(strings.Join(lines, "\n") + "when_tunnel_down: direct\n"))
	w.need(w.WaitUp())
	w.reflect("7600")
	x := w.watch("7600")

	for _, loss := range []struct {
		name         string
		lose, regain func() error
	}{
		{"the concentrator killed", func() error { return w.Concentrator.Kill() }, func() error { return w.StartConcentrator() }},
		{"the way to it black-holed", func() error { return w.isolateConcentrator(true) }, func() error { return w.isolateConcentrator(false) }},
	} {
		x.turn(time.Now(), fromVM)
		moment := time.Now()
		w.need(loss.lose())
		down := x.turn(moment, fromUplink1)
		t.Logf("%s: direct after %v", loss.name, down)

		settled := time.Now()
		time.Sleep(2 * time.Second)
		if strangers := x.others(settled, time.Now(), fromUplink1); len(strangers) > 0 {
			t.Errorf("%s: while the tunnel was down the server also saw %v", loss.name, strangers)
		}
		s, err := w.Status()
		w.need(err)
		if s.Tunnel.State != "down" || s.Packets.State != "down" {
			t.Errorf("%s: the status says tunnel %s, packets %s", loss.name, s.Tunnel.State, s.Packets.State)
		}

		moment = time.Now()
		w.need(loss.regain())
		up := x.turn(moment, fromVM)
		t.Logf("%s: back in the tunnel after %v", loss.name, up)
		for kind := range fromVM {
			if down[kind] > turnTime || up[kind] > turnTime {
				t.Errorf("%s: %s was direct after %v and back after %v, want %v at most", loss.name, kind, down[kind], up[kind], turnTime)
			}
		}
	}
}

// lan are the networks behind the router, which nobody outside may see.
var lan = []netip.Prefix{netip.MustParsePrefix(netlab.LANPrefix), netip.MustParsePrefix(netlab.LANPrefix6)}

// leaks says whether a frame on an uplink is anything but the tunnel: packets
// between the uplink's address and the concentrator's port, errors about those,
// and what neighbors say to each other. After a clean stop, which takes the rules
// away, the router's kernel resets late segments of any uplink's subflows by the
// main table: those tell of no client.
func leaks(uplink *netlab.Uplink, all []*netlab.Uplink) func(netlab.Frame) bool {
	own := []netip.Addr{netip.MustParseAddr(uplink.Address()), netip.MustParseAddr(uplink.Address6())}
	var router []netip.Addr
	for _, u := range all {
		router = append(router, netip.MustParseAddr(u.Address()), netip.MustParseAddr(u.Address6()))
	}
	concentrator := netip.MustParseAddr(netlab.CloudAddress)
	return func(f netlab.Frame) bool {
		near, far := f.Source, f.Destination
		if !f.Outgoing {
			near, far = far, near
		}
		for _, network := range lan {
			if network.Contains(near.Addr()) || network.Contains(far.Addr()) {
				return true
			}
		}
		switch {
		case f.EtherType == unix.ETH_P_ARP:
			return false
		case f.Protocol == unix.IPPROTO_ICMPV6 && f.ICMPType >= 130: // MLD (RFC 2710, RFC 3810) and ND (RFC 4861)
			return false
		case f.Outgoing && f.Protocol == unix.IPPROTO_TCP && f.TCPFlags&^16 == 4 && slices.Contains(router, near.Addr()):
			return far != netip.AddrPortFrom(concentrator, concentratorPort)
		case !slices.Contains(own, near.Addr()) || far.Addr() != concentrator:
			return true
		case f.Protocol == unix.IPPROTO_ICMP:
			return f.ICMPType != 3
		}
		return far.Port() != concentratorPort
	}
}

// captures of all uplinks; stop ends them and says what leaked, and how many
// frames there were.
type captures []*netlab.Capture

func (w *world) capture() captures {
	w.t.Helper()
	var all captures
	for _, u := range w.Lab.Uplinks {
		c, err := w.Lab.Router.Capture(u.Interface(), leaks(u, w.Lab.Uplinks))
		w.need(err)
		all = append(all, c)
	}
	return all
}

func (all captures) stop(w *world) (leaked []string, frames uint64) {
	w.t.Helper()
	for i, c := range all {
		r, err := c.Stop()
		w.must(err)
		frames += r.Frames
		for _, f := range r.First[:min(len(r.First), 5)] {
			leaked = append(leaked, fmt.Sprintf("wan%d, one of %d, at %s, outgoing %v: type %#x %v",
				i+1, r.Matched, f.At.UTC().Format("15:04:05.000"), f.Outgoing, f.EtherType, f.Packet))
		}
	}
	return leaked, frames
}

// chatter is what clients of the LAN send whether or not anybody answers: UDP,
// ICMP, TCP and DNS of both families, to the Internet, to the uplinks' gateways,
// to the concentrator and to the router. The result counts what was sent.
func (w *world) chatter() (sent *atomic.Int64, stop func()) {
	w.t.Helper()
	sent = new(atomic.Int64)
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	for _, to := range []string{
		"198.51.100.20:9", "[2001:db8:e::20]:9", "198.51.100.20:53", "[2001:db8:e::20]:53", "10.1.0.1:9", "[2001:db8:1::1]:9",
		"10.2.0.2:9", netlab.CloudAddress + ":4443", "192.168.77.1:53", "[fd77::1]:53",
	} {
		work.Go(func() {
			each(ctx, 10*time.Millisecond, func() {
				// A new flow each time: none may find a way that an older one has opened.
				c, err := w.Lab.LAN.Dial(ctx, "udp", to)
				if err != nil {
					return
				}
				if _, err := c.Write(make([]byte, 40)); err == nil {
					sent.Add(1)
				}
				_ = c.Close()
			})
		})
	}
	for _, to := range []string{netlab.ServerAddress, netlab.ServerAddress6, netlab.CloudAddress, "10.3.0.1", "2001:db8:2::1"} {
		work.Go(func() {
			each(ctx, 50*time.Millisecond, func() {
				sent.Add(1)
				_, _ = w.Lab.LAN.Ping(ctx, netip.MustParseAddr(to), netlab.Ping{Size: 40, Timeout: 50 * time.Millisecond})
			})
		})
	}
	for _, to := range []string{"198.51.100.20:9", "[2001:db8:e::20]:9", "10.1.0.1:9", "192.168.77.1:53", netlab.CloudAddress + ":4443"} {
		work.Go(func() {
			each(ctx, 100*time.Millisecond, func() {
				sent.Add(1)
				c, err := w.Lab.LAN.DialWith(ctx, net.Dialer{Timeout: 300 * time.Millisecond}, "tcp", to)
				if err == nil {
					_, _ = c.Write([]byte("x"))
					_ = c.Close()
				}
			})
		})
	}
	stop = sync.OnceFunc(func() { cancel(); work.Wait() })
	w.t.Cleanup(stop)
	return sent, stop
}

// blocked is the settings of a router of which nothing leaves but by the tunnel.
func (w *world) blocked(token string) string { return w.Settings(token) + "when_tunnel_down: block\n" }

// Cleanup of what is left is an operator's last step.
func (w *world) cleanup(h *netlab.Host, program, state string) {
	w.t.Helper()
	_, err := run(h, filepath.Join(w.Binaries, program), "cleanup", "--state-dir", state)
	w.need(err)
}

func (w *world) cleanupRouter() {
	w.t.Helper()
	w.cleanup(w.Lab.Router, "sheafd", filepath.Join(w.Dir, "router"))
}

func (w *world) untilDown() {
	w.t.Helper()
	w.need(w.Until("the tunnel is down", func(s webui.Status) error {
		if s.Tunnel.State != "down" || s.Packets.State != "down" {
			return fmt.Errorf("tunnel %s, packets %s", s.Tunnel.State, s.Packets.State)
		}
		return nil
	}))
}

// With when_tunnel_down block nothing of the LAN is ever on an uplink outside the
// tunnel. The lab's router forwards plainly before sheafd's first start, as it
// would for anybody: so the clients begin after a first start and stop, which
// leave the barrier.
func TestBlockLeaksNothing(t *testing.T) {
	w := newWorld(t)
	all := w.capture()
	w.need(w.StartConcentrator())
	token, err := w.Token("lab")
	w.need(err)
	w.need(w.StartRouter(w.blocked(token)))
	w.need(w.WaitUp())
	w.need(w.Router.Stop(15 * time.Second))

	sent, stop := w.chatter()
	w.reflect("7610")
	through := func(when string) {
		t.Helper()
		for _, address := range []string{"198.51.100.20:7610", "[2001:db8:e::20]:7610"} {
			if seen, err := w.ask(context.Background(), address); err != nil || seen != netlab.CloudAddress && seen != netlab.CloudAddress6 {
				t.Errorf("%s: the server saw %q, %v; want the concentrator", when, seen, err)
			}
		}
	}
	time.Sleep(300 * time.Millisecond)
	w.need(w.StartRouter("")) // a start
	w.need(w.WaitUp())
	through("after the start") // a normal run
	w.need(w.Concentrator.Kill())
	w.untilDown() // an outage
	time.Sleep(500 * time.Millisecond)
	w.need(w.StartConcentrator())
	w.need(w.WaitUp())
	through("after the outage")
	w.need(w.Router.Kill()) // a crash
	time.Sleep(700 * time.Millisecond)
	w.need(w.StartRouter("")) // the restart
	w.need(w.WaitUp())
	through("after the crash")
	w.need(w.Router.Stop(15 * time.Second))                                                                                                           // a clean stop
	if left := w.network(w.Lab.Router); !strings.Contains(left, "table 8363 type 7 0.0.0.0/0") || !strings.Contains(left, "table 8363 type 7 ::/0") { // RTN_UNREACHABLE
		t.Errorf("the clean stop left no barrier:\n%s", left)
	}
	time.Sleep(700 * time.Millisecond)
	leaked, frames := all.stop(w)
	if len(leaked) > 0 {
		t.Errorf("leaked:\n%s", strings.Join(leaked, "\n"))
	}
	t.Logf("%d packets of clients, %d frames on the uplinks, %d leaks", sent.Load(), frames, len(leaked))
	if sent.Load() < 2000 {
		t.Errorf("the clients sent %d packets: too few to prove anything", sent.Load())
	}

	// The same clients and captures without us: so much would have been seen.
	all = w.capture()
	w.cleanupRouter()
	time.Sleep(300 * time.Millisecond)
	stop()
	if leaked, _ := all.stop(w); len(leaked) == 0 {
		t.Error("without sheafd the captures saw no packet of the LAN either: this test proves nothing")
	}
}

// sysctls are those of a Host that routing may change, by path.
func (w *world) sysctls(h *netlab.Host) map[string]string {
	w.t.Helper()
	values := map[string]string{}
	w.need(h.Do(func() error {
		for _, pattern := range []string{
			"ipv4/ip_forward", "ipv4/conf/*/forwarding", "ipv4/conf/*/rp_filter", "ipv6/conf/*/forwarding", "ipv6/conf/*/accept_ra",
		} {
			paths, err := filepath.Glob("/proc/sys/net/" + pattern)
			if err != nil {
				return err
			}
			for _, path := range paths {
				text, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				values[strings.TrimPrefix(path, "/proc/sys/net/")] = strings.TrimSpace(string(text))
			}
		}
		return nil
	}))
	return values
}

// changes lists what differs.
func changes(before, after map[string]string) (list []string) {
	all := maps.Clone(before)
	maps.Copy(all, after)
	for _, path := range slices.Sorted(maps.Keys(all)) {
		if before[path] != after[path] {
			list = append(list, fmt.Sprintf("%s was %q, is %q", path, before[path], after[path]))
		}
	}
	return list
}

// On machines that do not forward, both daemons make them, the router only behind
// its barrier; and they put back every sysctl, at the end or by cleanup after a
// crash.
func TestForwardingComesBehindTheBarrierAndGoes(t *testing.T) {
	w := newWorld(t)
	hosts := []*netlab.Host{w.Lab.Router, w.Lab.Cloud}
	before := map[string]map[string]string{}
	for _, h := range hosts {
		w.need(h.SetSysctl("net/ipv4/ip_forward", "0"))
		w.need(h.SetSysctl("net/ipv6/conf/all/forwarding", "0"))
		// A modem's interface that takes router advertisements, and one that
		// filters strictly.
		w.need(h.SetSysctl("net/ipv6/conf/lo/accept_ra", "1"))
	}
	w.need(w.Lab.Router.SetSysctl("net/ipv6/conf/wan1/accept_ra", "1"))
	w.need(w.Lab.Router.SetSysctl("net/ipv4/conf/wan2/rp_filter", "1"))
	for _, h := range hosts {
		before[h.Name] = w.sysctls(h)
		w.before[h.Name] = w.network(h)
	}
	asBefore := func(when string) {
		t.Helper()
		for _, h := range hosts {
			if list := changes(before[h.Name], w.sysctls(h)); len(list) > 0 {
				t.Errorf("%s, sysctls of %s:\n%s", when, h.Name, strings.Join(list, "\n"))
			}
		}
	}

	all := w.capture()
	_, stop := w.chatter() // from before the first start: nothing forwards but sheafd
	w.need(w.StartConcentrator())
	token, err := w.Token("lab")
	w.need(err)
	w.need(w.StartRouter(w.blocked(token)))
	w.need(w.WaitUp())
	w.reflect("7620")
	x := w.watch("7620")
	x.turn(time.Now(), fromVM) // it forwards now
	for _, h := range hosts {
		if len(changes(before[h.Name], w.sysctls(h))) == 0 {
			t.Errorf("no sysctl of %s has changed: this test proves nothing", h.Name)
		}
	}
	w.need(w.Stop())
	stop()
	leaked, frames := all.stop(w)
	if len(leaked) > 0 || frames == 0 {
		t.Errorf("leaked at the first start or the stop, of %d frames:\n%s", frames, strings.Join(leaked, "\n"))
	}
	asBefore("after a clean stop")
	w.barrierFirst()

	w.need(w.StartConcentrator())
	file, err := w.File("direct.yaml", w.Settings("")+"when_tunnel_down: direct\n")
	w.need(err)
	w.need(w.StartRouter(""))
	_, err = w.Sheafctl("apply", "-f", file)
	w.need(err)
	w.need(w.WaitUp())
	x.turn(time.Now(), fromVM)
	w.need(errors.Join(w.Router.Kill(), w.Concentrator.Kill()))
	w.cleanupRouter()
	w.cleanup(w.Lab.Cloud, "concentratord", w.concentratorState())
	asBefore("after a crash and cleanup")
}

// barrierFirst checks the order in which sheafd's log says that it changed the
// kernel.
func (w *world) barrierFirst() {
	w.t.Helper()
	position := func(words string) int {
		for i, line := range strings.Split(w.log.String(), "\n") {
			if strings.Contains(line, words) && !strings.Contains(line, "sheaf-c0") {
				return i
			}
		}
		w.t.Fatalf("sheafd's log does not say %q", words)
		return 0
	}
	forwarding := min(position("net.ipv4.conf.lan0.forwarding=1"), position("net.ipv4.conf.sheaf0.forwarding=1"))
	for _, barrier := range []string{"ip rule add iif lan0", "ip -6 rule add iif lan0", "ip route add unreachable", "ip -6 route add unreachable", "nft replace table inet sheaf "} {
		if at := position(barrier); at > forwarding {
			w.t.Errorf("the log says %q after forwarding was turned on", barrier)
		}
	}
}

// What the LAN asks the router is answered by the concentrator's resolver, asked
// from the VM's address; while the tunnel is down by the best uplink's, or with
// when_tunnel_down block by nobody.
func TestDNSOfTheLAN(t *testing.T) {
	w := newWorld(t)
	name := func(last byte) (netip.Addr, netip.Addr) {
		return netip.AddrFrom4([4]byte{192, 0, 2, last}), netip.MustParseAddr(fmt.Sprintf("2001:db8:ffff::%d", last))
	}
	// Each resolver has answers of its own.
	const ofConcentrator, ofUplink, ofGateway = 1, 2, 3
	var resolvers []*netlab.DNSServer
	for _, r := range []struct {
		host    *netlab.Host
		address string
		last    byte
	}{
		{w.Lab.Server, "198.51.100.20:53", ofConcentrator},
		{w.Lab.Core, "203.0.113.1:53", ofUplink}, {w.Lab.Core, "[2001:db8:c::1]:53", ofUplink},
		{w.Lab.Core, "10.1.0.1:53", ofGateway},
	} {
		four, six := name(r.last)
		server, err := r.host.ServeDNS(r.address, four, six)
		w.need(err)
		t.Cleanup(func() { w.must(server.Close()) })
		resolvers = append(resolvers, server)
	}
	// ask asks for both families by both protocols at both of the router's
	// addresses, and says who answered.
	ask := func(at ...string) map[string]byte {
		t.Helper()
		answered := map[string]byte{}
		for _, server := range at {
			for _, network := range []string{"udp", "tcp"} {
				for _, six := range []bool{false, true} {
					what := fmt.Sprintf("%s %s six=%v", server, network, six)
					got, err := w.Lab.LAN.LookupDNS(context.Background(), network, server, "www.example.", six)
					for _, last := range []byte{ofConcentrator, ofUplink, ofGateway} {
						four, sixth := name(last)
						if want := map[bool]netip.Addr{false: four, true: sixth}[six]; err == nil && slices.Equal(got, []netip.Addr{want}) {
							answered[what] = last
						}
					}
					if answered[what] == 0 {
						t.Logf("%s: %v, %v", what, got, err)
					}
				}
			}
		}
		return answered
	}
	answeredBy := func(when string, last byte, at ...string) {
		t.Helper()
		deadline := time.Now().Add(patience)
		for {
			got := ask(at...)
			wrong := len(got) != 4*len(at)
			for _, by := range got {
				wrong = wrong || by != last
			}
			if !wrong {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: answered by %v, want %d everywhere", when, got, last)
			}
		}
	}
	status := func(when, server, through string) {
		t.Helper()
		s, err := w.Status()
		w.need(err)
		if s.DNS.Server != server || s.DNS.Through != through {
			t.Errorf("%s: the status says %+v, want %s through %q", when, s.DNS, server, through)
		}
	}
	const router, router6 = "192.168.77.1:53", "[fd77::1]:53"

	var mu sync.Mutex
	sources := map[netip.Addr]int{}
	seen, err := w.Lab.Server.Capture("eth0", func(f netlab.Frame) bool {
		if !f.Outgoing && f.Destination.Port() == 53 {
			mu.Lock()
			sources[f.Source.Addr()]++
			mu.Unlock()
		}
		return false
	})
	w.need(err)
	w.need(w.StartConcentrator("--resolver", "198.51.100.20:53"))
	token, err := w.Token("lab")
	w.need(err)
	w.need(w.StartRouter(w.Settings(token)))
	w.need(w.WaitUp())
	answeredBy("through the tunnel", ofConcentrator, router, router6)
	status("through the tunnel", "10.83.0.1", "tunnel")
	_, err = seen.Stop()
	w.must(err)
	if len(sources) != 1 || sources[netip.MustParseAddr(netlab.CloudAddress)] == 0 {
		t.Errorf("the concentrator's resolver was asked from %v, want the VM's address", sources)
	}

	w.need(w.Concentrator.Stop(15 * time.Second))
	w.untilDown()
	answeredBy("direct, without resolvers", ofGateway, router)
	status("direct, without resolvers", "10.1.0.1", "uplink uplink1")
	w.apply(strings.Replace(w.Settings(""), "name: uplink1,", "name: uplink1, resolvers: [203.0.113.1, 2001:db8:c::1],", 1))
	answeredBy("direct, with resolvers", ofUplink, router, router6)
	status("direct, with resolvers", "203.0.113.1", "uplink uplink1")

	w.apply(w.blocked(""))
	queries := func() (sum int64) {
		for _, r := range resolvers {
			sum += r.Queries.Load()
		}
		return sum
	}
	before := queries()
	all := w.capture()
	if got := ask(router); len(got) != 0 {
		t.Errorf("blocked, and yet answered: %v", got)
	}
	status("blocked", "", "")
	leaked, _ := all.stop(w)
	if asked := queries() - before; len(leaked) > 0 || asked != 0 {
		t.Errorf("blocked: %d queries reached a resolver; leaked:\n%s", asked, strings.Join(leaked, "\n"))
	}

	w.need(w.StartConcentrator("--resolver", "198.51.100.20:53"))
	w.need(w.WaitUp())
	answeredBy("blocked, and the tunnel is back", ofConcentrator, router, router6)
	w.need(w.Router.Stop(15 * time.Second))
	w.cleanupRouter()
}

// apply makes settings those in force.
func (w *world) apply(text string) {
	w.t.Helper()
	file, err := w.File("applied.yaml", text)
	w.need(err)
	_, err = w.Sheafctl("apply", "-f", file)
	w.need(err)
}
