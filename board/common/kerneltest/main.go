// Kerneltest is the first and only program of the virtual machine in which
// `make kernel-test` proves the packet schedulers of patches/linux: it makes
// two namespaces with two links, sends over both, and prints a line for each
// thing proven, `ok` or `FAIL`, and a last one with their numbers.
//
// Time in the virtual machine is counted in instructions, not in the host's
// seconds, so that a busy host changes no result.
package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "kerneltest: this runs as /init of a virtual machine, and ends it: use make kernel-test")
		os.Exit(2)
	}
	os.Exit(proveAll(os.Stdout))
}

// proveAll ends in a restart, at which the virtual machine is given up; the exit
// code is for when that fails.
func proveAll(out io.Writer) int {
	for _, m := range []struct{ kind, path string }{{"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m.kind, m.path, m.kind, 0, ""); err != nil {
			fmt.Fprintf(out, "FAIL mount %s: %v\n", m.path, err)
		}
	}
	passed, failed := 0, 0
	for _, c := range cases {
		if detail, err := c.prove(); err != nil {
			failed++
			fmt.Fprintf(out, "FAIL %s: %v\n", c.name, err)
		} else {
			passed++
			fmt.Fprintf(out, "ok %s: %s\n", c.name, detail)
		}
	}
	fmt.Fprintf(out, "kernel-test: %d passed, %d failed\n", passed, failed)
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		fmt.Fprintln(out, "FAIL to end the virtual machine:", err)
	}
	return 1
}
