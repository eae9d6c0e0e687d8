package egress

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"
)

const (
	// acceptRetry is the pause after a failed accept, doubled as long as it fails.
	acceptRetry    = 5 * time.Millisecond
	acceptRetryMax = time.Second
	// logEvery is how often the same complaint is logged at most.
	logEvery = time.Minute
)

// acceptor is what accept needs of a *net.TCPListener.
type acceptor interface {
	AcceptTCP() (*net.TCPConn, error)
}

// accept hands connections to handle until ctx ends; closing the listener then
// is the caller's. Whatever fails meanwhile, such as the want of file
// descriptors, passes.
func accept(ctx context.Context, l acceptor, log *sparseLog, handle func(*net.TCPConn)) {
	pause := acceptRetry
	for {
		c, err := l.AcceptTCP()
		if err == nil {
			pause = acceptRetry
			handle(c)
			continue
		}
		if ctx.Err() != nil {
			return
		}
		log.warn("accepting a connection failed, trying again", "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, acceptRetryMax)
	}
}

// limiter counts what is under way for each key, and in all.
type limiter[K comparable] struct {
	total, each int

	mu  sync.Mutex
	all int
	by  map[K]int
}

func newLimiter[K comparable](total, each int) *limiter[K] {
	return &limiter[K]{total: total, each: each, by: map[K]int{}}
}

// enter is false at the limit; otherwise leave must follow.
func (l *limiter[K]) enter(key K) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= l.total || l.by[key] >= l.each {
		return false
	}
	l.all++
	l.by[key]++
	return true
}

func (l *limiter[K]) leave(key K) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.by[key]--; l.by[key] == 0 {
		delete(l.by, key)
	}
}

// sparseLog logs each message once a minute at most. Messages are constants, so
// that there are few.
type sparseLog struct {
	log *slog.Logger

	mu   sync.Mutex
	last map[string]time.Time
}

func newSparseLog(log *slog.Logger) *sparseLog {
	return &sparseLog{log: log, last: map[string]time.Time{}}
}

func (s *sparseLog) warn(message string, args ...any) {
	now := time.Now()
	s.mu.Lock()
	last, before := s.last[message]
	due := !before || now.Sub(last) >= logEvery
	if due {
		s.last[message] = now
	}
	s.mu.Unlock()
	if due {
		s.log.Warn(message, args...)
	}
}
