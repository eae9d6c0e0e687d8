package deploy

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/netlab"
	"sheaf/webui"
)

// A Storm is random faults under many transfers:
//
//	Seed ─▶ plan ─▶ world: shapes, black holes, links, addresses ─┐
//	            └─▶ operator: modes, path managers ───────────────┴▶ all put back ─▶ nothing left over
//	LAN ◀═ transfers, each new, with content of its own, checked ═▶ server         ─▶ none failed
//
// The same seed plans the same faults; what they meet differs from run to run.
type Storm struct {
	Seed      uint64
	Faults    int
	Duration  time.Duration
	Transfers int            // at once
	Shapes    []netlab.Shape // of the lab's uplinks, before and after
}

// StormResult is what a storm did.
type StormResult struct {
	Faults    map[string]int // by kind
	Transfers int            // complete and right
	Failed    int            // transfers that were not
	Bytes     int64
	// Slowest is how long one transfer took at most.
	Slowest time.Duration
	// LongestStall is the longest that a receiver went without a byte, from its
	// request or the byte before.
	LongestStall time.Duration
	// Settled is how long after the last fault the kernels and the daemons were
	// as before the storm, all transfers ended included.
	Settled time.Duration
	// Closing is the number of TCP sockets of the tunnel that both kernels were
	// still closing then, towards addresses that are no more. No session has a
	// part in them; the kernel gives up after minutes (net.ipv4.tcp_orphan_retries).
	Closing int
}

const (
	stormPort = 7010
	// maxOutage is how long a plan leaves no uplink usable, and minUsable how
	// long one is usable between two outages.
	maxOutage, minUsable = 2 * time.Second, time.Second
	// maxHold is how long a fault lasts at most that makes an uplink unusable.
	maxHold = 4 * time.Second
	// stormStall is when a transfer of which nothing arrives has failed. The router
	// waits as long for the tunnel before it gives up a connection.
	stormStall = 30 * time.Second
	// stormSlowest bounds a whole transfer. It is long: while bytes arrive, a slow one
	// among many on uplinks that the storm has made slow has not failed.
	stormSlowest = 10 * time.Minute
	// stormPatience bounds the time until nothing is left.
	stormPatience = 3 * time.Minute
	// Sizes of transfers in bytes, all orders of magnitude alike.
	minTransfer, maxTransfer = 10e3, 10e6
	// maxReported bounds the failures that an error tells of.
	maxReported = 3
)

// The kinds of faults. What has no hold lasts until the next of its kind.
const (
	changeRate        = "rate"
	changeDelay       = "delay"
	changeLoss        = "loss"
	blackHole         = "black hole"
	linkDown          = "link down"
	carrierLoss       = "carrier loss"
	changeAddress     = "address"
	modeOff           = "off"
	modeBackup        = "backup"
	changePathManager = "path manager"
)

var kinds = []string{
	changeRate, changeDelay, changeLoss, blackHole, linkDown, carrierLoss, changeAddress, modeOff, modeBackup, changePathManager,
}

// A fault of the plan.
type fault struct {
	kind   string
	at     time.Duration // after the storm's begin
	hold   time.Duration // until it is put back, if it is by itself
	uplink int           // index; without meaning for path managers
	value  float64       // 0 to 1: how much, which
}

func (f fault) String() string {
	text := fmt.Sprintf("%.2f s: uplink%d %s", f.at.Seconds(), f.uplink+1, f.kind)
	if f.hold > 0 {
		return fmt.Sprintf("%s for %v", text, f.hold.Round(time.Millisecond))
	}
	return fmt.Sprintf("%s %.2f", text, f.value)
}

// unusable says whether the uplink carries nothing while the fault lasts.
func (f fault) unusable() bool {
	return slices.Contains([]string{blackHole, linkDown, carrierLoss, modeOff}, f.kind)
}

func (f fault) byOperator() bool {
	return slices.Contains([]string{modeOff, modeBackup, changePathManager}, f.kind)
}

