// Package webui is how people and programs drive the daemons: the HTTP API, the
// unix socket it is served on, and the client that sheafctl uses.
//
// The path of a request through this package:
//
//	socket ─▶ engine: bounds on size and time ─▶ contract (openapi.yaml) ─▶ generated
//	server (api.gen.go) ─▶ handler ─▶ Router or Concentrator (the daemon) ─▶ JSON, or a
//	problem with a code
//
// Whoever can open the socket is the administrator: its mode is 0600, so that is
// root. Whoever comes over the LAN has to log in (panel.go, access.go). Nothing else is
// decided here; the daemon does, behind the interface it satisfies.
package webui

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"math"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
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
)

// Router is what the router daemon does for its operator.
type Router interface {
	Status(ctx context.Context) (Status, error)
	// Settings returns the revision in force.
	Settings(ctx context.Context) (settings.Revision, error)
	// Revisions returns those that are kept, the newest first.
	Revisions(ctx context.Context) ([]settings.Revision, error)
	// Unconfirmed returns what is taken back unless it is confirmed, or nil.
	Unconfirmed(ctx context.Context) (*settings.Unconfirmed, error)
	// Apply validates s, stores it as a revision and returns once the kernel
	// has it. A revision that is stored but that the kernel does not have yet
	// is returned together with a *NotYet.
	Apply(ctx context.Context, s settings.Settings, edit Edit) (settings.Revision, error)
	// SetUplink is Apply of the settings in force with some of one uplink changed.
	SetUplink(ctx context.Context, name string, change UplinkChange, edit Edit) (settings.Revision, error)
	// SetMultipath is Apply of the settings in force with some multipath settings
	// changed. What the kernel does not offer is refused.
	SetMultipath(ctx context.Context, change MultipathChange, edit Edit) (settings.Revision, error)
	// Confirm lets the unconfirmed revision of that number stay, and TakeBack applies
	// the settings from before it.
	Confirm(ctx context.Context, revision uint64) (settings.Revision, error)
	TakeBack(ctx context.Context, author string) (settings.Revision, error)
	// Diagnose looks at everything, in the order in which one needs the other.
	Diagnose(ctx context.Context) (Diagnosis, error)
	// History is what an uplink has carried in the last span, in slots of an interval.
	History(ctx context.Context, name string, interval, span time.Duration) (History, error)
	// Flows lists the live flows that have moved most, at most limit.
	Flows(ctx context.Context, limit int) (Flows, error)
	// Events returns what has happened after the event with an ID. If that is
	// nothing it waits for it, and then, or when ctx ends, may return nothing.
	Events(ctx context.Context, after uint64, wait time.Duration) (Events, error)
	// Join enrols with the concentrator that issued the token.
	Join(ctx context.Context, token string) (Joined, error)
}

// Edit says how a change of settings is made.
type Edit struct {
	Author string
	// Base is the revision that the change was made from, nil for whichever is in
	// force. If that is another one the change is refused with a *Stale.
	Base *uint64
	// Confirm is how long the change stays without being confirmed; 0 is for good.
	Confirm time.Duration
}

