// Package egress is where the concentrator meets the Internet: it says what may
// be reached on a router's behalf, connects flows there, answers the routers' DNS
// queries and takes in connections for the hosts behind them.
//
//	flow       destination ─▶ Policy.Check ─▶ Dialer: limit ─▶ dial ─▶ connection
//	packet     destination ─▶ Checker ─▶ TUN
//	DNS query  inner address, port 53 ─▶ Resolver ─▶ the machine's resolvers
//	client ─▶ port ─▶ Forwards ─▶ open ─▶ router
package egress

import (
	"fmt"
	"net/netip"
)

// refused ranges are never dialled unless the operator allows them: what is
// behind them belongs to the concentrator's own network, or its cloud.
var refused = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this host (RFC 1122)"},
	{netip.MustParsePrefix("10.0.0.0/8"), "private (RFC 1918)"},
	{netip.MustParsePrefix("100.64.0.0/10"), "shared address space (RFC 6598)"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("168.63.129.16/32"), "cloud metadata (Azure)"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local, cloud metadata (RFC 3927)"},
	{netip.MustParsePrefix("172.16.0.0/12"), "private (RFC 1918)"},
	{netip.MustParsePrefix("192.0.0.0/24"), "protocol assignments, cloud metadata (RFC 6890)"},
	{netip.MustParsePrefix("192.168.0.0/16"), "private (RFC 1918)"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved, broadcast (RFC 1112)"},
	{netip.MustParsePrefix("::/127"), "unspecified, loopback"},
	{netip.MustParsePrefix("fc00::/7"), "unique local, cloud metadata (RFC 4193)"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("fec0::/10"), "site-local (RFC 3879)"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

// embedding prefixes carry an IPv4 address, to which the same rules apply.
var embedding = []struct {
	prefix netip.Prefix
	at     int // index of the IPv4 address's first byte
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12}, // NAT64 (RFC 6052)
	{netip.MustParsePrefix("2002::/16"), 2},     // 6to4 (RFC 3056)
	{netip.MustParsePrefix("::/96"), 12},        // IPv4-compatible (RFC 4291 section 2.5.5.1)
}

// suspect holds, for IPv4 and IPv6, the first bytes of the addresses that one of
// the prefixes above may contain, so that most packets need not be compared with
// each.
var suspect = func() (first [2][256]bool) {
	mark := func(p netip.Prefix) {
		family, from := 0, p.Addr().AsSlice()[0]
		if p.Addr().Is6() {
			family = 1
		}
		for b := int(from); b <= int(from|0xff>>min(p.Bits(), 8)); b++ {
			first[family][b] = true
		}
	}
	for _, r := range refused {
		mark(r.prefix)
	}
	for _, e := range embedding {
		mark(e.prefix)
	}
	return first
}()

// isSuspect is false for most addresses.
func isSuspect(a netip.Addr) bool {
	b := a.As16()
	if a.Is4() {
		return suspect[0][b[12]]
	}
	return suspect[1][b[0]]
}

// ForbiddenError says why a destination is refused.
type ForbiddenError struct {
	Destination netip.Addr
	What        string
}

func (e *ForbiddenError) Error() string {
	return fmt.Sprintf("destination %s is refused: %s; --allow-destination would permit it", e.Destination, e.What)
}

// Policy says which destinations may be dialled.
type Policy struct {
	// Allowed overrides every refusal.
	Allowed []netip.Prefix
}

// Check returns a *ForbiddenError for a destination that may not be dialled.
// own are the machine's own addresses.
func (p Policy) Check(destination netip.Addr, own map[netip.Addr]struct{}) error {
	destination = destination.Unmap().WithZone("")
	if what := p.refusal(destination, own); what != "" {
		return &ForbiddenError{destination, what}
	}
	return nil
}

// refusal says why a destination is refused, which is empty when it is not. It
// runs for every packet and does not allocate.
func (p Policy) refusal(destination netip.Addr, own map[netip.Addr]struct{}) string {
	for _, allowed := range p.Allowed {
		if allowed.Contains(destination) {
			return ""
		}
	}
	if _, is := own[destination]; is {
		return "an address of the concentrator itself"
	}
	if !isSuspect(destination) {
		return ""
	}
	for _, r := range refused {
		if r.prefix.Contains(destination) {
			return r.what
		}
	}
	for _, e := range embedding {
		if e.prefix.Contains(destination) {
			b := destination.As16()
			if what := p.refusal(netip.AddrFrom4([4]byte(b[e.at:e.at+4])), own); what != "" {
				return what
			}
		}
	}
	return ""
}
