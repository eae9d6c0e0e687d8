package tun

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	testName = "tun-test"
	testMTU  = 1400
)

var (
	here4, there4 = netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("10.9.0.2")
	here6, there6 = netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd09::2")
)

// enter puts the test into a network namespace of its own. Its thread is never
// unlocked: it ends with the test, and the namespace with it.
func enter(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a network namespace: %v (these tests need root)", err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open makes a device that is up and has addresses.
func open(t testing.TB, queues int) *Device {
	t.Helper()
	enter(t)
	d, err := Open(testName, queues)
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	link, err := netlink.LinkByName(testName)
	must(t, err)
	must(t, netlink.LinkSetMTU(link, testMTU))
	must(t, netlink.LinkSetUp(link))
	for _, a := range []netip.Prefix{netip.PrefixFrom(here4, 24), netip.PrefixFrom(here6, 64)} {
		address, err := netlink.ParseAddr(a.String())
		must(t, err)
		address.Flags = unix.IFA_F_NODAD
		must(t, netlink.AddrAdd(link, address))
	}
	// The kernel adds the local route of an IPv6 address in its own time
	// (addrconf_dad_work), and drops what arrives before.
	local := &netlink.Route{Dst: netlink.NewIPNet(here6.AsSlice()), Table: unix.RT_TABLE_LOCAL}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, local, netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
		must(t, err)
		if len(routes) > 0 {
			return d
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v has no local route", here6)
		}
	}
}

// run starts Run and returns its result.
func run(d *Device, ctx context.Context, receive func(int, [][]byte)) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, receive) }()
	return ended
}

func wait(t *testing.T, ended <-chan error, want error) {
	t.Helper()
	select {
	case err := <-ended:
		if !errors.Is(err, want) {
			t.Fatalf("Run returned %v, want %v", err, want)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("Run did not return, want %v", want)
	}
}

// reverse turns a UDP packet into its answer; the checksums stay right. It
// returns false for what is none, such as router solicitations.
func reverse(p []byte) bool {
	ports := 20
	switch {
	case p[0] == 0x45 && p[9] == unix.IPPROTO_UDP:
		swap(p[12:16], p[16:20])
	case p[0]>>4 == 6 && p[6] == unix.IPPROTO_UDP:
		swap(p[8:24], p[24:40])
		ports = 40
	default:
		return false
	}
	swap(p[ports:ports+2], p[ports+2:ports+4])
	return true
}

func swap(a, b []byte) {
	for i := range a {
		a[i], b[i] = b[i], a[i]
	}
}

// echo answers every UDP packet.
func echo(t *testing.T, d *Device) func(int, [][]byte) {
	return func(_ int, packets [][]byte) {
		var answers [][]byte
		for _, p := range packets {
			if reverse(p) {
				answers = append(answers, p)
			}
		}
		if err := d.Write(answers); err != nil {
			t.Errorf("Write: %v", err)
		}
	}
}

func dial(t testing.TB, from, to netip.Addr) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 4000)))
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	return c
}

func TestPacketsBothWays(t *testing.T) {
	for _, queues := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d queues", queues), func(t *testing.T) {
			d := open(t, queues)
			ended := run(d, t.Context(), echo(t, d))
			for _, way := range [][2]netip.Addr{{here4, there4}, {here6, there6}} {
				c := dial(t, way[0], way[1])
				for _, size := range []int{1, 200, testMTU - 48} {
					sent, got := bytes.Repeat([]byte{byte(size)}, size), make([]byte, testMTU)
					_, err := c.Write(sent)
					must(t, err)
					n, err := c.Read(got)
					must(t, err)
					if !bytes.Equal(got[:n], sent) {
						t.Errorf("%v: %d bytes came back as %d others", way, size, n)
					}
				}
			}
			must(t, d.Close())
			wait(t, ended, nil)
			if c := d.Counters(); c.Received < 6 || c.Written != 6 || c.ReceiveDropped+c.WriteDropped != 0 {
				t.Errorf("counters %+v", c)
			}
		})
	}
}

