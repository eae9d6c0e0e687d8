package deploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sheaf/daemon/control/settings"
	"sheaf/webui"
)

// Settings that are tried go back by themselves, also when the daemon was killed
// meanwhile and starts behind the deadline, and stay when they are confirmed. A
// transfer does not notice.
func TestSafeMode(t *testing.T) {
	w := up(t)
	first := shown[webui.Status](w, "status").Settings.Revision
	on := w.Settings("")
	off, err := w.File("off.yaml", strings.Replace(on, "interface: wan2, mode: on", "interface: wan2, mode: off", 1))
	w.need(err)
	isOff := func(u webui.UplinkStatus) bool { return u.State == "off" }
	carries := func(u webui.UplinkStatus) bool { return u.State == "carrying" && u.Subflows > 0 }
	// newest is the last revision, and how many there are.
	newest := func() (webui.RevisionSummary, int) {
		t.Helper()
		list := shown[[]webui.RevisionSummary](w, "revisions")
		return list[0], len(list)
	}
	try := func(wait string) webui.Revision {
		t.Helper()
		before, _ := newest()
		made := shown[webui.Revision](w, "apply", "-f", off, "--confirm", wait)
		if u := made.Unconfirmed; u == nil || u.Revision != made.Number || u.BackTo != before.Number || made.Number != before.Number+1 {
			t.Fatalf("behind revision %d: revision %d, unconfirmed %+v", before.Number, made.Number, u)
		}
		w.untilUplink(2, "is off", isOff)
		return made
	}
	back := func(tried webui.Revision) {
		t.Helper()
		w.untilUplink(2, "carries", carries)
		last, _ := newest()
		want := []settings.Change{{Path: "uplinks[uplink2].mode", From: "off", To: "on"}}
		if last.Number != tried.Number+1 || last.Author != "safe mode" || !slices.Equal(last.Changes, want) {
			t.Errorf("after revision %d was not confirmed: %+v", tried.Number, last)
		}
		if s := shown[webui.Status](w, "status").Settings; s.Unconfirmed != nil || s.Revision != last.Number {
			t.Errorf("afterwards: %+v", s)
		}
	}

	d := w.startDownload(1e9)
	w.progress(d, 2e6)
	tried := try("5s")
	for what, arguments := range map[string][]string{
		"another change":    {"uplink", "set", "uplink1", "--mode", "backup"},
		"a rollback":        {"rollback", fmt.Sprint(first)},
		"another trial":     {"apply", "-f", w.must1(w.File("on.yaml", on)), "--confirm", "9s"},
		"changed otherwise": {"multipath", "set", "--checksum=true"},
	} {
		if _, err := w.Sheafctl(arguments...); err == nil || !strings.Contains(err.Error(), "sheafctl confirm") {
			t.Errorf("%s while settings are unconfirmed: %v", what, err)
		}
	}
	back(tried)
	w.progress(d, 2e6)
	events := shown[[]webui.Event](w, "events")
	for _, text := range []string{
		fmt.Sprintf("revision %d by socket, taken back after 5s unless it is confirmed", tried.Number),
		fmt.Sprintf("revision %d by safe mode: nobody has confirmed revision %d, the settings of revision %d are back", tried.Number+1, tried.Number, first),
	} {
		if !slices.ContainsFunc(events, func(e webui.Event) bool { return e.Kind == "settings" && e.Text == text }) {
			t.Errorf("no event tells %q: %+v", text, events)
		}
	}

	tried = try("1h")
	_, err = w.Sheafctl("confirm", "--no")
	w.need(err)
	w.untilUplink(2, "carries", carries)
	if last, _ := newest(); last.Number != tried.Number+1 || last.Author != "socket" {
		t.Errorf("taken back by hand: %+v", last)
	}

	tried = try("3s")
	w.need(w.Router.Kill())
	time.Sleep(time.Until(tried.Unconfirmed.Deadline) + 100*time.Millisecond)
	w.need(w.StartRouter(""))
	back(tried)

	// Whoever starts it with a file has not confirmed what was before.
	try("1h")
	w.need(w.Router.Kill())
	w.need(w.StartRouter(on))
	w.untilUplink(2, "carries", carries)
	if s := shown[webui.Status](w, "status").Settings; s.Unconfirmed != nil {
		t.Errorf("after a start with a file: %+v", s)
	}

	tried = try("3s")
	_, err = w.Sheafctl("confirm")
	w.need(err)
	time.Sleep(time.Until(tried.Unconfirmed.Deadline) + 500*time.Millisecond)
	stays := func(when string) {
		t.Helper()
		if last, _ := newest(); last.Number != tried.Number {
			t.Errorf("%s revision %d is followed by %+v", when, tried.Number, last)
		}
		w.untilUplink(2, "is off", isOff)
	}
	stays("confirmed,")
	w.need(w.Router.Stop(15 * time.Second))
	w.need(w.StartRouter(""))
	stays("confirmed, and after a restart,")
	if _, err := w.Sheafctl("confirm"); err == nil || !strings.Contains(err.Error(), "no settings wait") {
		t.Errorf("confirmed again: %v", err)
	}

	rolled := shown[webui.Revision](w, "rollback", fmt.Sprint(first))
	w.untilUplink(2, "carries", carries)
	text, err := w.Sheafctl("revisions")
	w.need(err)
	t.Logf("revisions, the last by rollback:\n%s", text)
	exported, err := w.Sheafctl("export")
	w.need(err)
	file, err := w.File("exported.yaml", exported)
	w.need(err)
	if out, err := w.Sheafctl("diff", "-f", file); err != nil || out != "" {
		t.Errorf("what was exported differs from what is in force: %q, %v", out, err)
	}

	// Whoever has not seen the last change does not undo it unknowingly.
	status, answer := w.request(http.MethodPatch, "/api/v1/multipath", `{"checksum":true}`, fmt.Sprintf(`"%d"`, tried.Number))
	if status != http.StatusPreconditionFailed || !strings.Contains(answer, `"code":"revision_stale"`) || !strings.Contains(answer, "uplinks[uplink2].mode") {
		t.Errorf("a stale change: %d %s", status, answer)
	}
	status, answer = w.request(http.MethodPatch, "/api/v1/multipath", `{"checksum":true}`, fmt.Sprintf(`"%d"`, rolled.Number))
	if status != http.StatusOK {
		t.Errorf("a fresh change: %d %s", status, answer)
	}
}

