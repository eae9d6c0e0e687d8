package settings

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
)

var noon = time.Date(2025, 6, 1, 12, 0, 0, 0, time.UTC)

func openDB(t *testing.T, path string) *bbolt.DB {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func numbered(n int) Settings {
	s := Default()
	s.LAN.Interfaces = []string{fmt.Sprintf("lan%d", n)}
	return s
}

func TestStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sheaf.db")
	db := openDB(t, path)
	store, err := Open(db)
	if err != nil {
		t.Fatal(err)
	}
	db.View(func(tx *bbolt.Tx) error {
		if k, _ := tx.Cursor().First(); k != nil {
			t.Errorf("the first Open wrote bucket %q", k)
		}
		return nil
	})
	current, err := store.Current()
	if err != nil || current.Number != 0 || cmp.Diff(current.Settings, Default(), comparable) != "" {
		t.Errorf("empty store: %+v, %v", current, err)
	}

	first, err := store.Put(numbered(1), "anna", noon)
	if err != nil || first.Number != 1 || first.Author != "anna" || !first.Time.Equal(noon) {
		t.Fatalf("first Put: %+v, %v", first, err)
	}
	same := numbered(1)
	same.Uplinks = nil // means the same as an empty list
	if again, err := store.Put(same, "bert", noon.Add(time.Hour)); err != nil || cmp.Diff(first, again, comparable) != "" {
		t.Errorf("equal settings: %+v, %v", again, err)
	}
	if _, err := store.Put(Default(), "anna", noon); !errors.As(err, new(*Invalid)) {
		t.Errorf("invalid settings: %v", err)
	}
	if _, err := store.Put(numbered(2), strings.Repeat("a", 129), noon); err == nil {
		t.Error("an author of 129 bytes was accepted")
	}

	// What a restart finds is what was put.
	db.Close()
	store, err = Open(openDB(t, path))
	if err != nil {
		t.Fatal(err)
	}
	if current, err := store.Current(); err != nil || cmp.Diff(first, current, comparable) != "" {
		t.Errorf("after reopening: %+v, %v", current, err)
	}

	// Going back is a revision of its own.
	if _, err := store.Put(numbered(2), "bert", noon); err != nil {
		t.Fatal(err)
	}
	old, err := store.Revision(1)
	if err != nil {
		t.Fatal(err)
	}
	back, err := store.Put(old.Settings, "anna", noon)
	if err != nil || back.Number != 3 || cmp.Diff(back.Settings, first.Settings, comparable) != "" {
		t.Errorf("going back: %+v, %v", back, err)
	}
}

// TestStoreReadsOlderRevisions: what was stored before a setting existed holds
// that setting's default, and storing it again makes no new revision.
func TestStoreReadsOlderRevisions(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "sheaf.db"))
	store, err := Open(db)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Put(numbered(1), "anna", noon); err != nil {
		t.Fatal(err)
	}
	// As the first version of this schema wrote it.
	const older = `{"number":1,"time":"2025-06-01T12:00:00Z","author":"anna","settings":{"version":1,"lan":{"interfaces":["lan1"]},"uplinks":[],"concentrator":{},` +
		`"multipath":{"enabled":true,"path_manager":"fullmesh","scheduler":"default","checksum":false,"syn_retries":2},"when_tunnel_down":"direct"}}`
	if err := db.Update(func(tx *bbolt.Tx) error { return revisions(tx).Put(key(1), []byte(older)) }); err != nil {
		t.Fatal(err)
	}
	current, err := store.Current()
	if err != nil || cmp.Diff(numbered(1), current.Settings, comparable) != "" {
		t.Errorf("older revision: %+v, %v", current, err)
	}
	off := numbered(1)
	off.LAN.DNS = false
	for _, step := range []struct {
		settings Settings
		number   uint64
	}{{numbered(1), 1}, {off, 2}, {off, 2}} {
		if r, err := store.Put(step.settings, "bert", noon); err != nil || r.Number != step.number {
			t.Errorf("Put with dns %v: %+v, %v, want revision %d", step.settings.LAN.DNS, r, err, step.number)
		}
	}
	if current, err := store.Current(); err != nil || current.Settings.LAN.DNS {
		t.Errorf("dns switched off: %+v, %v", current, err)
	}
}

