package main

// The path of a Status to a person: Status ─▶ writeStatus ─▶ labelled lines and
// writeUplinks ─▶ columns as wide as their widest cell.

import (
	"bytes"
	"fmt"
	"io"
	"os"
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
	line("kernel", "%s, MPTCP %s", s.Kernel.Release, s.Kernel.MPTCP)
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
	if len(s.Problems) > 0 {
		w.WriteString("\nproblems\n")
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "  - %s\n", printable(p))
	}
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
	const stateColumn = 3
	rows := [][]string{{"NAME", "INTERFACE", "MODE", "STATE", "RTT", "LOSS", "RX", "TX", "SUBFLOWS", "ADDRESS", "REASON"}}
	for _, u := range uplinks {
		rx, tx := humanize(float64(u.RxBps), "bit/s"), humanize(float64(u.TxBps), "bit/s")
		if totals {
			rx += ", " + humanize(float64(u.RxBytes), "B")
			tx += ", " + humanize(float64(u.TxBytes), "B")
		}
		reason := u.Reason
		if u.PlainTCP {
			reason = strings.TrimPrefix(reason+"; plain TCP, its path strips MPTCP", "; ")
		}
		rows = append(rows, []string{u.Name, u.Interface, u.Mode, u.State, milliseconds(u.RTTMs), percent(u.Loss),
			rx, tx, fmt.Sprint(u.Subflows), or(u.Address, "-"), or(reason, "-")})
	}
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i := range row {
			row[i] = printable(row[i])
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
	}
	for n, row := range rows {
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if i == stateColumn && n > 0 {
				cell = paint(cell, color)
			}
			switch {
			case i == len(row)-1:
				w.WriteString(cell)
			case i >= 4 && i <= 8: // numbers
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
	case "up", "carrying":
		code = "32" // green
	case "degraded":
		code = "33" // yellow
	case "down", "unfit", "absent":
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
