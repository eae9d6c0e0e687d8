package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/settings"
	"sheaf/webui"
)

var update = flag.Bool("update", false, "write what sheafctl does now into testdata")

// fakeRouter is a daemon as the section "daemon" of a case describes it.
type fakeRouter struct {
	State    webui.Status
	Listed   []webui.Flows  // one after the other, and then the daemon ends
	Happened []webui.Events // likewise
	Stored   []settings.Revision
	Found    webui.Diagnosis
	Tried    *settings.Unconfirmed
	Pending  string
	Refusal  *webui.Error
	Problems []settings.Problem
	asked    string
}

func (f *fakeRouter) err() error {
	switch {
	case f.Pending != "":
		return &webui.NotYet{Reason: f.Pending}
	case f.Refusal != nil:
		return f.Refusal
	case f.Problems != nil:
		return &settings.Invalid{Problems: f.Problems}
	}
	return nil
}

func (f *fakeRouter) Status(context.Context) (webui.Status, error) { return f.State, f.err() }

func (f *fakeRouter) Settings(context.Context) (settings.Revision, error) {
	return f.Stored[0], f.err()
}

func (f *fakeRouter) Revisions(context.Context) ([]settings.Revision, error) {
	return f.Stored, f.err()
}

func (f *fakeRouter) Unconfirmed(context.Context) (*settings.Unconfirmed, error) { return f.Tried, nil }

func (f *fakeRouter) Apply(_ context.Context, s settings.Settings, edit webui.Edit) (settings.Revision, error) {
	f.asked = fmt.Sprintf("apply by %s%s:\n%s", edit.Author, strings.TrimSuffix(fmt.Sprintf(" for %v", edit.Confirm), " for 0s"), s.YAML())
	return settings.Revision{Number: 7, Time: time.Unix(0, 0).UTC(), Author: edit.Author, Settings: s}, f.err()
}

func (f *fakeRouter) SetUplink(_ context.Context, name string, change webui.UplinkChange, edit webui.Edit) (settings.Revision, error) {
	b, _ := json.Marshal(change)
	f.asked = fmt.Sprintf("set %q to %s by %s\n", name, b, edit.Author)
	return settings.Revision{Number: 8}, f.err()
}

func (f *fakeRouter) SetMultipath(_ context.Context, change webui.MultipathChange, edit webui.Edit) (settings.Revision, error) {
	b, _ := json.Marshal(change)
	f.asked = fmt.Sprintf("multipath %s by %s\n", b, edit.Author)
	return settings.Revision{Number: 9}, f.err()
}

func (f *fakeRouter) Confirm(_ context.Context, revision uint64) (settings.Revision, error) {
	f.asked = fmt.Sprintf("confirm %d\n", revision)
	return settings.Revision{Number: revision}, f.err()
}

func (f *fakeRouter) TakeBack(_ context.Context, author string) (settings.Revision, error) {
	f.asked = fmt.Sprintf("take back by %s\n", author)
	return settings.Revision{Number: 10}, f.err()
}

func (f *fakeRouter) Diagnose(context.Context) (webui.Diagnosis, error) { return f.Found, f.err() }

func (f *fakeRouter) History(context.Context, string, time.Duration, time.Duration) (webui.History, error) {
	return webui.History{}, errors.New("no command asks for this")
}

func (f *fakeRouter) Flows(_ context.Context, limit int) (webui.Flows, error) {
	f.asked += fmt.Sprintf("%d flows\n", limit)
	return next(&f.Listed, f.err())
}

// next takes the first of list.
func next[T any](list *[]T, err error) (first T, _ error) {
	if len(*list) == 0 {
		return first, &webui.Error{Code: webui.CodeStopping, Detail: "the daemon is stopping"}
	}
	first, *list = (*list)[0], (*list)[1:]
	return first, err
}

func (f *fakeRouter) Events(_ context.Context, after uint64, wait time.Duration) (webui.Events, error) {
	f.asked += fmt.Sprintf("events after %d, waiting %v\n", after, wait)
	return next(&f.Happened, f.err())
}

func (f *fakeRouter) Join(_ context.Context, token string) (webui.Joined, error) {
	f.asked = fmt.Sprintf("join %q\n", token)
	return webui.Joined{Concentrator: "fra1", Address: "192.0.2.1:4443", Fingerprint: "SHA256:f00d"}, f.err()
}

