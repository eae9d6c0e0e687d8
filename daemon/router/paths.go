package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/tunnel"
)

// The path of a session's subflows, when it was opened with path manager default,
// ndiffports or binder, or with fullmesh to a concentrator of several addresses:
//
//	a session is there ────────────────┐
//	a subflow came or went ────────────┤
//	the loop has made a pass ──────────┼▶ pass: Ends, Subflows ─▶ desired.DiffSubflows ─▶ ChangeSubflow
//	subflowsEvery, or joining is due ──┘
//
// As in package reconcile, a wake-up carries nothing.
const (
	// subflowsEvery is between passes when nothing happens.
	subflowsEvery = 10 * time.Second
	// subflowsSettle is from one pass to the next event's, at least: the first event
	// acts at once, and a burst makes one more pass.
	subflowsSettle = 10 * time.Millisecond
	// A way over which a session was opened a subflow is left alone for joinFirst,
	// doubling to joinLast, before that is done again.
	joinFirst = 250 * time.Millisecond
	joinLast  = 15 * time.Second
)

// subflows keeps the subflows of sessions whose paths the daemon manages.
type subflows struct {
	kernel   *kernel.Kernel
	sessions *tunnel.Managed
	wish     func() (settings.Multipath, []desired.Way)
	log      *slog.Logger
	wake     chan struct{}

	tried  map[joinKey]joined
	failed string // the last failure that was logged
}

// meshOf are the concentrator's ends for path manager fullmesh, if that is more than
// the kernel does by itself: when it has several addresses of one family, as far as
// they are given as such and not by name.
func meshOf(addresses []string) (mesh []netip.AddrPort) {
	families := map[bool]int{}
	for _, text := range addresses {
		if a, err := netip.ParseAddrPort(text); err == nil && !slices.Contains(mesh, a) {
			mesh = append(mesh, a)
			families[a.Addr().Is4()]++
		}
	}
	if max(families[false], families[true]) < 2 {
		return nil
	}
	return mesh
}

// meshes says whether the daemon does what path manager fullmesh is to do.
func (r *Router) meshes() bool { return r.userspace && len(*r.mesh.Load()) > 0 }

// joinKey is a way of one session.
type joinKey struct {
	session *tunnel.Session
	source  netip.Addr
	ports   desired.Ports
	remote  netip.AddrPort
}

// joined is when and how often in a row a way was tried.
type joined struct {
	times int
	until time.Time // not before
}

// next is the record of one more try.
func (j joined) next(now time.Time) joined {
	if now.Sub(j.until) > joinLast {
		j.times = 0 // it held
	}
	return joined{j.times + 1, now.Add(min(joinFirst<<min(j.times, 10), joinLast))}
}

func newSubflows(log *slog.Logger) *subflows {
	s := &subflows{log: log, wake: make(chan struct{}, 1), tried: map[joinKey]joined{}}
	s.sessions = tunnel.NewManaged(s.kick)
	return s
}

func (s *subflows) kick() {
	kick(s.wake)
}

func (s *subflows) run(ctx context.Context) {
	var following sync.WaitGroup
	defer following.Wait()
	stop := context.CancelFunc(nil) // nil while events are not followed
	for {
		begun := time.Now()
		again := s.pass(begun)
		ended := time.Now()
		// While there is no session, nobody is woken for those of others.
		switch some := len(s.sessions.Sessions()) > 0; {
		case some && stop == nil:
			follow, cancel := context.WithCancel(ctx)
			stop = cancel
			following.Go(func() {
				if err := s.kernel.FollowSubflows(follow, s.kick); err != nil && follow.Err() == nil {
					s.log.Warn("subflows are looked at by the clock only", "error", err)
				}
			})
		case !some && stop != nil:
			stop()
			stop = nil
		}
		due := time.NewTimer(again)
		select {
		case <-ctx.Done():
			due.Stop()
			if stop != nil {
				stop()
			}
			return
		case <-due.C:
		case <-s.wake:
			due.Stop()
			// With thousands of sessions, most of the time is for something else.
			sleep(ctx, time.Until(ended.Add(max(subflowsSettle, 4*ended.Sub(begun)))))
		}
	}
}

// pass changes what is to be changed now, and says when to look again.
func (s *subflows) pass(now time.Time) (again time.Duration) {
	again = subflowsEvery
	multipath, ways := s.wish()
	s.forget(ways)
	type session struct {
		*tunnel.Session
		token uint32
		ends  []tunnel.Ends
	}
	var all []session
	for _, one := range s.sessions.Sessions() {
		if token, ends, err := one.Ends(); err == nil {
			all = append(all, session{one, token, ends})
		} // else it has just ended
	}
	held := map[uint16]map[kernel.Ends]desired.Subflow{} // by the concentrator's port
	var failures []error
	for _, one := range all {
		remote := one.Remote()
		if held[remote.Port()] == nil {
			read, err := s.kernel.Subflows(remote.Port())
			if err != nil {
				failures = append(failures, err)
				break
			}
			held[remote.Port()] = read
		}
		var have []desired.Subflow
		for _, ends := range one.ends {
			if f, ok := held[remote.Port()][kernel.Ends(ends)]; ok {
				have = append(have, f)
			}
		}
		key := func(w desired.Way) joinKey { return joinKey{one.Session, w.Source, w.Ports, w.Remote} }
		changes := desired.DiffSubflows(multipath, ways, have, remote, func(w desired.Way) bool {
			wait := s.tried[key(w)].until.Sub(now)
			if wait > 0 {
				again = min(again, wait)
			}
			return wait <= 0
		})
		for _, c := range changes {
			s.log.Debug("subflow", "session", fmt.Sprintf("%08x", one.token), "change", c)
			err := s.kernel.ChangeSubflow(one.token, c)
			if errors.Is(err, kernel.ErrNotManaged) {
				s.sessions.Drop(one.Session)
				break
			}
			if err != nil {
				failures = append(failures, err)
			}
		}
		for _, w := range opened(changes) {
			s.tried[key(w)] = s.tried[key(w)].next(now)
			again = min(again, s.tried[key(w)].until.Sub(now))
		}
	}
	if len(s.sessions.Tokens()) > 0 {
		ended, err := s.kernel.AbortClosed(s.sessions.Tokens)
		if err != nil {
			failures = append(failures, err)
		}
		if ended > 0 {
			s.log.Debug("closed subflows that had still something to send have been ended", "number", ended)
		}
	}
	s.report(errors.Join(failures...))
	return again
}

// opened are the ways that are to be opened, each once.
func opened(changes []desired.SubflowChange) (ways []desired.Way) {
	for _, c := range changes {
		if open, ok := c.(desired.OpenSubflow); ok && (len(ways) == 0 || ways[len(ways)-1] != open.Way) {
			ways = append(ways, open.Way)
		}
	}
	return ways
}

// forget lets what has been away be tried at once, and drops sessions that have
// ended.
func (s *subflows) forget(ways []desired.Way) {
	for key := range s.tried {
		there := false
		for _, w := range ways {
			there = there || w.Source == key.source && w.Ports == key.ports && w.Remote == key.remote
		}
		select {
		case <-key.session.Done():
			there = false
		default:
		}
		if !there {
			delete(s.tried, key)
		}
	}
}

// report logs a failure once, however often it is repeated.
func (s *subflows) report(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != s.failed {
		s.log.Warn("not all subflows are as wanted; trying on", "error", text)
	}
	s.failed = text
}
