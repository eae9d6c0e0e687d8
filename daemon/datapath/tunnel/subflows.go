package tunnel

import (
	"cmp"
	"net"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From include/uapi/linux/mptcp.h, Linux 5.16 and later.
const (
	solMPTCP           = 284
	mptcpTCPInfo       = 2 // MPTCP_TCPINFO
	mptcpSubflowAddrs  = 3 // MPTCP_SUBFLOW_ADDRS
	tcpEstablished     = 1 // TCP_ESTABLISHED, include/net/tcp_states.h
	tcpClose           = 7 // TCP_CLOSE
	maxSubflows        = 64
	sizeSubflowData    = 16  // struct mptcp_subflow_data, 8-byte aligned
	sizeSockaddr       = 128 // struct __kernel_sockaddr_storage
	sizeSubflowAddress = 2 * sizeSockaddr
)

// Subflow is one TCP connection of a session, as the kernel sees it.
type Subflow struct {
	Local, Remote netip.AddrPort
	RTT           time.Duration // smoothed
	MinRTT        time.Duration
	// Segments counts data segments sent, Retransmitted those sent again.
	Segments, Retransmitted uint32
	// Silence is how long nothing came over it, neither data nor acknowledgements;
	// to the kernel's tick.
	Silence time.Duration

	// In bytes: what has been sent at least once, what waits to be, what has been
	// acknowledged, and what has come.
	sent, unsent, acknowledged, received uint64
}

// Subflows lists the session's subflows; a session over plain TCP has one.
func (s *Session) Subflows() ([]Subflow, error) {
	s.account.mu.Lock()
	defer s.account.mu.Unlock()
	return s.look()
}

// subflows lists the subflows of an MPTCP socket, or the one connection of a
// plain TCP socket.
func (s *socket) subflows(multipath bool) ([]Subflow, error) {
	var list []Subflow
	var inner error
	err := s.raw.Control(func(fd uintptr) {
		switch {
		case s.outOfTree != nil:
			inner = outOfTreeSubflows(s.outOfTree, int(fd), func(info *unix.TCPInfo, address []byte) {
				if info.State == tcpEstablished {
					f := Subflow{Local: sockaddr(address[:sizeOutOfTreeSockaddr]), Remote: sockaddr(address[sizeOutOfTreeSockaddr:])}
					f.fill(info)
					list = append(list, f)
				}
			})
			return
		case multipath:
			list, inner = multipathSubflows(int(fd))
			return
		}
		var info *unix.TCPInfo
		if info, inner = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); inner == nil {
			one := Subflow{Local: addrPort(s.conn.LocalAddr()), Remote: addrPort(s.conn.RemoteAddr())}
			one.fill(info)
			list = []Subflow{one}
		}
	})
	if err != nil {
		return nil, err
	}
	return list, inner
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

func (f *Subflow) fill(info *unix.TCPInfo) {
	f.RTT = time.Duration(info.Rtt) * time.Microsecond
	f.MinRTT = time.Duration(info.Min_rtt) * time.Microsecond
	f.Segments = info.Data_segs_out
	f.Retransmitted = info.Total_retrans
	f.Silence = time.Duration(min(info.Last_data_recv, info.Last_ack_recv)) * time.Millisecond
	f.sent, f.unsent = info.Bytes_sent-info.Bytes_retrans, uint64(info.Notsent_bytes)
	f.acknowledged, f.received = more(info.Bytes_acked, 1), info.Bytes_received // our SYN is acknowledged too
}

func multipathSubflows(fd int) ([]Subflow, error) {
	infos, addresses := borrow(), borrow()
	defer infos.release()
	defer addresses.release()
	stride, n, err := subflowOption(fd, mptcpTCPInfo, infos, int(unsafe.Sizeof(unix.TCPInfo{})))
	if err != nil {
		return nil, err
	}
	addressStride, m, err := subflowOption(fd, mptcpSubflowAddrs, addresses, sizeSubflowAddress)
	if err != nil {
		return nil, err
	}
	// Both lists come in the order of the connection's subflow list. A subflow
	// that came or went between the two calls makes them differ: the shorter
	// list then holds, and the next look is right again.
	list := make([]Subflow, 0, min(n, m))
	for i := range min(n, m) {
		var f Subflow
		a := addresses.data[sizeSubflowData+i*addressStride:]
		f.Local, f.Remote = sockaddr(a[:sizeSockaddr]), sockaddr(a[sizeSockaddr:sizeSubflowAddress])
		info := infos.tcpInfo(i, stride)
		// The first subflow stays in the list when it has been closed.
		if info.State == tcpEstablished {
			f.fill(&info)
			list = append(list, f)
		}
	}
	return list, nil
}

// The bounds of what one subflow may hold unsent, in bytes: what it delivers in
// unsentTime, but not so little that it runs dry between two looks.
const (
	unsentTime  = 10 * time.Millisecond
	leastUnsent = 8 << 10
	mostUnsent  = 256 << 10
	tcpCALoss   = 4 // TCP_CA_Loss, include/uapi/linux/tcp.h
)

// backlog adds up, over the subflows of a connection, what the kernel holds that
// it has not sent yet, and what it should hold at most.
type backlog struct {
	unsent, allowed int
	// The same of subflows that wait for a timeout: what they hold the kernel
	// sends over others meanwhile.
	stuckUnsent, stuckAllowed int
}

func (b *backlog) add(info *unix.TCPInfo) {
	unsent := int(info.Notsent_bytes)
	allowed := int(min(max(info.Delivery_rate*uint64(unsentTime)/uint64(time.Second), leastUnsent), mostUnsent))
	if info.Ca_state == tcpCALoss {
		b.stuckUnsent += unsent
		b.stuckAllowed += allowed
		return
	}
	b.unsent += unsent
	b.allowed += allowed
}

// room is how many bytes may be written before more would only wait in the
// kernel; it can be negative.
func (b *backlog) room() int {
	if b.allowed == 0 {
		return b.stuckAllowed - b.stuckUnsent
	}
	return b.allowed - b.unsent
}

// backlog reads what waits unsent in the kernel. The option made for this, TCP_NOTSENT_LOWAT, does not
// reach the subflows of an MPTCP socket (measured on 6.18: 640 kB wait in them
// for a link of 20 Mbit/s, a quarter of a second).
func (s *socket) backlog(multipath bool) (backlog, error) {
	var total backlog
	err := s.eachSubflow(multipath, total.add)
	if s.outOfTree != nil && err == nil {
		// There what no subflow has taken yet waits in the connection.
		var info *unix.TCPInfo
		if info, err = s.info(); err == nil {
			total.unsent += int(info.Notsent_bytes)
		}
	}
	return total, err
}

// eachSubflow reads the state of the established subflows of an MPTCP socket, or
// of the one connection of a plain TCP socket.
func (s *socket) eachSubflow(multipath bool, f func(*unix.TCPInfo)) error {
	var inner error
	err := s.raw.Control(func(fd uintptr) {
		if s.outOfTree != nil {
			inner = outOfTreeSubflows(s.outOfTree, int(fd), func(info *unix.TCPInfo, _ []byte) {
				if info.State == tcpEstablished {
					f(info)
				}
			})
			return
		}
		if multipath {
			infos := borrow()
			defer infos.release()
			var stride, n int
			if stride, n, inner = subflowOption(int(fd), mptcpTCPInfo, infos, int(unsafe.Sizeof(unix.TCPInfo{}))); inner == nil {
				for i := range n {
					if info := infos.tcpInfo(i, stride); info.State == tcpEstablished {
						f(&info)
					}
				}
				return
			}
			// It has fallen back to plain TCP.
		}
		var info *unix.TCPInfo
		if info, inner = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); inner == nil {
			f(info)
		}
	})
	if err == nil {
		err = inner
	}
	return err
}

