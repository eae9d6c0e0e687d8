package router

// The path of the state through a disk that fails:
//
//	every revision and enrolment ─▶ a copy of the whole file beside it, the last three kept
//	start ─▶ openWhole: is every page in order? ─▶ if not the daemon refuses
//	sheafd recover ─▶ the newest copy that is in order ─▶ state.db, the damaged one kept

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/settings"
)

const (
	stateFile  = "state.db"
	copyDir    = "copies"
	copiesKept = 3
	copySuffix = ".db"
)

var (
	errInUse   = errors.New("another sheafd runs on this state directory")
	errDamaged = errors.New("the file is damaged")
)

// openWhole opens a database after a look at every page of it.
func openWhole(path string, options bbolt.Options) (db *bbolt.DB, err error) {
	// A file that is shorter than its pages say is a fault of memory, as it is mapped.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	var file *os.File
	defer func() {
		if v := recover(); v != nil {
			db, err = nil, fmt.Errorf("%w: %v", errDamaged, v)
			// Nothing else gives the lock back: a bbolt that has panicked cannot be closed.
			if file != nil {
				err = errors.Join(err, unix.Flock(int(file.Fd()), unix.LOCK_UN), file.Close())
			}
		}
	}()
	options.Timeout = time.Second
	options.OpenFile = func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
		file, err = os.OpenFile(name, flag, mode)
		return file, err
	}
	db, err = bbolt.Open(path, 0o600, &options)
	switch {
	case errors.Is(err, bbolterrors.ErrTimeout):
		return nil, errInUse
	case errors.As(err, new(*fs.PathError)):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	err = db.View(func(tx *bbolt.Tx) error {
		if info, err := os.Stat(path); err != nil || info.Size() < tx.Size() {
			return errors.Join(err, fmt.Errorf("it has %d bytes of %d", info.Size(), tx.Size()))
		}
		var found []error
		for err := range tx.Check() {
			found = append(found, err)
		}
		return errors.Join(found...)
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, errors.Join(err, db.Close()))
	}
	return db, nil
}

// keepCopy puts a copy of the state beside it, as of its newest revision.
func (s *state) keepCopy(dir string) error {
	current, err := s.settings.Current()
	if err != nil {
		return err
	}
	dir = filepath.Join(dir, copyDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// The number orders them by name.
	path := filepath.Join(dir, fmt.Sprintf("%020d%s", current.Number, copySuffix))
	if err := writeWhole(path, func(f *os.File) error {
		return s.db.View(func(tx *bbolt.Tx) error { _, err := tx.WriteTo(f); return err })
	}); err != nil {
		return err
	}
	list, err := copies(dir)
	if err != nil {
		return err
	}
	for _, old := range list[min(copiesKept, len(list)):] {
		if err := os.Remove(old); err != nil {
			return err
		}
	}
	return nil
}

// writeWhole puts a file to its place when all of it is on the disk.
func writeWhole(path string, write func(*os.File) error) (err error) {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// copies lists those in a directory, the newest first.
func copies(dir string) (list []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), copySuffix) {
			list = append(list, filepath.Join(dir, e.Name()))
		}
	}
	slices.Sort(list)
	slices.Reverse(list)
	return list, err
}

// Recovered is what Recover has done.
type Recovered struct {
	// Revision is the newest that there is again; Damaged is where the damaged file
	// is kept, empty if there was none.
	Revision settings.Revision
	Damaged  string
}

// ErrInOrder says that there is nothing to recover.
var ErrInOrder = errors.New("the state is in order, there is nothing to recover")

// Recover puts the newest copy that is in order to the place of a damaged state.
func Recover(dir string, now time.Time) (Recovered, error) {
	path := filepath.Join(dir, stateFile)
	st, err := openState(dir)
	if err == nil {
		return Recovered{}, errors.Join(ErrInOrder, st.db.Close())
	}
	if !errors.Is(err, errDamaged) {
		return Recovered{}, err
	}
	list, err := copies(filepath.Join(dir, copyDir))
	if err != nil {
		return Recovered{}, err
	}
	var bad []error
	for _, from := range list {
		revision, err := readCopy(from)
		if err != nil {
			bad = append(bad, fmt.Errorf("%s: %w", from, err))
			continue
		}
		done := Recovered{Revision: revision, Damaged: fmt.Sprintf("%s.damaged-%s", path, now.UTC().Format("20060102-150405"))}
		if err := os.Rename(path, done.Damaged); err != nil {
			return Recovered{}, err
		}
		return done, writeWhole(path, func(f *os.File) error {
			source, err := os.Open(from)
			if err != nil {
				return err
			}
			_, err = f.ReadFrom(source)
			return errors.Join(err, source.Close())
		})
	}
	return Recovered{}, errors.Join(append(bad, fmt.Errorf("no copy in %s is in order: remove %s to begin anew, and join the concentrator again",
		filepath.Join(dir, copyDir), path))...)
}

// readCopy returns the newest revision of a copy that is in order.
func readCopy(path string) (settings.Revision, error) {
	db, err := openWhole(path, bbolt.Options{ReadOnly: true})
	if err != nil {
		return settings.Revision{}, err
	}
	defer func() { _ = db.Close() }()
	store, err := settings.Open(db)
	if err != nil {
		return settings.Revision{}, err
	}
	return store.Current()
}
