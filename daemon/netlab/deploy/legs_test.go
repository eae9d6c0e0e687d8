package deploy

import (
	"fmt"
	"strings"
	"testing"

	"sheaf/webui"
)

const stripped = "a middlebox on this uplink removes MPTCP options"

// untilLegs waits until these uplinks and no others have a leg, and all carry.
func (w *world) untilLegs(numbers ...int) {
	w.t.Helper()
	want := map[int]bool{}
	for _, n := range numbers {
		want[n] = true
	}
	w.need(w.Until(fmt.Sprintf("uplinks %v have a leg", numbers), func(s webui.Status) error {
		for i := range w.Lab.Uplinks {
			u := w.uplink(s, i+1)
			leg, reason := "", ""
			if want[i+1] {
				leg, reason = "udp", stripped
			}
			if u.Leg != leg || u.LegReason != reason || u.State != "carrying" {
				return fmt.Errorf("%s is %s (%s), %d subflows, leg %q: %q", u.Name, u.State, u.Reason, u.Subflows, u.Leg, u.LegReason)
			}
		}
		return nil
	}))
}

// slow makes all uplinks carry a fraction of what they did, for machines with much
// else to do: what goes through a leg passes both daemons.
const fraction = 0.3

func (w *world) slow() {
	w.t.Helper()
	for i, u := range w.Lab.Uplinks {
		shape := shapes[i]
		shape.Rate *= fraction
		w.need(u.Set(shape))
	}
}

// share checks that an uplink brings a good part of what it could in the time that a
// download takes: of its part of the sum of all rates.
func (w *world) share(d *download, number int, least float64) {
	w.t.Helper()
	const bytes = 6e6
	sum := 0.0
	for _, s := range shapes {
		sum += s.Rate
	}
	before := w.down(number)
	w.progress(d, bytes)
	share := float64(w.down(number)-before) / (bytes * shapes[number-1].Rate / sum)
	w.t.Logf("uplink%d brings %.2f of its part", number, share)
	if share < least {
		w.t.Errorf("uplink%d brings %.2f of its part of the download, want %.2f at least", number, share, least)
	}
}

// An uplink that strips MPTCP is used by a leg of UDP, as long as it does.
func TestUplinkThatStripsMPTCP(t *testing.T) {
	w := newWorld(t)
	w.slow()
	middle := w.Lab.Uplinks[1]
	w.need(middle.StripMPTCP(true))
	w.need(w.StartBoth())
	w.untilLegs(2)
	w.need(w.WaitUp())
	d := w.startDownload(40e6)
	w.progress(d, 3e6)
	w.share(d, 2, 0.5)

	w.need(middle.BlackHole(true))
	w.progress(d, 2e6)
	w.need(middle.BlackHole(false))
	w.untilLegs(2)
	w.progress(d, 5e6)
	w.share(d, 2, 0.5)
	if err := <-d.done; err != nil {
		t.Error(err)
	}
	text, err := w.Sheafctl("status")
	w.need(err)
	if !strings.Contains(text, "udp leg: "+stripped) {
		t.Errorf("sheafctl status does not show the leg:\n%s", text)
	}

	w.need(middle.StripMPTCP(false))
	w.untilLegs()
}

// With every uplink stripping, legs are what sessions are dialled from.
func TestAllUplinksStripMPTCP(t *testing.T) {
	w := newWorld(t)
	w.slow()
	for _, u := range w.Lab.Uplinks {
		w.need(u.StripMPTCP(true))
	}
	w.need(w.StartBoth())
	w.untilLegs(1, 2, 3)
	w.need(w.WaitUp())
	d := w.startDownload(40e6)
	w.progress(d, 3e6)
	for number := 1; number <= 3; number++ {
		w.share(d, number, 0.4)
	}
	w.need(w.Lab.Uplinks[0].BlackHole(true))
	w.progress(d, 2e6)
	w.need(w.Lab.Uplinks[0].BlackHole(false))
	if err := <-d.done; err != nil {
		t.Error(err)
	}
}
