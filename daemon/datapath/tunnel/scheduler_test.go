package tunnel

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestChooseScheduler(t *testing.T) {
	kernel := func(offered ...string) func(string) error {
		return func(name string) error {
			for _, o := range offered {
				if o == name {
					return nil
				}
			}
			return unix.ENOENT
		}
	}
	stock := func(string) error { return unix.ENOPROTOOPT }
	for _, test := range []struct {
		name, wanted string
		try          func(string) error
		before       string // chosen until now
		runs, reason string
		chosen       string
	}{
		{"the kernel has it", "roundrobin", kernel("default", "roundrobin"), "", "roundrobin", "", "roundrobin"},
		{"and goes back", "default", kernel("default", "roundrobin"), "roundrobin", "default", "", "default"},
		{"the kernel lacks it", "blest", kernel("default", "roundrobin"), "", "default", `the concentrator's kernel does not have the scheduler "blest"`, ""},
		{"and what was chosen before does not stay", "blest", kernel("default", "roundrobin"), "roundrobin", "default",
			`the concentrator's kernel does not have the scheduler "blest"`, "default"},
		{"a stock kernel", "redundant", stock, "", "default", "the concentrator's kernel has one scheduler for all", ""},
		{"a stock kernel does as is wanted", "default", stock, "", "default", "", ""},
		{"a router that does not say", "", kernel("default"), "", "default", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			var c chosen
			if test.before != "" {
				c.set(test.before)
			}
			runs, reason := c.choose(test.wanted, "default", test.try)
			chosen := ""
			if name := c.name.Load(); name != nil {
				chosen = *name
			}
			if runs != test.runs || reason != test.reason || chosen != test.chosen {
				t.Errorf("runs %q because %q, sessions are set to %q; want %q, %q, %q", runs, reason, chosen, test.runs, test.reason, test.chosen)
			}
		})
	}
}
