// Package kernel carries out what package desired decided, and reads back what
// is there: rules, routes, one nftables table, MPTCP endpoints and limits, and
// sysctls. It has every effect of the control path and decides nothing.
//
// The path of a change through this package:
//
//	[]desired.Change ─▶ Apply ─┬▶ routing.go    rules and routes, by rtnetlink
//	                           ├▶ intercept.go  the table inet sheaf, by nf_tables
//	                           ├▶ endpoint.go   endpoints and limits, by mptcp_pm
//	                           └▶ sysctl.go     /proc/sys/net/mptcp
//	desired.State ◀─ Read ◀──── the same four, only what is tagged as ours
//	Changed ◀─ events.go        somebody, perhaps we, changed something: read again
//
// Of MPTCP it drives the upstream implementation (Linux 5.6 and later). It
// recognises the out-of-tree one (v0.9x) and says so in Info; there is no back
// end for it yet, and it is left alone.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/mdlayher/genetlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// Kernel is the kernel's side of one network namespace.
type Kernel struct {
	namespace *os.File        // nf_tables opens a socket there for every request
	routing   *netlink.Handle // rtnetlink
	mptcp     *genetlink.Conn // nil when there is no upstream MPTCP
	family    genetlink.Family
	sysctls   *os.Root // net.mptcp; nil when there is none

	changed chan struct{}
	closed  chan struct{}
	watches sync.WaitGroup
	sources []source

	mu sync.Mutex // one Read or Apply at a time
}

// New opens the kernel of the calling thread's network namespace. Its methods
// mean that namespace whichever thread calls them.
func New() (_ *Kernel, err error) {
	k := &Kernel{changed: make(chan struct{}, 1), closed: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = k.Close()
		}
	}()
	if k.namespace, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("open the network namespace: %w", err)
	}
	if k.routing, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	if err = k.openMPTCP(); err != nil {
		return nil, err
	}
	k.sysctls, err = os.OpenRoot(sysctlDirectory)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open the sysctls of MPTCP: %w", err)
	}
	if err = k.watch(); err != nil {
		return nil, err
	}
	return k, nil
}

// Close ends the watching and closes what New opened. It changes nothing in the
// kernel.
func (k *Kernel) Close() error {
	close(k.closed)
	for _, s := range k.sources {
		s.Close()
	}
	k.watches.Wait()
	if k.sysctls != nil {
		_ = k.sysctls.Close()
	}
	if k.mptcp != nil {
		_ = k.mptcp.Close()
	}
	if k.routing != nil {
		k.routing.Close()
	}
	if k.namespace != nil {
		k.namespace.Close()
	}
	return nil
}

// Read returns what of ours the kernel holds.
func (k *Kernel) Read(ctx context.Context) (desired.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var state desired.State
	names, err := k.interfaceNames()
	if err != nil {
		return desired.State{}, err
	}
	for _, read := range []func() error{
		func() (err error) { state.Rules, err = k.readRules(); return err },
		func() (err error) { state.Routes, err = k.readRoutes(names); return err },
		func() (err error) { state.Intercept, err = k.readIntercept(); return err },
		func() (err error) { state.MPTCP, err = k.readMPTCP(names); return err },
	} {
		if err := ctx.Err(); err != nil {
			return desired.State{}, err
		}
		if err := read(); err != nil {
			return desired.State{}, err
		}
	}
	return state, nil
}

// Apply carries out the changes in their order. One that fails does not stop
// the later ones; the error joins all failures, each with its change. Carrying
// out what is already so is no failure.
func (k *Kernel) Apply(ctx context.Context, changes []desired.Change) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var failures []error
	for _, change := range changes {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(failures, err)...)
		}
		if err := k.apply(change); err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", change, err))
		}
	}
	return errors.Join(failures...)
}

func (k *Kernel) apply(change desired.Change) error {
	switch c := change.(type) {
	case desired.AddRule:
		return k.addRule(c.Rule)
	case desired.DeleteRule:
		return k.deleteRule(c.Rule)
	case desired.AddRoute:
		return k.addRoute(c.Route)
	case desired.ReplaceRoute:
		return k.replaceRoute(c.Route)
	case desired.DeleteRoute:
		return k.deleteRoute(c.Route)
	case desired.ReplaceIntercept:
		return k.replaceIntercept(c.Intercept)
	case desired.DeleteIntercept:
		return k.deleteIntercept()
	case desired.AddEndpoint:
		return k.addEndpoint(c.Endpoint)
	case desired.SetEndpointFlags:
		return k.setEndpointFlags(c.Endpoint)
	case desired.DeleteEndpoint:
		return k.deleteEndpoint(c.Endpoint.Address)
	case desired.SetLimits:
		return k.setLimits(c.Limits)
	case desired.SetSysctl:
		return k.setSysctl(c.Name, c.Value)
	}
	return fmt.Errorf("package kernel does not know the change %T", change)
}

// Clean takes away all that is ours. Sysctls and limits stay as they are: they
// are settings of the whole namespace, and what they were before us is not
// known after a restart.
func (k *Kernel) Clean(ctx context.Context) error {
	have, err := k.Read(ctx)
	if err != nil {
		return err
	}
	return k.Apply(ctx, desired.Diff(have, desired.State{}))
}
