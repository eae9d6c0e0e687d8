package desired

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Diff says how to come from one state to another, so that at no moment less
// works than before and after: first what is added, then what is replaced, then
// what is deleted. Within additions a table has its routes before a rule leads
// to it, and both are there before an endpoint opens subflows; deletions go the
// other way.
//
// Two things take precedence, so that no packet of the LAN leaves by a way that
// is not wanted: what keeps it from the main table is added first of all, and
// forwarding is turned on after everything that says what is forwarded.
func Diff(have, want State) []Change {
	var barrier, added, replaced, deleted []Change

	addEndpoints, replaceEndpoints, deleteEndpoints := diffEndpoints(have.MPTCP, want.MPTCP)
	if have.MPTCP != nil && want.MPTCP != nil {
		for _, name := range slices.Sorted(maps.Keys(want.MPTCP.Sysctls)) {
			value := want.MPTCP.Sysctls[name]
			if old, ok := have.MPTCP.Sysctls[name]; ok && old != value && offered(have.MPTCP, name, value) {
				added = append(added, SetSysctl{MPTCPSysctls + name, value})
			}
		}
		if limits := have.MPTCP.Limits.meeting(want.MPTCP.Limits); limits != have.MPTCP.Limits && !want.MPTCP.Outside {
			added = append(added, SetLimits{limits})
		}
	}

	setOutOfTree, openLinks, endLinks := diffOutOfTree(have.OutOfTree, want.OutOfTree)
	added = append(added, setOutOfTree...)

	var deleteAddresses []Change
	for _, w := range append([]Device{want.Device}, want.Legs...) {
		if h := have.device(w.Interface); h != nil && w.Interface.Index != 0 {
			add, remove := diffDevice(*h, w)
			added, deleteAddresses = append(added, add...), append(deleteAddresses, remove...)
		} // else the TUN is not, or not yet, the one that is meant
	}

	held := map[Route][]Route{}
	for _, r := range have.Routes {
		held[r.key()] = append(held[r.key()], r)
	}
	wanted := map[Route]bool{}
	for _, r := range slices.SortedFunc(slices.Values(want.Routes), compareRoutes) {
		wanted[r.key()] = true
		switch old := held[r.key()]; {
		case len(old) == 0 && r.Unreachable:
			barrier = append(barrier, AddRoute{r})
		case len(old) == 0:
			added = append(added, AddRoute{r})
		case !slices.ContainsFunc(old, r.same):
			replaced = append(replaced, ReplaceRoute{r})
		}
	}

	for _, r := range slices.SortedFunc(slices.Values(want.Rules), compareRules) {
		switch {
		case slices.Contains(have.Rules, r):
		case r.Priority == toLANPriority || r.Priority == fromLANPriority:
			barrier = append(barrier, AddRule{r})
		default:
			added = append(added, AddRule{r})
		}
	}

	switch {
	case want.Table.Name == "" || want.Table.same(have.Table):
	case have.Table.Name == "":
		added = append(added, ReplaceTable{want.Table})
	default:
		replaced = append(replaced, ReplaceTable{want.Table})
	}

	if have.MPTCP != nil && len(have.MPTCP.Endpoints)+len(addEndpoints) > MaxEndpoints {
		// Only now must deletions come first: the kernel has no room for both.
		added = append(added, deleteEndpoints...)
		deleteEndpoints = nil
	}
	added = append(added, addEndpoints...)
	added = append(added, openLinks...)
	replaced = append(replaced, replaceEndpoints...)
	replaced = append(replaced, diffSysctls(have, want)...)

	deleted = append(deleted, deleteEndpoints...)
	deleted = append(deleted, endLinks...)
	deleted = append(deleted, deleteAddresses...)
	if want.Table.Name == "" && have.Table.Name != "" {
		deleted = append(deleted, DeleteTable{have.Table.Name})
	}
	for _, r := range slices.SortedFunc(slices.Values(have.Rules), compareRules) {
		if !slices.Contains(want.Rules, r) {
			deleted = append(deleted, DeleteRule{r})
		}
	}
	gone := slices.SortedFunc(slices.Values(have.Routes), compareRoutes)
	slices.Reverse(gone)
	for _, r := range gone {
		if !wanted[r.key()] {
			deleted = append(deleted, DeleteRoute{r})
		}
	}
	return slices.Concat(barrier, added, replaced, deleted)
}

func diffDevice(have, want Device) (added, deleted []Change) {
	if have.MTU != want.MTU {
		added = append(added, SetMTU{want.Interface, want.MTU})
	}
	if want.Up && !have.Up {
		added = append(added, SetUp{want.Interface})
	}
	for _, a := range want.Addresses {
		if !slices.Contains(have.Addresses, a) {
			added = append(added, AddAddress{want.Interface, a})
		}
	}
	for _, a := range slices.SortedFunc(slices.Values(have.Addresses), netip.Prefix.Compare) {
		if !slices.Contains(want.Addresses, a) {
			deleted = append(deleted, DeleteAddress{want.Interface, a})
		}
	}
	return added, deleted
}

