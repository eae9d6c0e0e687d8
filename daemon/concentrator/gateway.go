package concentrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"golang.org/x/sync/errgroup"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/reconcile"
	"sheaf/daemon/datapath/egress"
)

// gateway makes the machine's kernel a gateway for what comes out of the TUN,
// and answers the routers' DNS.
//
//	events, packets.changed ─▶ reconcile.Loop ─▶ want ─▶ kernel
type gateway struct {
	log      *slog.Logger
	config   Config
	store    *Store
	packets  *packets
	kernel   *kernel.Kernel
	loop     *reconcile.Loop
	resolver *egress.Resolver
	// listeners are where routers' sessions are accepted.
	listeners []netip.AddrPort
	// hadForwarding says whether the machine forwarded before us: IPv4, IPv6.
	hadForwarding [2]bool
}

// newGateway prepares the kernel's side.
func newGateway(ctx context.Context, c Config, store *Store, p *packets, listeners []netip.AddrPort) (*gateway, error) {
	k, err := kernel.NewConcentrator()
	if err != nil {
		return nil, err
	}
	// Stored before it is changed: what a killed daemon changed, cleanup puts back.
	k.Before = store.setSysctlsBefore
	g := &gateway{log: c.Log, config: c, store: store, packets: p, kernel: k, resolver: egress.NewResolver(c.Resolvers, c.Log), listeners: listeners}
	g.loop = &reconcile.Loop{Kernel: k, Want: g.want, Log: c.Log}
	p.changed, p.legs.changed = g.loop.Poke, g.loop.Poke
	p.legs.multipath = func() bool {
		info, err := k.Info()
		return err == nil && info.MPTCP != kernel.NoMPTCP && info.Sysctls["enabled"] != "0"
	}
	var before map[string]string
	have, err := k.Read(ctx)
	if err == nil {
		before, err = store.sysctlsBefore()
	}
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	for i, path := range []string{desired.Forwarding4, desired.Forwarding6} {
		value, changed := before[path] // by a daemon that was killed
		if !changed {
			value = have.Sysctls[path].Value
		}
		g.hadForwarding[i] = value == "1"
	}
	return g, nil
}

// want says what the kernel should hold now.
func (g *gateway) want() (desired.State, error) {
	c := desired.Concentrator{
		Network4: Network4(), Network6: g.store.Network6(), Gateway4: Gateway4(), Gateway6: g.store.Gateway6(),
		ConnectRouters: g.config.ConnectRouters, UDPForwards: g.packets.udpForwards(), Legs: g.packets.legs.state(g.listeners),
		HadForwarding4: g.hadForwarding[0], HadForwarding6: g.hadForwarding[1],
	}
	if d := g.packets.device.Device(); d != nil {
		c.Device = desired.Interface{Index: d.Index(), Name: d.Name()}
	}
	return desired.CompileConcentrator(c), nil
}

func (g *gateway) run(ctx context.Context) error {
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error {
		if err := g.loop.Run(ctx); !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
	work.Go(func() error {
		var addresses []netip.AddrPort
		for _, a := range []netip.Addr{Gateway4(), g.store.Gateway6()} {
			addresses = append(addresses, netip.AddrPortFrom(a, 53))
		}
		if err := g.resolver.Serve(ctx, addresses...); err != nil && ctx.Err() == nil {
			// Everything else goes on without it.
			g.log.Error("the routers' DNS is not answered", "error", err)
		}
		return nil
	})
	return work.Wait()
}

// close leaves the machine as it was.
func (g *gateway) close() error {
	err := errors.Join(cleanGateway(g.kernel, g.store), g.kernel.Close())
	if err != nil {
		return fmt.Errorf("putting the machine back as it was; `concentratord cleanup` tries again: %w", err)
	}
	return nil
}

// cleanGateway takes away the table, and puts back the sysctls that were
// changed.
func cleanGateway(k *kernel.Kernel, store *Store) error {
	ctx, cancel := context.WithTimeout(context.Background(), restoreTime)
	defer cancel()
	k.Before = nil
	err := k.Clean(ctx)
	before, readErr := store.sysctlsBefore()
	if err = errors.Join(err, readErr); err != nil || before == nil {
		return err
	}
	if err := k.Restore(ctx, before); err != nil {
		return err
	}
	return store.setSysctlsBefore(nil)
}
