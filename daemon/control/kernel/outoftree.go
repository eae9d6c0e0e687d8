package kernel

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// The paths of a change and of a reading of MPTCP v0.9x through this file:
//
//	desired.SetLinkFlags ─▶ links (RTM_NEWLINK)
//	desired.SetParameter ─▶ /sys/module/MODULE/parameters
//	desired.OutOfTree ◀──── both, and the sysctls with what they have refused
//	Info ◀───────────────── /proc/net/mptcp_net/mptcp
//
// The sysctls of v0.9x are in the initial network namespace alone: elsewhere such
// a kernel counts as one without MPTCP.

// outOfTree is what only a kernel with MPTCP v0.9x has.
type outOfTree struct {
	links   links
	modules *os.Root                // nil when there are none to be seen
	network *os.Root                // of the state of connections; nil likewise
	refused map[string]refusedValue // by name of the sysctl
}

// refusedValue is one that a sysctl did not take.
type refusedValue struct {
	value string
	at    time.Time
}

// retryRefused is when such a value is tried again: a module may have come.
const retryRefused = time.Minute

// links reads and sets the flags of the network interfaces of a namespace.
type links interface {
	List() ([]link, error)
	// SetFlags gives the flags of the mask the values that they have in flags.
	SetFlags(index int, flags, mask uint32) error
	io.Closer
}

type link struct {
	Index int
	Name  string
	Flags uint32 // ifi_flags
}

const linkMask = uint32(desired.LinkOff | desired.LinkBackup)

func (k *Kernel) openOutOfTree() error {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return fmt.Errorf("open rtnetlink for the flags of interfaces: %w", err)
	}
	o := &outOfTree{links: routeLinks{conn}, refused: map[string]refusedValue{}}
	k.outOfTree = o
	if o.modules, err = openIfThere(k.directories.modules); err != nil {
		return fmt.Errorf("open the parameters of kernel modules: %w", err)
	}
	if o.network, err = openIfThere(filepath.Join(k.directories.network, "mptcp_net")); err != nil {
		return fmt.Errorf("open the state of MPTCP connections: %w", err)
	}
	return nil
}

func openIfThere(directory string) (*os.Root, error) {
	root, err := os.OpenRoot(directory)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return root, err
}

func (o *outOfTree) close() {
	_ = o.links.Close()
	for _, root := range []*os.Root{o.modules, o.network} {
		if root != nil {
			_ = root.Close()
		}
	}
}

func (k *Kernel) readOutOfTree() (*desired.OutOfTree, error) {
	o := k.outOfTree
	if o == nil {
		return nil, nil
	}
	state := &desired.OutOfTree{
		Sysctls: map[string]desired.Sysctl{}, Parameters: map[string]string{}, Links: map[string]desired.LinkFlags{}, Refused: map[string]string{},
	}
	for name, r := range o.refused {
		if time.Since(r.at) < retryRefused {
			state.Refused[name] = r.value
		}
	}
	values, err := k.readMPTCPSysctls(desired.OutOfTreeSysctlNames())
	if err != nil {
		return nil, err
	}
	for name, value := range values {
		state.Sysctls[name] = desired.Sysctl{Value: value}
	}
	for _, parameter := range desired.Parameters() {
		value, exists, err := o.parameter(parameter)
		if err != nil {
			return nil, err
		}
		if exists {
			state.Parameters[parameter] = value
		}
	}
	all, err := o.links.List()
	if err != nil {
		return nil, fmt.Errorf("read the MPTCP flags of interfaces: %w", err)
	}
	for _, l := range all {
		state.Links[l.Name] = desired.LinkFlags(l.Flags & linkMask)
	}
	return state, nil
}

// before is what the values are that the changes are about to change, for
// desired.Restore. Sysctls are left out.
func (o *outOfTree) before(changes []desired.Change) (map[string]string, error) {
	values := map[string]string{}
	var all []link
	for _, change := range changes {
		switch c := change.(type) {
		case desired.SetParameter:
			value, exists, err := o.parameter(c.Parameter)
			if err != nil {
				return nil, err
			}
			if exists {
				values[desired.ParameterPath+c.Parameter] = value
			}
		case desired.SetLinkFlags:
			if all == nil {
				var err error
				if all, err = o.links.List(); err != nil {
					return nil, fmt.Errorf("read the MPTCP flags of interfaces: %w", err)
				}
			}
			for _, l := range all {
				if l.Name == c.Interface {
					values[desired.LinkPath+c.Interface] = desired.LinkFlags(l.Flags & linkMask).String()
				}
			}
		}
	}
	return values, nil
}

// refuse explains why a sysctl did not take a value. That of a name is
// remembered for a while, because v0.9x cannot be asked for what it offers: a
// state that is read says so, and the name is not tried again at every pass.
func (o *outOfTree) refuse(name, value string, err error) error {
	// The source of v0.95 says ENOENT.
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	o.refused[name] = refusedValue{value, time.Now()}
	return fmt.Errorf("this kernel refuses %q: load the module that has it, or choose another", value)
}

// parameterFile is the place of MODULE/NAME below the directory of modules.
func parameterFile(parameter string) string {
	module, name, _ := strings.Cut(parameter, "/")
	return module + "/parameters/" + name
}

