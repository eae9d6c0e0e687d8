package tunnel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// carriers is a PacketsHandler whose tests take what was attached.
type carriers struct {
	inner    Inner
	attached chan attachment
}

type attachment struct {
	key      PublicKey
	name     string
	bond     uint64
	link     string
	datagram bool
	Messages
}

func newCarriers() *carriers {
	return &carriers{
		inner: Inner{
			Address4: netip.MustParseAddr("10.83.0.2"), Gateway4: netip.MustParseAddr("10.83.0.1"),
			Address6: netip.MustParseAddr("fd00:1:2:3::1"), Gateway6: netip.MustParseAddr("fd00:1:2::1"),
		},
		attached: make(chan attachment, 64),
	}
}

func (c *carriers) Inner(PublicKey, string) (Inner, error) { return c.inner, nil }

func (c *carriers) Attach(key PublicKey, name string, bond uint64, link string, datagram bool, m Messages) {
	c.attached <- attachment{key, name, bond, link, datagram, m}
	<-m.Done()
}

// collect receives into channels, copies of what arrives.
func collect(m Messages) (messages, control chan []byte, ended chan error) {
	messages, control, ended = make(chan []byte, 4096), make(chan []byte, 16), make(chan error, 1)
	go func() {
		ended <- m.Receive(Receiver{
			Message: func(b []byte) { messages <- bytes.Clone(b) },
			Control: func(b []byte) { control <- bytes.Clone(b) },
		})
	}()
	return messages, control, ended
}

func (b *bond) loopback() []Path {
	return []Path{{Name: "dsl", Sources: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}}
}

// stream is a stream with both its ends.
func (b *bond) stream(number uint64) (router Messages, concentrator attachment) {
	b.t.Helper()
	m, inner, err := b.enrolledPeer().DialStream(b.t.Context(), b.loopback(), number)
	if err != nil {
		b.t.Fatal(err)
	}
	if inner != b.carriers.inner {
		b.t.Fatalf("inner addresses %+v, want %+v", inner, b.carriers.inner)
	}
	b.t.Cleanup(func() { _ = m.Close() })
	a := await(b.t, b.carriers.attached, "the stream at the concentrator")
	if a.key != b.routerID.PublicKey() || a.name != "home" || a.bond != number || a.link != "" || a.datagram {
		b.t.Fatalf("attached as %+v", a)
	}
	return m, a
}

func TestStreamCarriesMessages(t *testing.T) {
	b, _ := newQuietBond(t)
	const number = 1<<63 + 5 // more than a float holds
	router, far := b.stream(number)
	atRouter, stateAtRouter, routerEnded := collect(router)
	atFar, configAtFar, farEnded := collect(far)
	if n := router.MaxMessage(); n != 1600 {
		t.Errorf("at most %d bytes, want 1600", n)
	}
	for _, way := range []struct {
		from Messages
		to   chan []byte
	}{{router, atFar}, {far, atRouter}} {
		for _, size := range []int{0, 1, 100, 1400, 1600} {
			for range 100 { // more than fit into one read
				want := random(t, size)
				if err := way.from.Send(want); err != nil {
					t.Fatal(err)
				}
				if got := await(t, way.to, "a message"); !bytes.Equal(got, want) {
					t.Fatalf("%d bytes came as %d others", size, len(got))
				}
			}
		}
		var tooLarge *TooLargeError
		if err := way.from.Send(make([]byte, 1601)); !errors.As(err, &tooLarge) || tooLarge.Max != 1600 {
			t.Errorf("1601 bytes: %v", err)
		}
		if err := way.from.SendControl(make([]byte, maxWishes+1)); !errors.As(err, &tooLarge) || tooLarge.Max != maxWishes {
			t.Errorf("oversized control: %v", err)
		}
	}
	wishes := bytes.Repeat([]byte("w"), maxWishes)
	if err := errors.Join(router.SendControl(wishes), far.SendControl([]byte("state")), router.Send([]byte("after"))); err != nil {
		t.Fatal(err)
	}
	if got := await(t, configAtFar, "CONFIG"); !bytes.Equal(got, wishes) {
		t.Errorf("CONFIG came as %d bytes", len(got))
	}
	if got := await(t, stateAtRouter, "STATE"); string(got) != "state" {
		t.Errorf("STATE came as %q", got)
	}
	if got := await(t, atFar, "the message after CONFIG"); string(got) != "after" {
		t.Errorf("after CONFIG came %q", got)
	}
	if a := b.server.Activity()[b.routerID.PublicKey()]; a.PacketSessions != 1 || a.Received == 0 || a.Sent == 0 {
		t.Errorf("activity %+v", a)
	}
	_ = far.Close()
	await(t, router.Done(), "the end of the stream at the router")
	await(t, farEnded, "Receive at the concentrator")
	if err := await(t, routerEnded, "Receive at the router"); err == nil || router.Err() == nil || router.Send(nil) == nil {
		t.Errorf("after the end: Receive %v, Err %v, Send %v", err, router.Err(), router.Send(nil))
	}
}

