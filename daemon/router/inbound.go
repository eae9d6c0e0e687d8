package router

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/bond"
	"sheaf/daemon/datapath/tunnel"
)

// inboundDial is how long a host of the LAN may take to answer.
const inboundDial = 5 * time.Second

// connect opens the last part of an inbound connection, to the LAN host of the
// TCP forward of a port.
func (r *Router) connect(ctx context.Context, port uint16, client netip.AddrPort) (*net.TCPConn, func(), tunnel.ResetReason, error) {
	list := r.current().Settings.Forwards
	i := slices.IndexFunc(list, func(f settings.Forward) bool { return f.Protocol == settings.ProtocolTCP && f.Port == port })
	if i < 0 {
		return nil, nil, tunnel.ResetForbidden, fmt.Errorf("port %d is not forwarded", port)
	}
	to := list[i].To
	dialer := net.Dialer{Timeout: inboundDial}
	dialer.SetMultipathTCP(false)
	if list[i].Source == settings.SourceClient && client.Addr().Is4() == to.Addr().Is4() {
		// The answers, to an address that is not ours, come back to the socket by
		// the intercept's rules.
		dialer.LocalAddr = net.TCPAddrFromAddrPort(client)
		dialer.Control = transparent
	}
	c, err := dialer.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, nil, tunnel.ResetRefused, err
	}
	return c.(*net.TCPConn), func() {}, 0, nil
}

// transparent lets a socket have an address that is not the machine's.
func transparent(network, _ string, c syscall.RawConn) error {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if network == "tcp6" {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	var set error
	err := c.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), level, option, 1) })
	if err == nil && set != nil {
		err = fmt.Errorf("IP_TRANSPARENT (needs CAP_NET_ADMIN): %w", set)
	}
	return err
}

// rules are the operator's classes for the bond. Those that name an address of
// the LAN act before the address is translated: nftables sets the code point.
func rules(list []settings.ClassRule) []bond.Rule {
	numbers := map[string][]uint8{
		"": {0}, settings.ProtocolTCP: {unix.IPPROTO_TCP}, settings.ProtocolUDP: {unix.IPPROTO_UDP},
		settings.ProtocolICMP: {unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6},
	}
	var all []bond.Rule
	for _, c := range list {
		if c.Address.IsValid() {
			continue
		}
		for _, protocol := range numbers[c.Protocol] {
			rule := bond.Rule{Class: bond.Bulk, Protocol: protocol, FirstPort: c.Ports.First, LastPort: c.Ports.Last, DSCP: -1}
			if c.Class == settings.ClassInteractive {
				rule.Class = bond.Interactive
			}
			if c.DSCP != nil {
				rule.DSCP = *c.DSCP
			}
			all = append(all, rule)
		}
	}
	return all
}
