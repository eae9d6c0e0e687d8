package router

// The path of a measurement to the panel's graphs:
//
//	watch, every 2 s: counters, round trip, loss ─▶ record ─▶ the slot under way, of 10 s
//	and of 5 min ─▶ a sample in a block ─▶ flush, once a minute ─▶ bbolt
//	History ─▶ blocks, those not flushed yet from memory ─▶ a series
//
//	history/             bucket
//	  UPLINK/            bucket, one for each name
//	    f + big-endian number of the hour ─▶ 360 samples of 10 s, a day of them
//	    c + big-endian number of the day  ─▶ 288 samples of 5 min, a month of them
//
// Blocks keep what is written small, and the size fixed: about 220 kB for an uplink.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"sheaf/webui"
)

var historyBucket = []byte("history")

// flushEvery is how much a loss of power takes at most.
const flushEvery = time.Minute

// resolution is one fineness of the history.
type resolution struct {
	letter   byte
	interval time.Duration
	block    int64 // samples in one
	keep     int64 // blocks
}

var resolutions = []resolution{
	{'f', 10 * time.Second, 360, 25},
	{'c', 5 * time.Minute, 288, 32},
}

// sampleSize is that of a stored sample: received and sent in kbit/s, round trip in
// 0.1 ms, loss in 1/10,000, all bits set for what there is not.
const sampleSize = 4 + 4 + 2 + 2

type sample struct {
	rx, tx    uint32
	rtt, loss uint16
}

var noSample = sample{math.MaxUint32, math.MaxUint32, math.MaxUint16, math.MaxUint16}

func (s sample) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, s.rx)
	b = binary.BigEndian.AppendUint32(b, s.tx)
	b = binary.BigEndian.AppendUint16(b, s.rtt)
	return binary.BigEndian.AppendUint16(b, s.loss)
}

func sampleOf(b []byte) sample {
	return sample{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint16(b[8:]), binary.BigEndian.Uint16(b[10:])}
}

// blockKey names a block of an uplink.
type blockKey struct {
	uplink string
	letter byte
	number int64
}

func (k blockKey) bytes() []byte {
	return binary.BigEndian.AppendUint64([]byte{k.letter}, uint64(k.number))
}

// slot is the sample under way.
type slot struct {
	number    int64
	looks     int
	rx, tx    uint64  // bytes
	rtt, loss float64 // sums
	rtts      int
	losses    int
}

func (s *slot) look(rx, tx uint64, rtt, loss *float64) {
	s.looks++
	s.rx += rx
	s.tx += tx
	if rtt != nil {
		s.rtt += *rtt
		s.rtts++
	}
	if loss != nil {
		s.loss += *loss
		s.losses++
	}
}

// history is what uplinks have carried, and how well.
type history struct {
	db *bbolt.DB

	mu      sync.Mutex
	at      time.Time            // of the last look
	last    map[string][2]uint64 // counters, by uplink
	slots   map[string][]slot    // by uplink and resolution
	blocks  map[blockKey][]sample
	flushed time.Time
}

func newHistory(db *bbolt.DB, now time.Time) *history {
	return &history{db: db, last: map[string][2]uint64{}, slots: map[string][]slot{}, blocks: map[blockKey][]sample{}, flushed: now}
}

// record takes one look at the uplinks, and stores what is due.
func (h *history) record(now time.Time, uplinks []webui.UplinkStatus) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	gap := now.Sub(h.at)
	h.at = now
	seen := map[string]bool{}
	for _, u := range uplinks {
		seen[u.Name] = true
		counters := [2]uint64{u.RxBytes, u.TxBytes}
		before, known := h.last[u.Name]
		h.last[u.Name] = counters
		if !known || counters[0] < before[0] || counters[1] < before[1] {
			before = counters // the first look, or the interface was made anew
		}
		if h.slots[u.Name] == nil {
			h.slots[u.Name] = make([]slot, len(resolutions))
		}
		for i, res := range resolutions {
			s := &h.slots[u.Name][i]
			number := now.Unix() / int64(res.interval/time.Second)
			// What was carried since the last look belongs to the slot of that, unless it
			// is long ago, or the clock was set.
			if known && gap >= 0 && gap <= res.interval {
				s.look(counters[0]-before[0], counters[1]-before[1], u.RTTMs, u.Loss)
			}
			if s.number != number {
				if err := h.finish(u.Name, res, *s); err != nil {
					return err
				}
				*s = slot{number: number}
			}
		}
	}
	for name := range h.last {
		if !seen[name] {
			delete(h.last, name)
			delete(h.slots, name)
		}
	}
	if now.Sub(h.flushed).Abs() < flushEvery {
		return nil
	}
	h.flushed = now
	return h.flush(now)
}

// finish puts a slot's sample into its block.
func (h *history) finish(uplink string, res resolution, s slot) error {
	if s.looks == 0 {
		return nil
	}
	key := blockKey{uplink, res.letter, s.number / res.block}
	if h.blocks[key] == nil {
		stored, err := h.stored(key, res)
		if err != nil {
			return err
		}
		h.blocks[key] = stored
	}
	kbps := func(bytes uint64) uint32 {
		return uint32(min(float64(bytes)*8/1000/res.interval.Seconds(), math.MaxUint32-1))
	}
	made := sample{kbps(s.rx), kbps(s.tx), math.MaxUint16, math.MaxUint16}
	if s.rtts > 0 {
		made.rtt = uint16(math.Round(min(s.rtt/float64(s.rtts)*10, math.MaxUint16-1)))
	}
	if s.losses > 0 {
		made.loss = uint16(math.Round(min(s.loss/float64(s.losses), 1) * 10_000))
	}
	h.blocks[key][s.number%res.block] = made
	return nil
}

