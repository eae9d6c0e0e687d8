package uplink

import (
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestWatch draws what each uplink hears, a look every 10 ms: x something, . nothing,
// | the process did not run for 200 ms before this look (and something came). The
// rest after the steady beginning of 200 ms is drawn, and at which look of it which
// uplink is found quiet.
func TestWatch(t *testing.T) {
	type series map[string]string
	far := map[string]time.Duration{"a": 20 * time.Millisecond, "b": 20 * time.Millisecond, "far": 120 * time.Millisecond}
	for _, test := range []struct {
		name   string
		before string // the beginning, if not steady
		signs  series
		want   string
	}{
		{"all is well", "", series{"a": "x.x.x.x.x.x.x.x.", "b": ".x.x.x.x.x.x.x.x"}, ""},
		{"one falls silent", "", series{"a": "................", "b": "x.x.x.x.x.x.x.x."}, "a@5"},
		{"the other does", "", series{"a": "x.x.x.x.x.x.x.x.", "b": "................"}, "b@5"},
		{"it is told once", "", series{"a": "................................", "b": "x.x.x.x.x.x.x.x.x.x.x.x.x.x.x.x."}, "a@5"},
		{"all do: the concentrator, or this machine's only way", "", series{"a": "................", "b": "................"}, ""},
		{"the concentrator pauses", "", series{"a": "............x.x.x.", "b": ".............x.x.x"}, ""},
		{"and is heard the long way later", "", series{"a": "............x.x.x.x.", "far": "...............x.x.x"}, ""},
		{"silent the long way", "", series{"a": "x.x.x.x.x.x.x.x.", "far": "................"}, "far@10"},
		{"this process pauses", "", series{"a": "x.|x.x.x", "b": "...x.x.x"}, ""},
		{"an uplink that stutters is given more time", "....x....x....x....x", series{"a": "............", "b": "x.x.x.x.x.x."}, "a@7"},
		{"after a false alarm too", "x.x.x.x.x.x.x.x.x.x.........x.x.x.x.x.x.x.", series{"a": "................................", "b": "x.x.x.x.x.x.x.x.x.x.x.x.x.x.x.x."}, "a@-1 a@14"},
		{"but not after an outage", "x.x.x.x.x.x.x.x.x.x.....................................x.x.x.x.x.x.x.", series{"a": "................", "b": "x.x.x.x.x.x.x.x."}, "a@-1 a@5"},
		{"nothing came steadily before", "..........", series{"a": "................", "b": "x.x.x.x.x.x.x.x."}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			var w Watch
			now := time.Unix(1000, 0)
			heard := map[string]Heard{}
			for name := range test.signs {
				heard[name] = Heard{Last: now, RTT: far[name]}
			}
			var found []string
			look := func(at int, sign func(name string) byte) {
				now = now.Add(WatchEvery)
				for name, h := range heard {
					if sign(name) == '|' {
						now = now.Add(200 * time.Millisecond)
					}
					if sign(name) != '.' {
						h.Last = now
						heard[name] = h
					}
				}
				for name, since := range w.Look(now, heard) {
					if since.After(now) || now.Sub(since) < leastQuiet {
						t.Errorf("%s is quiet since %v", name, now.Sub(since))
					}
					found = append(found, name+"@"+strconv.Itoa(at))
				}
			}
			beginning := "x.x.x.x.x.x.x.x.x.x."
			for i := range max(len(beginning), len(test.before)) {
				look(-1, func(name string) byte {
					if name == "a" && test.before != "" {
						return (test.before + ".")[min(i, len(test.before))]
					}
					return beginning[i%len(beginning)]
				})
			}
			length := 0
			for _, s := range test.signs {
				length = max(length, len(s))
			}
			for i := range length {
				look(i+1, func(name string) byte { return test.signs[name][i] })
			}
			if got := strings.Join(found, " "); got != test.want {
				t.Errorf("found %q, want %q", got, test.want)
			}
		})
	}
}
