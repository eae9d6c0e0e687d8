package tunnel

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestAccount(t *testing.T) {
	// one is a subflow from 10.N.0.2: acknowledged, received.
	one := func(number int, acknowledged, received uint64) Subflow {
		return Subflow{Local: netip.MustParseAddrPort(fmt.Sprintf("10.%d.0.2:4000", number)), acknowledged: acknowledged, received: received}
	}
	flying := func(f Subflow, bytes uint64) Subflow {
		f.sent = f.acknowledged + bytes
		return f
	}
	another := func(f Subflow, port uint16) Subflow {
		f.Local = netip.AddrPortFrom(f.Local.Addr(), port)
		return f
	}
	type look struct {
		subflows []Subflow
		at       position
	}
	before := look{[]Subflow{one(1, 1000, 5000), one(2, 100, 0)}, position{acknowledged: 1100, received: 5000}}
	for _, c := range []struct {
		name  string
		looks []look
		want  string // sent/received by source
	}{
		{"nothing new", []look{before}, ""},
		{"both move", []look{{[]Subflow{one(1, 1010, 5500), one(2, 120, 300)}, position{}}}, "10.1.0.2 10/500, 10.2.0.2 20/300"},
		{"looks add up", []look{
			{[]Subflow{one(1, 1010, 5000), one(2, 100, 0)}, position{}}, {[]Subflow{one(1, 1030, 5007), one(2, 100, 1)}, position{}},
		}, "10.1.0.2 30/7, 10.2.0.2 0/1"},
		{"a new one counts from nothing", []look{{[]Subflow{one(1, 1000, 5000), one(2, 100, 0), one(3, 7, 8)}, position{}}}, "10.3.0.2 7/8"},
		{"two from one address", []look{{[]Subflow{one(1, 1001, 5002), another(one(1, 10, 20), 4001), one(2, 100, 0)}, position{}}}, "10.1.0.2 11/22"},
		{"a closed one keeps its bytes", []look{
			{[]Subflow{one(1, 1040, 5000), one(2, 100, 0)}, position{acknowledged: 1140, received: 5000}},
			{[]Subflow{one(2, 110, 0)}, position{acknowledged: 1150, received: 5000}},
		}, "10.1.0.2 40/0, 10.2.0.2 10/0"},
		{"and those that nobody saw", []look{
			{[]Subflow{one(2, 110, 70)}, position{acknowledged: 1160, received: 5570}},
		}, "10.2.0.2 10/70, 10.1.0.2 50/500"},
		{"two closed share them", []look{
			{[]Subflow{one(3, 10, 0)}, position{acknowledged: 1130, received: 5000}},
		}, "10.3.0.2 10/0, 10.1.0.2 10/0, 10.2.0.2 10/0"},
		{"what is sent again over another counts there", []look{
			{[]Subflow{one(2, 400, 0)}, position{acknowledged: 1300, received: 5000}},
		}, "10.2.0.2 300/0"},
		{"all closed, and one is back", []look{
			{nil, position{acknowledged: 1100, received: 5010}},
			{[]Subflow{another(one(1, 3, 4), 4002)}, position{acknowledged: 1103, received: 5014}},
		}, "10.1.0.2 3/9, 10.2.0.2 0/5"},
		{"another's acknowledgement may be late", []look{
			{[]Subflow{flying(one(2, 100, 0), 300)}, position{acknowledged: 1350, received: 5000}},
			{[]Subflow{one(2, 400, 0)}, position{acknowledged: 1420, received: 5000}},
		}, "10.2.0.2 300/0, 10.1.0.2 20/0"},
		{"what arrives out of order is told later", []look{
			{[]Subflow{one(2, 100, 400)}, position{acknowledged: 1100, received: 5100}},
			{[]Subflow{one(2, 100, 450)}, position{acknowledged: 1100, received: 5850}},
		}, "10.2.0.2 0/450, 10.1.0.2 0/400"},
		{"an older reading takes nothing back", []look{{[]Subflow{one(1, 900, 4000), one(2, 100, 0)}, position{acknowledged: 1}}}, ""},
	} {
		var a account
		a.add(before.subflows, before.at)
		a.moved, a.from = nil, before.at
		for _, l := range c.looks {
			a.add(l.subflows, l.at)
		}
		var got []string
		for _, m := range a.moved {
			got = append(got, fmt.Sprintf("%s %d/%d", m.Source, m.Sent, m.Received))
		}
		if strings.Join(got, ", ") != c.want {
			t.Errorf("%s: %v, want %s", c.name, got, c.want)
		}
	}
}

