// Package webui is how people and programs drive the daemons: the HTTP API, the
// unix socket it is served on, and the client that sheafctl uses.
//
// The path of a request through this package:
//
//	socket ─▶ engine: bounds on size and time ─▶ handler: strict decoding
//	       ─▶ Router or Concentrator (the daemon) ─▶ JSON, or a problem with a code
//
// Whoever can open the socket is the administrator: its mode is 0600, so that is
// root. Nothing here decides; the daemon does, behind the interface it satisfies.
package webui

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"

	"sheaf/daemon/control/settings"
)

const (
	// maxBody bounds a request's body; settings are by far the largest.
	maxBody = settings.MaxText
	// requestTimeout bounds the daemon's work on one request. Joining is the
	// longest: it tries every address over every uplink.
	requestTimeout = 30 * time.Second
	// author is what a revision made through the socket carries.
	author = "socket"
)

// Router is what the router daemon does for its operator.
type Router interface {
	Status(ctx context.Context) (Status, error)
	// Settings returns the revision in force.
	Settings(ctx context.Context) (settings.Revision, error)
	// Apply validates s, stores it as a revision and returns once the kernel
	// has it. A revision that is stored but that the kernel does not have yet
	// is returned together with a *Pending.
	Apply(ctx context.Context, s settings.Settings, author string) (settings.Revision, error)
	// SetUplink is Apply of the settings in force with some of one uplink changed.
	SetUplink(ctx context.Context, name string, change UplinkChange, author string) (settings.Revision, error)
	// SetMultipath is Apply of the settings in force with some multipath settings
	// changed. What the kernel does not offer is refused.
	SetMultipath(ctx context.Context, change MultipathChange, author string) (settings.Revision, error)
	// Flows lists the live flows that have moved most, at most limit.
	Flows(ctx context.Context, limit int) (Flows, error)
	// Events returns what has happened after the event with an ID. If that is
	// nothing it waits for it, and then, or when ctx ends, may return nothing.
	Events(ctx context.Context, after uint64, wait time.Duration) (Events, error)
	// Join enrols with the concentrator that issued the token.
	Join(ctx context.Context, token string) (Joined, error)
}

// Joined names the concentrator that a router has enrolled with.
type Joined struct {
	Concentrator string `json:"concentrator"`
	Address      string `json:"address"`
	Fingerprint  string `json:"fingerprint"`
}

// Revision is the body that answers reading and changing the settings.
type Revision struct {
	Number   uint64            `json:"revision"`
	Time     time.Time         `json:"time"`
	Author   string            `json:"author"`
	Settings settings.Settings `json:"settings"`
	// Warning says why the kernel does not have this revision yet; the status
	// is 202 then.
	Warning string `json:"warning,omitempty"`
}

// modeBody is the body of PUT /api/v1/uplinks/{name}/mode.
type modeBody struct {
	Mode settings.Mode `json:"mode"`
}

// UplinkChange is the body of PATCH /api/v1/uplinks/{name}. What is absent stays as
// it is.
type UplinkChange struct {
	Mode       *settings.Mode `json:"mode,omitempty"`
	Weight     *int           `json:"weight,omitempty"`
	Preference *int           `json:"preference,omitempty"`
}

// Of returns the uplink u with the change made.
func (c UplinkChange) Of(u settings.Uplink) settings.Uplink {
	change(&u.Mode, c.Mode)
	change(&u.Weight, c.Weight)
	change(&u.Preference, c.Preference)
	return u
}

// MultipathChange is the body of PATCH /api/v1/multipath. What is absent stays as
// it is.
type MultipathChange struct {
	Enabled     *bool                 `json:"enabled,omitempty"`
	PathManager *settings.PathManager `json:"path_manager,omitempty"`
	Scheduler   *string               `json:"scheduler,omitempty"`
	Checksum    *bool                 `json:"checksum,omitempty"`
	SYNRetries  *int                  `json:"syn_retries,omitempty"`

	CongestionControl *settings.CongestionControl `json:"congestion_control,omitempty"`
}

// Of returns the settings m with the change made.
func (c MultipathChange) Of(m settings.Multipath) settings.Multipath {
	change(&m.Enabled, c.Enabled)
	change(&m.PathManager, c.PathManager)
	change(&m.Scheduler, c.Scheduler)
	change(&m.Checksum, c.Checksum)
	change(&m.SYNRetries, c.SYNRetries)
	change(&m.CongestionControl, c.CongestionControl)
	return m
}

func change[T any](value, to *T) {
	if to != nil {
		*value = *to
	}
}

// joinBody is the body of POST /api/v1/join.
type joinBody struct {
	Token string `json:"token"`
}

// NewRouterHandler serves the API of the router daemon.
func NewRouterHandler(r Router, log *slog.Logger) http.Handler {
	return newRouterHandler(r, log, requestTimeout)
}

