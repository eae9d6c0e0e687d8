package settings

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Bounds of what is accepted.
const (
	MaxUplinks       = 16
	maxLANInterfaces = 16
	maxToken         = 4 << 10
	maxSYNRetries    = 10
)

var (
	uplinkName    = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
	schedulerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$`) // MPTCP_SCHED_NAME_MAX is 16 with the final NUL
)

// notYet are names that the schema knows and this version cannot carry out.
// Accepting one and doing something else would be a lie.
var (
	methodsNotYet      = []Method{"dhcp", "static", "pppoe", "gateway"}
	pathManagersNotYet = []PathManager{"ndiffports", "binder", "netlink"}
)

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
	for i, u := range s.Uplinks {
		path := fmt.Sprintf("uplinks[%d]", i)
		switch first, taken := names[u.Name]; {
		case u.Name == "":
			report(path+".name", "is missing")
		case !uplinkName.MatchString(u.Name):
			report(path+".name", "%s is not a name: use 1 to 32 of a-z, 0-9 and -, and do not begin with -", quote(u.Name))
		case taken:
			report(path+".name", "%s is already the name of %s", u.Name, first)
		default:
			names[u.Name] = path
		}
		claim(path+".interface", u.Interface)
		if !slices.Contains([]Mode{On, Off, Backup}, u.Mode) {
			report(path+".mode", "%s is not a mode: offered are on, off, backup", quote(string(u.Mode)))
		}
		if reason := offer(u.Address.Method, []Method{Existing}, methodsNotYet); reason != "" {
			report(path+".address.method", "%s", reason)
		}
	}

	if t := s.Concentrator.Token; len(t) > maxToken {
		report("concentrator.token", "has %d bytes: a token has at most %d", len(t), maxToken)
	} else if strings.ContainsFunc(t, func(r rune) bool { return r <= ' ' || r > '~' }) {
		report("concentrator.token", "holds a character that no token has: copy the one line that `concentratord token` printed")
	}

	m := s.Multipath
	if reason := offer(m.PathManager, []PathManager{PathManagerDefault, PathManagerFullmesh}, pathManagersNotYet); reason != "" {
		report("multipath.path_manager", "%s", reason)
	}
	if !schedulerName.MatchString(m.Scheduler) {
		report("multipath.scheduler", "%s is not the name of a scheduler: use at most 15 letters, digits, dots, hyphens and underscores", quote(m.Scheduler))
	}
	if m.SYNRetries < 0 || m.SYNRetries > maxSYNRetries {
		report("multipath.syn_retries", "is %d: it must be from 0 to %d", m.SYNRetries, maxSYNRetries)
	}

	if s.WhenTunnelDown != Direct && s.WhenTunnelDown != Block {
		report("when_tunnel_down", "%s is not a choice: offered are direct, block", quote(string(s.WhenTunnelDown)))
	}
	return problems
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
	return fmt.Sprintf("%s is unknown: offered: %s", quote(string(choice)), list)
}
