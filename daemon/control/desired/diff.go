package desired

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Diff says how to come from one state to another, so that at no moment less
// works than before and after: first what is added, then what is replaced, then
// what is deleted. Within additions a table has its routes before a rule leads
// to it, and both are there before an endpoint opens subflows; deletions go the
// other way.
func Diff(have, want State) []Change {
	var added, replaced, deleted []Change

	addEndpoints, replaceEndpoints, deleteEndpoints := diffEndpoints(have.MPTCP, want.MPTCP)
	if have.MPTCP != nil && want.MPTCP != nil {
		for _, name := range slices.Sorted(maps.Keys(want.MPTCP.Sysctls)) {
			value := want.MPTCP.Sysctls[name]
			if old, ok := have.MPTCP.Sysctls[name]; ok && old != value && offered(have.MPTCP, name, value) {
				added = append(added, SetSysctl{name, value})
			}
		}
		if limits := have.MPTCP.Limits.meeting(want.MPTCP.Limits); limits != have.MPTCP.Limits {
			added = append(added, SetLimits{limits})
		}
	}

	held := map[Route][]Route{}
	for _, r := range have.Routes {
		held[r.key()] = append(held[r.key()], r)
	}
	wanted := map[Route]bool{}
	for _, r := range slices.SortedFunc(slices.Values(want.Routes), compareRoutes) {
		wanted[r.key()] = true
		switch old := held[r.key()]; {
		case len(old) == 0:
			added = append(added, AddRoute{r})
		case !slices.ContainsFunc(old, r.same):
			replaced = append(replaced, ReplaceRoute{r})
		}
	}

	for _, r := range slices.SortedFunc(slices.Values(want.Rules), compareRules) {
		if !slices.Contains(have.Rules, r) {
			added = append(added, AddRule{r})
		}
	}

	if wanting, having := want.Intercept, have.Intercept; !wanting.same(having) {
		switch {
		case len(wanting.LAN) == 0:
			// Deleted below, after the endpoints.
		case len(having.LAN) == 0 && !having.Altered:
			added = append(added, ReplaceIntercept{wanting})
		default:
			replaced = append(replaced, ReplaceIntercept{wanting})
		}
	}

	if have.MPTCP != nil && len(have.MPTCP.Endpoints)+len(addEndpoints) > MaxEndpoints {
		// Only now must deletions come first: the kernel has no room for both.
		added = append(added, deleteEndpoints...)
		deleteEndpoints = nil
	}
	added = append(added, addEndpoints...)
	replaced = append(replaced, replaceEndpoints...)

	deleted = append(deleted, deleteEndpoints...)
	if len(want.Intercept.LAN) == 0 && !want.Intercept.same(have.Intercept) {
		deleted = append(deleted, DeleteIntercept{})
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
	return slices.Concat(added, replaced, deleted)
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
			added = append(added, AddEndpoint{w})
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
	if want.MPTCP == nil {
		return nil
	}
	if have.MPTCP == nil {
		if want.MPTCP.Sysctls[sysctlEnabled] == "1" {
			return []string{"this kernel has no MPTCP: one uplink is used at a time"}
		}
		return nil
	}
	var problems []string
	for _, name := range slices.Sorted(maps.Keys(want.MPTCP.Sysctls)) {
		value := want.MPTCP.Sysctls[name]
		if _, ok := have.MPTCP.Sysctls[name]; !ok {
			// Kernels without the knob do what is wanted here.
			if name == sysctlPMType || name == sysctlBlackhole ||
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
		problems = append(problems, fmt.Sprintf("no subflow is opened from %s on %s: the kernel holds at most %d endpoints",
			e.Address, e.Interface.Name, MaxEndpoints))
	}
	return problems
}