// A peer that reads nothing: what it does not take waits with the sender, not in
// the kernel, and Send ends with the stream.
func TestStreamKeepsNoBacklogInTheKernel(t *testing.T) {
	b, _ := newQuietBond(t)
	for name, multipath := range map[string]bool{"MPTCP": true, "TCP": false} {
		peer := b.enrolledPeer()
		peer.Multipath = multipath
		m, _, err := peer.DialStream(t.Context(), b.loopback(), 1)
		if err != nil {
			t.Fatal(err)
		}
		await(t, b.carriers.attached, "the stream")
		s := m.(*stream)
		if s.session.multipath != multipath {
			t.Fatalf("%s: multipath %v", name, s.session.multipath)
		}
		ended := make(chan error, 1)
		go func() {
			for {
				if err := m.Send(make([]byte, 1500)); err != nil {
					ended <- err
					return
				}
			}
		}()
		for before := uint64(0); before == 0 || before != s.session.sent.Load(); {
			before = s.session.sent.Load()
			time.Sleep(300 * time.Millisecond)
		}
		waiting, err := s.session.wire.backlog(multipath)
		if err != nil {
			t.Fatal(err)
		}
		if unsent := waiting.unsent + waiting.stuckUnsent; unsent > mostUnsent+unwatched+maxMessage {
			t.Errorf("%s: %d bytes wait in the kernel: %+v", name, unsent, waiting)
		}
		if sent := s.session.sent.Load(); sent < 100_000 {
			t.Errorf("%s: only %d bytes were sent", name, sent)
		}
		_ = m.Close()
		await(t, ended, name+": Send on a closed stream")
	}
}

func TestRoom(t *testing.T) {
	info := func(unsent uint32, rate uint64, loss bool) *unix.TCPInfo {
		i := &unix.TCPInfo{Notsent_bytes: unsent, Delivery_rate: rate}
		if loss {
			i.Ca_state = tcpCALoss
		}
		return i
	}
	const slow, fast, huge = 125_000, 12_500_000, 1 << 40 // bytes/s
	for _, c := range []struct {
		name     string
		subflows []*unix.TCPInfo
		want     int
	}{
		{"none", nil, 0},
		{"a new one", []*unix.TCPInfo{info(0, 0, false)}, leastUnsent},
		{"a slow one still has two packets", []*unix.TCPInfo{info(0, slow, false)}, leastUnsent},
		{"10 ms of a fast one", []*unix.TCPInfo{info(0, fast, false)}, 125_000},
		{"bounded", []*unix.TCPInfo{info(0, huge, false)}, mostUnsent},
		{"full", []*unix.TCPInfo{info(125_000, fast, false)}, 0},
		{"over", []*unix.TCPInfo{info(200_000, fast, false)}, -75_000},
		{"both count", []*unix.TCPInfo{info(100_000, fast, false), info(10_000, slow, false)}, 125_000 + leastUnsent - 110_000},
		{"a dead one holds up nothing", []*unix.TCPInfo{info(900_000, fast, true), info(0, slow, false)}, leastUnsent},
		{"unless all are", []*unix.TCPInfo{info(900_000, fast, true)}, 125_000 - 900_000},
	} {
		var b backlog
		for _, i := range c.subflows {
			b.add(i)
		}
		if got := b.room(); got != c.want {
			t.Errorf("%s: room for %d, want %d", c.name, got, c.want)
		}
	}
}

