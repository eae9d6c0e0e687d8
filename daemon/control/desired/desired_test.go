package desired

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

var update = flag.Bool("update", false, "write the expected outputs anew")

// emptyKernel is a kernel like 6.18 that holds nothing of ours.
func emptyKernel() State {
	return State{MPTCP: &MPTCP{
		Limits: Limits{Subflows: 2},
		Sysctls: map[string]string{
			"enabled": "1", "checksum_enabled": "0", "syn_retrans_before_tcp_fallback": "2",
			"scheduler": "default", "available_schedulers": "default roundrobin", "pm_type": "0",
			"blackhole_timeout": "0",
		},
	}, Sysctls: emptySysctls()}
}

// outOfTreeKernel is a kernel with MPTCP v0.95 as it comes, on which the module
// mptcp_rr is not loaded.
func outOfTreeKernel() State {
	return State{OutOfTree: &OutOfTree{
		Sysctls: map[string]Sysctl{
			"mptcp_enabled": {Value: "1"}, "mptcp_version": {Value: "0"}, "mptcp_checksum": {Value: "1"}, "mptcp_syn_retries": {Value: "3"},
			"mptcp_debug": {Value: "0"}, "mptcp_path_manager": {Value: "fullmesh"}, "mptcp_scheduler": {Value: "default"},
		},
		Parameters: map[string]string{"mptcp_fullmesh/num_subflows": "1"},
		Links:      map[string]LinkFlags{"lo": 0, "lan0": 0, "wan1": 0, "wan2": LinkBackup, "docker0": 0, TunnelName: 0},
		Refused:    map[string]string{"mptcp_scheduler": "ecf"},
	}, Sysctls: emptySysctls()}
}

// emptySysctls are those of a host that was never a router, and filters reverse
// paths strictly.
func emptySysctls() map[string]Sysctl {
	values := map[string]Sysctl{}
	for _, path := range SysctlPaths([]string{"lo", "lan0", "wan1", "wan2", "eth.9", TunnelName, ConcentratorTunnelName}) {
		values[path] = Sysctl{Value: "0"}
		if strings.HasSuffix(path, "rp_filter") || strings.HasSuffix(path, "accept_ra") {
			values[path] = Sysctl{Value: "1"}
		}
	}
	return values
}

// parseStatus reads "dsl wan1#3 10.1.0.2/24>10.1.0.1 2001:db8::2/64>fe80::1 unfit",
// "sport=100-199" for ports of its own, and "leg=sheafleg0#12,1408,10.84.0.2,up".
func parseStatus(t *testing.T, line string) uplink.Status {
	t.Helper()
	words := strings.Fields(line)
	s := uplink.Status{Name: words[0], Fit: true}
	name, index, _ := strings.Cut(words[1], "#")
	s.Interface = name
	fmt.Sscan(index, &s.Index)
	for _, w := range words[2:] {
		if w == "unfit" {
			s.Fit = false
			continue
		}
		if ports, ok := strings.CutPrefix(w, "sport="); ok {
			fmt.Sscanf(ports, "%d-%d", &s.Ports.First, &s.Ports.Last)
			continue
		}
		if leg, ok := strings.CutPrefix(w, "leg="); ok {
			s.Leg = parseLeg(leg)
			continue
		}
		source, gateway, _ := strings.Cut(w, ">")
		s.Sources = append(s.Sources, netip.MustParsePrefix(source))
		s.Gateways = append(s.Gateways, netip.MustParseAddr(gateway))
	}
	return s
}

func parseLeg(text string) (leg uplink.Leg) {
	for i, w := range strings.Split(text, ",") {
		switch {
		case i == 0:
			name, index, _ := strings.Cut(w, "#")
			leg.Interface = name
			fmt.Sscan(index, &leg.Index)
		case i == 1:
			fmt.Sscan(w, &leg.MTU)
		case w == "up":
			leg.Up = true
		default:
			leg.Addresses = append(leg.Addresses, netip.MustParseAddr(w))
		}
	}
	return leg
}

// parseTunnel reads "sheaf0#9 up 10.83.0.2>10.83.0.1 fd00::2>fd00::1 lte dsl":
// the device, whether it is up, addresses with gateways, and the ranking; "flows"
// are open in it.
func parseTunnel(t *testing.T, line string) (tunnel Tunnel) {
	t.Helper()
	for _, w := range strings.Fields(line) {
		name, index, isDevice := strings.Cut(w, "#")
		address, gateway, isAddress := strings.Cut(w, ">")
		switch {
		case isDevice:
			tunnel.Device.Name = name
			fmt.Sscan(index, &tunnel.Device.Index)
		case w == "up":
			tunnel.Up = true
		case w == "flows":
			tunnel.Flows = true
		case isAddress && strings.Contains(address, ":"):
			tunnel.Address6, tunnel.Gateway6 = netip.MustParseAddr(address), netip.MustParseAddr(gateway)
		case isAddress:
			tunnel.Address4, tunnel.Gateway4 = netip.MustParseAddr(address), netip.MustParseAddr(gateway)
		default:
			tunnel.Ranking = append(tunnel.Ranking, w)
		}
	}
	return tunnel
}

