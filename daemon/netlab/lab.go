package netlab

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses of the lab, for both families. Those of an uplink are methods
// of Uplink.
const (
	LANPrefix, LANPrefix6         = "192.168.77.0/24", "fd77::/64"
	LANAddress, LANAddress6       = "192.168.77.2", "fd77::2" // the client
	RouterAddress, RouterAddress6 = "192.168.77.1", "fd77::1" // on the LAN
	CloudAddress, CloudAddress6   = "203.0.113.10", "2001:db8:c::10"
	ServerAddress, ServerAddress6 = "198.51.100.20", "2001:db8:e::20"
)

const (
	cloudGateway, cloudGateway6   = "203.0.113.1", "2001:db8:c::1"
	serverGateway, serverGateway6 = "198.51.100.1", "2001:db8:e::1"

	// Of the near end and the far end, as seen from the core or else the router.
	linkLocal, linkLocalFar = "fe80::1", "fe80::2"
)

// MaxUplinks is as many as MPTCP takes endpoints, before Linux 7.
const MaxUplinks = 8

// Config describes a lab.
type Config struct {
	// Uplinks are wan1, wan2 … of the router, in both directions alike; see
	// Uplink.SetUp and SetDown for others.
	Uplinks []Shape
	// Unshaped makes every uplink a plain veth pair, as fast as the machine,
	// with its offloads. The Shapes must then be zero.
	Unshaped bool
	// Seed of the losses. The same seed loses the same frames, by number.
	Seed uint64
}

// A Lab is a running lab.
type Lab struct {
	LAN, Router, Core, Cloud, Server *Host
	// Uplinks[i] is wan<i+1> of the router.
	Uplinks []*Uplink

	emulator *emulator // nil if unshaped
	hosts    []*Host

	mu     sync.Mutex // of changes to links and routes
	plain  *Uplink    // carries what our daemons do not
	closed bool
}

// New builds a lab. Plain traffic goes via wan1.
func New(config Config) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("netlab: making network namespaces needs root, and the effective user is %d: run this under sudo", os.Geteuid())
	}
	if err := config.check(); err != nil {
		return nil, err
	}
	l := &Lab{}
	if err := l.build(config); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (c Config) check() error {
	if len(c.Uplinks) < 1 || len(c.Uplinks) > MaxUplinks {
		return fmt.Errorf("netlab: %d uplinks in Config: give 1 to %d", len(c.Uplinks), MaxUplinks)
	}
	for i, s := range c.Uplinks {
		if err := s.check(); err != nil {
			return fmt.Errorf("netlab: Config.Uplinks[%d]: %w", i, err)
		}
		if c.Unshaped && s != (Shape{}) {
			return fmt.Errorf("netlab: Config.Uplinks[%d] has a shape, and Unshaped is set: leave one of them out", i)
		}
	}
	return nil
}

func (s Shape) check() error {
	if !(s.Rate >= 0) || s.Delay < 0 || s.Queue < 0 || !(s.Loss >= 0 && s.Loss <= 1) {
		return fmt.Errorf("shape %+v: nothing may be negative, and Loss at most 1", s)
	}
	return nil
}

