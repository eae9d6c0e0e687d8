package router

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
)

// TestJoinAgain: a way that fails is tried ever more rarely, and one that held in
// between at once.
func TestJoinAgain(t *testing.T) {
	now := time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC)
	var j joined
	for i, want := range []time.Duration{250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, joinLast, joinLast} {
		j = j.next(now)
		if got := j.until.Sub(now); got != want {
			t.Errorf("after %d tries: wait %v, want %v", i+1, got, want)
		}
		now = j.until
	}
	now = now.Add(joinLast + time.Second)
	if got := j.next(now).until.Sub(now); got != joinFirst {
		t.Errorf("after it held: wait %v, want %v", got, joinFirst)
	}
}

func TestMeshOf(t *testing.T) {
	for _, c := range []struct{ addresses, want string }{
		{"192.0.2.1:443", "[]"},
		{"192.0.2.1:443 192.0.2.9:4443", "[192.0.2.1:443 192.0.2.9:4443]"},
		{"192.0.2.1:443 192.0.2.1:443", "[]"},
		{"192.0.2.1:443 [2001:db8::1]:443", "[]"}, // the kernel meets each with its own family
		{"192.0.2.1:443 [2001:db8::1]:443 [2001:db8::9]:443", "[192.0.2.1:443 [2001:db8::1]:443 [2001:db8::9]:443]"},
		{"vpn.example.org:443 192.0.2.1:443", "[]"},
		{"vpn.example.org:443 192.0.2.1:443 192.0.2.9:443", "[192.0.2.1:443 192.0.2.9:443]"},
		{"", "[]"},
	} {
		if got := fmt.Sprint(meshOf(strings.Fields(c.addresses))); got != c.want {
			t.Errorf("%s: %s, want %s", c.addresses, got, c.want)
		}
	}
}

func TestKernelPathManager(t *testing.T) {
	empty := &desired.MPTCP{}
	meshed := &desired.MPTCP{Endpoints: make([]desired.Endpoint, 2), Limits: desired.Limits{Subflows: 8}}
	single := &desired.MPTCP{Endpoints: make([]desired.Endpoint, 2)}
	for _, c := range []struct {
		want      settings.PathManager
		mesh      bool
		userspace bool
		held      *desired.MPTCP
		got       settings.PathManager
	}{
		{settings.PathManagerFullmesh, false, false, meshed, settings.PathManagerFullmesh},
		{settings.PathManagerFullmesh, false, false, empty, settings.PathManagerDefault},
		{settings.PathManagerFullmesh, false, true, meshed, settings.PathManagerNetlink},  // somebody has changed it
		{settings.PathManagerFullmesh, true, true, meshed, settings.PathManagerFullmesh},  // to several addresses
		{settings.PathManagerFullmesh, true, false, meshed, settings.PathManagerFullmesh}, // not yet
		{settings.PathManagerNetlink, true, true, meshed, settings.PathManagerNetlink},
		{settings.PathManagerDefault, false, false, single, settings.PathManagerDefault},
		{settings.PathManagerBinder, false, true, meshed, settings.PathManagerBinder},
		{settings.PathManagerNdiffports, false, false, meshed, settings.PathManagerFullmesh}, // the kernel cannot, or not yet
		{settings.PathManagerNetlink, false, false, empty, settings.PathManagerNetlink},
		{settings.PathManagerNetlink, false, false, meshed, settings.PathManagerFullmesh}, // while flows are open
		{settings.PathManagerFullmesh, false, false, nil, settings.PathManagerDefault},
	} {
		if got := kernelPathManager(c.want, c.mesh, c.userspace, c.held); got != c.got {
			t.Errorf("%s wanted, mesh %t, userspace %t, %+v: %s, want %s", c.want, c.mesh, c.userspace, c.held, got, c.got)
		}
	}
}
