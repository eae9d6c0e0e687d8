package kernel

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

func TestStale(t *testing.T) {
	to := func(protocol uint8, port uint16, to string) []desired.Statement {
		return []desired.Statement{
			desired.MatchProtocol{Number: protocol}, desired.MatchPort{First: port, Last: port},
			desired.TranslateDestination{To: netip.MustParseAddrPort(to)},
		}
	}
	g := guide{
		translations: translations(desired.Table{Chains: []desired.Chain{{Rules: [][]desired.Statement{
			to(unix.IPPROTO_UDP, 9000, "10.83.0.2:9000"), to(unix.IPPROTO_UDP, 9000, "[fd00::2]:9000"), to(unix.IPPROTO_TCP, 9001, "10.83.0.2:9001"),
		}}}}),
		own:    []netip.Addr{netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8::10"), netip.MustParseAddr("10.83.0.1")},
		tunnel: []netip.Prefix{netip.MustParsePrefix("10.83.0.1/16"), netip.MustParsePrefix("fd00::1/48")},
	}
	for _, c := range []struct {
		name, sent, goes string
		want             bool
	}{
		{"led where it is to go", "203.0.113.10:9000", "10.83.0.2:9000", false},
		{"began before the port was opened", "203.0.113.10:9000", "203.0.113.10:9000", true},
		{"of the other family", "[2001:db8::10]:9000", "[2001:db8::10]:9000", true},
		{"led to another router before", "203.0.113.10:9000", "10.83.0.3:9000", true},
		{"the port was closed", "203.0.113.10:9002", "10.83.0.2:9002", true},
		{"the port was closed, IPv6", "[2001:db8::10]:9002", "[fd00::2]:9002", true},
		{"out of the tunnel, and the port was closed", "10.83.0.1:9002", "192.168.77.2:9002", true},
		{"out of the tunnel to this machine", "10.83.0.1:53", "10.83.0.1:53", false},
		{"only a TCP port of this number is translated", "203.0.113.10:9001", "203.0.113.10:9001", false},
		{"to a service of the machine's own", "203.0.113.10:4443", "203.0.113.10:4443", false},
		{"translated by somebody else", "203.0.113.10:5000", "172.17.0.2:5000", false},
		{"to another machine's port of this number", "198.51.100.20:9000", "198.51.100.20:9000", false},
	} {
		if got := g.stale(netip.MustParseAddrPort(c.sent), netip.MustParseAddrPort(c.goes)); got != c.want {
			t.Errorf("%s: stale is %v", c.name, got)
		}
	}
}
