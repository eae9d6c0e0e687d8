package webui

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// liveRouter has events when the test says so.
type liveRouter struct {
	*fakeRouter
	news chan Event
}

func (r liveRouter) Events(ctx context.Context, after uint64, wait time.Duration) (Events, error) {
	if wait == 0 {
		return Events{Events: []Event{{ID: 40}, {ID: 41}}}, nil
	}
	select {
	case e, ok := <-r.news:
		if !ok {
			return Events{}, &Error{Code: CodeStopping}
		}
		if e.ID <= after {
			return Events{}, fmt.Errorf("%d after %d", e.ID, after)
		}
		return Events{Events: []Event{e}}, nil
	case <-ctx.Done():
		return Events{}, nil
	}
}

// stream is what a client of GET /live hears.
type stream struct {
	t     *testing.T
	lines chan string // closed at the end
}

func listen(t *testing.T, server *httptest.Server, header http.Header) *stream {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", server.URL+"/api/v1/live", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header = header
	response, err := server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { response.Body.Close() })
	if kind := response.Header.Get("Content-Type"); response.StatusCode != 200 || kind != "text/event-stream" {
		t.Fatalf("%s %s", response.Status, kind)
	}
	s := &stream{t, make(chan string, 1000)}
	go func() {
		defer close(s.lines)
		for b := bufio.NewScanner(response.Body); b.Scan(); {
			s.lines <- b.Text()
		}
	}()
	return s
}

// until waits for a line that begins so, and returns those before it.
func (s *stream) until(begin string) (before []string) {
	s.t.Helper()
	late := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-s.lines:
			if !ok && begin == "" {
				return before
			}
			if !ok {
				s.t.Fatalf("the stream ended without %q: %q", begin, before)
			}
			if begin != "" && strings.HasPrefix(line, begin) {
				return before
			}
			before = append(before, line)
		case <-late:
			s.t.Fatalf("no %q: %q", begin, before)
		}
	}
}

func TestLive(t *testing.T) {
	access, _, _ := newAccess(t)
	session, err := access.Claim(t.Context(), good, lanClient)
	if err != nil {
		t.Fatal(err)
	}
	router := liveRouter{&fakeRouter{status: Status{Version: "1.2"}}, make(chan Event)}
	server := httptest.NewTLSServer(NewPanelHandler(router, access, quiet()))
	t.Cleanup(server.Close)
	cookie := http.Header{"Cookie": {cookieName + "=" + session}}
	s := listen(t, server, cookie)
	for range 2 { // one a second
		if before := s.until(`data: {"concentrator":`); before[len(before)-1] != "event: status" {
			t.Errorf("the status comes behind %q", before)
		}
	}
	router.news <- Event{ID: 42, Time: when, Kind: "tunnel", Text: "up"}
	if before := s.until(`data: {"id":42,"kind":"tunnel","text":"up"`); len(before) < 2 || before[len(before)-2] != "id: 42" || before[len(before)-1] != "event: event" {
		t.Errorf("the event comes behind %q", before)
	}

	// Who has logged out hears no more.
	who, _, err := access.Session(session)
	if err != nil {
		t.Fatal(err)
	}
	if err := access.Logout(who); err != nil {
		t.Fatal(err)
	}
	s.until("")

	// A daemon that stops ends all.
	if session, err = access.Login(t.Context(), good, lanClient); err != nil {
		t.Fatal(err)
	}
	cookie = http.Header{"Cookie": {cookieName + "=" + session}, "Last-Event-Id": {"7"}}
	s = listen(t, server, cookie)
	router.news <- Event{ID: 8, Time: when, Kind: "tunnel", Text: "down"}
	s.until(`data: {"id":8`)
	close(router.news)
	s.until("")
}
