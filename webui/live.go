package webui

// The path of what is happening to an open page:
//
//	Router.Events, waited for a second at a time ─┬▶ event: event, with its ID
//	Router.Status, once a second for all streams ─┴▶ event: status ─▶ GET /api/v1/live
//
// as server-sent events (WHATWG HTML, section 9.2). A page that comes back names the last
// event it has seen, and misses none that is kept.

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/gin-gonic/gin"
)

const (
	// liveEvery is how often the status is sent.
	liveEvery = time.Second
	// liveWrite is how long a client may take for what is sent: a dead one is dropped.
	liveWrite = 10 * time.Second
	// liveAdmit is how often it is looked whether who listens still may.
	liveAdmit = 5 * time.Second
)

// statusText is the status as JSON, read once for all who want it at about the same time.
type statusText struct {
	mu   sync.Mutex
	at   time.Time
	text []byte
}

func (s *statusText) get(ctx context.Context, r Router) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.at) < liveEvery*9/10 {
		return s.text, nil
	}
	status, err := r.Status(ctx)
	if err != nil {
		return nil, err
	}
	if s.text, err = json.Marshal(listed(status)); err != nil {
		return nil, err
	}
	s.at = time.Now()
	return s.text, nil
}

// GetLive answers GET /live.
func (h routerHandler) GetLive(ctx context.Context, r GetLiveRequestObject) (GetLiveResponseObject, error) {
	after, err := strconv.ParseUint(r.Params.LastEventID, 10, 64)
	if err != nil { // nothing was seen yet, and what was before is not for a stream
		known, err := h.router.Events(ctx, 0, 0)
		if err != nil {
			return nil, err
		}
		if n := len(known.Events); n > 0 {
			after = known.Events[n-1].ID
		}
	}
	return liveStream{routerHandler: h, ctx: ctx, after: after}, nil
}

// liveStream writes until the client, the session or the daemon ends.
type liveStream struct {
	routerHandler
	ctx   context.Context //nolint:containedctx // that of the request, which the generated server does not hand on
	after uint64
}

// VisitGetLiveResponse is for GET /live.
func (s liveStream) VisitGetLiveResponse(w http.ResponseWriter) error {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	control := http.NewResponseController(w)
	send := func(text []byte) bool {
		// Without its own deadline the server's, which is for whole answers, would cut it.
		if control.SetWriteDeadline(time.Now().Add(liveWrite)) != nil {
			return false
		}
		_, err := w.Write(text)
		return err == nil && control.Flush() == nil
	}
	who := identity(s.ctx)
	var sent, admitted time.Time
	for s.ctx.Err() == nil {
		if time.Since(admitted) >= liveAdmit {
			live, err := s.access.live(who)
			if err != nil {
				return err // logged, as nothing can be said to the client any more
			}
			if !live {
				return nil
			}
			admitted = time.Now()
		}
		var out bytes.Buffer
		if time.Since(sent) >= liveEvery {
			text, err := s.status.get(s.ctx, s.router)
			if err != nil {
				s.log.Warn("the live status could not be read", "error", err)
			} else {
				fmt.Fprintf(&out, "event: status\ndata: %s\n\n", text)
			}
			sent = time.Now()
		}
		wait := max(0, liveEvery-time.Since(sent))
		if out.Len() > 0 {
			if !send(out.Bytes()) {
				return nil
			}
			out.Reset()
		}
		waiting, cancel := context.WithTimeout(s.ctx, wait)
		news, err := s.router.Events(waiting, s.after, wait)
		cancel()
		if err != nil {
			return nil //nolint:nilerr // the daemon is stopping, or too many listen: the client comes again
		}
		for _, e := range news.Events {
			text, err := json.Marshal(e)
			if err != nil {
				return nil //nolint:nilerr // never so
			}
			fmt.Fprintf(&out, "id: %d\nevent: event\ndata: %s\n\n", e.ID, text)
			s.after = e.ID
		}
		if out.Len() > 0 && !send(out.Bytes()) {
			return nil
		}
	}
	return nil
}

// endless says whether an answer takes as long as the client listens.
func endless(c *gin.Context) bool { return c.FullPath() == basePath+"/live" }
