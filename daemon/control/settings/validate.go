package settings

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds of what is accepted.
const (
	MaxUplinks       = 16
	MaxForwards      = 64
	MaxClasses       = 64
	maxResolvers     = 3 // as MAXNS of resolv.h
	maxLANInterfaces = 16
	maxToken         = 4 << 10
	maxSYNRetries    = 10
	// defaultSubflows is what ndiffports opened in MPTCP v0.95; maxSubflows is as
	// many as a peer takes besides the first (Linux before 7).
	defaultSubflows = 2
	maxSubflows     = 8

	// maxRank bounds weight and preference; the kernel takes 16 bits.
	maxRank = 1000

	// From net/mptcp of MPTCP v0.95: num_segments is a byte; MPTCP_GW_MAX_LISTS and
	// MPTCP_GW_LIST_MAX_LEN.
	maxNumSegments  = 255
	maxBinderRoutes = 10
	maxBinderHops   = 6
)

var (
	objectName    = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
	schedulerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$`) // MPTCP_SCHED_NAME_MAX is 16 with the final NUL
)

// methodsNotYet are names that the schema knows and this version cannot carry
// out. Accepting one and doing something else would be a lie.
var methodsNotYet = []Method{"dhcp", "static", "pppoe"}

// Validate says what is wrong with settings that were built in code. Its error
// is an *Invalid without lines.
func Validate(s Settings) error {
	if problems := check(s); len(problems) > 0 {
		return &Invalid{problems}
	}
	return nil
}

// check is every rule about values, for Parse and Validate alike.
func check(s Settings) (problems []Problem) {
	report := func(path, format string, args ...any) {
		problems = append(problems, Problem{Path: path, Reason: fmt.Sprintf(format, args...)})
	}

	switch s.Version {
	case 1:
	case 0:
		report("version", "is missing: this version of Sheaf reads version 1")
	default:
		report("version", "is %d: this version of Sheaf reads version 1", s.Version)
	}

	// owners tells which path first named each interface.
	owners := map[string]string{}
	claim := func(path, name string) {
		if reason := interfaceProblem(name); reason != "" {
			report(path, "%s", reason)
			return
		}
		if owner, ok := owners[name]; ok {
			report(path, "%s is already %s: an interface has one place", name, owner)
			return
		}
		owners[name] = path
	}

	if len(s.LAN.Interfaces) == 0 {
		report("lan.interfaces", "names no interface: without one no client is served")
	}
	if len(s.LAN.Interfaces) > maxLANInterfaces {
		report("lan.interfaces", "has %d entries: at most %d are possible", len(s.LAN.Interfaces), maxLANInterfaces)
		return problems
	}
	for i, name := range s.LAN.Interfaces {
		claim(fmt.Sprintf("lan.interfaces[%d]", i), name)
	}

	if len(s.Uplinks) > MaxUplinks {
		report("uplinks", "has %d entries: at most %d are possible", len(s.Uplinks), MaxUplinks)
		return problems
	}
	names := map[string]string{}
	hops := map[nextHop]string{}
	for i, u := range s.Uplinks {
		path := fmt.Sprintf("uplinks[%d]", i)
		switch first, taken := names[u.Name]; {
		case nameProblem(u.Name) != "":
			report(path+".name", "%s", nameProblem(u.Name))
		case taken:
			report(path+".name", "%s is already the name of %s", u.Name, first)
		default:
			names[u.Name] = path
		}
		if !shares(s.Uplinks[:i], u) {
			claim(path+".interface", u.Interface)
		}
		if !slices.Contains([]Mode{On, Off, Backup}, u.Mode) {
			report(path+".mode", "%s is not a mode: offered are on, off, backup", quote(string(u.Mode)))
		}
		checkAddress(path+".address", u, hops, report)
		if u.Weight < 0 || u.Weight > maxRank {
			report(path+".weight", "is %d: it must be from 1 to %d, or 0 for the usual, which is 1", u.Weight, maxRank)
		}
		if u.Preference < 0 || u.Preference > maxRank {
			report(path+".preference", "is %d: it must be from 0, which is used first, to %d", u.Preference, maxRank)
		}
		if len(u.Resolvers) > maxResolvers {
			report(path+".resolvers", "has %d entries: at most %d are possible", len(u.Resolvers), maxResolvers)
			continue
		}
		for j, resolver := range u.Resolvers {
			inner := fmt.Sprintf("%s.resolvers[%d]", path, j)
			if reason := hostProblem(resolver); reason != "" {
				report(inner, "%s", reason)
			} else if slices.Contains(u.Resolvers[:j], resolver) {
				report(inner, "%s is given twice", resolver)
			}
		}
	}

	if t := s.Concentrator.Token; len(t) > maxToken {
		report("concentrator.token", "has %d bytes: a token has at most %d", len(t), maxToken)
	} else if strings.ContainsFunc(t, func(r rune) bool { return r <= ' ' || r > '~' }) {
		report("concentrator.token", "holds a character that no token has: copy the one line that `concentratord token` printed")
	}

	m := s.Multipath
	if reason := offer(m.PathManager, PathManagers, nil); reason != "" {
		report("multipath.path_manager", "%s", reason)
	}
	if !schedulerName.MatchString(m.Scheduler) {
		report("multipath.scheduler", "%s is not the name of a scheduler: use at most 15 letters, digits, dots, hyphens and underscores", quote(m.Scheduler))
	}
	if reason := offer(m.CongestionControl, CongestionControls, nil); reason != "" {
		report("multipath.congestion_control", "%s", reason)
	}
	if m.SYNRetries < 0 || m.SYNRetries > maxSYNRetries {
		report("multipath.syn_retries", "is %d: it must be from 0 to %d", m.SYNRetries, maxSYNRetries)
	}
	if m.Subflows < 1 || m.Subflows > maxSubflows {
		report("multipath.subflows", "is %d: it must be from 1 to %d", m.Subflows, maxSubflows)
	}
	if n := m.OutOfTree.NumSegments; n < 0 || n > maxNumSegments {
		report("multipath.out_of_tree.num_segments", "is %d: it must be from 1 to %d, or 0 to leave it as it is", n, maxNumSegments)
	}
	if c := m.OutOfTree.CwndLimited; !slices.Contains([]string{"", "on", "off"}, c) {
		report("multipath.out_of_tree.cwnd_limited", "%s is not a choice: offered are on, off", quote(c))
	}
	if reason := binderProblem(m.OutOfTree.BinderGateways); reason != "" {
		report("multipath.out_of_tree.binder_gateways", "%s", reason)
	}

	if s.WhenTunnelDown != Direct && s.WhenTunnelDown != Block {
		report("when_tunnel_down", "%s is not a choice: offered are direct, block", quote(string(s.WhenTunnelDown)))
	}
	checkForwards(s.Forwards, report)
	checkClasses(s.Classes, report)
	return problems
}

// shares says whether an uplink may be behind an interface that an earlier one
// has named: at most one of them is without a gateway of its own.
func shares(earlier []Uplink, u Uplink) bool {
	found := false
	for _, e := range earlier {
		if e.Interface != u.Interface {
			continue
		}
		found = true
		if e.Address.Method != Gateway && u.Address.Method != Gateway {
			return false
		}
	}
	return found
}

// nextHop is a gateway behind one interface.
type nextHop struct {
	device  string
	gateway netip.Addr
}

// checkAddress remembers in hops which path first named each.
func checkAddress(path string, u Uplink, hops map[nextHop]string, report func(path, format string, args ...any)) {
	a := u.Address
	if reason := offer(a.Method, []Method{Existing, Gateway}, methodsNotYet); reason != "" {
		report(path+".method", "%s", reason)
		return
	}
	if a.Method != Gateway {
		if a.Gateway.IsValid() || a.Source.IsValid() {
			report(path, "has gateway or source, which only method gateway uses: leave them out, or choose method gateway")
		}
		return
	}
	if reason := hostProblem(a.Gateway); reason != "" && !(a.Gateway.Is6() && a.Gateway.IsLinkLocalUnicast() && a.Gateway.Zone() == "") {
		report(path+".gateway", "%s", reason)
		return
	}
	hop := nextHop{u.Interface, a.Gateway}
	if first, taken := hops[hop]; taken {
		report(path+".gateway", "%s is already that of %s: two uplinks through one gateway are one", a.Gateway, first)
	} else {
		hops[hop] = path
	}
	if !a.Source.IsValid() {
		return
	}
	switch reason := hostProblem(a.Source); {
	case reason != "":
		report(path+".source", "%s", reason)
	case a.Source.Is4() != a.Gateway.Is4():
		report(path+".source", "%s and the gateway %s are of different families", a.Source, a.Gateway)
	case a.Source == a.Gateway:
		report(path+".source", "%s is the gateway itself: give an address of the interface", a.Source)
	}
}

func checkForwards(forwards []Forward, report func(path, format string, args ...any)) {
	if len(forwards) > MaxForwards {
		report("forwards", "has %d entries: at most %d are possible", len(forwards), MaxForwards)
		return
	}
	type port struct {
		protocol string
		number   uint16
	}
	names, ports := map[string]string{}, map[port]string{}
	for i, f := range forwards {
		path := fmt.Sprintf("forwards[%d]", i)
		if reason := nameProblem(f.Name); reason != "" {
			report(path+".name", "%s", reason)
		} else if first, taken := names[f.Name]; taken {
			report(path+".name", "%s is already the name of %s", f.Name, first)
		} else {
			names[f.Name] = path
		}
		if reason := offer(f.Protocol, []string{ProtocolTCP, ProtocolUDP}, nil); reason != "" {
			report(path+".protocol", "%s", reason)
		}
		p := port{f.Protocol, f.Port}
		if first, taken := ports[p]; f.Port == 0 {
			report(path+".port", "is 0 or missing: give the concentrator's port, from 1 to 65535")
		} else if taken {
			report(path+".port", "%s port %d is already that of %s", f.Protocol, f.Port, first)
		} else {
			ports[p] = path
		}
		// The networks of the LAN need not be known here: another router may
		// lie between.
		switch reason := hostProblem(f.To.Addr()); {
		case !f.To.Addr().IsValid():
			report(path+".to", "is missing: give a host of the LAN and its port, such as 192.168.1.10:80")
		case reason != "":
			report(path+".to", "%s", reason)
		case f.To.Port() == 0:
			report(path+".to", "%s has port 0: give the port of the LAN host, from 1 to 65535", f.To)
		}
		if reason := offer(f.Source, []ForwardSource{SourceClient, SourceRouter}, nil); reason != "" {
			report(path+".source", "%s", reason)
		}
	}
}

func checkClasses(classes []ClassRule, report func(path, format string, args ...any)) {
	if len(classes) > MaxClasses {
		report("classes", "has %d entries: at most %d are possible", len(classes), MaxClasses)
		return
	}
	for i, c := range classes {
		path := fmt.Sprintf("classes[%d]", i)
		if reason := offer(c.Class, []string{ClassInteractive, ClassBulk}, nil); reason != "" {
			report(path+".class", "%s", reason)
		}
		if c.Protocol == "" && c.Ports.IsZero() && c.DSCP == nil && !c.Address.IsValid() {
			report(path, "has no condition: give protocol, ports, dscp or address")
			continue
		}
		if c.Protocol != "" {
			if reason := offer(c.Protocol, []string{ProtocolTCP, ProtocolUDP, ProtocolICMP}, nil); reason != "" {
				report(path+".protocol", "%s", reason)
			}
		}
		switch r := c.Ports; {
		case r.IsZero():
		case r.First == 0 || r.First > r.Last:
			report(path+".ports", "%s is no range of ports: it must rise, from 1 to 65535", r)
		case c.Protocol == ProtocolICMP:
			report(path+".ports", "icmp has no ports: leave ports out, or choose tcp or udp")
		}
		if c.DSCP != nil && (*c.DSCP < 0 || *c.DSCP > 63) {
			report(path+".dscp", "is %d: a code point is from 0 to 63", *c.DSCP)
		}
		switch a := c.Address; {
		case !a.IsValid():
		case a.Addr().Is4In6():
			report(path+".address", "%s is an IPv4 address in IPv6 form: write it as IPv4", a)
		case a != a.Masked():
			report(path+".address", "%s has address bits after its length: write %s", a, a.Masked())
		case a.Addr().IsLoopback() || a.Addr().IsMulticast():
			report(path+".address", "%s is not of a LAN: clients have unicast addresses", a)
		}
	}
}

// nameProblem says why a name is not one.
func nameProblem(name string) string {
	switch {
	case name == "":
		return "is missing"
	case !objectName.MatchString(name):
		return quote(name) + " is not a name: use 1 to 32 of a-z, 0-9 and -, and do not begin with -"
	}
	return ""
}

// hostProblem says why an address cannot be that of another host which is
// reached through routes alone.
func hostProblem(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return "is missing: give an IP address"
	case a.Zone() != "" || a.IsLinkLocalUnicast():
		return fmt.Sprintf("%s is link-local: give an address that is valid beyond one link", quote(a.String()))
	case a.Is4In6():
		return fmt.Sprintf("%s is an IPv4 address in IPv6 form: write %s", a, a.Unmap())
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240):
		return fmt.Sprintf("%s is not the address of another host: give a unicast address", a)
	}
	return ""
}

// binderProblem says what is wrong with the routes of path manager binder. The
// kernel forgets all of them when it cannot read one.
func binderProblem(gateways string) string {
	if gateways == "" {
		return ""
	}
	routes := strings.Split(gateways, "-")
	if len(routes) > maxBinderRoutes {
		return fmt.Sprintf("has %d routes: at most %d are possible", len(routes), maxBinderRoutes)
	}
	for _, route := range routes {
		hops := strings.Split(route, ",")
		if len(hops) > maxBinderHops {
			return fmt.Sprintf("%s has %d hops: at most %d are possible", quote(route), len(hops), maxBinderHops)
		}
		for _, hop := range hops {
			if a, err := netip.ParseAddr(hop); err != nil || !a.Is4() {
				return fmt.Sprintf("%s is not an IPv4 address: write 192.0.2.1,198.51.100.1-192.0.2.2", quote(hop))
			}
		}
	}
	return ""
}

// interfaceProblem says why no interface can have this name (the kernel's
// dev_valid_name), or why it cannot be given a part here.
func interfaceProblem(name string) string {
	switch {
	case name == "":
		return "is missing: give the name of a network interface"
	case name == "lo":
		return "lo is the loopback interface: no client and no gateway is behind it"
	case len(name) > 15:
		return fmt.Sprintf("%s has %d bytes: the name of an interface has at most 15", quote(name), len(name))
	case name == "." || name == "..", strings.ContainsAny(name, "/:"), !utf8.ValidString(name),
		strings.ContainsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		return fmt.Sprintf("%s cannot be the name of an interface", quote(name))
	}
	return ""
}

// offer says why a choice is not among those offered.
func offer[T ~string](choice T, offered, notYet []T) string {
	if slices.Contains(offered, choice) {
		return ""
	}
	names := make([]string, len(offered))
	for i, o := range offered {
		names[i] = string(o)
	}
	list := strings.Join(names, ", ")
	if slices.Contains(notYet, choice) {
		return fmt.Sprintf("%s is not available in this version: offered: %s", choice, list)
	}
	if choice == "" {
		return "is missing: offered: " + list
	}
	return fmt.Sprintf("%s is unknown: offered: %s", quote(string(choice)), list)
}