// parseConcentrator reads "sheaf-c0#9 10.83.0.1/16 fd00::1/48 connect had4 had6
// 5060>10.83.0.2:5060 listen=[::]:4443", and
// "legs=sheaf-cleg0#10,10.84.0.1/16,fd00:0:0:ffff::1/64".
func parseConcentrator(t *testing.T, line string) (c Concentrator) {
	t.Helper()
	for _, w := range strings.Fields(line) {
		name, index, isDevice := strings.Cut(w, "#")
		port, to, isForward := strings.Cut(w, ">")
		switch {
		case strings.HasPrefix(w, "listen="):
			c.Legs.Listeners = append(c.Legs.Listeners, netip.MustParseAddrPort(strings.TrimPrefix(w, "listen=")))
		case strings.HasPrefix(w, "legs="):
			parts := strings.Split(strings.TrimPrefix(w, "legs="), ",")
			c.Legs.Device.Name, index, _ = strings.Cut(parts[0], "#")
			fmt.Sscan(index, &c.Legs.Device.Index)
			c.Legs.Gateway4, c.Legs.Gateway6 = netip.MustParsePrefix(parts[1]), netip.MustParsePrefix(parts[2])
		case isDevice:
			c.Device.Name = name
			fmt.Sscan(index, &c.Device.Index)
		case isForward:
			f := UDPForward{To: netip.MustParseAddrPort(to)}
			fmt.Sscan(port, &f.Port)
			c.UDPForwards = append(c.UDPForwards, f)
		case w == "connect":
			c.ConnectRouters = true
		case w == "had4":
			c.HadForwarding4 = true
		case w == "had6":
			c.HadForwarding6 = true
		default:
			p := netip.MustParsePrefix(w)
			if p.Addr().Is6() {
				c.Network6, c.Gateway6 = p.Masked(), p.Addr()
			} else {
				c.Network4, c.Gateway4 = p.Masked(), p.Addr()
			}
		}
	}
	return c
}

// appear makes the TUN of a kernel the one of this index, as the data path does:
// the routes and addresses of one that has gone go with it.
func (s State) appear(device Interface) State {
	s = s.After()
	if s.Device.Interface.Index == device.Index {
		return s
	}
	gone := s.Device.Interface.Index
	s.Routes = slices.DeleteFunc(s.Routes, func(r Route) bool { return gone != 0 && r.Interface.Index == gone })
	s.Device = Device{}
	if device.Index != 0 {
		s.Device = Device{Interface: device, MTU: 1500}
		s.Sysctls[forwarding4(device.Name)], s.Sysctls[reversePath(device.Name)] = Sysctl{Value: "0"}, Sysctl{Value: "1"}
	}
	return s
}

// appearLegs does the same for the TUN devices of legs.
func (s State) appearLegs(devices ...Interface) State {
	s = s.After()
	there := func(d Device) bool { return slices.Contains(devices, d.Interface) }
	for _, d := range s.Legs {
		if !there(d) {
			s.Routes = slices.DeleteFunc(s.Routes, func(r Route) bool { return r.Interface.Index == d.Interface.Index })
		}
	}
	s.Legs = slices.DeleteFunc(s.Legs, func(d Device) bool { return !there(d) })
	for _, i := range devices {
		if i.Index != 0 && !slices.ContainsFunc(s.Legs, func(d Device) bool { return d.Interface == i }) {
			s.Legs = append(s.Legs, Device{Interface: i, MTU: 1500})
		}
	}
	return s
}

// tableChange is what a replaced table has more and less than the one before,
// line by line, or all of it when it is new.
func tableChange(before, after Table) string {
	if before.Name == "" {
		return after.String()
	}
	old, now := strings.Split(before.String(), "\n"), strings.Split(after.String(), "\n")
	var b strings.Builder
	for _, line := range old {
		if !slices.Contains(now, line) {
			fmt.Fprintf(&b, "-%s\n", line)
		}
	}
	for _, line := range now {
		if !slices.Contains(old, line) {
			fmt.Fprintf(&b, "+%s\n", line)
		}
	}
	return b.String()
}