// plan decides on all faults, in order. It never leaves all uplinks unusable for
// longer than maxOutage.
func (s Storm) plan(uplinks int) []fault {
	random := rand.New(rand.NewPCG(s.Seed, 0))
	var faults []fault
	for i := range s.Faults {
		f := fault{
			kind:   kinds[random.IntN(len(kinds))],
			at:     time.Duration((float64(i) + random.Float64()) * float64(s.Duration) / float64(s.Faults)),
			uplink: random.IntN(uplinks),
			value:  random.Float64(),
		}
		if f.unusable() || f.kind == modeBackup {
			f.hold = time.Duration((0.03 + 0.97*random.Float64()*random.Float64()) * float64(maxHold))
		}
		// What began long before plays no part in an outage.
		recent, _ := slices.BinarySearchFunc(faults, f.at-4*maxHold, func(g fault, at time.Duration) int { return cmp.Compare(g.at, at) })
		for f.unusable() && longestOutage(append(slices.Clone(faults[recent:]), f), uplinks) > maxOutage {
			if f.hold /= 2; f.hold < 50*time.Millisecond {
				f.kind, f.hold = changeRate, 0
			}
		}
		faults = append(faults, f)
	}
	return faults
}

// longestOutage is how long no uplink is usable at most. Moments shorter than
// minUsable in which one is do not end an outage.
func longestOutage(faults []fault, uplinks int) time.Duration {
	type edge struct {
		at    time.Duration
		delta int
	}
	var edges []edge
	for number := range uplinks {
		// The union of this uplink's faults, which are in order of their begin.
		end := time.Duration(-1)
		for _, f := range faults {
			switch {
			case f.uplink != number || !f.unusable() || f.at+f.hold <= end:
			case f.at <= end:
				edges[len(edges)-1].at, end = f.at+f.hold, f.at+f.hold
			default:
				end = f.at + f.hold
				edges = append(edges, edge{f.at, 1}, edge{end, -1})
			}
		}
	}
	slices.SortFunc(edges, func(a, b edge) int {
		if a.at != b.at {
			return int(a.at - b.at)
		}
		return b.delta - a.delta
	})
	longest := time.Duration(0)
	unusable, begin, end := 0, time.Duration(-1), time.Duration(math.MinInt64/2)
	for _, e := range edges {
		switch unusable += e.delta; {
		case unusable == uplinks:
			if e.at-end >= minUsable {
				begin = e.at
			}
		case unusable == uplinks-1 && e.delta < 0:
			end = e.at
			longest = max(longest, end-begin)
		}
	}
	return longest
}

