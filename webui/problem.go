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
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"
	"golang.org/x/sys/unix"

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
	CodeStorageFull          = "storage_full"

	CodeSettingsInvalid         = "settings_invalid"
	CodeUplinkUnknown           = "uplink_unknown"
	CodeRevisionUnknown         = "revision_unknown"
	CodeRevisionStale           = "revision_stale"      // another is in force than the change was made from
	CodeUnconfirmed             = "unconfirmed"         // settings that wait for it are in the way
	CodeNothingUnconfirmed      = "nothing_unconfirmed" // nothing to confirm or to go back to
	CodeLoginRequired           = "login_required"
	CodeReadOnly                = "read_only"     // the token may not change anything
	CodeTokenRefused            = "token_refused" // a session can do it
	CodeCrossOrigin             = "cross_origin"
	CodeHostUnknown             = "host_unknown"
	CodeUnclaimed               = "unclaimed" // there is no password yet
	CodeClaimClosed             = "claim_closed"
	CodeWeakPassword            = "weak_password"
	CodeWrongPassword           = "wrong_password"
	CodeTooManyLogins           = "too_many_logins"
	CodeTooManyTokens           = "too_many_tokens"
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
	CodeStorageFull:          http.StatusInsufficientStorage,

	CodeSettingsInvalid:         http.StatusUnprocessableEntity,
	CodeUplinkUnknown:           http.StatusNotFound,
	CodeRevisionUnknown:         http.StatusNotFound,
	CodeRevisionStale:           http.StatusPreconditionFailed,
	CodeUnconfirmed:             http.StatusConflict,
	CodeNothingUnconfirmed:      http.StatusConflict,
	CodeLoginRequired:           http.StatusUnauthorized,
	CodeReadOnly:                http.StatusForbidden,
	CodeTokenRefused:            http.StatusForbidden,
	CodeCrossOrigin:             http.StatusForbidden,
	CodeHostUnknown:             http.StatusForbidden,
	CodeUnclaimed:               http.StatusConflict,
	CodeClaimClosed:             http.StatusConflict,
	CodeWeakPassword:            http.StatusUnprocessableEntity,
	CodeWrongPassword:           http.StatusUnauthorized,
	CodeTooManyLogins:           http.StatusTooManyRequests,
	CodeTooManyTokens:           http.StatusConflict,
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
	// Problems are the single things, each by its place.
	Problems []settings.Problem
	// RetryAfter says when it makes sense to ask again, if it is known.
	RetryAfter time.Duration
}

func (e *Error) Error() string {
	if e.Detail == "" {
		return e.Code
	}
	return e.Detail
}

// NotYet comes with a revision that is stored but that the kernel does not
// have yet. It is a warning: reconciling goes on by itself.
type NotYet struct {
	Reason string
}

func (n *NotYet) Error() string { return "not in force yet: " + n.Reason }

// Stale refuses a change that was made from another revision than the one in force.
type Stale struct {
	// Base is what the change was made from, Current what is in force.
	Base    uint64
	Current settings.Revision
	// Changes are those that others have made between, if Base is still kept.
	Changes []settings.Change
}

func (s *Stale) Error() string {
	return fmt.Sprintf("the change was made from revision %d, and revision %d by %s is in force: look at what it changed, and make yours again",
		s.Base, s.Current.Number, s.Current.Author)
}

// problems are the changes of others.
func (s *Stale) problems() (list []settings.Problem) {
	for _, c := range s.Changes {
		list = append(list, settings.Problem{Path: c.Path, Reason: fmt.Sprintf("was %q, is %q", c.From, c.To)})
	}
	return list
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
		stale   *Stale
	)
	switch {
	case errors.As(err, &invalid):
		rp.problem(c, &Error{
			Code:     CodeSettingsInvalid,
			Detail:   fmt.Sprintf("the settings have %d problem(s); nothing was changed", len(invalid.Problems)),
			Problems: invalid.Problems,
		})
	case errors.As(err, &stale):
		rp.problem(c, &Error{Code: CodeRevisionStale, Detail: stale.Error(), Problems: stale.problems()})
	case errors.Is(err, settings.ErrUnconfirmed):
		rp.problem(c, &Error{Code: CodeUnconfirmed, Detail: err.Error() + ": `sheafctl confirm` keeps them, `sheafctl confirm --no` takes them back"})
	case errors.Is(err, settings.ErrNothingUnconfirmed), errors.Is(err, settings.ErrNothingBefore):
		rp.problem(c, &Error{Code: CodeNothingUnconfirmed, Detail: err.Error()})
	case errors.As(err, &coded):
		rp.problem(c, coded)
	case errors.Is(err, unix.ENOSPC):
		rp.log.Error("request failed", "method", c.Request.Method, "path", c.Request.URL.Path, "error", err)
		rp.problem(c, &Error{Code: CodeStorageFull, Detail: "the disk of this device is full; nothing was changed: make room in the state directory's file system"})
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

func (rp reply) problem(c *gin.Context, e *Error) {
	p := Problem{Type: "about:blank", Status: e.Status, Detail: e.Detail, Code: e.Code, Problems: e.Problems}
	if p.Status == 0 {
		p.Status = statusOf[e.Code]
	}
	if p.Status < 400 || p.Status > 599 {
		// A code unknown here and no status is the daemon's own mistake.
		p.Status = http.StatusInternalServerError
	}
	p.Title = http.StatusText(p.Status)
	c.Abort()
	if e.RetryAfter > 0 {
		c.Header("Retry-After", strconv.Itoa(int(math.Ceil(e.RetryAfter.Seconds()))))
	}
	c.Header("Content-Type", mimeProblem)
	c.JSON(p.Status, p)
}
