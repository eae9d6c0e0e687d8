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

// Tunnel is what the daemon knows of its packet path.
type Tunnel struct {
	Device Interface // the TUN; Index 0: there is none now
	// Address4 and Address6 are the router's inner addresses, invalid until the
	// concentrator has given them; Gateway4 and Gateway6 the concentrator's.
	Address4, Address6 netip.Addr
	Gateway4, Gateway6 netip.Addr
	Up                 bool // it carries packets
	// Ranking names uplinks, best first, for when the tunnel is down. Uplinks
	// missing in it come after, in the settings' order, and backups last.
	Ranking []string
	// Flows says that TCP flows are open in it.
	Flows bool
}

// carries says whether the LAN's packets can go into the tunnel.
func (t Tunnel) carries() bool { return t.Up && t.Device.Index != 0 }

// address is the router's inner one of a family.
func (t Tunnel) address(ipv6 bool) netip.Addr {
	if ipv6 {
		return t.Address6
	}
	return t.Address4
}

// resolver is the concentrator, while the tunnel leads there.
func (t Tunnel) resolver(ipv6 bool) netip.Addr {
	switch {
	case !t.carries() || !t.address(ipv6).IsValid():
		return netip.Addr{}
	case ipv6:
		return t.Gateway6
	}
	return t.Gateway4
}