// Run lets the storm loose on a running deployment that is up, puts everything
// back, and waits until nothing is left over. The error tells of all that was not
// as it should be, with the faults before it.
func (s Storm) Run(ctx context.Context, d *Deployment) (StormResult, error) {
	r := &stormRun{Storm: s, Deployment: d, client: webui.NewClient(d.Socket()), shapes: slices.Clone(s.Shapes)}
	r.result.Faults = map[string]int{}
	before, err := Network(d.Lab)
	if err != nil {
		return r.result, err
	}
	if err := r.prepare(ctx); err != nil {
		return r.result, err
	}
	l, err := d.Lab.Server.Listen("tcp", r.server())
	if err != nil {
		return r.result, err
	}
	defer func() { _ = l.Close() }()
	go r.serve(l)

	r.begin = time.Now()
	var faults, transfers sync.WaitGroup
	plan := s.plan(len(d.Lab.Uplinks))
	for _, f := range plan {
		r.result.Faults[f.kind]++
	}
	for _, operator := range []bool{false, true} {
		faults.Go(func() { r.inflict(ctx, plan, operator) })
	}
	for i := range s.Transfers {
		transfers.Go(func() { r.transfers(ctx, rand.New(rand.NewPCG(s.Seed, 1+uint64(i)))) })
	}
	faults.Wait()
	calm := time.Now()
	r.fail("put back", r.putBack(ctx))
	transfers.Wait()
	if ctx.Err() != nil {
		return r.result, ctx.Err()
	}
	for {
		if err = r.leftOver(before); err == nil || time.Since(calm) > stormPatience {
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	r.result.Settled = time.Since(calm)
	if err != nil {
		err = fmt.Errorf("left over %v after the storm: %w", stormPatience, err)
	}
	return r.result, errors.Join(r.failures(plan), err)
}

// A stormRun is a storm under way.
type stormRun struct {
	Storm
	*Deployment
	client       *webui.Client
	begin        time.Time
	settings     settings.Settings // before the storm
	pathManagers []string
	shapes       []netlab.Shape // of the uplinks now; the world's alone

	mu       sync.Mutex
	result   StormResult
	failed   int
	reported []failure
}

type failure struct {
	at  time.Duration
	err error
}

func (r *stormRun) server() string { return fmt.Sprintf("%s:%d", netlab.ServerAddress, stormPort) }

// prepare makes LAN connections wait for the tunnel: without it they would leave
// by one uplink, and be lost with it.
func (r *stormRun) prepare(ctx context.Context) error {
	revision, err := r.client.Settings(ctx)
	if err != nil {
		return err
	}
	r.settings = revision.Settings
	status, err := r.client.Status(ctx)
	if err != nil {
		return err
	}
	for _, name := range status.Multipath.AvailablePathManagers {
		if name != "netlink" { // there is no other manager in the lab to hand over to
			r.pathManagers = append(r.pathManagers, name)
		}
	}
	changed := r.settings
	changed.WhenTunnelDown = settings.Block
	if err := r.apply(ctx, changed); err != nil {
		return err
	}
	return r.WaitUp()
}

func (r *stormRun) apply(ctx context.Context, s settings.Settings) error {
	_, err := r.client.Apply(ctx, s.YAML(), 0)
	return err
}

func (r *stormRun) fail(what string, err error) {
	if err == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed++
	if len(r.reported) < maxReported {
		r.reported = append(r.reported, failure{time.Since(r.begin), fmt.Errorf("%s: %w", what, err)})
	}
}

func (r *stormRun) failures(plan []fault) error {
	if r.failed == 0 {
		return nil
	}
	var text strings.Builder
	fmt.Fprintf(&text, "storm of seed %d: %d failures; the first:", r.Seed, r.failed)
	for _, f := range r.reported {
		fmt.Fprintf(&text, "\nat %.2f s: %v; the faults before it:", f.at.Seconds(), f.err)
		for _, p := range plan {
			if p.at <= f.at && p.at+p.hold >= f.at-stormStall-5*time.Second {
				fmt.Fprintf(&text, "\n\t%v", p)
			}
		}
	}
	return errors.New(text.String())
}

// inflict does the operator's part of a plan, or the world's.
func (r *stormRun) inflict(ctx context.Context, plan []fault, operator bool) {
	type act struct {
		fault
		end bool
	}
	var acts []act
	for _, f := range plan {
		if f.byOperator() == operator {
			acts = append(acts, act{fault: f})
			if f.hold > 0 {
				f.at += f.hold
				acts = append(acts, act{f, true})
			}
		}
	}
	slices.SortStableFunc(acts, func(a, b act) int { return int(a.at - b.at) })
	for _, a := range acts {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Until(r.begin.Add(a.at))):
		}
		if err := r.act(ctx, a.fault, a.end); err != nil {
			r.fail(fmt.Sprintf("%v, end %v", a.fault, a.end), err)
		}
	}
}

// act begins a fault or ends it. Where faults of one kind overlap on an uplink,
// the first end ends them all.
func (r *stormRun) act(ctx context.Context, f fault, end bool) error {
	u := r.Lab.Uplinks[f.uplink]
	shape := &r.shapes[f.uplink]
	switch f.kind {
	case changeRate:
		shape.Rate = 2e6 * math.Pow(30, f.value)
	case changeDelay:
		shape.Delay = time.Duration(float64(time.Millisecond) * math.Pow(100, f.value))
	case changeLoss:
		shape.Loss = 0.05 * f.value * f.value
	case blackHole:
		return u.BlackHole(!end)
	case linkDown:
		return u.Link(end)
	case carrierLoss:
		return u.Carrier(end)
	case changeAddress:
		return u.SetAddress(netlab.FirstHost + int(f.value*200))
	case modeOff, modeBackup:
		mode := f.kind
		if end {
			mode = string(settings.On)
		}
		return r.SetMode(u, mode)
	case changePathManager:
		revision, err := r.client.Settings(ctx)
		if err != nil {
			return err
		}
		changed := revision.Settings
		changed.Multipath.PathManager = settings.PathManager(r.pathManagers[int(f.value*float64(len(r.pathManagers)))])
		return r.apply(ctx, changed)
	}
	return u.Set(*shape)
}

