package tunnel

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The path of the router's choice of a packet scheduler:
//
//	settings ─┬▶ sysctl net.mptcp.scheduler, for sessions to come
//	          ├▶ Pool.SetScheduler ──────────────────────────────┬▶ chosen ─▶ each flow, before it sends
//	          └▶ Wishes ─▶ concentrator: Server.SetScheduler ────┘
//	what the concentrator really runs ─▶ Answers ─▶ status
//
// A concentrator serves many routers and leaves the sysctl of its machine alone.

// mptcpScheduler is MPTCP_SCHEDULER, the scheduler of one connection, of our patches
// (board/common/patches/linux). Other kernels do not have it.
const mptcpScheduler = 128

// chosen is the scheduler of one router's sessions; empty leaves them as they are.
type chosen struct{ name atomic.Pointer[string] }

func (c *chosen) set(name string) { c.name.Store(&name) }

// keepScheduler makes the session's scheduler what it should be. Only the
// goroutine that sends a flow's bytes calls it.
func (s *Session) keepScheduler() {
	if s.calm == nil || !s.multipath {
		return
	}
	name := s.calm.scheduler.name.Load()
	if name == nil || *name == s.scheduler || *name == "" {
		return
	}
	s.scheduler = *name
	_ = s.wire.raw.Control(func(fd uintptr) {
		// It was tried before; one that is gone since is not worth a flow.
		_ = unix.SetsockoptString(int(fd), solMPTCP, mptcpScheduler, *name)
	})
}

// SetScheduler has the sessions that are open follow a change, where the kernel
// can do that. New ones have the scheduler of the network namespace.
func (p *Pool) SetScheduler(name string) {
	if tryScheduler(name) == nil {
		p.calm.scheduler.set(name)
	}
}

// SetScheduler has the sessions of one router send by a scheduler. It says which
// one they really use, and if that is another, why.
func (v *Server) SetScheduler(key PublicKey, name string) (runs, reason string) {
	return v.calmOf(key).scheduler.choose(name, namespaceScheduler(), tryScheduler)
}

// choose decides which scheduler a router's sessions use on a machine that has
// this one for all others.
func (c *chosen) choose(name, usual string, try func(string) error) (runs, reason string) {
	err := try(name)
	switch {
	case name == "" || err != nil && name == usual:
		// A kernel that cannot choose does as is wanted all the same.
		if c.name.Load() != nil {
			c.set(usual)
		}
		return usual, ""
	case err == nil:
		c.set(name)
		return name, ""
	}
	if c.name.Load() != nil {
		c.set(usual)
	}
	if errors.Is(err, unix.ENOPROTOOPT) || errors.Is(err, unix.EOPNOTSUPP) {
		return usual, "the concentrator's kernel has one scheduler for all"
	}
	return usual, fmt.Sprintf("the concentrator's kernel does not have the scheduler %q", name)
}

// tryScheduler asks the kernel whether a connection may have the scheduler.
func tryScheduler(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.SetsockoptString(fd, solMPTCP, mptcpScheduler, name)
}

// namespaceScheduler is what connections have that nobody chose one for. Kernels
// before 6.6 have one alone, and no sysctl.
func namespaceScheduler() string {
	text, err := os.ReadFile("/proc/sys/net/mptcp/scheduler")
	if err != nil {
		return "default"
	}
	return strings.TrimSpace(string(text))
}
