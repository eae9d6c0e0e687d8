// Package router joins the data path and the control path on the device.
//
//	data     LAN client's TCP ─▶ intercept.Listener ─▶ carry ─▶ tunnel.Pool ─▶ Session.Relay
//	                                                       └─▶ direct, while the tunnel is down
//	         other LAN packets ─▶ TUN ─▶ packets ─▶ bond.Bond ─▶ tunnel's QUIC connections and sessions
//	         what an uplink strips MPTCP from ─▶ legs: TUN ─▶ leg.End ─▶ UDP of its own
//	         client of a forward ─▶ concentrator ─▶ tunnel.Inbound ─▶ connect ─▶ LAN host
//	control  sheafctl ─▶ webui ─▶ Apply ─▶ settings ─┐
//	         netlink event ───────────────▶ reconcile.Loop ─▶ want ─▶ kernel
//	                                                          └─▶ tunnel.Pool, packets (paths)
package router

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/kernel"
	"sheaf/daemon/control/reconcile"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/intercept"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/daemon/datapath/uplink"
	"sheaf/webui"
)

const (
	// clientPatience is how long a LAN connection waits for the tunnel before
	// it is reset.
	clientPatience = 30 * time.Second
	// syncTime bounds how long Apply waits for the kernel to follow.
	syncTime = 10 * time.Second
	// joinTime bounds one attempt to enrol.
	joinTime = 12 * time.Second
	// cleanTime bounds the removal of our rules at the end.
	cleanTime = 5 * time.Second

	joinRetryMin = time.Second
	joinRetryMax = 5 * time.Second
)

// Config is what the command line says.
type Config struct {
	StateDir string
	Settings []byte // the text of --settings, or nil
	Socket   string
	Version  string
	// Admin is where the panel is served, HOST:PORT, or :PORT for the LAN's interfaces;
	// empty for nowhere.
	Admin string
	Log   *slog.Logger
}

// Router is a running daemon. It satisfies webui.Router.
type Router struct {
	config Config
	log    *slog.Logger
	state  *state
	kernel *kernel.Kernel
	loop   *reconcile.Loop
	panel  *webui.Panel // nil without one
	pool   *tunnel.Pool
	meter  meter

	// Which MPTCP the kernel has, the schedulers it lists, and whether it lets us
	// manage paths, as kernel.Info says; they do not change.
	mptcp      string
	schedulers []string
	userspace  bool
	// mesh are the concentrator's ends that path manager fullmesh leads to, where the
	// daemon opens its subflows; never nil, and empty where the kernel does.
	mesh atomic.Pointer[[]netip.AddrPort]

	packets  *packets
	inbound  *tunnel.Inbound
	silence  *silence
	filling  filling
	subflows *subflows
	legs     *legs
	asking   sync.WaitGroup

	changing sync.Mutex // orders changes of settings and enrolment
	joined   chan struct{}
	tried    chan struct{} // settings are to be confirmed, or have been

	mu       sync.Mutex
	revision settings.Revision // in force
	uplinks  []uplink.Status   // as last observed
	enrolled *enrolment
	lastPass reconcile.Pass

	connections, flows atomic.Int64
	direct             directFlows
	names              names
	events             *events
	history            *history

	handed atomic.Int64 // how often endpoints were left to another program
}

