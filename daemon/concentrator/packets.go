package concentrator

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/datapath/bond"
	"sheaf/daemon/datapath/egress"
	"sheaf/daemon/datapath/tun"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/webui"
)

// The path of a router's packet, and of the answer to it:
//
//	tunnel.Server ─ Attach ─▶ Bond.Receive ─▶ accept (source, destination) ─▶ TUN ─▶ kernel: masquerade ─▶ Internet
//	router ◀─ carriers ◀─ Bond.Send ◀─ fromInternet (by inner address) ◀─ TUN ◀─ kernel ◀───────────────────┘

const (
	tunQueues = 2
	// forgetAfter is how long a router without a carrier keeps its bond and its
	// forwards: it may only be changing uplinks.
	forgetAfter = 60 * time.Second
	timeEvery   = 250 * time.Millisecond
)

// packets is the packet half of the data path. It is a tunnel.PacketsHandler.
type packets struct {
	log      *slog.Logger
	store    *Store
	checker  *egress.Checker
	forwards *egress.Forwards
	legs     *legs
	calm     func(tunnel.PublicKey, bool)
	schedule func(tunnel.PublicKey, string) (runs, reason string)
	control  func(tunnel.PublicKey, string) (runs, reason string)
	rank     func(tunnel.PublicKey, map[string]tunnel.Rank)
	changed  func()         // what is wanted of the kernel has changed
	mutual   []netip.Prefix // what routers may reach of one another

	device   tun.Kept
	unrouted atomic.Uint64 // packets for routers that are not there

	ctx     context.Context // of run
	working sync.WaitGroup

	mu        sync.RWMutex
	closed    bool
	members   map[tunnel.PublicKey]*member
	byAddress map[netip.Addr]*member
}

// openInbound carries a connection to one of a router's TCP forwards, which are
// known by their port.
type openInbound func(ctx context.Context, key tunnel.PublicKey, port uint16, client *net.TCPConn) error

// member is one router that brings packets.
type member struct {
	key   tunnel.PublicKey
	name  string
	inner tunnel.Inner
	id    uint64 // of the router's start
	bond  *bond.Bond
	end   context.CancelFunc

	spoofed, forbidden atomic.Uint64

	// Guarded by packets.mu.
	carriers []tunnel.Messages
	stream   *bond.Link
	links    map[*bond.Link]string // of datagrams, by uplink
	backup   []string              // uplinks
	active   []tunnel.Port
	left     time.Time // when the last carrier went

	isCalm bool // of keepTime alone
}

func newPackets(log *slog.Logger, store *Store, policy egress.Policy, forwards egress.ForwardPolicy, open openInbound) *packets {
	p := &packets{
		log: log, store: store, checker: egress.NewChecker(policy), changed: func() {},
		members: map[tunnel.PublicKey]*member{}, byAddress: map[netip.Addr]*member{},
	}
	p.device = tun.Kept{Name: desired.ConcentratorTunnelName, Queues: tunQueues, Receive: p.fromInternet, Changed: func() { p.changed() }, Log: log}
	p.forwards = egress.NewForwards(forwards, func(ctx context.Context, router string, port uint16, client *net.TCPConn) {
		if err := open(ctx, tunnel.PublicKey([]byte(router)), port, client); err != nil {
			log.Debug("inbound connection ended early", "client", client.RemoteAddr(), "port", port, "error", err)
		}
	}, log)
	return p
}

// run serves until ctx ends.
func (p *packets) run(ctx context.Context) {
	p.mu.Lock()
	p.ctx = ctx
	p.mu.Unlock()
	p.working.Go(func() { p.device.Run(ctx) })
	p.working.Go(func() { p.keepTime(ctx) })
	<-ctx.Done()
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.forwards.Close()
	p.legs.close()
	p.working.Wait()
}

// fromInternet gives packets to the routers they are addressed to.
func (p *packets) fromInternet(_ int, list [][]byte) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for _, packet := range list {
		if m := p.byAddress[destinationOf(packet)]; m != nil {
			m.bond.Send(packet)
		} else {
			p.unrouted.Add(1)
		}
	}
}

// destinationOf is the destination in the fixed part of an IP header, or the
// zero Addr.
func destinationOf(packet []byte) netip.Addr {
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(packet[16:20]))
	case len(packet) >= 40 && packet[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(packet[24:40]))
	}
	return netip.Addr{}
}

// Inner gives a router its addresses.
func (p *packets) Inner(key tunnel.PublicKey, _ string) (tunnel.Inner, error) {
	address4, address6, err := p.store.InnerAddresses(key)
	if err != nil {
		return tunnel.Inner{}, err
	}
	return tunnel.Inner{
		Address4: address4, Address6: address6,
		Gateway4: Gateway4(), Gateway6: p.store.Gateway6(),
	}, nil
}

