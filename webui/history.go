package webui

// The path of an uplink's past to a graph: GET /api/v1/uplinks/NAME/history ─▶
// Router.History, which keeps it in slots of fixed length ─▶ History.

import (
	"context"
	"time"
)

// GetHistory answers GET /uplinks/{name}/history.
func (h routerHandler) GetHistory(ctx context.Context, r GetHistoryRequestObject) (GetHistoryResponseObject, error) {
	interval, last := r.Params.IntervalS, r.Params.LastS
	if interval == 0 {
		interval = 10
	}
	if last == 0 {
		last = 3600
	}
	s, err := h.router.History(ctx, r.Name, time.Duration(interval)*time.Second, time.Duration(last)*time.Second)
	return GetHistory200JSONResponse(s), err
}
