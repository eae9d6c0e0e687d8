package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"sheaf/daemon/control/desired"
)

// rules is a state of one rule for each of these last bytes.
func rules(lasts ...byte) desired.State {
	var s desired.State
	for _, n := range lasts {
		s.Rules = append(s.Rules, desired.Rule{Priority: 8301, Source: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, n}), 32), Table: 8301})
	}
	return s
}

func add(n int) string {
	return fmt.Sprintf("ip rule add from 10.0.0.%d lookup 8301 priority 8301 protocol 83", n)
}

func remove(n int) string {
	return fmt.Sprintf("ip rule delete from 10.0.0.%d lookup 8301 priority 8301 protocol 83", n)
}

// run plays a test on a clock that only moves when everybody waits.
type run struct {
	*testing.T
	kernel *Fake
	loop   *Loop
	want   atomic.Pointer[desired.State]
	passes atomic.Int64
	last   atomic.Pointer[Pass]
	cancel context.CancelFunc
	ended  chan error
}

func start(t *testing.T, have, want desired.State) *run {
	r := &run{T: t, kernel: NewFake(have), ended: make(chan error, 1)}
	r.want.Store(&want)
	r.loop = &Loop{
		Kernel: r.kernel,
		Want:   func() (desired.State, error) { return *r.want.Load(), nil },
		Report: func(p Pass) { r.passes.Add(1); r.last.Store(&p) },
		Log:    slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() { r.ended <- r.loop.Run(ctx) }()
	synctest.Wait()
	t.Cleanup(func() {
		cancel()
		if err := <-r.ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ended with %v", err)
		}
	})
	return r
}

// after lets time pass, and checks what was applied in it and how many passes
// it took.
func (r *run) after(d time.Duration, passes int64, applied ...string) {
	r.Helper()
	time.Sleep(d)
	synctest.Wait()
	if got := r.passes.Swap(0); got != passes {
		r.Errorf("after %v: %d passes, want %d", d, got, passes)
	}
	if diff := cmp.Diff(applied, r.kernel.Applied()); diff != "" {
		r.Errorf("after %v: -want +applied\n%s", d, diff)
	}
}

func TestPassesAreMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, rules(9), rules(1, 2))
		r.after(0, 1, add(1), add(2), remove(9)) // at once
		r.after(settle, 1)                       // our own events
		r.after(period-time.Millisecond, 0)
		r.after(2*time.Millisecond, 1) // in time
		r.after(period-time.Second, 0)

		// The first event acts at once, though the next pass is far away.
		r.kernel.Disturb(func(s *desired.State) { s.Rules = s.Rules[1:] })
		r.after(0, 1, add(1))
		r.after(settle, 1)

		// A burst is one pass at once and one for the rest.
		time.Sleep(time.Second)
		for range 100 {
			r.kernel.Wake()
			synctest.Wait()
			time.Sleep(settle / 200)
		}
		r.after(settle, 2)

		// What is wanted changes.
		next := rules(2, 3)
		r.want.Store(&next)
		r.after(time.Second, 0) // nobody knows yet
		r.loop.Poke()
		r.after(0, 1, add(3), remove(1))
		r.after(settle, 1)

		// What sends no event is found in time.
		r.kernel.Disturb(func(s *desired.State) { s.Rules = nil })
		<-r.kernel.Changed() // the event is lost
		r.after(period, 2, add(2), add(3))
	})
}

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := errors.New("operation not permitted")
		r := start(t, rules(), rules())
		r.after(settle, 1)
		r.kernel.Fail(func(c desired.Change) error {
			if strings.Contains(c.String(), "10.0.0.2") {
				return refused
			}
			return nil
		})
		next := rules(1, 2, 3)
		r.want.Store(&next)
		r.loop.Poke()
		r.after(0, 1, add(1), add(3)) // one failure does not stop the rest
		if p := r.last.Load(); !errors.Is(p.Err, refused) || p.Err.Error() != add(2)+": operation not permitted" || len(p.Changes) != 3 {
			t.Errorf("the pass reported %+v", p)
		}
		// The event of what succeeded leads to a pass, but not at once.
		r.after(backoffFirst-time.Millisecond, 0)
		r.after(time.Millisecond, 1)
		for wait := 2 * backoffFirst; wait < backoffLast; wait *= 2 {
			r.after(wait-time.Millisecond, 0)
			r.after(time.Millisecond, 1)
		}
		r.after(backoffLast-time.Millisecond, 0)
		r.after(time.Millisecond, 1)
		r.after(10*backoffLast, 10)

		// An event does not wait for the back-off, nor can events make it spin.
		time.Sleep(time.Second)
		r.kernel.Wake()
		r.after(0, 1)
		for range 1000 {
			r.kernel.Wake()
			time.Sleep(time.Millisecond)
			synctest.Wait()
		}
		r.after(0, int64(time.Second/backoffFirst))

		r.kernel.Fail(nil)
		r.loop.Poke()
		r.after(0, 1, add(2))
		if p := r.last.Load(); p.Err != nil {
			t.Errorf("after the failure: %v", p.Err)
		}
		r.after(settle, 1)
		r.after(period-time.Second, 0) // no back-off is left
	})
}

func TestReadFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, rules(), rules(1))
		r.after(settle, 2, add(1))
		r.kernel.FailRead(errors.New("out of memory"))
		r.loop.Poke()
		r.after(0, 1)
		if p := r.last.Load(); p.Err == nil || p.Err.Error() != "read the kernel: out of memory" {
			t.Errorf("the pass reported %+v", p)
		}
		r.kernel.FailRead(nil)
		r.after(backoffFirst, 1)
		if p := r.last.Load(); p.Err != nil {
			t.Errorf("the pass reported %+v", p)
		}
	})
}

