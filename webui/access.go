package webui

// The path of somebody to the panel:
//
//	no password yet ─▶ Claim, within the window after the start ─▶ password, session
//	password ─▶ limits: per address, over all ─▶ argon2id, one at a time ─▶ Login ─▶ session
//	cookie or token ─▶ SHA-256 ─▶ bucket ─▶ Identity: who, and may it write
//
// Secrets are never stored: of passwords there is an argon2id hash (RFC 9106), of
// sessions and tokens, which are random, a SHA-256.

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"go.etcd.io/bbolt"
	"golang.org/x/crypto/argon2"
	"golang.org/x/time/rate"
)

const (
	// claimWindow is how long after the start whoever comes first may set the password.
	claimWindow = time.Hour

	sessionIdle     = 4 * time.Hour
	sessionAbsolute = 12 * time.Hour
	// seenEvery is how often the use of a session or token is written down.
	seenEvery = 5 * time.Minute

	maxSessions  = 32
	maxTokens    = 32
	maxTokenName = 64 // bytes

	minPassword = 10  // characters
	maxPassword = 256 // bytes

	// Wrong passwords: so many at once, and then one in so long; of one address, and of all.
	wrongBurst    = 5
	wrongEvery    = 20 * time.Second
	allWrongBurst = 30
	allWrongEvery = 5 * time.Second
	maxAddresses  = 1024
	// maxHashing is how many logins may wait for their turn; each takes 19 MiB in it.
	maxHashing = 4
)

// The parameters of argon2id: the second choice of OWASP's password storage, for
// machines with little memory.
const (
	argonMemory  = 19 << 10 // KiB
	argonPasses  = 2
	argonThreads = 1
	argonKey     = 32
	argonSalt    = 16
)

var (
	accessBucket   = []byte("access")
	passwordKey    = []byte("password")
	certificateKey = []byte("certificate")
	sessionsBucket = []byte("sessions")
	tokensBucket   = []byte("tokens")
)

// Access knows who may drive the daemon by the panel.
type Access struct {
	db         *bbolt.DB
	now        func() time.Time
	claimUntil time.Time

	hashing chan struct{} // holds one while a hash is made
	waiting chan struct{}

	mu        sync.Mutex
	all       *rate.Limiter
	addresses map[netip.Prefix]*rate.Limiter
}

// Identity is who makes a request.
type Identity struct {
	// Name is what revisions have as their author.
	Name string
	// Write says whether it may change anything.
	Write bool
	// session or token is its key, if it has come by one.
	session, token []byte
}

// grant is a session or a token as it is stored.
type grant struct {
	Name    string    `json:"name,omitempty"` // of a token
	Write   bool      `json:"write"`
	Created time.Time `json:"created"`
	Seen    time.Time `json:"seen"`
	Address string    `json:"address,omitempty"` // where a session was opened from
}

// OpenAccess keeps who may drive the daemon in a bucket of its database.
func OpenAccess(db *bbolt.DB, now func() time.Time) (*Access, error) {
	a := &Access{db: db, now: now, claimUntil: now().Add(claimWindow),
		hashing: make(chan struct{}, 1), waiting: make(chan struct{}, maxHashing),
		all: rate.NewLimiter(rate.Every(allWrongEvery), allWrongBurst), addresses: map[netip.Prefix]*rate.Limiter{}}
	return a, db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(accessBucket)
		if err != nil {
			return err
		}
		_, errSessions := b.CreateBucketIfNotExists(sessionsBucket)
		_, errTokens := b.CreateBucketIfNotExists(tokensBucket)
		return errors.Join(errSessions, errTokens)
	})
}

// Claimed says whether there is a password.
func (a *Access) Claimed() (claimed bool, err error) {
	hash, err := a.password()
	return hash != "", err
}

// ClaimOpen says whether whoever comes first may set the password.
func (a *Access) ClaimOpen() (bool, error) {
	claimed, err := a.Claimed()
	return !claimed && a.now().Before(a.claimUntil), err
}

func (a *Access) password() (hash string, err error) {
	err = a.db.View(func(tx *bbolt.Tx) error {
		hash = string(tx.Bucket(accessBucket).Get(passwordKey))
		return nil
	})
	return hash, err
}

// Claim sets the first password and opens a session.
func (a *Access) Claim(ctx context.Context, password string, from netip.Addr) (session string, err error) {
	if open, err := a.ClaimOpen(); err != nil {
		return "", err
	} else if !open {
		return "", a.unclaimable()
	}
	hash, err := a.newHash(ctx, password)
	if err != nil {
		return "", err
	}
	err = a.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(accessBucket)
		if b.Get(passwordKey) != nil { // somebody else was faster
			return a.unclaimable()
		}
		if err := b.Put(passwordKey, []byte(hash)); err != nil {
			return err
		}
		session, err = a.open(b, from)
		return err
	})
	return session, err
}

