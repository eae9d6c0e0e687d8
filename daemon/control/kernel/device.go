package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// readDevice reads the TUN of our name, if there is one.
func (k *Kernel) readDevice(names map[int]string) (desired.Device, error) {
	index := 0
	for i, name := range names {
		if name == k.scope.device {
			index = i
		}
	}
	if index == 0 {
		return desired.Device{}, nil
	}
	link, err := k.routing.LinkByIndex(index)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) || errors.Is(err, unix.ENODEV) {
		return desired.Device{}, nil // just now
	}
	if err != nil {
		return desired.Device{}, fmt.Errorf("read interface %s: %w", k.scope.device, err)
	}
	device := desired.Device{
		Interface: desired.Interface{Index: index, Name: k.scope.device},
		MTU:       link.Attrs().MTU,
		Up:        link.Attrs().Flags&net.FlagUp != 0,
	}
	addresses, err := dump(func() ([]netlink.Addr, error) { return k.routing.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return desired.Device{}, fmt.Errorf("list the addresses of %s: %w", k.scope.device, err)
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
