package deploy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sheaf/daemon/netlab"
	"sheaf/webui"
)

var binaries = os.Getenv("SHEAF_BINARIES")

// TestMain builds the programs, unless SHEAF_BINARIES says where they are.
func TestMain(m *testing.M) {
	os.Exit(func() int {
		if binaries == "" {
			dir, err := os.MkdirTemp("", "sheaf-bin-")
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer func() { _ = os.RemoveAll(dir) }()
			build := exec.Command("go", "build", "-tags", "nomsgpack", "-o", dir, "sheaf/cmd/...")
			build.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := build.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "building the programs: %v\n%s", err, out)
				return 1
			}
			binaries = dir
		}
		return m.Run()
	}())
}

// shapes are 100 Mbit/s in all.
var shapes = []netlab.Shape{
	{Rate: 50e6, Delay: 10 * time.Millisecond, Queue: 100 * time.Millisecond},
	{Rate: 30e6, Delay: 20 * time.Millisecond, Queue: 100 * time.Millisecond},
	{Rate: 20e6, Delay: 40 * time.Millisecond, Queue: 100 * time.Millisecond},
}

// syncBuffer keeps the daemons' logs for a failed test to show.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// world is a lab with a deployment in which nothing runs yet, and the network
// state that every test must leave behind.
type world struct {
	*Deployment
	t      *testing.T
	log    *syncBuffer
	before map[string]string // by host
}

func newWorld(t *testing.T) *world {
	t.Helper()
	lab, err := netlab.New(netlab.Config{Uplinks: shapes, Seed: 7})
	if err != nil {
		t.Fatal(err)
	}
	log := new(syncBuffer)
	w := &world{Deployment: New(lab, binaries, t.TempDir(), log), t: t, log: log, before: map[string]string{}}
	for _, h := range []*netlab.Host{lab.Router, lab.Cloud} {
		w.before[h.Name] = w.network(h)
	}
	t.Cleanup(func() {
		w.must(w.Stop())
		for _, h := range []*netlab.Host{lab.Router, lab.Cloud} {
			if after := w.network(h); after != w.before[h.Name] {
				t.Errorf("%s is not as it was before:\n%s", h.Name, netlab.Difference(w.before[h.Name], after))
			}
		}
		w.must(lab.Close())
		if t.Failed() {
			t.Logf("log of the daemons:\n%s", log)
		}
	})
	return w
}

// network is what a host's kernel holds.
func (w *world) network(h *netlab.Host) string {
	w.t.Helper()
	text, err := network(h)
	w.need(err)
	return text
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Error(err)
	}
}

func (w *world) need(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// up is a world in which everything runs.
func up(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.need(w.Start())
	return w
}

// serve runs handle for every connection to a port of the Internet server.
func (w *world) serve(address string, handle func(*net.TCPConn)) {
	w.t.Helper()
	w.serveAt(w.Lab.Server, address, handle)
}

// serveAt runs handle for every connection to a port of a Host.
func (w *world) serveAt(h *netlab.Host, address string, handle func(*net.TCPConn)) {
	w.t.Helper()
	l, err := h.Listen("tcp", address)
	w.need(err)
	w.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				handle(c.(*net.TCPConn))
			}()
		}
	}()
}

// answerAt answers every datagram to a port of a Host.
func (w *world) answerAt(h *netlab.Host, address string, answer func(from net.Addr, question []byte) []byte) {
	w.t.Helper()
	socket, err := h.ListenPacket("udp", address)
	w.need(err)
	w.t.Cleanup(func() { _ = socket.Close() })
	go func() {
		buffer := make([]byte, 1<<16)
		for {
			n, from, err := socket.ReadFrom(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil { // else an ICMP error about an earlier answer
				_, _ = socket.WriteTo(answer(from, buffer[:n]), from)
			}
		}
	}()
}

func (w *world) dial(address string) *net.TCPConn {
	w.t.Helper()
	c, err := w.Lab.LAN.Dial(context.Background(), "tcp", address)
	w.need(err)
	w.t.Cleanup(func() { _ = c.Close() })
	return c.(*net.TCPConn)
}

// noise is size pseudo-random bytes, the same for the same seed.
func noise(seed uint64, size int64) io.Reader {
	var key [32]byte
	key[0] = byte(seed)
	return io.LimitReader(rand.NewChaCha8(key), size)
}

func sum(r io.Reader) (hash.Hash, int64, error) {
	h := sha256.New()
	n, err := io.Copy(h, r)
	return h, n, err
}

// download is a transfer in progress.
type download struct {
	mu    sync.Mutex
	bytes int64
	done  chan error
}

func (d *download) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.bytes += int64(len(p))
	return len(p), nil
}