// Compile says what the kernel should hold for these settings, with the uplinks
// in this condition, these networks behind the LAN interfaces, and this tunnel.
func Compile(s settings.Settings, statuses []uplink.Status, lan []netip.Prefix, t Tunnel) State {
	var state State
	best := ranked(s, statuses, t.Ranking)
	compileIntercept(&state, s.LAN)
	compileBarrier(&state, s.LAN, lan)
	compileWayOut(&state, s, t, best)
	compileDevice(&state, t)
	compileForwarding(&state, s, t)
	state.Table = compileTable(s, t, best)
	usable := slices.Clone(statuses)
	for i := range usable {
		usable[i].Fit = slices.ContainsFunc(best, func(b uplink.Status) bool { return b.Name == usable[i].Name })
	}
	for i, u := range s.Uplinks {
		if status, ok := find(usable, u); ok {
			compileUplink(&state, i, status, usable)
			compileLeg(&state, i, status.Leg)
		}
	}
	state.MPTCP = compileMPTCP(s, best, t)
	state.OutOfTree = compileOutOfTree(s, statuses, t)
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

// Barrier says what stays after the daemon has ended in good order: with
// when_tunnel_down block, what keeps the LAN from leaving by any other way than
// the tunnel; else nothing. Paths that the daemon managed are the kernel's again,
// since nobody else would open a subflow of other programs' connections.
func Barrier(s settings.Settings, lan []netip.Prefix) State {
	var state State
	if s.WhenTunnelDown == settings.Block {
		compileBarrier(&state, s.LAN, lan)
	}
	if s.Multipath.PathManager.Userspace() {
		state.MPTCP = &MPTCP{Outside: true, Sysctls: map[string]string{sysctlPMType: "0"}}
	}
	slices.SortFunc(state.Rules, compareRules)
	slices.SortFunc(state.Routes, compareRoutes)
	return state
}

// compileIntercept makes what is marked local.
func compileIntercept(state *State, lan settings.LAN) {
	if len(lan.Interfaces) == 0 {
		return
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

// compileBarrier gives what comes from the LAN a table of its own, which ends
// nowhere: never does a packet of a client go on to the main table.
//
// What goes to the LAN is kept away from this table and those of the uplinks. A
// client that connects to the router's address on an uplink is answered from
// that address, and the answer would leave by the uplink.
func compileBarrier(state *State, lan settings.LAN, networks []netip.Prefix) {
	for _, network := range networks {
		state.Rules = append(state.Rules, Rule{
			IPv6: network.Addr().Is6(), Priority: toLANPriority, Destination: network, Table: mainTable,
		})
	}
	if len(lan.Interfaces) == 0 {
		return
	}
	for _, any := range []netip.Prefix{anyIPv4, anyIPv6} {
		state.Routes = append(state.Routes, Route{Table: lanTable, Destination: any, Unreachable: true, Metric: unreachableMetric})
		for _, name := range lan.Interfaces {
			state.Rules = append(state.Rules, Rule{IPv6: any.Addr().Is6(), Priority: fromLANPriority, Input: name, Table: lanTable})
		}
	}
}

// compileWayOut leads what comes from the LAN into the tunnel, or while that is
// down and the operator wants so, to the best uplink of each family. A tunnel
// that is up without an inner address of a family carries none of that family,
// and nothing else does.
func compileWayOut(state *State, s settings.Settings, t Tunnel, best bestUplinks) {
	if len(s.LAN.Interfaces) == 0 {
		return
	}
	for _, any := range []netip.Prefix{anyIPv4, anyIPv6} {
		ipv6 := any.Addr().Is6()
		if t.carries() {
			if t.address(ipv6).IsValid() {
				state.Routes = append(state.Routes, Route{Table: lanTable, Destination: any, Interface: t.Device, Metric: metric(any.Addr())})
			}
			continue
		}
		if status, place, ok := best.of(ipv6); ok && s.WhenTunnelDown == settings.Direct {
			state.Routes = append(state.Routes, defaultRoute(lanTable, 0, status, place)...)
		}
	}
}

// compileDevice sets the TUN.
func compileDevice(state *State, t Tunnel) {
	if t.Device.Index == 0 {
		return
	}
	state.Device = Device{Interface: t.Device, MTU: TunnelMTU, Up: true}
	for _, a := range []netip.Addr{t.Address4, t.Address6} {
		if a.IsValid() {
			state.Device.Addresses = append(state.Device.Addresses, single(a))
		}
	}
}

// compileForwarding turns on what a router needs, interface by interface where
// the kernel lets us: those of others stay as they are.
func compileForwarding(state *State, s settings.Settings, t Tunnel) {
	if len(s.LAN.Interfaces) == 0 {
		return
	}
	state.Sysctls = map[string]Sysctl{Forwarding6: {Value: "1"}}
	for _, u := range s.Uplinks {
		// A router ignores router advertisements unless told otherwise, and
		// would lose the addresses of its uplinks.
		state.Sysctls[routerAdvertisements(u.Interface)] = Sysctl{Value: "2", Instead: "1"}
		if s.WhenTunnelDown == settings.Direct {
			state.Sysctls[forwarding4(u.Interface)] = Sysctl{Value: "1"}
			// Answers come in by the best uplink, which need not be the one that
			// the main table prefers: strict reverse path filtering (RFC 3704)
			// would drop them.
			state.Sysctls[reversePath(u.Interface)] = Sysctl{Value: "2", Instead: "1"}
		}
	}
	for _, name := range s.LAN.Interfaces {
		state.Sysctls[forwarding4(name)] = Sysctl{Value: "1"}
	}
	if t.Device.Index != 0 {
		state.Sysctls[forwarding4(t.Device.Name)] = Sysctl{Value: "1"}
		// Out of the TUN come the addresses of the whole Internet.
		state.Sysctls[reversePath(t.Device.Name)] = Sysctl{Value: "2"}
	}
}

// compileUplink makes packets from an uplink's addresses leave by that uplink.
// That holds in every mode: off stops the use of an uplink and leaves the
// interface and its routes alone. When several uplinks share an address, what
// leaves from a port of none of them takes the first that is fit and not off.
func compileUplink(state *State, place int, status uplink.Status, all []uplink.Status) {
	table, priority := firstUplinkTable+place, firstUplinkPriority+place
	device := Interface{Index: status.Index, Name: status.Interface}
	for i, source := range status.Sources {
		address := source.Addr()
		// A prefix of the address alone has nobody else on link, and one of
		// length 0 is the default route below.
		if !source.IsSingleIP() && source.Bits() > 0 {
			state.Routes = append(state.Routes, Route{
				Table: table, Destination: source.Masked(), Interface: device, Metric: metric(address), InitCwnd: initialWindow,
			})
		}
		state.Routes = append(state.Routes, defaultRoute(table, initialWindow, status, i)...)
		rule := Rule{IPv6: address.Is6(), Priority: priority, Source: single(address), Table: table}
		if status.Ports != (Ports{}) {
			ofPorts := rule
			ofPorts.Ports = status.Ports
			state.Rules = append(state.Rules, ofPorts)
			if all[uplink.Of(all, netip.AddrPortFrom(address, 0))].Name != status.Name {
				continue
			}
			rule.Priority = firstSharedPriority + place
		}
		state.Rules = append(state.Rules, rule)
	}
}

// compileLeg sets the TUN of an uplink's leg, and makes packets from its addresses
// leave by it. What they are put into leaves by the uplink.
func compileLeg(state *State, place int, leg uplink.Leg) {
	if leg.Index == 0 {
		return
	}
	device := Device{Interface: Interface{Index: leg.Index, Name: leg.Interface}, MTU: leg.MTU, Up: true}
	for _, address := range leg.Addresses {
		device.Addresses = append(device.Addresses, single(address))
		route := Route{Table: firstLegTable + place, Destination: anyIPv4, Interface: device.Interface, Metric: metric(address), InitCwnd: initialWindow}
		if address.Is6() {
			route.Destination = anyIPv6
		}
		state.Routes = append(state.Routes, route)
		state.Rules = append(state.Rules, Rule{IPv6: address.Is6(), Priority: firstLegPriority + place, Source: single(address), Table: route.Table})
	}
	state.Legs = append(state.Legs, device)
}

// defaultRoute leads out by an uplink, with what it takes to reach its gateway.
func defaultRoute(table, window int, status uplink.Status, place int) []Route {
	source, gateway := status.Sources[place], status.Gateways[place]
	route := Route{
		Table: table, Destination: anyIPv4, Interface: Interface{Index: status.Index, Name: status.Interface},
		Metric: metric(source.Addr()), InitCwnd: window,
	}
	if source.Addr().Is6() {
		route.Destination = anyIPv6
	}
	if gateway.IsUnspecified() {
		return []Route{route}
	}
	onLink := route
	onLink.Destination = single(gateway)
	route.Gateway = gateway
	// The kernel takes a gateway only when it is on link: IPv6's link-local ones
	// always are, others may be outside the prefix.
	if source.Contains(gateway) || gateway.Is6() && gateway.IsLinkLocalUnicast() {
		return []Route{route}
	}
	return []Route{onLink, route}
}

// compileMPTCP opens a subflow from every address of every fit uplink that is
// not off, for the connections whose paths the kernel manages.
//
// Those that were opened while the daemon managed paths itself (path managers
// default, ndiffports and binder) have no part in it, and those that were opened
// before keep what they have; where one uplink is to carry, all but the best become
// backups. The limit stays, too: a connection whose subflows are all gone, and that
// could not have others for a while, is never given any again (6.18). No MPTCP at
// all concerns connections yet to come, as it does in MPTCP v0.95. Deleting all
// endpoints takes every subflow from the connections that live, and these then
// die: they are left to another program (netlink) only once no flow is open.
func compileMPTCP(s settings.Settings, best bestUplinks, t Tunnel) *MPTCP {
	m := &MPTCP{
		Sysctls: map[string]string{
			sysctlEnabled:    onOff(s.Multipath.Enabled),
			sysctlChecksum:   onOff(s.Multipath.Checksum),
			sysctlSYNRetrans: strconv.Itoa(s.Multipath.SYNRetries),
			sysctlScheduler:  s.Multipath.Scheduler,
			// Left on, one uplink that comes back between the SYNs with MPTCP and
			// those without turns MPTCP off for everybody, for an hour.
			sysctlBlackhole: "0",
		},
	}
	manager := s.Multipath.PathManager
	switch manager {
	case settings.PathManagerNetlink:
		if m.Outside = true; !t.Flows {
			return m
		}
	default:
		m.Sysctls[sysctlPMType] = onOff(manager.Userspace())
		m.Limits.Subflows = MaxEndpoints
	}
	// In the order of what is missed most when there is no room for all.
	for _, ipv6 := range []bool{false, true} {
		first, _, _ := best.of(ipv6)
		for _, way := range best.ways(s) {
			if way.Source.Is6() != ipv6 {
				continue
			}
			e := Endpoint{Address: way.Source, Interface: way.Interface, Flags: FlagSubflow}
			if way.Backup || manager.OneUplink() && way.Uplink != first.Name {
				e.Flags |= FlagBackup
			}
			switch same := func(o Endpoint) bool { return o.Address == e.Address }; {
			case slices.ContainsFunc(m.Endpoints, same) || slices.ContainsFunc(m.Omitted, same):
				// Uplinks that share an address share the subflow.
			case len(m.Endpoints) < MaxEndpoints:
				m.Endpoints = append(m.Endpoints, e)
			default:
				m.Omitted = append(m.Omitted, e)
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
