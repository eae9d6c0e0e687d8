// Package intercept takes LAN connections that the kernel diverts to it.
//
// The path of a LAN client's SYN:
//
//  1. It enters through a LAN interface; our nftables rule (control/kernel)
//     marks it and gives it to our listener, leaving its addresses as they are.
//  2. The mark selects a routing table in which every address is local, so the
//     kernel delivers it instead of forwarding it.
//  3. The listener, transparent and on loopback, accepts it: the connection's
//     local address is the destination that the client meant.
//  4. Listener hands client and destination to the router.
//
// Being on loopback, the listener cannot be reached by asking for its port.
package intercept

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A client that has gone without a word is noticed after about two minutes.
var clientKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// Listener accepts diverted connections, IPv4 and IPv6.
type Listener struct {
	listeners []net.Listener
	log       *slog.Logger
}

// Listen opens the transparent listeners on a port of the loopback addresses.
// It needs CAP_NET_ADMIN. A kernel without IPv6 gets IPv4 alone.
func Listen(ctx context.Context, port uint16, log *slog.Logger) (*Listener, error) {
	l := &Listener{log: log}
	config := net.ListenConfig{Control: transparent, KeepAliveConfig: clientKeepAlive}
	// LAN clients speak TCP; an MPTCP socket would only cost them.
	config.SetMultipathTCP(false)
	for network, address := range map[string]netip.Addr{"tcp4": netip.AddrFrom4([4]byte{127, 0, 0, 1}), "tcp6": netip.IPv6Loopback()} {
		one, err := config.Listen(ctx, network, netip.AddrPortFrom(address, port).String())
		if err != nil {
			if network == "tcp6" && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
				log.Warn("no IPv6 on this kernel: LAN connections over IPv6 are not diverted", "error", err)
				continue
			}
			l.Close()
			return nil, fmt.Errorf("listening for diverted LAN connections: %w (another sheafd, or no CAP_NET_ADMIN?)", err)
		}
		l.listeners = append(l.listeners, one)
	}
	return l, nil
}

func transparent(network, _ string, c syscall.RawConn) error {
	var err error
	controlErr := c.Control(func(fd uintptr) {
		if network == "tcp6" {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		}
	})
	return errors.Join(controlErr, err)
}

// Serve calls handle, each time in a goroutine of its own, for every diverted
// connection, until Close.
func (l *Listener) Serve(handle func(client *net.TCPConn, destination netip.AddrPort)) {
	var accepting sync.WaitGroup
	for _, one := range l.listeners {
		accepting.Go(func() {
			for {
				conn, err := one.Accept()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					// Out of descriptors or memory: those that are open go on.
					l.log.Error("accepting a LAN connection failed", "error", err)
					time.Sleep(100 * time.Millisecond)
					continue
				}
				client := conn.(*net.TCPConn)
				destination := client.LocalAddr().(*net.TCPAddr).AddrPort()
				if destination == one.Addr().(*net.TCPAddr).AddrPort() {
					_ = client.Close() // not diverted: somebody on the router itself
					continue
				}
				go handle(client, netip.AddrPortFrom(destination.Addr().Unmap(), destination.Port()))
			}
		})
	}
	accepting.Wait()
}

// Close ends Serve.
func (l *Listener) Close() {
	for _, one := range l.listeners {
		_ = one.Close()
	}
}
