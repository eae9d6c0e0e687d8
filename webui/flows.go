package webui

// The path of live flows to an operator: GET /api/v1/flows ─▶ Router.Flows ─▶ Flows.

import (
	"context"
	"fmt"
)

// MaxFlows is how many flows are listed at most, as the contract says.
const MaxFlows = 10_000

// GetFlows answers GET /flows.
func (h routerHandler) GetFlows(ctx context.Context, r GetFlowsRequestObject) (GetFlowsResponseObject, error) {
	limit := MaxFlows
	if r.Params.Limit != nil {
		limit = *r.Params.Limit
	}
	f, err := h.router.Flows(ctx, limit)
	if err != nil {
		return nil, err
	}
	f.Flows = orEmpty(f.Flows)
	for i := range f.Flows {
		f.Flows[i].Uplinks = orEmpty(f.Flows[i].Uplinks)
	}
	return GetFlows200JSONResponse(f), nil
}

// Flows lists the live flows, at most limit of them.
func (c *Client) Flows(ctx context.Context, limit int) (Flows, error) {
	var f Flows
	err := c.get(ctx, fmt.Sprintf("/api/v1/flows?limit=%d", limit), &f)
	return f, err
}
