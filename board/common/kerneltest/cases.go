// Path of a case: a fresh lab ─▶ its scheduler and knobs ─▶ one connection ─▶ transfers, judged

package main

import (
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A proof does something and judges it. What it returns is for the record.
type proof func() (string, error)

var cases = []struct {
	name  string
	prove proof
}{
	{"the kernel offers its schedulers, and refuses others", offered},
	{"default: both of two equal links, up", on("default", func(_ *lab, c *connection) (string, error) {
		return judge(c.near, c.far, share(0.5, 0.25))
	})},
	{"roundrobin: two equal links, up", on("roundrobin", func(_ *lab, c *connection) (string, error) {
		return judge(c.near, c.far, share(0.5, 0.03))
	})},
	{"roundrobin: two equal links, down", on("roundrobin", func(_ *lab, c *connection) (string, error) {
		return judge(c.far, c.near, share(0.5, 0.03))
	})},
	{"roundrobin: ten segments a turn", on("roundrobin", tenSegments)},
	{"roundrobin: a backup link carries nothing, until it is the only one", backup("roundrobin")},
	{"weighted: 3 to 1, up", on("weighted", func(_ *lab, c *connection) (string, error) {
		return ranked(c.near, c.far, 3, 1, share(0.75, 0.05))
	})},
	{"weighted: 3 to 1, down", on("weighted", func(_ *lab, c *connection) (string, error) {
		return ranked(c.far, c.near, 3, 1, share(0.75, 0.05))
	})},
	{"weighted: 1 to 4, down", on("weighted", func(_ *lab, c *connection) (string, error) {
		return ranked(c.far, c.near, 1, 4, share(0.2, 0.05))
	})},
	{"weighted: 1 to 1, up", on("weighted", func(_ *lab, c *connection) (string, error) {
		return ranked(c.near, c.far, 1, 1, share(0.5, 0.05))
	})},
	{"weighted: weights changed on a live connection", on("weighted", func(_ *lab, c *connection) (string, error) {
		if _, err := ranked(c.near, c.far, 3, 1, share(0.75, 0.05)); err != nil {
			return "", err
		}
		return ranked(c.near, c.far, 1, 3, share(0.25, 0.05))
	})},
	{"weighted: a link that dies holds up nothing", on("weighted", func(l *lab, c *connection) (string, error) {
		return survive(l, c, 600*time.Millisecond)
	})},
	{"weighted: a backup link carries nothing, until it is the only one", backup("weighted")},
	{"firstfit: the second link idles below the first one's rate", on("firstfit", func(_ *lab, c *connection) (string, error) {
		return preferred(c.near, c.far, 10e6, share(1, 0.03))
	})},
	{"firstfit: both links above the first one's rate", on("firstfit", func(_ *lab, c *connection) (string, error) {
		return preferred(c.near, c.far, 30e6, share(0.65, 0.15))
	})},
	{"firstfit: the preferred link need not be the first, down", on("firstfit", func(_ *lab, c *connection) (string, error) {
		if err := errors.Join(rank(c.far, 0, 0, 2), rank(c.far, 1, 0, 1)); err != nil {
			return "", err
		}
		return judgeAt(c.far, c.near, 10e6, share(0, 0.03))
	})},
	{"firstfit: a backup link carries nothing, until it is the only one", backup("firstfit")},
	{"redundant: everything over both links, up", on("redundant", func(_ *lab, c *connection) (string, error) {
		return judge(c.near, c.far, everything)
	})},
	{"redundant: everything over both links, down", on("redundant", func(_ *lab, c *connection) (string, error) {
		return judge(c.far, c.near, everything)
	})},
	{"redundant: a link that dies makes no gap", on("redundant", func(l *lab, c *connection) (string, error) {
		return survive(l, c, 50*time.Millisecond)
	})},
	{"redundant: a backup link carries nothing, until it is the only one", backup("redundant")},
	{"one connection's own scheduler, changed while it lives", on("default", ownScheduler)},
	{"options with nonsense are refused", on("default", nonsense)},
}

// link is each of two equal links, unless a case says otherwise.
var link = shape{rate: 20e6, delay: 10 * time.Millisecond}

// bulk is the size of a transfer, in bytes.
const bulk = 6 << 20

func offered() (string, error) {
	l, err := newLab(link, link)
	if err != nil {
		return "", err
	}
	defer l.close()
	list, err := l.get("net/mptcp/available_schedulers")
	if err != nil {
		return "", err
	}
	const want = "default firstfit redundant roundrobin weighted"
	names := strings.Fields(list)
	if len(names) != len(strings.Fields(want)) {
		return "", fmt.Errorf("available_schedulers is %q; want %s, in any order", list, want)
	}
	for _, name := range strings.Fields(want) {
		if err := l.set("net/mptcp/scheduler", name); err != nil {
			return "", err
		}
		now, err := l.get("net/mptcp/scheduler")
		if err != nil {
			return "", err
		}
		if now != name {
			return "", fmt.Errorf("scheduler is %q after %s was chosen", now, name)
		}
	}
	return list, refused("a scheduler that is not there", l.set("net/mptcp/scheduler", "blest"), unix.ENOENT)
}

// refused wants that something failed, in a certain way.
func refused(what string, err, want error) error {
	switch {
	case err == nil:
		return fmt.Errorf("%s was not refused; want %w", what, want)
	case !errors.Is(err, want):
		return fmt.Errorf("%s gave %w; want %w", what, err, want)
	}
	return nil
}

// on makes a proof of f, with a connection over a fresh lab that runs a scheduler.
func on(scheduler string, f func(*lab, *connection) (string, error)) proof {
	return func() (string, error) { return run(scheduler, flagSubflow, f) }
}

func run(scheduler string, flags uint32, f func(*lab, *connection) (string, error)) (string, error) {
	l, err := newLab(link, link)
	defer l.close()
	if err != nil {
		return "", err
	}
	if err := l.set("net/mptcp/scheduler", scheduler); err != nil {
		return "", err
	}
	if err := l.endpoint(flags); err != nil {
		return "", err
	}
	c, err := l.open()
	if err != nil {
		return "", err
	}
	defer c.close()
	return f(l, c)
}

// A verdict says what is wrong with a transfer.
type verdict func(transfer) error

// judge sends in bulk.
func judge(from, to *net.TCPConn, v verdict) (string, error) { return judgeAt(from, to, 0, v) }

// judgeAt offers data at a rate in bit/s, or in bulk if it is 0.
func judgeAt(from, to *net.TCPConn, rate float64, v verdict) (string, error) {
	t, err := send(from, to, bulk, rate)
	if err != nil {
		return "", err
	}
	if err := v(t); err != nil {
		return "", fmt.Errorf("%w: %s", err, t)
	}
	return t.String(), nil
}

// share wants the first link to have carried that part of all bytes.
func share(want, margin float64) verdict {
	return func(t transfer) error {
		if math.Abs(t.share()-want) > margin {
			return fmt.Errorf("the first link's share is %.3f; want %.3f ± %.3f", t.share(), want, margin)
		}
		return nil
	}
}

// everything wants both links to have carried all data, but for a little that
// one of them was too late for.
func everything(t transfer) error {
	for i, n := range t.carried {
		if float64(n) < 0.95*float64(t.bytes) {
			return fmt.Errorf("link %d carried %d of %d bytes; want 95 %% at least", i+1, n, t.bytes)
		}
	}
	return nil
}

// tenSegments proves that the knob is heard: with turns of ten segments, what
// is written at once, in ten, goes over one link as a whole, and the next ten
// over the other.
func tenSegments(_ *lab, c *connection) (string, error) {
	const knob = "/sys/module/mptcp_rr/parameters/num_segments"
	was, err := os.ReadFile(knob)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(knob, []byte("10"), 0); err != nil {
		return "", err
	}
	defer os.WriteFile(knob, was, 0) //nolint:errcheck // the other cases set what they need
	const write = 10 * 1400          // ten segments, the last one not quite full
	var heard []string
	var last transfer
	for turn := range 4 {
		t, err := send(c.near, c.far, write, 0)
		if err != nil {
			return "", err
		}
		heard = append(heard, fmt.Sprintf("%d:%d", t.carried[0], t.carried[1]))
		if t.carried[0] != 0 && t.carried[1] != 0 || turn > 0 && (t.carried[0] == 0) == (last.carried[0] == 0) {
			return "", fmt.Errorf("writes of ten segments go over the links as %s bytes; want each over one link, the other one each time", strings.Join(heard, " "))
		}
		last = t
	}
	return "bytes over either link, by write: " + strings.Join(heard, " "), nil
}

// ranked gives the subflows of the sending end weights.
func ranked(from, to *net.TCPConn, first, second uint16, v verdict) (string, error) {
	if err := errors.Join(rank(from, 0, first, 0), rank(from, 1, second, 0)); err != nil {
		return "", err
	}
	return judge(from, to, v)
}

// preferred gives the subflows of the sending end preferences, the first link first.
func preferred(from, to *net.TCPConn, rate float64, v verdict) (string, error) {
	if err := errors.Join(rank(from, 0, 0, 1), rank(from, 1, 0, 2)); err != nil {
		return "", err
	}
	return judgeAt(from, to, rate, v)
}

// survive lets the first link swallow everything in the middle of a transfer at
// half a link's rate, and wants no gap in what arrives that is longer than limit.
func survive(l *lab, c *connection, limit time.Duration) (string, error) {
	broken := make(chan error, 1)
	time.AfterFunc(time.Second, func() {
		broken <- l.shape(1, shape{rate: link.rate, delay: link.delay, loss: 100})
	})
	t, err := send(c.near, c.far, bulk/2, float64(link.rate)/2)
	if err := errors.Join(err, <-broken); err != nil {
		return "", err
	}
	if t.gap > limit {
		return "", fmt.Errorf("the longest gap is %v; want %v at most: %s", t.gap, limit, t)
	}
	return t.String(), nil
}

// backup proves that a backup subflow carries nothing, and then everything once
// the other one is dead.
func backup(scheduler string) proof {
	return func() (string, error) {
		return run(scheduler, flagSubflow|flagBackup, func(l *lab, c *connection) (string, error) {
			for _, pair := range [][2]*net.TCPConn{{c.near, c.far}, {c.far, c.near}} {
				t, err := send(pair[0], pair[1], bulk/2, 0)
				if err != nil {
					return "", err
				}
				if t.carried[1] > 0 {
					return "", fmt.Errorf("the backup link carried data: %s", t)
				}
			}
			if err := l.shape(1, shape{rate: link.rate, delay: link.delay, loss: 100}); err != nil {
				return "", err
			}
			t, err := send(c.near, c.far, bulk/2, 0)
			if err != nil {
				return "", err
			}
			return t.String(), nil
		})
	}
}

// ownScheduler changes the scheduler of one end of one connection, between
// transfers and in one.
func ownScheduler(_ *lab, c *connection) (string, error) {
	if err := runs(c.far, "default"); err != nil {
		return "", err
	}
	if err := errors.Join(setScheduler(c.far, "weighted"), rank(c.far, 0, 1, 0), rank(c.far, 1, 4, 0)); err != nil {
		return "", err
	}
	weighted, err := judge(c.far, c.near, share(0.2, 0.05))
	if err != nil {
		return "", err
	}
	if err := setScheduler(c.far, "redundant"); err != nil {
		return "", err
	}
	if err := runs(c.far, "redundant"); err != nil {
		return "", err
	}
	copies, err := judge(c.far, c.near, everything)
	if err != nil {
		return "", err
	}
	stop, changed := make(chan struct{}), make(chan error, 1)
	go func() {
		names := []string{"roundrobin", "redundant", "firstfit", "default", "weighted", "redundant", "default"}
		for i := 0; ; i++ {
			if err := setScheduler(c.far, names[i%len(names)]); err != nil {
				changed <- err
				return
			}
			select {
			case <-stop:
				changed <- nil
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	t, err := send(c.far, c.near, bulk, 0)
	close(stop)
	if err := errors.Join(err, <-changed); err != nil {
		return "", err
	}
	return weighted + "; then " + copies + "; then " + t.String(), nil
}

// runs wants an end of a connection to have a scheduler.
func runs(end *net.TCPConn, want string) error {
	name, err := schedulerOf(end)
	if err != nil {
		return err
	}
	if name != want {
		return fmt.Errorf("the connection's scheduler is %q; want %s", name, want)
	}
	return nil
}

// nonsense sets what cannot be, and then what can.
func nonsense(_ *lab, c *connection) (string, error) {
	err := errors.Join(
		refused("a scheduler that is not there", setScheduler(c.near, "blest"), unix.ENOENT),
		refused("the rank of a subflow that is not there", setRank(c.near, subflowRank{id: 77, weight: 1}), unix.ENOENT),
		refused("a rank of three bytes", setOption(c.near, optSubflowRank, []byte{1, 2, 3}), unix.EINVAL),
		rank(c.near, 1, 7, 9),
	)
	if err != nil {
		return "", err
	}
	ranks, err := ranksOf(c.near)
	if err != nil {
		return "", err
	}
	if len(ranks) != 2 || ranks[0].weight != 0 || ranks[1].weight != 7 || ranks[1].preference != 9 {
		return "", fmt.Errorf("the ranks read back are %v", ranks)
	}
	return fmt.Sprintf("and ranks read back as {id weight preference} %v", ranks), nil
}
