package concentrator

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"

	"sheaf/daemon/datapath/tunnel"
)

// schema is the version of what the buckets hold.
const schema = "1"

const (
	// DefaultValidity is how long a token can be used unless said otherwise.
	DefaultValidity = 24 * time.Hour
	maxValidity     = 30 * 24 * time.Hour
	maxTokens       = 10000
	// keepTokens is how long a token that can no longer be used is remembered,
	// so that its holder hears "used" or "expired" and not "unknown".
	keepTokens = 30 * 24 * time.Hour
)

var (
	bucketMeta    = []byte("meta")
	bucketTokens  = []byte("tokens")  // SHA-256 of the secret → tokenRecord
	bucketRouters = []byte("routers") // Ed25519 public key → routerRecord

	keySchema  = []byte("schema")
	keySeed    = []byte("identity")
	keyLimits  = []byte("limits-before")
	keySysctls = []byte("sysctls-before")
)

// maxSubnet is the last router's number. Its IPv4 address is the last but the
// broadcast address of the network.
const maxSubnet = 1<<16 - 3

var network4 = netip.MustParsePrefix("10.83.0.0/16")

// Network4 is the network of all inner IPv4 addresses.
func Network4() netip.Prefix { return network4 }

// Gateway4 is the concentrator's inner IPv4 address.
func Gateway4() netip.Addr { return address4(0) }

// address4 is the inner IPv4 address of the router with a subnet number.
func address4(subnet uint16) netip.Addr {
	b := network4.Addr().As4()
	binary.BigEndian.PutUint16(b[2:], subnet+1)
	return netip.AddrFrom4(b)
}

// network6 is the /48 of the concentrator with a key. It is locally assigned
// (RFC 4193 section 3.1), with a global ID that follows from the key instead of
// chance, so that it never changes.
func network6(concentrator tunnel.PublicKey) netip.Prefix {
	sum := sha256.Sum256(concentrator[:])
	var b [16]byte
	b[0] = 0xfd
	copy(b[1:6], sum[:])
	return netip.PrefixFrom(netip.AddrFrom16(b), 48)
}

// address6 is the first address of the /64 with a subnet number.
func address6(concentrator tunnel.PublicKey, subnet uint16) netip.Addr {
	b := network6(concentrator).Addr().As16()
	binary.BigEndian.PutUint16(b[6:], subnet)
	b[15] = 1
	return netip.AddrFrom16(b)
}

type tokenRecord struct {
	Name    string            `json:"name"`
	Expires time.Time         `json:"expires"`
	UsedAt  time.Time         `json:"used_at,omitzero"`
	UsedBy  *tunnel.PublicKey `json:"used_by,omitempty"`
}

type routerRecord struct {
	Name     string    `json:"name"`
	Enrolled time.Time `json:"enrolled"`
	// Subnet is 1 to maxSubnet, and no other router's. It is 0 in what versions
	// without inner addresses wrote.
	Subnet uint16 `json:"subnet,omitzero"`
}

// Enrolled is one router that may use the concentrator.
type Enrolled struct {
	Name     string
	Key      tunnel.PublicKey
	Enrolled time.Time
}

// ErrInUse says that a running daemon has the state.
var ErrInUse = errors.New("another process has the state open")

// Store holds the concentrator's key, the tokens it has given out and the
// routers that have enrolled, in a bbolt file. It is a tunnel.Admission.
type Store struct {
	db       *bbolt.DB
	identity *tunnel.Identity
	now      func() time.Time

	mu      sync.RWMutex
	routers map[tunnel.PublicKey]routerRecord // as in the file
}

// OpenStore opens, or makes, the state in a directory. It returns ErrInUse when
// a daemon runs on it.
func OpenStore(stateDir string) (*Store, error) {
	path := filepath.Join(stateDir, "state.db")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if errors.Is(err, bbolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%s: %w", path, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the state %s: %w", path, err)
	}
	s := &Store{db: db, now: time.Now, routers: map[tunnel.PublicKey]routerRecord{}}
	if err := db.Update(s.load); err != nil {
		_ = db.Close()
		return nil, fmt.Errorf("reading the state %s: %w", path, err)
	}
	return s, nil
}

