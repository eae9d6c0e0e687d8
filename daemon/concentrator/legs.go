package concentrator

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
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
	book    legBook
	closed  bool
}

func newLegs(log *slog.Logger, store *Store, sockets func() []*tunnel.Beside) *legs {
	return &legs{
		log: log, store: store, sockets: sockets, changed: func() {}, private: leg.NewPrivate(), book: legBook{},
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
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	if len(wanted) > 0 {
		if !l.multipath() {
			err = errors.New("a leg would be of no use: MPTCP is off in the concentrator's kernel")
		} else {
			err = l.serve()
		}
	}
	if err != nil {
		for _, w := range wanted {
			answers = append(answers, tunnel.LegAnswer{Leg: w, Reason: err.Error()})
		}
		return answers
	}
	decisions, gone := l.book.set(router, wanted)
	for _, key := range gone {
		if l.end != nil { // else its TUN has just been deleted
			l.end.RemovePeer(key)
		}
	}
	far := l.private.Public()
	for i, d := range decisions {
		answer := tunnel.LegAnswer{Leg: wanted[i]}
		if d.refusal == nil {
			d.refusal = l.setPeer(d.leg)
		}
		if d.refusal != nil {
			answer.Reason = d.refusal.Error()
		} else {
			answer.Far, answer.Address4, answer.Address6 = far[:], l.address4(d.leg.number), l.address6(d.leg.number)
		}
		answers = append(answers, answer)
	}
	return answers
}

func (l *legs) setPeer(one legEntry) error {
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
			for _, all := range l.book {
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
