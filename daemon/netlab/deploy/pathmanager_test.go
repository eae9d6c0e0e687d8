package deploy

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/netlab"
	"sheaf/webui"
)

// upWith is a world in which everything runs with further settings, though not
// yet over every uplink.
func upWith(t *testing.T, further string) *world {
	t.Helper()
	w := newWorld(t)
	w.need(w.StartConcentrator())
	token, err := w.Token("lab")
	w.need(err)
	w.need(w.StartRouter(w.Settings(token) + further))
	w.need(w.WaitUp())
	return w
}

func (w *world) mode(number int, mode string) {
	w.t.Helper()
	_, err := w.Sheafctl("uplink", "set", fmt.Sprintf("uplink%d", number), "--mode", mode)
	w.need(err)
}

// untilShared waits until all sessions together have a number of subflows for
// each session over each uplink, in the order of status.
func (w *world) untilShared(subflows ...int) {
	w.t.Helper()
	w.need(w.Until(fmt.Sprintf("%v subflows for each session", subflows), func(s webui.Status) error {
		var have []int
		for i, u := range s.Uplinks {
			have = append(have, u.Subflows)
			if u.Subflows != subflows[i]*s.Concentrator.Sessions {
				return fmt.Errorf("%d sessions, %+v", s.Concentrator.Sessions, s.Uplinks)
			}
		}
		if s.Tunnel.State != "up" {
			return fmt.Errorf("%s: %s, subflows %v", s.Tunnel.State, s.Tunnel.Reason, have)
		}
		return nil
	}))
}

var receivedBytes = regexp.MustCompile(`bytes_received:(\d+)`)

// busySubflows counts the router's TCP connections to the concentrator that have
// received at least so many bytes.
func (w *world) busySubflows(least int) (n int) {
	w.t.Helper()
	w.need(w.Lab.Router.Do(func() error {
		out, err := exec.Command("ss", "-tinH", "dst", netlab.CloudAddress).Output()
		for _, m := range receivedBytes.FindAllStringSubmatch(string(out), -1) {
			if received, _ := strconv.Atoi(m[1]); received >= least {
				n++
			}
		}
		return err
	}))
	return n
}

// TestNdiffports: so many subflows over one uplink, which a running download uses
// all of, and another uplink when that one is not to be used.
func TestNdiffports(t *testing.T) {
	w := upWith(t, "multipath: {path_manager: ndiffports}\n")
	w.untilShared(2, 0, 0)
	s, err := w.Status()
	w.need(err)
	if m := s.Multipath; m.Kernel.PathManager != "ndiffports" || w.uplink(s, 2).State != "standby" {
		t.Errorf("status says path manager %q, and uplink2 is %s (%s)", m.Kernel.PathManager, w.uplink(s, 2).State, w.uplink(s, 2).Reason)
	}
	d := w.startDownload(140e6)
	w.progress(d, 5e6)
	if n := w.busySubflows(500e3); n != 2 {
		t.Errorf("%d subflows carry the download, want 2", n)
	}
	w.apply(w.Settings("") + "multipath: {path_manager: ndiffports, subflows: 4}\n")
	w.untilShared(4, 0, 0)
	// Beside two that have filled the uplink it takes the new ones some time.
	n := 0
	for range 3 {
		w.progress(d, 15e6)
		if n = w.busySubflows(500e3); n == 4 {
			break
		}
	}
	if n != 4 {
		t.Errorf("%d subflows carry the download, want 4", n)
	}

	w.mode(1, "off")
	w.untilShared(0, 4, 0)
	w.quiet(d, 1)
	w.mode(2, "backup")
	w.untilShared(0, 0, 4)
	w.quiet(d, 2)
	w.carries(d, 3)
	// The only one that is left carries though it is a backup.
	w.mode(3, "off")
	w.need(w.Until("the backup has the subflows", func(s webui.Status) error {
		if u := w.uplink(s, 2); u.Subflows != 4*s.Concentrator.Sessions || w.uplink(s, 3).Subflows != 0 {
			return fmt.Errorf("%+v", s.Uplinks)
		}
		return nil
	}))
	w.carries(d, 2)
	w.mode(1, "on")
	w.untilShared(4, 0, 0)
	// A link that goes dead without a sign.
	w.mode(2, "on")
	w.need(w.Lab.Uplinks[0].BlackHole(true))
	w.progress(d, 5e6)
	w.need(w.Lab.Uplinks[0].BlackHole(false))
	if err := <-d.done; err != nil {
		t.Fatal(err)
	}
	w.need(w.Router.Stop(15 * time.Second))
	if w.pmType() != "0" {
		t.Error("nobody manages the paths of other programs after the daemon has ended")
	}
}

