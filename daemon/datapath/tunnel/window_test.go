package tunnel

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestWindowSize(t *testing.T) {
	const mbit = 1e6 / 8
	at := func(rate float64, rtt time.Duration) capacity {
		return capacity{rate: rate * mbit, rtt: rtt, shortest: rtt}
	}
	repeat := func(c capacity, n int) (list []capacity) {
		for range n {
			list = append(list, c)
		}
		return list
	}
	for _, test := range []struct {
		name  string
		looks []capacity
		want  string // what is set, kB; - for nothing new
	}{
		{"rate times round trip, more than twice", []capacity{at(80, 30*time.Millisecond)}, "660"},
		{"the longest round trip counts", []capacity{at(100, 80*time.Millisecond)}, "2200"},
		{"and what it is longer than the shortest", []capacity{{rate: 100 * mbit, rtt: 80 * time.Millisecond, shortest: 20 * time.Millisecond}}, "4450"},
		{"and a round trip more for what an uplink loses", []capacity{{rate: 80 * mbit, rtt: 30 * time.Millisecond, shortest: 30 * time.Millisecond, lossy: true}}, "1110"},
		{"a small change is no change", []capacity{at(80, 30*time.Millisecond), at(84, 30*time.Millisecond)}, "660 -"},
		{"more is followed at once", []capacity{at(80, 30*time.Millisecond), at(160, 30*time.Millisecond)}, "660 1320"},
		{"less is believed slowly", append([]capacity{at(160, 30*time.Millisecond)}, repeat(at(80, 30*time.Millisecond), 15)...),
			"1320 - - 1131 - - 970 - - 831 - - 713 - - -"},
		{"never too little", repeat(at(1, 30*time.Millisecond), 2), "524 -"},
		{"nor too much", []capacity{at(10000, 300*time.Millisecond)}, "67108"},
		{"a round trip in the house bounds nothing", []capacity{at(5000, 50*time.Microsecond)}, "27500"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var w window
			var got []string
			for _, c := range test.looks {
				bytes, set := w.size(time.Now(), c)
				if !set {
					got = append(got, "-")
					continue
				}
				got = append(got, fmt.Sprint(bytes/1000))
			}
			if g := strings.Join(got, " "); g != test.want {
				t.Errorf("set %s, want %s", g, test.want)
			}
		})
	}
}

// A subflow that comes back is bounded by the window at first: what it delivers then
// must not keep it there.
func TestWindowOfOneThatJoins(t *testing.T) {
	const mbit = 1e6 / 8
	begin := time.Now()
	c := capacity{rate: 60 * mbit, fastest: 40 * mbit, rtt: 30 * time.Millisecond, shortest: 30 * time.Millisecond, lanes: make([]lane, 2)}
	var alone, joined window
	joined.joined = begin
	got, _ := joined.size(begin.Add(freshTime-time.Millisecond), c)
	if want, _ := alone.size(begin, capacity{rate: (1 + freshTimes) * 40 * mbit, rtt: c.rtt, shortest: c.shortest}); got != want {
		t.Errorf("after it joined %d bytes, want those of %d more that are as fast, %d", got, freshTimes, want)
	}
	var old window
	old.joined = begin
	got, _ = old.size(begin.Add(freshTime), c)
	if want := leastWindow; got != want {
		t.Errorf("later %d bytes, want what was measured, %d", got, want)
	}
}

func TestLosses(t *testing.T) {
	// Each look adds to what two subflows have sent and sent again.
	type step struct {
		sent, again [2]uint32
		short       [2]bool
	}
	both := [2]bool{true, true}
	times := func(n int, s step) (list []step) {
		for range n {
			list = append(list, s)
		}
		return list
	}
	for _, test := range []struct {
		name  string
		steps []step
		want  bool
	}{
		{"nothing is lost", times(50, step{[2]uint32{100, 100}, [2]uint32{}, both}), false},
		{"one in a hundred of one", times(10, step{[2]uint32{100, 100}, [2]uint32{0, 1}, both}), true},
		{"hardly any", times(50, step{[2]uint32{1000, 1000}, [2]uint32{0, 1}, both}), false},
		{"of one that carries little beside another", times(10, step{[2]uint32{2000, 30}, [2]uint32{0, 1}, both}), true},
		{"too few to say", times(3, step{[2]uint32{50, 50}, [2]uint32{0, 2}, both}), false},
		{"twice is not often enough", times(2, step{[2]uint32{100, 200}, [2]uint32{0, 1}, both}), false},
		{"a full queue drops", times(50, step{[2]uint32{100, 100}, [2]uint32{0, 5}, [2]bool{true, false}}), false},
		{"it was so long ago", append(times(10, step{[2]uint32{100, 100}, [2]uint32{0, 1}, both}),
			times(60, step{[2]uint32{100, 100}, [2]uint32{}, both})...), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			var l losses
			var now [2]lane
			got := l.look(nil)
			for _, s := range test.steps {
				for i := range now {
					now[i].sent += s.sent[i]
					now[i].again += s.again[i]
					now[i].short = s.short[i]
				}
				got = l.look([]lane{now[0], now[1]})
			}
			if got != test.want {
				t.Errorf("lossy %v, want %v", got, test.want)
			}
			if l.look([]lane{now[0]}); len(l.before) != 1 {
				t.Errorf("%d subflows remembered after one has gone", len(l.before))
			}
		})
	}
}
