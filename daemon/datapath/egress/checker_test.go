package egress

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestMain runs the tests again in a process that has a network namespace of
// its own, because what is tested uses many threads.
func TestMain(m *testing.M) {
	const inside = "SHEAF_TEST_NAMESPACE"
	if os.Getenv(inside) != "" {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	again := exec.Command("/proc/self/exe", os.Args[1:]...)
	again.Env = append(os.Environ(), inside+"=1")
	again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	err := again.Run()
	if errors.As(err, new(*exec.ExitError)) {
		os.Exit(1) // it has said why
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "the tests in a network namespace: %v (they need root)\n", err)
		os.Exit(1)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// addAddress gives the namespace an address until the test ends.
func addAddress(t testing.TB, prefix string) {
	t.Helper()
	a, err := netlink.ParseAddr(prefix)
	must(t, err)
	a.Flags = unix.IFA_F_NODAD
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.AddrAdd(lo, a))
	t.Cleanup(func() { must(t, netlink.AddrDel(lo, a)) })
}

func TestChecker(t *testing.T) {
	addAddress(t, "198.51.100.1/32")
	c := NewChecker(Policy{Allowed: []netip.Prefix{netip.MustParsePrefix("10.83.0.1/32")}})
	check := func(destination string, want bool) {
		t.Helper()
		if got := c.Allowed(netip.MustParseAddr(destination)); got != want {
			t.Errorf("%s: allowed %v, want %v", destination, got, want)
		}
	}
	check("203.0.113.7", true)
	check("2606:4700::1111", true)
	check("10.83.0.1", true)
	check("10.83.0.2", false)
	check("198.51.100.1", false)
	check("::ffff:198.51.100.1", false)
	check("64:ff9b::c633:6401", false) // 198.51.100.1 through NAT64
	check("198.51.100.2", true)

	addAddress(t, "198.51.100.2/32")
	check("198.51.100.2", true) // believed a while
	c.own.list.Load().at = time.Now().Add(-ownEvery)
	check("198.51.100.2", false)
	c.own.list.Store(&ownList{err: net.ErrClosed, at: time.Now()})
	check("203.0.113.7", false) // nothing is allowed while the own addresses are unknown

	public := netip.MustParseAddr("203.0.113.7")
	if n := testing.AllocsPerRun(100, func() { c.Allowed(public) }); n != 0 {
		t.Errorf("%v allocations for each packet", n)
	}
}

func BenchmarkChecker(b *testing.B) {
	for _, destination := range []string{"203.0.113.7", "2606:4700::1111", "192.168.1.1"} {
		b.Run(destination, func(b *testing.B) {
			c, a := NewChecker(Policy{Allowed: []netip.Prefix{netip.MustParsePrefix("10.83.0.1/32")}}), netip.MustParseAddr(destination)
			for b.Loop() {
				c.Allowed(a)
			}
		})
	}
}