// startDaemon serves the router on a real socket for as long as the test runs.
func startDaemon(t *testing.T, r webui.Router) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sheaf") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	ln, err := webui.ListenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	db, err := bbolt.Open(filepath.Join(dir, "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	access, err := webui.OpenAccess(db, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- webui.Serve(ctx, ln, webui.NewRouterHandler(r, access, slog.New(slog.DiscardHandler))) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// TestCommands runs every case in testdata. A case is one file, input and
// expected output side by side:
//
//	args    one per line; --socket comes first unless the daemon is "none"
//	stdin   if the command is to read it
//	daemon  the router as JSON, or "none" for a socket that does not exist
//	asked   what the daemon was asked to change
//	stdout, stderr, exit
func TestCommands(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			input, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			names, in := sections(t, string(input))

			var router fakeRouter
			socket := filepath.Join("testdata", "none.sock")
			if in["daemon"] != "none\n" {
				d := json.NewDecoder(strings.NewReader(in["daemon"]))
				d.DisallowUnknownFields()
				if err := d.Decode(&router); err != nil {
					t.Fatalf("section daemon: %v", err)
				}
				socket = startDaemon(t, &router)
			}
			args := append([]string{"--socket", socket}, strings.Split(strings.TrimSuffix(in["args"], "\n"), "\n")...)
			var stdout, stderr bytes.Buffer
			code := run(args, strings.NewReader(in["stdin"]), &stdout, &stderr)

			got := map[string]string{"asked": router.asked, "stdout": stdout.String(), "stderr": stderr.String(), "exit": fmt.Sprintln(code)}
			var out strings.Builder
			for _, name := range names {
				text, isOutput := got[name]
				if !isOutput {
					text = in[name]
				}
				delete(got, name)
				fmt.Fprintf(&out, "-- %s --\n%s", name, text)
			}
			for name, text := range got {
				if text != "" {
					t.Errorf("there is no section %s for\n%s", name, text)
				}
			}
			if out.String() == string(input) {
				return
			}
			if *update {
				if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			t.Errorf("got\n%s\nwant\n%s", out.String(), input)
		})
	}
}

// sections splits a case at its lines "-- name --".
func sections(t *testing.T, text string) (names []string, content map[string]string) {
	t.Helper()
	content = map[string]string{}
	for line := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(line, "-- "); ok && strings.HasSuffix(name, " --\n") {
			names = append(names, strings.TrimSuffix(name, " --\n"))
			continue
		}
		if len(names) == 0 {
			t.Fatalf("text before the first section: %q", line)
		}
		content[names[len(names)-1]] += line
	}
	for _, name := range []string{"args", "daemon", "exit"} {
		if !slices.Contains(names, name) {
			t.Fatalf("there is no section %s", name)
		}
	}
	return names, content
}

func TestUsage(t *testing.T) {
	for _, args := range []string{
		"", "bogus", "statu", "uplink", "uplink bogus", "help bogus", "--bogus", "status --bogus", "--socket",
		"status extra", "uplinks extra", "version extra", "version -o xml",
		"join", "join a b", "join -", "apply", "apply -f", "apply -f - extra",
		"multipath bogus", "multipath set", "multipath set default", "multipath set --scheduler", "multipath set --syn-retries x", "multipath set --checksum=maybe",
		"flows extra", "flows --limit 0", "flows --limit 10001", "events extra",
		"apply --confirm 0s -f x", "apply --confirm 1500ms -f x", "apply --confirm 2h -f x", "confirm 7", "export x", "diag x", "diff", "diff x", "revisions x",
		"password x", "rollback", "rollback last", "rollback 0", "rollback 1 2", "rollback 1 --confirm 1ms",
		"uplink set", "uplink set lte", "uplink set lte --mode fast", "uplink set lte dsl --mode on",
	} {
		var stdout, stderr bytes.Buffer
		code := run(strings.Fields(args), strings.NewReader(" \n"), &stdout, &stderr)
		if code != exitUsage || stdout.Len() > 0 || !strings.Contains(stderr.String(), "--help' for usage\n") {
			t.Errorf("sheafctl %s: exit %d, stdout %q, stderr %q", args, code, stdout.String(), stderr.String())
		}
	}
	for _, args := range []string{"help", "--help", "help uplink set", "uplink set -h", "apply --help"} {
		var stdout, stderr bytes.Buffer
		code := run(strings.Fields(args), nil, &stdout, &stderr)
		if code != exitOK || stderr.Len() > 0 || !strings.Contains(stdout.String(), "Usage:\n") {
			t.Errorf("sheafctl %s: exit %d, stdout %q, stderr %q", args, code, stdout.String(), stderr.String())
		}
	}
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, unix.ENOSPC }