// TestStoreKeepsEveryField: whatever Parse can give survives the database, and
// a revision shares no memory with the settings it was made of.
func TestStoreKeepsEveryField(t *testing.T) {
	text, err := os.ReadFile("testdata/forwards_and_classes.txt")
	if err != nil {
		t.Fatal(err)
	}
	want, err := Parse(text[:bytes.Index(text, []byte("----------\n"))])
	if err != nil {
		t.Fatal(err)
	}
	store, err := Open(openDB(t, filepath.Join(t.TempDir(), "sheaf.db")))
	if err != nil {
		t.Fatal(err)
	}
	made, err := store.Put(want, "anna", noon)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range made.Settings.Classes {
		if c.DSCP != nil {
			*c.DSCP = 99
		}
	}
	made.Settings.Uplinks[0].Resolvers[0] = netip.Addr{}
	made.Settings.Forwards[0].Port = 99
	current, err := store.Current()
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]Settings{"given": want, "stored": current.Settings} {
		if diff := cmp.Diff(string(s.YAML()), string(want.YAML())); diff != "" || strings.Contains(string(s.YAML()), "99") {
			t.Errorf("%s: %s\n%s", name, diff, s.YAML())
		}
	}
	if diff := cmp.Diff(want, current.Settings, comparable); diff != "" {
		t.Error(diff)
	}
}

func TestStoreKeepsNewestRevisions(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "sheaf.db"))
	db.NoSync = true // a thousandth of the time, and this test cuts no power
	store, err := Open(db)
	if err != nil {
		t.Fatal(err)
	}
	for i := range maxRevisions + 5 {
		if _, err := store.Put(numbered(i), "anna", noon); err != nil {
			t.Fatal(err)
		}
	}
	all, err := store.Revisions()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != maxRevisions || all[0].Number != maxRevisions+5 || all[len(all)-1].Number != 6 {
		t.Errorf("%d revisions, %d to %d", len(all), all[len(all)-1].Number, all[0].Number)
	}
	if _, err := store.Revision(5); !errors.Is(err, ErrNoRevision) {
		t.Errorf("dropped revision: %v", err)
	}
}

