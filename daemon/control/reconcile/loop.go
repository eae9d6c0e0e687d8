// Package reconcile keeps the kernel as it is desired.
//
// The path of a wake-up through this package:
//
//	an event of the kernel ─┐
//	Poke, Sync (settings) ──┼▶ pass: want, Read, Diff, contest, Apply ─▶ Report
//	30 s, or back-off ──────┘
//
// A wake-up carries nothing: every pass reads both sides anew.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"sheaf/daemon/control/desired"
)

// Kernel is what is kept as desired.
type Kernel interface {
	// Read returns what of ours the kernel holds.
	Read(context.Context) (desired.State, error)
	// Apply carries out all changes that it can, and joins the failures.
	Apply(context.Context, []desired.Change) error
	// Changed is ready when the kernel has changed, by whomever.
	Changed() <-chan struct{}
}

// The loop's times.
const (
	// period is between passes when nothing happens: not everything that can
	// change sends an event (MPTCP endpoints and sysctls do not).
	period = 30 * time.Second
	// settle is from one pass to the next event's: an event acts at once when
	// there was none before it, and a burst makes one more pass.
	settle = 20 * time.Millisecond
	// contended bounds settle as it doubles while pass after pass finds things
	// changed: then somebody undoes what we do.
	contended = time.Second
	// A pass that failed is repeated after backoffFirst, doubling to
	// backoffLast. Events do not wait for that, but for backoffFirst.
	backoffFirst = 100 * time.Millisecond
	backoffLast  = 10 * time.Second
	// repeatAfter is how long the same line is not logged again.
	repeatAfter = time.Minute
	// usual is how many passes in a row may have something to change before
	// that counts as contention.
	usual = 3
)

// Pass is what one pass did.
type Pass struct {
	Changes []desired.Change // those that were necessary, whether or not they succeeded
	// Problems are what the kernel cannot do of what is wanted, and what another
	// program does to it.
	Problems []string
	Err      error
}

// Loop keeps a kernel as desired. Its fields are set before it is used.
type Loop struct {
	Kernel Kernel
	// Want says what the kernel should hold, from the settings and the uplinks
	// of this moment.
	Want func() (desired.State, error)
	// Report, if set, receives every pass of Run as it ends.
	Report func(Pass)
	// Log is slog's default if not set.
	Log *slog.Logger

	once sync.Once
	poke chan struct{}

	passing sync.Mutex // one pass at a time
	contest contest    // guarded by passing

	// said is when a line was logged; only Run uses it.
	said map[string]time.Time

	mu      sync.Mutex
	waiting []chan error // for the end of the next pass to begin
	stopped bool
}

// ErrStopped is what Sync returns when Run has ended.
var ErrStopped = errors.New("the reconcile loop has stopped")

func (l *Loop) init() {
	l.once.Do(func() {
		l.poke = make(chan struct{}, 1)
		l.said = map[string]time.Time{}
		l.contest = contest{}
		if l.Log == nil {
			l.Log = slog.Default()
		}
	})
}

// Run makes passes until ctx ends: one at once, then as they are called for.
func (l *Loop) Run(ctx context.Context) error {
	l.init()
	defer l.stop()
	var (
		failures, busy int
		lastFailure    string
	)
	for {
		waiting := l.begin()
		p := l.pass(ctx)
		ended := time.Now()
		if ctx.Err() != nil {
			// A pass that was cut short says nothing to anybody.
			release(waiting, ErrStopped)
			return ctx.Err()
		}
		lastFailure = l.log(p, lastFailure)
		if l.Report != nil {
			l.Report(p)
		}
		release(waiting, p.Err)

		again, pause := period, settle
		switch {
		case p.Err != nil:
			again = min(backoffFirst<<min(failures, 10), backoffLast)
			pause = backoffFirst
			failures++
		case len(p.Changes) > 0:
			failures = 0
			if busy++; busy > usual {
				pause = min(settle<<min(busy-usual, 10), contended)
			}
		default:
			failures, busy = 0, 0
		}
		if err := l.wait(ctx, ended, again, pause); err != nil {
			return err
		}
	}
}

