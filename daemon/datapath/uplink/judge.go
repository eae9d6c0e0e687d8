package uplink

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Observation is what the kernel said about some interfaces at one moment.
// Interfaces that do not exist are not in it.
type Observation struct{ Links []Link }

// Link is one network interface.
type Link struct {
	Name    string
	Index   int
	Up      bool // administratively
	Carrier bool // it is up and the other end is there
	// Addresses in the kernel's order.
	Addresses []Address
	// Defaults are the next hops through this interface of default routes in
	// the main table, and after them the other end of a point-to-point link, such as
	// a tunnel (IPIP, GRE, WireGuard) to a gateway several hops away.
	Defaults []Default

	ReceivedBytes, SentBytes uint64
}

// Address is an address of an interface with its on-link prefix.
type Address struct {
	Prefix netip.Prefix // the address itself with the length of the prefix
	// Unusable addresses are still being checked for duplicates, have failed
	// that check, or are deprecated: no new connection may use them.
	Unusable bool
	// Temporary is a privacy address of IPv6, or a secondary one of IPv4.
	Temporary bool
}

// Default is one next hop of a default route.
type Default struct {
	// Gateway is the unspecified address of the route's family when the link is
	// point-to-point and has no next hop.
	Gateway netip.Addr
	Metric  uint32
}

// Want names an interface that is to be judged as an uplink.
type Want struct {
	Name, Interface string
	// Gateway, if valid, is to be used instead of the default route's, and Source
	// too if that is valid.
	Gateway, Source netip.Addr
}

// Uplinks that share an address are told apart by the source port. The ranges lie
// below what Linux gives to sockets by itself (ip_local_port_range, from 32768),
// one for each place in the settings.
const (
	firstPort      = 16384
	portsPerUplink = 1024
	places         = 16
)

// Judge says of every wanted uplink, in the order given, whether it is fit and
// what traffic through it needs. IPv4 alone or IPv6 alone is enough.
func Judge(o Observation, wants []Want) []Status {
	statuses := make([]Status, len(wants))
	var taken holders
	// Links with a carrier first: when two modems hand out the same address, the
	// one that works has it.
	for _, carrier := range []bool{true, false} {
		for i, want := range wants {
			at := slices.IndexFunc(o.Links, func(l Link) bool { return l.Name == want.Interface })
			switch {
			case at < 0:
				statuses[i] = Status{
					Name: want.Name, Interface: want.Interface,
					Reason: fmt.Sprintf("interface %s does not exist", want.Interface),
				}
			case o.Links[at].Carrier == carrier:
				statuses[i] = taken.judge(o.Links[at], want)
			}
		}
	}
	for i := range statuses {
		for j := range i {
			if shareSource(statuses[i], statuses[j]) {
				statuses[i].Ports, statuses[j].Ports = portsOf(i), portsOf(j)
			}
		}
	}
	return statuses
}

func portsOf(place int) Ports {
	first := uint16(firstPort + place*portsPerUplink)
	return Ports{first, first + portsPerUplink - 1}
}

// Allotted says whether a port is in the range of some place, used or not.
func Allotted(port uint16) bool {
	return port >= firstPort && int(port) < firstPort+places*portsPerUplink
}

func shareSource(a, b Status) bool {
	return slices.ContainsFunc(a.Sources, func(p netip.Prefix) bool {
		return slices.ContainsFunc(b.Sources, func(q netip.Prefix) bool { return p.Addr() == q.Addr() })
	})
}

// holders is what the uplinks judged so far use.
type holders []held

type held struct {
	device, uplink  string
	source, gateway netip.Addr
}

// take claims a source and gateway for an uplink, unless another has them.
func (h *holders) take(next held) (reason string) {
	for _, other := range *h {
		switch {
		case other.device != next.device && other.source == next.source:
			// The source address is all that tells the interfaces' traffic apart.
			return fmt.Sprintf("%s has the address %s, which %s has too: give one of their networks another range", next.device, next.source, other.device)
		case other.device == next.device && other.gateway == next.gateway:
			return fmt.Sprintf("%s goes through the gateway %s of %s, as %s does", next.uplink, next.gateway, next.device, other.uplink)
		}
	}
	*h = append(*h, next)
	return ""
}

func (h *holders) judge(link Link, want Want) Status {
	s := Status{
		Name: want.Name, Interface: want.Interface, Index: link.Index,
		ReceivedBytes: link.ReceivedBytes, SentBytes: link.SentBytes,
	}
	if !link.Up {
		// The kernel refuses routes through it, whatever addresses it keeps.
		s.Reason = fmt.Sprintf("interface %s "+isDown, link.Name)
		return s
	}

	// Sources are given even while there is no carrier: what depends on them
	// alone need not be taken away and put back whenever a cable moves.
	var missing []string
	for _, family := range []string{"IPv4", "IPv6"} {
		source, gateway, reason := choose(link, want, family)
		if reason == "" {
			reason = h.take(held{link.Name, want.Name, source.Addr(), gateway})
		}
		if reason != "" {
			missing = append(missing, reason)
			continue
		}
		s.Sources = append(s.Sources, source)
		s.Gateways = append(s.Gateways, gateway)
	}

	switch {
	case !link.Carrier:
		s.Reason = fmt.Sprintf("%s "+noCarrier+": nothing answers at the other end of the link", link.Name)
	case len(s.Sources) > 0:
		s.Fit = true
	default:
		s.Reason = worst(missing)
	}
	return s
}

