package desired

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

// parseWay reads "dsl 10.1.0.2", with "backup", "sport=100-199", "to=192.0.2.9:443"
// and "later" for one over which nothing may be opened now.
func parseWay(t *testing.T, text string) (w Way, later bool) {
	t.Helper()
	words := strings.Fields(text)
	w = Way{Uplink: words[0], Source: netip.MustParseAddr(words[1]), Interface: Interface{3, "if-" + words[0]}}
	for _, word := range words[2:] {
		ports, isPorts := strings.CutPrefix(word, "sport=")
		remote, isRemote := strings.CutPrefix(word, "to=")
		switch {
		case isRemote:
			w.Remote = netip.MustParseAddrPort(remote)
		case word == "backup":
			w.Backup = true
		case word == "later":
			later = true
		case isPorts:
			fmt.Sscanf(ports, "%d-%d", &w.Ports.First, &w.Ports.Last)
		default:
			t.Fatalf("what is %q of a way?", word)
		}
	}
	return w, later
}

// parseSubflow reads "10.1.0.2:1001#7", with "to=192.0.2.9:443", "backup" and "joining".
func parseSubflow(t *testing.T, text string) (f Subflow) {
	t.Helper()
	words := strings.Fields(text)
	local, id, _ := strings.Cut(words[0], "#")
	f.Local = netip.MustParseAddrPort(local)
	fmt.Sscan(id, &f.ID)
	for _, word := range words[1:] {
		if remote, is := strings.CutPrefix(word, "to="); is {
			f.Remote = netip.MustParseAddrPort(remote)
		}
	}
	f.Backup = strings.Contains(text, "backup")
	f.Joining = strings.Contains(text, "joining")
	return f
}

