package tunnel

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestFallBackAfterConnect: where all that the router sends is lost after its SYN,
// until the concentrator has repeated its answer, the kernel goes back to plain TCP
// on a connection that was over MPTCP when it was made. The session is to know.
func TestFallBackAfterConnect(t *testing.T) {
	b := newBond(t)
	b.stopServer()
	runtime.LockOSThread() // for good: the thread ends with the test, and the namespace with it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make a network namespace: %v (this test needs root)", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.startServer("127.0.0.1:0")
	found := loseAllButSYN(t, netip.MustParseAddrPort(b.address).Port())
	// Between a repetition of what the router sends first, after 1.7 s, and the second
	// of the concentrator's answer, after 3 s.
	time.AfterFunc(2400*time.Millisecond, found)
	s, err := b.enrolledPeer().dial(t.Context(), source{}, b.address)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	multipath, err := s.wire.conn.MultipathTCP()
	if err != nil || multipath {
		t.Fatalf("the connection is over MPTCP (%v): the test shows nothing", err)
	}
	if s.multipath || s.token != 0 {
		t.Errorf("over MPTCP: %v, token %08x", s.multipath, s.token)
	}
}

// loseAllButSYN drops in the thread's namespace what comes to a TCP port, but
// SYNs, until found is called.
func loseAllButSYN(t *testing.T, port uint16) (found func()) {
	t.Helper()
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.CloseLasting() })
	const flags, syn = 13, 2 // where TCP has its flags, and which SYN is
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "lost"})
	chain := c.AddChain(&nftables.Chain{Name: "input", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flags, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{syn}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0}},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	return func() {
		c.DelTable(table)
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
	}
}
