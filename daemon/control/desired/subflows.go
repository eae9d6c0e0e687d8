package desired

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/uplink"
)

// The subflows of sessions whose paths the daemon manages (path managers
// ndiffports and binder, for as long as the session lives):
//
//	settings + []uplink.Status ─▶ Ways ─┐
//	the session's subflows ─────────────┴▶ DiffSubflows ─▶ []SubflowChange ─▶ package kernel
//
// As with a State, what is there is what the kernel says, never what was done
// before.

// Way is one way out: an address of an uplink that is fit and not off, or of its
// leg.
type Way struct {
	Uplink    string
	Source    netip.Addr
	Ports     Ports // that lead there; all, unless another uplink has the address too
	Interface Interface
	Backup    bool
	// Remote is the concentrator's end to take it to; invalid: that of the session.
	Remote netip.AddrPort
}

// Ways are those that subflows may take, best first as by Tunnel.Ranking, and
// backups last.
func Ways(s settings.Settings, statuses []uplink.Status, ranking []string) []Way {
	return ranked(s, statuses, ranking).ways(s)
}

func (b bestUplinks) ways(s settings.Settings) []Way {
	var ways []Way
	for _, status := range b {
		backup := slices.ContainsFunc(s.Uplinks, func(u settings.Uplink) bool { return u.Name == status.Name && u.Mode == settings.Backup })
		way := Way{
			Uplink: status.Name, Ports: status.Ports,
			Interface: Interface{Index: status.Index, Name: status.Interface}, Backup: backup,
		}
		if leg := status.Leg; leg.Up { // which shares its addresses with nobody
			way.Ports, way.Interface = Ports{}, Interface{Index: leg.Index, Name: leg.Interface}
		}
		for _, way.Source = range status.SubflowSources() {
			ways = append(ways, way)
		}
	}
	return ways
}

// Mesh is each way to each of the concentrator's addresses of its family: as many as
// a session may have subflows, each way to the first address before any to the next.
func Mesh(ways []Way, remotes []netip.AddrPort) (mesh []Way) {
	for _, remote := range remotes {
		for _, way := range ways {
			if way.Remote = remote; way.Source.Is4() == remote.Addr().Is4() && len(mesh) < MaxEndpoints {
				mesh = append(mesh, way)
			}
		}
	}
	return mesh
}

// takes says whether what leaves from an address and port takes the way.
func (w Way) takes(local netip.AddrPort) bool {
	return w.Source == local.Addr() && w.Ports.Contains(local.Port())
}

// to is the concentrator's end of the way for a session.
func (w Way) to(session netip.AddrPort) netip.AddrPort {
	if w.Remote.IsValid() {
		return w.Remote
	}
	return session
}

// Subflow is one TCP connection of a session.
type Subflow struct {
	Local, Remote netip.AddrPort
	// ID is the address id of Local in this session (RFC 8684 section 3.4.1); 0 is
	// that of the first subflow.
	ID     uint8
	Backup bool // as this end has told the peer
	// Joining: it is being opened, and carries nothing yet.
	Joining bool
}

// SubflowChange is one step from the subflows that a session has to those that
// it should have.
type SubflowChange interface {
	fmt.Stringer
	subflowChange()
}

// The changes.
type (
	OpenSubflow struct {
		Way    Way
		Remote netip.AddrPort
		ID     uint8
	}
	// CloseSubflow ends one. If its address is Gone, the peer is told to end what
	// it has of it, too, over the subflows that are left.
	CloseSubflow struct {
		Subflow Subflow
		Gone    bool
	}
	SetSubflowBackup struct {
		Subflow Subflow
		Backup  bool
	}
)

func (OpenSubflow) subflowChange()      {}
func (CloseSubflow) subflowChange()     {}
func (SetSubflowBackup) subflowChange() {}

func (c OpenSubflow) String() string {
	text := fmt.Sprintf("open %s dev %s to %s id %d", c.Way.Source, c.Way.Interface.Name, c.Remote, c.ID)
	if c.Way.Ports != (Ports{}) {
		text += fmt.Sprintf(" sport %d-%d", c.Way.Ports.First, c.Way.Ports.Last)
	}
	if c.Way.Backup {
		text += " backup"
	}
	return text
}

func (c CloseSubflow) String() string {
	if c.Gone {
		return fmt.Sprintf("close %s and remove id %d", c.Subflow.Local, c.Subflow.ID)
	}
	return "close " + c.Subflow.Local.String()
}

func (c SetSubflowBackup) String() string {
	if c.Backup {
		return fmt.Sprintf("change %s backup", c.Subflow.Local)
	}
	return fmt.Sprintf("change %s nobackup", c.Subflow.Local)
}

