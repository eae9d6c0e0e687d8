package router

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/bond"
	"sheaf/daemon/datapath/tun"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/daemon/datapath/uplink"
)

// The path of a LAN packet that is not TCP, and of the answer to it:
//
//	rule iif lan0 ─▶ masquerade ─▶ TUN ─▶ fromLAN ─▶ Bond.Send ─▶ carriers of the uplinks
//	LAN ◀─ kernel ◀─ TUN ◀─ device.Write ◀─ accept ◀─ Bond.Receive ◀─ carriers
//
// Carriers come and go by themselves: one QUIC connection for every uplink that
// lets UDP through, and a few MPTCP sessions over all of them.

const (
	// tunQueues is how many flows can be read from the TUN at the same time.
	tunQueues = 2
	// streamSessions carry packets where UDP does not pass: one for interactive
	// packets, the others share the rest by flow.
	streamSessions = 3

	// A carrier that does not come about is tried again after carrierRetryMin,
	// doubling to carrierRetryMax while others carry, and without a pause while
	// none does.
	carrierRetryMin = time.Second
	carrierRetryMax = 10 * time.Second
	// carrierDial bounds one attempt. It is short, because the retransmissions
	// of a handshake come ever more seldom, and an uplink may be back by then.
	carrierDial = 1500 * time.Millisecond
	// silentTime is how long a carrier may be unfit before it is dialled anew:
	// after an outage a new handshake is faster than the retransmission timers
	// of an old connection.
	silentTime = 2 * time.Second

	superviseEvery = 250 * time.Millisecond
	// failedAfter is how long the tunnel must have been up without an uplink for
	// that to have failed by itself. When the concentrator is lost all fall silent,
	// and come back with it, but not at the same moment.
	failedAfter = 5 * time.Second
	calmEvery   = 250 * time.Millisecond
)

// packets is the packet half of the data path.
type packets struct {
	log     *slog.Logger
	id      uint64 // of this start; both ends put the carriers of one id together
	bond    *bond.Bond
	changed func()        // what is wanted of the kernel has changed
	reach   func(up bool) // the concentrator does or does not answer
	calm    func(bool)    // interactive packets are under way
	// supervised follows each look at the carriers.
	supervised func()

	device   tun.Kept
	stopping atomic.Bool
	// addresses are inner, for those who cannot wait for mu.
	addresses atomic.Pointer[tunnel.Inner]

	wake chan struct{}

	mu       sync.Mutex
	peer     *tunnel.Peer
	paths    []tunnel.Path
	sessions []tunnel.Path // the same, as sessions are dialled from
	inner    tunnel.Inner
	wish     tunnel.Wishes  // what the concentrator is told
	told     []byte         // as it was told last, over control
	answer   tunnel.Answers // what it said to that
	carriers map[string]*carrier
	standing map[string]standing // of uplinks
	observed time.Time
	control  tunnel.Messages // the session over which wishes travel, or nil
	telling  sync.WaitGroup
	// isTelling: a wish is on its way to the kernel.
	isTelling bool
}

// standing is what is remembered of the links over one uplink, when they are gone
// too.
type standing struct {
	rtt     time.Duration // the least, lately
	without time.Duration // that the tunnel was up since one was fit
}

// carrier is the way of one uplink, or with an empty name the sessions over all.
type carrier struct {
	path   tunnel.Path
	cancel context.CancelFunc
	link   *bond.Link    // nil while there is none
	reason error         // why there is none
	proven bool          // the link was fit at some time
	unfit  time.Time     // since when; zero while fit
	silent bool          // the present connection was ended for that
	reset  func()        // ends the present connection
	again  chan struct{} // dial now
}

var errSilent = errors.New("it has fallen silent; being tried again")

func newPackets(log *slog.Logger) *packets {
	p := &packets{log: log, id: rand.Uint64(), wake: make(chan struct{}, 1), carriers: map[string]*carrier{}, standing: map[string]standing{}}
	p.device = tun.Kept{Name: desired.TunnelName, Queues: tunQueues, Receive: p.fromLAN, Changed: func() { p.changed() }, Log: log}
	p.bond = bond.New(bond.Config{
		Log: log, Deliver: p.device.Write, Accept: p.accept, Changed: p.kick,
		Alive: func(up bool) {
			switch {
			case p.stopping.Load():
				return
			case up:
				log.Info("the concentrator answers")
			default:
				log.Warn("the concentrator does not answer over any uplink")
			}
			p.reach(up)
			p.changed()
		},
	})
	return p
}