func (d *download) received() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bytes
}

const noisePort = "198.51.100.20:7001"

// startDownload downloads size bytes and compares their checksum.
func (w *world) startDownload(size int64) *download {
	w.t.Helper()
	w.serve(noisePort, func(c *net.TCPConn) { _, _ = io.Copy(c, noise(1, size)) })
	c := w.dial(noisePort)
	d := &download{done: make(chan error, 1)}
	go func() {
		got := sha256.New()
		n, err := io.Copy(io.MultiWriter(got, d), c)
		want, _, _ := sum(noise(1, size))
		switch {
		case err != nil:
			err = fmt.Errorf("after %d of %d bytes: %w", n, size, err)
		case n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)):
			err = fmt.Errorf("received %d of %d bytes, or with another checksum", n, size)
		}
		d.done <- err
	}()
	return d
}

// progress waits until some more of a download has come.
func (w *world) progress(d *download, more int64) {
	w.t.Helper()
	from := d.received()
	deadline := time.Now().Add(patience)
	for d.received() < from+more {
		select {
		case err := <-d.done:
			d.done <- err
			if err != nil {
				w.t.Fatal(err)
			}
			w.t.Fatal("the download ended before the test was through")
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("the download stands still at %d bytes", d.received())
		}
	}
}

// down is the bytes that have come down an uplink, by number from 1.
func (w *world) down(uplink int) uint64 {
	_, c := w.Lab.Uplinks[uplink-1].Counters()
	return c.Bytes
}

func (w *world) uplink(s webui.Status, number int) webui.UplinkStatus {
	w.t.Helper()
	for _, u := range s.Uplinks {
		if u.Name == fmt.Sprintf("uplink%d", number) {
			return u
		}
	}
	w.t.Fatalf("status has no uplink%d: %+v", number, s.Uplinks)
	panic("unreachable")
}

// untilUplink waits until an uplink's state and number of subflows are right.
func (w *world) untilUplink(number int, what string, right func(webui.UplinkStatus) bool) {
	w.t.Helper()
	w.need(w.Until(fmt.Sprintf("uplink%d %s", number, what), func(s webui.Status) error {
		if u := w.uplink(s, number); !right(u) {
			return fmt.Errorf("it is %s (%s), %d subflows", u.State, u.Reason, u.Subflows)
		}
		return nil
	}))
}

