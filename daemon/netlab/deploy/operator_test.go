package deploy

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sheaf/daemon/netlab"
	"sheaf/webui"
)

// shown runs a command of sheafctl and decodes its JSON.
func shown[T any](w *world, arguments ...string) (v T) {
	w.t.Helper()
	out, err := w.Sheafctl(append(arguments, "-o", "json")...)
	w.need(err)
	w.need(json.Unmarshal([]byte(out), &v))
	return v
}

// soon waits until right is.
func (w *world) soon(what string, right func() error) {
	w.t.Helper()
	w.need(w.until(what, w.Router, right))
}

// Each flow's bytes are shown with the uplinks that carried them, an uplink's that
// has been switched off since included.
func TestFlowsOverUplinks(t *testing.T) {
	w := up(t)
	_, err := w.Sheafctl("uplink", "set", "uplink3", "--mode", "off")
	w.need(err)
	w.untilUplink(3, "has no subflow", func(u webui.UplinkStatus) bool { return u.State == "off" && u.Subflows == 0 })

	const upload, half = 4_000_000, 20_000_000
	more := make(chan bool)
	end := sync.OnceFunc(func() { close(more) })
	defer end()
	w.serve("198.51.100.20:7600", func(c *net.TCPConn) {
		_, _ = io.CopyN(io.Discard, c, upload)
		for range more {
			_, _ = io.Copy(c, noise(1, half))
		}
	})
	flows := func(what string, up, down uint64) (f webui.Flow) {
		w.soon(what, func() error {
			list := shown[webui.Flows](w, "flows")
			if list.Total != 1 || len(list.Flows) != 1 || list.Flows[0].UpBytes != up || list.Flows[0].DownBytes != down {
				return fmt.Errorf("%+v", list)
			}
			f = list.Flows[0]
			return nil
		})
		if text, err := w.Sheafctl("flows"); err != nil {
			t.Error(err)
		} else {
			t.Logf("%s:\n%s", what, text)
		}
		return f
	}
	// add is the sum over uplinks, of which the payload is to be all but a few %.
	add := func(f webui.Flow, excess float64) {
		t.Helper()
		var up, down uint64
		for _, u := range f.Uplinks {
			up += u.UpBytes
			down += u.DownBytes
		}
		for _, c := range []struct{ sum, payload uint64 }{{up, f.UpBytes}, {down, f.DownBytes}} {
			if over := float64(c.sum)/float64(c.payload) - 1; over < 0 || over > excess {
				t.Errorf("the uplinks' bytes are %d for %d of the flow, %.1f %% more: %+v", c.sum, c.payload, 100*over, f)
			}
		}
	}

	var before [3]uint64
	for i := range before {
		before[i] = w.down(i + 1)
	}
	c := w.dial("198.51.100.20:7600")
	_, err = io.Copy(c, noise(2, upload))
	w.need(err)
	more <- true
	_, err = io.CopyN(io.Discard, c, half)
	w.need(err)
	f := flows("half of it", upload, half)
	add(f, 0.03)
	if f.Client != c.LocalAddr().String() || f.Destination != "198.51.100.20:7600" || f.Through != "tunnel" || f.Inbound || f.AgeS <= 0 {
		t.Errorf("it is shown as %+v", f)
	}
	if len(f.Uplinks) != 2 {
		t.Fatalf("over %+v, want uplink1 and uplink2", f.Uplinks)
	}
	for i, u := range f.Uplinks {
		// The emulator counts headers and everything else, too.
		carried := float64(w.down(i+1) - before[i])
		if u.Name != fmt.Sprintf("uplink%d", i+1) || u.DownBytes < half/5 || math.Abs(float64(u.DownBytes)/carried-0.95) > 0.06 {
			t.Errorf("%+v; %v bytes came down uplink%d", u, carried, i+1)
		}
	}

	// In the middle of the second half the uplink that carries most goes.
	more <- true
	_, err = io.CopyN(io.Discard, c, half/2)
	w.need(err)
	_, err = w.Sheafctl("uplink", "set", "uplink1", "--mode", "off")
	w.need(err)
	_, err = io.CopyN(io.Discard, c, half/2)
	w.need(err)
	g := flows("all of it", upload, 2*half)
	add(g, 0.15) // what was on its way over uplink1 was sent again
	if len(g.Uplinks) != 2 || g.Uplinks[0].Name != "uplink1" || g.Uplinks[0].DownBytes < f.Uplinks[0].DownBytes+half/5 ||
		g.Uplinks[1].DownBytes < f.Uplinks[1].DownBytes+half/5 {
		t.Errorf("after uplink1 was switched off: %+v, before: %+v", g.Uplinks, f.Uplinks)
	}
	end()
	_, err = io.ReadAll(c)
	w.need(err)
	_ = c.Close()
	w.soon("the flow is gone", func() error {
		if list := shown[webui.Flows](w, "flows"); list.Total+len(list.Flows) != 0 {
			return fmt.Errorf("%+v", list)
		}
		return nil
	})
}

