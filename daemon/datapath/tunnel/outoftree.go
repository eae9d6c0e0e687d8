package tunnel

import (
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MPTCP v0.9x, outside Linux's tree, has no protocol number for MPTCP sockets: a
// socket of TCP asks for it, or out of it, by an option, before it connects or
// listens. The same option says later whether the connection has become one.
//
//	ListenConfig, Peer.connect ─▶ control ─▶ option 42 ─▶ a connection ─▶ newSession
//	Session.Subflows ─▶ option 45
//
// The listeners' option passes on to what they accept.

// From include/uapi/linux/tcp.h of v0.95. Upstream has given these numbers to
// other options since (42 is TCP_AO_REPAIR): they are for v0.9x alone.
const (
	outOfTreeEnabled = 42 // MPTCP_ENABLED
	outOfTreeInfo    = 45 // MPTCP_INFO

	sizeOutOfTreeSockaddr = 28 // union of struct sockaddr_in and sockaddr_in6
	sizeOutOfTreeAddress  = 2 * sizeOutOfTreeSockaddr
)

// outOfTree are the system calls of a kernel with MPTCP v0.9x, at the level
// IPPROTO_TCP.
type outOfTree interface {
	Set(fd, option, value int) error
	Get(fd, option int) (int, error)
	// Info is option 45.
	Info(fd int, info *multipathInfo) error
}

// multipathInfo is struct mptcp_info. The kernel writes to where its pointers
// lead, at most as much as the lengths say, and changes the lengths to what it
// wrote. Where one leads nowhere it writes nothing.
type multipathInfo struct {
	sizeInfo        uint32 // of struct tcp_info
	lengthInfos     uint32
	lengthMeta      uint32
	sizeAddress     uint32 // of struct mptcp_sub_info
	lengthAddresses uint32
	_               uint32
	meta            unsafe.Pointer
	initial         unsafe.Pointer
	infos           unsafe.Pointer
	addresses       unsafe.Pointer
}

// outOfTreeKernel is the running one, or nil when its MPTCP is not v0.9x. That
// has its sysctls in the initial network namespace alone.
func outOfTreeKernel() outOfTree {
	if pretended := pretendedOutOfTree.Load(); pretended != nil {
		return *pretended
	}
	return runningOutOfTree()
}

// pretendedOutOfTree is for tests: connections of an earlier one may still be looking.
var pretendedOutOfTree atomic.Pointer[outOfTree]

var runningOutOfTree = sync.OnceValue(func() outOfTree {
	if _, err := os.Stat("/proc/sys/net/mptcp/mptcp_enabled"); err != nil {
		return nil
	}
	return socketOptions{}
})

// ListenConfig opens the listeners whose connections a Server serves: by MPTCP,
// where the kernel has it.
func ListenConfig() *net.ListenConfig {
	config := &net.ListenConfig{KeepAliveConfig: keepAlive, Control: control(true)}
	config.SetMultipathTCP(true)
	return config
}

// control makes sockets of sessions ready, and those of v0.9x ask for MPTCP, or
// out of it. A refusal is no failure: the connection is plain TCP then, as
// newSession finds out.
func control(multipath bool) func(network, address string, raw syscall.RawConn) error {
	kernel := outOfTreeKernel()
	value := 0
	if multipath {
		value = 1
	}
	return func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			tune(int(fd))
			if kernel != nil {
				_ = kernel.Set(int(fd), outOfTreeEnabled, value)
			}
		})
	}
}

// findOutOfTree looks whether the connection is one of v0.9x's MPTCP.
func (s *socket) findOutOfTree() error {
	kernel := outOfTreeKernel()
	if kernel == nil {
		return nil
	}
	return s.raw.Control(func(fd uintptr) {
		if enabled, err := kernel.Get(int(fd), outOfTreeEnabled); err == nil && enabled == 1 {
			s.outOfTree = kernel
		}
	})
}

// outOfTreeSubflows calls each with what the kernel tells of every subflow. The
// kernel writes both lists in the order of its own, under the connection's lock.
func outOfTreeSubflows(kernel outOfTree, fd int, each func(info *unix.TCPInfo, address []byte)) error {
	infos, addresses := borrow(), borrow()
	defer infos.release()
	defer addresses.release()
	const size = uint32(unsafe.Sizeof(unix.TCPInfo{}))
	m := multipathInfo{
		sizeInfo: size, lengthInfos: maxSubflows * size, infos: unsafe.Pointer(&infos.data),
		sizeAddress: sizeOutOfTreeAddress, lengthAddresses: maxSubflows * sizeOutOfTreeAddress, addresses: unsafe.Pointer(&addresses.data),
	}
	if err := kernel.Info(fd, &m); err != nil {
		return err
	}
	if m.sizeInfo == 0 || m.sizeInfo > size || m.sizeAddress != sizeOutOfTreeAddress {
		return unix.EPROTO
	}
	for i := range min(m.lengthInfos/m.sizeInfo, m.lengthAddresses/m.sizeAddress, maxSubflows) {
		var info unix.TCPInfo
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&info)), size), infos.data[i*m.sizeInfo:][:m.sizeInfo])
		each(&info, addresses.data[i*m.sizeAddress:][:m.sizeAddress])
	}
	return nil
}

// socketOptions are the system calls.
type socketOptions struct{}

func (socketOptions) Set(fd, option, value int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, option, value)
}

func (socketOptions) Get(fd, option int) (int, error) {
	return unix.GetsockoptInt(fd, unix.IPPROTO_TCP, option)
}

func (socketOptions) Info(fd int, info *multipathInfo) error {
	length := uint32(unsafe.Sizeof(*info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, outOfTreeInfo,
		uintptr(unsafe.Pointer(info)), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