// secondGateway puts another gateway onto the segment of an uplink, and returns
// how many bytes have come to it since the last call.
func (w *world) secondGateway(u *netlab.Uplink, address string) (came func() uint64) {
	w.t.Helper()
	var hardware net.HardwareAddr
	name := "second"
	w.need(w.Lab.Core.Do(func() error {
		parent, err := netlink.LinkByName(fmt.Sprintf("isp%d", u.Number))
		if err != nil {
			return err
		}
		attributes := netlink.NewLinkAttrs()
		attributes.Name, attributes.ParentIndex = name, parent.Attrs().Index
		if err := netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attributes, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
			return err
		}
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		hardware = link.Attrs().HardwareAddr
		a, err := netlink.ParseAddr(address + "/32")
		if err == nil {
			err = netlink.AddrAdd(link, a)
		}
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		return err
	}))
	w.need(w.Lab.Router.Do(func() error {
		link, err := netlink.LinkByName(u.Interface())
		if err != nil {
			return err
		}
		return netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(address), HardwareAddr: hardware})
	}))
	last := uint64(0)
	return func() (bytes uint64) {
		w.t.Helper()
		w.need(w.Lab.Core.Do(func() error {
			link, err := netlink.LinkByName(name)
			if err == nil {
				total := link.Attrs().Statistics.RxBytes
				bytes, last = total-last, total
			}
			return err
		}))
		return bytes
	}
}

// addAddress gives a host another address until the end of the test.
func (w *world) addAddress(h *netlab.Host, device, address string) {
	w.t.Helper()
	change := func(how func(netlink.Link, *netlink.Addr) error) error {
		return h.Do(func() error {
			link, err := netlink.LinkByName(device)
			if err != nil {
				return err
			}
			a, err := netlink.ParseAddr(address)
			if err != nil {
				return err
			}
			return how(link, a)
		})
	}
	w.need(change(netlink.AddrAdd))
	w.t.Cleanup(func() { w.must(change(netlink.AddrDel)) })
}

// through waits until some of a download's acknowledgements go through a gateway, or
// hardly any; came returns the bytes that have come to it since the last call.
func (w *world) through(d *download, came func() uint64, some bool) {
	w.t.Helper()
	const more = 4e6
	least, most := uint64(0), uint64(3e3)
	if some {
		least, most = 5e3, 1e9
	}
	var bytes uint64
	for range 5 { // what was under way still comes
		came()
		w.progress(d, more)
		if bytes = came(); least <= bytes && bytes <= most {
			return
		}
	}
	w.t.Fatalf("of the acknowledgements of %.0f bytes, %d bytes went through the gateway, want %d to %d", more, bytes, least, most)
}

// startWithFourth starts everything with one more uplink, which is the first in status.
func (w *world) startWithFourth(uplink, manager string) {
	w.t.Helper()
	w.need(w.StartConcentrator())
	token, err := w.Token("lab")
	w.need(err)
	settings := strings.Replace(w.Settings(token), "uplinks:\n", "uplinks:\n  - {name: uplink4, mode: on, "+uplink+"}\n", 1)
	w.need(w.StartRouter(settings + "multipath: {path_manager: " + manager + "}\n"))
	w.need(w.WaitUp())
	w.untilShared(1, 1, 1, 1)
}

// fourthOffAndOn: a download goes through the uplink's gateway while it is on, and only
// then.
func (w *world) fourthOffAndOn(d *download, came func() uint64) {
	w.t.Helper()
	w.through(d, came, true)
	w.mode(4, "off")
	w.untilShared(0, 1, 1, 1)
	w.through(d, came, false)
	w.mode(4, "on")
	w.untilShared(1, 1, 1, 1)
	w.through(d, came, true)
}

