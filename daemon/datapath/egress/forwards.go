package egress

// The way in: a client on the Internet reaches a host behind a router.
//
//	TCP  client ─▶ listener ─▶ limit ─▶ open(router, id, client) ─▶ a flow to the router
//	UDP  client ─▶ nftables: DNAT to the router's inner address ─▶ TUN
//
// The UDP sockets here only keep the ports from other programs.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// MaxForwards is how many ports one router may have forwarded.
	MaxForwards = 256
	// MaxInbound is how many connections to one router may be open.
	MaxInbound = 1024
)

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// ForwardPolicy says which of the concentrator's ports routers may have.
type ForwardPolicy struct {
	// Ports that may be forwarded; none are 1024 to 65535.
	Ports []PortRange
	// Reserved are the concentrator's own, which may not.
	Reserved []uint16
}

// refusal says why a port may not be forwarded, which is empty when it may.
func (p ForwardPolicy) refusal(protocol string, port uint16) string {
	ports := p.Ports
	if len(ports) == 0 {
		ports = []PortRange{{1024, math.MaxUint16}}
	}
	switch {
	case protocol != "tcp" && protocol != "udp":
		return fmt.Sprintf("protocol %q cannot be forwarded, only tcp and udp", protocol)
	case port == 0 || !slices.ContainsFunc(ports, func(r PortRange) bool { return r.First <= port && port <= r.Last }):
		return fmt.Sprintf("port %d is not among those that the concentrator forwards (%s)", port, describeRanges(ports))
	case slices.Contains(p.Reserved, port):
		return fmt.Sprintf("port %d is the concentrator's own", port)
	}
	return ""
}

func describeRanges(ports []PortRange) string {
	s := ""
	for i, r := range ports {
		if i > 0 {
			s += ", "
		}
		s += strconv.Itoa(int(r.First))
		if r.Last != r.First {
			s += "-" + strconv.Itoa(int(r.Last))
		}
	}
	return s
}

// Forward is a port that a router wants.
type Forward struct {
	ID       uint16 // the router's own number for it
	Protocol string // tcp or udp
	Port     uint16
}

// ForwardState is what became of a wanted Forward.
type ForwardState string

// The states.
const (
	ForwardActive  ForwardState = "active"
	ForwardRefused ForwardState = "refused"
)

// Result is what became of the Forward of the same ID.
type Result struct {
	ID     uint16
	State  ForwardState
	Reason string // of a refusal
}

// OpenFunc carries an accepted connection to the forward id of a router, and
// returns when the connection is over; it is closed then. ctx ends when the
// forward is removed, and the connection is closed at once.
type OpenFunc func(ctx context.Context, router string, id uint16, client *net.TCPConn)

// Forwards holds the forwarded ports of all routers. It is safe for concurrent
// use.
type Forwards struct {
	policy ForwardPolicy
	open   OpenFunc
	log    *sparseLog
	live   *limiter[string] // TCP connections, by router

	work sync.WaitGroup

	mu    sync.Mutex
	taken map[slot]*forward
}

// slot is what only one forward can have.
type slot struct {
	protocol string
	port     uint16
}

type forward struct {
	router string
	id     atomic.Uint32
	close  func()
}

// NewForwards returns the forwards of no router yet.
func NewForwards(policy ForwardPolicy, open OpenFunc, log *slog.Logger) *Forwards {
	return &Forwards{policy: policy, open: open, log: newSparseLog(log),
		live: newLimiter[string](math.MaxInt, MaxInbound), taken: map[slot]*forward{}}
}

// Set makes wanted the forwards of a router, and returns what became of each.
// Those that were there already keep their connections. A port that was refused
// because it is taken is tried again by the next Set alone.
func (f *Forwards) Set(router string, wanted []Forward) []Result {
	f.mu.Lock()
	defer f.mu.Unlock()
	keep := map[slot]bool{}
	for _, w := range wanted[:min(len(wanted), MaxForwards)] {
		keep[slot{w.Protocol, w.Port}] = true
	}
	f.release(func(s slot, have *forward) bool { return have.router == router && !keep[s] })

	results := make([]Result, len(wanted))
	seen := map[slot]bool{}
	for i, w := range wanted {
		s := slot{w.Protocol, w.Port}
		var reason string
		switch {
		case i >= MaxForwards:
			reason = fmt.Sprintf("a router may have %d ports forwarded", MaxForwards)
		case seen[s]:
			reason = fmt.Sprintf("%s port %d is listed twice", s.protocol, s.port)
		default:
			seen[s] = true
			reason = f.take(router, s, w.ID)
		}
		results[i] = Result{w.ID, ForwardActive, reason}
		if reason != "" {
			results[i].State = ForwardRefused
		}
	}
	return results
}

