package uplink

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// address reads "10.1.0.2/24", with ! for unusable and ~ for temporary behind it.
func address(s string) Address {
	return Address{
		Prefix:    netip.MustParsePrefix(strings.TrimRight(s, "!~")),
		Unusable:  strings.Contains(s, "!"),
		Temporary: strings.Contains(s, "~"),
	}
}

// link is wan<index>, up and with a carrier, with addresses and "gateway@metric"s.
func link(index int, addresses, gateways string) Link {
	l := Link{Name: fmt.Sprintf("wan%d", index), Index: index, Up: true, Carrier: true}
	for _, a := range strings.Fields(addresses) {
		l.Addresses = append(l.Addresses, address(a))
	}
	for _, g := range strings.Fields(gateways) {
		gateway, metric, _ := strings.Cut(g, "@")
		d := Default{Gateway: netip.MustParseAddr(gateway)}
		fmt.Sscan(metric, &d.Metric)
		l.Defaults = append(l.Defaults, d)
	}
	return l
}

func show(s Status) string {
	if !s.Fit {
		return fmt.Sprintf("%s: %v via %v unfit: %s", s.Interface, s.Sources, s.Gateways, s.Reason)
	}
	return fmt.Sprintf("%s: %v via %v%s", s.Interface, s.Sources, s.Gateways, s.Reason)
}

func TestJudge(t *testing.T) {
	down := link(1, "10.1.0.2/24", "10.1.0.1")
	down.Up, down.Carrier = false, false
	unplugged := link(1, "10.1.0.2/24", "10.1.0.1")
	unplugged.Carrier = false

	for _, test := range []struct {
		name  string
		links []Link
		want  string
	}{
		{"absent", nil, "wan1: [] via [] unfit: interface wan1 does not exist"},
		{"down", []Link{down}, "wan1: [] via [] unfit: interface wan1 is down"},
		{"no carrier keeps its addresses", []Link{unplugged},
			"wan1: [10.1.0.2/24] via [10.1.0.1] unfit: wan1 has no carrier: nothing answers at the other end of the link"},
		{"no address", []Link{link(1, "", "10.1.0.1 fe80::1")}, "wan1: [] via [] unfit: wan1 has no usable address"},
		{"link-local addresses only", []Link{link(1, "169.254.3.4/16 fe80::2/64", "169.254.0.1 fe80::1")},
			"wan1: [] via [] unfit: wan1 has no usable address"},
		{"no default route", []Link{link(1, "10.1.0.2/24", "")},
			"wan1: [] via [] unfit: no default route on wan1 in the main table: its gateway is unknown"},
		{"IPv4 alone", []Link{link(1, "10.1.0.2/24 fe80::2/64", "10.1.0.1")}, "wan1: [10.1.0.2/24] via [10.1.0.1]"},
		{"IPv6 alone", []Link{link(1, "2001:db8::2/64", "fe80::1")}, "wan1: [2001:db8::2/64] via [fe80::1]"},
		{"both", []Link{link(1, "2001:db8::2/64 10.1.0.2/24", "fe80::1 10.1.0.1")},
			"wan1: [10.1.0.2/24 2001:db8::2/64] via [10.1.0.1 fe80::1]"},
		{"a family without a gateway does not count", []Link{link(1, "2001:db8::2/64 10.1.0.2/24", "10.1.0.1")},
			"wan1: [10.1.0.2/24] via [10.1.0.1]"},
		{"lowest metric", []Link{link(1, "10.1.0.2/24", "10.1.0.7@200 10.1.0.1@100 10.1.0.9@300")},
			"wan1: [10.1.0.2/24] via [10.1.0.1]"},
		{"point to point", []Link{link(1, "100.64.1.2/32", "0.0.0.0")}, "wan1: [100.64.1.2/32] via [0.0.0.0]"},
		{"a tunnel needs no default route", []Link{link(1, "10.99.0.2/30", "0.0.0.0@4294967295 ::@4294967295")}, "wan1: [10.99.0.2/30] via [0.0.0.0]"},
		{"one that it has counts", []Link{link(1, "10.99.0.2/24", "0.0.0.0@4294967295 10.99.0.9@100")}, "wan1: [10.99.0.2/24] via [10.99.0.9]"},
		{"the address in the gateway's network", []Link{link(1, "10.0.0.9/24 10.1.0.2/24", "10.1.0.1")},
			"wan1: [10.1.0.2/24] via [10.1.0.1]"},
		{"unusable addresses", []Link{link(1, "2001:db8::2/64! 2001:db8::3/64", "fe80::1")},
			"wan1: [2001:db8::3/64] via [fe80::1]"},
		{"only unusable addresses", []Link{link(1, "2001:db8::2/64!", "fe80::1")},
			"wan1: [] via [] unfit: wan1 has no usable address"},
		{"stable before temporary, global before unique local", []Link{link(1, "fd00::1/64 2001:db8::1/64~ 2001:db8::2/64", "fe80::1")},
			"wan1: [2001:db8::2/64] via [fe80::1]"},
		{"unique local when there is nothing else", []Link{link(1, "fd00::1/64", "fe80::1")}, "wan1: [fd00::1/64] via [fe80::1]"},
		{"the same address twice", []Link{link(1, "192.168.8.100/24", "192.168.8.1"), link(2, "192.168.8.100/24", "192.168.8.1")},
			"wan1: [192.168.8.100/24] via [192.168.8.1]\n" +
				"wan2: [] via [] unfit: wan2 has the address 192.168.8.100, which wan1 has too: give one of their networks another range"},
		{"the same address twice, IPv6 apart", []Link{link(1, "192.168.8.100/24", "192.168.8.1"), link(2, "192.168.8.100/24 2001:db8::2/64", "192.168.8.1 fe80::1")},
			"wan1: [192.168.8.100/24] via [192.168.8.1]\nwan2: [2001:db8::2/64] via [fe80::1]"},
		{"the same address twice, the first without a carrier", []Link{unplugged, link(2, "10.1.0.2/24", "10.1.0.1")},
			"wan1: [] via [] unfit: wan1 has no carrier: nothing answers at the other end of the link\nwan2: [10.1.0.2/24] via [10.1.0.1]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			wants := []Want{{Name: "dsl", Interface: "wan1"}}
			if len(test.links) > 1 {
				wants = append(wants, Want{Name: "lte", Interface: "wan2"})
			}
			// The kernel's order must not matter.
			for range 10 {
				var got []string
				for _, s := range Judge(Observation{test.links}, wants) {
					got = append(got, show(s))
				}
				if diff := cmp.Diff(test.want, strings.Join(got, "\n")); diff != "" {
					t.Fatalf("-want +got\n%s", diff)
				}
				for _, l := range test.links {
					rand.Shuffle(len(l.Addresses), func(i, j int) { l.Addresses[i], l.Addresses[j] = l.Addresses[j], l.Addresses[i] })
					rand.Shuffle(len(l.Defaults), func(i, j int) { l.Defaults[i], l.Defaults[j] = l.Defaults[j], l.Defaults[i] })
				}
			}
		})
	}
}

