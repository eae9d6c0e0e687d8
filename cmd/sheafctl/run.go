package main

// The path of a command line: run ─▶ cobra finds the command ─▶ its function asks
// the daemon and fills app.out ─▶ finish: everything is written at once, and the
// error becomes messages and an exit code.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sheaf/daemon/control/settings"
	"sheaf/webui"
)

// The exit codes. Scripts rely on them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitDegraded    = 4
)

const (
	defaultSocket = "/run/sheaf/sheaf.sock"
	maxToken      = 16 << 10
	maxPassword   = 1 << 10
	// flowsEvery is how often the live list of flows is read again.
	flowsEvery = time.Second
)

// usageError is a command line that cannot mean anything.
type usageError struct {
	error
	command string
}

// fileError is an error of the settings in a file.
type fileError struct {
	file string
	*settings.Invalid
}

// errDegraded is what status --check found; the status itself has said why.
var errDegraded = errors.New("the tunnel is not up")

// app is one run of sheafctl.
type app struct {
	stdin   io.Reader
	stdout  io.Writer
	stderr  io.Writer
	out     bytes.Buffer // what goes to stdout when the command has succeeded, or at flush
	color   bool
	socket  string
	output  choice
	version string
}

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, color: wantsColor(stdout), version: version,
		output: choice{value: "text", allowed: []string{"text", "json"}}}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(&a.out)
	root.SetErr(stderr)
	err := root.Execute()
	if flushErr := a.flush(); err == nil {
		err = flushErr
	}
	return a.finish(err)
}

// flush writes what a command that goes on has to say so far.
func (a *app) flush() error {
	_, err := a.stdout.Write(a.out.Bytes())
	a.out.Reset()
	if err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	return nil
}

// finish tells the person what went wrong, and the script by the exit code.
func (a *app) finish(err error) int {
	var (
		usage usageError
		file  fileError
	)
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errDegraded):
		return exitDegraded
	case errors.As(err, &usage):
		a.say("%v", err)
		a.say("run '%s --help' for usage", usage.command)
		return exitUsage
	case errors.As(err, &file):
		for _, p := range file.Problems {
			where := file.file
			if p.Line > 0 {
				where = fmt.Sprintf("%s:%d", where, p.Line)
			}
			if p.Path != "" {
				where += ": " + p.Path
			}
			fmt.Fprintf(a.stderr, "%s: %s\n", printable(where), printable(p.Reason))
		}
		a.say("these settings were refused; nothing was changed")
		return exitFailed
	case errors.Is(err, webui.ErrUnreachable):
		a.say("%v", err)
		return exitUnreachable
	default:
		a.say("%v", err)
		return exitFailed
	}
}

// say writes one message to stderr.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.stderr, "sheafctl: %s\n", printable(fmt.Sprintf(format, args...)))
}

func (a *app) client() *webui.Client { return webui.NewClient(a.socket) }

// emit fills stdout with v as JSON, or with what text writes.
func (a *app) emit(v any, text func(w *bytes.Buffer)) error {
	if a.output.value != "json" {
		text(&a.out)
		return nil
	}
	e := json.NewEncoder(&a.out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

func (a *app) root() *cobra.Command {
	root := group("sheafctl", "Drive the Sheaf router daemon",
		a.join(), a.apply(), a.confirm(), a.export(), a.diff(), a.revisions(), a.rollback(),
		a.status(), a.uplinks(), a.uplink(), a.multipath(), a.flows(), a.events(), a.diag(), a.password(), a.showVersion())
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.CompletionOptions.DisableDefaultCmd = true
	root.PersistentFlags().StringVar(&a.socket, "socket", defaultSocket, "unix socket of the daemon")
	root.PersistentFlags().VarP(&a.output, "output", "o", "form of the output: text or json")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{err, c.CommandPath()}
	})
	// Cobra's own help command succeeds on a topic that does not exist.
	root.SetHelpCommand(&cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Help about a command",
		RunE: func(c *cobra.Command, args []string) error {
			topic, rest, err := c.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usagef(c.Root(), "there is no command %q", strings.Join(args, " "))
			}
			return topic.Help()
		},
	})
	return root
}