// One download goes through everything that the operator and the world can do.
func TestDownloadSurvivesFaultsModesAndSettings(t *testing.T) {
	w := up(t)
	d := w.startDownload(200e6)
	w.progress(d, 5e6)

	for i, u := range w.Lab.Uplinks {
		w.need(u.BlackHole(true))
		w.progress(d, 5e6)
		w.need(u.BlackHole(false))
		w.progress(d, 5e6)
		t.Logf("uplink%d black-holed and back at %d MB", i+1, d.received()/1e6)
	}

	for number := 1; number <= len(w.Lab.Uplinks); number++ {
		name := fmt.Sprintf("uplink%d", number)
		routes := w.routes()
		for _, mode := range []string{"off", "backup", "on", "backup", "off", "on"} {
			_, err := w.Sheafctl("uplink", "set", name, "--mode", mode)
			w.need(err)
			switch mode {
			case "off":
				w.untilUplink(number, "has no subflow", func(u webui.UplinkStatus) bool { return u.State == "off" && u.Subflows == 0 })
				w.quiet(d, number)
			case "backup":
				w.untilUplink(number, "stands by", func(u webui.UplinkStatus) bool { return u.State == "standby" && u.Subflows > 0 })
				w.quiet(d, number)
			case "on":
				w.untilUplink(number, "carries", func(u webui.UplinkStatus) bool { return u.State == "carrying" && u.Subflows > 0 })
				w.carries(d, number)
			}
			if now := w.routes(); now != routes {
				t.Fatalf("mode %s of %s changed interfaces or routes; before:\n%s\nnow:\n%s", mode, name, routes, now)
			}
		}
		t.Logf("%s through every mode at %d MB", name, d.received()/1e6)
	}

	// Other settings, then the first ones again.
	changed := strings.Replace(w.Settings(""), "name: uplink3", "name: third", 1) + "multipath: {checksum: true, syn_retries: 3}\nwhen_tunnel_down: block\n"
	for _, text := range []string{changed, w.Settings("")} {
		file, err := w.File("changed.yaml", text)
		w.need(err)
		_, err = w.Sheafctl("apply", "-f", file)
		w.need(err)
		w.progress(d, 3e6)
	}
	if err := <-d.done; err != nil {
		t.Fatal(err)
	}
	var past webui.History
	w.need(w.get("/api/v1/uplinks/uplink1/history?last_s=600", &past))
	busy := slices.ContainsFunc(past.RxBps, func(rx *uint64) bool { return rx != nil && *rx > 1e6 })
	if measured := slices.ContainsFunc(past.RTTMs, func(ms *float64) bool { return ms != nil && *ms > 1 }); !busy || !measured {
		t.Errorf("the history of uplink1 knows nothing of the download: %+v", past)
	}
}

// routes are the router's own interfaces and main routes.
func (w *world) routes() string {
	w.t.Helper()
	var lines []string
	for line := range strings.Lines(w.network(w.Lab.Router)) {
		if strings.HasPrefix(line, "address") || strings.HasPrefix(line, "route") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "")
}

// quiet checks that an uplink comes to carry nothing of a download that goes
// on. What its queue held when the mode changed still comes.
func (w *world) quiet(d *download, number int) {
	w.t.Helper()
	var carried []uint64
	for range 5 {
		before := w.down(number)
		w.progress(d, 2e6)
		carried = append(carried, w.down(number)-before)
		if carried[len(carried)-1] < 50e3 {
			return
		}
	}
	w.t.Fatalf("of five times 2 MB, uplink%d carried %d bytes, and should come to carry none", number, carried)
}

// carries checks that an uplink carries its part again.
func (w *world) carries(d *download, number int) {
	w.t.Helper()
	bytes := w.down(number)
	deadline := time.Now().Add(patience)
	for w.down(number)-bytes < 300e3 {
		w.progress(d, 100e3)
		if time.Now().After(deadline) {
			w.t.Fatalf("uplink%d carried %d bytes of the download since it is on again", number, w.down(number)-bytes)
		}
	}
}

func TestUploadUsesEveryUplink(t *testing.T) {
	w := up(t)
	const size = 30e6
	result := make(chan error, 1)
	w.serve("198.51.100.20:7002", func(c *net.TCPConn) {
		got, n, err := sum(c)
		want, _, _ := sum(noise(2, size))
		if err == nil && !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
			err = fmt.Errorf("received %d of %d bytes, or with another checksum", n, int64(size))
		}
		result <- err
	})
	before := make([]uint64, len(w.Lab.Uplinks))
	for i, u := range w.Lab.Uplinks {
		upward, _ := u.Counters()
		before[i] = upward.Bytes
	}
	c := w.dial("198.51.100.20:7002")
	_, err := io.Copy(c, noise(2, size))
	w.need(err)
	w.need(c.CloseWrite())
	w.need(<-result)
	for i, u := range w.Lab.Uplinks {
		upward, _ := u.Counters()
		if share := float64(upward.Bytes-before[i]) / size; share < 0.1 {
			t.Errorf("uplink%d carried %.0f %% of the upload, want at least 10", i+1, share*100)
		}
	}
}

