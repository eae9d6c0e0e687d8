package kernel

import (
	"fmt"
	"io"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// An event only says that something changed; what, the next Read says. So any
// number of events is one wake-up, and one that was lost is made up for by
// waking.
//
// The events group of mptcp_pm is not among the sources: it tells of
// connections and subflows, at the rate of new connections, and never of a
// change of an endpoint or a limit. Those are noticed by the next Read.

// source is a netlink socket that receives events.
type source interface {
	Receive() ([]netlink.Message, error)
	io.Closer
}

// sourceGroups are the groups that tell of all that Read and uplink.Observe
// read: links, addresses, routes and rules of both families, and nf_tables.
var sourceGroups = map[int][]uint32{
	unix.NETLINK_ROUTE: {
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	},
	unix.NETLINK_NETFILTER: {unix.NFNLGRP_NFTABLES},
}

// Changed is ready when something in the kernel has changed since the last
// receive from it, be it by us.
func (k *Kernel) Changed() <-chan struct{} { return k.changed }

func (k *Kernel) watch() error {
	for protocol, groups := range sourceGroups {
		conn, err := netlink.Dial(protocol, nil)
		if err != nil {
			return fmt.Errorf("open a netlink socket for events: %w", err)
		}
		k.sources = append(k.sources, conn)
		for _, group := range groups {
			if err := conn.JoinGroup(group); err != nil {
				return fmt.Errorf("listen to netlink group %d of protocol %d: %w", group, protocol, err)
			}
		}
	}
	for _, s := range k.sources {
		k.watches.Go(func() { k.follow(s) })
	}
	return nil
}

// follow wakes for every event of a source until Close.
func (k *Kernel) follow(s source) {
	for {
		_, err := s.Receive()
		select {
		case <-k.closed:
			return
		default:
		}
		select {
		case k.changed <- struct{}{}:
		default: // a wake-up is waiting already
		}
		if err != nil {
			// Of ENOBUFS, when events came faster than they were read, nothing
			// needs mending: the socket goes on, and what was missed is read by
			// the one who is woken. Any other error must not become a busy loop.
			select {
			case <-k.closed:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}
