package intercept

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"
)

// Diversion by the kernel is tested where it is installed (control/kernel) and
// end to end (netlab/deploy); here, that nobody gets in without it.
func TestConnectionsThatWereNotDivertedAreClosed(t *testing.T) {
	const port = 18383
	l, err := Listen(context.Background(), port, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		l.Serve(func(client *net.TCPConn, destination netip.AddrPort) {
			t.Errorf("%s was handed over, for %s", client.RemoteAddr(), destination)
			_ = client.Close()
		})
	}()
	for _, address := range []string{"127.0.0.1:18383", "[::1]:18383"} {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || err != io.EOF && !isReset(err) {
			t.Errorf("%s: %v, want the connection closed", address, err)
		}
		_ = c.Close()
	}
	if _, err := Listen(context.Background(), port, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("two listeners on one port")
	}
	l.Close()
	<-served
}

func isReset(err error) bool {
	operation, ok := err.(*net.OpError)
	return ok && !operation.Timeout()
}
