package tunnel

import (
	"net/netip"
	"slices"
	"testing"
)

func TestRankOfASubflow(t *testing.T) {
	at := netip.MustParseAddrPort
	address := func(list ...string) (all []netip.Addr) {
		for _, a := range list {
			all = append(all, netip.MustParseAddr(a))
		}
		return all
	}
	ranks := map[string]Rank{"dsl": {3, 1}, "lte": {1, 2}, "gone": {9, 9}}
	here := rankByPath([]Path{
		{Name: "dsl", Sources: address("10.1.0.2", "2001:db8:1::2")},
		{Name: "lte", Sources: address("10.2.0.2"), Ports: Ports{100, 199}},
		{Name: "sat", Sources: address("10.2.0.2"), Ports: Ports{200, 299}},
	}, ranks)
	there := rankByAddress(map[string][]netip.Addr{
		"dsl": address("192.0.2.1", "2001:db8:1::2"), "lte": address("192.0.2.2", "192.0.2.3"), "sat": address("192.0.2.3", "192.0.2.4"),
	}, ranks)
	for _, c := range []struct {
		name, local, remote string
		rank                ranking
		want                Rank
	}{
		{"at the router", "10.1.0.2:7", "203.0.113.1:4443", here, ranks["dsl"]},
		{"IPv6", "[2001:db8:1::2]:7", "[2001:db8::1]:4443", here, ranks["dsl"]},
		{"by the port", "10.2.0.2:199", "203.0.113.1:4443", here, ranks["lte"]},
		{"of an uplink that nothing was asked for", "10.2.0.2:200", "203.0.113.1:4443", here, Rank{}},
		{"of none", "10.3.0.2:7", "203.0.113.1:4443", here, Rank{}},
		{"at the concentrator", "203.0.113.1:4443", "192.0.2.1:7", there, ranks["dsl"]},
		{"IPv6 there", "[2001:db8::1]:4443", "[2001:db8:1::2]:7", there, ranks["dsl"]},
		{"one of two", "203.0.113.1:4443", "192.0.2.2:7", there, ranks["lte"]},
		{"of two uplinks behind one address", "203.0.113.1:4443", "192.0.2.3:7", there, Rank{}},
		{"from nowhere known", "203.0.113.1:4443", "192.0.2.9:7", there, Rank{}},
	} {
		if got := c.rank(at(c.local), at(c.remote)); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// Both ends rank the subflows of a flow, where the kernel takes ranks; else nothing
// is done.
func TestBothEndsRank(t *testing.T) {
	b := newBond(t)
	socket := udp(t, "127.0.0.1:0")
	b.serveDatagrams(socket)
	b.pool.SetPaths(b.loopback())
	router, concentrator := Rank{3, 1}, Rank{5, 2}
	b.pool.SetRanks(map[string]Rank{"dsl": router})
	b.server.SetRanks(b.routerID.PublicKey(), map[string]Rank{"dsl": concentrator})
	b.datagrams(b.datagramPeer(socket))

	client, _ := b.connect(destination(t, echo))
	_, err := client.Write([]byte("x"))
	if err == nil {
		_, err = client.Read(make([]byte, 1))
	}
	if err != nil {
		t.Fatal(err)
	}
	if !canRank() {
		if b.pool.calm.ranks.Load() != nil || b.server.calmOf(b.routerID.PublicKey()).ranks.Load() != nil {
			t.Error("the kernel takes no ranks, and yet there are some to be set")
		}
		return
	}
	held := func(s *Session) (ranks []Rank) {
		_ = s.wire.raw.Control(func(fd uintptr) {
			var list [maxSubflows]subflowRank
			n, err := readRanks(int(fd), &list)
			if err != nil {
				t.Error(err)
			}
			for _, one := range list[:n] {
				ranks = append(ranks, one.Rank)
			}
		})
		return ranks
	}
	b.pool.mu.Lock()
	defer b.pool.mu.Unlock()
	for s := range b.pool.sessions {
		if got := held(s); s.busy() && !slices.Equal(got, []Rank{router}) {
			t.Errorf("at the router %v, want %v", got, router)
		}
	}
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	for s := range b.server.active {
		if got := held(s); s.busy() && !slices.Equal(got, []Rank{concentrator}) {
			t.Errorf("at the concentrator %v, want %v", got, concentrator)
		}
	}
}
