package reconcile

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"sheaf/daemon/control/desired"
)

// Fake is a kernel in memory, for tests: it takes changes as the real one does,
// sends events, and fails on demand.
type Fake struct {
	mu      sync.Mutex
	state   desired.State
	applied []string
	reads   int
	fault   func(desired.Change) error
	unread  error
	changed chan struct{}
}

var _ Kernel = (*Fake)(nil)

// NewFake makes a kernel that holds a state.
func NewFake(state desired.State) *Fake {
	return &Fake{state: state.After(), changed: make(chan struct{}, 1)}
}

// Read implements Kernel.
func (f *Fake) Read(ctx context.Context) (desired.State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reads++
	if err := errors.Join(ctx.Err(), f.unread); err != nil {
		return desired.State{}, err
	}
	return f.state.After(), nil
}

// Apply implements Kernel.
func (f *Fake) Apply(ctx context.Context, changes []desired.Change) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var failures []error
	for _, c := range changes {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(failures, err)...)
		}
		if f.fault != nil {
			if err := f.fault(c); err != nil {
				failures = append(failures, fmt.Errorf("%s: %w", c, err))
				continue
			}
		}
		f.state = f.state.After(c)
		f.applied = append(f.applied, c.String())
		f.wake()
	}
	return errors.Join(failures...)
}

// Changed implements Kernel.
func (f *Fake) Changed() <-chan struct{} { return f.changed }

// Wake sends an event.
func (f *Fake) Wake() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wake()
}

func (f *Fake) wake() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

// Disturb changes the state from outside, as another program would, and sends
// the event of it.
func (f *Fake) Disturb(change func(*desired.State)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.state)
	f.wake()
}

// Fail makes every later change fail for which fault returns an error. A nil
// fault ends that.
func (f *Fake) Fail(fault func(desired.Change) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
}

// FailRead makes every later Read fail; nil ends that.
func (f *Fake) FailRead(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unread = err
}

// State returns what the kernel holds.
func (f *Fake) State() desired.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state.After()
}

// Applied returns the changes that were carried out since the last call.
func (f *Fake) Applied() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	applied := f.applied
	f.applied = nil
	return applied
}

// Reads returns how often the kernel was read since the last call.
func (f *Fake) Reads() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	reads := f.reads
	f.reads = 0
	return reads
}
