package router

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/leg"
	"sheaf/daemon/datapath/tun"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/daemon/datapath/uplink"
)

// The path of a leg, for an uplink over which nothing joins:
//
//	Pool.Joined ─▶ Peer.Passes ─▶ uplink.Stripping ─▶ wish ─▶ answer ─▶ leg.End ─▶ does it answer?
//	─▶ uplink.Status.Leg ─▶ desired: TUN, rule, route ─▶ its endpoint instead of the uplink's
//	                    └─▶ Pool: dialled from there
//
// Nothing of it is stored: after a restart it is found out again.

const (
	legsEvery = 500 * time.Millisecond
	// tryTime bounds one connection that shows whether MPTCP passes.
	tryTime = 3 * time.Second
	// udpGone is how long no packets may have come over the uplink's QUIC connection
	// until it counts as one that lets no UDP through.
	udpGone = 5 * time.Second
	// legAnswers is how long a leg may stay without an answer before it is made anew,
	// to another of the concentrator's addresses.
	legAnswers = 15 * time.Second
	// legEnds is from when a leg is no longer used to its end, so that its endpoint
	// goes before its TUN.
	legEnds = 2 * time.Second
	// legOverhead is, in bytes, what goes around a packet: 40 of IPv6, 8 of UDP, 32 of
	// WireGuard.
	legOverhead = 40 + 8 + 32
	// leastMTU is IPv6's (RFC 8200 section 5), in bytes.
	leastMTU = 1280
)

const stripped = "a middlebox on this uplink removes MPTCP options"

// legs are the router's.
type legs struct {
	log     *slog.Logger
	pool    *tunnel.Pool
	packets *packets
	changed func() // what is wanted of the kernel has changed

	mu      sync.Mutex
	uplinks map[string]*uplinkLeg
}

// uplinkLeg is what is known of one uplink, and its leg.
type uplinkLeg struct {
	path      tunnel.Path // of the uplink itself
	stripping uplink.Stripping
	trying    bool // MPTCP, at the moment
	opening   bool
	private   leg.Private
	carried   time.Time // when UDP was last seen to pass

	end    *leg.End // nil while there is none
	answer tunnel.LegAnswer
	device uplink.Leg
	since  time.Time // that it is up, or not, or could not be made
	failed string    // why it could not be made, as logged
	tries  int
}

func newLegs(log *slog.Logger, pool *tunnel.Pool, p *packets) *legs {
	return &legs{log: log, pool: pool, packets: p, uplinks: map[string]*uplinkLeg{}}
}

// place is where an uplink's leg goes in, and the interface that it leaves by.
type place struct{ device, uplink string }

// keepLegs serves until ctx ends.
func (r *Router) keepLegs(ctx context.Context) {
	tick := time.NewTicker(legsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			r.legs.keep(nil)
			return
		case <-tick.C:
		}
		places := map[string]place{}
		// Of the others, paths by default and ndiffports are one uplink's, netlink's are
		// not ours, and v0.9x makes them itself.
		s := r.current().Settings
		manager := s.Multipath.PathManager
		if s.Multipath.Enabled && r.mptcp == kernel.Upstream && (manager == settings.PathManagerFullmesh || manager == settings.PathManagerBinder) {
			for i, u := range s.Uplinks {
				if u.Mode != settings.Off {
					places[u.Name] = place{desired.LegName(i), u.Interface}
				}
			}
		}
		r.legs.keep(places)
		r.legs.look(ctx, time.Now(), places, &r.asking)
	}
}

// keep forgets the uplinks that are not, or no longer, in these places.
func (l *legs) keep(places map[string]place) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, u := range l.uplinks {
		place, wanted := places[name]
		if !wanted {
			u.close()
			delete(l.uplinks, name)
		} else if u.end != nil && u.device.Interface != place.device {
			u.close()
		}
	}
}

// look goes one step with every uplink that may carry.
func (l *legs) look(ctx context.Context, now time.Time, places map[string]place, trying *sync.WaitGroup) {
	peer, paths, answers := l.packets.legView()
	signs := l.packets.signs()
	changed := false
	var wishes []tunnel.Leg
	l.mu.Lock()
	for _, path := range paths {
		place, wanted := places[path.Name]
		if !wanted || peer == nil {
			continue
		}
		u := l.uplinks[path.Name]
		if u == nil || !u.path.SameSource(path) { // in another network nothing of it holds
			if u != nil {
				u.close()
			}
			u = &uplinkLeg{private: leg.NewPrivate()}
			l.uplinks[path.Name] = u
		}
		u.path = path
		if signs[path.Name].Carries {
			u.carried = now
		}
		if joined, sessions := l.pool.Joined(path.Sources); sessions && !u.trying && u.stripping.Due(now, joined) {
			u.trying = true
			trying.Go(func() { l.try(ctx, peer, path, u) })
		}
		was := u.device
		if u.step(now, answers) && !u.opening {
			u.opening = true
			try := u.tries
			trying.Go(func() { l.open(ctx, peer, u, path, place, try) })
		}
		if u.device.Up != was.Up || u.device.Index != was.Index {
			changed = true
			l.log.Info("leg of an uplink", "uplink", path.Name, "interface", was.Interface, "up", u.device.Up)
		}
	}
	for name, u := range l.uplinks {
		if u.stripping.Strips() || u.end != nil {
			key := u.private.Public()
			wishes = append(wishes, tunnel.Leg{Uplink: name, Key: key[:]})
		}
	}
	l.mu.Unlock()
	slices.SortFunc(wishes, func(a, b tunnel.Leg) int { return strings.Compare(a.Uplink, b.Uplink) })
	l.packets.setLegs(wishes)
	if changed {
		l.changed()
	}
}

