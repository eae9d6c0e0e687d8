package bond

import (
	"testing"
	"time"
)

func TestChoose(t *testing.T) {
	const ms = time.Millisecond
	link := func(name string, delay, wait int) view { // milliseconds
		return view{name: name, fit: true, delay: time.Duration(delay) * ms, wait: time.Duration(wait) * ms}
	}
	with := func(v view, f func(*view)) view { f(&v); return v }
	backup := func(v view) view { return with(v, func(v *view) { v.backup = true }) }
	unfit := func(v view) view { return with(v, func(v *view) { v.fit = false }) }
	stream := func(delay, wait int) view {
		return with(link("", delay, wait), func(v *view) { v.kind = Stream })
	}
	for _, c := range []struct {
		name                string
		views               []view
		bulk, first, second int
	}{
		{"none", nil, -1, -1, -1},
		{"one", []view{link("a", 10, 0)}, 0, 0, -1},
		{"by delay", []view{link("a", 30, 0), link("b", 10, 0), link("c", 20, 0)}, 1, 1, 2},
		{"by wait", []view{link("a", 10, 15), link("b", 20, 0), link("c", 5, 40)}, 1, 1, 0},
		{"delays below 0", []view{link("a", -5010, 0), link("b", -5030, 0)}, 1, 1, 0},
		{"no room on the fastest", []view{link("a", 10, 21), link("b", 100, 0)}, 1, 0, 1},
		{"room, but much too slow", []view{link("a", 10, 21), link("b", 200, 0)}, 0, 0, 1},
		{"no room anywhere", []view{link("a", 10, 60), link("b", 30, 30)}, 1, 1, 0},
		{"backup waits", []view{backup(link("a", 1, 0)), link("b", 50, 90)}, 1, 1, -1},
		{"backup takes over", []view{backup(link("a", 50, 0)), unfit(link("b", 1, 0))}, 0, 0, -1},
		{"all unfit", []view{unfit(backup(link("a", 1, 0))), unfit(link("b", 10, 0)), unfit(link("c", 20, 0))}, 1, 1, 2},
		{"unfit left", []view{unfit(link("a", 1, 0)), link("b", 100, 0), link("c", 110, 0)}, 1, 1, 2},
		{"stream alone", []view{stream(10, 0)}, 0, 0, -1},
		{"stream beside one", []view{stream(10, 0), link("a", 20, 0)}, 0, 0, 1},
		{"stream beside two", []view{stream(10, 0), link("a", 20, 0), link("b", 30, 0)}, 0, 1, 2},
		{"stream beside one and its old link", []view{stream(10, 0), link("a", 20, 0), link("a", 30, 0)}, 0, 0, 1},
		{"two of one uplink", []view{link("a", 20, 0), link("a", 10, 0)}, 1, 1, -1},
		{"second of another uplink", []view{link("a", 20, 0), link("a", 10, 0), link("b", 90, 0)}, 1, 1, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := chooseBulk(c.views, 20*ms, 150*ms); got != c.bulk {
				t.Errorf("bulk on %d, want %d", got, c.bulk)
			}
			if first, second := chooseInteractive(c.views); first != c.first || second != c.second {
				t.Errorf("interactive on %d and %d, want %d and %d", first, second, c.first, c.second)
			}
		})
	}
}

func TestPace(t *testing.T) {
	timing := Timing{}.withDefaults()
	for _, c := range []struct {
		name string
		use  usage
		want time.Duration
	}{
		{"idle", usage{}, 15 * time.Second},
		{"others in use", usage{inUse: true}, 500 * time.Millisecond},
		{"in use", usage{inUse: true, linkUsed: true}, 100 * time.Millisecond},
		{"backup", usage{inUse: true, backup: true}, 15 * time.Second},
		{"much data", usage{inUse: true, linkUsed: true, busy: true}, 20 * time.Millisecond},
		{"backup in use", usage{inUse: true, backup: true, linkUsed: true}, 100 * time.Millisecond},
		{"just silent", usage{unfit: true, silence: 300 * time.Millisecond, alarmed: true}, 100 * time.Millisecond},
		{"another silent", usage{alarmed: true}, 250 * time.Millisecond},
		{"another silent, in use", usage{alarmed: true, inUse: true, linkUsed: true}, 100 * time.Millisecond},
		{"another silent, backup", usage{alarmed: true, backup: true}, 15 * time.Second},
		{"silent for long", usage{unfit: true, silence: time.Minute, inUse: true}, 500 * time.Millisecond},
		{"silent for long, idle", usage{unfit: true, silence: time.Minute}, 15 * time.Second},
		{"dead", usage{unfit: true, silence: time.Minute, unanswered: true}, 250 * time.Millisecond},
	} {
		if got := timing.pace(c.use); got != c.want {
			t.Errorf("%s: every %v, want %v", c.name, got, c.want)
		}
	}
}
