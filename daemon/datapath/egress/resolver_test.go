package egress

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const testWait = 10 * time.Second

// message builds a DNS message with a question for the A record of name.
func message(t testing.TB, header dnsmessage.Header, name string, kind dnsmessage.Type, answers ...[4]byte) []byte {
	t.Helper()
	b := dnsmessage.NewBuilder(nil, header)
	n := dnsmessage.MustNewName(name)
	must(t, b.StartQuestions())
	must(t, b.Question(dnsmessage.Question{Name: n, Type: kind, Class: dnsmessage.ClassINET}))
	must(t, b.StartAnswers())
	for _, a := range answers {
		must(t, b.AResource(dnsmessage.ResourceHeader{Name: n, Class: dnsmessage.ClassINET, TTL: 60}, dnsmessage.AResource{A: a}))
	}
	m, err := b.Finish()
	must(t, err)
	return m
}

// upstream is a DNS server on a port of 127.0.0.1, UDP and TCP: it says what
// answers returns, in that order.
func upstream(t *testing.T, answers func(network string, id uint16) [][]byte) netip.AddrPort {
	t.Helper()
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = packets.Close() })
	stream, err := net.Listen("tcp", packets.LocalAddr().String())
	must(t, err)
	t.Cleanup(func() { _ = stream.Close() })
	go func() {
		b := make([]byte, 4096)
		for {
			_, from, err := packets.ReadFrom(b)
			if err != nil {
				return
			}
			for _, a := range answers("udp", binary.BigEndian.Uint16(b)) {
				_, _ = packets.WriteTo(a, from)
			}
		}
	}()
	go func() {
		for {
			c, err := stream.Accept()
			if err != nil {
				return
			}
			if m, err := readTCP(c); err == nil {
				for _, a := range answers("tcp", binary.BigEndian.Uint16(m)) {
					_, _ = c.Write(withLength(a))
				}
			}
			_ = c.Close()
		}
	}()
	return packets.LocalAddr().(*net.UDPAddr).AddrPort()
}

// answering is an upstream that tells an address, or a code.
func answering(t *testing.T, code dnsmessage.RCode, a ...[4]byte) netip.AddrPort {
	return upstream(t, func(_ string, id uint16) [][]byte {
		return [][]byte{message(t, dnsmessage.Header{ID: id, Response: true, RCode: code}, "Example.org.", dnsmessage.TypeA, a...)}
	})
}

func serve(t *testing.T, r *Resolver, listen ...netip.AddrPort) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	ready := make(chan struct{})
	go func() { close(ready); ended <- r.Serve(ctx, listen...) }()
	<-ready
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(testWait):
			t.Error("Serve did not return")
		}
	})
}