// TestContention: somebody who undoes at once what we do does not make us spin.
func TestContention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, rules(), rules(1))
		r.after(settle, 2, add(1))
		stop := make(chan struct{})
		go func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
					r.kernel.Disturb(func(s *desired.State) { s.Rules = nil })
				}
			}
		}()
		time.Sleep(100 * time.Second)
		close(stop)
		synctest.Wait()
		if n := r.passes.Swap(0); n < 90 || n > 120 {
			t.Errorf("%d passes in 100 s", n)
		}
		r.kernel.Applied()
		// Peace: at once as quick as before.
		time.Sleep(2 * contended)
		r.passes.Store(0)
		r.kernel.Applied()
		r.kernel.Disturb(func(s *desired.State) { s.Rules = nil })
		r.after(0, 1, add(1))
	})
}

func TestSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, rules(), rules())
		r.after(settle, 1)
		next := rules(1)
		r.want.Store(&next)
		if err := r.loop.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{add(1)}, r.kernel.Applied()); diff != "" {
			t.Errorf("when Sync returned: -want +applied\n%s", diff)
		}

		// A pass that fails tells so to whom it concerns.
		refused := errors.New("operation not permitted")
		r.kernel.Fail(func(desired.Change) error { return refused })
		next = rules(1, 2)
		if err := r.loop.Sync(t.Context()); !errors.Is(err, refused) {
			t.Errorf("Sync returned %v", err)
		}
		r.kernel.Fail(nil)

		// One that gives up waiting harms nobody.
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.loop.Sync(gone); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("Sync returned %v", err)
		}
		if err := r.loop.Sync(t.Context()); err != nil {
			t.Error(err)
		}

		r.cancel()
		synctest.Wait()
		if err := r.loop.Sync(t.Context()); err != ErrStopped {
			t.Errorf("after Run: %v", err)
		}
	})
}

// TestSyncWaitsForItsOwnPass: a pass under way has read what was wanted before.
func TestSyncWaitsForItsOwnPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		want := rules(1)
		proceed := make(chan struct{})
		asked := 0
		kernel := NewFake(rules())
		loop := &Loop{Kernel: kernel, Log: slog.New(slog.DiscardHandler), Want: func() (desired.State, error) {
			w := want
			asked++
			<-proceed
			return w, nil
		}}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- loop.Run(ctx) }()
		synctest.Wait() // the first pass has asked, and hangs
		want = rules(1, 2)
		returned := make(chan error)
		go func() { returned <- loop.Sync(t.Context()) }()
		synctest.Wait()
		proceed <- struct{}{}
		synctest.Wait()
		select {
		case <-returned:
			t.Error("Sync returned with the pass that had begun before it")
		default:
		}
		proceed <- struct{}{}
		if err := <-returned; err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff([]string{add(1), add(2)}, kernel.Applied()); diff != "" {
			t.Errorf("-want +applied\n%s", diff)
		}
		// A Sync that waits when Run ends is told so.
		go func() { returned <- loop.Sync(t.Context()) }()
		synctest.Wait()
		cancel()
		close(proceed)
		if err := <-returned; err != ErrStopped {
			t.Errorf("when Run ended: %v", err)
		}
		<-ended
	})
}

func TestOnce(t *testing.T) {
	kernel := NewFake(rules(9))
	loop := &Loop{Kernel: kernel, Want: func() (desired.State, error) { return rules(1), nil }}
	changes, err := loop.Once(t.Context())
	if err != nil || len(changes) != 2 {
		t.Errorf("first: %v, %v", changes, err)
	}
	if changes, err = loop.Once(t.Context()); err != nil || len(changes) != 0 {
		t.Errorf("second: %v, %v", changes, err)
	}
	loop.Want = func() (desired.State, error) { return desired.State{}, errors.New("no settings") }
	if _, err = loop.Once(t.Context()); err == nil || len(kernel.State().Rules) != 1 {
		t.Errorf("without a wish: %v, %+v", err, kernel.State())
	}
}

// TestLogOfContention: a fight with another program is told of once a minute.
func TestLogOfContention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b strings.Builder
		kernel := NewFake(rules())
		loop := &Loop{
			Kernel: kernel,
			Want:   func() (desired.State, error) { return rules(1), nil },
			Log:    slog.New(slog.NewTextHandler(&b, nil)),
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- loop.Run(ctx) }()
		const minutes = 10
		for range minutes * 60 {
			time.Sleep(time.Second)
			kernel.Disturb(func(s *desired.State) { s.Rules = nil })
		}
		cancel()
		<-ended
		if n := strings.Count(b.String(), "\n"); n < minutes-1 || n > minutes+1 {
			t.Errorf("%d lines in %d minutes:\n%s", n, minutes, b.String())
		}
	})
}

// TestLogSaysEachFailureOnce: a failure that is repeated for hours fills no disk.
func TestLogSaysEachFailureOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b strings.Builder
		kernel := NewFake(rules())
		kernel.Fail(func(desired.Change) error { return errors.New("operation not permitted") })
		loop := &Loop{
			Kernel: kernel,
			Want:   func() (desired.State, error) { return rules(1), nil },
			Log: slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
				if a.Key == slog.TimeKey {
					return slog.Attr{}
				}
				return a
			}})),
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- loop.Run(ctx) }()
		time.Sleep(time.Hour)
		kernel.Fail(nil)
		time.Sleep(time.Minute)
		cancel()
		<-ended
		want := `level=WARN msg="the kernel is not as wanted" error="` + add(1) + `: operation not permitted"
level=INFO msg="kernel changed" command="` + add(1) + `"
level=INFO msg="the kernel is as wanted again"
`
		if diff := cmp.Diff(want, b.String()); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
	})
}