func TestUses(t *testing.T) {
	for _, c := range []struct {
		hello    string
		kind     frameKind
		datagram bool
		want     use
		err      string
	}{
		{`{}`, frameHello, false, useFlows, ""},
		{`{}`, frameEnrol, false, useFlows, ""},
		{`{"role":"inbound"}`, frameHello, false, useInbound, ""},
		{`{"role":"packets","bond":"7"}`, frameHello, false, usePackets, ""},
		{`{"role":"packets","bond":"18446744073709551615","link":"dsl-1"}`, frameHello, true, useDatagrams, ""},
		{`{"role":"inbound"}`, frameEnrol, false, 0, "not to be asked for in ENROL"},
		{`{"role":"packets","bond":"7"}`, frameEnrol, false, 0, "not ENROL"},
		{`{"role":"video"}`, frameHello, false, 0, `role "video" is not known`},
		{`{}`, frameHello, true, 0, "over QUIC"},
		{`{"role":"inbound"}`, frameHello, true, 0, "over QUIC"},
		{`{"role":"packets"}`, frameHello, false, 0, "without a bond"},
		{`{"bond":"7"}`, frameHello, false, 0, "neither a bond nor a link"},
		{`{"role":"packets","bond":"7"}`, frameHello, true, 0, `link ""`},
		{`{"role":"packets","bond":"7","link":"A"}`, frameHello, true, 0, `link "A"`},
		{`{"role":"packets","bond":"7","link":"../x"}`, frameHello, false, 0, `link "../x"`},
		{`{"role":"packets","bond":"7","link":"123456789012345678901234567890123"}`, frameHello, true, 0, "1 to 32"},
	} {
		var h hello
		if err := json.Unmarshal([]byte(c.hello), &h); err != nil {
			t.Fatal(err)
		}
		got, err := useOf(h, c.kind, c.datagram)
		var refused *RefusedError
		if c.err == "" && (err != nil || got != c.want) ||
			c.err != "" && (!errors.As(err, &refused) || refused.Code != CodeProtocol || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%v %s: %v, %v; want %v, %q", c.kind, c.hello, got, err, c.want, c.err)
		}
	}
}

