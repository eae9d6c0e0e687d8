package bond

import (
	"math"
	"testing"
	"time"
)

// fifo is a link with a queue, as a model sees it.
type fifo struct {
	rate       float64 // bytes per second
	base, skew time.Duration
	free       time.Duration // when the queue will be empty
	bytes      uint64
}

// send returns when a packet arrives, by the receiver's clock.
func (f *fifo) send(now time.Duration, length int) time.Duration {
	f.free = max(f.free, now) + time.Duration(float64(length)/f.rate*float64(time.Second))
	f.bytes += uint64(length)
	return f.free + f.base + f.skew
}

// drive sends at a rate for a while, with a probe every 20 ms whose answer comes
// back after the way there and 10 ms. It returns the largest error of what the
// model predicted for the packets after settle.
func drive(m *model, f *fifo, from time.Duration, rate float64, length, settle time.Duration) (worst time.Duration) {
	type answer struct {
		at, left, arrived time.Duration
		bytes             uint64
	}
	var answers []answer
	const size = 1400
	probe := from
	for at := 0; ; at++ {
		now := from + time.Duration(float64(at)*size/rate*float64(time.Second))
		if now-from > length {
			return worst
		}
		for len(answers) > 0 && answers[0].at <= now {
			m.answered(answers[0].left, answers[0].arrived, answers[0].bytes)
			answers = answers[1:]
		}
		if now >= probe {
			before := f.bytes
			arrived := f.send(now, 60)
			answers = append(answers, answer{arrived - f.skew + 10*time.Millisecond, now, arrived, before})
			probe = now + 20*time.Millisecond
		}
		predicted := m.delay(now, f.bytes)
		arrived := f.send(now, size)
		if m.known && now-from > settle {
			worst = max(worst, (predicted - (arrived - now)).Abs())
		}
	}
}

func TestModelPredictsTheQueue(t *testing.T) {
	const mbit = 1e6 / 8
	for _, skew := range []time.Duration{0, -40 * time.Minute, 3 * time.Hour} {
		var m model
		f := &fifo{rate: 50 * mbit, base: 10 * time.Millisecond, skew: skew}
		now := time.Hour
		for _, step := range []struct {
			what   string
			rate   float64
			length time.Duration
		}{
			{"below the rate", 20 * mbit, time.Second},
			{"above it: the queue grows", 60 * mbit, 500 * time.Millisecond},
			{"below it: the queue empties", 30 * mbit, time.Second},
			{"far above it", 90 * mbit, 100 * time.Millisecond},
			{"empties again", 10 * mbit, time.Second},
		} {
			worst := drive(&m, f, now, step.rate, step.length, 300*time.Millisecond)
			if worst > 6*time.Millisecond {
				t.Errorf("skew %v, %s: a prediction is off by %v", skew, step.what, worst)
			}
			now += step.length
		}
		if math.Abs(m.capacity/f.rate-1) > .1 {
			t.Errorf("skew %v: capacity %.1f Mbit/s, want 50", skew, m.capacity/mbit)
		}
	}
}

func TestModelWithoutPredictionWouldBeLate(t *testing.T) {
	// What the model adds: the answer of a round trip ago knows nothing of what
	// was sent since.
	const mbit = 1e6 / 8
	m := model{}
	m.answered(time.Second, time.Second+10*time.Millisecond, 0)
	m.capacity = 50 * mbit
	now := time.Second + 30*time.Millisecond
	const sent = 500_000 // 80 ms at that rate
	if got, want := m.delay(now, sent), 60*time.Millisecond; (got - want).Abs() > time.Millisecond {
		t.Errorf("delay %v after a burst, want about %v", got, want)
	}
	if got := m.delay(now+time.Second, sent); got != 10*time.Millisecond {
		t.Errorf("delay %v once the queue is empty, want 10ms", got)
	}
}

func TestModelForgetsWhenAClockWasSet(t *testing.T) {
	var m model
	m.answered(time.Hour, time.Hour+10*time.Millisecond, 0)
	m.answered(time.Hour+time.Second, 3*time.Hour, 1000)
	if got, want := m.delay(time.Hour+time.Second, 1000), 2*time.Hour-time.Second; got != want {
		t.Errorf("delay %v after the other end was suspended, want %v", got, want)
	}
	m.answered(time.Hour+500*time.Millisecond, 3*time.Hour, 500) // overtaken
	if m.left != time.Hour+time.Second {
		t.Error("an answer that was overtaken was taken for the newest")
	}
}

func TestModelFollowsALongerWay(t *testing.T) {
	// The least delay of more than a minute ago counts no more.
	var m model
	for at := time.Duration(0); at < 2*time.Minute; at += time.Second {
		delay := 10 * time.Millisecond
		if at > 40*time.Second {
			delay = 50 * time.Millisecond
		}
		m.answered(time.Hour+at, time.Hour+at+delay, 0)
	}
	if m.base() != 50*time.Millisecond {
		t.Errorf("the empty queue's delay is %v, want 50ms", m.base())
	}
}

func TestModelLearnsOnlyFromWhatFillsTheLink(t *testing.T) {
	const mbit = 1e6 / 8
	t.Run("probes of an idle link", func(t *testing.T) {
		var m model
		for at := time.Duration(0); at < 5*time.Minute; at += 15 * time.Second {
			m.answered(time.Hour+at, time.Hour+at+10*time.Millisecond, uint64(at/time.Second))
		}
		if m.capacity != 0 {
			t.Errorf("capacity %.0f bytes/s from probes alone", m.capacity)
		}
		if got := m.delay(2*time.Hour, 1<<20); got != 10*time.Millisecond {
			t.Errorf("delay %v for the first packets, want 10ms", got)
		}
	})
	t.Run("a small flow in the queue of others", func(t *testing.T) {
		var m model
		m.answered(time.Hour-time.Second, time.Hour-time.Second+10*time.Millisecond, 0)
		for at := time.Duration(0); at < 10*time.Second; at += 100 * time.Millisecond {
			m.answered(time.Hour+at, time.Hour+at+50*time.Millisecond, uint64(at/time.Millisecond)*10) // 80 kbit/s
		}
		if m.capacity != 0 {
			t.Errorf("capacity %.2f Mbit/s from a flow of 0.08", m.capacity/mbit)
		}
	})
}
