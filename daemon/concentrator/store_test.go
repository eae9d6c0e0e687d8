package concentrator

import (
	"errors"
	"strings"
	"testing"
	"time"

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
