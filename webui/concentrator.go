package webui

// The path of a decision: concentratord's own commands (token, routers) ─▶ its
// unix socket ─▶ this handler ─▶ Concentrator.

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"
)

// maxValidity bounds how long an enrolment token may wait to be used.
const maxValidity = 30 * 24 * time.Hour

// Concentrator is what the concentrator daemon does for its operator.
type Concentrator interface {
	// CreateToken returns a one-time token with which a router enrols as name
	// at one of the addresses.
	CreateToken(ctx context.Context, name string, addresses []string, validity time.Duration) (token string, err error)
	Routers(ctx context.Context) ([]EnrolledRouter, error)
	// RemoveRouter revokes a router and ends its live sessions.
	RemoveRouter(ctx context.Context, name string) error
}

// EnrolledRouter is one router that has used its token.
type EnrolledRouter struct {
	Name        string    `json:"name"`
	Fingerprint string    `json:"fingerprint"`
	EnrolledAt  time.Time `json:"enrolled_at"`
	// LastSeen is null until the first session.
	LastSeen *time.Time `json:"last_seen"`
	// Address is the remote address last seen.
	Address  string `json:"address"`
	Sessions int    `json:"sessions"`
	Flows    int    `json:"flows"`
	RxBytes  uint64 `json:"rx_bytes"`
	TxBytes  uint64 `json:"tx_bytes"`
}

// tokenBody is the body of POST /api/v1/tokens.
type tokenBody struct {
	Name            string   `json:"name"`
	Addresses       []string `json:"addresses"`
	ValiditySeconds int64    `json:"validity_seconds"`
}

// tokenReply answers it.
type tokenReply struct {
	Token string `json:"token"`
}

// NewConcentratorHandler serves the API of the concentrator daemon.
func NewConcentratorHandler(con Concentrator, log *slog.Logger) http.Handler {
	h := concentratorHandler{concentrator: con, reply: reply{log}}
	e := newEngine(h.reply, requestTimeout)
	v1 := e.Group("/api/v1")
	v1.POST("/tokens", h.createToken)
	v1.GET("/routers", h.routers)
	v1.DELETE("/routers/:name", h.removeRouter)
	return e
}

type concentratorHandler struct {
	concentrator Concentrator
	reply
}

func (h concentratorHandler) createToken(c *gin.Context) {
	var b tokenBody
	if err := decode(c, &b); err != nil {
		h.fail(c, err)
		return
	}
	// Names and addresses are the daemon's to judge, since its command does so
	// without this handler too. Only what would overflow is refused here.
	if b.ValiditySeconds < 1 || b.ValiditySeconds > int64(maxValidity/time.Second) {
		h.problem(c, &Error{Code: CodeBadRequest, Detail: fmt.Sprintf(
			"validity_seconds is %d; it must be from 1 to %d", b.ValiditySeconds, int64(maxValidity/time.Second))})
		return
	}
	token, err := h.concentrator.CreateToken(c.Request.Context(), b.Name, b.Addresses,
		time.Duration(b.ValiditySeconds)*time.Second)
	if err != nil {
		h.fail(c, err)
		return
	}
	c.JSON(http.StatusCreated, tokenReply{Token: token})
}

func (h concentratorHandler) routers(c *gin.Context) {
	list, err := h.concentrator.Routers(c.Request.Context())
	if err != nil {
		h.fail(c, err)
		return
	}
	c.JSON(http.StatusOK, orEmpty(list))
}

func (h concentratorHandler) removeRouter(c *gin.Context) {
	if err := h.concentrator.RemoveRouter(c.Request.Context(), c.Param("name")); err != nil {
		h.fail(c, err)
		return
	}
	c.Status(http.StatusNoContent)
}
