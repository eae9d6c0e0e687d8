package tun

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"
)

const (
	// openAgain is how long after a failure the device is tried again.
	openAgain = time.Second
	// logEvery is how often that is logged at most.
	logEvery = time.Minute
)

// Kept is a device that is made again when somebody deletes it. Its fields are
// set before Run.
//
//	Run ─▶ Open ─▶ Device.Run ─▶ Receive, until the device is gone ─▶ Open …
type Kept struct {
	Name    string
	Queues  int
	Receive func(queue int, packets [][]byte) // as of Device.Run
	Changed func()                            // the device has come or gone
	Log     *slog.Logger

	device   atomic.Pointer[Device]
	restarts atomic.Uint64
}

// Device is the present one, nil while there is none.
func (k *Kept) Device() *Device { return k.device.Load() }

// Restarts counts how often the device was lost.
func (k *Kept) Restarts() uint64 { return k.restarts.Load() }

// Write gives packets to the kernel, or drops them while there is no device.
func (k *Kept) Write(packets [][]byte) {
	if device := k.device.Load(); device != nil {
		_ = device.Write(packets) // the device is gone: Run sees to it
	}
}

// Run holds the device until ctx ends.
func (k *Kept) Run(ctx context.Context) {
	var logged time.Time
	for failures := 1; ctx.Err() == nil; failures++ {
		device, err := Open(k.Name, k.Queues)
		if err == nil {
			k.device.Store(device)
			k.Changed()
			err = device.Run(ctx, k.Receive)
			k.device.Store(nil)
			_ = device.Close()
			if ctx.Err() != nil {
				return
			}
			k.restarts.Add(1)
			k.Changed()
		}
		if err != nil && time.Since(logged) >= logEvery {
			logged = time.Now()
			k.Log.Warn("the network interface of the packet path is gone; making it again", "interface", k.Name, "error", err, "times", failures)
		}
		if errors.Is(err, ErrGone) {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(openAgain):
		}
	}
}
