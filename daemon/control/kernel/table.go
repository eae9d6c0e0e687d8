package kernel

import (
	"bytes"
	"fmt"
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

// The path of a table through this file:
//
//	desired.Table ─▶ replaceTable ─▶ expressions of every statement ─▶ one transaction
//	name, digest, altered? ◀─ readTable ◀─ the tags of all rules, and how their chains are

// register is the one that all expressions use, and second the one beside it
// where an action takes two. Both have 16 bytes.
const (
	register = 1
	second   = 2
)

// compilation is a rule on its way into the kernel: its expressions, and the
// sets that they look into.
type compilation struct {
	expressions []expr.Any
	sets        []set
}

// set is an anonymous set of interface names. Nobody can change the elements of
// one once a rule uses it.
type set struct {
	lookup *expr.Lookup
	names  []string
}

func (c *compilation) add(expressions ...expr.Any) {
	c.expressions = append(c.expressions, expressions...)
}

func (c *compilation) compare(op expr.CmpOp, value ...byte) {
	c.add(&expr.Cmp{Op: op, Register: register, Data: value})
}

// is compares with a value, or with not differs from it.
func (c *compilation) is(not bool, value ...byte) {
	if not {
		c.compare(expr.CmpOpNeq, value...)
	} else {
		c.compare(expr.CmpOpEq, value...)
	}
}

// any is true when a number of the kernel's byte order has one of the bits.
func (c *compilation) any(not bool, bits uint32) {
	c.add(&expr.Bitwise{
		SourceRegister: register, DestRegister: register, Len: 4,
		Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4),
	})
	c.is(!not, 0, 0, 0, 0)
}

func (c *compilation) family(ipv6 bool) {
	c.add(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register})
	c.is(false, nfproto(ipv6))
}

func nfproto(ipv6 bool) byte {
	if ipv6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

// interfaces compares a name in the register.
func (c *compilation) interfaces(names []string, not bool) {
	if len(names) == 1 {
		c.is(not, interfaceName(names[0])...)
		return
	}
	lookup := &expr.Lookup{SourceRegister: register, Invert: not}
	c.sets = append(c.sets, set{lookup, names})
	c.add(lookup)
}

func interfaceName(name string) []byte {
	key := make([]byte, unix.IFNAMSIZ)
	copy(key, name)
	return key
}

// address compares one in the network header.
func (c *compilation) address(offset uint32, p netip.Prefix, not bool) {
	c.family(p.Addr().Is6())
	length := uint32(p.Addr().BitLen() / 8)
	c.add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length})
	if !p.IsSingleIP() {
		c.add(&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: length, Mask: toIPNet(p).Mask, Xor: make([]byte, length)})
	}
	c.is(not, p.Masked().Addr().AsSlice()...)
}

// dscp loads the first two bytes of the network header, which hold the code
// point, and gives its place there.
func (c *compilation) dscp(ipv6 bool) (shift int) {
	c.family(ipv6)
	c.add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: 0, Len: 2})
	if ipv6 {
		return 6 // RFC 8200: 4 bits of version, 6 of code point, 2 of ECN, 4 of flow label
	}
	return 2 // RFC 791, RFC 2474: 8 bits of version and length, 6 of code point, 2 of ECN
}

// addressTypes are the kernel's numbers (linux/rtnetlink.h).
var addressTypes = map[string]uint32{
	"local": unix.RTN_LOCAL, "broadcast": unix.RTN_BROADCAST, "anycast": unix.RTN_ANYCAST, "multicast": unix.RTN_MULTICAST,
}

