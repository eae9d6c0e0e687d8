package tunnel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// minIdle sessions are kept ready, more after a burst, at most maxIdle.
	minIdle = 8
	maxIdle = 64
	// maxDialling bounds the handshakes under way at once.
	maxDialling = 32
	// hedgeAfter is how long a dial over one path may take before the next path
	// is tried beside it, unless others get through: then it is our machine or
	// the concentrator's that is slow.
	hedgeAfter = 400 * time.Millisecond
	// A path whose dial failed is left alone for minRetry, doubled up to maxRetry.
	minRetry = 250 * time.Millisecond
	maxRetry = 3 * time.Second
	// A path strips MPTCP when this many sessions, dialled one after the other,
	// fell back to plain TCP; until then they are closed. It is then ranked last
	// for plainRetry, and tried anew.
	// One that MPTCP has passed lately has to show it longer: SYNs with the option
	// that are lost in an outage make a connection fall back, too.
	plainInARow  = 3
	plainDoubted = 6
	passedLately = 10 * time.Minute
	plainRetry   = time.Minute
	// joinTime is how long a new session may take to be joined by all subflows.
	joinTime = 3 * time.Second
	// probeEvery is how often a session is replaced to see whether a path that
	// none could join can be joined by now.
	probeEvery = 20 * time.Second
	// betterBy is how much lower another path's round-trip time must be before
	// the pool moves to it: the kernel's scheduler prefers a session's first
	// subflow, so where a session was dialled from decides its latency.
	betterBy = 0.8

	// rest is how long a session should have been idle. Until the last bytes of
	// its last flow are acknowledged, which takes a round trip and the peer's
	// delayed acknowledgement, the kernel's scheduler avoids the first subflow.
	rest = 150 * time.Millisecond

	// checkTime is how long a session that may have died in an outage has to show
	// that it lives.
	checkTime = time.Second

	// forgetAddress is how long what is known of an address is kept after no session
	// has a subflow from there.
	forgetAddress = time.Hour
	// strandedTime is how long a session may have no subflow over a fit path, as
	// long as clients wait for the tunnel.
	strandedTime = 30 * time.Second

	maintainEvery = 500 * time.Millisecond
)

// Path is one uplink as the pool uses it.
type Path struct {
	Name    string
	Sources []netip.Addr // at most one per address family
	// Others are addresses of the uplink that are not dialled from, but that
	// subflows may have.
	Others []netip.Addr
	Ports  Ports // to dial from; any, unless another path has the same address
	Backup bool  // dialled from only when no other path works
}

// SameSource says whether two paths are dialled from the same addresses and ports.
func (p Path) SameSource(other Path) bool {
	return slices.Equal(p.Sources, other.Sources) && p.Ports == other.Ports
}

// has says whether any of these addresses is the path's.
func (p Path) has(from []netip.Addr) bool {
	return slices.ContainsFunc(from, func(a netip.Addr) bool { return slices.Contains(p.Sources, a) || slices.Contains(p.Others, a) })
}

// Ports is a range of source ports with both its ends. The zero range is all of
// them.
type Ports struct{ First, Last uint16 }

var errStranded = errors.New("no subflow over any uplink that works")

// ErrDown says that no session reaches the concentrator.
var ErrDown = errors.New("the tunnel is down")

// Pool keeps sessions dialled, handshaken and joined by all their subflows
// before a flow needs one.
//
//	SetPeer, SetPaths ─▶ maintain (rank, wanted) ─▶ dial ─▶ idle ─▶ Get ─▶ Relay ─▶ Put ─▶ idle
type Pool struct {
	log        *slog.Logger
	dialFailed *rarely
	kick       chan struct{}

	mu       sync.Mutex
	peer     *Peer
	paths    []Path
	trouble  map[string]*trouble
	rtt      map[netip.Addr]time.Duration // lowest lately measured, by source address
	joined   map[netip.Addr]time.Time     // when MPTCP sessions last had a subflow from there
	best     string                       // the path that sessions are dialled from
	sessions map[*Session]*pooled
	idle     []*pooled // the one used last is the last
	waiting  []chan *pooled
	dialling int
	checking map[*pooled]bool // idle before an outage, and not yet seen alive after it
	cut      bool             // the concentrator does not answer, says SetReachable
	restored int64            // when it last began to answer again, Unix ns; 0: it never stopped
	opened   int              // flows since the last decay: how many idle sessions a burst may need
	lastErr  error

	nextProbe time.Time // when a path that no session could join is next tried

	calm  *calm
	ranks map[string]Rank // by path
}