// DiffSubflows says how one session comes to the subflows that it should have:
// with default one; with ndiffports as many as the settings say, over one uplink
// and from as many ports; with binder and mesh one over every way. With
// netlink nothing is ours to change. mayOpen says over which ways opening may be
// tried now.
//
// What is not wanted goes once something else carries, or when nothing is about
// to. While nothing carries, every way is tried, backups too, and the first that
// gets through is kept.
func DiffSubflows(m settings.Multipath, ways []Way, have []Subflow, remote netip.AddrPort, mayOpen func(Way) bool) []SubflowChange {
	switch {
	case m.PathManager == settings.PathManagerNetlink:
		return nil
	case !m.Enabled:
		m.PathManager = settings.PathManagerDefault
	}
	ways = slices.DeleteFunc(slices.Clone(ways), func(w Way) bool {
		return w.Source.Is4() != remote.Addr().Is4() || w.to(remote).Addr().Is4() != remote.Addr().Is4()
	})
	on := make([][]Subflow, len(ways))
	var closing []SubflowChange
	for _, f := range have {
		if at := wayOf(ways, f); at >= 0 {
			on[at] = append(on[at], f)
		} else {
			closing = append(closing, CloseSubflow{f, !slices.ContainsFunc(ways, func(w Way) bool { return w.Source == f.Local.Addr() })})
		}
	}
	var opening, changing []SubflowChange
	taken := map[uint8]bool{0: true}
	for _, f := range have {
		taken[f.ID] = true
	}
	carries, joins := false, false
	for i, n := range wantedOn(m, ways, on) {
		way := ways[i]
		// Those that carry first, and among them the oldest.
		slices.SortStableFunc(on[i], func(a, b Subflow) int { return order(a.Joining, b.Joining) })
		for j, f := range on[i] {
			switch {
			case j >= n:
				closing = append(closing, CloseSubflow{Subflow: f})
			case f.Joining:
				joins = true
			default:
				carries = true
				if f.Backup != way.Backup {
					changing = append(changing, SetSubflowBackup{f, way.Backup})
				}
			}
		}
		id := idOf(way, have, opening)
		for range n - len(on[i]) {
			if !mayOpen(way) {
				break
			}
			if id == 0 || way.Ports != (Ports{}) { // then every port has its own
				id = freeID(way, taken)
				taken[id] = true
			}
			opening = append(opening, OpenSubflow{way, way.to(remote), id})
		}
	}
	if !carries && (joins || len(opening) > 0) {
		closing = nil
	}
	return slices.Concat(opening, changing, closing)
}

// wantedOn is how many subflows each way should have.
func wantedOn(m settings.Multipath, ways []Way, on [][]Subflow) []int {
	wanted := make([]int, len(ways))
	if len(ways) == 0 {
		return wanted
	}
	carrying := func(i int) (n int) {
		for _, f := range on[i] {
			if !f.Joining {
				n++
			}
		}
		return n
	}
	lost := true
	for i := range ways {
		lost = lost && carrying(i) == 0
	}
	switch m.PathManager {
	case settings.PathManagerDefault, settings.PathManagerNdiffports:
		if lost {
			for i := range ways {
				wanted[i] = 1
			}
		}
		// A session stays where it is, as long as it may.
		best := 0
		for i, way := range ways {
			if way.Backup == ways[0].Backup && cmp.Or(cmp.Compare(carrying(i), carrying(best)), cmp.Compare(len(on[i]), len(on[best]))) > 0 {
				best = i
			}
		}
		wanted[best] = 1
		if m.PathManager == settings.PathManagerNdiffports {
			wanted[best] = m.Subflows
		}
	default:
		for i := range ways {
			wanted[i] = 1
		}
	}
	return wanted
}

// wayOf is the place of the way that a subflow takes, or -1. One from a port of
// no uplink takes the first way that has its address, and one to an address of the
// concentrator that no way leads to the first that it takes otherwise.
func wayOf(ways []Way, f Subflow) int {
	for _, takes := range []func(Way) bool{
		func(w Way) bool { return w.takes(f.Local) && w.Remote == f.Remote },
		func(w Way) bool { return w.takes(f.Local) },
		func(w Way) bool { return w.Source == f.Local.Addr() && !uplink.Allotted(f.Local.Port()) },
	} {
		if at := slices.IndexFunc(ways, takes); at >= 0 {
			return at
		}
	}
	return -1
}

// idOf is the id that a way's address has in the session, or is about to have; 0 if
// none.
func idOf(way Way, have []Subflow, opening []SubflowChange) uint8 {
	for _, f := range have {
		if f.ID != 0 && way.takes(f.Local) {
			return f.ID
		}
	}
	for _, c := range opening {
		if open := c.(OpenSubflow); open.Way.Source == way.Source && open.Way.Ports == way.Ports {
			return open.ID
		}
	}
	return 0
}

// freeID is an id that nothing else in the session has, and the same address has
// the same one again, if it can: the kernel may know it still.
func freeID(way Way, taken map[uint8]bool) uint8 {
	h := fnv.New32a()
	h.Write(way.Source.AsSlice())
	h.Write([]byte{byte(way.Ports.First >> 8)})
	for i := range uint32(255) {
		if id := uint8(1 + (h.Sum32()+i)%255); !taken[id] {
			return id
		}
	}
	return 0
}
