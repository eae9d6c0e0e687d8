package bond

import (
	"math"
	"slices"
	"testing"
	"time"
)

func TestCoDel(t *testing.T) {
	const ms = time.Millisecond
	// One packet is taken every 10 ms.
	for _, c := range []struct {
		name    string
		queued  int
		sojourn func(i int) time.Duration
		drops   []int
	}{
		{"below target", 1e6, func(int) time.Duration { return 39 * ms }, nil},
		{"above target, but one packet is left", MaxPacket, func(int) time.Duration { return 100 * ms }, nil},
		{"above target for less than the interval", 1e6, func(i int) time.Duration { return time.Duration(100-i%10*10) * ms }, nil},
		// After the interval, then after 100/√1, 100/√2, 100/√3 … ms.
		{"above target", 1e6, func(int) time.Duration { return 50 * ms }, []int{10, 20, 28, 33, 38, 43}},
		{"recovers", 1e6, func(i int) time.Duration {
			if i > 25 {
				return 0
			}
			return 50 * ms
		}, []int{10, 20}},
		// The second time it goes on with the pace of the first.
		{"soon again", 1e6, func(i int) time.Duration {
			if i == 34 {
				return 0
			}
			return 50 * ms
		}, []int{10, 20, 28, 33, 45}},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := codel{target: 40 * ms, interval: 100 * ms}
			var drops []int
			for i := range 46 {
				if q.drop(c.sojourn(i), time.Hour+time.Duration(i)*10*ms, c.queued) {
					drops = append(drops, i)
				}
			}
			if !slices.Equal(drops, c.drops) {
				t.Errorf("dropped %v, want %v", drops, c.drops)
			}
		})
	}
}

func TestMeter(t *testing.T) {
	run := func(m *meter, now *time.Duration, count int, every time.Duration, backlogged bool) {
		for range count {
			*now += every
			if !backlogged {
				m.idle()
			}
			m.sent(1250, *now)
		}
	}
	near := func(t *testing.T, what string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > want/20 {
			t.Errorf("%s: %.0f bytes/s, want about %.0f", what, got, want)
		}
	}
	m, now := meter{rate: firstRate}, time.Hour
	run(&m, &now, 1000, 20*time.Millisecond, false)
	near(t, "a trickle says nothing", m.rate, firstRate)
	run(&m, &now, 2000, 500*time.Microsecond, true)
	near(t, "20 Mbit/s while backlogged", m.rate, 2.5e6)
	run(&m, &now, 2000, 2*time.Millisecond, true)
	near(t, "5 Mbit/s while backlogged", m.rate, 625e3)
	run(&m, &now, 5000, 250*time.Microsecond, false)
	if m.rate < 4.2e6 || m.rate > 5e6 {
		t.Errorf("40 Mbit/s without backlog: %.0f bytes/s, want nearly 5e6", m.rate)
	}
	before := m.rate
	now += 3 * time.Second
	run(&m, &now, 60, 0, true)
	near(t, "after an interruption", m.rate, before)
}

func TestList(t *testing.T) {
	var l list
	var all []*buffer
	for i := range 5 {
		b := newBuffer(make([]byte, i+1))
		all = append(all, b)
	}
	l.pushLast(all[1])
	l.pushLast(all[2])
	l.pushFirst(all[0])
	l.pushLast(all[3])
	l.pushLast(all[4])
	if l.count != 5 || l.bytes != 15 {
		t.Errorf("%d buffers of %d bytes, want 5 of 15", l.count, l.bytes)
	}
	l.remove(all[2])
	l.remove(all[4])
	var got []int
	for b := l.popFirst(); b != nil; b = l.popFirst() {
		got = append(got, b.length())
	}
	if !slices.Equal(got, []int{1, 2, 4}) || l.first != nil || l.last != nil || l.count != 0 || l.bytes != 0 {
		t.Errorf("got %v, left %+v", got, l)
	}
}
