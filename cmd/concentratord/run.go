package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sheaf/daemon/concentrator"
	"sheaf/webui"
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
	_, _ = fmt.Fprintln(stderr, "concentratord:", err)
	var usage usageError
	if errors.As(err, &usage) {
		_, _ = fmt.Fprintln(stderr, "concentratord: run 'concentratord --help' for usage")
		return exitUsage
	}
	return exitFailed
}

// commands works beside a running daemon, and on a stopped one.
type commands interface {
	CreateToken(ctx context.Context, name string, addresses []string, validity time.Duration) (string, error)
	Routers(ctx context.Context) ([]webui.EnrolledRouter, error)
	RemoveRouter(ctx context.Context, name string) error
}

func newCommand(stdout, stderr io.Writer) *cobra.Command {
	config := concentrator.Config{}
	var allowed []string
	var verbose bool
	serve := func(c *cobra.Command, _ []string) error {
		for _, text := range allowed {
			prefix, err := parsePrefix(text)
			if err != nil {
				return usageError{err}
			}
			config.Allowed = append(config.Allowed, prefix)
		}
		config.Log = newLog(stderr, verbose)
		config.Log.Info("concentratord starts", "version", version)
		return concentrator.Run(c.Context(), config)
	}
	noArgs := func(c *cobra.Command, args []string) error {
		if err := cobra.NoArgs(c, args); err != nil {
			return usageError{err}
		}
		return nil
	}
	root := &cobra.Command{
		Use:           "concentratord",
		Short:         "End the tunnels of routers and take their traffic to the Internet",
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
	root.PersistentFlags().StringVar(&config.StateDir, "state-dir", "/var/lib/sheaf", "directory of keys, tokens and enrolled routers")

	runFlags := func(c *cobra.Command) {
		c.Flags().StringArrayVar(&config.Listen, "listen", []string{":4443"}, "HOST:PORT to accept routers on; may be repeated")
		c.Flags().StringArrayVar(&allowed, "allow-destination", nil, "CIDR that routers may reach although it is private, or the machine's own; may be repeated")
		c.Flags().BoolVar(&verbose, "verbose", false, "log every session and refused flow")
	}
	runFlags(root)
	runCommand := &cobra.Command{Use: "run", Short: "Run the daemon (the default)", Args: noArgs, RunE: serve}
	runFlags(runCommand)

	root.AddCommand(runCommand, tokenCommand(&config, noArgs), routersCommand(&config, noArgs), &cobra.Command{
		Use:   "cleanup",
		Short: "Undo what a daemon that was killed left in the kernel",
		Long:  "Undo what a daemon that was killed left in the kernel. The state directory stays; delete it to forget keys and routers.",
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return concentrator.Cleanup(c.Context(), config.StateDir, newLog(stderr, false))
		},
	})
	return root
}

func tokenCommand(config *concentrator.Config, noArgs cobra.PositionalArgs) *cobra.Command {
	var name string
	var addresses []string
	var validity time.Duration
	c := &cobra.Command{
		Use:   "token --name NAME --address HOST:PORT",
		Short: "Print a one-time enrolment token for one router",
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return withState(config.StateDir, true, func(do commands) error {
				token, err := do.CreateToken(c.Context(), name, addresses, validity)
				if err == nil {
					_, err = fmt.Fprintln(c.OutOrStdout(), token)
				}
				return err
			})
		},
	}
	c.Flags().StringVar(&name, "name", "", "what to call the router")
	c.Flags().StringArrayVar(&addresses, "address", nil, "HOST:PORT where the router reaches this concentrator; may be repeated, first choice first")
	c.Flags().DurationVar(&validity, "valid", concentrator.DefaultValidity, "how long the token can be used")
	for _, required := range []string{"name", "address"} {
		if err := c.MarkFlagRequired(required); err != nil {
			panic(err) // the flag is defined two lines above
		}
	}
	return c
}

func routersCommand(config *concentrator.Config, noArgs cobra.PositionalArgs) *cobra.Command {
	var output string
	list := &cobra.Command{
		Use:   "routers",
		Short: "List the enrolled routers",
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError{fmt.Errorf("-o %q: want text or json", output)}
			}
			return withState(config.StateDir, false, func(do commands) error {
				routers, err := do.Routers(c.Context())
				if err != nil {
					return err
				}
				if output == "json" {
					e := json.NewEncoder(c.OutOrStdout())
					e.SetIndent("", "  ")
					return e.Encode(routers)
				}
				return printRouters(c.OutOrStdout(), routers)
			})
		},
	}
	list.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	list.AddCommand(&cobra.Command{
		Use:   "remove NAME",
		Short: "Revoke a router at once, its live sessions included",
		Args: func(c *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(1)(c, args); err != nil {
				return usageError{err}
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			return withState(config.StateDir, false, func(do commands) error {
				return do.RemoveRouter(c.Context(), args[0])
			})
		},
	})
	return list
}

func printRouters(w io.Writer, routers []webui.EnrolledRouter) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "NAME\tENROLLED\tLAST SEEN\tADDRESS\tSESSIONS\tFLOWS\tKEY")
	for _, r := range routers {
		seen, address := "-", "-"
		if r.LastSeen != nil {
			seen, address = r.LastSeen.Format(time.DateTime), r.Address
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%d\t%s\n",
			r.Name, r.EnrolledAt.Format(time.DateTime), seen, address, r.Sessions, r.Flows, r.Fingerprint)
	}
	return table.Flush()
}

// withState runs do against the daemon on the state directory, or against the
// directory itself when no daemon runs on it. make says whether a directory
// that does not exist yet may be made.
func withState(stateDir string, mayMake bool, do func(commands) error) error {
	socket := concentrator.SocketPath(stateDir)
	err := do(webui.NewClient(socket))
	if !errors.Is(err, webui.ErrUnreachable) {
		return err
	}
	if _, statErr := os.Stat(stateDir); statErr != nil {
		if !mayMake || !errors.Is(statErr, os.ErrNotExist) {
			return fmt.Errorf("state directory: %w", statErr)
		}
		if err := os.MkdirAll(stateDir, 0o700); err != nil {
			return fmt.Errorf("making the state directory: %w", err)
		}
	}
	store, err := concentrator.OpenStore(stateDir)
	if err != nil {
		return err
	}
	defer func() { _ = store.Close() }()
	return do(concentrator.Offline{Store: store})
}

func parsePrefix(text string) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil {
		return address.Prefix(address.BitLen())
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("--allow-destination %q: want an address or a CIDR, for example 10.20.0.0/16", text)
	}
	return prefix.Masked(), nil
}
