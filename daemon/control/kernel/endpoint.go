package kernel

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sheaf/daemon/control/desired"
)

// From include/uapi/linux/mptcp_pm.h.
const (
	mptcpFamily  = "mptcp_pm"
	mptcpVersion = 1

	cmdAddAddr   = 1
	cmdDelAddr   = 2
	cmdGetAddr   = 3
	cmdSetLimits = 5
	cmdGetLimits = 6
	cmdSetFlags  = 7

	attrAddr        = 1
	attrRcvAddAddrs = 2
	attrSubflows    = 3

	addrFamily = 1
	addrID     = 2
	addrAddr4  = 3
	addrAddr6  = 4
	addrPort   = 5
	addrFlags  = 6
	addrIfIdx  = 7

	flagImplicit = 16
)

// endpoint is one that the kernel holds, whoever added it.
type endpoint struct {
	id      uint8
	address netip.Addr
	port    uint16
	flags   uint32
	device  int
}

// idTries is how many ids an address has. All taken by others is as good as
// impossible: a kernel that holds 8 endpoints has 172 ids here.
const idTries = 8

// ids are the only ones that we give to the endpoint of an address. An endpoint
// that has one of them is ours. The kernel numbers endpoints that come without
// an id upwards from the highest, so those of other programs get into our range
// as soon as we have used it; that one of them also meets an id of its own
// address has a chance of 8 in 172.
func ids(address netip.Addr) []uint8 {
	const size = desired.LastEndpointID - desired.FirstEndpointID + 1
	h := fnv.New32a()
	h.Write(address.AsSlice())
	list := make([]uint8, idTries)
	for i := range list {
		list[i] = uint8(desired.FirstEndpointID + (h.Sum32()+uint32(i))%size)
	}
	return list
}

func (e endpoint) ours() bool {
	// An implicit endpoint is one that the kernel made by itself.
	return e.flags&flagImplicit == 0 && e.port == 0 && slices.Contains(ids(e.address), e.id)
}

func (k *Kernel) openUpstream() error {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return fmt.Errorf("open generic netlink: %w", err)
	}
	family, err := conn.GetFamily(mptcpFamily)
	if err != nil {
		_ = conn.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a kernel without upstream MPTCP
		}
		return fmt.Errorf("find generic netlink family %s: %w", mptcpFamily, err)
	}
	// The kernel then says in words why it refuses something. One that cannot
	// (before 4.12) has no MPTCP either.
	if err := conn.SetOption(netlink.ExtendedAcknowledge, true); err != nil {
		_ = conn.Close()
		return fmt.Errorf("ask netlink for extended answers: %w", err)
	}
	k.mptcp, k.family = conn, family
	return nil
}

// request sends one command of mptcp_pm and returns the answers.
func (k *Kernel) request(command uint8, flags netlink.HeaderFlags, encode func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	if k.mptcp == nil {
		return nil, errors.New("this kernel has no upstream MPTCP (generic netlink family mptcp_pm)")
	}
	encoder := netlink.NewAttributeEncoder()
	encode(encoder)
	data, err := encoder.Encode()
	if err != nil {
		return nil, err
	}
	message := genetlink.Message{Header: genetlink.Header{Command: command, Version: mptcpVersion}, Data: data}
	return k.mptcp.Execute(message, k.family.ID, netlink.Request|flags)
}

func (k *Kernel) readMPTCP(names map[int]string) (*desired.MPTCP, error) {
	if k.mptcp == nil {
		return nil, nil
	}
	var m desired.MPTCP
	var all []endpoint
	var err error
	if k.scope.router {
		if all, err = k.endpoints(); err != nil {
			return nil, err
		}
	}
	for _, e := range all {
		if e.ours() {
			m.Endpoints = append(m.Endpoints, desired.Endpoint{
				Address:   e.address,
				Interface: interfaceOf(names, e.device),
				Flags:     desired.EndpointFlags(e.flags),
			})
		}
	}
	if m.Limits, err = k.limits(); err != nil {
		return nil, err
	}
	m.Sysctls, err = k.readMPTCPSysctls(desired.SysctlNames())
	return &m, err
}

// endpoints lists every endpoint of the namespace.
func (k *Kernel) endpoints() ([]endpoint, error) {
	messages, err := k.request(cmdGetAddr, netlink.Dump, func(*netlink.AttributeEncoder) {})
	if err != nil {
		return nil, fmt.Errorf("list MPTCP endpoints: %w", err)
	}
	all := make([]endpoint, 0, len(messages))
	for _, m := range messages {
		e, err := decodeEndpoint(m.Data)
		if err != nil {
			return nil, fmt.Errorf("list MPTCP endpoints: %w", err)
		}
		all = append(all, e)
	}
	return all, nil
}