func (l *Lab) build(config Config) error {
	for _, h := range []struct {
		host *(*Host)
		name string
	}{{&l.LAN, "lan"}, {&l.Router, "router"}, {&l.Core, "core"}, {&l.Cloud, "cloud"}, {&l.Server, "server"}} {
		var err error
		if *h.host, err = newHost(h.name); err != nil {
			return err
		}
		l.hosts = append(l.hosts, *h.host)
		if err := (*h.host).prepare(h.host == &l.Router || h.host == &l.Core); err != nil {
			return err
		}
	}
	for _, c := range []struct {
		a, b         *Host
		nameA, nameB string
	}{
		{l.LAN, l.Router, "eth0", "lan0"},
		{l.Cloud, l.Core, "eth0", "cloud0"},
		{l.Server, l.Core, "eth0", "srv0"},
	} {
		if err := connectVeth(c.a, c.nameA, c.b, c.nameB); err != nil {
			return err
		}
	}
	for _, c := range []struct {
		host *Host
		link linkConfig
	}{
		{l.LAN, linkConfig{name: "eth0", addresses: []string{LANAddress + "/24", LANAddress6 + "/64", linkLocalFar + "/64"},
			routes: []route{{gateway: RouterAddress}, {gateway: RouterAddress6}}}},
		{l.Router, linkConfig{name: "lan0", addresses: []string{RouterAddress + "/24", RouterAddress6 + "/64", linkLocal + "/64"}}},
		{l.Core, linkConfig{name: "cloud0", addresses: []string{cloudGateway + "/24", cloudGateway6 + "/64", linkLocal + "/64"}}},
		{l.Core, linkConfig{name: "srv0", addresses: []string{serverGateway + "/24", serverGateway6 + "/64", linkLocal + "/64"}}},
		{l.Cloud, linkConfig{name: "eth0", addresses: []string{CloudAddress + "/24", CloudAddress6 + "/64", linkLocalFar + "/64"},
			routes: []route{{gateway: cloudGateway}, {gateway: cloudGateway6}}}},
		{l.Server, linkConfig{name: "eth0", addresses: []string{ServerAddress + "/24", ServerAddress6 + "/64", linkLocalFar + "/64"},
			routes: []route{{gateway: serverGateway}, {gateway: serverGateway6}}}},
	} {
		if err := c.host.configure(c.link); err != nil {
			return err
		}
	}

	if !config.Unshaped {
		var err error
		if l.emulator, err = newEmulator(); err != nil {
			return err
		}
	}
	for i, shape := range config.Uplinks {
		u := &Uplink{Number: i + 1, lab: l, routerTAP: -1, coreTAP: -1}
		u.host.Store(FirstHost)
		l.Uplinks = append(l.Uplinks, u)
		if l.plain == nil {
			l.plain = u
		}
		if err := u.make(shape, config.Seed); err != nil {
			return err
		}
	}
	if l.emulator != nil {
		l.emulator.start()
	}
	for _, u := range l.Uplinks {
		if err := u.configure(); err != nil {
			return err
		}
	}
	for _, h := range l.hosts {
		if err := h.waitRunning(); err != nil {
			return err
		}
	}
	return nil
}

// Close removes the lab and ends the processes in it. The kernel takes the
// namespaces down in the background, once the sockets that the caller opened
// in them are closed.
func (l *Lab) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	var errs []error
	for _, h := range l.hosts {
		errs = append(errs, h.close())
	}
	if l.emulator != nil {
		errs = append(errs, l.emulator.close())
	}
	for _, u := range l.Uplinks {
		errs = append(errs, u.close())
	}
	return errors.Join(errs...)
}

// PlainVia makes wan<number> the uplink of all traffic that our daemons leave
// alone, both ways: the router's best default route, and the core's route to
// the LAN.
func (l *Lab) PlainVia(number int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if number < 1 || number > len(l.Uplinks) {
		return fmt.Errorf("netlab: plain traffic via wan%d: there are wan1 to wan%d", number, len(l.Uplinks))
	}
	previous, next := l.plain, l.Uplinks[number-1]
	if previous == next {
		return nil
	}
	// Metrics tell the old default routes from the new ones.
	old := [2]linkConfig{previous.routerLink(), next.routerLink()}
	l.plain = next
	for _, u := range []*Uplink{next, previous} {
		if err := u.configure(); err != nil {
			return err
		}
	}
	for i, u := range []*Uplink{previous, next} {
		if !u.down {
			if err := l.Router.removeRoutes(old[i], u.routerLink()); err != nil {
				return err
			}
		}
	}
	return nil
}

