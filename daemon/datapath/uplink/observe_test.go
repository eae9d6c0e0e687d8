package uplink

import (
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namespace puts the test into a network namespace of its own. Its thread is
// never unlocked: it ends with the test, and the namespace with it.
func namespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a network namespace: %v (these tests need root)", err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func cidr(s string) *net.IPNet {
	n, err := netlink.ParseIPNet(s)
	if err != nil {
		panic(err)
	}
	return n
}

func addVeth(t *testing.T, name string) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "x" + name}))
	for _, n := range []string{name, "x" + name} {
		l, err := netlink.LinkByName(n)
		must(t, err)
		must(t, netlink.LinkSetUp(l))
	}
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l
}

func addAddress(t *testing.T, l netlink.Link, a string) {
	t.Helper()
	must(t, netlink.AddrAdd(l, &netlink.Addr{IPNet: cidr(a), Flags: unix.IFA_F_NODAD}))
}

// TestObserve follows an uplink through everything that can happen to it, as
// the kernel tells it.
func TestObserve(t *testing.T) {
	namespace(t)
	wants := []Want{{Name: "dsl", Interface: "wan1"}, {Name: "lte", Interface: "wan2"}}
	judge := func() (string, string, []Status) {
		t.Helper()
		o, err := Observe([]string{"wan1", "wan2"})
		must(t, err)
		s := Judge(o, wants)
		return show(s[0]), show(s[1]), s
	}
	expect := func(want1, want2 string) {
		t.Helper()
		// IPv6 becomes usable, and the carrier comes and goes, in their own time.
		deadline := time.Now().Add(3 * time.Second)
		for {
			got1, got2, _ := judge()
			if got1 == want1 && got2 == want2 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("got  %s\nwant %s\ngot  %s\nwant %s", got1, want1, got2, want2)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	const wan2Absent = "wan2: [] via [] unfit: interface wan2 does not exist"
	expect("wan1: [] via [] unfit: interface wan1 does not exist", wan2Absent)

	wan1 := addVeth(t, "wan1")
	expect("wan1: [] via [] unfit: wan1 has no usable address", wan2Absent)
	addAddress(t, wan1, "10.1.0.2/24")
	expect("wan1: [] via [] unfit: no default route on wan1 in the main table: its gateway is unknown", wan2Absent)

	via1 := &netlink.Route{LinkIndex: wan1.Attrs().Index, Dst: cidr("0.0.0.0/0"), Gw: net.ParseIP("10.1.0.1"), Priority: 50}
	must(t, netlink.RouteAdd(via1))
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: wan1.Attrs().Index, Dst: cidr("0.0.0.0/0"), Gw: net.ParseIP("10.1.0.9"), Priority: 60}))
	expect("wan1: [10.1.0.2/24] via [10.1.0.1]", wan2Absent)

	// Other tables, and routes that lead nowhere, tell nothing.
	wan2 := addVeth(t, "wan2")
	addAddress(t, wan2, "10.2.0.2/24")
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: wan2.Attrs().Index, Dst: cidr("0.0.0.0/0"), Gw: net.ParseIP("10.2.0.1"), Table: 77}))
	must(t, netlink.RouteAdd(&netlink.Route{Dst: cidr("0.0.0.0/0"), Type: unix.RTN_UNREACHABLE, Priority: 9999}))
	expect("wan1: [10.1.0.2/24] via [10.1.0.1]",
		"wan2: [] via [] unfit: no default route on wan2 in the main table: its gateway is unknown")

	addAddress(t, wan2, "2001:db8:2::2/64")
	must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: wan2.Attrs().Index, Dst: cidr("::/0"), Gw: net.ParseIP("fe80::1")}))
	expect("wan1: [10.1.0.2/24] via [10.1.0.1]", "wan2: [2001:db8:2::2/64] via [fe80::1]")

	// One route over both.
	must(t, netlink.RouteAdd(&netlink.Route{Dst: cidr("0.0.0.0/0"), Priority: 10, MultiPath: []*netlink.NexthopInfo{
		{LinkIndex: wan1.Attrs().Index, Gw: net.ParseIP("10.1.0.3")},
		{LinkIndex: wan2.Attrs().Index, Gw: net.ParseIP("10.2.0.3")},
	}}))
	expect("wan1: [10.1.0.2/24] via [10.1.0.3]", "wan2: [10.2.0.2/24 2001:db8:2::2/64] via [10.2.0.3 fe80::1]")

	peer, err := netlink.LinkByName("xwan1")
	must(t, err)
	must(t, netlink.LinkSetDown(peer))
	expect("wan1: [10.1.0.2/24] via [10.1.0.3] unfit: wan1 has no carrier: nothing answers at the other end of the link",
		"wan2: [10.2.0.2/24 2001:db8:2::2/64] via [10.2.0.3 fe80::1]")
	must(t, netlink.LinkSetDown(wan2))
	_, got2, _ := judge()
	if want := "wan2: [] via [] unfit: interface wan2 is down"; got2 != want {
		t.Errorf("got  %s\nwant %s", got2, want)
	}
	must(t, netlink.LinkDel(wan2))
	if _, got2, _ = judge(); got2 != wan2Absent {
		t.Errorf("got  %s\nwant %s", got2, wan2Absent)
	}

	// A tunnel, of which the other end is the gateway.
	tunnel := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "wan2"}, Mode: netlink.TUNTAP_MODE_TUN,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE, NonPersist: true, Queues: 1}
	must(t, netlink.LinkAdd(tunnel))
	defer func() { _ = tunnel.Fds[0].Close() }()
	must(t, netlink.LinkSetUp(tunnel))
	addAddress(t, tunnel, "10.99.0.2/30")
	if _, got2, _ = judge(); got2 != "wan2: [10.99.0.2/30] via [0.0.0.0]" {
		t.Errorf("a tunnel: %s", got2)
	}
}

// TestObserveTentative: an address that is still being checked is not used yet.
func TestObserveTentative(t *testing.T) {
	namespace(t)
	wan1 := addVeth(t, "wan1")
	must(t, netlink.AddrAdd(wan1, &netlink.Addr{IPNet: cidr("2001:db8:1::2/64")})) // with duplicate address detection
	o, err := Observe([]string{"wan1"})
	must(t, err)
	for _, a := range o.Links[0].Addresses {
		if a.Prefix.Addr() == netip.MustParseAddr("2001:db8:1::2") {
			if !a.Unusable {
				t.Error("a tentative address counts as usable")
			}
			return
		}
	}
	t.Errorf("the address was not observed: %+v", o)
}

// TestObserveCounters: what passes over a link is counted.
func TestObserveCounters(t *testing.T) {
	namespace(t)
	wan1 := addVeth(t, "wan1")
	addAddress(t, wan1, "10.1.0.2/24")
	must(t, netlink.NeighAdd(&netlink.Neigh{LinkIndex: wan1.Attrs().Index, IP: net.ParseIP("10.1.0.1"), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}, State: netlink.NUD_PERMANENT}))
	conn, err := net.Dial("udp", "10.1.0.1:9")
	must(t, err)
	defer conn.Close()
	before, err := Observe([]string{"wan1"})
	must(t, err)
	_, err = conn.Write(make([]byte, 1000))
	must(t, err)
	after, err := Observe([]string{"wan1"})
	must(t, err)
	if sent := after.Links[0].SentBytes - before.Links[0].SentBytes; sent < 1000 {
		t.Errorf("%d bytes counted after sending 1000", sent)
	}
}
