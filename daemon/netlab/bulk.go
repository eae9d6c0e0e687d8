package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"time"
)

// A Bulk sends datagrams one way at a given rate, and counts what arrives.
//
// The path of a datagram:
//
//  1. The client opens the flow, so that every NAT on the way lets the server's
//     datagrams in, and the server learns where from.
//  2. The sender sends what is due, every half millisecond.
//  3. The receiver counts it, by tally, which does no I/O.
//  4. Only what arrives after Settle and before the sender stops makes the rate.
type Bulk struct {
	Rate     float64       // bit/s of UDP payload
	Size     int           // bytes of UDP payload of a datagram, at least 16
	Duration time.Duration // of sending
	Settle   time.Duration // at the beginning, left out of all figures; less than Duration
	Wait     time.Duration // at most, for what is under way when the sender stops; 0 means 1 s
}

// BulkResult is the outcome of a Bulk, without the time to settle.
type BulkResult struct {
	Offered, Rate float64 // bit/s of UDP payload, sent and arrived; duplicates count once
	Sent, Arrived int     // datagrams
	Loss          float64 // share of those sent that did not arrive, 0 to 1
	Reordered     int     // arrived after one that was sent later (RFC 4737)
	Duplicates    int
}

// ReorderedShare of the datagrams that arrived, 0 to 1.
func (r BulkResult) ReorderedShare() float64 {
	return float64(r.Reordered) / float64(max(r.Arrived, 1))
}

// Upload sends from the client, a connected UDP socket such as of Host.Dial, to
// the server's, such as of Host.ListenPacket. Neither is closed.
func (b Bulk) Upload(ctx context.Context, client net.Conn, server net.PacketConn) (BulkResult, error) {
	return b.run(ctx, client, server, false)
}

// Download sends from the server's socket to the client's.
func (b Bulk) Download(ctx context.Context, client net.Conn, server net.PacketConn) (BulkResult, error) {
	return b.run(ctx, client, server, true)
}

func (b Bulk) run(ctx context.Context, client net.Conn, server net.PacketConn, download bool) (BulkResult, error) {
	r, err := b.measure(ctx, client, server, download)
	if err != nil {
		return BulkResult{}, fmt.Errorf("netlab: bulk: %w", err)
	}
	return r, nil
}

const burstInterval = 500 * time.Microsecond

func (b Bulk) measure(ctx context.Context, client net.Conn, server net.PacketConn, download bool) (BulkResult, error) {
	count, err := datagrams(b.Rate/8/float64(max(b.Size, 1)), b.Size, b.Duration)
	if err != nil {
		return BulkResult{}, err
	}
	if b.Settle < 0 || b.Settle >= b.Duration {
		return BulkResult{}, fmt.Errorf("%v to settle in %v of sending: leave time to measure", b.Settle, b.Duration)
	}
	if b.Wait == 0 {
		b.Wait = time.Second
	}
	near, ok1 := client.(*net.UDPConn)
	far, ok2 := server.(*net.UDPConn)
	if !ok1 || !ok2 {
		return BulkResult{}, fmt.Errorf("sockets of %T and %T: both must be UDP", client, server)
	}
	if err := errors.Join(largeBuffers(near), largeBuffers(far)); err != nil {
		return BulkResult{}, err
	}
	stamp := newStamp()
	peer, err := openFlow(ctx, near, far, stamp)
	if err != nil {
		return BulkResult{}, err
	}
	receiver, send := far, near.Write
	if download {
		receiver, send = near, func(d []byte) (int, error) { return far.WriteToUDPAddrPort(d, peer) }
	}

	begin := time.Now()
	t := newTally(b, count)
	if err := receiver.SetReadDeadline(begin.Add(b.Duration + b.Wait)); err != nil {
		return BulkResult{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = receiver.SetReadDeadline(time.Now()) })
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 1<<16)
		for {
			n, _, err := receiver.ReadFromUDPAddrPort(buffer)
			at := time.Since(begin)
			if err != nil {
				if ended(err) {
					return
				}
				continue // an ICMP error about an earlier datagram
			}
			if sequence, ok := stamp.read(buffer[:n]); ok {
				if t.arrived(sequence, at); t.distinct == count {
					return
				}
			}
		}
	}()
	sent, err := b.send(ctx, begin, stamp, count, send)
	if err != nil {
		_ = receiver.SetReadDeadline(time.Now())
	}
	<-done
	if err := errors.Join(err, ctx.Err()); err != nil {
		return BulkResult{}, err
	}
	return t.result(sent), nil
}