// pooled is what the pool knows of a session.
type pooled struct {
	*Session
	peer   *Peer
	path   string    // empty once the path it was dialled from is gone
	pinged bool      // a ping is under way
	since  time.Time // when it was dialled
	used   time.Time // when its last flow ended
	// stranded is since when it has no subflow over a fit path; zero if it has.
	stranded time.Time
}

// trouble is the recent failures of one path.
type trouble struct {
	reached  time.Time // the last success
	failures int
	until    time.Time // not dialled before
	err      error
	fellBack int       // sessions in a row that fell back to plain TCP
	fellAt   time.Time // the last of them
	plain    time.Time // when it was last found to strip MPTCP
	passed   time.Time // when MPTCP last got through
}

// strips says whether so many sessions have fallen back that it is the path's doing.
func (t *trouble) strips(now time.Time) bool {
	if !t.passed.IsZero() && now.Sub(t.passed) < passedLately {
		return t.fellBack >= plainDoubted
	}
	return t.fellBack >= plainInARow
}

// NewPool returns a pool that dials nothing until it has a peer and a path.
func NewPool(log *slog.Logger) *Pool {
	return &Pool{
		log: log, dialFailed: &rarely{log: log}, kick: make(chan struct{}, 1),
		trouble: map[string]*trouble{}, rtt: map[netip.Addr]time.Duration{}, joined: map[netip.Addr]time.Time{}, sessions: map[*Session]*pooled{},
		checking: map[*pooled]bool{}, calm: newCalm(log),
	}
}

// SetPeer sets whom to dial. Sessions with another peer are closed, those that
// are in use when their flow ends; nil closes all.
func (p *Pool) SetPeer(peer *Peer) {
	p.mu.Lock()
	old := p.peer
	p.peer = peer
	var closing []*pooled
	if !old.serves(peer) {
		closing, p.idle = p.idle, nil
		for _, s := range p.sessions {
			s.path = ""
		}
		p.trouble = map[string]*trouble{}
	}
	p.mu.Unlock()
	for _, s := range closing {
		s.Close()
	}
	p.wake()
}

// SetPaths sets the fit uplinks. A path that has come, or changed its address,
// is tried at once.
func (p *Pool) SetPaths(paths []Path) {
	p.mu.Lock()
	before := map[string]Path{}
	for _, path := range p.paths {
		before[path.Name] = path
	}
	p.paths = paths
	for _, path := range paths {
		if old, ok := before[path.Name]; !ok || !path.SameSource(old) {
			delete(p.trouble, path.Name)
		} else {
			delete(before, path.Name)
		}
	}
	// What is left in before is gone, or has new addresses: the first subflow of
	// the sessions dialled from there is lost.
	for _, s := range p.sessions {
		if _, gone := before[s.path]; gone {
			s.path = ""
		}
	}
	p.rankLocked()
	p.mu.Unlock()
	p.wake()
}

// SetReachable says whether the concentrator answers at all, as somebody who asks
// it more often than the kernel does has found. While it does not, Get returns
// ErrDown at once, to those who wait already as well. Sessions that were idle
// through such a time are used again only once they have answered a ping.
func (p *Pool) SetReachable(reachable bool) {
	p.mu.Lock()
	was := p.cut
	p.cut = !reachable
	var suspects []*pooled
	switch {
	case p.cut:
		p.releaseWaiting()
	case was:
		p.restored = time.Now().UnixNano()
		for _, t := range p.trouble { // what was tried in vain is tried again now
			t.failures, t.until = 0, time.Time{}
		}
		suspects, p.idle = p.idle, nil
		for _, s := range suspects {
			p.checking[s] = true
		}
	}
	p.mu.Unlock()
	for _, s := range suspects {
		go p.check(s)
	}
	p.wake()
}

