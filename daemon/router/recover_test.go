package router

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"sheaf/daemon/control/settings"
)

// filled makes a state of a few revisions and their copies, and returns its directory
// and the newest.
func filled(t *testing.T, revisions int) (dir string, newest settings.Revision) {
	t.Helper()
	dir = t.TempDir()
	st, err := openState(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range revisions {
		s := settings.Default()
		s.LAN.Interfaces = []string{"lan0"}
		s.Multipath.SYNRetries = i % 10
		if newest, err = st.settings.Put(s, "anna", time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := st.keepCopy(dir); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.db.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, newest
}

func change(t *testing.T, path string, how func([]byte) []byte) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, how(text), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func zero(from, to int) func([]byte) []byte {
	return func(b []byte) []byte { clear(b[from:min(to, len(b))]); return b }
}

// current opens the state and returns the newest revision and the key.
func current(t *testing.T, dir string) (settings.Revision, []byte, error) {
	t.Helper()
	st, err := openState(dir)
	if err != nil {
		return settings.Revision{}, nil, err
	}
	defer func() { _ = st.db.Close() }()
	revision, err := st.settings.Current()
	return revision, st.identity.Seed(), err
}

func TestRecover(t *testing.T) {
	page := os.Getpagesize()
	for name, test := range map[string]struct {
		damage func([]byte) []byte
		copies int // of the newest, how many are damaged as well
		want   uint64
	}{
		"cut in half":            {func(b []byte) []byte { return b[:len(b)/2/page*page] }, 0, 5},
		"cut to nothing":         {func([]byte) []byte { return nil }, 0, 5},
		"no database":            {func(b []byte) []byte { return []byte(strings.Repeat("no database\n", len(b)/12)) }, 0, 5},
		"both heads gone":        {zero(0, 2*page), 0, 5},
		"all but the heads gone": {zero(2*page, 1<<30), 0, 5},
		"the newest copy too":    {zero(2*page, 1<<30), 1, 4},
		"every copy":             {zero(2*page, 1<<30), 3, 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir, _ := filled(t, 5)
			_, seed, err := current(t, dir)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, stateFile)
			change(t, path, test.damage)
			damaged, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			list, err := copies(filepath.Join(dir, copyDir))
			if err != nil || len(list) != copiesKept {
				t.Fatalf("copies: %v, %v", list, err)
			}
			for _, path := range list[:test.copies] {
				change(t, path, test.damage)
			}

			if _, _, err := current(t, dir); err == nil || !strings.Contains(err.Error(), "run `sheafd recover --state-dir "+dir+"`") {
				t.Errorf("the damaged state: %v", err)
			}
			done, err := Recover(dir, time.Now())
			if test.want == 0 {
				if err == nil || !strings.Contains(err.Error(), "to begin anew") {
					t.Errorf("recovered from nothing: %+v, %v", done, err)
				}
				return
			}
			if err != nil || done.Revision.Number != test.want {
				t.Fatalf("recovered: %+v, %v; want revision %d", done, err, test.want)
			}
			if kept, err := os.ReadFile(done.Damaged); err != nil || !slices.Equal(kept, damaged) {
				t.Errorf("the damaged file is not kept: %v", err)
			}
			revision, again, err := current(t, dir)
			if err != nil || revision.Number != test.want || !slices.Equal(seed, again) {
				t.Errorf("afterwards: revision %d, %v, the same key: %v", revision.Number, err, slices.Equal(seed, again))
			}
			if _, err := Recover(dir, time.Now()); !errors.Is(err, ErrInOrder) {
				t.Errorf("recovered again: %v", err)
			}
		})
	}
}

// Whatever a disk makes of a block, the daemon starts with what it had or refuses with
// one sentence; it neither dies nor begins anew.
func TestDamagedBlocks(t *testing.T) {
	dir, newest := filled(t, 30)
	path := filepath.Join(dir, stateFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	refused := 0
	for range 300 {
		text := slices.Clone(whole)
		const block = 512
		at := random.IntN(len(text)/block) * block
		for i := range block {
			text[at+i] = byte(random.Uint32())
		}
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		revision, _, err := current(t, dir)
		switch {
		case err != nil && strings.Contains(err.Error(), "sheafd recover"):
			refused++
		case err != nil || revision.Number != newest.Number:
			t.Fatalf("block at %d: revision %d, want %d; %v", at, revision.Number, newest.Number, err)
		}
	}
	t.Logf("refused %d of 300", refused)
	if refused < 20 {
		t.Errorf("only %d of 300 damaged blocks were noticed: this test proves nothing", refused)
	}
}

// The database of a later version is neither damaged nor replaced.
func TestStateOfALaterVersion(t *testing.T) {
	dir, _ := filled(t, 2)
	path := filepath.Join(dir, stateFile)
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(func(tx *bbolt.Tx) error { return tx.Bucket([]byte("settings")).Put([]byte("schema"), []byte("99")) }); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	_, _, err = current(t, dir)
	_, recoverErr := Recover(dir, time.Now())
	for _, err := range []error{err, recoverErr} {
		if !errors.Is(err, settings.ErrNewer) || strings.Contains(err.Error(), "sheafd recover") {
			t.Errorf("a later version's state: %v", err)
		}
	}
}
