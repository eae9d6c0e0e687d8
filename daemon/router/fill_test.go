package router

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

func TestWhereFirstfitIsApproximated(t *testing.T) {
	wanted := settings.Multipath{Enabled: true, PathManager: settings.PathManagerFullmesh, Scheduler: "firstfit"}
	other, off, outside := wanted, wanted, wanted
	other.Scheduler, off.Enabled, outside.PathManager = "weighted", false, settings.PathManagerNetlink
	ours := []string{"default", "firstfit"}
	for i, c := range []struct {
		wanted  settings.Multipath
		mptcp   string
		offered []string
		far     string
		want    bool
	}{
		{wanted, kernel.Upstream, []string{"default"}, "", true},
		{wanted, kernel.Upstream, nil, "default", true}, // 6.1 lists none
		{wanted, kernel.OutOfTree, []string{"roundrobin"}, "default", true},
		{wanted, kernel.NoMPTCP, nil, "default", false},
		{wanted, kernel.Upstream, ours, "", false},
		{wanted, kernel.Upstream, ours, "firstfit", false},
		{wanted, kernel.Upstream, ours, "default", true},
		{wanted, kernel.Upstream, []string{"default"}, "firstfit", true},
		{other, kernel.Upstream, []string{"default"}, "default", false},
		{off, kernel.Upstream, []string{"default"}, "default", false},
		{outside, kernel.Upstream, []string{"default"}, "default", false},
	} {
		if got := approximated(c.wanted, c.mptcp, c.offered, c.far); got != c.want {
			t.Errorf("case %d: %v, want %v", i+1, got, c.want)
		}
	}
}

// preferring is a router that approximates firstfit, with preferences 0, 1 and 2.
func preferring(t *testing.T, uplinks ...string) (*Router, settings.Settings) {
	r := &Router{mptcp: kernel.Upstream, schedulers: []string{"default"}, packets: newPackets(nil)}
	s := chosen(t, uplinks...)
	s.Multipath.Scheduler = firstfit
	for i := range s.Uplinks {
		s.Uplinks[i].Preference = i
	}
	return r, s
}

func TestUplinksThatAreHeldBack(t *testing.T) {
	r, s := preferring(t, "a on", "b on", "c on", "d backup", "e off")
	gone := fit("a", 1)
	gone.Fit = false
	rest := []uplink.Status{fit("b", 2), fit("c", 3), fit("d", 4), fit("e", 5)}
	for _, c := range []struct {
		name         string
		held         []string
		first        uplink.Status
		now, dialled string
	}{
		{"one is used", []string{"b", "c"}, fit("a", 1), "on backup backup backup off", "on backup backup backup off"},
		{"two are", []string{"c"}, fit("a", 1), "on on backup backup off", "on backup backup backup off"},
		{"the first is gone", []string{"c"}, gone, "on on backup backup off", "on on backup backup off"},
	} {
		r.filling.set(c.held)
		now, dialled := r.effective(s, append([]uplink.Status{c.first}, rest...))
		if modes(now) != c.now || modes(dialled) != c.dialled || now.Multipath.Scheduler != "default" {
			t.Errorf("%s: modes %s, to dial %s, scheduler %s; want %s, %s", c.name, modes(now), modes(dialled), now.Multipath.Scheduler, c.now, c.dialled)
		}
	}
	if modes(s) != "on on on backup off" {
		t.Errorf("the settings themselves have become %s", modes(s))
	}
	r.filling.demoted = map[string]string{"a": "harm"}
	if now, dialled := r.effective(s, append([]uplink.Status{fit("a", 1)}, rest...)); modes(now) != "backup on backup backup off" || modes(dialled) != "backup on backup backup off" {
		t.Errorf("a is demoted: modes %s, to dial %s", modes(now), modes(dialled))
	}
	r.filling.demoted = nil
	r.schedulers = []string{"default", "firstfit"}
	if now, _ := r.effective(s, rest); modes(now) != modes(s) || now.Multipath.Scheduler != firstfit {
		t.Errorf("with a kernel that has the scheduler: %s, %s", modes(now), now.Multipath.Scheduler)
	}
}