// must1 is the one value of a call that may not fail.
func (w *world) must1(value string, err error) string {
	w.t.Helper()
	w.need(err)
	return value
}

// request changes something by the router's API, from a revision.
func (w *world) request(method, path, body, ifMatch string) (status int, answer string) {
	w.t.Helper()
	request, err := http.NewRequest(method, "http://sheaf"+path, strings.NewReader(body))
	w.need(err)
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("If-Match", ifMatch)
	response, err := overSocket(w.Socket()).Do(request)
	w.need(err)
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	w.need(err)
	return response.StatusCode, string(text)
}

// get reads something from the router's API.
func (w *world) get(path string, v any) error {
	response, err := overSocket(w.Socket()).Get("http://sheaf" + path)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	return json.NewDecoder(response.Body).Decode(v)
}

// overSocket speaks HTTP to the daemon on a socket.
func overSocket(socket string) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
}

// A daemon killed at any moment of any change has every change that it has ever
// acknowledged, and at most the one more that was under way.
func TestKillLosesNothingAcknowledged(t *testing.T) {
	const kills = 200
	w := newWorld(t)
	w.need(w.StartRouter(w.Settings("")))
	random := rand.New(rand.NewPCG(5, 6))
	client := webui.NewClient(w.Socket())
	acknowledged, err := client.Settings(t.Context())
	w.need(err)
	changes, underWay := 0, 0
	for range kills {
		// From when it answers until when it may have made some ten changes.
		time.AfterFunc(time.Duration(random.Int64N(int64(60*time.Millisecond))), func() { _ = w.Router.Kill() })
		asked := acknowledged
		for {
			retries := (acknowledged.Settings.Multipath.SYNRetries + 1) % 10
			asked.Settings.Multipath.SYNRetries = retries
			made, err := client.SetMultipath(context.Background(), webui.MultipathChange{SYNRetries: &retries})
			if err != nil {
				if coded := (*webui.Error)(nil); errors.As(err, &coded) && coded.Code != webui.CodeStopping {
					t.Fatalf("the daemon refused: %v", err)
				}
				break
			}
			acknowledged = made
			changes++
		}
		<-w.Router.Done()
		w.need(w.StartRouter(""))
		found, err := client.Settings(t.Context())
		w.need(err)
		switch {
		case found.Number == acknowledged.Number && found.Settings.Multipath == acknowledged.Settings.Multipath:
		case found.Number == acknowledged.Number+1 && found.Settings.Multipath == asked.Settings.Multipath:
			acknowledged = found
			underWay++
		default:
			t.Fatalf("acknowledged was revision %d with %d SYN retries, asked for were %d; after the kill there is revision %d with %d",
				acknowledged.Number, acknowledged.Settings.Multipath.SYNRetries, asked.Settings.Multipath.SYNRetries, found.Number, found.Settings.Multipath.SYNRetries)
		}
	}
	t.Logf("%d kills, %d changes acknowledged, %d more on the disk before their answer", kills, changes, underWay)
	if changes < kills/2 {
		t.Errorf("only %d changes in %d lives: too few to prove anything", changes, kills)
	}
}