// Run serves until ctx ends, and then removes what it put into the kernel.
func Run(ctx context.Context, c Config) (err error) {
	st, err := openState(c.StateDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.db.Close()) }()
	socket, err := webui.ListenUnix(c.Socket)
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()

	r := &Router{config: c, log: c.Log, state: st, pool: tunnel.NewPool(c.Log), joined: make(chan struct{}, 1), tried: make(chan struct{}, 1), silence: newSilence(),
		events: newEvents(time.Now()), history: newHistory(st.db, time.Now())}
	defer r.asking.Wait()
	r.inbound = tunnel.NewInbound(r.pool, r.connect, c.Log)
	r.packets = newPackets(c.Log)
	r.subflows = newSubflows(c.Log)
	r.legs = newLegs(c.Log, r.pool, r.packets)
	r.packets.reach, r.packets.calm = r.pool.SetReachable, r.pool.SetCalm
	if r.revision, err = st.settings.Current(); err != nil {
		return err
	}
	e, err := st.enrolment()
	if err != nil {
		return err
	}
	r.enrol(e)
	if c.Settings != nil {
		if err := r.applyFile(); err != nil {
			return err
		}
	}
	r.keepCopy()
	if r.kernel, err = kernel.New(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.kernel.Close()) }()
	r.kernel.Before = st.addSysctls
	r.subflows.kernel, r.subflows.wish = r.kernel, r.ways
	r.loop = &reconcile.Loop{Kernel: r.kernel, Want: r.want, Report: r.reconciled, Log: c.Log}
	r.packets.changed, r.legs.changed = r.loop.Poke, r.loop.Poke

	access, err := webui.OpenAccess(st.db, time.Now)
	if err != nil {
		return err
	}
	if c.Admin != "" {
		if r.panel, err = webui.NewPanel(c.Admin, webui.NewPanelHandler(r, access, c.Log), access, c.Log); err != nil {
			return err
		}
		r.panel.Listen(r.revision.Settings.LAN.Interfaces)
	}
	listener, err := intercept.Listen(ctx, desired.InterceptPort, c.Log)
	if err != nil {
		return err
	}
	info, err := r.kernel.Info()
	if err != nil {
		return err
	}
	r.mptcp, r.schedulers = info.MPTCP, info.Schedulers
	_, r.userspace = info.Userspace()
	r.setPeer()
	r.setWishes()
	r.events.add(time.Now(), webui.Event{Kind: "daemon", Text: fmt.Sprintf("sheafd %s has started with settings revision %d", c.Version, r.revision.Number)})

	work, ctx := errgroup.WithContext(ctx)
	r.packets.supervised = func() { r.supervise(ctx) }
	work.Go(func() error {
		if err := r.loop.Run(ctx); !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
	work.Go(func() error { r.pool.Run(ctx); return nil })
	work.Go(func() error { r.packets.run(ctx); return nil })
	work.Go(func() error { r.inbound.Run(ctx); return nil })
	work.Go(func() error { r.subflows.run(ctx); return nil })
	work.Go(func() error { r.keepLegs(ctx); return nil })
	work.Go(func() error { r.watchFlows(ctx); return nil })
	work.Go(func() error { r.keepFilling(ctx); return nil })
	work.Go(func() error { r.watch(ctx); return nil })
	work.Go(func() error { return r.keepJoining(ctx) })
	work.Go(func() error { return r.keepConfirming(ctx) })
	work.Go(func() error { return webui.Serve(ctx, socket, webui.NewRouterHandler(r, access, c.Log)) })
	if r.panel != nil {
		work.Go(func() error { return r.panel.Run(ctx) })
	}
	work.Go(func() error {
		listener.Serve(func(client *net.TCPConn, destination netip.AddrPort) { r.carry(ctx, client, destination) })
		return nil
	})
	work.Go(func() error {
		<-ctx.Done()
		listener.Close()
		return nil
	})
	c.Log.Info("router ready", "revision", r.revision.Number, "socket", c.Socket, "kernel", info.Release, "mptcp", info.MPTCP)
	err = errors.Join(work.Wait(), r.history.end(time.Now()))

	cleaning, cancel := context.WithTimeout(context.Background(), cleanTime)
	defer cancel()
	if cleanErr := r.clean(cleaning); cleanErr != nil {
		err = errors.Join(err, fmt.Errorf("removing our rules from the kernel: %w", cleanErr))
	}
	return err
}

// clean takes our rules away, but for what keeps blocked clients blocked.
func (r *Router) clean(ctx context.Context) error {
	s, _ := r.effective(r.current().Settings, nil)
	lan, err := uplink.Observe(s.LAN.Interfaces)
	if err != nil {
		return err
	}
	return restore(ctx, r.kernel, r.state, desired.Barrier(s, uplink.Networks(lan)))
}

// restore leaves of us what is wanted to stay, and the sysctls as they were.
func restore(ctx context.Context, k *kernel.Kernel, st *state, stay desired.State) error {
	k.Before = nil
	before, err := st.sysctls()
	if err != nil {
		return err
	}
	// Forwarding ends before the rules do.
	if err := errors.Join(k.Restore(ctx, before), k.CleanTo(ctx, stay)); err != nil {
		return err
	}
	return st.forgetSysctls()
}

// Cleanup takes away all that a router's daemon has put into the kernel, also
// what stays after a clean stop with when_tunnel_down block.
func Cleanup(ctx context.Context, stateDir string) error {
	st, err := openState(stateDir) // fails while a daemon runs
	if err != nil {
		return err
	}
	defer func() { _ = st.db.Close() }()
	k, err := kernel.New()
	if err != nil {
		return err
	}
	return errors.Join(restore(ctx, k, st, desired.State{}), k.Close())
}

// want says what the kernel should hold now. The loop calls it at every wake-up.
func (r *Router) want() (desired.State, error) {
	statuses, err := r.observe()
	if err != nil {
		return desired.State{}, err
	}
	lan, err := uplink.Observe(r.current().Settings.LAN.Interfaces)
	if err != nil {
		return desired.State{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.uplinks = statuses
	tunnel := r.packets.state()
	tunnel.Flows = r.flows.Load() > 0 || r.inbound.Busy()
	judged, set, _ := r.judge(r.revision.Settings, statuses)
	return desired.Compile(set, judged, uplink.Networks(lan), tunnel), nil
}

// reconciled follows every pass of the loop. Only now may sessions be dialled
// from an uplink that has come: before its rules were there, they would have
// left by another.
func (r *Router) reconciled(p reconcile.Pass) {
	r.mu.Lock()
	r.lastPass = p
	r.mu.Unlock()
	if len(p.Changes) > 0 {
		r.events.soon()
	}
	r.mu.Lock()
	set, statuses := r.revision.Settings, r.uplinks
	r.mu.Unlock()
	if set.Multipath.PathManager == settings.PathManagerNetlink && slices.ContainsFunc(p.Changes, func(c desired.Change) bool {
		_, is := c.(desired.DeleteEndpoint)
		return is
	}) {
		// The idle sessions have lost their subflows.
		r.handed.Add(1)
		r.setPeer()
	}
	judged, set, dialled := r.judge(set, statuses)
	r.pool.SetPaths(sessionPaths(dialled, judged))
	r.packets.setPaths(paths(set, statuses), sessionPaths(set, statuses))
	r.subflows.kick()
}

// judge gives the uplinks as the tunnel's own traffic finds them, and the effective
// settings by that.
func (r *Router) judge(set settings.Settings, statuses []uplink.Status) (judged []uplink.Status, now, dialled settings.Settings) {
	judged = r.silence.apply(set, statuses)
	now, dialled = r.effective(set, judged)
	return judged, now, dialled
}

// ways are those that subflows may take now, and what the settings want of them.
func (r *Router) ways() (settings.Multipath, []desired.Way) {
	r.mu.Lock()
	set, statuses := r.revision.Settings, r.uplinks
	r.mu.Unlock()
	judged, set, _ := r.judge(set, statuses)
	ways := desired.Ways(set, judged, r.pool.Ranking())
	if set.Multipath.PathManager == settings.PathManagerMesh {
		ways = desired.Mesh(ways, *r.mesh.Load())
	}
	return set.Multipath, ways
}

// paths are the uplinks that may carry now.
func (r *Router) paths() []tunnel.Path {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, set := r.effective(r.revision.Settings, r.uplinks)
	return paths(set, r.uplinks)
}

func (r *Router) observe() ([]uplink.Status, error) {
	s := r.current().Settings
	var names []string
	var wanted []uplink.Want
	for _, u := range s.Uplinks {
		names = append(names, u.Interface)
		wanted = append(wanted, uplink.Want{Name: u.Name, Interface: u.Interface, Gateway: u.Address.Gateway, Source: u.Address.Source})
	}
	seen, err := uplink.Observe(names)
	if err != nil {
		return nil, err
	}
	statuses := uplink.Judge(seen, wanted)
	r.legs.apply(statuses)
	return statuses, nil
}

func (r *Router) current() settings.Revision {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.revision
}

// paths are the uplinks that may be dialled from, by their own addresses: fit ones
// that are not off.
func paths(s settings.Settings, statuses []uplink.Status) []tunnel.Path {
	var list []tunnel.Path
	for _, status := range statuses {
		mode := modeOf(s, status.Name)
		if !status.Fit || mode == settings.Off {
			continue
		}
		p := tunnel.Path{Name: status.Name, Ports: tunnel.Ports(status.Ports), Backup: mode == settings.Backup}
		for _, source := range status.Sources {
			p.Sources = append(p.Sources, source.Addr())
		}
		p.Others = status.Leg.Addresses
		list = append(list, p)
	}
	return list
}

// sessionPaths are the same as MPTCP sessions are dialled from: by the leg where one
// is up.
func sessionPaths(s settings.Settings, statuses []uplink.Status) []tunnel.Path {
	list := paths(s, statuses)
	for i, p := range list {
		at := slices.IndexFunc(statuses, func(u uplink.Status) bool { return u.Name == p.Name })
		if statuses[at].Leg.Up {
			list[i].Sources, list[i].Others, list[i].Ports = p.Others, p.Sources, tunnel.Ports{}
		}
	}
	return list
}

func modeOf(s settings.Settings, name string) settings.Mode {
	for _, u := range s.Uplinks {
		if u.Name == name {
			return u.Mode
		}
	}
	return settings.Off
}

// setPeer tells the pool whom to dial.
func (r *Router) setPeer() {
	r.mu.Lock()
	e, s := r.enrolled, r.revision.Settings
	r.mu.Unlock()
	s, _ = r.effective(s, nil)
	var peer *tunnel.Peer
	if e != nil {
		variant := s.Multipath
		variant.CongestionControl = "" // live sessions follow it
		multipath := s.Multipath.Enabled && r.mptcp != kernel.NoMPTCP
		peer = &tunnel.Peer{
			Identity: r.state.identity, Concentrator: e.Key, Addresses: e.Addresses,
			Multipath: multipath, Joins: multipath && s.Multipath.PathManager == settings.PathManagerFullmesh,
			Variant: fmt.Sprint(variant, r.handed.Load()), Software: "sheafd " + r.config.Version,
		}
		if multipath && r.mptcp == kernel.Upstream { // v0.9x has all path managers itself
			peer.Managed, peer.ManagesPaths = r.subflows.sessions, s.Multipath.PathManager.Userspace()
		}
	}
	r.pool.SetPeer(peer)
	r.packets.setPeer(peer)
}

// setWishes tells the packet path what the settings say of it.
func (r *Router) setWishes() {
	s := r.current().Settings
	r.packets.setWishes(s.Forwards, s.Multipath, ranks(s))
	r.pool.SetCongestionControl(string(s.Multipath.CongestionControl))
	r.pool.SetScheduler(s.Multipath.Scheduler)
	r.pool.SetRanks(ranks(s))
	r.packets.bond.SetRules(rules(s.Classes))
	inbound := 0
	for _, f := range s.Forwards {
		if f.Protocol == settings.ProtocolTCP {
			inbound++
		}
	}
	r.inbound.SetForwards(inbound)
}

// ranks are what the scheduler asks of each uplink's subflows, if it asks.
func ranks(s settings.Settings) map[string]tunnel.Rank {
	if s.Multipath.Scheduler != "weighted" && s.Multipath.Scheduler != firstfit {
		return nil
	}
	list := map[string]tunnel.Rank{}
	for _, u := range s.Uplinks {
		// In the kernel 0 stands for none.
		list[u.Name] = tunnel.Rank{Weight: uint16(max(1, u.Weight)), Preference: uint16(u.Preference) + 1}
	}
	return list
}

// Join enrols with the concentrator that made the token.
func (r *Router) Join(ctx context.Context, token string) (webui.Joined, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	e, err := r.join(ctx, token)
	if err != nil {
		return webui.Joined{}, err
	}
	host, _, _ := net.SplitHostPort(e.Addresses[0])
	return webui.Joined{Concentrator: host, Address: e.Addresses[0], Fingerprint: e.Key.Fingerprint()}, nil
}

func digest(token string) []byte {
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// used says whether the token is the one that the router has joined with.
func (r *Router) used(token string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.enrolled != nil && slices.Equal(r.enrolled.Token, digest(token))
}

// join presents the token over each fit uplink until one reaches the
// concentrator.
func (r *Router) join(ctx context.Context, text string) (enrolment, error) {
	token, err := tunnel.ParseToken(text)
	if err != nil {
		return enrolment{}, &webui.Error{Code: webui.CodeTokenAltered, Detail: err.Error()}
	}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	if err := tunnel.Enrol(ctx, r.state.identity, token, r.paths(), "sheafd "+r.config.Version); err != nil {
		if refusal := refusalOf(err); refusal != nil {
			return enrolment{}, refusal
		}
		return enrolment{}, &webui.Error{Code: webui.CodeConcentratorUnreachable, Detail: "the concentrator was not reached: " + err.Error()}
	}
	e := enrolment{Router: token.Name, Key: token.Concentrator, Addresses: token.Addresses, Joined: time.Now().UTC(), Token: digest(text)}
	if err := r.state.setEnrolment(e); err != nil {
		return enrolment{}, err
	}
	r.keepCopy()
	r.enrol(&e)
	ctx, cancel = context.WithTimeout(ctx, syncTime)
	defer cancel()
	_ = r.loop.Sync(ctx) // what fails is logged there
	// After the kernel, as in put.
	r.setPeer()
	r.events.add(time.Now(), webui.Event{Kind: "concentrator", Text: "joined as " + e.Router + ", key " + e.Key.Fingerprint()})
	r.log.Info("joined", "as", e.Router, "concentrator", e.Addresses, "key", e.Key.Fingerprint())
	return e, nil
}

// enrol makes the concentrator the router's, nil for none.
func (r *Router) enrol(e *enrolment) {
	var mesh []netip.AddrPort
	if e != nil {
		mesh = meshOf(e.Addresses)
	}
	r.mesh.Store(&mesh)
	r.mu.Lock()
	r.enrolled = e
	r.mu.Unlock()
}

// refusalOf returns the API's error for a token that will never do, or nil.
func refusalOf(err error) error {
	var mismatch *tunnel.KeyMismatchError
	if errors.As(err, &mismatch) {
		return &webui.Error{Code: webui.CodeTokenAltered, Detail: err.Error()}
	}
	var refused *tunnel.RefusedError
	if !errors.As(err, &refused) {
		return nil
	}
	code := webui.CodeTokenAltered
	switch refused.Code {
	case tunnel.CodeTokenUsed:
		code = webui.CodeTokenUsed
	case tunnel.CodeTokenExpired:
		code = webui.CodeTokenExpired
	case tunnel.CodeVersion, tunnel.CodeInternal:
		code = webui.CodeConcentratorUnreachable
	}
	return &webui.Error{Code: code, Detail: refused.Message}
}

// kick wakes who waits on a channel of one, or will.
func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// keepJoining uses a token that could not be used when it was given.
func (r *Router) keepJoining(ctx context.Context) error {
	wait := joinRetryMin
	for {
		token, err := r.state.pending()
		if err != nil {
			return err
		}
		if token == "" {
			select {
			case <-ctx.Done():
				return nil
			case <-r.joined:
				wait = joinRetryMin
			}
			continue
		}
		r.changing.Lock()
		_, err = r.join(ctx, token)
		r.changing.Unlock()
		if err == nil {
			continue
		}
		var refusal *webui.Error
		if errors.As(err, &refusal) && refusal.Code != webui.CodeConcentratorUnreachable {
			r.log.Error("the token in the settings is of no use", "error", err)
			if err := r.state.setPending(""); err != nil {
				return err
			}
			continue
		}
		r.log.Warn("joining failed; trying again", "error", err, "in", wait)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		case <-r.joined:
		}
		wait = min(2*wait, joinRetryMax)
	}
}
