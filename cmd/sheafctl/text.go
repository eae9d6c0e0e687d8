package main

// The path of a Status to a person: Status ─▶ writeStatus ─▶ labelled lines, and
// writeUplinks and writeForwards ─▶ writeTable, columns as wide as their widest
// cell. Multipath settings and flows are such tables, too.

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"sheaf/webui"
)

// writeStatus writes a status for a person.
func writeStatus(w *bytes.Buffer, s webui.Status, color bool) {
	line := func(label, format string, args ...any) {
		fmt.Fprintf(w, "%-13s %s\n", label, printable(fmt.Sprintf(format, args...)))
	}
	reason := ""
	if s.Tunnel.Reason != "" {
		reason = ": " + printable(s.Tunnel.Reason)
	}
	fmt.Fprintf(w, "%-13s %s%s\n", "tunnel", paint(printable(s.Tunnel.State), color), reason)
	line("flows", "%d in the tunnel, %d direct", s.Tunnel.Flows, s.Tunnel.DirectFlows)
	// A daemon from before there was a packet path says nothing about it.
	if p := s.Packets; p.State != "" {
		fmt.Fprintf(w, "%-13s %s%s\n", "packets", paint(printable(p.State), color), printable(packets(p)))
		if list := drops(p.Drops); list != "" {
			line("drops", "%s", list)
		}
	}
	if d := s.DNS; d.Server != "" {
		line("dns", "%s through %s", d.Server, or(strings.Replace(d.Through, "tunnel", "the tunnel", 1), "-"))
	}
	if c := s.Concentrator; c.Address == "" {
		line("concentrator", "not joined; run 'sheafctl join TOKEN'")
	} else {
		line("concentrator", "%s at %s, %d sessions, %d of them idle", c.Name, c.Address, c.Sessions, c.IdleSessions)
	}
	if m := s.Multipath; m.Wanted == m.Kernel && m.SchedulerNote == "" {
		line("multipath", "%s", multipath(m.Wanted))
	} else {
		line("multipath", "wanted  %s", multipath(m.Wanted))
		m.Kernel.Scheduler = running(m)
		line("", "kernel  %s", multipath(m.Kernel))
	}
	line("kernel", "%s, MPTCP %s%s", s.Kernel.Release, s.Kernel.MPTCP, connections(s.Kernel))
	var lan []string
	for _, i := range s.LAN.Interfaces {
		if i.Present {
			lan = append(lan, i.Name)
		} else {
			lan = append(lan, i.Name+" (absent)")
		}
	}
	line("lan", "%s", or(strings.Join(lan, ", "), "no interface"))
	line("sheafd", "%s, settings revision %d", s.Version, s.Settings.Revision)
	if u := s.Settings.Unconfirmed; u != nil {
		line("unconfirmed", "revision %d is back after %.0f s unless 'sheafctl confirm' keeps this one", u.BackTo, u.RemainingS)
	}

	w.WriteByte('\n')
	writeUplinks(w, s.Uplinks, false, color)
	if len(s.Forwards) > 0 {
		w.WriteString("\nforwards\n")
		writeForwards(w, s.Forwards, color)
	}
	if len(s.Problems) > 0 {
		w.WriteString("\nproblems\n")
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "  - %s\n", printable(p))
	}
}

// connections is what follows the name of a kernel that counts them.
func connections(k webui.KernelStatus) string {
	if k.Connections == 0 {
		return ""
	}
	return fmt.Sprintf(", %d connections with %d subflows", k.Connections, k.Subflows)
}

func multipath(m webui.MultipathValues) string {
	return fmt.Sprintf("%s, path manager %s, scheduler %s, checksum %s, SYN retries %d",
		onOff(m.Enabled), or(m.PathManager, "-"), or(m.Scheduler, "-"), onOff(m.Checksum), m.SYNRetries)
}

