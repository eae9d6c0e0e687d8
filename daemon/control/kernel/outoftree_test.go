package kernel

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
	"sheaf/daemon/control/settings"
)

// recorded is the tree of a 4.19 kernel with MPTCP v0.95, but for the sysctls of
// IPv4 and IPv6, which are those of the running one.
func recorded(t *testing.T) directories {
	t.Helper()
	tree := t.TempDir()
	must(t, os.CopyFS(tree, os.DirFS("testdata/v0.95")))
	for _, name := range []string{"ipv4", "ipv6"} {
		must(t, os.Symlink(filepath.Join(running.sysctls, name), filepath.Join(tree, "sys", name)))
	}
	return directories{sysctls: filepath.Join(tree, "sys"), modules: filepath.Join(tree, "module"), network: filepath.Join(tree, "net")}
}

// openOutOfTree is a router's Kernel on a recorded tree, with the interfaces of
// the namespace in a fake that takes their flags as v0.95 does.
func openOutOfTree(t *testing.T, d directories) (*Kernel, *fakeLinks) {
	t.Helper()
	k, err := newKernel(scope{table: desired.TableName, device: desired.TunnelName, router: true}, d)
	must(t, err)
	t.Cleanup(func() { k.Close() })
	if k.outOfTree == nil || k.mptcp != nil {
		t.Fatal("MPTCP v0.9x was not recognised")
	}
	fake := &fakeLinks{}
	fake.all, err = k.outOfTree.links.List()
	must(t, err)
	must(t, k.outOfTree.links.Close())
	k.outOfTree.links = fake
	return k, fake
}

// fakeLinks stands in for rtnetlink of a kernel that has the flags.
type fakeLinks struct{ all []link }

func (f *fakeLinks) List() ([]link, error) { return slices.Clone(f.all), nil }
func (f *fakeLinks) Close() error          { return nil }

func (f *fakeLinks) SetFlags(index int, flags, mask uint32) error {
	for i, l := range f.all {
		if l.Index == index {
			f.all[i].Flags = l.Flags&^mask | flags&mask
			return nil
		}
	}
	return unix.ENODEV
}

