package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
	"sheaf/daemon/netlab"
	"sheaf/daemon/netlab/deploy"
)

const (
	shapedSize   = 80e6
	shapedRuns   = 5
	smallRuns    = 40
	manyFlows    = 2000
	manySize     = 100e3
	unshapedSize = 2e9
	unshapedRuns = 3
)

type benchOptions struct {
	binaries string
	only     string // part; empty for all
	runs     int    // of what is repeated; 0 for each part's own number
}

// times is how often to do what is done n times.
func (o benchOptions) times(n int) int {
	if o.runs > 0 {
		return o.runs
	}
	return n
}

// parts are those of bench, in its order.
var parts = []struct {
	name string
	run  func(context.Context, benchOptions) error
}{
	{"shaped", benchShaped}, {"packets", benchPackets}, {"small", benchSmall}, {"unequal", benchUnequal}, {"failover", benchFailover}, {"faults", benchFaults},
	{"many", benchMany}, {"unshaped", benchUnshaped},
}

func partNames() string {
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	return strings.Join(names, ", ")
}

// bench runs the parts one after the other, each in a lab of its own.
func bench(ctx context.Context, o benchOptions) error {
	ran := false
	for _, p := range parts {
		if o.only != "" && o.only != p.name {
			continue
		}
		ran = true
		if err := p.run(ctx, o); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Println()
	}
	if !ran {
		return fmt.Errorf("there is no part %q: %s", o.only, partNames())
	}
	return nil
}

// withLab runs f in a lab with transfer servers in the server host, plain TCP
// on IPv4 and, for comparison, MPTCP on the port after it.
func withLab(config netlab.Config, f func(lab *netlab.Lab) error) (err error) {
	lab, err := netlab.New(config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	plain, err := lab.Server.Listen("tcp", fmt.Sprintf("%s:%d", netlab.ServerAddress, transferPort))
	if err != nil {
		return err
	}
	multipath, err := lab.Server.ListenMultipath("tcp", fmt.Sprintf("%s:%d", netlab.ServerAddress, transferPort+1))
	if err != nil {
		return err
	}
	servers := serveTransfers(plain, multipath)
	defer servers.close()
	return f(lab)
}

// withBond runs f beside running daemons, whose log goes to a file.
func withBond(lab *netlab.Lab, binaries string, f func(*deploy.Deployment) error) (err error) {
	dir, err := os.MkdirTemp("", "sheaf-lab-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	d := deploy.New(lab, binaries, dir, log)
	if err := d.Start(); err != nil {
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%w\n%s", err, text)
	}
	if err := errors.Join(f(d), d.Stop()); err != nil {
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%w\n%s", err, text)
	}
	return nil
}

// benchShaped moves 80 MB over the demo's uplinks.
func benchShaped(ctx context.Context, o benchOptions) error {
	runs := o.times(shapedRuns)
	limit := payloadLimit(uplinks)
	fmt.Printf("One TCP connection, %.0f MB, uplinks 50 Mbit/s 10 ms, 30 Mbit/s 20 ms, 20 Mbit/s 40 ms (one way), 100 ms queues.\n", shapedSize/1e6)
	fmt.Printf("Ratio to the payload limit of their sum, %.1f Mbit/s; median of %d.\n\n", limit/1e6, runs)
	fmt.Printf("%-34s %10s %16s\n", "", "whole", "after 2 s")
	show := func(name string, upload bool, dial dialFunc) error {
		var whole, steady []float64
		for range runs {
			samples, err := transfer(ctx, dial, upload, shapedSize)
			if err != nil {
				return err
			}
			w, s := rates(samples)
			whole, steady = append(whole, w/limit), append(steady, s/limit)
		}
		fmt.Printf("%-34s %10.3f %16.3f\n", name+", "+direction(upload), median(whole), median(steady))
		return nil
	}
	return withLab(netlab.Config{Uplinks: uplinks, Seed: 1}, func(lab *netlab.Lab) error {
		for _, upload := range []bool{false, true} {
			if err := show("best uplink alone", upload, dialer(lab.LAN)); err != nil {
				return err
			}
		}
		err := withEndpoints(ctx, lab, func() error {
			multipath := multipathDialer(lab, transferPort+1)
			return errors.Join(show("kernel MPTCP end to end", false, multipath), show("kernel MPTCP end to end", true, multipath))
		})
		if err != nil {
			return err
		}
		return withBond(lab, o.binaries, func(*deploy.Deployment) error {
			return errors.Join(
				show("Sheaf", false, dialer(lab.LAN)),
				show("Sheaf", true, dialer(lab.LAN)))
		})
	})
}

// multipathDialer connects the router itself to a server that takes MPTCP.
func multipathDialer(lab *netlab.Lab, port int) dialFunc {
	return func(ctx context.Context) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(lab.Uplinks[0].Address())}}
		d.SetMultipathTCP(true)
		return lab.Router.DialWith(ctx, d, "tcp", serverAddress(port))
	}
}

