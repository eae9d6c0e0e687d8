package uplink

import (
	"strings"
	"testing"
	"time"
)

// TestDemotion draws what a and b carry, in Mbit/s, and expects whether b is demoted
// at the end of each step.
func TestDemotion(t *testing.T) {
	type step struct {
		seconds int
		a, b    float64
		rtt     time.Duration // of b
		loss    float64
		want    string // part of the reason
	}
	const short, long = 25 * time.Millisecond, 600 * time.Millisecond
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"very slow and very long", []step{{10, 40, 0.3, long, 0, ""}, {4, 40, 0.3, long, 0, "it carried 0.7 % of all, at 30 times the round trip of a"},
			{174, 40, 0, long, 0, "demoted"}, {6, 40, 0.3, long, 0, ""}, {8, 40, 0.3, long, 0, "demoted"}}},
		{"all wait for it at times", []step{{8, 40, 0.3, long, 0, ""}, {8, 0, 0.3, long, 0, ""}, {8, 40, 0.3, long, 0, "demoted"}}},
		{"it is gone at times", []step{{8, 40, 0.3, long, 0, ""}, {8, 40, -1, long, 0, ""}, {8, 40, 0.3, long, 0, "demoted"}}},
		{"and for long", []step{{8, 40, 0.3, long, 0, ""}, {80, 40, -1, long, 0, ""}, {8, 40, 0.3, long, 0, ""}}},
		{"long, and carries", []step{{120, 40, 5, long, 0, ""}}},
		{"slow, and as near", []step{{120, 40, 0.3, short, 0, ""}}},
		{"nothing is asked of it", []step{{120, 40, 0.04, long, 0, ""}}},
		{"nothing is asked of any", []step{{120, 0.1, 0.1, long, 0.5, ""}}},
		{"it loses", []step{{16, 40, 1, short, 0.3, "and lost 30 %"}}},
		{"probes are lost, flows are not", []step{{120, 40, 20, short, 0.3, ""}}},
		{"a little", []step{{120, 40, 1, short, 0.1, ""}}},
		{"it carries at times", []step{{8, 40, 0.3, long, 0, ""}, {8, 40, 5, long, 0, ""}, {8, 40, 0.3, long, 0, ""}}},
		{"the best itself is slow", []step{{120, 0.3, 40, long, 0, ""}}},
	} {
		var d Demotion
		now := time.Unix(1_800_000_000, 0)
		var got map[string]string
		for i, s := range c.steps {
			for range s.seconds / 2 {
				now = now.Add(2 * time.Second)
				loads := []Load{{Name: "a", Received: s.a * 1e6 / 8, MinRTT: 20 * time.Millisecond, RTT: 40 * time.Millisecond}}
				if s.b >= 0 {
					loads = append(loads, Load{Name: "b", Received: s.b * 1e6 / 8, MinRTT: s.rtt, RTT: s.rtt, Loss: s.loss})
				}
				got = d.Look(now, loads)
			}
			if reason := got["b"]; got["a"] != "" || (reason == "") != (s.want == "") || !strings.Contains(reason, s.want) {
				t.Errorf("%s: after step %d %q, want %q", c.name, i+1, got, s.want)
			}
		}
	}
	// Alone, nothing does harm.
	var d Demotion
	for i := range 20 {
		if got := d.Look(time.Unix(1_800_000_000+2*int64(i), 0), []Load{{Name: "b", Received: 1e6, MinRTT: short, RTT: long, Loss: 0.5}}); len(got) > 0 {
			t.Fatalf("the only uplink: %q", got)
		}
	}
}
