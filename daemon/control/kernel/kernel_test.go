package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

var ctx = context.Background()

func open(t *testing.T) *Kernel {
	t.Helper()
	k, err := New()
	must(t, err)
	t.Cleanup(func() { k.Close() })
	if k.mptcp == nil {
		t.Fatal("these tests need a kernel with MPTCP")
	}
	return k
}

// router is a namespace with a LAN and two uplinks, the first of both families,
// and the settings for them.
func router(t *testing.T) settings.Settings {
	t.Helper()
	enter(t)
	addVeth(t, "lan0", "192.168.1.1/24", "fd00:1::1/64")
	addVeth(t, "wan1", "10.1.0.2/24", "2001:db8:1::2/64")
	addVeth(t, "wan2", "10.2.0.2/24")
	must(t, addDefault("wan1", "10.1.0.1", 100))
	must(t, addDefault("wan1", "fe80::1", 100))
	must(t, addDefault("wan2", "10.2.0.1", 200))
	s, err := settings.Parse([]byte(`
version: 1
lan: {interfaces: [lan0]}
uplinks:
  - {name: dsl, interface: wan1}
  - {name: lte, interface: wan2, mode: backup}
`))
	must(t, err)
	return s
}

// compile says what the kernel should hold, as the daemon does.
func compile(t *testing.T, s settings.Settings) desired.State {
	t.Helper()
	var wants []uplink.Want
	var names []string
	for _, u := range s.Uplinks {
		wants = append(wants, uplink.Want{Name: u.Name, Interface: u.Interface, Gateway: u.Address.Gateway, Source: u.Address.Source})
		names = append(names, u.Interface)
	}
	o, err := uplink.Observe(names)
	must(t, err)
	lan, err := uplink.Observe(s.LAN.Interfaces)
	must(t, err)
	statuses := uplink.Judge(o, wants)
	if l, err := netlink.LinkByName(desired.LegName(1)); err == nil {
		statuses[1].Leg = uplink.Leg{Interface: desired.LegName(1), Index: l.Attrs().Index, MTU: desired.LegMTU, Up: true,
			Addresses: []netip.Addr{netip.MustParseAddr("10.84.0.2"), netip.MustParseAddr("fd00:84::2")}}
	}
	return desired.Compile(s, statuses, uplink.Networks(lan), tunnel(t))
}

// tunnel is one that is up while there is a TUN.
func tunnel(t *testing.T) desired.Tunnel {
	t.Helper()
	l, err := netlink.LinkByName(desired.TunnelName)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return desired.Tunnel{}
	}
	must(t, err)
	return desired.Tunnel{
		Device: desired.Interface{Index: l.Attrs().Index, Name: desired.TunnelName}, Up: true,
		Address4: netip.MustParseAddr("10.83.0.2"), Gateway4: netip.MustParseAddr("10.83.0.1"),
		Address6: netip.MustParseAddr("fd83:0:0:1::1"), Gateway6: netip.MustParseAddr("fd83::1"),
	}
}

func read(t *testing.T, k *Kernel) desired.State {
	t.Helper()
	state, err := k.Read(ctx)
	must(t, err)
	return state
}

func apply(t *testing.T, k *Kernel, want desired.State) []desired.Change {
	t.Helper()
	changes := desired.Diff(read(t, k), want)
	must(t, k.Apply(ctx, changes))
	if left := desired.Diff(read(t, k), want); len(left) > 0 {
		t.Fatalf("after applying%s\nthere is left%s", text(changes), text(left))
	}
	return changes
}

