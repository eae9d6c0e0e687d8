package router

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"sheaf/daemon/datapath/tunnel"
	"sheaf/webui"
)

// The path of what happens to an operator:
//
//	every 2 s, and soon after reconciling has changed something ─▶ look ─▶ moment
//	the last moment and this one ─▶ happened (pure) ─▶ events.add ─▶ Events ─▶ webui
//	a revision, an enrolment ─────────────────────────────┘

const (
	// maxEvents are kept, of at most maxEventText bytes; maxWaiting clients may
	// wait for the next at once.
	maxEvents    = 1000
	maxEventText = 400
	maxWaiting   = 32
	// settling is how long after a change it is looked at: subflows join, which
	// takes two round trips.
	settling = 200 * time.Millisecond
)

// events are the last things that happened.
type events struct {
	look chan struct{} // look soon what has happened

	mu      sync.Mutex
	ring    []webui.Event // consecutive, the oldest first
	first   uint64        // ID of the first since the start
	next    uint64
	news    chan struct{} // closed when there is another one
	waiting int
	closed  bool
}

// newEvents begins with an ID that no earlier start of the daemon has reached, as
// long as the clock is right. It is exact in JavaScript until the year 2255.
func newEvents(now time.Time) *events {
	id := uint64(max(now.UnixMicro(), 1))
	return &events{look: make(chan struct{}, 1), first: id, next: id, news: make(chan struct{})}
}

// soon has a look taken soon.
func (e *events) soon() {
	kick(e.look)
}

// add records events now; their texts are cut if they are too long.
func (e *events) add(now time.Time, list ...webui.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(list) == 0 || e.closed {
		return
	}
	for _, event := range list {
		event.ID, event.Time = e.next, now.UTC()
		if len(event.Text) > maxEventText {
			event.Text = strings.ToValidUTF8(event.Text[:maxEventText], "") + "…"
		}
		e.next++
		e.ring = append(e.ring, event)
	}
	e.ring = slices.Delete(e.ring, 0, max(0, len(e.ring)-maxEvents))
	close(e.news)
	e.news = make(chan struct{})
}

// close lets those go who wait.
func (e *events) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	close(e.news)
}

// after returns the events after the one with an ID. Where there is none it waits
// for it, and returns none if none comes.
func (e *events) after(ctx context.Context, id uint64, wait time.Duration) (webui.Events, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		e.mu.Lock()
		list := e.afterLocked(id)
		if len(list.Events) > 0 || ctx.Err() != nil {
			e.mu.Unlock()
			return list, nil
		}
		if e.closed {
			e.mu.Unlock()
			return list, &webui.Error{Code: webui.CodeStopping, Detail: "the daemon is stopping"}
		}
		if e.waiting == maxWaiting {
			e.mu.Unlock()
			return webui.Events{}, &webui.Error{Code: webui.CodeTooManyWaiting,
				Detail: fmt.Sprintf("%d clients wait for events already; end one, or ask without waiting", maxWaiting)}
		}
		e.waiting++
		news := e.news
		e.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
		}
		e.mu.Lock()
		e.waiting--
		e.mu.Unlock()
	}
}

func (e *events) afterLocked(id uint64) webui.Events {
	from := max(id+1, e.first)
	if id >= e.next { // of another start, when the clock was ahead
		from = e.first
	}
	oldest := e.next - uint64(len(e.ring))
	list := webui.Events{}
	if from < oldest {
		list.Missed = oldest - from
		from = oldest
	}
	list.Events = slices.Clone(e.ring[from-oldest:])
	return list
}

// Events returns what has happened after an event.
func (r *Router) Events(ctx context.Context, after uint64, wait time.Duration) (webui.Events, error) {
	return r.events.after(ctx, after, wait)
}

// moment is what is compared with the next one.
type moment struct {
	uplinks []webui.UplinkStatus
	tunnel  webui.TunnelStatus
	reached string // the concentrator's address, while sessions reach it
	// kernel is what the kernel does not take or do, and what others have changed.
	kernel []string
}

