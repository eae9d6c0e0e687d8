package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"sheaf/daemon/netlab"
	"sheaf/daemon/netlab/deploy"
)

const (
	stormFaults    = 1000
	stormEvery     = 600 * time.Millisecond // 1000 in ten minutes
	stormTransfers = 50
)

// benchFaults lets random faults loose on many transfers; see deploy.Storm.
func benchFaults(ctx context.Context, o benchOptions) error {
	s := deploy.Storm{Seed: 1, Faults: o.times(stormFaults), Transfers: stormTransfers, Shapes: uplinks}
	s.Duration = time.Duration(s.Faults) * stormEvery
	fmt.Printf("%d random faults within %v, seed %d, under %d transfers at once of 10 kB to 10 MB, both ways, same uplinks.\n\n", s.Faults, s.Duration, s.Seed, s.Transfers)
	return withLab(netlab.Config{Uplinks: uplinks, Seed: 1}, func(lab *netlab.Lab) error {
		before, err := deploy.Network(lab)
		if err != nil {
			return err
		}
		err = withBond(lab, o.binaries, func(d *deploy.Deployment) error {
			r, err := s.Run(ctx, d)
			for _, kind := range slices.Sorted(maps.Keys(r.Faults)) {
				fmt.Printf("%-46s %14d\n", kind, r.Faults[kind])
			}
			fmt.Printf("%-46s %14d %9s\n", "transfers failed, or with another content", r.Failed, "0")
			fmt.Printf("%-46s %14d   %.2f GB\n", "transfers complete", r.Transfers, float64(r.Bytes)/1e9)
			fmt.Printf("%-46s %12.1f s\n", "longest without a byte at a receiver", r.LongestStall.Seconds())
			fmt.Printf("%-46s %12.1f s\n", "slowest transfer", r.Slowest.Seconds())
			if err != nil {
				return err
			}
			fmt.Printf("%-46s %12.1f s\n", "nothing left over after", r.Settled.Seconds())
			fmt.Printf("%-46s %14d\n", "  sockets that the kernels are yet closing", r.Closing)
			return nil
		})
		after, e := deploy.Network(lab)
		if err = errors.Join(err, e); err != nil {
			return err
		}
		if after != before {
			return fmt.Errorf("the daemons have ended and left behind:\n%s", netlab.Difference(before, after))
		}
		fmt.Printf("%-46s %14s\n", "left over after the daemons have ended", "nothing")
		return nil
	})
}
