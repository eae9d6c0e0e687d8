package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// A Host is a machine of the lab: a network namespace without a name.
//
// Its owner is a thread that lives in the namespace as long as the Host. It
// exists for the processes started in the Host: the kernel kills them when the
// thread that started them ends (Pdeathsig). Everything else borrows the
// calling thread for a moment, so that any number of callers can be in a Host
// at once.
type Host struct {
	Name string

	owned chan func() // run by the owner's thread

	mu        sync.Mutex
	namespace int // file descriptor, -1 when closed
	processes map[*Process]struct{}
}

func newHost(name string) (*Host, error) {
	h := &Host{Name: name, owned: make(chan func()), namespace: -1, processes: map[*Process]struct{}{}}
	ready := make(chan error)
	go h.own(ready)
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("netlab: host %s: %w", name, err)
	}
	return h, nil
}

// own is the life of the owner's thread. It never unlocks the thread, so that
// the Go runtime ends it with the goroutine instead of using it elsewhere.
func (h *Host) own(ready chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread cannot end before the process. Occupy it until
		// another thread has taken over.
		taken := make(chan error)
		go h.own(taken)
		ready <- <-taken
		runtime.UnlockOSThread()
		return
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		ready <- fmt.Errorf("make a network namespace: %w (needs root, and a kernel with CONFIG_NET_NS)", err)
		return
	}
	namespace, err := openNamespace()
	if err != nil {
		ready <- err
		return
	}
	h.namespace = namespace
	ready <- nil
	for f := range h.owned {
		f()
	}
}

// openNamespace opens the network namespace of the calling thread.
func openNamespace() (int, error) {
	const path = "/proc/thread-self/ns/net"
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// close kills the processes and ends the owner. The namespace goes with its
// last user: sockets that a caller opened in it and still holds keep it.
func (h *Host) close() error {
	h.mu.Lock()
	namespace := h.namespace
	h.namespace = -1
	processes := h.processes
	h.processes = nil
	h.mu.Unlock()
	if namespace < 0 {
		return nil
	}
	var errs []error
	for p := range processes {
		errs = append(errs, p.Kill())
	}
	close(h.owned)
	if err := unix.Close(namespace); err != nil {
		errs = append(errs, fmt.Errorf("netlab: close the namespace of %s: %w", h.Name, err))
	}
	return errors.Join(errs...)
}

// Do runs f in the Host's namespace, on the calling goroutine and with its
// thread locked. Sockets that f opens, and /proc/thread-self/net and
// /proc/sys/net, are the Host's, also afterwards; goroutines that f starts are
// not in the Host. Do may be nested, also for different Hosts.
func (h *Host) Do(f func() error) error {
	runtime.LockOSThread()
	previous, err := openNamespace()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("netlab: host %s: %w", h.Name, err)
	}
	defer unix.Close(previous)
	if err := h.enter(); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		if err := unix.Setns(previous, unix.CLONE_NEWNET); err != nil {
			// Other goroutines would go on in the wrong namespace unnoticed.
			panic(fmt.Sprintf("netlab: cannot leave the namespace of %s: %v", h.Name, err))
		}
		runtime.UnlockOSThread()
	}()
	return f()
}

func (h *Host) enter() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.namespace < 0 {
		return fmt.Errorf("netlab: host %s is closed", h.Name)
	}
	if err := unix.Setns(h.namespace, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("netlab: enter the namespace of %s: %w", h.Name, err)
	}
	return nil
}

// Dial connects from the Host by plain TCP or UDP. The address is a literal,
// such as "203.0.113.10:443": there is no DNS in the lab.
func (h *Host) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{}
	d.SetMultipathTCP(false)
	return h.DialWith(ctx, d, network, address)
}

// DialMultipath is Dial by MPTCP.
func (h *Host) DialMultipath(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{}
	d.SetMultipathTCP(true)
	return h.DialWith(ctx, d, network, address)
}

// DialWith is Dial with a Dialer of the caller's: local address, timeout,
// socket options, MPTCP or not.
func (h *Host) DialWith(ctx context.Context, d net.Dialer, network, address string) (net.Conn, error) {
	if err := literal(address); err != nil {
		return nil, err
	}
	var c net.Conn
	err := h.Do(func() (err error) {
		// With one literal address the Dialer has nothing to resolve and
		// nothing to race, and makes the socket on this goroutine.
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen listens in the Host by plain TCP, on a literal address.
func (h *Host) Listen(network, address string) (net.Listener, error) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false) // Go's default is MPTCP
	return h.ListenWith(lc, network, address)
}

// ListenMultipath is Listen by MPTCP; it accepts plain TCP too.
func (h *Host) ListenMultipath(network, address string) (net.Listener, error) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(true)
	return h.ListenWith(lc, network, address)
}

// ListenWith is Listen with a ListenConfig of the caller's. Unless told by
// SetMultipathTCP(false), Go listens by MPTCP.
func (h *Host) ListenWith(lc net.ListenConfig, network, address string) (net.Listener, error) {
	if err := literal(address); err != nil {
		return nil, err
	}
	var l net.Listener
	err := h.Do(func() (err error) {
		l, err = lc.Listen(context.Background(), network, address)
		return err
	})
	return l, err
}

// ListenPacket listens in the Host for datagrams, on a literal address.
func (h *Host) ListenPacket(network, address string) (net.PacketConn, error) {
	if err := literal(address); err != nil {
		return nil, err
	}
	var c net.PacketConn
	err := h.Do(func() (err error) {
		c, err = new(net.ListenConfig).ListenPacket(context.Background(), network, address)
		return err
	})
	return c, err
}

// literal refuses names: the resolver would run on other threads, in another
// namespace.
func literal(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("netlab: address %q: %w; write it as 192.0.2.1:80 or [2001:db8::1]:80", address, err)
	}
	if host == "" {
		return nil
	}
	if _, err := netip.ParseAddr(host); err != nil {
		return fmt.Errorf("netlab: address %q: the host must be an IP address, there is no DNS in the lab", address)
	}
	return nil
}
