package router

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/tunnel"
)

const (
	// maxConnections bounds the LAN connections open at once; more are reset.
	maxConnections = 16384
	// blockRetry is how often a waiting connection looks for the tunnel again.
	blockRetry = 250 * time.Millisecond
	// directDial is how long a destination may take without the tunnel, over
	// each uplink.
	directDial = 5 * time.Second
)

// carry takes one LAN connection to its destination.
func (r *Router) carry(ctx context.Context, client *net.TCPConn, destination netip.AddrPort) {
	defer r.connections.Add(-1)
	if r.connections.Add(1) > maxConnections {
		reset(client)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, clientPatience)
	defer cancel()
	r.packets.bond.Touch() // whether the concentrator still answers is known soon
	for {
		session, err := r.pool.Get(ctx)
		if err == nil {
			r.flows.Add(1)
			err = session.Relay(client, destination)
			r.pool.Put(session)
			if r.flows.Add(-1) == 0 && r.current().Settings.Multipath.PathManager == settings.PathManagerNetlink {
				r.loop.Poke() // now endpoints may go
			}
			if err != nil {
				r.log.Debug("flow ended early", "client", client.RemoteAddr(), "destination", destination, "error", err)
			}
			return
		}
		if errors.Is(err, tunnel.ErrDown) && r.current().Settings.WhenTunnelDown == settings.Direct {
			r.carryDirect(ctx, client, destination)
			return
		}
		select {
		case <-ctx.Done():
			r.log.Debug("LAN connection reset: the tunnel is down", "client", client.RemoteAddr(), "destination", destination, "error", err)
			reset(client)
			return
		case <-time.After(blockRetry):
		}
	}
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// carryDirect relays without the tunnel, out of the best fit uplink over which the
// destination answers.
func (r *Router) carryDirect(ctx context.Context, client *net.TCPConn, destination netip.AddrPort) {
	var server *net.TCPConn
	for _, source := range directSources(r.paths(), r.packets.ranking(), destination.Addr()) {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: source.AsSlice()}, Timeout: directDial}
		c, err := dialer.DialContext(ctx, "tcp", destination.String())
		if err == nil {
			server = c.(*net.TCPConn)
			break
		}
	}
	if server == nil {
		reset(client)
		return
	}
	defer r.direct.add(client, server, destination)()
	// Should this process end now, neither side may take it for a clean end.
	_ = errors.Join(client.SetLinger(0), server.SetLinger(0))
	var both sync.WaitGroup
	both.Go(func() { splice(server, client) })
	both.Go(func() { splice(client, server) })
	both.Wait()
	for _, c := range []*net.TCPConn{client, server} {
		_ = c.SetLinger(-1)
		_ = c.Close()
	}
}

// directSources are the addresses to leave from, best first as for packets: by
// the ranking, then in the settings' order, and those of backups last.
func directSources(ways []tunnel.Path, ranking []string, destination netip.Addr) []netip.Addr {
	place := func(way tunnel.Path) int {
		if i := slices.Index(ranking, way.Name); i >= 0 {
			return i
		}
		return len(ranking)
	}
	var on, backup []netip.Addr
	for _, way := range slices.SortedStableFunc(slices.Values(ways), func(a, b tunnel.Path) int { return cmp.Compare(place(a), place(b)) }) {
		for _, source := range way.Sources {
			switch {
			case source.Is4() != destination.Is4():
			case way.Backup:
				backup = append(backup, source)
			default:
				on = append(on, source)
			}
		}
	}
	return append(on, backup...)
}

// splice copies until the end, which it passes on, or a failure, which it
// passes on as RST.
func splice(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		reset(to)
		reset(from)
		return
	}
	_ = to.CloseWrite()
}