func (a *Access) unclaimable() error {
	return &Error{Code: CodeClaimClosed, Detail: fmt.Sprintf(
		"the password is set, or was not within %v of the start: log in, or set one with `sheafctl password` on the device, or restart it", claimWindow)}
}

// SetPassword replaces the password, or sets the first, and ends every session but the
// one that it is changed from. The old one is asked for unless force is set.
func (a *Access) SetPassword(ctx context.Context, who Identity, old, password string, from netip.Addr, force bool) error {
	if !force {
		if err := a.verify(ctx, old, from); err != nil {
			return err
		}
	}
	hash, err := a.newHash(ctx, password)
	if err != nil {
		return err
	}
	return a.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(accessBucket)
		if err := b.Put(passwordKey, []byte(hash)); err != nil {
			return err
		}
		return dropWhere(b.Bucket(sessionsBucket), func(key []byte, _ grant) bool { return !slices.Equal(key, who.session) })
	})
}

// Login opens a session for who knows the password.
func (a *Access) Login(ctx context.Context, password string, from netip.Addr) (session string, err error) {
	if err := a.verify(ctx, password, from); err != nil {
		return "", err
	}
	err = a.db.Update(func(tx *bbolt.Tx) error {
		session, err = a.open(tx.Bucket(accessBucket), from)
		return err
	})
	return session, err
}

// open makes a session. Those that have ended are dropped, and the oldest of too many.
func (a *Access) open(b *bbolt.Bucket, from netip.Addr) (id string, err error) {
	list := b.Bucket(sessionsBucket)
	if err := dropWhere(list, func(_ []byte, g grant) bool { return a.over(g) }); err != nil {
		return "", err
	}
	if err := dropOldest(list, maxSessions-1); err != nil {
		return "", err
	}
	id = secret()
	now := a.now().UTC()
	return id, putGrant(list, digest(id), grant{Write: true, Created: now, Seen: now, Address: from.String()})
}

// over says whether a session has ended.
func (a *Access) over(g grant) bool {
	now := a.now()
	// A clock that was wrong when it began is right now, or the other way round.
	return now.Sub(g.Created).Abs() > sessionAbsolute || now.Sub(g.Seen).Abs() > sessionIdle
}

// Session is who has opened the session with an ID.
func (a *Access) Session(id string) (Identity, bool, error) {
	key := digest(id)
	g, ok, err := a.find(sessionsBucket, key)
	if err != nil || !ok || a.over(g) {
		return Identity{}, false, err
	}
	return Identity{Name: "panel", Write: g.Write, session: key}, true, a.seen(sessionsBucket, key, g)
}

// Token is who has a token.
func (a *Access) Token(token string) (Identity, bool, error) {
	key := digest(token)
	g, ok, err := a.find(tokensBucket, key)
	if err != nil || !ok {
		return Identity{}, false, err
	}
	return Identity{Name: "token " + g.Name, Write: g.Write, token: key}, true, a.seen(tokensBucket, key, g)
}

// live says whether somebody still may what they could. It is no use of a session, which
// ends beside a page that is only open.
func (a *Access) live(who Identity) (bool, error) {
	switch {
	case who.session != nil:
		g, ok, err := a.find(sessionsBucket, who.session)
		return ok && !a.over(g), err
	case who.token != nil:
		_, ok, err := a.find(tokensBucket, who.token)
		return ok, err
	}
	return true, nil
}

func (a *Access) find(bucket, key []byte) (g grant, ok bool, err error) {
	err = a.db.View(func(tx *bbolt.Tx) error {
		text := tx.Bucket(accessBucket).Bucket(bucket).Get(key)
		if text == nil {
			return nil
		}
		ok = true
		return json.Unmarshal(text, &g)
	})
	return g, ok, err
}

// seen writes a use down, seldom: the disk of a router does not like to be written.
func (a *Access) seen(bucket, key []byte, g grant) error {
	now := a.now().UTC()
	if now.Sub(g.Seen).Abs() < seenEvery {
		return nil
	}
	return a.db.Update(func(tx *bbolt.Tx) error {
		list := tx.Bucket(accessBucket).Bucket(bucket)
		if list.Get(key) == nil { // logged out meanwhile
			return nil
		}
		g.Seen = now
		return putGrant(list, key, g)
	})
}