// running is the scheduler that the kernel runs, and what else is done in its place.
func running(m webui.MultipathStatus) string {
	if m.SchedulerNote == "" {
		return m.Kernel.Scheduler
	}
	return m.Kernel.Scheduler + " (" + m.SchedulerNote + ")"
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func farSends(f webui.FarMultipath) string {
	if f.Scheduler == "" {
		return "has not said how it sends"
	}
	return "sends " + because("by scheduler "+f.Scheduler, f.Reason) + ", " +
		because("congestion control "+or(f.CongestionControl, "unknown"), f.CongestionControlReason)
}

func because(what, reason string) string {
	if reason == "" {
		return what
	}
	return what + " (" + reason + ")"
}

// writeMultipath sets what is wanted beside what the kernel does, and lists what
// may be wanted.
func writeMultipath(w *bytes.Buffer, s webui.Status) {
	wanted, kernel := s.Multipath.Wanted, s.Multipath.Kernel
	writeTable(w, [][]string{
		{"SETTING", "WANTED", "KERNEL"},
		{"enabled", onOff(wanted.Enabled), onOff(kernel.Enabled)},
		{"path manager", wanted.PathManager, or(kernel.PathManager, "-")},
		{"scheduler", wanted.Scheduler, or(running(s.Multipath), "-")},
		{"congestion control", wanted.CongestionControl, or(kernel.CongestionControl, "-")},
		{"checksum", onOff(wanted.Checksum), onOff(kernel.Checksum)},
		{"SYN retries", fmt.Sprint(wanted.SYNRetries), fmt.Sprint(kernel.SYNRetries)},
	}, nil, false)
	w.WriteByte('\n')
	for _, line := range [][2]string{
		{"path managers", or(strings.Join(s.Multipath.AvailablePathManagers, ", "), "-")},
		{"schedulers", or(strings.Join(s.Multipath.AvailableSchedulers, ", "), "the kernel does not list them")},
		{"kernel", s.Kernel.Release + ", MPTCP " + s.Kernel.MPTCP},
		{"concentrator", farSends(s.Multipath.Concentrator)},
	} {
		fmt.Fprintf(w, "%-13s %s\n", line[0], printable(line[1]))
	}
}

// writeFlows writes a line for each flow, and below it one for each uplink that
// has carried some of it.
func writeFlows(w *bytes.Buffer, f webui.Flows) {
	if len(f.Flows) == 0 {
		w.WriteString("no flows\n")
		return
	}
	rows := [][]string{{"CLIENT", "DESTINATION", "AGE", "UP", "DOWN"}}
	for _, flow := range f.Flows {
		destination := flow.Destination
		switch {
		case flow.Inbound:
			destination += " (inbound)"
		case flow.Through != "tunnel":
			destination += " (" + flow.Through + ")"
		}
		rows = append(rows, []string{flow.Client, destination, age(flow.AgeS),
			humanize(float64(flow.UpBytes), "B"), humanize(float64(flow.DownBytes), "B")})
		for _, u := range flow.Uplinks {
			rows = append(rows, []string{"  " + or(u.Name, u.Address), "", "",
				humanize(float64(u.UpBytes), "B"), humanize(float64(u.DownBytes), "B")})
		}
	}
	writeTable(w, rows, []string{"AGE", "UP", "DOWN"}, false)
	if f.Total > len(f.Flows) {
		fmt.Fprintf(w, "and %d more flows, smaller ones\n", f.Total-len(f.Flows))
	}
}

// age writes seconds in the two largest units that are needed.
func age(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", seconds)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d/time.Second%60)
	default:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d/time.Minute%60)
	}
}

// writeEvents writes a line for each event. Their columns have fixed widths, so
// that what comes later stands below what came first.
func writeEvents(w *bytes.Buffer, list []webui.Event, head bool) {
	line := func(cells ...any) { fmt.Fprintf(w, "%-19s  %-12s  %-10s  %s\n", cells...) }
	if head {
		line("TIME (UTC)", "KIND", "UPLINK", "EVENT")
	}
	for _, e := range list {
		line(e.Time.UTC().Format(time.DateTime), printable(e.Kind), printable(or(e.Uplink, "-")), printable(e.Text))
	}
}

