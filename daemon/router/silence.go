package router

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/daemon/datapath/uplink"
)

// An uplink may look well to the kernel and lead nowhere. The path of the
// decision to do without it, and to use it again:
//
//	while flows move: probes, subflows ─▶ watchFlows ─▶ uplink.Watch ─┐
//	carriers of packets (packets.signs) ──────────────────────────────┴▶ look ─▶ uplink.Health ─▶ silent ─▶ reconcile: its MPTCP endpoints go
//	                                                                      │                         └─▶ Pool: nothing is dialled from it
//	                                                                      └─▶ ask: can it reach the concentrator again?
//
// Its rules and routes stay, and its carrier goes on trying: both are how it is
// found to be back.

const (
	// askTime bounds one question. Several are under way at once, as a new one
	// gets through sooner than a retransmission of an old one.
	askTime = time.Second
	// askBriskly is how often there is a question while flows move and nothing
	// answers.
	askBriskly = 80 * time.Millisecond
	// askSlowly is how often there is a question after the first minute.
	askSlowly = 2 * time.Second
	// movedEvery is how often flows are looked at, and movedBytes how much makes
	// it worth while to watch the uplinks closely: 100 kB/s.
	movedEvery = 250 * time.Millisecond
	movedBytes = 25_000
	// doubtful is how long a carrier of packets, probed every 20 ms, may have heard
	// nothing before the subflows are asked as well.
	doubtful = 25 * time.Millisecond
	// stillMoves is how long flows are watched after that. It must be shorter than
	// Bond.Watch lasts.
	stillMoves = 600 * time.Millisecond
)

// silence knows which uplinks are silent.
type silence struct {
	mu       sync.Mutex
	health   map[string]*uplink.Health
	answered map[string]time.Time
	asked    map[string]time.Time
	quiet    map[string]time.Time // by uplink.Watch, since then
	since    map[string]time.Time // of silent ones
	moves    bool                 // flows do
}

func newSilence() *silence {
	return &silence{
		health: map[string]*uplink.Health{}, answered: map[string]time.Time{}, asked: map[string]time.Time{},
		quiet: map[string]time.Time{}, since: map[string]time.Time{},
	}
}

// look judges all uplinks of which there are signs. It says which are to be asked
// for, which have fallen silent and which are back.
func (s *silence) look(now time.Time, signs map[string]uplink.Signs) (ask, fallen, back []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.health {
		if _, ok := signs[name]; !ok { // switched off, or gone
			delete(s.health, name)
			delete(s.answered, name)
			delete(s.asked, name)
			delete(s.quiet, name)
			delete(s.since, name)
		}
	}
	for name, sign := range signs {
		h := s.health[name]
		if h == nil {
			h = new(uplink.Health)
			s.health[name] = h
		}
		sign.Answered, sign.QuietSince = s.answered[name], s.quiet[name]
		since, was := h.Judge(now, sign), s.since[name]
		delete(s.quiet, name)
		switch {
		case since.IsZero() && !was.IsZero():
			delete(s.since, name)
			back = append(back, name)
		case !since.IsZero():
			s.since[name] = since
			if was.IsZero() {
				fallen = append(fallen, name)
			}
			if now.Sub(s.asked[name]) >= s.everyLocked(now, name) {
				s.asked[name] = now
				ask = append(ask, name)
			}
		}
	}
	return ask, fallen, back
}

// everyLocked is the time between two questions over a silent uplink.
func (s *silence) everyLocked(now time.Time, name string) time.Duration {
	switch unanswered := now.Sub(s.answered[name]); {
	case unanswered > askSlowly && now.Sub(s.since[name]) > time.Minute:
		return askSlowly
	case unanswered > 2*uplink.AskEvery && s.moves:
		return askBriskly
	}
	return uplink.AskEvery
}

// due says whether there is a question to be asked while flows move, or not.
func (s *silence) due(now time.Time, moves bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moves = moves
	for name := range s.since {
		if now.Sub(s.asked[name]) >= s.everyLocked(now, name) {
			return true
		}
	}
	return false
}

func (s *silence) heard(name string, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered[name] = now
}

// fell notes uplinks that have become quiet, since when.
func (s *silence) fell(quiet map[string]time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.Copy(s.quiet, quiet)
}

// apply makes silent uplinks unfit. Where nothing else is left they stay: what
// may work is better than what does not.
func (s *silence) apply(set settings.Settings, statuses []uplink.Status) []uplink.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	judged := slices.Clone(statuses)
	left := false
	for i := range judged {
		u := &judged[i]
		since := s.since[u.Name]
		switch {
		case !u.Fit || modeOf(set, u.Name) == settings.Off:
		case since.IsZero():
			left = true
		default:
			u.Fit = false
			u.Reason = "silent: over it the concentrator is not reached since " + since.UTC().Format(time.TimeOnly) + " UTC"
		}
	}
	if !left {
		return statuses
	}
	return judged
}

