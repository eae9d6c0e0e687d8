package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

// tokenOf is the token of an MPTCP connection (MPTCP_INFO, of which it is the
// fourth number).
func tokenOf(t *testing.T, c net.Conn) uint32 {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	must(t, err)
	var token uint32
	must(t, raw.Control(func(fd uintptr) {
		const solMPTCP, mptcpInfo = 284, 1
		var info [4]uint32
		length := uint32(unsafe.Sizeof(info))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, solMPTCP, mptcpInfo, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&length)), 0)
		if errno != 0 {
			t.Error(errno)
		}
		token = info[3]
	}))
	if token == 0 {
		t.Fatal("the connection has no token")
	}
	return token
}

// managed is a connection whose paths the test manages.
type managed struct {
	t      *testing.T
	kernel *Kernel
	conn   net.Conn
	token  uint32
	ways   []desired.Way
	wish   settings.Multipath
}

var serverEnd = netip.MustParseAddrPort(server)

func newManaged(t *testing.T, b *bonded) *managed {
	t.Helper()
	b.cloud.do(t, func() error { // as a concentrator does
		k, err := NewConcentrator()
		if err != nil {
			return err
		}
		return errors.Join(k.setLimits(desired.Limits{Subflows: desired.MaxEndpoints}), k.Close())
	})
	b.settings.Multipath.PathManager = settings.PathManagerBinder
	apply(t, b.kernel, compile(t, b.settings))
	m := &managed{t: t, kernel: b.kernel, conn: b.dial(t, "10.1.0.2"), wish: b.settings.Multipath}
	m.token = tokenOf(t, m.conn)
	must(t, echo(m.conn))
	o, err := uplink.Observe([]string{"wan1", "wan2"})
	must(t, err)
	m.ways = desired.Ways(b.settings, uplink.Judge(o, []uplink.Want{{Name: "dsl", Interface: "wan1"}, {Name: "lte", Interface: "wan2"}}), nil)
	if len(m.ways) != 2 {
		t.Fatalf("ways: %v", m.ways)
	}
	return m
}

// have lists the subflows as the kernel has them, by local address.
func (m *managed) have() []desired.Subflow {
	m.t.Helper()
	all, err := m.kernel.Subflows(serverEnd.Port())
	must(m.t, err)
	return slices.SortedFunc(maps.Values(all), func(a, b desired.Subflow) int { return a.Local.Compare(b.Local) })
}

// settle makes changes until nothing is to be changed and no subflow is joining,
// and returns what was changed.
func (m *managed) settle() string {
	m.t.Helper()
	var done []desired.SubflowChange
	eventually(m.t, "subflows", func() (bool, string) {
		have := m.have()
		changes := desired.DiffSubflows(m.wish, m.ways, have, serverEnd, func(desired.Way) bool { return true })
		for _, c := range changes {
			must(m.t, m.kernel.ChangeSubflow(m.token, c))
		}
		done = append(done, changes...)
		joining := slices.ContainsFunc(have, func(f desired.Subflow) bool { return f.Joining })
		return len(changes) == 0 && !joining, fmt.Sprintf("%+v, last: %s", have, text(changes))
	})
	must(m.t, echo(m.conn))
	return text(done)
}