// try finds out whether MPTCP passes.
func (l *legs) try(ctx context.Context, peer *tunnel.Peer, path tunnel.Path, u *uplinkLeg) {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	passed, err := peer.Passes(ctx, path)
	l.mu.Lock()
	defer l.mu.Unlock()
	u.trying = false
	was := u.stripping.Strips()
	if err != nil {
		u.stripping.Failed(time.Now())
		return
	}
	u.stripping.Tried(time.Now(), passed)
	switch strips := u.stripping.Strips(); {
	case strips && !was:
		l.log.Warn("something on the uplink's path strips MPTCP", "uplink", path.Name)
	case was && !strips:
		l.log.Info("the uplink's path no longer strips MPTCP", "uplink", path.Name)
	}
}

// step keeps or ends the leg of one uplink, or says that one is to be made.
func (u *uplinkLeg) step(now time.Time, answers []tunnel.LegAnswer) (open bool) {
	key := u.private.Public()
	for _, a := range answers {
		if a.Uplink != u.path.Name || string(a.Key) != string(key[:]) {
			continue
		}
		if u.end != nil && !u.serves(a) {
			u.close()
		}
		u.answer = a
	}
	if u.end != nil {
		select {
		case <-u.end.Done(): // somebody has deleted its TUN
			u.close()
		default:
		}
	}
	udp := now.Sub(u.carried) < udpGone
	switch strips := u.stripping.Strips(); {
	case u.end == nil && strips && udp && len(u.answer.Far) == len(leg.Key{}):
		return now.Sub(u.since) > legEnds
	case u.end == nil:
	case !strips && !u.device.Up && now.Sub(u.since) > legEnds, !u.device.Up && now.Sub(u.since) > legAnswers:
		u.tries++
		u.close()
	default:
		if up := strips && udp && u.end.Fresh(now); up != u.device.Up {
			u.device.Up, u.since = up, now
		}
	}
	return false
}

// legMTU is what fits into one packet of an interface, as far as IPv6 lets us.
func legMTU(name string) int {
	outer, err := net.InterfaceByName(name)
	if err != nil {
		return leastMTU // it is gone at this moment
	}
	const padding = 16
	return min(max((outer.MTU-legOverhead)/padding*padding, leastMTU), desired.LegMTU)
}

// serves says whether the leg is as the concentrator's answer says.
func (u *uplinkLeg) serves(a tunnel.LegAnswer) bool {
	return string(a.Far) == string(u.answer.Far) && a.Address4 == u.answer.Address4 && a.Address6 == u.answer.Address6
}

// open makes a leg. Where the concentrator is may take a while to find out, and
// nobody waits for that.
func (l *legs) open(ctx context.Context, peer *tunnel.Peer, u *uplinkLeg, path tunnel.Path, at place, try int) {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	socket, remote, err := peer.ListenUDP(ctx, path, try)
	l.mu.Lock()
	defer l.mu.Unlock()
	u.opening = false
	switch {
	case err == nil && (l.uplinks[path.Name] != u || len(u.answer.Far) != len(leg.Key{})): // it is no longer wanted
		_ = socket.Close()
		return
	case err == nil:
		err = u.open(socket, remote, at, l.log)
	}
	if err != nil {
		u.since = time.Now()
		if u.failed != err.Error() {
			u.failed = err.Error()
			l.log.Warn("an uplink that strips MPTCP has no leg for now", "uplink", path.Name, "error", err)
		}
		return
	}
	u.failed = ""
	l.log.Info("an uplink that strips MPTCP has a leg", "uplink", path.Name, "interface", at.device, "to", remote)
	l.changed()
}

// open makes the TUN, and begins to ask; the socket is its own from here on.
func (u *uplinkLeg) open(socket *net.UDPConn, remote netip.AddrPort, at place, log *slog.Logger) error {
	device, index, err := tun.OpenWireGuard(at.device)
	if err != nil {
		_ = socket.Close()
		return err
	}
	end, err := leg.Open(u.private, device, log, socket)
	if err != nil {
		return err
	}
	err = end.SetPeer(leg.Peer{Key: leg.Key(u.answer.Far), Remote: remote, Addresses: []netip.Prefix{
		netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0),
	}})
	if err != nil {
		end.Close()
		return err
	}
	u.end, u.since = end, time.Now()
	u.device = uplink.Leg{Interface: at.device, Index: index, MTU: legMTU(at.uplink)}
	return nil
}

func (u *uplinkLeg) close() {
	if u.end != nil {
		u.end.Close()
	}
	u.end, u.device = nil, uplink.Leg{}
}

// apply adds their legs to the uplinks, with addresses of the families that they have.
func (l *legs) apply(statuses []uplink.Status) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range statuses {
		u := l.uplinks[statuses[i].Name]
		if u == nil {
			continue
		}
		device := u.device
		for _, a := range []netip.Addr{u.answer.Address4, u.answer.Address6} {
			if u.end != nil && a.IsValid() && slices.ContainsFunc(statuses[i].Sources, func(p netip.Prefix) bool { return p.Addr().Is4() == a.Is4() }) {
				device.Addresses = append(device.Addresses, a)
			}
		}
		device.Up = device.Up && len(device.Addresses) > 0
		if u.stripping.Strips() {
			device.Reason = u.reason(device.Up)
		}
		statuses[i].Leg = device
	}
}

// reason says why an uplink that strips MPTCP has a leg, or has none.
func (u *uplinkLeg) reason(up bool) string {
	switch {
	case up:
		return stripped
	case u.answer.Reason != "":
		return "MPTCP falls back to plain TCP; the concentrator makes no leg of UDP: " + u.answer.Reason
	case time.Since(u.carried) >= udpGone:
		return stripped + ", and UDP does not pass either"
	}
	return stripped + "; a leg of UDP is being made"
}
