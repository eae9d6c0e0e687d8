package netlab

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A namespace without a name cannot be listed, so each gets one end of a veth
// pair whose other end, the canary, is in a namespace that the test watches:
// it disappears at the moment the kernel takes the namespace down, and so all
// that is in it.
func TestCloseRemovesEverything(t *testing.T) {
	descriptors := openFiles(t)
	watcher, err := newHost("watcher")
	must(t, err)
	l := newLab(t, Config{Uplinks: make([]Shape, 3)})
	for i, h := range l.hosts {
		addCanary(t, watcher, i, h.namespace)
	}
	p, _ := start(t, l.Cloud, "idle")
	if n := foreignThreads(t, "self"); n != 6 {
		t.Errorf("%d threads in other namespaces, want the watcher's and one for each host", n)
	}
	if n := canaries(t, watcher); n != len(l.hosts) {
		t.Fatalf("%d canaries", n)
	}

	must(t, l.Close())
	select {
	case <-p.Done():
	default:
		t.Error("a process has outlived its lab")
	}
	eventually(t, 5*time.Second, func() string {
		if n := canaries(t, watcher); n > 0 {
			return fmt.Sprintf("%d namespaces are left", n)
		}
		return ""
	})
	must(t, watcher.close())
	eventually(t, 5*time.Second, func() string {
		if n := foreignThreads(t, "self"); n > 0 {
			return fmt.Sprintf("%d threads are in other namespaces", n)
		}
		if n := openFiles(t); n > descriptors {
			return fmt.Sprintf("%d files are open, before it were %d", n, descriptors)
		}
		return ""
	})
	if err := l.LAN.Do(func() error { return nil }); err == nil {
		t.Error("Do works in a closed lab")
	}
	if _, err := l.LAN.Start(command("idle")); err == nil {
		t.Error("Start works in a closed lab")
	}
	must(t, l.Close())
}

// labUntilKilled is a role: a lab with a process in it, which says its number.
func labUntilKilled() {
	l, err := New(Config{Uplinks: make([]Shape, 3)})
	if err != nil {
		fmt.Println(err)
		return
	}
	p, err := l.Cloud.Start(command("idle"))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(p.Pid())
	select {}
}

func TestKillRemovesEverything(t *testing.T) {
	watcher, err := newHost("watcher")
	must(t, err)
	defer watcher.close()
	lab, said := start(t, watcher, "lab")
	var grandchild int
	if _, err := fmt.Sscan(said, &grandchild); err != nil {
		t.Fatalf("the child says %q", said)
	}

	self := fmt.Sprint(lab.Pid())
	own, err := os.Readlink("/proc/" + self + "/ns/net")
	must(t, err)
	found := map[string]bool{own: true}
	tasks, err := filepath.Glob("/proc/" + self + "/task/*/ns/net")
	must(t, err)
	for _, task := range tasks {
		namespace, err := os.Readlink(task)
		if err != nil || found[namespace] {
			continue
		}
		fd, err := unix.Open(task, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		must(t, err)
		addCanary(t, watcher, len(found), fd)
		found[namespace] = true
		unix.Close(fd)
	}
	if n := canaries(t, watcher); n != 5 {
		t.Fatalf("the child has %d namespaces, want one for each host", n)
	}

	must(t, lab.Kill())
	eventually(t, 5*time.Second, func() string {
		if n := canaries(t, watcher); n > 0 {
			return fmt.Sprintf("%d namespaces are left", n)
		}
		if running(grandchild) {
			return "the process in the lab still runs"
		}
		return ""
	})
}

// running tells zombies, which wait for whoever inherited them, from the living.
func running(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func addCanary(t *testing.T, watcher *Host, number, namespace int) {
	t.Helper()
	must(t, watcher.Do(func() error {
		attributes := netlink.NewLinkAttrs()
		attributes.Name = fmt.Sprintf("canary%d", number)
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attributes,
			PeerName: "watched", PeerNamespace: netlink.NsFd(namespace)})
	}))
}

func canaries(t *testing.T, watcher *Host) int {
	t.Helper()
	return strings.Count(network(t, watcher), "link canary")
}

// foreignThreads counts the threads of a process outside its main thread's
// network namespace.
func foreignThreads(t *testing.T, process string) int {
	t.Helper()
	own, err := os.Readlink("/proc/" + process + "/ns/net")
	must(t, err)
	tasks, err := filepath.Glob("/proc/" + process + "/task/*/ns/net")
	must(t, err)
	n := 0
	for _, task := range tasks {
		if namespace, err := os.Readlink(task); err == nil && namespace != own {
			n++
		}
	}
	return n
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

func TestProcess(t *testing.T) {
	h, err := newHost("host")
	must(t, err)
	defer h.close()

	p, _ := start(t, h, "busy")
	namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", p.Pid()))
	must(t, err)
	must(t, h.Do(func() error {
		own, err := os.Readlink("/proc/thread-self/ns/net")
		if namespace != own {
			t.Errorf("the process is in %s, its host is %s", namespace, own)
		}
		return err
	}))
	u, err := p.Usage()
	must(t, err)
	if u.CPU < 100*ms || u.CPU > 10*time.Second {
		t.Errorf("CPU %v after 300 ms of work", u.CPU)
	}
	if u.Resident < 32<<20 || u.PeakResident < u.Resident {
		t.Errorf("resident %d, at most %d, after writing 32 MiB", u.Resident, u.PeakResident)
	}
	must(t, p.Kill())
	if status := p.Cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGKILL {
		t.Errorf("killed, and ended by %v", status.Signal())
	}
	if _, err := p.Usage(); err == nil {
		t.Error("a process that is gone uses something")
	}
	must(t, p.Kill())

	p, _ = start(t, h, "polite")
	must(t, p.Stop(5*time.Second))

	p, _ = start(t, h, "deaf")
	if err := p.Stop(100 * ms); err == nil || !strings.Contains(err.Error(), "had to be killed") {
		t.Errorf("stopped a deaf process: %v", err)
	}
}
