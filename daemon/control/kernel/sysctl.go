package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// sysctlDirectory is where the sysctls of the network are. Of its parts below,
// each belongs to one network namespace: once it is open, every thread sees that
// namespace's through it. The directory itself leads each thread to its own.
const sysctlDirectory = "/proc/sys/net/"

const mptcpDirectory = "mptcp"

func (k *Kernel) openSysctls() error {
	k.sysctls = map[string]*os.Root{}
	for _, name := range []string{mptcpDirectory, "ipv4", "ipv6"} {
		root, err := os.OpenRoot(sysctlDirectory + name)
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

// readSysctl returns the value at a path below sysctlDirectory, if the kernel has it.
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
	f, err := root.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}

// Info is what a status page shows of the kernel.
type Info struct {
	Release string `json:"release"`
	// MPTCP is upstream, v0.9x or none.
	MPTCP        string            `json:"mptcp"`
	Schedulers   []string          `json:"schedulers"`
	PathManagers []string          `json:"path_managers"`
	Sysctls      map[string]string `json:"sysctls"` // by name below net.mptcp
}

// Info reads what kernel this is and how MPTCP is set in it.
func (k *Kernel) Info() (Info, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return Info{}, fmt.Errorf("uname: %w", err)
	}
	info := Info{Release: unix.ByteSliceToString(name.Release[:]), MPTCP: "none"}
	const (
		outOfTree    = "mptcp_enabled"
		pathManagers = "available_path_managers"
		schedulers   = "available_schedulers"
	)
	values, err := k.readMPTCPSysctls(append(desired.SysctlNames(), pathManagers, outOfTree,
		"mptcp_version", "mptcp_checksum", "mptcp_syn_retries", "mptcp_path_manager", "mptcp_scheduler"))
	if err != nil {
		return Info{}, err
	}
	info.Sysctls = values
	info.Schedulers = strings.Fields(values[schedulers])
	info.PathManagers = strings.Fields(values[pathManagers])
	switch {
	case k.mptcp != nil:
		info.MPTCP = "upstream"
	case values[outOfTree] != "":
		info.MPTCP = "v0.9x"
	}
	return info, nil
}

// rememberSysctls tells Before what is about to be changed.
func (k *Kernel) rememberSysctls(changes []desired.Change) error {
	if k.Before == nil {
		return nil
	}
	values := map[string]string{}
	for _, change := range changes {
		c, ok := change.(desired.SetSysctl)
		if !ok || strings.HasPrefix(c.Path, mptcpDirectory+"/") {
			continue
		}
		value, exists, err := k.readSysctl(c.Path)
		if err != nil {
			return err
		}
		// The TUN goes with its daemon.
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
