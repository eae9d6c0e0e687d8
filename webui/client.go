package webui

// The path of a command: sheafctl ─▶ Client ─▶ the daemon's unix socket ─▶ an
// answer, or an error whose text is for a person at a terminal.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/gin-gonic/gin"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/settings"
)

const (
	// clientTimeout is longer than the daemon's own, so that the daemon gets to
	// say what it was that took too long.
	clientTimeout = requestTimeout + 15*time.Second
	// maxAnswer bounds what the daemon may make the client hold.
	maxAnswer = 16 << 20
)

// ErrUnreachable says that no daemon could be reached on the socket.
var ErrUnreachable = errors.New("daemon unreachable")

// Client drives a daemon over its unix socket: the router daemon, or the
// concentrator daemon for tokens and enrolled routers.
//
// Its errors are ErrUnreachable, *settings.Invalid, *Error as the daemon chose
// it, or plain.
type Client struct {
	http http.Client
}

// NewClient returns a client of the daemon that listens on the socket.
func NewClient(socket string) *Client {
	return &Client{http: http.Client{
		Timeout: clientTimeout,
		// The daemons send nobody elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, socket) },
			DisableKeepAlives: true,
		},
	}}
}

func dial(ctx context.Context, socket string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("%w: there is no socket at %s; is the daemon running?", ErrUnreachable, socket)
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("%w: nobody answers on %s; start the daemon", ErrUnreachable, socket)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("%w: not allowed to open %s; run this as root", ErrUnreachable, socket)
	default:
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
}

// Status returns the state of the router.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.get(ctx, "/api/v1/status", &s)
	return s, err
}

// Diagnose looks at everything that traffic needs.
func (c *Client) Diagnose(ctx context.Context) (Diagnosis, error) {
	var d Diagnosis
	err := c.get(ctx, "/api/v1/diagnosis", &d)
	return d, err
}

// Settings returns the revision in force.
func (c *Client) Settings(ctx context.Context) (Revision, error) {
	var r Revision
	err := c.get(ctx, "/api/v1/settings", &r)
	return r, err
}

// Apply makes a settings text, YAML or JSON, a new revision. The text is the
// daemon's to judge. With a time to confirm it in, in whole seconds, it is taken back
// without that.
func (c *Client) Apply(ctx context.Context, text []byte, confirm time.Duration) (Revision, error) {
	var r Revision
	err := c.sendText(ctx, http.MethodPut, "/api/v1/settings"+confirmQuery(confirm), text, &r)
	return r, err
}

// Compare tells what Apply of a text would change.
func (c *Client) Compare(ctx context.Context, text []byte) ([]settings.Change, error) {
	var changes Changes
	err := c.sendText(ctx, http.MethodPost, "/api/v1/settings/changes", text, &changes)
	return changes.Changes, err
}

func (c *Client) sendText(ctx context.Context, method, path string, text []byte, out any) error {
	if len(text) > maxBody {
		// The daemon would hang up in the middle of the body.
		return fmt.Errorf("the settings are %d bytes long; at most %d are taken", len(text), maxBody)
	}
	return c.do(ctx, method, path, mimeYAML, text, out)
}

func confirmQuery(confirm time.Duration) string {
	if confirm == 0 {
		return ""
	}
	return fmt.Sprintf("?confirm_s=%d", confirm/time.Second)
}

// Revisions lists the revisions that are kept, the newest first.
func (c *Client) Revisions(ctx context.Context) ([]RevisionSummary, error) {
	var r Revisions
	err := c.get(ctx, "/api/v1/revisions", &r)
	return r.Revisions, err
}

// Restore makes the settings of a revision the ones in force, as Apply does.
func (c *Client) Restore(ctx context.Context, revision uint64, confirm time.Duration) (Revision, error) {
	var r Revision
	err := c.do(ctx, http.MethodPost, fmt.Sprintf("/api/v1/revisions/%d/restore%s", revision, confirmQuery(confirm)), "", nil, &r)
	return r, err
}

// Confirm lets an unconfirmed revision stay.
func (c *Client) Confirm(ctx context.Context, revision uint64) (Revision, error) {
	var r Revision
	err := c.send(ctx, http.MethodPost, "/api/v1/confirm", ConfirmJSONBody{Revision: revision}, &r)
	return r, err
}