// Of returns the uplink u with the change made.
func (c UplinkChange) Of(u settings.Uplink) settings.Uplink {
	change(&u.Mode, c.Mode)
	change(&u.Weight, c.Weight)
	change(&u.Preference, c.Preference)
	return u
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

// NewRouterHandler serves the API of the router daemon on its socket: whoever can open
// that is the administrator.
func NewRouterHandler(r Router, access *Access, log *slog.Logger) http.Handler {
	return newRouterHandler(r, access, log, requestTimeout, func(c *gin.Context) { c.Set(identityKey, socketIdentity) })
}

// NewPanelHandler serves the same to browsers and programs of the LAN that have logged in.
func NewPanelHandler(r Router, access *Access, log *slog.Logger) http.Handler {
	return newRouterHandler(r, access, log, requestTimeout, newGuard(access, reply{log}).check)
}

func newRouterHandler(r Router, access *Access, log *slog.Logger, timeout time.Duration, admit gin.HandlerFunc) http.Handler {
	h := routerHandler{router: r, access: access, status: new(statusText), runtime: newRuntimeMetrics(), reply: reply{log}}
	k, err := theContract()
	if err != nil {
		panic("webui: the contract in this program cannot be read: " + err.Error())
	}
	e := newEngine(h.reply, timeout, admit)
	e.GET("/readyz", h.ready)
	e.GET("/metrics", h.metrics)
	e.GET(basePath+"/openapi.json", func(c *gin.Context) { c.Data(http.StatusOK, gin.MIMEJSON, k.document) })
	e.Use(k.check(h.reply))
	RegisterHandlersWithOptions(e, NewStrictHandlerWithOptions(h, nil, StrictGinServerOptions{
		RequestErrorHandlerFunc: func(c *gin.Context, err error) {
			h.problem(c, &Error{Code: CodeBadRequest, Detail: "the body is not the JSON expected here: " + err.Error()})
		},
		HandlerErrorFunc:         h.fail,
		ResponseErrorHandlerFunc: h.fail,
	}), GinServerOptions{
		BaseURL: basePath,
		ErrorHandler: func(c *gin.Context, err error, _ int) {
			h.problem(c, &Error{Code: CodeBadRequest, Detail: err.Error()})
		},
	})
	return e
}

// newEngine is what both daemons' handlers share: bounds, recovery, refusals.
func newEngine(rp reply, timeout time.Duration, admit ...gin.HandlerFunc) *gin.Engine {
	gin.SetMode(gin.ReleaseMode)
	e := gin.New()
	// Only fails on addresses that do not parse, and nil has none.
	_ = e.SetTrustedProxies(nil)
	e.HandleMethodNotAllowed = true
	e.RedirectTrailingSlash = false
	// Handlers get gin's context: it ends with the request's.
	e.ContextWithFallback = true
	// An escaped slash belongs to a name, it does not end it.
	e.UseRawPath = true

	e.Use(gin.CustomRecoveryWithWriter(nil, func(c *gin.Context, v any) {
		rp.log.Error("request panicked", "method", c.Request.Method, "path", c.Request.URL.Path,
			"panic", v, "stack", string(debug.Stack()))
		rp.problem(c, &Error{Code: CodeInternal, Detail: internalDetail})
	}))
	e.Use(func(c *gin.Context) {
		if !endless(c) {
			ctx, cancel := context.WithTimeout(c.Request.Context(), timeout)
			defer cancel()
			c.Request = c.Request.WithContext(ctx)
		}
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
	e.Use(admit...)
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

// routerHandler is the generated StrictServerInterface.
type routerHandler struct {
	router  Router
	access  *Access
	status  *statusText
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

func (h routerHandler) metrics(c *gin.Context) {
	s, err := h.router.Status(c.Request.Context())
	if err != nil {
		h.fail(c, err)
		return
	}
	h.reply.metrics(c, h.runtime, routerSamples(s))
}

// GetStatus answers GET /status.
func (h routerHandler) GetStatus(ctx context.Context, _ GetStatusRequestObject) (GetStatusResponseObject, error) {
	s, err := h.router.Status(ctx)
	if err != nil {
		return nil, err
	}
	return GetStatus200JSONResponse(listed(s)), nil
}

// listed is a status for readers that iterate: a list without elements is [] and not
// null.
func listed(s Status) Status {
	s.Uplinks = orEmpty(s.Uplinks)
	s.Problems = orEmpty(s.Problems)
	s.Forwards = orEmpty(s.Forwards)
	if s.Packets.Drops == nil {
		s.Packets.Drops = map[string]uint64{}
	}
	s.LAN.Interfaces = orEmpty(s.LAN.Interfaces)
	s.Multipath.AvailableSchedulers = orEmpty(s.Multipath.AvailableSchedulers)
	s.Multipath.AvailablePathManagers = orEmpty(s.Multipath.AvailablePathManagers)
	return s
}

// GetSettings answers GET /settings.
func (h routerHandler) GetSettings(ctx context.Context, _ GetSettingsRequestObject) (GetSettingsResponseObject, error) {
	rev, err := h.router.Settings(ctx)
	if err != nil {
		return nil, err
	}
	if c, ok := ctx.(*gin.Context); ok {
		c.Header("Vary", "Accept")
		if c.NegotiateFormat(gin.MIMEJSON, mimeYAML) == mimeYAML {
			text := rev.Settings.YAML()
			return GetSettings200ApplicationYamlResponse{Body: bytes.NewReader(text), ContentLength: int64(len(text)),
				Headers: GetSettings200ResponseHeaders{ETag: etag(rev.Number)}}, nil
		}
	}
	return h.answer(ctx, rev, nil)
}

// PutSettings answers PUT /settings.
func (h routerHandler) PutSettings(ctx context.Context, r PutSettingsRequestObject) (PutSettingsResponseObject, error) {
	s, err := parse(r.JSONBody, r.Body)
	if err != nil {
		return nil, err
	}
	rev, err := h.router.Apply(ctx, s, edit(ctx, r.Params.IfMatch, r.Params.ConfirmS))
	return h.answer(ctx, rev, err)
}

// CompareSettings answers POST /settings/changes.
func (h routerHandler) CompareSettings(ctx context.Context, r CompareSettingsRequestObject) (CompareSettingsResponseObject, error) {
	s, err := parse(r.JSONBody, r.Body)
	if err != nil {
		return nil, err
	}
	now, err := h.router.Settings(ctx)
	if err != nil {
		return nil, err
	}
	s.Concentrator.Token = "" // never stored, and so never different
	return CompareSettings200JSONResponse{Changes: settings.Changes(now.Settings, s)}, nil
}

// parse reads a settings text, which came as JSON or as YAML.
func parse(document *SettingsDocument, yaml io.Reader) (settings.Settings, error) {
	if document != nil {
		return settings.Parse(*document)
	}
	text, err := io.ReadAll(yaml)
	if err != nil {
		return settings.Settings{}, err
	}
	return settings.Parse(text)
}

// edit says how a change is made that came with an If-Match, which the contract has
// checked, and the seconds for its confirmation.
func edit(ctx context.Context, ifMatch string, confirmSeconds int) Edit {
	e := Edit{Author: identity(ctx).Name, Confirm: time.Duration(confirmSeconds) * time.Second}
	if ifMatch != "" {
		base, err := strconv.ParseUint(strings.Trim(ifMatch, `"`), 10, 64)
		if err != nil {
			base = math.MaxUint64 // a number that no revision has
		}
		e.Base = &base
	}
	return e
}

// SetUplink answers PATCH /uplinks/{name}.
func (h routerHandler) SetUplink(ctx context.Context, r SetUplinkRequestObject) (SetUplinkResponseObject, error) {
	if *r.Body == (UplinkChange{}) {
		return nil, &Error{Code: CodeBadRequest, Detail: "nothing is to be changed; give mode, weight or preference"}
	}
	rev, err := h.router.SetUplink(ctx, r.Name, *r.Body, edit(ctx, r.Params.IfMatch, r.Params.ConfirmS))
	return h.answer(ctx, rev, err)
}

// SetUplinkMode answers PUT /uplinks/{name}/mode.
func (h routerHandler) SetUplinkMode(ctx context.Context, r SetUplinkModeRequestObject) (SetUplinkModeResponseObject, error) {
	rev, err := h.router.SetUplink(ctx, r.Name, UplinkChange{Mode: &r.Body.Mode}, edit(ctx, r.Params.IfMatch, 0))
	return h.answer(ctx, rev, err)
}

// SetMultipath answers PATCH /multipath.
func (h routerHandler) SetMultipath(ctx context.Context, r SetMultipathRequestObject) (SetMultipathResponseObject, error) {
	if *r.Body == (MultipathChange{}) {
		return nil, &Error{Code: CodeBadRequest,
			Detail: "nothing is to be changed; give enabled, path_manager, scheduler, congestion_control, checksum or syn_retries"}
	}
	rev, err := h.router.SetMultipath(ctx, *r.Body, edit(ctx, r.Params.IfMatch, r.Params.ConfirmS))
	return h.answer(ctx, rev, err)
}

// GetDiagnosis answers GET /diagnosis.
func (h routerHandler) GetDiagnosis(ctx context.Context, _ GetDiagnosisRequestObject) (GetDiagnosisResponseObject, error) {
	d, err := h.router.Diagnose(ctx)
	d.Checks = orEmpty(d.Checks)
	return GetDiagnosis200JSONResponse(d), err
}

// Join answers POST /join.
func (h routerHandler) Join(ctx context.Context, r JoinRequestObject) (JoinResponseObject, error) {
	joined, err := h.router.Join(ctx, r.Body.Token)
	return Join200JSONResponse(joined), err
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
