package concentrator

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"sheaf/daemon/datapath/leg"
	"sheaf/daemon/datapath/tunnel"
)

// maxLegs of one router: as many as it may have uplinks.
const maxLegs = 16

// legBook says which legs each router has.
type legBook map[tunnel.PublicKey][]legEntry

// legEntry is one leg of a router.
type legEntry struct {
	uplink string
	key    leg.Key
	number uint16 // of its addresses, 1 to maxSubnet, and no other leg's
}

// legDecision is what becomes of a leg that is wanted.
type legDecision struct {
	leg     legEntry
	refusal error
}

// set makes these the legs of a router. It decides on each in their order, and
// lists the keys that are of no leg any more. An uplink keeps its number.
func (b legBook) set(router tunnel.PublicKey, wanted []tunnel.Leg) (decisions []legDecision, gone []leg.Key) {
	before := b[router]
	delete(b, router)
	var now []legEntry
	for _, w := range wanted {
		one, err := b.admit(now, before, w)
		if err == nil {
			now = append(now, one)
		}
		decisions = append(decisions, legDecision{one, err})
	}
	if len(now) > 0 {
		b[router] = now
	}
	for _, old := range before {
		if !slices.ContainsFunc(now, func(e legEntry) bool { return e.key == old.key }) {
			gone = append(gone, old.key)
		}
	}
	return decisions, gone
}

func (b legBook) admit(now, before []legEntry, w tunnel.Leg) (legEntry, error) {
	one := legEntry{uplink: w.Uplink}
	switch {
	case len(now) >= maxLegs:
		return one, fmt.Errorf("the router has %d legs, which is the most it may", maxLegs)
	case len(w.Key) != len(one.key):
		return one, fmt.Errorf("the key has %d bytes, want %d", len(w.Key), len(one.key))
	case slices.ContainsFunc(now, func(e legEntry) bool { return e.uplink == w.Uplink }):
		return one, errors.New("the uplink has a leg already")
	}
	one.key = leg.Key(w.Key)
	if at := slices.IndexFunc(before, func(e legEntry) bool { return e.uplink == w.Uplink }); at >= 0 {
		one.number = before[at].number
	}
	taken := map[uint16]bool{0: true}
	for _, e := range slices.Concat(append(slices.Collect(maps.Values(b)), now)...) {
		if e.key == one.key {
			return one, errors.New("another leg has the key")
		}
		taken[e.number] = true
	}
	for _, e := range before { // some of these may still come
		taken[e.number] = true
	}
	for n := uint16(1); one.number == 0; n++ {
		switch {
		case n > maxSubnet:
			return one, errors.New("all addresses are taken")
		case !taken[n]:
			one.number = n
		}
	}
	return one, nil
}
