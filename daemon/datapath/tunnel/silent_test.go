package tunnel

import (
	"io"
	"net"
	"testing"
	"time"
)

func TestVigil(t *testing.T) {
	for _, c := range []struct {
		name      string
		silence   time.Duration
		busy      bool
		asked     int
		ask, lost bool
	}{
		{"without a flow, the router asks", 60 * time.Second, false, 0, false, false},
		{"and is gone if it does not", idleTime + 1, false, 0, false, true},
		{"with a flow: heard of lately", pingAfter, true, 0, false, false},
		{"silent", pingAfter + 1, true, 0, true, false},
		{"for long, but this machine may have slept", time.Hour, true, 1, true, false},
		{"asked in vain", idleTime + 1, true, 2, false, true},
	} {
		if ask, lost := vigil(c.silence, c.busy, c.asked); ask != c.ask || lost != c.lost {
			t.Errorf("%s: ask %v, lost %v; want %v, %v", c.name, ask, lost, c.ask, c.lost)
		}
	}
}

// TestAskedDuringAFlow: the concentrator asks for a sign of life while a flow is
// open, which goes on.
func TestAskedDuringAFlow(t *testing.T) {
	b := newBond(t)
	client, _ := b.connect(destination(t, echo))
	once(t, client)
	at := only(t, b)
	for tries := 0; len(at.pong) == 0; tries++ {
		if tries == 100 {
			t.Fatal("the router does not answer")
		}
		at.ask() // in vain while the echo is being sent
		time.Sleep(20 * time.Millisecond)
	}
	once(t, client)
	at.lookAfter(time.Now())
	if at.asked != 0 {
		t.Error("it is asked though it was just heard")
	}
}

// TestAbandonedSession: the other end knows at once, and nothing is left to the
// kernel.
func TestAbandonedSession(t *testing.T) {
	b := newBond(t)
	client, relayed := b.connect(destination(t, echo))
	once(t, client)
	at := only(t, b)
	at.abandon(errSilent)
	if err := await(t, relayed, "the end of the flow"); err == nil {
		t.Error("the flow has ended well")
	}
	if at.token != 0 && b.server.Tokens()[at.token] {
		t.Error("it counts as alive")
	}
}

// once sends a little and waits for the echo; the flow stays open.
func once(t *testing.T, client *net.TCPConn) {
	t.Helper()
	_ = client.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := client.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
}

// only is the one session at the server that has a flow.
func only(t *testing.T, b *bond) *Session {
	t.Helper()
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	for s := range b.server.active {
		if s.busy() {
			return s
		}
	}
	t.Fatal("no session has a flow")
	return nil
}