func (o *outOfTree) parameter(parameter string) (value string, exists bool, err error) {
	if o.modules == nil {
		return "", false, nil
	}
	text, err := o.modules.ReadFile(parameterFile(parameter))
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	return strings.TrimSpace(string(text)), err == nil, err
}

func (k *Kernel) setParameter(parameter, value string) error {
	if k.outOfTree == nil || k.outOfTree.modules == nil {
		return errors.New("this kernel has no parameters of MPTCP modules")
	}
	return write(k.outOfTree.modules, parameterFile(parameter), value)
}

// setLinkFlags sets both flags of an interface. One that has gone has none.
func (k *Kernel) setLinkFlags(name string, flags desired.LinkFlags) error {
	if k.outOfTree == nil {
		return errors.New("this kernel has no MPTCP flags of interfaces")
	}
	all, err := k.outOfTree.links.List()
	if err != nil {
		return err
	}
	for _, l := range all {
		if l.Name != name {
			continue
		}
		if err := k.outOfTree.links.SetFlags(l.Index, uint32(flags), linkMask); !errors.Is(err, unix.ENODEV) {
			return err
		}
	}
	return nil
}

// routeLinks are the links as rtnetlink has them (rtnetlink(7)).
type routeLinks struct{ *netlink.Conn }

// sizeInfo is that of struct ifinfomsg.
const sizeInfo = unix.SizeofIfInfomsg

// List asks again when the list changes while it is read.
func (r routeLinks) List() (all []link, err error) {
	for range dumpTries {
		var messages []netlink.Message
		messages, err = r.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request | netlink.Dump},
			Data:   make([]byte, sizeInfo),
		})
		if err != nil {
			return nil, err
		}
		all = make([]link, 0, len(messages))
		interrupted := false
		for _, m := range messages {
			interrupted = interrupted || m.Header.Flags&netlink.HeaderFlags(unix.NLM_F_DUMP_INTR) != 0
			l, err := decodeLink(m.Data)
			if err != nil {
				return nil, fmt.Errorf("decode a network interface: %w", err)
			}
			all = append(all, l)
		}
		if !interrupted {
			return all, nil
		}
	}
	return nil, errors.New("the list of network interfaces keeps changing")
}

func decodeLink(data []byte) (l link, err error) {
	if len(data) < sizeInfo {
		return l, io.ErrUnexpectedEOF
	}
	l.Index = int(int32(binary.NativeEndian.Uint32(data[4:])))
	l.Flags = binary.NativeEndian.Uint32(data[8:])
	attributes, err := netlink.NewAttributeDecoder(data[sizeInfo:])
	if err != nil {
		return l, err
	}
	for attributes.Next() {
		if attributes.Type() == unix.IFLA_IFNAME {
			l.Name = attributes.String()
		}
	}
	return l, attributes.Err()
}

// SetFlags names the mask in ifi_change: without it the kernel takes the flags
// for all that there are.
func (r routeLinks) SetFlags(index int, flags, mask uint32) error {
	info := make([]byte, sizeInfo)
	binary.NativeEndian.PutUint32(info[4:], uint32(index))
	binary.NativeEndian.PutUint32(info[8:], flags)
	binary.NativeEndian.PutUint32(info[12:], mask)
	_, err := r.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_NEWLINK, Flags: netlink.Request | netlink.Acknowledge},
		Data:   info,
	})
	return err
}

// maxConnections bounds what is read of the list of connections, in bytes: a
// line has some 150. What comes after is not counted.
const maxConnections = 16 << 20

// established counts the established connections and their subflows.
func (o *outOfTree) established() (connections, subflows int, err error) {
	if o.network == nil {
		return 0, 0, nil
	}
	f, err := o.network.Open("mptcp")
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConnections))
	if err != nil {
		return 0, 0, fmt.Errorf("read the state of MPTCP connections: %w", err)
	}
	return countConnections(text[:bytes.LastIndexByte(text, '\n')+1])
}

// countConnections reads what mptcp_pm_seq_show (net/mptcp/mptcp_ctrl.c) writes: a
// heading, and a line for each connection, of which columns 6 and 7 are the state
// and the number of subflows, hexadecimal.
func countConnections(text []byte) (connections, subflows int, err error) {
	const tcpEstablished = 1 // TCP_ESTABLISHED, include/net/tcp_states.h
	lines := bufio.NewScanner(bytes.NewReader(text))
	for number := 1; lines.Scan(); number++ {
		columns := strings.Fields(lines.Text())
		if number == 1 || len(columns) == 0 {
			continue
		}
		if len(columns) < 8 {
			return 0, 0, fmt.Errorf("line %d of the MPTCP connections has %d columns: at least 8 are expected", number, len(columns))
		}
		state, errState := strconv.ParseUint(columns[6], 16, 8)
		count, errCount := strconv.ParseUint(columns[7], 16, 8)
		if err := errors.Join(errState, errCount); err != nil {
			return 0, 0, fmt.Errorf("line %d of the MPTCP connections: %w", number, err)
		}
		if state == tcpEstablished {
			connections++
			subflows += int(count)
		}
	}
	return connections, subflows, lines.Err()
}
