package webui

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"sheaf/daemon/control/settings"
)

// text is a settings text that holds under every rule of package settings.
const text = `version: 1
lan:
  interfaces: [lan0]
uplinks:
  - {name: dsl, interface: wan1, mode: on, address: {method: existing}}
multipath: {enabled: true, path_manager: fullmesh, scheduler: default, checksum: false, syn_retries: 2}
when_tunnel_down: direct
`

var when = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

// fakeRouter answers with its fields and notes what it was asked.
type fakeRouter struct {
	status Status
	flows  Flows
	events Events
	err    error
	hang   bool
	asked  string

	unconfirmed *settings.Unconfirmed
}

func (f *fakeRouter) answer(ctx context.Context, format string, args ...any) error {
	f.asked = fmt.Sprintf(format, args...)
	if f.hang {
		<-ctx.Done()
		return fmt.Errorf("wait for the kernel: %w", ctx.Err())
	}
	if f.err != nil && f.err.Error() == "panic" {
		panic("out of order")
	}
	return f.err
}

func (f *fakeRouter) revision(s settings.Settings) settings.Revision {
	return settings.Revision{Number: 7, Time: when, Author: "anna", Settings: s}
}

func (f *fakeRouter) Status(ctx context.Context) (Status, error) {
	return f.status, f.answer(ctx, "status")
}

func (f *fakeRouter) Settings(ctx context.Context) (settings.Revision, error) {
	s, err := settings.Parse([]byte(text))
	return f.revision(s), errors.Join(err, f.answer(ctx, "settings"))
}

// Revisions are three: 6 has other DNS than 7 and 5.
func (f *fakeRouter) Revisions(context.Context) ([]settings.Revision, error) {
	s, err := settings.Parse([]byte(text))
	before := s
	before.LAN.DNS = false
	return []settings.Revision{f.revision(s), {Number: 6, Time: when, Author: "bert", Settings: before}, {Number: 5, Time: when, Author: "anna", Settings: s}}, err
}

func (f *fakeRouter) Unconfirmed(context.Context) (*settings.Unconfirmed, error) {
	return f.unconfirmed, nil
}

func (f *fakeRouter) Apply(ctx context.Context, s settings.Settings, edit Edit) (settings.Revision, error) {
	return f.revision(s), f.answer(ctx, "apply %s %s dns %v by %s", s.Uplinks[0].Name, s.Uplinks[0].Mode, s.LAN.DNS, told(edit))
}

func (f *fakeRouter) SetUplink(ctx context.Context, name string, change UplinkChange, edit Edit) (settings.Revision, error) {
	b, _ := json.Marshal(change)
	return f.revision(settings.Settings{}), f.answer(ctx, "uplink %s %s by %s", name, b, told(edit))
}

func (f *fakeRouter) SetMultipath(ctx context.Context, change MultipathChange, edit Edit) (settings.Revision, error) {
	b, _ := json.Marshal(change)
	return f.revision(settings.Settings{}), f.answer(ctx, "multipath %s by %s", b, told(edit))
}

func told(e Edit) string {
	s := e.Author
	if e.Base != nil {
		s += fmt.Sprintf(" from %d", *e.Base)
	}
	if e.Confirm != 0 {
		s += fmt.Sprintf(" for %v", e.Confirm)
	}
	return s
}

func (f *fakeRouter) Confirm(ctx context.Context, revision uint64) (settings.Revision, error) {
	return f.revision(settings.Settings{}), f.answer(ctx, "confirm %d", revision)
}

func (f *fakeRouter) TakeBack(ctx context.Context, author string) (settings.Revision, error) {
	return f.revision(settings.Settings{}), f.answer(ctx, "take back by %s", author)
}

func (f *fakeRouter) Diagnose(ctx context.Context) (Diagnosis, error) {
	return Diagnosis{Verdict: "Everything works.", Healthy: true}, f.answer(ctx, "diagnose")
}

func (f *fakeRouter) History(ctx context.Context, name string, interval, span time.Duration) (History, error) {
	return History{Begin: when, IntervalS: int(interval / time.Second), RxBps: []*uint64{nil, new(uint64(8000))}}, f.answer(ctx, "history %s %v %v", name, interval, span)
}

func (f *fakeRouter) Flows(ctx context.Context, limit int) (Flows, error) {
	return f.flows, f.answer(ctx, "flows %d", limit)
}

