package tunnel

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// The path of the decision to do without subflows that the peer has given up, when
// there is no room for new ones:
//
//	Server.Crowded: kernel's number of subflows = its limit ─▶ superfluous ─▶ whoever may end them
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
)

// Crowded lists the subflows to be ended so that their sessions can have others.
func (v *Server) Crowded() []Ends {
	v.mu.Lock()
	sessions := slices.Collect(maps.Keys(v.active))
	v.mu.Unlock()
	var list []Ends
	for _, s := range sessions {
		if !s.multipath || s.wire.outOfTree != nil {
			continue
		}
		info, err := s.wire.mptcpInfo()
		if err != nil || info.SubflowsMax == 0 || info.Subflows < info.SubflowsMax {
			continue
		}
		subflows, err := s.Subflows()
		if err != nil {
			continue // it has just ended
		}
		for _, f := range superfluous(subflows) {
			list = append(list, Ends{f.Local, f.Remote})
		}
	}
	return list
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
