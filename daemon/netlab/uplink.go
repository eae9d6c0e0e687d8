package netlab

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// An Uplink is an interface of the router, and its far end in the core. All
// that can go wrong with one can be done to it here, live.
type Uplink struct {
	Number int // from 1

	lab                  *Lab
	routerTAP, coreTAP   int   // file descriptors, -1 if unshaped
	upstream, downstream *line // from and to the router, nil if unshaped
	routerMAC, coreMAC   net.HardwareAddr
	down                 bool          // by Link
	host                 atomic.Uint32 // part of the router's addresses, by SetAddress
}

// FirstHost is the host part of the router's addresses on every uplink of a new lab.
const FirstHost = 2

// Interface is the router's interface, such as wan1.
func (u *Uplink) Interface() string { return fmt.Sprintf("wan%d", u.Number) }

// Address is the router's, such as 10.1.0.2, with prefix length 24.
func (u *Uplink) Address() string { return fmt.Sprintf("10.%d.0.%d", u.Number, u.host.Load()) }

// Address6 is the router's, such as 2001:db8:1::2, with prefix length 64.
func (u *Uplink) Address6() string {
	return fmt.Sprintf("2001:db8:%d::%x", u.Number, u.host.Load())
}

// Gateway is the core's address, such as 10.1.0.1.
func (u *Uplink) Gateway() string { return fmt.Sprintf("10.%d.0.1", u.Number) }

// Gateway6 is the core's address, such as 2001:db8:1::1.
func (u *Uplink) Gateway6() string { return fmt.Sprintf("2001:db8:%d::1", u.Number) }

func (u *Uplink) coreInterface() string { return fmt.Sprintf("isp%d", u.Number) }

// Set changes both directions. Frames under way keep their time.
func (u *Uplink) Set(shape Shape) error {
	return errors.Join(u.SetUp(shape), u.SetDown(shape))
}

// SetUp changes the direction from the router.
func (u *Uplink) SetUp(shape Shape) error {
	return u.shaped(func() { u.upstream.shape = shape }, shape)
}

// SetDown changes the direction to the router.
func (u *Uplink) SetDown(shape Shape) error {
	return u.shaped(func() { u.downstream.shape = shape }, shape)
}

// BlackHole makes the uplink swallow every frame of both directions, also
// those under way, without a sign to anybody; or ends that.
func (u *Uplink) BlackHole(on bool) error {
	return u.shaped(func() {
		for _, l := range []*line{u.upstream, u.downstream} {
			l.blackHole = on
			if on {
				l.counters.BlackHoled += u.lab.emulator.drain(l)
			}
		}
	})
}

// BlockUDP makes the uplink drop every UDP packet of both directions, IPv4 and
// IPv6, without a sign to anybody, as some networks do; or ends that.
func (u *Uplink) BlockUDP(on bool) error {
	return u.shaped(func() { u.upstream.blockUDP, u.downstream.blockUDP = on, on })
}

// StripMPTCP makes the uplink overwrite every option of MPTCP in the TCP segments of
// both directions, IPv4 and IPv6, as some middleboxes do; or ends that.
func (u *Uplink) StripMPTCP(on bool) error {
	return u.shaped(func() { u.upstream.strip, u.downstream.strip = on, on })
}

// MTUs that SetMTU takes: below the lower one the kernel ends IPv6 on an
// interface (RFC 8200 §5), above the other the emulator has no room.
const minMTU, maxMTU = 1280, 1500

