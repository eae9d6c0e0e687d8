package kernel

import (
	"errors"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// drain waits until events have been quiet for a while.
func drain(k *Kernel) {
	for {
		select {
		case <-k.Changed():
		case <-time.After(50 * time.Millisecond):
			return
		}
	}
}

func expectWake(t *testing.T, k *Kernel, what string) {
	t.Helper()
	select {
	case <-k.Changed():
	case <-time.After(2 * time.Second):
		t.Errorf("%s did not wake", what)
	}
}

// TestChanged: every change of what Read or uplink.Observe read wakes.
func TestChanged(t *testing.T) {
	enter(t)
	wan1 := addVeth(t, "wan1", "10.1.0.2/24", "2001:db8:1::2/64")
	k := open(t)
	drain(k)
	for _, command := range []string{
		"link add wan9 type veth peer name xwan9",
		"link set wan9 up",
		"address add 10.9.0.2/24 dev wan9",
		"-6 address add 2001:db8:9::2/64 dev wan9 nodad",
		"route add 10.99.0.0/24 via 10.1.0.1",
		"-6 route add 2001:db8:99::/64 via fe80::1 dev wan1",
		"rule add from 10.1.0.2 lookup 99",
		"-6 rule add from 2001:db8:1::2 lookup 99",
		"rule del from 10.1.0.2 lookup 99",
		"route del 10.99.0.0/24",
		"link set xwan1 down",
		"link del wan9",
	} {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", command, err, out)
		}
		expectWake(t, k, "ip "+command)
		drain(k)
	}
	conn, err := nftables.New()
	must(t, err)
	conn.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyIPv4})
	must(t, conn.Flush())
	expectWake(t, k, "a new nftables table")
	drain(k)

	// Reading, and applying nothing, wakes nobody.
	read(t, k)
	must(t, k.Apply(ctx, nil))
	select {
	case <-k.Changed():
		t.Error("reading is an event")
	case <-time.After(100 * time.Millisecond):
	}

	// Any number of events is one wake-up while nobody listens.
	for i := range 300 {
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: wan1.Attrs().Index, Dst: cidr("10.77.0.0/32"), Priority: i + 1, Scope: netlink.SCOPE_LINK}))
	}
	time.Sleep(100 * time.Millisecond)
	expectWake(t, k, "a burst")
	select {
	case <-k.Changed():
		t.Error("a burst that was over woke twice")
	case <-time.After(100 * time.Millisecond):
	}
}

// TestChangedAfterOverflow: when events come faster than they are read, the
// kernel drops some. That wakes, and later events still do.
func TestChangedAfterOverflow(t *testing.T) {
	enter(t)
	wan1 := addVeth(t, "wan1", "10.1.0.2/24")
	conn, err := mdlayher.Dial(unix.NETLINK_ROUTE, nil)
	must(t, err)
	must(t, conn.JoinGroup(unix.RTNLGRP_IPV4_ROUTE))
	must(t, conn.SetReadBuffer(1)) // the kernel makes it its minimum
	flood := func(from, to int) {
		for i := from; i < to; i++ {
			must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: wan1.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4(10, 77, byte(i>>8), byte(i)), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}))
		}
	}
	flood(0, 500)
	if _, err := conn.Receive(); !errors.Is(err, unix.ENOBUFS) {
		t.Fatalf("500 events fit into the buffer: %v", err)
	}
	flood(500, 1000)
	k := &Kernel{changed: make(chan struct{}, 1), closed: make(chan struct{}), sources: []source{conn}}
	k.watches.Go(func() { k.follow(conn) })
	expectWake(t, k, "the overflow")
	drain(k)
	flood(1000, 1001)
	expectWake(t, k, "an event after the overflow")
	must(t, k.Close())
}

// TestCloseIsClean: Close ends the watching and changes nothing.
func TestCloseIsClean(t *testing.T) {
	s := router(t)
	k, err := New()
	must(t, err)
	must(t, k.Apply(ctx, desired.Diff(read(t, k), compile(t, s))))
	before := dumpNamespace(t)
	must(t, k.Close())
	if after := dumpNamespace(t); after != before {
		t.Errorf("Close changed\n%s\nto\n%s", before, after)
	}
}