// check makes a session idle again if it answers, and closes it if not.
func (p *Pool) check(s *pooled) {
	ctx, cancel := context.WithTimeout(context.Background(), checkTime)
	defer cancel()
	err := s.Ping(ctx)
	p.mu.Lock()
	delete(p.checking, s)
	if err == nil && p.sessions[s.Session] != nil && s.peer.serves(p.peer) {
		p.offer(s)
	} else if err == nil {
		err = errSessionClosed // of another peer by now
	}
	p.mu.Unlock()
	if err != nil {
		s.abandon(fmt.Errorf("no answer to a ping after an outage: %w", err))
		p.wake()
	}
}

// releaseWaiting tells those who wait for a session that there will be none.
func (p *Pool) releaseWaiting() {
	for _, w := range p.waiting {
		w <- nil
	}
	p.waiting = nil
}

// SetCalm says whether flows are to leave the uplinks' queues short, because
// packets that cannot wait share them. It holds for flows that are open, too.
func (p *Pool) SetCalm(on bool) { p.calm.on.Store(on) }

func (p *Pool) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// Run keeps the pool filled until ctx ends, then closes every session.
func (p *Pool) Run(ctx context.Context) {
	tick := time.NewTicker(maintainEvery)
	defer tick.Stop()
	for {
		p.maintain(ctx)
		select {
		case <-ctx.Done():
			p.mu.Lock()
			all := make([]*Session, 0, len(p.sessions))
			for s := range p.sessions {
				all = append(all, s)
			}
			p.mu.Unlock()
			for _, s := range all {
				s.Close()
			}
			return
		case <-tick.C:
			p.measure(time.Now())
		case <-p.kick:
		}
	}
}

// Get returns a session for one flow: a warm one, or the next to be ready. It
// returns ErrDown at once when none can be expected.
func (p *Pool) Get(ctx context.Context) (*Session, error) {
	p.mu.Lock()
	p.opened++
	for len(p.idle) > 0 && !p.cut {
		at := p.choose(time.Now())
		s := p.idle[at]
		p.idle = slices.Delete(p.idle, at, at+1)
		if isClosed(s.done) {
			continue
		}
		p.mu.Unlock()
		p.wake()
		return s.Session, nil
	}
	if p.down() {
		defer p.mu.Unlock()
		return nil, p.why()
	}
	ready := make(chan *pooled, 1)
	p.waiting = append(p.waiting, ready)
	p.mu.Unlock()
	p.wake()
	select {
	case s := <-ready:
		if s == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			return nil, p.why()
		}
		return s.Session, nil
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		if i := slices.Index(p.waiting, ready); i >= 0 {
			p.waiting = slices.Delete(p.waiting, i, i+1)
		} else if s := <-ready; s != nil {
			p.offer(s) // it arrived as we left
		}
		return nil, fmt.Errorf("waiting for a session: %w", ctx.Err())
	}
}

// choose picks an idle session: one dialled from the best path, rested, and of
// those the one used last.
func (p *Pool) choose(now time.Time) int {
	at := -1
	for i, s := range slices.Backward(p.idle) {
		if s.path != p.best {
			continue
		}
		at = i // so far the longest rested
		if now.Sub(s.used) > rest {
			return i
		}
	}
	return max(at, 0)
}

// Put takes a session back after its flow.
func (p *Pool) Put(s *Session) {
	s.resetAccount()
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.sessions[s]
	if known == nil || isClosed(s.done) {
		return
	}
	tooMany := len(p.idle) >= maxIdle && len(p.waiting) == 0
	if tooMany || !known.peer.serves(p.peer) || s.sent.Load()+s.received.Load() > retireAfter {
		go s.Close()
		return
	}
	known.used = time.Now()
	if s.heard.Load() < p.restored {
		p.checking[known] = true
		go p.check(known)
		return
	}
	p.offer(known)
}

// offer hands a session to the flow that waits longest, or makes it idle.
func (p *Pool) offer(s *pooled) {
	if len(p.waiting) > 0 {
		p.waiting[0] <- s
		p.waiting = slices.Delete(p.waiting, 0, 1)
		return
	}
	p.idle = append(p.idle, s)
}

// down says whether no session is there and none is about to be.
func (p *Pool) down() bool {
	if p.cut {
		return true
	}
	if len(p.sessions) > 0 {
		return false
	}
	if p.peer == nil {
		return true
	}
	for _, path := range p.paths {
		if t := p.trouble[path.Name]; t == nil || t.failures == 0 {
			return false
		}
	}
	return true
}

