package router

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/reconcile"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/bond"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

// chosen is a settings file of uplinks "name mode".
func chosen(t *testing.T, uplinks ...string) settings.Settings {
	t.Helper()
	s := settings.Default()
	for i, text := range uplinks {
		name, mode, _ := strings.Cut(text, " ")
		s.Uplinks = append(s.Uplinks, settings.Uplink{Name: name, Interface: fmt.Sprintf("wan%d", i+1),
			Mode: settings.Mode(mode), Address: settings.Address{Method: settings.Existing}})
	}
	return s
}

func fit(name string, number int) uplink.Status {
	return uplink.Status{Name: name, Interface: fmt.Sprintf("wan%d", number), Index: number, Fit: true,
		Sources:  []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.%d.0.2/24", number))},
		Gateways: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.%d.0.1", number))}}
}

func subflow(number int, rtt time.Duration) tunnel.Subflow {
	return tunnel.Subflow{Local: netip.MustParseAddrPort(fmt.Sprintf("10.%d.0.2:4000", number)), RTT: rtt}
}

func from(local string) tunnel.Subflow {
	return tunnel.Subflow{Local: netip.MustParseAddrPort(local)}
}

// shared are two uplinks that share an address.
func shared() []uplink.Status {
	a, b := fit("a", 1), fit("b", 1)
	a.Ports, b.Ports = uplink.Ports{First: 100, Last: 199}, uplink.Ports{First: 200, Last: 299}
	return []uplink.Status{a, b}
}

// legged is an uplink that strips MPTCP, and its leg.
func legged(name string, number int, up bool) uplink.Status {
	s := fit(name, number)
	s.Leg = uplink.Leg{Interface: "sheafleg1", Index: 9, Addresses: []netip.Addr{netip.MustParseAddr("10.84.0.2")}, Up: up, Reason: stripped}
	return s
}

func managed(s settings.Settings, p settings.PathManager) settings.Settings {
	s.Multipath.PathManager = p
	return s
}

func TestUplinkStates(t *testing.T) {
	absent := uplink.Status{Name: "b", Interface: "wan2", Reason: "interface wan2 does not exist"}
	cut := fit("b", 2)
	cut.Fit, cut.Reason = false, "wan2 has no carrier"
	up := func(subflows ...tunnel.Subflow) tunnel.Status {
		return tunnel.Status{Up: true, Sessions: 1, Subflows: subflows}
	}
	for _, c := range []struct {
		name     string
		settings settings.Settings
		statuses []uplink.Status
		pool     tunnel.Status
		want     string // states
		tunnel   string
	}{
		{"both carry", chosen(t, "a on", "b on"), []uplink.Status{fit("a", 1), fit("b", 2)},
			up(subflow(1, 0), subflow(2, 0)), "carrying carrying", "up"},
		{"never green without a subflow", chosen(t, "a on", "b on"), []uplink.Status{fit("a", 1), fit("b", 2)},
			up(subflow(1, 0)), "carrying unfit", "degraded"},
		{"gateways of one interface, by the source port", chosen(t, "a on", "b on"), shared(),
			up(from("10.1.0.2:100"), from("10.1.0.2:250")), "carrying carrying", "up"},
		{"and one of them without a subflow", chosen(t, "a on", "b on"), shared(), up(from("10.1.0.2:250")), "unfit carrying", "degraded"},
		{"one uplink is enough", managed(chosen(t, "a on", "b on"), settings.PathManagerNdiffports), []uplink.Status{fit("a", 1), fit("b", 2)},
			up(subflow(1, 0)), "carrying standby", "up"},
		{"another program decides", managed(chosen(t, "a on", "b on"), settings.PathManagerNetlink), []uplink.Status{fit("a", 1), fit("b", 2)},
			up(subflow(1, 0)), "carrying standby", "up"},
		{"every gateway", managed(chosen(t, "a on", "b on"), settings.PathManagerBinder), []uplink.Status{fit("a", 1), fit("b", 2)},
			up(subflow(1, 0)), "carrying unfit", "degraded"},
		{"off is off, whatever is there", chosen(t, "a on", "b off"), []uplink.Status{fit("a", 1), fit("b", 2)},
			up(subflow(1, 0), subflow(2, 0)), "carrying off", "up"},
		{"backup stands by", chosen(t, "a on", "b backup"), []uplink.Status{fit("a", 1), fit("b", 2)},
			up(subflow(1, 0), subflow(2, 0)), "carrying standby", "up"},
		{"backup carries when nothing else does", chosen(t, "a on", "b backup"),
			[]uplink.Status{{Name: "a", Interface: "wan1", Reason: "gone"}, fit("b", 2)}, up(subflow(2, 0)), "absent carrying", "degraded"},
		{"absent", chosen(t, "a on", "b on"), []uplink.Status{fit("a", 1), absent}, up(subflow(1, 0)), "carrying absent", "degraded"},
		{"no carrier", chosen(t, "a on", "b on"), []uplink.Status{fit("a", 1), cut}, up(subflow(1, 0)), "carrying unfit", "degraded"},
		{"tunnel down", chosen(t, "a on", "b backup"), []uplink.Status{fit("a", 1), fit("b", 2)},
			tunnel.Status{Reason: errors.New("refused")}, "unfit unfit", "down"},
		{"MPTCP stripped", chosen(t, "a on"), []uplink.Status{fit("a", 1)},
			tunnel.Status{Up: true, Plain: []string{"a"}, Subflows: []tunnel.Subflow{subflow(1, 0)}}, "carrying", "degraded"},
		{"MPTCP stripped, with a leg", chosen(t, "a on", "b on"), []uplink.Status{fit("a", 1), legged("b", 2, true)},
			up(subflow(1, 0), from("10.84.0.2:4000")), "carrying carrying", "up"},
		{"MPTCP stripped, without", chosen(t, "a on", "b on"), []uplink.Status{fit("a", 1), legged("b", 2, false)},
			up(subflow(1, 0)), "carrying unfit", "degraded"},
		{"one uplink at a time", managed(chosen(t, "a on", "b on"), settings.PathManagerDefault), []uplink.Status{fit("a", 1), fit("b", 2)}, up(subflow(1, 0)), "carrying standby", "up"},
	} {
		single := oneUplink(c.settings.Multipath, kernel.Upstream)
		uplinks := describeUplinks(c.settings, c.statuses, c.pool, nil, nil, single)
		var states []string
		for _, u := range uplinks {
			states = append(states, u.State)
			if u.State != "carrying" && u.Reason == "" {
				t.Errorf("%s: %s is %s without a reason", c.name, u.Name, u.State)
			}
		}
		if got := strings.Join(states, " "); got != c.want {
			t.Errorf("%s: uplinks %s, want %s", c.name, got, c.want)
		}
		if got := describeTunnel(c.settings, uplinks, c.pool, single); got.State != c.tunnel || got.State != "up" && got.Reason == "" {
			t.Errorf("%s: tunnel %s (%s), want %s", c.name, got.State, got.Reason, c.tunnel)
		}
	}
}

func TestLegIsShownWithItsReason(t *testing.T) {
	pool := tunnel.Status{Up: true, Subflows: []tunnel.Subflow{subflow(1, 0)}}
	for _, up := range []bool{true, false} {
		u := describeUplinks(chosen(t, "a on"), []uplink.Status{legged("a", 2, up)}, pool, nil, map[netip.Addr]float64{netip.MustParseAddr("10.84.0.2"): 0.5}, "")[0]
		want := map[bool]string{true: "udp"}[up]
		if u.Leg != want || u.LegReason != stripped || u.Address != "10.2.0.2" || (u.Loss != nil) != up || !up && u.Reason != stripped {
			t.Errorf("up %v: %+v", up, u)
		}
	}
}

// Sessions are dialled from a leg that is up, packets from the uplink itself.
func TestPathsOfLegs(t *testing.T) {
	set := chosen(t, "a on", "b backup", "c off")
	shared := legged("b", 2, true)
	shared.Ports = uplink.Ports{First: 100, Last: 199}
	statuses := []uplink.Status{legged("a", 1, false), shared, fit("c", 3)}
	show := func(list []tunnel.Path) string {
		var lines []string
		for _, p := range list {
			lines = append(lines, fmt.Sprint(p))
		}
		return strings.Join(lines, " ")
	}
	const a = "{a [10.1.0.2] [10.84.0.2] {0 0} false}"
	if got, want := show(paths(set, statuses)), a+" {b [10.2.0.2] [10.84.0.2] {100 199} true}"; got != want {
		t.Errorf("packets: %s, want %s", got, want)
	}
	if got, want := show(sessionPaths(set, statuses)), a+" {b [10.84.0.2] [10.2.0.2] {0 0} true}"; got != want {
		t.Errorf("sessions: %s, want %s", got, want)
	}
}

// TestKernelWithoutMPTCP: one uplink carries, the others stand by, and why is
// said, unless the operator wants it so.
func TestKernelWithoutMPTCP(t *testing.T) {
	const reason = "TCP flows use one uplink at a time: this kernel has no MPTCP"
	s := chosen(t, "a on", "b on")
	pool := tunnel.Status{Up: true, Sessions: 1, Subflows: []tunnel.Subflow{subflow(1, 0)}}
	describe := func() ([]webui.UplinkStatus, webui.TunnelStatus) {
		single := oneUplink(s.Multipath, kernel.NoMPTCP)
		uplinks := describeUplinks(s, []uplink.Status{fit("a", 1), fit("b", 2)}, pool, nil, nil, single)
		return uplinks, describeTunnel(s, uplinks, pool, single)
	}
	uplinks, tunnel := describe()
	if uplinks[0].State != "carrying" || uplinks[1].State != "standby" || uplinks[1].Reason != reason || tunnel.State != "degraded" || tunnel.Reason != reason {
		t.Errorf("%+v, %+v", uplinks, tunnel)
	}
	s.Multipath.Enabled = false
	if uplinks, tunnel := describe(); uplinks[1].State != "standby" || uplinks[1].Reason == reason || tunnel.State != "up" {
		t.Errorf("without wanting MPTCP: %+v, %+v", uplinks, tunnel)
	}
}

// TestMultipathAsTheKernelHasIt: of v0.9x no more is said than its sysctls tell.
func TestMultipathAsTheKernelHasIt(t *testing.T) {
	want := settings.Multipath{Enabled: true, PathManager: "fullmesh", Scheduler: "redundant", SYNRetries: 2}
	info := kernel.Info{MPTCP: kernel.OutOfTree, Schedulers: []string{"default"}, Sysctls: map[string]string{
		"mptcp_enabled": "2", "mptcp_path_manager": "fullmesh", "mptcp_scheduler": "default", "mptcp_checksum": "1", "mptcp_syn_retries": "3",
	}}
	m := describeMultipath(want, false, info, desired.State{})
	if m.Kernel != (webui.MultipathValues{Enabled: true, PathManager: "fullmesh", Scheduler: "default", Checksum: true, SYNRetries: 3}) {
		t.Errorf("%+v", m.Kernel)
	}
	for _, c := range []struct {
		wanted bool
		value  string
	}{{true, "0"}, {false, "1"}} {
		want.Enabled, info.Sysctls["mptcp_enabled"] = c.wanted, c.value
		if describeMultipath(want, false, info, desired.State{}).Kernel.Enabled {
			t.Errorf("%+v: our sockets have no MPTCP", c)
		}
	}
	if m := describeMultipath(want, false, kernel.Info{MPTCP: kernel.NoMPTCP}, desired.State{}); m.Kernel.Enabled || m.Kernel.PathManager != "default" {
		t.Errorf("none: %+v", m.Kernel)
	}
}

func TestUplinkFigures(t *testing.T) {
	rates := map[string][2]uint64{"a": {1000, 2000}}
	loss := map[netip.Addr]float64{netip.MustParseAddr("10.1.0.2"): 0.25}
	pool := tunnel.Status{Up: true, Subflows: []tunnel.Subflow{
		subflow(1, 30*time.Millisecond), subflow(1, 10*time.Millisecond), subflow(1, 20*time.Millisecond), subflow(2, time.Second)}}
	u := describeUplinks(chosen(t, "a on"), []uplink.Status{fit("a", 1)}, pool, rates, loss, "")[0]
	if u.Subflows != 3 || *u.RTTMs != 20 || *u.Loss != 0.25 || u.RxBps != 1000 || u.TxBps != 2000 ||
		u.Address != "10.1.0.2" || u.Gateway != "10.1.0.1" {
		t.Errorf("%+v, RTT %v, loss %v", u, *u.RTTMs, *u.Loss)
	}
}

func TestMeter(t *testing.T) {
	var m meter
	at := time.Unix(1_800_000_000, 0)
	status := fit("a", 1)
	source := netip.MustParseAddr("10.1.0.2")
	f := subflow(1, 0)
	measure := func(received, sent uint64, segments, again uint32) ([2]uint64, float64) {
		status.ReceivedBytes, status.SentBytes = received, sent
		f.Segments, f.Retransmitted = segments, again
		m.measure(at, []uplink.Status{status}, []tunnel.Subflow{f})
		at = at.Add(2 * time.Second)
		return m.rates["a"], m.loss[source]
	}
	for i, step := range []struct {
		received, sent  uint64
		segments, again uint32
		rates           [2]uint64
		loss            float64
	}{
		{5000, 700, 100, 0, [2]uint64{}, 0},             // the first look
		{6000, 800, 200, 10, [2]uint64{4000, 400}, 0.1}, // 1000 and 100 bytes in 2 s
		{6000, 800, 200, 10, [2]uint64{0, 0}, 0.1},      // idle: the loss known holds
		{10, 10, 300, 10, [2]uint64{0, 0}, 0},           // the interface was made anew
		{1010, 10, 50, 25, [2]uint64{4000, 0}, 0.5},     // another subflow on the same port
	} {
		rates, loss := measure(step.received, step.sent, step.segments, step.again)
		if rates != step.rates || loss != step.loss {
			t.Errorf("step %d: rates %v, loss %v; want %v, %v", i, rates, loss, step.rates, step.loss)
		}
	}
}

func TestPathsAndDirectSources(t *testing.T) {
	s := chosen(t, "a backup", "b on", "c off", "d on")
	unfit := fit("d", 4)
	unfit.Fit = false
	both := fit("b", 2)
	both.Sources = append(both.Sources, netip.MustParsePrefix("2001:db8:2::2/64"))
	ways := paths(s, []uplink.Status{fit("a", 1), both, fit("c", 3), unfit})
	if got := fmt.Sprint(ways); got != "[{a [10.1.0.2] [] {0 0} true} {b [10.2.0.2 2001:db8:2::2] [] {0 0} false}]" {
		t.Errorf("paths %s", got)
	}
	ways = append(ways, tunnel.Path{Name: "c", Sources: []netip.Addr{netip.MustParseAddr("10.3.0.2")}})
	for _, c := range []struct {
		ranking           []string
		destination, want string
	}{
		{nil, "192.0.2.1", "[10.2.0.2 10.3.0.2 10.1.0.2]"},
		{[]string{"c"}, "192.0.2.1", "[10.3.0.2 10.2.0.2 10.1.0.2]"},
		{[]string{"a", "c", "b"}, "192.0.2.1", "[10.3.0.2 10.2.0.2 10.1.0.2]"}, // a backup, however near
		{[]string{"c", "b"}, "2001:db8::1", "[2001:db8:2::2]"},
	} {
		if got := fmt.Sprint(directSources(ways, c.ranking, netip.MustParseAddr(c.destination))); got != c.want {
			t.Errorf("ranking %v: %s is reached from %s, want %s", c.ranking, c.destination, got, c.want)
		}
	}
}

func TestRank(t *testing.T) {
	ago := func(d time.Duration, rtt int) standing {
		return standing{time.Duration(rtt) * time.Millisecond, d}
	}
	for _, c := range []struct {
		name  string
		known map[string]standing
		want  string
	}{
		{"nothing is known", nil, "[]"},
		{"by round-trip time", map[string]standing{"a": ago(0, 40), "b": ago(0, 20), "c": ago(0, 30)}, "[b c a]"},
		{"all fell silent, one after the other", map[string]standing{"a": ago(2*time.Second, 20), "b": ago(0, 40)}, "[a b]"},
		{"one has not worked since a minute", map[string]standing{"a": ago(time.Minute, 1), "b": ago(0, 40)}, "[b a]"},
		{"equals keep an order", map[string]standing{"b": ago(0, 20), "a": ago(0, 20)}, "[a b]"},
	} {
		if got := fmt.Sprint(rank(c.known)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// What is lost with the concentrator, and comes back later than another uplink, has
// not failed by itself.
func TestStandingWhileTheTunnelIsDown(t *testing.T) {
	known := map[string]standing{}
	look := func(times int, alive bool, fit ...string) {
		stats := bond.Stats{Alive: alive}
		for _, name := range []string{"a", "b"} {
			if slices.Contains(fit, name) {
				stats.Links = append(stats.Links, bond.LinkStats{Name: name, MinRTT: map[string]time.Duration{"a": 20, "b": 40}[name], Fit: true})
			}
		}
		for range times {
			note(known, stats, superviseEvery)
		}
	}
	expect := func(when, want string) {
		t.Helper()
		if got := fmt.Sprint(rank(known)); got != want {
			t.Errorf("%s: %s, want %s", when, got, want)
		}
	}
	look(10, true, "a", "b")
	look(100, false)
	look(4, true, "b")
	look(1, false)
	expect("lost again while one was not back yet", "[a b]")
	look(30, true, "b")
	expect("one is not back", "[b a]")
	look(1, true, "a", "b")
	expect("it is back", "[a b]")
}

func TestProblems(t *testing.T) {
	s := webui.Status{
		Tunnel:  webui.TunnelStatus{State: "down", Reason: "refused"},
		Uplinks: []webui.UplinkStatus{{Name: "a", Mode: "on", State: "absent", Reason: "no wan1"}, {Name: "b", Mode: "off", State: "off"}},
		LAN:     webui.LANStatus{Interfaces: []webui.InterfaceStatus{{Name: "lan0"}}},
	}
	got := strings.Join(problems(s, reconcile.Pass{Err: errors.New("busy"), Problems: []string{"no scheduler x"}}), "; ")
	want := "refused; the kernel does not take all of the settings: busy; no scheduler x; LAN interface lan0 does not exist; a: no wan1"
	if got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
