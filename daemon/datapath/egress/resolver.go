package egress

// The DNS of the routers' LANs, which their firewalls redirect to the
// concentrator's inner addresses.
//
//	query ─▶ limit ─▶ parse ─▶ resolver 1 ─▶ answer that matches ─▶ client
//	                          ─▶ resolver 2, 3 when that is late or unable ─▶ SERVFAIL
//
// Messages pass as they are, but for their ID. Nothing is cached: the machine's
// resolvers do that.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

const (
	// resolverTries and resolverWait are how often a query is put to the machine's
	// resolvers, and how long each may take. Clients wait 5 s (resolv.conf(5)) and
	// ask again.
	resolverTries = 3
	resolverWait  = 2 * time.Second
	// resolverMax and resolverMaxSource are how many queries may be under way in
	// all and from one address, which is one router; and as many connections.
	resolverMax       = 512
	resolverMaxSource = 64
	// dnsUDPMax is the longest DNS message over UDP.
	dnsUDPMax = 4096
	// dnsTCPIdle is how long a connection may take for the next query, or to take
	// an answer.
	dnsTCPIdle = 5 * time.Second
	// resolvConfEvery is how often /etc/resolv.conf is looked at; it is read when
	// it has changed.
	resolvConfEvery = time.Second
	resolvConfMax   = 64 << 10
	// maxServers is as many as the C library uses (MAXNS in resolv.h).
	maxServers = 3
)

// ResolverCounters are what a Resolver has done, in queries.
type ResolverCounters struct {
	Answered uint64 // with what a resolver said
	Failed   uint64 // with SERVFAIL, because none said anything
	Refused  uint64 // malformed, or a kind that is not forwarded
	Dropped  uint64 // over the limits, or no query
}

// Resolver forwards DNS queries to the machine's resolvers.
type Resolver struct {
	servers     func() []netip.AddrPort
	queries     *limiter[netip.Addr]
	connections *limiter[netip.Addr]
	log         *sparseLog

	answered, failed, refused, dropped atomic.Uint64
}

// NewResolver returns a resolver that asks servers, or without any those of
// /etc/resolv.conf as it is at the time.
func NewResolver(servers []netip.AddrPort, log *slog.Logger) *Resolver {
	r := &Resolver{
		servers:     func() []netip.AddrPort { return servers },
		queries:     newLimiter[netip.Addr](resolverMax, resolverMaxSource),
		connections: newLimiter[netip.Addr](resolverMax, resolverMaxSource),
		log:         newSparseLog(log),
	}
	if len(servers) == 0 {
		r.servers = (&resolvConf{path: "/etc/resolv.conf"}).servers
	}
	return r
}

// Counters returns what was done so far.
func (r *Resolver) Counters() ResolverCounters {
	return ResolverCounters{r.answered.Load(), r.failed.Load(), r.refused.Load(), r.dropped.Load()}
}

// Serve answers on the addresses, by UDP and TCP, until ctx ends. The addresses
// need not be the machine's yet (IP_FREEBIND). The error says which of them could
// not be listened on.
func (r *Resolver) Serve(ctx context.Context, listen ...netip.AddrPort) error {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	config := net.ListenConfig{Control: freeBind, KeepAliveConfig: keepAlive}
	config.SetMultipathTCP(false)
	var serve []func()
	for _, address := range listen {
		packets, err := config.ListenPacket(ctx, "udp", address.String())
		if err != nil {
			return fmt.Errorf("listening for DNS queries: %w", err)
		}
		defer func() { _ = packets.Close() }()
		stream, err := config.Listen(ctx, "tcp", address.String())
		if err != nil {
			return fmt.Errorf("listening for DNS queries: %w", err)
		}
		defer func() { _ = stream.Close() }()
		serve = append(serve,
			func() { r.serveUDP(ctx, packets.(*net.UDPConn), &work) },
			func() {
				accept(ctx, stream.(*net.TCPListener), r.log, func(c *net.TCPConn) {
					work.Go(func() { r.serveTCP(ctx, c) })
				})
			})
	}
	for _, f := range serve {
		work.Go(f)
	}
	<-ctx.Done()
	return nil
}