// dumpNamespace is all that the namespace holds of what we could touch, ours or
// not, as others see it.
func dumpNamespace(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, command := range []string{
		"ip rule", "ip -6 rule", "ip -4 route show table all", "ip -6 route show table all", "ip mptcp endpoint", "ip mptcp limits",
	} {
		out, err := exec.Command("sh", "-c", command).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		// In order, and without what the kernel does by itself in its own time.
		lines := slices.DeleteFunc(slices.Sorted(strings.Lines(string(out))), func(l string) bool { return strings.Contains(l, "proto kernel") })
		fmt.Fprintf(&b, "# %s\n%s", command, strings.Join(lines, ""))
	}
	if l, err := netlink.LinkByName(desired.TunnelName); err == nil {
		fmt.Fprintf(&b, "# %s mtu %d flags %v\n", l.Attrs().Name, l.Attrs().MTU, l.Attrs().Flags)
		addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		must(t, err)
		for _, a := range addresses {
			fmt.Fprintf(&b, "%s\n", a.IPNet)
		}
	}
	conn, err := nftables.New()
	must(t, err)
	tables, err := conn.ListTables()
	must(t, err)
	for _, table := range tables {
		fmt.Fprintf(&b, "table %v %s\n", table.Family, table.Name)
	}
	for _, path := range desired.SysctlPaths([]string{"lan0", "wan1", "wan2", desired.TunnelName}) {
		if value, err := os.ReadFile("/proc/sys/net/" + path); err == nil {
			fmt.Fprintf(&b, "%s = %s", path, value)
		}
	}
	return b.String()
}

func TestApplyAndRead(t *testing.T) {
	s := router(t)
	newTUN(t, desired.TunnelName)
	newTUN(t, desired.LegName(1))
	k := open(t)
	want := compile(t, s)

	if have := read(t, k); len(have.Rules)+len(have.Routes)+len(have.Table.Name)+len(have.Device.Addresses)+len(have.MPTCP.Endpoints) > 0 {
		t.Fatalf("a fresh namespace holds %+v", have)
	}
	changes := apply(t, k, want)

	// What is read is what was wanted, field by field.
	have := read(t, k)
	same := []cmp.Option{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	}
	sorted := func(list []desired.Rule) []string {
		var lines []string
		for _, r := range list {
			lines = append(lines, desired.AddRule{Rule: r}.String())
		}
		slices.Sort(lines)
		return lines
	}
	sortedRoutes := func(list []desired.Route) []string {
		var lines []string
		for _, r := range list {
			lines = append(lines, fmt.Sprintf("%s %v", desired.AddRoute{Route: r}, r.Altered))
		}
		slices.Sort(lines)
		return lines
	}
	for _, diff := range []string{
		cmp.Diff(sorted(want.Rules), sorted(have.Rules)),
		cmp.Diff(sortedRoutes(want.Routes), sortedRoutes(have.Routes)),
		cmp.Diff(desired.Table{Name: want.Table.Name, Digest: want.Table.Digest}, have.Table),
		cmp.Diff(want.Device, have.Device, same...),
		cmp.Diff(want.Legs, have.Legs, same...),
		cmp.Diff(len(want.MPTCP.Endpoints), len(have.MPTCP.Endpoints)),
		cmp.Diff(want.MPTCP.Limits, have.MPTCP.Limits),
	} {
		if diff != "" {
			t.Errorf("-want +read\n%s", diff)
		}
	}
	for path, w := range want.Sysctls {
		if got := have.Sysctls[path].Value; got != w.Value && w.Instead == "" {
			t.Errorf("%s is %q, want %q", path, got, w.Value)
		}
	}
	if len(want.Rules) != 11 || len(want.Routes) != 14 || len(want.MPTCP.Endpoints) != 4 || len(want.Device.Addresses) != 2 || len(want.Legs) != 1 {
		t.Errorf("the router of this test is not what it should be: %+v", want)
	}

	// The same changes again, and none at all, leave everything as it is.
	before := dumpNamespace(t)
	must(t, k.Apply(ctx, nil))
	must(t, k.Apply(ctx, changes))
	if diff := cmp.Diff(before, dumpNamespace(t)); diff != "" {
		t.Errorf("applying twice changed\n%s", diff)
	}

	// A second process, after kill -9 of the first, finds what is there.
	if left := desired.Diff(read(t, open(t)), want); len(left) > 0 {
		t.Errorf("a new Kernel sees a difference:%s", text(left))
	}

	// Deleting twice is no failure either.
	deletions := desired.Diff(read(t, k), desired.State{})
	must(t, k.Apply(ctx, deletions))
	must(t, k.Apply(ctx, deletions))
}

