// Package uplink watches every WAN of the router: is its interface there, does
// it have a carrier, an address and a gateway, and is it therefore fit to carry
// traffic.
//
//	netlink (links, addresses, routes) ─▶ Observe ─▶ Observation ─▶ Judge ─▶ []Status
//
// Observe reads, Judge decides and is pure. Of LAN interfaces, Networks says what
// is behind them.
package uplink

import (
	"net/netip"
	"slices"
)

// Status is what is known of one uplink at one moment.
type Status struct {
	Name      string // the operator's name for it
	Interface string // the name of its network interface
	Index     int    // kernel index of the interface, 0 while it is absent
	// Sources are the addresses that traffic may leave from, with the on-link
	// prefix of each: at most one per family, IPv4 first.
	Sources []netip.Prefix
	// Gateways are the next hops of the interface's default routes in the main
	// table, at most one per family and only for families in Sources. A
	// point-to-point link without a next hop has the unspecified address.
	Gateways []netip.Addr
	// Ports are those that traffic from Sources leaves from by this uplink, while
	// others of the same interface share an address with it.
	Ports Ports
	// Leg is its detour around what removes MPTCP options, if it has one.
	Leg    Leg
	Fit    bool
	Reason string // why it is not fit, one sentence; empty when it is

	// Counters of the interface, in bytes since it appeared.
	ReceivedBytes, SentBytes uint64
}

// Ports is a range of source ports with both its ends. The zero range is all of
// them.
type Ports struct{ First, Last uint16 }

// Contains says whether a port is in the range.
func (p Ports) Contains(port uint16) bool {
	return p == Ports{} || p.First <= port && port <= p.Last
}

// Leg is an uplink's way to the concentrator within UDP: what is sent into a device
// of its own.
type Leg struct {
	Interface string
	Index     int // kernel index of the device, 0 while there is none
	MTU       int // bytes
	// Addresses are those inside, at most one per family.
	Addresses []netip.Addr
	Up        bool // it carries
	// Reason says why the uplink needs a leg, and why that is not up; empty if it
	// needs none.
	Reason string
}

// SubflowSources are the addresses that subflows by this uplink leave from.
func (s Status) SubflowSources() []netip.Addr {
	if s.Leg.Up {
		return s.Leg.Addresses
	}
	sources := make([]netip.Addr, len(s.Sources))
	for i, p := range s.Sources {
		sources[i] = p.Addr()
	}
	return sources
}

// Of returns the place of the uplink that traffic from an address and port leaves
// by, or -1. Ports that belong to none of several that share the address leave by
// the first that is fit.
func Of(statuses []Status, local netip.AddrPort) int {
	at := -1
	for i, s := range statuses {
		if slices.Contains(s.Leg.Addresses, local.Addr()) {
			return i
		}
		if !slices.ContainsFunc(s.Sources, func(p netip.Prefix) bool { return p.Addr() == local.Addr() }) {
			continue
		}
		if s.Ports.Contains(local.Port()) {
			return i
		}
		if at < 0 || s.Fit && !statuses[at].Fit {
			at = i
		}
	}
	return at
}

// Present says whether the interface exists.
func (s Status) Present() bool { return s.Index != 0 }