// Logout ends the session that somebody has.
func (a *Access) Logout(who Identity) error {
	if who.session == nil {
		return nil
	}
	return a.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(accessBucket).Bucket(sessionsBucket).Delete(who.session)
	})
}

// grants lists the live sessions or the tokens, the newest first.
func (a *Access) grants(bucket []byte) (list []named, err error) {
	err = a.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(accessBucket).Bucket(bucket).ForEach(func(key, text []byte) error {
			n := named{key: slices.Clone(key)}
			if err := json.Unmarshal(text, &n.grant); err != nil {
				return err
			}
			if string(bucket) != string(sessionsBucket) || !a.over(n.grant) {
				list = append(list, n)
			}
			return nil
		})
	})
	slices.SortFunc(list, func(x, y named) int { return y.Created.Compare(x.Created) })
	return list, err
}

// named is a grant with its key.
type named struct {
	grant
	key []byte
}

// id is how a session or a token is told apart by those who may not use it.
func (n named) id() string { return hex.EncodeToString(n.key[:8]) }

// NewToken makes a token of a name, which is not told again.
func (a *Access) NewToken(name string, write bool) (token string, err error) {
	if name == "" || len(name) > maxTokenName || !utf8.ValidString(name) {
		return "", &Error{Code: CodeBadRequest, Detail: fmt.Sprintf("the name of a token is 1 to %d bytes of UTF-8", maxTokenName)}
	}
	token = "sheaf_" + secret()
	err = a.db.Update(func(tx *bbolt.Tx) error {
		list := tx.Bucket(accessBucket).Bucket(tokensBucket)
		if list.Stats().KeyN >= maxTokens {
			return &Error{Code: CodeTooManyTokens, Detail: fmt.Sprintf("there are %d tokens already: remove one first", maxTokens)}
		}
		now := a.now().UTC()
		return putGrant(list, digest(token), grant{Name: name, Write: write, Created: now, Seen: now})
	})
	return token, err
}

// remove ends the session or token with an ID.
func (a *Access) remove(bucket []byte, id string) error {
	found := false
	err := a.db.Update(func(tx *bbolt.Tx) error {
		return dropWhere(tx.Bucket(accessBucket).Bucket(bucket), func(key []byte, _ grant) bool {
			same := named{key: key}.id() == id
			found = found || same
			return same
		})
	})
	if err == nil && !found {
		err = &Error{Code: CodeNotFound, Detail: "there is none with this id"}
	}
	return err
}

// verify is nil for the right password. Whoever has given too many wrong ones waits
// before the next is looked at.
func (a *Access) verify(ctx context.Context, password string, from netip.Addr) error {
	hash, err := a.password()
	if err != nil {
		return err
	}
	if hash == "" {
		return &Error{Code: CodeUnclaimed, Detail: "there is no password yet: set one first"}
	}
	return a.turn(ctx, func() error {
		if wait := a.backOff(from); wait > 0 {
			return &Error{Code: CodeTooManyLogins, Detail: fmt.Sprintf("too many wrong passwords: try again in %v", wait.Round(time.Second)), RetryAfter: wait}
		}
		if len(password) > maxPassword || !matches(hash, password) {
			a.wrong(from)
			return &Error{Code: CodeWrongPassword, Detail: "the password is wrong"}
		}
		return nil
	})
}

