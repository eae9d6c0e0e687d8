package netlab

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/mdlayher/genetlink"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Network reads what a daemon could leave behind in the Host, as sorted lines
// of text to be compared before and after: links, addresses, rules, routes of
// all tables, nftables chains with their numbers of rules, MPTCP endpoints and
// limits. Counters and times are left out, so nothing changes by itself.
func (h *Host) Network() (string, error) {
	var lines []string
	err := h.Do(func() error {
		for _, read := range []func() ([]string, error){
			readLinks, readRules, readRoutes, readFilter, readMultipath,
		} {
			some, err := read()
			if err != nil {
				return fmt.Errorf("netlab: host %s: read %w", h.Name, err)
			}
			slices.Sort(some)
			lines = append(lines, some...)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return strings.Join(lines, "\n") + "\n", nil
}

// Difference lists the lines of Network that went, with a minus, and came.
func Difference(before, after string) string {
	count := map[string]int{}
	for line := range strings.Lines(before) {
		count[line]--
	}
	for line := range strings.Lines(after) {
		count[line]++
	}
	var b strings.Builder
	for _, line := range slices.Sorted(maps.Keys(count)) {
		if n := count[line]; n < 0 {
			b.WriteString("- " + line)
		} else if n > 0 {
			b.WriteString("+ " + line)
		}
	}
	return b.String()
}

func readLinks() ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("links: %w", err)
	}
	var lines []string
	for _, link := range links {
		a := link.Attrs()
		lines = append(lines, fmt.Sprintf("link %s type %s mtu %d %v", a.Name, link.Type(), a.MTU, a.Flags&^net.FlagRunning))
		addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("addresses of %s: %w", a.Name, err)
		}
		for _, address := range addresses {
			lines = append(lines, fmt.Sprintf("address %s dev %s scope %d", address.IPNet, a.Name, address.Scope))
		}
	}
	return lines, nil
}

func readRules() ([]string, error) {
	var lines []string
	for family, name := range families {
		rules, err := netlink.RuleList(family)
		if err != nil {
			return nil, fmt.Errorf("rules of %s: %w", name, err)
		}
		for _, r := range rules {
			var l sentence
			l.add("rule", name, r.Priority)
			l.option("not", r.Invert)
			l.option("from", prefix(r.Src))
			l.option("to", prefix(r.Dst))
			if r.Mark != 0 || r.Mask != nil {
				l.add("fwmark", fmt.Sprintf("%#x", r.Mark))
			}
			if r.Mask != nil {
				l.add(fmt.Sprintf("mask %#x", *r.Mask))
			}
			l.option("iif", r.IifName)
			l.option("oif", r.OifName)
			l.option("tos", r.Tos)
			l.option("ipproto", r.IPProto)
			if r.Sport != nil {
				l.add(fmt.Sprintf("sport %d-%d", r.Sport.Start, r.Sport.End))
			}
			if r.Dport != nil {
				l.add(fmt.Sprintf("dport %d-%d", r.Dport.Start, r.Dport.End))
			}
			if r.UIDRange != nil {
				l.add(fmt.Sprintf("uidrange %d-%d", r.UIDRange.Start, r.UIDRange.End))
			}
			l.option("table", r.Table)
			if r.SuppressPrefixlen >= 0 {
				l.add("suppress_prefixlength", r.SuppressPrefixlen)
			}
			if r.Goto >= 0 {
				l.add("goto", r.Goto)
			}
			if r.Type != unix.RTN_UNICAST {
				l.add("type", int(r.Type))
			}
			l.option("protocol", int(r.Protocol))
			lines = append(lines, l.String())
		}
	}
	return lines, nil
}

func readRoutes() ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("links: %w", err)
	}
	names := map[int]string{}
	for _, link := range links {
		names[link.Attrs().Index] = link.Attrs().Name
	}
	var lines []string
	for family, name := range families {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("routes of %s: %w", name, err)
		}
		for _, r := range routes {
			var l sentence
			l.add("route", name, "table", r.Table)
			if r.Type != unix.RTN_UNICAST {
				l.add("type", r.Type)
			}
			if r.Dst == nil {
				l.add("default")
			} else {
				l.add(prefix(r.Dst))
			}
			if r.Gw != nil {
				l.add("via", r.Gw)
			}
			if r.Via != nil {
				l.add("via", r.Via)
			}
			l.option("dev", names[r.LinkIndex])
			for _, hop := range r.MultiPath {
				l.add("nexthop via", hop.Gw, "dev", names[hop.LinkIndex], "weight", hop.Hops+1)
			}
			if r.Src != nil {
				l.add("src", r.Src)
			}
			l.option("metric", r.Priority)
			l.option("protocol", int(r.Protocol))
			l.option("scope", int(r.Scope))
			l.option("mtu", r.MTU)
			l.option("advmss", r.AdvMSS)
			l.option("initcwnd", r.InitCwnd)
			l.option("initrwnd", r.InitRwnd)
			l.option("rto_min", r.RtoMin)
			l.option("congctl", r.Congctl)
			lines = append(lines, l.String())
		}
	}
	return lines, nil
}