// A flow that left without the tunnel is listed as such.
func TestDirectFlowIsListed(t *testing.T) {
	w := newWorld(t)
	w.need(w.StartRouter(w.Settings("")))
	w.untilUplink(1, "is there", func(u webui.UplinkStatus) bool { return u.Address != "" })
	w.serve("198.51.100.20:7601", func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "without")
		_, _ = io.Copy(io.Discard, c)
	})
	c := w.dial("198.51.100.20:7601")
	_, err := io.ReadFull(c, make([]byte, len("without")))
	w.need(err)
	w.soon("the flow is listed", func() error {
		list := shown[webui.Flows](w, "flows")
		if len(list.Flows) != 1 || list.Total != 1 || list.Flows[0].Through != "direct" || list.Flows[0].DownBytes != 7 ||
			len(list.Flows[0].Uplinks) != 1 || !strings.HasPrefix(list.Flows[0].Uplinks[0].Name, "uplink") {
			return fmt.Errorf("%+v", list)
		}
		return nil
	})
}

// What happens is told to who follows it, in order, until the daemon ends.
func TestEvents(t *testing.T) {
	w := up(t)
	follower := new(syncBuffer)
	command := w.Lab.Router.Command(filepath.Join(binaries, "sheafctl"), "--socket", w.Socket(), "events", "-f", "-o", "json")
	command.Stdout, command.Stderr = follower, w.log
	following, err := w.Lab.Router.Start(command)
	w.need(err)

	followed := func() (list []webui.Event) {
		for line := range strings.Lines(follower.String()) {
			var e webui.Event
			if json.Unmarshal([]byte(line), &e) == nil { // else it is half written
				list = append(list, e)
			}
		}
		return list
	}
	// tells waits for events after the first from, and returns how many there are
	// with them.
	tells := func(from int, want ...webui.Event) int {
		t.Helper()
		found := from
		w.soon(fmt.Sprintf("events tell %+v", want), func() error {
			list := followed()
			found = from
			for _, e := range want {
				i := slices.IndexFunc(list[found:], func(got webui.Event) bool {
					return got.Kind == e.Kind && got.Uplink == e.Uplink && strings.HasPrefix(got.Text, e.Text)
				})
				if i < 0 {
					return fmt.Errorf("nothing of %+v in %+v", e, list[found:])
				}
				found += i + 1
			}
			return nil
		})
		return found
	}
	at := tells(0, webui.Event{Kind: "daemon", Text: "sheafd "}, webui.Event{Kind: "concentrator", Text: "joined as lab"},
		webui.Event{Kind: "concentrator", Text: "reached at " + w.Address()}, webui.Event{Kind: "tunnel", Text: "up"})
	for _, mode := range []string{"off", "on"} {
		_, err := w.Sheafctl("uplink", "set", "uplink2", "--mode", mode)
		w.need(err)
		state := map[string]string{"off": "off: switched off by the operator", "on": "carrying"}[mode]
		at = tells(at, webui.Event{Kind: "settings", Text: "revision "}, webui.Event{Kind: "uplink", Uplink: "uplink2", Text: state})
	}
	w.need(w.WaitUp())

	w.need(w.Lab.Uplinks[2].Carrier(false))
	at = tells(at, webui.Event{Kind: "uplink", Uplink: "uplink3", Text: "unfit: wan3 has no carrier"})
	w.need(w.Lab.Uplinks[2].Carrier(true))
	at = tells(at, webui.Event{Kind: "uplink", Uplink: "uplink3", Text: "carrying"})
	for _, u := range w.Lab.Uplinks {
		w.need(u.BlackHole(true))
	}
	w.Lab.LAN.Dial(t.Context(), "tcp", "198.51.100.20:7602") // so that it is noticed soon
	at = tells(at, webui.Event{Kind: "concentrator", Text: "lost: the concentrator does"}, webui.Event{Kind: "tunnel", Text: "down: the concentrator does"})
	for _, u := range w.Lab.Uplinks {
		w.need(u.BlackHole(false))
	}
	tells(at, webui.Event{Kind: "concentrator", Text: "reached at "}, webui.Event{Kind: "tunnel", Text: "up"})

	all := shown[[]webui.Event](w, "events")
	if text, err := w.Sheafctl("events"); err != nil || strings.Count(text, "\n") < 1+len(all) {
		t.Errorf("%v: %s", err, text)
	} else {
		t.Logf("events:\n%s", text)
	}
	for i, e := range all {
		if i > 0 && (e.ID != all[i-1].ID+1 || e.Time.Before(all[i-1].Time)) {
			t.Errorf("%+v comes after %+v", e, all[i-1])
		}
	}
	// A follower does not hold the daemon up, and ends with it.
	w.need(w.Router.Stop(10 * time.Second))
	<-following.Done()
	if code := command.ProcessState.ExitCode(); code != 1 || !strings.Contains(w.log.String(), "sheafctl: the daemon is stopping\n") {
		t.Errorf("following ends with %d, want 1 and the reason", code)
	}
	if got := followed(); len(got) < len(all) || !slices.Equal(got[:len(all)], all) {
		t.Errorf("followed\n%+v\nlisted\n%+v", got, all)
	}
}

