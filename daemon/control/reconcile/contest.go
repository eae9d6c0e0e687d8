package reconcile

import (
	"fmt"
	"strings"
	"time"

	"sheaf/daemon/control/desired"
)

const (
	// contestedWithin of being put back, something that has changed again is
	// contested.
	contestedWithin = time.Minute
	// contestedFor is how long it is then left, before it is put back once more.
	contestedFor = 10 * time.Minute
)

// contest knows what was set of MPTCP, which other programs may have a view of,
// too: mptcpd, NetworkManager, an operator with ip mptcp or sysctl. What one of
// them changes is put back once; when it is changed again soon, it is left, and
// told of, because nobody gains by two programs that undo each other's work.
type contest map[string]contested

// contested is what is known of one endpoint or sysctl, or the limits.
type contested struct {
	value string    // that it was last given
	back  time.Time // when that was done again, because somebody had changed it
	left  time.Time // since when it is left as it is; zero while it is not
}

// judge says which of the necessary changes are to be made now, and what is left.
func (c contest) judge(changes []desired.Change, now time.Time) (do []desired.Change, conflicts []string) {
	still := map[string]bool{}
	for _, change := range changes {
		subject, value := subjectOf(change)
		known, ok := c[subject]
		switch {
		case subject == "" || !ok || known.value != value:
		case !known.left.IsZero() && now.Sub(known.left) < contestedFor:
			still[subject] = true
		case known.left.IsZero() && !known.back.IsZero() && now.Sub(known.back) < contestedWithin:
			known.left = now
			c[subject] = known
			still[subject] = true
		}
		if still[subject] {
			conflicts = append(conflicts, fmt.Sprintf(
				"another program undoes %q again and again, and has its way for now: end that program, or choose path manager netlink to leave MPTCP to it", change))
			continue
		}
		do = append(do, change)
	}
	for subject, known := range c {
		if !known.left.IsZero() && !still[subject] {
			known.left = time.Time{} // they agree, or it is being put back
			c[subject] = known
		}
	}
	return do, conflicts
}

// made notes what the kernel holds now: what is wanted, after changes that have
// succeeded.
func (c contest) made(want *desired.MPTCP, changes []desired.Change, now time.Time) {
	for _, change := range changes {
		subject, value := subjectOf(change)
		if subject == "" {
			continue
		}
		next := contested{value: value}
		if known, ok := c[subject]; ok && known.value == value {
			next.back = now
		}
		c[subject] = next
	}
	if want == nil {
		return
	}
	var all []desired.Change
	for _, e := range want.Endpoints {
		all = append(all, desired.AddEndpoint{Endpoint: e})
	}
	for name, value := range want.Sysctls {
		all = append(all, desired.SetSysctl{Path: desired.MPTCPSysctls + name, Value: value})
	}
	wanted := map[string]bool{}
	for _, change := range all {
		subject, value := subjectOf(change)
		wanted[subject] = true
		if c[subject].value != value { // it was so already, and is ours from now on
			c[subject] = contested{value: value}
		}
	}
	for subject := range c {
		if strings.HasPrefix(subject, endpointSubject) && !wanted[subject] {
			delete(c, subject)
		}
	}
}

const endpointSubject = "endpoint "

// subjectOf says what of MPTCP a change sets, and to what; empty for others.
func subjectOf(change desired.Change) (subject, value string) {
	of := func(e desired.Endpoint) string { return endpointSubject + e.Address.String() }
	as := func(e desired.Endpoint) string { return fmt.Sprintf("%d %d", e.Interface.Index, e.Flags) }
	switch c := change.(type) {
	case desired.AddEndpoint:
		return of(c.Endpoint), as(c.Endpoint)
	case desired.SetEndpointFlags:
		return of(c.Endpoint), as(c.Endpoint)
	case desired.DeleteEndpoint:
		return of(c.Endpoint), ""
	case desired.SetLimits:
		return "limits", fmt.Sprint(c.Limits)
	case desired.SetSysctl:
		if strings.HasPrefix(c.Path, desired.MPTCPSysctls) {
			return c.Path, c.Value
		}
	}
	return "", ""
}
