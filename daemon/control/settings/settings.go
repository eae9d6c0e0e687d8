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
}

// LAN names the interfaces whose clients are served.
type LAN struct {
	Interfaces []string `yaml:"interfaces" json:"interfaces"`
}

// Uplink is one way to the Internet.
type Uplink struct {
	Name      string  `yaml:"name" json:"name"`
	Interface string  `yaml:"interface" json:"interface"`
	Mode      Mode    `yaml:"mode" json:"mode"`
	Address   Address `yaml:"address" json:"address"`
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
	Method Method `yaml:"method" json:"method"`
}

// Method is how an uplink gets its addresses.
type Method string

// Existing takes addresses and gateway as something else configured them.
const Existing Method = "existing"

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
}

// PathManager names the way subflows are opened.
type PathManager string

// The path managers that this version can run.
const (
	PathManagerDefault  PathManager = "default"  // one subflow
	PathManagerFullmesh PathManager = "fullmesh" // one subflow from every uplink
)

// Fallback is what happens to LAN traffic while the tunnel is down.
type Fallback string

// The fallbacks.
const (
	Direct Fallback = "direct" // out of the best fit uplink, without the tunnel
	Block  Fallback = "block"  // nowhere
)
