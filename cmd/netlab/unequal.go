package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sheaf/daemon/netlab"
	"sheaf/daemon/netlab/deploy"
)

const (
	unequalRuns = 3
	unequalTime = 15 * time.Second
	unequalRamp = 2 * time.Second
	// unequalRest is for what the transfer before, which was cut off, has left in the
	// queues: it is not this one's.
	unequalRest = time.Second
)

// unequalPairs are uplinks of which the second may cost more than it brings.
var unequalPairs = []struct {
	name    string
	uplinks []netlab.Shape
	target  float64 // of the sum
}{
	{"80 Mbit/s 8 ms and 8 Mbit/s 60 ms", []netlab.Shape{
		{Rate: 80e6, Delay: 8 * time.Millisecond, Queue: 100 * time.Millisecond},
		{Rate: 8e6, Delay: 60 * time.Millisecond, Queue: 100 * time.Millisecond},
	}, 0.97},
	{"40 Mbit/s 15 ms and 40 Mbit/s 25 ms with 1 % loss", []netlab.Shape{
		{Rate: 40e6, Delay: 15 * time.Millisecond, Queue: 100 * time.Millisecond},
		{Rate: 40e6, Delay: 25 * time.Millisecond, Queue: 100 * time.Millisecond, Loss: 0.01},
	}, 0.85},
}

// benchUnequal transfers over pairs of uplinks that are hard to add up.
func benchUnequal(ctx context.Context, o benchOptions) error {
	runs := o.times(unequalRuns)
	fmt.Printf("One TCP connection for %v over two unequal uplinks. Ratio to the payload limit of their sum; median of %d.\n", unequalTime, runs)
	for _, pair := range unequalPairs {
		fmt.Printf("\n%-42s %10s %16s %10s\n", pair.name, "whole", "after 2 s", "target")
		err := withLab(netlab.Config{Uplinks: pair.uplinks, Seed: 1}, func(lab *netlab.Lab) (err error) {
			streams, err := listenStreams(lab)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, streams.close()) }()
			// No uplink alone can carry more.
			limit := payloadLimit(pair.uplinks)
			show := func(name string, dial dialFunc, target string) error {
				for _, upload := range []bool{false, true} {
					var whole, steady []float64
					for range runs {
						if err := sleep(ctx, unequalRest); err != nil {
							return err
						}
						samples, err := streams.run(ctx, dial, upload, func(begin time.Time) error { return sleep(ctx, time.Until(begin.Add(unequalTime))) })
						if err != nil {
							return err
						}
						whole = append(whole, meanRate(samples, 0, unequalTime)/limit)
						steady = append(steady, meanRate(samples, unequalRamp, unequalTime)/limit)
					}
					fmt.Printf("%-42s %10.3f %16.3f %10s\n", name+", "+direction(upload), median(whole), median(steady), target)
				}
				return nil
			}
			if err := show("best uplink alone", dialStream(lab.LAN), ""); err != nil {
				return err
			}
			err = withEndpoints(ctx, lab, func() error { return show("kernel MPTCP", multipathDialer(lab, failoverPort+1), "") })
			if err != nil {
				return err
			}
			return withBond(lab, o.binaries, func(*deploy.Deployment) error {
				return show("Sheaf", dialStream(lab.LAN), fmt.Sprintf("≥ %.2f", pair.target))
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}
