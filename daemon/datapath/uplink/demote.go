package uplink

import (
	"fmt"
	"maps"
	"math"
	"time"
)

// The path of a decision: what the uplinks carry ─▶ Load ─▶ Demotion.Look ─▶ which
// make the bond slower than it would be without them ─▶ these are backups for a
// while.
//
// What such an uplink has taken, the bytes of the others wait for at the receiver:
// two of 50 and 30 Mbit/s stood still for seconds beside one of 400 kbit/s and
// 800 ms. So the others need not be full meanwhile. One that is hardly used does no
// harm, and is left alone.

const (
	// An uplink is demoted that for demoteAfter had less than leastShare of what all
	// carried, and a round trip of more than longRTT times the shortest; or lost more
	// than mostLoss and had less than lossyShare.
	demoteAfter = 10 * time.Second
	leastShare  = 0.03
	longRTT     = 10
	mostLoss    = 0.2
	lossyShare  = 0.1
	// It is looked at while all carry leastAll, and itself leastUsed, which is more
	// than probes are; bytes per second.
	leastAll  = 250_000
	leastUsed = 10_000
	// demotedFor is when it is tried again, harmMemory how long harm is remembered.
	demotedFor = 3 * time.Minute
	harmMemory = time.Minute
)

// Demotion finds uplinks that do harm. The zero value has found none.
type Demotion struct {
	looked  time.Time
	uplinks map[string]*demotable
}

type demotable struct {
	rate   [2]float64    // received and sent, smoothed, bytes per second
	harmed time.Duration // for how long, and lately when
	at     time.Time
	until  time.Time // it is demoted
	reason string
}

// Look takes the loads of all uplinks that may be used, those that are demoted too,
// a few seconds after the last time. It says which are to be backups, and why.
func (d *Demotion) Look(now time.Time, loads []Load) map[string]string {
	passed := time.Duration(0)
	if !d.looked.IsZero() {
		passed = min(now.Sub(d.looked), demoteAfter/2)
	}
	d.looked = now
	if d.uplinks == nil {
		d.uplinks = map[string]*demotable{}
	}
	// One that is not there at times may do harm at others.
	maps.DeleteFunc(d.uplinks, func(_ string, u *demotable) bool { return now.After(u.until) && now.Sub(u.at) > harmMemory })
	var all [2]float64
	shortest := Load{MinRTT: math.MaxInt64}
	for _, l := range loads {
		u := d.uplinks[l.Name]
		if u == nil {
			u = &demotable{at: now}
			d.uplinks[l.Name] = u
		}
		for i, rate := range []float64{l.Received, l.Sent} {
			u.rate[i] += (rate - u.rate[i]) * smoothing
			all[i] += u.rate[i]
		}
		if l.MinRTT > 0 && l.MinRTT < shortest.MinRTT && !now.Before(u.until) {
			shortest = l
		}
	}
	demoted := map[string]string{}
	for _, l := range loads {
		u := d.uplinks[l.Name]
		if now.Before(u.until) {
			demoted[l.Name] = u.reason
			continue
		}
		harm, known := u.harm(l, all, shortest)
		switch {
		case !known:
		case harm == "":
			u.harmed = max(u.harmed-passed, 0)
		default:
			u.harmed, u.at = u.harmed+passed, now
		}
		if harm != "" && u.harmed >= demoteAfter {
			u.harmed, u.until = 0, now.Add(demotedFor)
			u.reason = fmt.Sprintf("demoted to a backup until %s UTC: %s", u.until.UTC().Format(time.TimeOnly), harm)
			demoted[l.Name] = u.reason
		}
	}
	return demoted
}

// harm says what harm an uplink does, or nothing, in the direction that is used
// most; and whether that can be told now.
func (u *demotable) harm(l Load, all [2]float64, shortest Load) (what string, known bool) {
	i := 0
	if all[1] > all[0] {
		i = 1
	}
	if all[i] < leastAll || u.rate[i] < leastUsed || l.Name == shortest.Name || shortest.Name == "" {
		return "", false
	}
	share := u.rate[i] / all[i]
	switch {
	case share < leastShare && l.RTT > longRTT*shortest.MinRTT:
		return fmt.Sprintf("it carried %.1f %% of all, at %.0f times the round trip of %s", 100*share, l.RTT.Seconds()/shortest.MinRTT.Seconds(), shortest.Name), true
	case share < lossyShare && l.Loss > mostLoss:
		return fmt.Sprintf("it carried %.1f %% of all, and lost %.0f %%", 100*share, 100*l.Loss), true
	}
	return "", true
}
