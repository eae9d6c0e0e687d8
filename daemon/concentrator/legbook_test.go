package concentrator

import (
	"fmt"
	"strings"
	"testing"

	"sheaf/daemon/datapath/leg"
	"sheaf/daemon/datapath/tunnel"
)

func TestLegBook(t *testing.T) {
	// "dsl=a lte=b" are legs with keys of 32 such bytes.
	wishes := func(text string) (list []tunnel.Leg) {
		for _, w := range strings.Fields(text) {
			uplink, key, _ := strings.Cut(w, "=")
			list = append(list, tunnel.Leg{Uplink: uplink, Key: []byte(strings.Repeat(key, 32))})
		}
		return list
	}
	many := ""
	for i := range maxLegs + 1 {
		many += fmt.Sprintf("u%d=%c ", i, 'A'+i)
	}
	type step struct {
		router byte
		wanted string
		want   string // uplink:number, or uplink:a part of the refusal
		gone   string // keys
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"one after the other", []step{{1, "dsl=a", "dsl:1", ""}, {1, "dsl=a lte=b", "dsl:1 lte:2", ""}, {1, "lte=b", "lte:2", "a"}, {1, "", "", "b"}}},
		{"a number is used again", []step{{1, "dsl=a lte=b", "dsl:1 lte:2", ""}, {1, "lte=b", "lte:2", "a"}, {2, "dsl=c", "dsl:1", ""}}},
		{"another start", []step{{1, "dsl=a lte=b", "dsl:1 lte:2", ""}, {1, "lte=c dsl=d", "lte:2 dsl:1", "ab"}}},
		{"a new uplink does not get a number of one that stays", []step{{1, "dsl=a", "dsl:1", ""}, {1, "cable=b dsl=a", "cable:2 dsl:1", ""}}},
		{"keys change places", []step{{1, "dsl=a lte=b", "dsl:1 lte:2", ""}, {1, "dsl=b lte=a", "dsl:1 lte:2", ""}}},
		{"another router's key", []step{{1, "dsl=a", "dsl:1", ""}, {2, "dsl=a lte=b", "dsl:another leg has the key lte:2", ""}}},
		{"a key twice", []step{{1, "dsl=a lte=a", "dsl:1 lte:another leg has the key", ""}}},
		{"an uplink twice", []step{{1, "dsl=a dsl=b", "dsl:1 dsl:the uplink has a leg already", ""}}},
		{"a short key", []step{{1, "dsl=", "dsl:the key has 0 bytes", ""}}},
		{"too many", []step{{1, many, "", ""}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			book := legBook{}
			for _, s := range c.steps {
				decisions, gone := book.set(tunnel.PublicKey{s.router}, wishes(s.wanted))
				var got []string
				for i, d := range decisions {
					text := fmt.Sprint(d.leg.number)
					if d.refusal != nil {
						text = d.refusal.Error()
					}
					if (d.refusal == nil) != (i < maxLegs) && c.name == "too many" {
						t.Errorf("leg %d: %s", i, text)
					}
					got = append(got, d.leg.uplink+":"+text)
				}
				if c.name == "too many" {
					continue
				}
				if text := strings.Join(got, " "); !strings.HasPrefix(text, s.want) || s.want == "" && text != "" {
					t.Errorf("%q: %s, want %s", s.wanted, text, s.want)
				}
				keys := ""
				for _, k := range gone {
					keys += string(k[:1])
				}
				if keys != s.gone {
					t.Errorf("%q: keys %q are gone, want %q", s.wanted, keys, s.gone)
				}
			}
			seen := map[uint16]leg.Key{}
			for _, all := range book {
				for _, e := range all {
					if _, twice := seen[e.number]; twice {
						t.Errorf("number %d is given twice", e.number)
					}
					seen[e.number] = e.key
				}
			}
		})
	}
}