func (p *Pool) why() error {
	switch {
	case p.peer == nil:
		return fmt.Errorf("%w: not enrolled with a concentrator; run `sheafctl join TOKEN`", ErrDown)
	case len(p.paths) == 0:
		return fmt.Errorf("%w: no uplink is fit", ErrDown)
	case p.cut && !errors.As(p.lastErr, new(*RefusedError)):
		return fmt.Errorf("%w: the concentrator does not answer", ErrDown)
	case p.lastErr != nil:
		return fmt.Errorf("%w: %w", ErrDown, p.lastErr)
	}
	return ErrDown
}

// maintain dials what is missing and closes what is no longer wanted.
func (p *Pool) maintain(ctx context.Context) {
	now := time.Now()
	p.mu.Lock()
	ranked := p.rank(now)
	if len(ranked) > 0 {
		p.best = ranked[0].Name
	}
	good := len(p.checking)
	var stale, silent []*pooled
	for _, s := range p.idle {
		switch {
		case s.path == p.best:
			good++
		default:
			stale = append(stale, s)
		}
		if !s.pinged && now.UnixNano()-s.heard.Load() > int64(pingAfter) {
			s.pinged = true
			silent = append(silent, s)
		}
	}
	target := idleTarget(p.opened)
	dials := wanted(target, len(p.waiting), good, p.dialling)
	if p.peer == nil || len(ranked) == 0 {
		dials = 0
	}
	p.dialling += dials
	var closing []*pooled
	if good >= target && len(ranked) > 0 {
		closing = stale
		p.idle = slices.DeleteFunc(p.idle, func(s *pooled) bool { return s.path != p.best })
		if surplus := len(p.idle) - max(2*target, minIdle); surplus > 0 {
			closing = append(slices.Clone(p.idle[:surplus]), closing...)
			p.idle = slices.Delete(p.idle, 0, surplus)
		}
	}
	if p.down() {
		p.releaseWaiting()
	}
	peer := p.peer
	p.mu.Unlock()

	for range dials {
		go p.dialOne(ctx, peer, ranked)
	}
	for _, s := range closing {
		s.Close()
	}
	for _, s := range silent {
		go p.ping(ctx, s)
	}
}

// idleTarget is how many idle sessions to keep, given the flows opened lately:
// browsers open connections in bursts.
func idleTarget(opened int) int { return min(max(opened, minIdle), maxIdle) }

// wanted is how many dials to start.
func wanted(target, waiting, idle, dialling int) int {
	return max(0, min(waiting+target-idle-dialling, maxDialling-dialling))
}

// rank orders the paths that may be dialled now, the best first.
func (p *Pool) rank(now time.Time) []Path {
	var ranked []Path
	for _, path := range p.paths {
		if t := p.trouble[path.Name]; t == nil || !now.Before(t.until) {
			ranked = append(ranked, path)
		}
	}
	slices.SortStableFunc(ranked, func(a, b Path) int {
		return cmp.Or(
			cmp.Compare(p.demerits(a, now), p.demerits(b, now)),
			cmp.Compare(p.weight(a), p.weight(b)),
		)
	})
	return ranked
}

// demerits is what counts more than a path's round-trip time: that it failed
// lately, then that it is a backup, then that it strips MPTCP.
func (p *Pool) demerits(path Path, now time.Time) int {
	sum := 0
	t := p.trouble[path.Name]
	if t != nil && t.failures > 0 {
		sum += 4
	}
	if path.Backup {
		sum += 2
	}
	if t != nil && now.Sub(t.plain) < plainRetry {
		sum++
	}
	return sum
}

// weight is a path's round-trip time for ranking: unknown counts as long, and
// the path in use has the advantage of betterBy.
func (p *Pool) weight(path Path) time.Duration {
	lowest := time.Duration(1<<63 - 1)
	for _, a := range path.Sources {
		if d, ok := p.rtt[a]; ok {
			lowest = min(lowest, d)
		}
	}
	if path.Name == p.best && lowest != 1<<63-1 {
		return time.Duration(float64(lowest) * betterBy)
	}
	return lowest
}

// Ranking names the paths in the order in which they are dialled, the best first.
func (p *Pool) Ranking() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var names []string
	for _, path := range p.rank(time.Now()) {
		names = append(names, path.Name)
	}
	return names
}

