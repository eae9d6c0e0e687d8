package tunnel

import (
	"net"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The path of what schedulers weighted and firstfit ask of each subflow:
//
//	settings ─┬▶ Pool.SetRanks, by uplink: its addresses here ────────────────────────┬▶ chosen ─▶ each flow, while it sends
//	          └▶ Wishes ─▶ concentrator: Server.SetRanks: those that its QUIC ────────┘
//	             connection comes from, which NAT gives its subflows too
//
// Each end ranks for what it sends. Subflows of an uplink whose address an end does
// not know, or that has another's, stay without: weight 1, after all others.

// mptcpSubflowRank is MPTCP_SUBFLOW_RANK of our patches (board/common/patches/linux).
// Other kernels do not have it.
const mptcpSubflowRank = 129

// rankEvery is how often a flow that sends looks for subflows without a rank.
const rankEvery = 250 * time.Millisecond

// Rank is that of one subflow among those of its session.
type Rank struct {
	Weight     uint16 `json:"weight"`     // its share with scheduler weighted; 0: not given, as 1
	Preference uint16 `json:"preference"` // lower ones first with firstfit; 0: not given, after all others
}

// subflowRank is struct mptcp_subflow_rank.
type subflowRank struct {
	id uint32
	Rank
}

// ranking says which rank a subflow is to have.
type ranking func(local, remote netip.AddrPort) Rank

// SetRanks sets the ranks of the subflows over each uplink, by its name, where the
// kernel takes them; nil when the scheduler does not ask for any.
func (p *Pool) SetRanks(ranks map[string]Rank) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ranks = ranks
	p.rankLocked()
}

func (p *Pool) rankLocked() {
	if len(p.ranks) == 0 || !canRank() {
		p.calm.ranks.Store(nil)
		return
	}
	rank := rankByPath(p.paths, p.ranks)
	p.calm.ranks.Store(&rank)
}

// rankByPath ranks the router's subflows.
func rankByPath(paths []Path, ranks map[string]Rank) ranking {
	return func(local, _ netip.AddrPort) Rank {
		for _, p := range paths {
			within := p.Ports == Ports{} || p.Ports.First <= local.Port() && local.Port() <= p.Ports.Last
			if within && slices.Contains(p.Sources, local.Addr()) {
				return ranks[p.Name]
			}
		}
		return Rank{}
	}
}

// SetRanks is Pool.SetRanks for the sessions of one router.
func (v *Server) SetRanks(key PublicKey, ranks map[string]Rank) {
	c := v.calmOf(key)
	v.mu.Lock()
	defer v.mu.Unlock()
	c.asked = ranks
	v.rankLocked(key)
}

// rankLocked follows a router's wish, and its QUIC connections as they come and go.
func (v *Server) rankLocked(key PublicKey) {
	c := v.calm[key]
	if c == nil {
		return // it has asked for nothing yet
	}
	if len(c.asked) == 0 || !canRank() {
		c.ranks.Store(nil)
		return
	}
	from := map[string][]netip.Addr{}
	for d, k := range v.carried {
		if k == key {
			from[d.link] = append(from[d.link], d.conn.RemoteAddr().(*net.UDPAddr).AddrPort().Addr().Unmap())
		}
	}
	rank := rankByAddress(from, c.asked)
	c.ranks.Store(&rank)
}

// rankByAddress ranks a concentrator's subflows by where those of each uplink come
// from. An address of several whose ranks differ says nothing.
func rankByAddress(from map[string][]netip.Addr, ranks map[string]Rank) ranking {
	known := map[netip.Addr]Rank{}
	for name, addresses := range from {
		for _, a := range addresses {
			if other, ok := known[a]; ok && other != ranks[name] {
				known[a] = Rank{}
				continue
			}
			known[a] = ranks[name]
		}
	}
	return func(_, remote netip.AddrPort) Rank { return known[remote.Addr()] }
}

// keepRanks makes the ranks of the session's subflows what they should be. Only the
// goroutine that sends a flow's bytes calls it.
func (s *Session) keepRanks() {
	if s.calm == nil || !s.multipath {
		return
	}
	rank := s.calm.ranks.Load()
	if rank == nil {
		return
	}
	now := time.Now()
	if rank == s.ranks && now.Sub(s.ranked) < rankEvery {
		return
	}
	s.ranks, s.ranked = rank, now
	_ = s.wire.raw.Control(func(fd uintptr) {
		rankSubflows(int(fd), *rank) // one that is gone meanwhile needs no rank
	})
}

// rankSubflows sets the ranks that differ. Both options list the connection's
// subflows in its own order; when one has come or gone between the two, the next
// look is right again.
func rankSubflows(fd int, rank ranking) {
	var held [maxSubflows]subflowRank
	n, err := readRanks(fd, &held)
	if err != nil {
		return
	}
	addresses := borrow()
	defer addresses.release()
	stride, m, err := subflowOption(fd, mptcpSubflowAddrs, addresses, sizeSubflowAddress)
	if err != nil || n != m {
		return
	}
	for i, h := range held[:n] {
		a := addresses.data[sizeSubflowData+i*stride:]
		wanted := subflowRank{h.id, rank(sockaddr(a[:sizeSockaddr]), sockaddr(a[sizeSockaddr:sizeSubflowAddress]))}
		if h != wanted {
			_ = unix.SetsockoptString(fd, solMPTCP, mptcpSubflowRank, string(unsafe.Slice((*byte)(unsafe.Pointer(&wanted)), unsafe.Sizeof(wanted))))
		}
	}
}

func readRanks(fd int, list *[maxSubflows]subflowRank) (n int, err error) {
	length := uint32(unsafe.Sizeof(*list))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), solMPTCP, mptcpSubflowRank,
		uintptr(unsafe.Pointer(list)), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(length) / int(unsafe.Sizeof(list[0])), nil
}

// canRank asks the kernel whether it takes ranks.
func canRank() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	var list [maxSubflows]subflowRank
	_, err = readRanks(fd, &list)
	return err == nil
}