// What a stock client sees: refused ports, RST, half-close, servers that speak
// first, IPv6, and the router's own services.
func TestClientsSeeWhatTheyWouldWithoutUs(t *testing.T) {
	w := up(t)
	echo := func(c *net.TCPConn) { _, _ = io.Copy(c, c); _ = c.CloseWrite() }

	t.Run("half-close", func(t *testing.T) {
		w.serve("198.51.100.20:7100", func(c *net.TCPConn) {
			text, _ := io.ReadAll(c)
			_, _ = fmt.Fprintf(c, "%d bytes", len(text))
		})
		c := w.dial("198.51.100.20:7100")
		_, _ = c.Write(make([]byte, 100_000))
		w.must(c.CloseWrite())
		if got, err := io.ReadAll(c); string(got) != "100000 bytes" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("IPv6", func(t *testing.T) {
		w.serve("[2001:db8:e::20]:7101", echo)
		c := w.dial("[2001:db8:e::20]:7101")
		_, _ = c.Write([]byte("six"))
		w.must(c.CloseWrite())
		if got, err := io.ReadAll(c); string(got) != "six" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("server speaks first", func(t *testing.T) {
		w.serve("198.51.100.20:7102", func(c *net.TCPConn) { _, _ = io.WriteString(c, "220 hello") })
		if got, err := io.ReadAll(w.dial("198.51.100.20:7102")); string(got) != "220 hello" || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
	})
	for name, address := range map[string]string{
		"refused":             "198.51.100.20:9",
		"private destination": "10.99.99.99:80",
		"the concentrator":    netlab.CloudAddress + ":4443",
		"cloud metadata":      "169.254.169.254:80",
	} {
		if name == "cloud metadata" {
			continue // link-local is never diverted: it is not the router's to forward
		}
		t.Run(name, func(t *testing.T) {
			c := w.dial(address)
			_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("client saw %v, want connection reset", err)
			}
		})
	}
	t.Run("client RST", func(t *testing.T) {
		seen := make(chan error, 1)
		w.serve("198.51.100.20:7103", func(c *net.TCPConn) {
			_, err := io.Copy(io.Discard, c)
			seen <- err
		})
		c := w.dial("198.51.100.20:7103")
		_, _ = c.Write([]byte("x"))
		time.Sleep(100 * time.Millisecond)
		_ = c.SetLinger(0)
		_ = c.Close()
		select {
		case err := <-seen:
			if !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("server saw %v, want connection reset", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("the RST never reached the server")
		}
	})
	t.Run("server RST", func(t *testing.T) {
		w.serve("198.51.100.20:7104", func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)); _ = c.SetLinger(0) })
		c := w.dial("198.51.100.20:7104")
		_, _ = c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("client saw %v, want connection reset", err)
		}
	})
	t.Run("the router's own service", func(t *testing.T) {
		for _, address := range []string{net.JoinHostPort(netlab.RouterAddress, "7105"), net.JoinHostPort(netlab.RouterAddress6, "7105")} {
			l, err := w.Lab.Router.Listen("tcp", address)
			w.need(err)
			accepted := make(chan string, 1)
			go func() {
				if c, err := l.Accept(); err == nil {
					accepted <- c.RemoteAddr().String()
					_ = c.Close()
				}
			}()
			c := w.dial(address)
			if from := <-accepted; from != c.LocalAddr().String() {
				t.Errorf("%s: the service saw %s, want the client itself, %s", address, from, c.LocalAddr())
			}
			_ = l.Close()
		}
	})
	t.Run("stock client and server", func(t *testing.T) {
		dir := t.TempDir()
		text, err := io.ReadAll(noise(3, 3e6))
		w.need(err)
		w.need(os.WriteFile(dir+"/file", text, 0o644))
		httpd, err := w.Lab.Server.Start(w.Lab.Server.Command("busybox", "httpd", "-f", "-p", netlab.ServerAddress+":80", "-h", dir))
		w.need(err)
		defer func() { _ = httpd.Kill() }()
		out, err := run(w.Lab.LAN, "curl", "--silent", "--show-error", "--fail", "--retry", "5", "--retry-all-errors", "--max-time", "30", "http://"+netlab.ServerAddress+"/file")
		if err != nil || out != string(text) {
			t.Errorf("curl received %d of %d bytes, %v", len(out), len(text), err)
		}
	})
}

