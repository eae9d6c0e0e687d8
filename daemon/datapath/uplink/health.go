package uplink

import (
	"math"
	"time"
)

// The path of a decision: what the tunnel's own traffic says of an uplink's way
// to the concentrator ─▶ (Watch ─▶) Signs ─▶ Health.Judge ─▶ silent or not ─▶
// Status.Fit.
//
// Only the concentrator is asked, never a third party: it may answer while the
// concentrator does not, and the other way round.

// AskEvery is how often the concentrator is asked for a connection over a silent
// uplink.
const AskEvery = 250 * time.Millisecond

// An uplink that falls silent again and again is dampened as a flapping route is
// (RFC 2439): each fall is a penalty of 1, which halves every halfLife. With more
// than suppress of it, the uplink has to answer for a while before it is used
// again: for firstTrial, doubling with each further penalty of 1, up to lastTrial.
// One fall in eight seconds is let pass, one in five is not.
const (
	halfLife   = 8 * time.Second
	suppress   = 2.5
	firstTrial = time.Second // longer than one answer counts
	lastTrial  = 15 * time.Second
)

// Signs are what is known of an uplink's way to the concentrator at a moment.
type Signs struct {
	// Carries: packets come and go over it.
	Carries bool
	// Heard is when its carrier of packets last heard the concentrator.
	Heard time.Time
	// SilentSince is when its carrier of packets was first asked in vain; zero if
	// it answers, or if there is none.
	SilentSince time.Time
	// QuietSince is since when the steady traffic on it has ceased, by Watch; zero
	// if it has not.
	QuietSince time.Time
	// Answered is when the concentrator last accepted a connection over it.
	Answered time.Time
	// Others: the concentrator was heard over another uplink when it could have
	// answered over this one. Where it was not, it may be the concentrator that
	// is silent.
	Others bool
}

// Health decides whether an uplink that the kernel finds nothing wrong with is
// silent all the same. The zero value is of an uplink that was never silent.
type Health struct {
	since   time.Time // it is silent since; zero if it is not
	alive   time.Time // since when it answers again
	penalty float64   // as it was at the last fall
	fell    time.Time // the last fall
}

// Judge takes new signs and says since when the uplink is silent, zero if it is
// not.
func (h *Health) Judge(now time.Time, s Signs) time.Time {
	if h.since.IsZero() {
		switch {
		case !s.QuietSince.IsZero():
			h.fall(now, s.QuietSince)
		case s.Others && !s.Carries && !s.SilentSince.IsZero() && !s.Answered.After(s.SilentSince):
			h.fall(now, s.SilentSince)
		}
		return h.since
	}
	// An answer counts until the one after the next would be there.
	lately := func(t time.Time) bool { return t.After(h.since) && now.Sub(t) <= 2*AskEvery }
	switch {
	case !(s.Carries && lately(s.Heard)) && !lately(s.Answered):
		h.alive = time.Time{}
	case h.alive.IsZero():
		h.alive = now
	}
	if !h.alive.IsZero() && now.Sub(h.alive) >= h.trial() {
		h.since = time.Time{}
	}
	return h.since
}

func (h *Health) fall(now, since time.Time) {
	h.penalty = 1 + h.penalty*math.Exp2(-now.Sub(h.fell).Seconds()/halfLife.Seconds())
	h.since, h.alive, h.fell = since, time.Time{}, now
}

// trial is how long the uplink must answer before it is used again.
func (h *Health) trial() time.Duration {
	if h.penalty <= suppress {
		return 0
	}
	return time.Duration(min(float64(firstTrial)*math.Exp2(h.penalty-suppress), float64(lastTrial)))
}