// firstLines cuts text after n lines, if n is more than 0.
func firstLines(text []byte, n int) []byte {
	end := 0
	for range n {
		i := bytes.IndexByte(text[end:], '\n')
		if i < 0 {
			return text
		}
		end += i + 1
	}
	if end == 0 {
		return text
	}
	return text[:end]
}

// terminalHeight is how many lines the terminal w has, 0 if it is none.
func terminalHeight(w io.Writer) int {
	f, ok := w.(*os.File)
	if !ok {
		return 0
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	return int(size.Row)
}

func writeDiagnosis(w *bytes.Buffer, d webui.Diagnosis, color bool) {
	rows := [][]string{{"CHECK", "STATE", "DETAIL"}}
	for _, c := range d.Checks {
		rows = append(rows, []string{strings.TrimSpace(c.Uplink + " " + c.Name), c.State, c.Detail})
	}
	writeTable(w, rows, nil, color)
	fmt.Fprintf(w, "\n%s\n", printable(d.Verdict))
	if d.Fix != "" {
		fmt.Fprintf(w, "%s\n", printable(d.Fix))
	}
}

// hideTyping makes the terminal r show nothing of what is typed, until show is called;
// nil if it is none.
func hideTyping(r io.Reader) (show func()) {
	f, ok := r.(*os.File)
	if !ok {
		return nil
	}
	before, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil
	}
	hidden := *before
	hidden.Lflag &^= unix.ECHO
	if unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &hidden) != nil {
		return nil
	}
	return func() { _ = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, before) }
}

// writeUplinks writes the table of uplinks: rates now, and with totals also all
// bytes so far.
func writeUplinks(w *bytes.Buffer, uplinks []webui.UplinkStatus, totals, color bool) {
	if len(uplinks) == 0 {
		w.WriteString("no uplinks\n")
		return
	}
	rows := [][]string{{"NAME", "INTERFACE", "MODE", "STATE", "RTT", "LOSS", "RX", "TX", "SUBFLOWS", "CARRIER", "ADDRESS", "REASON"}}
	for _, u := range uplinks {
		rx, tx := humanize(float64(u.RxBps), "bit/s"), humanize(float64(u.TxBps), "bit/s")
		if totals {
			rx += ", " + humanize(float64(u.RxBytes), "B")
			tx += ", " + humanize(float64(u.TxBytes), "B")
		}
		rows = append(rows, []string{u.Name, u.Interface, u.Mode, u.State, milliseconds(u.RTTMs), percent(u.Loss),
			rx, tx, fmt.Sprint(u.Subflows), or(u.Carrier, "-"), or(u.Address, "-"), or(uplinkReason(u), "-")})
	}
	writeTable(w, rows, []string{"RTT", "LOSS", "RX", "TX", "SUBFLOWS"}, color)
}

// uplinkReason is all that keeps an uplink from carrying as well as it could.
func uplinkReason(u webui.UplinkStatus) string {
	var reasons []string
	if u.Reason != "" {
		reasons = append(reasons, u.Reason)
	}
	if u.PlainTCP {
		reasons = append(reasons, "plain TCP, its path strips MPTCP")
	}
	if u.LegReason != "" && u.LegReason != u.Reason {
		reasons = append(reasons, or(u.Leg, "no")+" leg: "+u.LegReason)
	}
	// The reason of an uplink that carries nothing at all is that of its packets.
	if u.CarrierReason != "" && u.CarrierReason != u.Reason {
		reasons = append(reasons, "packets: "+u.CarrierReason)
	}
	return strings.Join(reasons, "; ")
}

