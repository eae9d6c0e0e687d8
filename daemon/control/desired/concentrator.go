package desired

import "net/netip"

// Concentrator is what the concentrator knows of its packet path.
type Concentrator struct {
	Device             Interface    // the TUN; Index 0: there is none now
	Network4, Network6 netip.Prefix // of the inner addresses; Network6 may be invalid
	Gateway4, Gateway6 netip.Addr   // the concentrator's own inner addresses
	ConnectRouters     bool         // routers may reach one another
	UDPForwards        []UDPForward
	// HadForwarding4 and HadForwarding6 say that the machine forwarded packets
	// before we made it do so: then what is not ours is none of our business.
	HadForwarding4, HadForwarding6 bool
}

// UDPForward leads a UDP port of the concentrator to a router's inner address.
type UDPForward struct {
	Port uint16
	To   netip.AddrPort
}

// CompileConcentrator says what a concentrator's kernel should hold: the table,
// the TUN and the forwarding between them. Of MPTCP it wants nothing.
//
// The path of a packet from a router, through the table, and of the answer:
//
//	TUN ─▶ forward (not to another router) ─▶ masquerade ─▶ Internet
//	TUN ◀─ forward (asked for, or forwarded) ◀─ prerouting ◀─ Internet
func CompileConcentrator(c Concentrator) State {
	tunnel := []string{ConcentratorTunnelName}
	own := []string{ConcentratorTunnelName, loopback.Name}
	var guard, translate, forward, masquerade [][]Statement

	type family struct {
		ipv6          bool
		network       netip.Prefix
		gateway       netip.Addr
		hadForwarding bool
	}
	families := []family{{false, c.Network4, c.Gateway4, c.HadForwarding4}, {true, c.Network6, c.Gateway6, c.HadForwarding6}}

	for _, u := range c.UDPForwards {
		translate = append(translate, []Statement{
			MatchInput{Interfaces: tunnel, Not: true}, MatchFamily{u.To.Addr().Is6()},
			MatchProtocol{Number: protocolUDP}, MatchPort{First: u.Port, Last: u.Port},
			MatchAddressType{"local"}, TranslateDestination{u.To},
		})
	}

	if !c.ConnectRouters {
		forward = append(forward, []Statement{MatchInput{Interfaces: tunnel}, MatchOutput{Interfaces: tunnel}, Drop})
	}
	forward = append(forward,
		// It would not be translated, and leave with an inner address.
		[]Statement{MatchInput{Interfaces: tunnel}, MatchConnection{Invalid}, Drop},
		[]Statement{
			MatchInput{Interfaces: tunnel, Not: true}, MatchOutput{Interfaces: tunnel},
			MatchConnection{NewlyOpened | Invalid}, MatchTranslated{Not: true}, Drop,
		},
	)
	for _, f := range families {
		if f.network.IsValid() {
			guard = append(guard, []Statement{MatchInput{Interfaces: own, Not: true}, MatchSource{Prefix: f.network}, Drop})
			forward = append(forward, []Statement{MatchInput{Interfaces: tunnel}, MatchSource{Prefix: f.network, Not: true}, Drop})
			masquerade = append(masquerade, []Statement{MatchSource{Prefix: f.network}, MatchOutput{Interfaces: own, Not: true}, Masquerade{}})
		} else {
			forward = append(forward, []Statement{MatchInput{Interfaces: tunnel}, MatchFamily{f.ipv6}, Drop})
		}
		if !f.hadForwarding && f.network.IsValid() {
			forward = append(forward, []Statement{
				MatchFamily{f.ipv6}, MatchInput{Interfaces: tunnel, Not: true}, MatchOutput{Interfaces: tunnel, Not: true}, Drop,
			})
		}
	}

	state := State{Table: Table{Name: ConcentratorTableName, Chains: []Chain{
		{Name: "guard", Type: "filter", Hook: "prerouting", Priority: priorityRaw, Rules: guard},
		{Name: "translate", Type: "nat", Hook: "prerouting", Priority: priorityDestinationNAT, Rules: translate},
		{Name: "input", Type: "filter", Hook: "input", Priority: priorityFilter, Rules: inputRules(ConcentratorTunnelName, c.Gateway4, c.Gateway6)},
		{Name: "forward", Type: "filter", Hook: "forward", Priority: priorityFilter, Rules: append(forward, segmentRules(ConcentratorTunnelName)...)},
		{Name: "masquerade", Type: "nat", Hook: "postrouting", Priority: prioritySourceNAT, Rules: masquerade},
	}}.sealed()}
	state.Sysctls = map[string]Sysctl{Forwarding4: {Value: "1"}}
	if c.Network6.IsValid() {
		state.Sysctls[Forwarding6] = Sysctl{Value: "1"}
	}
	if c.Device.Index != 0 {
		state.Device = Device{Interface: c.Device, MTU: TunnelMTU, Up: true}
		for _, f := range families {
			if f.gateway.IsValid() && f.network.IsValid() {
				state.Device.Addresses = append(state.Device.Addresses, netip.PrefixFrom(f.gateway, f.network.Bits()))
			}
		}
		state.Sysctls[reversePath(c.Device.Name)] = Sysctl{Value: "2"}
	}
	return state
}