// until waits for a list of flows that is as it should be.
func (in *inbound) until(what string, limit int, right func(list []Flow, total int) bool) []Flow {
	in.t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		list, total := Flows(limit, in.pool, in.router)
		if right(list, total) {
			return list
		}
		if time.Now().After(deadline) {
			in.t.Fatalf("%s: %d of %d flows: %+v", what, len(list), total, list)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Each flow's bytes are its own, though they follow one another in one session.
func TestFlowsAreListedWithTheirBytes(t *testing.T) {
	const up, down = 300_000, 3_000_000
	to := destination(t, func(c *net.TCPConn) {
		_, _ = io.CopyN(io.Discard, c, up)
		_, _ = c.Write(make([]byte, down))
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	})
	in := newInbound(t, to)
	from := time.Now()
	for round := range 3 {
		client, result := in.connect(to)
		if _, err := client.Write(make([]byte, up)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, client, down); err != nil {
			t.Fatal(err)
		}
		list := in.until("all bytes of one flow", 10, func(list []Flow, total int) bool {
			return total == 1 && len(list) == 1 && list[0].Sent == up && list[0].Received == down
		})
		f := list[0]
		if f.Client != addrPort(client.LocalAddr()) || f.Destination != addrPort(client.RemoteAddr()) || f.Inbound ||
			f.Since.Before(from) || f.Since.After(time.Now()) {
			t.Errorf("round %d: %+v", round, f)
		}
		if len(f.Sources) != 1 || f.Sources[0].Source != netip.MustParseAddr("127.0.0.1") {
			t.Fatalf("round %d: from %+v", round, f.Sources)
		}
		// Frames and TLS make a percent, a handshake or another flow would make more.
		if s := f.Sources[0]; s.Sent < up || s.Sent > up+up/100 || s.Received < down || s.Received > down+down/100 {
			t.Errorf("round %d: %+v for %d up and %d down", round, s, up, down)
		}
		_ = client.Close()
		await(t, result, "the end of the flow")
		in.until("nothing after the end", 10, func(list []Flow, total int) bool { return total == 0 && len(list) == 0 })
		time.Sleep(rest + 50*time.Millisecond)
	}

	// The bigger one first, and no more than asked for.
	outside, _ := in.arrive(0)
	if _, err := outside.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	client, _ := in.connect(to)
	if _, err := client.Write(make([]byte, 2000)); err != nil {
		t.Fatal(err)
	}
	list := in.until("two flows", 10, func(list []Flow, total int) bool {
		return total == 2 && len(list) == 2 && list[0].Sent == 2000 && list[1].Received == 1000
	})
	if f := list[1]; !f.Inbound || f.Destination != to || list[0].Inbound {
		t.Errorf("inbound: %+v", list)
	}
	in.until("one of two", 1, func(list []Flow, total int) bool { return total == 2 && len(list) == 1 && list[0].Sent == 2000 })
}

// During an upload nothing comes but acknowledgements, and they count.
func TestAnUploadHearsItsAcknowledgements(t *testing.T) {
	b := newBond(t)
	client, _ := b.connect(destination(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }))
	deadline := time.Now().Add(15 * time.Second)
	for {
		if _, err := client.Write(make([]byte, 100_000)); err != nil {
			t.Fatal(err)
		}
		b.pool.mu.Lock()
		for s := range b.pool.sessions {
			s.heard.Store(time.Now().Add(-time.Minute).UnixNano())
		}
		b.pool.mu.Unlock()
		begin := time.Now()
		at := b.pool.Heard()[netip.MustParseAddr("127.0.0.1")]
		if begin.Sub(at) < time.Second {
			return
		}
		if begin.After(deadline) {
			t.Fatalf("last heard %v ago, while sending", begin.Sub(at))
		}
		time.Sleep(time.Millisecond)
	}
}

// BenchmarkAccount is what the account costs a flow.
func BenchmarkAccount(b *testing.B) {
	bond := newBond(b)
	s, err := bond.pool.Get(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		s.resetAccount()
	}
}
