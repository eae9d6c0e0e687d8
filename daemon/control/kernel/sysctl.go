package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// sysctlDirectory holds what belongs to one network namespace. Once it is open,
// every thread sees that namespace's through it.
const sysctlDirectory = "/proc/sys/net/mptcp"

// readSysctls returns those of these names that the kernel has.
func (k *Kernel) readSysctls(names []string) (map[string]string, error) {
	values := map[string]string{}
	if k.sysctls == nil {
		return values, nil
	}
	for _, name := range names {
		text, err := k.sysctls.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read net.mptcp.%s: %w", name, err)
		}
		values[name] = strings.TrimSpace(string(text))
	}
	return values, nil
}

func (k *Kernel) setSysctl(name, value string) error {
	if k.sysctls == nil {
		return errors.New("this kernel has no net.mptcp")
	}
	f, err := k.sysctls.OpenFile(name, os.O_WRONLY, 0)
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
	values, err := k.readSysctls(append(desired.SysctlNames(), pathManagers, outOfTree,
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
