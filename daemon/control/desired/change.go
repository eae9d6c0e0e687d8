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

	// ReplaceIntercept installs the whole table in one transaction, whatever
	// was there.
	ReplaceIntercept struct{ Intercept Intercept }
	DeleteIntercept  struct{}

	AddEndpoint      struct{ Endpoint Endpoint }
	SetEndpointFlags struct{ Endpoint Endpoint }
	DeleteEndpoint   struct{ Endpoint Endpoint }

	SetLimits struct{ Limits Limits }
	SetSysctl struct{ Name, Value string } // Name is below net.mptcp
)

func (c AddRule) String() string    { return c.Rule.command("add") }
func (c DeleteRule) String() string { return c.Rule.command("delete") }

func (r Rule) command(verb string) string {
	var selectors []string
	if r.Source.IsValid() {
		selectors = append(selectors, "from "+short(r.Source))
	}
	if r.Destination.IsValid() {
		selectors = append(selectors, "to "+short(r.Destination))
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
	if r.Destination.Bits() == 0 {
		b.WriteString("default")
	} else {
		b.WriteString(short(r.Destination))
	}
	if r.Gateway.IsValid() {
		fmt.Fprintf(&b, " via %s", r.Gateway)
	}
	fmt.Fprintf(&b, " dev %s table %d protocol %d", r.Interface.Name, r.Table, Protocol)
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	if r.InitCwnd != 0 {
		fmt.Fprintf(&b, " initcwnd %d", r.InitCwnd)
	}
	return b.String()
}

func (c ReplaceIntercept) String() string {
	i := c.Intercept
	return fmt.Sprintf("nft replace table inet %s { divert tcp from { %s } to port %d with mark %#x/%#x }",
		TableName, strings.Join(i.LAN, ", "), i.Port, i.Mark, i.Mask)
}

func (DeleteIntercept) String() string { return "nft delete table inet " + TableName }

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

func (c SetSysctl) String() string { return fmt.Sprintf("sysctl net.mptcp.%s=%s", c.Name, c.Value) }

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
	s.Intercept.LAN = slices.Clone(s.Intercept.LAN)
	if s.MPTCP != nil {
		m := *s.MPTCP
		m.Endpoints = slices.Clone(m.Endpoints)
		m.Sysctls = maps.Clone(m.Sysctls)
		s.MPTCP = &m
	}
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

func (c ReplaceIntercept) on(s *State) {
	s.Intercept = c.Intercept
	s.Intercept.LAN = slices.Clone(c.Intercept.LAN)
}

func (c DeleteIntercept) on(s *State) { s.Intercept = Intercept{} }

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

func (c SetSysctl) on(s *State) { s.MPTCP.Sysctls[c.Name] = c.Value }