// SetMTU sets the MTU of the interfaces at both ends, in bytes of IP packet. A
// shaped uplink drops what is larger all the same, whoever sends it.
func (u *Uplink) SetMTU(mtu int) error {
	if mtu < minMTU || mtu > maxMTU {
		return fmt.Errorf("netlab: %s: MTU %d: give %d to %d", u.Interface(), mtu, minMTU, maxMTU)
	}
	for _, end := range []struct {
		host *Host
		name string
	}{{u.lab.Router, u.Interface()}, {u.lab.Core, u.coreInterface()}} {
		err := end.host.Do(func() error {
			link, err := netlink.LinkByName(end.name)
			if err == nil {
				err = netlink.LinkSetMTU(link, mtu)
			}
			if err != nil {
				return fmt.Errorf("netlab: host %s: %s: set the MTU to %d: %w", end.host.Name, end.name, mtu, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if u.upstream == nil {
		return nil
	}
	return u.shaped(func() { u.upstream.mtu, u.downstream.mtu = mtu, mtu })
}

// Counters are those of the directions from and to the router; zero if the
// uplink is unshaped.
func (u *Uplink) Counters() (up, down Counters) {
	if u.upstream == nil {
		return Counters{}, Counters{}
	}
	u.lab.emulator.mu.Lock()
	defer u.lab.emulator.mu.Unlock()
	return u.upstream.counters, u.downstream.counters
}

func (u *Uplink) shaped(change func(), shapes ...Shape) error {
	if u.upstream == nil {
		return fmt.Errorf("netlab: %s is not shaped: leave Config.Unshaped out", u.Interface())
	}
	for _, s := range shapes {
		if err := s.check(); err != nil {
			return fmt.Errorf("netlab: %s: %w", u.Interface(), err)
		}
	}
	u.lab.emulator.change(change)
	return nil
}

// Link sets the router's interface administratively down, and the kernel
// forgets its routes in all tables and its IPv6 addresses; or up, and the lab
// restores those that are the lab's.
func (u *Uplink) Link(up bool) error {
	u.lab.mu.Lock()
	defer u.lab.mu.Unlock()
	u.down = !up
	if !up {
		return u.lab.Router.linkDown(u.Interface())
	}
	if err := u.configure(); err != nil {
		return err
	}
	return u.noticeCarrier()
}

// SetAddress gives the router the addresses 10.<number>.0.<host> and
// 2001:db8:<number>::<host> in place of those it has there, 2 ≤ host ≤ 254, as a
// provider does. With the old addresses go the routes that need them; the lab's
// come back with the new ones, at once or when the link is set up again.
func (u *Uplink) SetAddress(host int) error {
	if host < FirstHost || host > 254 {
		return fmt.Errorf("netlab: %s: host part %d of its addresses: give %d to 254", u.Interface(), host, FirstHost)
	}
	u.lab.mu.Lock()
	defer u.lab.mu.Unlock()
	if uint32(host) == u.host.Load() {
		return nil
	}
	for _, address := range []string{u.Address() + "/24", u.Address6() + "/64"} {
		if err := u.lab.Router.removeAddress(u.Interface(), address); err != nil {
			return err
		}
	}
	if u.routerMAC != nil {
		for _, address := range []string{u.Address(), u.Address6()} {
			if err := u.lab.Core.removeNeighbor(u.coreInterface(), address); err != nil {
				return err
			}
		}
	}
	u.host.Store(uint32(host))
	return u.configure()
}

// removeAddress tolerates an address that is gone: the kernel forgets those of
// IPv6 with the link.
func (h *Host) removeAddress(name, text string) error {
	return h.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err == nil {
			var address *netlink.Addr
			if address, err = netlink.ParseAddr(text); err == nil {
				err = netlink.AddrDel(link, address)
			}
		}
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("netlab: host %s: %s: remove the address %s: %w", h.Name, name, text, err)
		}
		return nil
	})
}

// removeNeighbor tolerates a neighbor that is gone with its link.
func (h *Host) removeNeighbor(name, address string) error {
	return h.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.NeighDel(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: net.ParseIP(address)})
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("netlab: host %s: %s: remove the neighbor %s: %w", h.Name, name, address, err)
		}
		return nil
	})
}

// Carrier pulls the cable of the router's interface, or plugs it in again. The
// interface stays administratively up, and keeps its addresses and routes.
func (u *Uplink) Carrier(up bool) error {
	u.lab.mu.Lock()
	defer u.lab.mu.Unlock()
	switch {
	case u.lab.closed:
		return fmt.Errorf("netlab: carrier of %s: the lab is closed", u.Interface())
	case u.routerTAP >= 0:
		if err := setTAPCarrier(u.routerTAP, up); err != nil {
			return err
		}
	case up:
		if err := u.configure(); err != nil {
			return err
		}
	default:
		if err := u.lab.Core.linkDown(u.coreInterface()); err != nil {
			return err
		}
	}
	return u.noticeCarrier()
}

