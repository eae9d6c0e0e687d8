package kernel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
)

// lan is a client's network and a router that diverts it:
//
//	client ── lan0 router wan1 ── cloud
//	printer ─ lan1 ┘
type lan struct {
	kernel          *Kernel
	client, printer *host
	cloud           *host
}

func newLAN(t *testing.T) *lan {
	t.Helper()
	enter(t)
	l := &lan{client: newHost(t), printer: newHost(t), cloud: newHost(t)}
	connect(t, "lan0", []string{"192.168.1.1/24", "fd00:1::1/64"}, l.client, "eth0", []string{"192.168.1.2/24", "fd00:1::2/64"})
	connect(t, "lan1", []string{"192.168.2.1/24", "fd00:2::1/64"}, l.printer, "eth0", []string{"192.168.2.2/24", "fd00:2::2/64"})
	connect(t, "wan1", []string{"10.1.0.2/24", "2001:db8:1::2/64"}, l.cloud, "eth0", []string{"10.1.0.1/24", "2001:db8:1::1/64"})
	for host, gateways := range map[*host][]string{l.client: {"192.168.1.1", "fd00:1::1"}, l.printer: {"192.168.2.1", "fd00:2::1"}} {
		host.do(t, func() error {
			return errors.Join(addDefault("eth0", gateways[0], 0), addDefault("eth0", gateways[1], 0))
		})
	}
	// No default route: the intercept does not depend on one.
	l.kernel = open(t)
	want := compile(t, lanSettings("lan0", "lan1"))
	must(t, l.kernel.Apply(ctx, desired.Diff(read(t, l.kernel), want)))
	return l
}

// listen opens the transparent listeners in the calling thread's namespace. On
// every connection they say whom the client wanted to reach.
func listen(t *testing.T, port uint16) {
	t.Helper()
	for _, address := range []string{"127.0.0.1", "[::1]"} {
		config := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) (err error) {
			control := c.Control(func(fd uintptr) {
				if network == "tcp4" {
					err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
				} else {
					err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1)
				}
			})
			return errors.Join(control, err)
		}}
		serve(t, func() (net.Listener, error) {
			return config.Listen(context.Background(), "tcp", fmt.Sprintf("%s:%d", address, port))
		}, "diverted ")
	}
}

// serve answers every connection with a word and the address that it came to.
func serve(t *testing.T, open func() (net.Listener, error), word string) {
	t.Helper()
	l, err := open()
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, word, c.LocalAddr())
			c.Close()
		}
	}()
}

// dial connects from a host and returns the answer, or the error.
func (h *host) dial(address string) (answer string) {
	err := h.try(func() error {
		timeout := cmp.Or(h.timeout, 2*time.Second)
		c, err := net.DialTimeout("tcp", address, timeout)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(timeout))
		text, err := io.ReadAll(c)
		answer = string(text)
		return err
	})
	var failure net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return "refused"
	case errors.As(err, &failure) && failure.Timeout():
		return "no answer"
	case err != nil:
		return err.Error()
	}
	return answer
}

