package webui

// The path of a refusal:
//
//	error of the daemon or of decoding ─▶ fail: which code and status ─▶ problem+json
//	                                   ─▶ Client: back to the same typed error

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	"github.com/gin-gonic/gin"

	"sheaf/daemon/control/settings"
)

const (
	mimeProblem = "application/problem+json" // RFC 9457
	mimeYAML    = "application/yaml"         // RFC 9512

	internalDetail = "the daemon failed; its log says why"
)

// The codes of problems. They never change meaning: the panel and scripts
// choose by them.
const (
	CodeBadRequest           = "bad_request"
	CodeNotFound             = "not_found"
	CodeMethodNotAllowed     = "method_not_allowed"
	CodeBodyTooLarge         = "body_too_large"
	CodeUnsupportedMediaType = "unsupported_media_type"
	CodeInternal             = "internal"
	CodeTimeout              = "timeout"

	CodeSettingsInvalid         = "settings_invalid"
	CodeUplinkUnknown           = "uplink_unknown"
	CodeTooManyWaiting          = "too_many_waiting" // for events
	CodeStopping                = "stopping"         // the daemon is
	CodeTunnelDown              = "tunnel_down"
	CodeTokenAltered            = "token_altered" // damaged, or not a token
	CodeTokenUsed               = "token_used"
	CodeTokenExpired            = "token_expired"
	CodeConcentratorUnreachable = "concentrator_unreachable"

	CodeRouterUnknown = "router_unknown"
	CodeRouterExists  = "router_exists"
)

// statusOf is the status that a code has unless the error names another.
var statusOf = map[string]int{
	CodeBadRequest:           http.StatusBadRequest,
	CodeNotFound:             http.StatusNotFound,
	CodeMethodNotAllowed:     http.StatusMethodNotAllowed,
	CodeBodyTooLarge:         http.StatusRequestEntityTooLarge,
	CodeUnsupportedMediaType: http.StatusUnsupportedMediaType,
	CodeInternal:             http.StatusInternalServerError,
	CodeTimeout:              http.StatusGatewayTimeout,

	CodeSettingsInvalid:         http.StatusUnprocessableEntity,
	CodeUplinkUnknown:           http.StatusNotFound,
	CodeTooManyWaiting:          http.StatusServiceUnavailable,
	CodeStopping:                http.StatusServiceUnavailable,
	CodeTunnelDown:              http.StatusServiceUnavailable,
	CodeTokenAltered:            http.StatusBadRequest,
	CodeTokenUsed:               http.StatusConflict,
	CodeTokenExpired:            http.StatusGone,
	CodeConcentratorUnreachable: http.StatusBadGateway,

	CodeRouterUnknown: http.StatusNotFound,
	CodeRouterExists:  http.StatusConflict,
}

// Error is a refusal with a code. The daemon returns it to choose what the
// operator is told; the Client returns it as the daemon chose it.
type Error struct {
	Code string
	// Status is the HTTP status; 0 stands for the usual one of the code.
	Status int
	// Detail says what was wrong, where, and what to do.
	Detail string
}

func (e *Error) Error() string {
	if e.Detail == "" {
		return e.Code
	}
	return e.Detail
}

// Pending comes with a revision that is stored but that the kernel does not
// have yet. It is a warning: reconciling goes on by itself.
type Pending struct {
	Reason string
}

func (p *Pending) Error() string { return "not in force yet: " + p.Reason }

// problem is a body of application/problem+json. Its type stays about:blank;
// code is what tells problems apart.
type problem struct {
	Type     string             `json:"type"`
	Title    string             `json:"title"`
	Status   int                `json:"status"`
	Detail   string             `json:"detail,omitempty"`
	Code     string             `json:"code"`
	Problems []settings.Problem `json:"problems,omitempty"`
}

// reply writes refusals.
type reply struct {
	log *slog.Logger
}

// fail answers with the problem that err is.
func (rp reply) fail(c *gin.Context, err error) {
	ctx := c.Request.Context()
	var (
		coded   *Error
		invalid *settings.Invalid
	)
	switch {
	case errors.As(err, &invalid):
		rp.problem(c, &Error{
			Code:   CodeSettingsInvalid,
			Detail: fmt.Sprintf("the settings have %d problem(s); nothing was changed", len(invalid.Problems)),
		}, invalid.Problems...)
	case errors.As(err, &coded):
		rp.problem(c, coded)
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		rp.log.Warn("request ran out of time", "method", c.Request.Method, "path", c.Request.URL.Path, "error", err)
		rp.problem(c, &Error{Code: CodeTimeout,
			Detail: "the daemon could not finish this in time; it may still take effect"})
	case errors.Is(ctx.Err(), context.Canceled):
		// The client is gone, or the daemon is stopping: nobody reads an answer.
		c.Abort()
	default:
		rp.log.Error("request failed", "method", c.Request.Method, "path", c.Request.URL.Path, "error", err)
		rp.problem(c, &Error{Code: CodeInternal, Detail: internalDetail})
	}
}

func (rp reply) problem(c *gin.Context, e *Error, lines ...settings.Problem) {
	p := problem{Type: "about:blank", Status: e.Status, Detail: e.Detail, Code: e.Code, Problems: lines}
	if p.Status == 0 {
		p.Status = statusOf[e.Code]
	}
	if p.Status < 400 || p.Status > 599 {
		// A code unknown here and no status is the daemon's own mistake.
		p.Status = http.StatusInternalServerError
	}
	p.Title = http.StatusText(p.Status)
	c.Abort()
	c.Header("Content-Type", mimeProblem)
	c.JSON(p.Status, p)
}