func TestInnerAddressesAreChecked(t *testing.T) {
	for text, ok := range map[string]bool{
		`{}`: true,
		`{"inner4":"10.83.0.2","gateway4":"10.83.0.1","inner6":"fd00::1","gateway6":"fd00::2"}`: true,
		`{"inner4":"fd00::1"}`:         false,
		`{"gateway6":"10.83.0.1"}`:     false,
		`{"inner6":"::ffff:10.0.0.1"}`: false,
		`{"inner6":"fe80::1%eth0"}`:    false,
		`{"inner4":"x"}`:               false,
	} {
		var w welcome
		err := json.Unmarshal([]byte(text), &w)
		if err == nil {
			_, err = w.inner()
		}
		if (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestUnknownRolesAreRefusedReadably(t *testing.T) {
	b, _ := newQuietBond(t)
	for _, h := range []string{`{"min":1,"max":1,"role":"video"}`, `{"min":1,"max":1,"role":"packets","bond":7}`, `{"min":1,"max":1,"role":"packets","bond":"-7"}`} {
		kind, body, err := b.first(b.routerID, appendFrame(nil, frameHello, []byte(h)))
		if err != nil || kind != frameRefuse || !strings.Contains(string(body), `"code":"protocol"`) {
			t.Errorf("%s: %v %s, %v", h, kind, body, err)
		}
	}
}

// Bytes that do not belong on a session that carries packets end it.
func TestBrokenFramesEndTheirStream(t *testing.T) {
	b, _ := newQuietBond(t)
	_, untouched := b.stream(1)
	atUntouched, _, _ := collect(untouched)
	for name, raw := range map[string][]byte{
		"open":             appendOpen(nil, 1, netip.MustParseAddrPort("192.0.2.1:80")),
		"data":             appendFrame(nil, frameData, []byte("x")),
		"end":              appendFrame(nil, frameEnd, nil),
		"state, to them":   appendFrame(nil, frameState, []byte("{}")),
		"unknown kind":     {77, 0, 0, 0},
		"oversized packet": {byte(framePacket), 0, 0x06, 0x41},
		"oversized config": {byte(frameConfig), 1, 0, 1},
	} {
		m, a := b.stream(2)
		ended := make(chan error, 1)
		go func() { ended <- a.Receive(Receiver{}) }()
		if err := m.(*stream).session.send(raw); err != nil {
			t.Fatal(err)
		}
		if err := await(t, ended, name); !errors.Is(err, errProtocol) {
			t.Errorf("%s: %v", name, err)
		}
		go func() { _ = m.Receive(Receiver{}) }()
		await(t, m.Done(), name+": the router's end")
	}
	m, a := b.stream(3)
	messages, _, _ := collect(a)
	if err := errors.Join(m.(*stream).session.send(appendFrame(nil, framePing, nil)), m.Send([]byte("x"))); err != nil {
		t.Fatal(err)
	}
	await(t, messages, "a message behind a PING")
	if isClosed(untouched.Done()) || len(atUntouched) > 0 {
		t.Error("another stream was touched")
	}
}

func TestStreamsAreBoundedAndRevoked(t *testing.T) {
	b, _ := newQuietBond(t)
	var ends []Messages
	for range mostOf[usePackets] {
		m, a := b.stream(1)
		go func() { _ = a.Receive(Receiver{}) }()
		ends = append(ends, m)
	}
	_, _, err := b.enrolledPeer().DialStream(t.Context(), b.loopback(), 1)
	var refused *RefusedError
	if !errors.As(err, &refused) || refused.Code != CodeBusy || !strings.Contains(refused.Message, "8 sessions for packets") {
		t.Fatalf("one more: %v", err)
	}
	_ = ends[0].Close()
	for { // counted out once the concentrator has seen it
		m, _, err := b.enrolledPeer().DialStream(t.Context(), b.loopback(), 1)
		if err == nil {
			ends[0] = m
			break
		}
		if !errors.As(err, &refused) || refused.Code != CodeBusy {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	b.admission.mu.Lock()
	delete(b.admission.routers, b.routerID.PublicKey())
	b.admission.mu.Unlock()
	b.server.Revoke(b.routerID.PublicKey())
	for _, m := range ends {
		go func() { _ = m.Receive(Receiver{}) }()
		await(t, m.Done(), "the end of a revoked router's stream")
	}
}

func TestDialStreamTakesThePathThatAnswers(t *testing.T) {
	b, _ := newQuietBond(t)
	paths := append([]Path{{Name: "gone", Sources: []netip.Addr{netip.MustParseAddr("192.0.2.77")}}}, b.loopback()...)
	m, _, err := b.enrolledPeer().DialStream(t.Context(), paths, 1)
	if err != nil {
		t.Fatal(err)
	}
	_ = m.Close()
	_, _, err = b.enrolledPeer().DialStream(t.Context(), paths[:1], 1)
	if err == nil || !strings.Contains(err.Error(), "from 192.0.2.77") {
		t.Errorf("only a path that is gone: %v", err)
	}
	if _, _, err = b.enrolledPeer().DialStream(t.Context(), nil, 1); err == nil {
		t.Error("dialled without a path")
	}
}

func TestRace(t *testing.T) {
	list := []attempt{{address: "a"}, {address: "b"}, {address: "c"}}
	fail := errors.New("no")
	for _, c := range []struct {
		name    string
		dial    func(context.Context, string) error
		want    string
		dropped string
	}{
		{"the first", func(context.Context, string) error { return nil }, "a", ""},
		{"the next after a failure", func(_ context.Context, a string) error {
			if a == "a" {
				return fail
			}
			return nil
		}, "b", ""},
		{"none", func(context.Context, string) error { return fail }, "", ""},
		{"the next beside one that hangs, which is then dropped", func(ctx context.Context, a string) error {
			if a == "a" {
				<-ctx.Done()
			}
			return nil
		}, "b", "a"},
	} {
		dropped := make(chan string, len(list))
		got, won, err := race[string]{
			dial: func(ctx context.Context, a attempt) (string, error) { return a.address, c.dial(ctx, a.address) },
			drop: func(s string) { dropped <- s },
		}.run(t.Context(), list)
		if got != c.want || won.address != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
		if c.dropped != "" && await(t, dropped, "the late one") != c.dropped {
			t.Errorf("%s: another was dropped", c.name)
		}
	}
}

// settled waits until no more goroutines run than before.
func settled(t *testing.T, before int) {
	t.Helper()
	for range 500 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	stacks := make([]byte, 1<<16)
	t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
}

func TestStreamsLeaveNothingBehind(t *testing.T) {
	b, _ := newQuietBond(t)
	m, a := b.stream(1)
	go func() { _ = a.Receive(Receiver{}) }()
	_ = m.Close()
	await(t, a.Done(), "the end")
	time.Sleep(100 * time.Millisecond)
	before, open := runtime.NumGoroutine(), descriptors(t)
	for range 5 {
		m, a := b.stream(1)
		_, _, routerEnded := collect(m)
		_, _, farEnded := collect(a)
		_ = m.Send([]byte("x"))
		_ = m.Close()
		await(t, routerEnded, "Receive at the router")
		await(t, farEnded, "Receive at the concentrator")
	}
	settled(t, before)
	if now := descriptors(t); now > open {
		t.Errorf("%d descriptors open, %d before", now, open)
	}
}