// turn does one thing after the other.
func (a *Access) turn(ctx context.Context, do func() error) error {
	select {
	case a.waiting <- struct{}{}:
		defer func() { <-a.waiting }()
	default:
		return &Error{Code: CodeTooManyLogins, Detail: "too many log in at once: try again in a moment", RetryAfter: time.Second}
	}
	select {
	case a.hashing <- struct{}{}:
		defer func() { <-a.hashing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	return do()
}

// newHash is of a password that may be one.
func (a *Access) newHash(ctx context.Context, password string) (hash string, err error) {
	if reason := weak(password); reason != "" {
		return "", &Error{Code: CodeWeakPassword, Detail: reason}
	}
	err = a.turn(ctx, func() error { hash = hashOf(password); return nil })
	return hash, err
}

// common are long passwords that everybody tries first.
var common = []string{
	"1234567890", "0123456789", "12345678910", "123456789a", "qwertyuiop", "1q2w3e4r5t", "1qaz2wsx3edc", "password123", "password1234",
	"passwordpassword", "iloveyou123", "administrator", "adminadmin", "changeme123", "letmein123", "welcome123", "sheafsheaf",
}

// weak says why a password will not do, or nothing.
func weak(password string) string {
	different := map[rune]bool{}
	for _, r := range password {
		different[r] = true
	}
	switch {
	case len(password) > maxPassword:
		return fmt.Sprintf("the password is longer than %d bytes", maxPassword)
	case !utf8.ValidString(password):
		return "the password is not UTF-8"
	case utf8.RuneCountInString(password) < minPassword:
		return fmt.Sprintf("the password is shorter than %d characters", minPassword)
	case len(different) < 5:
		return "the password has fewer than 5 different characters"
	case slices.Contains(common, strings.ToLower(password)):
		return "the password is one of those that everybody tries first"
	}
	return ""
}

// hashOf is the PHC string of a password.
func hashOf(password string) string {
	salt := make([]byte, argonSalt)
	_, _ = rand.Read(salt) // never fails
	key := argon2.IDKey([]byte(password), salt, argonPasses, argonMemory, argonThreads, argonKey)
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, argonMemory, argonPasses, argonThreads,
		base64.RawStdEncoding.EncodeToString(salt), base64.RawStdEncoding.EncodeToString(key))
}

// matches compares a password with a PHC string that hashOf, of this version or an
// earlier one, has made.
func matches(hash, password string) bool {
	var (
		version, memory, passes uint32
		threads                 uint8
	)
	parts := strings.Split(hash, "$")
	if len(parts) != 6 || parts[1] != "argon2id" {
		return false
	}
	_, errVersion := fmt.Sscanf(parts[2], "v=%d", &version)
	_, errCost := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &memory, &passes, &threads)
	salt, errSalt := base64.RawStdEncoding.DecodeString(parts[4])
	want, errKey := base64.RawStdEncoding.DecodeString(parts[5])
	if errors.Join(errVersion, errCost, errSalt, errKey) != nil || version != argon2.Version || passes == 0 || threads == 0 || len(want) == 0 {
		return false
	}
	key := argon2.IDKey([]byte(password), salt, passes, memory, threads, uint32(len(want)))
	return subtle.ConstantTimeCompare(key, want) == 1
}

// network is what is counted as one address: IPv6 hosts have a /64 each.
func network(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := a.BitLen()
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits)
	return p
}

// backOff is how long an address has to wait before the next try.
func (a *Access) backOff(from netip.Addr) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	wait := waitOf(a.all, now, allWrongEvery)
	if l := a.addresses[network(from)]; l != nil {
		wait = max(wait, waitOf(l, now, wrongEvery))
	}
	return wait
}

func waitOf(l *rate.Limiter, now time.Time, every time.Duration) time.Duration {
	if left := l.TokensAt(now); left < 1 {
		return max(time.Second, time.Duration((1-left)*float64(every)))
	}
	return 0
}

// wrong counts a wrong password.
func (a *Access) wrong(from netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	key := network(from)
	l := a.addresses[key]
	if l == nil {
		if len(a.addresses) >= maxAddresses {
			for old, l := range a.addresses {
				if l.TokensAt(now) >= wrongBurst || len(a.addresses) >= maxAddresses {
					delete(a.addresses, old)
				}
			}
		}
		l = rate.NewLimiter(rate.Every(wrongEvery), wrongBurst)
		a.addresses[key] = l
	}
	l.AllowN(now, 1)
	a.all.AllowN(now, 1)
}

// secret is 256 random bits.
func secret() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return base64.RawURLEncoding.EncodeToString(b)
}

func digest(secret string) []byte {
	sum := sha256.Sum256([]byte(secret))
	return sum[:]
}

func putGrant(b *bbolt.Bucket, key []byte, g grant) error {
	text, err := json.Marshal(g)
	if err != nil {
		return err
	}
	return b.Put(key, text)
}

// dropWhere deletes the grants that drop says, and those that cannot be read.
func dropWhere(b *bbolt.Bucket, drop func(key []byte, g grant) bool) error {
	var keys [][]byte
	err := b.ForEach(func(key, text []byte) error {
		var g grant
		if json.Unmarshal(text, &g) != nil || drop(key, g) {
			keys = append(keys, slices.Clone(key))
		}
		return nil
	})
	for _, key := range keys {
		err = errors.Join(err, b.Delete(key))
	}
	return err
}

// dropOldest keeps the newest.
func dropOldest(b *bbolt.Bucket, keep int) error {
	var times []time.Time
	err := b.ForEach(func(_, text []byte) error {
		var g grant
		err := json.Unmarshal(text, &g)
		times = append(times, g.Seen)
		return err
	})
	if err != nil || len(times) <= keep {
		return err
	}
	slices.SortFunc(times, func(x, y time.Time) int { return y.Compare(x) })
	oldest := times[keep-1]
	return dropWhere(b, func(_ []byte, g grant) bool { return g.Seen.Before(oldest) })
}
