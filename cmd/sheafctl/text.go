package main

// The path of a Status to a person: Status ─▶ writeStatus ─▶ labelled lines, and
// writeUplinks and writeForwards ─▶ writeTable, columns as wide as their widest
// cell.

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
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
	if m := s.Multipath; m.Wanted == m.Kernel {
		line("multipath", "%s", multipath(m.Wanted))
	} else {
		line("multipath", "wanted  %s", multipath(m.Wanted))
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
	onOff := func(b bool) string {
		if b {
			return "on"
		}
		return "off"
	}
	return fmt.Sprintf("%s, path manager %s, scheduler %s, checksum %s, SYN retries %d",
		onOff(m.Enabled), or(m.PathManager, "-"), or(m.Scheduler, "-"), onOff(m.Checksum), m.SYNRetries)
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
			case i == len(row)-1:
				w.WriteString(cell)
			case slices.Contains(numbers, head[i]):
				w.WriteString(pad + cell + "  ")
			default:
				w.WriteString(cell + pad + "  ")
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
	case "up", "carrying", "active":
		code = "32" // green
	case "degraded", "pending":
		code = "33" // yellow
	case "down", "unfit", "absent", "refused":
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
