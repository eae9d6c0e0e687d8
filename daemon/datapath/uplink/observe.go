package uplink

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumpTries is how often a list is asked for when it keeps changing under the
// kernel's hands.
const dumpTries = 4

// Observe reads what Judge and Networks need to know of these interfaces from
// the network namespace of the calling thread.
func Observe(interfaces []string) (Observation, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return Observation{}, fmt.Errorf("list network interfaces: %w", err)
	}
	var o Observation
	position := map[int]int{} // interface index ─▶ place in o.Links
	for _, l := range links {
		a := l.Attrs()
		if !slices.Contains(interfaces, a.Name) {
			continue
		}
		position[a.Index] = len(o.Links)
		link := Link{
			Name:    a.Name,
			Index:   a.Index,
			Up:      a.RawFlags&unix.IFF_UP != 0,
			Carrier: a.RawFlags&unix.IFF_UP != 0 && a.RawFlags&unix.IFF_RUNNING != 0,
		}
		if a.Statistics != nil {
			link.ReceivedBytes, link.SentBytes = a.Statistics.RxBytes, a.Statistics.TxBytes
		}
		if a.RawFlags&unix.IFF_POINTOPOINT != 0 {
			for _, otherEnd := range unspecified {
				link.Defaults = append(link.Defaults, Default{Gateway: otherEnd, Metric: math.MaxUint32})
			}
		}
		o.Links = append(o.Links, link)
	}
	if len(o.Links) == 0 {
		return o, nil
	}

	addresses, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return Observation{}, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addresses {
		at, ok := position[a.LinkIndex]
		if !ok || a.IPNet == nil {
			continue
		}
		ip, ok := netip.AddrFromSlice(a.IPNet.IP)
		if !ok {
			continue
		}
		bits, _ := a.IPNet.Mask.Size()
		const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
		o.Links[at].Addresses = append(o.Links[at].Addresses, Address{
			Prefix:    netip.PrefixFrom(ip.Unmap(), bits),
			Unusable:  a.Flags&unusable != 0,
			Temporary: a.Flags&unix.IFA_F_TEMPORARY != 0, // of IPv4, the same bit says secondary
		})
	}

	for family, otherEnd := range unspecified {
		routes, err := defaultRoutes(family)
		if err != nil {
			return Observation{}, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			hops := r.MultiPath
			if len(hops) == 0 {
				hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via}}
			}
			for _, hop := range hops {
				at, ok := position[hop.LinkIndex]
				if !ok || hop.Via != nil {
					// A gateway of the other family (RFC 5549) is not one that
					// a Status can carry.
					continue
				}
				d := Default{Gateway: otherEnd, Metric: uint32(r.Priority)}
				if gateway, ok := netip.AddrFromSlice(hop.Gw); ok {
					d.Gateway = gateway.Unmap()
				}
				o.Links[at].Defaults = append(o.Links[at].Defaults, d)
			}
		}
	}
	return o, nil
}

// unspecified stand for the other end of a point-to-point link, by family.
var unspecified = map[int]netip.Addr{
	netlink.FAMILY_V4: netip.IPv4Unspecified(),
	netlink.FAMILY_V6: netip.IPv6Unspecified(),
}

// defaultRoutes keeps only the default routes of the main table while reading,
// because a main table may hold the routes of the whole Internet.
func defaultRoutes(family int) ([]netlink.Route, error) {
	return dump(func() (found []netlink.Route, err error) {
		filter := &netlink.Route{Table: unix.RT_TABLE_MAIN}
		err = netlink.RouteListFilteredIter(family, filter, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			if r.Type == unix.RTN_UNICAST && isDefault(r.Dst) {
				found = append(found, r)
			}
			return true
		})
		return found, err
	})
}

func isDefault(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, _ := dst.Mask.Size()
	return ones == 0
}

// dump repeats a reading that the kernel marked as inconsistent.
func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range dumpTries {
		all, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}
