package bond

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestWindow(t *testing.T) {
	for _, start := range []uint32{0, 1000, 1<<32 - 100, 1<<32 - 1, 1 << 31} {
		w := newWindow(interactiveWindow)
		w.restart(start)
		for _, c := range []struct {
			step int32
			want verdict
		}{
			{0, fresh}, {0, seenBefore}, {2, fresh}, {1, fresh}, {1, seenBefore},
			{500, fresh}, {3, fresh}, {3, seenBefore}, {-400, fresh}, {-459, fresh}, {-460, tooOld},
			{900, fresh}, {500, seenBefore}, {2, seenBefore}, {-60, tooOld}, {499, fresh},
			{5000, fresh}, {900, tooOld}, {4999, fresh}, {4040, tooOld}, {4041, fresh}, {4041, seenBefore},
			{1 << 30, fresh}, {5000, tooOld}, {1<<30 - 1, fresh},
		} {
			if got := w.mark(start + uint32(c.step)); got != c.want {
				t.Fatalf("from %d, %+d: verdict %d, want %d", start, c.step, got, c.want)
			}
		}
	}
}

// arrival of a packet at a lane, and what it lets go.
type arrival struct {
	at       int // ms
	link     int // -1 for the hold of 50 ms being checked
	sequence uint32
	out      []uint32
	verdict  verdict
	late     bool
	short    bool
}

