package webui

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

const (
	good    = "correct horse battery"
	another = "staple battery horse"
)

// clock is a time that a test moves.
type clock struct{ at atomic.Int64 }

func (c *clock) now() time.Time       { return time.Unix(0, c.at.Load()).UTC() }
func (c *clock) pass(d time.Duration) { c.at.Add(int64(d)) }

func newAccess(t *testing.T) (*Access, *clock, *bbolt.DB) {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(t.TempDir(), "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	c := new(clock)
	c.at.Store(when.UnixNano())
	a, err := OpenAccess(db, c.now)
	if err != nil {
		t.Fatal(err)
	}
	return a, c, db
}

func code(err error) string {
	var coded *Error
	if errors.As(err, &coded) {
		return coded.Code
	}
	return fmt.Sprint(err)
}

var lanClient = netip.MustParseAddr("192.168.1.7")

func TestClaim(t *testing.T) {
	a, _, db := newAccess(t)
	for _, weak := range []string{"", "short", "123456789", "1234567890", "aaaaaaaaaaaa", "Password123", strings.Repeat("long", 65), "bad\xffutf8 and long"} {
		if _, err := a.Claim(t.Context(), weak, lanClient); code(err) != CodeWeakPassword {
			t.Errorf("%q: %v", weak, err)
		}
	}
	if _, err := a.Login(t.Context(), good, lanClient); code(err) != CodeUnclaimed {
		t.Errorf("login before there is a password: %v", err)
	}
	session, err := a.Claim(t.Context(), good, lanClient)
	if err != nil {
		t.Fatal(err)
	}
	if who, ok, err := a.Session(session); !ok || err != nil || who.Name != "panel" || !who.Write {
		t.Errorf("the claim's session: %+v %v %v", who, ok, err)
	}
	if _, err := a.Claim(t.Context(), another, lanClient); code(err) != CodeClaimClosed {
		t.Errorf("a second claim: %v", err)
	}
	for password, want := range map[string]string{good: "<nil>", another: CodeWrongPassword, "": CodeWrongPassword} {
		if _, err := a.Login(t.Context(), password, lanClient); code(err) != want {
			t.Errorf("login with %q: %v, want %s", password, err, want)
		}
	}
	// Nothing in the database can be used by who reads it.
	if err := db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				if strings.Contains(string(k)+string(v), good) || strings.Contains(string(k)+string(v), session) {
					t.Errorf("a secret is stored under %q", k)
				}
				return nil
			})
		})
	}); err != nil {
		t.Fatal(err)
	}

	late, clock, _ := newAccess(t)
	clock.pass(claimWindow)
	if _, err := late.Claim(t.Context(), good, lanClient); code(err) != CodeClaimClosed {
		t.Errorf("a claim after the window: %v", err)
	}
	if err := late.SetPassword(t.Context(), socketIdentity, "", good, netip.Addr{}, true); err != nil {
		t.Errorf("setting the first password over the socket: %v", err)
	}
	if _, err := late.Login(t.Context(), good, lanClient); err != nil {
		t.Error(err)
	}
}

