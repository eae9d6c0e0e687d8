// Package desired decides what the kernel should hold. It is pure: no I/O, no
// clock, no goroutine.
//
// The path of a decision through this package:
//
//	settings + []uplink.Status + LAN + Tunnel ─▶ Compile ─▶ want ─┐
//	Concentrator ─▶ CompileConcentrator ─▶ want ──────────────────┤
//	                                      package kernel ─▶ have ─┴▶ Diff ─▶ []Change ─▶ package kernel
//
// A State says the same thing whether it is wanted or was read, so that the
// kernel is compared with and never memory.
package desired

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

// What is ours in the kernel carries one of these numbers, and package kernel
// reads and changes nothing that does not. They keep clear of what other
// programs use: route protocols of rt_protos (99 openr, 186 bgp …); tables 52
// (tailscale), 253 to 255, 51820 (wg-quick) and those that systemd-networkd and
// NetworkManager derive from interface indexes (1000 and up); rule priorities
// 5210 to 5270 (tailscale), 32764 to 32767 (wg-quick, main, default); mark bits
// 0x0000c000 (Kubernetes), 0x00ff0000 (tailscale), 0x0000ff00 and 0x00000f00
// (Cilium); endpoint ids from 1 (ip mptcp, mptcpd, NetworkManager).
const (
	// Protocol is the originator of our routes and rules (rtm_protocol).
	Protocol = 83

	// Tables: one through which diverted packets reach the local listener, one
	// for every uplink, by its place in the settings, then one for every uplink's
	// leg, and the last for what comes from the LAN: no uplink can have that
	// (settings.MaxUplinks).
	FirstTable       = 8300
	LastTable        = 8363
	interceptTable   = FirstTable
	firstUplinkTable = FirstTable + 1
	firstLegTable    = firstUplinkTable + settings.MaxUplinks
	lanTable         = LastTable
	mainTable        = 254 // RT_TABLE_MAIN: a rule of ours leads there, no route of ours is in it

	// Rule priorities: diverted packets, then what goes to the LAN, then what
	// comes from there, then one for every uplink, then one for every uplink that
	// shares its address with others, whose ports come first, then those of legs.
	// All come before the main table's 32766.
	FirstPriority       = 8300
	LastPriority        = 8363
	interceptPriority   = FirstPriority
	toLANPriority       = FirstPriority + 1
	fromLANPriority     = FirstPriority + 2
	firstUplinkPriority = FirstPriority + 3
	firstSharedPriority = firstUplinkPriority + settings.MaxUplinks
	firstLegPriority    = firstSharedPriority + settings.MaxUplinks

	// Mark is what diverted packets carry in the bits of MarkMask, and
	// masqueradeMark what forwarded ones do that are to be masqueraded:
	// postrouting does not know where they came in.
	Mark           = 0x53000000
	MarkMask       = 0xff000000
	masqueradeMark = 0x54000000

	// TableName and ConcentratorTableName are the names of the nftables tables of
	// the router and of the concentrator, of family inet.
	TableName             = "sheaf"
	ConcentratorTableName = "sheaf-concentrator"

	// TunnelName and ConcentratorTunnelName are the names of their TUN devices.
	// Both have TunnelMTU, in bytes: with the headers of both carriers a packet
	// of that size fits into one of 1500 bytes.
	TunnelName             = "sheaf0"
	ConcentratorTunnelName = "sheaf-c0"
	TunnelMTU              = 1380

	// LegPrefix begins the names of the TUN devices of legs, which LegName makes,
	// and ConcentratorLegName is that of their other end. LegMTU is the most that
	// they have, in bytes, and a multiple of what WireGuard pads to, 16: with 32 of
	// its own such a packet still fits into the 1452 that quic-go, with which it
	// shares the concentrator's port, takes from a UDP socket.
	LegPrefix           = "sheafleg"
	ConcentratorLegName = "sheaf-cleg0"
	LegMTU              = 1408

	dnsPort = 53 // RFC 1035

	// The code points that package bond knows as interactive and as bulk:
	// expedited forwarding (RFC 3246) and lower effort (RFC 8622).
	dscpExpedited   = 46
	dscpLowerEffort = 1

	// unreachableMetric comes after every other route's.
	unreachableMetric = 1<<31 - 1

	// InterceptPort is where the intercept listens, on 127.0.0.1 and [::1]: a
	// client cannot reach the listener by its own address.
	InterceptPort = 8383

	// Endpoint ids are 8 bits. Every address has a few ids of its own in this
	// range, found by package kernel: the range alone would not tell, because
	// the kernel gives an endpoint without an id the one after the highest that
	// was ever used, which may be ours.
	FirstEndpointID = 83
	LastEndpointID  = 254

	// MaxEndpoints is how many endpoints a kernel holds at most (8 up to 6.18;
	// later ones hold more), and how many extra subflows a connection has.
	MaxEndpoints = 8

	// initialWindow is how many segments a connection from an uplink's address
	// sends before the first acknowledgement; the kernel's own number is 10 (RFC
	// 6928). Every new subflow adds little until its window has grown: an 80 MB
	// upload over three uplinks, start to end, reached .955 of their sum with 10,
	// .959 with 20 and .962 with 40; but 40 delay others by half a second on an
	// uplink of 1 Mbit/s.
	initialWindow = 20
)

