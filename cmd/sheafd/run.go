package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"sheaf/cmd/internal/daemon"
	"sheaf/daemon/router"
)

func newCommand() *cobra.Command {
	config := router.Config{Version: version}
	var file string
	var log daemon.LogFlags
	serve := func(c *cobra.Command, _ []string) error {
		if file != "" {
			text, err := readSettings(file)
			if err != nil {
				return err
			}
			config.Settings = text
		}
		var err error
		if config.Log, err = log.Log(c.ErrOrStderr()); err != nil {
			return err
		}
		config.Log.Info("sheafd starts", "version", version)
		return router.Run(c.Context(), config)
	}
	flags := func(c *cobra.Command) {
		c.Flags().StringVar(&config.StateDir, "state-dir", "/var/lib/sheaf", "directory of settings and keys")
		c.Flags().StringVar(&file, "settings", "", "YAML file to apply once at the start; without it the stored settings hold")
		c.Flags().StringVar(&config.Socket, "socket", "/run/sheaf/sheaf.sock", "unix socket for sheafctl")
		c.Flags().StringVar(&config.Admin, "admin", ":8443", "where the panel is served: :PORT on the LAN's interfaces, HOST:PORT there, or empty for nowhere")
		log.Add(c, "log every flow that ends early")
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
	restore := &cobra.Command{
		Use:   "recover",
		Short: "Put the newest good copy of the settings and keys to the place of a damaged file",
		Args:  daemon.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			done, err := router.Recover(config.StateDir, time.Now())
			if errors.Is(err, router.ErrInOrder) {
				_, err = fmt.Fprintln(c.OutOrStdout(), err)
				return err
			}
			if err != nil {
				return err
			}
			r := done.Revision
			_, err = fmt.Fprintf(c.OutOrStdout(), "revision %d by %s of %s is back; the damaged file is kept as %s\n",
				r.Number, r.Author, r.Time.Format(time.DateTime+" MST"), done.Damaged)
			return err
		},
	}
	restore.Flags().StringVar(&config.StateDir, "state-dir", "/var/lib/sheaf", "directory of settings and keys")
	root.AddCommand(run, cleanup, restore)
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