// TestRepair: whatever something else does to what is ours is noticed and put
// right.
func TestRepair(t *testing.T) {
	s := router(t)
	newTUN(t, desired.TunnelName)
	k := open(t)
	want := compile(t, s)
	apply(t, k, want)
	whole := dumpNamespace(t)

	ip := func(arguments string) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			if out, err := exec.Command("ip", strings.Fields(arguments)...).CombinedOutput(); err != nil {
				t.Fatalf("ip %s: %v: %s", arguments, err, out)
			}
		}
	}
	ours := &nftables.Table{Name: desired.TableName, Family: nftables.TableFamilyINet}
	nft := func(f func(c *nftables.Conn, chain *nftables.Chain, rules []*nftables.Rule)) func(*testing.T) {
		return func(t *testing.T) {
			t.Helper()
			conn, err := nftables.New()
			must(t, err)
			chain, err := conn.ListChain(ours, "intercept")
			must(t, err)
			chain.Table = ours
			rules, err := conn.GetRules(ours, chain)
			must(t, err)
			f(conn, chain, rules)
			must(t, conn.Flush())
		}
	}
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	for _, test := range []struct {
		name   string
		damage func(*testing.T)
	}{
		{"rule deleted", ip("rule del from 10.1.0.2 priority 8303")},
		{"IPv6 rule deleted", ip("-6 rule del from 2001:db8:1::2 priority 8303")},
		{"mark rule deleted", ip("rule del fwmark 0x53000000/0xff000000 priority 8300")},
		{"rule of ours too many", ip("rule add from 10.9.9.9 lookup 8301 priority 8303 protocol 83")},
		{"rule of ours with more in it", ip("rule add from 10.1.0.2 oif wan1 lookup 8301 priority 8303 protocol 83")},
		{"rule of ours from a LAN interface too", ip("rule add from 10.1.0.2 iif lan0 lookup 8301 priority 8303 protocol 83")},
		{"rule of what comes from the LAN deleted", ip("rule del iif lan0 priority 8302")},
		{"IPv6 rule of what comes from the LAN deleted", ip("-6 rule del iif lan0 priority 8302")},
		{"rule of what comes from elsewhere", ip("rule add iif wan1 lookup 8363 priority 8302 protocol 83")},
		{"barrier deleted", ip("route del unreachable default table 8363 metric 2147483647")},
		{"IPv6 barrier deleted", ip("-6 route del unreachable default table 8363 metric 2147483647")},
		{"barrier made a blackhole", ip("route replace blackhole default table 8363 metric 2147483647 protocol 83")},
		{"way into the tunnel deleted", ip("route del default dev sheaf0 table 8363")},
		{"way out by an uplink instead", ip("route replace default via 10.1.0.1 dev wan1 table 8363 protocol 83")},
		{"IPv6 way out by an uplink instead", ip("-6 route replace default via fe80::1 dev wan1 table 8363 protocol 83 metric 1024")},
		{"TUN down", ip("link set sheaf0 down")},
		{"MTU of the TUN", ip("link set sheaf0 mtu 1500")},
		{"address of the TUN deleted", ip("address del 10.83.0.2/32 dev sheaf0")},
		{"IPv6 address of the TUN deleted", ip("address del fd83:0:0:1::1/128 dev sheaf0")},
		{"address of the TUN too many", ip("address add 10.99.0.1/24 dev sheaf0")},
		{"forwarding off in the LAN", func(t *testing.T) { must(t, writeSysctl("net/ipv4/conf/lan0/forwarding", "0")) }},
		{"forwarding of IPv6 off", func(t *testing.T) { must(t, writeSysctl("net/ipv6/conf/all/forwarding", "0")) }},
		{"strict reverse path filter on the TUN", func(t *testing.T) { must(t, writeSysctl("net/ipv4/conf/sheaf0/rp_filter", "1")) }},
		{"LAN rule deleted", ip("rule del to 192.168.1.0/24 priority 8301")},
		{"IPv6 LAN rule deleted", ip("-6 rule del to fd00:1::/64 priority 8301")},
		{"LAN rule too many", ip("rule add to 192.168.9.0/24 lookup main priority 8301 protocol 83")},
		{"LAN rule with a source", ip("rule add from 10.1.0.2 to 192.168.1.0/24 lookup main priority 8301 protocol 83")},
		{"LAN rule with more in it", ip("rule add to 192.168.1.0/24 oif wan1 lookup main priority 8301 protocol 83")},
		{"default route deleted", ip("route del default table 8301")},
		{"IPv6 default route deleted", ip("-6 route del default table 8301")},
		{"local route deleted", ip("route del local default table 8300")},
		{"another gateway", ip("route replace default via 10.1.0.77 dev wan1 table 8301 protocol 83")},
		{"another IPv6 gateway", ip("-6 route replace default via fe80::77 dev wan1 table 8301 protocol 83 metric 1024")},
		{"another interface", ip("route replace default via 10.2.0.1 dev wan2 table 8301 protocol 83")},
		{"an MTU", ip("route replace default via 10.1.0.1 dev wan1 table 8301 protocol 83 initcwnd 20 mtu 1200")},
		{"another initial window", ip("route replace default via 10.1.0.1 dev wan1 table 8301 protocol 83 initcwnd 40")},
		{"no initial window", ip("-6 route replace default via fe80::1 dev wan1 table 8301 protocol 83 metric 1024")},
		{"route of ours too many", ip("route add 203.0.113.0/24 dev wan1 table 8301 protocol 83")},
		{"route of ours of another type", ip("route add blackhole 203.0.113.0/24 table 8301 protocol 83")},
		{"route of ours in a table of nobody", ip("route add 203.0.113.0/24 dev wan1 table 8350 protocol 83")},
		{"multipath route of ours", ip("route replace default table 8301 protocol 83 nexthop via 10.1.0.1 dev wan1 nexthop via 10.2.0.1 dev wan2")},
		{"link bounced", func(t *testing.T) {
			ip("link set wan2 down")(t)
			ip("link set wan2 up")(t)
			must(t, addDefault("wan2", "10.2.0.1", 200))
		}},
		{"endpoint deleted", func(t *testing.T) { must(t, k.deleteEndpoint(netip.MustParseAddr("10.1.0.2"))) }},
		{"endpoints flushed", ip("mptcp endpoint flush")},
		{"endpoint made a backup", func(t *testing.T) {
			must(t, k.setEndpointFlags(desired.Endpoint{Address: netip.MustParseAddr("10.1.0.2"), Flags: desired.FlagBackup}))
		}},
		{"backup endpoint made fullmesh and no backup", ip(fmt.Sprintf("mptcp endpoint change id %d nobackup fullmesh", ids(netip.MustParseAddr("10.2.0.2"))[0]))},
		{"endpoint on another interface", func(t *testing.T) {
			a := netip.MustParseAddr("10.1.0.2")
			must(t, k.deleteEndpoint(a))
			ip(fmt.Sprintf("mptcp endpoint add %s dev wan2 id %d subflow", a, ids(a)[2]))(t)
		}},
		{"endpoint that signals", func(t *testing.T) {
			a := netip.MustParseAddr("10.1.0.2")
			must(t, k.deleteEndpoint(a))
			ip(fmt.Sprintf("mptcp endpoint add %s dev wan1 id %d signal", a, ids(a)[0]))(t)
		}},
		{"limits lowered", ip("mptcp limits set subflows 1 add_addr_accepted 0")},
		{"sysctl changed", func(t *testing.T) { must(t, writeSysctl("net/mptcp/enabled", "0")) }},
		{"table deleted", nft(func(c *nftables.Conn, chain *nftables.Chain, _ []*nftables.Rule) { c.DelTable(ours) })},
		{"chain flushed", nft(func(c *nftables.Conn, chain *nftables.Chain, _ []*nftables.Rule) { c.FlushChain(chain) })},
		{"chain deleted", nft(func(c *nftables.Conn, chain *nftables.Chain, _ []*nftables.Rule) {
			c.FlushChain(chain)
			c.DelChain(chain)
		})},
		{"rule of the table deleted", nft(func(c *nftables.Conn, _ *nftables.Chain, rules []*nftables.Rule) { c.DelRule(rules[3]) })},
		{"rule of the table replaced", nft(func(c *nftables.Conn, chain *nftables.Chain, rules []*nftables.Rule) {
			c.ReplaceRule(&nftables.Rule{Table: ours, Chain: chain, Handle: rules[3].Handle, Exprs: accept})
		})},
		{"rule inserted before ours", nft(func(c *nftables.Conn, chain *nftables.Chain, _ []*nftables.Rule) {
			c.InsertRule(&nftables.Rule{Table: ours, Chain: chain, Exprs: accept})
		})},
		{"policy drop", nft(func(c *nftables.Conn, chain *nftables.Chain, _ []*nftables.Rule) {
			*chain.Policy = nftables.ChainPolicyDrop
			c.AddChain(chain)
		})},
		{"chain added", nft(func(c *nftables.Conn, _ *nftables.Chain, _ []*nftables.Rule) {
			c.AddChain(&nftables.Chain{Table: ours, Name: "more"})
		})},
		{"table of an older version", nft(func(c *nftables.Conn, _ *nftables.Chain, _ []*nftables.Rule) {
			c.DelTable(ours)
			c.AddTable(ours)
			chain := c.AddChain(&nftables.Chain{
				Table: ours, Name: "prerouting", Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
			})
			c.AddRule(&nftables.Rule{Table: ours, Chain: chain, Exprs: accept, UserData: userdata.AppendString(nil, userdata.TypeComment, "sheaf 0123456789ab 1/1")})
		})},
		{"table without chains", nft(func(c *nftables.Conn, _ *nftables.Chain, _ []*nftables.Rule) {
			c.DelTable(ours)
			c.AddTable(ours)
		})},
		{"everything", func(t *testing.T) { must(t, k.Clean(ctx)) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			inNamespaceOf(t, k)
			test.damage(t)
			want := compile(t, s) // an interface may have been away meanwhile
			changes := desired.Diff(read(t, k), want)
			if len(changes) == 0 {
				t.Fatal("the damage was not noticed")
			}
			passes := 1
			if strings.HasSuffix(test.name, "with more in it") {
				// The kernel deletes the first rule that fits, and ours fits
				// too: it comes back in the second pass, behind the other,
				// which the third deletes.
				passes = 3
			}
			for range passes {
				must(t, k.Apply(ctx, desired.Diff(read(t, k), want)))
			}
			if left := desired.Diff(read(t, k), want); len(left) > 0 {
				t.Errorf("not repaired:%s", text(left))
			}
			if diff := cmp.Diff(whole, dumpNamespace(t)); diff != "" && test.name != "endpoint on another interface" {
				t.Errorf("not as it was:\n%s", diff)
			}
		})
	}
}

