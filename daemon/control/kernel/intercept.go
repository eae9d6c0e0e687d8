package kernel

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// The path of a packet through the table, in the words of nft:
//
//	table inet sheaf {
//	  set lan { type ifname; elements = { lan0 } }
//	  chain prerouting {
//	    type filter hook prerouting priority mangle; policy accept;
//	    iifname != @lan return                      from a client?
//	    meta l4proto != tcp return                  TCP?
//	    fib daddr type { local, broadcast, anycast, multicast } return
//	    fib daddr oifname @lan return               from LAN to LAN
//	    ip daddr { 127.0.0.0/8, 169.254.0.0/16 } return
//	    ip6 daddr fe80::/10 return
//	    meta mark set mark & ~mask | ours
//	    tproxy to the listener on loopback, accept
//	  }
//	}
//
// The mark leads the packet to the local listener. It is set before tproxy looks
// for the listener: when there is none, the packet still goes no further than
// here instead of passing by.

var interceptTable = &nftables.Table{Name: desired.TableName, Family: nftables.TableFamilyINet}

const (
	lanSetName         = "lan"
	interceptChainName = "prerouting"
)

// interceptChain is made anew for every use, because the library writes to it.
func interceptChain() *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return &nftables.Chain{
		Table:    interceptTable,
		Name:     interceptChainName,
		Type:     nftables.ChainTypeFilter,
		Hooknum:  nftables.ChainHookPrerouting,
		Priority: nftables.ChainPriorityMangle,
		Policy:   &accept,
	}
}

// interceptRules are the rules in the order of the path above.
func interceptRules(i desired.Intercept) [][]expr.Any {
	const r1, r2 = 1, 2 // 16-byte registers
	inLAN := func(invert bool) expr.Any {
		return &expr.Lookup{SourceRegister: r1, SetName: lanSetName, Invert: invert}
	}
	is := func(value ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: r1, Data: value} }
	verdict := func(kind expr.VerdictKind) expr.Any { return &expr.Verdict{Kind: kind} }
	protocol := func(family byte) []expr.Any {
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: r1}, is(family)}
	}

	rules := [][]expr.Any{
		{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: r1}, inLAN(true), verdict(expr.VerdictReturn)},
		{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: r1},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: r1, Data: []byte{unix.IPPROTO_TCP}}, verdict(expr.VerdictReturn),
		},
	}
	for _, kind := range []uint32{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST} {
		rules = append(rules, []expr.Any{
			&expr.Fib{Register: r1, FlagDADDR: true, ResultADDRTYPE: true},
			is(binaryutil.NativeEndian.PutUint32(kind)...), verdict(expr.VerdictReturn),
		})
	}
	rules = append(rules, []expr.Any{
		&expr.Fib{Register: r1, FlagDADDR: true, ResultOIFNAME: true}, inLAN(false), verdict(expr.VerdictReturn),
	})
	for _, p := range []netip.Prefix{
		netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"),
	} {
		family, offset := byte(unix.NFPROTO_IPV4), uint32(16) // of the destination in the header
		if p.Addr().Is6() {
			family, offset = unix.NFPROTO_IPV6, 24
		}
		length := uint32(p.Addr().BitLen() / 8)
		rules = append(rules, append(protocol(family),
			&expr.Payload{DestRegister: r1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
			&expr.Bitwise{SourceRegister: r1, DestRegister: r1, Len: length, Mask: toIPNet(p).Mask, Xor: make([]byte, length)},
			is(p.Addr().AsSlice()...), verdict(expr.VerdictReturn),
		))
	}
	for _, listener := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		family := byte(unix.NFPROTO_IPV4)
		if listener.Is6() {
			family = unix.NFPROTO_IPV6
		}
		rules = append(rules, append(protocol(family),
			// Said again, because nft prints a tproxy only with it.
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: r1}, is(unix.IPPROTO_TCP),
			&expr.Meta{Key: expr.MetaKeyMARK, Register: r1},
			&expr.Bitwise{
				SourceRegister: r1, DestRegister: r1, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(^i.Mask), Xor: binaryutil.NativeEndian.PutUint32(i.Mark),
			},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: r1, SourceRegister: true},
			&expr.Immediate{Register: r1, Data: listener.AsSlice()},
			&expr.Immediate{Register: r2, Data: binaryutil.BigEndian.PutUint16(i.Port)},
			&expr.TProxy{Family: family, TableFamily: unix.NFPROTO_INET, RegAddr: r1, RegPort: r2},
			verdict(expr.VerdictAccept),
		))
	}
	return rules
}