// TestSegmentedUDP sends what the kernel leaves in one piece as far as the
// device, and gets it back merged again.
func TestSegmentedUDP(t *testing.T) {
	d := open(t, 2)
	link, err := netlink.LinkByName(testName)
	must(t, err)
	if link.Attrs().GSOMaxSegs != batch {
		t.Errorf("gso_max_segs %d: more than the %d buffers that a packet is split into", link.Attrs().GSOMaxSegs, batch)
	}
	var mu sync.Mutex
	var sizes, batches []int
	answer := echo(t, d)
	run(d, t.Context(), func(q int, packets [][]byte) {
		mu.Lock()
		batches = append(batches, len(packets))
		for _, p := range packets {
			if p[0]>>4 == 4 {
				sizes = append(sizes, len(p))
				if checksum(0, p[:20]) != 0xffff || checksum(pseudo4(p), p[20:]) != 0xffff {
					t.Errorf("wrong checksum in % x", p[:28])
				}
			}
		}
		mu.Unlock()
		answer(q, packets)
	})
	const segments, size = 40, 1000
	c := dial(t, here4, there4)
	raw, err := c.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		err = errors.Join(
			unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1))
	}))
	must(t, err)
	sent := make([]byte, segments*size-1)
	for i := range sent {
		sent[i] = byte(i / size)
	}
	_, err = c.Write(sent)
	must(t, err)
	// Merged into as few pieces as writeRoom lets.
	var got []byte
	pieces, piece := 0, make([]byte, len(sent)+1)
	for ; len(got) < len(sent); pieces++ {
		n, err := c.Read(piece)
		must(t, err)
		got = append(got, piece[:n]...)
	}
	if !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back, not the %d that were sent: changed, or in another order", len(got), len(sent))
	}
	if want := len(sent)/(writeRoom-2*size) + 1; pieces > want {
		t.Errorf("they came back in %d pieces, want at most %d: not merged", pieces, want)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(sizes) != segments || sizes[0] != size+28 || sizes[segments-1] != size+27 {
		t.Errorf("%d packets of %v bytes, want %d of %d", len(sizes), sizes, segments, size+28)
	}
	if !bytes.Contains([]byte(fmt.Sprint(batches)), []byte(fmt.Sprint(segments))) {
		t.Errorf("batches of %v packets: the kernel split them, the offload is off", batches)
	}
}

