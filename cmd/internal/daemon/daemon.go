// Package daemon is what the command lines of sheafd and concentratord share.
//
//	arguments ─▶ Main ─▶ cobra ─▶ the daemon's Run, until SIGINT or SIGTERM ─▶ exit code
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes, as everywhere in Sheaf.
const (
	exitFailed = 1
	exitUsage  = 2
)

// UsageError marks errors of the command line itself.
type UsageError struct{ error }

// Usage marks err as an error of the command line; nil stays nil.
func Usage(err error) error {
	if err == nil {
		return nil
	}
	return UsageError{err}
}

// Args makes cobra's check of the positional arguments a usage error.
func Args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error { return Usage(check(c, args)) }
}

// Main runs a daemon's command line and returns its exit code.
func Main(root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	// The heap is small and its buffers are pooled: collecting it more often costs
	// next to nothing and saves a tenth of the memory.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(30)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root.SilenceUsage, root.SilenceErrors = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return Usage(err) })
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	_, _ = fmt.Fprintf(stderr, "%s: %v\n", root.Name(), err)
	var usage UsageError
	if errors.As(err, &usage) {
		_, _ = fmt.Fprintf(stderr, "%s: run '%s --help' for usage\n", root.Name(), root.Name())
		return exitUsage
	}
	return exitFailed
}

// LogFlags are how a daemon's log is asked for.
type LogFlags struct {
	verbose bool
	format  string
}

// Add puts them on a command; verbose says what more is told with --verbose.
func (l *LogFlags) Add(c *cobra.Command, verbose string) {
	c.Flags().BoolVar(&l.verbose, "verbose", false, verbose)
	c.Flags().StringVar(&l.format, "log", "text", "form of the log: text or json")
}

// Log writes lines to w, with debug messages when they are asked for.
func (l *LogFlags) Log(w io.Writer) (*slog.Logger, error) {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if l.verbose {
		options.Level = slog.LevelDebug
	}
	switch l.format {
	case "text", "": // "" of a command without the flags
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return nil, Usage(fmt.Errorf("--log is %q; it must be text or json", l.format))
}
