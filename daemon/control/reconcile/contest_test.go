package reconcile

import (
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sheaf/daemon/control/desired"
)

func TestContest(t *testing.T) {
	e := desired.Endpoint{Address: netip.MustParseAddr("10.1.0.2"), Interface: desired.Interface{Index: 3, Name: "wan1"}, Flags: desired.FlagSubflow}
	backup := e
	backup.Flags |= desired.FlagBackup
	var (
		adding  = desired.AddEndpoint{Endpoint: e}
		taking  = desired.DeleteEndpoint{Endpoint: e}
		marking = desired.SetEndpointFlags{Endpoint: backup}
		setting = desired.SetSysctl{Path: "mptcp/pm_type", Value: "1"}
		other   = desired.SetSysctl{Path: "mptcp/pm_type", Value: "0"}
		foreign = desired.SetSysctl{Path: "ipv6/conf/all/forwarding", Value: "1"}
	)
	// A step is what is necessary some time after the last, and whether it is done.
	type step struct {
		after  time.Duration
		change desired.Change
		made   bool
	}
	const s = time.Second
	for name, steps := range map[string][]step{
		"put back once":                   {{0, setting, true}, {s, setting, true}, {30 * s, setting, false}, {30 * s, setting, false}},
		"and again when it is rare":       {{0, setting, true}, {s, setting, true}, {61 * s, setting, true}, {s, setting, false}},
		"and again after a while":         {{0, setting, true}, {s, setting, true}, {s, setting, false}, {599 * s, setting, false}, {s, setting, true}, {s, setting, false}},
		"they agree, and then do not":     {{0, setting, true}, {s, setting, true}, {s, setting, false}, {s, nil, false}, {90 * s, setting, true}},
		"something else is wanted":        {{0, setting, true}, {s, setting, true}, {s, setting, false}, {s, other, true}, {s, setting, true}},
		"endpoints":                       {{0, adding, true}, {s, adding, true}, {s, adding, false}},
		"the operator switches":           {{0, adding, true}, {s, taking, true}, {s, adding, true}, {s, taking, true}, {s, adding, true}, {s, adding, true}, {s, adding, false}},
		"flags that another takes away":   {{0, adding, true}, {s, marking, true}, {s, marking, true}, {s, marking, false}},
		"what is not MPTCP's is put back": {{0, foreign, true}, {s, foreign, true}, {s, foreign, true}, {s, foreign, true}},
	} {
		t.Run(name, func(t *testing.T) {
			c := contest{}
			now := time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC)
			for i, step := range steps {
				now = now.Add(step.after)
				var changes []desired.Change
				if step.change != nil {
					changes = []desired.Change{step.change}
				}
				made, conflicts := c.judge(changes, now)
				c.made(nil, made, now)
				if got := len(made) == 1; got != step.made || len(made)+len(conflicts) != len(changes) {
					t.Errorf("step %d: made %v, conflicts %q", i+1, made, conflicts)
				}
			}
		})
	}
}

// TestWhatWeDidOurselves: endpoints that come and go because we want it so, also
// when that is done beside the loop, are nobody's conflict.
func TestWhatWeDidOurselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := desired.Endpoint{Address: netip.MustParseAddr("10.1.0.2"), Interface: desired.Interface{Index: 3, Name: "wan1"}, Flags: desired.FlagSubflow}
		with := desired.State{MPTCP: &desired.MPTCP{Endpoints: []desired.Endpoint{e}}}
		without := desired.State{MPTCP: &desired.MPTCP{}}
		taking := []desired.Change{desired.DeleteEndpoint{Endpoint: e}}
		r := start(t, with, with)
		r.after(settle, 1)
		for range 5 { // a pass in between
			r.want.Store(&without)
			_ = r.kernel.Apply(t.Context(), taking)
			r.after(time.Second, 1, taking[0].String())
			r.want.Store(&with)
			r.loop.Poke()
			r.after(time.Second, 2, desired.AddEndpoint{Endpoint: e}.String())
		}
		for range 5 { // and none
			_ = r.kernel.Apply(t.Context(), taking)
			r.loop.Did(taking)
			r.after(time.Second, 2, taking[0].String(), desired.AddEndpoint{Endpoint: e}.String())
		}
		if p := r.last.Load(); len(p.Problems) > 0 {
			t.Errorf("the pass reported %+v", p)
		}
	})
}

// TestConflictIsReported: the loop leaves what is contested, and says so.
func TestConflictIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := func(kind string) desired.State {
			return desired.State{MPTCP: &desired.MPTCP{Sysctls: map[string]string{"pm_type": kind}}}
		}
		const change = "sysctl net.mptcp.pm_type=0"
		undo := func(s *desired.State) { s.MPTCP.Sysctls["pm_type"] = "1" }
		r := start(t, state("0"), state("0"))
		r.after(settle, 1)
		time.Sleep(time.Second)
		r.kernel.Disturb(undo)
		r.after(settle, 2, change)
		time.Sleep(time.Second)
		r.kernel.Disturb(undo)
		r.after(settle, 1)
		if p := r.last.Load(); len(p.Problems) != 1 || !strings.Contains(p.Problems[0], change) || p.Err != nil {
			t.Errorf("the pass reported %+v", p)
		}
		r.kernel.Disturb(func(s *desired.State) { s.MPTCP.Sysctls["pm_type"] = "0" })
		r.after(settle, 1)
		if p := r.last.Load(); len(p.Problems) != 0 {
			t.Errorf("they agree, and the pass reported %+v", p)
		}
	})
}
