package settings

import (
	"errors"
	"fmt"
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
	if err != nil || current.Number != 0 || cmp.Diff(current.Settings, Default()) != "" {
		t.Errorf("empty store: %+v, %v", current, err)
	}

	first, err := store.Put(numbered(1), "anna", noon)
	if err != nil || first.Number != 1 || first.Author != "anna" || !first.Time.Equal(noon) {
		t.Fatalf("first Put: %+v, %v", first, err)
	}
	same := numbered(1)
	same.Uplinks = nil // means the same as an empty list
	if again, err := store.Put(same, "bert", noon.Add(time.Hour)); err != nil || cmp.Diff(first, again) != "" {
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
	if current, err := store.Current(); err != nil || cmp.Diff(first, current) != "" {
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
	if err != nil || back.Number != 3 || cmp.Diff(back.Settings, first.Settings) != "" {
		t.Errorf("going back: %+v, %v", back, err)
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
		"newer version of Sheaf (schema 2, this one reads 1)": func(b *bbolt.Bucket) error {
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