func newRouterHandler(r Router, log *slog.Logger, timeout time.Duration) http.Handler {
	h := routerHandler{router: r, runtime: newRuntimeMetrics(), reply: reply{log}}
	e := newEngine(h.reply, timeout)
	e.GET("/readyz", h.ready)
	e.GET("/metrics", h.metrics)
	v1 := e.Group("/api/v1")
	v1.GET("/status", h.status)
	v1.GET("/settings", h.settings)
	v1.PUT("/settings", h.apply)
	v1.PUT("/uplinks/:name/mode", h.setUplinkMode)
	v1.PATCH("/uplinks/:name", h.setUplink)
	v1.PATCH("/multipath", h.setMultipath)
	v1.GET("/flows", h.flows)
	v1.GET("/events", h.events)
	v1.POST("/join", h.join)
	return e
}

// newEngine is what both daemons' handlers share: bounds, recovery, refusals.
func newEngine(rp reply, timeout time.Duration) *gin.Engine {
	gin.SetMode(gin.ReleaseMode)
	e := gin.New()
	// Only fails on addresses that do not parse, and nil has none.
	_ = e.SetTrustedProxies(nil)
	e.HandleMethodNotAllowed = true
	e.RedirectTrailingSlash = false
	// An escaped slash belongs to a name, it does not end it.
	e.UseRawPath = true

	e.Use(gin.CustomRecoveryWithWriter(nil, func(c *gin.Context, v any) {
		rp.log.Error("request panicked", "method", c.Request.Method, "path", c.Request.URL.Path,
			"panic", v, "stack", string(debug.Stack()))
		rp.problem(c, &Error{Code: CodeInternal, Detail: internalDetail})
	}))
	e.Use(func(c *gin.Context) {
		ctx, cancel := context.WithTimeout(c.Request.Context(), timeout)
		defer cancel()
		c.Request = c.Request.WithContext(ctx)
		c.Request.Body = http.MaxBytesReader(c.Writer, c.Request.Body, maxBody)
		c.Header("Cache-Control", "no-store")
		c.Header("X-Content-Type-Options", "nosniff")
		c.Next()
		if len(c.Errors) > 0 && !c.Writer.Written() {
			// The answer could not be encoded; gin alone would send an empty 200.
			rp.log.Error("request failed", "method", c.Request.Method, "path", c.Request.URL.Path, "error", c.Errors.Last().Err)
			rp.problem(c, &Error{Code: CodeInternal, Detail: internalDetail})
		}
	})
	e.NoRoute(func(c *gin.Context) {
		rp.problem(c, &Error{Code: CodeNotFound, Detail: "there is nothing at " + c.Request.URL.Path})
	})
	e.NoMethod(func(c *gin.Context) {
		rp.problem(c, &Error{Code: CodeMethodNotAllowed,
			Detail: c.Request.URL.Path + " does not take " + c.Request.Method})
	})
	e.GET("/healthz", func(c *gin.Context) {
		c.JSON(http.StatusOK, gin.H{"status": "ok"})
	})
	return e
}

type routerHandler struct {
	router  Router
	runtime prometheus.Gatherer
	reply
}

func (h routerHandler) ready(c *gin.Context) {
	s, err := h.router.Status(c.Request.Context())
	switch {
	case err != nil:
		h.fail(c, err)
	case s.Tunnel.State == "up" || s.Tunnel.State == "degraded":
		c.JSON(http.StatusOK, gin.H{"status": "ready", "tunnel": s.Tunnel.State})
	default:
		// Anything that is not known to work counts as not working.
		h.problem(c, &Error{Code: CodeTunnelDown, Detail: "the tunnel is down: " + s.Tunnel.Reason})
	}
}

func (h routerHandler) status(c *gin.Context) {
	s, err := h.router.Status(c.Request.Context())
	if err != nil {
		h.fail(c, err)
		return
	}
	// A list without elements is [] and not null, so that readers can iterate.
	s.Uplinks = orEmpty(s.Uplinks)
	s.Problems = orEmpty(s.Problems)
	s.Forwards = orEmpty(s.Forwards)
	if s.Packets.Drops == nil {
		s.Packets.Drops = map[string]uint64{}
	}
	s.LAN.Interfaces = orEmpty(s.LAN.Interfaces)
	s.Multipath.AvailableSchedulers = orEmpty(s.Multipath.AvailableSchedulers)
	s.Multipath.AvailablePathManagers = orEmpty(s.Multipath.AvailablePathManagers)
	c.JSON(http.StatusOK, s)
}

func (h routerHandler) metrics(c *gin.Context) {
	s, err := h.router.Status(c.Request.Context())
	if err != nil {
		h.fail(c, err)
		return
	}
	h.reply.metrics(c, h.runtime, routerSamples(s))
}