func freeBind(_, _ string, raw syscall.RawConn) error {
	var set error
	err := raw.Control(func(fd uintptr) {
		// Of an IPv6 socket too (ip6_sock_set_freebind sets the same bit).
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
	})
	return errors.Join(err, set)
}

func (r *Resolver) serveUDP(ctx context.Context, c *net.UDPConn, work *sync.WaitGroup) {
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	buffer := make([]byte, dnsUDPMax+1)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buffer)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			r.log.warn("reading DNS queries failed, trying again", "error", err)
			time.Sleep(acceptRetry)
			continue
		case n > dnsUDPMax || !r.queries.enter(from.Addr()):
			r.dropped.Add(1)
			continue
		}
		message := bytes.Clone(buffer[:n])
		work.Go(func() {
			defer r.queries.leave(from.Addr())
			if answer := r.answer(ctx, "udp", message); answer != nil {
				_, _ = c.WriteToUDPAddrPort(answer, from)
			}
		})
	}
}

func (r *Resolver) serveTCP(ctx context.Context, c *net.TCPConn) {
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
	if !r.connections.enter(from) {
		r.dropped.Add(1)
		return
	}
	defer r.connections.leave(from)
	for {
		_ = c.SetDeadline(time.Now().Add(dnsTCPIdle))
		message, err := readTCP(c)
		if err != nil {
			return
		}
		if !r.queries.enter(from) {
			r.dropped.Add(1)
			return
		}
		answer := r.answer(ctx, "tcp", message)
		r.queries.leave(from)
		if answer == nil {
			return
		}
		_ = c.SetDeadline(time.Now().Add(dnsTCPIdle))
		if _, err := c.Write(withLength(answer)); err != nil {
			return
		}
	}
}

// readTCP reads a message behind its length (RFC 1035 section 4.2.2).
func readTCP(c io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(c, message)
	return message, err
}

func withLength(message []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...)
}

// query is what is looked at of a message.
type query struct {
	header   dnsmessage.Header
	question dnsmessage.Question
}

// parseQuery returns false for what deserves no answer, and otherwise the code
// with which the query is refused, or success.
func parseQuery(message []byte) (q query, code dnsmessage.RCode, ok bool) {
	var p dnsmessage.Parser
	var err error
	if q.header, err = p.Start(message); err != nil || q.header.Response {
		return q, 0, false
	}
	if q.header.OpCode != 0 { // QUERY
		return q, dnsmessage.RCodeNotImplemented, true
	}
	if q.question, ok = onlyQuestion(&p, message); !ok {
		return q, dnsmessage.RCodeFormatError, true
	}
	const ixfr = 251 // RFC 1995
	if q.question.Type == dnsmessage.TypeAXFR || q.question.Type == ixfr {
		return q, dnsmessage.RCodeRefused, true // several messages long
	}
	return q, dnsmessage.RCodeSuccess, true
}

// onlyQuestion is false when there are more questions than one, which nobody
// answers (RFC 9619), or it is damaged.
func onlyQuestion(p *dnsmessage.Parser, message []byte) (dnsmessage.Question, bool) {
	if binary.BigEndian.Uint16(message[4:]) != 1 { // QDCOUNT
		return dnsmessage.Question{}, false
	}
	question, err := p.Question()
	return question, err == nil
}

// reply makes an answer without records. It is nil when the question cannot be
// written again.
func (q query) reply(code dnsmessage.RCode, truncated bool) []byte {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{
		ID: q.header.ID, Response: true, OpCode: q.header.OpCode, RCode: code, Truncated: truncated,
		RecursionDesired: q.header.RecursionDesired, RecursionAvailable: true,
	})
	if q.question.Name.Length > 0 {
		if b.StartQuestions() != nil || b.Question(q.question) != nil {
			return nil
		}
	}
	message, err := b.Finish()
	if err != nil {
		return nil
	}
	return message
}

// answered returns the code of an answer to the question under id, and false for
// any other message.
func (q query) answered(message []byte, id uint16) (dnsmessage.RCode, bool) {
	var p dnsmessage.Parser
	header, err := p.Start(message)
	if err != nil || !header.Response || header.ID != id {
		return 0, false
	}
	got, ok := onlyQuestion(&p, message)
	return header.RCode, ok && got.Type == q.question.Type && got.Class == q.question.Class &&
		strings.EqualFold(got.Name.String(), q.question.Name.String())
}

