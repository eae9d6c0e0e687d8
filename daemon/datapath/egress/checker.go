package egress

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// ownEvery is how long the list of the machine's own addresses is believed.
const ownEvery = 5 * time.Second

// ownAddresses are the machine's own, read again when they are old. Its zero
// value is ready, and safe for concurrent use.
type ownAddresses struct {
	reading sync.Mutex
	list    atomic.Pointer[ownList]
}

type ownList struct {
	addresses map[netip.Addr]struct{}
	err       error
	at        time.Time
}

// get returns them. When they cannot be read nothing may be reached, because
// one of them might be.
func (o *ownAddresses) get() (map[netip.Addr]struct{}, error) {
	list := o.list.Load()
	if list == nil {
		o.reading.Lock() // the first time there is nothing older to go by
		if list = o.list.Load(); list == nil {
			list = o.read()
		}
		o.reading.Unlock()
	} else if time.Since(list.at) >= ownEvery && o.reading.TryLock() {
		list = o.read()
		o.reading.Unlock()
	}
	return list.addresses, list.err
}

func (o *ownAddresses) read() *ownList {
	list := &ownList{addresses: map[netip.Addr]struct{}{}, at: time.Now()}
	prefixes, err := net.InterfaceAddrs()
	if err != nil {
		list.err = fmt.Errorf("reading the machine's own addresses: %w", err)
	}
	for _, p := range prefixes {
		if prefix, ok := p.(*net.IPNet); ok {
			if address, ok := netip.AddrFromSlice(prefix.IP); ok {
				list.addresses[address.Unmap()] = struct{}{}
			}
		}
	}
	o.list.Store(list)
	return list
}

// Checker applies a Policy to packets. It is safe for concurrent use.
type Checker struct {
	policy Policy
	own    ownAddresses
}

// NewChecker returns a checker that follows policy.
func NewChecker(policy Policy) *Checker { return &Checker{policy: policy} }

// Allowed tells whether a packet may go to a destination. It takes about 100 ns
// and does not allocate, but for the reading of the machine's own addresses
// every few seconds.
func (c *Checker) Allowed(destination netip.Addr) bool {
	own, err := c.own.get()
	return err == nil && c.policy.refusal(destination.Unmap().WithZone(""), own) == ""
}