// prepare sets what every interface of the Host is to inherit.
func (h *Host) prepare(forward bool) error {
	settings := [][2]string{
		// Replies may come in by another uplink than requests go out by.
		{"net/ipv4/conf/all/rp_filter", "0"},
		{"net/ipv4/conf/default/rp_filter", "0"},
		// Addresses are usable at once; nobody else can have them.
		{"net/ipv6/conf/all/accept_dad", "0"},
		{"net/ipv6/conf/default/accept_dad", "0"},
		{"net/ipv6/conf/all/disable_ipv6", "0"},
		{"net/ipv6/conf/default/disable_ipv6", "0"},
	}
	if forward {
		settings = append(settings, [2]string{"net/ipv4/ip_forward", "1"}, [2]string{"net/ipv6/conf/all/forwarding", "1"})
	}
	for _, s := range settings {
		if err := h.SetSysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	return h.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			return fmt.Errorf("netlab: host %s: set lo up: %w", h.Name, err)
		}
		return nil
	})
}

// SetSysctl writes a setting of the Host's namespace, named by its path under
// /proc/sys, such as net/ipv4/tcp_rmem.
func (h *Host) SetSysctl(name, value string) error {
	return h.Do(func() error {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
			return fmt.Errorf("netlab: host %s: set %s to %q: %w", h.Name, name, value, err)
		}
		return nil
	})
}

func connectVeth(a *Host, nameA string, b *Host, nameB string) error {
	return a.Do(func() error {
		attributes := netlink.NewLinkAttrs()
		attributes.Name = nameA
		err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: attributes, PeerName: nameB, PeerNamespace: netlink.NsFd(b.namespace),
		})
		if err != nil {
			return fmt.Errorf("netlab: make the veth pair %s in %s – %s in %s: %w", nameA, a.Name, nameB, b.Name, err)
		}
		return nil
	})
}

// A linkConfig is what the lab wants on one interface of a Host.
type linkConfig struct {
	name      string
	addresses []string // with prefix length
	routes    []route
	neighbors map[string]net.HardwareAddr
}

// A route goes by the gateway to the destination, or to everywhere if empty.
type route struct {
	destination, gateway string
	metric               int
}

// configure sets an interface up, and restores what it has lost of its
// addresses, routes and neighbors. What others have added to it stays.
func (h *Host) configure(config linkConfig) error {
	return h.Do(func() error {
		fail := func(what string, err error) error {
			return fmt.Errorf("netlab: host %s: %s: set %s: %w", h.Name, config.name, what, err)
		}
		link, err := netlink.LinkByName(config.name)
		if err != nil {
			return fail("up", err)
		}
		// The kernel would make up a link-local address, some time later.
		const none = "1"
		if err := h.SetSysctl("net/ipv6/conf/"+config.name+"/addr_gen_mode", none); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fail("up", err)
		}
		for _, text := range config.addresses {
			address, err := netlink.ParseAddr(text)
			if err != nil {
				return fail(text, err)
			}
			if address.IP.To4() == nil {
				address.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrReplace(link, address); err != nil {
				return fail("address "+text, err)
			}
		}
		for gateway, hardware := range config.neighbors {
			neighbor := &netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT,
				IP: net.ParseIP(gateway), HardwareAddr: hardware}
			if err := netlink.NeighSet(neighbor); err != nil {
				return fail("neighbor "+gateway, err)
			}
		}
		for _, r := range config.routes {
			if err := netlink.RouteReplace(r.netlink(link)); err != nil {
				return fail(fmt.Sprintf("route %+v", r), err)
			}
		}
		return nil
	})
}

