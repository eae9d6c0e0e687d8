package desired

import "net/netip"

// Concentrator is what the concentrator knows of its packet path.
type Concentrator struct {
	Device             Interface    // the TUN; Index 0: there is none now
	Network4, Network6 netip.Prefix // of the inner addresses; Network6 may be invalid
	Gateway4, Gateway6 netip.Addr   // the concentrator's own inner addresses
	ConnectRouters     bool         // routers may reach one another
	Legs               ConcentratorLegs
	UDPForwards        []UDPForward
	// HadForwarding4 and HadForwarding6 say that the machine forwarded packets
	// before we made it do so: then what is not ours is none of our business.
	HadForwarding4, HadForwarding6 bool
}

// ConcentratorLegs are what the concentrator knows of the legs that end at it.
type ConcentratorLegs struct {
	Device Interface // their TUN; Index 0: there is none now
	// Gateway4 and Gateway6 are its own addresses, with the network of all of a leg.
	Gateway4, Gateway6 netip.Prefix
	// Listeners are where routers' sessions are accepted: all that a leg leads to.
	Listeners []netip.AddrPort
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
//
// and of a subflow's packet from a leg, which goes nowhere but to the listener:
//
//	TUN of legs ─▶ prerouting (to the address that a cloud's NAT would put in) ─▶ input
func CompileConcentrator(c Concentrator) State {
	tunnel := []string{ConcentratorTunnelName}
	own := []string{ConcentratorTunnelName, ConcentratorLegName, loopback.Name}
	guard, translate, forward, input := c.Legs.rules()
	var masquerade [][]Statement

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
		{Name: "input", Type: "filter", Hook: "input", Priority: priorityFilter, Rules: append(input, inputRules(ConcentratorTunnelName, c.Gateway4, c.Gateway6)...)},
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
	if c.Legs.Device.Index != 0 {
		state.Legs = []Device{{Interface: c.Legs.Device, MTU: LegMTU, Up: true, Addresses: []netip.Prefix{c.Legs.Gateway4, c.Legs.Gateway6}}}
	}
	return state
}

// rules keep legs to the listeners, and everybody else from their addresses. Behind
// the NAT of a cloud routers dial an address that the machine does not have: what
// goes there is led to the listener. What is local stays as it is, so that all
// subflows of a session meet at one address.
func (l ConcentratorLegs) rules() (guard, translate, forward, input [][]Statement) {
	legs := []string{ConcentratorLegName}
	from := MatchInput{Interfaces: legs}
	if l.Gateway4.IsValid() {
		guard = [][]Statement{{MatchInput{Interfaces: append(legs, loopback.Name), Not: true}, MatchSource{Prefix: l.Gateway4.Masked()}, Drop}}
	}
	translate = [][]Statement{{from, MatchAddressType{"local"}, Return}}
	forward = [][]Statement{{from, Drop}, {MatchOutput{Interfaces: legs}, Drop}}
	for _, listener := range l.Listeners {
		address, port := listener.Addr(), MatchPort{First: listener.Port(), Last: listener.Port()}
		tcp := MatchProtocol{Number: protocolTCP}
		for _, gateway := range []netip.Addr{l.Gateway4.Addr(), l.Gateway6.Addr()} {
			to := address
			if to.IsUnspecified() && (to.Is6() || gateway.Is4()) {
				to = gateway
			}
			if gateway.IsValid() && to.Is6() == gateway.Is6() {
				translate = append(translate, []Statement{from, MatchFamily{to.Is6()}, tcp, port, TranslateDestination{netip.AddrPortFrom(to, listener.Port())}})
			}
		}
		if address.IsUnspecified() {
			input = append(input, []Statement{from, tcp, port, Accept})
		} else {
			input = append(input, []Statement{from, MatchDestination{single(address)}, tcp, port, Accept})
		}
	}
	return guard, translate, forward, append(input, []Statement{from, Drop})
}
