package tunnel

import (
	"strings"
	"testing"
	"time"
)

func exampleToken() Token {
	t := Token{Name: "home", Addresses: []string{"203.0.113.10:4443", "[2001:db8::10]:4443"}, Expires: time.Unix(1_900_000_000, 0)}
	for i := range t.Concentrator {
		t.Concentrator[i] = byte(i)
	}
	for i := range t.Secret {
		t.Secret[i] = byte(200 + i)
	}
	return t
}

func TestTokenComesBack(t *testing.T) {
	want := exampleToken()
	got, err := ParseToken(" " + want.String() + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if got.Name != want.Name || got.Concentrator != want.Concentrator || got.Secret != want.Secret ||
		!got.Expires.Equal(want.Expires) || strings.Join(got.Addresses, " ") != strings.Join(want.Addresses, " ") {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestEveryAlteredTokenIsRefused(t *testing.T) {
	text := exampleToken().String()
	for i := range text {
		for _, c := range []byte{'A', 'B', '_', ' '} {
			altered := text[:i] + string(c) + text[i+1:]
			if altered == text || strings.TrimSpace(altered) == text {
				continue
			}
			if _, err := ParseToken(altered); err == nil {
				t.Fatalf("a token with byte %d altered to %q was taken", i, c)
			}
		}
		if _, err := ParseToken(text[:i]); err == nil {
			t.Fatalf("a token cut to %d bytes was taken", i)
		}
	}
}

func TestTokenRefusals(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", "not an enrolment token"},
		{"something else", "hunter2", `must begin with "sheaf1-"`},
		{"prefix alone", "sheaf1-", "damaged"},
		{"huge", "sheaf1-" + strings.Repeat("A", 5000), "at most 4096"},
		{"no name", func() string { t := exampleToken(); t.Name = ""; return t.String() }(), "router name"},
		{"bad name", func() string { t := exampleToken(); t.Name = "a b"; return t.String() }(), "not allowed"},
		{"no address", func() string { t := exampleToken(); t.Addresses = nil; return t.String() }(), "0 concentrator addresses"},
		{"no port", func() string { t := exampleToken(); t.Addresses = []string{"192.0.2.1"}; return t.String() }(), "want HOST:PORT"},
		{"port 0", func() string { t := exampleToken(); t.Addresses = []string{"192.0.2.1:0"}; return t.String() }(), "1 to 65535"},
	} {
		if _, err := ParseToken(c.text); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}
