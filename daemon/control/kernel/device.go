package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// readDevices reads the TUN devices of our names that there are.
func (k *Kernel) readDevices(names map[int]string) (tunnel desired.Device, legs []desired.Device, err error) {
	for index, name := range names {
		if name != k.scope.device && !strings.HasPrefix(name, k.scope.legs) {
			continue
		}
		device, err := k.readDevice(desired.Interface{Index: index, Name: name})
		switch {
		case err != nil:
			return tunnel, legs, err
		case name == k.scope.device:
			tunnel = device
		case device.Interface.Index != 0:
			legs = append(legs, device)
		}
	}
	slices.SortFunc(legs, func(a, b desired.Device) int { return strings.Compare(a.Interface.Name, b.Interface.Name) })
	return tunnel, legs, nil
}

func (k *Kernel) readDevice(i desired.Interface) (desired.Device, error) {
	link, err := k.routing.LinkByIndex(i.Index)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) || errors.Is(err, unix.ENODEV) {
		return desired.Device{}, nil // just now
	}
	if err != nil {
		return desired.Device{}, fmt.Errorf("read interface %s: %w", i.Name, err)
	}
	device := desired.Device{
		Interface: i,
		MTU:       link.Attrs().MTU,
		Up:        link.Attrs().Flags&net.FlagUp != 0,
	}
	addresses, err := dump(func() ([]netlink.Addr, error) { return k.routing.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return desired.Device{}, fmt.Errorf("list the addresses of %s: %w", i.Name, err)
	}
	for _, a := range addresses {
		p := fromIPNet(a.IPNet)
		if p.Addr().IsValid() && !p.Addr().IsLinkLocalUnicast() { // the kernel gives it one of these itself
			device.Addresses = append(device.Addresses, netip.PrefixFrom(p.Addr().Unmap(), p.Bits()))
		}
	}
	slices.SortFunc(device.Addresses, netip.Prefix.Compare)
	return device, nil
}

// ofIndex is enough of a link to name it to the kernel. By its index: another
// interface may have got the name meanwhile.
func ofIndex(i desired.Interface) netlink.Link {
	return &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: i.Index, Name: i.Name}}
}

func (k *Kernel) setMTU(i desired.Interface, bytes int) error {
	return k.routing.LinkSetMTU(ofIndex(i), bytes)
}

func (k *Kernel) setUp(i desired.Interface) error { return k.routing.LinkSetUp(ofIndex(i)) }

// addAddress adds one without duplicate address detection: nobody else is on
// the link.
func (k *Kernel) addAddress(i desired.Interface, p netip.Prefix) error {
	err := k.routing.AddrAdd(ofIndex(i), toAddress(p))
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

func (k *Kernel) deleteAddress(i desired.Interface, p netip.Prefix) error {
	err := k.routing.AddrDel(ofIndex(i), toAddress(p))
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func toAddress(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: toIPNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}
