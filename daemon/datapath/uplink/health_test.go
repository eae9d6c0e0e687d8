package uplink

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestHealth draws each series, a sign for every 100 ms:
//
//	c  its carrier of packets works        .  it was not heard, nor asked
//	s  its carrier is silent               a  silent, but a connection was accepted
//	-  there is no carrier                 A  no carrier, and a connection was accepted
//	S  as s, and no other uplink is heard
//	q  its carrier works, but steady traffic has ceased
//
// and below it what is decided: x silent, o not.
func TestHealth(t *testing.T) {
	for _, test := range []struct{ name, signs, want string }{
		{"works", "cccccc", "oooooo"},
		{"no carrier was ever there", "------", "oooooo"},
		{"falls silent, and is back at once", "ccssssccc", "ooxxxxooo"},
		{"all fall silent: it is the concentrator", "ccSSSScc", "oooooooo"},
		{"all, and then the others are back", "ccSSsscc", "ooooxxoo"},
		{"stays out while nothing is known of it", "ccsss----", "ooxxxxxxx"},
		{"UDP alone is blocked", "ccssasssss----", "ooxxoooooooooo"},
		{"back without a carrier", "ccss--A--A--", "ooxxxxoooooo"},
		{"the second time too", "ccsscss" + "ccc", "ooxxoxx" + "ooo"},
		{"the third time it has to answer for a second", "cscscs" + "cccccccccccccccc", "oxoxox" + "xxxxxxxxxxxxxxoo"},
		{"and without a break", "cscscs" + "cccc" + "s" + "cccccccccccccccc", "oxoxox" + "xxxx" + "x" + "xxxxxxxxxxxxxxoo"},
		{"by connections too", "cscscs" + "A--A--A--A--A--A--A--A--", "oxoxox" + "xxxxxxxxxxxxxxoooooooooo"},
		{"one answer is no trial", "cscscs" + "A--------------------", "oxoxox" + "xxxxxxxxxxxxxxxxxxxxx"},
		{"steady traffic ceases, though the carrier has not noticed", "ccqqqqcc", "ooxxxxoo"},
		{"and comes back before it would have", "ccqcc", "ooxoo"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var h Health
			var s Signs
			now := time.Unix(1000, 0)
			var got strings.Builder
			for _, sign := range test.signs {
				s.Others = sign != 'S'
				s.Carries = sign == 'c' || sign == 'q'
				if sign == 'c' {
					s.Heard = now
				}
				s.QuietSince = time.Time{}
				if sign == 'q' {
					s.QuietSince = now
				}
				switch sign {
				case 's', 'S', 'a':
					if s.SilentSince.IsZero() {
						s.SilentSince = now
					}
				default:
					s.SilentSince = time.Time{}
				}
				if sign == 'a' || sign == 'A' {
					s.Answered = now
				}
				if h.Judge(now, s).IsZero() {
					got.WriteByte('o')
				} else {
					got.WriteByte('x')
				}
				now = now.Add(100 * time.Millisecond)
			}
			if got.String() != test.want {
				t.Errorf("\nsigns %s\ngot   %s\nwant  %s", test.signs, got.String(), test.want)
			}
		})
	}
}

func TestHealthOfAFlappingUplink(t *testing.T) {
	for _, test := range []struct {
		every time.Duration // from one fall to the next, at least
		want  string        // how long it had to answer each time
	}{
		{10 * time.Second, "0s 0s 0s 0s 0s 0s"},
		{8 * time.Second, "0s 0s 0s 0s 0s 0s"},
		{5 * time.Second, "0s 0s 0s 0s 1.1s 1.1s"},
		{2 * time.Second, "0s 0s 1.1s 1.6s 2.3s 2.7s"},
		{time.Millisecond, "0s 0s 1.4s 2s 2.6s 2.8s"},
	} {
		t.Run(test.every.String(), func(t *testing.T) {
			var h Health
			now := time.Unix(1000, 0)
			var trials []string
			for range 6 {
				fell := now
				for range 3 {
					h.Judge(now, Signs{Others: true, SilentSince: fell})
					now = now.Add(100 * time.Millisecond)
				}
				back := now
				for !h.Judge(now, Signs{Others: true, Carries: true, Heard: now}).IsZero() {
					now = now.Add(100 * time.Millisecond)
				}
				trials = append(trials, fmt.Sprint(now.Sub(back)))
				now = now.Add(100 * time.Millisecond)
				if next := fell.Add(test.every); next.After(now) {
					now = next
				}
			}
			if got := strings.Join(trials, " "); got != test.want {
				t.Errorf("answered for %s, want %s", got, test.want)
			}
		})
	}
}

func TestHealthTrialsAreBounded(t *testing.T) {
	h := Health{penalty: 1000}
	if got := h.trial(); got != lastTrial {
		t.Errorf("trial %v, want %v", got, lastTrial)
	}
}