func (f *fakeLinks) String() string {
	var list []string
	for _, l := range f.all {
		if l.Flags&^linkMask == 0 {
			return l.Name + " has lost its other flags"
		}
		if flags := desired.LinkFlags(l.Flags & linkMask); flags != 0 {
			list = append(list, l.Name+" "+flags.String())
		}
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

// files reads a tree's values, each with the end of its line.
func files(t *testing.T, d directories) string {
	t.Helper()
	var b strings.Builder
	for _, directory := range []string{filepath.Join(d.sysctls, "mptcp"), d.modules} {
		must(t, filepath.WalkDir(directory, func(path string, entry os.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			value, err := os.ReadFile(path)
			fmt.Fprintf(&b, "%s=%s", strings.TrimPrefix(path, directory+"/"), value)
			return err
		}))
	}
	return b.String()
}

func TestOutOfTree(t *testing.T) {
	s := router(t)
	d := recorded(t)
	k, links := openOutOfTree(t, d)
	before := map[string]string{}
	k.Before = func(values map[string]string) error {
		for path, value := range values {
			if _, ok := before[path]; !ok {
				before[path] = value
			}
		}
		return nil
	}
	recordedFiles := files(t, d)

	s.Multipath = settings.Multipath{Enabled: true, PathManager: settings.PathManagerFullmesh, Scheduler: "roundrobin", SYNRetries: 2,
		OutOfTree: settings.OutOfTree{Debug: true, BinderGateways: "10.1.0.1,10.9.0.1-10.2.0.1", NumSegments: 10, CwndLimited: "off"}}
	changes := apply(t, k, compile(t, s))
	if diff := cmp.Diff(strings.TrimSpace(`
mptcp_binder_gateways=10.1.0.1,10.9.0.1-10.2.0.1
mptcp_checksum=0
mptcp_debug=1
mptcp_enabled=1
mptcp_path_manager=fullmesh
mptcp_scheduler=roundrobin
mptcp_syn_retries=2
mptcp_version=1
mptcp_fullmesh/parameters/create_on_err=0
mptcp_fullmesh/parameters/num_subflows=1
mptcp_ndiffports/parameters/num_subflows=2
mptcp_rr/parameters/cwnd_limited=N
mptcp_rr/parameters/num_segments=10`), strings.TrimSpace(files(t, d))); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if links.String() != "lan0 off, wan2 backup" {
		t.Errorf("flags: %s", links)
	}
	if !strings.Contains(text(changes), "ip link set dev wan2 multipath backup") || !strings.Contains(text(changes), "sysctl net.mptcp.mptcp_scheduler=roundrobin") {
		t.Errorf("changes:%s", text(changes))
	}
	if again := apply(t, k, compile(t, s)); len(again) > 0 {
		t.Errorf("applied twice:%s", text(again))
	}
	if have := read(t, k); have.MPTCP != nil || len(desired.Problems(have, compile(t, s))) > 0 || len(have.Rules) != 9 {
		t.Errorf("%+v, %v", have, desired.Problems(have, compile(t, s)))
	}

	s.Uplinks[0].Mode, s.Uplinks[1].Mode = settings.Off, settings.On
	changes = slices.DeleteFunc(apply(t, k, compile(t, s)), func(c desired.Change) bool {
		_, isLink := c.(desired.SetLinkFlags)
		return !isLink
	})
	if text(changes) != "\nip link set dev wan2 multipath on\nip link set dev wan1 multipath off" {
		t.Errorf("modes changed by%s", text(changes))
	}

	s.Multipath.PathManager, s.Multipath.Subflows = settings.PathManagerNdiffports, 4
	apply(t, k, compile(t, s))
	if got := files(t, d); !strings.Contains(got, "mptcp_path_manager=ndiffports\n") || !strings.Contains(got, "mptcp_ndiffports/parameters/num_subflows=4\n") {
		t.Errorf("ndiffports: %s", got)
	}

	info, err := k.Info()
	must(t, err)
	if info.MPTCP != OutOfTree || info.Sysctls["mptcp_syn_retries"] != "2" || info.Schedulers[0] != "roundrobin" || info.PathManagers[0] != "ndiffports" ||
		info.Connections != 3 || info.Subflows != 6 {
		t.Errorf("%+v", info)
	}

	// An interface that has gone has no flags to put back.
	before[desired.LinkPath+"wan9"] = "on"
	must(t, k.Apply(ctx, desired.Restore(before)))
	if after := files(t, d); after != recordedFiles || links.String() != "" {
		t.Errorf("put back: %s, flags %q", cmp.Diff(recordedFiles, after), links)
	}
	must(t, k.Clean(ctx))
	if have := read(t, k); len(have.Rules) > 0 {
		t.Errorf("left over: %v", have.Rules)
	}
}

// TestRefusedName: a name that the kernel does not have is said once as a failure
// of its change, then as a problem, and is tried again after a while. The refusal
// is a real kernel's: of another sysctl that takes names of modules, and says
// ENOENT as v0.95's do.
func TestRefusedName(t *testing.T) {
	s := router(t)
	d := recorded(t)
	must(t, unix.Unshare(unix.CLONE_NEWNS))
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	scheduler := filepath.Join(d.sysctls, "mptcp", "mptcp_scheduler")
	must(t, unix.Mount("/proc/sys/net/ipv4/tcp_congestion_control", scheduler, "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(scheduler, 0)) })
	k, _ := openOutOfTree(t, d)

	s.Multipath.Scheduler = "nosuch"
	want := compile(t, s)
	err := k.Apply(ctx, desired.Diff(read(t, k), want))
	if !strings.Contains(fmt.Sprint(err), `sysctl net.mptcp.mptcp_scheduler=nosuch: this kernel refuses "nosuch"`) {
		t.Errorf("first: %v", err)
	}
	have := read(t, k)
	if left := desired.Diff(have, want); len(left) > 0 {
		t.Errorf("tried again at once:%s", text(left))
	}
	problems := desired.Problems(have, want)
	if len(problems) != 1 || !strings.HasPrefix(problems[0], "this kernel refuses the MPTCP scheduler nosuch: it runs ") {
		t.Errorf("problems: %q", problems)
	}
	k.outOfTree.refused["mptcp_scheduler"] = refusedValue{"nosuch", time.Now().Add(-retryRefused)}
	if left := text(desired.Diff(read(t, k), want)); left != "\nsysctl net.mptcp.mptcp_scheduler=nosuch" {
		t.Errorf("after a while:%s", left)
	}
	s.Multipath.Scheduler = "reno" // which the stand-in has
	apply(t, k, compile(t, s))
	if problems := desired.Problems(read(t, k), compile(t, s)); len(problems) > 0 {
		t.Errorf("another name: %q", problems)
	}
}

// TestLinkFlags: the messages are right, as flags show that the running kernel
// knows: those in the mask change, and no others.
func TestLinkFlags(t *testing.T) {
	enter(t)
	addVeth(t, "wan1")
	k := &Kernel{directories: running}
	must(t, k.openOutOfTree())
	defer k.outOfTree.close()
	find := func(name string) link {
		all, err := k.outOfTree.links.List()
		must(t, err)
		i := slices.IndexFunc(all, func(l link) bool { return l.Name == name })
		if i < 0 {
			t.Fatalf("%s is not among %v", name, all)
		}
		return all[i]
	}
	before := find("wan1")
	real, err := netlink.LinkByName("wan1")
	must(t, err)
	if before.Index != real.Attrs().Index || before.Flags != real.Attrs().RawFlags || before.Flags&unix.IFF_MULTICAST == 0 {
		t.Fatalf("%+v, and package netlink says %+v", before, real.Attrs())
	}
	must(t, k.outOfTree.links.SetFlags(before.Index, unix.IFF_DEBUG|unix.IFF_NOTRAILERS, unix.IFF_DEBUG|unix.IFF_MULTICAST))
	if after := find("wan1"); after.Flags != before.Flags&^unix.IFF_MULTICAST|unix.IFF_DEBUG {
		t.Errorf("flags %#x, before %#x", after.Flags, before.Flags)
	}
	// The flags themselves, which this kernel takes no notice of.
	must(t, k.setLinkFlags("wan1", desired.LinkBackup))
	must(t, k.setLinkFlags("gone", desired.LinkOff))
	if err := k.outOfTree.links.SetFlags(9999, 0, linkMask); err == nil {
		t.Error("an interface that does not exist took flags")
	}
}

func TestCountConnections(t *testing.T) {
	text, err := os.ReadFile("testdata/v0.95/net/mptcp_net/mptcp")
	must(t, err)
	heading, _, _ := strings.Cut(string(text), "\n")
	for _, c := range []struct {
		name, text            string
		connections, subflows int
		fails                 string
	}{
		{"as recorded: one of four is not established yet", string(text), 3, 6, ""},
		{"none", heading + "\n", 0, 0, ""},
		{"a kernel that writes nothing", "", 0, 0, ""},
		{"fewer columns", heading + "\n   0: A1 B2  0 1:1\n", 0, 0, "line 2 of the MPTCP connections has 5 columns"},
		{"no numbers", heading + "\n   0: A1 B2  0 1:1 2:2 xx 01 0:0 7\n", 0, 0, "line 2 of the MPTCP connections: strconv.ParseUint"},
	} {
		connections, subflows, err := countConnections([]byte(c.text))
		if connections != c.connections || subflows != c.subflows || (err == nil) != (c.fails == "") || !strings.Contains(fmt.Sprint(err), c.fails) {
			t.Errorf("%s: %d connections, %d subflows, %v", c.name, connections, subflows, err)
		}
	}
}

// TestWithoutMPTCP: on a kernel without any MPTCP all else works, and what is
// lacking is said.
func TestWithoutMPTCP(t *testing.T) {
	s := router(t)
	d := recorded(t)
	must(t, os.RemoveAll(filepath.Join(d.sysctls, "mptcp")))
	k, err := newKernel(scope{table: desired.TableName, device: desired.TunnelName, router: true}, d)
	must(t, err)
	defer k.Close()
	info, err := k.Info()
	must(t, err)
	if info.MPTCP != NoMPTCP || len(info.Sysctls) > 0 {
		t.Errorf("%+v", info)
	}
	want := compile(t, s)
	apply(t, k, want)
	have := read(t, k)
	if have.MPTCP != nil || have.OutOfTree != nil || len(have.Rules) != 9 {
		t.Errorf("%+v", have)
	}
	if problems := desired.Problems(have, want); len(problems) != 1 || problems[0] != "this kernel has no MPTCP: TCP flows use one uplink at a time" {
		t.Errorf("problems: %q", problems)
	}
	for change, reason := range maps.All(map[desired.Change]string{
		desired.SetLimits{}:                                      "this kernel has no upstream MPTCP",
		desired.SetLinkFlags{Interface: "wan1"}:                  "this kernel has no MPTCP flags of interfaces",
		desired.SetParameter{Parameter: "mptcp_rr/num_segments"}: "this kernel has no parameters of MPTCP modules",
	}) {
		if err := k.Apply(ctx, []desired.Change{change}); !strings.Contains(fmt.Sprint(err), reason) {
			t.Errorf("%s: %v", change, err)
		}
	}
}
