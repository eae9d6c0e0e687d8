package concentrator

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"sheaf/daemon/datapath/tunnel"
)

func openStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func routerKey(t *testing.T) tunnel.PublicKey {
	t.Helper()
	id, err := tunnel.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return id.PublicKey()
}

var where = []string{"203.0.113.10:4443"}

func code(err error) string {
	var refused *tunnel.RefusedError
	if errors.As(err, &refused) {
		return refused.Code
	}
	return ""
}

func TestTokenEnrolsOnce(t *testing.T) {
	s := openStore(t, t.TempDir())
	defer func() { _ = s.Close() }()
	now := time.Unix(1_800_000_000, 0)
	s.now = func() time.Time { return now }
	token, err := s.CreateToken("home", where, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	mine, other := routerKey(t), routerKey(t)
	if _, err := s.Enrol([]byte("no such secret"), mine); code(err) != tunnel.CodeTokenUnknown {
		t.Errorf("unknown secret: %v", err)
	}
	for range 2 { // the second time as if the answer had been lost
		if name, err := s.Enrol(token.Secret[:], mine); name != "home" || err != nil {
			t.Fatalf("Enrol = %q, %v", name, err)
		}
	}
	if _, err := s.Enrol(token.Secret[:], other); code(err) != tunnel.CodeTokenUsed {
		t.Errorf("another router with a used token: %v", err)
	}
	if _, err := s.CreateToken("home", where, time.Hour); err == nil {
		t.Error("a token was made for a name that is enrolled")
	}
	if key, err := s.Remove("home"); key != mine || err != nil {
		t.Errorf("Remove = %v, %v", key, err)
	}
	if _, ok := s.Router(mine); ok {
		t.Error("a removed router is still known")
	}
	if _, err := s.Enrol(token.Secret[:], mine); code(err) != tunnel.CodeTokenUsed {
		t.Errorf("a removed router came back with its old token: %v", err)
	}
	if _, err := s.Remove("home"); !errors.Is(err, ErrNoRouter) {
		t.Errorf("removing nobody: %v", err)
	}

	late, err := s.CreateToken("late", where, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Hour + time.Second)
	if _, err := s.Enrol(late.Secret[:], other); code(err) != tunnel.CodeTokenExpired {
		t.Errorf("expired token: %v", err)
	}
}

func TestStateSurvivesReopening(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	if _, err := OpenStore(dir); !errors.Is(err, ErrInUse) {
		t.Errorf("opening twice: %v, want ErrInUse", err)
	}
	identity := s.Identity().PublicKey()
	token, err := s.CreateToken("home", where, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	unused, err := s.CreateToken("cabin", where, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	key := routerKey(t)
	if _, err := s.Enrol(token.Secret[:], key); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = openStore(t, dir)
	defer func() { _ = s.Close() }()
	if s.Identity().PublicKey() != identity {
		t.Error("the concentrator's key changed: every router would be locked out")
	}
	if name, ok := s.Router(key); name != "home" || !ok {
		t.Errorf("the enrolled router is %q, %v", name, ok)
	}
	if _, err := s.Enrol(token.Secret[:], routerKey(t)); code(err) != tunnel.CodeTokenUsed {
		t.Errorf("the used token: %v", err)
	}
	if name, err := s.Enrol(unused.Secret[:], routerKey(t)); name != "cabin" || err != nil {
		t.Errorf("the unused token: %q, %v", name, err)
	}
}

// enrol enrols a new router.
func enrol(t *testing.T, s *Store, name string) tunnel.PublicKey {
	t.Helper()
	token, err := s.CreateToken(name, where, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	key := routerKey(t)
	if _, err := s.Enrol(token.Secret[:], key); err != nil {
		t.Fatal(err)
	}
	return key
}

func TestSubnetsAreStable(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	check := func(key tunnel.PublicKey, want uint16) {
		t.Helper()
		if got, ok := s.Inner(key); got != want || ok != (want != 0) {
			t.Errorf("subnet %d, %v; want %d", got, ok, want)
		}
	}
	a, b, c := enrol(t, s, "a"), enrol(t, s, "b"), enrol(t, s, "c")
	check(a, 1)
	check(b, 2)
	check(c, 3)
	check(routerKey(t), 0)

	// The same router with another token keeps its subnet.
	again, err := s.CreateToken("a2", where, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Enrol(again.Secret[:], a); err != nil {
		t.Fatal(err)
	}
	check(a, 1)

	if _, err := s.Remove("b"); err != nil {
		t.Fatal(err)
	}
	check(b, 0)
	check(c, 3)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir)
	defer func() { _ = s.Close() }()
	check(a, 1)
	check(c, 3)
	check(enrol(t, s, "d"), 2)
	check(enrol(t, s, "e"), 4)
}

// TestSubnetsOfAnOlderStore: what an older version wrote gets numbers that are
// stored when the store is opened.
func TestSubnetsOfAnOlderStore(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	now := time.Unix(1_800_000_000, 0)
	s.now = func() time.Time { return now }
	var keys []tunnel.PublicKey
	for _, name := range []string{"first", "second", "third"} {
		keys = append(keys, enrol(t, s, name))
		now = now.Add(time.Minute)
	}
	err := s.db.Update(func(tx *bbolt.Tx) error {
		for i, name := range []string{"first", "second", "third"} {
			record := fmt.Sprintf(`{"name":%q,"enrolled":"2026-01-0%dT00:00:00Z"}`, name, i+1)
			if name == "third" { // the only one of this version
				record = `{"name":"third","enrolled":"2026-01-03T00:00:00Z","subnet":1}`
			}
			if err := tx.Bucket(bucketRouters).Put(keys[i][:], []byte(record)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	s = openStore(t, dir)
	for i, want := range []uint16{2, 3, 1} {
		if got, ok := s.Inner(keys[i]); got != want || !ok {
			t.Errorf("router %d: subnet %d, %v; want %d", i, got, ok, want)
		}
	}
	// Had they not been stored, the second would get the first one's now.
	if _, err := s.Remove("first"); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	s = openStore(t, dir)
	defer func() { _ = s.Close() }()
	if got, ok := s.Inner(keys[1]); got != 3 || !ok {
		t.Errorf("opened again: subnet %d, %v; want 3", got, ok)
	}
}

func TestSubnetsRunOut(t *testing.T) {
	s := openStore(t, t.TempDir())
	defer func() { _ = s.Close() }()
	token, err := s.CreateToken("late", where, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for i := range maxSubnet {
		s.routers[tunnel.PublicKey{byte(i), byte(i >> 8)}] = routerRecord{Name: fmt.Sprint(i), Subnet: uint16(i + 1)}
	}
	key := routerKey(t)
	if _, err := s.Enrol(token.Secret[:], key); err == nil || !strings.Contains(err.Error(), "65533 routers are enrolled") {
		t.Errorf("one more router than addresses: %v", err)
	}
	delete(s.routers, tunnel.PublicKey{byte(7), 0})
	if _, err := s.Enrol(token.Secret[:], key); err != nil { // and the token was not used up
		t.Errorf("after one has gone: %v", err)
	}
	if got, _ := s.Inner(key); got != 8 {
		t.Errorf("subnet %d, want the one that became free", got)
	}
}

func TestInnerAddresses(t *testing.T) {
	key := tunnel.PublicKey{1, 2, 3}
	sum := sha256.Sum256(key[:])
	ula := fmt.Sprintf("fd%02x:%02x%02x:%02x%02x", sum[0], sum[1], sum[2], sum[3], sum[4])
	for _, c := range []struct {
		got  netip.Addr
		want string
	}{
		{Gateway4(), "10.83.0.1"},
		{address4(1), "10.83.0.2"},
		{address4(255), "10.83.1.0"},
		{address4(maxSubnet), "10.83.255.254"},
		{network6(key).Addr(), ula + "::"},
		{address6(key, 0), ula + "::1"},
		{address6(key, 1), ula + ":1::1"},
		{address6(key, maxSubnet), ula + ":fffd::1"},
	} {
		if c.got != netip.MustParseAddr(c.want) {
			t.Errorf("%s, want %s", c.got, c.want)
		}
	}

	s := openStore(t, t.TempDir())
	defer func() { _ = s.Close() }()
	router := enrol(t, s, "home")
	ipv4, ipv6, err := s.InnerAddresses(router)
	mine := s.Identity().PublicKey()
	if ipv4 != address4(1) || ipv6 != address6(mine, 1) || err != nil {
		t.Errorf("%s, %s, %v", ipv4, ipv6, err)
	}
	if s.Network6() != netip.PrefixFrom(network6(mine).Addr(), 48) || s.Gateway6() != address6(mine, 0) ||
		!s.Network6().Contains(ipv6) || !Network4().Contains(ipv4) || !Network4().Contains(Gateway4()) {
		t.Errorf("networks %s and %s, gateways %s and %s", Network4(), s.Network6(), Gateway4(), s.Gateway6())
	}
	if _, _, err := s.InnerAddresses(routerKey(t)); !errors.Is(err, ErrNoRouter) {
		t.Errorf("a stranger: %v, want ErrNoRouter", err)
	}
}

func TestSysctlsBefore(t *testing.T) {
	s := openStore(t, t.TempDir())
	defer func() { _ = s.Close() }()
	check := func(want map[string]string) {
		t.Helper()
		if got, err := s.sysctlsBefore(); err != nil || !maps.Equal(got, want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	}
	set := func(values map[string]string) {
		t.Helper()
		if err := s.setSysctlsBefore(values); err != nil {
			t.Fatal(err)
		}
	}
	const ip4, ip6 = "net/ipv4/conf/all/forwarding", "net/ipv6/conf/all/forwarding"
	check(nil)
	set(map[string]string{ip4: "0"})
	set(map[string]string{ip4: "1", ip6: "0"}) // by a daemon after one that was killed
	check(map[string]string{ip4: "0", ip6: "0"})
	set(nil)
	check(nil)
	set(map[string]string{ip4: "1"})
	check(map[string]string{ip4: "1"})
}

func TestTokensRefused(t *testing.T) {
	s := openStore(t, t.TempDir())
	defer func() { _ = s.Close() }()
	for _, c := range []struct {
		name      string
		addresses []string
		validity  time.Duration
		want      string
	}{
		{"", where, time.Hour, "router name"},
		{"a/b", where, time.Hour, "not allowed"},
		{"home", nil, time.Hour, "0 concentrator addresses"},
		{"home", []string{"203.0.113.10"}, time.Hour, "HOST:PORT"},
		{"home", where, 0, "valid for up to"},
		{"home", where, 1000 * time.Hour, "valid for up to"},
	} {
		_, err := s.CreateToken(c.name, c.addresses, c.validity)
		var refusal *TokenError
		if !errors.As(err, &refusal) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q %v %v: %v, want %q", c.name, c.addresses, c.validity, err, c.want)
		}
	}
}
