package router

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

// The path of scheduler firstfit where a kernel does not have it, and of what is
// done about uplinks that do harm:
//
//	counters of interfaces, round trips ─┬▶ keepFilling ─▶ uplink.Filling ─▶ held ───┐
//	of carriers                          └▶ watch ─▶ uplink.Demotion ─▶ demoted ─────┤
//	kernel, packets ◀─ effective settings, in which these are backups ◀──────────────┘
//
// Sessions are dialled from the most preferred uplinks at all times: with empty
// queues the kernel's scheduler takes the first subflow.

const firstfit = "firstfit"

// filling knows which uplinks are held back.
type filling struct {
	mu      sync.Mutex
	held    []string
	demoted map[string]string // why, by uplink

	// Only the goroutine that looks uses these.
	decides uplink.Filling
	looked  time.Time
	bytes   map[string][2]uint64 // received, sent

	harm uplink.Demotion // only the goroutine that measures uses it
}

// approximated says whether firstfit is to be approximated: backup flags hold for
// what both ends send, so they help where one kernel does not have it. far is what
// the concentrator runs, empty while that is not known.
func approximated(m settings.Multipath, mptcp string, offered []string, far string) bool {
	return m.Scheduler == firstfit && m.Enabled && m.PathManager != settings.PathManagerNetlink && mptcp != kernel.NoMPTCP &&
		(!slices.Contains(offered, firstfit) || far != "" && far != firstfit)
}

func (r *Router) approximates(m settings.Multipath) bool {
	return approximated(m, r.mptcp, r.schedulers, r.packets.farMultipath().Scheduler)
}

// set notes a decision, and says whether it is a new one.
func (f *filling) set(held []string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed := !slices.Equal(f.held, held)
	f.held = held
	return changed
}

// effective are the settings as they are carried out, and those by which sessions
// are dialled.
func (r *Router) effective(s settings.Settings, statuses []uplink.Status) (now, dialled settings.Settings) {
	r.filling.mu.Lock()
	defer r.filling.mu.Unlock()
	if s.Multipath.PathManager == settings.PathManagerFullmesh && r.meshes() {
		s.Multipath.PathManager = settings.PathManagerMesh
	}
	if len(r.filling.demoted) > 0 {
		s = backups(s, slices.Collect(maps.Keys(r.filling.demoted)))
	}
	if !r.approximates(s.Multipath) {
		return s, s
	}
	if !slices.Contains(r.schedulers, firstfit) {
		s.Multipath.Scheduler = "default"
	}
	return backups(s, r.filling.held), backups(s, later(s, statuses))
}

// demote looks for uplinks that do harm, and says whether the decision is a new one.
// Where one uplink carries at a time, or another program decides, there is none.
func (r *Router) demote(now time.Time, s settings.Settings, statuses []uplink.Status) bool {
	var demoted map[string]string
	manager := s.Multipath.PathManager
	if s.Multipath.Enabled && r.mptcp != kernel.NoMPTCP && !manager.OneUplink() && manager != settings.PathManagerNetlink {
		trips := r.roundTrips()
		r.meter.mu.Lock()
		rates := r.meter.rates
		r.meter.mu.Unlock()
		var loads []uplink.Load
		for _, u := range usable(s, statuses) {
			rate, t := rates[u.Name], trips[u.Name]
			loads = append(loads, uplink.Load{Name: u.Name, Received: float64(rate[0]) / 8, Sent: float64(rate[1]) / 8,
				RTT: t.rtt, MinRTT: t.least, Loss: t.loss})
		}
		demoted = r.filling.harm.Look(now, r.filling.inUse(loads))
	}
	r.filling.mu.Lock()
	defer r.filling.mu.Unlock()
	changed := !maps.Equal(demoted, r.filling.demoted)
	r.filling.demoted = demoted
	return changed
}

// inUse leaves out what is held back.
func (f *filling) inUse(loads []uplink.Load) []uplink.Load {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(loads, func(l uplink.Load) bool { return slices.Contains(f.held, l.Name) })
}

// backups are the settings with these uplinks as backups.
func backups(s settings.Settings, names []string) settings.Settings {
	s.Uplinks = slices.Clone(s.Uplinks)
	for i := range s.Uplinks {
		if u := &s.Uplinks[i]; u.Mode == settings.On && slices.Contains(names, u.Name) {
			u.Mode = settings.Backup
		}
	}
	return s
}

// usable lists the uplinks that are on and fit.
func usable(s settings.Settings, statuses []uplink.Status) (list []settings.Uplink) {
	for _, u := range s.Uplinks {
		fit := slices.ContainsFunc(statuses, func(status uplink.Status) bool { return status.Name == u.Name && status.Fit })
		if fit && u.Mode == settings.On {
			list = append(list, u)
		}
	}
	return list
}

// later names the uplinks to which others are preferred.
func later(s settings.Settings, statuses []uplink.Status) (names []string) {
	list := usable(s, statuses)
	for _, u := range list {
		if slices.ContainsFunc(list, func(o settings.Uplink) bool { return o.Preference < u.Preference }) {
			names = append(names, u.Name)
		}
	}
	return names
}

