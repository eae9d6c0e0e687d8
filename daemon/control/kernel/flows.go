package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// The kernel translates a flow as the table said at its first packet, for as long
// as packets come: a client of UDP that never pauses would be led to a port that
// is closed by now, and never to one that has been opened since. So a new table
// makes the kernel forget the UDP flows to this machine that it would lead
// elsewhere; their next packet is looked at anew. TCP connections stay as they
// are.
//
//	desired.Table ─▶ translations ─▶ stale (every tracked flow) ─▶ forget

// entrance is where a translated flow comes in: a family's UDP port.
type entrance struct {
	ipv6 bool
	port uint16
}

// translations are the destinations of a table's UDP ports.
func translations(t desired.Table) map[entrance]netip.AddrPort {
	all := map[entrance]netip.AddrPort{}
	for _, c := range t.Chains {
		for _, rule := range c.Rules {
			var to desired.TranslateDestination
			var port uint16
			udp := false
			for _, s := range rule {
				switch s := s.(type) {
				case desired.MatchProtocol:
					udp = s.Number == unix.IPPROTO_UDP && !s.Not
				case desired.MatchPort:
					port = s.First
				case desired.TranslateDestination:
					to = s
				}
			}
			if udp && to.To.IsValid() {
				all[entrance{to.To.Addr().Is6(), port}] = to.To
			}
		}
	}
	return all
}

// guide says which flows a table leaves as they are.
type guide struct {
	translations map[entrance]netip.AddrPort
	own          []netip.Addr   // addresses of this machine
	tunnel       []netip.Prefix // those of our TUN, with the networks behind it
}

// stale says whether a UDP flow that was sent to a destination, and goes to
// another or the same, would now be led elsewhere.
func (g guide) stale(sent, goes netip.AddrPort) bool {
	if !slices.Contains(g.own, sent.Addr()) {
		return false
	}
	if to, translated := g.translations[entrance{sent.Addr().Is6(), sent.Port()}]; translated {
		return goes != to
	}
	// Who else translates leads neither into our TUN nor out of it.
	return goes != sent && slices.ContainsFunc(g.tunnel, func(p netip.Prefix) bool {
		return p.Contains(goes.Addr()) || p.Contains(sent.Addr())
	})
}

// MatchConntrackFlow is for package netlink.
func (g guide) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	sent, ok1 := netip.AddrFromSlice(f.Forward.DstIP)
	goes, ok2 := netip.AddrFromSlice(f.Reverse.SrcIP)
	return ok1 && ok2 && f.Forward.Protocol == unix.IPPROTO_UDP &&
		g.stale(netip.AddrPortFrom(sent.Unmap(), f.Forward.DstPort), netip.AddrPortFrom(goes.Unmap(), f.Reverse.SrcPort))
}

// forgetFlows deletes the flows that a table, in force already, makes stale.
func (k *Kernel) forgetFlows(t desired.Table) error {
	g := guide{translations: translations(t)}
	before := k.translates
	k.translates = len(g.translations) > 0
	if !before && !k.translates {
		return nil
	}
	addresses, err := dump(func() ([]netlink.Addr, error) { return k.routing.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list the machine's addresses: %w", err)
	}
	for _, a := range addresses {
		g.own = append(g.own, fromIPNet(a.IPNet).Addr().Unmap())
	}
	names, err := k.interfaceNames()
	if err != nil {
		return err
	}
	device, _, err := k.readDevices(names)
	if err != nil {
		return err
	}
	g.tunnel = device.Addresses
	var failures []error
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		_, err := k.routing.ConntrackDeleteFilters(netlink.ConntrackTable, family, g)
		// EINVAL: this kernel lets nobody look at its flows (no
		// CONFIG_NF_CT_NETLINK). What changed while it was listing them has
		// been seen by the new table.
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, netlink.ErrDumpInterrupted) {
			failures = append(failures, fmt.Errorf("forget flows that go elsewhere now: %w", err))
		}
	}
	return errors.Join(failures...)
}
