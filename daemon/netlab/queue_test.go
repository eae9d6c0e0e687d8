package netlab

import (
	"testing"
	"time"
)

// One frame of 1250 bytes takes 1 ms at 10 Mbit/s.
func TestQueueDecidesByTimeAlone(t *testing.T) {
	const ms = time.Millisecond
	type frame struct {
		arrivedAfter, now time.Duration
		due               time.Duration
		verdict           verdict
	}
	line := Shape{Rate: 10e6, Delay: 20 * ms, Queue: 2 * ms}
	tests := []struct {
		name   string
		shape  Shape
		frames []frame
	}{
		{"an idle line takes the time to send and the delay", line, []frame{
			{5 * ms, 5 * ms, 26 * ms, admit},
			{50 * ms, 50 * ms, 71 * ms, admit},
		}},
		{"frames at once leave one after the other", line, []frame{
			{0, 0, 21 * ms, admit},
			{0, 0, 22 * ms, admit},
		}},
		{"whoever would wait longer than the queue is dropped, and costs nothing", line, []frame{
			{0, 0, 21 * ms, admit}, {0, 0, 22 * ms, admit}, {0, 0, 23 * ms, admit},
			{0, 0, 0, queueFull},
			{1 * ms, 1 * ms, 24 * ms, admit},
			{1 * ms, 1 * ms, 0, queueFull},
		}},
		{"a late look finds the line to have been sending", line, []frame{
			{0, 0, 21 * ms, admit},
			{1 * ms, 5 * ms, 25 * ms, admit}, // left at 2 ms, but nobody could deliver before now
			{1 * ms, 5 * ms, 25 * ms, admit},
			{1 * ms, 5 * ms, 25 * ms, admit},
			{1 * ms, 5 * ms, 25 * ms, admit}, // left at 5 ms: caught up
			{1 * ms, 5 * ms, 26 * ms, admit},
		}},
		{"no rate means no waiting", Shape{Delay: 3 * ms}, []frame{
			{0, 1 * ms, 4 * ms, admit},
			{0, 1 * ms, 4 * ms, admit},
		}},
		{"the default queue is 100 ms", Shape{Rate: 100e3}, []frame{ // 100 ms each
			{0, 0, 100 * ms, admit},
			{0, 0, 200 * ms, admit},
			{0, 0, 0, queueFull},
		}},
		{"certain loss", Shape{Rate: 10e6, Loss: 1}, []frame{
			{0, 0, 0, lost},
			{0, 0, 0, lost},
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			q := newQueue(test.shape, 1, 1)
			for i, f := range test.frames {
				due, verdict := q.offer(f.arrivedAfter, f.now, 1250)
				if due != f.due || verdict != f.verdict {
					t.Errorf("frame %d: due %v, verdict %d; want %v, %d", i, due, verdict, f.due, f.verdict)
				}
			}
		})
	}
}

func TestQueueKeepsOrderWhenTheDelayShrinks(t *testing.T) {
	q := newQueue(Shape{Delay: 50 * time.Millisecond}, 1, 1)
	first, _ := q.offer(0, 0, 100)
	q.shape.Delay = time.Millisecond
	second, _ := q.offer(0, 0, 100)
	if second < first {
		t.Errorf("the second frame is due at %v, before the first at %v", second, first)
	}
}

func TestQueueIsExactOverTime(t *testing.T) {
	// 33 Mbit/s does not divide into whole nanoseconds per frame.
	q := newQueue(Shape{Rate: 33e6, Queue: time.Hour}, 1, 1)
	const frames, size = 100_000, 1514
	var due time.Duration
	for range frames {
		due, _ = q.offer(0, 0, size)
	}
	rate := frames * size * 8 / due.Seconds()
	if rate < 32.99e6 || rate > 33.01e6 {
		t.Errorf("%d frames took %v: %.0f bit/s, want 33e6", frames, due, rate)
	}
}

func TestQueueLosesTheSameFramesForTheSameSeed(t *testing.T) {
	pattern := func(seed uint64) (losses int, which string) {
		q := newQueue(Shape{Loss: 0.1}, seed, 1)
		for range 10_000 {
			_, verdict := q.offer(0, 0, 100)
			if verdict == lost {
				losses++
			}
			which += string(rune('0' + verdict))
		}
		if q.counters.Lost != uint64(losses) {
			t.Errorf("counted %d losses of %d", q.counters.Lost, losses)
		}
		return losses, which
	}
	losses, which := pattern(7)
	if losses < 850 || losses > 1150 {
		t.Errorf("%d of 10000 frames lost at 10 %%", losses)
	}
	if _, again := pattern(7); again != which {
		t.Error("the same seed lost other frames")
	}
	if _, other := pattern(8); other == which {
		t.Error("another seed lost the same frames")
	}
}

func TestQueueInABlackHole(t *testing.T) {
	q := newQueue(Shape{}, 1, 1)
	q.blackHole = true
	if _, verdict := q.offer(0, 0, 100); verdict != blackHoled || q.counters.BlackHoled != 1 {
		t.Errorf("verdict %d, counted %d", verdict, q.counters.BlackHoled)
	}
	q.blackHole = false
	if _, verdict := q.offer(0, 0, 100); verdict != admit {
		t.Errorf("after the black hole: verdict %d", verdict)
	}
}