func TestSessionsEnd(t *testing.T) {
	a, clock, db := newAccess(t)
	first, err := a.Claim(t.Context(), good, lanClient)
	if err != nil {
		t.Fatal(err)
	}
	live := func(session string) bool {
		t.Helper()
		_, ok, err := a.Session(session)
		if err != nil {
			t.Error(err)
		}
		return ok
	}
	login := func() string {
		t.Helper()
		session, err := a.Login(t.Context(), good, lanClient)
		if err != nil {
			t.Fatal(err)
		}
		return session
	}
	if live("") || live("nobody") || live(first[1:]) {
		t.Error("sessions that there are not are live")
	}
	clock.pass(sessionIdle - time.Second)
	if !live(first) {
		t.Error("ended before it was idle for long")
	}
	clock.pass(sessionIdle - time.Second)
	if !live(first) {
		t.Error("ended although it was used")
	}
	clock.pass(sessionIdle + time.Second)
	if live(first) {
		t.Error("an idle session is live")
	}
	second := login()
	for range 4 {
		clock.pass(sessionAbsolute/4 + time.Second)
		live(second)
	}
	if live(second) {
		t.Error("a session is live after its longest time")
	}
	// Another start does not end them, a new password does, but for who sets it.
	third, fourth := login(), login()
	if a, err = OpenAccess(db, clock.now); err != nil || !live(third) {
		t.Errorf("after another start: %v", err)
	}
	who, _, _ := a.Session(third)
	if err := a.SetPassword(t.Context(), who, another, another, lanClient, false); code(err) != CodeWrongPassword {
		t.Errorf("a new password without the old one: %v", err)
	}
	if err := a.SetPassword(t.Context(), who, good, another, lanClient, false); err != nil || !live(third) || live(fourth) {
		t.Errorf("after a new password: %v; the one that set it is live: %v, the other: %v", err, live(third), live(fourth))
	}
	if err := a.Logout(who); err != nil || live(third) {
		t.Errorf("logged out: %v", err)
	}
	var all []string
	for range maxSessions + 3 {
		if err := db.Update(func(tx *bbolt.Tx) error { // as Login, without its hash
			session, err := a.open(tx.Bucket(accessBucket), lanClient)
			all = append(all, session)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		clock.pass(time.Second)
	}
	if n := len(slices.DeleteFunc(all, func(s string) bool { return !live(s) })); n > maxSessions || n < maxSessions-1 {
		t.Errorf("%d sessions are live, want %d", n, maxSessions)
	}
}

func TestWrongPasswords(t *testing.T) {
	a, clock, _ := newAccess(t)
	if _, err := a.Claim(t.Context(), good, lanClient); err != nil {
		t.Fatal(err)
	}
	try := func(password string, from netip.Addr) string {
		_, err := a.Login(t.Context(), password, from)
		return code(err)
	}
	for i := range wrongBurst {
		if got := try(another, lanClient); got != CodeWrongPassword {
			t.Errorf("wrong password %d: %s", i+1, got)
		}
	}
	for _, password := range []string{another, good} {
		if got := try(password, lanClient); got != CodeTooManyLogins {
			t.Errorf("the next: %s", got)
		}
	}
	if got := try(good, netip.MustParseAddr("192.168.1.8")); got != "<nil>" {
		t.Errorf("somebody else: %s", got)
	}
	clock.pass(wrongEvery)
	if got := try(good, lanClient); got != "<nil>" {
		t.Errorf("later: %s", got)
	}
	// Many addresses of one host count as one, and many hosts together are slowed down.
	six := netip.MustParsePrefix("fd00::/64").Addr()
	for range wrongBurst {
		six = six.Next()
		a.wrong(six)
	}
	if got := try(another, six.Next()); got != CodeTooManyLogins {
		t.Errorf("the next address of a network: %s", got)
	}
	for i := range allWrongBurst {
		a.wrong(netip.AddrFrom4([4]byte{10, 0, byte(i), 1}))
	}
	if got := try(good, netip.MustParseAddr("10.1.1.1")); got != CodeTooManyLogins {
		t.Errorf("beside a flood: %s", got)
	}
	clock.pass(allWrongEvery)
	if got := try(good, netip.MustParseAddr("10.1.1.1")); got != "<nil>" {
		t.Errorf("behind a flood: %s", got)
	}
	for i := range 3 * maxAddresses {
		a.wrong(netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)}))
	}
	if len(a.addresses) > maxAddresses {
		t.Errorf("%d addresses are remembered", len(a.addresses))
	}
}

// browser is a client of the panel with a cookie jar of one.
type browser struct {
	t      *testing.T
	server *httptest.Server
	cookie *http.Cookie
	header http.Header
	host   string
}

