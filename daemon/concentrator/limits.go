package concentrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"go.etcd.io/bbolt"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/kernel"
)

// restoreTime bounds putting the limits back.
const restoreTime = 5 * time.Second

const notRaised = "the kernel's limit of subflows was not raised (no CAP_NET_ADMIN?): with a stock limit, three uplinks of a router are used at most"

// raiseLimits lets the kernel accept as many subflows for a connection as a
// router has uplinks: a stock kernel accepts two besides the first. It returns
// what puts the limits back. Without the right to change them the concentrator
// works all the same, over three uplinks at most.
func raiseLimits(ctx context.Context, store *Store, log *slog.Logger) (restore func()) {
	k, err := kernel.NewConcentrator()
	if err != nil {
		log.Warn(notRaised, "error", err)
		return func() {}
	}
	defer func() { _ = k.Close() }()
	before, err := currentLimits(ctx, k)
	if info, errInfo := k.Info(); errInfo == nil && info.MPTCP == kernel.OutOfTree {
		return func() {} // it has no such limit
	}
	if err == nil && before == nil {
		log.Warn("this kernel has no MPTCP, or it is off: every session will be plain TCP over one uplink; see sysctl net.mptcp.enabled")
		return func() {}
	}
	restore = func() {
		if err := restoreLimits(store); err != nil {
			log.Warn("the kernel's limit of subflows was not put back; `concentratord cleanup` tries again", "error", err)
		}
	}
	if err == nil && before.Subflows >= desired.MaxEndpoints {
		return restore // what a killed daemon raised is still to be put back
	}
	if err == nil {
		// Stored first: what a killed daemon raised, cleanup puts back.
		err = store.setLimitsBefore(before)
	}
	if err == nil {
		err = k.Apply(ctx, []desired.Change{desired.SetLimits{Limits: desired.Limits{Subflows: desired.MaxEndpoints, AddAddrAccepted: before.AddAddrAccepted}}})
	}
	if err != nil {
		log.Warn(notRaised, "error", err)
		return func() {}
	}
	return restore
}

func currentLimits(ctx context.Context, k *kernel.Kernel) (*desired.Limits, error) {
	state, err := k.Read(ctx)
	if err != nil || state.MPTCP == nil || state.MPTCP.Sysctls["enabled"] == "0" {
		return nil, err
	}
	return &state.MPTCP.Limits, nil
}

// restoreLimits puts back what raiseLimits stored, if it did.
func restoreLimits(store *Store) error {
	before, err := store.limitsBefore()
	if err != nil || before == nil {
		return err
	}
	k, err := kernel.NewConcentrator()
	if err != nil {
		return err
	}
	defer func() { _ = k.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), restoreTime)
	defer cancel()
	if err := k.Apply(ctx, []desired.Change{desired.SetLimits{Limits: *before}}); err != nil {
		return err
	}
	return store.setLimitsBefore(nil)
}

// Cleanup undoes what a daemon that was killed left outside its state
// directory. A daemon that was stopped leaves nothing.
func Cleanup(_ context.Context, stateDir string, log *slog.Logger) error {
	store, err := OpenStore(stateDir)
	if errors.Is(err, ErrInUse) {
		return fmt.Errorf("the daemon is running: stop it first (%w)", err)
	}
	if err != nil {
		return err
	}
	defer func() { _ = store.Close() }()
	if err := restoreLimits(store); err != nil {
		return fmt.Errorf("putting back the kernel's MPTCP limits: %w", err)
	}
	k, err := kernel.NewConcentrator()
	if err != nil {
		return err
	}
	if err := errors.Join(cleanGateway(k, store), k.Close()); err != nil {
		return fmt.Errorf("taking away the packet path: %w", err)
	}
	if err := os.Remove(SocketPath(stateDir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	log.Info("nothing of the concentrator is left in the kernel", "state", stateDir)
	return nil
}

func (s *Store) limitsBefore() (limits *desired.Limits, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		text := tx.Bucket(bucketMeta).Get(keyLimits)
		if text == nil {
			return nil
		}
		limits = new(desired.Limits)
		return json.Unmarshal(text, limits)
	})
	return limits, err
}

// setLimitsBefore remembers the limits of before, unless earlier ones are still
// to be put back; nil forgets them.
func (s *Store) setLimitsBefore(limits *desired.Limits) error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if limits == nil {
			return meta.Delete(keyLimits)
		}
		if meta.Get(keyLimits) != nil {
			return nil
		}
		return putJSON(meta, keyLimits, limits)
	})
}