// TakeBack takes the unconfirmed revision back at once.
func (c *Client) TakeBack(ctx context.Context) (Revision, error) {
	var r Revision
	err := c.do(ctx, http.MethodDelete, "/api/v1/confirm", "", nil, &r)
	return r, err
}

// SetUplink changes settings of one uplink.
func (c *Client) SetUplink(ctx context.Context, name string, change UplinkChange) (Revision, error) {
	var r Revision
	err := c.send(ctx, http.MethodPatch, "/api/v1/uplinks/"+url.PathEscape(name), change, &r)
	return r, err
}

// SetMultipath changes multipath settings.
func (c *Client) SetMultipath(ctx context.Context, change MultipathChange) (Revision, error) {
	var r Revision
	err := c.send(ctx, http.MethodPatch, "/api/v1/multipath", change, &r)
	return r, err
}

// Join enrols the router with the concentrator that issued the token.
func (c *Client) Join(ctx context.Context, token string) (Joined, error) {
	var j Joined
	err := c.send(ctx, http.MethodPost, "/api/v1/join", JoinJSONBody{Token: token}, &j)
	return j, err
}

// SetPassword sets the panel's password.
func (c *Client) SetPassword(ctx context.Context, password string) error {
	return c.send(ctx, http.MethodPut, "/api/v1/access/password", SetPasswordJSONBody{Password: password}, nil)
}

// CreateToken makes a one-time enrolment token on a concentrator.
func (c *Client) CreateToken(ctx context.Context, name string, addresses []string, validity time.Duration) (string, error) {
	var t tokenReply
	err := c.send(ctx, http.MethodPost, "/api/v1/tokens",
		tokenBody{Name: name, Addresses: addresses, ValiditySeconds: int64(validity / time.Second)}, &t)
	return t.Token, err
}

// Routers lists the routers enrolled with a concentrator.
func (c *Client) Routers(ctx context.Context) ([]EnrolledRouter, error) {
	var list []EnrolledRouter
	err := c.get(ctx, "/api/v1/routers", &list)
	return list, err
}

// RemoveRouter revokes a router on a concentrator.
func (c *Client) RemoveRouter(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/api/v1/routers/"+url.PathEscape(name), "", nil, nil)
}

func (c *Client) get(ctx context.Context, path string, out any) error {
	return c.do(ctx, http.MethodGet, path, "", nil, out)
}

func (c *Client) send(ctx context.Context, method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	return c.do(ctx, method, path, gin.MIMEJSON, body, out)
}

// do makes one request and decodes its answer into out, unless out is nil.
func (c *Client) do(ctx context.Context, method, path, contentType string, body []byte, out any) error {
	// The host is for the header only; dial knows where to go.
	req, err := http.NewRequestWithContext(ctx, method, "http://sheaf"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return plain(err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return plain(err)
	}
	if len(answer) > maxAnswer {
		return fmt.Errorf("the daemon's answer to %s %s is longer than %d bytes", method, path, maxAnswer)
	}
	if res.StatusCode >= 300 {
		return refusal(res, answer)
	}
	if out == nil {
		return nil
	}
	// Unknown fields pass: a newer daemon may say more.
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("the answer to %s %s is not the one expected; is this the socket of the right daemon? %w", method, path, err)
	}
	return nil
}

// plain says what a failed exchange means, without the request's line, which
// means nothing to a person.
func plain(err error) error {
	timeout := false
	if ue := (*url.Error)(nil); errors.As(err, &ue) {
		timeout, err = ue.Timeout(), ue.Err
	}
	switch {
	case errors.Is(err, ErrUnreachable), errors.Is(err, context.Canceled):
		return err
	case timeout:
		return fmt.Errorf("the daemon did not answer in time; it may still be at work on the request: %w", err)
	default:
		return fmt.Errorf("the daemon hung up before it had answered; its log may say why: %w", err)
	}
}

// refusal turns a problem back into the error that the daemon had.
func refusal(res *http.Response, answer []byte) error {
	var p Problem
	mime, _, _ := strings.Cut(res.Header.Get("Content-Type"), ";")
	if mime != mimeProblem || json.Unmarshal(answer, &p) != nil {
		return fmt.Errorf("the daemon answered %s without saying why; is this the socket of the right daemon?", res.Status)
	}
	if p.Code != CodeSettingsInvalid {
		return &Error{Code: p.Code, Status: res.StatusCode, Detail: p.Detail, Problems: p.Problems}
	}
	return &settings.Invalid{Problems: p.Problems}
}