func TestNetworks(t *testing.T) {
	down := link(2, "192.168.9.1/24", "")
	down.Up, down.Carrier = false, false
	unplugged := link(2, "192.168.9.1/24", "")
	unplugged.Carrier = false

	for _, test := range []struct {
		name  string
		links []Link
		want  string
	}{
		{"none", nil, "[]"},
		{"both families, in order", []Link{link(1, "fd00:1::1/64 192.168.77.1/24", ""), link(2, "192.168.7.1/24", "")},
			"[192.168.7.0/24 192.168.77.0/24 fd00:1::/64]"},
		{"two addresses in one network", []Link{link(1, "192.168.77.1/24 192.168.77.9/24~", ""), link(2, "192.168.77.2/24", "")},
			"[192.168.77.0/24]"},
		{"no carrier, and an address that is being checked", []Link{unplugged, link(1, "fd00:1::1/64!", "")},
			"[192.168.9.0/24 fd00:1::/64]"},
		{"down", []Link{down}, "[]"},
		{"link-local", []Link{link(1, "169.254.3.4/16 fe80::2/64", "")}, "[]"},
		{"nobody, and everybody", []Link{link(1, "192.168.77.1/32 fd00:1::1/128 192.168.78.1/0", "")}, "[]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := fmt.Sprint(Networks(Observation{test.links})); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
		})
	}
}

