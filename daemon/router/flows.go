package router

import (
	"cmp"
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sheaf/daemon/datapath/tunnel"
	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

// The path of a flow to an operator's list:
//
//	tunnel.Flows ──────────┐
//	directFlows.describe ──┴▶ Flows: addresses become names ─▶ webui

// Flows lists the live flows, those first that have moved most.
func (r *Router) Flows(_ context.Context, limit int) (webui.Flows, error) {
	if statuses, err := r.observe(); err == nil {
		r.names.learn(statuses)
	}
	now := time.Now()
	inTunnel, total := tunnel.Flows(limit, r.pool, r.inbound)
	list := webui.Flows{Total: total, Flows: make([]webui.Flow, 0, len(inTunnel))}
	for _, f := range inTunnel {
		list.Flows = append(list.Flows, r.names.describe(f, "tunnel", now))
	}
	direct := r.direct.list()
	list.Total += len(direct)
	for _, f := range direct {
		list.Flows = append(list.Flows, r.names.describe(f, "direct", now))
	}
	moved := func(f webui.Flow) uint64 { return f.UpBytes + f.DownBytes }
	slices.SortStableFunc(list.Flows, func(a, b webui.Flow) int { return cmp.Compare(moved(b), moved(a)) })
	list.Flows = list.Flows[:min(limit, len(list.Flows))]
	return list, nil
}

// names remembers which uplink has had an address: flows outlive it.
type names struct {
	mu        sync.Mutex
	byAddress map[netip.Addr]string
}

// maxNames bounds the addresses remembered: those of uplinks that change them
// often are forgotten all at once.
const maxNames = 1024

func (n *names) learn(statuses []uplink.Status) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byAddress == nil || len(n.byAddress) > maxNames {
		n.byAddress = map[netip.Addr]string{}
	}
	for _, u := range statuses {
		for _, source := range u.Sources {
			n.byAddress[source.Addr()] = u.Name
		}
		for _, inner := range u.Leg.Addresses {
			n.byAddress[inner] = u.Name
		}
	}
}

func (n *names) describe(f tunnel.Flow, through string, now time.Time) webui.Flow {
	w := webui.Flow{
		Client: f.Client.String(), Destination: f.Destination.String(), Inbound: f.Inbound, Through: through,
		Since: f.Since.UTC(), AgeS: now.Sub(f.Since).Round(time.Millisecond).Seconds(), UpBytes: f.Sent, DownBytes: f.Received,
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range f.Sources {
		w.Uplinks = append(w.Uplinks, webui.UplinkBytes{
			Name: n.byAddress[s.Source], Address: s.Source.String(), UpBytes: s.Sent, DownBytes: s.Received,
		})
	}
	slices.SortFunc(w.Uplinks, func(a, b webui.UplinkBytes) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Address, b.Address))
	})
	return w
}

// directFlows are the flows that have left without the tunnel.
type directFlows struct {
	mu   sync.Mutex
	open map[*net.TCPConn]tunnel.Flow // by the connection to the destination
}

// add lists a flow until done is called. Its bytes are asked of the kernel.
func (d *directFlows) add(client *net.TCPConn, server *net.TCPConn, destination netip.AddrPort) (done func()) {
	from := client.RemoteAddr().(*net.TCPAddr).AddrPort()
	f := tunnel.Flow{Client: netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), Destination: destination, Since: time.Now()}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open == nil {
		d.open = map[*net.TCPConn]tunnel.Flow{}
	}
	d.open[server] = f
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.open, server)
	}
}

func (d *directFlows) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.open)
}

func (d *directFlows) list() []tunnel.Flow {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]tunnel.Flow, 0, len(d.open))
	for server, f := range d.open {
		info, err := tcpInfo(server)
		if err != nil {
			continue // it has just been closed
		}
		source := server.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		f.Sent, f.Received = info.Bytes_acked-min(info.Bytes_acked, 1), info.Bytes_received // our SYN is acknowledged too
		f.Sources = []tunnel.SourceBytes{{Source: source, Sent: f.Sent, Received: f.Received}}
		list = append(list, f)
	}
	return list
}

func tcpInfo(c syscall.Conn) (info *unix.TCPInfo, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	return info, cmp.Or(controlErr, err)
}