func (b *browser) do(method, path, body string) (status int, answer string) {
	b.t.Helper()
	r, err := http.NewRequest(method, b.server.URL+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	for k, v := range b.header {
		r.Header[k] = v
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	if b.cookie != nil {
		r.AddCookie(b.cookie)
	}
	r.Host = b.host
	response, err := b.server.Client().Do(r)
	if err != nil {
		b.t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, c := range response.Cookies() {
		b.cookie = c
	}
	if csp := response.Header.Get("Content-Security-Policy"); csp != policy {
		b.t.Errorf("%s %s: the policy is %q", method, path, csp)
	}
	return response.StatusCode, string(text)
}

func (b *browser) want(status int, part, method, path, body string) string {
	b.t.Helper()
	got, answer := b.do(method, path, body)
	if got != status || !strings.Contains(answer, part) {
		b.t.Errorf("%s %s %s: %d %s; want %d with %s", method, path, body, got, answer, status, part)
	}
	return answer
}

func TestPanel(t *testing.T) {
	a, _, _ := newAccess(t)
	router := &fakeRouter{}
	server := httptest.NewTLSServer(NewPanelHandler(router, a, quiet()))
	t.Cleanup(server.Close)
	b := &browser{t: t, server: server}

	// Nothing is told or done before somebody has logged in.
	for _, r := range [][3]string{
		{"GET", "/api/v1/status"}, {"GET", "/api/v1/settings"}, {"PUT", "/api/v1/uplinks/lte/mode", `{"mode":"off"}`}, {"GET", "/metrics"},
		{"POST", "/api/v1/confirm", `{"revision":7}`}, {"DELETE", "/api/v1/confirm"}, {"POST", "/api/v1/join", `{"token":"x"}`},
		{"GET", "/api/v1/access/tokens"}, {"PUT", "/api/v1/access/password", `{"password":"` + another + `"}`}, {"GET", "/readyz"}, {"GET", "/nothing"},
	} {
		b.want(401, CodeLoginRequired, r[0], r[1], r[2])
	}
	if router.asked != "" {
		t.Errorf("the router was asked %q", router.asked)
	}
	b.want(200, `"ok"`, "GET", "/healthz", "")
	b.want(200, `{"claim_open":true,"claimed":false,"name":"","scope":""}`, "GET", "/api/v1/access", "")
	b.want(422, CodeWeakPassword, "POST", "/api/v1/access/claim", `{"password":"short"}`)
	b.want(204, "", "POST", "/api/v1/access/claim", `{"password":"`+good+`"}`)
	if c := b.cookie; c == nil || c.Name != "__Host-sheaf" || !c.Secure || !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || c.Path != "/" || c.Domain != "" {
		t.Fatalf("the cookie is %+v", c)
	}
	b.want(200, `{"claim_open":false,"claimed":true,"name":"panel","scope":"write"}`, "GET", "/api/v1/access", "")
	b.want(200, `"revision":7`, "PUT", "/api/v1/uplinks/lte/mode", `{"mode":"off"}`)
	if router.asked != `uplink lte {"mode":"off"} by panel` {
		t.Errorf("the router was asked %q", router.asked)
	}

	// Neither a foreign page nor a foreign name gets in, with the cookie.
	foreign := *b
	foreign.header = http.Header{"Origin": {"https://evil.example"}, "Sec-Fetch-Site": {"cross-site"}}
	foreign.want(403, CodeCrossOrigin, "PUT", "/api/v1/uplinks/lte/mode", `{"mode":"off"}`)
	foreign.want(403, CodeCrossOrigin, "POST", "/api/v1/access/login", `{"password":"`+good+`"}`)
	for host, want := range map[string]int{
		"evil.example": 403, "sheaf.evil.example": 403, "192.168.1.1.evil.example:8443": 403,
		"192.168.1.1:8443": 200, "[fd00::1]:8443": 200, "[fe80::1]": 200, "Sheaf.lan:8443": 200, "sheaf.local.": 200, "localhost": 200,
	} {
		rebound := *b
		rebound.host = host
		if got, answer := rebound.do("GET", "/api/v1/access", ""); got != want {
			t.Errorf("Host %s: %d %s, want %d", host, got, answer, want)
		}
	}

	// Tokens do what their scope says.
	b.want(400, "scope", "POST", "/api/v1/access/tokens", `{"name":"grafana","scope":"all"}`)
	bearer := func(answer string) *browser {
		_, token, _ := strings.Cut(strings.TrimSuffix(strings.TrimSpace(answer), `"}`), `{"token":"`)
		return &browser{t: t, server: server, header: http.Header{"Authorization": {"Bearer " + token}}}
	}
	reader := bearer(b.want(201, "sheaf_", "POST", "/api/v1/access/tokens", `{"name":"grafana","scope":"read"}`))
	writer := bearer(b.want(201, "sheaf_", "POST", "/api/v1/access/tokens", `{"name":"script","scope":"write"}`))
	reader.want(200, "version", "GET", "/api/v1/status", "")
	reader.want(200, "sheaf_build_info", "GET", "/metrics", "")
	reader.want(403, CodeReadOnly, "PUT", "/api/v1/uplinks/lte/mode", `{"mode":"off"}`)
	for _, token := range []*browser{reader, writer} {
		token.want(403, CodeTokenRefused, "POST", "/api/v1/access/tokens", `{"name":"more","scope":"write"}`)
		token.want(403, CodeTokenRefused, "GET", "/api/v1/access/sessions", "")
		token.want(403, CodeTokenRefused, "PUT", "/api/v1/access/password", `{"old":"`+good+`","password":"`+another+`"}`)
	}
	reader.want(200, `"name":"token grafana","scope":"read"`, "GET", "/api/v1/access", "")
	writer.want(200, "", "PUT", "/api/v1/uplinks/lte/mode", `{"mode":"on"}`)
	if router.asked != `uplink lte {"mode":"on"} by token script` {
		t.Errorf("the router was asked %q", router.asked)
	}
	(&browser{t: t, server: server, header: http.Header{"Authorization": {"Bearer sheaf_x"}}}).want(401, CodeLoginRequired, "GET", "/api/v1/status", "")
	list := b.want(200, `"name":"script","scope":"write"`, "GET", "/api/v1/access/tokens", "")
	if strings.Contains(list, "sheaf_") {
		t.Errorf("tokens are told again: %s", list)
	}
	_, id, _ := strings.Cut(list, `"id":"`)
	b.want(204, "", "DELETE", "/api/v1/access/tokens/"+id[:16], "")
	b.want(404, CodeNotFound, "DELETE", "/api/v1/access/tokens/"+id[:16], "")
	b.want(400, "id", "DELETE", "/api/v1/access/tokens/me", "")
	for range maxTokens - 1 {
		b.want(201, "", "POST", "/api/v1/access/tokens", `{"name":"many","scope":"read"}`)
	}
	b.want(409, CodeTooManyTokens, "POST", "/api/v1/access/tokens", `{"name":"many","scope":"read"}`)

	// The sixth wrong password waits, and says how long.
	wrong := &browser{t: t, server: server}
	for range wrongBurst {
		wrong.want(401, CodeWrongPassword, "POST", "/api/v1/access/login", `{"password":"`+another+`"}`)
	}
	wrong.want(429, CodeTooManyLogins, "POST", "/api/v1/access/login", `{"password":"`+good+`"}`)

	b.want(200, `"current":true`, "GET", "/api/v1/access/sessions", "")
	stays := *b
	b.want(204, "", "POST", "/api/v1/access/logout", "")
	if b.cookie.MaxAge >= 0 {
		t.Errorf("logging out left the cookie %+v", b.cookie)
	}
	stays.want(401, CodeLoginRequired, "GET", "/api/v1/status", "")
}

// The panel is served on the interfaces that it is told, and follows when they change.
func TestPanelListens(t *testing.T) {
	a, _, _ := newAccess(t)
	free, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(free.Addr().String())
	p, err := NewPanel(":"+port, NewPanelHandler(&fakeRouter{}, a, quiet()), a, quiet())
	if err != nil {
		t.Fatal(err)
	}
	p.Listen([]string{"lo", "sheaf-none"})
	done := make(chan error, 1)
	go func() { done <- p.Run(t.Context()) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	client := http.Client{Timeout: 5 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	until := func(what string, right func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !right(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: not in time", what)
			}
		}
	}
	answers := func() bool {
		response, err := client.Get("https://127.0.0.1:" + port + "/healthz")
		if err != nil {
			return false
		}
		defer response.Body.Close()
		return response.StatusCode == 200
	}
	time.Sleep(100 * time.Millisecond)
	if answers() {
		t.Error("it answers on a port that somebody else has")
	}
	free.Close()
	until("the port becomes free", answers)
	response, err := client.Get("http://127.0.0.1:" + port + "/flows?a=b")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if where := response.Header.Get("Location"); response.StatusCode != http.StatusPermanentRedirect || where != "https://127.0.0.1:"+port+"/flows?a=b" {
		t.Errorf("plain HTTP: %s to %q", response.Status, where)
	}
	p.Listen([]string{"sheaf-none"})
	until("the interface is taken away", func() bool { return !answers() })
	p.Listen([]string{"lo"})
	until("the interface is given back", answers)
	if _, err := NewPanel("8443", nil, a, quiet()); err == nil || !strings.Contains(err.Error(), "HOST:PORT") {
		t.Errorf("an address without a colon: %v", err)
	}
	before, err := a.certificate()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := a.certificate(); err != nil || !slices.Equal(before.Certificate[0], again.Certificate[0]) {
		t.Errorf("the certificate is made anew: %v", err)
	}
}