func modes(s settings.Settings) string {
	var list []string
	for _, u := range s.Uplinks {
		list = append(list, string(u.Mode))
	}
	return strings.Join(list, " ")
}

func TestLoads(t *testing.T) {
	_, s := preferring(t, "a on", "b on")
	var f filling
	at := time.Unix(1_800_000_000, 0)
	a, b := fit("a", 1), fit("b", 2)
	trips := map[string]trip{"a": {rtt: 30 * time.Millisecond, least: 20 * time.Millisecond}}
	for i, step := range []struct {
		received, sent uint64
		want           string
	}{
		{1000, 100, "[{a 0 0 0 30ms 20ms 0} {b 1 0 0 0s 0s 0}]"}, // the first look
		{3000, 200, "[{a 0 8000 400 30ms 20ms 0} {b 1 0 0 0s 0s 0}]"},
		{10, 10, "[{a 0 0 0 30ms 20ms 0} {b 1 0 0 0s 0s 0}]"}, // the interface was made anew
	} {
		a.ReceivedBytes, a.SentBytes = step.received, step.sent
		statuses := []uplink.Status{a, b}
		if got := fmt.Sprint(f.loads(at, usable(s, statuses), statuses, trips)); got != step.want {
			t.Errorf("step %d: %s, want %s", i+1, got, step.want)
		}
		at = at.Add(250 * time.Millisecond)
	}
}

// What is held back stands by, but never while nothing else carries.
func TestStatesOfUplinksThatAreHeldBack(t *testing.T) {
	for _, c := range []struct{ first, held, want string }{
		{"carrying", "b", "carrying standby"}, {"unfit", "b", "unfit carrying"}, {"carrying", "", "carrying carrying"},
	} {
		f := filling{held: []string{c.held}}
		list := []webui.UplinkStatus{{Name: "a", Mode: "on", State: c.first}, {Name: "b", Mode: "on", State: "carrying"}}
		f.describe(list)
		if got := list[0].State + " " + list[1].State; got != c.want || (list[1].State == "standby") != (list[1].Reason != "") {
			t.Errorf("%+v: %s, because %q", c, got, list[1].Reason)
		}
	}
	f := filling{demoted: map[string]string{"a": "harm"}}
	list := []webui.UplinkStatus{{Name: "a", Mode: "on", State: "carrying"}, {Name: "b", Mode: "on", State: "carrying"}}
	if f.describe(list); list[0].State != "standby" || list[0].Reason != "harm" || list[1].State != "carrying" {
		t.Errorf("a is demoted: %+v", list)
	}
	r, s := preferring(t, "a on", "b on")
	for _, c := range []struct {
		preference int
		offered    string
		want       string
	}{
		{1, "default", "firstfit approximated by backup flags"},
		{0, "default", "firstfit approximated by backup flags; all uplinks have the same preference"},
		{1, "firstfit", ""},
	} {
		s.Uplinks[1].Preference, r.schedulers = c.preference, []string{c.offered}
		if got := r.note(s); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestRanks(t *testing.T) {
	s := chosen(t, "a on", "b backup")
	s.Uplinks[1].Weight, s.Uplinks[1].Preference = 1000, 1000
	for scheduler, want := range map[string]string{
		"default": "map[]", "redundant": "map[]",
		"weighted": "map[a:{1 1} b:{1000 1001}]", "firstfit": "map[a:{1 1} b:{1000 1001}]",
	} {
		s.Multipath.Scheduler = scheduler
		if got := fmt.Sprint(ranks(s)); got != want {
			t.Errorf("%s: %s, want %s", scheduler, got, want)
		}
	}
}
