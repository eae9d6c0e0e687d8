package netlab

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Probe sends datagrams at an even pace to an echo server and records what
// comes back when, as a call or a game would feel it.
//
// The path of a datagram:
//
//  1. pace waits for its moment, begin + n × interval, so nothing drifts.
//  2. It is dated and sent.
//  3. ServeEcho sends it back.
//  4. A reader dates its return.
//  5. summarize, without I/O, says what that means.
type Probe struct {
	Rate     float64       // datagrams per second
	Size     int           // bytes of UDP payload, at least 16
	Duration time.Duration // of sending
	Wait     time.Duration // for the last echoes; 0 means 2 s
}

// A ProbePacket is the fate of one datagram.
type ProbePacket struct {
	Sent time.Duration // since the first datagram's moment
	RTT  time.Duration // until the first echo; 0 if none came
}

// ProbeResult is the outcome of a Probe.
type ProbeResult struct {
	Packets    []ProbePacket // in order of sending
	Lost       int
	Loss       float64       // share of the datagrams sent, 0 to 1
	LongestGap time.Duration // without an arrival, between the first arrival and the last sending or arrival
	Reordered  int           // echoes that came after one of a later datagram (RFC 4737)
	Duplicates int

	sorted []time.Duration // RTTs
}

// Percentile of the RTTs of what came back, for a share of 0 to 1, by nearest
// rank; 0 if nothing did.
func (r ProbeResult) Percentile(share float64) time.Duration {
	return percentile(r.sorted, share)
}

func percentile(sorted []time.Duration, share float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(share*float64(len(sorted)) + 0.999999)
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// ServeEcho sends every datagram back to where it came from, until the socket
// is closed.
func ServeEcho(socket net.PacketConn) {
	if udp, ok := socket.(*net.UDPConn); ok {
		_ = largeBuffers(udp) // with the default ones it serves as well, up to some rate
	}
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := socket.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = socket.WriteTo(buffer[:n], from) // what cannot be sent is lost, as the probe will see
		}
	}
}

// maxDatagrams is as many as one Probe or Bulk may send: its records stay
// within some tens of megabytes.
const maxDatagrams = 2_000_000

// datagrams checks how many datagrams a sender is asked to send.
func datagrams(perSecond float64, size int, duration time.Duration) (int, error) {
	if size < stampSize || size > 65_507 {
		return 0, fmt.Errorf("datagrams of %d bytes: give %d to 65507", size, stampSize)
	}
	count := perSecond * duration.Seconds()
	if !(count >= 1 && count <= maxDatagrams) {
		return 0, fmt.Errorf("%.0f datagrams in all (%.1f per second for %v): give 1 to %d", count, perSecond, duration, maxDatagrams)
	}
	return int(count), nil
}

// Run probes over a connected UDP socket, such as of Host.Dial, to a ServeEcho.
// What the network does to the datagrams is in the result; the error is of
// settings, the socket or the context. The socket is not closed.
func (p Probe) Run(ctx context.Context, connection net.Conn) (ProbeResult, error) {
	r, err := p.run(ctx, connection)
	if err != nil {
		return ProbeResult{}, fmt.Errorf("netlab: probe: %w", err)
	}
	return r, nil
}

func (p Probe) run(ctx context.Context, connection net.Conn) (ProbeResult, error) {
	count, err := datagrams(p.Rate, p.Size, p.Duration)
	if err != nil {
		return ProbeResult{}, err
	}
	if p.Wait == 0 {
		p.Wait = 2 * time.Second
	}
	stamp := newStamp()
	datagram := stamp.make(p.Size)
	interval := time.Duration(float64(time.Second) / p.Rate)
	begin := time.Now()
	if err := connection.SetReadDeadline(begin.Add(p.Duration + p.Wait)); err != nil {
		return ProbeResult{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = connection.SetReadDeadline(time.Now()) })
	defer stop()

	sent := make([]time.Duration, 0, count)
	var arrivals []arrival
	var reader sync.WaitGroup
	reader.Go(func() {
		buffer := make([]byte, 1<<16)
		distinct := 0
		seen := make([]bool, count)
		for distinct < count && len(arrivals) < 4*maxDatagrams {
			n, err := connection.Read(buffer)
			at := time.Since(begin)
			if err != nil {
				if ended(err) {
					return
				}
				continue // an ICMP error about an earlier datagram
			}
			if sequence, ok := stamp.read(buffer[:n]); ok && int(sequence) < count {
				arrivals = append(arrivals, arrival{int(sequence), at})
				if !seen[sequence] {
					seen[sequence] = true
					distinct++
				}
			}
		}
	})
	err = pace(ctx, begin, interval, count, func(n int) error {
		stamp.write(datagram, uint32(n))
		sent = append(sent, time.Since(begin))
		if _, err := connection.Write(datagram); err != nil && ended(err) {
			return err
		}
		return nil // an ICMP error about an earlier datagram
	})
	if err != nil {
		_ = connection.SetReadDeadline(time.Now())
	}
	reader.Wait()
	if err := errors.Join(err, ctx.Err()); err != nil {
		return ProbeResult{}, err
	}
	return summarize(sent, arrivals), nil
}

