package tunnel

import (
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// calmControl is the congestion control of a session while its flows must not
// fill the uplinks' queues, or an uplink loses packets. It is in stock kernels, as a
// module in some.
const calmControl = "bbr"

// eitherControl is the choice of the one or the other as it fits.
const eitherControl = "auto"

// calm says how the sessions of one router send: by which congestion control and
// packet scheduler, and how that ranks their subflows. A flow looks here each time before it sends, so that a change costs nothing for
// those that send nothing.
type calm struct {
	on      atomic.Bool
	lossy   atomic.Int64 // until when an uplink counts as one that loses packets, Unix ns
	missing atomic.Bool  // this kernel does not let us use calmControl
	// chosenControl is congestionControl or calmControl where only that one is to
	// be used, nil where it depends.
	chosenControl atomic.Pointer[string]

	scheduler chosen
	ranks     atomic.Pointer[ranking] // nil: none are set
	asked     map[string]Rank         // by a router, guarded by Server.mu

	log *slog.Logger
}

// lossyTime is how long an uplink that was seen to lose packets counts as one that
// does.
const lossyTime = time.Minute

// noteLoss: an uplink loses packets that no queue is to blame for. Cubic takes
// each for congestion, and of 40 Mbit/s at 50 ms with 1 % loss it leaves 3.
func (c *calm) noteLoss(now time.Time) {
	if c != nil {
		c.lossy.Store(now.Add(lossyTime).UnixNano())
	}
}

// loses says whether an uplink counts as one that loses packets.
func (c *calm) loses(now time.Time) bool {
	return c != nil && now.UnixNano() < c.lossy.Load()
}

func (c *calm) wanted() bool {
	if c.missing.Load() {
		return false
	}
	if only := c.chosenControl.Load(); only != nil {
		return *only == calmControl
	}
	return c.on.Load() || c.loses(time.Now())
}

func newCalm(log *slog.Logger) *calm { return &calm{log: log} }

// keepCalm makes the session's congestion control what it should be. Only the
// goroutine that sends a flow's bytes calls it.
func (s *Session) keepCalm() {
	if s.calm == nil {
		return
	}
	on := s.calm.wanted()
	if on == s.calmed {
		return
	}
	s.calmed, s.paced = on, s.paced || on
	control := congestionControl
	if on {
		control = calmControl
	}
	err := s.wire.setCongestionControl(control)
	// Unknown to the kernel, or not allowed without CAP_NET_ADMIN.
	unavailable := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPERM)
	if on && unavailable && !s.calm.missing.Swap(true) {
		s.calm.log.Warn("big transfers will delay small packets: the kernel has no other congestion control for them; load its module tcp_bbr and restart",
			"want", calmControl, "stays", congestionControl, "error", err)
	}
}

// keepPaced has the session's subflows spread what they send over the round trip,
// once a flow is more than a page: a window that leaves in one burst ends cubic's
// slow start at a third of what the uplink carries (HyStart's trains of
// acknowledgements, net/ipv4/tcp_cubic.c). MPTCP sockets have no option for that,
// but what has been under bbr stays paced. 1 MB over uplinks of 50, 30 and 20
// Mbit/s takes 150 ms with it and 220 without; 10 kB take 3 ms more, so short
// flows go without.
func (s *Session) keepPaced() {
	if s.paced {
		return
	}
	s.paced = true
	if s.wire.setCongestionControl(calmControl) == nil {
		_ = s.wire.setCongestionControl(congestionControl)
	}
}

// setCongestionControl sets it for a socket and all its subflows.
func (s *socket) setCongestionControl(name string) error {
	var err error
	controlErr := s.raw.Control(func(fd uintptr) {
		err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
	})
	if controlErr != nil {
		return controlErr
	}
	return err
}

// SetCongestionControl has the sessions, open ones too, send with cubic, with bbr, or
// with the one or the other as it fits.
func (p *Pool) SetCongestionControl(name string) { p.calm.choose(name) }

// CongestionControl is the choice that the sessions really follow.
func (p *Pool) CongestionControl() string {
	if only := p.calm.chosenControl.Load(); only != nil {
		return *only
	}
	return eitherControl
}

// SetCongestionControl is Pool.SetCongestionControl for the sessions of one router.
// It says which choice they really follow, and if that is another, why.
func (v *Server) SetCongestionControl(key PublicKey, name string) (runs, reason string) {
	return v.calmOf(key).choose(name)
}

// choose sets what is to be used; any other name stands for both.
func (c *calm) choose(name string) (runs, reason string) {
	switch name {
	case congestionControl:
	case calmControl:
		if err := tryCongestionControl(name); err != nil {
			reason = fmt.Sprintf("the kernel does not let us use %s: %v; load its module tcp_%s", name, err, name)
			name = congestionControl
		} else {
			c.missing.Store(false)
		}
	default:
		c.chosenControl.Store(nil)
		return eitherControl, ""
	}
	c.chosenControl.Store(&name)
	return name, reason
}

// tryCongestionControl asks the kernel whether a connection may have it.
func tryCongestionControl(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name)
}
