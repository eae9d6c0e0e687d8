package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"sheaf/daemon/netlab"
)

// whileAwake runs f while no processor sleeps. A virtual machine's processor that
// idles takes up to milliseconds to be run again by its host, a dozen times on a
// packet's way through the bond, four times without: that is the host's delay and
// not the bond's. Only for what needs little of the processors.
func whileAwake(lab *netlab.Lab, f func() error) error {
	p, err := lab.Core.Start(lab.Core.Command("/proc/self/exe", "awake"))
	if err != nil {
		return err
	}
	return errors.Join(f(), p.Kill())
}

// stayAwake keeps all processors busy with the least right to run that there is,
// until the process is killed.
func stayAwake(ctx context.Context) error {
	failed := make(chan error, runtime.NumCPU())
	// One more, as a spinning goroutine does not give way to this one.
	runtime.GOMAXPROCS(runtime.NumCPU() + 1)
	for range runtime.NumCPU() {
		go func() {
			runtime.LockOSThread()
			if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0); err != nil {
				failed <- fmt.Errorf("set the scheduling policy: %w", err)
				return
			}
			for ctx.Err() == nil {
				// Into the kernel and back, where it may let others run: with lazy
				// preemption that would else wait for the next tick.
				_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			}
		}()
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}