// worst picks the reason to show when no family is usable: one that got further
// than having no address says more.
func worst(reasons []string) string {
	for _, r := range reasons {
		if !strings.Contains(r, noAddress) {
			return r
		}
	}
	return reasons[0]
}

// What reasons say, by how far the uplink has come.
const (
	isDown    = "is down"
	noCarrier = "has no carrier"
	noAddress = "has no usable address"
)

// An Obstacle is the first thing that an uplink does not have.
type Obstacle int

// The obstacles, in the order in which an uplink gets past them.
const (
	AtInterface Obstacle = iota
	AtCarrier
	AtAddress
	AtGateway
	Past // it has all that can be seen from here
)

// Obstacle is how far the uplink has come.
func (s Status) Obstacle() Obstacle {
	switch {
	case s.Fit:
		return Past
	case s.Index == 0:
		return AtInterface
	case strings.Contains(s.Reason, isDown), strings.Contains(s.Reason, noCarrier):
		return AtCarrier
	case strings.Contains(s.Reason, noAddress):
		return AtAddress
	default:
		return AtGateway
	}
}

// choose picks the address to send from and the gateway to send to.
func choose(link Link, want Want, family string) (source netip.Prefix, gateway netip.Addr, reason string) {
	is := func(a netip.Addr) bool { return a.Is4() == (family == "IPv4") }

	if gateway = want.Gateway; gateway.IsValid() && !is(gateway) {
		return source, gateway, fmt.Sprintf("%s %s", link.Name, noAddress)
	}
	if !gateway.IsValid() {
		gateways := slices.DeleteFunc(slices.Clone(link.Defaults), func(d Default) bool { return !is(d.Gateway) })
		slices.SortFunc(gateways, func(a, b Default) int {
			return cmp.Or(cmp.Compare(a.Metric, b.Metric), a.Gateway.Compare(b.Gateway))
		})
		if len(gateways) > 0 {
			gateway = gateways[0].Gateway
		}
	}

	sources := slices.DeleteFunc(slices.Clone(link.Addresses), func(a Address) bool {
		return !is(a.Prefix.Addr()) || a.Unusable || !a.Prefix.Addr().IsGlobalUnicast()
	})
	// The same set of addresses gives the same choice in whatever order they
	// came: live connections hang on it.
	slices.SortFunc(sources, func(a, b Address) int {
		return cmp.Or(
			before(a.Prefix.Contains(gateway), b.Prefix.Contains(gateway)),
			before(!uniqueLocal(a), !uniqueLocal(b)),
			before(!a.Temporary, !b.Temporary),
			a.Prefix.Addr().Compare(b.Prefix.Addr()),
		)
	})
	if want.Source.IsValid() {
		sources = slices.DeleteFunc(sources, func(a Address) bool { return a.Prefix.Addr() != want.Source })
		if len(sources) == 0 {
			return source, gateway, fmt.Sprintf("%s does not have the address %s, or cannot use it", link.Name, want.Source)
		}
	}
	switch {
	case len(sources) == 0:
		return source, gateway, fmt.Sprintf("%s %s", link.Name, noAddress)
	case want.Gateway.IsValid() && !want.Source.IsValid() && !gateway.IsLinkLocalUnicast() && !sources[0].Prefix.Contains(gateway):
		return source, gateway, fmt.Sprintf("no address of %s is in the network of the gateway %s: give the source address as well", link.Name, gateway)
	case !gateway.IsValid():
		return source, gateway, fmt.Sprintf("no default route on %s in the main table: its gateway is unknown", link.Name)
	}
	return sources[0].Prefix, gateway, ""
}

// Networks are the on-link prefixes of the links that are up, each once: behind a
// LAN interface, where the clients are. Link-local ones are on every link, and
// tell nothing.
func Networks(o Observation) []netip.Prefix {
	var networks []netip.Prefix
	for _, link := range o.Links {
		for _, a := range link.Addresses {
			// Nobody else is in a prefix of the address alone, and everybody in
			// one of length 0.
			if link.Up && !a.Prefix.IsSingleIP() && a.Prefix.Bits() > 0 && !a.Prefix.Addr().IsLinkLocalUnicast() {
				networks = append(networks, a.Prefix.Masked())
			}
		}
	}
	slices.SortFunc(networks, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return slices.Compact(networks)
}

// before sorts what is true first.
func before(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

// uniqueLocal addresses (RFC 4193) reach no further than the site.
func uniqueLocal(a Address) bool { return a.Prefix.Addr().Is6() && a.Prefix.Addr().IsPrivate() }
