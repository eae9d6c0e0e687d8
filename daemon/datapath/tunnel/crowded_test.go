package tunnel

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestSuperfluous(t *testing.T) {
	for _, c := range []struct{ name, silent, want string }{
		{"all are heard", "1ms 50ms 1.9s", ""},
		{"the two that are silent for longest", "3s 1ms 60s 2.5s 4s", "60s 4s"},
		{"one that is silent", "1ms 3s 2s", "3s"},
		{"the one that was heard last stays", "3s 4s", "4s"},
		{"and when it is alone", "1m", ""},
		{"nothing is there", "", ""},
	} {
		var subflows []Subflow
		for i, text := range strings.Fields(c.silent) {
			silence, err := time.ParseDuration(text)
			if err != nil {
				t.Fatal(err)
			}
			subflows = append(subflows, Subflow{Silence: silence, Local: netip.AddrPortFrom(netip.Addr{}, uint16(i))})
		}
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
