package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// The path of a decision about one session's subflows, when it was opened with
// net.mptcp.pm_type 1 (userspace path manager, Linux 5.19):
//
//	Subflows ◀── sock_diag          what there is
//	AbortClosed, AbortSubflows ──▶  what is to be no more, at once
//	ChangeSubflow ──▶ mptcp_pm      SUBFLOW_CREATE, SUBFLOW_DESTROY, REMOVE, SET_FLAGS
//	FollowSubflows ◀── mptcp_pm's   a subflow came or went: read again
//	                   events group

// From include/uapi/linux/mptcp_pm.h.
const (
	eventsGroup = "mptcp_pm_events"

	cmdRemove         = 9
	cmdSubflowCreate  = 10
	cmdSubflowDestroy = 11

	attrToken      = 4
	attrLocID      = 5
	attrAddrRemote = 6

	eventSubEstablished = 10
	eventSubClosed      = 11
	eventSubPriority    = 13
)

// From include/uapi/linux/sock_diag.h, inet_diag.h and mptcp.h.
const (
	sockDiagByFamily = 20
	sockDestroy      = 21
	sizeDiagRequest  = 56 // struct inet_diag_req_v2
	sizeDiagMessage  = 72 // struct inet_diag_msg
	sizeDiagID       = 48 // struct inet_diag_sockid: in the request at 8, in the message at 4

	diagInfo            = 2  // INET_DIAG_INFO: without it, the kernel tells nothing of ULPs either
	diagULPInfo         = 19 // INET_DIAG_ULP_INFO
	ulpInfoMPTCP        = 3  // INET_ULP_INFO_MPTCP
	subflowTokenLoc     = 2  // MPTCP_SUBFLOW_ATTR_TOKEN_LOC
	subflowFlags        = 8  // MPTCP_SUBFLOW_ATTR_FLAGS
	subflowIDLoc        = 10 // MPTCP_SUBFLOW_ATTR_ID_LOC
	flagBackupLocal     = 1 << 5
	tcpEstablished      = 1
	tcpSynSent          = 2
	tcpFinWait1         = 4
	tcpLastAck          = 9
	tcpClosing          = 11
	stateJoiningOrAlive = 1<<tcpEstablished | 1<<tcpSynSent
	// What is closed at this end, and has still something to send.
	stateClosed = 1<<tcpFinWait1 | 1<<tcpLastAck | 1<<tcpClosing
)

// ErrNotManaged says that there is no such session, or that the kernel manages
// its paths.
var ErrNotManaged = errors.New("there is no such session whose paths are managed outside the kernel")

// Ends are the two ends of a subflow.
type Ends struct{ Local, Remote netip.AddrPort }

// Subflows reads every subflow of the namespace, whose ever it is, to a port of
// the other end.
func (k *Kernel) Subflows(port uint16) (map[Ends]desired.Subflow, error) {
	all := map[Ends]desired.Subflow{}
	err := k.diagnose(stateJoiningOrAlive, 0, port, func(f diagnosed) error {
		all[Ends{f.Local, f.Remote}] = f.Subflow
		return nil
	})
	return all, err
}

// AbortClosed ends the subflows that have been closed while their connection
// lives on, and says how many there were. What they hold unsent the kernel has
// given to others: it is hundreds of kilobytes that would go over the uplink all
// the same once it works again, in front of everything else, and until then the
// peer counts them among its own. alive, called once what is closed is known, are
// the tokens of connections that nobody has begun to close.
// Kernels before 6.12 end none.
func (k *Kernel) AbortClosed(alive func() map[uint32]bool) (ended int, err error) {
	name, err := release()
	if err != nil || !endsOrphans(name) {
		return 0, err
	}
	var closed []diagnosed
	err = k.diagnose(stateClosed, 0, 0, func(f diagnosed) error {
		closed = append(closed, f)
		return nil
	})
	if err != nil || len(closed) == 0 {
		return 0, err
	}
	tokens := alive()
	closed = slices.DeleteFunc(closed, func(f diagnosed) bool { return !tokens[f.token] })
	return k.destroy(closed)
}

