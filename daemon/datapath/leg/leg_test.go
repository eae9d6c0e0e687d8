package leg

import (
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun/tuntest"
)

const patience = 10 * time.Second

// end is one End, its key and its TUN.
type end struct {
	*End
	private Private
	tun     *tuntest.ChannelTUN
	socket  *net.UDPConn
}

func newEnd(t *testing.T) end {
	t.Helper()
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	e := end{private: NewPrivate(), tun: tuntest.NewChannelTUN(), socket: socket}
	if e.End, err = Open(e.private, e.tun.TUN(), slog.New(slog.DiscardHandler), socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return e
}

func (e end) address() netip.AddrPort { return e.socket.LocalAddr().(*net.UDPAddr).AddrPort() }

// send puts a packet in.
func (e end) send(t *testing.T, source, destination string) {
	t.Helper()
	select {
	case e.tun.Outbound <- tuntest.Ping(netip.MustParseAddr(destination), netip.MustParseAddr(source)):
	case <-time.After(patience):
		t.Fatal("nobody reads the TUN")
	}
}

// received is the source of the next packet that comes out.
func (e end) received(t *testing.T) netip.Addr {
	t.Helper()
	select {
	case p := <-e.tun.Inbound:
		return netip.AddrFrom4([4]byte(p[12:16]))
	case <-time.After(patience):
		t.Fatal("nothing arrives")
	}
	panic("unreachable")
}

func TestPacketsGoThroughALegAndNoOthers(t *testing.T) {
	router, concentrator := newEnd(t), newEnd(t)
	if router.Fresh(time.Now()) {
		t.Error("there are keys before there is a peer")
	}
	addresses := []netip.Prefix{netip.MustParsePrefix("10.84.0.2/32")}
	must(t, concentrator.SetPeer(Peer{Key: router.private.Public(), Addresses: addresses}))
	must(t, router.SetPeer(Peer{Key: concentrator.private.Public(), Addresses: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Remote: concentrator.address()}))

	const inside, far = "10.84.0.2", "203.0.113.10"
	router.send(t, inside, far)
	if got := concentrator.received(t).String(); got != inside {
		t.Errorf("out of the leg comes a packet from %s", got)
	}
	// The order is kept: what is not the leg's would come first.
	router.send(t, "10.84.0.3", far)
	router.send(t, inside, far)
	if got := concentrator.received(t).String(); got != inside {
		t.Errorf("out of the leg comes a packet from %s, which is not its address", got)
	}
	concentrator.send(t, far, inside)
	if got := router.received(t).String(); got != far {
		t.Errorf("back comes a packet from %s", got)
	}
	for name, e := range map[string]end{"router": router, "concentrator": concentrator} {
		if now := time.Now(); !e.Fresh(now) || e.Fresh(now.Add(fresh+time.Minute)) {
			t.Errorf("%s: fresh now %v, and minutes later %v", name, e.Fresh(now), e.Fresh(now.Add(fresh+time.Minute)))
		}
	}

	concentrator.RemovePeer(router.private.Public())
	if concentrator.Fresh(time.Now()) {
		t.Error("there are keys with a peer that was removed")
	}
	concentrator.Close()
	select {
	case <-concentrator.Done():
	case <-time.After(patience):
		t.Error("closed, and not done")
	}
	if _, err := concentrator.socket.Write(nil); err == nil {
		t.Error("the socket is still open")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
