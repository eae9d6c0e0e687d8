package bond

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"
)

// The path of a decision: Parse ─▶ flowTable.send ─▶ FlowHistory.Update ─▶
// Classify; and for what the other end sent, flowTable.receive.

// Class says how the packets of a flow are carried.
type Class uint8

const (
	// Interactive packets are sent on two links at once and delivered as they
	// come.
	Interactive Class = iota
	// Bulk packets are spread over the links and put in order again.
	Bulk
)

func (c Class) String() string {
	switch c {
	case Interactive:
		return "interactive"
	case Bulk:
		return "bulk"
	}
	return fmt.Sprintf("class %d", uint8(c))
}

// MarshalText gives "interactive" or "bulk".
func (c Class) MarshalText() ([]byte, error) {
	if c > Bulk {
		return nil, fmt.Errorf("class %d does not exist, use %q or %q", uint8(c), Interactive, Bulk)
	}
	return []byte(c.String()), nil
}

// UnmarshalText reads what MarshalText gives.
func (c *Class) UnmarshalText(text []byte) error {
	switch string(text) {
	case "interactive":
		*c = Interactive
	case "bulk":
		*c = Bulk
	default:
		return fmt.Errorf("class %.32q does not exist, use %q or %q", text, Interactive, Bulk)
	}
	return nil
}

// Rule is the operator's choice of a class. All that is set must match.
type Rule struct {
	Class    Class
	Protocol uint8 // 0 any
	// FirstPort to LastPort match a packet either port of which is among them;
	// LastPort 0 means FirstPort alone, both 0 any packet. Packets without ports,
	// later fragments too, match no rule that names some.
	FirstPort, LastPort uint16
	DSCP                int // -1 any
}

func (r Rule) matches(h Header) bool {
	if r.Protocol != 0 && r.Protocol != h.Protocol || r.DSCP >= 0 && r.DSCP != int(h.DSCP) {
		return false
	}
	if r.FirstPort == 0 && r.LastPort == 0 {
		return true
	}
	last := max(r.FirstPort, r.LastPort)
	among := func(port uint16) bool { return port != 0 && r.FirstPort <= port && port <= last }
	return among(h.SourcePort) || among(h.DestinationPort)
}

const (
	// A packet this long is of a transfer: no game, voice or remote shell sends
	// such as a rule, and QUIC and TCP transfers do from their first flight on.
	fullSize = 1000
	// A flow of larger packets than this in the mean, over more packets or bytes
	// than these per second, both directions together, costs too much to send
	// twice.
	smallMean     = 300
	maxPacketRate = 500
	maxByteRate   = 125_000 // 1 Mbit/s

	historyWindow = 500 * time.Millisecond
	// calmWindows in a row without a sign of bulk make a flow interactive again,
	// so that it does not flip with each packet.
	calmWindows = 2
	// After forgetAfter of silence the mean size starts anew.
	forgetAfter = 2 * time.Second
)

// FlowHistory is what is known of a flow, both directions together. The zero
// value is that of a flow not seen yet.
type FlowHistory struct {
	start   time.Duration // of the window
	bytes   uint32        // in the window
	packets uint16        // in the window
	mean    uint16        // smoothed length, in 1/16 bytes
	calm    uint8         // windows in a row
	known   bool
	signs   bool // of bulk, in this window
	bulk    bool // longer or more packets than an interactive flow has
	fast    bool // more packets or bytes per second
}

// Update gives the history with one more packet of length bytes, at now, the
// time since any fixed moment.
func (f FlowHistory) Update(length int, now time.Duration) FlowHistory {
	size := uint16(min(max(length, 0), 4095) * 16)
	passed := now - f.start
	switch {
	case !f.known || passed < 0:
		f = FlowHistory{start: now, mean: size, known: true}
	case passed >= historyWindow:
		windows := passed / historyWindow
		if f.signs {
			windows--
			f.calm = 0
		}
		f.calm = uint8(min(time.Duration(f.calm)+windows, calmWindows))
		if f.calm == calmWindows {
			f.bulk, f.fast = false, false
		}
		if passed >= forgetAfter {
			f.mean = size
		}
		f.start, f.bytes, f.packets, f.signs = now, 0, 0, false
	}
	f.mean = uint16(int(f.mean) + (int(size)-int(f.mean))/8)
	f.packets++
	f.bytes += uint32(max(length, 0))
	if int(f.packets) > int(maxPacketRate*historyWindow/time.Second) || int(f.bytes) > int(maxByteRate*historyWindow/time.Second) {
		f.packets-- // it is over the bound however much comes
		f.fast, f.bulk, f.signs = true, true, true
	}
	if length >= fullSize || f.mean > smallMean*16 {
		f.bulk, f.signs = true, true
	}
	return f
}

// Differentiated services code points (RFC 2474, 8622).
const (
	dscpLowerEffort = 1
	dscpCS1         = 8
	dscpCS5         = 40 // and above: voice-admit 44, EF 46, CS6 48, CS7 56
)

