package deploy

import (
	"net"
	"os"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"

	"sheaf/daemon/netlab"
)

// farGateway puts a gateway several hops away behind an uplink, and a tunnel of the
// router's to it: IPIP (RFC 2003), whose packets raw sockets put on the wire, for many
// kernels are without the module. came returns how many bytes have gone to it since the
// last call.
//
//	router ─▶ TUN ─▶ raw socket ─▶ uplink ─▶ … ─▶ raw socket ─▶ TUN ─▶ core
func (w *world) farGateway(u *netlab.Uplink, device string) (came func() uint64) {
	w.t.Helper()
	const farOuter = "203.0.113.1" // behind the uplink's own gateway
	ends := []struct {
		host         *netlab.Host
		outer, inner string
		sent         atomic.Uint64
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
			return netlink.LinkSetUp(link)
		}))
		w.need(end.host.Do(func() (err error) {
			end.wire, err = net.ListenPacket("ip4:4", end.outer)
			return err
		}))
		w.t.Cleanup(func() {
			_ = end.wire.Close()
			_ = end.tunnel.Close()
		})
		w.addAddress(end.host, device, end.inner)
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
				end.sent.Add(uint64(n))
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
	return func() uint64 { return ends[0].sent.Swap(0) }
}

// TestGatewaySeveralHopsAway: a tunnel to a gateway in the mesh is an uplink like any
// other, without a default route.
func TestGatewaySeveralHopsAway(t *testing.T) {
	for _, manager := range []string{"binder", "fullmesh"} {
		t.Run(manager, func(t *testing.T) {
			w := newWorld(t)
			came := w.farGateway(w.Lab.Uplinks[0], "hops")
			w.startWithFourth("interface: hops, address: {method: existing}", manager)
			d := w.startDownload(60e6)
			w.fourthOffAndOn(d, came)
			// Without the gateway of the interface that the tunnel goes out by.
			w.mode(1, "off")
			w.untilShared(1, 0, 1, 1)
			w.through(d, came, true)
			if err := <-d.done; err != nil {
				t.Fatal(err)
			}
		})
	}
}
