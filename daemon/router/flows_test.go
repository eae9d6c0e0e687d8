package router

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

// A flow's uplinks keep their names when they have lost their address.
func TestNamesOfFlowsUplinks(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	var n names
	n.learn([]uplink.Status{fit("b", 1), fit("a", 2)})
	gone := fit("b", 1)
	gone.Sources = nil
	n.learn([]uplink.Status{gone, fit("a", 2)})
	f := tunnel.Flow{
		Client: netip.MustParseAddrPort("192.168.1.5:40000"), Destination: netip.MustParseAddrPort("[2001:db8::1]:443"),
		Since: now.Add(-1500 * time.Millisecond), Sent: 10, Received: 20,
		Sources: []tunnel.SourceBytes{
			{Source: netip.MustParseAddr("10.1.0.2"), Sent: 1, Received: 2}, {Source: netip.MustParseAddr("10.9.0.2"), Sent: 5, Received: 6},
			{Source: netip.MustParseAddr("10.2.0.2"), Sent: 3, Received: 4},
		},
	}
	want := webui.Flow{
		Client: "192.168.1.5:40000", Destination: "[2001:db8::1]:443", Through: "tunnel", Since: f.Since.UTC(), AgeS: 1.5, UpBytes: 10, DownBytes: 20,
		Uplinks: []webui.UplinkBytes{
			{Address: "10.9.0.2", UpBytes: 5, DownBytes: 6}, {Name: "a", Address: "10.2.0.2", UpBytes: 3, DownBytes: 4},
			{Name: "b", Address: "10.1.0.2", UpBytes: 1, DownBytes: 2},
		},
	}
	if diff := cmp.Diff(want, n.describe(f, "tunnel", now)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for i := range 3 * maxNames { // addresses that change for ever
		u := fit("b", 1)
		u.Sources = []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.1.%d.%d/16", i>>8, i&255))}
		n.learn([]uplink.Status{u, fit("a", 2)})
	}
	if len(n.byAddress) > maxNames+2 || n.byAddress[netip.MustParseAddr("10.2.0.2")] != "a" {
		t.Errorf("%d addresses are remembered, 10.2.0.2 as %q", len(n.byAddress), n.byAddress[netip.MustParseAddr("10.2.0.2")])
	}
}

func TestSchedulersThatAreNotOffered(t *testing.T) {
	for _, c := range []struct {
		scheduler string
		offered   []string
		refused   bool
	}{
		{"default", []string{"default"}, false}, {"redundant", []string{"default", "redundant"}, false},
		{"redundant", []string{"default"}, true}, {"redundant", nil, false}, // only trying tells
		{"firstfit", []string{"default"}, false}, // approximated
	} {
		err := unoffered(c.scheduler, c.offered)
		if invalid := (*settings.Invalid)(nil); errors.As(err, &invalid) != c.refused {
			t.Errorf("%s of %v: %v", c.scheduler, c.offered, err)
		}
	}
}
