package uplink

import (
	"math"
	"slices"
	"time"
)

// The path of a decision, where scheduler firstfit is wanted of a kernel that does
// not have it: what the uplinks carry, and how long it waits there ─▶ Load ─▶
// Filling.Look ─▶ which uplinks are held back as backups.
//
// Uplinks of the same preference are used together. Those with the lowest are
// always; the next ones once all before are full, until these could carry
// everything by themselves again, and to spare.

// FillEvery is how often a Filling is to look.
const FillEvery = 250 * time.Millisecond

const (
	// The next uplinks are used once those before have been full for openAfter, and
	// held back again after everything was below spareShare of what those before
	// were found to carry for closeAfter. What is carried does not depend on
	// which uplinks carry it, so that one does not lead to the other.
	openAfter  = time.Second
	closeAfter = 5 * time.Second
	spareShare = 0.6

	// An uplink is full when it carries fullShare of the most it has lately, and
	// what it carries waits in a queue: its round trip is longer than the least by
	// queueShare of that and leastQueue. Senders that leave no queue fill it when they
	// reach limitShare of what it was found to carry. Radio links have long round
	// trips at any time, so that less than leastLoad, bytes per second, never fills.
	fullShare  = 0.85
	limitShare = 0.95
	queueShare = 0.4
	leastQueue = 8 * time.Millisecond
	leastLoad  = 30_000
	// mostHalved is after how long the most that an uplink has carried counts half:
	// rates change.
	mostHalved = 10 * time.Second
	// smoothing is the share of the newest look in the rates that are compared.
	smoothing = 0.5
)

// Load is what a fit uplink that is on carries.
type Load struct {
	Name       string
	Preference int // lower ones first
	// In bytes per second, since the last look.
	Received, Sent float64
	// RTT is of what travels over it now, MinRTT the least lately; 0 if not known.
	RTT, MinRTT time.Duration
	Loss        float64 // the share that is lost, 0 to 1
}

// Filling decides which uplinks are used. The zero value uses the most preferred.
type Filling struct {
	looked time.Time
	// last is the preference of the last uplinks in use, if others before them are.
	last   int
	full   time.Duration // how long those in use have been full
	spare  time.Time     // since when the last could be spared; zero while not
	filled map[string]*filled
}

// filled is what is known of an uplink, received and sent.
type filled [2]struct {
	rate  float64 // smoothed, bytes per second
	most  float64 // lately
	limit float64 // what it was found to carry when it was full; 0: it never was
	full  bool
}

// Look takes the loads of all uplinks that may be used, and names those that are to
// be held back. One that is not given is forgotten.
func (f *Filling) Look(now time.Time, loads []Load) (held []string) {
	passed := FillEvery
	if !f.looked.IsZero() {
		passed = min(now.Sub(f.looked), 2*FillEvery) // a process that did not run saw nothing
	}
	f.looked = now
	known := f.filled
	f.filled = map[string]*filled{}
	var preferences []int
	for _, l := range loads {
		u := known[l.Name]
		if u == nil {
			u = &filled{}
		}
		u.look(l, passed)
		f.filled[l.Name] = u
		preferences = append(preferences, l.Preference)
	}
	slices.Sort(preferences)
	preferences = slices.Compact(preferences)
	if len(preferences) == 0 {
		return nil
	}
	// An uplink in use may have gone, and one preferred to it come back.
	at, found := slices.BinarySearch(preferences, f.last)
	if !found {
		at = max(at-1, 0)
	}
	before := at
	switch {
	case f.isFull(loads, preferences[at]):
		if f.full += passed; f.full >= openAfter && at+1 < len(preferences) {
			at++
		}
	default:
		f.full = max(f.full-passed, 0)
	}
	switch {
	case at == 0 || !f.isSpare(loads, preferences[at]):
		f.spare = time.Time{}
	case f.spare.IsZero():
		f.spare = now
	case now.Sub(f.spare) >= closeAfter:
		at--
	}
	if at != before {
		f.last, f.full, f.spare = preferences[at], 0, time.Time{}
	}
	for _, l := range loads {
		if l.Preference > preferences[at] {
			held = append(held, l.Name)
		}
	}
	return held
}

func (u *filled) look(l Load, passed time.Duration) {
	queue := l.MinRTT > 0 && l.RTT > l.MinRTT+time.Duration(queueShare*float64(l.MinRTT))+leastQueue
	for i, rate := range []float64{l.Received, l.Sent} {
		d := &u[i]
		d.rate += (rate - d.rate) * smoothing
		d.most = max(d.rate, d.most*math.Exp2(-passed.Seconds()/mostHalved.Seconds()))
		queued := queue && d.rate >= leastLoad && d.rate >= fullShare*d.most
		switch {
		case queued && d.limit > 0:
			d.limit += (d.rate - d.limit) * smoothing
		case queued:
			d.limit = d.rate
		case d.limit > 0:
			d.limit = max(d.limit, d.rate) // it carries that evidently
		}
		d.full = queued || d.limit > 0 && d.rate >= limitShare*d.limit
	}
}

// isFull says whether all uplinks up to a preference are full, in one direction.
func (f *Filling) isFull(loads []Load, last int) bool {
	full := [2]bool{true, true}
	for _, l := range loads {
		if l.Preference <= last {
			for i, d := range f.filled[l.Name] {
				full[i] = full[i] && d.full
			}
		}
	}
	return full[0] || full[1]
}

// isSpare says whether the uplinks before a preference could carry what all do. A
// direction in which they were never full was not why the others are used.
func (f *Filling) isSpare(loads []Load, last int) bool {
	var sum, limit [2]float64
	for _, l := range loads {
		for i, d := range f.filled[l.Name] {
			sum[i] += d.rate
			if l.Preference < last {
				limit[i] += d.limit
			}
		}
	}
	for i := range sum {
		if limit[i] > 0 && sum[i] >= spareShare*limit[i] {
			return false
		}
	}
	return true
}