// State is what the kernel should hold, or holds, of ours.
type State struct {
	Rules  []Rule
	Routes []Route
	Table  Table
	Device Device
	Legs   []Device // of the legs, in the order of their names
	// Sysctls by path below /proc/sys/net. Those wanted are written where they
	// exist; those read are all that this package has an interest in.
	Sysctls map[string]Sysctl
	// MPTCP is nil when nothing is wanted of MPTCP, or when the kernel that was
	// read has not the upstream implementation.
	MPTCP *MPTCP
	// OutOfTree is the same for v0.9x.
	OutOfTree *OutOfTree
}

// Rule sends packets from one interface, from one source, to one destination, or
// with one mark, to a table.
type Rule struct {
	IPv6        bool
	Priority    int
	Input       string       // interface name; empty: any
	Source      netip.Prefix // invalid: any
	Destination netip.Prefix // invalid: any
	Ports       Ports        // source ports
	Mark        uint32
	Mask        uint32
	Table       int
	// Altered: the rule that was read holds something that no rule of ours does.
	Altered bool
}

// Ports is a range of source ports.
type Ports = uplink.Ports

// Route is one entry of a table of ours.
type Route struct {
	Table       int
	Destination netip.Prefix
	Gateway     netip.Addr // invalid: on link
	Interface   Interface  // none for an unreachable one
	Local       bool       // delivers to this host
	Unreachable bool       // delivers nowhere, and says so to the sender
	Metric      int        // IPv6 has no metric 0
	InitCwnd    int        // initial congestion window in segments; 0: the kernel's own
	// Altered: the route that was read holds something that no route of ours does.
	Altered bool
}

// Interface is a network interface. Its name is there for people: the index
// decides.
type Interface struct {
	Index int
	Name  string
}

// LegName is the TUN of the leg of the uplink with a place in the settings.
func LegName(place int) string { return LegPrefix + strconv.Itoa(place) }

// device is the TUN that an interface is, or nil.
func (s *State) device(i Interface) *Device {
	if s.Device.Interface.Index == i.Index {
		return &s.Device
	}
	if at := slices.IndexFunc(s.Legs, func(d Device) bool { return d.Interface.Index == i.Index }); at >= 0 {
		return &s.Legs[at]
	}
	return nil
}

// Device is a TUN, of the packet path or of a leg. The data path makes it and takes it
// away; only what it is set to is wanted here.
type Device struct {
	Interface Interface // Index 0: there is none, or nothing is wanted of it
	MTU       int       // bytes
	Up        bool
	Addresses []netip.Prefix // of global scope
}

// Sysctl is the value of one, which is only wanted instead of another if Instead
// is set.
type Sysctl struct {
	Value   string
	Instead string
}

// replaces says whether what is wanted has to be written over what is there.
func (w Sysctl) replaces(old Sysctl) bool {
	return old.Value != w.Value && (w.Instead == "" || w.Instead == old.Value)
}

// Forwarding4 and Forwarding6 are the paths below /proc/sys/net that make a
// machine forward packets from every interface. For IPv6 there is no other
// switch.
const (
	Forwarding4 = "ipv4/conf/all/forwarding"
	Forwarding6 = "ipv6/conf/all/forwarding"
)

func forwarding4(name string) string { return "ipv4/conf/" + name + "/forwarding" }
func reversePath(name string) string { return "ipv4/conf/" + name + "/rp_filter" }

// routerAdvertisements is the path of accept_ra: 1 accepts router advertisements
// while the machine forwards no IPv6, 2 also while it does.
func routerAdvertisements(name string) string { return "ipv6/conf/" + name + "/accept_ra" }

// SysctlPaths are the paths below /proc/sys/net that a State of a kernel with
// these interfaces holds, where the kernel has them.
func SysctlPaths(interfaces []string) []string {
	paths := []string{Forwarding4, Forwarding6}
	for _, name := range interfaces {
		paths = append(paths, forwarding4(name), reversePath(name), routerAdvertisements(name))
	}
	return paths
}

