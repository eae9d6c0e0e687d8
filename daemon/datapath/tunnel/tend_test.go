package tunnel

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// silent are subflows over which nothing has come for so long, each from a port of
// its own.
func silent(t *testing.T, text string) (subflows []Subflow) {
	t.Helper()
	for i, word := range strings.Fields(text) {
		silence, err := time.ParseDuration(word)
		if err != nil {
			t.Fatal(err)
		}
		subflows = append(subflows, Subflow{Silence: silence, Local: netip.AddrPortFrom(netip.Addr{}, uint16(i))})
	}
	return subflows
}

func TestSuperfluous(t *testing.T) {
	for _, c := range []struct{ name, silent, want string }{
		{"all are heard", "1ms 50ms 1.9s", ""},
		{"the two that are silent for longest", "3s 1ms 60s 2.5s 4s", "60s 4s"},
		{"one that is silent", "1ms 3s 2s", "3s"},
		{"the one that was heard last stays", "3s 4s", "4s"},
		{"and when it is alone", "1m", ""},
		{"nothing is there", "", ""},
	} {
		subflows := silent(t, c.silent)
		var got []string
		for _, f := range superfluous(subflows) {
			if subflows[f.Local.Port()].Silence != f.Silence {
				t.Errorf("%s: %v is none of them", c.name, f)
			}
			got = append(got, strings.TrimSuffix(fmt.Sprint(f.Silence), "0s"))
		}
		if got := strings.Join(got, " "); strings.ReplaceAll(got, "1m", "60s") != c.want {
			t.Errorf("%s: of %s are superfluous %s, want %s", c.name, c.silent, got, c.want)
		}
	}
}

func TestHopeless(t *testing.T) {
	for _, c := range []struct{ name, silent, want string }{
		{"one does not answer", "1s 4s 25s", "25s"},
		{"two do not", "1s 40s 25s", "40s 25s"},
		{"not yet", "1s 19s", ""},
		{"none does: the session is asked for elsewhere", "30s 25s", ""},
		{"nothing is there", "", ""},
	} {
		var got []string
		for _, f := range hopeless(silent(t, c.silent)) {
			got = append(got, fmt.Sprint(f.Silence))
		}
		if got := strings.Join(got, " "); got != c.want {
			t.Errorf("%s: of %s are hopeless %s, want %s", c.name, c.silent, got, c.want)
		}
	}
}

func TestAsking(t *testing.T) {
	begin := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	type look struct {
		second   int
		subflows int
	}
	for _, c := range []struct {
		name  string
		looks []look
		want  string // + begins, - ends, ! in vain
	}{
		{"a session's beginning", []look{{0, 1}, {1, 2}, {9, 3}, {60, 3}}, ""},
		{"one comes later", []look{{0, 3}, {20, 4}, {21, 4}, {40, 4}, {46, 4}, {47, 3}}, "20+ 40! 46-"},
		{"one goes", []look{{0, 3}, {20, 2}, {21, 2}}, ""},
		{"and comes again", []look{{0, 3}, {20, 2}, {30, 3}, {31, 3}, {56, 3}}, "30+ 56-"},
		{"another meanwhile", []look{{0, 3}, {20, 4}, {30, 5}, {46, 5}, {56, 5}}, "20+ 46! 56-"},
	} {
		var a asking
		var got []string
		for _, l := range c.looks {
			now := begin.Add(time.Duration(l.second) * time.Second)
			ask, set := a.look(now, l.subflows)
			mark := ""
			switch {
			case set && ask:
				mark = "+"
			case set:
				mark = "-"
			}
			if a.inVain(now) {
				mark += "!"
			}
			if mark != "" {
				got = append(got, fmt.Sprint(l.second, mark))
			}
		}
		if got := strings.Join(got, " "); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
