package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"sheaf/daemon/netlab"
	"sheaf/daemon/netlab/deploy"
)

// A transfer at full rate loses one of two equal uplinks, which later returns:
//
//	settle ─▶ fault ──── faultTime ───▶ return ─▶ returnTime
//	     rate before │ gap, rest carried       │ full rate
//
// The receiver notes every read; the figures are computed from that afterwards.
const (
	failoverPort = 5006
	failoverRuns = 10 // half of them with each uplink
	settleTime   = 3 * time.Second
	faultTime    = 3 * time.Second
	returnTime   = 3 * time.Second

	beforeWindow = time.Second             // of the rate before the fault
	gapWindow    = 1500 * time.Millisecond // in which a gap counts as the fault's
	rateWindow   = 250 * time.Millisecond  // of the sliding mean rate
	restShare    = 0.8
	fullShare    = 0.9
	// What probes and acknowledgements may take of an uplink that carries nothing.
	nothing = 100e3 // bit/s
)

var failoverUplinks = []netlab.Shape{
	{Rate: 40e6, Delay: 15 * time.Millisecond, Queue: 100 * time.Millisecond},
	{Rate: 40e6, Delay: 15 * time.Millisecond, Queue: 100 * time.Millisecond},
}

// A fault takes an uplink away and gives it back.
type fault struct {
	name   string
	target string // of the longest gap
	away   func(*netlab.Uplink) error
	back   func(*netlab.Uplink) error
}

var (
	blackHole = fault{"black hole", "≤ 120 ms",
		func(u *netlab.Uplink) error { return u.BlackHole(true) },
		func(u *netlab.Uplink) error { return u.BlackHole(false) }}
	carrierLoss = fault{"carrier loss", "≤ 100 ms",
		func(u *netlab.Uplink) error { return u.Carrier(false) },
		func(u *netlab.Uplink) error { return u.Carrier(true) }}
)

// byOperator is the fault of an operator who sets the uplink's mode.
func byOperator(d *deploy.Deployment, mode, target string) fault {
	set := func(mode string) func(*netlab.Uplink) error {
		return func(u *netlab.Uplink) error { return d.SetMode(u, mode) }
	}
	return fault{"mode " + mode, target, set(mode), set("on")}
}

// outcome is what a fault did to one transfer.
type outcome struct {
	uplink int
	before float64       // bit/s
	gap    time.Duration // longest without a byte
	rest   time.Duration // from the fault on, until the other uplink is used
	quiet  time.Duration // from the fault on, until the uplink carries nothing
	full   time.Duration // from the return on, until the rate is as before
}

// benchFailover takes one of two equal uplinks from a transfer.
func benchFailover(ctx context.Context, o benchOptions) error {
	runs := o.times(failoverRuns)
	fmt.Printf("Two uplinks of 40 Mbit/s, 15 ms one way, 100 ms queues; each in turn is away for %v of a transfer at full rate. %d runs a line, in ms:\n", faultTime, runs)
	fmt.Println("the longest time without a byte at the receiver (every read noted) that begins within 1.5 s of the fault; from the fault, ≥ 80 % of the")
	fmt.Println("other uplink's payload limit; from the return, ≥ 90 % of the rate before. The latter two name the beginning of the first such 250 ms.")
	fmt.Println()
	fmt.Printf("%-42s %8s %8s %10s %8s %8s %8s %8s\n", "", "gap", "worst", "target", "80 %", "worst", "return", "worst")
	return withLab(netlab.Config{Uplinks: failoverUplinks, Seed: 1}, func(lab *netlab.Lab) (err error) {
		streams, err := listenStreams(lab)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, streams.close()) }()
		show := func(name string, dial dialFunc, faults []fault, ready func() error) error {
			for _, f := range faults {
				for _, upload := range []bool{false, true} {
					var list []outcome
					for i := range runs {
						if err := ready(); err != nil {
							return err
						}
						x, err := streams.lose(ctx, dial, upload, f, lab.Uplinks[i%2])
						if err != nil {
							return fmt.Errorf("%s, %s: %w", name, f.name, err)
						}
						list = append(list, x)
					}
					printOutcomes(fmt.Sprintf("%s, %s, %s", name, f.name, direction(upload)), f, list)
				}
			}
			return nil
		}
		for _, upload := range []bool{false, true} {
			rate, err := streams.rate(ctx, dialStream(lab.LAN), upload)
			if err != nil {
				return err
			}
			fmt.Printf("%-42s %8.1f Mbit/s\n", "best uplink alone, "+direction(upload), rate/1e6)
		}
		err = withEndpoints(ctx, lab, func() error {
			return show("kernel MPTCP", multipathDialer(lab, failoverPort+1), []fault{blackHole, carrierLoss}, func() error { return nil })
		})
		if err != nil {
			return err
		}
		return withBond(lab, o.binaries, func(d *deploy.Deployment) error {
			return show("Sheaf", dialStream(lab.LAN), []fault{
				blackHole, carrierLoss, byOperator(d, "off", "≤ 100 ms"), byOperator(d, "backup", ""),
			}, d.WaitUp)
		})
	})
}

