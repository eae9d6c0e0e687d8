package kernel

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
)

// bonded is a router with two uplinks to one cloud, where a server echoes:
//
//	router wan1 10.1.0.2 ── cloud 198.51.100.1
//	       wan2 10.2.0.2 ──┘
type bonded struct {
	kernel   *Kernel
	settings settings.Settings
	cloud    *host
}

const server = "198.51.100.1:443"

func newBonded(t *testing.T) *bonded {
	t.Helper()
	enter(t)
	b := &bonded{cloud: newHost(t)}
	connect(t, "wan1", []string{"10.1.0.2/24"}, b.cloud, "eth1", []string{"10.1.0.1/24"})
	connect(t, "wan2", []string{"10.2.0.2/24"}, b.cloud, "eth2", []string{"10.2.0.1/24"})
	must(t, addDefault("wan1", "10.1.0.1", 100))
	must(t, addDefault("wan2", "10.2.0.1", 200))
	b.cloud.do(t, func() error {
		if err := upErr("lo", "198.51.100.1/32"); err != nil {
			return err
		}
		config := net.ListenConfig{}
		config.SetMultipathTCP(true)
		l, err := config.Listen(context.Background(), "tcp4", server)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					buffer := make([]byte, 1024)
					for {
						n, err := c.Read(buffer)
						if err != nil {
							return
						}
						if _, err := c.Write(buffer[:n]); err != nil {
							return
						}
					}
				}()
			}
		}()
		return nil
	})
	var err error
	b.settings, err = settings.Parse([]byte(`
version: 1
lan: {interfaces: [lan0]}
uplinks:
  - {name: dsl, interface: wan1}
  - {name: lte, interface: wan2}
when_tunnel_down: block
`))
	must(t, err)
	b.kernel = open(t)
	return b
}

// dial opens an MPTCP connection whose initial subflow leaves from an address.
func (b *bonded) dial(t *testing.T, from string) net.Conn {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 2 * time.Second}
	dialer.SetMultipathTCP(true)
	c, err := dialer.Dial("tcp4", server)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	if ok, err := c.(*net.TCPConn).MultipathTCP(); !ok || err != nil {
		t.Fatalf("the connection is not MPTCP: %v, %v", ok, err)
	}
	return c
}

// echo says whether the connection still works.
func echo(c net.Conn) error {
	c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 4))
	return err
}

