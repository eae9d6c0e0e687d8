package router

// The path of a change of settings:
//
//	Apply, SetUplink, SetMultipath: made from the revision in force? ─▶ settings.Store: a
//	revision on the disk ─▶ follow: the reconcile loop, until the kernel has it
//
// and of one that is only tried: the store knows until when ─▶ keepConfirming takes it back
// then, unless Confirm came. A daemon that starts finds it in the store as well.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/tunnel"
	"sheaf/webui"
)

const (
	// safeMode is the author of the revisions that take others back.
	safeMode = "safe mode"
	// takeBackRetry is how long after a failure, as of a full disk, taking back is tried again.
	takeBackRetry = 5 * time.Second
)

// applyFile stores the settings given on the command line as a revision of
// their own, if they differ from those in force.
func (r *Router) applyFile() error {
	s, err := settings.Parse(r.config.Settings)
	if err != nil {
		return fmt.Errorf("--settings: %w", err)
	}
	if token := s.Concentrator.Token; token != "" && !r.used(token) {
		if _, err := tunnel.ParseToken(token); err != nil {
			return fmt.Errorf("--settings: concentrator.token: %w", err)
		}
		// keepJoining uses it as soon as an uplink is fit.
		if err := r.state.setPending(token); err != nil {
			return err
		}
	}
	s.Concentrator.Token = ""
	r.revision, err = r.state.settings.Put(s, "file", time.Now())
	if errors.Is(err, settings.ErrUnconfirmed) {
		// Whoever gave the file has not confirmed what was before.
		if _, err = r.state.settings.TakeBack(safeMode, time.Now()); err == nil {
			r.revision, err = r.state.settings.Put(s, "file", time.Now())
		}
	}
	return err
}

// Settings returns the revision in force.
func (r *Router) Settings(context.Context) (settings.Revision, error) { return r.current(), nil }

// Revisions returns those that are kept, the newest first.
func (r *Router) Revisions(context.Context) ([]settings.Revision, error) {
	return r.state.settings.Revisions()
}

// Unconfirmed returns what is taken back unless it is confirmed, or nil.
func (r *Router) Unconfirmed(context.Context) (*settings.Unconfirmed, error) {
	u, waiting, err := r.state.settings.Unconfirmed()
	if err != nil || !waiting {
		return nil, err
	}
	return &u, nil
}

// Apply stores settings as a revision and waits for the kernel to follow.
func (r *Router) Apply(ctx context.Context, s settings.Settings, edit webui.Edit) (settings.Revision, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	if err := r.fresh(edit); err != nil {
		return settings.Revision{}, err
	}
	if err := settings.Validate(s); err != nil {
		return settings.Revision{}, err
	}
	// The token is used, not kept: it is worthless afterwards, and a secret until then.
	token := s.Concentrator.Token
	s.Concentrator.Token = ""
	var later error
	if token != "" && !r.used(token) {
		if edit.Confirm > 0 {
			return settings.Revision{}, &settings.Invalid{Problems: []settings.Problem{{Path: "concentrator.token",
				Reason: "a token works once, and joining cannot be taken back: join first, then try the settings without it"}}}
		}
		// First, so that a refused token leaves everything as it was.
		_, err := r.join(ctx, token)
		var unreachable *webui.Error
		switch {
		case errors.As(err, &unreachable) && unreachable.Code == webui.CodeConcentratorUnreachable:
			if err := r.state.setPending(token); err != nil {
				return settings.Revision{}, err
			}
			later = fmt.Errorf("the router joins as soon as it can: %w", err)
		case err != nil:
			return settings.Revision{}, err
		}
	}
	revision, err := r.put(ctx, s, edit)
	if later != nil && err == nil {
		kick(r.joined)
		err = &webui.NotYet{Reason: later.Error()}
	}
	return revision, err
}

// SetUplink changes settings of one uplink, on live connections too.
func (r *Router) SetUplink(ctx context.Context, name string, change webui.UplinkChange, edit webui.Edit) (settings.Revision, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	if err := r.fresh(edit); err != nil {
		return settings.Revision{}, err
	}
	s := r.current().Settings
	s.Uplinks = slices.Clone(s.Uplinks)
	i := slices.IndexFunc(s.Uplinks, func(u settings.Uplink) bool { return u.Name == name })
	if i < 0 {
		return settings.Revision{}, unknownUplink(name)
	}
	s.Uplinks[i] = change.Of(s.Uplinks[i])
	return r.put(ctx, s, edit)
}

func unknownUplink(name string) error {
	return &webui.Error{Code: webui.CodeUplinkUnknown, Detail: fmt.Sprintf("there is no uplink %q; `sheafctl uplinks` lists them", name)}
}

// SetMultipath changes multipath settings.
func (r *Router) SetMultipath(ctx context.Context, change webui.MultipathChange, edit webui.Edit) (settings.Revision, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	if err := r.fresh(edit); err != nil {
		return settings.Revision{}, err
	}
	s := r.current().Settings
	s.Multipath = change.Of(s.Multipath)
	if change.Scheduler != nil {
		info, err := r.kernel.Info()
		if err != nil {
			return settings.Revision{}, err
		}
		if problem := unoffered(*change.Scheduler, info.Schedulers); problem != nil {
			return settings.Revision{}, problem
		}
	}
	return r.put(ctx, s, edit)
}