func TestLaneOrder(t *testing.T) {
	links := []*Link{{}, {}, {}}
	timing := Timing{}.withDefaults()
	for _, c := range []struct {
		name     string
		arrivals []arrival
	}{
		{"in order", []arrival{
			{at: 0, sequence: 7, out: []uint32{7}}, {at: 1, sequence: 8, out: []uint32{8}},
		}},
		{"two links", []arrival{
			{at: 0, link: 0, sequence: 0, out: []uint32{0}}, {at: 1, link: 1, sequence: 1, out: []uint32{1}},
			{at: 2, link: 0, sequence: 3}, {at: 3, link: 0, sequence: 4},
			{at: 9, link: 1, sequence: 2, out: []uint32{2, 3, 4}},
		}},
		{"second copies", []arrival{
			{at: 0, sequence: 0, out: []uint32{0}}, {at: 1, link: 1, sequence: 0, verdict: seenBefore},
			{at: 2, link: 0, sequence: 2}, {at: 3, link: 0, sequence: 2, verdict: seenBefore},
			{at: 4, link: 1, sequence: 1, out: []uint32{1, 2}},
		}},
		{"lost on the only link", []arrival{
			{at: 0, sequence: 0, out: []uint32{0}}, {at: 1, sequence: 2, out: []uint32{2}},
		}},
		{"known lost once every link is past it", []arrival{
			{at: 0, link: 0, sequence: 0, out: []uint32{0}}, {at: 0, link: 1, sequence: 1, out: []uint32{1}},
			{at: 1, link: 0, sequence: 3}, {at: 2, link: 0, sequence: 5},
			{at: 3, link: 1, sequence: 4, out: []uint32{3, 4, 5}},
		}},
		{"known lost up to where the slower link is", []arrival{
			{at: 0, link: 0, sequence: 0, out: []uint32{0}}, {at: 0, link: 1, sequence: 1, out: []uint32{1}},
			{at: 1, link: 0, sequence: 3}, {at: 2, link: 0, sequence: 6},
			{at: 3, link: 1, sequence: 4, out: []uint32{3, 4}},
			{at: 4, link: 1, sequence: 5, out: []uint32{5, 6}},
		}},
		{"a link not used lately does not count", []arrival{
			{at: 0, link: 0, sequence: 0, out: []uint32{0}}, {at: 0, link: 1, sequence: 1, out: []uint32{1}},
			{at: 201, link: 0, sequence: 3, out: []uint32{3}},
		}},
		{"hold is over, late one delivered", []arrival{
			{at: 0, link: 0, sequence: 0, out: []uint32{0}}, {at: 0, link: 1, sequence: 1, out: []uint32{1}},
			{at: 10, link: 0, sequence: 3}, {at: 20, link: 0, sequence: 4}, {at: 21, link: 0, sequence: 7},
			{at: 59, link: -1},
			{at: 60, link: -1, out: []uint32{3, 4}},
			{at: 61, link: 1, sequence: 2, out: []uint32{2}, late: true, short: true},
			{at: 62, link: 1, sequence: 2, verdict: seenBefore},
			{at: 63, link: 1, sequence: 5, out: []uint32{5}},
			{at: 71, link: -1, out: []uint32{7}},
			{at: 72, link: 1, sequence: 8, out: []uint32{8}},
		}},
		{"hold of a packet is that of the longest", []arrival{
			{at: 0, link: 0, sequence: 0, out: []uint32{0}}, {at: 0, link: 1, sequence: 1, out: []uint32{1}},
			{at: 0, link: 2, sequence: 2, out: []uint32{2}},
			{at: 10, link: 0, sequence: 9}, {at: 30, link: 1, sequence: 5},
			{at: 60, link: -1, out: []uint32{5, 9}},
		}},
		{"a late one of a link that keeps no order", []arrival{
			{at: 0, sequence: 0, out: []uint32{0}}, {at: 1, sequence: 2, out: []uint32{2}},
			{at: 2, sequence: 1, out: []uint32{1}, late: true},
		}},
		{"too old", []arrival{
			{at: 0, sequence: 10000, out: []uint32{10000}}, {at: 1, sequence: 10000 - bulkWindow, verdict: tooOld},
		}},
		{"silence starts anew, before", []arrival{
			{at: 0, sequence: 100, out: []uint32{100}}, {at: 2001, sequence: 90, out: []uint32{90}}, {at: 2002, sequence: 91, out: []uint32{91}},
		}},
		{"silence starts anew, after", []arrival{
			{at: 0, link: 0, sequence: 100, out: []uint32{100}}, {at: 0, link: 1, sequence: 101, out: []uint32{101}},
			{at: 1, link: 0, sequence: 104},
			{at: 2002, link: 0, sequence: 300, out: []uint32{104, 300}},
		}},
		{"a jump delivers all that is held", []arrival{
			{at: 0, link: 0, sequence: 0, out: []uint32{0}}, {at: 0, link: 1, sequence: 1, out: []uint32{1}},
			{at: 1, link: 0, sequence: 5}, {at: 2, link: 0, sequence: 3},
			{at: 3, link: 0, sequence: 2 + maxHeld, out: []uint32{3, 5, 2 + maxHeld}},
			{at: 4, link: 1, sequence: 3 + maxHeld, out: []uint32{3 + maxHeld}},
		}},
		{"the furthest that is held", []arrival{
			{at: 0, link: 0, sequence: 0, out: []uint32{0}}, {at: 0, link: 1, sequence: 1, out: []uint32{1}},
			{at: 1, link: 0, sequence: 3}, {at: 1, link: 0, sequence: 70}, {at: 1, link: 0, sequence: 1 + maxHeld},
			{at: 2, link: 1, sequence: 2, out: []uint32{2, 3}},
			{at: 51, link: -1, out: []uint32{70, 1 + maxHeld}},
		}},
	} {
		for _, start := range []uint32{0, 1<<32 - 3, 1<<31 - 2} {
			t.Run(c.name, func(t *testing.T) {
				l := newLane(Bulk)
				for i, a := range c.arrivals {
					now := time.Hour + time.Duration(a.at)*time.Millisecond
					var out []*buffer
					var o outcome
					if a.link < 0 {
						out = l.expire(out, now, 50*time.Millisecond)
					} else {
						b := newBuffer(nil)
						b.sequence = start + a.sequence
						out, o = l.order(out, b, links[a.link], now, timing)
					}
					var got []uint32
					for _, b := range out {
						got = append(got, b.sequence-start)
						if b.held {
							t.Errorf("%d was delivered and is held", b.sequence-start)
						}
					}
					if !slices.Equal(got, a.out) || o.verdict != a.verdict || o.late != a.late || o.short != a.short {
						t.Errorf("from %d, arrival %d (%+v) let go %v, %+v", start, i, a, got, o)
					}
				}
			})
		}
	}
}

