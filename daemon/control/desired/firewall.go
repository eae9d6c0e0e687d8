package desired

import (
	"cmp"
	"net/netip"
	"slices"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

// The path of a LAN client's packet through the router's table:
//
//	prerouting ─┬ TCP to elsewhere: to the intercept's listener
//	            └ DNS query to the router: to the resolver behind the tunnel
//	routing       (rule iif lan0: the TUN, or the best uplink, or nowhere)
//	forward     ─┬ may it leave there? mark it
//	            └ a class by its address: DSCP; TCP: maximum segment size
//	postrouting   marked: masquerade
//
// and of one that comes out of the TUN:
//
//	prerouting    to a forwarded UDP port: to the host in the LAN
//	input         nothing but answers and ICMP
//	forward       only to the LAN, and only what is asked for or forwarded
//
// What comes out of the legs is answers for this machine, and is never forwarded.

// compileTable makes the router's table. Clients are diverted even when no
// uplink is left: their connections then get a clear answer from the daemon.
func compileTable(s settings.Settings, t Tunnel, best bestUplinks) Table {
	lan := slices.Sorted(slices.Values(s.LAN.Interfaces))
	if len(lan) == 0 {
		return Table{}
	}
	var uplinks, legs []string
	for i, u := range s.Uplinks {
		uplinks = append(uplinks, u.Interface)
		legs = append(legs, LegName(i))
	}
	slices.Sort(legs)
	uplinks = slices.Compact(slices.Sorted(slices.Values(uplinks)))
	return Table{Name: TableName, Chains: []Chain{
		{Name: "intercept", Type: "filter", Hook: "prerouting", Priority: priorityMangle, Rules: interceptRules(lan)},
		{Name: "translate", Type: "nat", Hook: "prerouting", Priority: priorityDestinationNAT, Rules: slices.Concat(
			dnsRules(lan, s, t, best), forwardRules(s.Forwards),
		)},
		{Name: "input", Type: "filter", Hook: "input", Priority: priorityFilter, Rules: append(
			inputRules(TunnelName, netip.Addr{}, netip.Addr{}), legInputRules(legs)...,
		)},
		{Name: "class", Type: "filter", Hook: "forward", Priority: priorityMangle, Rules: classRules(lan, s.Classes)},
		{Name: "forward", Type: "filter", Hook: "forward", Priority: priorityFilter, Rules: slices.Concat(
			legPassRules(legs), passRules(lan, uplinks, s.WhenTunnelDown), segmentRules(TunnelName),
		)},
		{Name: "masquerade", Type: "nat", Hook: "postrouting", Priority: prioritySourceNAT, Rules: [][]Statement{
			{MatchMark{masqueradeMark, MarkMask}, Masquerade{}},
		}},
	}}.sealed()
}

// interceptRules lead the clients' TCP connections to the listener on loopback.
// The mark does that. It is set before tproxy looks for the listener: when there
// is none, the packet still goes no further than here instead of passing by.
func interceptRules(lan []string) [][]Statement {
	rules := [][]Statement{
		{MatchInput{Interfaces: lan, Not: true}, Return},
		{MatchProtocol{Number: protocolTCP, Not: true}, Return},
	}
	for _, kind := range []string{"local", "broadcast", "anycast", "multicast"} {
		rules = append(rules, []Statement{MatchAddressType{kind}, Return})
	}
	rules = append(rules, []Statement{MatchRoute{lan}, Return}) // from LAN to LAN
	for _, onLink := range []string{"127.0.0.0/8", "169.254.0.0/16", "fe80::/10"} {
		rules = append(rules, []Statement{MatchDestination{netip.MustParsePrefix(onLink)}, Return})
	}
	for _, listener := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		rules = append(rules, []Statement{
			MatchFamily{listener.Is6()}, MatchProtocol{Number: protocolTCP},
			SetMark{Mark, MarkMask}, TransparentProxy{netip.AddrPortFrom(listener, InterceptPort)}, Accept,
		})
	}
	return rules
}

// dnsRules lead what clients ask the router itself to a resolver: behind the
// tunnel, or while that is down to one that the best uplink offers.
func dnsRules(lan []string, s settings.Settings, t Tunnel, best bestUplinks) (rules [][]Statement) {
	if !s.LAN.DNS {
		return nil
	}
	for _, ipv6 := range []bool{false, true} {
		resolver := t.resolver(ipv6)
		if !t.carries() && s.WhenTunnelDown == settings.Direct {
			resolver = best.resolver(s, ipv6)
		}
		if !resolver.IsValid() {
			continue
		}
		for _, protocol := range []uint8{protocolUDP, protocolTCP} {
			rules = append(rules, []Statement{
				MatchInput{Interfaces: lan}, MatchFamily{ipv6}, MatchProtocol{Number: protocol}, MatchPort{First: dnsPort, Last: dnsPort},
				MatchAddressType{"local"}, TranslateDestination{netip.AddrPortFrom(resolver, dnsPort)},
			})
		}
	}
	return rules
}