// happened tells what has happened between two moments. The reason of a state is
// told with it, but a new reason of the same state is no event: many hold numbers
// that change all the time.
func happened(before, now moment) (list []webui.Event) {
	add := func(kind, uplink, text string) {
		list = append(list, webui.Event{Kind: kind, Uplink: uplink, Text: text})
	}
	because := func(what, reason string) string {
		if reason == "" {
			return what
		}
		return what + ": " + reason
	}
	was := func(name string) (webui.UplinkStatus, bool) {
		i := slices.IndexFunc(before.uplinks, func(u webui.UplinkStatus) bool { return u.Name == name })
		if i < 0 {
			return webui.UplinkStatus{}, false
		}
		return before.uplinks[i], true
	}
	for _, u := range now.uplinks {
		old, known := was(u.Name)
		if u.State != old.State {
			add("uplink", u.Name, because(u.State, u.Reason))
		}
		if known && old.Address != "" && u.Address != "" && u.Address != old.Address {
			add("uplink", u.Name, fmt.Sprintf("its address is %s, was %s", u.Address, old.Address))
		}
		switch {
		case u.PlainTCP && !old.PlainTCP:
			add("uplink", u.Name, "plain TCP: something on its path strips MPTCP")
		case !u.PlainTCP && old.PlainTCP:
			add("uplink", u.Name, "no longer plain TCP")
		}
		switch {
		case u.Leg != "" && old.Leg == "":
			add("uplink", u.Name, because("its subflows go through a leg over "+u.Leg, u.LegReason))
		case u.Leg == "" && old.Leg != "":
			add("uplink", u.Name, because("no longer through a leg over "+old.Leg, u.LegReason))
		}
	}
	for _, old := range before.uplinks {
		if !slices.ContainsFunc(now.uplinks, func(u webui.UplinkStatus) bool { return u.Name == old.Name }) {
			add("uplink", old.Name, "no longer in the settings")
		}
	}
	switch {
	case now.reached != "" && before.reached == "":
		add("concentrator", "", "reached at "+now.reached)
	case now.reached == "" && before.reached != "":
		add("concentrator", "", because("lost", now.tunnel.Reason))
	}
	if now.tunnel.State != before.tunnel.State {
		add("tunnel", "", because(now.tunnel.State, now.tunnel.Reason))
	}
	for _, line := range now.kernel {
		if !slices.Contains(before.kernel, line) {
			add("kernel", "", line)
		}
	}
	for _, line := range before.kernel {
		if !slices.Contains(now.kernel, line) {
			add("kernel", "", "no longer: "+line)
		}
	}
	return list
}

// watch measures, and notices what happens, until ctx ends.
func (r *Router) watch(ctx context.Context) {
	defer r.events.close()
	tick := time.NewTicker(measureEvery)
	defer tick.Stop()
	var before moment
	for {
		measuring := false
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			measuring = true
		case <-r.events.look:
			if before.tunnel.State == "" {
				continue // that nothing is up yet at the start is no news
			}
			sleep(ctx, settling)
		}
		statuses, err := r.observe()
		if err != nil || ctx.Err() != nil {
			continue
		}
		pool := r.pool.Status()
		r.names.learn(statuses)
		if measuring {
			r.meter.measure(time.Now(), statuses, pool.Subflows)
		}
		r.mu.Lock()
		revision, pass := r.revision, r.lastPass
		r.mu.Unlock()
		if measuring && r.demote(time.Now(), revision.Settings, r.silence.apply(revision.Settings, statuses)) {
			r.loop.Poke()
		}
		now := moment{kernel: slices.Clone(pass.Problems)}
		single := oneUplink(revision.Settings.Multipath, r.mptcp)
		now.uplinks = describeUplinks(revision.Settings, r.silence.apply(revision.Settings, statuses), pool, nil, r.meter.losses(), single)
		if measuring {
			r.remember(now.uplinks)
		}
		r.filling.describe(now.uplinks)
		now.tunnel = describeTunnel(revision.Settings, now.uplinks, pool, single)
		now.tunnel.Reason = strings.TrimPrefix(strings.TrimPrefix(now.tunnel.Reason, tunnel.ErrDown.Error()), ": ")
		if pool.Up {
			now.reached = pool.Address
		}
		if pass.Err != nil {
			now.kernel = append(now.kernel, "the kernel does not take all of the settings; the log says why")
		}
		r.events.add(time.Now(), happened(before, now)...)
		before = now
	}
}