func (h routerHandler) settings(c *gin.Context) {
	rev, err := h.router.Settings(c.Request.Context())
	if err != nil {
		h.fail(c, err)
		return
	}
	c.Header("Vary", "Accept")
	if c.NegotiateFormat(gin.MIMEJSON, mimeYAML) == mimeYAML {
		c.Data(http.StatusOK, mimeYAML, rev.Settings.YAML())
		return
	}
	h.revision(c, rev, nil)
}

func (h routerHandler) apply(c *gin.Context) {
	body, err := readBody(c, mimeYAML, gin.MIMEJSON)
	if err != nil {
		h.fail(c, err)
		return
	}
	s, err := settings.Parse(body)
	if err != nil {
		h.fail(c, err)
		return
	}
	rev, err := h.router.Apply(c.Request.Context(), s, author)
	h.revision(c, rev, err)
}

func (h routerHandler) setUplinkMode(c *gin.Context) {
	var b modeBody
	if err := decode(c, &b); err != nil {
		h.fail(c, err)
		return
	}
	if !slices.Contains([]settings.Mode{settings.On, settings.Off, settings.Backup}, b.Mode) {
		h.problem(c, &Error{Code: CodeBadRequest, Detail: fmt.Sprintf("mode is %q; it must be on, off or backup", b.Mode)})
		return
	}
	rev, err := h.router.SetUplink(c.Request.Context(), c.Param("name"), UplinkChange{Mode: &b.Mode}, author)
	h.revision(c, rev, err)
}

func (h routerHandler) setUplink(c *gin.Context) {
	var b UplinkChange
	if err := decode(c, &b); err != nil {
		h.fail(c, err)
		return
	}
	if b == (UplinkChange{}) {
		h.problem(c, &Error{Code: CodeBadRequest, Detail: "nothing is to be changed; give mode, weight or preference"})
		return
	}
	rev, err := h.router.SetUplink(c.Request.Context(), c.Param("name"), b, author)
	h.revision(c, rev, err)
}

func (h routerHandler) setMultipath(c *gin.Context) {
	var b MultipathChange
	if err := decode(c, &b); err != nil {
		h.fail(c, err)
		return
	}
	if b == (MultipathChange{}) {
		h.problem(c, &Error{Code: CodeBadRequest,
			Detail: "nothing is to be changed; give enabled, path_manager, scheduler, congestion_control, checksum or syn_retries"})
		return
	}
	rev, err := h.router.SetMultipath(c.Request.Context(), b, author)
	h.revision(c, rev, err)
}

func (h routerHandler) join(c *gin.Context) {
	var b joinBody
	if err := decode(c, &b); err != nil {
		h.fail(c, err)
		return
	}
	if b.Token == "" {
		h.problem(c, &Error{Code: CodeBadRequest, Detail: "token is empty; it must be one enrolment token"})
		return
	}
	joined, err := h.router.Join(c.Request.Context(), b.Token)
	if err != nil {
		h.fail(c, err)
		return
	}
	c.JSON(http.StatusOK, joined)
}

// revision answers with a revision, or with the reason why there is none.
func (rp reply) revision(c *gin.Context, rev settings.Revision, err error) {
	status, warning := http.StatusOK, ""
	if pending := (*Pending)(nil); errors.As(err, &pending) {
		status, warning = http.StatusAccepted, pending.Reason
	} else if err != nil {
		rp.fail(c, err)
		return
	}
	c.JSON(status, Revision{
		Number: rev.Number, Time: rev.Time, Author: rev.Author, Settings: rev.Settings, Warning: warning,
	})
}

// decode reads one JSON value without unknown fields into v.
func decode(c *gin.Context, v any) error {
	body, err := readBody(c, gin.MIMEJSON)
	if err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return &Error{Code: CodeBadRequest, Detail: "the body is not the JSON expected here: " + err.Error()}
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return &Error{Code: CodeBadRequest, Detail: "the body goes on after its JSON value"}
	}
	return nil
}

// readBody reads a whole body of one of the types. The type is demanded because
// a foreign web page can send a form to another server, but not these.
func readBody(c *gin.Context, types ...string) ([]byte, error) {
	if !slices.Contains(types, c.ContentType()) {
		return nil, &Error{Code: CodeUnsupportedMediaType,
			Detail: fmt.Sprintf("Content-Type is %q; it must be one of %q", c.ContentType(), types)}
	}
	body, err := io.ReadAll(c.Request.Body)
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, &Error{Code: CodeBodyTooLarge, Detail: fmt.Sprintf("the body is larger than %d bytes", tooLarge.Limit)}
	}
	if err != nil {
		return nil, &Error{Code: CodeBadRequest, Detail: "the body could not be read: " + err.Error()}
	}
	return body, nil
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
