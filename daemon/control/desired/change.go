package desired

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Change is one step from one state to another. It prints itself as the command
// that would take the same step by hand.
type Change interface {
	fmt.Stringer
	// on takes the step in a model of the kernel.
	on(*State)
}

// The changes.
type (
	AddRule    struct{ Rule Rule }
	DeleteRule struct{ Rule Rule }

	AddRoute     struct{ Route Route }
	ReplaceRoute struct{ Route Route }
	DeleteRoute  struct{ Route Route }

	// ReplaceTable installs the whole table in one transaction, whatever was
	// there.
	ReplaceTable struct{ Table Table }
	DeleteTable  struct{ Name string }

	SetMTU struct {
		Interface Interface
		Bytes     int
	}
	SetUp      struct{ Interface Interface }
	AddAddress struct {
		Interface Interface
		Address   netip.Prefix
	}
	DeleteAddress struct {
		Interface Interface
		Address   netip.Prefix
	}

	AddEndpoint      struct{ Endpoint Endpoint }
	SetEndpointFlags struct{ Endpoint Endpoint }
	DeleteEndpoint   struct{ Endpoint Endpoint }

	SetLimits struct{ Limits Limits }
	SetSysctl struct{ Path, Value string } // Path is below /proc/sys/net
)

func (c AddRule) String() string    { return c.Rule.command("add") }
func (c DeleteRule) String() string { return c.Rule.command("delete") }

func (r Rule) command(verb string) string {
	var selectors []string
	if r.Input != "" {
		selectors = append(selectors, "iif "+r.Input)
	}
	if r.Source.IsValid() {
		selectors = append(selectors, "from "+short(r.Source))
	}
	if r.Destination.IsValid() {
		selectors = append(selectors, "to "+short(r.Destination))
	}
	if r.Ports != (Ports{}) {
		selectors = append(selectors, fmt.Sprintf("sport %d-%d", r.Ports.First, r.Ports.Last))
	}
	if r.Mask != 0 {
		selectors = append(selectors, fmt.Sprintf("fwmark %#x/%#x", r.Mark, r.Mask))
	}
	if len(selectors) == 0 {
		selectors = []string{"from all"}
	}
	table := strconv.Itoa(r.Table)
	if r.Table == mainTable {
		table = "main"
	}
	return fmt.Sprintf("%s rule %s %s lookup %s priority %d protocol %d", ip(r.IPv6), verb, strings.Join(selectors, " "), table, r.Priority, Protocol)
}

func (c AddRoute) String() string     { return c.Route.command("add") }
func (c ReplaceRoute) String() string { return c.Route.command("replace") }
func (c DeleteRoute) String() string  { return c.Route.command("delete") }

func (r Route) command(verb string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s route %s ", ip(r.Destination.Addr().Is6()), verb)
	if r.Local {
		b.WriteString("local ")
	}
	if r.Unreachable {
		b.WriteString("unreachable ")
	}
	if r.Destination.Bits() == 0 {
		b.WriteString("default")
	} else {
		b.WriteString(short(r.Destination))
	}
	if r.Gateway.IsValid() {
		fmt.Fprintf(&b, " via %s", r.Gateway)
	}
	if !r.Unreachable {
		fmt.Fprintf(&b, " dev %s", r.Interface.Name)
	}
	fmt.Fprintf(&b, " table %d protocol %d", r.Table, Protocol)
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	if r.InitCwnd != 0 {
		fmt.Fprintf(&b, " initcwnd %d", r.InitCwnd)
	}
	return b.String()
}

// String does not tell all of the table, which can be a hundred lines: its own
// String does.
func (c ReplaceTable) String() string {
	rules := 0
	for _, chain := range c.Table.Chains {
		rules += len(chain.Rules)
	}
	return fmt.Sprintf("nft replace table inet %s (%d chains, %d rules)", c.Table.Name, len(c.Table.Chains), rules)
}

func (c DeleteTable) String() string { return "nft delete table inet " + c.Name }

func (c SetMTU) String() string {
	return fmt.Sprintf("ip link set %s mtu %d", c.Interface.Name, c.Bytes)
}
func (c SetUp) String() string { return fmt.Sprintf("ip link set %s up", c.Interface.Name) }

func (c AddAddress) String() string {
	return fmt.Sprintf("%s address add %s dev %s", ip(c.Address.Addr().Is6()), c.Address, c.Interface.Name)
}

func (c DeleteAddress) String() string {
	return fmt.Sprintf("%s address delete %s dev %s", ip(c.Address.Addr().Is6()), c.Address, c.Interface.Name)
}

func (c AddEndpoint) String() string {
	return fmt.Sprintf("ip mptcp endpoint add %s dev %s %s", c.Endpoint.Address, c.Endpoint.Interface.Name, c.Endpoint.Flags)
}

func (c SetEndpointFlags) String() string {
	return fmt.Sprintf("ip mptcp endpoint change %s %s", c.Endpoint.Address, c.Endpoint.Flags)
}

func (c DeleteEndpoint) String() string {
	return fmt.Sprintf("ip mptcp endpoint delete %s", c.Endpoint.Address)
}

