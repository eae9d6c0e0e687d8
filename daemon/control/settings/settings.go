// Package settings owns the operator's typed choices: their schema, their
// validation with the line that is wrong, and their revisions in bbolt.
//
// The path of a decision through this package:
//
//	YAML or JSON text ─▶ Parse (typed, strict) ─▶ Validate ─▶ Store.Put ─▶ a revision
//
// Nothing here touches the kernel or the network. What a setting means for the
// kernel is decided by package desired.
package settings

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Settings is one complete, valid set of the operator's choices.
type Settings struct {
	// Version is the version of this schema, 1.
	Version      int          `yaml:"version" json:"version"`
	LAN          LAN          `yaml:"lan" json:"lan"`
	Uplinks      []Uplink     `yaml:"uplinks" json:"uplinks"`
	Concentrator Concentrator `yaml:"concentrator,omitempty" json:"concentrator"`
	Multipath    Multipath    `yaml:"multipath" json:"multipath"`
	// WhenTunnelDown says what happens to LAN traffic while no session reaches
	// the concentrator.
	WhenTunnelDown Fallback `yaml:"when_tunnel_down" json:"when_tunnel_down"`
	// Forwards open ports of the concentrator towards the LAN.
	Forwards []Forward `yaml:"forwards,omitempty" json:"forwards,omitempty"`
	// Classes are the operator's choices of class; the first that matches a
	// packet wins, and what none matches is classified by itself.
	Classes []ClassRule `yaml:"classes,omitempty" json:"classes,omitempty"`
}

// LAN names the interfaces whose clients are served.
type LAN struct {
	Interfaces []string `yaml:"interfaces" json:"interfaces"`
	// DNS answers the queries that clients send to the router's own address
	// through the tunnel. It is on unless the operator says otherwise.
	DNS bool `yaml:"dns" json:"dns"`
}

// Uplink is one way to the Internet.
type Uplink struct {
	Name      string  `yaml:"name" json:"name"`
	Interface string  `yaml:"interface" json:"interface"`
	Mode      Mode    `yaml:"mode" json:"mode"`
	Address   Address `yaml:"address" json:"address"`
	// Resolvers are asked for names while the tunnel is down and WhenTunnelDown
	// is Direct; without any it is the uplink's gateway.
	Resolvers []netip.Addr `yaml:"resolvers,omitempty" json:"resolvers,omitempty"`
	// Weight is its share with scheduler weighted, relative to the others', 1 to
	// 1000; 0 stands for 1.
	Weight int `yaml:"weight,omitempty" json:"weight,omitempty"`
	// Preference is its place with scheduler firstfit, 0 to 1000: those with the
	// lowest are filled first, and those with the same together.
	Preference int `yaml:"preference,omitempty" json:"preference,omitempty"`
}

// Mode is the operator's choice for one uplink.
type Mode string

// The modes, with the meaning of `ip link set dev X multipath on|off|backup`
// in the MPTCP v0.95 kernel.
const (
	On     Mode = "on"     // carries traffic
	Off    Mode = "off"    // carries nothing; the interface and its routes stay
	Backup Mode = "backup" // carries nothing while an uplink that is on is fit
)

// Address says where an uplink's addresses come from.
type Address struct {
	Method Method `json:"method"`
	// Gateway is that of method Gateway: a next hop on a network of the interface.
	Gateway netip.Addr `json:"gateway,omitzero"`
	// Source, with method Gateway, is the address of the interface that traffic
	// through the gateway comes from; without it, one in the gateway's network.
	Source netip.Addr `json:"source,omitzero"`
}

// Method is how an uplink gets its addresses.
type Method string

// The methods.
const (
	// Existing takes addresses and gateway as something else configured them.
	Existing Method = "existing"
	// Gateway takes addresses as Existing does, and another gateway than that of
	// the default route: several uplinks can then share one interface.
	Gateway Method = "gateway"
)

// Concentrator says which concentrator to enrol with.
type Concentrator struct {
	// Token is a one-time enrolment token; empty when the router has joined
	// already or is to be joined later.
	Token string `yaml:"token,omitempty" json:"token,omitempty"`
}

// Multipath holds the operator's choices for MPTCP, named as in MPTCP v0.95.
type Multipath struct {
	Enabled     bool        `yaml:"enabled" json:"enabled"`
	PathManager PathManager `yaml:"path_manager" json:"path_manager"`
	Scheduler   string      `yaml:"scheduler" json:"scheduler"`
	// Checksum adds the DSS checksum of RFC 8684 section 3.3 to every mapping.
	Checksum bool `yaml:"checksum" json:"checksum"`
	// SYNRetries is how many SYNs carry MP_CAPABLE before plain TCP is tried.
	SYNRetries int `yaml:"syn_retries" json:"syn_retries"`
	// CongestionControl is how both ends of our sessions send.
	CongestionControl CongestionControl `yaml:"congestion_control" json:"congestion_control"`
	// Subflows is how many path manager ndiffports opens, 1 to 8.
	Subflows int `yaml:"subflows" json:"subflows"`
	// OutOfTree is for kernels with MPTCP v0.9x, and nothing elsewhere.
	OutOfTree OutOfTree `yaml:"out_of_tree,omitempty" json:"out_of_tree,omitzero"`
}

// CongestionControl is that of our sessions (net/ipv4/tcp_cubic.c, tcp_bbr.c).
type CongestionControl string

// The choices.
const (
	// Auto is Cubic, and BBR while packets of calls and games are under way, which full
	// queues would delay, or while an uplink loses packets.
	Auto  CongestionControl = "auto"
	Cubic CongestionControl = "cubic" // fills the uplinks' queues, takes each loss for congestion
	BBR   CongestionControl = "bbr"   // keeps queues short, hardly minds losses
)