func checksum(sum uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func pseudo4(p []byte) uint32 {
	return uint32(checksum(0, p[12:20])) + uint32(p[9]) + uint32(len(p)-20)
}

// TestFlowKeepsItsQueue: were a flow's packets read by two goroutines, they
// would overtake one another.
func TestFlowKeepsItsQueue(t *testing.T) {
	d := open(t, 2)
	var mu sync.Mutex
	learnt := map[uint16]int{} // port → queue by which the answer went
	other := 0
	used := map[int]bool{}
	answer := echo(t, d)
	run(d, t.Context(), func(q int, packets [][]byte) {
		mu.Lock()
		for _, p := range packets {
			if p[0]>>4 != 4 {
				continue
			}
			port := binary.BigEndian.Uint16(p[20:])
			if want, ok := learnt[port]; ok && q != want {
				other++
			}
			reversed := bytes.Clone(p)
			reverse(reversed)
			learnt[port] = int(flowHash(reversed) % 2)
			used[learnt[port]] = true
		}
		mu.Unlock()
		answer(q, packets)
	})
	for range 16 {
		c := dial(t, here4, there4)
		for range 4 {
			_, err := c.Write([]byte("x"))
			must(t, err)
			_, err = c.Read(make([]byte, 8))
			must(t, err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if other > 0 || len(used) != 2 {
		t.Errorf("%d packets came by another queue than their answers went; queues used: %v", other, used)
	}
}

func TestDeletedFromOutside(t *testing.T) {
	for _, queues := range []int{1, 2} {
		d := open(t, queues)
		ended := run(d, t.Context(), func(int, [][]byte) {})
		link, err := netlink.LinkByName(testName)
		must(t, err)
		must(t, netlink.LinkDel(link))
		wait(t, ended, ErrGone)
		if err := d.Write([][]byte{packet4(5)}); !errors.Is(err, ErrGone) {
			t.Errorf("Write: %v, want ErrGone", err)
		}
		must(t, d.Close())
		again, err := Open(testName, queues)
		must(t, err)
		if again.Index() == d.Index() {
			t.Error("the new interface has the index of the old one")
		}
		must(t, again.Close())
	}
}

func TestCloseWhileReading(t *testing.T) {
	d := open(t, 2)
	ended := run(d, t.Context(), func(int, [][]byte) {})
	must(t, d.Close())
	wait(t, ended, nil)
	if err := d.Write([][]byte{packet4(5)}); !errors.Is(err, ErrClosed) {
		t.Errorf("Write: %v, want ErrClosed", err)
	}
	if _, err := netlink.LinkByName(testName); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("the interface is still there: %v", err)
	}
	must(t, d.Close())
}

func TestContextEndsRunAlone(t *testing.T) {
	d := open(t, 2)
	ctx, cancel := context.WithCancel(t.Context())
	ended := run(d, ctx, func(int, [][]byte) {})
	cancel()
	wait(t, ended, nil)
	must(t, d.Write([][]byte{packet4(5)}))
	if c := d.Counters(); c.Written != 1 {
		t.Errorf("counters %+v", c)
	}
}

func TestOpenRefused(t *testing.T) {
	enter(t)
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "taken"}, PeerName: "peer"}))
	must(t, netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "left"}, Mode: netlink.TUNTAP_MODE_TUN,
		Flags: netlink.TUNTAP_MULTI_QUEUE | netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, Queues: 1}))
	mine, err := Open("mine", 1)
	must(t, err)
	defer func() { _ = mine.Close() }()
	for _, c := range []struct {
		name   string
		queues int
		want   string
	}{
		{"taken", 1, "exists already"},
		{"left", 1, "exists already"},
		{"mine", 2, "exists already"},
		{"", 1, "no name for a TUN device"},
		{"tun%d", 1, "no name for a TUN device"},
		{"a/b", 1, "no name for a TUN device"},
		{"sixteen-letters-", 1, "no name for a TUN device"},
		{"none", 0, "0 queues, want 1 to 16"},
		{"many", 17, "17 queues, want 1 to 16"},
	} {
		if d, err := Open(c.name, c.queues); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("Open(%q, %d) = %v, %v; want %q", c.name, c.queues, d, err, c.want)
		}
	}
	for err, want := range map[error]string{
		unix.ENOENT: "modprobe tun",
		unix.ENXIO:  "modprobe tun",
		unix.EPERM:  "CAP_NET_ADMIN",
		unix.EBUSY:  "exists already",
		unix.EMFILE: unix.EMFILE.Error(),
	} {
		if got := explain(err); !errors.Is(got, err) || !strings.Contains(got.Error(), want) {
			t.Errorf("%v is explained as %v, want %q", err, got, want)
		}
	}
}

// packet4 is a UDP packet to this end's port 5000, from a port.
func packet4(port uint16) []byte {
	p := make([]byte, 28+100)
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], there4.AsSlice())
	copy(p[16:], here4.AsSlice())
	binary.BigEndian.PutUint16(p[20:], port)
	binary.BigEndian.PutUint16(p[22:], 5000)
	binary.BigEndian.PutUint16(p[24:], uint16(len(p)-20))
	binary.BigEndian.PutUint16(p[10:], ^checksum(0, p[:20]))
	binary.BigEndian.PutUint16(p[26:], ^checksum(pseudo4(p), p[20:]))
	return p
}

