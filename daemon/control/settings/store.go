package settings

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"time"
	"unicode/utf8"

	"go.etcd.io/bbolt"
)

// The path of a revision through this file: Put validates it, compares it with
// the current one, appends it under the next number and drops the oldest, all
// in one bbolt transaction that is on the disk when Put returns.
//
//	settings/            bucket, ours alone
//	  schema             "1"
//	  revisions/         bucket: big-endian number ─▶ Revision as JSON
//	  unconfirmed        Unconfirmed as JSON, while the newest revision is one
//
// Try puts a revision for a time: it stays if Confirm comes, and TakeBack puts the
// settings of the one before again. Both are known to the disk alone, so a crash
// between changes nothing.

// Revision is one accepted set of settings.
type Revision struct {
	Number   uint64    `json:"number"` // from 1; 0 is Default, which nobody chose
	Time     time.Time `json:"time"`
	Author   string    `json:"author"`
	Settings Settings  `json:"settings"`
}

const (
	schema       = 1
	maxRevisions = 200
	maxAuthor    = 128
)

var (
	bucketKey    = []byte("settings")
	schemaKey    = []byte("schema")
	revisionsKey = []byte("revisions")
	triedKey     = []byte("unconfirmed")
)

var (
	// ErrNewer refuses a database of a later version of Sheaf.
	ErrNewer = errors.New("a newer version of Sheaf has written them")
	// ErrNoRevision is returned for a revision that is not, or no longer, kept.
	ErrNoRevision = errors.New("no such revision")
	// ErrUnconfirmed refuses a change while the newest settings wait to be confirmed.
	ErrUnconfirmed = errors.New("the settings in force are to be confirmed or taken back first")
	// ErrNothingUnconfirmed says that nothing waits to be confirmed, or something else.
	ErrNothingUnconfirmed = errors.New("this revision does not wait to be confirmed")
	// ErrNothingBefore refuses to try the first settings.
	ErrNothingBefore = errors.New("the first settings cannot be tried for a time: there are none to go back to")
)

// Unconfirmed is a revision that is taken back unless it is confirmed in time.
type Unconfirmed struct {
	Revision uint64        `json:"revision"`
	BackTo   uint64        `json:"back_to"` // the revision whose settings come back
	Deadline time.Time     `json:"deadline"`
	Wait     time.Duration `json:"wait"` // nanoseconds, from the change to the deadline
}

// Remaining is the time until the deadline. A clock that was wrong before, as that of
// a router without a battery, does not make it longer than it was at first.
func (u Unconfirmed) Remaining(now time.Time) time.Duration {
	return max(0, min(u.Deadline.Sub(now), u.Wait))
}

// Store keeps the revisions of the settings in one bucket of a database that
// the daemon opened.
type Store struct{ db *bbolt.DB }

// Open checks that the settings in db, if there are any, can be read by this
// version. It writes nothing.
func Open(db *bbolt.DB) (*Store, error) {
	s := &Store{db}
	err := db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketKey)
		if b == nil {
			return nil
		}
		text := string(b.Get(schemaKey))
		if stored, err := strconv.Atoi(text); err != nil || stored < 1 {
			return fmt.Errorf("the settings in %s have no readable schema version (%s): restore the file from a backup or remove it", db.Path(), quote(text))
		} else if stored > schema {
			return fmt.Errorf("the settings in %s: %w (schema %d, this one reads %d): run that version, or remove the file to begin anew", db.Path(), ErrNewer, stored, schema)
		}
		if b.Bucket(revisionsKey) == nil {
			return fmt.Errorf("the settings in %s hold no revisions: restore the file from a backup or remove it", db.Path())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	_, err = s.Current()
	return s, err
}

// Current returns the newest revision, or revision 0 with Default when nothing
// has been put yet.
func (s *Store) Current() (current Revision, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		current, err = newest(revisions(tx))
		return err
	})
	return current, err
}

// Revision returns the revision of that number, or ErrNoRevision.
func (s *Store) Revision(number uint64) (r Revision, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		if b := revisions(tx); b != nil {
			if value := b.Get(key(number)); value != nil {
				r, err = decode(key(number), value)
				return err
			}
		}
		return fmt.Errorf("revision %d: %w", number, ErrNoRevision)
	})
	return r, err
}

