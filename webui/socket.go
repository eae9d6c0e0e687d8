package webui

// The path of a socket: ListenUnix (one daemon per path, root only) ─▶ Serve
// (bounded in time, ends gracefully).

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxSocketPath is sizeof(sockaddr_un.sun_path) less its final zero.
	maxSocketPath = 107
	// shutdownGrace is how long requests under way may go on after the end.
	shutdownGrace = 5 * time.Second
)

// ErrInUse says that another daemon answers on the socket.
var ErrInUse = errors.New("another daemon is running and answers on this socket; stop it, or choose another path")

// ListenUnix listens on a unix socket that only its owner can open. It creates
// the directory if that is missing, and takes over a socket that nobody answers
// on: the leftover of a daemon that was killed.
func ListenUnix(path string) (net.Listener, error) {
	if path == "" {
		return nil, errors.New("listen on unix socket: the path is empty")
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listen on unix socket %s: the path is %d bytes long; Linux allows %d, choose a shorter one",
			path, len(path), maxSocketPath)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("listen on unix socket %s: create its directory: %w", path, err)
	}
	// Two daemons starting at once could each find the leftover, and the second
	// would remove the socket that the first has just made.
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, fmt.Errorf("listen on unix socket %s: lock its directory: %w", path, err)
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("listen on unix socket %s: %w", path, err)
	}
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		// Linux gives the file the mode that the socket has when it is bound,
		// so nobody can slip in between bind and a later chmod.
		var chmodErr error
		err := raw.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmodErr)
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on unix socket: %w", err)
	}
	return ln, nil
}

// lockDir holds a lock on a directory, waiting a little for another holder.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			f.Close()
			return nil, err
		}
	}
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != os.ModeSocket {
		return errors.New("there is something else than a socket at this path; remove it, or choose another path")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		conn.Close()
		return ErrInUse
	case errors.Is(err, unix.EAGAIN):
		// Its queue of connections is full, so somebody listens.
		return ErrInUse
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	default:
		return fmt.Errorf("find out whether another daemon is running: %w", err)
	}
}

// Serve serves h on ln until ctx ends, then lets requests under way finish for a
// short time. It closes ln. The end of ctx is not an error.
func Serve(ctx context.Context, ln net.Listener, h http.Handler) error {
	// Requests outlive ctx by the grace, and not more.
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	srv := &http.Server{
		Handler:           h,
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      requestTimeout + 15*time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    16 << 10,
		// It tells of clients that hang up, or do not trust the certificate; panics are
		// the engine's.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	grace, stop := context.WithTimeout(base, shutdownGrace)
	defer stop()
	if srv.Shutdown(grace) != nil {
		_ = srv.Close()
	}
	<-served
	return nil
}