// statement adds the expressions of one statement.
func (c *compilation) statement(s desired.Statement) error {
	switch s := s.(type) {
	case desired.MatchInput:
		c.add(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register})
		c.interfaces(s.Interfaces, s.Not)
	case desired.MatchOutput:
		c.add(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: register})
		c.interfaces(s.Interfaces, s.Not)
	case desired.MatchRoute:
		c.add(&expr.Fib{Register: register, FlagDADDR: true, ResultOIFNAME: true})
		c.interfaces(s.Interfaces, false)
	case desired.MatchFamily:
		c.family(s.IPv6)
	case desired.MatchProtocol:
		c.add(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register})
		c.is(s.Not, s.Number)
	case desired.MatchSource:
		offset := uint32(12) // in the header of RFC 791
		if s.Prefix.Addr().Is6() {
			offset = 8 // of RFC 8200
		}
		c.address(offset, s.Prefix, s.Not)
	case desired.MatchDestination:
		offset := uint32(16)
		if s.Prefix.Addr().Is6() {
			offset = 24
		}
		c.address(offset, s.Prefix, false)
	case desired.MatchPort:
		offset := uint32(2)
		if s.Source {
			offset = 0
		}
		c.add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2})
		first, last := binaryutil.BigEndian.PutUint16(s.First), binaryutil.BigEndian.PutUint16(s.Last)
		if s.First == s.Last {
			c.is(false, first...)
		} else {
			c.compare(expr.CmpOpGte, first...)
			c.compare(expr.CmpOpLte, last...)
		}
	case desired.MatchAddressType:
		number, ok := addressTypes[s.Type]
		if !ok {
			return fmt.Errorf("%s: there is no such type of address", s)
		}
		c.add(&expr.Fib{Register: register, FlagDADDR: true, ResultADDRTYPE: true})
		c.is(false, binaryutil.NativeEndian.PutUint32(number)...)
	case desired.MatchMark:
		c.add(
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
			&expr.Bitwise{
				SourceRegister: register, DestRegister: register, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(s.Mask), Xor: make([]byte, 4),
			},
		)
		c.is(false, binaryutil.NativeEndian.PutUint32(s.Mark)...)
	case desired.MatchConnection:
		c.add(&expr.Ct{Key: expr.CtKeySTATE, Register: register})
		c.any(false, uint32(s.States))
	case desired.MatchTranslated:
		const destinationTranslated = 1 << 5 // IPS_DST_NAT, linux/netfilter/nf_conntrack_common.h
		c.add(&expr.Ct{Key: expr.CtKeySTATUS, Register: register})
		c.any(s.Not, destinationTranslated)
	case desired.MatchICMP:
		c.add(&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1})
		c.is(false, s.Type)
	case desired.MatchDSCP:
		shift := c.dscp(s.IPv6)
		c.add(&expr.Bitwise{
			SourceRegister: register, DestRegister: register, Len: 2,
			Mask: binaryutil.BigEndian.PutUint16(0x3f << shift), Xor: make([]byte, 2),
		})
		c.is(false, binaryutil.BigEndian.PutUint16(uint16(s.Codepoint)<<shift)...)
	case desired.MatchSYN:
		const syn, rst = 0x02, 0x04 // in byte 13 of the header of RFC 9293
		c.add(
			&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
			&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 1, Mask: []byte{syn | rst}, Xor: []byte{0}},
		)
		c.is(false, syn)
	case desired.SetMark:
		c.add(
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
			&expr.Bitwise{
				SourceRegister: register, DestRegister: register, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(^s.Mask), Xor: binaryutil.NativeEndian.PutUint32(s.Mark),
			},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: register, SourceRegister: true},
		)
	case desired.SetDSCP:
		shift := c.dscp(s.IPv6)
		write := &expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: 0, Len: 2}
		if !s.IPv6 {
			write.CsumType, write.CsumOffset = expr.CsumTypeInet, 10
		}
		c.add(&expr.Bitwise{
			SourceRegister: register, DestRegister: register, Len: 2,
			Mask: binaryutil.BigEndian.PutUint16(^uint16(0x3f << shift)), Xor: binaryutil.BigEndian.PutUint16(uint16(s.Codepoint) << shift),
		}, write)
	case desired.SetMSS:
		const option, value = 2, 2 // kind 2 of RFC 9293; its value comes after kind and length
		if s.Bytes == 0 {
			c.add(
				&expr.Rt{Register: register, Key: expr.RtTCPMSS},
				&expr.Byteorder{SourceRegister: register, DestRegister: register, Op: expr.ByteorderHton, Len: 2, Size: 2},
			)
		} else {
			c.add(&expr.Immediate{Register: register, Data: binaryutil.BigEndian.PutUint16(s.Bytes)})
		}
		c.add(&expr.Exthdr{SourceRegister: register, Type: option, Offset: value, Len: 2, Op: expr.ExthdrOpTcpopt})
	case desired.TransparentProxy:
		c.add(
			&expr.Immediate{Register: register, Data: s.To.Addr().AsSlice()},
			&expr.Immediate{Register: second, Data: binaryutil.BigEndian.PutUint16(s.To.Port())},
			&expr.TProxy{Family: nfproto(s.To.Addr().Is6()), TableFamily: unix.NFPROTO_INET, RegAddr: register, RegPort: second},
		)
	case desired.TranslateDestination:
		c.add(
			&expr.Immediate{Register: register, Data: s.To.Addr().AsSlice()},
			&expr.Immediate{Register: second, Data: binaryutil.BigEndian.PutUint16(s.To.Port())},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(nfproto(s.To.Addr().Is6())), RegAddrMin: register, RegProtoMin: second},
		)
	case desired.Masquerade:
		c.add(&expr.Masq{})
	case desired.Verdict:
		kind, ok := map[desired.Verdict]expr.VerdictKind{
			desired.Accept: expr.VerdictAccept, desired.Drop: expr.VerdictDrop, desired.Return: expr.VerdictReturn,
		}[s]
		if !ok {
			return fmt.Errorf("%s: there is no such verdict", s)
		}
		c.add(&expr.Verdict{Kind: kind})
	default:
		return fmt.Errorf("package kernel does not know the statement %T", s)
	}
	return nil
}

func compileRule(rule []desired.Statement) (c compilation, err error) {
	for _, s := range rule {
		if err := c.statement(s); err != nil {
			return c, err
		}
	}
	return c, nil
}