// drop deletes the endpoints of silent uplinks ahead of the pass that would: every
// millisecond is one in which nobody's bytes arrive.
func (r *Router) drop(ctx context.Context, names []string) {
	if len(names) == 0 {
		return
	}
	r.mu.Lock()
	judged := r.silence.apply(r.revision.Settings, r.uplinks)
	r.mu.Unlock()
	var changes []desired.Change
	for _, u := range judged {
		for _, source := range u.SubflowSources() {
			if !u.Fit && slices.Contains(names, u.Name) {
				changes = append(changes, desired.DeleteEndpoint{Endpoint: desired.Endpoint{Address: source}})
			}
		}
	}
	if err := r.kernel.Apply(ctx, changes); err != nil {
		r.log.Warn("silent uplinks keep their endpoints for now", "uplinks", names, "error", err)
	}
	r.loop.Did(changes)
}

// supervise follows each look at the carriers.
func (r *Router) supervise(ctx context.Context) {
	signs := r.packets.signs()
	r.askSubflows(signs)
	ask, fallen, back := r.silence.look(time.Now(), signs)
	for _, name := range ask {
		r.asking.Go(func() { r.ask(ctx, name) })
	}
	r.drop(ctx, fallen)
	for _, name := range fallen {
		r.log.Warn("uplink is silent", "uplink", name)
	}
	for _, name := range back {
		r.log.Info("uplink is back", "uplink", name)
		r.packets.redial(name)
	}
	if len(fallen)+len(back) > 0 {
		r.loop.Poke()
		r.subflows.kick()
	}
}

// askSubflows looks whether flows still hear the concentrator where packets do not:
// then it is UDP alone that does not pass, or a full queue that drops it.
func (r *Router) askSubflows(signs map[string]uplink.Signs) {
	var subflows map[netip.Addr]time.Time
	for name, s := range signs {
		if s.Carries || s.SilentSince.IsZero() {
			continue
		}
		if subflows == nil {
			subflows = r.pool.Heard()
		}
		for _, source := range r.packets.sources(name) {
			if at := subflows[source]; at.After(s.SilentSince.Add(uplink.Tick)) {
				r.silence.heard(name, at)
			}
		}
	}
}

// ask looks whether the concentrator is reached over an uplink.
func (r *Router) ask(ctx context.Context, name string) {
	peer, path, ok := r.packets.way(name)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	if peer.Reach(ctx, path) == nil {
		r.silence.heard(name, time.Now())
		r.packets.kick()
	}
}

// sources are the addresses of an uplink, its leg's included.
func (p *packets) sources(name string) []netip.Addr {
	_, path, _ := p.way(name)
	return slices.Concat(path.Sources, path.Others)
}

// way is whom to dial, and from where over an uplink.
func (p *packets) way(name string) (*tunnel.Peer, tunnel.Path, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, path := range p.paths {
		if path.Name == name && p.peer != nil {
			return p.peer, path, true
		}
	}
	return nil, tunnel.Path{}, false
}

// watchFlows has the uplinks watched closely while flows move bytes.
func (r *Router) watchFlows(ctx context.Context) {
	tick := time.NewTicker(movedEvery)
	defer tick.Stop()
	var watch *uplink.Watch // nil while nothing moves
	var last uint64
	var measured, moving time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		if now.Sub(measured) >= movedEvery {
			measured = now
			moved := r.pool.Moved()
			if int64(moved-last) > movedBytes {
				moving = now
				r.packets.bond.Watch()
			}
			last = moved
			switch moves := now.Sub(moving) < stillMoves; {
			case moves && watch == nil:
				watch = new(uplink.Watch)
				tick.Reset(uplink.WatchEvery)
			case !moves && watch != nil:
				watch = nil
				tick.Reset(movedEvery)
			}
		}
		due := r.silence.due(now, watch != nil)
		if watch == nil {
			continue
		}
		quiet := watch.Look(now, r.heard(now))
		r.silence.fell(quiet)
		if due || len(quiet) > 0 {
			r.supervise(ctx)
		}
	}
}

// heard asks the carriers of packets, and where those have heard nothing for a
// moment, the subflows.
func (r *Router) heard(now time.Time) map[string]uplink.Heard {
	heard := r.packets.heard()
	var subflows map[netip.Addr]time.Time
	for name, h := range heard {
		if now.Sub(h.Last) < doubtful {
			continue
		}
		if subflows == nil {
			subflows = r.pool.Heard()
		}
		for _, source := range r.packets.sources(name) {
			if at := subflows[source]; at.After(h.Last) {
				h.Last = at
			}
		}
		heard[name] = h
	}
	return heard
}