func (f *fakeRouter) Events(ctx context.Context, after uint64, wait time.Duration) (Events, error) {
	return f.events, f.answer(ctx, "events %d %v", after, wait)
}

func (f *fakeRouter) Join(ctx context.Context, token string) (Joined, error) {
	return Joined{Concentrator: "fra1", Address: "192.0.2.1:4443", Fingerprint: "f00d"}, f.answer(ctx, "join %s", token)
}

// socketPath returns a path short enough for a socket, which t.TempDir may not be.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sheaf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// serve serves h on a unix socket for as long as the test runs.
func serve(t *testing.T, h http.Handler) *Client {
	t.Helper()
	path := socketPath(t)
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, h) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return NewClient(path)
}

type request struct {
	method, path, contentType, accept, body, ifMatch string
}

// raw makes a request as somebody other than Client would.
func raw(t *testing.T, c *Client, r request) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(r.method, "http://sheaf"+r.path, strings.NewReader(r.body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{"Content-Type": r.contentType, "Accept": r.accept, "If-Match": r.ifMatch} {
		if v != "" {
			req.Header.Set(k, v)
		}
	}
	res, err := c.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestRouterEndpoints(t *testing.T) {
	up := Status{Tunnel: TunnelStatus{State: "up"}}
	for name, test := range map[string]struct {
		request
		router fakeRouter
		status int
		mime   string
		asked  string
		body   []string // parts of it
	}{
		"alive": {request: request{method: "GET", path: "/healthz"},
			status: 200, mime: "application/json", body: []string{`"ok"`}},
		"ready": {request: request{method: "GET", path: "/readyz"}, router: fakeRouter{status: up},
			status: 200, mime: "application/json", asked: "status", body: []string{`"tunnel":"up"`}},
		"ready when degraded": {request: request{method: "GET", path: "/readyz"},
			router: fakeRouter{status: Status{Tunnel: TunnelStatus{State: "degraded"}}},
			status: 200, mime: "application/json", asked: "status", body: []string{`"tunnel":"degraded"`}},
		"not ready": {request: request{method: "GET", path: "/readyz"},
			router: fakeRouter{status: Status{Tunnel: TunnelStatus{State: "down", Reason: "no uplink is fit"}}},
			status: 503, mime: mimeProblem, asked: "status", body: []string{`"code":"tunnel_down"`, "no uplink is fit"}},
		"not ready in a state never heard of": {request: request{method: "GET", path: "/readyz"},
			status: 503, mime: mimeProblem, asked: "status", body: []string{`"code":"tunnel_down"`}},
		"status": {request: request{method: "GET", path: "/api/v1/status"}, router: fakeRouter{status: up},
			status: 200, mime: "application/json", asked: "status",
			body: []string{`"state":"up"`, `"uplinks":[]`, `"problems":[]`, `"interfaces":[]`, `"available_schedulers":[]`, `"available_path_managers":[]`,
				`"forwards":[]`, `"drops":{}`, `"dns":{"server":"","through":""}`}},
		"settings as JSON": {request: request{method: "GET", path: "/api/v1/settings"},
			status: 200, mime: "application/json", asked: "settings",
			body: []string{`"revision":7`, `"time":"2026-03-04T05:06:07Z"`, `"author":"anna"`, `"settings":{"version":1`, `"name":"dsl"`}},
		"settings as JSON for a browser": {request: request{method: "GET", path: "/api/v1/settings", accept: "text/html,*/*"},
			status: 200, mime: "application/json", asked: "settings"},
		"settings as YAML": {request: request{method: "GET", path: "/api/v1/settings", accept: mimeYAML},
			status: 200, mime: mimeYAML, asked: "settings", body: []string{"version: 1\n", "name: dsl"}},
		"apply YAML": {request: request{method: "PUT", path: "/api/v1/settings", contentType: mimeYAML, body: text},
			status: 200, mime: "application/json", asked: "apply dsl on dns true by socket", body: []string{`"revision":7`}},
		"apply JSON": {request: request{method: "PUT", path: "/api/v1/settings", contentType: "application/json; charset=utf-8",
			body: strings.ReplaceAll(jsonText(t), "dsl", "lte")},
			status: 200, mime: "application/json", asked: "apply lte on dns true by socket", body: []string{`"revision":7`}},
		"apply what the kernel does not have yet": {
			request: request{method: "PUT", path: "/api/v1/settings", contentType: mimeYAML, body: text},
			router:  fakeRouter{err: fmt.Errorf("apply: %w", &NotYet{Reason: "wan1 is busy"})},
			status:  202, mime: "application/json", asked: "apply dsl on dns true by socket", body: []string{`"revision":7`, `"warning":"wan1 is busy"`}},
		"apply what cannot be parsed": {
			request: request{method: "PUT", path: "/api/v1/settings", contentType: mimeYAML, body: text + "no_such_key: 1\n"},
			status:  422, mime: mimeProblem, body: []string{`"code":"settings_invalid"`, `"line":8`, "no_such_key"}},
		"apply what the daemon refuses": {
			request: request{method: "PUT", path: "/api/v1/settings", contentType: mimeYAML, body: text},
			router:  fakeRouter{err: &settings.Invalid{Problems: []settings.Problem{{Line: 3, Path: "lan.interfaces[0]", Reason: "taken"}}}},
			status:  422, mime: mimeProblem, asked: "apply dsl on dns true by socket",
			body: []string{`"type":"about:blank"`, `"title":"Unprocessable Entity"`, `"status":422`, `"problems":[{"line":3,"path":"lan.interfaces[0]","reason":"taken"}]`}},
		"mode": {request: request{method: "PUT", path: "/api/v1/uplinks/lte/mode", contentType: "application/json", body: `{"mode":"backup"}`},
			status: 200, mime: "application/json", asked: `uplink lte {"mode":"backup"} by socket`, body: []string{`"revision":7`}},
		"mode of a name with a slash": {request: request{method: "PUT", path: "/api/v1/uplinks/a%2Fb/mode", contentType: "application/json", body: `{"mode":"off"}`},
			status: 200, mime: "application/json", asked: `uplink a/b {"mode":"off"} by socket`},
		"mode of an unknown uplink": {request: request{method: "PUT", path: "/api/v1/uplinks/x/mode", contentType: "application/json", body: `{"mode":"on"}`},
			router: fakeRouter{err: &Error{Code: CodeUplinkUnknown, Detail: "no uplink is named x"}},
			status: 404, mime: mimeProblem, asked: `uplink x {"mode":"on"} by socket`, body: []string{`"code":"uplink_unknown"`, "no uplink is named x"}},
		"unknown mode": {request: request{method: "PUT", path: "/api/v1/uplinks/lte/mode", contentType: "application/json", body: `{"mode":"fast"}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, `"path":"mode"`, "backup"}},
		"rank of an uplink": {request: request{method: "PATCH", path: "/api/v1/uplinks/lte", contentType: "application/json", body: `{"weight":0,"preference":2}`},
			status: 200, mime: "application/json", asked: `uplink lte {"preference":2,"weight":0} by socket`, body: []string{`"revision":7`}},
		"nothing of an uplink": {request: request{method: "PATCH", path: "/api/v1/uplinks/lte", contentType: "application/json", body: `{}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "nothing is to be changed"}},
		"what uplinks do not have": {request: request{method: "PATCH", path: "/api/v1/uplinks/lte", contentType: "application/json", body: `{"price":1}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "price"}},
		"multipath": {request: request{method: "PATCH", path: "/api/v1/multipath", contentType: "application/json", body: `{"checksum":false,"syn_retries":3}`},
			status: 200, mime: "application/json", asked: `multipath {"checksum":false,"syn_retries":3} by socket`, body: []string{`"revision":7`}},
		"multipath with all": {request: request{method: "PATCH", path: "/api/v1/multipath", contentType: "application/json",
			body: `{"enabled":true,"path_manager":"default","scheduler":"x","checksum":true,"syn_retries":0}`},
			status: 200, mime: "application/json", asked: `multipath {"checksum":true,"enabled":true,"path_manager":"default","scheduler":"x","syn_retries":0} by socket`},
		"multipath with nothing": {request: request{method: "PATCH", path: "/api/v1/multipath", contentType: "application/json", body: `{}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "path_manager"}},
		"multipath with an unknown setting": {request: request{method: "PATCH", path: "/api/v1/multipath", contentType: "application/json", body: `{"speed":1}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "speed"}},
		"multipath refused": {request: request{method: "PATCH", path: "/api/v1/multipath", contentType: "application/json", body: `{"scheduler":"x"}`},
			router: fakeRouter{err: &settings.Invalid{Problems: []settings.Problem{{Path: "multipath.scheduler", Reason: "offered are default"}}}},
			status: 422, mime: mimeProblem, asked: `multipath {"scheduler":"x"} by socket`, body: []string{`"code":"settings_invalid"`, "offered are default"}},
		"diagnosis": {request: request{method: "GET", path: "/api/v1/diagnosis"},
			status: 200, mime: "application/json", asked: "diagnose", body: []string{`{"checks":[],"fix":"","healthy":true,"verdict":"Everything works."}`}},
		"history": {request: request{method: "GET", path: "/api/v1/uplinks/dsl/history"},
			status: 200, mime: "application/json", asked: "history dsl 10s 1h0m0s", body: []string{`"begin":"2026-03-04T05:06:07Z"`, `"rx_bps":[null,8000]`}},
		"a month of history": {request: request{method: "GET", path: "/api/v1/uplinks/dsl/history?interval_s=300&last_s=2678400"},
			status: 200, mime: "application/json", asked: "history dsl 5m0s 744h0m0s"},
		"another history": {request: request{method: "GET", path: "/api/v1/uplinks/dsl/history?interval_s=60"},
			status: 400, mime: mimeProblem, body: []string{`"path":"interval_s"`}},
		"flows": {request: request{method: "GET", path: "/api/v1/flows"},
			router: fakeRouter{flows: Flows{Total: 5, Flows: []Flow{{Client: "10.0.0.2:4000", Through: "direct"}}}},
			status: 200, mime: "application/json", asked: "flows 10000", body: []string{`"total":5`, `"client":"10.0.0.2:4000"`, `"uplinks":[]`, `"age_s":0`}},
		"no flows": {request: request{method: "GET", path: "/api/v1/flows?limit=1"},
			status: 200, mime: "application/json", asked: "flows 1", body: []string{`{"flows":[],"total":0}`}},
		"too many flows": {request: request{method: "GET", path: "/api/v1/flows?limit=10001"},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, `"path":"limit"`, "got 10,001, want 10,000"}},
		"less than one flow": {request: request{method: "GET", path: "/api/v1/flows?limit=0"},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`}},
		"all events": {request: request{method: "GET", path: "/api/v1/events"},
			status: 200, mime: "application/json", asked: "events 0 0s", body: []string{`{"events":[],"missed":0}`}},
		"events to come": {request: request{method: "GET", path: "/api/v1/events?after=7&wait=25"},
			router: fakeRouter{events: Events{Events: []Event{{ID: 9, Time: when, Kind: "uplink", Uplink: "dsl", Text: "off"}}, Missed: 1}},
			status: 200, mime: "application/json", asked: "events 7 25s",
			body: []string{`{"events":[{"id":9,"kind":"uplink","text":"off","time":"2026-03-04T05:06:07Z","uplink":"dsl"}],"missed":1}`}},
		"events after a word": {request: request{method: "GET", path: "/api/v1/events?after=now"},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "after", "now"}},
		"waiting for ever": {request: request{method: "GET", path: "/api/v1/events?wait=26"},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "wait", "25"}},
		"one waits too many": {request: request{method: "GET", path: "/api/v1/events?wait=1"},
			router: fakeRouter{err: &Error{Code: CodeTooManyWaiting}},
			status: 503, mime: mimeProblem, asked: "events 0 1s", body: []string{`"code":"too_many_waiting"`}},
		"join": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json", body: `{"token":"abc"}`},
			status: 200, mime: "application/json", asked: "join abc", body: []string{`{"address":"192.0.2.1:4443","concentrator":"fra1","fingerprint":"f00d"}`}},
		"join without token": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json", body: `{}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`}},
		"join with a used token": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json", body: `{"token":"abc"}`},
			router: fakeRouter{err: fmt.Errorf("enrol: %w", &Error{Code: CodeTokenUsed, Detail: "ask for another"})},
			status: 409, mime: mimeProblem, asked: "join abc", body: []string{`"code":"token_used"`}},
		"join with nobody there": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json", body: `{"token":"abc"}`},
			router: fakeRouter{err: &Error{Code: CodeConcentratorUnreachable}},
			status: 502, mime: mimeProblem, asked: "join abc", body: []string{`"code":"concentrator_unreachable"`}},
		"status chosen by the daemon": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json", body: `{"token":"abc"}`},
			router: fakeRouter{err: &Error{Code: "of_its_own", Status: 418}},
			status: 418, mime: mimeProblem, asked: "join abc", body: []string{`"code":"of_its_own"`, `"status":418`}},

		"unknown field": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json", body: `{"token":"abc","force":true}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "force"}},
		"two values": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json", body: `{"token":"abc"} {}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`}},
		"wrong type of field": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json", body: `{"token":1}`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "token"}},
		"no body": {request: request{method: "POST", path: "/api/v1/join", contentType: "application/json"},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`}},
		"a form": {request: request{method: "POST", path: "/api/v1/join", contentType: "text/plain", body: `{"token":"abc"}`},
			status: 415, mime: mimeProblem, body: []string{`"code":"unsupported_media_type"`, "application/json"}},
		"a body at the limit": {request: request{method: "PUT", path: "/api/v1/settings", contentType: mimeYAML, body: padded(text, maxBody)},
			status: 200, mime: "application/json", asked: "apply dsl on dns true by socket"},
		"a body over the limit": {request: request{method: "PUT", path: "/api/v1/settings", contentType: mimeYAML, body: padded(text, maxBody+1)},
			status: 413, mime: mimeProblem, body: []string{`"code":"body_too_large"`, "1048576"}},
		"nothing there": {request: request{method: "GET", path: "/api/v1/nothing"},
			status: 404, mime: mimeProblem, body: []string{`"code":"not_found"`, "/api/v1/nothing"}},
		"no such method": {request: request{method: "DELETE", path: "/api/v1/status"},
			status: 405, mime: mimeProblem, body: []string{`"code":"method_not_allowed"`}},
		"not of this daemon": {request: request{method: "GET", path: "/api/v1/routers"},
			status: 404, mime: mimeProblem, body: []string{`"code":"not_found"`}},
		"a parameter of another operation": {request: request{method: "GET", path: "/api/v1/flows?after=1"},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "after", "limit"}},
		"a body nobody asked for": {request: request{method: "GET", path: "/api/v1/flows", contentType: "application/json", body: "{}"},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`}},
		"two faults": {request: request{method: "PUT", path: "/api/v1/uplinks/lte/mode", contentType: "application/json", body: `{"mode":7,"speed":1}`},
			status: 400, mime: mimeProblem, body: []string{`"path":"mode"`, `speed`}},
		"the contract": {request: request{method: "GET", path: "/api/v1/openapi.json"},
			status: 200, mime: "application/json", body: []string{`"openapi":"3.1.0"`, `"/settings"`}},

		"from a revision": {request: request{method: "PUT", path: "/api/v1/uplinks/lte/mode", contentType: "application/json", body: `{"mode":"off"}`, ifMatch: `"7"`},
			status: 200, mime: "application/json", asked: `uplink lte {"mode":"off"} by socket from 7`},
		"from no revision": {request: request{method: "PUT", path: "/api/v1/uplinks/lte/mode", contentType: "application/json", body: `{"mode":"off"}`, ifMatch: `7`},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, "If-Match"}},
		"from a revision beyond all": {request: request{method: "PATCH", path: "/api/v1/multipath", contentType: "application/json", body: `{"checksum":true}`, ifMatch: `"99999999999999999999"`},
			status: 200, mime: "application/json", asked: `multipath {"checksum":true} by socket from 18446744073709551615`},
		"from an older revision": {request: request{method: "PUT", path: "/api/v1/settings", contentType: mimeYAML, body: text, ifMatch: `"6"`},
			router: fakeRouter{err: &Stale{Base: 6, Current: settings.Revision{Number: 7, Author: "bert"}, Changes: []settings.Change{{Path: "uplinks[dsl].mode", From: "on", To: "off"}}}},
			status: 412, mime: mimeProblem, asked: "apply dsl on dns true by socket from 6",
			body: []string{`"code":"revision_stale"`, "revision 7 by bert", `{"path":"uplinks[dsl].mode","reason":"was \"on\", is \"off\""}`}},
		"for a time": {request: request{method: "PUT", path: "/api/v1/settings?confirm_s=120", contentType: mimeYAML, body: text},
			router: fakeRouter{unconfirmed: &settings.Unconfirmed{Revision: 7, BackTo: 5, Deadline: when, Wait: time.Minute}},
			status: 200, mime: "application/json", asked: "apply dsl on dns true by socket for 2m0s",
			body: []string{`"unconfirmed":{"back_to":5,"deadline":"2026-03-04T05:06:07Z","remaining_s":`, `"revision":7}`}},
		"for two hours": {request: request{method: "PUT", path: "/api/v1/settings?confirm_s=7200", contentType: mimeYAML, body: text},
			status: 400, mime: mimeProblem, body: []string{`"path":"confirm_s"`}},
		"with others unconfirmed": {request: request{method: "PUT", path: "/api/v1/settings", contentType: mimeYAML, body: text},
			router: fakeRouter{err: settings.ErrUnconfirmed}, asked: "apply dsl on dns true by socket",
			status: 409, mime: mimeProblem, body: []string{`"code":"unconfirmed"`, "sheafctl confirm"}},
		"confirm": {request: request{method: "POST", path: "/api/v1/confirm", contentType: "application/json", body: `{"revision":7}`},
			status: 200, mime: "application/json", asked: "confirm 7", body: []string{`"revision":7`}},
		"confirm nothing": {request: request{method: "POST", path: "/api/v1/confirm", contentType: "application/json", body: `{"revision":7}`},
			router: fakeRouter{err: fmt.Errorf("revision 7: %w", settings.ErrNothingUnconfirmed)}, asked: "confirm 7",
			status: 409, mime: mimeProblem, body: []string{`"code":"nothing_unconfirmed"`}},
		"take back": {request: request{method: "DELETE", path: "/api/v1/confirm"},
			status: 200, mime: "application/json", asked: "take back by socket", body: []string{`"revision":7`}},
		"changes that would be": {request: request{method: "POST", path: "/api/v1/settings/changes", contentType: mimeYAML, body: strings.Replace(text, "syn_retries: 2", "syn_retries: 3", 1)},
			status: 200, mime: "application/json", asked: "settings", body: []string{`{"changes":[{"path":"multipath.syn_retries","from":"2","to":"3"}]}`}},
		"changes of what is wrong": {request: request{method: "POST", path: "/api/v1/settings/changes", contentType: mimeYAML, body: text + "speed: 1\n"},
			status: 422, mime: mimeProblem, body: []string{`"code":"settings_invalid"`, `"line":8`}},
		"all revisions": {request: request{method: "GET", path: "/api/v1/revisions"},
			status: 200, mime: "application/json",
			body: []string{`{"author":"anna","changes":[{"path":"lan.dns","from":"false","to":"true"}],"revision":7,"time":"2026-03-04T05:06:07Z"}`, `{"author":"bert","changes":[{"path":"lan.dns","from":"true","to":"false"}],"revision":6`, `"changes":[],"revision":5`}},
		"one revision": {request: request{method: "GET", path: "/api/v1/revisions/6"},
			status: 200, mime: "application/json", body: []string{`"author":"bert"`, `"dns":false`}},
		"a revision not kept": {request: request{method: "GET", path: "/api/v1/revisions/4"},
			status: 404, mime: mimeProblem, body: []string{`"code":"revision_unknown"`, "revision 4"}},
		"a revision by name": {request: request{method: "GET", path: "/api/v1/revisions/last"},
			status: 400, mime: mimeProblem, body: []string{`"code":"bad_request"`, `"path":"revision"`}},
		"back to a revision": {request: request{method: "GET", path: "/api/v1/revisions/6/changes"},
			status: 200, mime: "application/json", asked: "settings", body: []string{`{"changes":[{"path":"lan.dns","from":"true","to":"false"}]}`}},
		"between revisions": {request: request{method: "GET", path: "/api/v1/revisions/7/changes?from=5"},
			status: 200, mime: "application/json", body: []string{`{"changes":[]}`}},
		"restore": {request: request{method: "POST", path: "/api/v1/revisions/6/restore?confirm_s=60"},
			status: 200, mime: "application/json", asked: "apply dsl on dns false by socket for 1m0s"},
		"restore what is not kept": {request: request{method: "POST", path: "/api/v1/revisions/4/restore"},
			status: 404, mime: mimeProblem, body: []string{`"code":"revision_unknown"`}},
		"what JSON has no words for": {request: request{method: "GET", path: "/api/v1/status"},
			router: fakeRouter{status: Status{Uplinks: []UplinkStatus{{Loss: new(math.NaN())}}}},
			status: 500, mime: mimeProblem, asked: "status", body: []string{`"code":"internal"`}},
	} {
		t.Run(name, func(t *testing.T) {
			client := serve(t, NewRouterHandler(&test.router, nil, quiet()))
			res, body := raw(t, client, test.request)
			mime, _, _ := strings.Cut(res.Header.Get("Content-Type"), ";")
			if res.StatusCode != test.status || mime != test.mime {
				t.Errorf("got %d %s, want %d %s\n%s", res.StatusCode, mime, test.status, test.mime, body)
			}
			if test.router.asked != test.asked {
				t.Errorf("the router was asked %q, want %q", test.router.asked, test.asked)
			}
			for _, part := range test.body {
				if !strings.Contains(body, part) {
					t.Errorf("%s\nis not in\n%s", part, body)
				}
			}
		})
	}
}