func printOutcomes(name string, f fault, list []outcome) {
	var gaps, rests, fulls, quiets []time.Duration
	var rates []float64
	each := map[int]string{}
	for _, x := range list {
		gaps, rests, fulls, quiets = append(gaps, x.gap), append(rests, x.rest), append(fulls, x.full), append(quiets, x.quiet)
		rates = append(rates, x.before)
		each[x.uplink] += fmt.Sprintf(" %.0f", ms(x.gap))
	}
	column := func(list []time.Duration) string {
		return fmt.Sprintf("%8s %8s", untilText(median(list)), untilText(worst(list)))
	}
	fmt.Printf("%-42s %s %10s %s %s\n", name, column(gaps), f.target, column(rests), column(fulls))
	fmt.Printf("  %.1f Mbit/s before; gaps without uplink1:%s; without uplink2:%s\n", median(rates)/1e6, each[1], each[2])
	if strings.HasSuffix(f.name, "backup") {
		fmt.Printf("  %-40s %s %10s\n", "until the uplink carries nothing", column(quiets), "≤ 200 ms")
	}
}

// never stands for what did not come about while it was watched.
const never = time.Hour

func untilText(d time.Duration) string {
	if d == never {
		return "never"
	}
	return fmt.Sprintf("%.0f", ms(d))
}

func worst(list []time.Duration) time.Duration {
	var w time.Duration
	for _, d := range list {
		w = max(w, d)
	}
	return w
}

// streams are endless transfers between two goroutines of this process, so that
// the fault and what arrives are dated by one clock.
type streams struct {
	listeners []net.Listener
	accepted  chan net.Conn
}

func listenStreams(lab *netlab.Lab) (*streams, error) {
	plain, err := lab.Server.Listen("tcp", serverAddress(failoverPort))
	if err != nil {
		return nil, err
	}
	multipath, err := lab.Server.ListenMultipath("tcp", serverAddress(failoverPort+1))
	if err != nil {
		return nil, errors.Join(err, plain.Close())
	}
	s := &streams{listeners: []net.Listener{plain, multipath}, accepted: make(chan net.Conn)}
	for _, l := range s.listeners {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				select {
				case s.accepted <- c:
				case <-time.After(settleTime): // its client has gone
					_ = c.Close()
				}
			}
		}()
	}
	return s, nil
}