func (f EndpointFlags) String() string {
	var names []string
	for _, n := range []struct {
		flag EndpointFlags
		name string
	}{{1, "signal"}, {FlagSubflow, "subflow"}, {FlagBackup, "backup"}, {flagFullmesh, "fullmesh"}, {16, "implicit"}, {32, "laminar"}} {
		if f&n.flag != 0 {
			names = append(names, n.name)
			f &^= n.flag
		}
	}
	if f != 0 {
		names = append(names, fmt.Sprintf("%#x", uint32(f)))
	}
	return strings.Join(names, " ")
}

func (c SetLimits) String() string {
	return fmt.Sprintf("ip mptcp limits set subflows %d add_addr_accepted %d", c.Limits.Subflows, c.Limits.AddAddrAccepted)
}

func (c SetSysctl) String() string {
	name := "net/" + c.Path
	if !strings.Contains(name, ".") { // else a dot belongs to the name of an interface
		name = strings.ReplaceAll(name, "/", ".")
	}
	return fmt.Sprintf("sysctl %s=%s", name, c.Value)
}

func ip(ipv6 bool) string {
	if ipv6 {
		return "ip -6"
	}
	return "ip"
}

// short leaves out the length of a prefix that is one address.
func short(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// After is the state that the changes lead to in a kernel that takes them all:
// the model that Diff is tested against, and that stands in for the kernel in
// the tests of others. It shares nothing with s.
func (s State) After(changes ...Change) State {
	s.Rules = slices.Clone(s.Rules)
	s.Routes = slices.Clone(s.Routes)
	s.Table.Chains = slices.Clone(s.Table.Chains)
	s.Device.Addresses = slices.Clone(s.Device.Addresses)
	s.Legs = slices.Clone(s.Legs)
	for i := range s.Legs {
		s.Legs[i].Addresses = slices.Clone(s.Legs[i].Addresses)
	}
	s.Sysctls = maps.Clone(s.Sysctls)
	if s.MPTCP != nil {
		m := *s.MPTCP
		m.Endpoints = slices.Clone(m.Endpoints)
		m.Sysctls = maps.Clone(m.Sysctls)
		s.MPTCP = &m
	}
	s.OutOfTree = s.OutOfTree.clone()
	for _, c := range changes {
		c.on(&s)
	}
	return s
}

func (c AddRule) on(s *State) {
	if !slices.Contains(s.Rules, c.Rule) {
		s.Rules = append(s.Rules, c.Rule)
	}
}

func (c DeleteRule) on(s *State) {
	s.Rules = slices.DeleteFunc(s.Rules, func(r Rule) bool { return r == c.Rule })
}

func (c AddRoute) on(s *State) { s.Routes = append(s.Routes, c.Route) }

func (c ReplaceRoute) on(s *State) {
	s.Routes = slices.DeleteFunc(s.Routes, func(r Route) bool { return r.key() == c.Route.key() })
	s.Routes = append(s.Routes, c.Route)
}

func (c DeleteRoute) on(s *State) {
	s.Routes = slices.DeleteFunc(s.Routes, func(r Route) bool { return r.same(c.Route) })
}

func (c ReplaceTable) on(s *State) {
	s.Table = c.Table
	s.Table.Chains = slices.Clone(c.Table.Chains)
}

func (c DeleteTable) on(s *State) { s.Table = Table{} }

func (c SetMTU) on(s *State) { s.device(c.Interface).MTU = c.Bytes }
func (c SetUp) on(s *State)  { s.device(c.Interface).Up = true }

func (c AddAddress) on(s *State) {
	d := s.device(c.Interface)
	d.Addresses = append(d.Addresses, c.Address)
}

func (c DeleteAddress) on(s *State) {
	d := s.device(c.Interface)
	d.Addresses = slices.DeleteFunc(d.Addresses, func(a netip.Prefix) bool { return a == c.Address })
}

func (c AddEndpoint) on(s *State) { s.MPTCP.Endpoints = append(s.MPTCP.Endpoints, c.Endpoint) }

func (c SetEndpointFlags) on(s *State) {
	for i, e := range s.MPTCP.Endpoints {
		if e.Address == c.Endpoint.Address {
			s.MPTCP.Endpoints[i].Flags = c.Endpoint.Flags
		}
	}
}

func (c DeleteEndpoint) on(s *State) {
	s.MPTCP.Endpoints = slices.DeleteFunc(s.MPTCP.Endpoints, func(e Endpoint) bool { return e.Address == c.Endpoint.Address })
}

func (c SetLimits) on(s *State) { s.MPTCP.Limits = c.Limits }

func (c SetSysctl) on(s *State) {
	name, isMPTCP := strings.CutPrefix(c.Path, MPTCPSysctls)
	switch {
	case isMPTCP && s.OutOfTree != nil:
		s.OutOfTree.Sysctls[name] = Sysctl{Value: c.Value}
	case isMPTCP:
		s.MPTCP.Sysctls[name] = c.Value
	default:
		s.Sysctls[c.Path] = Sysctl{Value: c.Value}
	}
}
