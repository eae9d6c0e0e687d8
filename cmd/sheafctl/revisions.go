package main

// The path of settings that change and go back: apply, export, diff, and what keeps
// their history: revisions, rollback, confirm ─▶ the daemon, which decides.

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"sheaf/daemon/control/settings"
	"sheaf/webui"
)

// maxConfirm is how long settings may wait to be confirmed.
const maxConfirm = time.Hour

// confirmFlag adds --confirm to a command.
func confirmFlag(c *cobra.Command, confirm *time.Duration) {
	c.Flags().DurationVar(confirm, "confirm", 0, "take the change back after this time, as 120s, unless 'sheafctl confirm' keeps it")
}

func checkConfirm(c *cobra.Command, confirm time.Duration) error {
	if c.Flags().Changed("confirm") && (confirm < time.Second || confirm > maxConfirm || confirm%time.Second != 0) {
		return usagef(c, "--confirm is %v; it must be whole seconds, from 1s to %v", confirm, maxConfirm)
	}
	return nil
}

func (a *app) apply() *cobra.Command {
	var (
		file    string
		confirm time.Duration
	)
	c := &cobra.Command{
		Use:   "apply -f FILE.yaml [--confirm 120s]",
		Short: "Make the settings in a file the ones in force",
		Args:  exactly(0, "no arguments besides -f FILE.yaml"),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkConfirm(c, confirm); err != nil {
				return err
			}
			name, text, err := a.settingsOf(c, file)
			if err != nil {
				return err
			}
			rev, err := a.client().Apply(c.Context(), text, confirm)
			return a.changed(rev, err, name, "the settings are")
		},
	}
	c.Flags().StringVarP(&file, "file", "f", "", "settings to apply; '-' is standard input")
	confirmFlag(c, &confirm)
	return c
}

// settingsOf reads the file that a command was given.
func (a *app) settingsOf(c *cobra.Command, file string) (name string, text []byte, err error) {
	if file == "" {
		return "", nil, usagef(c, "no settings given; add -f FILE.yaml, or -f - for standard input")
	}
	if name, text, err = a.readSettings(file); err != nil {
		err = fmt.Errorf("read the settings: %w", err)
	}
	return name, text, err
}

func (a *app) export() *cobra.Command {
	return &cobra.Command{
		Use:   "export",
		Short: "Print the settings in force as a file that apply takes; it holds no secrets",
		Args:  exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			rev, err := a.client().Settings(c.Context())
			if err != nil {
				return err
			}
			return a.emit(rev.Settings, func(w *bytes.Buffer) { w.Write(rev.Settings.YAML()) })
		},
	}
}

func (a *app) diff() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "diff -f FILE.yaml",
		Short: "Show what applying the settings in a file would change",
		Args:  exactly(0, "no arguments besides -f FILE.yaml"),
		RunE: func(c *cobra.Command, _ []string) error {
			name, text, err := a.settingsOf(c, file)
			if err != nil {
				return err
			}
			changes, err := a.client().Compare(c.Context(), text)
			if err != nil {
				return refused(err, name)
			}
			if len(changes) == 0 {
				a.say("nothing would change")
			}
			return a.emit(changes, func(w *bytes.Buffer) {
				for _, change := range changes {
					fmt.Fprintln(w, changeText(change))
				}
			})
		},
	}
	c.Flags().StringVarP(&file, "file", "f", "", "settings to compare; '-' is standard input")
	return c
}

func (a *app) revisions() *cobra.Command {
	return &cobra.Command{
		Use:   "revisions",
		Short: "List the settings there have been, the newest first, and what each changed",
		Long: "List the settings there have been, the newest first, and what each changed.\n" +
			"The daemon keeps the last 200.",
		Args: exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := a.client().Revisions(c.Context())
			if err != nil {
				return err
			}
			return a.emit(list, func(w *bytes.Buffer) { writeRevisions(w, list) })
		},
	}
}

func (a *app) rollback() *cobra.Command {
	var confirm time.Duration
	c := &cobra.Command{
		Use:   "rollback REVISION [--confirm 120s]",
		Short: "Make the settings of a revision the ones in force, as a new revision",
		Args:  exactly(1, "the number of one REVISION; 'sheafctl revisions' lists them"),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkConfirm(c, confirm); err != nil {
				return err
			}
			number, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil || number == 0 {
				return usagef(c, "%q is not the number of a revision", args[0])
			}
			rev, err := a.client().Restore(c.Context(), number, confirm)
			return a.changed(rev, err, "settings", fmt.Sprintf("the settings of revision %d are", number))
		},
	}
	confirmFlag(c, &confirm)
	return c
}

func (a *app) confirm() *cobra.Command {
	var no bool
	c := &cobra.Command{
		Use:   "confirm [--no]",
		Short: "Keep the settings that would be taken back by themselves, or take them back now",
		Args:  exactly(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			if no {
				rev, err := a.client().TakeBack(c.Context())
				return a.changed(rev, err, "settings", "the settings from before are")
			}
			s, err := a.client().Status(c.Context())
			if err != nil {
				return err
			}
			if s.Settings.Unconfirmed == nil {
				return errors.New("no settings wait to be confirmed")
			}
			rev, err := a.client().Confirm(c.Context(), s.Settings.Unconfirmed.Revision)
			if err != nil {
				return err
			}
			a.say("the settings stay")
			return a.emit(rev, func(w *bytes.Buffer) { fmt.Fprintf(w, "revision %d\n", rev.Number) })
		},
	}
	c.Flags().BoolVar(&no, "no", false, "take them back")
	return c
}

func writeRevisions(w *bytes.Buffer, list []webui.RevisionSummary) {
	line := func(cells ...any) { fmt.Fprintf(w, "%-8s  %-19s  %-10s  %s\n", cells...) }
	line("REVISION", "TIME (UTC)", "AUTHOR", "CHANGES")
	for _, r := range list {
		cells := []any{strconv.FormatUint(r.Number, 10), r.Time.UTC().Format(time.DateTime), printable(r.Author)}
		if len(r.Changes) == 0 {
			line(append(cells, "-")...)
		}
		for _, change := range r.Changes {
			line(append(cells, changeText(change))...)
			cells = []any{"", "", ""}
		}
	}
}

// changeText is one change in one line.
func changeText(c settings.Change) string {
	switch {
	case c.From == "":
		return printable(fmt.Sprintf("%s: added %s", c.Path, c.To))
	case c.To == "":
		return printable(fmt.Sprintf("%s: removed %s", c.Path, c.From))
	default:
		return printable(fmt.Sprintf("%s: %s → %s", c.Path, c.From, c.To))
	}
}
