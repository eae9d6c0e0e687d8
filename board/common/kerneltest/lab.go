// Packet's path: near (router) ─▶ wan<n>, shaped both ways ─▶ far (concentrator)

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/mdlayher/genetlink"
	mdlayher "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A shape is what a link does to packets, in each direction.
type shape struct {
	rate  uint64        // bit/s, headers included
	delay time.Duration // one way
	loss  float32       // per cent; 100 swallows everything in silence
}

// queue is the length of a link's queue in full frames, those under way
// included: 20 ms and 100 ms more at 20 Mbit/s.
const queue = 200

// farAddress is an address of the far end that is on no link, so that each
// subflow has it as destination and takes the link of its source.
const farAddress = "192.0.2.1"

func nearAddress(link int) string { return fmt.Sprintf("10.0.%d.1", link) }
func linkAddress(link int) string { return fmt.Sprintf("10.0.%d.2", link) }
func linkName(link int) string    { return fmt.Sprintf("wan%d", link) }

// A lab is two hosts with two links between them, numbered from 1. The first
// carries the initial subflow of each connection.
type lab struct {
	near, far int // namespaces, as file descriptors
}

func newLab(first, second shape) (*lab, error) {
	l := &lab{near: -1, far: -1}
	var err error
	if l.near, err = newNamespace(); err != nil {
		return l, err
	}
	if l.far, err = newNamespace(); err != nil {
		return l, err
	}
	for i, s := range []shape{first, second} {
		if err := l.connect(i+1, s); err != nil {
			return l, fmt.Errorf("link %d: %w", i+1, err)
		}
	}
	return l, in(l.far, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		address, err := netlink.ParseAddr(farAddress + "/32")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(lo, address)
	})
}

func (l *lab) close() {
	for _, namespace := range []int{l.near, l.far} {
		if namespace >= 0 {
			_ = unix.Close(namespace)
		}
	}
}

// newNamespace makes a network namespace with its loopback device up.
func newNamespace() (int, error) {
	namespace := -1
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		var err error
		if namespace, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return namespace, err
}

// in runs f with the calling thread in a namespace.
func in(namespace int, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(namespace, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter a network namespace: %w", err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own, which ends with f.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// connect makes link number i. Without segmentation offload each frame is one
// packet, for the shaper and for the counters.
func (l *lab) connect(i int, s shape) error {
	name := linkName(i)
	err := in(l.near, func() error {
		attributes := netlink.NewLinkAttrs()
		attributes.Name, attributes.GSOMaxSegs, attributes.TxQLen = name, 1, queue
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attributes, PeerName: name, PeerNamespace: netlink.NsFd(l.far)})
	})
	if err != nil {
		return err
	}
	if err := l.shape(i, s); err != nil {
		return err
	}
	if err := in(l.near, func() error { return configure(name, nearAddress(i), linkAddress(i), i) }); err != nil {
		return err
	}
	return in(l.far, func() error { return configure(name, linkAddress(i), "", 0) })
}

// configure brings a link up with an address, and with a default route if a
// gateway is given.
func configure(name, address, gateway string, metric int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(address + "/24")
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.LinkSetGSOMaxSegs(link, 1), netlink.AddrAdd(link, a), netlink.LinkSetUp(link)); err != nil {
		return err
	}
	if gateway == "" {
		return nil
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gateway), Priority: metric})
}

// shape makes link number i behave so from now on, in both directions.
func (l *lab) shape(i int, s shape) error {
	for _, namespace := range []int{l.near, l.far} {
		err := in(namespace, func() error {
			link, err := netlink.LinkByName(linkName(i))
			if err != nil {
				return err
			}
			return netlink.QdiscReplace(netlink.NewNetem(
				netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
				netlink.NetemQdiscAttrs{Rate64: s.rate / 8, Latency: uint32(s.delay.Microseconds()), Loss: s.loss, Limit: queue},
			))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// set writes a sysctl in both namespaces, as in net/mptcp/scheduler.
func (l *lab) set(key, value string) error {
	for _, namespace := range []int{l.near, l.far} {
		if err := in(namespace, func() error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) }); err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) get(key string) (string, error) {
	var value []byte
	err := in(l.near, func() (err error) {
		value, err = os.ReadFile("/proc/sys/" + key)
		return err
	})
	return strings.TrimSpace(string(value)), err
}

// Of generic netlink mptcp_pm (include/uapi/linux/mptcp_pm.h).
const (
	cmdAddAddress = 1
	attrAddress   = 1 // of a command

	attrFamily, attrID, attrAddress4, attrFlags, attrDevice = 1, 2, 3, 6, 7 // of an address

	flagSubflow, flagBackup = 2, 4
)

// endpoint lets the near end's connections have a subflow over the second link.
func (l *lab) endpoint(flags uint32) error {
	return in(l.near, func() error {
		link, err := netlink.LinkByName(linkName(2))
		if err != nil {
			return err
		}
		conn, err := genetlink.Dial(nil)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		family, err := conn.GetFamily("mptcp_pm")
		if err != nil {
			return err
		}
		encoder := mdlayher.NewAttributeEncoder()
		encoder.Nested(attrAddress, func(e *mdlayher.AttributeEncoder) error {
			e.Uint16(attrFamily, unix.AF_INET)
			e.Uint8(attrID, 2)
			e.Bytes(attrAddress4, net.ParseIP(nearAddress(2)).To4())
			e.Uint32(attrFlags, flags)
			e.Uint32(attrDevice, uint32(link.Attrs().Index))
			return nil
		})
		data, err := encoder.Encode()
		if err != nil {
			return err
		}
		_, err = conn.Execute(genetlink.Message{Header: genetlink.Header{Command: cmdAddAddress, Version: 1}, Data: data},
			family.ID, mdlayher.Request|mdlayher.Acknowledge)
		return err
	})
}
