package concentrator

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/datapath/leg"
	"sheaf/daemon/datapath/tun"
	"sheaf/daemon/datapath/tunnel"
)

// The path of a leg, from a router's wish to its subflows:
//
//	wish ─▶ set ─▶ address, peer ─▶ answer
//	UDP, beside QUIC ─▶ leg.End (whose is the source?) ─▶ TUN ─▶ firewall (to the listener?) ─▶ listener
//
// The TUN is there once the first router wants a leg.

const (
	// maxLegs of one router: as many as it may have uplinks.
	maxLegs = 16
	// legSubnet is the /64 of all legs in the network of inner addresses: no
	// router's, which end with maxSubnet.
	legSubnet = 1<<16 - 1
	// openAgain is how long after a failure the TUN is made again.
	openAgain = time.Second
)

// legNetwork4 is the network of all legs' IPv4 addresses.
var legNetwork4 = netip.MustParsePrefix("10.84.0.0/16")

// legs are those of all routers.
type legs struct {
	log     *slog.Logger
	store   *Store
	sockets func() []*tunnel.Beside
	changed func() // what is wanted of the kernel has changed
	// multipath says whether the kernel has MPTCP.
	multipath func() bool

	mu      sync.Mutex
	private leg.Private
	end     *leg.End // nil until the first is wanted
	device  desired.Interface
	routers map[tunnel.PublicKey][]routerLeg
	numbers map[uint16]bool // of addresses in use
	closed  bool
}

// routerLeg is one leg of a router.
type routerLeg struct {
	uplink string
	key    leg.Key
	number uint16
}

func newLegs(log *slog.Logger, store *Store, sockets func() []*tunnel.Beside) *legs {
	return &legs{
		log: log, store: store, sockets: sockets, changed: func() {}, private: leg.NewPrivate(),
		routers: map[tunnel.PublicKey][]routerLeg{}, numbers: map[uint16]bool{},
	}
}

// address4 and address6 are those of the leg with a number; 0 is the concentrator.
func (l *legs) address4(number uint16) netip.Addr {
	b := legNetwork4.Addr().As4()
	binary.BigEndian.PutUint16(b[2:], number+1)
	return netip.AddrFrom4(b)
}

func (l *legs) address6(number uint16) netip.Addr {
	b := address6(l.store.Identity().PublicKey(), legSubnet).As16()
	binary.BigEndian.PutUint16(b[14:], number+1)
	return netip.AddrFrom16(b)
}

// set makes these the legs of a router, and says what became of each.
func (l *legs) set(router tunnel.PublicKey, wanted []tunnel.Leg) (answers []tunnel.LegAnswer) {
	if len(wanted) > maxLegs {
		wanted = wanted[:maxLegs]
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.routers[router]
	var now []routerLeg
	for _, w := range wanted {
		answer := tunnel.LegAnswer{Leg: w}
		one, err := l.admit(router, now, w)
		if err == nil {
			err = l.serve()
		}
		if err == nil {
			err = l.setPeer(one)
		}
		if err != nil {
			answer.Reason = err.Error()
			l.log.Warn("a router's leg is refused", "uplink", w.Uplink, "error", err)
		} else {
			now = append(now, one)
			l.numbers[one.number] = true
			far := l.private.Public()
			answer.Far, answer.Address4, answer.Address6 = far[:], l.address4(one.number), l.address6(one.number)
		}
		answers = append(answers, answer)
	}
	for _, old := range before {
		l.forget(old, now)
	}
	l.routers[router] = now
	if len(now) == 0 {
		delete(l.routers, router)
	}
	return answers
}

// admit finds an address for a leg: the one that the router's uplink has already, or
// a free one.
func (l *legs) admit(router tunnel.PublicKey, now []routerLeg, w tunnel.Leg) (routerLeg, error) {
	one := routerLeg{uplink: w.Uplink}
	switch {
	case !l.multipath():
		return one, errors.New("a leg would be of no use: MPTCP is off in the concentrator's kernel")
	case len(w.Key) != len(leg.Key{}):
		return one, fmt.Errorf("the key has %d bytes, want %d", len(w.Key), len(leg.Key{}))
	case slices.ContainsFunc(now, func(o routerLeg) bool { return o.uplink == w.Uplink }):
		return one, errors.New("the uplink has one already")
	}
	one.key = leg.Key(w.Key)
	for key, all := range l.routers {
		for _, other := range all {
			mine := key == router && other.uplink == one.uplink
			switch {
			case mine:
				one.number = other.number
			case other.key == one.key:
				return one, errors.New("the key is in use")
			}
		}
	}
	for n := uint16(1); n <= maxSubnet && one.number == 0; n++ {
		if !l.numbers[n] {
			one.number = n
		}
	}
	if one.number == 0 {
		return one, errors.New("all addresses are taken")
	}
	return one, nil
}

// forget takes away of an old leg what the new ones do not have.
func (l *legs) forget(old routerLeg, now []routerLeg) {
	if !slices.ContainsFunc(now, func(o routerLeg) bool { return o.key == old.key }) && l.end != nil {
		l.end.RemovePeer(old.key)
	}
	if !slices.ContainsFunc(now, func(o routerLeg) bool { return o.number == old.number }) {
		delete(l.numbers, old.number)
	}
}

func (l *legs) setPeer(one routerLeg) error {
	return l.end.SetPeer(leg.Peer{Key: one.key, Addresses: []netip.Prefix{
		netip.PrefixFrom(l.address4(one.number), 32), netip.PrefixFrom(l.address6(one.number), 128),
	}})
}

// serve makes the TUN and begins to listen, unless that is done.
func (l *legs) serve() error {
	switch {
	case l.closed:
		return errors.New("the concentrator stops")
	case l.end != nil:
		return nil
	}
	device, index, err := tun.OpenWireGuard(desired.ConcentratorLegName)
	if err != nil {
		return err
	}
	var sockets []leg.Socket
	for _, s := range l.sockets() {
		sockets = append(sockets, s)
	}
	end, err := leg.Open(l.private, device, l.log, sockets...)
	if err != nil {
		return err
	}
	l.end, l.device = end, desired.Interface{Index: index, Name: desired.ConcentratorLegName}
	l.changed()
	go l.again(end)
	return nil
}

// again makes another TUN when somebody has deleted the one of an End.
func (l *legs) again(end *leg.End) {
	<-end.Done()
	for ; ; time.Sleep(openAgain) {
		l.mu.Lock()
		l.end, l.device = nil, desired.Interface{}
		err := l.serve()
		if err == nil {
			for _, all := range l.routers {
				for _, one := range all {
					err = errors.Join(err, l.setPeer(one))
				}
			}
		}
		done := err == nil || l.closed
		l.mu.Unlock()
		if done {
			return
		}
		l.log.Warn("the network interface of legs is gone; making it again", "interface", desired.ConcentratorLegName, "error", err)
	}
}

// close ends all legs.
func (l *legs) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.end != nil {
		l.end.Close() // which ends again, once mu is free
	}
}

// state is what the control path must know.
func (l *legs) state(listeners []netip.AddrPort) desired.ConcentratorLegs {
	l.mu.Lock()
	defer l.mu.Unlock()
	return desired.ConcentratorLegs{
		Device:   l.device,
		Gateway4: netip.PrefixFrom(l.address4(0), legNetwork4.Bits()), Gateway6: netip.PrefixFrom(l.address6(0), 64),
		Listeners: listeners,
	}
}