// subflows lists the local addresses of the established subflows to the server.
func subflows(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/thread-self/net/tcp")
	must(t, err)
	var list []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		const established, port443 = "01", ":01BB"
		if len(fields) > 3 && fields[3] == established && strings.HasSuffix(fields[2], port443) {
			raw, err := hex.DecodeString(fields[1][:8])
			must(t, err)
			slices.Reverse(raw)
			a, _ := netip.AddrFromSlice(raw)
			list = append(list, a.String())
		}
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

func expectSubflows(t *testing.T, want string) {
	t.Helper()
	eventually(t, "subflows", func() (bool, string) {
		got := subflows(t)
		return got == want, fmt.Sprintf("from %q, want from %q", got, want)
	})
}

// TestEndpoints: endpoints make and end subflows of live connections, and the
// connections survive it.
func TestEndpoints(t *testing.T) {
	b := newBonded(t)
	apply(t, b.kernel, compile(t, b.settings))
	c := b.dial(t, "10.1.0.2")
	// The kernel joins further subflows once data has been acknowledged.
	must(t, echo(c))
	expectSubflows(t, "10.1.0.2 10.2.0.2")

	mode := func(dsl, lte settings.Mode) string {
		t.Helper()
		b.settings.Uplinks[0].Mode, b.settings.Uplinks[1].Mode = dsl, lte
		changes := apply(t, b.kernel, compile(t, b.settings))
		must(t, echo(c))
		return text(changes)
	}
	// The initial subflow ends like any other, and comes back.
	if got, want := mode(settings.Off, settings.On), "\nip mptcp endpoint delete 10.1.0.2"; got != want {
		t.Errorf("off: %s", got)
	}
	expectSubflows(t, "10.2.0.2")
	mode(settings.On, settings.On)
	expectSubflows(t, "10.1.0.2 10.2.0.2")

	// A backup stays connected and carries nothing.
	if got, want := mode(settings.On, settings.Backup), "\nip mptcp endpoint change 10.2.0.2 subflow backup"; got != want {
		t.Errorf("backup: %s", got)
	}
	expectSubflows(t, "10.1.0.2 10.2.0.2")
	must(t, bulk(c, 1<<20)) // what was under way when the mode changed is through
	before := sent(t, "wan2")
	must(t, bulk(c, 4<<20))
	if n := sent(t, "wan2") - before; n > 100<<10 {
		t.Errorf("the backup sent %d bytes of 4 MiB", n)
	}
	// It takes over when the other goes.
	mode(settings.Off, settings.Backup)
	expectSubflows(t, "10.2.0.2")
	mode(settings.On, settings.On)
	expectSubflows(t, "10.1.0.2 10.2.0.2")

	// An uplink that loses its address loses its subflow.
	wan2, err := netlink.LinkByName("wan2")
	must(t, err)
	must(t, netlink.LinkSetDown(wan2))
	apply(t, b.kernel, compile(t, b.settings))
	expectSubflows(t, "10.1.0.2")
	must(t, echo(c))
	must(t, netlink.LinkSetUp(wan2))
	must(t, addDefault("wan2", "10.2.0.1", 200))
	apply(t, b.kernel, compile(t, b.settings))
	expectSubflows(t, "10.1.0.2 10.2.0.2")
	must(t, echo(c))
}

// TestPathManagerDefault: one subflow is for new connections; the live ones keep
// what they have.
func TestPathManagerDefault(t *testing.T) {
	b := newBonded(t)
	apply(t, b.kernel, compile(t, b.settings))
	first := b.dial(t, "10.1.0.2")
	must(t, echo(first))
	expectSubflows(t, "10.1.0.2 10.2.0.2")

	b.settings.Multipath.PathManager = settings.PathManagerDefault
	apply(t, b.kernel, compile(t, b.settings))
	second := b.dial(t, "10.1.0.2")
	for range 20 { // time enough for a join, which takes a round trip here of microseconds
		must(t, echo(second))
		must(t, echo(first))
		time.Sleep(5 * time.Millisecond)
	}
	expectSubflows(t, "10.1.0.2 10.1.0.2 10.2.0.2")

	b.settings.Multipath.Enabled = false
	apply(t, b.kernel, compile(t, b.settings))
	must(t, echo(first))
	must(t, echo(second))
	dialer := net.Dialer{Timeout: 2 * time.Second}
	dialer.SetMultipathTCP(true)
	third, err := dialer.Dial("tcp4", server)
	must(t, err)
	defer third.Close()
	if ok, _ := third.(*net.TCPConn).MultipathTCP(); ok {
		t.Error("a new connection is MPTCP though it is not enabled")
	}
}

// TestImplicitEndpoint: an endpoint that the kernel made by itself, for a
// subflow whose address it did not know, gives way to ours.
func TestImplicitEndpoint(t *testing.T) {
	b := newBonded(t)
	must(t, b.kernel.setLimits(desired.Limits{Subflows: 2, AddAddrAccepted: 2}))
	b.cloud.do(t, func() error {
		out, err := exec.Command("ip", "mptcp", "endpoint", "add", "10.2.0.1", "dev", "eth2", "signal").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	c := b.dial(t, "10.1.0.2")
	must(t, echo(c))
	eventually(t, "implicit endpoint", func() (bool, string) {
		all, err := b.kernel.endpoints()
		must(t, err)
		return slices.ContainsFunc(all, func(e endpoint) bool {
			return e.address == netip.MustParseAddr("10.2.0.2") && e.flags&flagImplicit != 0 && !e.ours()
		}), fmt.Sprintf("there are %+v", all)
	})
	apply(t, b.kernel, compile(t, b.settings))
	must(t, echo(c))
}

// TestIDs: the ids of an address are in the range, differ, and always the same.
func TestIDs(t *testing.T) {
	for i := range 65536 {
		a := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		list := ids(a)
		slices.Sort(list)
		if len(slices.Compact(list)) != idTries || list[0] < desired.FirstEndpointID || list[len(list)-1] > desired.LastEndpointID {
			t.Fatalf("%s: %v", a, list)
		}
	}
	if a := netip.MustParseAddr("10.1.0.2"); ids(a)[0] != 157 {
		// A program that is updated finds the endpoints of the one before.
		t.Errorf("the ids of %s have changed: %v", a, ids(a))
	}
}

// TestIDTaken: an id that another program has is left to it.
func TestIDTaken(t *testing.T) {
	b := newBonded(t)
	own := ids(netip.MustParseAddr("10.1.0.2"))
	if out, err := exec.Command("ip", "mptcp", "endpoint", "add", "10.7.0.1", "id", fmt.Sprint(own[0]), "signal").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	apply(t, b.kernel, compile(t, b.settings))
	all, err := b.kernel.endpoints()
	must(t, err)
	at := slices.IndexFunc(all, func(e endpoint) bool { return e.address == netip.MustParseAddr("10.1.0.2") })
	if at < 0 || all[at].id != own[1] {
		t.Errorf("endpoints: %+v, wanted id %d", all, own[1])
	}
}

// bulk sends n bytes and waits until all are echoed.
func bulk(c net.Conn, n int) error {
	c.SetDeadline(time.Now().Add(5 * time.Second))
	go c.Write(make([]byte, n))
	_, err := io.CopyN(io.Discard, c, int64(n))
	return err
}

// sent is how many bytes have left by an interface.
func sent(t *testing.T, name string) uint64 {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l.Attrs().Statistics.TxBytes
}