// ask asks as a client does, and again until something listens.
func ask(t *testing.T, network string, server netip.AddrPort, m []byte) []byte {
	t.Helper()
	deadline := time.Now().Add(testWait)
	for {
		answer, err := askOnce(network, server, m, deadline)
		if err == nil {
			return answer
		}
		if time.Now().After(deadline) {
			t.Fatalf("asking %s by %s: %v", server, network, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func askOnce(network string, server netip.AddrPort, m []byte, deadline time.Time) ([]byte, error) {
	c, err := net.Dial(network, server.String())
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(deadline)
	if network == "tcp" {
		m = withLength(m)
	}
	if _, err := c.Write(m); err != nil {
		return nil, err
	}
	if network == "tcp" {
		return readTCP(c)
	}
	b := make([]byte, dnsUDPMax+1)
	n, err := c.Read(b)
	return b[:n], err
}

// show is a message in short: id, code and addresses.
func show(t *testing.T, m []byte) string {
	t.Helper()
	var p dnsmessage.Message
	if err := p.Unpack(m); err != nil {
		t.Fatalf("answer of %d bytes: %v", len(m), err)
	}
	s := fmt.Sprintf("%d %s", p.ID, strings.TrimPrefix(p.RCode.String(), "RCode"))
	if !p.Response {
		s += " no response"
	}
	if p.Truncated {
		s += " truncated"
	}
	for _, a := range p.Answers {
		s += " " + strings.Trim(fmt.Sprint(a.Body.(*dnsmessage.AResource).A), "[]")
	}
	return s
}

func TestResolver(t *testing.T) {
	silent := func(string, uint16) [][]byte { return nil }
	closed := netip.MustParseAddrPort("127.0.0.1:1")
	for _, c := range []struct {
		name    string
		servers func(t *testing.T) []netip.AddrPort
		want    string
	}{
		{"answered", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{answering(t, 0, [4]byte{203, 0, 113, 7})}
		}, "4711 Success 203 0 113 7"},
		{"no such name", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{answering(t, dnsmessage.RCodeNameError)}
		}, "4711 NameError"},
		{"first closed", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{closed, answering(t, 0, [4]byte{2})}
		}, "4711 Success 2 0 0 0"},
		{"first silent", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{upstream(t, silent), answering(t, 0, [4]byte{2})}
		}, "4711 Success 2 0 0 0"},
		{"first unable", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{answering(t, dnsmessage.RCodeServerFailure), answering(t, 0, [4]byte{2})}
		}, "4711 Success 2 0 0 0"},
		{"all unable", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{answering(t, dnsmessage.RCodeRefused)}
		}, "4711 Refused"},
		{"all closed", func(*testing.T) []netip.AddrPort { return []netip.AddrPort{closed} }, "4711 ServerFailure"},
		{"forged before", func(t *testing.T) []netip.AddrPort {
			return []netip.AddrPort{upstream(t, func(_ string, id uint16) [][]byte {
				yes := dnsmessage.Header{ID: id, Response: true}
				return [][]byte{
					{1, 2, 3},
					message(t, dnsmessage.Header{ID: id + 1, Response: true}, "example.org.", dnsmessage.TypeA, [4]byte{6}),
					message(t, dnsmessage.Header{ID: id}, "example.org.", dnsmessage.TypeA, [4]byte{6}),
					message(t, yes, "example.com.", dnsmessage.TypeA, [4]byte{6}),
					message(t, yes, "example.org.", dnsmessage.TypeAAAA, [4]byte{6}),
					message(t, yes, "example.org.", dnsmessage.TypeA, [4]byte{7}),
				}
			})}
		}, "4711 Success 7 0 0 0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			addAddress(t, "10.83.0.1/32")
			listen := netip.MustParseAddrPort("10.83.0.1:53")
			r := NewResolver(c.servers(t), slog.New(slog.DiscardHandler))
			serve(t, r, listen)
			m := message(t, dnsmessage.Header{ID: 4711, RecursionDesired: true}, "example.org.", dnsmessage.TypeA)
			for _, network := range []string{"tcp", "udp"} { // tcp first: its dial tells when the resolver listens
				if got := show(t, ask(t, network, listen, m)); got != c.want {
					t.Errorf("by %s: %s, want %s", network, got, c.want)
				}
			}
			if got, want := r.Counters(), uint64(2); got.Answered+got.Failed != want {
				t.Errorf("%+v, want %d answered or failed", got, want)
			}
		})
	}
}