// CongestionControls are all of them.
var CongestionControls = []CongestionControl{Auto, Cubic, BBR}

// OutOfTree holds the choices that only MPTCP v0.9x has, as its sysctls and
// module parameters of these names. What is not set stays as the kernel has it.
type OutOfTree struct {
	// Debug makes the kernel log what it does (mptcp_debug).
	Debug bool `yaml:"debug,omitempty" json:"debug,omitempty"`
	// BinderGateways are the loose source routes of path manager binder: hops,
	// which are IPv4 addresses, joined by commas, and routes by hyphens.
	BinderGateways string `yaml:"binder_gateways,omitempty" json:"binder_gateways,omitempty"`
	// NumSegments is how many segments scheduler roundrobin sends before the next
	// subflow, and CwndLimited, "on" or "off", whether it fills congestion windows.
	NumSegments int    `yaml:"num_segments,omitempty" json:"num_segments,omitempty"`
	CwndLimited string `yaml:"cwnd_limited,omitempty" json:"cwnd_limited,omitempty"`
}

// PathManager names the way subflows are opened.
type PathManager string

// The path managers.
const (
	PathManagerDefault    PathManager = "default"    // one subflow, over the best uplink
	PathManagerFullmesh   PathManager = "fullmesh"   // one subflow from every uplink, by the kernel
	PathManagerNdiffports PathManager = "ndiffports" // several subflows over the best uplink, from different ports
	PathManagerBinder     PathManager = "binder"     // one subflow through every gateway, by the daemon
	PathManagerNetlink    PathManager = "netlink"    // another program's business
)

// PathManagerMesh is fullmesh to a concentrator that has several addresses: the
// kernel knows one, so the daemon opens the subflows. It is never a setting.
const PathManagerMesh PathManager = "mesh"

// PathManagers are all of them, in the order in which they are offered.
var PathManagers = []PathManager{PathManagerDefault, PathManagerFullmesh, PathManagerNdiffports, PathManagerBinder, PathManagerNetlink}

// Userspace says whether the daemon opens the subflows of its sessions itself,
// instead of leaving that to the kernel.
func (p PathManager) Userspace() bool {
	return p == PathManagerDefault || p == PathManagerNdiffports || p == PathManagerBinder || p == PathManagerMesh
}

// OneUplink says whether a session uses one uplink at a time.
func (p PathManager) OneUplink() bool { return p == PathManagerDefault || p == PathManagerNdiffports }

// Fallback is what happens to LAN traffic while the tunnel is down.
type Fallback string

// The fallbacks.
const (
	Direct Fallback = "direct" // out of the best fit uplink, without the tunnel
	Block  Fallback = "block"  // nowhere
)

// The protocols that forwards and class rules name. ProtocolICMP is ICMPv6 as
// well, and only for class rules.
const (
	ProtocolTCP  = "tcp"
	ProtocolUDP  = "udp"
	ProtocolICMP = "icmp"
)

// Forward opens a port of the concentrator towards a host of the LAN.
type Forward struct {
	Name     string         `yaml:"name" json:"name"`
	Protocol string         `yaml:"protocol" json:"protocol"` // ProtocolTCP or ProtocolUDP
	Port     uint16         `yaml:"port" json:"port"`         // at the concentrator
	To       netip.AddrPort `yaml:"to" json:"to"`             // host and port in the LAN
	Source   ForwardSource  `yaml:"source" json:"source"`
}

// ForwardSource is the address that the LAN host sees as that of the client.
type ForwardSource string

// The sources.
const (
	SourceClient ForwardSource = "client" // the true client's
	SourceRouter ForwardSource = "router" // the router's
)

// The classes of packets.
const (
	ClassInteractive = "interactive" // sent over the two best uplinks at once
	ClassBulk        = "bulk"        // spread over all uplinks
)

// ClassRule gives a class to the packets that meet all of its conditions. An
// absent condition is met by every packet; a rule has at least one.
type ClassRule struct {
	Class    string `json:"class"`              // ClassInteractive or ClassBulk
	Protocol string `json:"protocol,omitempty"` // empty: any
	// Ports hold the source port or the destination port, of TCP or UDP.
	Ports PortRange `json:"ports,omitzero"`
	// DSCP is the code point of RFC 2474, 0 to 63; nil is any.
	DSCP *int `json:"dscp,omitempty"`
	// Address is of the client in the LAN; the zero Prefix is any.
	Address netip.Prefix `json:"address,omitzero"`
}

// PortRange is a range of ports with both its ends. The zero range is absent,
// and stands for any port or none.
type PortRange struct{ First, Last uint16 }

// IsZero says whether the range is absent.
func (r PortRange) IsZero() bool { return r == PortRange{} }

// String is "" for an absent range, "5060" for one port, else "10000-20000".
func (r PortRange) String() string {
	switch {
	case r.IsZero():
		return ""
	case r.First == r.Last:
		return strconv.Itoa(int(r.First))
	default:
		return fmt.Sprintf("%d-%d", r.First, r.Last)
	}
}

// MarshalText writes the range as String does.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what String writes.
func (r *PortRange) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*r = PortRange{}
		return nil
	}
	first, last, isRange := strings.Cut(string(text), "-")
	if !isRange {
		last = first
	}
	f, errFirst := strconv.ParseUint(first, 10, 16)
	l, errLast := strconv.ParseUint(last, 10, 16)
	if errFirst != nil || errLast != nil || f == 0 || f > l {
		return fmt.Errorf("%s is neither a port nor a range of ports: write 5060 or 10000-20000, from 1 to 65535", quote(string(text)))
	}
	*r = PortRange{uint16(f), uint16(l)}
	return nil
}