// forwardRules lead UDP that the concentrator sent to a forwarded port on to the
// host in the LAN. TCP arrives as a flow of the tunnel instead.
func forwardRules(forwards []settings.Forward) (rules [][]Statement) {
	for _, f := range forwards {
		if f.Protocol != settings.ProtocolUDP {
			continue
		}
		rule := []Statement{
			MatchInput{Interfaces: []string{TunnelName}}, MatchFamily{f.To.Addr().Is6()},
			MatchProtocol{Number: protocolUDP}, MatchPort{First: f.Port, Last: f.Port}, MatchAddressType{"local"},
		}
		if f.Source == settings.SourceRouter {
			rule = append(rule, SetMark{masqueradeMark, MarkMask})
		}
		rules = append(rules, append(rule, TranslateDestination{f.To}))
	}
	return rules
}

// classRules write the operator's class of a LAN address into the packet: where
// it is classified, behind the masquerade, the address is gone. The first rule
// that matches wins.
func classRules(lan []string, classes []settings.ClassRule) (rules [][]Statement) {
	into := []Statement{MatchInput{Interfaces: lan}, MatchOutput{Interfaces: []string{TunnelName}}}
	for _, c := range classes {
		if !c.Address.IsValid() {
			continue
		}
		ipv6 := c.Address.Addr().Is6()
		condition := append(slices.Clone(into), MatchSource{Prefix: c.Address.Masked()})
		if c.DSCP != nil {
			condition = append(condition, MatchDSCP{ipv6, uint8(*c.DSCP)})
		}
		codepoint := uint8(dscpLowerEffort)
		if c.Class == settings.ClassInteractive {
			codepoint = dscpExpedited
		}
		var protocols []uint8
		switch {
		case c.Protocol == settings.ProtocolICMP && ipv6:
			protocols = []uint8{protocolICMPv6}
		case c.Protocol == settings.ProtocolICMP:
			protocols = []uint8{protocolICMP}
		case c.Protocol == settings.ProtocolTCP:
			protocols = []uint8{protocolTCP}
		case c.Protocol == settings.ProtocolUDP:
			protocols = []uint8{protocolUDP}
		case !c.Ports.IsZero():
			protocols = []uint8{protocolTCP, protocolUDP}
		default:
			rules = append(rules, append(condition, SetDSCP{ipv6, codepoint}, Accept))
		}
		for _, protocol := range protocols {
			of := append(slices.Clone(condition), MatchProtocol{Number: protocol})
			if c.Ports.IsZero() {
				rules = append(rules, append(of, SetDSCP{ipv6, codepoint}, Accept))
				continue
			}
			for _, source := range []bool{false, true} {
				rules = append(rules, append(slices.Clone(of), MatchPort{source, c.Ports.First, c.Ports.Last}, SetDSCP{ipv6, codepoint}, Accept))
			}
		}
	}
	return rules
}

// passRules say what may go from where to where, and mark what has to be
// masqueraded. The tunnel is no way into the uplinks' networks, and an uplink
// none into the LAN or another uplink: with forwarding on, nothing else would
// stop their hosts. What somebody translates, who forwards a port of an uplink
// for example, is left alone.
func passRules(lan, uplinks []string, whenDown settings.Fallback) [][]Statement {
	tunnel := []string{TunnelName}
	outside := slices.Concat(tunnel, uplinks)
	unasked := []Statement{MatchConnection{NewlyOpened}, MatchTranslated{Not: true}, Drop}
	rules := [][]Statement{
		{MatchInput{Interfaces: tunnel}, MatchOutput{Interfaces: lan, Not: true}, Drop},
		{MatchOutput{Interfaces: tunnel}, MatchInput{Interfaces: lan, Not: true}, Drop},
		// Neither is translated: it would leave with addresses of the LAN.
		{MatchInput{Interfaces: tunnel}, MatchConnection{Invalid}, Drop},
		{MatchInput{Interfaces: lan}, MatchOutput{Interfaces: outside}, MatchConnection{Invalid}, Drop},
		append([]Statement{MatchInput{Interfaces: outside}}, unasked...),
	}
	if whenDown == settings.Block {
		rules = append(rules, []Statement{
			MatchInput{Interfaces: lan}, MatchOutput{Interfaces: slices.Concat(lan, tunnel), Not: true}, Drop,
		})
	}
	return append(rules, []Statement{
		MatchInput{Interfaces: lan}, MatchOutput{Interfaces: outside}, SetMark{masqueradeMark, MarkMask},
	})
}

