package tunnel

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// fakeOutOfTree stands in for a kernel with MPTCP v0.95, and does what its source
// says (do_tcp_setsockopt, mptcp_get_info).
type fakeOutOfTree struct {
	sizeInfo uint32 // of its struct tcp_info, which is shorter than ours
	subflows []fakeSubflow

	mu     sync.Mutex
	asked  []request
	values map[int]int // of option 42, by file descriptor
}

type fakeSubflow struct {
	info        unix.TCPInfo
	source, far unix.RawSockaddrInet6
}

type request struct {
	option, value int
	tooLate       bool // the socket was connecting or listening already
}

func (f *fakeOutOfTree) Set(fd, option, value int) error {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, request{option, value, err != nil || info.State != tcpClose})
	f.values[fd] = value
	return nil
}

func (f *fakeOutOfTree) Get(fd, option int) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if option != 42 {
		return 0, unix.ENOPROTOOPT
	}
	return f.values[fd], nil
}

func (f *fakeOutOfTree) Info(_ int, m *multipathInfo) error {
	m.sizeInfo = min(m.sizeInfo, f.sizeInfo)
	infos := unsafe.Slice((*byte)(m.infos), m.lengthInfos)
	addresses := unsafe.Slice((*byte)(m.addresses), m.lengthAddresses)
	m.lengthInfos, m.lengthAddresses = 0, 0
	for _, s := range f.subflows {
		m.lengthInfos += uint32(copy(infos[m.lengthInfos:], unsafe.Slice((*byte)(unsafe.Pointer(&s.info)), m.sizeInfo)))
		for _, a := range []unix.RawSockaddrInet6{s.source, s.far} {
			m.lengthAddresses += uint32(copy(addresses[m.lengthAddresses:], unsafe.Slice((*byte)(unsafe.Pointer(&a)), unsafe.Sizeof(a))))
		}
	}
	return nil
}

// run makes it the running kernel until the test ends.
func (f *fakeOutOfTree) run(t *testing.T) *fakeOutOfTree {
	f.values = map[int]int{}
	pretended := outOfTree(f)
	pretendedOutOfTree.Store(&pretended)
	t.Cleanup(func() { pretendedOutOfTree.Store(nil) })
	return f
}

// rawAddress is a socket address as the kernel writes it.
func rawAddress(t *testing.T, text string) (a unix.RawSockaddrInet6) {
	t.Helper()
	parsed := netip.MustParseAddrPort(text)
	port := [2]byte{byte(parsed.Port() >> 8), byte(parsed.Port())}
	if parsed.Addr().Is4() {
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(&a))
		four.Family, four.Port, four.Addr = unix.AF_INET, *(*uint16)(unsafe.Pointer(&port)), parsed.Addr().As4()
		return a
	}
	a.Family, a.Port, a.Addr = unix.AF_INET6, *(*uint16)(unsafe.Pointer(&port)), parsed.Addr().As16()
	return a
}

// TestOutOfTreeSockets: on v0.9x sockets ask for MPTCP, or out of it, while they
// still may, and the session is what the kernel made of that.
func TestOutOfTreeSockets(t *testing.T) {
	fake := new(fakeOutOfTree).run(t)
	b := &bond{t: t, routerID: newIdentity(t), serverID: newIdentity(t), carriers: newCarriers(), log: new(logBuffer), admission: new(registry)}
	b.startServer("127.0.0.1:0") // its listener asks
	defer b.stopServer()
	for _, multipath := range []bool{true, false} {
		peer := &Peer{Identity: b.routerID, Concentrator: b.serverID.PublicKey(), Multipath: multipath}
		s, err := peer.connect(t.Context(), source{}, b.address)
		if err != nil {
			t.Fatal(err)
		}
		if (s.wire.outOfTree != nil) != multipath || s.multipath != multipath {
			t.Errorf("asked for %v: the session is MPTCP: %v, of v0.9x: %v", multipath, s.multipath, s.wire.outOfTree != nil)
		}
		s.Close()
	}
	fake.mu.Lock()
	defer fake.mu.Unlock()
	if diff := cmp.Diff([]request{{42, 1, false}, {42, 1, false}, {42, 0, false}}, fake.asked, cmp.AllowUnexported(request{})); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// TestOutOfTreeSubflows: each subflow is known by its addresses, and one that is
// not established is none.
func TestOutOfTreeSubflows(t *testing.T) {
	established := func(rtt, unsent uint32) unix.TCPInfo {
		return unix.TCPInfo{State: tcpEstablished, Rtt: rtt, Min_rtt: rtt / 2, Data_segs_out: 9, Total_retrans: 1, Notsent_bytes: unsent}
	}
	fake := (&fakeOutOfTree{sizeInfo: 192, subflows: []fakeSubflow{
		{established(20_000, 3000), rawAddress(t, "10.1.0.2:40112"), rawAddress(t, "203.0.113.10:4443")},
		{unix.TCPInfo{State: 2, Notsent_bytes: 1 << 20}, rawAddress(t, "10.3.0.2:40113"), rawAddress(t, "203.0.113.10:4443")},
		{established(40_000, 500), rawAddress(t, "[2001:db8::2]:40114"), rawAddress(t, "[2001:db8:ffff::10]:4443")},
	}}).run(t)
	a, _ := tcpPair(t)
	s, err := newSocket(a)
	if err != nil {
		t.Fatal(err)
	}
	s.outOfTree = fake
	got, err := s.subflows(true)
	if err != nil {
		t.Fatal(err)
	}
	subflow := func(local, remote string, rtt time.Duration, unsent uint64) Subflow {
		return Subflow{Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote), RTT: rtt, MinRTT: rtt / 2, Segments: 9, Retransmitted: 1, unsent: unsent}
	}
	if want := []Subflow{
		subflow("10.1.0.2:40112", "203.0.113.10:4443", 20*time.Millisecond, 3000),
		subflow("[2001:db8::2]:40114", "[2001:db8:ffff::10]:4443", 40*time.Millisecond, 500),
	}; !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	waiting, err := s.backlog(true)
	if err != nil || waiting.unsent != 3500 || waiting.allowed < 2*leastUnsent {
		t.Errorf("backlog %+v, %v", waiting, err)
	}

	fake.sizeInfo = 0
	if got, err := s.subflows(true); err == nil {
		t.Errorf("of a kernel that writes nothing: %v", got)
	}
}

// TestUpstreamSockets: elsewhere the options mean something else, and no socket
// is given them; but those of sessions, and what a listener accepts, begin with
// what tune says.
func TestUpstreamSockets(t *testing.T) {
	if outOfTreeKernel() != nil {
		t.Fatal("sockets are given the options of v0.9x on this kernel")
	}
	l, err := ListenConfig().Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dialer := net.Dialer{Control: control(true)}
	dialer.SetMultipathTCP(true)
	dialled, err := dialer.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dialled.Close() }()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = accepted.Close() }()
	for name, c := range map[string]net.Conn{"dialled": dialled, "accepted": accepted} {
		s, err := newSocket(c.(*net.TCPConn))
		if err != nil {
			t.Fatal(err)
		}
		err = s.raw.Control(func(fd uintptr) {
			control, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
			if err != nil || control != congestionControl {
				t.Errorf("%s: congestion control %q, %v", name, control, err)
			}
			buffer, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF)
			if err != nil || buffer < receiveBuffer {
				t.Errorf("%s: receive buffer of %d bytes, %v", name, buffer, err)
			}
		})
		if err != nil {
			t.Error(err)
		}
	}
}