// keepFilling decides which uplinks are held back until ctx ends.
func (r *Router) keepFilling(ctx context.Context) {
	tick := time.NewTicker(uplink.FillEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if r.fill(time.Now()) {
			r.loop.Poke()
			r.events.soon()
		}
	}
}

// fill looks once, and says whether the decision is a new one.
func (r *Router) fill(now time.Time) bool {
	set, f := r.current().Settings, &r.filling
	if !r.approximates(set.Multipath) {
		f.decides, f.bytes = uplink.Filling{}, nil
		return f.set(nil)
	}
	statuses, err := r.observe()
	if err != nil {
		return false // the loop says so
	}
	statuses = r.silence.apply(set, statuses)
	f.mu.Lock()
	set = backups(set, slices.Collect(maps.Keys(f.demoted)))
	f.mu.Unlock()
	return f.set(f.decides.Look(now, f.loads(now, usable(set, statuses), statuses, r.roundTrips())))
}

// loads are what the uplinks have carried since the last time.
func (f *filling) loads(now time.Time, usable []settings.Uplink, statuses []uplink.Status, trips map[string]trip) (list []uplink.Load) {
	elapsed, before := now.Sub(f.looked).Seconds(), f.bytes
	f.looked, f.bytes = now, map[string][2]uint64{}
	for _, u := range usable {
		l := uplink.Load{Name: u.Name, Preference: u.Preference, RTT: trips[u.Name].rtt, MinRTT: trips[u.Name].least}
		at := slices.IndexFunc(statuses, func(s uplink.Status) bool { return s.Name == u.Name })
		bytes := [2]uint64{statuses[at].ReceivedBytes, statuses[at].SentBytes}
		// Else it is the first look, or the interface was made anew.
		if last, ok := before[u.Name]; ok && elapsed > 0 && bytes[0] >= last[0] && bytes[1] >= last[1] {
			l.Received, l.Sent = float64(bytes[0]-last[0])/elapsed, float64(bytes[1]-last[1])/elapsed
		}
		f.bytes[u.Name] = bytes
		list = append(list, l)
	}
	return list
}

// trip is the round-trip time of what travels now, and the least lately.
type trip struct {
	rtt, least time.Duration
	loss       float64
}

// roundTrips are those over each uplink, of its carrier of packets, whose probes
// wait in the queues that flows fill; or of the subflow on which bytes wait longest,
// where no UDP passes.
func (r *Router) roundTrips() map[string]trip {
	trips := map[string]trip{}
	for _, l := range r.packets.bond.Stats().Links {
		if l.Name != "" && l.Fit {
			trips[l.Name] = trip{l.StandingRTT, l.MinRTT, l.Loss}
		}
	}
	r.mu.Lock()
	statuses := r.uplinks
	r.mu.Unlock()
	if !slices.ContainsFunc(statuses, func(s uplink.Status) bool { _, ok := trips[s.Name]; return s.Fit && !ok }) {
		return trips
	}
	slowest := map[string]trip{}
	for _, f := range r.pool.Status().Subflows {
		if i := uplink.Of(statuses, f.Local); i >= 0 {
			if name := statuses[i].Name; f.RTT-f.MinRTT >= slowest[name].rtt-slowest[name].least {
				slowest[name] = trip{rtt: f.RTT, least: f.MinRTT}
			}
		}
	}
	maps.Copy(slowest, trips)
	return slowest
}

// describe says of uplinks that are held back or demoted why they stand by.
func (f *filling) describe(uplinks []webui.UplinkStatus) {
	f.mu.Lock()
	defer f.mu.Unlock()
	carries := func(u webui.UplinkStatus) bool {
		return u.State == "carrying" && u.Mode == string(settings.On) && !slices.Contains(f.held, u.Name) && f.demoted[u.Name] == ""
	}
	if !slices.ContainsFunc(uplinks, carries) {
		return
	}
	for i := range uplinks {
		switch u := &uplinks[i]; {
		case u.State != "carrying":
		case f.demoted[u.Name] != "":
			u.State, u.Reason = "standby", f.demoted[u.Name]
		case slices.Contains(f.held, u.Name):
			u.State, u.Reason = "standby", "firstfit: the uplinks preferred to it are not full"
		}
	}
}

// note says what the kernels do instead of firstfit, if they do not do that.
func (r *Router) note(s settings.Settings) string {
	if !r.approximates(s.Multipath) {
		return ""
	}
	note := "firstfit approximated by backup flags"
	if slices.Contains(r.schedulers, firstfit) {
		note = "approximated by backup flags where the concentrator sends"
	}
	preferences := map[int]bool{}
	for _, u := range s.Uplinks {
		if u.Mode == settings.On {
			preferences[u.Preference] = true
		}
	}
	if len(preferences) == 1 {
		note += "; all uplinks have the same preference"
	}
	return note
}