// TestLaneDeliversEachOnce plays packets of three links with loss, copies and
// reordering: whatever happens, each comes out once, and at most maxHeld wait.
func TestLaneDeliversEachOnce(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	links := []*Link{{}, {}, {}}
	timing := Timing{}.withDefaults()
	for round := range 50 {
		l := newLane(Bulk)
		now := time.Hour
		start := uint32(0) - uint32(random.IntN(2000))
		count := map[uint32]int{}
		given := map[uint32]bool{}
		take := func(out []*buffer) {
			for _, b := range out {
				count[b.sequence]++
			}
		}
		for i := range 4000 {
			now += time.Duration(random.IntN(3000)) * time.Microsecond
			if random.IntN(100) == 0 {
				now += time.Duration(random.IntN(300)) * time.Millisecond
			}
			sequence := start + uint32(i) + uint32(random.IntN(1+round*20)) - uint32(random.IntN(1+round*20))
			b := newBuffer(nil)
			b.sequence = sequence
			out, o := l.order(nil, b, links[random.IntN(3)], now, timing)
			take(out)
			if o.verdict == fresh {
				given[sequence] = true
			}
			take(l.expire(nil, now, 50*time.Millisecond))
			if l.held.count > maxHeld {
				t.Fatalf("%d packets are held", l.held.count)
			}
		}
		take(l.flush(nil))
		for sequence := range given {
			if count[sequence] != 1 {
				t.Fatalf("round %d: %d was delivered %d times", round, sequence-start, count[sequence])
			}
		}
		if len(count) != len(given) || l.held.count != 0 {
			t.Fatalf("round %d: %d packets came, %d were delivered, %d are held", round, len(given), len(count), l.held.count)
		}
		for _, b := range l.ring {
			if b != nil {
				t.Fatalf("round %d: the ring keeps a packet that was delivered", round)
			}
		}
	}
}

func TestJoin(t *testing.T) {
	var halves [maxHalves]half
	const age = 500 * time.Millisecond
	now := time.Hour
	part := func(sequence uint32, second bool, bytes ...byte) (string, int) {
		b, dropped := join(&halves, message{lane: 200, sequence: sequence, first: !second, second: second, packet: bytes}, now, age)
		if b == nil {
			return "", dropped
		}
		return string(b.packet()), dropped
	}
	expect := func(what, got string, dropped int, want string, wantDropped int) {
		t.Helper()
		if got != want || dropped != wantDropped {
			t.Errorf("%s: %q and %d dropped, want %q and %d", what, got, dropped, want, wantDropped)
		}
	}
	got, dropped := part(1, false, 'a', 'b')
	expect("first half", got, dropped, "", 0)
	got, dropped = part(1, false, 'a', 'b')
	expect("first half again", got, dropped, "", 1)
	got, dropped = part(2, true, 'z')
	expect("another packet's second half", got, dropped, "", 0)
	got, dropped = part(1, true, 'c')
	expect("second half", got, dropped, "abc", 0)
	got, dropped = part(2, false, 'x', 'y')
	expect("first half after the second", got, dropped, "xyz", 0)
	part(3, false, bytes.Repeat([]byte{1}, 1000)...)
	got, dropped = part(3, true, bytes.Repeat([]byte{1}, 501)...)
	expect("too long together", got, dropped, "", 1)

	part(4, false, 'a')
	now += age + 1
	got, dropped = part(4, true, 'b')
	expect("too late", got, dropped, "", 1)
	now += age + 1
	if dropped = freeHalves(&halves, now, age); dropped != 1 {
		t.Errorf("%d old halves freed, want 1", dropped)
	}
	for i := range uint32(maxHalves) {
		now++
		got, dropped = part(100+i, false, 'a')
		expect("filling", got, dropped, "", 0)
	}
	got, dropped = part(200, false, 'a')
	expect("one too many", got, dropped, "", 1)
	got, dropped = part(100, true, 'b')
	expect("the oldest was given up for it", got, dropped, "", 1)
	got, dropped = part(200, true, 'b')
	expect("the newest was not", got, dropped, "ab", 0)
}
