package desired

import (
	"net/netip"
	"slices"
	"strconv"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

// loopback has index 1 in every network namespace.
var loopback = Interface{Index: 1, Name: "lo"}

var (
	anyIPv4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	anyIPv6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// Compile says what the kernel should hold for these settings, with the uplinks
// in this condition and these networks behind the LAN interfaces.
func Compile(s settings.Settings, statuses []uplink.Status, lan []netip.Prefix) State {
	var state State
	compileIntercept(&state, s.LAN)
	compileLAN(&state, lan)
	for i, u := range s.Uplinks {
		if status, ok := find(statuses, u); ok {
			compileUplink(&state, i, status)
		}
	}
	state.MPTCP = compileMPTCP(s, statuses)
	slices.SortFunc(state.Rules, compareRules)
	slices.SortFunc(state.Routes, compareRoutes)
	return state
}

// find returns the status of an uplink whose interface is present.
func find(statuses []uplink.Status, u settings.Uplink) (uplink.Status, bool) {
	i := slices.IndexFunc(statuses, func(s uplink.Status) bool {
		return s.Name == u.Name && s.Interface == u.Interface && s.Present()
	})
	if i < 0 {
		return uplink.Status{}, false
	}
	return statuses[i], true
}

// compileIntercept diverts clients even when no uplink is left: their
// connections then get a clear answer from the daemon.
func compileIntercept(state *State, lan settings.LAN) {
	if len(lan.Interfaces) == 0 {
		return
	}
	state.Intercept = Intercept{
		LAN:  slices.Sorted(slices.Values(lan.Interfaces)),
		Port: InterceptPort,
		Mark: Mark,
		Mask: MarkMask,
	}
	for _, any := range []netip.Prefix{anyIPv4, anyIPv6} {
		state.Rules = append(state.Rules, Rule{
			IPv6:     any.Addr().Is6(),
			Priority: interceptPriority,
			Mark:     Mark,
			Mask:     MarkMask,
			Table:    interceptTable,
		})
		state.Routes = append(state.Routes, Route{
			Table:       interceptTable,
			Destination: any,
			Interface:   loopback,
			Local:       true,
			Metric:      metric(any.Addr()),
		})
	}
}

// compileLAN keeps what goes to the LAN away from the uplinks' tables. A client
// that connects to the router's address on an uplink is answered from that
// address, and the answer would leave by the uplink.
func compileLAN(state *State, lan []netip.Prefix) {
	for _, network := range lan {
		state.Rules = append(state.Rules, Rule{
			IPv6: network.Addr().Is6(), Priority: lanPriority, Destination: network, Table: mainTable,
		})
	}
}

// compileUplink makes packets from an uplink's addresses leave by that uplink.
// That holds in every mode: off stops the use of an uplink and leaves the
// interface and its routes alone.
func compileUplink(state *State, place int, status uplink.Status) {
	table, priority := firstUplinkTable+place, firstUplinkPriority+place
	device := Interface{Index: status.Index, Name: status.Interface}
	for i, source := range status.Sources {
		address, gateway := source.Addr(), status.Gateways[i]
		onLink := func(destination netip.Prefix) {
			state.Routes = append(state.Routes, Route{
				Table: table, Destination: destination, Interface: device, Metric: metric(address), InitCwnd: initialWindow,
			})
		}
		// A prefix of the address alone has nobody else on link, and one of
		// length 0 is the default route below.
		if !source.IsSingleIP() && source.Bits() > 0 {
			onLink(source.Masked())
		}
		route := Route{Table: table, Destination: anyIPv4, Interface: device, Metric: metric(address), InitCwnd: initialWindow}
		if address.Is6() {
			route.Destination = anyIPv6
		}
		if !gateway.IsUnspecified() {
			route.Gateway = gateway
			// The kernel takes a gateway only when it is on link: IPv6's
			// link-local ones always are, others may be outside the prefix.
			if !source.Contains(gateway) && !(gateway.Is6() && gateway.IsLinkLocalUnicast()) {
				onLink(single(gateway))
			}
		}
		state.Routes = append(state.Routes, route)
		state.Rules = append(state.Rules, Rule{
			IPv6: address.Is6(), Priority: priority, Source: single(address), Table: table,
		})
	}
}

// compileMPTCP opens a subflow from every address of every fit uplink that is
// not off.
//
// One subflow only (path manager default), and no MPTCP at all, concern
// connections yet to come, as they do in MPTCP v0.95. The limit and the switch
// say so to the kernel; the endpoints stay, because deleting them all takes
// every subflow from the connections that live, and these then die.
func compileMPTCP(s settings.Settings, statuses []uplink.Status) *MPTCP {
	m := &MPTCP{
		Sysctls: map[string]string{
			sysctlEnabled:    onOff(s.Multipath.Enabled),
			sysctlChecksum:   onOff(s.Multipath.Checksum),
			sysctlSYNRetrans: strconv.Itoa(s.Multipath.SYNRetries),
			sysctlScheduler:  s.Multipath.Scheduler,
			sysctlPMType:     "0", // the in-kernel path manager: endpoints belong to it
			// Left on, one uplink that comes back between the SYNs with MPTCP and
			// those without turns MPTCP off for everybody, for an hour.
			sysctlBlackhole: "0",
		},
	}
	if s.Multipath.PathManager == settings.PathManagerFullmesh {
		m.Limits.Subflows = MaxEndpoints
	}

	// In the order of what is missed most when there is no room for all.
	for _, ipv6 := range []bool{false, true} {
		for _, mode := range []settings.Mode{settings.On, settings.Backup} {
			for _, u := range s.Uplinks {
				status, ok := find(statuses, u)
				if !ok || !status.Fit || u.Mode != mode {
					continue
				}
				for _, source := range status.Sources {
					if source.Addr().Is6() != ipv6 {
						continue
					}
					e := Endpoint{
						Address:   source.Addr(),
						Interface: Interface{Index: status.Index, Name: status.Interface},
						Flags:     FlagSubflow,
					}
					if mode == settings.Backup {
						e.Flags |= FlagBackup
					}
					if len(m.Endpoints) < MaxEndpoints {
						m.Endpoints = append(m.Endpoints, e)
					} else {
						m.Omitted = append(m.Omitted, e)
					}
				}
			}
		}
	}
	slices.SortFunc(m.Endpoints, compareEndpoints)
	return m
}

// metric is the one that the kernel gives a route without one: IPv6 has no 0
// (IP6_RT_PRIO_USER).
func metric(family netip.Addr) int {
	if family.Is6() {
		return 1024
	}
	return 0
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func onOff(on bool) string {
	if on {
		return "1"
	}
	return "0"
}
