package router

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/tunnel"
)

// The daemon's one file, with these buckets beside those of package settings.
var (
	bucketIdentity = []byte("identity")

	keySeed      = []byte("seed")      // of the router's Ed25519 key
	keyEnrolment = []byte("enrolment") // enrolment, once joined
	keyPending   = []byte("pending")   // a token that is still to be used
	keySysctls   = []byte("sysctls")   // the values that we changed, as they were
)

// enrolment is the concentrator that the router has joined.
type enrolment struct {
	Router    string           `json:"router"` // what the concentrator calls us
	Key       tunnel.PublicKey `json:"key"`
	Addresses []string         `json:"addresses"`
	Joined    time.Time        `json:"joined"`
	// Token is the SHA-256 of the token that was used, so that a settings file
	// that still holds it does not make the router join again.
	Token []byte `json:"token"`
}

// state is what survives a restart.
type state struct {
	db       *bbolt.DB
	settings *settings.Store
	identity *tunnel.Identity
}

func openState(dir string) (*state, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	path := filepath.Join(dir, stateFile)
	// An empty file would become a new database, and the router another one.
	if info, err := os.Stat(path); err == nil && info.Size() == 0 {
		if list, _ := copies(filepath.Join(dir, copyDir)); len(list) > 0 {
			return nil, damaged(path, errors.New("it is empty"))
		}
	}
	db, err := openWhole(path, bbolt.Options{})
	switch {
	case errors.Is(err, errInUse):
		return nil, fmt.Errorf("%s is in use: %w", path, err)
	case errors.Is(err, errDamaged):
		return nil, damaged(path, err)
	case err != nil:
		return nil, fmt.Errorf("opening the state %s: %w", path, err)
	}
	s := &state{db: db}
	if s.settings, err = settings.Open(db); err == nil {
		err = db.Update(s.loadIdentity)
	}
	switch {
	case errors.Is(err, settings.ErrNewer):
		return nil, errors.Join(err, db.Close())
	case err != nil:
		return nil, errors.Join(damaged(path, err), db.Close())
	}
	return s, nil
}

// damaged is one sentence on what to do.
func damaged(path string, err error) error {
	if !errors.Is(err, errDamaged) {
		err = fmt.Errorf("%w: %w", errDamaged, err)
	}
	return fmt.Errorf("the state %s cannot be read: run `sheafd recover --state-dir %s`, which restores the newest good copy: %w", path, filepath.Dir(path), err)
}

func (s *state) loadIdentity(tx *bbolt.Tx) error {
	b, err := tx.CreateBucketIfNotExists(bucketIdentity)
	if err != nil {
		return err
	}
	if seed := b.Get(keySeed); seed != nil {
		s.identity, err = tunnel.LoadIdentity(slices.Clone(seed))
		return err
	}
	if s.identity, err = tunnel.NewIdentity(); err != nil {
		return err
	}
	return b.Put(keySeed, s.identity.Seed())
}

// enrolment returns the concentrator joined, or nil.
func (s *state) enrolment() (e *enrolment, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		text := tx.Bucket(bucketIdentity).Get(keyEnrolment)
		if text == nil {
			return nil
		}
		e = new(enrolment)
		return json.Unmarshal(text, e)
	})
	return e, err
}

// setEnrolment stores a concentrator, and forgets the token that led to it.
func (s *state) setEnrolment(e enrolment) error {
	text, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return s.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketIdentity)
		return errors.Join(b.Put(keyEnrolment, text), b.Delete(keyPending))
	})
}

// pending returns a token that is still to be used, or "".
func (s *state) pending() (token string, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		token = string(tx.Bucket(bucketIdentity).Get(keyPending))
		return nil
	})
	return token, err
}

func (s *state) setPending(token string) error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		if token == "" {
			return tx.Bucket(bucketIdentity).Delete(keyPending)
		}
		return tx.Bucket(bucketIdentity).Put(keyPending, []byte(token))
	})
}

// sysctls returns what the sysctls that we changed were before, by path.
func (s *state) sysctls() (before map[string]string, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		text := tx.Bucket(bucketIdentity).Get(keySysctls)
		if text == nil {
			return nil
		}
		return json.Unmarshal(text, &before)
	})
	return before, err
}

// addSysctls remembers values that are about to be changed, but for those of
// which earlier ones are still to be put back.
func (s *state) addSysctls(values map[string]string) error {
	before, err := s.sysctls()
	if err != nil {
		return err
	}
	all := maps.Clone(values)
	maps.Copy(all, before)
	text, err := json.Marshal(all)
	if err != nil {
		return err
	}
	return s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketIdentity).Put(keySysctls, text) })
}

func (s *state) forgetSysctls() error {
	return s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketIdentity).Delete(keySysctls) })
}
