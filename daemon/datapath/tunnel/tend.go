package tunnel

import (
	"cmp"
	"maps"
	"net"
	"slices"
	"time"
)

// The path of the decision to do without subflows that the peer has given up:
//
//	Server.Tend, every second ─▶ the kernel's number of subflows
//	  = its limit ─▶ superfluous ─▶ whoever may end them
//	  has grown ───▶ asking ─▶ keep-alives at short intervals, for a while
//	                        └▶ hopeless ─▶ whoever may end them
//
// A router that loses an uplink opens a subflow over another. Where the word of the
// loss got lost as well, as it does when nothing else was left, the old one stays
// here until its keep-alives or retransmissions are in vain, which takes minutes; at
// 8 of them stock kernels refuse every new one, and the session is lost.
const (
	// roomFor is how many subflows there is to be room for.
	roomFor = 2
	// givenUp is how long nothing has come over a subflow that may be ended.
	givenUp = 2 * time.Second
	// askingTime is how long the subflows of a session are asked after one has come:
	// then something has changed at the router, and others may be gone.
	askingTime = 25 * time.Second
	// settling is how long that is the session's own beginning.
	settling = 10 * time.Second
	// hopelessAfter is how long a subflow is asked, or retransmits, in vain.
	hopelessAfter = 20 * time.Second
)

// askingKeepAlive finds 6 keep-alives unanswered after 20 seconds.
var askingKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 2 * time.Second, Interval: 3 * time.Second, Count: 6}

// asking decides when the subflows of a session are asked for signs of life.
type asking struct {
	begun        time.Time
	subflows     int
	since, until time.Time // zero: they are not asked
}

// look takes the number of subflows. It says whether they are asked from now on, and
// whether that is to be told to the kernel.
func (a *asking) look(now time.Time, subflows int) (ask, set bool) {
	grown := subflows > a.subflows
	a.subflows = subflows
	if a.begun.IsZero() {
		a.begun = now
	}
	before := !a.since.IsZero()
	switch {
	case grown && now.Sub(a.begun) > settling:
		if a.until = now.Add(askingTime); !before {
			a.since = now
		}
		return true, !before
	case before && now.After(a.until):
		a.since, a.until = time.Time{}, time.Time{}
		return false, true
	}
	return before, false
}

// inVain says whether they have been asked for long enough to have answered.
func (a *asking) inVain(now time.Time) bool {
	return !a.since.IsZero() && now.Sub(a.since) >= hopelessAfter
}

// Tend lists the subflows to be ended, so that their sessions can have others, or
// because nobody is at their other ends. Only one goroutine may call it.
func (v *Server) Tend(now time.Time) []Ends {
	v.mu.Lock()
	sessions := slices.Collect(maps.Keys(v.active))
	v.mu.Unlock()
	var list []Ends
	for _, s := range sessions {
		if !s.multipath || s.wire.outOfTree != nil {
			continue
		}
		info, err := s.wire.mptcpInfo()
		if err != nil {
			continue // it has just ended
		}
		ask, set := s.subflowsAsked.look(now, int(info.Subflows))
		if set {
			config := keepAlive
			if ask {
				config = askingKeepAlive
			}
			_ = s.wire.conn.SetKeepAliveConfig(config) // as after minutes, if not
		}
		crowded := info.SubflowsMax > 0 && info.Subflows >= info.SubflowsMax
		pick := superfluous
		if !crowded {
			pick = hopeless
			if !s.subflowsAsked.inVain(now) {
				continue
			}
		}
		subflows, err := s.Subflows()
		if err != nil {
			continue
		}
		for _, f := range pick(subflows) {
			list = append(list, Ends{f.Local, f.Remote})
		}
	}
	return list
}

// hopeless picks the subflows over which nothing has come for long though an answer
// is due, while something came over another.
func hopeless(subflows []Subflow) []Subflow {
	heard := func(f Subflow) bool { return f.Silence < hopelessAfter/2 }
	if !slices.ContainsFunc(subflows, heard) {
		return nil
	}
	return slices.DeleteFunc(subflows, func(f Subflow) bool { return f.Silence < hopelessAfter })
}

// superfluous picks the subflows over which nothing has come for longest. The one
// that was heard last always stays.
func superfluous(subflows []Subflow) []Subflow {
	bySilence := slices.SortedFunc(slices.Values(subflows), func(a, b Subflow) int { return cmp.Compare(b.Silence, a.Silence) })
	n := 0
	for n < min(roomFor, len(bySilence)-1) && bySilence[n].Silence > givenUp {
		n++
	}
	return bySilence[:n]
}

// Tokens are those by which the kernel knows the sessions that have not begun to
// end.
func (v *Server) Tokens() map[uint32]bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return tokens(maps.Keys(v.active))
}