// Classify gives the class of a packet from its header, the history of its flow
// with the packet in it, and the operator's rules, of which the first that
// matches holds.
func Classify(h Header, f FlowHistory, rules []Rule) Class {
	class, _ := classify(h, f, rules)
	return class
}

// classify also says whether the class was chosen explicitly, by a rule or by a
// code point, and not guessed.
func classify(h Header, f FlowHistory, rules []Rule) (class Class, explicit bool) {
	for _, rule := range rules {
		if rule.matches(h) {
			return rule.Class, true
		}
	}
	switch {
	case h.DSCP == dscpCS1 || h.DSCP == dscpLowerEffort:
		return Bulk, true
	case h.DSCP >= dscpCS5:
		return Interactive, true
	case f.fast: // also when it only looks like DNS, NTP or ICMP
		return Bulk, false
	case isQuery(h):
		return Interactive, false
	case f.bulk:
		return Bulk, false
	}
	return Interactive, false
}

// isQuery says that a packet is of a protocol of questions and answers that users
// wait for: DNS, NTP, ICMP except large echoes.
func isQuery(h Header) bool {
	const dns, ntp, maxEcho = 53, 123, 256
	switch h.Protocol {
	case protocolICMP:
		return h.ICMPType != 8 && h.ICMPType != 0 || h.Length <= maxEcho
	case protocolICMPv6:
		return h.ICMPType != 128 && h.ICMPType != 129 || h.Length <= maxEcho
	case protocolUDP:
		return h.SourcePort == dns || h.DestinationPort == dns || h.SourcePort == ntp || h.DestinationPort == ntp
	case protocolTCP:
		return h.SourcePort == dns || h.DestinationPort == dns
	}
	return false
}

// The flow table has 2048 sets of two flows; in a full set the flow seen last
// stays. It takes 200 kB whatever comes.
const flowSets = 2048

// flowTable remembers flows. Fragments have no ports, so the fragments between
// two hosts are one flow of their own.
type flowTable struct {
	seed [4]uint64

	mutex sync.Mutex
	sets  [flowSets][2]flow
}

type flow struct {
	hash    uint64 // 0 for none
	seen    time.Duration
	history FlowHistory
	// peer is the class that the other end used last.
	peer, first               Class
	peerKnown, peerExplicit   bool
	firstKnown, firstExplicit bool // first is the class of the last first fragment
}

func newFlowTable() *flowTable {
	t := &flowTable{}
	for i := range t.seed {
		t.seed[i] = rand.Uint64() | 1
	}
	return t
}

// hash is the same for both directions of a flow, and not to be foretold.
func (t *flowTable) hash(h Header) uint64 {
	kind := uint64(h.Protocol)
	source, destination := h.SourcePort, h.DestinationPort
	if h.Fragment {
		kind, source, destination = 256, 0, 0
	}
	sum := t.hashEnd(h.Source, source) + t.hashEnd(h.Destination, destination)
	return max(mix(sum^t.seed[0], kind+t.seed[3]), 1)
}

func (t *flowTable) hashEnd(address netip.Addr, port uint16) uint64 {
	bytes := address.As16()
	low, high := binary.BigEndian.Uint64(bytes[8:]), binary.BigEndian.Uint64(bytes[:8])
	return mix(mix(high^t.seed[0], t.seed[1])^low, t.seed[2]+uint64(port))
}

// mix is the multiply-and-fold step of wyhash.
func mix(a, b uint64) uint64 {
	high, low := bits.Mul64(a, b)
	return high ^ low
}

// send notes a packet towards the other end and gives its class. With follow the
// class is the other end's, if that was chosen explicitly or is bulk; else what
// is guessed here: a download shows here first.
func (t *flowTable) send(h Header, hash uint64, now time.Duration, rules []Rule, follow bool) (class Class, explicit bool) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	f := t.at(hash, now)
	f.history = f.history.Update(h.Length, now)
	if h.LaterFragment && f.firstKnown {
		return f.first, f.firstExplicit
	}
	class, explicit = classify(h, f.history, rules)
	switch {
	case !follow || !f.peerKnown || explicit && !f.peerExplicit:
	case f.peerExplicit:
		class, explicit = f.peer, true
	case f.peer == Bulk:
		class = Bulk
	}
	if h.Fragment && !h.LaterFragment {
		f.first, f.firstKnown, f.firstExplicit = class, true, explicit
	}
	return class, explicit
}

// receive notes a packet from the other end, which used this class for it.
func (t *flowTable) receive(h Header, hash uint64, now time.Duration, class Class, explicit bool) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	f := t.at(hash, now)
	f.history = f.history.Update(h.Length, now)
	f.peer, f.peerKnown, f.peerExplicit = class, true, explicit
}

// at finds the flow, or makes room for it. The caller holds the mutex.
func (t *flowTable) at(hash uint64, now time.Duration) *flow {
	set := &t.sets[hash%flowSets]
	oldest := &set[0]
	for i := range set {
		if set[i].hash == hash {
			set[i].seen = now
			return &set[i]
		}
		if set[i].seen < oldest.seen {
			oldest = &set[i]
		}
	}
	*oldest = flow{hash: hash, seen: now}
	return oldest
}