func TestJudgeNamesAndCounters(t *testing.T) {
	l := link(7, "10.1.0.2/24", "10.1.0.1")
	l.ReceivedBytes, l.SentBytes = 3, 4
	got := Judge(Observation{[]Link{l}}, []Want{{Name: "lte", Interface: "wan9"}, {Name: "dsl", Interface: "wan7"}})
	want := []Status{
		{Name: "lte", Interface: "wan9", Reason: "interface wan9 does not exist"},
		{Name: "dsl", Interface: "wan7", Index: 7, Fit: true, ReceivedBytes: 3, SentBytes: 4,
			Sources: []netip.Prefix{netip.MustParsePrefix("10.1.0.2/24")}, Gateways: []netip.Addr{netip.MustParseAddr("10.1.0.1")}},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if got[0].Present() || !got[1].Present() {
		t.Error("Present is wrong")
	}
}

// TestJudgeGateways: several uplinks behind one interface.
func TestJudgeGateways(t *testing.T) {
	via := func(name, gateway, source string) Want {
		w := Want{Name: name, Interface: "wan1"}
		if gateway != "" {
			w.Gateway = netip.MustParseAddr(gateway)
		}
		if source != "" {
			w.Source = netip.MustParseAddr(source)
		}
		return w
	}
	two := link(1, "10.1.0.2/24 10.1.0.7/24~ 2001:db8::2/64", "10.1.0.1 fe80::1")
	for _, test := range []struct {
		name  string
		links []Link
		wants []Want
		want  string
	}{
		{"sources of their own", []Link{two}, []Want{via("a", "", ""), via("b", "10.1.0.3", "10.1.0.7")},
			"a: [10.1.0.2/24 2001:db8::2/64] via [10.1.0.1 fe80::1] {0 0}\nb: [10.1.0.7/24] via [10.1.0.3] {0 0}"},
		{"a shared source", []Link{two}, []Want{via("a", "", ""), via("b", "10.1.0.3", ""), via("c", "10.1.0.4", "10.1.0.7")},
			"a: [10.1.0.2/24 2001:db8::2/64] via [10.1.0.1 fe80::1] {16384 17407}\nb: [10.1.0.2/24] via [10.1.0.3] {17408 18431}\nc: [10.1.0.7/24] via [10.1.0.4] {0 0}"},
		{"IPv6, link-local", []Link{two}, []Want{via("a", "fe80::9", "")},
			"a: [2001:db8::2/64] via [fe80::9] {0 0}"},
		{"no default route is needed", []Link{link(1, "10.1.0.2/24", "")}, []Want{via("a", "10.1.0.3", "")},
			"a: [10.1.0.2/24] via [10.1.0.3] {0 0}"},
		{"the gateway of another", []Link{two}, []Want{via("a", "10.1.0.1", ""), via("b", "", "")},
			"a: [10.1.0.2/24] via [10.1.0.1] {0 0}\nb: [2001:db8::2/64] via [fe80::1] {0 0}"},
		{"the gateway of another, and nothing else", []Link{link(1, "10.1.0.2/24", "10.1.0.1")}, []Want{via("a", "10.1.0.1", ""), via("b", "", "")},
			"a: [10.1.0.2/24] via [10.1.0.1] {0 0}\nb: unfit: b goes through the gateway 10.1.0.1 of wan1, as a does"},
		{"a gateway elsewhere", []Link{two}, []Want{via("a", "10.9.0.1", "")},
			"a: unfit: no address of wan1 is in the network of the gateway 10.9.0.1: give the source address as well"},
		{"a gateway elsewhere with its source", []Link{two}, []Want{via("a", "10.9.0.1", "10.1.0.2")},
			"a: [10.1.0.2/24] via [10.9.0.1] {0 0}"},
		{"a source that is not there", []Link{two}, []Want{via("a", "10.1.0.3", "10.1.0.8")},
			"a: unfit: wan1 does not have the address 10.1.0.8, or cannot use it"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			for _, s := range Judge(Observation{test.links}, test.wants) {
				if !s.Fit {
					got = append(got, s.Name+": unfit: "+s.Reason)
					continue
				}
				got = append(got, fmt.Sprintf("%s: %v via %v %v", s.Name, s.Sources, s.Gateways, s.Ports))
			}
			if diff := cmp.Diff(test.want, strings.Join(got, "\n")); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// TestOf: what leaves from a shared address is told apart by its port.
func TestOf(t *testing.T) {
	of := func(address string, fit bool, ports Ports) Status {
		return Status{Sources: []netip.Prefix{netip.MustParsePrefix(address + "/24")}, Fit: fit, Ports: ports}
	}
	statuses := []Status{
		of("10.1.0.2", false, Ports{100, 199}), of("10.1.0.2", true, Ports{200, 299}), of("10.2.0.2", true, Ports{}),
	}
	for local, want := range map[string]int{
		"10.1.0.2:100": 0, "10.1.0.2:299": 1, "10.1.0.2:300": 1, "10.2.0.2:100": 2, "10.3.0.2:100": -1,
	} {
		if got := Of(statuses, netip.MustParseAddrPort(local)); got != want {
			t.Errorf("%s: place %d, want %d", local, got, want)
		}
	}
}