// TestIntercept sends real packets through the real table.
func TestIntercept(t *testing.T) {
	l := newLAN(t)

	serve(t, func() (net.Listener, error) { return net.Listen("tcp", ":8080") }, "router ")
	l.printer.do(t, func() error {
		serve(t, func() (net.Listener, error) { return net.Listen("tcp", ":9100") }, "printer ")
		return nil
	})
	l.cloud.do(t, func() error {
		serve(t, func() (net.Listener, error) { return net.Listen("tcp", ":80") }, "cloud ")
		return nil
	})

	// Without a listener a client does not pass by. (The kernel resets an IPv6
	// connection then; for IPv4 it has no socket to answer from.)
	l.client.timeout = 200 * time.Millisecond
	for address, want := range map[string]string{"10.1.0.1:80": "no answer", "[2001:db8:1::1]:80": "refused"} {
		if got := l.client.dial(address); got != want {
			t.Errorf("%s without a listener: %s, want %s", address, got, want)
		}
	}
	l.client.timeout = 0
	listen(t, desired.InterceptPort)

	for _, test := range []struct {
		from    *host
		address string
		want    string
	}{
		{l.client, "203.0.113.7:80", "diverted 203.0.113.7:80"},
		{l.client, "[2001:db8:99::7]:443", "diverted [2001:db8:99::7]:443"},
		{l.printer, "203.0.113.7:22", "diverted 203.0.113.7:22"},
		{l.client, "10.1.0.1:80", "diverted 10.1.0.1:80"}, // the uplink's own network is not the LAN
		{l.client, "[2001:db8:1::1]:80", "diverted [2001:db8:1::1]:80"},
		{l.client, "203.0.113.7:8383", "diverted 203.0.113.7:8383"},
		{l.client, "192.168.1.1:8080", "router 192.168.1.1:8080"},
		{l.client, "192.168.2.1:8080", "router 192.168.2.1:8080"},
		{l.client, "[fd00:1::1]:8080", "router [fd00:1::1]:8080"},
		{l.client, "10.1.0.2:8080", "router 10.1.0.2:8080"},
		{l.client, "192.168.2.2:9100", "printer 192.168.2.2:9100"},
		{l.client, "[fd00:2::2]:9100", "printer [fd00:2::2]:9100"},
		// Nobody reaches the listener by an address of the router.
		{l.client, "192.168.1.1:8383", "refused"},
		{l.client, "[fd00:1::1]:8383", "refused"},
		{l.cloud, "10.1.0.2:8383", "refused"},
		// From outside nothing is diverted.
		{l.cloud, "10.1.0.2:8080", "router 10.1.0.2:8080"},
	} {
		if got := test.from.dial(test.address); strings.ReplaceAll(got, "%eth0", "") != test.want {
			t.Errorf("%s: %s, want %s", test.address, got, test.want)
		}
	}

	// Link-local destinations stay on their link.
	l.client.timeout = 200 * time.Millisecond
	if got := l.client.dial("169.254.169.254:80"); strings.HasPrefix(got, "diverted") {
		t.Errorf("a link-local destination was %s", got)
	}
}

// TestUplinkAddressFromLAN: a client reaches the router by the address of an
// uplink, though packets from that address have a table that knows no LAN.
func TestUplinkAddressFromLAN(t *testing.T) {
	l := newLAN(t)
	must(t, addDefault("wan1", "10.1.0.1", 0))
	must(t, addDefault("wan1", "2001:db8:1::1", 0))
	serve(t, func() (net.Listener, error) { return net.Listen("tcp", ":8080") }, "router ")
	s := lanSettings("lan0", "lan1")
	s.Uplinks = []settings.Uplink{{Name: "dsl", Interface: "wan1", Mode: settings.On}}
	l.client.timeout, l.printer.timeout = 200*time.Millisecond, 200*time.Millisecond
	expect := func(when, want string) {
		t.Helper()
		for _, from := range []*host{l.client, l.printer} {
			for _, address := range []string{"10.1.0.2:8080", "[2001:db8:1::2]:8080"} {
				if got := from.dial(address); got != strings.ReplaceAll(want, "ADDRESS", address) {
					t.Errorf("%s: %s: %s", when, address, got)
				}
			}
		}
	}

	want := compile(t, s)
	apply(t, l.kernel, want)
	expect("with the rules of the LAN", "router ADDRESS")

	// That it is they that do it: without them the answers leave by the uplink.
	want.Rules = slices.DeleteFunc(want.Rules, func(r desired.Rule) bool { return r.Destination.IsValid() })
	apply(t, l.kernel, want)
	expect("without them", "no answer")
}

// TestInitialWindow: connections from an uplink's address begin with the window
// of its routes, and no others do.
func TestInitialWindow(t *testing.T) {
	l := newLAN(t)
	must(t, addDefault("wan1", "10.1.0.1", 0))
	must(t, addDefault("wan1", "2001:db8:1::1", 0))
	l.cloud.do(t, func() error {
		serve(t, func() (net.Listener, error) { return net.Listen("tcp", ":80") }, "cloud ")
		return upErr("lo", "203.0.113.7/32", "2001:db8:99::7/128")
	})
	l.client.do(t, func() error {
		serve(t, func() (net.Listener, error) { return net.Listen("tcp", ":80") }, "client ")
		return nil
	})
	s := lanSettings("lan0", "lan1")
	s.Uplinks = []settings.Uplink{{Name: "dsl", Interface: "wan1", Mode: settings.On}}
	apply(t, l.kernel, compile(t, s))

	for _, test := range []struct {
		from, to string
		want     uint32
	}{
		{"10.1.0.2", "10.1.0.1:80", 20},
		{"10.1.0.2", "203.0.113.7:80", 20},
		{"2001:db8:1::2", "[2001:db8:99::7]:80", 20},
		{"192.168.1.1", "192.168.1.2:80", 10},
		{"10.1.0.2", "192.168.1.2:80", 10},
	} {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(test.from)}, Timeout: 2 * time.Second}
		c, err := dialer.Dial("tcp", test.to)
		must(t, err)
		raw, err := c.(*net.TCPConn).SyscallConn()
		must(t, err)
		must(t, raw.Control(func(fd uintptr) {
			info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
			if err != nil {
				t.Error(err)
			} else if info.Snd_cwnd != test.want {
				t.Errorf("%s to %s: a window of %d segments, want %d", test.from, test.to, info.Snd_cwnd, test.want)
			}
		}))
		c.Close()
	}
}

