package desired

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

// The path of a decision for MPTCP v0.9x, the implementation outside Linux's
// tree (v0.95 is for Linux 4.19, v0.96 for 5.4). Upstream has endpoints; v0.9x
// has flags of interfaces, and takes every address of one that has none set:
//
//	settings + []uplink.Status + Tunnel ─▶ compileOutOfTree ─▶ want ─┐
//	                                          package kernel ─▶ have ┴▶ diff ─▶ []Change
//
// Compile wants both implementations to hold what the operator chose, and Diff
// does nothing for the one that the kernel does not have.

// OutOfTree is what MPTCP v0.9x holds.
type OutOfTree struct {
	// Sysctls by name below net.mptcp. Those wanted are written where they exist.
	Sysctls map[string]Sysctl
	// Parameters of kernel modules, as MODULE/NAME. Those wanted are written where
	// they exist.
	Parameters map[string]string
	// Links by name of the interface. Those wanted are of uplinks, of the LAN and
	// of the TUN; those of others stay as they are.
	Links map[string]LinkFlags
	// Refused are values that the kernel that was read has refused, by name below
	// net.mptcp: v0.9x has no list of path managers and schedulers to look into.
	Refused map[string]string
}

// LinkFlags are the flags of an interface (ifi_flags) that only v0.9x knows, as
// `ip link set dev X multipath on|off|backup` sets them; none of them is on.
type LinkFlags uint32

// From include/uapi/linux/if.h of MPTCP v0.95.
const (
	LinkOff    LinkFlags = 0x80000  // IFF_NOMULTIPATH
	LinkBackup LinkFlags = 0x100000 // IFF_MPBACKUP
)

func (f LinkFlags) String() string {
	switch {
	case f&LinkOff != 0:
		return "off"
	case f&LinkBackup != 0:
		return "backup"
	}
	return "on"
}

func parseLinkFlags(s string) LinkFlags {
	switch s {
	case "off":
		return LinkOff
	case "backup":
		return LinkBackup
	}
	return 0
}

// The names below net.mptcp.
const (
	outOfTreeEnabled     = "mptcp_enabled"
	outOfTreeVersion     = "mptcp_version"
	outOfTreeChecksum    = "mptcp_checksum"
	outOfTreeSYNRetries  = "mptcp_syn_retries"
	outOfTreeDebug       = "mptcp_debug"
	outOfTreePathManager = "mptcp_path_manager"
	outOfTreeScheduler   = "mptcp_scheduler"
	outOfTreeGateways    = "mptcp_binder_gateways"
)

// The parameters of modules.
const (
	fullmeshSubflows   = "mptcp_fullmesh/num_subflows"
	ndiffportsSubflows = "mptcp_ndiffports/num_subflows"
	roundRobinBurst    = "mptcp_rr/num_segments"
	roundRobinFill     = "mptcp_rr/cwnd_limited"
)

// OutOfTreeSysctlNames are the names below net.mptcp that an OutOfTree holds,
// where the kernel has them.
func OutOfTreeSysctlNames() []string {
	return []string{outOfTreeEnabled, outOfTreeVersion, outOfTreeChecksum, outOfTreeSYNRetries, outOfTreeDebug,
		outOfTreePathManager, outOfTreeScheduler, outOfTreeGateways}
}

// Parameters are the parameters of modules, as MODULE/NAME, that an OutOfTree
// holds, where the kernel has them.
func Parameters() []string {
	return []string{fullmeshSubflows, ndiffportsSubflows, roundRobinBurst, roundRobinFill}
}

// The changes that only v0.9x takes.
type (
	// SetLinkFlags means both flags: one that is not set is taken away.
	SetLinkFlags struct {
		Interface string
		Flags     LinkFlags
	}
	SetParameter struct{ Parameter, Value string } // Parameter is MODULE/NAME
)

// Where Restore finds what is no sysctl: behind these are the name of an
// interface, and a parameter as MODULE/NAME.
const (
	LinkPath      = "link/"
	ParameterPath = "module/"
)

func (c SetLinkFlags) String() string {
	return fmt.Sprintf("ip link set dev %s multipath %s", c.Interface, c.Flags)
}

func (c SetParameter) String() string {
	module, name, _ := strings.Cut(c.Parameter, "/")
	return fmt.Sprintf("echo %s > /sys/module/%s/parameters/%s", c.Value, module, name)
}

func (c SetLinkFlags) on(s *State) { s.OutOfTree.Links[c.Interface] = c.Flags }
func (c SetParameter) on(s *State) { s.OutOfTree.Parameters[c.Parameter] = c.Value }

func (o *OutOfTree) clone() *OutOfTree {
	if o == nil {
		return nil
	}
	return &OutOfTree{
		Sysctls: maps.Clone(o.Sysctls), Parameters: maps.Clone(o.Parameters),
		Links: maps.Clone(o.Links), Refused: maps.Clone(o.Refused),
	}
}

