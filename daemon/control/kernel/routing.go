package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// dumpTries is how often a list is asked for when it keeps changing under the
// kernel's hands.
const dumpTries = 4

// dump repeats a reading that the kernel marked as inconsistent.
func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range dumpTries {
		all, err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// interfaceNames names interfaces for messages.
func (k *Kernel) interfaceNames() (map[int]string, error) {
	links, err := dump(k.routing.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}

func interfaceOf(names map[int]string, index int) desired.Interface {
	name, ok := names[index]
	if !ok {
		name = fmt.Sprintf("if%d", index)
	}
	return desired.Interface{Index: index, Name: name}
}

func (k *Kernel) readRules() ([]desired.Rule, error) {
	if !k.scope.router {
		return nil, nil
	}
	var rules []desired.Rule
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all, err := dump(func() ([]netlink.Rule, error) { return k.routing.RuleList(family) })
		if err != nil {
			return nil, fmt.Errorf("list routing rules: %w", err)
		}
		for _, r := range all {
			if r.Protocol != desired.Protocol || r.Priority < desired.FirstPriority || r.Priority > desired.LastPriority {
				continue
			}
			rules = append(rules, fromRule(r))
		}
	}
	return rules, nil
}

func fromRule(r netlink.Rule) desired.Rule {
	rule := desired.Rule{
		IPv6:        r.Family == netlink.FAMILY_V6,
		Priority:    r.Priority,
		Input:       r.IifName,
		Source:      fromIPNet(r.Src),
		Destination: fromIPNet(r.Dst),
		Mark:        r.Mark,
		Table:       r.Table,
	}
	if r.Mask != nil {
		rule.Mask = *r.Mask
	}
	if r.Sport != nil {
		rule.Ports = desired.Ports{First: r.Sport.Start, Last: r.Sport.End}
	}
	// What toRule makes of it is all that a rule of ours holds.
	ours := toRule(rule)
	ours.Src, ours.Dst, ours.Mask = r.Src, r.Dst, r.Mask
	rule.Altered = !reflect.DeepEqual(*ours, r)
	return rule
}

func toRule(rule desired.Rule) *netlink.Rule {
	r := netlink.NewRule()
	r.Family = netlink.FAMILY_V4
	if rule.IPv6 {
		r.Family = netlink.FAMILY_V6
	}
	r.Priority = rule.Priority
	r.Table = rule.Table
	r.Protocol = desired.Protocol
	r.IifName = rule.Input
	if rule.Source.IsValid() {
		r.Src = toIPNet(rule.Source)
	}
	if rule.Destination.IsValid() {
		r.Dst = toIPNet(rule.Destination)
	}
	if rule.Ports != (desired.Ports{}) {
		r.Sport = netlink.NewRulePortRange(rule.Ports.First, rule.Ports.Last)
	}
	if rule.Mask != 0 {
		r.Mark, r.Mask = rule.Mark, &rule.Mask
	}
	return r
}

func (k *Kernel) addRule(rule desired.Rule) error {
	err := k.routing.RuleAdd(toRule(rule))
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if rules, err := k.readRules(); err == nil && slices.Contains(rules, rule) {
		return nil
	}
	return fmt.Errorf("%w: another program holds a rule that is the same", err)
}

func (k *Kernel) deleteRule(rule desired.Rule) error {
	return unlessGone(k.routing.RuleDel(toRule(rule)))
}

func (k *Kernel) readRoutes(names map[int]string) ([]desired.Route, error) {
	if !k.scope.router {
		return nil, nil
	}
	var routes []desired.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		of, err := dump(func() (ours []desired.Route, err error) {
			filter := &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: desired.Protocol}
			// One by one, because the main table may hold the whole Internet's.
			err = k.routing.RouteListFilteredIter(family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL, func(r netlink.Route) bool {
				if r.Table >= desired.FirstTable && r.Table <= desired.LastTable {
					ours = append(ours, fromRoute(r, names))
				}
				return true
			})
			return ours, err
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		routes = append(routes, of...)
	}
	return routes, nil
}

func fromRoute(r netlink.Route, names map[int]string) desired.Route {
	route := desired.Route{
		Table:       r.Table,
		Destination: fromIPNet(r.Dst),
		Interface:   interfaceOf(names, r.LinkIndex),
		Local:       r.Type == unix.RTN_LOCAL,
		Unreachable: r.Type == unix.RTN_UNREACHABLE,
		Metric:      r.Priority,
		InitCwnd:    r.InitCwnd,
	}
	if route.Unreachable {
		route.Interface = desired.Interface{} // IPv6 has loopback there
	}
	// For a default route the library gives no destination, or one of either length.
	if !route.Destination.IsValid() || route.Destination.Bits() == 0 {
		route.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.Family == netlink.FAMILY_V6 {
			route.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	if gateway, ok := netip.AddrFromSlice(r.Gw); ok {
		route.Gateway = gateway.Unmap()
	}
	// Whatever else it holds, no route of ours has.
	rest := r
	rest.Table, rest.Dst, rest.LinkIndex, rest.Priority, rest.Gw = 0, nil, 0, 0, nil
	rest.Protocol, rest.Family, rest.Scope, rest.InitCwnd = 0, 0, 0, 0
	rest.Flags &= unix.RTNH_F_ONLINK // the others are the kernel's observations
	if rest.Type == unix.RTN_UNICAST || rest.Type == unix.RTN_LOCAL || rest.Type == unix.RTN_UNREACHABLE {
		rest.Type = 0
	}
	route.Altered = !reflect.DeepEqual(rest, netlink.Route{})
	return route
}

func toRoute(route desired.Route) *netlink.Route {
	r := &netlink.Route{
		Table:     route.Table,
		Dst:       toIPNet(route.Destination),
		LinkIndex: route.Interface.Index,
		Priority:  route.Metric,
		InitCwnd:  route.InitCwnd,
		Protocol:  desired.Protocol,
		Type:      unix.RTN_UNICAST,
	}
	switch {
	case route.Local:
		r.Type, r.Scope = unix.RTN_LOCAL, netlink.SCOPE_HOST
	case route.Unreachable:
		r.Type = unix.RTN_UNREACHABLE
	case route.Gateway.IsValid():
		r.Gw = route.Gateway.AsSlice()
	default:
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

func (k *Kernel) addRoute(route desired.Route) error {
	err := k.routing.RouteAdd(toRoute(route))
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	names := map[int]string{route.Interface.Index: route.Interface.Name}
	if routes, err := k.readRoutes(names); err == nil && slices.Contains(routes, route) {
		return nil
	}
	return fmt.Errorf("%w: another program holds a route to the same destination in table %d", err, route.Table)
}

func (k *Kernel) replaceRoute(route desired.Route) error {
	return k.routing.RouteReplace(toRoute(route))
}

func (k *Kernel) deleteRoute(route desired.Route) error {
	r := toRoute(route)
	r.Scope = netlink.SCOPE_NOWHERE // of any scope
	if route.Altered {
		r.Type = unix.RTN_UNSPEC // of any type
	}
	return unlessGone(k.routing.RouteDel(r))
}

// unlessGone is the failure of a deletion, unless what it should delete is not
// there any more: the kernel itself takes away what depends on a link or an
// address.
func unlessGone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

func toIPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func fromIPNet(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	address, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(address, bits) // of the kernel's length: 4 bytes are IPv4
}