// shape shows the subflows: address, id other than the first's, backup.
func (m *managed) shape() string {
	m.t.Helper()
	var list []string
	for _, f := range m.have() {
		word := f.Local.Addr().String()
		if f.Backup {
			word += "(backup)"
		}
		list = append(list, word)
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}

func (m *managed) expect(want string) {
	m.t.Helper()
	eventually(m.t, "subflows", func() (bool, string) {
		got := m.shape()
		return got == want, fmt.Sprintf("got %q, want %q", got, want)
	})
	must(m.t, echo(m.conn))
}

// TestManagedSubflows takes one connection through what path managers and modes
// ask for; it lives all the time.
func TestManagedSubflows(t *testing.T) {
	b := newBonded(t)
	m := newManaged(t, b)
	m.settle()
	m.expect("10.1.0.2 10.2.0.2")
	if again := m.settle(); again != "" {
		t.Errorf("a second look changes%s", again)
	}

	m.wish.PathManager, m.wish.Subflows = settings.PathManagerNdiffports, 4
	m.settle()
	m.expect("10.1.0.2 10.1.0.2 10.1.0.2 10.1.0.2")
	m.wish.Subflows = 2
	m.settle()
	m.expect("10.1.0.2 10.1.0.2")

	m.wish.PathManager = settings.PathManagerBinder
	m.ways[1].Backup = true
	if changes := m.settle(); strings.Contains(changes, "change") {
		t.Errorf("the backup was not one from the start:%s", changes)
	}
	m.expect("10.1.0.2 10.2.0.2(backup)")
	// A kernel that had to wait for a processor may take the other for dead, once.
	eventually(t, "the backup is quiet", func() (bool, string) {
		before := sent(t, "wan2")
		must(t, bulk(m.conn, 4<<20))
		n := sent(t, "wan2") - before
		return n < 100<<10, fmt.Sprintf("it sent %d bytes of 4 MiB", n)
	})
	m.ways[1].Backup = false
	m.settle()
	m.expect("10.1.0.2 10.2.0.2")

	// An uplink goes, the one of the first subflow, and comes back.
	all := slices.Clone(m.ways)
	m.ways = all[1:]
	m.settle()
	m.expect("10.2.0.2")
	m.ways = all
	m.settle()
	m.expect("10.1.0.2 10.2.0.2")
	m.ways = all[:1]
	m.settle()
	m.expect("10.1.0.2")

	// All go, and one comes back.
	m.ways = nil
	for _, c := range desired.DiffSubflows(m.wish, m.ways, m.have(), serverEnd, nil) {
		must(t, m.kernel.ChangeSubflow(m.token, c))
	}
	eventually(t, "no subflow", func() (bool, string) { return m.shape() == "", m.shape() })
	m.ways = all[1:]
	m.settle()
	m.expect("10.2.0.2")
}

// TestPeerIsTold: the peer ends its part of a subflow whose uplink is dead, because
// it is told so over another.
func TestPeerIsTold(t *testing.T) {
	b := newBonded(t)
	m := newManaged(t, b)
	m.settle()
	m.expect("10.1.0.2 10.2.0.2")
	ends := func() (list string) {
		t.Helper()
		b.cloud.do(t, func() error {
			out, err := exec.Command("ss", "-tnH", "state", "established", "sport", "=", ":443").Output()
			list = string(out)
			return err
		})
		return list
	}
	if !strings.Contains(ends(), "10.2.0.2") {
		t.Fatalf("the peer has %s", ends())
	}
	// Nothing that leaves by wan2 arrives any more.
	deaf(t, "wan2", "10.2.0.1")
	m.ways = m.ways[:1]
	m.settle()
	eventually(t, "the peer's end", func() (bool, string) { list := ends(); return !strings.Contains(list, "10.2.0.2"), list })
	must(t, echo(m.conn))
}

// TestAbortClosed: a subflow that is closed while its uplink carries nothing stays
// with what it has to send, until it is ended. The connection loses nothing by it.
func TestAbortClosed(t *testing.T) {
	m := newManaged(t, newBonded(t))
	m.settle()
	m.expect("10.1.0.2 10.2.0.2")
	deaf(t, "wan2", "10.2.0.1")
	sent := make([]byte, 4<<20)
	for i := range sent {
		sent[i] = byte(i >> 10)
	}
	m.conn.SetDeadline(time.Now().Add(20 * time.Second))
	written := make(chan error, 1)
	go func() {
		_, err := m.conn.Write(sent)
		written <- err
	}()
	closed := func() (n int) {
		t.Helper()
		must(t, m.kernel.diagnose(stateClosed, 0, serverEnd.Port(), func(diagnosed) error { n++; return nil }))
		return n
	}
	eventually(t, "a closed subflow with something to send", func() (bool, string) {
		wish, ways := m.wish, m.ways
		if slices.ContainsFunc(m.have(), func(f desired.Subflow) bool { return f.Local.Addr() == m.ways[1].Source }) {
			ways = ways[:1]
		}
		for _, c := range desired.DiffSubflows(wish, ways, m.have(), serverEnd, func(desired.Way) bool { return false }) {
			must(t, m.kernel.ChangeSubflow(m.token, c))
		}
		return closed() > 0, "there is none"
	})
	tokens := func(t uint32) func() map[uint32]bool {
		return func() map[uint32]bool { return map[uint32]bool{t: true} }
	}
	if n, err := m.kernel.AbortClosed(tokens(m.token + 1)); n != 0 || err != nil {
		t.Errorf("of another connection: %d ended, %v", n, err)
	}
	before := closed()
	if n, err := m.kernel.AbortClosed(tokens(m.token)); n != before || err != nil {
		t.Errorf("%d of %d ended, %v", n, before, err)
	}
	if n := closed(); n != 0 {
		t.Errorf("%d are left", n)
	}
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(m.conn, got); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("the echo: %v, or another content", err)
	}
	must(t, <-written)
}

func TestEndsOrphans(t *testing.T) {
	for release, want := range map[string]bool{
		"6.18.44-fc-v595": true, "6.12.0": true, "7.0.1-cloud-amd64": true, "6.11.10": false, "6.1.0-37-amd64": false, "5.15.0": false, "": false,
	} {
		if got := endsOrphans(release); got != want {
			t.Errorf("%q: %v, want %v", release, got, want)
		}
	}
}

