package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"sheaf/daemon/netlab"
)

// A transfer protocol as plain as can be: the client sends eight bytes, big
// endian. The top bit says upload, the rest is the number of bytes: the server
// sends as many, or reads as many and answers with one byte.
const (
	uploadBit    = 1 << 63
	endless      = 1 << 40 // bytes: until somebody ends it
	transferPort = 5001
)

// sample is how much had arrived at a moment.
type sample struct {
	at    time.Duration
	bytes int64
}

// transferServer serves transfers until it is closed.
type transferServer struct {
	listeners []net.Listener
	wg        sync.WaitGroup
}

func serveTransfers(listeners ...net.Listener) *transferServer {
	s := &transferServer{listeners: listeners}
	for _, l := range listeners {
		s.wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { _ = s.serve(c) }()
			}
		})
	}
	return s
}

func (s *transferServer) close() {
	for _, l := range s.listeners {
		_ = l.Close()
	}
	s.wg.Wait()
}

var block = make([]byte, 256<<10)

func (s *transferServer) serve(c net.Conn) error {
	defer func() { _ = c.Close() }()
	var request [8]byte
	for {
		if _, err := io.ReadFull(c, request[:]); err != nil {
			return err
		}
		size := binary.BigEndian.Uint64(request[:])
		if size&uploadBit != 0 {
			samples, err := receive(c, int64(size&^uploadBit), time.Now())
			if err != nil {
				return err
			}
			if err := writeSamples(c, samples); err != nil {
				return err
			}
			continue
		}
		for left := int64(size); left > 0; {
			n, err := c.Write(block[:min(int64(len(block)), left)])
			left -= int64(n)
			if err != nil {
				return err
			}
		}
	}
}

// receive reads size bytes and notes every read.
func receive(c net.Conn, size int64, begin time.Time) ([]sample, error) {
	buffer := make([]byte, 256<<10)
	samples := []sample{{}}
	total := int64(0)
	for total < size {
		n, err := c.Read(buffer[:min(int64(len(buffer)), size-total)])
		total += int64(n)
		if n > 0 {
			samples = append(samples, sample{time.Since(begin), total})
		}
		if err != nil {
			return samples, fmt.Errorf("after %d of %d bytes: %w", total, size, err)
		}
	}
	return samples, nil
}

func writeSamples(w io.Writer, samples []sample) error {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(samples)))
	for _, s := range samples {
		b = binary.BigEndian.AppendUint64(b, uint64(s.at))
		b = binary.BigEndian.AppendUint64(b, uint64(s.bytes))
	}
	_, err := w.Write(b)
	return err
}

func readSamples(r io.Reader) ([]sample, error) {
	var count uint32
	if err := binary.Read(r, binary.BigEndian, &count); err != nil {
		return nil, err
	}
	if count > 1<<24 {
		return nil, errors.New("too many samples")
	}
	raw := make([]byte, int(count)*16)
	if _, err := io.ReadFull(r, raw); err != nil {
		return nil, err
	}
	samples := make([]sample, count)
	for i := range samples {
		samples[i] = sample{time.Duration(binary.BigEndian.Uint64(raw[i*16:])), int64(binary.BigEndian.Uint64(raw[i*16+8:]))}
	}
	return samples, nil
}

// A dialFunc makes a transfer's connection.
type dialFunc func(context.Context) (net.Conn, error)

func direction(upload bool) string {
	if upload {
		return "upload"
	}
	return "download"
}

// transfer moves size bytes over a new connection. The samples are taken where
// the bytes arrive; a download's clock starts before the connection is opened.
func transfer(ctx context.Context, dial dialFunc, upload bool, size int64) ([]sample, error) {
	begin := time.Now()
	c, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	if !upload {
		if _, err := c.Write(binary.BigEndian.AppendUint64(nil, uint64(size))); err != nil {
			return nil, err
		}
		return receive(c, size, begin)
	}
	if _, err := c.Write(binary.BigEndian.AppendUint64(nil, uint64(size)|uploadBit)); err != nil {
		return nil, err
	}
	for left := size; left > 0; {
		n, err := c.Write(block[:min(int64(len(block)), left)])
		left -= int64(n)
		if err != nil {
			return nil, err
		}
	}
	samples, err := readSamples(c)
	if err != nil {
		return nil, err
	}
	// The server's clock began with the request: what came before, and the way
	// of the answer back, count as well.
	before := time.Since(begin) - samples[len(samples)-1].at
	for i := range samples {
		samples[i].at += before
	}
	return samples, nil
}

// rates of a transfer in bit/s: of all of it, and after the first two seconds.
func rates(samples []sample) (whole, steady float64) {
	last := samples[len(samples)-1]
	whole = float64(last.bytes) * 8 / last.at.Seconds()
	const rampUp = 2 * time.Second
	for _, s := range samples {
		if s.at >= rampUp && last.at > s.at {
			return whole, float64(last.bytes-s.bytes) * 8 / (last.at - s.at).Seconds()
		}
	}
	return whole, whole // shorter than that
}

// dialer returns a function that connects from a host to the transfer server.
func dialer(h *netlab.Host) dialFunc {
	address := fmt.Sprintf("%s:%d", netlab.ServerAddress, transferPort)
	return func(ctx context.Context) (net.Conn, error) {
		return h.Dial(ctx, "tcp", address)
	}
}
