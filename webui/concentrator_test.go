package webui

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

type fakeConcentrator struct {
	routers []EnrolledRouter
	err     error
	asked   string
}

func (f *fakeConcentrator) CreateToken(_ context.Context, name string, addresses []string, validity time.Duration) (string, error) {
	f.asked = fmt.Sprintf("token %s %v %s", name, addresses, validity)
	return "abc", f.err
}

func (f *fakeConcentrator) Routers(context.Context) ([]EnrolledRouter, error) {
	return f.routers, f.err
}

func (f *fakeConcentrator) RemoveRouter(_ context.Context, name string) error {
	f.asked = "remove " + name
	return f.err
}

func TestConcentrator(t *testing.T) {
	ctx := t.Context()
	con := &fakeConcentrator{}
	c := serve(t, NewConcentratorHandler(con, quiet()))

	token, err := c.CreateToken(ctx, "home", []string{"192.0.2.1:4443", "[2001:db8::1]:4443"}, time.Hour)
	check(t, err, token, "abc")
	check(t, nil, con.asked, "token home [192.0.2.1:4443 [2001:db8::1]:4443] 1h0m0s")

	res, body := raw(t, c, request{method: "GET", path: "/api/v1/routers"})
	check(t, nil, fmt.Sprint(res.StatusCode, body), "200[]")
	con.routers = []EnrolledRouter{
		{Name: "home", Fingerprint: "f00d", EnrolledAt: when, LastSeen: &when, Address: "198.51.100.7:5000", Sessions: 2, Flows: 3, RxBytes: 4, TxBytes: 5,
			Inner4: "10.83.0.7", Inner6: "fd00:1:2:6::1", PacketsRx: 6, PacketsTx: 7, Duplicates: 8, Reordered: 9, Drops: map[string]uint64{"spoofed": 10},
			Carriers: []RouterCarrier{{Link: "dsl", Carrier: "datagram"}, {Carrier: "stream"}},
			Forwards: []RouterForward{{Protocol: "tcp", Port: 8080, To: "192.168.1.10:80"}}},
		{Name: "new", EnrolledAt: when, Carriers: []RouterCarrier{}, Forwards: []RouterForward{}, Drops: map[string]uint64{}},
	}
	list, err := c.Routers(ctx)
	check(t, err, list, con.routers)
	con.routers = []EnrolledRouter{{Name: "new", EnrolledAt: when}}
	_, body = raw(t, c, request{method: "GET", path: "/api/v1/routers"})
	for _, part := range []string{`"last_seen":null`, `"carriers":[]`, `"forwards":[]`, `"drops":{}`} {
		if !strings.Contains(body, part) {
			t.Errorf("%s is not in the answer about a router never seen: %s", part, body)
		}
	}

	check(t, c.RemoveRouter(ctx, "home office"), con.asked, "remove home office")
	con.err = &Error{Code: CodeRouterUnknown, Detail: "no router is named x"}
	var coded *Error
	if err := c.RemoveRouter(ctx, "x"); !errors.As(err, &coded) || coded.Code != CodeRouterUnknown || coded.Status != 404 {
		t.Errorf("removing an unknown router: %#v", err)
	}
	con.err = nil

	con.asked = ""
	for name, body := range map[string]string{
		"no validity":           `{"name":"home","addresses":["192.0.2.1:4443"]}`,
		"negative validity":     `{"name":"home","addresses":["192.0.2.1:4443"],"validity_seconds":-1}`,
		"validity that wraps":   `{"name":"home","addresses":["192.0.2.1:4443"],"validity_seconds":9223372036854775807}`,
		"validity in words":     `{"name":"home","addresses":["192.0.2.1:4443"],"validity_seconds":"1h"}`,
		"field that is unknown": `{"name":"home","addresses":["192.0.2.1:4443"],"validity_seconds":60,"admin":true}`,
	} {
		res, answer := raw(t, c, request{method: "POST", path: "/api/v1/tokens", contentType: "application/json", body: body})
		if res.StatusCode != 400 || !strings.Contains(answer, `"code":"bad_request"`) || con.asked != "" {
			t.Errorf("%s: got %d %s, asked %q", name, res.StatusCode, answer, con.asked)
		}
	}
	res, _ = raw(t, c, request{method: "GET", path: "/healthz"})
	check(t, nil, res.StatusCode, 200)
}
