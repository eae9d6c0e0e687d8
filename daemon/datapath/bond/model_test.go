package bond

import (
	"math"
	"testing"
	"time"
)

// fifo is a link with a queue, and the model of it.
type fifo struct {
	rate       float64 // bytes per second
	base, skew time.Duration
	free       time.Duration // when the queue will be empty
	bytes      uint64
	model      model
	answers    []answer
}

// answer is one to a probe, on its way.
type answer struct {
	at, left, arrived time.Duration
	mark              probeMark
}

// send returns how long a packet will take, by the two ends' clocks.
func (f *fifo) send(now time.Duration, length int) time.Duration {
	f.foreign(now, length)
	f.bytes += uint64(length)
	f.model.sent(now, length)
	return f.free + f.base + f.skew - now
}

// foreign sends what is not of this end.
func (f *fifo) foreign(now time.Duration, length int) {
	f.free = max(f.free, now) + time.Duration(float64(length)/f.rate*float64(time.Second))
}

// probe sends one, whose answer comes back after the way there and 10 ms.
func (f *fifo) probe(now time.Duration) {
	mark := f.model.mark(now, f.bytes)
	arrived := now + f.send(now, 60)
	f.answers = append(f.answers, answer{arrived - f.skew + 10*time.Millisecond, now, arrived, mark})
}

// hear gives the model the answers that came until now.
func (f *fifo) hear(now time.Duration) {
	for len(f.answers) > 0 && f.answers[0].at <= now {
		a := f.answers[0]
		f.model.answered(a.at, a.left, a.arrived, a.mark)
		f.answers = f.answers[1:]
	}
}

// drive sends at a rate for a while, with a probe every 20 ms. It returns the
// largest error of what the model predicted for the packets after settle.
func (f *fifo) drive(from time.Duration, rate float64, length, settle time.Duration) (worst time.Duration) {
	const size = 1400
	probe := from
	for i := 0; ; i++ {
		now := from + time.Duration(float64(i)*size/rate*float64(time.Second))
		if now-from > length {
			return worst
		}
		f.hear(now)
		if now >= probe {
			f.probe(now)
			probe = now + 20*time.Millisecond
		}
		predicted := f.model.delay(now)
		took := f.send(now, size)
		if f.model.known && now-from > settle {
			worst = max(worst, (predicted - took).Abs())
		}
	}
}

func TestModelPredictsTheQueue(t *testing.T) {
	const mbit = 1e6 / 8
	for _, skew := range []time.Duration{0, -40 * time.Minute, 3 * time.Hour} {
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
			worst := f.drive(now, step.rate, step.length, 300*time.Millisecond)
			if worst > 3*time.Millisecond {
				t.Errorf("skew %v, %s: a prediction is off by %v", skew, step.what, worst)
			}
			now += step.length
		}
		if math.Abs(f.model.capacity/f.rate-1) > .1 {
			t.Errorf("skew %v: capacity %.1f Mbit/s, want 50", skew, f.model.capacity/mbit)
		}
	}
}

// knownFifo is a link that was filled once, so that its capacity is known, and is
// empty at the moment returned.
func knownFifo(mbit float64, base time.Duration) (*fifo, time.Duration) {
	rate := mbit * 1e6 / 8
	f := &fifo{rate: rate, base: base}
	f.drive(time.Hour, 1.2*rate, 500*time.Millisecond, 0)
	now := time.Hour + 2*time.Second
	f.hear(now)
	return f, now
}

func TestModelPredictsBurstsOnAnIdleLink(t *testing.T) {
	// The time before a burst does not make room for it: 40 packets after 60 ms of
	// silence stand in the queue as if they were the first.
	f, now := knownFifo(20, 40*time.Millisecond)
	for range 20 {
		f.probe(now)
		now += 60 * time.Millisecond
		f.hear(now)
		for range 40 {
			if predicted, took := f.model.delay(now)+560*time.Microsecond, f.send(now, 1400); (predicted - took).Abs() > 2*time.Millisecond {
				t.Fatalf("a packet of a burst takes %v, %v was predicted", took, predicted)
			}
		}
		now += 60 * time.Millisecond
		f.hear(now)
	}
}

