package deploy

import (
	"fmt"

	"github.com/vishvananda/netlink"

	"sheaf/daemon/netlab"
)

// removeGateway deletes an uplink's default routes from the main table.
func (w *world) removeGateway(u *netlab.Uplink) (restore func() error, err error) {
	var removed []netlink.Route
	err = w.Lab.Router.Do(func() error {
		link, err := netlink.LinkByName(u.Interface())
		if err != nil {
			return err
		}
		routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Dst != nil && !r.Dst.IP.IsUnspecified() || r.Gw == nil {
				continue
			}
			if err := netlink.RouteDel(&r); err != nil {
				return fmt.Errorf("delete %v: %w", r, err)
			}
			removed = append(removed, r)
		}
		if len(removed) == 0 {
			return fmt.Errorf("%s has no default route", u.Interface())
		}
		return nil
	})
	return func() error {
		return w.Lab.Router.Do(func() error {
			for _, r := range removed {
				if err := netlink.RouteAdd(&r); err != nil {
					return err
				}
			}
			return nil
		})
	}, err
}

// alterLeftovers deletes one of a dead daemon's rules in the calling namespace,
// as another program might.
func alterLeftovers() error {
	rules, err := netlink.RuleList(netlink.FAMILY_V4)
	if err != nil {
		return err
	}
	for _, r := range rules {
		if r.Table >= 8300 && r.Table < 8364 {
			return netlink.RuleDel(&r)
		}
	}
	return fmt.Errorf("there is no rule of sheafd's to alter")
}
