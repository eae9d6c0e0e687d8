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

// Log writes text lines to w, with debug messages when verbose is set.
func Log(w io.Writer, verbose bool) *slog.Logger {
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}
