package webui

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestListenUnixIsForTheOwnerOnly(t *testing.T) {
	// Without a mask the modes are what ListenUnix asks for.
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(socketPath(t), "run", "sheaf.sock")
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for p, want := range map[string]os.FileMode{path: 0o600 | os.ModeSocket, filepath.Dir(path): 0o700 | os.ModeDir} {
		info, err := os.Lstat(p)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s has mode %v, want %v", p, info.Mode(), want)
		}
	}
}

func TestListenUnixTakesOverOnlyTheDead(t *testing.T) {
	path := socketPath(t)
	first, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path) {
		t.Fatalf("second daemon: %v", err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Fatalf("the second daemon harmed the first: %v", err)
	} else {
		conn.Close()
	}

	// As kill -9 does: closed, and the file stays.
	first.(*net.UnixListener).SetUnlinkOnClose(false)
	first.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Fatal(err)
	}
	again, err := ListenUnix(path)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	again.Close()

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); err == nil {
		t.Error("a file that is not a socket was taken over")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("the file is harmed: %q, %v", b, err)
	}
}

func TestListenUnixManyAtOnce(t *testing.T) {
	path := socketPath(t)
	dead, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	dead.Close()

	var (
		wg  sync.WaitGroup
		won = make(chan net.Listener, 16)
	)
	for range cap(won) {
		wg.Go(func() {
			ln, err := ListenUnix(path)
			if err == nil {
				won <- ln
			} else if !errors.Is(err, ErrInUse) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	close(won)
	if len(won) != 1 {
		t.Errorf("%d daemons listen on one path, want 1", len(won))
	}
	for ln := range won {
		ln.Close()
	}
}

func TestListenUnixPath(t *testing.T) {
	dir := socketPath(t) + "/"
	fits := dir + strings.Repeat("x", maxSocketPath-len(dir))
	ln, err := ListenUnix(fits)
	if err != nil {
		t.Fatalf("%d bytes: %v", len(fits), err)
	}
	ln.Close()
	if _, err := ListenUnix(fits + "x"); err == nil || !strings.Contains(err.Error(), "108 bytes") {
		t.Errorf("108 bytes: %v", err)
	}
	if _, err := ListenUnix(""); err == nil {
		t.Error("the empty path was taken")
	}
}

func TestServeEndsGracefully(t *testing.T) {
	path := socketPath(t)
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	started, release := make(chan struct{}), make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(started)
		<-release
		if r.Context().Err() != nil {
			t.Error("the request under way was cancelled")
		}
		w.Write([]byte(`{"version":"finished"}`))
	})
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, ln, h) }()
	answered := make(chan error, 1)
	go func() {
		s, err := NewClient(path).Status(context.Background())
		if err == nil && s.Version != "finished" {
			err = errors.New("got " + s.Version)
		}
		answered <- err
	}()
	<-started
	cancel()
	// The socket is gone before the request under way has ended.
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the socket is still there")
		}
	}
	close(release)
	if err := <-answered; err != nil {
		t.Errorf("the request under way: %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestServeReportsALostListener(t *testing.T) {
	ln, err := ListenUnix(socketPath(t))
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := Serve(t.Context(), ln, http.NotFoundHandler()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestClientUnreachable(t *testing.T) {
	path := socketPath(t)
	_, err := NewClient(path).Status(t.Context())
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "no socket at "+path) {
		t.Errorf("no socket: %v", err)
	}
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	_, err = NewClient(path).Status(t.Context())
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "nobody answers on "+path) {
		t.Errorf("dead socket: %v", err)
	}
}

func TestClientWithoutPermission(t *testing.T) {
	path := socketPath(t)
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	got := make(chan error)
	go func() {
		// Root may open anything, so this one thread becomes nobody for the
		// file system. It stays locked, and ends with the goroutine.
		runtime.LockOSThread()
		if os.Geteuid() == 0 {
			syscall.Setfsuid(65534)
		}
		_, err := dial(context.Background(), path)
		got <- err
	}()
	if err := <-got; !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "run this as root") {
		t.Errorf("got %v", err)
	}
}

// A daemon that is there but does not speak is not unreachable, and is not
// believed either.
func TestClientOfSomethingElse(t *testing.T) {
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		want    string
	}{
		"hangs up":       {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "hung up"},
		"another server": {http.NotFound, "404 Not Found"},
		"not JSON":       {func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("hello")) }, "right daemon"},
		"endless answer": {func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, maxAnswer+1)) }, "longer than"},
		"redirect to self": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		}, "307 Temporary"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := serve(t, test.handler).Status(t.Context())
			if err == nil || errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}
