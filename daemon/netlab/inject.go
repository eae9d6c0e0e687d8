package netlab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// An Injector sends IP packets as they are from an interface of a Host, past
// its kernel's IP: from sources that are not its own, malformed, in fragments
// without end. Only the link-layer header is made by the kernel.
type Injector struct {
	fd   int
	next unix.SockaddrLinklayer
}

// Injector opens one on the interface, towards the machine of that hardware
// address. Close it.
func (h *Host) Injector(device string, next net.HardwareAddr) (*Injector, error) {
	if len(next) != 6 {
		return nil, fmt.Errorf("netlab: inject from %s: hardware address %v: want 6 bytes", h.Name, next)
	}
	i := &Injector{fd: -1}
	err := h.Do(func() error {
		link, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		i.next = unix.SockaddrLinklayer{Ifindex: link.Index, Halen: 6}
		copy(i.next.Addr[:], next)
		i.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, fmt.Errorf("netlab: inject from %s by %s: %w", h.Name, device, err)
	}
	return i, nil
}

// InjectFromLAN opens an Injector on the LAN client, towards the router.
func (l *Lab) InjectFromLAN() (*Injector, error) {
	var next net.HardwareAddr
	err := l.Router.Do(func() error {
		link, err := net.InterfaceByName("lan0")
		if err == nil {
			next = link.HardwareAddr
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("netlab: inject from the LAN: lan0: %w", err)
	}
	return l.LAN.Injector("eth0", next)
}

// Send sends one packet, whatever it is. The frame says IPv6 if its first half
// byte is 6, else IPv4.
func (i *Injector) Send(packet []byte) error {
	next := i.next
	next.Protocol = networkOrder(unix.ETH_P_IP)
	if len(packet) > 0 && packet[0]>>4 == 6 {
		next.Protocol = networkOrder(unix.ETH_P_IPV6)
	}
	if err := unix.Sendto(i.fd, packet, 0, &next); err != nil {
		return fmt.Errorf("netlab: inject %d bytes: %w", len(packet), err)
	}
	return nil
}

// FragmentFlood sends the first fragment only of count UDP datagrams, each of
// another identification, so that whoever puts fragments together waits for
// count more. At most a million.
func (i *Injector) FragmentFlood(source, destination netip.AddrPort, count int) error {
	const most = 1_000_000
	if count < 0 || count > most {
		return fmt.Errorf("netlab: flood of %d fragments: give 0 to %d", count, most)
	}
	packet := UDPPacket(source, destination, make([]byte, 2000))
	for n := range count {
		// ENOBUFS: the interface cannot take more just now; a flood does not mind.
		if err := i.Send(Fragments(packet, 1000, uint32(n))[0]); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
	return nil
}

// Close closes the Injector.
func (i *Injector) Close() error {
	return os.NewSyscallError("close", unix.Close(i.fd))
}