func TestFilesAndStreamsThatFail(t *testing.T) {
	socket := startDaemon(t, &fakeRouter{})
	var stderr bytes.Buffer
	if code := run([]string{"version"}, nil, fullDisk{}, &stderr); code != exitFailed || !strings.Contains(stderr.String(), "no space left") {
		t.Errorf("full disk: exit %d, %s", code, stderr.String())
	}
	for name, test := range map[string]struct {
		args  []string
		stdin io.Reader
		want  string
	}{
		"no such file":  {[]string{"apply", "-f", "testdata/none.yaml"}, nil, "testdata/none.yaml: no such file"},
		"a directory":   {[]string{"apply", "-f", "testdata"}, nil, "is a directory"},
		"endless file":  {[]string{"apply", "-f", "/dev/zero"}, nil, "longer than 1048576 bytes"},
		"endless token": {[]string{"join", "-"}, strings.NewReader(strings.Repeat("x", maxToken+1)), "longer than 16384 bytes"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(append(test.args, "--socket", socket), test.stdin, &stdout, &stderr)
		if code != exitFailed || stdout.Len() > 0 || !strings.Contains(stderr.String(), test.want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q", name, code, stdout.String(), stderr.String())
		}
	}
}

// What the parser refuses reaches the terminal as FILE:line: path: reason.
func TestApplyNamesTheLine(t *testing.T) {
	socket := startDaemon(t, &fakeRouter{})
	good, err := os.ReadFile("testdata/settings.yaml")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "bad.yaml")
	bad := strings.Replace(string(good), "mode: backup", "mode: fast", 1)
	if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	line := 1 + strings.Count(bad[:strings.Index(bad, "mode: fast")], "\n")
	for stdin, args := range map[io.Reader][]string{
		nil:                    {"apply", "-f", file},
		strings.NewReader(bad): {"apply", "-f", "-"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(append(args, "--socket", socket), stdin, &stdout, &stderr)
		name := file
		if stdin != nil {
			name = "<stdin>"
		}
		want := name + ":" + strconv.Itoa(line) + ": uplinks[1].mode: "
		if code != exitFailed || !strings.HasPrefix(stderr.String(), want) || stdout.Len() > 0 {
			t.Errorf("exit %d, stdout %q, stderr %q, want %q", code, stdout.String(), stderr.String(), want)
		}
	}
}

// Colour is for a terminal whose user has not refused it.
func TestColor(t *testing.T) {
	socket := startDaemon(t, &fakeRouter{State: webui.Status{
		Tunnel:  webui.TunnelStatus{State: "degraded"},
		Uplinks: []webui.UplinkStatus{{Name: "dsl", State: "carrying"}, {Name: "lte", State: "absent"}},
	}})
	t.Setenv("TERM", "xterm")
	for name, test := range map[string]struct {
		noColor string
		want    bool
	}{
		"terminal":               {"", true},
		"terminal with NO_COLOR": {"1", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NO_COLOR", test.noColor)
			master, slave := openTerminal(t)
			if code := run([]string{"status", "--socket", socket}, nil, slave, io.Discard); code != exitOK {
				t.Fatalf("exit %d", code)
			}
			slave.Close()
			out, err := io.ReadAll(master)
			if err != nil && !errors.Is(err, unix.EIO) { // what reads a terminal that has been closed
				t.Fatal(err)
			}
			for _, painted := range []string{"\x1b[33mdegraded\x1b[0m", "\x1b[32mcarrying\x1b[0m", "\x1b[31mabsent\x1b[0m"} {
				if strings.Contains(string(out), painted) != test.want {
					t.Errorf("%q in the output: want %v\n%q", painted, test.want, out)
				}
			}
		})
	}
	t.Run("pipe", func(t *testing.T) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		run([]string{"status", "--socket", socket}, nil, w, io.Discard)
		w.Close()
		out, err := io.ReadAll(r)
		if err != nil || !bytes.Contains(out, []byte("degraded")) || bytes.ContainsRune(out, '\x1b') {
			t.Errorf("%v, %q", err, out)
		}
	})
}

// On a terminal a live list stays in its place, and is no longer than that.
func TestFollowingOnATerminal(t *testing.T) {
	flow := webui.Flow{Client: "192.168.1.7:4000", Destination: "203.0.113.9:80", Through: "tunnel"}
	list := webui.Flows{Total: 20, Flows: slices.Repeat([]webui.Flow{flow}, 20)}
	socket := startDaemon(t, &fakeRouter{Listed: []webui.Flows{list, list}})
	master, slave := openTerminal(t)
	if err := unix.IoctlSetWinsize(int(slave.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 6, Col: 80}); err != nil {
		t.Fatal(err)
	}
	if code := run([]string{"flows", "-f", "--socket", socket}, nil, slave, io.Discard); code != exitFailed {
		t.Errorf("exit %d", code)
	}
	slave.Close()
	out, err := io.ReadAll(master)
	if err != nil && !errors.Is(err, unix.EIO) { // what reads a terminal that has been closed
		t.Fatal(err)
	}
	screens := strings.Split(string(out), "\x1b[H\x1b[J")
	if len(screens) != 3 || screens[0] != "" || screens[1] != screens[2] || strings.Count(screens[1], "\n") != 5 ||
		!strings.HasPrefix(screens[1], "CLIENT ") || strings.Count(screens[1], flow.Client) != 4 {
		t.Errorf("%q", screens)
	}
}

func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

func TestHumanize(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_949: "999.9 kB", 999_950: "1.0 MB", 48_200_000: "48.2 MB",
		1.25e9: "1.2 GB", 1.8446744073709552e19: "18.4 EB",
	} {
		if got := humanize(v, "B"); got != want {
			t.Errorf("%v: got %s, want %s", v, got, want)
		}
	}
	for v, want := range map[float64]string{0: "0.0%", 0.0001: "<0.1%", 0.0005: "0.1%", 0.125: "12.5%", 1: "100.0%"} {
		if got := percent(&v); got != want {
			t.Errorf("%v: got %s, want %s", v, got, want)
		}
	}
	for v, want := range map[float64]string{0: "0.0 ms", 99.94: "99.9 ms", 99.96: "100 ms", 1234.5: "1234 ms"} {
		if got := milliseconds(&v); got != want {
			t.Errorf("%v: got %s, want %s", v, got, want)
		}
	}
}