// arrival of a datagram's echo, since the probe began.
type arrival struct {
	sequence int
	at       time.Duration
}

// summarize says what the times of sending, by number, and the arrivals, in
// their order, mean.
func summarize(sent []time.Duration, arrivals []arrival) ProbeResult {
	r := ProbeResult{Packets: make([]ProbePacket, len(sent)), Lost: len(sent)}
	for i, at := range sent {
		r.Packets[i].Sent = at
	}
	var last time.Duration
	highest := -1
	for _, a := range arrivals {
		if a.sequence >= len(sent) {
			continue
		}
		p := &r.Packets[a.sequence]
		if p.RTT != 0 {
			r.Duplicates++
			continue
		}
		p.RTT = max(a.at-p.Sent, 1) // 0 is for the lost
		r.Lost--
		r.sorted = append(r.sorted, p.RTT)
		if len(r.sorted) > 1 {
			r.LongestGap = max(r.LongestGap, a.at-last)
		}
		last = a.at
		if a.sequence < highest {
			r.Reordered++
		}
		highest = max(highest, a.sequence)
	}
	if len(sent) > 0 {
		r.Loss = float64(r.Lost) / float64(len(sent))
		r.LongestGap = max(r.LongestGap, sent[len(sent)-1]-last)
	}
	slices.Sort(r.sorted)
	return r
}

// pace calls f for 0 to count-1, each at its moment begin + n × interval. One
// that is late goes at once, and does not delay those after it.
func pace(ctx context.Context, begin time.Time, interval time.Duration, count int, f func(n int) error) error {
	// The runtime's timers may be a millisecond late, a thread that sleeps in
	// the kernel is not.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for n := range count {
		if err := sleepUntil(ctx, begin.Add(time.Duration(n)*interval)); err != nil {
			return err
		}
		if err := f(n); err != nil {
			return err
		}
	}
	return nil
}

func sleepUntil(ctx context.Context, moment time.Time) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		left := time.Until(moment)
		if left <= 0 {
			return nil
		}
		// In pieces, to notice the context. EINTR is the runtime's preemption.
		pause := unix.NsecToTimespec(int64(min(left, 50*time.Millisecond)))
		if err := unix.Nanosleep(&pause, nil); err != nil && err != unix.EINTR {
			return fmt.Errorf("nanosleep: %w", err)
		}
	}
}

// ended tells a socket that is closed or past its deadline from one that
// reports an ICMP error.
func ended(err error) bool {
	var timeout net.Error
	return errors.Is(err, net.ErrClosed) || errors.Is(err, unix.EBADF) || errors.As(err, &timeout) && timeout.Timeout()
}

// A stamp marks the datagrams of one sender: eight random bytes, then the
// number in sequence, big endian, then four bytes unused.
type stamp [8]byte

const stampSize = 16

func newStamp() (s stamp) {
	_, _ = rand.Read(s[:]) // never fails
	return s
}

func (s stamp) make(size int) []byte {
	b := make([]byte, size)
	copy(b, s[:])
	return b
}

func (s stamp) write(b []byte, sequence uint32) { binary.BigEndian.PutUint32(b[8:], sequence) }

func (s stamp) read(b []byte) (sequence uint32, ok bool) {
	if len(b) < stampSize || stamp(b[:8]) != s {
		return 0, false
	}
	return binary.BigEndian.Uint32(b[8:]), true
}

// largeBuffers gives a socket room for what comes while its reader waits for a
// processor: losses are to be the network's only.
func largeBuffers(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	const size = 8 << 20
	var failed error
	err = raw.Control(func(fd uintptr) {
		for _, option := range []int{unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
			failed = errors.Join(failed, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, size))
		}
	})
	return errors.Join(err, failed)
}