// Revisions returns the revisions that are kept, newest first.
func (s *Store) Revisions() (all []Revision, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		b := revisions(tx)
		if b == nil {
			return nil
		}
		c := b.Cursor()
		for k, v := c.Last(); k != nil; k, v = c.Prev() {
			r, err := decode(k, v)
			if err != nil {
				return err
			}
			all = append(all, r)
		}
		return nil
	})
	return all, err
}

// Put makes next the current settings and returns their revision once it is on
// the disk. Settings equal to the current ones make no new revision. Settings
// that are not valid are refused with an *Invalid, and any while the current ones
// are unconfirmed with ErrUnconfirmed.
func (s *Store) Put(next Settings, author string, now time.Time) (Revision, error) {
	return s.put(next, author, now, 0)
}

// Try is Put of settings that wait to be confirmed. Equal settings do not.
func (s *Store) Try(next Settings, author string, now time.Time, wait time.Duration) (Revision, error) {
	return s.put(next, author, now, wait)
}

func (s *Store) put(next Settings, author string, now time.Time, wait time.Duration) (made Revision, err error) {
	if err := Validate(next); err != nil {
		return Revision{}, err
	}
	if len(author) > maxAuthor || !utf8.ValidString(author) {
		return Revision{}, fmt.Errorf("the author of a revision is at most %d bytes of UTF-8, not %s", maxAuthor, quote(author))
	}
	// bbolt's Update syncs the file before it returns, even when nothing was
	// written: look first.
	current, err := s.Current()
	if err != nil {
		return Revision{}, err
	}
	if current.Number > 0 && equal(current.Settings, next) {
		return current, nil
	}
	err = s.db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucketKey)
		if err != nil {
			return err
		}
		if err := b.Put(schemaKey, []byte(strconv.Itoa(schema))); err != nil {
			return err
		}
		list, err := b.CreateBucketIfNotExists(revisionsKey)
		if err != nil {
			return err
		}
		// Again, because another Put may have come between.
		current, err := newest(list)
		if err != nil {
			return err
		}
		if current.Number > 0 && equal(current.Settings, next) {
			made = current
			return nil
		}
		if b.Get(triedKey) != nil {
			return ErrUnconfirmed
		}
		if wait > 0 {
			if current.Number == 0 {
				return ErrNothingBefore
			}
			tried := Unconfirmed{Revision: current.Number + 1, BackTo: current.Number, Deadline: now.Add(wait).UTC(), Wait: wait}
			value, err := json.Marshal(tried)
			if err != nil {
				return err
			}
			if err := b.Put(triedKey, value); err != nil {
				return err
			}
		}
		made, err = add(list, current.Number, next, author, now)
		return err
	})
	switch {
	case errors.Is(err, ErrUnconfirmed), errors.Is(err, ErrNothingBefore):
		return Revision{}, err
	case err != nil:
		return Revision{}, fmt.Errorf("store settings in %s: %w", s.db.Path(), err)
	}
	return made, nil
}

// add appends a revision behind the last one, and drops the oldest.
func add(list *bbolt.Bucket, last uint64, next Settings, author string, now time.Time) (Revision, error) {
	made := Revision{Number: last + 1, Time: now.UTC(), Author: author, Settings: normal(next)}
	value, err := json.Marshal(made)
	if err != nil {
		return Revision{}, err
	}
	if err := list.Put(key(made.Number), value); err != nil {
		return Revision{}, err
	}
	return made, dropOldest(list, made.Number)
}

// Unconfirmed returns what waits to be confirmed, if anything does.
func (s *Store) Unconfirmed() (u Unconfirmed, waiting bool, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		u, waiting, err = tried(tx.Bucket(bucketKey))
		return err
	})
	return u, waiting, err
}

func tried(b *bbolt.Bucket) (u Unconfirmed, waiting bool, err error) {
	if b == nil || b.Get(triedKey) == nil {
		return Unconfirmed{}, false, nil
	}
	if err := json.Unmarshal(b.Get(triedKey), &u); err != nil {
		return Unconfirmed{}, false, fmt.Errorf("what is stored of unconfirmed settings: %w", err)
	}
	return u, true, nil
}