// On a full disk changes are refused and leave everything as it was; the daemon goes
// on, and takes them again when there is room.
func TestFullDisk(t *testing.T) {
	w := newWorld(t)
	dir := filepath.Join(w.Dir, "router")
	w.need(os.MkdirAll(dir, 0o700))
	w.need(unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"))
	t.Cleanup(func() { w.must(unix.Unmount(dir, unix.MNT_DETACH)) })
	w.need(w.StartRouter(w.Settings("")))
	filler, err := os.Create(filepath.Join(dir, "filler"))
	w.need(err)
	if _, err := io.Copy(filler, zeroes{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	w.need(filler.Close())

	client := webui.NewClient(w.Socket())
	// What is free within the file may take some changes yet.
	full := false
	var last webui.Revision
	for retries := range 200 {
		n := retries % 10
		made, err := client.SetMultipath(t.Context(), webui.MultipathChange{SYNRetries: &n})
		var coded *webui.Error
		switch {
		case err == nil:
			last = made
			continue
		case !errors.As(err, &coded) || coded.Code != webui.CodeStorageFull:
			t.Fatalf("on a full disk: %v", err)
		}
		full = true
		break
	}
	if !full {
		t.Fatal("the disk never was too full: this test proves nothing")
	}
	now, err := client.Settings(t.Context())
	w.need(err)
	if last.Number > 0 && now.Number != last.Number {
		t.Errorf("after the refusal revision %d is in force, and not %d", now.Number, last.Number)
	}
	w.need(os.Remove(filler.Name()))
	off := false
	made, err := client.SetMultipath(t.Context(), webui.MultipathChange{Enabled: &off})
	if err != nil || made.Number != now.Number+1 {
		t.Errorf("with room again: revision %d, %v", made.Number, err)
	}
	w.need(w.Router.Kill())
	w.need(w.StartRouter(""))
	if again, err := client.Settings(t.Context()); err != nil || again.Number != made.Number || again.Settings.Multipath.Enabled {
		t.Errorf("after a crash: %+v, %v", again, err)
	}
}

// zeroes never end.
type zeroes struct{}

func (zeroes) Read(b []byte) (int, error) { clear(b); return len(b), nil }
