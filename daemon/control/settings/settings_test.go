package settings

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// comparable compares addresses, whose fields cmp cannot see, as Go does.
var comparable = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{})

var update = flag.Bool("update", false, "write the expected outputs anew")

// TestParse reads every testdata/*.txt: the text, a line of dashes, and what
// Parse makes of it: the settings in full, or every problem.
func TestParse(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) < 5 {
		t.Fatalf("cases: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			const dashes = "----------\n"
			text, want, ok := strings.Cut(string(raw), dashes)
			if !ok && !*update {
				t.Fatal("the file has no line of dashes")
			}
			var got string
			if s, err := Parse([]byte(text)); err != nil {
				var invalid *Invalid
				if !errors.As(err, &invalid) {
					t.Fatalf("the error is a %T: %v", err, err)
				}
				got = err.Error() + "\n"
			} else {
				got = string(s.YAML())
				again, err := Parse(s.YAML())
				if err != nil {
					t.Fatalf("YAML() is refused: %v", err)
				}
				if diff := cmp.Diff(s, again, comparable); diff != "" {
					t.Errorf("YAML() does not give the settings back:\n%s", diff)
				}
			}
			if *update {
				if err := os.WriteFile(file, []byte(text+dashes+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestParseRefusesOverlongText(t *testing.T) {
	text := append([]byte("version: 1\nlan: {interfaces: [lan0]}\n#"), make([]byte, MaxText)...)
	if _, err := Parse(text); err == nil || !strings.Contains(err.Error(), "at most 1048576") {
		t.Errorf("error: %v", err)
	}
}

// TestValidate checks that what Parse refuses with a line, Validate refuses
// without one.
func TestValidate(t *testing.T) {
	valid := func() Settings {
		s := Default()
		s.LAN.Interfaces = []string{"lan0"}
		s.Uplinks = []Uplink{{Name: "dsl", Interface: "wan1", Mode: On, Address: Address{Method: Existing}}}
		return s
	}
	if err := Validate(valid()); err != nil {
		t.Fatalf("valid settings: %v", err)
	}
	for want, change := range map[string]func(*Settings){
		"lan.interfaces: names no interface: without one no client is served":                               func(s *Settings) { s.LAN.Interfaces = nil },
		`lan.interfaces[0]: "a/b" cannot be the name of an interface`:                                       func(s *Settings) { s.LAN.Interfaces[0] = "a/b" },
		`lan.interfaces[0]: ".." cannot be the name of an interface`:                                        func(s *Settings) { s.LAN.Interfaces[0] = ".." },
		`lan.interfaces[0]: "a\xff" cannot be the name of an interface`:                                     func(s *Settings) { s.LAN.Interfaces[0] = "a\xff" },
		"uplinks[0].interface: lan0 is already lan.interfaces[0]: an interface has one place":               func(s *Settings) { s.Uplinks[0].Interface = "lan0" },
		`uplinks[0].mode: "" is not a mode: offered are on, off, backup`:                                    func(s *Settings) { s.Uplinks[0].Mode = "" },
		"uplinks[0].address.method: dhcp is not available in this version: offered: existing, gateway":      func(s *Settings) { s.Uplinks[0].Address.Method = "dhcp" },
		`multipath.path_manager: "mesh" is unknown: offered: default, fullmesh, ndiffports, binder, netlin`: func(s *Settings) { s.Multipath.PathManager = "mesh" },
		`multipath.congestion_control: "reno" is unknown: offered: auto, cubic, bbr`:                        func(s *Settings) { s.Multipath.CongestionControl = "reno" },
		"multipath.subflows: is 9: it must be from 1 to 8":                                                  func(s *Settings) { s.Multipath.Subflows = 9 },
		"uplinks[0].address: has gateway or source, which only method gateway uses":                         func(s *Settings) { s.Uplinks[0].Address.Gateway = netip.MustParseAddr("10.0.0.2") },
		"multipath.syn_retries: is 11: it must be from 0 to 10":                                             func(s *Settings) { s.Multipath.SYNRetries = 11 },
		"multipath.out_of_tree.binder_gateways: has 11 routes: at most 10 are possible": func(s *Settings) {
			s.Multipath.OutOfTree.BinderGateways = "192.0.2.1" + strings.Repeat("-192.0.2.1", 10)
		},
		"multipath.out_of_tree.binder_gateways: \"192.0.2.1,": func(s *Settings) {
			s.Multipath.OutOfTree.BinderGateways = "192.0.2.1" + strings.Repeat(",192.0.2.1", 6)
		},
		"multipath.out_of_tree.binder_gateways: \"\" is not an IPv4 address":                               func(s *Settings) { s.Multipath.OutOfTree.BinderGateways = "192.0.2.1-" },
		"concentrator.token: has 4097 bytes: a token has at most 4096":                                     func(s *Settings) { s.Concentrator.Token = strings.Repeat("x", 4097) },
		"version: is 2: this version of Sheaf reads version 1":                                             func(s *Settings) { s.Version = 2 },
		`when_tunnel_down: "nat" is not a choice: offered are direct, block`:                               func(s *Settings) { s.WhenTunnelDown = "nat" },
		"uplinks: has 17 entries: at most 16 are possible":                                                 func(s *Settings) { s.Uplinks = make([]Uplink, 17) },
		"uplinks[1].name: dsl is already the name of uplinks[0]":                                           func(s *Settings) { u := s.Uplinks[0]; u.Interface = "wan2"; s.Uplinks = append(s.Uplinks, u) },
		"forwards: has 65 entries: at most 64 are possible":                                                func(s *Settings) { s.Forwards = make([]Forward, 65) },
		"classes: has 65 entries: at most 64 are possible":                                                 func(s *Settings) { s.Classes = make([]ClassRule, 65) },
		"uplinks[0].resolvers: has 4 entries: at most 3 are possible":                                      func(s *Settings) { s.Uplinks[0].Resolvers = make([]netip.Addr, 4) },
		"forwards[0].to: is missing: give a host of the LAN and its port":                                  func(s *Settings) { s.Forwards = []Forward{{Name: "a", Protocol: "tcp", Port: 1, Source: SourceClient}} },
		"classes[0].dscp: is -1: a code point is from 0 to 63":                                             func(s *Settings) { s.Classes = []ClassRule{{Class: ClassBulk, DSCP: new(-1)}} },
		"classes[0].ports: 0-9 is no range of ports: it must rise, from 1 to 65535":                        func(s *Settings) { s.Classes = []ClassRule{{Class: ClassBulk, Ports: PortRange{0, 9}}} },
		"concentrator.token: holds a character that no token has: copy the one line that `concentratord t": func(s *Settings) { s.Concentrator.Token = "a b" },
	} {
		s := valid()
		change(&s)
		err := Validate(s)
		if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
}

// FuzzParse: no text makes Parse panic, and what it accepts is valid and is
// given back by YAML().
func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.txt")
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		text, _, _ := strings.Cut(string(raw), "----------\n")
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := Parse(text)
		if err != nil {
			var invalid *Invalid
			if !errors.As(err, &invalid) || len(invalid.Problems) == 0 || len(invalid.Problems) > maxProblems {
				t.Fatalf("the error is %#v", err)
			}
			for _, p := range invalid.Problems {
				if strings.Contains(p.String(), "\n") {
					t.Fatalf("a problem has more than one line: %q", p)
				}
			}
			return
		}
		if err := Validate(s); err != nil {
			t.Fatalf("accepted but not valid: %v", err)
		}
		again, err := Parse(s.YAML())
		if err != nil {
			t.Fatalf("YAML() is refused: %v\n%s", err, s.YAML())
		}
		if diff := cmp.Diff(s, again, comparable); diff != "" {
			t.Fatalf("YAML() does not give the settings back:\n%s", diff)
		}
	})
}
