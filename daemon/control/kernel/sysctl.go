package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

const mptcpDirectory = "mptcp"

func (k *Kernel) openSysctls() error {
	k.sysctls = map[string]*os.Root{}
	for _, name := range []string{mptcpDirectory, "ipv4", "ipv6"} {
		root, err := os.OpenRoot(filepath.Join(k.directories.sysctls, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open the sysctls of %s: %w", name, err)
		}
		k.sysctls[name] = root
	}
	return nil
}

// readSysctl returns the value at a path below net, if the kernel has it.
func (k *Kernel) readSysctl(path string) (value string, exists bool, err error) {
	directory, name, _ := strings.Cut(path, "/")
	root := k.sysctls[directory]
	if root == nil {
		return "", false, nil
	}
	text, err := root.ReadFile(name)
	// An interface that disappears says EINVAL or ENODEV while it does.
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return "", false, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("read sysctl net/%s: %w", path, err)
	}
	return strings.TrimSpace(string(text)), true, nil
}

// Restore puts back what was there before, as desired.Restore says. The sysctls of
// interfaces that are gone went with them.
func (k *Kernel) Restore(ctx context.Context, before map[string]string) error {
	return k.Apply(ctx, slices.DeleteFunc(desired.Restore(before), func(c desired.Change) bool {
		set, is := c.(desired.SetSysctl)
		if !is || !strings.Contains(set.Path, "/conf/") {
			return false
		}
		_, exists, err := k.readSysctl(set.Path)
		return err == nil && !exists
	}))
}

// readMPTCPSysctls returns those of these names below net.mptcp that the kernel has.
func (k *Kernel) readMPTCPSysctls(names []string) (map[string]string, error) {
	values := map[string]string{}
	for _, name := range names {
		value, exists, err := k.readSysctl(mptcpDirectory + "/" + name)
		if err != nil {
			return nil, err
		}
		if exists {
			values[name] = value
		}
	}
	return values, nil
}

func (k *Kernel) readSysctls(names map[int]string) (map[string]desired.Sysctl, error) {
	values := map[string]desired.Sysctl{}
	for _, path := range desired.SysctlPaths(slices.Collect(maps.Values(names))) {
		value, exists, err := k.readSysctl(path)
		if err != nil {
			return nil, err
		}
		if exists {
			values[path] = desired.Sysctl{Value: value}
		}
	}
	return values, nil
}

func (k *Kernel) setSysctl(path, value string) error {
	directory, name, _ := strings.Cut(path, "/")
	root := k.sysctls[directory]
	if root == nil {
		return fmt.Errorf("this kernel has no net.%s", directory)
	}
	err := write(root, name, value)
	if err != nil && k.outOfTree != nil && directory == mptcpDirectory {
		return k.outOfTree.refuse(name, value, err)
	}
	return err
}

// write gives a file that the kernel shows a new value. With the end of the line
// an empty one is written too.
func write(root *os.Root, name, value string) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value + "\n")
	return err
}

// The implementations of MPTCP that Info tells apart.
const (
	Upstream  = "upstream"
	OutOfTree = "v0.9x"
	NoMPTCP   = "none"
)

// Info is what a status page shows of the kernel.
type Info struct {
	Release string `json:"release"`
	// MPTCP is Upstream, OutOfTree or NoMPTCP.
	MPTCP string `json:"mptcp"`
	// Schedulers and PathManagers are those that the kernel offers; v0.9x has no
	// list, and only tells which is in use.
	Schedulers   []string          `json:"schedulers"`
	PathManagers []string          `json:"path_managers"`
	Sysctls      map[string]string `json:"sysctls"` // by name below net.mptcp
	// Connections and Subflows are the established ones of the namespace, whose
	// ever they are. Only v0.9x counts them.
	Connections int `json:"connections"`
	Subflows    int `json:"subflows"`
}

// Userspace says whether the kernel lets programs manage the paths of connections yet
// to come, and whether it can (pm_type, Linux 5.19).
func (i Info) Userspace() (is, can bool) {
	value, can := i.Sysctls["pm_type"]
	return value == "1", can
}

// release is the version of the running kernel.
func release() (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(name.Release[:]), nil
}

// Info reads what kernel this is and how MPTCP is set in it.
func (k *Kernel) Info() (Info, error) {
	name, err := release()
	if err != nil {
		return Info{}, err
	}
	info := Info{Release: name, MPTCP: NoMPTCP}
	const (
		pathManagers = "available_path_managers"
		schedulers   = "available_schedulers"
	)
	values, err := k.readMPTCPSysctls(slices.Concat(desired.SysctlNames(), []string{pathManagers}, desired.OutOfTreeSysctlNames()))
	if err != nil {
		return Info{}, err
	}
	info.Sysctls = values
	info.Schedulers = strings.Fields(values[schedulers])
	info.PathManagers = strings.Fields(values[pathManagers])
	switch {
	case k.mptcp != nil:
		info.MPTCP = Upstream
	case k.outOfTree != nil:
		info.MPTCP = OutOfTree
		info.Schedulers = []string{values["mptcp_scheduler"]}
		info.PathManagers = []string{values["mptcp_path_manager"]}
		info.Connections, info.Subflows, err = k.outOfTree.established()
	}
	return info, err
}

// remember tells Before what is about to be changed.
func (k *Kernel) remember(changes []desired.Change) error {
	if k.Before == nil {
		return nil
	}
	values := map[string]string{}
	if k.outOfTree != nil {
		var err error
		if values, err = k.outOfTree.before(changes); err != nil {
			return err
		}
		delete(values, desired.LinkPath+k.scope.device) // the TUN goes with its daemon
	}
	for _, change := range changes {
		c, ok := change.(desired.SetSysctl)
		if !ok || k.outOfTree == nil && strings.HasPrefix(c.Path, mptcpDirectory+"/") {
			continue
		}
		value, exists, err := k.readSysctl(c.Path)
		if err != nil {
			return err
		}
		if exists && !strings.Contains(c.Path, "/conf/"+k.scope.device+"/") {
			values[c.Path] = value
		}
	}
	if len(values) == 0 {
		return nil
	}
	if err := k.Before(values); err != nil {
		return fmt.Errorf("remembering what sysctls were: %w", err)
	}
	return nil
}
