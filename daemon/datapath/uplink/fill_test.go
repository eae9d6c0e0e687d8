package uplink

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestFilling draws what clients want to have and what the uplinks carry, in
// Mbit/s, and expects when the uplinks b and c, which are less preferred, are used.
// The uplinks that are in use share what is wanted as the kernel's scheduler
// does, each up to its rate, and those that are full have a queue.
func TestFilling(t *testing.T) {
	type step struct {
		seconds float64
		wanted  float64 // down; a tenth of it up
		rates   []float64
		// used are those that are, at the end of the step.
		used string
	}
	const jitter, upload, short = "jitter", "upload", "no queue in the last step"
	both := []float64{40, 20}
	for _, c := range []struct {
		name  string
		way   string
		steps []step
	}{
		{"a part of the first is wanted", "", []step{{60, 20, both, "a"}}},
		{"more than the first carries", "", []step{{0.75, 100, both, "a"}, {1.5, 100, both, "a b"}, {60, 100, both, "a b"}}},
		{"a burst is let pass", "", []step{{0.75, 100, both, "a"}, {10, 5, both, "a"}}},
		{"and back again, not at once", "", []step{{5, 100, both, "a b"}, {4, 20, both, "a b"}, {3, 20, both, "a"}, {60, 20, both, "a"}}},
		{"between the thresholds it stays", "", []step{{5, 100, both, "a b"}, {60, 30, both, "a b"}, {10, 20, both, "a"}, {60, 30, both, "a"}}},
		{"a pause is not the end", "", []step{{5, 100, both, "a b"}, {3, 0, both, "a b"}, {5, 100, both, "a b"}}},
		{"idle", "", []step{{5, 100, both, "a b"}, {600, 0, both, "a"}, {0.75, 100, both, "a"}, {2, 100, both, "a b"}}},
		{"three", "", []step{{1.75, 200, []float64{40, 20, 30}, "a b"}, {5, 200, []float64{40, 20, 30}, "a b c"},
			{12, 50, []float64{40, 20, 30}, "a b c"}, {12, 30, []float64{40, 20, 30}, "a b"}, {12, 10, []float64{40, 20, 30}, "a"}}},
		{"long round trips at little load", jitter, []step{{60, 0.2, both, "a"}}},
		{"uploads", upload, []step{{3, 100, both, "a b"}, {8, 10, both, "a"}}},
		{"no queue, before the limit is known", short, []step{{30, 100, both, "a"}}},
		{"no queue, once it is", short, []step{{5, 100, both, "a b"}, {12, 10, both, "a"}, {3, 100, both, "a b"}}},
		{"the first is slower now", "", []step{{5, 100, both, "a b"}, {12, 15, []float64{10, 20}, "a"}, {20, 15, []float64{10, 20}, "a b"}, {60, 15, []float64{10, 20}, "a b"}, {12, 4, []float64{10, 20}, "a"}}},
		{"the first is gone, and back", "", []step{{5, 10, both, "a"}, {1, 10, []float64{0, 20}, "b"}, {1, 10, both, "a"}}},
		{"gone while both were used", "", []step{{5, 100, []float64{40, 20, 30}, "a b c"}, {1, 100, []float64{0, 20, 30}, "b c"}, {12, 5, []float64{0, 20, 30}, "b"}, {2, 5, []float64{40, 20, 30}, "a b"}, {6, 5, []float64{40, 20, 30}, "a"}}},
	} {
		var f Filling
		now := time.Unix(1_800_000_000, 0)
		used := []string{"a"}
		for i, s := range c.steps {
			for range int(s.seconds / FillEvery.Seconds()) {
				var loads []Load
				left, room := s.wanted, 0.0
				for j, rate := range s.rates {
					if slices.Contains(used, string(rune('a'+j))) {
						room += rate
					}
				}
				full := left >= room
				for j, rate := range s.rates {
					if rate == 0 {
						continue
					}
					l := Load{Name: string(rune('a' + j)), Preference: j, MinRTT: 20 * time.Millisecond, RTT: 22 * time.Millisecond}
					if slices.Contains(used, l.Name) {
						carried := rate * min(1, left/room) * 1e6 / 8
						l.Received, l.Sent = carried, carried/10
						if c.way == upload {
							l.Received, l.Sent = l.Sent, l.Received
						}
						if full && (c.way != short || i < len(c.steps)-1) || c.way == jitter {
							l.RTT = 44 * time.Millisecond
						}
					}
					loads = append(loads, l)
				}
				now = now.Add(FillEvery)
				held := f.Look(now, loads)
				used = nil
				for _, l := range loads {
					if !slices.Contains(held, l.Name) {
						used = append(used, l.Name)
					}
				}
			}
			if got := strings.Join(used, " "); got != s.used {
				t.Errorf("%s: after step %d %s is used, want %s", c.name, i+1, got, s.used)
			}
		}
	}
}

// Uplinks of the same preference are used together, and no uplinks are no trouble.
func TestFillingOfEquals(t *testing.T) {
	var f Filling
	if held := f.Look(time.Unix(1_800_000_000, 0), nil); held != nil {
		t.Errorf("of none %v", held)
	}
	held := f.Look(time.Unix(1_800_000_000, 0), []Load{{Name: "a", Preference: 3}, {Name: "b", Preference: 5}, {Name: "c", Preference: 3}, {Name: "d", Preference: 9}})
	if got := fmt.Sprint(held); got != "[b d]" {
		t.Errorf("held %s, want [b d]", got)
	}
}
