package webui

// The path of a decision: concentratord's own commands (token, routers) ─▶ its
// unix socket ─▶ this handler ─▶ Concentrator.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
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
	// Inner4 and Inner6 are its addresses inside the tunnel.
	Inner4 string `json:"inner4"`
	Inner6 string `json:"inner6"`
	// Carriers are those that bring packets now.
	Carriers   []RouterCarrier   `json:"carriers"`
	PacketsRx  uint64            `json:"packets_rx"` // from the router
	PacketsTx  uint64            `json:"packets_tx"`
	Duplicates uint64            `json:"duplicates"` // second copies of interactive packets
	Reordered  uint64            `json:"reordered"`  // delivered after a later one
	Drops      map[string]uint64 `json:"drops"`      // packets not delivered, by reason
	// Forwards are the router's forwards that are active.
	Forwards []RouterForward `json:"forwards"`
}

// RouterCarrier is one way by which a router's packets come.
type RouterCarrier struct {
	Link    string `json:"link"`    // the router's name of the uplink; empty for stream
	Carrier string `json:"carrier"` // datagram, stream
}

// RouterForward is a port that the concentrator has opened for a router.
type RouterForward struct {
	Protocol string `json:"protocol"` // tcp, udp
	Port     uint16 `json:"port"`
	To       string `json:"to,omitempty"` // where it leads, if that is known here
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
	h := concentratorHandler{concentrator: con, runtime: newRuntimeMetrics(), reply: reply{log}}
	e := newEngine(h.reply, requestTimeout)
	e.GET("/metrics", h.metrics)
	v1 := e.Group("/api/v1")
	v1.POST("/tokens", h.createToken)
	v1.GET("/routers", h.routers)
	v1.DELETE("/routers/:name", h.removeRouter)
	return e
}

type concentratorHandler struct {
	concentrator Concentrator
	runtime      prometheus.Gatherer
	reply
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
	return nil
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
	list = append([]EnrolledRouter{}, list...)
	for i := range list {
		r := &list[i]
		r.Carriers, r.Forwards = orEmpty(r.Carriers), orEmpty(r.Forwards)
		if r.Drops == nil {
			r.Drops = map[string]uint64{}
		}
	}
	c.JSON(http.StatusOK, list)
}

func (h concentratorHandler) metrics(c *gin.Context) {
	list, err := h.concentrator.Routers(c.Request.Context())
	if err != nil {
		h.fail(c, err)
		return
	}
	h.reply.metrics(c, h.runtime, concentratorSamples(list))
}

func (h concentratorHandler) removeRouter(c *gin.Context) {
	if err := h.concentrator.RemoveRouter(c.Request.Context(), c.Param("name")); err != nil {
		h.fail(c, err)
		return
	}
	c.Status(http.StatusNoContent)
}
