package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"sheaf/cmd/internal/daemon"
	"sheaf/daemon/router"
)

func newCommand() *cobra.Command {
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
		config.Log = daemon.Log(c.ErrOrStderr(), verbose)
		config.Log.Info("sheafd starts", "version", version)
		return router.Run(c.Context(), config)
	}
	flags := func(c *cobra.Command) {
		c.Flags().StringVar(&config.StateDir, "state-dir", "/var/lib/sheaf", "directory of settings and keys")
		c.Flags().StringVar(&file, "settings", "", "YAML file to apply once at the start; without it the stored settings hold")
		c.Flags().StringVar(&config.Socket, "socket", "/run/sheaf/sheaf.sock", "unix socket for sheafctl")
		c.Flags().BoolVar(&verbose, "verbose", false, "log every flow that ends early")
	}
	root := &cobra.Command{
		Use:     "sheafd",
		Short:   "Take LAN traffic through all uplinks at once to a concentrator",
		Version: version,
		Args:    daemon.Args(cobra.NoArgs),
		RunE:    serve,
	}
	flags(root)
	run := &cobra.Command{Use: "run", Short: "Run the daemon (the default)", Args: daemon.Args(cobra.NoArgs), RunE: serve}
	flags(run)
	cleanup := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove what a daemon that was killed, or stopped with when_tunnel_down block, left in the kernel",
		Args:  daemon.Args(cobra.NoArgs),
		RunE:  func(c *cobra.Command, _ []string) error { return router.Cleanup(c.Context(), config.StateDir) },
	}
	cleanup.Flags().StringVar(&config.StateDir, "state-dir", "/var/lib/sheaf", "directory of settings and keys")
	root.AddCommand(run, cleanup)
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