// TestStories plays every testdata/*.txt. A story changes settings, uplinks, the
// LAN and the tunnel section by section; every "changes" section holds what Diff
// then has to say, the kernel being as the story has left it. A "barrier" section
// says the same of a clean stop.
func TestStories(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.txt")
	if len(files) < 13 {
		t.Fatalf("stories: %v", files)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var (
				kernel   = emptyKernel()
				chosen   settings.Settings
				statuses []uplink.Status
				lan      []netip.Prefix
				tunnel   Tunnel
				middle   *Concentrator // the story is a concentrator's
				out      strings.Builder
			)
			for _, section := range strings.Split("\n"+string(raw), "\n== ")[1:] {
				header, body, _ := strings.Cut(section, "\n")
				title, _, _ := strings.Cut(header, ":")
				fmt.Fprintf(&out, "== %s\n", header)
				switch title {
				case "kernel with MPTCP v0.95":
					kernel = outOfTreeKernel()
				case "settings":
					if chosen, err = settings.Parse([]byte(body)); err != nil {
						t.Fatal(err)
					}
				case "uplinks":
					statuses = nil
					for line := range strings.Lines(strings.TrimSpace(body)) {
						statuses = append(statuses, parseStatus(t, line))
					}
					var legs []Interface
					for _, s := range statuses {
						legs = append(legs, Interface{Index: s.Leg.Index, Name: s.Leg.Interface})
					}
					kernel = kernel.appearLegs(legs...)
				case "lan":
					lan = nil
					for network := range strings.FieldsSeq(body) {
						lan = append(lan, netip.MustParsePrefix(network))
					}
				case "tunnel":
					tunnel = parseTunnel(t, body)
					kernel = kernel.appear(tunnel.Device)
				case "concentrator":
					c := parseConcentrator(t, body)
					middle = &c
					kernel = kernel.appear(c.Device).appearLegs(c.Legs.Device)
				case "changes", "barrier":
					want := Compile(chosen, statuses, lan, tunnel)
					if middle != nil {
						want = CompileConcentrator(*middle)
					}
					if title == "barrier" {
						want = Barrier(chosen, lan)
					}
					before := kernel
					changes := Diff(kernel, want)
					kernel = kernel.After(changes...)
					if again := Diff(kernel, want); len(again) > 0 {
						t.Errorf("%s: a second Diff is not empty: %v", header, again)
					}
					for _, c := range changes {
						fmt.Fprintln(&out, c)
						if r, ok := c.(ReplaceTable); ok {
							out.WriteString(tableChange(before.Table, r.Table))
						}
					}
					for _, p := range Problems(kernel, want) {
						fmt.Fprintln(&out, "problem:", p)
					}
					continue
				default:
					t.Fatalf("unknown section %q", title)
				}
				fmt.Fprintln(&out, strings.TrimSuffix(body, "\n"))
			}
			if *update {
				if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(raw), out.String()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// TestDiffRepairs: what something else did to what is ours is put right, and
// with as little as possible.
func TestDiffRepairs(t *testing.T) {
	chosen := settings.Default()
	chosen.LAN.Interfaces = []string{"lan0"}
	chosen.Uplinks = []settings.Uplink{{Name: "dsl", Interface: "wan1", Mode: settings.On, Address: settings.Address{Method: settings.Existing}}}
	want := Compile(chosen, []uplink.Status{parseStatus(t, "dsl wan1#3 10.1.0.2/24>10.1.0.1")}, nil, parseTunnel(t, "sheaf0#9 up 10.83.0.2>10.83.0.1"))
	empty := emptyKernel().appear(Interface{Index: 9, Name: TunnelName})
	whole := empty.After(Diff(empty, want)...)

	replaced := "\n" + ReplaceTable{want.Table}.String()
	for _, test := range []struct {
		name   string
		damage func(*State)
		want   string
	}{
		{"nothing", func(*State) {}, ""},
		{"rules flushed", func(s *State) { s.Rules = nil }, `
ip rule add iif lan0 lookup 8363 priority 8302 protocol 83
ip -6 rule add iif lan0 lookup 8363 priority 8302 protocol 83
ip rule add fwmark 0x53000000/0xff000000 lookup 8300 priority 8300 protocol 83
ip rule add from 10.1.0.2 lookup 8301 priority 8303 protocol 83
ip -6 rule add fwmark 0x53000000/0xff000000 lookup 8300 priority 8300 protocol 83`},
		{"a rule with more in it", func(s *State) {
			i := slices.IndexFunc(s.Rules, func(r Rule) bool { return r.Mark != 0 && !r.IPv6 })
			s.Rules[i].Altered = true
		}, `
ip rule add fwmark 0x53000000/0xff000000 lookup 8300 priority 8300 protocol 83
ip rule delete fwmark 0x53000000/0xff000000 lookup 8300 priority 8300 protocol 83`},
		{"another gateway", func(s *State) {
			for i := range s.Routes {
				if s.Routes[i].Gateway.IsValid() {
					s.Routes[i].Gateway = netip.MustParseAddr("10.1.0.9")
				}
			}
		}, "\nip route replace default via 10.1.0.1 dev wan1 table 8301 protocol 83 initcwnd 20"},
		{"no initial window", func(s *State) {
			for i := range s.Routes {
				s.Routes[i].InitCwnd = 0
			}
		}, `
ip route replace 10.1.0.0/24 dev wan1 table 8301 protocol 83 initcwnd 20
ip route replace default via 10.1.0.1 dev wan1 table 8301 protocol 83 initcwnd 20`},
		{"a second metric", func(s *State) {
			for _, r := range s.Routes {
				if r.Gateway.IsValid() {
					r.Metric = 7
					s.Routes = append(s.Routes, r)
				}
			}
		}, "\nip route delete default via 10.1.0.1 dev wan1 table 8301 protocol 83 metric 7 initcwnd 20"},
		{"an interface renamed", func(s *State) {
			for i := range s.Routes {
				s.Routes[i].Interface.Name = "eth7"
			}
			s.MPTCP.Endpoints[0].Interface.Name = "eth7"
		}, ""},
		{"table altered", func(s *State) { s.Table.Altered = true }, replaced},
		{"table of another version", func(s *State) { s.Table.Digest = "" }, replaced},
		{"table flushed", func(s *State) { s.Table = Table{Name: TableName, Altered: true} }, replaced},
		{"table deleted", func(s *State) { s.Table = Table{} }, replaced},
		{"barrier and way out deleted", func(s *State) {
			s.Routes = slices.DeleteFunc(s.Routes, func(r Route) bool { return r.Table == lanTable })
		}, `
ip route add unreachable default table 8363 protocol 83 metric 2147483647
ip -6 route add unreachable default table 8363 protocol 83 metric 2147483647
ip route add default dev sheaf0 table 8363 protocol 83`},
		{"device", func(s *State) {
			s.Device.MTU, s.Device.Up = 1500, false
			s.Device.Addresses = []netip.Prefix{netip.MustParsePrefix("10.9.9.9/8")}
		}, `
ip link set sheaf0 mtu 1380
ip link set sheaf0 up
ip address add 10.83.0.2/32 dev sheaf0
ip address delete 10.9.9.9/8 dev sheaf0`},
		{"another device of the name", func(s *State) { s.Device = Device{Interface: Interface{Index: 10, Name: TunnelName}} }, ""},
		{"forwarding", func(s *State) {
			s.Sysctls[forwarding4("lan0")], s.Sysctls[Forwarding6] = Sysctl{Value: "0"}, Sysctl{Value: "0"}
			s.Sysctls[routerAdvertisements("wan1")] = Sysctl{Value: "1"}
		}, `
sysctl net.ipv6.conf.wan1.accept_ra=2
sysctl net.ipv4.conf.lan0.forwarding=1
sysctl net.ipv6.conf.all.forwarding=1`},
		{"what an operator chose", func(s *State) {
			s.Sysctls[routerAdvertisements("wan1")], s.Sysctls[reversePath("wan1")] = Sysctl{Value: "0"}, Sysctl{Value: "0"}
			s.Sysctls[routerAdvertisements("lan0")] = Sysctl{Value: "2"}
		}, ""},
		{"endpoint made a backup", func(s *State) { s.MPTCP.Endpoints[0].Flags |= FlagBackup },
			"\nip mptcp endpoint change 10.1.0.2 subflow"},
		{"endpoint made fullmesh", func(s *State) { s.MPTCP.Endpoints[0].Flags |= flagFullmesh },
			"\nip mptcp endpoint change 10.1.0.2 subflow"},
		{"endpoint made a signal", func(s *State) { s.MPTCP.Endpoints[0].Flags = 1 }, `
ip mptcp endpoint delete 10.1.0.2
ip mptcp endpoint add 10.1.0.2 dev wan1 subflow`},
		{"endpoint on another interface", func(s *State) { s.MPTCP.Endpoints[0].Interface.Index = 9 }, `
ip mptcp endpoint delete 10.1.0.2
ip mptcp endpoint add 10.1.0.2 dev wan1 subflow`},
		{"limits lowered", func(s *State) { s.MPTCP.Limits = Limits{1, 1} },
			"\nip mptcp limits set subflows 8 add_addr_accepted 1"},
		{"limits raised", func(s *State) { s.MPTCP.Limits = Limits{64, 8} }, ""},
		{"sysctls", func(s *State) { s.MPTCP.Sysctls["enabled"], s.MPTCP.Sysctls["pm_type"] = "0", "1" },
			"\nsysctl net.mptcp.enabled=1\nsysctl net.mptcp.pm_type=0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			have := whole.After()
			test.damage(&have)
			changes := Diff(have, want)
			var got strings.Builder
			for _, c := range changes {
				fmt.Fprintf(&got, "\n%s", c)
			}
			if diff := cmp.Diff(test.want, got.String()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
			if again := Diff(have.After(changes...), want); len(again) > 0 && test.name != "a rule with more in it" {
				t.Errorf("a second Diff is not empty: %v", again)
			}
		})
	}
}

// TestDiffWithoutMPTCP: a kernel without MPTCP still gets everything else.
func TestDiffWithoutMPTCP(t *testing.T) {
	chosen := settings.Default()
	chosen.LAN.Interfaces = []string{"lan0"}
	want := Compile(chosen, nil, nil, Tunnel{})
	changes := Diff(State{}, want)
	if len(changes) != 9 || len(Diff(State{}.After(changes...), want)) > 0 {
		t.Errorf("changes: %v", changes)
	}
	if p := Problems(State{}, want); len(p) != 1 || p[0] != "this kernel has no MPTCP: TCP flows use one uplink at a time" {
		t.Errorf("problems: %q", p)
	}
	chosen.Multipath.Enabled = false
	if p := Problems(State{}, Compile(chosen, nil, nil, Tunnel{})); len(p) > 0 {
		t.Errorf("problems though MPTCP is not wanted: %q", p)
	}
}

// TestOutOfTreeSwitch: v0.9x is turned on for sockets that ask for it, and the
// choice of other programs is left to them.
func TestOutOfTreeSwitch(t *testing.T) {
	for _, c := range []struct {
		enabled bool
		value   string
		want    string
	}{
		{true, "0", "2"}, {true, "1", "1"}, {true, "2", "2"},
		{false, "0", "0"}, {false, "1", "1"}, {false, "2", "2"},
	} {
		chosen := settings.Default()
		chosen.Multipath.Enabled = c.enabled
		have := outOfTreeKernel()
		have.OutOfTree.Sysctls["mptcp_enabled"] = Sysctl{Value: c.value}
		want := Compile(chosen, nil, nil, Tunnel{})
		have = have.After(Diff(have, want)...)
		if got := have.OutOfTree.Sysctls["mptcp_enabled"].Value; got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

// TestOutOfTreeSharedInterface: of two uplinks behind one interface the one that
// is used more decides, in either order.
func TestOutOfTreeSharedInterface(t *testing.T) {
	for _, c := range []struct {
		modes [2]settings.Mode
		want  LinkFlags
	}{
		{[2]settings.Mode{settings.On, settings.Off}, 0}, {[2]settings.Mode{settings.Off, settings.On}, 0},
		{[2]settings.Mode{settings.Backup, settings.On}, 0}, {[2]settings.Mode{settings.Off, settings.Backup}, LinkBackup},
		{[2]settings.Mode{settings.Off, settings.Off}, LinkOff},
	} {
		chosen := settings.Default()
		for i, name := range []string{"dsl", "lte"} {
			chosen.Uplinks = append(chosen.Uplinks, settings.Uplink{Name: name, Interface: "wan1", Mode: c.modes[i]})
		}
		statuses := []uplink.Status{parseStatus(t, "dsl wan1#3 10.1.0.2/24>10.1.0.1"), parseStatus(t, "lte wan1#3 10.1.0.3/24>10.1.0.9")}
		if got := Compile(chosen, statuses, nil, Tunnel{}).OutOfTree.Links["wan1"]; got != c.want {
			t.Errorf("%v: %s", c.modes, got)
		}
	}
}

// TestRestore: what was changed is put back by its path, first what sets others.
func TestRestore(t *testing.T) {
	got := ""
	for _, c := range Restore(map[string]string{
		LinkPath + "wan1": "backup", LinkPath + "lan0": "on", ParameterPath + "mptcp_rr/num_segments": "1",
		"ipv4/conf/wan1/forwarding": "0", Forwarding6: "0", "mptcp/mptcp_scheduler": "default",
	}) {
		got += c.String() + "\n"
	}
	if diff := cmp.Diff(`sysctl net.ipv6.conf.all.forwarding=0
sysctl net.ipv4.conf.wan1.forwarding=0
ip link set dev lan0 multipath on
ip link set dev wan1 multipath backup
echo 1 > /sys/module/mptcp_rr/parameters/num_segments
sysctl net.mptcp.mptcp_scheduler=default
`, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// TestProblems: what this kernel cannot do is said once and not tried again.
func TestProblems(t *testing.T) {
	chosen := settings.Default()
	chosen.Multipath.Scheduler = "redundant"
	chosen.Multipath.SYNRetries = 3
	want := Compile(chosen, nil, nil, Tunnel{})
	have := emptyKernel()
	delete(have.MPTCP.Sysctls, "syn_retrans_before_tcp_fallback")
	delete(have.MPTCP.Sysctls, "pm_type")
	got := Problems(have, want)
	if diff := cmp.Diff([]string{
		"this kernel has no MPTCP scheduler redundant: offered: default, roundrobin",
		"this kernel has no net.mptcp.syn_retrans_before_tcp_fallback: 3 cannot be set",
	}, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	for _, c := range Diff(have, want) {
		if _, ok := c.(SetSysctl); ok {
			t.Errorf("tried all the same: %s", c)
		}
	}

	chosen = settings.Default()
	chosen.Multipath.PathManager = settings.PathManagerBinder
	got = Problems(have, Compile(chosen, nil, nil, Tunnel{}))
	if want := "this kernel has no net.mptcp.pm_type: 1 cannot be set"; len(got) != 1 || got[0] != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestResolver: what is told of the resolver is what the table does for IPv4.
func TestResolver(t *testing.T) {
	dsl, lte := parseStatus(t, "dsl wan1#3 10.1.0.2/24>10.1.0.1 2001:db8::2/64>fe80::1"), parseStatus(t, "lte wan2#4 10.2.0.2/24>10.2.0.1")
	chosen := func(change func(*settings.Settings)) settings.Settings {
		s := settings.Default()
		s.LAN.Interfaces = []string{"lan0"}
		s.Uplinks = []settings.Uplink{{Name: "dsl", Interface: "wan1", Mode: settings.On}, {Name: "lte", Interface: "wan2", Mode: settings.Backup}}
		change(&s)
		return s
	}
	six := []netip.Addr{netip.MustParseAddr("2620:fe::fe")}
	for _, test := range []struct {
		name     string
		settings settings.Settings
		statuses []uplink.Status
		tunnel   string
		want     string
	}{
		{"tunnel", chosen(func(*settings.Settings) {}), []uplink.Status{dsl, lte}, "sheaf0#9 up 10.83.0.2>10.83.0.1", "10.83.0.1 "},
		{"tunnel of IPv6 alone", chosen(func(*settings.Settings) {}), []uplink.Status{dsl, lte}, "sheaf0#9 up fd00::2>fd00::1", "none"},
		{"tunnel without an address", chosen(func(*settings.Settings) {}), []uplink.Status{dsl}, "sheaf0#9 up", "none"},
		{"direct", chosen(func(*settings.Settings) {}), []uplink.Status{dsl, lte}, "lte", "10.1.0.1 dsl"},
		{"the backup", chosen(func(*settings.Settings) {}), []uplink.Status{lte}, "", "10.2.0.1 lte"},
		{"named", chosen(func(s *settings.Settings) { s.Uplinks[0].Resolvers = append(six, netip.MustParseAddr("9.9.9.9")) }), []uplink.Status{dsl}, "", "9.9.9.9 dsl"},
		{"block", chosen(func(s *settings.Settings) { s.WhenTunnelDown = settings.Block }), []uplink.Status{dsl}, "", "none"},
		{"not ours", chosen(func(s *settings.Settings) { s.LAN.DNS = false }), []uplink.Status{dsl}, "sheaf0#9 up 10.83.0.2>10.83.0.1", "none"},
		{"no uplink", chosen(func(*settings.Settings) {}), nil, "", "none"},
	} {
		tunnel := parseTunnel(t, test.tunnel)
		resolver, through := Resolver(test.settings, test.statuses, tunnel)
		got := "none"
		if resolver.IsValid() {
			got = resolver.String() + " " + through
		}
		if got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
		table := Compile(test.settings, test.statuses, nil, tunnel).Table.String()
		if resolver.IsValid() != strings.Contains(table, "ipv4 meta l4proto udp th dport 53") ||
			resolver.IsValid() && !strings.Contains(table, netip.AddrPortFrom(resolver, 53).String()) {
			t.Errorf("%s: the table has something else than %s:\n%s", test.name, resolver, table)
		}
	}
}

// TestClean: an empty State takes away what is ours and leaves the host's
// sysctls and limits as they are.
func TestClean(t *testing.T) {
	have := randomState(rand.New(rand.NewPCG(1, 2)))
	have.Sysctls = emptySysctls()
	changes := Diff(have, State{})
	left := have.After(changes...)
	if len(left.Rules)+len(left.Routes)+len(left.Table.Name)+len(left.MPTCP.Endpoints) > 0 {
		t.Errorf("left: %+v", left)
	}
	if diff := cmp.Diff(have.MPTCP.Sysctls, left.MPTCP.Sysctls) + cmp.Diff(have.Sysctls, left.Sysctls); diff != "" || have.MPTCP.Limits != left.MPTCP.Limits {
		t.Errorf("sysctls or limits were changed: %s", diff)
	}
}

// randomState is any state that Compile can make.
func randomState(r *rand.Rand) State {
	chosen := settings.Default()
	for i := range r.IntN(4) {
		chosen.LAN.Interfaces = append(chosen.LAN.Interfaces, fmt.Sprintf("lan%d", (i+r.IntN(2))*2))
	}
	chosen.LAN.Interfaces = slices.Compact(chosen.LAN.Interfaces)
	chosen.Multipath.Enabled = r.IntN(5) > 0
	chosen.Multipath.Checksum = r.IntN(2) > 0
	chosen.Multipath.PathManager = settings.PathManagers[r.IntN(len(settings.PathManagers))]
	var statuses []uplink.Status
	for i := range r.IntN(settings.MaxUplinks + 1) {
		u := settings.Uplink{
			Name: fmt.Sprintf("u%d", i), Interface: fmt.Sprintf("wan%d", i), Address: settings.Address{Method: settings.Existing},
			Mode: []settings.Mode{settings.On, settings.Off, settings.Backup}[r.IntN(3)],
		}
		chosen.Uplinks = append(chosen.Uplinks, u)
		s := uplink.Status{Name: u.Name, Interface: u.Interface, Index: 1 + i + r.IntN(2)*20}
		if r.IntN(2) > 0 {
			s.Sources = append(s.Sources, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, byte(2 + r.IntN(2))}), 24))
			s.Gateways = append(s.Gateways, netip.AddrFrom4([4]byte{10, byte(i + r.IntN(2)*100), 0, 1}))
		}
		if r.IntN(2) > 0 {
			s.Sources = append(s.Sources, netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 14: byte(i), 15: byte(2 + r.IntN(2))}), []int{64, 128}[r.IntN(2)]))
			s.Gateways = append(s.Gateways, netip.MustParseAddr("fe80::1"))
		}
		s.Fit = len(s.Sources) > 0 && r.IntN(4) > 0
		if r.IntN(4) == 0 {
			leg := testLegs[i]
			s.Leg = uplink.Leg{Interface: leg.Name, Index: leg.Index, MTU: LegMTU, Up: r.IntN(2) > 0,
				Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 84, byte(i), byte(2 + r.IntN(2))})}}
		}
		if i > 0 && r.IntN(3) == 0 { // through another gateway, from the same addresses
			other := &statuses[i-1]
			s.Sources, s.Gateways = slices.Clone(other.Sources), slices.Clone(other.Gateways)
			other.Ports, s.Ports = Ports{First: uint16(i) * 100, Last: uint16(i)*100 + 99}, Ports{First: uint16(i+1) * 100, Last: uint16(i)*100 + 199}
		}
		statuses = append(statuses, s)
	}
	var lan []netip.Prefix
	for i := range r.IntN(3) {
		lan = append(lan, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(i + r.IntN(2)*10), 0}), 24))
		lan = append(lan, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 7: byte(i + r.IntN(2)*10)}), 64))
	}
	if r.IntN(2) > 0 {
		chosen.WhenTunnelDown = settings.Block
	}
	chosen.LAN.DNS = r.IntN(3) > 0
	tunnel := Tunnel{Flows: r.IntN(2) > 0}
	if r.IntN(3) > 0 {
		tunnel.Device, tunnel.Up = testDevice, r.IntN(3) > 0
		if r.IntN(3) > 0 {
			tunnel.Address4 = netip.AddrFrom4([4]byte{10, 83, 0, byte(2 + r.IntN(2))})
			tunnel.Gateway4 = netip.MustParseAddr("10.83.0.1")
		}
		if r.IntN(3) > 0 {
			tunnel.Address6 = netip.AddrFrom16([16]byte{0xfd, 5: byte(r.IntN(2)), 15: 1})
			tunnel.Gateway6 = netip.MustParseAddr("fd00::1")
		}
	}
	return Compile(chosen, statuses, lan, tunnel)
}

