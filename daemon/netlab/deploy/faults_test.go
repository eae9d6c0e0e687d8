package deploy

import (
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"sheaf/daemon/netlab"
)

// TestFaults is a short storm; `make bench PART=faults` is the long one.
func TestFaults(t *testing.T) {
	w := up(t)
	result, err := Storm{Seed: 1, Faults: 30, Duration: 20 * time.Second, Transfers: 10, Shapes: shapes}.Run(t.Context(), w.Deployment)
	w.must(err)
	t.Logf("%+v", result)
	if result.Transfers < 10 {
		t.Errorf("only %d transfers were complete", result.Transfers)
	}
}

// TestForgottenSubflow: where the word got lost that an address is no more, the
// concentrator finds out by itself, within seconds of the new one's first subflow.
func TestForgottenSubflow(t *testing.T) {
	w := up(t)
	time.Sleep(12 * time.Second) // a session's beginning explains new subflows
	changed := w.Lab.Uplinks[0]
	old := changed.Address()
	held := func() (n int) {
		t.Helper()
		open, _, err := tunnelSockets(w.Lab.Cloud)
		w.need(err)
		for socket, number := range open {
			if socket.address.String() == old {
				n += number
			}
		}
		return n
	}
	before := held()
	t.Cleanup(func() { w.must(changed.SetAddress(2)) })
	for _, u := range w.Lab.Uplinks[1:] {
		w.need(u.BlackHole(true))
	}
	w.need(changed.SetAddress(77))
	time.Sleep(300 * time.Millisecond)
	for _, u := range w.Lab.Uplinks[1:] {
		w.need(u.BlackHole(false))
	}
	w.need(w.WaitUp())
	lost := held()
	if lost == 0 {
		t.Fatalf("of %d subflows from %s the word did not get lost", before, old)
	}
	w.soon("the concentrator has forgotten the subflows", func() error { // by itself after minutes
		if n := held(); n > 0 {
			return fmt.Errorf("of %d it has %d from %s", lost, n, old)
		}
		return nil
	})
}

func TestStormPlan(t *testing.T) {
	for seed := range uint64(5) {
		s := Storm{Seed: seed, Faults: 1000, Duration: 10 * time.Minute}
		plan := s.plan(3)
		if !reflect.DeepEqual(plan, s.plan(3)) {
			t.Fatalf("seed %d: another plan at the second time", seed)
		}
		seen := map[string]int{}
		for i, f := range plan {
			seen[f.kind]++
			if i > 0 && f.at < plan[i-1].at || f.at < 0 || f.at > s.Duration || f.hold > maxHold {
				t.Errorf("seed %d: fault %d is %v, after %v", seed, i, f, plan[max(i-1, 0)])
			}
		}
		for _, kind := range kinds {
			if seen[kind] < 30 {
				t.Errorf("seed %d: %d of 1000 are %s", seed, seen[kind], kind)
			}
		}
		// By looking at every moment.
		const step = 10 * time.Millisecond
		var outage, usable time.Duration
		recent := plan
		for at := time.Duration(0); at < s.Duration+maxHold; at += step {
			for len(recent) > 0 && recent[0].at < at-maxHold {
				recent = recent[1:]
			}
			out := map[int]bool{}
			for _, f := range recent {
				if f.at > at {
					break
				}
				if f.unusable() && at < f.at+f.hold {
					out[f.uplink] = true
				}
			}
			if usable += step; len(out) == 3 {
				if usable > minUsable {
					outage = 0
				}
				outage, usable = outage+step, 0
			}
			if outage > maxOutage+2*step {
				t.Fatalf("seed %d: no uplink is usable for %v until %v", seed, outage, at)
			}
		}
	}
}

func TestLongestOutage(t *testing.T) {
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	hole := func(uplink, at, hold int) fault {
		return fault{kind: blackHole, uplink: uplink, at: ms(at), hold: ms(hold)}
	}
	for _, c := range []struct {
		name   string
		faults []fault
		want   int // ms
	}{
		{"none", nil, 0},
		{"one of two", []fault{hole(0, 0, 1000)}, 0},
		{"both for a while", []fault{hole(0, 0, 1000), hole(1, 700, 1000)}, 300},
		{"both at once", []fault{hole(0, 0, 1000), hole(1, 0, 1000)}, 1000},
		{"one after the other", []fault{hole(0, 0, 1000), hole(1, 1000, 1000)}, 0},
		{"overlapping on one", []fault{hole(0, 0, 4000), hole(1, 100, 300), hole(1, 200, 900)}, 1000},
		{"one within the other", []fault{hole(0, 0, 4000), hole(1, 100, 900), hole(1, 200, 300)}, 900},
		{"a short moment between", []fault{hole(0, 0, 4000), hole(1, 0, 500), hole(1, 600, 500)}, 1100},
		{"long enough between", []fault{hole(0, 0, 4000), hole(1, 0, 500), hole(1, 1500, 600)}, 600},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := longestOutage(c.faults, 2); got != ms(c.want) {
				t.Errorf("got %v, want %v", got, ms(c.want))
			}
		})
	}
}

// removeGateway deletes an uplink's default routes from the main table.
func (w *world) removeGateway(u *netlab.Uplink) (restore func() error, err error) {
	var removed []netlink.Route
	err = w.Lab.Router.Do(func() error {
		link, err := netlink.LinkByName(u.Interface())
		if err != nil {
			return err
		}
		routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Dst != nil && !r.Dst.IP.IsUnspecified() || r.Gw == nil {
				continue
			}
			if err := netlink.RouteDel(&r); err != nil {
				return fmt.Errorf("delete %v: %w", r, err)
			}
			removed = append(removed, r)
		}
		if len(removed) == 0 {
			return fmt.Errorf("%s has no default route", u.Interface())
		}
		return nil
	})
	return func() error {
		return w.Lab.Router.Do(func() error {
			for _, r := range removed {
				if err := netlink.RouteAdd(&r); err != nil {
					return err
				}
			}
			return nil
		})
	}, err
}

// alterLeftovers deletes one of a dead daemon's rules in the calling namespace,
// as another program might.
func alterLeftovers() error {
	rules, err := netlink.RuleList(netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, r := range rules {
		if r.Table >= 8300 && r.Table < 8364 {
			return netlink.RuleDel(&r)
		}
	}
	return fmt.Errorf("there is no rule of sheafd's to alter")
}
