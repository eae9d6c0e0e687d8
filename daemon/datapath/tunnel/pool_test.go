package tunnel

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestRank(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	path := func(name string, backup bool) Path {
		return Path{Name: name, Sources: []netip.Addr{netip.MustParseAddr(sourceOf[name])}, Backup: backup}
	}
	for _, c := range []struct {
		name    string
		paths   []Path
		rtt     map[string]time.Duration
		best    string
		trouble map[string]trouble
		want    string
	}{
		{name: "none"},
		{name: "nothing known: as configured", paths: []Path{path("b", false), path("a", false)}, want: "b a"},
		{
			name: "the lowest round trip first, unknown ones last", paths: []Path{path("a", false), path("b", false), path("c", false)},
			rtt: map[string]time.Duration{"b": 40 * time.Millisecond, "c": 20 * time.Millisecond}, want: "c b a",
		},
		{
			name: "a little better is not enough to move", paths: []Path{path("a", false), path("b", false)}, best: "b",
			rtt: map[string]time.Duration{"a": 18 * time.Millisecond, "b": 20 * time.Millisecond}, want: "b a",
		},
		{
			name: "much better is", paths: []Path{path("a", false), path("b", false)}, best: "b",
			rtt: map[string]time.Duration{"a": 15 * time.Millisecond, "b": 20 * time.Millisecond}, want: "a b",
		},
		{
			name: "backups last, however near", paths: []Path{path("a", true), path("b", false)},
			rtt: map[string]time.Duration{"a": time.Millisecond, "b": time.Second}, want: "b a",
		},
		{
			name: "a path in trouble waits", paths: []Path{path("a", false), path("b", false)},
			trouble: map[string]trouble{"a": {failures: 1, until: now.Add(time.Second)}}, want: "b",
		},
		{
			name: "and then comes after a healthy backup", paths: []Path{path("a", false), path("b", true)},
			trouble: map[string]trouble{"a": {failures: 1, until: now}}, want: "b a",
		},
		{
			name: "a path that strips MPTCP comes after one that does not", paths: []Path{path("a", false), path("b", false)},
			trouble: map[string]trouble{"a": {plain: now.Add(-time.Second)}}, want: "b a",
		},
		{
			name: "until it is tried again", paths: []Path{path("a", false), path("b", false)},
			trouble: map[string]trouble{"a": {plain: now.Add(-plainRetry)}}, want: "a b",
		},
	} {
		p := NewPool(slog.New(slog.DiscardHandler))
		p.paths, p.best = c.paths, c.best
		for name, d := range c.rtt {
			p.rtt[netip.MustParseAddr(sourceOf[name])] = d
		}
		for name, tr := range c.trouble {
			p.trouble[name] = &tr
		}
		var got []string
		for _, path := range p.rank(now) {
			got = append(got, path.Name)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, want %s", c.name, got, c.want)
		}
	}
}

var sourceOf = map[string]string{"a": "10.1.0.2", "b": "10.2.0.2", "c": "10.3.0.2"}

func TestAttempts(t *testing.T) {
	v4, v6 := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("2001:db8:1::2")
	paths := []Path{{Name: "both", Sources: []netip.Addr{v4, v6}}, {Name: "old", Sources: []netip.Addr{netip.MustParseAddr("10.2.0.2")}}}
	for _, c := range []struct {
		addresses []string
		want      string
	}{
		{[]string{"192.0.2.1:1"}, "both 10.1.0.2 192.0.2.1:1, old 10.2.0.2 192.0.2.1:1"},
		{[]string{"[2001:db8::1]:1"}, "both 2001:db8:1::2 [2001:db8::1]:1"},
		{[]string{"[2001:db8::1]:1", "192.0.2.1:1"}, "both 2001:db8:1::2 [2001:db8::1]:1, both 10.1.0.2 192.0.2.1:1, old 10.2.0.2 192.0.2.1:1"},
		{[]string{"name.example:1"}, "both 10.1.0.2 name.example:1, both 2001:db8:1::2 name.example:1, old 10.2.0.2 name.example:1"},
		{nil, ""},
	} {
		var got []string
		for _, a := range attempts(paths, c.addresses) {
			got = append(got, fmt.Sprintf("%s %s %s", a.path.Name, a.source, a.address))
		}
		if strings.Join(got, ", ") != c.want {
			t.Errorf("%v: %s, want %s", c.addresses, strings.Join(got, ", "), c.want)
		}
	}
}

func TestHowManySessions(t *testing.T) {
	for _, c := range []struct{ opened, waiting, idle, dialling, want int }{
		{0, 0, 0, 0, minIdle},
		{0, 0, minIdle, 0, 0},
		{0, 0, 3, 5, 0},
		{20, 0, minIdle, 0, 20 - minIdle},
		{1000, 0, 0, 0, maxDialling},
		{1000, 2000, 0, maxDialling, 0},
		{0, 5, 0, minIdle, 5},
		{0, 0, maxIdle, 0, 0},
	} {
		if got := wanted(idleTarget(c.opened), c.waiting, c.idle, c.dialling); got != c.want {
			t.Errorf("%+v: %d dials", c, got)
		}
	}
}

func TestChoosesRestedSessions(t *testing.T) {
	now := time.Now()
	ago := func(path string, d time.Duration) *pooled { return &pooled{path: path, used: now.Add(-d)} }
	for _, c := range []struct {
		name string
		idle []*pooled
		want int
	}{
		{"the rested one used last", []*pooled{ago("best", time.Hour), ago("best", time.Second), ago("best", 0)}, 1},
		{"of the best path", []*pooled{ago("best", time.Hour), ago("other", time.Second)}, 0},
		{"none rested: the one used longest ago", []*pooled{ago("other", time.Hour), ago("best", 2*time.Millisecond), ago("best", 0)}, 1},
		{"none of the best path", []*pooled{ago("other", time.Hour), ago("other", 0)}, 0},
	} {
		p := &Pool{best: "best", idle: c.idle}
		if got := p.choose(now); got != c.want {
			t.Errorf("%s: chose %d, want %d", c.name, got, c.want)
		}
	}
}