// Only what is named changes, and only to what is there.
func TestMultipathSettings(t *testing.T) {
	w := newWorld(t)
	w.need(w.StartRouter(w.Settings("")))
	w.soon("the kernel has the settings", func() error {
		if m := shown[webui.MultipathStatus](w, "multipath"); m.Wanted != m.Kernel {
			return fmt.Errorf("%+v", m)
		}
		return nil
	})
	before := shown[webui.MultipathStatus](w, "multipath")
	for _, c := range []struct {
		flag string
		want []string
	}{
		{"--scheduler=fastest", []string{"multipath.scheduler", `"fastest"`, "offered are " + strings.Join(before.AvailableSchedulers, ", ")}},
		{"--path-manager=greedy", append([]string{"multipath.path_manager", "greedy"}, before.AvailablePathManagers...)},
		{"--syn-retries=1000", []string{"multipath.syn_retries", "1000"}},
	} {
		out, err := w.Sheafctl("multipath", "set", "--checksum=true", c.flag)
		if err == nil || !strings.Contains(err.Error(), "exit status 1") || out != "" {
			t.Errorf("%s: %q, %v", c.flag, out, err)
			continue
		}
		for _, part := range c.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s is refused without %q: %v", c.flag, part, err)
			}
		}
	}
	if after := shown[webui.MultipathStatus](w, "multipath"); after.Wanted != before.Wanted {
		t.Errorf("what was refused has changed %+v to %+v", before.Wanted, after.Wanted)
	}

	want := before.Wanted
	for _, c := range []struct {
		flag   string
		change func()
	}{
		{"--checksum=true", func() { want.Checksum = true }},
		{"--syn-retries=4", func() { want.SYNRetries = 4 }},
		{"--scheduler=default", func() {}},
		{"--congestion-control=cubic", func() { want.CongestionControl = "cubic" }},
		{"--path-manager=default", func() { want.PathManager = "default" }},
		{"--enabled=false", func() { want.Enabled = false }},
	} {
		made := shown[webui.Revision](w, "multipath", "set", c.flag)
		c.change()
		got := shown[webui.MultipathStatus](w, "multipath")
		if got.Wanted != want || made.Warning != "" || made.Author != "socket" {
			t.Errorf("%s: revision %d by %s (%s), %+v, want %+v", c.flag, made.Number, made.Author, made.Warning, got.Wanted, want)
		}
		if got.Kernel.Checksum != want.Checksum || got.Kernel.SYNRetries != want.SYNRetries || got.Kernel.Enabled != want.Enabled {
			t.Errorf("%s: the kernel has %+v", c.flag, got.Kernel)
		}
	}
	text, err := w.Sheafctl("multipath")
	w.need(err)
	t.Logf("multipath:\n%s", text)
}