// waitRunning waits until the kernel has noticed the carrier of all interfaces
// that are up, and takes neighbor solicitations for all their IPv6 addresses: it
// joins the group for that some time after an address was added, and who asked
// before asks again only a second later.
func (h *Host) waitRunning() error {
	return h.Do(func() error {
		const patience = 5 * time.Second
		for start := time.Now(); ; time.Sleep(time.Millisecond) {
			links, err := netlink.LinkList()
			if err != nil {
				return fmt.Errorf("netlab: host %s: list the interfaces: %w", h.Name, err)
			}
			waiting := ""
			for _, link := range links {
				if flags := link.Attrs().RawFlags; flags&unix.IFF_UP != 0 && flags&unix.IFF_RUNNING == 0 {
					waiting = link.Attrs().Name
					if err := noticeCarrier(waiting); err != nil {
						return fmt.Errorf("netlab: host %s: %w", h.Name, err)
					}
				}
			}
			if waiting != "" {
				waiting += " has no carrier"
			} else if waiting, err = deaf(links); err != nil {
				return fmt.Errorf("netlab: host %s: %w", h.Name, err)
			}
			if waiting == "" {
				return nil
			}
			if time.Since(start) > patience {
				return fmt.Errorf("netlab: host %s: %s %v after it was set up", h.Name, waiting, patience)
			}
		}
	})
}

// deaf names an interface that does not take solicitations for one of its
// addresses yet, and the address; empty if there is none.
func deaf(links []netlink.Link) (string, error) {
	const path = "/proc/thread-self/net/igmp6"
	groups, err := os.ReadFile(path) // number, interface, group, users …
	if err != nil {
		return "", err
	}
	joined := map[[2]string]bool{}
	for line := range strings.Lines(string(groups)) {
		if fields := strings.Fields(line); len(fields) > 2 {
			joined[[2]string{fields[1], fields[2]}] = true
		}
	}
	for _, link := range links {
		a := link.Attrs()
		if a.RawFlags&unix.IFF_UP == 0 || a.RawFlags&unix.IFF_LOOPBACK != 0 {
			continue
		}
		addresses, err := netlink.AddrList(link, netlink.FAMILY_V6)
		if err != nil {
			return "", fmt.Errorf("list the addresses of %s: %w", a.Name, err)
		}
		for _, address := range addresses {
			// The solicited-node group (RFC 4291 §2.7.1).
			group := fmt.Sprintf("ff0200000000000000000001ff%x", []byte(address.IP[13:]))
			if !joined[[2]string{a.Name, group}] {
				return fmt.Sprintf("%s is deaf to solicitations for %s", a.Name, address.IP), nil
			}
		}
	}
	return "", nil
}

// noticeCarrier makes the kernel act on a change of carrier at once. Left to
// itself it may take a second.
func noticeCarrier(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	query := struct{ command, data uint32 }{command: unix.ETHTOOL_GLINK}
	request := struct { // ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&query)}
	copy(request.name[:unix.IFNAMSIZ-1], name)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		return fmt.Errorf("ask %s for its carrier: %w", name, errno)
	}
	return nil
}

// removeRoutes removes the routes of the old configuration that the new one
// does not have.
func (h *Host) removeRoutes(old, config linkConfig) error {
	wanted := map[route]bool{}
	for _, r := range config.routes {
		wanted[r] = true
	}
	return h.Do(func() error {
		link, err := netlink.LinkByName(old.name)
		if err != nil {
			return fmt.Errorf("netlab: host %s: %s: %w", h.Name, old.name, err)
		}
		for _, r := range old.routes {
			if wanted[r] {
				continue
			}
			// ESRCH: somebody else has removed it.
			if err := netlink.RouteDel(r.netlink(link)); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("netlab: host %s: %s: remove the route %+v: %w", h.Name, old.name, r, err)
			}
		}
		return nil
	})
}

func (r route) netlink(link netlink.Link) *netlink.Route {
	gateway := net.ParseIP(r.gateway)
	destination := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if gateway.To4() == nil {
		destination = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	if r.destination != "" {
		_, destination, _ = net.ParseCIDR(r.destination) // a constant of this file
	}
	return &netlink.Route{LinkIndex: link.Attrs().Index, Dst: destination, Gw: gateway,
		Priority: r.metric, Protocol: unix.RTPROT_STATIC}
}
