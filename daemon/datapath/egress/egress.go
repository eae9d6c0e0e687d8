package egress

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// dialTime is how long a destination may take to answer. Linux itself gives
	// up after about two minutes; people give up earlier.
	dialTime = 20 * time.Second
	// MaxFlows is how many flows one router may have open.
	MaxFlows = 16384
)

var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// ErrLimit says that a router has too many flows open.
var ErrLimit = fmt.Errorf("the router has %d flows open, the most allowed", MaxFlows)

// Dialer connects flows to their destinations, within policy and limits. It is
// safe for concurrent use.
type Dialer struct {
	policy Policy
	own    ownAddresses
	flows  *limiter[string] // open, by router
}

// NewDialer returns a dialer that follows policy.
func NewDialer(policy Policy) *Dialer {
	return &Dialer{policy: policy, flows: newLimiter[string](math.MaxInt, MaxFlows)}
}

// Dial connects to destination on behalf of router. done must be called when
// the connection is closed.
func (d *Dialer) Dial(ctx context.Context, router string, destination netip.AddrPort) (conn *net.TCPConn, done func(), err error) {
	if destination.Port() == 0 {
		return nil, nil, &ForbiddenError{destination.Addr(), "port 0"}
	}
	own, err := d.own.get()
	if err != nil {
		return nil, nil, err
	}
	if err := d.policy.Check(destination.Addr(), own); err != nil {
		return nil, nil, err
	}
	if !d.flows.enter(router) {
		return nil, nil, ErrLimit
	}
	dialer := net.Dialer{Timeout: dialTime, KeepAliveConfig: keepAlive}
	c, err := dialer.DialContext(ctx, "tcp", destination.String())
	if err != nil {
		d.flows.leave(router)
		return nil, nil, err
	}
	return c.(*net.TCPConn), func() { d.flows.leave(router) }, nil
}

// Failure is the kind of a failed Dial, as a client would have seen it.
type Failure int

// The kinds.
const (
	Refused Failure = iota
	Unreachable
	TimedOut
	Forbidden
	Limited
)

// Classify finds the kind of an error of Dial.
func Classify(err error) Failure {
	var forbidden *ForbiddenError
	var network net.Error
	switch {
	case errors.As(err, &forbidden):
		return Forbidden
	case errors.Is(err, ErrLimit):
		return Limited
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		return Refused
	case errors.As(err, &network) && network.Timeout():
		return TimedOut
	}
	return Unreachable
}