// withEndpoints runs f with the router's kernel set up for MPTCP on every
// uplink as sheafd would, but without sheafd.
func withEndpoints(ctx context.Context, lab *netlab.Lab, f func() error) (err error) {
	s := settings.Default()
	var wants []uplink.Want
	var names []string
	for _, u := range lab.Uplinks {
		name := fmt.Sprintf("uplink%d", u.Number)
		s.Uplinks = append(s.Uplinks, settings.Uplink{Name: name, Interface: u.Interface(), Mode: settings.On, Address: settings.Address{Method: settings.Existing}})
		wants = append(wants, uplink.Want{Name: name, Interface: u.Interface()})
		names = append(names, u.Interface())
	}
	var k *kernel.Kernel
	err = lab.Router.Do(func() error {
		seen, err := uplink.Observe(names)
		if err != nil {
			return err
		}
		if k, err = kernel.New(); err != nil {
			return err
		}
		have, err := k.Read(ctx)
		if err != nil {
			return err
		}
		return k.Apply(ctx, desired.Diff(have, desired.Compile(s, uplink.Judge(seen, wants), nil, desired.Tunnel{})))
	})
	if k != nil {
		defer func() {
			err = errors.Join(err, lab.Router.Do(func() error { return k.Clean(ctx) }), k.Close())
		}()
	}
	if err != nil {
		return err
	}
	return f()
}

// smallSizes are in bytes; a fetch over the bond is to take at most the share of
// the time that it takes over the best uplink alone.
var smallSizes = []struct {
	bytes  int64
	target float64
}{{10e3, 0.6}, {100e3, 0.7}, {1e6, 0.6}}

// benchSmall fetches little, each time on a new connection.
func benchSmall(ctx context.Context, o benchOptions) error {
	runs := o.times(smallRuns)
	fmt.Printf("Small fetches, each on a new LAN connection, same uplinks; median of %d.\n\n", runs)
	fmt.Printf("%-34s %14s %14s %8s %8s\n", "", "best alone", "Sheaf", "of it", "target")
	fetch := func(dial dialFunc) ([]time.Duration, error) {
		var medians []time.Duration
		for _, size := range smallSizes {
			var times []time.Duration
			for range runs {
				samples, err := transfer(ctx, dial, false, size.bytes)
				if err != nil {
					return nil, err
				}
				times = append(times, samples[len(samples)-1].at)
				time.Sleep(20 * time.Millisecond)
			}
			medians = append(medians, median(times))
		}
		return medians, nil
	}
	return withLab(netlab.Config{Uplinks: uplinks, Seed: 1}, func(lab *netlab.Lab) error {
		alone, err := fetch(dialer(lab.LAN))
		if err != nil {
			return err
		}
		return withBond(lab, o.binaries, func(*deploy.Deployment) error {
			bonded, err := fetch(dialer(lab.LAN))
			if err != nil {
				return err
			}
			for i, size := range smallSizes {
				fmt.Printf("%-34s %11.1f ms %11.1f ms %8.2f %8s\n", fmt.Sprintf("%d kB", size.bytes/1000),
					ms(alone[i]), ms(bonded[i]), float64(bonded[i])/float64(alone[i]), fmt.Sprintf("≤ %.1f", size.target))
			}
			return nil
		})
	})
}