var testDevice = Interface{Index: 99, Name: TunnelName}

var testLegs = func() (legs []Interface) {
	for i := range settings.MaxUplinks {
		legs = append(legs, Interface{Index: 200 + i, Name: LegName(i)})
	}
	return legs
}()

// TestDiffLeadsToWhatIsWanted: from any state to any other, in one step, with
// additions first, with never more endpoints than the kernel holds, and with
// nothing to do afterwards.
func TestDiffLeadsToWhatIsWanted(t *testing.T) {
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 0))
		have := emptyKernel().appear(testDevice).appearLegs(testLegs...)
		have = have.After(Diff(have, randomState(r))...)
		want := randomState(r)
		changes := Diff(have, want)
		step, phase := have, 0
		for _, c := range changes {
			step = step.After(c)
			if len(step.MPTCP.Endpoints) > MaxEndpoints {
				t.Fatalf("seed %d: %d endpoints at once\n%v", seed, len(step.MPTCP.Endpoints), changes)
			}
			if err := unfenced(step); err != "" {
				t.Fatalf("seed %d: after %s: %s", seed, c, err)
			}
			if now := phaseOf(c, phase); now < phase {
				t.Fatalf("seed %d: %s comes too late in\n%v", seed, c, changes)
			} else {
				phase = now
			}
		}
		if again := Diff(step, want); len(again) > 0 {
			t.Fatalf("seed %d: a second Diff is not empty\n%v\n%v", seed, changes, again)
		}
		slices.SortFunc(step.Rules, compareRules)
		slices.SortFunc(step.Routes, compareRoutes)
		slices.SortFunc(step.MPTCP.Endpoints, compareEndpoints)
		maps.DeleteFunc(step.MPTCP.Sysctls, func(name, _ string) bool { return want.MPTCP.Sysctls[name] == "" })
		step.MPTCP.Omitted, step.MPTCP.Outside = want.MPTCP.Omitted, want.MPTCP.Outside
		if want.MPTCP.Outside {
			want.MPTCP.Limits = have.MPTCP.Limits
			want.MPTCP.Endpoints = slices.DeleteFunc(want.MPTCP.Endpoints, func(e Endpoint) bool {
				return !slices.ContainsFunc(have.MPTCP.Endpoints, func(h Endpoint) bool { return h.Address == e.Address })
			})
		}
		if want.Device.Interface.Index == 0 {
			want.Device = step.Device
		}
		// Those of which nothing is wanted are the data path's to take away.
		legs := step.Legs
		step.Legs = nil
		for _, d := range legs {
			if slices.ContainsFunc(want.Legs, func(w Device) bool { return w.Interface == d.Interface }) {
				step.Legs = append(step.Legs, d)
			}
		}
		slices.SortFunc(step.Device.Addresses, netip.Prefix.Compare)
		slices.SortFunc(want.Device.Addresses, netip.Prefix.Compare)
		for path, w := range want.Sysctls {
			if got, ok := step.Sysctls[path]; ok && got.Value != w.Value && (w.Instead == "" || w.Instead == got.Value) {
				t.Fatalf("seed %d: %s is %s", seed, path, got.Value)
			}
		}
		step.Sysctls, want.Sysctls, want.OutOfTree = nil, nil, nil
		equal := cmp.Diff(want, step, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
			cmp.Comparer(func(a, b []Rule) bool { return slices.Equal(a, b) }), cmp.Comparer(func(a, b []Route) bool { return slices.Equal(a, b) }),
			cmp.Comparer(func(a, b []Endpoint) bool { return slices.Equal(a, b) }), cmp.Comparer(func(a, b []netip.Prefix) bool { return slices.Equal(a, b) }), cmp.Comparer(func(a, b Table) bool { return a.same(b) }))
		if equal != "" {
			t.Fatalf("seed %d: -want +got\n%s", seed, equal)
		}
	}
}