// jsonText is text in JSON, in one line.
func jsonText(t *testing.T) string {
	t.Helper()
	s, err := settings.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func padded(s string, size int) string {
	return s + "#" + strings.Repeat("x", size-len(s)-1)
}

// What the daemon did not mean for the operator goes to the log and not further.
func TestFailuresAreLoggedNotTold(t *testing.T) {
	for name, test := range map[string]struct {
		router fakeRouter
		status int
		code   string
		logged string
	}{
		"unknown error": {fakeRouter{err: errors.New("bbolt: page 3 is secret")}, 500, CodeInternal, "page 3 is secret"},
		"panic":         {fakeRouter{err: errors.New("panic")}, 500, CodeInternal, "out of order"},
		"timeout":       {fakeRouter{hang: true}, 504, CodeTimeout, "wait for the kernel"},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			client := serve(t, newRouterHandler(&test.router, nil, slog.New(slog.NewTextHandler(&log, nil)), 50*time.Millisecond, func(*gin.Context) {}))
			_, err := client.Status(t.Context())
			var coded *Error
			if !errors.As(err, &coded) || coded.Code != test.code || coded.Status != test.status {
				t.Fatalf("got %#v, want code %s with status %d", err, test.code, test.status)
			}
			if strings.Contains(err.Error(), test.logged) {
				t.Errorf("the client was told %q", err)
			}
			if !strings.Contains(log.String(), test.logged) {
				t.Errorf("%q is not in the log:\n%s", test.logged, log.String())
			}
		})
	}
}

