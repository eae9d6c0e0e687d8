package webui

// The path of what happens to an operator:
//
//	Router.Events keeps the last ones ─▶ GET /api/v1/events?after=ID&wait=S answers as
//	soon as there is a newer one ─▶ Client asks again, with the last ID it has seen
//
// The daemon holds nothing for a client between two questions. One that is slow
// misses events, and is told how many.

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"
)

// maxWait is how long a question for events may wait for one. It is less than
// requestTimeout.
const maxWait = 25 * time.Second

// Events is the body of GET /api/v1/events, the oldest first.
type Events struct {
	Events []Event `json:"events"`
	// Missed is how many of those asked for are not kept any more.
	Missed uint64 `json:"missed"`
}

// Event is something that has happened to the router.
type Event struct {
	// ID grows by one from event to event, and over restarts as the clock does.
	ID   uint64    `json:"id"`
	Time time.Time `json:"time"`
	// Kind is daemon, settings, uplink, tunnel, concentrator or kernel.
	Kind   string `json:"kind"`
	Uplink string `json:"uplink,omitempty"` // its name, if it is about one
	// Text says what happened. That of an uplink and of the tunnel begins with the
	// new state, as in Status, and the reason follows behind a colon.
	Text string `json:"text"`
}

func (h routerHandler) events(c *gin.Context) {
	var after, wait uint64
	for _, err := range []error{
		number(c, "after", 0, math.MaxUint64, &after), number(c, "wait", 0, uint64(maxWait/time.Second), &wait),
	} {
		if err != nil {
			h.fail(c, err)
			return
		}
	}
	e, err := h.router.Events(c.Request.Context(), after, time.Duration(wait)*time.Second)
	if err != nil {
		h.fail(c, err)
		return
	}
	e.Events = orEmpty(e.Events)
	c.JSON(http.StatusOK, e)
}

// Events returns what has happened after an event, 0 for all that is known. If
// there is nothing yet it waits for it up to 25 s, if it is to wait.
func (c *Client) Events(ctx context.Context, after uint64, wait bool) (Events, error) {
	var e Events
	path := fmt.Sprintf("/api/v1/events?after=%d", after)
	if wait {
		path += fmt.Sprintf("&wait=%d", maxWait/time.Second)
	}
	err := c.get(ctx, path, &e)
	return e, err
}