// stored is a block as the database has it, or an empty one.
func (h *history) stored(key blockKey, res resolution) (block []sample, err error) {
	block = make([]sample, res.block)
	for i := range block {
		block[i] = noSample
	}
	err = h.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(historyBucket)
		if b == nil {
			return nil
		}
		if b = b.Bucket([]byte(key.uplink)); b == nil {
			return nil
		}
		text := b.Get(key.bytes())
		for i := 0; i < len(block) && (i+1)*sampleSize <= len(text); i++ {
			block[i] = sampleOf(text[i*sampleSize:])
		}
		return nil
	})
	return block, err
}

// flush stores the blocks that have changed, and drops those that are too old.
func (h *history) flush(now time.Time) error {
	if len(h.blocks) == 0 {
		return nil
	}
	err := h.db.Update(func(tx *bbolt.Tx) error {
		root, err := tx.CreateBucketIfNotExists(historyBucket)
		if err != nil {
			return err
		}
		for key, block := range h.blocks {
			b, err := root.CreateBucketIfNotExists([]byte(key.uplink))
			if err != nil {
				return err
			}
			text := make([]byte, 0, len(block)*sampleSize)
			for _, s := range block {
				text = s.append(text)
			}
			if err := b.Put(key.bytes(), text); err != nil {
				return err
			}
		}
		return dropOld(root, now)
	})
	if err != nil {
		return fmt.Errorf("storing the uplinks' history: %w", err)
	}
	clear(h.blocks)
	return nil
}

// dropOld deletes blocks from before what is kept, or, of a clock that was wrong, from
// the future, and uplinks that have none left.
func dropOld(root *bbolt.Bucket, now time.Time) error {
	var uplinks, empty [][]byte
	if err := root.ForEachBucket(func(name []byte) error { uplinks = append(uplinks, name); return nil }); err != nil {
		return err
	}
	for _, name := range uplinks {
		b := root.Bucket(name)
		left := 0
		var old [][]byte
		if err := b.ForEach(func(key, _ []byte) error {
			for _, res := range resolutions {
				current := now.Unix() / int64(res.interval/time.Second) / res.block
				if len(key) == 9 && key[0] == res.letter {
					if n := int64(binary.BigEndian.Uint64(key[1:])); n > current-res.keep && n <= current+1 {
						left++
						return nil
					}
				}
			}
			old = append(old, key)
			return nil
		}); err != nil {
			return err
		}
		for _, key := range old {
			if err := b.Delete(key); err != nil {
				return err
			}
		}
		if left == 0 {
			empty = append(empty, name)
		}
	}
	for _, name := range empty {
		if err := root.DeleteBucket(name); err != nil {
			return err
		}
	}
	return nil
}

// series is what was in the time before now, the slot under way excluded.
func (h *history) series(uplink string, res resolution, now time.Time, span time.Duration) (webui.History, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	end := now.Unix() / int64(res.interval/time.Second)
	count := min(int64((span+res.interval-1)/res.interval), res.block*(res.keep-1))
	s := webui.History{Begin: time.Unix((end-count)*int64(res.interval/time.Second), 0).UTC(), IntervalS: int(res.interval / time.Second),
		RxBps: make([]*uint64, count), TxBps: make([]*uint64, count), RTTMs: make([]*float64, count), Loss: make([]*float64, count)}
	var (
		block []sample
		held  = int64(-1)
	)
	for i := range count {
		number := end - count + i
		if n := number / res.block; n != held {
			key := blockKey{uplink, res.letter, n}
			held, block = n, h.blocks[key]
			if block == nil {
				var err error
				if block, err = h.stored(key, res); err != nil {
					return s, err
				}
			}
		}
		one := block[number%res.block]
		if one == noSample {
			continue
		}
		s.RxBps[i], s.TxBps[i] = new(uint64(one.rx)*1000), new(uint64(one.tx)*1000)
		if one.rtt != math.MaxUint16 {
			s.RTTMs[i] = new(float64(one.rtt) / 10)
		}
		if one.loss != math.MaxUint16 {
			s.Loss[i] = new(float64(one.loss) / 10_000)
		}
	}
	return s, nil
}

// end stores what is under way: a restart leaves no gap of a minute.
func (h *history) end(now time.Time) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	for name, slots := range h.slots {
		for i, res := range resolutions {
			errs = append(errs, h.finish(name, res, slots[i]))
		}
	}
	return errors.Join(append(errs, h.flush(now))...)
}

// remember records the uplinks as they have just been measured.
func (r *Router) remember(uplinks []webui.UplinkStatus) {
	if err := r.history.record(time.Now(), uplinks); err != nil {
		r.log.Warn("the history of the uplinks has a gap", "error", err)
	}
}

// History is what an uplink has carried in the last span, in slots of interval.
func (r *Router) History(_ context.Context, name string, interval, span time.Duration) (webui.History, error) {
	known := false
	for _, u := range r.current().Settings.Uplinks {
		known = known || u.Name == name
	}
	if !known {
		return webui.History{}, unknownUplink(name)
	}
	for _, res := range resolutions {
		if res.interval == interval {
			return r.history.series(name, res, time.Now(), span)
		}
	}
	return webui.History{}, &webui.Error{Code: webui.CodeBadRequest, Detail: fmt.Sprintf("there is no history of %v; there is one of 10s and one of 5m0s", interval)}
}
