package router

import (
	"testing"
	"time"

	"sheaf/daemon/datapath/uplink"
)

// A silent uplink is asked for often while somebody waits for it, and seldom once it
// has long been away.
func TestQuestionsOverASilentUplink(t *testing.T) {
	begin := time.Now()
	silent := map[string]uplink.Signs{"a": {SilentSince: begin, Others: true}}
	for _, c := range []struct {
		name     string
		moves    bool
		answered time.Duration // before the question; 0: never
		at       time.Duration // since it fell silent
		want     time.Duration
	}{
		{"nothing moves", false, 0, time.Second, uplink.AskEvery},
		{"flows move", true, 0, time.Second, askBriskly},
		{"it answers, and is on trial", true, 100 * time.Millisecond, time.Second, uplink.AskEvery},
		{"long away", true, 0, 2 * time.Minute, askSlowly},
		{"long on trial", true, 100 * time.Millisecond, 2 * time.Minute, uplink.AskEvery},
	} {
		s := newSilence()
		if ask, fallen, _ := s.look(begin, silent); len(ask) != 1 || len(fallen) != 1 {
			t.Fatalf("%s: an uplink that fell silent is asked for %v, and said to have fallen %v", c.name, ask, fallen)
		}
		now := begin.Add(c.at)
		if c.answered != 0 {
			s.heard("a", now.Add(-c.answered))
		}
		s.asked["a"] = now
		if s.due(now.Add(c.want-time.Millisecond), c.moves) {
			t.Errorf("%s: the next question is due before %v", c.name, c.want)
		}
		if !s.due(now.Add(c.want), c.moves) {
			t.Errorf("%s: no question is due after %v", c.name, c.want)
		}
	}
}