// wait returns when the next pass is due: again after the last one ended, or
// when an event comes but not before pause, or at once when poked.
func (l *Loop) wait(ctx context.Context, ended time.Time, again, pause time.Duration) error {
	due := time.NewTimer(time.Until(ended.Add(again)))
	defer due.Stop()
	events := l.Kernel.Changed()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-l.poke:
			return nil
		case <-due.C:
			return nil
		case <-events:
			events = nil // one is enough
			due.Reset(max(0, time.Until(ended.Add(pause))))
		}
	}
}

// Poke asks for a pass, because what is wanted has changed. It does not wait.
func (l *Loop) Poke() {
	l.init()
	select {
	case l.poke <- struct{}{}:
	default: // asked already
	}
}

// Sync returns when a pass that began after the call has ended, with its error:
// then the kernel holds what was wanted at the call, or the error says why not.
func (l *Loop) Sync(ctx context.Context) error {
	l.init()
	done := make(chan error, 1)
	l.mu.Lock()
	if l.stopped {
		l.mu.Unlock()
		return ErrStopped
	}
	l.waiting = append(l.waiting, done)
	l.mu.Unlock()
	l.Poke()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Once makes a single pass, without Run or beside it.
func (l *Loop) Once(ctx context.Context) ([]desired.Change, error) {
	l.init()
	p := l.pass(ctx)
	return p.Changes, p.Err
}

// Did tells of changes that were made beside the loop, so that they are not taken
// for another program's.
func (l *Loop) Did(changes []desired.Change) {
	l.init()
	l.passing.Lock()
	defer l.passing.Unlock()
	l.contest.made(nil, changes, time.Now())
}

func (l *Loop) pass(ctx context.Context) (p Pass) {
	l.passing.Lock()
	defer l.passing.Unlock()
	want, err := l.Want()
	if err != nil {
		p.Err = fmt.Errorf("find out what is wanted: %w", err)
		return p
	}
	have, err := l.Kernel.Read(ctx)
	if err != nil {
		p.Err = fmt.Errorf("read the kernel: %w", err)
		return p
	}
	var conflicts []string
	p.Changes, conflicts = l.contest.judge(desired.Diff(have, want), time.Now())
	p.Problems = append(desired.Problems(have, want), conflicts...)
	if len(p.Changes) > 0 {
		p.Err = l.Kernel.Apply(ctx, p.Changes)
	}
	if p.Err == nil {
		l.contest.made(want.MPTCP, p.Changes, time.Now())
	}
	return p
}

// log tells what was done, and a failure once however often it is repeated. When
// somebody undoes what we do again and again, it tells once a minute.
func (l *Loop) log(p Pass, lastFailure string) string {
	if p.Err == nil {
		for _, c := range p.Changes {
			if l.isNews(c.String()) {
				l.Log.Info("kernel changed", "command", c.String())
			}
		}
		if lastFailure != "" && l.isNews("") {
			l.Log.Info("the kernel is as wanted again")
		}
		return ""
	}
	failure := p.Err.Error()
	if failure != lastFailure && l.isNews(failure) {
		l.Log.Warn("the kernel is not as wanted", "error", failure)
	}
	return failure
}

// isNews says whether a line was not logged in the last repeatAfter.
func (l *Loop) isNews(line string) bool {
	now := time.Now()
	maps.DeleteFunc(l.said, func(_ string, at time.Time) bool { return now.Sub(at) >= repeatAfter })
	if _, said := l.said[line]; said {
		return false
	}
	l.said[line] = now
	return true
}

// begin takes the wake-ups and the callers of Sync that the pass about to begin
// will answer. Whatever comes later gets a pass of its own.
func (l *Loop) begin() []chan error {
	select {
	case <-l.Kernel.Changed():
	default:
	}
	select {
	case <-l.poke:
	default:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	waiting := l.waiting
	l.waiting = nil
	return waiting
}

func release(waiting []chan error, err error) {
	for _, done := range waiting {
		done <- err
	}
}

func (l *Loop) stop() {
	l.mu.Lock()
	l.stopped = true
	waiting := l.waiting
	l.waiting = nil
	l.mu.Unlock()
	release(waiting, ErrStopped)
}