// phaseOf is 0 for additions, 1 for replacements, 2 for deletions. Endpoints are
// left out, whose deletions may have to come first, and the table, of which
// adding and replacing are the same change.
func phaseOf(c Change, now int) int {
	switch c := c.(type) {
	case AddEndpoint, DeleteEndpoint, SetEndpointFlags, ReplaceTable:
		return now
	case SetSysctl:
		if !strings.HasPrefix(c.Path, MPTCPSysctls) {
			return 1
		}
	case ReplaceRoute:
		return 1
	case DeleteRule, DeleteRoute, DeleteTable, DeleteAddress:
		return 2
	}
	return 0
}

// unfenced says what lets packets of the LAN through to the main table while
// they are forwarded. lan0 is the only LAN interface whose forwarding the tests'
// kernel can turn on; a state without any LAN has none to fence.
func unfenced(s State) string {
	if s.Sysctls[forwarding4("lan0")].Value != "1" || s.Table.Name == "" {
		return ""
	}
	for _, any := range []netip.Prefix{anyIPv4, anyIPv6} {
		if !slices.ContainsFunc(s.Rules, func(r Rule) bool { return r.Input != "" && r.IPv6 == any.Addr().Is6() && r.Table == lanTable }) {
			return "no rule for what comes from the LAN"
		}
		if !slices.Contains(s.Routes, Route{Table: lanTable, Destination: any, Unreachable: true, Metric: unreachableMetric}) {
			return "nothing stops what comes from the LAN"
		}
	}
	return ""
}