func TestStoreRefusesWhatItCannotRead(t *testing.T) {
	for want, damage := range map[string]func(b *bbolt.Bucket) error{
		"newer version of Sheaf has written them (schema 2, this one reads 1)": func(b *bbolt.Bucket) error {
			return b.Put(schemaKey, []byte("2"))
		},
		"no readable schema version": func(b *bbolt.Bucket) error { return b.Delete(schemaKey) },
		"hold no revisions":          func(b *bbolt.Bucket) error { return b.DeleteBucket(revisionsKey) },
		"stored settings, revision 1: lan.interfaces: names no interface": func(b *bbolt.Bucket) error {
			return b.Bucket(revisionsKey).Put(key(1), []byte(`{"number":1,"settings":{"version":1}}`))
		},
		"stored settings, revision 0: unexpected end": func(b *bbolt.Bucket) error {
			return b.Bucket(revisionsKey).Put(key(1), []byte(`{"number":1`))
		},
	} {
		db := openDB(t, filepath.Join(t.TempDir(), "sheaf.db"))
		store, err := Open(db)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := store.Put(numbered(1), "anna", noon); err != nil {
			t.Fatal(err)
		}
		if err := db.Update(func(tx *bbolt.Tx) error { return damage(tx.Bucket(bucketKey)) }); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(db); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(want, "newer") && strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// Settings that are tried stay when they are confirmed, and else the ones before come
// back, also when the database was closed between.
func TestStoreTriesSettings(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sheaf.db")
	db := openDB(t, path)
	store, err := Open(db)
	if err != nil {
		t.Fatal(err)
	}
	reopen := func() {
		t.Helper()
		db.Close()
		db = openDB(t, path)
		if store, err = Open(db); err != nil {
			t.Fatal(err)
		}
	}
	waits := func(want Unconfirmed) {
		t.Helper()
		got, waiting, err := store.Unconfirmed()
		if err != nil || waiting != (want != Unconfirmed{}) || got != want {
			t.Errorf("unconfirmed: %+v %v %v, want %+v", got, waiting, err, want)
		}
	}
	in := func(number uint64, want Settings, author string) {
		t.Helper()
		r, err := store.Current()
		if err != nil || r.Number != number || r.Author != author || cmp.Diff(want, r.Settings, comparable) != "" {
			t.Errorf("current: %+v %v, want revision %d by %s with %v", r, err, number, author, want.LAN.Interfaces)
		}
	}

	if _, err := store.Try(numbered(1), "anna", noon, time.Minute); !errors.Is(err, ErrNothingBefore) {
		t.Errorf("trying the first settings: %v", err)
	}
	if _, err := store.TakeBack("anna", noon); err == nil {
		t.Error("taking back with nothing stored succeeded")
	}
	if _, err := store.Put(numbered(1), "anna", noon); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Try(numbered(1), "anna", noon, time.Minute); err != nil {
		t.Fatal(err)
	}
	waits(Unconfirmed{}) // equal settings are in force already
	if _, err := store.Try(numbered(2), "anna", noon, time.Minute); err != nil {
		t.Fatal(err)
	}
	tried := Unconfirmed{Revision: 2, BackTo: 1, Deadline: noon.Add(time.Minute), Wait: time.Minute}
	waits(tried)
	for _, put := range []func(Settings, string, time.Time) (Revision, error){
		store.Put,
		func(s Settings, author string, now time.Time) (Revision, error) {
			return store.Try(s, author, now, time.Hour)
		},
	} {
		if _, err := put(numbered(3), "bert", noon); !errors.Is(err, ErrUnconfirmed) {
			t.Errorf("a change before the confirmation: %v", err)
		}
	}
	if err := store.Confirm(1); !errors.Is(err, ErrNothingUnconfirmed) {
		t.Errorf("confirming another revision: %v", err)
	}
	reopen()
	waits(tried)
	in(2, numbered(2), "anna")
	if r, err := store.TakeBack("safe mode", noon); err != nil || r.Number != 3 {
		t.Errorf("taken back: %+v, %v", r, err)
	}
	reopen()
	waits(Unconfirmed{})
	in(3, numbered(1), "safe mode")

	if _, err := store.Try(numbered(4), "anna", noon, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := store.Confirm(4); err != nil {
		t.Fatal(err)
	}
	reopen()
	waits(Unconfirmed{})
	in(4, numbered(4), "anna")
	for _, err := range []error{store.Confirm(4), func() error { _, err := store.TakeBack("anna", noon); return err }()} {
		if !errors.Is(err, ErrNothingUnconfirmed) {
			t.Errorf("after the confirmation: %v", err)
		}
	}
}

func TestUnconfirmedRemaining(t *testing.T) {
	u := Unconfirmed{Deadline: noon, Wait: 2 * time.Minute}
	for now, want := range map[time.Time]time.Duration{
		noon.Add(-time.Minute):         time.Minute,
		noon.Add(time.Hour):            0,
		time.Unix(0, 0):                2 * time.Minute, // no clock yet
		noon.Add(-2 * time.Minute):     2 * time.Minute,
		noon.Add(-time.Hour * 24 * 60): 2 * time.Minute,
	} {
		if got := u.Remaining(now); got != want {
			t.Errorf("at %v: %v, want %v", now, got, want)
		}
	}
}