// answer returns what to tell the client, or nil to say nothing.
func (r *Resolver) answer(ctx context.Context, network string, message []byte) []byte {
	q, code, ok := parseQuery(message)
	switch {
	case !ok:
		r.dropped.Add(1)
		return nil
	case code != dnsmessage.RCodeSuccess:
		r.refused.Add(1)
		return q.reply(code, false)
	}
	servers := r.servers()
	var unable []byte // an answer, of a server that could not help
	var failure error
	for try := range resolverTries {
		if ctx.Err() != nil || len(servers) == 0 || unable != nil && try >= len(servers) {
			break
		}
		answer, code, err := q.ask(ctx, network, servers[try%len(servers)], message)
		if err != nil {
			failure = err
			continue
		}
		switch code {
		case dnsmessage.RCodeServerFailure, dnsmessage.RCodeRefused, dnsmessage.RCodeNotImplemented:
			unable = answer
		default:
			r.answered.Add(1)
			return answer
		}
	}
	if unable != nil {
		r.answered.Add(1)
		return unable
	}
	r.failed.Add(1)
	r.log.warn("no resolver of the concentrator answers: check /etc/resolv.conf", "resolvers", servers, "error", failure)
	return q.reply(dnsmessage.RCodeServerFailure, false)
}

// ask puts the query to one server, from a port and with an ID that nobody can
// guess (RFC 5452), and returns its answer with the client's ID.
func (q query) ask(ctx context.Context, network string, server netip.AddrPort, message []byte) ([]byte, dnsmessage.RCode, error) {
	ctx, cancel := context.WithTimeout(ctx, resolverWait)
	defer cancel()
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = c.Close() }()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()

	var random [2]byte
	_, _ = rand.Read(random[:]) // never fails
	id := binary.BigEndian.Uint16(random[:])
	asked := bytes.Clone(message)
	binary.BigEndian.PutUint16(asked, id)
	if network == "tcp" {
		asked = withLength(asked)
	}
	if _, err := c.Write(asked); err != nil {
		return nil, 0, err
	}
	buffer := make([]byte, dnsUDPMax+1)
	for {
		var answer []byte
		if network == "tcp" {
			answer, err = readTCP(c)
		} else {
			var n int
			n, err = c.Read(buffer)
			answer = buffer[:n]
		}
		if err != nil {
			return nil, 0, fmt.Errorf("resolver %s: %w", server, err)
		}
		code, ok := q.answered(answer, id)
		if !ok {
			continue // forged, or late from before
		}
		if network == "udp" && len(answer) > dnsUDPMax {
			return q.reply(code, true), code, nil // the client asks again by TCP
		}
		binary.BigEndian.PutUint16(answer, q.header.ID)
		return answer, code, nil
	}
}

// resolvConf is /etc/resolv.conf, read again when it has changed. It is safe for
// concurrent use.
type resolvConf struct {
	path string

	mu     sync.Mutex
	looked time.Time
	file   os.FileInfo
	list   []netip.AddrPort
}

func (f *resolvConf) servers() []netip.AddrPort {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.Sub(f.looked) >= resolvConfEvery {
		f.looked = now
		info, err := os.Stat(f.path)
		if err == nil && f.file != nil && os.SameFile(info, f.file) && info.ModTime().Equal(f.file.ModTime()) && info.Size() == f.file.Size() {
			return f.list
		}
		if opened, err := os.Open(f.path); err == nil {
			f.list = parseResolvConf(io.LimitReader(opened, resolvConfMax))
			_ = opened.Close()
			f.file = info
		} else if f.list == nil {
			f.list = parseResolvConf(strings.NewReader(""))
		}
	}
	return f.list
}

// parseResolvConf returns the name servers of a resolv.conf(5).
func parseResolvConf(text io.Reader) []netip.AddrPort {
	var list []netip.AddrPort
	for lines := bufio.NewScanner(text); lines.Scan() && len(list) < maxServers; {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		if address, err := netip.ParseAddr(words[1]); err == nil {
			list = append(list, netip.AddrPortFrom(address, 53))
		}
	}
	if len(list) == 0 {
		list = append(list, netip.MustParseAddrPort("127.0.0.1:53")) // what the C library does
	}
	return list
}