// endsOrphans says whether a kernel ends sockets that no program holds any more.
// Until "tcp: fix forever orphan socket caused by tcp_abort" (bac76cf89816, Linux
// 6.12) it took away what they had to send, and then kept them for good.
func endsOrphans(release string) bool {
	var major, minor int
	_, err := fmt.Sscanf(release, "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 12)
}

// AbortSubflows ends these established subflows, from a port of this end. The
// peer is told by RST.
func (k *Kernel) AbortSubflows(port uint16, which []Ends) (ended int, err error) {
	var found []diagnosed
	err = k.diagnose(1<<tcpEstablished, port, 0, func(f diagnosed) error {
		if slices.Contains(which, Ends{f.Local, f.Remote}) {
			found = append(found, f)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return k.destroy(found)
}

// diagnosed is a subflow as the kernel tells of it.
type diagnosed struct {
	desired.Subflow
	token   uint32 // of its connection, at this end
	message []byte // struct inet_diag_msg
}

// diagnose tells of every subflow of the namespace that is in one of these states
// and has these ports at this end and the other; 0 is any.
func (k *Kernel) diagnose(states uint32, here, there uint16, found func(diagnosed) error) error {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: int(k.namespace.Fd())})
	if err != nil {
		return fmt.Errorf("open a netlink socket for socket diagnosis: %w", err)
	}
	defer func() { _ = conn.Close() }()
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		request := make([]byte, sizeDiagRequest)
		request[0], request[1], request[2] = family, unix.IPPROTO_TCP, 1<<(diagInfo-1)
		binary.NativeEndian.PutUint32(request[4:], states)
		binary.BigEndian.PutUint16(request[8:], here)
		binary.BigEndian.PutUint16(request[10:], there)
		messages, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump}, Data: request,
		})
		if err != nil {
			return fmt.Errorf("list TCP connections from port %d to port %d (0 is any): %w", here, there, err)
		}
		for _, m := range messages {
			f, ok, err := decodeSubflow(m.Data)
			if err == nil && ok {
				err = found(f)
			}
			if err != nil {
				return fmt.Errorf("list TCP connections from port %d to port %d (0 is any): %w", here, there, err)
			}
		}
	}
	return nil
}

// destroy ends sockets, by the cookies that tell them from later ones with the
// same ends. Those that have gone meanwhile are as wanted.
func (k *Kernel) destroy(sockets []diagnosed) (ended int, err error) {
	if len(sockets) == 0 {
		return 0, nil
	}
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: int(k.namespace.Fd())})
	if err != nil {
		return 0, fmt.Errorf("open a netlink socket for socket diagnosis: %w", err)
	}
	defer func() { _ = conn.Close() }()
	for _, s := range sockets {
		request := make([]byte, sizeDiagRequest)
		request[0], request[1] = s.message[0], unix.IPPROTO_TCP
		copy(request[8:], s.message[4:4+sizeDiagID])
		_, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: sockDestroy, Flags: netlink.Request | netlink.Acknowledge}, Data: request,
		})
		switch {
		case err == nil:
			ended++
		case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESTALE):
			return ended, fmt.Errorf("end the TCP connection from %s to %s: %w (it takes CAP_NET_ADMIN and CONFIG_INET_DIAG_DESTROY)", s.Local, s.Remote, err)
		}
	}
	return ended, nil
}

// decodeSubflow reads a struct inet_diag_msg and what follows it; ok says whether
// it is a subflow.
func decodeSubflow(data []byte) (f diagnosed, ok bool, err error) {
	f.message = data
	if len(data) < sizeDiagMessage {
		return f, false, fmt.Errorf("an answer has %d bytes, of at least %d", len(data), sizeDiagMessage)
	}
	end := func(port, address []byte) netip.AddrPort {
		size := 16
		if data[0] == unix.AF_INET {
			size = 4
		}
		a, _ := netip.AddrFromSlice(address[:size])
		return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(port))
	}
	f.Local, f.Remote = end(data[4:6], data[8:24]), end(data[6:8], data[24:40])
	f.Joining = data[1] == tcpSynSent
	attributes, err := netlink.NewAttributeDecoder(data[sizeDiagMessage:])
	if err != nil {
		return f, false, err
	}
	for attributes.Next() {
		if attributes.Type() != diagULPInfo {
			continue
		}
		attributes.Nested(func(a *netlink.AttributeDecoder) error {
			for a.Next() {
				if a.Type() != ulpInfoMPTCP {
					continue
				}
				ok = true
				a.Nested(func(a *netlink.AttributeDecoder) error {
					for a.Next() {
						switch a.Type() {
						case subflowTokenLoc:
							f.token = a.Uint32()
						case subflowFlags:
							f.Backup = a.Uint32()&flagBackupLocal != 0
						case subflowIDLoc:
							f.ID = a.Uint8()
						}
					}
					return nil
				})
			}
			return nil
		})
	}
	return f, ok, attributes.Err()
}