// inNamespaceOf brings a subtest, which has a thread of its own, to where the
// test is.
func inNamespaceOf(t *testing.T, k *Kernel) {
	t.Helper()
	lockThread(t)
	must(t, unix.Setns(int(k.namespace.Fd()), unix.CLONE_NEWNET))
}

// TestForeign: nothing that others put into the kernel is read, changed or
// deleted, however near it is to ours.
func TestForeign(t *testing.T) {
	s := router(t)
	k := open(t)
	for _, command := range []string{
		"rule add from 10.1.0.2 lookup 8301 priority 8303 protocol static",
		"rule add iif lan0 lookup 8363 priority 8302 protocol static",
		"route add unreachable default table 8363 metric 7 protocol static",
		"rule add from 10.8.8.8 lookup main priority 8302",
		"rule add to 192.168.1.0/24 lookup main priority 8301 protocol static",
		"rule add from 10.8.8.8 lookup 99 priority 100 protocol 83",
		"route add 203.0.113.0/24 dev wan1 table 8301 protocol static",
		"route add 203.0.113.0/24 dev wan1 table 7777 protocol 83",
		"-6 route add 2001:db8:9::/64 dev wan1 table 8301 protocol static",
		"mptcp endpoint add 10.7.0.1 id 3 signal",
	} {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", command, err, out)
		}
	}
	conn, err := nftables.New()
	must(t, err)
	for _, table := range []*nftables.Table{{Name: "sheaf", Family: nftables.TableFamilyIPv4}, {Name: "other", Family: nftables.TableFamilyINet}} {
		conn.AddTable(table)
		chain := conn.AddChain(&nftables.Chain{Table: table, Name: "prerouting", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Counter{}}})
	}
	must(t, conn.Flush())
	want := compile(t, s)
	// Shared, and not taken back.
	must(t, k.setLimits(desired.Limits{Subflows: 8}))
	for path, w := range want.Sysctls {
		must(t, k.setSysctl(path, w.Value))
	}
	before := dumpNamespace(t)

	apply(t, k, want)
	// The kernel numbers this one after ours, in our range.
	if out, err := exec.Command("ip", "mptcp", "endpoint", "add", "10.7.0.2", "subflow").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if left := desired.Diff(read(t, k), want); len(left) > 0 {
		t.Errorf("an endpoint of another program changed what we read:%s", text(left))
	}
	apply(t, k, want)
	must(t, k.Clean(ctx))
	after := dumpNamespace(t)
	lines := slices.DeleteFunc(strings.Split(after, "\n"), func(l string) bool { return strings.HasPrefix(l, "10.7.0.2 ") })
	if len(lines) != strings.Count(after, "\n") {
		t.Errorf("the endpoint of another program is gone:\n%s", after)
	}
	if diff := cmp.Diff(before, strings.Join(lines, "\n")); diff != "" {
		t.Errorf("-before +after\n%s", diff)
	}
}