func TestWriteDropsWhatTheKernelRefuses(t *testing.T) {
	d := open(t, 2)
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(here4, 5000)))
	must(t, err)
	defer func() { _ = c.Close() }()
	must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	must(t, d.Write([][]byte{nil, make([]byte, 40), make([]byte, writeRoom+1), packet4(7)}))
	if _, from, err := c.ReadFromUDPAddrPort(make([]byte, 200)); err != nil || from.Port() != 7 {
		t.Errorf("the good one among bad ones: from %v, %v", from, err)
	}
	if c := d.Counters(); c.Written != 1 || c.WriteDropped != 3 {
		t.Errorf("counters %+v, want 1 written and 3 dropped", c)
	}
	link, err := netlink.LinkByName(testName)
	must(t, err)
	must(t, netlink.LinkSetDown(link))
	must(t, d.Write([][]byte{packet4(1), packet4(2)}))
	if c := d.Counters(); c.Written != 1 || c.WriteDropped != 5 {
		t.Errorf("counters %+v, want 5 dropped when the interface is down", c)
	}
	must(t, netlink.LinkSetUp(link))
	must(t, d.Write([][]byte{packet4(9)}))
	if _, from, err := c.ReadFromUDPAddrPort(make([]byte, 200)); err != nil || from.Port() != 9 {
		t.Errorf("up again: from %v, %v", from, err)
	}
}

// TestWriteSurvivesAnything: the packets come from the other end, which may be
// hostile. More than a batch of flows in one call is more than the tables hold.
func TestWriteSurvivesAnything(t *testing.T) {
	d := open(t, 2)
	r := rand.New(rand.NewPCG(1, 2))
	total := 0
	for range 50 {
		packets := make([][]byte, 300)
		for i := range packets {
			p := packet4(uint16(r.Uint32()))
			switch r.IntN(4) {
			case 0:
				p = p[:r.IntN(len(p)+1)]
			case 1:
				p[r.IntN(len(p))] = byte(r.Uint32())
			case 2:
				p[0], p[6], p[9] = 0x60|byte(r.IntN(16)), byte([]int{6, 17, 44}[r.IntN(3)]), byte(r.Uint32())
			}
			packets[i] = p
		}
		must(t, d.Write(packets))
		total += len(packets)
	}
	if c := d.Counters(); c.Written < uint64(total)/4 || c.Written+c.WriteDropped != uint64(total) {
		t.Errorf("%+v of %d", c, total)
	}
}

func TestConcurrentWrites(t *testing.T) {
	d := open(t, 2)
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := range 100 {
				if err := d.Write([][]byte{packet4(uint16(w)), packet4(uint16(i))}); err != nil {
					t.Errorf("Write: %v", err)
				}
			}
		})
	}
	writers.Wait()
	if c := d.Counters(); c.Written != 800 {
		t.Errorf("counters %+v, want 800 written", c)
	}
}

func TestFlowHash(t *testing.T) {
	first := packet4(1)
	for what, c := range map[string]struct {
		change func([]byte) []byte
		same   bool
	}{
		"payload":         {func(p []byte) []byte { p[40]++; return p }, true},
		"DSCP":            {func(p []byte) []byte { p[1] = 0xb8; return p }, true},
		"identification":  {func(p []byte) []byte { p[4]++; return p }, true},
		"do not fragment": {func(p []byte) []byte { p[6] |= 0x40; return p }, true},
		"source port":     {func(p []byte) []byte { p[21]++; return p }, false},
		"destination":     {func(p []byte) []byte { p[19]++; return p }, false},
	} {
		if same := flowHash(c.change(bytes.Clone(first))) == flowHash(first); same != c.same {
			t.Errorf("another %s: same flow %v, want %v", what, same, c.same)
		}
	}
	head, tail := bytes.Clone(first), packet4(99)
	head[6], tail[7] = 0x20, 100
	if flowHash(head) != flowHash(tail) {
		t.Error("the fragments of a packet are spread")
	}
	for n := range first { // cut short
		flowHash(first[:n])
	}
}