// diffSysctls goes from what forwarding would break to forwarding itself.
func diffSysctls(have, want State) []Change {
	wanted := maps.Clone(want.Sysctls)
	if wanted[Forwarding6].Value == "1" && have.Sysctls[Forwarding6].Value == "0" {
		// A host becomes a router, and ignores router advertisements from now on
		// on every interface, whomever it belongs to. In the LAN and out of a
		// tunnel that is as it should be.
		for path := range have.Sysctls {
			name, found := strings.CutSuffix(strings.TrimPrefix(path, "ipv6/conf/"), "/accept_ra")
			inLAN := slices.ContainsFunc(want.Rules, func(r Rule) bool { return r.Input == name })
			ours := name == TunnelName || name == ConcentratorTunnelName || name == ConcentratorLegName || strings.HasPrefix(name, LegPrefix)
			if found && !inLAN && !ours && name != loopback.Name {
				wanted[path] = Sysctl{Value: "2", Instead: "1"}
			}
		}
	}
	forwards := func(path string) bool { return strings.HasSuffix(path, "/forwarding") }
	var changes []Change
	for _, path := range slices.SortedFunc(maps.Keys(wanted), func(a, b string) int {
		return cmp.Or(order(forwards(a), forwards(b)), cmp.Compare(a, b))
	}) {
		old, exists := have.Sysctls[path]
		w := wanted[path]
		if exists && w.replaces(old) {
			changes = append(changes, SetSysctl{path, w.Value})
		}
	}
	return changes
}

// diffEndpoints tells the endpoints apart by their address, as the kernel does.
func diffEndpoints(have, want *MPTCP) (added, replaced, deleted []Change) {
	if have == nil {
		return nil, nil, nil
	}
	if want == nil {
		want = &MPTCP{}
	}
	for _, w := range slices.SortedFunc(slices.Values(want.Endpoints), compareEndpoints) {
		at := slices.IndexFunc(have.Endpoints, func(h Endpoint) bool { return h.Address == w.Address })
		if at < 0 {
			if !want.Outside {
				added = append(added, AddEndpoint{w})
			}
			continue
		}
		h := have.Endpoints[at]
		switch {
		case h.Interface.Index != w.Interface.Index || (h.Flags^w.Flags)&^liveFlags != 0:
			// Nothing but deleting it changes these, and then its subflows end:
			// they were bound to the wrong interface.
			replaced = append(replaced, DeleteEndpoint{h}, AddEndpoint{w})
		case h.Flags != w.Flags:
			replaced = append(replaced, SetEndpointFlags{w})
		}
	}
	for _, h := range slices.SortedFunc(slices.Values(have.Endpoints), compareEndpoints) {
		if !slices.ContainsFunc(want.Endpoints, func(w Endpoint) bool { return w.Address == h.Address }) {
			deleted = append(deleted, DeleteEndpoint{h})
		}
	}
	return added, replaced, deleted
}

// meeting changes as little of l as meets what is wanted.
func (l Limits) meeting(want Limits) Limits {
	met := Limits{max(l.Subflows, want.Subflows), max(l.AddAddrAccepted, want.AddAddrAccepted)}
	if want.Subflows == 0 {
		met.Subflows = 0
	}
	return met
}

// offered says whether the kernel takes a value. Only for the scheduler does it
// tell beforehand.
func offered(have *MPTCP, name, value string) bool {
	if name != sysctlScheduler {
		return true
	}
	schedulers, known := have.Sysctls[sysctlSchedulers]
	return !known || slices.Contains(strings.Fields(schedulers), value)
}

// Problems says what of want this kernel cannot hold, one sentence each. Diff
// leaves these things out, because trying them again would change nothing.
func Problems(have, want State) []string {
	if have.OutOfTree != nil && want.OutOfTree != nil {
		return problemsOutOfTree(have.OutOfTree, want.OutOfTree)
	}
	if want.MPTCP == nil {
		return nil
	}
	if have.MPTCP == nil {
		if want.MPTCP.Sysctls[sysctlEnabled] == "1" {
			return []string{"this kernel has no MPTCP: TCP flows use one uplink at a time"}
		}
		return nil
	}
	var problems []string
	if want.MPTCP.Outside && len(have.MPTCP.Endpoints) > 0 && len(want.MPTCP.Endpoints) > 0 {
		problems = append(problems, "path manager netlink: the endpoints of before stay until no flow is open, because flows would end with them")
	}
	for _, name := range slices.Sorted(maps.Keys(want.MPTCP.Sysctls)) {
		value := want.MPTCP.Sysctls[name]
		if _, ok := have.MPTCP.Sysctls[name]; !ok {
			// Kernels without the knob do what is wanted here.
			if name == sysctlPMType && value == "0" || name == sysctlBlackhole ||
				name == sysctlScheduler && value == "default" || name == sysctlSYNRetrans && value == "2" {
				continue
			}
			problems = append(problems, fmt.Sprintf("this kernel has no net.mptcp.%s: %s cannot be set", name, value))
		} else if !offered(have.MPTCP, name, value) {
			problems = append(problems, fmt.Sprintf("this kernel has no MPTCP scheduler %s: offered: %s",
				value, strings.Join(strings.Fields(have.MPTCP.Sysctls[sysctlSchedulers]), ", ")))
		}
	}
	for _, e := range want.MPTCP.Omitted {
		if want.MPTCP.Outside {
			break // it need not be there
		}
		problems = append(problems, fmt.Sprintf("no subflow is opened from %s on %s: the kernel holds at most %d endpoints",
			e.Address, e.Interface.Name, MaxEndpoints))
	}
	return problems
}