// unoffered refuses a scheduler that is not among those that the kernel lists, and
// is not approximated. One that lists none is asked by trying.
func unoffered(scheduler string, offered []string) error {
	if len(offered) == 0 || slices.Contains(offered, scheduler) || scheduler == firstfit {
		return nil
	}
	if !slices.Contains(offered, firstfit) {
		offered = append(slices.Clone(offered), firstfit+" (approximated)")
	}
	return &settings.Invalid{Problems: []settings.Problem{{Path: "multipath.scheduler",
		Reason: fmt.Sprintf("this kernel has no scheduler %q: offered are %s", scheduler, strings.Join(offered, ", "))}}}
}

// fresh refuses an edit of another revision than the one in force.
func (r *Router) fresh(edit webui.Edit) error {
	current := r.current()
	if edit.Base == nil || *edit.Base == current.Number {
		return nil
	}
	stale := &webui.Stale{Base: *edit.Base, Current: current}
	base, err := r.state.settings.Revision(*edit.Base)
	switch {
	case err == nil:
		stale.Changes = settings.Changes(base.Settings, current.Settings)
	case !errors.Is(err, settings.ErrNoRevision):
		return err
	}
	return stale
}

// put stores settings and makes them so.
func (r *Router) put(ctx context.Context, s settings.Settings, edit webui.Edit) (settings.Revision, error) {
	if edit.Confirm == 0 {
		revision, err := r.state.settings.Put(s, edit.Author, time.Now())
		if err != nil {
			return settings.Revision{}, err
		}
		return revision, r.follow(ctx, revision, "")
	}
	revision, err := r.state.settings.Try(s, edit.Author, time.Now(), edit.Confirm)
	if err != nil {
		return settings.Revision{}, err
	}
	kick(r.tried)
	return revision, r.follow(ctx, revision, fmt.Sprintf(", taken back after %v unless it is confirmed", edit.Confirm))
}

// follow makes a stored revision the one in force. Its event ends in note.
func (r *Router) follow(ctx context.Context, revision settings.Revision, note string) error {
	if revision.Number != r.current().Number {
		r.tell(fmt.Sprintf("revision %d by %s%s", revision.Number, revision.Author, note))
	}
	r.mu.Lock()
	r.revision = revision
	r.mu.Unlock()
	if r.panel != nil {
		r.panel.Listen(revision.Settings.LAN.Interfaces)
	}
	ctx, cancel := context.WithTimeout(ctx, syncTime)
	defer cancel()
	err := r.loop.Sync(ctx)
	// After the kernel: sessions dialled before would still be of the old kind.
	r.setPeer()
	r.setWishes()
	r.keepCopy()
	if err != nil {
		return &webui.NotYet{Reason: err.Error()}
	}
	return nil
}

// keepCopy puts a copy of the state aside. What is asked for does not depend on it.
func (r *Router) keepCopy() {
	if err := r.state.keepCopy(r.config.StateDir); err != nil {
		r.log.Error("no copy of the state was made; one without damage is needed if the disk fails", "error", err)
	}
}

// tell adds an event of the settings.
func (r *Router) tell(text string) {
	r.events.add(time.Now(), webui.Event{Kind: "settings", Text: text})
}

// Confirm lets the unconfirmed revision of that number stay.
func (r *Router) Confirm(_ context.Context, revision uint64) (settings.Revision, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	if err := r.state.settings.Confirm(revision); err != nil {
		return settings.Revision{}, err
	}
	kick(r.tried)
	r.tell(fmt.Sprintf("revision %d confirmed", revision))
	return r.current(), nil
}

// TakeBack applies the settings from before the unconfirmed ones.
func (r *Router) TakeBack(ctx context.Context, author string) (settings.Revision, error) {
	r.changing.Lock()
	defer r.changing.Unlock()
	return r.takeBack(ctx, author, "")
}

func (r *Router) takeBack(ctx context.Context, author, note string) (settings.Revision, error) {
	revision, err := r.state.settings.TakeBack(author, time.Now())
	if err != nil {
		return settings.Revision{}, err
	}
	kick(r.tried)
	return revision, r.follow(ctx, revision, note)
}

// keepConfirming takes settings back that nobody confirms in time.
func (r *Router) keepConfirming(ctx context.Context) error {
	for {
		u, waiting, err := r.state.settings.Unconfirmed()
		if err != nil {
			return err
		}
		var due <-chan time.Time
		if waiting {
			due = time.After(u.Remaining(time.Now()))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.tried:
			continue
		case <-due:
		}
		err = r.expire(ctx, u)
		if notYet := (*webui.NotYet)(nil); err == nil || errors.As(err, &notYet) {
			continue
		}
		r.log.Error("the settings that nobody has confirmed could not be taken back; trying again", "revision", u.Revision, "error", err, "in", takeBackRetry)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(takeBackRetry):
		}
	}
}

// expire takes u back if nobody has confirmed it, or taken it back, in the last moment.
func (r *Router) expire(ctx context.Context, u settings.Unconfirmed) error {
	r.changing.Lock()
	defer r.changing.Unlock()
	now, waiting, err := r.state.settings.Unconfirmed()
	if err != nil || !waiting || now.Revision != u.Revision {
		return err
	}
	_, err = r.takeBack(ctx, safeMode, fmt.Sprintf(": nobody has confirmed revision %d, the settings of revision %d are back", u.Revision, u.BackTo))
	return err
}