// TestConflicts: what another program holds is named, and does not stop the rest.
func TestConflicts(t *testing.T) {
	s := router(t)
	k := open(t)
	for _, command := range []string{
		"mptcp endpoint add 10.1.0.2 id 3 signal",
		"route add default via 10.2.0.9 dev wan2 table 8302 protocol static",
	} {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", command, err, out)
		}
	}
	err := k.Apply(ctx, desired.Diff(read(t, k), compile(t, s)))
	want := `ip route add default via 10.2.0.1 dev wan2 table 8302 protocol 83 initcwnd 20: file exists: another program holds a route to the same destination in table 8302
ip mptcp endpoint add 10.1.0.2 dev wan1 subflow: another program holds the MPTCP endpoint 10.1.0.2 (id 3, signal): remove it there`
	if diff := cmp.Diff(want, fmt.Sprint(err)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	left := desired.Diff(read(t, k), compile(t, s))
	if len(left) != 2 {
		t.Errorf("left is%s", text(left))
	}
}

// TestRestore: an interface that is gone has nothing to be put back, and the others
// have theirs all the same.
func TestRestore(t *testing.T) {
	enter(t)
	k := open(t)
	const there = "ipv4/conf/lo/forwarding"
	must(t, writeSysctl("net/"+there, "0"))
	must(t, k.Restore(ctx, map[string]string{"ipv4/conf/gone/forwarding": "1", there: "1"}))
	if value, _, err := k.readSysctl(there); err != nil || value != "1" {
		t.Errorf("%s is %q, %v", there, value, err)
	}
}

