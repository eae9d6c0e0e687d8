// Package kernel carries out what package desired decided, and reads back what
// is there: rules, routes, one nftables table, the TUN, MPTCP endpoints and
// limits, and sysctls. It has every effect of the control path and decides
// nothing.
//
// The path of a change through this package:
//
//	[]desired.Change ─▶ Apply ─┬▶ routing.go    rules and routes, by rtnetlink
//	                           ├▶ table.go      our nftables table, by nf_tables
//	                           │   └▶ flows.go  tracked flows that it leads elsewhere, by nf_conntrack
//	                           ├▶ device.go     the TUN devices: MTU, up, addresses
//	                           ├▶ endpoint.go   upstream MPTCP: endpoints and limits, by mptcp_pm
//	                           ├▶ outoftree.go  MPTCP v0.9x: flags of interfaces, parameters of modules
//	                           └▶ sysctl.go     /proc/sys/net
//	desired.State ◀─ Read ◀──── the same six, only what is tagged as ours
//	Changed ◀─ events.go        somebody, perhaps we, changed something: read again
//
// The subflows of single sessions are read and changed beside that, in
// subflow.go.
//
// Of MPTCP it drives the implementation that the kernel has, which the names of
// its sysctls tell: upstream (Linux 5.6 and later, net.mptcp.enabled) or the
// out-of-tree one (v0.9x, net.mptcp.mptcp_enabled). Without either all else works
// the same.
//
// v0.9x could not be run where this was written, for want of a 4.19 kernel. The
// tests have a tree of files as v0.95 shows them, written after its source, and a
// fake for its flags of interfaces; what they cannot show is that the kernel acts
// on them.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/mdlayher/genetlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// Kernel is the kernel's side of one network namespace, as far as one daemon is
// concerned with it.
type Kernel struct {
	scope     scope
	namespace *os.File        // nf_tables opens a socket there for every request
	routing   *netlink.Handle // rtnetlink, and nf_conntrack by nfnetlink
	mptcp     *genetlink.Conn // nil when there is no upstream MPTCP
	family    genetlink.Family
	sysctls   map[string]*os.Root // by name below directories.sysctls; without those that the kernel lacks
	outOfTree *outOfTree          // nil unless MPTCP is v0.9x

	directories directories

	// Before, if set, is given the values of sysctls below net/ipv4 and net/ipv6
	// that are about to be changed, so that desired.Restore can put them back
	// later, and all that is about to be changed of MPTCP v0.9x. When it fails,
	// nothing is changed.
	Before func(values map[string]string) error

	// translates says whether our table may have translated UDP ports until now;
	// of a table that was there before us it may be so. Guarded by mu.
	translates bool

	changed chan struct{}
	closed  chan struct{}
	watches sync.WaitGroup
	sources []source

	mu sync.Mutex // one Read or Apply at a time
}

// scope is what belongs to one daemon. A router and a concentrator may run on
// the same machine and leave each other's alone.
type scope struct {
	table  string // of nftables
	device string // the TUN
	legs   string // begins the names of the TUN devices of legs
	router bool   // has rules, routes and endpoints too
}

// directories are where the kernel shows its files.
type directories struct {
	// sysctls of the network: of the parts below each belongs to one network
	// namespace, and once it is open, every thread sees that namespace's through
	// it. The directory itself leads each thread to its own.
	sysctls string
	modules string // of the kernel, with their parameters
	network string // state of the calling thread's network namespace
}

var running = directories{sysctls: "/proc/sys/net", modules: "/sys/module", network: "/proc/thread-self/net"}

// New opens the kernel of the calling thread's network namespace for a router.
// Its methods mean that namespace whichever thread calls them.
func New() (*Kernel, error) {
	return newKernel(scope{table: desired.TableName, device: desired.TunnelName, legs: desired.LegPrefix, router: true}, running)
}

// NewConcentrator does the same for a concentrator: that has a table, a TUN and
// sysctls, and the limits of MPTCP, but no rules, routes or endpoints.
func NewConcentrator() (*Kernel, error) {
	return newKernel(scope{table: desired.ConcentratorTableName, device: desired.ConcentratorTunnelName, legs: desired.ConcentratorLegName}, running)
}

func newKernel(scope scope, directories directories) (_ *Kernel, err error) {
	k := &Kernel{scope: scope, directories: directories, translates: true, changed: make(chan struct{}, 1), closed: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = k.Close()
		}
	}()
	if k.namespace, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("open the network namespace: %w", err)
	}
	if k.routing, err = netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		return nil, fmt.Errorf("open rtnetlink and nfnetlink: %w", err)
	}
	if err = k.openSysctls(); err != nil {
		return nil, err
	}
	if err = k.openMPTCP(); err != nil {
		return nil, err
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
	for _, root := range k.sysctls {
		_ = root.Close()
	}
	if k.mptcp != nil {
		_ = k.mptcp.Close()
	}
	if k.outOfTree != nil {
		k.outOfTree.close()
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
		func() (err error) { state.Table, err = k.readTable(); return err },
		func() (err error) { state.Device, state.Legs, err = k.readDevices(names); return err },
		func() (err error) { state.Sysctls, err = k.readSysctls(names); return err },
		func() (err error) { state.MPTCP, err = k.readMPTCP(names); return err },
		func() (err error) { state.OutOfTree, err = k.readOutOfTree(); return err },
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
	if err := k.remember(changes); err != nil {
		return err
	}
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

// openMPTCP opens the implementation that the kernel has, if any.
func (k *Kernel) openMPTCP() error {
	for name, open := range map[string]func() error{"enabled": k.openUpstream, "mptcp_enabled": k.openOutOfTree} {
		_, exists, err := k.readSysctl(mptcpDirectory + "/" + name)
		if err != nil {
			return err
		}
		if exists {
			return open()
		}
	}
	return nil
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
	case desired.ReplaceTable:
		if err := k.replaceTable(c.Table); err != nil {
			return err
		}
		return k.forgetFlows(c.Table)
	case desired.DeleteTable:
		return k.deleteTable(c.Name)
	case desired.SetMTU:
		return k.setMTU(c.Interface, c.Bytes)
	case desired.SetUp:
		return k.setUp(c.Interface)
	case desired.AddAddress:
		return k.addAddress(c.Interface, c.Address)
	case desired.DeleteAddress:
		return k.deleteAddress(c.Interface, c.Address)
	case desired.AddEndpoint:
		return k.addEndpoint(c.Endpoint)
	case desired.SetEndpointFlags:
		return k.setEndpointFlags(c.Endpoint)
	case desired.DeleteEndpoint:
		return k.deleteEndpoint(c.Endpoint.Address)
	case desired.SetLimits:
		return k.setLimits(c.Limits)
	case desired.SetSysctl:
		return k.setSysctl(c.Path, c.Value)
	case desired.SetLinkFlags:
		return k.setLinkFlags(c.Interface, c.Flags)
	case desired.SetParameter:
		return k.setParameter(c.Parameter, c.Value)
	}
	return fmt.Errorf("package kernel does not know the change %T", change)
}

// Clean takes away all that is ours. Sysctls and limits stay as they are: they
// are settings of the whole namespace, and what they were before us is not
// known after a restart.
func (k *Kernel) Clean(ctx context.Context) error { return k.CleanTo(ctx, desired.State{}) }

// CleanTo takes away all that is ours but what is wanted to stay, and adds what
// of that is missing.
func (k *Kernel) CleanTo(ctx context.Context, want desired.State) error {
	have, err := k.Read(ctx)
	if err != nil {
		return err
	}
	return k.Apply(ctx, desired.Diff(have, want))
}
