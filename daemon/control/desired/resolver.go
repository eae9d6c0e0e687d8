package desired

import (
	"net/netip"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

// Resolver says who answers what IPv4 clients ask the router's own address: a
// server, invalid if nobody does, and the uplink that leads there, empty for the
// tunnel. It is what Compile puts into the table.
func Resolver(s settings.Settings, statuses []uplink.Status, t Tunnel) (server netip.Addr, through string) {
	switch {
	case !s.LAN.DNS:
		return netip.Addr{}, ""
	case t.carries():
		return t.resolver(false), ""
	case s.WhenTunnelDown != settings.Direct:
		return netip.Addr{}, ""
	}
	best := ranked(s, statuses, t.Ranking)
	if status, _, ok := best.of(false); ok {
		through = status.Name
	}
	return best.resolver(s, false), through
}
