package desired

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Table is one nftables table of family inet. It prints itself in the notation
// of nft; package kernel turns the same values into expressions.
type Table struct {
	Name   string // empty: there is none
	Chains []Chain
	// Digest stands for all of the above. A table that was read has it, and its
	// name, but no chains: kernels differ in how they give expressions back.
	Digest string
	// Altered: the table that was read is not as it was installed.
	Altered bool
}

// Chain is a base chain with policy accept.
type Chain struct {
	Name     string
	Type     string // filter or nat
	Hook     string // prerouting, input, forward or postrouting
	Priority int    // as in enum nf_ip_hook_priorities of linux/netfilter_ipv4.h
	Rules    [][]Statement
}

// The chains' priorities.
const (
	priorityRaw            = -300
	priorityMangle         = -150
	priorityDestinationNAT = -100
	priorityFilter         = 0
	prioritySourceNAT      = 100
)

// Statement is one match or action of a rule.
type Statement interface {
	fmt.Stringer
	statement()
}

// The matches.
type (
	// MatchInput is true for packets that came in through one of these
	// interfaces, or with Not through none of them; MatchOutput likewise for
	// those that leave, and MatchRoute for those that would leave there by the
	// routing tables alone.
	MatchInput struct {
		Interfaces []string
		Not        bool
	}
	MatchOutput struct {
		Interfaces []string
		Not        bool
	}
	MatchRoute struct{ Interfaces []string }

	MatchFamily   struct{ IPv6 bool }
	MatchProtocol struct {
		Number uint8 // of IP
		Not    bool
	}
	// MatchSource and MatchDestination are true for packets of the prefix's
	// family only, with Not too.
	MatchSource struct {
		Prefix netip.Prefix
		Not    bool
	}
	MatchDestination struct{ Prefix netip.Prefix }
	// MatchPort comes after a MatchProtocol of TCP or UDP.
	MatchPort struct {
		Source      bool // else destination
		First, Last uint16
	}
	// MatchAddressType looks at the destination: local, broadcast, anycast or
	// multicast.
	MatchAddressType struct{ Type string }
	MatchMark        struct{ Mark, Mask uint32 }
	MatchConnection  struct{ States ConnectionState }
	// MatchTranslated is true for packets of connections whose destination was
	// translated, or with Not for the others.
	MatchTranslated struct{ Not bool }
	MatchICMP       struct {
		IPv6 bool
		Type uint8
	}
	MatchDSCP struct {
		IPv6      bool
		Codepoint uint8
	}
	// MatchSYN is true for the segments that may carry a maximum segment size.
	MatchSYN struct{}
)

// The actions.
type (
	// SetMark changes the bits of the mask and no others.
	SetMark struct{ Mark, Mask uint32 }
	SetDSCP struct {
		IPv6      bool
		Codepoint uint8
	}
	// SetMSS lowers the maximum segment size of a SYN, in bytes; 0 stands for
	// what the routes both ways let through.
	SetMSS               struct{ Bytes uint16 }
	TransparentProxy     struct{ To netip.AddrPort }
	TranslateDestination struct{ To netip.AddrPort }
	Masquerade           struct{}
	// Verdict ends the chain for a packet.
	Verdict string
)

// The verdicts.
const (
	Accept Verdict = "accept"
	Drop   Verdict = "drop"
	Return Verdict = "return"
)

// ConnectionState is a set of NF_CT_STATE_BIT values (linux/netfilter/nf_conntrack_common.h).
type ConnectionState uint32

// The states.
const (
	Invalid     ConnectionState = 1
	Established ConnectionState = 2
	Related     ConnectionState = 4
	NewlyOpened ConnectionState = 8
)

// IP protocol numbers, as assigned by IANA.
const (
	protocolICMP   = 1
	protocolTCP    = 6
	protocolUDP    = 17
	protocolICMPv6 = 58
)

func (MatchInput) statement()           {}
func (MatchOutput) statement()          {}
func (MatchRoute) statement()           {}
func (MatchFamily) statement()          {}
func (MatchProtocol) statement()        {}
func (MatchSource) statement()          {}
func (MatchDestination) statement()     {}
func (MatchPort) statement()            {}
func (MatchAddressType) statement()     {}
func (MatchMark) statement()            {}
func (MatchConnection) statement()      {}
func (MatchTranslated) statement()      {}
func (MatchICMP) statement()            {}
func (MatchDSCP) statement()            {}
func (MatchSYN) statement()             {}
func (SetMark) statement()              {}
func (SetDSCP) statement()              {}
func (SetMSS) statement()               {}
func (TransparentProxy) statement()     {}
func (TranslateDestination) statement() {}
func (Masquerade) statement()           {}
func (Verdict) statement()              {}