// TestErrorsNameTheChange: the kernel's refusal comes with what was tried.
func TestErrorsNameTheChange(t *testing.T) {
	enter(t)
	k := open(t)
	err := k.Apply(ctx, []desired.Change{
		desired.AddRoute{Route: desired.Route{Table: 8301, Destination: netip.MustParsePrefix("10.5.0.0/24"), Interface: desired.Interface{Index: 999, Name: "wan9"}}},
		desired.SetSysctl{Path: "mptcp/scheduler", Value: "nosuch"},
		desired.SetSysctl{Path: "ipv4/conf/wan9/forwarding", Value: "1"},
		desired.AddAddress{Interface: desired.Interface{Index: 999, Name: "sheaf0"}, Address: netip.MustParsePrefix("10.83.0.2/32")},
		desired.ReplaceTable{Table: desired.Table{Name: "other"}},
		desired.DeleteTable{Name: "other"},
		desired.SetLimits{Limits: desired.Limits{Subflows: 100}},
		desired.AddRule{Rule: desired.Rule{Priority: 8301, Source: netip.MustParsePrefix("10.5.0.2/32"), Table: 8301}},
	})
	for i, want := range []string{
		"ip route add 10.5.0.0/24 dev wan9 table 8301 protocol 83: no such device",
		"sysctl net.mptcp.scheduler=nosuch: write /proc/sys/net/mptcp/scheduler: no such file or directory",
		"sysctl net.ipv4.conf.wan9.forwarding=1: openat conf/wan9/forwarding: no such file or directory",
		"ip address add 10.83.0.2/32 dev sheaf0: no such device",
		"nft replace table inet other (0 chains, 0 rules): this table is not ours: ours is sheaf",
		"nft delete table inet other: this table is not ours: ours is sheaf",
		"ip mptcp limits set subflows 100 add_addr_accepted 0: ",
	} {
		lines := strings.Split(fmt.Sprint(err), "\n")
		if len(lines) != 7 || !strings.HasPrefix(lines[i], want) {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
	if len(read(t, k).Rules) != 1 {
		t.Error("the change after the failures was not carried out")
	}

	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := k.Apply(cancelled, []desired.Change{desired.DeleteTable{Name: desired.TableName}}); err != context.Canceled && !strings.Contains(fmt.Sprint(err), "canceled") {
		t.Errorf("cancelled: %v", err)
	}
}

func TestInfo(t *testing.T) {
	enter(t)
	k := open(t)
	must(t, writeSysctl("net/mptcp/checksum_enabled", "1"))
	info, err := k.Info()
	must(t, err)
	if info.MPTCP != "upstream" || info.Sysctls["checksum_enabled"] != "1" || !slices.Contains(info.Schedulers, "default") ||
		!slices.Contains(info.PathManagers, "kernel") || info.Release == "" {
		t.Errorf("%+v", info)
	}
}

// TestOtherThreads: a Kernel means the namespace it was opened in, whichever
// thread calls it.
func TestOtherThreads(t *testing.T) {
	s := router(t)
	k := open(t)
	want := compile(t, s)
	want.MPTCP.Sysctls["checksum_enabled"] = "1"
	done := make(chan error)
	go func() {
		have, err := k.Read(ctx)
		if err == nil {
			err = k.Apply(ctx, desired.Diff(have, want))
		}
		done <- err
	}()
	must(t, <-done)
	if left := desired.Diff(read(t, k), want); len(left) > 0 {
		t.Errorf("left:%s", text(left))
	}
	value, err := os.ReadFile("/proc/sys/net/mptcp/checksum_enabled")
	if err != nil || strings.TrimSpace(string(value)) != "1" {
		t.Errorf("checksum_enabled here: %q, %v", value, err)
	}
	if value, err := os.ReadFile("/proc/sys/net/ipv4/conf/lan0/forwarding"); err != nil || strings.TrimSpace(string(value)) != "1" {
		t.Errorf("forwarding of lan0 here: %q, %v", value, err)
	}
	if tables, err := (&nftables.Conn{}).ListTables(); err != nil || len(tables) != 1 {
		t.Errorf("tables here: %v, %v", tables, err)
	}
}
