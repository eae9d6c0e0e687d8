package router

import (
	"strings"
	"testing"
	"time"

	"sheaf/daemon/datapath/leg"
	"sheaf/daemon/datapath/tunnel"
)

// A leg is made for an uplink that strips MPTCP and lets UDP through, once the
// concentrator has granted it for this key.
func TestWhenALegIsMade(t *testing.T) {
	now := time.Now()
	private := leg.NewPrivate()
	key := private.Public()
	far := make([]byte, 32)
	granted := tunnel.LegAnswer{Leg: tunnel.Leg{Uplink: "a", Key: key[:]}, Far: far}
	refused := tunnel.LegAnswer{Leg: granted.Leg, Reason: "the concentrator stops"}
	other, older := granted, granted
	other.Uplink, older.Key = "b", far
	for _, c := range []struct {
		name    string
		strips  bool
		carried time.Duration // since UDP last passed
		since   time.Duration // since the last leg ended
		answers []tunnel.LegAnswer
		want    bool
		reason  string // a part of it
	}{
		{"granted", true, time.Second, time.Minute, []tunnel.LegAnswer{other, granted}, true, "is being made"},
		{"MPTCP passes", false, time.Second, time.Minute, []tunnel.LegAnswer{granted}, false, ""},
		{"not answered", true, time.Second, time.Minute, nil, false, "is being made"},
		{"another uplink's", true, time.Second, time.Minute, []tunnel.LegAnswer{other}, false, "is being made"},
		{"another start's", true, time.Second, time.Minute, []tunnel.LegAnswer{older}, false, "is being made"},
		{"refused", true, time.Second, time.Minute, []tunnel.LegAnswer{refused}, false, "the concentrator stops"},
		{"no UDP", true, udpGone, time.Minute, []tunnel.LegAnswer{granted}, false, "UDP does not pass"},
		{"the last has just ended", true, time.Second, time.Second, []tunnel.LegAnswer{granted}, false, "is being made"},
	} {
		u := &uplinkLeg{path: tunnel.Path{Name: "a"}, private: private, carried: now.Add(-c.carried), since: now.Add(-c.since)}
		for range 2 {
			u.stripping.Tried(now, !c.strips)
		}
		if got := u.step(now, c.answers); got != c.want {
			t.Errorf("%s: made %v, want %v", c.name, got, c.want)
		}
		if got := u.reason(false); !strings.Contains(got, c.reason) {
			t.Errorf("%s: %q, want something of %q", c.name, got, c.reason)
		}
	}
}