// ChangeSubflow carries out a change of one session, known by its token. Whether
// a subflow that was opened gets through shows later. The error is ErrNotManaged
// for a session whose paths the kernel manages, or that has ended.
func (k *Kernel) ChangeSubflow(token uint32, change desired.SubflowChange) (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch c := change.(type) {
	case desired.OpenSubflow:
		err = k.openSubflow(token, c)
	case desired.CloseSubflow:
		if c.Gone {
			// First, because afterwards the id is forgotten. Of one that is
			// forgotten already the peer needs no word.
			_ = k.removeID(token, c.Subflow.ID)
		}
		err = k.subflowRequest(cmdSubflowDestroy, token, c.Subflow.Local, c.Subflow.Remote, nil)
		if errors.Is(err, unix.ESRCH) {
			err = nil // it has gone by itself
		}
	case desired.SetSubflowBackup:
		flags := desired.EndpointFlags(0)
		if c.Backup {
			flags = desired.FlagBackup
		}
		err = k.subflowRequest(cmdSetFlags, token, c.Subflow.Local, c.Subflow.Remote, func(ae *netlink.AttributeEncoder) {
			ae.Uint32(addrFlags, uint32(flags))
		})
	default:
		panic(fmt.Sprintf("kernel: unknown change of a subflow %T", change))
	}
	if err == nil {
		return nil
	}
	words := refusal(err)
	switch {
	case strings.Contains(words, "userspace PM not selected") || strings.Contains(words, "invalid token"):
		return ErrNotManaged
	case errors.Is(err, unix.ENOTCONN), strings.Contains(words, "subflow not found"):
		return nil // the session is about to end, or the subflow has just ended by itself
	}
	return fmt.Errorf("%s: %w", change, err)
}

// portTries is how often opening is tried before a range of ports counts as full.
const portTries = 8

func (k *Kernel) openSubflow(token uint32, c desired.OpenSubflow) error {
	flags := desired.FlagSubflow
	if c.Way.Backup {
		flags |= desired.FlagBackup
	}
	var err error
	for range portTries {
		local := netip.AddrPortFrom(c.Way.Source, 0)
		if p := c.Way.Ports; p != (desired.Ports{}) {
			local = netip.AddrPortFrom(c.Way.Source, p.First+uint16(rand.N(int(p.Last-p.First)+1)))
		}
		err = k.subflowRequest(cmdSubflowCreate, token, local, c.Remote, func(ae *netlink.AttributeEncoder) {
			ae.Uint8(addrID, c.ID)
			ae.Uint32(addrFlags, uint32(flags))
			ae.Int32(addrIfIdx, int32(c.Way.Interface.Index))
		})
		// The kernel keeps the ids of ports and subflows that are no more, and then
		// says that address and id do not match.
		if !errors.Is(err, unix.EADDRINUSE) && !strings.Contains(refusal(err), "did not match") {
			return err
		}
		if k.removeID(token, c.ID) != nil && local.Port() == 0 {
			return err
		}
	}
	return err
}

// refusal is what the kernel says in words.
func refusal(err error) string {
	var refused *netlink.OpError
	if errors.As(err, &refused) {
		return refused.Message
	}
	return ""
}

// removeID tells the peer that an address is gone, over the subflows that are
// left, and makes the kernel forget its id.
func (k *Kernel) removeID(token uint32, id uint8) error {
	_, err := k.request(cmdRemove, netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrToken, token)
		ae.Uint8(attrLocID, id)
	})
	return err
}

// subflowRequest sends a command about a subflow; more, if not nil, adds to the
// local address.
func (k *Kernel) subflowRequest(command uint8, token uint32, local, remote netip.AddrPort, more func(*netlink.AttributeEncoder)) error {
	end := func(ae *netlink.AttributeEncoder, end netip.AddrPort) {
		family, attribute := uint16(unix.AF_INET), uint16(addrAddr4)
		if end.Addr().Is6() {
			family, attribute = unix.AF_INET6, addrAddr6
		}
		ae.Uint16(addrFamily, family)
		ae.Bytes(attribute, end.Addr().AsSlice())
		if end.Port() != 0 {
			ae.Uint16(addrPort, end.Port())
		}
	}
	_, err := k.request(command, netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrToken, token)
		ae.Nested(attrAddr, func(ae *netlink.AttributeEncoder) error {
			end(ae, local)
			if more != nil {
				more(ae)
			}
			return nil
		})
		ae.Nested(attrAddrRemote, func(ae *netlink.AttributeEncoder) error { end(ae, remote); return nil })
	})
	return err
}

// FollowSubflows calls wake whenever a subflow of any connection of the namespace
// has come or gone or become a backup, until ctx ends. Events that came faster
// than they were read count as one.
func (k *Kernel) FollowSubflows(ctx context.Context, wake func()) error {
	conn, err := genetlink.Dial(&netlink.Config{NetNS: int(k.namespace.Fd())})
	if err != nil {
		return fmt.Errorf("open generic netlink: %w", err)
	}
	defer func() { _ = conn.Close() }()
	group := uint32(0)
	for _, g := range k.family.Groups {
		if g.Name == eventsGroup {
			group = g.ID
		}
	}
	if group == 0 {
		return fmt.Errorf("this kernel has no events of MPTCP (group %s)", eventsGroup)
	}
	if err := conn.JoinGroup(group); err != nil {
		return fmt.Errorf("listen to %s: %w", eventsGroup, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	for {
		messages, _, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS):
			wake()
			continue
		case err != nil:
			return fmt.Errorf("receive events of MPTCP: %w", err)
		}
		for _, m := range messages {
			switch m.Header.Command {
			case eventSubEstablished, eventSubClosed, eventSubPriority:
				wake()
			}
		}
	}
}