func (a *app) join() *cobra.Command {
	return &cobra.Command{
		Use:   "join TOKEN",
		Short: "Enrol with the concentrator that issued TOKEN",
		Long: "Enrol with the concentrator that issued TOKEN, which works once.\n" +
			"With '-' the token is read from standard input: other users of this\n" +
			"machine can see the arguments of a command.",
		Args: exactly(1, "one TOKEN, or '-' to read it from standard input"),
		RunE: func(c *cobra.Command, args []string) error {
			token := args[0]
			if token == "-" {
				text, err := readBounded(a.stdin, maxToken)
				if err != nil {
					return fmt.Errorf("read the token from standard input: %w", err)
				}
				token = string(text)
			}
			if token = strings.TrimSpace(token); token == "" {
				return usagef(c, "the token is empty")
			}
			joined, err := a.client().Join(c.Context(), token)
			if err != nil {
				return err
			}
			return a.emit(joined, func(w *bytes.Buffer) {
				fmt.Fprintf(w, "joined %s at %s\nfingerprint %s\n",
					printable(joined.Concentrator), printable(joined.Address), printable(joined.Fingerprint))
			})
		},
	}
}

func (a *app) diag() *cobra.Command {
	var check bool
	c := &cobra.Command{
		Use:   "diag",
		Short: "Look for what does not work, and say what to do",
		Args:  exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			d, err := a.client().Diagnose(c.Context())
			if err != nil {
				return err
			}
			if err := a.emit(d, func(w *bytes.Buffer) { writeDiagnosis(w, d, a.color) }); err != nil {
				return err
			}
			if check && !d.Healthy {
				return errDegraded
			}
			return nil
		},
	}
	c.Flags().BoolVar(&check, "check", false, "exit with 4 if anything has failed")
	return c
}

func (a *app) password() *cobra.Command {
	return &cobra.Command{
		Use:   "password",
		Short: "Set the panel's password, a line of standard input",
		Long: "Set the panel's password, a line of standard input. Whoever was logged in\n" +
			"has to log in again.",
		Args: exactly(0, "no arguments; it reads the password from standard input"),
		RunE: func(c *cobra.Command, _ []string) error {
			show := hideTyping(a.stdin)
			if show != nil {
				_, _ = fmt.Fprint(a.stderr, "new password: ")
			}
			text, err := readLine(a.stdin, maxPassword)
			if show != nil {
				show()
				_, _ = fmt.Fprintln(a.stderr)
			}
			if err != nil {
				return fmt.Errorf("read the password from standard input: %w", err)
			}
			if err := a.client().SetPassword(c.Context(), text); err != nil {
				return err
			}
			a.say("the password is set")
			return nil
		},
	}
}

func (a *app) readSettings(file string) (name string, text []byte, err error) {
	if file == "-" {
		text, err = readBounded(a.stdin, settings.MaxText)
		return "<stdin>", text, err
	}
	f, err := os.Open(file)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	text, err = readBounded(f, settings.MaxText)
	return file, text, err
}

// refused names the file whose settings an error is about.
func refused(err error, file string) error {
	if invalid := (*settings.Invalid)(nil); errors.As(err, &invalid) {
		return fileError{file, invalid}
	}
	return err
}

// changed tells what became of a change of the settings in a file; what is its subject
// and verb.
func (a *app) changed(rev webui.Revision, err error, file, what string) error {
	if err != nil {
		return refused(err, file)
	}
	if rev.Warning == "" {
		a.say("%s in force", what)
	} else {
		a.say("%s stored, but not in force yet: %s", what, rev.Warning)
	}
	if u := rev.Unconfirmed; u != nil {
		a.say("revision %d is back after %.0f s unless 'sheafctl confirm' keeps this one", u.BackTo, u.RemainingS)
	}
	return a.emit(rev, func(w *bytes.Buffer) { fmt.Fprintf(w, "revision %d\n", rev.Number) })
}

func (a *app) status() *cobra.Command {
	var check bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the tunnel, the uplinks and what the kernel does",
		Args:  exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := a.client().Status(c.Context())
			if err != nil {
				return err
			}
			if err := a.emit(s, func(w *bytes.Buffer) { writeStatus(w, s, a.color) }); err != nil {
				return err
			}
			if check && s.Tunnel.State != "up" {
				return errDegraded
			}
			return nil
		},
	}
	c.Flags().BoolVar(&check, "check", false, "exit with 4 unless the tunnel is up over every uplink that is on")
	return c
}

func (a *app) uplinks() *cobra.Command {
	return &cobra.Command{
		Use:   "uplinks",
		Short: "List the uplinks with rates and totals",
		Args:  exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := a.client().Status(c.Context())
			if err != nil {
				return err
			}
			return a.emit(s.Uplinks, func(w *bytes.Buffer) { writeUplinks(w, s.Uplinks, true, a.color) })
		},
	}
}