// way is whom to dial at present, and the paths to dial over, the best first.
// restored is when the concentrator last began to answer again, in Unix ns.
func (p *Pool) way(now time.Time) (peer *Peer, ranked []Path, restored int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peer, p.rank(now), p.restored
}

// measure learns the paths' round-trip times from the subflows of live
// sessions, forgets old bursts, and finds idle sessions that lack a subflow.
func (p *Pool) measure(now time.Time) {
	const sample = 64 // of the sessions in use
	p.mu.Lock()
	p.opened -= (p.opened + 3) / 4
	some := slices.Clone(p.idle)
	for _, s := range p.sessions {
		if len(some) >= len(p.idle)+sample {
			break
		}
		if !slices.Contains(p.idle, s) {
			some = append(some, s)
		}
	}
	p.mu.Unlock()
	rtt := map[netip.Addr]time.Duration{}
	joined := map[*pooled][]netip.Addr{}
	for _, s := range some {
		subflows, err := s.Subflows()
		if err != nil {
			continue // it has just been closed
		}
		for _, f := range subflows {
			a := f.Local.Addr()
			if d, ok := rtt[a]; f.MinRTT > 0 && (!ok || f.MinRTT < d) {
				rtt[a] = f.MinRTT
			}
			joined[s] = append(joined[s], a)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.Copy(p.rtt, rtt)
	for s, from := range joined {
		for _, a := range from {
			if s.multipath {
				p.joined[a] = now
			}
		}
	}
	// Addresses come and go for as long as the router runs.
	maps.DeleteFunc(p.joined, func(_ netip.Addr, at time.Time) bool { return now.Sub(at) > forgetAddress })
	maps.DeleteFunc(p.rtt, func(a netip.Addr, _ time.Duration) bool {
		_, lately := p.joined[a]
		return !lately && !slices.ContainsFunc(p.paths, func(path Path) bool { return path.has([]netip.Addr{a}) })
	})
	for _, s := range some {
		if s.isStranded(now, stranded(p.paths, joined[s])) {
			p.log.Warn("a session has no subflow over any uplink that works; ending it", "multipath", s.multipath, "busy", s.busy())
			go s.abandon(errStranded) // which takes p.mu
		}
	}
	if p.peer == nil || !p.peer.Joins {
		return
	}
	probe := !now.Before(p.nextProbe)
	for _, s := range incomplete(p.paths, p.idle, joined, now, probe) {
		s.path = "" // to be replaced
	}
	if probe {
		p.nextProbe = now.Add(probeEvery)
	}
}

// Joined says when sessions over MPTCP last had a subflow from one of these
// addresses, and whether there is any session by which one could tell.
func (p *Pool) Joined(sources []netip.Addr) (last time.Time, sessions bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range sources {
		if at := p.joined[a]; at.After(last) {
			last = at
		}
	}
	return last, len(p.sessions) > 0 && !p.cut
}

// stranded says whether none of the addresses that a session has subflows from is
// one of a fit path, though there are such.
func stranded(paths []Path, from []netip.Addr) bool {
	for _, path := range paths {
		if path.has(from) {
			return false
		}
	}
	return len(paths) > 0
}

// isStranded says whether a session has been stranded for strandedTime by now. The
// kernel joins others to a connection that has lost its last subflow, but not
// always (6.18); and one over plain TCP cannot move. Its client is better told than
// left waiting.
func (s *pooled) isStranded(now time.Time, stranded bool) bool {
	switch {
	case !stranded:
		s.stranded = time.Time{}
	case s.stranded.IsZero():
		s.stranded = now
	}
	return stranded && now.Sub(s.stranded) > strandedTime
}

// incomplete lists idle sessions to be replaced because they lack a subflow of
// a fit path, which the kernel does not try again by itself: those whose path
// others have joined, and, as a probe, one of those whose path none has.
func incomplete(paths []Path, idle []*pooled, joined map[*pooled][]netip.Addr, now time.Time, probe bool) []*pooled {
	has := func(s *pooled, path Path) bool { return path.has(joined[s]) }
	var list []*pooled
	for _, path := range paths {
		var lacking []*pooled
		others := false
		for s := range joined {
			others = others || has(s, path)
		}
		for _, s := range idle {
			if s.multipath && s.path != "" && now.Sub(s.since) > joinTime && len(joined[s]) > 0 && !has(s, path) && !slices.Contains(list, s) {
				lacking = append(lacking, s)
			}
		}
		if !others {
			lacking = lacking[:min(len(lacking), 1)]
			if !probe {
				lacking = nil
			}
		}
		list = append(list, lacking...)
	}
	return list
}

// attempt is one way to reach the concentrator.
type attempt struct {
	path    Path
	source  source
	address string
}

// attempts lists what to try: every path to the first address, then every path
// to the next.
func attempts(ranked []Path, addresses []string) []attempt {
	var list []attempt
	for _, address := range addresses {
		literal, err := netip.ParseAddrPort(address)
		for _, path := range ranked {
			for _, from := range path.Sources {
				if err == nil && literal.Addr().Unmap().Is4() != from.Is4() {
					continue // the other family cannot reach it
				}
				list = append(list, attempt{path, source{from, path.Ports}, address})
			}
		}
	}
	return list
}

// dialOne brings one session into the pool, over whichever path answers first.
func (p *Pool) dialOne(ctx context.Context, peer *Peer, ranked []Path) {
	begun := time.Now()
	list := attempts(ranked, peer.Addresses)
	s, won, _ := race[*Session]{
		dial:    func(ctx context.Context, a attempt) (*Session, error) { return peer.dial(ctx, a.source, a.address) },
		drop:    (*Session).Close,
		patient: func(last attempt) bool { return p.reachedSince(last.path.Name, begun) },
		failed:  func(a attempt, err error) { p.failed(a.path.Name, err) },
	}.run(ctx, list)
	if s != nil && won.path.Name != list[0].path.Name && time.Since(begun) > hedgeAfter && !p.reachedSince(list[0].path.Name, begun) {
		p.failed(list[0].path.Name, fmt.Errorf("no answer from %s, from %s, within %v", list[0].address, list[0].source, time.Since(begun).Round(time.Millisecond)))
	}
	if s == nil {
		p.mu.Lock()
		p.dialling--
		if len(list) == 0 {
			p.lastErr = fmt.Errorf("no uplink has an address of the family of %v", peer.Addresses)
			for _, path := range ranked {
				p.note(path.Name, p.lastErr)
			}
		}
		p.mu.Unlock()
		p.wake()
		return
	}
	p.add(s, won.path.Name, peer, begun)
}

// reachedSince says whether a dial over the path has succeeded since then.
func (p *Pool) reachedSince(path string, then time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.trouble[path]
	return t != nil && t.reached.After(then)
}

func (p *Pool) failed(path string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lastErr == nil || p.lastErr.Error() != err.Error() {
		p.dialFailed.warn("dialling the concentrator failed", "uplink", path, "error", err)
	}
	p.lastErr = err
	p.note(path, err)
}

// note counts a failure of a path.
func (p *Pool) note(path string, err error) {
	t := p.trouble[path]
	if t == nil {
		t = new(trouble)
		p.trouble[path] = t
	}
	now := time.Now()
	if now.Before(t.until) {
		return // one of several dials that failed together
	}
	t.err = err
	t.until = now.Add(min(minRetry<<min(t.failures, 10), maxRetry))
	t.failures++
}

// add takes a new session, whose dial began at begun, into the pool and reads it
// until it ends.
func (p *Pool) add(s *Session, path string, peer *Peer, begun time.Time) {
	s.resetAccount()
	p.mu.Lock()
	p.dialling--
	if !peer.serves(p.peer) {
		p.mu.Unlock()
		s.Close()
		return
	}
	t := p.trouble[path]
	if t == nil {
		t = new(trouble)
		p.trouble[path] = t
	}
	*t = trouble{reached: time.Now(), plain: t.plain, fellBack: t.fellBack, fellAt: t.fellAt, passed: t.passed}
	if peer.Multipath && !s.multipath {
		if begun.After(t.fellAt) {
			t.fellBack++
			t.fellAt = time.Now()
		}
		if !t.strips(time.Now()) {
			p.mu.Unlock()
			s.Close()
			p.wake()
			return
		}
		if t.plain.IsZero() {
			p.log.Warn("sessions fall back to plain TCP: something on the path strips MPTCP, or the concentrator's kernel has it off",
				"uplink", path, "concentrator", s.wire.RemoteAddr())
		}
		t.plain = time.Now()
	} else {
		t.fellBack, t.fellAt, t.plain = 0, time.Time{}, time.Time{}
		if s.multipath {
			t.passed = time.Now()
		}
	}
	if p.lastErr != nil || len(p.sessions) == 0 {
		p.log.Info("reached the concentrator", "uplink", path, "concentrator", s.wire.RemoteAddr(), "multipath", s.multipath)
	}
	p.lastErr = nil
	p.dialFailed.again()
	s.calm = p.calm
	known := &pooled{Session: s, peer: peer, path: path, since: time.Now()}
	p.sessions[s] = known
	if len(p.waiting) > 0 {
		p.offer(known)
	} else {
		// Sessions that were used come first: their congestion windows are open.
		p.idle = slices.Insert(p.idle, 0, known)
	}
	p.mu.Unlock()
	p.wake()
	go func() {
		s.run()
		p.mu.Lock()
		delete(p.sessions, s)
		delete(p.checking, known)
		p.idle = slices.DeleteFunc(p.idle, func(i *pooled) bool { return i.Session == s })
		p.mu.Unlock()
		p.wake()
	}()
}

// ping closes a silent session that gives no sign of life, and then asks all
// the others: what silenced one may have silenced them.
func (p *Pool) ping(ctx context.Context, s *pooled) {
	ctx, cancel := context.WithTimeout(ctx, pingTime)
	defer cancel()
	err := s.Ping(ctx)
	p.mu.Lock()
	s.pinged = false
	if err != nil {
		for _, other := range p.idle {
			other.heard.Store(0)
		}
	}
	p.mu.Unlock()
	if err != nil {
		s.abandon(fmt.Errorf("no answer to a ping: %w", err))
		p.wake()
	}
}

// Moved counts the payload bytes of all live sessions, both ways.
func (p *Pool) Moved() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	var sum uint64
	for s := range p.sessions {
		sum += s.sent.Load() + s.received.Load()
	}
	return sum
}

// Heard says for each source address when something last came to it, as the
// subflows of some sessions in use saw it.
func (p *Pool) Heard() map[netip.Addr]time.Time {
	const enough = 8
	p.mu.Lock()
	var some []*Session
	for s := range p.sessions {
		// One that only sends hears acknowledgements, but the kernel keeps them to
		// itself.
		if s.busy() && s.pause(time.Now()) < time.Second {
			if some = append(some, s); len(some) == enough {
				break
			}
		}
	}
	p.mu.Unlock()
	heard := map[netip.Addr]time.Time{}
	for _, s := range some {
		subflows, err := s.Subflows()
		if err != nil {
			continue // it has just been closed
		}
		now := time.Now()
		for _, f := range subflows {
			if a, at := f.Local.Addr(), now.Add(-f.Silence); at.After(heard[a]) {
				heard[a] = at
			}
		}
	}
	return heard
}

// Status is the state of a pool.
type Status struct {
	Up       bool
	Reason   error // why it is not up
	Sessions int   // live, idle ones included
	Idle     int
	// Address is the concentrator's, as a live session has it.
	Address string
	// Plain names the paths whose sessions fell back to plain TCP.
	Plain []string
	// Failed maps a path to why the last dial over it failed.
	Failed map[string]error
	// Subflows of all sessions.
	Subflows []Subflow
}

// Status reads the state of the pool, and of every subflow from the kernel.
func (p *Pool) Status() Status {
	p.mu.Lock()
	st := Status{Up: len(p.sessions) > 0 && !p.cut, Sessions: len(p.sessions), Idle: len(p.idle), Failed: map[string]error{}}
	if !st.Up {
		st.Reason = p.why()
	}
	for name, t := range p.trouble {
		if t.err != nil {
			st.Failed[name] = t.err
		}
		if time.Since(t.plain) < plainRetry {
			st.Plain = append(st.Plain, name)
		}
	}
	slices.Sort(st.Plain)
	all := make([]*Session, 0, len(p.sessions))
	for s := range p.sessions {
		all = append(all, s)
	}
	p.mu.Unlock()
	for _, s := range all {
		if st.Address == "" {
			st.Address = s.wire.RemoteAddr().String()
		}
		if subflows, err := s.Subflows(); err == nil {
			st.Subflows = append(st.Subflows, subflows...)
		}
	}
	return st
}