// TestBlockNeverLeaks: with when_tunnel_down block, no step on the way from any
// state to any other lets a packet of the LAN out of anything but the TUN.
func TestBlockNeverLeaks(t *testing.T) {
	checked := 0
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 1))
		from, to := randomState(r), randomState(r)
		have := emptyKernel().appear(testDevice)
		have = have.After(Diff(have, from)...)
		if wayOut(from) != "" || wayOut(to) != "" {
			continue // one of them is direct
		}
		checked++
		for _, c := range Diff(have, to) {
			have = have.After(c)
			if way := wayOut(have); way != "" {
				t.Fatalf("seed %d: after %s there is %s", seed, c, way)
			}
		}
	}
	if checked < 100 {
		t.Errorf("only %d pairs of states were checked", checked)
	}
}

// wayOut is a route of what comes from the LAN that leaves by an uplink.
func wayOut(s State) string {
	for _, r := range s.Routes {
		if r.Table == lanTable && !r.Unreachable && r.Interface.Name != TunnelName {
			return AddRoute{r}.String()
		}
	}
	return ""
}

// TestTableDigest: every part of a table is in its digest, and nothing else is.
func TestTableDigest(t *testing.T) {
	table := func() Table {
		return Table{Name: "a", Chains: []Chain{{Name: "c", Type: "filter", Hook: "forward", Priority: 1, Rules: [][]Statement{
			{MatchInput{Interfaces: []string{"lan0"}}, Drop}, {Accept},
		}}}}
	}
	first := table().sealed()
	if again := table().sealed(); !first.same(again) {
		t.Errorf("the same table has digests %s and %s", first.Digest, again.Digest)
	}
	for name, change := range map[string]func(*Table){
		"name":      func(t *Table) { t.Name = "b" },
		"chain":     func(t *Table) { t.Chains[0].Name = "d" },
		"type":      func(t *Table) { t.Chains[0].Type = "nat" },
		"hook":      func(t *Table) { t.Chains[0].Hook = "input" },
		"priority":  func(t *Table) { t.Chains[0].Priority = 2 },
		"order":     func(t *Table) { slices.Reverse(t.Chains[0].Rules) },
		"fewer":     func(t *Table) { t.Chains[0].Rules = t.Chains[0].Rules[:1] },
		"statement": func(t *Table) { t.Chains[0].Rules[0][0] = MatchInput{Interfaces: []string{"lan0"}, Not: true} },
	} {
		other := table()
		change(&other)
		if other = other.sealed(); other.Digest == first.Digest {
			t.Errorf("%s: the digest is the same", name)
		}
	}
	empty := table()
	empty.Chains = append(empty.Chains, Chain{Name: "empty"})
	if !empty.sealed().same(first) {
		t.Error("a chain without rules is not left out")
	}
}