func (a *app) uplink() *cobra.Command {
	mode := choice{allowed: []string{string(settings.On), string(settings.Off), string(settings.Backup)}}
	var weight, preference int
	set := &cobra.Command{
		Use:   "set NAME [--mode on|off|backup] [--weight N] [--preference N]",
		Short: "Change settings of an uplink; what is not named stays",
		Args:  exactly(1, "the NAME of one uplink"),
		RunE: func(c *cobra.Command, args []string) error {
			var change webui.UplinkChange
			if mode.value != "" {
				change.Mode = (*settings.Mode)(&mode.value)
			}
			if c.Flags().Changed("weight") {
				change.Weight = &weight
			}
			if c.Flags().Changed("preference") {
				change.Preference = &preference
			}
			if change == (webui.UplinkChange{}) {
				return usagef(c, "nothing to set; add --mode, --weight or --preference")
			}
			if args[0] == "" {
				return usagef(c, "the name of the uplink is empty")
			}
			rev, err := a.client().SetUplink(c.Context(), args[0], change)
			return a.changed(rev, err, "settings", fmt.Sprintf("the settings of uplink %s are", args[0]))
		},
	}
	set.Flags().Var(&mode, "mode", "on: carries traffic, off: carries nothing, backup: only while no other is fit")
	set.Flags().IntVar(&weight, "weight", 1, "its share with scheduler weighted, relative to the others'")
	set.Flags().IntVar(&preference, "preference", 0, "its place with scheduler firstfit; the lowest are filled first")
	return group("uplink", "Change one uplink", set)
}

func (a *app) multipath() *cobra.Command {
	var (
		enabled, checksum      bool
		pathManager, scheduler string
		congestionControl      string
		synRetries             int
	)
	set := &cobra.Command{
		Use:   "set [--path-manager P] [--scheduler S] [--congestion-control C] [--checksum=true|false] [--syn-retries N] [--enabled=true|false]",
		Short: "Change multipath settings; what is not named stays",
		Args:  exactly(0, "no arguments besides flags"),
		RunE: func(c *cobra.Command, _ []string) error {
			var change webui.MultipathChange
			given := c.Flags().Changed
			if given("enabled") {
				change.Enabled = &enabled
			}
			if given("path-manager") {
				change.PathManager = (*settings.PathManager)(&pathManager)
			}
			if given("scheduler") {
				change.Scheduler = &scheduler
			}
			if given("congestion-control") {
				change.CongestionControl = (*settings.CongestionControl)(&congestionControl)
			}
			if given("checksum") {
				change.Checksum = &checksum
			}
			if given("syn-retries") {
				change.SYNRetries = &synRetries
			}
			if change == (webui.MultipathChange{}) {
				return usagef(c, "nothing to set; name at least one setting")
			}
			rev, err := a.client().SetMultipath(c.Context(), change)
			return a.changed(rev, err, "settings", "the multipath settings are")
		},
	}
	f := set.Flags()
	f.BoolVar(&enabled, "enabled", true, "use MPTCP at all")
	f.StringVar(&pathManager, "path-manager", "", "how subflows are opened; 'sheafctl multipath' lists the offer")
	f.StringVar(&scheduler, "scheduler", "", "which subflow takes the next segment; 'sheafctl multipath' lists the offer")
	f.StringVar(&congestionControl, "congestion-control", "", "how both ends send: auto, cubic or bbr")
	f.BoolVar(&checksum, "checksum", false, "checksum of the data, against middleboxes that change it")
	f.IntVar(&synRetries, "syn-retries", 0, "how many SYNs ask for MPTCP before plain TCP is tried")

	show := group("multipath", "Show the multipath settings and what the kernel makes of them, or change them", set)
	unknown := show.RunE
	show.RunE = func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknown(c, args)
		}
		s, err := a.client().Status(c.Context())
		if err != nil {
			return err
		}
		return a.emit(s.Multipath, func(w *bytes.Buffer) { writeMultipath(w, s) })
	}
	return show
}

func (a *app) flows() *cobra.Command {
	var (
		follow bool
		limit  int
	)
	c := &cobra.Command{
		Use:   "flows",
		Short: "List the live TCP flows with their bytes over each uplink, the biggest first",
		Long: "List the live TCP flows with their bytes over each uplink, the biggest first.\n" +
			"Over the uplinks frames and encryption count too, and what was sent twice.\n" +
			"With -f -o json each line is one list.",
		Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			if limit < 1 || limit > webui.MaxFlows {
				return usagef(c, "--limit is %d; it must be from 1 to %d", limit, webui.MaxFlows)
			}
			for {
				f, err := a.client().Flows(c.Context(), limit)
				if err != nil {
					return err
				}
				if !follow {
					return a.emit(f, func(w *bytes.Buffer) { writeFlows(w, f) })
				}
				if err := a.showAgain(f, func(w *bytes.Buffer) { writeFlows(w, f) }); err != nil {
					return err
				}
				time.Sleep(flowsEvery)
			}
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "show the list again every second until interrupted")
	c.Flags().IntVar(&limit, "limit", webui.MaxFlows, "list at most so many")
	return c
}