// openFlow sends opening datagrams until the server has one, and returns where
// they come from as it sees it. Their number in sequence is beyond all others'.
func openFlow(ctx context.Context, near, far *net.UDPConn, s stamp) (netip.AddrPort, error) {
	const every, patience = 100 * time.Millisecond, 5 * time.Second
	opening := s.make(stampSize)
	s.write(opening, ^uint32(0))
	buffer := make([]byte, 1<<16)
	for begin := time.Now(); time.Since(begin) < patience && ctx.Err() == nil; {
		if _, err := near.Write(opening); err != nil && ended(err) {
			return netip.AddrPort{}, err
		}
		for deadline := time.Now().Add(every); ; {
			if err := far.SetReadDeadline(deadline); err != nil {
				return netip.AddrPort{}, err
			}
			n, from, err := far.ReadFromUDPAddrPort(buffer)
			if errors.Is(err, net.ErrClosed) {
				return netip.AddrPort{}, err
			}
			if err != nil {
				break
			}
			if _, ok := s.read(buffer[:n]); ok {
				return from, nil
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPort{}, fmt.Errorf("none of the datagrams that open the flow from %v reached %v within %v", near.LocalAddr(), far.LocalAddr(), patience)
}

// send sends the datagrams, numbered, as they fall due, and says how many it
// sent after the time to settle. After a pause that the machine forced on it,
// it catches up at no more than twice the rate, so as not to overflow the queues
// it measures.
func (b Bulk) send(ctx context.Context, begin time.Time, s stamp, count int, send func([]byte) (int, error)) (int, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	datagram := s.make(b.Size)
	perSecond := b.Rate / 8 / float64(b.Size)
	burst := max(1, int(2*perSecond*burstInterval.Seconds()+0.5))
	n, measured := 0, 0
	for moment := begin; n < count; moment = moment.Add(burstInterval) {
		if err := sleepUntil(ctx, moment); err != nil {
			return measured, err
		}
		elapsed := time.Since(begin)
		if elapsed >= b.Duration {
			break
		}
		if late := elapsed - moment.Sub(begin); late > burstInterval {
			moment = begin.Add(elapsed) // bursts stay half a millisecond apart
		}
		due := min(int(perSecond*elapsed.Seconds())+1, count, n+burst)
		for ; n < due; n++ {
			s.write(datagram, uint32(n))
			if _, err := send(datagram); err != nil && ended(err) {
				return measured, err
			}
			if n >= b.firstMeasured() {
				measured++
			}
		}
	}
	return measured, nil
}

// firstMeasured is the number of the first datagram due after the time to settle.
func (b Bulk) firstMeasured() int {
	return int(b.Rate / 8 / float64(b.Size) * b.Settle.Seconds())
}

// A tally counts arrivals. It is told the time since the sender began.
type tally struct {
	bulk     Bulk
	seen     []uint64 // by number, a bit each
	distinct int
	highest  int64
	bytes    int64 // that arrived between Settle and Duration
	outcome  BulkResult
}

func newTally(b Bulk, count int) *tally {
	return &tally{bulk: b, seen: make([]uint64, (count+63)/64), highest: -1}
}

func (t *tally) arrived(sequence uint32, at time.Duration) {
	word, bit := int(sequence/64), uint64(1)<<(sequence%64)
	if word >= len(t.seen) {
		return
	}
	measured := int(sequence) >= t.bulk.firstMeasured()
	if t.seen[word]&bit != 0 {
		if measured {
			t.outcome.Duplicates++
		}
		return
	}
	t.seen[word] |= bit
	t.distinct++
	if at >= t.bulk.Settle && at < t.bulk.Duration {
		t.bytes += int64(t.bulk.Size)
	}
	if measured {
		t.outcome.Arrived++
		if int64(sequence) < t.highest {
			t.outcome.Reordered++
		}
	}
	t.highest = max(t.highest, int64(sequence))
}

func (t *tally) result(sent int) BulkResult {
	r := t.outcome
	window := (t.bulk.Duration - t.bulk.Settle).Seconds()
	r.Sent = sent
	r.Offered = float64(sent) * float64(t.bulk.Size) * 8 / window
	r.Rate = float64(t.bytes) * 8 / window
	if sent > 0 {
		r.Loss = float64(sent-r.Arrived) / float64(sent)
	}
	return r
}
