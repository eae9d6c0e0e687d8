package uplink

import "time"

// The path of a decision: subflows seen, connections tried over the uplink alone ─▶
// Stripping ─▶ a leg, or none.
//
// That nothing joins over an uplink has many causes. A connection that asked for
// MPTCP, lost no SYN and fell back to plain TCP has one.

const (
	// notJoined is how long sessions may be without a subflow over an uplink before
	// it is tried.
	notJoined = 3 * time.Second
	// strippedInARow connections that fell back make it certain.
	strippedInARow = 2
	// An uplink is tried again stripAgain after it fell back, stripDoubted after it
	// did not, or after the attempt failed, and stripRetry while it is known to strip.
	stripAgain   = 250 * time.Millisecond
	stripDoubted = 20 * time.Second
	stripRetry   = 30 * time.Second
)

// Stripping decides whether something on an uplink's path removes the options of
// MPTCP. The zero value is of an uplink of which nothing is known.
type Stripping struct {
	since    time.Time // it is looked at since
	tried    time.Time
	fellBack int // in a row
	strips   bool
}

// Strips says whether it is known to.
func (s *Stripping) Strips() bool { return s.strips }

// Due says whether to try MPTCP over the uplink now. joined is when a session was
// last seen with a subflow over it.
func (s *Stripping) Due(now, joined time.Time) bool {
	if s.since.IsZero() {
		s.since = now
	}
	switch {
	case s.strips:
		return now.Sub(s.tried) >= stripRetry
	case s.fellBack > 0:
		return now.Sub(s.tried) >= stripAgain
	}
	return now.Sub(joined) >= notJoined && now.Sub(s.since) >= notJoined && now.Sub(s.tried) >= stripDoubted
}

// Tried notes what became of an attempt: MPTCP passed, or the connection fell back.
func (s *Stripping) Tried(now time.Time, passed bool) {
	s.tried = now
	if passed {
		s.fellBack, s.strips = 0, false
		return
	}
	s.fellBack++
	s.strips = s.fellBack >= strippedInARow
}

// Failed notes an attempt that says nothing.
func (s *Stripping) Failed(now time.Time) { s.tried = now }
