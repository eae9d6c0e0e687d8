package router

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"sheaf/webui"
)

func TestWhatHasHappened(t *testing.T) {
	uplink := func(name, state, reason string) webui.UplinkStatus {
		return webui.UplinkStatus{Name: name, State: state, Reason: reason, Address: "10.1.0.2"}
	}
	with := func(u webui.UplinkStatus, change func(*webui.UplinkStatus)) webui.UplinkStatus {
		change(&u)
		return u
	}
	uplinks := func(list ...webui.UplinkStatus) moment { return moment{uplinks: list} }
	for _, c := range []struct {
		name        string
		before, now moment
		want        string
	}{
		{"nothing", uplinks(uplink("a", "carrying", "")), uplinks(uplink("a", "carrying", "")), ""},
		{"the first look", moment{}, moment{uplinks: []webui.UplinkStatus{uplink("a", "carrying", "")}, tunnel: webui.TunnelStatus{State: "up"}, reached: "203.0.113.1:4443"},
			"uplink a carrying|concentrator  reached at 203.0.113.1:4443|tunnel  up"},
		{"silent", uplinks(uplink("a", "carrying", "")), uplinks(uplink("a", "unfit", "silent since noon")), "uplink a unfit: silent since noon"},
		{"another reason", uplinks(uplink("a", "unfit", "no answer in 400 ms")), uplinks(uplink("a", "unfit", "no answer in 800 ms")), ""},
		{"back", uplinks(uplink("a", "unfit", "silent")), uplinks(uplink("a", "carrying", "")), "uplink a carrying"},
		{"several", uplinks(uplink("a", "carrying", ""), uplink("b", "off", "x"), uplink("c", "standby", "")),
			uplinks(uplink("a", "absent", "gone"), uplink("b", "off", "x"), uplink("c", "carrying", "")), "uplink a absent: gone|uplink c carrying"},
		{"in another order", uplinks(uplink("a", "carrying", ""), uplink("b", "off", "x")), uplinks(uplink("b", "off", "x"), uplink("a", "carrying", "")), ""},
		{"another address", uplinks(uplink("a", "carrying", "")), uplinks(with(uplink("a", "carrying", ""), func(u *webui.UplinkStatus) { u.Address = "10.1.0.9" })),
			"uplink a its address is 10.1.0.9, was 10.1.0.2"},
		{"no address, said with its state", uplinks(uplink("a", "carrying", "")), uplinks(with(uplink("a", "unfit", "no address"), func(u *webui.UplinkStatus) { u.Address = "" })),
			"uplink a unfit: no address"},
		{"stripped", uplinks(uplink("a", "carrying", "")), uplinks(with(uplink("a", "carrying", ""), func(u *webui.UplinkStatus) { u.PlainTCP = true })),
			"uplink a plain TCP: something on its path strips MPTCP"},
		{"no longer stripped", uplinks(with(uplink("a", "carrying", ""), func(u *webui.UplinkStatus) { u.PlainTCP = true })), uplinks(uplink("a", "carrying", "")),
			"uplink a no longer plain TCP"},
		{"a leg", uplinks(uplink("a", "unfit", "x")), uplinks(with(uplink("a", "carrying", ""), func(u *webui.UplinkStatus) { u.Leg, u.LegReason = "udp", stripped })),
			"uplink a carrying|uplink a its subflows go through a leg over udp: " + stripped},
		{"no leg", uplinks(with(uplink("a", "carrying", ""), func(u *webui.UplinkStatus) { u.Leg, u.LegReason = "udp", stripped })), uplinks(uplink("a", "carrying", "")),
			"uplink a no longer through a leg over udp"},
		{"new and gone", uplinks(uplink("a", "carrying", "")), uplinks(uplink("b", "off", "x")), "uplink b off: x|uplink a no longer in the settings"},
		{"lost", moment{reached: "203.0.113.1:4443", tunnel: webui.TunnelStatus{State: "up"}}, moment{tunnel: webui.TunnelStatus{State: "down", Reason: "no answer"}},
			"concentrator  lost: no answer|tunnel  down: no answer"},
		{"reached at another address", moment{reached: "203.0.113.1:4443"}, moment{reached: "203.0.113.2:4443"}, ""},
		{"a conflict, and none", moment{kernel: []string{"x is changed by another", "y"}}, moment{kernel: []string{"y", "z is not offered"}},
			"kernel  z is not offered|kernel  no longer: x is changed by another"},
	} {
		var got []string
		for _, e := range happened(c.before, c.now) {
			got = append(got, e.Kind+" "+e.Uplink+" "+e.Text)
		}
		if strings.Join(got, "|") != c.want {
			t.Errorf("%s: %v, want %s", c.name, got, c.want)
		}
	}
}

func number(n int) webui.Event { return webui.Event{Kind: "daemon", Text: fmt.Sprint(n)} }