// showAgain writes v as one line of JSON, or what text writes, on a terminal in
// the place of what was there.
func (a *app) showAgain(v any, text func(w *bytes.Buffer)) error {
	if a.output.value == "json" {
		return a.line(v)
	}
	height := terminalHeight(a.stdout)
	if height > 0 {
		a.out.WriteString("\x1b[H\x1b[J") // to the upper left corner, and clear the rest
	}
	var b bytes.Buffer
	text(&b)
	a.out.Write(firstLines(b.Bytes(), height-1))
	if height == 0 {
		a.out.WriteByte('\n')
	}
	return a.flush()
}

// line writes v as one line of JSON at once.
func (a *app) line(v any) error {
	e := json.NewEncoder(&a.out)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	return a.flush()
}

func (a *app) events() *cobra.Command {
	var follow bool
	c := &cobra.Command{
		Use:   "events",
		Short: "Show what has happened: to uplinks, tunnel, settings, concentrator and kernel",
		Long: "Show what has happened: to uplinks, tunnel, settings, concentrator and kernel.\n" +
			"The daemon keeps the last 1,000 events since it started.\n" +
			"With -f -o json each line is one event.",
		Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := a.client().Events(c.Context(), 0, false)
			if err != nil {
				return err
			}
			if !follow {
				return a.emit(list.Events, func(w *bytes.Buffer) { writeEvents(w, list.Events, true) })
			}
			last := uint64(0)
			for head := true; ; head = false {
				if list.Missed > 0 && !head {
					a.say("%d events were missed", list.Missed)
				}
				if a.output.value == "json" {
					for _, e := range list.Events {
						if err := a.line(e); err != nil {
							return err
						}
					}
				} else {
					writeEvents(&a.out, list.Events, head)
				}
				if err := a.flush(); err != nil {
					return err
				}
				if n := len(list.Events); n > 0 {
					last = list.Events[n-1].ID
				}
				if list, err = a.client().Events(c.Context(), last, true); err != nil {
					return err
				}
			}
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens until interrupted")
	return c
}

func (a *app) showVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of sheafctl",
		Args:  exactly(0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			return a.emit(map[string]string{"version": a.version}, func(w *bytes.Buffer) {
				fmt.Fprintf(w, "sheafctl %s\n", a.version)
			})
		},
	}
}

// group is a command that only has subcommands. Cobra alone would print help and
// succeed when the subcommand is missing or unknown.
func group(use, short string, subcommands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, SuggestionsMinimumDistance: 2,
		// Lets unknown words through to RunE, where both mistakes are answered.
		Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef(c, "no command given")
			}
			hint := ""
			if near := c.SuggestionsFor(args[0]); len(near) > 0 {
				hint = "; did you mean " + strings.Join(near, " or ") + "?"
			}
			return usagef(c, "there is no command %q%s", args[0], hint)
		},
	}
	c.AddCommand(subcommands...)
	return c
}

// exactly demands n arguments, which wanted names.
func exactly(n int, wanted string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return usagef(c, "%s takes %s; %d given", c.Name(), wanted, len(args))
		}
		return nil
	}
}

func usagef(c *cobra.Command, format string, args ...any) error {
	return usageError{fmt.Errorf(format, args...), c.CommandPath()}
}

// readBounded reads r to its end, and refuses more than limit bytes.
func readBounded(r io.Reader, limit int64) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("longer than %d bytes", limit)
	}
	return text, err
}

// readLine reads one line, byte by byte: what follows it is not this command's.
func readLine(r io.Reader, limit int) (string, error) {
	var line []byte
	for one := make([]byte, 1); len(line) <= limit; {
		n, err := r.Read(one)
		if n == 1 && one[0] == '\n' || errors.Is(err, io.EOF) {
			return strings.TrimSuffix(string(line), "\r"), nil
		}
		if err != nil {
			return "", err
		}
		line = append(line, one[:n]...)
	}
	return "", fmt.Errorf("longer than %d bytes", limit)
}

// choice is a flag that takes one of a few words.
type choice struct {
	value   string
	allowed []string
}

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return strings.Join(c.allowed, "|") }

func (c *choice) Set(v string) error {
	if !slices.Contains(c.allowed, v) {
		return fmt.Errorf("it must be one of %s", strings.Join(c.allowed, ", "))
	}
	c.value = v
	return nil
}