func TestModelIsPutRightOnce(t *testing.T) {
	// Probes that were under way when the first of them told of a queue tell of the
	// same one.
	f, now := knownFifo(50, 20*time.Millisecond)
	f.probe(now)
	f.hear(now + time.Second)
	now += time.Second
	f.foreign(now, 500_000) // 80 ms
	for range 5 {
		f.probe(now)
		now += time.Millisecond
	}
	f.hear(now + 120*time.Millisecond)
	if f.model.backlog > time.Millisecond {
		t.Errorf("five probes of a queue that is empty since leave %v of it", f.model.backlog)
	}
	if f.model.corrected > 85*time.Millisecond {
		t.Errorf("put right by %v for a queue of 80ms", f.model.corrected)
	}

	// The same with a burst behind it, which is there when the answers come.
	now += time.Second
	f.hear(now)
	f.foreign(now, 500_000)
	for range 5 {
		f.probe(now)
		now += time.Millisecond
	}
	f.send(now, 1_250_000) // 200 ms
	now += 130 * time.Millisecond
	f.hear(now)
	if predicted, took := f.model.delay(now), f.free+f.base-now; (predicted - took).Abs() > 10*time.Millisecond {
		t.Errorf("a packet would take %v, %v is predicted", took, predicted)
	}
}

func TestModelKeepsTheQueueOfOthers(t *testing.T) {
	f, now := knownFifo(50, 10*time.Millisecond)
	f.foreign(now, 250_000) // 40 ms, and kept so
	for i := range 1000 {
		f.foreign(now, 6250)
		if i%100 == 0 {
			f.probe(now)
		}
		now += time.Millisecond
		f.hear(now)
		predicted := f.model.delay(now)
		if took := f.free + f.base - now; i > 100 && (predicted-took).Abs() > 2*time.Millisecond {
			t.Fatalf("%d ms: a packet would take %v, %v is predicted", i, took, predicted)
		}
	}
}

func TestModelDoesNotBelieveOneLateProbe(t *testing.T) {
	var m model
	for i, late := range []int{0, 0, 40, 0, 40, 30} { // ms
		left := time.Hour + time.Duration(i)*100*time.Millisecond
		arrived := left + time.Duration(10+late)*time.Millisecond
		m.answered(arrived, left, arrived, probeMark{})
		want := 10 * time.Millisecond
		if i == 5 { // the second in a row: the queue is there
			want += 30 * time.Millisecond
		}
		if got := m.delay(arrived); got != want {
			t.Errorf("delay %v after probe %d, want %v", got, i, want)
		}
	}
}

func TestModelForgetsWhenAClockWasSet(t *testing.T) {
	var m model
	m.answered(time.Hour, time.Hour, time.Hour+10*time.Millisecond, probeMark{})
	m.answered(time.Hour+time.Second, time.Hour+time.Second, 3*time.Hour, probeMark{bytes: 1000})
	if got, want := m.delay(time.Hour+time.Second), 2*time.Hour-time.Second; got != want {
		t.Errorf("delay %v after the other end was suspended, want %v", got, want)
	}
	m.answered(time.Hour+2*time.Second, time.Hour+500*time.Millisecond, 3*time.Hour, probeMark{bytes: 500}) // overtaken
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
		m.answered(time.Hour+at+delay, time.Hour+at, time.Hour+at+delay, probeMark{})
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
			m.answered(time.Hour+at, time.Hour+at, time.Hour+at+10*time.Millisecond, probeMark{bytes: uint64(at / time.Second)})
		}
		if m.capacity != 0 {
			t.Errorf("capacity %.0f bytes/s from probes alone", m.capacity)
		}
		m.sent(2*time.Hour, 1<<20)
		if got := m.delay(2 * time.Hour); got != 10*time.Millisecond {
			t.Errorf("delay %v for the first packets, want 10ms", got)
		}
	})
	t.Run("a small flow in the queue of others", func(t *testing.T) {
		var m model
		m.answered(time.Hour-time.Second, time.Hour-time.Second, time.Hour-time.Second+10*time.Millisecond, probeMark{})
		for at := time.Duration(0); at < 10*time.Second; at += 100 * time.Millisecond {
			m.answered(time.Hour+at, time.Hour+at, time.Hour+at+50*time.Millisecond, probeMark{bytes: uint64(at/time.Millisecond) * 10}) // 80 kbit/s
		}
		if m.capacity != 0 {
			t.Errorf("capacity %.2f Mbit/s from a flow of 0.08", m.capacity/mbit)
		}
	})
}

// TestHealthExcusesAPause: what came while the process did not run is read only
// after the clock.
func TestHealthExcusesAPause(t *testing.T) {
	timing := Timing{}.withDefaults()
	h := health{fit: true, rtt: 20 * time.Millisecond, silent: time.Second, unanswered: time.Second}
	now := time.Second + timing.UnfitAfter + 50*time.Millisecond
	h.excuse(100 * time.Millisecond)
	if !h.judge(now, timing) {
		t.Errorf("unfit after %v of silence, of which the process did not run for 100 ms", now-time.Second)
	}
	if now += 50 * time.Millisecond; h.judge(now, timing) {
		t.Errorf("fit after %v of silence", now-time.Second-100*time.Millisecond)
	}
}