// take makes a forward the router's, or says why it cannot be.
func (f *Forwards) take(router string, s slot, id uint16) (refusal string) {
	if have := f.taken[s]; have != nil {
		if have.router != router {
			return fmt.Sprintf("%s port %d is forwarded to another router", s.protocol, s.port)
		}
		have.id.Store(uint32(id))
		return ""
	}
	if refusal := f.policy.refusal(s.protocol, s.port); refusal != "" {
		return refusal
	}
	made := &forward{router: router}
	made.id.Store(uint32(id))
	var err error
	if s.protocol == "tcp" {
		err = f.listen(made, s.port)
	} else {
		err = reserve(made, s.port)
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Sprintf("%s port %d is used by another program on the concentrator", s.protocol, s.port)
	case errors.Is(err, unix.EACCES):
		return fmt.Sprintf("the concentrator may not use %s port %d: it needs CAP_NET_BIND_SERVICE for ports below 1024", s.protocol, s.port)
	case err != nil:
		return fmt.Sprintf("%s port %d cannot be opened on the concentrator: %v", s.protocol, s.port, err)
	}
	f.taken[s] = made
	return ""
}

// listen takes a TCP port on all addresses, IPv4 and IPv6.
func (f *Forwards) listen(made *forward, port uint16) error {
	config := net.ListenConfig{KeepAliveConfig: keepAlive}
	config.SetMultipathTCP(false) // a relay copies less from plain TCP
	ctx, cancel := context.WithCancel(context.Background())
	l, err := config.Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(int(port))))
	if err != nil {
		cancel()
		return err
	}
	made.close = func() {
		cancel()
		_ = l.Close()
	}
	f.work.Go(func() {
		accept(ctx, l.(*net.TCPListener), f.log, func(client *net.TCPConn) { f.serve(ctx, made, client) })
	})
	return nil
}

func (f *Forwards) serve(ctx context.Context, to *forward, client *net.TCPConn) {
	if !f.live.enter(to.router) {
		f.log.warn("too many inbound connections to a router: some are refused", "router", to.router, "most", MaxInbound)
		_ = client.SetLinger(0) // a reset, as from a host that has no room
		_ = client.Close()
		return
	}
	f.work.Go(func() {
		defer f.live.leave(to.router)
		defer func() { _ = client.Close() }()
		defer context.AfterFunc(ctx, func() { _ = client.Close() })()
		f.open(ctx, to.router, uint16(to.id.Load()), client)
	})
}

// reserve takes a UDP port on all addresses. Packets are redirected before a
// socket sees them; what comes all the same, such as from this machine, is
// dropped by a socket filter.
func reserve(made *forward, port uint16) error {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		none := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}
		var set error
		err := raw.Control(func(fd uintptr) {
			set = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &none})
		})
		return errors.Join(err, set)
	}}
	c, err := config.ListenPacket(context.Background(), "udp", net.JoinHostPort("", strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	made.close = func() { _ = c.Close() }
	return nil
}

// release closes forwards, with their connections.
func (f *Forwards) release(which func(slot, *forward) bool) {
	for s, have := range f.taken {
		if which(s, have) {
			have.close()
			delete(f.taken, s)
		}
	}
}

// Remove closes all forwards of a router, with their connections.
func (f *Forwards) Remove(router string) { f.Set(router, nil) }

// Close closes all forwards and waits for their connections to end.
func (f *Forwards) Close() {
	f.mu.Lock()
	f.release(func(slot, *forward) bool { return true })
	f.mu.Unlock()
	f.work.Wait()
}

// UDPForward is a UDP port whose packets are to be redirected to a router.
type UDPForward struct {
	Router string
	Port   uint16
}

// UDP lists the active UDP forwards by port, for the firewall.
func (f *Forwards) UDP() []UDPForward {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []UDPForward
	for s, have := range f.taken {
		if s.protocol == "udp" {
			list = append(list, UDPForward{have.router, s.port})
		}
	}
	slices.SortFunc(list, func(a, b UDPForward) int { return cmp.Compare(a.Port, b.Port) })
	return list
}