func readFilter() ([]string, error) {
	connection, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	tables, err := connection.ListTables()
	if err != nil {
		return nil, fmt.Errorf("nftables: tables: %w", err)
	}
	var lines []string
	for _, t := range tables {
		lines = append(lines, fmt.Sprintf("nftables table %s %s", filterFamily(t.Family), t.Name))
	}
	chains, err := connection.ListChains()
	if err != nil {
		return nil, fmt.Errorf("nftables: chains: %w", err)
	}
	for _, c := range chains {
		rules, err := connection.GetRules(c.Table, c)
		if err != nil {
			return nil, fmt.Errorf("nftables: rules of chain %s in table %s: %w", c.Name, c.Table.Name, err)
		}
		lines = append(lines, fmt.Sprintf("nftables table %s %s chain %s rules %d",
			filterFamily(c.Table.Family), c.Table.Name, c.Name, len(rules)))
	}
	return lines, nil
}

func filterFamily(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyARP:
		return "arp"
	case nftables.TableFamilyNetdev:
		return "netdev"
	case nftables.TableFamilyBridge:
		return "bridge"
	}
	return strconv.Itoa(int(f))
}

// From include/uapi/linux/mptcp_pm.h.
const (
	mptcpFamily, mptcpVersion       = "mptcp_pm", 1
	mptcpGetAddress, mptcpGetLimits = 3, 6
	mptcpAddress                    = 1 // nested: family, id, IPv4, IPv6, port, flags, interface
	mptcpReceiveAddAddresses        = 2
	mptcpSubflows                   = 3

	mptcpAddressID, mptcpAddress4, mptcpAddress6  = 2, 3, 4
	mptcpAddressPort, mptcpAddressFlags, mptcpDev = 5, 6, 7
)

func readMultipath() ([]string, error) {
	connection, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("MPTCP: %w", err)
	}
	defer func() { _ = connection.Close() }()
	family, err := connection.GetFamily(mptcpFamily)
	if errors.Is(err, os.ErrNotExist) {
		return []string{"mptcp is not in this kernel"}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("MPTCP: %w", err)
	}
	request := func(command uint8, flags mdnetlink.HeaderFlags) ([]genetlink.Message, error) {
		return connection.Execute(genetlink.Message{Header: genetlink.Header{Command: command, Version: mptcpVersion}},
			family.ID, mdnetlink.Request|flags)
	}
	var lines []string
	limits, err := request(mptcpGetLimits, 0)
	if err != nil {
		return nil, fmt.Errorf("MPTCP limits: %w", err)
	}
	for _, m := range limits {
		d, err := mdnetlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return nil, fmt.Errorf("MPTCP limits: %w", err)
		}
		for d.Next() {
			switch d.Type() {
			case mptcpReceiveAddAddresses:
				lines = append(lines, fmt.Sprintf("mptcp limit add_addr_accepted %d", d.Uint32()))
			case mptcpSubflows:
				lines = append(lines, fmt.Sprintf("mptcp limit subflows %d", d.Uint32()))
			}
		}
		if err := d.Err(); err != nil {
			return nil, fmt.Errorf("MPTCP limits: %w", err)
		}
	}
	endpoints, err := request(mptcpGetAddress, mdnetlink.Dump)
	if err != nil {
		return nil, fmt.Errorf("MPTCP endpoints: %w", err)
	}
	for _, m := range endpoints {
		d, err := mdnetlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return nil, fmt.Errorf("MPTCP endpoints: %w", err)
		}
		for d.Next() {
			if d.Type() == mptcpAddress {
				d.Nested(func(d *mdnetlink.AttributeDecoder) error {
					lines = append(lines, endpoint(d))
					return d.Err()
				})
			}
		}
		if err := d.Err(); err != nil {
			return nil, fmt.Errorf("MPTCP endpoints: %w", err)
		}
	}
	return lines, nil
}

func endpoint(d *mdnetlink.AttributeDecoder) string {
	var address netip.Addr
	var id uint8
	var port uint16
	var flags, device uint32
	for d.Next() {
		switch d.Type() {
		case mptcpAddressID:
			id = d.Uint8()
		case mptcpAddress4, mptcpAddress6:
			address, _ = netip.AddrFromSlice(d.Bytes())
		case mptcpAddressPort:
			port = d.Uint16()
		case mptcpAddressFlags:
			flags = d.Uint32()
		case mptcpDev:
			device = d.Uint32()
		}
	}
	return fmt.Sprintf("mptcp endpoint %s id %d port %d flags %#x ifindex %d", address, id, port, flags, device)
}

var families = map[int]string{netlink.FAMILY_V4: "ipv4", netlink.FAMILY_V6: "ipv6"}

func prefix(n *net.IPNet) string {
	if n == nil {
		return ""
	}
	return n.String()
}

// A sentence is a line of text under construction.
type sentence struct{ words []string }

func (l *sentence) add(words ...any) {
	for _, w := range words {
		l.words = append(l.words, fmt.Sprint(w))
	}
}

// option adds a name and its value, if there is one.
func (l *sentence) option(name string, value any) {
	switch value {
	case "", 0, uint(0), false:
	case true:
		l.add(name)
	default:
		l.add(name, value)
	}
}

func (l *sentence) String() string { return strings.Join(l.words, " ") }