func TestEventsAreBoundedAndInOrder(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	e := newEvents(now)
	first := uint64(now.UnixMicro())
	after := func(id uint64) (string, uint64) {
		t.Helper()
		list, err := e.after(t.Context(), id, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i, event := range list.Events {
			if i > 0 && event.ID != list.Events[i-1].ID+1 {
				t.Errorf("%d follows %d", event.ID, list.Events[i-1].ID)
			}
		}
		if len(list.Events) == 0 {
			return "", list.Missed
		}
		return list.Events[0].Text + "-" + list.Events[len(list.Events)-1].Text, list.Missed
	}
	check := func(id uint64, want string, missed uint64) {
		t.Helper()
		if got, m := after(id); got != want || m != missed {
			t.Errorf("after %d: %s, %d missed; want %s, %d", id, got, m, want, missed)
		}
	}
	check(0, "", 0)
	for n := range 10 {
		e.add(now, number(n))
	}
	check(0, "0-9", 0)
	check(first, "1-9", 0)
	check(first+8, "9-9", 0)
	check(first+9, "", 0)
	check(first-5, "0-9", 0)        // of an earlier start
	check(first+10, "0-9", 0)       // of one whose clock was ahead
	check(1<<64-1, "0-9", 0)        // of nobody
	for n := range maxEvents + 20 { // 30 more than are kept
		e.add(now, number(10+n))
	}
	check(0, fmt.Sprintf("30-%d", maxEvents+29), 30)
	check(first+9, fmt.Sprintf("30-%d", maxEvents+29), 20)
	check(first+29, fmt.Sprintf("30-%d", maxEvents+29), 0)
	check(first+uint64(maxEvents)+28, fmt.Sprintf("%d-%[1]d", maxEvents+29), 0)

	e.add(now, webui.Event{Text: strings.Repeat("ä", maxEventText)})
	list, _ := e.after(t.Context(), first+uint64(maxEvents)+29, 0)
	if text := list.Events[0].Text; len(text) > maxEventText+len("…") || !strings.HasSuffix(text, "ä…") {
		t.Errorf("a long text: %d bytes, %s", len(text), text)
	}
}

func TestWaitingForEvents(t *testing.T) {
	e := newEvents(time.Now())
	type answer struct {
		list webui.Events
		err  error
	}
	ask := func(ctx context.Context) <-chan answer {
		c := make(chan answer, 1)
		go func() {
			list, err := e.after(ctx, 0, time.Hour)
			c <- answer{list, err}
		}()
		return c
	}
	waiting := func(want int) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			e.mu.Lock()
			n := e.waiting
			e.mu.Unlock()
			if n == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d wait, want %d", n, want)
			}
		}
	}
	leaving, leave := context.WithCancel(t.Context())
	gone := ask(leaving)
	waiting(1)
	leave()
	if a := <-gone; a.err != nil || len(a.list.Events) > 0 {
		t.Errorf("who leaves gets %+v", a)
	}
	waiting(0)

	var all []<-chan answer
	for range maxWaiting {
		all = append(all, ask(t.Context()))
	}
	waiting(maxWaiting)
	var refused *webui.Error
	if _, err := e.after(t.Context(), 0, time.Hour); !errors.As(err, &refused) || refused.Code != webui.CodeTooManyWaiting {
		t.Errorf("one too many: %v", err)
	}
	if _, err := e.after(t.Context(), 0, 0); err != nil {
		t.Errorf("one that does not wait: %v", err)
	}
	e.add(time.Now(), number(1))
	for _, c := range all {
		if a := <-c; a.err != nil || len(a.list.Events) != 1 || a.list.Events[0].Text != "1" {
			t.Errorf("who waits gets %+v", a)
		}
	}
	waiting(0)

	e.mu.Lock()
	e.ring = nil
	e.mu.Unlock()
	last := ask(t.Context())
	waiting(1)
	e.close()
	if a := <-last; !errors.As(a.err, &refused) || refused.Code != webui.CodeStopping {
		t.Errorf("at the end: %+v", a)
	}
	e.add(time.Now(), number(2)) // too late, and no panic
}

func TestEventsAtOnce(t *testing.T) {
	e := newEvents(time.Now())
	var adding sync.WaitGroup
	for range 4 {
		adding.Go(func() {
			for n := range 500 {
				e.add(time.Now(), number(n))
			}
		})
	}
	seen, last := uint64(0), uint64(0)
	for seen < 2000 {
		list, err := e.after(t.Context(), last, 10*time.Second)
		if err != nil || len(list.Events) == 0 {
			t.Fatalf("after %d: %v, %v", seen, list, err)
		}
		seen += list.Missed + uint64(len(list.Events))
		last = list.Events[len(list.Events)-1].ID
	}
	adding.Wait()
	if seen != 2000 {
		t.Errorf("%d events, want 2000", seen)
	}
}
