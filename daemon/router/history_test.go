package router

import (
	"math"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"sheaf/webui"
)

// recorder drives a history by a clock and a counter of its own.
type recorder struct {
	t   *testing.T
	db  *bbolt.DB
	h   *history
	now time.Time
	rx  uint64
}

func newRecorder(t *testing.T) *recorder {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(t.TempDir(), "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	r := &recorder{t: t, db: db, now: time.Unix(1_800_000_000, 0)} // where slots of both resolutions begin
	r.start()
	return r
}

// start begins as the daemon does, with a look.
func (r *recorder) start() {
	r.t.Helper()
	r.h = newHistory(r.db, r.now)
	r.look()
}

func (r *recorder) look() {
	r.t.Helper()
	if err := r.h.record(r.now, []webui.UplinkStatus{{Name: "dsl", RxBytes: r.rx, TxBytes: r.rx / 2, RTTMs: new(12.5), Loss: new(0.01)}}); err != nil {
		r.t.Fatal(err)
	}
}

// carries lets the uplink carry so many Mbit/s for a while.
func (r *recorder) carries(mbps uint64, d time.Duration) {
	r.t.Helper()
	for end := r.now.Add(d); r.now.Before(end); {
		r.now = r.now.Add(measureEvery)
		r.rx += mbps * 1_000_000 / 8 * uint64(measureEvery/time.Second)
		r.look()
	}
}

// want compares the last slots: Mbit/s, or - for nothing.
func (r *recorder) want(when string, res resolution, want string) {
	r.t.Helper()
	s, err := r.h.series("dsl", res, r.now, time.Duration(len(want))*res.interval)
	if err != nil {
		r.t.Fatal(err)
	}
	got := ""
	for i, rx := range s.RxBps {
		if rx == nil {
			got += "-"
			if s.TxBps[i] != nil || s.RTTMs[i] != nil || s.Loss[i] != nil {
				r.t.Errorf("%s: slot %d has half of its values", when, i)
			}
			continue
		}
		got += string(rune('0' + int(math.Round(float64(*rx)/1e6))))
		if tx := *s.TxBps[i]; tx > *rx/2 || tx+1000 < *rx/2 || *s.RTTMs[i] != 12.5 || *s.Loss[i] != 0.01 {
			r.t.Errorf("%s: slot %d: %d and %d bit/s, %v ms, %v", when, i, *rx, tx, *s.RTTMs[i], *s.Loss[i])
		}
	}
	if got != want || s.Begin.Unix() != r.now.Truncate(res.interval).Unix()-int64(len(want)*s.IntervalS) {
		r.t.Errorf("%s: %s from %v, want %s", when, got, s.Begin, want)
	}
}

func (r *recorder) blocks() (n int) {
	r.t.Helper()
	if err := r.db.View(func(tx *bbolt.Tx) error {
		if root := tx.Bucket(historyBucket); root != nil && root.Bucket([]byte("dsl")) != nil {
			n = root.Bucket([]byte("dsl")).Stats().KeyN
		}
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	return n
}

func TestHistory(t *testing.T) {
	r := newRecorder(t)
	fine, coarse := resolutions[0], resolutions[1]
	r.carries(4, 30*time.Second)
	r.carries(8, 30*time.Second)
	r.want("a minute", fine, "--444888")

	// What is stored each minute outlives a loss of power, the rest an end.
	r.carries(3, 20*time.Second)
	held := r.h
	r.h = newHistory(r.db, r.now)
	r.want("after a loss of power", fine, "444888--")
	r.h = held
	r.carries(6, 10*time.Second)
	if err := r.h.end(r.now); err != nil {
		t.Fatal(err)
	}
	r.now = r.now.Add(20 * time.Second)
	r.rx = 0
	r.start()
	r.carries(2, 20*time.Second)
	r.want("after an end and a start", fine, "444888336--22")

	// Interfaces that are made anew and clocks that jump make no peaks.
	r.rx = 0
	r.carries(2, 20*time.Second)
	r.now = r.now.Add(time.Hour)
	r.rx += 1e12
	r.look()
	r.carries(5, 20*time.Second)
	r.want("after a jump", fine, "---55")
	r.now = r.now.Add(-time.Minute)
	r.look()
	r.carries(7, 10*time.Second)
	r.want("after a jump back", fine, "--7")

	r.now = r.now.Truncate(coarse.interval).Add(coarse.interval)
	r.start()
	r.carries(9, 15*time.Minute)
	r.want("coarse", coarse, "-999")

	// A day later the fine history is gone, a month later all of it.
	r.now = r.now.Add(26 * time.Hour)
	r.look()
	r.carries(1, 2*time.Minute)
	r.want("fine, a day later", fine, "----111111111111")
	r.now = r.now.Add(-2*time.Minute - 26*time.Hour)
	r.want("coarse, a day later", coarse, "999")
	r.want("fine, of a day ago", fine, "------")
	r.now = r.now.Add(40 * 24 * time.Hour)
	for range 3 {
		if err := r.h.record(r.now, []webui.UplinkStatus{{Name: "lte", RxBytes: 1}}); err != nil {
			t.Fatal(err)
		}
		r.now = r.now.Add(flushEvery / 6)
	}
	r.now = r.now.Add(flushEvery)
	if before := r.blocks(); before == 0 {
		t.Error("nothing is stored")
	}
	if err := r.h.record(r.now, []webui.UplinkStatus{{Name: "lte", RxBytes: 1}}); err != nil {
		t.Fatal(err)
	}
	if n := r.blocks(); n != 0 {
		t.Errorf("of an uplink that is no more %d blocks are kept after a month", n)
	}
}