// TestResolverBeforeItsAddresses: the device gets its addresses in its own time.
func TestResolverBeforeItsAddresses(t *testing.T) {
	listen := []netip.AddrPort{netip.MustParseAddrPort("10.83.0.1:53"), netip.MustParseAddrPort("[fd01:2:3::1]:53")}
	r := NewResolver([]netip.AddrPort{answering(t, 0, [4]byte{5})}, slog.New(slog.DiscardHandler))
	serve(t, r, listen...)
	for deadline := time.Now().Add(testWait); ; time.Sleep(time.Millisecond) {
		sockets, err := os.ReadFile("/proc/self/net/tcp6")
		must(t, err)
		if strings.Contains(string(sockets), ":0035 ") { // the last to be opened
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the resolver does not listen while its addresses are missing")
		}
	}
	addAddress(t, "10.83.0.1/32")
	addAddress(t, "fd01:2:3::1/128")
	for i, l := range listen {
		for _, network := range []string{"tcp", "udp"} {
			m := message(t, dnsmessage.Header{ID: uint16(i)}, "example.org.", dnsmessage.TypeA)
			if got, want := show(t, ask(t, network, l, m)), fmt.Sprintf("%d Success 5 0 0 0", i); got != want {
				t.Errorf("%s by %s: %s, want %s", l, network, got, want)
			}
		}
	}
	if err := r.Serve(t.Context(), listen[0]); err == nil || !strings.Contains(err.Error(), "10.83.0.1:53") {
		t.Errorf("the address is taken: %v", err)
	}
}

func TestResolverLongAnswers(t *testing.T) {
	addAddress(t, "10.83.0.1/32")
	listen := netip.MustParseAddrPort("10.83.0.1:53")
	many := make([][4]byte, 400)
	r := NewResolver([]netip.AddrPort{answering(t, 0, many...)}, slog.New(slog.DiscardHandler))
	serve(t, r, listen)
	m := message(t, dnsmessage.Header{ID: 9}, "example.org.", dnsmessage.TypeA)
	if got := show(t, ask(t, "tcp", listen, m)); strings.Count(got, "0 0 0 0") != len(many) {
		t.Errorf("by TCP: %s", got)
	}
	if got := show(t, ask(t, "udp", listen, m)); got != "9 Success truncated" {
		t.Errorf("by UDP: %s, want it truncated", got)
	}
}

// TestResolverLimits: one router cannot keep the others from resolving.
func TestResolverLimits(t *testing.T) {
	addAddress(t, "10.83.0.1/32")
	listen := netip.MustParseAddrPort("10.83.0.1:53")
	r := NewResolver([]netip.AddrPort{answering(t, 0, [4]byte{5})}, slog.New(slog.DiscardHandler))
	serve(t, r, listen)
	m := message(t, dnsmessage.Header{ID: 9}, "example.org.", dnsmessage.TypeA)
	ask(t, "tcp", listen, m)
	busy := listen.Addr() // whence a client of this machine asks
	for range resolverMaxSource {
		r.queries.enter(busy)
	}
	if _, err := askOnce("tcp", listen, m, time.Now().Add(testWait)); err == nil {
		t.Error("a source at its limit got an answer")
	}
	if got := r.Counters().Dropped; got != 1 {
		t.Errorf("%d dropped, want 1", got)
	}
	other := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}
	c, err := other.Dial("tcp", listen.String())
	must(t, err)
	defer func() { _ = c.Close() }()
	_, err = c.Write(withLength(m))
	must(t, err)
	if _, err := readTCP(c); err != nil {
		t.Errorf("another source: %v", err)
	}
}

func TestLimiter(t *testing.T) {
	l := newLimiter[string](3, 2)
	for i, want := range []struct {
		key string
		ok  bool
	}{{"a", true}, {"a", true}, {"a", false}, {"b", true}, {"c", false}} {
		if got := l.enter(want.key); got != want.ok {
			t.Errorf("%d: enter(%s) = %v", i, want.key, got)
		}
	}
	l.leave("a")
	if !l.enter("c") || l.enter("d") {
		t.Error("one place was free")
	}
	for _, key := range []string{"a", "b", "c"} {
		l.leave(key)
	}
	if l.all != 0 || len(l.by) != 0 {
		t.Errorf("left over: %d, %v", l.all, l.by)
	}
}

