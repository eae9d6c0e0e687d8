// Package concentrator joins the data path and the control path on the cloud
// machine.
//
//	router ═ MPTCP ═▶ listener ─▶ tunnel.Server ─ OPEN ─▶ egress.Dialer ─▶ Internet
//	router ═ QUIC, MPTCP ═▶ tunnel.Server ─ Attach ─▶ packets ─▶ TUN ─▶ masquerade ─▶ Internet
//	router ═ UDP beside QUIC ═▶ legs ─▶ TUN of legs ─▶ listener
//	Internet ─▶ egress.Forwards ─▶ tunnel.Server.OpenInbound ═▶ router
//	concentratord token, routers ─▶ unix socket ─▶ Store ─▶ tunnel.Server (revocation)
//	events ─▶ reconcile.Loop ─▶ want ─▶ kernel: one nftables table, one TUN, and one more for legs
//
// Beside its own files, table and TUN devices it changes of the machine, where it may,
// the number of subflows that the kernel accepts for a connection and what makes
// the kernel forward packets. Both are put back when it stops. Of the TCP
// connections of its port it ends those that sessions have given up (subflows.go).
package concentrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"sheaf/daemon/datapath/egress"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/webui"
)

// Config is what the command line says.
type Config struct {
	StateDir string
	Listen   []string // host:port each; an empty host is every address
	Allowed  []netip.Prefix
	// Resolvers answer the routers' DNS; none are those of /etc/resolv.conf.
	Resolvers []netip.AddrPort
	// ForwardPorts are those that routers may have forwarded; none are 1024 to
	// 65535.
	ForwardPorts []egress.PortRange
	// ConnectRouters lets routers reach one another.
	ConnectRouters bool
	Log            *slog.Logger
}

// SocketPath is the unix socket on which a running daemon serves its commands.
func SocketPath(stateDir string) string { return filepath.Join(stateDir, "concentratord.sock") }

// Concentrator is a running daemon. It satisfies webui.Concentrator.
type Concentrator struct {
	store   *Store
	server  *tunnel.Server
	packets *packets
}

// Run serves until ctx ends.
func Run(ctx context.Context, c Config) error {
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return fmt.Errorf("making the state directory: %w", err)
	}
	store, err := OpenStore(c.StateDir)
	if err != nil {
		return err
	}
	defer func() { _ = store.Close() }()

	socket, err := webui.ListenUnix(SocketPath(c.StateDir))
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()
	listeners, err := listen(ctx, c.Listen)
	if err != nil {
		return err
	}

	sockets, err := listenPackets(listeners)
	if err != nil {
		return err
	}

	restore := raiseLimits(ctx, store, c.Log)
	defer restore()

	policy := egress.Policy{Allowed: c.Allowed}
	dialer := egress.NewDialer(policy)
	dial := func(ctx context.Context, router string, destination netip.AddrPort) (*net.TCPConn, func(), tunnel.ResetReason, error) {
		conn, done, err := dialer.Dial(ctx, router, destination)
		if err != nil {
			return nil, nil, resetReasons[egress.Classify(err)], err
		}
		return conn, done, 0, nil
	}
	con := &Concentrator{store: store, server: tunnel.NewServer(store.Identity(), store, dial, c.Log)}
	ports := egress.ForwardPolicy{Ports: c.ForwardPorts}
	addresses := addressesOf(listeners)
	ports.Reserved = append(ports.Reserved, portsOf(addresses)...)
	con.packets = newPackets(c.Log, store, policy, ports, con.server.OpenInbound)
	con.packets.calm, con.packets.schedule, con.packets.rank = con.server.SetCalm, con.server.SetScheduler, con.server.SetRanks
	con.packets.control = con.server.SetCongestionControl
	con.packets.legs = newLegs(c.Log, store, con.server.Beside)
	if c.ConnectRouters {
		con.packets.mutual = []netip.Prefix{Network4(), store.Network6()}
	}
	gateway, err := newGateway(ctx, c, store, con.packets, addresses)
	if err != nil {
		// TCP needs nothing of the kernel.
		c.Log.Warn("routers' packets are not carried, only their TCP: that takes nf_tables and CAP_NET_ADMIN", "error", err)
	} else {
		con.server.HandlePackets(con.packets)
	}

	c.Log.Info("concentrator ready", "listen", c.Listen, "key", store.Identity().PublicKey().Fingerprint(), "routers", len(store.Routers()))
	work, ctx := errgroup.WithContext(ctx)
	if gateway != nil {
		work.Go(func() error { con.packets.run(ctx); return nil })
		work.Go(func() error { return gateway.run(ctx) })
	}
	work.Go(func() error { con.server.Serve(ctx, listeners...); return nil })
	work.Go(func() error { tend(ctx, con.server, portsOf(addresses), c.Log); return nil })
	work.Go(func() error { con.server.ServeDatagrams(ctx, sockets...); return nil })
	work.Go(func() error { return webui.Serve(ctx, socket, webui.NewConcentratorHandler(con, c.Log)) })
	err = work.Wait()
	if gateway != nil {
		err = errors.Join(err, gateway.close())
	}
	return err
}