// Attach serves one carrier until it ends.
func (p *packets) Attach(key tunnel.PublicKey, name string, id uint64, link string, datagram bool, m tunnel.Messages) {
	inner, err := p.Inner(key, name)
	if err != nil {
		p.log.Error("a router's packets are refused", "router", name, "error", err)
		return
	}
	mb := p.enter(key, name, id, inner, m)
	if mb == nil {
		return
	}
	defer p.leave(mb, m)
	var l *bond.Link
	if datagram {
		l = p.datagramLink(mb, link, m)
		defer p.removeLink(mb, l)
	} else {
		l = p.streamLink(mb)
		l.AddCarrier(m)
		defer l.RemoveCarrier(m)
	}
	err = m.Receive(tunnel.Receiver{
		Message: func(message []byte) { mb.bond.Receive(l, message) },
		Control: func(body []byte) { p.wished(mb, m, body) },
	})
	p.log.Debug("carrier of packets ended", "router", name, "uplink", link, "datagram", datagram, "error", err)
}

// enter finds the router's bond, or makes one. A new start of the router
// replaces what is left of the last.
func (p *packets) enter(key tunnel.PublicKey, name string, id uint64, inner tunnel.Inner, carrier tunnel.Messages) *member {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.ctx == nil {
		return nil
	}
	mb := p.members[key]
	if mb != nil && mb.id != id {
		p.dropLocked(mb)
		mb = nil
	}
	if mb == nil {
		mb = &member{key: key, name: name, id: id, inner: inner, links: map[*bond.Link]string{}}
		mb.bond = bond.New(bond.Config{
			Deliver: p.device.Write, Follow: true, Log: p.log.With("router", name),
			Accept: func(h bond.Header) bool { return p.accept(mb, h) },
		})
		ctx, cancel := context.WithCancel(p.ctx)
		mb.end = cancel
		p.working.Go(func() { mb.bond.Run(ctx) })
		p.members[key] = mb
		p.byAddress[inner.Address4], p.byAddress[inner.Address6] = mb, mb
		delete(p.byAddress, netip.Addr{})
	}
	mb.carriers = append(mb.carriers, carrier)
	mb.left = time.Time{}
	return mb
}

func (p *packets) leave(mb *member, carrier tunnel.Messages) {
	p.mu.Lock()
	defer p.mu.Unlock()
	mb.carriers = slices.DeleteFunc(mb.carriers, func(m tunnel.Messages) bool { return m == carrier })
	if len(mb.carriers) == 0 {
		mb.left = time.Now()
	}
}

func (p *packets) datagramLink(mb *member, name string, m tunnel.Messages) *bond.Link {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := mb.bond.AddLink(bond.LinkConfig{
		Name: name, Kind: bond.Datagram, Backup: slices.Contains(mb.backup, name), Carriers: []bond.Carrier{m},
	})
	mb.links[l] = name
	return l
}

func (p *packets) removeLink(mb *member, l *bond.Link) {
	p.mu.Lock()
	delete(mb.links, l)
	p.mu.Unlock()
	mb.bond.RemoveLink(l)
}

// streamLink is the link that all stream sessions of a router share.
func (p *packets) streamLink(mb *member) *bond.Link {
	p.mu.Lock()
	defer p.mu.Unlock()
	if mb.stream == nil {
		mb.stream = mb.bond.AddLink(bond.LinkConfig{Kind: bond.Stream, Backup: true})
	}
	return mb.stream
}

func (p *packets) dropLocked(mb *member) {
	mb.end() // closes its links, and with them the carriers
	for _, m := range mb.carriers {
		go func() { _ = m.Close() }()
	}
	if p.members[mb.key] == mb {
		delete(p.members, mb.key)
		delete(p.byAddress, mb.inner.Address4)
		delete(p.byAddress, mb.inner.Address6)
		p.legs.set(mb.key, nil)
	}
	if mb.isCalm {
		p.calm(mb.key, false)
	}
}

// remove forgets a router that has been revoked.
func (p *packets) remove(key tunnel.PublicKey) {
	p.mu.Lock()
	mb := p.members[key]
	if mb != nil {
		p.dropLocked(mb)
	}
	p.forwards.Remove(forwardsKey(key))
	p.mu.Unlock()
	p.changed()
}

func forwardsKey(key tunnel.PublicKey) string { return string(key[:]) }

// accept decides on a packet from a router: its source must be the router's own
// inner address, and its destination one that a concentrator goes to.
func (p *packets) accept(mb *member, h bond.Header) bool {
	if h.Source != mb.inner.Address4 && h.Source != mb.inner.Address6 {
		mb.spoofed.Add(1)
		return false
	}
	if h.Destination == mb.inner.Gateway4 || h.Destination == mb.inner.Gateway6 {
		return true
	}
	for _, network := range p.mutual {
		if network.Contains(h.Destination) {
			return true // the Checker takes them for private ones
		}
	}
	if !p.checker.Allowed(h.Destination) {
		mb.forbidden.Add(1)
		return false
	}
	return true
}