// interceptTags are the comments of the rules. Each holds the place of its rule
// and a digest of all of them: a rule that was removed, added, moved or replaced
// by somebody else shows, and so does one that another version of us wrote. The
// expressions themselves are not compared, because kernels differ in how they
// give them back.
func interceptTags(rules [][]expr.Any) [][]byte {
	digest := sha256.New()
	for _, rule := range rules {
		for _, e := range rule {
			fmt.Fprintf(digest, "%T%+v\n", e, e)
		}
		fmt.Fprintln(digest)
	}
	tags := make([][]byte, len(rules))
	for i := range rules {
		tags[i] = userdata.AppendString(nil, userdata.TypeComment, fmt.Sprintf("sheaf %x %d/%d", digest.Sum(nil)[:6], i+1, len(rules)))
	}
	return tags
}

// nft opens nf_tables in our namespace. A socket is opened for every request:
// one that failed in the middle leaves answers behind that the next would take
// for its own.
func (k *Kernel) nft() (*nftables.Conn, error) {
	// Entering a namespace takes CAP_SYS_ADMIN: only where we are not in it.
	here, err := os.Stat("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	ours, err := k.namespace.Stat()
	if err != nil {
		return nil, err
	}
	if os.SameFile(here, ours) {
		return nftables.New()
	}
	return nftables.New(nftables.WithNetNSFd(int(k.namespace.Fd())))
}

func (k *Kernel) readIntercept() (desired.Intercept, error) {
	conn, err := k.nft()
	if err != nil {
		return desired.Intercept{}, fmt.Errorf("open nf_tables: %w", err)
	}
	i, err := readTable(conn)
	if err != nil {
		return desired.Intercept{}, fmt.Errorf("read table inet %s: %w", desired.TableName, err)
	}
	return i, nil
}

func readTable(conn *nftables.Conn) (desired.Intercept, error) {
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return desired.Intercept{}, err
	}
	at := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == desired.TableName })
	if at < 0 {
		return desired.Intercept{}, nil
	}
	intercept := desired.Intercept{Port: desired.InterceptPort, Mark: desired.Mark, Mask: desired.MarkMask}
	if tables[at].Flags != 0 { // dormant, perhaps
		intercept.Altered = true
	}

	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return desired.Intercept{}, err
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != desired.TableName })
	if len(chains) != 1 || !sameChain(chains[0], interceptChain()) {
		intercept.Altered = true
		return intercept, nil
	}

	rules, err := conn.GetRules(interceptTable, chains[0])
	if err != nil {
		return desired.Intercept{}, err
	}
	tags := interceptTags(interceptRules(intercept))
	if !slices.EqualFunc(rules, tags, func(r *nftables.Rule, tag []byte) bool { return bytes.Equal(r.UserData, tag) }) {
		intercept.Altered = true
	}

	elements, err := conn.GetSetElements(&nftables.Set{Table: interceptTable, Name: lanSetName})
	if errors.Is(err, fs.ErrNotExist) {
		intercept.Altered = true
		return intercept, nil
	}
	if err != nil {
		return desired.Intercept{}, err
	}
	for _, e := range elements {
		name, _, _ := bytes.Cut(e.Key, []byte{0})
		intercept.LAN = append(intercept.LAN, string(name))
	}
	slices.Sort(intercept.LAN)
	if len(intercept.LAN) == 0 { // never so while the table is ours
		intercept.Altered = true
	}
	return intercept, nil
}

func sameChain(a, b *nftables.Chain) bool {
	return a.Name == b.Name && a.Type == b.Type &&
		a.Hooknum != nil && *a.Hooknum == *b.Hooknum &&
		a.Priority != nil && *a.Priority == *b.Priority &&
		a.Policy != nil && *a.Policy == *b.Policy
}

// replaceIntercept puts a new table in the place of the old one in a single
// transaction: every packet meets one or the other.
func (k *Kernel) replaceIntercept(i desired.Intercept) error {
	conn, err := k.nft()
	if err != nil {
		return err
	}
	// A table can only be deleted when it is there.
	conn.AddTable(interceptTable)
	conn.DelTable(interceptTable)
	conn.AddTable(interceptTable)

	set := &nftables.Set{
		Table: interceptTable, Name: lanSetName,
		KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian,
	}
	elements := make([]nftables.SetElement, len(i.LAN))
	for at, name := range i.LAN {
		elements[at].Key = make([]byte, unix.IFNAMSIZ)
		copy(elements[at].Key, name)
	}
	if err := conn.AddSet(set, elements); err != nil {
		return err
	}
	chain := conn.AddChain(interceptChain())
	rules := interceptRules(i)
	for at, tag := range interceptTags(rules) {
		for _, e := range rules[at] {
			if lookup, ok := e.(*expr.Lookup); ok {
				lookup.SetID = set.ID // it has no other name before the transaction is through
			}
		}
		conn.AddRule(&nftables.Rule{Table: interceptTable, Chain: chain, Exprs: rules[at], UserData: tag})
	}
	return conn.Flush()
}

func (k *Kernel) deleteIntercept() error {
	conn, err := k.nft()
	if err != nil {
		return err
	}
	conn.DelTable(interceptTable)
	return unlessGone(conn.Flush())
}
