package kernel

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// enter puts the test into a network namespace of its own. Its thread is never
// unlocked: it ends with the test, and the namespace with it.
func enter(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a network namespace: %v (these tests need root)", err)
	}
	up(t, "lo")
	must(t, withoutDAD())
}

// withoutDAD spares every link of the namespace the second in which it checks
// its link-local address for duplicates, and answers nobody.
func withoutDAD() error { return writeSysctl("net/ipv6/conf/default/accept_dad", "0") }

// host is another machine: a namespace with a thread that works in it.
type host struct {
	fd      int
	work    chan func()
	timeout time.Duration // of dial, when it is not the usual one
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ready <- err
			return
		}
		var err error
		h.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		ready <- errors.Join(err, withoutDAD())
		for f := range h.work {
			f()
		}
	}()
	must(t, <-ready)
	t.Cleanup(func() {
		close(h.work)
		unix.Close(h.fd)
	})
	return h
}

// do runs f in the host. Sockets that f opens stay in the host.
func (h *host) do(t *testing.T, f func() error) {
	t.Helper()
	must(t, h.try(f))
}

func (h *host) try(f func() error) error {
	done := make(chan error)
	h.work <- func() { done <- f() }
	return <-done
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

// addVeth makes a link whose other end stays in the namespace, and gives it
// addresses.
func addVeth(t *testing.T, name string, addresses ...string) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "x" + name}))
	up(t, "x"+name)
	return up(t, name, addresses...)
}

// connect makes a link to another host: name here, peer there.
func connect(t *testing.T, name string, addresses []string, h *host, peer string, peerAddresses []string) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: peer, PeerNamespace: netlink.NsFd(h.fd)}))
	h.do(t, func() error { return upErr(peer, peerAddresses...) })
	return up(t, name, addresses...)
}

func up(t *testing.T, name string, addresses ...string) netlink.Link {
	t.Helper()
	must(t, upErr(name, addresses...))
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l
}

func upErr(name string, addresses ...string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	for _, a := range addresses {
		// Without duplicate address detection, which takes a second.
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: cidr(a), Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
	}
	return nil
}

// addDefault adds a default route to the main table of the calling thread's
// namespace.
func addDefault(name, gateway string, metric int) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	dst := "0.0.0.0/0"
	if net.ParseIP(gateway).To4() == nil {
		dst = "::/0"
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: cidr(dst), Gw: net.ParseIP(gateway), Priority: metric})
}

func writeSysctl(path, value string) error {
	return os.WriteFile("/proc/sys/"+path, []byte(value), 0)
}

// eventually waits for what the kernel does in its own time.
func eventually(t *testing.T, what string, condition func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(3 * time.Second)
	for {
		ok, state := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %s", what, state)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func text[T fmt.Stringer](changes []T) string {
	s := ""
	for _, c := range changes {
		s += "\n" + c.String()
	}
	return s
}

func lockThread(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
}
