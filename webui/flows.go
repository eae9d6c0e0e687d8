package webui

// The path of live flows to an operator: GET /api/v1/flows ─▶ Router.Flows ─▶ Flows.

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"
)

// MaxFlows is how many flows are listed at most.
const MaxFlows = 10_000

// Flows is the body of GET /api/v1/flows: those that have moved most, first.
type Flows struct {
	// Total is how many flows there are. It is more than are listed when the list
	// is cut.
	Total int    `json:"total"`
	Flows []Flow `json:"flows"`
}

// Flow is one live TCP connection of a LAN client, or to a forwarded port. Bytes
// are payload since it began; up is out of the LAN.
type Flow struct {
	Client      string `json:"client"` // host:port of who opened it
	Destination string `json:"destination"`
	// Inbound says that the client is on the Internet and the destination is a
	// forward's. With source "router" the client's address is not seen here.
	Inbound bool `json:"inbound"`
	// Through is tunnel, or direct for a flow that began while the tunnel was down.
	Through   string    `json:"through"`
	Since     time.Time `json:"since"`
	AgeS      float64   `json:"age_s"` // seconds
	UpBytes   uint64    `json:"up_bytes"`
	DownBytes uint64    `json:"down_bytes"`
	// Uplinks says what has gone over each. Here frames, encryption and what was
	// sent twice count as well, so they add up to a little more than the payload.
	Uplinks []UplinkBytes `json:"uplinks"`
}

// UplinkBytes is a flow's share of one uplink.
type UplinkBytes struct {
	Name      string `json:"name"`    // empty when no uplink is known to have had the address
	Address   string `json:"address"` // its own, which the bytes have left from or come to
	UpBytes   uint64 `json:"up_bytes"`
	DownBytes uint64 `json:"down_bytes"`
}

func (h routerHandler) flows(c *gin.Context) {
	limit := uint64(MaxFlows)
	if err := number(c, "limit", 1, MaxFlows, &limit); err != nil {
		h.fail(c, err)
		return
	}
	f, err := h.router.Flows(c.Request.Context(), int(limit))
	if err != nil {
		h.fail(c, err)
		return
	}
	f.Flows = orEmpty(f.Flows)
	for i := range f.Flows {
		f.Flows[i].Uplinks = orEmpty(f.Flows[i].Uplinks)
	}
	c.JSON(http.StatusOK, f)
}

// number reads a query parameter into n, which keeps its value when it is absent.
func number(c *gin.Context, name string, least, most uint64, n *uint64) error {
	text, given := c.GetQuery(name)
	if !given {
		return nil
	}
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil || v < least || v > most {
		return &Error{Code: CodeBadRequest, Detail: fmt.Sprintf("%s is %q; it must be a number from %d to %d", name, text, least, most)}
	}
	*n = v
	return nil
}

// Flows lists the live flows, at most limit of them.
func (c *Client) Flows(ctx context.Context, limit int) (Flows, error) {
	var f Flows
	err := c.get(ctx, fmt.Sprintf("/api/v1/flows?limit=%d", limit), &f)
	return f, err
}