// benchMany opens many connections at once, then fetches over each.
func benchMany(ctx context.Context, o benchOptions) error {
	fmt.Printf("%d LAN connections open at once, then %.0f kB over each, same uplinks.\n\n", manyFlows, manySize/1e3)
	return withLab(netlab.Config{Uplinks: uplinks, Seed: 1}, func(lab *netlab.Lab) error {
		return withBond(lab, o.binaries, func(d *deploy.Deployment) error {
			connections := make([]net.Conn, manyFlows)
			defer func() {
				for _, c := range connections {
					if c != nil {
						_ = c.Close()
					}
				}
			}()
			opening, octx := errgroup.WithContext(ctx)
			opening.SetLimit(200)
			dial := dialer(lab.LAN)
			for i := range connections {
				opening.Go(func() (err error) { connections[i], err = dial(octx); return err })
			}
			if err := opening.Wait(); err != nil {
				return err
			}
			begin := time.Now()
			var mu sync.Mutex
			complete := 0
			fetching := new(errgroup.Group)
			for _, c := range connections {
				fetching.Go(func() error {
					_ = c.SetDeadline(time.Now().Add(3 * time.Minute))
					if _, err := c.Write(binary.BigEndian.AppendUint64(nil, manySize)); err != nil {
						return err
					}
					if n, err := io.CopyN(io.Discard, c, manySize); err != nil {
						return fmt.Errorf("after %d bytes: %w", n, err)
					}
					mu.Lock()
					complete++
					mu.Unlock()
					return nil
				})
			}
			fetchErr := fetching.Wait()
			elapsed := time.Since(begin)
			fmt.Printf("%-34s %d of %d in %.1f s\n", "complete", complete, manyFlows, elapsed.Seconds())
			for _, p := range []struct {
				name    string
				process *netlab.Process
			}{{"router", d.Router}, {"concentrator", d.Concentrator}} {
				u, err := p.process.Usage()
				if err != nil {
					return err
				}
				fmt.Printf("%-34s %.1f KiB resident per connection, %.1f at its peak\n", p.name,
					float64(u.Resident)/manyFlows/1024, float64(u.PeakResident)/manyFlows/1024)
			}
			return fetchErr
		})
	})
}

// benchUnshaped moves 2 GB over plain veth uplinks.
func benchUnshaped(ctx context.Context, o benchOptions) error {
	runs := o.times(unshapedRuns)
	fmt.Printf("One TCP connection, %.0f GB, unshaped uplinks; client, server and both daemons on this machine; best of %d.\n\n", unshapedSize/1e9, runs)
	return withLab(netlab.Config{Uplinks: make([]netlab.Shape, len(uplinks)), Unshaped: true}, func(lab *netlab.Lab) error {
		samples, err := transfer(ctx, dialer(lab.LAN), false, unshapedSize)
		if err != nil {
			return err
		}
		plain, _ := rates(samples)
		fmt.Printf("%-34s %10.2f Gbit/s\n", "no proxy, one uplink", plain/1e9)
		return withBond(lab, o.binaries, func(d *deploy.Deployment) error {
			for _, upload := range []bool{false, true} {
				best, cost := 0.0, 0.0
				for range runs {
					before, err := cpu(d)
					if err != nil {
						return err
					}
					samples, err := transfer(ctx, dialer(lab.LAN), upload, unshapedSize)
					if err != nil {
						return err
					}
					after, err := cpu(d)
					if err != nil {
						return err
					}
					if whole, _ := rates(samples); whole > best {
						best, cost = whole, (after-before).Seconds()/(unshapedSize/1e9)
					}
				}
				fmt.Printf("%-34s %10.2f Gbit/s   %.2f CPU-s per GB, both daemons   %.2f of no proxy\n", "Sheaf, "+direction(upload), best/1e9, cost, best/plain)
			}
			return nil
		})
	})
}

// cpu is the time that both daemons have used.
func cpu(d *deploy.Deployment) (time.Duration, error) {
	router, err := d.Router.Usage()
	if err != nil {
		return 0, err
	}
	concentrator, err := d.Concentrator.Usage()
	return router.CPU + concentrator.CPU, err
}

func median[T int | time.Duration | float64](list []T) T {
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)/2]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