func decodeEndpoint(data []byte) (e endpoint, err error) {
	attributes, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return e, err
	}
	for attributes.Next() {
		if attributes.Type() != attrAddr {
			continue
		}
		attributes.Nested(func(a *netlink.AttributeDecoder) error {
			for a.Next() {
				switch a.Type() {
				case addrID:
					e.id = a.Uint8()
				case addrAddr4, addrAddr6:
					e.address, _ = netip.AddrFromSlice(a.Bytes())
				case addrPort:
					e.port = a.Uint16()
				case addrFlags:
					e.flags = a.Uint32()
				case addrIfIdx:
					e.device = int(a.Int32())
				}
			}
			return nil
		})
	}
	return e, attributes.Err()
}

func (k *Kernel) addEndpoint(wanted desired.Endpoint) error {
	all, err := k.endpoints()
	if err != nil {
		return err
	}
	taken := map[uint8]bool{}
	for _, e := range all {
		taken[e.id] = true
		if e.address != wanted.Address {
			continue
		}
		switch {
		case e.ours() && e.flags == uint32(wanted.Flags) && e.device == wanted.Interface.Index:
			return nil
		case e.ours():
			return errors.New("an endpoint of this address is there with other flags or another interface")
		case e.flags&flagImplicit != 0:
			// The kernel made it for a subflow that came from this address; it
			// gives way to an explicit one only when that has no id.
			if err := k.deleteID(e.id); err != nil {
				return err
			}
			taken[e.id] = false
		case e.port == 0:
			return fmt.Errorf("another program holds the MPTCP endpoint %s (id %d, %s): remove it there", e.address, e.id, desired.EndpointFlags(e.flags))
		}
	}
	own := ids(wanted.Address)
	free := slices.IndexFunc(own, func(id uint8) bool { return !taken[id] })
	if free < 0 {
		return fmt.Errorf("other programs hold all of the endpoint ids %d to %d", own[0], own[len(own)-1])
	}
	_, err = k.request(cmdAddAddr, netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Nested(attrAddr, func(ae *netlink.AttributeEncoder) error {
			if wanted.Address.Is4() {
				ae.Uint16(addrFamily, unix.AF_INET)
				ae.Bytes(addrAddr4, wanted.Address.AsSlice())
			} else {
				ae.Uint16(addrFamily, unix.AF_INET6)
				ae.Bytes(addrAddr6, wanted.Address.AsSlice())
			}
			ae.Uint8(addrID, own[free])
			ae.Uint32(addrFlags, uint32(wanted.Flags))
			ae.Int32(addrIfIdx, int32(wanted.Interface.Index))
			return nil
		})
	})
	return err
}

// setEndpointFlags changes live connections too: subflows from the address
// become backups, or stop being so, by MP_PRIO.
func (k *Kernel) setEndpointFlags(wanted desired.Endpoint) error {
	id, err := k.ownID(wanted.Address)
	if err != nil {
		return err
	}
	if id == 0 {
		return errors.New("there is no such endpoint of ours")
	}
	_, err = k.request(cmdSetFlags, netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Nested(attrAddr, func(ae *netlink.AttributeEncoder) error {
			ae.Uint8(addrID, id)
			ae.Uint32(addrFlags, uint32(wanted.Flags))
			return nil
		})
	})
	return err
}

// deleteEndpoint ends every subflow from the address, the initial one of a
// connection included, and tells the peer over those that are left.
func (k *Kernel) deleteEndpoint(address netip.Addr) error {
	id, err := k.ownID(address)
	if err != nil || id == 0 {
		return err
	}
	return k.deleteID(id)
}

func (k *Kernel) deleteID(id uint8) error {
	_, err := k.request(cmdDelAddr, netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Nested(attrAddr, func(ae *netlink.AttributeEncoder) error {
			ae.Uint8(addrID, id)
			return nil
		})
	})
	return err
}

// ownID is the id of our endpoint of an address, or 0.
func (k *Kernel) ownID(address netip.Addr) (uint8, error) {
	all, err := k.endpoints()
	if err != nil {
		return 0, err
	}
	for _, e := range all {
		if e.address == address && e.ours() {
			return e.id, nil
		}
	}
	return 0, nil
}

func (k *Kernel) limits() (desired.Limits, error) {
	messages, err := k.request(cmdGetLimits, 0, func(*netlink.AttributeEncoder) {})
	if err != nil {
		return desired.Limits{}, fmt.Errorf("read MPTCP limits: %w", err)
	}
	var limits desired.Limits
	for _, m := range messages {
		attributes, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return desired.Limits{}, fmt.Errorf("read MPTCP limits: %w", err)
		}
		for attributes.Next() {
			switch attributes.Type() {
			case attrRcvAddAddrs:
				limits.AddAddrAccepted = attributes.Uint32()
			case attrSubflows:
				limits.Subflows = attributes.Uint32()
			}
		}
		if err := attributes.Err(); err != nil {
			return desired.Limits{}, fmt.Errorf("read MPTCP limits: %w", err)
		}
	}
	return limits, nil
}

func (k *Kernel) setLimits(limits desired.Limits) error {
	_, err := k.request(cmdSetLimits, netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrRcvAddAddrs, limits.AddAddrAccepted)
		ae.Uint32(attrSubflows, limits.Subflows)
	})
	return err
}