// info is what TCP_INFO says: of a plain TCP socket, and of a whole connection of
// MPTCP v0.9x.
func (s *socket) info() (info *unix.TCPInfo, err error) {
	errControl := s.raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	return info, cmp.Or(errControl, err)
}

// tcpInfo is entry i of what subflowOption read. The kernel may know a shorter
// tcp_info than we do: the rest is zero.
func (b *buffer) tcpInfo(i, stride int) (info unix.TCPInfo) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info)), b.data[sizeSubflowData+i*stride:][:stride])
	return info
}

const mptcpInfo = 1 // MPTCP_INFO, include/uapi/linux/mptcp.h, Linux 5.16 and later

// mptcpInfoHead is the beginning of struct mptcp_info, as Linux 5.16 had it.
type mptcpInfoHead struct {
	Subflows               uint8 // besides the first
	_                      [2]byte
	SubflowsMax            uint8 // of these the kernel accepts no more
	_                      [4]byte
	Flags, Token           uint32
	WriteSeq, SndUna, Next uint64
}

// mptcpInfo reads the state of the connection, which is one of MPTCP.
func (s *socket) mptcpInfo() (info mptcpInfoHead, err error) {
	controlErr := s.raw.Control(func(fd uintptr) { info, err = readMPTCPInfo(fd) })
	return info, cmp.Or(controlErr, err)
}

// readMPTCPInfo is mptcpInfo for who has the descriptor.
func readMPTCPInfo(fd uintptr) (info mptcpInfoHead, err error) {
	length := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, solMPTCP, mptcpInfo,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return info, errno
	}
	return info, nil
}

// subflowOption reads into b one of the MPTCP options that return an array
// behind a struct mptcp_subflow_data, and returns the size and number of its
// entries.
func subflowOption(fd, option int, b *buffer, size int) (stride, count int, err error) {
	header := (*[4]uint32)(unsafe.Pointer(b)) // size_subflow_data, num_subflows, size_kernel, size_user
	*header = [4]uint32{sizeSubflowData, 0, 0, uint32(size)}
	length := uint32(sizeSubflowData + maxSubflows*size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), solMPTCP, uintptr(option),
		uintptr(unsafe.Pointer(b)), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return 0, 0, errno
	}
	// size_user comes back as the size that the kernel really wrote.
	return int(header[3]), min(int(header[1]), maxSubflows), nil
}

func sockaddr(b []byte) netip.AddrPort {
	family := *(*uint16)(unsafe.Pointer(&b[0]))
	port := uint16(b[2])<<8 | uint16(b[3])
	switch family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])).Unmap(), port)
	}
	return netip.AddrPort{}
}