// run serves until ctx ends.
func (p *packets) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { p.stopping.Store(true) })
	defer stop()
	var work sync.WaitGroup
	work.Go(func() { p.bond.Run(ctx) })
	work.Go(func() { p.device.Run(ctx) })
	work.Go(func() { p.keepCarriers(ctx, &work) })
	work.Go(func() { p.keepCalm(ctx) })
	work.Wait()
	p.telling.Wait()
}

func (p *packets) fromLAN(_ int, list [][]byte) {
	for _, packet := range list {
		p.bond.Send(packet)
	}
}

// accept lets through what is addressed to this router, and nothing else: what
// the concentrator sends must not reach other networks that the router is in.
func (p *packets) accept(h bond.Header) bool {
	inner := p.addresses.Load()
	return inner != nil && (h.Destination == inner.Address4 || h.Destination == inner.Address6)
}

// setPeer sets whom to dial, setPaths from where.
func (p *packets) setPeer(peer *tunnel.Peer) {
	p.mu.Lock()
	p.peer = peer
	p.mu.Unlock()
	p.kick()
}

func (p *packets) setPaths(paths, sessions []tunnel.Path) {
	p.mu.Lock()
	p.paths, p.sessions = paths, sessions
	p.mu.Unlock()
	p.kick()
}

func (p *packets) kick() {
	kick(p.wake)
}

// keepCarriers starts and ends the carriers as paths come and go, and gives up
// those that have fallen silent.
func (p *packets) keepCarriers(ctx context.Context, work *sync.WaitGroup) {
	tick := time.NewTicker(superviseEvery)
	defer tick.Stop()
	var peer *tunnel.Peer
	for {
		p.observe(time.Now())
		p.mu.Lock()
		if !samePeer(p.peer, peer) {
			peer = p.peer
			for name := range p.carriers {
				p.dropLocked(name)
			}
		}
		wanted := map[string]tunnel.Path{}
		if peer != nil && len(p.paths) > 0 {
			for _, path := range p.paths {
				wanted[path.Name] = path
			}
			wanted[""] = tunnel.Path{}
		}
		for name, c := range p.carriers {
			if path, ok := wanted[name]; !ok || !path.SameSource(c.path) {
				p.dropLocked(name)
			}
		}
		for name, path := range wanted {
			if c := p.carriers[name]; c != nil {
				c.path = path
				continue
			}
			each, cancel := context.WithCancel(ctx)
			c := &carrier{path: path, cancel: cancel, again: make(chan struct{}, 1)}
			p.carriers[name] = c
			work.Go(func() { p.keep(each, peer, c) })
		}
		p.superviseLocked(time.Now())
		p.mu.Unlock()
		p.supervised()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-p.wake:
		}
	}
}

// samePeer says whether carriers to a serve for b.
func samePeer(a, b *tunnel.Peer) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Concentrator == b.Concentrator && slices.Equal(a.Addresses, b.Addresses) && a.Variant == b.Variant
}

func (p *packets) dropLocked(name string) {
	p.carriers[name].cancel()
	delete(p.carriers, name)
}

// superviseLocked sets which carriers only stand by, and resets silent ones.
func (p *packets) superviseLocked(now time.Time) {
	streamNeeded := false
	for name, c := range p.carriers {
		if name != "" && !c.path.Backup && c.link == nil {
			streamNeeded = true
		}
	}
	p.wish.Backup, p.wish.Stream = nil, streamNeeded
	for _, path := range p.paths {
		if path.Backup {
			p.wish.Backup = append(p.wish.Backup, path.Name)
		}
	}
	p.tellLocked()
	for name, c := range p.carriers {
		if c.link == nil {
			c.unfit, c.proven = time.Time{}, false
			continue
		}
		c.link.SetBackup(c.path.Backup || name == "" && !streamNeeded)
		switch {
		case c.link.Fit():
			c.unfit, c.proven = time.Time{}, true
		case c.unfit.IsZero():
			c.unfit = now
		case now.Sub(c.unfit) > silentTime:
			c.unfit = time.Time{}
			c.silent = true
			c.reset()
		}
	}
}

// signs gives what is known of each uplink's way, by name.
func (p *packets) signs() map[string]uplink.Signs {
	p.mu.Lock()
	defer p.mu.Unlock()
	lives := map[string]bond.Life{}
	for name, c := range p.carriers {
		if name != "" && c.link != nil {
			lives[name] = c.link.Life()
		}
	}
	signs := map[string]uplink.Signs{}
	for name, c := range p.carriers {
		if name == "" {
			continue
		}
		life := lives[name]
		s := uplink.Signs{Carries: life.Fit, Heard: life.Heard}
		if c.proven && !life.Fit {
			s.SilentSince = life.Asked
		}
		for other, l := range lives {
			// What came a round trip after that question was sent by a concentrator
			// that could have answered it.
			if other != name && l.Heard.Add(-l.RTT).After(s.SilentSince) {
				s.Others = true
			}
		}
		signs[name] = s
	}
	return signs
}

