// Netlab shows and measures Sheaf on one machine, in network namespaces that it
// makes and removes itself.
//
//	netlab demo    a stock client downloads over one uplink, over the bond, and while an uplink is pulled
//	netlab bench   the figures of the README, as ratios within one run
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"sheaf/daemon/netlab"
)

// uplinks are those of the demo and of the benchmark: 50, 30 and 20 Mbit/s.
var uplinks = []netlab.Shape{
	{Rate: 50e6, Delay: 10 * time.Millisecond, Queue: 100 * time.Millisecond},
	{Rate: 30e6, Delay: 20 * time.Millisecond, Queue: 100 * time.Millisecond},
	{Rate: 20e6, Delay: 40 * time.Millisecond, Queue: 100 * time.Millisecond},
}

// payloadLimit is what the uplinks carry of TCP payload at most, in bit/s: of
// every full frame of 1514 bytes, 1448 are payload (Ethernet 14, IPv4 20, TCP 20,
// timestamps 12).
func payloadLimit(shapes []netlab.Shape) float64 {
	sum := 0.0
	for _, s := range shapes {
		sum += s.Rate
	}
	return sum * 1448 / 1514
}

func main() {
	// The emulator's thread and those that send at exact times keep their share of
	// the Go scheduler while they sleep, for up to 10 ms (runtime/proc.go, retake):
	// whoever is to run meanwhile needs one of its own.
	runtime.GOMAXPROCS(runtime.NumCPU() + 6)
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	executable, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "netlab:", err)
		return 1
	}
	binaries := filepath.Dir(executable)
	root := &cobra.Command{Use: "netlab", Short: "Show and measure Sheaf in network namespaces", SilenceUsage: true, SilenceErrors: true}
	root.PersistentFlags().StringVar(&binaries, "binaries", binaries, "directory of sheafd, sheafctl and concentratord")
	var options demoOptions
	demoCommand := &cobra.Command{Use: "demo", Short: "Watch a download over one uplink, over all, and while one is pulled", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return demo(c.Context(), binaries, options) }}
	demoCommand.Flags().IntVar(&options.megabytes, "megabytes", 60, "size of each download")
	demoCommand.Flags().BoolVar(&options.hold, "hold", false, "keep the lab up until Ctrl-C")
	var measure benchOptions
	benchCommand := &cobra.Command{Use: "bench", Short: "Measure", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			measure.binaries = binaries
			return bench(c.Context(), measure)
		}}
	benchCommand.Flags().StringVar(&measure.only, "only", "", "one part: "+partNames())
	benchCommand.Flags().IntVar(&measure.runs, "runs", 0, "how often to repeat what is repeated; 0 is each part's own number")
	awakeCommand := &cobra.Command{Use: "awake", Hidden: true, Short: "Keep the processors from sleeping, until killed", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return stayAwake(c.Context()) }}
	root.AddCommand(demoCommand, benchCommand, awakeCommand)
	root.SetArgs(args)
	err = root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return 130
	}
	fmt.Fprintln(os.Stderr, "netlab:", err)
	return 1
}
