package egress

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
)

func TestPolicy(t *testing.T) {
	own := map[netip.Addr]struct{}{netip.MustParseAddr("198.51.100.1"): {}, netip.MustParseAddr("2001:db8::1"): {}}
	for _, c := range []struct {
		destination string
		allowed     string
		refused     bool
	}{
		{"203.0.113.7", "", false},
		{"1.1.1.1", "", false},
		{"2606:4700::1111", "", false},
		{"198.51.100.1", "", true},
		{"2001:db8::1", "", true},
		{"::ffff:198.51.100.1", "", true},
		{"10.0.0.1", "", true},
		{"10.0.0.1", "10.0.0.0/24", false},
		{"10.0.1.1", "10.0.0.0/24", true},
		{"172.31.255.255", "", true},
		{"172.32.0.0", "", false},
		{"192.168.1.1", "", true},
		{"100.64.0.1", "", true},
		{"100.128.0.1", "", false},
		{"127.0.0.1", "", true},
		{"0.0.0.0", "", true},
		{"169.254.169.254", "", true},
		{"168.63.129.16", "", true},
		{"192.0.0.192", "", true},
		{"224.0.0.1", "", true},
		{"255.255.255.255", "", true},
		{"::", "", true},
		{"::1", "", true},
		{"::1", "::1/128", false},
		{"::ffff:127.0.0.1", "", true},
		{"::127.0.0.1", "", true},
		{"fd00:ec2::254", "", true},
		{"fe80::1%eth0", "", true},
		{"ff02::1", "", true},
		{"64:ff9b::a00:1", "", true},    // 10.0.0.1 through NAT64
		{"64:ff9b::101:101", "", false}, // 1.1.1.1 through NAT64
		{"2002:a9fe:a9fe::1", "", true}, // 169.254.169.254 through 6to4
		{"2002:101:101::1", "", false},  // 1.1.1.1 through 6to4
		{"198.51.100.1", "0.0.0.0/0", false},
	} {
		p := Policy{}
		if c.allowed != "" {
			p.Allowed = []netip.Prefix{netip.MustParsePrefix(c.allowed)}
		}
		err := p.Check(netip.MustParseAddr(c.destination), own)
		var forbidden *ForbiddenError
		if errors.As(err, &forbidden) != c.refused {
			t.Errorf("%s with %q allowed: %v, refused should be %v", c.destination, c.allowed, err, c.refused)
		}
	}
}

// TestSuspect compares the short cut with what it spares, over all first bytes
// of an address.
func TestSuspect(t *testing.T) {
	contained := func(a netip.Addr) bool {
		for _, r := range refused {
			if r.prefix.Contains(a) {
				return true
			}
		}
		return false
	}
	found := 0
	for i := range 1 << 16 {
		hi, lo := byte(i>>8), byte(i)
		for _, a := range []netip.Addr{netip.AddrFrom4([4]byte{hi, lo, 129, 16}), netip.AddrFrom16([16]byte{hi, lo})} {
			if contained(a) {
				found++
				if !isSuspect(a) {
					t.Fatalf("%s is refused but not suspect", a)
				}
			}
		}
	}
	if found < 1000 || isSuspect(netip.MustParseAddr("203.0.113.7")) || isSuspect(netip.MustParseAddr("2606:4700::1111")) {
		t.Errorf("%d refused addresses found; ordinary ones must not be suspect", found)
	}
}

func TestDialer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	destination := l.Addr().(*net.TCPAddr).AddrPort()
	closed := NewDialer(Policy{})
	if _, _, err := closed.Dial(context.Background(), "home", destination); Classify(err) != Forbidden {
		t.Errorf("loopback: %v", err)
	}
	d := NewDialer(Policy{Allowed: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}})
	c, done, err := d.Dial(context.Background(), "home", destination)
	if err != nil {
		t.Fatal(err)
	}
	if d.flows.by["home"] != 1 {
		t.Errorf("%d flows counted, want 1", d.flows.by["home"])
	}
	_ = c.Close()
	done()
	_ = l.Close()
	if _, _, err := d.Dial(context.Background(), "home", destination); Classify(err) != Refused {
		t.Errorf("nobody listens: %v", err)
	}
	if _, _, err := d.Dial(context.Background(), "home", netip.AddrPortFrom(destination.Addr(), 0)); Classify(err) != Forbidden {
		t.Errorf("port 0: %v", err)
	}
	d.flows.by["busy"] = MaxFlows
	if _, _, err := d.Dial(context.Background(), "busy", destination); Classify(err) != Limited {
		t.Errorf("at the limit: %v", err)
	}
	if len(d.flows.by) != 1 {
		t.Errorf("flows left over: %v", d.flows.by)
	}
}