func (s *Store) load(tx *bbolt.Tx) error {
	for _, name := range [][]byte{bucketMeta, bucketTokens, bucketRouters} {
		if _, err := tx.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	meta := tx.Bucket(bucketMeta)
	switch have := string(meta.Get(keySchema)); have {
	case schema:
	case "":
		if err := meta.Put(keySchema, []byte(schema)); err != nil {
			return err
		}
	default:
		return fmt.Errorf("it was written by a newer version (schema %s, this one knows %s): install that version again", have, schema)
	}
	var err error
	if seed := meta.Get(keySeed); seed != nil {
		s.identity, err = tunnel.LoadIdentity(slices.Clone(seed))
	} else if s.identity, err = tunnel.NewIdentity(); err == nil {
		err = meta.Put(keySeed, s.identity.Seed())
	}
	if err != nil {
		return err
	}
	err = tx.Bucket(bucketRouters).ForEach(func(k, v []byte) error {
		var r routerRecord
		if err := json.Unmarshal(v, &r); err != nil || len(k) != len(tunnel.PublicKey{}) {
			return fmt.Errorf("router record %x is damaged: %w", k, err)
		}
		s.routers[tunnel.PublicKey(k)] = r
		return nil
	})
	if err != nil {
		return err
	}
	return s.numberOldRouters(tx)
}

// numberOldRouters gives a subnet to the routers that enrolled before there were
// any, the oldest first.
func (s *Store) numberOldRouters(tx *bbolt.Tx) error {
	var old []Enrolled
	for key, r := range s.routers {
		if r.Subnet == 0 {
			old = append(old, Enrolled{r.Name, key, r.Enrolled})
		}
	}
	slices.SortFunc(old, func(a, b Enrolled) int { return a.Enrolled.Compare(b.Enrolled) })
	for _, e := range old {
		r := s.routers[e.Key]
		var err error
		if r.Subnet, err = s.freeSubnet(); err == nil {
			err = putJSON(tx.Bucket(bucketRouters), e.Key[:], r)
		}
		if err != nil {
			return err
		}
		s.routers[e.Key] = r
	}
	return nil
}

// freeSubnet returns the lowest number that no router has.
func (s *Store) freeSubnet() (uint16, error) {
	used := make([]bool, maxSubnet+1)
	for _, r := range s.routers {
		if int(r.Subnet) < len(used) {
			used[r.Subnet] = true
		}
	}
	if i := slices.Index(used[1:], false); i >= 0 {
		return uint16(i + 1), nil
	}
	return 0, fmt.Errorf("%d routers are enrolled, the most that there are inner addresses for; remove one with `concentratord routers remove`", maxSubnet)
}

// Network6 is the /48 of all inner IPv6 addresses.
func (s *Store) Network6() netip.Prefix { return network6(s.identity.PublicKey()) }

// Gateway6 is the concentrator's inner IPv6 address.
func (s *Store) Gateway6() netip.Addr { return address6(s.identity.PublicKey(), 0) }

// InnerAddresses returns the inner addresses of an enrolled router. They stay
// the router's until it is removed. The error is ErrNoRouter.
func (s *Store) InnerAddresses(key tunnel.PublicKey) (ipv4, ipv6 netip.Addr, err error) {
	subnet, ok := s.Inner(key)
	if !ok {
		return ipv4, ipv6, fmt.Errorf("%w: key %s is not enrolled", ErrNoRouter, key.Fingerprint())
	}
	return address4(subnet), address6(s.identity.PublicKey(), subnet), nil
}

// Inner returns the subnet number of an enrolled router, from which its inner
// addresses follow.
func (s *Store) Inner(key tunnel.PublicKey) (subnet uint16, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, ok := s.routers[key]
	return r.Subnet, ok
}

// Close releases the file.
func (s *Store) Close() error { return s.db.Close() }

// Identity is the concentrator's own key, which tokens pin.
func (s *Store) Identity() *tunnel.Identity { return s.identity }

// TokenError says why a token cannot be made as asked.
type TokenError struct {
	Reason string
	Taken  bool // the name belongs to an enrolled router
}

func (e *TokenError) Error() string { return e.Reason }

// CreateToken makes a token that enrols one router, once. The error is a
// *TokenError when it is about the arguments.
func (s *Store) CreateToken(name string, addresses []string, validity time.Duration) (tunnel.Token, error) {
	if err := errors.Join(tunnel.CheckName(name), tunnel.CheckAddresses(addresses)); err != nil {
		return tunnel.Token{}, &TokenError{Reason: err.Error()}
	}
	if validity < time.Second || validity > maxValidity {
		return tunnel.Token{}, &TokenError{Reason: fmt.Sprintf("a token can be valid for up to %v, not %v", maxValidity, validity)}
	}
	s.mu.RLock()
	_, taken := s.byName(name)
	s.mu.RUnlock()
	if taken {
		return tunnel.Token{}, &TokenError{Taken: true, Reason: fmt.Sprintf(
			"a router named %q is enrolled already; remove it first with `concentratord routers remove %s`", name, name)}
	}
	now := s.now()
	t := tunnel.Token{Name: name, Addresses: addresses, Concentrator: s.identity.PublicKey(), Expires: now.Add(validity).Truncate(time.Second)}
	if _, err := rand.Read(t.Secret[:]); err != nil {
		return tunnel.Token{}, err
	}
	return t, s.db.Update(func(tx *bbolt.Tx) error {
		tokens := tx.Bucket(bucketTokens)
		kept := 0
		var old [][]byte
		err := tokens.ForEach(func(k, v []byte) error {
			var r tokenRecord
			if json.Unmarshal(v, &r) != nil || now.Sub(r.Expires) > keepTokens {
				old = append(old, slices.Clone(k))
			} else {
				kept++
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, k := range old {
			if err := tokens.Delete(k); err != nil {
				return err
			}
		}
		if kept >= maxTokens {
			return fmt.Errorf("%d tokens are remembered, the most allowed; wait for some to expire", kept)
		}
		return putJSON(tokens, digest(t.Secret[:]), tokenRecord{Name: name, Expires: t.Expires})
	})
}

func digest(secret []byte) []byte {
	sum := sha256.Sum256(secret)
	return sum[:]
}

func putJSON(b *bbolt.Bucket, key []byte, value any) error {
	text, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return b.Put(key, text)
}

// Router returns the name of an enrolled router.
func (s *Store) Router(key tunnel.PublicKey) (string, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, ok := s.routers[key]
	return r.Name, ok
}

func (s *Store) byName(name string) (tunnel.PublicKey, bool) {
	for key, r := range s.routers {
		if r.Name == name {
			return key, true
		}
	}
	return tunnel.PublicKey{}, false
}

// Enrol redeems a token for a router's key. A router whose answer got lost may
// ask again with the same key.
func (s *Store) Enrol(secret []byte, key tunnel.PublicKey) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var record routerRecord
	err := s.db.Update(func(tx *bbolt.Tx) error {
		tokens := tx.Bucket(bucketTokens)
		text := tokens.Get(digest(secret))
		if text == nil {
			return &tunnel.RefusedError{Code: tunnel.CodeTokenUnknown, Message: "this token is not known here: it was altered, is long expired, or comes from another concentrator"}
		}
		var token tokenRecord
		if err := json.Unmarshal(text, &token); err != nil {
			return err
		}
		now := s.now()
		known, enrolled := s.routers[key]
		switch {
		case token.UsedBy != nil && *token.UsedBy == key && enrolled:
			record = known
			return nil
		case token.UsedBy != nil:
			return &tunnel.RefusedError{Code: tunnel.CodeTokenUsed, Message: fmt.Sprintf(
				"this token was used already, at %s; make another with `concentratord token`", token.UsedAt.UTC().Format(time.RFC3339))}
		case now.After(token.Expires):
			return &tunnel.RefusedError{Code: tunnel.CodeTokenExpired, Message: fmt.Sprintf(
				"this token expired at %s; make another with `concentratord token`", token.Expires.UTC().Format(time.RFC3339))}
		}
		if holder, taken := s.byName(token.Name); taken && holder != key {
			return &tunnel.RefusedError{Code: tunnel.CodeTokenUsed, Message: fmt.Sprintf(
				"another router enrolled as %q meanwhile; remove it or make a token with another name", token.Name)}
		}
		token.UsedAt, token.UsedBy = now, &key
		record = routerRecord{Name: token.Name, Enrolled: now, Subnet: known.Subnet}
		if !enrolled {
			var err error
			if record.Subnet, err = s.freeSubnet(); err != nil {
				return err
			}
		}
		return errors.Join(
			putJSON(tokens, digest(secret), token),
			putJSON(tx.Bucket(bucketRouters), key[:], record))
	})
	if err != nil {
		return "", err
	}
	s.routers[key] = record
	return record.Name, nil
}

// Routers lists the enrolled routers by name.
func (s *Store) Routers() []Enrolled {
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := make([]Enrolled, 0, len(s.routers))
	for key, r := range s.routers {
		list = append(list, Enrolled{r.Name, key, r.Enrolled})
	}
	slices.SortFunc(list, func(a, b Enrolled) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// ErrNoRouter says that no router has the name.
var ErrNoRouter = errors.New("no such router")

// Remove forgets a router and returns its key, whose sessions are to be ended.
func (s *Store) Remove(name string) (tunnel.PublicKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key, ok := s.byName(name)
	if !ok {
		return key, fmt.Errorf("%w: %q; `concentratord routers` lists them", ErrNoRouter, name)
	}
	if err := s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketRouters).Delete(key[:]) }); err != nil {
		return key, err
	}
	delete(s.routers, key)
	return key, nil
}

// sysctlsBefore returns the values that settings under /proc/sys had before they
// were changed, by path.
func (s *Store) sysctlsBefore() (values map[string]string, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		text := tx.Bucket(bucketMeta).Get(keySysctls)
		if text == nil {
			return nil
		}
		return json.Unmarshal(text, &values)
	})
	return values, err
}

// setSysctlsBefore remembers values of before, but for those of which earlier
// ones are still to be put back; nil forgets all.
func (s *Store) setSysctlsBefore(values map[string]string) error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if values == nil {
			return meta.Delete(keySysctls)
		}
		all := maps.Clone(values)
		if text := meta.Get(keySysctls); text != nil {
			// Unmarshal overwrites what is there: earlier values win.
			if err := json.Unmarshal(text, &all); err != nil {
				return err
			}
		}
		return putJSON(meta, keySysctls, all)
	})
}