func TestIncompleteSessionsAreReplaced(t *testing.T) {
	now := time.Now()
	a, b := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.2.0.2")
	paths := []Path{{Name: "a", Sources: []netip.Addr{a}}, {Name: "b", Sources: []netip.Addr{b}}}
	for _, c := range []struct {
		name  string
		has   []string // of each session: the paths that have a subflow, "new" for one just dialled
		probe bool
		want  string // indexes
	}{
		{"all complete", []string{"a b", "b a"}, true, ""},
		{"others have joined it", []string{"a b", "a", "a", "b"}, false, "3 1 2"},
		{"too young to tell", []string{"a b", "a new"}, true, ""},
		{"nobody has: wait for the probe", []string{"a", "a"}, false, ""},
		{"nobody has: one is the probe", []string{"a", "a"}, true, "0"},
		{"plain TCP joins nothing", []string{"a b", "a plain"}, true, ""},
	} {
		var idle []*pooled
		joined := map[*pooled][]netip.Addr{}
		for _, text := range c.has {
			s := &pooled{Session: &Session{multipath: true}, path: "a", since: now.Add(-time.Hour)}
			for _, word := range strings.Fields(text) {
				switch word {
				case "a":
					joined[s] = append(joined[s], a)
				case "b":
					joined[s] = append(joined[s], b)
				case "new":
					s.since = now
				case "plain":
					s.multipath = false
				}
			}
			idle = append(idle, s)
		}
		var got []string
		for _, s := range incomplete(paths, idle, joined, now, c.probe) {
			got = append(got, fmt.Sprint(slices.Index(idle, s)))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: replaces %v, want %s", c.name, got, c.want)
		}
	}
}

func TestFailuresBackOff(t *testing.T) {
	p := NewPool(slog.New(slog.DiscardHandler))
	failure := errors.New("no route")
	var waits []time.Duration
	for range 6 {
		before := time.Now()
		p.note("a", failure)
		waits = append(waits, p.trouble["a"].until.Sub(before).Round(50*time.Millisecond))
		p.note("a", failure) // another dial that failed at the same time
		p.trouble["a"].until = time.Time{}
	}
	want := []time.Duration{minRetry, 2 * minRetry, 4 * minRetry, 8 * minRetry, maxRetry, maxRetry}
	if !slices.Equal(waits, want) {
		t.Errorf("waits %v, want %v", waits, want)
	}
}

func TestDownOnlyWhenEveryPathFailed(t *testing.T) {
	p := NewPool(slog.New(slog.DiscardHandler))
	if !p.down() || !errors.Is(p.why(), ErrDown) || !strings.Contains(p.why().Error(), "sheafctl join") {
		t.Errorf("not enrolled: down %v, %v", p.down(), p.why())
	}
	p.peer = &Peer{}
	if !p.down() || !strings.Contains(p.why().Error(), "no uplink is fit") {
		t.Errorf("no path: down %v, %v", p.down(), p.why())
	}
	p.paths = []Path{{Name: "a"}, {Name: "b"}}
	p.trouble["a"] = &trouble{failures: 3}
	if p.down() {
		t.Error("down, though b was not tried yet")
	}
	p.trouble["b"] = &trouble{failures: 1}
	if !p.down() {
		t.Error("not down, though every path failed")
	}
	p.sessions[&Session{}] = &pooled{}
	if p.down() {
		t.Error("down, with a live session")
	}
}

func TestStrandedSessionsEnd(t *testing.T) {
	a, b, gone := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.2.0.2"), netip.MustParseAddr("10.1.0.9")
	paths := []Path{{Name: "a", Sources: []netip.Addr{a}}, {Name: "b", Sources: []netip.Addr{b}}}
	for _, test := range []struct {
		name  string
		paths []Path
		from  []netip.Addr
		want  bool
	}{
		{"over all", paths, []netip.Addr{a, b}, false},
		{"over one", paths, []netip.Addr{gone, b}, false},
		{"over none", paths, nil, true},
		{"from an address that is no more", paths, []netip.Addr{gone}, true},
		{"no uplink works", nil, []netip.Addr{a}, false},
	} {
		if got := stranded(test.paths, test.from); got != test.want {
			t.Errorf("%s: stranded %v", test.name, got)
		}
	}

	s, now := &pooled{}, time.Now()
	for i, step := range []struct {
		after    time.Duration
		stranded bool
		want     bool
	}{
		{0, true, false}, {strandedTime, true, false}, {0, false, false},
		{0, true, false}, {strandedTime, true, false}, {time.Millisecond, true, true}, {0, false, false},
	} {
		now = now.Add(step.after)
		if got := s.isStranded(now, step.stranded); got != step.want {
			t.Errorf("step %d: ends %v", i, got)
		}
	}
}

func TestPathStripsMultipath(t *testing.T) {
	now := time.Now()
	for _, test := range []struct {
		fellBack int
		passed   time.Duration // ago; 0: never
		want     bool
	}{
		{2, 0, false}, {3, 0, true},
		{3, time.Minute, false}, {5, time.Minute, false}, {6, time.Minute, true},
		{3, time.Hour, true},
	} {
		path := trouble{fellBack: test.fellBack}
		if test.passed != 0 {
			path.passed = now.Add(-test.passed)
		}
		if got := path.strips(now); got != test.want {
			t.Errorf("%d fell back, MPTCP passed %v ago: strips %v", test.fellBack, test.passed, got)
		}
	}
}