func (u *Uplink) noticeCarrier() error {
	return errors.Join(
		u.lab.Router.Do(func() error { return noticeCarrier(u.Interface()) }),
		u.lab.Core.Do(func() error { return noticeCarrier(u.coreInterface()) }),
	)
}

func (h *Host) linkDown(name string) error {
	return h.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetDown(link)
		}
		if err != nil {
			return fmt.Errorf("netlab: host %s: set %s down: %w", h.Name, name, err)
		}
		return nil
	})
}

// make makes both interfaces and the lines between them.
func (u *Uplink) make(shape Shape, seed uint64) error {
	l := u.lab
	if l.emulator == nil {
		return connectVeth(l.Router, u.Interface(), l.Core, u.coreInterface())
	}
	for _, end := range []struct {
		host *Host
		name string
		tap  *int
		mac  *net.HardwareAddr
	}{
		{l.Router, u.Interface(), &u.routerTAP, &u.routerMAC},
		{l.Core, u.coreInterface(), &u.coreTAP, &u.coreMAC},
	} {
		err := end.host.Do(func() (err error) {
			if *end.tap, err = openTAP(end.name); err != nil {
				return err
			}
			link, err := netlink.LinkByName(end.name)
			if err != nil {
				return fmt.Errorf("netlab: host %s: %s: %w", end.host.Name, end.name, err)
			}
			*end.mac = link.Attrs().HardwareAddr
			// Room for all that may come while the emulator waits for a
			// processor: losses are to be the Shape's only.
			if err := netlink.LinkSetTxQLen(link, 4096); err != nil {
				return fmt.Errorf("netlab: host %s: %s: set the queue's length: %w", end.host.Name, end.name, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	stream := 2 * uint64(u.Number)
	u.upstream = l.emulator.connect(u.routerTAP, u.coreTAP, newQueue(shape, seed, stream))
	u.downstream = l.emulator.connect(u.coreTAP, u.routerTAP, newQueue(shape, seed, stream+1))
	return nil
}

// configure brings both ends to what the lab wants of them now.
func (u *Uplink) configure() error {
	if err := u.lab.Core.configure(u.coreLink()); err != nil {
		return err
	}
	if u.down {
		return nil
	}
	return u.lab.Router.configure(u.routerLink())
}

func (u *Uplink) routerLink() linkConfig {
	metric := 100 + u.Number
	if u.lab.plain == u && u.Number > 1 {
		metric = 100
	}
	config := linkConfig{
		name:      u.Interface(),
		addresses: []string{u.Address() + "/24", u.Address6() + "/64", linkLocalFar + "/64"},
		routes:    []route{{gateway: u.Gateway(), metric: metric}, {gateway: u.Gateway6(), metric: metric}},
	}
	if u.coreMAC != nil {
		// A modem answers ARP and neighbor solicitations even while the line
		// behind it is dead. The emulator is both in one, so the answers are
		// given beforehand.
		config.neighbors = map[string]net.HardwareAddr{u.Gateway(): u.coreMAC, u.Gateway6(): u.coreMAC, linkLocal: u.coreMAC}
	}
	return config
}

func (u *Uplink) coreLink() linkConfig {
	config := linkConfig{
		name:      u.coreInterface(),
		addresses: []string{u.Gateway() + "/24", u.Gateway6() + "/64", linkLocal + "/64"},
	}
	if u.lab.plain == u {
		config.routes = []route{
			{destination: LANPrefix, gateway: u.Address()},
			{destination: LANPrefix6, gateway: u.Address6()},
		}
	}
	if u.routerMAC != nil {
		config.neighbors = map[string]net.HardwareAddr{u.Address(): u.routerMAC, u.Address6(): u.routerMAC, linkLocalFar: u.routerMAC}
	}
	return config
}

// close removes the devices.
func (u *Uplink) close() error {
	var errs []error
	for _, tap := range []*int{&u.routerTAP, &u.coreTAP} {
		if *tap >= 0 {
			errs = append(errs, unix.Close(*tap))
			*tap = -1
		}
	}
	return errors.Join(errs...)
}