// putBack makes everything as it was before the storm.
func (r *stormRun) putBack(ctx context.Context) error {
	errs := []error{r.apply(ctx, r.settings)}
	for i, u := range r.Lab.Uplinks {
		errs = append(errs, u.Set(r.Shapes[i]), u.BlackHole(false), u.Carrier(true), u.Link(true), u.SetAddress(netlab.FirstHost))
	}
	return errors.Join(errs...)
}

// transfers transfers one thing after the other until the storm ends. What has begun
// is to end well, also after it.
func (r *stormRun) transfers(ctx context.Context, random *rand.Rand) {
	for ctx.Err() == nil && time.Since(r.begin) < r.Duration {
		t := stormTransfer{
			Upload: random.IntN(2) == 0,
			Size:   int64(minTransfer * math.Pow(maxTransfer/minTransfer, random.Float64())),
			Seed:   random.Uint64(),
		}
		begin := time.Now()
		err := r.transfer(ctx, t)
		r.fail(t.String(), err)
		r.mu.Lock()
		r.result.Slowest = max(r.result.Slowest, time.Since(begin))
		if err == nil {
			r.result.Transfers++
			r.result.Bytes += t.Size
		} else {
			r.result.Failed++
		}
		r.mu.Unlock()
	}
}

// A stormTransfer is what a client asks a server for, on a connection of its own:
//
//	client ─ stormTransfer ─▶ server
//	download: content ◀─, end, ─▶ end      upload: content ─▶, ◀─ 1 if right, end
type stormTransfer struct {
	Upload bool
	Size   int64
	Seed   uint64 // of the content
}

func (t stormTransfer) String() string {
	kind := "download"
	if t.Upload {
		kind = "upload"
	}
	return fmt.Sprintf("%s of %d bytes", kind, t.Size)
}

// content is Size bytes that no other transfer has.
func (t stormTransfer) content() io.Reader {
	var key [32]byte
	binary.BigEndian.PutUint64(key[:], t.Seed)
	return io.LimitReader(rand.NewChaCha8(key), t.Size)
}

func (r *stormRun) transfer(ctx context.Context, t stormTransfer) error {
	dialling, cancel := context.WithTimeout(ctx, stormSlowest)
	defer cancel()
	c, err := r.Lab.LAN.Dial(dialling, "tcp", r.server())
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if err := c.SetDeadline(time.Now().Add(stormSlowest)); err != nil {
		return err
	}
	if err := binary.Write(c, binary.BigEndian, t); err != nil {
		return err
	}
	if !t.Upload {
		if err := r.receive(c, t); err != nil {
			return err
		}
		return atEnd(c)
	}
	if n, err := io.Copy(c, t.content()); err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	var verdict [1]byte
	if _, err := io.ReadFull(c, verdict[:]); err != nil {
		return fmt.Errorf("waiting for the server's verdict: %w", err)
	}
	if verdict[0] != 1 {
		return errors.New("the server did not receive what was sent")
	}
	return atEnd(c)
}

// serve answers transfers until the listener is closed.
func (r *stormRun) serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { _ = c.Close() }()
			var t stormTransfer
			if err := errors.Join(c.SetDeadline(time.Now().Add(stormSlowest)), binary.Read(c, binary.BigEndian, &t)); err != nil {
				r.fail("the server reads a request", err)
				return
			}
			if !t.Upload {
				if _, err := io.Copy(c, t.content()); err == nil {
					_ = c.(*net.TCPConn).CloseWrite()
					_ = atEnd(c) // the client tells of what fails here
				}
				return
			}
			if err := r.receive(c, t); err != nil {
				r.fail("the server: "+t.String(), err)
				_, _ = c.Write([]byte{0})
				return
			}
			_, _ = c.Write([]byte{1})
		}()
	}
}