// heard says when anything last came over each uplink in use.
func (p *packets) heard() map[string]uplink.Heard {
	p.mu.Lock()
	defer p.mu.Unlock()
	heard := map[string]uplink.Heard{}
	for name, c := range p.carriers {
		if name != "" && !c.path.Backup && c.link != nil && c.proven {
			life := c.link.Life()
			heard[name] = uplink.Heard{Last: life.Heard, RTT: life.MinRTT}
		}
	}
	return heard
}

// redial has the uplink's carrier dialled now, if it is to be dialled at all.
func (p *packets) redial(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.carriers[name]; c != nil {
		select {
		case c.again <- struct{}{}:
		default:
		}
	}
}

// keep holds one carrier until ctx ends.
func (p *packets) keep(ctx context.Context, peer *tunnel.Peer, c *carrier) {
	wait := carrierRetryMin
	for ctx.Err() == nil {
		begun := time.Now()
		p.mu.Lock()
		path, all := c.path, slices.Clone(p.sessions)
		p.mu.Unlock()
		var err error
		if path.Name == "" {
			err = p.carryStream(ctx, peer, c, all)
		} else {
			err = p.carryDatagrams(ctx, peer, c, path)
		}
		if time.Since(begun) > carrierRetryMax {
			wait = carrierRetryMin
		}
		p.mu.Lock()
		if c.silent {
			err, c.silent = errSilent, false
		}
		c.reason = err
		p.mu.Unlock()
		switch {
		case !p.bond.Alive():
			// Refusals come at once, and so may come again.
			sleep(ctx, max(0, carrierRetryMin/2-time.Since(begun)))
			wait = carrierRetryMin
		default:
			select {
			case <-ctx.Done():
			case <-c.again:
				wait = carrierRetryMin
			case <-time.After(wait):
				wait = min(2*wait, carrierRetryMax)
			}
		}
	}
}

// carryDatagrams holds one QUIC connection from its handshake to its end.
func (p *packets) carryDatagrams(ctx context.Context, peer *tunnel.Peer, c *carrier, path tunnel.Path) error {
	dialling, cancel := context.WithTimeout(ctx, carrierDial)
	defer cancel()
	m, inner, err := peer.DialDatagram(dialling, path, p.id)
	if err != nil {
		return err
	}
	return p.serve(ctx, c, bond.LinkConfig{Name: path.Name, Kind: bond.Datagram, Backup: path.Backup}, inner, []tunnel.Messages{m})
}

// carryStream holds the MPTCP sessions for packets until one of them ends.
func (p *packets) carryStream(ctx context.Context, peer *tunnel.Peer, c *carrier, paths []tunnel.Path) error {
	dialling, cancel := context.WithTimeout(ctx, 2*carrierDial)
	defer cancel()
	var list []tunnel.Messages
	var inner tunnel.Inner
	for range streamSessions {
		m, got, err := peer.DialStream(dialling, paths, p.id)
		if err != nil {
			for _, open := range list {
				_ = open.Close()
			}
			return err
		}
		list, inner = append(list, m), got
	}
	return p.serve(ctx, c, bond.LinkConfig{Kind: bond.Stream, Backup: true}, inner, list)
}

// serve makes sessions a link of the bond, until one ends.
func (p *packets) serve(ctx context.Context, c *carrier, config bond.LinkConfig, inner tunnel.Inner, list []tunnel.Messages) error {
	closeAll := func() {
		for _, m := range list {
			_ = m.Close()
		}
	}
	defer closeAll()
	stop := context.AfterFunc(ctx, closeAll)
	defer stop()
	for _, m := range list {
		config.Carriers = append(config.Carriers, m)
	}
	link := p.bond.AddLink(config)
	defer p.bond.RemoveLink(link)

	p.mu.Lock()
	c.link, c.reason, c.reset = link, nil, closeAll
	learnt := p.inner != inner
	p.inner = inner
	p.addresses.Store(&inner)
	if config.Kind == bond.Stream {
		p.control, p.told = list[0], nil
		p.tellLocked()
	}
	p.mu.Unlock()
	if learnt {
		p.changed()
	}
	p.kick()
	defer func() {
		p.mu.Lock()
		c.link = nil
		if config.Kind == bond.Stream {
			// The next may end at another start of the concentrator.
			p.control, p.answer = nil, tunnel.Answers{}
		}
		p.mu.Unlock()
		p.kick()
	}()

	ended := make(chan error, len(list))
	for _, m := range list {
		go func() {
			ended <- m.Receive(tunnel.Receiver{
				Message: func(message []byte) { p.bond.Receive(link, message) },
				Control: p.answered,
			})
		}()
	}
	err := <-ended
	closeAll()
	for range len(list) - 1 {
		<-ended
	}
	return err
}

