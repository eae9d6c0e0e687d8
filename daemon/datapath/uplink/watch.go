package uplink

import (
	"maps"
	"time"
)

// The path of a decision: what is heard over each uplink while flows fill them
// ─▶ Watch.Look ─▶ quiet since ─▶ Signs ─▶ Health.

// WatchEvery is how often a Watch is to look.
const WatchEvery = 10 * time.Millisecond

// Steady is how long an uplink on which something always comes is silent at most:
// three of the probes that leave every 20 ms, the detection multiplier that is
// customary with BFD (RFC 5880).
const Steady = 40 * time.Millisecond

// Tick is the kernel's, at its slowest: a subflow cannot say better than that when
// it last heard something.
const Tick = 10 * time.Millisecond

const (
	// leastQuiet and mostQuiet bound the silence that is one too many; between them
	// it is half as much again as the longest of the last quietMemory to twice that.
	leastQuiet  = 60 * time.Millisecond
	mostQuiet   = 300 * time.Millisecond
	quietMemory = 10 * time.Second
	// steadyLooks in a row must have found something new.
	steadyLooks = 10
)

// Heard is what came over an uplink.
type Heard struct {
	Last time.Time     // when something last did
	RTT  time.Duration // the least lately
}

// Watch finds uplinks over which things came all the time and have ceased to,
// sooner than any timeout could. It counts only time in which the concentrator
// was heard over another uplink, and in which this process was running. The zero
// value is ready.
type Watch struct {
	looked  time.Time
	uplinks map[string]*watched
}

type watched struct {
	heard  time.Time
	steady int           // looks in a row
	quiet  time.Duration // counted since heard
	// The longest that quiet was before something came, of this quietMemory and
	// of the one before.
	longest, longestBefore time.Duration
	since                  time.Time
}

// Look takes what was heard over each uplink, and says which have become quiet,
// and since when. An uplink that is not given is forgotten.
func (w *Watch) Look(now time.Time, heard map[string]Heard) map[string]time.Time {
	// A process that did not run hears nothing either.
	passed := min(now.Sub(w.looked), 2*WatchEvery)
	w.looked = now
	if w.uplinks == nil {
		w.uplinks = map[string]*watched{}
	}
	maps.DeleteFunc(w.uplinks, func(name string, _ *watched) bool { _, ok := heard[name]; return !ok })
	quiet := map[string]time.Time{}
	for name, h := range heard {
		u := w.uplinks[name]
		if u == nil {
			u = &watched{heard: h.Last, since: now}
			w.uplinks[name] = u
			continue
		}
		if h.Last.Sub(u.heard) > Tick {
			u.remember(now)
			u.heard, u.quiet = h.Last, min(max(now.Sub(h.Last), 0), passed)
		} else if witness, ok := liveliest(now, heard, name); ok {
			u.quiet += passed
			// After a pause of the concentrator itself, what comes the longer way
			// comes later.
			if u.steady >= steadyLooks && u.quiet >= u.limit()+max(0, h.RTT-witness.RTT)/2 {
				quiet[name] = u.heard
				u.steady = 0
			}
		}
		switch {
		case now.Sub(h.Last) <= Steady:
			u.steady++
		case u.steady < steadyLooks:
			u.steady = 0
		}
	}
	return quiet
}

// liveliest is the uplink of least delay, except the named one, over which
// something came just now.
func liveliest(now time.Time, heard map[string]Heard, except string) (least Heard, ok bool) {
	for name, h := range heard {
		if name != except && now.Sub(h.Last) <= Steady && (!ok || h.RTT < least.RTT) {
			least, ok = h, true
		}
	}
	return least, ok
}

// remember notes how long it was quiet, if that was no outage.
func (u *watched) remember(now time.Time) {
	if u.quiet > mostQuiet {
		return
	}
	if now.Sub(u.since) > quietMemory {
		u.longest, u.longestBefore, u.since = 0, u.longest, now
	}
	u.longest = max(u.longest, u.quiet)
}

func (u *watched) limit() time.Duration {
	return min(max(max(u.longest, u.longestBefore)*3/2+Tick, leastQuiet), mostQuiet)
}