// The client is the other end of every endpoint: what goes in comes out.
func TestClient(t *testing.T) {
	ctx := t.Context()
	want := Status{Version: "1.2", Tunnel: TunnelStatus{State: "up", Flows: 3},
		Uplinks:   []UplinkStatus{{Name: "dsl", RTTMs: new(12.5), Carrier: "stream", CarrierReason: "UDP is lost", PacketLoss: new(0.25)}},
		Packets:   PacketStatus{State: "up", Address4: "10.83.0.7", MTU: 1400, Drops: map[string]uint64{"late": 2}},
		Forwards:  []ForwardStatus{{Name: "web", Protocol: "tcp", Port: 8080, To: "192.168.1.10:80", Source: "client", State: "active"}},
		DNS:       DNSStatus{Server: "10.83.0.1", Through: "tunnel"},
		Problems:  []string{"a problem"},
		LAN:       LANStatus{Interfaces: []InterfaceStatus{{Name: "lan0", Present: true}}},
		Multipath: MultipathStatus{AvailableSchedulers: []string{"default"}, AvailablePathManagers: []string{"fullmesh"}}}
	router := &fakeRouter{status: want,
		flows: Flows{Total: 2, Flows: []Flow{{Client: "10.0.0.2:4000", Destination: "192.0.2.1:443", Inbound: true, Through: "tunnel", Since: when,
			AgeS: 1.5, UpBytes: 3, DownBytes: 4, Uplinks: []UplinkBytes{{Name: "dsl", Address: "192.0.2.2", UpBytes: 1, DownBytes: 2}}}}},
		events: Events{Events: []Event{{ID: 9, Time: when, Kind: "tunnel", Text: "up"}}, Missed: 3}}
	c := serve(t, NewRouterHandler(router, nil, quiet()))

	status, err := c.Status(ctx)
	check(t, err, status, want)

	parsed, err := settings.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	rev := Revision{Number: 7, Time: when, Author: "anna", Settings: parsed}
	got, err := c.Settings(ctx)
	check(t, err, got, rev)
	got, err = c.Apply(ctx, []byte(text), 0)
	check(t, err, got, rev)
	got, err = c.SetUplink(ctx, "a/b c", UplinkChange{Mode: new(settings.Backup), Weight: new(3)})
	check(t, err, got, Revision{Number: 7, Time: when, Author: "anna"})
	check(t, nil, router.asked, `uplink a/b c {"mode":"backup","weight":3} by socket`)
	change := MultipathChange{Checksum: new(true), Scheduler: new("default")}
	got, err = c.SetMultipath(ctx, change)
	check(t, err, got, Revision{Number: 7, Time: when, Author: "anna"})
	check(t, nil, router.asked, `multipath {"checksum":true,"scheduler":"default"} by socket`)
	flows, err := c.Flows(ctx, 5)
	check(t, err, flows, router.flows)
	check(t, nil, router.asked, "flows 5")
	for wait, asked := range map[bool]string{false: "events 7 0s", true: "events 7 25s"} {
		events, err := c.Events(ctx, 7, wait)
		check(t, err, events, router.events)
		check(t, nil, router.asked, asked)
	}
	got, err = c.Apply(ctx, []byte(text), 90*time.Second)
	check(t, err, got, rev)
	check(t, nil, router.asked, "apply dsl on dns true by socket for 1m30s")
	changes, err := c.Compare(ctx, []byte(strings.Replace(text, "mode: on", "mode: off", 1)))
	check(t, err, changes, []settings.Change{{Path: "uplinks[dsl].mode", From: "on", To: "off"}})
	revisions, err := c.Revisions(ctx)
	check(t, err, revisions[1], RevisionSummary{Number: 6, Time: when, Author: "bert", Changes: []settings.Change{{Path: "lan.dns", From: "true", To: "false"}}})
	_, err = c.Restore(ctx, 6, time.Minute)
	check(t, err, router.asked, "apply dsl on dns false by socket for 1m0s")
	_, err = c.Confirm(ctx, 7)
	check(t, err, router.asked, "confirm 7")
	_, err = c.TakeBack(ctx)
	check(t, err, router.asked, "take back by socket")
	joined, err := c.Join(ctx, "abc")
	check(t, err, joined, Joined{Concentrator: "fra1", Address: "192.0.2.1:4443", Fingerprint: "f00d"})

	router.err = &NotYet{Reason: "wan1 is busy"}
	got, err = c.Apply(ctx, []byte(text), 0)
	rev.Warning = "wan1 is busy"
	check(t, err, got, rev)

	problems := []settings.Problem{{Line: 3, Path: "lan", Reason: "taken"}, {Reason: "too many"}}
	router.err = &settings.Invalid{Problems: problems}
	_, err = c.Apply(ctx, []byte(text), 0)
	var invalid *settings.Invalid
	if !errors.As(err, &invalid) {
		t.Fatalf("got %#v, want *settings.Invalid", err)
	}
	check(t, nil, invalid.Problems, problems)

	router.err = &Error{Code: CodeTokenExpired, Detail: "expired at noon"}
	_, err = c.Join(ctx, "abc")
	var coded *Error
	if !errors.As(err, &coded) {
		t.Fatalf("got %#v, want *Error", err)
	}
	check(t, nil, *coded, Error{Code: CodeTokenExpired, Status: 410, Detail: "expired at noon"})
	check(t, nil, err.Error(), "expired at noon")

	router.asked = ""
	if _, err = c.Apply(ctx, make([]byte, maxBody+1), 0); err == nil || router.asked != "" {
		t.Errorf("settings over the limit: got %v, and the router was asked %q", err, router.asked)
	}
}

func check(t *testing.T, err error, got, want any) {
	t.Helper()
	if err != nil {
		t.Error(err)
	} else if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Only what is named changes.
func TestMultipathChange(t *testing.T) {
	before := settings.Multipath{Enabled: true, PathManager: "fullmesh", Scheduler: "default", SYNRetries: 2}
	for name, c := range map[string]struct {
		change MultipathChange
		want   settings.Multipath
	}{
		"nothing": {MultipathChange{}, before},
		"one":     {MultipathChange{Checksum: new(true)}, settings.Multipath{Enabled: true, PathManager: "fullmesh", Scheduler: "default", Checksum: true, SYNRetries: 2}},
		"all to nothing": {MultipathChange{Enabled: new(false), PathManager: new(settings.PathManager("default")), Scheduler: new("x"), SYNRetries: new(0)},
			settings.Multipath{PathManager: "default", Scheduler: "x"}},
	} {
		if got := c.change.Of(before); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}
