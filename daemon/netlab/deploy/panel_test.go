package deploy

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"slices"
	"strings"
	"testing"
	"time"

	"sheaf/daemon/netlab"
	"sheaf/webui"
)

// panelAddress is where the lab's router serves it.
const panelAddress = "192.168.77.1:8443"

// visitor is a browser on a Host: it keeps cookies, and trusts the certificate.
func (w *world) visitor(h *netlab.Host) *http.Client {
	w.t.Helper()
	jar, err := cookiejar.New(nil)
	w.need(err)
	return &http.Client{Timeout: 10 * time.Second, Jar: jar, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // as a person who has clicked on "proceed"
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return h.Dial(ctx, network, address)
		},
	}}
}

// panel makes one request of it.
func (w *world) panel(c *http.Client, method, url, body string) (status int, answer string, err error) {
	w.t.Helper()
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	w.need(err)
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := c.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(text), err
}

// The panel is there for the LAN's clients, who log in, and for nobody on an uplink; a
// restart ends no session, and an interface that comes back is served again.
func TestPanelOnTheLANAlone(t *testing.T) {
	w := up(t)
	client := w.visitor(w.Lab.LAN)
	ask := func(want int, part, method, path, body string) {
		t.Helper()
		w.soon(method+" "+path, func() error {
			status, answer, err := w.panel(client, method, "https://"+panelAddress+path, body)
			if err != nil || status != want || !strings.Contains(answer, part) {
				return fmt.Errorf("%d %s %w", status, answer, err)
			}
			return nil
		})
	}
	ask(401, webui.CodeLoginRequired, "GET", "/api/v1/status", "")
	if status, answer, err := w.panel(client, "GET", "https://[fd77::1]:8443/api/v1/access", ""); status != 200 || err != nil {
		t.Errorf("by IPv6: %d %s %v", status, answer, err)
	}
	ask(204, "", "POST", "/api/v1/access/claim", `{"password":"correct horse battery"}`)
	ask(200, `"author":"panel"`, "PUT", "/api/v1/uplinks/uplink2/mode", `{"mode":"off"}`)
	w.untilUplink(2, "is off", func(u webui.UplinkStatus) bool { return u.State == "off" })
	w.need(w.Router.Stop(15 * time.Second))
	w.need(w.StartRouter(""))
	ask(200, `"name":"panel"`, "GET", "/api/v1/access", "")

	for _, u := range w.Lab.Uplinks {
		for _, address := range []string{u.Address(), u.Address6()} {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			if c, err := w.Lab.Core.Dial(ctx, "tcp", net.JoinHostPort(address, "8443")); err == nil {
				_ = c.Close()
				t.Errorf("the panel answers on %s to who comes by uplink%d", address, u.Number)
			}
			cancel()
		}
	}

	// What happens is told as it does, and a stream does not keep the daemon from ending.
	stream := *client
	stream.Timeout = 0
	response, err := stream.Get("https://" + panelAddress + "/api/v1/live")
	w.need(err)
	defer func() { _ = response.Body.Close() }()
	lines := make(chan string, 1000)
	go func() {
		defer close(lines)
		b := bufio.NewScanner(response.Body)
		b.Buffer(nil, 1<<20)
		for b.Scan() {
			lines <- b.Text()
		}
	}()
	hears := func(parts ...string) {
		t.Helper()
		late := time.After(15 * time.Second)
		for {
			select {
			case line, open := <-lines:
				if !open {
					t.Fatalf("the stream ended without %q", parts)
				}
				if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
					return
				}
			case <-late:
				t.Fatalf("the stream does not tell of %q", parts)
			}
		}
	}
	hears(`data: {"concentrator":`, `"name":"uplink3"`)
	w.need(w.Lab.Uplinks[2].Carrier(false))
	hears(`"kind":"uplink"`, `"uplink":"uplink3"`, "unfit")
	if text, err := w.Sheafctl("diag"); err != nil || !strings.Contains(text, "not over all uplinks. Uplink uplink3 carries nothing: wan3 has no carrier") ||
		!strings.Contains(text, "Check the cable of wan3") {
		t.Errorf("diagnosis: %v\n%s", err, text)
	} else {
		t.Logf("diagnosis:\n%s", text)
	}
	w.need(w.Lab.Uplinks[2].Carrier(true))
	hears(`"kind":"uplink"`, `"uplink":"uplink3"`, "carrying")
	begin := time.Now()
	w.need(w.Router.Stop(15 * time.Second))
	for range lines { // until its end
	}
	t.Logf("a daemon with a listening page ended in %v", time.Since(begin).Round(time.Millisecond))
	w.need(w.StartRouter(""))

	// Another password, from the device itself, ends the session.
	ctl := w.Lab.Router.Command(w.Binaries+"/sheafctl", "--socket", w.Socket(), "password")
	ctl.Stdin = strings.NewReader("staple battery horse\n")
	ctl.Stderr = w.log
	p, err := w.Lab.Router.Start(ctl)
	w.need(err)
	w.need(p.Wait())
	ask(401, webui.CodeLoginRequired, "GET", "/api/v1/status", "")
	ask(401, webui.CodeWrongPassword, "POST", "/api/v1/access/login", `{"password":"correct horse battery"}`)
	ask(204, "", "POST", "/api/v1/access/login", `{"password":"staple battery horse"}`)
	ask(200, `"state":`, "GET", "/api/v1/status", "")
}