var resetReasons = map[egress.Failure]tunnel.ResetReason{
	egress.Refused:     tunnel.ResetRefused,
	egress.Unreachable: tunnel.ResetUnreachable,
	egress.TimedOut:    tunnel.ResetTimeout,
	egress.Forbidden:   tunnel.ResetForbidden,
	egress.Limited:     tunnel.ResetLimit,
}

func listen(ctx context.Context, addresses []string) ([]net.Listener, error) {
	config := tunnel.ListenConfig()
	var listeners []net.Listener
	for _, address := range addresses {
		l, err := config.Listen(ctx, "tcp", address)
		if err != nil {
			for _, open := range listeners {
				_ = open.Close()
			}
			return nil, fmt.Errorf("listening for routers: %w", err)
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

// addressesOf are those where routers' sessions are accepted.
func addressesOf(listeners []net.Listener) []netip.AddrPort {
	var addresses []netip.AddrPort
	for _, l := range listeners {
		address := l.Addr().(*net.TCPAddr).AddrPort()
		addresses = append(addresses, netip.AddrPortFrom(address.Addr().Unmap().WithZone(""), address.Port()))
	}
	return addresses
}

// listenPackets opens the UDP ports of the same numbers for datagrams.
func listenPackets(listeners []net.Listener) ([]net.PacketConn, error) {
	var sockets []net.PacketConn
	for _, l := range listeners {
		address := l.Addr().(*net.TCPAddr)
		s, err := net.ListenUDP("udp", &net.UDPAddr{IP: address.IP, Port: address.Port, Zone: address.Zone})
		if err != nil {
			for _, open := range sockets {
				_ = open.Close()
			}
			for _, open := range listeners {
				_ = open.Close()
			}
			return nil, fmt.Errorf("listening for routers' datagrams: %w", err)
		}
		sockets = append(sockets, s)
	}
	return sockets, nil
}

// CreateToken makes a one-time enrolment token.
func (c *Concentrator) CreateToken(_ context.Context, name string, addresses []string, validity time.Duration) (string, error) {
	token, err := c.store.CreateToken(name, addresses, validity)
	if err != nil {
		return "", tokenError(err)
	}
	return token.String(), nil
}

// tokenError gives the refusals of CreateToken, which are about its arguments,
// a code; what is left is ours.
func tokenError(err error) error {
	var refusal *TokenError
	if !errors.As(err, &refusal) {
		return err
	}
	code := webui.CodeBadRequest
	if refusal.Taken {
		code = webui.CodeRouterExists
	}
	return &webui.Error{Code: code, Detail: err.Error()}
}

// Routers lists the enrolled routers with what was seen of them since the start.
func (c *Concentrator) Routers(context.Context) ([]webui.EnrolledRouter, error) {
	enrolled := c.store.Routers()
	list := describe(enrolled, c.server.Activity())
	for i := range list {
		c.packets.describe(enrolled[i].Key, &list[i])
	}
	return list, nil
}

// describe joins what is stored with what is seen; activity is nil while no
// daemon runs.
func describe(enrolled []Enrolled, activity map[tunnel.PublicKey]tunnel.RouterActivity) []webui.EnrolledRouter {
	list := make([]webui.EnrolledRouter, 0, len(enrolled))
	for _, e := range enrolled {
		r := webui.EnrolledRouter{Name: e.Name, Fingerprint: e.Key.Fingerprint(), EnrolledAt: e.Enrolled.UTC()}
		if a, ok := activity[e.Key]; ok {
			seen := a.LastSeen.UTC()
			r.LastSeen, r.Address, r.Sessions, r.Flows = &seen, a.Address, a.Sessions, a.Flows
			r.RxBytes, r.TxBytes = a.Received, a.Sent
		}
		list = append(list, r)
	}
	return list
}

// RemoveRouter revokes a router and ends its sessions.
func (c *Concentrator) RemoveRouter(_ context.Context, name string) error {
	key, err := c.store.Remove(name)
	if errors.Is(err, ErrNoRouter) {
		return &webui.Error{Code: webui.CodeRouterUnknown, Detail: err.Error()}
	}
	if err != nil {
		return err
	}
	c.server.Revoke(key)
	c.packets.remove(key)
	return nil
}

// Offline does the commands on the state of a stopped daemon.
type Offline struct{ Store *Store }

// CreateToken is as Concentrator's.
func (o Offline) CreateToken(_ context.Context, name string, addresses []string, validity time.Duration) (string, error) {
	token, err := o.Store.CreateToken(name, addresses, validity)
	return token.String(), err
}

// Routers is as Concentrator's; nothing has been seen of any.
func (o Offline) Routers(context.Context) ([]webui.EnrolledRouter, error) {
	return describe(o.Store.Routers(), nil), nil
}

// RemoveRouter is as Concentrator's.
func (o Offline) RemoveRouter(_ context.Context, name string) error {
	_, err := o.Store.Remove(name)
	return err
}
