package uplink

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func TestStripping(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	const (
		look     = "look"   // is it to be tried?
		passed   = "passed" // what became of it
		fellBack = "fell back"
		failed   = "failed"
	)
	type step struct {
		at     time.Duration // since begin
		what   string
		joined time.Duration // since begin; negative: never
		want   bool          // due, or after an attempt: strips
	}
	const never = -1
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"joined", []step{{0, look, 0, false}, {time.Minute, look, time.Minute - time.Second, false}}},
		{"joined no more", []step{{0, look, 0, false}, {4 * time.Second, look, 2 * time.Second, false}, {5 * time.Second, look, 2 * time.Second, true}}},
		{"never joined", []step{{0, look, never, false}, {2 * time.Second, look, never, false}, {3 * time.Second, look, never, true}}},
		{"passes", []step{
			{0, look, never, false}, {3 * time.Second, passed, never, false},
			{4 * time.Second, look, never, false}, {22 * time.Second, look, never, false}, {23 * time.Second, look, never, true},
		}},
		{"not reached", []step{
			{0, look, never, false}, {3 * time.Second, failed, never, false},
			{4 * time.Second, look, never, false}, {23 * time.Second, look, never, true},
		}},
		{"strips", []step{
			{0, look, never, false}, {3 * time.Second, fellBack, never, false},
			{3100 * time.Millisecond, look, never, false}, {3250 * time.Millisecond, look, never, true},
			{4 * time.Second, fellBack, never, true},
			// What joins by the leg does not count.
			{30 * time.Second, look, 30 * time.Second, false}, {64 * time.Second, look, 64 * time.Second, true},
			{65 * time.Second, fellBack, never, true},
		}},
		{"fell back once", []step{
			{0, look, never, false}, {3 * time.Second, fellBack, never, false}, {4 * time.Second, passed, never, false},
			{5 * time.Second, fellBack, never, false},
		}},
		{"strips no longer", []step{
			{0, fellBack, never, false}, {time.Second, fellBack, never, true}, {61 * time.Second, look, never, true},
			{62 * time.Second, passed, never, false}, {63 * time.Second, look, never, false},
		}},
		{"strips and is not reached", []step{
			{0, fellBack, never, false}, {time.Second, fellBack, never, true}, {61 * time.Second, failed, never, true},
			{62 * time.Second, look, never, false},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s Stripping
			for _, step := range c.steps {
				now := begin.Add(step.at)
				var got bool
				switch step.what {
				case look:
					joined := time.Time{}
					if step.joined != never {
						joined = begin.Add(step.joined)
					}
					got = s.Due(now, joined)
				case failed:
					s.Failed(now)
					got = s.Strips()
				default:
					s.Tried(now, step.what == passed)
					got = s.Strips()
				}
				if got != step.want {
					t.Errorf("%s at %v: %v, want %v", step.what, step.at, got, step.want)
				}
			}
		})
	}
}

func TestSubflowsLeaveByTheLegWhileItIsUp(t *testing.T) {
	s := Status{Sources: []netip.Prefix{netip.MustParsePrefix("10.1.0.2/24"), netip.MustParsePrefix("2001:db8:1::2/64")}, Leg: Leg{Addresses: []netip.Addr{netip.MustParseAddr("10.84.0.2")}}}
	for _, up := range []bool{false, true} {
		s.Leg.Up = up
		want := map[bool]string{false: "[10.1.0.2 2001:db8:1::2]", true: "[10.84.0.2]"}[up]
		if got := fmt.Sprint(s.SubflowSources()); got != want {
			t.Errorf("up %v: %s, want %s", up, got, want)
		}
		for _, local := range []string{"10.84.0.2:1", "10.1.0.2:1"} {
			if at := Of([]Status{{}, s}, netip.MustParseAddrPort(local)); at != 1 {
				t.Errorf("up %v: %s is of the uplink in place %d, want 1", up, local, at)
			}
		}
	}
}