// tag is the comment of a rule: the digest of the whole table, what the chain is
// and its place, and the rule's place in it. So what was added, removed, moved
// or replaced by somebody else shows, and so does a table that another version
// of us wrote.
func tag(digest string, chain *nftables.Chain, place, chains, rule, rules int) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, fmt.Sprintf("sheaf %s %d/%d %s %s %s %d/%d",
		digest, place+1, chains, chain.Name, chain.Type, hookText(chain), rule+1, rules))
}

// hookText is empty for a chain that hangs in no hook.
func hookText(c *nftables.Chain) string {
	if c.Hooknum == nil || c.Priority == nil || c.Policy == nil {
		return ""
	}
	return fmt.Sprintf("%d %d %d", *c.Hooknum, *c.Priority, *c.Policy)
}

var hooks = map[string]*nftables.ChainHook{
	"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput,
	"forward": nftables.ChainHookForward, "postrouting": nftables.ChainHookPostrouting,
}

func toChain(table *nftables.Table, c desired.Chain) (*nftables.Chain, error) {
	hook, ok := hooks[c.Hook]
	if !ok {
		return nil, fmt.Errorf("chain %s: there is no hook %s", c.Name, c.Hook)
	}
	accept := nftables.ChainPolicyAccept
	return &nftables.Chain{
		Table: table, Name: c.Name, Type: nftables.ChainType(c.Type), Hooknum: hook,
		Priority: nftables.ChainPriorityRef(nftables.ChainPriority(c.Priority)), Policy: &accept,
	}, nil
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

func (k *Kernel) readTable() (desired.Table, error) {
	conn, err := k.nft()
	if err != nil {
		return desired.Table{}, fmt.Errorf("open nf_tables: %w", err)
	}
	t, err := readTable(conn, k.scope.table)
	if err != nil {
		return desired.Table{}, fmt.Errorf("read table inet %s: %w", k.scope.table, err)
	}
	return t, nil
}

func readTable(conn *nftables.Conn, name string) (desired.Table, error) {
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return desired.Table{}, err
	}
	at := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == name })
	if at < 0 {
		return desired.Table{}, nil
	}
	table := desired.Table{Name: name, Altered: tables[at].Flags != 0} // dormant, perhaps

	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return desired.Table{}, err
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != name })
	for place, chain := range chains {
		rules, err := conn.GetRules(tables[at], chain)
		if err != nil {
			return desired.Table{}, err
		}
		if table.Digest == "" && len(rules) > 0 {
			table.Digest = digestOf(rules[0])
		}
		for i, r := range rules {
			if !bytes.Equal(r.UserData, tag(table.Digest, chain, place, len(chains), i, len(rules))) {
				table.Altered = true
			}
		}
		if len(rules) == 0 { // no chain of ours is empty
			table.Altered = true
		}
	}
	if table.Digest == "" {
		table.Altered = true
	}
	return table, nil
}

// digestOf reads the digest in a rule's tag, or what stands in its place: the
// tags that come of it tell.
func digestOf(r *nftables.Rule) string {
	comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
	var digest string
	_, _ = fmt.Sscanf(comment, "sheaf %s", &digest)
	return digest
}

// replaceTable puts a new table in the place of the old one in a single
// transaction: every packet meets one or the other. Connections keep how they
// are translated.
func (k *Kernel) replaceTable(t desired.Table) error {
	if t.Name != k.scope.table {
		return fmt.Errorf("this table is not ours: ours is %s", k.scope.table)
	}
	conn, err := k.nft()
	if err != nil {
		return err
	}
	table := &nftables.Table{Name: t.Name, Family: nftables.TableFamilyINet}
	// A table can only be deleted when it is there.
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	for place, c := range t.Chains {
		chain, err := toChain(table, c)
		if err != nil {
			return err
		}
		conn.AddChain(chain)
		for i, rule := range c.Rules {
			compiled, err := compileRule(rule)
			if err != nil {
				return err
			}
			for _, s := range compiled.sets {
				if err := addSet(conn, table, s); err != nil {
					return err
				}
			}
			conn.AddRule(&nftables.Rule{
				Table: table, Chain: chain, Exprs: compiled.expressions,
				UserData: tag(t.Digest, chain, place, len(t.Chains), i, len(c.Rules)),
			})
		}
	}
	return conn.Flush()
}

func addSet(conn *nftables.Conn, table *nftables.Table, s set) error {
	anonymous := &nftables.Set{
		Table: table, Anonymous: true, Constant: true,
		KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian,
	}
	elements := make([]nftables.SetElement, len(s.names))
	for i, name := range s.names {
		elements[i].Key = interfaceName(name)
	}
	if err := conn.AddSet(anonymous, elements); err != nil {
		return err
	}
	s.lookup.SetName, s.lookup.SetID = anonymous.Name, anonymous.ID
	return nil
}

func (k *Kernel) deleteTable(name string) error {
	if name != k.scope.table {
		return fmt.Errorf("this table is not ours: ours is %s", k.scope.table)
	}
	conn, err := k.nft()
	if err != nil {
		return err
	}
	conn.DelTable(&nftables.Table{Name: name, Family: nftables.TableFamilyINet})
	return unlessGone(conn.Flush())
}
