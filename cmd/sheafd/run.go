package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"sheaf/daemon/router"
)

// Exit codes, as everywhere in Sheaf.
const (
	exitFailed = 1
	exitUsage  = 2
)

// usageError marks errors of the command line itself.
type usageError struct{ error }

func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	command := newCommand(stdout, stderr)
	command.SetArgs(args)
	err := command.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	_, _ = fmt.Fprintln(stderr, "sheafd:", err)
	var usage usageError
	if errors.As(err, &usage) {
		_, _ = fmt.Fprintln(stderr, "sheafd: run 'sheafd --help' for usage")
		return exitUsage
	}
	return exitFailed
}

func newCommand(stdout, stderr io.Writer) *cobra.Command {
	config := router.Config{Version: version}
	var file string
	var verbose bool
	serve := func(c *cobra.Command, _ []string) error {
		if file != "" {
			text, err := readSettings(file)
			if err != nil {
				return err
			}
			config.Settings = text
		}
		level := slog.LevelInfo
		if verbose {
			level = slog.LevelDebug
		}
		config.Log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
		config.Log.Info("sheafd starts", "version", version)
		return router.Run(c.Context(), config)
	}
	noArgs := func(c *cobra.Command, args []string) error {
		if err := cobra.NoArgs(c, args); err != nil {
			return usageError{err}
		}
		return nil
	}
	flags := func(c *cobra.Command) {
		c.Flags().StringVar(&config.StateDir, "state-dir", "/var/lib/sheaf", "directory of settings and keys")
		c.Flags().StringVar(&file, "settings", "", "YAML file to apply once at the start; without it the stored settings hold")
		c.Flags().StringVar(&config.Socket, "socket", "/run/sheaf/sheaf.sock", "unix socket for sheafctl")
		c.Flags().BoolVar(&verbose, "verbose", false, "log every flow that ends early")
	}
	root := &cobra.Command{
		Use:           "sheafd",
		Short:         "Take LAN traffic through all uplinks at once to a concentrator",
		Version:       version,
		Args:          noArgs,
		RunE:          serve,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	flags(root)
	runCommand := &cobra.Command{Use: "run", Short: "Run the daemon (the default)", Args: noArgs, RunE: serve}
	flags(runCommand)
	root.AddCommand(runCommand)
	return root
}

// maxSettings is the most that is read of a settings file, in bytes; the parser
// refuses more than 1 MiB.
const maxSettings = 1<<20 + 1

func readSettings(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("--settings: %w", err)
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxSettings))
	if err != nil {
		return nil, fmt.Errorf("--settings: %w", err)
	}
	return text, nil
}