func (s *streams) close() error {
	var errs []error
	for _, l := range s.listeners {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

func dialStream(h *netlab.Host) dialFunc {
	return func(ctx context.Context) (net.Conn, error) {
		return h.Dial(ctx, "tcp", serverAddress(failoverPort))
	}
}

// run keeps a transfer going while script does what it does, and returns what
// arrived. Its clock starts before the connection is opened, at begin.
func (s *streams) run(ctx context.Context, dial dialFunc, upload bool, script func(begin time.Time) error) ([]sample, error) {
	begin := time.Now()
	client, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = client.Close() }()
	// A connection through the bond reaches the server with its first byte.
	if _, err := client.Write([]byte{0}); err != nil {
		return nil, err
	}
	var server net.Conn
	select {
	case server = <-s.accepted:
	case <-time.After(10 * time.Second):
		return nil, errors.New("the connection did not reach the server within 10 s")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { _ = server.Close() }()
	from, to := server, client
	if upload {
		from, to = client, server
	}
	var (
		wg       sync.WaitGroup
		samples  []sample
		received error
	)
	wg.Go(func() {
		for {
			if _, err := from.Write(block); err != nil {
				return // the receiver tells
			}
		}
	})
	wg.Go(func() { samples, received = receive(to, endless, begin) })
	failed := script(begin)
	// Whatever ended before this did so by itself.
	_ = to.SetReadDeadline(time.Unix(1, 0))
	_ = from.SetWriteDeadline(time.Unix(1, 0))
	wg.Wait()
	if timeout := net.Error(nil); errors.As(received, &timeout) && timeout.Timeout() {
		received = nil
	}
	if errors.Is(received, io.EOF) {
		received = fmt.Errorf("the transfer ended early: %w", received)
	}
	return samples, errors.Join(failed, received)
}

// rate is the mean rate after settleTime, in bit/s.
func (s *streams) rate(ctx context.Context, dial dialFunc, upload bool) (float64, error) {
	samples, err := s.run(ctx, dial, upload, func(time.Time) error { return sleep(ctx, settleTime+beforeWindow) })
	return meanRate(samples, settleTime, settleTime+beforeWindow), err
}

// lose takes an uplink from a transfer for faultTime.
func (s *streams) lose(ctx context.Context, dial dialFunc, upload bool, f fault, u *netlab.Uplink) (outcome, error) {
	var away, back time.Duration
	var carried []sample // by the uplink, in the transfer's direction
	samples, err := s.run(ctx, dial, upload, func(begin time.Time) error {
		if err := sleep(ctx, settleTime); err != nil {
			return err
		}
		away = time.Since(begin)
		if err := f.away(u); err != nil {
			return errors.Join(err, f.back(u))
		}
		for time.Since(begin) < away+faultTime && ctx.Err() == nil {
			up, down := u.Counters()
			bytes := down.Bytes
			if upload {
				bytes = up.Bytes
			}
			carried = append(carried, sample{time.Since(begin), int64(bytes)})
			time.Sleep(5 * time.Millisecond)
		}
		back = time.Since(begin)
		return errors.Join(f.back(u), sleep(ctx, returnTime))
	})
	if err != nil {
		return outcome{}, err
	}
	before := meanRate(samples, away-beforeWindow, away)
	rest := payloadLimit(failoverUplinks[:1])
	return outcome{
		uplink: u.Number,
		before: before,
		gap:    longestGap(samples, away, away+gapWindow),
		rest:   untilRate(samples, away, back, restShare*rest),
		quiet:  untilQuiet(carried, away),
		// What had waited in front of a gap may have come within that window too.
		full: untilRate(samples, back, back+returnTime, fullShare*min(before, payloadLimit(failoverUplinks))),
	}, nil
}

// longestGap is the longest time between two samples that ends after from and
// begins before until.
func longestGap(samples []sample, from, until time.Duration) time.Duration {
	var longest time.Duration
	for i := 1; i < len(samples); i++ {
		if samples[i].at > from && samples[i-1].at < until {
			longest = max(longest, samples[i].at-samples[i-1].at)
		}
	}
	// The last read may have been long before the transfer was stopped.
	if last := samples[len(samples)-1].at; last < until {
		longest = max(longest, until-last)
	}
	return longest
}

// bytesBy is how much had arrived at a moment.
func bytesBy(samples []sample, at time.Duration) int64 {
	i, exact := slices.BinarySearchFunc(samples, at, func(s sample, at time.Duration) int { return cmp.Compare(s.at, at) })
	if exact {
		i++
	}
	if i == 0 {
		return 0
	}
	return samples[i-1].bytes
}

// meanRate is in bit/s.
func meanRate(samples []sample, from, until time.Duration) float64 {
	return float64(bytesBy(samples, until)-bytesBy(samples, from)) * 8 / (until - from).Seconds()
}

// untilRate is how long after from the first rateWindow begins whose mean rate is
// as wanted, and which ends before until.
func untilRate(samples []sample, from, until time.Duration, want float64) time.Duration {
	const step = 5 * time.Millisecond
	for at := from; at+rateWindow <= until; at += step {
		if meanRate(samples, at, at+rateWindow) >= want {
			return at - from
		}
	}
	return never
}

// untilQuiet is how long after from an uplink has carried nothing for the rest of
// the samples.
func untilQuiet(carried []sample, from time.Duration) time.Duration {
	last := carried[len(carried)-1]
	for _, s := range carried {
		if float64(last.bytes-s.bytes)*8 <= nothing*(last.at-s.at).Seconds() && last.at-s.at > rateWindow {
			return s.at - from
		}
	}
	return never
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
