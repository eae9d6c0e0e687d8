package settings

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestChanges(t *testing.T) {
	const head = "version: 1\nlan: {interfaces: [lan0]}\n"
	const dsl = "  - {name: dsl, interface: wan1, mode: on, address: {method: existing}}\n"
	const lte = "  - {name: lte, interface: wan2, mode: backup, address: {method: existing}, resolvers: [192.0.2.53]}\n"
	const forward = "forwards:\n  - {name: web, protocol: tcp, port: 80, to: \"192.168.1.10:80\"}\n"
	for name, test := range map[string]struct {
		from, to string
		want     []Change
	}{
		"nothing":       {head + "uplinks:\n" + dsl, head + "uplinks:\n" + dsl, []Change{}},
		"a list absent": {head + "uplinks:\n" + dsl + "forwards: []\n", head + "uplinks:\n" + dsl, []Change{}},
		"values": {head + "uplinks:\n" + dsl, "version: 1\nlan: {interfaces: [lan0, lan1], dns: false}\nmultipath: {syn_retries: 3}\nuplinks:\n" + dsl,
			[]Change{{"lan.dns", "true", "false"}, {"lan.interfaces", `["lan0"]`, `["lan0","lan1"]`}, {"multipath.syn_retries", "2", "3"}}},
		"an uplink before the other": {head + "uplinks:\n" + dsl, head + "uplinks:\n" + lte + dsl,
			[]Change{{"uplinks[lte]", "", `{"address":{"method":"existing"},"interface":"wan2","mode":"backup","name":"lte","resolvers":["192.0.2.53"]}`}}},
		"an uplink less": {head + "uplinks:\n" + dsl + lte, head + "uplinks:\n" + lte,
			[]Change{{"uplinks[dsl]", `{"address":{"method":"existing"},"interface":"wan1","mode":"on","name":"dsl"}`, ""}}},
		"another order": {head + "uplinks:\n" + dsl + lte, head + "uplinks:\n" + lte + dsl, []Change{{"uplinks", "dsl, lte", "lte, dsl"}}},
		"a mode": {head + "uplinks:\n  - {name: dsl, interface: wan1, mode: off, address: {method: existing}}\n", head + "uplinks:\n" + dsl,
			[]Change{{"uplinks[dsl].mode", "off", "on"}}},
		"a first forward": {head + "uplinks:\n" + dsl, head + "uplinks:\n" + dsl + forward,
			[]Change{{"forwards[web]", "", `{"name":"web","port":80,"protocol":"tcp","source":"client","to":"192.168.1.10:80"}`}}},
		"a class": {head + "uplinks:\n" + dsl, head + "uplinks:\n" + dsl + "classes:\n  - {class: bulk, protocol: tcp}\n",
			[]Change{{"classes", "", `[{"class":"bulk","protocol":"tcp"}]`}}},
	} {
		from, err := Parse([]byte(test.from))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		to, err := Parse([]byte(test.to))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(test.want, Changes(from, to)); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
	}
}
