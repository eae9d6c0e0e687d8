package bond

import "time"

// LinkKind says what carries a link.
type LinkKind uint8

const (
	// Datagram links are one QUIC connection over one uplink.
	Datagram LinkKind = iota
	// Stream links are MPTCP sessions over all uplinks.
	Stream
)

func (k LinkKind) String() string {
	if k == Stream {
		return "stream"
	}
	return "datagram"
}

// MarshalText gives "datagram" or "stream".
func (k LinkKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// view is what the choice of links is made from.
type view struct {
	name   string // of the uplink
	kind   LinkKind
	fit    bool
	backup bool
	// delay is how long a packet takes to the other end once the carrier has it,
	// wait how long it waits for the carrier. The delays of all links may be off
	// by the same amount, whatever its sign.
	delay, wait time.Duration
}

func (v view) expected() time.Duration { return v.delay + v.wait }

// rank puts fit links before unfit ones, and among them backups last. Unfit links
// are used when there is nothing else: they were heard not long ago, or the whole
// Bond would count as dead.
func (v view) rank() int {
	rank := 0
	if !v.fit {
		rank += 2
	}
	if v.backup {
		rank++
	}
	return rank
}

// bestRank gives the lowest rank there is.
func bestRank(views []view) int {
	best := 4
	for _, v := range views {
		best = min(best, v.rank())
	}
	return best
}

// chooseBulk gives the link with the earliest expected delivery, -1 if there is
// none. A link whose queue is longer than room is left alone while another has
// room, or the queue of the fastest would grow until it drops packets before the
// next one is used at all; unless that other delivers later than the earliest by
// more than spread, which is how long the far end waits for order.
func chooseBulk(views []view, room, spread time.Duration) int {
	rank := bestRank(views)
	earliest := time.Duration(1<<63 - 1)
	for _, v := range views {
		if v.rank() == rank {
			earliest = min(earliest, v.expected())
		}
	}
	chosen := -1
	for i, v := range views {
		if v.rank() != rank || v.expected()-earliest > spread {
			continue
		}
		if chosen < 0 {
			chosen = i
			continue
		}
		c := views[chosen]
		hasRoom, hadRoom := v.wait <= room, c.wait <= room
		if hasRoom && !hadRoom || hasRoom == hadRoom && v.expected() < c.expected() {
			chosen = i
		}
	}
	return chosen
}

// chooseInteractive gives the two links of different uplinks with the earliest
// expected delivery, second -1 if there is only one, both -1 if there is none.
// Where two uplinks have datagram links these are taken: the kernel may send the
// stream's packets by the very uplink that the other copy takes.
func chooseInteractive(views []view) (first, second int) {
	rank := bestRank(views)
	pick := func(other int, kinds ...LinkKind) int {
		chosen := -1
		for i, v := range views {
			if v.rank() != rank || other >= 0 && (i == other || v.name == views[other].name) {
				continue
			}
			for _, kind := range kinds {
				if v.kind == kind && (chosen < 0 || v.expected() < views[chosen].expected()) {
					chosen = i
				}
			}
		}
		return chosen
	}
	first = pick(-1, Datagram)
	if first >= 0 {
		if second = pick(first, Datagram); second >= 0 {
			return first, second
		}
	}
	first = pick(-1, Datagram, Stream)
	if first < 0 {
		return -1, -1
	}
	return first, pick(first, Datagram, Stream)
}
