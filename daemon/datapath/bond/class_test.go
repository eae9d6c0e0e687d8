package bond

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// play gives the history of a flow with packets of length, every so often.
func play(f FlowHistory, now *time.Duration, length int, every, during time.Duration) FlowHistory {
	for end := *now + during; *now < end; *now += every {
		f = f.Update(length, *now)
	}
	return f
}

func TestClassify(t *testing.T) {
	udp := func(source, destination uint16, dscp uint8, length int) Header {
		return Header{Protocol: protocolUDP, SourcePort: source, DestinationPort: destination, DSCP: dscp, Length: length}
	}
	after := func(length int, every, during time.Duration) FlowHistory {
		now := time.Hour
		return play(FlowHistory{}, &now, length, every, during)
	}
	first := func(length int) FlowHistory { return FlowHistory{}.Update(length, time.Hour) }
	voice := after(228, 20*time.Millisecond, 5*time.Second)
	bulk := after(1400, time.Millisecond, time.Second)
	for _, c := range []struct {
		name   string
		header Header
		flow   FlowHistory
		rules  []Rule
		want   Class
	}{
		{"voice", udp(5000, 6000, 0, 228), voice, nil, Interactive},
		{"first small packet", udp(5000, 443, 0, 60), first(60), nil, Interactive},
		{"first full-size packet", udp(5000, 443, 0, 1228), first(1228), nil, Bulk},
		{"middling packets", udp(5000, 443, 0, 600), first(600), nil, Bulk},
		{"acknowledgements of a fast download", udp(5000, 443, 0, 60), after(60, time.Millisecond, time.Second), nil, Bulk},
		{"1.2 Mbit/s of small packets", udp(5000, 443, 0, 300), after(300, 2*time.Millisecond, time.Second), nil, Bulk},
		{"0.8 Mbit/s of small packets", udp(5000, 443, 0, 250), after(250, 2500*time.Microsecond, 3*time.Second), nil, Interactive},
		{"bulk marked EF", udp(5000, 443, 46, 1400), bulk, nil, Interactive},
		{"bulk marked CS5", udp(5000, 443, 40, 1400), bulk, nil, Interactive},
		{"bulk marked AF41", udp(5000, 443, 34, 1400), bulk, nil, Bulk},
		{"voice marked AF41", udp(5000, 443, 34, 228), voice, nil, Interactive},
		{"voice marked CS1", udp(5000, 443, 8, 228), voice, nil, Bulk},
		{"voice marked LE", udp(5000, 443, 1, 228), voice, nil, Bulk},
		{"large DNS answer", udp(53, 5000, 0, 1300), first(1300), nil, Interactive},
		{"DNS over TCP", Header{Protocol: protocolTCP, DestinationPort: 53, Length: 1300}, first(1300), nil, Interactive},
		{"a tunnel on port 53", udp(5000, 53, 0, 1400), bulk, nil, Bulk},
		{"NTP", udp(123, 123, 0, 76), first(76), nil, Interactive},
		{"ping", Header{Protocol: protocolICMP, ICMPType: 8, Length: 84}, first(84), nil, Interactive},
		{"large ping", Header{Protocol: protocolICMP, ICMPType: 8, Length: 1400}, first(1400), nil, Bulk},
		{"ping6", Header{Protocol: protocolICMPv6, ICMPType: 129, Length: 256}, first(256), nil, Interactive},
		{"packet too big", Header{Protocol: protocolICMPv6, ICMPType: 2, Length: 1280}, first(1280), nil, Interactive},

		{"rule by port", udp(5000, 443, 0, 1400), bulk, []Rule{{Class: Interactive, FirstPort: 443, DSCP: -1}}, Interactive},
		{"rule by source port", udp(443, 5000, 0, 1400), bulk, []Rule{{Class: Interactive, FirstPort: 443, DSCP: -1}}, Interactive},
		{"rule by range, below", udp(1, 99, 0, 60), first(60), []Rule{{Class: Bulk, FirstPort: 100, LastPort: 200, DSCP: -1}}, Interactive},
		{"rule by range, first", udp(1, 100, 0, 60), first(60), []Rule{{Class: Bulk, FirstPort: 100, LastPort: 200, DSCP: -1}}, Bulk},
		{"rule by range, last", udp(1, 200, 0, 60), first(60), []Rule{{Class: Bulk, FirstPort: 100, LastPort: 200, DSCP: -1}}, Bulk},
		{"rule by range, above", udp(1, 201, 0, 60), first(60), []Rule{{Class: Bulk, FirstPort: 100, LastPort: 200, DSCP: -1}}, Interactive},
		{"rule from 0 and no ports", Header{Protocol: 50, Length: 60}, first(60), []Rule{{Class: Bulk, LastPort: 200, DSCP: -1}}, Interactive},
		{"rule by protocol", udp(1, 2, 0, 60), first(60), []Rule{{Class: Bulk, Protocol: protocolTCP, DSCP: -1}}, Interactive},
		{"rule by code point", udp(1, 2, 46, 60), first(60), []Rule{{Class: Bulk, DSCP: 46}}, Bulk},
		{"rule by code point 0", udp(1, 2, 46, 60), first(60), []Rule{{Class: Bulk, DSCP: 0}}, Interactive},
		{"first rule wins", udp(1, 2, 0, 60), first(60), []Rule{{Class: Bulk, DSCP: -1}, {Class: Interactive, DSCP: -1}}, Bulk},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := Classify(c.header, c.flow, c.rules); got != c.want {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

func TestFlowHistoryTurns(t *testing.T) {
	header := Header{Protocol: protocolUDP, SourcePort: 5000, DestinationPort: 443}
	now := time.Hour
	var f FlowHistory
	expect := func(what string, want Class) {
		t.Helper()
		if got := Classify(header, f, nil); got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	f = play(f, &now, 100, 20*time.Millisecond, time.Second)
	expect("small packets", Interactive)
	f = f.Update(1400, now)
	expect("one full-size packet", Bulk)
	f = play(f, &now, 100, 20*time.Millisecond, 500*time.Millisecond)
	expect("half a second of small packets", Bulk)
	f = play(f, &now, 100, 20*time.Millisecond, 1600*time.Millisecond)
	expect("two seconds of small packets", Interactive)
	for range 8 { // a full-size packet now and then, too often to turn back
		f = f.Update(1400, now)
		f = play(f, &now, 100, 20*time.Millisecond, 700*time.Millisecond)
		expect("mixed packets", Bulk)
	}
	now += 10 * time.Second
	f = f.Update(60, now)
	expect("a request after silence", Interactive)
	f = play(f, &now, 60, time.Millisecond, 400*time.Millisecond)
	expect("a flood", Bulk)
	f = play(f, &now, 60, time.Millisecond, 10*time.Second)
	expect("a long flood", Bulk)
}

func TestClassText(t *testing.T) {
	for _, class := range []Class{Interactive, Bulk} {
		text, err := class.MarshalText()
		var back Class
		if err != nil || back.UnmarshalText(text) != nil || back != class {
			t.Errorf("%v became %q, %v and then %v", class, text, err, back)
		}
	}
	var c Class
	if err := c.UnmarshalText([]byte("urgent")); err == nil {
		t.Error("a class that does not exist was read")
	}
	if _, err := Class(7).MarshalText(); err == nil {
		t.Error("a class that does not exist was written")
	}
}

func TestFlowTable(t *testing.T) {
	table := newFlowTable()
	now := time.Hour
	out := Header{Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddr("192.0.2.1"), Protocol: protocolUDP, SourcePort: 5000, DestinationPort: 443, Length: 60}
	back := Header{Source: out.Destination, Destination: out.Source, Protocol: protocolUDP, SourcePort: 443, DestinationPort: 5000, Length: 60}
	if table.hash(out) != table.hash(back) {
		t.Fatal("the directions of a flow have different hashes")
	}
	other := out
	other.SourcePort++
	if table.hash(out) == table.hash(other) {
		t.Error("two flows have one hash")
	}
	send := func(h Header, rules []Rule, follow bool) (Class, bool) {
		return table.send(h, table.hash(h), now, rules, follow)
	}
	expect := func(what string, class Class, explicit bool, want Class, wantExplicit bool) {
		t.Helper()
		if class != want || explicit != wantExplicit {
			t.Errorf("%s: %v, explicit %v, want %v, %v", what, class, explicit, want, wantExplicit)
		}
	}
	received := func(h Header, class Class, explicit bool) {
		table.receive(h, table.hash(h), now, class, explicit)
	}

	// Full-size packets from the other end make the acknowledgements bulk.
	class, explicit := send(out, nil, false)
	expect("request", class, explicit, Interactive, false)
	large := back
	large.Length = 1300
	received(large, Bulk, false)
	class, explicit = send(out, nil, false)
	expect("acknowledgement", class, explicit, Bulk, false)

	// Follow: what the other end guessed counts if it is bulk, what it was told
	// counts always.
	flow := func(port uint16) Header { h := out; h.SourcePort = port; return h }
	received(flow(1), Bulk, false)
	class, explicit = send(flow(1), nil, true)
	expect("follow a guess of bulk", class, explicit, Bulk, false)
	class, explicit = send(flow(1), nil, false)
	expect("do not follow", class, explicit, Interactive, false)
	received(flow(2), Interactive, false)
	full := flow(2)
	full.Length = 1400
	class, explicit = send(full, nil, true)
	expect("full-size packets after a guess of interactive", class, explicit, Bulk, false)
	received(flow(3), Interactive, true)
	full.SourcePort = 3
	class, explicit = send(full, nil, true)
	expect("full-size packets after a choice of interactive", class, explicit, Interactive, true)
	received(flow(4), Bulk, false)
	marked := flow(4)
	marked.DSCP = 46
	class, explicit = send(marked, nil, true)
	expect("a mark here against a guess there", class, explicit, Interactive, true)

	// The later fragments of a packet take the class of the first.
	first := flow(5)
	first.Fragment = true
	later := Header{Source: out.Source, Destination: out.Destination, Protocol: protocolUDP, Fragment: true, LaterFragment: true, Length: 1400}
	rules := []Rule{{Class: Interactive, FirstPort: 443, DSCP: -1}}
	first.Length = 1400
	class, explicit = send(first, rules, false)
	expect("first fragment", class, explicit, Interactive, true)
	class, explicit = send(later, rules, false)
	expect("later fragment", class, explicit, Interactive, true)
	if laneOf(table.hash(first), Bulk) != laneOf(table.hash(later), Bulk) {
		t.Error("the fragments of a packet have different lanes")
	}

	// A flood of flows does not push out one that is in use.
	received(flow(6), Bulk, true)
	for range 20_000 {
		h := out
		h.Destination = netip.AddrFrom4([4]byte{198, 51, byte(rand.Uint32()), byte(rand.Uint32())})
		h.SourcePort = uint16(rand.Uint32())
		now += time.Microsecond
		table.send(h, table.hash(h), now, nil, false)
		class, _ = send(flow(6), nil, true)
		if class != Bulk {
			t.Fatal("a flow in use was forgotten")
		}
	}
}