// TestInterceptMarkKeepsOtherBits: what others mark in their bits stays.
func TestInterceptMarkKeepsOtherBits(t *testing.T) {
	l := newLAN(t)
	listen(t, desired.InterceptPort)
	// Another program's table, earlier: mark 0x12.
	conn, err := l.kernel.nft()
	must(t, err)
	markBefore(conn, 0x12)
	must(t, conn.Flush())
	// Only packets with both marks reach the listener now.
	must(t, l.kernel.deleteRule(desired.Rule{Priority: desired.FirstPriority, Mark: desired.Mark, Mask: desired.MarkMask, Table: desired.FirstTable}))
	must(t, l.kernel.addRule(desired.Rule{Priority: desired.FirstPriority, Mark: desired.Mark | 0x12, Mask: 0xffffffff, Table: desired.FirstTable}))
	if got := l.client.dial("203.0.113.7:80"); got != "diverted 203.0.113.7:80" {
		t.Error(got)
	}
}

// TestInterceptReplacedUnderLoad: while the table is replaced again and again,
// no connection is lost and none passes by.
func TestInterceptReplacedUnderLoad(t *testing.T) {
	l := newLAN(t)
	listen(t, desired.InterceptPort)
	one, two := compile(t, lanSettings("lan0")).Table, compile(t, lanSettings("lan0", "lan1")).Table
	var replaced atomic.Int64
	stop, stopped := make(chan struct{}), make(chan error)
	go func() {
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			if err := l.kernel.Apply(ctx, []desired.Change{desired.ReplaceTable{Table: one}, desired.ReplaceTable{Table: two}}); err != nil {
				<-stop
				stopped <- err
				return
			}
			replaced.Add(2)
		}
	}()
	dialed := 0
	for start := time.Now(); time.Since(start) < time.Second; dialed++ {
		if got := l.client.dial("203.0.113.7:80"); got != "diverted 203.0.113.7:80" {
			t.Fatalf("connection %d, after %d replacements: %s", dialed, replaced.Load(), got)
		}
	}
	close(stop)
	must(t, <-stopped)
	if dialed < 50 || replaced.Load() < 20 {
		t.Errorf("only %d connections and %d replacements", dialed, replaced.Load())
	}
	t.Logf("%d connections during %d replacements", dialed, replaced.Load())
}

// TestInterceptLiveConnection: a diverted connection outlives changes of the LAN.
func TestInterceptLiveConnection(t *testing.T) {
	l := newLAN(t)
	listener, err := (&net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1) }), err)
	}}).Listen(ctx, "tcp4", fmt.Sprintf("127.0.0.1:%d", desired.InterceptPort))
	must(t, err)
	defer listener.Close()
	go func() {
		c, err := listener.Accept()
		if err == nil {
			io.Copy(c, c)
			c.Close()
		}
	}()
	var c net.Conn
	l.client.do(t, func() (err error) {
		c, err = net.DialTimeout("tcp", "203.0.113.7:80", 2*time.Second)
		return err
	})
	defer c.Close()
	echo := func(when string) {
		t.Helper()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		buffer := make([]byte, 4)
		if _, err := c.Write([]byte("ping")); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if _, err := io.ReadFull(c, buffer); err != nil || string(buffer) != "ping" {
			t.Fatalf("%s: %q, %v", when, buffer, err)
		}
	}
	echo("at first")
	must(t, l.kernel.Apply(ctx, []desired.Change{desired.ReplaceTable{Table: compile(t, lanSettings("lan0")).Table}}))
	echo("after the table was replaced")
	have := read(t, l.kernel)
	must(t, l.kernel.Apply(ctx, desired.Diff(have, compile(t, lanSettings("lan0", "lan1")))))
	echo("after the LAN had grown again")
}

func lanSettings(interfaces ...string) settings.Settings {
	s := settings.Default()
	s.LAN.Interfaces = interfaces
	return s
}

// markBefore adds a table that marks every packet before ours sees it.
func markBefore(conn *nftables.Conn, mark uint32) {
	table := conn.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyINet})
	chain := conn.AddChain(&nftables.Chain{
		Table: table, Name: "early", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw,
	})
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	}})
}