// TestAbortSubflows: the other end ends one subflow, and no other; the listener
// goes on.
func TestAbortSubflows(t *testing.T) {
	b := newBonded(t)
	m := newManaged(t, b)
	m.settle()
	m.expect("10.1.0.2 10.2.0.2")
	var k *Kernel
	b.cloud.do(t, func() (err error) { k, err = NewConcentrator(); return err })
	t.Cleanup(func() { k.Close() })
	var which []Ends
	must(t, k.diagnose(1<<tcpEstablished, serverEnd.Port(), 0, func(f diagnosed) error {
		if f.Remote.Addr() == m.ways[1].Source {
			which = append(which, Ends{f.Local, f.Remote}, Ends{f.Local, netip.AddrPortFrom(f.Remote.Addr(), 9)})
		}
		return nil
	}))
	if n, err := k.AbortSubflows(serverEnd.Port(), which); n != 1 || err != nil || len(which) != 2 {
		t.Errorf("%d of %v ended, %v; want the first", n, which, err)
	}
	m.expect("10.1.0.2")
	must(t, echo(b.dial(t, "10.1.0.2")))
}

// deaf makes that nothing that leaves by the link for its gateway arrives any more.
func deaf(t *testing.T, name, gateway string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	must(t, err)
	must(t, netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: net.ParseIP(gateway), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9}, State: netlink.NUD_PERMANENT}))
}

// TestSubflowPorts: with a range of ports, a subflow leaves from one of them, also
// while some are in use.
func TestSubflowPorts(t *testing.T) {
	m := newManaged(t, newBonded(t))
	m.ways[1].Ports = desired.Ports{First: 20000, Last: 20015}
	m.settle()
	m.expect("10.1.0.2 10.2.0.2")
	for _, f := range m.have() {
		if f.Local.Addr() == m.ways[1].Source && !m.ways[1].Ports.Contains(f.Local.Port()) {
			t.Errorf("it leaves from %s, not from a port of %v", f.Local, m.ways[1].Ports)
		}
	}
	m.wish.PathManager, m.wish.Subflows = settings.PathManagerNdiffports, 3
	m.ways = m.ways[1:]
	m.settle()
	m.expect("10.2.0.2 10.2.0.2 10.2.0.2")
}

// TestSubflowEvents: whoever follows is woken when a subflow comes and goes.
func TestSubflowEvents(t *testing.T) {
	m := newManaged(t, newBonded(t))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	woken, ended := make(chan struct{}, 100), make(chan error, 1)
	go func() { ended <- m.kernel.FollowSubflows(ctx, func() { woken <- struct{}{} }) }()
	wait := func(what string, again func()) {
		t.Helper()
		eventually(t, what, func() (bool, string) {
			again()
			select {
			case <-woken:
				return true, ""
			default:
				return false, "no event"
			}
		})
	}
	// The group may be joined only after some attempts.
	wait("a subflow comes or goes", func() {
		m.wish.Subflows = 5 - m.wish.Subflows
		m.wish.PathManager = settings.PathManagerNdiffports
		m.settle()
	})
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("following ended with %v", err)
	}
}

// TestNotManaged: of connections that the kernel manages, and of none, it says so.
func TestNotManaged(t *testing.T) {
	b := newBonded(t)
	apply(t, b.kernel, compile(t, b.settings))
	c := b.dial(t, "10.1.0.2")
	must(t, echo(c))
	open := desired.OpenSubflow{Way: desired.Way{Source: netip.MustParseAddr("10.2.0.2")}, Remote: serverEnd, ID: 9}
	for _, token := range []uint32{tokenOf(t, c), 1} {
		if err := b.kernel.ChangeSubflow(token, open); !errors.Is(err, ErrNotManaged) {
			t.Errorf("token %d: %v", token, err)
		}
	}
}

// TestGatewayRules: two uplinks that share an address lead their packets to their
// own gateways, by the source port, and a second look changes nothing.
func TestGatewayRules(t *testing.T) {
	b := newBonded(t)
	b.settings.Uplinks[1].Interface = "wan1"
	b.settings.Uplinks[1].Address = settings.Address{Method: settings.Gateway, Gateway: netip.MustParseAddr("10.1.0.9")}
	want := compile(t, b.settings)
	apply(t, b.kernel, want)
	for port, gateway := range map[int]string{16384: "10.1.0.1", 17407: "10.1.0.1", 17408: "10.1.0.9", 18431: "10.1.0.9", 40000: "10.1.0.1"} {
		out, err := exec.Command("ip", "route", "get", "198.51.100.1", "from", "10.1.0.2", "ipproto", "tcp", "sport", fmt.Sprint(port)).CombinedOutput()
		if err != nil || !strings.Contains(string(out), " via "+gateway+" ") {
			t.Errorf("from port %d: %s, %v; want %s", port, out, err, gateway)
		}
	}
	have, err := b.kernel.Read(context.Background())
	must(t, err)
	if again := desired.Diff(have, want); len(again) > 0 {
		t.Errorf("a second look changes%s", text(again))
	}
}
