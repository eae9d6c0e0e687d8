package tunnel

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// Token is all a router needs to enrol with a concentrator, once.
type Token struct {
	// Name is what the concentrator calls the router.
	Name string
	// Addresses are the concentrator's, host:port, in the order to be tried.
	Addresses []string
	// Concentrator is the key to be pinned.
	Concentrator PublicKey
	// Secret is known to the concentrator as its SHA-256 only.
	Secret [16]byte
	// Expires is when the concentrator stops taking the token, to the second.
	Expires time.Time
}

// tokenPrefix tells a person, and a wrong paste, what the text is; its number
// is the version of the encoding.
const tokenPrefix = "sheaf1-"

const (
	maxToken     = 4096 // bytes of text
	maxAddresses = 16
)

// ErrTokenAltered is returned for a token that is cut short or was changed.
var ErrTokenAltered = errors.New("the token is damaged: it was cut short or altered; copy it again, whole")

type tokenBody struct {
	Name      string   `json:"n"`
	Addresses []string `json:"a"`
	Key       []byte   `json:"k"`
	Secret    []byte   `json:"s"`
	Expires   int64    `json:"e"`
}

// String is the token as one line of URL-safe text. Its last bytes are a
// checksum against slips of the hand; what protects it is that the key and the
// secret in it must match the concentrator's.
func (t Token) String() string {
	body, err := json.Marshal(tokenBody{t.Name, t.Addresses, t.Concentrator[:], t.Secret[:], t.Expires.Unix()})
	if err != nil {
		panic(err) // strings, bytes and numbers always marshal
	}
	sum := sha256.Sum256(body)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(body, sum[:6]...))
}

// ParseToken reads what String wrote.
func ParseToken(text string) (Token, error) {
	text = strings.TrimSpace(text)
	if len(text) > maxToken {
		return Token{}, fmt.Errorf("the token is %d bytes long, at most %d: this is not one token", len(text), maxToken)
	}
	encoded, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok {
		return Token{}, fmt.Errorf("not an enrolment token: it must begin with %q; `concentratord token` prints one", tokenPrefix)
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(raw) < 6 {
		return Token{}, ErrTokenAltered
	}
	text = string(raw[:len(raw)-6])
	if sum := sha256.Sum256([]byte(text)); string(sum[:6]) != string(raw[len(raw)-6:]) {
		return Token{}, ErrTokenAltered
	}
	var body tokenBody
	if err := json.Unmarshal([]byte(text), &body); err != nil {
		return Token{}, ErrTokenAltered
	}
	t := Token{Name: body.Name, Addresses: body.Addresses, Expires: time.Unix(body.Expires, 0)}
	if copy(t.Concentrator[:], body.Key) != len(t.Concentrator) || copy(t.Secret[:], body.Secret) != len(t.Secret) {
		return Token{}, ErrTokenAltered
	}
	if err := CheckName(t.Name); err != nil {
		return Token{}, fmt.Errorf("token: %w", err)
	}
	if err := CheckAddresses(t.Addresses); err != nil {
		return Token{}, fmt.Errorf("token: %w", err)
	}
	return t, nil
}

// CheckName says what is wrong with a router's name, or nil.
func CheckName(name string) error {
	if name == "" || len(name) > 64 {
		return fmt.Errorf("router name %q: want 1 to 64 characters", name)
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("-_.", c) {
			return fmt.Errorf("router name %q: %q is not allowed; use letters, digits, '-', '_' and '.'", name, c)
		}
	}
	return nil
}

// CheckAddresses says what is wrong with a list of concentrator addresses, or
// nil. Each is host:port, the host a name or an IP address.
func CheckAddresses(addresses []string) error {
	if len(addresses) == 0 || len(addresses) > maxAddresses {
		return fmt.Errorf("%d concentrator addresses, want 1 to %d", len(addresses), maxAddresses)
	}
	for _, a := range addresses {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			return fmt.Errorf("concentrator address %q: want HOST:PORT, for example 192.0.2.1:4443 or [2001:db8::1]:4443", a)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("concentrator address %q: the port must be 1 to 65535", a)
		}
		if host == "" || len(host) > 253 || strings.ContainsAny(host, " \t\r\n/") {
			return fmt.Errorf("concentrator address %q: the host is missing or malformed", a)
		}
	}
	return nil
}