// BenchmarkWrite: per packet, one flow or many (merged or not).
func BenchmarkWrite(b *testing.B) {
	for _, c := range []struct {
		name        string
		size, flows int
		n           int
	}{{"1 packet", 100, 1, 1}, {"64 of one flow", 1300, 1, 64}, {"64 of 64 flows", 1300, 64, 64}} {
		b.Run(c.name, func(b *testing.B) {
			d := open(b, 2)
			sink, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(here4, 5000)))
			must(b, err)
			defer func() { _ = sink.Close() }()
			packets := make([][]byte, c.n)
			for i := range packets {
				p := append(packet4(uint16(i%c.flows)), make([]byte, c.size-100)...)
				binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
				binary.BigEndian.PutUint16(p[24:], uint16(len(p)-20))
				p[10], p[11], p[26], p[27] = 0, 0, 0, 0
				binary.BigEndian.PutUint16(p[10:], ^checksum(0, p[:20]))
				binary.BigEndian.PutUint16(p[26:], ^checksum(pseudo4(p), p[20:]))
				packets[i] = p
			}
			b.ReportAllocs()
			for b.Loop() {
				must(b, d.Write(packets))
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*c.n), "ns/packet")
		})
	}
}

// BenchmarkCopy is the part of BenchmarkWrite that a contract of headroom would
// spare.
func BenchmarkCopy(b *testing.B) {
	to, from := makeBuffers(writeBatch, writeRoom), makeBuffers(writeBatch, writeRoom)
	i := 0
	for b.Loop() {
		copy(to[i%writeBatch][headroom:], from[i%writeBatch][:1328])
		i++
	}
}

// BenchmarkRead: per packet, whole or segmented by the sender.
func BenchmarkRead(b *testing.B) {
	for _, segments := range []int{1, 40} {
		b.Run(fmt.Sprintf("%d segments", segments), func(b *testing.B) {
			d := open(b, 1)
			arrived := make(chan int, 1024)
			go func() {
				_ = d.Run(b.Context(), func(_ int, packets [][]byte) {
					if packets[0][0]>>4 == 4 {
						arrived <- len(packets)
					}
				})
			}()
			c := dial(b, here4, there4)
			must(b, c.SetDeadline(time.Time{}))
			raw, err := c.SyscallConn()
			must(b, err)
			must(b, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1300) }))
			must(b, err)
			data := make([]byte, 1300*segments)
			b.ReportAllocs()
			for b.Loop() {
				_, err := c.Write(data)
				must(b, err)
				for n := 0; n < segments; {
					n += <-arrived
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*segments), "ns/packet")
		})
	}
}

func TestIsLinkLocal(t *testing.T) {
	packet := func(source, destination string) []byte {
		from, to := netip.MustParseAddr(source), netip.MustParseAddr(destination)
		if from.Is4() {
			b := make([]byte, 20)
			b[0] = 0x45
			copy(b[12:], from.AsSlice())
			copy(b[16:], to.AsSlice())
			return b
		}
		b := make([]byte, 40)
		b[0] = 0x60
		copy(b[8:], from.AsSlice())
		copy(b[24:], to.AsSlice())
		return b
	}
	for _, c := range []struct {
		source, destination string
		want                bool
	}{
		{"10.9.0.1", "198.51.100.20", false},
		{"10.9.0.1", "224.0.0.22", true}, // IGMP
		{"10.9.0.1", "224.0.1.1", false}, // NTP, which is routed
		{"10.9.0.1", "169.254.1.1", true},
		{"169.254.1.1", "10.9.0.1", true},
		{"169.253.1.1", "169.255.0.0", false},
		{"fd09::1", "2001:db8::1", false},
		{"fe80::1", "ff02::16", true}, // MLD
		{"::", "ff02::16", true},
		{"fd09::1", "ff05::2", false}, // site-local multicast
		{"fd09::1", "ff12::1", true},
		{"febf::1", "fd09::1", true},
		{"fd09::1", "fe80::1", true},
		{"fec0::1", "fd09::1", false},
	} {
		if got := isLinkLocal(packet(c.source, c.destination)); got != c.want {
			t.Errorf("%s > %s: %v, want %v", c.source, c.destination, got, c.want)
		}
	}
	for _, short := range [][]byte{{}, {0x45}, make([]byte, 19), packet("fe80::1", "ff02::1")[:39]} {
		if isLinkLocal(short) {
			t.Errorf("%d bytes are no header, and yet for the link", len(short))
		}
	}
}