// TestConcentratorTellsHowItSends: what is shown of the other end is what that
// has said, not what was asked for.
func TestConcentratorTellsHowItSends(t *testing.T) {
	w := up(t)
	w.must(w.Until("the concentrator has told how it sends", func(s webui.Status) error {
		if far := s.Multipath.Concentrator; far.Scheduler != "default" || far.Reason != "" || far.CongestionControl != "auto" {
			return fmt.Errorf("%+v", far)
		}
		return nil
	}))
	const wanted = "roundrobin" // of the firmware's kernel
	w.apply(w.Settings("") + "multipath: {scheduler: " + wanted + ", congestion_control: bbr}\n")
	w.must(w.Until("both ends send with bbr", func(s webui.Status) error {
		far, here := s.Multipath.Concentrator, s.Multipath.Kernel
		if far.CongestionControl != "bbr" || far.CongestionControlReason != "" || here.CongestionControl != "bbr" {
			return fmt.Errorf("%+v, the router %+v", far, here)
		}
		return nil
	}))
	w.must(w.Until("it has told what it makes of another", func(s webui.Status) error {
		far := s.Multipath.Concentrator
		if slices.Contains(s.Multipath.AvailableSchedulers, wanted) { // both ends are this kernel
			if far.Scheduler != wanted || far.Reason != "" {
				return fmt.Errorf("%+v", far)
			}
			return nil
		}
		if far.Scheduler != "default" || far.Reason == "" || !slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, far.Reason) }) {
			return fmt.Errorf("%+v, problems %q", far, s.Problems)
		}
		return nil
	}))
}

// Where the kernel does not have the scheduler firstfit, uplinks that are not
// preferred carry only what the others cannot.
func TestFirstfitByBackupFlags(t *testing.T) {
	w := up(t)
	for _, arguments := range [][]string{
		{"uplink", "set", "uplink2", "--preference", "1"}, {"uplink", "set", "uplink3", "--preference", "2"},
		{"multipath", "set", "--scheduler", "firstfit"},
	} {
		_, err := w.Sheafctl(arguments...)
		w.need(err)
	}
	waits := func(u webui.UplinkStatus) bool { return u.State == "standby" && u.Subflows > 0 }
	w.untilUplink(2, "stands by", waits)
	w.untilUplink(3, "stands by", waits)
	w.need(w.WaitUp())
	s, err := w.Status()
	w.need(err)
	if slices.Contains(s.Multipath.AvailableSchedulers, "firstfit") {
		t.Fatal("this kernel has the scheduler firstfit; the test is for those that do not")
	}
	if m := s.Multipath; m.Kernel.Scheduler != "default" || !strings.Contains(m.SchedulerNote, "approximated") || len(s.Problems) > 0 {
		t.Errorf("the kernel runs %s, %q; problems %q", m.Kernel.Scheduler, m.SchedulerNote, s.Problems)
	}

	// 20 Mbit/s are wanted, then as much as there is.
	const piece, every, pieces = 50_000, 20 * time.Millisecond, 200
	w.serve("198.51.100.20:7602", func(c *net.TCPConn) {
		for i := range uint64(pieces) {
			_, _ = io.Copy(c, noise(i, piece))
			time.Sleep(every)
		}
	})
	others := w.down(2) + w.down(3)
	n, err := io.Copy(io.Discard, w.dial("198.51.100.20:7602"))
	w.need(err)
	if carried := w.down(2) + w.down(3) - others; n != piece*pieces || carried > piece*pieces/50 {
		t.Errorf("of %d bytes that uplink1 could carry %d came down the others", n, carried)
	}
	d := w.startDownload(80e6)
	w.progress(d, 20e6)
	w.carries(d, 2)
	w.carries(d, 3)
	w.need(<-d.done)
	w.untilUplink(2, "stands by again", waits)
	w.untilUplink(3, "stands by again", waits)
}

// An uplink that is very slow and very long becomes a backup while others are full,
// and it is said why.
func TestUplinkThatDoesHarmIsDemoted(t *testing.T) {
	w := up(t)
	w.need(w.Lab.Uplinks[2].Set(netlab.Shape{Rate: 400e3, Delay: 400 * time.Millisecond, Queue: 200 * time.Millisecond}))
	d := w.startDownload(300e6)
	w.untilUplink(3, "is demoted", func(u webui.UplinkStatus) bool {
		return u.State == "standby" && strings.Contains(u.Reason, "demoted to a backup until ")
	})
	w.untilUplink(1, "carries", func(u webui.UplinkStatus) bool { return u.State == "carrying" })
	w.quiet(d, 3)
	w.carries(d, 1)
	w.carries(d, 2)
}