// kill -9 ends the flows that are open, and nothing else: the next start finds
// its leftovers, and a clean stop leaves none.
func TestKillAndRestart(t *testing.T) {
	w := up(t)
	d := w.startDownload(1e9)
	w.progress(d, 3e6)
	w.need(w.Router.Kill())
	if err := <-d.done; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the flow that was open ended with %v, want connection reset", err)
	}
	if left := w.network(w.Lab.Router); left == w.before["router"] {
		t.Error("kill -9 left nothing behind: this test proves nothing")
	}
	// What a killed daemon left, altered by somebody else meanwhile.
	w.need(w.Lab.Router.Do(alterLeftovers))

	w.need(w.StartRouter(""))
	w.need(w.WaitUp())
	first := w.network(w.Lab.Router)
	file, err := w.File("again.yaml", w.Settings(""))
	w.need(err)
	for range 2 {
		out, err := w.Sheafctl("apply", "-f", file)
		w.need(err)
		if strings.TrimSpace(out) != "revision 1" {
			t.Errorf("applying the settings in force made %q", out)
		}
		if now := w.network(w.Lab.Router); now != first {
			t.Errorf("applying twice changed the kernel; before:\n%s\nnow:\n%s", first, now)
		}
	}
	w.serve("198.51.100.20:7200", func(c *net.TCPConn) { _, _ = io.WriteString(c, "back") })
	if got, err := io.ReadAll(w.dial("198.51.100.20:7200")); string(got) != "back" || err != nil {
		t.Errorf("after the restart: %q, %v", got, err)
	}
}