// compileOutOfTree gives each uplink its mode, and keeps the path managers away
// from the LAN and the TUN, whose addresses they would use too. An uplink that
// is not fit is off: that ends its subflows and tells the peer, as deleting its
// endpoint does upstream.
//
// The kernel's switch is turned on only when it is 0, and then to 2: sockets that
// ask for MPTCP have it, ours do, and nobody else's are changed. With 1, which
// every socket obeys, there is nothing to do. It is never turned off: other
// programs may live by it, and ours leave MPTCP socket by socket.
//
// Of the protocol's versions 1 is wanted, RFC 8684: upstream kernels, and so the
// concentrator's, know no other.
func compileOutOfTree(s settings.Settings, statuses []uplink.Status, t Tunnel) *OutOfTree {
	m, tuning := s.Multipath, s.Multipath.OutOfTree
	o := &OutOfTree{
		Sysctls: map[string]Sysctl{
			outOfTreeVersion:     {Value: "1"},
			outOfTreeChecksum:    {Value: onOff(m.Checksum)},
			outOfTreeSYNRetries:  {Value: strconv.Itoa(m.SYNRetries)},
			outOfTreeDebug:       {Value: onOff(tuning.Debug)},
			outOfTreePathManager: {Value: string(m.PathManager)},
			outOfTreeScheduler:   {Value: m.Scheduler},
		},
		Parameters: map[string]string{},
		Links:      map[string]LinkFlags{},
	}
	if m.Enabled {
		o.Sysctls[outOfTreeEnabled] = Sysctl{Value: "2", Instead: "0"}
	}
	if tuning.BinderGateways != "" {
		o.Sysctls[outOfTreeGateways] = Sysctl{Value: tuning.BinderGateways}
	}
	switch m.PathManager {
	case settings.PathManagerFullmesh:
		o.Parameters[fullmeshSubflows] = "1" // for every pair of addresses
	case settings.PathManagerNdiffports:
		o.Parameters[ndiffportsSubflows] = strconv.Itoa(m.Subflows)
	}
	if tuning.NumSegments != 0 {
		o.Parameters[roundRobinBurst] = strconv.Itoa(tuning.NumSegments)
	}
	switch tuning.CwndLimited {
	case "on":
		o.Parameters[roundRobinFill] = "Y"
	case "off":
		o.Parameters[roundRobinFill] = "N"
	}

	// Of several uplinks behind one interface the one that is used most decides.
	for _, flags := range []LinkFlags{LinkOff, LinkBackup, 0} {
		for _, u := range s.Uplinks {
			if status, ok := find(statuses, u); ok && linkFlags(u.Mode, status.Fit) == flags {
				o.Links[u.Interface] = flags
			}
		}
	}
	for _, name := range s.LAN.Interfaces {
		o.Links[name] = LinkOff
	}
	if t.Device.Index != 0 {
		o.Links[t.Device.Name] = LinkOff
	}
	return o
}

func linkFlags(mode settings.Mode, fit bool) LinkFlags {
	switch {
	case mode == settings.Off || !fit:
		return LinkOff
	case mode == settings.Backup:
		return LinkBackup
	}
	return 0
}

// diffOutOfTree returns what is to be set before anything else, what opens
// subflows, and what ends them.
func diffOutOfTree(have, want *OutOfTree) (set, opened, ended []Change) {
	if have == nil || want == nil {
		return nil, nil, nil
	}
	for _, name := range slices.Sorted(maps.Keys(want.Sysctls)) {
		w := want.Sysctls[name]
		if old, ok := have.Sysctls[name]; ok && w.replaces(old) && have.Refused[name] != w.Value {
			set = append(set, SetSysctl{MPTCPSysctls + name, w.Value})
		}
	}
	for _, parameter := range slices.Sorted(maps.Keys(want.Parameters)) {
		value := want.Parameters[parameter]
		if old, ok := have.Parameters[parameter]; ok && old != value {
			set = append(set, SetParameter{parameter, value})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(want.Links)) {
		flags := want.Links[name]
		switch old, ok := have.Links[name]; {
		case !ok || old == flags:
		case flags&LinkOff != 0:
			ended = append(ended, SetLinkFlags{name, flags})
		default:
			opened = append(opened, SetLinkFlags{name, flags})
		}
	}
	return set, opened, ended
}

// problemsOutOfTree says what of want this kernel cannot hold.
func problemsOutOfTree(have, want *OutOfTree) (problems []string) {
	for _, name := range slices.Sorted(maps.Keys(want.Sysctls)) {
		w := want.Sysctls[name]
		if old, ok := have.Sysctls[name]; !ok {
			// Before v0.91 there was no choice of version.
			if name != outOfTreeVersion {
				problems = append(problems, fmt.Sprintf("this kernel has no net.mptcp.%s: %s cannot be set", name, w.Value))
			}
		} else if have.Refused[name] == w.Value && old.Value != w.Value {
			what := strings.ReplaceAll(strings.TrimPrefix(name, "mptcp_"), "_", " ")
			problems = append(problems, fmt.Sprintf("this kernel refuses the MPTCP %s %s: it runs %s; load the module that has it, or choose another",
				what, w.Value, old.Value))
		}
	}
	for _, parameter := range slices.Sorted(maps.Keys(want.Parameters)) {
		// Without it the kernel does what is wanted of fullmesh.
		if _, ok := have.Parameters[parameter]; !ok && parameter != fullmeshSubflows {
			module, name, _ := strings.Cut(parameter, "/")
			problems = append(problems, fmt.Sprintf("this kernel has no parameter %s of module %s: %s cannot be set", name, module, want.Parameters[parameter]))
		}
	}
	return problems
}