func TestDiffSubflows(t *testing.T) {
	const two = "dsl 10.1.0.2, lte 10.2.0.2"
	const mesh = "dsl 10.1.0.2 to=192.0.2.1:443, lte 10.2.0.2 to=192.0.2.1:443, dsl 10.1.0.2 to=192.0.2.9:443, lte 10.2.0.2 to=192.0.2.9:443"
	// The ids of the two addresses that nothing has yet.
	const id1, id2 = 6, 59
	opens := func(uplink, source string, id int) string {
		return fmt.Sprintf("open %s dev if-%s to 192.0.2.1:443 id %d", source, uplink, id)
	}
	for _, test := range []struct {
		name, manager, ways, have, want string
	}{
		{"binder opens what is missing", "binder", two, "10.1.0.2:1001#0", opens("lte", "10.2.0.2", id2)},
		{"binder has everything", "binder", two, "10.1.0.2:1001#0, 10.2.0.2:1002#59", ""},
		{"binder waits for what joins", "binder", two, "10.1.0.2:1001#0, 10.2.0.2:1002#59 joining", ""},
		{"binder: not now", "binder", "dsl 10.1.0.2, lte 10.2.0.2 later", "10.1.0.2:1001#0", ""},
		{"binder: one too many, the one that joins goes", "binder", two, "10.1.0.2:1001#9 joining, 10.1.0.2:1002#0, 10.2.0.2:1003#59", "close 10.1.0.2:1001"},
		{"binder opens a backup", "binder", "dsl 10.1.0.2, lte 10.2.0.2 backup", "10.1.0.2:1001#0", opens("lte", "10.2.0.2", id2) + " backup"},
		{"binder: on becomes backup, and backup on", "binder", "lte 10.2.0.2, dsl 10.1.0.2 backup", "10.1.0.2:1001#0, 10.2.0.2:1002#59 backup",
			"change 10.2.0.2:1002 nobackup\nchange 10.1.0.2:1001 backup"},
		{"an uplink is gone", "binder", "lte 10.2.0.2", "10.1.0.2:1001#0, 10.2.0.2:1002#59", "close 10.1.0.2:1001 and remove id 0"},
		{"the only uplink with a subflow is gone: another first", "binder", "lte 10.2.0.2", "10.1.0.2:1001#0", opens("lte", "10.2.0.2", id2)},
		{"and until that is there", "binder", "lte 10.2.0.2", "10.1.0.2:1001#0, 10.2.0.2:1002#59 joining", ""},
		{"and when that failed", "binder", "lte 10.2.0.2 later", "10.1.0.2:1001#0", "close 10.1.0.2:1001 and remove id 0"},
		{"no uplink is left", "binder", "", "10.1.0.2:1001#0", "close 10.1.0.2:1001 and remove id 0"},
		{"the other family does not reach it", "binder", "dsl 10.1.0.2, dsl 2001:db8::2", "10.1.0.2:1001#0", ""},
		{"the ids of others are left to them", "binder", two, "10.1.0.2:1001#59", opens("lte", "10.2.0.2", id2+1)},

		{"gateways that share an address", "binder", "dsl 10.1.0.2 sport=16384-17407, cable 10.1.0.2 sport=17408-18431", "10.1.0.2:16384#0",
			"open 10.1.0.2 dev if-cable to 192.0.2.1:443 id 192 sport 17408-18431"},
		{"and both are there", "binder", "dsl 10.1.0.2 sport=16384-17407, cable 10.1.0.2 sport=17408-18431", "10.1.0.2:16384#0, 10.1.0.2:17409#192", ""},
		{"a port of no uplink", "binder", "dsl 10.1.0.2 sport=16384-17407, lte 10.2.0.2", "10.1.0.2:40000#0, 10.2.0.2:1002#59", ""},
		{"a port of an uplink that is off", "binder", "dsl 10.1.0.2 sport=16384-17407", "10.1.0.2:16384#0, 10.1.0.2:17409#192", "close 10.1.0.2:17409"},
		{"ports need ids of their own", "ndiffports", "dsl 10.1.0.2 sport=16384-17407", "10.1.0.2:16384#0",
			"open 10.1.0.2 dev if-dsl to 192.0.2.1:443 id 106 sport 16384-17407\nopen 10.1.0.2 dev if-dsl to 192.0.2.1:443 id 107 sport 16384-17407"},

		{"ndiffports", "ndiffports", two, "10.1.0.2:1001#0", opens("dsl", "10.1.0.2", id1) + "\n" + opens("dsl", "10.1.0.2", id1)},
		{"ndiffports has everything", "ndiffports", two, "10.1.0.2:1001#0, 10.1.0.2:1002#6, 10.1.0.2:1003#6", ""},
		{"ndiffports goes on with the id that the address has", "ndiffports", two, "10.1.0.2:1001#0, 10.1.0.2:1002#77", opens("dsl", "10.1.0.2", 77)},
		{"ndiffports: too many", "ndiffports", two, "10.1.0.2:1001#0, 10.1.0.2:1002#6, 10.1.0.2:1003#6, 10.1.0.2:1004#6", "close 10.1.0.2:1004"},
		{"ndiffports stays where it is", "ndiffports", two, "10.2.0.2:1001#0, 10.2.0.2:1002#59, 10.2.0.2:1003#59", ""},
		{"ndiffports: what is elsewhere goes", "ndiffports", two, "10.1.0.2:1001#0, 10.1.0.2:1002#6, 10.1.0.2:1003#6, 10.2.0.2:1004#59", "close 10.2.0.2:1004"},
		{"ndiffports leaves a backup", "ndiffports", "lte 10.2.0.2, dsl 10.1.0.2 backup", "10.1.0.2:1001#0, 10.1.0.2:1002#6, 10.1.0.2:1003#6",
			strings.Repeat(opens("lte", "10.2.0.2", id2)+"\n", 2) + opens("lte", "10.2.0.2", id2)},
		{"once it has another", "ndiffports", "lte 10.2.0.2, dsl 10.1.0.2 backup", "10.1.0.2:1001#0, 10.2.0.2:1002#59, 10.2.0.2:1003#59, 10.2.0.2:1004#59 joining",
			"close 10.1.0.2:1001"},

		{"mesh opens to every address, with one id", "mesh", mesh, "10.1.0.2:1001#0 to=192.0.2.1:443",
			opens("lte", "10.2.0.2", id2) + "\nopen 10.1.0.2 dev if-dsl to 192.0.2.9:443 id 6\nopen 10.2.0.2 dev if-lte to 192.0.2.9:443 id 59"},
		{"mesh has everything, and its session began at the second", "mesh", mesh,
			"10.1.0.2:1001#0 to=192.0.2.9:443, 10.1.0.2:1002#6 to=192.0.2.1:443, 10.2.0.2:1003#59 to=192.0.2.1:443, 10.2.0.2:1004#59 to=192.0.2.9:443", ""},
		{"mesh opens again what one address has lost", "mesh", mesh,
			"10.1.0.2:1001#0 to=192.0.2.1:443, 10.2.0.2:1003#59 to=192.0.2.1:443, 10.2.0.2:1004#59 to=192.0.2.9:443", "open 10.1.0.2 dev if-dsl to 192.0.2.9:443 id 6"},
		{"mesh: an uplink is gone", "mesh", "lte 10.2.0.2 to=192.0.2.1:443, lte 10.2.0.2 to=192.0.2.9:443",
			"10.1.0.2:1001#0 to=192.0.2.1:443, 10.1.0.2:1002#6 to=192.0.2.9:443, 10.2.0.2:1003#59 to=192.0.2.1:443, 10.2.0.2:1004#59 to=192.0.2.9:443",
			"close 10.1.0.2:1001 and remove id 0\nclose 10.1.0.2:1002 and remove id 6"},
		{"mesh is left", "binder", two, "10.1.0.2:1001#0 to=192.0.2.1:443, 10.1.0.2:1002#6 to=192.0.2.9:443, 10.2.0.2:1003#59 to=192.0.2.1:443", "close 10.1.0.2:1002"},

		{"mesh to one address is as binder", "mesh", two, "10.1.0.2:1001#0, 10.1.0.2:1002#6", opens("lte", "10.2.0.2", id2) + "\nclose 10.1.0.2:1002"},
		{"default keeps one", "default", two, "10.1.0.2:1001#0, 10.1.0.2:1002#6, 10.2.0.2:1003#59", "close 10.1.0.2:1002\nclose 10.2.0.2:1003"},
		{"default tries every uplink when there is none", "default", two, "", opens("dsl", "10.1.0.2", id1) + "\n" + opens("lte", "10.2.0.2", id2)},
		{"and the others while one joins", "default", two, "10.1.0.2:1001#6 joining", opens("lte", "10.2.0.2", id2)},
		{"a backup, too", "default", "dsl 10.1.0.2 later, lte 10.2.0.2 backup", "10.3.0.2:1001#0", opens("lte", "10.2.0.2", id2) + " backup"},
		{"and keeps the first that gets through", "default", two, "10.1.0.2:1001#6 joining, 10.2.0.2:1002#59", "close 10.1.0.2:1001"},
		{"ndiffports, too", "ndiffports", two, "10.1.0.2:1001#6 joining, 10.1.0.2:1002#6 joining, 10.1.0.2:1003#6 joining", opens("lte", "10.2.0.2", id2)},
		{"default leaves what is gone", "default", "lte 10.2.0.2", "10.1.0.2:1001#0, 10.2.0.2:1003#59", "close 10.1.0.2:1001 and remove id 0"},
		{"disabled is as default", "disabled", two, "10.1.0.2:1001#0", ""},
		{"netlink is another's business", "netlink", "lte 10.2.0.2", "10.1.0.2:1001#0, 10.1.0.2:1002#6", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := settings.Multipath{Enabled: true, PathManager: settings.PathManager(test.manager), Subflows: 3}
			if test.manager == "disabled" {
				m.Enabled, m.PathManager = false, settings.PathManagerBinder
			}
			var ways []Way
			var have []Subflow
			postponed := map[Way]bool{}
			for _, text := range strings.FieldsFunc(test.ways, func(r rune) bool { return r == ',' }) {
				w, later := parseWay(t, text)
				ways = append(ways, w)
				postponed[w] = later
			}
			for _, text := range strings.FieldsFunc(test.have, func(r rune) bool { return r == ',' }) {
				have = append(have, parseSubflow(t, text))
			}
			var got []string
			for _, c := range DiffSubflows(m, ways, have, netip.MustParseAddrPort("192.0.2.1:443"), func(w Way) bool { return !postponed[w] }) {
				got = append(got, c.String())
			}
			if diff := cmp.Diff(test.want, strings.Join(got, "\n")); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestMesh(t *testing.T) {
	remotes := []netip.AddrPort{
		netip.MustParseAddrPort("192.0.2.1:443"), netip.MustParseAddrPort("[2001:db8::1]:443"), netip.MustParseAddrPort("192.0.2.9:443"),
	}
	show := func(ways []Way) string {
		var list []string
		for _, w := range Mesh(ways, remotes) {
			list = append(list, fmt.Sprintf("%s %s", w.Source, w.Remote.Addr()))
		}
		return strings.Join(list, ", ")
	}
	var ways []Way
	for i := range 3 {
		ways = append(ways, Way{Source: netip.AddrFrom4([4]byte{10, byte(i), 0, 2})})
	}
	ways = append(ways, Way{Source: netip.MustParseAddr("2001:db8:7::2")})
	if got, want := show(ways), "10.0.0.2 192.0.2.1, 10.1.0.2 192.0.2.1, 10.2.0.2 192.0.2.1, 2001:db8:7::2 2001:db8::1, 10.0.0.2 192.0.2.9, 10.1.0.2 192.0.2.9, 10.2.0.2 192.0.2.9"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for i := range 4 {
		ways = append(ways, Way{Source: netip.AddrFrom4([4]byte{10, byte(3 + i), 0, 2})})
	}
	if got, want := show(ways), "10.0.0.2 192.0.2.1, 10.1.0.2 192.0.2.1, 10.2.0.2 192.0.2.1, 10.3.0.2 192.0.2.1, 10.4.0.2 192.0.2.1, 10.5.0.2 192.0.2.1, 10.6.0.2 192.0.2.1, 2001:db8:7::2 2001:db8::1"; got != want {
		t.Errorf("more than a session may have: got  %s\nwant %s", got, want)
	}
}

// TestPortsForEveryUplink: there are ports for as many uplinks as there may be,
// and the kernel gives none of them to sockets by itself.
func TestPortsForEveryUplink(t *testing.T) {
	const firstEphemeral = 32768 // ip_local_port_range
	var links []uplink.Link
	var wants []uplink.Want
	for i := range settings.MaxUplinks {
		wants = append(wants, uplink.Want{Name: fmt.Sprint(i), Interface: "wan1", Gateway: netip.AddrFrom4([4]byte{10, 1, 0, byte(100 + i)})})
	}
	links = append(links, uplink.Link{Name: "wan1", Index: 1, Up: true, Carrier: true, Addresses: []uplink.Address{{Prefix: netip.MustParsePrefix("10.1.0.2/24")}}})
	for i, s := range uplink.Judge(uplink.Observation{Links: links}, wants) {
		if s.Ports == (Ports{}) || s.Ports.Last >= firstEphemeral || !uplink.Allotted(s.Ports.First) || !uplink.Allotted(s.Ports.Last) {
			t.Errorf("uplink %d has the ports %v", i, s.Ports)
		}
	}
}
