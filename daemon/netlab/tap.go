package netlab

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openTAP makes a TAP device in the namespace of the calling thread. Closing
// it removes the device. It announces no offloads, so the kernel cuts and
// checksums each frame before it comes out here, as for a real wire.
func openTAP(name string) (int, error) {
	const path = "/dev/net/tun"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("netlab: open %s: %w (the kernel needs CONFIG_TUN)", path, err)
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("netlab: TAP device %s: %w", name, err)
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("netlab: make the TAP device %s: %w", name, err)
	}
	return fd, nil
}

func setTAPCarrier(fd int, up bool) error {
	value := 0
	if up {
		value = 1
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETCARRIER, value); err != nil {
		return fmt.Errorf("netlab: set the carrier of a TAP device: %w", err)
	}
	return nil
}

// rawRead and rawWrite are system calls that never block, so there is no need
// to tell the Go scheduler. Telling it would let it take the processor away
// from the emulator in the middle of a batch.

func rawRead(fd int, b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

func rawWrite(fd int, b []byte) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	return errno
}
