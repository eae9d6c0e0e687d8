package tunnel

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestEarlyRoom: the figures are of one page of 100 kB over uplinks of 20, 40 and
// 80 ms, as the kernel told them; segments are 1448 bytes, of which MPTCP leaves 1420.
func TestEarlyRoom(t *testing.T) {
	subflow := func(rtt, cwnd, unacked, unsent int, pacing uint64) unix.TCPInfo {
		return unix.TCPInfo{Rtt: uint32(rtt * 1000), Rto: 200_000, Snd_mss: 1448, Snd_cwnd: uint32(cwnd), Unacked: uint32(unacked),
			Notsent_bytes: uint32(unsent), Pacing_rate: pacing}
	}
	rested := func(info unix.TCPInfo, ms uint32) unix.TCPInfo {
		info.Last_data_sent = ms
		return info
	}
	fast, middle, slow := subflow(28, 16, 0, 0, 1649320), subflow(40, 10, 0, 0, 724000), subflow(80, 10, 0, 0, 362000)
	for _, test := range []struct {
		name     string
		subflows []unix.TCPInfo
		want     int
	}{
		{"all are idle: the first, and as much again, for it is the fastest", []unix.TCPInfo{fast, middle, slow}, 32 * 1420},
		{"the first is not the fastest", []unix.TCPInfo{slow, fast, middle}, 10 * 1420},
		{"the fastest is at work", []unix.TCPInfo{subflow(28, 16, 2, 13632, 1649320), middle, slow}, 10 * 1420},
		{"a slow one alone is idle", []unix.TCPInfo{subflow(28, 16, 2, 13632, 1649320), subflow(40, 10, 10, 0, 724000), slow}, 10 * 1420},
		{"all are at work, the fastest has least to do",
			[]unix.TCPInfo{subflow(28, 16, 8, 0, 1649320), subflow(40, 10, 10, 0, 724000), subflow(80, 10, 10, 0, 362000)}, 8*1420 + 16*1420},
		{"another has, and no room",
			[]unix.TCPInfo{subflow(28, 16, 2, 46576, 1649320), subflow(40, 10, 10, 372, 724000), subflow(80, 10, 10, 372, 362000)}, 0},
		{"two have about as much to do: the lesser room",
			[]unix.TCPInfo{subflow(28, 20, 16, 21584, 2321850), subflow(40, 10, 10, 372, 724000)}, 0},
		{"after a pause the window begins anew", []unix.TCPInfo{rested(subflow(28, 16, 0, 0, 1649320), 250), middle}, 20 * 1420},
		{"halved for each timeout", []unix.TCPInfo{rested(subflow(28, 100, 0, 0, 1649320), 450), middle}, 50 * 1420},
		{"not while something is under way", []unix.TCPInfo{rested(subflow(28, 16, 1, 0, 1649320), 250)}, 15*1420 + 16*1420},
		{"what was lost is sent again first", []unix.TCPInfo{func() unix.TCPInfo {
			info := subflow(28, 10, 10, 0, 1649320)
			info.Lost, info.Retrans = 4, 4
			return info
		}()}, 10 * 1420},
		{"a kernel that says nothing of segments", []unix.TCPInfo{{}}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			var e early
			for i := range test.subflows {
				e.add(&test.subflows[i])
			}
			if got := e.room(); got != test.want {
				t.Errorf("room for %d bytes, want %d", got, test.want)
			}
		})
	}
}