func TestParseQuery(t *testing.T) {
	good := message(t, dnsmessage.Header{ID: 1}, "example.org.", dnsmessage.TypeA)
	change := func(at int, b byte) []byte {
		m := bytes.Clone(good)
		m[at] = b
		return m
	}
	for name, c := range map[string]struct {
		message []byte
		code    dnsmessage.RCode
		ok      bool
	}{
		"good":          {good, dnsmessage.RCodeSuccess, true},
		"empty":         {nil, 0, false},
		"short":         {good[:11], 0, false},
		"a response":    {message(t, dnsmessage.Header{Response: true}, "example.org.", dnsmessage.TypeA), 0, false},
		"update":        {message(t, dnsmessage.Header{OpCode: 5}, "example.org.", dnsmessage.TypeA), dnsmessage.RCodeNotImplemented, true},
		"no question":   {good[:12], dnsmessage.RCodeFormatError, true},
		"none counted":  {change(5, 0), dnsmessage.RCodeFormatError, true},
		"two counted":   {change(5, 2), dnsmessage.RCodeFormatError, true},
		"many counted":  {change(4, 255), dnsmessage.RCodeFormatError, true},
		"name too long": {change(12, 63), dnsmessage.RCodeFormatError, true},
		"zone transfer": {message(t, dnsmessage.Header{}, "example.org.", dnsmessage.TypeAXFR), dnsmessage.RCodeRefused, true},
		"incremental":   {message(t, dnsmessage.Header{}, "example.org.", 251), dnsmessage.RCodeRefused, true},
	} {
		q, code, ok := parseQuery(c.message)
		if code != c.code || ok != c.ok {
			t.Errorf("%s: %v %v, want %v %v", name, code, ok, c.code, c.ok)
		}
		if ok {
			if got, want := show(t, q.reply(code, false)), fmt.Sprintf("%d %s", q.header.ID, strings.TrimPrefix(code.String(), "RCode")); got != want {
				t.Errorf("%s: the reply is %s, want %s", name, got, want)
			}
		}
	}
}

func FuzzParseQuery(f *testing.F) {
	f.Add(message(f, dnsmessage.Header{ID: 1}, "example.org.", dnsmessage.TypeA))
	f.Add([]byte("\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"))
	f.Fuzz(func(t *testing.T, m []byte) {
		q, code, ok := parseQuery(m)
		if !ok {
			return
		}
		reply := q.reply(code, true)
		if reply == nil {
			t.Fatalf("no reply to % x", m)
		}
		if _, matches := q.answered(reply, q.header.ID); code == dnsmessage.RCodeSuccess && !matches {
			t.Fatalf("the reply to % x does not match it", m)
		}
	})
}

func TestResolvConf(t *testing.T) {
	for text, want := range map[string]string{
		"nameserver 1.1.1.1\nnameserver 2606:4700::1111 # x\n":                                    "[1.1.1.1:53 [2606:4700::1111]:53]",
		"; comment\n#nameserver 9.9.9.9\nsearch a b\noptions ndots:2\n  nameserver\tfe80::1%eth0": "[[fe80::1%eth0]:53]",
		"nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\nnameserver 1.0.0.4\n":        "[1.0.0.1:53 1.0.0.2:53 1.0.0.3:53]",
		"nameserver\nnameserver nonsense\n":                                                       "[127.0.0.1:53]",
		"":                                                                                        "[127.0.0.1:53]",
	} {
		if got := fmt.Sprint(parseResolvConf(strings.NewReader(text))); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}

	f := resolvConf{path: filepath.Join(t.TempDir(), "resolv.conf")}
	check := func(want string) {
		t.Helper()
		f.looked = time.Time{}
		if got := fmt.Sprint(f.servers()); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	check("[127.0.0.1:53]")
	must(t, os.WriteFile(f.path, []byte("nameserver 1.1.1.1"), 0o600))
	check("[1.1.1.1:53]")
	must(t, os.WriteFile(f.path+".new", []byte("nameserver 9.9.9.9"), 0o600))
	must(t, os.Rename(f.path+".new", f.path)) // as resolvconf programs do
	check("[9.9.9.9:53]")
	must(t, os.Remove(f.path))
	check("[9.9.9.9:53]") // better than none
}