func TestTokensAndSettingsRefused(t *testing.T) {
	w := newWorld(t)
	w.need(w.StartConcentrator())
	w.need(w.StartRouter(w.Settings("")))

	refused := func(what, want string, arguments ...string) {
		t.Helper()
		_, err := w.Sheafctl(arguments...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	expired, err := w.Concentratord("token", "--name", "late", "--address", w.Address(), "--valid", "1s")
	w.need(err)
	time.Sleep(2100 * time.Millisecond)
	refused("expired", "expired at", "join", strings.TrimSpace(expired))

	good, err := w.Token("home")
	w.need(err)
	refused("altered", "damaged", "join", good[:len(good)-3]+"AAA")
	refused("cut short", "damaged", "join", good[:len(good)-5])
	refused("no token", "not an enrolment token", "join", "hello")

	// A second concentrator's token, with the first one's address.
	other := New(w.Lab, binaries, t.TempDir(), w.log)
	foreign, err := other.Token("home")
	w.need(err)
	refused("another concentrator", "not the concentrator of the token", "join", foreign)

	_, err = w.Sheafctl("join", good)
	w.need(err)
	_, err = w.Sheafctl("join", good) // the answer may have been lost: the same router may ask again
	w.need(err)
	w.need(w.WaitUp())

	// Another router with the used token.
	thief := New(w.Lab, binaries, t.TempDir(), w.log)
	w.need(w.Router.Stop(15 * time.Second))
	w.need(thief.StartRouter(thief.Settings("")))
	if _, err := thief.Sheafctl("join", good); err == nil || !strings.Contains(err.Error(), "used already") {
		t.Errorf("a used token: %v", err)
	}
	w.need(thief.Router.Stop(15 * time.Second))
	w.need(w.StartRouter(""))
	w.need(w.WaitUp())

	network := w.network(w.Lab.Router)
	for what, c := range map[string]struct{ text, want string }{
		"unknown key":    {w.Settings("") + "colour: blue\n", "colour"},
		"bad mode":       {strings.Replace(w.Settings(""), "mode: on", "mode: sometimes", 1), ":5:"},
		"bad interface":  {strings.Replace(w.Settings(""), "wan1", "no/such", 1), ":5:"},
		"not YAML":       {"{{{", "not YAML"},
		"unknown name":   {w.Settings("") + "multipath: {path_manager: mesh}\n", "fullmesh"},
		"unknown method": {strings.Replace(w.Settings(""), "method: existing", "method: dhcp", 1), "existing"},
	} {
		file, err := w.File("bad.yaml", c.text)
		w.need(err)
		refused(what, c.want, "apply", "-f", file)
	}
	s, err := w.Status()
	w.need(err)
	if s.Settings.Revision != 1 || w.network(w.Lab.Router) != network {
		t.Errorf("refused settings changed something: revision %d", s.Settings.Revision)
	}

	// An interface that is merely absent is accepted and shown.
	absent := strings.Replace(w.Settings(""), "wan3", "wan9", 1)
	file, err := w.File("absent.yaml", absent)
	w.need(err)
	_, err = w.Sheafctl("apply", "-f", file)
	w.need(err)
	w.untilUplink(3, "is absent", func(u webui.UplinkStatus) bool { return u.State == "absent" && strings.Contains(u.Reason, "wan9") })
}

// The concentrator may come up after the router, and go away and come back.
func TestConcentratorComesAndGoes(t *testing.T) {
	w := newWorld(t)
	token, err := w.Token("home") // from the state of a stopped daemon
	w.need(err)
	w.serve("198.51.100.20:7300", func(c *net.TCPConn) { _, _ = io.WriteString(c, c.RemoteAddr().(*net.TCPAddr).IP.String()) })
	fetch := func() (string, error) {
		c, err := w.Lab.LAN.Dial(context.Background(), "tcp", "198.51.100.20:7300")
		if err != nil {
			return "", err
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		got, err := io.ReadAll(c)
		return string(got), err
	}
	w.need(w.StartRouter(w.Settings(token) + "when_tunnel_down: block\n"))
	w.need(w.Until("the tunnel is down and says why", func(s webui.Status) error {
		if s.Tunnel.State != "down" || len(s.Problems) == 0 {
			return fmt.Errorf("%+v", s.Tunnel)
		}
		return nil
	}))
	if got, err := fetch(); err == nil {
		t.Errorf("blocked, and yet the server answered %q", got)
	}
	w.need(w.StartConcentrator())
	w.need(w.WaitUp())
	if got, err := fetch(); got != netlab.CloudAddress || err != nil {
		t.Errorf("through the tunnel the server saw %q, %v; want the concentrator", got, err)
	}
	w.need(w.Concentrator.Kill())
	w.need(w.Until("the tunnel is down", func(s webui.Status) error {
		if s.Tunnel.State != "down" {
			return errors.New(s.Tunnel.State)
		}
		return nil
	}))
	w.need(w.StartConcentrator())
	w.need(w.WaitUp())
	if got, err := fetch(); got != netlab.CloudAddress || err != nil {
		t.Errorf("after the concentrator's return the server saw %q, %v", got, err)
	}

	// With direct, LAN connections leave by the best uplink meanwhile.
	file, err := w.File("direct.yaml", w.Settings("")+"when_tunnel_down: direct\n")
	w.need(err)
	_, err = w.Sheafctl("apply", "-f", file)
	w.need(err)
	w.need(w.Concentrator.Stop(15 * time.Second))
	w.need(w.Until("the tunnel is down", func(s webui.Status) error {
		if s.Tunnel.State != "down" {
			return errors.New(s.Tunnel.State)
		}
		return nil
	}))
	if got, err := fetch(); !strings.HasPrefix(got, "10.") || err != nil {
		t.Errorf("direct: the server saw %q, %v; want an uplink", got, err)
	}
	w.need(w.StartConcentrator())
	w.need(w.WaitUp())
}

func TestUplinkLosesItsGatewayCarrierAndAddress(t *testing.T) {
	w := up(t)
	d := w.startDownload(60e6)
	for number, u := range w.Lab.Uplinks {
		number++
		w.progress(d, 2e6)
		restore, err := w.removeGateway(u)
		w.need(err)
		w.untilUplink(number, "is unfit for want of a gateway", func(s webui.UplinkStatus) bool {
			return s.State == "unfit" && strings.Contains(s.Reason, "default route") && s.Subflows == 0
		})
		w.progress(d, 2e6)
		w.need(restore())
		w.untilUplink(number, "carries", func(s webui.UplinkStatus) bool { return s.State == "carrying" })
		w.need(u.Carrier(false))
		w.untilUplink(number, "is unfit for want of a carrier", func(s webui.UplinkStatus) bool { return s.State == "unfit" && s.Subflows == 0 })
		w.progress(d, 2e6)
		w.need(u.Carrier(true))
		w.untilUplink(number, "carries", func(s webui.UplinkStatus) bool { return s.State == "carrying" })
	}
	if err := <-d.done; err != nil {
		t.Fatal(err)
	}
}

func TestRevokedRouterIsCutOff(t *testing.T) {
	w := up(t)
	d := w.startDownload(1e9)
	w.progress(d, 2e6)
	out, err := w.Concentratord("routers", "-o", "json")
	w.need(err)
	if !strings.Contains(out, `"name": "lab"`) || strings.Contains(out, `"sessions": 0`) {
		t.Errorf("routers -o json: %s", out)
	}
	_, err = w.Concentratord("routers", "remove", "lab")
	w.need(err)
	if err := <-d.done; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the flow ended with %v, want connection reset", err)
	}
	w.need(w.Until("the tunnel is down for want of enrolment", func(s webui.Status) error {
		if s.Tunnel.State != "down" || !strings.Contains(s.Tunnel.Reason, "not enrolled") {
			return fmt.Errorf("%+v", s.Tunnel)
		}
		return nil
	}))
	token, err := w.Token("lab")
	w.need(err)
	_, err = w.Sheafctl("join", token)
	w.need(err)
	w.need(w.WaitUp())
}

// An uplink that swallows everything must not keep the router from starting over
// the others, and is used as soon as it works.
func TestStartsWhileTheBestUplinkIsBlackHoled(t *testing.T) {
	w := newWorld(t)
	w.need(w.Lab.Uplinks[0].BlackHole(true))
	w.need(w.StartBoth())
	w.need(w.Until("the tunnel is degraded", func(s webui.Status) error {
		if s.Tunnel.State != "degraded" {
			return fmt.Errorf("%s: %s", s.Tunnel.State, s.Tunnel.Reason)
		}
		return nil
	}))
	w.serve("198.51.100.20:7500", func(c *net.TCPConn) { _, _ = io.WriteString(c, "through") })
	if got, err := io.ReadAll(w.dial("198.51.100.20:7500")); string(got) != "through" || err != nil {
		t.Errorf("over the others: %q, %v", got, err)
	}
	w.need(w.Lab.Uplinks[0].BlackHole(false))
	w.need(w.WaitUp())
}

// An uplink that looks well and leads nowhere is done without, said so, and used
// again when it leads somewhere. Where only UDP has ended it stays in use.
func TestSilentUplink(t *testing.T) {
	w := up(t)
	d := w.startDownload(200e6)
	w.progress(d, 5e6)
	for i := range w.Lab.Uplinks {
		w.need(w.Lab.Uplinks[i].BlackHole(true))
		w.untilUplink(i+1, "is silent", func(u webui.UplinkStatus) bool {
			return u.State == "unfit" && strings.Contains(u.Reason, "silent") && u.Subflows == 0
		})
		w.progress(d, 2e6)
		w.need(w.Lab.Uplinks[i].BlackHole(false))
		w.untilUplink(i+1, "carries again", func(u webui.UplinkStatus) bool { return u.State == "carrying" && u.Subflows > 0 })
		w.carries(d, i+1)
	}
	if log := w.log.String(); strings.Count(log, "uplink is silent") < len(w.Lab.Uplinks) || strings.Count(log, "uplink is back") < len(w.Lab.Uplinks) {
		t.Errorf("the log does not say of every uplink that it was silent and is back")
	}

	w.need(w.Lab.Uplinks[0].BlockUDP(true))
	w.untilUplink(1, "carries TCP, and packets in a stream", func(u webui.UplinkStatus) bool {
		return u.State == "carrying" && u.Carrier == "stream"
	})
	w.carries(d, 1)

	// All of them: it is not the uplinks' fault, and nothing is to be lost by it.
	for _, u := range w.Lab.Uplinks {
		w.need(u.BlackHole(true))
	}
	w.need(w.Until("the tunnel is down", func(s webui.Status) error {
		if s.Tunnel.State != "down" {
			return fmt.Errorf("it is %s", s.Tunnel.State)
		}
		return nil
	}))
	for _, u := range w.Lab.Uplinks {
		w.need(u.BlackHole(false))
	}
	w.need(w.WaitUp())
	w.progress(d, 5e6)
}

// The path manager and the switch for MPTCP concern connections yet to come:
// the pool is renewed, and what is open goes on.
func TestPathManagerAndSwitch(t *testing.T) {
	w := up(t)
	d := w.startDownload(40e6)
	w.progress(d, 1e6)
	for _, c := range []struct{ multipath, what string }{
		{"{path_manager: default}", "one uplink carries at a time"},
		{"{enabled: false}", "plain TCP over one uplink"},
	} {
		file, err := w.File("multipath.yaml", w.Settings("")+"multipath: "+c.multipath+"\n")
		w.need(err)
		_, err = w.Sheafctl("apply", "-f", file)
		w.need(err)
		w.need(w.Until(c.what, func(s webui.Status) error {
			carrying := 0
			for _, u := range s.Uplinks {
				if u.Subflows >= s.Concentrator.IdleSessions && u.Subflows > 1 {
					carrying++
				}
			}
			if s.Tunnel.State != "up" || carrying != 1 || s.Concentrator.IdleSessions < 8 {
				return fmt.Errorf("tunnel %s (%s), %d uplinks with the idle sessions' subflows, %d idle", s.Tunnel.State, s.Tunnel.Reason, carrying, s.Concentrator.IdleSessions)
			}
			return nil
		}))
		w.progress(d, 1e6)
	}
	file, err := w.File("multipath.yaml", w.Settings(""))
	w.need(err)
	_, err = w.Sheafctl("apply", "-f", file)
	w.need(err)
	w.need(w.WaitUp())
	if err := <-d.done; err != nil {
		t.Fatal(err)
	}
}

// A path on which MPTCP does not come through is used all the same, and shown.
func TestPlainTCPIsRecognised(t *testing.T) {
	w := newWorld(t)
	w.need(w.Lab.Cloud.SetSysctl("net/mptcp/enabled", "0"))
	w.need(w.StartBoth())
	w.need(w.Until("the fallback is shown with its uplink", func(s webui.Status) error {
		if s.Tunnel.State != "degraded" {
			return fmt.Errorf("tunnel %s: %s", s.Tunnel.State, s.Tunnel.Reason)
		}
		for _, u := range s.Uplinks {
			if u.PlainTCP {
				return nil
			}
		}
		return errors.New("no uplink says so")
	}))
	w.serve("198.51.100.20:7400", func(c *net.TCPConn) { _, _ = io.WriteString(c, "plain") })
	if got, err := io.ReadAll(w.dial("198.51.100.20:7400")); string(got) != "plain" || err != nil {
		t.Errorf("over plain TCP: %q, %v", got, err)
	}
}