// inputRules say what this machine itself takes out of a TUN: answers, queries
// for names to the addresses given, and what it takes to find faults.
func inputRules(tunnel string, names4, names6 netip.Addr) [][]Statement {
	from := MatchInput{Interfaces: []string{tunnel}}
	rules := [][]Statement{{from, MatchConnection{Established | Related}, Accept}}
	for _, names := range []netip.Addr{names4, names6} {
		for _, protocol := range []uint8{protocolUDP, protocolTCP} {
			if names.IsValid() {
				rules = append(rules, []Statement{
					from, MatchDestination{single(names)}, MatchProtocol{Number: protocol}, MatchPort{First: dnsPort, Last: dnsPort}, Accept,
				})
			}
		}
	}
	// Echo, and the errors of RFC 792 and RFC 4443.
	for _, kind := range []uint8{8, 3, 11, 12} {
		rules = append(rules, []Statement{from, MatchFamily{false}, MatchProtocol{Number: protocolICMP}, MatchICMP{false, kind}, Accept})
	}
	for _, kind := range []uint8{128, 1, 2, 3, 4} {
		rules = append(rules, []Statement{from, MatchFamily{true}, MatchProtocol{Number: protocolICMPv6}, MatchICMP{true, kind}, Accept})
	}
	return append(rules, []Statement{from, Drop})
}

// legInputRules and legPassRules make legs the way of our own subflows and nothing
// else. They name those of all uplinks, so that the table stays when legs come and go.
func legInputRules(legs []string) [][]Statement {
	if len(legs) == 0 {
		return nil
	}
	from := MatchInput{Interfaces: legs}
	return [][]Statement{{from, MatchConnection{Established | Related}, Accept}, {from, Drop}}
}

func legPassRules(legs []string) [][]Statement {
	if len(legs) == 0 {
		return nil
	}
	return [][]Statement{{MatchInput{Interfaces: legs}, Drop}, {MatchOutput{Interfaces: legs}, Drop}}
}

// segmentRules keep TCP that is forwarded through a TUN below its MTU. Into it
// the routes say how much; out of it they know only the way on, so the MTU of
// the TUN is said outright, less the headers without options.
func segmentRules(tunnel string) [][]Statement {
	const headers4, headers6 = 20 + 20, 40 + 20
	out := []Statement{MatchInput{Interfaces: []string{tunnel}}}
	return [][]Statement{
		{MatchOutput{Interfaces: []string{tunnel}}, MatchProtocol{Number: protocolTCP}, MatchSYN{}, SetMSS{}},
		append(slices.Clone(out), MatchFamily{false}, MatchProtocol{Number: protocolTCP}, MatchSYN{}, SetMSS{TunnelMTU - headers4}),
		append(slices.Clone(out), MatchFamily{true}, MatchProtocol{Number: protocolTCP}, MatchSYN{}, SetMSS{TunnelMTU - headers6}),
	}
}

// bestUplinks are the fit uplinks that may carry LAN traffic without the tunnel,
// best first.
type bestUplinks []uplink.Status

// ranked orders the fit uplinks that are not off: backups last, and else by the
// ranking, then in the settings' order.
func ranked(s settings.Settings, statuses []uplink.Status, ranking []string) bestUplinks {
	var fit bestUplinks
	demerits := map[string]int{}
	for _, u := range s.Uplinks {
		status, ok := find(statuses, u)
		if !ok || !status.Fit || u.Mode == settings.Off {
			continue
		}
		place := slices.Index(ranking, u.Name)
		if place < 0 {
			place = len(ranking)
		}
		if u.Mode == settings.Backup {
			place += len(ranking) + 1
		}
		demerits[u.Name] = place
		fit = append(fit, status)
	}
	slices.SortStableFunc(fit, func(a, b uplink.Status) int { return cmp.Compare(demerits[a.Name], demerits[b.Name]) })
	return fit
}

// of returns the best uplink of a family, and the place of the family in it.
func (b bestUplinks) of(ipv6 bool) (status uplink.Status, place int, ok bool) {
	for _, status := range b {
		place := slices.IndexFunc(status.Sources, func(p netip.Prefix) bool { return p.Addr().Is6() == ipv6 })
		if place >= 0 {
			return status, place, true
		}
	}
	return uplink.Status{}, 0, false
}

// resolver is asked for names over the best uplink of a family, because the
// resolvers of others may answer only their own customers.
func (b bestUplinks) resolver(s settings.Settings, ipv6 bool) netip.Addr {
	status, place, ok := b.of(ipv6)
	if !ok {
		return netip.Addr{}
	}
	for _, u := range s.Uplinks {
		if u.Name != status.Name {
			continue
		}
		if i := slices.IndexFunc(u.Resolvers, func(a netip.Addr) bool { return a.Is6() == ipv6 }); i >= 0 {
			return u.Resolvers[i]
		}
	}
	if gateway := status.Gateways[place]; !ipv6 && !gateway.IsUnspecified() {
		return gateway
	}
	return netip.Addr{}
}