// receive reads the content and compares it, byte by byte.
func (r *stormRun) receive(c net.Conn, t stormTransfer) error {
	want := t.content()
	got, expected := make([]byte, 64<<10), make([]byte, 64<<10)
	var longest time.Duration
	for done := int64(0); done < t.Size; {
		begin := time.Now()
		if err := c.SetReadDeadline(begin.Add(stormStall)); err != nil {
			return err
		}
		n, err := c.Read(got[:min(int64(len(got)), t.Size-done)])
		longest = max(longest, time.Since(begin))
		if _, err := io.ReadFull(want, expected[:n]); err != nil {
			return err
		}
		if !bytes.Equal(got[:n], expected[:n]) {
			return fmt.Errorf("another content, in the %d bytes after %d", n, done)
		}
		done += int64(n)
		if err != nil && done < t.Size {
			return fmt.Errorf("after %d bytes: %w", done, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.LongestStall = max(r.result.LongestStall, longest)
	return nil
}

// atEnd checks that nothing follows.
func atEnd(from io.Reader) error {
	if n, err := from.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the content: %d bytes and %w, and should be the end", n, err)
	}
	return nil
}

// leftOver says what is not as before the storm: the networks of both machines,
// and subflows of sessions that are no more. Every connection between the
// machines has to be a subflow of a session in the router's status, those that
// stand by for packets included.
func (r *stormRun) leftOver(before string) error {
	after, err := Network(r.Lab)
	if err != nil {
		return err
	}
	if after != before {
		return fmt.Errorf("the kernels' state is not as before:\n%s", netlab.Difference(before, after))
	}
	status, err := r.Status()
	if err != nil {
		return err
	}
	if status.Tunnel.State != "up" || status.Tunnel.Flows != 0 {
		return fmt.Errorf("the tunnel is %s (%s), with %d flows", status.Tunnel.State, status.Tunnel.Reason, status.Tunnel.Flows)
	}
	subflows := 0
	for _, u := range status.Uplinks {
		if u.Subflows != status.Concentrator.Sessions {
			return fmt.Errorf("%s has %d subflows, and there are %d sessions", u.Name, u.Subflows, status.Concentrator.Sessions)
		}
		subflows += u.Subflows
	}
	subflows += status.Packets.StreamSessions * len(status.Uplinks)
	r.result.Closing = 0
	for _, h := range []*netlab.Host{r.Lab.Router, r.Lab.Cloud} {
		open, closing, err := tunnelSockets(h)
		if err != nil {
			return err
		}
		total := 0
		for _, n := range open {
			total += n
		}
		if total != subflows {
			return fmt.Errorf("the %d sessions, and %d for packets, have %d subflows, and %s has %d TCP sockets of the tunnel, by the router's address and their state %v",
				status.Concentrator.Sessions, status.Packets.StreamSessions, subflows, h.Name, total, open)
		}
		r.result.Closing += closing
	}
	return nil
}

// tunnelSocket is what sockets of the tunnel have in common.
type tunnelSocket struct {
	address netip.Addr // the router's
	state   string     // in hexadecimal, include/net/tcp_states.h
}

// tunnelSockets counts the TCP sockets of a Host with the concentrator's port at
// either end: the open ones, and those that are closing.
func tunnelSockets(h *netlab.Host) (open map[tunnelSocket]int, closing int, err error) {
	port := fmt.Sprintf(":%04X", concentratorPort)
	open = map[tunnelSocket]int{}
	err = h.Do(func() error {
		for _, path := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				f := strings.Fields(line) // number, local, remote, state …
				if len(f) < 4 || !strings.HasSuffix(f[1], port) && !strings.HasSuffix(f[2], port) {
					continue
				}
				switch f[3] { // as in tunnelSocket
				case "04", "05", "09", "0B": // FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING
					closing++
				case "06", "07", "0A": // TIME_WAIT, CLOSE, LISTEN
				default:
					end := f[1]
					if strings.HasSuffix(end, port) {
						end = f[2]
					}
					address, err := procAddress(end)
					if err != nil {
						return fmt.Errorf("%s: %q: %w", path, line, err)
					}
					open[tunnelSocket{address, f[3]}]++
				}
			}
		}
		return nil
	})
	return open, closing, err
}

// procAddress reads the address of /proc/net/tcp's address:port: 32-bit words in
// hexadecimal, in the machine's order of bytes.
func procAddress(text string) (netip.Addr, error) {
	hexadecimal, _, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(hexadecimal)
	if err != nil {
		return netip.Addr{}, err
	}
	for i := 0; i+4 <= len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	address, ok := netip.AddrFromSlice(raw)
	if !ok {
		return netip.Addr{}, fmt.Errorf("%q is not an address", hexadecimal)
	}
	return address.Unmap(), nil
}
