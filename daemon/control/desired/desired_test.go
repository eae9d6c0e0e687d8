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
	}}
}

// parseStatus reads "dsl wan1#3 10.1.0.2/24>10.1.0.1 2001:db8::2/64>fe80::1 unfit".
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
		source, gateway, _ := strings.Cut(w, ">")
		s.Sources = append(s.Sources, netip.MustParsePrefix(source))
		s.Gateways = append(s.Gateways, netip.MustParseAddr(gateway))
	}
	return s
}

// TestStories plays every testdata/*.txt. A story changes settings and uplinks
// section by section; every "changes" section holds what Diff then has to say,
// the kernel being as the story has left it.
func TestStories(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.txt")
	if len(files) < 5 {
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
				out      strings.Builder
			)
			for _, section := range strings.Split("\n"+string(raw), "\n== ")[1:] {
				header, body, _ := strings.Cut(section, "\n")
				title, _, _ := strings.Cut(header, ":")
				fmt.Fprintf(&out, "== %s\n", header)
				switch title {
				case "settings":
					if chosen, err = settings.Parse([]byte(body)); err != nil {
						t.Fatal(err)
					}
				case "uplinks":
					statuses = nil
					for line := range strings.Lines(strings.TrimSpace(body)) {
						statuses = append(statuses, parseStatus(t, line))
					}
				case "lan":
					lan = nil
					for network := range strings.FieldsSeq(body) {
						lan = append(lan, netip.MustParsePrefix(network))
					}
				case "changes":
					want := Compile(chosen, statuses, lan)
					changes := Diff(kernel, want)
					kernel = kernel.After(changes...)
					if again := Diff(kernel, want); len(again) > 0 {
						t.Errorf("%s: a second Diff is not empty: %v", header, again)
					}
					for _, c := range changes {
						fmt.Fprintln(&out, c)
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
	want := Compile(chosen, []uplink.Status{parseStatus(t, "dsl wan1#3 10.1.0.2/24>10.1.0.1")}, nil)
	whole := emptyKernel().After(Diff(emptyKernel(), want)...)

	for _, test := range []struct {
		name   string
		damage func(*State)
		want   string
	}{
		{"nothing", func(*State) {}, ""},
		{"rules flushed", func(s *State) { s.Rules = nil }, `
ip rule add fwmark 0x53000000/0xff000000 lookup 8300 priority 8300 protocol 83
ip rule add from 10.1.0.2 lookup 8301 priority 8302 protocol 83
ip -6 rule add fwmark 0x53000000/0xff000000 lookup 8300 priority 8300 protocol 83`},
		{"a rule with more in it", func(s *State) { s.Rules[0].Altered = true }, `
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
		{"table altered", func(s *State) { s.Intercept.Altered = true },
			"\nnft replace table inet sheaf { divert tcp from { lan0 } to port 8383 with mark 0x53000000/0xff000000 }"},
		{"table flushed", func(s *State) { s.Intercept = Intercept{Altered: true} },
			"\nnft replace table inet sheaf { divert tcp from { lan0 } to port 8383 with mark 0x53000000/0xff000000 }"},
		{"table deleted", func(s *State) { s.Intercept = Intercept{} },
			"\nnft replace table inet sheaf { divert tcp from { lan0 } to port 8383 with mark 0x53000000/0xff000000 }"},
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
	want := Compile(chosen, nil, nil)
	changes := Diff(State{}, want)
	if len(changes) != 5 || len(Diff(State{}.After(changes...), want)) > 0 {
		t.Errorf("changes: %v", changes)
	}
	if p := Problems(State{}, want); len(p) != 1 || p[0] != "this kernel has no MPTCP: one uplink is used at a time" {
		t.Errorf("problems: %q", p)
	}
	chosen.Multipath.Enabled = false
	if p := Problems(State{}, Compile(chosen, nil, nil)); len(p) > 0 {
		t.Errorf("problems though MPTCP is not wanted: %q", p)
	}
}

// TestProblems: what this kernel cannot do is said once and not tried again.
func TestProblems(t *testing.T) {
	chosen := settings.Default()
	chosen.Multipath.Scheduler = "redundant"
	chosen.Multipath.SYNRetries = 3
	want := Compile(chosen, nil, nil)
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
}

// TestClean: an empty State takes away what is ours and leaves the host's
// sysctls and limits as they are.
func TestClean(t *testing.T) {
	have := randomState(rand.New(rand.NewPCG(1, 2)))
	changes := Diff(have, State{})
	left := have.After(changes...)
	if len(left.Rules)+len(left.Routes)+len(left.Intercept.LAN)+len(left.MPTCP.Endpoints) > 0 {
		t.Errorf("left: %+v", left)
	}
	if diff := cmp.Diff(have.MPTCP.Sysctls, left.MPTCP.Sysctls); diff != "" || have.MPTCP.Limits != left.MPTCP.Limits {
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
	if r.IntN(4) == 0 {
		chosen.Multipath.PathManager = settings.PathManagerDefault
	}
	var statuses []uplink.Status
	for i := range r.IntN(settings.MaxUplinks + 1) {
		u := settings.Uplink{
			Name: fmt.Sprintf("u%d", i), Interface: fmt.Sprintf("wan%d", i),
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
		statuses = append(statuses, s)
	}
	var lan []netip.Prefix
	for i := range r.IntN(3) {
		lan = append(lan, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(i + r.IntN(2)*10), 0}), 24))
		lan = append(lan, netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 7: byte(i + r.IntN(2)*10)}), 64))
	}
	return Compile(chosen, statuses, lan)
}

// TestDiffLeadsToWhatIsWanted: from any state to any other, in one step, with
// additions first, with never more endpoints than the kernel holds, and with
// nothing to do afterwards.
func TestDiffLeadsToWhatIsWanted(t *testing.T) {
	for seed := range uint64(400) {
		r := rand.New(rand.NewPCG(seed, 0))
		have := emptyKernel()
		have = have.After(Diff(have, randomState(r))...)
		want := randomState(r)
		changes := Diff(have, want)
		step, phase := have, 0
		for _, c := range changes {
			step = step.After(c)
			if len(step.MPTCP.Endpoints) > MaxEndpoints {
				t.Fatalf("seed %d: %d endpoints at once\n%v", seed, len(step.MPTCP.Endpoints), changes)
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
		step.MPTCP.Omitted = want.MPTCP.Omitted
		equal := cmp.Diff(want, step, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
			cmp.Comparer(func(a, b []Rule) bool { return slices.Equal(a, b) }), cmp.Comparer(func(a, b []Route) bool { return slices.Equal(a, b) }),
			cmp.Comparer(func(a, b []Endpoint) bool { return slices.Equal(a, b) }), cmp.Comparer(func(a, b []string) bool { return slices.Equal(a, b) }))
		if equal != "" {
			t.Fatalf("seed %d: -want +got\n%s", seed, equal)
		}
	}
}

// phaseOf is 0 for additions, 1 for replacements, 2 for deletions. Endpoints are
// left out, whose deletions may have to come first, and the table, of which
// adding and replacing are the same change.
func phaseOf(c Change, now int) int {
	switch c.(type) {
	case AddEndpoint, DeleteEndpoint, SetEndpointFlags, ReplaceIntercept:
		return now
	case ReplaceRoute:
		return 1
	case DeleteRule, DeleteRoute, DeleteIntercept:
		return 2
	}
	return 0
}