// keepCalm asks bulk transfers to give way while interactive packets flow.
func (p *packets) keepCalm(ctx context.Context) {
	tick := time.NewTicker(calmEvery)
	defer tick.Stop()
	for {
		p.calm(p.bond.Interactive())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (p *packets) setWishes(list []settings.Forward, m settings.Multipath, ranks map[string]tunnel.Rank) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wish.Scheduler, p.wish.CongestionControl, p.wish.Ranks = m.Scheduler, string(m.CongestionControl), ranks
	p.wish.Forwards = nil
	for _, f := range list {
		p.wish.Forwards = append(p.wish.Forwards, tunnel.Port{Protocol: f.Protocol, Port: f.Port})
	}
	p.tellLocked()
}

// setLegs says which legs the concentrator is to make.
func (p *packets) setLegs(list []tunnel.Leg) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wish.Legs = list
	p.tellLocked()
}

// legView is whom to reach, from where, and what is known of legs there.
func (p *packets) legView() (*tunnel.Peer, []tunnel.Path, []tunnel.LegAnswer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.peer, p.paths, p.answer.Legs
}

// tellLocked sends the wish if the concentrator has not heard it yet. It never
// waits for the network.
func (p *packets) tellLocked() {
	text, err := json.Marshal(p.wish)
	if err != nil {
		panic(fmt.Sprintf("a wish is plain data: %v", err))
	}
	if p.control == nil || p.isTelling || bytes.Equal(text, p.told) {
		return // one after the other: keepCarriers looks again soon
	}
	p.told, p.isTelling = text, true
	control := p.control
	p.telling.Go(func() {
		_ = control.SendControl(text) // a failure ends the session, and the next is told
		p.mu.Lock()
		p.isTelling = false
		p.mu.Unlock()
	})
}

func (p *packets) answered(text []byte) {
	var a tunnel.Answers
	if err := json.Unmarshal(text, &a); err != nil {
		p.log.Warn("the concentrator's word on the forwards is not readable", "error", err)
		return
	}
	p.mu.Lock()
	p.answer = a
	p.mu.Unlock()
}

// state is what the control path must know.
func (p *packets) state() desired.Tunnel {
	t := desired.Tunnel{Ranking: p.ranking()}
	if device := p.device.Device(); device != nil {
		t.Device = desired.Interface{Index: device.Index(), Name: device.Name()}
	}
	p.mu.Lock()
	t.Address4, t.Address6 = p.inner.Address4, p.inner.Address6
	t.Gateway4, t.Gateway6 = p.inner.Gateway4, p.inner.Gateway6
	p.mu.Unlock()
	t.Up = p.bond.Alive()
	return t
}

// observe remembers how the uplinks' links are doing.
func (p *packets) observe(now time.Time) {
	stats := p.bond.Stats()
	p.mu.Lock()
	defer p.mu.Unlock()
	note(p.standing, stats, min(now.Sub(p.observed), 2*superviseEvery))
	p.observed = now
	maps.DeleteFunc(p.standing, func(name string, _ standing) bool {
		return !slices.ContainsFunc(p.paths, func(path tunnel.Path) bool { return path.Name == name })
	})
}

// note adds what is seen of the links a while after the last look.
func note(known map[string]standing, stats bond.Stats, passed time.Duration) {
	for name, s := range known {
		if stats.Alive {
			s.without += passed
		}
		known[name] = s
	}
	for _, l := range stats.Links {
		if l.Name == "" || l.MinRTT == 0 {
			continue
		}
		s := known[l.Name]
		s.rtt = l.MinRTT
		if l.Fit {
			s.without = 0
		}
		known[l.Name] = s
	}
}

// ranking names the uplinks, best first, as far as they are known.
func (p *packets) ranking() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return rank(p.standing)
}

// rank orders uplinks by their round-trip time, after those that worked the ones
// that had failed while the tunnel was up.
func rank(known map[string]standing) []string {
	failed := func(name string) int {
		if known[name].without > failedAfter {
			return 1
		}
		return 0
	}
	return slices.SortedFunc(maps.Keys(known), func(a, b string) int {
		return cmp.Or(failed(a)-failed(b), cmp.Compare(known[a].rtt, known[b].rtt), cmp.Compare(a, b))
	})
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
