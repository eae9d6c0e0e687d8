package deploy

import (
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"

	"sheaf/daemon/netlab"
)

// farGateway puts a gateway several hops away behind an uplink, and a tunnel of the
// router's to it: IPIP (RFC 2003), whose packets raw sockets put on the wire, for many
// kernels are without the module. carried counts the bytes that went to it.
//
//	router ─▶ TUN ─▶ raw socket ─▶ uplink ─▶ … ─▶ raw socket ─▶ TUN ─▶ core
func (w *world) farGateway(u *netlab.Uplink, device string) (carried *atomic.Uint64) {
	w.t.Helper()
	const farOuter = "203.0.113.1" // behind the uplink's own gateway
	ends := []struct {
		host         *netlab.Host
		outer, inner string
		carried      atomic.Uint64
		tunnel       *os.File
		wire         net.PacketConn
	}{
		{host: w.Lab.Router, outer: u.Address(), inner: "10.99.0.2/30"},
		{host: w.Lab.Core, outer: farOuter, inner: "10.99.0.1/30"},
	}
	for i := range ends {
		end := &ends[i]
		w.need(end.host.Do(func() error {
			attributes := netlink.NewLinkAttrs()
			attributes.Name = device
			link := &netlink.Tuntap{LinkAttrs: attributes, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_NO_PI, NonPersist: true, Queues: 1}
			if err := netlink.LinkAdd(link); err != nil {
				return err
			}
			end.tunnel = link.Fds[0]
			if err := netlink.LinkSetMTU(link, 1400); err != nil {
				return err
			}
			if err := netlink.LinkSetUp(link); err != nil {
				return err
			}
			address, err := netlink.ParseAddr(end.inner)
			if err == nil {
				err = netlink.AddrAdd(link, address)
			}
			return err
		}))
		w.need(end.host.Do(func() (err error) {
			end.wire, err = net.ListenPacket("ip4:4", end.outer)
			return err
		}))
		w.t.Cleanup(func() {
			_ = end.wire.Close()
			_ = end.tunnel.Close()
		})
	}
	for i := range ends {
		end, other := &ends[i], &net.IPAddr{IP: net.ParseIP(ends[1-i].outer)}
		go func() {
			b := make([]byte, 1<<16)
			for {
				n, err := end.tunnel.Read(b)
				if err != nil {
					return
				}
				end.carried.Add(uint64(n))
				_, _ = end.wire.WriteTo(b[:n], other) // what is lost is sent again
			}
		}()
		go func() {
			b := make([]byte, 1<<16)
			for {
				n, _, err := end.wire.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = end.tunnel.Write(b[:n])
			}
		}()
	}
	return &ends[0].carried
}

// TestGatewaySeveralHopsAway: a tunnel to a gateway in the mesh is an uplink like any
// other, without a default route.
func TestGatewaySeveralHopsAway(t *testing.T) {
	for _, manager := range []string{"binder", "fullmesh"} {
		t.Run(manager, func(t *testing.T) {
			w := newWorld(t)
			carried := w.farGateway(w.Lab.Uplinks[0], "hops")
			w.need(w.StartConcentrator())
			token, err := w.Token("lab")
			w.need(err)
			settings := strings.Replace(w.Settings(token), "uplinks:\n", "uplinks:\n  - {name: uplink4, interface: hops, mode: on, address: {method: existing}}\n", 1)
			w.need(w.StartRouter(settings + "multipath: {path_manager: " + manager + "}\n"))
			w.need(w.WaitUp())
			w.untilShared(1, 1, 1, 1) // the tunnel is the first in status
			d := w.startDownload(60e6)
			through := func(least, most uint64) {
				t.Helper()
				var acknowledgements uint64
				for range 5 { // what was under way still comes
					before := carried.Load()
					w.progress(d, 4e6)
					if acknowledgements = carried.Load() - before; least <= acknowledgements && acknowledgements <= most {
						return
					}
				}
				t.Fatalf("%d bytes of acknowledgements went through the tunnel, want %d to %d", acknowledgements, least, most)
			}
			through(5e3, 1e9)
			w.mode(4, "off")
			w.untilShared(0, 1, 1, 1)
			through(0, 3e3)
			w.mode(4, "on")
			w.untilShared(1, 1, 1, 1)
			through(5e3, 1e9)
			// Without the gateway of the interface that the tunnel goes out by.
			w.mode(1, "off")
			w.untilShared(1, 0, 1, 1)
			through(5e3, 1e9)
			if err := <-d.done; err != nil {
				t.Fatal(err)
			}
		})
	}
}
