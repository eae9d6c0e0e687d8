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
	"time"
)

// maxWait is how long a question for events may wait for one, as the contract says. It
// is less than requestTimeout.
const maxWait = 25 * time.Second

// GetEvents answers GET /events.
func (h routerHandler) GetEvents(ctx context.Context, r GetEventsRequestObject) (GetEventsResponseObject, error) {
	e, err := h.router.Events(ctx, r.Params.After, time.Duration(r.Params.Wait)*time.Second)
	if err != nil {
		return nil, err
	}
	e.Events = orEmpty(e.Events)
	return GetEvents200JSONResponse(e), nil
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
