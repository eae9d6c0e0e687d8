package bond

import "time"

// Timing is when things happen. Zero fields have the values that are given here.
type Timing struct {
	// ProbeBusy is the time between probes of a link that carries much data, 20 ms.
	ProbeBusy time.Duration
	// ProbeActive is the time between probes of a link that was sent data within
	// the last second, ProbeInUse of one that was not while others were,
	// ProbeIdle when the Bond had no packets for IdleAfter, and of backups that
	// are not used. 100 ms, 500 ms, 15 s, which is 30 MB a month; 10 s.
	ProbeActive, ProbeInUse, ProbeIdle, IdleAfter time.Duration
	// ProbeSize is the time between probes of full size on a datagram link in use,
	// 1 s.
	ProbeSize time.Duration
	// ProbeAlarmed is the longest time between probes of any link while one is
	// silent. 250 ms.
	ProbeAlarmed time.Duration
	// A link is unfit when it was silent, though probed, for four times its
	// round-trip time and at least UnfitAfter; when it is heard but answers no
	// probe, which is how an uplink that fails in one direction looks, for three
	// times as long. 250 ms.
	UnfitAfter time.Duration
	// The Bond is dead when all links were silent, though probed, for DeadAfter.
	// 1.5 s.
	DeadAfter time.Duration

	// InteractiveAge and BulkAge are how long a packet may wait for a carrier.
	// 100 ms and 200 ms.
	InteractiveAge, BulkAge time.Duration
	// CoDelTarget and CoDelInterval are those of RFC 8289. 40 ms and 100 ms: more
	// than the RFC's 5 ms, as a mobile uplink's carrier takes packets in bursts of
	// tens of milliseconds.
	CoDelTarget, CoDelInterval time.Duration

	// MinHold and MaxHold bound how long a bulk packet waits for those before it.
	// 5 ms and 150 ms.
	MinHold, MaxHold time.Duration
	// LaneRecent is how long a link counts as used by a lane after a packet.
	// 200 ms.
	LaneRecent time.Duration
	// LaneSilence is after how long without packets a lane starts at whatever
	// comes. 2 s.
	LaneSilence time.Duration
	// ReassemblyAge is how long half a packet waits for the other. 500 ms.
	ReassemblyAge time.Duration
}

func (t Timing) withDefaults() Timing {
	set := func(field *time.Duration, value time.Duration) {
		if *field <= 0 {
			*field = value
		}
	}
	set(&t.ProbeBusy, 20*time.Millisecond)
	set(&t.ProbeActive, 100*time.Millisecond)
	set(&t.ProbeInUse, 500*time.Millisecond)
	set(&t.ProbeIdle, 15*time.Second)
	set(&t.IdleAfter, 10*time.Second)
	set(&t.ProbeSize, time.Second)
	set(&t.ProbeAlarmed, 250*time.Millisecond)
	set(&t.UnfitAfter, 250*time.Millisecond)
	set(&t.DeadAfter, 1500*time.Millisecond)
	set(&t.InteractiveAge, 100*time.Millisecond)
	set(&t.BulkAge, 200*time.Millisecond)
	set(&t.CoDelTarget, 40*time.Millisecond)
	set(&t.CoDelInterval, 100*time.Millisecond)
	set(&t.MinHold, 5*time.Millisecond)
	set(&t.MaxHold, 150*time.Millisecond)
	set(&t.LaneRecent, 200*time.Millisecond)
	set(&t.LaneSilence, 2*time.Second)
	set(&t.ReassemblyAge, 500*time.Millisecond)
	return t
}

// usage is what the pace of a link's probes depends on.
type usage struct {
	busy       bool          // much data was sent on it since its last probe
	linkUsed   bool          // data was sent on it within the last second
	inUse      bool          // the Bond had packets within IdleAfter
	backup     bool          // and there are links that are fit and no backups
	silence    time.Duration // since it was to answer a probe; 0 if it did
	unfit      bool
	alarmed    bool // a link fell silent lately
	unanswered bool // the Bond is dead
}

// pace gives the time between two probes of a link.
func (t Timing) pace(u usage) time.Duration {
	every := t.ProbeIdle
	if u.inUse && !u.backup {
		every = t.ProbeInUse
	}
	if u.linkUsed {
		every = t.ProbeActive
	}
	if u.busy {
		every = t.ProbeBusy
	}
	switch {
	case u.unanswered:
		every = min(every, t.ProbeAlarmed)
	case u.unfit && u.silence < time.Second:
		every = min(every, t.ProbeActive)
	case u.alarmed && !u.backup:
		every = min(every, t.ProbeAlarmed)
	}
	return every
}