// Restore puts back what sysctls were before, by path, and what else there is
// behind LinkPath and ParameterPath. Sysctls of all interfaces come first,
// because they set the others.
func Restore(before map[string]string) []Change {
	var all, single []Change
	for _, path := range slices.Sorted(maps.Keys(before)) {
		value := before[path]
		if name, ok := strings.CutPrefix(path, LinkPath); ok {
			single = append(single, SetLinkFlags{name, parseLinkFlags(value)})
		} else if parameter, ok := strings.CutPrefix(path, ParameterPath); ok {
			single = append(single, SetParameter{parameter, value})
		} else if path == Forwarding4 || path == Forwarding6 {
			all = append(all, SetSysctl{path, value})
		} else {
			single = append(single, SetSysctl{path, value})
		}
	}
	return append(all, single...)
}

// MPTCP is what the in-kernel path manager of the upstream implementation (Linux
// 5.6 and later) and its sysctls hold.
type MPTCP struct {
	Endpoints []Endpoint
	// Limits are minima when wanted: what is larger stays. Only no extra
	// subflows at all means just that.
	Limits Limits
	// Sysctls by name below net.mptcp. Those wanted are written where they
	// exist; those read are all that this package has an interest in.
	Sysctls map[string]string
	// Omitted are wanted endpoints for which the kernel has no room.
	Omitted []Endpoint
	// Outside: another program manages paths. The limits are its own, and no
	// endpoint is added, but those that are wanted stay if they are there.
	Outside bool
}

// Endpoint is a local address that subflows are opened from.
type Endpoint struct {
	Address   netip.Addr
	Interface Interface
	Flags     EndpointFlags
}

// EndpointFlags are the kernel's MPTCP_PM_ADDR_FLAG bits.
type EndpointFlags uint32

// Endpoints of ours open subflows, and may be backups. They do not have the flag
// fullmesh, though together they make the mesh of path manager fullmesh: it
// would add something only where a peer has several addresses in one connection,
// and with it the kernel (6.18) never joins from the address of a connection's
// initial subflow again once that was deleted, so an uplink that failed would
// not come back. Without it, it does.
const (
	FlagSubflow EndpointFlags = 1 << 1
	FlagBackup  EndpointFlags = 1 << 2

	flagFullmesh EndpointFlags = 1 << 3
	// liveFlags can be changed without ending the endpoint's subflows.
	liveFlags = FlagBackup | flagFullmesh
)

// Limits are the path manager's limits of one connection.
type Limits struct {
	Subflows        uint32 // besides the initial one
	AddAddrAccepted uint32
}

// The names below net.mptcp.
const (
	sysctlEnabled    = "enabled"
	sysctlChecksum   = "checksum_enabled"
	sysctlSYNRetrans = "syn_retrans_before_tcp_fallback"
	sysctlScheduler  = "scheduler"
	sysctlSchedulers = "available_schedulers"
	sysctlPMType     = "pm_type"
	sysctlBlackhole  = "blackhole_timeout"
)

// MPTCPSysctls is where the names below net.mptcp are, below /proc/sys/net.
const MPTCPSysctls = "mptcp/"

// SysctlNames are the names below net.mptcp that a State of the kernel holds,
// where the kernel has them.
func SysctlNames() []string {
	return []string{sysctlEnabled, sysctlChecksum, sysctlSYNRetrans, sysctlScheduler, sysctlSchedulers, sysctlPMType, sysctlBlackhole}
}

// key tells routes apart as the kernel does: a route of the same key can be
// replaced, and another cannot be beside it.
func (r Route) key() Route {
	return Route{Table: r.Table, Destination: r.Destination, Metric: r.Metric}
}

// same says whether two routes mean the same: the index of an interface decides.
func (r Route) same(other Route) bool {
	r.Interface.Name, other.Interface.Name = "", ""
	return r == other
}

// compareRules orders rules as the kernel looks at them.
func compareRules(a, b Rule) int {
	return cmp.Or(order(a.IPv6, b.IPv6), a.Priority-b.Priority, cmp.Compare(a.Input, b.Input), a.Source.Addr().Compare(b.Source.Addr()),
		a.Source.Bits()-b.Source.Bits(), a.Destination.Addr().Compare(b.Destination.Addr()),
		a.Destination.Bits()-b.Destination.Bits(), cmp.Compare(a.Ports.First, b.Ports.First), a.Table-b.Table, cmp.Compare(a.Mark, b.Mark), cmp.Compare(a.Mask, b.Mask),
		order(a.Altered, b.Altered))
}

// compareRoutes puts the routes of a table that others depend on first: a
// gateway is only accepted when it can be reached.
func compareRoutes(a, b Route) int {
	return cmp.Or(order(a.Destination.Addr().Is6(), b.Destination.Addr().Is6()), a.Table-b.Table,
		b.Destination.Bits()-a.Destination.Bits(), a.Destination.Addr().Compare(b.Destination.Addr()),
		a.Metric-b.Metric)
}

func compareEndpoints(a, b Endpoint) int { return a.Address.Compare(b.Address) }

// order sorts what is false first.
func order(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
