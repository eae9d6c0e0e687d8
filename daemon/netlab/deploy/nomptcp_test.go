package deploy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sheaf/webui"
)

// withoutMPTCP gives the router's daemon a kernel without MPTCP, as far as it can
// tell: the sysctls by which one is known are not there.
func (w *world) withoutMPTCP() {
	w.t.Helper()
	real := w.Binaries
	w.Binaries = w.t.TempDir()
	for _, name := range []string{"sheafctl", "concentratord"} {
		w.need(os.Symlink(filepath.Join(real, name), filepath.Join(w.Binaries, name)))
	}
	script := fmt.Sprintf(`#!/bin/sh
exec unshare --mount sh -c 'mount -t tmpfs none /proc/sys/net/mptcp && exec "$0" "$@"' %s "$@"
`, filepath.Join(real, "sheafd"))
	w.need(os.WriteFile(filepath.Join(w.Binaries, "sheafd"), []byte(script), 0o700))
}

// On a kernel without MPTCP nothing is refused: the best uplink carries, by TLS
// over TCP, another takes over when it fails, and what is lacking is said.
func TestKernelWithoutMPTCP(t *testing.T) {
	w := newWorld(t)
	w.withoutMPTCP()
	w.need(w.StartBoth())
	w.serve("198.51.100.20:7600", func(c *net.TCPConn) { _, _ = io.WriteString(c, "plain") })
	for _, best := range []int{1, 2} {
		w.need(w.Until(fmt.Sprintf("uplink%d carries alone", best), func(s webui.Status) error {
			const reason = "TCP flows use one uplink at a time: this kernel has no MPTCP"
			for i, u := range s.Uplinks {
				want := "standby"
				switch {
				case i+1 == best:
					want = "carrying"
				case i+1 < best:
					want = "unfit" // failed
				}
				if u.State != want || want == "standby" && u.Reason != reason || u.PlainTCP {
					return fmt.Errorf("%s is %s: %s", u.Name, u.State, u.Reason)
				}
			}
			if s.Kernel.MPTCP != "none" || s.Tunnel.State != "degraded" || best == 1 && s.Tunnel.Reason != reason || s.Multipath.Kernel.Enabled {
				return fmt.Errorf("MPTCP %s, enabled: %v, tunnel %s: %s", s.Kernel.MPTCP, s.Multipath.Kernel.Enabled, s.Tunnel.State, s.Tunnel.Reason)
			}
			if s.Packets.State != "up" {
				return errors.New("packets do not pass")
			}
			return nil
		}))
		client := w.dial("198.51.100.20:7600")
		_ = client.SetDeadline(time.Now().Add(10 * time.Second))
		if got, err := io.ReadAll(client); string(got) != "plain" || err != nil {
			t.Fatalf("over uplink%d: %q, %v", best, got, err)
		}
		out, err := w.Sheafctl("status")
		w.need(err)
		for _, words := range []string{", MPTCP none\n", "  - this kernel has no MPTCP: TCP flows use one uplink at a time\n"} {
			if !strings.Contains(out, words) {
				t.Errorf("sheafctl status does not say %q:\n%s", words, out)
			}
		}
		w.need(w.Lab.Uplinks[best-1].Carrier(false))
	}
	if log := w.log.String(); !strings.Contains(log, "multipath=false") || strings.Contains(log, "multipath=true") {
		t.Error("sessions ask for MPTCP")
	}
}
