package concentrator

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sheaf/daemon/control/kernel"
	"sheaf/daemon/datapath/tunnel"
)

// The path of the decision to end subflows here, which the routers open:
//
//	a subflow came or went ─▶ closed while its session lives: kernel.AbortClosed
//	every second ───────────▶ given up by the router: Server.Tend ─▶ kernel.AbortSubflows
const (
	tendEvery = time.Second
	// closedSettle gathers subflows that are closed together.
	closedSettle = 200 * time.Millisecond
)

// tend ends subflows until ctx does. Without the right to it sessions work all the
// same, and recover later.
func tend(ctx context.Context, server *tunnel.Server, ports []uint16, log *slog.Logger) {
	const notTended = "subflows that are of no more use are left to the kernel, which ends them after minutes"
	k, err := kernel.NewConcentrator()
	if err != nil {
		log.Warn(notTended, "error", err)
		return
	}
	defer func() { _ = k.Close() }()
	if info, err := k.Info(); err != nil || info.MPTCP != kernel.Upstream {
		return
	}
	woken := make(chan struct{}, 1)
	var following sync.WaitGroup
	defer following.Wait()
	following.Go(func() {
		err := k.FollowSubflows(ctx, func() {
			select {
			case woken <- struct{}{}:
			default:
			}
		})
		if ctx.Err() == nil {
			log.Warn(notTended, "error", err)
		}
	})
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	failed := ""
	for {
		var err error
		select {
		case <-ctx.Done():
			return
		case <-woken:
			time.Sleep(closedSettle)
			_, err = k.AbortClosed(server.Tokens)
		case now := <-tick.C:
			if gone := server.Tend(now); len(gone) > 0 {
				for _, port := range ports {
					_, failure := k.AbortSubflows(port, ends(gone))
					err = errors.Join(err, failure)
				}
			}
		}
		// Once, however often it is repeated.
		if err != nil && err.Error() != failed {
			failed = err.Error()
			log.Warn(notTended, "error", err)
		}
	}
}

func ends(list []tunnel.Ends) []kernel.Ends {
	var same []kernel.Ends
	for _, e := range list {
		same = append(same, kernel.Ends(e))
	}
	return same
}

// portsOf are those that routers reach, each once.
func portsOf(addresses []netip.AddrPort) []uint16 {
	var ports []uint16
	for _, a := range addresses {
		ports = append(ports, a.Port())
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}