// TestBinder: one subflow through every gateway, two of which are behind one
// interface: with the same source address, and with one of its own.
func TestBinder(t *testing.T) {
	for _, test := range []struct{ name, source string }{{"shared source", ""}, {"own source", ", source: 10.1.0.7"}} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			first := w.Lab.Uplinks[0]
			came := w.secondGateway(first, "10.1.0.9")
			w.addAddress(w.Lab.Router, first.Interface(), "10.1.0.7/24")
			w.startWithFourth("interface: wan1, address: {method: gateway, gateway: 10.1.0.9"+test.source+"}", "binder")
			d := w.startDownload(120e6)
			w.progress(d, 3e6)
			w.fourthOffAndOn(d, came)
			w.mode(4, "backup")
			w.need(w.Until("uplink4 stands by", func(s webui.Status) error {
				if u := w.uplink(s, 4); u.State != "standby" || u.Subflows != s.Concentrator.Sessions {
					return fmt.Errorf("%+v", u)
				}
				return nil
			}))
			w.mode(4, "on")
			// Without the default route's gateway, the second is the only one there.
			w.mode(1, "off")
			w.untilShared(1, 0, 1, 1)
			w.through(d, came, true)
			w.mode(1, "on")
			w.untilShared(1, 1, 1, 1)
			if err := <-d.done; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestFullmeshOverSeveralAddresses: to a concentrator with two addresses there is a
// subflow from every uplink to each, and one address may be lost.
func TestFullmeshOverSeveralAddresses(t *testing.T) {
	w := newWorld(t)
	const second = "203.0.113.11"
	t.Cleanup(func() {
		// The kernel notes by itself to which address it was joined (flag implicit).
		flush := exec.Command("ip", "mptcp", "endpoint", "flush")
		w.need(w.Lab.Cloud.Do(flush.Run))
	})
	w.addAddress(w.Lab.Cloud, "eth0", second+"/32") // gone before the flush
	swallow := func(how func(*netlink.Route) error) {
		t.Helper()
		w.need(w.Lab.Core.Do(func() error {
			return how(&netlink.Route{Dst: netlink.NewIPNet(net.ParseIP(second)), Type: unix.RTN_BLACKHOLE})
		}))
	}
	w.need(w.StartConcentrator())
	token, err := w.Concentratord("token", "--name", "lab", "--address", w.Address(), "--address", second+":4443")
	w.need(err)
	w.need(w.StartRouter(w.Settings(strings.TrimSpace(token))))
	w.need(w.WaitUp())
	w.untilShared(2, 2, 2)
	s, err := w.Status()
	w.need(err)
	if s.Multipath.Kernel.PathManager != "fullmesh" {
		t.Errorf("path manager %q", s.Multipath.Kernel.PathManager)
	}
	d := w.startDownload(60e6)
	w.progress(d, 4e6)
	swallow(netlink.RouteAdd)
	w.progress(d, 10e6)
	w.mode(2, "off")
	w.need(w.Until("uplink2 has no subflow", func(s webui.Status) error {
		if u := w.uplink(s, 2); u.Subflows != 0 {
			return fmt.Errorf("%+v", u)
		}
		return nil
	}))
	w.progress(d, 4e6)
	swallow(netlink.RouteDel)
	w.mode(2, "on")
	w.untilShared(2, 2, 2)
	if err := <-d.done; err != nil {
		t.Fatal(err)
	}
	// It is fullmesh alone that uses all of them.
	w.apply(w.Settings("") + "multipath: {path_manager: binder}\n")
	w.untilShared(1, 1, 1)
	w.apply(w.Settings(""))
	w.untilShared(2, 2, 2)
}

// endpoints are the router's, whose ever they are.
func (w *world) endpoints() string {
	w.t.Helper()
	text, err := w.Lab.Router.Network()
	w.need(err)
	var list []string
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "mptcp endpoint") {
			list = append(list, strings.TrimSpace(line))
		}
	}
	return strings.Join(list, "\n")
}

// pmType reads the router's net.mptcp.pm_type.
func (w *world) pmType() (value string) {
	w.t.Helper()
	w.need(w.Lab.Router.Do(func() error {
		text, err := os.ReadFile("/proc/sys/net/mptcp/pm_type")
		value = strings.TrimSpace(string(text))
		return err
	}))
	return value
}

