package tunnel

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"
)

// PublicKey is the Ed25519 key by which one end knows the other. It is
// comparable, so that it can index a map.
type PublicKey [ed25519.PublicKeySize]byte

// Fingerprint is the SHA-256 of the key, in the notation of OpenSSH.
func (k PublicKey) Fingerprint() string {
	sum := sha256.Sum256(k[:])
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// Identity is one end's Ed25519 key, and the certificate that wraps it for TLS.
type Identity struct {
	private     ed25519.PrivateKey
	certificate tls.Certificate

	// A configuration is the same for every flow session, of which there are
	// thousands.
	mu     sync.Mutex
	pinned PublicKey
	client *tls.Config
}

// NewIdentity makes a fresh key.
func NewIdentity() (*Identity, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return LoadIdentity(private.Seed())
}

// LoadIdentity restores an identity from what Seed returned.
func LoadIdentity(seed []byte) (*Identity, error) {
	if len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("identity key: %d bytes, want %d", len(seed), ed25519.SeedSize)
	}
	private := ed25519.NewKeyFromSeed(seed)
	// The peer checks the key alone. The dates span all time, because a router
	// without a clock battery begins in 1970.
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "sheaf"},
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, fmt.Errorf("wrapping the identity key in a certificate: %w", err)
	}
	return &Identity{
		private:     private,
		certificate: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private},
	}, nil
}

// Seed is the 32 bytes to be kept secret and stored.
func (id *Identity) Seed() []byte { return id.private.Seed() }

// PublicKey is what the other end knows this one by.
func (id *Identity) PublicKey() PublicKey {
	return PublicKey(id.private.Public().(ed25519.PublicKey))
}

// The ALPN protocols, over TCP and over QUIC, keep other TLS clients and servers
// from getting as far as frames.
const (
	alpn        = "sheaf"
	alpnPackets = "sheaf-packets"
)

// KeyMismatchError says that the concentrator is not the one that was enrolled
// with: its key differs.
type KeyMismatchError struct{ Want, Got PublicKey }

func (e *KeyMismatchError) Error() string {
	return fmt.Sprintf("the server is not the concentrator of the token: its key is %s, expected %s; check the address, or enrol with a new token",
		e.Got.Fingerprint(), e.Want.Fingerprint())
}

func (id *Identity) base(protocol string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{id.certificate},
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{protocol},
		// Sessions are long-lived and pooled: resuming would save nothing, and
		// tickets would cost memory.
		SessionTicketsDisabled: true,
		// relay.go sizes the records.
		DynamicRecordSizingDisabled: true,
	}
}

// flowConfig is the clientConfig of the sessions for flows.
func (id *Identity) flowConfig(pinned PublicKey) *tls.Config {
	id.mu.Lock()
	defer id.mu.Unlock()
	if id.client == nil || id.pinned != pinned {
		id.pinned, id.client = pinned, id.clientConfig(pinned, alpn)
	}
	return id.client
}

// clientConfig accepts exactly the concentrator with the pinned key.
func (id *Identity) clientConfig(pinned PublicKey, protocol string) *tls.Config {
	c := id.base(protocol)
	c.InsecureSkipVerify = true // no certificate authority: VerifyConnection checks the pinned key
	c.VerifyConnection = func(state tls.ConnectionState) error {
		key, err := peerKey(state, protocol)
		if err != nil {
			return err
		}
		if key != pinned {
			return &KeyMismatchError{Want: pinned, Got: key}
		}
		return nil
	}
	return c
}

// serverConfig accepts any Ed25519 key: whether it is enrolled decides the
// first message, because enrolment itself comes from a key not yet known.
func (id *Identity) serverConfig(protocol string) *tls.Config {
	c := id.base(protocol)
	c.ClientAuth = tls.RequireAnyClientCert
	c.VerifyConnection = func(state tls.ConnectionState) error {
		_, err := peerKey(state, protocol)
		return err
	}
	return c
}

func peerKey(state tls.ConnectionState, protocol string) (PublicKey, error) {
	if len(state.PeerCertificates) == 0 {
		return PublicKey{}, errors.New("the peer sent no key")
	}
	if state.NegotiatedProtocol != protocol {
		return PublicKey{}, fmt.Errorf("the peer does not speak the tunnel protocol (ALPN %q, want %q)", state.NegotiatedProtocol, protocol)
	}
	key, ok := state.PeerCertificates[0].PublicKey.(ed25519.PublicKey)
	if !ok {
		return PublicKey{}, fmt.Errorf("the peer's key is a %T, want Ed25519", state.PeerCertificates[0].PublicKey)
	}
	return PublicKey(key), nil
}
