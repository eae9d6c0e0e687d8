package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"sheaf/cmd/internal/daemon"
	"sheaf/daemon/concentrator"
	"sheaf/daemon/control/settings"
	"sheaf/daemon/datapath/egress"
	"sheaf/webui"
)

// commands works beside a running daemon, and on a stopped one.
type commands interface {
	CreateToken(ctx context.Context, name string, addresses []string, validity time.Duration) (string, error)
	Routers(ctx context.Context) ([]webui.EnrolledRouter, error)
	RemoveRouter(ctx context.Context, name string) error
}

func newCommand() *cobra.Command {
	config := concentrator.Config{}
	var allowed, resolvers, ports []string
	var log daemon.LogFlags
	serve := func(c *cobra.Command, _ []string) error {
		for _, text := range allowed {
			prefix, err := parsePrefix(text)
			if err != nil {
				return daemon.Usage(err)
			}
			config.Allowed = append(config.Allowed, prefix)
		}
		for _, text := range resolvers {
			resolver, err := parseResolver(text)
			if err != nil {
				return daemon.Usage(err)
			}
			config.Resolvers = append(config.Resolvers, resolver)
		}
		for _, text := range ports {
			var r settings.PortRange
			if err := r.UnmarshalText([]byte(text)); err != nil {
				return daemon.Usage(fmt.Errorf("--forward-ports: %w", err))
			}
			config.ForwardPorts = append(config.ForwardPorts, egress.PortRange{First: r.First, Last: r.Last})
		}
		var err error
		if config.Log, err = log.Log(c.ErrOrStderr()); err != nil {
			return err
		}
		config.Log.Info("concentratord starts", "version", version)
		return concentrator.Run(c.Context(), config)
	}
	noArgs := daemon.Args(cobra.NoArgs)
	root := &cobra.Command{
		Use:     "concentratord",
		Short:   "End the tunnels of routers and take their traffic to the Internet",
		Version: version,
		Args:    noArgs,
		RunE:    serve,
	}
	root.PersistentFlags().StringVar(&config.StateDir, "state-dir", "/var/lib/sheaf", "directory of keys, tokens and enrolled routers")

	runFlags := func(c *cobra.Command) {
		c.Flags().StringArrayVar(&config.Listen, "listen", []string{":4443"}, "HOST:PORT to accept routers on; may be repeated")
		c.Flags().StringArrayVar(&allowed, "allow-destination", nil, "CIDR that routers may reach although it is private, or the machine's own; may be repeated")
		c.Flags().StringArrayVar(&resolvers, "resolver", nil, "ADDRESS or ADDRESS:PORT that answers the routers' DNS instead of those in /etc/resolv.conf; may be repeated")
		c.Flags().StringArrayVar(&ports, "forward-ports", nil, "PORT or FIRST-LAST that routers may have forwarded (default 1024-65535); may be repeated")
		c.Flags().BoolVar(&config.ConnectRouters, "connect-routers", false, "let routers reach one another through the tunnel")
		log.Add(c, "log every session and refused flow")
	}
	runFlags(root)
	runCommand := &cobra.Command{Use: "run", Short: "Run the daemon (the default)", Args: noArgs, RunE: serve}
	runFlags(runCommand)

	root.AddCommand(runCommand, tokenCommand(&config), routersCommand(&config), &cobra.Command{
		Use:   "cleanup",
		Short: "Undo what a daemon that was killed left in the kernel",
		Long:  "Undo what a daemon that was killed left in the kernel. The state directory stays; delete it to forget keys and routers.",
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			to, err := new(daemon.LogFlags).Log(c.ErrOrStderr())
			if err != nil {
				return err
			}
			return concentrator.Cleanup(c.Context(), config.StateDir, to)
		},
	})
	return root
}

func tokenCommand(config *concentrator.Config) *cobra.Command {
	var name string
	var addresses []string
	var validity time.Duration
	c := &cobra.Command{
		Use:   "token --name NAME --address HOST:PORT",
		Short: "Print a one-time enrolment token for one router",
		Args:  daemon.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if name == "" || len(addresses) == 0 {
				return daemon.Usage(errors.New("token needs --name and at least one --address"))
			}
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
	return c
}

func routersCommand(config *concentrator.Config) *cobra.Command {
	var output string
	list := &cobra.Command{
		Use:   "routers",
		Short: "List the enrolled routers",
		Args:  daemon.Args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return daemon.Usage(fmt.Errorf("-o %q: want text or json", output))
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
		Args:  daemon.Args(cobra.ExactArgs(1)),
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
	_, _ = fmt.Fprintln(table, "NAME\tENROLLED\tLAST SEEN\tADDRESS\tINNER IPV4\tINNER IPV6\tSESSIONS\tFLOWS\tCARRIERS\tKEY")
	for _, r := range routers {
		seen, address := "-", "-"
		if r.LastSeen != nil {
			seen, address = r.LastSeen.Format(time.DateTime), r.Address
		}
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\n",
			r.Name, r.EnrolledAt.Format(time.DateTime), seen, address, cmp.Or(r.Inner4, "-"), cmp.Or(r.Inner6, "-"),
			r.Sessions, r.Flows, carriers(r.Carriers), r.Fingerprint)
	}
	return table.Flush()
}

// carriers names what brings a router's packets, uplinks as the router calls them.
func carriers(list []webui.RouterCarrier) string {
	var names []string
	for _, c := range list {
		// The router chose the name of the link: it must not steer a terminal.
		name := strconv.Quote(c.Link)
		names = append(names, strings.TrimPrefix(name[1:len(name)-1]+" "+c.Carrier, " "))
	}
	return cmp.Or(strings.Join(names, ", "), "-")
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

// parseResolver reads the address of a DNS server, on port 53 unless given.
func parseResolver(text string) (netip.AddrPort, error) {
	if address, err := netip.ParseAddr(text); err == nil {
		return netip.AddrPortFrom(address, 53), nil
	}
	resolver, err := netip.ParseAddrPort(text)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("--resolver %q: want an address, or one with a port, for example 192.0.2.53 or [2001:db8::53]:53", text)
	}
	return resolver, nil
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