// keepTime forgets routers that are gone, and asks bulk transfers to give way
// where interactive packets flow.
func (p *packets) keepTime(ctx context.Context) {
	tick := time.NewTicker(timeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		gone := false
		p.mu.Lock()
		for key, mb := range p.members {
			if !mb.left.IsZero() && now.Sub(mb.left) > forgetAfter {
				p.dropLocked(mb)
				p.forwards.Remove(forwardsKey(key))
				gone = true
				continue
			}
			if calm := mb.bond.Interactive(); calm != mb.isCalm {
				mb.isCalm = calm
				p.calm(key, calm)
			}
		}
		p.mu.Unlock()
		if gone {
			p.changed()
		}
	}
}

// wished does what a router asks for, and tells it what became of that.
func (p *packets) wished(mb *member, m tunnel.Messages, body []byte) {
	var w tunnel.Wishes
	if err := json.Unmarshal(body, &w); err != nil {
		p.log.Warn("a router's wish is not readable", "router", mb.name, "error", err)
		return
	}
	a := tunnel.Answers{Forwards: []tunnel.PortAnswer{}}
	p.mu.Lock()
	current := p.members[mb.key] == mb
	if current {
		a.Legs = p.legs.set(mb.key, w.Legs)
		mb.backup = w.Backup
		for l, name := range mb.links {
			l.SetBackup(slices.Contains(w.Backup, name))
		}
		if mb.stream != nil {
			mb.stream.SetBackup(!w.Stream)
		}
	}
	p.mu.Unlock()
	if !current {
		return
	}
	wanted := make([]egress.Forward, len(w.Forwards))
	for i, f := range w.Forwards {
		wanted[i] = egress.Forward{ID: f.Port, Protocol: f.Protocol, Port: f.Port}
	}
	a.Scheduler, a.SchedulerReason = p.schedule(mb.key, w.Scheduler)
	a.CongestionControl, a.CongestionControlReason = p.control(mb.key, w.CongestionControl)
	p.rank(mb.key, w.Ranks)
	var active []tunnel.Port
	for i, r := range p.forwards.Set(forwardsKey(mb.key), wanted) {
		a.Forwards = append(a.Forwards, tunnel.PortAnswer{Port: w.Forwards[i], State: string(r.State), Reason: r.Reason})
		if r.State == egress.ForwardActive {
			active = append(active, w.Forwards[i])
		}
	}
	p.mu.Lock()
	mb.active = active
	p.mu.Unlock()
	p.changed()
	text, err := json.Marshal(a)
	if err == nil {
		err = m.SendControl(text)
	}
	if err != nil {
		p.log.Debug("a router was not told of its forwards", "router", mb.name, "error", err)
	}
}

// udpForwards lists where the firewall is to lead UDP ports.
func (p *packets) udpForwards() []desired.UDPForward {
	var list []desired.UDPForward
	for _, f := range p.forwards.UDP() {
		inner, err := p.Inner(tunnel.PublicKey([]byte(f.Router)), "")
		if err != nil {
			continue // revoked at this moment
		}
		for _, a := range []netip.Addr{inner.Address4, inner.Address6} {
			if a.IsValid() {
				list = append(list, desired.UDPForward{Port: f.Port, To: netip.AddrPortFrom(a, f.Port)})
			}
		}
	}
	return list
}

// describe adds what is known of a router's packets.
func (p *packets) describe(key tunnel.PublicKey, r *webui.EnrolledRouter) {
	if inner, err := p.Inner(key, ""); err == nil {
		r.Inner4 = inner.Address4.String()
		if inner.Address6.IsValid() {
			r.Inner6 = inner.Address6.String()
		}
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	mb := p.members[key]
	if mb == nil {
		return
	}
	s := mb.bond.Stats()
	for _, l := range s.Links {
		if l.Fit {
			r.Carriers = append(r.Carriers, webui.RouterCarrier{Link: l.Name, Carrier: l.Kind.String()})
		}
	}
	r.PacketsRx = s.Delivered.Packets
	for _, sent := range s.Sent {
		r.PacketsTx += sent.Packets
	}
	r.Duplicates, r.Reordered, r.Drops = s.Duplicates, s.Reordered, s.Drops
	delete(r.Drops, "refused") // it is told apart here
	r.Drops["spoofed"], r.Drops["forbidden"] = mb.spoofed.Load(), mb.forbidden.Load()
	for _, f := range mb.active {
		r.Forwards = append(r.Forwards, webui.RouterForward{Protocol: f.Protocol, Port: f.Port})
	}
}
