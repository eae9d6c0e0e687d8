package tunnel

import (
	"context"
	"io"
	"net"
	"testing"
)

// BenchmarkDownload moves a download through both ends in one process, over
// loopback; `make bench` measures the real daemons.
func BenchmarkDownload(b *testing.B) {
	bond := newBond(b)
	const size = 256 << 20
	to := destination(b, func(c *net.TCPConn) {
		block := make([]byte, 256<<10)
		for left := size; left > 0; left -= len(block) {
			if _, err := c.Write(block); err != nil {
				return
			}
		}
		_ = c.Close()
	})
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		client, result := bond.connect(to)
		if n, err := io.Copy(io.Discard, client); n != size || err != nil {
			b.Fatalf("%d bytes, %v", n, err)
		}
		_ = client.Close()
		<-result
	}
}

// BenchmarkDial opens sessions one after the other, both ends in one process.
func BenchmarkDial(b *testing.B) {
	bond := newBond(b)
	bond.pool.SetPeer(nil)
	peer := bond.enrolledPeer()
	for b.Loop() {
		s, err := peer.dial(context.Background(), source{}, bond.address)
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}