func writeForwards(w *bytes.Buffer, forwards []webui.ForwardStatus, color bool) {
	rows := [][]string{{"NAME", "PROTOCOL", "PORT", "TO", "SOURCE", "STATE", "REASON"}}
	for _, f := range forwards {
		rows = append(rows, []string{f.Name, f.Protocol, fmt.Sprint(f.Port), f.To, f.Source, f.State, or(f.Reason, "-")})
	}
	writeTable(w, rows, []string{"PORT"}, color)
}

// packets is what follows the state of the packet path.
func packets(p webui.PacketStatus) string {
	var b strings.Builder
	for _, address := range []string{p.Address4, p.Address6} {
		if address != "" {
			b.WriteString(", " + address)
		}
	}
	if p.MTU > 0 {
		fmt.Fprintf(&b, ", MTU %d", p.MTU)
	}
	fmt.Fprintf(&b, ", %d sent, %d received, %d duplicates, %d reordered", p.TxPackets, p.RxPackets, p.Duplicates, p.Reordered)
	if p.TUNRestarts > 0 {
		fmt.Fprintf(&b, ", TUN restarts %d", p.TUNRestarts)
	}
	return b.String()
}

// drops lists the reasons for which packets were dropped, most frequent first.
func drops(counts map[string]uint64) string {
	var list []string
	for _, reason := range slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	}) {
		if counts[reason] > 0 {
			list = append(list, fmt.Sprintf("%s %d", reason, counts[reason]))
		}
	}
	return strings.Join(list, ", ")
}

// writeTable writes rows of which the first is the head. The columns named in
// numbers end at their right edge; the one named STATE is painted.
func writeTable(w *bytes.Buffer, rows [][]string, numbers []string, color bool) {
	head := rows[0]
	widths := make([]int, len(head))
	for _, row := range rows {
		for i := range row {
			row[i] = printable(row[i])
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
	}
	for n, row := range rows {
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if head[i] == "STATE" && n > 0 {
				cell = paint(cell, color)
			}
			switch {
			case slices.Contains(numbers, head[i]):
				w.WriteString(pad + cell)
			case i < len(row)-1:
				w.WriteString(cell + pad)
			default:
				w.WriteString(cell)
			}
			if i < len(row)-1 {
				w.WriteString("  ")
			}
		}
		w.WriteByte('\n')
	}
}

// humanize writes a quantity with the largest prefix that leaves a whole part.
func humanize(v float64, unit string) string {
	if v < 1000 {
		return fmt.Sprintf("%.0f %s", v, unit)
	}
	prefixes := "kMGTPE"
	i := 0
	// 999 950 rounds to 1000.0 k, which is 1.0 M.
	for v /= 1000; v >= 999.95 && i < len(prefixes)-1; i++ {
		v /= 1000
	}
	return fmt.Sprintf("%.1f %c%s", v, prefixes[i], unit)
}

func milliseconds(v *float64) string {
	switch {
	case v == nil:
		return "-"
	case *v < 99.95:
		return fmt.Sprintf("%.1f ms", *v)
	default:
		return fmt.Sprintf("%.0f ms", *v)
	}
}

func percent(v *float64) string {
	switch {
	case v == nil:
		return "-"
	case *v > 0 && *v < 0.0005:
		// Not 0.0%: something was lost.
		return "<0.1%"
	default:
		return fmt.Sprintf("%.1f%%", *v*100)
	}
}

// paint colours a state word. The word says it all without colour too.
func paint(state string, color bool) string {
	code := ""
	switch state {
	case "up", "carrying", "active", "ok":
		code = "32" // green
	case "degraded", "pending":
		code = "33" // yellow
	case "down", "unfit", "absent", "refused", "failed":
		code = "31" // red
	}
	if !color || code == "" {
		return state
	}
	return "\x1b[" + code + "m" + state + "\x1b[0m"
}

// wantsColor tells whether w is a terminal whose user has not refused colour.
func wantsColor(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// printable keeps text from other machines from steering the terminal or
// breaking a line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case unicode.IsPrint(r):
			return r
		default:
			return '?'
		}
	}, s)
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