// Confirm lets the revision of that number stay, or returns ErrNothingUnconfirmed.
func (s *Store) Confirm(number uint64) error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketKey)
		u, waiting, err := tried(b)
		if err != nil {
			return err
		}
		if !waiting || u.Revision != number {
			return fmt.Errorf("revision %d: %w", number, ErrNothingUnconfirmed)
		}
		return b.Delete(triedKey)
	})
}

// TakeBack makes the settings from before the unconfirmed ones current again, as a
// new revision. It returns ErrNothingUnconfirmed if none wait.
func (s *Store) TakeBack(author string, now time.Time) (made Revision, err error) {
	err = s.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketKey)
		u, waiting, err := tried(b)
		if err != nil {
			return err
		}
		if !waiting {
			return ErrNothingUnconfirmed
		}
		list := b.Bucket(revisionsKey)
		value := list.Get(key(u.BackTo))
		if value == nil {
			return fmt.Errorf("revision %d: %w", u.BackTo, ErrNoRevision)
		}
		back, err := decode(key(u.BackTo), value)
		if err != nil {
			return err
		}
		if err := b.Delete(triedKey); err != nil {
			return err
		}
		made, err = add(list, u.Revision, back.Settings, author, now)
		return err
	})
	if err != nil {
		return Revision{}, fmt.Errorf("take settings back in %s: %w", s.db.Path(), err)
	}
	return made, nil
}

// dropOldest keeps the newest maxRevisions, of which last is the last.
func dropOldest(list *bbolt.Bucket, last uint64) error {
	for {
		k, _ := list.Cursor().First()
		if k == nil || len(k) != 8 || binary.BigEndian.Uint64(k)+maxRevisions > last {
			return nil
		}
		if err := list.Delete(k); err != nil {
			return err
		}
	}
}

// revisions is nil as long as nothing has been put.
func revisions(tx *bbolt.Tx) *bbolt.Bucket {
	if b := tx.Bucket(bucketKey); b != nil {
		return b.Bucket(revisionsKey)
	}
	return nil
}

func newest(list *bbolt.Bucket) (Revision, error) {
	if list == nil {
		return Revision{Settings: Default()}, nil
	}
	k, v := list.Cursor().Last()
	if k == nil {
		return Revision{Settings: Default()}, nil
	}
	return decode(k, v)
}

func decode(k, v []byte) (Revision, error) {
	// A revision from before a setting existed holds that setting's default.
	r := Revision{Settings: Settings{LAN: LAN{DNS: true}, Multipath: Multipath{Subflows: defaultSubflows, CongestionControl: Auto}}}
	err := json.Unmarshal(v, &r)
	if err == nil {
		err = Validate(r.Settings)
	}
	if err == nil && (len(k) != 8 || binary.BigEndian.Uint64(k) != r.Number) {
		err = fmt.Errorf("it is stored under key %x", k)
	}
	if err != nil {
		return Revision{}, fmt.Errorf("stored settings, revision %d: %w", r.Number, err)
	}
	r.Settings = normal(r.Settings)
	return r, nil
}

func key(number uint64) []byte { return binary.BigEndian.AppendUint64(nil, number) }

// normal gives settings that mean the same one form: an absent list is an empty
// one, and an empty list that the text leaves out is absent. It shares nothing
// with what the caller goes on to use.
func normal(s Settings) Settings {
	s.LAN.Interfaces = append([]string{}, s.LAN.Interfaces...)
	s.Uplinks = append([]Uplink{}, s.Uplinks...)
	for i := range s.Uplinks {
		u := &s.Uplinks[i]
		u.Resolvers = append([]netip.Addr(nil), u.Resolvers...)
	}
	s.Forwards = append([]Forward(nil), s.Forwards...)
	s.Classes = append([]ClassRule(nil), s.Classes...)
	for i := range s.Classes {
		if c := &s.Classes[i]; c.DSCP != nil {
			c.DSCP = new(*c.DSCP)
		}
	}
	return s
}

func equal(a, b Settings) bool { return reflect.DeepEqual(normal(a), normal(b)) }