// TestNetlinkHandover: with path manager netlink, what another program sets stays,
// works for our sessions, and nothing of ours is added.
func TestNetlinkHandover(t *testing.T) {
	w := up(t)
	w.apply(w.Settings("") + "multipath: {path_manager: netlink}\n")
	w.need(w.Until("no endpoint is left", func(webui.Status) error {
		if e := w.endpoints(); e != "" {
			return fmt.Errorf("there is %s", e)
		}
		return nil
	}))
	w.need(w.WaitUp())
	mptcp := func(arguments ...string) {
		t.Helper()
		w.need(w.Lab.Router.Do(func() error {
			out, err := exec.Command("ip", append([]string{"mptcp"}, arguments...)...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}))
	}
	mptcp("endpoint", "add", "10.2.0.2", "dev", "wan2", "subflow")
	mptcp("limits", "set", "subflows", "3")
	held := w.endpoints()
	w.need(w.Until("sessions join over the outsider's endpoint", func(s webui.Status) error {
		if u := w.uplink(s, 2); u.Subflows == 0 || w.uplink(s, 3).Subflows != 0 {
			return fmt.Errorf("%+v", s.Uplinks)
		}
		return nil
	}))
	w.need(w.Lab.Router.SetSysctl("net/mptcp/pm_type", "1"))
	// Whatever happens to an uplink, or is changed in the settings, it stays.
	w.mode(3, "off")
	w.need(w.Lab.Uplinks[1].Carrier(false))
	w.untilUplink(2, "has no carrier", func(u webui.UplinkStatus) bool { return u.State == "unfit" })
	w.need(w.Lab.Uplinks[1].Carrier(true))
	w.apply(w.Settings("") + "multipath: {path_manager: netlink, syn_retries: 3}\n")
	if now := w.endpoints(); now != held || w.pmType() != "1" {
		t.Errorf("endpoints\n%s\nwere\n%s\nand pm_type is %s", now, held, w.pmType())
	}
	s, err := w.Status()
	w.need(err)
	if s.Multipath.Kernel.PathManager != "netlink" {
		t.Errorf("status says path manager %q", s.Multipath.Kernel.PathManager)
	}
	mptcp("endpoint", "flush")
	w.apply(w.Settings(""))
	w.need(w.WaitUp())
	if w.pmType() != "0" {
		t.Error("pm_type is still 1 with path manager fullmesh")
	}
}

// TestPathManagersUnderTransfer: a download goes on through every change of the
// path manager, whether the kernel or the daemon manages its session's paths.
func TestPathManagersUnderTransfer(t *testing.T) {
	for _, first := range []string{"fullmesh", "binder"} {
		t.Run(first, func(t *testing.T) {
			w := upWith(t, "multipath: {path_manager: "+first+"}\n")
			d := w.startDownload(100e6)
			w.progress(d, 5e6)
			for _, manager := range []string{"ndiffports", "default", "binder", "netlink", "fullmesh", "default", "ndiffports", "netlink"} {
				w.apply(w.Settings("") + "multipath: {path_manager: " + manager + "}\n")
				w.progress(d, 3e6)
				time.Sleep(200 * time.Millisecond)
				w.progress(d, 3e6)
				t.Logf("%s at %d MB", manager, d.received()/1e6)
			}
			w.apply(w.Settings(""))
			if err := <-d.done; err != nil {
				t.Fatal(err)
			}
			w.need(w.WaitUp())
		})
	}
}

// TestConflict: what another program changes is put back once, and then told of.
func TestConflict(t *testing.T) {
	w := up(t)
	// Nothing tells of such a change: any change of the settings makes the daemon look.
	look := func(mode string) string {
		w.mode(3, mode)
		return w.pmType()
	}
	told := func() (problem string) {
		s, err := w.Status()
		w.need(err)
		for _, p := range s.Problems {
			if strings.Contains(p, "another program") {
				problem = p
			}
		}
		return problem
	}
	w.need(w.Lab.Router.SetSysctl("net/mptcp/pm_type", "1"))
	if value := look("off"); value != "0" || told() != "" {
		t.Errorf("pm_type is %s after another program's change, and status says %q", value, told())
	}
	w.need(w.Lab.Router.SetSysctl("net/mptcp/pm_type", "1"))
	if value := look("on"); value != "1" || !strings.Contains(told(), "net.mptcp.pm_type") {
		t.Errorf("pm_type is %s after the second change, and status says %q", value, told())
	}
	w.need(w.Lab.Router.SetSysctl("net/mptcp/pm_type", "0"))
	if look("off"); told() != "" {
		t.Errorf("they agree, and status says %q", told())
	}
}