func (m MatchInput) String() string  { return "iifname " + not(m.Not) + oneOf(m.Interfaces) }
func (m MatchOutput) String() string { return "oifname " + not(m.Not) + oneOf(m.Interfaces) }
func (m MatchRoute) String() string  { return "fib daddr oifname " + oneOf(m.Interfaces) }
func (m MatchFamily) String() string {
	return "meta nfproto " + map[bool]string{false: "ipv4", true: "ipv6"}[m.IPv6]
}

func (m MatchProtocol) String() string {
	name, ok := map[uint8]string{protocolICMP: "icmp", protocolTCP: "tcp", protocolUDP: "udp", protocolICMPv6: "ipv6-icmp"}[m.Number]
	if !ok {
		name = strconv.Itoa(int(m.Number))
	}
	return "meta l4proto " + not(m.Not) + name
}

func (m MatchSource) String() string {
	return nftFamily(m.Prefix.Addr().Is6()) + " saddr " + not(m.Not) + short(m.Prefix)
}

func (m MatchDestination) String() string {
	return nftFamily(m.Prefix.Addr().Is6()) + " daddr " + short(m.Prefix)
}

func (m MatchPort) String() string {
	text := "th dport "
	if m.Source {
		text = "th sport "
	}
	if m.First == m.Last {
		return text + strconv.Itoa(int(m.First))
	}
	return text + fmt.Sprintf("%d-%d", m.First, m.Last)
}

func (m MatchAddressType) String() string { return "fib daddr type " + m.Type }
func (m MatchMark) String() string        { return fmt.Sprintf("meta mark & %#x == %#x", m.Mask, m.Mark) }

func (m MatchConnection) String() string {
	var names []string
	for _, s := range []struct {
		state ConnectionState
		name  string
	}{{Invalid, "invalid"}, {Established, "established"}, {Related, "related"}, {NewlyOpened, "new"}} {
		if m.States&s.state != 0 {
			names = append(names, s.name)
		}
	}
	return "ct state " + strings.Join(names, ",")
}

func (m MatchTranslated) String() string {
	if m.Not {
		return "ct status & dnat == 0"
	}
	return "ct status & dnat != 0"
}

func (m MatchICMP) String() string {
	if m.IPv6 {
		return fmt.Sprintf("icmpv6 type %d", m.Type)
	}
	return fmt.Sprintf("icmp type %d", m.Type)
}

func (m MatchDSCP) String() string { return fmt.Sprintf("%s dscp %d", nftFamily(m.IPv6), m.Codepoint) }
func (MatchSYN) String() string    { return "tcp flags & (syn | rst) == syn" }

func (a SetMark) String() string {
	return fmt.Sprintf("meta mark set meta mark & %#x | %#x", ^a.Mask, a.Mark)
}

func (a SetDSCP) String() string {
	return fmt.Sprintf("%s dscp set %d", nftFamily(a.IPv6), a.Codepoint)
}

func (a SetMSS) String() string {
	if a.Bytes == 0 {
		return "tcp option maxseg size set rt mtu"
	}
	return fmt.Sprintf("tcp option maxseg size set %d", a.Bytes)
}

func (a TransparentProxy) String() string {
	return fmt.Sprintf("tproxy %s to %s", nftFamily(a.To.Addr().Is6()), a.To)
}

func (a TranslateDestination) String() string {
	return fmt.Sprintf("dnat %s to %s", nftFamily(a.To.Addr().Is6()), a.To)
}

func (Masquerade) String() string { return "masquerade" }
func (v Verdict) String() string  { return string(v) }

func not(not bool) string {
	if not {
		return "!= "
	}
	return ""
}

func oneOf(names []string) string {
	if len(names) == 1 {
		return strconv.Quote(names[0])
	}
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = strconv.Quote(name)
	}
	return "{ " + strings.Join(quoted, ", ") + " }"
}

func nftFamily(ipv6 bool) string {
	if ipv6 {
		return "ip6"
	}
	return "ip"
}

// String is the table in the notation of nft.
func (t Table) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", t.Name)
	for _, c := range t.Chains {
		fmt.Fprintf(&b, "\tchain %s {\n\t\ttype %s hook %s priority %d; policy accept;\n", c.Name, c.Type, c.Hook, c.Priority)
		for _, rule := range c.Rules {
			words := make([]string, len(rule))
			for i, s := range rule {
				words[i] = s.String()
			}
			fmt.Fprintf(&b, "\t\t%s\n", strings.Join(words, " "))
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

// expressionsVersion is raised whenever package kernel makes other expressions
// of the same statement: then a table that the version before installed is
// replaced. A test there says when.
const expressionsVersion = 1

// sealed gives the table its digest, and leaves out chains without rules.
func (t Table) sealed() Table {
	t.Chains = slices.DeleteFunc(t.Chains, func(c Chain) bool { return len(c.Rules) == 0 })
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s", expressionsVersion, t))
	t.Digest = fmt.Sprintf("%x", sum[:6])
	return t
}

// same says whether two tables mean the same.
func (t Table) same(other Table) bool {
	return t.Name == other.Name && t.Digest == other.Digest && t.Altered == other.Altered
}
