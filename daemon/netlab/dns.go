package netlab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// A DNSServer answers every question for an address by its own two, so that a
// client's answer tells which server it came from. Questions for anything else
// it answers by nothing (NOERROR, no records).
type DNSServer struct {
	Queries atomic.Int64 // answered

	addresses []netip.Addr
	socket    net.PacketConn
	listener  net.Listener

	mu          sync.Mutex
	connections map[net.Conn]struct{} // nil when closed
	wg          sync.WaitGroup
}

// dnsLimit is the largest message by UDP, in bytes.
const dnsLimit = 4096

// ServeDNS answers on UDP and TCP at an address of the Host's, such as
// "10.1.0.1:53" in Lab.Core for what an uplink's gateway says. The answers, an
// IPv4 and an IPv6 address, may be any. Close it.
func (h *Host) ServeDNS(address string, answer4, answer6 netip.Addr) (*DNSServer, error) {
	s := &DNSServer{addresses: []netip.Addr{answer4, answer6}, connections: map[net.Conn]struct{}{}}
	if !answer4.Is4() || !answer6.Is6() {
		return nil, fmt.Errorf("netlab: DNS server: answers %v and %v: give an IPv4 and an IPv6 address", answer4, answer6)
	}
	var err error
	if s.socket, err = h.ListenPacket("udp", address); err != nil {
		return nil, fmt.Errorf("netlab: DNS server: %w", err)
	}
	if s.listener, err = h.Listen("tcp", address); err != nil {
		return nil, fmt.Errorf("netlab: DNS server: %w", errors.Join(err, s.socket.Close()))
	}
	s.wg.Go(s.serveUDP)
	s.wg.Go(s.serveTCP)
	return s, nil
}

// Close ends the server.
func (s *DNSServer) Close() error {
	err := errors.Join(s.socket.Close(), s.listener.Close())
	s.mu.Lock()
	for c := range s.connections {
		_ = c.Close()
	}
	s.connections = nil
	s.mu.Unlock()
	s.wg.Wait()
	return err
}

func (s *DNSServer) serveUDP() {
	buffer := make([]byte, dnsLimit)
	for {
		n, from, err := s.socket.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if answer := s.answer(buffer[:n]); err == nil && answer != nil {
			_, _ = s.socket.WriteTo(answer, from) // the client asks again
		}
	}
}

func (s *DNSServer) serveTCP() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			return // closed
		}
		s.mu.Lock()
		if s.connections == nil {
			_ = c.Close()
		} else {
			s.connections[c] = struct{}{}
			s.wg.Go(func() { s.serveConnection(c) })
		}
		s.mu.Unlock()
	}
}

func (s *DNSServer) serveConnection(c net.Conn) {
	defer func() {
		_ = c.Close()
		s.mu.Lock()
		delete(s.connections, c)
		s.mu.Unlock()
	}()
	for {
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		query, err := readLengthAnd(c)
		if err != nil {
			return
		}
		answer := s.answer(query)
		if answer == nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return
		}
	}
}

// readLengthAnd reads a message with its length before it (RFC 1035 §4.2.2).
func readLengthAnd(c net.Conn) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(c, message)
	return message, err
}

// answer is nil for what is not a query with one question.
func (s *DNSServer) answer(query []byte) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || m.Response || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	reply := dnsmessage.Message{Questions: m.Questions,
		Header: dnsmessage.Header{ID: m.ID, Response: true, RecursionDesired: m.RecursionDesired, RecursionAvailable: true}}
	header := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1}
	switch q.Type {
	case dnsmessage.TypeA:
		reply.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AResource{A: s.addresses[0].As4()}}}
	case dnsmessage.TypeAAAA:
		reply.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AAAAResource{AAAA: s.addresses[1].As16()}}}
	}
	packed, err := reply.Pack()
	if err != nil {
		return nil
	}
	s.Queries.Add(1)
	return packed
}

// LookupDNS asks the server at an address for the IPv4 (six false) or IPv6
// addresses of a name that ends in a dot, by network "udp" (asking up to three
// times, a second apart) or "tcp". An answer other than NOERROR is an error.
func (h *Host) LookupDNS(ctx context.Context, network, server, name string, six bool) ([]netip.Addr, error) {
	addresses, err := h.lookup(ctx, network, server, name, six)
	if err != nil {
		return nil, fmt.Errorf("netlab: ask %s for %s by %s from %s: %w", server, name, network, h.Name, err)
	}
	return addresses, nil
}

func (h *Host) lookup(ctx context.Context, network, server, name string, six bool) ([]netip.Addr, error) {
	const tries, patience = 3, time.Second
	parsed, err := dnsmessage.NewName(name)
	if err != nil {
		return nil, err
	}
	question := dnsmessage.Question{Name: parsed, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	if six {
		question.Type = dnsmessage.TypeAAAA
	}
	id := uint16(rand.Uint32())
	query, err := (&dnsmessage.Message{Header: dnsmessage.Header{ID: id, RecursionDesired: true}, Questions: []dnsmessage.Question{question}}).Pack()
	if err != nil {
		return nil, err
	}
	dialling, cancel := context.WithTimeout(ctx, tries*patience)
	defer cancel()
	c, err := h.Dial(dialling, network, server)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	if network == "tcp" {
		_ = c.SetDeadline(time.Now().Add(tries * patience))
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)); err != nil {
			return nil, err
		}
		reply, err := readLengthAnd(c)
		if err != nil {
			return nil, err
		}
		addresses, _, err := readAnswer(reply, id, question)
		return addresses, err
	}
	var last error
	buffer := make([]byte, dnsLimit)
	for range tries {
		if _, last = c.Write(query); last != nil {
			continue
		}
		for deadline := time.Now().Add(patience); ; {
			_ = c.SetReadDeadline(deadline)
			var n int
			if n, last = c.Read(buffer); last != nil {
				break
			}
			if addresses, ours, err := readAnswer(buffer[:n], id, question); ours {
				return addresses, err
			}
		}
	}
	return nil, errors.Join(ctx.Err(), last)
}

// readAnswer says whether a message answers the question, and what.
func readAnswer(message []byte, id uint16, question dnsmessage.Question) (addresses []netip.Addr, ours bool, err error) {
	var m dnsmessage.Message
	if err := m.Unpack(message); err != nil {
		return nil, false, err
	}
	if !m.Response || m.ID != id || len(m.Questions) != 1 || m.Questions[0] != question {
		return nil, false, errors.New("the message does not answer the question")
	}
	if m.RCode != dnsmessage.RCodeSuccess {
		return nil, true, fmt.Errorf("the answer is %v", m.RCode)
	}
	for _, r := range m.Answers {
		switch body := r.Body.(type) {
		case *dnsmessage.AResource:
			addresses = append(addresses, netip.AddrFrom4(body.A))
		case *dnsmessage.AAAAResource:
			addresses = append(addresses, netip.AddrFrom16(body.AAAA))
		}
	}
	return addresses, true, nil
}
