package webui

// The path of a revision to its reader:
//
//	settings.Store keeps them ─▶ Router.Revisions ─▶ here: one, all with what each changed,
//	or two compared ─▶ JSON
//
// and of a change that is only tried: Apply with Edit.Confirm ─▶ the answer's unconfirmed
// counts down ─▶ POST /confirm keeps it, DELETE /confirm or the deadline takes it back.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"

	"sheaf/daemon/control/settings"
)

// revisionAnswer is a revision, or a problem why there is none, as the answer of every
// operation that makes one.
type revisionAnswer struct {
	status int
	body   Revision
}

// answer is for a revision of the daemon's, which comes with a *NotYet if not all of it
// is in force.
func (h routerHandler) answer(ctx context.Context, rev settings.Revision, err error) (revisionAnswer, error) {
	a := revisionAnswer{http.StatusOK, Revision{Number: rev.Number, Time: rev.Time, Author: rev.Author, Settings: rev.Settings}}
	if later := (*NotYet)(nil); errors.As(err, &later) {
		a.status, a.body.Warning = http.StatusAccepted, later.Reason
	} else if err != nil {
		return a, err
	}
	tried, err := h.router.Unconfirmed(ctx)
	if err == nil && tried != nil && tried.Revision == rev.Number {
		a.body.Unconfirmed = NewUnconfirmed(*tried, time.Now())
	}
	return a, err
}

// NewUnconfirmed is u as it is told.
func NewUnconfirmed(u settings.Unconfirmed, now time.Time) *Unconfirmed {
	return &Unconfirmed{Revision: u.Revision, BackTo: u.BackTo, Deadline: u.Deadline, RemainingS: u.Remaining(now).Seconds()}
}

func etag(revision uint64) string { return strconv.Quote(strconv.FormatUint(revision, 10)) }

func (a revisionAnswer) write(w http.ResponseWriter) error {
	body, err := json.Marshal(a.body)
	if err != nil {
		return err
	}
	w.Header().Set("ETag", etag(a.body.Number))
	w.Header().Set("Content-Type", gin.MIMEJSON)
	w.WriteHeader(a.status)
	_, err = w.Write(body)
	return err
}

// VisitGetSettingsResponse and the like make it what the generated server asks for.
func (a revisionAnswer) VisitGetSettingsResponse(w http.ResponseWriter) error { return a.write(w) }

// VisitPutSettingsResponse is for PUT /settings.
func (a revisionAnswer) VisitPutSettingsResponse(w http.ResponseWriter) error { return a.write(w) }

// VisitSetUplinkResponse is for PATCH /uplinks/{name}.
func (a revisionAnswer) VisitSetUplinkResponse(w http.ResponseWriter) error { return a.write(w) }

// VisitSetUplinkModeResponse is for PUT /uplinks/{name}/mode.
func (a revisionAnswer) VisitSetUplinkModeResponse(w http.ResponseWriter) error { return a.write(w) }

// VisitSetMultipathResponse is for PATCH /multipath.
func (a revisionAnswer) VisitSetMultipathResponse(w http.ResponseWriter) error { return a.write(w) }

// VisitGetRevisionResponse is for GET /revisions/{revision}.
func (a revisionAnswer) VisitGetRevisionResponse(w http.ResponseWriter) error { return a.write(w) }

// VisitRestoreRevisionResponse is for POST /revisions/{revision}/restore.
func (a revisionAnswer) VisitRestoreRevisionResponse(w http.ResponseWriter) error { return a.write(w) }

// VisitConfirmResponse is for POST /confirm.
func (a revisionAnswer) VisitConfirmResponse(w http.ResponseWriter) error { return a.write(w) }

// VisitTakeBackResponse is for DELETE /confirm.
func (a revisionAnswer) VisitTakeBackResponse(w http.ResponseWriter) error { return a.write(w) }

// GetRevisions answers GET /revisions.
func (h routerHandler) GetRevisions(ctx context.Context, _ GetRevisionsRequestObject) (GetRevisionsResponseObject, error) {
	all, err := h.router.Revisions(ctx)
	if err != nil {
		return nil, err
	}
	list := []RevisionSummary{}
	for i, r := range all {
		changes := []settings.Change{} // the one before may not be kept any more
		if i+1 < len(all) {
			changes = settings.Changes(all[i+1].Settings, r.Settings)
		} else if r.Number == 1 {
			changes = settings.Changes(settings.Default(), r.Settings)
		}
		list = append(list, RevisionSummary{Number: r.Number, Time: r.Time, Author: r.Author, Changes: changes})
	}
	return GetRevisions200JSONResponse{Revisions: list}, nil
}

// revision finds one of those that are kept. 0 is the defaults, before the first.
func (h routerHandler) revision(ctx context.Context, number uint64) (settings.Revision, error) {
	all, err := h.router.Revisions(ctx)
	if err != nil {
		return settings.Revision{}, err
	}
	if number == 0 {
		return settings.Revision{Settings: settings.Default()}, nil
	}
	i := slices.IndexFunc(all, func(r settings.Revision) bool { return r.Number == number })
	if i < 0 {
		return settings.Revision{}, &Error{Code: CodeRevisionUnknown, Detail: fmt.Sprintf("revision %d is not kept; `sheafctl revisions` lists those that are", number)}
	}
	return all[i], nil
}

// GetRevision answers GET /revisions/{revision}.
func (h routerHandler) GetRevision(ctx context.Context, r GetRevisionRequestObject) (GetRevisionResponseObject, error) {
	rev, err := h.revision(ctx, r.Revision)
	if err != nil {
		return nil, err
	}
	return h.answer(ctx, rev, nil)
}

// CompareRevisions answers GET /revisions/{revision}/changes.
func (h routerHandler) CompareRevisions(ctx context.Context, r CompareRevisionsRequestObject) (CompareRevisionsResponseObject, error) {
	to, err := h.revision(ctx, r.Revision)
	if err != nil {
		return nil, err
	}
	var from settings.Revision
	if r.Params.From == nil {
		from, err = h.router.Settings(ctx)
	} else {
		from, err = h.revision(ctx, *r.Params.From)
	}
	if err != nil {
		return nil, err
	}
	return CompareRevisions200JSONResponse{Changes: settings.Changes(from.Settings, to.Settings)}, nil
}

// RestoreRevision answers POST /revisions/{revision}/restore.
func (h routerHandler) RestoreRevision(ctx context.Context, r RestoreRevisionRequestObject) (RestoreRevisionResponseObject, error) {
	old, err := h.revision(ctx, r.Revision)
	if err != nil {
		return nil, err
	}
	rev, err := h.router.Apply(ctx, old.Settings, edit(ctx, r.Params.IfMatch, r.Params.ConfirmS))
	return h.answer(ctx, rev, err)
}

// Confirm answers POST /confirm.
func (h routerHandler) Confirm(ctx context.Context, r ConfirmRequestObject) (ConfirmResponseObject, error) {
	rev, err := h.router.Confirm(ctx, r.Body.Revision)
	return h.answer(ctx, rev, err)
}

// TakeBack answers DELETE /confirm.
func (h routerHandler) TakeBack(ctx context.Context, _ TakeBackRequestObject) (TakeBackResponseObject, error) {
	rev, err := h.router.TakeBack(ctx, identity(ctx).Name)
	return h.answer(ctx, rev, err)
}
